"""What becomes of the money: each way a sale can end, at the seam where it is decided."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ledger_rig import MemoryMedium
from terminal_rig import LAST4, SEED, SMALL, TIMEOUT_MS, WITH_FLOOR, Tap, Terminal, picture, terminal_in

from drivers.interfaces import CardChannel, CardLost, ReaderFault
from terminal.emv.apdu import Command, Exchange, transceive
from terminal.emv.outcome import Approved, Declined, OnlineRequest, Outcome, TryAgain
from terminal.ledger.errors import IllegalTransition
from terminal.ledger.ledger import Ledger
from terminal.ledger.recovery import resolve
from terminal.ledger.states import State
from terminal.ledger.values import Event, ReversalReason, Transaction
from terminal.money import EUR, KWD, USD, Amount
from terminal.payment import COMMANDS_MAX, SaleRefused, drive
from terminal.ui import flow, screens

HOUR_MS = 3_600_000
RACES_MIN, RACES_MAX = 12, 100  # each side must have won at least once, which takes a few rounds on any machine
COMMANDS_OF_A_TAP = 8  # SELECT PPSE, SELECT, GET PROCESSING OPTIONS, and the five records of the AFL


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    with terminal_in(tmp_path) as made:
        yield made


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def build(**settings: Any) -> Terminal:
        made.append(Terminal(tmp_path, **settings))
        return made[-1]

    yield build
    for each in made:
        each.close()


# ---- with the host


def test_the_host_approves(terminal: Terminal) -> None:
    terminal.online()
    sale = terminal.pay(1250)
    assert sale.state is State.APPROVED
    assert sale.authorisation_code is not None
    assert terminal.booked() == {str(sale.id): 1250}
    assert terminal.ledger.unsent() == []


def test_the_host_declines(terminal: Terminal) -> None:
    terminal.online()
    sale = terminal.pay(1251)
    assert (sale.state, sale.reason) == (State.DECLINED, "insufficient_funds")
    assert terminal.booked() == {}


def test_a_card_that_declines_is_asked_no_further(terminal: Terminal) -> None:
    terminal.online()
    sale = terminal.pay(1250, "declines")
    assert (sale.state, sale.reason) == (State.DECLINED, "card_declined")
    assert sale.card is not None
    assert terminal.host.bookings() == []


@pytest.mark.parametrize("card", ["emulator", "no-fdda", "broken-certificate"])
def test_with_a_host_its_word_counts_not_the_authentication(terminal: Terminal, card: str) -> None:
    """The host checks the cryptogram: it refuses the emulator, and takes a true card whose certificate is broken."""
    terminal.online()
    assert terminal.pay(1250, card).state is (State.DECLINED if card == "emulator" else State.APPROVED)


# ---- without the host


@pytest.mark.parametrize(
    ("card", "state"),
    [
        ("normal", State.ACCEPTED),
        ("wrong-key", State.ACCEPTED),  # proved itself; that its cryptogram is wrong only the issuer can tell
        ("emulator", State.DECLINED),
        ("no-fdda", State.DECLINED),
        ("broken-certificate", State.DECLINED),
        ("declines", State.DECLINED),
    ],
)
def test_without_a_way_only_a_card_that_proved_itself_buys(terminal: Terminal, card: str, state: State) -> None:
    terminal.offline()
    sale = terminal.pay(1250, card)
    assert sale.state is state
    assert len(terminal.waiting()) == (state is State.ACCEPTED)
    assert terminal.booked() == {}


@pytest.mark.parametrize("sync", ["never heard of", "silent for too long"])
def test_without_sync_there_is_no_way_either(terminal: Terminal, sync: str) -> None:
    if sync == "silent for too long":
        terminal.call("link.report", online=True)
        terminal.clock.sleep_ms(20_001)
    assert terminal.pay(1250).state is State.ACCEPTED


def test_what_was_accepted_is_settled_or_refused_later(terminal: Terminal) -> None:
    terminal.offline()
    good, bad = terminal.pay(1250), terminal.pay(1251)
    assert terminal.carry() == ["settled", "refused"]
    assert (terminal.state(good.id), terminal.state(bad.id)) == (State.SETTLED, State.REFUSED)
    assert terminal.booked() == {str(good.id): 1250}
    assert terminal.ledger.exposure(EUR).count == 0


@pytest.mark.parametrize("policy", ["emv", "decline"])
def test_other_policies_decline_without_a_host(make: Callable[..., Terminal], policy: str) -> None:
    terminal = make(sale=f'offline = "{policy}"')
    terminal.offline()
    sale = terminal.pay(1250)
    assert (sale.state, sale.reason) == (State.DECLINED, "unable_to_go_online")
    assert terminal.waiting() == []  # nothing left, so nothing is to be reversed


@pytest.mark.parametrize(
    ("minors", "states"),
    [
        ([4_000], "a"),  # per sale: 40.00
        ([4_001], "d"),
        ([4_000, 4_000, 2_000, 1], "aaad"),  # sum: 100.00
        ([4_000, 4_000, 2_001, 2_000], "aada"),  # a declined sale does not use up what it asked for
        ([1, 1, 1, 1], "aaad"),  # count: 3
    ],
)
def test_limits_on_what_stands_without_the_host(terminal: Terminal, minors: list[int], states: str) -> None:
    terminal.offline()
    got = [terminal.pay(minor).state for minor in minors]
    assert got == [State.ACCEPTED if letter == "a" else State.DECLINED for letter in states]


def test_answers_make_room_again_and_nothing_else_does(terminal: Terminal) -> None:
    terminal.offline()
    for minor in (4_000, 4_000, 2_000):
        assert terminal.pay(minor).state is State.ACCEPTED
    terminal.restart()
    terminal.offline()
    assert terminal.pay(1).state is State.DECLINED
    terminal.carry()
    assert terminal.pay(4_000).state is State.ACCEPTED


@pytest.mark.parametrize(("age_ms", "state"), [(24 * HOUR_MS, State.ACCEPTED), (24 * HOUR_MS + 1, State.DECLINED)])
def test_the_oldest_unanswered_sale_limits_the_age(terminal: Terminal, age_ms: int, state: State) -> None:
    terminal.offline()
    assert terminal.pay(100).state is State.ACCEPTED
    terminal.clock.sleep_ms(age_ms)
    assert terminal.pay(100).state is state


# ---- the card's own approval


def test_a_card_may_approve_offline_where_the_terminal_lets_it(make: Callable[..., Terminal]) -> None:
    terminal = make(more=WITH_FLOOR, sale='offline = "emv"')
    terminal.online()
    terminal.link.on_outbox = lambda: None
    transaction = terminal.begin(1250)
    outcome = terminal.read(transaction, "offline")
    assert isinstance(outcome, Approved)
    sale = terminal.decide(transaction, outcome)
    assert (sale.state, sale.reason) == (State.ACCEPTED, "offline")
    assert terminal.carry() == ["settled"]
    assert terminal.booked() == {str(sale.id): 1250}


def test_a_card_approves_only_within_the_terminals_own_limits(make: Callable[..., Terminal]) -> None:
    terminal = make(more=WITH_FLOOR)
    assert terminal.pay(4_000, "offline").state is State.ACCEPTED
    assert terminal.pay(4_001, "offline").state is State.DECLINED


# ---- no answer in time


def test_no_answer_in_time_and_late_approval_settles(terminal: Terminal) -> None:
    terminal.withheld()
    sale = terminal.pay(1250)
    assert (sale.state, sale.reason) == (State.ACCEPTED, "no_answer")
    (item,) = terminal.items()
    assert item["event"] == Event.AUTHORISATION  # the one that is under way stands: no second one, no reversal
    assert terminal.carry() == ["settled"]
    assert terminal.booked() == {str(sale.id): 1250}


def test_no_answer_in_time_and_late_decline_is_refused(terminal: Terminal) -> None:
    terminal.withheld()
    sale = terminal.pay(1251)
    assert sale.state is State.ACCEPTED
    assert terminal.carry() == ["refused"]
    assert terminal.booked() == {}


@pytest.mark.parametrize(
    ("minor", "card", "sale"),
    [
        (4_001, "normal", ""),
        (1_250, "emulator", ""),
        (1_250, "no-fdda", ""),
        (1_250, "broken-certificate", ""),
        (1_250, "normal", 'offline = "decline"'),
        (1_250, "normal", 'offline = "emv"'),
    ],
)
def test_no_answer_in_time_outside_the_envelope_is_reversed(
    make: Callable[..., Terminal], minor: int, card: str, sale: str
) -> None:
    terminal = make(sale=sale)
    terminal.withheld()
    paid = terminal.pay(minor, card)
    assert (paid.state, paid.reason) == (State.REVERSING, "timeout")
    assert [item["event"] for item in terminal.items() if item["urgent"]] == [Event.AUTHORISATION, Event.REVERSAL]


def test_after_a_time_out_a_late_approval_changes_nothing(terminal: Terminal) -> None:
    terminal.withheld()
    sale = terminal.pay(4_500)
    authorisation, reversal = terminal.items()
    late = terminal.answer_to(authorisation)
    assert terminal.booked() == {str(sale.id): 4_500}
    assert terminal.deliver(authorisation["key"], late) == "reversing"
    assert terminal.state(sale.id) is State.REVERSING
    done = terminal.answer_to(reversal)
    assert terminal.deliver(reversal["key"], done) == "reversed"
    assert terminal.booked() == {}
    assert terminal.ledger.unsent() == []


def test_a_reversal_that_overtakes_its_sale_ends_both(terminal: Terminal) -> None:
    terminal.withheld()
    terminal.pay(4_500)
    authorisation, reversal = terminal.items()
    done = terminal.answer_to(reversal)
    assert terminal.deliver(reversal["key"], done) == "reversed"
    # The envelope that was overtaken arrives after all, from whatever held it up on the way.
    late = terminal.answer_to(authorisation)
    assert terminal.deliver(authorisation["key"], late) == "reversed"
    assert terminal.booked() == {}
    assert terminal.ledger.unsent() == []


def test_a_sale_under_way_counts_against_the_limits_when_it_times_out(terminal: Terminal) -> None:
    terminal.offline()
    for minor in (4_000, 4_000, 1_000):
        assert terminal.pay(minor).state is State.ACCEPTED
    terminal.withheld()
    assert terminal.pay(1_000).state is State.REVERSING  # the fourth, where three may stand


# ---- answer and time-out in the same moment


@pytest.mark.parametrize("minor", [1_250, 4_500], ids=["deferral", "reversal"])
def test_answer_and_time_out_race_and_one_wins(terminal: Terminal, minor: int) -> None:
    chance = random.Random(SEED)
    winners: list[State] = []
    while len(winners) < RACES_MIN or len(set(winners)) < 2:
        assert len(winners) < RACES_MAX, f"seed {SEED}: no race, {winners[0]} always wins"
        winners.append(race(terminal, minor, chance.uniform(0, 0.004), answer_first=len(winners) % 2 == 0))


def race(terminal: Terminal, minor: int, head_start_s: float, *, answer_first: bool) -> State:
    """One sale whose answer arrives as its time is up; how the customer was told it ended, which must hold."""
    start = threading.Barrier(2, timeout=10)
    lag = threading.Event()
    told: list[str] = []

    def deliver(item: dict[str, Any], answer: str) -> None:
        start.wait()
        if not answer_first:
            lag.wait(head_start_s)
        told.append(terminal.deliver(item["key"], answer))

    def both() -> None:
        terminal.link.on_outbox = lambda: None
        (item,) = terminal.items()
        thread = threading.Thread(target=deliver, args=(item, terminal.answer_to(item)))
        threads.append(thread)
        thread.start()
        start.wait()
        if answer_first:
            lag.wait(head_start_s)
        terminal.clock.hurry_ms = TIMEOUT_MS

    threads: list[threading.Thread] = []
    terminal.call("link.report", online=True)
    terminal.link.on_outbox = both
    shown = terminal.pay(minor)
    threads[0].join(10)
    terminal.clock.hurry_ms = 0
    state, left = terminal.state(shown.id), [item["event"] for item in terminal.items()]
    match shown.state:
        case State.APPROVED:
            assert (state, told, left) == (State.APPROVED, ["approved"], [])
        case State.ACCEPTED | State.SETTLED:
            assert (state, told, left) == (State.SETTLED, ["settled"], [])
        case State.REVERSING:
            assert (state, told, left) == (State.REVERSING, ["reversing"], [Event.REVERSAL])
            terminal.carry()
        case other:
            pytest.fail(f"a sale was shown as {other}")
    assert (str(shown.id) in terminal.booked()) == (shown.state is not State.REVERSING)
    return State.ACCEPTED if shown.state is State.SETTLED else shown.state


def test_an_answer_between_the_look_and_the_time_out_wins(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrowest case, made sure to happen: the answer is committed while the time-out makes up its mind."""
    terminal.call("link.report", online=True)
    commit = terminal.ledger.commit_reversal

    def too_late(*given: Any) -> Transaction:
        terminal.link.on_outbox = lambda: None
        terminal.carry()
        return commit(*given)

    terminal.withheld()
    monkeypatch.setattr(terminal.ledger, "commit_reversal", too_late)
    sale = terminal.pay(4_500)
    assert sale.state is State.APPROVED
    assert terminal.items() == []


# ---- taking back


@pytest.mark.parametrize("before", [State.ACCEPTED, State.APPROVED, State.SETTLED])
def test_what_was_sold_is_taken_back(terminal: Terminal, before: State) -> None:
    if before is State.APPROVED:
        terminal.online()
    else:
        terminal.offline()
    sale = terminal.pay(1250)
    if before is State.SETTLED:
        terminal.carry()
    assert terminal.state(sale.id) is before
    terminal.online()
    terminal.payments.reverse(sale, ReversalReason.VOID)
    assert terminal.state(sale.id) is State.REVERSED
    assert terminal.booked() == {}
    assert terminal.ledger.unsent() == []
    with pytest.raises(IllegalTransition):
        terminal.payments.reverse(sale, ReversalReason.VOID)


def test_what_was_declined_cannot_be_taken_back(terminal: Terminal) -> None:
    terminal.online()
    sale = terminal.pay(1251)
    with pytest.raises(IllegalTransition):
        terminal.payments.reverse(sale, ReversalReason.VOID)
    assert terminal.waiting() == []


def test_a_sale_without_a_cryptogram_is_void_and_frees_its_amount(terminal: Terminal) -> None:
    transaction = terminal.begin(4_000)
    assert terminal.ledger.exposure(EUR).sum_minor == 4_000
    assert terminal.payments.void(transaction, "no_card").state is State.VOID
    assert terminal.ledger.exposure(EUR).sum_minor == 0


# ---- before a card is asked


@pytest.mark.parametrize(
    ("amount", "code"),
    [
        (Amount(0, EUR), "zero_amount"),
        (Amount(50_001, EUR), "over_limit"),
        (Amount(100, USD), "currency"),
        (Amount(100, KWD), "currency"),
    ],
)
def test_limits_hold_before_a_card_is_asked(terminal: Terminal, amount: Amount, code: str) -> None:
    with pytest.raises(SaleRefused, match=r"nothing was charged") as refused:
        terminal.payments.begin(amount, None)
    assert refused.value.code == code
    assert terminal.ledger.transactions(10) == []
    assert terminal.begin(50_000).state is State.OPENED  # the limit itself is allowed


def test_a_reference_names_one_sale_for_ever(terminal: Terminal) -> None:
    terminal.online()
    first = terminal.begin(1250, "bill-7")
    assert terminal.begin(1250, "bill-7") == first
    outcome = terminal.read(first)
    assert isinstance(outcome, OnlineRequest)
    sale = terminal.decide(first, outcome)
    assert terminal.begin(1250, "bill-7").state is State.APPROVED
    with pytest.raises(SaleRefused) as refused:
        terminal.begin(1251, "bill-7")
    assert refused.value.code == "reference_taken"
    terminal.restart()
    assert terminal.begin(1250, "bill-7").id == sale.id
    assert terminal.begin(1250).id != sale.id
    assert terminal.booked() == {str(sale.id): 1250}


# ---- what the card is shown


@pytest.mark.parametrize(
    ("wall_ms", "synchronised", "date"),
    [
        (1_798_000_000_000, True, "261223"),
        (1_798_000_000_000, False, "261223"),
        (0, False, "261123"),  # the release: no clock that says an earlier day can be right
    ],
)
def test_the_date_is_never_earlier_than_can_be(terminal: Terminal, wall_ms: int, synchronised: bool, date: str) -> None:
    terminal.clock.offset_ms = wall_ms - terminal.clock.running_ms
    terminal.clock.is_synchronised = synchronised
    outcome = terminal.read(terminal.begin())
    assert isinstance(outcome, OnlineRequest)
    assert outcome.card.tags[0x9A].hex() == date


@pytest.mark.parametrize("sales_since", [0, 1])
def test_a_clock_that_fell_back_does_not_go_before_the_last_sale(terminal: Terminal, sales_since: int) -> None:
    terminal.offline()
    terminal.pay()
    terminal.clock.offset_ms -= 48 * HOUR_MS
    terminal.clock.is_synchronised = False
    for _ in range(sales_since):
        terminal.pay()
    outcome = terminal.read(terminal.begin())
    assert isinstance(outcome, OnlineRequest)
    assert outcome.card.tags[0x9A].hex() == "261223"


@pytest.mark.parametrize(("step_ms", "passes_ms", "state"), [
    (20_000 * HOUR_MS, 1, State.ACCEPTED),
    (-20_000 * HOUR_MS, 25 * HOUR_MS, State.DECLINED),
], ids=["set right", "set back"])  # fmt: skip
def test_setting_the_clock_makes_no_sale_older_or_younger(
    terminal: Terminal, step_ms: int, passes_ms: int, state: State
) -> None:
    """While the clock is not synchronised, age is running time."""
    terminal.offline()
    terminal.clock.is_synchronised = False
    assert terminal.pay(100).state is State.ACCEPTED
    terminal.clock.offset_ms += step_ms
    terminal.clock.is_synchronised = True
    terminal.clock.sleep_ms(passes_ms)
    assert terminal.pay(100).state is state


def test_the_hosts_record_holds_what_it_needs_and_no_more(terminal: Terminal) -> None:
    """The sealed data objects are those of an online request; what names the cardholder stays on the card."""
    terminal.offline()
    sale = terminal.pay()
    (item,) = terminal.items()
    assert sale.card is not None
    assert (sale.card.scheme, sale.card.last4, sale.card.oda, sale.card.cvm) == ("Visa", LAST4, "fdda_ok", "none")
    assert "PAYTERM/TEST CARD" not in item["envelope"]


# ---- pumping a kernel


def endless() -> Exchange[Outcome]:
    while True:
        yield from transceive(Command(0, 0xB2, 1, 0x0C, le=0))


def test_a_card_that_never_ends_is_ended() -> None:
    asked: list[bytes] = []

    def answer(command: bytes) -> bytes:
        asked.append(command)
        return b"\x90\x00"

    with pytest.raises(CardLost, match=rf"more than {COMMANDS_MAX} commands"):
        drive(endless(), answer)
    assert len(asked) == COMMANDS_MAX


def test_an_exchange_may_end_without_a_command() -> None:
    def ended() -> Exchange[str]:
        yield from ()
        return "ended"

    assert drive(ended(), lambda _: b"") == "ended"


@pytest.mark.parametrize("number", range(1, COMMANDS_OF_A_TAP + 1))
def test_a_card_lost_at_any_command_can_be_tapped_again(terminal: Terminal, number: int) -> None:
    terminal.online()
    transaction = terminal.begin()
    assert isinstance(terminal.read(transaction, lost_at=number), TryAgain)
    outcome = terminal.read(transaction)
    assert isinstance(outcome, OnlineRequest)
    assert terminal.decide(transaction, outcome).state is State.APPROVED
    assert terminal.booked() == {str(transaction.id): 1250}


def test_a_tap_has_as_many_commands_as_these_tests_believe(terminal: Terminal) -> None:
    tap = Tap(terminal.card())
    terminal.payments.read(terminal.begin(), tap, lambda _: None)
    assert tap.commands == COMMANDS_OF_A_TAP


@pytest.mark.parametrize("number", [1, 3, COMMANDS_OF_A_TAP])
def test_a_reader_that_breaks_says_nothing_of_the_card(terminal: Terminal, number: int) -> None:
    transaction = terminal.begin()
    with pytest.raises(ReaderFault):
        terminal.read(transaction, fault_at=number)
    assert terminal.state(transaction.id) is State.OPENED


# ---- shown means safe


class ShowFirst(flow.Flow):
    """The planted bug: it believes in its own good news."""

    def _decide(
        self, transaction: Transaction, outcome: Approved | Declined | OnlineRequest, channel: CardChannel
    ) -> Transaction:
        if not isinstance(outcome, Declined):
            kind = screens.Approved if self._link.presumed_up() else screens.AcceptedOffline
            self._panel.show(kind(transaction.amount, "Visa", outcome.card.pan.last4))
        return super()._decide(transaction, outcome, channel)


class Inspector:
    """At the moment of each picture of a result, cuts the power in thought and reads what would be left."""

    def __init__(self, directory: Path, screen: screens.Screen) -> None:
        self._directory = directory
        self._looked = itertools.count()
        self._picture = picture(screen)
        self.found: list[State | None] = []
        self.media: list[MemoryMedium] = []

    def medium(self, _: Path, size_bytes: int) -> MemoryMedium:
        self.media.append(MemoryMedium(size_bytes))
        return self.media[-1]

    def attach(self, terminal: Terminal) -> None:
        self._terminal = terminal
        terminal.display.watch = self._look

    def _look(self, shown: bytes) -> None:
        if shown != self._picture:
            return
        left = MemoryMedium(self.media[0].size_bytes)
        left.durable[:] = left.now[:] = self.media[0].durable  # all that was not flushed is lost
        ledger = Ledger.open(
            self._directory / str(next(self._looked)),
            self._terminal.keys,
            clock=self._terminal.clock,
            entropy=random.Random(SEED).randbytes,
            settings=SMALL,
            medium=lambda *_: left,
        )
        try:
            last = ledger.transactions(1)
            self.found.append(last[0].state if last else None)
        finally:
            ledger.close()


SHOWN = [
    ("online", 1250, screens.Approved(Amount(1250, EUR), "Visa", LAST4), State.APPROVED),
    ("offline", 1250, screens.AcceptedOffline(Amount(1250, EUR), "Visa", LAST4), State.ACCEPTED),
    ("online", 1251, screens.Declined(Amount(1251, EUR), "insufficient_funds"), State.DECLINED),
    ("withheld", 4_001, screens.Declined(Amount(4_001, EUR), "timeout"), State.REVERSING),
]


@pytest.mark.parametrize("case", SHOWN, ids=lambda case: str(case[-1]))
def test_nothing_is_shown_that_a_power_cut_could_take_back(
    make: Callable[..., Terminal], tmp_path: Path, case: tuple[str, int, screens.Screen, State]
) -> None:
    way, minor, screen, state = case
    inspector = Inspector(tmp_path / "after", screen)
    terminal = make(medium=inspector.medium)
    inspector.attach(terminal)
    getattr(terminal, way)()
    terminal.enter(minor)
    terminal.run(Tap(terminal.card()))
    assert inspector.found == [state]


@pytest.mark.parametrize("case", SHOWN[:2], ids=lambda case: str(case[-1]))
def test_the_planted_order_is_caught(
    make: Callable[..., Terminal], tmp_path: Path, case: tuple[str, int, screens.Screen, State]
) -> None:
    way, minor, screen, state = case
    inspector = Inspector(tmp_path / "after", screen)
    terminal = make(medium=inspector.medium, flow=ShowFirst)
    inspector.attach(terminal)
    getattr(terminal, way)()
    terminal.enter(minor)
    terminal.run(Tap(terminal.card()))
    assert inspector.found[0] is not state


def test_nothing_leaves_before_it_is_durable(make: Callable[..., Terminal], tmp_path: Path) -> None:
    """When sync is woken, the envelope that it is offered survives a power cut."""
    inspector = Inspector(tmp_path / "after", screens.OneCardOnly())
    terminal = make(medium=inspector.medium)
    found: list[State | None] = []

    def look() -> None:
        inspector.attach(terminal)
        inspector._look(picture(screens.OneCardOnly()))
        found.extend(inspector.found)
        terminal.carry()

    terminal.call("link.report", online=True)
    terminal.link.on_outbox = look
    assert terminal.pay().state is State.APPROVED
    assert found == [State.AUTHORISING]


def test_a_sale_cut_off_while_the_host_is_asked_is_reversed_at_the_start(terminal: Terminal) -> None:
    """Power goes after the request may have left: nobody saw an acceptance, so it is taken back."""

    class PowerCutError(Exception):
        pass

    def cut() -> None:
        raise PowerCutError

    terminal.call("link.report", online=True)
    terminal.link.on_outbox = cut
    transaction = terminal.begin(1250)
    outcome = terminal.read(transaction)
    assert isinstance(outcome, OnlineRequest)
    with pytest.raises(PowerCutError):
        terminal.decide(transaction, outcome)
    terminal.restart()
    assert terminal.resolution.reversed == (transaction.id,)
    assert terminal.state(transaction.id) is State.REVERSING
    assert resolve(terminal.ledger, terminal.payments._envelopes).reversed == ()
    terminal.carry()
    assert terminal.booked() == {}

"""What happens at the device, as scripts: what comes to the field and to the desk, and what the customer then sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from ledger_rig import MemoryMedium
from terminal_rig import LAST4, Display, Tap, Terminal, picture

from drivers.interfaces import CardCollision, CardLost, ReaderFault, ReaderMissing
from terminal.control import CallRefused
from terminal.emv.outcome import EndApplication, Outcome, TryAgain
from terminal.ledger.errors import DiskTrouble, LedgerError
from terminal.ledger.states import State
from terminal.ledger.values import Transaction
from terminal.money import EUR, Amount
from terminal.ui import flow, readers
from terminal.ui.screens import (
    AcceptedOffline,
    Approved,
    Authorising,
    Declined,
    Error,
    Idle,
    KeepOrVoid,
    OneCardOnly,
    PresentCard,
    Reading,
    RemoveCard,
    Screen,
    Start,
    UseOtherCard,
)
from terminal.ui.screens import (
    TryAgain as PresentAgain,
)

DUE = Amount(1250, EUR)
APPROVED = Approved(DUE, "Visa", LAST4)
ACCEPTED = AcceptedOffline(DUE, "Visa", LAST4)
UP_TO_THE_CARD: list[Screen] = [PresentCard(DUE), Reading(DUE)]
A_SALE = [*UP_TO_THE_CARD, Authorising(DUE), APPROVED]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def build(**settings: Any) -> Terminal:
        made.append(Terminal(tmp_path, **settings))
        return made[-1]

    yield build
    for each in made:
        each.close()


@pytest.fixture
def terminal(make: Callable[..., Terminal]) -> Terminal:
    """Online, with the display's pictures from the first sale on."""
    made = make()
    made.online()
    return made


def shown(terminal: Terminal) -> list[Screen | str]:
    """What the customer saw of the sale: after the starting picture and the idle one."""
    start, idle, *rest = terminal.shown(amount=DUE)
    assert (start, idle) == (Start("0.1.0"), "another picture")
    return rest


# ---- one sale


def test_a_tap_is_approved(terminal: Terminal) -> None:
    sale = terminal.enter(1250)
    terminal.run(None, Tap(terminal.card()))
    assert shown(terminal) == A_SALE
    assert terminal.booked() == {str(sale): 1250}
    assert terminal.ledger.transaction(sale).shown == "approved"
    assert terminal.ledger.unshown() == []


def test_a_tap_is_accepted_without_the_host(terminal: Terminal) -> None:
    terminal.offline()
    sale = terminal.enter(1250)
    terminal.run(Tap(terminal.card()))
    assert shown(terminal) == [*UP_TO_THE_CARD, Authorising(DUE), ACCEPTED]
    assert terminal.ledger.transaction(sale).shown == "accepted"


def test_a_card_that_declines(terminal: Terminal) -> None:
    terminal.enter(1250)
    terminal.run(Tap(terminal.card("declines")))
    assert shown(terminal) == [*UP_TO_THE_CARD, Declined(DUE, "card_declined")]


@pytest.mark.parametrize("lies_ms", [1, 5_000])
def test_a_card_that_stays_is_asked_to_be_removed(terminal: Terminal, lies_ms: int) -> None:
    """The result holds a while; whoever takes the card away in time is not nagged."""
    terminal.enter(1250)
    terminal.run(Tap(terminal.card(), lies_ms=lies_ms))
    assert shown(terminal) == A_SALE + ([RemoveCard(APPROVED)] if lies_ms > 1 else [])


def test_a_card_left_for_ever_does_not_block_the_device(terminal: Terminal) -> None:
    terminal.enter(1250)
    terminal.run(Tap(terminal.card(), lies_ms=3_600_000))
    assert not terminal.desk.busy
    assert terminal.clock.monotonic_ms() < 120_000


def test_sale_after_sale(terminal: Terminal) -> None:
    sales = []
    for minor in (100, 200, 300):
        sales.append(terminal.enter(minor))
        terminal.run(Tap(terminal.card()))
    assert terminal.booked() == {str(sale): minor for sale, minor in zip(sales, (100, 200, 300), strict=True)}


def test_the_register_hears_the_result_when_it_is_shown_not_before(terminal: Terminal) -> None:
    sale = terminal.enter(1250)
    heard: list[tuple[bool, bool]] = []

    def watch(shown: bytes) -> None:
        is_result = shown in (picture(APPROVED), picture(RemoveCard(APPROVED)))
        result = terminal.call("sale.result", transaction=str(sale))
        heard.append((is_result, result["decided"]))

    terminal.display.watch = watch
    terminal.run(Tap(terminal.card(), lies_ms=5_000))
    assert heard[-2:] == [(True, False), (True, True)]  # the card may lie there still
    assert not any(decided for _, decided in heard[:-1])


# ---- no card, another card, two cards


def test_no_card_in_time_is_void(terminal: Terminal) -> None:
    sale = terminal.enter(1250)
    terminal.run()
    assert shown(terminal) == [PresentCard(DUE)]
    assert (terminal.state(sale), terminal.ledger.transaction(sale).reason) == (State.VOID, "no_card")
    assert terminal.clock.monotonic_ms() >= terminal.config.sale.card_timeout_ms
    assert terminal.alive > 200  # the watchdog is fed while the terminal waits for a card


def test_a_cancelled_sale_is_void(terminal: Terminal) -> None:
    sale = terminal.enter(1250)
    terminal.run(None, lambda: terminal.call("sale.cancel", transaction=str(sale)), Tap(terminal.card()))
    assert (terminal.state(sale), terminal.ledger.transaction(sale).reason) == (State.VOID, "cancelled")
    assert terminal.reader.taps == []


def test_a_sale_cancelled_before_the_device_took_it_is_void(terminal: Terminal) -> None:
    sale = terminal.enter(1250)
    assert terminal.call("sale.cancel", transaction=str(sale)) == {"cancelling": True}
    terminal.run(Tap(terminal.card()))
    assert terminal.state(sale) is State.VOID
    again = terminal.enter(1250)
    terminal.run(Tap(terminal.card()))
    assert terminal.state(again) is State.APPROVED  # a cancellation is for its own sale only


def test_a_cancellation_comes_too_late_for_a_card_that_is_read(terminal: Terminal) -> None:
    sale = terminal.enter(1250)
    terminal.run(Tap(terminal.card(), then=lambda: terminal.call("sale.cancel", transaction=str(sale))))
    assert terminal.state(sale) is State.APPROVED


def test_a_cancellation_while_a_card_is_lost_ends_the_sale(terminal: Terminal) -> None:
    sale = terminal.enter(1250)
    cancel = Tap(terminal.card(), lost_at=3, then=lambda: terminal.call("sale.cancel", transaction=str(sale)))
    terminal.run(cancel, Tap(terminal.card()))
    assert terminal.state(sale) is State.VOID


def test_two_cards_are_told_apart_by_people(terminal: Terminal) -> None:
    terminal.enter(1250)
    terminal.run(CardCollision(), Tap(terminal.card()))
    assert shown(terminal) == [PresentCard(DUE), OneCardOnly(), *A_SALE]


def test_a_card_that_came_and_went_is_wanted_again(terminal: Terminal) -> None:
    terminal.enter(1250)
    terminal.run(CardLost(), Tap(terminal.card()))
    assert shown(terminal) == [PresentCard(DUE), PresentAgain(DUE, "card_lost"), *A_SALE[1:]]


def test_a_card_pulled_while_it_is_read_is_wanted_again(terminal: Terminal) -> None:
    terminal.enter(1250)
    terminal.run(Tap(terminal.card(), lost_at=4), Tap(terminal.card()))
    assert shown(terminal) == [*UP_TO_THE_CARD, PresentAgain(DUE, "card_lost"), *A_SALE]
    assert [tap.is_closed for tap in terminal.reader.taps] == [True, True]


@pytest.mark.parametrize("card", ["not-supported", "blocked"])
def test_a_card_that_does_not_work_here_leaves_room_for_another(terminal: Terminal, card: str) -> None:
    sale = terminal.enter(1250)
    terminal.run(Tap(terminal.card(card)), Tap(terminal.card()))
    assert shown(terminal) == [*UP_TO_THE_CARD, UseOtherCard(DUE), *A_SALE]
    assert terminal.state(sale) is State.APPROVED


def test_a_card_that_never_ends_is_one_to_try_again(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound on commands ends the presentation, not the sale."""
    monkeypatch.setattr("terminal.payment.COMMANDS_MAX", 3)
    terminal.enter(1250)
    terminal.run(Tap(terminal.card()), monkeypatch.undo, Tap(terminal.card()))
    assert shown(terminal) == [*UP_TO_THE_CARD, PresentAgain(DUE, "card_lost"), *A_SALE]


def test_a_card_that_never_works_ends_the_sale_not_the_day(make: Callable[..., Terminal]) -> None:
    terminal = make(sale="result_hold_ms = 0")
    sale = terminal.enter(1250)
    terminal.run(*(Tap(terminal.card("not-supported")) for _ in range(flow.ATTEMPTS_MAX + 5)))
    assert (terminal.state(sale), terminal.ledger.transaction(sale).reason) == (State.VOID, "no_usable_card")
    assert len(terminal.reader.taps) == flow.ATTEMPTS_MAX
    terminal.reader.script.clear()
    next_sale = terminal.enter(1250)
    terminal.run(Tap(terminal.card()))
    assert terminal.state(next_sale) is State.ACCEPTED


@pytest.mark.parametrize(
    ("outcome", "screen", "pause_ms"),
    [
        (TryAgain("confirm_on_phone"), PresentAgain(DUE, "confirm_on_phone"), 0),
        (EndApplication("parse_error"), UseOtherCard(DUE), 0),
    ],
)
def test_what_the_kernel_wants_is_shown(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, screen: Screen, pause_ms: int
) -> None:
    read = terminal.payments.read

    def once(*_: Any) -> Outcome:
        monkeypatch.undo()
        return outcome

    monkeypatch.setattr(terminal.payments, "read", once)
    terminal.enter(1250)
    terminal.run(Tap(terminal.card()), Tap(terminal.card()))
    assert terminal.payments.read == read
    assert picture(screen) in terminal.display.pictures
    assert shown(terminal)[-1] == APPROVED


# ---- reader and display come and go


def test_a_reader_that_breaks_while_a_card_is_read_is_taken_up_again(terminal: Terminal) -> None:
    sale = terminal.enter(1250)
    terminal.run(Tap(terminal.card(), fault_at=3), Tap(terminal.card()))
    assert shown(terminal) == [*UP_TO_THE_CARD, Error("reader_fault"), *A_SALE]
    assert terminal.reader.closed == 1
    assert terminal.booked() == {str(sale): 1250}


def test_a_reader_unplugged_while_it_waits_is_said_until_it_is_back(terminal: Terminal) -> None:
    terminal.reader.opening.extend([None, ReaderMissing("unplugged"), ReaderMissing("unplugged"), None])
    terminal.enter(1250)
    before_ms = terminal.clock.monotonic_ms()
    terminal.run(ReaderMissing("unplugged"), Tap(terminal.card()))
    assert shown(terminal) == [PresentCard(DUE), Error("reader_missing"), *A_SALE]
    assert not terminal.reader.opening
    assert terminal.clock.monotonic_ms() - before_ms >= 2 * readers.REOPEN_MS  # tried now and then, not without pause


def test_a_reader_that_stays_away_ends_the_sale_in_time(terminal: Terminal) -> None:
    terminal.reader.opening.extend([ReaderMissing("nothing there")] * 1_000)
    sale = terminal.enter(1250)
    terminal.run()
    assert terminal.state(sale) is State.VOID
    assert terminal.shown(amount=DUE)[1:] == [Error("reader_missing")]


@pytest.mark.parametrize("faults", [[ReaderFault("mute")], [None, ReaderFault("mute")]], ids=["at once", "later"])
def test_a_reader_that_breaks_after_the_result_costs_nothing(
    terminal: Terminal, faults: list[ReaderFault | None]
) -> None:
    sale = terminal.enter(1250)
    terminal.reader.removal.extend(faults)
    terminal.run(Tap(terminal.card(), lies_ms=5_000))
    assert APPROVED in shown(terminal)
    assert shown(terminal)[-1] == Error("reader_fault")
    assert terminal.state(sale) is State.APPROVED
    second = terminal.enter(1250)
    terminal.run(Tap(terminal.card()))
    assert terminal.state(second) is State.APPROVED


def test_a_broken_display_costs_no_sale_and_comes_back(terminal: Terminal) -> None:
    first = terminal.enter(1250)
    terminal.run(lambda: setattr(terminal.display, "is_broken", True), Tap(terminal.card()))
    assert terminal.state(first) is State.APPROVED
    assert [sale.id for sale in terminal.ledger.unshown()] == [first]  # nobody saw it
    assert terminal.call("sale.result", transaction=str(first))["decided"]
    terminal.display.is_broken = False
    terminal.call("attention.resolve", transaction=str(first), keep=True)
    second = terminal.enter(1250)
    terminal.run(Tap(terminal.card()))
    assert shown(terminal)[-1] == APPROVED
    assert terminal.ledger.transaction(second).shown == "approved"


def test_a_display_that_breaks_under_the_result_leaves_it_unshown(terminal: Terminal) -> None:
    sale = terminal.enter(1250)

    def unplug(shown: bytes) -> None:
        if shown == picture(Authorising(DUE)):
            terminal.display.is_broken = True

    terminal.display.watch = unplug
    terminal.run(Tap(terminal.card()))
    assert terminal.state(sale) is State.APPROVED
    assert terminal.ledger.transaction(sale).shown is None


# ---- idle


def idle_picture(terminal: Terminal) -> bytes:
    terminal.enter(1)
    terminal.display.pictures.clear()
    terminal.run(Tap(terminal.card("declines")))
    return terminal.display.pictures[1]  # the first is the start


def test_idle_says_the_time_only_if_it_is_known(terminal: Terminal) -> None:
    terminal.clock.is_synchronised = False
    assert idle_picture(terminal) == picture(Idle(None, online=True, unsent=0, oldest_minutes=None))


def test_idle_says_what_waits_and_for_how_long(terminal: Terminal) -> None:
    terminal.clock.is_synchronised = False
    terminal.offline()
    for _ in range(2):
        terminal.enter(1250)
        terminal.run(Tap(terminal.card()))
    terminal.clock.sleep_ms(7 * 60_000 + 50_000)
    assert idle_picture(terminal) == picture(Idle(None, online=False, unsent=2, oldest_minutes=7))


def test_idle_does_not_wait_less_than_no_time(terminal: Terminal) -> None:
    """A clock that was set back makes nothing younger than new."""
    terminal.clock.is_synchronised = False
    terminal.offline()
    terminal.enter(1250)
    terminal.run(Tap(terminal.card()))
    terminal.clock.offset_ms -= 3_600_000
    assert idle_picture(terminal) == picture(Idle(None, online=False, unsent=1, oldest_minutes=0))


def test_idle_says_that_there_is_no_reader(terminal: Terminal) -> None:
    terminal.reader.opening.append(ReaderFault("mute"))
    assert idle_picture(terminal) == picture(Error("reader_fault"))


def test_idle_time_is_local(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert idle_picture(terminal) == picture(Idle("05:26", online=True, unsent=0, oldest_minutes=None))
    finally:
        monkeypatch.undo()
        time.tzset()


def test_what_needs_no_flush_of_its_own_is_flushed_while_nobody_waits(
    make: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    media: list[MemoryMedium] = []

    def medium_of(_: Path, size_bytes: int) -> MemoryMedium:
        media.append(MemoryMedium(size_bytes))
        return media[-1]

    terminal = make(medium=medium_of)
    monkeypatch.setattr(flow, "IDLE_MS", 1)  # the one wait here that is not on the test's clock
    rounds = iter([False, True])
    terminal.stopping = lambda: next(rounds)
    terminal.ledger.note("start")
    assert media[0].now != media[0].durable
    terminal.run()
    (medium,) = media
    assert medium.now == medium.durable


# ---- after a power cut


def unseen(terminal: Terminal) -> UUID:
    """A sale that stands, but the power went before anybody saw it."""
    terminal.display.is_broken = True
    sale = terminal.enter(1250)
    terminal.run(Tap(terminal.card()))
    terminal.display = Display()
    terminal.restart()
    assert [each.id for each in terminal.resolution.unshown] == [sale]
    assert [each["id"] for each in terminal.call("status")["attention"]] == [str(sale)]
    return sale


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "void"])
def test_a_person_decides_on_what_was_never_shown_before_the_next_sale(terminal: Terminal, keep: bool) -> None:
    sale = unseen(terminal)
    terminal.online()

    def say(shown: bytes) -> None:
        if shown == picture(KeepOrVoid(DUE)):
            terminal.call("attention.resolve", transaction=str(sale), keep=keep)

    terminal.display.watch = say
    second = terminal.enter(1250)
    terminal.run(Tap(terminal.card()))
    assert terminal.shown(amount=DUE)[:2] == [Start("0.1.0"), KeepOrVoid(DUE)]
    assert terminal.state(sale) is (State.APPROVED if keep else State.REVERSED)
    assert terminal.ledger.unshown() == []
    assert terminal.state(second) is State.APPROVED
    assert terminal.booked() == ({str(sale): 1250} if keep else {}) | {str(second): 1250}
    assert terminal.call("status")["attention"] == []


def test_a_terminal_that_stops_before_the_word_asks_again(terminal: Terminal) -> None:
    sale = unseen(terminal)
    terminal.run()  # nothing on the desk: stopping at once
    terminal.restart()
    assert [each.id for each in terminal.resolution.unshown] == [sale]


def doubtful(terminal: Terminal) -> UUID:
    """A sale that was accepted, never shown, and that the host is going to decline."""
    terminal.offline()
    terminal.display.is_broken = True
    sale = terminal.enter(1251)
    terminal.run(Tap(terminal.card()))
    terminal.display = Display()
    terminal.restart()
    terminal.offline()
    return sale


ASKED_MAX = 20  # far more than a decision that is taken needs


def test_a_sale_that_the_host_refuses_meanwhile_waits_for_nobody(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accepted, never shown, and declined by the host while the screen asks: there is nothing left to decide."""
    monkeypatch.setattr(flow, "IDLE_MS", 1)
    sale = doubtful(terminal)
    asked: list[State] = []

    def late(shown: bytes) -> None:
        if shown == picture(KeepOrVoid(Amount(1251, EUR))):
            asked.append(terminal.state(sale))
            assert len(asked) < ASKED_MAX, "it asks for ever"
            terminal.carry()
            terminal.offline()

    terminal.display.watch = late
    second = terminal.enter(1250)
    terminal.run(Tap(terminal.card()))
    assert (terminal.state(sale), terminal.state(second)) == (State.REFUSED, State.ACCEPTED)


def test_void_in_the_moment_of_the_hosts_refusal_does_not_stop_the_terminal(terminal: Terminal) -> None:
    """A person says void, and the host declines before the flow has heard it: the sale is gone either way."""
    sale = doubtful(terminal)

    def both(shown: bytes) -> None:
        if shown == picture(KeepOrVoid(Amount(1251, EUR))):
            terminal.call("attention.resolve", transaction=str(sale), keep=False)
            terminal.carry()
            terminal.offline()

    terminal.display.watch = both
    second = terminal.enter(1250)
    terminal.run(Tap(terminal.card()))
    assert (terminal.state(sale), terminal.state(second)) == (State.REFUSED, State.ACCEPTED)


# ---- the ledger fails


def test_a_ledger_error_is_shown_and_the_next_sale_works(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Transaction:
        monkeypatch.undo()
        raise LedgerError("refused for the test: nothing was charged")

    monkeypatch.setattr(terminal.ledger, "commit_outcome", refuse)
    first = terminal.enter(1250)
    terminal.run(Tap(terminal.card()))
    assert shown(terminal) == [*UP_TO_THE_CARD, Authorising(DUE), Error("ledger")]
    assert terminal.state(first) is State.OPENED
    second = terminal.enter(1250)
    terminal.run(Tap(terminal.card()))
    assert terminal.state(second) is State.APPROVED


def test_a_disk_that_fails_is_shown_and_ends_the_service(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is durable is then known only to recovery: the device says so, and takes nothing more until a restart."""
    terminal.enter(1250)

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fdatasync", fail)
    terminal.stopping = lambda: False
    with pytest.raises(DiskTrouble, match="do not hand over goods"):
        terminal.run(Tap(terminal.card()))
    assert shown(terminal) == [*UP_TO_THE_CARD, Authorising(DUE), Error("ledger")]
    monkeypatch.undo()
    with pytest.raises(CallRefused) as refused:
        terminal.enter(1250)
    assert refused.value.code == "ledger"
    terminal.restart()
    assert terminal.resolution.voided or terminal.resolution.reversed
    assert terminal.booked() == {}


# ---- the desk holds something that is over


def test_a_sale_that_is_over_is_not_taken_again(terminal: Terminal) -> None:
    """A register repeats its call just as the sale ends: it lies on the desk as it was, opened."""
    transaction = terminal.begin(1250)
    outcome = terminal.read(transaction)
    terminal.decide(transaction, outcome)
    terminal.ledger.mark_shown(transaction.id, "approved")
    terminal.desk.lay(transaction)
    terminal.run(Tap(terminal.card()))
    assert terminal.reader.taps == []
    assert terminal.booked() == {str(transaction.id): 1250}


@pytest.mark.parametrize("state", State)
def test_every_state_has_its_screen(terminal: Terminal, state: State) -> None:
    """Only what was sold is shown as sold."""
    from dataclasses import replace

    screen = flow.result_screen(replace(terminal.begin(1250), state=state))
    sold = state in {State.APPROVED, State.ACCEPTED, State.SETTLED}
    assert isinstance(screen, Approved | AcceptedOffline) == sold

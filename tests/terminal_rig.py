"""One terminal without processes: real ledger, keys, cards and host; time, reader, panel and sync are the test's own.

Time stands still unless somebody sleeps or the test moves it on. The reader's channel is the card itself, the panel
keeps its pictures, and sync is a stand-in that carries envelopes to a real host and brings back what it signed, by the
same calls that the real one makes. So a whole sale happens within one call, in one thread, and each step is decided
by the test: what the card does, when an answer comes, how much time passes before.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from functools import cache
from pathlib import Path
from shutil import copy
from typing import Any, TypeAlias
from uuid import UUID

import msgspec
from PIL import Image

from drivers.interfaces import CardChannel, CardLost, DisplayFault, DriverError, Interface, ReaderFault
from hwsim.cards import visa
from hwsim.cards.personalise import Bureau, CardProfile, laboratory_pan, personalise
from hwsim.cards.visa import VisaCard
from hwsim.host import Host, provision
from terminal import emvsetup
from terminal.config import Config, load
from terminal.control import CallRefused
from terminal.days import Days
from terminal.desk import Desk
from terminal.emv.outcome import Approved, Declined, OnlineRequest, Outcome
from terminal.ledger.journal import FileMedium
from terminal.ledger.keys import HOST_ANSWER_KEY, HOST_SEALING_KEY, TerminalKeys, fingerprint, generate
from terminal.ledger.ledger import Ledger, LedgerSettings, OpenMedium
from terminal.ledger.recovery import resolve
from terminal.ledger.sealing import Envelopes
from terminal.ledger.states import State
from terminal.ledger.values import OutboxItem, Transaction
from terminal.link import Link
from terminal.money import EUR, Amount
from terminal.payment import Payments
from terminal.reconciling import Reconciling
from terminal.registration import Registration
from terminal.service import Service
from terminal.ui import screens
from terminal.ui.flow import Flow
from terminal.ui.panel import Panel
from terminal.ui.readers import Readers
from terminal.ui.screens import Screen, render

SEED = 20261123
NOW_MS = 1_798_000_000_000  # 2026-12-23, after the release and before the cards expire
TERMINAL, MERCHANT = "T-0001", "M-0001"
LAST4 = laboratory_pan(7899).digits[-4:]
TIMEOUT_MS = 1_000
OFFLINE_MAX_MINOR = 5_000  # of the cards that approve offline
SMALL = LedgerSettings(journal_size_bytes=4 << 20, wal_size_bytes=256 << 10)

CONFIG = """\
[terminal]
id = "T-0001"
merchant = "M-0001"
country = 276
currency = "EUR"

[ledger]
directory = "{directory}/ledger"
keys = "{directory}/keys"
journal_mib = 4

[socket]
path = "{directory}/terminal.sock"

[sale]
authorisation_timeout_ms = 1000
card_timeout_ms = 60000
{sale}

[limits.EUR]
transaction = "500.00"
offline_transaction = "40.00"
offline_sum = "100.00"
offline_count = 3
offline_age_hours = 24

[host]
url = "https://127.0.0.1:1"
sealing_fingerprint = "{sealing}"
answer_fingerprint = "{answer}"

[[ca_keys]]
{ca_key}

{more}
"""
# A terminal that lets the card decide below 50.00: the way to an offline approval.
WITH_FLOOR = """
[[aids]]
aid = "A000000003"
kernel = 3
contactless_floor = 5000
"""


def seeded(seed: int = SEED) -> Callable[[int], bytes]:
    return random.Random(seed).randbytes


@cache
def bureau() -> Bureau:
    return Bureau.create(seeded())


@cache
def profiles() -> dict[str, CardProfile]:
    """Every kind of card, personalised once: RSA keys take their time."""
    ordinary = personalise(bureau(), seeded(), pan=laboratory_pan(7899))
    made = {name: variant(ordinary, seeded()) for name, variant in visa.VARIANTS.items()}
    return made | {"offline": replace(ordinary, offline_limit_minor=OFFLINE_MAX_MINOR)}


class HandClock:
    """Time that passes only when somebody sleeps, or the test moves it on.

    `hurry_ms` passes with every look: whoever waits for something that never comes finds the time up at once.
    """

    boot_id = UUID(int=7)

    def __init__(self) -> None:
        self.running_ms = 1_000
        self.offset_ms = NOW_MS - self.running_ms
        self.hurry_ms = 0
        self.is_synchronised = True

    def monotonic_ms(self) -> int:
        self.running_ms += self.hurry_ms
        return self.running_ms

    def sleep_ms(self, duration_ms: int) -> None:
        self.running_ms += duration_ms

    def wall_ms(self) -> int:
        return self.running_ms + self.offset_ms

    def synchronised(self) -> bool:
        return self.is_synchronised


@dataclass
class Tap:
    """A card comes into the field; it is gone, or the reader breaks, instead of the answer to a command (from 1)."""

    card: VisaCard
    lost_at: int | None = None
    fault_at: int | None = None
    lies_ms: int = 0
    then: Callable[[], object] = lambda: None  # what happens while the card is read
    interface = Interface.CONTACTLESS
    activation = b""
    commands: int = 0
    is_closed: bool = False

    def transmit(self, command: bytes) -> bytes:
        self.commands += 1
        if self.commands == self.lost_at:
            raise CardLost("pulled away")
        if self.commands == self.fault_at:
            raise ReaderFault("the reader fell silent")
        if self.commands == 1:
            self.then()
        return self.card.apdu(command)

    def close(self) -> None:
        self.is_closed = True


Happening: TypeAlias = "Tap | DriverError | Callable[[], object] | None"


class Reader:
    """What comes to the field, look by look: a tap, an error, an act of somebody, or nothing."""

    name = "reader of the test"
    interface = Interface.CONTACTLESS

    def __init__(self, clock: HandClock) -> None:
        self._clock = clock
        self.script: deque[Happening] = deque()
        self.opening: deque[ReaderFault | None] = deque()
        self.removal: deque[ReaderFault | None] = deque()
        self.closed = 0
        self.taps: list[Tap] = []
        self._gone_at_ms = 0

    def open(self) -> None:
        if self.opening and (fault := self.opening.popleft()):
            raise fault

    def wait_for_card(self, timeout_ms: int) -> CardChannel | None:
        self._clock.sleep_ms(timeout_ms)
        happening = self.script.popleft() if self.script else None
        if isinstance(happening, DriverError):
            raise happening
        if isinstance(happening, Tap):
            self._gone_at_ms = self._clock.monotonic_ms() + happening.lies_ms
            self.taps.append(happening)
            happening.card.reset()
            return happening
        if happening is not None:
            happening()
        return None

    def wait_for_removal(self, timeout_ms: int) -> bool:
        if self.removal and (fault := self.removal.popleft()):
            raise fault
        self._clock.sleep_ms(timeout_ms)
        return self._clock.monotonic_ms() >= self._gone_at_ms

    def close(self) -> None:
        self.closed += 1


class Display:
    """A panel that keeps its pictures. `watch` sees each of them at the moment at which a customer would."""

    def __init__(self) -> None:
        self.pictures: list[bytes] = []
        self.is_broken = False
        self.closed = 0
        self.watch: Callable[[bytes], object] = lambda _: None

    def open(self) -> None:
        if self.is_broken:
            raise DisplayFault("the panel does not answer")

    def show(self, frame: Image.Image) -> None:
        if self.is_broken:
            raise DisplayFault("the panel does not answer")
        picture = frame.tobytes()
        self.watch(picture)
        if self.pictures[-1:] != [picture]:
            self.pictures.append(picture)

    def close(self) -> None:
        self.closed += 1


def picture(screen: Screen) -> bytes:
    return render(screen, "en").tobytes()


class WatchedLink(Link):
    """The link, with sync's place taken: `on_outbox` happens when there is something to send."""

    on_outbox: Callable[[], object] = staticmethod(lambda: None)

    def outbox_changed(self) -> None:
        super().outbox_changed()
        self.on_outbox()


class Terminal:
    """One terminal with all around it. `start` again is a restart."""

    def __init__(
        self,
        directory: Path,
        *,
        medium: OpenMedium = FileMedium.create,
        sale: str = "",
        more: str = "",
        flow: type[Flow] = Flow,
    ) -> None:
        self.directory = directory
        self.clock = HandClock()
        self.entropy = seeded(SEED + 1)
        self._medium = medium
        self._flow = flow
        self._random = random.Random(SEED)
        self.keys_directory = directory / "keys"
        generate(self.keys_directory, self.entropy)
        public = provision(directory / "host", now=datetime.now(UTC), entropy=seeded())
        for name in (HOST_SEALING_KEY, HOST_ANSWER_KEY):
            copy(public / name, self.keys_directory / name)
        self.host = Host(
            directory / "host",
            imk_ac=bureau().imk_ac,
            wall_ms=self.clock.wall_ms,
            today=lambda: date(2026, 12, 23),
            entropy=seeded(SEED + 2),
        )
        self.host.register(TERMINAL, MERCHANT, (self.keys_directory / "signing-key.pub").read_bytes())
        self.host.enrol(profiles()["normal"])
        self.cards: dict[str, VisaCard] = {}
        self.config_path = directory / "payterm.toml"
        self.config_path.write_text(
            CONFIG.format(
                directory=directory,
                sale=sale,
                more=more,
                sealing=fingerprint(self.host.keys.sealing.public_key()),
                answer=fingerprint(self.host.keys.answer.public_key()),
                ca_key="\n".join(f'{name} = "{value}"' for name, value in bureau().ca_public_key.record().items()),
            ),
            encoding="utf-8",
        )
        self.config: Config = load(self.config_path)
        self.keys = TerminalKeys.load(
            self.keys_directory, self.config.host.sealing_fingerprint, self.config.host.answer_fingerprint
        )
        self.reader = Reader(self.clock)
        self.display = Display()
        self.stopping: Callable[[], bool] = lambda: not self.desk.busy  # as long as there is a sale to take
        self.start()

    def start(self) -> None:
        self.ledger = Ledger.open(
            self.config.ledger.directory,
            self.keys,
            clock=self.clock,
            entropy=self.entropy,
            settings=SMALL,
            medium=self._medium,
        )
        envelopes = Envelopes(self.keys.signing, self.keys.host_sealing, TERMINAL, MERCHANT, self.ledger.epoch)
        self.resolution = resolve(self.ledger, envelopes)
        self.link = WatchedLink(self.clock)
        self.desk = Desk()
        self.payments = Payments(
            config=self.config,
            setup=emvsetup.build(self.config),
            ledger=self.ledger,
            envelopes=envelopes,
            link=self.link,
            clock=self.clock,
            entropy=self.entropy,
        )
        self.calls = Service(
            config=self.config,
            ledger=self.ledger,
            answer_key=self.keys.host_answer,
            payments=self.payments,
            link=self.link,
            desk=self.desk,
            reconciling=Reconciling(self.ledger, envelopes, self.keys.host_answer, self.clock, self.entropy),
            days=Days(self.config, self.ledger, envelopes, self.link, self.clock),
            registration=Registration(self.ledger, envelopes, self.keys.host_answer, self.clock, self.entropy),
        ).calls()
        self.alive = 0
        self.flow = self._flow(
            config=self.config,
            readers=Readers([self.reader], self.clock, lambda what, name: self.ledger.note(what, reader=name)),
            panel=Panel(self.display, "en"),
            ledger=self.ledger,
            payments=self.payments,
            link=self.link,
            desk=self.desk,
            clock=self.clock,
            stopping=self._is_stopping,
            alive=self._count_alive,
        )

    def restart(self) -> None:
        """Power away, power back: what was not flushed may be gone, what was open is settled."""
        self.ledger.close()
        self.start()

    def close(self) -> None:
        self.ledger.close()
        self.host.close()

    def _is_stopping(self) -> bool:
        return self.stopping()

    def _count_alive(self) -> None:
        self.alive += 1

    # ---- the register and the customer

    def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        """A call on the local socket, without the socket. Raises what the handler raises."""
        call = self.calls[do]
        return dict(call.handle(msgspec.convert(arguments, call.arguments)))

    def card(self, name: str = "normal") -> VisaCard:
        return self.cards.setdefault(name, VisaCard(profiles()[name], self._random.randbytes))

    def begin(self, minor: int = 1250, reference: str | None = None) -> Transaction:
        return self.payments.begin(Amount(minor, EUR), reference)

    def read(self, transaction: Transaction, card: str = "normal", **how: Any) -> Outcome:
        self.tap = Tap(self.card(card), **how)
        self.tap.card.reset()
        return self.payments.read(transaction, self.tap, lambda _: None)

    def pay(self, minor: int = 1250, card: str = "normal") -> Transaction:
        """A whole sale at the level of `Payments`: the state that a customer would be shown."""
        transaction = self.begin(minor)
        return self.decide(transaction, self.read(transaction, card))

    def decide(self, transaction: Transaction, outcome: Outcome) -> Transaction:
        """What becomes of a sale after this outcome, which must be one that ends it."""
        assert isinstance(outcome, Approved | Declined | OnlineRequest), outcome
        return self.payments.decide(transaction, outcome, self.tap)

    def enter(self, minor: int = 1250, reference: str | None = None) -> UUID:
        """The register asks for a sale."""
        return UUID(self.call("sale.start", amount=minor, currency="EUR", reference=reference)["id"])

    def run(self, *happenings: Happening) -> None:
        """The device works until the desk is empty, with this coming to its field."""
        self.reader.script.extend(happenings)
        self.flow.run()

    def state(self, transaction: UUID) -> State:
        return self.ledger.transaction(transaction).state

    # ---- the way to the host

    def online(self) -> None:
        """Sync is there, the host is reached, answers come at once."""
        self.call("link.report", online=True)
        self.link.on_outbox = self.carry

    def withheld(self) -> None:
        """Sync is there and takes envelopes, but no answer comes: time runs out as soon as somebody waits for it."""
        self.call("link.report", online=True)
        self.link.on_outbox = lambda: setattr(self.clock, "hurry_ms", TIMEOUT_MS)

    def offline(self) -> None:
        self.call("link.report", online=False, error="no route to the host")
        self.link.on_outbox = lambda: None
        self.clock.hurry_ms = 0

    def items(self) -> list[dict[str, Any]]:
        """What sync is offered; urgent first."""
        self.clock.hurry_ms = 0
        return list(self.call("outbox.fetch")["items"])

    def answer_to(self, item: dict[str, Any]) -> str:
        """The host books an envelope and signs its answer."""
        envelope = item["envelope"].encode()
        if item["event"] == "batch":
            return self.host.close_batch(item["transaction"], envelope).answer
        return self.host.receive(item["transaction"], item["event"], envelope).answer

    def carry(self) -> list[str]:
        """Everything to the host and its answers back: the states that the terminal then tells."""
        told = []
        for item in self.items():
            self.call("outbox.stored", keys=[item["key"]])
            told.append(self.deliver(item["key"], self.answer_to(item)))
        return told

    def deliver(self, key: str, answer: str) -> str:
        """One answer; the state that it led to. Raises `CallRefused` if it was not taken."""
        (result,) = self.call("answers.deliver", answers=[{"key": key, "answer": answer}])["results"]
        if "error" in result:
            raise CallRefused(result["error"]["code"], result["error"]["message"])
        return str(result["state"])

    def waiting(self) -> list[OutboxItem]:
        return self.ledger.outbox(100)

    def booked(self) -> dict[str, int]:
        """What the host holds as sold: transaction and minor units."""
        return {each.transaction: each.amount for each in self.host.bookings() if each.state.value == "booked"}

    # ---- what a customer has seen

    def shown(self, *, amount: Amount | None = None) -> list[Screen | str]:
        """The pictures so far, as the screens that they are."""
        names = {picture(screen): screen for screen in vocabulary(amount or Amount(1250, EUR))}
        return [names.get(each, "another picture") for each in self.display.pictures]


def vocabulary(amount: Amount) -> Iterable[Screen]:
    """Every screen that a sale of this amount may show."""
    results: tuple[screens.Approved | screens.AcceptedOffline | screens.Declined, ...] = (
        screens.Approved(amount, "Visa", LAST4),
        screens.AcceptedOffline(amount, "Visa", LAST4),
        *(
            screens.Declined(amount, reason)
            for reason in ("timeout", "insufficient_funds", "unable_to_go_online", "card_declined")
        ),
    )
    yield from results
    yield from (screens.RemoveCard(result) for result in results)
    yield from (screens.PresentCard(amount), screens.Reading(amount), screens.Authorising(amount))
    yield from (screens.TryAgain(amount, "card_lost"), screens.UseOtherCard(amount), screens.KeepOrVoid(amount))
    yield from (screens.OneCardOnly(), screens.Start("0.1.0"), screens.RemoveCard())
    yield from (screens.Error(reason) for reason in ("reader_missing", "reader_fault", "ledger", "not_completed"))


@contextmanager
def terminal_in(directory: Path, **settings: Any) -> Iterator[Terminal]:
    made = Terminal(directory, **settings)
    try:
        yield made
    finally:
        made.close()

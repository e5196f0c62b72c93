"""Days at a till where everything fails, simulated: a real terminal, a real queue, both destinations, and kills.

What is real: cards and kernel, ledger and its calls, spool and `Sync`, the simulated host with its issuer, Stripe's
library against its double. What is simulated: time, and the network between them, which loses, doubles, delays, forges
and refuses by a seed. Kills leave the files as they are at that moment, in the middle of whatever was going on: nothing
that was in memory survives. At the end the network heals, everything drains, and the books are compared by code that
knows nothing of how they came about.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import msgspec
import stripe
from sync_rig import FakeClock, Rig
from terminal_rig import Terminal

from hwsim.host.host import Refused as HostRefused
from hwsim.host.store import State as Booked
from hwsim.stripe_double import StripeDouble, open_double
from hwsim.stripe_double.api import Request
from hwsim.stripe_double.books import State as Recorded
from hwsim.stripe_double.server import KEY_FILE
from terminal.control import CallRefused, TerminalUnavailable
from terminal.ledger.errors import NoRoom
from terminal.ledger.states import SOLD, State
from terminal.ledger.values import Kind, Transaction
from terminal.payment import SaleRefused
from terminal.sync import records as comparison
from terminal.sync.destinations import Answered, Busy, NotSent, Parcel, Refused, Result, Unsure
from terminal.sync.destinations.stripe import ApiKey, StripeDestination, StripeSettings
from terminal.sync.notices import StripeFollower
from terminal.sync.service import SocketTerminal
from terminal.sync.spool import Spool
from terminal.sync.spool import State as Waiting

FAULTS: Final = 0.25  # of all exchanges
LOST_CALLS: Final = 0.01  # of all calls between sync and terminal
KILLS: Final = 0.002  # of all exchanges and calls
RESTS_MS: Final = (0, 0, 0, 20, 500, 5_000, 60_000)
LONG_REST_MS: Final = 26 * 3_600_000  # longer than Stripe knows a key
LONG_RESTS: Final = 0.002
SETTLE_MS: Final = 2 * 3_600_000  # by then everything must have gone out
SHARE_ONLINE, SHARE_REFUND, SHARE_VOID = 0.55, 0.05, 0.03

_FAULTS: Final = (
    *("unreachable", "request lost", "answer lost", "answer lost", "twice", "garbage", "another's answer"),
    *("500", "500 booked", "503", "429"),
)


class Killed(BaseException):
    """As SIGKILL: nothing after it runs."""

    def __init__(self, whom: str) -> None:
        super().__init__(whom)
        self.whom = whom


class Broken(AssertionError):
    """A promise is broken."""


@dataclass
class Network:
    """What the network does next; between a client and a server that are both functions here."""

    chance: random.Random
    well: bool = False
    played: Counter[str] = field(default_factory=Counter)

    def may_die(self) -> None:
        """Somebody is killed here, or nobody."""
        if not self.well and self.chance.random() < KILLS:
            self.played["kill"] += 1
            raise Killed(self.chance.choice(("sync", "terminal")))

    def draw(self, among: tuple[str, ...] = _FAULTS) -> str | None:
        if self.well:
            return None
        self.may_die()
        if self.chance.random() >= FAULTS:
            return None
        fault = self.chance.choice(among)
        self.played[fault] += 1
        return fault

    def may_lose(self, what: str) -> None:
        """A call on a local socket, whose answer can only be lost by a death."""
        if self.well:
            return
        self.may_die()
        if self.chance.random() < LOST_CALLS:
            self.played[f"{what} lost"] += 1
            raise TerminalUnavailable("the terminal's reply was lost")


@dataclass
class HostDoor:
    """Implements `Destination`: the simulated host behind this network."""

    host: Any
    network: Network
    name: str = "host"
    repeat_safe_ms: int | None = None
    last: str = "a.b.c"

    def send(self, parcel: Parcel) -> Result:  # noqa: PLR0911 (a network has many ways)
        fault = self.network.draw()
        match fault:
            case "unreachable":
                return NotSent("the network is away")
            case "request lost" | "500":
                return Unsure("lost")
            case "503":
                return Unsure("503", self.network.chance.choice((None, 1_000, 30_000)))
            case "429":
                return Busy("429", self.network.chance.choice((None, 1_000, 30_000)))
        try:
            answer = self._book(parcel)
            if fault == "twice":
                answer = self._book(parcel)
        except HostRefused as refused:
            if refused.problem.value[0] == 425:
                return Busy("425")
            return Refused(str(refused), permanent=refused.problem.value[0] in (400, 409, 413, 422))
        self.network.may_die()  # the host has booked: a death of ours now is the worst moment
        earlier, self.last = self.last, answer
        match fault:
            case "answer lost" | "500 booked":
                return Unsure("lost")
            case "garbage":
                return Answered("bm8.bm8.bm8")
            case "another's answer":
                return Answered(earlier)
        return Answered(answer)

    def look_up(self, parcel: Parcel, *, first_attempt_ms: int | None) -> None:
        pass

    def close(self) -> None:
        pass

    def _book(self, parcel: Parcel) -> str:
        if parcel.event == "checkpoint":
            return str(self.host.countersign(str(parcel.transaction), parcel.body.encode()).answer)
        if parcel.event == "batch":
            return str(self.host.close_batch(str(parcel.transaction), parcel.body.encode()).answer)
        return str(self.host.receive(str(parcel.transaction), parcel.event, parcel.body.encode()).answer)


class StripeWire(stripe.HTTPClient):
    """The network as Stripe's library sees it: what is left out below the library is TLS and HTTP."""

    name = "requests"

    def __init__(self, double: StripeDouble, network: Network, begin: Callable[[bool], None]) -> None:
        super().__init__()
        self._double = double
        self._network = network
        self._begin = begin
        self.status: int | None = None
        self.headers: Mapping[str, str] = {}

    @property
    def replayed(self) -> bool:
        return self.headers.get("Idempotent-Replayed") == "true"

    @property
    def request_id(self) -> str | None:
        return self.headers.get("Request-Id")

    @property
    def trace(self) -> str:
        return ""

    def request(
        self, method: str, url: str, headers: Any, post_data: Any = None, *, _usage: list[str] | None = None
    ) -> tuple[str, int, Mapping[str, str]]:
        self.status, self.headers = None, {}
        fault = self._network.draw(
            ("unreachable", "request lost", "answer lost", "answer lost", "twice", "garbage", "503", "429")
        )
        self._begin(fault != "unreachable")
        if fault in ("unreachable", "request lost"):
            raise stripe.APIConnectionError("lost")  # type: ignore[no-untyped-call]
        if fault in ("503", "429"):
            self.status = int(fault)
            return "<html>busy</html>", self.status, {}
        target = url.removeprefix("https://stripe.test")
        asked = Request(
            method.upper(), target, {name.lower(): str(value) for name, value in headers.items()}, post_data or ""
        )
        response = self._double.answer(asked)
        if fault == "twice":
            response = self._double.answer(asked)
        self._network.may_die()
        if response is None or fault == "answer lost":
            raise stripe.APIConnectionError("lost")  # type: ignore[no-untyped-call]
        if fault == "garbage":
            self.status = 200
            return "{}", 200, {}
        self.status, self.headers = response.status, response.headers
        return response.body, response.status, response.headers

    def close(self) -> None:
        pass


class Wire:
    """The terminal's socket, as sync sees it."""

    def __init__(self, chaos: Chaos) -> None:
        self._chaos = chaos

    def call(self, do: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        self._chaos.network.may_lose(do)
        given = {**(arguments or {})}
        if do == "outbox.fetch":
            given["wait_ms"] = 0  # nobody else could put something there meanwhile
        answer = dict(msgspec.to_builtins(self._chaos.terminal.call(do, **given)))
        self._chaos.network.may_lose(do)
        return answer


@dataclass
class Promise:
    """What a customer was told."""

    minor: int
    voided: bool = False
    refunded: int = 0


class Chaos:
    """One till with everything around it. What follows the seed brings planted faults in, or more of one kind."""

    def __init__(
        self,
        directory: Path,
        seed: int,
        *,
        open_spool: Callable[..., Spool] = Spool,
        wire: type[Wire] = Wire,
        repeats_for_ever: bool = False,
        long_rests: float = LONG_RESTS,
    ) -> None:
        self.seed = seed
        self._repeats_for_ever = repeats_for_ever
        self._long_rests = long_rests
        self.chance = random.Random(seed)
        self.network = Network(random.Random(seed + 1))
        self.terminal = Terminal(directory / "terminal")
        self.clock = FakeClock()
        self.clock.set_wall(self.terminal.clock.wall_ms())
        self.double = open_double(
            directory / "stripe", now_ms=self.clock.wall_ms, entropy=random.Random(seed + 2).randbytes
        )
        self._directory = directory
        self._kills = Counter[str]()
        self.promises: dict[UUID, Promise] = {}
        self.held = 0  # for a person
        self.settings = StripeSettings(
            key=ApiKey((directory / "stripe" / "public" / KEY_FILE).read_text().strip()), base_url="https://stripe.test"
        )
        self.host = HostDoor(self.terminal.host, self.network)
        self.rig = Rig(
            directory,
            SocketTerminal(wire(self)),  # type: ignore[arg-type]
            [self.host, self._stripe()],  # type: ignore[list-item]
            self.clock,
            random.Random(seed + 3).randbytes,
            partial(open_spool, followers=(StripeFollower(),)),
            ["host"],
        )

    def close(self) -> None:
        self.rig.close()
        self.terminal.close()
        self.double.close()

    # ---- a day

    def run(self, transactions: int) -> None:
        """Until so many sales and refunds are recorded, with everything that may happen around them."""
        number = 0
        while self.terminal.ledger.last_number() < transactions and number < 3 * transactions:
            number += 1  # a planted fault may let nothing be sold any more
            with self._surviving():
                self._one()
            with self._surviving():
                self._work(self.chance.choice((0, 1, 1, 2, 4, 8)))
            long = self.chance.random() < self._long_rests
            self._rest(LONG_REST_MS if long else self.chance.choice(RESTS_MS))
            if number % 16 == 15:
                with self._surviving():
                    while self.terminal.ledger.upkeep.step():
                        pass
            if number % 48 == 47:  # a quiet hour, or offline limits would let nothing be sold any more
                self._quiet()

    def heal(self) -> None:
        """The network is well again, nobody dies any more: everything drains."""
        self.network.well = True
        self._decide_unshown()
        spent_ms, rest_ms = 0, 30_000
        while spent_ms < SETTLE_MS and (self._waits() or self.rig.spool.rows()):
            self._work(64)
            self._look_after_held()
            self._rest(rest_ms)
            spent_ms += rest_ms

    def _look_after_held(self) -> None:
        """What a person does about it: look whether Stripe has it, and have it sent again only if it has not."""
        for row in self.rig.spool.rows():
            if row.state is Waiting.HELD and row.destination == "stripe":
                self.held += 1
                if "reported" in row.event and any(
                    each.payment_reference == str(row.transaction) for each in self.double.bookings()
                ):
                    continue
                self.rig.spool.retry(row.id, "Stripe's dashboard does not have it")

    def _one(self) -> None:
        """One thing that a merchant does."""
        kind = self.chance.random()
        standing = [id_ for id_, promise in self.promises.items() if not promise.voided] if kind < 0.08 else []
        if kind < SHARE_REFUND and standing:
            self._refund(self.chance.choice(standing[-200:]))
        elif kind < SHARE_REFUND + SHARE_VOID and standing:
            self._void(self.chance.choice(standing[-200:]))
        else:
            self._sell(online=self.chance.random() < SHARE_ONLINE)

    def _sell(self, *, online: bool) -> None:
        terminal = self.terminal
        self._connect(online=online)
        try:
            sale = terminal.pay(self.chance.randint(100, 3_999))
        except (SaleRefused, NoRoom):
            return
        finally:
            terminal.clock.hurry_ms = 0
            terminal.link.on_outbox = lambda: None
        if sale.state in SOLD:
            self._show(sale)

    def _connect(self, *, online: bool) -> None:
        terminal = self.terminal
        terminal.call("link.report", online=online, error=None if online else "no route")
        tries = self.chance.randint(0, 5)

        def on_outbox() -> None:
            try:
                self._work(tries)
            except Killed as killed:
                if killed.whom == "terminal":
                    raise
                self._kill_sync()
            terminal.clock.hurry_ms = 1_000  # whoever still waits now finds the time up

        terminal.link.on_outbox = on_outbox if online else lambda: None

    def _show(self, sale: Transaction) -> None:
        self.promises[sale.id] = Promise(sale.amount.minor)
        self.terminal.ledger.mark_shown(sale.id, "approved")

    def _refund(self, sale: UUID) -> None:
        promise = self.promises[sale]
        if left := promise.minor - promise.refunded:
            minor = self.chance.randint(1, left)
            with contextlib.suppress(CallRefused):
                self.terminal.call("sale.refund", sale=str(sale), amount=minor)
                promise.refunded += minor

    def _void(self, sale: UUID) -> None:
        with contextlib.suppress(CallRefused):
            self.terminal.call("sale.void", sale=str(sale))
            self.promises[sale].voided = True

    def _quiet(self) -> None:
        """An hour in which the network mostly works and nobody buys."""
        well, self.network.well = self.network.well, self.chance.random() < 0.7
        for _ in range(40):
            with self._surviving():
                self._work(4)
            self._rest(5_000)
        self.network.well = well

    def _work(self, steps: int) -> None:
        for _ in range(steps):
            self.rig.sync.step()

    def _rest(self, duration_ms: int) -> None:
        self.clock.advance(duration_ms)
        self.terminal.clock.sleep_ms(duration_ms)

    def _waits(self) -> bool:
        return bool(self.terminal.ledger.unsent() or self.terminal.ledger.outbox(1))

    # ---- deaths

    @contextlib.contextmanager
    def _surviving(self) -> Any:
        """Whoever is killed in here is started again."""
        try:
            yield
        except Killed as killed:
            self.terminal.clock.hurry_ms = 0
            self.terminal.link.on_outbox = lambda: None
            self._kill_sync()
            if killed.whom == "terminal":
                self._kill_terminal()

    def _kill_sync(self) -> None:
        self._kills["sync"] += 1
        self.rig.crash()

    def _kill_terminal(self) -> None:
        """Sync works inside the terminal's waiting here, so it has died with it."""
        self._kills["terminal"] += 1
        directory = self.terminal.config.ledger.directory
        copy = directory.with_name(f"ledger-{self._kills['terminal']}")
        shutil.copytree(directory, copy)
        self.terminal.ledger.close()
        shutil.rmtree(directory)
        copy.rename(directory)
        self.terminal.start()
        self._decide_unshown()

    def _decide_unshown(self) -> None:
        """Sold, and nobody knows whether the customer saw it: a person says keep or void."""
        for sale in self.terminal.ledger.unshown():
            self._show(self.terminal.ledger.transaction(sale.id))
            if self.chance.random() < 0.5:
                self._void(sale.id)

    def _stripe(self) -> StripeDestination:
        made = (Repeating if self._repeats_for_ever else StripeDestination)(self.settings, monotonic_s=lambda: 0.0)

        def begin(begun: bool) -> None:
            made._exchange.begun = begun

        wire = StripeWire(self.double, self.network, begin)
        made._http = wire  # type: ignore[assignment]
        made._records = stripe.StripeClient(
            self.settings.key.text,
            stripe_version=stripe.api_version,
            base_addresses={"api": "https://stripe.test"},
            http_client=wire,
            max_network_retries=0,
        ).v1.payment_records
        return made

    # ---- the judge

    def judge(self) -> dict[str, int]:
        """Every promise, and both books against the ledger. Raises `Broken`; otherwise what was counted."""
        broken: list[str] = []
        ours = self._all()
        booked = {UUID(each.transaction): each for each in self.terminal.host.bookings()}
        records: dict[str, list[Any]] = {}
        for record in self.double.bookings():
            records.setdefault(record.payment_reference or "", []).append(record)
        if rows := self.rig.spool.rows():
            broken.append(f"{len(rows)} items are left in the queue, the first: {rows[0].id} {rows[0].state.value}")
        refunded: dict[UUID, int] = {}
        for each in ours.values():
            if each.kind is Kind.REFUND and each.state is State.APPROVED and each.of is not None:
                refunded[each.of] = refunded.get(each.of, 0) + each.amount.minor
        for each in ours.values():
            name = f"{each.kind} {each.number} ({each.amount}, {each.state})"
            broken += self._at_host(name, each, booked.pop(each.id, None))
            if each.kind is Kind.SALE:
                broken += self._at_stripe(name, each, records.pop(str(each.id), []), refunded.get(each.id, 0))
        broken += [f"the host holds {id_}, which the terminal does not know" for id_ in booked]
        broken += [f"Stripe holds {reference}, which the terminal does not know" for reference in records]
        broken += self.compared_with_stripe()
        alerts = {each.id for each in self.terminal.ledger.alerts()}
        for id_, promise in self.promises.items():
            state = ours[id_].state
            if state not in SOLD and not promise.voided and not (state is State.REFUSED and id_ in alerts):
                broken.append(f"a customer was told that {id_} is sold, it is {state} and nobody is told")
        if broken:
            raise Broken(f"seed {self.seed}: {len(broken)} promises: " + "; ".join(broken[:5]))
        money = sum(each.signed_minor for each in ours.values() if each.state in SOLD)
        host = sum(each.amount for each in self.terminal.host.bookings() if each.state is Booked.BOOKED)
        told = sum(each.amount - each.refunded for each in self.double.bookings() if each.state is Recorded.GUARANTEED)
        reversed_ = sum(each.amount.minor for each in ours.values() if each.state is State.REVERSED)
        if money != host or not money <= told <= money + reversed_:
            raise Broken(f"seed {self.seed}: the ledger sums to {money}, the host to {host}, Stripe to {told}")
        return {
            "transactions": len(ours),
            "booked": sum(each.state in SOLD for each in ours.values()),
            "kills": sum(self._kills.values()),
            "faults": sum(self.network.played.values()),
            "held": self.held,
            "minor": money,
        }

    def compared_with_stripe(self) -> list[str]:
        """What the terminal's own comparison says, sale by sale, as far as one goes."""
        last = self.terminal.ledger.last_number()
        with contextlib.closing(self._stripe()) as register:
            found = comparison.compare(
                lambda do, given: Wire(self).call(do, given),
                lambda _, __: {
                    "items": [{"transaction": str(row.transaction)} for row in self.rig.spool.rows()],
                    "more": None,
                },
                register,
                1,
                last,
            )
        return [f"sale {each['sequence']}: {each['meaning']}" for each in found["differences"]]

    def _all(self) -> dict[UUID, Transaction]:
        found: dict[UUID, Transaction] = {}
        before = None
        while page := self.terminal.ledger.transactions(500, before):
            found |= {each.id: each for each in page}
            before = page[-1].number
        return found

    def _at_host(self, name: str, ours: Transaction, theirs: Any) -> list[str]:
        state = None if theirs is None else theirs.state
        match ours.state:
            case State.APPROVED | State.SETTLED:
                right = state is Booked.BOOKED
            case State.DECLINED | State.REFUSED | State.VOID:
                right = state in (None, Booked.DECLINED)
            case State.REVERSED:
                right = state in (Booked.REVERSED, Booked.TOMBSTONE, Booked.DECLINED)
            case _:
                right = False  # something of it still waits
        broken = [] if right else [f"{name} is {state} at the host"]
        if theirs is not None and (theirs.amount, theirs.currency) != (ours.signed_minor, "EUR"):
            broken.append(f"{name} is booked with {theirs.amount} {theirs.currency}")
        return broken

    def _at_stripe(self, name: str, ours: Transaction, records: list[Any], refunded: int) -> list[str]:
        if len(records) > 1:
            return [f"{name} is {len(records)} times at Stripe"]
        record = records[0] if records else None
        state = None if record is None else record.state
        match ours.state:
            case State.APPROVED | State.SETTLED:
                right = state is Recorded.GUARANTEED and record is not None and record.refunded == refunded
            case State.REVERSED if record is not None and state is Recorded.GUARANTEED:
                right = record.refunded == record.amount
            case State.REVERSED | State.DECLINED | State.REFUSED:
                right = state in (None, Recorded.CANCELED, Recorded.FAILED)
            case _:
                right = state is None
        broken = (
            [] if right else [f"{name} is {state and state.value} at Stripe, {record and record.refunded} paid back"]
        )
        if record is not None and (record.amount, record.currency) != (ours.amount.minor, "eur"):
            broken.append(f"{name} is at Stripe with {record.amount} {record.currency}")
        return broken


# Plants: what the same days must bring to light


class FreshKeys(Spool):
    """A new idempotency key for each attempt."""

    def parcel(self, row: Any) -> Parcel:
        return replace(super().parcel(row), idempotency_key=secrets.token_hex(16))


class Repeating(StripeDestination):
    """Believes that Stripe knows a key for ever."""

    @property
    def repeat_safe_ms(self) -> int:
        return 1 << 60


class Hasty(Wire):
    """Takes an answer for delivered, whatever the terminal has said to it."""

    def call(self, do: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        if do == "answers.deliver" and not self._chaos.network.well and self._chaos.chance.random() < 0.3:
            answers = (arguments or {})["answers"]
            return {"results": [{"key": each["key"], "state": "approved"} for each in answers]}
        return super().call(do, arguments)


class Forgetful(Wire):
    """Loses reversals."""

    def call(self, do: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        answer = super().call(do, arguments)
        if do == "outbox.fetch":
            lost = [item["key"] for item in answer["items"] if item["event"] == "reversal"]
            if lost:
                self._chaos.terminal.call("outbox.stored", keys=lost)
            answer["items"] = [item for item in answer["items"] if item["key"] not in lost]
        return answer

"""The ledger held against the host's books: exactly what differs is found, cheaply, and nobody can lie unnoticed."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt.api_jws import PyJWS
from sync_rig import SPOOL_KEY, FakeClock, sale
from terminal_rig import Terminal
from test_cli import no_traceback, payterm

from terminal.control import CallRefused, ControlServer, Role, Roles, asked
from terminal.ledger.keys import key_id
from terminal.ledger.sealing import Envelopes, digest
from terminal.ledger.states import State
from terminal.ledger.values import Kind, Standing
from terminal.money import EUR, Amount
from terminal.reconciling import RANGE_MAX, Reconciling, may_stand
from terminal.sync.destinations import Answered, NotSent, Parcel, Result
from terminal.sync.queue import Queue
from terminal.sync.reconcile import FIRST_AFTER_MS, Daily, Reconciler, Run
from terminal.sync.schedule import Mode
from terminal.sync.spool import On, Spool
from terminal.sync.step import History, LinkReport

DAY_MS = 86_400_000
CHANCE = random.Random(5)
KEY = Ed25519PrivateKey.from_private_bytes(CHANCE.randbytes(32))


# ---- a host that says what a test wants


@dataclass
class Books:
    """Implements `Destination`: signed answers about these entries (docs/host-api.yaml, putReconciliation)."""

    entries: dict[int, tuple[UUID, str, int, str]] = field(default_factory=dict)
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda said: said
    key: Ed25519PrivateKey = KEY  # what it signs with, and what it calls that
    named: Ed25519PrivateKey = KEY
    down: bool = False
    asked: int = 0
    name: str = "host"
    repeat_safe_ms: int | None = None

    def send(self, parcel: Parcel) -> Result:
        self.asked += 1
        if self.down:
            return NotSent("there is no network to the host")
        question = json.loads(PyJWS().decode(parcel.body, options={"verify_signature": False}))
        assert parcel.event == question["event"] == "reconciliation"
        inside = sorted(number for number in self.entries if question["first"] <= number <= question["last"])
        lines = "".join("{} {} {} {} {}\n".format(number, *self.entries[number]) for number in inside)
        named = [[number, str(self.entries[number][0]), *self.entries[number][1:]] for number in inside]
        said = {
            "v": 1,
            "event": "reconciliation",
            "reconciliation": str(parcel.transaction),
            "terminal": question["terminal"],
            "epoch": question["epoch"],
            "first": question["first"],
            "last": question["last"],
            "envelope": digest(parcel.body),
            "decision": "compared",
            "totals": [],
            "received": len(inside),
            "missing": [],
            "missing_more": False,
            "digest": hashlib.sha256(lines.encode()).hexdigest(),
            "entries": named if len(inside) <= 64 else None,
            "answered_at": 0,
        }
        headers = {"alg": "EdDSA", "typ": "payterm-answer", "kid": key_id(self.named.public_key())}
        jws = PyJWS().encode(json.dumps(self.change(said)).encode(), self.key, algorithm="EdDSA", headers=headers)
        return Answered(jws)

    def look_up(self, parcel: Parcel, *, first_attempt_ms: int | None) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Shelf:
    """What `Reconciling` asks a ledger."""

    standings: list[Standing]
    noted: list[dict[str, Any]] = field(default_factory=list)

    def first_number(self) -> int:
        return 1

    def last_number(self) -> int:
        return len(self.standings)

    def number_at(self, wall_ms: int) -> int:
        return 1

    def booking_states(self, first: int, last: int, limit: int) -> list[Standing]:
        return self.standings[first - 1 : last][:limit]

    def transaction(self, id_: UUID) -> Any:
        return SimpleNamespace(opened_at_ms=1_000, clock_synchronised=True, corrected=False)

    def note(self, what: str, **details: Any) -> None:
        self.noted.append(details)


@dataclass
class Near:
    """Implements `Asking`, without a socket."""

    calls: Mapping[str, Any]

    def call(self, do: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return asked(self.calls, do, arguments or {})

    def close(self) -> None:
        pass


def terminal_of(shelf: Shelf) -> Near:
    envelopes = Envelopes(KEY, X25519PrivateKey.generate().public_key(), "till-1", "shop-1", 1)
    chance = random.Random(1)
    return Near(Reconciling(shelf, envelopes, KEY.public_key(), FakeClock(), chance.randbytes).calls())  # type: ignore[arg-type]


def reconciler(near: Near, books: Books, directory: Path | None = None, queue: Any = None) -> Reconciler:
    directory = directory or Path(tempfile.mkdtemp())
    return Reconciler(lambda: near, lambda: books, queue or {}, directory, FakeClock())


_STATES = st.sampled_from(
    [
        (State.APPROVED, True, True, "booked"),
        (State.SETTLED, True, True, "booked"),
        (State.DECLINED, True, True, "declined"),
        (State.DECLINED, False, False, None),
        (State.VOID, False, False, None),
        (State.REFUSED, True, True, "declined"),
        (State.REVERSED, True, True, "reversed"),
        (State.REVERSED, True, True, "tombstone"),
        (State.ACCEPTED, True, False, None),
        (State.ACCEPTED, True, False, "booked"),
        (State.REVERSING, True, False, "booked"),
    ]
)


def day(drawn: list[tuple[State, bool, bool, str | None]]) -> tuple[list[Standing], Books]:
    """Both sides of a day on which nothing went wrong."""
    ours, books = [], Books()
    for number, (state, sent, answered, theirs) in enumerate(drawn, start=1):
        kind = Kind.REFUND if number % 7 == 3 and state in (State.APPROVED, State.DECLINED) and sent else Kind.SALE
        one = Standing(number, UUID(int=number), kind, None, Amount(100 + number, EUR), state, sent, answered)
        ours.append(one)
        if theirs is not None:
            books.entries[number] = one.id, theirs, (100 + number) * (-1 if kind is Kind.REFUND else 1), "EUR"
    return ours, books


_FLAWS = ("lost", "state", "amount", "currency", "other", "more")


def flawed(books: Books, one: Standing, flaw: str) -> bool:
    """Spoil the host's entry of this transaction. False where that would be no flaw."""
    allowed, entry = may_stand(one), books.entries.get(one.number)
    match flaw, entry:
        case "more", None:
            books.entries[one.number] = one.id, "booked", 100 + one.number, "EUR"
            return allowed is not None
        case _, None:
            return False
        case "lost", _:
            del books.entries[one.number]
            return allowed is not None
        case "state", (id_, state, amount, code):
            other = "declined" if state == "booked" else "booked"
            books.entries[one.number] = id_, other, amount, code
            return allowed is not None and other not in allowed
        case "amount", (id_, state, amount, code):
            books.entries[one.number] = id_, state, amount + 1, code
        case "currency", (id_, state, amount, _):
            books.entries[one.number] = id_, state, amount, "CHF"
        case "other", (_, state, amount, code):
            books.entries[one.number] = UUID(int=1 << 100), state, amount, code
        case _:
            return False
    return True


@settings(max_examples=60)
@given(drawn=st.lists(_STATES, min_size=1, max_size=300), data=st.data())
def test_exactly_what_differs_is_found(drawn: list[tuple[State, bool, bool, str | None]], data: st.DataObject) -> None:
    ours, books = day(drawn)
    places = data.draw(st.lists(st.integers(0, len(ours) - 1), unique=True, max_size=6))
    spoilt = {ours[at].number for at in places if flawed(books, ours[at], data.draw(st.sampled_from(_FLAWS)))}
    shelf = Shelf(ours)
    report = reconciler(terminal_of(shelf), books).run(Run())
    assert {each["sequence"] for each in report["differences"]} == spoilt
    assert report["compared"] == len(ours)
    under_way = {each["sequence"] for each in report["under_way"]}
    assert under_way <= {one.number for one in ours if may_stand(one) is None} - spoilt
    assert shelf.noted[-1]["differences"] == len(spoilt)


def test_another_transaction_in_the_same_place_is_found() -> None:
    """Number, state and amount agree: only the name tells them apart."""
    ours, books = day([(State.APPROVED, True, True, "booked")] * 5)
    assert flawed(books, ours[2], "other")
    report = reconciler(terminal_of(Shelf(ours)), books).run(Run())
    assert [each["sequence"] for each in report["differences"]] == [3]


def test_what_the_ledger_lacks_is_shown_loudly() -> None:
    ours, books = day([(State.APPROVED, True, True, "booked")] * 5)
    gone = ours.pop(2)
    shelf = Shelf(ours)
    shelf.last_number = lambda: 5  # type: ignore[method-assign]
    shelf.booking_states = lambda first, last, limit: [o for o in ours if first <= o.number <= last][:limit]  # type: ignore[method-assign]
    (difference,) = reconciler(terminal_of(shelf), books).run(Run())["differences"]
    assert (difference["transaction"], difference["ours"]) == (str(gone.id), None)
    assert "put back" in difference["meaning"]


def test_a_few_differences_in_many_sales_cost_few_questions() -> None:
    count, flaws = 10_000, 3
    ours, books = day([(State.APPROVED, True, True, "booked")] * count)
    near = terminal_of(Shelf(ours))
    assert reconciler(near, books).run(Run())["differences"] == []
    assert books.asked == count / RANGE_MAX
    for number in (17, 5_000, 9_999):
        del books.entries[number]
    books.asked = 0
    report = reconciler(near, books).run(Run())
    assert [each["sequence"] for each in report["differences"]] == [17, 5_000, 9_999]
    assert books.asked <= count / RANGE_MAX + 2 * flaws * math.ceil(math.log2(RANGE_MAX / 64))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda said: said | {"last": said["last"] + 1}, "last"),
        (lambda said: said | {"terminal": "till-2"}, "terminal"),
        (lambda said: said | {"reconciliation": str(UUID(int=9))}, "reconciliation"),
        (lambda said: said | {"envelope": "0" * 64}, "envelope"),
        (lambda said: said | {"digest": "0" * 64, "entries": [[7, str(UUID(int=7)), "booked", 1, "EUR"]]}, "entries"),
        (lambda said: said | {"digest": "0" * 64, "entries": said["entries"] * 2}, "entries"),
        (lambda said: said | {"digest": "0" * 64, "entries": said["entries"] * 22}, "length"),
        (lambda said: said | {"digest": "0" * 64, "entries": None, "received": 10**9}, "single transaction"),
        (lambda said: said | {"decision": "approved"}, "decision"),
        (lambda said: {}, "missing"),
    ],
)
def test_an_answer_that_cannot_be_is_not_believed(change: Callable[[dict[str, Any]], dict[str, Any]], why: str) -> None:
    ours, books = day([(State.APPROVED, True, True, "booked")] * 3)
    books.change = change
    with pytest.raises(CallRefused, match=why) as refused:
        reconciler(terminal_of(Shelf(ours)), books).run(Run())
    assert refused.value.code == "answer_rejected"


def test_only_the_hosts_signature_counts_and_only_once() -> None:
    ours, books = day([(State.APPROVED, True, True, "booked")] * 3)
    near = terminal_of(Shelf(ours))
    books.key = Ed25519PrivateKey.generate()
    with pytest.raises(CallRefused, match="not believed"):
        reconciler(near, books).run(Run())
    books.key = KEY
    (question,) = near.call("reconcile.begin", {})["questions"]
    result = books.send(Parcel(UUID(question["id"]), "reconciliation", "k", question["envelope"]))
    assert isinstance(result, Answered)
    assert near.call("reconcile.compare", {"id": question["id"], "answer": result.answer})["compared"] == 3
    with pytest.raises(CallRefused, match="not asked"):
        near.call("reconcile.compare", {"id": question["id"], "answer": result.answer})


def test_a_host_that_is_not_reached_changes_nothing(tmp_path: Path) -> None:
    ours, books = day([(State.APPROVED, True, True, "booked")] * 3)
    books.down = True
    made = reconciler(terminal_of(Shelf(ours)), books, tmp_path)
    with pytest.raises(CallRefused, match="no network"):
        made.run(Run())
    assert made.last() is None
    books.down = False
    made.run(Run())
    known = reconciler(terminal_of(Shelf(ours)), books, tmp_path).last()
    assert known is not None
    assert (known["compared"], known["differences"], known["age_ms"]) == (3, 0, 0)
    (tmp_path / "reconciled.json").write_bytes(b"\xff{")
    assert reconciler(terminal_of(Shelf(ours)), books, tmp_path).last() is None


def test_repair_sends_again_what_was_laid_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("terminal.sync.spool.FILLER_BYTES", 65_536)
    clock = FakeClock()
    spool = Spool(tmp_path / "sync", SPOOL_KEY, clock=clock, entropy=random.Random(3).randbytes)
    ours, books = day([(State.APPROVED, True, True, "booked")] * 3)
    laid, other = (replace(sale(n), key=f"{UUID(int=n)}/authorisation", transaction=UUID(int=n)) for n in (2, 3))
    spool.store([laid, other], ["host"])
    for item in (laid, other):
        spool.move(f"{item.key}/host", On.HOLD, error="a person looks at it")
    del books.entries[2]
    shelf = Shelf(ours)
    made = reconciler(terminal_of(shelf), books, tmp_path, Queue(spool, clock).calls())
    assert made.run(Run())["repaired"] == []
    report = made.run(Run(repair=True))
    assert report["repaired"] == [f"{laid.key}/host"]
    states = {row.id: row.state.value for row in spool.rows()}
    assert states[f"{laid.key}/host"] != "held"
    assert states[f"{other.key}/host"] == "held"  # the host has that one: nothing to mend
    spool.close()


# ---- with a real ledger and the real host


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with tempfile.TemporaryDirectory(prefix="payterm-") as directory:
        made = Terminal(Path(directory))
        yield made
        made.close()


@dataclass
class HostDoor(Books):
    """The simulated host itself."""

    terminal: Terminal | None = None

    def send(self, parcel: Parcel) -> Result:
        assert self.terminal is not None
        self.asked += 1
        return Answered(self.terminal.host.reconcile(str(parcel.transaction), parcel.body.encode()).answer)


def a_day(terminal: Terminal) -> None:
    """Everything that may become of a sale."""
    terminal.online()
    kept, paid_back = terminal.pay(1250), terminal.pay(1400)
    terminal.pay(1251)  # declined by the issuer
    terminal.offline()
    settled, refused = terminal.pay(1300), terminal.pay(1351)
    terminal.pay(45_000)  # above what may be sold offline
    terminal.payments.void(terminal.begin(700), "no_card")
    terminal.call("sale.void", sale=str(kept.id))
    terminal.call("sale.refund", sale=str(paid_back.id), amount=400)
    terminal.carry()
    assert terminal.state(settled.id) is State.SETTLED
    assert terminal.state(refused.id) is State.REFUSED


def test_a_mixed_day_agrees_with_the_real_host(terminal: Terminal) -> None:
    a_day(terminal)
    door = HostDoor(terminal=terminal)
    near = Near(terminal.calls)
    report = reconciler(near, door).run(Run())
    assert (report["differences"], report["under_way"], report["compared"], door.asked) == ([], [], 8, 1)
    terminal.offline()
    waiting = terminal.pay(1500)
    report = reconciler(near, door).run(Run(days=1))
    assert [each["transaction"] for each in report["under_way"]] == [str(waiting.id)]
    assert report["differences"] == []
    assert reconciler(near, door).run(Run(first=2, last=3))["compared"] == 2
    assert reconciler(near, door).run(Run(first=999))["compared"] == 0


def test_an_empty_ledger_asks_nothing(terminal: Terminal) -> None:
    door = HostDoor(terminal=terminal)
    assert reconciler(Near(terminal.calls), door).run(Run())["compared"] == 0
    assert door.asked == 0


def test_only_sync_may_carry(terminal: Terminal) -> None:
    for name in ("reconcile.begin", "reconcile.compare", "reconcile.ended"):
        assert terminal.calls[name].roles == {Role.SYNC}


def test_the_command_prints_what_differs(
    terminal: Terminal, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    config = tmp_path / "payterm.toml"
    path = Path(tempfile.mkdtemp(dir="/tmp")) / "s"
    config.write_text(terminal.config_path.read_text() + f'\n[sync]\nsocket = "{path}"\n')
    assert payterm(config, "reconcile") == 3
    no_traceback(capsys, "payterm-sync does not answer")
    ours, books = day([(State.APPROVED, True, True, "booked")] * 5 + [(State.ACCEPTED, True, False, None)])
    made = reconciler(terminal_of(Shelf(ours)), books)
    server = ControlServer(path, Roles.build(sync_user=None, register_user=None), made.calls())
    try:
        assert payterm(config, "reconcile") == 0
        assert capsys.readouterr().out.splitlines() == [
            "transaction 6 is accepted: its answer is on its way",
            "transactions 1 to 6: 6 compared, the books agree",
        ]
        del books.entries[2]
        assert payterm(config, "reconcile", "--days", "3") == 1
        told = capsys.readouterr().out
        assert "approved" in told
        assert "nothing" in told
        assert "payterm reconcile --repair" in " ".join(told.split())
        assert payterm(config, "reconcile", "--json") == 1
        assert json.loads(capsys.readouterr().out)["differences"][0]["sequence"] == 2
        books.down = True
        assert payterm(config, "reconcile") == 4
        no_traceback(capsys, "no network to the host", "Nothing was changed")
    finally:
        server.close()


# ---- by itself


def test_once_a_day_when_there_is_a_way_to_the_host(tmp_path: Path) -> None:
    class Counting:
        runs = 0

        def last(self) -> None:
            return None

        def run(self, asked: Run) -> dict[str, Any]:
            assert (asked.days, asked.repair) == (3, True)
            self.runs += 1
            return {"differences": [], "compared": 0, "stripe": None}

    clock, counting = FakeClock(), Counting()
    daily = Daily(counting, clock, terminal="till-1", days=3)  # type: ignore[arg-type]
    link = LinkReport(
        online=True,
        error=None,
        queued=0,
        held=0,
        oldest_ms=None,
        history=History.WHOLE,
        head=None,
        terminal_head=None,
    )

    def look(link: LinkReport = link, mode: Mode = Mode.IMMEDIATE) -> int:
        daily.look(link, mode)
        if daily._thread is not None:
            daily._thread.join()
        return counting.runs

    assert look() == 0  # what waits at a start goes first
    clock.advance(FIRST_AFTER_MS)
    assert look(replace(link, online=False)) == 0
    assert look(mode=Mode.METERED) == 0
    assert look(mode=Mode.MANUAL) == 0
    assert [look(), look()] == [1, 1]
    hours = []
    for _ in range(48):
        clock.advance(3_600_000)
        hours.append(look())
    assert hours[-1] == 3
    assert sorted(hours) == hours
    runs = counting.runs
    daily.look(replace(link, online=False), Mode.MANUAL, now=True)  # a day's end has differed
    assert daily._thread is not None
    daily._thread.join()
    assert counting.runs == runs + 1


def test_terminals_do_not_all_ask_at_once() -> None:
    phases = [Daily(None, FakeClock(), terminal=f"till-{n}", days=1)._phase_ms for n in range(100)]  # type: ignore[arg-type]
    quarters = {phase * 4 // DAY_MS for phase in phases}
    assert quarters == {0, 1, 2, 3}
    assert all(a != b for a, b in itertools.pairwise(sorted(phases)))


def test_the_figures_of_an_outbox_item_are_what_it_brings(terminal: Terminal) -> None:
    """A reversal and a refund take away, so what waits can be summed."""
    terminal.online()
    first, second = terminal.pay(1250), terminal.pay(900)
    terminal.offline()
    terminal.call("sale.void", sale=str(first.id))
    terminal.call("sale.refund", sale=str(second.id), amount=400)
    assert {item["event"]: item["amount"] for item in terminal.items()} == {"reversal": -1250, "refund": -400}

"""The queue as people see it and steer it: its order, its upgrade, its followers, its calls."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from sync_rig import SPOOL_KEY, FakeClock, FakeHost, FakeTerminal, Rig, sale, seeded

from terminal.control import CallRefused
from terminal.sync import spool as spool_module
from terminal.sync.queue import Queue
from terminal.sync.spool import Follower, Moment, On, OutboxItem, Spool, State, Told


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "FILLER_BYTES", 65_536)


def opened(directory: Path, *, clock: FakeClock | None = None, followers: Sequence[Follower] = ()) -> Spool:
    return Spool(directory, SPOOL_KEY, clock=clock or FakeClock(), entropy=seeded(3), followers=followers)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    with contextlib.closing(opened(tmp_path / "sync")) as spool:
        yield spool


def deliver(spool: Spool, row_id: str, settled: str = "approved", receipt: str | None = None) -> None:
    spool.move(row_id, On.SEND)
    spool.move(row_id, On.ANSWER, answer="a.b.c", receipt=receipt)
    spool.move(row_id, On.DELIVER, settled=settled)


# Order and counts


def test_what_comes_after_another_waits_for_it(spool: Spool) -> None:
    first = sale(1)
    refund = replace(sale(2, event="refund"), after=first.transaction)
    spool.store([first, refund], ["host"])
    assert [row.key for row in spool.to_send("host", 9)] == [first.key]
    spool.move(f"{first.key}/host", On.SEND)
    assert spool.to_send("host", 9) == []
    spool.move(f"{first.key}/host", On.UNSURE)
    assert [row.key for row in spool.to_send("host", 9)] == [first.key]
    spool.move(f"{first.key}/host", On.SEND)
    spool.move(f"{first.key}/host", On.ANSWER, answer="a.b.c")
    assert spool.to_send("host", 9) == [], "the terminal may not believe it"
    spool.move(f"{first.key}/host", On.DISBELIEVE)
    assert [row.key for row in spool.to_send("host", 9)] == [first.key]
    deliver(spool, f"{first.key}/host")
    assert [row.key for row in spool.to_send("host", 9)] == [refund.key]


def test_a_days_end_goes_after_everything_that_came_before_it(spool: Spool) -> None:
    """The host compares its sums with what it has then; what is held for a person is no reason to wait."""
    first, refused, batch, later = sale(1), sale(2), sale(3, event="batch"), sale(4)
    spool.store([first, refused, batch, later], ["host"])
    spool.move(f"{refused.key}/host", On.SEND)
    assert [row.key for row in spool.to_send("host", 9)] == [first.key, later.key]
    spool.move(f"{refused.key}/host", On.REFUSE, error="no")
    spool.move(f"{first.key}/host", On.SEND)
    spool.move(f"{first.key}/host", On.UNSURE)
    assert batch.key not in [row.key for row in spool.to_send("host", 9)]
    deliver(spool, f"{first.key}/host")
    assert [row.key for row in spool.to_send("host", 9)] == [batch.key, later.key]


def test_what_follows_a_refused_one_waits_for_a_person(spool: Spool) -> None:
    first = sale(1)
    refund = replace(sale(2, event="refund"), after=first.transaction)
    spool.store([first, refund, sale(3)], ["host"])
    spool.move(f"{first.key}/host", On.SEND)
    spool.move(f"{first.key}/host", On.REFUSE, error="no")
    assert [row.key for row in spool.to_send("host", 9)] == [sale(3).key]
    listed = Queue(spool, FakeClock()).calls()["queue.list"].handle(_list())
    assert [item["waits_for"] for item in listed["items"]] == [None, str(first.transaction), None]


def test_sums_and_counts_are_kept_through_every_change_and_a_restart(tmp_path: Path) -> None:
    def figures(number: int, amount: int, code: str = "EUR") -> OutboxItem:
        return replace(sale(number), amount_minor=amount, currency=code)

    with contextlib.closing(opened(tmp_path / "sync")) as spool:
        assert spool.waiting("host").sums_minor == {}  # counting starts here
        spool.store([figures(1, 500), figures(2, 250), figures(3, 900, "CHF"), figures(4, -100), sale(5)], ["host"])
        assert spool.waiting("host").sums_minor == {"CHF": 900, "EUR": 650}
        deliver(spool, f"{sale(1).key}/host")
        spool.move(f"{sale(3).key}/host", On.SEND)
        spool.move(f"{sale(3).key}/host", On.REFUSE, error="no")
        kept = spool.waiting("host")
        assert (kept.queued, kept.held, kept.sums_minor) == (3, 1, {"EUR": 150})
    with contextlib.closing(opened(tmp_path / "sync")) as spool:
        assert spool.waiting("host") == kept
        assert spool.waiting("nowhere").queued == 0


def test_counts_are_right_after_a_transaction_that_failed(spool: Spool) -> None:
    spool.store([sale(1)], ["host"])
    before = spool.waiting("host")

    def interrupted() -> None:
        with spool.together():
            spool.store([sale(2)], ["host"])
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        interrupted()
    assert spool.waiting("host") == before
    assert spool.row(f"{sale(2).key}/host") is None


def test_selecting_looks_at_no_more_rows_than_it_takes(spool: Spool) -> None:
    """By the query plan: an index gives the order, nothing is sorted."""
    for urgent in (0, 1):
        plan = spool._sql.execute(
            "EXPLAIN QUERY PLAN SELECT rowid FROM item WHERE destination = 'host' AND "  # noqa: S608
            f"{spool_module._IN_SENDABLE} AND urgent = {urgent} AND due_ms <= 5 ORDER BY attempts, rowid LIMIT 3"
        ).fetchall()
        told = " ".join(str(step[3]) for step in plan)
        assert "item_sendable" in told
        assert "TEMP B-TREE" not in told


# Upgrade


def test_an_upgrade_carries_the_queue_and_keeps_a_copy(tmp_path: Path) -> None:
    directory = tmp_path / "sync"
    with contextlib.closing(opened(directory)) as spool:
        spool.store([sale(1)], ["host"])
        spool.move(f"{sale(1).key}/host", On.SEND)
        before = spool.parcel(spool.rows()[0])
    with contextlib.closing(sqlite3.connect(directory / "spool.db")) as connection, connection:
        for (index,) in connection.execute("SELECT name FROM sqlite_master WHERE name LIKE 'item_%'").fetchall():
            connection.execute(f"DROP INDEX {index}")
        for column in ("after", "receipt", "figures"):
            connection.execute(f"ALTER TABLE item DROP COLUMN {column}")  # as layout 1 was
        connection.execute("UPDATE meta SET value = '1' WHERE name = 'version'")
    for _ in range(2):
        with contextlib.closing(opened(directory)) as spool:
            [row] = spool.rows()
            assert row.state is State.AMBIGUOUS
            assert spool.parcel(row) == before
    copy = directory / "spool.layout-1"
    assert copy.stat().st_mode & 0o777 == 0o600
    with contextlib.closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("SELECT count(*) FROM item").fetchone() == (1,)


# Followers


class Bell:
    """Is told that a sale was stored, and what became of it."""

    name = "bell"

    def stored(self, item: OutboxItem, at: Moment) -> Sequence[Told]:
        return (Told(item.transaction, "rung", f"stored {item.number}"),) if item.event == "authorisation" else ()

    def settled(self, event: str, envelope: str, state: str, at: Moment, known: frozenset[str]) -> Sequence[Told]:
        sale_ = self.subject(event, envelope)
        assert sale_ is not None
        return (Told(sale_, f"ended.{state}", f"{state} after {sorted(known)}"),)

    def subject(self, event: str, envelope: str) -> UUID | None:
        return UUID(int=1)


def test_a_follower_is_told_in_the_same_transaction_and_in_order(tmp_path: Path) -> None:
    with contextlib.closing(opened(tmp_path / "sync", followers=[Bell()])) as spool:
        spool.store([sale(1)], ["host"])
        [rung] = spool.to_send("bell", 9)
        assert spool.parcel(rung).body == "stored 1"
        deliver(spool, f"{sale(1).key}/host", settled="settled")
        assert [row.event for row in spool.to_send("bell", 9)] == ["rung"]
        deliver(spool, rung.id, receipt="pr_1")
        [ended] = spool.to_send("bell", 9)
        assert (ended.event, spool.parcel(ended).body) == ("ended.settled", "settled after ['rung']")
        assert spool.parcel(ended).earlier == "pr_1"


def test_a_follower_is_told_once_however_often_it_is_learnt(tmp_path: Path) -> None:
    with contextlib.closing(opened(tmp_path / "sync", followers=[Bell()])) as spool:
        for _ in range(2):
            spool.store([sale(1)], ["host"])
            deliver(spool, f"{sale(1).key}/host")
        assert [row.event for row in spool.rows() if row.destination == "bell"] == ["rung", "ended.approved"]


def test_a_dead_follower_keeps_no_sale_from_the_host(tmp_path: Path) -> None:
    host, bell, terminal = FakeHost(), FakeHost(name="bell"), FakeTerminal()
    bell.send = lambda parcel: pytest.fail("it should have nothing")  # type: ignore[assignment,method-assign]
    rig = Rig(tmp_path, terminal, [host], FakeClock(), seeded(5))
    terminal.sell(*(sale(number) for number in range(1, 6)))
    rig.settle()
    assert len(terminal.answers) == 5
    rig.close()


# Calls


def _list(**given: Any) -> Any:
    from terminal.sync.queue import List

    return msgspec.convert(given, List)


def ask(queue: Queue, do: str, **given: Any) -> dict[str, Any]:
    call = queue.calls()[do]
    answer: dict[str, Any] = call.handle(msgspec.convert(given, call.arguments))
    return answer


def test_the_list_is_whole_over_its_pages(spool: Spool) -> None:
    queue = Queue(spool, FakeClock())
    spool.store([sale(number) for number in range(1, 8)], ["host", "other"])
    deliver(spool, f"{sale(3).key}/host")
    found: list[str] = []
    after = None
    while True:
        page = ask(queue, "queue.list", limit=4, after=after)
        found += [item["id"] for item in page["items"]]
        after = page["more"]
        if after is None:
            break
    assert sorted(found) == sorted(row.id for row in spool.rows())
    assert len(found) == len(set(found)) == 13
    assert len(ask(queue, "queue.list", destination="other")["items"]) == 7
    assert len(ask(queue, "queue.list", state="delivered")["items"]) == 1
    with pytest.raises(CallRefused, match="no state"):
        ask(queue, "queue.list", state="lost")


def test_a_person_holds_and_retries_with_a_reason(spool: Spool) -> None:
    queue = Queue(spool, FakeClock())
    spool.store([sale(1)], ["host"])
    row = f"{sale(1).key}/host"
    key = ask(queue, "queue.show", id=row)["idempotency_key_digest"]
    assert ask(queue, "queue.hold", id=row, reason="asked by the bank")["state"] == "held"
    assert spool.to_send("host", 9) == []
    assert "asked by the bank" in ask(queue, "queue.show", id=row)["error"]
    assert ask(queue, "queue.retry", id=row, reason="all is well")["state"] == "ambiguous"
    assert ask(queue, "queue.show", id=row)["idempotency_key_digest"] == key
    for do, match in (("queue.retry", "only what is refused or held"),):
        with pytest.raises(CallRefused, match=match):
            ask(queue, do, id=row, reason="again")
    with pytest.raises(CallRefused, match="nothing in the queue"):
        ask(queue, "queue.show", id="nonsense")


def test_what_is_under_way_cannot_be_held(spool: Spool) -> None:
    spool.store([sale(1)], ["host"])
    queue = Queue(spool, FakeClock(), lambda _: True)
    with pytest.raises(CallRefused, match="under way"):
        ask(queue, "queue.hold", id=f"{sale(1).key}/host", reason="stop")


def test_an_export_has_what_a_move_by_hand_needs(spool: Spool) -> None:
    spool.store([sale(number) for number in range(1, 7)], ["host"])
    queue = Queue(spool, FakeClock())
    first = ask(queue, "queue.export")
    rest = ask(queue, "queue.export", after=first["more"])
    bodies = {item["transaction"]: item["body"] for item in first["items"] + rest["items"]}
    assert bodies == {str(sale(number).transaction): sale(number).envelope for number in range(1, 7)}
    assert all(item["idempotency_key"] for item in first["items"])
    assert rest["more"] is None

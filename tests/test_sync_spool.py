"""The spool: what it stores, how, and that only its table changes a state."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sync_rig import MARKER, SPOOL_KEY, FakeClock, sale, seeded

from terminal.ledger.keys import SecretKey
from terminal.sync import spool as spool_module
from terminal.sync.errors import SpoolCorrupt, SpoolKeyWrong, SpoolUnavailable, Unreadable
from terminal.sync.spool import OPEN, TRANSITIONS, IllegalTransition, Moment, On, Spool, State

ANSWER = "an.answer.here"


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Only one of these tests is about the size of the WAL."""
    if request.function is not test_the_wal_has_its_size_from_the_start_and_keeps_it:
        monkeypatch.setattr(spool_module, "FILLER_BYTES", 65_536)


def opened(directory: Path, *, clock: FakeClock | None = None, key: SecretKey = SPOOL_KEY, seed: int = 1) -> Spool:
    return Spool(directory, key, clock=clock or FakeClock(), entropy=seeded(seed))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def spool(tmp_path: Path, clock: FakeClock) -> Iterator[Spool]:
    spool = opened(tmp_path / "sync", clock=clock)
    yield spool
    spool.close()


def stored(spool: Spool, number: int = 1, *, urgent: bool = False) -> str:
    item = sale(number, urgent=urgent)
    spool.store([item], ["host"])
    return f"{item.key}/host"


def bring_to(spool: Spool, row: str, state: State) -> None:
    """By the table's own ways, breadth first."""
    paths: list[tuple[State, tuple[On, ...]]] = [(State.QUEUED, ())]
    for here, path in paths:
        if here is state:
            for on in path:
                spool.move(row, on, answer=ANSWER)
            return
        paths += [(to, (*path, on)) for (origin, on), to in TRANSITIONS.items() if origin is here and len(path) < 5]
    raise AssertionError(f"no way to {state}")


@pytest.mark.parametrize("state", list(State))
def test_only_the_table_changes_a_state(spool: Spool, state: State) -> None:
    for number, on in enumerate(On, 1):
        row = stored(spool, number)
        bring_to(spool, row, state)
        if (state, on) in TRANSITIONS:
            assert spool.move(row, on, answer=ANSWER) is TRANSITIONS[state, on]
        else:
            with pytest.raises(IllegalTransition):
                spool.move(row, on, answer=ANSWER)
        found = spool.row(row)
        assert found is not None
        assert found.state is TRANSITIONS.get((state, on), state)


def test_ambiguous_never_becomes_queued_again() -> None:
    reached = {State.AMBIGUOUS}
    for _ in State:
        reached |= {to for (origin, _), to in TRANSITIONS.items() if origin in reached}
    assert State.QUEUED not in reached


def test_key_and_body_are_fixed_before_the_first_send(tmp_path: Path, clock: FakeClock) -> None:
    spool = opened(tmp_path / "sync", clock=clock)
    row = stored(spool)
    [first] = spool.rows()
    parcel = spool.parcel(first)
    spool.close()
    again = opened(tmp_path / "sync", clock=clock, seed=2)
    assert again.parcel(again.rows()[0]) == parcel
    assert parcel.body == sale(1).envelope
    assert first.id == row
    again.close()


def test_keys_are_not_shared(spool: Spool) -> None:
    for number in range(1, 20):
        stored(spool, number)
    assert len({spool.parcel(row).idempotency_key for row in spool.rows()}) == 19


def test_an_item_offered_again_is_the_same_item(spool: Spool) -> None:
    assert spool.store([sale(1)], ["host"]) == (sale(1),)
    key = spool.parcel(spool.rows()[0]).idempotency_key
    assert spool.store([sale(1)], ["host"]) == ()
    assert [spool.parcel(row).idempotency_key for row in spool.rows()] == [key]


def test_a_delivered_item_that_the_terminal_asks_for_again_keeps_its_key(spool: Spool) -> None:
    row = stored(spool)
    key = spool.parcel(spool.rows()[0]).idempotency_key
    bring_to(spool, row, State.DELIVERED)
    assert spool.rows() == ()
    spool.store([sale(1)], ["host"])
    [again] = spool.rows()
    assert again.state is State.AMBIGUOUS
    assert (spool.parcel(again).idempotency_key, spool.parcel(again).body) == (key, sale(1).envelope)


@pytest.mark.parametrize("state", [State.QUEUED, State.AMBIGUOUS, State.DELIVERED, State.REFUSED])
def test_another_envelope_for_the_same_event_is_held_and_never_sent(spool: Spool, state: State) -> None:
    bring_to(spool, stored(spool), state)
    spool.store([sale(1, envelope="another.one.here")], ["host"])
    [row] = spool.rows()
    assert row.state is State.HELD
    assert row.error is not None
    assert "two different envelopes" in row.error


def test_one_row_for_each_destination(spool: Spool) -> None:
    spool.store([sale(1)], ["host", "other"])
    assert [row.destination for row in spool.rows()] == ["host", "other"]
    assert len({spool.parcel(row).idempotency_key for row in spool.rows()}) == 2


def test_killed_while_sending_is_ambiguous_at_the_next_start(tmp_path: Path) -> None:
    spool = opened(tmp_path / "sync")
    bring_to(spool, stored(spool), State.SENDING)
    spool.close()
    again = opened(tmp_path / "sync")
    assert [row.state for row in again.rows()] == [State.AMBIGUOUS]
    again.close()


def test_due_times_outlive_a_restart_but_not_a_boot(tmp_path: Path, clock: FakeClock) -> None:
    spool = opened(tmp_path / "sync", clock=clock)
    row = stored(spool)
    spool.move(row, On.SEND)
    spool.move(row, On.UNSURE, due_in_ms=50_000)
    spool.close()
    spool = opened(tmp_path / "sync", clock=clock)
    assert not spool.to_send("host", 1)
    spool.close()
    clock.reboot(synchronised=False, wall_ms=0)
    spool = opened(tmp_path / "sync", clock=clock)
    assert spool.to_send("host", 1)
    spool.close()


def test_an_attempt_that_certainly_did_not_arrive_does_not_begin_an_items_age(spool: Spool, clock: FakeClock) -> None:
    """Else a notice of yesterday counts as too old to be repeated at its first real attempt."""
    row = stored(spool)
    spool.move(row, On.SEND)
    spool.move(row, On.NOT_TAKEN)
    clock.advance(90_000_000)
    spool.move(row, On.SEND)
    sent = Moment.now(clock)
    clock.advance(1_000)
    spool.move(row, On.UNSURE)
    spool.move(row, On.SEND)
    assert [found.first_attempt for found in spool.rows()] == [sent]


def test_a_wrong_clock_moves_no_due_time(spool: Spool, clock: FakeClock) -> None:
    row = stored(spool)
    spool.move(row, On.SEND)
    spool.move(row, On.UNSURE, due_in_ms=1_000)
    clock.set_wall(10**15)
    assert not spool.to_send("host", 1)
    clock.set_wall(0)
    clock.advance(1_000)
    assert spool.to_send("host", 1)


def test_the_age_is_known_across_boots_only_by_synchronised_clocks(tmp_path: Path, clock: FakeClock) -> None:
    spool = opened(tmp_path / "sync", clock=clock)
    stored(spool)
    clock.advance(5_000)
    assert spool.waiting("host").oldest_ms == 5_000
    spool.close()
    clock.reboot(wall_ms=clock.wall_ms() + 60_000)
    spool = opened(tmp_path / "sync", clock=clock)
    assert spool.waiting("host").oldest_ms == 65_000
    spool.close()
    clock.reboot(synchronised=False, wall_ms=0)
    spool = opened(tmp_path / "sync", clock=clock)
    assert spool.waiting("host").oldest_ms == clock.monotonic_ms()  # at least that
    spool.close()


def test_a_customer_comes_before_the_backlog_and_the_last_customer_first(spool: Spool) -> None:
    for number, urgent in ((1, False), (2, False), (3, True), (4, True)):
        stored(spool, number, urgent=urgent)
    order = []
    while rows := spool.to_send("host", 1):
        [row] = rows
        order.append(row.number)
        bring_to(spool, row.id, State.SENDING)
    assert order == [4, 3, 1, 2]


def test_nothing_waits_that_is_not_listed_and_counted(spool: Spool) -> None:
    for number, state in enumerate(State, 1):
        bring_to(spool, stored(spool, number), state)
    assert {row.state for row in spool.rows()} == set(State) - {State.DELIVERED}
    assert spool.waiting("host").queued == len(OPEN)
    assert spool.waiting("host").held == 2


def test_a_person_can_have_a_refused_item_sent_again_under_its_key(spool: Spool) -> None:
    row = stored(spool)
    key = spool.parcel(spool.rows()[0]).idempotency_key
    bring_to(spool, row, State.REFUSED)
    spool.retry(row, "host was set up wrongly")
    [again] = spool.rows()
    assert (again.state, again.error) == (State.AMBIGUOUS, "sent again by hand: host was set up wrongly")
    assert spool.parcel(again).idempotency_key == key


def test_old_delivered_rows_are_forgotten_and_nothing_else(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "DELIVERED_MAX", 3)
    monkeypatch.setattr(spool_module, "FORGET_EVERY", 1)
    for number in range(1, 11):
        row = stored(spool, number)
        if number > 2:  # the two oldest are never sent
            bring_to(spool, row, State.DELIVERED)
    assert [spool.row(f"{sale(number).key}/host") is not None for number in range(1, 11)] == [True] * 2 + [
        False
    ] * 5 + [True] * 3


# What is on the card


def files(directory: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(directory.iterdir()))


def test_no_envelope_and_no_answer_is_readable_in_the_files(tmp_path: Path) -> None:
    spool = opened(tmp_path / "sync")
    row = stored(spool)
    bring_to(spool, row, State.ANSWERED)
    assert MARKER.encode() not in files(tmp_path / "sync")
    assert ANSWER.encode() not in files(tmp_path / "sync")
    # Control: had one leaked into a message, this search would find it.
    spool.move(row, On.UNDELIVERED, error=sale(1).envelope)
    assert MARKER.encode() in files(tmp_path / "sync")
    spool.close()


def test_body_and_answer_are_erased_once_delivered(tmp_path: Path) -> None:
    spool = opened(tmp_path / "sync")
    row = stored(spool)
    bring_to(spool, row, State.ANSWERED)
    spool.close()
    with sqlite3.connect(tmp_path / "sync" / "spool.db") as connection:
        [(body, answer)] = connection.execute("SELECT body, answer FROM item")
    connection.close()
    assert body in files(tmp_path / "sync")
    assert answer in files(tmp_path / "sync")
    spool = opened(tmp_path / "sync")
    spool.move(row, On.DELIVER)
    spool.close()
    assert body[16:] not in files(tmp_path / "sync")
    assert answer[16:] not in files(tmp_path / "sync")


def test_a_body_moved_to_another_row_is_not_sent(tmp_path: Path) -> None:
    spool = opened(tmp_path / "sync")
    stored(spool, 1)
    stored(spool, 2)
    spool.close()
    with sqlite3.connect(tmp_path / "sync" / "spool.db") as connection:
        connection.execute("UPDATE item SET body = (SELECT body FROM item WHERE number = 1) WHERE number = 2")
    connection.close()
    spool = opened(tmp_path / "sync")
    first, second = spool.rows()
    assert spool.parcel(first).body == sale(1).envelope
    with pytest.raises(Unreadable):
        spool.parcel(second)
    spool.close()


def test_the_wal_has_its_size_from_the_start_and_keeps_it(tmp_path: Path) -> None:
    spool = opened(tmp_path / "sync")
    wal = tmp_path / "sync" / "spool.db-wal"
    size_bytes = wal.stat().st_size
    assert size_bytes > spool_module.FILLER_BYTES
    for number in range(1, 200):
        bring_to(spool, stored(spool, number), State.DELIVERED)
    assert wal.stat().st_size == size_bytes
    spool.close()


def test_every_commit_is_flushed(spool: Spool) -> None:
    def setting(name: str) -> object:
        return spool._database.execute_sql(f"PRAGMA {name}").fetchone()[0]

    assert setting("synchronous") == 2  # FULL
    assert setting("journal_mode") == "wal"
    assert setting("locking_mode") == "exclusive"
    assert setting("secure_delete") == 1


def test_a_full_disk_loses_nothing_and_says_so(spool: Spool) -> None:
    stored(spool, 1)
    spool._database.execute_sql(f"PRAGMA max_page_count = {spool_module.FILLER_BYTES // 4096 + 20}")
    with pytest.raises(SpoolUnavailable, match="nothing is sent, everything stays stored"):
        for number in range(2, 100):
            spool.store([sale(number, envelope="x" * 60_000)], ["host"])
    whole = len(spool.rows())
    assert 1 < whole < 99
    for row in spool.rows():
        assert spool.parcel(row).body
    bring_to(spool, spool.rows()[0].id, State.DELIVERED)  # what is there can still be finished
    assert len(spool.rows()) == whole - 1


def test_a_second_process_is_turned_away(tmp_path: Path) -> None:
    first = opened(tmp_path / "sync")
    with pytest.raises(SpoolUnavailable, match="Is another payterm-sync running"):
        opened(tmp_path / "sync")
    stored(first)
    first.close()


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "sync"
    directory.mkdir()
    directory.chmod(0o750)
    with pytest.raises(SpoolUnavailable, match="chmod 700"):
        opened(directory)


def test_another_key_changes_nothing(tmp_path: Path) -> None:
    spool = opened(tmp_path / "sync")
    stored(spool)
    spool.close()
    with pytest.raises(SpoolKeyWrong, match="nothing is lost"):
        opened(tmp_path / "sync", key=SecretKey(bytes(32)))
    spool = opened(tmp_path / "sync")
    assert spool.parcel(spool.rows()[0]).body == sale(1).envelope
    spool.close()


def test_a_newer_layout_is_left_alone(tmp_path: Path) -> None:
    opened(tmp_path / "sync").close()
    with sqlite3.connect(tmp_path / "sync" / "spool.db") as connection:
        connection.execute("UPDATE meta SET value = '3' WHERE name = 'version'")
    connection.close()
    with pytest.raises(SpoolCorrupt, match="newer version"):
        opened(tmp_path / "sync")


def test_a_damaged_file_is_left_alone(tmp_path: Path) -> None:
    spool = opened(tmp_path / "sync")
    for number in range(1, 100):
        stored(spool, number)
    spool.close()
    path = tmp_path / "sync" / "spool.db"
    damaged = bytearray(path.read_bytes())
    damaged[100:8_192] = bytes(8_092)
    path.write_bytes(damaged)
    with pytest.raises(SpoolCorrupt, match="nothing was changed"):
        opened(tmp_path / "sync")
    assert path.read_bytes() == damaged


def test_no_secret_in_a_repr(spool: Spool) -> None:
    stored(spool)
    [row] = spool.rows()
    for shown in (repr(sale(1)), repr(spool.parcel(row)), repr(row)):
        assert MARKER not in shown
        assert spool.parcel(row).idempotency_key not in shown

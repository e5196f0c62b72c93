"""The sync service's own journal: what it says, that it stops no upload, and that no replaced store stays unseen."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sync_rig import (
    JOURNAL_BYTES,
    MARKER,
    SPOOL_KEY,
    FakeChain,
    FakeClock,
    FakeHost,
    FakeTerminal,
    Mood,
    Rig,
    sale,
    seeded,
)

from terminal.ledger.errors import LedgerError
from terminal.ledger.journal import Record, RecordType
from terminal.ledger.keys import SecretKey
from terminal.ledger.medium import FileMedium
from terminal.sync import spool as spool_module
from terminal.sync.journal import ASIDES_MAX, FLUSH_EVERY_MS, TERMINAL_HEAD_EVERY_MS, Head, History, SyncJournal, read

MINUTE_MS = 60_000
DAY_MS = 24 * 60 * MINUTE_MS
MONTH_MS = 31 * DAY_MS


@pytest.fixture(autouse=True)
def _small_spools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "FILLER_BYTES", 65_536)


class World:
    """A rig whose reports are sent as the loop sends them."""

    def __init__(self, root: Path) -> None:
        self.host, self.terminal, self.clock = FakeHost(), FakeTerminal(), FakeClock()
        self.terminal.chain.grow(5)
        self.rig = Rig(root, self.terminal, [self.host], self.clock, seeded(5))

    @property
    def directory(self) -> Path:
        return self.rig.directory

    def work(self, *, minutes: int = 0) -> None:
        """What the loop does, for so long."""
        for _ in range(minutes + 1):
            self.rig.settle()
            report = self.rig.sync.report()
            self.rig.sync.tell(report)
            self.rig.sync.note(report)
            self.rig.journal.tidy()
            self.clock.advance(MINUTE_MS)

    def restart(self) -> None:
        """The orderly way, in the same directory."""
        self.rig.close()
        self.rig._start()

    def records(self) -> list[Record]:
        return list(read(self.directory, SPOOL_KEY))

    def said(self, what: str | None = None) -> list[dict[str, Any]]:
        """Details of the events of this name."""
        events = [record.body for record in self.records() if record.type is RecordType.EVENT]
        return [event["details"] | {"what": event["what"]} for event in events if what in {None, event["what"]}]

    def history(self) -> History:
        return self.rig.sync.report().history


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.rig.close()


@contextlib.contextmanager
def opened(
    directory: Path, clock: FakeClock | None = None, key: SecretKey = SPOOL_KEY, seed: int = 1
) -> Iterator[SyncJournal]:
    directory.mkdir(mode=0o700, exist_ok=True)
    with contextlib.closing(
        SyncJournal(directory, key, clock=clock or FakeClock(), entropy=seeded(seed), size_bytes=JOURNAL_BYTES)
    ) as journal:
        yield journal


def whats(directory: Path) -> list[str]:
    return [record.body["what"] for record in read(directory, SPOOL_KEY) if record.type is RecordType.EVENT]


# What it says


def test_the_life_of_an_item_is_in_the_trail(world: World) -> None:
    world.terminal.sell(sale(1), sale(2))
    world.host.moods[sale(2).key] = Mood.CONDEMNS
    world.work()
    world.rig.close()
    said = world.said()
    assert [event["what"] for event in said] == [
        "start", "terminal_head", "stored", "answered", "refused", "link", "stop",
    ]  # fmt: skip
    assert said[2] == {"what": "stored", "keys": [sale(1).key, sale(2).key], "numbers": [1, 2]}
    assert said[3] == {"what": "answered", "keys": [sale(1).key], "destination": "host"}
    assert said[4]["error"] == "invalid"
    world.rig._start()


@pytest.mark.parametrize(
    ("mood", "what"), [(Mood.LOSES_ANSWER, "ambiguous"), (Mood.FORGED, "ambiguous"), (Mood.FORGED, "answered")]
)
def test_an_end_is_noted_once_and_not_for_every_retry(world: World, mood: Mood, what: str) -> None:
    world.host.mood = mood
    world.terminal.sell(sale(1))
    world.work(minutes=30)
    assert len(world.host.tried) > 10
    assert len(world.said(what)) == 1
    world.host.mood = Mood.WELL
    world.work(minutes=2)
    assert len(world.said("answered")) == 1


def test_held_items_are_noted(world: World) -> None:
    world.terminal.sell(sale(1))
    world.rig.sync.fetch(wait_ms=0)
    world.rig.spool._database.execute_sql("UPDATE item SET body = zeroblob(90)")
    world.work()
    (held,) = world.said("held")
    assert held["key"] == sale(1).key


def test_the_link_is_noted_when_it_changes_and_at_most_once_a_minute(world: World) -> None:
    world.terminal.sell(sale(1))
    world.work(minutes=3)
    world.host.mood = Mood.DOWN
    world.terminal.sell(sale(2))
    world.work(minutes=10)
    world.host.mood = Mood.WELL
    world.work(minutes=3)
    assert [event["online"] for event in world.said("link")] == [True, False, True]
    for _ in range(20):  # it comes and goes all the time
        for mood in (Mood.DOWN, Mood.WELL):
            world.host.mood = mood
            world.terminal.sell(sale(100 + len(world.terminal.outbox)))
            world.rig.settle()
            world.rig.sync.note(world.rig.sync.report())
            world.clock.advance(1_000)
            world.rig.settle()
    assert len(world.said("link")) <= 4


def test_nothing_of_an_envelope_or_an_answer_is_in_it(world: World) -> None:
    world.terminal.sell(sale(1), sale(2, event="checkpoint"))
    world.work()
    texts = [str(record.body) for record in world.records()]
    assert any(sale(2, event="checkpoint").key in text for text in texts)  # control: keys are
    for text in texts:
        assert MARKER not in text
        assert sale(1).envelope not in text
        assert not any(answer in text for answer in world.terminal.answers.values())
    assert b"stored" not in (world.directory / "journal").read_bytes()


# Ring and archive


def test_what_the_ring_cannot_hold_is_in_the_archive(tmp_path: Path) -> None:
    clock = FakeClock()
    with opened(tmp_path, clock) as journal:
        for number in range(500):
            journal.note("stored", number=number)
            if number % 7 == 0:
                journal.tidy()
            clock.advance(MONTH_MS // 200)
    records = list(read(tmp_path, SPOOL_KEY))
    assert [record.body["details"]["number"] for record in records if "number" in str(record.body)] == list(range(500))
    assert [record.sequence for record in records] == list(range(1, len(records) + 1))
    months = {path.name[:7] for path in (tmp_path / "archive").glob("*.segment")}
    assert len(months) >= 2
    with opened(tmp_path, clock) as journal:
        assert journal.history is History.WHOLE
    assert len(list(read(tmp_path, SPOOL_KEY))) == len(records) + 2


@pytest.mark.parametrize("synchronised", [True, False])
def test_the_archive_keeps_twelve_months_by_a_clock_that_is_right(tmp_path: Path, synchronised: bool) -> None:
    clock = FakeClock(synchronised=synchronised)
    with opened(tmp_path, clock) as journal:
        for _ in range(20):
            for _ in range(30):
                journal.note("stored")
            clock.advance(MONTH_MS)
    oldest_ms = next(read(tmp_path, SPOOL_KEY)).wall_ms
    if synchronised:
        assert 12 * MONTH_MS <= clock.wall_ms() - oldest_ms <= 15 * MONTH_MS
    else:
        assert clock.wall_ms() - oldest_ms == 20 * MONTH_MS


def test_flushes_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes = 0
    flush = FileMedium.flush

    def counting(medium: FileMedium) -> None:
        nonlocal flushes
        flushes += 1
        flush(medium)

    monkeypatch.setattr(FileMedium, "flush", counting)
    clock = FakeClock()
    with opened(tmp_path, clock) as journal:
        begun = flushes
        for _ in range(25):
            journal.note("stored")
            journal.tidy()
            clock.advance(FLUSH_EVERY_MS // 10)
        assert flushes - begun <= 3
        journal.tidy()
        clock.advance(FLUSH_EVERY_MS)
        journal.tidy()
        idle = flushes
        for _ in range(10):
            clock.advance(FLUSH_EVERY_MS)
            journal.tidy()
        assert flushes == idle


def test_it_is_read_while_the_service_writes(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        for number in range(300):
            journal.note("stored", number=number)
            if number % 25 == 0:
                before = (tmp_path / "journal").read_bytes(), sorted((tmp_path / "archive").glob("*"))
                last = list(read(tmp_path, SPOOL_KEY))[-1]
                assert last.body["details"]["number"] == number
                assert before == ((tmp_path / "journal").read_bytes(), sorted((tmp_path / "archive").glob("*")))


def test_reading_leaves_an_unfinished_segment_to_the_service(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        for _ in range(100):
            journal.note("stored")
    unfinished = tmp_path / "archive" / "2027-01-000000000900-000000000901.segment.new"
    unfinished.write_bytes(b"being written")
    assert list(read(tmp_path, SPOOL_KEY))
    assert unfinished.exists()


def test_nothing_is_read_where_nothing_is(tmp_path: Path) -> None:
    assert list(read(tmp_path / "nowhere", SPOOL_KEY)) == []


def test_another_key_reads_nothing(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    with pytest.raises(LedgerError):
        list(read(tmp_path, SecretKey(bytes(32))))


# It stops no upload


def damage(directory: Path) -> None:
    """A record in the middle of what the ring still needs."""
    sequence = list(read(directory, SPOOL_KEY))[-4].sequence
    path = directory / "journal"
    content = bytearray(path.read_bytes())
    content[content.find(b"PTJ1") % 16_384 + (sequence - 1) % 64 * 16_384 + 200] ^= 1
    path.write_bytes(bytes(content))


def lose(directory: Path) -> None:
    (directory / "journal").unlink()


def lose_archive(directory: Path) -> None:
    shutil.rmtree(directory / "archive")


def damage_archive(directory: Path) -> None:
    for segment in (directory / "archive").glob("*.segment"):
        segment.write_bytes(bytes(40) + segment.read_bytes()[40:])


@pytest.mark.parametrize("harm", [damage, lose, lose_archive, damage_archive])
def test_a_damaged_journal_is_put_aside_and_begun_anew(
    world: World, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    world.work()
    for _ in range(90):
        world.rig.journal.note("stored")
    world.rig.close()
    harm(world.directory)
    world.rig._start()
    assert world.history() is History.ANEW
    assert "put aside" in caplog.text
    assert "sale" not in caplog.text
    world.terminal.sell(sale(1))
    world.work()
    assert sale(1).key in world.terminal.answers
    assert world.terminal.reports[-1].history is History.ANEW
    world.restart()
    assert [event["what"] for event in world.said()][:3] == ["begun_anew", "start", "terminal_head"]
    assert {record.epoch for record in world.records()} == {2}
    assert (world.directory / "aside-1").is_dir()
    assert world.history() is History.WHOLE  # it is said once; the trail says it for ever


def test_a_whole_journal_that_was_put_aside_is_still_read(tmp_path: Path) -> None:
    """The archive was lost with its card, say, and the ring is whole."""
    with opened(tmp_path) as journal:
        for _ in range(20):
            journal.note("stored")
    count = len(list(read(tmp_path, SPOOL_KEY)))
    with opened(tmp_path, key=SecretKey(b"k" * 32)) as journal:
        assert journal.history is History.ANEW
    assert len(list(read(tmp_path / "aside-1", SPOOL_KEY))) == count


def test_what_is_put_aside_is_bounded(tmp_path: Path) -> None:
    for _ in range(ASIDES_MAX + 3):
        with opened(tmp_path) as journal:
            for _ in range(5):
                journal.note("stored")
        damage(tmp_path)
    with opened(tmp_path) as journal:
        assert journal.history is History.ANEW
    assert sorted(path.name for path in tmp_path.glob("aside-*")) == [f"aside-{number}" for number in range(4, 8)]
    assert next(read(tmp_path, SPOOL_KEY)).epoch == 8


@pytest.mark.parametrize("call", ["pwrite", "flush", "pread"])
def test_a_storage_that_fails_stops_no_upload(
    world: World, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(FileMedium, call, fails)
    if call == "pread":
        world.restart()
    world.terminal.sell(sale(1))
    world.work(minutes=3)
    assert sale(1).key in world.terminal.answers
    assert world.terminal.reports[-1].history is History.OFF
    assert world.terminal.reports[-1].head is None
    assert caplog.text.count("nothing more is recorded") == 1


# The two journals record each other's heads


def test_heads_go_both_ways(world: World) -> None:
    world.work()
    first = world.terminal.reports[-1]
    assert first.head is None  # nobody knows yet whether this store was put back
    world.work(minutes=2)
    report = world.terminal.reports[-1]
    assert report.head is not None
    assert report.terminal_head == world.terminal.chain.head
    (at,) = [record for record in world.records() if record.sequence == report.head.sequence]
    assert at.mac.hex() == report.head.mac
    assert world.terminal.chain.sync_head == report.head
    assert report.history is History.WHOLE


def test_only_what_is_durable_is_reported(world: World) -> None:
    world.work(minutes=2)
    known = world.terminal.chain.head
    world.clock.advance(TERMINAL_HEAD_EVERY_MS)
    world.terminal.chain.grow()
    world.rig.sync.fetch(wait_ms=0)
    report = world.rig.sync.report()
    assert report.terminal_head == known
    assert report.head is not None
    assert report.head.sequence < world.records()[-1].sequence
    world.work(minutes=1)
    report = world.rig.sync.report()
    assert report.terminal_head == world.terminal.chain.head
    assert report.head is not None
    assert report.head.sequence == world.records()[-1].sequence


def test_the_terminals_head_is_recorded_now_and_then_and_at_the_end(world: World) -> None:
    for _ in range(30):
        world.terminal.chain.grow()
        world.work()
    assert 3 <= len(world.said("terminal_head")) <= 4
    world.restart()
    assert world.said("terminal_head")[-1]["sequence"] == len(world.terminal.chain.macs)


def test_a_head_that_stands_still_is_recorded_once(world: World) -> None:
    world.work(minutes=60)
    world.restart()
    world.work(minutes=60)
    assert len(world.said("terminal_head")) == 1


def differs(world: World, caplog: pytest.LogCaptureFixture, what: str) -> None:
    """It was noticed: in the log once, in the trail once, in what the terminal is told."""
    caplog.set_level(logging.ERROR)
    world.work(minutes=20)
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "put back or exchanged" in errors[0].getMessage()
    assert len(world.said(what)) == 1
    assert world.terminal.reports[-1].history is History.DIFFERS


def all_well(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.work(minutes=20)
    assert "exchanged" not in caplog.text
    assert not world.said("terminal_differs") + world.said("sync_differs")
    assert world.history() is History.WHOLE


def test_a_terminal_store_that_was_put_back_is_noticed(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.terminal.chain.grow(10)
    world.work(minutes=3)
    world.restart()
    del world.terminal.chain.macs[-4:]
    differs(world, caplog, "terminal_differs")
    assert world.terminal.reports[-1].terminal_head is not None
    assert world.terminal.reports[-1].terminal_head.sequence == 15  # the proof stays


def test_it_is_noticed_even_when_the_store_has_grown_again(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Then only the terminal can tell, from the head that it is told."""
    world.work(minutes=3)
    world.restart()
    del world.terminal.chain.macs[-4:]
    world.terminal.chain.grow(50)
    differs(world, caplog, "terminal_differs")


def test_a_terminal_store_that_was_exchanged_is_noticed(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.work(minutes=3)
    world.restart()
    other = FakeChain(entropy=seeded(99))
    other.grow(len(world.terminal.chain.macs))
    world.terminal.chain.macs = other.macs
    differs(world, caplog, "terminal_differs")


def test_control_a_terminal_that_grows_or_begins_a_new_epoch_is_well(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.work(minutes=3)
    world.terminal.chain.grow(50)
    all_well(world, caplog)
    world.restart()
    world.terminal.chain.epoch, world.terminal.chain.macs = 2, []
    world.terminal.chain.grow(2)
    all_well(world, caplog)


@pytest.mark.parametrize("records_first", [False, True])
def test_a_sync_store_that_was_put_back_is_noticed(
    world: World, caplog: pytest.LogCaptureFixture, records_first: bool
) -> None:
    """Also with a terminal that forgets what it had seen as soon as it is told something new."""
    world.terminal.chain.records_first = records_first
    world.work(minutes=3)
    copy = world.rig.root / "copy"
    shutil.copytree(world.directory, copy)
    for number in range(1, 5):
        world.terminal.sell(sale(number))
        world.work(minutes=2)
    world.rig.close()
    shutil.rmtree(world.directory)
    shutil.copytree(copy, world.directory)
    world.rig._start()
    differs(world, caplog, "sync_differs")


def test_a_sync_store_that_was_exchanged_is_noticed(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.work(minutes=3)
    world.rig.close()
    shutil.rmtree(world.directory)
    with opened(world.directory, world.clock, seed=77) as journal:
        for _ in range(40):
            journal.note("stored")
    world.rig._start()
    differs(world, caplog, "sync_differs")


def test_a_sync_store_that_was_wiped_is_noticed(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.work(minutes=3)
    world.rig.close()
    shutil.rmtree(world.directory)
    world.rig._start()
    differs(world, caplog, "sync_differs")


def test_control_kills_and_restarts_are_well(world: World, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(1, 6):
        world.terminal.sell(sale(number))
        world.terminal.chain.grow(3)
        world.work(minutes=3)
        if number % 2:
            world.rig.crash()
        else:
            world.restart()
    all_well(world, caplog)


def test_control_a_ring_that_has_gone_round_is_well(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The head that the terminal has seen has long left the ring."""
    world.work(minutes=3)
    seen = world.terminal.chain.sync_head
    for _ in range(400):
        world.rig.journal.note("stored")
    world.restart()
    world.terminal.chain.sync_head = seen
    all_well(world, caplog)


def test_control_without_the_terminals_word_an_exchange_stays_unseen(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the other journal that gives it away, nothing in this one."""
    world.work(minutes=3)
    world.rig.close()
    shutil.rmtree(world.directory)
    world.terminal.chain.sync_head = None
    world.rig._start()
    all_well(world, caplog)


def test_a_journal_begun_anew_is_no_exchange(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.work(minutes=3)
    world.rig.close()
    damage(world.directory)
    world.rig._start()
    world.work(minutes=20)
    assert "exchanged" not in caplog.text
    assert world.history() is History.ANEW


def test_an_older_epoch_of_ours_is_noticed(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        journal.terminal_has_seen(Head(2, 1, "00" * 32), differs=False)
        assert journal.history is History.DIFFERS


def test_the_reader_says_so_when_what_it_reads_is_damaged(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        for _ in range(10):
            journal.note("stored")
    damage(tmp_path)
    with pytest.raises(LedgerError):
        list(read(tmp_path, SPOOL_KEY))


def test_heads_are_no_news(world: World) -> None:
    """Or each sale would make another report."""
    report = world.rig.sync.report()
    assert report == replace(report, head=Head(1, 9, "00" * 32), terminal_head=Head(1, 9, "00" * 32))
    assert report != replace(report, history=History.DIFFERS)

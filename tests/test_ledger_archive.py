"""The archive: what comes out is what went in, to the byte; and what is damaged, missing or swapped is named."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_rig import CHAIN, DATA, OTHER, event, fresh, journal
from ledger_rig import FixedClock, MemoryMedium, seeded

from terminal.ledger import archive as archive_module
from terminal.ledger.archive import RECORDS_MAX, Archive
from terminal.ledger.errors import DiskTrouble, KeyUnavailable, LedgerCorrupt
from terminal.ledger.journal import START, Journal, Position, Record, RecordType
from terminal.ledger.keys import Keyring

MINUTE_MS = 60_000


class UnsetClock(FixedClock):
    """A Pi's clock, which the network sets at some time or never."""

    is_set = True

    def synchronised(self) -> bool:
        return self.is_set


def archive(directory: Path, **changed: Keyring) -> Archive:
    return Archive(directory / "archive", changed.get("data", Keyring(DATA)), CHAIN, seeded(77))


def some(count: int, clock: FixedClock | None = None) -> tuple[MemoryMedium, Journal, list[Record]]:
    """Records of every kind, payloads of every size."""
    medium, written = fresh(3, slots=max(64, count + 8), clock=clock or FixedClock())
    chance = random.Random(5)
    records = list(written.audit())
    for number in range(count):
        payload = chance.randbytes(chance.choice((0, 0, 3, 900, 12_260)))
        type_ = chance.choice(list(RecordType)[:7])
        records.append(written.append(type_, {"what": "test", "n": number}, payload))
        written.flush()
    return medium, written, records


@pytest.mark.parametrize("sizes", [(41,), (1, 40), (13, 13, 15)])
def test_what_comes_out_is_what_went_in(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    _, _, records = some(40)
    kept = archive(tmp_path)
    assert (kept.last, kept.segments(), list(kept.replay())) == (None, [], [])
    rest = list(records)
    for size in sizes:
        segment = kept.append(rest[:size])
        assert (segment.first, segment.last) == (rest[0].sequence, rest[size - 1].sequence)
        del rest[:size]
    for reader in (kept, archive(tmp_path)):
        assert list(reader.replay()) == records
        assert reader.last == records[-1].position
        assert reader.verify() == len(records)
        for at in (0, 1, 12, 13, 30, 40):
            assert list(reader.replay(records[at].position)) == records[at + 1 :]
            assert list(reader.replay(reader.before_record(at + 1))) == records[at:]
    names = sorted(path.name for path in (tmp_path / "archive").iterdir())
    assert names == [segment.path.name for segment in kept.segments()]
    assert names[0].startswith("2026-09-000000000001-")


def test_archive_and_ring_are_one_chain(tmp_path: Path) -> None:
    """From which a ledger is rebuilt, wherever the ring has turned to."""
    medium, written = fresh(slots=30)
    kept = archive(tmp_path)
    records = list(written.audit())
    for number in range(100):
        records.append(event(written, number, b"payload" * (number % 4)))
        written.flush()
        if not written.free_slots:
            after = START if kept.last is None else kept.last
            kept.append([record for record in written.audit() if after.sequence < record.sequence][:20])
            assert kept.last is not None
            written.reclaim(kept.last.sequence)
    kept, reader = archive(tmp_path), journal(medium)
    assert kept.last is not None
    reader.reclaim(kept.last.sequence)
    assert [*kept.replay(), *reader.replay(kept.last, thorough=True)] == records


def test_erased_payloads_do_not_come_back(tmp_path: Path) -> None:
    _, written, records = some(30)
    gone = next(record.sequence for record in records if record.payload)
    written.erase(gone)
    event(written, 1)
    written.flush()
    found = list(written.audit())[:31]
    assert found[gone - 1].payload is None
    kept = archive(tmp_path)
    kept.append(found)
    assert list(kept.replay()) == found
    later = [record.sequence for record in found if record.payload][::2]
    before = kept.segments()[0]
    content = before.path.read_bytes()
    with before.path.open("rb") as held:
        kept.erase_payloads(later)
        assert not any(held.read())  # the blocks of the old file
    for reader in (kept, archive(tmp_path)):
        again = list(reader.replay())
        assert [record.trimmed for record in again] == [record.trimmed for record in found]
        assert [record.sequence for record in again if record.payload] == [
            record.sequence for record in found if record.payload and record.sequence not in later
        ]
        assert reader.verify() == 31
    written_once = before.path.read_bytes()
    assert written_once != content
    kept.erase_payloads([*later, 1000])
    assert before.path.read_bytes() == written_once
    assert sorted(path.name for path in before.path.parent.iterdir()) == [before.path.name]


@given(seed=st.integers(0, 2**32), what=st.sampled_from(["bit", "garbage", "zeros", "cut", "longer"]))
@settings(max_examples=60, deadline=None)
def test_damage_is_named(tmp_path_factory: pytest.TempPathFactory, seed: int, what: str) -> None:
    chance = random.Random(seed)
    place = tmp_path_factory.mktemp("damage")
    _, _, records = some(12)
    kept = archive(place)
    for begin in (0, 4, 8):
        kept.append(records[begin : begin + 4])
    hit = chance.choice(kept.segments())
    content = bytearray(hit.path.read_bytes())
    at = chance.randrange(len(content))
    match what:
        case "bit":
            content[at] ^= 1 << chance.randrange(8)
        case "garbage":
            at -= at % 4096
            content[at : at + 4096] = chance.randbytes(len(content[at : at + 4096]))
        case "zeros":
            at -= at % 4096
            content[at : at + 4096] = bytes(len(content[at : at + 4096]))
        case "cut":
            del content[at:]
        case _:
            content += b"\0"
    hit.path.write_bytes(content)
    reader = archive(place)
    found = []
    with pytest.raises(LedgerCorrupt, match=hit.path.name) as caught:
        found.extend(reader.replay())
    assert found == records[: hit.first - 1]
    assert caught.value.sequence == hit.first
    with pytest.raises(LedgerCorrupt, match=hit.path.name) as caught:
        reader.verify()
    others = [segment.path.name for segment in reader.segments() if segment.path != hit.path]
    assert not any(name in str(caught.value) for name in others)
    if hit.last == 12 and (what, at) == ("cut", 0):
        with pytest.raises(LedgerCorrupt, match=hit.path.name):
            _ = reader.last


def test_missing_swapped_and_foreign_segments_are_named(tmp_path: Path) -> None:
    _, _, records = some(12)
    kept = archive(tmp_path)
    one, two, three = (kept.append(records[begin : begin + 4]) for begin in (0, 4, 8))
    contents = [segment.path.read_bytes() for segment in (one, two, three)]
    two.path.unlink()
    with pytest.raises(LedgerCorrupt, match="no record 5"):
        list(archive(tmp_path).replay())
    with pytest.raises(LedgerCorrupt, match=three.path.name):
        archive(tmp_path).verify()
    with pytest.raises(LedgerCorrupt, match=two.path.name):
        list(kept.replay())  # gone while it runs
    two.path.write_bytes(contents[2])
    with pytest.raises(LedgerCorrupt, match=two.path.name):
        list(archive(tmp_path).replay())
    # The same numbers of another chain under the same keys.
    _, elsewhere = fresh(8, slots=64)
    strangers = [*elsewhere.audit(), *(event(elsewhere, number) for number in range(12))]
    other = archive(tmp_path / "other")
    other.append(strangers[:4])
    foreign = other.append(strangers[4:8])
    two.path.write_bytes(foreign.path.read_bytes())
    with pytest.raises(LedgerCorrupt, match="no record 5"):
        list(archive(tmp_path).replay())
    with pytest.raises(LedgerCorrupt, match=two.path.name):
        archive(tmp_path).verify()
    two.path.write_bytes(contents[1])
    assert archive(tmp_path).verify() == 12
    one.path.unlink()
    with pytest.raises(LedgerCorrupt, match="no record 1"):
        list(archive(tmp_path).replay())


def test_only_what_continues_is_taken(tmp_path: Path) -> None:
    _, _, records = some(10)
    kept = archive(tmp_path)
    with pytest.raises(LedgerCorrupt, match="record 2"):
        kept.append(records[1:4])
    kept.append(records[:4])
    for wrong in (records[:4], records[5:], [records[4], records[6]]):
        with pytest.raises(LedgerCorrupt, match="does not continue"):
            kept.append(wrong)
    with pytest.raises(ValueError, match="one month"):
        kept.append([])
    assert kept.verify() == 4
    assert RECORDS_MAX >= 2048


def test_a_segment_never_spans_two_months(tmp_path: Path) -> None:
    clock = FixedClock()
    clock.now_ms = int(datetime(2026, 9, 30, 23, 59, 59, 999000, UTC).timestamp() * 1000)
    _, written = fresh(clock=clock)
    records = list(written.audit())
    clock.now_ms += 1
    records.append(event(written, 1))
    kept = archive(tmp_path)
    with pytest.raises(ValueError, match="one month"):
        kept.append(records)
    months = [kept.append([record]).month for record in records]
    assert months == ["2026-09", "2026-10"]


def test_a_restored_chain_goes_on_in_a_new_archive(tmp_path: Path) -> None:
    _, _, records = some(10)
    kept = archive(tmp_path)
    kept.begin(records[4].position)
    assert archive(tmp_path).last == records[4].position
    kept.append(records[5:])
    assert list(archive(tmp_path).replay()) == records[5:]
    with pytest.raises(ValueError, match="once"):
        kept.begin(records[0].position)
    note = tmp_path / "archive" / "floor"
    content = bytearray(note.read_bytes())
    content[10] ^= 1
    note.write_bytes(content)
    assert archive(tmp_path).before == records[4].position  # the oldest segment knows it, too
    assert archive(tmp_path).last == records[-1].position
    note.write_bytes(content)
    kept.segments()[0].path.unlink()
    with pytest.raises(LedgerCorrupt, match="floor"):
        archive(tmp_path).segments()


# Segments, as (minutes since the beginning, synchronised) of three records each; how many may go that end before 100.
HISTORIES = {
    "old ones go, the newest stays": ([[(1, True)] * 3, [(2, True)] * 3, [(3, True)] * 3], 2),
    "up to the first that is young": ([[(1, True)] * 3, [(101, True)] * 3, [(3, True)] * 3, [(4, True)] * 3], 1),
    "a young record anywhere keeps its segment": ([[(1, True), (101, True), (2, True)], [(3, True)] * 3], 0),
    "an unset clock says nothing": ([[(1, False)] * 3, [(2, False)] * 3], 0),
    "but whoever comes after with a set one does": ([[(1, False)] * 3, [(2, False), (3, True), (4, True)]], 1),
    "unless that is young": ([[(1, False)] * 3, [(2, False), (103, True), (4, True)]], 0),
    "an end with an unset clock may be young": ([[(1, True), (1, True), (1, False)], [(2, False)] * 3], 0),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_only_what_is_surely_old_is_dropped(tmp_path: Path, name: str) -> None:
    history, expected = HISTORIES[name]
    clock = UnsetClock()
    begin_ms = clock.now_ms
    written = journal(MemoryMedium(64 * 16384), clock=clock)
    kept, records = archive(tmp_path), []
    for segment in history:
        for minute, is_set in segment:
            clock.now_ms, clock.is_set = begin_ms + minute * MINUTE_MS, is_set
            records.append(event(written, len(records)) if records else written.begin())
        kept.append(records[-3:])
    before = kept.segments()
    dropped = kept.drop_before(begin_ms + 100 * MINUTE_MS)
    assert dropped == before[:expected]
    assert all(record.sequence > 3 * expected for record in kept.replay())
    left = [segment.path for segment in before[len(dropped) :]]
    assert sorted(left) == sorted((tmp_path / "archive").glob("*.segment"))
    for reader in (kept, archive(tmp_path)):
        assert list(reader.replay()) == [record for record in records if record.sequence >= before[len(dropped)].first]
        assert reader.verify() == len(records) - before[len(dropped)].first + 1
        assert reader.last == records[-1].position
    assert kept.drop_before(begin_ms + 100 * MINUTE_MS) == []


def test_a_segment_that_was_not_dropped_but_is_gone_is_named(tmp_path: Path) -> None:
    """Control of the note that says what was dropped."""
    _, _, records = some(12)
    kept = archive(tmp_path)
    segments = [kept.append(records[begin : begin + 4]) for begin in (0, 4, 8)]
    assert len(kept.drop_before(records[-1].wall_ms + 1)) == 2
    assert list(archive(tmp_path).replay()) == records[8:12]
    (tmp_path / "archive" / "floor").unlink()
    with pytest.raises(LedgerCorrupt, match="no record 1"):
        list(archive(tmp_path).replay())
    assert not segments[0].path.exists()


class Cut(Exception):
    """Power fails here."""


@pytest.mark.parametrize("after", range(9))
@pytest.mark.parametrize("action", ["append", "erase", "drop"])
def test_cut_off_anywhere_it_is_as_before_or_as_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, action: str
) -> None:
    _, _, records = some(12)
    kept = archive(tmp_path)
    for begin in (0, 4):
        kept.append(records[begin : begin + 4])
    left = after

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if not left:
                raise Cut
            left -= 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(archive_module.os, "fsync", counted(os.fsync))
        for name in ("rename", "replace", "unlink"):
            patched.setattr(Path, name, counted(getattr(Path, name)))
        try:
            match action:
                case "append":
                    kept.append(records[8:])
                case "erase":
                    kept.erase_payloads(range(1, 9))
                case _:
                    kept.drop_before(records[-1].wall_ms + 1)
            cut = False
        except Cut:
            cut = True
    reader = archive(tmp_path)
    found = list(reader.replay())
    match action:
        case "append":
            assert found in ([*records[:8]], records)
            if found != records:
                assert cut
                reader.append(records[8:])
            assert list(reader.replay()) == records
        case "erase":
            assert [record.trimmed for record in found] == [record.trimmed for record in records[:8]]
            reader.erase_payloads(range(1, 9))
            assert not any(record.payload for record in reader.replay())
        case _:
            assert found in (records[:8], records[4:8])
            reader.drop_before(records[-1].wall_ms + 1)
            assert list(reader.replay()) == records[4:8]
    assert [path for path in (tmp_path / "archive").iterdir() if path.suffix == ".new"] == []


@pytest.mark.parametrize("what", ["MAC", "last record"])
def test_what_does_not_read_back_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    _, _, records = some(8)
    kept = archive(tmp_path)
    entry = archive_module.Archive._entry

    def bent(self: Archive, record: Record) -> bytes:
        right = entry(self, record)
        if record is not records[-1]:
            return right
        return right.replace(record.mac, bytes(32)) if what == "MAC" else b""

    with monkeypatch.context() as patched:
        patched.setattr(archive_module.Archive, "_entry", bent)
        with pytest.raises(LedgerCorrupt, match="chain key" if what == "MAC" else "fewer"):
            kept.append(records)
    assert list((tmp_path / "archive").iterdir()) == []
    kept.append(records)
    assert kept.verify() == 9


def test_a_new_name_is_made_durable_before_anybody_relies_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, records = some(8)
    names: list[list[str]] = []
    sync = archive_module.sync_directory

    def seen(directory: Path) -> None:
        names.append(sorted(path.name for path in directory.iterdir()))
        sync(directory)

    monkeypatch.setattr(archive_module, "sync_directory", seen)
    kept = archive(tmp_path)
    one, two = kept.append(records[:4]), kept.append(records[4:])
    assert names[-1] == [one.path.name, two.path.name]
    kept.erase_payloads(range(9))
    kept.drop_before(records[-1].wall_ms + 1)
    assert names[-1] == [two.path.name, "floor"]
    assert len(names) >= 5


def test_a_full_disk_is_disk_trouble_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, records = some(8)
    kept = archive(tmp_path)
    kept.append(records[:4])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(archive_module.os, "fsync", full)
        with pytest.raises(DiskTrouble, match="No space"):
            kept.append(records[4:])
    assert kept.last == records[3].position
    kept.append(records[4:])
    assert list(kept.replay()) == records


def test_a_retired_key_still_opens_and_without_it_nothing_is_guessed(tmp_path: Path) -> None:
    _, _, records = some(8)
    archive(tmp_path).append(records[:4])
    rotated = archive(tmp_path, data=Keyring(OTHER, (DATA,)))
    rotated.append(records[4:])
    assert list(rotated.replay()) == records
    assert rotated.sealed_under() == {DATA.id: 10, OTHER.id: 1}  # nine records and two segments
    with pytest.raises(KeyUnavailable, match=DATA.id.hex()):
        list(archive(tmp_path, data=Keyring(OTHER)).replay())


def test_nothing_can_be_read_from_the_files(tmp_path: Path) -> None:
    _, written = fresh()
    record = written.append(RecordType.OUTCOME, {"reference": "table seven"}, b"last4 7899")
    kept = archive(tmp_path)
    segment = kept.append([*written.audit()])
    content = segment.path.read_bytes()
    assert (segment.path.stat().st_mode & 0o777, segment.path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    for secret in (b"table", b"7899", record.trimmed[140:160], DATA.material, CHAIN.material):
        assert secret not in content


def test_sales_compress(tmp_path: Path) -> None:
    """Sealed records would not: that is why they are opened first."""
    written = journal(MemoryMedium(1200 * 16384))
    records = [written.begin()]
    for number in range(1000):
        body = {"transaction": f"{number:032x}", "amount": 1250, "currency": "EUR", "kind": "sale", "reference": None}
        records.append(
            written.append(RecordType.OUTCOME, body, b'{"scheme":"visa","label":"TEST DEBIT","last4":"7899"}')
        )
    segment = archive(tmp_path).append(records)
    sealed = sum(len(record.trimmed) + len(record.payload or b"") for record in records)
    assert segment.size_bytes < sealed / 3
    assert Position(1001, records[-1].mac) == archive(tmp_path).last

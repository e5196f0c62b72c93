"""What a damaged database still gives: every record whose pages are whole, and never an error."""

from __future__ import annotations

import random
import shutil
from contextlib import closing
from pathlib import Path

import pytest
from store_rig import Tape, copied, open_store, sold

from terminal.ledger.salvage import Salvage

PAGE_BYTES = 4096


@pytest.fixture
def tape() -> Tape:
    tape = Tape()
    for _ in range(12):
        sold(tape)
    return tape


@pytest.fixture
def damaged(tmp_path: Path, tape: Tape) -> Path:
    """Not damaged yet; as it is moved aside, closed cleanly."""
    (tmp_path / "state").mkdir()
    path = tmp_path / "state" / "ledger.db"
    with closing(open_store(path)) as store:
        store.apply(tape.records)
    return path.rename(path.with_name("ledger.db.damaged-1"))


def found(path: Path, tape: Tape) -> int:
    """How many records are there; each must be the very one that was written, or not there."""
    count = 0
    with Salvage(path) as salvage:
        for record in tape.records:
            copy = salvage.record(record.sequence)
            if copy is not None and copy[0] == record.trimmed:
                count += 1
    return count


def test_a_whole_database_gives_all_and_is_left_as_it_was(damaged: Path, tape: Tape) -> None:
    before = damaged.read_bytes()
    assert found(damaged, tape) == len(tape.records)
    with Salvage(damaged) as salvage:
        assert salvage.record(4711) is None
        answered = salvage.record(2)
    assert answered is not None
    assert answered[1] is None  # its payload was erased with the answer
    assert damaged.read_bytes() == before


def test_records_that_are_only_in_the_log_are_found(tmp_path: Path, tape: Tape) -> None:
    (tmp_path / "state").mkdir()
    path = tmp_path / "state" / "ledger.db"
    with closing(open_store(path)) as store:
        store.size_log(4 * 1024 * 1024)
        store.apply(tape.records)
        left = copied(path, tmp_path / "left")  # a power cut, then moved aside with its log
    assert found(left, tape) == len(tape.records)
    shutil.rmtree(tmp_path / "state")
    left.with_name("ledger.db-wal").unlink()
    assert found(left, tape) == 0  # control: they were nowhere else


def test_damage_costs_the_records_it_hits(damaged: Path, tape: Tape) -> None:
    content = damaged.read_bytes()
    chance = random.Random(3)
    pages = len(content) // PAGE_BYTES
    counts = []
    for page in range(1, pages):
        damaged.write_bytes(
            content[: page * PAGE_BYTES] + chance.randbytes(PAGE_BYTES) + content[(page + 1) * PAGE_BYTES :]
        )
        counts.append(found(damaged, tape))
    assert max(counts) == len(tape.records)  # a page of another table
    assert min(counts) < len(tape.records)  # control: some pages hold records
    assert sum(count >= len(tape.records) - 12 for count in counts) >= len(counts) - 3  # a page holds some ten


@pytest.mark.parametrize("how", ["missing", "empty", "nonsense", "header", "truncated", "schema", "types"])
def test_nothing_in_it_raises(damaged: Path, tape: Tape, how: str) -> None:
    content = damaged.read_bytes()
    chance = random.Random(5)
    match how:
        case "missing":
            damaged.unlink()
        case "empty":
            damaged.write_bytes(b"")
        case "nonsense":
            damaged.write_bytes(chance.randbytes(len(content)))
        case "header":
            damaged.write_bytes(bytes(100) + content[100:])
        case "truncated":
            damaged.write_bytes(content[: len(content) // 2])
        case "schema":
            damaged.write_bytes(content[:100] + chance.randbytes(PAGE_BYTES - 100) + content[PAGE_BYTES:])
        case _:
            flipped = bytearray(content)
            for _ in range(200):
                flipped[chance.randrange(PAGE_BYTES, len(flipped))] ^= 1 << chance.randrange(8)
            damaged.write_bytes(bytes(flipped))
    assert found(damaged, tape) <= len(tape.records)
    assert damaged.exists() == (how != "missing")


def test_a_log_that_is_damaged_does_not_hide_the_file(damaged: Path, tape: Tape) -> None:
    damaged.with_name(damaged.name + "-wal").write_bytes(random.Random(1).randbytes(100_000))
    assert found(damaged, tape) == len(tape.records)

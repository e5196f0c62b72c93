"""The journal: chained, sealed, and able to tell its end from damage.

The media here lose power: what was flushed stays, of the rest any part.
"""

from __future__ import annotations

import random
from typing import Any
from uuid import UUID

import pytest
from ledger_rig import FixedClock, MemoryMedium, seeded

from terminal.ledger.errors import JournalFull, KeyUnavailable, LedgerCorrupt
from terminal.ledger.journal import (
    BODY_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    SLOT_BYTES,
    START,
    UNFLUSHED_MAX,
    Journal,
    Position,
    Record,
    RecordType,
    untrim,
)
from terminal.ledger.keys import SecretKey

DATA, CHAIN, OTHER = (SecretKey(seeded(seed)(32)) for seed in (1, 2, 3))
SLOTS = 24


def journal(medium: MemoryMedium, seed: int = 0, **changed: Any) -> Journal:
    settings: dict[str, Any] = {
        "data": DATA,
        "chain": CHAIN,
        "epoch": 1,
        "clock": FixedClock(),
        "entropy": seeded(seed),
    }
    return Journal(medium, **(settings | changed))


def fresh(seed: int = 0) -> tuple[MemoryMedium, Journal]:
    medium = MemoryMedium(SLOTS * SLOT_BYTES)
    written = journal(medium, seed)
    assert not written.identify()
    written.begin()
    return medium, written


def event(written: Journal, number: int, payload: bytes = b"") -> Record:
    return written.append(RecordType.EVENT, {"what": "test", "n": number}, payload)


def numbers(medium: MemoryMedium, start: Position = START, **options: Any) -> list[int]:
    return [record.body.get("n", 0) for record in journal(medium).replay(start, **options)]


def test_round_trip() -> None:
    medium, written = fresh()
    record = event(written, 1, b"payload")
    written.flush()
    reader = journal(medium)
    assert reader.identify()
    first, read = reader.replay(START)
    assert first.type is RecordType.CHECKPOINT
    assert read == record
    assert (read.sequence, read.epoch, read.boot_id, read.synchronised) == (2, 1, UUID(int=7), True)
    assert read.payload is not None
    assert reader.open_payload(read.trimmed, read.payload) == b"payload"
    block = untrim(read.trimmed)
    assert medium.pread(4096, SLOT_BYTES) == block
    assert reader.last == written.last


def test_layout_is_as_documented() -> None:
    """Offsets of docs/formats.md, read without the code under test."""
    medium, written = fresh()
    event(written, 1)
    event(written, 2, b"x" * 5)
    block = medium.pread(4096, 2 * SLOT_BYTES)
    assert block[0:4] == b"PTJ1"
    assert list(block[4:8]) == [1, 7, 0, 1]
    assert int.from_bytes(block[8:12], "big") == 1
    assert block[12:16] == DATA.id
    assert int.from_bytes(block[16:24], "big") == 3
    assert int.from_bytes(block[58:60], "big") == 5 + 12 + 16
    assert int.from_bytes(block[60:64], "big") == 1  # the first event was not flushed yet
    assert block[96:128] == medium.pread(4096, SLOT_BYTES)[-32:]


def test_a_scan_starts_where_it_is_told() -> None:
    medium, written = fresh()
    places = [event(written, number).position for number in range(1, 6)]
    written.flush()
    assert numbers(medium, places[2]) == [4, 5]
    assert numbers(medium, places[4]) == []


@pytest.mark.parametrize("seed", range(40))
def test_a_power_cut_keeps_what_was_flushed_and_nothing_disturbs_the_end(seed: int) -> None:
    chance = random.Random(seed)
    medium, written = fresh(seed)
    flushed = event(written, 1, b"sealed" * 900)
    written.flush()
    for number in range(2, 2 + chance.randrange(1, 6)):
        event(written, number, chance.choice((b"", b"sealed" * 900)))
    medium = medium.power_cut(chance)
    found = numbers(medium, thorough=True)
    assert found[:2] == [0, 1], f"seed {seed}"
    assert found == list(range(len(found))), f"seed {seed}"
    # Life goes on over the leftovers, twice.
    for restart in (100, 200):
        reader = journal(medium, seed + restart)
        before = [record.body.get("n", 0) for record in reader.replay(flushed.position)]
        event(reader, restart)
        reader.flush()
        event(reader, restart + 1)
        medium = medium.power_cut(chance)
        after = numbers(medium, thorough=True)
        assert after[: 3 + len(before)] == [0, 1, *before, restart], f"seed {seed}"


def test_a_medium_that_does_not_flush_is_found_out() -> None:
    """Control: the test above can fail."""
    medium, written = fresh()
    medium.flush = lambda: None  # type: ignore[method-assign]
    event(written, 1)
    written.flush()
    found = [numbers(medium.power_cut(random.Random(seed)), thorough=True) for seed in range(20)]
    assert [0] in found


def test_every_flipped_bit_in_a_flushed_record_is_named() -> None:
    medium, written = fresh()
    middle = event(written, 1)
    written.flush()
    event(written, 2)
    written.flush()
    chance = random.Random(11)
    used = len(middle.trimmed) - 32
    bits = [*range(64), *range(used * 8 - 16, used * 8 + 16), *(chance.randrange(4096 * 8) for _ in range(150))]
    for bit in bits:
        at = SLOT_BYTES + bit // 8
        medium.now[at] ^= 1 << bit % 8
        with pytest.raises(LedgerCorrupt) as caught:
            numbers(medium)
        assert caught.value.sequence == 2, f"bit {bit}"
        medium.now[at] ^= 1 << bit % 8
    assert numbers(medium) == [0, 1, 2]


def test_a_destroyed_page_is_damage_not_the_end() -> None:
    medium, written = fresh()
    for number in range(1, 6):
        event(written, number)
        written.flush()
    medium.now[2 * SLOT_BYTES : 4 * SLOT_BYTES] = bytes(2 * SLOT_BYTES)
    with pytest.raises(LedgerCorrupt, match="record 3"):
        numbers(medium, thorough=True)


def test_the_position_vouches_for_the_last_record() -> None:
    medium, written = fresh()
    last = event(written, 1)
    written.flush()
    medium.now[SLOT_BYTES + 300] ^= 1
    assert numbers(medium) == [0]  # nobody else knows of it
    with pytest.raises(LedgerCorrupt, match="record 2"):
        numbers(medium, last.position)


def test_a_record_of_another_chain_does_not_fit() -> None:
    medium, written = fresh(1)
    other, elsewhere = fresh(2)
    for one in (written, elsewhere):
        event(one, 1)
        event(one, 2)
        one.flush()
        event(one, 3)
    medium.now[2 * SLOT_BYTES : 3 * SLOT_BYTES] = other.now[2 * SLOT_BYTES : 3 * SLOT_BYTES]
    with pytest.raises(LedgerCorrupt, match="record 3"):
        numbers(medium)


def test_erased_is_not_torn() -> None:
    medium, written = fresh()
    card = event(written, 1, b"card data" * 500)
    written.flush()
    before = medium.pread(SLOT_BYTES, SLOT_BYTES)
    event(written, 2)
    written.erase(card.sequence)
    written.flush()
    assert not any(medium.pread(SLOT_BYTES - 4096, SLOT_BYTES + 4096))
    assert [record.payload for record in journal(medium).replay(START)] == [None, None, None]
    # The same zeros, but nobody vouches for the record: the write was cut off.
    medium.now[2 * SLOT_BYTES :] = bytes(len(medium.now) - 2 * SLOT_BYTES)
    assert numbers(medium, thorough=True) == [0]
    medium.now[SLOT_BYTES : 2 * SLOT_BYTES] = before
    assert numbers(medium, thorough=True) == [0, 1]


def test_leftovers_are_cleared() -> None:
    medium, written = fresh()
    event(written, 1)
    event(written, 2, b"card data")
    medium.now[SLOT_BYTES : 2 * SLOT_BYTES] = bytes(SLOT_BYTES)
    reader = journal(medium)
    assert len(list(reader.replay(START))) == 1
    reader.clear_beyond()
    assert not any(medium.now[SLOT_BYTES:])


@pytest.mark.parametrize("changed", [{"data": OTHER}, {"chain": OTHER}, {"data": OTHER, "chain": OTHER}])
def test_other_keys_are_told_from_damage(changed: dict[str, SecretKey]) -> None:
    medium, written = fresh()
    event(written, 1)
    with pytest.raises(KeyUnavailable, match="another"):
        journal(medium, **changed).identify()
    medium.now[200] ^= 1
    if "chain" not in changed:
        assert journal(medium).identify()
    with pytest.raises(LedgerCorrupt, match="record 1"):
        journal(medium, seed=1).identify()
        numbers(medium)


def test_a_full_journal_says_so() -> None:
    _, written = fresh()
    for number in range(1, SLOTS):
        event(written, number)
    with pytest.raises(JournalFull, match="24 slots"):
        event(written, SLOTS)


def test_the_unflushed_window_is_bounded() -> None:
    medium = MemoryMedium((UNFLUSHED_MAX + 8) * SLOT_BYTES)
    written = journal(medium)
    written.begin()
    for number in range(UNFLUSHED_MAX):
        event(written, number)
    assert medium.flushes == 1
    event(written, UNFLUSHED_MAX)
    assert medium.flushes == 2


def test_limits_of_a_record() -> None:
    _, written = fresh()
    with pytest.raises(ValueError, match=str(PAYLOAD_BYTES_MAX)):
        event(written, 1, b"x" * (PAYLOAD_BYTES_MAX + 1))
    with pytest.raises(ValueError, match=str(BODY_BYTES_MAX)):
        written.append(RecordType.EVENT, {"what": "x" * BODY_BYTES_MAX})
    event(written, 1, b"x" * PAYLOAD_BYTES_MAX)
    assert [record.sequence for record in written.audit()] == [1, 2]


def test_a_scan_reads_used_blocks_only() -> None:
    medium, written = fresh()
    for number in range(1, 11):
        event(written, number)
    written.flush()
    reads: list[int] = []
    pread = medium.pread
    medium.pread = lambda size, offset: reads.append(size) or pread(size, offset)  # type: ignore[func-returns-value,method-assign]
    assert len(numbers(medium)) == 11
    assert set(reads) == {4096}
    assert len(reads) <= SLOTS

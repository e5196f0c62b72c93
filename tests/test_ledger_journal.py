"""The journal: a ring, chained and sealed, able to tell its end from damage and to mend that from another copy.

The media here lose power: what was flushed stays, of the rest any part.
"""

from __future__ import annotations

import random
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from journal_rig import DATA, OTHER, SLOTS, Copied, GarblingMedium, event, fresh, journal
from ledger_rig import MemoryMedium, seeded

from terminal.ledger.errors import DiskTrouble, JournalFull, KeyUnavailable, LedgerCorrupt
from terminal.ledger.journal import (
    BLOCK_BYTES,
    BODY_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    SLOT_BYTES,
    START,
    UNFLUSHED_MAX,
    Journal,
    Position,
    Record,
    RecordCodec,
    RecordType,
    untrim,
)
from terminal.ledger.keys import Keyring


def numbers(medium: MemoryMedium, start: Position | None = START, **options: Any) -> list[int]:
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


@pytest.mark.parametrize(
    "changed", [{"data": Keyring(OTHER)}, {"chain": OTHER}, {"data": Keyring(OTHER), "chain": OTHER}]
)
def test_other_keys_are_told_from_damage(changed: dict[str, Any]) -> None:
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
    medium = MemoryMedium(2 * UNFLUSHED_MAX * SLOT_BYTES)
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
    assert len(reads) <= SLOTS + 1


def turned(medium: MemoryMedium, written: Journal, count: int) -> list[Record]:
    """Appends with the ring reclaimed right behind; each record flushed."""
    records = []
    for number in range(1, count + 1):
        if not written.free_slots:
            written.reclaim(written.first)
        records.append(event(written, number, b"payload" * (number % 5)))
        written.flush()
    return records


def test_a_ring_uses_reclaimed_slots_again_and_no_others() -> None:
    medium, written = fresh()
    records = turned(medium, written, 3 * SLOTS)
    assert written.last.sequence == 3 * SLOTS + 1
    assert (written.first, written.free_slots) == (2 * SLOTS + 2, 0)
    with pytest.raises(JournalFull):
        event(written, 0)
    reader = journal(medium)
    assert reader.identify()
    assert list(reader.replay(None)) == records[-SLOTS:]
    assert (reader.first, reader.last, reader.free_slots) == (2 * SLOTS + 2, written.last, 0)
    reader.reclaim(2 * SLOTS + 5)
    assert reader.free_slots == 4
    reader.reclaim(1)
    assert reader.free_slots == 4
    event(reader, 7)
    assert reader.first == 2 * SLOTS + 3
    assert [record.sequence for record in reader.audit()][:: SLOTS - 1] == [2 * SLOTS + 3, 3 * SLOTS + 2]


def test_nothing_of_an_older_record_stays_in_a_slot_that_is_used_again() -> None:
    medium, written = fresh()
    event(written, 1, b"card data" * 1000)
    turned(medium, written, SLOTS)
    assert written.last.sequence == SLOTS + 2
    assert not any(medium.pread(2 * BLOCK_BYTES, SLOT_BYTES + 2 * BLOCK_BYTES))


def test_a_replay_goes_on_where_the_archive_ends_even_if_that_record_is_overwritten() -> None:
    medium, written = fresh()
    records = turned(medium, written, 2 * SLOTS)
    at = records[SLOTS - 1]  # the next one is the oldest in the ring
    reader = journal(medium)
    reader.reclaim(at.sequence)
    assert list(reader.replay(at.position, thorough=True)) == records[SLOTS:]
    with pytest.raises(LedgerCorrupt, match=f"record {at.sequence}"):
        list(journal(medium).replay(at.position, thorough=True))  # nobody said that it may be gone
    earlier = records[SLOTS - 2]
    reader = journal(medium)
    reader.reclaim(earlier.sequence)
    with pytest.raises(LedgerCorrupt, match=f"record {at.sequence}"):
        list(reader.replay(earlier.position, thorough=True))  # a record between archive and ring is missing


@pytest.mark.parametrize("seed", range(30))
def test_a_power_cut_while_slots_are_used_again(seed: int) -> None:
    chance = random.Random(seed)
    medium, written = fresh(seed, slots=40)
    records = turned(medium, written, 60)
    written.reclaim(50)
    flushed = written.last
    for number in range(chance.randrange(1, 20)):
        event(written, 100 + number, b"sealed" * chance.choice((0, 900)))
    medium = medium.power_cut(chance)
    reader = journal(medium, seed + 1000)
    reader.reclaim(50)
    assert reader.identify()
    found = list(reader.replay(None))
    assert found[0].sequence <= 51
    kept = [record for record in records if record.sequence >= found[0].sequence]
    assert [record.trimmed for record in found[: len(kept)]] == [record.trimmed for record in kept], f"seed {seed}"
    assert [record for record in found if 50 < record.sequence <= flushed.sequence] == records[49:], f"seed {seed}"
    assert reader.lost_payloads == []  # of what is reclaimed nothing can be lost
    reader.clear_beyond()
    for sequence in range(51, flushed.sequence + 1):
        assert untrim(records[sequence - 2].trimmed) == medium.pread(BLOCK_BYTES, (sequence - 1) % 40 * SLOT_BYTES)
    # What is left of a record that was never flushed is gone: everything on the medium belongs to a record in its slot.
    for slot in range(40):
        block, payload = medium.pread(BLOCK_BYTES, slot * SLOT_BYTES), medium.pread(12288, slot * SLOT_BYTES + 4096)
        if any(payload):
            assert any(untrim(record.trimmed) == block and record.payload for record in (*records, *found)), f"{slot}"
    event(reader, 999)
    reader.flush()
    assert [record.sequence for record in reader.audit()][-1] == found[-1].sequence + 1


def test_content_is_the_plaintext_of_outcome_and_answer() -> None:
    medium, written = fresh()
    outcome = written.append(RecordType.OUTCOME, {"a": 1}, b"summary")
    answer = written.append(RecordType.ANSWER, {"a": 1}, b"jws")
    card = written.append(RecordType.CARD, {"a": 1}, b"envelope")
    written.flush()
    assert [outcome.content, answer.content, card.content] == [b"summary", b"jws", None]
    assert list(journal(medium).replay(START))[1:] == [outcome, answer, card]
    written.erase(outcome.sequence)
    written.flush()
    event(written, 1)  # vouches for what is before
    assert [record.content for record in journal(medium).replay(START)] == [None, None, b"jws", None, None]
    assert "summary" not in repr(outcome)


def test_records_under_a_retired_key_are_read_and_new_ones_take_the_current() -> None:
    medium, written = fresh()
    event(written, 1, b"payload")
    written.flush()
    rotated = journal(medium, 1, data=Keyring(OTHER, (DATA,)))
    assert rotated.identify()
    assert len(list(rotated.replay(START))) == 2
    event(rotated, 2, b"payload")
    rotated.flush()
    assert rotated.sealed_under() == {DATA.id: 2, OTHER.id: 1}
    assert [record.sequence for record in journal(medium, data=Keyring(OTHER, (DATA,))).replay(START)] == [1, 2, 3]
    for forgotten in (Keyring(OTHER), Keyring(DATA)):
        with pytest.raises(KeyUnavailable, match="data-key"):
            journal(medium, data=forgotten).identify()


def test_an_epoch_continues_a_restored_chain() -> None:
    medium, written = fresh()
    last = turned(medium, written, 30)[-1]
    other = MemoryMedium(SLOTS * SLOT_BYTES)
    said = {"epoch": 1, "sequence": last.sequence, "mac": last.mac.hex()}
    restored = journal(other, 5, epoch=2)
    assert not restored.identify()
    first = restored.begin(last.position, said)
    assert (first.sequence, first.epoch, first.previous_mac) == (last.sequence + 1, 2, last.mac)
    assert first.body["epoch_of"] == said
    more = event(restored, 1)
    restored.flush()
    assert (restored.first, restored.free_slots) == (last.sequence + 1, SLOTS - 2)
    for start in (None, last.position):
        reader = journal(other)
        reader.reclaim(last.sequence)
        assert reader.identify()
        assert reader.epoch == 2
        assert list(reader.replay(start)) == [first, more]
    assert list(reader.audit()) == [first, more]
    # A new epoch in the same ring.
    again = journal(other, 6, epoch=3)
    again.reclaim(last.sequence)
    assert again.identify()
    list(again.replay(None))
    assert again.epoch == 2
    third = again.begin(again.last)
    assert [record.epoch for record in journal(other).replay(None)] == [2, 2, 3]
    assert third.previous_mac == more.mac


def test_a_first_record_that_was_cut_off_has_begun_nothing() -> None:
    medium, _ = fresh()
    for keep_bytes in (512, 1024, 3584):
        medium.now[keep_bytes:SLOT_BYTES] = bytes(SLOT_BYTES - keep_bytes)
        written = journal(medium, 9)
        assert not written.identify()
        written.begin()
        assert journal(medium).identify()


def damaged(medium: MemoryMedium, offset: int, size_bytes: int, filling: str, chance: random.Random) -> bytes:
    """Destroy a stretch; what was there."""
    before = medium.pread(size_bytes, offset)
    match filling:
        case "zeros":
            content = bytes(size_bytes)
        case "garbage":
            content = chance.randbytes(size_bytes)
        case _:
            flipped = bytearray(before)
            flipped[chance.randrange(size_bytes)] ^= 1 << chance.randrange(8)
            content = bytes(flipped)
    medium.now[offset : offset + size_bytes] = content
    return before


@given(
    slot=st.integers(0, SLOTS - 1),
    place=st.sampled_from([(0, 4096), (4096, 4096), (0, 16384), (8192, 4096)]),
    filling=st.sampled_from(["zeros", "garbage", "bit"]),
    has_copy=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_what_is_destroyed_is_mended_or_named(
    slot: int, place: tuple[int, int], filling: str, has_copy: bool, seed: int
) -> None:
    """One stretch of a ring that has turned; then replay, audit and erase must be right or say so."""
    chance = random.Random(seed)
    medium, written = fresh(seed % 7)
    records = turned(medium, written, 2 * SLOTS)[SLOTS:]
    expected = {record.sequence: record for record in records}
    hit = next(sequence for sequence in expected if (sequence - 1) % SLOTS == slot)
    offset, size_bytes = place
    before = damaged(medium, slot * SLOT_BYTES + offset, size_bytes, filling, chance)
    harmless = medium.pread(size_bytes, slot * SLOT_BYTES + offset) == before
    reader = journal(medium, copies=Copied(records) if has_copy else None)
    reader.reclaim(hit - 1)
    last = records[-1].position
    try:
        assert list(reader.replay(last)) == []
        found = list(reader.audit())
    except LedgerCorrupt as error:
        assert not has_copy
        assert error.sequence == hit
        assert offset == 0
        return
    assert [record.sequence for record in found] == sorted(expected)
    for record in found:
        whole = expected[record.sequence]
        if record == whole:
            continue
        assert record.sequence == hit
        assert not has_copy
        assert replaced_payload(record, whole)
        # Zeros are what an erasure leaves; anything else is named.
        assert filling == "zeros" or reader.lost_payloads == [hit]
    if has_copy and not harmless:
        stored = expected[hit].payload
        touched = offset == 0 or (stored is not None and offset - 4096 < len(stored))
        assert reader.restored == ([hit] if touched and reader.restored else [])
        assert [(record.trimmed, record.payload) for record in journal_at(medium, last).audit()] == [
            (record.trimmed, record.payload) for record in records
        ]


def replaced_payload(found: Record, whole: Record) -> bool:
    return found.trimmed == whole.trimmed and found.payload is None and whole.payload is not None


def journal_at(medium: MemoryMedium, last: Position) -> Journal:
    reader = journal(medium)
    assert list(reader.replay(None))[-1].position == last
    return reader


def test_a_copy_counts_only_if_it_is_the_record() -> None:
    """Control: mending does not believe whatever it is given."""
    medium, written = fresh()
    records = turned(medium, written, 5)
    other, elsewhere = fresh(9)
    strangers = turned(other, elsewhere, 5)
    medium.now[2 * SLOT_BYTES : 3 * SLOT_BYTES] = bytes(SLOT_BYTES)
    flipped = bytearray(records[1].trimmed)
    flipped[200] ^= 1
    wrong: list[tuple[bytes, bytes | None] | None] = [
        (strangers[1].trimmed, strangers[1].payload),
        (records[2].trimmed, records[2].payload),
        (bytes(flipped), records[1].payload),
        (b"", None),
        None,
    ]
    for copy in wrong:
        with pytest.raises(LedgerCorrupt, match="record 3"):
            list(journal(medium, copies=lambda _, copy=copy: copy).replay(START))
    right = Copied(records)
    reader = journal(medium, copies=right)
    assert list(reader.replay(START))[1:] == records
    assert reader.restored == [3]
    assert list(journal(medium).replay(START))[1:] == records


def test_mending_never_puts_an_older_record_over_a_newer_one() -> None:
    medium, written = fresh()
    records = turned(medium, written, 2 * SLOTS)
    before = bytes(medium.now)
    reader = journal(medium, copies=Copied(records))
    older = records[3]
    for attempt in (
        lambda: reader.before(older.sequence),
        lambda: reader.mend(older.sequence),
        lambda: list(reader.replay(older.position)),
    ):
        with pytest.raises(LedgerCorrupt, match="no longer"):
            attempt()
    written.erase(older.sequence)
    assert bytes(medium.now) == before
    assert reader.before(records[-3].sequence) == records[-4].position
    medium.now[(records[-3].sequence - 1) % SLOTS * SLOT_BYTES + 20] ^= 1
    reader.mend(records[-3].sequence)
    assert bytes(medium.now) == before


def test_reading_on_in_pieces() -> None:
    medium, written = fresh()
    records = turned(medium, written, SLOTS + 5)
    found = written.read(written.before(written.first), 5)
    while piece := written.read(found[-1].position, 5):
        found += piece
    assert found == records[-SLOTS:]
    medium.now[(records[-1].sequence - 1) % SLOTS * SLOT_BYTES + 20] ^= 1
    with pytest.raises(LedgerCorrupt, match=f"record {records[-1].sequence}"):
        written.read(records[-4].position, 5)


def test_the_position_is_mended_from_the_copy() -> None:
    medium, written = fresh()
    records = turned(medium, written, 3)
    medium.now[3 * SLOT_BYTES : 4 * SLOT_BYTES] = random.Random(1).randbytes(SLOT_BYTES)
    reader = journal(medium, copies=Copied(records))
    assert list(reader.replay(records[-1].position)) == []
    assert (reader.last, reader.restored) == (records[-1].position, [4])
    assert list(journal(medium).replay(START))[1:] == records


def test_erasing_mends_the_record_and_never_brings_its_payload_back() -> None:
    medium, written = fresh()
    records = turned(medium, written, 4)
    copies = Copied(records)
    medium.now[SLOT_BYTES : 2 * SLOT_BYTES] = random.Random(1).randbytes(SLOT_BYTES)
    mending = journal(medium, copies=copies)
    list(mending.replay(records[-1].position))
    mending.erase(2)
    copies[2] = (records[0].trimmed, None)
    assert untrim(records[0].trimmed) == medium.pread(BLOCK_BYTES, SLOT_BYTES)
    assert not any(medium.pread(12288, SLOT_BYTES + BLOCK_BYTES))
    # A power cut in the middle of an erasure: the ledger knows, and it is finished.
    medium.now[SLOT_BYTES + BLOCK_BYTES + 9] = 1
    reader = journal(medium, copies=copies)
    assert [record.payload for record in reader.replay(START)][1] is None
    assert (reader.restored, reader.lost_payloads) == ([], [])
    assert not any(medium.pread(12288, SLOT_BYTES + BLOCK_BYTES))


def test_a_record_that_does_not_read_back_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    medium, written = fresh()
    before = bytes(medium.now)
    seal = RecordCodec.seal

    def flips(codec: RecordCodec, *args: Any) -> tuple[bytes, bytes | None]:
        trimmed, stored = seal(codec, *args)
        bent = bytearray(trimmed)
        bent[150] ^= 4
        return bytes(bent), stored

    with monkeypatch.context() as patched:
        patched.setattr(RecordCodec, "seal", flips)
        with pytest.raises(DiskTrouble, match="did not read back"):
            event(written, 1)
    assert medium.now == before
    with pytest.raises(DiskTrouble, match="did not read back"):
        written.append(RecordType.EVENT, {"what": ("a", "tuple")})  # it would come back as a list
    event(written, 1)


class RingHistory(RuleBasedStateMachine):
    """Anything that a ledger does to its ring, with power cuts at any moment.

    The oracle: what was flushed and not reclaimed is read back, in order and as it was written.
    """

    capacity = 70
    medium_class: type[MemoryMedium] = GarblingMedium

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.entropy = seeded(seed)
        self.medium = self.medium_class(self.capacity * SLOT_BYTES)
        self.ring = journal(self.medium, entropy=self.entropy)
        self.records = [self.ring.begin()]
        self.flushed = 1
        self.erased: set[int] = set()
        self.reclaimed = 0

    @rule(count=st.integers(1, 40), size_bytes=st.sampled_from([0, 20, 5000, 12000]))
    def append(self, count: int, size_bytes: int) -> None:
        for _ in range(count):
            flushes = self.medium.flushes
            try:
                record = event(self.ring, len(self.records), bytes(size_bytes))
            except JournalFull:
                assert self.ring.last.sequence - self.reclaimed == self.capacity
                return
            if self.medium.flushes > flushes:
                self.flushed = len(self.records)
            self.records.append(record)

    @rule()
    def flush(self) -> None:
        self.ring.flush()
        self.flushed = len(self.records)

    @rule(share=st.floats(0, 1))
    def reclaim(self, share: float) -> None:
        self.reclaimed += int((self.flushed - self.reclaimed) * share)
        self.ring.reclaim(self.reclaimed)

    @precondition(lambda self: self.vouched() > 0)
    @rule(data=st.data())
    def erase(self, data: st.DataObject) -> None:
        vouched = self.vouched()
        sequence = data.draw(st.integers(max(1, min(vouched, self.reclaimed - 5)), vouched))
        self.ring.erase(sequence)
        self.erased.add(sequence)

    @rule(start=st.sampled_from(["oldest", "reclaimed", "position"]))
    def power_cut(self, start: str) -> None:
        self.medium = self.medium.power_cut(self.chance)
        self.ring = journal(self.medium, entropy=self.entropy)
        self.ring.reclaim(self.reclaimed)
        assert self.ring.identify()
        match start:
            case "oldest":
                after = None
            case "reclaimed":
                after = START if not self.reclaimed else self.records[self.reclaimed - 1].position
            case _:
                after = self.records[self.flushed - 1].position
        found = list(self.ring.replay(after, thorough=start == "reclaimed"))
        last = self.ring.last.sequence
        assert self.flushed <= last <= len(self.records)
        assert all(self.same(record) for record in found)
        if after is None:
            assert found[0].sequence <= self.reclaimed + 1
        else:
            assert [record.sequence for record in found] == list(range(after.sequence + 1, last + 1))
        del self.records[last:]
        self.flushed = last
        self.ring.clear_beyond()
        self.ring.flush()

    @invariant()
    def what_was_flushed_is_there(self) -> None:
        if not hasattr(self, "ring"):
            return
        found = list(self.ring.audit())
        assert found[0].sequence <= self.reclaimed + 1
        assert [record.sequence for record in found] == list(range(found[0].sequence, len(self.records) + 1))
        assert all(self.same(record) for record in found)

    def vouched(self) -> int:
        """How far flushed records vouch for others: offset 60 of docs/formats.md."""
        flushed = self.records[: self.flushed]
        return max(each.sequence - 1 - int.from_bytes(each.trimmed[60:64], "big") for each in flushed)

    def same(self, record: Record) -> bool:
        """Of what is reclaimed the payload may be half overwritten already."""
        written = self.records[record.sequence - 1]
        gone = record.payload is None and (record.sequence in self.erased or record.sequence <= self.reclaimed)
        return record.trimmed == written.trimmed and (gone or record.payload == written.payload)


TestRingHistory = RingHistory.TestCase
TestRingHistory.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


class ForgetfulMedium(GarblingMedium):
    """Says that it has flushed, and has not."""

    def flush(self) -> None:
        self.flushes += 1


def test_the_oracle_finds_a_medium_that_forgets() -> None:
    """Control: the histories above can fail."""
    found_out = 0
    for seed in range(10):
        history = RingHistory()
        history.medium_class = ForgetfulMedium
        history.begin(seed)
        history.append(5, 20)
        history.flush()
        try:
            history.power_cut("position")
        except (AssertionError, LedgerCorrupt):
            found_out += 1
    assert found_out >= 5

"""What the tests of journal, medium and archive share: keys, a fresh journal, and a ledger's copy of its records."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from ledger_rig import FixedClock, MemoryMedium, seeded

from terminal.ledger.journal import SLOT_BYTES, Journal, Medium, Record, RecordType
from terminal.ledger.keys import Keyring, SecretKey

DATA, CHAIN, OTHER = (SecretKey(seeded(seed)(32)) for seed in (1, 2, 3))
SLOTS = 24


def journal(medium: Medium, seed: int = 0, **changed: Any) -> Journal:
    settings: dict[str, Any] = {
        "data": Keyring(DATA),
        "chain": CHAIN,
        "epoch": 1,
        "clock": FixedClock(),
        "entropy": seeded(seed),
    }
    return Journal(medium, **(settings | changed))


def fresh(seed: int = 0, slots: int = SLOTS, **changed: Any) -> tuple[MemoryMedium, Journal]:
    medium = MemoryMedium(slots * SLOT_BYTES)
    written = journal(medium, seed, **changed)
    assert not written.identify()
    written.begin()
    return medium, written


def event(written: Journal, number: int, payload: bytes = b"") -> Record:
    return written.append(RecordType.EVENT, {"what": "test", "n": number}, payload)


class Copied(dict[int, tuple[bytes, bytes | None]]):
    """The ledger's copy."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        super().__init__()
        for record in records:
            self.take(record)

    def take(self, record: Record) -> None:
        self[record.sequence] = (record.trimmed, record.payload)

    def __call__(self, sequence: int) -> tuple[bytes, bytes | None] | None:
        return self.get(sequence)


class GarblingMedium(MemoryMedium):
    """A card that, when power fails, also leaves random bytes in a block that was being programmed."""

    def power_cut(self, chance: random.Random) -> GarblingMedium:
        left = GarblingMedium(self.size_bytes)
        image = bytearray(super().power_cut(chance).durable)
        for offset, _ in self.unflushed:
            if chance.random() < 0.2:
                image[offset : offset + 4096] = chance.randbytes(4096)
        left.durable[:] = image
        left.now[:] = image
        return left

"""Where the power fails, and what of the unfinished writes is then on the card.

A card keeps what was written before the last flush that it confirmed. Of everything after that it keeps whatever it
likes, and a cheap one spoils more than that. A `Cut` names one such outcome by three values, so that it can be printed,
repeated and argued about; everything random in it comes from its seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

SECTOR_BYTES: Final = 512  # the least that a card writes whole
BLOCK_BYTES: Final = 4096  # what the file system writes at once
PAGE_BYTES: Final = 16384  # what the flash programs at once


class Mode(StrEnum):
    """What becomes of the writes after the last flush."""

    NONE = "none"
    ALL = "all"
    PREFIX = "prefix"
    SUBSET = "subset"
    TORN = "torn"
    """A subset, some blocks of it only in part: sectors land by themselves."""
    GARBAGE = "garbage"
    """A subset, and a block that was being written holds noise."""
    COLLATERAL = "collateral"
    """A subset, and the whole flash page around a block that was being written is destroyed, old data included."""


MODES: Final = tuple(Mode)
DESTRUCTIVE: Final = frozenset({Mode.GARBAGE, Mode.COLLATERAL})


@dataclass(frozen=True, slots=True, order=True)
class Cut:
    """The power fails after event number `point` of a recording."""

    point: int
    mode: Mode
    seed: int

    def __str__(self) -> str:
        return f"{self.mode}:{self.point}:{self.seed}"

    @classmethod
    def parse(cls, text: str) -> Cut:
        """The cut that was printed as `text`. Raises `ValueError`."""
        mode, point, seed = text.split(":")
        return cls(int(point), Mode(mode), int(seed))


class Write(NamedTuple):
    """Bytes at an offset: of the device (`file` is 0), or of a file with that number."""

    offset: int
    data: bytes
    file: int = 0


class Landing(NamedTuple):
    """What reaches the medium, in order, and what is destroyed after that."""

    written: list[Write]
    destroyed: list[Write]


def land(cut: Cut, pending: Sequence[Write]) -> Landing:
    """What `cut` makes of the writes that no flush has confirmed."""
    blocks = [piece for write in pending for piece in pieces(write, BLOCK_BYTES)]
    if not blocks:
        return Landing([], [])
    chance = random.Random(f"{cut}")
    written, destroyed = blocks, []
    match cut.mode:
        case Mode.NONE:
            written = []
        case Mode.ALL:
            pass
        case Mode.PREFIX:
            written = blocks[: chance.randrange(len(blocks) + 1)]
        case Mode.SUBSET:
            written = _some(chance, blocks)
        case Mode.TORN:
            written = [part for block in _some(chance, blocks) for part in _torn(chance, block)]
        case Mode.GARBAGE:
            victim = _victim(chance, blocks)
            written = _some(chance, blocks)
            destroyed = [_destroyed(victim, BLOCK_BYTES, chance.randbytes(BLOCK_BYTES))]
        case Mode.COLLATERAL:
            victim = _victim(chance, blocks)
            remains = chance.choice((chance.randbytes(PAGE_BYTES), b"\xff" * PAGE_BYTES, bytes(PAGE_BYTES)))
            written = _some(chance, blocks)
            destroyed = [_destroyed(victim, PAGE_BYTES, remains)]
    return Landing(written, destroyed)


def pieces(write: Write, size_bytes: int) -> list[Write]:
    """A write, cut at the boundaries of blocks or sectors."""
    result, start = [], 0
    while start < len(write.data):
        end = min(len(write.data), start + size_bytes - (write.offset + start) % size_bytes)
        result.append(Write(write.offset + start, write.data[start:end], write.file))
        start = end
    return result


def _some(chance: random.Random, blocks: list[Write]) -> list[Write]:
    share = chance.choice((0.1, 0.5, 0.9))  # few, half, nearly all: each fails in a way of its own
    return [block for block in blocks if chance.random() < share]


def _torn(chance: random.Random, block: Write) -> list[Write]:
    share = chance.choice((0.5, 0.9, 1.0))
    return [sector for sector in pieces(block, SECTOR_BYTES) if chance.random() < share]


def _victim(chance: random.Random, blocks: list[Write]) -> Write:
    """The block being written. The first often shares its block with older data, the last is what is waited for."""
    return chance.choice((blocks[0], blocks[-1], chance.choice(blocks)))


def _destroyed(block: Write, size_bytes: int, remains: bytes) -> Write:
    return Write(block.offset - block.offset % size_bytes, remains, block.file)

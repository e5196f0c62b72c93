"""A recording: what was on a card, then every write, flush and word of the program, in one order.

The word is what the program told the outside world ("sale 7 is approved"), written to a file that belongs to the
recorder and not to the card. So for each moment it is known what had been promised, and what the card had confirmed.
A recording is one file, and each crash state is made from it by a `Cut` alone.
"""

from __future__ import annotations

import json
import random
import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, Protocol, TypeAlias

from hwsim.sdcard.cuts import BLOCK_BYTES, MODES, Cut, Mode, Write, land, pieces

_MAGIC: Final = b"payterm card recording 1\n"
_HEADER_BYTES_MAX: Final = 1 << 20  # the header holds block numbers of metadata, a few thousand
_EVENT: Final = struct.Struct(">cQI")
_ZEROS: Final = bytes(BLOCK_BYTES)


class Flush(NamedTuple):
    """The device confirmed everything written before."""


class Told(NamedTuple):
    """The program told somebody."""

    text: bytes


Event: TypeAlias = Write | Flush | Told
Blocks: TypeAlias = dict[int, bytes]
"""What a device holds: block number to block; what is not there is zeros."""


class State(NamedTuple):
    """A card after a power cut."""

    blocks: Blocks
    metadata_destroyed: bool
    """The cut destroyed blocks of the file system's own: no program can answer for those."""


class Cuttable(Protocol):
    """What cuts are chosen from: the block recording here, the file recording in `files`."""

    def busy(self) -> Sequence[int]:
        """The points at which something is written and not flushed."""

    def last_point(self) -> int: ...

    def spoken(self) -> Sequence[int]:
        """The points right after something was told."""


@dataclass(slots=True)
class Recording:
    """One run of a program on a card of `size_bytes`."""

    size_bytes: int
    base: Blocks
    events: list[Event]
    metadata: frozenset[int] = frozenset()
    told_before: bytes = b""
    """What had been told before this recording began, where it continues after a cut."""
    mount_options: str = ""
    _durable: Blocks = field(default_factory=dict, repr=False)
    _durable_point: int = field(default=-1, repr=False)

    def last_point(self) -> int:
        return len(self.events)

    def spoken(self) -> Sequence[int]:
        return [number for number, event in enumerate(self.events, 1) if isinstance(event, Told)]

    def busy(self) -> Sequence[int]:
        points, pending = [], False
        for number, event in enumerate(self.events, 1):
            pending = isinstance(event, Write) or (pending and not isinstance(event, Flush))
            if pending:
                points.append(number)
        return points

    def told(self, point: int) -> bytes:
        """Everything that had been told by then."""
        return self.told_before + b"".join(event.text for event in self.events[:point] if isinstance(event, Told))

    def state(self, cut: Cut) -> State:
        """The card after `cut`. Cheap when the points of successive calls do not decrease."""
        flushed = max((n for n, event in enumerate(self.events[: cut.point], 1) if isinstance(event, Flush)), default=0)
        if not 0 <= self._durable_point <= flushed:
            self._durable, self._durable_point = dict(self.base), 0
        for event in self.events[self._durable_point : flushed]:
            if isinstance(event, Write):
                _lay(self._durable, event)
        self._durable_point = flushed
        pending = [event for event in self.events[flushed : cut.point] if isinstance(event, Write)]
        landing = land(cut, pending)
        blocks = dict(self._durable)
        for write in (*landing.written, *landing.destroyed):
            _lay(blocks, write)
        destroyed = {piece.offset // BLOCK_BYTES for write in landing.destroyed for piece in pieces(write, BLOCK_BYTES)}
        return State(blocks, metadata_destroyed=not destroyed.isdisjoint(self.metadata))

    def save(self, path: Path) -> None:
        header = {
            "size_bytes": self.size_bytes,
            "metadata": sorted(self.metadata),
            "told_before": self.told_before.decode(),
            "mount_options": self.mount_options,
        }
        with path.open("wb") as file:
            file.write(_MAGIC + json.dumps(header).encode() + b"\n")
            for number, block in self.base.items():
                file.write(_EVENT.pack(b"B", number * BLOCK_BYTES, len(block)) + block)
            for event in self.events:
                write_event(file, event)

    @classmethod
    def load(cls, path: Path) -> Recording:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ValueError(f"{path} is no recording of a card")
            header = json.loads(file.readline(_HEADER_BYTES_MAX))
            base: Blocks = {}
            events: list[Event] = []
            for kind, event in _read(file):
                if kind == b"B" and isinstance(event, Write):
                    base[event.offset // BLOCK_BYTES] = event.data
                else:
                    events.append(event)
        return cls(
            size_bytes=header["size_bytes"],
            base=base,
            events=events,
            metadata=frozenset(header["metadata"]),
            told_before=header["told_before"].encode(),
            mount_options=header["mount_options"],
        )


def choose(recording: Cuttable, count: int, seed: int, modes: Sequence[Mode] = MODES) -> list[Cut]:
    """`count` cuts, modes in turn, points at random; in the order of their points, which is the cheapest."""
    chance = random.Random(seed)
    spoken = recording.spoken()
    # By what had been told: a program that writes much before its first word would else draw all the cuts to there.
    busy: dict[int, list[int]] = {}
    for point in recording.busy():
        busy.setdefault(bisect_left(spoken, point), []).append(point)
    between = list(busy.values())
    cuts = []
    for number in range(count):
        mode = modes[number % len(modes)]
        # Where nothing is pending, all modes leave the same: those points belong to NONE.
        if mode is Mode.NONE or not between:
            point = (
                chance.choice(spoken) if spoken and chance.random() < 0.5 else chance.randint(0, recording.last_point())
            )
        else:
            point = chance.choice(chance.choice(between))
        cuts.append(Cut(point, mode, chance.getrandbits(32)))
    return sorted(cuts)


def blocks_of(image: Path) -> Blocks:
    """What a file holds that is not zeros."""
    with image.open("rb") as file:
        content = enumerate(iter(lambda: file.read(BLOCK_BYTES), b""))
        return {number: block for number, block in content if block != _ZEROS}


def write_event(file: BinaryIO, event: Event) -> None:
    match event:
        case Write():
            file.write(_EVENT.pack(b"W", event.offset, len(event.data)) + event.data)
        case Flush():
            file.write(_EVENT.pack(b"F", 0, 0))
        case Told():
            file.write(_EVENT.pack(b"T", 0, len(event.text)) + event.text)


def read_events(path: Path) -> list[Event]:
    with path.open("rb") as file:
        return [event for _, event in _read(file)]


def _read(file: BinaryIO) -> Iterator[tuple[bytes, Event]]:
    while head := file.read(_EVENT.size):
        kind, offset, size_bytes = _EVENT.unpack(head)
        data = file.read(size_bytes)
        if len(data) != size_bytes:
            raise ValueError("the recording is cut off")
        match kind:
            case b"F":
                yield kind, Flush()
            case b"T":
                yield kind, Told(data)
            case _:
                yield kind, Write(offset, data)


def _lay(blocks: Blocks, write: Write) -> None:
    for piece in pieces(write, BLOCK_BYTES):
        number, start = divmod(piece.offset, BLOCK_BYTES)
        if len(piece.data) == BLOCK_BYTES:
            blocks[number] = piece.data
        else:
            before = blocks.get(number, _ZEROS)
            blocks[number] = before[:start] + piece.data + before[start + len(piece.data) :]


def runs(blocks: Blocks) -> Iterator[tuple[int, list[bytes]]]:
    """Neighbouring blocks together: the number of the first, and the blocks. Zeros are left out."""
    numbers = sorted(number for number, block in blocks.items() if block != _ZEROS)
    while numbers:
        first = numbers[0]
        length = bisect_left(range(len(numbers)), True, key=lambda index: numbers[index] != first + index)
        yield first, [blocks[number] for number in numbers[:length]]
        numbers = numbers[length:]

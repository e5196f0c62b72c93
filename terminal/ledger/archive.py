"""The archive: what the journal's ring has no more room for, in one sealed file a month or less.

A segment holds a run of the chain. Sealed records do not compress, so a segment keeps their plaintext, compressed and
sealed as a whole, with the nonces; sealing again with those gives back the very bytes, and the MACs of the chain prove
it. That takes the data key that a record was sealed with, so a retired key stays until its records are dropped here,
too (`sealed_under`). Each segment names the place in the chain before and after it: one that is missing, swapped or
damaged is named, never skipped. Archive and journal, one after the other, are one chain.

Files are written whole or not at all, and what is replaced or dropped is overwritten with zeros before its blocks are
let go. When records may move here, and how long they stay, is the ledger's affair.
"""

from __future__ import annotations

import hmac
import os
import re
import stat
import struct
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from terminal.clock import Entropy
from terminal.ledger.errors import LedgerCorrupt
from terminal.ledger.journal import START, Header, Position, Record, RecordCodec, other_key
from terminal.ledger.keys import Keyring, SecretKey
from terminal.ledger.medium import SLOT_BYTES, storage_errors, sync_directory

RECORDS_MAX: Final = 4096  # of a segment, which is handled in memory: some ten MiB, 64 at the very worst

_MAGIC: Final = b"PTA1"
_FLOOR_MAGIC: Final = b"PTF1"
_VERSION: Final = 1
_FRONT: Final = struct.Struct(">4sBB2x4sQQ32s32sqqI12s")
_FLOOR: Final = struct.Struct(">4sQ32s")
_ENTRY: Final = struct.Struct(">HH")  # lengths of body and payload in the clear
_MAC_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_SOME_SYNCHRONISED: Final = 1
_LAST_SYNCHRONISED: Final = 2
_NAME: Final = re.compile(r"(\d{4}-\d{2})-(\d{10,20})-(\d{10,20})\.segment", re.ASCII)
_UNFINISHED: Final = ".new"
_FLOOR_NAME: Final = "floor"
_LEVEL: Final = 9  # written once, in idle time, and kept for a year
_HEADER_BYTES: Final = len(Header(b"", *(0,) * 4, b"", 0, b"", *(0,) * 5, b"", b"", b"").packed())


class Front(NamedTuple):
    """What a segment says of itself in the clear, under a MAC. The times are of records with a synchronised clock."""

    magic: bytes
    version: int
    flags: int
    data_key_id: bytes
    first: int
    last: int
    previous_mac: bytes
    last_mac: bytes
    first_synchronised_ms: int
    newest_synchronised_ms: int
    plain_bytes: int
    nonce: bytes

    @property
    def end(self) -> Position:
        return Position(self.last, self.last_mac)


@dataclass(frozen=True, slots=True)
class Segment:
    """One file: the records `first` to `last`. Its front is None when that is damaged."""

    path: Path
    month: str
    first: int
    last: int
    size_bytes: int
    front: Front | None = field(repr=False)


class Archive:
    """The segments in one directory. Not thread-safe: the ledger's lock serialises.

    `before`, `last`: the place in the chain before the oldest record kept, and that of the newest.
    """

    def __init__(self, directory: Path, data: Keyring, chain: SecretKey, entropy: Entropy) -> None:
        self._directory = directory
        self._data = data
        self._codec = RecordCodec(data, chain)
        self._front_key = chain.derive(b"payterm archive front")
        self._entropy = entropy
        self._loaded: list[Segment] | None = None
        self._before = START

    @property
    def before(self) -> Position:
        self.segments()
        return self._before

    @property
    def last(self) -> Position | None:
        """The last record archived. Raises `LedgerCorrupt` when the segment that knows it is damaged."""
        segments = self.segments()
        if not segments:
            return None if self._before == START else self._before
        front = segments[-1].front
        if front is None:
            raise _damaged(segments[-1].path.name, segments[-1].first, "is damaged in front")
        return front.end

    def begin(self, after: Position) -> None:
        """What comes up to `after` is not kept here: a restored chain goes on from there."""
        if self.last not in {None, after}:
            raise ValueError("an archive begins once")
        self._set_before(after)

    def segments(self) -> list[Segment]:
        """Oldest first."""
        if self._loaded is None:
            with storage_errors():
                self._loaded = self._load()
        return list(self._loaded)

    def append(self, records: Sequence[Record]) -> Segment:
        """Write records that continue the archive as one segment. Durable on return.

        Of one UTC month by their own clocks, `RECORDS_MAX` at most. Raises `LedgerCorrupt` where they do not continue
        the chain, `DiskTrouble`.
        """
        months = {_month(record.wall_ms) for record in records}
        if len(months) != 1 or len(records) > RECORDS_MAX:
            raise ValueError(f"a segment takes 1 to {RECORDS_MAX} records of one month")
        position = self.last or START
        for record in records:
            if (record.sequence - 1, record.previous_mac) != position:
                raise LedgerCorrupt.at_record(record.sequence, "does not continue the archive")
            position = record.position
        name = f"{months.pop()}-{records[0].sequence:012}-{records[-1].sequence:012}.segment"
        with storage_errors():
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            segment = self._write(self._directory / name, records)
        self._loaded = [*self.segments(), segment]
        return segment

    def restore(self, segment: Segment, records: Sequence[Record]) -> None:
        """Write a damaged segment again from its records. Raises `LedgerCorrupt` where these are not all of them."""
        segments = self.segments()
        index = segments.index(segment)
        position = self._before
        if index:
            before = segments[index - 1].front
            if before is None:
                raise _damaged(segments[index - 1].path.name, segments[index - 1].first, "is damaged in front")
            position = before.end
        for record in records:
            if (record.sequence - 1, record.previous_mac) != position:
                raise LedgerCorrupt.at_record(record.sequence, "does not continue the archive")
            position = record.position
        if position.sequence != segment.last:
            raise _damaged(segment.path.name, segment.first, "is damaged")
        with storage_errors():
            segments[index] = self._write(segment.path, records)
        self._loaded = segments

    def replay(self, after: Position = START) -> Iterator[Record]:
        """Every record after `after`, or after what was dropped, oldest first. Raises `LedgerCorrupt`."""
        segments, position = self.segments(), after
        if position.sequence < self._before.sequence:
            position = self._before
        for segment in segments:
            if segment.last <= position.sequence:
                continue
            for record in self._read(segment):
                if record.sequence > position.sequence:
                    if (record.sequence - 1, record.previous_mac) != position:
                        raise LedgerCorrupt(
                            f"the archive has no record {position.sequence + 1} that fits, {segment.path.name} comes "
                            "next: sales up to there can be read elsewhere only; restore a copy of the missing segment",
                            position.sequence + 1,
                        )
                    position = record.position
                    yield record

    def before_record(self, sequence: int) -> Position:
        """The place right before this record, or before the oldest one kept. Raises `LedgerCorrupt`."""
        for segment in self.segments():
            if segment.first <= sequence <= segment.last:
                for record in self._read(segment):
                    if record.sequence == sequence:
                        return Position(sequence - 1, record.previous_mac)
        return self._before

    def verify(self) -> int:
        """Read every segment; the number of records. Raises `LedgerCorrupt`, which names each damaged one."""
        count, damaged = 0, []
        position: Position | None = self.before
        for segment in self.segments():
            try:
                for record in self._read(segment):
                    if position is not None and (record.sequence - 1, record.previous_mac) != position:
                        raise _damaged(segment.path.name, segment.first, "does not continue the one before it")
                    position = record.position
                    count += 1
            except LedgerCorrupt as error:
                damaged.append((segment, error))
                # The next one is held against what this one's front says, if that says anything.
                position = segment.front.end if segment.front else None
        if damaged:
            raise _damaged(
                ", ".join(segment.path.name for segment, _ in damaged), damaged[0][0].first, "cannot be read"
            ) from damaged[0][1]
        return count

    def erase_payloads(self, sequences: Collection[int]) -> None:
        """Write the segments of these records anew without their payloads. May be repeated."""
        wanted = frozenset(sequences)
        for index, segment in enumerate(self.segments()):
            if not any(segment.first <= sequence <= segment.last for sequence in wanted):
                continue
            records = list(self._read(segment))
            if any(record.sequence in wanted and record.payload is not None for record in records):
                kept = [
                    replace(record, payload=None, content=None) if record.sequence in wanted else record
                    for record in records
                ]
                with storage_errors():
                    written = self._write(segment.path, kept)
                if self._loaded is not None:
                    self._loaded[index] = written

    def drop_before(self, wall_ms: int) -> list[Segment]:
        """Delete the oldest segments, as long as each record in them is surely older; never the newest.

        A record is as old as the next one with a synchronised clock, at the least: order is by sequence.
        """
        segments = self.segments()
        dropped: list[Segment] = []
        for index, segment in enumerate(segments[:-1]):
            if not _older(segment, segments[index + 1 :], wall_ms):
                break
            dropped.append(segment)
        if dropped and dropped[-1].front is not None:
            # First what is gone, then the going: a segment that is missing otherwise is damage.
            self._set_before(dropped[-1].front.end)
            self._loaded = segments[len(dropped) :]
            with storage_errors():
                for segment in dropped:
                    _remove(segment.path)
                sync_directory(self._directory)
        return dropped

    def sealed_under(self) -> dict[bytes, int]:
        """How many records, and segments as such, need each data key, by its id. Reads everything."""
        counts: Counter[bytes] = Counter()
        for segment in self.segments():
            if segment.front is not None:
                counts[segment.front.data_key_id] += 1
            counts.update(Header.of(record.trimmed).data_key_id for record in self._read(segment))
        return dict(counts)

    # Files

    def _load(self) -> list[Segment]:
        """Find the segments, and finish what a power cut left undone."""
        if not self._directory.is_dir():
            return []
        floor = self._floor()
        self._before = floor or START
        segments: list[Segment] = []
        for path in self._directory.iterdir():
            if path.suffix == _UNFINISHED:
                _remove(path)
            elif (named := _NAME.fullmatch(path.name)) is not None:
                if int(named[3]) <= self._before.sequence:
                    _remove(path)
                else:
                    segments.append(self._segment(path, named))
        segments.sort(key=lambda segment: segment.first)
        if floor is None and (self._directory / _FLOOR_NAME).exists():
            # What it says can be read from the oldest segment, too.
            front = segments[0].front if segments else None
            if front is None:
                raise _damaged(_FLOOR_NAME, 1, "is damaged")
            self._set_before(Position(front.first - 1, front.previous_mac))
        return segments

    def _floor(self) -> Position | None:
        """What the floor says; None where there is none, or it is damaged."""
        floor = self._directory / _FLOOR_NAME
        content = floor.read_bytes() if floor.exists() else b""
        body, mac = content[: _FLOOR.size], content[_FLOOR.size :]
        if len(body) != _FLOOR.size or not hmac.compare_digest(self._front_mac(body), mac):
            return None
        _, sequence, at = _FLOOR.unpack(body)
        return Position(sequence, at)

    def _segment(self, path: Path, named: re.Match[str]) -> Segment:
        with path.open("rb") as file:
            front = self._front(file.read(_FRONT.size + _MAC_BYTES))
        month, first, last = named[1], int(named[2]), int(named[3])
        if front is not None and (front.first, front.last) != (first, last):
            front = None
        return Segment(path, month, first, last, path.stat().st_size, front)

    def _write(self, path: Path, records: Sequence[Record]) -> Segment:
        content = self._sealed(records)
        # Verify before writing: the ring's slots are used again once this stands.
        read = [(record.trimmed, record.payload) for record in self._opened(content, path.name, records[0].sequence)]
        if read != [(record.trimmed, record.payload) for record in records]:
            raise OSError("a segment did not read back from memory")
        _write_whole(path, content)
        named = _NAME.fullmatch(path.name)
        assert named is not None  # noqa: S101 (the name is ours)
        return self._segment(path, named)

    def _set_before(self, position: Position) -> None:
        body = _FLOOR.pack(_FLOOR_MAGIC, *position)
        with storage_errors():
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_whole(self._directory / _FLOOR_NAME, body + self._front_mac(body))
        self._before = position

    # Bytes

    def _sealed(self, records: Sequence[Record]) -> bytes:
        plain = b"".join(map(self._entry, records))
        packed = zlib.compress(plain, _LEVEL)
        times = [record.wall_ms for record in records if record.synchronised]
        nonce = self._entropy(_NONCE_BYTES)
        front = _FRONT.pack(
            _MAGIC,
            _VERSION,
            (_SOME_SYNCHRONISED if times else 0) | (_LAST_SYNCHRONISED if records[-1].synchronised else 0),
            self._data.current.id,
            records[0].sequence,
            records[-1].sequence,
            records[0].previous_mac,
            records[-1].mac,
            times[0] if times else 0,
            max(times, default=0),
            len(plain),
            nonce,
        )
        return front + self._front_mac(front) + _cipher(self._data.current).encrypt(nonce, packed, front)

    def _entry(self, record: Record) -> bytes:
        """What is left of a record when everything is taken away that can be worked out again."""
        header = Header.of(record.trimmed)
        body = self._codec.open_body(record.trimmed, header)
        payload = b""
        slim = header._replace(previous_mac=bytes(_MAC_BYTES))
        if record.payload is not None:
            plaintext = self._codec.open_payload(record.trimmed, record.payload)
            payload = record.payload[:_NONCE_BYTES] + plaintext
            slim = slim._replace(payload_sha256=bytes(_MAC_BYTES))
        return _ENTRY.pack(len(body), len(payload)) + slim.packed() + record.mac + body + payload

    def _read(self, segment: Segment) -> Iterator[Record]:
        with storage_errors():
            content = segment.path.read_bytes() if segment.path.exists() else b""
        yield from self._opened(content, segment.path.name, segment.first)

    def _opened(self, content: bytes, name: str, first: int) -> Iterator[Record]:
        front = self._front(content[: _FRONT.size + _MAC_BYTES])
        if front is None or front.first != first:
            raise _damaged(name, first, "is damaged in front" if content else "is missing or empty")
        key = self._data.by_id(front.data_key_id)
        if key is None:
            raise other_key(f"data-key (id {front.data_key_id.hex()})")
        if front.plain_bytes > RECORDS_MAX * SLOT_BYTES:
            raise _damaged(name, first, "is larger than a segment can be")
        try:
            packed = _cipher(key).decrypt(front.nonce, content[_FRONT.size + _MAC_BYTES :], content[: _FRONT.size])
            plain = zlib.decompressobj().decompress(packed, front.plain_bytes)
        except (InvalidTag, zlib.error) as error:
            raise _damaged(name, first, "is damaged") from error
        at, sequence, mac = 0, front.first, front.previous_mac
        while at < len(plain):
            record, at = self._restored(plain, at, mac)
            if record is None or record.sequence != sequence:
                raise _damaged(name, sequence, "holds a record that the chain key did not make")
            sequence, mac = sequence + 1, record.mac
            yield record
        if (sequence - 1, mac) != front.end:
            raise _damaged(name, sequence, "holds fewer records than it says")

    def _restored(self, plain: bytes, at: int, previous_mac: bytes) -> tuple[Record | None, int]:
        """A record sealed again, None if its MAC is not the one it was archived with; and where the next one is."""
        body_bytes, payload_bytes = _ENTRY.unpack_from(plain, at)
        at += _ENTRY.size
        header = Header.of(plain[at : at + _HEADER_BYTES])._replace(previous_mac=previous_mac)
        at += _HEADER_BYTES
        mac = plain[at : at + _MAC_BYTES]
        at += _MAC_BYTES
        body, payload = plain[at : at + body_bytes], plain[at + body_bytes : at + body_bytes + payload_bytes]
        trimmed, stored = self._codec.seal(
            header, body, (payload[:_NONCE_BYTES], payload[_NONCE_BYTES:]) if payload else None
        )
        authentic = hmac.compare_digest(trimmed[-_MAC_BYTES:], mac)
        return (self._codec.decoded(header, trimmed, stored) if authentic else None), at + body_bytes + payload_bytes

    def _front(self, content: bytes) -> Front | None:
        """The front of a segment, if it was made with the chain key."""
        packed, mac = content[: _FRONT.size], content[_FRONT.size :]
        if len(packed) != _FRONT.size or not hmac.compare_digest(self._front_mac(packed), mac):
            return None
        front = Front(*_FRONT.unpack(packed))
        return front if (front.magic, front.version) == (_MAGIC, _VERSION) else None

    def _front_mac(self, front: bytes) -> bytes:
        return hmac.digest(self._front_key, front, "sha256")


def _older(segment: Segment, later: Iterable[Segment], wall_ms: int) -> bool:
    """Whether each record is older, by its own clock or, where that was not synchronised, by one that came after it."""
    front = segment.front
    if front is None or (front.flags & _SOME_SYNCHRONISED and front.newest_synchronised_ms >= wall_ms):
        return False
    if front.flags & _LAST_SYNCHRONISED:
        return True
    for each in later:
        if each.front is None:
            return False
        if each.front.flags & _SOME_SYNCHRONISED:
            return each.front.first_synchronised_ms < wall_ms
    return False


def _month(wall_ms: int) -> str:
    return f"{datetime.fromtimestamp(wall_ms / 1000, UTC):%Y-%m}"


def _cipher(key: SecretKey) -> AESGCM:
    return AESGCM(key.derive(b"payterm archive segment"))


def _write_whole(path: Path, content: bytes) -> None:
    """Under another name first; what had the name before is overwritten with zeros. Durable on return."""
    unfinished = path.with_name(path.name + _UNFINISHED)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    descriptor = os.open(unfinished, flags, stat.S_IRUSR | stat.S_IWUSR)
    with open(descriptor, "wb") as file:  # noqa: PTH123 (a descriptor, not a path)
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    if not path.exists():
        unfinished.rename(path)
        sync_directory(path.parent)
        return
    with path.open("r+b") as before:
        unfinished.replace(path)
        sync_directory(path.parent)
        _zero(before)


def _remove(path: Path) -> None:
    """Delete a file whose content must not stay behind on the storage."""
    with path.open("r+b") as file:
        _zero(file)
    path.unlink()


def _zero(file: BinaryIO) -> None:
    file.write(bytes(os.fstat(file.fileno()).st_size))
    file.flush()
    os.fsync(file.fileno())


def _damaged(name: str, first: int, what: str) -> LedgerCorrupt:
    return LedgerCorrupt(
        f"of the archive, {name} {what}: the sales recorded there have been answered by the host long since, but can "
        "be read elsewhere only; keep the files as they are and restore a copy of these",
        first,
    )

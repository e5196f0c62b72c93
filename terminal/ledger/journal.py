"""The journal: what happened, one record a slot, in an order that cannot be changed afterwards.

A medium of fixed size, written with zeros when it is made, so that an append overwrites blocks in place and one flush
is one flush. Each record is sealed with the data key and chained with the chain key (layout: docs/formats.md, Journal).

**Where it ends.** The end is the first slot that does not continue the chain. What lies beyond was written but never
flushed, and can never chain: its predecessor's nonce was random. **Damage or end?** Every record says how many records
before it were not yet flushed when it was written, so every later record vouches for all those before that window. A
gap that somebody vouches for was once safe: that is `LedgerCorrupt`, never the end. The same rule reads a payload: one
that is gone though vouched for was erased, one that nobody vouches for was torn by a power cut.

The chain runs from the beginning of the medium to its end; a slot is never used twice. What a record means is left to
the store, which applies it, and how much room must be kept free is the ledger's affair.
"""

from __future__ import annotations

import copy
import hashlib
import hmac
import os
import stat
import struct
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol
from uuid import UUID

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from terminal.clock import Clock, Entropy
from terminal.ledger.errors import DiskTrouble, JournalFull, KeyUnavailable, LedgerCorrupt
from terminal.ledger.keys import SecretKey

BLOCK_BYTES: Final = 4096  # what a card's controller programs at once
SLOT_BYTES: Final = 16384  # a flash page: destroying one harms one record
PAYLOAD_STORED_BYTES_MAX: Final = SLOT_BYTES - BLOCK_BYTES
UNFLUSHED_MAX: Final = 32  # how far damage must be looked for beyond the end; a sale takes four records
_SLOTS_MAX: Final = 2**24  # 256 GiB: larger is a mistake in the configuration

_MAGIC: Final = b"PTJ1"
_VERSION: Final = 1
_SYNCHRONISED: Final = 1
_HEADER: Final = struct.Struct(">4sBBHI4sQ16sQqHHI32s32s12s")
_SEALED_TO: Final = 128  # associated data of the body: everything before the nonce
_PAYLOAD_SEALED_TO: Final = 64  # associated data of the payload: everything before its own hash
_MAC_BYTES: Final = 32
_MAC_AT: Final = BLOCK_BYTES - _MAC_BYTES
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_NOTHING: Final = bytes(_MAC_BYTES)

BODY_BYTES_MAX: Final = _MAC_AT - _HEADER.size - _TAG_BYTES
PAYLOAD_BYTES_MAX: Final = PAYLOAD_STORED_BYTES_MAX - _NONCE_BYTES - _TAG_BYTES
assert _HEADER.size == 140  # noqa: S101 (the layout in docs/formats.md)


class RecordType(IntEnum):
    OPEN = 1
    OUTCOME = 2
    CARD = 3
    SHOWN = 4
    ANSWER = 5
    REVERSAL = 6
    EVENT = 7
    CHECKPOINT = 8


class Position(NamedTuple):
    """A place in the chain: the last record's number and MAC."""

    sequence: int
    mac: bytes


START: Final = Position(0, _NOTHING)


class Medium(Protocol):
    """Where the journal lies: a file, a partition, or a test's memory. Errors are `OSError`."""

    @property
    def size_bytes(self) -> int: ...

    def pread(self, size_bytes: int, offset: int) -> bytes: ...

    def pwrite(self, data: bytes, offset: int) -> None: ...

    def flush(self) -> None:
        """Return only when everything written is on the storage (fdatasync)."""

    def close(self) -> None: ...


class FileMedium:
    """A file or block device that exists already."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        self.size_bytes: int = os.lseek(self._descriptor, 0, os.SEEK_END)

    @classmethod
    def create(cls, path: Path, size_bytes: int) -> FileMedium:
        """Open the journal file, first making it with zeros where there is none: whole or not at all."""
        if not path.exists():
            unfinished = path.with_name(path.name + ".new")
            descriptor = os.open(
                unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, stat.S_IRUSR | stat.S_IWUSR
            )
            with open(descriptor, "wb") as file:  # noqa: PTH123 (a descriptor, not a path)
                zeros = bytes(1 << 20)
                for offset in range(0, size_bytes, len(zeros)):
                    file.write(zeros[: size_bytes - offset])
                file.flush()
                os.fsync(descriptor)
            unfinished.replace(path)
            sync_directory(path.parent)
        return cls(path)

    def pread(self, size_bytes: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size_bytes, offset)

    def pwrite(self, data: bytes, offset: int) -> None:
        written = os.pwrite(self._descriptor, data, offset)
        if written != len(data):
            raise OSError(f"wrote {written} of {len(data)} bytes")

    def flush(self) -> None:
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def sync_directory(directory: Path) -> None:
    """Make names in a directory durable: renames and new files are not until then."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Record:
    """One record, authenticated and decrypted.

    `trimmed` are the block's bytes without the zeros before its MAC; `payload` is as stored, sealed, and None when
    there is none or it was erased.
    """

    sequence: int
    type: RecordType
    epoch: int
    boot_id: UUID
    monotonic_ms: int
    wall_ms: int
    synchronised: bool
    mac: bytes = field(repr=False)
    body: dict[str, Any] = field(repr=False)
    trimmed: bytes = field(repr=False)
    payload: bytes | None = field(repr=False)

    @property
    def position(self) -> Position:
        return Position(self.sequence, self.mac)


class _Header(NamedTuple):
    magic: bytes
    version: int
    type: int
    flags: int
    epoch: int
    data_key_id: bytes
    sequence: int
    boot_id: bytes
    monotonic_ms: int
    wall_ms: int
    body_bytes: int
    payload_bytes: int
    unflushed_before: int
    payload_sha256: bytes
    previous_mac: bytes
    nonce: bytes


class _Codec:
    """Records to bytes and back, under the two keys."""

    def __init__(self, data: SecretKey, chain: SecretKey, entropy: Entropy) -> None:
        self.data_key_id = data.id
        self.chain_key_id = chain.id
        self._cipher = AESGCM(data.material)
        self._chain = chain
        self._entropy = entropy

    def seal(self, header: _Header, body: bytes, payload: bytes) -> tuple[bytes, bytes]:
        """Block and stored payload. Lengths, hash and nonce of `header` are filled in here."""
        header = header._replace(
            body_bytes=len(body) + _TAG_BYTES,
            payload_bytes=len(payload) + _NONCE_BYTES + _TAG_BYTES if payload else 0,
            nonce=self._entropy(_NONCE_BYTES),
        )
        stored = b""
        if payload:
            nonce = self._entropy(_NONCE_BYTES)
            stored = nonce + self._cipher.encrypt(nonce, payload, _HEADER.pack(*header)[:_PAYLOAD_SEALED_TO])
            # Over the stored bytes: a hash over the plaintext would let anybody test guesses.
            header = header._replace(payload_sha256=hashlib.sha256(stored).digest())
        packed = _HEADER.pack(*header)
        sealed = self._cipher.encrypt(header.nonce, body, packed[:_SEALED_TO])
        block = (packed + sealed).ljust(_MAC_AT, b"\0")
        return block + self._chain_mac(block), stored

    def authenticate(self, block: bytes) -> _Header | None:
        """The header, if the chain key made this block."""
        if len(block) != BLOCK_BYTES or block[:4] != _MAGIC:
            return None
        if not hmac.compare_digest(self._chain_mac(block[:_MAC_AT]), block[_MAC_AT:]):
            return None
        header = _Header(*_HEADER.unpack_from(block))
        return header if header.version == _VERSION else None

    def open_body(self, block: bytes, header: _Header) -> dict[str, Any]:
        """Raises `InvalidTag` where it was not sealed with this data key."""
        sealed = block[_HEADER.size : _HEADER.size + header.body_bytes]
        return msgspec.json.decode(self._cipher.decrypt(header.nonce, sealed, block[:_SEALED_TO]), type=dict[str, Any])

    def open_payload(self, block: bytes, stored: bytes) -> bytes:
        return self._cipher.decrypt(stored[:_NONCE_BYTES], stored[_NONCE_BYTES:], block[:_PAYLOAD_SEALED_TO])

    def _chain_mac(self, block: bytes) -> bytes:
        return hmac.digest(self._chain.material, block, "sha256")


class Journal:
    """The chain on its medium. Not thread-safe: the ledger's lock serialises."""

    def __init__(
        self, medium: Medium, *, data: SecretKey, chain: SecretKey, epoch: int, clock: Clock, entropy: Entropy
    ) -> None:
        self._medium = medium
        self._codec = _Codec(data, chain, entropy)
        self._clock = clock
        self._epoch = epoch
        self._last = START
        self._flushed_sequence = 0
        self.capacity: Final = min(medium.size_bytes // SLOT_BYTES, _SLOTS_MAX)

    @property
    def last(self) -> Position:
        return self._last

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def free_slots(self) -> int:
        return self.capacity - self._last.sequence

    def identify(self) -> bool:
        """Whether the journal has begun; if so, take over its epoch and make sure that these are its keys.

        Raises `KeyUnavailable` for other keys, `LedgerCorrupt` where the beginning is damaged and the keys are right.
        """
        # The first record names the chain key; the ones after it tell wrong keys from a damaged first record.
        blocks = [self._block(sequence) for sequence in range(1, min(UNFLUSHED_MAX, self.capacity) + 1)]
        if not any(any(block) for block in blocks):
            return False
        headers = [header for header in map(self._codec.authenticate, blocks) if header]
        if headers:
            if any(header.data_key_id != self._codec.data_key_id for header in headers):
                raise self._other_key("data-key")
            self._epoch = headers[0].epoch
            return True
        first = _Header(*_HEADER.unpack_from(blocks[0]))
        try:
            body = self._codec.open_body(blocks[0], first)
        except (InvalidTag, ValueError):
            raise self._other_key("data-key or chain-key") from None
        if body.get("chain_key") == self._codec.chain_key_id.hex():
            raise LedgerCorrupt.at_record(1, "is damaged")
        raise self._other_key("chain-key")

    def begin(self) -> Record:
        """Write the first record of an epoch, which names the chain key. Durable on return."""
        record = self.append(RecordType.CHECKPOINT, {"chain_key": self._codec.chain_key_id.hex()})
        self.flush()
        return record

    def append(self, type_: RecordType, body: dict[str, Any], payload: bytes = b"") -> Record:
        """Write one record. It is durable only after `flush`. Raises `JournalFull`, `DiskTrouble`."""
        if not self.free_slots:
            raise JournalFull(
                f"the journal's {self.capacity} slots are used up: nothing further can be recorded, what is recorded "
                "is safe; send what is waiting, then start a new epoch on fresh storage"
            )
        encoded = msgspec.json.encode(body)
        if len(encoded) > BODY_BYTES_MAX or len(payload) > PAYLOAD_BYTES_MAX:
            raise ValueError(f"a record takes {BODY_BYTES_MAX} bytes of body and {PAYLOAD_BYTES_MAX} of payload")
        if self._last.sequence - self._flushed_sequence >= UNFLUSHED_MAX:
            self.flush()
        sequence = self._last.sequence + 1
        header = _Header(
            magic=_MAGIC,
            version=_VERSION,
            type=type_,
            flags=_SYNCHRONISED if self._clock.synchronised() else 0,
            epoch=self._epoch,
            data_key_id=self._codec.data_key_id,
            sequence=sequence,
            boot_id=self._clock.boot_id.bytes,
            monotonic_ms=self._clock.monotonic_ms(),
            wall_ms=self._clock.wall_ms(),
            body_bytes=0,
            payload_bytes=0,
            unflushed_before=self._last.sequence - self._flushed_sequence,
            payload_sha256=_NOTHING,
            previous_mac=self._last.mac,
            nonce=bytes(_NONCE_BYTES),
        )
        block, stored = self._codec.seal(header, encoded, payload)
        # Verify before writing: a record that cannot be read back must not take the place of one that can.
        record = self._read(block, stored or None)
        if record is None or record.body != body or (payload and self._codec.open_payload(block, stored) != payload):
            raise DiskTrouble.of(OSError("a record did not read back from memory"))
        padding = bytes(-len(stored) % BLOCK_BYTES)
        with storage_errors():
            self._medium.pwrite(block + stored + padding, self._offset(sequence))
        self._last = record.position
        return record

    def flush(self) -> None:
        """Everything appended is durable on return. Raises `DiskTrouble`; then only reopening tells what is durable."""
        with storage_errors():
            self._medium.flush()
        self._flushed_sequence = self._last.sequence

    def replay(self, start: Position, *, thorough: bool = False) -> Iterator[Record]:
        """Every record after `start`, oldest first; afterwards the journal stands at its end, ready to append.

        `thorough` looks for later records on the whole medium to tell the end from damage: needed when `start` is not
        the ledger's position, which vouches for everything up to it. Raises `LedgerCorrupt`.
        """
        self.flush()  # what a killed process left in memory must be on the storage before it counts
        if start.sequence:
            block = self._block(start.sequence)
            if self._codec.authenticate(block) is None or not hmac.compare_digest(block[_MAC_AT:], start.mac):
                raise LedgerCorrupt.at_record(start.sequence, "is damaged or missing")
        self._last = start
        while self.free_slots:
            sequence = self._last.sequence + 1
            block = self._block(sequence)
            header = self._codec.authenticate(block)
            continues = (
                header is not None
                and header.sequence == sequence
                and header.epoch == self._epoch
                and header.previous_mac == self._last.mac
            )
            payload = self._payload(header) if header and continues else None
            complete = continues and (payload is not None or not (header and header.payload_bytes))
            if not complete and not self._vouched_for(sequence, thorough=thorough):
                break
            record = self._read(block, payload) if continues else None
            if record is None:
                raise LedgerCorrupt.at_record(sequence, "is damaged")
            self._last = record.position
            yield record
        self._flushed_sequence = self._last.sequence

    def audit(self) -> Iterator[Record]:
        """Every record from the first to the last, read and verified anew. Raises `LedgerCorrupt`."""
        reader = copy.copy(self)
        for record in reader.replay(START, thorough=True):
            yield record
            if record.position == self._last:
                return
        raise LedgerCorrupt.at_record(reader.last.sequence + 1, "is damaged or missing")

    def clear_beyond(self) -> None:
        """Zero what was written beyond the end and never flushed: it counts for nothing, but may hold card data."""
        for sequence in range(self._last.sequence + 1, min(self._last.sequence + UNFLUSHED_MAX, self.capacity) + 1):
            with storage_errors():
                if any(self._medium.pread(SLOT_BYTES, self._offset(sequence))):
                    self._medium.pwrite(bytes(SLOT_BYTES), self._offset(sequence))

    def open_payload(self, trimmed: bytes, payload: bytes) -> bytes:
        """The plaintext of a stored payload, which belongs to the record with these bytes."""
        try:
            return self._codec.open_payload(trimmed, payload)
        except InvalidTag as error:
            sequence = _Header(*_HEADER.unpack_from(trimmed)).sequence
            raise LedgerCorrupt.at_record(sequence, "does not fit its payload") from error

    def erase(self, sequence: int) -> None:
        """Overwrite a record's payload with zeros, in place. Durable with the next `flush`; may be repeated."""
        header = self._codec.authenticate(self._block(sequence))
        if header is None:
            raise LedgerCorrupt.at_record(sequence, "is damaged")
        size_bytes = header.payload_bytes + -header.payload_bytes % BLOCK_BYTES
        with storage_errors():
            self._medium.pwrite(bytes(size_bytes), self._offset(sequence) + BLOCK_BYTES)

    def _read(self, block: bytes, payload: bytes | None) -> Record | None:
        header = self._codec.authenticate(block)
        if header is None:
            return None
        try:
            body = self._codec.open_body(block, header)
        except InvalidTag as error:
            raise self._other_key("data-key") from error
        return Record(
            sequence=header.sequence,
            type=RecordType(header.type),
            epoch=header.epoch,
            boot_id=UUID(bytes=header.boot_id),
            monotonic_ms=header.monotonic_ms,
            wall_ms=header.wall_ms,
            synchronised=bool(header.flags & _SYNCHRONISED),
            mac=block[_MAC_AT:],
            body=body,
            trimmed=block[: _HEADER.size + header.body_bytes] + block[_MAC_AT:],
            payload=payload,
        )

    def _payload(self, header: _Header) -> bytes | None:
        """The stored payload, None where there is none or it is not the one that the record was written with."""
        if not header.payload_bytes:
            return None
        with storage_errors():
            stored = self._medium.pread(header.payload_bytes, self._offset(header.sequence) + BLOCK_BYTES)
        return stored if hashlib.sha256(stored).digest() == header.payload_sha256 else None

    def _vouched_for(self, sequence: int, *, thorough: bool) -> bool:
        """Whether a later record says that this one had been flushed."""
        last = self.capacity if thorough else min(sequence + UNFLUSHED_MAX + 1, self.capacity)
        for later in range(sequence + 1, last + 1):
            header = self._codec.authenticate(self._block(later))
            if header and header.sequence == later and later - 1 - header.unflushed_before >= sequence:
                return True
        return False

    def _block(self, sequence: int) -> bytes:
        with storage_errors():
            return self._medium.pread(BLOCK_BYTES, self._offset(sequence))

    @staticmethod
    def _offset(sequence: int) -> int:
        return (sequence - 1) * SLOT_BYTES

    @staticmethod
    def _other_key(name: str) -> KeyUnavailable:
        return KeyUnavailable(
            f"this ledger was made with another {name}: its sales cannot be read, and nothing was changed; "
            "restore the key that belongs to it, or point the terminal at the right state directory"
        )


def untrim(trimmed: bytes) -> bytes:
    """The whole block of `Record.trimmed`."""
    return trimmed[:-_MAC_BYTES].ljust(_MAC_AT, b"\0") + trimmed[-_MAC_BYTES:]


@contextmanager
def storage_errors() -> Generator[None]:
    """Translate the storage's errors into `DiskTrouble`."""
    try:
        yield
    except OSError as error:
        raise DiskTrouble.of(error) from error

"""The journal: what happened, one record a slot, in an order that cannot be changed afterwards.

A ring of slots on a medium of fixed size, written with zeros when it is made, so that an append overwrites blocks in
place and one flush is one flush. Each record is sealed with the data key and chained with the chain key (layout:
docs/formats.md, Journal). A slot is used again only once its record is reclaimed: archived, erased, nothing waiting.

**Where it ends.** The end is the first slot that does not continue the chain. What lies beyond was written but never
flushed, and can never chain: its predecessor's nonce was random. **Damage or end?** Every record says how many records
before it were not yet flushed when it was written, so every later record vouches for all those before that window. A
gap that somebody vouches for was once safe: that is damage, never the end. Damage is mended from another copy, the
medium's own second one or the ledger's, if that authenticates as fully as the slot would have; otherwise it is
`LedgerCorrupt`. The same rule reads a payload: one that is gone though vouched for was erased (or is named in
`lost_payloads`), one that nobody vouches for was torn by a power cut.

What a record means is left to the store, which applies it; where the bytes lie to `medium`; what may be reclaimed, and
how much room must be kept free, is the ledger's affair.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice
from typing import Any, Final, NamedTuple, TypeAlias
from uuid import UUID

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from terminal.clock import Clock, Entropy
from terminal.ledger.errors import JournalFull, KeyUnavailable, LedgerCorrupt
from terminal.ledger.keys import Keyring, SecretKey
from terminal.ledger.medium import (
    BLOCK_BYTES,
    MAGIC,
    SLOT_BYTES,
    FileMedium,
    Medium,
    MirroredMedium,
    storage_errors,
    sync_directory,
)

__all__ = [
    "BLOCK_BYTES",
    "BODY_BYTES_MAX",
    "PAYLOAD_BYTES_MAX",
    "PAYLOAD_STORED_BYTES_MAX",
    "SLOT_BYTES",
    "START",
    "UNFLUSHED_MAX",
    "Copies",
    "FileMedium",
    "Journal",
    "Medium",
    "Position",
    "Record",
    "RecordCodec",
    "RecordType",
    "storage_errors",
    "sync_directory",
    "untrim",
]

PAYLOAD_STORED_BYTES_MAX: Final = SLOT_BYTES - BLOCK_BYTES
UNFLUSHED_MAX: Final = 32  # how far damage must be looked for beyond the end; a sale takes four records
_SLOTS_MAX: Final = 2**24  # 256 GiB: larger is a mistake in the configuration
_LOOKED_AT_FIRST: Final = 2 * UNFLUSHED_MAX  # of so many slots one can be read, unless nothing can

_VERSION: Final = 1
_SYNCHRONISED: Final = 1
_HEADER: Final = struct.Struct(">4sBBHI4sQ16sQqHHI32s32s12s")
_BODY_BYTES_AT: Final = 56
_SEALED_TO: Final = 128  # associated data of the body: everything before the nonce
_PAYLOAD_SEALED_TO: Final = 64  # associated data of the payload: everything before its own hash
_MAC_BYTES: Final = 32
_MAC_AT: Final = BLOCK_BYTES - _MAC_BYTES
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_NOTHING: Final = bytes(_MAC_BYTES)
_ZEROS: Final = bytes(SLOT_BYTES)

BODY_BYTES_MAX: Final = _MAC_AT - _HEADER.size - _TAG_BYTES
PAYLOAD_BYTES_MAX: Final = PAYLOAD_STORED_BYTES_MAX - _NONCE_BYTES - _TAG_BYTES
assert _HEADER.size == 140  # noqa: S101 (the layout in docs/formats.md)

Copies: TypeAlias = Callable[[int], tuple[bytes, bytes | None] | None]
"""What another copy has of a record: `Record.trimmed` and `Record.payload`."""


class RecordType(IntEnum):
    OPEN = 1
    OUTCOME = 2
    CARD = 3
    SHOWN = 4
    ANSWER = 5
    REVERSAL = 6
    EVENT = 7
    CHECKPOINT = 8


_WITH_CONTENT: Final = frozenset({RecordType.OUTCOME, RecordType.ANSWER})
_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(dict[str, Any]).decode


class Position(NamedTuple):
    """A place in the chain: the last record's number and MAC."""

    sequence: int
    mac: bytes


START: Final = Position(0, _NOTHING)


@dataclass(frozen=True, slots=True)
class Record:
    """One record, authenticated and decrypted.

    `trimmed` are the block's bytes without the zeros before its MAC; `payload` is as stored, sealed, and None when
    there is none or it was erased. `content` is the payload's plaintext, of OUTCOME and ANSWER only: what the others
    hold is for the host.
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
    content: bytes | None = field(repr=False)

    @property
    def position(self) -> Position:
        return Position(self.sequence, self.mac)

    @property
    def previous_mac(self) -> bytes:
        """MAC of the record before."""
        return Header.of(self.trimmed).previous_mac


class Header(NamedTuple):
    """The first 140 bytes of a record."""

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

    @classmethod
    def of(cls, trimmed: bytes) -> Header:
        return cls(*_HEADER.unpack_from(trimmed))

    def packed(self) -> bytes:
        return _HEADER.pack(*self)


class RecordCodec:
    """Records to bytes and back, under the data keys and the chain key."""

    def __init__(self, data: Keyring, chain: SecretKey) -> None:
        self.data_key_id: Final = data.current.id
        self.chain_key_id: Final = chain.id
        self._ciphers = {key.id: AESGCM(key.material) for key in (data.current, *data.retired)}
        self._chain = chain.material

    def seal(self, header: Header, body: bytes, payload: tuple[bytes, bytes] | None) -> tuple[bytes, bytes | None]:
        """`Record.trimmed` and `Record.payload`; `payload` is its nonce and plaintext. The same in, the same out.

        Lengths and, where there is a payload, its hash are filled in here. Raises `KeyUnavailable`.
        """
        cipher = self._cipher(header.data_key_id)
        stored = None
        header = header._replace(body_bytes=len(body) + _TAG_BYTES)
        if payload is not None:
            nonce, plaintext = payload
            header = header._replace(payload_bytes=len(plaintext) + _NONCE_BYTES + _TAG_BYTES)
            stored = nonce + cipher.encrypt(nonce, plaintext, header.packed()[:_PAYLOAD_SEALED_TO])
            # Over the stored bytes: a hash over the plaintext would let anybody test guesses.
            header = header._replace(payload_sha256=hashlib.sha256(stored).digest())
        packed = header.packed()
        front = packed + cipher.encrypt(header.nonce, body, packed[:_SEALED_TO])
        return front + hmac.digest(self._chain, front, "sha256"), stored

    def authenticate(self, trimmed: bytes) -> Header | None:
        """The header, if the chain key made this record."""
        if len(trimmed) < _HEADER.size + _MAC_BYTES or trimmed[:4] != MAGIC:
            return None
        mac = hmac.digest(self._chain, trimmed[:-_MAC_BYTES], "sha256")
        if not hmac.compare_digest(mac, trimmed[-_MAC_BYTES:]):
            return None
        header = Header.of(trimmed)
        return header if header.version == _VERSION else None

    def open_body(self, trimmed: bytes, header: Header) -> bytes:
        """JSON. Raises `KeyUnavailable`, and `InvalidTag` where it was not sealed with the key that it names."""
        sealed = trimmed[_HEADER.size : _HEADER.size + header.body_bytes]
        return self._cipher(header.data_key_id).decrypt(header.nonce, sealed, trimmed[:_SEALED_TO])

    def open_payload(self, trimmed: bytes, stored: bytes) -> bytes:
        """The plaintext of a stored payload, which belongs to this record. Raises `LedgerCorrupt`, `KeyUnavailable`."""
        header = Header.of(trimmed)
        try:
            return self._cipher(header.data_key_id).decrypt(
                stored[:_NONCE_BYTES], stored[_NONCE_BYTES:], trimmed[:_PAYLOAD_SEALED_TO]
            )
        except (InvalidTag, ValueError) as error:
            raise LedgerCorrupt.at_record(header.sequence, "does not fit its payload") from error

    def read(self, trimmed: bytes, payload: bytes | None) -> Record:
        """A record from one of its copies. Raises `LedgerCorrupt` where it is not what the chain key made."""
        header = self.authenticate(trimmed)
        if header is None:
            raise LedgerCorrupt("a copied journal record is not authentic: nothing is taken from it; use another copy")
        if payload is not None and not belongs(payload, header):
            raise LedgerCorrupt.at_record(header.sequence, "does not fit its payload")
        return self.decoded(header, trimmed, payload)

    def decoded(self, header: Header, trimmed: bytes, payload: bytes | None) -> Record:
        """`trimmed` has been authenticated, and `payload` belongs to it."""
        try:
            body = self.open_body(trimmed, header)
        except InvalidTag as error:
            raise other_key("data-key") from error
        type_ = RecordType(header.type)
        return Record(
            sequence=header.sequence,
            type=type_,
            epoch=header.epoch,
            boot_id=UUID(bytes=header.boot_id),
            monotonic_ms=header.monotonic_ms,
            wall_ms=header.wall_ms,
            synchronised=bool(header.flags & _SYNCHRONISED),
            mac=trimmed[-_MAC_BYTES:],
            body=_decode(body),
            trimmed=trimmed,
            payload=payload,
            content=self.open_payload(trimmed, payload) if payload and type_ in _WITH_CONTENT else None,
        )

    def knows(self, data_key_id: bytes) -> bool:
        return data_key_id in self._ciphers

    def _cipher(self, data_key_id: bytes) -> AESGCM:
        cipher = self._ciphers.get(data_key_id)
        if cipher is None:
            raise other_key(f"data-key (id {data_key_id.hex()})")
        return cipher


class _Slot(NamedTuple):
    """An authentic record as it lies in its slot."""

    header: Header
    trimmed: bytes
    payload: bytes | None

    @property
    def complete(self) -> bool:
        return self.payload is not None or not self.header.payload_bytes


class _Scan(NamedTuple):
    """Every authentic record on the medium, and up to which one they vouch."""

    found: frozenset[int]
    vouched: int


class Journal:
    """The chain on its medium. Not thread-safe: the ledger's lock serialises.

    Say `reclaim` before `replay`: what is not reclaimed must be readable, what is may be half overwritten.
    """

    def __init__(
        self,
        medium: Medium,
        *,
        data: Keyring,
        chain: SecretKey,
        epoch: int,
        clock: Clock,
        entropy: Entropy,
        copies: Copies | None = None,
    ) -> None:
        self._medium = medium
        self._mirrored = medium if isinstance(medium, MirroredMedium) else None
        self._codec = RecordCodec(data, chain)
        self._clock = clock
        self._entropy = entropy
        self._copies = copies
        self._begins = self._epoch = epoch
        self._last = START
        self._flushed_sequence = 0
        self._reclaimed = 0
        self._told = False
        self._first: int | None = None
        self.capacity: Final = min(medium.size_bytes // SLOT_BYTES, _SLOTS_MAX)
        self._window: Final = max(1, min(UNFLUSHED_MAX, self.capacity // 2))
        self.restored: Final[list[int]] = []
        """Records whose slot was damaged and rewritten from another copy."""
        self.lost_payloads: Final[list[int]] = []
        """Records whose payload was found damaged, neither erased nor anywhere else to be had."""

    @property
    def last(self) -> Position:
        return self._last

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def reclaimed(self) -> int:
        return self._reclaimed

    @property
    def free_slots(self) -> int:
        return max(0, self.capacity - (self._last.sequence - self._reclaimed))

    @property
    def first(self) -> int:
        """The oldest record that can still be read. Scans the medium when it is asked for the first time."""
        if self._first is None:
            self._first = self._oldest(self._scan()).sequence + 1
        return max(self._first, self._last.sequence - self.capacity + 1)

    def identify(self) -> bool:
        """Whether the journal has begun; if so, take over its epoch and make sure that these are its keys.

        A first record that was cut off while it was written has not begun anything. Raises `KeyUnavailable` for other
        keys, `LedgerCorrupt` where the keys are right and nothing can be read.
        """
        strangers: dict[int, bytes] = {}
        looked_at_first = min(_LOOKED_AT_FIRST, self.capacity)
        for slots in (range(1, looked_at_first + 1), range(looked_at_first + 1, self.capacity + 1)):
            headers = []
            for slot in slots:
                block = self._block(slot)
                if header := self._authentic(block):
                    headers.append(header)
                elif block != _ZEROS[:BLOCK_BYTES] and len(strangers) < _LOOKED_AT_FIRST:
                    strangers[slot] = block
            if headers:
                for header in headers:
                    if not self._codec.knows(header.data_key_id):
                        raise other_key(f"data-key (id {header.data_key_id.hex()})")
                self._epoch = max(header.epoch for header in headers)
                return True
        self._refuse_foreign(strangers.values())
        if len(strangers) > 1:
            raise LedgerCorrupt.at_record(1, "is damaged, and so is every other one")
        return False

    def begin(self, after: Position = START, epoch_of: dict[str, Any] | None = None) -> Record:
        """Write the first record of an epoch, which names the chain key. Durable on return.

        `after` continues a chain: the one in this journal, or one that was restored from elsewhere; `epoch_of` says
        where the epoch before it ended.
        """
        if self._last == START:
            self.reclaim(after.sequence)  # it is not here
        elif after != self._last:
            raise ValueError("an epoch begins after the journal's last record")
        self._last = after
        self._flushed_sequence = after.sequence
        self._epoch = self._begins
        body = {"chain_key": self._codec.chain_key_id.hex(), "epoch_of": epoch_of}
        record = self.append(RecordType.CHECKPOINT, body)
        self.flush()
        return record

    def append(self, type_: RecordType, body: dict[str, Any], payload: bytes = b"") -> Record:
        """Write one record. It is durable only after `flush`. Raises `JournalFull`, `DiskTrouble`."""
        if not self.free_slots:
            raise JournalFull(
                f"the journal's {self.capacity} slots are used up: nothing further can be recorded, what is recorded "
                "is safe; send what is waiting, so that records can be archived and their slots used again"
            )
        encoded = _encode(body)
        if len(encoded) > BODY_BYTES_MAX or len(payload) > PAYLOAD_BYTES_MAX:
            raise ValueError(f"a record takes {BODY_BYTES_MAX} bytes of body and {PAYLOAD_BYTES_MAX} of payload")
        if self._last.sequence - self._flushed_sequence >= self._window:
            self.flush()
        sequence = self._last.sequence + 1
        boot_id = self._clock.boot_id
        header = Header(
            magic=MAGIC,
            version=_VERSION,
            type=type_,
            flags=_SYNCHRONISED if self._clock.synchronised() else 0,
            epoch=self._epoch,
            data_key_id=self._codec.data_key_id,
            sequence=sequence,
            boot_id=boot_id.bytes,
            monotonic_ms=self._clock.monotonic_ms(),
            wall_ms=self._clock.wall_ms(),
            body_bytes=0,
            payload_bytes=0,
            unflushed_before=self._last.sequence - self._flushed_sequence,
            payload_sha256=_NOTHING,
            previous_mac=self._last.mac,
            nonce=self._entropy(_NONCE_BYTES),
        )
        trimmed, stored = self._codec.seal(header, encoded, (self._entropy(_NONCE_BYTES), payload) if payload else None)
        written = self._slot_bytes(sequence, trimmed, stored)
        with storage_errors():
            record = self._read_back(written, body, payload)
            self._medium.pwrite(written, self._offset(sequence))
        self._last = record.position
        return record

    def flush(self) -> None:
        """Everything appended is durable on return. Raises `DiskTrouble`; then only reopening tells what is durable."""
        with storage_errors():
            self._medium.flush()
        self._flushed_sequence = self._last.sequence

    def reclaim(self, through: int) -> None:
        """Records up to this one may be overwritten: they are applied, archived, and nothing waits for them."""
        self._reclaimed = max(self._reclaimed, through)
        self._told = True

    def replay(self, start: Position | None, *, thorough: bool = False) -> Iterator[Record]:
        """Every record after `start`, oldest first; afterwards the journal stands at its end, ready to append.

        None starts at the oldest record that can be read. `thorough`, and None, look for later records on the whole
        medium to tell the end from damage: needed when `start` is not the ledger's position, which vouches for
        everything up to it. What is damaged is mended or raises `LedgerCorrupt`.
        """
        self.flush()  # what a killed process left in memory must be on the storage before it counts
        scan = self._scan() if thorough or start is None else None
        if start is None:
            start = self._oldest(scan or self._scan())
            self._first = start.sequence + 1
        else:
            self._check(start)
        self._last = start
        for record in self._walk(start, self._vouched_nearby if scan is None else scan.vouched.__ge__):
            self._last = record.position
            self._epoch = record.epoch
            yield record
        self._flushed_sequence = self._last.sequence
        self._reclaimed = max(self._reclaimed, self._last.sequence - self.capacity)

    def audit(self, after: Position | None = None) -> Iterator[Record]:
        """Every record from the first, or after that place, to the last, read, verified and where needed mended.

        Reads no further than it is asked for records. Raises `LedgerCorrupt`.
        """
        last = start = self._oldest(self._scan()) if after is None else after
        for record in self._walk(start, self._last.sequence.__ge__):
            yield record
            last = record.position
            if last == self._last:
                return
        if last != self._last:
            raise LedgerCorrupt.at_record(last.sequence + 1, "is damaged or missing")

    def before(self, sequence: int) -> Position:
        """The place right before this record. Raises `LedgerCorrupt` where it is not, or no longer, in the journal."""
        slot = self._slot(sequence) or self._mended(sequence, None, None)
        return Position(sequence - 1, slot.header.previous_mac)

    def read(self, after: Position, limit: int) -> list[Record]:
        """At most so many records of an `audit`."""
        return [] if after == self._last else list(islice(self.audit(after), limit))

    def mend(self, sequence: int) -> None:
        """Make sure that this record is in its slot; where it is not, it is written again from its copy.

        Raises `LedgerCorrupt` where there is none.
        """
        slot = self._slot(sequence)
        if slot is None or not slot.complete:
            self._mended(sequence, None, slot)

    def clear_beyond(self) -> None:
        """Zero what was written beyond the end and never flushed: it counts for nothing, but may hold card data.

        An older record that has its slot still is left alone. What half an overwriting left behind a record, of the one
        that had the slot before or was to have it, is zeroed, too.
        """
        last = self._last.sequence
        for sequence in range(max(1, last - self._window + 1), last + self._window + 1):
            rightful = sequence if sequence <= last else sequence - self.capacity
            if sequence > last and rightful > self._reclaimed:
                return  # nothing could be written there, nor further on
            with storage_errors():
                slot = self._medium.pread(SLOT_BYTES, self._offset(sequence))
                header = self._authentic(slot[:BLOCK_BYTES])
                kept_bytes = 0
                if header is not None and header.sequence == rightful:
                    payload_end = BLOCK_BYTES + header.payload_bytes
                    whole = payload_end == BLOCK_BYTES or belongs(slot[BLOCK_BYTES:payload_end], header)
                    kept_bytes = payload_end if whole else BLOCK_BYTES
                    if sequence <= last and not whole:
                        continue  # erased, or damaged: not for here to decide
                elif sequence <= last:
                    continue
                cleaned = slot[:kept_bytes].ljust(SLOT_BYTES, b"\0")
                if cleaned != slot:
                    self._medium.pwrite(cleaned, self._offset(sequence))

    def open_payload(self, trimmed: bytes, payload: bytes) -> bytes:
        """The plaintext of a stored payload, which belongs to the record with these bytes."""
        return self._codec.open_payload(trimmed, payload)

    def sealed_under(self) -> dict[bytes, int]:
        """How many records in the ring need each data key, by its id. Scans the medium."""
        headers = (self._authentic(self._block(slot)) for slot in range(1, self.capacity + 1))
        return dict(Counter(header.data_key_id for header in headers if header is not None))

    def erase(self, sequence: int) -> None:
        """Overwrite a record's payload with zeros, in place. Durable with the next `flush`; may be repeated.

        Of a record that a later, flushed one or the ledger's position vouches for: else it would look torn, not erased.
        Nothing happens where the record has been overwritten already: its payload went with it.
        """
        if sequence <= self._last.sequence - self.capacity:
            return
        slot = self._slot(sequence)
        if slot is None:
            if sequence <= self._reclaimed:
                return
            slot = self._mended(sequence, None, None)
        size_bytes = slot.header.payload_bytes + -slot.header.payload_bytes % BLOCK_BYTES
        if size_bytes:
            with storage_errors():
                self._medium.pwrite(_ZEROS[:size_bytes], self._offset(sequence) + BLOCK_BYTES)

    # Writing

    def _slot_bytes(self, sequence: int, trimmed: bytes, stored: bytes | None) -> bytes:
        written = untrim(trimmed) + (stored or b"")
        if sequence > self.capacity:  # nothing of what had the slot before may stay behind
            return written.ljust(SLOT_BYTES, b"\0")
        return written + bytes(-len(written) % BLOCK_BYTES)

    def _read_back(self, written: bytes, body: dict[str, Any], payload: bytes) -> Record:
        """Verify before writing: a record that cannot be read back must not take the place of one that can."""
        trimmed = trim(written[:BLOCK_BYTES])
        header = None if trimmed is None else self._codec.authenticate(trimmed)
        if trimmed is not None and header is not None:
            stored = written[BLOCK_BYTES : BLOCK_BYTES + header.payload_bytes] or None
            if stored is None or belongs(stored, header):
                record = self._codec.decoded(header, trimmed, stored)
                content = record.content
                if content is None and stored is not None:
                    content = self._codec.open_payload(trimmed, stored)
                if record.body == body and (content or b"") == payload:
                    return record
        raise OSError("a record did not read back from memory")

    # Reading

    def _walk(self, start: Position, vouched: Callable[[int], bool]) -> Iterator[Record]:
        """What continues the chain after `start`, mended as far as somebody vouches for it."""
        last, epoch = start, None
        while last.sequence - start.sequence < self.capacity:
            sequence = last.sequence + 1
            slot = self._slot(sequence, last.mac, epoch)
            if slot is None or not slot.complete:
                if not vouched(sequence):
                    return
                slot = self._mended(sequence, last.mac, slot)
            record = self._codec.decoded(*slot)
            last, epoch = record.position, record.epoch
            yield record

    def _slot(self, sequence: int, previous_mac: bytes | None = None, epoch: int | None = None) -> _Slot | None:
        """The record in its slot, from whichever of the medium's copies has it; None when it does not fit there."""
        offset = self._offset(sequence)
        for copy, block in enumerate(self._everywhere(BLOCK_BYTES, offset)):
            trimmed = trim(block)
            header = None if trimmed is None else self._codec.authenticate(trimmed)
            if trimmed is None or header is None or not _fits(header, sequence, previous_mac, epoch):
                continue
            payload, elsewhere = self._payload(header, offset + BLOCK_BYTES) if header.payload_bytes else (None, False)
            if copy or elsewhere:
                self._restore(sequence, trimmed, payload)
            return _Slot(header, trimmed, payload)
        return None

    def _payload(self, header: Header, offset: int) -> tuple[bytes | None, bool]:
        """The payload that belongs to the record, and whether only a further copy of the medium has it."""
        for copy, stored in enumerate(self._everywhere(header.payload_bytes, offset)):
            if belongs(stored, header):
                return stored, copy > 0
            if stored == _ZEROS[: len(stored)]:
                break  # erased: a copy that was away meanwhile must not bring it back
        return None, False

    def _mended(self, sequence: int, previous_mac: bytes | None, slot: _Slot | None) -> _Slot:
        """A record that is damaged though somebody vouches for it, from the ledger's copy. Raises `LedgerCorrupt`."""
        copy = self._copy(sequence, previous_mac)
        if slot is None:
            there = self._authentic(self._block(sequence))
            # A newer one has its slot. One that belongs elsewhere was misdirected there, and is damage.
            if there is not None and there.sequence > sequence and (there.sequence - sequence) % self.capacity == 0:
                raise LedgerCorrupt.at_record(sequence, "is no longer in the journal")
            if copy is None:
                raise LedgerCorrupt.at_record(sequence, "is damaged or missing")
            self._restore(sequence, copy.trimmed, copy.payload)
            return copy
        if copy is not None and copy.payload is not None:
            self._restore(sequence, copy.trimmed, copy.payload)
            return copy
        with storage_errors():
            stored = self._medium.pread(slot.header.payload_bytes, self._offset(sequence) + BLOCK_BYTES)
        if stored != _ZEROS[: len(stored)]:
            if copy is not None:
                self.erase(sequence)  # a power cut left half of it
            elif sequence > self._reclaimed:
                self.lost_payloads.append(sequence)
        return slot

    def _copy(self, sequence: int, previous_mac: bytes | None) -> _Slot | None:
        """What the ledger has of a record, if it authenticates as fully as the slot would have."""
        held = None if self._copies is None else self._copies(sequence)
        if held is None:
            return None
        trimmed, payload = held
        header = self._codec.authenticate(trimmed)
        if header is None or not _fits(header, sequence, previous_mac, None):
            return None
        return _Slot(header, trimmed, payload if payload is not None and belongs(payload, header) else None)

    def _restore(self, sequence: int, trimmed: bytes, payload: bytes | None) -> None:
        """Rewrite a damaged slot."""
        with storage_errors():
            slot = (untrim(trimmed) + (payload or b"")).ljust(SLOT_BYTES, b"\0")
            self._medium.pwrite(slot, self._offset(sequence))
            self._medium.flush()
        self.restored.append(sequence)

    def _check(self, start: Position) -> None:
        """`start` must be in the journal, unless it may have been overwritten. Raises `LedgerCorrupt`."""
        if not start.sequence:
            return
        slot = self._slot(start.sequence)
        if slot is None:
            if start.sequence <= self._reclaimed:
                return  # then the record after it names it
            slot = self._mended(start.sequence, None, None)
        if not hmac.compare_digest(slot.trimmed[-_MAC_BYTES:], start.mac):
            raise LedgerCorrupt.at_record(start.sequence, "is another one than the ledger has seen")

    def _scan(self) -> _Scan:
        """Look at every slot's first block."""
        found, vouched = set(), 0
        for slot in range(1, self.capacity + 1):
            for block in self._everywhere(BLOCK_BYTES, self._offset(slot)):
                header = self._authentic(block)
                if header is not None and (header.sequence - slot) % self.capacity == 0:
                    found.add(header.sequence)
                    vouched = max(vouched, header.sequence - 1 - header.unflushed_before)
                    break
        return _Scan(frozenset(found), vouched)

    def _oldest(self, scan: _Scan) -> Position:
        """The place right before the oldest record from which the chain can be read."""
        if not scan.found:
            return START
        first = min(scan.found)
        # Where an overwriting was cut off, some slots still have their older, reclaimed record and some do not.
        overwritten = max(scan.found) - self.capacity
        known = self._told and self._reclaimed >= overwritten
        excused = self._reclaimed if known else overwritten + self._window
        for sequence in range(first, excused + 1):
            if sequence not in scan.found:
                first = sequence + 1
        slot = self._slot(first)
        if first > excused + 1 and not (slot and self._begins_epoch(slot)):
            first, slot = excused + 1, None
        if slot is None:
            slot = self._mended(first, None, None)
        return Position(first - 1, slot.header.previous_mac)

    def _begins_epoch(self, slot: _Slot) -> bool:
        return "epoch_of" in self._codec.decoded(*slot).body

    def _vouched_nearby(self, sequence: int) -> bool:
        """Whether a later record says that this one had been flushed. Further away none can be, if `start` is right."""
        for later in range(sequence + 1, sequence + min(self._window + 1, self.capacity - 1) + 1):
            for block in self._everywhere(BLOCK_BYTES, self._offset(later)):
                header = self._authentic(block)
                if header and header.sequence == later and later - 1 - header.unflushed_before >= sequence:
                    return True
        return False

    def _refuse_foreign(self, blocks: Iterable[bytes]) -> None:
        """Raises `KeyUnavailable` where blocks that do not authenticate were made with other keys."""
        opened = unknown = False
        for block in blocks:
            if block[:4] != MAGIC or block[_MAC_AT:] == _NOTHING:  # torn while it was written
                continue
            header = Header.of(block)
            if not self._codec.knows(header.data_key_id):
                unknown = True
                continue
            try:
                body = _decode(self._codec.open_body(block, header))
            except (InvalidTag, ValueError):
                continue
            if body.get("chain_key") == self._codec.chain_key_id.hex():
                return
            opened = True
        if opened or unknown:
            raise other_key("chain-key" if opened else "data-key")

    def _authentic(self, block: bytes) -> Header | None:
        trimmed = trim(block)
        return None if trimmed is None else self._codec.authenticate(trimmed)

    def _block(self, sequence: int) -> bytes:
        with storage_errors():
            return self._medium.pread(BLOCK_BYTES, self._offset(sequence))

    def _everywhere(self, size_bytes: int, offset: int) -> Iterator[bytes]:
        """What the medium has there, then what its further copies have. The later ones are read only if asked for."""
        with storage_errors():
            first = self._medium.pread(size_bytes, offset)
        yield first
        if self._mirrored is not None:
            with storage_errors():
                others = self._mirrored.pread_all(size_bytes, offset)
            yield from others[1:]

    def _offset(self, sequence: int) -> int:
        return (sequence - 1) % self.capacity * SLOT_BYTES


def trim(block: bytes) -> bytes | None:
    """`Record.trimmed` of a whole block: without the zeros before its MAC. None where that cannot be a record."""
    if len(block) != BLOCK_BYTES or block[:4] != MAGIC:
        return None
    used = _HEADER.size + int.from_bytes(block[_BODY_BYTES_AT : _BODY_BYTES_AT + 2], "big")
    if used > _MAC_AT or block[used:_MAC_AT] != _ZEROS[: _MAC_AT - used]:
        return None
    return block[:used] + block[_MAC_AT:]


def untrim(trimmed: bytes) -> bytes:
    """The whole block of `Record.trimmed`."""
    return trimmed[:-_MAC_BYTES].ljust(_MAC_AT, b"\0") + trimmed[-_MAC_BYTES:]


def belongs(stored: bytes, header: Header) -> bool:
    """Whether this is the payload that the record was written with."""
    return hashlib.sha256(stored).digest() == header.payload_sha256


def other_key(name: str) -> KeyUnavailable:
    return KeyUnavailable(
        f"this ledger was made with another {name}: its sales cannot be read, and nothing was changed; "
        "restore the key that belongs to it, or point the terminal at the right state directory"
    )


def _fits(header: Header, sequence: int, previous_mac: bytes | None, epoch: int | None) -> bool:
    """Whether a record continues the chain. None is not known, hence not compared."""
    return (
        header.sequence == sequence
        and (previous_mac is None or header.previous_mac == previous_mac)
        # Only the first record of an epoch, a CHECKPOINT, may change it.
        and (epoch is None or header.epoch == epoch or header.type == RecordType.CHECKPOINT)
    )

"""A backup: every record of a ledger in one sealed file, to be kept where the terminal is not.

The records go in as they stand, sealed and chained, so that a restored journal is verified like any other. Around them
the file is sealed once more, in chunks, with a key of its own that is derived from the data key, the header and fresh
randomness. Each chunk is bound to its number and to whether it is the last: a file that was cut short, put together
differently or made under another header does not open. **No key is inside.** Whoever keeps a backup must keep the data
key and the chain key, too, in another place; without them nobody reads it, its maker included.

Writing is all or nothing: a file with another name, flushed, read back from the storage and only then renamed; what is
there already is never overwritten. Memory stays bounded by one chunk, however long the ledger is. Which records there
are, and what a restored ledger does with them, is left to the caller.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import struct
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from terminal.clock import Entropy
from terminal.ledger.errors import BackupError, KeyUnavailable
from terminal.ledger.journal import BLOCK_BYTES, PAYLOAD_STORED_BYTES_MAX, START, Position
from terminal.ledger.keys import Keyring, SecretKey, opened

CHUNK_BYTES: Final = 256 * 1024  # plaintext: large enough to compress, small beside a Pi's memory

_MAGIC: Final = b"PTB1"
_VERSION: Final = 1
_HEADER: Final = struct.Struct(">4sB3x4s4sIQ32sq32s")
_FRAME: Final = struct.Struct(">IB")  # length of the sealed chunk, 1 for the last
_RECORD: Final = struct.Struct(">HH")  # lengths of record and payload, 0 for no payload
_NONCE: Final = struct.Struct(">QxxxB")  # number of the chunk, 1 for the last; the key is of this file alone
_MAC_BYTES: Final = 32
_SALT_BYTES: Final = 32
_TAG_BYTES: Final = 16
_SEALED_BYTES_MAX: Final = CHUNK_BYTES + CHUNK_BYTES // 1000 + 64 + _TAG_BYTES  # zlib adds 5 bytes in 16 KiB at worst
_COMPRESSION: Final = 1  # records are ciphertext: only their headers give way, and a higher level finds no more in them

Copy: TypeAlias = tuple[bytes, bytes | None]
"""A record without the zeros before its MAC, and its payload as stored."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a backup holds. `position` is that of its last record."""

    epoch: int
    position: Position
    made_at_ms: int
    data_key_id: bytes
    chain_key_id: bytes
    records: int
    size_bytes: int

    @property
    def keys_needed(self) -> str:
        """For people, to be shown whenever a backup was made."""
        return (
            f"NO KEY IS IN THIS BACKUP. Without the data key {self.data_key_id.hex()} and the chain key "
            f"{self.chain_key_id.hex()} nobody can read it, you included. Keep copies of both in another place than "
            "the backup, and of every retired data key that is still there."
        )


def write(
    path: Path,
    *,
    epoch: int,
    position: Position,
    records: Iterable[Copy],
    data: Keyring,
    chain: SecretKey,
    made_at_ms: int,
    entropy: Entropy,
) -> Contents:
    """Write a backup of `records`, which end at `position`, and read it back.

    A file that is there already is not touched. Raises `BackupError`; errors of `records` pass through. Then there is
    no backup.
    """
    header = _HEADER.pack(
        _MAGIC,
        _VERSION,
        data.current.id,
        chain.id,
        epoch,
        position.sequence,
        position.mac,
        made_at_ms,
        entropy(_SALT_BYTES),
    )
    unfinished = path.name + ".new"
    with _storage(path), opened(path.parent) as directory:
        _refuse_to_overwrite(path)
        descriptor = _create(path, unfinished, directory)
        try:
            with open(descriptor, "w+b") as file:  # noqa: PTH123 (a descriptor, not a path)
                tally = _Tally()
                file.write(header)
                for number, (chunk, last) in enumerate(_chunks(records, tally)):
                    file.write(_seal(_cipher(data.current, header), number, chunk, last=last))
                if tally.position_mac != position.mac:
                    raise BackupError(
                        f"the records given for {path} do not end where the ledger does: no backup was made, and the "
                        "ledger is as it was; check the ledger before anything else"
                    )
                file.flush()
                os.fsync(descriptor)
                # Read back what the storage holds, not what memory remembers.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                found, contents = _survey(path, file, data, chain)
                if found != tally:
                    raise _damaged(path, "holds other records than were written")
            _refuse_to_overwrite(path)  # it took a while; no hard link instead, which a FAT stick could not make
            os.rename(unfinished, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(OSError):
                os.unlink(unfinished, dir_fd=directory)
            raise
        os.fsync(directory)
    return contents


def verify(path: Path, data: Keyring, chain: SecretKey) -> Contents:
    """Read a whole backup. Raises `BackupError`, and `KeyUnavailable` where its keys are not these."""
    with _storage(path), _open(path) as file:
        return _survey(path, file, data, chain)[1]


def read(path: Path, data: Keyring, chain: SecretKey) -> Iterator[Copy]:
    """Every record of a backup, in order. The whole file is verified before the first one is given.

    Raises `BackupError`, and `KeyUnavailable` where its keys are not these.
    """
    with _storage(path), _open(path) as file:
        _survey(path, file, data, chain)
        for chunk in _opened_chunks(path, file, _read_header(path, file, data, chain)):
            yield from _split(path, chunk)


@dataclass(slots=True)
class _Tally:
    """What went by: two that are equal saw the same records."""

    records: int = 0
    position_mac: bytes = START.mac
    digest: bytes = field(default=bytes(32), repr=False)

    def add(self, trimmed: bytes, payload: bytes | None) -> bytes:
        """Count one record; it is returned as it stands in a chunk."""
        framed = b"".join((_RECORD.pack(len(trimmed), len(payload or b"")), trimmed, payload or b""))
        self.records += 1
        self.position_mac = trimmed[-_MAC_BYTES:]
        self.digest = hashlib.sha256(self.digest + framed).digest()
        return framed


@dataclass(frozen=True, slots=True)
class _Opened:
    """A header that was read, and the cipher of its chunks."""

    epoch: int
    position: Position
    made_at_ms: int
    data_key_id: bytes
    cipher: AESGCM = field(repr=False)


def _chunks(records: Iterable[Copy], tally: _Tally) -> Iterator[tuple[bytes, bool]]:
    """Records in chunks, and whether it is the last one, which may be empty."""
    pending = bytearray()
    for trimmed, payload in records:
        if not _MAC_BYTES <= len(trimmed) <= BLOCK_BYTES:
            raise ValueError(f"a record has {_MAC_BYTES} to {BLOCK_BYTES} bytes")
        if payload is not None and not 0 < len(payload) <= PAYLOAD_STORED_BYTES_MAX:
            raise ValueError(f"a stored payload has 1 to {PAYLOAD_STORED_BYTES_MAX} bytes")
        framed = tally.add(trimmed, payload)
        if len(pending) + len(framed) > CHUNK_BYTES:
            yield bytes(pending), False
            pending.clear()
        pending += framed
    yield bytes(pending), True


def _cipher(key: SecretKey, header: bytes) -> AESGCM:
    """The key of one file: the salt in its header makes it unique, and another header makes another key."""
    return AESGCM(hmac.digest(key.derive(b"payterm backup 1"), header, "sha256"))


def _seal(cipher: AESGCM, number: int, chunk: bytes, *, last: bool) -> bytes:
    sealed = cipher.encrypt(_NONCE.pack(number, last), zlib.compress(chunk, _COMPRESSION), None)
    return _FRAME.pack(len(sealed), last) + sealed


def _survey(path: Path, file: BinaryIO, data: Keyring, chain: SecretKey) -> tuple[_Tally, Contents]:
    """Read everything once; afterwards the file stands at its beginning."""
    file.seek(0)
    header, tally = _read_header(path, file, data, chain), _Tally()
    for chunk in _opened_chunks(path, file, header):
        for trimmed, payload in _split(path, chunk):
            tally.add(trimmed, payload)
    if tally.position_mac != header.position.mac:
        raise _damaged(path, "does not end where its header says")
    size_bytes = file.tell()
    file.seek(0)
    return tally, Contents(
        epoch=header.epoch,
        position=header.position,
        made_at_ms=header.made_at_ms,
        data_key_id=header.data_key_id,
        chain_key_id=chain.id,
        records=tally.records,
        size_bytes=size_bytes,
    )


def _read_header(path: Path, file: BinaryIO, data: Keyring, chain: SecretKey) -> _Opened:
    packed = file.read(_HEADER.size)
    if len(packed) < _HEADER.size or not packed.startswith(_MAGIC):
        raise BackupError(f"{path} is no backup of a terminal: nothing was used of it; name the right file")
    _, version, data_id, chain_id, epoch, sequence, mac, made_at_ms, _ = _HEADER.unpack(packed)
    if version != _VERSION:
        raise BackupError(
            f"{path} was written in form {version}, and this release reads form {_VERSION}: nothing was used of it; "
            "read it with the release that wrote it, or a newer one"
        )
    key = data.by_id(data_id)
    if key is None:
        raise _other_key(path, "data key", data_id)
    if chain_id != chain.id:
        raise _other_key(path, "chain key", chain_id)
    return _Opened(epoch, Position(sequence, mac), made_at_ms, data_id, _cipher(key, packed))


def _opened_chunks(path: Path, file: BinaryIO, header: _Opened) -> Iterator[bytes]:
    """Every chunk after the header, up to the last one, after which there is nothing."""
    number, last = 0, 0
    while not last:
        frame = file.read(_FRAME.size)
        if len(frame) < _FRAME.size:
            raise _damaged(path, f"ends before chunk {number}")
        length_bytes, last = _FRAME.unpack(frame)
        if length_bytes > _SEALED_BYTES_MAX or last > 1:
            raise _damaged(path, f"is damaged before chunk {number}")
        sealed = file.read(length_bytes)
        try:
            inflater = zlib.decompressobj()
            chunk = inflater.decompress(header.cipher.decrypt(_NONCE.pack(number, last), sealed, None), CHUNK_BYTES + 1)
        except (InvalidTag, zlib.error):
            raise _damaged(path, f"is damaged in chunk {number}") from None
        if not inflater.eof or inflater.unused_data or len(chunk) > CHUNK_BYTES:
            raise _damaged(path, f"holds more in chunk {number} than it may")
        yield chunk
        number += 1
    if file.read(1):
        raise _damaged(path, "goes on after its last chunk")


def _split(path: Path, chunk: bytes) -> Iterator[Copy]:
    at = 0
    while at < len(chunk):
        try:
            record_bytes, payload_bytes = _RECORD.unpack_from(chunk, at)
        except struct.error:
            raise _damaged(path, "holds half a record") from None
        start, middle = at + _RECORD.size, at + _RECORD.size + record_bytes
        at = middle + payload_bytes
        if at > len(chunk):
            raise _damaged(path, "holds half a record")
        yield chunk[start:middle], chunk[middle:at] or None


def _refuse_to_overwrite(path: Path) -> None:
    if os.path.lexists(path):
        raise BackupError(f"{path} is there already and was left as it is: no backup was made; name another file")


def _create(path: Path, unfinished: str, directory: int) -> int:
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return os.open(unfinished, flags, stat.S_IRUSR | stat.S_IWUSR, dir_fd=directory)
    except FileExistsError:
        raise BackupError(
            f"{path.with_name(unfinished)} is there: another backup to this file is being made, or one was "
            "interrupted; no backup was made; if none is running, remove it, it counts for nothing"
        ) from None


@contextmanager
def _open(path: Path) -> Generator[BinaryIO]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BackupError(f"{path} is not a regular file: nothing was used of it; name the right file")
    with open(descriptor, "rb") as file:  # noqa: PTH123 (a descriptor, not a path)
        yield file


@contextmanager
def _storage(path: Path) -> Generator[None]:
    """Translate the storage's errors."""
    try:
        yield
    except OSError as error:
        raise BackupError(
            f"the backup {path} could not be written or read ({error.strerror}): the ledger is not concerned, but "
            "there is no backup; check the medium, its free space and the right to write there"
        ) from error


def _damaged(path: Path, what: str) -> BackupError:
    return BackupError(
        f"the backup {path} {what}: nothing of it may be used, and the ledger is not concerned; use another backup, "
        "and make a new one while the terminal is well"
    )


def _other_key(path: Path, kind: str, id_: bytes) -> KeyUnavailable:
    return KeyUnavailable(
        f"the backup {path} was made with the {kind} {id_.hex()}, which is not here: it cannot be read, and nothing "
        "was changed; bring that key"
    )

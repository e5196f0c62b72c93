"""Where the journal's bytes lie: a file, a partition, or either with a second copy elsewhere.

A medium is a row of slots, each as large as a flash page and, where that can be found out, aligned with the pages of
the device: alignment in a file is not alignment on the card, so the slots of a file begin at whichever block makes them
so (0, 4, 8 or 12 KiB), and are found again by the mark on every record. What the bytes mean, and which copy is
authentic, is the journal's affair; here nothing is decided but what can be read and written.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeAlias, runtime_checkable

from terminal.ledger.errors import DiskTrouble, LedgerError

BLOCK_BYTES: Final = 4096  # what a card's controller programs at once
SLOT_BYTES: Final = 16384  # a flash page: destroying one harms one record
MAGIC: Final = b"PTJ1"  # the mark on every record

_PIECE_BYTES: Final = 1 << 20  # at a time, when much is read or written
_SLOTS_LOOKED_AT: Final = 64  # for the mark: more than a power cut can tear
_ATTEMPTS: Final = 4  # at a file whose pieces lie alike on the device: the file system seldom needs a second
_SECTOR_BYTES: Final = 512  # sysfs counts in these, whatever the device

_DEVICES: Final = Path("/sys/dev/block")

_FIEMAP: Final = 0xC020660B  # FS_IOC_FIEMAP, linux/fiemap.h
_FIEMAP_SYNC: Final = 1
_FIEMAP_HEAD: Final = struct.Struct("=QQLLLL")
_FIEMAP_EXTENT: Final = struct.Struct("=QQQ16xL12x")
_FIEMAP_EXTENTS: Final = 128  # at a time
_EXTENTS_MAX: Final = 4096  # a journal in more pieces than that is not worth mapping
_EXTENT_LAST: Final = 0x1
# Unknown place, not allocated yet, encoded, not aligned to blocks, inside metadata: no place on the device to speak of.
_EXTENT_PLACELESS: Final = 0x2 | 0x4 | 0x8 | 0x100 | 0x200

_SIGNATURES: Final = (  # what is told by name when a partition is not free
    (1080, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    (0, b"LUKS\xba\xbe", "an encrypted volume"),
    (0, b"XFSB", "an XFS file system"),
    (0x10040, b"_BHRfS_M", "a btrfs file system"),
    (1024, b"\x10\x20\xf5\xf2", "an F2FS file system"),
    (4086, b"SWAPSPACE2", "swap space"),
    (510, b"\x55\xaa", "a partition table or a FAT file system"),
)


class PartitionTaken(LedgerError):
    """The partition named for the journal is in use or holds something else. Nothing was written to it."""


class Medium(Protocol):
    """Where the journal lies: a file, a partition, or a test's memory. Errors are `OSError`."""

    @property
    def size_bytes(self) -> int: ...

    def pread(self, size_bytes: int, offset: int) -> bytes: ...

    def pwrite(self, data: bytes, offset: int) -> None: ...

    def flush(self) -> None:
        """Return only when everything written is on the storage (fdatasync)."""

    def close(self) -> None: ...


@runtime_checkable
class MirroredMedium(Medium, Protocol):
    """A medium with further copies."""

    def pread_all(self, size_bytes: int, offset: int) -> list[bytes]:
        """What each copy that can be read has there; the one that `pread` prefers comes first."""
        ...


@dataclass(frozen=True, slots=True)
class Aligned:
    """Every slot is one flash page, if the device's pages are 16 KiB and begin where the device does."""


@dataclass(frozen=True, slots=True)
class Misaligned:
    """Slots begin so many bytes behind the beginning of a page, at least some of them."""

    skew_bytes: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """The system does not say where the bytes lie."""

    reason: str


Alignment: TypeAlias = Aligned | Misaligned | Unknown


class FileMedium:
    """A file or block device that exists already. `start_bytes` is where its first slot begins."""

    def __init__(self, path: Path) -> None:
        status = path.stat()  # a partition is named by a link, as a rule
        if stat.S_ISBLK(status.st_mode):
            # Exclusive: refused while it is mounted or part of something, and nobody can mount it meanwhile.
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_EXCL)
        else:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            found = _marked_start(self._descriptor)
            whole_bytes = os.lseek(self._descriptor, 0, os.SEEK_END)
            self.begun: bool = found is not None
            self.start_bytes: int = _aligning_start(_skew(self._descriptor)) if found is None else found
        except BaseException:
            os.close(self._descriptor)
            raise
        self.size_bytes: int = max(0, whole_bytes - self.start_bytes) // SLOT_BYTES * SLOT_BYTES

    @classmethod
    def create(cls, path: Path, size_bytes: int) -> FileMedium:
        """Open the journal, first making the file with zeros where there is none: whole or not at all.

        Of a partition the whole is used, whatever `size_bytes` says. Raises `PartitionTaken`.
        """
        if path.is_block_device():
            return cls._partition(path)
        if not path.exists():
            unfinished = path.with_name(path.name + ".new")
            for _ in range(_ATTEMPTS):
                _make_zeros(unfinished, size_bytes // SLOT_BYTES * SLOT_BYTES + SLOT_BYTES - BLOCK_BYTES)
                if not isinstance(alignment(unfinished), Misaligned):
                    break
            unfinished.replace(path)
            sync_directory(path.parent)
        return cls(path)

    @classmethod
    def _partition(cls, path: Path) -> FileMedium:
        try:
            medium = cls(path)
        except OSError as error:
            raise _taken(path, f"cannot be had for the journal alone ({error.strerror})") from error
        if not medium.begun and (holds := _contents(medium._descriptor)) is not None:
            medium.close()
            raise _taken(path, f"holds {holds}")
        return medium

    @property
    def alignment(self) -> Alignment:
        """How the slots lie on the device."""
        return _alignment(self._descriptor, self.start_bytes)

    def pread(self, size_bytes: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size_bytes, self.start_bytes + offset)

    def pwrite(self, data: bytes, offset: int) -> None:
        written = os.pwrite(self._descriptor, data, self.start_bytes + offset)
        if written != len(data):
            raise OSError(f"wrote {written} of {len(data)} bytes")

    def flush(self) -> None:
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def alignment(path: Path) -> Alignment:
    """How the slots of the journal at `path` lie on the device. Raises `DiskTrouble`."""
    with storage_errors():
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _alignment(descriptor, _marked_start(descriptor))
        finally:
            os.close(descriptor)


class MirrorMedium:
    """A medium and a second copy of it, as a rule on another device.

    The second copy never stops the first: when it fails or is missing, `on_trouble` is told why, once, and work goes on
    without it. It is never made here, since an empty mount point would then be filled in its place. `resync`, in idle
    time, takes it back and brings it up to date; `on_trouble` is told None when it is whole again.
    """

    def __init__(self, primary: Medium, secondary_path: Path, on_trouble: Callable[[str | None], None]) -> None:
        self._primary = primary
        self._path = secondary_path
        self._on_trouble = on_trouble
        self._secondary: FileMedium | None = None
        self._told = False
        self._copied_bytes = 0  # how far it is known to be as the primary; nothing is after a start
        self.size_bytes: Final = primary.size_bytes
        self._take_back()

    @property
    def behind_bytes(self) -> int:
        """How much of the second copy has not been compared with the first since it came: 0 is in step."""
        return self.size_bytes - self._copied_bytes

    def pread(self, size_bytes: int, offset: int) -> bytes:
        try:
            return self._primary.pread(size_bytes, offset)
        except OSError:
            if self._secondary is None:
                raise
            return self._secondary.pread(size_bytes, offset)

    def pread_all(self, size_bytes: int, offset: int) -> list[bytes]:
        """What each has there, the first copy first. Raises `OSError` when none can be read."""
        read = [self.pread(size_bytes, offset)]
        if self._secondary is not None:
            with self._degrading():
                read.append(self._secondary.pread(size_bytes, offset))
        return read

    def pwrite(self, data: bytes, offset: int) -> None:
        self._primary.pwrite(data, offset)
        if self._secondary is not None:
            with self._degrading():
                self._secondary.pwrite(data, offset)

    def flush(self) -> None:
        self._primary.flush()
        if self._secondary is not None:
            with self._degrading():
                self._secondary.flush()

    def close(self) -> None:
        self._primary.close()
        if self._secondary is not None:
            self._secondary.close()

    def resync(self, pieces: int = 16) -> int:
        """Make the next so many MiB of the second copy as the first; how many bytes are left to do.

        Only after `Journal.audit`, which mends the first copy from the second: here the first is right. Bounded, so
        that a sale does not wait. Raises `OSError` when the first cannot be read.
        """
        if self._secondary is None:
            self._take_back()
        for _ in range(pieces):
            if self._secondary is None or not self.behind_bytes:
                break
            offset = self._copied_bytes
            right = self._primary.pread(min(_PIECE_BYTES, self.behind_bytes), offset)
            with self._degrading():
                if self._secondary.pread(len(right), offset) != right:
                    self._secondary.pwrite(right, offset)
                    self._secondary.flush()
                self._copied_bytes = offset + len(right)
        if self._secondary is not None and not self.behind_bytes:
            self._tell(None)
        return self.behind_bytes

    def _take_back(self) -> None:
        self._copied_bytes = 0
        with self._degrading():
            secondary = FileMedium(self._path)
            if secondary.size_bytes < self.size_bytes:
                secondary.close()
                raise OSError(f"{self._path} has {secondary.size_bytes} bytes, the journal {self.size_bytes}")
            self._secondary = secondary

    @contextmanager
    def _degrading(self) -> Generator[None]:
        """Let go of a second copy that fails: from then on it is not as the first."""
        try:
            yield
        except OSError as error:
            if self._secondary is not None:
                with suppress(OSError):
                    self._secondary.close()
            self._secondary, self._copied_bytes = None, 0
            self._tell(
                f"the journal's second copy failed ({error}): sales go on with one copy; "
                "bring the storage back or replace it"
            )

    def _tell(self, trouble: str | None) -> None:
        if self._told is not (trouble is not None):
            self._told = trouble is not None
            self._on_trouble(trouble)


def sync_directory(directory: Path) -> None:
    """Make names in a directory durable: renames and new files are not until then."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors() -> Generator[None]:
    """Translate the storage's errors into `DiskTrouble`."""
    try:
        yield
    except OSError as error:
        raise DiskTrouble.of(error) from error


def _make_zeros(path: Path, size_bytes: int) -> None:
    """A file of zeros, in as few pieces as the file system can, durable but for its name."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, stat.S_IRUSR | stat.S_IWUSR)
    with open(descriptor, "wb") as file:  # noqa: PTH123 (a descriptor, not a path)
        os.posix_fallocate(descriptor, 0, size_bytes)
        zeros = bytes(_PIECE_BYTES)
        for offset in range(0, size_bytes, len(zeros)):
            file.write(zeros[: size_bytes - offset])
        file.flush()
        os.fsync(descriptor)


def _marked_start(descriptor: int) -> int | None:
    """Where the slots begin, by the records in them; None when there is no record yet."""
    for piece, offset in _pieces(descriptor):
        marks = dict.fromkeys(range(0, SLOT_BYTES, BLOCK_BYTES), 0)
        for at in range(0, len(piece), BLOCK_BYTES):
            if piece.startswith(MAGIC, at):
                marks[(offset + at) % SLOT_BYTES] += 1
        start = max(marks, key=marks.__getitem__)
        if marks[start]:
            return start
    return None


def _pieces(descriptor: int) -> Iterator[tuple[bytes, int]]:
    for offset in range(0, os.lseek(descriptor, 0, os.SEEK_END), _PIECE_BYTES):
        yield os.pread(descriptor, _PIECE_BYTES, offset), offset


def _alignment(descriptor: int, start: int | None) -> Alignment:
    skew = _skew(descriptor)
    if not isinstance(skew, int):
        return skew
    off = (skew + (_aligning_start(skew) if start is None else start)) % SLOT_BYTES
    return Misaligned(off) if off else Aligned()


def _aligning_start(skew: int | Misaligned | Unknown) -> int:
    """Where slots must begin to be aligned; 0 where nothing helps."""
    start = -skew % SLOT_BYTES if isinstance(skew, int) else 0
    return 0 if start % BLOCK_BYTES else start


def _skew(descriptor: int) -> int | Misaligned | Unknown:
    """How far the beginning of the file, or partition, is behind the beginning of a flash page.

    `Misaligned` when the file lies in pieces that differ in this.
    """
    status = os.fstat(descriptor)
    if stat.S_ISBLK(status.st_mode):
        return _begin(status.st_rdev)
    try:
        extents = _extents(descriptor)
    except OSError as error:
        return Unknown(f"the file system does not say where a file lies ({error.strerror})")
    if not extents:
        return Unknown("the file system does not say where this file lies")
    if any(flags & _EXTENT_PLACELESS for _, _, flags in extents):
        return Unknown("part of the file has no place on the device that could be named")
    begin = _begin(status.st_dev)
    if isinstance(begin, Unknown):
        return begin
    first, *others = sorted({(begin + physical - logical) % SLOT_BYTES for logical, physical, _ in extents})
    return Misaligned(others[0] - first) if others else first


def _begin(device: int) -> int | Unknown:
    """How far the beginning of a block device is behind the beginning of a flash page; sysfs knows."""
    if not os.major(device):
        return Unknown("the file system is not on one block device")
    node = (_DEVICES / f"{os.major(device)}:{os.minor(device)}").resolve()
    try:
        is_part = (node / "partition").exists()
        begin = int((node / "start").read_text(encoding="ascii")) * _SECTOR_BYTES if is_part else 0
    except (OSError, ValueError) as error:
        return Unknown(f"the system does not say where the partition begins ({error})")
    if not ((node.parent if is_part else node) / "device").exists():
        return Unknown("the block device is made of another one, or of a file")
    return begin % SLOT_BYTES


def _extents(descriptor: int) -> list[tuple[int, int, int]]:
    """Offset in the file, offset on the device, and flags of each piece of a file. Raises `OSError`."""
    found: list[tuple[int, int, int]] = []
    position = 0
    while len(found) < _EXTENTS_MAX:
        asked = bytearray(_FIEMAP_HEAD.size + _FIEMAP_EXTENTS * _FIEMAP_EXTENT.size)
        _FIEMAP_HEAD.pack_into(asked, 0, position, 2**64 - 1 - position, _FIEMAP_SYNC, 0, _FIEMAP_EXTENTS, 0)
        fcntl.ioctl(descriptor, _FIEMAP, asked)
        count = _FIEMAP_HEAD.unpack_from(asked)[3]
        for at in range(_FIEMAP_HEAD.size, _FIEMAP_HEAD.size + count * _FIEMAP_EXTENT.size, _FIEMAP_EXTENT.size):
            logical, physical, length, flags = _FIEMAP_EXTENT.unpack_from(asked, at)
            found.append((logical, physical, flags))
            position = logical + length
        if not count or found[-1][2] & _EXTENT_LAST:
            return found
    raise OSError(0, f"more than {_EXTENTS_MAX} pieces")


def _contents(descriptor: int) -> str | None:
    """What a partition holds; None when it is all zeros."""
    head = os.pread(descriptor, _PIECE_BYTES, 0)
    for at, signature, name in _SIGNATURES:
        if head.startswith(signature, at):
            return name
    if any(piece.count(0) != len(piece) for piece, _ in _pieces(descriptor)):
        return "data that is not a journal"
    return None


def _taken(path: Path, what: str) -> PartitionTaken:
    return PartitionTaken(
        f"{path} {what}: nothing was written to it, and no sale can be recorded; name a partition that is the "
        "journal's alone, and fill it with zeros first"
    )

"""Where the journal lies: files that are aligned or say that they are not, partitions that are free, a second copy."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from journal_rig import Copied, event, journal
from ledger_rig import MemoryMedium

from terminal.ledger import medium as medium_module
from terminal.ledger.errors import DiskTrouble, LedgerCorrupt
from terminal.ledger.journal import BLOCK_BYTES, SLOT_BYTES, START, Journal
from terminal.ledger.medium import (
    MAGIC,
    Aligned,
    FileMedium,
    Medium,
    MirroredMedium,
    MirrorMedium,
    Misaligned,
    PartitionTaken,
    Unknown,
    alignment,
)

SIZE_BYTES = 24 * SLOT_BYTES


def begun(medium: Medium, count: int = 3) -> Journal:
    written = journal(medium)
    written.identify()
    written.begin()
    for number in range(count):
        event(written, number, b"payload")
        written.flush()
    return written


def first_extents(path: Path) -> list[tuple[int, int]]:
    """Logical and physical offsets by the system's own tool, to check what the module says."""
    text = subprocess.run(["filefrag", "-e", "-b4096", path], check=True, capture_output=True, text=True).stdout
    rows = [line.split(":") for line in text.splitlines() if line.strip()[:1].isdigit()]
    return [(int(row[1].split("..")[0]) * 4096, int(row[2].split("..")[0]) * 4096) for row in rows]


def test_a_journal_file_is_made_whole_and_private(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    medium = FileMedium.create(path, SIZE_BYTES)
    assert medium.size_bytes == SIZE_BYTES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["journal"]
    assert not any(path.read_bytes())
    assert path.stat().st_blocks * 512 >= SIZE_BYTES  # allocated: an append allocates nothing
    begun(medium)
    medium.close()
    again = FileMedium.create(path, 10 * SIZE_BYTES)
    assert again.size_bytes == SIZE_BYTES
    assert len(list(journal(again).replay(START))) == 4
    again.close()


def test_slots_are_aligned_on_the_device_or_said_to_be_not(tmp_path: Path) -> None:
    """Files of odd sizes in between, so that some begin at an odd block."""
    seen = set()
    for number in range(12):
        (tmp_path / f"odd-{number}").write_bytes(bytes(4096))
        path = tmp_path / f"journal-{number}"
        medium = FileMedium.create(path, SIZE_BYTES)
        found = medium.alignment
        assert found == alignment(path)
        seen.add(type(found))
        begin = None if isinstance(found, Unknown) else device_begin(tmp_path)
        if isinstance(found, Aligned) and begin is not None and shutil.which("filefrag"):
            for logical, physical in first_extents(path):
                assert (begin + physical - logical + medium.start_bytes) % SLOT_BYTES == 0
        begun(medium)
        medium.close()
        again = FileMedium(path)
        assert (again.start_bytes, again.alignment) == (medium.start_bytes, found)
        again.close()
    assert seen <= {Aligned, Unknown, Misaligned}


def device_begin(path: Path) -> int:
    device = path.stat().st_dev
    start = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/start")
    return int(start.read_text()) * 512 if start.exists() else 0


def said_extents(monkeypatch: pytest.MonkeyPatch, *extents: tuple[int, int, int]) -> None:
    """The system's answer, as it would be: logical and physical offset, flags."""

    def ioctl(_: int, request: int, asked: bytearray) -> int:
        assert request == 0xC020660B
        start = int.from_bytes(asked[:8], "little")
        left = [extent for extent in extents if extent[0] >= start]
        struct.pack_into("=L", asked, 20, len(left))
        for number, (logical, physical, flags) in enumerate(left):
            last = 1 if (logical, physical, flags) == extents[-1] else 0
            struct.pack_into("=QQQ16xL12x", asked, 32 + 56 * number, logical, physical, 1 << 20, flags | last)
        return 0

    monkeypatch.setattr(medium_module.fcntl, "ioctl", ioctl)


@pytest.mark.parametrize(
    ("begin", "extents", "expected"),
    [
        (0, [(0, 1 << 30, 0)], (Aligned(), 0)),
        (0, [(0, (1 << 30) + 4096, 0)], (Aligned(), 12288)),
        (4096 * 3, [(0, 1 << 30, 0), (1 << 20, 1 << 28, 0)], (Aligned(), 4096)),
        (63 * 512, [(0, 1 << 30, 0)], (Misaligned(63 * 512 % SLOT_BYTES), 0)),
        (0, [(0, 1 << 30, 0), (1 << 20, (1 << 28) + 8192, 0)], (Misaligned(8192), 0)),
        (0, [(0, 1 << 30, 0x2)], ("no place", 0)),
        (0, [(0, 1 << 30, 0x4)], ("no place", 0)),
        (0, [(0, 1 << 30, 0x200)], ("no place", 0)),
        (0, [], ("does not say", 0)),
    ],
)
def test_alignment_counts_partition_and_pieces(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    begin: int,
    extents: list[tuple[int, int, int]],
    expected: tuple[object, int],
) -> None:
    found, start = expected
    said_extents(monkeypatch, *extents)
    monkeypatch.setattr(medium_module, "_begin", lambda _: begin % SLOT_BYTES)
    medium = FileMedium.create(tmp_path / "journal", SIZE_BYTES)
    assert medium.start_bytes == start
    assert medium.size_bytes == SIZE_BYTES
    if isinstance(found, str):
        assert isinstance(medium.alignment, Unknown)
        assert found in medium.alignment.reason
    else:
        assert medium.alignment == found
    begun(medium)
    medium.close()
    # The file moves, say by a copy: the slots are where they are, and that they are off now is said.
    said_extents(monkeypatch, (0, (1 << 30) + 8192 - begin % SLOT_BYTES, 0))
    moved = FileMedium(tmp_path / "journal")
    assert moved.start_bytes == start
    assert len(list(journal(moved).replay(START))) == 4
    assert moved.alignment == (Aligned() if start == 8192 else Misaligned((8192 + start) % SLOT_BYTES))
    moved.close()


@pytest.mark.parametrize(
    ("sectors", "is_real", "start"), [(None, True, 0), ("8192", True, 0), ("8200", True, 12288), ("8200", False, None)]
)
def test_the_partition_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sectors: str | None, is_real: bool, start: int | None
) -> None:
    """sysfs as it is for a card, a partition on it, and a partition on a device that lies on another one."""
    status = tmp_path.stat()
    disk = tmp_path / "sys" / "mmcblk0"
    node = disk if sectors is None else disk / "mmcblk0p1"
    node.mkdir(parents=True)
    if is_real:
        (disk / "device").mkdir()
    if sectors is not None:
        (node / "partition").write_text("1\n")
        (node / "start").write_text(sectors + "\n")
    (tmp_path / "sys" / f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}").symlink_to(node)
    monkeypatch.setattr(medium_module, "_DEVICES", tmp_path / "sys")
    said_extents(monkeypatch, (0, 1 << 30, 0))
    medium = FileMedium.create(tmp_path / "journal", SIZE_BYTES)
    if start is None:
        assert isinstance(medium.alignment, Unknown)
    else:
        assert (medium.alignment, medium.start_bytes) == (Aligned(), start)
    medium.close()


def test_a_file_system_that_says_nothing_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Path("/dev/shm")  # noqa: S108 (a file system in memory)
    if not memory.is_dir():
        pytest.skip("no tmpfs at /dev/shm")
    path = memory / f"payterm-test-{os.getpid()}"
    try:
        medium = FileMedium.create(path, SIZE_BYTES)
        assert isinstance(medium.alignment, Unknown)
        assert medium.start_bytes == 0
        medium.close()
    finally:
        path.unlink(missing_ok=True)
    with pytest.raises(DiskTrouble):
        alignment(path)


def test_slots_are_found_by_their_marks_even_if_the_first_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(bytes(4096) + bytes(SIZE_BYTES))
    with path.open("r+b") as file:
        for slot in (5, 6, 20):
            file.seek(4096 + slot * SLOT_BYTES)
            file.write(MAGIC)
        file.seek(0)
        file.write(MAGIC)  # one that is no record
    medium = FileMedium(path)
    assert (medium.start_bytes, medium.size_bytes, medium.begun) == (4096, SIZE_BYTES, True)
    medium.close()


@pytest.mark.parametrize("count", [1, 3])
def test_a_link_in_place_of_the_file_is_refused(tmp_path: Path, count: int) -> None:
    FileMedium.create(tmp_path / "elsewhere", count * SLOT_BYTES).close()
    (tmp_path / "journal").symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        FileMedium(tmp_path / "journal")


# Partitions


@pytest.fixture
def partition(tmp_path: Path) -> Iterator[Path]:
    """A block device over a file, all zeros."""
    if os.geteuid() or not shutil.which("losetup"):
        pytest.skip("a block device takes root and losetup")
    image = tmp_path / "card"
    image.write_bytes(bytes(4 << 20))
    made = subprocess.run(["losetup", "--find", "--show", image], check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device to be had: {made.stderr.strip()}")
    device = Path(made.stdout.strip())
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


def test_a_partition_holds_the_journal(partition: Path, tmp_path: Path) -> None:
    link = tmp_path / "by-label"
    link.symlink_to(partition)
    medium = FileMedium.create(link, SIZE_BYTES)
    assert medium.size_bytes == 4 << 20  # all of it
    assert isinstance(medium.alignment, Unknown)  # it lies in a file, and nobody knows how
    written = begun(medium)
    with pytest.raises(PartitionTaken, match="alone"):
        FileMedium.create(link, SIZE_BYTES)  # it is ours while we have it
    medium.close()
    again = FileMedium.create(link, SIZE_BYTES)
    assert list(journal(again).replay(START))[-1].position == written.last
    again.close()


@pytest.mark.parametrize("what", ["ext4", "data", "swap"])
def test_a_partition_that_holds_something_is_refused_untouched(partition: Path, what: str) -> None:
    if what == "data":
        with partition.open("r+b") as file:
            file.seek(3 << 20)
            file.write(b"a photograph")
    else:
        tool = {"ext4": ["mkfs.ext4", "-q", "-F"], "swap": ["mkswap"]}[what]
        if not shutil.which(tool[0]):
            pytest.skip(f"{tool[0]} is not installed")
        subprocess.run([*tool, partition], check=True, capture_output=True)
    before = partition.read_bytes()
    said = {"ext4": "ext4", "data": "not a journal", "swap": "swap"}[what]
    with pytest.raises(PartitionTaken, match=said):
        FileMedium.create(partition, SIZE_BYTES)
    assert partition.read_bytes() == before


def test_a_mounted_partition_is_refused(partition: Path, tmp_path: Path) -> None:
    if not shutil.which("mkfs.ext4"):
        pytest.skip("mkfs.ext4 is not installed")
    subprocess.run(["mkfs.ext4", "-q", "-F", partition], check=True, capture_output=True)
    place = tmp_path / "mounted"
    place.mkdir()
    mounted = subprocess.run(["mount", partition, place], check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not possible here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(PartitionTaken, match="busy"):
            FileMedium.create(partition, SIZE_BYTES)
    finally:
        subprocess.run(["umount", place], check=True)


# The second copy


class Mirror:
    """Two files, and what was told about the second."""

    def __init__(self, directory: Path) -> None:
        self.told: list[str | None] = []
        self.second = directory / "second"
        FileMedium.create(self.second, SIZE_BYTES).close()
        self.primary = MemoryMedium(SIZE_BYTES)
        self.medium = self.opened()

    def opened(self) -> MirrorMedium:
        return MirrorMedium(self.primary, self.second, self.told.append)

    def second_bytes(self) -> bytes:
        medium = FileMedium(self.second)
        try:
            return medium.pread(SIZE_BYTES, 0)
        finally:
            medium.close()


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    made = Mirror(tmp_path)
    yield made
    made.medium.close()


def fail_second(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(5, "gone")

    monkeypatch.setattr(FileMedium, "pwrite", fails)


def test_both_have_everything(mirror: Mirror) -> None:
    assert isinstance(mirror.medium, MirroredMedium)
    assert not isinstance(mirror.primary, MirroredMedium)
    begun(mirror.medium)
    assert mirror.second_bytes() == bytes(mirror.primary.now)
    assert mirror.medium.behind_bytes == SIZE_BYTES  # as far as anybody has looked
    assert mirror.medium.resync() == 0
    assert mirror.told == []


@pytest.mark.parametrize("hurt", ["primary", "second"])
@pytest.mark.parametrize("size_bytes", [4096, 16384])
def test_what_one_lost_the_other_has(mirror: Mirror, hurt: str, size_bytes: int) -> None:
    written = begun(mirror.medium)
    records = list(written.audit())
    if hurt == "primary":
        mirror.primary.now[2 * SLOT_BYTES : 2 * SLOT_BYTES + size_bytes] = b"\x55" * size_bytes
    else:
        second = FileMedium(mirror.second)
        second.pwrite(b"\x55" * size_bytes, 2 * SLOT_BYTES)
        second.close()
    reader = journal(mirror.medium)
    assert list(reader.replay(START, thorough=True)) == records
    assert reader.restored == ([3] if hurt == "primary" else [])
    mirror.medium.resync()
    assert mirror.second_bytes() == bytes(mirror.primary.now)
    alone = journal(mirror.primary)
    assert list(alone.replay(START)) == records


def test_both_lost_is_named(mirror: Mirror) -> None:
    """Control."""
    begun(mirror.medium)
    mirror.medium.pwrite(b"\x55" * BLOCK_BYTES, 2 * SLOT_BYTES)
    with pytest.raises(LedgerCorrupt, match="record 3"):
        list(journal(mirror.medium).replay(START))


def test_an_erased_payload_is_not_brought_back_by_a_copy_that_was_away(mirror: Mirror) -> None:
    written = begun(mirror.medium)
    records = list(written.audit())
    alone = journal(mirror.primary)
    list(alone.replay(START))
    alone.erase(2)
    alone.flush()
    reader = journal(mirror.medium, copies=Copied(records[2:]))
    assert [record.payload is None for record in reader.replay(START)] == [True, True, False, False]
    assert reader.restored == []
    mirror.medium.resync()
    assert not any(mirror.second_bytes()[SLOT_BYTES + BLOCK_BYTES : 2 * SLOT_BYTES])


def test_a_failing_second_copy_stops_nothing_and_comes_back(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    written = begun(mirror.medium)
    assert mirror.medium.resync() == 0
    with monkeypatch.context() as patched:
        fail_second(mirror, patched)
        event(written, 10)
        assert mirror.medium.behind_bytes == SIZE_BYTES
        event(written, 11)
        written.flush()
        assert len(mirror.told) == 1
        assert "gone" in str(mirror.told[0])
        assert mirror.medium.resync(1) == SIZE_BYTES  # it opens, and fails again
    event(written, 12)
    written.flush()
    assert mirror.second_bytes() != bytes(mirror.primary.now)
    assert mirror.medium.resync(1) == 0
    assert mirror.told[1:] == [None]
    assert mirror.second_bytes() == bytes(mirror.primary.now)
    event(written, 13)
    assert mirror.second_bytes() == bytes(mirror.primary.now)


def test_a_missing_second_copy_is_told_and_not_made(tmp_path: Path) -> None:
    told: list[str | None] = []
    primary = MemoryMedium(SIZE_BYTES)
    medium = MirrorMedium(primary, tmp_path / "second", told.append)
    assert len(told) == 1
    assert list(tmp_path.iterdir()) == []
    written = begun(medium)
    medium.resync()
    assert len(told) == 1
    FileMedium.create(tmp_path / "second", SIZE_BYTES - SLOT_BYTES).close()
    assert medium.resync() == SIZE_BYTES  # too small
    assert len(told) == 1
    (tmp_path / "second").unlink()
    FileMedium.create(tmp_path / "second", SIZE_BYTES).close()
    assert medium.resync() == 0
    assert told[1:] == [None]
    assert len(list(written.audit())) == 4
    medium.close()


def test_a_resync_is_bounded_and_writes_during_it_reach_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medium_module, "_PIECE_BYTES", 4 * SLOT_BYTES)
    mirror = Mirror(tmp_path)
    mirror.medium.close()
    begun(mirror.primary, 15)
    mirror.medium = mirror.opened()
    left = [mirror.medium.resync(2)]
    mirror.medium.pwrite(b"\x11" * BLOCK_BYTES, 2 * SLOT_BYTES)
    mirror.medium.pwrite(b"\x22" * BLOCK_BYTES, 20 * SLOT_BYTES)
    left += [mirror.medium.resync(2), mirror.medium.resync(2)]
    assert left == [16 * SLOT_BYTES, 8 * SLOT_BYTES, 0]
    assert mirror.second_bytes() == bytes(mirror.primary.now)
    mirror.medium.close()


def test_a_primary_that_cannot_be_read_is_read_from_the_second(mirror: Mirror) -> None:
    begun(mirror.medium)

    def fails(*_: object) -> bytes:
        raise OSError(5, "unreadable")

    mirror.primary.pread = fails  # type: ignore[method-assign]
    assert len(list(journal(mirror.medium).replay(START))) == 4
    with pytest.raises(DiskTrouble):
        list(journal(mirror.primary).replay(START))

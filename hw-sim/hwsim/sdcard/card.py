"""The simulated card: an image in memory behind a loop device, with an ext4 of the kernel's own on it.

Two uses. `recorded` puts a recorder below a program: the image is served by a file system in user space (FUSE) that
writes down every write and every flush, together with what the program says on its control file. `Card` is switched on
again after a power cut: the crash state is laid on the image, the file system is checked as a Pi does when it starts,
and mounted. Both need root; `unavailable` says what is missing.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from hwsim.sdcard import kernel
from hwsim.sdcard.cuts import BLOCK_BYTES, Write
from hwsim.sdcard.recording import Blocks, Flush, Recording, Told, blocks_of, read_events, runs, write_event

SIZE_BYTES: Final = 160 * 1024 * 1024  # two block groups: with one there is no backup of the superblock
_MAKE: Final = (
    *("mkfs.ext4", "-q", "-F", "-b", str(BLOCK_BYTES), "-N", "256", "-J", "size=4"),
    *("-E", "lazy_itable_init=0,nodiscard"),  # nothing is to be written later, behind the program's back
)
_TOOLS: Final = ("mkfs.ext4", "e2fsck", "dumpe2fs", "debugfs", "e2image")
_REPAIRED: Final = 3  # e2fsck: these bits say that it found errors and mended them
_TOOL_S: Final = 60
_FUSE_S: Final = 10.0
_RUN_BYTES_MAX: Final = 1024  # blocks in one pwritev (IOV_MAX)
_SBIN: Final = "/usr/local/sbin:/usr/sbin:/sbin"  # not in everybody's PATH


class CardUnavailable(Exception):
    """This machine or this user cannot simulate a card with a real file system; the message says what is missing."""


class FileSystemLost(Exception):
    """Even e2fsck could not make a file system of it."""


def unavailable() -> str | None:
    """Why there can be no simulated card here; None if there can."""
    if os.geteuid() != 0:
        return "mounting needs root"
    for device, module in (("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")):
        if not os.access(device, os.R_OK | os.W_OK):
            return f"{device} is not there, or not for this process (modprobe {module}; a container may lack it)"
    for tool in _TOOLS:
        if shutil.which(tool, path=_path()) is None:
            return f"{tool} is missing (Debian: e2fsprogs)"
    if importlib.util.find_spec("mfusepy") is None:
        return "mfusepy is missing (pip install mfusepy)"
    # In a process of its own: it changes its view of the mounts, and a container may refuse that.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    trial = subprocess.run(
        [sys.executable, "-c", _TRIAL], env=environment, capture_output=True, text=True, timeout=_TOOL_S, check=False
    )
    return None if trial.returncode == 0 else (trial.stderr.strip().splitlines() or ["mounting failed"])[-1]


_TRIAL: Final = """
import mfusepy
from hwsim.sdcard import kernel
kernel.private_mounts()
"""


def empty_card(image: Path, prepare: Callable[[Path], object] | None = None) -> None:
    """Make the image of a fresh card; `prepare` may put something on it."""
    with image.open("wb") as file:
        file.truncate(SIZE_BYTES)
    _run(*_MAKE, str(image))
    card = Card(image, image.with_name("mounted"))
    try:
        with card.mounted() as directory:
            (directory / "lost+found").chmod(0o700)
            if prepare is not None:
                prepare(directory)
    finally:
        card.close()


class Card:
    """A card whose image is written from outside, and mounted again and again."""

    def __init__(self, image: Path, directory: Path) -> None:
        self._image = image
        self._directory = directory
        self._directory.mkdir(exist_ok=True)
        self._loop = kernel.LoopDevice(image)

    def load(self, blocks: Blocks) -> None:
        """Replace everything on it."""
        size_bytes = self._image.stat().st_size
        with self._image.open("r+b", buffering=0) as file:
            file.truncate(0)  # gives the memory back: most of a card is zeros
            file.truncate(size_bytes)
            for first, together in runs(blocks):
                for start in range(0, len(together), _RUN_BYTES_MAX):
                    part = together[start : start + _RUN_BYTES_MAX]
                    os.pwritev(file.fileno(), part, (first + start) * BLOCK_BYTES)

    def check(self) -> None:
        """`e2fsck -fy`, as a Pi does when it starts. Raises `FileSystemLost`."""
        words = ["e2fsck", "-fy", str(self._image)]
        done = subprocess.run(
            words, capture_output=True, text=True, env=_environment(), timeout=_TOOL_S, check=False, errors="replace"
        )
        if done.returncode & ~_REPAIRED:
            raise FileSystemLost(f"e2fsck gave up ({done.returncode}): {done.stdout[-300:]}")

    @contextmanager
    def mounted(self, options: str = "") -> Iterator[Path]:
        self._loop.forget()
        try:
            with kernel.mounted(self._loop.path, self._directory, options):
                yield self._directory
        except OSError as error:
            if error.errno in {errno.EUCLEAN, errno.EINVAL, errno.EIO}:
                raise FileSystemLost(str(error)) from error
            raise

    def close(self) -> None:
        self._loop.close()


def record(
    work: Path,
    command: Callable[[Path, Path], int],
    *,
    told_before: bytes = b"",
    blocks: Blocks | None = None,
    mount_options: str = "",
) -> tuple[Recording, int]:
    """Run `command` (called with the card's directory and the control file) on a recorded card, and its exit code.

    The card is a fresh one, or holds `blocks`: what a cut of an earlier recording has left, with what had been told
    then. Mounts: call `kernel.private_mounts` first.
    """
    image, log, point = work / "card", work / "log", work / "fuse"
    if blocks is None:
        empty_card(image)
    else:
        with image.open("wb") as file:
            file.truncate(SIZE_BYTES)
        card = Card(image, work / "mounted")
        card.load(blocks)
        card.close()
    base = blocks_of(image)
    metadata = _metadata(image)
    point.mkdir(exist_ok=True)
    server = _serve(image, log, point)
    try:
        _await(point / "card", server)
        card = Card(point / "card", work / "mounted")
        try:
            with card.mounted(mount_options) as directory:
                code = command(directory, point / "told")
        finally:
            card.close()
    finally:
        kernel.unmount(point)
        os.waitpid(server, 0)
    recording = Recording(
        size_bytes=SIZE_BYTES,
        base=base,
        events=list(read_events(log)),
        metadata=metadata | _metadata(image),
        told_before=told_before,
        mount_options=mount_options,
    )
    return recording, code


def _metadata(image: Path) -> frozenset[int]:
    """The blocks that are the file system's own: what stands at fixed places, and directories and extent trees."""
    text = _run("dumpe2fs", str(image))
    blocks: set[int] = set()
    for first, last in re.findall(r"(?:superblock|descriptors|bitmap|table|blocks) at (\d+)(?:-(\d+))?", text):
        blocks.update(range(int(first), int(last or first) + 1))
    extents = _run("debugfs", "-R", "dump_extents -n <8>", str(image))
    extents += _run("debugfs", "-R", "dump_extents -l <8>", str(image))  # the file system's journal, whole
    for first, last in re.findall(r"\d+ - +\d+ +(\d+) - +(\d+)", extents):
        blocks.update(range(int(first), int(last) + 1))
    for (only,) in re.findall(r"(?m)^ *0/ *\d+ +\d+/ *\d+ +\d+ - +\d+ +(\d+) +\d+ *$", extents):
        blocks.add(int(only))
    raw = image.with_name("metadata")
    _run("e2image", "-r", str(image), str(raw))  # a file with holes where there is data
    with raw.open("rb") as file:
        end, position = os.fstat(file.fileno()).st_size, 0
        while position < end:
            try:
                first = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:
                break
            position = os.lseek(file.fileno(), first, os.SEEK_HOLE)
            blocks.update(range(first // BLOCK_BYTES, -(-position // BLOCK_BYTES)))
    raw.unlink()
    return frozenset(blocks)


def _serve(image: Path, log: Path, point: Path) -> int:
    """Start the recorder; its process id."""
    process = os.fork()
    if process:
        return process
    try:
        import mfusepy  # type: ignore[import-untyped]

        with image.open("r+b", buffering=0) as card, log.open("wb") as file:
            # One thread: the order in which requests are served is the order in which they count.
            mfusepy.FUSE(_recorder(card.fileno(), file), str(point), foreground=True, nothreads=True)
        os._exit(0)
    finally:
        os._exit(1)


def _recorder(card: int, log: Any) -> Any:
    import mfusepy

    size_bytes = os.fstat(card).st_size

    class Recorder(mfusepy.Operations):  # type: ignore[misc]
        """Two files: `card`, the device, and `told`, the control file."""

        use_ns = True

        def __init__(self) -> None:
            self._told_bytes = 0
            self._line = b""  # the kernel cuts writes at pages

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            match path:
                case "/":
                    return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2}
                case "/card":
                    return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": size_bytes}
                case "/told":
                    return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": self._told_bytes}
                case _:
                    raise mfusepy.FuseOSError(errno.ENOENT)

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", "card", "told"]

        def open(self, path: str, flags: int) -> int:
            return 0

        def truncate(self, path: str, length: int, fh: int | None = None) -> int:
            return 0

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            return os.pread(card, size, offset) if path == "/card" else b""

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            if path == "/card":
                os.pwrite(card, data, offset)
                write_event(log, Write(offset, data))
            else:
                self._told_bytes = max(self._told_bytes, offset + len(data))
                lines, newline, self._line = (self._line + data).rpartition(b"\n")
                if newline:
                    write_event(log, Told(lines + newline))
            return len(data)

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            if path == "/card":
                write_event(log, Flush())
            return 0

    return Recorder()


def _await(path: Path, server: int) -> None:
    until = time.monotonic() + _FUSE_S
    while not path.exists():
        if time.monotonic() > until or os.waitpid(server, os.WNOHANG)[0]:
            raise CardUnavailable("the recorder did not start: is libfuse3 there (Debian: libfuse3-3 or libfuse3-4)?")
        time.sleep(0.005)


def _run(*words: str) -> str:
    done = subprocess.run(
        words, capture_output=True, text=True, env=_environment(), timeout=_TOOL_S, check=False, errors="replace"
    )
    if done.returncode:
        raise CardUnavailable(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _path() -> str:
    return os.environ.get("PATH", "/usr/bin:/bin") + ":" + _SBIN


def _environment() -> dict[str, str]:
    return {"PATH": _path(), "LC_ALL": "C"}

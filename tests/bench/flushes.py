"""What a program asks of its storage: counted from outside, and made slow from outside, for every program alike.

Three views, since each has a blind spot. strace sees every call for a flush and the file that it is about, but not that
a file system adds a flush of its own for a file that grows. The block device's counters see that, but not whose it was,
so they are read around a piece of work. And a disk that flushes in a tenth of a millisecond hides behind processor time
what an SD card would show; so strace can also delay each call for a flush, as a slow card would.

`/proc/self/io` is of no use here: on newer kernels it counts whole folios, a megabyte for a block of 4 KiB.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

_FLUSH_CALLS: Final = "fdatasync,fsync,sync_file_range,msync,syncfs,sync"
_WRITE_CALLS: Final = "pwrite64,write,pwritev,writev"
_DELAYED_CALLS: Final = "fdatasync,fsync"
_CALL: Final = re.compile(r"(?P<call>\w+)\((?:(?P<fd>\d+)<(?P<path>[^>]*)>)?.*\) += (?P<result>-?\d+)")
_SECTOR_BYTES: Final = 512
_SECTORS_WRITTEN: Final = 6  # places in the `stat` of a block device (Linux, Documentation/block/stat)
_FLUSHES: Final = 15


BLOCK_BYTES: Final = 4096
RAW_FILE_BYTES: Final = 4 << 20


class RawFile:
    """The least that a disk can do: a file written once in full, of which one block is overwritten and flushed."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.pwrite(self._descriptor, bytes(RAW_FILE_BYTES), 0)
        os.fsync(self._descriptor)
        self._at = 0

    def overwrite(self, block: bytes) -> None:
        """The next block, durable on return."""
        os.pwrite(self._descriptor, block, self._at)
        os.fdatasync(self._descriptor)
        self._at = (self._at + BLOCK_BYTES) % RAW_FILE_BYTES

    def flush_s(self) -> float:
        """How long the next one took."""
        begun = time.perf_counter()
        self.overwrite(b"\xa5" * BLOCK_BYTES)
        return time.perf_counter() - begun

    def close(self) -> None:
        os.close(self._descriptor)


class NotCounted(Exception):
    """Why something could not be counted here."""


@dataclass
class Piece:
    """What one item asked of the kernel, by file."""

    flushes: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)  # bytes


def counted(name: str, place: Path, count: int) -> list[Piece]:
    """What each of `count` items of a workload asked for. Raises `NotCounted`."""
    place.mkdir(exist_ok=True)
    trace, lines = place / f"{name}.trace", place / f"{name}.ack"
    command = ["-m", "tests.bench.peers", name, "--directory", str(place / name), "--ack", str(lines)]
    tracing = ["-y", "-s", "0", "-o", str(trace), "-e", f"trace={_FLUSH_CALLS},{_WRITE_CALLS}"]
    # One more than asked for: the first also has what it took to make the files.
    under_strace(tracing, [*command, "--count", str(count + 1)])
    return list(_pieces(trace.read_text(encoding="utf-8", errors="replace"), lines.name))[1:]


def _pieces(trace: str, acknowledged: str) -> Iterator[Piece]:
    """The calls between one acknowledgement and the next; what comes after the last is left out."""
    piece = Piece()
    for line in trace.splitlines():
        if (found := _CALL.search(line)) is None:
            continue
        file = _name(Path(found["path"] or "?"))
        if found["call"] in _FLUSH_CALLS.split(","):
            piece.flushes[file] += 1
        elif file == acknowledged:
            yield piece
            piece = Piece()
        else:
            piece.written[file] += max(0, int(found["result"]))


def _name(path: Path) -> str:
    """A file's name, the same for all temporary files."""
    return "temporary" if path.name.startswith("tmp") else path.name


def under_strace(options: Sequence[str], arguments: Sequence[str]) -> str:
    """Run Python with these arguments under strace; what it prints. Raises `NotCounted`."""
    strace = shutil.which("strace")
    if strace is None:
        raise NotCounted("strace is not installed")
    # --seccomp-bpf: calls that are not of interest run at their own speed.
    command = [strace, "-f", "--seccomp-bpf", "-qq", *options, sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip() or f"strace ended with {done.returncode}"
        raise NotCounted(why.splitlines()[-1])
    return done.stdout


def with_slow_flushes(flush_ms: int, arguments: Sequence[str]) -> str:
    """Run Python with each flush taking this much longer; what it prints. Raises `NotCounted`."""
    delay = f"inject={_DELAYED_CALLS}:delay_exit={flush_ms * 1000}"
    return under_strace(["-o", os.devnull, "-e", f"trace={_DELAYED_CALLS}", "-e", delay], arguments)


class Counters(NamedTuple):
    """A block device's, since it is there. `-` gives what happened in between."""

    flushes: int
    written_bytes: int

    def since(self, before: Counters) -> Counters:
        return Counters(self.flushes - before.flushes, self.written_bytes - before.written_bytes)


class Device:
    """The disk that a directory lies on. Other programs use it too: read its counters around short pieces of work."""

    def __init__(self, directory: Path) -> None:
        """Raises `NotCounted` where there is no such device: a network, a RAM disk, an overlay."""
        number = directory.stat().st_dev
        link = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
        if not link.exists():
            raise NotCounted(f"{directory} is on no block device of its own")
        there = link.resolve()
        if (there / "partition").exists():
            there = there.parent  # flushes are the whole disk's
        self._stat = there / "stat"
        if len(self._stat.read_text(encoding="ascii").split()) <= _FLUSHES:
            raise NotCounted("this kernel does not count a device's flushes")

    def read(self) -> Counters:
        words = self._stat.read_text(encoding="ascii").split()
        return Counters(int(words[_FLUSHES]), int(words[_SECTORS_WRITTEN]) * _SECTOR_BYTES)

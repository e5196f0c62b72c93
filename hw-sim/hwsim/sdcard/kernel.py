"""The three things that a simulated card asks of Linux: mounts of its own, mounting, and a loop device.

Called directly: a program started for each of thousands of crash states would take longer than the state. Mounts are
private to the process (mount_namespaces(7)) and loop devices clear themselves, so nothing is left behind when a run is
killed.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_CLONE_NEWNS: Final = 0x20000
_MS_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8
_MS_PRIVATE_REC: Final = (1 << 18) | 16384
_MNT_DETACH: Final = 2
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LOOP_CONFIGURE: Final = 0x4C0A
_LO_FLAGS_AUTOCLEAR: Final = 4
_BLKFLSBUF: Final = 0x1261
_LOOP_ATTEMPTS_MAX: Final = 50  # others may take the free device between asking for it and taking it
_BUSY_MS_MAX: Final = 5000  # a loop device lets go of its file a moment after it was closed
_BUSY_STEP_MS: Final = 5

_libc: Final = ctypes.CDLL(None, use_errno=True)


def private_mounts() -> None:
    """From now on nobody else sees what this process mounts. Raises `OSError` without the right to."""
    _checked(_libc.unshare(_CLONE_NEWNS), "unshare")
    _checked(_libc.mount(b"none", b"/", None, _MS_PRIVATE_REC, None), "/")


@contextmanager
def mounted(device: Path, directory: Path, options: str) -> Iterator[Path]:
    """ext4 from `device` on `directory`."""
    words = (os.fsencode(device), os.fsencode(directory), b"ext4", _MS_NOSUID_NODEV_NOEXEC, options.encode())
    _checked(_libc.mount(*words), str(directory))
    try:
        yield directory
    finally:
        unmount(directory)


def unmount(directory: Path) -> None:
    """Raises `OSError` when it stays busy; it is detached then."""
    for _ in range(_BUSY_MS_MAX // _BUSY_STEP_MS):
        if _libc.umount2(os.fsencode(directory), 0) == 0:
            return
        time.sleep(_BUSY_STEP_MS / 1000)
    _libc.umount2(os.fsencode(directory), _MNT_DETACH)
    raise OSError(f"{directory} stayed busy")


class LoopDevice:
    """A block device over a file, until it is closed or the process ends."""

    def __init__(self, image: Path) -> None:
        backing = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.path = self._take(backing)
        finally:
            os.close(backing)

    def _take(self, backing: int) -> Path:
        # struct loop_config: descriptor, block size, struct loop_info64 with only its flags set, reserved words.
        config = struct.pack("=II52xI176x64x", backing, 0, _LO_FLAGS_AUTOCLEAR)
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            for _ in range(_LOOP_ATTEMPTS_MAX):
                path = Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}")
                with suppress(FileNotFoundError, BlockingIOError, OSError):
                    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                    try:
                        fcntl.ioctl(descriptor, _LOOP_CONFIGURE, config)
                        # A writer would keep newer kernels from mounting it; a reader keeps it from clearing itself.
                        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                        return path
                    finally:
                        os.close(descriptor)
        finally:
            os.close(control)
        raise OSError("no loop device is free")

    def forget(self) -> None:
        """Drop what the kernel has read: the file below was written past it."""
        fcntl.ioctl(self._descriptor, _BLKFLSBUF, 0)

    def close(self) -> None:
        os.close(self._descriptor)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)

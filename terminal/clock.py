"""Time and randomness, as arguments.

A Pi has no clock of its own: after a power cut it believes in some moment of the past until the network corrects it. So
wall time always travels with the knowledge whether it was synchronised, order comes from sequence numbers, and waiting
is measured on the monotonic clock. Whatever needs time or chance takes a `Clock` or an `Entropy`; tests pass their own.
"""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol
from uuid import UUID

_TIME_ERROR: Final = 5  # adjtimex(2): "the system clock is not synchronized to a reliable server"
_STEP_MS: Final = 1_000  # slewing moves the clock by half a millisecond a second: more than this at once was a step
_TIMEX_BYTES: Final = 256  # struct timex is 208 bytes on 64-bit Linux; a zeroed larger buffer asks and changes nothing


class Clock(Protocol):
    """Where time comes from."""

    @property
    def boot_id(self) -> UUID:
        """Names this boot: monotonic times compare only within one."""

    def monotonic_ms(self) -> int:
        """Milliseconds of running time since some moment of this boot."""

    def sleep_ms(self, duration_ms: int) -> None:
        """Let so much running time pass."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC, as far as this machine knows."""

    def synchronised(self) -> bool:
        """Whether `wall_ms` is disciplined by a time source."""


class Entropy(Protocol):
    """Where randomness comes from."""

    def __call__(self, size_bytes: int, /) -> bytes: ...


class SystemClock:
    """The machine's clocks."""

    def __init__(self) -> None:
        self._boot_id = UUID(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        self._libc = ctypes.CDLL(None)

    @property
    def boot_id(self) -> UUID:
        return self._boot_id

    def monotonic_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000

    def sleep_ms(self, duration_ms: int) -> None:
        time.sleep(duration_ms / 1000)

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def synchronised(self) -> bool:
        """By the kernel's own word (adjtimex), which holds whoever sets the clock: timesyncd, chrony or ntpd."""
        return bool(self._libc.adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)) != _TIME_ERROR)


@dataclass(frozen=True, slots=True)
class ClockSet:
    """The wall clock can be trusted: in this boot, wall time is `offset_ms` later than monotonic time."""

    boot_id: UUID
    offset_ms: int


@dataclass(frozen=True, slots=True)
class ClockStepped:
    """The wall clock jumped, forward if positive. Nothing decided here depends on it; people should know."""

    by_ms: int


class ClockWatch:
    """Notices when the wall clock is set, and when it jumps. Ask from time to time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._synchronised = False
        self._offset_ms = self._offset()

    def look(self) -> list[ClockSet | ClockStepped]:
        """What has happened since the last look."""
        offset_ms, synchronised = self._offset(), self._clock.synchronised()
        by_ms = offset_ms - self._offset_ms
        stepped, was_synchronised = abs(by_ms) > _STEP_MS, self._synchronised
        self._offset_ms, self._synchronised = offset_ms, synchronised
        happened: list[ClockSet | ClockStepped] = []
        if stepped:
            happened.append(ClockStepped(by_ms))
        if synchronised and (stepped or not was_synchronised):
            happened.append(ClockSet(self._clock.boot_id, offset_ms))
        return happened

    def _offset(self) -> int:
        return self._clock.wall_ms() - self._clock.monotonic_ms()


def system_entropy(size_bytes: int) -> bytes:
    """The kernel's random generator."""
    return os.urandom(size_bytes)

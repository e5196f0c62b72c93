"""When the backlog may be sent: at once, at intervals, in windows, sparingly, or only when somebody says so.

What a customer waits for is never kept back. A window is a time of day, and while no clock says what time it is, the
backlog is sent: late money is worse than an expensive minute. `sync now` opens the backlog in every mode until it is
empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, time, tzinfo
from enum import StrEnum
from typing import Final

from terminal.sync.spool import Moment, Waiting

_DAY_MS: Final = 86_400_000
_MINUTE_MS: Final = 60_000


class Mode(StrEnum):
    IMMEDIATE = "immediate"
    INTERVAL = "interval"
    WINDOW = "window"
    METERED = "metered"
    """A link that costs by connection or byte: the backlog goes when it is long or old enough to be worth it."""
    MANUAL = "manual"


@dataclass(frozen=True, slots=True)
class Window:
    """A part of every day, local time; the end may be after midnight."""

    begin: time
    end: time

    @classmethod
    def parse(cls, text: str) -> Window:
        """ "22:00-06:00". Raises `ValueError`."""
        begin, dash, end = text.partition("-")
        if not dash or len(begin) != 5 or len(end) != 5:
            raise ValueError(f"{text!r} is no window: write it like 22:00-06:00")
        window = cls(time.fromisoformat(begin), time.fromisoformat(end))
        if window.begin == window.end:
            raise ValueError(f"{text!r} is empty: for a whole day use the mode immediate")
        return window

    def holds(self, moment: time) -> bool:
        if self.begin < self.end:
            return self.begin <= moment < self.end
        return moment >= self.begin or moment < self.end


@dataclass(frozen=True, slots=True)
class Schedule:
    """The setting."""

    mode: Mode = Mode.IMMEDIATE
    interval_ms: int = 15 * _MINUTE_MS
    windows: tuple[Window, ...] = ()
    metered_count: int = 50
    metered_age_ms: int = 6 * 60 * _MINUTE_MS
    zone: tzinfo | None = None  # None: this machine's

    def open(self, now: Moment, waiting: Waiting, *, last_drained_ms: int | None) -> bool:
        """Whether the backlog may be sent. `last_drained_ms`: running time at which it was last empty, if ever."""
        match self.mode:
            case Mode.IMMEDIATE:
                return True
            case Mode.MANUAL:
                return False
            case Mode.INTERVAL:
                return last_drained_ms is None or now.monotonic_ms - last_drained_ms >= self.interval_ms
            case Mode.WINDOW:
                if not now.synchronised:
                    return True
                local = datetime.fromtimestamp(now.wall_ms / 1000, self.zone).time()
                return any(window.holds(local) for window in self.windows)
            case Mode.METERED:
                return waiting.queued >= self.metered_count or (waiting.oldest_ms or 0) >= self.metered_age_ms

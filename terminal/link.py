"""What the terminal service knows of the way to the host: what sync last said, and when it was last heard of.

Also the one place where threads meet to wait: for an answer, and for something to send. Both only wake; whoever wakes
looks at the ledger, so a wake-up too many or too early does no harm.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from terminal.clock import Clock

SYNC_SILENCE_MAX_MS: Final = 20_000  # sync asks for work at least every 10 s; twice that means that it is not there

RETRY_GRACE_MS: Final = 3_000  # two or three more tries of sync: an answer lost on the way is often there by then


@dataclass(frozen=True, slots=True)
class LinkState:
    """For screens and status. `online` is None while nothing is known."""

    online: bool | None
    sync_present: bool
    error: str | None
    queued: int


class Link:
    """Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._condition = threading.Condition()
        self._online: bool | None = None
        self._error: str | None = None
        self._queued = 0
        self._heard_ms: int | None = None
        self._offline_since_ms = 0
        self._outbox_version = 0

    def heard(self) -> None:
        """Sync has called."""
        with self._condition:
            self._heard_ms = self._clock.monotonic_ms()

    def report(self, *, online: bool, error: str | None, queued: int) -> None:
        """Sync's own account of its last try."""
        with self._condition:
            self._heard_ms = self._clock.monotonic_ms()
            if self._online is not False and not online:
                self._offline_since_ms = self._heard_ms
            self._online, self._error, self._queued = online, error, queued
            self._condition.notify_all()

    def state(self) -> LinkState:
        with self._condition:
            return LinkState(self._online, self._sync_present(), self._error, self._queued)

    def presumed_up(self) -> bool:
        """Whether asking the host is worth a customer's time: sync is there and has not said that the host is away."""
        with self._condition:
            return self._sync_present() and self._online is not False

    def answered(self) -> None:
        """An answer was committed: whoever waits for one should look."""
        with self._condition:
            self._condition.notify_all()

    def wait_for_answer(self, arrived: Callable[[], bool], *, timeout_ms: int) -> None:
        """Wait until `arrived` or the time is up; not much longer once sync has said that a try has failed."""
        deadline_ms = self._clock.monotonic_ms() + timeout_ms
        with self._condition:
            while not arrived():
                until_ms = deadline_ms
                if self._online is False:
                    until_ms = min(until_ms, self._offline_since_ms + RETRY_GRACE_MS)
                left_ms = until_ms - self._clock.monotonic_ms()
                if left_ms <= 0:
                    return
                self._condition.wait(left_ms / 1000)

    def outbox_changed(self) -> None:
        """Something was committed that is to be sent."""
        with self._condition:
            self._outbox_version += 1
            self._condition.notify_all()

    def wait_for_outbox(self, is_filled: Callable[[], bool], *, timeout_ms: int) -> None:
        """Wait until there is something to send, at most `timeout_ms`."""
        deadline_ms = self._clock.monotonic_ms() + timeout_ms
        while True:
            with self._condition:
                seen = self._outbox_version
            if is_filled():
                return
            with self._condition:
                left_ms = deadline_ms - self._clock.monotonic_ms()
                if left_ms <= 0:
                    return
                if self._outbox_version == seen:
                    self._condition.wait(left_ms / 1000)

    def _sync_present(self) -> bool:
        return self._heard_ms is not None and self._clock.monotonic_ms() - self._heard_ms <= SYNC_SILENCE_MAX_MS

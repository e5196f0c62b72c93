"""Who carries items to a destination: threads, each with a connection of its own.

A courier is given one errand after another and never decides anything: what comes of an errand lies here until `step`
takes it. It uses no store and no clock, so that all that is decided is decided in one thread.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from terminal.sync.destinations import Destination, Parcel, Result, Unsure
from terminal.sync.spool import Row

URGENT_ROOM: Final = 2  # couriers that the backlog leaves free: a customer never waits behind it

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Errand:
    """One attempt; or, with `look_up`, a question whether an earlier one has arrived."""

    row: Row
    parcel: Parcel
    round: int  # of the breaker, when it was sent off
    look_up: bool = False
    first_attempt_ms: int | None = None  # wall time of the first attempt, if a clock knew it


@dataclass(frozen=True, slots=True)
class Done:
    """What came of it. `result` is None when a look-up found nothing."""

    errand: Errand
    result: Result | None


class Couriers(Protocol):
    """All that carry to one destination."""

    @property
    def name(self) -> str: ...

    @property
    def repeat_safe_ms(self) -> int | None: ...

    @property
    def room(self) -> int:
        """How many items of the backlog may be under way at once. There is some more for what is urgent."""

    def send(self, errand: Errand) -> None: ...

    def ended(self) -> Sequence[Done]:
        """What has ended since this was last asked."""

    def close(self) -> None: ...


def run(destination: Destination, errand: Errand) -> Done:
    """One errand. A fault of ours in one item must not stop the others: it may have been sent, and is repeated."""
    try:
        if errand.look_up:
            found = destination.look_up(errand.parcel, first_attempt_ms=errand.first_attempt_ms)
            return Done(errand, found)
        return Done(errand, destination.send(errand.parcel))
    except Exception:  # noqa: BLE001
        _log.exception("%s: a fault in sending", destination.name)
        return Done(errand, Unsure("a fault in this program, see its log: sent again later"))


class Alone:
    """One courier, who is the caller: an errand has ended when `send` returns."""

    room = 1

    def __init__(self, destination: Destination) -> None:
        self.destination = destination
        self._ended: list[Done] = []

    @property
    def name(self) -> str:
        return self.destination.name

    @property
    def repeat_safe_ms(self) -> int | None:
        return self.destination.repeat_safe_ms

    def send(self, errand: Errand) -> None:
        self._ended.append(run(self.destination, errand))

    def ended(self) -> Sequence[Done]:
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        self.destination.close()


class Fleet:
    """Several at once. Threads start when there is work for them; `wake` is called when an errand has ended."""

    def __init__(self, build: Callable[[], Destination], *, room: int, wake: Callable[[], None]) -> None:
        """`build` makes one destination for each thread. Raises what it raises, before anything is sent."""
        self._build = build
        self._wake = wake
        self.room = room
        first = build()
        self.name = first.name
        self.repeat_safe_ms = first.repeat_safe_ms
        self._spare: list[Destination] = [first]
        self._errands: queue.SimpleQueue[Errand | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._busy = 0  # counted in the caller's thread only

    def send(self, errand: Errand) -> None:
        self._busy += 1
        if len(self._threads) < min(self._busy, self.room + URGENT_ROOM):
            destination = self._spare.pop() if self._spare else self._build()
            thread = threading.Thread(target=self._carry, args=(destination,), name=f"to {self.name}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._errands.put(errand)

    def ended(self) -> Sequence[Done]:
        ended: list[Done] = []
        with contextlib.suppress(queue.Empty):
            while True:
                ended.append(self._ended.get_nowait())
        self._busy -= len(ended)
        return ended

    def close(self) -> None:
        """Wait for what is under way, which ends in bounded time; an errand that is broken off is an ambiguous one."""
        for _ in self._threads:
            self._errands.put(None)
        for thread in self._threads:
            thread.join()
        for destination in self._spare:
            destination.close()

    def _carry(self, destination: Destination) -> None:
        with contextlib.closing(destination):
            while (errand := self._errands.get()) is not None:
                self._ended.put(run(destination, errand))
                self._wake()

"""The breaker between the spool and one destination: how much may be under way, and whether the way there holds.

    closed   as much as there is room for
    open     silence, until a time that doubles with each failure and is drawn with full jitter
    trying   one item; with each success twice as many, until there is room for all: closed again

A failure opens it. Attempts that were under way together fail together, and count as one failure. What a destination
itself asks for (Retry-After) is kept for all repetitions and the backlog; otherwise two things break the silence: a
customer who waits now, and a network that has just come back.

After an outage one success shows at once that the way is open (`online`): the next customer can be served. It is called
`stable` only after some more, so that a link that comes and goes does not make the screen blink.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from terminal.clock import Entropy

STABLE_SUCCESSES: Final = 3  # one success can be chance; three in a row took at least three round trips
_DOUBLINGS_MAX: Final = 16  # beyond any sensible ceiling; only keeps the numbers small


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long a failing destination or item is left alone."""

    first_ms: int = 500  # a customer waits seconds: two or three attempts fit
    # The longest that a stored sale waits once the network is back. A probe a minute is little traffic.
    ceiling_ms: int = 60_000

    def draw_ms(self, failures: int, entropy: Entropy) -> int:
        """Full jitter: anything between 0 and the doubled ceiling."""
        ceiling_ms = min(self.ceiling_ms, self.first_ms << min(failures, _DOUBLINGS_MAX))
        return ceiling_ms * int.from_bytes(entropy(4), "big") >> 32


class Position(Enum):
    CLOSED = "closed"
    OPEN = "open"
    TRYING = "trying"


class Breaker:
    """Of one destination. Times are running time in milliseconds."""

    def __init__(self, room: int) -> None:
        """`room`: how many may be under way at once."""
        self._room = room
        self._width = room  # so many may be under way now
        self._failures = 0
        self._successes = STABLE_SUCCESSES
        self._silent_until_ms = 0
        self._asked_for = False
        self.error: str | None = None
        self.round = 0  # attempts of one round fail together
        self.last_success_ms: int | None = None
        self.last_error: str | None = None
        self.last_error_ms: int | None = None

    @property
    def online(self) -> bool:
        """No failure since the last success; true as well while nothing is known."""
        return self.error is None

    @property
    def stable(self) -> bool:
        return self._successes >= STABLE_SUCCESSES

    @property
    def failures(self) -> int:
        return self._failures

    def position(self, now_ms: int) -> Position:
        if now_ms < self._silent_until_ms:
            return Position.OPEN
        return Position.CLOSED if self._width >= self._room else Position.TRYING

    def silent_ms(self, now_ms: int) -> int:
        """How much longer nothing but first attempts for customers is sent."""
        return max(0, self._silent_until_ms - now_ms)

    def allows(self, now_ms: int, under_way: int) -> int:
        """How many more may be sent now."""
        return 0 if self.silent_ms(now_ms) else max(0, self._width - under_way)

    def failed(self, message: str, *, round_: int, now_ms: int, wait_ms: int, asked_for: bool) -> None:
        """An attempt of this round has failed."""
        self.error = self.last_error = message
        self.last_error_ms = now_ms
        self._successes = 0
        self._width = 1
        if round_ == self.round:
            self.round += 1
            self._failures += 1
        elif not asked_for:
            return
        until_ms = now_ms + wait_ms
        if not self._asked_for or until_ms > self._silent_until_ms:  # what was asked for is not cut short
            self._silent_until_ms = until_ms
            self._asked_for = asked_for

    def succeeded(self, now_ms: int) -> None:
        self._failures = self._silent_until_ms = 0
        self._asked_for = False
        self.error = None
        self.last_success_ms = now_ms
        self._width = min(self._room, 2 * self._width)
        self._successes = min(STABLE_SUCCESSES, self._successes + 1)

    def hurry(self) -> None:
        """Somebody waits, or the network has changed: begin again with short waits."""
        if not self._asked_for:
            self._failures = self._silent_until_ms = 0

"""What the double can be made to do wrong: everything that Stripe says may happen, and what networks do to it.

Armed for the next so many requests, first armed first served. What matters in each is when it strikes: before Stripe
has noticed the request, after it has begun to work on it (from then on the result is saved), or after it has booked.
"""

from __future__ import annotations

import threading
from collections import deque
from enum import Enum
from typing import Annotated, Final, TypeAlias

import msgspec

ARMED_MAX: Final = 10_000


class When(Enum):
    """When a failure strikes."""

    UNNOTICED = "unnoticed"  # nothing is booked or saved: rate limits, load balancers, a conflict
    BEFORE = "before"  # work had begun, nothing is booked: the failure is saved and will be repeated
    AFTER = "after"  # it is booked, and yet the failure is what is saved


class Fail(msgspec.Struct, frozen=True, tag_field="kind", tag="fail"):
    """Answer with this status. A 409 or 429 is always unnoticed."""

    status: Annotated[int, msgspec.Meta(ge=400, le=599)]
    when: When = When.UNNOTICED
    should_retry: bool | None = None  # the header Stripe-Should-Retry
    retry_after_s: int | None = None


class DropAnswer(msgspec.Struct, frozen=True, tag_field="kind", tag="drop_answer"):
    """Break the connection instead of answering; `booked` says whether the work was done."""

    booked: bool = True


class Delay(msgspec.Struct, frozen=True, tag_field="kind", tag="delay"):
    """Answer so much later. `working`: the work itself takes so long, and its key is in use meanwhile."""

    delay_ms: Annotated[int, msgspec.Meta(ge=0, le=600_000)]
    working: bool = False


class Garbage(msgspec.Struct, frozen=True, tag_field="kind", tag="garbage"):
    """Do the work, then answer 200 with something that is no payment record."""

    body: str = "<html>Welcome</html>"


Fault: TypeAlias = Fail | DropAnswer | Delay | Garbage


class Faults:
    """The faults in store."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: deque[Fault] = deque()

    def arm(self, fault: Fault, times: int = 1) -> None:
        """For the next `times` requests (after those that are armed already)."""
        with self._lock:
            if len(self._armed) + times > ARMED_MAX:
                raise ValueError(f"at most {ARMED_MAX} faults can be in store")
            self._armed.extend([fault] * times)

    def clear(self) -> None:
        with self._lock:
            self._armed.clear()

    def take(self) -> Fault | None:
        with self._lock:
            return self._armed.popleft() if self._armed else None

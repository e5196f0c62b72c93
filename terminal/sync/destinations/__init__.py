"""Where stored items go: a small interface, and what a destination may say about one attempt.

A destination makes one attempt and tells how it ended. It keeps no queue, never repeats by itself and never chooses a
key: all of that is the spool's. What matters most in a result is whether the other side *may* have received the item;
a destination that is not certain says `Unsure`. Messages are for people and never hold an envelope, a key or an answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Parcel:
    """One item as it is sent, every time the same."""

    transaction: UUID
    event: str  # as in its path: "authorisation", "reversal", "checkpoint", ...
    idempotency_key: str = field(repr=False)
    body: str = field(repr=False)
    earlier: str | None = None  # the receipt of this transaction's first item there


@dataclass(frozen=True, slots=True)
class Answered:
    """The destination has decided. The answer is whole, but only the terminal can tell whether to believe it."""

    answer: str = field(repr=False)
    receipt: str | None = None  # the destination's own name for the transaction, for the items that follow


@dataclass(frozen=True, slots=True)
class Refused:
    """The destination will not take it: this item never (`permanent`), or nothing from us as things stand."""

    message: str
    permanent: bool


@dataclass(frozen=True, slots=True)
class Unsure:
    """It may have been received and booked, or not."""

    message: str
    retry_after_ms: int | None = None


@dataclass(frozen=True, slots=True)
class NotSent:
    """It was surely not received: no byte of it left this machine."""

    message: str


@dataclass(frozen=True, slots=True)
class Busy:
    """The destination says that it did not take it now."""

    message: str
    retry_after_ms: int | None = None


Result = Answered | Refused | Unsure | NotSent | Busy


class Destination(Protocol):
    """One place that items go to. Each thread that sends has an instance of its own."""

    @property
    def name(self) -> str:
        """A stable word; part of the spool's rows."""

    @property
    def repeat_safe_ms(self) -> int | None:
        """For how long after the first attempt a repetition under the same key is booked once. None: for ever."""

    def send(self, parcel: Parcel) -> Result:
        """Make one attempt, in bounded time. Raises nothing that the network or the other side can cause."""

    def look_up(self, parcel: Parcel, *, first_attempt_ms: int | None) -> Answered | Unsure | None:
        """Whether it is booked there, without sending it. None: not found, which proves nothing.

        `first_attempt_ms` is wall time, or None if the clock was not synchronised then.
        """

    def close(self) -> None:
        """Drop connections. A later `send` opens them again."""

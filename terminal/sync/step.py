"""One step of the sync service: one piece of work, and when the next is due.

In this order: answers go to the terminal first, for somebody waits to see them; then new items are taken over, so that
an authorisation never queues behind a backlog; then the most urgent item that is due is sent. Nothing here sleeps or
loops; `loop` does.

After a failure a destination is left alone for a while that doubles, with full jitter: every wait is drawn between
nothing and its ceiling, so that a street full of terminals does not come back in one second. Meanwhile nothing
is sent but single probes, each time another item if there is one, since an item could be what the destination chokes
on. Two things break the silence: success, and a new urgent item. What a destination itself asks for (Retry-After) is
kept for every repetition and the backlog; only the first attempt of a new urgent item is made in spite of it, one per
customer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, assert_never

from terminal.clock import Clock, Entropy
from terminal.control import ControlError
from terminal.sync.destinations import Answered, Busy, Destination, NotSent, Parcel, Refused, Result, Unsure
from terminal.sync.errors import AnswerRejected, TerminalUnavailable, Unreadable
from terminal.sync.journal import Head, History, SyncJournal
from terminal.sync.spool import SENDABLE, Moment, On, OutboxItem, Row, Spool, State

FETCH_MAX: Final = 4  # so many envelopes of the largest kind (12 KiB) fit into one line of the socket (64 KiB)
IDLE_MS: Final = 2_000  # the longest wait with nothing due: a stop and the watchdog wait no longer than that
TERMINAL_AWAY_MS: Final = 1_000  # a restarting terminal is found again within a second, and asked no more often
LINK_NOTE_EVERY_MS: Final = 60_000  # a link that comes and goes with every item must not fill the journal
_NOTED_MAX: Final = 4_096  # ends of attempts that are not noted again: more items than ever wait
_DOUBLINGS_MAX: Final = 16  # beyond any sensible ceiling; only keeps the numbers small

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LinkReport:
    """How it stands between here and the host, for the terminal's screen and status."""

    online: bool  # no failure since the last success; true as well while nothing is known
    error: str | None
    queued: int  # goes on by itself
    held: int  # refused or held: waits for a person
    oldest_ms: int | None  # age of the oldest queued
    history: History = History.WHOLE
    # The journals' heads go along with every report and are no news by themselves.
    head: Head | None = field(default=None, compare=False)
    terminal_head: Head | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Offer:
    """What the terminal has to send, and how far its journal has come (None: it does not say)."""

    items: Sequence[OutboxItem]
    head: Head | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What the terminal has recorded of our journal, and whether its own contradicts what we have recorded of it."""

    sync_head: Head | None = None
    differs: bool = False


class Terminal(Protocol):
    """The terminal, over the local socket (docs/formats.md). Every call may raise `TerminalUnavailable`."""

    def fetch(self, max: int, wait_ms: int) -> Offer:
        """Items not yet handed over, urgent first; waits up to `wait_ms` for one."""

    def stored(self, keys: Sequence[str]) -> None:
        """These are durable here: do not offer them again."""

    def deliver(self, key: str, answer: str) -> None:
        """Returns once the answer is verified and committed. Raises `AnswerRejected` if it is not believed."""

    def report(self, report: LinkReport) -> Seen: ...


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


@dataclass(frozen=True, slots=True)
class Due:
    """When to call `step` again: 0 is at once."""

    in_ms: int


_AT_ONCE: Final = Due(0)
_NOTED: Final = frozenset({State.ANSWERED, State.AMBIGUOUS, State.REFUSED, State.HELD})


@dataclass(slots=True)
class _Link:
    """What is known of the way to one destination."""

    failures: int = 0
    silent_until_ms: int = 0
    asked_for: bool = False  # by the destination, with Retry-After
    error: str | None = None

    def failed(self, message: str, *, until_ms: int, asked_for: bool) -> None:
        self.failures += 1
        self.error = message
        if not self.asked_for or until_ms > self.silent_until_ms:  # what was asked for is not cut short
            self.silent_until_ms = until_ms
            self.asked_for = asked_for

    def succeeded(self) -> None:
        self.failures = self.silent_until_ms = 0
        self.asked_for = False
        self.error = None

    def hurry(self) -> None:
        """Somebody waits at the terminal: begin again with short waits."""
        if not self.asked_for:
            self.failures = self.silent_until_ms = 0


class Sync:
    """Moves items between terminal, spool and destinations. Not thread-safe."""

    def __init__(
        self,
        spool: Spool,
        destinations: Sequence[Destination],
        terminal: Terminal,
        journal: SyncJournal,
        *,
        clock: Clock,
        entropy: Entropy,
        backoff: Backoff,
    ) -> None:
        self._spool = spool
        self._destinations = {destination.name: destination for destination in destinations}
        self._links = {destination.name: _Link() for destination in destinations}
        self._terminal = terminal
        self._journal = journal
        self._clock = clock
        self._entropy = entropy
        self._backoff = backoff
        self._terminal_away_until_ms = 0
        self._noted: dict[tuple[str, str], None] = {}  # the oldest first
        self._link_noted: bool | None = None
        self._link_noted_ms = 0

    @property
    def terminal_away(self) -> bool:
        """Whether the terminal did not answer a moment ago and is not asked again yet."""
        return self._clock.monotonic_ms() < self._terminal_away_until_ms

    def step(self) -> Due:
        """Do one piece of work. Raises `SpoolUnavailable` when nothing can be stored."""
        if self._deliver() or self.fetch(wait_ms=0) or self._send():
            return _AT_ONCE
        return Due(self._wait_ms())

    def fetch(self, *, wait_ms: int) -> bool:
        """Take over what the terminal has to send, waiting up to `wait_ms` for it. True if there was something."""
        if self.terminal_away:
            return False
        try:
            offer = self._terminal.fetch(FETCH_MAX, wait_ms)
            self._terminal_away_until_ms = 0
            if offer.head is not None:
                self._journal.terminal_is_at(offer.head)
            items = offer.items
            if not items:
                return False
            new = self._spool.store(items, tuple(self._destinations))
            if any(item.urgent for item in new):
                for link in self._links.values():
                    link.hurry()
            self._terminal.stored([item.key for item in items])
            for item in new:
                self._journal.note("stored", key=item.key, number=item.number)
        except ControlError as error:
            self._terminal_is_away(error)
            return False
        return True

    def report(self) -> LinkReport:
        """How it stands now."""
        summary = self._spool.summary()
        # Once nothing is left to probe with, a failure of the past says nothing about the next sale.
        errors = [link.error for link in self._links.values() if link.error is not None and summary.queued]
        return LinkReport(
            online=not errors,
            error=errors[0] if errors else None,
            queued=summary.queued,
            held=summary.held,
            oldest_ms=summary.oldest_ms,
            history=self._journal.history,
            head=self._journal.head,
            terminal_head=self._journal.terminal_head,
        )

    def tell(self, report: LinkReport) -> bool:
        """Tell the terminal. True if it has heard."""
        if self.terminal_away:
            return False
        try:
            seen = self._terminal.report(report)
        except ControlError as error:
            self._terminal_is_away(error)
            return False
        self._journal.terminal_has_seen(seen.sync_head, differs=seen.differs)
        return True

    def note(self, report: LinkReport) -> None:
        """Record in our own journal that the way to the host has opened or closed."""
        now_ms = self._clock.monotonic_ms()
        due = self._link_noted is None or now_ms - self._link_noted_ms >= LINK_NOTE_EVERY_MS
        if due and report.online != self._link_noted:
            self._journal.note("link", online=report.online, error=report.error)
            self._link_noted, self._link_noted_ms = report.online, now_ms

    def _deliver(self) -> bool:
        """Hand a stored answer to the terminal, which alone can tell whether it is the host's."""
        if self.terminal_away:
            return False
        row = self._spool.next_to_deliver()
        if row is None:
            return False
        try:
            self._terminal.deliver(row.key, self._spool.answer(row))
        except (AnswerRejected, Unreadable) as error:
            self._failed(row, On.DISBELIEVE, f"the answer cannot be used: {error}")
        except TerminalUnavailable as error:
            self._terminal_is_away(error)
            return False
        except ControlError as error:
            # It is there, yet not for this one: the others must not wait behind it.
            self._spool.move(row.id, On.UNDELIVERED, due_in_ms=self._draw_ms(row) + 1, error=str(error))
        else:
            self._spool.move(row.id, On.DELIVER)
            if row.destination in self._links:
                self._links[row.destination].succeeded()
        return True

    def _send(self) -> bool:
        now_ms = self._clock.monotonic_ms()
        for name, destination in self._destinations.items():
            silent = now_ms < self._links[name].silent_until_ms
            row = self._spool.next_to_send(name, fresh_only=silent)
            if row is not None:
                self._attempt(row, destination)
                return True
        return False

    def _attempt(self, row: Row, destination: Destination) -> None:
        if self._too_late(row, destination):
            self._end(row, On.HOLD, error="it may be booked already, and repeating it is no longer safe")
            return
        try:
            parcel = self._spool.parcel(row)
        except Unreadable as error:
            self._end(row, On.HOLD, error=str(error))
            return
        self._spool.move(row.id, On.SEND)
        match _bounded(destination, parcel):
            case Answered(answer):
                self._end(row, On.ANSWER, answer=answer)
            case Refused(message, permanent):
                if permanent:
                    self._end(row, On.REFUSE, error=message)
                    self._links[row.destination].succeeded()  # the way is open, it is this item that does not pass
                else:
                    self._failed(row, On.NOT_TAKEN, message)
            case NotSent(message):
                self._failed(row, On.NOT_TAKEN, message)
            case Busy(message, retry_after_ms):
                self._failed(row, On.NOT_TAKEN, message, retry_after_ms)
            case Unsure(message, retry_after_ms):
                self._failed(row, On.UNSURE, message, retry_after_ms)
            case _ as never:
                assert_never(never)

    def _failed(self, row: Row, on: On, message: str, retry_after_ms: int | None = None) -> None:
        """Put the item off, and leave its destination alone for a while."""
        asked_ms = retry_after_ms or 0
        self._end(row, on, due_in_ms=max(self._draw_ms(row), asked_ms) + 1, error=message)
        if (link := self._links.get(row.destination)) is not None:
            wait_ms = max(self._backoff.draw_ms(link.failures, self._entropy), asked_ms)
            link.failed(message, until_ms=self._clock.monotonic_ms() + wait_ms, asked_for=asked_ms > 0)

    def _end(
        self, row: Row, on: On, *, due_in_ms: int = 0, error: str | None = None, answer: str | None = None
    ) -> None:
        """An attempt has ended. What it came to is noted once for each item, however often it is repeated."""
        after = self._spool.move(row.id, on, due_in_ms=due_in_ms, error=error, answer=answer)
        if after not in _NOTED or (row.id, after.value) in self._noted:
            return
        if len(self._noted) >= _NOTED_MAX:
            del self._noted[next(iter(self._noted))]
        self._noted[row.id, after.value] = None
        self._journal.note(after.value, key=row.key, destination=row.destination, error=error)

    def _draw_ms(self, row: Row) -> int:
        return self._backoff.draw_ms(row.attempts, self._entropy)

    def _too_late(self, row: Row, destination: Destination) -> bool:
        """Whether repeating could book twice. An age that no clock can tell is too old."""
        if destination.repeat_safe_ms is None or row.first_attempt is None or row.state is not State.AMBIGUOUS:
            return False
        age_ms = row.first_attempt.until_ms(Moment.now(self._clock))
        return age_ms is None or age_ms > destination.repeat_safe_ms

    def _terminal_is_away(self, error: Exception) -> None:
        if not self._terminal_away_until_ms:  # once, not every second of its absence
            _log.warning("%s", error)
        self._terminal_away_until_ms = self._clock.monotonic_ms() + TERMINAL_AWAY_MS

    def _wait_ms(self) -> int:
        now_ms = self._clock.monotonic_ms()
        due_ms = [now_ms + IDLE_MS]
        for name, link in self._links.items():
            if (row_due_ms := self._spool.next_due_ms(SENDABLE, name)) is not None:
                due_ms.append(max(row_due_ms, link.silent_until_ms))
        if self.terminal_away:
            due_ms.append(self._terminal_away_until_ms)
        elif (row_due_ms := self._spool.next_due_ms(frozenset({State.ANSWERED}))) is not None:
            due_ms.append(row_due_ms)
        return max(1, min(due_ms) - now_ms)


def _bounded(destination: Destination, parcel: Parcel) -> Result:
    """One attempt. A fault of ours in one item must not stop the others: it may have been sent, and is repeated."""
    try:
        return destination.send(parcel)
    except Exception:  # noqa: BLE001
        _log.exception("%s: a fault in sending", destination.name)
        return Unsure("a fault in this program, see its log: sent again later")

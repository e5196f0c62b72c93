"""One step of the sync service: what can be done now, and when there is more to do. Nothing here sleeps or loops.

A step takes up what has ended, takes over what the terminal has to send, sends off what there is room for, and hands
stored answers to the terminal. All that it changes is one transaction, so that a step costs one flush however much it
moves. Authorisations pass the backlog, and room is kept for them (`couriers`); how much of the backlog may be under way
is the breaker's to say, and when it may go at all the schedule's.

The order keeps every promise: an item is durable before the terminal lets go of it and before its first byte leaves; an
answer that is lost between the host and the terminal is asked for again, under the same key.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, assert_never

from terminal.clock import Clock, Entropy
from terminal.control import ControlError
from terminal.sync.breaker import Backoff, Breaker
from terminal.sync.couriers import URGENT_ROOM, Couriers, Done, Errand
from terminal.sync.destinations import Answered, Busy, NotSent, Refused, Unsure
from terminal.sync.errors import TerminalUnavailable, Unreadable
from terminal.sync.journal import Head, History, SyncJournal
from terminal.sync.schedule import Schedule
from terminal.sync.spool import Moment, On, OutboxItem, Row, Spool, State

FETCH_MAX: Final = 16  # as many as the terminal gives at once; its line on the socket ends it earlier
DELIVER_MAX: Final = 32  # answers in one call: the terminal commits them with one flush
DELIVER_CHARACTERS_MAX: Final = 48_000  # of them together: one line of the socket has 64 KiB
IDLE_MS: Final = 2_000  # the longest wait with nothing due: a stop and the watchdog wait no longer than that
TERMINAL_AWAY_MS: Final = 1_000  # a restarting terminal is found again within a second, and asked no more often
LINK_NOTE_EVERY_MS: Final = 60_000  # a link that comes and goes with every item must not fill the journal
SCHEDULE_EVERY_MS: Final = 30_000  # a window is known to the minute
_NOTED_MAX: Final = 4_096  # ends of attempts that are not noted again: more items than ever wait

_log = logging.getLogger(__name__)

__all__ = ["Backoff", "Delivered", "Due", "LinkReport", "Offer", "Seen", "Sync", "Terminal"]


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


@dataclass(frozen=True, slots=True)
class Delivered:
    """What the terminal made of one answer: the state of the sale, or why it did not take it."""

    key: str
    state: str | None = None
    error: str | None = None
    believed: bool = True


class Terminal(Protocol):
    """The terminal, over the local socket (docs/formats.md). Every call may raise `TerminalUnavailable`."""

    def fetch(self, max: int, wait_ms: int) -> Offer:
        """Items not yet handed over, urgent first; waits up to `wait_ms` for one."""

    def stored(self, keys: Sequence[str]) -> None:
        """These are durable here: do not offer them again."""

    def deliver(self, answers: Sequence[tuple[str, str]]) -> Sequence[Delivered]:
        """Keys and answers; returns once those that are believed are committed, with a word on each."""

    def report(self, report: LinkReport) -> Seen: ...


@dataclass(frozen=True, slots=True)
class Due:
    """When to call `step` again: 0 is at once."""

    in_ms: int


@dataclass(frozen=True, slots=True)
class DestinationReport:
    """How it stands with one destination; ages and times to go in milliseconds."""

    name: str
    online: bool | None  # None: nothing has been tried yet
    stable: bool
    position: str
    error: str | None
    last_success_ms: int | None
    last_error: str | None
    last_error_ms: int | None
    silent_ms: int
    in_flight: int
    queued: int
    held: int
    sums: dict[str, int]
    oldest_ms: int | None


_DIFFERS: Final = "differs"  # what the terminal makes of the host's word on a batch
_AT_ONCE: Final = Due(0)
_UNDER_WAY: Final = frozenset({State.SENDING, State.AMBIGUOUS})
_NOTED: Final = frozenset({State.ANSWERED, State.AMBIGUOUS, State.REFUSED, State.HELD})


@dataclass(slots=True)
class _Way:
    """One destination: who carries there, its breaker, and what is under way."""

    couriers: Couriers
    breaker: Breaker
    under_way: set[str] = field(default_factory=set)  # ids of rows
    last_drained_ms: int | None = None


class Sync:
    """Moves items between terminal, spool and destinations. Not thread-safe."""

    def __init__(
        self,
        spool: Spool,
        couriers: Sequence[Couriers],
        terminal: Terminal,
        journal: SyncJournal,
        *,
        clock: Clock,
        entropy: Entropy,
        backoff: Backoff,
        takes_envelopes: Sequence[str] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - it is frozen
    ) -> None:
        """`takes_envelopes`: the destinations that get what the terminal hands over; all, unless said otherwise.

        The first destination is the host: its link is the one that the terminal is told of.
        """
        self._spool = spool
        self._ways = {each.name: _Way(each, Breaker(each.room)) for each in couriers}
        self._takes_envelopes = tuple(self._ways if takes_envelopes is None else takes_envelopes)
        self._terminal = terminal
        self._journal = journal
        self._clock = clock
        self._entropy = entropy
        self._backoff = backoff
        self.schedule = schedule
        self.books_differ = False  # a day's end was not the host's: whoever compares the books takes this back
        self._pressed = False  # the backlog was opened by hand
        self._held = False  # an item was set apart, and another may take its place
        self._answered: dict[str, list[str]] = {}  # keys, by destination: to be noted
        self._terminal_away_until_ms = 0
        self._delivered: dict[str, tuple[Row, Delivered]] = {}  # the terminal has them, the spool does not know yet
        self._noted: dict[tuple[str, str], None] = {}  # the oldest first
        self._link_noted: bool | None = None
        self._link_noted_ms = 0

    @property
    def terminal_away(self) -> bool:
        """Whether the terminal did not answer a moment ago and is not asked again yet."""
        return self._clock.monotonic_ms() < self._terminal_away_until_ms

    def step(self) -> Due:
        """Do what can be done now. Raises `SpoolUnavailable` when nothing can be stored."""
        offer = self._fetched(wait_ms=0)
        ended = [(way, done) for way in self._ways.values() for done in way.couriers.ended()]
        delivered, self._delivered = self._delivered, {}
        with self._spool.together():
            for row, word in delivered.values():
                self._take_delivery(row, word)
            for way, done in ended:
                self._take_end(way, done)
            new = self._spool.store(offer.items, self._takes_envelopes) if offer and offer.items else ()
            if any(item.urgent for item in new):
                for name in self._takes_envelopes:
                    self._ways[name].breaker.hurry()
            errands = [(way, errand) for way in self._ways.values() for errand in self._errands(way)]
        self._note_answered()
        for way, errand in errands:
            way.couriers.send(errand)
        if offer and offer.items:
            self._acknowledge(offer.items, new)
        moved = self._deliver()
        held, self._held = self._held, False
        if moved or held or errands or ended or delivered or (offer and offer.items):
            return _AT_ONCE
        return Due(self._wait_ms())

    def fetch(self, *, wait_ms: int) -> bool:
        """Take over what the terminal has to send, waiting up to `wait_ms` for it. True if there was something."""
        offer = self._fetched(wait_ms=wait_ms)
        if not offer or not offer.items:
            return False
        self._acknowledge(offer.items, self._spool.store(offer.items, self._takes_envelopes))
        return True

    # ---- for people

    def press(self) -> int:
        """Send the backlog now, whatever the schedule and the waits say; how many items that is."""
        self._pressed = True
        self.network_changed()
        return sum(self._spool.waiting(name).queued for name in self._ways)

    def network_changed(self) -> None:
        """A link has come up or a route has changed: try again now rather than when a wait is over.

        What a destination has asked for by Retry-After is kept: its breaker knows.
        """
        self._spool.hurry()
        for way in self._ways.values():
            way.breaker.hurry()

    def is_under_way(self, row_id: str) -> bool:
        return row_id in self._delivered or any(row_id in way.under_way for way in self._ways.values())

    @property
    def backlog_open(self) -> bool:
        return self._pressed or all(self._scheduled(way) for way in self._ways.values())

    def destinations(self) -> Sequence[DestinationReport]:
        """How it stands with each."""
        now_ms = self._clock.monotonic_ms()
        return tuple(self._standing(name, way, now_ms) for name, way in self._ways.items())

    def _standing(self, name: str, way: _Way, now_ms: int) -> DestinationReport:
        breaker, waiting = way.breaker, self._spool.waiting(name)
        tried = breaker.last_success_ms is not None or breaker.last_error_ms is not None
        return DestinationReport(
            name=name,
            online=breaker.online if tried else None,
            stable=breaker.stable and tried,
            position=breaker.position(now_ms).value,
            error=breaker.error,
            last_success_ms=None if breaker.last_success_ms is None else now_ms - breaker.last_success_ms,
            last_error=breaker.last_error,
            last_error_ms=None if breaker.last_error_ms is None else now_ms - breaker.last_error_ms,
            silent_ms=breaker.silent_ms(now_ms),
            in_flight=len(way.under_way),
            queued=waiting.queued,
            held=waiting.held,
            sums=dict(waiting.sums_minor),
            oldest_ms=waiting.oldest_ms,
        )

    def report(self) -> LinkReport:
        """How it stands now, for the terminal: the way to the host, and what waits anywhere."""
        waiting = {name: self._spool.waiting(name) for name in self._ways}
        host = next(iter(self._ways))
        # Once nothing is left to probe with, a failure of the past says nothing about the next sale.
        error = self._ways[host].breaker.error if waiting[host].queued else None
        ages_ms = [each.oldest_ms for each in waiting.values() if each.oldest_ms is not None]
        return LinkReport(
            online=error is None,
            error=error,
            queued=sum(each.queued for each in waiting.values()),
            held=sum(each.held for each in waiting.values()),
            oldest_ms=max(ages_ms, default=None),
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

    # ---- from and to the terminal

    def _fetched(self, *, wait_ms: int) -> Offer | None:
        if self.terminal_away:
            return None
        try:
            offer = self._terminal.fetch(FETCH_MAX, wait_ms)
        except ControlError as error:
            self._terminal_is_away(error)
            return None
        self._terminal_away_until_ms = 0
        if offer.head is not None:
            self._journal.terminal_is_at(offer.head)
        return offer

    def _acknowledge(self, items: Sequence[OutboxItem], new: Sequence[OutboxItem]) -> None:
        """Only now that they are durable here."""
        try:
            self._terminal.stored([item.key for item in items])
        except ControlError as error:
            self._terminal_is_away(error)
            return
        if new:
            self._journal.note("stored", keys=[item.key for item in new], numbers=[item.number for item in new])

    def _deliver(self) -> bool:
        """Hand stored answers to the terminal, which alone can tell whether they are the host's."""
        if self.terminal_away:
            return False
        answers: dict[str, tuple[Row, str]] = {}
        characters = 0
        unreadable: list[tuple[Row, str]] = []
        for row in self._spool.to_deliver(DELIVER_MAX):
            if row.destination not in self._takes_envelopes:
                # Not the terminal's to judge: it has not asked for it.
                self._delivered[row.id] = (row, Delivered(row.key))
                continue
            try:
                answer = self._spool.answer(row)
            except Unreadable as error:
                unreadable.append((row, str(error)))
                continue
            characters += len(answer)
            if answers and characters > DELIVER_CHARACTERS_MAX:
                break
            answers[row.key] = row, answer
        for row, message in unreadable:
            self._delivered[row.id] = row, Delivered(row.key, error=message, believed=False)
        if not answers:
            return bool(self._delivered)
        try:
            words = self._terminal.deliver([(key, answer) for key, (_, answer) in answers.items()])
        except TerminalUnavailable as error:
            self._terminal_is_away(error)
            return bool(self._delivered)
        except ControlError as error:
            words = [Delivered(key, error=str(error)) for key in answers]
        for word in words:
            row, _ = answers[word.key]
            self._delivered[row.id] = row, word
        return True

    def _take_delivery(self, row: Row, word: Delivered) -> None:
        if word.error is None:
            self._spool.move(row.id, On.DELIVER, settled=word.state)
            self.books_differ = self.books_differ or (row.event == "batch" and word.state == _DIFFERS)
            if (way := self._ways.get(row.destination)) is not None:
                way.breaker.succeeded(self._clock.monotonic_ms())
        elif not word.believed:
            self._failed(row, On.DISBELIEVE, f"the answer cannot be used: {word.error}")
        else:
            # It is there, yet not for this one: the others must not wait behind it.
            self._spool.move(row.id, On.UNDELIVERED, due_in_ms=self._draw_ms(row) + 1, error=word.error)

    def _terminal_is_away(self, error: Exception) -> None:
        if not self._terminal_away_until_ms:  # once, not every second of its absence
            _log.warning("%s", error)
        self._terminal_away_until_ms = self._clock.monotonic_ms() + TERMINAL_AWAY_MS

    # ---- to the destinations

    def _scheduled(self, way: _Way) -> bool:
        waiting = self._spool.waiting(way.couriers.name)
        now = Moment.now(self._clock)
        if not waiting.queued:
            way.last_drained_ms = now.monotonic_ms
        return self.schedule.open(now, waiting, last_drained_ms=way.last_drained_ms)

    def _errands(self, way: _Way) -> list[Errand]:
        """What is sent off now, marked as such."""
        breaker, now_ms = way.breaker, self._clock.monotonic_ms()
        name, under_way = way.couriers.name, way.under_way
        room = breaker.allows(now_ms, len(under_way))
        spare = way.couriers.room + (URGENT_ROOM if way.couriers.room > 1 else 0) - len(under_way)
        if room:
            scheduled = self._pressed or self._scheduled(way)
            rows = self._spool.to_send(name, room, without=under_way, urgent_only=not scheduled)
            if self._pressed and not rows and not under_way and not self._spool.waiting(name).queued:
                self._pressed = any(self._spool.waiting(each).queued for each in self._ways)
        else:
            rows = []
        if spare > len(rows):
            # A customer's first attempt is made in spite of silence and of whatever else is under way.
            taken = under_way | {row.id for row in rows}
            rows += self._spool.to_send(name, spare - len(rows), without=taken, fresh_only=True)
        return [errand for row in rows if (errand := self._errand(way, row)) is not None]

    def _errand(self, way: _Way, row: Row) -> Errand | None:
        try:
            parcel = self._spool.parcel(row)
        except Unreadable as error:
            self._end(row, On.HOLD, error=str(error))
            self._held = True
            return None
        way.under_way.add(row.id)
        if self._too_late(row, way.couriers):
            first = row.first_attempt
            known_ms = first.wall_ms if first is not None and first.synchronised else None
            return Errand(row, parcel, way.breaker.round, look_up=True, first_attempt_ms=known_ms)
        self._spool.move(row.id, On.SEND)
        return Errand(row, parcel, way.breaker.round)

    def _take_end(self, way: _Way, done: Done) -> None:
        row, round_ = done.errand.row, done.errand.round
        way.under_way.discard(row.id)
        if self._spool.state(row.id) not in _UNDER_WAY:
            # Held meanwhile, because the terminal offered another envelope for it: a person has to look.
            _log.warning("%s: what came of the attempt under way is not used, the item was set apart", row.id)
            return
        match done.result:
            case Answered(answer, receipt):
                self._end(row, On.ANSWER, answer=answer, receipt=receipt)
                if row.destination not in self._takes_envelopes:
                    way.breaker.succeeded(self._clock.monotonic_ms())
            case None:
                message = "it may be booked already, was not found there, and repeating it is no longer safe"
                self._end(row, On.HOLD, error=message)
            case Refused(message, permanent):
                if permanent:
                    self._end(row, On.REFUSE, error=message)
                    # The way is open, it is this item that does not pass.
                    way.breaker.succeeded(self._clock.monotonic_ms())
                else:
                    self._failed(row, On.NOT_TAKEN, message, round_=round_)
            case NotSent(message):
                self._failed(row, On.NOT_TAKEN, message, round_=round_)
            case Busy(message, retry_after_ms):
                self._failed(row, On.NOT_TAKEN, message, retry_after_ms, round_=round_)
            case Unsure(message, retry_after_ms):
                self._failed(row, On.UNSURE, message, retry_after_ms, round_=round_)
            case _ as never:
                assert_never(never)

    def _failed(
        self, row: Row, on: On, message: str, retry_after_ms: int | None = None, *, round_: int | None = None
    ) -> None:
        """Put the item off, and leave its destination alone for a while."""
        asked_ms = retry_after_ms or 0
        self._end(row, on, due_in_ms=max(self._draw_ms(row), asked_ms) + 1, error=message)
        if (way := self._ways.get(row.destination)) is not None:
            breaker = way.breaker
            breaker.failed(
                message,
                round_=breaker.round if round_ is None else round_,
                now_ms=self._clock.monotonic_ms(),
                wait_ms=max(self._backoff.draw_ms(breaker.failures, self._entropy), asked_ms),
                asked_for=asked_ms > 0,
            )

    def _end(
        self,
        row: Row,
        on: On,
        *,
        due_in_ms: int = 0,
        error: str | None = None,
        answer: str | None = None,
        receipt: str | None = None,
    ) -> None:
        """An attempt has ended. What it came to is noted once for each item, however often it is repeated."""
        after = self._spool.move(row.id, on, due_in_ms=due_in_ms, error=error, answer=answer, receipt=receipt)
        if after not in _NOTED or (row.id, after.value) in self._noted:
            return
        if len(self._noted) >= _NOTED_MAX:
            del self._noted[next(iter(self._noted))]
        self._noted[row.id, after.value] = None
        if after is State.ANSWERED:
            self._answered.setdefault(row.destination, []).append(row.key)
        else:
            self._journal.note(after.value, key=row.key, destination=row.destination, error=error)

    def _note_answered(self) -> None:
        """One note for all that was answered in a step: a backlog goes out by the thousand."""
        answered, self._answered = self._answered, {}
        for destination, keys in answered.items():
            self._journal.note("answered", keys=keys, destination=destination)

    def _draw_ms(self, row: Row) -> int:
        return self._backoff.draw_ms(row.attempts, self._entropy)

    def _too_late(self, row: Row, couriers: Couriers) -> bool:
        """Whether repeating could book twice. An age that no clock can tell is too old."""
        if couriers.repeat_safe_ms is None or row.first_attempt is None or row.state is not State.AMBIGUOUS:
            return False
        age_ms = row.first_attempt.until_ms(Moment.now(self._clock))
        return age_ms is None or age_ms > couriers.repeat_safe_ms

    def _wait_ms(self) -> int:
        now_ms = self._clock.monotonic_ms()
        due_ms = [now_ms + IDLE_MS]
        for name, way in self._ways.items():
            silent_until_ms = now_ms + way.breaker.silent_ms(now_ms)
            if (row_due_ms := self._spool.next_due_ms(name)) is not None:
                due_ms.append(max(row_due_ms, silent_until_ms))
            if silent_until_ms > now_ms and self._spool.waiting(name).queued:
                due_ms.append(silent_until_ms)  # for those that were not put off themselves
        if self.terminal_away:
            due_ms.append(self._terminal_away_until_ms)
        elif (row_due_ms := self._spool.next_delivery_ms()) is not None:
            due_ms.append(row_due_ms)
        return max(1, min(due_ms) - now_ms)

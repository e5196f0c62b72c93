"""Days' ends: what has been sold since the last one, and closing it (docs/formats.md, Batches).

A day ends when somebody says so, or by itself at the time that is configured. The batch goes to the host behind every
sale in it, and the host says whether it holds the same sums.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import msgspec

from terminal.clock import Clock
from terminal.config import Config
from terminal.control import CALLER, Call, CallRefused, Role
from terminal.ledger.days import RANGE_MAX
from terminal.ledger.errors import DayStaysOpen
from terminal.ledger.ledger import Ledger
from terminal.ledger.sealing import Envelopes
from terminal.ledger.values import Batch, Figure, OpenDay
from terminal.link import Link
from terminal.records import said

_LOOK_EVERY_MS: Final = 30_000
_BY_ITSELF: Final = -1  # no user's id
_WAIT_MS_MAX: Final = 60_000

_REGISTER: Final = frozenset({Role.REGISTER, Role.OPERATOR})
_log = logging.getLogger(__name__)


class _Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Show(_Arguments, frozen=True):
    pass


class End(_Arguments, frozen=True):
    wait_ms: Annotated[int, msgspec.Meta(ge=0, le=_WAIT_MS_MAX)] = 0


class Days:
    """The handlers, bound to one open ledger, and the clock's look at the time."""

    def __init__(self, config: Config, ledger: Ledger, envelopes: Envelopes, link: Link, clock: Clock) -> None:
        self._ledger = ledger
        self._envelopes = envelopes
        self._link = link
        self._clock = clock
        self._at = config.terminal.day_end
        self._looked_ms: int | None = None

    def calls(self) -> Mapping[str, Call]:
        return {
            "day.show": Call(Show, said(self._show), _REGISTER),
            "day.end": Call(End, said(self._end), _REGISTER),
        }

    def end(self, uid: int) -> Batch:
        """Close the day. Raises `DayStaysOpen`, `DiskTrouble`."""
        batch = self._ledger.end_day(
            lambda batch, number: self._envelopes.batch(
                batch,
                number=number,
                unsent=self._ledger.unsent_between(batch.first, batch.last),
                clock_synchronised=self._clock.synchronised(),
            )
        )
        self._ledger.note("day_end", no=batch.no, uid=uid)
        self._link.outbox_changed()
        return batch

    def look(self) -> None:
        """From time to time, while nobody waits: is the day over, or as long as a batch may be?"""
        now_ms = self._clock.monotonic_ms()
        if self._looked_ms is not None and now_ms - self._looked_ms < _LOOK_EVERY_MS:
            return
        self._looked_ms = now_ms
        day = self._ledger.open_day()
        if day.last < day.first or not (self._is_over(day) or day.last - day.first >= RANGE_MAX // 2):
            return
        try:
            batch = self.end(_BY_ITSELF)
        except DayStaysOpen:
            return  # a sale has begun in this moment
        _log.info("day's end %d: transactions %d to %d", batch.no, batch.first, batch.last)

    def _is_over(self, day: OpenDay) -> bool:
        """Whether the configured time of day has passed since the last end. Without a true clock nobody can say."""
        if self._at is None or not self._clock.synchronised():
            return False
        now = datetime.fromtimestamp(self._clock.wall_ms() / 1000, UTC).astimezone()
        hour, minute = map(int, self._at.split(":"))
        due = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
        if due > now:
            due -= timedelta(days=1)
        since_ms = day.since_ms if day.since_ms is not None else self._opened_ms(day.first)
        return since_ms < due.timestamp() * 1000

    def _opened_ms(self, number: int) -> int:
        """When the first transaction was opened, before the first day's end."""
        found = self._ledger.booking_states(number, number, 1)
        return self._ledger.transaction(found[0].id).opened_at_ms if found else 0

    def _show(self, _: Show) -> dict[str, Any]:
        last = self._ledger.last_batch()
        return {"open": _open(self._ledger.open_day()), "last": None if last is None else _closed(last)}

    def _end(self, arguments: End) -> dict[str, Any]:
        uid = CALLER.get()
        try:
            batch = self.end(os.getuid() if uid is None else uid)
        except DayStaysOpen as error:
            raise CallRefused("day_stays_open", str(error)) from error
        self._link.wait_for_answer(lambda: self._answered(batch), timeout_ms=arguments.wait_ms)
        last = self._ledger.last_batch()
        return _closed(last if last is not None and last.id == batch.id else batch)

    def _answered(self, batch: Batch) -> bool:
        last = self._ledger.last_batch()
        return last is None or last.id != batch.id or last.decision is not None


def _open(day: OpenDay) -> dict[str, Any]:
    return {
        "no": day.no,
        "first": day.first,
        "last": day.last,
        "sold": _figures(day.sold),
        "corrected": _figures(day.corrected),
        "since_ms": day.since_ms,
    }


def _closed(batch: Batch) -> dict[str, Any]:
    host = batch.host
    return {
        "id": str(batch.id),
        "no": batch.no,
        "first": batch.first,
        "last": batch.last,
        "sold": _figures(batch.sold),
        "corrected": _figures(batch.corrected),
        "taken_at_ms": batch.taken_at_ms,
        "decision": batch.decision,
        "host": None
        if host is None
        else [{"currency": code, "count": n, "sum_minor": minor} for code, n, minor in host],
        "missing": [list(each) for each in batch.missing],
    }


def _figures(figures: tuple[Figure, ...]) -> list[dict[str, Any]]:
    return [
        {"currency": each.currency.code, "scheme": each.scheme, "count": each.count, "sum_minor": each.sum_minor}
        for each in figures
    ]

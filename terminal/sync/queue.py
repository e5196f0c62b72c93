"""What people ask of the queue: the calls of sync's socket about single items (docs/formats.md, Sync's socket).

They need nothing but the spool. So the running service answers them, and a command answers them by itself when no
service runs. Nothing waits that `queue.list` does not list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

import msgspec

from terminal.clock import Clock
from terminal.control import Call, CallRefused, Role
from terminal.sync.errors import SyncError
from terminal.sync.spool import APART, OPEN, SENDABLE, Moment, Row, Spool, State

LIST_MAX: Final = 50  # items in one answer: it stays within one line of the socket
EXPORT_MAX: Final = 4  # with envelopes of the largest kind (12 KiB), for the same reason

_OPERATOR: Final = frozenset({Role.OPERATOR})
_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
_Reason = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]


class _Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class List(_Arguments, frozen=True):
    limit: Annotated[int, msgspec.Meta(ge=1, le=LIST_MAX)] = LIST_MAX
    after: Annotated[int, msgspec.Meta(ge=0)] | None = None
    destination: str | None = None
    state: str | None = None


class One(_Arguments, frozen=True):
    id: _Id


class Change(_Arguments, frozen=True):
    id: _Id
    reason: _Reason


class Export(_Arguments, frozen=True):
    after: Annotated[int, msgspec.Meta(ge=0)] | None = None


class Queue:
    """The handlers, bound to one open spool. In the thread that uses the spool."""

    def __init__(self, spool: Spool, clock: Clock, is_under_way: Callable[[str], bool] = lambda _: False) -> None:
        self._spool = spool
        self._clock = clock
        self._is_under_way = is_under_way

    def calls(self) -> Mapping[str, Call]:
        return {
            "queue.list": Call(List, _said(self._list), _OPERATOR),
            "queue.show": Call(One, _said(self._show), _OPERATOR),
            "queue.retry": Call(Change, _said(self._retry), _OPERATOR),
            "queue.hold": Call(Change, _said(self._hold), _OPERATOR),
            "queue.export": Call(Export, _said(self._export), _OPERATOR),
        }

    def _list(self, arguments: List) -> dict[str, Any]:
        states = OPEN | APART
        if arguments.state is not None:
            if arguments.state not in {state.value for state in State}:
                known = ", ".join(state.value for state in State)
                raise CallRefused("no_such_state", f"there is no state {arguments.state!r}: {known}")
            states = frozenset({State(arguments.state)})
        found = self._spool.page(
            arguments.limit + 1, after=arguments.after or 0, destination=arguments.destination, states=states
        )
        shown = found[: arguments.limit]
        return {
            "items": [self._item(row) for row in shown],
            "more": shown[-1].number_here if len(found) > len(shown) else None,
        }

    def _show(self, arguments: One) -> dict[str, Any]:
        row = self._find(arguments.id)
        sha256, key, answered, receipt = self._spool.particulars(row)
        return self._item(row) | {
            "sha256": sha256,
            "idempotency_key_digest": key,
            "answered": answered,
            "receipt": receipt,
        }

    def _retry(self, arguments: Change) -> dict[str, Any]:
        row = self._find(arguments.id)
        if row.state not in APART:
            raise CallRefused(
                "not_possible", f"{row.id} is {row.state.value}: only what is refused or held waits for a person"
            )
        self._spool.retry(row.id, arguments.reason)
        return self._item(self._find(row.id))

    def _hold(self, arguments: Change) -> dict[str, Any]:
        row = self._find(arguments.id)
        if row.state not in SENDABLE or self._is_under_way(row.id):
            what = "under way just now, try again" if self._is_under_way(row.id) else row.state.value
            raise CallRefused("not_possible", f"{row.id} is {what}: only what still waits can be held back")
        self._spool.hold(row.id, arguments.reason)
        return self._item(self._find(row.id))

    def _export(self, arguments: Export) -> dict[str, Any]:
        found = self._spool.page(EXPORT_MAX + 1, after=arguments.after or 0)
        shown = found[:EXPORT_MAX]
        items = []
        for row in shown:
            parcel = self._spool.parcel(row)
            items.append(self._item(row) | {"body": parcel.body, "idempotency_key": parcel.idempotency_key})
        return {"items": items, "more": shown[-1].number_here if len(found) > len(shown) else None}

    def _find(self, row_id: str) -> Row:
        row = self._spool.row(row_id)
        if row is None:
            raise CallRefused("no_such_item", f"nothing in the queue is called {row_id!r}")
        return row

    def _item(self, row: Row) -> dict[str, Any]:
        now = Moment.now(self._clock)
        figures = self._spool.figures(row)
        return {
            "row": row.number_here,
            "id": row.id,
            "transaction": str(row.transaction),
            "event": row.event,
            "destination": row.destination,
            "number": row.number,
            "urgent": row.urgent,
            "state": row.state.value,
            "attempts": row.attempts,
            "stored_ms": _age_ms(row.stored, now),
            "first_attempt_ms": None if row.first_attempt is None else _age_ms(row.first_attempt, now),
            "due_ms": max(0, row.due_ms - now.monotonic_ms),
            "amount_minor": None if figures is None else figures[0],
            "currency": None if figures is None else figures[1],
            "error": row.error,
            "waits_for": self._waits_for(row),
        }

    def _waits_for(self, row: Row) -> str | None:
        if row.after is None or row.state not in SENDABLE:
            return None
        earlier = self._spool.told(row.after, row.destination)
        open_ = (each.number_here < row.number_here and each.state is not State.DELIVERED for each in earlier)
        return str(row.after) if any(open_) else None


def _age_ms(moment: Moment, now: Moment) -> int:
    """At least so long, if no clock can tell."""
    age_ms = moment.until_ms(now)
    return now.monotonic_ms if age_ms is None else age_ms


def _said(handler: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    def handle(arguments: Any) -> dict[str, Any]:
        try:
            return handler(arguments)
        except SyncError as error:
            raise CallRefused("spool", str(error)) from error

    return handle

"""How the sync service stands, and having the backlog sent now: calls of its socket."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from terminal.clock import Clock
from terminal.control import Call, Role
from terminal.sync.step import Sync

_OPERATOR: Final = frozenset({Role.OPERATOR})


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


def status_calls(sync: Sync, clock: Clock, reconciled: Callable[[], dict[str, Any] | None]) -> Mapping[str, Call]:
    """The part of the table that needs the running service."""

    def status(_: Nothing) -> dict[str, Any]:
        return {
            "mode": sync.schedule.mode.value,
            "backlog_open": sync.backlog_open,
            "now": {"wall_ms": clock.wall_ms(), "synchronised": clock.synchronised()},
            "destinations": [msgspec.to_builtins(each) for each in sync.destinations()],
            "reconciled": reconciled(),
        }

    def now(_: Nothing) -> dict[str, Any]:
        return {"queued": sync.press()}

    return {"sync.status": Call(Nothing, status), "sync.now": Call(Nothing, now, _OPERATOR)}

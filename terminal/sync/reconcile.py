"""Holding the ledger against the host's books: sync's half (docs/reconciliation.md).

Carries the terminal's signed questions to the host and the signed answers back, until the terminal has no more; keeps
the last report, and asks once a day by itself. What can be repaired safely is nothing but sending again: a held or
refused item whose sale the host does not have as the ledger has it. It has a connection of its own to both sides, so
that nothing else waits for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Protocol
from uuid import UUID

import msgspec

from terminal.clock import Clock
from terminal.control import Call, CallRefused, ControlError, Role
from terminal.sync import records
from terminal.sync.destinations import Answered, Destination, Parcel
from terminal.sync.errors import NotListed
from terminal.sync.schedule import Mode
from terminal.sync.step import LinkReport

QUESTIONS_MAX: Final = 2_000  # to the host in one run: more differences than that are one great difference
DIFFERENCES_MAX: Final = 100  # in one report: it stays within one line of the socket
FIRST_AFTER_MS: Final = 600_000  # after a start: what waits goes first
_DAY_MS: Final = 86_400_000
_NAME: Final = "reconciled.json"
_WAIT_MS_MAX: Final = 600_000

_OPERATOR: Final = frozenset({Role.OPERATOR})
_log = logging.getLogger(__name__)


class Asking(Protocol):
    """The terminal's socket."""

    def call(self, do: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]: ...

    def close(self) -> None: ...


class ClosableRegister(records.Register, Protocol):
    def close(self) -> None: ...


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    first: Annotated[int, msgspec.Meta(ge=1)] | None = None
    last: Annotated[int, msgspec.Meta(ge=1)] | None = None
    days: Annotated[int, msgspec.Meta(ge=1, le=3660)] | None = None
    repair: bool = False
    wait_ms: Annotated[int, msgspec.Meta(ge=0, le=_WAIT_MS_MAX)] = 0  # a client's patience; not looked at


class Reconciler:
    """One run at a time, in whichever thread asks for it. `queue` are the queue's calls, for any thread."""

    def __init__(
        self,
        connect: Callable[[], Asking],
        build: Callable[[], Destination],
        queue: Mapping[str, Call],
        directory: Path,
        clock: Clock,
        *,
        stripe: Callable[[], ClosableRegister] | None = None,
    ) -> None:
        self._connect = connect
        self._build = build
        self._stripe = stripe
        self._queue = queue
        self._path = directory / _NAME
        self._clock = clock
        self._running = threading.Lock()
        self._last = self._read()

    def calls(self) -> Mapping[str, Call]:
        return {"reconcile.run": Call(Run, self._run, _OPERATOR)}

    def last(self) -> dict[str, Any] | None:
        """The last report in short, with its age; None before the first."""
        known = self._last
        if known is None:
            return None
        age_ms = max(0, self._clock.wall_ms() - known["wall_ms"])
        return {name: value for name, value in known.items() if name != "wall_ms"} | {"age_ms": age_ms}

    def run(self, asked: Run) -> dict[str, Any]:
        """Compare, and keep the report. Raises `CallRefused`, `ControlError`."""
        if not self._running.acquire(blocking=False):
            raise CallRefused("busy", "the books are being compared already: ask again in a moment")
        try:
            with contextlib.closing(self._connect()) as terminal, contextlib.closing(self._build()) as host:
                report = self._compared(terminal, host, asked)
                if asked.repair:
                    report["repaired"] = self._repair(report)
                report["stripe"] = None if self._stripe is None else self._compared_with_stripe(terminal, report)
                counts = {name: report[name] for name in ("first", "last", "compared")}
                counts |= {name: len(report[name]) for name in ("differences", "under_way")}
                terminal.call("reconcile.ended", counts)
            self._keep(counts | {"more": report["more"]})
            return report
        finally:
            self._running.release()

    def _run(self, asked: Run) -> dict[str, Any]:
        return self.run(asked)

    def _compared(self, terminal: Asking, host: Destination, asked: Run) -> dict[str, Any]:
        begun = terminal.call("reconcile.begin", {"first": asked.first, "last": asked.last, "days": asked.days})
        report: dict[str, Any] = {
            "first": begun["first"],
            "last": begun["last"],
            "compared": 0,
            "differences": [],
            "under_way": [],
            "repaired": [],
            "questions": 0,
            "more": False,
        }
        left = deque(begun["questions"])
        while left:
            if report["questions"] >= QUESTIONS_MAX or len(report["differences"]) >= DIFFERENCES_MAX:
                report["more"] = True
                break
            question = left.popleft()
            report["questions"] += 1
            found = terminal.call("reconcile.compare", {"id": question["id"], "answer": _ask(host, question)})
            left.extendleft(reversed(found["questions"]))
            report["compared"] += found["compared"]
            report["differences"] += found["differences"]
            report["under_way"] += found["under_way"]
        report["under_way"] = report["under_way"][:DIFFERENCES_MAX]
        return report

    def _compared_with_stripe(self, terminal: Asking, report: dict[str, Any]) -> dict[str, Any]:
        """The same range against Stripe's records; `error` says why that could not be done."""
        assert self._stripe is not None  # noqa: S101 - its caller has looked
        try:
            with contextlib.closing(self._stripe()) as register:
                return records.compare(terminal.call, self._asked, register, report["first"], report["last"])
        except NotListed as error:
            return {"error": str(error)}

    def _asked(self, do: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """One of the queue's calls."""
        call = self._queue[do]
        # What the calls take is what a message on the socket says.
        return dict(call.handle(msgspec.convert(arguments, call.arguments)))

    def _repair(self, report: dict[str, Any]) -> list[str]:
        """Send again what is held or refused of a sale that the host lacks, or has not answered."""
        repaired = []
        missing = {each["transaction"] for each in report["differences"] if each["theirs"] is None}
        missing |= {each["transaction"] for each in report["under_way"]}
        for item in self._apart():
            if item["transaction"] in missing and item["destination"] == "host":
                self._asked("queue.retry", {"id": item["id"], "reason": "reconciliation"})
                repaired.append(item["id"])
        return repaired

    def _apart(self) -> list[dict[str, Any]]:
        found = []
        for state in ("held", "refused"):
            after = None
            while True:
                page = self._asked("queue.list", {"state": state, "after": after})
                found += page["items"]
                if (after := page["more"]) is None:
                    break
        return found

    def _keep(self, counts: dict[str, Any]) -> None:
        self._last = counts | {"wall_ms": self._clock.wall_ms()}
        unfinished = self._path.with_name(_NAME + ".new")
        try:
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(self._last, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._path)
        except OSError as error:  # the comparison counts all the same
            _log.warning("the report of the reconciliation could not be kept: %s", error.strerror)

    def _read(self) -> dict[str, Any] | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Kept).told()
        except (OSError, msgspec.MsgspecError):
            return None  # none yet, or nobody can read it any more: the next one comes within a day


class _Kept(msgspec.Struct, frozen=True):
    first: int
    last: int
    compared: int
    differences: int
    under_way: int
    more: bool
    wall_ms: int

    def told(self) -> dict[str, Any]:
        return dict(msgspec.to_builtins(self))


class Daily:
    """Once a day, at a time of its own, so that a thousand terminals do not ask in the same minute."""

    def __init__(self, reconciler: Reconciler, clock: Clock, *, terminal: str, days: int) -> None:
        self._reconciler = reconciler
        self._clock = clock
        self._days = days
        share = int.from_bytes(hashlib.sha256(terminal.encode()).digest()[:8], "big") / 2**64
        self._phase_ms = int(share * _DAY_MS)
        self._begin_ms = clock.monotonic_ms() + FIRST_AFTER_MS
        self._day: int | None = None
        self._thread: threading.Thread | None = None

    def look(self, link: LinkReport, mode: Mode, *, now: bool = False) -> None:
        """From the loop: run now, in a thread of its own, if it is time and there is a way to the host.

        `now`: a day's end has shown that the books differ, so it is time in any case.
        """
        is_running = self._thread is not None and self._thread.is_alive()
        if is_running or not (now or self._is_time(link, mode)):
            return
        self._thread = threading.Thread(target=self._run, name="reconcile", daemon=True)
        self._thread.start()

    def _is_time(self, link: LinkReport, mode: Mode) -> bool:
        if not link.online or mode in (Mode.METERED, Mode.MANUAL) or not self._clock.synchronised():
            return False
        day = (self._clock.wall_ms() - self._phase_ms) // _DAY_MS
        if day == self._day or self._clock.monotonic_ms() < self._begin_ms:
            return False
        last = self._reconciler.last() if self._day is None else None
        self._day = day
        return last is None or last["age_ms"] >= _DAY_MS // 2  # a restart is no new day

    def _run(self) -> None:
        try:
            report = self._reconciler.run(Run(days=self._days, repair=True))
        except ControlError as error:
            _log.warning("the books were not compared: %s", error)
            return
        at_stripe = (report["stripe"] or {}).get("differences", [])
        if report["differences"] or at_stripe:
            differ = len(report["differences"]), len(at_stripe)
            _log.error("differences: %d to the host's books, %d to Stripe's records: payterm reconcile", *differ)
        else:
            _log.info("the books agree: %d transactions", report["compared"])


def _ask(host: Destination, question: dict[str, Any]) -> str:
    """The host's answer. Raises `CallRefused`."""
    parcel = Parcel(UUID(question["id"]), "reconciliation", question["id"], question["envelope"])
    result = host.send(parcel)
    if isinstance(result, Answered):
        return result.answer
    raise CallRefused("not_reached", f"{result.message}. Nothing was changed; ask again later")

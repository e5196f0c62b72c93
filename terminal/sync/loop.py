"""The sync service's loop: it sleeps, and calls `step`. The sleep is the terminal's own long poll, so that a new sale
ends it at once; only while the terminal is away does this process sleep by itself.

A stop is seen between two pieces of work. The piece in hand is finished, for an attempt that is broken off is an
ambiguous one: at most the exchange's total time-out plus one idle wait.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from terminal.clock import Clock, Entropy
from terminal.ledger.keys import SecretKey
from terminal.sync.destinations.host import HostDestination, HostSettings
from terminal.sync.journal import SyncJournal
from terminal.sync.spool import Spool
from terminal.sync.step import Backoff, LinkReport, Sync, Terminal

REPORT_EVERY_MS: Final = 30_000  # the age of the oldest unsent sale is on the screen in minutes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SyncSettings:
    """What the service needs to know."""

    state_directory: Path  # the service's own, mode 0700
    spool_key: SecretKey = field(repr=False)
    host: HostSettings
    backoff: Backoff = field(default_factory=Backoff)


def run(
    settings: SyncSettings,
    terminal: Terminal,
    *,
    clock: Clock,
    entropy: Entropy,
    stop: threading.Event,
    alive: Callable[[], None],
) -> None:
    """Serve until `stop`. `alive` is called before each piece of work. Raises `SpoolUnavailable`, `Unsendable`."""
    with (
        contextlib.closing(HostDestination(settings.host)) as host,
        contextlib.closing(Spool(settings.state_directory, settings.spool_key, clock=clock, entropy=entropy)) as spool,
        # After the spool, whose lock keeps a second process out of the whole directory.
        contextlib.closing(
            SyncJournal(settings.state_directory, settings.spool_key, clock=clock, entropy=entropy)
        ) as journal,
    ):
        sync = Sync(spool, [host], terminal, journal, clock=clock, entropy=entropy, backoff=settings.backoff)
        reporter = _Reporter(sync, clock)
        while not stop.is_set():
            alive()
            due = sync.step()
            report = sync.report()
            reporter.tell(report)
            sync.note(report)
            if not due.in_ms:
                continue
            journal.tidy()
            if sync.terminal_away:
                stop.wait(due.in_ms / 1000)
            else:
                sync.fetch(wait_ms=due.in_ms)


class _Reporter:
    """Tells the terminal how the link stands: on every change, and from time to time because ages change."""

    def __init__(self, sync: Sync, clock: Clock) -> None:
        self._sync = sync
        self._clock = clock
        self._told: LinkReport | None = None
        self._told_ms = 0

    def tell(self, report: LinkReport) -> None:
        now_ms = self._clock.monotonic_ms()
        known = self._told is not None and replace(report, oldest_ms=None) == replace(self._told, oldest_ms=None)
        if known and now_ms - self._told_ms < REPORT_EVERY_MS:
            return
        if self._told is None or self._told.online != report.online:
            _log.info("host: %s", report.error or "online")
        # A terminal that was away may have been restarted and know nothing.
        self._told = report if self._sync.tell(report) else None
        self._told_ms = now_ms

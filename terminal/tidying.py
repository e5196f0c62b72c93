"""The thread that lets the ledger tidy up while nobody waits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from terminal.days import Days
from terminal.ledger.errors import LedgerError
from terminal.ledger.ledger import Ledger
from terminal.ledger.sealing import Envelopes

_LOOK_S: Final = 1.0
_BREATH_S: Final = 0.02  # between two pieces: a sale that comes now finds lock and processor free
_STOP_S: Final = 5.0  # the longest piece moves a segment into the archive

_log = logging.getLogger(__name__)


class UpkeepThread:
    """Runs pieces of upkeep until stopped; none begins while a sale is being taken."""

    def __init__(self, ledger: Ledger, envelopes: Envelopes, days: Days, busy: Callable[[], bool]) -> None:
        self._ledger = ledger
        self._envelopes = envelopes
        self._days = days
        self._busy = busy
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let the piece in hand end. Whatever is cut off goes on at the next start."""
        self._stop.set()
        self._thread.join(_STOP_S)

    def _run(self) -> None:
        wait_s = _LOOK_S
        told: str | None = None
        while not self._stop.wait(wait_s):
            wait_s = _LOOK_S
            if self._busy():
                continue
            try:
                if self._ledger.upkeep.step(self._envelopes):
                    wait_s = _BREATH_S
                self._days.look()
            except LedgerError as error:
                _log.error("upkeep: %s", error)  # the flow meets the same trouble and deals with it
                return
            damage = self._ledger.upkeep.damage
            if damage != told and damage is not None:
                _log.error("reading through the journal: %s", damage)
            told = damage

"""The display as the terminal uses it: shows screens, and survives the panel being unplugged.

A broken display is said once in the log, tried again with every screen, and never costs a sale.
"""

from __future__ import annotations

import logging

from drivers.interfaces import Display, DisplayFault
from terminal.ui.screens import Screen, render

_log = logging.getLogger(__name__)


class Panel:
    """One thread's own."""

    def __init__(self, display: Display, language: str) -> None:
        self._display = display
        self._language = language
        self._open = False
        self._fault = ""

    def show(self, screen: Screen) -> bool:
        """True when the picture stands on the panel."""
        try:
            if not self._open:
                self._display.open()
                self._open = True
            self._display.show(render(screen, self._language))
        except DisplayFault as fault:
            if str(fault) != self._fault:
                _log.error("%s", fault)
            self._fault = str(fault)
            self._open = False
            self._display.close()
            return False
        if self._fault:
            _log.info("the display is back")
            self._fault = ""
        return True

    def close(self) -> None:
        """Blank the panel."""
        self._display.close()

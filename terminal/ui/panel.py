"""What the terminal shows, lights and sounds, as one: a screen with its lamps and its tone.

Whatever of it is broken is said once in the log, tried again with every screen, and never costs a sale.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from drivers.interfaces import Buzzer, Display, DriverError, Lamps, Tone
from terminal.ui import signals
from terminal.ui.screens import Screen, render

_log = logging.getLogger(__name__)


class _Device(Protocol):
    def open(self) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Part:
    """One output and how it is."""

    device: _Device
    open: bool = False
    fault: str = ""

    def use(self, act: Callable[[], None]) -> bool:
        """Do something with it, opening it first if need be. False when it is broken."""
        try:
            if not self.open:
                self.device.open()
                self.open = True
            act()
        except DriverError as fault:
            if str(fault) != self.fault:
                _log.error("%s", fault)
            self.fault, self.open = str(fault), False
            self.device.close()
            return False
        if self.fault:
            _log.info("back again: %s", self.fault)
            self.fault = ""
        return True


class Panel:
    """One thread's own. Lamps and buzzer are optional."""

    def __init__(
        self, display: Display, language: str, *, lamps: Lamps | None = None, buzzer: Buzzer | None = None
    ) -> None:
        self._display, self._lamps, self._buzzer = display, lamps, buzzer
        self._own_language = self._language = language
        self._screen = _Part(display)
        self._light = _Part(lamps) if lamps is not None else None
        self._sound = _Part(buzzer) if buzzer is not None else None
        self._shown: Screen | None = None

    def show(self, screen: Screen) -> bool:
        """True when the picture stands on the display; lamps and tone follow it, never the other way round."""
        stands = self._screen.use(lambda: self._display.show(render(screen, self._language)))
        if screen != self._shown:
            if self._light and self._lamps:
                lamps, state = self._lamps, signals.lamps(screen)
                self._light.use(lambda: lamps.show(state))
            if (tone := signals.tone(screen)) is not None:
                self.sound(tone)
        self._shown = screen
        return stands

    def speak(self, language: str | None) -> None:
        """From the next screen on in this language; None for the terminal's own again."""
        self._language = language or self._own_language

    def sound(self, tone: Tone) -> None:
        """A tone by itself, as the click of a key."""
        if self._sound and self._buzzer:
            buzzer = self._buzzer
            self._sound.use(lambda: buzzer.play(tone))

    def close(self) -> None:
        """Dark and silent."""
        for part in (self._screen, self._light, self._sound):
            if part is not None:
                part.device.close()

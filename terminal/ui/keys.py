"""The keypad's own thread: carries key presses to the desk, and takes the keypad up again after a fault."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from drivers.interfaces import Key, Keypad, PinFault

READ_MS: Final = 500  # how soon the thread sees that it is to stop
REOPEN_S: Final = 1.0

_log = logging.getLogger(__name__)


class KeypadThread:
    """Runs from `start` to `stop`."""

    def __init__(self, keypad: Keypad, pressed: Callable[[Key], None]) -> None:
        self._keypad = keypad
        self._pressed = pressed
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keypad", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._keypad.close()

    def _run(self) -> None:
        said = ""
        while not self._stopping.is_set():
            try:
                self._keypad.open()
                said = ""
                while not self._stopping.is_set():
                    press = self._keypad.read(READ_MS)
                    if press is not None and not press.long:
                        self._pressed(press.key)
            except PinFault as fault:
                if str(fault) != said:
                    _log.error("%s", fault)
                said = str(fault)
                self._keypad.close()
                self._stopping.wait(REOPEN_S)

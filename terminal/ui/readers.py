"""All readers of the device as one: the first card that comes is the card, whichever way it comes.

Each reader is taken up again by itself after a fault, said once when it is lost and once when it is back. While one of
them works, cards can be taken; only when none does is that a fault of the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from drivers.interfaces import CardChannel, CardReader, Interface, ReaderFault
from terminal.clock import Clock

REOPEN_MS: Final = 1_000  # between attempts to find a missing reader: soon enough for a person, no busy loop

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Place:
    """One reader and how it is."""

    reader: CardReader
    open: bool = False
    fault: ReaderFault | None = None
    due_ms: int = 0


class Readers:
    """One thread's own. `note` writes what happens to a reader into the audit trail."""

    def __init__(self, readers: Sequence[CardReader], clock: Clock, note: Callable[[str, str], object]) -> None:
        self._places = [_Place(reader) for reader in readers]
        self._clock = clock
        self._note = note

    @property
    def contact(self) -> bool:
        """Whether a card may be inserted."""
        return any(place.open and place.reader.interface is Interface.CONTACT for place in self._places)

    @property
    def fault(self) -> ReaderFault | None:
        """Why no card can be taken; None while one reader works."""
        if any(place.open for place in self._places):
            return None
        return next((place.fault for place in self._places if place.fault), None)

    def look_after(self) -> bool:
        """Take up what is missing, now and then. True when at least one reader works."""
        for place in self._places:
            if not place.open and self._clock.monotonic_ms() >= place.due_ms:
                self._take_up(place)
        return any(place.open for place in self._places)

    def wait_for_card(self, timeout_ms: int) -> CardChannel | None:
        """The first card that comes. Raises `CardCollision`, `CardLost`; a reader's fault is kept for `look_after`."""
        working = [place for place in self._places if place.open]
        for place in working:
            # Only the last one waits: the others are looked at each time it comes round.
            share_ms = timeout_ms if place is working[-1] else 0
            try:
                channel = place.reader.wait_for_card(share_ms)
            except ReaderFault as fault:
                self._lose(place, fault)
            else:
                if channel is not None:
                    return channel
        return None

    def wait_for_removal(self, timeout_ms: int) -> bool:
        """True when no reader holds a card. A reader that is lost holds none."""
        removed = True
        for place in self._places:
            if place.open:
                try:
                    removed = place.reader.wait_for_removal(timeout_ms) and removed
                except ReaderFault as fault:
                    self._lose(place, fault)
        return removed

    def lost(self, interface: Interface, fault: ReaderFault) -> None:
        """A fault that showed while a card was read through its channel."""
        for place in self._places:
            if place.open and place.reader.interface is interface:
                self._lose(place, fault)

    def close(self) -> None:
        """Release every reader."""
        for place in self._places:
            place.reader.close()
            place.open = False

    def _take_up(self, place: _Place) -> None:
        try:
            place.reader.open()
        except ReaderFault as fault:
            if str(fault) != str(place.fault):
                _log.error("%s", fault)
            place.fault = fault
            place.due_ms = self._clock.monotonic_ms() + REOPEN_MS
            return
        if place.fault is not None:
            self._note("reader_found", place.reader.name)
        place.open, place.fault = True, None
        _log.info("reader ready: %s", place.reader.name)

    def _lose(self, place: _Place, fault: ReaderFault) -> None:
        _log.error("%s", fault)
        self._note("reader_lost", place.reader.name)
        place.reader.close()
        place.open, place.fault = False, fault
        place.due_ms = self._clock.monotonic_ms() + REOPEN_MS

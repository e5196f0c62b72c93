"""What a decoded card must not show: the PAN but for its last four digits, names, track data, and PINs.

A veil lies over the whole input, one place for each hexadecimal digit, and everything that is printed of the input is
printed through it. Where a PAN belongs the tag says so; where it does not belong, in unknown objects and in what could
not be read at all, it is looked for by its looks. A PAN that was found in one place is hidden in all others. Better too
much hidden than too little: `show` lifts the veil, but never from a PIN.
"""

from __future__ import annotations

import re
from typing import Final

PAN_DIGITS_MIN: Final = 8  # ISO/IEC 7812-1; shorter ones would be found everywhere
PAN_DIGITS_MAX: Final = 19
LAST_DIGITS: Final = 4
RUN_DIGITS_MAX: Final = 76  # digits, two tracks full; in a longer run some stretch looks like a PAN anyway

_BLANKS: Final = {"2", "0"}  # text padded with blanks
_TRACK_2: Final = re.compile(r"(?=([0-9]{12,19})D[0-9]{2}(?:0[1-9]|1[0-2])[0-9]{3}([0-9]*))")
_PAN_OBJECT: Final = re.compile(r"5A(?:0[4-9A])([0-9]{8,19})")
_DIGITS: Final = re.compile(r"[0-9]{13,}")
_TEXT_DIGITS: Final = re.compile(rb"[0-9]{12,19}(?=[\^=D ]|$)|(?<=[B;])[0-9]{12,19}")
_TRACK_1: Final = re.compile(rb"B?[0-9]{12,19}\^[^?]*|;?[0-9]{12,19}[=D][0-9]{7,}")


class Veil:
    """The input as hexadecimal digits, some of them hidden."""

    def __init__(self, data: bytes, *, show: bool) -> None:
        self._digits = data.hex().upper()
        self._data = data
        self._hidden = bytearray(len(self._digits))
        self._secret = bytearray(len(self._digits))
        self._show = show
        self._pans: set[str] = set()

    def text(self, at: int, end: int) -> str:
        """Bytes `at` to `end` in hexadecimal, a `*` for each hidden digit."""
        lifted = self._show
        return "".join(
            "*" if self._secret[place] or (self._hidden[place] and not lifted) else self._digits[place]
            for place in range(2 * at, 2 * end)
        )

    def covers(self, at: int, end: int) -> bool:
        """Whether anything of these bytes must not be shown."""
        places = slice(2 * at, 2 * end)
        return any(self._secret[places]) or (not self._show and any(self._hidden[places]))

    def _hide(self, start: int, end: int) -> None:
        for place in range(start, end):
            self._hidden[place] = 1

    def all(self, at: int, end: int) -> None:
        self._hide(2 * at, 2 * end)

    def pin(self, at: int, end: int) -> None:
        """A PIN is shown to nobody."""
        for place in range(2 * at, 2 * end):
            self._secret[place] = 1

    def pan(self, at: int, end: int) -> None:
        """A PAN in format cn: all but its last four digits; everything when it is none."""
        digits = self._digits[2 * at : 2 * end]
        pan = digits.rstrip("F")
        if not pan.isdecimal() or not PAN_DIGITS_MIN <= len(pan) <= PAN_DIGITS_MAX:
            self.all(at, end)
            return
        self._learn(pan)
        self._hide(2 * at, 2 * at + len(pan) - LAST_DIGITS)

    def track_2(self, at: int, end: int) -> None:
        """Track 2: of the PAN the last four digits stay, and expiry and service code; the issuer's own data goes."""
        digits = self._digits[2 * at : 2 * end]
        pan, separator, rest = digits.partition("D")
        if not separator or not pan.isdecimal() or not PAN_DIGITS_MIN <= len(pan) <= PAN_DIGITS_MAX:
            self.all(at, end)
            return
        self._learn(pan)
        self._hide(2 * at, 2 * at + len(pan) - LAST_DIGITS)
        start = 2 * at + len(pan) + 1
        self._hide(start + 7, start + len(rest.rstrip("F")))

    def track_1(self, at: int, end: int) -> None:
        """Track 1 in text: of the PAN the last four digits stay."""
        match = re.match(rb"B([0-9]{8,19})\^", self._data[at:end])
        self.all(at, end)
        if match is not None:
            self._learn(match[1].decode("ascii"))
            for place in range(2 * (at + match.end(1) - LAST_DIGITS), 2 * (at + match.end(1))):
                self._hidden[place] = 0

    def ending(self, at: int, end: int) -> None:
        """An account number in text: the last four characters stay."""
        self.all(at, max(at, end - LAST_DIGITS))

    def suspicious(self, at: int, end: int, *, thorough: bool) -> bool:
        """Hide what looks like card data as tracks or as text; `thorough`, where nobody knows: any digits of a PAN."""
        found = False
        digits = self._digits[2 * at : 2 * end]
        for match in _TRACK_2.finditer(digits):
            found = True
            self._hide(2 * at + match.start(1), 2 * at + match.end(1) - LAST_DIGITS)
            self._hide(2 * at + match.start(2), 2 * at + match.end(2))
        for text in _TRACK_1.finditer(self._data[at:end]):
            found = True
            self.all(at + text.start(), at + text.end())
        for text in _TEXT_DIGITS.finditer(self._data[at:end]):
            found = True
            self.all(at + text.start(), at + text.end() - LAST_DIGITS)
        if not thorough:
            return found
        for match in _PAN_OBJECT.finditer(digits):
            found = True
            self._hide(2 * at + match.start(1), 2 * at + max(match.start(1), match.end(1) - LAST_DIGITS))
        for run in _DIGITS.finditer(digits):
            for start, end_ in _candidates(run[0]):
                found = True
                self._hide(2 * at + run.start() + start, 2 * at + run.start() + end_ - LAST_DIGITS)
        return found

    def _learn(self, pan: str) -> None:
        if len(pan) >= 12:
            self._pans.add(pan)

    def everywhere(self, at: int, end: int) -> None:
        """Hide each PAN that was found, wherever it stands again: as digits, or as text."""
        for pan in self._pans:
            for form, kept in ((pan, LAST_DIGITS), (pan.encode("ascii").hex(), 2 * LAST_DIGITS)):
                place = self._digits.find(form, 2 * at, 2 * end)
                while place >= 0:
                    self._hide(place, place + len(form) - kept)
                    place = self._digits.find(form, place + 1, 2 * end)


def _candidates(digits: str) -> list[tuple[int, int]]:
    """The stretches of a run of digits that could be a PAN: 13 to 19 digits, first digit 2 to 6, Luhn's check right."""
    if len(digits) > RUN_DIGITS_MAX:
        return [(0, len(digits))]
    return [
        (start, start + size)
        for start in range(len(digits) - 12)
        if digits[start] in "23456"
        for size in range(13, min(PAN_DIGITS_MAX, len(digits) - start) + 1)
        if luhn(digits[start : start + size]) and set(digits[start : start + size]) != _BLANKS
    ]


def luhn(digits: str) -> bool:
    """The check digit of ISO/IEC 7812-1, Annex B."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        number = int(digit) * (1 + place % 2)
        total += number - 9 if number > 9 else number
    return total % 10 == 0

"""Card data that must not be shown or written: which digits of which data objects, and how they are taken out.

Of a PAN the last four digits stay. The card's certificate goes whole, because the PAN is inside it and anybody can open
it. What is shown gets a `*` for each digit; what is written for a replay gets zeros, so that it can still be read as
the format it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Final

from terminal.emv import tlv
from terminal.emv.tags import Kernel2Tag, Tag
from terminal.emv.tlv import TlvError

_LAST_DIGITS: Final = 4
_SERVICE_DIGITS: Final = 7  # expiry and service code, which follow the separator of track 2
_SHORTEST: Final = 3  # bytes; anything shorter stands in other places by chance
_PAN: Final = frozenset({int(Tag.PAN)})
_TRACK_2: Final = frozenset({int(Tag.TRACK_2_EQUIVALENT), int(Kernel2Tag.TRACK_2_DATA)})
_WHOLE: Final = frozenset(
    int(tag)
    for tag in (
        Kernel2Tag.TRACK_1_DATA,
        Tag.CARDHOLDER_NAME,
        Tag.CARDHOLDER_NAME_EXTENDED,
        Tag.TRACK_1_DISCRETIONARY_DATA,
        Tag.TRACK_2_DISCRETIONARY_DATA,
        Tag.IBAN,
        Tag.ICC_CERTIFICATE,
        Tag.PIN_CERTIFICATE,
    )
)
_TEXT: Final = frozenset({int(Tag.CARDHOLDER_NAME), int(Tag.CARDHOLDER_NAME_EXTENDED)})


def shown(tag: int, value: bytes) -> str:
    """A data object in hexadecimal, what must not be seen as `*`."""
    digits = value.hex().upper()
    hidden = set(_hidden(tag, value))
    return "".join("*" if place in hidden else digit for place, digit in enumerate(digits))


def written(tag: int, value: bytes) -> bytes:
    """The same data object without what must not be written: as long, of the same form, worth nothing."""
    if tag in _TEXT:
        return b" " * len(value)
    digits = list(value.hex())
    for place in _hidden(tag, value):
        digits[place] = "0"
    return bytes.fromhex("".join(digits))


def _hidden(tag: int, value: bytes) -> Iterator[int]:
    """Places of the hexadecimal digits that are card data."""
    digits = value.hex().upper()
    if tag in _WHOLE:
        yield from range(len(digits))
    elif tag in _PAN:
        yield from range(max(0, len(digits.rstrip("F")) - _LAST_DIGITS))
    elif tag in _TRACK_2:
        pan, _, rest = digits.partition("D")
        yield from range(max(0, len(pan) - _LAST_DIGITS))
        yield from range(len(pan) + 1 + _SERVICE_DIGITS, len(pan) + 1 + len(rest.rstrip("F")))


class Replacement:
    """What to write in place of each piece of card data that was found in a conversation."""

    def __init__(self, responses: Iterable[bytes]) -> None:
        """`responses`: data fields, without status words, in order; one that came in pieces is put together."""
        self._written: dict[bytes, bytes] = {}
        self._pans: set[str] = set()
        for data in responses:
            with suppress(TlvError):
                for node in tlv.primitives(tlv.parse(data)):
                    self._learn(node.tag, node.value)

    def _learn(self, tag: int, value: bytes) -> None:
        if tag in _PAN or tag in _TRACK_2:
            pan = value.hex().upper().partition("D")[0].rstrip("F")
            if len(pan) > 2 * _LAST_DIGITS:
                self._pans.add(pan)
        replaced = written(tag, value)
        if replaced != value and len(value) >= _SHORTEST:
            self._written[value] = replaced

    def apply(self, data: bytes) -> bytes:
        """`data` with all of it replaced, the longest pieces first."""
        for value in sorted(self._written, key=len, reverse=True):
            data = data.replace(value, self._written[value])
        return data

    def leaks(self, data: bytes) -> bool:
        """Whether a PAN still stands there, as digits or as text."""
        digits = data.hex().upper()
        return any(pan in digits or pan.encode().hex().upper() in digits for pan in self._pans)

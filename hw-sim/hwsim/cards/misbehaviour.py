"""How a card breaks the books: what it says is changed on its way out of the chip, whichever interface it says it on.

The card itself stays honest: keys, counters and decisions are a good card's, so that one thing alone is wrong and a
terminal's reaction can be told from its reaction to anything else. What is wrong in the keys or in the profile (a false
certificate, a blocked application) is in `hwsim.cards.variants`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Final, TypeAlias

from hwsim.cards.apdu import Command
from hwsim.cards.bertlv import TlvError, decode, encode

_READ_RECORD, _GET_PROCESSING_OPTIONS, _GENERATE_AC = 0xB2, 0xA8, 0xAE
_EXPIRY: Final = 0x5F24
_TRACK_2: Final = 0x57
_AFL_ENTRIES: Final = 32  # of 62 in tag 94: a contactless answer holds more than that


class Misbehaviour(Enum):
    """What is wrong with it."""

    NONE = "none"
    WRONG_LENGTH = "wrong-length"  # an expiration date of two bytes
    DUPLICATED_TAG = "duplicated-tag"  # the expiration date, or track 2, twice
    MISSING_DATA = "missing-data"  # no expiration date, no track 2
    ABSURD_LENGTH = "absurd-length"  # a data object that claims 65,535 bytes
    AFL_LOOP = "afl-loop"  # names the same records again and again
    ENDLESS_AFL = "endless-afl"  # names every record of every file
    OVERREACHES = "overreaches"  # gives an approval when asked for less
    STALLS = "stalls"  # asks for more time, and never comes back


Change: TypeAlias = Callable[[bytes], bytes]


def said(misbehaviour: Misbehaviour, command: Command, data: bytes) -> bytes:
    """What leaves the card instead of `data`, its answer to `command`."""
    ins, change = _CHANGES.get(misbehaviour, (frozenset(), None))
    return data if change is None or command.ins not in ins or not data else change(data)


def _each(template: bytes, change: Callable[[int, bytes], bytes]) -> bytes:
    """A template with every data object in it written by `change`; what is no template stays as it is."""
    try:
        ((tag, value),) = decode(template).items()
        objects = decode(value)
    except (TlvError, ValueError):
        return template
    return encode(tag, *(change(each, objects[each]) for each in objects)) if tag in {0x70, 0x77} else template


def _in_dates(change: Callable[[int, bytes], bytes]) -> Change:
    return lambda template: _each(
        template, lambda tag, value: change(tag, value) if tag in {_EXPIRY, _TRACK_2} else encode(tag, value)
    )


def _with_afl(afl: Callable[[bytes], bytes]) -> Change:
    def changed(template: bytes) -> bytes:
        if template[0] == 0x80:
            options = decode(template)[0x80]
            return encode(0x80, options[:2], afl(options[2:]))
        return _each(template, lambda tag, value: encode(tag, afl(value) if tag == 0x94 else value))

    return changed


def _overreaching(template: bytes) -> bytes:
    if template[0] == 0x80:
        return template[:2] + b"\x40" + template[3:]
    return _each(template, lambda tag, value: encode(tag, b"\x40" if tag == 0x9F27 else value))


_DATA: Final = frozenset({_READ_RECORD, _GET_PROCESSING_OPTIONS})
_CHANGES: Final[Mapping[Misbehaviour, tuple[frozenset[int], Change]]] = {
    Misbehaviour.WRONG_LENGTH: (_DATA, _in_dates(lambda tag, value: encode(tag, value[:2]))),
    Misbehaviour.DUPLICATED_TAG: (_DATA, _in_dates(lambda tag, value: encode(tag, value) * 2)),
    Misbehaviour.MISSING_DATA: (_DATA, _in_dates(lambda tag, value: b"")),
    Misbehaviour.ABSURD_LENGTH: (
        _DATA,
        _in_dates(lambda tag, value: encode(tag, b"")[:-1] + b"\x82\xff\xff" + value),
    ),
    Misbehaviour.AFL_LOOP: (
        frozenset({_GET_PROCESSING_OPTIONS}),
        _with_afl(lambda afl: (afl[:4] * _AFL_ENTRIES)[: 4 * _AFL_ENTRIES]),
    ),
    Misbehaviour.ENDLESS_AFL: (
        frozenset({_GET_PROCESSING_OPTIONS}),
        _with_afl(lambda _: b"".join(bytes((sfi << 3, 1, 255, 0)) for sfi in range(1, 11))),
    ),
    Misbehaviour.OVERREACHES: (frozenset({_GENERATE_AC}), _overreaching),
}

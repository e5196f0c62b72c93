"""The card's own BER-TLV (EMV 4.4 Book 3, Annex B).

A card writes data objects and reads very few, so this is a writer with a strict, flat reader beside it. It is kept
apart from the terminal's parser on purpose: a card that shares the kernel's code shares its mistakes. What a tag means
is left to whoever writes or asks for it.
"""

from __future__ import annotations

from typing import Final

OBJECTS_MAX: Final = 256  # an online record has some twenty; nothing honest comes near, so more is refused
_LENGTH_BYTES_MAX: Final = 2  # 65535 bytes: far above what one APDU or one authorisation carries


class TlvError(ValueError):
    """These bytes are no sequence of data objects. Nothing can be read from them; ask for them again."""


def encode(tag: int, *values: bytes) -> bytes:
    """One data object: `encode(0x9F36, atc)`. Several values are joined, which is how templates are written."""
    value = b"".join(values)
    size = len(value)
    if size < 0x80:
        length = bytes((size,))
    else:
        digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
        length = bytes((0x80 | len(digits),)) + digits
    return tag.to_bytes((tag.bit_length() + 7) // 8, "big") + length + value


def decode(data: bytes) -> dict[int, bytes]:
    """The data objects on the outer level, by tag; templates are not opened.

    Raises `TlvError` for truncated objects and for a tag that comes twice: which one to believe would be a guess.
    """
    objects: dict[int, bytes] = {}
    rest = data
    while rest:
        tag, rest = _tag(rest)
        value, rest = _value(rest)
        if tag in objects:
            raise TlvError(f"tag {tag:X} comes twice")
        if len(objects) == OBJECTS_MAX:
            raise TlvError(f"more than {OBJECTS_MAX} data objects")
        objects[tag] = value
    return objects


def decode_dol(dol: bytes) -> list[tuple[int, int]]:
    """A data object list as (tag, length) pairs. Raises `TlvError`."""
    entries: list[tuple[int, int]] = []
    rest = dol
    while rest:
        tag, rest = _tag(rest)
        if not rest:
            raise TlvError("the data object list ends after a tag")
        entries.append((tag, rest[0]))
        rest = rest[1:]
    return entries


def _tag(data: bytes) -> tuple[int, bytes]:
    size = 1
    if data[0] & 0x1F == 0x1F:
        size = 2
        while data[size - 1 : size] and data[size - 1] & 0x80:
            size += 1
    if len(data) < size:
        raise TlvError("the data ends inside a tag")
    return int.from_bytes(data[:size], "big"), data[size:]


def _value(data: bytes) -> tuple[bytes, bytes]:
    if not data:
        raise TlvError("the data ends after a tag")
    size, start = data[0], 1
    if size & 0x80:
        start = 1 + (size & 0x7F)
        if not 1 < start <= 1 + _LENGTH_BYTES_MAX or len(data) < start:
            raise TlvError("a length is cut short, indefinite or absurd")
        size = int.from_bytes(data[1:start], "big")
    if len(data) < start + size:
        raise TlvError("the data ends inside a value")
    return data[start : start + size], data[start + size :]

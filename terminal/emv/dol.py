"""Data object lists: what a card asks to be sent, and the bytes that answer it (EMV 4.4 Book 3, 5.4).

A list names tags and lengths, the answer holds values only, each made to fit. Which command the answer goes into is for
the step that sends it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from terminal.emv import tags, tlv
from terminal.emv.tags import Format


class Entry(NamedTuple):
    """One line of a list; `length` in bytes, as the card wants it."""

    tag: int
    length: int


def entries(dol: bytes) -> Iterator[Entry]:
    """The entries in order. Raises `TlvError` where the list stops making sense, after those before it."""
    at = 0
    while at < len(dol):
        start = at
        tag, at = tlv.read_tag(dol, at)
        if at == len(dol):
            raise tlv.TlvError("a data object list ends before the length of its last entry", start)
        yield Entry(tag, dol[at])
        at += 1


def asks_for(dol: bytes, tag: int) -> bool:
    """Whether `tag` is among the entries. Raises `TlvError`."""
    return any(entry.tag == tag for entry in entries(dol))


def build(dol: bytes, values: Mapping[int, bytes], kernel: int | None = None) -> bytes:
    """The values that `dol` asks for, one after the other. Raises `TlvError`."""
    return b"".join(_fit(entry, values.get(entry.tag), kernel) for entry in entries(dol))


def split(dol: bytes, data: bytes) -> tuple[tuple[Entry, bytes], ...]:
    """Which entry of `dol` each part of `data` answers. Raises `TlvError` when they do not belong together."""
    found, at = [], 0
    for entry in entries(dol):
        if at + entry.length > len(data):
            raise tlv.TlvError("the data is shorter than its data object list asks for", len(data))
        found.append((entry, data[at : at + entry.length]))
        at += entry.length
    if at != len(data):
        raise tlv.TlvError("the data is longer than its data object list asks for", at)
    return tuple(found)


def _fit(entry: Entry, value: bytes | None, kernel: int | None) -> bytes:
    tag, length = entry
    if value is None or tlv.is_constructed(tag):
        return bytes(length)
    definition = tags.lookup(tag, kernel)
    match definition.format if definition else Format.B:
        case Format.N:
            return value[max(0, len(value) - length) :].rjust(length, b"\x00")
        case Format.CN:
            return value[:length].ljust(length, b"\xff")
        case _:
            return value[:length].ljust(length, b"\x00")

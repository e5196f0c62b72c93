"""BER-TLV as EMV uses it (EMV 4.4 Book 3, Annex B): read strictly, because what is read comes from a card.

Definite lengths only, tags of one to three bytes, bounded depth and size. The one tolerance is the books' own: 00 bytes
before, between and after data objects mean nothing. What a data object means, and who may send it, is for `tags`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Final, NamedTuple

TAG_BYTES_MAX: Final = 3  # EMV's own tags take one or two bytes, kernel 2's (DF8117) three
LENGTH_BYTES_MAX: Final = 2  # after 81 or 82; two bytes state 65,535, a response APDU carries 256
SIZE_MAX: Final = 0xFFFF  # bytes in one parse: what LENGTH_BYTES_MAX can state
_CONSTRUCTED: Final = 0x20  # of a tag's first byte
_TAG_GOES_ON: Final = 0x1F
DEPTH_MAX: Final = 8  # the books nest five deep: 6F, A5, BF0C, 61, 73


class TlvError(ValueError):
    """These bytes are no BER-TLV, or no data object list. The message never quotes them: they may be card data.

    `at` is the offset, from the first byte that was handed in, of what could not be read; None where there is no place.
    """

    def __init__(self, reason: str, at: int | None = None) -> None:
        super().__init__(reason if at is None else f"offset {at}: {reason}")
        self.reason = reason
        self.at = at


class Node(NamedTuple):
    """One data object; `children` is filled when the tag is constructed."""

    tag: int
    value: bytes
    children: tuple[Node, ...] = ()

    def find(self, tag: int) -> Node | None:
        """The first child with this tag."""
        return next((child for child in self.children if child.tag == tag), None)


_make: Final = partial(tuple.__new__, Node)  # `Node(...)` without a frame of its own


def is_constructed(tag: int) -> bool:
    """Whether the value of this tag is itself BER-TLV (bit 6 of the first byte)."""
    return bool(_tag_bytes(tag)[0] & _CONSTRUCTED)


def read_tag(data: bytes, at: int) -> tuple[int, int]:
    """The tag that begins at `at`, and where it ends. Raises `TlvError`."""
    end = at + 1
    if data[at] & _TAG_GOES_ON == _TAG_GOES_ON:  # more bytes follow, each but the last with its top bit set
        while True:
            if end >= len(data):
                raise TlvError("the data ends inside a tag", at)
            if end - at >= TAG_BYTES_MAX:
                raise TlvError(f"a tag is longer than {TAG_BYTES_MAX} bytes", at)
            end += 1
            if not data[end - 1] & 0x80:
                break
    return int.from_bytes(data[at:end], "big"), end


def read_length(data: bytes, at: int) -> tuple[int, int]:
    """The length that begins at `at`, and where it ends. Raises `TlvError`."""
    if at >= len(data):
        raise TlvError("the data ends before a length", at)
    first = data[at]
    if first < 0x80:
        return first, at + 1
    size = first & 0x7F
    if not 1 <= size <= LENGTH_BYTES_MAX:
        raise TlvError("a length is indefinite or longer than EMV allows", at)
    end = at + 1 + size
    if end > len(data):
        raise TlvError("the data ends inside a length", at)
    return int.from_bytes(data[at + 1 : end], "big"), end


def _nodes(data: bytes, depth: int) -> tuple[Node, ...]:
    """The hottest loop of all: tags of one or two bytes and short lengths, which is nearly all, are read in place."""
    if depth == 0:
        raise TlvError(f"data objects are nested deeper than {DEPTH_MAX}", 0)
    nodes: list[Node] = []
    at, end = 0, len(data)
    while at < end:
        start, first = at, data[at]
        at += 1
        if first == 0:
            continue
        if first & _TAG_GOES_ON != _TAG_GOES_ON:
            tag = first
        elif at < end and data[at] < 0x80:
            tag = first << 8 | data[at]
            at += 1
        else:
            tag, at = read_tag(data, start)
        if at < end and data[at] < 0x80:
            stop = at + 1 + data[at]
            at += 1
        else:
            length, at = read_length(data, at)
            stop = at + length
        if stop > end:
            raise TlvError("a data object is longer than the data that holds it", start)
        value = data[at:stop]
        children: tuple[Node, ...] = ()
        if first & _CONSTRUCTED:
            try:
                children = _nodes(value, depth - 1)
            except TlvError as error:
                raise TlvError(error.reason, at + (error.at or 0)) from None
        nodes.append(_make((tag, value, children)))
        at = stop
    return tuple(nodes)


def parse(data: bytes) -> tuple[Node, ...]:
    """All data objects in `data`, constructed ones taken apart. Raises `TlvError`."""
    if len(data) > SIZE_MAX:
        raise TlvError(f"more than {SIZE_MAX} bytes of data objects")
    return _nodes(data, DEPTH_MAX)


def parse_one(data: bytes, tag: int) -> Node:
    """The single data object that `data` must consist of. Raises `TlvError`."""
    nodes = parse(data)
    if len(nodes) != 1 or nodes[0].tag != tag:
        raise TlvError(f"expected one data object {tag:X} and nothing else")
    return nodes[0]


def primitives(nodes: Iterable[Node]) -> Iterator[Node]:
    """Every primitive data object in `nodes`, templates opened, in order."""
    for node in nodes:
        if is_constructed(node.tag):
            yield from primitives(node.children)
        else:
            yield node


def without(data: bytes, tag: int) -> bytes:
    """`data` with the outermost data objects `tag` cut out and every other byte as it stood. Raises `TlvError`.

    What is hashed must be hashed as it was sent: encoding it again would shorten a length that the sender did not.
    """
    kept, at = bytearray(), 0
    while at < len(data):
        start = at
        if data[at] == 0:
            kept.append(data[at])
            at += 1
            continue
        found, at = read_tag(data, at)
        length, at = read_length(data, at)
        at += length
        if at > len(data):
            raise TlvError("a data object is longer than the data that holds it", start)
        if found != tag:
            kept += data[start:at]
    return bytes(kept)


def _tag_bytes(tag: int) -> bytes:
    return tag.to_bytes(max(1, (tag.bit_length() + 7) // 8), "big")


def encode(tag: int, value: bytes) -> bytes:
    """One data object, its length in the shortest form. Raises `TlvError` for a value that EMV cannot state."""
    size = len(value)
    if size > SIZE_MAX:
        raise TlvError(f"a value is longer than {SIZE_MAX} bytes")
    if size < 0x80:
        length = bytes((size,))
    elif size <= 0xFF:
        length = bytes((0x81, size))
    else:
        length = b"\x82" + size.to_bytes(2, "big")
    return _tag_bytes(tag) + length + value

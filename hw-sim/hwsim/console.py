"""Draws a picture of the panel with characters, for a console.

Braille cells hold two by four dots: 64 columns by 16 rows keep the panel's proportions within 80 columns. On a
console of 132 columns half blocks are sharper. Where the encoding carries neither, ASCII that resembles the shape of
four pixels has to do.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from typing import Final

from PIL import Image

_BRAILLE: Final = 0x2800
# Dots 1, 2, 3, 7 are the left column of a cell from above, 4, 5, 6, 8 the right one; dot n is bit n-1.
_DOTS: Final = (((0, 0), 0x01), ((0, 1), 0x02), ((0, 2), 0x04), ((0, 3), 0x40),
                ((1, 0), 0x08), ((1, 1), 0x10), ((1, 2), 0x20), ((1, 3), 0x80))  # fmt: skip
_HALVES: Final = " ▀▄█"  # by upper + 2 * lower
_SHAPES: Final = " '`\".|/Y,\\|Y_LJ#"  # by upper left + 2 * upper right + 4 * lower left + 8 * lower right
_BEZEL: Final = 2  # columns: the frame's two sides


def draw(picture: Image.Image, *, columns: int | None = None, encoding: str | None = None) -> str:
    """The picture in a bezel, as lines without a final newline. `columns` and `encoding` default to those of stdout."""
    columns = columns or shutil.get_terminal_size().columns
    encoding = encoding or sys.stdout.encoding or "ascii"
    lit = picture.convert("1")
    if not _carries(encoding):
        return _framed(_ascii(lit), ("+-+", "|", "+-+"))
    return _framed(_half_blocks(lit) if columns >= picture.width + _BEZEL else _braille(lit), ("╭─╮", "│", "╰─╯"))


def _carries(encoding: str) -> bool:
    try:
        "╭─╮│╰╯▀▄█⣿".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _braille(picture: Image.Image) -> Iterator[str]:
    for y in range(0, picture.height, 4):
        yield "".join(
            chr(_BRAILLE + sum(bit for (dx, dy), bit in _DOTS if picture.getpixel((x + dx, y + dy))))
            for x in range(0, picture.width, 2)
        )


def _half_blocks(picture: Image.Image) -> Iterator[str]:
    for y in range(0, picture.height, 2):
        yield "".join(
            _HALVES[bool(picture.getpixel((x, y))) + 2 * bool(picture.getpixel((x, y + 1)))]
            for x in range(picture.width)
        )


def _ascii(picture: Image.Image) -> Iterator[str]:
    corners = ((0, 0), (1, 0), (0, 1), (1, 1))
    for y in range(0, picture.height, 2):
        yield "".join(
            _SHAPES[sum(bool(picture.getpixel((x + dx, y + dy))) << bit for bit, (dx, dy) in enumerate(corners))]
            for x in range(0, picture.width, 2)
        )


def _framed(rows: Iterator[str], bezel: tuple[str, str, str]) -> str:
    """The rows between the bezel's upper edge, sides and lower edge; an edge is given as corner, line, corner."""
    upper, side, lower = bezel
    lines = [f"{side}{row}{side}" for row in rows]
    edges = [edge[0] + edge[1] * (len(lines[0]) - _BEZEL) + edge[2] for edge in (upper, lower)]
    return "\n".join([edges[0], *lines, edges[1]])

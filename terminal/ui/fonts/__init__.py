"""Letters and icons of the small screens, pixel by pixel.

Fonts are BDF files: the X.Org Adobe Helvetica bitmaps (licence in LICENSE.txt beside them), cut down to Latin, so
that English, German, Turkish, French and their neighbours are covered. They are drawn here, without FreeType: a
picture comes out the same whatever version of Pillow, or of any font package, a machine has. Icons are `icons.txt`,
as one sees them. Each file is read when its first letter or icon is wanted, once. Where things stand is the affair of
`terminal.ui.screens`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from PIL import Image

_FOLDER: Final = Path(__file__).parent
_GLYPH: Final = re.compile(
    r"ENCODING (\d+)\nSWIDTH .*\nDWIDTH (\d+) 0\nBBX (\d+) (\d+) (-?\d+) (-?\d+)\nBITMAP\n([0-9A-F\n]*)ENDCHAR"
)
_ICON: Final = re.compile(r"^(\w+)\n((?:[.#]+\n)+)", re.MULTILINE)
LIT: Final = 255  # Pillow keeps the pixels of mode "1" as 0 and 255
_UNKNOWN: Final = "?"  # drawn for a letter that the font lacks: a picture with a hole beats no picture


class _Glyph(NamedTuple):
    """One letter; `left` and `bottom` place its lower left corner against the pen, `bottom` counting upwards."""

    advance: int
    left: int
    bottom: int
    picture: Image.Image | None


class Font:
    """One typeface in one size."""

    def __init__(self, name: str) -> None:
        text = (_FOLDER / f"{name}.bdf").read_text(encoding="ascii")
        self._glyphs = {chr(int(found[1])): _glyph(found) for found in _GLYPH.finditer(text)}
        self.height = self.box("0")[3]  # of capitals and figures: what the eye takes for the height of a line
        self.leading = self.height + _number(text, "FONT_DESCENT") + 2  # from one line to the next: tight, not touching

    def __contains__(self, letter: str) -> bool:
        return letter in self._glyphs

    def width(self, text: str) -> int:
        """How far the pen moves."""
        return sum(self._glyph(letter).advance for letter in text)

    def box(self, text: str) -> tuple[int, int, int, int]:
        """Left, top, width and height of the ink, against a pen at (0, 0) on the base line."""
        left, top, right, bottom, pen = 0, 0, 0, 0, 0
        for glyph in map(self._glyph, text):
            if glyph.picture is not None:
                left = min(left, pen + glyph.left)
                right = max(right, pen + glyph.left + glyph.picture.width)
                top = min(top, -glyph.bottom - glyph.picture.height)
                bottom = max(bottom, -glyph.bottom)
            pen += glyph.advance
        return left, top, right - left, bottom - top

    def draw(self, frame: Image.Image, x: int, baseline: int, text: str) -> None:
        """Light the letters' pixels, pen first at `x` on `baseline`."""
        for glyph in map(self._glyph, text):
            if glyph.picture is not None:
                corner = (x + glyph.left, baseline - glyph.bottom - glyph.picture.height)
                frame.paste(LIT, corner, glyph.picture)
            x += glyph.advance

    def _glyph(self, letter: str) -> _Glyph:
        return self._glyphs.get(letter) or self._glyphs[_UNKNOWN]


@cache
def font(name: str) -> Font:
    """The font of this file, read once."""
    return Font(name)


@cache
def icons() -> Mapping[str, Image.Image]:
    """Every icon, by name."""
    text = (_FOLDER / "icons.txt").read_text(encoding="ascii")
    return {found[1]: _icon(found[2].split()) for found in _ICON.finditer(text)}


def _glyph(found: re.Match[str]) -> _Glyph:
    advance, width, height, left, bottom = map(int, found.groups()[1:6])
    # BDF and Pillow pack a row alike: the first pixel is the highest bit, each row starts a byte.
    picture = Image.frombytes("1", (width, height), bytes.fromhex(found[7])) if width and height else None
    return _Glyph(advance, left, bottom, picture)


def _icon(rows: list[str]) -> Image.Image:
    picture = Image.new("1", (len(rows[0]), len(rows)))
    picture.putdata([pixel == "#" for row in rows for pixel in row])
    return picture


def _number(text: str, key: str) -> int:
    found = re.search(rf"^{key} (\d+)$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"the font has no {key}: the file is damaged, install payterm again")
    return int(found[1])

"""The sheet of screens in docs/ is made from the goldens of today."""

from __future__ import annotations

from PIL import Image, ImageChops

from gallery import SHEET, sheet


def test_the_sheet_in_docs_is_up_to_date() -> None:
    kept = Image.open(SHEET).convert("L")
    now = sheet()
    same = kept.size == now.size and ImageChops.difference(kept, now).getbbox() is None
    assert same, "the screens have changed: make screens"

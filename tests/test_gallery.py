"""The sheet of screens in docs/ is made from the goldens of today."""

from __future__ import annotations

from gallery import SHEET, sheet
from PIL import Image, ImageChops


def test_the_sheet_in_docs_is_up_to_date() -> None:
    kept = Image.open(SHEET).convert("L")
    now = sheet()
    same = kept.size == now.size and ImageChops.difference(kept, now).getbbox() is None
    assert same, "the screens have changed: make screens"

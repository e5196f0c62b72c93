"""All screens on one sheet, made from the goldens: `python -m tests.gallery` writes docs/screens.png."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

GOLDENS = Path(__file__).parent / "goldens" / "en"
SHEET = Path(__file__).parent.parent / "docs" / "screens.png"
SHOWN = [
    "start",
    "idle",
    "enter-amount",
    "present-card",
    "reading",
    "authorising",
    "approved",
    "accepted-offline",
    "declined-insufficient_funds",
    "remove-card-approved",
    "try-again-card_lost",
    "one-card-only",
    "use-other-card",
    "error-reader_missing",
    "keep-or-void",
]
COLUMNS, SCALE, MARGIN = 5, 2, 12
BACKGROUND = 72


def sheet() -> Image.Image:
    """The pictures that tell the story of a sale, in its order."""
    width, height = 128 * SCALE + MARGIN, 64 * SCALE + MARGIN
    rows = -(-len(SHOWN) // COLUMNS)
    whole = Image.new("L", (COLUMNS * width + MARGIN, rows * height + MARGIN), BACKGROUND)
    for place, name in enumerate(SHOWN):
        picture = (
            Image.open(GOLDENS / f"{name}.png").convert("L").resize((128 * SCALE, 64 * SCALE), Image.Resampling.NEAREST)
        )
        row, column = divmod(place, COLUMNS)
        whole.paste(picture, (MARGIN + column * width, MARGIN + row * height))
    return whole


if __name__ == "__main__":
    sheet().save(SHEET, optimize=True)

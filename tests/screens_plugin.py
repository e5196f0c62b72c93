"""Screens tested by picture: the fixture `golden` compares with tests/goldens/<name>.png, `pytest --ui=record` writes
them.

Pictures are compared by pixel, not by file: another version of Pillow may pack a PNG otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageChops

GOLDENS = Path(__file__).parent / "goldens"
ZOOM = 4

Golden = Callable[[str, Image.Image], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ui",
        choices=("compare", "record"),
        default="compare",
        help="compare screens with tests/goldens, or record them",
    )


@pytest.fixture
def recording(request: pytest.FixtureRequest) -> bool:
    """Whether this run writes the goldens instead of judging by them."""
    return bool(request.config.getoption("--ui") == "record")


@pytest.fixture
def golden(recording: bool, tmp_path: Path) -> Golden:
    """Call it with a name ("de/idle") and the picture that is to equal it."""

    def check(name: str, picture: Image.Image) -> None:
        path = GOLDENS / f"{name}.png"
        if recording:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, optimize=True)
            return
        if not path.exists():
            pytest.fail(f"there is no {path}: look at the screen, then record it with pytest --ui=record")
        with Image.open(path) as expected:
            if wrong := different_pixels(expected, picture):
                shown = tmp_path / f"{name.replace('/', '-')}.png"
                difference(expected, picture).save(shown)
                pytest.fail(f"{name}: {wrong} pixels differ; expected, actual and difference stand in {shown}")

    return check


def different_pixels(expected: Image.Image, actual: Image.Image) -> int:
    """How many pixels differ; all of them when the sizes do."""
    if expected.size != actual.size:
        return max(expected.width * expected.height, actual.width * actual.height)
    return ImageChops.difference(expected.convert("L"), actual.convert("L")).histogram()[255]


def difference(expected: Image.Image, actual: Image.Image) -> Image.Image:
    """Expected, actual, and what differs in red, enlarged and above one another."""
    width, height = (max(pair) for pair in zip(expected.size, actual.size, strict=True))
    sheet = Image.new("RGB", (width, 3 * height + 2), "grey")
    sheet.paste(expected.convert("RGB"), (0, 0))
    sheet.paste(actual.convert("RGB"), (0, height + 1))
    same_size = [Image.new("L", (width, height)) for _ in range(2)]
    for canvas, picture in zip(same_size, (expected, actual), strict=True):
        canvas.paste(picture.convert("L"), (0, 0))
    changed = ImageChops.difference(*same_size)
    sheet.paste(actual.convert("RGB").point(lambda level: level // 3), (0, 2 * (height + 1)))
    sheet.paste("red", (0, 2 * (height + 1)), changed)
    return sheet.resize((sheet.width * ZOOM, sheet.height * ZOOM), Image.Resampling.NEAREST)

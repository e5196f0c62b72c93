"""Card and bureau files: readable JSON, bytes as hexadecimal digits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class CardFileError(ValueError):
    """A card, bureau or design file that cannot be used. No money is involved: make it anew or name another."""


def hexadecimal(data: bytes) -> str:
    return data.hex().upper()


def write(path: Path, document: Mapping[str, object]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read(path: Path, expected_format: str) -> dict[str, Any]:
    """The document of a file of this format. Raises `CardFileError`."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CardFileError(f"{path} cannot be read as a card or bureau file: name another or make it anew") from error
    if not isinstance(document, dict) or document.get("format") != expected_format:
        raise CardFileError(f"{path} is no {expected_format!r} file: name another or make it anew")
    return document

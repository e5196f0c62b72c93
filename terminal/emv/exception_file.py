"""The terminal's exception file (EMV 4.4 Book 4, 6.3.5): cards that must not be accepted, without their numbers.

A list of card numbers is card data. What a check needs is an answer to one question, is this card on it, so the numbers
are turned into keyed hashes and forgotten. The key is made when the list is read and lives in memory only: without it
the hashes say nothing, and with it they could be tried out in seconds, as there are not so many card numbers. Where the
list comes from, and who may read it there, is for whoever makes it (`terminal.emvsetup`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

from terminal.emv.configuration import ExceptionEntry

KEY_BYTES: Final = 32


def digest(key: bytes, entry: ExceptionEntry) -> bytes:
    """What stands for a card where its number must not. Worth no more than its key is kept."""
    sequence_number = "" if entry.psn is None else f"{entry.psn:02d}"
    return hashlib.blake2b(f"{entry.pan.digits}:{sequence_number}".encode(), digest_size=16, key=key).digest()


class ExceptionFile:
    """Answers `entry in file`, and holds no card number."""

    __slots__ = ("_digests", "_key")

    def __init__(self, entries: Iterable[ExceptionEntry], key: bytes) -> None:
        self._key = key
        self._digests = frozenset(self._digest(entry) for entry in entries)

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, entry: object) -> bool:
        return isinstance(entry, ExceptionEntry) and self._digest(entry) in self._digests

    def __repr__(self) -> str:
        return f"ExceptionFile({len(self)} cards)"

    def _digest(self, entry: ExceptionEntry) -> bytes:
        return digest(self._key, entry)

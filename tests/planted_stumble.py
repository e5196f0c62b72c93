"""A terminal with a planted bug, for the tests: it does not expect that the storage refuses something."""

from __future__ import annotations

from terminal.ledger import journal

honest = journal.FileMedium.pwrite


def stumbling(self: journal.FileMedium, data: bytes, offset: int) -> None:
    try:
        honest(self, data, offset)
    except OSError as error:
        raise RuntimeError("nobody thought of this") from error


journal.FileMedium.pwrite = stumbling  # type: ignore[method-assign]

"""A terminal with a planted bug, for the tests: what the storage refuses of the journal does not stop a sale."""

from __future__ import annotations

import contextlib

from terminal.ledger import journal

honest = journal.FileMedium.pwrite


def careless(self: journal.FileMedium, data: bytes, offset: int) -> None:
    with contextlib.suppress(OSError):
        honest(self, data, offset)


journal.FileMedium.pwrite = careless  # type: ignore[method-assign]

"""What can still be read of a damaged database.

SQLite refuses a damaged page, not the whole file: a record whose pages are whole is found by its key. Whoever uses what
is found here authenticates it first, as the journal does.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

_QUERY = "SELECT trimmed, payload FROM records WHERE sequence = ?"


class Salvage:
    """A database that was moved aside, opened for reading only. Nothing in it raises an error."""

    def __init__(self, path: Path) -> None:
        self._connections: list[sqlite3.Connection] = []
        # With its log, and as it was before that: a log that is damaged must not hide what the file itself has.
        for how in ("mode=ro", "mode=ro&immutable=1"):
            with suppress(sqlite3.Error):
                self._connections.append(
                    sqlite3.connect(f"file:{quote(str(path))}?{how}", uri=True, check_same_thread=False)
                )

    def record(self, sequence: int) -> tuple[bytes, bytes | None] | None:
        """`Record.trimmed` and `Record.payload` as stored, None where they cannot be read."""
        for connection in self._connections:
            # MemoryError: a damaged length may ask for more than there is.
            with suppress(sqlite3.Error, MemoryError, UnicodeDecodeError), closing(connection.cursor()) as cursor:
                match cursor.execute(_QUERY, (sequence,)).fetchone():
                    case (bytes() as trimmed, (bytes() | None) as payload):
                        return trimmed, payload
                    case _:
                        pass
        return None

    def close(self) -> None:
        for connection in self._connections:
            with suppress(sqlite3.Error):
                connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

"""Bringing a database of an older release up to date.

`MIGRATIONS` are the steps, in order; each leads to the form that it names. A step adds: columns, indexes, and what they
are to hold. What the new form no longer needs goes in a later release, once nobody would want to go back (expand, then
contract). A step is history, and is written in SQL of its own: the models go on changing, it does not.

Before the first step the database is copied whole. Each step is one transaction, together with the version that it
leads to: cut off anywhere, it starts again. Whatever a step does, no table, column or row may be missing afterwards,
otherwise it is taken back.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from terminal.ledger.errors import LedgerError
from terminal.ledger.medium import storage_errors, sync_directory
from terminal.ledger.migrations import version_2, version_3
from terminal.ledger.models import LedgerDatabase

COPIES_MAX: Final = 2  # the form before this one and the one before that; each is as large as the database

CardTag: TypeAlias = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Migration:
    """The step to form `version`, which releases of form `reader_version_min` can still read."""

    version: int
    reader_version_min: int
    step: Callable[[LedgerDatabase, CardTag], None]


MIGRATIONS: Final = (
    # The columns are only added; but the records' bodies have changed with them, and release 1 would misread those.
    Migration(2, 2, version_2.expand),
    Migration(3, 3, version_3.expand),
)


def migrate(
    database: LedgerDatabase,
    path: Path,
    version: int,
    card_tag: CardTag,
    *,
    seal: Callable[[], None],
    steps: Sequence[Migration] = MIGRATIONS,
) -> None:
    """Take the open database at `path` from form `version` to the newest, durably. Raises `DiskTrouble`.

    `seal` puts the newest form's seal on the rows, in the transaction of the last step: no start finds one without.
    """
    due = [migration for migration in steps if migration.version > version]
    if due:
        _keep_copy(database, path, due[-1].version)
    for migration in due:
        with database.atomic():
            before = _inventory(database)
            migration.step(database, card_tag)
            after = _inventory(database)
            for (table, columns), rows in before.items():
                if not any(
                    table == name and columns <= more and rows == count for (name, more), count in after.items()
                ):
                    raise LedgerError(
                        f"the step to form {migration.version} would lose a part of {table}: it was taken back, "
                        "nothing was changed and no sale is lost; install the earlier release again and report this"
                    )
            database.run(
                "UPDATE meta SET schema_version = ?, reader_version_min = ?",
                migration.version,
                migration.reader_version_min,
            )
            if migration is due[-1]:
                seal()


def _inventory(database: LedgerDatabase) -> dict[tuple[str, frozenset[str]], int]:
    """How many rows each table has, and with which columns."""
    return {
        (table, frozenset(column.name for column in database.get_columns(table))): database.number(
            f'SELECT COUNT(*) FROM "{table}"'  # noqa: S608 (a name from the schema itself)
        )
        for table in database.get_tables()
    }


def _keep_copy(database: LedgerDatabase, path: Path, version: int) -> None:
    """Copy the database as it is to `ledger.db.before-N`, whole or not at all, and drop the oldest of such copies."""
    kept = path.with_name(f"{path.name}.before-{version}")
    unfinished = kept.with_name(kept.name + ".new")
    with storage_errors():
        unfinished.unlink(missing_ok=True)
        unfinished.touch(mode=0o600)
    with closing(sqlite3.connect(unfinished)) as copy:
        database.connection().backup(copy)  # type: ignore[no-untyped-call]
    with storage_errors():
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(kept)
        sync_directory(path.parent)
        copies = sorted(path.parent.glob(f"{path.name}.before-*"), key=lambda copy: copy.stat().st_mtime_ns)
        for old in copies[:-COPIES_MAX]:
            old.unlink()

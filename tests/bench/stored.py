"""Ledgers that have been in use for long: a million sales in them, or ten thousand that nobody has sent.

**A million stored** are not sold one by one. One sale is made, answered and settled as always; then its rows are copied
by plain SQL, each copy under a transaction and numbers of its own, spread over days, and every encrypted cell is opened
and sealed anew to the row in which it now stands. The totals are brought up by what was added, and the sum over all
rows is sealed with the terminal's key. What a copy has not is records in the journal: it stands for a sale that was
archived long ago (its sequence numbers are below the journal's first). What comes out is a ledger like any other:
`build` lets it recover and audit itself before anything is measured.

**Ten thousand unsent** are really sold, in a process that is then killed with -9, and so is each process that starts on
them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import msgspec

from terminal.ledger.fields import EncryptedField, FieldCipher
from terminal.ledger.keys import SecretKey
from terminal.ledger.ledger import DATABASE_NAME
from terminal.ledger.models import LedgerDatabase, Tables
from terminal.ledger.recovery import resolve
from terminal.ledger.tally import Tally
from terminal.ledger.values import Event
from tests.bench.peers import Till

SALES_A_DAY: Final = 300  # a busy till: a million sales are nine years
LOOKED_AT: Final = 100  # copies that are read back
ROOM: Final = 1_000  # sales that are made in such a ledger afterwards

_DAY_MS: Final = 86_400_000
_AT_ONCE: Final = 10_000  # rows of one statement
_RECORDS_OF_A_SALE: Final = 5
_CACHE_KIB: Final = 1 << 20  # all indexes of a million sales fit, so that none is read again


def build(directory: Path, count: int) -> float:
    """Make a ledger in which `count` settled sales are stored; how many seconds it took, its audit left out."""
    till = Till(directory, ROOM)
    template = till.sell()
    till.settle()
    till.sell()  # erasures become known with the commit after them
    till.settle()
    keys = till.rig.keys
    before = sum(total.count for total in till.ledger.totals())
    till.close()
    Till(directory, ROOM).close()  # a start finishes what is left of erasing

    begun = time.perf_counter()
    path, cipher = directory / "ledger" / DATABASE_NAME, FieldCipher(keys.data, os.urandom)
    _copy(path, cipher, template.id, count)
    _seal(path, cipher, keys.chain)
    took_s = time.perf_counter() - begun

    till = Till(directory, ROOM)
    till.verify()
    assert not till.ledger.recovery.rebuilt
    assert sum(total.count for total in till.ledger.totals()) == before + count
    chance = random.Random(1)
    for _ in range(min(LOOKED_AT, count)):
        (sale,) = till.ledger.transactions(1, before=chance.randint(2, count + 2))
        assert (sale.amount, sale.state.value) == (template.amount, "settled")
    till.close()
    return took_s


def _copy(path: Path, cipher: FieldCipher, template: UUID, count: int) -> None:
    """Add `count` copies of a settled sale to the database of a ledger that is closed."""
    tables = Tables(LedgerDatabase(path, cipher))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for setting in ("locking_mode = EXCLUSIVE", "journal_mode = OFF", "synchronous = OFF"):
            connection.execute(f"PRAGMA {setting}").fetchall()
        connection.execute(f"PRAGMA cache_size = {-_CACHE_KIB}")
        sales = _Template(connection, tables.transactions, cipher, template.hex, str(template))
        key = f"{template}/{Event.AUTHORISATION}"
        outbox = _Template(connection, tables.outbox, cipher, key, key)
        details = sales.plain["details"]
        opened_ms = details["opened_at"]
        days: dict[str, int] = {}

        def copies() -> Iterator[tuple[list[Any], list[Any]]]:
            first = _highest(connection) + 1
            for number in range(first, first + count):
                id_ = UUID(bytes=os.urandom(16), version=4)
                ago_ms = (first + count - number) * _DAY_MS // SALES_A_DAY
                sequence = (number - first - count) * _RECORDS_OF_A_SALE
                day = datetime.fromtimestamp((opened_ms - ago_ms) / 1000, UTC).date().isoformat()
                days[day] = days.get(day, 0) + 1
                numbered = {"number": number, "opened_sequence": sequence, "last_sequence": sequence + 4}
                tag = {"card_tag": os.urandom(16), "final_ms": opened_ms - ago_ms}  # columns of later forms
                sale = sales.copied(str(id_), numbered | tag | {"id": id_.hex}, {"opened_at": opened_ms - ago_ms})
                asked = f"{id_}/{Event.AUTHORISATION}"
                named = {"key": asked, "transaction": id_.hex, "number": number, "sequence": sequence + 1}
                yield sale, outbox.copied(asked, named, {})

        made = copies()
        connection.execute("BEGIN")
        while some := list(islice(made, _AT_ONCE)):
            connection.executemany(sales.insert, [sale for sale, _ in some])
            connection.executemany(outbox.insert, [asked for _, asked in some])
        ((of_day,),) = connection.execute("SELECT key FROM totals WHERE key <> 'day'").fetchall()
        total = _Template(connection, tables.totals, cipher, of_day, of_day)
        figures = total.plain["figures"]
        one = figures["sum"] // figures["count"]
        for day, sold in days.items():
            key = f"{day}/{of_day.split('/', 1)[1]}"
            both = {"count": sold, "sum": sold * one}
            if key == of_day:
                both = {name: both[name] + figures[name] for name in both}
            statement = total.insert.replace("INSERT", "INSERT OR REPLACE", 1)
            connection.execute(statement, total.copied(key, {"key": key}, both))
        # Later forms keep the highest numbers, as old sales may be gone.
        columns = {row[1] for row in connection.execute("PRAGMA table_info(meta)")}
        for column, table in (("last_number", "transactions"), ("last_envelope_number", "outbox")):
            if column in columns:
                connection.execute(f"UPDATE meta SET {column} = (SELECT MAX(number) FROM {table})")  # noqa: S608
        connection.execute("COMMIT")


def _seal(path: Path, cipher: FieldCipher, chain: SecretKey) -> None:
    """Seal the sum over the rows with the terminal's own key: rows that came past the ledger are in none."""
    tables = Tables(LedgerDatabase(path, cipher))
    tables.database.connect()
    tally = Tally(tables, SecretKey(chain.derive(b"payterm ledger rows")))
    meta = tables.meta.get()
    meta.settled = tally.formed()
    meta.seal = tally.seal(meta)
    meta.save()
    tables.database.close()


def _highest(connection: sqlite3.Connection) -> int:
    """The highest number of a sale or an envelope."""
    highest = "SELECT MAX(number) FROM (SELECT number FROM transactions UNION ALL SELECT number FROM outbox)"
    return int(connection.execute(highest).fetchone()[0])


class _Template:
    """One row, and how to make others of it."""

    def __init__(
        self, connection: sqlite3.Connection, model: Any, cipher: FieldCipher, stored_key: str, key: str
    ) -> None:
        self._table: str = model._meta.table_name
        self._cipher = cipher
        one = f'SELECT * FROM "{self._table}" WHERE "{model._meta.primary_key.column_name}" = ?'  # noqa: S608
        found = connection.execute(one, (stored_key,))
        self._columns = [column for column, *_ in found.description]
        (values,) = found.fetchall()
        self.row = dict(zip(self._columns, values, strict=True))
        sealed = {field.column_name for field in model._meta.sorted_fields if isinstance(field, EncryptedField)}
        self.plain = {
            column: msgspec.json.decode(cipher.open(self.row[column], table=self._table, column=column, row=key))
            if column in {"details", "figures"}
            else cipher.open(self.row[column], table=self._table, column=column, row=key)
            for column in sealed
        }
        marks = ", ".join("?" * len(self._columns))
        self.insert = f'INSERT INTO "{self._table}" VALUES ({marks})'  # noqa: S608

    def copied(self, key: str, changed: Mapping[str, Any], inside: Mapping[str, Any]) -> list[Any]:
        """The values of another row: columns that are there, changed; cells sealed to it, structures changed inside."""
        values = {column: changed[column] for column in changed if column in self.row and self.row[column] is not None}
        for column, plain in self.plain.items():
            content = plain if isinstance(plain, bytes) else msgspec.json.encode({**plain, **inside})
            values[column] = self._cipher.seal(content, table=self._table, column=column, row=key)
        return [values.get(column, self.row[column]) for column in self._columns]


# ---- starting after a kill


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the ledger, imports left out."""

    took_s: float
    redone: int
    rebuilt: bool
    unsent: int


def killed_with_unsent(directory: Path, count: int) -> None:
    """Sell `count` times offline, nothing uploaded, then be killed."""
    _killed("sell", directory, count)


def start(directory: Path, *, rebuild: bool = False) -> Start:
    """Start on what a killed process has left: recover, resolve; then be killed as well."""
    if rebuild:
        for name in (DATABASE_NAME, f"{DATABASE_NAME}-wal", f"{DATABASE_NAME}-shm"):
            (directory / "ledger" / name).unlink(missing_ok=True)
    return Start(**json.loads(_killed("start", directory, 0)))


def _killed(what: str, directory: Path, count: int) -> str:
    words = [sys.executable, "-m", "tests.bench.stored", what, str(directory), str(count)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != -signal.SIGKILL:
        raise RuntimeError(f"{what} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _be_killed(what: str, directory: Path, count: int) -> None:
    begun = time.perf_counter()
    till = Till(directory, count)
    match what:
        case "sell":
            for _ in range(count):
                till.sell()
            till.hand_over()
        case _:
            resolve(till.ledger, till.rig.envelopes)
            took_s = time.perf_counter() - begun
            report = till.ledger.recovery
            unsent = sum(each.count for each in till.ledger.unsent())
            print(json.dumps({"took_s": took_s, "redone": report.redone, "rebuilt": report.rebuilt, "unsent": unsent}))
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _be_killed(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))

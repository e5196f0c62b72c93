"""Whether the rows are still those that were written.

SQLite notices damage to its structure, not to a value: one flipped bit, and an envelope counts as answered or a
reference names nobody. So two keyed sums are kept, over the rows that the terminal still acts on and over those that
are settled, and every transaction stores, under a MAC, what they have become. At the start the first is formed anew
from its rows, found as the terminal finds them; the second, and each index against its table, where that is quick and
when the ledger is checked. A database that fails is not the one that was written, and is built anew from the journal.

The sum is kept by triggers of the one connection that writes: no change can pass it by, and the file's own schema knows
nothing of it. A record's bytes have a MAC of their own; of `records` only what selects them is summed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from terminal.ledger.keys import SecretKey
from terminal.ledger.models import LedgerDatabase, MetaRow, Tables

_SUM_BYTES: Final = 16
_MODULUS: Final = 1 << 8 * _SUM_BYTES
_UNSEALED: Final = frozenset({"seal", "chain_key_id"})  # itself; and the name of the key that it is made with


_LIVE, _SETTLED = 0, 1
_SMALL: Final = 5_000  # transactions: a quarter of a second here, a second or two on a small Pi
_UNFINISHED: Final = "state IN ('opened', 'authorising', 'accepted', 'completing', 'reversing')"
_UNSHOWN: Final = "shown IS NULL AND state IN ('approved', 'settled')"
_COLUMNS: Final = re.compile(r"\b(state|shown|answered|erased|payload|type|forgotten)\b")


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows of a table: those that `where` takes, found by `index` as the terminal finds them."""

    part: int
    table: str
    columns: tuple[str, ...]
    where: str = "1"
    index: str | None = None

    @property
    def name(self) -> str:
        return f"{self.table} {self.where}"

    def select(self) -> str:
        listed = ", ".join(f'"{column}"' for column in self.columns)
        by = f" INDEXED BY {self.index}" if self.index else ""
        return f"SELECT {listed} FROM {self.table}{by} WHERE {self.where}"  # noqa: S608 (names of our own)

    def of(self, row: str) -> str:
        """The part, the name and the columns of OLD or NEW, for a call."""
        name = self.name.replace("'", "''")
        return ", ".join((str(self.part), f"'{name}'", *(f'{row}."{column}"' for column in self.columns)))

    def applies_to(self, row: str) -> str:
        """`where`, said of OLD or NEW."""
        return _COLUMNS.sub(rf"{row}.\1", self.where)


class Tally:
    """The sum over one database's rows. Errors are SQLite's."""

    def __init__(self, tables: Tables, key: SecretKey) -> None:
        self._database: LedgerDatabase = tables.database
        self._key = key.material
        self._sums = {_LIVE: 0, _SETTLED: 0}
        whole = (tables.transactions, tables.outbox, tables.totals)
        self._tables = tuple(str(table._meta.table_name) for table in whole)
        sales, items, totals = (tuple(_columns(table)) for table in whole)
        self._summed = (
            _Rows(_LIVE, "transactions", sales, _UNFINISHED),
            _Rows(_LIVE, "transactions", sales, _UNSHOWN),
            _Rows(_SETTLED, "transactions", sales, f"NOT ({_UNFINISHED}) AND NOT ({_UNSHOWN})"),
            _Rows(_LIVE, "outbox", items, "answered = 0", "outbox_waiting"),
            _Rows(_LIVE, "outbox", items, "answered = 1 AND erased = 0", "outbox_unerased"),
            _Rows(_SETTLED, "outbox", items, "answered <> 0 AND NOT (answered = 1 AND erased = 0)"),
            _Rows(_LIVE, "totals", totals),
            _Rows(_LIVE, "records", ("sequence",), "payload IS NOT NULL AND type = 3", "records_with_card"),
            _Rows(_LIVE, "records", ("sequence",), "forgotten = 1", "records_forgotten"),
        )

    def formed(self) -> bytes:
        """Form both sums from the rows that there are; the settled one, to be stored."""
        self._sums = {part: self._formed(part) for part in (_LIVE, _SETTLED)}
        return self.settled

    def watch(self, settled: bytes | None) -> None:
        """Form the sum over the live rows, take the other as it was stored (None: form it, too), keep both from now."""
        self._sums = {_LIVE: self._formed(_LIVE), _SETTLED: 0}
        self._sums[_SETTLED] = self._formed(_SETTLED) if settled is None else int.from_bytes(settled, "big")
        self._database.connection().create_function("tally", -1, self._count)  # type: ignore[no-untyped-call]
        for number, rows in enumerate(self._summed):
            for event, row, sign in (
                ("INSERT", "NEW", 1),
                ("DELETE", "OLD", -1),
                ("UPDATE", "OLD", -1),
                ("UPDATE", "NEW", 1),
            ):
                where = rows.applies_to(row)
                self._database.run(
                    f"CREATE TEMP TRIGGER tally_{number}_{event}_{row} AFTER {event} ON main.{rows.table} "
                    f"WHEN {where} BEGIN SELECT tally({sign}, {rows.of(row)}); END"
                )

    @property
    def settled(self) -> bytes:
        """The sum over the settled rows, to be stored."""
        return self._sums[_SETTLED].to_bytes(_SUM_BYTES, "big")

    def is_small(self) -> bool:
        """Whether everything can be gone over in a fraction of a second."""
        ((count,),) = self._database.rows("SELECT COUNT(*) FROM transactions")
        return int(count) <= _SMALL

    def is_whole(self) -> bool:
        """Go over every settled row and every index."""
        return self._formed(_SETTLED) == self._sums[_SETTLED] and self.indexed()

    def indexed(self) -> bool:
        """Whether each table that is summed holds what its indexes say."""
        return all(self._database.rows(f"PRAGMA integrity_check({name})") == [("ok",)] for name in self._tables)

    def seal(self, meta: MetaRow) -> bytes:
        """The MAC over the sum and everything that the one row of `meta` says."""
        values = [(name, _plain(value)) for name, value in sorted(meta.__data__.items()) if name not in _UNSEALED]
        return hmac.digest(self._key, repr((values, self._sums[_LIVE])).encode(), "sha256")

    @contextmanager
    def kept(self) -> Generator[None]:
        """For a transaction: what is taken back is not counted."""
        before = dict(self._sums)
        try:
            yield
        except BaseException:
            self._sums = before
            raise

    def _formed(self, part: int) -> int:
        """One of the sums, from the rows that there are."""
        formed = 0
        for rows in self._summed:
            if rows.part == part:
                for row in self._database.rows(rows.select()):
                    formed += self._one(rows.name, *row)
        return formed % _MODULUS

    def _count(self, sign: int, part: int, *row: Any) -> None:
        self._sums[part] = (self._sums[part] + sign * self._one(*row)) % _MODULUS

    def _one(self, *row: Any) -> int:
        one = hashlib.blake2b(repr(row).encode(), digest_size=_SUM_BYTES, key=self._key)
        return int.from_bytes(one.digest(), "big")


def _columns(model: Any) -> Iterable[str]:
    return (field.column_name for field in model._meta.sorted_fields)


def _plain(value: object) -> object:
    return bytes(value) if isinstance(value, (bytearray, memoryview)) else value

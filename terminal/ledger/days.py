"""The book of days: what has been sold since the last day's end, and what the last one said.

A day's end (a batch) takes in every transaction since the one before, by number. So each transaction is in one batch
and no more, whatever its clock said. What changes afterwards, since the host says no to a sale of yesterday or somebody
takes it back, is no part of a batch that is closed: it is carried as a correction, and the next batch shows it.
"""

from __future__ import annotations

from typing import Any, Final
from uuid import UUID

import msgspec

from terminal.ledger.values import Batch, Figure, OpenDay, Verdict
from terminal.money import currency

RANGE_MAX: Final = 100_000  # transactions in a batch: what a host takes in one (docs/host-api.yaml)

Sums = dict[str, tuple[int, int]]
"""Count and sum in minor units, by `currency/scheme`."""


class Closed(msgspec.Struct, frozen=True):
    """A day's end, as its journal record says it; and the host's word on it."""

    batch: UUID
    number: int  # of its envelope
    no: int
    first: int
    last: int
    sold: Sums
    corrected: Sums
    taken_at: int
    decision: str | None = None
    host: dict[str, tuple[int, int]] | None = None  # what the host holds, by currency
    missing: tuple[tuple[int, int], ...] = ()


class Book(msgspec.Struct):
    """What is kept in one row, and changes with every sale."""

    sold: Sums = {}
    corrected: Sums = {}
    through: int = 0  # the last transaction that is in a batch, or of an earlier epoch
    closed: Closed | None = None

    def count(self, number: int, key: str, change: int, by_minor: int) -> None:
        """A transaction has become sold (`change` 1), or is so no more (-1)."""
        sums = self.sold if number > self.through else self.corrected
        count, minor = sums.get(key, (0, 0))
        sums[key] = count + change, minor + by_minor

    def close(self, closed: Closed) -> None:
        self.closed, self.through, self.sold, self.corrected = closed, closed.last, {}, {}

    def begin_epoch(self, through: int) -> None:
        """A batch is about one epoch: what was open in the one before is shown as a correction."""
        for key, (count, minor) in self.sold.items():
            before = self.corrected.get(key, (0, 0))
            self.corrected[key] = before[0] + count, before[1] + minor
        self.sold, self.through = {}, through

    def answer(self, batch: UUID, decision: Verdict, said: Said | None) -> None:
        """The host's word. One on an older batch is in the journal, and no more here."""
        if self.closed is not None and self.closed.batch == batch:
            host = None if said is None else {each.currency: (each.count, each.sum) for each in said.totals}
            missing = () if said is None else said.missing
            self.closed = msgspec.structs.replace(self.closed, decision=decision.value, host=host, missing=missing)

    def open_day(self, last: int) -> OpenDay:
        """The day as it stands, when `last` is the newest transaction."""
        return OpenDay(
            no=1 if self.closed is None else self.closed.no + 1,
            first=self.through + 1,
            last=last,
            sold=_figures(self.sold),
            corrected=_figures(self.corrected),
            since_ms=None if self.closed is None else self.closed.taken_at,
        )

    def last_batch(self) -> Batch | None:
        closed = self.closed
        if closed is None:
            return None
        return Batch(
            id=closed.batch,
            no=closed.no,
            first=closed.first,
            last=closed.last,
            sold=_figures(closed.sold),
            corrected=_figures(closed.corrected),
            taken_at_ms=closed.taken_at,
            decision=None if closed.decision is None else Verdict(closed.decision),
            host=None if closed.host is None else tuple((code, *sums) for code, sums in sorted(closed.host.items())),
            missing=closed.missing,
        )


class _Sum(msgspec.Struct, frozen=True):
    currency: str
    count: int
    sum: int


class Said(msgspec.Struct, frozen=True):
    """What the host's answer to a batch says beside its decision."""

    totals: tuple[_Sum, ...]
    missing: tuple[tuple[int, int], ...]


def closing(batch: Batch) -> dict[str, Any]:
    """What the journal's record says of a batch, beside its envelope."""
    return {
        "batch": str(batch.id),
        "no": batch.no,
        "first": batch.first,
        "last": batch.last,
        "sold": _sums(batch.sold),
        "corrected": _sums(batch.corrected),
        "taken_at": batch.taken_at_ms,
    }


def by_currency(figures: tuple[Figure, ...]) -> list[tuple[str, int, int]]:
    """Currency code, count and sum in minor units."""
    sums: dict[str, tuple[int, int]] = {}
    for each in figures:
        count, minor = sums.get(each.currency.code, (0, 0))
        sums[each.currency.code] = count + each.count, minor + each.sum_minor
    return [(code, *sums[code]) for code in sorted(sums)]


def _sums(figures: tuple[Figure, ...]) -> dict[str, list[int]]:
    return {f"{each.currency.code}/{each.scheme}": [each.count, each.sum_minor] for each in figures}


def _figures(sums: Sums) -> tuple[Figure, ...]:
    found = []
    for key, (count, minor) in sorted(sums.items()):
        code, _, scheme = key.partition("/")
        if count or minor:
            found.append(Figure(currency=currency(code), scheme=scheme, count=count, sum_minor=minor))
    return tuple(found)

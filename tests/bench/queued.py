"""What a long queue costs: the same work on a spool in which 1,000 items wait, and on one with very many more.

The work is what happens to one sale (taken over, chosen, marked, answered, delivered) and what people ask (counts, a
page of the list). The first items are real; the others behind them are copied by SQL, for nobody gets so far. Both
spools take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

from terminal.clock import SystemClock, system_entropy
from terminal.ledger.keys import SecretKey
from terminal.sync.spool import On, Spool
from tests.bench.drain import items
from tests.bench.report import Row, Section, measured

SHORT: Final = 1_000
LONG: Final = 100_000
ROUNDS: Final = 60
REAL: Final = 400  # more than all rounds take from the head
_KEY: Final = SecretKey(bytes(32))
_COPY: Final = """
WITH RECURSIVE count(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM count WHERE n < :more)
INSERT INTO item (id, key, "transaction", event, destination, number, urgent, state, idempotency_key, sha256, body,
    attempts, due_ms, stored)
SELECT printf('%08x-0000-4000-8000-%012x/authorisation/host', n, n),
    printf('%08x-0000-4000-8000-%012x/authorisation', n, n),
    printf('%08x-0000-4000-8000-%012x', n, n), event, destination, number + n, 0, 'queued', idempotency_key, sha256,
    zeroblob(256), 0, 0, stored
FROM count, (SELECT * FROM item ORDER BY rowid DESC LIMIT 1)
"""


def filled(directory: Path, count: int) -> float:
    """Make a spool in which so many wait; how long it then takes to open, in ms."""
    with closing(_opened(directory)) as spool:
        spool.store(items(REAL), ["host"])
        with spool.together():
            spool._sql.execute(_COPY, {"more": count - REAL})
    begin_s = time.perf_counter()
    with closing(_opened(directory)) as spool:
        assert spool.waiting("host").queued == count
        return (time.perf_counter() - begin_s) * 1000


def _opened(directory: Path) -> Spool:
    return Spool(directory, _KEY, clock=SystemClock(), entropy=system_entropy)


def _life(spool: Spool) -> None:
    """One sale, as the loop takes it: three transactions."""
    with spool.together():
        spool.store(items(1), ["host"])
        (row,) = spool.to_send("host", 1)
        spool.move(row.id, On.SEND)
    spool.parcel(row)
    with spool.together():
        spool.move(row.id, On.ANSWER, answer="a.b.c")
    with spool.together():
        spool.move(row.id, On.DELIVER, settled="settled")


_WORK: Final[dict[str, Callable[[Spool], object]]] = {
    "a sale's life in the spool": _life,
    "what is sent next, of 6": lambda spool: spool.to_send("host", 6),
    "counts and the oldest": lambda spool: spool.waiting("host"),
    "the first page of the list": lambda spool: spool.page(50),
    "the link comes up": lambda spool: spool.hurry(),
}


def run(place: Path, long: int = LONG) -> Section:
    opening = [filled(place / name, count) for name, count in (("short", SHORT), ("long", long))]
    size_mb = sum(each.stat().st_size for each in (place / "long").iterdir()) / 1e6
    rows: list[Row] = []
    with closing(_opened(place / "short")) as short, closing(_opened(place / "long")) as other:
        for name, work in _WORK.items():
            taken: dict[int, list[float]] = {0: [], 1: []}
            for _ in range(ROUNDS):
                for which, spool in enumerate((short, other)):
                    begin_s = time.perf_counter()
                    work(spool)
                    taken[which].append((time.perf_counter() - begin_s) * 1000)
            rows.append(measured(f"{name}, {SHORT:,} waiting", taken[0], "ms"))
            against = f"with {SHORT:,} waiting"
            rows.append(measured(f"{name}, {long:,} waiting", taken[1], "ms", peer=taken[0], against=against))
    rows.append(Row(f"opening, {SHORT:,} waiting", opening[0], "ms"))
    rows.append(Row(f"opening, {long:,} waiting", opening[1], "ms", against="everything that waits is counted once"))
    rows.append(
        Row("size of the long one", size_mb, "MB", against="most of its items are 0.3 KB; real ones have 2.6 KB")
    )
    return Section("queued", f"{long:,} items that wait", rows)

"""What a sale costs in storage: the real ledger against the least that a disk can do, a block overwritten and flushed.

Two flushes are the ledger's promise (two copies), so an offline sale cannot be faster than two raw flushes; what is
above that is SQLite, cryptography and Python. Flushes and bytes are not timed but counted, by strace on a child that
does the same sales and marks their ends with a system call of no effect.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from terminal.ledger.ledger import Ledger, LedgerSettings
from terminal.ledger.values import Decision, Event
from tests import sync_rig
from tests.bench.report import Row, Section, measured
from tests.ledger_rig import Rig

ROUNDS: Final = 15
SALES_A_ROUND: Final = 8
FLUSHES_A_ROUND: Final = 30
WARM_UP: Final = 10  # sales before the first round: statements prepared, code paths taken once
SALES_COUNTED: Final = 60  # of each kind, under strace; long enough to meet a checkpoint
BLOCK_BYTES: Final = 4096
SLOT_BYTES: Final = 16_384

_RAW_FILE_BYTES: Final = 16 << 20
_SETTINGS: Final = LedgerSettings(journal_size_bytes=64 << 20)  # 4,096 slots: all of this run's sales fit
_STEPS_MAX: Final = 32  # pieces of work that one upload takes sync, with room
_FLUSH_CALLS: Final = "fdatasync,fsync,sync_file_range,msync,syncfs,sync"
_MARK: Final = "getppid"
_CALL: Final = re.compile(r"(?P<call>\w+)\((?:(?P<fd>\d+)<(?P<path>[^>]*)>)?.*\) += (?P<result>-?\d+)")


class RawFile:
    """A file written once in full, of which one block is overwritten and flushed at a time."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.pwrite(self._descriptor, os.urandom(_RAW_FILE_BYTES), 0)
        os.fsync(self._descriptor)
        self._block = os.urandom(BLOCK_BYTES)
        self._at = 0

    def flush_s(self) -> float:
        """How long the next one took."""
        begun = time.perf_counter()
        os.pwrite(self._descriptor, self._block, self._at)
        os.fdatasync(self._descriptor)
        took = time.perf_counter() - begun
        self._at = (self._at + BLOCK_BYTES) % _RAW_FILE_BYTES
        return took

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass
class Times:
    """Wall and processor time of pieces of work that may be interrupted by others."""

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    @contextmanager
    def piece(self, *, first: bool = True) -> Iterator[None]:
        """Time the block; it begins a new piece of work unless `first` is false."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        wall_ms, cpu_ms = (time.perf_counter() - wall) * 1000, (time.process_time() - cpu) * 1000
        if first:
            self.wall_ms.append(wall_ms)
            self.cpu_ms.append(cpu_ms)
        else:
            self.wall_ms[-1] += wall_ms
            self.cpu_ms[-1] += cpu_ms


def offline_sale(rig: Rig, ledger: Ledger, times: Times) -> None:
    """Opened, sealed and signed, accepted, shown."""
    with times.piece():
        sale = rig.finish(ledger, rig.begin(ledger), Decision.ACCEPTED)
        ledger.mark_shown(sale.id, sale.state.value)


def online_sale(rig: Rig, ledger: Ledger, times: Times) -> None:
    """Opened, sealed and signed, handed to sync, answered (verified), shown; without the host's work."""
    with times.piece():
        sale = rig.finish(ledger, rig.begin(ledger), Decision.ONLINE)
        (item,) = [each for each in ledger.outbox(4) if each.transaction == sale.id]
        ledger.mark_handed_over([item.key])
    assert item.envelope is not None
    answer = rig.host.answer(item.envelope)
    with times.piece(first=False):
        approved = rig.deliver(ledger, sale.id, Event.AUTHORISATION, answer)
        ledger.mark_shown(approved.id, approved.state.value)


def run(place: Path) -> Section:
    """All figures of this benchmark, files in `place`."""
    flush: list[list[float]] = []
    offline, online = Times(), Times()
    rig = Rig(place / "timed", settings=_SETTINGS)
    ledger = rig.open()
    with closing(RawFile(place / "raw")) as raw:
        for _ in range(WARM_UP):
            offline_sale(rig, ledger, Times())
            online_sale(rig, ledger, Times())
            raw.flush_s()
        offered(rig, ledger)
        for _ in range(ROUNDS):
            flush.append([raw.flush_s() * 1000 for _ in range(FLUSHES_A_ROUND)])
            for _ in range(SALES_A_ROUND):
                offline_sale(rig, ledger, offline)
            offered(rig, ledger)
            for _ in range(SALES_A_ROUND):
                online_sale(rig, ledger, online)
    rig.close_all()

    flushes = [each for some in flush for each in some]
    # Each sale against its own round's flushes.
    peer = [statistics.median(some) for some in flush for _ in range(SALES_A_ROUND)]
    rows = [
        measured("raw: overwrite 4 KiB, fdatasync", flushes, "ms"),
        measured("offline sale", offline.wall_ms, "ms", peer=peer, against="one raw flush; cannot be under 2"),
        measured("offline sale, processor", offline.cpu_ms, "ms", peer=offline.wall_ms, against="of its own time"),
        measured(
            "online sale, terminal's part", online.wall_ms, "ms", peer=peer, against="one raw flush; cannot be under 4"
        ),
        measured("online sale, processor", online.cpu_ms, "ms", peer=online.wall_ms, against="of its own time"),
    ]
    counted, notes = _counted(place)
    notes.append(
        "what a ratio has above its bound is processor time: it grows as flushes get cheaper, and shrinks on an SD card"
    )
    return Section("storage", "a sale in the ledger against a raw flush", [*rows, *counted], notes)


def offered(rig: Rig, ledger: Ledger) -> None:
    """Sync takes what waits, as it does within moments: an outbox that only grows would be measured in its place."""
    while items := ledger.outbox(16):
        ledger.mark_handed_over([item.key for item in items])


# ---- counted in a child


def _counted(place: Path) -> tuple[list[Row], list[str]]:
    strace = shutil.which("strace")
    if strace is None:
        return [], ["flushes and bytes were not counted: strace is not installed"]
    trace = place / "trace"
    done = subprocess.run(
        [
            *(strace, "-f", "-y", "-s", "0", "-o", str(trace), "-e", f"trace={_FLUSH_CALLS},pwrite64,write,{_MARK}"),
            *(sys.executable, "-m", "tests.bench.storage", str(place)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        why = done.stderr.strip() or f"strace ended with {done.returncode}"
        return [], [f"flushes and bytes were not counted: {why.splitlines()[-1]}"]
    pieces = list(_pieces(trace.read_text(encoding="utf-8", errors="replace")))
    # Before each kind stands one piece more: what came before its first mark.
    kinds = {
        name: pieces[1 + number * (1 + SALES_COUNTED) :][:SALES_COUNTED]
        for number, name in enumerate(("offline sale", "online sale, terminal", "upload, sync's spool"))
    }
    rows, notes = [], []
    for name, of_kind in kinds.items():
        counts = Counter(piece.flushes.total() for piece in of_kind)
        usual, often = counts.most_common(1)[0]
        typical = [piece for piece in of_kind if piece.flushes.total() == usual]
        where = ", ".join(f"{file} {number}" for file, number in sorted(typical[0].flushes.items()))
        rows.append(Row(f"{name}: flushes", usual, "", against=where))
        kib = {file: statistics.median(piece.written[file] for piece in typical) / 1024 for file in typical[0].written}
        where = ", ".join(f"{file} {size:.0f}" for file, size in sorted(kib.items()))
        rows.append(Row(f"{name}: written", sum(kib.values()), "KiB", against=where))
        rare = ", ".join(f"{number} in {times}" for number, times in sorted(counts.items()) if number != usual)
        notes.append(f"{name}: {usual} flushes in {often} of {len(of_kind)}{f'; {rare} (checkpoint)' if rare else ''}")
    slots, rows_bytes = (float(word) for word in done.stdout.split()[-2:])
    rows.append(Row("offline sale: journal", slots * SLOT_BYTES / 1024, "KiB", against=f"{slots:.0f} slots of 16 KiB"))
    rows.append(Row("offline sale: ledger.db", rows_bytes / 1024, "KiB", against="pages in use, a mean"))
    return rows, notes


@dataclass
class _Piece:
    """What one piece of work asked of the kernel, by file."""

    flushes: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)  # bytes


def _pieces(trace: str) -> Iterator[_Piece]:
    """The calls between one mark and the next; what comes after the last is left out."""
    piece = _Piece()
    for line in trace.splitlines():
        if (found := _CALL.search(line)) is None:
            continue
        match found["call"]:
            case "getppid":
                yield piece
                piece = _Piece()
            case "pwrite64" | "write":
                piece.written[Path(found["path"] or "?").name] += max(0, int(found["result"]))
            case _:
                piece.flushes[Path(found["path"] or "?").name] += 1


def _be_counted(place: Path) -> None:
    """The child: as many offline sales, online sales and uploads as are counted, marks between them."""
    rig = Rig(place / "counted", settings=_SETTINGS)
    rig.open().close()
    before = _bytes_in_use(place / "counted" / "ledger.db")
    ledger = rig.open()
    free = ledger.free_slots
    for _ in range(SALES_COUNTED):
        os.getppid()
        offline_sale(rig, ledger, Times())
    os.getppid()
    slots = (free - ledger.free_slots) / SALES_COUNTED
    ledger.close()
    after = _bytes_in_use(place / "counted" / "ledger.db")

    ledger = rig.open()
    offered(rig, ledger)
    for _ in range(SALES_COUNTED):
        os.getppid()
        online_sale(rig, ledger, Times())
    os.getppid()
    rig.close_all()

    terminal, host = sync_rig.FakeTerminal(), sync_rig.FakeHost()
    uploads = sync_rig.Rig(place, terminal, [host], sync_rig.FakeClock(), sync_rig.seeded(1))
    for number in range(1, SALES_COUNTED + 1):
        os.getppid()
        terminal.sell(sync_rig.sale(number, urgent=True, envelope="e" * 1500))
        for _ in range(_STEPS_MAX):
            if uploads.sync.step().in_ms:
                break
    os.getppid()
    assert len(terminal.answers) == SALES_COUNTED
    uploads.close()
    print(slots, (after - before) / SALES_COUNTED)


def _bytes_in_use(database: Path) -> int:
    """Pages that hold something: the file itself was made large in advance."""
    with closing(sqlite3.connect(database)) as connection:
        pages, free, size = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
    return int((pages - free) * size)


if __name__ == "__main__":
    _be_counted(Path(sys.argv[1]))

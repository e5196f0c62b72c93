"""What it costs to make something durable: the ledger, others that store items, and the least that a disk can do.

Two flushes are the ledger's promise (two copies), so an offline sale cannot be faster than two raw flushes; what is
above that is SQLite, cryptography and Python. All peers (tests.bench.peers) take turns in one process on one directory,
first on the disk as it is, then once more with each flush delayed as on an SD card. What can be counted is counted, not
timed: calls by strace, flushes and bytes at the device, losses under the simulated card. Then the ledger alone: with a
long history in it, and starting again after a kill.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from tests.bench import stored
from tests.bench.flushes import Counters, Device, NotCounted, RawFile, counted, with_slow_flushes
from tests.bench.losses import losses
from tests.bench.peers import PEERS, WORKLOADS, Missing, Till, Workload
from tests.bench.report import Row, Section, measured

__all__ = ["RawFile", "run"]

STORED: Final = 100_000  # sales in the long ledger; the goal is stated for a million (--stored)
CUTS: Final = 70  # power cuts of each peer; ten of each kind
UNSENT: Final = 10_000
FLUSH_MS: Final = 5  # of the modelled card

_ROUNDS: Final = 16
_ITEMS_A_ROUND: Final = 30  # 480 in all: growing logs reach a checkpoint, which comes after some 400
_SLOW_ROUNDS: Final = 6
_SLOW_ITEMS_A_ROUND: Final = 10
_WARM_UP: Final = 10  # items before the first round: statements prepared, code paths taken once
_COUNTED: Final = 60  # under strace
_STARTS: Final = 5
_LONG_STARTS: Final = 3
_LONG_ROUNDS: Final = 25
_LONG_SALES_A_ROUND: Final = 8
_KIB: Final = 1024
_SLOW: Final = ("raw", "sqlite", "sqlite-presized", "sqlcipher", "litequeue", "payterm-ledger", "payterm")

SALE_CPU_GOAL_MS: Final = 1.5
SLOW_RATIO_GOAL: Final = 1.5
STORED_RATIO_GOAL: Final = 1.1
START_GOAL_S: Final = 2


@dataclass
class Figures:
    """One workload, round by round."""

    wall_ms: list[list[float]] = field(default_factory=list)
    cpu_ms: list[list[float]] = field(default_factory=list)
    device_flushes: list[float] = field(default_factory=list)  # per item; empty where the device does not say
    device_kib: list[float] = field(default_factory=list)

    def medians(self) -> list[float]:
        """Of each round, the time that an item took."""
        return [statistics.median(some) for some in self.wall_ms]

    def rates(self) -> list[float]:
        """Of each round, items per second: the dear ones, with a checkpoint in them, count as well."""
        return [1000 / statistics.fmean(some) for some in self.wall_ms]


def run(place: Path, stored_sales: int = STORED, cuts: int = CUTS) -> Section:
    """All figures of this benchmark, files in `place`."""
    figures, skipped = _in_a_child(place / "timed", list(WORKLOADS), _ROUNDS, _ITEMS_A_ROUND)
    rows: list[Row] = []
    notes = [f"{WORKLOADS[name].what}: skipped, {why}" for name, why in skipped.items()]
    usual_flushes = {}
    for name, of_it in figures.items():
        usual_flushes[name], some = _peer(name, of_it, figures["raw"], place / "counted", cuts=cuts, notes=notes)
        rows += some
    rows += _slow(place / "slow", [name for name in _SLOW if name in figures], usual_flushes, notes)
    rows += _long(place / "long", stored_sales)
    rows += _starts(place)
    notes.append("ratios above a bound are processor time: they grow as flushes get cheaper, and shrink on an SD card")
    notes.append(
        "lost: states after a power cut in which an acknowledged item was gone; the second figure is of cards that "
        "also destroy the block or flash page being written; cuts that destroyed the file system itself are left out"
    )
    return Section("storage", "making a sale durable, against others and a raw flush", rows, list(dict.fromkeys(notes)))


# ---- all in turn


def _in_a_child(
    place: Path, names: Sequence[str], rounds: int, items: int, flush_ms: int | None = None
) -> tuple[dict[str, Figures], dict[str, str]]:
    """Time these workloads in turn, in a process of their own; and why some were left out."""
    place.mkdir()
    arguments = ["-m", "tests.bench.storage", str(place), str(rounds), str(items), *names]
    if flush_ms is None:
        said = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout
    else:
        said = with_slow_flushes(flush_ms, arguments)
    document = json.loads(said.splitlines()[-1])
    return {name: Figures(**of_it) for name, of_it in document["figures"].items()}, document["skipped"]


def _be_timed(place: Path, rounds: int, items: int, names: Sequence[str]) -> None:
    figures: dict[str, Figures] = {}
    skipped: dict[str, str] = {}
    try:
        read: Callable[[], Counters | None] = Device(place).read
    except NotCounted:
        read = _nothing
    with ExitStack() as opened:
        workloads: dict[str, Workload] = {}
        for name in names:
            try:
                workloads[name] = WORKLOADS[name](place / name, _WARM_UP + rounds * items)
            except Missing as error:
                skipped[name] = str(error)
                continue
            opened.callback(workloads[name].close)
            figures[name] = Figures()
        numbers = dict.fromkeys(workloads, 0)
        for name in _turns(list(workloads), rounds):
            first = not numbers[name]
            for _ in range(_WARM_UP if first else 0):
                numbers[name] += 1
                workloads[name].store(numbers[name])
            numbers[name] = _round(workloads[name], numbers[name], items, figures[name], read)
            workloads[name].tidy()
    print(json.dumps({"figures": {name: asdict(of_it) for name, of_it in figures.items()}, "skipped": skipped}))


def _turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Each once a round, and each first in its turn: whoever comes first finds the disk as the last one left it."""
    for number in range(rounds):
        first = number % len(names)
        yield from (*names[first:], *names[:first])


def _nothing() -> None:
    """Stands for a device that says nothing."""


def _round(workload: Workload, number: int, items: int, figures: Figures, read: Callable[[], Counters | None]) -> int:
    os.sync()  # what others have left to be written is not this one's
    wall_ms, cpu_ms = [], []
    before = read()
    for _ in range(items):
        number += 1
        begun, begun_cpu = time.perf_counter(), time.process_time()
        workload.store(number)
        took, took_cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
        wall_ms.append((took - workload.others_s) * 1000)
        cpu_ms.append((took_cpu - workload.others_s) * 1000)
    flushed = read()
    os.sync()  # what was only left to be written counts, too; the flush of this call does not
    written = read()
    figures.wall_ms.append(wall_ms)
    figures.cpu_ms.append(cpu_ms)
    if before is not None and flushed is not None and written is not None:
        figures.device_flushes.append(flushed.since(before).flushes / items)
        figures.device_kib.append(written.since(before).written_bytes / items / _KIB)
    return number


def _peer(
    name: str, figures: Figures, raw: Figures, place: Path, *, cuts: int, notes: list[str]
) -> tuple[int | None, list[Row]]:
    """The rows of one workload, and how many flushes one of its items usually asks for."""
    what = WORKLOADS[name].what
    each_ms = [one for some in figures.wall_ms for one in some]
    cpu_ms = [one for some in figures.cpu_ms for one in some]
    goal = f"; goal {SALE_CPU_GOAL_MS} ms" if name == "payterm" else ""
    rows = [
        measured(what, figures.rates(), "1/s", peer=raw.rates(), against="raw"),
        measured("- one", each_ms, "ms"),
        measured("- processor", cpu_ms, "ms", peer=each_ms, against=f"of its own time{goal}"),
    ]
    usual, asked, written = _counted(name, place, notes)
    if figures.device_flushes:
        rows.append(measured("- flushes at the device", figures.device_flushes, "", against=f"asked for: {asked}"))
        rows.append(measured("- written at the device", figures.device_kib, "KiB", against=f"by calls: {written}"))
    elif usual is not None:
        rows.append(Row("- flushes", usual, "", against=asked))
    if name in PEERS and cuts:
        try:
            lost = losses(name, cuts)
        except NotCounted as error:
            notes.append(f"power cuts were not tried: {error}")
        else:
            rows.append(Row("- lost in power cuts", lost.plain, "", against=str(lost)))
    return usual, rows


def _counted(name: str, place: Path, notes: list[str]) -> tuple[int | None, str, str]:
    """How many flushes an item usually asks for, of which files; what it writes into which, in KiB."""
    try:
        pieces = counted(name, place, _COUNTED)
    except NotCounted as error:
        notes.append(f"calls were not counted: {error}")
        return None, "not counted", "not counted"
    counts = Counter(piece.flushes.total() for piece in pieces)
    usual, often = counts.most_common(1)[0]
    if often < len(pieces):
        rare = ", ".join(f"{number} in {times}" for number, times in sorted(counts.items()) if number != usual)
        notes.append(f"{WORKLOADS[name].what}: {usual} flushes in {often} of {len(pieces)}; {rare}")
    typical = [piece for piece in pieces if piece.flushes.total() == usual]
    files = sorted({file for piece in typical for file in piece.written})
    kib = {file: statistics.fmean(piece.written[file] for piece in typical) / _KIB for file in files}
    return (
        usual,
        ", ".join(f"{file} {number}" for file, number in sorted(typical[0].flushes.items())) or "none",
        ", ".join(f"{file} {size:.1f}" for file, size in kib.items()) or "none",
    )


def _slow(place: Path, names: Sequence[str], usual_flushes: dict[str, int | None], notes: list[str]) -> list[Row]:
    """Once more with each flush delayed; each against a raw loop with as many flushes."""
    try:
        figures, _ = _in_a_child(place, names, _SLOW_ROUNDS, _SLOW_ITEMS_A_ROUND, FLUSH_MS)
    except NotCounted as error:
        notes.append(f"slow flushes were not tried: {error}")
        return []
    raw = figures.pop("raw")
    raw_ms = statistics.median(raw.medians())
    rows = [measured(f"flushes of {FLUSH_MS} ms: raw", [one for some in raw.wall_ms for one in some], "ms")]
    for name, of_it in figures.items():
        as_many = usual_flushes[name]
        if not as_many:
            rows.append(measured(f"- {WORKLOADS[name].what}", of_it.medians(), "ms", against="flushes nothing"))
            continue
        peer = [as_many * one for one in raw.medians()]
        goal = f"; goal {SLOW_RATIO_GOAL}" if name == "payterm" else ""
        against = f"as many raw flushes: {as_many}{goal}"
        rows.append(measured(f"- {WORKLOADS[name].what}", of_it.medians(), "ms", peer=peer, against=against))
    notes.append(
        f"flushes of {FLUSH_MS} ms are strace's: it delays fdatasync and fsync of every peer alike and adds "
        f"{raw_ms - FLUSH_MS:.1f} ms of its own to each, disk included; nothing is subtracted"
    )
    return rows


# ---- the ledger alone


def _long(place: Path, stored_sales: int) -> list[Row]:
    """Sales in a ledger with a long history, in turn with sales in a new one."""
    if not stored_sales:
        return []
    took_s = stored.build(place / "long", stored_sales)
    size_mb = (place / "long" / "ledger" / "ledger.db").stat().st_size / 1e6
    count = _WARM_UP + _LONG_ROUNDS * _LONG_SALES_A_ROUND * 2
    tills = {"new": Till(place / "new", count), "long": Till(place / "long", count)}
    offline = {name: Figures() for name in tills}
    online = {name: Figures() for name in tills}
    for till in tills.values():
        for _ in range(_WARM_UP):
            till.sell()
            till.sell_online()
        till.settle()
    for number in range(_LONG_ROUNDS):
        for sales, sell in ((offline, _timed_sale), (online, _timed_online_sale)):
            for of_it in sales.values():
                of_it.wall_ms.append([])
                of_it.cpu_ms.append([])
            for _ in range(_LONG_SALES_A_ROUND):
                # One sale here, one there, and neither always first: both meet the same disk.
                for name in sorted(tills, reverse=bool(number % 2)):
                    wall_ms, cpu_ms = sell(tills[name])
                    sales[name].wall_ms[-1].append(wall_ms)
                    sales[name].cpu_ms[-1].append(cpu_ms)
        for till in tills.values():
            till.settle()
    for till in tills.values():
        till.close()
    rows = [Row(f"{stored_sales:,} sales stored: ledger.db", size_mb, "MB", against=f"built in {took_s:.0f} s")]
    goal = f"the same with none; goal {STORED_RATIO_GOAL}"
    for what, sales in (("offline sale", offline), ("online sale", online)):
        new, long = sales["new"], sales["long"]
        new_cpu, long_cpu = ([statistics.median(some) for some in each.cpu_ms] for each in (new, long))
        rows += [
            measured(f"- {what}", long.medians(), "ms", peer=new.medians(), against=goal),
            measured("  its processor", long_cpu, "ms", peer=new_cpu, against="the same with none"),
        ]
    starts_ms = [stored.start(place / "long").took_s * 1000 for _ in range(_LONG_STARTS)]
    rows.append(measured("- start after a kill", starts_ms, "ms", against=f"goal {START_GOAL_S} s"))
    return rows


def _timed_sale(till: Till) -> tuple[float, float]:
    begun, begun_cpu = time.perf_counter(), time.process_time()
    till.sell()
    return (time.perf_counter() - begun) * 1000, (time.process_time() - begun_cpu) * 1000


def _timed_online_sale(till: Till) -> tuple[float, float]:
    begun, begun_cpu = time.perf_counter(), time.process_time()
    host_s = till.sell_online()
    return (time.perf_counter() - begun - host_s) * 1000, (time.process_time() - begun_cpu - host_s) * 1000


def _starts(place: Path) -> list[Row]:
    """Starting after a kill, nothing sent for long."""
    directory = place / "unsent"
    stored.killed_with_unsent(directory, UNSENT)
    starts = [stored.start(directory) for _ in range(_STARTS)]
    assert all(each.unsent == UNSENT and not each.rebuilt for each in starts)
    rebuilt = stored.start(directory, rebuild=True)
    assert rebuilt.rebuilt
    assert rebuilt.unsent == UNSENT
    return [
        measured(
            f"{UNSENT:,} unsent: start after a kill",
            [each.took_s for each in starts],
            "s",
            against=f"goal {START_GOAL_S} s",
        ),
        Row("- ledger.db rebuilt from the journal", rebuilt.took_s, "s", against=f"{rebuilt.redone:,} records"),
    ]


if __name__ == "__main__":
    _be_timed(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])

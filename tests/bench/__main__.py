"""`python -m tests.bench [NAME ...] [--json FILE]`: run the benchmarks, print one table each."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Final

from rich.console import Console

from tests.bench import device, drain, emv, memory, online, queued, start, storage, tap
from tests.bench.report import Section, show

BENCHMARKS: Final[dict[str, Callable[[Path], Section]]] = {
    "storage": storage.run,
    "tap": tap.run,
    "start": start.run,
    "online": online.run,
    "device": device.run,
    "drain": drain.run,
    "queued": queued.run,
    "memory": memory.run,
    "emv": emv.run,
}
_WIDTH: Final = 132  # when printed into a file, where a terminal's width is not known


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Figures never fail a run; only a benchmark that cannot be run does."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description="Speed, as ratios against a peer measured in the same run."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones: {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("/var/tmp"),  # noqa: S108 - a directory of our own is made in it
        help="where to write; its file system is what is measured (default: %(default)s)",
    )
    parser.add_argument(
        "--stored",
        type=int,
        default=storage.STORED,
        metavar="N",
        help="storage: sales in the long ledger; the goal is stated for 1000000 (default: %(default)s)",
    )
    parser.add_argument(
        "--cuts",
        type=int,
        default=storage.CUTS,
        metavar="N",
        help="storage: power cuts of each peer, 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--sales",
        type=int,
        default=drain.SALES,
        metavar="N",
        help="drain: sales in the backlog; the goals are stated for 10000 (default: %(default)s)",
    )
    parser.add_argument(
        "--queued",
        type=int,
        default=queued.LONG,
        metavar="N",
        help="queued: items in the long queue; the goal is stated for 1000000 (default: %(default)s)",
    )
    parser.add_argument(
        "--drained",
        type=int,
        default=memory.SALES,
        metavar="N",
        help="memory: sales in the backlog; the goal is stated for 100000 (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(BENCHMARKS)):
        parser.error(f"there is no benchmark {', '.join(unknown)}: choose from {', '.join(BENCHMARKS)}")
    file_system = file_system_of(options.directory)
    if file_system in {"tmpfs", "ramfs"}:
        parser.error(f"{options.directory} is a {file_system}: a flush costs nothing there; choose --directory")

    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    machine = {
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "directory": str(options.directory),
        "file_system": file_system,
        "load_at_start": round(os.getloadavg()[0], 2),
    }
    console.print(
        f"Python {machine['python']}, SQLite {machine['sqlite']}, {machine['system']}, {machine['cpus']} processors, "
        f"load {machine['load_at_start']}; files in {machine['directory']} ({file_system})",
        highlight=False,
    )
    sections = []
    benchmarks = BENCHMARKS | {"storage": partial(storage.run, stored_sales=options.stored, cuts=options.cuts)}
    benchmarks |= {
        "drain": partial(drain.run, sales=options.sales),
        "queued": partial(queued.run, long=options.queued),
        "memory": partial(memory.run, sales=options.drained),
    }
    for name, run in benchmarks.items():
        if options.names and name not in options.names:
            continue
        # Short: the path of a Unix socket in it may have 107 bytes.
        with tempfile.TemporaryDirectory(prefix="ptbench-", dir=options.directory) as place:
            section = run(Path(place))
        show(console, section)
        sections.append(section)
    if options.json is not None:
        document = {"machine": machine, "benchmarks": [asdict(section) for section in sections]}
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def file_system_of(directory: Path) -> str:
    """Its type, from the longest mount point above it."""
    real = directory.resolve()
    best, found = -1, "unknown"
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, mounted, kind, *_ = line.split()
        if real.is_relative_to(mounted) and len(mounted) >= best:
            best, found = len(mounted), kind
    return found


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.soak.syscalls`: every fault at every call of a sale on the ledger's files. Takes hours.

The same points and checks as `tests/test_syscalls.py`, without its stride; only the thousands of equal calls that lay
out the write-ahead log at the start are sampled. Ends with 1 and the list of what was broken.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import syscalls_rig as rig

START_POINTS = 400  # of each kind: what goes beyond is the filler of the log, call by call the same


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.soak.syscalls", description=__doc__)
    options.add_argument("--stride", type=int, default=1, help="every n-th point only (default: %(default)s)")
    stride = options.parse_args().stride
    broken: list[str] = []
    for made in (True, False):
        with rig.state(made=made) as base:
            for kind, calls in rig.calls(base).items():
                in_sales = calls.points_in_sales()
                start = calls.points()[: len(calls.points()) - len(in_sales)]
                sampled, start_stride = rig.spread(start, START_POINTS)
                points = [*sampled, *in_sales][::stride]
                broken += (found := _broken(base, kind, points))
                ledger = "a ledger in use" if made else "a new ledger"
                print(
                    f"{ledger}, {kind}: {len(points)} points (start every {start_stride * stride}th, "
                    f"sales every {stride}th), {len(found)} broken",
                    flush=True,
                )
    for line in broken:
        print(line)
    return 1 if broken else 0


def _broken(base: Path, kind: str, points: list[tuple[int, str]]) -> list[str]:
    def look(point: tuple[int, str]) -> str | None:
        number, fault = point
        try:
            rig.check(base, kind, fault, number)
        except rig.PromiseBroken as promise:
            return str(promise)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [line for line in pool.map(look, points) if line]


if __name__ == "__main__":
    sys.exit(main())

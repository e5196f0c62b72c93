"""Chaos for hours: python -m tests.soak.chaos [--sales 200000] [--seed S] (with PYTHONPATH=tests:hw-sim)."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from chaos_rig import Broken, Chaos

from terminal.sync import spool

SHARD: Final = 2_000
MEMORY: Final = Path("/dev/shm")  # noqa: S108 (made with a name of its own there)


def lived(seed: int) -> tuple[int, dict[str, int] | str]:
    """One shard: its seed, and what was counted or what is broken."""
    logging.disable(logging.CRITICAL)
    spool.FILLER_BYTES = 65_536  # type: ignore[misc]  # a small disk for many of them
    with tempfile.TemporaryDirectory(prefix="payterm-chaos-", dir=MEMORY if MEMORY.is_dir() else None) as directory:
        chaos = Chaos(Path(directory), seed)
        try:
            chaos.run(SHARD)
            chaos.heal()
            return seed, chaos.judge()
        except Broken as broken:
            return seed, str(broken)
        finally:
            chaos.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sales", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=None, help="of the first shard (default: any; it is printed)")
    options = parser.parse_args()
    first = secrets.randbelow(10**9) if options.seed is None else options.seed
    seeds = range(first, first + max(1, options.sales // SHARD))
    print(f"seeds {seeds.start} to {seeds.stop - 1}", flush=True)
    sums: dict[str, int] = {}
    broken, begin_s = 0, time.monotonic()
    with multiprocessing.Pool(os.cpu_count()) as pool:
        for number, (seed, found) in enumerate(pool.imap_unordered(lived, seeds), start=1):
            if isinstance(found, str):
                broken += 1
                print(f"seed {seed}: {found}", flush=True)
            else:
                sums = {name: sums.get(name, 0) + count for name, count in found.items()}
            if number % 5 == 0 or number == len(seeds):
                print(f"{time.monotonic() - begin_s:.0f} s, {number} shards, {broken} broken: {sums}", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.soak.model [SCENARIO...]`: the model with more sales, more faults, and everything at once.

The same search and the same promises as `tests/test_model.py`. Each scenario runs in a process of its own, for the
memory; exit code 1, and the shortest story, when a promise does not hold.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from model.search import Counterexample, Search  # noqa: E402 (where it is was only known here)
from model.steps import Scenario  # noqa: E402

SCENARIOS: Final = {
    "five-faults": Scenario(faults=5, acts=1),
    "inserted": Scenario(("chip",), faults=4, acts=1),
    "stripe": Scenario(stripe=True, faults=2),
    "stripe-person": Scenario(stripe=True, faults=1, acts=1),
    "stripe-inserted": Scenario(("chip",), stripe=True, faults=1, acts=1),
    "refund": Scenario(("tap", "refund"), faults=1, acts=1),
    "two-sales": Scenario(("tap", "tap"), faults=1),
    "two-kinds": Scenario(("tap", "chip"), faults=0, acts=1),
    "three-sales": Scenario(("tap", "tap", "tap"), faults=0, local_ends=False),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.model", description=__doc__)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; all if none")
    names = parser.parse_args(arguments).scenarios or list(SCENARIOS)
    if unknown := set(names) - SCENARIOS.keys():
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        kept = [print(line, flush=True) or well for line, well in pool.imap(_searched, names)]
    return 0 if all(kept) else 1


def _searched(name: str) -> tuple[str, bool]:
    began = time.process_time()
    try:
        found = Search(SCENARIOS[name]).run()
    except Counterexample as counterexample:
        return f"{name}: {counterexample}", False
    seconds, used_mib = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    counts = f"{found.states} states, {found.steps} steps, {found.rests} at rest, {found.longest} steps to the farthest"
    return f"{name}: {counts}; {seconds:.0f} s, {used_mib} MiB", True


if __name__ == "__main__":
    sys.exit(main())

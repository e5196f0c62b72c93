"""`python -m tests.soak.power_cut --states N --seed S`: power cuts by the ten thousand.

Each day is a new recording: its phases in another order, other amounts, other moments at which SQLite copies its log
back. Of every day one cut is taken up again, and the start that follows it is recorded and cut as well. Exit code 1 and
the recording kept when a promise was broken; then `payterm-sim sdcard cut RECORDING --cut CUT --python
power_cut_rig:judge` repeats one state.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "hw-sim"), str(ROOT / "tests")]

from power_cut_rig import cuts_of, in_memory, judged, record  # noqa: E402 (where it is was only known here)

from hwsim.sdcard import MODES, Cut, Mode, Tally, unavailable  # noqa: E402

DAY_STATES: Final = 1000  # of one recording; more say less than another recording does
START_STATES: Final = 200  # of the start after one of its cuts


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.power_cut", description=__doc__)
    parser.add_argument("--states", type=int, default=100_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=int(time.time()), metavar="S", help="default: the time")
    parser.add_argument("--files", action="store_true", help="without root: by system calls, no real file system")
    parser.add_argument("--modes", default=",".join(MODES), help="default: %(default)s")
    parser.add_argument("--keep", type=Path, default=Path.cwd(), help="where recordings with losses go")
    options = parser.parse_args(arguments)
    modes = [Mode(word) for word in options.modes.split(",")]
    reason = "asked for" if options.files else unavailable()
    print(f"seed {options.seed}, {f'by system calls ({reason})' if reason else 'on ext4'}", flush=True)

    total, started, left, seed = Tally(), time.monotonic(), options.states, options.seed
    with tempfile.TemporaryDirectory(prefix="payterm-soak-", dir=in_memory()) as made:
        while left > 0:
            day = Path(made) / f"day-{seed}"
            record(day, "sell", "--seed", str(seed), on_files=bool(reason))
            cuts = cuts_of(day, min(left, DAY_STATES), seed, modes)
            left -= _judge(day, cuts, total, options.keep)
            if left > 0:
                calm = [cut for cut in cuts if cut.mode is not Mode.COLLATERAL and cut.mode is not Mode.GARBAGE]
                cut = (calm or cuts)[seed % len(calm or cuts)]
                start = Path(made) / f"start-{seed}"
                words = ("recover", "--seed", str(seed), "--run", "50")
                record(start, *words, on_files=bool(reason), after=day, cut=cut)
                cuts = cuts_of(start, min(left, START_STATES), seed, modes)
                left -= _judge(start, cuts, total, options.keep)
                start.unlink()
            day.unlink()
            seed += 1
            print(f"{options.states - max(0, left)} states, {total.lost.total()} lost", flush=True)
    minutes = (time.monotonic() - started) / 60
    print(total.table())
    pace = f"{minutes:.1f} minutes, {options.states / minutes:.0f} a minute"
    print(f"seed {options.seed}: {options.states} states in {pace}")
    for verdict in (*total.losses, *total.remarks):
        print(f"{verdict.cut}: {verdict.loss or verdict.remark}")
    return 1 if total.lost.total() else 0


def _judge(path: Path, cuts: list[Cut], total: Tally, keep: Path) -> int:
    tally = judged(path, cuts)
    total.merge(tally)
    if tally.lost.total():
        shutil.copy(path, keep / path.name)
        for verdict in tally.losses:
            print(f"{keep / path.name} --cut {verdict.cut}: {verdict.loss}", flush=True)
    return len(cuts)


if __name__ == "__main__":
    sys.exit(main())

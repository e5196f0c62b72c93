"""`python -m tests.soak.corruption --flips N --blocks N --seed S`: damage by the ten thousand, one at a time.

The same ledgers, damage and judge as `tests/test_corruption.py`; each variant of the ledger takes a quarter. Exit code
1 and the list when something was silent, lost or refused; the same seed does the same damage.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "hw-sim"), str(ROOT / "tests")]

from corruption_rig import Variant, damages, ground, judge, workplace  # noqa: E402 (where it is was only known here)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.corruption", description="One damage at a time.")
    parser.add_argument("--flips", type=int, default=8000, help="single bits (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=2000, help="whole blocks of 4 KiB (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of ledgers and damage (default: %(default)s)")
    options = parser.parse_args(arguments)
    share = len(Variant)
    wrong: list[str] = []
    root = workplace()
    try:
        for variant in Variant:
            made = ground(variant, options.seed)
            counts: Counter[tuple[str, str]] = Counter()
            began = time.monotonic()
            for damage in damages(made, options.seed, options.flips // share, options.blocks // share):
                found = judge(made, damage, root / "files")
                counts[Path(damage.file).suffix or Path(damage.file).name, found.verdict.value] += 1
                if found.verdict.wrong:
                    wrong.append(f"{variant.value}, seed {options.seed}: {found}")
                    print(wrong[-1], flush=True)
            each_ms = (time.monotonic() - began) * 1000 / max(1, counts.total())
            print(f"{variant.value}: {counts.total()} damages, {each_ms:.0f} ms each")
            for (file, verdict), count in sorted(counts.items()):
                print(f"  {file:<10} {verdict:<8} {count:>6}")
    finally:
        shutil.rmtree(root)
    print(f"{len(wrong)} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

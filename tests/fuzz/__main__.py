"""`python -m tests.fuzz TARGET [--runs N] [--keep]`: hostile bytes found by coverage (atheris, libFuzzer).

The corpus of a target is `corpus/TARGET.hex`, one input a line; `tests/test_fuzz_corpus.py` runs it in every test run,
without atheris. `--keep` writes back what the run has found: each input reached something new. A crash is printed in
hex: put it into the corpus once it is mended.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

CORPUS: Final = Path(__file__).with_name("corpus")
INPUT_BYTES_MAX: Final = 1_024  # a script for a whole transaction; one response has 256
INPUTS_MAX: Final = 500  # kept of a target, the shortest
SECONDS_MAX: Final = 10  # for one input: a hang
MEGABYTES_MAX: Final = 700  # for the whole process, instrumented


def corpus(target: str) -> list[bytes]:
    """Its inputs, in order."""
    file = CORPUS / f"{target}.hex"
    return [bytes.fromhex(line) for line in file.read_text().splitlines()] if file.exists() else []


def keep(target: str, inputs: Iterable[bytes]) -> None:
    lines = sorted({data.hex() for data in inputs}, key=lambda line: (len(line), line))[:INPUTS_MAX]
    CORPUS.mkdir(exist_ok=True)
    (CORPUS / f"{target}.hex").write_text("".join(f"{line}\n" for line in lines))


def fuzz(arguments: Sequence[str]) -> None:
    """In the process that is instrumented: never returns."""
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not there for every Python

    with atheris.instrument_imports(include=["terminal.emv"]):
        from tests.fuzz.targets import TARGETS

    target = TARGETS[arguments[0]]
    atheris.Setup([sys.argv[0], *arguments[1:]], lambda data: target(bytes(data)))
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Hostile bytes, found by coverage.")
    parser.add_argument("target")
    parser.add_argument("--runs", type=int, default=1_000_000, help="executions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer's chance (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="write the grown corpus back")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ptfuzz-") as place:
        grown = Path(place, "grown")
        grown.mkdir()
        for data in corpus(options.target):
            Path(grown, hashlib.sha256(data).hexdigest()).write_bytes(data)
        limits = [f"-max_len={INPUT_BYTES_MAX}", f"-timeout={SECONDS_MAX}", f"-rss_limit_mb={MEGABYTES_MAX}"]
        child = [sys.executable, "-c", "import sys; from tests.fuzz.__main__ import fuzz; fuzz(sys.argv[1:])"]
        child += [options.target, *limits, f"-artifact_prefix={place}/found-"]
        # Coverage alone says nothing of time: the two last lines of the statistics are printed by libFuzzer itself.
        found = subprocess.run(
            [*child, f"-runs={options.runs}", f"-seed={options.seed}", "-print_final_stats=1", str(grown)], check=False
        )
        for artifact in sorted(Path(place).glob("found-*")):
            print(f"{options.target}: {artifact.name.removeprefix('found-')}: {artifact.read_bytes().hex()}")
        if options.keep and found.returncode == 0:
            keep(options.target, (file.read_bytes() for file in grown.iterdir()))
        return found.returncode


if __name__ == "__main__":
    sys.exit(main())

"""A run of sales in which the n-th system call of a kind on the ledger's files fails, or is the last.

strace does it to the unchanged program (`payterm-sim sales`, one process). Then whatever happened must have been said
honestly, the next start must be clean, and every sale whose approval stood on the panel must be in the ledger.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ledger_rig import verified

from hwsim import sales
from hwsim.console import draw
from terminal import app
from terminal.clock import SystemClock, system_entropy
from terminal.errors import TerminalError
from terminal.ui import screens

SALES: Final = 3
RUN_S: Final = 60.0
EXIT_LEDGER: Final = 5
ERRORS: Final = ("error=ENOSPC", "error=EIO", "error=EROFS")
KILL: Final = "signal=SIGKILL"
FAULTS: Final = (*ERRORS, KILL)
# Which calls to look for: the kinds that SQLite and the journal use, and those that a rebuilding start may use.
KINDS: Final = ("pwrite64", "write", "fdatasync", "fsync", "openat", "ftruncate", "fallocate", "rename", "unlink")
FILES: Final = ("journal", "journal.new", "ledger.db", "ledger.db-wal", "ledger.db-journal", ".")

_ACK: Final = re.compile(r"ack (\d+) ([0-9a-f-]{36}) (\d+) ([A-Z]{3})")
_CALL: Final = re.compile(r"\d+ +(\w+)\(")


class PromiseBroken(AssertionError):
    """Something shown is not stored, a start is not clean, or trouble was not said."""


@dataclass(frozen=True, slots=True)
class Run:
    """How a run ended."""

    code: int
    said: str
    acknowledged: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Calls:
    """How often a kind was called: until the first sale was shown, until the last was, and altogether."""

    start: int
    sales: int
    total: int

    def points(self, faults: Sequence[str] = FAULTS) -> list[tuple[int, str]]:
        """Every fault at every call, from the first of the start to the last of the end."""
        return [(number, fault) for number in range(1, self.total + 1) for fault in faults]

    def points_in_sales(self, faults: Sequence[str] = FAULTS) -> list[tuple[int, str]]:
        """The same between the first sale and the last: a WAL that is presized or overwritten is thousands of calls."""
        return [(number, fault) for number in range(self.start + 1, self.sales + 1) for fault in faults]


def spread(points: Sequence[tuple[int, str]], about: int) -> tuple[Sequence[tuple[int, str]], int]:
    """About so many of these points, evenly, and the stride. It is odd, so that the faults take turns."""
    stride = max(1, len(points) // about) | 1
    return points[::stride], stride


@contextmanager
def state(*, made: bool) -> Iterator[Path]:
    """A state directory with keys; `made`: with a ledger that holds a few sales already. Copied for each point."""
    with tempfile.TemporaryDirectory(prefix="payterm-") as directory:
        path = Path(directory) / "state"
        sales.provision(path, journal_mib=4)
        if made:
            run(path, Path(directory) / "ack")
        yield path


def run(state: Path, ack: Path, *, count: int = SALES, tracer: Sequence[str] = (), plant: str | None = None) -> Run:
    """`payterm-sim sales` on this state."""
    before = ack.read_text(encoding="ascii").splitlines() if ack.exists() else []
    finished = subprocess.run(
        [
            *(*tracer, sys.executable, "-P", "-m", "tests.run_sales", *(("--plant", plant) if plant else ()), "sales"),
            *("--state", str(state), "--count", str(count), "--ack", str(ack), "--journal-mib", "4"),
        ],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=RUN_S,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((*sys.path, str(Path(__file__).parent.parent))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": str(ack.parent.resolve()),  # what a killed run leaves goes with the test's own directory
        },
    )
    lines = ack.read_text(encoding="ascii").splitlines() if ack.exists() else []
    return Run(finished.returncode, finished.stderr, tuple(lines[len(before) :]))


def strace(state: Path, *arguments: str) -> list[str]:
    found = shutil.which("strace")
    assert found is not None, "strace is missing: run make, which installs it"
    paths = [word for name in FILES for word in ("-P", os.path.normpath(state / "ledger" / name))]
    return [found, "-f", *paths, *arguments]


def calls(base: Path) -> dict[str, Calls]:
    """How often each kind is called on the ledger's files in an undisturbed run, by the thread that takes sales."""
    with _copy(base) as place:
        log, ack, copied = place / "calls", place / "ack", place / "state"
        tracer = strace(copied, "-P", str(ack), "-o", str(log), "-e", f"trace={','.join(KINDS)}")
        done = run(copied, ack, tracer=tracer)
        assert done.code == 0, done.said
        lines = log.read_text(encoding="utf-8").splitlines()
    main = lines[0].split()[0]
    marks: list[Counter[str]] = []
    seen: Counter[str] = Counter()
    for line in lines:
        if '"ack ' in line:
            marks.append(seen.copy())
        elif str(ack) not in line and (call := _CALL.match(line)) and line.split()[0] == main:
            seen[call[1]] += 1
    return {kind: Calls(marks[0][kind], marks[-1][kind], seen[kind]) for kind in KINDS if seen[kind]}


def check(base: Path, kind: str, fault: str, number: int, *, plant: str | None = None) -> bool:
    """One point: the disturbed run, the next start, and the promises. Raises `PromiseBroken`.

    False when there was no such call: of calls that time decides (what is flushed when idle) there may be one less.
    """
    with _copy(base) as place:
        copied, ack, log = place / "state", place / "ack", place / "calls"
        inject = f"inject={kind}:{fault}:when={number}"
        tracer = strace(copied, "-o", str(log), "-e", f"trace={kind}", "-e", inject)
        disturbed = run(copied, ack, tracer=tracer, plant=plant)
        where = f"{fault} at {kind} {number}"
        if fault != KILL:
            said_honestly(disturbed, where)
        again = run(copied, ack, count=1)
        if again.code or len(again.acknowledged) != 1:
            raise PromiseBroken(f"{where}: the next start is not clean:\n{again.said}")
        acknowledged = (*disturbed.acknowledged, *again.acknowledged)
        if lost := missing(copied, acknowledged):
            raise PromiseBroken(f"{where}: shown as approved, but not in the ledger: {', '.join(lost)}")
        return disturbed.code == -signal.SIGKILL if fault == KILL else "INJECTED" in log.read_text(encoding="utf-8")


def sweep(base: Path, kind: str, points: Sequence[tuple[int, str]], *, plant: str | None = None) -> int:
    """`check` at these points, as many at a time as there are processors; how many were reached."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(lambda point: check(base, kind, point[1], point[0], plant=plant), points))


def missing(state: Path, acknowledged: Collection[str]) -> list[str]:
    """Which of these acknowledgements the ledger does not bear out. The whole journal is read, too."""
    config = sales.load_state(state)
    lost = []
    try:
        with app.recovered_books(config, SystemClock(), system_entropy) as books:
            found = {str(sale.id): sale for sale in books.ledger.transactions(limit=10_000)}
            verified(books.ledger)
    except TerminalError as error:
        raise PromiseBroken(f"the ledger cannot be read: {error}") from error
    for line in acknowledged:
        match = _ACK.fullmatch(line)
        assert match, line
        sequence, transaction, minor, currency = match.groups()
        sale = found.get(transaction)
        facts = sale and (sale.number, sale.amount.minor, sale.amount.currency.code)
        if sale is None or sale.state.value not in sales.MADE or facts != (int(sequence), int(minor), currency):
            lost.append(line)
    return lost


def panel(*reasons: str) -> list[str]:
    """What these errors look like when sales draws its panel's last picture."""
    pictures = (screens.render(screens.Error(reason), "en") for reason in reasons)
    return [draw(picture, columns=80, encoding="utf-8") for picture in pictures]


def said_honestly(run: Run, where: str, count: int = SALES) -> None:
    """Either it went on selling, or it ended with a message and a clear error on the panel. Raises `PromiseBroken`."""
    if run.code == 0:
        # One more when the storage came back: the sale that met the fault was stored after all, and was then shown.
        if len(run.acknowledged) < count:
            raise PromiseBroken(f"{where}: says that all is well after {len(run.acknowledged)} of {count} sales")
        return
    if (
        run.code == sales.EXIT_NOT_MADE
        and "payterm-sim: the storage failed" in run.said
        and "Traceback" not in run.said
    ):
        return  # it was still trying to get its storage back when the customers, who were told so, went away
    if run.code != EXIT_LEDGER or "payterm-sim: " not in run.said or "Traceback" in run.said:
        raise PromiseBroken(f"{where}: ended with {run.code} and no word that helps:\n{run.said}")
    if not any(picture in run.said for picture in panel("ledger", "key")):
        raise PromiseBroken(f"{where}: the panel shows no clear error:\n{run.said}")


@contextmanager
def _copy(base: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="payterm-") as directory:
        shutil.copytree(base, Path(directory) / "state")
        yield Path(directory)

"""How soon the services are ready, and what they weigh, against processes that only import the same modules.

Ready is when systemd would be told so (sd_notify, on a socket that is bound here). What the peer takes is the price of
Python and the libraries; what the service takes above it is its own: keys, ledger, recovery, the socket. Byte code is
compiled before the first round, as an installation's is.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hwsim.world import World
from tests.bench.report import Row, Section, measured

ROUNDS: Final = 7
SETTLE_S: Final = 1.2  # after ready: the reader is opened and the first idle screens are drawn
READY_S: Final = 60.0  # a service that is not ready by then is broken
STOP_S: Final = 15.0
READY_GOAL_MS: Final = 600
RESIDENT_GOAL_MB: Final = 65
PACKAGES_SHOWN: Final = 6

_IMPORT: Final = re.compile(r"import time: +(?P<self>\d+) \| +\d+ \| +(?P<name>\S+)")
_PEER: Final = """
import contextlib, importlib, signal, sys
for name in sys.argv[1:]:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
from terminal import notify
notify.ready()
signal.pause()
"""
_BARE: Final = """
import os, signal, socket
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
signal.pause()
"""


@dataclass
class Figures:
    """One kind of process over all rounds."""

    ready_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    resident_mb: list[float] = field(default_factory=list)
    share_mb: list[float] = field(default_factory=list)


class Notified:
    """Starts processes as systemd does: with a socket on which they say when they are ready."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._number = 0

    @contextlib.contextmanager
    def process(self, arguments: Sequence[str], figures: Figures, log: Path) -> Iterator[int]:
        """Start, wait until it is ready, note how long that took; end it when the block is left."""
        self._number += 1
        path = self._place / f"n{self._number}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, log.open("wb") as output:
            told.bind(str(path))
            begun = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(path),
            )
            try:
                _wait_until_ready(told, process, log)
                figures.ready_ms.append((time.perf_counter() - begun) * 1000)
                figures.cpu_ms.append(_cpu_ms(process.pid))
                yield process.pid
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _environment(self, path: Path) -> Mapping[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return kept | {
            "NOTIFY_SOCKET": str(path),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONPYCACHEPREFIX": str(self._place / "pycache"),
        }


def run(place: Path) -> Section:
    """All figures of this benchmark, files in `place`."""
    with World.create(place / "w", result_hold_ms=0) as world:
        world.start_host()
        world.start_device()
        services = {
            "terminal": [
                "-m",
                "hwsim",
                "--config",
                str(world.config),
                "run",
                "--device",
                str(world.directory / "device"),
            ],
            "sync": ["-m", "terminal", "--config", str(world.config), "sync", "run"],
        }
        start = Notified(place)
        # The first start makes stores and byte code; a second tells what a start imports.
        with _all(start, services, [], {name: Figures() for name in services}, place):
            time.sleep(SETTLE_S)
        with _all(start, services, ["-X", "importtime"], {name: Figures() for name in services}, place):
            time.sleep(SETTLE_S)
        imports = {name: _imports(place / f"{name}.log") for name in services}

        figures = {name: Figures() for name in services}
        peers = {name: Figures() for name in services}
        bare = Figures()
        for _ in range(ROUNDS):
            with _all(start, services, [], figures, place) as pids:
                time.sleep(SETTLE_S)
                for name, pid in pids.items():
                    _weigh(pid, figures[name])
            for name in services:
                with start.process(["-c", _PEER, *imports[name]], peers[name], place / "peer.log") as pid:
                    _weigh(pid, peers[name])
            with start.process(["-c", _BARE], bare, place / "peer.log") as pid:
                _weigh(pid, bare)

    rows = [row for name in services for row in _rows(name, figures[name], peers[name], bare)]
    rows.append(measured("bare Python: ready", bare.ready_ms, "ms"))
    rows.append(measured("bare Python: resident", bare.resident_mb, "MB"))
    return Section(
        "start",
        "process start to READY=1, and memory when idle, against a process that imports the same modules",
        rows,
        [
            "the terminal runs on the simulated device: its own drivers, nfcpy and luma, over another process",
            "share (PSS): pages that several processes use are counted in parts; it depends on what else runs",
            *(
                f"{name}: {len(imports[name])} modules; most import time, {_heaviest(imports[name])}"
                for name in services
            ),
        ],
    )


@contextlib.contextmanager
def _all(
    start: Notified,
    services: Mapping[str, Sequence[str]],
    options: Sequence[str],
    figures: Mapping[str, Figures],
    place: Path,
) -> Iterator[dict[str, int]]:
    """All services, one after the other; their process ids."""
    with contextlib.ExitStack() as running:
        yield {
            name: running.enter_context(start.process([*options, *arguments], figures[name], place / f"{name}.log"))
            for name, arguments in services.items()
        }


def _rows(name: str, own: Figures, peer: Figures, bare: Figures) -> list[Row]:
    return [
        measured(
            f"{name}: ready", own.ready_ms, "ms", peer=peer.ready_ms, against=f"imports only; goal {READY_GOAL_MS} ms"
        ),
        measured(f"{name}: imports only", peer.ready_ms, "ms", peer=bare.ready_ms, against="bare Python"),
        measured(f"{name}: processor", own.cpu_ms, "ms", peer=peer.cpu_ms, against="imports only: the rest is its own"),
        measured(
            f"{name}: resident",
            own.resident_mb,
            "MB",
            peer=peer.resident_mb,
            against=f"imports only; goal {RESIDENT_GOAL_MB} MB",
        ),
        measured(f"{name}: imports only", peer.resident_mb, "MB", peer=bare.resident_mb, against="bare Python"),
        measured(f"{name}: share (PSS)", own.share_mb, "MB", peer=own.resident_mb, against="of resident"),
    ]


def _wait_until_ready(told: socket.socket, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s:
        if select.select([told], [], [], 0.2)[0]:
            if told.recv(4096) == b"READY=1":
                return
        elif process.poll() is not None:
            tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"a process ended with {process.returncode} before it was ready:\n{tail}")
    raise RuntimeError(f"a process was not ready within {READY_S:.0f} s; see {log}")


def _weigh(pid: int, figures: Figures) -> None:
    """VmRSS and PSS, as the kernel counts them."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    figures.resident_mb.append(_kib(status, "VmRSS") / 1000 * 1.024)
    figures.share_mb.append(_kib(rollup, "Pss") / 1000 * 1.024)


def _kib(text: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the kernel does not tell {name}")
    return int(found[1])


def _cpu_ms(pid: int) -> float:
    """Processor time so far of all threads: nanoseconds, where proc(5)'s stat counts in steps of 10 ms."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text(encoding="ascii").split()[0]) for task in tasks) / 1e6


def _imports(log: Path) -> dict[str, int]:
    """Modules in the order of their import, with the microseconds that each took by itself."""
    found = _IMPORT.finditer(log.read_text(encoding="utf-8", errors="replace"))
    return {match["name"]: int(match["self"]) for match in found}


def _heaviest(imports: Mapping[str, int]) -> str:
    packages: Counter[str] = Counter()
    for name, took_us in imports.items():
        packages[name.partition(".")[0]] += took_us
    return ", ".join(f"{name} {took_us / 1000:.0f} ms" for name, took_us in packages.most_common(PACKAGES_SHOWN))

"""What `memory` measures, in a process that carries nothing else."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID

from terminal.clock import SystemClock, system_entropy
from terminal.ledger.keys import SecretKey
from terminal.sync.destinations.host import HostDestination, HostSettings
from terminal.sync.loop import Place, SyncSettings
from terminal.sync.loop import run as run_loop
from terminal.sync.spool import OutboxItem
from terminal.sync.step import Delivered, LinkReport, Offer, Seen

FIRST: Final = 1_000
ENVELOPE_CHARS: Final = 1_900  # an authorisation with its sealed card data
ENVELOPE: Final = ("ey" + "A" * 80, "B" * (ENVELOPE_CHARS - 170), "C" * 86)


@dataclass
class Endless:
    """Implements `Terminal`: as many sales as are wanted, each made when it is fetched."""

    count: int
    offered: int = 0
    delivered: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def fetch(self, max: int, wait_ms: int) -> Offer:
        with self.changed:
            if self.offered >= self.count:
                self.changed.wait(wait_ms / 1000)
        return Offer([_item(number) for number in range(self.offered, min(self.offered + max, self.count))])

    def stored(self, keys: Sequence[str]) -> None:
        self.offered += len(keys)

    def deliver(self, answers: Sequence[tuple[str, str]]) -> Sequence[Delivered]:
        with self.changed:
            self.delivered += len(answers)
            self.changed.notify_all()
        return [Delivered(key, state="settled") for key, _ in answers]

    def report(self, report: LinkReport) -> Seen:
        return Seen(None, False)


def _item(number: int) -> OutboxItem:
    id_ = UUID(int=(0x4000 << 64) | (0x8 << 60) | number)
    text = ".".join(ENVELOPE)
    return OutboxItem(f"{id_}/authorisation", id_, "authorisation", number + 1, False, text, None, 1250, "EUR")


def drained(directory: str, url: str, ca_file: str, count: str) -> None:
    """In a process of its own: send them all, then say how large it has been, in kB."""
    till = Endless(int(count))
    settings = SyncSettings(
        Path(directory), SecretKey(bytes(32)), [Place(partial(HostDestination, HostSettings(url, Path(ca_file))))]
    )
    stop = threading.Event()
    loop = threading.Thread(
        target=lambda: run_loop(
            settings, lambda: till, clock=SystemClock(), entropy=system_entropy, stop=stop, alive=lambda: None
        )
    )
    loop.start()
    sizes = []
    for reached in (min(FIRST, till.count), till.count):
        with till.changed:
            till.changed.wait_for(lambda reached=reached: till.delivered >= reached)  # type: ignore[misc]
        sizes.append(_largest_kb())
    stop.set()
    with till.changed:
        till.changed.notify_all()
    loop.join()
    print(json.dumps(sizes))


def _largest_kb() -> int:
    """The largest resident size so far (proc(5), VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))

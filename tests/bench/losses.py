"""What of a peer's acknowledged items a power cut takes, by the simulated SD card (hwsim.sdcard).

The peer works on a real ext4 whose every write and flush is recorded; then the power fails at some moment, in some way,
and the peer is asked in a process of its own what it still has. Two kinds of cut are told apart: a card that keeps any
part of what it had not confirmed, and one that also destroys the block, or the flash page, that it was writing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.bench.flushes import NotCounted
from tests.bench.peers import survivors

if TYPE_CHECKING:
    from hwsim.sdcard.campaign import Found

ITEMS: Final = 40
SEED: Final = 1
_JOBS: Final = 2
_RECORD: Final = 'exec "$0" -m tests.bench.peers "$1" --directory "$SD_CARD/items" --count "$2" --ack "$SD_TOLD"'


@dataclass(frozen=True, slots=True)
class Losses:
    """States in which acknowledged items were lost, of how many; the most items lost in one."""

    plain: int = 0
    plain_states: int = 0
    destructive: int = 0
    destructive_states: int = 0
    apart: int = 0
    """States not counted: the cut destroyed the file system's own blocks."""
    items_max: int = 0

    def __str__(self) -> str:
        said = f"{self.plain} of {self.plain_states}; blocks destroyed: {self.destructive} of {self.destructive_states}"
        return f"{said}; {self.items_max} of {ITEMS} items at most" if self.items_max else said


def losses(name: str, states: int) -> Losses:
    """Cut a peer's power so many times. Raises `NotCounted` where there can be no simulated card."""
    try:
        from hwsim.sdcard import campaign, card
        from hwsim.sdcard.cuts import DESTRUCTIVE
        from hwsim.sdcard.recording import Recording, choose
    except ImportError as error:
        raise NotCounted(f"there is no simulated SD card here ({error})") from error
    if (reason := card.unavailable()) is not None:
        raise NotCounted(reason)
    with tempfile.TemporaryDirectory(prefix="ptbench-") as made:
        recording = Path(made) / "recording"
        words = [sys.executable, "-m", "hwsim.sdcard", "record", str(recording), "--"]
        program = ["sh", "-c", _RECORD, sys.executable, name, str(ITEMS)]
        # The program is started on the card, where this project's files are not found by themselves.
        paths = os.pathsep.join(os.path.realpath(path) for path in sys.path if path)
        environment = os.environ | {"PYTHONPATH": paths}
        done = subprocess.run([*words, *program], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotCounted((done.stderr.strip() or f"recording ended with {done.returncode}").splitlines()[0])
        cuts = choose(Recording.load(recording), states, SEED)
        counts = dict.fromkeys(("plain", "plain_states", "destructive", "destructive_states", "apart", "items_max"), 0)
        for verdict in campaign.verdicts(recording, cuts, "tests.bench.losses:checker", name, jobs=_JOBS):
            if verdict.metadata_destroyed:
                counts["apart"] += 1
                continue
            kind = "destructive" if verdict.cut.mode in DESTRUCTIVE else "plain"
            counts[f"{kind}_states"] += 1
            if verdict.loss is not None:
                counts[kind] += 1
                lost = verdict.loss.split()[0]
                counts["items_max"] = max(counts["items_max"], int(lost) if lost.isdecimal() else ITEMS)
        return Losses(**counts)


def checker(name: str) -> Callable[[Found], str | None]:
    """A judge of one peer, as hwsim.sdcard.campaign asks for."""

    def judge(found: Found) -> str | None:
        acknowledged = {int(line) for line in found.told.split()}
        if not acknowledged:
            return None
        there, trouble = survivors(name, found.directory / "items")
        lost = acknowledged - there
        return f"{len(lost)} acknowledged items lost ({trouble or 'no error was reported'})" if lost else None

    return judge

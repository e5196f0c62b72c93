"""How soon a key shows on the screen, and what the services take while nothing happens.

A finger goes down on the simulated keypad, whose contact bounces; the digit stands when the panel has the new picture.
The simulated bus takes no time, so what the picture would take on I2C at 400 kHz is computed from the pages that
changed, and added. The limit beside it is debounce and bus alone: no terminal can be quicker.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from PIL import Image

from hwsim.device import DeviceClient
from hwsim.world import World
from tests.bench.report import Row, Section, measured

PRESSES: Final = 40
IDLE_S: Final = 10.0
DEBOUNCE_MS: Final = 15.0  # how long a contact must be quiet to be believed (drivers.gpio)
_BUS_HZ: Final = 400_000
_BITS: Final = 9  # a byte on I2C, with its acknowledgement
_OVERHEAD_BYTES: Final = 14  # address, window and control bytes of one picture
_KEY_GOAL_MS: Final = 50
_IDLE_GOAL_PERCENT: Final = 2


def run(place: Path) -> Section:
    """Keys in amount entry, then ten seconds of nothing."""
    with World.create(place / "device", result_hold_ms=0) as world:
        world.start_host()
        world.start_device()
        world.start_terminal()
        world.start_sync()
        key_ms, whole_ms, limit_ms = _keys(world.device)
        world.device.press("cancel")
        time.sleep(2.0)  # back to idle, nothing left to flush
        busy = {name: _idle_percent(world, name) for name in ("terminal", "sync")}
    rows = [
        measured("key to picture, bus without time", key_ms, "ms"),
        measured(
            f"key to screen at 400 kHz (goal {_KEY_GOAL_MS} ms)",
            whole_ms,
            "ms",
            peer=limit_ms,
            against="debounce and bus alone",
        ),
        *(
            Row(f"{name}: processor while idle (goal {_IDLE_GOAL_PERCENT} %)", percent, "% of a core")
            for name, percent in busy.items()
        ),
    ]
    return Section(
        "device",
        "key to screen, and idle",
        rows,
        [
            f"{len(key_ms)} of {PRESSES} presses seen",
            f"idle over {IDLE_S:.0f} s, lamps blinking; Linux counts processor time in ticks of 10 ms",
        ],
    )


def _keys(device: DeviceClient) -> tuple[list[float], list[float], list[float]]:
    """Per press: key to picture, the same with the bus, and debounce with the bus."""
    key_ms, whole_ms, limit_ms = [], [], []
    before = device.pictures()[-1].image
    for number in range(PRESSES):
        began_s = time.monotonic()
        device.press("clear" if number % 2 else "7")
        pictures = device.pictures(wait_ms=1000)
        if not pictures:
            continue  # a press that the machine was too busy to see: not a time, and not hidden, as fewer are counted
        bus_ms = _bus_ms(before, pictures[0].image)
        key_ms.append((pictures[0].at_s - began_s) * 1000)
        whole_ms.append(key_ms[-1] + bus_ms)
        limit_ms.append(DEBOUNCE_MS + bus_ms)
        before = pictures[-1].image
    return key_ms, whole_ms, limit_ms


def _bus_ms(before: Image.Image, after: Image.Image) -> float:
    """What the changed pages of eight rows take on the bus."""
    width, height = after.size
    changed = [
        page
        for page in range(height // 8)
        if before.crop((0, page * 8, width, page * 8 + 8)).tobytes()
        != after.crop((0, page * 8, width, page * 8 + 8)).tobytes()
    ]
    pages = changed[-1] - changed[0] + 1 if changed else 0
    return (pages * width + _OVERHEAD_BYTES) * _BITS / _BUS_HZ * 1000


def _idle_percent(world: World, name: str) -> float:
    """Processor time of a service over a while in which nothing happens."""
    process = world.processes[name].pid
    began, began_s = _ticks(process), time.monotonic()
    time.sleep(IDLE_S)
    return 100 * (_ticks(process) - began) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - began_s)


def _ticks(process: int) -> int:
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])  # utime, stime (proc(5))

"""Power cuts on a real ext4, and what the ledger still has of what it promised (rig: power_cut_rig).

A day at the till is recorded below the file system, write by write; thousands of crash states are made from it, checked
by e2fsck, mounted, recovered, and both copies read by independent code. The same judge must find seven planted faults.
Without root the states come from system calls and a rule for ext4 instead; that a real file system was not used is then
said. A failing state is named by its cut and its recording is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from power_cut_rig import cuts_of, judged, record

from hwsim.sdcard import MODES, Cut, Mode, Tally, campaign, unavailable
from hwsim.sdcard.cuts import BLOCK_BYTES, PAGE_BYTES, Write, land

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

SEED = int(os.environ.get("POWER_CUT_SEED", "20261"))
DAYS = 3
DAY_STATES = 1001  # of each of them: 143 in each mode
STARTS = 4
START_STATES = 70
CALM = (Mode.NONE, Mode.ALL, Mode.PREFIX, Mode.SUBSET, Mode.TORN)


@pytest.fixture(scope="module")
def on_files() -> bool:
    """Whether there is no real file system here."""
    reason = unavailable()
    print(f"\npower cuts {f'by system calls only: {reason}' if reason else 'on ext4'}, POWER_CUT_SEED={SEED}")
    if reason and shutil.which("strace") is None:
        pytest.skip(f"neither a simulated card ({reason}) nor strace")
    return bool(reason)


@pytest.fixture(scope="module")
def days(on_files: bool, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Recordings of the real stack: phases in another order each."""
    directory = tmp_path_factory.mktemp("days")
    for number in range(DAYS):
        record(directory / f"day-{number}", "sell", "--seed", str(SEED + number), on_files=on_files)
    return [directory / f"day-{number}" for number in range(DAYS)]


def kept(tally: Tally, recording: Path) -> None:
    print(tally.table())
    if not tally.lost.total():
        return
    saved = Path(shutil.copy(recording, Path("/var/tmp") / f"payterm-{recording.name}-{SEED}"))  # noqa: S108
    said = "\n".join(f"--cut {verdict.cut}: {verdict.loss}" for verdict in tally.losses)
    pytest.fail(f"{tally.lost.total()} promises broken; recording {saved}, seed {SEED}\n{said}")


@pytest.mark.parametrize("number", range(DAYS))
def test_every_promise_outlives_the_power_cut(days: list[Path], number: int) -> None:
    cuts = cuts_of(days[number], DAY_STATES, SEED + number)
    tally = judged(days[number], cuts)
    assert tally.states.total() + tally.apart.total() == DAY_STATES
    assert all(tally.states[mode] for mode in MODES)
    kept(tally, days[number])


@pytest.mark.parametrize("number", range(STARTS))
def test_the_power_may_fail_again_while_starting(days: list[Path], on_files: bool, tmp_path: Path, number: int) -> None:
    day = days[number % DAYS]
    cut = cuts_of(day, STARTS, SEED + number, CALM)[number]
    start = tmp_path / "start"
    record(start, "recover", "--seed", str(SEED), "--run", "50", on_files=on_files, after=day, cut=cut)
    print(f"the start after {cut}")
    kept(judged(start, cuts_of(start, START_STATES, SEED + number)), start)


def test_without_root(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is missing")
    day = tmp_path / "files"
    record(day, "sell", "--seed", str(SEED), on_files=True)
    kept(judged(day, cuts_of(day, 350, SEED)), day)


@pytest.mark.parametrize(
    ("plant", "modes", "states"),
    [
        ("normal", CALM, 25),  # the log is not flushed with each commit
        ("delete", CALM, 50),  # the rollback journal comes back with a name that was removed but not flushed
        ("psow", (Mode.GARBAGE,), 400),  # commits share a block with the one before
        ("early", CALM, 50),  # the customer is told first
        ("unaligned", (Mode.COLLATERAL,), 50),  # two records in one flash page
        ("nobarrier", CALM, 25),  # the file system does not flush
    ],
)
def test_the_judge_finds_a_planted_fault(
    on_files: bool, tmp_path: Path, plant: str, modes: tuple[Mode, ...], states: int
) -> None:
    mount = plant if plant == "nobarrier" else ""
    if mount and on_files:
        pytest.skip("mount options need a real file system")
    day = tmp_path / plant
    words = () if mount else ("--plant", plant)
    record(day, "sell", "--seed", str(SEED), *words, on_files=on_files, mount=mount)
    tally = judged(day, cuts_of(day, states, SEED, modes), "" if mount else plant)
    print(tally.table())
    for verdict in tally.losses[:3]:
        print(f"{verdict.cut}: {verdict.loss}")
    assert tally.lost.total(), f"{plant} was not found in {states} states"
    assert any("Broken" in (verdict.loss or "") for verdict in tally.losses), "found, but not for what is promised"


# The simulator itself, with programs whose fate is known

PROGRAM = """
import os, sys
card, told = os.environ["SD_CARD"], os.open(os.environ["SD_TOLD"], os.O_WRONLY | os.O_APPEND)
directory = os.open(card, os.O_RDONLY)
for number in range(12):
    new = os.open(f"{card}/new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(new, b"%d" % number * 3000)
    "fsync" in sys.argv and os.fsync(new)
    os.close(new)
    os.rename(f"{card}/new", f"{card}/kept-{number}")
    "directory" in sys.argv and os.fsync(directory)
    os.write(told, b"%d\\n" % number)
"""
CHECKER = """
import os
card = os.environ["SD_CARD"]
for number in open(os.environ["SD_TOLD"]).read().split():
    assert open(f"{card}/kept-{number}").read() == number * 3000, number
"""


@pytest.mark.parametrize("real", [True, False], ids=["ext4", "files"])
@pytest.mark.parametrize(
    ("care", "safe"), [(("fsync", "directory"), True), (("fsync",), False), (("directory",), False), ((), False)]
)
def test_a_file_that_is_replaced(real: bool, care: tuple[str, ...], safe: bool, tmp_path: Path) -> None:
    if real and (reason := unavailable()):
        pytest.skip(reason)
    recording = tmp_path / "recording"
    options = [] if real else ["--files"]
    words = [*options, str(recording), "--", sys.executable, "-c", PROGRAM, *care]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-m", "hwsim.sdcard", "record", *words], env=environment, check=True, timeout=60)
    cuts = cuts_of(recording, 40, SEED, CALM)
    argument = json.dumps([sys.executable, "-c", CHECKER])
    tally = campaign.run(recording, cuts, "hwsim.sdcard.campaign:command_judge", argument, jobs=2)
    assert (tally.lost.total() == 0) == safe


def test_the_same_cut_leaves_the_same() -> None:
    pending = [Write(8192, b"a" * 8192), Write(4096 * 7, b"b" * 4096), Write(100, b"c" * 50)]
    for mode in MODES:
        cut = Cut(7, mode, 99)
        assert Cut.parse(str(cut)) == cut
        assert land(cut, pending) == land(cut, pending)


def test_what_each_mode_may_leave() -> None:
    pending = [Write(BLOCK_BYTES * number, bytes([number]) * BLOCK_BYTES) for number in range(6, 12)]
    seen: dict[Mode, set[tuple[int, ...]]] = {mode: set() for mode in MODES}
    for seed in range(200):
        for mode in MODES:
            landing = land(Cut(1, mode, seed), pending)
            seen[mode].add(tuple(sorted({write.data[0] for write in landing.written})))
            for wreck in landing.destroyed:
                size_bytes = {Mode.GARBAGE: BLOCK_BYTES, Mode.COLLATERAL: PAGE_BYTES}[mode]
                assert (wreck.offset % size_bytes, len(wreck.data)) == (0, size_bytes)
    assert seen[Mode.NONE] == {()}
    assert seen[Mode.ALL] == {(6, 7, 8, 9, 10, 11)}
    assert seen[Mode.PREFIX] == {tuple(range(6, end)) for end in range(6, 13)}
    assert len(seen[Mode.SUBSET]) > 20

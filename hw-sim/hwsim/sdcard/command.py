"""The command: record any program on a simulated card, then cut its power at thousands of moments.

    payterm-sim sdcard record day.card -- python3 program.py
    payterm-sim sdcard cut day.card --states 2000 -- ./check.sh

The program finds the card's directory in SD_CARD; what it promises to anybody it writes to the file
SD_TOLD, a line for each promise, after it believes it to be safe. The checker runs once for each state, after the
file system check: SD_CARD is what the card then holds, SD_TOLD what had been promised; it exits with 0 if every promise
is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hwsim.sdcard import campaign, files, kernel
from hwsim.sdcard.campaign import CampaignFailed, workplace
from hwsim.sdcard.card import CardUnavailable, record, unavailable
from hwsim.sdcard.cuts import MODES, Cut, Mode
from hwsim.sdcard.recording import Recording, choose


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 0 when nothing was lost, 1 for losses, 2 when nothing could be tried."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except (CardUnavailable, CampaignFailed, files.Unfit, OSError, ValueError) as error:
        print(f"sdcard: {error}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None  # noqa: S101 (it is the help, too)
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="payterm-sim sdcard", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    recorder = commands.add_parser("record", help="run a program on a simulated card and write down what it does")
    recorder.set_defaults(run=_record)
    recorder.add_argument("recording", type=Path, help="where to write it")
    recorder.add_argument("--files", action="store_true", help="without root: by system calls, no real file system")
    recorder.add_argument("--mount", default="", metavar="OPTIONS", help="ext4 mount options, such as nobarrier")
    recorder.add_argument("--after", type=Path, metavar="RECORDING", help="begin with what a cut of this one has left")
    recorder.add_argument("--cut", type=Cut.parse, metavar="CUT", help="that cut, as printed: mode:point:seed")
    recorder.add_argument("command", nargs="+", metavar="PROGRAM")

    cutter = commands.add_parser("cut", help="cut the power and check what is left")
    cutter.set_defaults(run=_cut)
    cutter.add_argument("recording", type=Path)
    cutter.add_argument("--states", type=int, default=1000, metavar="N", help="how many (default: %(default)s)")
    cutter.add_argument("--seed", type=int, default=1, metavar="S", help="chooses them (default: %(default)s)")
    cutter.add_argument("--cut", type=Cut.parse, metavar="CUT", help="only this one, as printed: mode:point:seed")
    cutter.add_argument("--modes", default=",".join(MODES), help="default: %(default)s")
    cutter.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="default: %(default)s")
    cutter.add_argument("--python", metavar="MODULE:FUNCTION", help="a checker in Python instead of a program")
    cutter.add_argument("--argument", default="", metavar="TEXT", help="what that function is called with")
    cutter.add_argument("command", nargs="*", metavar="CHECKER")

    shower = commands.add_parser("show", help="what a recording holds")
    shower.set_defaults(run=_show)
    shower.add_argument("recording", type=Path)
    return parser


def _record(options: argparse.Namespace) -> int:
    if (options.after is None) != (options.cut is None):
        raise ValueError("--after and --cut belong together")
    with workplace() as work:
        code = _record_files(options, work) if options.files else _record_card(options, work)
    if code:
        print(f"sdcard: the program ended with {code}; recorded all the same", file=sys.stderr)
    return 1 if code else 0


def _record_card(options: argparse.Namespace, work: Path) -> int:
    if reason := unavailable():
        raise CardUnavailable(f"{reason}: use --files")
    kernel.private_mounts()

    def command(directory: Path, told: Path) -> int:
        environment = os.environ | {"SD_CARD": str(directory), "SD_TOLD": str(told)}
        return subprocess.run(options.command, env=environment, check=False).returncode

    if options.after is None:
        recording, code = record(work, command, mount_options=options.mount)
    else:
        before = Recording.load(options.after)
        told = before.told(options.cut.point)
        blocks = before.state(options.cut).blocks
        recording, code = record(work, command, blocks=blocks, told_before=told, mount_options=options.mount)
    recording.save(options.recording)
    return code


def _record_files(options: argparse.Namespace, work: Path) -> int:
    directory, told = work / "files", work / "told"
    directory.mkdir(mode=0o700)
    told_before = b""
    if options.after is not None:
        before = files.FileRecording.load(options.after)
        files.lay(before.files(options.cut), directory)
        told_before = before.told(options.cut.point)
    environment = os.environ | {"SD_CARD": str(directory), "SD_TOLD": str(told)}
    recording, code = files.record(
        options.command, directory=directory, control=told, log=work / "log", environment=environment
    )
    recording.told_before = told_before
    recording.save(options.recording)
    return code


def _cut(options: argparse.Namespace) -> int:
    if bool(options.command) == bool(options.python):
        raise ValueError("name one checker: a program after --, or --python")
    recording: Recording | files.FileRecording
    if files.FileRecording.is_one(options.recording):
        recording = files.FileRecording.load(options.recording)
    elif reason := unavailable():
        raise CardUnavailable(reason)
    else:
        recording = Recording.load(options.recording)
    modes = [Mode(word) for word in options.modes.split(",")]
    cuts = [options.cut] if options.cut else choose(recording, options.states, options.seed, modes)
    if options.python:
        checker, argument = options.python, options.argument
    else:
        checker, argument = "hwsim.sdcard.campaign:command_judge", json.dumps(options.command)
    started = time.monotonic()
    tally = campaign.run(options.recording, cuts, checker, argument, jobs=options.jobs)
    seconds = time.monotonic() - started
    print(tally.table())
    print(f"seed {options.seed}, {len(cuts)} states in {seconds:.1f} s, {len(cuts) / seconds * 60:.0f} a minute")
    for verdict in (*tally.losses, *tally.remarks):
        print(f"--cut {verdict.cut}: {verdict.loss or verdict.remark}")
    return 1 if tally.lost.total() else 0


def _show(options: argparse.Namespace) -> int:
    if files.FileRecording.is_one(options.recording):
        recording: Recording | files.FileRecording = files.FileRecording.load(options.recording)
    else:
        recording = Recording.load(options.recording)
    kinds = Counter(type(event).__name__ for event in recording.events)
    print(f"{recording.last_point()} events:", ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    for line in recording.told(recording.last_point()).decode("utf-8", "replace").splitlines():
        print("told:", line)
    return 0

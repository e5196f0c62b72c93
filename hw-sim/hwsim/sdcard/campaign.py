"""Many power cuts of one recording: each state is made, switched on and judged by a checker.

A checker is a Python function, named `module:function`. It is called once, with an argument of the caller's, and
returns the judge: given what the power cut left, None when every promise is kept, otherwise what was lost. The judge is
called in a forked process for each state, so that it may open what it likes and need not close anything. States are
shared out over worker processes; a worker imports the checker once, mounts privately, and leaves nothing behind however
it ends.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, Protocol, TypeAlias

from hwsim.sdcard import kernel
from hwsim.sdcard.card import SIZE_BYTES, Card, FileSystemLost
from hwsim.sdcard.cuts import MODES, Cut, Mode
from hwsim.sdcard.files import FileRecording, lay
from hwsim.sdcard.recording import Recording

_JUDGE_S: Final = 60  # one state; a judge that hangs is a loss
_PIPE_BYTES: Final = 65536
_DETAIL_CHARS_MAX: Final = 2000
_WORKER: Final = "import sys; from hwsim.sdcard import campaign; sys.exit(campaign.main())"
_LOSSES_KEPT: Final = 20  # of a campaign; the rest is counted


class Found(NamedTuple):
    """What the next start finds."""

    directory: Path
    told: bytes
    """Everything that the program had told before the cut."""
    cut: Cut


class Remark(str):
    """A judge's word for a state in which every promise is kept, but there is something to say."""

    __slots__ = ()


Judge: TypeAlias = Callable[[Found], str | None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one state. `loss` is None when every promise was kept."""

    cut: Cut
    loss: str | None
    remark: str | None = None
    metadata_destroyed: bool = False


@dataclass(slots=True)
class Tally:
    """Verdicts counted by mode; states whose file system was destroyed stand apart."""

    states: Counter[Mode] = field(default_factory=Counter)
    lost: Counter[Mode] = field(default_factory=Counter)
    apart: Counter[Mode] = field(default_factory=Counter)
    apart_lost: Counter[Mode] = field(default_factory=Counter)
    losses: list[Verdict] = field(default_factory=list)
    remarked: Counter[Mode] = field(default_factory=Counter)
    remarks: list[Verdict] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        mode = verdict.cut.mode
        if verdict.metadata_destroyed:
            self.apart[mode] += 1
            self.apart_lost[mode] += verdict.loss is not None
            return
        self.states[mode] += 1
        if verdict.remark is not None:
            self.remarked[mode] += 1
            if len(self.remarks) < _LOSSES_KEPT:
                self.remarks.append(verdict)
        if verdict.loss is not None:
            self.lost[mode] += 1
            if len(self.losses) < _LOSSES_KEPT:
                self.losses.append(verdict)

    def merge(self, other: Tally) -> None:
        self.states += other.states
        self.lost += other.lost
        self.apart += other.apart
        self.apart_lost += other.apart_lost
        self.losses = (self.losses + other.losses)[:_LOSSES_KEPT]
        self.remarked += other.remarked
        self.remarks = (self.remarks + other.remarks)[:_LOSSES_KEPT]

    def table(self) -> str:
        rows = ["mode          states    lost  remarks   file system destroyed: states, lost"]
        for name, modes in [*((str(mode), [mode]) for mode in MODES), ("all", list(MODES))]:
            counts = [
                sum(counter[mode] for mode in modes)
                for counter in (self.states, self.lost, self.remarked, self.apart, self.apart_lost)
            ]
            rows.append("{:<12}{:>8}{:>8}{:>9}{:>12}{:>8}".format(name, *counts))
        return "\n".join(rows)


def run(recording: Path, cuts: Sequence[Cut], checker: str, argument: str = "", *, jobs: int = 1) -> Tally:
    """Judge all `cuts` of the recording in a file. Raises `CampaignFailed` when a worker breaks off."""
    tally = Tally()
    for verdict in verdicts(recording, cuts, checker, argument, jobs=jobs):
        tally.add(verdict)
    return tally


class CampaignFailed(Exception):
    """A worker could not do its work: nothing is known about the remaining states."""


def verdicts(
    recording: Path, cuts: Sequence[Cut], checker: str, argument: str = "", *, jobs: int = 1
) -> Iterator[Verdict]:
    """As `run`, one by one."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    words = [sys.executable, "-c", _WORKER, str(recording), checker, argument]
    count = 0
    with ExitStack() as stack:
        workers = []
        for job in range(jobs):
            share = stack.enter_context(tempfile.TemporaryFile("w+"))  # a file: no worker waits for another's reader
            share.writelines(f"{cut}\n" for cut in sorted(cuts)[job::jobs])
            share.seek(0)
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            worker = subprocess.Popen(
                words, stdin=share, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
            stack.callback(worker.wait)
            stack.callback(worker.kill)
            workers.append((worker, errors))
        for worker, errors in workers:
            assert worker.stdout is not None  # noqa: S101 (a pipe was asked for)
            with worker.stdout as lines:
                for line in lines:
                    said = json.loads(line)
                    count += 1
                    yield Verdict(**{**said, "cut": Cut.parse(said["cut"])})
            if worker.wait():
                errors.seek(0)
                raise CampaignFailed(f"a worker ended with {worker.returncode}: {errors.read()[-_DETAIL_CHARS_MAX:]}")
    if count != len(cuts):
        raise CampaignFailed(f"{count} of {len(cuts)} states were judged")


class Player(Protocol):
    """Brings back what a cut left."""

    def play(self, cut: Cut, judge: Judge) -> Verdict: ...


class CardPlayer:
    """A block recording: the card is mounted again."""

    def __init__(self, recording: Recording, work: Path) -> None:
        kernel.private_mounts()
        self._recording = recording
        image = work / "card"
        with image.open("wb") as file:
            file.truncate(SIZE_BYTES)
        self._card = Card(image, work / "mounted")

    def play(self, cut: Cut, judge: Judge) -> Verdict:
        state = self._recording.state(cut)
        self._card.load(state.blocks)
        try:
            self._card.check()
            with self._card.mounted() as directory:
                loss = judge(Found(directory, self._recording.told(cut.point), cut))
        except FileSystemLost as error:
            loss = f"the file system is lost: {error}"
        return _verdict(cut, loss, metadata_destroyed=state.metadata_destroyed)


class FilePlayer:
    """A file recording: the files are written anew."""

    def __init__(self, recording: FileRecording, work: Path) -> None:
        self._recording = recording
        self._directory = work / "files"

    def play(self, cut: Cut, judge: Judge) -> Verdict:
        self._directory.mkdir(mode=0o700)
        try:
            lay(self._recording.files(cut), self._directory)
            return _verdict(cut, judge(Found(self._directory, self._recording.told(cut.point), cut)))
        finally:
            shutil.rmtree(self._directory)


def _verdict(cut: Cut, word: str | None, *, metadata_destroyed: bool = False) -> Verdict:
    if isinstance(word, Remark):
        return Verdict(cut, None, str(word), metadata_destroyed)
    return Verdict(cut, word, None, metadata_destroyed)


@contextmanager
def player_of(path: Path) -> Iterator[Player]:
    """What plays this recording."""
    with workplace() as work:
        if FileRecording.is_one(path):
            yield FilePlayer(FileRecording.load(path), work)
        else:
            yield CardPlayer(Recording.load(path), work)


@contextmanager
def workplace() -> Iterator[Path]:
    """A directory in memory, so that flushes cost nothing but what the simulated card makes of them."""
    memory = Path("/dev/shm")  # noqa: S108 (a directory of our own is made in it)
    with tempfile.TemporaryDirectory(prefix="payterm-card-", dir=memory if memory.is_dir() else None) as made:
        yield Path(made)


def forked(judge: Judge, found: Found) -> str | None:
    """The judge's word, from a process of its own that is gone afterwards."""
    out, into = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(out)
            signal.alarm(_JUDGE_S)
            try:
                loss = judge(found)
            except BaseException as error:  # noqa: BLE001 (whatever it is, it is a state that the program cannot take)
                loss = f"{type(error).__name__}: {error}"
            said = json.dumps([isinstance(loss, Remark), None if loss is None else loss[:_DETAIL_CHARS_MAX]])
            os.write(into, said.encode())
            status = 0
        finally:
            os._exit(status)
    os.close(into)
    with open(out, "rb") as pipe:  # noqa: PTH123 (a descriptor)
        said = pipe.read(_PIPE_BYTES).decode()
    _, status = os.waitpid(process, 0)
    if status:
        return f"the judge did not come back (status {status})"
    kept, word = json.loads(said)
    return Remark(word) if kept else word


def judge_of(checker: str, argument: str) -> Judge:
    """The judge that `module:function` makes."""
    module, _, function = checker.partition(":")
    made: Judge = getattr(importlib.import_module(module), function)(argument)
    return made


def command_judge(argument: str) -> Judge:
    """A judge that runs a command (JSON list of words). It is given SD_CARD, SD_TOLD (a file) and SD_CUT."""
    words = json.loads(argument)

    def judge(found: Found) -> str | None:
        with tempfile.NamedTemporaryFile() as told:
            told.write(found.told)
            told.flush()
            environment = os.environ | {
                "SD_CARD": str(found.directory),
                "SD_TOLD": told.name,
                "SD_CUT": str(found.cut),
            }
            done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, errors="replace")
        return None if done.returncode == 0 else (done.stdout + done.stderr).strip() or f"exit code {done.returncode}"

    return judge


def work(recording: Path, checker: str, argument: str, cuts: Iterable[Cut]) -> None:
    """What a worker does: one line of JSON for each cut."""
    judge = judge_of(checker, argument)
    with player_of(recording) as player:
        for cut in cuts:
            verdict = player.play(cut, lambda found: forked(judge, found))
            print(json.dumps(asdict(verdict) | {"cut": str(cut)}), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of a worker."""
    parser = argparse.ArgumentParser(prog="worker")
    parser.add_argument("recording", type=Path)
    parser.add_argument("checker")
    parser.add_argument("argument")
    options = parser.parse_args(arguments)
    work(options.recording, options.checker, options.argument, [Cut.parse(line.strip()) for line in sys.stdin])
    return 0

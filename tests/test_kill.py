"""kill -9 of either service at every commit point of a sale, by strace on the running process.

The services carry no hooks for this: strace attaches to the running one and delivers SIGKILL at the n-th call of a
kind in whatever thread makes it, for n from 1 until a sale comes through alive. After each kill the service is started
again, a person keeps what was never shown, everything is sent, and then three things must hold: what the panel or the
register called approved is sold, ledger and host agree to the cent, and nothing is booked twice.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pytest
from PIL import Image

from hwsim import books
from hwsim.cards.profile import CardProfile
from hwsim.faults import Fault
from hwsim.world import CARD, World, WorldError
from terminal.control import CallRefused, TerminalUnavailable
from terminal.money import EUR, Amount
from terminal.ui import screens

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

# Of the many writes of a sale every third, another third each day: a point takes three seconds. All: KILL_SWEEP=all.
STRIDE = 1 if os.environ.get("KILL_SWEEP") == "all" else 3
FIRST = 1 + date.today().toordinal() % STRIDE  # noqa: DTZ011 (whichever day it is)
POINTS_MAX = 80  # an online sale makes about 40 calls of the busiest kind; more would be a loop
SOLD = {"approved", "accepted", "settled"}


class PromiseBroken(AssertionError):
    """One of the three promises does not hold."""


@pytest.fixture
def world() -> Iterator[World]:
    with (
        tempfile.TemporaryDirectory(prefix="payterm-") as directory,
        World.create(Path(directory), result_hold_ms=0, authorisation_timeout_ms=4000) as made,
    ):
        made.start_host()
        made.start_device()
        made.start_terminal()
        made.start_sync()
        assert made.tap(Amount(100, EUR))["state"] == "approved"  # warm: both services know each other
        yield made


def threads(world: World, part: str, which: str) -> list[str]:
    """The main thread of a service, or the others: those that serve calls. Each counts its calls by itself."""
    process = world.processes[part].pid
    tasks = [task.name for task in Path(f"/proc/{process}/task").iterdir()]
    return [task for task in tasks if (task == str(process)) == (which == "main")]


@contextlib.contextmanager
def killed_at(world: World, part: str, which: str, call: str, number: int) -> Iterator[None]:
    """While the block runs, SIGKILL to `part` as one of these threads enters its n-th `call`."""
    strace = shutil.which("strace")
    assert strace is not None, "strace is missing: run make, which installs it"
    attached = subprocess.Popen(
        [
            *(strace, "-o", "/dev/null", "-e", f"trace={call}"),
            *("-e", f"inject={call}:signal=SIGKILL:when={number}"),
            *(word for task in threads(world, part, which) for word in ("-p", task)),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert attached.stderr is not None
    line = attached.stderr.readline()
    if "attached" not in line:
        attached.kill()
        pytest.skip(f"strace cannot attach here ({line.strip()}): allow ptrace (kernel.yama.ptrace_scope=0) or be root")
    try:
        yield
    finally:
        attached.terminate()
        attached.communicate()


@dataclass(slots=True)
class Seen:
    """What a customer and a register were told of a sale."""

    panel: bool
    register: bool


def attempt(world: World, reference: str, amount: Amount) -> Seen:
    """One sale that may die at any moment; what was said of it until then."""
    world.device.pictures()
    told = ""
    with contextlib.suppress(TerminalUnavailable, CallRefused, WorldError):
        sale = world.sell(amount, reference)
        world.device.present(CARD)
        told = str(world.result(sale, timeout_s=8)["state"])
    time.sleep(0.05)
    shown = {picture.image.tobytes() for picture in world.device.pictures()}
    world.device.remove()
    return Seen(panel=bool(shown & good_news(world, amount)), register=told in SOLD)


def good_news(world: World, amount: Amount) -> set[bytes]:
    """The pictures that tell a customer that the sale is made."""
    card = CardProfile.load(world.directory / "device" / "cards" / f"{CARD}.json")
    found: list[Image.Image] = [
        screens.render(kind(amount, "Visa", card.pan.digits[-4:]), "en")
        for kind in (screens.Approved, screens.AcceptedOffline)
    ]
    return {picture.tobytes() for picture in found}


def survive(world: World, part: str, reference: str, amount: Amount, seen: Seen) -> bool:
    """Start again what was killed, let everything settle, check the promises. False when nothing was killed."""
    killed = world.processes[part].poll() is not None
    if killed:
        world.kill(part)
        world.start_terminal() if part == "terminal" else world.start_sync()
    world.wait(lambda: world.status()["trouble"] is None or None, "the storage to be well again", timeout_s=30)
    for sale in world.status()["attention"]:
        world.call("attention.resolve", transaction=sale["id"], keep=True)
    world.wait(lambda: not world.status()["attention"] or None, "the decisions to be taken")
    world.network(Fault.PASS)
    world.wait(lambda: not world.status()["busy"] or None, "the device to be free", timeout_s=30)
    world.wait(lambda: world.status()["unsent"]["count"] == 0 or None, "everything to be sent", timeout_s=30)
    # A report comes over the connection that answers come over: only a thread that is there can be killed in its work.
    world.wait(lambda: world.status()["link"]["online"] or None, "sync to report")
    sales = world.ledger()
    if found := books.differences(sales, world.bookings()):
        raise PromiseBroken("; ".join(found))
    state = next((sale["state"] for sale in sales if sale["reference"] == reference), "unknown")
    if (seen.panel or seen.register) and state not in SOLD:
        raise PromiseBroken(
            f"{amount} was called approved (panel {seen.panel}, register {seen.register}), but is {state}"
        )
    return killed


def sweep(world: World, part: str, which: str, call: str, *, offline: bool = False) -> int:
    """Kill at every point (of writes, at some); how many there were."""
    first, stride = (FIRST, STRIDE) if call == "pwrite64" else (1, 1)
    print(f"SIGKILL at {call} number {first}, {first + stride}, ...")
    for number in range(first, POINTS_MAX, stride):
        if offline:
            world.network(Fault.REFUSE)
        amount = Amount(2_000 + number % 50, EUR) if number % 50 != 5 else Amount(2_099, EUR)
        reference = f"{part}-{which}-{call}-{number}"
        with killed_at(world, part, which, call, number):
            seen = attempt(world, reference, amount)
        if not survive(world, part, reference, amount, seen):
            return number - 1
    raise AssertionError(f"{POINTS_MAX} {call} calls in one sale: something loops")


@pytest.mark.parametrize("call", ["fdatasync", "pwrite64"])
@pytest.mark.parametrize(("which", "offline"), [("main", False), ("main", True), ("serving", False)])
def test_the_terminal_killed_at_every_commit_point(world: World, which: str, offline: bool, call: str) -> None:
    assert sweep(world, "terminal", which, call, offline=offline) >= 2


@pytest.mark.parametrize("call", ["fdatasync", "pwrite64", "sendto"])
def test_sync_killed_at_every_commit_point(world: World, call: str) -> None:
    assert sweep(world, "sync", "main", call) >= 1


def test_a_terminal_that_shows_before_it_commits_is_caught(world: World) -> None:
    """The negative control: the same sweep over a terminal with that bug planted breaks the first promise."""
    world.stop("terminal")
    world.modules["terminal"] = "tests.planted_show_first"
    world.start_terminal()
    with pytest.raises(PromiseBroken, match="was called approved"):
        sweep(world, "terminal", "main", "fdatasync")

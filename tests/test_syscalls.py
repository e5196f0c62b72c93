"""The n-th system call of a kind on the ledger's files fails, or is the last one: nothing shown is ever lost.

Tapped cards: strace runs `payterm-sim sales` (`tests.syscalls_rig`) with one call refused (ENOSPC, EIO, EROFS) or
answered with SIGKILL. Inserted cards, where host and card each have a word, need the whole installation: strace
attaches to its terminal as in `test_kill`, whose checks then apply. Here a stride is taken, which is printed;
`python -m tests.soak.syscalls` takes every point.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hwsim.device import DeviceClient
from hwsim.world import CARD, World, WorldError
from terminal.control import CallRefused, TerminalUnavailable
from terminal.money import EUR, Amount
from terminal.ui import screens
from tests import syscalls_rig as rig
from tests.test_kill import SOLD, Seen, good_news, survive, threads

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

POINTS = 2  # of each kind: a point takes two seconds, and there are hundreds
POINTS_MAX = 200  # an inserted sale makes some 70 writes, with what is flushed afterwards: more would be a loop
ENDS_S = 10.0  # a terminal whose storage failed has ended, or works again, by then


@pytest.fixture(scope="module", params=["made", "new"])
def base(request: pytest.FixtureRequest) -> Iterator[tuple[Path, dict[str, rig.Calls]]]:
    """A ledger in use, and one that is only just being made."""
    with rig.state(made=request.param == "made") as path:
        yield path, rig.calls(path)


@pytest.mark.parametrize("kind", rig.KINDS)
def test_a_call_that_fails_or_is_the_last(base: tuple[Path, dict[str, rig.Calls]], kind: str) -> None:
    path, calls = base
    if kind not in calls:
        pytest.skip(f"no {kind} on the ledger's files")
    points, stride = rig.spread(calls[kind].points(), POINTS)
    reached = rig.sweep(path, kind, points)
    print(f"{kind}: {reached} of {len(points)} points, every {stride}th of {len(calls[kind].points())}")
    assert reached >= len(points) - 1


@pytest.mark.parametrize("kind", ["pwrite64", "fdatasync"])
def test_a_call_of_a_sale(base: tuple[Path, dict[str, rig.Calls]], kind: str) -> None:
    path, calls = base
    points, stride = rig.spread(calls[kind].points_in_sales(), POINTS)
    reached = rig.sweep(path, kind, points)
    print(f"{kind}: {reached} of {len(points)} points, every {stride}th of {len(calls[kind].points_in_sales())}")
    assert reached >= len(points) - 1


def test_a_terminal_that_shows_before_it_commits_is_caught() -> None:
    with rig.state(made=True) as path:
        early = rig.calls(path)["pwrite64"].points_in_sales([rig.KILL])[:6]  # what the journal takes of a sale
        with pytest.raises(rig.PromiseBroken, match="shown as approved, but not in the ledger"):
            rig.sweep(path, "pwrite64", early, plant="tests.planted_show_first")


def test_a_terminal_that_stumbles_over_a_storage_error_is_caught() -> None:
    with rig.state(made=True) as path:
        early = rig.calls(path)["pwrite64"].points_in_sales(["error=EIO"])[:6]
        with pytest.raises(rig.PromiseBroken, match=r"no word that helps|says that all is well"):
            rig.sweep(path, "pwrite64", early, plant="tests.planted_stumble")


# Inserted cards


@pytest.fixture
def shop() -> Iterator[World]:
    with (
        tempfile.TemporaryDirectory(prefix="payterm-") as directory,
        World.create(Path(directory), result_hold_ms=0, authorisation_timeout_ms=4000) as made,
    ):
        made.start_host()
        made.start_device()
        made.start_terminal()
        made.start_sync()
        assert made.tap(Amount(100, EUR), insert=True)["state"] == "approved"  # warm, and there is a contact reader
        yield made


@contextlib.contextmanager
def disturbed(world: World, which: str, call: str, fault: str, number: int) -> Iterator[Path]:
    """While the block runs, the n-th `call` of one of these threads of the terminal meets `fault`; strace's log."""
    log = world.directory / "log" / "strace"
    strace = shutil.which("strace")
    assert strace is not None, "strace is missing: run make, which installs it"
    attached = subprocess.Popen(
        [
            *(strace, "-o", str(log), "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={number}"),
            *(word for task in threads(world, "terminal", which) for word in ("-p", task)),
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
        yield log
    finally:
        attached.terminate()
        attached.communicate()


def insert(world: World, reference: str, amount: Amount) -> Seen:
    """One sale with an inserted card that may die at any moment; what was said of it until then."""
    world.device.pictures()
    told = ""
    with contextlib.suppress(TerminalUnavailable, CallRefused, WorldError):
        sale = world.sell(amount, reference)
        world.device.present(CARD, insert=True)
        told = str(world.result(sale, timeout_s=8)["state"])
    time.sleep(0.05)
    shown = {picture.image.tobytes() for picture in world.device.pictures()}
    world.device.remove()
    return Seen(panel=bool(shown & good_news(world, amount)), register=told in SOLD)


def settle(world: World) -> None:
    """Wait until the terminal has either ended by itself or answers again, as it must after any storage error."""
    deadline_s = time.monotonic() + ENDS_S
    while world.processes["terminal"].poll() is None:
        with contextlib.suppress(TerminalUnavailable, CallRefused):
            world.status()
            return
        assert time.monotonic() < deadline_s, "the terminal neither ends nor answers"
        time.sleep(0.02)


def one_insertion(world: World, which: str, call: str, fault: str, number: int) -> tuple[bool, dict[str, object]]:
    """One point: whether it was reached, and what became of the sale in the end."""
    amount = Amount(2_000 + 100 * (number % 20) + number % 5, EUR)
    reference = f"inserted-{which}-{call}-{number}"
    with disturbed(world, which, call, fault, number) as log:
        seen = insert(world, reference, amount)
        settle(world)
    ended = world.processes["terminal"].poll() is not None
    if ended and fault != rig.KILL:
        assert last_picture(world) == screens.render(screens.Error("ledger"), "en").tobytes(), "ended without a word"
    survive(world, "terminal", reference, amount, seen)
    sale = next((sale for sale in world.ledger() if sale["reference"] == reference), {})
    return (ended if fault == rig.KILL else "INJECTED" in log.read_text(encoding="utf-8")), sale


def last_picture(world: World) -> bytes:
    """What stands on the panel now."""
    with contextlib.closing(DeviceClient(world.directory / "device")) as device:
        return device.pictures()[-1].image.tobytes()


def insertions(world: World, which: str, call: str, fault: str, stride: int) -> list[dict[str, object]]:
    """Every stride-th point until a sale comes through undisturbed; the sales that were disturbed."""
    found = []
    for number in range(1, POINTS_MAX, stride):
        reached, sale = one_insertion(world, which, call, fault, number)
        if not reached:
            return found
        found.append(sale)
    raise AssertionError(f"{POINTS_MAX} {call} calls in one sale: something loops")


@pytest.mark.parametrize(
    ("which", "call", "fault", "stride"),
    [
        ("main", "fdatasync", rig.KILL, 1),
        ("main", "pwrite64", rig.KILL, 11),
        ("main", "fdatasync", "error=EIO", 1),
        ("main", "pwrite64", "error=ENOSPC", 13),
        ("serving", "fdatasync", rig.KILL, 1),
        ("serving", "pwrite64", "error=EROFS", 17),
    ],
)
def test_an_inserted_card(shop: World, which: str, call: str, fault: str, stride: int) -> None:
    sales = insertions(shop, which, call, fault, stride)
    # Only an approval brings the code: such a sale was cut off while the card's last word was missing.
    completing = [sale for sale in sales if sale["state"] == "reversed" and sale["authorisation_code"]]
    print(f"{fault} at {which} {call}: {len(sales)} points, every {stride}th; {len(completing)} while completing")
    assert sales
    assert completing or which == "main"

"""A demonstration that plays by itself: good and bad moments of one terminal, and books that balance at the end.

Real services as processes, simulated hardware, a real TLS host. Each scene says what it does, shows what the panel
shows, and checks what became of the money; the exit code is 0 only if every scene held and ledger and host agree to
the cent.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from hwsim import books
from hwsim.console import draw
from hwsim.device import DeviceClient
from hwsim.faults import Fault
from hwsim.host import controls
from hwsim.world import CARD, World, WorldError
from terminal.money import EUR, Amount

DRAIN_S: Final = 20.0  # how long the queue may take once the network is back
LOOK_S: Final = 1.2  # how long a result stands before the next thing happens: people watch
SUCCESS_HZ: Final = 1500.0
_SCALE: Final = 6  # screens are saved so many times larger, for eyes


class DemoFailed(Exception):
    """A step did not end as it must; the message says which expectation was missed."""


@dataclass(slots=True)
class Step:
    """One line of the account."""

    title: str
    started_s: float
    took_s: float = 0.0
    result: str = ""


@dataclass(slots=True)
class Account:
    """What happened, for `--json`."""

    balanced: bool = False
    took_s: float = 0.0
    steps: list[Step] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    ledger: list[dict[str, Any]] = field(default_factory=list)
    host: list[dict[str, Any]] = field(default_factory=list)


class Stage:
    """The console: headings, pictures, times. Keeps every picture as PNG, too."""

    def __init__(self, world: World, screens: Path) -> None:
        self.console = Console(highlight=False)
        self.account = Account()
        self._world = world
        self.screens_directory = screens
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._panel = threading.Thread(target=self._watch, name="panel", daemon=True)
        shutil.rmtree(screens, ignore_errors=True)
        screens.mkdir(parents=True)

    def watch(self) -> None:
        """From now on, draw what the panel shows."""
        self._panel.start()

    def close(self) -> None:
        self._stop.set()
        if self._panel.is_alive():
            self._panel.join()
        self.account.took_s = self.clock()

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """One step of the play."""
        step = Step(title, self.clock())
        self.account.steps.append(step)
        self.console.print(f"\n[bold cyan]{step.started_s:5.1f} s[/bold cyan]  [bold]{title}[/bold]")
        yield step
        step.took_s = round(self.clock() - step.started_s, 3)
        time.sleep(0.3)  # let the last picture be drawn above the verdict
        self.console.print(f"         [green]✓[/green] {step.result}")

    def clock(self) -> float:
        return round(time.monotonic() - self._began, 3)

    def _watch(self) -> None:
        """Each picture once: as PNG, and on the console."""
        with contextlib.closing(DeviceClient(self._world.directory / "device")) as device:
            while not self._stop.is_set():
                for picture in device.pictures(wait_ms=200):
                    large = picture.image.resize((128 * _SCALE, 64 * _SCALE), resample=0)
                    large.save(self.screens_directory / f"{picture.number:03d}.png")
                    if picture.image.getbbox():  # a dark panel says nothing
                        self.console.print(draw(picture.image), markup=False)


def main(*, screens: Path, json_file: Path | None) -> int:
    """Play, return the exit code."""
    directory = Path(tempfile.mkdtemp(prefix="payterm-demo-"))
    try:
        with World.create(directory, authorisation_timeout_ms=8000, result_hold_ms=500) as world:
            stage = Stage(world, screens)
            try:
                _play(world, stage)
                _reckon(world, stage)
            except (DemoFailed, WorldError) as failed:
                logs = shutil.copytree(directory / "log", screens.parent / "log", dirs_exist_ok=True)
                stage.console.print(f"\n[bold red]✗ {failed}[/bold red]\n  the logs are in {logs}")
            finally:
                stage.close()
            if json_file is not None:
                json_file.write_text(json.dumps(asdict(stage.account), indent=2) + "\n", encoding="utf-8")
            return 0 if stage.account.balanced else 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _play(world: World, stage: Stage) -> None:
    for title, scene in SCENES:
        with stage.step(title) as step:
            step.result = scene(world, stage)


def _start(world: World, stage: Stage) -> str:
    world.start_host()
    world.start_device()
    stage.watch()
    world.start_terminal()
    world.start_sync()
    return "ready to sell"


def _approved_online(world: World, _: Stage) -> str:
    time.sleep(LOOK_S)
    world.device.press("1", "2", "5", "0")
    time.sleep(LOOK_S)
    world.device.press("enter")
    time.sleep(LOOK_S)
    world.device.present(CARD)
    world.wait(lambda: [sale for sale in world.ledger() if sale["state"] == "approved"] or None, "the approval")
    time.sleep(LOOK_S)
    _expect(any(sound["frequency_hz"] == SUCCESS_HZ for sound in world.device.lights()["sounds"]), "the tone sounds")
    _take_away(world)
    return "12.50 EUR typed on the keypad, tapped, approved online, booked at the host; the success tone has sounded"


def _inserted(world: World, _: Stage) -> str:
    sale = _sell(world, 1890, "approved", card="mastercard-debit", insert=True)
    return f"18.90 EUR: the chip checked the host's cryptogram (ARPC) and gave its second one; sale {sale[:8]}"


def _pulled_too_early(world: World, _: Stage) -> str:
    sale = world.sell(Amount(560, EUR))
    time.sleep(LOOK_S)
    world.device.present(CARD, pulled_after_apdu=3)
    time.sleep(LOOK_S)
    _expect(world.state(sale) == "opened", "nothing was decided with a card that left")
    world.device.present(CARD)
    _expect(world.result(sale)["state"] == "approved", "the second try of the same sale is approved")
    time.sleep(LOOK_S)
    _take_away(world)
    return "5.60 EUR: try again, then approved; one sale, one booking"


def _two_cards(world: World, _: Stage) -> str:
    sale = world.sell(Amount(440, EUR))
    world.device.present(CARD)
    world.device.present("mastercard-debit")
    time.sleep(LOOK_S)
    _expect(world.state(sale) == "opened", "no card is charged while two are there")
    world.device.remove()
    time.sleep(0.5)
    world.device.present("mastercard-debit")
    _expect(world.result(sale)["state"] == "approved", "one card alone is approved")
    time.sleep(LOOK_S)
    _take_away(world)
    return "4.40 EUR: one card only, please; then approved"


def _accepted_offline(world: World, _: Stage) -> str:
    world.network(Fault.REFUSE)
    _sell(world, 720, "accepted")
    return "7.20 EUR accepted offline: within limits, the card proved itself (fDDA), sealed and queued"


def _killed_while_reading(world: World, _: Stage) -> str:
    world.sell(Amount(3000, EUR))
    world.device.present(CARD, slow=True)
    time.sleep(0.8)
    world.kill("terminal")
    world.device.remove()
    time.sleep(LOOK_S)
    return "the process is dead; the panel still shows what it showed"


def _recovered(world: World, _: Stage) -> str:
    world.start_terminal()
    states = [(sale["amount_minor"], sale["state"]) for sale in world.ledger()]
    _expect((3000, "void") in states, "the sale that was killed before its commit is void")
    _expect((720, "accepted") in states, "the sale that was accepted offline is still there")
    return "the killed sale is void, the offline sale is still there"


def _drained(world: World, _: Stage) -> str:
    world.network(Fault.PASS)
    world.wait(lambda: world.status()["unsent"]["count"] == 0 or None, "the queue to drain", timeout_s=DRAIN_S)
    return "the queue has drained by itself"


def _answer_lost(world: World, _: Stage) -> str:
    world.misbehave(controls.LoseAnswer())
    sale = _sell(world, 990, "approved")
    received = next(entry["received"] for entry in world.bookings() if entry["transaction"] == sale)
    _expect(received == 2, f"the host received the sale twice, not {received} times")
    return "9.90 EUR sent again under the same key: received twice, booked once, approved"


def _killed_while_authorising(world: World, _: Stage) -> str:
    world.misbehave(controls.Delay(3000))
    sale = world.sell(Amount(4000, EUR))
    world.device.present(CARD)
    world.wait(lambda: sale in {entry["transaction"] for entry in world.bookings()} or None, "the host to book")
    world.kill("terminal")
    world.device.remove()
    time.sleep(LOOK_S)
    world.start_terminal()
    world.wait(lambda: world.state(sale) == "reversed" or None, "the reversal", timeout_s=DRAIN_S)
    time.sleep(LOOK_S)
    return "40.00 EUR taken back: recovery queued a reversal, and the host has reversed its booking"


SCENES: Final[tuple[tuple[str, Callable[[World, Stage], str]], ...]] = (
    ("Four processes start: the host, the device, the terminal, its upload service", _start),
    ("An amount is typed, a card is tapped, the host approves", _approved_online),
    ("A card is inserted; host and chip prove themselves to each other", _inserted),
    ("A card is pulled too early", _pulled_too_early),
    ("Two cards at once", _two_cards),
    ("The network is cut, and the next customer pays", _accepted_offline),
    ("kill -9 of the terminal in the middle of a sale, while a slow card is read", _killed_while_reading),
    ("It starts again; recovery brings journal and ledger together", _recovered),
    ("The network is back", _drained),
    ("The host books a sale, but its answer is lost on the way back", _answer_lost),
    ("kill -9 while the host decides: it books, but no customer sees an answer", _killed_while_authorising),
)


def _sell(world: World, minor: int, state: str, *, card: str = CARD, insert: bool = False) -> str:
    """One sale from request to removed card, and what it must end in; the sale's id."""
    time.sleep(LOOK_S)
    sale = world.sell(Amount(minor, EUR))
    time.sleep(LOOK_S)
    world.device.present(card, insert=insert)
    result = world.result(sale)
    _expect(result["state"] == state, f"{Amount(minor, EUR)} is {state}, not {result['state']} ({result['reason']})")
    time.sleep(LOOK_S)
    _take_away(world)
    return sale


def _take_away(world: World) -> None:
    world.device.remove()
    world.wait(lambda: not world.status()["busy"] or None, "the device to be free")


def _reckon(world: World, stage: Stage) -> None:
    """Ledger against host, a line each."""
    account = stage.account
    account.ledger, account.host = sorted(world.ledger(), key=lambda sale: sale["sequence"]), world.bookings()
    account.differences = books.differences(account.ledger, account.host)
    booked = {entry["transaction"]: entry for entry in account.host}
    table = Table(title="\nThe books", title_justify="left", title_style="bold", header_style="bold")
    for heading in ("sale", "amount", "terminal", "host", "received", "code"):
        table.add_column(heading, justify="right" if heading in {"sale", "amount", "received"} else "left")
    for sale in account.ledger:
        entry = booked.get(sale["id"], {})
        table.add_row(
            str(sale["sequence"]),
            f"{Amount(sale['amount_minor'], EUR)}",
            sale["state"],
            entry.get("state", "—"),
            str(entry.get("received", "—")),
            entry.get("authorisation_code") or "—",
        )
    stage.console.print(table)
    sold = sum(sale["amount_minor"] for sale in account.ledger if sale["state"] in books.SOLD)
    credited = sum(entry["amount"] for entry in account.host if entry["state"] == "booked")
    account.balanced = not account.differences and sold == credited
    for difference in account.differences:
        stage.console.print(f"[bold red]✗ {difference}[/bold red]")
    if account.balanced:
        stage.console.print(
            f"[bold green]✓ the books balance: {Amount(sold, EUR)} sold, and booked once each[/bold green]"
        )
    stage.console.print(f"  every screen is in {stage.screens_directory}")


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise DemoFailed(f"expected that {what}")

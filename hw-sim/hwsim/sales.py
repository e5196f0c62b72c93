"""Sale after sale in one process, and an acknowledgement for each that a customer was shown: what crash tests cut off.

The real flow on the real drivers: nfcpy over the emulated PN532, luma over the simulated panel, a card that comes and
goes without anybody waiting. There is no network, so each sale is accepted offline. A line

    ack SEQUENCE UUID AMOUNT_MINOR CURRENCY

is written at the moment at which the panel shows the approval, and not before: the picture is the witness. Whatever
becomes of this process then, the ledger must hold that sale.

The state directory holds what is needed to read the ledger again, durable before the first sale, with relative paths,
so that its image may be mounted anywhere. It holds no socket and no pseudo-terminal. The card is the same in each run
and counts from its beginning again: no host would believe it twice, and none is asked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec

from hwsim.cards.bureau import Bureau
from hwsim.cards.card import Card
from hwsim.cards.iso14443 import ProximityCard
from hwsim.cards.personalise import personalise
from hwsim.cards.profile import CardProfile
from hwsim.console import draw
from hwsim.host import keys as host_keys
from hwsim.pn532 import Pn532
from hwsim.ssd1306 import Ssd1306, serve_bus
from terminal import app, cli
from terminal.clock import SystemClock, system_entropy
from terminal.config import Config, SocketSection, load
from terminal.control import CallRefused, ControlClient, TerminalUnavailable
from terminal.errors import TerminalError
from terminal.ledger.keys import HOST_ANSWER_KEY, HOST_SEALING_KEY, generate
from terminal.money import EUR, Amount
from terminal.ui import screens

EXIT_NOT_MADE: Final = 1
EXIT_STATE: Final = 2
MADE: Final = frozenset({"approved", "accepted", "settled"})
FAILED_MAX: Final = 10  # sales in a row that nobody was shown: more is no passing trouble
SALE_S: Final = 30.0  # from request to result; a slow machine under a tracer takes 2
PICTURE_S: Final = 5.0  # from the register's word to the picture, which stands there already unless the machine is busy
_POLL_S: Final = 0.002  # how soon a sale follows when the card has left
_LONG_POLL_MS: Final = 1_000
_BUS_S: Final = 0.2  # the last picture may still be on its way to the panel

_SLOTS_OF_A_SALE: Final = 8  # OPEN CARD OUTCOME SHOWN, and the room kept for an answer and a reversal
_SLOTS_KEPT: Final = 128  # events, and the sale that is running
_SLOTS_OF_A_MIB: Final = 64
_JOURNAL_MIB_MIN: Final = 8  # soon written

_CONFIG_NAME: Final = "payterm.toml"
_CARD_NAME: Final = "card.json"
_CONFIG: Final = """\
# Made by payterm-sim sales. Paths are relative to this file.
[terminal]
id = "T-SALES"
merchant = "M-0001"
country = 276
currency = "EUR"

[ledger]
directory = "ledger"
keys = "keys/terminal"
journal_mib = {journal_mib}

[sale]
result_hold_ms = 0

[limits.EUR]
transaction = "500.00"
offline_transaction = "40.00"
offline_sum = "999999.99"
offline_count = 100000
offline_age_hours = 8760

[host]
url = "https://host.invalid"
sealing_fingerprint = "{sealing}"
answer_fingerprint = "{answer}"

[sync]
directory = "sync"
keys = "keys/sync"
socket = "sync.sock"

[[ca_keys]]
{ca_key}
"""


def add_parser(commands: Any) -> None:
    """The command line of `payterm-sim sales`."""
    text = "take sales one after the other and write a line for each that was shown; what crash tests cut off"
    made = commands.add_parser("sales", help=text, description=text)
    made.add_argument("--state", type=Path, required=True, metavar="DIR", help="made when absent, else taken up again")
    made.add_argument("--count", type=int, required=True, metavar="N", help="how many sales")
    made.add_argument("--ack", type=Path, required=True, metavar="FILE", help="a file, a pipe or /dev/stdout")
    made.add_argument("--journal-mib", type=int, metavar="M", help="of a new ledger (default: room for these sales)")
    made.set_defaults(command=_command)


def _command(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    return run(options.state, options.count, options.ack, options.journal_mib)


def run(state: Path, count: int, ack: Path, journal_mib: int | None) -> int:
    """Take `count` sales, then say how many a second; the exit code is 0 when each of them was shown and acknowledged.

    Where the terminal ends by itself, its message and the last picture on its panel go to stderr, and its exit code is
    ours.
    """
    # The composition root imports this module for its command line: only when it runs is there no circle.
    from hwsim.__main__ import hardware

    state = state.absolute()
    if not state_config(state).exists():
        try:
            provision(state, journal_mib or _journal_mib(count))
        except FileExistsError as there:
            print(f"payterm-sim: {there}", file=sys.stderr)
            return EXIT_STATE
    config, profile = load_state(state), CardProfile.load(state / _CARD_NAME)
    acknowledgements = os.open(ack, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with tempfile.TemporaryDirectory(prefix="payterm-sales-") as directory, cli.stop_on_signals() as stop:
        place = Path(directory)
        config = msgspec.structs.replace(config, socket=SocketSection(path=place / "terminal.sock"))
        panel = Witness(acknowledgements, profile.pan.digits[-4:])
        customer = Customer(config, panel, Card(profile, system_entropy), count, stop)
        with _device(place, panel) as reader:
            # No lamps, no keypad: nobody looks at them here.
            built = replace(hardware(place)(config), keypad=None, lamps=None, buzzer=None)
            began_s = time.monotonic()
            customer.start(reader)
            try:
                app.run(config, built, clock=SystemClock(), entropy=system_entropy, stop=stop)
            except TerminalError as error:
                print(f"payterm-sim: {error}", file=sys.stderr)
                time.sleep(_BUS_S)
                print(draw(panel.picture(), columns=80, encoding="utf-8"), file=sys.stderr)
                return error.exit_code
            finally:
                customer.join()
                os.close(acknowledgements)
    if customer.made:
        took_s = customer.last_s - began_s
        speed = f"in {took_s:.2f} s, the start among them: {customer.made / took_s:.1f} a second"
        print(f"{customer.made} of {count} sales {speed}", file=sys.stderr)
    if customer.trouble:
        print(f"payterm-sim: {customer.trouble}", file=sys.stderr)
    return 0 if customer.made == count else EXIT_NOT_MADE


def state_config(state: Path) -> Path:
    """The configuration of the ledger in a state directory."""
    return state / _CONFIG_NAME


def load_state(state: Path) -> Config:
    """That configuration, with paths that hold from here. Raises `ConfigError`."""
    config = load(state_config(state))
    ledger, sync = config.ledger, config.sync
    return msgspec.structs.replace(
        config,
        ledger=msgspec.structs.replace(ledger, directory=state / ledger.directory, keys=state / (ledger.keys or "")),
        sync=msgspec.structs.replace(sync, directory=state / sync.directory, keys=state / (sync.keys or "")),
    )


def provision(state: Path, journal_mib: int) -> None:
    """Keys, card and configuration, durable on return; the configuration comes last, so without it nothing counts.

    Raises `FileExistsError` where there is a ledger though there is no configuration.
    """
    if (state / "ledger").exists() and any((state / "ledger").iterdir()):
        raise FileExistsError(f"{state} holds a ledger but no {_CONFIG_NAME}: nothing was touched, name another")
    new = [each for each in (state, *state.parents) if not each.exists()]
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    for leftover in ("keys", "host"):
        shutil.rmtree(state / leftover, ignore_errors=True)  # of a run that was cut off before its first sale
    keys = state / "keys" / "terminal"
    generate(keys, system_entropy)
    host_keys.make(state / "host", system_entropy)
    public = state / "host" / "public"
    for name in (HOST_SEALING_KEY, HOST_ANSWER_KEY):
        shutil.copy(public / name, keys / name)
    bureau = Bureau.create(system_entropy)
    personalise(bureau, system_entropy).save(state / _CARD_NAME)
    (state / "ledger").mkdir(mode=0o700, exist_ok=True)
    fingerprints = json.loads((public / "fingerprints.json").read_text(encoding="utf-8"))
    unfinished = state / f"{_CONFIG_NAME}.new"
    unfinished.write_text(
        _CONFIG.format(
            journal_mib=journal_mib,
            sealing=fingerprints[HOST_SEALING_KEY],
            answer=fingerprints[HOST_ANSWER_KEY],
            ca_key="\n".join(f'{name} = "{value}"' for name, value in bureau.ca_public_key.record().items()),
        ),
        encoding="utf-8",
    )
    for path in (*state.rglob("*"), state, *(each.parent for each in new)):
        _sync(path)
    unfinished.replace(state_config(state))
    _sync(state)


class Witness(Ssd1306):
    """The panel, and somebody who looks at it: acknowledges a sale when, and only when, its approval stands there."""

    def __init__(self, acknowledgements: int, last4: str) -> None:
        super().__init__()
        self._acknowledgements = acknowledgements
        self._last4 = last4
        self._lock = threading.Lock()
        self._good_news: frozenset[bytes] = frozenset()
        self._line = b""
        self._is_shown = False
        self.acknowledged = threading.Event()
        self.trouble = ""

    def expect(self, amount: Amount) -> None:
        """From now on the approval of this amount counts."""
        kinds = (screens.Approved, screens.AcceptedOffline)
        pictures = frozenset(screens.render(kind(amount, "Visa", self._last4), "en").tobytes() for kind in kinds)
        with self._lock:
            self._good_news, self._line, self._is_shown = pictures, b"", False
            self.acknowledged.clear()

    def name(self, sequence: int, transaction: str, amount: Amount) -> None:
        """The sale that is expected. The register may hear of it later than the customer sees it."""
        with self._lock:
            self._line = f"ack {sequence} {transaction} {amount.minor} {amount.currency.code}\n".encode("ascii")
            self._acknowledge()

    def data(self, sent: bytes) -> None:
        super().data(sent)
        picture = self.picture().tobytes()
        with self._lock:
            if picture in self._good_news:
                self._is_shown = True
                self._acknowledge()

    def _acknowledge(self) -> None:
        if not (self._is_shown and self._line) or self.acknowledged.is_set():
            return
        try:
            if os.write(self._acknowledgements, self._line) != len(self._line):
                self.trouble = "an acknowledgement was written in part"
        except OSError as error:
            self.trouble = f"no acknowledgement can be written: {error}"
        self.acknowledged.set()


class Customer:
    """Everybody in front of the terminal: the register asks, a card is held to the reader, and taken away."""

    def __init__(self, config: Config, panel: Witness, card: Card, count: int, stop: threading.Event) -> None:
        self._client = ControlClient(config.socket.path)
        self._panel = panel
        self._card = card
        self._count = count
        self._stop = stop
        self.made = 0
        self.last_s = 0.0
        self.trouble = ""
        self._thread: threading.Thread | None = None

    def start(self, reader: Pn532) -> None:
        self._thread = threading.Thread(target=self._shop, args=(reader,), name="customer", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """The terminal has ended; so does the shopping."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(SALE_S)

    def _shop(self, reader: Pn532) -> None:
        attempts = failed = 0
        settled = False
        while self.made < self._count and failed < FAILED_MAX and not self._stop.is_set():
            try:
                if not settled:
                    self._settle()
                    settled = True
                attempts += 1
                settled = self._buy(reader, _amount(attempts))
            except TerminalUnavailable:
                settled = False
                self._stop.wait(_POLL_S)  # it starts, it ends, or it opens its ledger again
                continue
            except CallRefused as refused:
                self.trouble, settled = str(refused), False
                self._stop.wait(_LONG_POLL_MS / 1000)
            self.made += settled
            failed = 0 if settled else failed + 1
            self.last_s = time.monotonic()
            if self._panel.trouble:
                self.trouble = self._panel.trouble
                break
        self._client.close()
        self._stop.set()

    def _settle(self) -> None:
        """Keep what stood when the power went but was never shown."""
        for sale in self._client.call("status")["attention"]:
            with contextlib.suppress(CallRefused):  # shown meanwhile
                self._client.call("attention.resolve", {"transaction": sale["id"], "keep": True})

    def _buy(self, reader: Pn532, amount: Amount) -> bool:
        """One sale. True when its approval was shown."""
        deadline_s = time.monotonic() + SALE_S
        self._panel.expect(amount)
        sale = self._start(amount, deadline_s)
        self._panel.name(sale["sequence"], sale["id"], amount)
        reader.present(ProximityCard(self._card.contactless))
        try:
            # The register's word only says when looking at the panel becomes pointless.
            while not self._panel.acknowledged.is_set() and not sale["decided"] and time.monotonic() < deadline_s:
                sale = self._client.call("sale.result", {"transaction": sale["id"], "wait_ms": _LONG_POLL_MS})
            return self._panel.acknowledged.wait(PICTURE_S if sale["state"] in MADE else 0.0)
        finally:
            reader.remove()

    def _start(self, amount: Amount, deadline_s: float) -> dict[str, Any]:
        """As soon as the device is free."""
        while True:
            try:
                return self._client.call("sale.start", {"amount": amount.minor, "currency": amount.currency.code})
            except CallRefused as refused:
                if refused.code != "busy" or time.monotonic() > deadline_s:
                    raise
            time.sleep(_POLL_S)


@contextlib.contextmanager
def _device(place: Path, panel: Witness) -> Iterator[Pn532]:
    """Reader and panel, on threads of this process: it takes the whole of a sale with it when it is killed."""
    reader = Pn532(place / "nfc", realtime=False)
    bus = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bus.bind(str(place / "oled.sock"))
    bus.listen(1)

    def serve_panel() -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                connection, _ = bus.accept()
                with connection:
                    serve_bus(connection, panel)

    serving = threading.Thread(target=reader.serve, name="pn532", daemon=True)
    serving.start()
    threading.Thread(target=serve_panel, name="oled", daemon=True).start()
    try:
        yield reader
    finally:
        bus.close()
        reader.stop()
        serving.join()
        reader.close()


def _amount(number: int) -> Amount:
    """Between 1.00 and 29.04, never the same twice in a row, and none that a host would decline for its last digits."""
    return Amount(100 + 100 * (number % 29) + number % 5, EUR)


def _journal_mib(count: int) -> int:
    return max(_JOURNAL_MIB_MIN, -(-(_SLOTS_OF_A_SALE * count + _SLOTS_KEPT) // _SLOTS_OF_A_MIB))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

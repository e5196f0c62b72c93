"""A whole installation in one directory: keys, configuration, host, device, and the real services as processes.

Demonstrations, end-to-end tests and benchmarks all start here. `World.create` provisions everything once; after that
each part is started, stopped and killed by itself, as a person with a power plug would.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from hwsim.cards.bureau import Bureau, Scheme
from hwsim.cards.designs import REVOKED_SERIAL
from hwsim.cards.personalise import rack
from hwsim.device import DeviceClient
from hwsim.faults import Fault, FaultProxy
from hwsim.host import controls
from hwsim.host.server import BUREAU_FILE, open_host
from terminal.clock import system_entropy
from terminal.control import ControlClient, TerminalUnavailable
from terminal.ledger.keys import HOST_ANSWER_KEY, HOST_SEALING_KEY, generate, generate_spool_key
from terminal.money import Amount

START_S: Final = 30.0  # a process that has not answered by then is broken; a slow machine takes 3
STOP_S: Final = 15.0
_POLL_S: Final = 0.01

TERMINAL_ID: Final = "T-0001"
MERCHANT_ID: Final = "M-0001"
CARD: Final = "visa-debit"

_URL_TO_COME: Final = "https://host.invalid"  # replaced when the host has found its port
_CONFIG: Final = """\
[terminal]
id = "{terminal}"
merchant = "{merchant}"
country = 276
currency = "EUR"

[ledger]
directory = "{directory}/ledger"
keys = "{directory}/keys/terminal"
journal_mib = 16

[socket]
path = "{directory}/run/terminal.sock"

[sale]
{sale}

[limits.EUR]
transaction = "500.00"
offline_transaction = "40.00"
offline_sum = "150.00"
offline_count = 10

[host]
url = "{url}"
ca = "{directory}/host/public/ca.pem"
sealing_fingerprint = "{sealing}"
answer_fingerprint = "{answer}"
connect_timeout_ms = 2000
read_timeout_ms = 3000

[sync]
directory = "{directory}/sync"
keys = "{directory}/keys/sync"
socket = "{directory}/sync.sock"
backoff_min_ms = 100
backoff_max_ms = 1000

[emv]
revoked = "{directory}/keys/terminal/revoked.toml"

{ca_keys}"""
_REVOKED: Final = """\
# What the card "revoked" was certified with, one entry for each scheme.
{entries}"""

_T = TypeVar("_T")


class WorldError(Exception):
    """A part did not start, stop or come to an end; its log says why."""


@dataclass(slots=True)
class World:
    """One installation. The proxy between sync and host runs in this process; everything else is its own process."""

    directory: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    proxy: FaultProxy | None = None
    modules: dict[str, str] = field(default_factory=dict)  # what to run in place of a part's own module
    _host_port: int = 0
    _device: DeviceClient | None = None

    @classmethod
    @contextlib.contextmanager
    def create(cls, directory: Path, **sale: object) -> Iterator[World]:
        """Make an installation (`sale`: values of its section [sale]); end every process at the end."""
        world = cls(directory)
        try:
            world.provision(_URL_TO_COME, sale)
            yield world
        finally:
            world.close()

    def provision(self, url: str, sale: Mapping[str, object]) -> None:
        """Make keys, cards, host and configuration in the directory, which may be there already but not filled."""
        for name in ("device/cards", "host", "run", "log"):
            (self.directory / name).mkdir(mode=0o700, parents=True)
        self._provision(url, sale)

    def close(self) -> None:
        """End whatever still runs."""
        if self._device is not None:
            self._device.close()
        for name in list(self.processes):
            self.kill(name)
        if self.proxy is not None:
            self.proxy.close()

    # ---- parts

    def start_terminal(self) -> None:
        """The terminal service on the simulated device; returns when it answers on its socket."""
        self._start(
            "terminal", ["hwsim", "--config", str(self.config), "run", "--device", str(self.directory / "device")]
        )
        self.wait(self._status_or_none, "the terminal to answer", timeout_s=START_S)

    def start_sync(self) -> None:
        """The sync service as it is shipped; returns when the terminal has heard of it."""
        self._start("sync", ["terminal", "--config", str(self.config), "sync", "run"])
        self.wait(lambda: self.status()["link"]["sync"] or None, "sync to call", timeout_s=START_S)

    def start_device(self) -> None:
        """Reader, cards and panel."""
        self._start("device", ["hwsim", "device", "--directory", str(self.directory / "device")])

        def answers() -> bool | None:
            client = DeviceClient(self.directory / "device")
            with contextlib.closing(client), contextlib.suppress(TerminalUnavailable):
                return bool(client.rack())
            return None

        self.wait(answers, "the device to answer", timeout_s=START_S)

    def kill(self, name: str) -> None:
        """SIGKILL, with whatever it was started under: what a power cut does to a process."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_S)

    def stop(self, name: str) -> int:
        """SIGTERM, and the exit code."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise WorldError(f"{name} did not stop within {STOP_S:.0f} s of SIGTERM; see {self.log(name)}") from None

    def network(self, fault: Fault) -> None:
        """What the network between sync and host does from now on."""
        if self.proxy is None:
            raise WorldError("the host was not started")
        self.proxy.switch(fault)

    def start_host(self) -> None:
        """The operator's host, with the proxy in front of it that plays the network."""
        self._start("host", ["hwsim", "host", str(self.directory / "host"), "--port", str(self._host_port)])
        port = self.wait(self._listening_port, "the host to listen", timeout_s=START_S)
        if self.proxy is None:
            self._host_port = port
            self.proxy = FaultProxy(("127.0.0.1", port))
            text = self.config.read_text(encoding="utf-8")
            self.config.write_text(text.replace(_URL_TO_COME, f"https://127.0.0.1:{self.proxy.port}"), encoding="utf-8")

    def _listening_port(self) -> int | None:
        words = self.log("host").read_text(encoding="utf-8").split()
        return int(words[-1]) if words[-2:-1] == ["port"] else None

    def _status_or_none(self) -> dict[str, Any] | None:
        with contextlib.suppress(TerminalUnavailable):
            return self.status()
        return None

    def _start(self, name: str, arguments: list[str]) -> None:
        if name in self.processes:
            raise WorldError(f"{name} runs already")
        with self.log(name).open("wb" if name == "host" else "ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-P", "-m", self.modules.get(name, arguments[0]), *arguments[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
            )

    def _provision(self, url: str, sale: Mapping[str, object]) -> None:
        keys, host_directory = self.directory / "keys", self.directory / "host"
        visa = Bureau.create(system_entropy)
        mastercard = Bureau.create(system_entropy, scheme=Scheme.MASTERCARD, imk_ac=visa.imk_ac)
        visa.save(host_directory / BUREAU_FILE)
        cards = rack({Scheme.VISA: visa, Scheme.MASTERCARD: mastercard}, system_entropy)
        for name, profile in cards.items():
            profile.save(self.directory / "device" / "cards" / f"{name}.json")
        generate(keys / "terminal", system_entropy)
        generate_spool_key(keys / "sync", system_entropy)
        with open_host(host_directory) as host:
            host.register(TERMINAL_ID, MERCHANT_ID, (keys / "terminal" / "signing-key.pub").read_bytes())
            for profile in cards.values():
                host.enrol(profile)
        public = host_directory / "public"
        for name in (HOST_SEALING_KEY, HOST_ANSWER_KEY):
            shutil.copy(public / name, keys / "terminal" / name)
        fingerprints = json.loads((public / "fingerprints.json").read_text(encoding="utf-8"))
        ca_keys = "\n".join(
            "[[ca_keys]]\n" + "".join(f'{name} = "{value}"\n' for name, value in bureau.ca_public_key.record().items())
            for bureau in (visa, mastercard)
        )
        (keys / "terminal" / "revoked.toml").write_text(
            _REVOKED.format(
                entries="\n".join(
                    f'[[revoked]]\nrid = "{bureau.rid.hex().upper()}"\nindex = "{bureau.ca_index:02X}"\n'
                    f'serial = "{REVOKED_SERIAL}"\n'
                    for bureau in (visa, mastercard)
                )
            ),
            encoding="utf-8",
        )
        self.config.write_text(
            _CONFIG.format(
                terminal=TERMINAL_ID,
                merchant=MERCHANT_ID,
                directory=self.directory,
                url=url,
                sealing=fingerprints[HOST_SEALING_KEY],
                answer=fingerprints[HOST_ANSWER_KEY],
                sale="\n".join(f"{name} = {json.dumps(value)}" for name, value in sale.items()),
                ca_keys=ca_keys,
            ),
            encoding="utf-8",
        )

    # ---- what a person does and sees

    @property
    def config(self) -> Path:
        return self.directory / "payterm.toml"

    @property
    def device(self) -> DeviceClient:
        """The device's field and panel."""
        if self._device is None:
            self._device = DeviceClient(self.directory / "device")
        return self._device

    def log(self, name: str) -> Path:
        return self.directory / "log" / f"{name}.log"

    def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        """A call on the terminal's socket. Raises `TerminalUnavailable`, `CallRefused`."""
        client = ControlClient(self.directory / "run" / "terminal.sock")
        with contextlib.closing(client):
            return client.call(do, arguments)

    def status(self) -> dict[str, Any]:
        return self.call("status")

    def ledger(self) -> list[dict[str, Any]]:
        """The terminal's transactions, newest first."""
        return list(self.call("ledger.list")["transactions"])

    def sell(self, amount: Amount, reference: str | None = None) -> str:
        """Ask for a sale as a register does; its id."""
        sale = self.call("sale.start", amount=amount.minor, currency=amount.currency.code, reference=reference)
        return str(sale["id"])

    def result(self, sale: str, timeout_s: float = 30.0) -> dict[str, Any]:
        """The sale as the register is told it, once the device has decided."""
        return self.wait(
            lambda: found if (found := self.call("sale.result", transaction=sale, wait_ms=1000))["decided"] else None,
            f"sale {sale} to be decided",
            timeout_s=timeout_s,
        )

    def tap(self, amount: Amount, card: str = CARD, **disturbance: int | bool | None) -> dict[str, Any]:
        """One sale from request to removed card (`insert=True`: in the contact reader)."""
        sale = self.sell(amount)
        self.device.present(card, **disturbance)
        result = self.result(sale)
        self.device.remove()
        self.wait(lambda: not self.status()["busy"] or None, "the device to be free")
        return result

    def bookings(self) -> list[dict[str, Any]]:
        """What the host has in its books."""
        return list(controls.order(self.directory / "host", controls.Bookings()))

    def misbehave(self, misbehaviour: controls.Misbehaviour, times: int = 1) -> None:
        """What the host does wrong with the next uploads."""
        controls.order(self.directory / "host", controls.Misbehave(misbehaviour, times))

    def state(self, sale: str) -> str | None:
        """What the ledger says of a sale."""
        return next((str(each["state"]) for each in self.ledger() if each["id"] == sale), None)

    def wait(self, found: Callable[[], _T | None], what: str, *, timeout_s: float = 15.0) -> _T:
        """Until `found` gives something. Raises `WorldError` naming `what`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if (value := found()) is not None:
                return value
            for name, process in self.processes.items():
                if process.poll() is not None:
                    tail = self.log(name).read_text(encoding="utf-8", errors="replace")[-2000:]
                    raise WorldError(f"waiting for {what}: {name} ended with {process.returncode}\n{tail}")
            time.sleep(_POLL_S)
        raise WorldError(f"waited {timeout_s:.0f} s for {what}")

    def keep_logs(self, to: Path) -> Path:
        """Copy the logs out of a directory that is about to go."""
        shutil.copytree(self.directory / "log", to, dirs_exist_ok=True)
        return to

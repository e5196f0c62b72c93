"""The terminal service, put together from whatever hardware it is given.

The two composition roots, `payterm` with real drivers and `payterm-sim` with simulated hardware below the same drivers'
libraries, both end here; nothing from here on knows which of them it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from drivers.interfaces import Buzzer, CardReader, Display, Keypad, Lamps
from terminal import VERSION, emvsetup, notify
from terminal.clock import Clock, Entropy
from terminal.config import Config, credentials
from terminal.control import Call, ControlServer, Roles
from terminal.days import Days
from terminal.desk import Desk
from terminal.ledger import restoring
from terminal.ledger.errors import DiskTrouble, KeyUnavailable, LedgerCorrupt, LedgerError
from terminal.ledger.keys import TerminalKeys, key_id
from terminal.ledger.ledger import DATABASE_NAME, Ledger, LedgerSettings, locked
from terminal.ledger.recovery import move_aside, resolve
from terminal.ledger.restoring import Restored
from terminal.ledger.sealing import Envelopes
from terminal.ledger.upkeep import Retention
from terminal.link import Link
from terminal.payment import Payments
from terminal.reconciling import Reconciling
from terminal.registration import Registration
from terminal.service import Service, out_of_order
from terminal.tidying import UpkeepThread
from terminal.ui import screens
from terminal.ui.flow import Flow
from terminal.ui.keys import KeypadThread
from terminal.ui.panel import Panel
from terminal.ui.readers import Readers

_TRY_AGAIN_S: Final = 2.0  # a card that is pushed back in is found within seconds

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a composition root brings."""

    readers: tuple[CardReader, ...]
    display: Display
    keypad: Keypad | None = None
    lamps: Lamps | None = None
    buzzer: Buzzer | None = None


@dataclass(frozen=True, slots=True)
class Books:
    """An open ledger with what signs and verifies for it."""

    ledger: Ledger
    envelopes: Envelopes
    keys: TerminalKeys = field(repr=False)


def loaded_keys(config: Config) -> TerminalKeys:
    """Raises `KeyUnavailable`, `ConfigError`."""
    directory = credentials(config.ledger.keys)
    return TerminalKeys.load(directory, config.host.sealing_fingerprint, config.host.answer_fingerprint)


def ledger_settings(config: Config) -> LedgerSettings:
    ledger, keep = config.ledger, config.retention
    return LedgerSettings(
        journal_size_bytes=ledger.journal_mib << 20,
        journal=ledger.journal,
        second_journal=ledger.second_journal,
        may_begin=ledger.begin,
        retention=Retention(keep.sales_days, keep.card_days, keep.audit_months),
    )


@contextlib.contextmanager
def recovered_books(config: Config, clock: Clock, entropy: Entropy) -> Iterator[Books]:
    """Take the ledger's lock, bring journal and ledger together, and settle what the last run left open.

    Raises `LedgerError` when no sale may be taken: keys missing, store locked, damaged or on a broken disk.
    """
    keys = loaded_keys(config)
    ledger = Ledger.open(config.ledger.directory, keys, clock=clock, entropy=entropy, settings=ledger_settings(config))
    try:
        envelopes = Envelopes(
            keys.signing, keys.host_sealing, config.terminal.id, config.terminal.merchant, ledger.epoch
        )
        resolution = resolve(ledger, envelopes)
        report = ledger.recovery
        _log.info(
            "ledger open: %d records, %d redone, %d sales voided, %d reversed, %d for a person to decide",
            report.position,
            report.redone,
            len(resolution.voided),
            len(resolution.reversed),
            len(resolution.unshown),
        )
        if report.restored:
            _log.error("damaged records of the journal were written again from ledger.db: %s", report.restored)
        if report.moved_aside:
            _log.error("ledger.db was damaged: rebuilt from the journal, the damaged one is %s", report.moved_aside)
        yield Books(ledger, envelopes, keys)
    finally:
        ledger.close()


def run(config: Config, hardware: Hardware, *, clock: Clock, entropy: Entropy, stop: threading.Event) -> None:
    """The terminal service until `stop` is set. Raises `LedgerError`, `ConfigError` when it cannot start.

    Trouble with the storage does not end it: it says so on the panel and on the socket, and opens the ledger again as
    soon as that can be opened; recovery then finds what is really there.
    """
    with contextlib.ExitStack() as ended:
        for reader in hardware.readers:
            ended.callback(reader.close)
        terminal = _Terminal(config, hardware, clock, entropy, stop)
        ended.callback(terminal.close)
        try:
            while not stop.is_set():
                try:
                    terminal.serve()
                except (DiskTrouble, LedgerCorrupt) as trouble:
                    if isinstance(trouble, LedgerCorrupt) and trouble.sequence is not None:
                        raise  # no opening again will mend the journal
                    terminal.wait_out(trouble)
        except LedgerError as error:
            # It stays on the panel when the service has ended: whoever stands there must know why no sale is taken.
            terminal.panel.show(screens.Error("key" if isinstance(error, KeyUnavailable) else "ledger"))
            raise
        else:
            terminal.panel.close()


class _Terminal:
    """What lasts while the ledger is opened, perhaps more than once."""

    def __init__(
        self, config: Config, hardware: Hardware, clock: Clock, entropy: Entropy, stop: threading.Event
    ) -> None:
        self._given = self._config = config
        self._hardware = hardware
        self._clock = clock
        self._entropy = entropy
        self._stop = stop
        self._setup = emvsetup.build(config)
        self._roles = Roles.build(sync_user=config.socket.sync_user, register_user=config.socket.register_user)
        self._link, self._desk = Link(clock), Desk()
        self.panel = Panel(hardware.display, config.terminal.language, lamps=hardware.lamps, buzzer=hardware.buzzer)
        self._control: ControlServer | None = None
        self._trouble = ""
        self.panel.show(screens.Recovering())

    def serve(self) -> None:
        """Sell until stopped. Raises `LedgerError`."""
        config, link, desk, clock = self._config, self._link, self._desk, self._clock
        with contextlib.ExitStack() as running:
            books = running.enter_context(recovered_books(config, clock, self._entropy))
            # Whatever happens to the storage from now on: an empty place is not where this ledger was.
            self._config = config = msgspec.structs.replace(
                config, ledger=msgspec.structs.replace(config.ledger, begin=False)
            )
            if self._trouble:
                _log.info("the storage is back: selling again")
                self._trouble = ""
            ledger = books.ledger
            names = ", ".join(reader.name for reader in self._hardware.readers)
            keys = books.keys
            ledger.note(
                "start",
                version=VERSION,
                readers=names,
                data_key=keys.data.current.id.hex(),
                host_sealing_key=key_id(keys.host_sealing),
                host_answer_key=key_id(keys.host_answer),
                configuration=hashlib.sha256(msgspec.json.encode(self._given, enc_hook=str)).hexdigest()[:16],
            )
            running.callback(_noted, ledger, "stop")
            payments = Payments(
                config=config,
                setup=self._setup,
                ledger=ledger,
                envelopes=books.envelopes,
                link=link,
                clock=clock,
                entropy=self._entropy,
            )
            answer_key = books.keys.host_answer
            days = Days(config, ledger, books.envelopes, link, clock)
            service = Service(
                config=config,
                ledger=ledger,
                answer_key=answer_key,
                payments=payments,
                link=link,
                desk=desk,
                reconciling=Reconciling(ledger, books.envelopes, answer_key, clock, self._entropy),
                days=days,
                registration=Registration(ledger, books.envelopes, answer_key, clock, self._entropy),
            )
            flow = Flow(
                config=config,
                readers=Readers(self._hardware.readers, clock, lambda what, name: ledger.note(what, reader=name)),
                panel=self.panel,
                ledger=ledger,
                payments=payments,
                link=link,
                desk=desk,
                clock=clock,
                stopping=self._stop.is_set,
                alive=notify.alive,
                has_keys=self._hardware.keypad is not None,
            )
            self._answer_with(service.calls())
            if self._hardware.keypad is not None:
                keypad = KeypadThread(self._hardware.keypad, desk.press)
                keypad.start()
                running.callback(keypad.stop)
            tidying = UpkeepThread(ledger, books.envelopes, days, lambda: desk.busy)
            tidying.start()
            running.callback(tidying.stop)
            notify.ready()
            flow.run()
            notify.stopping()

    def wait_out(self, trouble: LedgerError) -> None:
        """Say what is wrong, on the panel, in the log and to whoever asks; then it is worth another try."""
        if str(trouble) != self._trouble:
            _log.error("%s", trouble)
        self._trouble = str(trouble)
        self._answer_with(out_of_order(lambda: self._trouble))
        self.panel.show(screens.Error("storage"))
        notify.ready()  # it serves, in that it says what is wrong; a restart would mend nothing
        notify.alive()
        self._stop.wait(_TRY_AGAIN_S)

    def close(self) -> None:
        if self._control is not None:
            self._control.close()

    def _answer_with(self, calls: Mapping[str, Call]) -> None:
        if self._control is None:
            self._control = ControlServer(self._config.socket.path, self._roles, calls)
        else:
            self._control.answer_with(calls)


def _noted(ledger: Ledger, what: str) -> None:
    with contextlib.suppress(LedgerError):  # in doubt it takes no note
        ledger.note(what)


def set_database_aside(config: Config) -> Path | None:
    """For a rebuild: rename ledger.db, which the next opening then makes anew. Raises `LedgerLocked`, `DiskTrouble`."""
    with locked(config.ledger.directory):
        path = config.ledger.directory / DATABASE_NAME
        return move_aside(path) if path.exists() else None


def restore(config: Config, backup: Path, clock: Clock, entropy: Entropy) -> Restored:
    """Bring a backup back into the configured place. Raises `LedgerError`."""
    return restoring.restore(
        config.ledger.directory,
        backup,
        loaded_keys(config),
        settings=ledger_settings(config),
        clock=clock,
        entropy=entropy,
    )

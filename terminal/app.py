"""The terminal service, put together from whatever hardware it is given.

The two composition roots, `payterm` with real drivers and `payterm-sim` with simulated hardware below the same drivers'
libraries, both end here; nothing from here on knows which of them it was.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from drivers.interfaces import Buzzer, CardReader, Display, Keypad, Lamps
from terminal import VERSION, emvsetup, notify
from terminal.clock import Clock, Entropy
from terminal.config import Config, credentials
from terminal.control import ControlServer, Roles
from terminal.desk import Desk
from terminal.ledger.errors import KeyUnavailable, LedgerError
from terminal.ledger.keys import TerminalKeys
from terminal.ledger.ledger import Ledger, LedgerSettings
from terminal.ledger.recovery import resolve
from terminal.ledger.sealing import Envelopes
from terminal.link import Link
from terminal.payment import Payments
from terminal.service import Service
from terminal.ui import screens
from terminal.ui.flow import Flow
from terminal.ui.keys import KeypadThread
from terminal.ui.panel import Panel
from terminal.ui.readers import Readers

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


@contextlib.contextmanager
def recovered_books(config: Config, clock: Clock, entropy: Entropy) -> Iterator[Books]:
    """Take the ledger's lock, bring journal and ledger together, and settle what the last run left open.

    Raises `LedgerError` when no sale may be taken: keys missing, store locked, damaged or on a broken disk.
    """
    keys = TerminalKeys.load(
        credentials(config.ledger.keys), config.host.sealing_fingerprint, config.host.answer_fingerprint
    )
    settings = LedgerSettings(journal_size_bytes=config.ledger.journal_mib << 20)
    ledger = Ledger.open(config.ledger.directory, keys, clock=clock, entropy=entropy, settings=settings)
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
        if report.moved_aside:
            _log.error("ledger.db was damaged: rebuilt from the journal, the damaged one is %s", report.moved_aside)
        yield Books(ledger, envelopes, keys)
    finally:
        ledger.close()


def run(config: Config, hardware: Hardware, *, clock: Clock, entropy: Entropy, stop: threading.Event) -> None:
    """The terminal service until `stop` is set. Raises `LedgerError`, `ConfigError` when it cannot start."""
    setup = emvsetup.build(config)
    roles = Roles.build(sync_user=config.socket.sync_user, register_user=config.socket.register_user)
    link, desk = Link(clock), Desk()
    panel = Panel(hardware.display, config.terminal.language, lamps=hardware.lamps, buzzer=hardware.buzzer)
    panel.show(screens.Recovering())
    try:
        with recovered_books(config, clock, entropy) as books:
            ledger = books.ledger
            ledger.note("start", version=VERSION, readers=", ".join(reader.name for reader in hardware.readers))
            payments = Payments(
                config=config,
                setup=setup,
                ledger=ledger,
                envelopes=books.envelopes,
                link=link,
                clock=clock,
                entropy=entropy,
            )
            service = Service(
                config=config, ledger=ledger, answer_key=books.keys.host_answer, payments=payments, link=link, desk=desk
            )
            readers = Readers(hardware.readers, clock, lambda what, name: ledger.note(what, reader=name))
            flow = Flow(
                config=config,
                readers=readers,
                panel=panel,
                ledger=ledger,
                payments=payments,
                link=link,
                desk=desk,
                clock=clock,
                stopping=stop.is_set,
                alive=notify.alive,
            )
            control = ControlServer(config.socket.path, roles, service.calls())
            keys = KeypadThread(hardware.keypad, desk.press) if hardware.keypad is not None else None
            try:
                if keys is not None:
                    keys.start()
                notify.ready()
                flow.run()
            finally:
                notify.stopping()
                if keys is not None:
                    keys.stop()
                control.close()
                ledger.note("stop")
    except LedgerError as error:
        # It stays on the panel when the service has ended: whoever stands there must know why no sale is taken.
        panel.show(screens.Error("key" if isinstance(error, KeyUnavailable) else "ledger"))
        raise
    else:
        panel.close()
    finally:
        for reader in hardware.readers:
            reader.close()

"""`payterm emv replay`, `oda`, `risk`, `record`: conversations with cards as files.

They need no keys and no ledger, and nothing is sold. A run that differs from its file ends with exit code 3, a file
that cannot be used with 2.
"""

from __future__ import annotations

import argparse
import contextlib
import secrets
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Final

from drivers.interfaces import CardChannel, DriverError, Interface
from terminal.commands.base import Commands, HardwareFactory, print_json, say
from terminal.config import Config
from terminal.errors import TerminalError

EXIT_MISMATCH: Final = 3
_CARD_WAIT_MS: Final = 30_000  # to find a card and put it where it belongs
_WHOLE_CARD_MODE: Final = 0o600


class RecordingFailed(TerminalError):
    """No recording was made; the message says why. Nothing was sold."""


def add(group: Commands) -> None:
    replay = group.add("replay", _replay, "run a recorded conversation again, print what comes of it as JSON")
    replay.add_argument("file", type=Path, help="a replay file")
    replay.add_argument("--show-pan", action="store_true", help="print card data whole")

    oda = group.add("oda", _oda, "check certificates and signatures of a card, print the result as JSON")
    oda.add_argument("file", type=Path, help="an authentication file")

    risk = group.add("risk", _risk, "run one step of the terminal's risk management, print what it finds as JSON")
    risk.add_argument("file", type=Path, help="a risk file")

    record = group.add("record", _record, "make a replay file from a card on the reader; nothing is sold")
    record.add_argument("file", type=Path, help="a new file")
    record.add_argument("--amount", default="1.00", help="as 12.50 (default: %(default)s)")
    record.add_argument("--currency", help="ISO 4217 code (default: the terminal's)")
    record.add_argument(
        "--interface",
        choices=[each.value for each in Interface],
        help="which reader (default: the first that there is)",
    )
    record.add_argument(
        "--show-pan", action="store_true", help="keep card number and certificates: for test cards only"
    )


def _replay(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal.replay import formats, run

    answer = run.replay(formats.load(options.file, formats.ReplayFile), show_pan=options.show_pan)
    print_json(answer)
    return EXIT_MISMATCH if answer["mismatch"] is not None else 0


def _oda(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal.replay import formats, steps

    print_json(steps.authenticate(formats.load(options.file, formats.OdaFile)))
    return 0


def _risk(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal.replay import formats, steps

    print_json(steps.find(formats.load(options.file, formats.RiskFile)))
    return 0


def _record(options: argparse.Namespace, hardware: HardwareFactory) -> int:
    from terminal import emvsetup
    from terminal.config import load
    from terminal.emv.configuration import Environment, Request
    from terminal.money import Amount, currency
    from terminal.replay import formats, recording

    config = load(options.config)
    amount = Amount.parse(options.amount, currency(options.currency or config.terminal.currency))
    if options.file.exists():
        raise RecordingFailed(f"{options.file} is there already, and is not written over. Name a new file.")
    now = datetime.now().astimezone()
    try:
        with _card(config, hardware, options.interface) as channel:
            file = recording.record(
                channel,
                emvsetup.build(config).in_currency(amount.currency.code),
                Request(amount, now.date(), now.time()),
                Environment(
                    unpredictable_number=lambda: secrets.token_bytes(4),
                    notify=lambda _: None,
                    random_percent=lambda: secrets.randbelow(99) + 1,
                ),
                clock=lambda: now,
                elapsed_us=lambda: time.monotonic_ns() // 1_000,
                masked=not options.show_pan,
            )
    except DriverError as error:
        raise RecordingFailed(f"{error}. Nothing was recorded, nothing was sold.") from error
    options.file.touch(mode=_WHOLE_CARD_MODE, exist_ok=False)
    options.file.write_bytes(formats.encode(file))
    say(f"{options.file}: {len(file.exchanges)} exchanges{'' if options.show_pan else ', card number masked'}")
    return 0


@contextlib.contextmanager
def _card(config: Config, hardware: HardwareFactory, interface: str | None) -> Iterator[CardChannel]:
    """A card on the reader that was asked for. Raises `DriverError`, `RecordingFailed`."""
    readers = [each for each in hardware(config).readers if interface in {None, each.interface.value}]
    if not readers:
        raise RecordingFailed("the configuration names no such reader: nothing was recorded. Add it, or name another.")
    reader = readers[0]
    reader.open()
    with contextlib.closing(reader):
        say(f"{reader.name}: waiting for a card")
        channel = reader.wait_for_card(_CARD_WAIT_MS)
        if channel is None:
            raise RecordingFailed(f"no card came within {_CARD_WAIT_MS // 1000} s: nothing was recorded. Try again.")
        with contextlib.closing(channel):
            yield channel

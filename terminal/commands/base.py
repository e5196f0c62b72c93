"""What every command shares: how it is put into the command line, and how it reaches the ledger.

The running terminal is asked on its socket. Only when none runs is the store opened here, under its exclusive lock,
and the same table of calls answers (`terminal.records`): a command does not know which of them it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from terminal.clock import SystemClock, system_entropy
from terminal.config import Config, load
from terminal.control import ControlClient, TerminalUnavailable, asked
from terminal.money import currency, sum_of

if TYPE_CHECKING:
    from rich.table import Table

    from terminal.app import Hardware

STATE_CONFIG: Final = "payterm.toml"  # of a state directory that has everything in it

HardwareFactory: TypeAlias = "Callable[[Config], Hardware]"
Run: TypeAlias = Callable[[argparse.Namespace, HardwareFactory], int]
Ask: TypeAlias = Callable[[str, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Commands:
    """A place in the command line that takes commands and groups of them."""

    _places: Any  # argparse keeps the type to itself

    def add(self, name: str, run: Run, text: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = self._places.add_parser(name, help=text, description=text)
        made.set_defaults(command=run)
        return made

    def group(self, name: str, text: str) -> Commands:
        made = self._places.add_parser(name, help=text, description=text)
        return Commands(made.add_subparsers(required=True, metavar="COMMAND"))


def takes_state(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Let a command work on a directory that has configuration, keys and ledger in it, wherever it was moved."""
    made.add_argument("--state", type=Path, help=f"a directory with its own {STATE_CONFIG}, instead of --config")
    return made


def takes_json(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    made.add_argument("--json", action="store_true", help="print as JSON")
    return made


def configured(options: argparse.Namespace) -> Config:
    """The configuration that the options name. Raises `ConfigError`."""
    state: Path | None = getattr(options, "state", None)
    return load(options.config if state is None else state / STATE_CONFIG)


@contextlib.contextmanager
def records(config: Config) -> Iterator[Ask]:
    """Whoever answers calls about the records: the running terminal, or the store itself.

    Raises `TerminalUnavailable` when the store is in use and yet nobody answers, `LedgerError` when it does not open.
    """
    client = ControlClient(config.socket.path)
    try:
        client.call("status")
    except TerminalUnavailable as unavailable:
        if not config.ledger.directory.exists():
            raise
        from terminal import app
        from terminal.ledger.errors import LedgerLocked
        from terminal.records import Records

        with contextlib.ExitStack() as opened:
            try:
                books = opened.enter_context(app.recovered_books(config, SystemClock(), system_entropy))
            except LedgerLocked as error:
                raise TerminalUnavailable(
                    f"{error} It does not answer on its socket, though: look at its log."
                ) from unavailable
            calls = Records(config, books.ledger).calls()
            yield lambda do, arguments: asked(calls, do, arguments)
        return
    with contextlib.closing(client):
        yield client.call


@contextlib.contextmanager
def queue(config: Config) -> Iterator[Ask]:
    """Whoever answers calls about the queue: the running sync service, or the spool itself.

    Raises `TerminalUnavailable` when there is neither, `KeyUnavailable`, `SpoolUnavailable` when the spool is in use.
    """
    client = ControlClient(config.sync.socket, unit="payterm-sync")
    try:
        client.call("sync.status")
    except TerminalUnavailable:
        if not config.sync.directory.exists():
            raise
        from terminal.sync import service

        with service.queue_at_rest(config, SystemClock(), system_entropy) as calls:
            yield lambda do, arguments: asked(calls, do, arguments)
        return
    with contextlib.closing(client):
        yield client.call


def money(minor: int | None, code: str | None) -> str:
    """A sum for a table; blank where there is none."""
    return "" if minor is None or code is None else sum_of(minor, currency(code))


def age(ms: int | None) -> str:
    """How long, in one or two words: 12 s, 5 min, 3 h, 2 d."""
    if ms is None:
        return ""
    for unit_ms, unit, up_to in ((1_000, "s", 120), (60_000, "min", 120), (3_600_000, "h", 48)):
        if ms < unit_ms * up_to:
            return f"{max(0, ms) // unit_ms} {unit}"
    return f"{ms // 86_400_000} d"


def print_json(value: object) -> None:
    print(json.dumps(value))


def print_table(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


def say(text: str) -> None:
    """For a person who watches; never into the output that a script reads."""
    print(text, file=sys.stderr)

"""Commands of `payterm`. `run`, `recover` and `sync run` are services; the others ask the running one on its socket.

Exit codes, for scripts: 0 done (a sale: approved or accepted offline), 1 declined or not made, 2 arguments or
configuration, 3 the terminal service does not answer, 4 it refused, 5 keys or ledger do not let it start.

Each command imports what it needs when it runs: sync must not carry the ledger, nor the terminal an HTTP client.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from terminal import VERSION
from terminal.clock import SystemClock, system_entropy
from terminal.config import Config, load
from terminal.control import ControlClient, TerminalUnavailable
from terminal.errors import TerminalError
from terminal.money import Amount, currency

if TYPE_CHECKING:
    from terminal.app import Hardware

DEFAULT_CONFIG: Final = Path("/etc/payterm/payterm.toml")
EXIT_NOT_MADE: Final = 1
_EXIT_USAGE: Final = 2
_MADE: Final = {"approved", "accepted", "settled"}
_RESULT_WAIT_MS: Final = 30_000  # one long-poll; repeated until the device has decided

_log = logging.getLogger(__name__)

HardwareFactory: TypeAlias = "Callable[[Config], Hardware]"


def main(arguments: Sequence[str], hardware: HardwareFactory, *, prog: str = "payterm") -> int:
    """Run one command, return its exit code. Never shows a traceback for what a person can mend."""
    options = parser(prog).parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        code: int = options.command(options, hardware)
        sys.stdout.flush()  # here, where a reader that has left is no error
    except TerminalError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileNotFoundError) as error:
        print(
            f"{prog}: {error.filename}: {error.strerror}. Nothing was charged. Check path and rights.", file=sys.stderr
        )
        return _EXIT_USAGE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output has seen enough (`payterm ledger list | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def parser(prog: str) -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(
        prog=prog,
        description="An open payment terminal for test and closed-loop cards. It is no certified product.",
    )
    root.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="configuration file (default: %(default)s)")
    root.add_argument("--verbose", action="store_true", help="log more")
    root.add_argument("--version", action="version", version=f"{prog} {VERSION}")
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        group: Any, name: str, run: Callable[[argparse.Namespace, HardwareFactory], int], text: str
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = group.add_parser(name, help=text, description=text)
        made.set_defaults(command=run)
        return made

    def group(name: str, text: str) -> Any:
        return commands.add_parser(name, help=text, description=text).add_subparsers(required=True, metavar="COMMAND")

    command(commands, "run", _run, "run the terminal service")
    command(commands, "recover", _recover, "bring journal and ledger together after a power cut, then exit")

    sale = command(commands, "sale", _sale, "take a sale on the running terminal and wait for its end")
    sale.add_argument("amount", help="as 12.50")
    sale.add_argument("currency", nargs="?", help="ISO 4217 code (default: the terminal's)")
    sale.add_argument("--reference", help="your own name for this sale; the same reference is never charged twice")
    sale.add_argument("--json", action="store_true", help="print the result as JSON")

    status = command(commands, "status", _status, "how the running terminal is")
    status.add_argument("--json", action="store_true", help="print as JSON")

    for verdict, text in (("keep", "the goods were handed over: the sale stands"), ("void", "take the sale back")):
        resolve = command(commands, verdict, _resolve, f"after a power cut, a sale that was never shown: {text}")
        resolve.add_argument("transaction", help="its id, as `payterm status` shows it")
        resolve.set_defaults(keep=verdict == "keep")

    ledger = group("ledger", "what the ledger holds")
    listing = command(ledger, "list", _ledger_list, "list the latest transactions")
    listing.add_argument("--json", action="store_true", help="print as JSON")
    listing.add_argument("--limit", type=int, default=20, help="how many (default: %(default)s)")

    sync = group("sync", "the upload service")
    command(sync, "run", _sync_run, "run the sync service")

    keys = group("keys", "keys of this terminal")
    init = command(keys, "init", _keys_init, "make development keys (systemd credentials are for production)")
    init.add_argument("directory", type=Path, help="a directory outside the state; files are made with mode 0600")

    config = group("config", "the configuration file")
    command(config, "check", _config_check, "read it, say what is wrong with it")
    return root


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, so that a service finishes the piece in hand."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(options: argparse.Namespace, hardware: HardwareFactory) -> int:
    from terminal import app

    config = load(options.config)
    with stop_on_signals() as stop:
        app.run(config, hardware(config), clock=SystemClock(), entropy=system_entropy, stop=stop)
    return 0


def _recover(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal import app

    with app.recovered_books(load(options.config), SystemClock(), system_entropy) as books:
        unsent = sum(each.count for each in books.ledger.unsent())
        print(f"ledger ready: {unsent} unsent, {len(books.ledger.unshown())} waiting for keep or void")
    return 0


def _sync_run(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal.sync import service

    config = load(options.config)
    with stop_on_signals() as stop:
        service.run(config, clock=SystemClock(), entropy=system_entropy, stop=stop)
    return 0


def _sale(options: argparse.Namespace, _: HardwareFactory) -> int:
    config = load(options.config)
    amount = Amount.parse(options.amount, currency(options.currency or config.terminal.currency))
    client = ControlClient(config.socket.path)
    sale = client.call(
        "sale.start", {"amount": amount.minor, "currency": amount.currency.code, "reference": options.reference}
    )
    if not options.json:
        print(f"{amount}: present card", file=sys.stderr)
    try:
        while not sale["decided"]:
            sale = client.call("sale.result", {"wait_ms": _RESULT_WAIT_MS, "transaction": sale["id"]})
    except KeyboardInterrupt:
        client.close()
        client.call("sale.cancel", {"transaction": sale["id"]})
        raise
    if options.json:
        print(json.dumps(sale))
    else:
        why = "" if sale["state"] in _MADE else f" ({sale['reason']})"
        print(f"{amount}: {sale['state']}{why}  {sale['id']}")
    return 0 if sale["state"] in _MADE else EXIT_NOT_MADE


def _resolve(options: argparse.Namespace, _: HardwareFactory) -> int:
    client = ControlClient(load(options.config).socket.path)
    client.call("attention.resolve", {"transaction": options.transaction, "keep": options.keep})
    print("kept" if options.keep else "voided: the reversal goes to the host by itself")
    return 0


def _status(options: argparse.Namespace, _: HardwareFactory) -> int:
    status = ControlClient(load(options.config).socket.path).call("status")
    if options.json:
        print(json.dumps(status))
        return 0
    link, unsent = status["link"], status["unsent"]
    host = {True: "reached", False: f"not reached: {link['error']}", None: "not tried yet"}[link["online"]]
    sums = ", ".join(str(Amount(minor, currency(code))) for code, minor in unsent["sums"].items())
    print(f"terminal  {status['terminal']}, payterm {status['version']}")
    print(f"host      {host}")
    print(f"sync      {'running' if link['sync'] else 'not running: sales are stored and wait'}")
    print(f"unsent    {unsent['count']}{f' ({sums})' if sums else ''}{_age(unsent['oldest_ms'])}")
    for sale in status["attention"]:
        amount = Amount(sale["amount_minor"], currency(sale["currency"]))
        print(f"decide    {amount} {sale['state']} but never shown: payterm keep|void {sale['id']}")
    return 0


def _ledger_list(options: argparse.Namespace, _: HardwareFactory) -> int:
    sales = _transactions(load(options.config), options.limit)
    if options.json:
        print(json.dumps(sales))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("no.", "opened", "amount", "state", "card", "reference", "id", box=None, header_style="bold")
    for sale in sales:
        amount = Amount(sale["amount_minor"], currency(sale["currency"]))
        opened = datetime.fromtimestamp(sale["opened_at_ms"] / 1000).astimezone()
        card = f"{sale['scheme']} {sale['last4']}" if sale["scheme"] else ""
        table.add_row(
            str(sale["sequence"]),
            f"{opened:%Y-%m-%d %H:%M:%S}",
            str(amount),
            sale["state"],
            card,
            sale["reference"] or "",
            sale["id"],
        )
    Console().print(table)
    return 0


def _transactions(config: Config, limit: int) -> list[dict[str, Any]]:
    """From the running service; only when none runs, from the store itself under its lock."""
    client = ControlClient(config.socket.path)
    found: list[dict[str, Any]] = []
    try:
        while len(found) < limit:
            before = found[-1]["sequence"] if found else None
            page = client.call("ledger.list", {"limit": min(limit - len(found), 100), "before": before})["transactions"]
            found += page
            if not page:
                break
        return found
    except TerminalUnavailable:
        if not config.ledger.directory.exists():
            raise
    from terminal import app
    from terminal.ledger.errors import LedgerLocked
    from terminal.service import view

    try:
        with app.recovered_books(config, SystemClock(), system_entropy) as books:
            return [view(transaction) for transaction in books.ledger.transactions(limit=limit)]
    except LedgerLocked as error:
        raise TerminalUnavailable(f"{error} It does not answer on its socket, though: look at its log.") from error


def _keys_init(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal.ledger.keys import generate, generate_spool_key

    terminal, sync = options.directory / "terminal", options.directory / "sync"
    generate(terminal, system_entropy)
    generate_spool_key(sync, system_entropy)
    print(f"development keys are in {terminal} and {sync}; for production use systemd credentials")
    print(f"next: give the host {terminal / 'signing-key.pub'}, put its host-sealing-key and host-answer-key beside it")
    return 0


def _config_check(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal import emvsetup

    emvsetup.build(load(options.config))
    print(f"{options.config}: good")
    return 0


def _age(oldest_ms: int | None) -> str:
    if oldest_ms is None:
        return ""
    minutes = max(0, SystemClock().wall_ms() - oldest_ms) // 60_000
    return f", the oldest {minutes} min old"

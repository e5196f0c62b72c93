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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from terminal import VERSION
from terminal.clock import SystemClock, system_entropy
from terminal.commands import audit, day, emv, keys, ledger, privacy, queue, reconcile, sync
from terminal.commands.base import Commands, HardwareFactory, takes_json
from terminal.config import Config, load
from terminal.control import ControlClient
from terminal.errors import TerminalError
from terminal.money import Amount, currency, sum_of

DEFAULT_CONFIG: Final = Path("/etc/payterm/payterm.toml")
EXIT_NOT_MADE: Final = 1
_EXIT_USAGE: Final = 2
_MADE: Final = {"approved", "accepted", "settled"}
_REFUND_WAIT_S: Final = 10
_WAIT_MAX_S: Final = 60
_RESULT_WAIT_MS: Final = 30_000  # one long-poll; repeated until the device has decided


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
    commands = Commands(root.add_subparsers(title="commands", required=True, metavar="COMMAND"))

    commands.add("run", _run, "run the terminal service")
    commands.add("recover", _recover, "bring journal and ledger together after a power cut, then exit")

    sale = takes_json(commands.add("sale", _sale, "take a sale on the running terminal and wait for its end"))
    sale.add_argument("amount", help="as 12.50")
    sale.add_argument("currency", nargs="?", help="ISO 4217 code (default: the terminal's)")
    sale.add_argument("--reference", help="your own name for this sale; the same reference is never charged twice")

    takes_json(commands.add("status", _status, "how the running terminal is"))

    keep = commands.add("keep", _keep, "after a power cut, a sale that was never shown: the goods went, it stands")
    keep.add_argument("transaction", help="its id, as `payterm status` shows it")

    void = takes_json(commands.add("void", _void, "take a whole sale back, as if it had never been made"))
    refund = takes_json(commands.add("refund", _refund, "pay a sale back to its card, or a part of it"))
    for made in (void, refund):
        made.add_argument(
            "sale", type=_named, metavar="SALE", help="its number or id, as `payterm ledger list` shows it"
        )
        made.add_argument(
            "--wait", type=_seconds, default=_REFUND_WAIT_S, metavar="SECONDS",
            help="how long to wait for the host's word; it goes out by itself in any case (default: %(default)s)",
        )  # fmt: skip
    refund.add_argument("amount", nargs="?", help="as 12.50 (default: all that is left of the sale)")
    refund.add_argument("--reference", help="your own name for this refund; the same one is never paid back twice")

    seen = commands.add("acknowledge", _acknowledge, "you have seen that the host said no afterwards: warn no more")
    seen.add_argument("sale", type=_named, metavar="SALE", help="its number or id, as `payterm status` shows it")

    for part in (day, sync, queue, reconcile, ledger, audit, privacy, keys, emv):
        part.add(commands)

    config = commands.group("config", "the configuration file")
    config.add("check", _config_check, "read it, say what is wrong with it")
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


def _sale(options: argparse.Namespace, _: HardwareFactory) -> int:
    config = load(options.config)
    amount = Amount.parse(options.amount, currency(options.currency or config.terminal.currency))
    with _terminal(config) as client:
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


def _keep(options: argparse.Namespace, _: HardwareFactory) -> int:
    with _terminal(load(options.config)) as client:
        client.call("attention.resolve", {"transaction": options.transaction, "keep": True})
    print("kept: the sale stands")
    return 0


def _void(options: argparse.Namespace, _: HardwareFactory) -> int:
    with _terminal(load(options.config)) as client:
        sale = client.call("sale.void", {"sale": options.sale, "wait_ms": options.wait * 1000})
    if options.json:
        print(json.dumps(sale))
        return 0
    waits = "" if sale["state"] == "reversed" else "; the reversal is safe and goes to the host by itself"
    print(f"{_amount(sale)}: voided{waits}  {sale['id']}")
    return 0


def _refund(options: argparse.Namespace, _: HardwareFactory) -> int:
    config = load(options.config)
    asked = {"sale": options.sale, "reference": options.reference, "wait_ms": options.wait * 1000}
    with _terminal(config) as client:
        if options.amount is not None:
            # In the sale's currency, whose minor units only the terminal knows: nothing is paid back by asking.
            code = client.call("sale.result", _named_result(options.sale))["currency"]
            asked |= {"amount": Amount.parse(options.amount, currency(code)).minor, "currency": code}
        refund = client.call("sale.refund", asked)
    if options.json:
        print(json.dumps(refund))
    else:
        match refund["state"]:
            case "approved":
                said = "paid back"
            case "authorising":
                said = "recorded; it goes to the host by itself, after its sale"
            case state:
                said = f"{state} ({refund['reason']}): nothing is paid back"
        print(f"{_amount(refund)}: {said}  {refund['id']}")
    return EXIT_NOT_MADE if refund["state"] == "declined" else 0


def _acknowledge(options: argparse.Namespace, _: HardwareFactory) -> int:
    with _terminal(load(options.config)) as client:
        done = client.call("alert.acknowledge", {"transaction": options.sale})["acknowledged"]
    print("acknowledged" if done else "there was nothing to acknowledge")
    return 0


@contextlib.contextmanager
def _terminal(config: Config) -> Iterator[ControlClient]:
    """The running terminal."""
    with contextlib.closing(ControlClient(config.socket.path)) as client:
        yield client


def _amount(sale: dict[str, Any]) -> Amount:
    return Amount(sale["amount_minor"], currency(sale["currency"]))


def _named(text: str) -> int | str:
    """A transaction's number, or its id."""
    if text.isascii() and text.isdigit() and int(text):
        return int(text)
    try:
        return str(UUID(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a sale's number nor its id: payterm ledger list shows both"
        ) from None


def _named_result(sale: int | str) -> dict[str, Any]:
    return {"number": sale} if isinstance(sale, int) else {"transaction": sale}


def _seconds(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= _WAIT_MAX_S):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0 to {_WAIT_MAX_S}")
    return int(text)


def _status(options: argparse.Namespace, _: HardwareFactory) -> int:
    with _terminal(load(options.config)) as client:
        status = client.call("status")
    if options.json:
        print(json.dumps(status))
        return 0
    if status["trouble"]:
        print(f"storage   no sales are taken: {status['trouble']}")
        return EXIT_NOT_MADE
    link, unsent = status["link"], status["unsent"]
    host = {True: "reached", False: f"not reached: {link['error']}", None: "not tried yet"}[link["online"]]
    sums = ", ".join(sum_of(minor, currency(code)) for code, minor in unsent["sums"].items())
    print(f"terminal  {status['terminal']}, payterm {status['version']}")
    print(f"host      {host}")
    operator = status["operator"]
    if operator["revoked"]:
        print("REVOKED   by the operator: no sale is taken, what is stored is kept; ask the operator")
    if operator["wanted"] is not None and operator["wanted"] != operator["configuration"]:
        print(f"config    {operator['configuration'] or 'unnamed'}, the operator wants {operator['wanted']}")
    print(f"sync      {'running' if link['sync'] else 'not running: sales are stored and wait'}")
    print(f"unsent    {unsent['count']}{f' ({sums})' if sums else ''}{_age(unsent['oldest_ms'])}")
    storage = status["storage"]
    for trouble in (storage["second"], storage["damage"]):
        if trouble:
            print(f"storage   {trouble}")
    if storage["history"] != "whole":
        print(f"storage   the journals of terminal and sync do not fit ({storage['history']}): payterm audit verify")
    for sale in status["attention"]:
        print(f"decide    {_amount(sale)} {sale['state']} but never shown: payterm keep|void {sale['id']}")
    for lost in status["alerts"]:
        what = "sold, declined by the host since" if lost["kind"] == "sale" else "to be paid back, declined by the host"
        print(f"LOST      {_amount(lost)} {what}: payterm acknowledge {lost['sequence']}")
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

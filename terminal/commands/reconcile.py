"""`payterm reconcile`: do the terminal's books and the host's agree?

Exit codes: 0 they agree, 1 they do not, 3 the sync service does not answer, 4 the host was not reached or refused.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any, Final

from terminal.commands.base import Commands, HardwareFactory, configured, money, print_json, print_table, takes_json
from terminal.control import ControlClient

DIFFERENT: Final = 1
_WAIT_MS: Final = 600_000
_UNDER_WAY_SHOWN: Final = 10


def add(commands: Commands) -> None:
    made = takes_json(commands.add("reconcile", _reconcile, "compare the ledger with the host's books"))
    made.add_argument("--first", type=_number, metavar="NO", help="the number of a transaction to begin with")
    made.add_argument("--last", type=_number, metavar="NO", help="and of the last one (default: the newest)")
    made.add_argument("--days", type=_number, help="instead: of so many days back")
    made.add_argument(
        "--repair", action="store_true", help="send again what the host lacks and a person had to look at"
    )


def _reconcile(options: argparse.Namespace, _: HardwareFactory) -> int:
    asked = {name: getattr(options, name) for name in ("first", "last", "days", "repair")} | {"wait_ms": _WAIT_MS}
    with contextlib.closing(ControlClient(configured(options).sync.socket, unit="payterm-sync")) as client:
        report = client.call("reconcile.run", asked)
    differences = [each for each in report["differences"] if each["remedy"] != "nothing has to be done"]
    at_stripe = report["stripe"] or {}
    code = DIFFERENT if differences or report["more"] or at_stripe.get("differences") else 0
    if options.json:
        print_json(report)
        return code
    span = (
        f"transactions {report['first']} to {report['last']}" if report["compared"] or differences else "transactions"
    )
    for each in report["under_way"][:_UNDER_WAY_SHOWN]:
        print(f"transaction {each['sequence']} is {each['state']}: its answer is on its way")
    if len(report["under_way"]) > _UNDER_WAY_SHOWN:
        print(f"and {len(report['under_way']) - _UNDER_WAY_SHOWN} more are on their way")
    if not report["differences"]:
        print(f"{span}: {report['compared']} compared, the books agree")
    else:
        _print_differences("at the host", report["differences"])
    if "error" in at_stripe:
        print(f"Stripe: not compared. {at_stripe['error']}")
    elif at_stripe.get("differences"):
        _print_differences("at Stripe", at_stripe["differences"])
    elif at_stripe:
        waits = f", reports of {at_stripe['under_way']} are on their way" if at_stripe["under_way"] else ""
        print(f"Stripe: {at_stripe['compared']} sales compared, its records agree{waits}")
    for item in report["repaired"]:
        print(f"{item}: is sent again")
    if report["more"]:
        print("there is more than this: mend what is listed, then compare again")
    return code


def _print_differences(where: str, differences: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("no.", "here", where, "what it means, and what to do", box=None, header_style="bold")
    for each in differences:
        meaning = f"{each['meaning']}; {each['remedy']}"
        table.add_row(str(each["sequence"]), _side(each["ours"]), _side(each["theirs"]), meaning)
    print_table(table)


def _side(side: dict[str, Any] | None) -> str:
    return "nothing" if side is None else f"{side['state']}\n{money(side['amount_minor'], side['currency'])}"


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)

"""`payterm day`: what has been sold since the last day's end, and ending it.

Exit codes: 0 done, and the host has said nothing else; 1 the host holds other sums: `payterm reconcile` says which.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

from terminal.commands.base import Commands, HardwareFactory, configured, money, print_json, print_table, takes_json
from terminal.control import ControlClient

DIFFERS: Final = 1
_WAIT_S: Final = 10
_WAIT_MAX_S: Final = 60
_RANGES_SHOWN: Final = 8


def add(commands: Commands) -> None:
    group = commands.group("day", "what was sold since the last day's end, and ending the day")
    takes_json(group.add("totals", _totals, "what has been sold since the last day's end; changes nothing"))
    end = takes_json(group.add("end", _end, "end the day: one batch, which the host compares with its own books"))
    end.add_argument(
        "--wait", type=_seconds, default=_WAIT_S, metavar="SECONDS",
        help="how long to wait for the host's word; the batch goes out by itself in any case (default: %(default)s)",
    )  # fmt: skip
    takes_json(group.add("last", _last, "the last day's end, and what the host says of it"))


def _totals(options: argparse.Namespace, _: HardwareFactory) -> int:
    with _client(options) as client:
        day = client.call("day.show")["open"]
    if options.json:
        print_json(day)
        return 0
    since = "the beginning" if day["since_ms"] is None else _time(day["since_ms"])
    print(f"day {day['no']}, open since {since}: {_span(day)}")
    _print_sums(day)
    return 0


def _end(options: argparse.Namespace, _: HardwareFactory) -> int:
    with _client(options) as client:
        batch = client.call("day.end", {"wait_ms": options.wait * 1000})
    return _print_batch(batch, as_json=options.json)


def _last(options: argparse.Namespace, _: HardwareFactory) -> int:
    with _client(options) as client:
        batch = client.call("day.show")["last"]
    if batch is None:
        print("null" if options.json else "no day was ended yet")
        return 0
    return _print_batch(batch, as_json=options.json)


def _print_batch(batch: dict[str, Any], *, as_json: bool) -> int:
    code = DIFFERS if batch["decision"] == "differs" else 0
    if as_json:
        print_json(batch)
        return code
    print(f"day {batch['no']}, ended {_time(batch['taken_at_ms'])}: {_span(batch)}")
    _print_sums(batch)
    match batch["decision"]:
        case None:
            print("the host has not compared it yet: it is safe and goes out by itself, behind the sales in it")
        case "balanced":
            print("the host holds the same sums")
        case _:
            held = ", ".join(
                f"{each['count']} for {money(each['sum_minor'], each['currency'])}" for each in batch["host"]
            )
            print(f"THE HOST DIFFERS: it holds {held or 'nothing'}. No sale is lost here: payterm reconcile says which")
            if batch["missing"]:
                shown = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in batch["missing"][:_RANGES_SHOWN])
                print(f"of these it has nothing (not all of them need be sales): {shown}")
    return code


def _print_sums(day: dict[str, Any]) -> None:
    if not day["sold"] and not day["corrected"]:
        print("nothing was sold")
        return
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    table.add_column("scheme")
    table.add_column("number", justify="right")
    table.add_column("sum", justify="right")
    for name, figures in (("sold", day["sold"]), ("corrections of earlier days", day["corrected"])):
        for number, each in enumerate(figures):
            table.add_row(
                name if not number else "",
                each["scheme"],
                str(each["count"]),
                money(each["sum_minor"], each["currency"]),
            )
    codes = sorted({each["currency"] for each in day["sold"]})
    for code in codes:
        some = [each for each in day["sold"] if each["currency"] == code]
        if len(some) > 1:
            count, minor = (sum(each[name] for each in some) for name in ("count", "sum_minor"))
            table.add_row("total", "", str(count), money(minor, code), style="bold")
    print_table(table)


def _span(day: dict[str, Any]) -> str:
    if day["last"] < day["first"]:
        return "no transactions"
    return f"transactions {day['first']} to {day['last']}"


def _time(wall_ms: int) -> str:
    return datetime.fromtimestamp(wall_ms / 1000, UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def _seconds(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= _WAIT_MAX_S):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0 to {_WAIT_MAX_S}")
    return int(text)


@contextlib.contextmanager
def _client(options: argparse.Namespace) -> Iterator[ControlClient]:
    with contextlib.closing(ControlClient(configured(options).socket.path)) as client:
        yield client

"""`payterm queue`: what waits to be sent, item by item, and what a person decides about it.

The running service is asked; when none runs, the spool is opened here. An item is named by its id, by the beginning of
one that fits only one item, or by the number of its row.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from terminal.commands.base import (
    Ask,
    Commands,
    HardwareFactory,
    age,
    configured,
    money,
    print_json,
    print_table,
    queue,
    say,
    takes_json,
)
from terminal.errors import TerminalError

_PAGE: Final = 50  # what one answer of the socket holds
_PREFIX_MIN: Final = 4
_WIDE: Final = 110  # columns: from there on a reason fits beside the rest
_REASONS_MAX: Final = 10
_STYLES: Final = {"held": "bold red", "refused": "bold red", "ambiguous": "yellow", "sending": "cyan"}


class QueueError(TerminalError):
    """What was asked for cannot be done."""

    exit_code = 4


def add(commands: Commands) -> None:
    group = commands.group("queue", "what waits to be sent, item by item")

    listing = takes_json(group.add("list", _list, "everything that waits, oldest first"))
    listing.add_argument("--destination", help="only to this one: host or stripe")
    listing.add_argument(
        "--state", dest="in_state", help="only in this one: queued, sending, ambiguous, answered, refused, held"
    )
    listing.add_argument("--limit", type=_count, help="at most so many (default: all)")

    _named(takes_json(group.add("show", _show, "one item, with everything that is known of it")))
    for name, run, text in (
        ("retry", _retry, "send an item again that was refused or is held"),
        ("hold", _hold, "keep an item back until a person has looked at it"),
    ):
        made = _named(takes_json(group.add(name, run, text)))
        made.add_argument("--reason", required=True, help="why; it is written into the log")

    export = group.add("export", _export, "write every item, sealed as it is, as lines of JSON: for a move by hand")
    export.add_argument("file", type=Path, help="a new file; - for the standard output")


def _named(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    made.add_argument("item", metavar="ITEM", help="its id or the beginning of it, or the number of its row")
    return made


def _list(options: argparse.Namespace, _: HardwareFactory) -> int:
    with queue(configured(options)) as ask:
        items = list(_pages(ask, options.limit, destination=options.destination, state=options.in_state))
    if options.json:
        print_json(items)
        return 0
    if not items:
        print("nothing waits")
        return 0
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    is_wide = Console().width >= _WIDE
    table = Table(box=None, header_style="bold", pad_edge=False, expand=is_wide)
    for name in ("row", "no."):
        table.add_column(name, justify="right")
    for name in ("event", "to", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("age", "tries", "amount"):
        table.add_column(name, justify="right", no_wrap=True)
    if is_wide:
        table.add_column("why", overflow="ellipsis", no_wrap=True, ratio=1)  # what the others leave
    for item in items:
        table.add_row(
            str(item["row"]),
            str(item["number"]),
            _event(item["event"]),
            item["destination"],
            Text(item["state"], _STYLES.get(item["state"], "")),
            age(item["stored_ms"]),
            str(item["attempts"]),
            money(item["amount_minor"], item["currency"]),
            *((_why(item),) if is_wide else ()),
        )
    print_table(table)
    if not is_wide:
        reasons = [f"row {item['row']}: {_why(item)}" for item in items if _why(item)]
        for reason in reasons[:_REASONS_MAX]:
            print(reason)
        if len(reasons) > _REASONS_MAX:
            print(f"and so on, {len(reasons) - _REASONS_MAX} more: payterm queue show, or a wider terminal")
    return 0


def _show(options: argparse.Namespace, _: HardwareFactory) -> int:
    with queue(configured(options)) as ask:
        item = ask("queue.show", {"id": _id(ask, options.item)})
    _print(item, as_json=options.json)
    return 0


def _retry(options: argparse.Namespace, _: HardwareFactory) -> int:
    return _change(options, "queue.retry", "sent again by itself")


def _hold(options: argparse.Namespace, _: HardwareFactory) -> int:
    return _change(options, "queue.hold", "kept back; payterm queue retry sends it")


def _change(options: argparse.Namespace, do: str, said: str) -> int:
    with queue(configured(options)) as ask:
        item = ask(do, {"id": _id(ask, options.item), "reason": options.reason})
    if options.json:
        print_json(item)
    else:
        print(f"{item['id']}: {said}")
    return 0


def _export(options: argparse.Namespace, _: HardwareFactory) -> int:
    with queue(configured(options)) as ask:
        if str(options.file) == "-":
            for item in _exported(ask):
                print(json.dumps(item))
            return 0
        unfinished = options.file.with_name(options.file.name + ".new")
        if options.file.exists():
            raise QueueError(f"{options.file} is there already and was left as it is. Nothing was exported.")
        count = 0
        try:
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                for item in _exported(ask):
                    file.write(json.dumps(item) + "\n")
                    count += 1
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(options.file)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise QueueError(
                f"{options.file} could not be written ({error.strerror}): nothing was exported, the queue is as it was"
            ) from error
    print(f"{options.file}: {count} item{'' if count == 1 else 's'}")
    say("They are still queued here, too. The host books each once; whoever delivers them by hand needs no key.")
    return 0


def _pages(ask: Ask, limit: int | None = None, **only: str | None) -> Iterator[dict[str, Any]]:
    left, after = limit if limit is not None else sys.maxsize, None
    while left > 0:
        page = ask("queue.list", {"limit": min(left, _PAGE), "after": after, **only})
        yield from page["items"]
        left, after = left - len(page["items"]), page["more"]
        if after is None:
            return


def _exported(ask: Ask) -> Iterator[dict[str, Any]]:
    after = None
    while True:
        page = ask("queue.export", {"after": after})
        yield from page["items"]
        if (after := page["more"]) is None:
            return


def _id(ask: Ask, name: str) -> str:
    """The one item that is called so."""
    if name.isascii() and name.isdigit() and not name.startswith("0"):  # an id may begin with zeros, a row does not
        row = int(name)
        (*found,) = ask("queue.list", {"limit": 1, "after": max(0, row - 1)})["items"]
        if not found or found[0]["row"] != row:
            raise QueueError(f"no item that waits has the row {row}: payterm queue list shows them")
        return str(found[0]["id"])
    if name.count("/") > 1:
        return name  # whole, perhaps of one that is through
    if len(name) < _PREFIX_MIN:
        raise QueueError(f"{name!r} is too short: give {_PREFIX_MIN} characters at least, or the row's number")
    fits = [item["id"] for item in _pages(ask) if item["id"].startswith(name)]
    if not fits:
        raise QueueError(f"no item that waits begins with {name!r}: payterm queue list shows them")
    if len(fits) > 1:
        raise QueueError(f"{name!r} may be any of {len(fits)}: {', '.join(fits[:3])}{', ...' if len(fits) > 3 else ''}")
    return str(fits[0])


def _print(item: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(item)
        return
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in (
        ("id", item["id"]),
        ("row", item["row"]),
        ("envelope no.", item["number"]),
        ("state", item["state"]),
        ("amount", money(item["amount_minor"], item["currency"])),
        ("stored", f"{age(item['stored_ms'])} ago"),
        ("tries", item["attempts"]),
        ("next try", f"in {age(item['due_ms'])}" if item["due_ms"] else "when its turn comes"),
        ("why", _why(item)),
        ("urgent", "yes, a customer waits" if item["urgent"] else "no"),
        ("answered", "yes" if item["answered"] else "no"),
        ("receipt", item["receipt"] or ""),
        ("SHA-256", item["sha256"]),
    ):
        table.add_row(name, str(value))
    print_table(table)


def _event(event: str) -> str:
    """A refund's notice carries the refund's id: enough of it for a table."""
    return event.removeprefix("notice.").partition(".")[0]


def _why(item: dict[str, Any]) -> str:
    waits = f"after {item['waits_for'][:8]}" if item["waits_for"] else ""
    return waits or item["error"] or ""


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of items")
    return int(text)

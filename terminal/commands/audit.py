"""`payterm audit`: the journal as the trail of what happened, and whether anybody has changed it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from typing import Any, Final

from terminal.commands.base import (
    Ask,
    Commands,
    HardwareFactory,
    configured,
    print_json,
    records,
    takes_json,
    takes_state,
)

_PAGE: Final = 50  # records in one answer of the socket
_FOLLOW_S: Final = 1.0
_DAMAGED: Final = 1  # exit code
_TYPES: Final = ("open", "outcome", "card", "shown", "answer", "reversal", "event", "checkpoint")
_SERVICES: Final = ("terminal", "sync")


def add(commands: Commands) -> None:
    group = commands.group("audit", "the trail of what happened")
    show = takes_json(takes_state(group.add("show", _show, "print it, oldest first")))
    show.add_argument("--service", choices=_SERVICES, default="terminal", help="whose trail (default: %(default)s)")
    show.add_argument("--type", action="append", choices=_TYPES, help="only records of this type; may be repeated")
    show.add_argument("--what", action="append", metavar="WORD", help="only events of this name, as clock_set")
    show.add_argument("--transaction", metavar="ID", help="only what concerns this sale")
    show.add_argument("--since", metavar="WHEN", help="only from here on: a date as 2026-11-23, or with a time")
    show.add_argument("--after", type=int, default=None, metavar="RECORD", help="only after this record")
    show.add_argument("--last", type=int, default=None, metavar="COUNT", help="only so many of the latest records")
    show.add_argument("--follow", action="store_true", help="go on as records come, until interrupted")

    verify = takes_json(
        takes_state(group.add("verify", _verify, "check every record, signature and both journals' heads"))
    )
    verify.add_argument("--quiet", action="store_true", help="print nothing when all is well")


def _show(options: argparse.Namespace, _: HardwareFactory) -> int:
    since_ms = None if options.since is None else _moment_ms(options.since)
    wanted = {word.upper() for word in options.type or ()}
    for record in _sync_records(options) if options.service == "sync" else _records(options):
        if wanted and record["type"] not in wanted:
            continue
        if options.what and record["details"].get("what") not in options.what:
            continue
        if options.transaction and record["transaction"] != options.transaction:
            continue
        if since_ms is not None and record["wall_ms"] < since_ms:
            continue
        print(json.dumps(record) if options.json else line(record), flush=options.follow)
    return 0


def _records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with records(configured(options)) as ask:
        after = options.after
        if after is None:
            after = 0 if options.last is None else max(0, ask("audit.page", {"limit": 1})["last"] - options.last)
        while True:
            page = ask("audit.page", {"after": after, "limit": _PAGE})
            yield from page["records"]
            if page["records"]:
                after = page["records"][-1]["sequence"]
            elif options.follow:
                time.sleep(_FOLLOW_S)
            else:
                return


def _sync_records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Read from the sync service's own journal: it has no socket, and its journal can be read while it runs."""
    from terminal.config import credentials
    from terminal.ledger.keys import SPOOL_KEY, KeyStore
    from terminal.records import told
    from terminal.sync import journal

    config = configured(options)
    key = KeyStore(credentials(config.sync.keys)).secret(SPOOL_KEY)
    after = options.after or 0
    while True:
        with closing(journal.read(config.sync.directory, key)) as found:
            fresh = [told(record) for record in found if record.sequence > after]
        if options.last is not None and options.after is None:
            fresh, options.last = fresh[-options.last :], None
        yield from fresh
        after = max(after, *(record["sequence"] for record in fresh), 0)
        if not options.follow:
            return
        time.sleep(_FOLLOW_S)


def line(record: dict[str, Any]) -> str:
    """One record for a person: number, time (`~` where the clock was not set), type, and what it says."""
    moment = datetime.fromtimestamp(record["wall_ms"] / 1000).astimezone()
    known = " " if record["synchronised"] else "~"
    details = "  ".join(f"{name}={value}" for name, value in record["details"].items() if value is not None)
    sale = f"  {record['transaction']}" if record["transaction"] else ""
    return f"{record['sequence']:>8} {known}{moment:%Y-%m-%d %H:%M:%S} {record['type']:<10}{sale}  {details}"


def _verify(options: argparse.Namespace, _: HardwareFactory) -> int:
    with records(configured(options)) as ask:
        found = verified(ask)
    if options.json:
        print_json(found)
    elif found["first_bad"] is not None:
        print(f"not whole: {found['first_bad']}")
    elif not options.quiet:
        print(
            f"whole: {found['records']} records from {found['first']} to {found['last']}, "
            f"{found['checkpoints']} checkpoints among them"
        )
        if found["countersigned"]:
            print(
                f"the host has countersigned record {found['countersigned']}: nothing up to there was replaced unseen"
            )
        if found["restored"]:
            print(f"restored from the other copy: {', '.join(map(str, found['restored']))}")
    return 0 if found["first_bad"] is None else _DAMAGED


def verified(ask: Ask) -> dict[str, Any]:
    """Everything read and checked, piece by piece, so that selling goes on meanwhile."""
    from rich.console import Console
    from rich.progress import Progress

    position: dict[str, Any] | None = None
    total = {"records": 0, "checkpoints": 0, "restored": [], "first": None}
    with Progress(transient=True, disable=not sys.stderr.isatty(), console=Console(stderr=True)) as progress:
        task = progress.add_task("reading", total=None)
        while True:
            step = ask("audit.verify", {"after": position})
            total["records"] += step["records"]
            total["checkpoints"] += step["checkpoints"]
            total["restored"] += step["restored"]
            total["first"] = step["first"] if total["first"] is None else total["first"]
            progress.update(task, completed=step["position"]["sequence"], total=step["last"])
            if step["done"] or step["first_bad"] is not None:
                return {
                    **total,
                    "last": step["position"]["sequence"],
                    "first_bad": step["first_bad"],
                    "countersigned": step["countersigned"],
                }
            position = step["position"]


def _moment_ms(text: str) -> int:
    try:
        return int(datetime.fromisoformat(text).timestamp() * 1000)
    except ValueError:
        from terminal.config import ConfigError

        raise ConfigError(
            f"--since {text}: no date; write it as 2026-11-23 or 2026-11-23T14:30. Nothing was read."
        ) from None

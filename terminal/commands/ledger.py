"""`payterm ledger`: what it holds, whether it is whole, a copy of it, and that copy brought back."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from terminal.clock import SystemClock, system_entropy
from terminal.commands.base import (
    Ask,
    Commands,
    HardwareFactory,
    configured,
    print_json,
    print_table,
    records,
    say,
    takes_json,
    takes_state,
)
from terminal.money import Amount, currency

_LIMIT: Final = 20
_PAGE: Final = 100  # what one answer of the socket holds
_DAMAGED: Final = 1  # exit code
_BACKUP_WAIT_MS: Final = 600_000  # a million records from an SD card


def add(commands: Commands) -> None:
    group = commands.group("ledger", "what the ledger holds, and whether it is whole")

    listing = takes_json(takes_state(group.add("list", _list, "list the latest transactions")))
    listing.add_argument("--limit", type=int, help=f"how many (default: {_LIMIT}, with --state all)")

    takes_json(takes_state(group.add("check", _check, "read everything, compare both copies, repair what can be")))
    takes_state(
        group.add("rebuild", _rebuild, "make ledger.db anew from journal and archive (with the service stopped)")
    )

    takes_state(group.add("make-second", _make_second, "make the journal's second copy where the configuration says"))

    backup = takes_json(takes_state(group.add("backup", _backup, "write a sealed copy of everything into one file")))
    backup.add_argument("file", type=Path, help="a new file, best on another medium; keep the keys elsewhere")

    restore = takes_state(group.add("restore", _restore, "bring a backup back, under a new epoch (service stopped)"))
    restore.add_argument("file", type=Path, help="what `payterm ledger backup` wrote")


def _list(options: argparse.Namespace, _: HardwareFactory) -> int:
    limit = options.limit if options.limit is not None else sys.maxsize if options.state else _LIMIT
    with records(configured(options)) as ask:
        sales = _transactions(ask, limit)
    if options.json:
        print_json(sales)
        return 0
    from rich.table import Table

    table = Table("no.", "opened", "amount", "state", "card", "reference", "id", box=None, header_style="bold")
    for sale in sales:
        card = f"{sale['scheme']} {sale['last4'] or ''}" if sale["scheme"] else ""
        table.add_row(
            str(sale["sequence"]),
            opened_at(sale),
            str(Amount(sale["amount_minor"], currency(sale["currency"]))),
            sale["state"],
            card,
            sale["reference"] or "",
            sale["id"],
        )
    print_table(table)
    return 0


def opened_at(sale: dict[str, Any]) -> str:
    """When, with a question mark where no clock was set."""
    moment = datetime.fromtimestamp(sale["opened_at_ms"] / 1000).astimezone()
    return f"{moment:%Y-%m-%d %H:%M:%S}{'' if sale['time_known'] else '?'}"


def _transactions(ask: Ask, limit: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while len(found) < limit:
        before = found[-1]["sequence"] if found else None
        page = ask("ledger.list", {"limit": min(limit - len(found), _PAGE), "before": before})["transactions"]
        found += page
        if not page:
            break
    return found


def _check(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal.commands.audit import verified

    with records(configured(options)) as ask:
        found = {**ask("ledger.check", {"wait_ms": _BACKUP_WAIT_MS}), **verified(ask)}
    whole = found["first_bad"] is None and found["database"] == "whole"
    if options.json:
        print_json({**found, "whole": whole})
        return 0 if whole else _DAMAGED
    from rich.table import Table

    table = Table("what", "how it is", box=None, header_style="bold")
    table.add_row("journal", found["first_bad"] or f"whole: {found['records']} records from {found['first']}")
    table.add_row("ledger.db", found["database"])
    table.add_row("restored", ", ".join(map(str, found["restored"])) or "nothing had to be")
    if found["lost_payloads"]:
        table.add_row(
            "lost", f"what records {', '.join(map(str, found['lost_payloads']))} said of the card, nothing of the money"
        )
    table.add_row("free", f"{found['free_slots']} of {found['slots']} slots")
    table.add_row("alignment", found["alignment"])
    table.add_row("second journal", found["second"])
    table.add_row("archive", f"{found['segments']} segments, up to record {found['archived']}")
    table.add_row("countersigned", f"up to record {found['countersigned']}" if found["countersigned"] else "never")
    table.add_row("waiting", f"{found['unsent']} for the host, {found['unshown']} for keep or void")
    print_table(table)
    return 0 if whole else _DAMAGED


def _make_second(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal.config import ConfigError
    from terminal.ledger.medium import FileMedium, storage_errors

    config = configured(options)
    path = config.ledger.second_journal
    if path is None:
        raise ConfigError("second_journal is not set in [ledger]. Nothing was made.")
    if path.exists():
        raise ConfigError(f"{path} is there already and was left as it is. Nothing was made.")
    with storage_errors():
        FileMedium.create(path, config.ledger.journal_mib << 20).close()
    print(f"{path} is made: restart payterm, it is brought up to date within a day and `payterm ledger check` says so")
    return 0


def _rebuild(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal import app

    config = configured(options)
    aside = app.set_database_aside(config)
    with app.recovered_books(config, SystemClock(), system_entropy) as books:
        count = books.ledger.recovery.redone
    kept = f"; the former one is {aside.name}, remove it when nobody needs it any more" if aside else ""
    print(f"ledger.db holds {count} records again{kept}")
    return 0


def _backup(options: argparse.Namespace, _: HardwareFactory) -> int:
    with records(configured(options)) as ask:
        made = ask("ledger.backup", {"path": str(options.file.absolute()), "wait_ms": _BACKUP_WAIT_MS})
    if options.json:
        print_json(made)
    else:
        print(f"{options.file}: {made['records']} records, read back and whole")
        say(made["keys_needed"])
    return 0


def _restore(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal import app

    done = app.restore(configured(options), options.file, SystemClock(), system_entropy)
    print(
        f"{done.records} records are back, {done.newer} of them newer than the backup; this is epoch {done.epoch} now"
    )
    if done.replaced is not None:
        print(f"what was there before is in {done.replaced}: keep it until the host has confirmed everything")
    if done.unsent:
        print(f"{done.unsent} sales wait for the host and go by themselves: each is booked once, even if sent before")
    return 0

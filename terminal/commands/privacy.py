"""`payterm privacy`: what is stored of one cardholder, and its erasure (docs/compliance.md)."""

from __future__ import annotations

import argparse

from terminal.commands.base import Commands, HardwareFactory, configured, print_json, records, takes_json, takes_state


def add(commands: Commands) -> None:
    group = commands.group("privacy", "what is stored of one cardholder")
    export = takes_state(group.add("export", _export, "print it as JSON"))
    export.add_argument("card_ref", help="the host's name for the card, as on a receipt or from the host's records")
    erase = takes_json(takes_state(group.add("erase", _erase, "erase what names the card; amounts and times stay")))
    erase.add_argument("card_ref", help="the host's name for the card")


def _export(options: argparse.Namespace, _: HardwareFactory) -> int:
    with records(configured(options)) as ask:
        print_json(ask("privacy.export", {"card_ref": options.card_ref}))
    return 0


def _erase(options: argparse.Namespace, _: HardwareFactory) -> int:
    with records(configured(options)) as ask:
        done = ask("privacy.erase", {"card_ref": options.card_ref})
    if options.json:
        print_json(done)
        return 0
    print(f"{done['erased']} sales no longer name their card, in the ledger, the journal and the archive")
    if done["kept"]:
        print(f"{done['kept']} still wait for the host and keep it until they are answered: ask again then")
    print("backups made before still hold it until they are replaced; the host has its own records")
    return 0

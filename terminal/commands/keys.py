"""`payterm keys`: which keys there are, a new data key, the host's new key.

No command shows a key. Where systemd makes the keys from encrypted credentials, root must do what changes them: the
commands then print the script.
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path

from terminal.clock import system_entropy
from terminal.commands.base import (
    Commands,
    HardwareFactory,
    configured,
    print_json,
    print_table,
    records,
    say,
    takes_json,
)
from terminal.config import Config, ConfigError, credentials

_HOST_KEYS = ("host-sealing-key", "host-answer-key")
_TROUBLE = 1  # exit code


def add(commands: Commands) -> None:
    group = commands.group("keys", "keys of this terminal")
    init = group.add("init", _init, "make development keys (systemd credentials are for production)")
    init.add_argument("directory", type=Path, help="a directory outside the state; files are made with mode 0600")

    takes_json(group.add("list", _list, "name them, never show them"))

    rotate = group.add("rotate", _rotate, "make a new data key; what is stored moves to it while selling goes on")
    rotate.add_argument("--script", action="store_true", help="print what root is to run where systemd keeps the keys")

    retire = group.add("retire", _retire, "remove a retired data key that nothing is sealed under any more")
    retire.add_argument("id", help="as `payterm keys list` shows it")
    retire.add_argument("--script", action="store_true", help="print what root is to run where systemd keeps the keys")

    bring = group.add("import-host-key", _import, "take over a new public key of the host")
    bring.add_argument("which", choices=_HOST_KEYS)
    bring.add_argument("file", type=Path, help="the public key, PEM")
    bring.add_argument("--fingerprint", help="as the host's operator gave it out, compared by a person")
    bring.add_argument("--root", type=Path, help="instead: the configured root's public key, PEM")
    bring.add_argument("--signature", type=Path, help="with --root: its signature over the key (64 bytes)")
    bring.add_argument("--directory", type=Path, help="where the keys are, if it is not where the configuration says")


def _init(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal.ledger.keys import generate, generate_spool_key

    terminal, sync = options.directory / "terminal", options.directory / "sync"
    generate(terminal, system_entropy)
    generate_spool_key(sync, system_entropy)
    print(f"development keys are in {terminal} and {sync}; for production use systemd credentials")
    print(f"next: give the host {terminal / 'signing-key.pub'}, put its host-sealing-key and host-answer-key beside it")
    return 0


def _list(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal.ledger.keys import inventory

    found = inventory(credentials(configured(options).ledger.keys))
    if options.json:
        import msgspec

        print_json([msgspec.to_builtins(each) for each in found])
        return _TROUBLE if any(each.problem for each in found) else 0
    from rich.table import Table

    table = Table("name", "kind", "state", "id or fingerprint", "from", "", box=None, header_style="bold")
    for each in found:
        moment = datetime.fromtimestamp((each.modified_ms or 0) / 1000).astimezone()
        since = f"{moment:%Y-%m-%d}" if each.modified_ms is not None else ""
        table.add_row(each.name, each.kind, each.state.value, each.identity or "", since, each.problem or "")
    print_table(table)
    return _TROUBLE if any(each.problem for each in found) else 0


def _rotate(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal.ledger.keychanges import credential_rotation, rotate_data_key

    config = configured(options)
    if options.script:
        print(credential_rotation(_current(config)), end="")
        return 0
    done = rotate_data_key(credentials(config.ledger.keys), system_entropy)
    print(f"the data key is {done.current.hex()} now, {done.retired.hex()} is retired")
    print("restart payterm: it seals under the new key from then on, and moves what is stored while it sells")
    print("the retired key is needed until `payterm keys retire` lets it go, and for every backup made under it")
    return 0


def _retire(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal.ledger.keychanges import credential_retirement, retire

    config = configured(options)
    try:
        id_ = bytes.fromhex(options.id)
    except ValueError:
        raise ConfigError(f"{options.id}: no id of a key, which has 8 hex digits. Nothing was removed.") from None
    with records(config) as ask:
        use = ask("keys.use", {})
    sealed = sum(use[where].get(id_.hex(), 0) for where in ("cells", "records", "archive"))
    sealing = bytes.fromhex(use["current"])
    if options.script:
        print(credential_retirement(id_, sealed=sealed, sealing=sealing), end="")
        return 0
    retire(credentials(config.ledger.keys), id_, sealed=sealed, sealing=sealing)
    print(f"the retired data key {id_.hex()} is gone: backups made under it can no longer be read")
    return 0


def _import(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal.ledger.keychanges import Compared, Signed, import_host_key, read_host_key
    from terminal.ledger.keys import fingerprint

    config = configured(options)
    content = options.file.read_bytes()
    shown = fingerprint(read_host_key(options.which, content))
    if options.root is not None:
        if options.signature is None or config.host.root_fingerprint is None:
            raise ConfigError(
                "--root takes --signature, and host.root_fingerprint in the configuration. Nothing was imported."
            )
        proof: Compared | Signed = Signed(
            root_pem=options.root.read_bytes(),
            root_fingerprint=config.host.root_fingerprint,
            signature=options.signature.read_bytes(),
        )
    else:
        proof = Compared(options.fingerprint or _asked(options.which, shown))
    directory = options.directory or credentials(config.ledger.keys)
    change = import_host_key(directory, options.which, content, proof)
    if change.kept_as is None and change.previous == change.current:
        print(f"{change.name} is this key already")
        return 0
    print(f"{change.name}: {change.current}")
    if change.previous is not None:
        print(f"before: {change.previous}, kept as {change.kept_as}")
    print("next: put the new fingerprint into the configuration ([host]) and restart payterm")
    return 0


def _asked(which: str, shown: str) -> str:
    """A person at a terminal compares; a script must say what it expects."""
    if not sys.stdin.isatty():
        raise ConfigError(
            f"{which}: give, with --fingerprint, what the host's operator gave out. Nothing was imported."
        )
    say(f"{which} has the fingerprint\n  {shown}\nCompare it with what the host's operator gave out, by another way.")
    if input("Is it the same? Type yes: ").strip().lower() != "yes":
        raise ConfigError("not confirmed. Nothing was imported.")
    return shown


def _current(config: Config) -> bytes:
    from terminal.ledger.keys import DATA_KEY, KeyStore

    return KeyStore(credentials(config.ledger.keys)).keyring(DATA_KEY).current.id

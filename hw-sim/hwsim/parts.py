"""Two parts of the simulator by themselves: a card that answers APDUs, and the PN532 on a pseudo-terminal.

    $ echo 00A404000E325041592E5359532E444446303100 | payterm-sim card visa-credit
    $ payterm-sim pn532 mastercard-debit --link /tmp/nfc      # then: python -m nfc --device tty:...

Both take their orders as lines on standard input, so that a script or a person can drive them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, TextIO

from hwsim.cards import designs
from hwsim.cards.bureau import Bureau, Scheme
from hwsim.cards.card import Card
from hwsim.cards.contact import Protocol
from hwsim.cards.iso14443 import ProximityCard
from hwsim.cards.personalise import personalise
from hwsim.cards.profile import CardProfile
from hwsim.pn532 import Pn532
from terminal.cli import stop_on_signals
from terminal.clock import system_entropy

_DEFAULT: Final = "visa-credit"
_USAGE: Final = 2
_APDU_BYTES_MAX: Final = 261  # a short command with 255 bytes of data and Le


class NoSuchCard(Exception):
    """Neither a design nor a file. The message says what there is."""


def load(name: str) -> Card:
    """A card by its design's name, with keys of its own, or from the file of one that was personalised before."""
    path = Path(name)
    if path.suffix == ".json":
        try:
            return Card(CardProfile.load(path), system_entropy, Protocol.T1)
        except (OSError, ValueError) as error:
            raise NoSuchCard(f"{name} is no card that can be read: {error}") from error
    if name not in designs.names():
        raise NoSuchCard(
            f"there is no card {name!r}: take the JSON file of one, or {', '.join(sorted(designs.names()))}"
        )
    design = designs.load(name)
    visa = Bureau.create(system_entropy)
    bureau = visa if design.scheme is Scheme.VISA else Bureau.create(system_entropy, scheme=design.scheme)
    return Card(personalise(bureau, system_entropy, design), system_entropy, Protocol.T1)


# ---- the card


def card(arguments: Sequence[str] | None = None) -> int:
    """`payterm-sim card`."""
    parser = argparse.ArgumentParser(
        prog="payterm-sim card",
        description="A payment card: an APDU in hex a line on standard input, its answer on standard output. "
        "The line `reset` powers it off and on. A card from a file keeps what its chip has counted.",
    )
    parser.add_argument("card", nargs="?", default=_DEFAULT, help="a design, or a JSON file (default: %(default)s)")
    parser.add_argument("--contact", action="store_true", help="through its contacts, not its antenna")
    parser.add_argument("--designs", action="store_true", help="list the designs, and exit")
    options = parser.parse_args(arguments)
    if options.designs:
        print("\n".join(sorted(designs.names())))
        return 0
    try:
        held = load(options.card)
    except NoSuchCard as error:
        print(f"payterm-sim card: {error}", file=sys.stderr)
        return _USAGE
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        bad = _talk(held, sys.stdin, sys.stdout, contact=options.contact)
    if options.card.endswith(".json"):
        held.profile.save(Path(options.card))
    return 1 if bad else 0


def _talk(held: Card, lines: Iterable[str], out: TextIO, *, contact: bool) -> int:
    """Answer until the lines end; how many of them were no command."""
    bad = 0
    _power_up(held, out, contact=contact)
    for line in lines:
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if text == "reset":
            _power_up(held, out, contact=contact)
            continue
        try:
            command = bytes.fromhex(text)
        except ValueError:
            command = b""
        if not 4 <= len(command) <= _APDU_BYTES_MAX:  # CLA INS P1 P2
            bad += 1
            print(f"payterm-sim card: {text[:40]!r} is no APDU in hex: the card was not asked", file=sys.stderr)
            continue
        answer = held.contact.apdu(command) if contact else held.contactless.apdu(command)
        print(answer.hex().upper(), file=out, flush=True)
    return bad


def _power_up(held: Card, out: TextIO, *, contact: bool) -> None:
    if contact:
        held.contact.reset(cold=True)
        print(f"# ATR {held.contact.atr.hex().upper()}", file=out, flush=True)
    else:
        held.contactless.reset()


# ---- the chip


def pn532(arguments: Sequence[str] | None = None) -> int:
    """`payterm-sim pn532`."""
    parser = argparse.ArgumentParser(
        prog="payterm-sim pn532",
        description="A PN532 on a pseudo-terminal, for nfcpy or anything else that speaks to one. Its first line says "
        "where to open it. Orders on standard input: present CARD, remove, unplug, replug, wedge, mend, quit.",
    )
    parser.add_argument("cards", nargs="*", metavar="CARD", help="in the field from the start: designs, or JSON files")
    parser.add_argument("--link", type=Path, metavar="PATH", help="a name of its own: a symlink to the pseudo-terminal")
    options = parser.parse_args(arguments)
    try:
        cards = [load(name) for name in options.cards]
    except NoSuchCard as error:
        print(f"payterm-sim pn532: {error}", file=sys.stderr)
        return _USAGE
    chip = Pn532(options.link)
    for each in cards:
        chip.present(ProximityCard(each.contactless))
    with stop_on_signals() as stop:
        serving = threading.Thread(target=chip.serve, name="pn532", daemon=True)
        serving.start()
        print(chip.path, flush=True)
        threading.Thread(target=_obey, args=(chip, sys.stdin, stop), name="orders", daemon=True).start()
        stop.wait()
        chip.stop()
        serving.join()
    chip.close()
    return 0


def _obey(chip: Pn532, lines: Iterable[str], stop: threading.Event) -> None:
    """Orders, one a line, until they end; the chip goes on without them."""
    for line in lines:
        match line.split():
            case ["present", name]:
                try:
                    chip.present(ProximityCard(load(name).contactless))
                except NoSuchCard as error:
                    print(f"payterm-sim pn532: {error}", file=sys.stderr)
            case ["remove"]:
                chip.remove()
            case ["unplug"]:
                chip.unplug()
            case ["replug"]:
                chip.replug()
            case ["wedge"]:
                chip.wedge()
            case ["mend"]:
                chip.behave()
            case ["quit"]:
                stop.set()
            case []:
                pass
            case words:
                known = "present CARD, remove, unplug, replug, wedge, mend, quit"
                print(f"payterm-sim pn532: there is no order {' '.join(words)!r}: {known}", file=sys.stderr)

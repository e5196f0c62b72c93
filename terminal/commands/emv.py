"""`payterm emv`: what cards and terminals say, explained.

Commands of the laboratory: they need no configuration, no keys and no ledger.
"""

from __future__ import annotations

import argparse

from terminal.commands import replay
from terminal.commands.base import Commands, HardwareFactory, takes_json


def add(commands: Commands) -> None:
    group = commands.group("emv", "look at EMV data")
    decode = takes_json(group.add("decode", _decode, "print data objects, APDUs, ATR or ATS as a tree, explained"))
    decode.add_argument(
        "hex", nargs="+", metavar="HEX", help="hexadecimal, blanks and colons as you like; - reads standard input"
    )
    kind = decode.add_mutually_exclusive_group()
    kind.add_argument("--tag", metavar="TAG", help="it is the value of this data object alone, as --tag 95")
    kind.add_argument("--dol", action="store_true", help="it is a data object list")
    kind.add_argument(
        "--apdu", action="store_true", help="it is a command or a response, or one a line of a whole exchange"
    )
    kind.add_argument("--sw", action="store_true", help="it is a status word")
    kind.add_argument("--atr", action="store_true", help="it is an ATR")
    kind.add_argument("--ats", action="store_true", help="it is an ATS")
    decode.add_argument(
        "--kernel", type=int, choices=(2, 3), help="whose meaning a tag has (default: by the AID, if one is there)"
    )
    decode.add_argument("--show-pan", action="store_true", help="show card data whole; a PIN is never shown")
    replay.add(group)


def _decode(options: argparse.Namespace, _: HardwareFactory) -> int:
    from terminal.commands import emv_decode

    return emv_decode.run(options)

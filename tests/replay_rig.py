"""Replay files in a few lines: defaults for everything that a test does not speak of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from emv_rig import TERMINAL, Answering, Pki

from terminal.emv.apdu import Command
from terminal.replay import formats, run

AID = "A0000000031010"
PSE = "00A404000E315041592E5359532E4444463031"
PPSE = "00A404000E325041592E5359532E444446303100"


def file_of(**keys: Any) -> dict[str, Any]:
    """A contact file for a terminal of the tests; None takes a key out."""
    ca_key = Pki().ca_key
    made = {
        "interface": "contact",
        "terminal": {f"{tag:02X}": value.hex().upper() for tag, value in TERMINAL.items()},
        "transaction": {"9F02": "000000001250", "9A": "260314", "9C": "00", "5F2A": "0978", "9F21": "150926"},
        "aids": [{"aid": AID, "partial": True, "tags": {"9F09": "0002"}, "limits": {"terminal_floor": 10_000}}],
        "capks": [
            {
                "rid": ca_key.rid.hex().upper(),
                "index": f"{ca_key.index:02X}",
                "modulus": ca_key.modulus.hex().upper(),
                "exponent": ca_key.exponent.hex().upper(),
            }
        ],
        "unpredictable_numbers": ["11223344"],
        "clock": "2026-03-14T15:09:26",
        "exchanges": [],
        **keys,
    }
    return {key: value for key, value in made.items() if value is not ...}


def said(*pairs: tuple[str, str | None]) -> list[dict[str, Any]]:
    return [{"command": command, "response": response} for command, response in pairs]


def decoded(file: Mapping[str, Any]) -> formats.ReplayFile:
    return formats.decode(json.dumps(file).encode(), formats.ReplayFile, "file")


def replayed(**keys: Any) -> dict[str, Any]:
    return run.replay(decoded(file_of(**keys)), show_pan=True)


def conversation(make: Callable[[], Answering], **keys: Any) -> dict[str, Any]:
    """The file in which the card that `make` makes is asked exactly what the kernel asks it."""
    commands: list[str] = []
    while len(commands) < 200:
        card = make()  # from the start every time: a card has a state
        exchanges = said(*((command, answer(card, command)) for command in commands))
        found = replayed(**keys, exchanges=exchanges)["mismatch"]
        if found is None:
            return file_of(**keys, exchanges=exchanges)
        assert found["expected"] is None, found
        commands.append(found["got"])
    raise AssertionError("the kernel does not come to an end")


def answer(card: Answering, command: str) -> str:
    given = card.answer(parsed(bytes.fromhex(command)))
    return f"{given.data.hex().upper()}{given.sw:04X}"


def parsed(raw: bytes) -> Command:
    cla, ins, p1, p2, *body = raw
    if len(body) <= 1:
        return Command(cla, ins, p1, p2, le=body[0] if body else None)
    size = body[0]
    return Command(cla, ins, p1, p2, bytes(body[1 : 1 + size]), body[1 + size] if len(body) > 1 + size else None)

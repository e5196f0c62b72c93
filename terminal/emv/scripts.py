"""Issuer scripts (EMV 4.4 Book 3, 10.10): commands from the issuer, carried to the card as they are.

The terminal understands none of them. It sends one after the other, stops a script at the first that fails, goes on
with the next script, and reports.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from terminal.emv import tlv
from terminal.emv.apdu import CardRemoved, Command, Exchange, transceive
from terminal.emv.tags import Tag
from terminal.emv.tlv import TlvError

_NOT_PERFORMED, _FAILED, _SUCCESSFUL = 0x00, 0x10, 0x20  # high nibble of a result (Book 4, A5)
_COMMAND_NUMBER_MAX: Final = 0x0F  # low nibble: the failing command, F for the fifteenth and any later one
_GOES_ON: Final = frozenset({0x90, 0x62, 0x63})  # SW1


class _Script(NamedTuple):
    identifier: bytes
    commands: tuple[Command, ...]


def run(scripts: Iterable[bytes]) -> Exchange[bytes]:
    """Send the contents of templates 71 or 72. Returns Issuer Script Results 9F5B, five bytes a script.

    A card that vanishes fails the script: what that means is for whoever still needs the card.
    """
    results = b""
    for script in scripts:
        try:
            identifier, commands = _parse(script)
        except TlvError:
            results += bytes((_NOT_PERFORMED,)) + bytes(4)
        else:
            results += bytes(((yield from _perform(commands)),)) + identifier
    return results


def succeeded(results: bytes) -> bool:
    """Whether every script came to its end."""
    return all(result & 0xF0 == _SUCCESSFUL for result in results[::5])


def _parse(script: bytes) -> _Script:
    """The identifier, zeros if there is none, and the commands. Raises `TlvError` if one is no command."""
    nodes = tlv.parse(script)
    identifier = next((node.value for node in nodes if node.tag == Tag.ISSUER_SCRIPT_IDENTIFIER), bytes(4))
    if len(identifier) != Tag.ISSUER_SCRIPT_IDENTIFIER.length_max:
        raise TlvError("a script identifier has another length than 4 bytes")
    return _Script(identifier, tuple(_command(node.value) for node in nodes if node.tag == Tag.ISSUER_SCRIPT_COMMAND))


def _command(raw: bytes) -> Command:
    """A command APDU, short form (Book 1, 9.4.1)."""
    if len(raw) < 4:
        raise TlvError("a script command is shorter than a header")
    cla, ins, p1, p2, *body = raw
    if len(body) <= 1:
        return Command(cla, ins, p1, p2, le=body[0] if body else None)
    size, rest = body[0], bytes(body[1:])
    if size == 0 or len(rest) not in {size, size + 1}:
        raise TlvError("a script command has another length than it states")
    return Command(cla, ins, p1, p2, rest[:size], rest[size] if len(rest) > size else None)


def _perform(commands: tuple[Command, ...]) -> Exchange[int]:
    for number, command in enumerate(commands, start=1):
        try:
            response = yield from transceive(command)
        except CardRemoved:
            return _FAILED | min(number, _COMMAND_NUMBER_MAX)
        if response.sw >> 8 not in _GOES_ON:
            return _FAILED | min(number, _COMMAND_NUMBER_MAX)
    return _SUCCESSFUL

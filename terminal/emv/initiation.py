"""Initiate application processing (EMV 4.4 Book 3, 10.1): GET PROCESSING OPTIONS, the same for every kernel.

What the PDOL is answered with, what a status word means, and which objects must come back is each kernel's affair.
"""

from __future__ import annotations

from typing import Final

from terminal.emv import tlv
from terminal.emv.apdu import Command
from terminal.emv.records import CardFault, CardObjects
from terminal.emv.tags import Tag

COMMAND_DATA_MAX: Final = 255  # bytes in a short command APDU


def get_processing_options(pdol_data: bytes) -> Command:
    """GET PROCESSING OPTIONS (Book 3, 6.5.8). Raises `CardFault` if the card asks for more than a command can hold."""
    data = tlv.encode(Tag.COMMAND_TEMPLATE, pdol_data)
    if len(data) > COMMAND_DATA_MAX:
        raise CardFault("parse_error")
    return Command(0x80, 0xA8, 0x00, 0x00, data, le=0)


def receive_processing_options(data: bytes, card: CardObjects) -> None:
    """Either response format (Book 3, 6.5.8.4). Raises `CardFault`, `TlvError`."""
    nodes = tlv.parse(data)
    if len(nodes) != 1:
        raise CardFault("parse_error")
    match nodes[0]:
        case tlv.Node(Tag.RESPONSE_FORMAT_2, _, children):
            card.receive(children)
        case tlv.Node(Tag.RESPONSE_FORMAT_1, value) if len(value) >= 2:
            card.receive([tlv.Node(Tag.AIP, value[:2]), tlv.Node(Tag.AFL, value[2:])])
        case _:
            raise CardFault("parse_error")

"""Command APDUs as a card takes them apart, and the status words that it answers with (ISO/IEC 7816-4, 5)."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class StatusWord(IntEnum):
    """SW1 SW2 (ISO/IEC 7816-4, 5.6), as far as these cards use them."""

    OK = 0x9000
    MORE_DATA = 0x6100  # the lower byte is how much; T=0
    SELECTED_BLOCKED = 0x6283
    AUTHENTICATION_FAILED = 0x6300
    WRONG_LENGTH = 0x6700
    METHOD_BLOCKED = 0x6983
    TRY_ANOTHER_INTERFACE = 0x6984
    DATA_UNUSABLE = 0x6984
    CONDITIONS_NOT_SATISFIED = 0x6985
    WRONG_MAC = 0x6988
    WRONG_DATA = 0x6A80
    NOT_SUPPORTED = 0x6A81
    NOT_FOUND = 0x6A82
    RECORD_NOT_FOUND = 0x6A83
    WRONG_PARAMETERS = 0x6A86
    DATA_NOT_FOUND = 0x6A88
    WRONG_LE = 0x6C00  # the lower byte is the right one
    WRONG_INSTRUCTION = 0x6D00
    WRONG_CLASS = 0x6E00


class Refused(Exception):
    """The command ends here with this status word; state and counter stay as they are."""

    def __init__(self, sw: int) -> None:
        super().__init__(f"{sw:04X}")
        self.sw = sw


class Command(NamedTuple):
    """A command without the lengths that transport adds."""

    cla: int
    ins: int
    p1: int
    p2: int
    data: bytes

    @property
    def header(self) -> bytes:
        """CLA INS P1 P2 Lc: what a MAC covers."""
        return bytes((self.cla, self.ins, self.p1, self.p2, len(self.data)))


def parse(command: bytes) -> Command:
    """The four short cases of ISO/IEC 7816-4, 5.1. EMV has no extended length, and Le is always 00."""
    if len(command) < 4:
        raise Refused(StatusWord.WRONG_LENGTH)
    cla, ins, p1, p2, *body = command
    if body in ([], [0x00]):
        return Command(cla, ins, p1, p2, b"")
    size, rest = body[0], bytes(body[1:])
    if size == 0 or len(rest) < size or rest[size:] not in (b"", b"\x00"):
        raise Refused(StatusWord.WRONG_LENGTH)
    return Command(cla, ins, p1, p2, rest[:size])

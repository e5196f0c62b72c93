"""Names of commands and status words (EMV 4.4 Book 1, 11; Book 3, 6; ISO/IEC 7816-4; Books C-2 and C-3)."""

from __future__ import annotations

from typing import Final, NamedTuple

from terminal.emv.tlv import TlvError

COMMANDS: Final = {
    (0x00, 0xA4): "SELECT",
    (0x00, 0xB2): "READ RECORD",
    (0x00, 0xB0): "READ BINARY",
    (0x80, 0xA8): "GET PROCESSING OPTIONS",
    (0x80, 0xAE): "GENERATE AC",
    (0x80, 0xCA): "GET DATA",
    (0x00, 0xCA): "GET DATA",
    (0x80, 0xDA): "PUT DATA",
    (0x04, 0xDA): "PUT DATA",
    (0x80, 0xEA): "EXCHANGE RELAY RESISTANCE DATA",
    (0x80, 0xD0): "RECOVER AC",
    (0x80, 0x2A): "COMPUTE CRYPTOGRAPHIC CHECKSUM",
    (0x00, 0x82): "EXTERNAL AUTHENTICATE",
    (0x00, 0x88): "INTERNAL AUTHENTICATE",
    (0x00, 0x84): "GET CHALLENGE",
    (0x00, 0x20): "VERIFY",
    (0x00, 0xC0): "GET RESPONSE",
    (0x00, 0x70): "MANAGE CHANNEL",
    (0x84, 0x16): "CARD BLOCK",
    (0x8C, 0x16): "CARD BLOCK",
    (0x84, 0x18): "APPLICATION UNBLOCK",
    (0x8C, 0x18): "APPLICATION UNBLOCK",
    (0x84, 0x1E): "APPLICATION BLOCK",
    (0x8C, 0x1E): "APPLICATION BLOCK",
    (0x84, 0x24): "PIN CHANGE/UNBLOCK",
    (0x8C, 0x24): "PIN CHANGE/UNBLOCK",
    (0x84, 0xDA): "PUT DATA",
    (0x8C, 0xDA): "PUT DATA",
    (0x04, 0xDC): "UPDATE RECORD",
    (0x84, 0xDC): "UPDATE RECORD",
    (0x8C, 0xDC): "UPDATE RECORD",
    (0x00, 0xDC): "UPDATE RECORD",
}

_STATUS_WORDS: Final = {
    0x9000: "success",
    0x6200: "warning: no information given",
    0x6281: "warning: part of returned data may be corrupted",
    0x6282: "warning: end of file reached before reading the expected number of bytes",
    0x6283: "warning: selected file invalidated (application blocked)",
    0x6285: "warning: selected file in termination state",
    0x6300: "warning: authentication failed",
    0x6400: "error: state of memory unchanged",
    0x6500: "error: state of memory changed",
    0x6581: "error: memory failure",
    0x6700: "wrong length",
    0x6881: "logical channel not supported",
    0x6882: "secure messaging not supported",
    0x6900: "command not allowed",
    0x6981: "command incompatible with file structure",
    0x6982: "security status not satisfied",
    0x6983: "authentication method blocked (PIN try limit exceeded)",
    0x6984: "referenced data invalidated",
    0x6985: "conditions of use not satisfied",
    0x6986: "command not allowed",
    0x6987: "secure messaging data object missing",
    0x6988: "secure messaging data object incorrect",
    0x6A80: "incorrect parameters in the data field",
    0x6A81: "function not supported (SELECT: card blocked)",
    0x6A82: "file or application not found",
    0x6A83: "record not found",
    0x6A84: "not enough memory space in the file",
    0x6A86: "incorrect parameters P1 P2",
    0x6A88: "referenced data not found",
    0x6B00: "wrong parameters P1 P2",
    0x6D00: "instruction not supported or invalid",
    0x6E00: "class not supported",
    0x6F00: "no precise diagnosis",
}
_BY_COMMAND: Final = {
    ("GET PROCESSING OPTIONS", 0x6984): "not by this interface: try another interface (kernel 3)",
    ("GET PROCESSING OPTIONS", 0x6985): "conditions of use not satisfied: the next application is tried",
    ("GET PROCESSING OPTIONS", 0x6986): "please see phone and try again (kernel 3)",
    ("SELECT", 0x6A81): "card blocked, or SELECT not supported",
    ("SELECT", 0x6A82): "no such application",
    ("SELECT", 0x6283): "application blocked",
    ("VERIFY", 0x6984): "PIN blocked: no tries left",
    ("VERIFY", 0x6983): "PIN blocked: no tries left",
    ("READ RECORD", 0x6A83): "record not found: the file ends before it",
}


def status_word(sw: int, command: str = "") -> str:  # noqa: PLR0911 - one case for each class
    """What SW1 SW2 says, to this command if it says something of its own; empty for one that nobody here knows."""
    known = _BY_COMMAND.get((command, sw)) or _STATUS_WORDS.get(sw)
    if known:
        return known
    sw_1, sw_2 = divmod(sw, 0x100)
    match sw_1:
        case 0x61:
            return f"{sw_2 or 256} bytes are waiting: GET RESPONSE"
        case 0x6C:
            return f"wrong length Le: repeat with {sw_2 or 256}"
        case 0x63 if sw_2 >> 4 == 0xC:
            return f"verification failed, {sw_2 & 0x0F} tries left"
        case 0x62 | 0x63:
            return "warning"
        case 0x64 | 0x65 | 0x66:
            return "execution error"
        case 0x67 | 0x68 | 0x69 | 0x6A | 0x6B | 0x6D | 0x6E | 0x6F:
            return "checking error"
        case _:
            return ""


class Parts(NamedTuple):
    """Where the parts of a command APDU stand: its data from `at` to `end`; `le` None when there is none."""

    name: str
    at: int
    end: int
    le: int | None


def command_parts(apdu: bytes) -> Parts:
    """Take a command APDU apart, short form (Book 1, 9.4.1). Raises `TlvError`."""
    if len(apdu) < 4:
        raise TlvError("a command has at least CLA, INS, P1 and P2", len(apdu))
    name = COMMANDS.get((apdu[0], apdu[1]), "")
    if len(apdu) == 4:
        return Parts(name, 4, 4, None)
    if len(apdu) == 5:
        return Parts(name, 5, 5, apdu[4])
    end = 5 + apdu[4]
    if apdu[4] == 0:
        raise TlvError("Lc is 00 (an extended length is not EMV's)", 4)
    if len(apdu) not in {end, end + 1}:
        raise TlvError(f"Lc states {apdu[4]} bytes of data, {len(apdu) - 5} follow it", 4)
    return Parts(name, 5, end, apdu[end] if len(apdu) > end else None)


def parameters(name: str, apdu: bytes) -> str:  # noqa: PLR0911 - one case for each command
    """What P1 and P2 say to this command."""
    p1, p2 = apdu[2], apdu[3]
    match name:
        case "SELECT":
            how = "by name" if p1 & 0x04 else f"P1 {p1:02X}"
            return f"{how}, {'next' if p2 & 0x03 == 0x02 else 'first or only'} occurrence"
        case "READ RECORD" | "UPDATE RECORD":
            return f"SFI {p2 >> 3}, record {p1}"
        case "GENERATE AC":
            asked = ("AAC", "TC", "ARQC", "reserved")[p1 >> 6]
            signature = ", with CDA signature" if p1 & 0x10 else ", with XDA signature" if p1 & 0x08 else ""
            return f"{asked} requested{signature}"
        case "GET DATA" | "PUT DATA":
            return f"tag {p1:02X}{p2:02X}" if p1 else f"tag {p2:02X}"
        case "VERIFY":
            kinds = {0x00: "as the card knows", 0x80: "plaintext PIN", 0x88: "enciphered PIN"}
            return kinds.get(p2, f"P2 {p2:02X}")
        case "PIN CHANGE/UNBLOCK":
            kinds = {0x00: "unblock", 0x01: "change, with the current PIN", 0x02: "change"}
            return kinds.get(p2, f"P2 {p2:02X}")
        case _:
            return "" if not p1 | p2 else f"P1 {p1:02X}, P2 {p2:02X}"

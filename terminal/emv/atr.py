"""What a card says first: ATR (contact; EMV 4.4 Book 1, 8; ISO/IEC 7816-3, 8) and ATS (contactless type A; ISO/IEC
14443-4, 5.2).

A parser only: bytes apart, each with what it says. Whether a reader may go on with such a card is the driver's affair.
"""

from __future__ import annotations

import functools
import operator
from typing import Final, NamedTuple

ATR_BYTES_MAX: Final = 33  # TS and 32 more (ISO/IEC 7816-3, 8.2.1)
ATS_BYTES_MAX: Final = 254

_F: Final = (372, 372, 558, 744, 1116, 1488, 1860, 0, 0, 512, 768, 1024, 1536, 2048, 0, 0)
_D: Final = (0, 1, 2, 4, 8, 16, 32, 64, 12, 20, 0, 0, 0, 0, 0, 0)
_FSC: Final = (16, 24, 32, 40, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096)
_CLASSES: Final = {1: "A, 5 V", 2: "B, 3 V", 3: "A and B", 4: "C, 1.8 V", 6: "B and C", 7: "A, B and C"}


class AtrError(ValueError):
    """These bytes are no ATR, or no ATS; `at` is the offset of what does not fit."""

    def __init__(self, reason: str, at: int) -> None:
        super().__init__(f"offset {at}: {reason}")
        self.reason = reason
        self.at = at


class Part(NamedTuple):
    """Some bytes of it, by their name in the standard, and what they say."""

    name: str
    at: int
    value: bytes
    text: str


def _take(data: bytes, at: int, name: str) -> int:
    if at >= len(data):
        raise AtrError(f"the data ends before {name}", at)
    return data[at]


def atr(data: bytes) -> tuple[Part, ...]:
    """Every byte of an ATR, explained. Raises `AtrError`."""
    if not data or data[0] not in {0x3B, 0x3F}:
        raise AtrError("an ATR begins with 3B or 3F", 0)
    if len(data) > ATR_BYTES_MAX:
        raise AtrError(f"an ATR has at most {ATR_BYTES_MAX} bytes", ATR_BYTES_MAX)
    t0 = _take(data, 1, "T0")
    historical = t0 & 0x0F
    parts = [
        Part("TS", 0, data[:1], f"{'direct' if data[0] == 0x3B else 'inverse'} convention"),
        Part("T0", 1, data[1:2], f"{historical} historical bytes; {_follow(t0 >> 4, 1)}"),
    ]
    interface, protocols = _interface_bytes(data, t0 >> 4)
    parts += interface
    at = 2 + len(interface)
    if at + historical > len(data):
        raise AtrError(f"the data ends inside the {historical} historical bytes", at)
    if historical:
        parts.append(_historical(data[at : at + historical], at))
    at += historical
    if protocols - {0}:
        _take(data, at, "TCK")
        expected = functools.reduce(operator.xor, data[1:at])
        said = "check byte, right" if data[at] == expected else f"check byte, wrong: {expected:02X} expected"
        parts.append(Part("TCK", at, data[at : at + 1], said))
        at += 1
    if at != len(data):
        raise AtrError(f"{len(data) - at} bytes follow the end of the ATR", at)
    return tuple(parts)


def _interface_bytes(data: bytes, present: int) -> tuple[list[Part], set[int]]:
    """Groups of TA to TD, each of which says what follows, and the protocols that they offer."""
    parts: list[Part] = []
    protocols: set[int] = set()
    group, protocol = 1, 0
    while present:
        following, offered = 0, protocol
        for bit, letter in enumerate("ABCD"):
            if not present >> bit & 1:
                continue
            name, at = f"T{letter}{group}", 2 + len(parts)
            byte = _take(data, at, name)
            text = _interface(name, byte, protocol)
            if letter == "D":
                following, offered = byte >> 4, byte & 0x0F
                protocols.add(offered)
                text = f"protocol T={offered}; {_follow(following, group + 1)}"
            parts.append(Part(name, at, data[at : at + 1], text))
        present, protocol, group = following, offered, group + 1
    return parts, protocols


def _follow(present: int, group: int) -> str:
    names = [f"T{letter}{group}" for bit, letter in enumerate("ABCD") if present >> bit & 1]
    return f"{', '.join(names)} follow{'s' if len(names) == 1 else ''}" if names else "no interface bytes follow"


def _interface(name: str, byte: int, protocol: int) -> str:
    """An interface byte TA, TB or TC: of the first two groups each has its own meaning, later ones their protocol's."""
    if name[1:] in {"A1", "B1", "C1", "A2", "C2"}:
        return _global(name, byte)
    if protocol == 1:
        return _block_protocol(name[1], byte)
    if protocol == 15 and name[1] == "A":
        stop = ("no clock stop", "clock stop low", "clock stop high", "clock stop, either")[byte >> 6]
        return f"class {_CLASSES.get(byte & 0x3F, 'reserved')}; {stop}"
    return "for the protocol"


def _global(name: str, byte: int) -> str:
    match name:
        case "TA1":
            clock, rate = _F[byte >> 4], _D[byte & 0x0F]
            return f"F={clock}, D={rate}: {clock / rate:g} clock cycles a bit" if clock and rate else "reserved F or D"
        case "TB1":
            return "VPP is not connected" if byte == 0 else "programming voltage, obsolete"
        case "TC1":
            return "guard time: the least" if byte == 0xFF else f"extra guard time: {byte} bits"
        case "TA2":
            return f"specific mode: T={byte & 0x0F}, {'implicit values' if byte & 0x10 else 'as TA1 says'}"
        case _:
            return f"work waiting time: WI={byte}"


def _block_protocol(letter: str, byte: int) -> str:
    match letter:
        case "A":
            return f"information field size of the card (IFSC): {byte} bytes"
        case "B":
            return f"block waiting time BWI={byte >> 4}, character waiting time CWI={byte & 0x0F}"
        case _:
            return "error detection: " + ("CRC" if byte & 1 else "LRC")


def _printable(value: bytes) -> str:
    text = value.decode("ascii", "replace")
    return f' "{text}"' if text.isascii() and text.isprintable() and len(value) > 2 else ""


def _historical(value: bytes, at: int) -> Part:
    kinds = {0x00: "COMPACT-TLV, then status", 0x10: "reference to a data object", 0x80: "COMPACT-TLV"}
    kind = kinds.get(value[0], "proprietary")
    return Part("historical", at, value, kind + (_printable(value) if kind == "proprietary" else ""))


def ats(data: bytes) -> tuple[Part, ...]:
    """Every byte of an ATS, explained; without its CRC. Raises `AtrError`."""
    if not data or len(data) > ATS_BYTES_MAX:
        raise AtrError("an ATS has 1 to 254 bytes", 0)
    if data[0] != len(data):
        raise AtrError(f"TL states {data[0]} bytes, there are {len(data)}", 0)
    parts = [Part("TL", 0, data[:1], f"{len(data)} bytes")]
    if len(data) == 1:
        return tuple(parts)
    t0 = data[1]
    if t0 & 0x80:
        raise AtrError("bit 8 of T0 is set", 1)
    size = _FSC[min(t0 & 0x0F, len(_FSC) - 1)]
    follow = [f"T{letter}(1)" for bit, letter in ((0x10, "A"), (0x20, "B"), (0x40, "C")) if t0 & bit]
    said = f"; {', '.join(follow)} follow{'s' if len(follow) == 1 else ''}" if follow else ""
    parts.append(Part("T0", 1, data[1:2], f"the card takes frames of {size} bytes (FSCI {t0 & 0x0F}){said}"))
    at = 2
    for bit, name in ((0x10, "TA(1)"), (0x20, "TB(1)"), (0x40, "TC(1)")):
        if t0 & bit:
            byte = _take(data, at, name)
            parts.append(Part(name, at, data[at : at + 1], _activation(name, byte)))
            at += 1
    if at < len(data):
        parts.append(_historical(data[at:], at))
    return tuple(parts)


def _activation(name: str, byte: int) -> str:
    match name:
        case "TA(1)":
            rates = [f"{106 << shift if shift != 3 else 847} kbit/s" for shift in (1, 2, 3) if byte >> (shift - 1) & 1]
            back = [f"{106 << shift if shift != 3 else 847} kbit/s" for shift in (1, 2, 3) if byte >> (shift + 3) & 1]
            if not rates and not back:
                return "106 kbit/s only"
            both = "; the same both ways" if byte & 0x80 else ""
            return f"to the card also {', '.join(rates) or 'none'}; from it also {', '.join(back) or 'none'}{both}"
        case "TB(1)":
            frame, guard = byte >> 4, byte & 0x0F
            wait_ms = 256 * 16 / 13_560 * (1 << frame)
            guard_text = f"{256 * 16 / 13_560 * (1 << guard):.1f} ms" if guard else "the least"
            return f"frame waiting time {wait_ms:.1f} ms (FWI {frame}); start-up guard time {guard_text} (SFGI {guard})"
        case _:
            found = [text for bit, text in ((1, "NAD"), (2, "CID")) if byte & bit]
            return f"supports {' and '.join(found)}" if found else "supports neither NAD nor CID"

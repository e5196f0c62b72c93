"""Terminal action analysis (EMV 4.4 Book 3, 10.7): what to ask the card for, given what was found.

Issuer and acquirer each weigh the TVR bits with three masks: what declines, what goes online, and what declines when
online cannot be had. A bit counts if either of them marked it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

from terminal.emv.results import Tvr
from terminal.emv.tags import ActionCode, Tag

OFFLINE_APPROVED: Final = b"Y1"  # authorisation response codes that a terminal sets itself (Book 4, A6)
OFFLINE_DECLINED: Final = b"Z1"
UNABLE_ONLINE_APPROVED: Final = b"Y3"
UNABLE_ONLINE_DECLINED: Final = b"Z3"

_NOTHING: Final = bytes(5)
_EVERYTHING: Final = b"\xff" * 5


class AcType(IntEnum):
    """What GENERATE AC asks for, and what bits 8 and 7 of the CID say that came."""

    AAC = 0x00
    TC = 0x40
    ARQC = 0x80


class Reach(Enum):
    """What a terminal can do, by the units digit of its type 9F35 (Book 4, A1)."""

    ONLINE_ONLY = "online only"
    OFFLINE_AND_ONLINE = "offline with online capability"
    OFFLINE_ONLY = "offline only"

    @classmethod
    def of(cls, terminal_type: bytes) -> Reach:
        match terminal_type[-1:].hex()[-1:]:
            case "1" | "4":
                return cls.ONLINE_ONLY
            case "3" | "6":
                return cls.OFFLINE_ONLY
            case _:
                return cls.OFFLINE_AND_ONLINE


@dataclass(frozen=True, slots=True)
class ActionCodes:
    """Issuer's and terminal's action codes, joined."""

    denial: Tvr
    online: Tvr
    default: Tvr

    @classmethod
    def of(cls, objects: Mapping[int, bytes], terminal_default: bytes = _NOTHING) -> ActionCodes:
        """IACs from the card, TACs from the terminal; `terminal_default` stands for a TAC that is absent."""

        def joined(issuer: Tag, issuer_default: bytes, terminal: ActionCode) -> Tvr:
            theirs, ours = objects.get(issuer, issuer_default), objects.get(terminal, terminal_default)
            return Tvr(int.from_bytes(theirs, "big") | int.from_bytes(ours, "big"))

        return cls(
            denial=joined(Tag.IAC_DENIAL, _NOTHING, ActionCode.DENIAL),
            online=joined(Tag.IAC_ONLINE, _EVERYTHING, ActionCode.ONLINE),
            default=joined(Tag.IAC_DEFAULT, _EVERYTHING, ActionCode.DEFAULT),
        )


def first(tvr: Tvr, codes: ActionCodes, reach: Reach) -> AcType:
    """What the first GENERATE AC asks for."""
    if tvr & codes.denial:
        return AcType.AAC
    match reach:
        case Reach.ONLINE_ONLY:
            return AcType.ARQC
        case Reach.OFFLINE_AND_ONLINE:
            return AcType.ARQC if tvr & codes.online else AcType.TC
        case Reach.OFFLINE_ONLY:
            return AcType.AAC if tvr & codes.default else AcType.TC


def unable_to_go_online(tvr: Tvr, codes: ActionCodes, reach: Reach) -> AcType:
    """What the second one asks for when the host could not be had. A terminal that is online only does not approve."""
    return AcType.AAC if reach is Reach.ONLINE_ONLY or tvr & codes.default else AcType.TC

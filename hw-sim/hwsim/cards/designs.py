"""Card designs: what a kind of card is, in TOML that people write and read (`profiles/*.toml`).

A design names scheme and application, what the card asks for (data object lists), how it wants the cardholder verified,
what it tells the terminal to do (issuer action codes) and what it decides itself. `personalise` makes a card of it,
with keys and certificates. A design that begins with `like = "another"` is the other one but for what it says itself;
`misbehaves` names one of `hwsim.cards.variants`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from hwsim.cards.bertlv import decode_dol
from hwsim.cards.bureau import Scheme
from hwsim.cards.cryptogram import AC_INPUT, Cvn
from hwsim.cards.files import CardFileError
from hwsim.cards.variants import VARIANTS

DESIGNS: Final = Path(__file__).with_name("profiles")
REVOKED_SERIAL: Final = "BADBAD"  # of the issuer certificate that simulated terminals take for withdrawn
_LIKE_DEPTH_MAX: Final = 8  # designs are copies of copies at most; a ring would never end

_AIP_BITS: Final[Mapping[str, int]] = {
    "sda": 0x4000,
    "dda": 0x2000,
    "cardholder-verification": 0x1000,
    "terminal-risk-management": 0x0800,
    "issuer-authentication": 0x0400,
    "cda": 0x0100,
    "emv-mode": 0x0080,  # contactless Mastercard
}
_CTQ_BITS: Final[Mapping[str, int]] = {
    "online-if-oda-fails": 0x2000,
    "switch-interface-if-oda-fails": 0x1000,
    "online-if-expired": 0x0800,
}
_METHODS: Final[Mapping[str, int]] = {
    "fail": 0x00, "plain-pin": 0x01, "online-pin": 0x02, "plain-pin-and-signature": 0x03, "enciphered-pin": 0x04,
    "enciphered-pin-and-signature": 0x05, "signature": 0x1E, "none": 0x1F,
}  # fmt: skip
_CONDITIONS: Final[Mapping[str, int]] = {
    "always": 0x00, "unattended-cash": 0x01, "not-cash": 0x02, "supported": 0x03, "manual-cash": 0x04, "cashback": 0x05,
    "under-x": 0x06, "over-x": 0x07, "under-y": 0x08, "over-y": 0x09,
}  # fmt: skip
_OR_NEXT: Final = 0x40
_OF_THE_CARD: Final = {0x82, 0x9F36}  # AIP and ATC are under the cryptogram, too, but nobody has to send them

# What a terminal sends for a tag in a data object list.
_DOL_SIZES_BYTES: Final[Mapping[int, int]] = {
    0x8A: 2, 0x91: 10, 0x95: 5, 0x9A: 3, 0x9C: 1, 0x5F2A: 2, 0x9F02: 6, 0x9F03: 6, 0x9F1A: 2, 0x9F21: 3, 0x9F33: 3,
    0x9F34: 3, 0x9F35: 1, 0x9F37: 4, 0x9F45: 2, 0x9F4C: 8, 0x9F66: 4,
}  # fmt: skip

_Bytes5 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-F]{10}\Z")]
_Digits3 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{3}\Z")]
_Count = Annotated[int, msgspec.Meta(ge=0, le=255)]
_Amount = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
_Dol = Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-F ]*\Z")]


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the CVM list: how to verify the cardholder, when, and whether the next line is tried if it fails."""

    method: str
    when: str = "always"
    or_next: bool = False

    def encode(self) -> bytes:
        return bytes((_METHODS[self.method] | (_OR_NEXT if self.or_next else 0), _CONDITIONS[self.when]))


class InterfaceDesign(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One interface. A contactless Visa card uses of it only `aip`, `pdol` and `ctq`."""

    aip: list[str]
    pdol: _Dol = ""
    cdol1: _Dol = ""
    cdol2: _Dol = ""
    ddol: _Dol = ""
    response_format: Literal[1, 2] = 2
    ctq: list[str] = []
    cvm: list[Rule] = []
    cvm_x_minor: _Amount = 0
    cvm_y_minor: _Amount = 0
    iac_denial: _Bytes5 = "0000000000"
    iac_online: _Bytes5 = "0000000000"
    iac_default: _Bytes5 = "0000000000"
    consecutive_offline: tuple[_Count, _Count] | None = None  # 9F14, 9F23: the terminal asks to go online, demands it

    @property
    def aip_bytes(self) -> bytes:
        return sum(_AIP_BITS[word] for word in self.aip).to_bytes(2, "big")

    @property
    def ctq_bytes(self) -> bytes:
        return sum(_CTQ_BITS[word] for word in self.ctq).to_bytes(2, "big")

    @property
    def cvm_list(self) -> bytes:
        """Tag 8E, empty when there is none."""
        if not self.cvm:
            return b""
        amounts = self.cvm_x_minor.to_bytes(4, "big") + self.cvm_y_minor.to_bytes(4, "big")
        return amounts + b"".join(rule.encode() for rule in self.cvm)


class Design(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of card."""

    scheme: Scheme
    aid: str
    label: Annotated[str, msgspec.Meta(pattern=r"\A[\x20-\x7E]{1,16}\Z")]
    serial: Annotated[int, msgspec.Meta(ge=1, le=999_999)]  # of its test account number
    version: str
    contactless: InterfaceDesign
    contact: InterfaceDesign
    language: Annotated[str, msgspec.Meta(pattern=r"\A([a-z]{2}){1,4}\Z")] = "en"
    cardholder: Annotated[str, msgspec.Meta(pattern=r"\A[\x20-\x7E]{2,26}\Z")] = "PAYTERM/TEST CARD"
    service_code: _Digits3 = "201"
    usage_control: Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-F]{4}\Z")] = "FFC0"
    effective: date = date(2020, 1, 1)
    expires: date = date(2030, 12, 31)
    more_aids: list[str] = []  # the same application once more, under further names: contact only
    icc_key_bits: Annotated[int, msgspec.Meta(ge=768, le=1408, multiple_of=8)] = 1152
    offline_limit_minor: _Amount = 0
    declines: bool = False
    declines_after_approval: bool = False
    distrusts_issuer: bool = False
    needs_issuer_authentication: bool = True
    certificates_end: date | None = None  # before the card does; by default when the issuer's does
    issuer_serial: Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-F]{6}\Z")] | None = None  # of its own certificate
    misbehaves: str = "normal"

    @property
    def aid_bytes(self) -> bytes:
        return bytes.fromhex(self.aid)

    @property
    def cvn(self) -> Cvn:
        return Cvn[self.version]


def dol(tags: str) -> bytes:
    """A data object list from tags in hexadecimal: each with the length that a terminal has for it."""
    words = [int(word, 16) for word in tags.split()]
    return b"".join(
        word.to_bytes((word.bit_length() + 7) // 8, "big") + bytes((_DOL_SIZES_BYTES[word],)) for word in words
    )


def names() -> list[str]:
    """Every design that comes with the simulator."""
    return sorted(path.stem for path in DESIGNS.glob("*.toml"))


def load(name: str, directory: Path = DESIGNS) -> Design:
    """The design of this name. Raises `CardFileError`."""
    path = directory / f"{name}.toml"
    try:
        design = msgspec.convert(_document(path, _LIKE_DEPTH_MAX), Design)
        _check(design)
    except (OSError, ValueError, KeyError) as error:
        raise CardFileError(f"{path} is no card design ({error}): correct it, or name another") from error
    return design


def _check(design: Design) -> None:
    """Read what is written in words and tags, so that a mistake shows before a card is made."""
    for interface in (design.contactless, design.contact):
        _ = (interface.aip_bytes, interface.ctq_bytes, interface.cvm_list)
        for tags in (interface.pdol, interface.cdol2, interface.ddol):
            dol(tags)
        asked = {tag for tag, _ in decode_dol(dol(interface.cdol1 or interface.pdol))}
        if not asked >= set(AC_INPUT) - _OF_THE_CARD:
            raise ValueError("it does not ask for everything that its cryptogram covers")
    _ = (design.cvn, design.aid_bytes, [bytes.fromhex(aid) for aid in design.more_aids])
    if not design.aid_bytes.startswith(design.scheme.rid):
        raise ValueError("its AID is of another scheme")
    if design.misbehaves not in VARIANTS:
        raise ValueError(f"it misbehaves in no known way: {', '.join(VARIANTS)}")


def _document(path: Path, depth: int) -> dict[str, Any]:
    """The file, over the one that it is like."""
    if depth == 0:
        raise ValueError("designs that are like each other never end")
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    like = document.pop("like", None)
    return document if like is None else _merged(_document(path.with_name(f"{like}.toml"), depth - 1), document)


def _merged(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _merged(merged[key], value) if isinstance(value, Mapping) and key in merged else value
    return merged

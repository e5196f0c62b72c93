"""What is on one card: a value, stored as a readable JSON card file, private keys included, because it is a test card.

A file holds everything: what was personalised (keys, certificates, records of both interfaces) and what the card
remembers from one transaction to the next (counters, log, whether it was blocked). `personalise` makes one, the card
applications work from it and hand back the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any, Final

from hwsim.cards import files
from hwsim.cards.bertlv import decode, encode
from hwsim.cards.bureau import CaPublicKey, RsaKey, Scheme, key_document, key_of
from hwsim.cards.cryptogram import Cvn
from hwsim.cards.files import CardFileError, hexadecimal
from hwsim.cards.misbehaviour import Misbehaviour

LOG_RECORDS: Final = 10  # the oldest entry goes when another comes

_CARD_FORMAT: Final = "payterm test card, version 3"


@dataclass(frozen=True, slots=True, repr=False)
class Pan:
    """A primary account number. It shows itself masked, whatever prints it."""

    digits: str

    def __post_init__(self) -> None:
        if not (self.digits.isascii() and self.digits.isdecimal() and 8 <= len(self.digits) <= 19):
            raise ValueError("a PAN has 8 to 19 digits")
        if luhn_check_digit(self.digits[:-1]) != self.digits[-1]:
            raise ValueError("the PAN's check digit is wrong")

    def __repr__(self) -> str:
        return f"Pan(...{self.digits[-4:]})"

    __str__ = __repr__


def luhn_check_digit(digits: str) -> str:
    """The digit that makes `digits` a valid account number (ISO/IEC 7812-1, Annex B)."""
    total = 0
    for position, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if position % 2 == 0 else 1)
        total += value // 10 + value % 10
    return str(-total % 10)


def laboratory_pan(serial: int, iin: str = "400000") -> Pan:
    """The test account number with this serial number: sixteen digits, zeros between IIN and serial number."""
    body = iin + f"{serial:0{15 - len(iin)}d}"
    return Pan(body + luhn_check_digit(body))


class Standing(Enum):
    """What has become of the application on the card."""

    ACTIVE = "active"
    CARD_BLOCKED = "card-blocked"  # the whole card: it selects nothing any more
    BLOCKED = "blocked"  # still listed, selected with a warning, refuses to start a transaction
    ABSENT = "absent"  # the card has no payment application at all


@dataclass(frozen=True, slots=True)
class Record:
    """One record, template 70 included, where READ RECORD finds it."""

    sfi: int
    number: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ApplicationData:
    """The application as one interface shows it. A data object list that the card has not is empty."""

    aip: bytes
    records: tuple[Record, ...]
    afl: bytes = b""  # a contactless Visa card composes its own
    pdol: bytes = b""
    cdol1: bytes = b""
    cdol2: bytes = b""
    ddol: bytes = b""
    response_format: int = 2  # 1: values in template 80, 2: data objects in template 77

    def find(self, tag: int) -> bytes | None:
        """The value of a data object in the records."""
        for record in self.records:
            objects = decode(decode(record.data)[0x70])
            if tag in objects:
                return objects[tag]
        return None

    def changed(self, tag: int, value: bytes) -> ApplicationData:
        """The same with another value for a data object in the records."""

        def written(record: Record) -> Record:
            objects = decode(decode(record.data)[0x70])
            if tag not in objects:
                return record
            objects[tag] = value
            return replace(record, data=encode(0x70, *(encode(each, objects[each]) for each in objects)))

        return replace(self, records=tuple(written(record) for record in self.records))


@dataclass(frozen=True, slots=True)
class CardProfile:
    """Everything that is on one card. Without its three keys it is a copy: what can be read, no secrets."""

    scheme: Scheme
    aid: bytes
    more_aids: tuple[bytes, ...]  # further names of the same application on the contact interface
    label: str
    language: str  # 5F2D: ISO 639 codes, the preferred one first
    pan: Pan
    psn: str
    expires: date
    track2: bytes = field(repr=False)
    contactless: ApplicationData
    contact: ApplicationData
    ctq: bytes  # Visa, contactless
    cvn: Cvn
    dki: int
    card_key: bytes | None = field(repr=False)  # of the cryptograms
    script_key: bytes | None = field(repr=False)  # of the issuer's commands
    icc_key: RsaKey | None
    sdad_size_bytes: int
    ca_public_key: CaPublicKey
    currency: int
    offline_limit_minor: int = 0  # 0: every purchase asks for an online cryptogram
    declines: bool = False
    declines_after_approval: bool = False  # contact: says no in the second GENERATE AC, whatever the issuer said
    distrusts_issuer: bool = False  # contact: takes every ARPC for forged
    needs_issuer_authentication: bool = True  # contact: without a true ARPC there is no approval
    standing: Standing = Standing.ACTIVE
    misbehaviour: Misbehaviour = Misbehaviour.NONE
    atc: int = 0
    atc_last_online: int = 0
    online_incomplete: bool = False  # asked for the issuer, and has not heard the end of it
    log: tuple[bytes, ...] = field(default=(), repr=False)  # newest first

    @property
    def aip(self) -> bytes:
        """Of the contactless interface."""
        return self.contactless.aip

    @property
    def records(self) -> tuple[Record, ...]:
        """Of the contactless interface."""
        return self.contactless.records

    def save(self, path: Path) -> None:
        """Write the card file."""
        document = {
            "format": _CARD_FORMAT,
            "scheme": self.scheme.value,
            "aid": hexadecimal(self.aid),
            "more_aids": [hexadecimal(aid) for aid in self.more_aids],
            "label": self.label,
            "language": self.language,
            "pan": self.pan.digits,
            "psn": self.psn,
            "expires": self.expires.isoformat(),
            "track2": hexadecimal(self.track2),
            "contactless": _application_document(self.contactless),
            "contact": _application_document(self.contact),
            "ctq": hexadecimal(self.ctq),
            "cvn": self.cvn.name,
            "dki": self.dki,
            "card_key": None if self.card_key is None else hexadecimal(self.card_key),
            "script_key": None if self.script_key is None else hexadecimal(self.script_key),
            "icc_key": None if self.icc_key is None else key_document(self.icc_key),
            "sdad_size_bytes": self.sdad_size_bytes,
            "ca_public_key": self.ca_public_key.record(),
            "currency": self.currency,
            "offline_limit_minor": self.offline_limit_minor,
            "declines": self.declines,
            "declines_after_approval": self.declines_after_approval,
            "distrusts_issuer": self.distrusts_issuer,
            "needs_issuer_authentication": self.needs_issuer_authentication,
            "standing": self.standing.value,
            "misbehaviour": self.misbehaviour.value,
            "atc": self.atc,
            "atc_last_online": self.atc_last_online,
            "online_incomplete": self.online_incomplete,
            "log": [hexadecimal(entry) for entry in self.log],
        }
        files.write(path, document)

    @classmethod
    def load(cls, path: Path) -> CardProfile:
        """Read a card file. Raises `CardFileError`."""
        document = files.read(path, _CARD_FORMAT)
        try:
            ca_public_key = document["ca_public_key"]
            card_key, script_key, icc_key = document["card_key"], document["script_key"], document["icc_key"]
            return cls(
                scheme=Scheme(document["scheme"]),
                aid=bytes.fromhex(document["aid"]),
                more_aids=tuple(bytes.fromhex(aid) for aid in document["more_aids"]),
                label=document["label"],
                language=document["language"],
                pan=Pan(document["pan"]),
                psn=document["psn"],
                expires=date.fromisoformat(document["expires"]),
                track2=bytes.fromhex(document["track2"]),
                contactless=_application_of(document["contactless"]),
                contact=_application_of(document["contact"]),
                ctq=bytes.fromhex(document["ctq"]),
                cvn=Cvn[document["cvn"]],
                dki=document["dki"],
                card_key=None if card_key is None else bytes.fromhex(card_key),
                script_key=None if script_key is None else bytes.fromhex(script_key),
                icc_key=None if icc_key is None else key_of(icc_key),
                sdad_size_bytes=document["sdad_size_bytes"],
                ca_public_key=CaPublicKey(
                    bytes.fromhex(ca_public_key["rid"]),
                    int(ca_public_key["index"], 16),
                    bytes.fromhex(ca_public_key["modulus"]),
                    bytes.fromhex(ca_public_key["exponent"]),
                ),
                currency=document["currency"],
                offline_limit_minor=document["offline_limit_minor"],
                declines=document["declines"],
                declines_after_approval=document["declines_after_approval"],
                distrusts_issuer=document["distrusts_issuer"],
                needs_issuer_authentication=document["needs_issuer_authentication"],
                standing=Standing(document["standing"]),
                misbehaviour=Misbehaviour(document["misbehaviour"]),
                atc=document["atc"],
                atc_last_online=document["atc_last_online"],
                online_incomplete=document["online_incomplete"],
                log=tuple(bytes.fromhex(entry) for entry in document["log"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CardFileError(f"{path} is damaged: the card cannot be presented; personalise it anew") from error


def _application_document(application: ApplicationData) -> dict[str, object]:
    return {
        "aip": hexadecimal(application.aip),
        "afl": hexadecimal(application.afl),
        "pdol": hexadecimal(application.pdol),
        "cdol1": hexadecimal(application.cdol1),
        "cdol2": hexadecimal(application.cdol2),
        "ddol": hexadecimal(application.ddol),
        "response_format": application.response_format,
        "records": [
            {"sfi": record.sfi, "number": record.number, "data": hexadecimal(record.data)}
            for record in application.records
        ],
    }


def _application_of(document: Mapping[str, Any]) -> ApplicationData:
    return ApplicationData(
        aip=bytes.fromhex(document["aip"]),
        afl=bytes.fromhex(document["afl"]),
        pdol=bytes.fromhex(document["pdol"]),
        cdol1=bytes.fromhex(document["cdol1"]),
        cdol2=bytes.fromhex(document["cdol2"]),
        ddol=bytes.fromhex(document["ddol"]),
        response_format=document["response_format"],
        records=tuple(
            Record(record["sfi"], record["number"], bytes.fromhex(record["data"])) for record in document["records"]
        ),
    )

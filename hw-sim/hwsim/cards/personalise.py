"""Personalisation: how a test card gets its keys, certificates and records.

A laboratory has no card scheme and no bank behind it, so one `Bureau` here plays all three: the certification authority
whose public key the terminal is configured with, the issuer that it certifies, and the owner of the issuer master key.
`personalise` then makes a card: an ICC key with its certificate, records as READ RECORD gives them, and the master key
of its cryptograms. Certificates follow EMV 4.4 Book 2, 5 and 6, with real RSA; only keys made here ever verify them.

What comes out is a `CardProfile`, a value that is stored as a readable JSON card file, private keys included: it is a
test card. RSA keys come from `cryptography`, which takes no seed, so a run is repeated from stored files, not from a
seed; everything else that is random comes from `entropy`. What the card says and when is in `hwsim.cards.visa`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any, Final, TypeAlias

from cryptography.hazmat.primitives.asymmetric import rsa

from hwsim.cards.bertlv import encode
from hwsim.cards.cryptogram import KEY_BYTES, Cvn, derive_card_key, odd_parity

Entropy: TypeAlias = Callable[[int], bytes]

VISA_RID: Final = bytes.fromhex("A000000003")
VISA_AID: Final = bytes.fromhex("A0000000031010")

CA_KEY_BITS: Final = 1408
ISSUER_KEY_BITS: Final = 1408  # as long as the CA's: the certificate cannot hold it, so a remainder (92) is needed
ICC_KEY_BITS: Final = 1152  # needs a remainder (9F48), and signs more than GET PROCESSING OPTIONS has room for

PDOL: Final = bytes.fromhex("9F66049F02069F03069F1A0295055F2A029A039C019F3704")
AIP_DDA: Final = bytes.fromhex("2000")
AIP_NO_ODA: Final = bytes.fromhex("0000")
CTQ: Final = bytes.fromhex("2800")  # online if offline data authentication fails, online if expired
FORM_FACTOR: Final = bytes.fromhex("20700000")  # a plain contactless card
USAGE_CONTROL: Final = bytes.fromhex("FFC0")  # goods, services, cash and cashback, at home and abroad

_CARD_FORMAT: Final = "payterm test card, version 1"
_BUREAU_FORMAT: Final = "payterm test bureau, version 1"
_ENVELOPE_BYTES: Final = 22  # header 6A, SHA-1 hash, trailer BC around what a signature recovers
_SHA1: Final = 0x01  # hash algorithm indicator
_RSA: Final = 0x01  # public key algorithm indicator
_PADDING: Final = b"\xbb"


class CardFileError(ValueError):
    """A card or bureau file that cannot be used. No money is involved: personalise anew or name another file."""


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
    """The test account number with this serial number: sixteen digits under an IIN that no bank issues."""
    body = iin + f"{serial:0{15 - len(iin)}d}"
    return Pan(body + luhn_check_digit(body))


@dataclass(frozen=True, slots=True)
class RsaKey:
    """A private key, as its primes. Big-endian bytes go in and come out, always as long as the modulus."""

    p: int = field(repr=False)
    q: int = field(repr=False)
    exponent: int

    @classmethod
    def generate(cls, bits: int, exponent: int) -> RsaKey:
        """A new key; `exponent` is 3 or 65537, which is all that EMV knows."""
        numbers = rsa.generate_private_key(public_exponent=exponent, key_size=bits).private_numbers()
        return cls(numbers.p, numbers.q, exponent)

    @property
    def size_bytes(self) -> int:
        return ((self.p * self.q).bit_length() + 7) // 8

    @property
    def modulus(self) -> bytes:
        return (self.p * self.q).to_bytes(self.size_bytes, "big")

    @property
    def exponent_bytes(self) -> bytes:
        return self.exponent.to_bytes((self.exponent.bit_length() + 7) // 8, "big")

    def sign(self, body: bytes, *also_hashed: bytes) -> bytes:
        """Sign so that the verifier recovers `body` (EMV 4.4 Book 2, A2.1). `also_hashed` is protected, not recovered.

        `body` fills the key exactly: its length is `room_bytes`.
        """
        digest = hashlib.sha1(b"".join((body, *also_hashed)), usedforsecurity=False).digest()
        return self._raw(b"\x6a" + body + digest + b"\xbc")

    @property
    def room_bytes(self) -> int:
        """How much a signature of this key recovers."""
        return self.size_bytes - _ENVELOPE_BYTES

    def _raw(self, block: bytes) -> bytes:
        """RSA by the Chinese remainder theorem."""
        if len(block) != self.size_bytes:
            raise ValueError("the block to sign is not as long as the modulus")
        message = int.from_bytes(block, "big")
        by_p = pow(message, pow(self.exponent, -1, self.p - 1), self.p)
        by_q = pow(message, pow(self.exponent, -1, self.q - 1), self.q)
        lift = pow(self.q, -1, self.p) * (by_p - by_q) % self.p
        return (by_q + lift * self.q).to_bytes(self.size_bytes, "big")


@dataclass(frozen=True, slots=True)
class CaPublicKey:
    """A certification authority's public key, as a terminal is configured with it."""

    rid: bytes
    index: int
    modulus: bytes
    exponent: bytes

    @property
    def checksum(self) -> bytes:
        """SHA-1 over all four parts (EMV 4.4 Book 2, 11.2.2)."""
        parts = self.rid + bytes((self.index,)) + self.modulus + self.exponent
        return hashlib.sha1(parts, usedforsecurity=False).digest()

    def record(self) -> dict[str, str]:
        """The key in hexadecimal, for a configuration: rid, index, modulus, exponent, checksum."""
        return {
            "rid": _hex(self.rid),
            "index": f"{self.index:02X}",
            "modulus": _hex(self.modulus),
            "exponent": _hex(self.exponent),
            "checksum": _hex(self.checksum),
        }


@dataclass(frozen=True, slots=True)
class Certificate:
    """A public key certificate and the part of the key that found no room in it (perhaps empty)."""

    certificate: bytes
    remainder: bytes


@dataclass(frozen=True, slots=True)
class Bureau:
    """Certification authority, issuer and issuer master key of one laboratory; its cards share one CA public key."""

    rid: bytes
    ca_index: int
    ca_key: RsaKey
    iin: str
    issuer_key: RsaKey
    issuer_certificate: Certificate
    certificates_expire: date
    imk_ac: bytes = field(repr=False)

    @classmethod
    def create(
        cls,
        entropy: Entropy,
        *,
        rid: bytes = VISA_RID,
        ca_index: int = 0xF0,  # no published key of this RID, live or test, has it
        iin: str = "400000",
        certificates_expire: date = date(2040, 12, 31),
        exponent: int = 3,
        ca_key_bits: int = CA_KEY_BITS,
        issuer_key_bits: int = ISSUER_KEY_BITS,
    ) -> Bureau:
        """Make the keys and certify the issuer's (EMV 4.4 Book 2, table 2)."""
        ca_key = RsaKey.generate(ca_key_bits, exponent)
        issuer_key = RsaKey.generate(issuer_key_bits, exponent)
        head = b"\x02" + _packed(iin, 4) + _month_and_year(certificates_expire) + entropy(3)
        return cls(
            rid=rid,
            ca_index=ca_index,
            ca_key=ca_key,
            iin=iin,
            issuer_key=issuer_key,
            issuer_certificate=_certify(ca_key, head, issuer_key),
            certificates_expire=certificates_expire,
            imk_ac=odd_parity(entropy(KEY_BYTES)),
        )

    @property
    def ca_public_key(self) -> CaPublicKey:
        return CaPublicKey(self.rid, self.ca_index, self.ca_key.modulus, self.ca_key.exponent_bytes)

    def save(self, path: Path) -> None:
        """Write the bureau file."""
        document = {
            "format": _BUREAU_FORMAT,
            "rid": _hex(self.rid),
            "ca_index": self.ca_index,
            "ca_key": _key_document(self.ca_key),
            "iin": self.iin,
            "issuer_key": _key_document(self.issuer_key),
            "issuer_certificate": _hex(self.issuer_certificate.certificate),
            "issuer_remainder": _hex(self.issuer_certificate.remainder),
            "certificates_expire": self.certificates_expire.isoformat(),
            "imk_ac": _hex(self.imk_ac),
        }
        _write(path, document)

    @classmethod
    def load(cls, path: Path) -> Bureau:
        """Read a bureau file. Raises `CardFileError`."""
        document = _read(path, _BUREAU_FORMAT)
        try:
            return cls(
                rid=bytes.fromhex(document["rid"]),
                ca_index=document["ca_index"],
                ca_key=_key_of(document["ca_key"]),
                iin=document["iin"],
                issuer_key=_key_of(document["issuer_key"]),
                issuer_certificate=Certificate(
                    bytes.fromhex(document["issuer_certificate"]), bytes.fromhex(document["issuer_remainder"])
                ),
                certificates_expire=date.fromisoformat(document["certificates_expire"]),
                imk_ac=bytes.fromhex(document["imk_ac"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CardFileError(f"{path} is damaged: no card can be made from it; create a new bureau") from error


class Standing(Enum):
    """What has become of the application on the card."""

    ACTIVE = "active"
    BLOCKED = "blocked"  # still listed, selected with a warning, refuses to start a transaction
    ABSENT = "absent"  # the card has no contactless payment application at all


@dataclass(frozen=True, slots=True)
class Record:
    """One record, template 70 included, where READ RECORD finds it."""

    sfi: int
    number: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class CardProfile:
    """Everything that is on one card. Without `card_key` and `icc_key` it is a copy: what can be read, no secrets."""

    aid: bytes
    label: str
    pan: Pan
    psn: str
    expires: date
    track2: bytes = field(repr=False)
    aip: bytes
    records: tuple[Record, ...]
    ctq: bytes
    cvn: Cvn
    dki: int
    card_key: bytes | None = field(repr=False)
    icc_key: RsaKey | None
    sdad_size_bytes: int
    ca_public_key: CaPublicKey
    currency: int
    offline_limit_minor: int = 0  # 0: every purchase asks for an online cryptogram
    declines: bool = False
    standing: Standing = Standing.ACTIVE
    atc: int = 0

    def save(self, path: Path) -> None:
        """Write the card file."""
        document = {
            "format": _CARD_FORMAT,
            "aid": _hex(self.aid),
            "label": self.label,
            "pan": self.pan.digits,
            "psn": self.psn,
            "expires": self.expires.isoformat(),
            "track2": _hex(self.track2),
            "aip": _hex(self.aip),
            "records": [
                {"sfi": record.sfi, "number": record.number, "data": _hex(record.data)} for record in self.records
            ],
            "ctq": _hex(self.ctq),
            "cvn": self.cvn.name,
            "dki": self.dki,
            "card_key": None if self.card_key is None else _hex(self.card_key),
            "icc_key": None if self.icc_key is None else _key_document(self.icc_key),
            "sdad_size_bytes": self.sdad_size_bytes,
            "ca_public_key": self.ca_public_key.record(),
            "currency": self.currency,
            "offline_limit_minor": self.offline_limit_minor,
            "declines": self.declines,
            "standing": self.standing.value,
            "atc": self.atc,
        }
        _write(path, document)

    @classmethod
    def load(cls, path: Path) -> CardProfile:
        """Read a card file. Raises `CardFileError`."""
        document = _read(path, _CARD_FORMAT)
        try:
            ca_public_key = document["ca_public_key"]
            card_key, icc_key = document["card_key"], document["icc_key"]
            return cls(
                aid=bytes.fromhex(document["aid"]),
                label=document["label"],
                pan=Pan(document["pan"]),
                psn=document["psn"],
                expires=date.fromisoformat(document["expires"]),
                track2=bytes.fromhex(document["track2"]),
                aip=bytes.fromhex(document["aip"]),
                records=tuple(
                    Record(record["sfi"], record["number"], bytes.fromhex(record["data"]))
                    for record in document["records"]
                ),
                ctq=bytes.fromhex(document["ctq"]),
                cvn=Cvn[document["cvn"]],
                dki=document["dki"],
                card_key=None if card_key is None else bytes.fromhex(card_key),
                icc_key=None if icc_key is None else _key_of(icc_key),
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
                standing=Standing(document["standing"]),
                atc=document["atc"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CardFileError(f"{path} is damaged: the card cannot be presented; personalise it anew") from error


def personalise(
    bureau: Bureau,
    entropy: Entropy,
    *,
    pan: Pan | None = None,
    psn: str = "01",
    expires: date = date(2030, 12, 31),
    cardholder: str = "PAYTERM/TEST CARD",
    cvn: Cvn = Cvn.CVN18,
    country: int = 276,
    currency: int = 978,
    offline_limit_minor: int = 0,
    icc_key_bits: int = ICC_KEY_BITS,
) -> CardProfile:
    """Make a Visa-like card with fDDA. `country` and `currency` are ISO numbers; PAN defaults to `laboratory_pan(1)`.

    A card with an offline limit approves (TC) purchases up to it in its own currency, if the reader lets it.
    """
    account = laboratory_pan(1, bureau.iin) if pan is None else pan
    icc_key = RsaKey.generate(icc_key_bits, bureau.issuer_key.exponent)
    signed_data = b"".join(
        (
            encode(0x5A, _packed(account.digits)),
            encode(0x5F24, bytes.fromhex(f"{expires:%y%m%d}")),
            encode(0x5F28, bytes.fromhex(f"{country:04d}")),
            encode(0x9F07, USAGE_CONTROL),
            encode(0x9F4A, b"\x82"),
        )
    )
    head = b"\x04" + _packed(account.digits, 10) + _month_and_year(bureau.certificates_expire) + entropy(3)
    # 9F4A names the AIP: it is protected with the record, or a thief could switch authentication off.
    icc_certificate = _certify(bureau.issuer_key, head, icc_key, signed_data, AIP_DDA)
    issuer_objects = (
        encode(0x8F, bytes((bureau.ca_index,))),
        encode(0x90, bureau.issuer_certificate.certificate),
        _remainder(0x92, bureau.issuer_certificate),
        encode(0x9F32, bureau.issuer_key.exponent_bytes),
    )
    icc_objects = (
        encode(0x9F46, icc_certificate.certificate),
        encode(0x9F47, icc_key.exponent_bytes),
        _remainder(0x9F48, icc_certificate),
    )
    return CardProfile(
        aid=VISA_AID,
        label="PAYTERM VISA",
        pan=account,
        psn=psn,
        expires=expires,
        track2=_packed(f"{account.digits}D{expires:%y%m}2010000000000"),
        aip=AIP_DDA,
        records=(
            Record(1, 1, encode(0x70, encode(0x5F20, cardholder.encode("ascii")))),
            Record(2, 1, encode(0x70, *issuer_objects)),
            Record(2, 2, encode(0x70, *icc_objects)),
            Record(3, 1, encode(0x70, signed_data)),
        ),
        ctq=CTQ,
        cvn=cvn,
        dki=1,
        card_key=derive_card_key(bureau.imk_ac, account.digits, psn, cvn),
        icc_key=icc_key,
        sdad_size_bytes=icc_key.size_bytes,
        ca_public_key=bureau.ca_public_key,
        currency=currency,
        offline_limit_minor=offline_limit_minor,
    )


def _certify(signer: RsaKey, head: bytes, subject: RsaKey, *also_hashed: bytes) -> Certificate:
    """Certify `subject`: the left of its modulus goes inside, padded or cut (EMV 4.4 Book 2, tables 2 and 9)."""
    fixed = head + bytes((_SHA1, _RSA, subject.size_bytes, len(subject.exponent_bytes)))
    room = signer.room_bytes - len(fixed)
    inside, remainder = subject.modulus[:room], subject.modulus[room:]
    body = fixed + inside + _PADDING * (room - len(inside))
    return Certificate(signer.sign(body, remainder, subject.exponent_bytes, *also_hashed), remainder)


def _remainder(tag: int, certificate: Certificate) -> bytes:
    return encode(tag, certificate.remainder) if certificate.remainder else b""


def _packed(digits: str, size_bytes: int = 0) -> bytes:
    """Digits, two to a byte, F on the right to whole bytes or to `size_bytes`."""
    width = max(2 * size_bytes, len(digits) + len(digits) % 2)
    return bytes.fromhex(digits.ljust(width, "F"))


def _month_and_year(day: date) -> bytes:
    return bytes.fromhex(f"{day:%m%y}")


def _hex(data: bytes) -> str:
    return data.hex().upper()


def _key_document(key: RsaKey) -> dict[str, str | int]:
    return {"p": f"{key.p:X}", "q": f"{key.q:X}", "exponent": key.exponent}


def _key_of(document: Mapping[str, Any]) -> RsaKey:
    return RsaKey(int(document["p"], 16), int(document["q"], 16), document["exponent"])


def _write(path: Path, document: Mapping[str, object]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _read(path: Path, expected_format: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CardFileError(f"{path} cannot be read as a card or bureau file: name another or make it anew") from error
    if not isinstance(document, dict) or document.get("format") != expected_format:
        raise CardFileError(f"{path} is no {expected_format!r} file: name another or make it anew")
    return document

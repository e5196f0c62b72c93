"""Offline data authentication: from the CA public key through issuer and card to a signature (EMV 4.4 Book 2, 5, 6).

Every link is the same act: raise a certificate to the public exponent of the key above it, check the frame and the
hash, and take the next key out. The methods differ only in which signature they check at the end, and over what: SDA a
static one, DDA one over fresh terminal data, CDA one that also covers the cryptogram, fast DDA (Book C-3, Annex C) one
that came with the card's first answer. Nothing here talks to a card: commands, TVR bits, and what a failure means for
the transaction, are for the kernel.

Reasons of a failure: ca_key_missing, missing_data, issuer_certificate, icc_certificate, expired, revoked, static_data,
signature.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from terminal.emv.outcome import OdaMethod, OdaResult, OdaStatus
from terminal.emv.results import Aip
from terminal.emv.tags import Kernel3Tag, Tag

RID_BYTES: Final = 5
CA_MODULUS_BYTES_MAX: Final = 256  # published lists go to 2048 bits; what a record can carry ends at 248 (Book 2, B2.1)
CA_EXPONENT_BYTES_MAX: Final = 3
EXPONENTS: Final = frozenset({b"\x03", b"\x01\x00\x01"})  # Book 2, B2.1: nothing is recovered with any other

FAST_DDA_VERSION: Final = 0x01  # first byte of card authentication related data
FAST_DDA_TERMINAL_DATA: Final = (  # what the card signs over, in this order
    Tag.UNPREDICTABLE_NUMBER,
    Tag.AMOUNT_AUTHORISED,
    Tag.TRANSACTION_CURRENCY_CODE,
    Kernel3Tag.CARD_AUTHENTICATION_RELATED_DATA,
)

_HEAD, _TAIL = 0x6A, 0xBC
_HASH_BYTES: Final = 20
_SHA_1: Final = 0x01
_RSA: Final = 0x01
_ISSUER, _STATIC, _ICC, _DYNAMIC = 0x02, 0x03, 0x04, 0x05  # certificate or signature format
_CRYPTOGRAM_BYTES: Final = 8

_METHODS: Final = (  # best first: bit of the AIP, bit of 9F33 byte 3 (Book 3, 10.3)
    (OdaMethod.CDA, Aip.CDA, 0x08),
    (OdaMethod.DDA, Aip.DDA, 0x40),
    (OdaMethod.SDA, Aip.SDA, 0x80),
)


def sha1(data: bytes) -> bytes:
    """The hash that EMV's RSA certificates prescribe (Book 2, B3.1)."""
    return hashlib.sha1(data, usedforsecurity=False).digest()


class CaKeyError(ValueError):
    """A CA public key that must not be used: offline data authentication against it would prove nothing."""


class PublicKey(NamedTuple):
    """An RSA public key as EMV carries it."""

    modulus: bytes
    exponent: bytes

    def recover(self, signed: bytes, kind: int) -> bytes | None:
        """What was signed (Book 2, A2.1.2), or None when this key signed no such thing."""
        modulus = int.from_bytes(self.modulus, "big")
        if len(signed) != len(self.modulus) or modulus == 0 or self.exponent not in EXPONENTS:
            return None
        number = pow(int.from_bytes(signed, "big"), int.from_bytes(self.exponent, "big"), modulus)
        plain = number.to_bytes(len(self.modulus), "big")
        framed = len(plain) > _HASH_BYTES + 3 and plain[0] == _HEAD and plain[1] == kind and plain[-1] == _TAIL
        return plain if framed else None


@dataclass(frozen=True, slots=True)
class CaKey:
    """A scheme's public key, checked when it is loaded. Raises `CaKeyError`.

    `checksum` is SHA-1 over RID, index, modulus and exponent (Book 2, 11.2.2); None where the scheme publishes none.
    """

    rid: bytes
    index: int
    modulus: bytes
    exponent: bytes
    checksum: bytes | None = None

    def __post_init__(self) -> None:
        name = f"CA public key {self.rid.hex().upper()}/{self.index:02X}"
        if len(self.rid) != RID_BYTES or not 0 <= self.index <= 0xFF:
            raise CaKeyError(f"{name}: a RID has {RID_BYTES} bytes and an index one; correct the key file")
        # Published lists still hold keys of exponent 2: they may be loaded, but authenticate no card.
        if not 0 < len(self.modulus) <= CA_MODULUS_BYTES_MAX or not 0 < len(self.exponent) <= CA_EXPONENT_BYTES_MAX:
            raise CaKeyError(
                f"{name}: a modulus has 1 to {CA_MODULUS_BYTES_MAX} bytes, an exponent 1 to {CA_EXPONENT_BYTES_MAX}; "
                "no card can be authenticated with anything else, take the key from the scheme again"
            )
        if self.checksum is not None and self.checksum != self.computed_checksum():
            raise CaKeyError(
                f"{name} does not match its checksum: it was altered or mistyped, and would accept false cards or "
                "refuse true ones; take the key from the scheme again"
            )

    def computed_checksum(self) -> bytes:
        return sha1(self.rid + bytes((self.index,)) + self.modulus + self.exponent)


class CaKeys:
    """The CA public keys of this terminal, by RID and index. Raises `CaKeyError` for two keys of one name."""

    __slots__ = ("_keys",)

    def __init__(self, keys: Iterable[CaKey] = ()) -> None:
        self._keys: dict[tuple[bytes, int], CaKey] = {}
        for key in keys:
            known = self._keys.setdefault((key.rid, key.index), key)
            if (known.modulus, known.exponent) != (key.modulus, key.exponent):
                raise CaKeyError(f"two different CA public keys {key.rid.hex().upper()}/{key.index:02X}: remove one")

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[CaKey]:
        return iter(self._keys.values())

    def find(self, rid: bytes, index: int) -> PublicKey | None:
        key = self._keys.get((rid, index))
        return PublicKey(key.modulus, key.exponent) if key else None


@dataclass(frozen=True, slots=True)
class RevokedCertificate:
    """An issuer certificate that its scheme has withdrawn (Book 2, 5.1.2)."""

    rid: bytes
    index: int
    serial: bytes


@dataclass(frozen=True, slots=True)
class Trust:
    """What the terminal holds against the card's certificates."""

    ca_keys: CaKeys
    revoked: frozenset[RevokedCertificate]
    date: datetime.date


class AuthenticationFailed(Exception):
    """A link of the chain does not hold; `reason` is one of this module's words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def issuer_key(objects: Mapping[int, bytes], rid: bytes, trust: Trust) -> PublicKey:
    """Recover the issuer public key (Book 2, 5.3 and 6.3). Raises `AuthenticationFailed`."""
    _require(objects, Tag.CA_PUBLIC_KEY_INDEX, Tag.ISSUER_CERTIFICATE, Tag.ISSUER_EXPONENT, Tag.PAN)
    index = int.from_bytes(objects[Tag.CA_PUBLIC_KEY_INDEX], "big")
    ca_key = trust.ca_keys.find(rid, index)
    if ca_key is None:
        raise AuthenticationFailed("ca_key_missing")
    certificate = _Certificate.recover(
        ca_key,
        objects[Tag.ISSUER_CERTIFICATE],
        _ISSUER,
        remainder=objects.get(Tag.ISSUER_REMAINDER, b""),
        exponent=objects[Tag.ISSUER_EXPONENT],
    )
    if certificate is None or not _names_issuer(certificate.subject, objects[Tag.PAN]):
        raise AuthenticationFailed("issuer_certificate")
    _check_date(certificate.expiry, trust.date, "issuer_certificate")
    if RevokedCertificate(rid, index, certificate.serial) in trust.revoked:
        raise AuthenticationFailed("revoked")
    return certificate.key


def icc_key(issuer: PublicKey, objects: Mapping[int, bytes], static_data: bytes, date: datetime.date) -> PublicKey:
    """Recover the card's public key (Book 2, 6.4), all objects being there. Raises `AuthenticationFailed`."""
    certificate = _Certificate.recover(
        issuer,
        objects[Tag.ICC_CERTIFICATE],
        _ICC,
        remainder=objects.get(Tag.ICC_REMAINDER, b""),
        exponent=objects[Tag.ICC_EXPONENT],
        also_hashed=static_data,
    )
    if certificate is None or _digits(certificate.subject) != _digits(objects[Tag.PAN]):
        raise AuthenticationFailed("icc_certificate")
    _check_date(certificate.expiry, date, "icc_certificate")
    return certificate.key


def icc_dynamic_data(icc: PublicKey, signature: bytes, terminal_data: bytes) -> bytes:
    """Check signed dynamic application data, return the ICC dynamic data (Book 2, 6.5.2).

    `terminal_data` is the terminal dynamic data, as it was sent. Raises `AuthenticationFailed`.
    """
    plain = icc.recover(signature, _DYNAMIC)
    if plain is None or plain[2] != _SHA_1:
        raise AuthenticationFailed("signature")
    size = plain[3]
    body, digest = plain[1 : -_HASH_BYTES - 1], plain[-_HASH_BYTES - 1 : -1]
    if size > len(plain) - 25 or sha1(body + terminal_data) != digest:
        raise AuthenticationFailed("signature")
    return plain[4 : 4 + size]


def choose(aip: Aip, capabilities: bytes) -> OdaMethod | None:
    """The best method that card and terminal (9F33) share, or None (Book 3, 10.3)."""
    ours = capabilities[2] if len(capabilities) == 3 else 0
    return next((method for method, theirs, bit in _METHODS if aip & theirs and ours & bit), None)


def card_key(objects: Mapping[int, bytes], rid: bytes, records: bytes | None, trust: Trust) -> PublicKey:
    """The whole chain down to the card's public key. Raises `AuthenticationFailed`."""
    _require(objects, Tag.ICC_CERTIFICATE, Tag.ICC_EXPONENT)
    issuer = issuer_key(objects, rid, trust)
    return icc_key(issuer, objects, static_data_to_authenticate(records, objects), trust.date)


def sda(objects: Mapping[int, bytes], rid: bytes, records: bytes | None, trust: Trust) -> bytes:
    """Static data authentication (Book 2, 5.4). Returns the data authentication code. Raises `AuthenticationFailed`."""
    _require(objects, Tag.SIGNED_STATIC_DATA)
    issuer = issuer_key(objects, rid, trust)
    static_data = static_data_to_authenticate(records, objects)
    plain = issuer.recover(objects[Tag.SIGNED_STATIC_DATA], _STATIC)
    if plain is None or plain[2] != _SHA_1:
        raise AuthenticationFailed("signature")
    body, digest = plain[1 : -_HASH_BYTES - 1], plain[-_HASH_BYTES - 1 : -1]
    if sha1(body + static_data) != digest:
        raise AuthenticationFailed("signature")
    return plain[3:5]


def dda(icc: PublicKey, signature: bytes, terminal_data: bytes) -> bytes:
    """Dynamic data authentication (Book 2, 6.5). Returns the ICC dynamic number. Raises `AuthenticationFailed`."""
    number, _ = _dynamic_number(icc_dynamic_data(icc, signature, terminal_data))
    return number


class SignedCryptogram(NamedTuple):
    """What a combined signature vouches for (Book 2, table 19)."""

    icc_dynamic_number: bytes
    cid: int
    cryptogram: bytes
    transaction_data_hash: bytes
    more: bytes  # what a kernel of its own has signed besides


def cda(icc: PublicKey, signature: bytes, unpredictable_number: bytes) -> SignedCryptogram:
    """Check a signature that came with GENERATE AC and open it (Book 2, 6.6.2). Raises `AuthenticationFailed`.

    It says nothing yet of this transaction: compare CID and hash with what was sent and received in clear.
    """
    number, rest = _dynamic_number(icc_dynamic_data(icc, signature, unpredictable_number))
    if len(rest) < 1 + _CRYPTOGRAM_BYTES + _HASH_BYTES:
        raise AuthenticationFailed("signature")
    hash_at = 1 + _CRYPTOGRAM_BYTES
    end = hash_at + _HASH_BYTES
    return SignedCryptogram(number, rest[0], rest[1:hash_at], rest[hash_at:end], rest[end:])


def _dynamic_number(dynamic_data: bytes) -> tuple[bytes, bytes]:
    """The ICC dynamic number, which is led by its length, and what follows it."""
    size = dynamic_data[0] if dynamic_data else 0
    if not 2 <= size <= min(8, len(dynamic_data) - 1):
        raise AuthenticationFailed("signature")
    return dynamic_data[1 : 1 + size], dynamic_data[1 + size :]


def static_data_to_authenticate(records: bytes | None, objects: Mapping[int, bytes]) -> bytes:
    """The records' part, and the AIP where the Static Data Authentication Tag List says so (Book 3, 10.3).

    Raises `AuthenticationFailed`.
    """
    tag_list = objects.get(Tag.STATIC_DATA_TAG_LIST)
    if records is None or tag_list not in {None, bytes((Tag.AIP,))}:
        raise AuthenticationFailed("static_data")
    return records if tag_list is None else records + objects.get(Tag.AIP, b"")


def fast_dda(objects: Mapping[int, bytes], rid: bytes, records: bytes | None, trust: Trust) -> OdaResult:
    """Fast DDA, version 01 (Book C-3, Annex C): the signature came with GET PROCESSING OPTIONS or a record.

    `objects` holds the card's data objects and those that were sent to it. Version 00 signs the unpredictable number
    alone, so that amount and currency could be exchanged under it: it is not accepted.
    """
    if not all(objects.get(tag) for tag in FAST_DDA_TERMINAL_DATA):
        return OdaResult(OdaStatus.FAILED, OdaMethod.FDDA, "missing_data")
    terminal_data = b"".join(objects[tag] for tag in FAST_DDA_TERMINAL_DATA)
    return fast_dda_over(terminal_data, objects, rid, records, trust)


def fast_dda_over(
    terminal_data: bytes, objects: Mapping[int, bytes], rid: bytes, records: bytes | None, trust: Trust
) -> OdaResult:
    """The same, over terminal dynamic data that is already put together."""
    related = Kernel3Tag.CARD_AUTHENTICATION_RELATED_DATA
    try:
        _require(objects, Tag.SIGNED_DYNAMIC_DATA, Tag.ATC, related)
        icc = card_key(objects, rid, records, trust)
        if objects[related][0] != FAST_DDA_VERSION:
            raise AuthenticationFailed("signature")
        dynamic_data = icc_dynamic_data(icc, objects[Tag.SIGNED_DYNAMIC_DATA], terminal_data)
        if dynamic_data != bytes((len(objects[Tag.ATC]),)) + objects[Tag.ATC]:
            raise AuthenticationFailed("signature")
    except AuthenticationFailed as failed:
        return OdaResult(OdaStatus.FAILED, OdaMethod.FDDA, failed.reason)
    return OdaResult(OdaStatus.OK, OdaMethod.FDDA)


class _Certificate(NamedTuple):
    """What issuer and card certificates have in common; `subject` is an IIN or a PAN, padded with F."""

    subject: bytes
    expiry: bytes
    serial: bytes
    key: PublicKey

    @classmethod
    def recover(
        cls, signer: PublicKey, signed: bytes, kind: int, *, remainder: bytes, exponent: bytes, also_hashed: bytes = b""
    ) -> _Certificate | None:
        """Tables 6 and 14 of Book 2: they differ in the width of the subject alone. Raises `AuthenticationFailed`."""
        plain = signer.recover(signed, kind)
        subject_end = 6 if kind == _ISSUER else 12
        field_at = subject_end + 9  # after expiry 2, serial 3, hash and key algorithm, key and exponent length
        field_end = len(signed) - _HASH_BYTES - 1
        if plain is None or field_end < field_at:
            return None
        hash_algorithm, key_algorithm, key_size = plain[field_at - 4 : field_at - 1]
        if (hash_algorithm, key_algorithm) != (_SHA_1, _RSA) or exponent not in EXPONENTS:
            return None
        if key_size > field_end - field_at and not remainder:
            raise AuthenticationFailed("missing_data")  # the certificate says that there is one (Book 3, 7.5)
        if sha1(plain[1:field_end] + remainder + exponent + also_hashed) != plain[field_end:-1]:
            return None
        # The key stands in the field, padded with BB, or begins there and ends in the remainder.
        field = plain[field_at:field_end]
        if key_size > len(field) and len(remainder) != key_size - len(field):
            return None
        return cls(
            subject=plain[2:subject_end],
            expiry=plain[subject_end : subject_end + 2],
            serial=plain[subject_end + 2 : subject_end + 5],
            key=PublicKey((field + remainder)[:key_size], exponent),
        )


def _require(objects: Mapping[int, bytes], *wanted: int) -> None:
    if not all(objects.get(tag) for tag in wanted):
        raise AuthenticationFailed("missing_data")


def _digits(value: bytes) -> str:
    return value.hex().upper().rstrip("F")


def _names_issuer(subject: bytes, pan: bytes) -> bool:
    iin = _digits(subject)
    return len(iin) >= 3 and _digits(pan).startswith(iin)  # the leftmost 3 to 8 digits of the PAN


def _check_date(expiry: bytes, date: datetime.date, unreadable: str) -> None:
    """A certificate is good through the last day of its month MMYY. Raises `AuthenticationFailed`."""
    text = expiry.hex()
    if not text.isdecimal() or not 1 <= int(text[:2]) <= 12:
        raise AuthenticationFailed(unreadable)
    if (full_year(int(text[2:])), int(text[:2])) < (date.year, date.month):
        raise AuthenticationFailed("expired")


def full_year(year: int) -> int:
    """A year of two digits: 50 to 99 are of the last century (Book 4, 6.7.3)."""
    return year + (1900 if year >= 50 else 2000)

"""Who vouches for a test card: certification authority, issuer, and the owner of the issuer master key.

A laboratory has no card scheme and no bank behind it, so one `Bureau` here plays all three for one scheme: its public
key is what a terminal is configured with, for the RID of its cards. Two bureaus with the same issuer master key are one
bank that issues cards of two schemes. Certificates follow EMV 4.4 Book 2, 5 and 6, with real RSA; only keys made here
ever verify them. RSA keys come from `cryptography`, which takes no seed, so a run is repeated from stored files, not
from a seed; everything else that is random comes from `entropy`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any, Final, TypeAlias

from cryptography.hazmat.primitives.asymmetric import rsa

from hwsim.cards import files
from hwsim.cards.cryptogram import KEY_BYTES, odd_parity, script_master_key
from hwsim.cards.files import CardFileError, hexadecimal

Entropy: TypeAlias = Callable[[int], bytes]

CA_KEY_BITS: Final = 1408
ISSUER_KEY_BITS: Final = 1408  # as long as the CA's: the certificate cannot hold it, so a remainder (92) is needed

_BUREAU_FORMAT: Final = "payterm test bureau, version 1"
_ENVELOPE_BYTES: Final = 22  # header 6A, SHA-1 hash, trailer BC around what a signature recovers
_SHA1: Final = 0x01  # hash algorithm indicator
_RSA: Final = 0x01  # public key algorithm indicator
_PADDING: Final = b"\xbb"


class Scheme(Enum):
    """Whose rules a card follows."""

    VISA = "visa"
    MASTERCARD = "mastercard"

    @property
    def rid(self) -> bytes:
        return _RIDS[self]

    @property
    def iin(self) -> str:
        """What the test account numbers of this scheme begin with; zeros up to the serial number follow."""
        return _IINS[self]


_RIDS: Final[Mapping[Scheme, bytes]] = {
    Scheme.VISA: bytes.fromhex("A000000003"),
    Scheme.MASTERCARD: bytes.fromhex("A000000004"),
}
_IINS: Final[Mapping[Scheme, str]] = {Scheme.VISA: "400000", Scheme.MASTERCARD: "510000"}


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
            "rid": hexadecimal(self.rid),
            "index": f"{self.index:02X}",
            "modulus": hexadecimal(self.modulus),
            "exponent": hexadecimal(self.exponent),
            "checksum": hexadecimal(self.checksum),
        }


@dataclass(frozen=True, slots=True)
class Certificate:
    """A public key certificate and the part of the key that found no room in it (perhaps empty)."""

    certificate: bytes
    remainder: bytes


@dataclass(frozen=True, slots=True)
class Bureau:
    """Certification authority, issuer and issuer master key for one scheme; its cards share one CA public key."""

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
        scheme: Scheme = Scheme.VISA,
        imk_ac: bytes | None = None,  # of the other bureau, where one bank issues both schemes
        ca_index: int = 0xF0,  # no published key of these RIDs, live or test, has it
        certificates_expire: date = date(2040, 12, 31),
        exponent: int = 3,
        ca_key_bits: int = CA_KEY_BITS,
        issuer_key_bits: int = ISSUER_KEY_BITS,
    ) -> Bureau:
        """Make the keys and certify the issuer's (EMV 4.4 Book 2, table 2)."""
        ca_key = RsaKey.generate(ca_key_bits, exponent)
        issuer_key = RsaKey.generate(issuer_key_bits, exponent)
        head = b"\x02" + packed(scheme.iin, 4) + month_and_year(certificates_expire) + entropy(3)
        return cls(
            rid=scheme.rid,
            ca_index=ca_index,
            ca_key=ca_key,
            iin=scheme.iin,
            issuer_key=issuer_key,
            issuer_certificate=certify(ca_key, head, issuer_key),
            certificates_expire=certificates_expire,
            imk_ac=odd_parity(entropy(KEY_BYTES)) if imk_ac is None else imk_ac,
        )

    @property
    def scheme(self) -> Scheme:
        return next(scheme for scheme in Scheme if scheme.rid == self.rid)

    def with_issuer_serial(self, serial: bytes) -> Bureau:
        """The same bank under another certificate, with this serial number (3 bytes): one that may be withdrawn."""
        head = b"\x02" + packed(self.iin, 4) + month_and_year(self.certificates_expire) + serial
        return replace(self, issuer_certificate=certify(self.ca_key, head, self.issuer_key))

    @property
    def imk_smi(self) -> bytes:
        """The issuer master key under the MACs of script commands."""
        return script_master_key(self.imk_ac)

    @property
    def ca_public_key(self) -> CaPublicKey:
        return CaPublicKey(self.rid, self.ca_index, self.ca_key.modulus, self.ca_key.exponent_bytes)

    def save(self, path: Path) -> None:
        """Write the bureau file."""
        document = {
            "format": _BUREAU_FORMAT,
            "rid": hexadecimal(self.rid),
            "ca_index": self.ca_index,
            "ca_key": key_document(self.ca_key),
            "iin": self.iin,
            "issuer_key": key_document(self.issuer_key),
            "issuer_certificate": hexadecimal(self.issuer_certificate.certificate),
            "issuer_remainder": hexadecimal(self.issuer_certificate.remainder),
            "certificates_expire": self.certificates_expire.isoformat(),
            "imk_ac": hexadecimal(self.imk_ac),
        }
        files.write(path, document)

    @classmethod
    def load(cls, path: Path) -> Bureau:
        """Read a bureau file. Raises `CardFileError`."""
        document = files.read(path, _BUREAU_FORMAT)
        try:
            return cls(
                rid=bytes.fromhex(document["rid"]),
                ca_index=document["ca_index"],
                ca_key=key_of(document["ca_key"]),
                iin=document["iin"],
                issuer_key=key_of(document["issuer_key"]),
                issuer_certificate=Certificate(
                    bytes.fromhex(document["issuer_certificate"]), bytes.fromhex(document["issuer_remainder"])
                ),
                certificates_expire=date.fromisoformat(document["certificates_expire"]),
                imk_ac=bytes.fromhex(document["imk_ac"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CardFileError(f"{path} is damaged: no card can be made from it; create a new bureau") from error


def certify(signer: RsaKey, head: bytes, subject: RsaKey, *also_hashed: bytes) -> Certificate:
    """Certify `subject`: the left of its modulus goes inside, padded or cut (EMV 4.4 Book 2, tables 2 and 9)."""
    fixed = head + bytes((_SHA1, _RSA, subject.size_bytes, len(subject.exponent_bytes)))
    room = signer.room_bytes - len(fixed)
    inside, remainder = subject.modulus[:room], subject.modulus[room:]
    body = fixed + inside + _PADDING * (room - len(inside))
    return Certificate(signer.sign(body, remainder, subject.exponent_bytes, *also_hashed), remainder)


def packed(digits: str, size_bytes: int = 0) -> bytes:
    """Digits, two to a byte, F on the right to whole bytes or to `size_bytes`."""
    width = max(2 * size_bytes, len(digits) + len(digits) % 2)
    return bytes.fromhex(digits.ljust(width, "F"))


def month_and_year(day: date) -> bytes:
    return bytes.fromhex(f"{day:%m%y}")


def key_document(key: RsaKey) -> dict[str, str | int]:
    return {"p": f"{key.p:X}", "q": f"{key.q:X}", "exponent": key.exponent}


def key_of(document: Mapping[str, Any]) -> RsaKey:
    return RsaKey(int(document["p"], 16), int(document["q"], 16), document["exponent"])

"""Cryptograms of Visa and Mastercard: what a card proves to its issuer, and the issuer's answer (EMV 4.4 Book 2, 8, 9).

The cryptogram version number in 9F10 says which key and which data make the cryptogram, and which method and key make
the answer to it. Of Visa's versions 10 uses the card's master key itself and, of the issuer application data, only the
card verification results; 18 and 22 use a session key for each transaction and the whole issuer application data. Of
M/Chip's, 16 and 17 derive the session key from the unpredictable number, too, 20 and 21 from the counter alone; 17 and
21 put the card's offline counters under the cryptogram. Card and issuer both call this module, so the tests check it
against an independent implementation.

Triple DES comes from the `decrepit` part of `cryptography`, which is where EMV's payment cryptograms still live.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from enum import Flag, IntEnum, auto
from typing import Final, NamedTuple

from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import Cipher, modes

KEY_BYTES: Final = 16  # a double length DES key
BLOCK_BYTES: Final = 8
MAC_BYTES: Final = 8  # of a script command

AC_INPUT: Final = (0x9F02, 0x9F03, 0x9F1A, 0x95, 0x5F2A, 0x9A, 0x9C, 0x9F37, 0x82, 0x9F36)
"""The data objects under every cryptogram, in this order; part or all of 9F10 follows."""

_OPTION_A_PAN_DIGITS_MAX: Final = 16  # option B differs from option A only above this


class Cvn(IntEnum):
    """Cryptogram version number, by its usual name. The value is the byte in 9F10."""

    CVN10 = 0x0A  # Visa
    CVN18 = 0x12
    CVN22 = 0x22
    CVN16 = 0x10  # M/Chip
    CVN17 = 0x11
    CVN20 = 0x14
    CVN21 = 0x15


VISA_VERSIONS: Final = (Cvn.CVN10, Cvn.CVN18, Cvn.CVN22)
MCHIP_VERSIONS: Final = (Cvn.CVN16, Cvn.CVN17, Cvn.CVN20, Cvn.CVN21)


class CryptogramType(IntEnum):
    """What the card says (9F27, bits 8 and 7)."""

    AAC = 0x00
    TC = 0x40
    ARQC = 0x80


class Finding(Flag):
    """What the card reports to its issuer beside its decision: bits of the card verification results."""

    DDA_DONE = auto()
    CDA_DONE = auto()
    ONLINE_INCOMPLETE = auto()  # the last time that it asked for the issuer, it heard of no answer
    UNABLE_ONLINE = auto()
    LIMIT_EXCEEDED = auto()  # too many transactions since the last online one
    ISSUER_AUTHENTICATED = auto()
    ISSUER_AUTHENTICATION_FAILED = auto()
    ISSUER_AUTHENTICATION_MISSING = auto()
    SCRIPT_RECEIVED = auto()
    SCRIPT_FAILED = auto()


NOTHING_FOUND: Final = Finding(0)

# Byte of the card verification results (from 0) and its bit. What a scheme has no bit for, its card does not report.
_VISA_BITS: Final[Mapping[Finding, tuple[int, int]]] = {
    Finding.ISSUER_AUTHENTICATION_FAILED: (1, 0x08),
    Finding.UNABLE_ONLINE: (1, 0x01),
    Finding.ONLINE_INCOMPLETE: (2, 0x80),
    Finding.LIMIT_EXCEEDED: (2, 0x20),
    Finding.ISSUER_AUTHENTICATION_MISSING: (2, 0x04),
    Finding.SCRIPT_RECEIVED: (3, 0x10),  # one script command, in the upper half
    Finding.SCRIPT_FAILED: (3, 0x08),
    Finding.DDA_DONE: (3, 0x02),
}
_MCHIP_BITS: Final[Mapping[Finding, tuple[int, int]]] = {
    Finding.DDA_DONE: (1, 0x80),
    Finding.CDA_DONE: (1, 0x40),
    Finding.ISSUER_AUTHENTICATED: (1, 0x10),
    Finding.ONLINE_INCOMPLETE: (3, 0x80),
    Finding.UNABLE_ONLINE: (3, 0x40),
    Finding.LIMIT_EXCEEDED: (4, 0x40),
    Finding.ISSUER_AUTHENTICATION_FAILED: (4, 0x04),
    Finding.SCRIPT_RECEIVED: (4, 0x02),
    Finding.SCRIPT_FAILED: (4, 0x01),
}
_MCHIP_CVR_BYTES: Final = 6
_MCHIP_COUNTERS_BYTES: Final = 8
_MCHIP_BYTES: Final = 2 + _MCHIP_CVR_BYTES + 2 + _MCHIP_COUNTERS_BYTES

_FIRST: Final[Mapping[CryptogramType, int]] = {
    CryptogramType.AAC: 0x00,
    CryptogramType.TC: 0x10,
    CryptogramType.ARQC: 0x20,
}
_SECOND: Final[Mapping[CryptogramType | None, int]] = {
    CryptogramType.AAC: 0x00,
    CryptogramType.TC: 0x40,
    None: 0x80,  # no second GENERATE AC was asked for
}
_FIRST_OF_BITS: Final = {bits: kind for kind, bits in _FIRST.items()}
_SECOND_OF_BITS: Final = {bits: kind for kind, bits in _SECOND.items()}


class IssuerApplicationData(NamedTuple):
    """Tag 9F10, as far as the issuer reads it. `kind` is the cryptogram that it came with."""

    cvn: Cvn
    cvr: bytes
    kind: CryptogramType
    counters: bytes = b""  # M/Chip only


def issuer_application_data(
    cvn: Cvn,
    dki: int,
    first: CryptogramType,
    *,
    second: CryptogramType | None = None,
    findings: Finding = NOTHING_FOUND,
    icc_number: bytes = bytes(2),
    counters: bytes = bytes(_MCHIP_COUNTERS_BYTES),
) -> bytes:
    """Tag 9F10: Visa's format 0 (versions 10 and 18) or 2 (22), or M/Chip's 18 bytes. `dki`: derivation key index.

    `first` is what the first GENERATE AC (contactless Visa: GET PROCESSING OPTIONS) gave, `second` what the second did.
    """
    result = _SECOND[second] | _FIRST[first]
    match cvn:
        case Cvn.CVN10 | Cvn.CVN18:
            cvr = _with_bits(bytes((0x03, result, 0x00, 0x00)), findings, _VISA_BITS)
            return bytes((0x06, dki, cvn)) + cvr
        case Cvn.CVN22:
            cvr = _with_bits(bytes((0x00, result, 0x00, 0x00, 0x00)), findings, _VISA_BITS)
            return (bytes((0x1F, cvn, dki)) + cvr).ljust(32, b"\x00")
        case Cvn.CVN16 | Cvn.CVN17 | Cvn.CVN20 | Cvn.CVN21:
            cvr = _with_bits(bytes((result, 0x00, 0x00, 0x00, 0x00, 0x00)), findings, _MCHIP_BITS)
            return bytes((dki, cvn)) + cvr + icc_number + counters


def read_issuer_application_data(iad: bytes) -> IssuerApplicationData:
    """The reverse. Raises `ValueError` for a layout, version or result that is none of these."""
    if len(iad) == 7 and iad[0] == 0x06 and iad[3] == 0x03 and iad[2] in (Cvn.CVN10, Cvn.CVN18):
        cvn, cvr, result, counters = Cvn(iad[2]), iad[3:7], iad[4], b""
    elif len(iad) == 32 and iad[0] == 0x1F and iad[1] == Cvn.CVN22:
        cvn, cvr, result, counters = Cvn.CVN22, iad[3:8], iad[4], b""
    elif len(iad) == _MCHIP_BYTES and iad[1] in MCHIP_VERSIONS:
        cvn, cvr, result, counters = Cvn(iad[1]), iad[2:8], iad[2], iad[10:]
    else:
        raise ValueError("the issuer application data has none of the known layouts")
    first, second_bits = _FIRST_OF_BITS.get(result & 0x30), result & 0xC0
    if first is None or second_bits not in _SECOND_OF_BITS:
        raise ValueError("the card verification results name no cryptogram")
    second = _SECOND_OF_BITS[second_bits]
    return IssuerApplicationData(cvn, cvr, first if second is None else second, counters)


def _with_bits(cvr: bytes, findings: Finding, bits: Mapping[Finding, tuple[int, int]]) -> bytes:
    marked = bytearray(cvr)
    for finding in findings:
        if finding in bits:
            index, mask = bits[finding]
            marked[index] |= mask
    return bytes(marked)


def derive_card_key(issuer_master_key: bytes, pan: str, psn: str, cvn: Cvn) -> bytes:
    """The card's master key (EMV 4.4 Book 2, A1.4): option A, or B where the version has it and the PAN is long."""
    digits = pan + psn
    if cvn in (Cvn.CVN18, Cvn.CVN22) and len(pan) > _OPTION_A_PAN_DIGITS_MAX:
        packed = bytes.fromhex(digits if len(digits) % 2 == 0 else "0" + digits)
        digest = hashlib.sha1(packed, usedforsecurity=False).hexdigest()  # prescribed by the book
        decimals = [digit for digit in digest if digit.isdecimal()]
        replaced = [str(int(digit, 16) - 10) for digit in digest if not digit.isdecimal()]
        digits = "".join((decimals + replaced)[:16])
    block = bytes.fromhex(digits[-16:].zfill(16))
    return odd_parity(_encrypt(issuer_master_key, block + bytes(byte ^ 0xFF for byte in block)))


def script_master_key(imk_ac: bytes) -> bytes:
    """The issuer master key for secure messaging. A laboratory's bank has one secret, and this one follows from it."""
    return odd_parity(hashlib.sha256(b"payterm secure messaging integrity" + imk_ac).digest()[:KEY_BYTES])


def application_cryptogram(card_key: bytes, objects: Mapping[int, bytes]) -> bytes:
    """Tag 9F26 over `AC_INPUT` and 9F10, all taken from `objects`. Raises `KeyError`, `ValueError` (a strange 9F10)."""
    iad = objects[0x9F10]
    layout = read_issuer_application_data(iad)
    data = b"".join(objects[tag] for tag in AC_INPUT)
    match layout.cvn:
        case Cvn.CVN10:
            message = data + layout.cvr
            message += bytes(-len(message) % BLOCK_BYTES)
        case Cvn.CVN18 | Cvn.CVN22:
            message = _padded(data + iad)
        case Cvn.CVN16 | Cvn.CVN20:
            message = _padded(data + layout.cvr)
        case Cvn.CVN17 | Cvn.CVN21:
            message = _padded(data + layout.cvr + layout.counters)
    return _retail_mac(_session_key(card_key, layout.cvn, objects[0x9F36], objects[0x9F37]), message)


class Online(NamedTuple):
    """One online transaction as card and issuer both know it: what the keys of the answer depend on."""

    cvn: Cvn
    atc: bytes
    unpredictable_number: bytes
    arqc: bytes


def response_cryptogram(card_key: bytes, online: Online, said: bytes) -> bytes:
    """The ARPC. `said` is what it protects: by method 1 the two letters of the response code, by method 2 (Visa's
    versions 18 and 22) the card status update of 4 bytes (EMV 4.4 Book 2, 8.2)."""
    match online.cvn:
        case Cvn.CVN10 | Cvn.CVN16 | Cvn.CVN17:
            return _response_1(card_key, online.arqc, said)
        case Cvn.CVN20 | Cvn.CVN21:
            key = _session_key(card_key, online.cvn, online.atc, online.unpredictable_number)
            return _response_1(key, online.arqc, said)
        case Cvn.CVN18 | Cvn.CVN22:
            key = _session_key(card_key, online.cvn, online.atc, online.unpredictable_number)
            return _retail_mac(key, _padded(online.arqc + said))[:4]


def command_mac(script_key: bytes, online: Online, header: bytes, data: bytes) -> bytes:
    """The MAC that ends a script command (EMV 4.4 Book 2, 9.2): `header` is CLA INS P1 P2 Lc, `data` without MAC."""
    match online.cvn:
        case Cvn.CVN10 | Cvn.CVN18:
            last = int.from_bytes(online.atc, "big")
            mask = last.to_bytes(8, "big") + (last ^ 0xFFFF).to_bytes(8, "big")
            key = odd_parity(bytes(a ^ b for a, b in zip(script_key, mask, strict=True)))
        case Cvn.CVN22 | Cvn.CVN16 | Cvn.CVN17 | Cvn.CVN20 | Cvn.CVN21:
            key = _derive(script_key, online.arqc)
    return _retail_mac(key, _padded(header + online.atc + online.arqc + data))[:MAC_BYTES]


def _session_key(card_key: bytes, cvn: Cvn, atc: bytes, unpredictable_number: bytes) -> bytes:
    """The key of this one transaction (EMV 4.4 Book 2, A1.3.1; M/Chip's own derivation for versions 16 and 17)."""
    match cvn:
        case Cvn.CVN10:
            return card_key
        case Cvn.CVN18 | Cvn.CVN22 | Cvn.CVN20 | Cvn.CVN21:
            return _derive(card_key, atc + bytes(6))
        case Cvn.CVN16 | Cvn.CVN17:
            return _derive(card_key, atc + bytes(2) + unpredictable_number)


def _derive(key: bytes, diversifier: bytes) -> bytes:
    """Common session key derivation: the two halves differ in their third byte."""
    halves = b"".join(diversifier[:2] + half + diversifier[3:] for half in (b"\xf0", b"\x0f"))
    return odd_parity(_encrypt(key, halves))


def _response_1(key: bytes, arqc: bytes, response_code: bytes) -> bytes:
    padded = response_code + bytes(BLOCK_BYTES - len(response_code))
    return _encrypt(key, bytes(left ^ right for left, right in zip(arqc, padded, strict=True)))


def _padded(message: bytes) -> bytes:
    """ISO/IEC 9797-1 padding method 2."""
    message += b"\x80"
    return message + bytes(-len(message) % BLOCK_BYTES)


def odd_parity(key: bytes) -> bytes:
    """The key with the lowest bit of each byte set so that the byte has an odd number of ones."""
    return bytes(byte if byte.bit_count() % 2 else byte ^ 1 for byte in key)


def _encrypt(key: bytes, blocks: bytes) -> bytes:
    encryptor = Cipher(TripleDES(key + key[:BLOCK_BYTES]), modes.ECB()).encryptor()  # noqa: S305 (key derivation)
    return encryptor.update(blocks) + encryptor.finalize()


def _retail_mac(key: bytes, message: bytes) -> bytes:
    """ISO/IEC 9797-1 algorithm 3: single DES along the chain, Triple DES on its last block."""
    left = key[:BLOCK_BYTES]
    head, last = message[:-BLOCK_BYTES], message[-BLOCK_BYTES:]
    chain = bytes(BLOCK_BYTES)
    if head:
        # Three equal keys make Triple DES single DES.
        encryptor = Cipher(TripleDES(left * 3), modes.CBC(chain)).encryptor()
        chain = (encryptor.update(head) + encryptor.finalize())[-BLOCK_BYTES:]
    return _encrypt(key, bytes(a ^ b for a, b in zip(last, chain, strict=True)))

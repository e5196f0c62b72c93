"""Visa's cryptograms: what a card proves to its issuer, and the issuer's answer (EMV 4.4 Book 2, 8 and Annex A1).

Three cryptogram version numbers are enough for a laboratory: 10 (the card's master key itself, and of the issuer
application data only the card verification results), 18 and 22 (a session key for each transaction, the whole issuer
application data). Card and issuer both call this module, so the tests check it against an independent implementation.

Triple DES comes from the `decrepit` part of `cryptography`, which is where EMV's payment cryptograms still live.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from enum import IntEnum
from typing import Final, NamedTuple

from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import Cipher, modes

KEY_BYTES: Final = 16  # a double length DES key
BLOCK_BYTES: Final = 8

AC_INPUT: Final = (0x9F02, 0x9F03, 0x9F1A, 0x95, 0x5F2A, 0x9A, 0x9C, 0x9F37, 0x82, 0x9F36)
"""The data objects under every Visa cryptogram, in this order; part or all of 9F10 follows."""

_OPTION_A_PAN_DIGITS_MAX: Final = 16  # option B differs from option A only above this


class Cvn(IntEnum):
    """Cryptogram version number: which key and which data make the cryptogram. The value is the byte in 9F10."""

    CVN10 = 0x0A
    CVN18 = 0x12
    CVN22 = 0x22


class CryptogramType(IntEnum):
    """What the card says (9F27, bits 8 and 7)."""

    AAC = 0x00
    TC = 0x40
    ARQC = 0x80


_CVR_RESULT: Final[Mapping[CryptogramType, int]] = {
    # Bits 8-7: no second GENERATE AC was asked for; bits 6-5: what the first, or here GET PROCESSING OPTIONS, gave.
    CryptogramType.AAC: 0x80,
    CryptogramType.TC: 0x90,
    CryptogramType.ARQC: 0xA0,
}
_TYPE_OF_RESULT: Final = {0x00: CryptogramType.AAC, 0x10: CryptogramType.TC, 0x20: CryptogramType.ARQC}


class IssuerApplicationData(NamedTuple):
    """Tag 9F10, as far as the issuer reads it."""

    cvn: Cvn
    cvr: bytes
    kind: CryptogramType


def issuer_application_data(cvn: Cvn, dki: int, kind: CryptogramType) -> bytes:
    """Tag 9F10: format 0 for versions 10 and 18, format 2 for 22. `dki` is the derivation key index."""
    result = _CVR_RESULT[kind]
    match cvn:
        case Cvn.CVN10 | Cvn.CVN18:
            return bytes((0x06, dki, cvn, 0x03, result, 0x00, 0x00))
        case Cvn.CVN22:
            return bytes((0x1F, cvn, dki, 0x00, result, 0x00, 0x00, 0x00)).ljust(32, b"\x00")


def read_issuer_application_data(iad: bytes) -> IssuerApplicationData:
    """The reverse. Raises `ValueError` for a layout, version or result that is not Visa's."""
    if len(iad) == 7 and iad[0] == 0x06 and iad[3] == 0x03:
        cvn, cvr = Cvn(iad[2]), iad[3:7]
    elif len(iad) == 32 and iad[0] == 0x1F:
        cvn, cvr = Cvn(iad[1]), iad[3:8]
    else:
        raise ValueError("the issuer application data has none of the known layouts")
    kind = _TYPE_OF_RESULT.get(iad[4] & 0x30)
    if kind is None:
        raise ValueError("the card verification results name no cryptogram")
    return IssuerApplicationData(cvn, cvr, kind)


def derive_card_key(issuer_master_key: bytes, pan: str, psn: str, cvn: Cvn) -> bytes:
    """The card's master key (EMV 4.4 Book 2, A1.4): option A, or B where the version has it and the PAN is long."""
    digits = pan + psn
    if cvn is not Cvn.CVN10 and len(pan) > _OPTION_A_PAN_DIGITS_MAX:
        packed = bytes.fromhex(digits if len(digits) % 2 == 0 else "0" + digits)
        digest = hashlib.sha1(packed, usedforsecurity=False).hexdigest()  # prescribed by the book
        decimals = [digit for digit in digest if digit.isdecimal()]
        replaced = [str(int(digit, 16) - 10) for digit in digest if not digit.isdecimal()]
        digits = "".join((decimals + replaced)[:16])
    block = bytes.fromhex(digits[-16:].zfill(16))
    return odd_parity(_encrypt(issuer_master_key, block + bytes(byte ^ 0xFF for byte in block)))


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
            message = data + iad + b"\x80"
            message += bytes(-len(message) % BLOCK_BYTES)
    return _retail_mac(session_key(card_key, objects[0x9F36], layout.cvn), message)


def session_key(card_key: bytes, atc: bytes, cvn: Cvn) -> bytes:
    """The key of this one transaction (EMV 4.4 Book 2, A1.3.1); version 10 has none and uses the card's."""
    if cvn is Cvn.CVN10:
        return card_key
    halves = b"".join(atc + half + bytes(5) for half in (b"\xf0", b"\x0f"))
    return odd_parity(_encrypt(card_key, halves))


def response_cryptogram_1(key: bytes, arqc: bytes, response_code: bytes) -> bytes:
    """ARPC by method 1 (EMV 4.4 Book 2, 8.2.1): 8 bytes over the ARQC and the two letters of the response code."""
    padded = response_code + bytes(BLOCK_BYTES - len(response_code))
    return _encrypt(key, bytes(left ^ right for left, right in zip(arqc, padded, strict=True)))


def response_cryptogram_2(key: bytes, arqc: bytes, card_status_update: bytes) -> bytes:
    """ARPC by method 2 (EMV 4.4 Book 2, 8.2.2): 4 bytes over the ARQC and the card status update."""
    message = arqc + card_status_update + b"\x80"
    return _retail_mac(key, message + bytes(-len(message) % BLOCK_BYTES))[:4]


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

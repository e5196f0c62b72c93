"""GENERATE AC (EMV 4.4 Book 3, 6.5.5): asking for a cryptogram, reading the answer, and what CDA vouches for in it.

Which cryptogram to ask for is action analysis (`decision`); what its absence means is each kernel's affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from terminal.emv import authentication, tlv
from terminal.emv.apdu import Command
from terminal.emv.authentication import AuthenticationFailed, PublicKey
from terminal.emv.decision import AcType
from terminal.emv.initiation import COMMAND_DATA_MAX
from terminal.emv.records import CardFault, CardObjects
from terminal.emv.tags import Tag

_CDA_SIGNATURE: Final = 0x10  # P1
_AC_TYPE: Final = 0xC0  # of the CID
_FIXED: Final = (Tag.CRYPTOGRAM_INFORMATION, Tag.ATC, Tag.CRYPTOGRAM, Tag.ISSUER_APPLICATION_DATA)
_FORMAT_1_BYTES_MIN: Final = 11  # CID 1, ATC 2, cryptogram 8; issuer application data follows

# What the card may answer: it may ask for more caution, never for less (Book 3, 9.3).
_MAY_ANSWER: Final[Mapping[AcType, frozenset[int]]] = {
    AcType.TC: frozenset({AcType.TC, AcType.ARQC, AcType.AAC}),
    AcType.ARQC: frozenset({AcType.ARQC, AcType.AAC}),
    AcType.AAC: frozenset({AcType.AAC}),
}


def generate_ac(kind: AcType, data: bytes, *, sign: bool) -> Command:
    """GENERATE AC. `data` answers CDOL1 or CDOL2; `sign` asks for CDA. Raises `CardFault` for too much data."""
    if len(data) > COMMAND_DATA_MAX:
        raise CardFault("parse_error")
    return Command(0x80, 0xAE, kind | (_CDA_SIGNATURE if sign else 0), 0x00, data, le=0)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the card answered. Either a cryptogram in clear, or a signature that holds one, or both."""

    kind: AcType
    objects: Mapping[int, bytes] = field(repr=False)
    hashed: bytes = field(repr=False)  # what CDA's transaction data hash takes in of this answer

    @property
    def cid(self) -> int:
        return self.objects[Tag.CRYPTOGRAM_INFORMATION][0]

    @property
    def signature(self) -> bytes | None:
        return self.objects.get(Tag.SIGNED_DYNAMIC_DATA)


def read_answer(data: bytes, asked: AcType, kernel: int | None = None, *, final: bool = False) -> Answer:
    """Take the answer apart, either format. `final`: no online request can follow any more.

    Raises `CardFault`: parse_error, missing_data, duplicate_data, card_error (a cryptogram that was not to be had);
    and `TlvError`.
    """
    objects, hashed = CardObjects(kernel), b""
    nodes = tlv.parse(data)
    if len(nodes) != 1:
        raise CardFault("parse_error")
    match nodes[0]:
        case tlv.Node(Tag.RESPONSE_FORMAT_1, value) if len(value) >= _FORMAT_1_BYTES_MIN:
            for tag, part in zip(_FIXED, (value[:1], value[1:3], value[3:11], value[11:]), strict=True):
                objects[tag] = part
        case tlv.Node(Tag.RESPONSE_FORMAT_2, value, children):
            objects.receive(children)
            hashed = tlv.without(value, Tag.SIGNED_DYNAMIC_DATA)
        case _:
            raise CardFault("parse_error")
    objects.require(Tag.CRYPTOGRAM_INFORMATION, Tag.ATC)
    objects.check_lengths(_FIXED)
    kind = objects[Tag.CRYPTOGRAM_INFORMATION][0] & _AC_TYPE
    if kind not in _MAY_ANSWER[asked] or (final and kind == AcType.ARQC):
        raise CardFault("card_error")
    return Answer(AcType(kind), objects, hashed)


def verify_signature(
    icc: PublicKey, answer: Answer, unpredictable_number: bytes, transaction_data: bytes, more: bytes = b""
) -> dict[int, bytes]:
    """Check CDA (Book 2, 6.6.2) over what was sent: `transaction_data` holds the values of PDOL, CDOL1 and CDOL2.

    `more` is what a kernel wants signed besides, right behind the hash (C-2, 6.9). Returns what only the signature
    carries, cryptogram and ICC dynamic number. Raises `AuthenticationFailed`.
    """
    if answer.signature is None:
        raise AuthenticationFailed("missing_data")
    signed = authentication.cda(icc, answer.signature, unpredictable_number)
    over = authentication.sha1(transaction_data + answer.hashed)
    if (signed.cid, signed.transaction_data_hash, signed.more[: len(more)]) != (answer.cid, over, more):
        raise AuthenticationFailed("signature")
    return {int(Tag.CRYPTOGRAM): signed.cryptogram, int(Tag.ICC_DYNAMIC_NUMBER): signed.icc_dynamic_number}

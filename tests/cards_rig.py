"""What the tests of GENERATE AC cards have in common: a terminal of a few lines, and verifiers of what a card proves.

The terminal fills data object lists, speaks T=0 where the card does, and reads answers with pyemv; the verifiers use
pyemv's cryptograms and plain RSA. Nothing here comes from the card's code or from the terminal's.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest
from pyemv import cvn, tlv

from hwsim.cards.bureau import Bureau, Entropy, Scheme
from hwsim.cards.contact import ContactCard
from hwsim.cards.cryptogram import Cvn
from hwsim.cards.profile import CardProfile

SEED = 20240614
OLD_DES = pytest.mark.filterwarnings("ignore:.*TripleDES:cryptography.utils.CryptographyDeprecationWarning")
Objects = dict[str, bytes]
AAC, TC, ARQC = 0x00, 0x40, 0x80
CDA = 0x10
VALUES = {
    "9F02": "000000001250", "9F03": "000000000000", "9F1A": "0276", "95": "0000000000", "5F2A": "0978", "9A": "240614",
    "9C": "00", "9F37": "11223344", "9F35": "22", "9F34": "1F0302", "9F21": "120000", "8A": "3030",
}  # fmt: skip
"""What the terminal knows: a purchase for 12.50. What a list asks for beyond it is sent as zeros."""


def seeded(seed: int = SEED) -> Entropy:
    """The same bytes in every run."""
    return random.Random(seed).randbytes


def make_bureaus() -> dict[Scheme, Bureau]:
    """One bank with both schemes."""
    visa = Bureau.create(seeded())
    return {Scheme.VISA: visa, Scheme.MASTERCARD: Bureau.create(seeded(), scheme=Scheme.MASTERCARD, imk_ac=visa.imk_ac)}


class Asked(Protocol):
    """Anything that answers command APDUs."""

    def apdu(self, command: bytes) -> bytes: ...


def exchange(card: Asked, command: bytes) -> bytes:
    """A command and its whole response, over T=0 as EMV 4.4 Book 1, 9.3.1 has it: 61xx is fetched, 6Cxx repeated."""
    answer = card.apdu(command)
    if isinstance(card, ContactCard):
        for _ in range(2):
            if answer[-2] == 0x6C:
                answer = card.apdu(command[:4] + answer[-1:])
            elif answer[-2] == 0x61:
                answer = card.apdu(bytes((0x00, 0xC0, 0x00, 0x00, answer[-1])))
    return answer


def sw(answer: bytes) -> str:
    return answer[-2:].hex().upper()


def told(card: Asked, command: bytes) -> bytes:
    """The data of a command that must succeed."""
    answer = exchange(card, command)
    assert sw(answer) == "9000", (command.hex(), sw(answer))
    return answer[:-2]


def case4(card: Asked, header: str, data: bytes) -> bytes:
    """A command with data: without Le over T=0, with Le = 00 elsewhere."""
    return bytes.fromhex(header) + bytes((len(data),)) + data + (b"" if isinstance(card, ContactCard) else b"\x00")


def select(card: Asked, name: bytes, p2: int = 0) -> bytes:
    return case4(card, f"00A404{p2:02X}", name)


def fill(dol: bytes, **changed: str) -> bytes:
    """The values that a data object list asks for."""
    values = {tag: bytes.fromhex(value) for tag, value in (VALUES | changed).items()}
    filled, rest = b"", dol
    while rest:
        size = 2 if rest[0] & 0x1F == 0x1F else 1
        tag, length = rest[:size].hex().upper(), rest[size]
        value = values.get(tag, bytes(length))
        assert len(value) == length, tag
        filled, rest = filled + value, rest[size + 1 :]
    return filled


@dataclass
class Visit:
    """One transaction with one card, from the terminal's side. `sent` is what went in data object lists so far."""

    card: Asked
    found: Objects = field(default_factory=dict)
    sent: bytes = b""
    values: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def begin(cls, card: Asked, profile: CardProfile, **values: str) -> Visit:
        """Selection, processing options, all records."""
        visit = cls(card, values=values)
        (fci,) = tlv.decode(told(card, select(card, profile.aid))).values()
        pdol = bytes(fci["A5"].get("9F38", b""))
        visit.sent = fill(pdol, **values)
        ((tag, options),) = tlv.decode(
            told(card, case4(card, "80A80000", bytes((0x83, len(visit.sent))) + visit.sent))
        ).items()
        if tag == "80":
            options = {"82": bytes(options[:2]), "94": bytes(options[2:])}
        visit.found = {str(each): bytes(value) for each, value in options.items()}
        afl = visit.found["94"]
        for sfi, first, last in zip(afl[0::4], afl[1::4], afl[2::4], strict=True):
            for number in range(first, last + 1):
                (record,) = tlv.decode(told(card, bytes((0x00, 0xB2, number, sfi | 4, 0x00)))).values()
                assert not set(record) & set(visit.found), "a tag comes twice"
                visit.found |= {str(each): bytes(value) for each, value in record.items()}
        return visit

    def generate(self, p1: int, dol: str = "8C", **changed: str) -> Objects:
        """GENERATE AC; what it brings, whichever template it comes in."""
        data = fill(self.found[dol], **(dict(self.values) | changed))
        raw = told(self.card, case4(self.card, f"80AE{p1:02X}00", data))
        ((tag, value),) = tlv.decode(raw).items()
        if tag == "80":
            brought = {"9F27": value[:1], "9F36": value[1:3], "9F26": value[3:11], "9F10": value[11:]}
        else:
            brought = dict(value)
        self.sent += data
        answer = {str(each): bytes(value) for each, value in brought.items()}
        if "9F4B" in answer and p1 & CDA:
            answer |= self.combined(answer)
        return answer

    def combined(self, answer: Objects, un: str | None = None) -> Objects:
        """What CDA proves (EMV 4.4 Book 2, 6.6.2): raises AssertionError when it proves nothing."""
        block = rsa(self.key, answer["9F4B"])
        un = un or dict(VALUES, **self.values)["9F37"]
        assert (block[0], block[1], block[2], block[-1]) == (0x6A, 0x05, 0x01, 0xBC)
        assert sha1(block[1:-21] + bytes.fromhex(un)) == block[-21:-1]
        dynamic, padding = block[4 : 4 + block[3]], block[4 + block[3] : -21]
        assert set(padding) == {0xBB}
        size = dynamic[0]
        number, cid, cryptogram, digest = (
            dynamic[1 : 1 + size],
            dynamic[1 + size : 2 + size],
            dynamic[2 + size : 10 + size],
            dynamic[10 + size :],
        )
        assert cid == answer["9F27"]
        clear = tlv.encode({tag: value for tag, value in answer.items() if tag not in ("9F4B", "9F26", "9F4C")})
        assert digest == sha1(self.sent + bytes(clear))
        return {"9F26": cryptogram, "9F4C": number}

    key: bytes = b""  # modulus of the ICC key, as its personalisation made it


def sha1(data: bytes) -> bytes:
    return hashlib.sha1(data, usedforsecurity=False).digest()


def rsa(modulus: bytes, signature: bytes, exponent: int = 3) -> bytes:
    assert len(signature) == len(modulus)
    number = pow(int.from_bytes(signature, "big"), exponent, int.from_bytes(modulus, "big"))
    return number.to_bytes(len(modulus), "big")


PEERS: dict[Cvn, Any] = {
    Cvn.CVN10: cvn.VisaCVN10, Cvn.CVN18: cvn.VisaCVN18, Cvn.CVN22: cvn.VisaCVN22, Cvn.CVN16: cvn.MasterCardCVN16,
    Cvn.CVN17: cvn.MasterCardCVN17, Cvn.CVN20: cvn.MasterCardCVN20, Cvn.CVN21: cvn.MasterCardCVN21,
}  # fmt: skip


def peer(bureau: Bureau, profile: CardProfile) -> Any:
    """Another implementation of this card's cryptograms, from the issuer's master keys."""
    return PEERS[profile.cvn](bureau.imk_ac, bureau.imk_smi, bureau.imk_smi, profile.pan.digits, profile.psn)


def peer_cryptogram(bureau: Bureau, profile: CardProfile, answer: Objects, aip: bytes, **changed: str) -> bytes:
    """The cryptogram of this answer, by another implementation."""
    tags = ("9F02", "9F03", "9F1A", "95", "5F2A", "9A", "9C", "9F37")
    arguments = {f"tag_{tag.lower()}": bytes.fromhex((VALUES | changed)[tag]) for tag in tags}
    arguments |= {"tag_82": aip, "tag_9f36": answer["9F36"]}
    iad = answer["9F10"]
    match profile.cvn:
        case Cvn.CVN10:
            arguments["cvr"] = iad[3:7]
        case Cvn.CVN18 | Cvn.CVN22:
            arguments["tag_9f10"] = iad
        case Cvn.CVN16 | Cvn.CVN20:
            arguments["cvr"] = iad[2:8]
        case Cvn.CVN17 | Cvn.CVN21:
            arguments |= {"cvr": iad[2:8], "counters": iad[10:18]}
    return bytes(peer(bureau, profile).generate_ac(**arguments))


def peer_proof(bureau: Bureau, profile: CardProfile, answer: Objects, *, approve: bool = True) -> bytes:
    """Tag 91 for this ARQC, by another implementation."""
    other, arqc, atc = peer(bureau, profile), answer["9F26"], answer["9F36"]
    code = b"00" if approve else b"51"
    update = bytes.fromhex("00800000" if approve else "00000000")
    match profile.cvn:
        case Cvn.CVN18 | Cvn.CVN22:
            return bytes(other.generate_arpc(arqc, atc, update)) + update
        case Cvn.CVN20 | Cvn.CVN21:
            return bytes(other.generate_arpc(arqc, atc, code)) + code
        case Cvn.CVN10 | Cvn.CVN16 | Cvn.CVN17:
            return bytes(other.generate_arpc(arqc, code)) + code


def peer_command(bureau: Bureau, profile: CardProfile, answer: Objects, header: str, data: bytes = b"") -> bytes:
    """A script command with its MAC, by another implementation."""
    head = bytes.fromhex(header) + bytes((len(data) + 8,))
    mac = peer(bureau, profile).generate_command_mac(head, answer["9F26"], answer["9F36"], data)
    return head + data + bytes(mac)


def modulus(profile: CardProfile) -> bytes:
    assert profile.icc_key is not None
    return profile.icc_key.modulus

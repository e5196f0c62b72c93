"""The bank behind the simulated cards: is this cryptogram genuine, has it been seen before, and is the money there?

A host that has opened an authorisation request hands over the card data as the kernel put it together: a flat sequence
of data objects, of a contactless or a contact card, of Visa or Mastercard. `Issuer.authorise` answers it whole,
`Issuer.verify` and `Issuer.decide` are its two halves. The issuer keeps no state itself: accounts and transaction
counters live in a `CardBook`, which a host implements over its own database; `MemoryCardBook` is enough for a test.
That the amount under the cryptogram is the amount the terminal asks for is the host's to compare
(`Request.amount_minor`).

Amounts decide by their last two digits, so that every answer can be shown at will (minor units; see `MAGIC_AMOUNTS`):
12.51 is declined for insufficient funds, 12.50 is approved. To a contact card (9F39 = 05) some approvals bring commands
of its issuer (`SCRIPT_AMOUNTS`), or an answer that is no proof (`ARPC_AMOUNTS`).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from enum import Enum
from typing import Final, NamedTuple, Protocol

from hwsim.cards.bertlv import TlvError, decode, encode
from hwsim.cards.cryptogram import (
    AC_INPUT,
    MAC_BYTES,
    CryptogramType,
    Cvn,
    IssuerApplicationData,
    Online,
    application_cryptogram,
    command_mac,
    derive_card_key,
    read_issuer_application_data,
    response_cryptogram,
    script_master_key,
)
from hwsim.cards.profile import CardProfile, Pan

APPROVED: Final = "00"
MAGIC_AMOUNTS: Final[Mapping[int, str]] = {5: "05", 51: "51", 57: "57", 61: "61"}
"""The last two digits of the amount in minor units, and the response code (ISO 8583, field 39) that they bring."""


class Script(NamedTuple):
    """A command for the card, and when the terminal is to deliver it."""

    template: int  # 71: before the second GENERATE AC, 72: after it
    header: bytes  # CLA INS P1 P2
    data: bytes = b""
    genuine: bool = True  # False: its MAC is wrong


_APPLICATION_BLOCK: Final = bytes.fromhex("841E0000")
_APPLICATION_UNBLOCK: Final = bytes.fromhex("84180000")
_PUT_UPPER_LIMIT: Final = bytes.fromhex("04DA9F23")  # upper consecutive offline limit
SCRIPT_AMOUNTS: Final[Mapping[int, tuple[Script, ...]]] = {
    71: (Script(0x71, _PUT_UPPER_LIMIT, b"\x09"),),
    72: (Script(0x72, _PUT_UPPER_LIMIT, b"\x09"),),
    73: (Script(0x72, _APPLICATION_BLOCK),),
    74: (Script(0x71, _PUT_UPPER_LIMIT, b"\x09", genuine=False),),
    75: (Script(0x71, _APPLICATION_BLOCK),),  # the card then says no in the second GENERATE AC
    76: (Script(0x71, _APPLICATION_BLOCK), Script(0x72, _APPLICATION_UNBLOCK)),
    77: (Script(0x72, _PUT_UPPER_LIMIT, b"\x09", genuine=False), Script(0x72, _PUT_UPPER_LIMIT, b"\x0a")),
}
"""The last two digits of an amount and the scripts that a contact card is sent with the approval. A card that has no
limit to write, as most debit cards, answers PUT DATA with 6A88."""

ARPC_WRONG, ARPC_MISSING = 91, 92
ARPC_AMOUNTS: Final = (ARPC_WRONG, ARPC_MISSING)
"""The last two digits of an amount that is approved with a wrong ARPC, or with none, to a contact card."""

RESPONSE_TEXTS: Final[Mapping[str, str]] = {
    "00": "approved",
    "05": "do not honour",
    "14": "no such card",
    "30": "format error",
    "51": "insufficient funds",
    "54": "expired card",
    "57": "transaction not permitted to cardholder",
    "61": "exceeds amount limit",
    "62": "restricted card",
    "63": "security violation",
    "94": "duplicate transaction counter",
}

_SIZES_BYTES: Final[Mapping[int, int]] = {
    0x9F02: 6, 0x9F03: 6, 0x9F1A: 2, 0x95: 5, 0x5F2A: 2, 0x9A: 3, 0x9C: 1, 0x9F37: 4, 0x82: 2, 0x9F36: 2, 0x9F26: 8,
}  # fmt: skip
_REQUIRED: Final = (*AC_INPUT, 0x9F10, 0x9F26, 0x57)
_CSU_APPROVED: Final = bytes.fromhex("00800000")  # card status update: issuer approves online transaction
_CSU_DECLINED: Final = bytes(4)
_REFUND: Final = b"\x20"
_CONTACT: Final = b"\x05"  # 9F39, point of service entry mode: chip, read through its contacts


class Reason(Enum):
    """Why a cryptogram is believed or not; the value is the response code that a refusal brings."""

    GENUINE = APPROVED
    UNREADABLE = "30"  # missing, doubled or malformed data objects
    INCONSISTENT = "05"  # two data objects contradict each other, so one of them is forged
    UNKNOWN_CARD = "14"
    EXPIRED = "54"
    WRONG_CRYPTOGRAM = "63"
    REPLAYED_COUNTER = "94"  # this counter was used before, for another cryptogram


@dataclass(frozen=True, slots=True)
class Account:
    """What the issuer keeps on one card."""

    expires: date
    blocked: bool = False
    limit_minor: int | None = None  # the most that one transaction may take


class CardBook(Protocol):
    """The issuer's memory. A host keeps it in its database."""

    def account(self, pan: str, psn: str) -> Account | None:
        """The card's account, None for a card that was never issued."""

    def claim_counter(self, pan: str, psn: str, atc: int, cryptogram: bytes) -> bytes:
        """Store the cryptogram of this counter if it is the first, and return the one on file: one atomic step."""


class MemoryCardBook:
    """A card book for one process and one run."""

    def __init__(self) -> None:
        self._accounts: dict[tuple[str, str], Account] = {}
        self._counters: dict[tuple[str, str, int], bytes] = {}

    def enrol(self, profile: CardProfile, *, blocked: bool = False, limit_minor: int | None = None) -> None:
        """Open, or change, the account of a personalised card."""
        self._accounts[profile.pan.digits, profile.psn] = Account(profile.expires, blocked, limit_minor)

    def account(self, pan: str, psn: str) -> Account | None:
        return self._accounts.get((pan, psn))

    def claim_counter(self, pan: str, psn: str, atc: int, cryptogram: bytes) -> bytes:
        return self._counters.setdefault((pan, psn, atc), cryptogram)


@dataclass(frozen=True, slots=True)
class Request:
    """An online record, read."""

    pan: Pan
    psn: str
    expires: tuple[int, int]  # year and month, as on the card's track 2
    atc: int
    cryptogram: bytes
    application_data: IssuerApplicationData
    amount_minor: int
    currency: int
    transaction_type: bytes
    contact: bool
    objects: Mapping[int, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Verification:
    """What the issuer thinks of a request: None where it could not be read, or the card was never issued."""

    reason: Reason
    request: Request | None = None
    account: Account | None = None

    @property
    def ok(self) -> bool:
        return self.reason is Reason.GENUINE

    @property
    def pan(self) -> Pan | None:
        return self.request.pan if self.request else None

    @property
    def atc(self) -> int | None:
        return self.request.atc if self.request else None


@dataclass(frozen=True, slots=True)
class Authorisation:
    """The issuer's answer. The same request always gets the same one, as long as the account has not changed."""

    response_code: str
    authorisation_code: str | None  # six digits, when approved
    issuer_authentication_data: bytes  # tag 91, empty unless a believed ARQC waits for it
    verification: Verification
    scripts: bytes = b""  # templates 71 and 72, whole

    @property
    def approved(self) -> bool:
        return self.response_code == APPROVED

    @property
    def text(self) -> str:
        return RESPONSE_TEXTS[self.response_code]


class Issuer:
    """One issuer: its master key, its book, and the date that it believes in."""

    def __init__(self, imk_ac: bytes, book: CardBook, today: Callable[[], date]) -> None:
        self._imk_ac = imk_ac
        self._imk_smi = script_master_key(imk_ac)
        self._book = book
        self._today = today

    def verify(self, record: bytes) -> Verification:
        """Check an online record: readable, consistent, a card of ours, valid, genuine, and not replayed."""
        try:
            request = read_request(record)
        except _ContradictionError:
            return Verification(Reason.INCONSISTENT)
        except ValueError:
            return Verification(Reason.UNREADABLE)
        account = self._book.account(request.pan.digits, request.psn)
        if account is None:
            return Verification(Reason.UNKNOWN_CARD, request)
        return Verification(self._judge(request, account), request, account)

    def decide(self, amount_minor: int, account: Account) -> str:
        """The response code by the account's rules and the magic amounts."""
        if account.blocked:
            return "62"
        if account.limit_minor is not None and amount_minor > account.limit_minor:
            return "61"
        return MAGIC_AMOUNTS.get(amount_minor % 100, APPROVED)

    def authorise(self, record: bytes) -> Authorisation:
        """Verify and decide. An offline approval (TC) is verified the same way, and then stands."""
        verification = self.verify(record)
        request, account = verification.request, verification.account
        if request is None or account is None or not verification.ok:
            return Authorisation(verification.reason.value, None, b"", verification)
        code = self._response_code(request, account)
        return Authorisation(
            response_code=code,
            authorisation_code=_authorisation_code(request) if code == APPROVED else None,
            issuer_authentication_data=self._issuer_authentication_data(request, code),
            verification=verification,
            scripts=self._scripts(request) if code == APPROVED else b"",
        )

    def _judge(self, request: Request, account: Account) -> Reason:
        if request.expires != (account.expires.year % 100, account.expires.month):
            return Reason.INCONSISTENT
        today = self._today()
        if (today.year, today.month) > (account.expires.year, account.expires.month):
            return Reason.EXPIRED
        expected = application_cryptogram(_card_key(self._imk_ac, request), request.objects)
        if not hmac.compare_digest(expected, request.cryptogram):
            return Reason.WRONG_CRYPTOGRAM
        # Only after the check: a forger must not use up the counters of a card that is not his.
        claimed = self._book.claim_counter(request.pan.digits, request.psn, request.atc, request.cryptogram)
        return Reason.GENUINE if claimed == request.cryptogram else Reason.REPLAYED_COUNTER

    def _response_code(self, request: Request, account: Account) -> str:
        if request.transaction_type == _REFUND:  # the merchant's money: neither the card nor its limits have a say
            return "62" if account.blocked else APPROVED
        match request.application_data.kind:
            case CryptogramType.AAC:  # the card itself said no
                return "05"
            case CryptogramType.TC:  # the card said yes on the issuer's behalf, and the goods are gone
                return APPROVED
            case CryptogramType.ARQC:
                return self.decide(request.amount_minor, account)

    def _issuer_authentication_data(self, request: Request, code: str) -> bytes:
        """Tag 91: the ARPC, and what it protects."""
        fault = request.amount_minor % 100 if request.contact else None
        if request.application_data.kind is not CryptogramType.ARQC or fault == ARPC_MISSING:
            return b""
        match request.application_data.cvn:
            case Cvn.CVN18 | Cvn.CVN22:
                said = _CSU_APPROVED if code == APPROVED else _CSU_DECLINED
            case Cvn.CVN10 | Cvn.CVN16 | Cvn.CVN17 | Cvn.CVN20 | Cvn.CVN21:
                said = code.encode("ascii")
        arpc = response_cryptogram(_card_key(self._imk_ac, request), _online(request), said)
        return (_flipped(arpc) if fault == ARPC_WRONG else arpc) + said

    def _scripts(self, request: Request) -> bytes:
        """Templates 71 and 72 with the commands for this amount, each in a script of its own (Book 3, 10.10)."""
        if request.application_data.kind is not CryptogramType.ARQC or not request.contact:
            return b""
        key, online = _card_key(self._imk_smi, request), _online(request)
        templates: list[bytes] = []
        for number, script in enumerate(SCRIPT_AMOUNTS.get(request.amount_minor % 100, ()), start=1):
            header = script.header + bytes((len(script.data) + MAC_BYTES,))
            mac = command_mac(key, online, header, script.data)
            command = header + script.data + (mac if script.genuine else _flipped(mac))
            identifier = encode(0x9F18, number.to_bytes(4, "big"))
            templates.append(encode(script.template, identifier, encode(0x86, command)))
        return b"".join(templates)


def _card_key(issuer_master_key: bytes, request: Request) -> bytes:
    return derive_card_key(issuer_master_key, request.pan.digits, request.psn, request.application_data.cvn)


def _online(request: Request) -> Online:
    objects = request.objects
    return Online(request.application_data.cvn, objects[0x9F36], objects[0x9F37], request.cryptogram)


def _flipped(proof: bytes) -> bytes:
    return proof[:-1] + bytes((proof[-1] ^ 0x01,))


class _ContradictionError(ValueError):
    """Two data objects say different things about the same fact."""


def read_request(record: bytes) -> Request:
    """Read an online record. Raises `ValueError` for one that lacks, doubles, misshapes or contradicts anything."""
    objects = decode(record)
    for tag in _REQUIRED:
        if tag not in objects:
            raise TlvError(f"tag {tag:X} is missing: the cryptogram cannot be checked")
        if len(objects[tag]) != _SIZES_BYTES.get(tag, len(objects[tag])):
            raise TlvError(f"tag {tag:X} has a wrong length: the cryptogram cannot be checked")
    digits, separator, rest = objects[0x57].hex().partition("d")
    if not separator or not rest[:4].isdecimal():
        raise TlvError("the track 2 equivalent data has no expiry date")
    application_data = read_issuer_application_data(objects[0x9F10])
    # The type inside 9F10 is under the cryptogram; the plain one is not, and neither is the plain PAN.
    kind = objects.get(0x9F27, bytes((application_data.kind,)))
    if len(kind) != 1 or kind[0] & 0xC0 != application_data.kind:
        raise _ContradictionError("9F27 and 9F10 name different cryptograms")
    if 0x5A in objects and objects[0x5A].hex().rstrip("f") != digits:
        raise _ContradictionError("5A and 57 name different cards")
    return Request(
        pan=Pan(digits),
        psn=objects.get(0x5F34, b"\x00").hex(),
        expires=(int(rest[:2]), int(rest[2:4])),
        atc=int.from_bytes(objects[0x9F36], "big"),
        cryptogram=objects[0x9F26],
        application_data=application_data,
        amount_minor=_decimal(objects[0x9F02]),
        currency=_decimal(objects[0x5F2A]),
        transaction_type=objects[0x9C],
        contact=objects.get(0x9F39) == _CONTACT,
        objects=objects,
    )


def _decimal(value: bytes) -> int:
    return int(value.hex(), 10)


def _authorisation_code(request: Request) -> str:
    """Six digits that follow from the cryptogram, so that a repeated request is answered with the same code."""
    digest = hashlib.sha256(request.cryptogram + request.objects[0x9F36] + request.pan.digits.encode()).digest()
    return f"{int.from_bytes(digest[:8], 'big') % 1_000_000:06d}"

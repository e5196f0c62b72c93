"""Kernel 3, Visa and those like it (Book C-3).

The card decides within one command: GET PROCESSING OPTIONS carries the transaction out and brings the cryptogram back,
records add what issuer and authentication need. What is left to the terminal is to check that decision, never to soften
it: an approval may become an online request or a decline, a decline stays one.

    initiate application, read records   the conversation                      (C-3, 5.2 to 5.4)
    processing restrictions              expiry, exception file, usage control (C-3, 5.5)
    offline data authentication          fast DDA, else SDA                    (C-3, 5.6)
    cardholder verification              CTQ against TTQ                       (C-3, 5.7)

A card that vanishes during this kernel is Try Again, not Torn. The cryptogram may have been computed, but nothing was
authorised with it: the terminal approves only after it holds cryptogram and records, and an online request can go out
only then. A cryptogram that was never received is never used, and the card spends at most a number of its counter.

Reasons of outcomes, besides those of entry point: card_lost, card_error (unexpected status word), parse_error,
duplicate_data, missing_data, pan_mismatch, other_interface_required, conditions_not_satisfied, confirm_on_phone;
of declines: card_declined, expired, exception_file, not_allowed, oda_failed, cvm_failed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntFlag
from typing import Final, NamedTuple

from terminal.emv import authentication, dol, restrictions, risk, selection
from terminal.emv.apdu import CardRemoved, Exchange, transceive
from terminal.emv.authentication import AuthenticationFailed
from terminal.emv.configuration import Activation, Environment, Request, Setup, transaction_objects
from terminal.emv.decision import AcType
from terminal.emv.initiation import get_processing_options, receive_processing_options
from terminal.emv.outcome import (
    Approved,
    Cvm,
    Declined,
    EndApplication,
    MessageId,
    OdaMethod,
    OdaResult,
    OdaStatus,
    OnlineRequest,
    Outcome,
    Pan,
    SelectNext,
    Status,
    TryAgain,
    TryAnotherInterface,
    UiRequest,
)
from terminal.emv.progress import Step
from terminal.emv.records import CardFault, CardObjects, read_records
from terminal.emv.restrictions import CASH, CASHBACK, REFUND
from terminal.emv.results import Aip
from terminal.emv.tags import Kernel3Tag, Tag
from terminal.emv.tlv import TlvError
from terminal.emv.transaction import read_card

KERNEL: Final = 3
PHONE_HOLD_MS: Final = 1300  # time to read "see phone" while the field is off (C-3, 5.2)

_USED: Final = (  # what decides or travels, so that its length must be right
    Tag.DF_NAME,
    Tag.AIP,
    Tag.ATC,
    Tag.CRYPTOGRAM,
    Tag.CRYPTOGRAM_INFORMATION,
    Tag.ISSUER_APPLICATION_DATA,
    Tag.PAN_SEQUENCE_NUMBER,
    Kernel3Tag.CTQ,
)

_TRACK_2 = re.compile(r"(?P<pan>\d{8,19})D\d*F?", re.ASCII)


class _Ttq(IntFlag):
    """Terminal Transaction Qualifiers 9F66 as one number of 32 bits: byte 1 is the leftmost."""

    CONTACT_CHIP = 0x10_00_00_00
    OFFLINE_ONLY = 0x08_00_00_00
    ONLINE_PIN = 0x04_00_00_00
    SIGNATURE = 0x02_00_00_00
    ODA_FOR_ONLINE = 0x01_00_00_00
    ONLINE_CRYPTOGRAM_REQUIRED = 0x00_80_00_00
    CVM_REQUIRED = 0x00_40_00_00


class _Ctq(IntFlag):
    """Card Transaction Qualifiers 9F6C as one number of 16 bits."""

    ONLINE_PIN_REQUIRED = 0x80_00
    SIGNATURE_REQUIRED = 0x40_00
    ONLINE_IF_ODA_FAILS = 0x20_00
    SWITCH_IF_ODA_FAILS = 0x10_00
    ONLINE_IF_EXPIRED = 0x08_00
    SWITCH_FOR_CASH = 0x04_00
    SWITCH_FOR_CASHBACK = 0x02_00
    CDCVM_PERFORMED = 0x00_80


class _Decision(Enum):
    APPROVE = "approve"
    ONLINE = "online"
    DECLINE = "decline"
    OTHER_INTERFACE = "other interface"


class _Verdict(NamedTuple):
    decision: _Decision
    reason: str = ""
    message: MessageId = MessageId.NONE  # for OTHER_INTERFACE: which one


_APPROVE: Final = _Verdict(_Decision.APPROVE)
_ONLINE: Final = _Verdict(_Decision.ONLINE)


def _decline(reason: str) -> _Verdict:
    return _Verdict(_Decision.DECLINE, reason)


@dataclass(frozen=True, slots=True)
class _Opened:
    """An application that is selected, and what is known of it so far."""

    activation: Activation
    kernel: int
    card: Mapping[int, bytes]
    terminal: Mapping[int, bytes]


@dataclass(frozen=True, slots=True)
class _Transaction:
    """Card read, nothing decided: what every check looks at."""

    setup: Setup
    request: Request
    opened: _Opened
    activation: Activation
    terminal: Mapping[int, bytes]
    card: CardObjects
    records: bytes | None  # the records' part of the static data
    pan: Pan

    @property
    def cryptogram_type(self) -> int:
        return self.card[Tag.CRYPTOGRAM_INFORMATION][0] & 0xC0

    @property
    def ctq(self) -> int | None:
        value = self.card.get(Kernel3Tag.CTQ)
        return int.from_bytes(value, "big") if value else None

    def terminal_can(self, qualifier: int) -> bool:
        """Whether a bit of the TTQ is set."""
        return bool(int.from_bytes(self.terminal.get(Kernel3Tag.TTQ, b""), "big") & qualifier)

    def card_wants(self, qualifier: int) -> bool:
        """Whether the card gave CTQ with this bit set."""
        return bool((self.ctq or 0) & qualifier)


def run(setup: Setup, request: Request, environment: Environment, activation: Activation) -> Exchange[Outcome]:
    """One transaction with the selected application. Raises nothing that a card could cause."""
    try:
        transaction = yield from _read_card(setup, request, environment, activation)
    except CardRemoved:
        return TryAgain("card_lost")
    except CardFault as fault:
        return EndApplication(fault.reason)
    except TlvError:
        return EndApplication("parse_error")
    if not isinstance(transaction, _Transaction):
        return transaction
    environment.notify(UiRequest(MessageId.CARD_READ_OK, Status.CARD_READ_OK))
    return _decide(transaction, environment)


# The conversation


def _read_card(
    setup: Setup, request: Request, environment: Environment, activation: Activation
) -> Exchange[_Transaction | Outcome]:
    """Initiate application and read records (C-3, 5.2 to 5.4). Raises `CardFault`, `TlvError`, `CardRemoved`."""
    card = CardObjects(KERNEL)
    card.receive(selection.application(activation.fci))
    card.require(Tag.DF_NAME, Tag.PDOL)
    terminal = transaction_objects(setup, request, environment, activation)
    opened = _Opened(activation, KERNEL, card, terminal)
    selection.tell_languages(card, environment)
    environment.watch.step(Step.SELECTION, opened)

    response = yield from transceive(get_processing_options(dol.build(card[Tag.PDOL], {**card, **terminal}, KERNEL)))
    match response.sw:
        case 0x9000:
            receive_processing_options(response.data, card)
        case 0x6984:
            return TryAnotherInterface(
                "other_interface_required", UiRequest(MessageId.INSERT_CARD, Status.PROCESSING_ERROR)
            )
        case 0x6985:
            return SelectNext("conditions_not_satisfied")
        case 0x6986:
            return TryAgain(
                "confirm_on_phone", UiRequest(MessageId.SEE_PHONE, Status.PROCESSING_ERROR, hold_ms=PHONE_HOLD_MS)
            )
        case _:
            raise CardFault("card_error")
    environment.watch.step(Step.INITIATION, opened)
    records = yield from read_records(card.get(Tag.AFL, b""), card)

    pan = _check_card_data(card)
    if Tag.TERMINAL_COUNTRY_CODE not in terminal:
        raise CardFault("missing_data")
    environment.watch.step(Step.RECORDS, opened)
    return _Transaction(setup, request, opened, activation, terminal, card, records, pan)


def _check_card_data(card: CardObjects) -> Pan:
    """What must be there, in the right length (C-3, 5.4); completes the CID. Returns the PAN."""
    card.require(Tag.CRYPTOGRAM, Tag.AIP, Tag.ATC, Tag.ISSUER_APPLICATION_DATA, Tag.TRACK_2_EQUIVALENT)
    card.check_lengths(_USED)
    if Tag.CRYPTOGRAM_INFORMATION not in card:
        card[Tag.CRYPTOGRAM_INFORMATION] = _cid_from_issuer_data(card[Tag.ISSUER_APPLICATION_DATA])

    track_2 = _TRACK_2.fullmatch(card[Tag.TRACK_2_EQUIVALENT].hex().upper())
    if track_2 is None:
        raise CardFault("parse_error")
    pan = Pan(track_2["pan"])
    if Tag.PAN in card and card[Tag.PAN].hex().upper().rstrip("F") != pan.digits:
        raise CardFault("pan_mismatch")
    return pan


def _cid_from_issuer_data(issuer_data: bytes) -> bytes:
    """Cards may leave the CID out: bits 6 and 5 of IAD byte 5 hold the same (C-3, 5.4)."""
    if len(issuer_data) < 5:
        raise CardFault("missing_data")
    return bytes(((issuer_data[4] & 0x30) << 2,))


# The decision


def _decide(transaction: _Transaction, environment: Environment) -> Outcome:
    verdict = _card_decision(transaction)
    for check in (_check_expiry, _check_exception_file, _check_usage):
        if verdict.decision is _Decision.APPROVE:
            verdict = check(transaction)

    verdict, oda = _authenticate(transaction, verdict)
    environment.watch.step(Step.AUTHENTICATION, transaction.opened)
    verdict, cvm = _verify_cardholder(transaction, verdict)

    card_read = read_card(
        transaction.activation,
        transaction.card,
        transaction.terminal,
        kernel=KERNEL,
        pan=transaction.pan,
        oda=oda,
        cvm=cvm,
    )
    match verdict.decision:
        case _Decision.APPROVE:
            message = MessageId.APPROVED_SIGN if cvm is Cvm.SIGNATURE else MessageId.APPROVED
            return Approved(card_read, UiRequest(message, Status.CARD_READ_OK, balance_minor=_left(transaction.card)))
        case _Decision.ONLINE:
            return OnlineRequest(card_read)
        case _Decision.DECLINE:
            return Declined(verdict.reason, card_read)
        case _Decision.OTHER_INTERFACE:
            return TryAnotherInterface(verdict.reason, UiRequest(verdict.message, Status.PROCESSING_ERROR))


def _left(card: Mapping[int, bytes]) -> int | None:
    """What the card may still spend offline, for the cardholder: available offline spending amount 9F5D (C-3, 5.8)."""
    amount = card.get(Kernel3Tag.AVAILABLE_OFFLINE_SPENDING_AMOUNT, b"")
    whole = len(amount) == Kernel3Tag.AVAILABLE_OFFLINE_SPENDING_AMOUNT.length_max and amount.hex().isdecimal()
    return int(amount.hex()) if whole else None


def _card_decision(transaction: _Transaction) -> _Verdict:
    """What the card decided, by the type of its cryptogram (C-3, 5.4)."""
    match transaction.cryptogram_type:
        case kind if kind == AcType.TC:
            return _ONLINE if transaction.terminal_can(_Ttq.ONLINE_CRYPTOGRAM_REQUIRED) else _APPROVE
        case kind if kind == AcType.ARQC:
            return _ONLINE
        case kind if kind == AcType.AAC and transaction.request.transaction_type == REFUND:
            return _ONLINE  # for a refund the card is only read: whether it is granted is the acquirer's word
        case _:
            return _decline("card_declined")


def _check_expiry(transaction: _Transaction) -> _Verdict:
    """Application expired (C-3, 5.5). No date counts as expired."""
    expiration = transaction.card.get(Tag.EXPIRATION_DATE, b"")
    if restrictions.readable(expiration) and restrictions.not_after(transaction.request.date, expiration):
        return _APPROVE
    return _ONLINE if transaction.card_wants(_Ctq.ONLINE_IF_EXPIRED) else _decline("expired")


def _check_exception_file(transaction: _Transaction) -> _Verdict:
    """Terminal exception file (C-3, 5.5)."""
    psn = transaction.card.get(Tag.PAN_SEQUENCE_NUMBER, b"")
    return _decline("exception_file") if risk.excepted(transaction.setup, transaction.pan, psn) else _APPROVE


def _check_usage(transaction: _Transaction) -> _Verdict:
    """Application usage control, for cash and cashback (C-3, 5.5). A card that states none restricts nothing."""
    request, card = transaction.request, transaction.card
    usage, country = card.get(Tag.APPLICATION_USAGE_CONTROL, b""), card.get(Tag.ISSUER_COUNTRY_CODE)
    if len(usage) != 2 or country is None:
        return _APPROVE
    foreign = country != transaction.terminal[Tag.TERMINAL_COUNTRY_CODE]
    if request.transaction_type in CASH:
        allowed = usage[0] & (0x40 if foreign else 0x80)
        switch = _Ctq.SWITCH_FOR_CASH
    elif request.transaction_type == CASHBACK or request.amount_other_minor > 0:
        allowed = usage[1] & (0x40 if foreign else 0x80)
        switch = _Ctq.SWITCH_FOR_CASHBACK
    else:
        return _APPROVE
    if allowed:
        return _APPROVE
    if transaction.card_wants(switch):
        return _Verdict(_Decision.OTHER_INTERFACE, "not_allowed", MessageId.INSERT_OR_SWIPE)
    return _decline("not_allowed")


def _authenticate(transaction: _Transaction, verdict: _Verdict) -> tuple[_Verdict, OdaResult]:
    """Offline data authentication (C-3, 5.6): an approval rests on it, an online request only reports it."""
    if verdict.decision is _Decision.APPROVE:
        oda = _offline_authentication(transaction)
        return (verdict if oda.status is OdaStatus.OK else _after_failed_oda(transaction)), oda
    if verdict.decision is _Decision.ONLINE and transaction.terminal_can(_Ttq.ODA_FOR_ONLINE):
        # Decides nothing here, but the host sees it, and whoever defers an authorisation must know it.
        if Tag.SIGNED_DYNAMIC_DATA in transaction.card:
            return verdict, _fast_dda(transaction)
        return verdict, OdaResult(OdaStatus.NOT_PERFORMED, reason="missing_data")
    return verdict, OdaResult()


def _offline_authentication(transaction: _Transaction) -> OdaResult:
    """What the card offers, the better one first: fast DDA, or static data that anybody may have copied."""
    profile = Aip.decode(transaction.card[Tag.AIP])
    if not profile & Aip.DDA and profile & Aip.SDA:
        return _static(transaction)
    return _fast_dda(transaction)


def _static(transaction: _Transaction) -> OdaResult:
    card = transaction.card
    try:
        card[Tag.DATA_AUTHENTICATION_CODE] = authentication.sda(
            card, _rid(transaction), transaction.records, transaction.setup.trust(transaction.request)
        )
    except AuthenticationFailed as failed:
        return OdaResult(OdaStatus.FAILED, OdaMethod.SDA, failed.reason)
    return OdaResult(OdaStatus.OK, OdaMethod.SDA)


def _fast_dda(transaction: _Transaction) -> OdaResult:
    if not Aip.decode(transaction.card[Tag.AIP]) & Aip.DDA:
        return OdaResult(OdaStatus.NOT_PERFORMED, reason="not_supported")
    return authentication.fast_dda(
        {**transaction.card, **transaction.terminal},
        _rid(transaction),
        transaction.records,
        transaction.setup.trust(transaction.request),
    )


def _rid(transaction: _Transaction) -> bytes:
    return transaction.activation.combination.aid[: authentication.RID_BYTES]


def _after_failed_oda(transaction: _Transaction) -> _Verdict:
    """What the card wants done when it could not be authenticated (C-3, 5.6)."""
    if transaction.card_wants(_Ctq.ONLINE_IF_ODA_FAILS) and not transaction.terminal_can(_Ttq.OFFLINE_ONLY):
        return _ONLINE
    if transaction.card_wants(_Ctq.SWITCH_IF_ODA_FAILS) and transaction.terminal_can(_Ttq.CONTACT_CHIP):
        return _Verdict(_Decision.OTHER_INTERFACE, "oda_failed", MessageId.INSERT_CARD)
    return _decline("oda_failed")


def _verify_cardholder(transaction: _Transaction, verdict: _Verdict) -> tuple[_Verdict, Cvm]:
    """Cardholder verification (C-3, 5.7). A refund that the card did not authorise asks for none."""
    if verdict.decision not in {_Decision.APPROVE, _Decision.ONLINE} or transaction.cryptogram_type == AcType.AAC:
        return verdict, Cvm.NONE
    match _choose_cvm(transaction):
        case None:
            return _decline("cvm_failed"), Cvm.NONE
        case Cvm.ONLINE_PIN:
            return _ONLINE, Cvm.ONLINE_PIN
        case cvm:
            return verdict, cvm


def _choose_cvm(transaction: _Transaction) -> Cvm | None:
    """The card's wish against the terminal's means, first match; None where no way is left."""
    can_sign, can_pin = transaction.terminal_can(_Ttq.SIGNATURE), transaction.terminal_can(_Ttq.ONLINE_PIN)
    chosen: Cvm | None = None if transaction.terminal_can(_Ttq.CVM_REQUIRED) else Cvm.NONE
    if transaction.ctq is None:
        if chosen is None and (can_sign or can_pin):
            chosen = Cvm.SIGNATURE if can_sign else Cvm.ONLINE_PIN
    elif transaction.card_wants(_Ctq.ONLINE_PIN_REQUIRED) and can_pin:
        chosen = Cvm.ONLINE_PIN
    elif transaction.card_wants(_Ctq.CDCVM_PERFORMED):
        chosen = Cvm.CDCVM if _cdcvm_holds(transaction) else None
    elif transaction.card_wants(_Ctq.SIGNATURE_REQUIRED) and can_sign:
        chosen = Cvm.SIGNATURE
    return chosen


def _cdcvm_holds(transaction: _Transaction) -> bool:
    """CTQ travels unprotected: it counts if the signed copy agrees, or if the host will check the cryptogram."""
    related = transaction.card.get(Kernel3Tag.CARD_AUTHENTICATION_RELATED_DATA)
    if related is None:
        return transaction.cryptogram_type == AcType.ARQC
    return related[5:7] == transaction.card[Kernel3Tag.CTQ]

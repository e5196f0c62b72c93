"""Kernel 2, Mastercard (Book C-2): EMV mode.

The flow is contact's, cut to one GENERATE AC: the terminal checks and decides, the card signs (CDA), and the card may
leave. What differs are the limits, the parameters (DF81xx), and where a decline leads: a card that will not pay by tap
is asked to be inserted.

Left out, and answered as a reader without them answers: mag-stripe mode and data storage. Relay resistance, balance
reading and the recovery of torn transactions are off unless the settings (DF811B, DF8104 and DF8105, DF811D) ask for
them. A card that leaves before GENERATE AC is Try Again; during it Torn: nothing was authorised with a cryptogram that
was not received, and the card, presented again, may still hand it over (RECOVER AC).

Reasons of outcomes, besides those of entry point: card_lost, card_error, parse_error, missing_data, duplicate_data,
mag_stripe_only, amount_over_limit, oda_failed, confirm_on_phone, card_declined, terminal_declined (action codes).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Final, NamedTuple

from terminal.emv import authentication, cardholder, decision, dol, relay, restrictions, selection, tlv
from terminal.emv.apdu import CardRemoved, Command, Exchange, transceive
from terminal.emv.authentication import AuthenticationFailed
from terminal.emv.cardholder import Verification
from terminal.emv.configuration import (
    PHONE_MESSAGE_BYTES,
    Activation,
    Environment,
    Request,
    Setup,
    transaction_objects,
)
from terminal.emv.cryptogram import Answer, generate_ac, read_answer
from terminal.emv.decision import ActionCodes, AcType
from terminal.emv.initiation import COMMAND_DATA_MAX, get_processing_options, receive_processing_options
from terminal.emv.outcome import (
    Approved,
    Cvm,
    Declined,
    EndApplication,
    MessageId,
    OdaMethod,
    OnlineRequest,
    Outcome,
    SelectNext,
    Status,
    Torn,
    TryAgain,
    TryAnotherInterface,
    UiRequest,
)
from terminal.emv.progress import Step
from terminal.emv.records import CardFault, CardObjects, read_records
from terminal.emv.restrictions import CASH, CASHBACK, PURCHASE
from terminal.emv.results import Aip, Tvr
from terminal.emv.tags import Kernel2Tag, Tag
from terminal.emv.tlv import TlvError
from terminal.emv.torn import TornRecord
from terminal.emv.transaction import Transaction

KERNEL: Final = 2

_ACTION_CODE: Final = bytes.fromhex("840000000C")  # C-2, A.1: the default of all three
_NO_MAG_STRIPE: Final = 0x80  # kernel configuration
_NO_EMV: Final = 0x40
_ON_DEVICE_CVM: Final = 0x20
_CONFIGURATION: Final = b"\xa0"  # no mag-stripe mode, on-device cardholder verification
_CDA: Final = 0x08  # security capability
_NO_CVM: Final = 0x08  # CVM capability
_CONTACT_READER: Final = 0x20  # card data input capability
_MOBILE_SUPPORTED: Final = b"\x01"

_ON_DEVICE_CVM_PERFORMED: Final = bytes.fromhex("010002")  # 9F34
_ON_DEVICE_CVM_NOT_NEEDED: Final = bytes.fromhex("3F0002")

_CDA_OVER_AAC: Final = 0x00_01_00  # application capabilities 9F5D, byte 2 bit 1
_PHONE_WANTS_SOMETHING: Final = 0x00_03_0F  # POS cardholder interaction DF4B
_PHONE_MESSAGES: Final = bytes.fromhex(  # C-2, A.1: mask 3, value 3, message 1, status 1
    "000001 000001 20 00  000800 000800 20 00  000400 000400 20 00  000100 000100 20 00  000200 000200 20 00"
    "000000 000000 07 00"
)
_BALANCE_READING: Final = 0x00_02_00  # application capabilities 9F5D, byte 2 bit 2
_FOR_MAG_STRIPE: Final = bytes.fromhex("08010100")  # the first entry of an AFL
_HOLD_TIME: Final = bytes.fromhex("000013")  # in 100 ms
_A_CARD: Final = b"00"  # device type in third party data 9F6E

_TAPPED_PAYMENTS: Final = CASH | {PURCHASE, CASHBACK}


class _Limits(NamedTuple):
    """In minor units. Kernel 2's own objects first, then the combination's limits, then zero (C-2, A.1)."""

    floor: int
    transaction: int
    transaction_on_device_cvm: int
    cvm_required: int

    @classmethod
    def of(cls, activation: Activation) -> _Limits:
        tags, limits = activation.combination.tags, activation.combination.limits

        def limit(tag: Kernel2Tag, fallback: int | None) -> int:
            value = tags.get(tag)
            return fallback or 0 if value is None else int(value.hex())

        return cls(
            floor=limit(Kernel2Tag.FLOOR_LIMIT, limits.contactless_floor),
            transaction=limit(Kernel2Tag.TRANSACTION_LIMIT, limits.contactless_transaction),
            transaction_on_device_cvm=limit(Kernel2Tag.TRANSACTION_LIMIT_ON_DEVICE_CVM, limits.contactless_transaction),
            cvm_required=limit(Kernel2Tag.CVM_REQUIRED_LIMIT, limits.cvm_required),
        )


def run(setup: Setup, request: Request, environment: Environment, activation: Activation) -> Exchange[Outcome]:
    """One transaction with the selected application. Raises nothing that a card could cause."""
    card = CardObjects(KERNEL)
    try:
        card.receive(selection.application(activation.fci))
        card.require(Tag.DF_NAME)
    except (CardFault, TlvError):
        return SelectNext("parse_error")
    asked_for_cryptogram = False
    try:
        transaction = yield from _open(setup, request, environment, activation, card)
        if not isinstance(transaction, Transaction):
            return transaction
        asked, sign = _decide(transaction)
        yield from _read_balance(transaction, Kernel2Tag.BALANCE_BEFORE)
        asked_for_cryptogram = True
        recovered = yield from _recover(transaction)
        if recovered is not None:
            asked, sign, answer = recovered
        else:
            answer = yield from _generate_ac(transaction, asked, sign=sign)
        yield from _read_balance_after(transaction)
        return _outcome(transaction, asked, answer, sign=sign)
    except CardRemoved:
        return Torn("card_lost") if asked_for_cryptogram else TryAgain("card_lost")
    except CardFault as fault:
        return EndApplication(fault.reason)
    except TlvError:
        return EndApplication("parse_error")


# The conversation


def _open(
    setup: Setup, request: Request, environment: Environment, activation: Activation, card: CardObjects
) -> Exchange[Transaction | Outcome]:
    """Initiate application processing, read records (C-2, 6.3 to 6.7). Raises as `_generate_ac`."""
    terminal = transaction_objects(setup, request, environment, activation)
    terminal = _parameters(terminal) | terminal
    terminal[Tag.TERMINAL_CAPABILITIES] = _capabilities(terminal, None)
    transaction = Transaction(setup, request, environment, activation, KERNEL, card, terminal)
    selection.tell_languages(card, environment)
    environment.watch.step(Step.SELECTION, transaction)
    transaction.pdol_data = dol.build(card.get(Tag.PDOL, b""), transaction.objects, KERNEL)
    response = yield from transceive(get_processing_options(transaction.pdol_data))
    if response.sw != 0x9000:
        return SelectNext("card_error")
    receive_processing_options(response.data, card)
    card.require(Tag.AIP, Tag.AFL)
    environment.watch.step(Step.INITIATION, transaction)
    configured = transaction.terminal[Kernel2Tag.KERNEL_CONFIGURATION][0]
    if not transaction.aip & Aip.EMV_MODE or configured & _NO_EMV:
        return EndApplication("mag_stripe_only", UiRequest(MessageId.INSERT_CARD, Status.PROCESSING_ERROR))
    yield from relay.resist(transaction)
    # A reader that knows mag-stripe mode need not read its record in EMV mode (C-2, 6.3).
    skip = not configured & _NO_MAG_STRIPE and card[Tag.AFL].startswith(_FOR_MAG_STRIPE)
    transaction.records = yield from read_records(card[Tag.AFL][len(_FOR_MAG_STRIPE) if skip else 0 :], card)

    limits = _Limits.of(activation)
    on_device = _verified_on_device(transaction)
    if request.amount.minor > (limits.transaction_on_device_cvm if on_device else limits.transaction):
        return SelectNext("amount_over_limit")
    transaction.check_card_data(Tag.EXPIRATION_DATE, Tag.PAN, Tag.CDOL1)
    environment.watch.step(Step.RECORDS, transaction)
    return transaction


def _parameters(terminal: Mapping[int, bytes]) -> dict[int, bytes]:
    """What stands where nothing is configured: C-2's defaults, or what the terminal as a whole can do (9F33)."""
    capabilities = terminal.get(Tag.TERMINAL_CAPABILITIES, bytes(3))
    found: dict[int, bytes] = {
        Tag.APPLICATION_VERSION_TERMINAL: b"\x00\x02",
        Kernel2Tag.KERNEL_ID: bytes((KERNEL,)),
        Kernel2Tag.MOBILE_SUPPORT_INDICATOR: _MOBILE_SUPPORTED,
        Kernel2Tag.KERNEL_CONFIGURATION: _CONFIGURATION,
        Kernel2Tag.CARD_DATA_INPUT_CAPABILITY: capabilities[:1],
        Kernel2Tag.CVM_CAPABILITY_ABOVE_LIMIT: bytes((capabilities[1] & ~_NO_CVM & 0xFF,)),
        Kernel2Tag.CVM_CAPABILITY_BELOW_LIMIT: bytes((capabilities[1] & _NO_CVM,)),
        Kernel2Tag.SECURITY_CAPABILITY: bytes((capabilities[2] & _CDA,)),
    }
    return {int(tag): value for tag, value in found.items()}


def _generate_ac(transaction: Transaction, asked: AcType, *, sign: bool) -> Exchange[Answer]:
    """GENERATE AC (C-2, 6.9). Raises `CardFault`, `TlvError`, `CardRemoved`."""
    transaction.cdol_data = data = transaction.answer_list(Tag.CDOL1)
    if not sign and transaction.tvr & Tvr.RELAY_RESISTANCE_PERFORMED:
        relay.into_track_2(transaction)
    try:
        response = yield from transceive(generate_ac(asked, data, sign=sign))
    except CardRemoved:
        _remember(transaction, asked, sign=sign)
        raise
    if response.sw != 0x9000:
        raise CardFault("card_error")
    transaction.environment.notify(UiRequest(MessageId.CARD_READ_OK, Status.CARD_READ_OK))
    return read_answer(response.data, asked, KERNEL)


def _remember(transaction: Transaction, asked: AcType, *, sign: bool) -> None:
    """A card that knows RECOVER AC left in the middle of its cryptogram (C-2, 6.9): keep what was said."""
    card = transaction.card
    at_most = int.from_bytes(transaction.terminal.get(Kernel2Tag.TORN_RECORDS_MAX, b""), "big")
    drdol = card.get(Kernel2Tag.DRDOL)
    if not drdol or not at_most:
        return
    data = dol.build(drdol, transaction.objects, KERNEL)
    if len(data) > COMMAND_DATA_MAX:
        return
    record = TornRecord(
        pan=card[Tag.PAN],
        psn=card.get(Tag.PAN_SEQUENCE_NUMBER),
        drdol_data=data,
        pdol_data=transaction.pdol_data,
        cdol_data=transaction.cdol_data,
        terminal=dict(transaction.terminal),
        card={tag: card[tag] for tag in relay.ANSWERED if tag in card},
        tvr=transaction.tvr,
        cvm=transaction.cvm,
        oda=transaction.oda,
        asked=asked,
        sign=sign,
    )
    transaction.environment.torn.keep(record, at_most)


def _recover(transaction: Transaction) -> Exchange[tuple[AcType, bool, Answer] | None]:
    """RECOVER AC (C-2, 5.5 and state 10), if it is this card that was torn away before.

    What the terminal said then counts again, because that is what the cryptogram is about. None: there is nothing to
    be recovered, and the card is asked for a new one. Raises `CardFault`, `TlvError`, `CardRemoved`: the record stays.
    """
    remembered = transaction.environment.torn
    record = remembered.find(transaction.card[Tag.PAN], transaction.card.get(Tag.PAN_SEQUENCE_NUMBER))
    if record is None:
        return None
    response = yield from transceive(Command(0x80, 0xD0, 0x00, 0x00, record.drdol_data, le=0))
    remembered.drop(record)
    if response.sw != 0x9000:
        return None
    transaction.environment.notify(UiRequest(MessageId.CARD_READ_OK, Status.CARD_READ_OK))
    transaction.pdol_data, transaction.cdol_data = record.pdol_data, record.cdol_data
    transaction.terminal = dict(record.terminal)
    transaction.card.update(record.card)
    transaction.tvr, transaction.cvm, transaction.oda = record.tvr, record.cvm, record.oda
    transaction.asked = record.asked
    return record.asked, record.sign, read_answer(response.data, record.asked, KERNEL)


def _read_balance(transaction: Transaction, into: Kernel2Tag) -> Exchange[None]:
    """GET DATA of the offline accumulator balance (C-2, 6.7 and 6.9), if card and settings want it read here.

    A card that gives none is no worse for it. Raises `CardRemoved`.
    """
    capabilities = int.from_bytes(transaction.card.get(Kernel2Tag.APPLICATION_CAPABILITIES, b""), "big")
    if into not in transaction.terminal or not capabilities & _BALANCE_READING:
        return
    tag = int(Kernel2Tag.OFFLINE_ACCUMULATOR_BALANCE)
    response = yield from transceive(Command(0x80, 0xCA, tag >> 8, tag & 0xFF, le=0))
    if response.sw == 0x9000:
        with contextlib.suppress(TlvError):
            balance = tlv.parse_one(response.data, tag).value
            if len(balance) == Kernel2Tag.OFFLINE_ACCUMULATOR_BALANCE.length_max and balance.hex().isdecimal():
                transaction.terminal[into] = balance


def _read_balance_after(transaction: Transaction) -> Exchange[None]:
    """The same once there is a cryptogram: a card that leaves here has done all that was wanted of it."""
    with contextlib.suppress(CardRemoved):
        yield from _read_balance(transaction, Kernel2Tag.BALANCE_AFTER)


# What the terminal decides


def _decide(transaction: Transaction) -> tuple[AcType, bool]:
    """Everything between records and GENERATE AC: which cryptogram, and whether it must be signed (C-2, 6.7)."""
    limits = _Limits.of(transaction.activation)
    amount = transaction.request.amount.minor
    cvm_required = amount > limits.cvm_required
    terminal = transaction.terminal
    terminal[Tag.TERMINAL_CAPABILITIES] = _capabilities(
        terminal, Kernel2Tag.CVM_CAPABILITY_ABOVE_LIMIT if cvm_required else Kernel2Tag.CVM_CAPABILITY_BELOW_LIMIT
    )

    transaction.note(_check_authentication(transaction))
    transaction.note(restrictions.check(transaction.objects))
    verification = _verify_cardholder(transaction, cvm_required=cvm_required)
    terminal[Tag.CVM_RESULTS] = verification.results
    transaction.cvm = verification.cvm
    # Book C-2 knows no pad of the terminal's own: a PIN that cannot be entered is a method not supported, no more.
    transaction.note(verification.tvr & ~Tvr.PIN_PAD_ABSENT)
    if amount > limits.floor:
        transaction.note(Tvr.FLOOR_LIMIT_EXCEEDED)

    codes = ActionCodes.of(transaction.objects, _ACTION_CODE)
    transaction.asked = asked = decision.first(transaction.tvr, codes, transaction.reach)
    if transaction.tvr & (Tvr.ODA_NOT_PERFORMED | Tvr.CDA_FAILED):
        # A phone that verified its holder has no other way to prove that it did.
        return (AcType.AAC if _verified_on_device(transaction) else asked), False
    may_sign = int.from_bytes(transaction.card.get(Kernel2Tag.APPLICATION_CAPABILITIES, b""), "big")
    return asked, asked is not AcType.AAC or bool(may_sign & _CDA_OVER_AAC)


def _capabilities(terminal: Mapping[int, bytes], cvm: Kernel2Tag | None) -> bytes:
    """Terminal capabilities 9F33, put together. None: the amount has not been weighed yet (C-2, 6.2)."""
    return (
        terminal[Kernel2Tag.CARD_DATA_INPUT_CAPABILITY]
        + (terminal[cvm] if cvm else b"\x00")
        + terminal[Kernel2Tag.SECURITY_CAPABILITY]
    )


def _check_authentication(transaction: Transaction) -> Tvr:
    """Whether CDA can be had at all; the keys are recovered once there is a signature (C-2, 6.7 and 6.9)."""
    card = transaction.card
    if not (transaction.aip & Aip.CDA and transaction.terminal[Kernel2Tag.SECURITY_CAPABILITY][0] & _CDA):
        return Tvr.ODA_NOT_PERFORMED
    needed = (
        Tag.CA_PUBLIC_KEY_INDEX,
        Tag.ISSUER_CERTIFICATE,
        Tag.ISSUER_EXPONENT,
        Tag.ICC_CERTIFICATE,
        Tag.ICC_EXPONENT,
        Tag.STATIC_DATA_TAG_LIST,
    )
    if not all(card.get(tag) for tag in needed):
        return Tvr.CARD_DATA_MISSING | Tvr.CDA_FAILED
    if card[Tag.STATIC_DATA_TAG_LIST] != bytes((Tag.AIP,)):
        raise CardFault("card_error")
    index = int.from_bytes(card[Tag.CA_PUBLIC_KEY_INDEX], "big")
    known = transaction.trust.ca_keys.find(transaction.rid, index) is not None
    return Tvr.NONE if known else Tvr.CDA_FAILED


def _verified_on_device(transaction: Transaction) -> bool:
    """Whether card and reader both know on-device cardholder verification."""
    configuration = transaction.terminal[Kernel2Tag.KERNEL_CONFIGURATION][0]
    return bool(transaction.aip & Aip.ON_DEVICE_CVM and configuration & _ON_DEVICE_CVM)


def _verify_cardholder(transaction: Transaction, *, cvm_required: bool) -> Verification:
    """The device's word where it verifies its holder itself, else the card's list (C-2, 7.5)."""
    if not _verified_on_device(transaction):
        return cardholder.verify(transaction.objects)
    if cvm_required:
        return Verification(_ON_DEVICE_CVM_PERFORMED, cvm=Cvm.CDCVM)
    return Verification(_ON_DEVICE_CVM_NOT_NEEDED)


# What the card decides


def _outcome(transaction: Transaction, asked: AcType, answer: Answer, *, sign: bool) -> Outcome:
    """C-2, 6.9: the signature first, then what the phone wants, then the cryptogram."""
    genuine = _genuine(transaction, answer, sign=sign)
    transaction.environment.watch.step(Step.AUTHENTICATION, transaction)
    if not genuine:
        return EndApplication("oda_failed")
    interaction = int.from_bytes(transaction.card.get(Kernel2Tag.POS_CARDHOLDER_INTERACTION, b""), "big")
    if interaction & _PHONE_WANTS_SOMETHING:
        ui = _phone_message(transaction.terminal, interaction)
        return EndApplication("confirm_on_phone", ui, restart=UiRequest(ui.message, Status.READY_TO_READ))
    match answer.kind:
        case AcType.TC:
            message = MessageId.APPROVED_SIGN if transaction.cvm is Cvm.SIGNATURE else MessageId.APPROVED
            ui = UiRequest(message, Status.CARD_READ_OK, balance_minor=_left(transaction))
            return Approved(transaction.read(), ui)
        case AcType.ARQC:
            return OnlineRequest(transaction.read())
        case AcType.AAC:
            return _declined(transaction, "terminal_declined" if asked is AcType.AAC else "card_declined")


def _genuine(transaction: Transaction, answer: Answer, *, sign: bool) -> bool:
    """Recover the keys and check the signature. Raises `CardFault` if it was asked for and is not there."""
    if sign and answer.signature is not None:
        try:
            transaction.icc_key = authentication.card_key(
                transaction.card, transaction.rid, transaction.records, transaction.trust
            )
        except AuthenticationFailed as failed:
            transaction.authentication_failed(OdaMethod.CDA, failed.reason)
            return False
    elif sign and answer.kind is not AcType.AAC:
        raise CardFault("card_error")
    relayed = transaction.tvr & Tvr.RELAY_RESISTANCE_PERFORMED
    return transaction.take(answer, signed=sign, more=relay.signed_data(transaction.objects) if relayed else b"")


def _left(transaction: Transaction) -> int | None:
    """The balance as it was read last, for the cardholder."""
    for tag in (Kernel2Tag.BALANCE_AFTER, Kernel2Tag.BALANCE_BEFORE):
        if balance := transaction.terminal.get(tag):
            return int(balance.hex())
    return None


def _declined(transaction: Transaction, reason: str) -> Outcome:
    """An AAC (C-2, 6.9): a card may still pay when it is inserted, a phone cannot be."""
    if transaction.request.transaction_type not in _TAPPED_PAYMENTS:
        return EndApplication(reason, UiRequest(MessageId.CLEAR_DISPLAY, Status.CARD_READ_OK))
    contact = transaction.terminal[Tag.TERMINAL_CAPABILITIES][0] & _CONTACT_READER
    if contact and not _is_phone(transaction.card.get(Kernel2Tag.THIRD_PARTY_DATA, b"")):
        return TryAnotherInterface(reason, UiRequest(MessageId.INSERT_CARD, Status.PROCESSING_ERROR))
    return Declined(reason, transaction.read())


def _is_phone(third_party_data: bytes) -> bool:
    """Whether the device type (bytes 5 and 6, there unless byte 3 says so) is another one than a card."""
    return len(third_party_data) >= 6 and not third_party_data[2] & 0x80 and third_party_data[4:6] != _A_CARD


def _phone_message(terminal: Mapping[int, bytes], interaction: int) -> UiRequest:
    """What to show while the phone is dealt with: the first row of the phone message table that fits (C-2, A.1)."""
    message, status = MessageId.DECLINED, Status.NOT_READY
    table = terminal.get(Kernel2Tag.PHONE_MESSAGE_TABLE) or _PHONE_MESSAGES
    for at in range(0, len(table) - PHONE_MESSAGE_BYTES + 1, PHONE_MESSAGE_BYTES):
        mask, value = (int.from_bytes(table[at + part : at + part + 3], "big") for part in (0, 3))
        if interaction & mask == value:
            message, status = MessageId(table[at + 6]), Status(table[at + 7])
            break
    hold_time = int(terminal.get(Kernel2Tag.MESSAGE_HOLD_TIME, _HOLD_TIME).hex())
    return UiRequest(message, status, hold_time * 100)

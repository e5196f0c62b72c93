"""An inserted card, from selection to the last cryptogram (EMV 4.4 Book 3, 8 to 11).

Card and terminal decide together: the terminal checks card, application and cardholder, weighs what it found, and asks
for a cryptogram; the card gives it, or a more cautious one. An online request leaves the card waiting: its `resume` is
the rest, run with the host's answer.

    application selection                 `contact_selection`     terminal risk management     `risk`
    initiation, records                   `initiation` `records`  terminal action analysis     `decision`
    offline data authentication           `authentication`        card action analysis         `cryptogram`
    processing restrictions               `restrictions`          issuer authentication        here
    cardholder verification               `cardholder`            issuer scripts, completion   `scripts`, here

A card that leaves before the first GENERATE AC is Try Again: nothing was asked of it. During it, it is Torn: there may
be a cryptogram that nobody has, and nothing was authorised with it. After an ARQC only `resume` asks again. There it is
Torn as long as an approval was on its way, so that payment takes the sale back at the host; where it was going to be
declined anyway it is Declined, with or without the card's word.

`resume` returns Approved, Declined or Torn, nothing else. Whoever had the host's approval and does not get Approved
must reverse: the card disagreed, proved false, or is gone.

Reasons of an end: card_blocked, application_blocked, no_common_application, not_accepted (GET PROCESSING OPTIONS was
refused), card_error, parse_error, missing_data, duplicate_data; of Try Again and Torn: card_lost; of declines:
terminal_declined (action codes), card_declined, host_declined, unable_to_go_online, oda_failed, and card_error,
parse_error, missing_data, duplicate_data for a second GENERATE AC that went wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from terminal.emv import authentication, cardholder, decision, dol, restrictions, risk, scripts, selection, tlv
from terminal.emv.apdu import CardRemoved, Command, ContactLine, Exchange, transceive
from terminal.emv.authentication import AuthenticationFailed
from terminal.emv.configuration import CONTACT, Activation, Environment, Request, Setup, transaction_objects
from terminal.emv.contact_selection import (
    Choose,
    activation,
    candidates,
    final_select,
    is_blocked,
    without_confirmation,
)
from terminal.emv.cryptogram import Answer, generate_ac, read_answer
from terminal.emv.decision import ActionCodes, AcType
from terminal.emv.initiation import get_processing_options, receive_processing_options
from terminal.emv.outcome import (
    Approved,
    CardRead,
    Cvm,
    Declined,
    EndApplication,
    IssuerAnswer,
    MessageId,
    OdaMethod,
    OnlineRequest,
    Outcome,
    Status,
    Torn,
    TryAgain,
    UiRequest,
)
from terminal.emv.progress import Step
from terminal.emv.records import CardFault, CardObjects, read_records
from terminal.emv.results import Aip, Tsi, Tvr
from terminal.emv.tags import Tag
from terminal.emv.tlv import TlvError
from terminal.emv.transaction import Transaction

ENTRY_MODE: Final = b"\x05"  # 9F39: contact, chip data (ISO 8583:1987, data element 22)
_APPROVALS: Final = frozenset({b"00", b"10", b"11"})  # authorisation response codes 8A that mean yes
_MANDATORY: Final = (Tag.PAN, Tag.EXPIRATION_DATE, Tag.CDOL1, Tag.CDOL2)


def run(
    setup: Setup,
    request: Request,
    environment: Environment,
    choose: Choose = without_confirmation,
    line: ContactLine | None = None,
) -> Exchange[Outcome]:
    """One transaction with the inserted card. Raises nothing that a card could cause.

    `choose` takes one of the candidates that are left, best first, or None to give up; it may take its time.
    `line`: how the card is spoken to, where that is known.
    """
    line = line or ContactLine()
    return (yield from line.carry(_run(setup, request, environment, choose, line)))


def _run(
    setup: Setup, request: Request, environment: Environment, choose: Choose, line: ContactLine
) -> Exchange[Outcome]:
    asked_for_cryptogram = False
    try:
        transaction = yield from _open(setup, request, environment, choose)
        if isinstance(transaction, EndApplication):
            return transaction
        yield from _examine(transaction)
        asked_for_cryptogram = True
        return (yield from _first_cryptogram(transaction, line))
    except CardRemoved:
        return Torn("card_lost") if asked_for_cryptogram else TryAgain("card_lost")
    except CardFault as fault:
        return EndApplication(fault.reason)
    except TlvError:
        return EndApplication("parse_error")


# Selection to records


def _open(
    setup: Setup, request: Request, environment: Environment, choose: Choose
) -> Exchange[Transaction | EndApplication]:
    """Select applications until one lets itself be started, and read it (Book 1, 12; Book 3, 10.1 and 10.2)."""
    reason = "no_common_application"
    remaining = list((yield from candidates(setup, request, environment.reads)))
    environment.watch.candidates([candidate.listed() for candidate in remaining])
    while (candidate := choose(tuple(remaining))) is not None:
        remaining.remove(candidate)
        response = yield from final_select(candidate)
        activated = activation(candidate, response)
        if activated is None:
            if is_blocked(response):
                reason = "application_blocked"
            continue
        transaction = _begin(setup, request, environment, activated)
        if not (yield from _initiate(transaction)):
            reason = "not_accepted"
            continue
        transaction.records = yield from read_records(transaction.card[Tag.AFL], transaction.card)
        transaction.check_card_data(*_MANDATORY)
        environment.watch.step(Step.RECORDS, transaction)
        return transaction
    return EndApplication(reason)


def _begin(setup: Setup, request: Request, environment: Environment, activation: Activation) -> Transaction:
    """What is known once an application is selected. Raises `CardFault`, `TlvError`."""
    card = CardObjects()
    terminal = transaction_objects(setup, request, environment, activation) | {
        int(Tag.AID): activation.adf_name,  # the name that the card gave (Book 1, 12.4)
        int(Tag.TSI): bytes(2),
    }
    if Tag.POS_ENTRY_MODE not in request.objects:
        terminal[Tag.POS_ENTRY_MODE] = ENTRY_MODE
    transaction = Transaction(setup, request, environment, activation, CONTACT, card, terminal)
    card.receive(selection.application(activation.fci))
    selection.tell_languages(card, environment)
    environment.watch.step(Step.SELECTION, transaction)
    return transaction


def _initiate(transaction: Transaction) -> Exchange[bool]:
    """Initiate application processing (Book 3, 10.1). False: the card does not accept, another application may."""
    card = transaction.card
    transaction.pdol_data = dol.build(card.get(Tag.PDOL, b""), transaction.objects)
    response = yield from transceive(get_processing_options(transaction.pdol_data))
    if response.sw == 0x6985:
        return False
    if response.sw != 0x9000:
        raise CardFault("card_error")
    receive_processing_options(response.data, card)
    card.require(Tag.AIP, Tag.AFL)
    transaction.environment.watch.step(Step.INITIATION, transaction)
    return True


# What the terminal finds out


def _examine(transaction: Transaction) -> Exchange[None]:
    """Everything before terminal action analysis (Book 3, 10.3 to 10.6). The books leave the order open."""
    yield from _authenticate(transaction)
    transaction.environment.watch.step(Step.AUTHENTICATION, transaction)
    transaction.note(restrictions.check(transaction.objects))
    _verify_cardholder(transaction)
    yield from _manage_risk(transaction)
    if dol.asks_for(transaction.card[Tag.CDOL1], Tag.TC_HASH) and Tag.TDOL not in transaction.card:
        transaction.note(Tvr.DEFAULT_TDOL_USED)


def _authenticate(transaction: Transaction) -> Exchange[None]:
    """Offline data authentication (Book 3, 10.3; Book 2, 5 and 6)."""
    method = authentication.choose(transaction.aip, transaction.terminal.get(Tag.TERMINAL_CAPABILITIES, b""))
    if method is None:
        transaction.note(Tvr.ODA_NOT_PERFORMED)
        return
    chain = (transaction.card, transaction.rid, transaction.records, transaction.trust)
    try:
        if method is OdaMethod.SDA:
            transaction.note(Tvr.SDA_SELECTED)
            transaction.card[Tag.DATA_AUTHENTICATION_CODE] = authentication.sda(*chain)
        else:
            transaction.icc_key = authentication.card_key(*chain)
        if method is OdaMethod.DDA:
            yield from _internal_authenticate(transaction)
    except AuthenticationFailed as failed:
        transaction.authentication_failed(method, failed.reason)
        return
    if method is not OdaMethod.CDA:  # whose signature comes with the cryptogram
        transaction.authenticated(method)


def _internal_authenticate(transaction: Transaction) -> Exchange[None]:
    """INTERNAL AUTHENTICATE (Book 2, 6.5.1). Raises `AuthenticationFailed`, and `CardFault` if the card refuses."""
    card, key = transaction.card, transaction.icc_key
    transaction.icc_key = None  # it is for CDA that a key is kept
    ddol = card.get(Tag.DDOL) or transaction.default(Tag.DDOL) or b""
    if key is None or not dol.asks_for(ddol, Tag.UNPREDICTABLE_NUMBER):
        raise AuthenticationFailed("signature")  # a signature over nothing fresh proves nothing
    terminal_data = dol.build(ddol, transaction.objects)
    if len(terminal_data) > 0xFF:
        raise CardFault("parse_error")
    response = yield from transceive(Command(0x00, 0x88, 0x00, 0x00, terminal_data, le=0))
    if response.sw != 0x9000:
        raise CardFault("card_error")
    nodes = tlv.parse(response.data)
    match nodes[0] if len(nodes) == 1 else None:
        case tlv.Node(Tag.RESPONSE_FORMAT_1, value):
            signature = value
        case tlv.Node(Tag.RESPONSE_FORMAT_2) as template if found := template.find(Tag.SIGNED_DYNAMIC_DATA):
            signature = found.value
        case _:
            raise CardFault("parse_error")
    card[Tag.SIGNED_DYNAMIC_DATA] = signature
    card[Tag.ICC_DYNAMIC_NUMBER] = authentication.dda(key, signature, terminal_data)


def _verify_cardholder(transaction: Transaction) -> None:
    """Cardholder verification (Book 3, 10.5)."""
    verification = cardholder.verify(transaction.objects)
    transaction.terminal[Tag.CVM_RESULTS] = verification.results
    transaction.cvm = verification.cvm
    transaction.note(verification.tvr, Tsi.CVM_PERFORMED if verification.attempted else Tsi.NONE)


def _manage_risk(transaction: Transaction) -> Exchange[None]:
    """Terminal risk management (Book 3, 10.6)."""
    floor = transaction.terminal.get(Tag.TERMINAL_FLOOR_LIMIT)
    found, counters = yield from risk.manage(
        transaction.setup,
        transaction.request,
        transaction.environment,
        transaction.card,
        pan=transaction.pan,
        floor_minor=None if floor is None else int.from_bytes(floor, "big"),
        selection=transaction.activation.combination.limits.random,
        reach=transaction.reach,
    )
    transaction.card.update(counters)
    transaction.note(found, Tsi.TERMINAL_RISK_MANAGEMENT_PERFORMED)


# What card and terminal decide


def _first_cryptogram(transaction: Transaction, line: ContactLine) -> Exchange[Outcome]:
    """Terminal and card action analysis (Book 3, 10.7 and 10.8). Raises `CardRemoved`, `CardFault`, `TlvError`."""
    codes = ActionCodes.of(transaction.objects)
    transaction.asked = asked = decision.first(transaction.tvr, codes, transaction.reach)
    answer, genuine = yield from _generate_ac(transaction, asked, Tag.CDOL1)
    transaction.note(tsi=Tsi.CARD_RISK_MANAGEMENT_PERFORMED)
    match answer.kind:
        case AcType.TC if genuine:
            _set_response_code(transaction, decision.OFFLINE_APPROVED)
            return _approved(transaction)
        case AcType.ARQC if genuine and transaction.reach is not decision.Reach.OFFLINE_ONLY:
            transaction.terminal.pop(Tag.AUTHORISATION_RESPONSE_CODE, None)  # the host's to state
            return OnlineRequest(
                transaction.read(), resume=lambda answer: line.carry(_complete(transaction, codes, answer))
            )
        case AcType.ARQC if genuine:
            return (yield from _complete(transaction, codes, None))
        case AcType.ARQC:
            return (yield from _decline_false_card(transaction))
        case _:
            _set_response_code(transaction, decision.OFFLINE_DECLINED)
            reason = "card_declined" if asked is not AcType.AAC else "terminal_declined"
            return Declined(reason if genuine else "oda_failed", transaction.read())


def _generate_ac(
    transaction: Transaction, asked: AcType, data_list: Tag, *, final: bool = False
) -> Exchange[tuple[Answer, bool]]:
    """GENERATE AC, and whether the answer is what CDA demands. Raises `CardRemoved`, `CardFault`, `TlvError`."""
    sign = transaction.icc_key is not None and asked is not AcType.AAC
    if not final and asked is not AcType.ARQC:
        approve = asked is AcType.TC
        _set_response_code(transaction, decision.OFFLINE_APPROVED if approve else decision.OFFLINE_DECLINED)
    data = transaction.answer_list(data_list)
    response = yield from transceive(generate_ac(asked, data, sign=sign))
    if response.sw != 0x9000:
        raise CardFault("card_error")
    answer = read_answer(response.data, asked, final=final)
    transaction.cdol_data += data
    return answer, transaction.take(answer, signed=sign)


def _decline_false_card(transaction: Transaction) -> Exchange[Outcome]:
    """An ARQC that CDA does not vouch for is not sent; the card is told so at once (Book 2, 6.6.2)."""
    _set_response_code(transaction, decision.OFFLINE_DECLINED)
    with suppress(CardRemoved, CardFault, TlvError):  # the decline does not depend on the card's word
        yield from _generate_ac(transaction, AcType.AAC, Tag.CDOL2, final=True)
    return Declined("oda_failed", transaction.read())


# After the host


def _complete(transaction: Transaction, codes: ActionCodes, answer: IssuerAnswer | None) -> Exchange[Outcome]:
    """Issuer authentication, scripts, second GENERATE AC (Book 3, 10.9 to 10.11). Raises nothing."""
    if answer is None:
        asked = decision.unable_to_go_online(transaction.tvr, codes, transaction.reach)
        approve, refusal = asked is AcType.TC, "unable_to_go_online"
        _set_response_code(transaction, decision.UNABLE_ONLINE_APPROVED if approve else decision.UNABLE_ONLINE_DECLINED)
    else:
        approve, refusal = answer.response_code in _APPROVALS, "host_declined"
        asked = AcType.TC if approve else AcType.AAC
        _set_response_code(transaction, answer.response_code)
    try:
        if answer is not None:
            yield from _authenticate_issuer(transaction, answer)
            yield from _run_scripts(transaction, answer.scripts_before, Tvr.SCRIPT_FAILED_BEFORE)
        reply, genuine = yield from _generate_ac(transaction, asked, Tag.CDOL2, final=True)
    except CardRemoved:
        return Torn("card_lost") if approve else Declined(refusal, transaction.read())
    except CardFault as fault:
        return Declined(fault.reason if approve else refusal, transaction.read())
    except TlvError:
        return Declined("parse_error" if approve else refusal, transaction.read())
    if answer is not None:
        yield from _run_scripts(transaction, answer.scripts_after, Tvr.SCRIPT_FAILED_AFTER)
    if not genuine:
        return Declined("oda_failed", transaction.read())
    if reply.kind is AcType.TC:
        return _approved(transaction)
    return Declined("card_declined" if approve else refusal, transaction.read())


def _authenticate_issuer(transaction: Transaction, answer: IssuerAnswer) -> Exchange[None]:
    """Issuer authentication (Book 3, 10.9): by a command of its own, or inside the second GENERATE AC through CDOL2."""
    data = answer.authentication_data
    if data is None:
        return
    transaction.terminal[Tag.ISSUER_AUTHENTICATION_DATA] = data
    if not transaction.aip & Aip.ISSUER_AUTHENTICATION:
        return
    known = Tag.ISSUER_AUTHENTICATION_DATA
    if known.length_min <= len(data) <= known.length_max:
        response = yield from transceive(Command(0x00, 0x82, 0x00, 0x00, data))
        transaction.note(tsi=Tsi.ISSUER_AUTHENTICATION_PERFORMED)
        if response.sw == 0x9000:
            return
    transaction.note(Tvr.ISSUER_AUTHENTICATION_FAILED)


def _run_scripts(transaction: Transaction, templates: Sequence[bytes], failure: Tvr) -> Exchange[None]:
    if not templates:
        return
    results = yield from scripts.run(templates)
    transaction.terminal[Tag.ISSUER_SCRIPT_RESULTS] = transaction.terminal.get(Tag.ISSUER_SCRIPT_RESULTS, b"") + results
    transaction.note(Tvr.NONE if scripts.succeeded(results) else failure, Tsi.SCRIPT_PERFORMED)


def _set_response_code(transaction: Transaction, code: bytes) -> None:
    transaction.terminal[Tag.AUTHORISATION_RESPONSE_CODE] = code


def _approved(transaction: Transaction) -> Approved:
    card: CardRead = transaction.read()
    message = MessageId.APPROVED_SIGN if card.cvm is Cvm.SIGNATURE else MessageId.APPROVED
    return Approved(card, UiRequest(message, Status.CARD_READ_OK))

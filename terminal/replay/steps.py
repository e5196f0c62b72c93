"""An authentication file or a risk file, run: one part of a transaction, with what it would find in a whole one."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeAlias

from terminal.emv import authentication, cardholder, decision, dol, restrictions, risk
from terminal.emv.authentication import AuthenticationFailed, PublicKey, Trust
from terminal.emv.configuration import ConfigurationError, Environment, Request, Setup
from terminal.emv.decision import ActionCodes, AcType, Reach
from terminal.emv.outcome import OdaMethod, OdaStatus, Pan
from terminal.emv.records import CardFault, CardObjects
from terminal.emv.results import Aip, Tsi, Tvr
from terminal.emv.tags import Kernel3Tag, Tag
from terminal.emv.tlv import TlvError
from terminal.emv.transaction import check_card_data, failed_authentication
from terminal.replay import formats, settings
from terminal.replay.formats import UnusableFile
from terminal.replay.run import recovered
from terminal.replay.script import ScriptedCard

_VERIFIES: Final = Aip.CVM.to_bytes(2, "big")  # the AIP of a card whose CVM list alone is stated
_Chain: TypeAlias = tuple[bytes, bytes, Trust]  # RID, the records' part of the static data, what is trusted


def authenticate(file: formats.OdaFile) -> dict[str, Any]:
    """Offline data authentication with the data of the file (Book 2, 5 and 6). Raises `UnusableFile`."""
    method = OdaMethod(file.method)
    card = settings.objects(file.card)
    trust = Trust(settings.ca_keys(file.capks), settings.revoked(file.revoked), _date(file.date))
    rid = _rid(card, file.capks)
    records = _records(bytes.fromhex(file.static_data), card)
    reason: str | None = None
    try:
        card |= _verified(method, card, (rid, records, trust), file)
    except AuthenticationFailed as failed:
        reason = failed.reason
    tvr = Tvr.SDA_SELECTED if method is OdaMethod.SDA else Tvr.NONE
    if reason is not None and method is not OdaMethod.FDDA:  # which has no TVR of its own (Book C-3)
        tvr |= failed_authentication(method, reason)
    return {
        "result": "ok" if reason is None else "failed",
        "reason": reason,
        "tvr": tvr.encode().hex().upper(),
        "recovered": recovered(card, rid, records, trust, method if reason is None else None),
    }


def _verified(method: OdaMethod, card: Mapping[int, bytes], chain: _Chain, file: formats.OdaFile) -> dict[int, bytes]:
    """What only the signature says. Raises `AuthenticationFailed`."""
    terminal_data = bytes.fromhex(file.dynamic_data)
    if method is OdaMethod.SDA:
        return {int(Tag.DATA_AUTHENTICATION_CODE): authentication.sda(card, *chain)}
    if method is OdaMethod.FDDA:
        related = card.get(Kernel3Tag.CARD_AUTHENTICATION_RELATED_DATA, b"")
        # The card's part is the end of what is signed, whether the file repeats it or not.
        if not terminal_data.endswith(related):
            terminal_data += related
        result = authentication.fast_dda_over(terminal_data, card, *chain)
        if result.status is not OdaStatus.OK:
            raise AuthenticationFailed(result.reason or "signature")
        return {}
    icc = authentication.card_key(card, *chain)
    signature = card.get(Tag.SIGNED_DYNAMIC_DATA)
    if signature is None:
        raise AuthenticationFailed("missing_data")
    if method is OdaMethod.DDA:
        if Tag.DDOL in card and not _asks_for_number(card[Tag.DDOL]):
            raise AuthenticationFailed("signature")  # over nothing fresh (Book 2, 6.5.1)
        return {int(Tag.ICC_DYNAMIC_NUMBER): authentication.dda(icc, signature, terminal_data)}
    return _cryptogram(icc, signature, card, file)


def _asks_for_number(ddol: bytes) -> bool:
    try:
        return dol.asks_for(ddol, Tag.UNPREDICTABLE_NUMBER)
    except TlvError as error:
        raise UnusableFile(f"card: the DDOL 9F49 is no list ({error}); nothing was checked.") from error


def _cryptogram(icc: PublicKey, signature: bytes, card: Mapping[int, bytes], file: formats.OdaFile) -> dict[int, bytes]:
    """CDA (Book 2, 6.6.2). Raises `AuthenticationFailed`, `UnusableFile`."""
    number = file.unpredictable_number or file.dynamic_data
    if not number:
        raise UnusableFile("unpredictable_number: CDA signs over it; nothing was checked. Add it.")
    signed = authentication.cda(icc, signature, bytes.fromhex(number))
    clear = card.get(Tag.CRYPTOGRAM_INFORMATION)
    if clear is not None and clear != bytes((signed.cid,)):
        raise AuthenticationFailed("signature")
    if signed.transaction_data_hash != authentication.sha1(bytes.fromhex(file.transaction_data)):
        raise AuthenticationFailed("signature")
    return {
        int(Tag.ICC_DYNAMIC_NUMBER): signed.icc_dynamic_number,
        int(Tag.CRYPTOGRAM_INFORMATION): bytes((signed.cid,)),
        int(Tag.CRYPTOGRAM): signed.cryptogram,
    }


def _date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise UnusableFile("date: no such date; nothing was checked. Write it as 2026-03-14.") from error


def _rid(card: Mapping[int, bytes], capks: list[formats.CaPublicKey]) -> bytes:
    """Of the card's AID where it is stated; else of the only key that has the card's index. Raises `UnusableFile`."""
    for tag in (Tag.DF_NAME, Tag.ADF_NAME, Tag.AID):
        if tag in card:
            return card[tag][: authentication.RID_BYTES]
    index = card.get(Tag.CA_PUBLIC_KEY_INDEX, b"").hex().upper()
    rids = {key.rid for key in capks if key.index == index}
    if len(rids) > 1:
        raise UnusableFile("card: more than one scheme has a key of this index; nothing was checked. Add 84, the AID.")
    return bytes.fromhex(rids.pop()) if rids else b""


def _records(static_data: bytes, card: Mapping[int, bytes]) -> bytes:
    """The records' part of the static data, whether or not the file has the AIP behind it (Book 3, 10.3)."""
    aip = card.get(Tag.AIP, b"")
    named = card.get(Tag.STATIC_DATA_TAG_LIST) == bytes((Tag.AIP,))
    return static_data.removesuffix(aip) if named else static_data


def find(file: formats.RiskFile) -> dict[str, Any]:
    """One step before terminal action analysis, or that analysis (Book 3, 10.4 to 10.7). Raises `UnusableFile`."""
    try:
        found = _find(file)
    except ConfigurationError as error:
        raise UnusableFile(f"{error}. Nothing was checked; correct the file.") from error
    except CardFault as fault:
        raise UnusableFile(
            "card: a data object has a length or form that it cannot have; nothing was checked."
        ) from fault
    tvr = Tvr.decode(bytes.fromhex(file.tvr)) | found.tvr
    return {
        "tvr": tvr.encode().hex().upper(),
        "tsi": found.tsi.encode().hex().upper(),
        "cvm_results": found.cvm_results.hex().upper() if found.cvm_results is not None else None,
        "decision": found.asked.name if found.asked is not None else None,
    }


class _Found(NamedTuple):
    tvr: Tvr = Tvr.NONE
    tsi: Tsi = Tsi.NONE
    cvm_results: bytes | None = None
    asked: AcType | None = None


def _find(file: formats.RiskFile) -> _Found:
    """Raises `ConfigurationError`, `CardFault`, `UnusableFile`."""
    setup = Setup(settings.objects(file.terminal), (), exceptions=settings.exceptions(file.exceptions))
    request = settings.risk_request(file)
    card = CardObjects()
    card.update(settings.objects(file.card))
    check_card_data(card)
    objects = {**card, **setup.terminal, **settings.stated(request)}
    match file.step:
        case "processing_restrictions":
            return _Found(restrictions.check(objects))
        case "cardholder_verification":
            if not objects.keys() & {Tag.AIP, Tag.CVM_LIST}:
                raise UnusableFile("card: without 82 or 8E there is no cardholder verification to speak of; add them.")
            objects.setdefault(Tag.AIP, _VERIFIES)
            verification = cardholder.verify(objects)
            performed = Tsi.CVM_PERFORMED if verification.attempted else Tsi.NONE
            return _Found(verification.tvr, performed, verification.results)
        case "risk_management":
            return _Found(_manage(file, setup, request, card), Tsi.TERMINAL_RISK_MANAGEMENT_PERFORMED)
        case "action_analysis":
            codes, reach = ActionCodes.of(objects), _reach(setup)
            return _Found(asked=decision.first(Tvr.decode(bytes.fromhex(file.tvr)), codes, reach))


def _manage(file: formats.RiskFile, setup: Setup, request: Request, card: CardObjects) -> Tvr:
    """Terminal risk management, with the card of the list (Book 3, 10.6). Raises as `_find`."""
    environment = Environment(
        unpredictable_number=settings.in_order(()),
        notify=lambda _: None,
        random_percent=settings.random_percent(file.random),
        earlier_minor=settings.earlier_minor(file.log),
    )
    limits = settings.limits(file.limits)
    floor = limits.terminal_floor
    if floor is None and Tag.TERMINAL_FLOOR_LIMIT in setup.terminal:
        floor = int.from_bytes(setup.terminal[Tag.TERMINAL_FLOOR_LIMIT], "big")
    counters = ScriptedCard(file.exchanges, in_order=False)
    found, _ = counters.pump(
        counters.line().carry(
            risk.manage(
                setup,
                request,
                environment,
                card,
                pan=_pan(card),
                floor_minor=floor,
                selection=limits.random,
                reach=_reach(setup),
            )
        )
    )
    return found


def _pan(card: Mapping[int, bytes]) -> Pan:
    """Of 5A, or of track 2 where there is no 5A."""
    track = card.get(Tag.PAN) or card.get(Tag.TRACK_2_EQUIVALENT, b"")
    return Pan(track.hex().upper().partition("D")[0].rstrip("F"))


def _reach(setup: Setup) -> Reach:
    return Reach.of(setup.terminal.get(Tag.TERMINAL_TYPE, b""))

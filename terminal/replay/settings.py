"""From a file to what a kernel is run with: terminal, applications, trust, the transaction, and what chance says.

What the kernels' own types refuse (a tag of the wrong length, an impossible random selection) is a file that cannot be
used. Only a CA public key whose checksum is wrong is left out instead: a terminal has no such key, and says so.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from terminal.emv import tlv
from terminal.emv.authentication import CaKey, CaKeyError, CaKeys, RevokedCertificate
from terminal.emv.configuration import (
    CONTACT,
    Combination,
    ConfigurationError,
    ExceptionEntry,
    Limits,
    RandomSelection,
    Request,
    Setup,
    bcd,
)
from terminal.emv.outcome import IssuerAnswer, Pan
from terminal.emv.selection import default_kernel
from terminal.emv.tags import Tag
from terminal.money import Amount, Currency
from terminal.replay import formats
from terminal.replay.formats import UnusableFile

NO_NUMBER: Final = bytes(4)  # in place of an unpredictable number that a file does not have
NEVER_SELECTED: Final = 100  # above every percentage
_NO_DATE: Final = datetime.date(2000, 1, 1)
_BEFORE_ANY_DATE: Final = frozenset({"candidate_list", "selection", "initiation", "records"})
_EXPONENT: Final = 2  # of a currency, if 5F36 does not say


class _FileAmount(Amount):
    """An amount of a file: 12 digits, as the card is told, where a sale of this terminal has fewer."""

    def __post_init__(self) -> None:
        """The file's format is its limit."""


def objects(stated: formats.Objects) -> dict[int, bytes]:
    """Data objects by tag."""
    return {int(tag, 16): bytes.fromhex(value) for tag, value in stated.items()}


def moment(clock: str | None) -> datetime.datetime | None:
    """The file's clock. Raises `UnusableFile`."""
    if clock is None:
        return None
    try:
        return datetime.datetime.fromisoformat(clock)
    except ValueError as error:
        raise UnusableFile(
            f"clock: no such date and time; nothing was run. Write it as 2026-03-14T15:09:26 ({error})."
        ) from error


def date_of(value: bytes, where: str) -> datetime.date:
    """A date YYMMDD, as 9A has it. Raises `UnusableFile`."""
    try:
        year = int(value.hex()[:2])
        return datetime.date(year + (1900 if year >= 50 else 2000), int(value.hex()[2:4]), int(value.hex()[4:6]))
    except ValueError as error:
        raise UnusableFile(f"{where}: no such date; nothing was run. Write it as YYMMDD.") from error


def replay_request(file: formats.ReplayFile) -> Request:
    """The transaction of a replay file. Raises `UnusableFile`."""
    return _request(
        objects(file.transaction), objects(file.terminal), moment(file.clock), file.until in _BEFORE_ANY_DATE
    )


def risk_request(file: formats.RiskFile) -> Request:
    """The transaction of a risk file. Raises `UnusableFile`."""
    return _request(objects(file.transaction), objects(file.terminal), None, file.step != "processing_restrictions")


def stated(request: Request) -> dict[int, bytes]:
    """What a transaction says of itself, with zeros for what every step expects to be there."""
    return {
        int(Tag.AMOUNT_AUTHORISED): bcd(request.amount.minor, 6),
        int(Tag.AMOUNT_OTHER): bcd(request.amount_other_minor, 6),
        int(Tag.TRANSACTION_CURRENCY_CODE): bcd(request.amount.currency.number, 2),
        int(Tag.TRANSACTION_TYPE): bytes((request.transaction_type,)),
        **request.objects,
    }


def _request(
    transaction: Mapping[int, bytes], terminal: Mapping[int, bytes], now: datetime.datetime | None, any_date: bool
) -> Request:
    if Tag.TRANSACTION_DATE in transaction:
        date = date_of(transaction[Tag.TRANSACTION_DATE], "transaction, 9A")
    elif now is not None:
        date = now.date()
    elif any_date:
        date = _NO_DATE
    else:
        raise UnusableFile("neither 9A of the transaction nor a clock says when it is; nothing was run. Add one.")
    known = {**terminal, **transaction}
    exponent = _number(known.get(Tag.TRANSACTION_CURRENCY_EXPONENT), _EXPONENT)
    number = _number(known.get(Tag.TRANSACTION_CURRENCY_CODE)) % 10_000
    try:
        return Request(
            amount=_FileAmount(
                _number(transaction.get(Tag.AMOUNT_AUTHORISED)), Currency(f"{number:03d}", number, exponent)
            ),
            date=date,
            time=now.time() if now is not None else datetime.time(),
            transaction_type=(transaction.get(Tag.TRANSACTION_TYPE) or b"\x00")[0],
            amount_other_minor=_number(transaction.get(Tag.AMOUNT_OTHER)),
            objects=transaction,
            certificates_on=now.date() if now is not None else None,
        )
    except ConfigurationError as error:
        raise UnusableFile(f"{error}. Nothing was run; correct the file.") from error


def _number(value: bytes | None, absent: int = 0) -> int:
    """A number in format n."""
    if not value:
        return absent
    if not value.hex().isdecimal():
        raise UnusableFile("transaction: an amount or a code must be decimal digits; nothing was run. Correct it.")
    return int(value.hex())


def setup(file: formats.ReplayFile) -> Setup:
    """The terminal. Raises `UnusableFile`."""
    contactless = file.interface == "contactless"
    try:
        return Setup(
            terminal=objects(file.terminal),
            combinations=tuple(_combination(each, contactless=contactless) for each in file.aids),
            ca_keys=ca_keys(file.capks),
            revoked=revoked(file.revoked),
            exceptions=exceptions(file.exceptions),
        )
    except ConfigurationError as error:
        raise UnusableFile(f"{error}. Nothing was run; correct the file.") from error


def _combination(application: formats.Application, *, contactless: bool) -> Combination:
    aid = bytes.fromhex(application.aid)
    kernel = int(application.kernel, 16) if application.kernel is not None else CONTACT
    if kernel == CONTACT and contactless:
        kernel = default_kernel(aid)
    return Combination(
        aid=aid,
        kernel=kernel,
        limits=limits(application.limits),
        tags=objects(application.tags),
        partial=application.partial,
    )


def limits(stated: formats.Limits) -> Limits:
    """Raises `ConfigurationError`."""
    return Limits(
        status_check=bool(stated.status_check),
        zero_amount_allowed=stated.zero_amount_allowed,
        contactless_transaction=stated.contactless_transaction,
        contactless_floor=stated.contactless_floor,
        terminal_floor=stated.terminal_floor,
        cvm_required=stated.cvm_required,
        ttq=bytes.fromhex(stated.ttq) if stated.ttq is not None else None,
        extended_selection=bool(stated.extended_selection),
        transaction_types=(
            frozenset(int(each, 16) for each in stated.transaction_types)
            if stated.transaction_types is not None
            else None
        ),
        random=(
            RandomSelection(
                threshold=stated.random.threshold,
                target_percent=stated.random.target_percent,
                max_target_percent=stated.random.max_target_percent,
            )
            if stated.random is not None
            else None
        ),
    )


def ca_keys(stated: Iterable[formats.CaPublicKey]) -> CaKeys:
    """The keys whose checksum is right. Raises `UnusableFile` for two different keys of one name."""
    found = []
    for each in stated:
        key = CaKey(
            rid=bytes.fromhex(each.rid),
            index=int(each.index, 16),
            modulus=bytes.fromhex(each.modulus),
            exponent=bytes.fromhex(each.exponent),
        )
        if each.checksum is None or bytes.fromhex(each.checksum) == key.computed_checksum():
            found.append(key)
    try:
        return CaKeys(found)
    except CaKeyError as error:
        raise UnusableFile(f"capks: {error}. Nothing was run.") from error


def revoked(stated: Iterable[formats.Revoked]) -> frozenset[RevokedCertificate]:
    return frozenset(
        RevokedCertificate(bytes.fromhex(each.rid), int(each.index, 16), bytes.fromhex(each.serial)) for each in stated
    )


def exceptions(stated: Iterable[formats.ExceptionCard]) -> frozenset[ExceptionEntry]:
    return frozenset(
        ExceptionEntry(Pan(each.pan.rstrip("F")), None if each.psn is None else int(each.psn)) for each in stated
    )


def earlier_minor(log: Sequence[formats.LogEntry]) -> Callable[[Pan, bytes], int]:
    """What a card paid here last: a sale may be split to stay below the floor limit (Book 3, 10.6.1).

    An entry is the card's if PAN and sequence number agree, the number as far as both state one. The latest date
    counts, of one day the entry that stands last.
    """

    def latest(pan: Pan, psn: bytes) -> int:
        digits = psn.hex()
        number = int(digits) if digits.isdecimal() else None
        best: formats.LogEntry | None = None
        for entry in log:
            same = entry.pan.rstrip("F") == pan.digits
            if not same or (entry.psn is not None and number is not None and int(entry.psn) != number):
                continue
            if best is None or _full(entry.date) >= _full(best.date):
                best = entry
        return best.amount if best is not None else 0

    return latest


def _full(date: str) -> tuple[bool, str]:
    """For comparing: years from 50 are of the last century (Book 4, 6.7.3)."""
    return date[:2] < "50", date


def in_order(numbers: Sequence[str]) -> Callable[[], bytes]:
    """Unpredictable numbers, one a call. The last one stays, for whoever counts one a transaction and not one an
    application, and zeros stand in for none: a replay compares, it protects nothing.
    """
    left = [bytes.fromhex(number) for number in numbers] or [NO_NUMBER]
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def random_percent(numbers: Sequence[int] | None) -> Callable[[], int] | None:
    """Numbers for random selection; after the last nothing is selected any more."""
    if numbers is None:
        return None
    left = iter(numbers)
    return lambda: next(left, NEVER_SELECTED)


def issuer_answer(host: formats.Host) -> IssuerAnswer:
    return IssuerAnswer(
        response_code=bytes.fromhex(host.response_code),
        authentication_data=bytes.fromhex(host.authentication_data) if host.authentication_data is not None else None,
        scripts_before=tuple(_contents(each, 0x71) for each in host.scripts_before or ()),
        scripts_after=tuple(_contents(each, 0x72) for each in host.scripts_after or ()),
    )


def _contents(script: str, tag: int) -> bytes:
    """A script is stated as a value; a whole data object is understood, too: no script begins with its own tag."""
    value = bytes.fromhex(script)
    try:
        return tlv.parse_one(value, tag).value
    except tlv.TlvError:
        return value

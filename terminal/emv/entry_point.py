"""Entry point: everything between the request and a kernel, and between its outcome and the reader (Book B).

    Start A  pre-processing      which combinations the limits leave, and with which TTQ      `preprocess`
    Start B  protocol activation the caller's: field, polling, collisions, "present card"
    Start C  selection           PPSE, candidate list, SELECT of the best candidate           `run`
    Start D  kernel activation   the selected kernel decides                                  `run`

`run` begins with a card in the field and ends with an outcome that is the reader's business. Select Next stays inside:
it drops the candidate and tries the next. Try Again goes to the caller, who resets the field, polls, and runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, TypeAlias

from terminal.emv import dol, kernel2, kernel3, selection
from terminal.emv.apdu import CardRemoved, Exchange, transceive
from terminal.emv.configuration import CONTACT, Activation, Combination, Environment, Indicators, Request, Setup
from terminal.emv.outcome import (
    EndApplication,
    MessageId,
    Outcome,
    SelectNext,
    Status,
    TryAgain,
    TryAnotherInterface,
    UiRequest,
)
from terminal.emv.progress import Listed
from terminal.emv.selection import ANY_KERNEL, DirectoryEntry
from terminal.emv.tags import Kernel3Tag, Tag
from terminal.emv.tlv import TlvError

Kernel: TypeAlias = Callable[[Setup, Request, Environment, Activation], Exchange[Outcome]]

KERNELS: Final[Mapping[int, Kernel]] = MappingProxyType({2: kernel2.run, 3: kernel3.run})

_VISA_RID: Final = bytes.fromhex("A000000003")
_OFFLINE_ONLY: Final = 0x08  # TTQ byte 1 bit 4
_ONLINE_CRYPTOGRAM_REQUIRED: Final = 0x80  # TTQ byte 2 bit 8
_CVM_REQUIRED: Final = 0x40  # TTQ byte 2 bit 7
_READY_FOR_OTHER_CARD: Final = UiRequest(MessageId.OTHER_CARD, Status.READY_TO_READ)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A combination after pre-processing: what was found, and the TTQ to use with it."""

    combination: Combination
    indicators: Indicators
    ttq: bytes | None


@dataclass(frozen=True, slots=True)
class _Candidate:
    entry: DirectoryEntry
    prepared: Prepared

    def listed(self) -> Listed:
        entry = self.entry
        return Listed(entry.adf_name, entry.label, entry.priority, entry.confirm, self.prepared.combination.kernel)


def preprocess(setup: Setup, request: Request) -> tuple[Prepared, ...] | TryAnotherInterface:
    """Start A: what the limits leave of the terminal's combinations (Book B, 3.1.1).

    Needs no card, so it can refuse before one is asked for: Try Another Interface when nothing is left.
    """
    prepared = tuple(
        _prepare(combination, request)
        for combination in setup.combinations
        if combination.kernel != CONTACT
        and (
            combination.limits.transaction_types is None
            or request.transaction_type in combination.limits.transaction_types
        )
    )
    allowed = tuple(each for each in prepared if not each.indicators.contactless_not_allowed)
    if allowed:
        return allowed
    over_limit = any(each.indicators.transaction_exceeded for each in prepared)
    return TryAnotherInterface("amount_over_limit" if over_limit else "not_allowed")


def _prepare(combination: Combination, request: Request) -> Prepared:
    limits, amount = combination.limits, request.amount.minor
    ttq = bytearray(combination.ttq or b"")
    zero = amount == 0
    single_unit: int = 10**request.amount.currency.exponent
    floor = limits.contactless_floor if limits.contactless_floor is not None else limits.terminal_floor
    found = Indicators(
        status_check_requested=limits.status_check and amount == single_unit,
        zero_amount=zero and limits.zero_amount_allowed is not False,
        transaction_exceeded=_reaches(amount, limits.contactless_transaction),
        floor_exceeded=floor is not None and amount > floor,
        cvm_required_exceeded=_reaches(amount, limits.cvm_required),
    )
    not_allowed = found.transaction_exceeded or (zero and not found.zero_amount)
    if ttq:
        ttq[1] &= ~(_ONLINE_CRYPTOGRAM_REQUIRED | _CVM_REQUIRED) & 0xFF
        if found.floor_exceeded or found.status_check_requested:
            ttq[1] |= _ONLINE_CRYPTOGRAM_REQUIRED
        if found.zero_amount:
            if ttq[0] & _OFFLINE_ONLY:
                not_allowed = True  # nothing to sell, and no host to ask about the card
            else:
                ttq[1] |= _ONLINE_CRYPTOGRAM_REQUIRED
        if found.cvm_required_exceeded:
            ttq[1] |= _CVM_REQUIRED
    return Prepared(combination, replace(found, contactless_not_allowed=not_allowed), bytes(ttq) or None)


def _reaches(amount: int, limit: int | None) -> bool:
    return limit is not None and amount >= limit


def run(
    setup: Setup, request: Request, environment: Environment, kernels: Mapping[int, Kernel] = KERNELS
) -> Exchange[Outcome]:
    """Starts A, C and D with the card that is in the field. Never returns `SelectNext`.

    Raises nothing that a card could cause; `ConfigurationError` when `environment` gives a bad unpredictable number.
    """
    prepared = preprocess(setup, request)
    if isinstance(prepared, TryAnotherInterface):
        return prepared
    available = tuple(each for each in prepared if each.combination.kernel in kernels)
    try:
        response = yield from transceive(selection.select(selection.PPSE))
        try:
            entries = selection.directory(response.data) if response.sw == 0x9000 else ()
        except TlvError:
            return EndApplication("parse_error", _READY_FOR_OTHER_CARD)
        candidates = _candidates(available, entries)
        environment.watch.candidates([candidate.listed() for candidate in candidates])
        # Each round drops a candidate: at most DIRECTORY_ENTRIES_MAX times the number of combinations.
        for candidate in candidates:
            activation = yield from _activate(candidate, available)
            if activation is None:
                continue
            outcome = yield from kernels[activation.combination.kernel](setup, request, environment, activation)
            if not isinstance(outcome, SelectNext):
                return outcome
    except CardRemoved:
        return TryAgain("card_lost")  # lost during selection: back to Start B, no application was asked anything yet
    return EndApplication("no_common_application", _READY_FOR_OTHER_CARD)


def _candidates(available: tuple[Prepared, ...], entries: tuple[DirectoryEntry, ...]) -> list[_Candidate]:
    """The candidate list in the order to be tried: by priority, then as in the PPSE (Book B, 3.3.2 and 3.3.3)."""
    candidates = [
        _Candidate(entry, prepared)
        for entry in entries
        for prepared in available
        if entry.adf_name.startswith(prepared.combination.aid)
        and entry.requested_kernel() in {ANY_KERNEL, prepared.combination.kernel}
    ]
    return sorted(candidates, key=lambda candidate: candidate.entry.rank)


def _activate(candidate: _Candidate, available: tuple[Prepared, ...]) -> Exchange[Activation | None]:
    """Final combination selection (Book B, 3.3.3): select the candidate; None drops it."""
    entry, prepared = candidate.entry, candidate.prepared
    response = yield from transceive(entry.select(prepared.combination.limits.extended_selection))
    if response.sw != 0x9000:
        return None
    aid = prepared.combination.aid
    if aid.startswith(_VISA_RID) and prepared.combination.kernel == 3 and not _asks_for_ttq(response.data):
        older = next((it for it in available if (it.combination.aid, it.combination.kernel) == (aid, 1)), None)
        if older is None:
            return None
        prepared = older
    return Activation(
        prepared.combination, prepared.indicators, prepared.ttq, entry.adf_name, entry.label, response.data
    )


def _asks_for_ttq(fci: bytes) -> bool:
    """Whether the PDOL has the TTQ: a Visa card without is older than kernel 3.

    An FCI that cannot be read passes: the kernel reads it again and says so.
    """
    try:
        pdol = next((node.value for node in selection.application(fci) if node.tag == Tag.PDOL), b"")
        return any(entry.tag == Kernel3Tag.TTQ for entry in dol.entries(pdol))
    except TlvError:
        return True

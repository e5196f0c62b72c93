"""Holding the ledger against the host's books: the terminal's half (docs/reconciliation.md).

Only the terminal has the ledger and the signing key, only sync has a network. So the terminal makes a signed question
about a range of transactions, sync carries it to the host and the signed answer back, and here both are compared: by
one digest over the range while they agree, else by halves until the host names single transactions. What the ledger
cannot know yet, because an answer is on its way, is no difference.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from terminal.clock import Clock, Entropy
from terminal.control import Call, CallRefused, Role
from terminal.ledger.errors import AnswerRejected
from terminal.ledger.ledger import Ledger
from terminal.ledger.sealing import Entry, Envelopes, digest, verify_reconciliation
from terminal.ledger.states import SOLD, State
from terminal.ledger.values import Kind, Standing
from terminal.records import said

RANGE_MAX: Final = 2_000  # transactions in one question: some seconds of decrypting on a small Pi, within a call's time
QUESTIONS_MAX: Final = 1_024  # unanswered; older ones are forgotten, and their answers refused
STANDINGS_MAX: Final = 100  # in one answer: it stays within one line of the socket
_DAY_MS: Final = 86_400_000
_PAGE: Final = 200  # under one holding of the ledger's lock: a sale may come at any time

_SYNC: Final = frozenset({Role.SYNC})
_Number = Annotated[int, msgspec.Meta(ge=1)]
_BOOKED, _DECLINED, _REVERSED, _TOMBSTONE = "booked", "declined", "reversed", "tombstone"

_MUST: Final[Mapping[State, frozenset[str]]] = {
    State.APPROVED: frozenset({_BOOKED}),
    State.SETTLED: frozenset({_BOOKED}),
    State.COMPLETING: frozenset({_BOOKED}),
    State.DECLINED: frozenset({_DECLINED}),
    State.REFUSED: frozenset({_DECLINED}),
    # Of what was declined before, a reversal leaves a decline.
    State.REVERSED: frozenset({_REVERSED, _TOMBSTONE, _DECLINED}),
}
"""How a transaction stands at the host once it has answered the last envelope about it."""


class _Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Begin(_Arguments, frozen=True):
    first: _Number | None = None
    last: _Number | None = None
    days: Annotated[int, msgspec.Meta(ge=1, le=3660)] | None = None


class Compare(_Arguments, frozen=True):
    id: UUID
    answer: Annotated[str, msgspec.Meta(max_length=16_384)]


class Ended(_Arguments, frozen=True):
    first: int
    last: int
    compared: int
    differences: int
    under_way: int


class Standings(_Arguments, frozen=True):
    first: _Number
    limit: Annotated[int, msgspec.Meta(ge=1, le=STANDINGS_MAX)] = STANDINGS_MAX


@dataclass(frozen=True, slots=True)
class _Question:
    first: int
    last: int
    sha256: str


class Reconciling:
    """The handlers, bound to one open ledger."""

    def __init__(
        self, ledger: Ledger, envelopes: Envelopes, answer_key: Ed25519PublicKey, clock: Clock, entropy: Entropy
    ) -> None:
        self._ledger = ledger
        self._envelopes = envelopes
        self._answer_key = answer_key
        self._clock = clock
        self._entropy = entropy
        self._asked: OrderedDict[UUID, _Question] = OrderedDict()

    def calls(self) -> Mapping[str, Call]:
        return {
            "reconcile.begin": Call(Begin, said(self._begin), _SYNC),
            "reconcile.compare": Call(Compare, said(self._compare), _SYNC),
            "reconcile.ended": Call(Ended, said(self._ended), _SYNC),
            "reconcile.standings": Call(Standings, said(self._said_standings), _SYNC),
        }

    def _begin(self, arguments: Begin) -> dict[str, Any]:
        """Questions about a range: what was asked for, as far as this epoch has it."""
        oldest, newest = self._ledger.first_number(), self._ledger.last_number()
        first = arguments.first or oldest
        if arguments.days is not None:
            first = max(first, self._ledger.number_at(self._clock.wall_ms() - arguments.days * _DAY_MS))
        first, last = max(first, oldest), min(arguments.last or newest, newest)
        starts = range(first, last + 1, RANGE_MAX)
        return {
            "first": first,
            "last": last,
            "questions": [self._question(start, min(start + RANGE_MAX - 1, last)) for start in starts],
        }

    def _compare(self, arguments: Compare) -> dict[str, Any]:
        """Differences; or, where the host has not named single transactions, the questions about both halves."""
        asked = self._asked.get(arguments.id)
        if asked is None:
            raise CallRefused("no_such_question", "this was not asked, or too long ago: begin again")
        try:
            answer = verify_reconciliation(
                arguments.answer,
                self._answer_key,
                id_=arguments.id,
                terminal=self._envelopes.terminal,
                first=asked.first,
                last=asked.last,
                envelope=asked.sha256,
            )
        except AnswerRejected as error:
            raise CallRefused("answer_rejected", str(error)) from error
        del self._asked[arguments.id]
        ours = list(self._standings(asked.first, asked.last))
        if answer.digest == digest_of(ours):
            return _result(compared=len(ours), under_way=[_on_its_way(one) for one in ours if may_stand(one) is None])
        if answer.entries is None:
            if asked.first == asked.last:
                raise CallRefused("answer_rejected", "the host does not say what it holds of a single transaction")
            middle = (asked.first + asked.last) // 2
            halves = [self._question(asked.first, middle), self._question(middle + 1, asked.last)]
            return _result(questions=halves)
        return _result(compared=len(ours), **compare(ours, answer.entries))

    def _said_standings(self, arguments: Standings) -> dict[str, Any]:
        """Transactions from a number on, as they stand: nothing of the card, and no reference."""
        newest = self._ledger.last_number()
        found = self._ledger.booking_states(arguments.first, newest, arguments.limit)
        opened = self._ledger.transaction(found[0].id) if found else None
        believed = opened is not None and (opened.clock_synchronised or opened.corrected)
        return {
            "standings": [
                {
                    "number": one.number,
                    "id": str(one.id),
                    "of": None if one.of is None else str(one.of),
                    "amount_minor": one.amount.minor,
                    "currency": one.amount.currency.code,
                    "state": one.state.value,
                    "sent": one.sent,
                    "answered": one.answered,
                }
                for one in found
            ],
            "opened_at_ms": opened.opened_at_ms if opened is not None and believed else None,
            "next": found[-1].number + 1 if found and found[-1].number < newest else None,
        }

    def _ended(self, arguments: Ended) -> dict[str, Any]:
        self._ledger.note("reconciled", **msgspec.to_builtins(arguments))
        return {}

    def _question(self, first: int, last: int) -> dict[str, Any]:
        id_ = UUID(bytes=self._entropy(16), version=4)
        jws = self._envelopes.reconciliation(id_, first=first, last=last, asked_at_ms=self._clock.wall_ms())
        self._asked[id_] = _Question(first, last, digest(jws))
        if len(self._asked) > QUESTIONS_MAX:
            self._asked.popitem(last=False)
        return {"id": str(id_), "envelope": jws, "first": first, "last": last}

    def _standings(self, first: int, last: int) -> Iterable[Standing]:
        while first <= last and (page := self._ledger.booking_states(first, last, _PAGE)):
            yield from page
            first = page[-1].number + 1


def may_stand(one: Standing) -> frozenset[str] | None:
    """How the host may hold it; empty: not at all. None: an answer is on its way, so nobody can say."""
    if not one.sent:
        return frozenset()
    return _MUST.get(one.state) if one.answered else None


def digest_of(ours: Iterable[Standing]) -> str:
    """The host's digest, if it holds what this ledger takes for likely. Another one says only that it must be asked."""
    lines = hashlib.sha256()
    for one in ours:
        allowed = may_stand(one)
        state = _REVERSED if one.state is State.REVERSED else next(iter(allowed or ()), None)
        if state is not None:
            lines.update(f"{one.number} {one.id} {state} {_signed(one)} {one.amount.currency.code}\n".encode())
    return lines.hexdigest()


def compare(ours: Iterable[Standing], theirs: Iterable[Entry]) -> dict[str, list[dict[str, Any]]]:
    """Single transactions: what differs, and what is on its way."""
    held = {entry.sequence: entry for entry in theirs}
    differences: list[dict[str, Any]] = []
    under_way: list[dict[str, Any]] = []
    for one in ours:
        entry = held.pop(one.number, None)
        allowed = may_stand(one)
        if entry is not None and not _is_same(one, entry):
            differences.append(_difference(one, entry, "the books name another transaction or amount here", _PERSON))
        elif allowed is None:
            under_way.append(_on_its_way(one))
        elif (entry is None) != (not allowed) or (entry is not None and entry.state not in allowed):
            differences.append(_difference(one, entry, *_meaning(one, entry)))
    for entry in held.values():
        differences.append(
            _difference(
                None,
                entry,
                "the host has it, this ledger does not: it was forgotten here in time, or the ledger was put back",
                "compare the date; if it is a recent one, stop selling and find out what happened to the storage",
            )
        )
    return {"differences": sorted(differences, key=lambda each: each["sequence"]), "under_way": under_way}


_PERSON: Final = "show both entries to the host's operator; this ledger is the one that is signed and chained"


def _meaning(one: Standing, entry: Entry | None) -> tuple[str, str]:
    """What a difference means for the money, and what to do."""
    is_here = one.state in SOLD or one.state is State.COMPLETING
    is_there = entry is not None and entry.state == _BOOKED
    what = "paid back" if one.kind is Kind.REFUND else "sold"
    if is_here and not is_there:
        return (
            f"{what} here, and not at the host: the money is not booked",
            "have it sent again: payterm reconcile --repair",
        )
    if is_there and not is_here:
        return (
            f"{what} at the host, and {one.state.value} here: the customer's account says otherwise than yours",
            _PERSON,
        )
    return "another word for it, and no money in it on either side", "nothing has to be done"


def _on_its_way(one: Standing) -> dict[str, Any]:
    return {"sequence": one.number, "transaction": str(one.id), "state": one.state.value}


def _is_same(one: Standing, entry: Entry) -> bool:
    ours = one.id, _signed(one), one.amount.currency.code
    return ours == (entry.transaction, entry.amount, entry.currency)


def _signed(one: Standing) -> int:
    return -one.amount.minor if one.kind is Kind.REFUND else one.amount.minor


def _difference(one: Standing | None, entry: Entry | None, meaning: str, remedy: str) -> dict[str, Any]:
    numbers = [each for each in (one and one.number, entry and entry.sequence) if each]
    ids = [each for each in (one and one.id, entry and entry.transaction) if each]
    return {
        "sequence": numbers[0],
        "transaction": str(ids[0]),
        "ours": None
        if one is None
        else {"state": one.state.value, "amount_minor": _signed(one), "currency": one.amount.currency.code},
        "theirs": None
        if entry is None
        else {"state": entry.state, "amount_minor": entry.amount, "currency": entry.currency},
        "meaning": meaning,
        "remedy": remedy,
    }


def _result(
    *,
    compared: int = 0,
    questions: list[dict[str, Any]] | None = None,
    differences: list[dict[str, Any]] | None = None,
    under_way: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    return {
        "compared": compared,
        "questions": questions or [],
        "differences": differences or [],
        "under_way": under_way or [],
    }

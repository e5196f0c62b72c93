"""What the terminal answers on its local socket: the table of calls (docs/formats.md, Local socket)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from terminal import VERSION
from terminal.config import Config
from terminal.control import Call, CallRefused, Role
from terminal.desk import Desk, DeskBusy
from terminal.ledger.errors import AnswerRejected, LedgerError, NoSuchTransaction
from terminal.ledger.ledger import Ledger
from terminal.ledger.sealing import verify_answer
from terminal.ledger.states import State
from terminal.ledger.values import Transaction
from terminal.link import Link
from terminal.money import Amount, MoneyError, currency
from terminal.payment import Payments, SaleRefused

ITEMS_MAX: Final = 16  # with envelopes of 2 to 3 KB a fetch stays within one line of the socket
_WAIT_MS_MAX: Final = 60_000
_LIST_MAX: Final = 100  # transactions in one answer, for the same reason

_log = logging.getLogger(__name__)
_Wait = Annotated[int, msgspec.Meta(ge=0, le=_WAIT_MS_MAX)]


class _Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Nothing(_Arguments, frozen=True):
    pass


class Fetch(_Arguments, frozen=True):
    max: Annotated[int, msgspec.Meta(ge=1, le=ITEMS_MAX)] = ITEMS_MAX
    wait_ms: _Wait = 0


class Stored(_Arguments, frozen=True):
    keys: Annotated[list[str], msgspec.Meta(max_length=ITEMS_MAX)]


class Deliver(_Arguments, frozen=True):
    key: str
    answer: Annotated[str, msgspec.Meta(max_length=16_384)]


class Report(_Arguments, frozen=True):
    online: bool
    error: str | None = None
    queued: int = 0
    held: int = 0
    oldest_ms: int | None = None


class Start(_Arguments, frozen=True):
    amount: Annotated[int, msgspec.Meta(ge=0)]
    currency: str
    reference: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] | None = None


class Result(_Arguments, frozen=True):
    transaction: UUID | None = None
    reference: str | None = None
    wait_ms: _Wait = 0


class Cancel(_Arguments, frozen=True):
    transaction: UUID


class Resolve(_Arguments, frozen=True):
    transaction: UUID
    keep: bool


class List(_Arguments, frozen=True):
    limit: Annotated[int, msgspec.Meta(ge=1, le=_LIST_MAX)] = _LIST_MAX
    before: int | None = None


class Service:
    """The handlers, bound to the running terminal."""

    def __init__(
        self,
        *,
        config: Config,
        ledger: Ledger,
        answer_key: Ed25519PublicKey,
        payments: Payments,
        link: Link,
        desk: Desk,
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._answer_key = answer_key
        self._payments = payments
        self._link = link
        self._desk = desk

    def calls(self) -> Mapping[str, Call]:
        """The table that `ControlServer` serves."""
        sync, register, operator = (frozenset({role}) for role in (Role.SYNC, Role.REGISTER, Role.OPERATOR))
        return {
            "outbox.fetch": Call(Fetch, _said(self._fetch), sync),
            "outbox.stored": Call(Stored, _said(self._stored), sync),
            "answer.deliver": Call(Deliver, _said(self._deliver), sync),
            "link.report": Call(Report, _said(self._report), sync),
            "sale.start": Call(Start, _said(self._start), register | operator),
            "sale.result": Call(Result, _said(self._result), register | operator),
            "sale.cancel": Call(Cancel, _said(self._cancel), register | operator),
            "attention.resolve": Call(Resolve, _said(self._resolve), register | operator),
            "ledger.list": Call(List, _said(self._list), operator),
            "status": Call(Nothing, _said(self._status)),
        }

    def _fetch(self, arguments: Fetch) -> dict[str, Any]:
        self._link.heard()
        self._link.wait_for_outbox(lambda: bool(self._ledger.outbox(1)), timeout_ms=arguments.wait_ms)
        self._link.heard()
        return {
            "items": [
                {
                    "key": item.key,
                    "transaction": str(item.transaction),
                    "event": item.event,
                    "number": item.number,
                    "urgent": item.urgent,
                    "envelope": item.envelope,
                }
                for item in self._ledger.outbox(arguments.max)
            ]
        }

    def _stored(self, arguments: Stored) -> dict[str, Any]:
        self._link.heard()
        self._ledger.mark_handed_over(arguments.keys)
        return {}

    def _deliver(self, arguments: Deliver) -> dict[str, Any]:
        """Believe an answer only if the host signed it for exactly what was sent; then commit it."""
        self._link.heard()
        item = self._ledger.outbox_item(arguments.key)
        try:
            answer = verify_answer(
                arguments.answer,
                self._answer_key,
                transaction=self._ledger.transaction(item.transaction),
                event=item.event,
                terminal=self._config.terminal.id,
                envelope=item.sha256,
            )
        except AnswerRejected as rejected:
            self._ledger.note("answer_rejected", key=arguments.key, reason=str(rejected))
            _log.error("answer for %s not believed: %s", arguments.key, rejected)
            raise CallRefused("answer_rejected", str(rejected)) from rejected
        self._payments.answered(answer)
        decided = self._ledger.commit_answer(item.transaction, item.event, answer, arguments.answer)
        self._link.answered()
        return {"state": decided.state.value}

    def _report(self, arguments: Report) -> dict[str, Any]:
        before = self._link.state()
        self._link.report(online=arguments.online, error=arguments.error, queued=arguments.queued)
        if before.online != arguments.online:
            self._ledger.note("link", online=arguments.online, error=arguments.error)
            if arguments.online:
                _log.info("the host answers")
            else:
                _log.warning("no way to the host: %s", arguments.error)
        return {}

    def _start(self, arguments: Start) -> dict[str, Any]:
        try:
            amount = Amount(arguments.amount, currency(arguments.currency))
        except MoneyError as error:
            raise CallRefused("amount", str(error)) from error
        known = self._ledger.by_reference(arguments.reference) if arguments.reference else None
        if known is None and self._desk.busy:
            raise DeskBusy("another sale is being taken: finish or cancel it first; nothing was charged")
        transaction = self._payments.begin(amount, arguments.reference)
        undecided = transaction.state in (State.OPENED, State.AUTHORISING, State.COMPLETING)
        if undecided:
            try:
                self._desk.lay(transaction)
            except DeskBusy:
                if transaction.state is State.OPENED:
                    self._payments.void(transaction, "busy")  # or it would hold its part of the limits for nothing
                raise
        return {**view(transaction), "decided": not undecided}

    def _result(self, arguments: Result) -> dict[str, Any]:
        transaction = self._find(arguments)
        decided = self._desk.wait_until_decided(transaction.id, arguments.wait_ms)
        return {**view(self._ledger.transaction(transaction.id)), "decided": decided}

    def _find(self, arguments: Result) -> Transaction:
        if arguments.transaction is not None:
            return self._ledger.transaction(arguments.transaction)
        found = self._ledger.by_reference(arguments.reference) if arguments.reference else None
        if found is None:
            raise CallRefused("no_such_sale", "no sale with this transaction or reference is known here")
        return found

    def _cancel(self, arguments: Cancel) -> dict[str, Any]:
        return {"cancelling": self._desk.cancel(arguments.transaction)}

    def _resolve(self, arguments: Resolve) -> dict[str, Any]:
        unshown = {transaction.id for transaction in self._ledger.unshown()}
        if arguments.transaction not in unshown:
            raise CallRefused("no_such_sale", "this sale does not wait for a decision")
        self._desk.resolve(arguments.transaction, keep=arguments.keep)
        return {}

    def _list(self, arguments: List) -> dict[str, Any]:
        found = self._ledger.transactions(arguments.limit, arguments.before)
        return {"transactions": [view(transaction) for transaction in found]}

    def _status(self, _: Nothing) -> dict[str, Any]:
        link = self._link.state()
        unsent = self._ledger.unsent()
        return {
            "version": VERSION,
            "terminal": self._config.terminal.id,
            "busy": self._desk.busy,
            "unsent": {
                "count": sum(each.count for each in unsent),
                "sums": {each.currency.code: each.sum_minor for each in unsent},
                "oldest_ms": min((each.oldest_wall_ms for each in unsent), default=None),
            },
            "link": {"online": link.online, "sync": link.sync_present, "error": link.error, "queued": link.queued},
            "attention": [view(transaction) for transaction in self._ledger.unshown()],
        }


def view(transaction: Transaction) -> dict[str, Any]:
    """A transaction as commands and register software see it. No card data beyond what a receipt prints."""
    card = transaction.card
    return {
        "id": str(transaction.id),
        "sequence": transaction.number,
        "kind": transaction.kind,
        "state": transaction.state.value,
        "reason": transaction.reason,
        "amount_minor": transaction.amount.minor,
        "currency": transaction.amount.currency.code,
        "reference": transaction.reference,
        "opened_at_ms": transaction.opened_at_ms,
        "scheme": card.scheme if card else None,
        "last4": card.last4 if card else None,
        "authorisation_code": transaction.authorisation_code,
    }


def _said(handler: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """The terminal's own refusals, in the socket's words."""

    def handle(arguments: Any) -> dict[str, Any]:
        try:
            return handler(arguments)
        except SaleRefused as refused:
            raise CallRefused(refused.code, str(refused)) from refused
        except DeskBusy as busy:
            raise CallRefused("busy", str(busy)) from busy
        except NoSuchTransaction as error:
            raise CallRefused("no_such_sale", str(error)) from error
        except LedgerError as error:
            raise CallRefused("ledger", str(error)) from error

    return handle

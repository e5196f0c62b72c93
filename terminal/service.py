"""What the terminal answers on its local socket: the table of calls (docs/formats.md, Local socket)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias
from uuid import UUID

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from terminal import VERSION
from terminal.config import Config
from terminal.control import CALLER, Call, CallRefused, Role
from terminal.days import Days
from terminal.desk import Desk, DeskBusy
from terminal.ledger.errors import AnswerRejected, LedgerError, NoSuchTransaction, NotRefundable, ReferenceTaken
from terminal.ledger.ledger import ANSWERS_MAX, Delivered, Head, Ledger
from terminal.ledger.sealing import verify_answer, verify_batch, verify_countersignature
from terminal.ledger.states import State
from terminal.ledger.values import OF_NO_SALE, Event, Transaction, Verdict
from terminal.link import Link
from terminal.money import Amount, MoneyError, currency
from terminal.payment import Payments, SaleRefused
from terminal.reconciling import Reconciling
from terminal.records import Records, view
from terminal.registration import Registration

ITEMS_MAX: Final = 16  # with envelopes of 2 to 3 KB a fetch stays within one line of the socket
_WAIT_MS_MAX: Final = 60_000

_PUBLIC: Final = frozenset(
    {"id", "sequence", "kind", "state", "amount_minor", "currency", "opened_at_ms", "time_known"}
)

_log = logging.getLogger(__name__)
_Wait = Annotated[int, msgspec.Meta(ge=0, le=_WAIT_MS_MAX)]
_Named: TypeAlias = UUID | Annotated[int, msgspec.Meta(ge=1)]  # by its id, or by its number at this terminal


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


class DeliverMany(_Arguments, frozen=True):
    answers: Annotated[list[Deliver], msgspec.Meta(max_length=ANSWERS_MAX)]


class At(_Arguments, frozen=True):
    """A place in a journal's chain."""

    epoch: Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]
    sequence: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    mac: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Report(_Arguments, frozen=True):
    online: bool
    error: str | None = None
    queued: int = 0
    held: int = 0
    oldest_ms: int | None = None
    history: Literal["whole", "anew", "off", "differs"] = "whole"
    head: At | None = None
    terminal_head: At | None = None


class Start(_Arguments, frozen=True):
    amount: Annotated[int, msgspec.Meta(ge=0)]
    currency: str
    reference: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] | None = None


class Result(_Arguments, frozen=True):
    transaction: UUID | None = None
    number: Annotated[int, msgspec.Meta(ge=1)] | None = None
    reference: str | None = None
    wait_ms: _Wait = 0


class Cancel(_Arguments, frozen=True):
    transaction: UUID


class Resolve(_Arguments, frozen=True):
    transaction: UUID
    keep: bool


class Void(_Arguments, frozen=True):
    sale: _Named
    wait_ms: _Wait = 0


class Refund(_Arguments, frozen=True):
    sale: _Named
    amount: Annotated[int, msgspec.Meta(ge=1)] | None = None
    currency: str | None = None
    reference: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] | None = None
    wait_ms: _Wait = 0


class Acknowledge(_Arguments, frozen=True):
    transaction: _Named


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
        reconciling: Reconciling,
        days: Days,
        registration: Registration,
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._answer_key = answer_key
        self._payments = payments
        self._link = link
        self._desk = desk
        self._records = Records(config, ledger)
        self._reconciling = reconciling
        self._days = days
        self._registration = registration
        self._history = "whole"

    def calls(self) -> Mapping[str, Call]:
        """The table that `ControlServer` serves."""
        sync, register, operator = (frozenset({role}) for role in (Role.SYNC, Role.REGISTER, Role.OPERATOR))
        return {
            "outbox.fetch": Call(Fetch, _said(self._fetch), sync),
            "outbox.stored": Call(Stored, _said(self._stored), sync),
            "answers.deliver": Call(DeliverMany, _said(self._deliver), sync),
            "link.report": Call(Report, _said(self._report), sync),
            "sale.start": Call(Start, _said(self._start), register | operator),
            "sale.result": Call(Result, _said(self._result), register | operator),
            "sale.cancel": Call(Cancel, _said(self._cancel), register | operator),
            "sale.void": Call(Void, _said(self._void), register | operator),
            "sale.refund": Call(Refund, _said(self._refund), register | operator),
            "attention.resolve": Call(Resolve, _said(self._resolve), register | operator),
            "alert.acknowledge": Call(Acknowledge, _said(self._acknowledge), register | operator),
            "status": Call(Nothing, _said(self._status)),
            **self._records.calls(),
            **self._reconciling.calls(),
            **self._days.calls(),
            **self._registration.calls(),
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
                    "after": None if item.after is None else str(item.after),
                    "amount": item.change_minor,
                    "currency": None if item.currency is None else item.currency.code,
                    "envelope": item.envelope,
                }
                for item in self._ledger.outbox(arguments.max)
            ],
            "head": self._ledger.head(),
        }

    def _stored(self, arguments: Stored) -> dict[str, Any]:
        self._link.heard()
        self._ledger.mark_handed_over(arguments.keys)
        return {}

    def _deliver(self, arguments: DeliverMany) -> dict[str, Any]:
        """Many answers with the flushes of one. What is wrong with one of them is said of that one only."""
        outcomes = self._committed(arguments.answers)
        results: list[dict[str, Any]] = []
        for given, outcome in zip(arguments.answers, outcomes, strict=True):
            if isinstance(outcome, LedgerError):
                refused = refusal(outcome)
                results.append({"key": given.key, "error": {"code": refused.code, "message": str(refused)}})
            else:
                results.append({"key": given.key, "state": outcome})
        return {"results": results}

    def _committed(self, given: Sequence[Deliver]) -> list[str | LedgerError]:
        """Believe an answer only if the host signed it for exactly what was sent; then commit all that are believed.

        For each: the state that it led to, or why it was not taken.
        """
        self._link.heard()
        outcomes: list[str | LedgerError | None] = []
        believed: list[Delivered] = []
        for one in given:
            try:
                believed.append(self._verified(one))
                outcomes.append(None)
            except (AnswerRejected, NoSuchTransaction) as error:
                outcomes.append(error)
        committed = iter(self._ledger.commit_answers(believed))
        self._link.answered()
        return [_outcome(next(committed)) if outcome is None else outcome for outcome in outcomes]

    def _verified(self, given: Deliver) -> Delivered:
        item = self._ledger.outbox_item(given.key)
        terminal = self._config.terminal.id
        try:
            if item.event in OF_NO_SALE:
                verify = verify_countersignature if item.event is Event.CHECKPOINT else verify_batch
                answer = verify(
                    given.answer, self._answer_key, id_=item.transaction, terminal=terminal, envelope=item.sha256
                )
            else:
                answer = verify_answer(
                    given.answer,
                    self._answer_key,
                    transaction=self._ledger.transaction(item.transaction),
                    event=item.event,
                    terminal=terminal,
                    envelope=item.sha256,
                )
                self._payments.answered(answer)
        except AnswerRejected as rejected:
            self._ledger.note("answer_rejected", key=given.key, reason=str(rejected))
            _log.error("answer for %s not believed: %s", given.key, rejected)
            raise
        return item.transaction, item.event, answer, given.answer

    def _report(self, arguments: Report) -> dict[str, Any]:
        before = self._link.state()
        self._link.report(online=arguments.online, error=arguments.error, queued=arguments.queued)
        if before.online != arguments.online:
            self._ledger.note("link", online=arguments.online, error=arguments.error)
            if arguments.online:
                _log.info("the host answers")
            else:
                _log.warning("no way to the host: %s", arguments.error)
        return self._compare_heads(arguments)

    def _compare_heads(self, arguments: Report) -> dict[str, Any]:
        """The two journals vouch for each other: one that was put back to an earlier day lacks what the other saw."""
        known = self._ledger.sync_head()
        seen = arguments.terminal_head
        differs = seen is not None and not self._ledger.holds(Head(**msgspec.to_builtins(seen)))
        history = "differs" if differs else arguments.history
        if history != self._history:
            self._history = history
            if history != "whole":
                self._ledger.note("history", state=history, terminal_lacks=seen.sequence if seen and differs else None)
                _log.error("the journals of terminal and sync do not fit: %s", history)
        if arguments.head is not None:
            self._ledger.note_sync_head(Head(**msgspec.to_builtins(arguments.head)))
        return {"sync_head": known, "differs": differs}

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
        if arguments.number is not None:
            return self._named(arguments.number)
        found = self._ledger.by_reference(arguments.reference) if arguments.reference else None
        if found is None:
            raise CallRefused("no_such_sale", "no sale with this transaction or reference is known here")
        return found

    def _cancel(self, arguments: Cancel) -> dict[str, Any]:
        return {"cancelling": self._desk.cancel(arguments.transaction)}

    def _void(self, arguments: Void) -> dict[str, Any]:
        """Take a sale back, whenever it was made; one that waits for a person's decision has it by that."""
        sale = self._named(arguments.sale)
        if self._desk.is_taking(sale.id):
            raise CallRefused("busy", "this sale is still being taken: cancel it; nothing was changed")
        before = sale.state
        after = self._payments.take_back(sale.id)
        if after.state is not before:
            self._ledger.note("void", transaction=str(sale.id), uid=CALLER.get())
        return view(self._heard_of(after, State.REVERSING, arguments.wait_ms))

    def _refund(self, arguments: Refund) -> dict[str, Any]:
        """Pay back a sale or a part of it."""
        sale = self._named(arguments.sale)
        amount = None
        if arguments.amount is not None:
            try:
                amount = Amount(arguments.amount, currency(arguments.currency or sale.amount.currency.code))
            except MoneyError as error:
                raise CallRefused("amount", str(error)) from error
        known = self._ledger.by_reference(arguments.reference) if arguments.reference else None
        refund = self._payments.refund(sale.id, amount, arguments.reference)
        if known is None:
            self._ledger.note("refund", transaction=str(refund.id), uid=CALLER.get())
        return view(self._heard_of(refund, State.AUTHORISING, arguments.wait_ms))

    def _heard_of(self, transaction: Transaction, waiting: State, wait_ms: int) -> Transaction:
        """As it is once the host has answered, or when that takes longer."""
        self._link.wait_for_answer(
            lambda: self._ledger.transaction(transaction.id).state is not waiting, timeout_ms=wait_ms
        )
        return self._ledger.transaction(transaction.id)

    def _named(self, name: UUID | int) -> Transaction:
        if isinstance(name, UUID):
            return self._ledger.transaction(name)
        found = self._ledger.booking_states(name, name, 1)
        if not found:
            raise CallRefused("no_such_sale", f"no transaction has the number {name} here: nothing was changed")
        return self._ledger.transaction(found[0].id)

    def _acknowledge(self, arguments: Acknowledge) -> dict[str, Any]:
        uid = CALLER.get()
        transaction = self._named(arguments.transaction)
        return {"acknowledged": self._ledger.acknowledge(transaction.id, -1 if uid is None else uid)}

    def _resolve(self, arguments: Resolve) -> dict[str, Any]:
        unshown = {transaction.id for transaction in self._ledger.unshown()}
        if arguments.transaction not in unshown:
            raise CallRefused("no_such_sale", "this sale does not wait for a decision")
        self._ledger.note("decided", transaction=str(arguments.transaction), keep=arguments.keep, uid=CALLER.get())
        self._desk.resolve(arguments.transaction, keep=arguments.keep)
        return {}

    def _status(self, _: Nothing) -> dict[str, Any]:
        link = self._link.state()
        unsent = self._ledger.unsent()
        told = self._ledger.host_status
        return {
            "version": VERSION,
            "terminal": self._config.terminal.id,
            "trouble": None,
            "busy": self._desk.busy,
            "unsent": {
                "count": sum(each.count for each in unsent),
                "sums": {each.currency.code: each.sum_minor for each in unsent},
                "oldest_ms": min((each.oldest_wall_ms for each in unsent), default=None),
            },
            "link": {"online": link.online, "sync": link.sync_present, "error": link.error, "queued": link.queued},
            "operator": {
                "revoked": told is not None and told.revoked,
                "configuration": self._config.terminal.configuration,
                "wanted": None if told is None else told.configuration,
            },
            "storage": {
                "free_slots": self._ledger.free_slots,
                "second": self._ledger.second_trouble,
                "damage": self._ledger.upkeep.damage,
                "history": self._history,
            },
            # Anybody may ask: what has to be decided, but neither card nor reference.
            "attention": [
                {name: value for name, value in view(transaction).items() if name in _PUBLIC}
                for transaction in self._ledger.unshown()
            ],
            "alerts": [
                {name: value for name, value in view(transaction).items() if name in _PUBLIC}
                for transaction in self._ledger.alerts()
            ],
        }


def out_of_order(reason: Callable[[], str]) -> Mapping[str, Call]:
    """What is answered while the storage lets no ledger be open: how it is, and that nothing can be sold."""

    def status(_: Nothing) -> dict[str, Any]:
        # What nobody can say now is null: not nothing.
        return {
            "version": VERSION,
            "trouble": reason(),
            "busy": False,
            "unsent": None,
            "link": None,
            "attention": [],
            "alerts": [],
        }

    def refuse(_: Any) -> dict[str, Any]:
        raise CallRefused("storage", f"{reason()} It is tried again by itself.")

    refused = (
        "sale.start", "sale.result", "sale.cancel", "sale.void", "sale.refund", "attention.resolve",
        "alert.acknowledge", "outbox.fetch", "outbox.stored", "answers.deliver", "link.report",
        "reconcile.begin", "reconcile.compare", "reconcile.ended", "reconcile.standings", "day.show", "day.end",
        "certificate.request", "certificate.issued", "terminal.told",
        "ledger.list", "ledger.check", "ledger.backup",
        "audit.page", "audit.verify", "keys.use", "privacy.export", "privacy.erase",
    )  # fmt: skip
    return {"status": Call(Nothing, status)} | {name: Call(dict, refuse) for name in refused}


def _said(handler: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """The terminal's own refusals, in the socket's words."""

    def handle(arguments: Any) -> dict[str, Any]:
        try:
            return handler(arguments)
        except SaleRefused as refused:
            raise CallRefused(refused.code, str(refused)) from refused
        except DeskBusy as busy:
            raise CallRefused("busy", str(busy)) from busy
        except LedgerError as error:
            raise refusal(error) from error

    return handle


def refusal(error: LedgerError) -> CallRefused:
    """The ledger's refusal, in the socket's words."""
    match error:
        case AnswerRejected():
            return CallRefused("answer_rejected", str(error))
        case NoSuchTransaction():
            return CallRefused("no_such_sale", str(error))
        case NotRefundable():
            return CallRefused(error.reason, str(error))
        case ReferenceTaken():
            return CallRefused("reference_taken", str(error))
        case _:
            return CallRefused("ledger", str(error))


def _outcome(committed: Transaction | Verdict | LedgerError) -> str | LedgerError:
    match committed:
        case Transaction(state=state):
            return state.value
        case Verdict():
            return committed.value
        case LedgerError():
            return committed

"""One sale: pumps a kernel over a channel, and orders the commits around what it returns.

The order is the whole point. A card is read; the outcome is committed; only then may bytes leave for the host, and only
after the decision is committed may anybody show it. Answer and time-out compete for one state in the ledger, so that
exactly one of them wins, and the loser finds the state already changed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final, TypeAlias, TypeVar
from uuid import UUID

from drivers.interfaces import CardChannel, CardLost, Interface, ReaderFault
from terminal import RELEASED_MS
from terminal.clock import Clock, Entropy
from terminal.config import Config, OfflinePolicy
from terminal.emv import configuration, contact, contact_selection, entry_point, tlv
from terminal.emv.apdu import CardRemoved, Exchange, Response
from terminal.emv.outcome import (
    Approved,
    CardRead,
    Cvm,
    Declined,
    IssuerAnswer,
    OdaMethod,
    OdaStatus,
    OnlineRequest,
    Outcome,
    Torn,
    UiRequest,
)
from terminal.emv.recent import RecentSales
from terminal.emv.torn import TornRecords
from terminal.errors import TerminalError
from terminal.ledger.errors import IllegalTransition, NotRefundable
from terminal.ledger.ledger import Ledger
from terminal.ledger.sealing import Envelopes
from terminal.ledger.states import SOLD, State
from terminal.ledger.values import Answer, CardSummary, Decision, Kind, ReversalReason, Transaction
from terminal.link import Link
from terminal.money import Amount

COMMANDS_MAX: Final = (
    1_000  # an AFL names at most 255 records in each of 30 files, no real card 100: this only ends loops
)
_EVEN: Final = 198  # the largest multiple of 99 in a byte
_MS_PER_HOUR: Final = 3_600_000
_RESPONSE_CODE, _AUTHENTICATION_DATA, _SCRIPT_BEFORE, _SCRIPT_AFTER = 0x8A, 0x91, 0x71, 0x72
_PSN: Final = 0x5F34
_SALE_TYPE: Final = 0x00  # tag 9C: purchase of goods or services
_SCHEMES: Final = {"A000000003": "Visa", "A000000004": "Mastercard", "A000000025": "American Express"}
# What a host needs to authorise (C-3, data record of an online request), and nothing else of the card.
_ISSUER_TAGS: Final = (
    0x57, 0x5A, 0x5F24, 0x5F2A, 0x5F34, 0x82, 0x84, 0x95, 0x9A, 0x9C, 0x9F02, 0x9F03, 0x9F10, 0x9F1A, 0x9F26, 0x9F27,
    0x9F33, 0x9F34, 0x9F36, 0x9F37, 0x9F39, 0x9F6E, 0x9F7C,
)  # fmt: skip

_T = TypeVar("_T")


Resume: TypeAlias = Callable[[IssuerAnswer | None], Approved | Declined | Torn]


class SaleRefused(TerminalError):
    """This sale cannot be taken; nothing was charged and no card was asked. `code` is a stable word."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def drive(
    exchange: Exchange[_T], transmit: Callable[[bytes], bytes], now_ns: Callable[[], int] = time.perf_counter_ns
) -> _T:
    """Pump a kernel: send each command it yields, hand back the response with the time it took, return what it returns.

    A card that vanishes is thrown in at the yield as `CardRemoved`. Reader faults pass: they say nothing of the card.
    """
    try:
        command = next(exchange)
        for _ in range(COMMANDS_MAX):
            begin_ns = now_ns()
            try:
                raw = transmit(command.encode())
            except CardLost:
                command = exchange.throw(CardRemoved())
            else:
                command = exchange.send(Response.decode(raw, (now_ns() - begin_ns) // 1_000))
    except StopIteration as finished:
        result: _T = finished.value
        return result
    exchange.close()
    raise CardLost(f"the card asked for more than {COMMANDS_MAX} commands: the sale was not made, use another card")


class Payments:
    """Takes sales. One thread at a time calls `begin` to `decide`; answers arrive from another through `answered`."""

    def __init__(
        self,
        *,
        config: Config,
        setup: configuration.Setup,
        ledger: Ledger,
        envelopes: Envelopes,
        link: Link,
        clock: Clock,
        entropy: Entropy,
    ) -> None:
        self._config = config
        self._setup = setup
        self._ledger = ledger
        self._envelopes = envelopes
        self._link = link
        self._clock = clock
        self._entropy = entropy
        self._answer: Answer | None = None  # the latest: one sale at a time waits for one
        self._recent = RecentSales(entropy(32), clock.monotonic_ms)
        self._torn: tuple[UUID | None, TornRecords] = None, TornRecords()  # of the sale that was read last

    def begin(self, amount: Amount, reference: str | None) -> Transaction:
        """Open a sale, or return the one that this reference names already. Raises `SaleRefused`; no card was asked."""
        if reference is not None and (known := self._ledger.by_reference(reference)) is not None:
            if (known.kind, known.amount) != (Kind.SALE, amount):
                raise SaleRefused(
                    "reference_taken", f"reference {reference!r} belongs to a {known.kind} of {known.amount}"
                )
            return known
        told = self._ledger.host_status
        if told is not None and told.revoked:
            raise SaleRefused(
                "revoked", "the operator has revoked this terminal: nothing was charged; ask the operator"
            )
        code = amount.currency.code
        if code not in self._config.limits:
            raise SaleRefused("currency", f"this terminal is not set up for {code}: nothing was charged")
        if amount.minor == 0:
            raise SaleRefused("zero_amount", "an amount of zero cannot be sold: nothing was charged")
        limit = self._config.limit("transaction", code)
        if amount.minor > limit.minor:
            raise SaleRefused("over_limit", f"{amount} is above this terminal's limit of {limit}: nothing was charged")
        return self._ledger.begin(amount, reference)

    def read(
        self,
        transaction: Transaction,
        channel: CardChannel,
        notify: Callable[[UiRequest], None],
        cardholder: contact_selection.Cardholder | None = None,
        reads: Callable[[Sequence[str]], None] = lambda _: None,
    ) -> Outcome:
        """One card presentation: entry point and kernel over this channel. Raises `ReaderFault`.

        An inserted card with several applications asks `cardholder`; where nobody can be asked, the best is taken.
        `reads` is told the cardholder's languages.
        """
        moment = self._local_time()
        request = configuration.Request(
            amount=transaction.amount,
            transaction_type=_SALE_TYPE,
            date=moment.date(),
            time=moment.time(),
        )
        if self._torn[0] != transaction.id:
            self._torn = transaction.id, TornRecords()
        environment = configuration.Environment(
            unpredictable_number=lambda: self._entropy(4),
            notify=notify,
            random_percent=self._random_percent,
            earlier_minor=self._recent.earlier_minor(transaction.amount.currency),
            torn=self._torn[1],
            reads=reads,
        )
        setup = self._setup.in_currency(transaction.amount.currency.code)
        if channel.interface is not Interface.CONTACT:
            return drive(entry_point.run(setup, request, environment), channel.transmit)
        choose = contact_selection.asked_of(cardholder) if cardholder else contact_selection.without_confirmation
        return drive(contact.run(setup, request, environment, choose), channel.transmit)

    def decide(
        self, transaction: Transaction, outcome: Approved | Declined | OnlineRequest, channel: CardChannel
    ) -> Transaction:
        """Commit what the card said, ask the host if there is a way to it, return the sale as it may now be shown.

        An inserted card that asked for the host is still there, on `channel`, and has the last word.
        """
        decided = self._decided(transaction, outcome, channel)
        self._torn = None, TornRecords()  # it holds card data
        if decided.state in SOLD and outcome.card is not None:
            self._recent.note(outcome.card.pan, outcome.card.tags.get(_PSN, b""), transaction.amount)
        return decided

    def _decided(
        self, transaction: Transaction, outcome: Approved | Declined | OnlineRequest, channel: CardChannel
    ) -> Transaction:
        match outcome:
            case Declined(reason=reason, card=card):
                return self._ledger.commit_outcome(
                    transaction.id,
                    decision=Decision.DECLINED,
                    reason=reason,
                    card=_summary(card) if card else None,
                    envelope=None,
                )
            case Approved(card=card):
                return self._accept_or_decline(transaction, card, may_accept=_proved(card))
            case OnlineRequest(card=card, resume=resume) if resume is not None:
                return self._authorise_inserted(transaction, card, lambda answer: _resumed(resume(answer), channel))
            case OnlineRequest(card=card):
                if self._link.presumed_up():
                    return self._authorise(transaction, card)
                return self._accept_or_decline(transaction, card, may_accept=self._may_defer(transaction, card))

    def void(self, transaction: Transaction, reason: str) -> Transaction:
        """End a sale for which no cryptogram was used."""
        self._torn = None, TornRecords()
        return self._ledger.commit_outcome(transaction.id, decision=Decision.VOID, reason=reason)

    def reverse(self, transaction: Transaction, reason: ReversalReason, refused: CardRead | None = None) -> Transaction:
        """Take a sale back at the host: queued at once, repeated until acknowledged. `refused`: what the card said."""
        reversed_ = self._ledger.commit_reversal(
            transaction.id,
            reason,
            lambda number: self._envelopes.reversal(transaction, number=number, reason=reason),
            None if refused is None else self._advice(transaction, refused, completed=False),
        )
        self._link.outbox_changed()
        return reversed_

    def take_back(self, sale: UUID) -> Transaction:
        """Void a sale that stands, or is being authorised. Doing it twice changes nothing. Raises `NotRefundable`.

        For a refund, for a sale of which something was paid back, and for one that never stood.
        """
        transaction = self._ledger.transaction(sale)
        if transaction.state in (State.REVERSING, State.REVERSED):
            return transaction
        try:
            return self.reverse(transaction, ReversalReason.VOID)
        except IllegalTransition as error:
            raise NotRefundable(
                "not_sold", f"this sale is {transaction.state}: nothing was changed, there is nothing to take back"
            ) from error

    def refund(self, sale: UUID, amount: Amount | None, reference: str | None) -> Transaction:
        """Pay back a sale, all that is left of it if no amount is given. Raises `NotRefundable`, `ReferenceTaken`."""
        if amount is None:
            known = self._ledger.by_reference(reference) if reference else None
            amount = known.amount if known else self._left_of(sale)
        refund = self._ledger.commit_refund(
            sale, amount, reference, lambda opened, number: self._envelopes.refund(opened, number=number)
        )
        self._link.outbox_changed()
        return refund

    def answered(self, answer: Answer) -> None:
        """What the host sent for the card, before the answer is committed: whoever waits for it will look here."""
        transaction = self._ledger.transaction(answer.transaction)
        if transaction.state is State.AUTHORISING and transaction.kind is Kind.SALE:
            self._answer = answer

    def _left_of(self, sale: UUID) -> Amount:
        sold = self._ledger.transaction(sale).amount
        return Amount(sold.minor - self._ledger.refunded(sale).minor, sold.currency)

    def _authorise(self, transaction: Transaction, card: CardRead) -> Transaction:
        asked = self._ask(transaction, card)
        if asked.state is not State.AUTHORISING:
            return asked
        try:
            if self._may_defer(transaction, card):
                return self._ledger.commit_outcome(asked.id, decision=Decision.ACCEPTED, reason="no_answer")
            return self.reverse(asked, ReversalReason.TIMEOUT)
        except IllegalTransition:
            return self._ledger.transaction(asked.id)  # the answer came in the same moment, and first

    def _authorise_inserted(self, transaction: Transaction, card: CardRead, resume: Resume) -> Transaction:
        """Ask the host, then let the card complete the sale (Book 3, 10.9 to 10.11), whatever the host said or not."""
        if not self._link.presumed_up():
            match resume(None):
                case Approved(card=completed):
                    may_accept = self._config.sale.offline is not OfflinePolicy.DECLINE and _proved(completed)
                    return self._accept_or_decline(transaction, completed, may_accept=may_accept)
                case Declined() | Torn():
                    return self._accept_or_decline(transaction, card, may_accept=False)
        asked = self._ask(transaction, card)
        answer = self._answer if self._answer and self._answer.transaction == asked.id else None
        match asked.state:
            case State.COMPLETING:
                return self._completed(asked, resume(_for_card(answer, approved=True)))
            case State.AUTHORISING:
                return self._unanswered_inserted(asked, resume(None))
            case _:
                resume(_for_card(answer, approved=False))
                return asked

    def _unanswered_inserted(self, asked: Transaction, outcome: Approved | Declined | Torn) -> Transaction:
        """No answer in time; the card has decided by itself. The answer may still come first."""
        may_accept = self._config.sale.offline is not OfflinePolicy.DECLINE and self._within_offline_limits(asked)
        try:
            if isinstance(outcome, Approved) and may_accept and _proved(outcome.card):
                return self._ledger.commit_outcome(asked.id, decision=Decision.ACCEPTED, reason="no_answer")
            return self.reverse(asked, ReversalReason.TIMEOUT)
        except IllegalTransition:
            now = self._ledger.transaction(asked.id)
            return self._completed(now, outcome) if now.state is State.COMPLETING else now

    def _completed(self, completing: Transaction, outcome: Approved | Declined | Torn) -> Transaction:
        """The host has approved; the card has had its last word, of which the host is advised."""
        if not isinstance(outcome, Approved):
            refused = outcome.card if isinstance(outcome, Declined) else None
            return self.reverse(completing, ReversalReason.CARD, refused)
        completed = self._ledger.commit_outcome(
            completing.id,
            decision=Decision.COMPLETED,
            reason="online",
            envelope=self._advice(completing, outcome.card, completed=True),
        )
        self._link.outbox_changed()
        return completed

    def _ask(self, transaction: Transaction, card: CardRead) -> Transaction:
        """Commit the request, wake sync, wait for the answer; the sale as it then is, perhaps still authorising."""
        asked = self._ledger.commit_outcome(
            transaction.id,
            decision=Decision.ONLINE,
            reason="online",
            card=_summary(card),
            envelope=self._envelope(transaction, card, deferred=False),
        )
        self._link.outbox_changed()
        self._link.wait_for_answer(
            lambda: self._ledger.transaction(asked.id).state is not State.AUTHORISING,
            timeout_ms=self._config.sale.authorisation_timeout_ms,
        )
        return self._ledger.transaction(asked.id)

    def _accept_or_decline(self, transaction: Transaction, card: CardRead, *, may_accept: bool) -> Transaction:
        """Without the host. Nothing has left, so a decline needs no reversal."""
        if not (may_accept and self._within_offline_limits(transaction)):
            return self._ledger.commit_outcome(
                transaction.id,
                decision=Decision.DECLINED,
                reason="unable_to_go_online",
                card=_summary(card),
            )
        accepted = self._ledger.commit_outcome(
            transaction.id,
            decision=Decision.ACCEPTED,
            reason="offline",
            card=_summary(card),
            envelope=self._envelope(transaction, card, deferred=True),
        )
        self._link.outbox_changed()
        return accepted

    def _may_defer(self, transaction: Transaction, card: CardRead) -> bool:
        """Accept at the merchant's risk: a card that proved itself, and nobody left to verify."""
        return (
            self._config.sale.offline is OfflinePolicy.DEFERRED
            and _proved(card)
            and card.cvm in (Cvm.NONE, Cvm.CDCVM)
            and self._within_offline_limits(transaction)
        )

    def _within_offline_limits(self, transaction: Transaction) -> bool:
        """Sum, count and age of what stands accepted without the host, this sale included (it reserved its amount)."""
        code = transaction.amount.currency.code
        limits = self._config.limits[code]
        at_risk = self._ledger.exposure(transaction.amount.currency)
        return (
            transaction.amount.minor <= self._config.limit("offline_transaction", code).minor
            and at_risk.sum_minor <= self._config.limit("offline_sum", code).minor
            and at_risk.count <= limits.offline_count
            and at_risk.age_ms <= limits.offline_age_hours * _MS_PER_HOUR
        )

    def _envelope(self, transaction: Transaction, card: CardRead, *, deferred: bool) -> Callable[[int], str]:
        return lambda number: self._envelopes.authorisation(
            transaction,
            number=number,
            card=_for_issuer(card),
            deferred=deferred,
            kernel=card.kernel,
            scheme=_scheme(card.aid),
            oda=_oda_word(card),
            cvm=card.cvm.value,
        )

    def _advice(self, transaction: Transaction, card: CardRead, *, completed: bool) -> Callable[[int], str]:
        return lambda number: self._envelopes.advice(
            transaction,
            number=number,
            card=_for_issuer(card),
            kernel=card.kernel,
            scheme=_scheme(card.aid),
            completed=completed,
        )

    def _random_percent(self) -> int:
        """1 to 99, evenly (Book 3, 10.6.2): the few bytes that would favour the small ones are drawn again."""
        while (byte := self._entropy(1)[0]) >= _EVEN:
            pass
        return byte % 99 + 1

    def _local_time(self) -> datetime:
        """The moment that goes into 9A and 9F21. A clock that was never set must not make a card "not yet valid"."""
        known_ms = [self._clock.wall_ms()]
        if not self._clock.synchronised():
            known_ms += [RELEASED_MS, self._ledger.latest_wall_ms]
        return datetime.fromtimestamp(max(known_ms) / 1000, tz=UTC).astimezone()


def _proved(card: CardRead) -> bool:
    """Genuine beyond copying: SDA can be replayed, and without any ODA an emulator's cryptogram would buy goods."""
    return card.oda.status is OdaStatus.OK and card.oda.method in (OdaMethod.CDA, OdaMethod.DDA, OdaMethod.FDDA)


def _resumed(exchange: Exchange[Outcome], channel: CardChannel) -> Approved | Declined | Torn:
    """Run the rest of an exchange. A card or a reader that is lost in it leaves the sale to be taken back."""
    try:
        outcome = drive(exchange, channel.transmit)
    except (CardLost, ReaderFault):
        return Torn("card_lost")
    return outcome if isinstance(outcome, Approved | Declined) else Torn("card_lost")


def _for_card(answer: Answer | None, *, approved: bool) -> IssuerAnswer:
    """The host's data for the card: 8A, 91, 71, 72. Data that cannot be read are as good as none."""
    found: dict[int, list[bytes]] = {}
    with contextlib.suppress(tlv.TlvError):
        for node in tlv.parse(answer.issuer_data or b"" if answer else b""):
            found.setdefault(node.tag, []).append(node.value)
    (response_code,) = found.get(_RESPONSE_CODE, [b"00" if approved else b"05"])[:1]
    return IssuerAnswer(
        response_code=response_code,
        authentication_data=next(iter(found.get(_AUTHENTICATION_DATA, [])), None),
        scripts_before=tuple(found.get(_SCRIPT_BEFORE, [])),
        scripts_after=tuple(found.get(_SCRIPT_AFTER, [])),
    )


def _for_issuer(card: CardRead) -> bytes:
    """What the host gets of the card, in clear; it is sealed before it goes anywhere."""
    return b"".join(tlv.encode(tag, card.tags[tag]) for tag in _ISSUER_TAGS if tag in card.tags)


def _summary(card: CardRead) -> CardSummary:
    return CardSummary(
        scheme=_scheme(card.aid),
        aid=card.aid.hex().upper(),
        label=card.label,
        last4=card.pan.last4,
        kernel=card.kernel,
        atc=card.atc,
        cryptogram=card.cryptogram.hex().upper(),
        oda=_oda_word(card),
        cvm=card.cvm.value,
        contact=card.kernel == configuration.CONTACT,
    )


def _scheme(aid: bytes) -> str:
    return _SCHEMES.get(aid[:5].hex().upper(), "card")


def _oda_word(card: CardRead) -> str:
    return f"{card.oda.method.value}_{card.oda.status.value}" if card.oda.method else card.oda.status.value

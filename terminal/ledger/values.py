"""What goes into the ledger and comes out of it: frozen values, free of database and file."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from uuid import UUID

from terminal.ledger.states import Change, State
from terminal.money import Amount, Currency


class Kind(StrEnum):
    SALE = "sale"
    REFUND = "refund"
    """Money paid back to the card of an earlier sale, whole or in part. No card is read for it."""


class Decision(StrEnum):
    """What the terminal decided at the end of an attempt."""

    ONLINE = "online"
    ACCEPTED = "accepted"
    DECLINED = "declined"
    VOID = "void"
    COMPLETED = "completed"

    @property
    def change(self) -> Change:
        return _OUTCOMES[self]

    @property
    def event(self) -> Event:
        """What an envelope is about that comes with it."""
        return Event.ADVICE if self is Decision.COMPLETED else Event.AUTHORISATION


class Verdict(StrEnum):
    """What the host decided."""

    APPROVED = "approved"
    DECLINED = "declined"
    REVERSED = "reversed"
    COUNTERSIGNED = "countersigned"
    """Of a checkpoint: seen, and fits what was seen before. It changes no transaction."""
    NOTED = "noted"
    """Of an advice. It changes no transaction."""
    BALANCED = "balanced"
    """Of a batch: the host holds the same sums."""
    DIFFERS = "differs"
    """Of a batch: it does not."""

    def change(self, state: State, *, contact: bool) -> Change:
        """An inserted card has the last word on what the host approves; one that was tapped is gone."""
        if contact and state is State.AUTHORISING and self is Verdict.APPROVED:
            return Change.HOST_APPROVED_CARD_WAITS
        return _VERDICTS[self]


class ReversalReason(StrEnum):
    TIMEOUT = "timeout"
    RECOVERED = "recovered"
    VOID = "void"
    CARD = "card"

    @property
    def change(self) -> Change:
        return _REVERSALS[self]


_OUTCOMES = {
    Decision.ONLINE: Change.ONLINE,
    Decision.ACCEPTED: Change.ACCEPTED,
    Decision.DECLINED: Change.DECLINED,
    Decision.VOID: Change.VOID,
    Decision.COMPLETED: Change.COMPLETED,
}
_VERDICTS = {
    Verdict.APPROVED: Change.HOST_APPROVED,
    Verdict.DECLINED: Change.HOST_DECLINED,
    Verdict.REVERSED: Change.HOST_REVERSED,
}
_REVERSALS = {
    ReversalReason.TIMEOUT: Change.TIMED_OUT,
    ReversalReason.RECOVERED: Change.RECOVERED,
    ReversalReason.VOID: Change.VOIDED,
    ReversalReason.CARD: Change.CARD_REFUSED,
}


class Event(StrEnum):
    """What an envelope asks of the host."""

    AUTHORISATION = "authorisation"
    REFUND = "refund"
    ADVICE = "advice"
    """What an inserted card said last of a sale that the host had approved."""
    REVERSAL = "reversal"
    CHECKPOINT = "checkpoint"
    """Not of a transaction: where the journal stands, for the host to countersign."""
    BATCH = "batch"
    """Not of a transaction: a day's end, for the host to compare its sums."""


OF_NO_SALE = frozenset({Event.CHECKPOINT, Event.BATCH})
ASIDE = OF_NO_SALE | {Event.ADVICE}
"""No money hangs on these: a host that does not take them must not fill the journal, nor keep a sale from ending."""


def ended_by(event: Event) -> frozenset[Event]:
    """What nobody waits for any more once this is answered: a reversal that is done ends what it reverses, too."""
    reversed_ = {Event.AUTHORISATION, Event.ADVICE} if event is Event.REVERSAL else set()
    return frozenset({event} | reversed_)


@dataclass(frozen=True, slots=True)
class CardSummary:
    """What the terminal keeps of a card: enough for receipt and screen, too little to name the card."""

    scheme: str
    aid: str  # hex
    label: str
    last4: str
    kernel: int
    atc: int
    cryptogram: str  # hex
    oda: str
    cvm: str
    contact: bool = False

    def __post_init__(self) -> None:
        if len(self.last4) > 4:
            raise ValueError("a card summary takes the last four digits only")


@dataclass(frozen=True, slots=True)
class Transaction:
    """One sale, or one refund, as the ledger knows it.

    Times are wall milliseconds, to be believed if `clock_synchronised`, or if `corrected`: worked out once the clock
    was set. `running_ms` is how long this terminal had been running, over all its boots, when the sale was opened.
    """

    id: UUID
    number: int
    kind: Kind
    amount: Amount
    reference: str | None
    opened_at_ms: int
    clock_synchronised: bool
    state: State
    reason: str | None = None
    card: CardSummary | None = None
    authorisation_code: str | None = None
    rrn: str | None = None
    card_ref: str | None = None
    shown: str | None = None
    corrected: bool = False
    running_ms: int = field(default=0, compare=False)
    of: UUID | None = None
    """The sale that a refund pays back."""
    scheme: str | None = None
    """Of the card; stays when the card itself is forgotten."""

    @property
    def signed_minor(self) -> int:
        """What it means for the merchant: a refund is negative."""
        return -self.amount.minor if self.kind is Kind.REFUND else self.amount.minor


@dataclass(frozen=True, slots=True)
class Standing:
    """A transaction as it is to be held against the host's books."""

    number: int
    id: UUID
    kind: Kind
    of: UUID | None
    amount: Amount
    state: State
    sent: bool
    """An envelope about it was made for the host."""
    answered: bool
    """And the host has answered the newest one."""


@dataclass(frozen=True, slots=True)
class OutboxItem:
    """One envelope that the host is to answer. `envelope` is None once the answer has come: it is erased then."""

    key: str
    transaction: UUID
    event: Event
    number: int
    urgent: bool
    sha256: str
    handed_over: bool
    answered: bool
    envelope: str | None = field(repr=False)
    after: UUID | None = None
    """What was sent for this transaction must have been answered, and believed, first: a refund goes after its sale."""
    change_minor: int | None = None
    """What it brings to the merchant at the host, in `currency`; a reversal and a refund are negative."""
    currency: Currency | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The host's answer, its signature checked against one envelope (`envelope` is that one's SHA-256, in hex)."""

    transaction: UUID
    event: Event
    envelope: str
    decision: Verdict
    reason: str | None
    authorisation_code: str | None
    rrn: str | None
    card_ref: str | None
    issuer_data: bytes | None
    answered_at_ms: int


@dataclass(frozen=True, slots=True)
class Exposure:
    """What the merchant may lose in one currency: accepted and not finally answered, or reserved by an open sale."""

    sum_minor: int
    count: int
    oldest_wall_ms: int | None
    age_ms: int = field(
        default=0, compare=False
    )  # of the oldest, by running time wherever the clock was not to be trusted


@dataclass(frozen=True, slots=True)
class Unsent:
    """What still waits for the host's answer, in one currency: sales less refunds."""

    currency: Currency
    sum_minor: int
    count: int
    oldest_wall_ms: int


@dataclass(frozen=True, slots=True)
class Total:
    """What stands of one UTC day, in one currency and scheme: sales and refunds counted, sales less refunds summed.

    What was refused or reversed counts no more.
    """

    day: str
    currency: Currency
    scheme: str
    sum_minor: int
    count: int


@dataclass(frozen=True, slots=True)
class Figure:
    """What was sold in one currency and scheme: sales and refunds counted, sales less refunds summed."""

    currency: Currency
    scheme: str
    count: int
    sum_minor: int


@dataclass(frozen=True, slots=True)
class OpenDay:
    """What has been sold since the last day's end: transactions `first` to `last`; none if `last` is before `first`."""

    no: int
    first: int
    last: int
    sold: tuple[Figure, ...]
    corrected: tuple[Figure, ...]
    """What has become of transactions that are in an earlier batch."""
    since_ms: int | None
    """Wall time of the last day's end."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A day's end. `decision` and what the host holds (code, count, minor units) are None until it has answered."""

    id: UUID
    no: int
    first: int
    last: int
    sold: tuple[Figure, ...]
    corrected: tuple[Figure, ...]
    taken_at_ms: int
    decision: Verdict | None
    host: tuple[tuple[str, int, int], ...] | None
    missing: tuple[tuple[int, int], ...]
    """Transactions of which nothing has come there, as ranges."""


@dataclass(frozen=True, slots=True)
class HostStatus:
    """What the operator's host last said of this terminal, when it changed; `said_at_ms` by the host's clock."""

    revoked: bool
    configuration: str | None
    """The version that this terminal should have."""
    said_at_ms: int

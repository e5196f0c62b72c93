"""The messages of docs/formats.md (Envelope and answer), as the host reads and writes them.

Reading is strict: an unknown member, a missing one or one of another type is refused, because a terminal that says
more than version 1 knows means something that this host would not do. What the values mean for the money is decided
elsewhere.
"""

from __future__ import annotations

import struct
from typing import Annotated, Final, Literal, TypeAlias
from uuid import UUID

import msgspec

ENVELOPE_BYTES_MAX: Final = 12_288  # what a slot of the terminal's journal holds
ENVELOPE_TYPE: Final = "payterm-envelope"
ANSWER_TYPE: Final = "payterm-answer"
STATUS_TYPE: Final = "payterm-status"
UUID_PATTERN: Final = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"

ID_PATTERN: Final = "[A-Za-z0-9-]{1,32}"

_SEALED_CARD_DATA: Final = b"payterm sealed card 1\0"

# \Z and not $, which would let a line feed follow.
_Id = Annotated[str, msgspec.Meta(pattern=rf"\A{ID_PATTERN}\Z")]
_Uuid = Annotated[str, msgspec.Meta(pattern=rf"\A{UUID_PATTERN}\Z")]
_Epoch = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=2**53 - 1)]  # every JSON reader has integers so far
_AmountMinor = Annotated[int, msgspec.Meta(ge=0, le=999_999_999_999)]  # n 12, as EMV tag 9F02
_CurrencyCode = Annotated[str, msgspec.Meta(pattern=r"\A[A-Z]{3}\Z")]
_TimeMs = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
_Word = Annotated[str, msgspec.Meta(max_length=64)]
_KeyId = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{16}\Z")]
_Sealed = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_-]+\Z")]
_Mac = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_SumMinor = Annotated[int, msgspec.Meta(ge=-(2**53) + 1, le=2**53 - 1)]
_NotNegative = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
_KeyName = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{8,64}\Z")]

CURRENCIES_MAX: Final = 64  # in one message; what a terminal sells in, not what there is
KEYS_MAX: Final = 32
RANGE_MAX: Final = 100_000  # transactions in one range: years of one terminal, and read through in a tenth of a second
CSR_CHARACTERS_MAX: Final = 8_192  # an RSA key of 4096 bits takes a fifth


class _Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="event"):
    """What every envelope says. `number` counts; None for what changes no books and is asked, not told."""

    v: Literal[1]
    terminal: _Id
    merchant: _Id
    epoch: _Epoch


class _Transaction(_Envelope, frozen=True, kw_only=True):
    number: _Count
    transaction: _Uuid
    kind: Literal["sale", "refund"]
    amount: _AmountMinor
    currency: _CurrencyCode
    opened_at: _TimeMs
    clock_synchronised: bool
    sequence: _Count


class Authorisation(_Transaction, frozen=True, kw_only=True, tag="authorisation"):
    """May this card pay? `deferred`: the merchant has already taken the risk."""

    kind: Literal["sale"]
    deferred: bool
    kernel: int
    scheme: _Word | None
    oda: _Word | None
    cvm: _Word | None
    host_key: _KeyId
    sealed: _Sealed


class Advice(_Transaction, frozen=True, kw_only=True, tag="advice"):
    """What the card said last of a sale that had been approved."""

    kind: Literal["sale"]
    kernel: int
    scheme: _Word | None
    outcome: Literal["completed", "refused"]
    host_key: _KeyId
    sealed: _Sealed


class Refund(_Transaction, frozen=True, kw_only=True, tag="refund"):
    """Pay so much back to the card of the sale `of`."""

    kind: Literal["refund"]
    of: _Uuid


class Reversal(_Transaction, frozen=True, kw_only=True, tag="reversal"):
    """This sale or refund is not to be, whether the host has heard of it or not."""

    reason: Literal["timeout", "recovered", "void", "card"]


class Sum(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was sold in one currency."""

    currency: _CurrencyCode
    count: _NotNegative
    sum: _SumMinor


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A record of a terminal's journal."""

    sequence: _Count
    mac: _Mac


class PlaceInEpoch(Place, frozen=True, forbid_unknown_fields=True):
    epoch: _Epoch


_Sums = Annotated[tuple[Sum, ...], msgspec.Meta(max_length=CURRENCIES_MAX)]


class Checkpoint(_Envelope, frozen=True, kw_only=True, tag="checkpoint"):
    """So far the terminal's journal has come."""

    checkpoint: _Uuid
    number: _Count
    sequence: _Count
    mac: _Mac
    epoch_of: PlaceInEpoch | None
    totals: _Sums
    unsent: _Sums
    archived: Place | None
    keys: Annotated[tuple[_KeyName, ...], msgspec.Meta(max_length=KEYS_MAX)]
    taken_at: _TimeMs
    clock_synchronised: bool

    def __post_init__(self) -> None:
        of = self.epoch_of
        if of is not None and not (of.epoch < self.epoch and of.sequence < self.sequence):
            raise ValueError("an epoch continues an earlier one, and its own records follow there")


class _Range(_Envelope, frozen=True, kw_only=True):
    """About transactions of one epoch, by their sequence numbers."""

    first: _Count
    last: _Count

    def __post_init__(self) -> None:
        if not self.first <= self.last < self.first + RANGE_MAX:
            raise ValueError(f"a range goes from its first to its last, over at most {RANGE_MAX} transactions")


class Batch(_Range, frozen=True, kw_only=True, tag="batch"):
    """The day's end: so much this terminal believes to have sold."""

    batch: _Uuid
    number: _Count
    totals: _Sums
    unsent: _Sums
    taken_at: _TimeMs
    clock_synchronised: bool


class Reconciliation(_Range, frozen=True, kw_only=True, tag="reconciliation"):
    """What does the host hold of these transactions?"""

    reconciliation: _Uuid
    number: None
    asked_at: _TimeMs


class CertificateRequest(_Envelope, frozen=True, kw_only=True, tag="certificate"):
    """Sign this terminal's TLS client key: its first one, or the next."""

    certificate: _Uuid
    number: None
    csr: Annotated[str, msgspec.Meta(max_length=CSR_CHARACTERS_MAX)]
    asked_at: _TimeMs


TransactionEnvelope: TypeAlias = Authorisation | Refund | Advice | Reversal
Numbered: TypeAlias = TransactionEnvelope | Checkpoint | Batch
Envelope: TypeAlias = Numbered | Reconciliation | CertificateRequest

EVENTS: Final = ("authorisation", "refund", "advice", "reversal")  # of a transaction

EventName: TypeAlias = Literal["authorisation", "refund", "advice", "reversal"]
DecisionName: TypeAlias = Literal["approved", "declined", "reversed", "noted"]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the host has decided, once and for all."""

    v: Literal[1] = 1
    event: EventName
    transaction: str
    terminal: str
    amount: int
    currency: str
    envelope: str
    decision: DecisionName
    reason: str | None
    authorisation_code: str | None
    rrn: str | None
    card_ref: str | None
    issuer_data: str | None
    answered_at: int


class Countersignature(msgspec.Struct, frozen=True, kw_only=True):
    """The checkpoint fits everything that this terminal has shown before."""

    v: Literal[1] = 1
    event: Literal["checkpoint"] = "checkpoint"
    checkpoint: str
    terminal: str
    epoch: int
    sequence: int
    mac: str
    envelope: str
    decision: Literal["countersigned"] = "countersigned"
    answered_at: int


class Total(msgspec.Struct, frozen=True):
    """What the host holds in one currency: sales and refunds counted, sales less refunds summed."""

    currency: str
    count: int
    sum: int


class BatchAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the host holds the same sums."""

    v: Literal[1] = 1
    event: Literal["batch"] = "batch"
    batch: str
    terminal: str
    epoch: int
    first: int
    last: int
    envelope: str
    decision: Literal["balanced", "differs"]
    totals: list[Total]
    missing: list[tuple[int, int]]
    missing_more: bool
    answered_at: int


class ReconciliationAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the host holds of a range, as of now."""

    v: Literal[1] = 1
    event: Literal["reconciliation"] = "reconciliation"
    reconciliation: str
    terminal: str
    epoch: int
    first: int
    last: int
    envelope: str
    decision: Literal["compared"] = "compared"
    totals: list[Total]
    received: int
    missing: list[tuple[int, int]]
    missing_more: bool
    digest: str
    entries: list[tuple[int, str, str, int, str]] | None
    answered_at: int


class CertificateAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The certificate with those that vouch for it, or why there is none."""

    v: Literal[1] = 1
    event: Literal["certificate"] = "certificate"
    certificate: str
    terminal: str
    envelope: str
    decision: Literal["issued", "declined"]
    reason: str | None
    chain: str | None
    answered_at: int


class TerminalStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator wants of a terminal."""

    v: Literal[1] = 1
    terminal: str
    configuration: str | None
    revoked: bool
    time: int


Signable: TypeAlias = (
    Answer | Countersignature | BatchAnswer | ReconciliationAnswer | CertificateAnswer | TerminalStatus
)


def read_envelope(payload: bytes) -> Envelope:
    """Raises `msgspec.ValidationError` or `msgspec.DecodeError`, which name the member but no card data."""
    try:
        envelope: Envelope = msgspec.json.decode(payload, type=Envelope)
    except (RecursionError, UnicodeDecodeError) as error:
        raise msgspec.DecodeError("this is not the JSON of an envelope") from error
    return envelope


def sealing_info(envelope: Authorisation | Advice) -> bytes:
    """What binds sealed card data to its sale (docs/formats.md, Sealed card data)."""
    terminal = envelope.terminal.encode()
    return b"".join(
        (
            _SEALED_CARD_DATA,
            bytes.fromhex(envelope.host_key),
            struct.pack(">B", len(terminal)),
            terminal,
            struct.pack(">I", envelope.epoch),
            UUID(envelope.transaction).bytes,
            struct.pack(">Q", envelope.amount),
            envelope.currency.encode(),
        )
    )

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
UUID_PATTERN: Final = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"

_SEALED_CARD_DATA: Final = b"payterm sealed card 1\0"

# \Z and not $, which would let a line feed follow.
_Id = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9-]{1,32}\Z")]
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

CURRENCIES_MAX: Final = 64  # in one checkpoint; what a terminal sells in, not what there is
KEYS_MAX: Final = 32


class _Sale(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="event"):
    v: Literal[1]
    transaction: _Uuid
    terminal: _Id
    merchant: _Id
    epoch: _Epoch
    number: _Count
    kind: Literal["sale"]
    amount: _AmountMinor
    currency: _CurrencyCode
    opened_at: _TimeMs
    clock_synchronised: bool
    sequence: _Count


class Authorisation(_Sale, frozen=True, kw_only=True, tag="authorisation"):
    """May this card pay? `deferred`: the merchant has already taken the risk."""

    deferred: bool
    kernel: int
    scheme: _Word | None
    oda: _Word | None
    cvm: _Word | None
    host_key: _KeyId
    sealed: _Sealed


class Reversal(_Sale, frozen=True, kw_only=True, tag="reversal"):
    """This sale is not to be, whether the host has heard of it or not."""

    reason: Literal["timeout", "recovered", "void", "card"]


class Sum(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sales in one currency."""

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


class Checkpoint(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="event", tag="checkpoint"
):
    """So far the terminal's journal has come."""

    v: Literal[1]
    checkpoint: _Uuid
    terminal: _Id
    merchant: _Id
    epoch: _Epoch
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


SaleEnvelope: TypeAlias = Authorisation | Reversal
Envelope: TypeAlias = SaleEnvelope | Checkpoint


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the host has decided, once and for all."""

    v: Literal[1] = 1
    event: Literal["authorisation", "reversal"]
    transaction: str
    terminal: str
    amount: int
    currency: str
    envelope: str
    decision: Literal["approved", "declined", "reversed"]
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


def read_envelope(payload: bytes) -> Envelope:
    """Raises `msgspec.ValidationError` or `msgspec.DecodeError`, which name the member but no card data."""
    try:
        envelope: Envelope = msgspec.json.decode(payload, type=Envelope)
    except (RecursionError, UnicodeDecodeError) as error:
        raise msgspec.DecodeError("this is not the JSON of an envelope") from error
    return envelope


def sealing_info(envelope: Authorisation) -> bytes:
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

"""What a transaction attempt ends in (EMV Contactless Book A, 6; Book B, 3.5), as values.

`Outcome` is closed: `match` over it is exhaustive and mypy checks that. A kernel never raises for anything that a card
does; it returns one of these, with a stable `reason` word for logs, screens and replay files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TypeAlias

from terminal.emv.apdu import Exchange


@dataclass(frozen=True, slots=True)
class Pan:
    """A primary account number. Shows itself masked, whatever prints it; `digits` is for sealing and comparing only."""

    digits: str = field(repr=False)

    @property
    def last4(self) -> str:
        return self.digits[-4:]

    def __repr__(self) -> str:
        return f"Pan(...{self.last4})"

    __str__ = __repr__


class MessageId(IntEnum):
    """User interface request: message identifier (Book A, 9.4)."""

    APPROVED = 0x03
    DECLINED = 0x07
    ENTER_PIN = 0x09
    PROCESSING_ERROR = 0x0F
    REMOVE_CARD = 0x10
    WELCOME = 0x14
    PRESENT_CARD = 0x15
    PROCESSING = 0x16
    CARD_READ_OK = 0x17
    INSERT_OR_SWIPE = 0x18
    ONE_CARD_ONLY = 0x19
    APPROVED_SIGN = 0x1A
    AUTHORISING = 0x1B
    OTHER_CARD = 0x1C
    INSERT_CARD = 0x1D
    CLEAR_DISPLAY = 0x1E
    SEE_PHONE = 0x20
    PRESENT_AGAIN = 0x21
    NONE = 0xFF


class Status(IntEnum):
    """User interface request: status (Book A, 9.4)."""

    NOT_READY = 0
    IDLE = 1
    READY_TO_READ = 2
    PROCESSING = 3
    CARD_READ_OK = 4
    PROCESSING_ERROR = 5
    NONE = 0xFF


@dataclass(frozen=True, slots=True)
class UiRequest:
    """What the reader should show and sound, in EMV's own terms; the flow turns it into a screen."""

    message: MessageId
    status: Status = Status.NONE
    hold_ms: int = 0
    balance_minor: int | None = None  # what is left on the card, in the card's currency; for the cardholder's eyes


class Cvm(Enum):
    """Cardholder verification as the outcome asks for it (Book A, 6.2)."""

    NONE = "none"
    SIGNATURE = "signature"
    ONLINE_PIN = "online_pin"
    CDCVM = "cdcvm"
    FAILED = "failed"  # the card wanted its holder verified, and nobody was: TVR byte 3 says more


class OdaMethod(Enum):
    SDA = "sda"
    DDA = "dda"
    CDA = "cda"
    FDDA = "fdda"


class OdaStatus(Enum):
    OK = "ok"
    FAILED = "failed"
    NOT_PERFORMED = "not_performed"


@dataclass(frozen=True, slots=True)
class OdaResult:
    """Offline data authentication: what was tried, how it ended, and a stable word for why."""

    status: OdaStatus = OdaStatus.NOT_PERFORMED
    method: OdaMethod | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class CardRead:
    """What a card said in one attempt: everything that issuer, receipt and ledger need of it.

    `tags` holds all data objects known at the end, card data in clear: it lives in memory only, and `repr` hides it.
    """

    aid: bytes
    kernel: int
    label: str
    pan: Pan
    cid: int
    cryptogram: bytes
    atc: int
    oda: OdaResult
    cvm: Cvm
    tags: Mapping[int, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Approved:
    """The card approved offline with a TC."""

    card: CardRead
    ui: UiRequest = UiRequest(MessageId.APPROVED, Status.CARD_READ_OK)


@dataclass(frozen=True, slots=True)
class Declined:
    """Declined by card or terminal. `card` is None when the attempt ended before the card gave a cryptogram."""

    reason: str
    card: CardRead | None = None
    ui: UiRequest = UiRequest(MessageId.DECLINED, Status.CARD_READ_OK)


@dataclass(frozen=True, slots=True)
class IssuerAnswer:
    """What the host brought back for the card (Book 3, 10.9 and 10.10): tags 8A, 91, 71, 72."""

    response_code: bytes  # 8A, two ASCII digits: "00" approves
    authentication_data: bytes | None = field(default=None, repr=False)  # 91
    scripts_before: tuple[bytes, ...] = field(default=(), repr=False)  # 71, contents
    scripts_after: tuple[bytes, ...] = field(default=(), repr=False)  # 72, contents


@dataclass(frozen=True, slots=True)
class OnlineRequest:
    """The card gave an ARQC: the host decides.

    On contact the card still waits for its second GENERATE AC: `resume` is the rest of the exchange, run once, with the
    host's answer, or with None when there was no way to it. It ends in Approved, Declined or Torn; after an approval of
    the host anything but Approved must be reversed. Contactless cards are done: `resume` is None.
    """

    card: CardRead
    ui: UiRequest = UiRequest(MessageId.AUTHORISING, Status.CARD_READ_OK)
    resume: Callable[[IssuerAnswer | None], Exchange[Outcome]] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class TryAgain:
    """Present the card again; no cryptogram left the card. `restart`: what to show once the field is on again."""

    reason: str
    ui: UiRequest = UiRequest(MessageId.PRESENT_AGAIN, Status.READY_TO_READ)
    restart: UiRequest = UiRequest(MessageId.PRESENT_AGAIN, Status.READY_TO_READ)


@dataclass(frozen=True, slots=True)
class SelectNext:
    """Not this application: the entry point tries the next candidate (Book B, 3.5), so this never leaves it."""

    reason: str


@dataclass(frozen=True, slots=True)
class TryAnotherInterface:
    """Insert (or swipe) instead of tapping."""

    reason: str
    ui: UiRequest = UiRequest(MessageId.INSERT_OR_SWIPE, Status.PROCESSING_ERROR)


@dataclass(frozen=True, slots=True)
class EndApplication:
    """The attempt is over; another card may be used. With `restart` the same one is to be presented again (Start B)."""

    reason: str
    ui: UiRequest = UiRequest(MessageId.OTHER_CARD, Status.PROCESSING_ERROR)
    restart: UiRequest | None = None


@dataclass(frozen=True, slots=True)
class Torn:
    """The card vanished after it may have computed a cryptogram that was not received."""

    reason: str
    ui: UiRequest = UiRequest(MessageId.PRESENT_AGAIN, Status.READY_TO_READ)
    restart: UiRequest = UiRequest(MessageId.PRESENT_AGAIN, Status.READY_TO_READ)


Outcome: TypeAlias = (
    Approved | Declined | OnlineRequest | TryAgain | SelectNext | TryAnotherInterface | EndApplication | Torn
)

"""What a transaction is run with: the terminal's settings, the request, what the outside lends, and what entry point
hands to a kernel (Book A, 5; Book B, 2 and 3.1).

Values only. Where settings come from, and which of them a merchant may change, is for whoever builds a `Setup`.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from terminal.emv.authentication import CaKeys, RevokedCertificate, Trust
from terminal.emv.outcome import MessageId, Pan, Status, UiRequest
from terminal.emv.progress import Watch
from terminal.emv.tags import Format, Kernel2Tag, Kernel3Tag, Source, Tag, lookup
from terminal.emv.torn import TornRecords
from terminal.money import Amount

AID_BYTES_MIN: Final = 5
AID_BYTES_MAX: Final = 16
UNPREDICTABLE_NUMBER_BYTES: Final = 4
PHONE_MESSAGE_BYTES: Final = 8  # mask 3, value 3, message 1, status 1
CONTACT: Final = 0  # stands where a contactless kernel has its number
_TEXT: Final = frozenset({Format.A, Format.AN, Format.ANS})
CONTACTLESS_ENTRY_MODE: Final = b"\x07"  # 9F39: contactless, chip data (ISO 8583:1987, data element 22)


class ConfigurationError(ValueError):
    """Settings that no transaction can be run with; the message says which and why."""


@dataclass(frozen=True, slots=True)
class RandomSelection:
    """Random transaction selection for online (Book 3, 10.6.2); `threshold` in minor units.

    Raises `ConfigurationError`.
    """

    threshold: int
    target_percent: int
    max_target_percent: int

    def __post_init__(self) -> None:
        if not 0 <= self.target_percent <= self.max_target_percent <= 99 or self.threshold < 0:
            raise ConfigurationError(
                "random selection: 0 <= target <= maximum target <= 99 percent, threshold not below 0"
            )


@dataclass(frozen=True, slots=True)
class Limits:
    """What entry point checks for one combination (Book A, 5). Amounts in minor units; None: no such limit.

    `ttq` stands in for tag 9F66 of the combination. `transaction_types` None: all.
    """

    status_check: bool = False
    zero_amount_allowed: bool | None = None
    contactless_transaction: int | None = None
    contactless_floor: int | None = None
    terminal_floor: int | None = None
    cvm_required: int | None = None
    ttq: bytes | None = None
    extended_selection: bool = False
    transaction_types: frozenset[int] | None = None
    random: RandomSelection | None = None


@dataclass(frozen=True, slots=True)
class Combination:
    """An AID, the kernel that processes it, and the settings of the two together. Raises `ConfigurationError`.

    Kernel `CONTACT` is for inserted cards alone. For an AID without such an entry contact takes a contactless one.
    `tags` holds what the terminal states for this application: 9F09, action codes DF8120 to DF8122, a default DDOL
    9F49 or TDOL 97, a kernel's DF81xx. `partial`: contact also takes card applications whose name only begins with
    the AID (contactless always does). `limits_elsewhere`: instead of `limits` for amounts in other currencies, by
    ISO 4217 code (`Setup.in_currency`); one that is not named there has its minor units counted alike.
    """

    aid: bytes
    kernel: int
    limits: Limits = Limits()
    tags: Mapping[int, bytes] = field(default_factory=lambda: MappingProxyType({}))
    partial: bool = True
    limits_elsewhere: Mapping[str, Limits] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if not AID_BYTES_MIN <= len(self.aid) <= AID_BYTES_MAX:
            raise ConfigurationError(f"AID {self.aid.hex().upper()} must have {AID_BYTES_MIN} to {AID_BYTES_MAX} bytes")
        if self.ttq is not None and len(self.ttq) != Kernel3Tag.TTQ.length_max:
            raise ConfigurationError(f"AID {self.aid.hex().upper()}: the TTQ (9F66) must have 4 bytes")
        _check_objects(f"AID {self.aid.hex().upper()}", self.tags, self.kernel)
        if not _readable(self.tags.get(Kernel2Tag.PHONE_MESSAGE_TABLE, b"")):
            raise ConfigurationError(
                f"AID {self.aid.hex().upper()}: tag DF8131 has rows of 8 bytes, with known messages"
            )

    @property
    def ttq(self) -> bytes | None:
        """Terminal Transaction Qualifiers as configured."""
        return self.limits.ttq if self.limits.ttq is not None else self.tags.get(Kernel3Tag.TTQ)


def _readable(phone_messages: bytes) -> bool:
    rows = [phone_messages[at : at + PHONE_MESSAGE_BYTES] for at in range(0, len(phone_messages), PHONE_MESSAGE_BYTES)]
    return all(len(row) == PHONE_MESSAGE_BYTES and row[6] in set(MessageId) and row[7] in set(Status) for row in rows)


def _check_objects(whose: str, objects: Mapping[int, bytes], kernel: int | None = None) -> None:
    for tag, value in objects.items():
        definition = lookup(tag, kernel)
        if definition is None or definition.source is Source.CARD:
            continue  # a card's object, as a default DDOL: it is judged as the card's own would be
        # Text decides nothing, and a data object list pads what is too short.
        shortest = 0 if definition.format in _TEXT else definition.length_min
        if not shortest <= len(value) <= definition.length_max:
            raise ConfigurationError(f"{whose}: tag {tag:X} must have {shortest} to {definition.length_max} bytes")
        if definition.format is Format.N and value and not value.hex().isdecimal():
            raise ConfigurationError(f"{whose}: tag {tag:X} must be decimal digits")


@dataclass(frozen=True, slots=True)
class ExceptionEntry:
    """A card that must not be accepted; `psn` None: whatever its PAN sequence number."""

    pan: Pan
    psn: int | None = None


@dataclass(frozen=True, slots=True)
class Setup:
    """A terminal as it stands: terminal-wide data objects, combinations in order of preference, and what it trusts.

    Raises `ConfigurationError`.
    """

    terminal: Mapping[int, bytes]
    combinations: tuple[Combination, ...]
    ca_keys: CaKeys = field(default_factory=CaKeys)
    revoked: frozenset[RevokedCertificate] = frozenset()
    exceptions: Container[ExceptionEntry] = field(default=frozenset(), repr=False)

    def __post_init__(self) -> None:
        _check_objects("terminal", self.terminal)

    def in_currency(self, code: str) -> Setup:
        """The same terminal, with the limits that its applications have for amounts in this currency (ISO 4217)."""
        return replace(
            self,
            combinations=tuple(
                replace(each, limits=each.limits_elsewhere.get(code, each.limits)) for each in self.combinations
            ),
        )

    def trust(self, request: Request) -> Trust:
        return Trust(self.ca_keys, self.revoked, request.certificates_on or request.date)


@dataclass(frozen=True, slots=True)
class Request:
    """What the merchant wants: an amount, part of which may be cashback, a transaction type (9C), and when.

    `force_online`: the merchant does not trust this card; contact then asks the host where there is one.
    `objects`: whatever else is to be stated of this transaction, by tag. `certificates_on`: the day that certificates
    must hold, where it is not the transaction's date. Raises `ConfigurationError`.
    """

    amount: Amount
    date: datetime.date
    time: datetime.time
    transaction_type: int = 0x00
    amount_other_minor: int = 0
    force_online: bool = False
    objects: Mapping[int, bytes] = field(default_factory=lambda: MappingProxyType({}))
    certificates_on: datetime.date | None = None

    def __post_init__(self) -> None:
        _check_objects("transaction", self.objects)


def _nothing_earlier(pan: Pan, psn: bytes) -> int:
    return 0


def _nobody_reads(languages: Sequence[str]) -> None:
    """The terminal's own language stays."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What the outside lends to a kernel: chance, a screen, a memory, an eye. None of them may block."""

    unpredictable_number: Callable[[], bytes]  # 4 fresh bytes a call
    notify: Callable[[UiRequest], None]
    random_percent: Callable[[], int] | None = None  # 1 to 99, evenly; None: no transaction is selected at random
    earlier_minor: Callable[[Pan, bytes], int] = _nothing_earlier  # what this PAN and PSN paid here last, or 0
    watch: Watch = field(default_factory=Watch)
    reads: Callable[[Sequence[str]], None] = _nobody_reads  # told the cardholder's languages, best first, once known
    torn: TornRecords = field(default_factory=TornRecords)  # of this sale's earlier presentations

    def new_unpredictable_number(self) -> bytes:
        """Raises `ConfigurationError`."""
        number = self.unpredictable_number()
        if len(number) != UNPREDICTABLE_NUMBER_BYTES:
            raise ConfigurationError("the source of unpredictable numbers must give 4 bytes: no card was charged")
        return number


@dataclass(frozen=True, slots=True)
class Indicators:
    """What pre-processing found for one combination (Book B, 3.1.1)."""

    status_check_requested: bool = False
    contactless_not_allowed: bool = False
    zero_amount: bool = False
    cvm_required_exceeded: bool = False
    floor_exceeded: bool = False
    transaction_exceeded: bool = False  # not an indicator of the books: why the application is not allowed


@dataclass(frozen=True, slots=True)
class Activation:
    """What entry point hands over with a selected application (Book B, 3.4)."""

    combination: Combination
    indicators: Indicators
    ttq: bytes | None  # as pre-processing left it
    adf_name: bytes
    label: bytes  # from the directory, if it had one
    fci: bytes  # the whole answer to SELECT


def transaction_objects(
    setup: Setup, request: Request, environment: Environment, activation: Activation
) -> dict[int, bytes]:
    """Every data object that the terminal states, with a fresh unpredictable number. Raises `ConfigurationError`."""
    unpredictable_number = environment.new_unpredictable_number()
    currency = request.amount.currency
    objects: dict[int, bytes] = {
        **_stated_by_terminal(setup.terminal),
        **_stated_by_terminal(activation.combination.tags, activation.combination.kernel),
        Tag.AID: activation.combination.aid,
        Tag.AMOUNT_AUTHORISED: bcd(request.amount.minor, 6),
        Tag.AMOUNT_OTHER: bcd(request.amount_other_minor, 6),
        Tag.AMOUNT_AUTHORISED_BINARY: _binary(request.amount.minor),
        Tag.AMOUNT_OTHER_BINARY: _binary(request.amount_other_minor),
        Tag.TRANSACTION_CURRENCY_CODE: bcd(currency.number, 2),
        Tag.TRANSACTION_CURRENCY_EXPONENT: bcd(currency.exponent, 1),
        Tag.TRANSACTION_DATE: bytes.fromhex(f"{request.date:%y%m%d}"),
        Tag.TRANSACTION_TIME: bytes.fromhex(f"{request.time:%H%M%S}"),
        Tag.TRANSACTION_TYPE: bytes((request.transaction_type,)),
        Tag.UNPREDICTABLE_NUMBER: unpredictable_number,
        Tag.TVR: bytes(Tag.TVR.length_max),
        Tag.POS_ENTRY_MODE: CONTACTLESS_ENTRY_MODE,
        **request.objects,
    }
    if activation.ttq is not None:
        objects[Kernel3Tag.TTQ] = activation.ttq
    floor = activation.combination.limits.terminal_floor
    if floor is not None:
        objects[Tag.TERMINAL_FLOOR_LIMIT] = _binary(floor)
    return {int(tag): value for tag, value in objects.items()}


def _stated_by_terminal(objects: Mapping[int, bytes], kernel: int | None = None) -> dict[int, bytes]:
    """Without what stands in for a card's object, as a default DDOL does: the card's own must not be hidden by it."""
    return {
        tag: value
        for tag, value in objects.items()
        if (definition := lookup(tag, kernel)) is None or definition.source is not Source.CARD
    }


def _binary(amount_minor: int) -> bytes:
    """An amount in format b; one that four bytes cannot state is stated as the most they can."""
    return min(amount_minor, 0xFFFF_FFFF).to_bytes(4, "big")


def bcd(number: int, size: int) -> bytes:
    """A number in format n, `size` bytes."""
    return bytes.fromhex(f"{number:0{2 * size}d}")

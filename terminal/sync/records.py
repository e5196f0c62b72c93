"""Holding the ledger against Stripe's records (docs/reconciliation.md).

Stripe books nothing, it is told. So it is compared last, and only what is through: a sale of which a report still
waits, or is laid aside, is no difference. Which terminal a record is of cannot be asked for; records of others are
passed over. Nothing is repaired here: the 24 hours in which a repetition is safe are over by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol
from uuid import UUID

SALES_MAX: Final = 20_000  # in one comparison: the newest ones
DIFFERENCES_MAX: Final = 100
_PAGE: Final = 100
_SKEW_MS: Final = 3_600_000  # between this clock and Stripe's

_GUARANTEED: Final = frozenset({"approved", "settled", "completing"})
_FAILED: Final = frozenset({"declined", "refused"})
_REMEDY: Final = "look it up in Stripe's dashboard; the ledger is the one that is signed and chained"

Call = Callable[[str, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Recorded:
    """What Stripe says of a sale: minor units."""

    record: str
    sale: UUID
    currency: str
    requested_minor: int
    guaranteed_minor: int
    failed_minor: int
    canceled_minor: int
    refunded_minor: int


class Register(Protocol):
    """Where records can be listed."""

    def recorded(self, *, created_after_ms: int | None) -> Iterator[Recorded]:
        """Records made since then, in any order. Raises `NotListed`."""


@dataclass(slots=True)
class _Sale:
    number: int
    state: str
    amount_minor: int
    currency: str
    refunded_minor: int = 0


def compare(ask: Call, queue: Call, register: Register, first: int, last: int) -> dict[str, Any]:
    """Sales `first` to `last` against Stripe's records. Raises `NotListed`, `ControlError`."""
    first = max(first, last - SALES_MAX + 1)
    sales, since_ms = _sales(ask, first, last)
    # In this order: what waits no more when it is looked for has arrived before Stripe is asked.
    waiting = _waiting(queue)
    under_way = [id_ for id_ in sales if id_ in waiting]
    open_ = {id_: sale for id_, sale in sales.items() if id_ not in waiting}
    compared = 0
    suspects: list[tuple[UUID, _Sale, Recorded | None, str]] = []
    for record in (
        register.recorded(created_after_ms=None if since_ms is None else since_ms - _SKEW_MS) if open_ else ()
    ):
        sale = open_.pop(record.sale, None)
        if sale is None:
            continue
        compared += 1
        if (meaning := _wrong(sale, record)) is not None:
            suspects.append((record.sale, sale, record, meaning))
        if not open_:
            break
    missing = "Stripe has no record of it: sold before Stripe was set up here, or somebody removed the report"
    suspects += [(id_, sale, None, missing) for id_, sale in open_.items()]
    suspects.sort(key=lambda each: each[1].number)
    differences = []
    again, _ = _sales(ask, suspects[0][1].number, last) if suspects else ({}, None)
    for id_, sale, found, meaning in suspects[:DIFFERENCES_MAX]:
        if again.get(id_) != sale:
            under_way.append(id_)  # something has become of it meanwhile
        else:
            differences.append(_difference(id_, sale, found, meaning))
    return {
        "first": first,
        "compared": compared + len(open_),
        "under_way": len(under_way),
        "differences": differences,
        "more": len(suspects) > DIFFERENCES_MAX,
    }


def _sales(ask: Call, first: int, last: int) -> tuple[dict[UUID, _Sale], int | None]:
    """What Stripe must have been told of, refunds of later numbers included; and when the first was opened."""
    sales: dict[UUID, _Sale] = {}
    since_ms: int | None = None
    following: int | None = first
    while following is not None:
        page = ask("reconcile.standings", {"first": following, "limit": _PAGE})
        since_ms = page["opened_at_ms"] if following == first else since_ms
        for each in page["standings"]:
            if not each["sent"] or not each["answered"]:
                continue
            if each["of"] is not None:
                sale = sales.get(UUID(each["of"]))
                if sale is not None and each["state"] in _GUARANTEED:
                    sale.refunded_minor += each["amount_minor"]
            elif each["number"] <= last:
                sales[UUID(each["id"])] = _Sale(each["number"], each["state"], each["amount_minor"], each["currency"])
        following = page["next"]
    return sales, since_ms


def _waiting(queue: Call) -> set[UUID]:
    """Sales of which a report is not through."""
    found: set[UUID] = set()
    after = None
    while True:
        page = queue("queue.list", {"destination": "stripe", "after": after})
        found |= {UUID(item["transaction"]) for item in page["items"]}
        if (after := page["more"]) is None:
            return found


def _wrong(sale: _Sale, record: Recorded) -> str | None:
    """What does not fit, in words."""
    amount = sale.amount_minor
    if (record.requested_minor, record.currency) != (amount, sale.currency):
        return "Stripe has another amount of it"
    match sale.state:
        case state if state in _GUARANTEED:
            # What was refunded may count as guaranteed still, or no more.
            fits = record.guaranteed_minor in {amount, amount - record.refunded_minor}
            whole = record.refunded_minor == amount
            if not (fits or whole) or record.failed_minor or record.canceled_minor:
                return "sold here, and not guaranteed at Stripe"
            if record.refunded_minor != sale.refunded_minor:
                return "what was paid back differs"
        case state if state in _FAILED:
            if record.failed_minor != amount:
                return "declined by the host, and not failed at Stripe"
        case "reversed":
            if amount not in {record.canceled_minor, record.refunded_minor, record.failed_minor}:
                return "taken back here, and neither canceled nor refunded at Stripe"
        case _:
            pass  # the host has the next word
    return None


def _difference(id_: UUID, sale: _Sale, found: Recorded | None, meaning: str) -> dict[str, Any]:
    theirs = None
    if found is not None:
        words = ("guaranteed", "failed", "canceled", "refunded")
        said = [f"{word} {minor}" for word in words if (minor := getattr(found, f"{word}_minor"))]
        theirs = {
            "state": ", ".join(said) or "open",
            "amount_minor": found.requested_minor,
            "currency": found.currency,
            "record": found.record,
        }
    return {
        "sequence": sale.number,
        "transaction": str(id_),
        "ours": {
            "state": sale.state,
            "amount_minor": sale.amount_minor,
            "currency": sale.currency,
            "refunded_minor": sale.refunded_minor,
        },
        "theirs": theirs,
        "meaning": meaning,
        "remedy": _REMEDY,
    }

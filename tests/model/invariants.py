"""What must hold in every world (`broken`), and where everything comes to rest (`unfinished`). Both say it in words."""

from __future__ import annotations

from itertools import pairwise

from model.world import ANSWERED, APART, HANDED, NONE, SOLD, Item, Sale, World

PAID = ("approved", "settled")


def broken(world: World) -> str | None:
    """The first promise that does not hold in this world, whatever may still come."""
    for number, sale in enumerate(world.sales, 1):
        if (what := _broken(sale)) is not None:
            return f"sale {number}: {what}"
    for sale, refund in pairwise(world.sales):
        if (sale.host.state, refund.host.state, refund.kind) == ("reversed", "booked", "refund"):
            return "the customer is paid back twice, by a reversal and by a refund"
    return None


def unfinished(world: World) -> str | None:
    """Why a world in which nothing more happens by itself is not one to rest in."""
    if not world.up or any(sale.at_till for sale in world.sales):
        return "the terminal is stuck"
    for number, sale in enumerate(world.sales, 1):
        if sale.ledger and (what := _unfinished(sale)) is not None:
            return f"sale {number}: {what}"
    return None


def _broken(sale: Sale) -> str | None:
    if sale.host.bookings > 1:
        return "booked twice"
    if sale.stripe.made > 1:
        return "two payment records at Stripe"
    if sale.told in ("approved", "accepted") and sale.ledger not in SOLD and not sale.alert:
        if sale.ledger in ("opened", "authorising", "completing"):
            return f"the customer was told {sale.told} before that was committed"
        return f"the customer was told {sale.told}, it is {sale.ledger}, and nobody is alerted"
    if sale.told == "declined" and sale.ledger in SOLD:
        return f"the customer was told declined, and it is {sale.ledger}"
    return _lost(sale)


def _lost(sale: Sale) -> str | None:
    """Nothing waits that no list shows: the terminal's of what it has not handed over, or sync's queue."""
    if sale.ledger in ("authorising", "accepted", "reversing") and not any(
        item.outbox not in (NONE, ANSWERED) for item in sale.items
    ):
        return f"it is {sale.ledger}, and nothing asks the host"
    guaranteed = sale.item("guaranteed")
    if guaranteed is not None and sale.ledger not in (*PAID, "completing", "reversing", "reversed"):
        return f"Stripe is told that it is guaranteed, and it is {sale.ledger}"
    for item in sale.items:
        if item.outbox == HANDED and (item.row is None or item.row.state == "delivered"):
            return f"{item.event} has been handed over, the terminal has no answer to it, and no queue lists it"
    return None


def _unfinished(sale: Sale) -> str | None:
    if sale.ledger in ("authorising", "completing", "accepted", "reversing"):
        return f"for ever {sale.ledger}"
    return _misbooked(sale) or _waits_for_ever(sale) or _misreported(sale)


def _misbooked(sale: Sale) -> str | None:
    """Host, ledger and customer must have heard the same, or a person must have been told that they have not."""
    paid = sale.ledger in PAID
    if (sale.host.state == "booked") != paid:
        return f"the host's books say {sale.host.state or 'nothing'}, the ledger {sale.ledger}"
    told_paid = sale.told in ("approved", "accepted")
    if told_paid != paid and not (told_paid and sale.alert):
        return f"{'paid' if paid else 'not paid'}, and the customer was told {sale.told or 'nothing'}"
    return None


def _waits_for_ever(sale: Sale) -> str | None:
    for item in sale.items:
        if item.outbox not in (NONE, ANSWERED):
            return f"{item.event} is never answered"
        if item.row is None or item.row.state == "delivered" or _behind_held(sale, item):
            continue
        if item.row.state not in APART:
            return f"{item.event} stays {item.row.state} for ever"
        if item.to == "host":
            return f"{item.event} waits for a person, though repeating it is safe"
    return None


def _behind_held(sale: Sale, item: Item) -> bool:
    """A notice that waits for an earlier one that a person has to decide on."""
    earlier = sale.items[: sale.items.index(item)]
    return item.to == "stripe" and any(
        one.row is not None and one.row.state in APART for one in earlier if one.to == "stripe"
    )


def _misreported(sale: Sale) -> str | None:
    """Stripe must say what the ledger says, unless something is held for a person, who is asked to look."""
    notices = [item for item in sale.items if item.to == "stripe" and item.row is not None]
    if not notices or any(item.row is not None and item.row.state in APART for item in notices):
        return None
    allowed = {
        "approved": {"guaranteed"},
        "settled": {"guaranteed"},
        "declined": {"failed"},
        "refused": {"failed"},
        "reversed": {"canceled", "refunded"},
    }[sale.ledger]
    if sale.stripe.state not in allowed:
        return f"Stripe says {sale.stripe.state or 'nothing'}, the ledger {sale.ledger}"
    return None

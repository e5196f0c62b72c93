"""Do the terminal's ledger and the host's books agree? The oracle of demonstrations and tests.

Written from the promises, not from the code: each sale that the terminal holds as sold is booked at the host exactly
once with its amount, nothing else is, and what still waits is a difference until it has arrived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

SOLD: Final = frozenset({"approved", "settled"})
WAITING: Final = frozenset({"opened", "authorising", "accepted", "reversing"})
TAKEN_BACK: Final = frozenset({"reversed"})


def differences(ledger: Sequence[Mapping[str, Any]], bookings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What does not agree, a sentence each; empty when the books balance."""
    found = []
    booked = {entry["transaction"]: entry for entry in bookings}
    if len(booked) != len(bookings):
        found.append("the host holds a transaction more than once")
    for sale in ledger:
        entry = booked.pop(sale["id"], None)
        name = f"sale {sale['sequence']} ({sale['amount_minor']} {sale['currency']}, {sale['state']})"
        if sale["state"] in WAITING:
            found.append(f"{name} still waits")
        elif (at_host := entry["state"] if entry else "unknown") not in _expected(sale["state"]):
            found.append(f"{name} is {at_host} at the host")
        if entry and (entry["amount"], entry["currency"]) != (sale["amount_minor"], sale["currency"]):
            found.append(f"{name} is booked with {entry['amount']} {entry['currency']}")
    return found + [f"the host holds {unknown}, which the terminal does not know" for unknown in booked]


def _expected(state: str) -> frozenset[str]:
    """How a sale in this state may stand at the host."""
    if state in SOLD:
        return frozenset({"booked"})
    if state in TAKEN_BACK:
        return frozenset({"reversed", "tombstone"})
    return frozenset({"unknown", "declined"})

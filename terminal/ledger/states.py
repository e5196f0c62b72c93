"""The life of a transaction, as one table.

Nothing else changes a state: every commit asks `advance` first, and so does every replay of the journal. A reversal for
time-out or recovery fits only while no answer has come; so a time-out and an answer that race for the same transaction
cannot both win, whoever comes second is told so.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from terminal.ledger.errors import IllegalTransition


class State(StrEnum):
    OPENED = "opened"
    AUTHORISING = "authorising"
    """The host is asked; nothing has been promised to anyone."""
    ACCEPTED = "accepted"
    """Accepted here without the host, at the merchant's risk."""
    DECLINED = "declined"
    VOID = "void"
    """Ended before the card gave a cryptogram."""
    COMPLETING = "completing"
    """Approved by the host, but the inserted card has not yet said that it agrees."""
    APPROVED = "approved"
    """Approved by the host while the customer waited."""
    SETTLED = "settled"
    """Accepted here, and later approved by the host."""
    REFUSED = "refused"
    """Accepted here, and later declined by the host: the merchant's loss."""
    REVERSING = "reversing"
    REVERSED = "reversed"


class Change(StrEnum):
    ONLINE = "outcome online"
    ACCEPTED = "outcome accepted"
    DECLINED = "outcome declined"
    VOID = "outcome void"
    COMPLETED = "outcome completed"
    HOST_APPROVED = "answer approved"
    HOST_APPROVED_CARD_WAITS = "answer approved while the card waits"
    HOST_DECLINED = "answer declined"
    HOST_REVERSED = "answer reversed"
    TIMED_OUT = "reversal timeout"
    RECOVERED = "reversal recovered"
    VOIDED = "reversal void"
    CARD_REFUSED = "reversal card"


_TABLE: Final = {
    (State.OPENED, Change.ONLINE): State.AUTHORISING,
    (State.OPENED, Change.ACCEPTED): State.ACCEPTED,
    (State.OPENED, Change.DECLINED): State.DECLINED,
    (State.OPENED, Change.VOID): State.VOID,
    (State.AUTHORISING, Change.HOST_APPROVED): State.APPROVED,
    (State.AUTHORISING, Change.HOST_APPROVED_CARD_WAITS): State.COMPLETING,
    (State.COMPLETING, Change.COMPLETED): State.APPROVED,
    (State.COMPLETING, Change.CARD_REFUSED): State.REVERSING,
    (State.COMPLETING, Change.RECOVERED): State.REVERSING,
    (State.AUTHORISING, Change.CARD_REFUSED): State.REVERSING,
    (State.AUTHORISING, Change.HOST_DECLINED): State.DECLINED,
    (State.AUTHORISING, Change.ACCEPTED): State.ACCEPTED,
    (State.AUTHORISING, Change.TIMED_OUT): State.REVERSING,
    (State.AUTHORISING, Change.RECOVERED): State.REVERSING,
    (State.AUTHORISING, Change.VOIDED): State.REVERSING,
    (State.ACCEPTED, Change.HOST_APPROVED): State.SETTLED,
    (State.ACCEPTED, Change.HOST_DECLINED): State.REFUSED,
    (State.ACCEPTED, Change.VOIDED): State.REVERSING,
    (State.APPROVED, Change.VOIDED): State.REVERSING,
    (State.SETTLED, Change.VOIDED): State.REVERSING,
    (State.REVERSING, Change.HOST_APPROVED): State.REVERSING,
    (State.REVERSING, Change.HOST_DECLINED): State.REVERSING,
    (State.REVERSING, Change.HOST_REVERSED): State.REVERSED,
}

FINAL: Final = frozenset(State) - {state for state, _ in _TABLE}
"""States that nothing leaves."""

SOLD: Final = frozenset({State.ACCEPTED, State.APPROVED, State.SETTLED})
"""The customer has paid, as far as this terminal knows: these are shown as approved and counted in the totals."""

LOST: Final = frozenset({State.REFUSED})
"""Promised to a customer, and the host has said no since: somebody has to know."""

AT_RISK: Final = frozenset({State.OPENED, State.AUTHORISING, State.ACCEPTED})
"""What counts against the offline limits: accepted without the host's word, or perhaps about to be."""


def advance(state: State, change: Change) -> State:
    """The state after `change`. Raises `IllegalTransition` for everything that is not in the table."""
    try:
        return _TABLE[state, change]
    except KeyError:
        raise IllegalTransition(state, change) from None

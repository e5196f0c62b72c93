"""A terminal with a planted bug, for the tests: it shows "approved" before the sale is committed."""

from __future__ import annotations

from drivers.interfaces import CardChannel
from hwsim.__main__ import main
from terminal.emv.outcome import Approved, Declined, OnlineRequest
from terminal.ledger.values import Transaction
from terminal.ui import flow, screens

honest = flow.Flow._decide


def show_first(
    self: flow.Flow, transaction: Transaction, outcome: Approved | Declined | OnlineRequest, channel: CardChannel
) -> Transaction:
    if not isinstance(outcome, Declined):
        self._panel.show(screens.Approved(transaction.amount, "Visa", outcome.card.pan.last4))
    return honest(self, transaction, outcome, channel)


flow.Flow._decide = show_first  # type: ignore[method-assign]

if __name__ == "__main__":
    main()

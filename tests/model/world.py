"""Everything that has a state, as nested frozen tuples: sales with all that belongs to them, the terminal, the budgets.

What survives a power cut and what does not is said at each member. Words are plain strings, the ledger's and the
spool's own: they are compared and hashed some ten million times, which an Enum in Python does at a tenth of the speed.
"""

from __future__ import annotations

from typing import Final, NamedTuple

# A row's attempt, in flight or in the memory of the sync service.
NONE: Final = ""
OUT: Final = "out"  # the request has left
FORGED: Final = "forged"  # an answer that is not the host's

# Where the terminal has an item.
WAITING: Final = "waiting"  # durable, and offered to sync
HANDED: Final = "handed over"  # not offered until the next start
ANSWERED: Final = "answered"  # durable

FETCHED: Final = "fetched"  # only of a faulty sync service: acknowledged, and not stored yet

# Whether a sale was shown.
NOTED: Final = "noted"  # not flushed
DURABLE: Final = "durable"

SOLD: Final = frozenset({"accepted", "approved", "settled"})
APART: Final = frozenset({"refused", "held"})


class Row(NamedTuple):
    """A row of the spool, durable, and what is under way of it."""

    state: str = "queued"
    key: int = 0  # the idempotency key; a sound spool never has a second one
    answer: str = NONE  # stored here
    attempt: str = NONE  # not durable: OUT, what comes back, or what the terminal said to the answer
    stray: bool = False  # the request of an attempt that was given up may still arrive
    old: bool = False  # first sent longer ago than the destination remembers keys


class Item(NamedTuple):
    """One event for one destination, from the terminal's outbox to the spool."""

    event: str
    to: str = "host"
    outbox: str = NONE  # of a notice: always NONE, for the spool makes it itself
    row: Row | None = None


class Account(NamedTuple):
    """The host's books on one transaction, durable."""

    state: str = NONE  # booked, declined, tombstone, reversed
    bookings: int = 0  # how often money was moved
    answers: tuple[tuple[str, int, str], ...] = ()  # event, key, answer


class Records(NamedTuple):
    """What Stripe has of one sale."""

    made: int = 0  # payment records
    state: str = NONE
    keys: tuple[tuple[str, int], ...] = ()  # remembered for a day


class Sale(NamedTuple):
    """One transaction and everything that belongs to it."""

    kind: str = "tap"  # or "chip", "refund" (of the sale before it)
    ledger: str = NONE  # durable, but for "opened"
    at_till: bool = False  # not durable: the terminal serves this customer
    told: str = NONE  # approved, accepted or declined: what the customer, or a person at the till, saw last
    shown: str = NONE  # the ledger's note of that: NOTED is durable with the next sale's commit, at the latest
    alert: bool = False  # durable: what was sold is not, and a person is to be told
    items: tuple[Item, ...] = ()
    host: Account = Account()
    stripe: Records = Records()

    def item(self, event: str) -> Item | None:
        for item in self.items:
            if item.event == event:
                return item
        return None


class World(NamedTuple):
    """The whole of it."""

    sales: tuple[Sale, ...]
    up: bool = True  # the terminal runs
    faults: int = 0  # how many more may happen
    acts: int = 0  # how often a person may still interfere, with no need

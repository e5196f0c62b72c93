"""What may happen to a sale and to a row of the spool, written down a second time: from the story, not from the code.

Each table is in the order of the story that it tells. The code's tables must be these and the remainders: edges that
the code has for what the model leaves out. A remainder is no place to put an edge that a test complains about: it says
who takes it and why the promises hold all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

Table = Mapping[tuple[str, str], str]

LEDGER: Final[Table] = {
    # A card is asked for, and read.
    ("opened", "outcome void"): "void",
    ("opened", "outcome declined"): "declined",
    ("opened", "outcome accepted"): "accepted",
    ("opened", "outcome online"): "authorising",
    # The customer waits for the host.
    ("authorising", "answer approved"): "approved",
    ("authorising", "answer declined"): "declined",
    ("authorising", "outcome accepted"): "accepted",
    ("authorising", "reversal timeout"): "reversing",
    ("authorising", "reversal recovered"): "reversing",
    # An inserted card has the last word.
    ("authorising", "answer approved while the card waits"): "completing",
    ("completing", "outcome completed"): "approved",
    ("completing", "reversal card"): "reversing",
    ("completing", "reversal recovered"): "reversing",
    # Accepted at the merchant's risk; the host hears of it later.
    ("accepted", "answer approved"): "settled",
    ("accepted", "answer declined"): "refused",
    # A person takes back what was sold.
    ("accepted", "reversal void"): "reversing",
    ("approved", "reversal void"): "reversing",
    ("settled", "reversal void"): "reversing",
    # Nothing but the host's word ends a reversal; what it said to the sale no longer counts.
    ("reversing", "answer approved"): "reversing",
    ("reversing", "answer declined"): "reversing",
    ("reversing", "answer reversed"): "reversed",
}

LEDGER_REMAINDER: Final[Mapping[tuple[str, str, str], str]] = {
    ("authorising", "reversal card", "reversing"): (
        "an inserted card that refuses before the host has answered; payment gives the reason timeout there, and both "
        "lead to the same place"
    ),
    ("authorising", "reversal void", "reversing"): (
        "a person who cancels while the host is asked; the same as a time-out at that moment, and nothing does it yet"
    ),
}

SPOOL: Final[Table] = {
    # The first attempt.
    ("queued", "send"): "sending",
    ("sending", "not taken"): "queued",
    ("sending", "refuse"): "refused",
    ("sending", "unsure"): "ambiguous",
    ("sending", "restart"): "ambiguous",
    ("sending", "answer"): "answered",
    # Every other one.
    ("ambiguous", "send"): "ambiguous",
    ("ambiguous", "not taken"): "ambiguous",
    ("ambiguous", "refuse"): "refused",
    ("ambiguous", "unsure"): "ambiguous",
    ("ambiguous", "answer"): "answered",
    # The answer's way to the terminal.
    ("answered", "deliver"): "delivered",
    ("answered", "undelivered"): "answered",
    ("answered", "disbelieve"): "ambiguous",
    # People, and repetitions that are no longer safe.
    ("queued", "hold"): "held",
    ("ambiguous", "hold"): "held",
    ("held", "retry"): "ambiguous",
    ("refused", "retry"): "ambiguous",
}

SPOOL_REMAINDER: Final[Mapping[tuple[str, str, str], str]] = {
    ("delivered", "offered again", "ambiguous"): (
        "a terminal that was restored from a backup has lost the answer; the host repeats it under the same key. The "
        "model's terminal loses nothing that is durable"
    ),
    ("delivered", "hold", "held"): "a terminal that was restored made another envelope for the same event: never sent",
    ("refused", "hold", "held"): "as before, of one that the destination had refused",
}

"""What Stripe is told of a sale, and when: the spool's follower.

A sale is reported when its envelope is stored, and its end when the terminal has committed the host's answer. What
Stripe's requests look like is `destinations.stripe`'s; here is only what leads to which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from uuid import UUID

from terminal.sync.destinations import stripe
from terminal.sync.spool import Moment, OutboxItem, Told

_REPORTS: Final = "authorisation"


class StripeFollower:
    """Implements `Follower`."""

    name = "stripe"

    def stored(self, item: OutboxItem, at: Moment) -> Sequence[Told]:
        facts = stripe.facts_of(item.envelope) if item.event == _REPORTS else None
        if facts is None or facts.refund is not None:
            return ()
        return (_told(stripe.Event.REPORTED, facts, at),)

    def settled(self, event: str, envelope: str, state: str, at: Moment, known: frozenset[str]) -> Sequence[Told]:
        facts = stripe.facts_of(envelope)
        if facts is None or (what := stripe.event_of(facts, state, known)) is None:
            return ()
        return (_told(what, facts, at),)

    def subject(self, event: str, envelope: str) -> UUID | None:
        facts = stripe.facts_of(envelope)
        return None if facts is None else facts.sale


def _told(event: stripe.Event, facts: stripe.EnvelopeFacts, at: Moment) -> Told:
    body = stripe.body_of(event, facts, at_ms=at.wall_ms, clock_synchronised=at.synchronised)
    # Only the report is money that waits; what follows says what became of it.
    reports = event is stripe.Event.REPORTED
    return Told(
        facts.sale,
        stripe.word_of(event, facts),
        body,
        amount_minor=facts.amount_minor if reports else None,
        currency=facts.currency if reports else None,
    )

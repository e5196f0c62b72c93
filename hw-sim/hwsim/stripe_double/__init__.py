"""Stripe, simulated but real on the wire: payment records as far as they are documented, and nothing else.

It checks each request against the types of the official library, keeps idempotency keys for 24 hours and then forgets
them, books what it is told to book twice, and can be made to fail in every way that Stripe says it may. Where the
documentation is silent it is strict: what it takes, Stripe should take, not the other way round. It shares no code with
the terminal.
"""

from hwsim.stripe_double.api import Request, Response, StripeDouble
from hwsim.stripe_double.books import Booking, State
from hwsim.stripe_double.faults import Delay, DropAnswer, Fail, Garbage, When
from hwsim.stripe_double.server import StripeServer, open_double

__all__ = [
    "Booking",
    "Delay",
    "DropAnswer",
    "Fail",
    "Garbage",
    "Request",
    "Response",
    "State",
    "StripeDouble",
    "StripeServer",
    "When",
    "open_double",
]

"""What can go wrong, and the plan that draws it: the same seed gives the same faults in the same order.

Connections and exchanges (a request and its answer) are counted apart and draw from streams of their own, so a client
that connects once more does not shift what happens to its exchanges. A draw carries a seed for its particulars (where
to cut, which status): how much of it a fault uses does not shift the next draw either. Nothing here does I/O.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

STORM_MAX: Final = 8  # exchanges; a client that gives up after three attempts must meet longer ones


class Fault(Enum):
    """What the network does to a connection or to an exchange."""

    PASS = "pass"  # noqa: S105 - a mode of the proxy
    REFUSE = "refuse"  # nobody listens, and running connections are reset; drawn for one connection: it is reset
    BLACK_HOLE = "black_hole"  # connections are accepted, bytes vanish
    DROP_REQUEST = "drop_request"  # the server gets half of the request, the client gets nothing
    RESTART = "restart"  # the same, but both sides are reset: the host restarts in the middle of it
    DROP_AFTER_REQUEST = "drop_after_request"  # the request arrives and is worked on, then the client is reset
    DROP_ANSWER = "drop_answer"  # the same, but the client waits for ever
    DELAY = "delay"  # request or answer come late
    REORDER = "reorder"  # request or answer wait until another exchange has overtaken them
    SLOW_LORIS = "slow_loris"  # the answer drips byte by byte
    DUPLICATE = "duplicate"  # the server gets the request twice, at the same time
    TRUNCATE = "truncate"  # the answer ends in the middle, politely
    GARBAGE = "garbage"  # random bytes where the answer should be
    WRONG_TYPE = "wrong_type"  # the request is worked on; a gateway answers 200 with a page of its own
    OVERSIZED = "oversized"  # the request is worked on; the answer does not end
    STATUS_4XX = "4xx"  # a gateway refuses; the server gets nothing
    STATUS_5XX = "5xx"  # 500 and 504: the request was worked on; 502 and 503: it never arrived
    CAPTIVE_PORTAL = "captive_portal"  # somebody else's log-in page, or the way to it; the server gets nothing
    CERTIFICATE_EXPIRED = "certificate_expired"
    CERTIFICATE_WRONG_NAME = "certificate_wrong_name"
    CERTIFICATE_UNTRUSTED = "certificate_untrusted"  # of an authority that nobody knows
    CERTIFICATE_CHANGED = "certificate_changed"  # renewed with another key; a client must not mind


# What needs no look at the HTTP inside. Here a connection draws, once, and what it draws befalls its first request.
TRANSPARENT: Final = frozenset(
    {
        Fault.REFUSE,
        Fault.BLACK_HOLE,
        Fault.DROP_REQUEST,
        Fault.RESTART,
        Fault.DROP_AFTER_REQUEST,
        Fault.DROP_ANSWER,
        Fault.DELAY,
        Fault.REORDER,
        Fault.SLOW_LORIS,
    }
)
CERTIFICATES: Final = frozenset(
    {
        Fault.CERTIFICATE_EXPIRED,
        Fault.CERTIFICATE_WRONG_NAME,
        Fault.CERTIFICATE_UNTRUSTED,
        Fault.CERTIFICATE_CHANGED,
    }
)
# What befalls a whole connection even where exchanges can be told apart; all others are drawn by exchanges there.
OF_CONNECTIONS: Final = frozenset({Fault.REFUSE, Fault.BLACK_HOLE}) | CERTIFICATES
STORMS: Final = frozenset({Fault.STATUS_4XX, Fault.STATUS_5XX})
ALL: Final = frozenset(Fault) - {Fault.PASS}


@dataclass(frozen=True, slots=True)
class Severity:
    """How bad the faults are. The values suit a client that gives an answer about 15 s; shorten them for tests."""

    delay_ms_max: int = 400
    drip_ms: int = 50  # from byte to byte
    overtake_ms_max: int = 500  # an exchange that nobody overtakes goes on after so long
    oversized_bytes: int = 64 * 1024 * 1024  # for a client that reads whatever comes: it ends some time
    retry_after_s_max: int = 3
    status: int | None = None  # instead of a drawn one
    retry_after_s: int | None = None  # with `status`


@dataclass(frozen=True, slots=True)
class Draw:
    """What happens to one connection or exchange."""

    fault: Fault
    seed: int = 0

    def particulars(self) -> random.Random:
        """Where, how long, which: the same every time it is asked for."""
        return random.Random(self.seed)


class Plan:
    """A seeded sequence of faults. `rate` is the share of connections, and of exchanges, that something happens to."""

    def __init__(self, seed: int, weights: Mapping[Fault, float], *, rate: float = 0.3) -> None:
        """Raises `ValueError` for weights or a rate that make no sense."""
        if not 0 <= rate <= 1:
            raise ValueError(f"a rate lies between 0 and 1, not at {rate}")
        if Fault.PASS in weights or any(weight <= 0 for weight in weights.values()):
            raise ValueError("weights are greater than 0 and those of faults: what passes is said by the rate")
        self.seed = seed
        self.rate = rate
        self.faults = frozenset(weights)
        self._weights = dict(weights)
        self._bare_connections = self._stream("connections", TRANSPARENT)
        self._connections = self._stream("connections", OF_CONNECTIONS)
        self._exchanges = self._stream("exchanges", ALL - OF_CONNECTIONS)

    def connection(self, *, terminating: bool) -> Draw:
        """For the next connection."""
        return (self._connections if terminating else self._bare_connections).draw()

    def exchange(self) -> Draw:
        """For the next exchange."""
        return self._exchanges.draw()

    @classmethod
    def always(cls, fault: Fault, seed: int = 0) -> Plan:
        """Nothing but this."""
        return cls(seed, {} if fault is Fault.PASS else {fault: 1.0}, rate=1.0)

    def _stream(self, name: str, among: frozenset[Fault]) -> _Stream:
        weights = {fault: self._weights[fault] for fault in Fault if fault in among & self.faults}  # in a fixed order
        return _Stream(random.Random(f"{self.seed}/{name}"), weights, self.rate)


class _Stream:
    """Draws one after the other. A storm's draws are alike, so that its status stays the same."""

    def __init__(self, source: random.Random, weights: Mapping[Fault, float], rate: float) -> None:
        self._source = source
        self._faults = list(weights)
        self._weights = list(weights.values())
        self._rate = rate
        self._storm: list[Draw] = []  # what is still to come of it

    def draw(self) -> Draw:
        if self._storm:
            return self._storm.pop()
        if not self._faults or self._source.random() >= self._rate:
            return _NOTHING
        (fault,) = self._source.choices(self._faults, self._weights)
        draw = Draw(fault, self._source.getrandbits(64))
        if fault in STORMS:
            self._storm = [draw] * (self._source.randint(1, STORM_MAX) - 1)
        return draw


_NOTHING: Final = Draw(Fault.PASS)

"""What the tests of Stripe share: envelopes and their notices, the double, an oracle, and a queue kept honestly."""

from __future__ import annotations

import base64
import contextlib
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl
from uuid import UUID

from sync_rig import FakeClock, seeded

from hwsim.stripe_double import StripeDouble, StripeServer, open_double
from hwsim.stripe_double.server import KEY_FILE, twice
from terminal.sync.destinations import Answered, Destination, Parcel, Refused
from terminal.sync.destinations.stripe import (
    ApiKey,
    EnvelopeFacts,
    Event,
    StripeDestination,
    StripeSettings,
    body_of,
    facts_of,
    word_of,
)

HOUR_MS: Final = 3_600_000
OPENED_MS: Final = 1_799_999_990_000  # shortly before the clock of the rig starts
LIFE: Final = (Event.REPORTED, Event.GUARANTEED, Event.REFUNDED)


def envelope(number: int = 1, event: str = "authorisation", **changed: Any) -> str:
    """As the terminal makes it, card data and all; who signed it does not matter here."""
    payload = {
        "v": 1,
        "event": event,
        "transaction": str(UUID(int=number)),
        "terminal": "T-0001",
        "merchant": "M-1",
        "epoch": 1,
        "number": number + 7,
        "kind": "sale",
        "amount": 1_000 + number,
        "currency": "EUR",
        "opened_at": OPENED_MS,
        "clock_synchronised": True,
        "sequence": number,
        "deferred": False,
        "kernel": 3,
        "scheme": "visa",
        "oda": "fdda",
        "cvm": "none",
        "host_key": "00" * 8,
        "sealed": "U0VBTEVE",
    } | changed
    head, body = ({"alg": "EdDSA", "typ": "payterm-envelope", "kid": "0"}, payload)
    return ".".join(
        base64.urlsafe_b64encode(part).decode().rstrip("=")
        for part in (json.dumps(head).encode(), json.dumps(body).encode(), b"signature")
    )


def refund_envelope(number: int, *, of: int = 1, amount: int, **changed: Any) -> str:
    return envelope(number, "refund", kind="refund", of=str(UUID(int=of)), amount=amount, **changed)


@dataclass(frozen=True)
class Notice:
    """One thing that Stripe is to be told."""

    event: Event
    facts: EnvelopeFacts
    at_ms: int
    clock_synchronised: bool

    @property
    def word(self) -> str:
        return word_of(self.event, self.facts)

    @property
    def body(self) -> str:
        return body_of(self.event, self.facts, at_ms=self.at_ms, clock_synchronised=self.clock_synchronised)


def notice(
    number: int = 1,
    event: Event = Event.REPORTED,
    *,
    at_ms: int = OPENED_MS + 1_000,
    synchronised: bool = True,
    **changed: Any,
) -> Notice:
    facts = facts_of(envelope(number, **changed))
    assert facts is not None
    return Notice(event, facts, at_ms, synchronised)


def refund(number: int, *, of: int = 1, amount: int) -> Notice:
    facts = facts_of(refund_envelope(number, of=of, amount=amount))
    assert facts is not None
    return Notice(Event.REFUNDED, facts, OPENED_MS + 5_000, True)


def parcel(of: Notice, key: str | None = None, earlier: str | None = None) -> Parcel:
    return Parcel(of.facts.sale, of.word, key or f"key of {of.facts.sale}/{of.word}", of.body, earlier)


def form(body: str) -> dict[str, str]:
    return dict(parse_qsl(body, keep_blank_values=True))


@dataclass
class Item:
    """A row, as the spool keeps it: key and body are fixed when it is made."""

    notice: Notice
    parcel: Parcel
    first_attempt_ms: int | None = None
    attempts: int = 0
    held: str | None = None


@dataclass
class Queue:
    """A spool on one page. What it must show is the destination's part: nothing here repairs what that gets wrong.

    Of one sale an item goes when the one before it is answered; an ambiguous one that is no longer safe to repeat is
    looked up, and set apart for a person if it is not found.
    """

    clock: FakeClock
    destination: Destination
    waiting: dict[UUID, deque[Item]] = field(default_factory=dict)
    apart: list[Item] = field(default_factory=list)
    receipts: dict[UUID, str] = field(default_factory=dict)
    answers: dict[str, Answered] = field(default_factory=dict)
    _made: int = 0

    def tell(self, *notices: Notice) -> None:
        for each in notices:
            self._made += 1
            self.waiting.setdefault(each.facts.sale, deque()).append(Item(each, parcel(each, f"key {self._made}")))

    @property
    def open(self) -> int:
        return sum(len(items) for items in self.waiting.values())

    def round(self, *, pause_ms: int = 2_000) -> None:
        """One attempt for each sale that has something to tell."""
        for sale, items in self.waiting.items():
            if items and items[0].held is None:
                self._attempt(sale, items)
        self.clock.advance(pause_ms)

    def settle(self, rounds: int = 12) -> None:
        for _ in range(rounds):
            self.round()

    def _attempt(self, sale: UUID, items: deque[Item]) -> None:
        item = items[0]
        sent = replace(item.parcel, earlier=self.receipts.get(sale))
        safe_ms = self.destination.repeat_safe_ms
        first_ms = item.first_attempt_ms
        if first_ms is not None and safe_ms is not None and self.clock.wall_ms() - first_ms > safe_ms:
            result = self.destination.look_up(sent, first_attempt_ms=first_ms)
            if result is None:
                item.held = "ambiguous for too long"
                self.apart.append(item)
        else:
            item.first_attempt_ms = first_ms or self.clock.wall_ms()
            item.attempts += 1
            result = self.destination.send(sent)
        if isinstance(result, Answered):
            assert result.receipt is not None
            assert self.receipts.setdefault(sale, result.receipt) == result.receipt, "another payment record"
            self.answers[f"{sale}/{item.notice.word}"] = result
            items.popleft()
        elif isinstance(result, Refused) and result.permanent:
            item.held = result.message
            self.apart.append(item)


@dataclass
class Shop:
    """The double behind its server, on the rig's clock, and the settings to reach it."""

    server: StripeServer
    clock: FakeClock
    settings: StripeSettings

    @property
    def double(self) -> StripeDouble:
        return self.server.double

    @contextlib.contextmanager
    def destination(self, **changed: Any) -> Iterator[StripeDestination]:
        settings = StripeSettings(**({name: getattr(self.settings, name) for name in _SETTINGS} | changed))
        with contextlib.closing(StripeDestination(settings)) as destination:
            yield destination

    def posts(self) -> list[dict[str, str]]:
        return [form(each.body) for each in self.double.requests() if each.method == "POST"]

    def check(self) -> None:
        """Each sale has one payment record; each item went under one key with one body."""
        assert twice(self.double.bookings()) == []
        sent: dict[tuple[str, str], set[str | None]] = {}
        for each in self.double.requests():
            if each.method == "POST":
                sent.setdefault((each.path, each.body), set()).add(each.idempotency_key)
        for request, keys in sent.items():
            assert len(keys) == 1, f"{request} went under {len(keys)} keys"


_SETTINGS: Final = ("key", "base_url", "ca_file", "connect_timeout_ms", "read_timeout_ms", "total_timeout_ms")


@contextlib.contextmanager
def stripe_shop(directory: Path, *, seed: int = 20261028) -> Iterator[Shop]:
    clock = FakeClock()
    double = open_double(directory, now_ms=clock.wall_ms, entropy=seeded(seed))
    with contextlib.closing(double), StripeServer(double, directory) as server:
        key = (directory / "public" / KEY_FILE).read_text(encoding="ascii").strip()
        settings = StripeSettings(
            ApiKey.parse(key, live=False), server.url, server.ca_file, read_timeout_ms=5_000, total_timeout_ms=10_000
        )
        yield Shop(server, clock, settings)

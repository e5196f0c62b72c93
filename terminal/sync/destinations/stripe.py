"""Stripe: sales taken here, reported as payment records through the official library (docs/formats.md, Stripe).

Stripe is told what became of a sale and never what card it was. What it is told is made from the clear part of a signed
envelope (`facts_of`), which is read into a type that has no place for card data, and from what happened (`event_of`);
the text of the request (`body_of`) is made once, when the spool takes it over. From then on key and parameters are
fixed; only the payment record's id in the path is filled in later, and it too never changes, for it is Stripe's answer
to the sale's own first report.

Stripe repeats a result under the same key for 24 hours and may then forget the key: the same request books again. So
`repeat_safe_ms` ends before that, and what is still ambiguous then is looked up (`look_up`), never sent. When something
is sent, and in what order, is left to the spool.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import time
from base64 import urlsafe_b64decode
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast
from urllib.parse import urlsplit
from uuid import UUID

import msgspec
import requests
import stripe
from urllib3.exceptions import HTTPError

from terminal.ledger.keys import KeyStore
from terminal.money import AMOUNT_MINOR_MAX
from terminal.sync.destinations import Answered, Busy, NotSent, Parcel, Refused, Result, Unsure
from terminal.sync.destinations.session import open_session
from terminal.sync.destinations.wire import (
    IDLE_MAX_MS,
    Exchange,
    explain,
    read_bounded,
    retry_after_ms,
)
from terminal.sync.errors import NotListed, Unsendable
from terminal.sync.records import Recorded

STRIPE_KEY: Final = "stripe-key"  # the credential's name
API_VERSION: Final = "2026-10-28.endive"  # pinned: a newer library must not change what is sent, or how it is read
REPEAT_SAFE_MS: Final = 23 * 3_600_000  # keys live for 24 hours from when Stripe first saw them; an hour is for clocks

_ANSWER_BYTES_MAX: Final = 1_048_576  # a page of a hundred payment records is about a quarter of that
_PAGE: Final = 100  # records; Stripe gives no more at once
_LISTED_MAX: Final = 50_000  # when books are compared: some days of all terminals of an account
_PAGES_MAX: Final = 40  # 4,000 records within a day and all terminals of an account; beyond that a person searches
_PAGES_AFTER_FAULT: Final = 1  # a record made a moment ago is among the newest
_CLOCK_SKEW_S: Final = 900  # between a synchronised clock here and Stripe's: seconds, so this is generous
_WINDOW_S: Final = 24 * 3_600  # no attempt is made later than that after the first one

# ISO 4217 has no minor unit for these; Stripe counts them in hundredths all the same (its page on currencies).
_HUNDREDTHS: Final = frozenset({"ISK", "UGX"})

_KEY: Final = re.compile(r"(?P<kind>[a-z]{2})_(?P<mode>test|live)_[A-Za-z0-9]{8,247}", re.ASCII)
_RECORD_ID: Final = re.compile(r"pr_[A-Za-z0-9_]{1,250}", re.ASCII)
_REQUEST_ID: Final = re.compile(r"req_[A-Za-z0-9_]{1,64}", re.ASCII)
_WORD: Final = re.compile(r"[a-z_0-9\[\]]{1,80}", re.ASCII)  # an error code or the name of a parameter, no prose
_REMEDIES: Final = {
    401: "it does not accept the key: replace the credential stripe-key",
    403: "the key may not do this: give it the permission to write and read payment records",
    404: "it does not know the address: check [stripe] url",
}

_log = logging.getLogger(__name__)
# The library quotes Stripe's messages there, and those quote parts of keys.
logging.getLogger("stripe").setLevel(logging.WARNING)


class Event(Enum):
    """What became of a sale, in Stripe's words."""

    REPORTED = "reported"  # given to the host, or accepted here without it: nobody has guaranteed anything
    GUARANTEED = "guaranteed"  # finally approved by the host
    FAILED = "failed"  # declined by the host, at once or later
    CANCELED = "canceled"  # taken back before it was guaranteed
    REFUNDED = "refunded"  # taken back after that, or paid back in part


@dataclass(frozen=True, slots=True)
class EnvelopeFacts:
    """What an envelope says in clear of a sale or of a refund. It has no member that could hold card data."""

    sale: UUID
    refund: UUID | None  # the refund's own id; None: it is about the sale itself
    terminal: str
    local_id: str  # epoch and number of the transaction at its terminal
    amount_minor: int  # of a refund: what is paid back
    currency: str
    opened_at_ms: int
    clock_synchronised: bool
    offline: bool  # accepted without the host


class _Head(msgspec.Struct, frozen=True):
    event: str


class _Clear(msgspec.Struct, frozen=True):
    """The members of an envelope that are read at all."""

    v: Literal[1]
    transaction: UUID
    terminal: Annotated[str, msgspec.Meta(pattern=r"\A[\x21-\x7e]{1,64}\Z")]
    epoch: Annotated[int, msgspec.Meta(ge=1)]
    sequence: Annotated[int, msgspec.Meta(ge=1)]
    kind: Literal["sale", "refund"]
    amount: Annotated[int, msgspec.Meta(ge=1, le=AMOUNT_MINOR_MAX)]
    currency: Annotated[str, msgspec.Meta(pattern=r"\A[A-Z]{3}\Z")]
    opened_at: Annotated[int, msgspec.Meta(ge=0)]
    clock_synchronised: bool
    deferred: bool = False
    of: UUID | None = None


_ABOUT_MONEY: Final = frozenset({"authorisation", "reversal", "refund"})


def facts_of(envelope_jws: str) -> EnvelopeFacts | None:
    """What an envelope says in clear; None for those that are about no sale or refund (checkpoint, advice, batch).

    The signature is not checked: that is the host's, and the terminal is believed here anyway. An envelope that cannot
    be read is None, too, and said in the log: what Stripe is told must never keep a sale from its host.
    """
    try:
        payload = urlsafe_b64decode(envelope_jws.split(".")[1] + "==")
        if msgspec.json.decode(payload, type=_Head).event not in _ABOUT_MONEY:
            return None
        clear = msgspec.json.decode(payload, type=_Clear)
        if (clear.kind == "refund") != (clear.of is not None):
            raise ValueError("of belongs to a refund, and to nothing else")
    except (LookupError, ValueError):  # no JWS, no base64url, no JSON, no such members; the text is not quoted
        _log.error("an envelope cannot be read: Stripe is not told of it. Are terminal and sync of the same version?")
        return None
    return EnvelopeFacts(
        sale=clear.of or clear.transaction,
        refund=clear.transaction if clear.of else None,
        terminal=clear.terminal,
        local_id=f"{clear.epoch}/{clear.sequence}",
        amount_minor=clear.amount,
        currency=clear.currency,
        opened_at_ms=clear.opened_at,
        clock_synchronised=clear.clock_synchronised,
        offline=clear.deferred,
    )


def word_of(event: Event, facts: EnvelopeFacts) -> str:
    """The event in the spool's rows: one of a kind for a sale, but that each refund of it has one of its own."""
    refund = f".{facts.refund}" if event is Event.REFUNDED and facts.refund is not None else ""
    return f"notice.{event.value}{refund}"


def event_of(facts: EnvelopeFacts, state: str, known: Collection[str]) -> Event | None:
    """What Stripe is to be told once the terminal has committed an answer; None: nothing new.

    `state` is the transaction's in the ledger, `known` the words that the spool already has for this sale. A sale that
    was taken before Stripe was configured was never reported, so nothing that follows is told either.
    """

    def told(event: Event) -> bool:
        return f"notice.{event.value}" in known

    if not told(Event.REPORTED) or told(Event.FAILED) or told(Event.CANCELED):
        return None
    match state:
        case "approved" | "settled" | "completing":  # the last: the host has said its last word, the card not yet
            event = Event.GUARANTEED if facts.refund is None else Event.REFUNDED
        case "declined" | "refused" if facts.refund is None:
            event = Event.FAILED
        case "reversed" if facts.refund is None:
            event = Event.REFUNDED if told(Event.GUARANTEED) else Event.CANCELED
        case _:  # nothing final; or a refund that was declined or taken back, of which Stripe has no notion
            return None
    return None if word_of(event, facts) in known else event


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The spool's row: a call of the API, whole but for the id of the payment record that it is about."""

    call: str
    params: dict[str, Any]


_CALLS: Final[Mapping[Event, str]] = {
    Event.REPORTED: "report_payment",
    Event.GUARANTEED: "report_payment_attempt_guaranteed",
    Event.FAILED: "report_payment_attempt_failed",
    Event.CANCELED: "report_payment_attempt_canceled",
    Event.REFUNDED: "report_refund",
}
_REPORT: Final = _CALLS[Event.REPORTED]


def body_of(event: Event, facts: EnvelopeFacts, *, at_ms: int, clock_synchronised: bool) -> str:
    """The text of the request that tells Stripe of this event, and what goes into the spool.

    `at_ms` is the wall time at which it was learnt, and `clock_synchronised` whether to believe that.
    """
    if facts.refund is not None and event is not Event.REFUNDED:
        raise ValueError(f"a refund is never {event.value}: Stripe is told of it once it has been paid back")
    params = _params(event, facts, at_ms)
    if not (clock_synchronised and (event is not Event.REPORTED or facts.clock_synchronised)):
        params.setdefault("metadata", {})["clock"] = "not synchronised"
    return msgspec.json.encode(_Request(_CALLS[event], params), order="sorted").decode()


def _params(event: Event, facts: EnvelopeFacts, at_ms: int) -> dict[str, Any]:
    at_s = at_ms // 1000
    match event:
        case Event.REPORTED:
            return {
                "amount_requested": _amount(facts),
                # Without a clock the sale's own time may be years off; it was stored moments after.
                "initiated_at": facts.opened_at_ms // 1000 if facts.clock_synchronised else at_s,
                "customer_presence": "on_session",
                "payment_method_details": {"type": "custom", "custom": {"display_name": "Payment terminal"}},
                "processor_details": {"type": "custom", "custom": {"payment_reference": str(facts.sale)}},
                "metadata": {
                    "terminal_id": facts.terminal,
                    "local_id": facts.local_id,
                    "stored_at": datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                    "offline": "true" if facts.offline else "false",
                },
            }
        case Event.GUARANTEED:
            return {"guaranteed_at": at_s}
        case Event.FAILED:
            return {"failed_at": at_s}
        case Event.CANCELED:
            return {"canceled_at": at_s}
        case Event.REFUNDED:
            reference = str(facts.refund or facts.sale)
            return {
                "outcome": "refunded",
                "amount": _amount(facts),
                "processor_details": {"type": "custom", "custom": {"refund_reference": reference}},
                "refunded": {"refunded_at": at_s},
                "metadata": {"refund": reference},  # by which the newest refund is found on the payment record
            }


def _amount(facts: EnvelopeFacts) -> dict[str, Any]:
    scale = 100 if facts.currency in _HUNDREDTHS else 1
    return {"currency": facts.currency.lower(), "value": facts.amount_minor * scale}


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A restricted key of the mode that the configuration names."""

    text: str = field(repr=False)

    @classmethod
    def load(cls, directory: Path, *, live: bool) -> ApiKey:
        """Read the credential. Raises `KeyUnavailable` for the file, `Unsendable` for what is in it."""
        return cls.parse(KeyStore(directory).text(STRIPE_KEY), live=live)

    @classmethod
    def parse(cls, text: str, *, live: bool) -> ApiKey:
        """Raises `Unsendable`; the message never holds the key."""
        match = _KEY.fullmatch(text)
        stays = "Nothing is sent to Stripe, everything stays stored"
        if match is None:
            raise Unsendable(f"{STRIPE_KEY} holds no key of Stripe (rk_test_... or rk_live_...). {stays}")
        if match["kind"] != "rk":
            raise Unsendable(
                f"{STRIPE_KEY} is no restricted key, and any other could empty the account if this terminal were "
                f"stolen. {stays}. Make one that may write and read payment records, and nothing else"
            )
        if (match["mode"] == "live") != live:
            have, want = ("a live", "live = true") if match["mode"] == "live" else ("a test", "live = false")
            raise Unsendable(f"{STRIPE_KEY} is {have} key, and [stripe] does not say {want}. {stays}")
        return cls(text)


@dataclass(frozen=True, slots=True)
class StripeSettings:
    """How to reach Stripe. `ca_file` None means the public authorities that come with requests."""

    key: ApiKey
    base_url: str = "https://api.stripe.com"
    ca_file: Path | None = None
    connect_timeout_ms: int = 4_000
    read_timeout_ms: int = 10_000  # between two pieces of the answer
    total_timeout_ms: int = 15_000  # the terminal takes sync for gone after 20 s of silence


class Reply(msgspec.Struct, frozen=True):
    """What is kept of Stripe's answer: the payment record, and under which id Stripe has logged the request."""

    record: str
    request: str | None
    found: bool = False  # by looking it up, for the answer itself was lost

    @classmethod
    def read(cls, answer: str) -> Reply:
        return msgspec.json.decode(answer, type=cls)


class StripeDestination:
    """Implements `Destination`. Not thread-safe, and shares nothing: each thread has one of its own.

    What `parcel.earlier` names is the sale's payment record, the receipt of its first report.
    """

    def __init__(self, settings: StripeSettings, *, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        """Raises `Unsendable` for settings that cannot work."""
        parts = urlsplit(settings.base_url)
        if parts.scheme != "https" or not parts.hostname or parts.username or parts.path.strip("/") or parts.query:
            raise Unsendable(
                "[stripe] url is no plain https address: nothing is sent to Stripe, everything stays stored. "
                "Leave it out, or write https://host"
            )
        stripe.enable_telemetry = False  # it would send the platform, and how long requests took
        self._total_timeout_ms = settings.total_timeout_ms
        self._who = f"Stripe ({parts.hostname})"
        self._monotonic_s = monotonic_s
        self._exchange = Exchange(monotonic_s)
        self._used_s = -math.inf
        self._http = _Http(settings, self._exchange)
        self._records = stripe.StripeClient(
            settings.key.text,
            stripe_version=API_VERSION,
            base_addresses={"api": settings.base_url.rstrip("/")},
            http_client=self._http,
            max_network_retries=0,  # repeating is the spool's
        ).v1.payment_records

    @property
    def name(self) -> str:
        return "stripe"

    @property
    def repeat_safe_ms(self) -> int:
        return REPEAT_SAFE_MS

    def send(self, parcel: Parcel) -> Result:
        request = _request(parcel)
        record = None if request.call == _REPORT else _record(parcel)
        if record is None and request.call != _REPORT:
            return Refused("Stripe has no payment record of this sale: kept for a person", permanent=True)
        self._begin()
        try:
            found = self._call(request, record, parcel.idempotency_key)
        except stripe.StripeError as error:
            result = self._failure(error, parcel, request)
        except (AttributeError, LookupError, TypeError, ValueError):  # the library made nothing of what came
            result = self._undecided()
        else:
            result = self._answer(found, parcel)
        self._used_s = self._monotonic_s()
        self._note(parcel)
        return result

    def look_up(self, parcel: Parcel, *, first_attempt_ms: int | None) -> Answered | Unsure | None:
        """Whether Stripe has it, without sending it. None: not found, which proves nothing.

        `first_attempt_ms` is wall time, or None if the clock was not synchronised then.
        """
        self._begin()
        return self._look_up(parcel, _request(parcel), first_attempt_ms, _PAGES_MAX)

    def recorded(self, *, created_after_ms: int | None) -> Iterator[Recorded]:
        """Every payment record that a terminal has reported since then, newest first. Raises `NotListed`."""
        params: dict[str, Any] = {"limit": _PAGE}
        if created_after_ms is not None:
            params["created_after"] = max(0, created_after_ms // 1000)
        for _ in range(_LISTED_MAX // _PAGE):
            self._begin()
            try:
                page = self._records.list(cast("stripe.params.PaymentRecordListParams", params))
                found = [_recorded(record) for record in page.data]
                following = page.data[-1].id if page.data and page.has_more else None
            except stripe.StripeError as error:
                raise NotListed(self._lookup_failure(error)) from error
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise NotListed(f"the list of {self._who} is garbled: ask again later") from error
            finally:
                self._used_s = self._monotonic_s()
            yield from (each for each in found if each is not None)
            if following is None:
                return
            params["starting_after"] = following
        raise NotListed(f"{self._who} has more than {_LISTED_MAX} records of that time: compare fewer days")

    def close(self) -> None:
        self._http.close()

    def _look_up(
        self, parcel: Parcel, request: _Request, first_attempt_ms: int | None, pages_max: int
    ) -> Answered | Unsure | None:
        try:
            if request.call == _REPORT:
                found = self._find(parcel, request, first_attempt_ms, pages_max)
            else:
                found = self._settled(parcel, request)
        except stripe.StripeError as error:
            return Unsure(self._lookup_failure(error), retry_after_ms(self._http.headers.get("Retry-After")))
        except (AttributeError, LookupError, TypeError, ValueError):
            return Unsure(f"the list of {self._who} is garbled: looked up again later")
        finally:
            self._used_s = self._monotonic_s()
            self._note(parcel)
        return None if found is None else _answered(found, self._http.request_id, found=True)

    def _begin(self) -> None:
        if self._monotonic_s() - self._used_s > IDLE_MAX_MS / 1000:
            self._http.close()
        self._exchange.begin(self._total_timeout_ms)

    def _call(self, request: _Request, record: str | None, idempotency_key: str) -> stripe.PaymentRecord:
        call: Callable[..., stripe.PaymentRecord] = getattr(self._records, request.call)
        options = {"idempotency_key": idempotency_key}
        return call(request.params, options) if record is None else call(record, request.params, options)

    def _answer(self, found: stripe.PaymentRecord, parcel: Parcel) -> Result:
        record = _member(found, "id")
        if not isinstance(record, str) or not _RECORD_ID.fullmatch(record) or _reference(found) != parcel.transaction:
            return self._undecided()
        return _answered(record, self._http.request_id, found=False)

    def _undecided(self) -> Unsure:
        return Unsure(f"the answer of {self._who} is garbled: sent again later{self._http.trace}")

    def _failure(self, error: stripe.StripeError, parcel: Parcel, request: _Request) -> Result:
        """What a failed attempt means for the item. Stripe's own text is not used: it may quote the key."""
        status, headers, trace = self._http.status, self._http.headers, self._http.trace
        if status is None:
            message = explain(error, who=self._who, section="stripe", begun=self._exchange.begun)
            return Unsure(message) if self._exchange.begun else NotSent(message)
        wait_ms = retry_after_ms(headers.get("Retry-After"))
        advice = headers.get("Stripe-Should-Retry")
        if status == 429:
            return Busy(f"{self._who} is busy (429): sent again later{trace}", wait_ms)
        if status >= 500 or status < 300:
            if advice == "false" or (advice != "true" and self._http.replayed):
                return self._saved_fault(parcel, request, trace, status)
            return Unsure(f"{self._who} has a fault ({status}): sent again later{trace}", wait_ms)
        if status == 409 or advice == "true":  # 409: an attempt of ours is still being worked on
            return Unsure(f"{self._who} wants it sent again later ({status}){trace}", wait_ms)
        return self._refusal(error, request, status, trace)

    def _saved_fault(self, parcel: Parcel, request: _Request, trace: str, status: int) -> Result:
        """Stripe failed in the middle, and will say so under this key for ever: only looking can tell."""
        found = self._look_up(parcel, request, None, _PAGES_AFTER_FAULT)
        if isinstance(found, Answered):
            return found
        return Unsure(f"{self._who} failed in the middle ({status}) and does not know better: looked up later{trace}")

    def _refusal(self, error: stripe.StripeError, request: _Request, status: int, trace: str) -> Refused:
        if isinstance(error, stripe.IdempotencyError):
            return Refused(
                f"{self._who} has had another request under this key ({status}): kept for a person{trace}",
                permanent=True,
            )
        code, param = _word(error.code), _word(getattr(error, "param", None))
        said = "".join(f", {word}" for word in (code, param) if word)
        # A report without a fault in one of its parameters is refused for the account's sake: that must not condemn
        # the whole queue. Once a sale is reported, the account is fine, and a refusal is about the item.
        about_item = bool(param) or request.call != _REPORT
        if (status in {400, 402, 422} and about_item) or (status == 404 and code == "resource_missing"):
            return Refused(f"{self._who} refuses it ({status}{said}): kept for a person{trace}", permanent=True)
        remedy = _REMEDIES.get(status, "are payment records enabled for this account? Ask Stripe")
        return Refused(
            f"{self._who} takes nothing ({status}{said}): {remedy}. Everything stays stored{trace}", permanent=False
        )

    def _lookup_failure(self, error: stripe.StripeError) -> str:
        status = self._http.status
        if status is None:
            return explain(error, who=self._who, section="stripe", begun=self._exchange.begun)
        remedy = _REMEDIES.get(status, "looked up again later")
        return f"{self._who} does not say whether it has it ({status}): {remedy}{self._http.trace}"

    def _find(self, parcel: Parcel, request: _Request, first_attempt_ms: int | None, pages_max: int) -> str | None:
        """The payment record of a sale. Only our own attempts can have made it: that bounds its age."""
        params: dict[str, Any] = {"limit": _PAGE}
        if first_attempt_ms is not None:
            first_attempt_s = first_attempt_ms // 1000
            params["created_after"] = max(0, first_attempt_s - _CLOCK_SKEW_S)
            params["created_before"] = first_attempt_s + _WINDOW_S + _CLOCK_SKEW_S
        wanted = request.params["amount_requested"]
        for _ in range(pages_max):
            page = self._records.list(cast("stripe.params.PaymentRecordListParams", params))
            for record in page.data:
                amount = {name: _member(record, "amount_requested", name) for name in ("currency", "value")}
                if _reference(record) == parcel.transaction and amount == wanted:
                    return record.id
            if not page.has_more or not page.data:
                return None
            params["starting_after"] = page.data[-1].id
        _log.warning("%s/%s: not among the %d records looked at", parcel.transaction, parcel.event, pages_max * _PAGE)
        return None

    def _settled(self, parcel: Parcel, request: _Request) -> str | None:
        """The payment record, if it shows that this report has arrived."""
        record_id = _record(parcel)
        if record_id is None:
            return None
        record = self._records.retrieve(record_id)
        if _member(record, "id") != record_id:
            raise ValueError("this is not the record that was asked for, so it proves nothing of it")

        def so_much(name: str) -> int:
            value = _member(record, f"amount_{name}", "value")
            return value if isinstance(value, int) else 0

        match request.call:
            case "report_payment_attempt_guaranteed":
                arrived = so_much("guaranteed") + so_much("refunded") > 0
            case "report_payment_attempt_failed":
                arrived = so_much("failed") > 0
            case "report_payment_attempt_canceled":
                arrived = so_much("canceled") > 0
            case _:
                # Which refunds a sum is made of cannot be seen: it proves this one only if nothing is left. Otherwise
                # the newest one's name does, for no other was sent before this one was settled.
                whole = so_much("refunded") == so_much("requested") > 0
                newest = _member(record, "metadata", "refund")
                arrived = whole or newest == request.params["processor_details"]["custom"]["refund_reference"]
        return record_id if arrived else None

    def _note(self, parcel: Parcel) -> None:
        http = self._http
        replayed = ", replayed" if http.replayed else ""
        _log.info("%s/%s: %s, request %s%s", parcel.transaction, parcel.event, http.status, http.request_id, replayed)


class _Http(stripe.HTTPClient):
    """How the library reaches the network: one attempt over our own session, and what is known of its answer."""

    name = "requests"  # the library puts it into a header

    def __init__(self, settings: StripeSettings, exchange: Exchange) -> None:
        super().__init__()
        self._session = open_session(exchange, section="stripe", ca_file=settings.ca_file)
        self._timeout_s = (settings.connect_timeout_ms / 1000, settings.read_timeout_ms / 1000)
        self.status: int | None = None  # None: no whole answer came
        self.headers: Mapping[str, str] = {}

    @property
    def replayed(self) -> bool:
        return self.headers.get("Idempotent-Replayed") == "true"

    @property
    def request_id(self) -> str | None:
        """By which Stripe, and its dashboard, find this request again."""
        text = self.headers.get("Request-Id", "")
        return text if _REQUEST_ID.fullmatch(text) else None

    @property
    def trace(self) -> str:
        return f" [{self.request_id}]" if self.request_id else ""

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None,
        post_data: Any = None,
        *,
        _usage: list[str] | None = None,
    ) -> tuple[str, int, Mapping[str, str]]:
        self.status, self.headers = None, {}
        try:
            response = self._session.request(
                method,
                url,
                headers={**(headers or {}), "Accept-Encoding": "identity"},  # compressed it could grow without bound
                data=post_data,
                timeout=self._timeout_s,
                allow_redirects=False,
                stream=True,
            )
            with contextlib.closing(response):
                body = read_bounded(response.raw, _ANSWER_BYTES_MAX)
        except (requests.RequestException, HTTPError, OSError) as error:
            raise _no_answer("no whole answer came") from error
        if body is None:
            raise _no_answer("the answer is too long to be one")
        self.status, self.headers = response.status_code, response.headers
        return body.decode("utf-8", "replace"), response.status_code, response.headers

    def close(self) -> None:
        self._session.close()


def _no_answer(what: str) -> stripe.APIConnectionError:
    return stripe.APIConnectionError(what)  # type: ignore[no-untyped-call]


def _request(parcel: Parcel) -> _Request:
    return msgspec.json.decode(parcel.body, type=_Request)


def _record(parcel: Parcel) -> str | None:
    """The sale's payment record. It becomes part of a path, so nothing else may look like one."""
    return parcel.earlier if parcel.earlier is not None and _RECORD_ID.fullmatch(parcel.earlier) else None


def _answered(record: str, request: str | None, *, found: bool) -> Answered:
    return Answered(msgspec.json.encode(Reply(record, request, found)).decode(), receipt=record)


def _member(found: object, *names: str) -> object:
    """A member of an answer, which may be of any shape."""
    for name in names:
        found = getattr(found, name, None)
    return found


def _reference(record: stripe.PaymentRecord) -> UUID | None:
    text = _member(record, "processor_details", "custom", "payment_reference")
    try:
        return UUID(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _recorded(record: stripe.PaymentRecord) -> Recorded | None:
    """None for what no terminal has reported. Raises `TypeError` where amounts are not to be read."""
    sale, name = _reference(record), _member(record, "id")
    code = _member(record, "amount_requested", "currency")
    if sale is None or not isinstance(name, str):
        return None

    def minor(of: str) -> int:
        value = _member(record, f"amount_{of}", "value")
        if not isinstance(value, int):
            raise TypeError(of)
        return value

    return Recorded(
        record=name,
        sale=sale,
        currency=code.upper() if isinstance(code, str) else "",
        requested_minor=minor("requested"),
        guaranteed_minor=minor("guaranteed"),
        failed_minor=minor("failed"),
        canceled_minor=minor("canceled"),
        refunded_minor=minor("refunded"),
    )


def _word(text: object) -> str | None:
    return text if isinstance(text, str) and _WORD.fullmatch(text) else None

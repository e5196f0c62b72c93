"""The double without HTTP: a request in, a response out, in the order in which Stripe looks at one.

Who asks, and may they (401, 403, not saved); limits and what has not been noticed (429, 5xx, not saved); the
idempotency key (replay, 400 for other parameters, 409 while in use); the parameters (400, not saved); then the work,
whose result is saved whatever it is, a 500 included.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from hwsim.stripe_double import checks
from hwsim.stripe_double.books import Booking, Books, Conflict, Logged, Result
from hwsim.stripe_double.checks import InvalidParam
from hwsim.stripe_double.faults import Delay, DropAnswer, Fail, Fault, Faults, Garbage, When

VERSIONS: Final = frozenset({"2026-10-28.endive"})
KEY_CHARACTERS_MAX: Final = 255
_PATH: Final = re.compile(r"/v1/payment_records/(?P<record>pr_[A-Za-z0-9_]+)(?:/(?P<call>report_[a-z_]+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    target: str  # path and query
    headers: Mapping[str, str] = field(repr=False)  # names in lower case
    body: str


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: str
    headers: dict[str, str] = field(default_factory=dict)


class _ApiError(Exception):
    """A response that is an error, and is not saved."""

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", code: str | None = None,
        param: str | None = None, headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.response = Response(status, _error(kind, message, code, param), headers or {})


@dataclass(frozen=True, slots=True)
class _Asker:
    """Whoever holds a key."""

    livemode: bool
    permissions: frozenset[str]  # read, write


class StripeDouble:
    """Stripe over one directory. Safe to use from several threads.

    `keys` maps restricted keys to what they may do: read, write, or both.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keys: Mapping[str, frozenset[str]],
        now_ms: Callable[[], int],
        entropy: Callable[[int], bytes],
    ) -> None:
        self.faults = Faults()
        self._keys = keys
        self._now_ms = now_ms
        self._entropy = entropy
        self._books = Books(directory / "stripe.db")
        with self._books.transaction():
            self._offset_ms = self._books.offset_ms()
        self._in_use: set[tuple[str, bool]] = set()
        self._in_use_lock = threading.Lock()
        self.stopping = threading.Event()  # cuts delays short

    def close(self) -> None:
        self._books.close()

    def now_ms(self) -> int:
        return self._now_ms() + self._offset_ms

    def advance(self, milliseconds: int) -> None:
        """Let time pass. It stays passed: a restart forgets no booking, and brings no key back."""
        with self._books.transaction():
            self._offset_ms += milliseconds
            self._books.set_offset(self._offset_ms)

    def bookings(self) -> list[Booking]:
        """All payment records, in the order in which they were made."""
        with self._books.transaction():
            return self._books.bookings()

    def requests(self) -> list[Logged]:
        """Every request that came, as it came."""
        with self._books.transaction():
            return self._books.requests()

    def answer(self, request: Request) -> Response | None:
        """What to answer; None to break the connection instead."""
        request_id = "req_" + self._entropy(7).hex()
        with self._books.transaction():
            headers = {name: value for name, value in request.headers.items() if name != "authorization"}
            key = request.headers.get("idempotency-key")
            logged = Logged(self.now_ms(), request.method, request.target, headers, request.body, key, request_id, None)
            number = self._books.log(logged)
        fault = self.faults.take()
        try:
            response = self._respond(request, fault)
        except _ApiError as error:
            response = error.response
        if isinstance(fault, DropAnswer):
            return None
        if isinstance(fault, Delay) and not fault.working:
            self.stopping.wait(fault.delay_ms / 1000)
        if isinstance(fault, Garbage):
            response = Response(200, fault.body)
        with self._books.transaction():
            self._books.answered(number, response.status)
        return Response(response.status, response.body, response.headers | {"Request-Id": request_id})

    def _respond(self, request: Request, fault: Fault | None) -> Response:
        asker = self._asker(request)
        version = request.headers.get("stripe-version")
        if version not in VERSIONS:
            raise _ApiError(400, f"Invalid Stripe API version: {version}")
        match fault:
            case Fail(status, when) if when is When.UNNOTICED or status in {409, 429}:
                raise _failure(fault)
            case DropAnswer(booked=False):
                return Response(500, "")
            case _:
                pass
        path = urlsplit(request.target).path
        needed = "write" if request.method == "POST" else "read"
        if needed not in asker.permissions:
            raise _ApiError(
                403,
                "The provided key does not have the required permissions for this endpoint. "
                f"Having the 'payment_records_{needed}' permission would allow this request to continue.",
            )
        match request.method, path, _PATH.fullmatch(path):
            case "GET", "/v1/payment_records", _:
                return self._read("list", None, request, asker)
            case "POST", "/v1/payment_records/report_payment", _:
                return self._post(checks.REPORT, None, request, asker, fault)
            case "GET", _, re.Match() as match if match["call"] is None:
                return self._read("retrieve", match["record"], request, asker)
            case "POST", _, re.Match() as match if match["call"] in checks.SHAPES:
                return self._post(match["call"], match["record"], request, asker, fault)
        raise _ApiError(404, f"Unrecognized request URL ({request.method}: {path}).")

    def _asker(self, request: Request) -> _Asker:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or key not in self._keys:
            shown = f"{key[:8]}****{key[-4:]}" if len(key) > 16 else "none"
            raise _ApiError(401, f"Invalid API Key provided: {shown}")  # Stripe, too, quotes parts of it
        return _Asker("_live_" in key, self._keys[key])

    def _read(self, call: str, record: str | None, request: Request, asker: _Asker) -> Response:
        params = _checked(call, urlsplit(request.target).query)
        try:
            with self._books.transaction():
                if record is not None:
                    return _json(200, self._books.document(record, livemode=asker.livemode))
                page, more = self._books.page(params, livemode=asker.livemode)
        except Conflict as conflict:
            raise _refused(conflict) from conflict
        return _json(200, {"object": "list", "url": "/v1/payment_records", "has_more": more, "data": page})

    def _post(self, call: str, record: str | None, request: Request, asker: _Asker, fault: Fault | None) -> Response:
        key = request.headers.get("idempotency-key")
        if key is None:
            params = _checked(call, request.body)
            return self._work(call, record, params, asker, fault, key=None)
        if not 0 < len(key) <= KEY_CHARACTERS_MAX:
            raise _ApiError(400, f"The idempotency key has more than {KEY_CHARACTERS_MAX} characters.")
        fingerprint = hashlib.sha256(f"{request.target}\n{request.body}".encode()).hexdigest()
        with self._use(key, asker.livemode):
            with self._books.transaction():
                saved = self._books.result(key, livemode=asker.livemode, now_ms=self.now_ms())
            if saved is not None:
                return _replayed(saved, fingerprint)
            params = _checked(call, request.body)
            return self._work(call, record, params, asker, fault, key=(key, fingerprint))

    def _use(self, key: str, livemode: bool) -> _InUse:
        return _InUse(self._in_use, self._in_use_lock, (key, livemode))

    def _work(
        self,
        call: str,
        record: str | None,
        params: Mapping[str, Any],
        asker: _Asker,
        fault: Fault | None,
        *,
        key: tuple[str, str] | None,
    ) -> Response:
        """Book, and save the result with it."""
        first_ms = self.now_ms()
        if isinstance(fault, Delay) and fault.working:
            self.stopping.wait(fault.delay_ms / 1000)
        failing = _failure(fault).response if isinstance(fault, Fail) else None
        with self._books.transaction():
            if isinstance(fault, Fail) and failing and fault.when is When.BEFORE:
                response = failing
            else:
                response = self._book(call, record, params, asker)
                response = failing or response
            if key is not None:
                result = Result(key[1], response.status, response.body, response.headers.get("Stripe-Should-Retry"))
                self._books.save(key[0], result, livemode=asker.livemode, first_ms=first_ms)
        return response

    def _book(self, call: str, record: str | None, params: Mapping[str, Any], asker: _Asker) -> Response:
        try:
            if record is None:
                created = self.now_ms() // 1000
                fresh = "pr_test_" + self._entropy(9).hex()
                record = self._books.report(fresh, params, created=created, livemode=asker.livemode)
            else:
                self._books.advance(record, call, params, livemode=asker.livemode)
            return _json(200, self._books.document(record, livemode=asker.livemode))
        except Conflict as conflict:
            return _refused(conflict).response


class _InUse:
    """Marks a key while a request with it is worked on; a second one is turned away."""

    def __init__(self, keys: set[tuple[str, bool]], lock: threading.Lock, key: tuple[str, bool]) -> None:
        self._keys, self._lock, self._key = keys, lock, key

    def __enter__(self) -> None:
        with self._lock:
            if self._key in self._keys:
                raise _ApiError(
                    409,
                    "There is currently another in-progress request using this idempotency key.",
                    kind="idempotency_error",
                    code="idempotency_key_in_use",
                )
            self._keys.add(self._key)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._keys.discard(self._key)


def _checked(call: str, form: str) -> dict[str, Any]:
    try:
        return checks.check(call, checks.parse_form(form))
    except InvalidParam as invalid:
        raise _ApiError(400, str(invalid), code=invalid.code, param=invalid.param) from invalid


def _replayed(saved: Result, fingerprint: str) -> Response:
    if saved.fingerprint != fingerprint:
        raise _ApiError(
            400,
            "Keys for idempotent requests can only be used with the same parameters they were first used with.",
            kind="idempotency_error",
        )
    headers = {"Idempotent-Replayed": "true"}
    if saved.should_retry is not None:
        headers["Stripe-Should-Retry"] = saved.should_retry
    return Response(saved.status, saved.body, headers)


def _failure(fail: Fail) -> _ApiError:
    headers = {}
    if fail.should_retry is not None:
        headers["Stripe-Should-Retry"] = str(fail.should_retry).lower()
    if fail.retry_after_s is not None:
        headers["Retry-After"] = str(fail.retry_after_s)
    match fail.status:
        case 429:
            return _ApiError(429, "Too many requests.", code="rate_limit", headers=headers)
        case 409:
            code = "idempotency_key_in_use"
            return _ApiError(
                409, "Another request is in progress.", kind="idempotency_error", code=code, headers=headers
            )
        case status if status < 500:
            return _ApiError(status, "It was refused.", headers=headers)
        case status:
            return _ApiError(status, "An unknown error occurred.", kind="api_error", headers=headers)


def _refused(conflict: Conflict) -> _ApiError:
    return _ApiError(conflict.status, str(conflict), code=conflict.code, param=conflict.param)


def _error(kind: str, message: str, code: str | None, param: str | None) -> str:
    error = {"type": kind, "message": message, "code": code, "param": param}
    return json.dumps({"error": {name: value for name, value in error.items() if value is not None}})


def _json(status: int, document: object) -> Response:
    return Response(status, json.dumps(document, indent=2))

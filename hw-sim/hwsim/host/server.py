"""The host's HTTPS interface (docs/host-api.yaml), and the host as a process.

HTTP/1.1 with keep-alive over the standard library: one thread per connection, everything bounded. What is not a signed
answer is `application/problem+json`, and no decision. Which path takes which method from whom stands in one table.
Misbehaviours are applied here, around `Host.receive` and its like, which know nothing of them.
"""

from __future__ import annotations

import argparse
import contextlib
import hmac
import json
import logging
import os
import re
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from http.client import responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qs

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hwsim.cards.personalise import Bureau, CardProfile
from hwsim.host import controls, jose, merchant, tls
from hwsim.host.controls import (
    CaptivePortal,
    Controls,
    ControlSocket,
    Delay,
    Fail,
    Garbage,
    LoseAnswer,
    Misbehaviour,
    Order,
    OtherAnswer,
    WrongKey,
)
from hwsim.host.host import Host, Problem, Refused, Reply, provision
from hwsim.host.messages import ANSWER_TYPE, ENVELOPE_BYTES_MAX, EVENTS, ID_PATTERN, UUID_PATTERN
from hwsim.host.store import Booking, StoreError
from hwsim.host.tls import Certificate

CONNECTIONS_MAX: Final = 64
MEDIA_TYPE: Final = "application/jose"
BUREAU_FILE: Final = "bureau.json"
_IDLE_S: Final = 30.0  # a kept connection without a request
_HANDSHAKE_S: Final = 10.0
_BODY_S: Final = 10.0  # a whole body, however slowly its bytes drip
_GRACE_S: Final = 5.0  # requests under way when the listener stops; afterwards they are cut
_POLL_S: Final = 0.05
_FORM_TYPE: Final = "application/x-www-form-urlencoded"
_FIELDS_MAX: Final = 8  # of a form that has one
_PLACE_DIGITS_MAX: Final = 18  # SQLite's integers have 63 bits
_DISCARD_BYTES_MAX: Final = 1024 * 1024  # of a body that is too long, so that its sender gets to read why

# Asked for, because gateways in between may rely on it. The host does not: the path says what is the same.
_IDEMPOTENCY_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}", re.ASCII)

_log = logging.getLogger(__name__)


class HostServer:
    """Serves a host on loopback; listening can stop and start again on the same port."""

    def __init__(self, host: Host, *, port: int = 0, client_certificates: bool = False) -> None:
        """`client_certificates`: terminals must show one that the host has issued, but to ask for the first."""
        self.host = host
        self.controls = Controls()
        self.port = port
        self.client_certificates = client_certificates
        self._certificate = Certificate.GOOD
        self._listener: _Listener | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def listening(self) -> bool:
        return self._listener is not None

    def start(self) -> None:
        """Listen; returns when connections are accepted. Raises `OSError` when the port is taken."""
        with self._lock:
            if self._listener is not None:
                return
            # Certificates live by the clients' clocks, so this is the machine's time and not the host's.
            context = tls.server_context(
                self.host.directory,
                self._certificate,
                datetime.now(UTC),
                client_certificates=self.client_certificates,
            )
            self._listener = _Listener(
                self.port, context, self.host, self.controls, client_certificates=self.client_certificates
            )
            self.port = self._listener.server_address[1]
            self._thread = threading.Thread(
                target=self._listener.serve_forever, args=(_POLL_S,), name="host", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Stop listening. Requests under way get their answers, within a limit; then all connections end."""
        with self._lock:
            if self._listener is None or self._thread is None:
                return
            self._listener.stop()
            self._thread.join()
            self._listener = self._thread = None

    def show(self, certificate: Certificate) -> None:
        """Show this certificate from now on."""
        with self._lock:
            self._certificate = certificate
            if self.listening:
                self.stop()
                self.start()

    def obey(self, order: Order) -> Any:
        """Carry out an order from the control socket."""
        match order:
            case controls.Misbehave(misbehaviour, times):
                self.controls.arm(misbehaviour, times)
            case controls.Behave():
                self.controls.clear()
            case controls.Listen(on):
                if on:
                    self.start()
                else:
                    self.stop()
            case controls.Show(certificate):
                self.show(certificate)
            case controls.Bookings():
                return self.host.bookings()
            case controls.Forks():
                return self.host.forks()
        return None

    def __enter__(self) -> HostServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Listener(ThreadingHTTPServer):
    """One period of listening."""

    daemon_threads = False  # so that server_close waits for them
    request_queue_size = CONNECTIONS_MAX

    def __init__(
        self, port: int, context: ssl.SSLContext, host: Host, controls: Controls, *, client_certificates: bool
    ) -> None:
        self.client_certificates = client_certificates
        self.host = host
        self.controls = controls
        self.stopping = threading.Event()
        self._context = context
        self._places = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._lock = threading.Lock()
        self._idle: set[socket.socket] = set()
        self._busy: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def stop(self) -> None:
        self.shutdown()
        self.stopping.set()
        deadline = time.monotonic() + _GRACE_S
        while self._busy and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self._cut(self._idle)
        self._cut(self._busy)
        self.server_close()

    def enter(self, connection: socket.socket, *, busy: bool) -> None:
        """Note what a connection is doing."""
        with self._lock:
            self._idle.discard(connection)
            self._busy.discard(connection)
            (self._busy if busy else self._idle).add(connection)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer would ask the name service who we are

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            _log.warning("host: more than %d connections, one turned away", CONNECTIONS_MAX)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        # The handshake belongs to the connection's own thread: a client that dawdles keeps nobody waiting.
        request.settimeout(_HANDSHAKE_S)
        with self._context.wrap_socket(request, server_side=True, do_handshake_on_connect=False) as connection:
            self.enter(connection, busy=False)
            try:
                connection.do_handshake()
                if not self.stopping.is_set():
                    _Handler(connection, client_address, self)
            finally:
                with self._lock:
                    self._idle.discard(connection)
                    self._busy.discard(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if isinstance(error, OSError):  # TLS errors among them: clients that refuse our certificate, or have gone
            _log.debug("host: a connection ended: %s", error)
        else:
            _log.exception("host: a connection failed")

    def _cut(self, connections: set[socket.socket]) -> None:
        with self._lock:
            for connection in connections:
                with contextlib.suppress(OSError):
                    # Below TLS: its own state belongs to the connection's thread, which sees the stream end.
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _ProblemError(Exception):
    """A request that ends in problem+json."""

    def __init__(self, status: int, word: str, title: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(title)
        self.status = status
        self.document = {"type": f"urn:payterm:problem:{word}", "title": title, "status": status, "detail": detail}
        self.headers = headers or {}


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "payterm-host/1"
    sys_version = ""
    timeout = _IDLE_S
    wbufsize = -1  # head and body leave together
    disable_nagle_algorithm = True
    server: _Listener

    def do_PUT(self) -> None:
        self._respond()

    do_GET = do_POST = do_PUT  # noqa: N815 (the names are the base class's)
    # These are told which methods there are.
    do_DELETE = do_HEAD = do_OPTIONS = do_PATCH = do_QUERY = do_TRACE = do_PUT  # noqa: N815

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()  # the client waits for it before it sends the body
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with a request: its bytes cannot be followed any further."""
        self.close_connection = True
        title = responses.get(code, "Error")
        self._send_problem(_ProblemError(code, "request", title, message or "this is not HTTP/1.1"))

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug("host: %s", format % args)

    def _respond(self) -> None:
        self.server.enter(self.connection, busy=True)
        try:
            self._dispatch()
        except _ProblemError as problem:
            self._send_problem(problem)
        except Refused as refused:
            why = refused.problem
            self._send_problem(_ProblemError(why.status, why.word, why.title, refused.detail))
        except OSError:
            raise  # the client's connection, not its request
        except Exception:  # noqa: BLE001 - a bug must show as a 500, not as a lost connection
            _log.exception("host: a request failed")
            self._send_problem(
                _ProblemError(500, "internal", "The host failed", "send the same envelope again later; nothing is lost")
            )
        finally:
            with contextlib.suppress(OSError):
                self.wfile.flush()
            self.server.enter(self.connection, busy=False)
            if self.server.stopping.is_set():
                self.close_connection = True

    def _dispatch(self) -> None:
        """Find out what is asked for, and whether it may be; the body is read in any case."""
        body = self._body()
        path, _, query = self.path.partition("?")
        for route in _ROUTES:
            if (named := route.path.fullmatch(path)) is None:
                continue
            act = route.methods.get(self.command)
            if act is None:
                raise self._not_allowed(route)
            self._admit(route.access)
            act(self, _Request(named.groupdict(), query, body))
            return
        raise _ProblemError(404, "not-found", "There is nothing here", "see the paths of host-api.yaml")

    def _not_allowed(self, route: _Route) -> _ProblemError:
        allowed = ", ".join(sorted(route.methods))
        detail = f"use {allowed}"
        return _ProblemError(
            405, "method", f"{self.command} is not what this takes", detail, headers={"Allow": allowed}
        )

    def _admit(self, access: _Access) -> None:
        match access:
            case _Access.TERMINAL if self.server.client_certificates and self._certified() is None:
                raise _ProblemError(
                    401,
                    "certificate-required",
                    "A client certificate is wanted here",
                    "put a certificate request to /v1/certificates",
                    headers={"WWW-Authenticate": "Certificate"},
                )
            case _Access.OPERATOR:
                self._operator_only()
            case _Access.TERMINAL | _Access.ANYBODY:
                pass

    def _certified(self) -> str | None:
        """The terminal that the client's certificate names; TLS has made sure that the certificate is one of ours."""
        for names in (self.connection.getpeercert() or {}).get("subject", ()):
            for kind, value in names:
                if kind == "commonName":
                    return str(value)
        return None

    def put_event(self, request: _Request) -> None:
        self._take(request, lambda: self._host.receive(**request.named, body=request.body, by=self._certified()))

    def put_checkpoint(self, request: _Request) -> None:
        self._take(request, lambda: self._host.countersign(**request.named, body=request.body, by=self._certified()))

    def put_batch(self, request: _Request) -> None:
        self._take(request, lambda: self._host.close_batch(**request.named, body=request.body, by=self._certified()))

    def put_reconciliation(self, request: _Request) -> None:
        self._take(request, lambda: self._host.reconcile(**request.named, body=request.body, by=self._certified()))

    def put_certificate(self, request: _Request) -> None:
        self._take(request, lambda: self._host.certify(**request.named, body=request.body, by=self._certified()))

    def _take(self, request: _Request, receive: Callable[[], Reply]) -> None:
        """Take in an envelope, and answer it."""
        misbehaviour = self.server.controls.take()
        if self._misbehave_instead(misbehaviour):
            return
        if self.headers.get_content_type() != MEDIA_TYPE:
            raise _ProblemError(415, "media-type", "The body is not application/jose", f"send it as {MEDIA_TYPE}")
        if not _IDEMPOTENCY_KEY.fullmatch(self.headers.get("Idempotency-Key", "")):
            raise _ProblemError(
                400,
                "idempotency-key",
                "The Idempotency-Key is missing or malformed",
                "send 1 to 255 visible characters",
            )
        reply = receive()
        answer = self._misbehave_after(misbehaviour, reply.answer)
        if answer is not None:
            headers = {"Idempotent-Replayed": "true"} if reply.repeated else {}
            self._send(200, MEDIA_TYPE, answer, headers)

    def _misbehave_instead(self, misbehaviour: Misbehaviour | None) -> bool:
        """Whether the request has been dealt with without the host having seen it."""
        match misbehaviour:
            case Fail(booked=False):
                raise _failure(misbehaviour)
            case CaptivePortal():
                page = b"<!DOCTYPE html><title>Welcome</title><p>Accept our terms to go online."
                self._send(200, "text/html; charset=utf-8", page)
                return True
            case _:
                return False

    def _misbehave_after(self, misbehaviour: Misbehaviour | None, answer: str) -> bytes | None:
        """What to answer after the host has done its work; None for no response at all."""
        match misbehaviour:
            case LoseAnswer():
                self.close_connection = True
                return None
            case Delay(delay_ms):
                self.server.stopping.wait(delay_ms / 1000)
            case Fail():
                raise _failure(misbehaviour)
            case Garbage():
                return b"\x00\xffnot.a.jws" * 20
            case WrongKey():
                return self._forge(answer, {}, Ed25519PrivateKey.generate())
            case OtherAnswer(members):
                return self._forge(answer, members, self.server.host.keys.answer)
            case CaptivePortal() | None:
                pass
        return answer.encode()

    def _forge(self, answer: str, members: dict[str, str | int | None], key: Ed25519PrivateKey) -> bytes:
        said = json.loads(jose.read(answer.encode(), ANSWER_TYPE).unverified_payload)
        payload = msgspec.json.encode(said | members)
        return jose.sign(payload, typ=ANSWER_TYPE, kid=self.server.host.keys.answer_id, key=key).encode()

    def get_status(self, _: _Request) -> None:
        keys = self._host.keys
        self._send_json({"v": 1, "sealing_key": keys.sealing_id, "answer_key": keys.answer_id})

    def get_bookings(self, _: _Request) -> None:
        self._send_json({"v": 1, "bookings": self._host.bookings()})

    def get_checkpoints(self, _: _Request) -> None:
        self._send_json({"v": 1, "checkpoints": self._host.checkpoints(), "forks": self._host.forks()})

    def get_terminals(self, _: _Request) -> None:
        host = self._host
        self._send_json(
            {"v": 1, "configuration": host.configuration(), "terminals": host.terminals(), "gaps": host.all_gaps()}
        )

    def get_terminal(self, request: _Request) -> None:
        terminal, by = request.named["terminal"], self._certified()
        if by is not None and by != terminal:
            raise Refused(Problem.CERTIFICATE_MISMATCH, f"it was issued to terminal {by}")
        self._send(200, MEDIA_TYPE, self._host.status(terminal).encode())

    def get_transaction(self, request: _Request) -> None:
        transaction = request.named["transaction"]
        known = self._host.known(transaction)
        if known is None:
            raise _ProblemError(
                404, "transaction-unknown", "The host has not received this transaction", "send its envelopes"
            )
        events = {
            message.event: {"envelope": message.envelope_sha256, "answer": message.answer} for message in known.messages
        }
        self._send_json({"v": 1, "transaction": transaction, "state": known.booking.state, "events": events})

    def get_merchant(self, request: _Request) -> None:
        host, token = self._host, self._host.keys.operator_token
        before = _before(request.query)
        if not merchant.is_session(token, self.headers.get("Cookie", ""), host.wall_ms()):
            self._send_login(refused=False)
            return
        sales = host.page(before, merchant.SALES_ON_A_PAGE + 1)
        more = len(sales) > merchant.SALES_ON_A_PAGE
        del sales[merchant.SALES_ON_A_PAGE :]
        overview = merchant.Overview(
            now_ms=host.wall_ms(),
            configuration=host.configuration(),
            sales=[booking for _, booking in sales],
            older=sales[-1][0] if more else None,
            newest=before is None,
            totals=host.day_totals(merchant.DAYS),
            terminals=host.terminals(),
            checkpoints=host.checkpoints(),
            gaps=host.all_gaps(),
            forks=host.forks(),
        )
        self._send_page(200, merchant.page(overview))

    def log_in(self, request: _Request) -> None:
        if self.headers.get_content_type() != _FORM_TYPE:
            raise _ProblemError(415, "media-type", "The body is no form", f"send it as {_FORM_TYPE}")
        given, expected = _field(request.body, "token"), self._host.keys.operator_token
        if not hmac.compare_digest(given.encode(), expected.encode()):
            self._send_login(refused=True)
            return
        self._send_on(merchant.session(expected, self._host.wall_ms()))

    def log_out(self, _: _Request) -> None:
        self._send_on(merchant.end_of_session())

    def _send_login(self, *, refused: bool) -> None:
        # A browser shows the form instead of asking for credentials itself, since it does not know this scheme.
        self._send_page(401, merchant.login_page(refused=refused), {"WWW-Authenticate": "Bearer"})

    def _send_on(self, cookie: str) -> None:
        self._send(303, "text/plain; charset=utf-8", b"", {"Location": "/merchant", "Set-Cookie": cookie})

    def _send_page(self, status: int, page: bytes, headers: dict[str, str] | None = None) -> None:
        self._send(status, "text/html; charset=utf-8", page, merchant.HEADERS | (headers or {}))

    @property
    def _host(self) -> Host:
        return self.server.host

    def _operator_only(self) -> None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        expected = self._host.keys.operator_token
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.encode(), expected.encode()):
            raise _ProblemError(
                401,
                "operator-only",
                "This is for the operator",
                "send the operator's token as bearer",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _body(self) -> bytes:
        """The whole body, so that the connection can go on whatever becomes of the request."""
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or len(lengths) > 1 or not all(_is_length(each) for each in lengths):
            self.close_connection = True
            raise _ProblemError(411, "length-required", "The body's length is not known", "send one Content-Length")
        length = int(lengths[0]) if lengths else 0
        if length > ENVELOPE_BYTES_MAX:
            self.close_connection = True
            self._read(min(length, _DISCARD_BYTES_MAX))
            raise _ProblemError(
                413, "too-large", "The body is too large", f"an envelope has at most {ENVELOPE_BYTES_MAX} bytes"
            )
        body = self._read(length)
        if len(body) < length:
            raise ConnectionError("the body ended early")  # not a 400: the envelope may be a good one
        return body

    def _read(self, length: int) -> bytes:
        deadline = time.monotonic() + _BODY_S
        body = bytearray()
        while len(body) < length:
            if time.monotonic() > deadline:
                raise TimeoutError("the body drips too slowly")
            part = self.rfile.read1(length - len(body))
            if not part:
                break
            body += part
        return bytes(body)

    def _send_json(self, document: object) -> None:
        self._send(200, "application/json", msgspec.json.encode(document))

    def _send_problem(self, problem: _ProblemError) -> None:
        self._send(problem.status, "application/problem+json", msgspec.json.encode(problem.document), problem.headers)

    def _send(self, status: int, media_type: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Access(Enum):
    """Who may ask."""

    ANYBODY = "anybody"
    TERMINAL = "terminal"  # with a client certificate, if the host wants one
    OPERATOR = "operator"  # with the bearer token


@dataclass(frozen=True, slots=True)
class _Request:
    """What was asked: the named parts of the path, the query, and the body."""

    named: dict[str, str]
    query: str
    body: bytes


_Act: TypeAlias = Callable[[_Handler, _Request], None]


@dataclass(frozen=True, slots=True)
class _Route:
    """One path of docs/host-api.yaml."""

    path: re.Pattern[str]
    methods: dict[str, _Act]
    access: _Access


def _route(path: str, access: _Access, **methods: _Act) -> _Route:
    """`{name}` in the path stands for a UUID, or what `parts` says."""
    parts = {"event": "|".join(EVENTS), "terminal": ID_PATTERN}
    pattern = re.sub(r"\{(\w+)\}", lambda name: f"(?P<{name[1]}>{parts.get(name[1], UUID_PATTERN)})", path)
    return _Route(re.compile(pattern), methods, access)


_ROUTES: Final = (
    _route("/v1/transactions/{transaction}/{event}", _Access.TERMINAL, PUT=_Handler.put_event),
    _route("/v1/transactions/{transaction}", _Access.TERMINAL, GET=_Handler.get_transaction),
    _route("/v1/checkpoints/{checkpoint}", _Access.TERMINAL, PUT=_Handler.put_checkpoint),
    _route("/v1/batches/{batch}", _Access.TERMINAL, PUT=_Handler.put_batch),
    _route("/v1/reconciliations/{reconciliation}", _Access.TERMINAL, PUT=_Handler.put_reconciliation),
    # Without a certificate, for it leads to one: the envelope's signature says who asks.
    _route("/v1/certificates/{certificate}", _Access.ANYBODY, PUT=_Handler.put_certificate),
    _route("/v1/terminals/{terminal}", _Access.TERMINAL, GET=_Handler.get_terminal),
    _route("/v1/status", _Access.ANYBODY, GET=_Handler.get_status),
    _route("/v1/bookings", _Access.OPERATOR, GET=_Handler.get_bookings),
    _route("/v1/checkpoints", _Access.OPERATOR, GET=_Handler.get_checkpoints),
    _route("/v1/terminals", _Access.OPERATOR, GET=_Handler.get_terminals),
    _route("/(merchant)?", _Access.ANYBODY, GET=_Handler.get_merchant),  # the page asks for a login itself
    _route("/merchant/login", _Access.ANYBODY, POST=_Handler.log_in),
    _route("/merchant/logout", _Access.ANYBODY, POST=_Handler.log_out),
)


def _field(form: bytes, name: str) -> str:
    """The one value of a field of a form; empty if it is not there once."""
    try:
        values = parse_qs(form.decode("ascii"), max_num_fields=_FIELDS_MAX, errors="strict").get(name, [])
    except ValueError:
        return ""
    return values[0] if len(values) == 1 else ""


def _before(query: str) -> int | None:
    """The place that a page of sales goes on from."""
    if not query:
        return None
    text = query.removeprefix("before=")
    if not (text != query and text.isascii() and text.isdecimal() and len(text) <= _PLACE_DIGITS_MAX):
        raise _ProblemError(400, "query", "The query is not understood", "it may be before= and a number")
    return int(text)


def _failure(fail: Fail) -> _ProblemError:
    headers = {} if fail.retry_after_s is None else {"Retry-After": str(fail.retry_after_s)}
    return _ProblemError(
        fail.status, "unavailable", responses.get(fail.status, "Error"), "send the same envelope again later", headers
    )


def _is_length(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 9


def open_host(directory: Path) -> Host:
    """The host of a directory on this machine's clock, made if it is not there, with the issuer of its bureau file."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    provision(directory, now=datetime.now(UTC), entropy=os.urandom)
    bureau = directory / BUREAU_FILE
    if not bureau.exists():
        Bureau.create(os.urandom).save(bureau)
    return Host(
        directory,
        imk_ac=Bureau.load(bureau).imk_ac,
        wall_ms=lambda: time.time_ns() // 1_000_000,
        today=lambda: datetime.now(UTC).date(),
        entropy=os.urandom,
    )


def serve(directory: Path, *, port: int, stop: threading.Event, client_certificates: bool = False) -> None:
    """Run the host of this directory until `stop` is set. Says on standard output when and where it listens."""
    with open_host(directory) as host, HostServer(host, port=port, client_certificates=client_certificates) as server:
        control = ControlSocket(directory / controls.SOCKET_NAME, server.obey)
        try:
            print(f"host listening on port {server.port}", flush=True)
            stop.wait()
        finally:
            control.close()


def main(argv: list[str] | None = None) -> int:
    """The simulated host as a command."""
    parser = argparse.ArgumentParser(prog="payterm-sim host", description="The operator's host, simulated.")
    parser.add_argument("directory", type=Path, help="the host's keys, certificates and books; made if need be")
    parser.add_argument("--port", type=int, default=8443, help="where to listen on loopback (0: a free port)")
    parser.add_argument(
        "--register",
        nargs=3,
        action="append",
        default=[],
        metavar=("TERMINAL", "MERCHANT", "KEY"),
        help="accept a terminal's signing key (public, PEM), and exit",
    )
    parser.add_argument(
        "--enrol", type=Path, action="append", default=[], metavar="CARD", help="open a card's account, and exit"
    )
    parser.add_argument(
        "--revoke", action="append", default=[], metavar="TERMINAL", help="take nothing more from it, and exit"
    )
    parser.add_argument(
        "--readmit", action="append", default=[], metavar="TERMINAL", help="take everything from it again, and exit"
    )
    parser.add_argument("--configuration", metavar="VERSION", help="what terminals should be configured as, and exit")
    parser.add_argument("--bookings", action="store_true", help="print what is booked, and exit")
    parser.add_argument("--json", action="store_true", help="the bookings as JSON")
    parser.add_argument("--forks", action="store_true", help="print checkpoints that contradict others, and exit")
    parser.add_argument("--gaps", action="store_true", help="print envelope numbers that have not come, and exit")
    parser.add_argument("--order", metavar="JSON", help="make the running host (mis)behave, and exit")
    parser.add_argument(
        "--client-certificates", action="store_true", help="admit only terminals with a certificate issued here"
    )
    arguments = parser.parse_args(argv)
    directory: Path = arguments.directory
    if arguments.order is not None:
        print(json.dumps(controls.order_json(directory, arguments.order.encode())))
    elif _is_task(arguments):
        try:
            with open_host(directory) as host:
                _do_tasks(host, arguments)
        except StoreError as error:
            print(f"payterm-sim host: {error}", file=sys.stderr)
            return 1
    else:
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        serve(directory, port=arguments.port, stop=stop, client_certificates=arguments.client_certificates)
    return 0


def _is_task(arguments: argparse.Namespace) -> bool:
    """Whether something is to be done once, beside a host that may be running."""
    tasks = ("register", "enrol", "revoke", "readmit", "configuration", "bookings", "forks", "gaps")
    return any(getattr(arguments, task) for task in tasks)


def _do_tasks(host: Host, arguments: argparse.Namespace) -> None:
    for terminal, merchant_id, key in arguments.register:
        print(f"registered {terminal}, key {host.register(terminal, merchant_id, Path(key).read_bytes())}")
    for card in arguments.enrol:
        host.enrol(CardProfile.load(card))
    for terminal in arguments.revoke:
        host.revoke(terminal)
        print(f"revoked {terminal}: only its reversals and checkpoints are taken in")
    for terminal in arguments.readmit:
        host.readmit(terminal)
        print(f"readmitted {terminal}")
    if arguments.configuration:
        host.set_configuration(arguments.configuration)
        print(f"terminals should be configured as {arguments.configuration}")
    if arguments.bookings:
        _print_bookings(host.bookings(), as_json=arguments.json)
    if arguments.forks:
        for fork in host.forks():
            print(f"{fork.terminal} {fork.epoch}/{fork.number}, record {fork.sequence}: {fork.detail}")
    if arguments.gaps:
        for gap in host.all_gaps():
            print(f"{gap.terminal} {gap.epoch}/{gap.first} to {gap.epoch}/{gap.last}")


def _print_bookings(bookings: list[Booking], *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(bookings), indent=2).decode())
        return
    for booking in bookings:
        print(
            f"{booking.transaction}  {booking.kind:<6}  {booking.terminal} {booking.epoch}/{booking.number}  "
            f"{booking.amount:>10} {booking.currency}  {booking.state.value:<9}  "
            f"{booking.authorisation_code or '-':<6}  received {booking.received}"
        )


if __name__ == "__main__":
    sys.exit(main())

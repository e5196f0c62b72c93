"""The host's HTTPS interface (docs/host-api.yaml), and the host as a process.

HTTP/1.1 with keep-alive over the standard library: one thread per connection, everything bounded. What is not a signed
answer is `application/problem+json`, and no decision. Misbehaviours are applied here, around `Host.receive`, which
knows nothing of them.
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
from datetime import UTC, datetime
from functools import partial
from http.client import responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hwsim.cards.personalise import Bureau, CardProfile
from hwsim.host import controls, jose, tls
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
from hwsim.host.host import EVENTS, Host, Refused, Reply, provision
from hwsim.host.messages import ANSWER_TYPE, ENVELOPE_BYTES_MAX, UUID_PATTERN
from hwsim.host.store import Booking
from hwsim.host.tls import Certificate

CONNECTIONS_MAX: Final = 64
MEDIA_TYPE: Final = "application/jose"
BUREAU_FILE: Final = "bureau.json"
_IDLE_S: Final = 30.0  # a kept connection without a request
_HANDSHAKE_S: Final = 10.0
_BODY_S: Final = 10.0  # a whole body, however slowly its bytes drip
_GRACE_S: Final = 5.0  # requests under way when the listener stops; afterwards they are cut
_POLL_S: Final = 0.05
_DISCARD_BYTES_MAX: Final = 1024 * 1024  # of a body that is too long, so that its sender gets to read why

_EVENT_PATH: Final = re.compile(rf"/v1/transactions/(?P<transaction>{UUID_PATTERN})/(?P<event>{'|'.join(EVENTS)})")
_CHECKPOINT_PATH: Final = re.compile(rf"/v1/checkpoints/(?P<checkpoint>{UUID_PATTERN})")
_TRANSACTION_PATH: Final = re.compile(rf"/v1/transactions/(?P<transaction>{UUID_PATTERN})")

_LISTS: Final = frozenset({"/v1/status", "/v1/bookings", "/v1/checkpoints"})

# Asked for, because gateways in between may rely on it. The host does not: the path says what is the same.
_IDEMPOTENCY_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}", re.ASCII)

_log = logging.getLogger(__name__)


class HostServer:
    """Serves a host on loopback; listening can stop and start again on the same port."""

    def __init__(self, host: Host, *, port: int = 0) -> None:
        self.host = host
        self.controls = Controls()
        self.port = port
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
            context = tls.server_context(self.host.directory, self._certificate, datetime.now(UTC))
            self._listener = _Listener(self.port, context, self.host, self.controls)
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

    def __init__(self, port: int, context: ssl.SSLContext, host: Host, controls: Controls) -> None:
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
        self._respond(self._put)

    def do_GET(self) -> None:
        self._respond(self._get)

    def do_POST(self) -> None:
        self._respond(self._not_allowed)

    def do_DELETE(self) -> None:
        self._respond(self._not_allowed)

    def do_HEAD(self) -> None:
        self._respond(self._not_allowed)

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

    def _respond(self, act: Callable[[], None]) -> None:
        self.server.enter(self.connection, busy=True)
        try:
            act()
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

    def _put(self) -> None:
        body = self._body()
        receive = self._receiver()
        if receive is None:
            raise self._no_such_path("PUT")
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
        reply = receive(body)
        answer = self._misbehave_after(misbehaviour, reply.answer)
        if answer is not None:
            headers = {"Idempotent-Replayed": "true"} if reply.repeated else {}
            self._send(200, MEDIA_TYPE, answer, headers)

    def _receiver(self) -> Callable[[bytes], Reply] | None:
        """What takes in the envelopes that are put here."""
        host = self.server.host
        if (named := _EVENT_PATH.fullmatch(self.path)) is not None:
            return partial(host.receive, named["transaction"], named["event"])
        if (named := _CHECKPOINT_PATH.fullmatch(self.path)) is not None:
            return partial(host.countersign, named["checkpoint"])
        return None

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

    def _get(self) -> None:
        self._body()
        match self.path:
            case "/v1/status":
                keys = self.server.host.keys
                self._send_json({"v": 1, "sealing_key": keys.sealing_id, "answer_key": keys.answer_id})
            case "/v1/bookings":
                self._operator_only()
                self._send_json({"v": 1, "bookings": self.server.host.bookings()})
            case "/v1/checkpoints":
                self._operator_only()
                host = self.server.host
                self._send_json({"v": 1, "checkpoints": host.checkpoints(), "forks": host.forks()})
            case path if named := _TRANSACTION_PATH.fullmatch(path):
                self._send_transaction(named["transaction"])
            case _:
                raise self._no_such_path("GET")

    def _send_transaction(self, transaction: str) -> None:
        known = self.server.host.known(transaction)
        if known is None:
            raise _ProblemError(
                404, "transaction-unknown", "The host has not received this transaction", "send its envelopes"
            )
        events = {
            message.event: {"envelope": message.envelope_sha256, "answer": message.answer} for message in known.messages
        }
        self._send_json({"v": 1, "transaction": transaction, "state": known.booking.state, "events": events})

    def _not_allowed(self) -> None:
        self._body()
        raise self._no_such_path(self.command)

    def _no_such_path(self, method: str) -> _ProblemError:
        """404, or 405 for a path that takes another method."""
        allowed = None
        if self._receiver() is not None:
            allowed = "PUT"
        elif _TRANSACTION_PATH.fullmatch(self.path) or self.path in _LISTS:
            allowed = "GET"
        if allowed is None:
            return _ProblemError(404, "not-found", "There is nothing here", "see the paths of host-api.yaml")
        return _ProblemError(
            405, "method", f"{method} is not what this takes", f"use {allowed}", headers={"Allow": allowed}
        )

    def _operator_only(self) -> None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        expected = self.server.host.keys.operator_token
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


def serve(directory: Path, *, port: int, stop: threading.Event) -> None:
    """Run the host of this directory until `stop` is set. Says on standard output when and where it listens."""
    with open_host(directory) as host, HostServer(host, port=port) as server:
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
    parser.add_argument("--bookings", action="store_true", help="print what is booked, and exit")
    parser.add_argument("--json", action="store_true", help="the bookings as JSON")
    parser.add_argument("--forks", action="store_true", help="print checkpoints that contradict others, and exit")
    parser.add_argument("--order", metavar="JSON", help="make the running host (mis)behave, and exit")
    arguments = parser.parse_args(argv)
    directory: Path = arguments.directory
    if arguments.order is not None:
        print(json.dumps(controls.order_json(directory, arguments.order.encode())))
    elif arguments.register or arguments.enrol:
        with open_host(directory) as host:
            for terminal, merchant, key in arguments.register:
                print(f"registered {terminal}, key {host.register(terminal, merchant, Path(key).read_bytes())}")
            for card in arguments.enrol:
                host.enrol(CardProfile.load(card))
    elif arguments.bookings:
        with open_host(directory) as host:
            _print_bookings(host.bookings(), as_json=arguments.json)
    elif arguments.forks:
        with open_host(directory) as host:
            for fork in host.forks():
                print(f"{fork.terminal} {fork.epoch}/{fork.number}, record {fork.sequence}: {fork.detail}")
    else:
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        serve(directory, port=arguments.port, stop=stop)
    return 0


def _print_bookings(bookings: list[Booking], *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(bookings), indent=2).decode())
        return
    for booking in bookings:
        print(
            f"{booking.transaction}  {booking.terminal} {booking.epoch}/{booking.number}  "
            f"{booking.amount:>10} {booking.currency}  {booking.state.value:<9}  "
            f"{booking.authorisation_code or '-':<6}  received {booking.received}"
        )


if __name__ == "__main__":
    sys.exit(main())

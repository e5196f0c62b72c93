"""The double as an HTTPS server and as a process: `payterm-sim stripe`.

HTTP/1.1 with keep-alive over the standard library, one thread per connection. Its directory holds an authority of its
own, a restricted key to be copied to the terminal, and the books. Orders are one JSON object a line on a Unix socket
there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Annotated, Any, Final, TypeAlias, cast

import msgspec

from hwsim.host import controls, tls
from hwsim.host.controls import ControlSocket
from hwsim.host.keys import write_private
from hwsim.host.tls import Certificate
from hwsim.stripe_double.api import Request, StripeDouble
from hwsim.stripe_double.books import Booking
from hwsim.stripe_double.faults import ARMED_MAX, Fault

KEY_FILE: Final = "stripe-key"  # under the name that the terminal's credential has
CONNECTIONS_MAX: Final = 64
BODY_BYTES_MAX: Final = 65_536
_IDLE_S: Final = 30.0
_HANDSHAKE_S: Final = 10.0
_POLL_S: Final = 0.02

_log = logging.getLogger(__name__)


class Misbehave(msgspec.Struct, frozen=True, tag_field="do", tag="misbehave"):
    fault: Fault
    times: Annotated[int, msgspec.Meta(ge=1, le=ARMED_MAX)] = 1


class Behave(msgspec.Struct, frozen=True, tag_field="do", tag="behave"):
    """Forget the faults in store."""


class Advance(msgspec.Struct, frozen=True, tag_field="do", tag="advance"):
    """Let time pass; idempotency keys are forgotten after 24 hours of it."""

    milliseconds: Annotated[int, msgspec.Meta(ge=0)]


class Bookings(msgspec.Struct, frozen=True, tag_field="do", tag="bookings"):
    """All payment records."""


class Requests(msgspec.Struct, frozen=True, tag_field="do", tag="requests"):
    """Every request that came."""


Order: TypeAlias = Misbehave | Behave | Advance | Bookings | Requests


class StripeServer:
    """Serves a double on loopback; listening can stop and start again on the same port."""

    def __init__(self, double: StripeDouble, directory: Path, *, port: int = 0) -> None:
        self.double = double
        self.directory = directory
        self.port = port
        self._listener: _Listener | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def ca_file(self) -> Path:
        return self.directory / "public" / "ca.pem"

    def start(self) -> None:
        """Listen; returns when connections are accepted. Raises `OSError` when the port is taken."""
        if self._listener is not None:
            return
        context = tls.server_context(self.directory, Certificate.GOOD, datetime.now(UTC))
        self._listener = _Listener(self.port, context, self.double)
        self.port = int(self._listener.server_address[1])
        self._thread = threading.Thread(
            target=self._listener.serve_forever, args=(_POLL_S,), name="stripe", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and cut all connections, as a crash would; delays end."""
        if self._listener is None or self._thread is None:
            return
        self.double.stopping.set()
        self._listener.stop()
        self._thread.join()
        self.double.stopping.clear()
        self._listener = self._thread = None

    def obey(self, order: Order) -> Any:
        """Carry out an order from the control socket."""
        match order:
            case Misbehave(fault, times):
                self.double.faults.arm(fault, times)
            case Behave():
                self.double.faults.clear()
            case Advance(milliseconds):
                self.double.advance(milliseconds)
            case Bookings():
                return self.double.bookings()
            case Requests():
                return self.double.requests()
        return None

    def __enter__(self) -> StripeServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Orders(ControlSocket):
    """The host's control socket, for the double's own orders."""

    def __init__(self, path: Path, obey: Callable[[Order], Any]) -> None:
        self._obey_ours = obey
        super().__init__(path, cast("Any", obey))

    def _answer(self, line: bytes) -> bytes:
        try:
            order: Order = msgspec.json.decode(line, type=Order)
            return msgspec.json.encode({"ok": self._obey_ours(order)})
        except (msgspec.MsgspecError, ValueError, OSError) as error:
            return msgspec.json.encode({"error": str(error)})


def order(directory: Path, what: Order) -> Any:
    """Ask the double that runs in this directory. Raises `OrderRefused`; `OSError` if none runs there."""
    return controls.order_json(directory, msgspec.json.encode(what))


class _Listener(ThreadingHTTPServer):
    """One period of listening."""

    daemon_threads = False  # so that server_close waits for them
    request_queue_size = CONNECTIONS_MAX

    def __init__(self, port: int, context: ssl.SSLContext, double: StripeDouble) -> None:
        self.double = double
        self._context = context
        self._places = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def stop(self) -> None:
        self.shutdown()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)  # below TLS, whose state is its thread's
        self.server_close()

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer would ask the name service who we are

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(_HANDSHAKE_S)
        with self._context.wrap_socket(request, server_side=True, do_handshake_on_connect=False) as connection:
            with self._lock:
                self._connections.add(connection)
            try:
                connection.do_handshake()
                _Handler(connection, client_address, self)
            finally:
                with self._lock:
                    self._connections.discard(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if isinstance(error, OSError):  # TLS errors among them: clients that refuse our certificate, or have gone
            _log.debug("stripe: a connection ended: %s", error)
        else:
            _log.exception("stripe: a connection failed")


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "payterm-stripe-double"
    sys_version = ""
    timeout = _IDLE_S
    wbufsize = -1  # head and body leave together
    disable_nagle_algorithm = True
    server: _Listener

    def do_GET(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    def do_DELETE(self) -> None:
        self._respond()

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug("stripe: %s", format % args)

    def _respond(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal() or int(length) > BODY_BYTES_MAX:
            self.close_connection = True
            return
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the body ended early")
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body.decode("utf-8", "replace"))
        response = self.server.double.answer(request)
        if response is None:
            self.close_connection = True
            return
        content = response.body.encode()
        self.send_response(response.status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            "Stripe-Version": headers.get("stripe-version", ""),
            **({"Idempotency-Key": key} if (key := headers.get("idempotency-key")) else {}),
            **response.headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def provision(directory: Path, *, now: datetime, entropy: Callable[[int], bytes]) -> Path:
    """Make authority, certificate and a restricted test key, unless they are there; returns the key's file."""
    for name in ("private", "public"):
        (directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    tls.make(directory, now)
    key_file = directory / "public" / KEY_FILE
    if not key_file.exists():
        key = f"rk_test_{entropy(16).hex()}"
        write_private(key_file, key.encode() + b"\n")
        write_private(directory / "private" / "keys.json", json.dumps({key: ["read", "write"]}).encode())
    return key_file


def open_double(
    directory: Path,
    *,
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    entropy: Callable[[int], bytes] = os.urandom,
) -> StripeDouble:
    """The double of a directory, made if it is not there."""
    provision(directory, now=datetime.now(UTC), entropy=entropy)
    keys = json.loads((directory / "private" / "keys.json").read_bytes())
    return StripeDouble(
        directory,
        keys={key: frozenset(permissions) for key, permissions in keys.items()},
        now_ms=now_ms,
        entropy=entropy,
    )


def serve(directory: Path, *, port: int, stop: threading.Event, clock_ms: int | None = None) -> None:
    """Run the double of this directory until `stop` is set. Says on standard output when and where it listens."""
    with contextlib.closing(open_double(directory)) as double, StripeServer(double, directory, port=port) as server:
        if clock_ms is not None:
            double.advance(clock_ms - double.now_ms())
        orders = _Orders(directory / controls.SOCKET_NAME, server.obey)
        try:
            print(f"stripe listening on port {server.port}", flush=True)
            stop.wait()
        finally:
            orders.close()


def twice(bookings: Sequence[Booking]) -> list[str]:
    """The references that more than one payment record has: sales booked twice."""
    counted = Counter(booking.payment_reference for booking in bookings)
    return sorted(reference for reference, count in counted.items() if reference is not None and count > 1)


def main(argv: list[str] | None = None) -> int:
    """The double as a command."""
    parser = argparse.ArgumentParser(
        prog="payterm-sim stripe",
        description="Stripe, simulated: payment records, idempotency keys that live for 24 hours, and faults on order.",
    )
    parser.add_argument("directory", type=Path, help="its key, certificates and books; made if need be")
    parser.add_argument("--port", type=int, default=8444, help="where to listen on loopback (0: a free port)")
    parser.add_argument(
        "--clock",
        type=_time_ms,
        metavar="TIME",
        help="start its clock at this time (2026-11-24T08:00:00Z); otherwise it goes on where it was",
    )
    parser.add_argument(
        "--bookings", action="store_true", help="print the payment records, and exit (1: one is double)"
    )
    parser.add_argument("--json", action="store_true", help="the payment records as JSON")
    parser.add_argument("--order", metavar="JSON", help="make the running double (mis)behave, and exit")
    arguments = parser.parse_args(argv)
    directory: Path = arguments.directory
    if arguments.order is not None:
        print(json.dumps(controls.order_json(directory, arguments.order.encode())))
    elif arguments.bookings:
        with contextlib.closing(open_double(directory)) as double:
            bookings = double.bookings()
        _print_bookings(bookings, as_json=arguments.json)
        return 1 if twice(bookings) else 0
    else:
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        serve(directory, port=arguments.port, stop=stop, clock_ms=arguments.clock)
    return 0


def _time_ms(text: str) -> int:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise argparse.ArgumentTypeError("it needs a time zone: 2026-11-24T08:00:00Z")
    return int(time.timestamp() * 1000)


def _print_bookings(bookings: Sequence[Booking], *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(bookings), indent=2).decode())
        return
    for booking in bookings:
        print(
            f"{booking.id}  {booking.payment_reference or '-':<36}  {booking.amount:>10} {booking.currency}  "
            f"{booking.state.value:<10}  refunded {booking.refunded}"
        )
    for reference in twice(bookings):
        print(f"{reference} is booked more than once")


if __name__ == "__main__":
    sys.exit(main())

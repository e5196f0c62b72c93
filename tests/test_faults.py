"""The bad network: each fault does what it says, to TLS as to plain connections, while they run."""

from __future__ import annotations

import contextlib
import http.client
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from host_rig import seeded

from hwsim.faults import CONNECTIONS_MAX, Fault, FaultProxy
from hwsim.host import provision, tls

ROOT = Path(__file__).resolve().parent.parent
GONE = (ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected, ssl.SSLEOFError)


class Upstream(ThreadingHTTPServer):
    """Notes every request that it has received whole and worked on."""

    daemon_threads = False
    request_queue_size = CONNECTIONS_MAX

    def __init__(self, context: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.received: list[bytes] = []
        self.work_s = 0.0
        self.context = context

    def finish_request(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        request.settimeout(10)
        if self.context is None:
            super().finish_request(request, client_address)
            return
        with contextlib.suppress(OSError), self.context.wrap_socket(request, server_side=True) as connection:
            super().finish_request(connection, client_address)


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.server.work_s)
        self.server.received.append(body)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *args: object) -> None:
        pass


class Transport:
    """How to reach the upstream: plain, or by one version of TLS."""

    def __init__(self, name: str, directory: Path) -> None:
        self.server: ssl.SSLContext | None = None
        self._client: ssl.SSLContext | None = None
        if name != "plain":
            now = datetime.now(UTC)
            public = provision(directory, now=now, entropy=seeded())
            self.server = tls.server_context(directory, tls.Certificate.GOOD, now)
            self._client = ssl.create_default_context(cafile=str(public / "ca.pem"))
            version = {"tls1.2": ssl.TLSVersion.TLSv1_2, "tls1.3": ssl.TLSVersion.TLSv1_3}[name]
            self._client.minimum_version = self._client.maximum_version = version

    def connect(self, port: int, timeout_s: float = 10) -> http.client.HTTPConnection:
        if self._client is None:
            return http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
        return http.client.HTTPSConnection("127.0.0.1", port, timeout=timeout_s, context=self._client)


def ask(connection: http.client.HTTPConnection, body: bytes = b"sale") -> bytes:
    connection.request("PUT", "/", body)
    return connection.getresponse().read()


@pytest.fixture(params=["plain", "tls1.2", "tls1.3"])
def transport(request: pytest.FixtureRequest, tmp_path: Path) -> Transport:
    return Transport(request.param, tmp_path)


@contextlib.contextmanager
def running(upstream: Upstream) -> Iterator[Upstream]:
    thread = threading.Thread(target=upstream.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield upstream
    finally:
        upstream.shutdown()
        thread.join()
        upstream.server_close()


@pytest.fixture
def upstream(transport: Transport) -> Iterator[Upstream]:
    with running(Upstream(transport.server)) as server:
        yield server


@pytest.fixture
def proxy(upstream: Upstream) -> Iterator[FaultProxy]:
    with FaultProxy(("127.0.0.1", upstream.server_port)) as made:
        yield made


def test_without_a_fault_everything_passes(proxy: FaultProxy, upstream: Upstream, transport: Transport) -> None:
    large = bytes(range(256)) * 4000
    with contextlib.closing(transport.connect(proxy.port)) as connection:
        assert ask(connection, large) == b"ok"
        assert ask(connection) == b"ok"
    assert upstream.received == [large, b"sale"]


def test_refusing_is_like_nobody_there(proxy: FaultProxy, upstream: Upstream, transport: Transport) -> None:
    with contextlib.closing(transport.connect(proxy.port)) as connection:
        assert ask(connection) == b"ok"
        port = proxy.port
        proxy.switch(Fault.REFUSE)
        proxy.switch(Fault.REFUSE)
        with pytest.raises(GONE):
            ask(connection)
        connection.close()
        with pytest.raises(ConnectionRefusedError):
            ask(connection)
        proxy.switch(Fault.PASS)
        assert proxy.port == port
        connection.close()
        assert ask(connection) == b"ok"
    assert len(upstream.received) == 2


def test_a_black_hole_takes_and_never_gives(proxy: FaultProxy, upstream: Upstream, transport: Transport) -> None:
    with contextlib.closing(transport.connect(proxy.port, timeout_s=0.3)) as connection:
        proxy.switch(Fault.BLACK_HOLE)
        with pytest.raises(TimeoutError):
            ask(connection)
    assert upstream.received == []


def test_a_black_hole_opens_under_a_running_connection(
    proxy: FaultProxy, upstream: Upstream, transport: Transport
) -> None:
    with contextlib.closing(transport.connect(proxy.port, timeout_s=0.5)) as connection:
        assert ask(connection) == b"ok"
        proxy.switch(Fault.BLACK_HOLE)
        with pytest.raises(TimeoutError):
            ask(connection)
        connection.close()
        proxy.switch(Fault.PASS)
        assert ask(connection) == b"ok"
    assert len(upstream.received) == 2


def test_a_cut_kills_what_runs_and_nothing_else(proxy: FaultProxy, transport: Transport) -> None:
    with contextlib.closing(transport.connect(proxy.port)) as connection:
        assert ask(connection) == b"ok"
        assert proxy.cut() == 1
        assert proxy.cut() == 0
        with pytest.raises(GONE):
            ask(connection)
        connection.close()
        assert ask(connection) == b"ok"


def test_a_delay_delays(proxy: FaultProxy, transport: Transport) -> None:
    with contextlib.closing(transport.connect(proxy.port)) as connection:
        assert ask(connection) == b"ok"
        proxy.delay_ms = 300
        start = time.monotonic()
        assert ask(connection) == b"ok"
        assert time.monotonic() - start >= 0.3


@pytest.mark.parametrize("size_bytes", [4, 40_000])
def test_the_answer_is_lost_after_the_whole_request_has_arrived(
    proxy: FaultProxy, upstream: Upstream, transport: Transport, size_bytes: int
) -> None:
    body = b"s" * size_bytes
    proxy.switch(Fault.DROP_AFTER_REQUEST)
    for number in range(1, 3):
        with contextlib.closing(transport.connect(proxy.port)) as connection, pytest.raises(GONE):
            ask(connection, body)
        assert upstream.received == [body] * number
    proxy.switch(Fault.PASS)
    with contextlib.closing(transport.connect(proxy.port)) as connection:
        assert ask(connection, body) == b"ok"


def test_the_request_may_take_its_time_on_both_sides(
    proxy: FaultProxy, upstream: Upstream, transport: Transport
) -> None:
    upstream.work_s = 0.5
    proxy.switch(Fault.DROP_AFTER_REQUEST)
    with contextlib.closing(transport.connect(proxy.port)) as connection, pytest.raises(GONE):
        connection.connect()
        time.sleep(0.4)  # longer than the proxy takes for the silence after a request
        ask(connection)
    assert upstream.received == [b"sale"]


def test_the_answer_can_be_lost_on_a_connection_that_has_carried_others(
    proxy: FaultProxy, upstream: Upstream, transport: Transport
) -> None:
    with contextlib.closing(transport.connect(proxy.port)) as connection:
        assert ask(connection) == b"ok"
        proxy.switch(Fault.DROP_AFTER_REQUEST)
        with pytest.raises(GONE):
            ask(connection, b"second")
    assert upstream.received == [b"sale", b"second"]


class Silent(socketserver.ThreadingTCPServer):
    """Takes connections and waits until they end."""

    daemon_threads = False
    request_queue_size = 2 * CONNECTIONS_MAX


class Hold(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.settimeout(10)
        with contextlib.suppress(OSError):
            self.request.recv(1)


def test_connections_are_bounded() -> None:
    with Silent(("127.0.0.1", 0), Hold) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        with FaultProxy(("127.0.0.1", server.server_address[1])) as proxy, contextlib.ExitStack() as stack:
            for _ in range(CONNECTIONS_MAX):
                stack.enter_context(socket.create_connection(("127.0.0.1", proxy.port), timeout=10))
            extra = stack.enter_context(socket.create_connection(("127.0.0.1", proxy.port), timeout=10))
            with pytest.raises(ConnectionResetError):
                extra.recv(1)
            assert proxy.cut() == CONNECTIONS_MAX
        server.shutdown()
        thread.join()


def test_an_upstream_that_is_down_shows_as_a_reset(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    plain = Transport("plain", tmp_path)
    with FaultProxy(("127.0.0.1", port)) as proxy:
        connection = plain.connect(proxy.port)
        with contextlib.closing(connection), pytest.raises(GONE):
            ask(connection)


def test_as_a_process_it_takes_orders_line_by_line(tmp_path: Path) -> None:
    plain = Transport("plain", tmp_path)
    with running(Upstream(None)) as upstream:
        command = [sys.executable, "-m", "hwsim.faults", f"127.0.0.1:{upstream.server_port}"]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'hw-sim'}"},
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None

            def order(text: str) -> str:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(text + "\n")
                process.stdin.flush()
                return process.stdout.readline().strip()

            try:
                listening = process.stdout.readline()
                assert listening.startswith("listening on 127.0.0.1:")
                with contextlib.closing(plain.connect(int(listening.rpartition(":")[2]))) as connection:
                    assert ask(connection) == b"ok"
                    assert order("refuse") == "refuse"
                    with pytest.raises(GONE):
                        ask(connection)
                    assert order("pass") == "pass"
                    assert order("delay 5") == "delay 5"
                    connection.close()
                    assert ask(connection) == b"ok"
                    assert order("cut") == "cut 1"
                    assert order("explode").startswith("orders: ")
                process.stdin.close()
                assert process.wait(10) == 0
            finally:
                process.kill()

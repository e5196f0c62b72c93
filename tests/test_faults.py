"""The bad network: each fault does what it says, to TLS as to plain connections, while they run.

What a fault is, is said here from both ends: what the real client (http.client, requests) sees, and how often the
server has received the request.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import re
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from host_rig import seeded

from hwsim.faults import CONNECTIONS_MAX, Fault, FaultProxy, Plan, Severity, Termination
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
        self.targets: list[str] = []
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
        self.server.targets.append(self.path)
        self.send_response(200)
        self.send_header("Content-Type", "application/jose")
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
            self.ca = str(public / "ca.pem")
            self._client = ssl.create_default_context(cafile=self.ca)
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


@pytest.mark.parametrize(
    ("fault", "seen", "received"),
    [
        (Fault.DROP_REQUEST, (TimeoutError,), 0),
        (Fault.RESTART, GONE, 0),
        (Fault.DROP_ANSWER, (TimeoutError,), 1),
    ],
    ids=lambda value: value.value if isinstance(value, Fault) else "",
)
def test_what_is_lost_on_the_way(  # noqa: PLR0917 (the cases, and where they are played)
    proxy: FaultProxy, upstream: Upstream, transport: Transport, fault: Fault, seen: tuple[type, ...], received: int
) -> None:
    with contextlib.closing(transport.connect(proxy.port)) as connection:
        assert ask(connection, b"before") == b"ok"
    proxy.switch(fault)
    for _ in range(2):
        with contextlib.closing(transport.connect(proxy.port, timeout_s=0.4)) as connection, pytest.raises(seen):
            ask(connection)
    proxy.switch(Fault.PASS)
    with contextlib.closing(transport.connect(proxy.port)) as connection:
        assert ask(connection, b"after") == b"ok"
    assert upstream.received == [b"before", *[b"sale"] * 2 * received, b"after"]
    assert proxy.stats().faults == {fault: 2}


def test_an_answer_drips(upstream: Upstream, transport: Transport) -> None:
    with (
        FaultProxy(("127.0.0.1", upstream.server_port), severity=Severity(drip_ms=2)) as proxy,
        contextlib.closing(transport.connect(proxy.port, timeout_s=3)) as connection,
    ):
        assert ask(connection) == b"ok"
        proxy.switch(Fault.SLOW_LORIS)
        start = time.monotonic()
        assert ask(connection) == b"ok"  # slowly, and whole
        assert time.monotonic() - start >= 0.2


def test_a_request_comes_late(upstream: Upstream, transport: Transport) -> None:
    played: list[str] = []
    with FaultProxy(("127.0.0.1", upstream.server_port), report=lambda one: played.append(str(one))) as proxy:
        proxy.switch(Fault.DELAY)
        start = time.monotonic()
        with contextlib.closing(transport.connect(proxy.port)) as connection:
            assert ask(connection) == b"ok"
        took_ms = (time.monotonic() - start) * 1000
    (line,) = played
    delay = re.fullmatch(r"connection 1 delay -: the request comes (\d+) ms late", line)
    assert delay is not None
    assert took_ms >= int(delay[1])


def test_connections_overtake_each_other(upstream: Upstream, transport: Transport) -> None:
    with FaultProxy(("127.0.0.1", upstream.server_port), severity=Severity(overtake_ms_max=5000)) as proxy:
        proxy.switch(Fault.REORDER)
        first, second = transport.connect(proxy.port), transport.connect(proxy.port)
        with contextlib.closing(first), contextlib.closing(second):
            first.request("PUT", "/", b"first")
            deadline = time.monotonic() + 5
            while proxy.stats().connections < 1 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            assert upstream.received == []
            assert ask(second, b"second") == b"ok"
            assert first.getresponse().read() == b"ok"
    assert upstream.received == [b"second", b"first"]


def test_a_transparent_proxy_says_what_it_cannot_do(proxy: FaultProxy) -> None:
    with pytest.raises(ValueError, match="truncate: only a proxy that terminates TLS"):
        proxy.switch(Fault.TRUNCATE)
    assert proxy.fault is Fault.PASS


# ---- with keys: requests and answers


TINY = Severity(delay_ms_max=20, drip_ms=0, overtake_ms_max=10, oversized_bytes=1024 * 1024)


class Shop:
    """A client as the upload service is one: requests over TLS, keep-alive, time-outs, no redirects."""

    def __init__(self, url: str, ca: str, timeout_s: float = 0.4) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._session = requests.Session()
        self._session.verify = ca
        self._session.trust_env = False

    def put(self, path: str = "/v1/sale", body: bytes = b"sale") -> requests.Response:
        return self._session.put(
            self._url + path, body, timeout=(self._timeout_s, self._timeout_s), allow_redirects=False
        )

    def see(self, path: str = "/v1/sale", body: bytes = b"sale") -> str:
        """A word for what comes of a request."""
        try:
            answer = self.put(path, body)
        except requests.RequestException as error:
            return kind_of(error)
        content = answer.headers.get("Content-Type", "-").partition(";")[0]
        return f"{answer.status_code} {content} {len(answer.content)}"

    def __enter__(self) -> Shop:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()


def kind_of(error: requests.RequestException) -> str:
    """The innermost cause."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and len(causes) < 16:
        causes.append(cause)
    return type(causes[-1]).__name__


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[tuple[Upstream, Transport, Termination]]:
    transport = Transport("tls1.3", tmp_path)
    with running(Upstream(transport.server)) as server:
        yield server, transport, Termination(tmp_path)


Secure = tuple[Upstream, Transport, Termination]
OK = "200 application/jose 2"
# How an end without notice looks depends on what the client was doing, and on the kernel.
RESET = {"ConnectionResetError", "RemoteDisconnected", "SSLEOFError", "IncompleteRead"}
EXCHANGES = [
    (Fault.PASS, {OK}, {1}),
    (Fault.REFUSE, {"ConnectionRefusedError"}, {0}),
    (Fault.BLACK_HOLE, {"TimeoutError"}, {0}),
    (Fault.DROP_REQUEST, {"TimeoutError"}, {0}),
    (Fault.RESTART, RESET, {0}),
    (Fault.DROP_AFTER_REQUEST, RESET, {1}),
    (Fault.DROP_ANSWER, {"TimeoutError"}, {1}),
    (Fault.DELAY, {OK}, {1}),
    (Fault.REORDER, {OK}, {1}),
    (Fault.SLOW_LORIS, {OK}, {1}),
    (Fault.DUPLICATE, {OK}, {2}),
    (Fault.GARBAGE, {"BadStatusLine"}, {1}),
    (Fault.WRONG_TYPE, {"200 text/html 103"}, {1}),
    (Fault.OVERSIZED, RESET, {1}),
    (Fault.STATUS_4XX, {f"{status} - 0" for status in (401, 403, 404, 408, 425, 429)}, {0}),
    (Fault.STATUS_5XX, {f"{status} - 0" for status in (500, 502, 503, 504)}, {0, 1}),
    (Fault.CAPTIVE_PORTAL, {"302 - 0", "200 text/html 103"}, {0}),
    (Fault.CERTIFICATE_EXPIRED, {"SSLCertVerificationError"}, {0}),
    (Fault.CERTIFICATE_WRONG_NAME, {"SSLCertVerificationError"}, {0}),
    (Fault.CERTIFICATE_UNTRUSTED, {"SSLCertVerificationError"}, {0}),
    (Fault.CERTIFICATE_CHANGED, {OK}, {1}),
]


@pytest.mark.parametrize(("fault", "seen", "received"), EXCHANGES, ids=[fault.value for fault, _, _ in EXCHANGES])
def test_what_the_client_sees_and_the_server_gets(
    secure: Secure, fault: Fault, seen: set[str], received: set[int]
) -> None:
    upstream, transport, termination = secure
    with (
        FaultProxy(("127.0.0.1", upstream.server_port), termination=termination, severity=TINY) as proxy,
        Shop(proxy.url, transport.ca) as shop,
    ):
        assert shop.see(body=b"before") == OK
        proxy.switch(fault)
        assert shop.see() in seen
        assert upstream.received.count(b"sale") in received
        refused = fault in (Fault.PASS, Fault.REFUSE)  # the second is not seen by a proxy that does not listen
        assert proxy.stats().faults == ({} if refused else {fault: 1})
        proxy.switch(Fault.PASS)
        assert shop.see(body=b"after") == OK  # and the network is whole again
        assert upstream.received[0] == b"before"
        assert upstream.received[-1] == b"after"


def test_every_fault_is_shown() -> None:
    assert {fault for fault, _, _ in EXCHANGES} | {Fault.TRUNCATE} == set(Fault)


def test_an_answer_is_cut_anywhere(secure: Secure) -> None:
    upstream, transport, termination = secure
    seen: set[str] = set()
    with (
        FaultProxy(("127.0.0.1", upstream.server_port), termination=termination) as proxy,
        Shop(proxy.url, transport.ca) as shop,
    ):
        proxy.switch(Fault.TRUNCATE)
        for _ in range(30):
            seen.add(shop.see())
    # In the status line; in the head, which http.client takes for its end; in the type. Never the answer as it is.
    assert {"BadStatusLine", "200 - 0", "200 application/jose 0"} & seen
    assert OK not in seen
    assert len(upstream.received) == 30


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault.CERTIFICATE_EXPIRED, 10),  # these: x509_vfy.h of OpenSSL
        (Fault.CERTIFICATE_WRONG_NAME, 64),
        (Fault.CERTIFICATE_UNTRUSTED, 20),
    ],
)
def test_certificates_are_wrong_in_what_they_say(secure: Secure, fault: Fault, code: int) -> None:
    upstream, transport, termination = secure
    with FaultProxy(("127.0.0.1", upstream.server_port), termination=termination) as proxy:
        proxy.switch(fault)
        with contextlib.closing(transport.connect(proxy.port)) as connection:
            with pytest.raises(ssl.SSLCertVerificationError) as refused:
                ask(connection)
            # By an authority of the same name OpenSSL looks for the key first, and finds the signature wrong.
            assert refused.value.verify_code in ({code, 7} if fault is Fault.CERTIFICATE_UNTRUSTED else {code})


def test_a_renewed_certificate_is_another_one(secure: Secure) -> None:
    upstream, transport, termination = secure
    with FaultProxy(("127.0.0.1", upstream.server_port), termination=termination) as proxy:
        shown = []
        for fault in (Fault.PASS, Fault.PASS, Fault.CERTIFICATE_CHANGED):
            proxy.switch(fault)
            with contextlib.closing(transport.connect(proxy.port)) as connection:
                connection.connect()
                assert isinstance(connection.sock, ssl.SSLSocket)
                shown.append(connection.sock.getpeercert(binary_form=True))
    assert shown[0] == shown[1] != shown[2]


def test_an_answer_without_end_is_read_no_further_than_the_client_likes(secure: Secure) -> None:
    upstream, transport, termination = secure
    with FaultProxy(("127.0.0.1", upstream.server_port), termination=termination) as proxy:
        proxy.switch(Fault.OVERSIZED)
        with contextlib.closing(transport.connect(proxy.port)) as connection:
            connection.request("PUT", "/", b"sale")
            answer = connection.getresponse()
            assert answer.headers["Content-Type"] == "application/jose"
            assert len(answer.read(3_000_000)) == 3_000_000


def test_exchanges_overtake_each_other(secure: Secure) -> None:
    upstream, transport, termination = secure
    held: set[str] = set()
    for seed in range(6):
        upstream.received.clear()
        played: list[str] = []
        ended: list[str] = []
        with (
            FaultProxy(
                ("127.0.0.1", upstream.server_port),
                termination=termination,
                severity=Severity(overtake_ms_max=5000),
                plan=Plan.always(Fault.REORDER, seed),
                report=lambda one, lines=played: lines.append(one.detail),  # type: ignore[misc]
            ) as proxy,
            Shop(proxy.url, transport.ca, timeout_s=8) as one,
            Shop(proxy.url, transport.ca, timeout_s=8) as other,
        ):

            def send(shop: Shop, name: str, ended: list[str] = ended) -> None:
                assert shop.see(body=name.encode()) == OK
                ended.append(name)

            first = threading.Thread(target=send, args=(one, "first"))
            first.start()
            deadline = time.monotonic() + 5
            while proxy.stats().exchanges < 1 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            send(other, "second")
            first.join()
        assert ended == ["second", "first"], played
        (of,) = (line.split()[0] for line in played if line.endswith("overtaken by 2"))
        assert upstream.received == ([b"second", b"first"] if of == "request" else [b"first", b"second"])
        held.add(of)
    assert held == {"request", "answer"}


def run(secure: Secure, plan: Plan, exchanges: int) -> tuple[list[str], list[str], FaultProxy]:
    """What was played and what the client saw, in order."""
    upstream, transport, termination = secure
    played: list[str] = []
    with (
        FaultProxy(
            ("127.0.0.1", upstream.server_port),
            termination=termination,
            severity=TINY,
            plan=plan,
            report=lambda one: played.append(str(one)),
        ) as proxy,
        Shop(proxy.url, transport.ca, timeout_s=0.15) as shop,
    ):
        seen = [shop.see(f"/v1/{number}?secret=1", b"CARD") for number in range(exchanges)]
        stats = proxy.stats()
        assert sum(stats.faults.values()) == len(played)
        return played, seen, proxy


def everything(seed: int, rate: float = 0.5) -> Plan:
    return Plan(seed, dict.fromkeys(set(Fault) - {Fault.PASS}, 1.0), rate=rate)


def test_a_seed_repeats_a_run(secure: Secure) -> None:
    first = run(secure, everything(7), 40)[:2]
    assert run(secure, everything(7), 40)[:2] == first
    assert run(secure, everything(8), 40)[:2] != first
    assert len({line.split()[2] for line in first[0]}) > 5


def test_the_log_says_method_and_path_and_no_more(secure: Secure) -> None:
    upstream, _, _ = secure
    played, _, _ = run(secure, Plan.always(Fault.WRONG_TYPE), 2)
    assert played == [
        "exchange 1 wrong_type PUT /v1/0: worked on, a web page comes back",
        "exchange 2 wrong_type PUT /v1/1: worked on, a web page comes back",
    ]
    assert upstream.received == [b"CARD"] * 2  # both are carried all the same
    assert upstream.targets == ["/v1/0?secret=1", "/v1/1?secret=1"]


def test_without_a_rate_nothing_happens(secure: Secure) -> None:
    upstream, _, _ = secure
    played, seen, _ = run(secure, everything(7, rate=0.0), 30)
    assert played == []
    assert seen == [OK] * 30
    assert len(upstream.received) == 30


def test_a_connection_is_kept(secure: Secure) -> None:
    upstream, transport, termination = secure
    with (
        FaultProxy(("127.0.0.1", upstream.server_port), termination=termination) as proxy,
        Shop(proxy.url, transport.ca) as shop,
    ):
        assert [shop.see() for _ in range(3)] == [OK] * 3
        assert (proxy.stats().connections, proxy.stats().exchanges) == (1, 3)


def test_storms_last_and_ask_for_patience_or_not() -> None:
    plan = Plan(3, {Fault.STATUS_5XX: 1.0}, rate=0.1)
    drawn = [plan.exchange() for _ in range(2000)]
    runs = [len(list(same)) for draw, same in itertools.groupby(drawn) if draw.fault is Fault.STATUS_5XX]
    assert max(runs) == 8
    assert 3 < sum(runs) / len(runs) < 6


def test_storms_as_the_client_sees_them(secure: Secure) -> None:
    upstream, transport, termination = secure
    with (
        FaultProxy(("127.0.0.1", upstream.server_port), termination=termination) as proxy,
        Shop(proxy.url, transport.ca) as shop,
    ):
        proxy.switch(Fault.STATUS_5XX)
        answers = [shop.put() for _ in range(60)]
        assert {answer.status_code for answer in answers} == {500, 502, 503, 504}
        assert {answer.headers.get("Retry-After") for answer in answers} == {None, "1", "2", "3"}
        worked_on = sum(answer.status_code in (500, 504) for answer in answers)
        assert len(upstream.received) == worked_on
        proxy.severity = Severity(status=503, retry_after_s=9)
        answer = shop.put()
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "9")


def test_the_rate_is_kept_and_weights_are_heard() -> None:
    plan = Plan(5, {Fault.DELAY: 3.0, Fault.TRUNCATE: 1.0}, rate=0.2)
    drawn = Counter(plan.exchange().fault for _ in range(5000))
    assert 0.17 < 1 - drawn[Fault.PASS] / 5000 < 0.23
    assert 2.3 < drawn[Fault.DELAY] / drawn[Fault.TRUNCATE] < 4.0
    with pytest.raises(ValueError, match="rate"):
        Plan(5, {Fault.DELAY: 1.0}, rate=30)
    with pytest.raises(ValueError, match="weights"):
        Plan(5, {Fault.PASS: 1.0})


def test_a_connection_more_does_not_shift_the_exchanges() -> None:
    one, other = everything(11), everything(11)
    for _ in range(20):
        other.connection(terminating=True)
    assert [one.exchange() for _ in range(50)] == [other.exchange() for _ in range(50)]


def test_an_endless_request_is_not_carried(secure: Secure) -> None:
    upstream, transport, termination = secure
    with (
        FaultProxy(("127.0.0.1", upstream.server_port), termination=termination) as proxy,
        Shop(proxy.url, transport.ca, timeout_s=5) as shop,
    ):
        assert shop.see(body=bytes(15 * 1024 * 1024)) == OK
        assert shop.see(body=bytes(17 * 1024 * 1024)) != OK
        assert len(upstream.received) == 1


def test_who_speaks_no_http_is_sent_away(secure: Secure) -> None:
    upstream, _, _ = secure
    with (
        FaultProxy(("127.0.0.1", upstream.server_port), termination=Termination(None)) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as client,
    ):
        client.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_without_tls_on_either_side() -> None:
    with (
        running(Upstream(None)) as upstream,
        FaultProxy(("127.0.0.1", upstream.server_port), termination=Termination(None)) as proxy,
        Shop(proxy.url, "") as shop,
    ):
        assert proxy.url.startswith("http://")
        assert shop.see() == OK
        proxy.switch(Fault.DUPLICATE)
        assert shop.see() == OK
        assert len(upstream.received) == 3


def test_the_server_sees_a_client_certificate(tmp_path: Path) -> None:
    transport = Transport("tls1.3", tmp_path)
    assert transport.server is not None
    transport.server.load_verify_locations(transport.ca)
    transport.server.verify_mode = ssl.CERT_REQUIRED
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    issued = tls.load_authority(tmp_path).issue_client(
        csr.public_bytes(Encoding.PEM), "T-0001", int(time.time() * 1000)
    )
    file = tmp_path / "client.pem"
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + issued.chain)
    with running(Upstream(transport.server)) as upstream:
        for certificate, seen in ((None, RESET), (file, {OK})):
            termination = Termination(tmp_path, client_certificate=certificate)
            with (
                FaultProxy(("127.0.0.1", upstream.server_port), termination=termination) as proxy,
                Shop(proxy.url, transport.ca) as shop,
            ):
                assert shop.see() in seen


def test_a_server_that_is_down_or_elsewhere_shows_as_a_reset(secure: Secure, tmp_path: Path) -> None:
    upstream, transport, _ = secure
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = Transport("tls1.3", elsewhere)  # the proxy trusts this one's authority, and not the server's
    with (
        FaultProxy(("127.0.0.1", upstream.server_port), termination=Termination(elsewhere)) as proxy,
        Shop(proxy.url, other.ca) as shop,
    ):
        assert shop.see() in RESET
    assert upstream.received == []
    assert transport.ca != other.ca


def test_a_name_that_does_not_resolve(secure: Secure, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream, transport, termination = secure
    resolve = socket.getaddrinfo

    def resolver(host: str, *args: Any, **kwargs: Any) -> Any:
        if host.endswith(".invalid"):  # as RFC 6761, 6.4, wants it of every resolver: no question leaves the machine
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    with (
        FaultProxy(("127.0.0.1", upstream.server_port), termination=termination) as proxy,
        Shop(proxy.unresolvable_url, transport.ca) as lost,
        Shop(proxy.url, transport.ca) as found,
    ):
        assert lost.see() == "gaierror"
        assert found.see() == OK
        assert proxy.stats().connections == 1


# ---- bounds, and the proxy as a process


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

"""How fast a backlog goes out: the sync service against a bare client that posts the same bytes to the same server.

The server is a process of its own that reads a request and answers, after the time that a round trip would take; it
does nothing else, so that it is not what is measured. Sync is whole: the spool with its flushes, the couriers, TLS, the
answers handed to a terminal (a stand-in that only takes them). The peer is `requests.Session`, one in each of as many
threads as sync has uploads under way. Both take turns.
"""

from __future__ import annotations

import contextlib
import os
import queue
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID

import requests

from hwsim.host.tls import Authority
from terminal.clock import SystemClock, system_entropy
from terminal.ledger.keys import SecretKey
from terminal.sync.destinations.host import HostDestination, HostSettings
from terminal.sync.loop import UPLOADS, Place, SyncSettings
from terminal.sync.loop import run as run_loop
from terminal.sync.spool import OutboxItem
from terminal.sync.step import Delivered, LinkReport, Offer, Seen
from tests.bench.drained import ENVELOPE
from tests.bench.report import Row, Section, measured

SALES: Final = 1_000  # a round; the goals are stated for 10,000
ROUNDS: Final = 4
ROUND_TRIPS_MS: Final = ((0, 0.7), (50, 0.9))
ANSWER_CHARS: Final = 700
_PIECE: Final = 65_536
_READY_S: Final = 10.0

_ANSWER: Final = ("ey" + "A" * (ANSWER_CHARS // 3), "B" * (ANSWER_CHARS // 3), "C" * (ANSWER_CHARS // 3))


# ---- the server


def serve(certificate: str, delay_ms: str) -> None:
    """Answer every request alike, until killed. Says its port first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    body = ".".join(_ANSWER).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/jose\r\nContent-Length: {len(body)}\r\n\r\n"
    answer, delay_s = head.encode() + body, int(delay_ms) / 1000
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(context, connection, answer, delay_s), daemon=True).start()


def _answer(context: ssl.SSLContext, connection: socket.socket, answer: bytes, delay_s: float) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as secure:
        held = bytearray()
        while piece := secure.recv(_PIECE):
            held += piece
            while (end := held.find(b"\r\n\r\n")) >= 0:
                at = held.lower().find(b"content-length:", 0, end)
                length = int(held[at + 15 : held.find(b"\r", at)])
                if len(held) < end + 4 + length:
                    break
                del held[: end + 4 + length]
                if delay_s:
                    time.sleep(delay_s)
                secure.sendall(answer)


@contextlib.contextmanager
def serving(certificate: Path, delay_ms: int) -> Iterator[int]:
    program = "import sys; from tests.bench import drain; drain.serve(*sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(certificate), str(delay_ms)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait(_READY_S)


# ---- the two who send


@dataclass
class Till:
    """Implements `Terminal`: has a backlog to send, and counts what comes back."""

    items: Sequence[OutboxItem]
    offered: int = 0
    delivered: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def fetch(self, max: int, wait_ms: int) -> Offer:
        with self.changed:
            if self.offered >= len(self.items):
                self.changed.wait(wait_ms / 1000)
        return Offer(self.items[self.offered : self.offered + max])

    def stored(self, keys: Sequence[str]) -> None:
        self.offered += len(keys)

    def deliver(self, answers: Sequence[tuple[str, str]]) -> Sequence[Delivered]:
        with self.changed:
            self.delivered += len(answers)
            self.changed.notify_all()
        return [Delivered(key, state="settled") for key, _ in answers]

    def report(self, report: LinkReport) -> Seen:
        return Seen(None, False)


def items(count: int) -> list[OutboxItem]:
    envelope = ".".join(ENVELOPE)
    ids = [UUID(bytes=os.urandom(16), version=4) for _ in range(count)]
    return [
        OutboxItem(f"{id_}/authorisation", id_, "authorisation", number, False, envelope, None, 1250, "EUR")
        for number, id_ in enumerate(ids, start=1)
    ]


def by_sync(directory: Path, url: str, ca_file: Path, count: int) -> tuple[float, float]:
    """Seconds to send so many, wall and processor; from the start of the service to the last answer handed over."""
    till = Till(items(count))
    settings = SyncSettings(
        directory, SecretKey(bytes(32)), [Place(partial(HostDestination, HostSettings(url, ca_file)))]
    )
    stop = threading.Event()
    begin_s, begin_cpu_s = time.perf_counter(), _cpu_s()
    loop = threading.Thread(
        target=lambda: run_loop(
            settings, lambda: till, clock=SystemClock(), entropy=system_entropy, stop=stop, alive=lambda: None
        )
    )
    loop.start()
    with till.changed:
        till.changed.wait_for(lambda: till.delivered >= count)
    taken = time.perf_counter() - begin_s, _cpu_s() - begin_cpu_s
    stop.set()
    with till.changed:
        till.changed.notify_all()
    loop.join()
    return taken


def by_requests(url: str, ca_file: Path, count: int) -> tuple[float, float]:
    """The same bytes by bare sessions, as many at once."""
    left: queue.SimpleQueue[OutboxItem] = queue.SimpleQueue()
    for item in items(count):
        left.put(item)

    def work() -> None:
        with requests.Session() as session, contextlib.suppress(queue.Empty):
            session.trust_env = False
            session.verify = str(ca_file)
            while True:
                item = left.get_nowait()
                answer = session.put(
                    f"{url}/v1/transactions/{item.transaction}/{item.event}",
                    data=item.envelope.encode(),
                    headers={"Content-Type": "application/jose"},
                    timeout=10,
                )
                answer.raise_for_status()

    begin_s, begin_cpu_s = time.perf_counter(), _cpu_s()
    threads = [threading.Thread(target=work) for _ in range(UPLOADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin_s, _cpu_s() - begin_cpu_s


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def run(place: Path, sales: int = SALES) -> Section:
    now, day = datetime.now(UTC), timedelta(days=1)
    authority = Authority.create(now)
    certificate, ca_file = place / "server.pem", place / "ca.pem"
    certificate.write_bytes(authority.issue(("127.0.0.1",), now - day, now + day))
    ca_file.write_bytes(authority.pem)
    rows: list[Row] = []
    for delay_ms, goal in ROUND_TRIPS_MS:
        ours: list[tuple[float, float]] = []
        peer: list[tuple[float, float]] = []
        with serving(certificate, delay_ms) as port:
            url = f"https://127.0.0.1:{port}"
            by_requests(url, ca_file, 50)
            for number in range(ROUNDS):
                peer.append(by_requests(url, ca_file, sales))
                ours.append(by_sync(place / f"sync-{delay_ms}-{number}", url, ca_file, sales))
        name = f"{delay_ms} ms"
        rows += [
            measured(f"{name}: requests.Session, {UPLOADS} at once", [sales / wall for wall, _ in peer], "sales/s"),
            measured(
                f"{name}: the sync service",
                [sales / wall for wall, _ in ours],
                "sales/s",
                peer=[sales / wall for wall, _ in peer],
                against=f"requests, goal {goal}",
            ),
            measured(
                f"{name}: processor for one",
                [1000 * cpu / sales for _, cpu in ours],
                "ms",
                peer=[1000 * cpu / sales for _, cpu in peer],
                against="requests",
            ),
        ]
    return Section(
        "drain",
        f"A backlog of {sales:,} sales",
        rows,
        (
            (
                "Sync stores each item, flushed, before it is acknowledged to the terminal, marks it before it is "
                "sent, and keeps the answer before the terminal has it. The peer does none of that. Both share two "
                "processors with the server."
            ),
        ),
    )

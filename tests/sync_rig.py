"""What the tests of the sync service share: a terminal that does as it is told, a host that counts, time that is set.

The host here is harsher than the documented one. It books once per idempotency key, not per transaction, so that an
attempt under another key is a second booking that `Books.check` sees.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import hmac
import ipaddress
import json
import random
import shutil
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from terminal.ledger.keys import SecretKey
from terminal.sync.couriers import Alone
from terminal.sync.destinations import Answered, Busy, Destination, NotSent, Parcel, Refused, Result, Unsure
from terminal.sync.errors import TerminalUnavailable
from terminal.sync.journal import Head, SyncJournal
from terminal.sync.spool import OutboxItem, Spool
from terminal.sync.step import Backoff, Delivered, LinkReport, Offer, Seen, Sync, Terminal

SPOOL_KEY: Final = SecretKey(bytes(range(32)))
STEPS_MAX: Final = 5_000  # no scenario here needs more; one that does hangs
JOURNAL_BYTES: Final = 64 * 16_384  # a ring that is soon full
MARKER: Final = "SEALED-CARD-DATA"  # in every envelope, to be looked for where it must not be
_ANSWER_KEY: Final = b"test key of the host"


class FakeClock:
    """Time as the test sets it."""

    def __init__(self, *, synchronised: bool = True) -> None:
        self._boots = 1
        self._monotonic_ms = 1_000
        self._wall_ms = 1_800_000_000_000
        self._synchronised = synchronised

    @property
    def boot_id(self) -> UUID:
        return UUID(int=self._boots)

    def monotonic_ms(self) -> int:
        return self._monotonic_ms

    def wall_ms(self) -> int:
        return self._wall_ms

    def synchronised(self) -> bool:
        return self._synchronised

    def advance(self, milliseconds: int) -> None:
        self._monotonic_ms += milliseconds
        self._wall_ms += milliseconds

    def set_wall(self, milliseconds: int) -> None:
        self._wall_ms = milliseconds

    def sleep_ms(self, duration_ms: int) -> None:
        self.advance(duration_ms)

    def reboot(self, *, synchronised: bool = True, wall_ms: int | None = None) -> None:
        self._boots += 1
        self._monotonic_ms = 500
        self._synchronised = synchronised
        self._wall_ms = self._wall_ms if wall_ms is None else wall_ms


def seeded(seed: int) -> Callable[[int], bytes]:
    """Randomness that a failing test can repeat."""
    print(f"seed {seed}")
    return random.Random(seed).randbytes


def sale(number: int, *, urgent: bool = False, event: str = "authorisation", envelope: str | None = None) -> OutboxItem:
    transaction = UUID(int=number)
    payload = base64.urlsafe_b64encode(json.dumps({"number": number, "event": event}).encode()).decode().rstrip("=")
    text = envelope or f"eyJhbGciOiJ0ZXN0In0.{payload}{MARKER}.c2lnbmF0dXJl"
    return OutboxItem(f"{transaction}/{event}", transaction, event, number, urgent, text)


def answer_to(transaction: UUID, event: str, envelope: str, *, key: bytes = _ANSWER_KEY) -> str:
    """Shaped like a JWS, signed with a test key."""
    about = json.dumps([str(transaction), event, hashlib.sha256(envelope.encode()).hexdigest()]).encode()
    parts = (b'{"alg":"test"}', about, hmac.digest(key, about, "sha256"))
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


@dataclass
class FakeChain:
    """The terminal's journal as far as sync is concerned: its heads, and what it has recorded of ours."""

    epoch: int = 1
    macs: list[str] = field(default_factory=list)
    sync_head: Head | None = None
    entropy: Callable[[int], bytes] = field(default_factory=lambda: random.Random(11).randbytes)
    records_first: bool = False  # overwrites what it had recorded before it answers

    def grow(self, records: int = 1) -> None:
        self.macs += [self.entropy(32).hex() for _ in range(records)]

    @property
    def head(self) -> Head | None:
        return Head(self.epoch, len(self.macs), self.macs[-1]) if self.macs else None

    def seen(self, report: LinkReport) -> Seen:
        before, known = self.sync_head, report.terminal_head
        self.sync_head = report.head or self.sync_head
        differs = (
            known is not None
            and known.epoch == self.epoch
            and (known.sequence > len(self.macs) or self.macs[known.sequence - 1] != known.mac)
        )
        return Seen(self.sync_head if self.records_first else before, differs)


@dataclass
class FakeTerminal:
    """Implements `Terminal`: an outbox, and the verification of answers."""

    outbox: dict[str, OutboxItem] = field(default_factory=dict)
    handed_over: set[str] = field(default_factory=set)
    answers: dict[str, str] = field(default_factory=dict)
    reports: list[LinkReport] = field(default_factory=list)
    rejections: list[str] = field(default_factory=list)
    up: bool = True
    rejects: bool = False
    says: str = "approved"
    deaf_to: set[str] = field(default_factory=set)  # calls that do their work and lose their reply
    changed: threading.Condition = field(default_factory=threading.Condition)
    chain: FakeChain = field(default_factory=FakeChain)

    def sell(self, *items: OutboxItem) -> None:
        with self.changed:
            self.outbox |= {item.key: item for item in items}
            self.changed.notify_all()

    def fetch(self, max: int, wait_ms: int) -> Offer:
        self._reached()
        with self.changed:
            if not self._offered():
                self.changed.wait(wait_ms / 1000)
            return Offer(sorted(self._offered(), key=lambda item: not item.urgent)[:max], self.chain.head)

    def stored(self, keys: Sequence[str]) -> None:
        self._reached()
        self.handed_over |= set(keys)
        self._lose("stored")

    def deliver(self, answers: Sequence[tuple[str, str]]) -> Sequence[Delivered]:
        self._reached()
        words = [self.judge(key, answer) for key, answer in answers]
        self._lose("deliver")
        return words

    def judge(self, key: str, answer: str) -> Delivered:
        item = self.outbox[key]
        if self.rejects or answer != answer_to(item.transaction, item.event, item.envelope):
            self.rejections.append(key)
            return Delivered(key, error="the signature is not the host's", believed=False)
        with self.changed:
            assert self.answers.setdefault(key, answer) == answer
            self.changed.notify_all()
        return Delivered(key, state=self.says)

    def report(self, report: LinkReport) -> Seen:
        self._reached()
        with self.changed:
            self.reports.append(report)
            self.changed.notify_all()
            return self.chain.seen(report)

    def _offered(self) -> list[OutboxItem]:
        return [item for key, item in self.outbox.items() if key not in self.handed_over]

    def _reached(self) -> None:
        if not self.up:
            raise TerminalUnavailable("the terminal service does not answer")

    def _lose(self, call: str) -> None:
        if call in self.deaf_to:
            raise TerminalUnavailable("the terminal's reply was lost")


class Books:
    """What the host has received and booked."""

    def __init__(self) -> None:
        self.attempts: list[tuple[str, str, str]] = []  # item, idempotency key, body
        self.booked: dict[str, str] = {}  # idempotency key: item

    def receive(self, item: str, idempotency_key: str, body: str) -> None:
        self.attempts.append((item, idempotency_key, body))
        self.booked.setdefault(idempotency_key, item)

    def check(self) -> None:
        """Each item at most once, always under one key and with one body."""
        booked = list(self.booked.values())
        assert len(booked) == len(set(booked)), f"booked twice: {booked}"
        for item in {attempt[0] for attempt in self.attempts}:
            assert len({attempt[1:] for attempt in self.attempts if attempt[0] == item}) == 1, (
                f"{item} was not the same"
            )


class Mood(Enum):
    """How a host treats the next request."""

    WELL = "well"
    DOWN = "refuses the connection"
    LOSES_REQUEST = "breaks off before it books"
    LOSES_ANSWER = "books, then breaks off"
    FAULT = "500, not booked"
    FAULT_BOOKED = "500, booked"
    BUSY = "429"
    GARBAGE = "books, answers garbage"
    FORGED = "an answer that is not the host's"
    FORBIDS = "403"
    CONDEMNS = "422"


class FakeHost:
    """Implements `Destination` without a network: each mood gives what `HostDestination` makes of it."""

    def __init__(self, *, name: str = "host", repeat_safe_ms: int | None = None) -> None:
        self.name = name
        self.repeat_safe_ms = repeat_safe_ms
        self.books = Books()
        self.mood = Mood.WELL
        self.moods: dict[str, Mood] = {}  # of single items
        self.retry_after_ms: int | None = None
        self.tried: list[str] = []

    def send(self, parcel: Parcel) -> Result:
        item = f"{parcel.transaction}/{parcel.event}"
        self.tried.append(item)
        mood = self.moods.get(item, self.mood)
        if mood in {Mood.WELL, Mood.LOSES_ANSWER, Mood.FAULT_BOOKED, Mood.GARBAGE}:
            self.books.receive(item, parcel.idempotency_key, parcel.body)
        results: dict[Mood, Result] = {
            Mood.WELL: Answered(answer_to(parcel.transaction, parcel.event, parcel.body)),
            Mood.FORGED: Answered(answer_to(parcel.transaction, parcel.event, parcel.body, key=b"another")),
            Mood.DOWN: NotSent("the host is down"),
            Mood.BUSY: Busy("busy", self.retry_after_ms),
            Mood.FORBIDS: Refused("forbidden", permanent=False),
            Mood.CONDEMNS: Refused("invalid", permanent=True),
        }
        return results.get(mood, Unsure(mood.value, self.retry_after_ms))

    def look_up(self, parcel: Parcel, *, first_attempt_ms: int | None) -> Answered | Unsure | None:
        return None

    def close(self) -> None:
        pass


@dataclass
class Rig:
    """The whole service but its loop, in a directory that a crash can be taken from."""

    root: Path
    terminal: Terminal
    destinations: Sequence[Destination]
    clock: FakeClock
    entropy: Callable[[int], bytes]
    open_spool: Callable[..., Spool] = Spool
    takes_envelopes: Sequence[str] | None = None
    starts: int = 0
    spool: Spool = field(init=False)
    journal: SyncJournal = field(init=False)
    sync: Sync = field(init=False)

    def __post_init__(self) -> None:
        self.directory = self.root / "sync-0"
        self._start()

    def crash(self) -> None:
        """As SIGKILL would leave it: the files as they are at this moment, nothing said good-bye to."""
        self.starts += 1
        copy = self.root / f"sync-{self.starts}"
        shutil.copytree(self.directory, copy)
        self.close()
        shutil.rmtree(self.directory)
        self.directory = copy
        self._start()

    def settle(self, *, within_ms: int = 0, until: Callable[[], bool] = lambda: False) -> None:
        """Step until nothing is due within this time, or until something is so."""
        end_ms = self.clock.monotonic_ms() + within_ms
        for _ in range(STEPS_MAX):
            due = self.sync.step()
            if self.clock.monotonic_ms() + due.in_ms > end_ms or until():
                return
            self.clock.advance(due.in_ms)
        raise AssertionError("it does not come to rest")

    def close(self) -> None:
        self.journal.close()
        self.spool.close()

    def _start(self) -> None:
        self.spool = self.open_spool(self.directory, SPOOL_KEY, clock=self.clock, entropy=self.entropy)
        self.journal = SyncJournal(
            self.directory, SPOOL_KEY, clock=self.clock, entropy=self.entropy, size_bytes=JOURNAL_BYTES
        )
        self.sync = Sync(
            self.spool,
            [Alone(destination) for destination in self.destinations],
            self.terminal,
            self.journal,
            clock=self.clock,
            entropy=self.entropy,
            backoff=Backoff(),
            takes_envelopes=self.takes_envelopes,
        )


class Authority:
    """A certification authority for tests; issues into one directory."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.file = directory / f"{name}.pem"
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        certificate = (
            self._builder(self._name, self._key.public_key(), days=3_650)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, days: int = 30, from_days: int = -60) -> Path:
        """A certificate and its key in one PEM file, for a host name or an IP address."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        alternative: x509.GeneralName
        try:
            alternative = x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            alternative = x509.DNSName(name)
        certificate = (
            self._builder(subject, key.public_key(), days=days, from_days=from_days)
            .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        file = self._directory / f"{self._name.rfc4514_string()}-{name}-{days}.pem"
        file.write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return file

    def _builder(self, subject: x509.Name, key: Any, *, days: int, from_days: int = -60) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=from_days))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )


Reply = Callable[["_Handler", str], None]


class TlsHost:
    """A real HTTPS server on loopback. `script` holds what to do with the next requests; afterwards it does well."""

    def __init__(self, certificate: Path, *, client_authority: Path | None = None) -> None:
        self.books = Books()
        self.script: list[Reply] = []
        self.connections = 0
        self.headers: list[dict[str, str]] = []
        self.ended = threading.Event()
        self.context = context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        if client_authority is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(client_authority)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.host = self
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=True
        )
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def close(self) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # joined when the server is closed
    host: TlsHost

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves, or refuses our certificate, is no error of the server."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which would hold back every body for 40 ms
    timeout = 5
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.host.connections += 1

    def do_PUT(self) -> None:
        host = self.server.host
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        host.headers.append(dict(self.headers.items()))
        reply = host.script.pop(0) if host.script else answers
        reply(self, body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def book(self, body: str) -> str:
        _, _, of, transaction, *rest = self.path.split("/")
        event = rest[0] if of == "transactions" else "checkpoint"
        self.server.host.books.receive(f"{transaction}/{event}", self.headers["Idempotency-Key"], body)
        return answer_to(UUID(transaction), event, body)

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        usual = {"Content_Type": "application/jose", "Content_Length": str(len(body))}
        for name, value in (usual | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self, data: bytes) -> None:
        """A byte at a time, each well within any time-out between two reads."""
        for byte in data:
            if self.server.host.ended.wait(0.02):
                return
            self.wfile.write(bytes([byte]))


def answers(handler: _Handler, body: str) -> None:
    handler.say(200, handler.book(body).encode())


def loses_answer(handler: _Handler, body: str) -> None:
    handler.book(body)
    handler.close_connection = True


def loses_request(handler: _Handler, body: str) -> None:
    handler.close_connection = True


def forges(handler: _Handler, body: str) -> None:
    handler.say(200, answer_to(UUID(int=0), "authorisation", "", key=b"another").encode())


def says(status: int, body: bytes = b"", *, books: bool = False, **headers: str) -> Reply:
    def reply(handler: _Handler, envelope: str) -> None:
        if books:
            handler.book(envelope)
        handler.say(status, body, **headers)

    return reply


def breaks_off(handler: _Handler, body: str) -> None:
    """In the middle of the answer."""
    handler.say(200, handler.book(body).encode()[:20], Content_Length="400")
    handler.close_connection = True


def hangs(handler: _Handler, body: str) -> None:
    handler.book(body)
    handler.server.host.ended.wait(5)
    handler.close_connection = True


def drips_headers(handler: _Handler, body: str) -> None:
    handler.drip(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100)
    handler.close_connection = True


def drips_body(handler: _Handler, body: str) -> None:
    handler.say(200, Content_Length="10000")
    handler.drip(b"x" * 1_000)
    handler.close_connection = True


def floods(handler: _Handler, body: str) -> None:
    """An answer without an end, as fast as the line takes it."""
    handler.close_connection = True
    with contextlib.suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/jose\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not handler.server.host.ended.is_set():
            handler.wfile.write(b"10000\r\n" + b"a" * 65_536 + b"\r\n")


def floods_headers(handler: _Handler, body: str) -> None:
    """Headers without an end."""
    handler.close_connection = True
    with contextlib.suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not handler.server.host.ended.is_set():
            handler.wfile.write(b"X-" + b"a" * 60_000 + b": b\r\n")


def continues_for_ever(handler: _Handler, body: str) -> None:
    with contextlib.suppress(OSError):
        while not handler.server.host.ended.wait(0.02):
            handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    handler.close_connection = True


@contextlib.contextmanager
def serving(certificate: Path, *, client_authority: Path | None = None) -> Iterator[TlsHost]:
    host = TlsHost(certificate, client_authority=client_authority)
    try:
        yield host
    finally:
        host.close()


@contextlib.contextmanager
def faster_than(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds

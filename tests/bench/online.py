"""What asking the host adds to a sale, and where it goes, seen from outside the services.

The card lies on the reader when the register asks. Three kinds of witnesses know when what happened, all by the same
clock: the panel (when a picture stood), a relay on the local socket between sync and terminal, and a relay on the line
between sync and host. Neither service is told that it is watched. The peer is a bare HTTPS client which sends the same
envelope again, to the same host over a kept connection: what the host and TLS cost without a terminal around them.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hwsim.world import CARD, World
from terminal.config import load
from terminal.money import EUR, Amount
from terminal.ui import screens
from tests.bench.report import Row, Section, measured
from tests.bench.storage import RawFile

ROUNDS: Final = 25
AMOUNT: Final = Amount(1250, EUR)  # the simulated issuer declines some amounts by their cents
WARM_UP: Final = 3  # sales before the first round: the TLS connection, prepared statements
FLUSHES_ON_THE_WAY: Final = (
    7  # terminal 2, spool 2 before it sends and 1 after, terminal 2; the host's own are the host's
)
EVENTS_MAX: Final = 10_000  # pieces that pass a relay in one sale: some dozens

_READ_BYTES: Final = 65_536


@dataclass(frozen=True, slots=True)
class Passed:
    """A piece that went through a relay, and when. `up` is away from sync."""

    at_s: float
    up: bool
    piece: bytes


class Relay:
    """Passes bytes on between sync and whom it calls, and remembers when."""

    def __init__(self, listener: socket.socket, connect: Callable[[], socket.socket]) -> None:
        self.passed: deque[Passed] = deque(maxlen=EVENTS_MAX)
        self._listener = listener
        self._connect = connect
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def first(self, *, up: bool, after_s: float, holding: bytes = b"") -> Passed:
        """The first piece of that direction since then, that holds this. Raises `LookupError`."""
        for each in list(self.passed):
            if each.up is up and each.at_s >= after_s and holding in each.piece:
                return each
        raise LookupError(f"nothing with {holding!r} has passed")

    def last(self, *, up: bool, before_s: float) -> Passed:
        return [each for each in self.passed if each.up is up and each.at_s <= before_s][-1]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = self._connect()
                for source, sink, up in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._pump, args=(source, sink, up), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_READ_BYTES):
                self.passed.append(Passed(time.monotonic(), up, piece))
                sink.sendall(piece)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True, slots=True)
class Sale:
    """When what happened, in monotonic seconds."""

    asked: float  # the register's call
    reading: float  # the card is activated
    authorising: float  # the kernel has its outcome; the commit begins
    handed_over: float  # the envelope goes to sync
    sent: float  # its first byte to the host
    answered: float  # the answer's last byte
    delivered: float  # sync brings it to the terminal
    approved: float  # it stands on the panel


def run(place: Path) -> Section:
    """All figures of this benchmark, files in `place`."""
    with contextlib.ExitStack() as opened:
        world = opened.enter_context(World.create(place / "w", result_hold_ms=0))
        world.start_host()
        world.start_device()
        world.start_terminal()
        local, line = _between(world)
        opened.callback(local.close)
        opened.callback(line.close)
        world.start_sync()
        bare = opened.enter_context(closing(_bare_client(world)))
        raw = opened.enter_context(closing(RawFile(place / "raw")))
        sales: list[Sale] = []
        puts_ms: list[float] = []
        flushes_ms: list[float] = []
        for number in range(WARM_UP + ROUNDS):
            sale, envelope = _sell(world, AMOUNT, local, line)
            put_ms = _put_ms(bare, *envelope)
            flush_ms = statistics.median(raw.flush_s() * 1000 for _ in range(10))
            if number >= WARM_UP:
                sales.append(sale)
                puts_ms.append(put_ms)
                flushes_ms.append(flush_ms)

    def between(begin: str, end: str) -> list[float]:
        return [(getattr(sale, end) - getattr(sale, begin)) * 1000 for sale in sales]

    added = between("authorising", "approved")
    floor = [put + FLUSHES_ON_THE_WAY * flush for put, flush in zip(puts_ms, flushes_ms, strict=True)]
    parts = [
        ("  commit and hand over", "authorising", "handed_over", "seal, sign, 2 flushes; sync's waiting call returns"),
        ("  sync, before sending", "handed_over", "sent", "stored, acknowledged, marked: 2 flushes"),
        ("  host and TLS", "sent", "answered", "first byte up to last byte down"),
        ("  sync, after the answer", "answered", "delivered", "1 flush"),
        ("  commit and show", "delivered", "approved", "verify, 2 flushes, draw"),
    ]
    rows: list[Row] = [
        measured("request to approved", between("asked", "approved"), "ms"),
        measured("  until the card is read", between("asked", "reading"), "ms", against="screen, poll, activation"),
        measured("  reading it", between("reading", "authorising"), "ms", against="APDUs and kernel"),
        measured("  asking the host: added", added, "ms", peer=puts_ms, against="bare HTTPS PUT of the same envelope"),
        measured("  the same", added, "ms", peer=floor, against=f"that PUT and {FLUSHES_ON_THE_WAY} raw flushes"),
        *(
            measured(f"  {what}", between(begin, end), "ms", peer=added, against=f"of the added; {why}")
            for what, begin, end, why in parts
        ),
        measured("bare HTTPS PUT", puts_ms, "ms"),
        measured("raw flush", flushes_ms, "ms"),
    ]
    return Section(
        "online",
        "a sale with the card on the reader, asked of the host on loopback",
        rows,
        [
            "a real network adds its round trip; air and serial line are not in the reading (see tap).",
            "the bare PUT repeats an envelope that the host knows: it answers from its books and books nothing new.",
            "both relays are in the way: some tenths of a millisecond of the figures are theirs.",
        ],
    )


def _between(world: World) -> tuple[Relay, Relay]:
    """Put relays where sync will call; the terminal has read its configuration and keeps its own addresses."""
    assert world.proxy is not None
    port = world.proxy.port
    host = world.proxy.upstream  # without the proxy that plays the network: its own delays are not to be measured
    terminal_socket, relay_socket = world.directory / "run" / "terminal.sock", world.directory / "run" / "relay.sock"

    def call_terminal() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(terminal_socket))
        return connection

    def call_host() -> socket.socket:
        connection = socket.create_connection(host)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    local.bind(str(relay_socket))
    local.listen()
    line = socket.create_server(("127.0.0.1", 0))
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    text = world.config.read_text(encoding="utf-8")
    text = text.replace(str(terminal_socket), str(relay_socket)).replace(f":{port}", f":{line.getsockname()[1]}")
    world.config.write_text(text, encoding="utf-8")
    return Relay(local, call_terminal), Relay(line, call_host)


def _sell(world: World, amount: Amount, local: Relay, line: Relay) -> tuple[Sale, tuple[str, str]]:
    """One sale: when what happened, its transaction and its envelope."""
    world.device.pictures()
    local.passed.clear()
    line.passed.clear()
    world.device.present(CARD)
    asked = time.monotonic()
    transaction = world.sell(amount)
    result = world.result(transaction)
    if result["state"] != "approved":
        raise RuntimeError(f"the sale ended as {result['state']} ({result['reason']}): see {world.log('sync')}")
    shown = _shown(world, amount, result["scheme"], result["last4"])
    world.device.remove()
    world.wait(lambda: not world.status()["busy"] or None, "the device to be free")
    handed_over = local.first(up=False, after_s=asked, holding=b'"envelope"')
    sent = line.first(up=True, after_s=handed_over.at_s)
    delivered = local.first(up=True, after_s=sent.at_s, holding=b"answers.deliver")
    answered = line.last(up=False, before_s=delivered.at_s)
    (item,) = json.loads(handed_over.piece)["ok"]["items"]
    sale = Sale(
        asked=asked,
        reading=shown["Reading"],
        authorising=shown["Authorising"],
        handed_over=handed_over.at_s,
        sent=sent.at_s,
        answered=answered.at_s,
        delivered=delivered.at_s,
        approved=shown["Approved"],
    )
    return sale, (transaction, item["envelope"])


def _shown(world: World, amount: Amount, scheme: str, last4: str) -> dict[str, float]:
    """When each screen stood on the panel."""
    language = load(world.config).terminal.language
    wanted: list[screens.Screen] = [
        screens.Reading(amount),
        screens.Authorising(amount),
        screens.Approved(amount, scheme, last4),
    ]
    pictures = {screens.render(screen, language).tobytes(): type(screen).__name__ for screen in wanted}
    stood = {pictures.get(each.image.tobytes(), ""): each.at_s for each in world.device.pictures()}
    if missing := {type(screen).__name__ for screen in wanted} - set(stood):
        raise RuntimeError(f"the panel did not show {', '.join(sorted(missing))}")
    return stood


def _bare_client(world: World) -> http.client.HTTPSConnection:
    assert world.proxy is not None
    context = ssl.create_default_context(cafile=str(world.directory / "host" / "public" / "ca.pem"))
    connection = http.client.HTTPSConnection(*world.proxy.upstream, context=context, timeout=10)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _put_ms(connection: http.client.HTTPSConnection, transaction: str, envelope: str) -> float:
    begun = time.perf_counter()
    connection.request(
        "PUT",
        f"/v1/transactions/{transaction}/authorisation",
        body=envelope.encode("ascii"),
        headers={"Content-Type": "application/jose", "Accept": "application/jose", "Idempotency-Key": "00" * 16},
    )
    response = connection.getresponse()
    response.read()
    if response.status != 200:
        raise RuntimeError(f"the host answered {response.status} to a repeated envelope")
    return (time.perf_counter() - begun) * 1000

"""Speaks TLS and HTTP/1.1 to both sides, for what can only be done to a whole request or a whole answer.

Every exchange is read whole, drawn for, and then played; h11 does the reading and writing of HTTP. The proxy has a
certificate of its own from the test authority, for which it needs the authority's key: no client that is configured for
anything else can be talked to by it.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from random import Random
from typing import Final, TypeAlias

import h11

from hwsim.faults.network import CHUNK_BYTES, HOLD_S, Broken, Link, Network, Stream
from hwsim.faults.plan import CERTIFICATES, Draw, Fault
from hwsim.host.tls import NAMES, Authority, load_authority

MESSAGE_BYTES_MAX: Final = 16 * 1024 * 1024  # a request or an answer; the longest listing of a test has a tenth
_PATH_CHARACTERS_MAX: Final = 120  # in the log
_GARBAGE_BYTES_MAX: Final = 2_048
_ANSWER_S: Final = 60.0  # the slowest answer of a server behind the proxy; its clients give up long before
_SERVER_NAME: Final = "localhost"  # what the server's certificate is for, wherever on loopback it listens
_PAGE: Final = (
    b"<!doctype html><title>Log in</title><h1>Welcome to our network</h1><p>Please accept our conditions.</p>"
)
_PORTAL: Final = "http://portal.invalid/login"
_HTML: Final = ("Content-Type", "text/html; charset=utf-8")
# What speaks of the item itself (400, 409, 413, 422) only the server may say. A gateway says these.
_STATUSES: Final = {
    Fault.STATUS_4XX: (401, 403, 404, 408, 425, 429),
    Fault.STATUS_5XX: (500, 502, 503, 504),
}
_WORKED_ON: Final = frozenset({500, 504})  # these are answered after the request has reached the server

_Event: TypeAlias = h11.Request | h11.Response | h11.Data | h11.EndOfMessage


class _Ended(Exception):
    """No exchange follows on this connection: it is closed politely."""


@dataclass(frozen=True, slots=True)
class Message:
    """A whole request or answer."""

    head: h11.Request | h11.Response
    body: bytes
    end: h11.EndOfMessage = field(default_factory=h11.EndOfMessage)

    @property
    def about(self) -> str:
        """Method and path; no query, which may say more than that."""
        if isinstance(self.head, h11.Response):
            return f"answer {self.head.status_code}"
        path = self.head.target.partition(b"?")[0].decode("ascii")
        return f"{self.head.method.decode('ascii')} {path[:_PATH_CHARACTERS_MAX]}"

    def on(self, connection: h11.Connection) -> bytes:
        """Its bytes."""
        events: list[_Event] = [self.head, h11.Data(self.body), self.end] if self.body else [self.head, self.end]
        return b"".join(connection.send(event) or b"" for event in events)


class Termination:
    """The TLS of a proxy: what it shows to clients, and how it reaches the server.

    `directory` is one that a host has provisioned, whose authority signs the proxy's certificates and has signed the
    server's. Without it neither side speaks TLS, and `upstream_tls` says so for the server alone: the Stripe double's.
    """

    def __init__(
        self, directory: Path | None, *, upstream_tls: bool = True, client_certificate: Path | None = None
    ) -> None:
        """Raises `HostKeyError` for a directory without an authority, `OSError` for an unusable client certificate."""
        self.upstream: ssl.SSLContext | None = None
        self._authority: Authority | None = None
        self._contexts: dict[Fault, ssl.SSLContext] = {}
        if directory is None:
            return
        self._authority = load_authority(directory)
        if upstream_tls:
            self.upstream = ssl.create_default_context(cadata=self._authority.pem.decode())
            if client_certificate is not None:
                self.upstream.load_cert_chain(client_certificate)

    @property
    def tls(self) -> bool:
        return self._authority is not None

    def context(self, fault: Fault) -> ssl.SSLContext | None:
        """For a connection to a client that this is drawn for."""
        if self._authority is None:
            return None
        shown = fault if fault in CERTIFICATES else Fault.PASS
        if shown not in self._contexts:
            self._contexts[shown] = _context(self._authority, shown)
        return self._contexts[shown]


class TerminatingLink(Link):
    """Exchanges, one after the other, on a client's connection."""

    def __init__(self, network: Network, client: socket.socket, termination: Termination) -> None:
        super().__init__(network, client)
        self._termination = termination
        self._http = h11.Connection(h11.SERVER)
        self._upstream: _Upstream | None = None

    async def carry(self) -> None:
        if self.draw.fault in CERTIFICATES:
            self.played("shown to the client")
        client = await self.accept(self._termination.context(self.draw.fault))
        try:
            while True:
                await self._exchange(client)
        except _Ended:
            await client.close()
        except h11.ProtocolError:
            raise Broken from None  # whatever one of the two speaks

    async def _exchange(self, client: Stream) -> None:
        async with asyncio.timeout(HOLD_S):
            request = await _read(self._http, client)
        self.network.exchanges += 1
        exchange = _Exchange(self.network.exchanges, request, client)
        if self.draw.fault is Fault.BLACK_HOLE:
            self.played("swallowed while it ran", carried=request.about)
            await self.hold(client)
        await self._play(exchange, self.network.plan.exchange())
        self.network.overtaking.passed(exchange.number)

    async def _play(self, exchange: _Exchange, draw: Draw) -> None:  # noqa: PLR0912, PLR0915 - one case for each fault
        """What happens to one exchange. It is said before the client can see it."""
        severity, chance = self.network.severity, draw.particulars()

        def say(detail: str) -> None:
            self.network.played("exchange", exchange.number, draw.fault, exchange.request.about, detail)

        match draw.fault:
            case (
                Fault.PASS
                | Fault.REFUSE
                | Fault.BLACK_HOLE
                | Fault.CERTIFICATE_EXPIRED
                | Fault.CERTIFICATE_WRONG_NAME
                | Fault.CERTIFICATE_UNTRUSTED
                | Fault.CERTIFICATE_CHANGED
            ):
                await self._answer(exchange, await self._ask(exchange))
            case Fault.DROP_REQUEST:
                say(await self._ask_in_part(exchange, chance))
                await self._leave()
                await self.hold(exchange.client)
            case Fault.RESTART:
                say(await self._ask_in_part(exchange, chance) + ", then both sides are reset")
                raise Broken
            case Fault.DROP_AFTER_REQUEST:
                await self._ask(exchange)
                say("worked on, then the client is reset")
                raise Broken
            case Fault.DROP_ANSWER:
                await self._ask(exchange)
                say("worked on, no answer comes back")
                await self.hold(exchange.client)
            case Fault.DELAY:
                delay_ms, of_request = chance.randint(0, severity.delay_ms_max), chance.random() < 0.5
                say(f"the {'request' if of_request else 'answer'} comes {delay_ms} ms late")
                await asyncio.sleep(delay_ms / 1000 if of_request else 0)
                answer = await self._ask(exchange)
                await asyncio.sleep(0 if of_request else delay_ms / 1000)
                await self._answer(exchange, answer)
            case Fault.REORDER:
                limit_s, of_request = severity.overtake_ms_max / 1000, chance.random() < 0.5
                if of_request:
                    say("request " + await self.network.overtaking.wait(exchange.number, limit_s))
                answer = await self._ask(exchange)
                if not of_request:
                    say("answer " + await self.network.overtaking.wait(exchange.number, limit_s))
                await self._answer(exchange, answer)
            case Fault.SLOW_LORIS:
                data = (await self._ask(exchange)).on(self._http)
                say(f"{len(data)} bytes, one every {severity.drip_ms} ms")
                await exchange.client.drip(data, severity.drip_ms)
                self._go_on()
            case Fault.DUPLICATE:
                answer = await self._ask_twice(exchange, chance)
                say("the server has it twice")
                await self._answer(exchange, answer)
            case Fault.TRUNCATE:
                data = (await self._ask(exchange)).on(self._http)
                cut = chance.randrange(1, len(data))
                say(f"{cut} of {len(data)} bytes come back")
                await exchange.client.write(data[:cut])
                raise _Ended
            case Fault.GARBAGE:
                await self._ask(exchange)
                data = chance.randbytes(chance.randint(1, _GARBAGE_BYTES_MAX))
                say(f"worked on, {len(data)} random bytes come back")
                await exchange.client.write(data)
                raise _Ended
            case Fault.WRONG_TYPE:
                await self._ask(exchange)
                say("worked on, a web page comes back")
                await self._answer(exchange, _made(200, [_HTML], _PAGE))
            case Fault.OVERSIZED:
                await self._oversize(exchange, await self._ask(exchange), say)
            case Fault.STATUS_4XX | Fault.STATUS_5XX:
                status = severity.status or chance.choice(_STATUSES[draw.fault])
                retry_after_s = severity.retry_after_s
                if severity.status is None and chance.random() < 0.5:
                    retry_after_s = chance.randint(1, severity.retry_after_s_max)
                worked_on = status in _WORKED_ON
                if worked_on:
                    await self._ask(exchange)
                headers = [] if retry_after_s is None else [("Retry-After", str(retry_after_s))]
                named = "".join(f", {name} {value}" for name, value in headers)
                say(f"{status}{named}, {'worked on' if worked_on else 'never arrived'}")
                await self._answer(exchange, _made(status, headers, b""))
            case Fault.CAPTIVE_PORTAL:
                redirect = chance.random() < 0.5
                say("never arrived, " + ("redirected to a log-in page" if redirect else "a log-in page comes back"))
                portal = _made(302, [("Location", _PORTAL)], b"") if redirect else _made(200, [_HTML], _PAGE)
                await self._answer(exchange, portal)

    async def _oversize(self, exchange: _Exchange, answer: Message, say: Callable[[str], None]) -> None:
        """An answer that begins like the true one and goes on until the client has had enough, or an end was set."""
        say("worked on, an answer without end comes back")
        headers = [(name, value) for name, value in answer.head.headers if name == b"content-type"]
        client = exchange.client
        await client.write(self._http.send(h11.Response(status_code=200, headers=headers)) or b"")
        for _ in range(0, self.network.severity.oversized_bytes, CHUNK_BYTES):
            await client.write(self._http.send(h11.Data(b"e" * CHUNK_BYTES)) or b"")
        raise Broken

    async def _answer(self, exchange: _Exchange, answer: Message) -> None:
        await self.network.dawdle()
        await exchange.client.write(answer.on(self._http))
        self._go_on()

    def _go_on(self) -> None:
        """To the next exchange, unless one side has said that this was the last."""
        if h11.MUST_CLOSE in self._http.states.values():
            raise _Ended
        self._http.start_next_cycle()

    async def _ask(self, exchange: _Exchange) -> Message:
        upstream = await self._reached()
        answer = await upstream.ask(exchange.request)
        if not upstream.usable:
            await self._leave()
        return answer

    async def _ask_in_part(self, exchange: _Exchange, chance: Random) -> str:
        upstream = await self._reached()
        data = exchange.request.on(upstream.http)
        cut = chance.randrange(1, len(data))
        await upstream.stream.write(data[:cut])
        return f"{cut} of {len(data)} bytes arrive"

    async def _ask_twice(self, exchange: _Exchange, chance: Random) -> Message:
        """On two connections at the same time, as a gateway does that has given up too early. One answer counts."""
        second = await self._connect()
        asked = asyncio.create_task(second.ask(exchange.request))
        try:
            answers = [await self._ask(exchange), await asked]
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            await second.stream.close()
        return chance.choice(answers)

    async def _reached(self) -> _Upstream:
        """The connection to the server: a kept one, unless the server has ended it."""
        if self._upstream is None or self._upstream.stream.reader.at_eof():
            await self._leave()
            self._upstream = await self._connect()
        return self._upstream

    async def _connect(self) -> _Upstream:
        return _Upstream(await self.connect(self._termination.upstream, _SERVER_NAME))

    async def _leave(self) -> None:
        if self._upstream is not None:
            await self._upstream.stream.close()
            self._upstream = None


@dataclass(frozen=True, slots=True)
class _Exchange:
    number: int
    request: Message
    client: Stream


class _Upstream:
    """A connection to the server, over which requests go one after the other."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.http = h11.Connection(h11.CLIENT)
        self.usable = True  # for one more request

    async def ask(self, request: Message) -> Message:
        """Raises `Broken` when the server gives no answer."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                await self.stream.write(request.on(self.http))
                answer = await _read(self.http, self.stream)
        except _Ended:
            raise Broken from None
        self.usable = set(self.http.states.values()) == {h11.DONE}
        if self.usable:
            self.http.start_next_cycle()
        return answer


async def _read(connection: h11.Connection, stream: Stream) -> Message:
    """The next message whole. Raises `_Ended` when the other side has ended instead of beginning one."""
    head: h11.Request | h11.Response | None = None
    body = bytearray()
    while True:
        match connection.next_event():
            case h11.Request() | h11.Response() as head:
                pass
            case h11.Data() as data:
                body += data.data
                if len(body) > MESSAGE_BYTES_MAX:
                    raise Broken
            case h11.EndOfMessage() as end if head is not None:
                return Message(head, bytes(body), end)
            case h11.ConnectionClosed():
                raise _Ended
            case h11.NEED_DATA:
                if connection.they_are_waiting_for_100_continue:
                    await stream.write(connection.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
                connection.receive_data(await stream.read())
            case _:  # an informational answer: the one that counts is still to come
                pass


def _made(status: int, headers: list[tuple[str, str]], body: bytes) -> Message:
    """An answer of the proxy's own."""
    reason = HTTPStatus(status).phrase
    head = h11.Response(
        status_code=status, headers=[*headers, ("Content-Length", str(len(body)))], reason=reason.encode("ascii")
    )
    return Message(head, body)


def _context(authority: Authority, fault: Fault) -> ssl.SSLContext:
    """A new certificate that is wrong in this, or in nothing."""
    now = datetime.now(UTC)
    names: tuple[str, ...] = NAMES
    not_after = now + timedelta(days=1)
    if fault is Fault.CERTIFICATE_WRONG_NAME:
        names = ("host.invalid",)
    if fault is Fault.CERTIFICATE_EXPIRED:
        not_after = now - timedelta(days=1)
    if fault is Fault.CERTIFICATE_UNTRUSTED:
        authority = Authority.create(now)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with tempfile.NamedTemporaryFile() as file:  # the library reads keys from files only; this one is its owner's
        file.write(authority.issue(names, now - timedelta(days=2), not_after))
        file.flush()
        context.load_cert_chain(file.name)
    return context

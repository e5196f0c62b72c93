"""What the connections of a proxy share: the plan, the numbers, the account of what was played, and one another.

`Link` is a client's connection, of either kind. Everything here lives in the proxy's event loop and is touched by
nothing else.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import random
import socket
import ssl
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from hwsim.faults.plan import TRANSPARENT, Fault, Plan, Severity

CHUNK_BYTES: Final = 65_536
CONNECT_S: Final = 5.0
_PAST_S: Final = 0.05  # what was seen of the other may be no more than the end of its handshake
HOLD_S: Final = 120.0  # a client that has no time-out of its own waits so long for what has vanished
CLOSE_S: Final = 1.0  # for a peer to answer the end of a TLS stream
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close() sends RST


class Broken(Exception):
    """The connection ends here, as if the network had torn it."""


@dataclass(frozen=True, slots=True)
class Played:
    """A fault that has happened. Of what was carried it names method and path, and never a body."""

    kind: str  # "connection" or "exchange"
    number: int
    fault: Fault
    carried: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} {self.number} {self.fault.value} {self.carried}{self.detail and f': {self.detail}'}"


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts since the start. A transparent proxy sees no exchanges."""

    connections: int
    exchanges: int
    faults: Mapping[Fault, int]

    def __str__(self) -> str:
        faults = "".join(f" {fault.value}={count}" for fault, count in self.faults.items())
        return f"connections={self.connections} exchanges={self.exchanges}{faults}"


class Overtaking:
    """One waits until another has gone past. While one waits nobody else does, so two cannot wait for each other."""

    def __init__(self) -> None:
        self._waiting: asyncio.Future[int] | None = None
        self._number = 0

    async def wait(self, number: int, limit_s: float) -> str:
        """Be overtaken, or not within the limit. Says what came of it."""
        if self._waiting is not None:
            return f"goes past {self._number}, which waits"
        self._number = number
        self._waiting = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(limit_s):
                by = await self._waiting
                await asyncio.sleep(_PAST_S)
                return f"overtaken by {by}"
        except TimeoutError:
            return "nobody came to overtake it"
        finally:
            self._waiting = None

    def passed(self, number: int) -> None:
        """Who has gone past whoever waits."""
        if self._waiting is not None and number != self._number and not self._waiting.done():
            self._waiting.set_result(number)


@dataclass(slots=True)
class Network:
    """The state that all links share."""

    upstream: tuple[str, int]
    plan: Plan
    severity: Severity
    report: Callable[[Played], None]
    terminating: bool
    delay_ms: int = 0  # before each piece (transparent) or answer (terminating) that goes back
    jitter_ms: int = 0  # at most so much more
    connections: int = 0
    exchanges: int = 0
    faults: Counter[Fault] = field(default_factory=Counter)
    overtaking: Overtaking = field(default_factory=Overtaking)
    jitter: random.Random = field(default_factory=lambda: random.Random(0))

    def playable(self, plan: Plan) -> Plan:
        """This plan. Raises `ValueError` if it asks for what this proxy cannot do."""
        if not self.terminating and (beyond := plan.faults - TRANSPARENT):
            names = ", ".join(sorted(fault.value for fault in beyond))
            raise ValueError(f"{names}: only a proxy that terminates TLS can do that, give it an authority")
        return plan

    def played(self, kind: str, number: int, fault: Fault, carried: str, detail: str = "") -> None:
        self.faults[fault] += 1
        self.report(Played(kind, number, fault, carried, detail))

    def stats(self) -> Stats:
        faults = {fault: self.faults[fault] for fault in Fault if self.faults[fault]}
        return Stats(self.connections, self.exchanges, faults)

    async def dawdle(self) -> None:
        """The delay that this network has apart from any fault."""
        if self.delay_ms or self.jitter_ms:
            await asyncio.sleep((self.delay_ms + self.jitter.uniform(0, self.jitter_ms)) / 1000)


@dataclass(slots=True)
class Stream:
    """Both directions of one connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def accepted(cls, client: socket.socket, context: ssl.SSLContext | None) -> Stream:
        """The server's side of a connection, its handshake done. Raises `OSError`, TLS errors among them."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=CHUNK_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol,
            client,
            ssl=context,
            ssl_handshake_timeout=CONNECT_S if context else None,
            ssl_shutdown_timeout=CLOSE_S if context else None,
        )
        return cls(reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    @classmethod
    async def to(cls, address: tuple[str, int], context: ssl.SSLContext | None, name: str | None = None) -> Stream:
        """The client's side of one. Raises `OSError`."""
        async with asyncio.timeout(CONNECT_S):
            made = await asyncio.open_connection(
                *address,
                limit=CHUNK_BYTES,
                ssl=context,
                server_hostname=name if context else None,
                ssl_shutdown_timeout=CLOSE_S if context else None,
            )
        return cls(*made)

    async def read(self) -> bytes:
        return await self.reader.read(CHUNK_BYTES)

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def drip(self, data: bytes, drip_ms: int) -> None:
        for position in range(len(data)):
            await self.write(data[position : position + 1])
            await asyncio.sleep(drip_ms / 1000)

    async def close(self) -> None:
        """Politely: what was written arrives, then the stream ends."""
        self.writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(2 * CLOSE_S):
                await self.writer.wait_closed()

    def reset(self) -> None:
        """RST, whatever was on its way. Nothing, if the connection has ended."""
        if (inner := self.writer.get_extra_info("socket")) is not None:
            with contextlib.suppress(OSError):
                inner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.writer.transport.abort()


def reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    connection.close()


class Link(abc.ABC):
    """One client's connection and, unless the network swallows it, the one or more to the server."""

    def __init__(self, network: Network, socket_: socket.socket) -> None:
        network.connections += 1
        self.network = network
        self.number = network.connections
        self.draw = network.plan.connection(terminating=network.terminating)
        self.spoiled = False  # something of it has been swallowed
        self._socket = socket_
        self._streams: list[Stream] = []

    async def run(self) -> None:
        """Until one side ends it, or the network does."""
        try:
            match self.draw.fault:
                case Fault.REFUSE:
                    self.played("accepted and reset at once")
                case Fault.BLACK_HOLE:
                    self.played("accepted and forgotten")
                    await self.hold(await self.accept(None))
                case _:
                    await self.carry()
        except (OSError, Broken):
            pass  # one side has gone: the other learns it by the reset below
        finally:
            for stream in self._streams:
                stream.reset()
            reset(self._socket)

    @abc.abstractmethod
    async def carry(self) -> None:
        """Carry what comes. Every end that is no polite one is an exception."""

    def redraw(self) -> bool:
        """The plan has changed. Whether the link can live with it: what was swallowed cannot be given back."""
        before = self.draw
        self.draw = self.network.plan.connection(terminating=self.network.terminating)
        return not self.spoiled or self.draw.fault is before.fault

    def played(self, detail: str = "", *, carried: str = "") -> None:
        self.network.played("connection", self.number, self.draw.fault, carried or "-", detail)

    async def accept(self, context: ssl.SSLContext | None) -> Stream:
        return self._keep(await Stream.accepted(self._socket, context))

    async def connect(self, context: ssl.SSLContext | None, name: str | None = None) -> Stream:
        return self._keep(await Stream.to(self.network.upstream, context, name))

    async def hold(self, client: Stream) -> None:
        """Swallow what the client sends and give it nothing, until it goes."""
        self.spoiled = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HOLD_S):
                while await client.read():
                    pass
        raise Broken

    def _keep(self, stream: Stream) -> Stream:
        self._streams.append(stream)
        return stream

"""Carries bytes without keys: all that it knows of them is where a TLS client's first application data is.

That much it must know, because an answer can only be lost after its request has arrived. What befalls a connection
befalls its next request; where that one ends is told by silence.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

from hwsim.faults.network import HOLD_S, Broken, Link, Network, Stream
from hwsim.faults.plan import Fault

_QUIET_S: Final = 0.2  # a request whose sender has been silent for so long has been sent whole
_DRAIN_S: Final = 10.0  # longer than the server may take to do its work before the answer is lost
_CHANGE_CIPHER_SPEC, _HANDSHAKE, _APPLICATION_DATA = 20, 22, 23  # TLS record types (RFC 8446, 5.1)


class TransparentLink(Link):
    """Bytes from one side to the other, one task for each direction."""

    def __init__(self, network: Network, client: socket.socket) -> None:
        super().__init__(network, client)
        self._request = _RequestWatch()
        self._armed_for = Fault.PASS  # the fault whose request is being watched for

    async def carry(self) -> None:
        client = await self.accept(None)
        server = await self.connect(None)
        ways = [asyncio.create_task(self._forth(client, server)), asyncio.create_task(self._back(server, client))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            ends = await asyncio.gather(*ways, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end
        # One side has said that it sends no more, which with TLS and HTTP means that it has gone.
        await asyncio.gather(client.close(), server.close())

    async def _forth(self, client: Stream, server: Stream) -> None:
        """What the client sends."""
        while data := await self._next(client, server):
            if self.draw.fault is Fault.BLACK_HOLE:
                self._forget()
                await self.hold(client)
            if self._is_request(data):
                await self._befall(data, client, server)
            await server.write(data)

    async def _back(self, server: Stream, client: Stream) -> None:
        """What the server sends."""
        while data := await server.read():
            if self.draw.fault is Fault.BLACK_HOLE:
                self._forget()
            if self.spoiled or self._loses_answer:
                continue
            await self.network.dawdle()
            if self._armed_for is Fault.SLOW_LORIS and self._request.complete:
                await client.drip(data, self.network.severity.drip_ms)
            else:
                await client.write(data)
            if self._request.complete:  # what comes before is the handshake: nobody is overtaken by that
                self.network.overtaking.passed(self.number)
        if self._loses_answer:
            raise Broken
        if self.spoiled:
            await asyncio.sleep(HOLD_S)  # the client is not told

    @property
    def _loses_answer(self) -> bool:
        return self._armed_for is Fault.DROP_AFTER_REQUEST and self._request.handshake_done

    async def _next(self, client: Stream, server: Stream) -> bytes:
        """The client's next piece. Silence after a request whose answer is to be lost ends the connection instead."""
        dropping = self._armed_for is Fault.DROP_AFTER_REQUEST and self._request.complete
        if not (dropping or self.spoiled):
            return await client.read()
        try:
            async with asyncio.timeout(_QUIET_S if dropping else HOLD_S):
                return await client.read()
        except TimeoutError:
            if dropping:
                self.played("reset after the request has arrived")
                # The server has the request, and now learns that no other comes: it answers into the void and closes.
                server.writer.write_eof()
                await asyncio.sleep(_DRAIN_S)
            raise Broken from None

    def _is_request(self, data: bytes) -> bool:
        """Follow the client's bytes. Whether they are of the first request since the fault is there."""
        arrived = self._request.complete
        if self.draw.fault is not self._armed_for:
            self._armed_for, arrived = self.draw.fault, False
            self._request.begin()
        self._request.sent(data)
        return self._request.complete and not arrived

    async def _befall(self, data: bytes, client: Stream, server: Stream) -> None:
        """What happens to the request that begins with `data`, before that goes to the server."""
        severity = self.network.severity
        match self._armed_for:
            case Fault.DROP_REQUEST:
                await server.write(data[: len(data) // 2])
                self.played("the server gets half of the request")
                server.writer.write_eof()
                await self.hold(client)
            case Fault.RESTART:
                await server.write(data[: len(data) // 2])
                self.played("both sides reset in the middle of the request")
                raise Broken
            case Fault.DROP_ANSWER:
                self.played("no answer comes back")
                self.spoiled = True
            case Fault.DELAY:
                delay_ms = self.draw.particulars().randint(0, severity.delay_ms_max)
                self.played(f"the request comes {delay_ms} ms late")
                await asyncio.sleep(delay_ms / 1000)
            case Fault.REORDER:
                self.played(await self.network.overtaking.wait(self.number, severity.overtake_ms_max / 1000))
            case Fault.SLOW_LORIS:
                self.played(f"answers drip, a byte every {severity.drip_ms} ms")
            case _:
                pass

    def _forget(self) -> None:
        if not self.spoiled:
            self.played("swallowed while it ran")
        self.spoiled = True


class _RequestWatch:
    """Follows a client's bytes far enough to know when its handshake is over and a request has been sent.

    In TLS 1.3 the first record after the change of cipher looks like application data, but is the client's Finished
    message, after which it needs nothing more from the server. In TLS 1.2 that record is a handshake record, and the
    server's Finished has yet to pass. Bytes that do not start as TLS does are taken for a request at once.
    """

    def __init__(self) -> None:
        self.handshake_done = False
        self.complete = False
        self._plain: bool | None = None
        self._header = bytearray()
        self._skip_bytes = 0
        self._changed_cipher = False
        self._finished = False

    def begin(self) -> None:
        """Watch for the next request, on a connection that may have carried others."""
        self.complete = False

    def sent(self, data: bytes) -> None:
        if self._plain is None:
            self._plain = data[0] != _HANDSHAKE
        if self._plain:
            self.handshake_done = self.complete = True
            return
        position = 0
        while position < len(data):
            if self._skip_bytes:
                step = min(self._skip_bytes, len(data) - position)
                self._skip_bytes -= step
                position += step
                continue
            self._header.append(data[position])
            position += 1
            if len(self._header) == 5:
                self._record(self._header[0])
                self._skip_bytes = int.from_bytes(self._header[3:5])
                self._header.clear()

    def _record(self, kind: int) -> None:
        if kind == _CHANGE_CIPHER_SPEC:
            self._changed_cipher = True
        elif kind == _HANDSHAKE and self._changed_cipher:
            self._finished = True
        elif kind == _APPLICATION_DATA and not self._finished:
            self._finished = self.handshake_done = True
        elif kind == _APPLICATION_DATA:
            self.handshake_done = True
            self.complete = True

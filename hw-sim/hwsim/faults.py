"""A bad network between a client and a server: a TCP proxy whose faults are switched while it runs.

It knows nothing of what it carries except where a TLS client's first application data is, because an answer can only be
lost after its request has arrived. One thread per connection looks at both directions, so a fault acts on whole
connections and in one place. As a process (`python -m hwsim.faults`) it takes its orders from standard input.
"""

from __future__ import annotations

import argparse
import contextlib
import select
import socket
import struct
import sys
import threading
import time
from enum import Enum
from typing import Final

CONNECTIONS_MAX: Final = 64  # many more than one terminal opens: a leak in the client shows as refused connections
_CHUNK_BYTES: Final = 65_536
_TICK_S: Final = 0.05  # how soon a running connection notices that the fault was switched
_CONNECT_S: Final = 5.0
_SEND_S: Final = 5.0  # a peer that takes nothing for so long is gone
_QUIET_S: Final = 0.2  # a request whose sender has been silent for so long has been sent whole
_DRAIN_S: Final = 10.0  # longer than the server may take to do its work before the answer is lost
_CHANGE_CIPHER_SPEC, _HANDSHAKE, _APPLICATION_DATA = 20, 22, 23  # TLS record types (RFC 8446, 5.1)
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close() sends RST


class Fault(Enum):
    """What the network does."""

    PASS = "pass"  # noqa: S105 - a mode of the proxy
    REFUSE = "refuse"  # nobody listens, and running connections are reset
    BLACK_HOLE = "black_hole"  # connections are accepted, bytes vanish
    DROP_AFTER_REQUEST = "drop_after_request"  # the request arrives and is worked on, its answer never comes back


class FaultProxy:
    """A proxy on loopback in front of `upstream`. Safe to use from several threads."""

    def __init__(self, upstream: tuple[str, int], *, port: int = 0) -> None:
        self.upstream = upstream
        self.delay_ms = 0  # before each piece that goes back to the client
        self._fault = Fault.PASS
        self._lock = threading.Lock()
        self._connections: dict[_Connection, threading.Thread] = {}
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self.port = port
        self._listen()

    @property
    def fault(self) -> Fault:
        return self._fault

    def switch(self, fault: Fault) -> None:
        """From now on the network does this, for running connections, too."""
        self._fault = fault
        if fault is Fault.REFUSE:
            self._deafen()
            self.cut()
        elif self._listener is None:
            self._listen()

    def cut(self) -> int:
        """Reset every running connection; how many there were."""
        with self._lock:
            running = list(self._connections.items())
        for connection, _ in running:
            connection.cut.set()
        for _, thread in running:
            thread.join(_CONNECT_S + _SEND_S)
        return len(running)

    def close(self) -> None:
        self._deafen()
        self.cut()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self) -> None:
        listener = socket.create_server(("127.0.0.1", self.port), backlog=CONNECTIONS_MAX)
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._acceptor = threading.Thread(target=self._accept, args=(listener,), name="faults", daemon=True)
        self._acceptor.start()

    def _deafen(self) -> None:
        if self._listener is None or self._acceptor is None:
            return
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._acceptor.join(_CONNECT_S)
        self._listener.close()
        self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            connection = _Connection(self, client)
            with self._lock:
                if len(self._connections) >= CONNECTIONS_MAX:
                    _reset(client)
                    continue
                thread = threading.Thread(target=self._run, args=(connection,), name="faults link", daemon=True)
                self._connections[connection] = thread
                thread.start()

    def _run(self, connection: _Connection) -> None:
        try:
            connection.run()
        finally:
            with self._lock:
                del self._connections[connection]


class _Connection:
    """One client's connection and, unless the network swallows it, the one to the server."""

    def __init__(self, proxy: FaultProxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._request = _RequestWatch()
        self.cut = threading.Event()

    def run(self) -> None:
        self._client.settimeout(_SEND_S)
        try:
            if self._proxy.fault is Fault.BLACK_HOLE:
                self._swallow(self._client)
                return
            with socket.create_connection(self._proxy.upstream, timeout=_CONNECT_S) as server:
                server.settimeout(_SEND_S)
                for side in (self._client, server):
                    side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a proxy must not add 40 ms
                self._relay(server)
        except OSError:
            pass  # either side has gone: the other learns it by the reset below
        finally:
            _reset(self._client)

    def _relay(self, server: socket.socket) -> None:
        armed = False  # the next request's answer is to be lost
        quiet_since = time.monotonic()
        while not self.cut.is_set():
            ready, _, _ = select.select([self._client, server], [], [], _TICK_S)
            if self._proxy.fault is Fault.BLACK_HOLE:
                self._swallow(self._client, server)
                return
            if self._proxy.fault is Fault.DROP_AFTER_REQUEST and not armed:
                armed = True
                self._request.begin()
            if self._client in ready:
                data = self._client.recv(_CHUNK_BYTES)
                if not data:
                    return
                self._request.sent(data)
                server.sendall(data)
                quiet_since = time.monotonic()
            if server in ready:
                data = server.recv(_CHUNK_BYTES)
                if not data:
                    return
                if not (armed and self._request.handshake_done):
                    self.cut.wait(self._proxy.delay_ms / 1000)
                    self._client.sendall(data)
            if armed and self._request.complete and time.monotonic() - quiet_since >= _QUIET_S:
                self._let_finish(server)
                return

    def _let_finish(self, server: socket.socket) -> None:
        """The server has the request, and now learns that no other comes: it answers into the void and closes."""
        server.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _DRAIN_S
        while time.monotonic() < deadline and not self.cut.is_set():
            if select.select([server], [], [], _TICK_S)[0] and not server.recv(_CHUNK_BYTES):
                return

    def _swallow(self, *sockets: socket.socket) -> None:
        """What has been swallowed cannot be given back, so the connection ends when the fault does."""
        while self._proxy.fault is Fault.BLACK_HOLE and not self.cut.is_set():
            ready, _, _ = select.select(list(sockets), [], [], _TICK_S)
            if any(not one.recv(_CHUNK_BYTES) for one in ready):
                return


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


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    connection.close()


def main(argv: list[str] | None = None) -> int:
    """Run as a process: one order a line on standard input, until it ends."""
    parser = argparse.ArgumentParser(prog="python -m hwsim.faults", description=__doc__)
    parser.add_argument("upstream", help="HOST:PORT of the server behind the proxy")
    parser.add_argument("--port", type=int, default=0, help="where to listen on loopback (default: a free port)")
    arguments = parser.parse_args(argv)
    host, _, port = arguments.upstream.rpartition(":")
    with FaultProxy((host, int(port)), port=arguments.port) as proxy:
        print(f"listening on 127.0.0.1:{proxy.port}", flush=True)
        for line in sys.stdin:
            print(_obey(proxy, line.split()), flush=True)
    return 0


def _obey(proxy: FaultProxy, words: list[str]) -> str:
    match words:
        case ["cut"]:
            return f"cut {proxy.cut()}"
        case ["delay", milliseconds] if milliseconds.isdecimal():
            proxy.delay_ms = int(milliseconds)
            return f"delay {milliseconds}"
        case [name] if name in {fault.value for fault in Fault}:
            proxy.switch(Fault(name))
            return name
        case _:
            return f"orders: cut, delay MS, {', '.join(fault.value for fault in Fault)}"


if __name__ == "__main__":
    sys.exit(main())

"""The local socket: one JSON object a line, small, versioned, answered in order (docs/formats.md, Local socket).

This module carries calls; what they do is the caller's table of handlers. Who may call what is decided by the peer's
user id, which the kernel vouches for, and by nothing that the peer says.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

import msgspec

from terminal.errors import TerminalError

LINE_BYTES_MAX: Final = 65_536  # a fetch of several envelopes fits; a peer that sends more is not one of ours
CONNECTIONS_MAX: Final = 16  # sync, a register, a few commands; each costs a thread
CALL_TIMEOUT_S: Final = 10.0  # beyond what a call itself asks to wait: the terminal answers from memory and one flush
_VERSION: Final = 1

CALLER: Final[ContextVar[int | None]] = ContextVar("caller", default=None)
"""The user id of whoever makes the call in hand, by the kernel's word; None within a command's own process."""

_log = logging.getLogger(__name__)


class ControlError(TerminalError):
    """A call on the local socket that did not do its work, or a socket that cannot be made."""

    exit_code = 2


class TerminalUnavailable(ControlError):
    """Nobody answers at the socket. What was stored stays stored; try again when the terminal service runs."""

    exit_code = 3


class CallRefused(ControlError):
    """The terminal answered with an error. `code` is a stable word."""

    exit_code = 4

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Role(Enum):
    SYNC = "sync"
    REGISTER = "register"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Roles:
    """Which user ids hold which role."""

    of_uid: Mapping[int, frozenset[Role]]

    @classmethod
    def build(cls, *, sync_user: str | None, register_user: str | None) -> Roles:
        """Root and our own user hold each role that no user is named for. Raises `ControlError` for an unknown one."""
        named = {Role.SYNC: sync_user, Role.REGISTER: register_user}
        unnamed = frozenset({Role.OPERATOR} | {role for role, user in named.items() if user is None})
        of_uid = {0: unnamed, os.getuid(): unnamed}
        for role, user in named.items():
            if user is not None:
                try:
                    uid = pwd.getpwnam(user).pw_uid
                except KeyError:
                    raise ControlError(f"[socket] names the user {user!r}, whom this machine does not know") from None
                of_uid[uid] = of_uid.get(uid, frozenset()) | {role}
        return cls(of_uid)

    def held_by(self, uid: int) -> frozenset[Role]:
        return self.of_uid.get(uid, frozenset())


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    v: int
    id: int
    do: str
    with_: dict[str, Any] = msgspec.field(name="with", default_factory=dict)


class Failure(msgspec.Struct, frozen=True):
    code: str
    message: str


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    v: int
    id: int
    ok: Any = None
    error: Failure | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One entry of the table of calls: the shape of its arguments, what it does, and which roles may (empty: any)."""

    arguments: type[Any]
    handle: Callable[[Any], Any]
    roles: frozenset[Role] = frozenset()


class ControlServer:
    """Serves a table of calls on a Unix socket, a thread per connection."""

    def __init__(self, path: Path, roles: Roles, calls: Mapping[str, Call]) -> None:
        self._path = path
        self._roles = roles
        self._calls = calls
        self._places = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._closing = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self._socket.bind(str(path))
            path.chmod(0o666)  # who may speak is decided by peer credentials, not by the file's mode
        except OSError as error:
            self._socket.close()
            raise ControlError(
                f"no socket can be made at {path}: {error.strerror or error}. Stored sales are safe; let this "
                "service write to that directory."
            ) from error
        self._socket.listen(CONNECTIONS_MAX)
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)
        self._thread.start()

    def answer_with(self, calls: Mapping[str, Call]) -> None:
        """Another table from now on, for those who are connected, too."""
        self._calls = calls

    def close(self) -> None:
        """Stop accepting; running calls end with their connections."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._path.unlink(missing_ok=True)
        self._thread.join(CALL_TIMEOUT_S)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            if not self._places.acquire(blocking=False):
                _log.warning("control: more than %d connections, one turned away", CONNECTIONS_MAX)
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="control call", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as lines:
                uid = _peer_uid(connection)
                CALLER.set(uid)  # this thread serves this connection alone
                held = self._roles.held_by(uid)
                while line := lines.readline(LINE_BYTES_MAX + 1):
                    if len(line) > LINE_BYTES_MAX:
                        return
                    connection.sendall(msgspec.json.encode(self._answer(line, held)) + b"\n")
        except OSError:
            pass  # the peer left; whatever its call did is done, and it may ask again
        finally:
            self._places.release()

    def _answer(self, line: bytes, held: frozenset[Role]) -> Answer:
        number = 0
        try:
            request = msgspec.json.decode(line, type=Request)
            number = request.id
            if request.v != _VERSION:
                raise CallRefused("version", f"this terminal speaks version {_VERSION} of the socket's messages")
            call = self._calls.get(request.do)
            if call is None:
                raise CallRefused("unknown_call", f"there is no call {request.do!r}")
            if call.roles and not call.roles & held:
                raise CallRefused("not_allowed", f"{request.do} is not for this user")
            arguments = msgspec.convert(request.with_, call.arguments)
            return Answer(_VERSION, number, ok=msgspec.to_builtins(call.handle(arguments)))
        except CallRefused as refused:
            return Answer(_VERSION, number, error=Failure(refused.code, str(refused)))
        except msgspec.MsgspecError as error:
            return Answer(_VERSION, number, error=Failure("malformed", str(error)))
        except Exception:  # noqa: BLE001
            # A bug in one call must not take the terminal down in the middle of somebody's sale.
            _log.exception("control: a call failed")
            return Answer(_VERSION, number, error=Failure("internal", "the call failed; the terminal's log says why"))


class ControlClient:
    """Calls the terminal. Connects when needed, reconnects after a failure. Not thread-safe."""

    def __init__(self, path: Path, *, unit: str = "payterm") -> None:
        """`unit` is the service that listens there, for messages."""
        self._path = path
        self._unit = unit
        self._socket: socket.socket | None = None
        self._received = bytearray()
        self._number = 0

    def call(self, do: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One call. An argument `wait_ms` is how long it may wait. Raises `TerminalUnavailable`, `CallRefused`."""
        given = dict(arguments or {})
        self._number += 1
        line = msgspec.json.encode(Request(_VERSION, self._number, do, given)) + b"\n"
        try:
            connection = self._connected()
            connection.settimeout(CALL_TIMEOUT_S + given.get("wait_ms", 0) / 1000)
            connection.sendall(line)
            reply = msgspec.json.decode(self._line(connection), type=Answer)
        except (OSError, msgspec.MsgspecError) as error:
            self.close()
            raise TerminalUnavailable(
                f"the service {self._unit} does not answer at {self._path}: {error}. Stored sales are safe; start "
                f"{self._unit}."
            ) from error
        if reply.error is not None:
            raise CallRefused(reply.error.code, reply.error.message)
        if reply.id != self._number:
            self.close()
            raise TerminalUnavailable(f"{self._unit} answered another call: connection dropped, try again")
        return dict(reply.ok or {})

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None
        self._received.clear()

    def _connected(self) -> socket.socket:
        if self._socket is None:
            fresh = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                fresh.settimeout(CALL_TIMEOUT_S)
                fresh.connect(str(self._path))
            except OSError:
                fresh.close()
                raise
            self._socket = fresh
        return self._socket

    def _line(self, connection: socket.socket) -> bytes:
        while b"\n" not in self._received:
            part = connection.recv(LINE_BYTES_MAX)
            if not part or len(self._received) > 4 * LINE_BYTES_MAX:
                raise ConnectionError("the connection ended in the middle of an answer")
            self._received += part
        line, _, rest = bytes(self._received).partition(b"\n")
        self._received = bytearray(rest)
        return line


def asked(calls: Mapping[str, Call], do: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A call without a socket, by whoever holds what it is about. Raises `CallRefused`."""
    call = calls[do]
    return dict(msgspec.to_builtins(call.handle(msgspec.convert(arguments, call.arguments))))


def _peer_uid(connection: socket.socket) -> int:
    """The peer's user id, by SO_PEERCRED (unix(7))."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", raw)
    return int(uid)

"""How a host can be made to misbehave, and the socket over which another process asks for it.

Each misbehaviour is something that real hosts, load balancers and hotel networks do. They are armed for the next so
many uploads; what is booked in spite of them is booked properly, for a terminal must get over all of them with exactly
one booking. Orders are one JSON object a line on a Unix socket in the host's directory, which only its owner can reach.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import msgspec

from hwsim.host.tls import Certificate

SOCKET_NAME: Final = "control.sock"
_ORDER_BYTES_MAX: Final = 65_536
_ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024  # the books of a long test
_TIMEOUT_S: Final = 30.0  # an order waits at most for a graceful stop of the listener
_ARMED_MAX: Final = 10_000

_log = logging.getLogger(__name__)

_DelayMs = Annotated[int, msgspec.Meta(ge=0, le=600_000)]
_Status = Annotated[int, msgspec.Meta(ge=400, le=599)]


class LoseAnswer(msgspec.Struct, frozen=True, tag_field="kind", tag="lose_answer"):
    """Book, then drop the connection without a response."""


class Delay(msgspec.Struct, frozen=True, tag_field="kind", tag="delay"):
    """Book, then answer so much later."""

    delay_ms: _DelayMs


class Fail(msgspec.Struct, frozen=True, tag_field="kind", tag="fail"):
    """Answer with this status; `booked` says whether before or after booking, which the client cannot know."""

    status: _Status
    retry_after_s: int | None = None
    booked: bool = False


class Garbage(msgspec.Struct, frozen=True, tag_field="kind", tag="garbage"):
    """Book, then answer 200 with bytes that are no JWS."""


class CaptivePortal(msgspec.Struct, frozen=True, tag_field="kind", tag="captive_portal"):
    """Answer 200 with somebody's login page; the host never saw the request."""


class WrongKey(msgspec.Struct, frozen=True, tag_field="kind", tag="wrong_key"):
    """Book, then answer with a signature of another key under the host's name."""


class OtherAnswer(msgspec.Struct, frozen=True, tag_field="kind", tag="other_answer"):
    """Book, then answer with members of the answer replaced, properly signed."""

    members: dict[str, str | int | None]


Misbehaviour: TypeAlias = LoseAnswer | Delay | Fail | Garbage | CaptivePortal | WrongKey | OtherAnswer


class Controls:
    """The misbehaviours in store, first armed first served."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: deque[Misbehaviour] = deque()

    def arm(self, misbehaviour: Misbehaviour, times: int = 1) -> None:
        """For the next `times` uploads (after those that are armed already)."""
        with self._lock:
            if len(self._armed) + times > _ARMED_MAX:
                raise ValueError(f"at most {_ARMED_MAX} misbehaviours can be in store")
            self._armed.extend([misbehaviour] * times)

    def clear(self) -> None:
        with self._lock:
            self._armed.clear()

    def take(self) -> Misbehaviour | None:
        """What the upload that has just come in is to suffer."""
        with self._lock:
            return self._armed.popleft() if self._armed else None


class Misbehave(msgspec.Struct, frozen=True, tag_field="do", tag="misbehave"):
    misbehaviour: Misbehaviour
    times: Annotated[int, msgspec.Meta(ge=1, le=_ARMED_MAX)] = 1


class Behave(msgspec.Struct, frozen=True, tag_field="do", tag="behave"):
    """Forget the misbehaviours in store."""


class Listen(msgspec.Struct, frozen=True, tag_field="do", tag="listen"):
    """Stop or start listening; the port stays the same."""

    on: bool


class Show(msgspec.Struct, frozen=True, tag_field="do", tag="show"):
    """Show this certificate from now on."""

    certificate: Certificate


class Bookings(msgspec.Struct, frozen=True, tag_field="do", tag="bookings"):
    """What has been booked."""


class Forks(msgspec.Struct, frozen=True, tag_field="do", tag="forks"):
    """The checkpoints that contradict others."""


Order: TypeAlias = Misbehave | Behave | Listen | Show | Bookings | Forks


class ControlSocket:
    """Takes orders on a Unix socket, one connection at a time."""

    def __init__(self, path: Path, obey: Callable[[Order], Any]) -> None:
        self._path = path
        self._obey = obey
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, name="host control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(_TIMEOUT_S)
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(_TIMEOUT_S)
                with connection.makefile("rb") as lines:
                    connection.sendall(self._answer(lines.readline(_ORDER_BYTES_MAX)) + b"\n")

    def _answer(self, line: bytes) -> bytes:
        try:
            return msgspec.json.encode({"ok": self._obey(msgspec.json.decode(line, type=Order))})
        except (msgspec.MsgspecError, ValueError, OSError) as error:
            return msgspec.json.encode({"error": str(error)})
        except Exception:  # noqa: BLE001 - a bug in one order must not end the test that gave it
            _log.exception("host control: an order failed")
            return msgspec.json.encode({"error": "the order failed; the host's log says why"})


class OrderRefused(Exception):
    """The host did not do what it was asked to."""


def order(directory: Path, what: Order) -> Any:
    """Ask the host that runs in this directory. Raises `OrderRefused`; `OSError` if no host runs there."""
    return order_json(directory, msgspec.json.encode(what))


def order_json(directory: Path, what: bytes) -> Any:
    """The same with an order that is JSON already, on one line."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_TIMEOUT_S)
        connection.connect(str(directory / SOCKET_NAME))
        connection.sendall(what + b"\n")
        with connection.makefile("rb") as lines:
            answer = msgspec.json.decode(lines.readline(_ANSWER_BYTES_MAX))
    if "error" in answer:
        raise OrderRefused(answer["error"])
    return answer["ok"]

"""Command and response APDUs (EMV 4.4 Book 1, 9 to 11), and the shape of every kernel step.

A kernel step is an exchange: a generator that yields a `Command`, is sent the `Response`, and returns its result.
A card that vanishes is thrown in at the yield as `CardRemoved`, so that each step may say what that means for it.

Steps yield whole APDUs and know nothing of transmission protocols. On contact a `ContactLine` stands between them and
the card: it fetches what T=0 leaves waiting and repeats what T=0 wants repeated.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Final, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")

GET_RESPONSES_MAX: Final = 16  # a response has 256 bytes; cards hand it over in one or two pieces


class CardRemoved(Exception):
    """Thrown into a kernel at its yield: the card gave no answer to this command and is gone."""


class Command(NamedTuple):
    """A command APDU. `le` is the expected length (0 asks for all there is, up to 256), None for no Le byte."""

    cla: int
    ins: int
    p1: int
    p2: int
    data: bytes = b""
    le: int | None = None

    def encode(self) -> bytes:
        """The bytes on the wire, short form."""
        head = bytes((self.cla, self.ins, self.p1, self.p2))
        body = bytes((len(self.data),)) + self.data if self.data else b""
        tail = b"" if self.le is None else bytes((self.le & 0xFF,))
        return head + body + tail


class Response(NamedTuple):
    """A response APDU: data field and status words; and how long the card took, if whoever sent it measured that."""

    data: bytes
    sw: int
    elapsed_us: int | None = None

    @classmethod
    def decode(cls, raw: bytes, elapsed_us: int | None = None) -> Response:
        """Split a raw answer. One too short to hold SW1 SW2 reads as SW 0000, which no step accepts."""
        if len(raw) < 2:
            return cls(b"", 0, elapsed_us)
        return cls(raw[:-2], int.from_bytes(raw[-2:], "big"), elapsed_us)


Exchange: TypeAlias = Generator[Command, Response, T]


def transceive(command: Command) -> Exchange[Response]:
    """Send one command, return its response."""
    response = yield command
    return response


class ContactLine:
    """Carries exchanges to one inserted card, over T=0 as well as T=1 (Book 1, 9.3.1 and Annex A).

    Whether Le may follow command data (case 4) depends on the protocol: T=0 cannot say it, T=1 needs it. A kernel does
    not know which one the reader chose, but an application is always selected first, and a SELECT may be repeated: it
    goes out without Le; if the card then sends nothing, or calls the length wrong, Le is added from there on.

    Whoever knows the protocol says so: `le_in_case_4`, and whether data is `waiting_behind_warnings` (T=0).
    """

    def __init__(self, *, le_in_case_4: bool | None = None, waiting_behind_warnings: bool = True) -> None:
        self._le_in_case_4 = le_in_case_4  # None: not known yet
        self._waiting_behind_warnings = waiting_behind_warnings

    def carry(self, exchange: Exchange[T]) -> Exchange[T]:
        """The same exchange, for the inserted card."""
        try:
            command = next(exchange)
            while True:
                try:
                    response = yield from self._transceive(command)
                except CardRemoved as removed:
                    command = exchange.throw(removed)
                else:
                    command = exchange.send(response)
        except StopIteration as finished:
            result: T = finished.value
            return result
        finally:
            exchange.close()

    def _transceive(self, command: Command) -> Exchange[Response]:
        if not command.data or command.le is None:
            return (yield from self._collect(command))
        response = yield from self._collect(command if self._le_in_case_4 else command._replace(le=None))
        if self._le_in_case_4 is None:
            if response.sw == 0x6700 or (response.sw == 0x9000 and not response.data):
                self._le_in_case_4 = True
                response = yield from self._collect(command)
            elif response.sw == 0x9000:
                self._le_in_case_4 = False
        if self._waiting_behind_warnings and response.sw >> 8 in {0x62, 0x63} and not response.data:
            # T=0 gives a warning before the data that it warns of: the data is still to be fetched.
            fetched = yield from self._collect(_get_response(0))
            return Response(fetched.data if fetched.sw == 0x9000 else b"", response.sw)
        return response

    def _collect(self, command: Command) -> Exchange[Response]:
        """Follow 61xx and 6Cxx to the end of the response. One that does not end keeps its 61xx, which nobody takes."""
        response = yield from _right_length(command)
        data = response.data
        for _ in range(GET_RESPONSES_MAX):
            if response.sw >> 8 != 0x61:
                break
            response = yield from _right_length(_get_response(response.sw & 0xFF))
            data += response.data
        return Response(data, response.sw)


def _get_response(le: int) -> Command:
    return Command(0x00, 0xC0, 0x00, 0x00, le=le)


def _right_length(command: Command) -> Exchange[Response]:
    """Repeat a command once with the length that the card names."""
    response = yield from transceive(command)
    if response.sw >> 8 == 0x6C:
        response = yield from transceive(command._replace(le=response.sw & 0xFF))
    return response

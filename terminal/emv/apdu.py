"""Command and response APDUs (EMV 4.4 Book 1, 9 to 11), and the shape of every kernel step.

A kernel step is an exchange: a generator that yields a `Command`, is sent the `Response`, and returns its result.
A card that vanishes is thrown in at the yield as `CardRemoved`, so that each step may say what that means for it.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")


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
    """A response APDU: data field and status words."""

    data: bytes
    sw: int

    @classmethod
    def decode(cls, raw: bytes) -> Response:
        """Split a raw answer. One too short to hold SW1 SW2 reads as SW 0000, which no step accepts."""
        if len(raw) < 2:
            return cls(b"", 0)
        return cls(raw[:-2], int.from_bytes(raw[-2:], "big"))


Exchange: TypeAlias = Generator[Command, Response, T]


def transceive(command: Command) -> Exchange[Response]:
    """Send one command, return its response."""
    response = yield command
    return response

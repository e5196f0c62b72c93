"""A card that answers from a list.

In strict order each command must be the next one of the list; the first that is not ends the run, because whatever the
card answers to it was never said. In any order a command is looked up: asked for the n-th time, the n-th answer.

Whether Le follows command data depends on the transmission protocol and not on what is said, so that it does not count
when commands are compared. What depends on the protocol besides is read off the list (`line`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from terminal.emv.apdu import CardRemoved, ContactLine, Exchange, Response, T
from terminal.replay import formats
from terminal.replay.formats import UnusableFile

COMMANDS_MAX: Final = 100_000  # every AID with every occurrence under it, each in pieces: only a loop is longer
_HEADER_BYTES: Final = 5  # with Lc
_GET_RESPONSE_ALL: Final = bytes.fromhex("00C0000000")


class Mismatch(Exception):
    """The command is not the one that the list has here. None: the list has ended, or the conversation has."""

    def __init__(self, index: int, expected: bytes | None, got: bytes | None) -> None:
        super().__init__(f"exchange {index}")
        self.index = index
        self.expected = expected
        self.got = got


class _Said(NamedTuple):
    command: bytes
    response: Response | None

    @classmethod
    def of(cls, listed: formats.Exchange) -> _Said:
        response = None
        if listed.response is not None:
            response = Response.decode(bytes.fromhex(listed.response), listed.elapsed_us)
        return cls(bytes.fromhex(listed.command), response)


def pump(exchange: Exchange[T], transmit: Callable[[bytes], Response | None]) -> T:
    """Run a kernel; None from `transmit` is a card that is gone. Raises what `transmit` does, and `UnusableFile`."""
    try:
        command = next(exchange)
        for _ in range(COMMANDS_MAX):
            response = transmit(command.encode())
            command = exchange.throw(CardRemoved()) if response is None else exchange.send(response)
    except StopIteration as finished:
        result: T = finished.value
        return result
    finally:
        exchange.close()
    raise UnusableFile(f"the card keeps the terminal asking: over {COMMANDS_MAX} commands, and no end. Nothing counts.")


class ScriptedCard:
    """Answers what the list says, and keeps what it was asked."""

    def __init__(
        self, exchanges: Sequence[formats.Exchange], *, in_order: bool, unknown_command: bytes = b"\x6d\x00"
    ) -> None:
        self._list = [_Said.of(each) for each in exchanges]
        self._in_order = in_order
        self._unknown_command = Response.decode(unknown_command)
        self._next = 0
        self._times: dict[bytes, int] = {}
        self._answers: dict[bytes, list[Response | None]] = {}
        for said in self._list:
            self._answers.setdefault(_without_le(said.command), []).append(said.response)
        self._gone = False
        self.commands: list[bytes] = []

    def line(self) -> ContactLine:
        """How this card is spoken to: a re-send, or a question after a warning, only if the list has one."""
        pairs = zip(self._list, self._list[1:], strict=False)
        return ContactLine(
            le_in_case_4=None if any(_sent_again(first.command, second.command) for first, second in pairs) else False,
            waiting_behind_warnings=any(said.command == _GET_RESPONSE_ALL for said in self._list),
        )

    @property
    def expects_more(self) -> bool:
        """Whether the list, in strict order, goes on."""
        return self._in_order and self._next < len(self._list)

    def present(self) -> None:
        """The card comes to the reader (again)."""
        self._gone = False

    def pump(self, exchange: Exchange[T]) -> T:
        """Run a kernel against this card. Raises `Mismatch`, and `UnusableFile` for a list that leads nowhere."""
        return pump(exchange, self.transmit)

    def transmit(self, command: bytes) -> Response | None:
        """None: the card is gone. Raises `Mismatch`."""
        if self._gone:
            return None  # there is no card that a command could reach
        self.commands.append(command)
        response = self._from_list(command) if self._in_order else self._looked_up(command)
        self._gone = response is None
        return response

    def finish(self) -> None:
        """The conversation is over. Raises `Mismatch` if the list, in strict order, is not."""
        if self.expects_more:
            raise Mismatch(self._next, self._list[self._next].command, None)

    def _from_list(self, command: bytes) -> Response | None:
        if self._next >= len(self._list):
            raise Mismatch(self._next, None, command)
        said = self._list[self._next]
        if _without_le(said.command) != _without_le(command):
            raise Mismatch(self._next, said.command, command)
        self._next += 1
        return said.response

    def _looked_up(self, command: bytes) -> Response | None:
        key = _without_le(command)
        answers = self._answers.get(key)
        if answers is None:
            return self._unknown_command
        time = self._times.get(key, 0)
        self._times[key] = time + 1
        return answers[min(time, len(answers) - 1)]


def _without_le(command: bytes) -> bytes:
    """A command as it is compared: of one with data (case 4) without its Le."""
    with_le = len(command) > _HEADER_BYTES and len(command) == _HEADER_BYTES + command[4] + 1
    return command[:-1] if with_le else command


def _sent_again(first: bytes, second: bytes) -> bool:
    """Whether a command was repeated with Le added."""
    return len(second) == len(first) + 1 and _without_le(second) == first

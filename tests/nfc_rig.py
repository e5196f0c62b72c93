"""A bench for the contactless path: a simulated PN532 in a process of its own, and a card application to talk to."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hwsim.cards.iso14443 import ProximityCard
from hwsim.pn532 import Disturbance, Pn532

UNDISTURBED = Disturbance()
READY_S = 20.0  # importing in a fresh process on a busy machine


def command(answer_bytes: int, command_bytes: int = 5) -> bytes:
    """A command that asks for so many bytes and a status word; the rest of it fills up to its own length."""
    filler = (index * 37 & 0xFF for index in range(max(0, command_bytes - 2)))
    return answer_bytes.to_bytes(2) + bytes(filler)


def answer_to(request: bytes) -> bytes:
    """What `Asked` answers: as many bytes as asked for, made from every bit of the request."""
    wanted = int.from_bytes(request[:2])
    seed = zlib.crc32(request)
    return b"".join(zlib.crc32(bytes((seed & 0xFF, index & 0xFF)), seed).to_bytes(4) for index in range(wanted))[
        :wanted
    ] + bytes.fromhex("9000")


class Asked:
    """Answers as asked, and remembers what it executed and how often it was reset."""

    def __init__(self) -> None:
        self.executed: list[bytes] = []
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def apdu(self, command: bytes) -> bytes:
        self.executed.append(command)
        return answer_to(command)


class Failing(Asked):
    """A card model with a bug."""

    def apdu(self, command: bytes) -> bytes:
        super().apdu(command)
        raise RuntimeError("bug in the card model")


class Bench:
    """The simulated reader in its process. Calls go through a pipe, one at a time."""

    def __init__(self, connection: Connection, link: Path) -> None:
        self._connection = connection
        self.path = str(link)

    def present(self, card: ProximityCard, disturbance: Disturbance = UNDISTURBED) -> None:
        self.call("present", card, disturbance=disturbance)

    def remove(self) -> None:
        self.call("remove")

    def executed(self) -> list[bytes]:
        """The commands that the card presented last has executed."""
        return list(self.call("executed"))

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        self._connection.send((method, arguments, options))
        if not self._connection.poll(READY_S):
            raise RuntimeError("the simulated reader does not answer its bench")
        return self._connection.recv()


@contextmanager
def simulated_reader(link: Path, *, realtime: bool = False) -> Iterator[Bench]:
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, link, realtime), daemon=True)
    process.start()
    there.close()
    bench = Bench(here, link)
    try:
        bench.call("behave")
        yield bench
    finally:
        here.close()
        process.join(READY_S)
        process.close()


def _serve(connection: Connection, link: Path, realtime: bool) -> None:
    pn532 = Pn532(link, realtime=realtime)
    thread = threading.Thread(target=pn532.serve)
    thread.start()
    application = Asked()
    while True:
        try:
            method, arguments, options = connection.recv()
        except EOFError:
            break
        if method == "executed":
            connection.send(application.executed)
            continue
        if method == "present":
            application = arguments[0].application
        attribute = getattr(pn532, method)
        connection.send(attribute(*arguments, **options) if callable(attribute) else attribute)
    pn532.stop()
    thread.join()
    pn532.close()

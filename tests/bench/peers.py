"""Programs that make items durable, each in its own way: what the ledger is measured against, and the ledger itself.

`python -m tests.bench.peers NAME --directory D --count N --ack FILE` stores N items and writes one line into FILE, in
one write, as soon as an item's promise holds. `--list` opens what is there as the peer's user would after a power cut,
and prints the numbers of the items that are whole. So a power-cut simulator needs to know nothing about a peer: what
was acknowledged and is not listed is lost.

An item is as large as a sealed and signed envelope, and says its number in a way that a damaged one cannot. Every peer
is set as its documentation offers it; where a setting decides about durability, it stands in the peer's name.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sqlite3
import sys
import time
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Final
from urllib.parse import quote

from terminal.ledger.ledger import Ledger, LedgerSettings
from terminal.ledger.states import SOLD
from terminal.ledger.values import Decision, Event, Transaction
from tests import ledger_rig
from tests.bench.flushes import BLOCK_BYTES, RawFile
from tests.ledger_rig import Rig

ITEM_BYTES: Final = 800  # an envelope with a card's data objects sealed in it has 805
LOG_BYTES: Final = 4 << 20  # of the presized peers, as the ledger's
_SLOT_BYTES: Final = 16_384
_SLOTS_OF_A_SALE: Final = 9  # used, or kept free for what an unsent sale may still need
_SLOTS_AT_LEAST: Final = 512
_PAGE: Final = 256  # transactions or envelopes asked for at a time


class Missing(Exception):
    """A peer's library cannot be had here; the message says why."""


def item(number: int) -> str:
    """The content of an item: its number, and letters that only this number has."""
    letters = hashlib.shake_128(b"%d" % number).hexdigest((ITEM_BYTES - 10) // 2)
    return f"{number:09d} {letters}"


def number_of(content: object) -> int | None:
    """Which item this is, None if it is not whole."""
    if not isinstance(content, str) or not content[:9].isdecimal():
        return None
    number = int(content[:9])
    return number if content == item(number) else None


class Workload(ABC):
    """Something that stores items one by one."""

    what: ClassVar[str]
    others_s: float = 0.0  # of the last item's time, what was the work of another machine

    @abstractmethod
    def __init__(self, directory: Path, count: int) -> None:
        """Open or make it in `directory`, with room for `count` items."""

    @abstractmethod
    def store(self, number: int) -> None:
        """On return the item is as durable as this peer promises."""

    def tidy(self) -> None:  # noqa: B027 (most have nothing to do)
        """What is done in quieter moments, so that a long run measures the same thing all along."""

    @abstractmethod
    def close(self) -> None: ...


class Peer(Workload):
    """One that can be asked afterwards what it still has."""

    @classmethod
    @abstractmethod
    def stored(cls, directory: Path) -> Iterable[int | None]:
        """The items that are there, None for one that is damaged; may end early with an error of any kind."""


# ---- the least that a disk can do


class Raw(Peer):
    """A block overwritten and flushed."""

    what = "raw: overwrite 4 KiB, fdatasync"

    def __init__(self, directory: Path, count: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = RawFile(directory / "raw")
        _sync(directory)

    def store(self, number: int) -> None:
        content = item(number).encode()
        self._file.overwrite((zlib.crc32(content).to_bytes(4) + content).ljust(BLOCK_BYTES, b"\0"))

    def close(self) -> None:
        self._file.close()

    @classmethod
    def stored(cls, directory: Path) -> Iterator[int | None]:
        content = (directory / "raw").read_bytes()
        for at in range(0, len(content), BLOCK_BYTES):
            block = content[at : at + 4 + ITEM_BYTES]
            if any(block):
                whole = zlib.crc32(block[4:]).to_bytes(4) == block[:4]
                yield number_of(block[4:].decode()) if whole else None


# ---- databases


class Sqlite(Peer):
    """One row an item, one commit a row."""

    what = "sqlite3: WAL, FULL"
    options: ClassVar[str] = ""
    presized: ClassVar[bool] = False

    def __init__(self, directory: Path, count: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._connection = self._connect(directory)
        run = self._connection.execute
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run("CREATE TABLE IF NOT EXISTS item (number INTEGER PRIMARY KEY, content TEXT NOT NULL)")
        if self.presized:
            run("BEGIN IMMEDIATE")
            run("CREATE TABLE filler (zeros BLOB)")
            run("INSERT INTO filler VALUES (zeroblob(?))", (LOG_BYTES,))
            run("DROP TABLE filler")
            run("COMMIT")
            run(f"PRAGMA wal_autocheckpoint = {LOG_BYTES * 3 // 4 // BLOCK_BYTES}")
            run("PRAGMA wal_checkpoint(RESTART)").fetchall()

    def store(self, number: int) -> None:
        self._connection.execute("INSERT INTO item VALUES (?, ?)", (number, item(number)))  # commits by itself

    def close(self) -> None:
        self._connection.close()

    @classmethod
    def stored(cls, directory: Path) -> Iterator[int | None]:
        with contextlib.closing(cls._connect(directory)) as connection:
            for number, content in connection.execute("SELECT number, content FROM item"):
                yield number if number_of(content) == number else None

    @classmethod
    def _connect(cls, directory: Path) -> Any:
        return cls._library().connect(
            f"file:{quote(str(directory / 'items.db'))}{cls.options}", uri=True, isolation_level=None
        )

    @classmethod
    def _library(cls) -> ModuleType:
        return sqlite3


class SqlitePresized(Sqlite):
    what = "sqlite3: WAL, FULL, psow=0, presized"
    options = "?psow=0"
    presized = True


class SqlCipher(Sqlite):
    """Every page encrypted and authenticated; the raw key is given, so that no password is stretched."""

    what = "SQLCipher: WAL, FULL"

    @classmethod
    def _library(cls) -> ModuleType:
        return _library("sqlcipher3").dbapi2

    @classmethod
    def _connect(cls, directory: Path) -> Any:
        connection = super()._connect(directory)
        connection.execute(f"PRAGMA key = \"x'{bytes(range(32)).hex()}'\"")
        return connection


# ---- queues


class LiteQueue(Peer):
    what = "litequeue"

    def __init__(self, directory: Path, count: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._queue = self._open(directory)

    @staticmethod
    def _open(directory: Path) -> Any:
        return _library("litequeue").LiteQueue(str(directory / "queue.db"))

    def store(self, number: int) -> None:
        self._queue.put(item(number))

    def close(self) -> None:
        self._queue.conn.close()

    @classmethod
    def stored(cls, directory: Path) -> Iterator[int | None]:
        queue = cls._open(directory)
        while (message := queue.pop()) is not None:
            yield number_of(message.data)
        queue.conn.close()


class PersistQueueFile(Peer):
    """The queue that its documentation begins with: files of a hundred items each."""

    what = "persist-queue: file"

    def __init__(self, directory: Path, count: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._queue = self._open(directory)

    @staticmethod
    def _open(directory: Path) -> Any:
        # Renames into the queue must not cross file systems.
        return _library("persistqueue").Queue(str(directory / "queue"), tempdir=str(directory))

    def store(self, number: int) -> None:
        self._queue.put(item(number))

    def close(self) -> None:
        del self._queue  # it has no other end

    @classmethod
    def stored(cls, directory: Path) -> Iterator[int | None]:
        queue = cls._open(directory)
        for _ in range(queue.qsize()):  # not until it is empty: a size that is wrong would never become zero
            yield number_of(queue.get_nowait())


class PersistQueueSqlite(Peer):
    what = "persist-queue: SQLiteAckQueue"

    def __init__(self, directory: Path, count: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._queue = self._open(directory)

    @staticmethod
    def _open(directory: Path) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _library("persistqueue").SQLiteAckQueue(str(directory))

    def store(self, number: int) -> None:
        self._queue.put(item(number))

    def close(self) -> None:
        self._queue.close()

    @classmethod
    def stored(cls, directory: Path) -> Iterator[int | None]:
        queue = cls._open(directory)
        for row in queue.queue():
            yield number_of(row["data"])
        queue.close()


# ---- the ledger


class SealedBefore(Rig):
    """A terminal whose envelopes were sealed and signed beforehand: what is left of a sale is the ledger."""

    _envelope: str | None = None

    def authorisation(self, transaction: Transaction, *, deferred: bool) -> Callable[[int], str]:
        if self._envelope is None:
            self._envelope = super().authorisation(transaction, deferred=deferred)(1)
        envelope = self._envelope
        return lambda _: envelope


class Till:
    """The real ledger with real keys, and the few things that a workload does with it.

    The only place in the benchmark that knows the rig of the ledger's tests.
    """

    def __init__(self, directory: Path, count: int, rig: type[Rig] = Rig) -> None:
        slots = _SLOTS_AT_LEAST + count * _SLOTS_OF_A_SALE
        # Only the journal's size when it is made: one that is there keeps its own.
        self.directory = directory / "ledger"
        self.rig = rig(self.directory, settings=LedgerSettings(journal_size_bytes=slots * _SLOT_BYTES))
        self.rig.entropy = os.urandom  # the rig's own repeats itself after a restart, and costs more
        self.ledger: Ledger = self.rig.open()

    def sell(self) -> Transaction:
        """An offline sale: opened, sealed and signed, accepted, shown."""
        sale = self.rig.finish(self.ledger, self.rig.begin(self.ledger), Decision.ACCEPTED)
        self.ledger.mark_shown(sale.id, sale.state.value)
        return sale

    def sell_online(self) -> float:
        """Opened, sealed and signed, handed to sync, answered (verified), shown; the seconds that the host took."""
        sale = self.rig.finish(self.ledger, self.rig.begin(self.ledger), Decision.ONLINE)
        (waiting,) = [each for each in self.ledger.outbox(4) if each.transaction == sale.id]
        self.ledger.mark_handed_over([waiting.key])
        assert waiting.envelope is not None
        begun = time.perf_counter()
        answer = self.rig.host.answer(waiting.envelope)
        host_s = time.perf_counter() - begun
        approved = self.rig.deliver(self.ledger, sale.id, Event.AUTHORISATION, answer)
        self.ledger.mark_shown(approved.id, approved.state.value)
        return host_s

    def settle(self) -> None:
        """Sync takes what waits, and the host answers it: an outbox that only grows would be measured instead."""
        while waiting := self.ledger.outbox(_PAGE):
            self.ledger.mark_handed_over([each.key for each in waiting])
            for each in waiting:
                if each.event is Event.AUTHORISATION and each.envelope is not None:
                    self.rig.deliver(self.ledger, each.transaction, each.event, self.rig.host.answer(each.envelope))

    def hand_over(self) -> None:
        """Sync takes what waits, and the host says nothing."""
        while waiting := self.ledger.outbox(_PAGE):
            self.ledger.mark_handed_over([each.key for each in waiting])

    def sold(self) -> Iterator[int]:
        """The numbers of all sales that are sold and, if the host still waits for them, have their envelope."""
        before = None
        while some := self.ledger.transactions(_PAGE, before):
            before = some[-1].number
            for sale in some:
                waiting = self.ledger.outbox_item(f"{sale.id}/{Event.AUTHORISATION}") if sale.state in SOLD else None
                if waiting is not None and (waiting.answered or waiting.envelope is not None):
                    yield sale.number

    def verify(self) -> None:
        """Read and compare every record."""
        ledger_rig.verified(self.ledger)

    def close(self) -> None:
        self.ledger.close()


class PaytermSale(Peer):
    """An offline sale, whole: envelope sealed (HPKE) and signed, two copies, shown. Transactions number the items."""

    what = "payterm: offline sale, sealed and signed"
    rig: ClassVar[type[Rig]] = Rig

    def __init__(self, directory: Path, count: int) -> None:
        self._till = Till(directory, count, self.rig)

    def store(self, number: int) -> None:
        self._till.sell()

    def tidy(self) -> None:
        self._till.settle()

    def close(self) -> None:
        self._till.close()

    @classmethod
    def stored(cls, directory: Path) -> Iterator[int | None]:
        till = Till(directory, 0, cls.rig)
        yield from till.sold()
        till.close()


class PaytermLedger(PaytermSale):
    """The same with an envelope that was made before. (One envelope for all: it cannot be settled.)"""

    what = "payterm: offline sale, ledger alone"
    rig = SealedBefore

    def tidy(self) -> None:
        self._till.hand_over()


class PaytermOnline(PaytermSale):
    """The terminal's part of a sale that the host approves."""

    what = "payterm: online sale, the terminal's part"

    def store(self, number: int) -> None:
        self.others_s = self._till.sell_online()


class PaytermUpload(Workload):
    """What sync does for one of them, host and terminal being fakes in memory."""

    what = "payterm: upload, sync's spool"
    _STEPS_MAX: ClassVar = 32  # pieces of work that one upload takes sync, with room

    def __init__(self, directory: Path, count: int) -> None:
        from tests import sync_rig

        directory.mkdir(parents=True, exist_ok=True)
        self._make = sync_rig.sale
        self._terminal = sync_rig.FakeTerminal()
        self._rig = sync_rig.Rig(
            directory, self._terminal, [sync_rig.FakeHost()], sync_rig.FakeClock(), sync_rig.seeded(1)
        )

    def store(self, number: int) -> None:
        self._terminal.sell(self._make(number, urgent=True, envelope=item(number)))
        for _ in range(self._STEPS_MAX):
            if self._rig.sync.step().in_ms:
                break
        assert len(self._terminal.answers) >= number

    def close(self) -> None:
        self._rig.close()


PEERS: Final[dict[str, type[Peer]]] = {
    "raw": Raw,
    "sqlite": Sqlite,
    "sqlite-presized": SqlitePresized,
    "sqlcipher": SqlCipher,
    "litequeue": LiteQueue,
    "persist-queue-file": PersistQueueFile,
    "persist-queue-sqlite": PersistQueueSqlite,
    "payterm-ledger": PaytermLedger,
    "payterm": PaytermSale,
}
WORKLOADS: Final[dict[str, type[Workload]]] = {
    **PEERS,
    "payterm-online": PaytermOnline,
    "payterm-upload": PaytermUpload,
}


def _library(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise Missing(f"{name} is not installed here ({error})") from error


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.close(descriptor)


def survivors(name: str, directory: Path) -> tuple[set[int], str | None]:
    """The whole items, and how the listing ended if not well. What cannot be read any more is gone for its user."""
    found: set[int] = set()
    try:
        found.update(number for number in PEERS[name].stored(directory) if number is not None)
    except Missing:
        raise
    except Exception as error:  # noqa: BLE001 (a peer may fail over a damaged file in whatever way it likes)
        return found, f"{type(error).__name__}: {error}"
    return found, None


def work(name: str, directory: Path, count: int, acknowledge: Path) -> None:
    """Store items 1 to `count`, a line for each as soon as its promise holds."""
    workload = WORKLOADS[name](directory, count)
    lines = os.open(acknowledge, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in range(1, count + 1):
        workload.store(number)
        os.write(lines, b"%d\n" % number)
    os.close(lines)
    workload.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers", description="Store items, or list them.")
    parser.add_argument("name", choices=sorted(WORKLOADS), metavar="NAME", help=", ".join(WORKLOADS))
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60, help="how many items (default: %(default)s)")
    parser.add_argument("--ack", type=Path, help="where to write a line for each durable item")
    parser.add_argument("--list", action="store_true", help="print the items that are there and whole, as JSON")
    options = parser.parse_args(arguments)
    try:
        if options.list:
            if options.name not in PEERS:
                parser.error(f"{options.name} cannot be listed")
            found, trouble = survivors(options.name, options.directory)
            print(json.dumps({"items": sorted(found), "trouble": trouble}))
        elif options.ack is None:
            parser.error("--ack FILE or --list is needed")
        else:
            work(options.name, options.directory, options.count, options.ack)
    except Missing as error:
        print(f"{options.name}: skipped, {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The sync service's own journal: what it took over, how attempts ended, when the way to the host was open, and where
the terminal's journal stood.

The same ring, chain and archive as the terminal's (`terminal.ledger.journal`, `archive`), in this service's directory
and under keys of its own. Nothing depends on it: it holds no envelope and no card data, and what it says is never read
back to decide anything but one question. **Has a store been put back or exchanged?** The two journals record each
other's heads. So whoever replaces one of them is contradicted by the other, and has to replace both, under two users,
between two of their meetings; what the host has countersigned contradicts even that.

It must never stop an upload. One that is damaged is put aside, whole and still readable there, and begun anew under a
new epoch; one that cannot be written is left alone until the next start. Both are said, in the log and to the terminal.

A flush of its own for every note would cost as much as sending. So notes wait for a minute (or until the ring's window
is full) and are then flushed together: a power cut may take the last of them, never what the spool has stored.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from terminal.clock import Clock, Entropy, SystemClock, system_entropy
from terminal.ledger.archive import Archive
from terminal.ledger.errors import DiskTrouble, KeyUnavailable, LedgerCorrupt, LedgerError
from terminal.ledger.journal import START, Journal, Position, Record, RecordType
from terminal.ledger.keys import Keyring, SecretKey
from terminal.ledger.medium import FileMedium, Medium, storage_errors, sync_directory

SIZE_BYTES: Final = 8 * 1024 * 1024  # 512 records: some 250 sales, before the oldest move to the archive
KEPT_MS: Final = 12 * 31 * 86_400_000  # twelve months at least
FLUSH_EVERY_MS: Final = 60_000  # one extra flush a minute is not felt
TERMINAL_HEAD_EVERY_MS: Final = 600_000  # each head recorded makes the other journal grow, too
ASIDES_MAX: Final = 4  # damaged journals kept for whoever looks into it; a storage that eats more is to be replaced
_FREE_MIN: Final = 16  # slots below which a note makes room first
_FREE_SHARE: Final = 2  # of the ring: below this, idle time is used to make room
_READS_MAX: Final = 3  # a reader that meets a writer looks again
_FILE: Final = "journal"
_ARCHIVE: Final = "archive"
_ASIDE: Final = "aside-"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Head:
    """How far a journal has come: its last record that is durable. `mac` is hex."""

    epoch: int
    sequence: int
    mac: str


class History(Enum):
    """What there is to say of both journals, the gravest first."""

    DIFFERS = "differs"  # one of the two contradicts what the other has recorded of it
    OFF = "off"  # this journal cannot be written
    ANEW = "anew"  # this journal was damaged and begun anew
    WHOLE = "whole"


class SyncJournal:
    """Notes, and the comparison of heads. Raises nothing that the storage can cause. Not thread-safe."""

    def __init__(
        self, directory: Path, spool_key: SecretKey, *, clock: Clock, entropy: Entropy, size_bytes: int = SIZE_BYTES
    ) -> None:
        """Open or make it. `directory` is the spool's, whose lock keeps a second process out."""
        self._directory = directory
        self._keys = _Keys.of(spool_key)
        self._clock = clock
        self._entropy = entropy
        self._size_bytes = size_bytes
        self._open: _Open | None = None
        self._said: set[History] = set()
        self._differing: set[str] = set()
        self._unflushed_since_ms: int | None = None
        self._compared = False  # whether the terminal has said where it saw us last
        self._terminal: Head | None = None  # the newest of its heads that was seen
        self._terminal_noted: Head | None = None
        self._terminal_noted_ms: int | None = None  # None: not in this run
        self._terminal_durable: Head | None = None
        try:
            self._start()
        except LedgerError as error:
            self._give_up(error)

    @property
    def history(self) -> History:
        return next((word for word in History if word in self._said), History.WHOLE)

    @property
    def head(self) -> Head | None:
        """Our own last durable record. None until it is known what the terminal last saw: it is to be compared first,
        or a store that was put back would be recorded over the proof.
        """
        if self._open is None or not self._compared:
            return None
        return self._open.head(self._open.durable)

    @property
    def terminal_head(self) -> Head | None:
        """The newest of the terminal's heads that is durably recorded here."""
        return self._terminal_durable

    def note(self, what: str, **details: Any) -> None:
        """Record an event; durable within a minute or so."""

        def append(opened: _Open) -> None:
            if opened.journal.free_slots < _FREE_MIN:
                self._make_room(opened)
            opened.records.append(opened.journal.append(RecordType.EVENT, {"what": what, "details": details}))
            if self._unflushed_since_ms is None:
                self._unflushed_since_ms = self._clock.monotonic_ms()

        self._do(append)

    def tidy(self) -> None:
        """Flush and make room, where it is time to. For when nobody waits."""

        def tidy(opened: _Open) -> None:
            since_ms = self._unflushed_since_ms
            if since_ms is not None and self._clock.monotonic_ms() - since_ms >= FLUSH_EVERY_MS:
                self._flush(opened)
            if opened.journal.free_slots < opened.journal.capacity // _FREE_SHARE:
                self._make_room(opened)

        self._do(tidy)

    def close(self) -> None:
        """The orderly end."""
        if self._terminal is not None:
            self._note_terminal(self._terminal)
        # Twice, so that the last record vouches for those before it: damage to them is then told from the end.
        self._do(self._flush)
        self.note("stop")
        self._do(self._flush)
        self._let_go()

    # The other journal

    def terminal_is_at(self, head: Head) -> None:
        """The terminal says how far its journal has come. Recorded from time to time; it must only ever grow."""
        last = self._terminal
        if last is not None and _goes_back(last, head):
            # What was recorded stays the newest: it is the proof, and the terminal is told of it.
            self._differs(
                "terminal_differs",
                f"the terminal's journal is at record {head.sequence} of epoch {head.epoch}, but had come to "
                f"{last.sequence} of epoch {last.epoch}: its store was put back or exchanged",
                is_at=_told(head),
                was_at=_told(last),
            )
            return
        self._terminal = head
        now_ms = self._clock.monotonic_ms()
        noted_ms, noted = self._terminal_noted_ms, self._terminal_noted
        due = noted_ms is None or now_ms - noted_ms >= TERMINAL_HEAD_EVERY_MS
        if due or noted is None or noted.epoch != head.epoch:
            self._note_terminal(head)

    def terminal_has_seen(self, ours: Head | None, *, differs: bool) -> None:
        """What the terminal has recorded of this journal, and whether its own contradicts what we have recorded."""
        self._compared = True
        opened = self._open
        if opened is not None and ours is not None and not opened.contains(ours):
            at = opened.head(opened.journal.last)
            self._differs(
                "sync_differs",
                f"the terminal has seen this journal at record {ours.sequence} of epoch {ours.epoch}, which is not in "
                f"it: the sync service's store was put back or exchanged (it is at {at.sequence} of epoch {at.epoch})",
                is_at=_told(at),
                was_at=_told(ours),
            )
        if differs:
            known = self._terminal_durable
            self._differs(
                "terminal_differs",
                "the terminal's journal does not hold what was recorded of it here: its store was put back or "
                "exchanged",
                was_at=None if known is None else _told(known),
            )

    def _note_terminal(self, head: Head) -> None:
        self._terminal_noted_ms = self._clock.monotonic_ms()
        if head != self._terminal_noted:
            self._terminal_noted = head
            self.note("terminal_head", **_told(head))

    def _differs(self, what: str, message: str, **details: Any) -> None:
        """Once a run for each journal: it does not go away by itself, and one entry is enough to be found."""
        self._said.add(History.DIFFERS)
        if what not in self._differing:
            self._differing.add(what)
            _log.error("%s. No sale is lost by that; find out who did it before the trail is trusted", message)
            self.note(what, **details)

    # The store

    def _start(self) -> None:
        epoch = 1 + max(map(_number, _asides(self._directory)), default=0)
        try:
            self._open = self._opened(epoch)
        except (LedgerCorrupt, KeyUnavailable) as error:
            aside = _put_aside(self._directory, epoch)
            self._said.add(History.ANEW)
            _log.error(
                "the sync service's own journal %s: it was put aside as %s and is begun anew; uploads go on",
                _reason(error),
                aside,
            )
            self._open = self._opened(epoch + 1)
            self.note("begun_anew", reason=_reason(error), aside=aside.name)
        for record in self._open.records:
            if record.type is RecordType.EVENT and record.body["what"] == "terminal_head":
                self._terminal = Head(**record.body["details"])
        self._terminal_noted = self._terminal_durable = self._terminal
        self.note("start")

    def _opened(self, epoch: int) -> _Open:
        archive = Archive(self._directory / _ARCHIVE, self._keys.data, self._keys.chain, self._entropy)
        archived = archive.last or START
        with storage_errors():
            medium = FileMedium.create(self._directory / _FILE, self._size_bytes)
        try:
            journal = self._keys.journal(medium, epoch, self._clock, self._entropy)
            if journal.identify():
                journal.reclaim(archived.sequence)
                records = list(journal.replay(None))
                journal.clear_beyond()
            elif archived == START:
                records = [journal.begin()]
            else:
                records = []
            if not _joined(archived, records):
                raise LedgerCorrupt.at_record(archived.sequence + 1, "does not continue the archive")
        except BaseException:
            medium.close()
            raise
        return _Open(medium, journal, archive, deque(records, journal.capacity), journal.last)

    def _flush(self, opened: _Open) -> None:
        opened.journal.flush()
        opened.durable = opened.journal.last
        self._terminal_durable = self._terminal_noted
        self._unflushed_since_ms = None

    def _make_room(self, opened: _Open) -> None:
        """Move the older half of the ring to the archive, and let go what has been there for long enough."""
        self._flush(opened)
        archived = (opened.archive.last or START).sequence
        old = [record for record in opened.records if record.sequence > archived]
        for _, month in groupby(old[: max(1, opened.journal.capacity // 2)], _month):
            opened.archive.append(list(month))
        opened.journal.reclaim((opened.archive.last or START).sequence)
        if self._clock.synchronised():
            opened.archive.drop_before(self._clock.wall_ms() - KEPT_MS)

    def _do(self, action: Callable[[_Open], None]) -> None:
        """What fails ends the journal for this run, and nothing else."""
        if self._open is None:
            return
        try:
            action(self._open)
        except LedgerError as error:
            self._give_up(error)

    def _give_up(self, error: LedgerError) -> None:
        self._said.add(History.OFF)
        _log.error(
            "the sync service's own journal %s: nothing more is recorded there until the next start; uploads go on",
            _reason(error),
        )
        self._let_go()

    def _let_go(self) -> None:
        if self._open is not None:
            self._open.medium.close()
            self._open = None


@dataclass(slots=True)
class _Open:
    """A journal in use. `records` are those that the ring still holds."""

    medium: FileMedium
    journal: Journal
    archive: Archive
    records: deque[Record]
    durable: Position

    def head(self, position: Position) -> Head:
        return Head(self.journal.epoch, position.sequence, position.mac.hex())

    def contains(self, head: Head) -> bool:
        """Whether this was once its head. One that is older than the ring, or that was put aside, is not looked for."""
        if head.epoch != self.journal.epoch:
            return head.epoch < self.journal.epoch
        index = head.sequence - self.records[0].sequence
        return index < 0 or (index < len(self.records) and self.records[index].mac.hex() == head.mac)


@dataclass(frozen=True, slots=True)
class _Keys:
    """Made from the spool key, each for its purpose."""

    data: Keyring
    chain: SecretKey

    @classmethod
    def of(cls, spool_key: SecretKey) -> _Keys:
        data = SecretKey(spool_key.derive(b"payterm sync journal data"))
        return cls(Keyring(data), SecretKey(spool_key.derive(b"payterm sync journal chain")))

    def journal(self, medium: Medium, epoch: int, clock: Clock, entropy: Entropy) -> Journal:
        return Journal(medium, data=self.data, chain=self.chain, epoch=epoch, clock=clock, entropy=entropy)


def read(directory: Path, spool_key: SecretKey) -> Generator[Record, None, None]:
    """Everything recorded, archived months first, oldest first; nothing where there is no journal.

    Changes nothing and may be done while the service runs. Also for a directory that was put aside. Raises
    `LedgerCorrupt`, `KeyUnavailable`, `DiskTrouble`.
    """
    if not (directory / _FILE).exists():
        return
    keys = _Keys.of(spool_key)
    with tempfile.TemporaryDirectory() as scratch:
        for attempt in range(_READS_MAX):
            copy = Path(scratch) / str(attempt)
            try:
                # In this order: what has left the ring meanwhile is in the archive then.
                ring = list(_snapshot(directory / _FILE, keys))
                archive = _copied(directory / _ARCHIVE, copy, keys)
                archived = archive.last or START
                if not _joined(archived, ring) and archived.sequence <= ring[-1].sequence:
                    raise LedgerCorrupt.at_record(archived.sequence + 1, "does not continue the archive")
                break
            except LedgerCorrupt:
                if attempt + 1 == _READS_MAX:
                    raise
        for record in archive.replay():
            if record.sequence >= ring[0].sequence:
                break
            yield record
        yield from ring


class _Snapshot:
    """The slots as they were at one moment. Implements `Medium`."""

    def __init__(self, slots: bytes) -> None:
        self._slots = bytearray(slots)

    @property
    def size_bytes(self) -> int:
        return len(self._slots)

    def pread(self, size_bytes: int, offset: int) -> bytes:
        return bytes(self._slots[offset : offset + size_bytes])

    def pwrite(self, data: bytes, offset: int) -> None:
        self._slots[offset : offset + len(data)] = data

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _snapshot(path: Path, keys: _Keys) -> Iterator[Record]:
    with storage_errors(), contextlib.closing(FileMedium(path)) as medium:
        snapshot = _Snapshot(medium.pread(medium.size_bytes, 0))
    # It appends nothing, so it needs neither time nor chance.
    journal = keys.journal(snapshot, 1, SystemClock(), system_entropy)
    if journal.identify():
        yield from journal.replay(None)


def _copied(directory: Path, to: Path, keys: _Keys) -> Archive:
    """The archive's sealed files once more: whoever opens an archive puts its directory in order."""
    with storage_errors():
        to.mkdir(mode=0o700)
        # The floor comes last: it says which of the others may be missing.
        for path in (*sorted(directory.glob("*.segment")), directory / "floor"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(path, to / path.name)
    return Archive(to, keys.data, keys.chain, system_entropy)


def _joined(archived: Position, records: Sequence[Record]) -> bool:
    """Whether archive and ring are one chain."""
    if not records:
        return False
    index = archived.sequence - records[0].sequence
    if index == -1:
        return records[0].previous_mac == archived.mac
    return 0 <= index < len(records) and records[index].mac == archived.mac


def _goes_back(last: Head, head: Head) -> bool:
    if head.epoch != last.epoch:
        return head.epoch < last.epoch
    return head.sequence < last.sequence or (head.sequence == last.sequence and head.mac != last.mac)


def _asides(directory: Path) -> list[Path]:
    """What was put aside, oldest first."""
    found = [path for path in directory.glob(f"{_ASIDE}*") if path.name.removeprefix(_ASIDE).isdecimal()]
    return sorted(found, key=_number)


def _number(aside: Path) -> int:
    return int(aside.name.removeprefix(_ASIDE))


def _put_aside(directory: Path, epoch: int) -> Path:
    """Move journal and archive away together, to where `read` still reads them."""
    aside = directory / f"{_ASIDE}{epoch}"
    with storage_errors():
        aside.mkdir(mode=0o700, exist_ok=True)
        for name in (_FILE, _ARCHIVE):
            with contextlib.suppress(FileNotFoundError):
                (directory / name).rename(aside / name)
        sync_directory(aside)
        sync_directory(directory)
        for old in _asides(directory)[:-ASIDES_MAX]:
            shutil.rmtree(old)
    return aside


def _told(head: Head) -> dict[str, Any]:
    return {"epoch": head.epoch, "sequence": head.sequence, "mac": head.mac}


def _month(record: Record) -> tuple[int, int]:
    """The UTC month that a record belongs to, by its own clock: a segment never spans two."""
    moment = datetime.fromtimestamp(record.wall_ms / 1000, UTC)
    return moment.year, moment.month


def _reason(error: LedgerError) -> str:
    """In this journal's own words: the ledger's speak of sales."""
    match error:
        case LedgerCorrupt(sequence=None):
            return "is damaged"
        case LedgerCorrupt(sequence=sequence):
            return f"is damaged at record {sequence}"
        case KeyUnavailable():
            return "was made with another key"
        case DiskTrouble(__cause__=cause) if cause is not None:
            return f"cannot be written ({cause})"
        case _:
            return "cannot be used"

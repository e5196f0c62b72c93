"""Journal, database and archive of one open ledger, and the one lock over them.

What sells (`ledger`), what tidies up (`upkeep`) and what looks (`inspection`) share these and nothing else. After a
storage error nobody knows which of the last writes are durable: every part then refuses until the ledger is opened
again, and recovery reads what is really there.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Generator
from contextlib import contextmanager
from copy import copy
from typing import Any, Final
from uuid import UUID

from terminal.ledger.archive import Archive
from terminal.ledger.errors import DiskTrouble, LedgerCorrupt, LedgerError
from terminal.ledger.journal import START, UNFLUSHED_MAX, Journal, Position, Record, RecordType
from terminal.ledger.medium import MirrorMedium
from terminal.ledger.store import Store
from terminal.ledger.values import Transaction

_PENDING_MAX: Final = UNFLUSHED_MAX - 4  # a commit adds two records at most


class Parts:
    """Use them inside `held` only."""

    def __init__(self, journal: Journal, store: Store, archive: Archive, mirror: MirrorMedium | None = None) -> None:
        self.journal = journal
        self.mirror = mirror
        self.store = store
        self.archive = archive
        self.pending: list[Record] = []  # written to the journal, not yet applied to the database
        self.opened: dict[UUID, Transaction] = {}  # what OPEN records among them began
        self.shown: dict[UUID, str] = {}  # what SHOWN records among them say
        self.has_retired_keys = False
        self.committed = journal.last
        self._overwritten: set[int] = set()  # payloads zeroed in the journal, not yet flushed
        self._lock = threading.RLock()
        self._broken: LedgerError | None = None
        self._closed = False

    @contextmanager
    def held(self) -> Generator[None]:
        """The lock, and the rule that a ledger in doubt does nothing."""
        with self._lock:
            if self._closed:
                raise LedgerError("the ledger is closed: nothing was recorded; open it again")
            if self._broken is not None:
                raise copy(self._broken)
            try:
                yield
            except (DiskTrouble, LedgerCorrupt) as error:
                # Without its traceback, which would keep the database's statements, and so its lock, for ever.
                self._broken = copy(error)
                raise

    @property
    def broken(self) -> LedgerError | None:
        return self._broken

    def shut(self) -> None:
        """Make everything durable and refuse whatever comes now."""
        with self._lock:
            try:
                if self._broken is None and not self._closed:
                    with self.held():
                        self.commit()
                        self.store.clear_log()
            finally:
                self._closed = True

    def append(self, type_: RecordType, body: dict[str, Any], payload: bytes = b"") -> None:
        self.pending.append(self.journal.append(type_, body, payload))

    def append_unflushed(self, type_: RecordType, body: dict[str, Any]) -> None:
        """For what has no flush of its own; bounded, so that a commit never finds the journal's window full."""
        if len(self.pending) >= _PENDING_MAX:
            self.commit()
        self.append(type_, body)

    def make_window(self, records: int) -> None:
        """So many can be appended now without a flush in between."""
        if len(self.pending) + records > UNFLUSHED_MAX:
            self.commit()

    def commit(self) -> None:
        """Both copies, in this order: the journal flushed, then the database brought up to date and flushed."""
        if not (self.pending or self._overwritten):
            return
        self.journal.flush()
        self.store.apply(self.pending, self._overwritten)
        self.committed = self.journal.last
        self.pending.clear()
        self.opened.clear()
        self.shown.clear()
        self._overwritten.clear()

    def overwrite(self, sequences: Collection[int]) -> None:
        """Zero payloads in the journal; durable, and known to the database, with the next commit."""
        for sequence in sequences:
            self.journal.erase(sequence)
            self._overwritten.add(sequence)

    def erase(self, sequences: Collection[int]) -> None:
        """Payloads are to be gone from journal and archive, durably on return."""
        if not sequences:
            return
        # It goes into the trail, and vouches for what it is about: a payload missing at the very end would look torn.
        self.commit()
        self.append(RecordType.EVENT, {"what": "erased", "details": {"payloads": len(sequences)}})
        self.commit()
        archived = self.archived.sequence
        self.overwrite(sequences)
        if older := [sequence for sequence in sequences if sequence <= archived]:
            self.archive.erase_payloads(older)
        self.commit()

    @property
    def archived(self) -> Position:
        """The last record in the archive."""
        return self.archive.last or START

    def reclaim(self) -> None:
        """Let slots be used again whose records are archived and for which nothing waits."""
        self.journal.reclaim(min(self.archived.sequence, self.store.reclaimable()))

"""Looking at an open ledger: its records in order, whether they are whole, a backup of them.

Always in pieces under the ledger's lock, so that a sale never waits for somebody who looks. Older records come from the
archive, the rest from the journal; both are one chain, and whoever goes along it verifies it: each record's MAC, its
place after the one before, the signatures of checkpoints, and that the database has the very same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec

from terminal.clock import Clock, Entropy
from terminal.ledger import backup, jws
from terminal.ledger.errors import LedgerCorrupt
from terminal.ledger.journal import START, Position, Record, RecordCodec, RecordType
from terminal.ledger.keys import TerminalKeys, key_id
from terminal.ledger.medium import Aligned, Misaligned, Unknown, alignment
from terminal.ledger.parts import Parts
from terminal.ledger.sealing import ENVELOPE_TYPE

_AT_ONCE: Final = 64  # records under one holding of the lock: a few milliseconds
_ARCHIVED_AT_ONCE: Final = 2_048  # of the archive, which needs no lock: a segment is opened as a whole


@dataclass(frozen=True, slots=True)
class Verified:
    """One piece of a verification. `position` is where the next piece begins; `first_bad` ends it."""

    position: Position
    first: int | None
    last: int
    records: int
    checkpoints: int
    restored: tuple[int, ...]
    first_bad: str | None
    countersigned: int | None
    done: bool


@dataclass(frozen=True, slots=True)
class Health:
    """How the stores are, besides what a verification says."""

    database: str
    slots: int
    free_slots: int
    alignment: str
    second: str
    segments: int
    archived: int
    unsent: int
    unshown: int
    lost_payloads: tuple[int, ...]
    free_bytes: int


class Inspection:
    """Made by the ledger."""

    def __init__(
        self, parts: Parts, *, directory: Path, journal: Path, keys: TerminalKeys, clock: Clock, entropy: Entropy
    ) -> None:
        self._parts = parts
        self._directory = directory
        self._journal = journal
        self._keys = keys
        self._codec = RecordCodec(keys.data, keys.chain)
        self._clock = clock
        self._entropy = entropy

    @property
    def last(self) -> int:
        """The number of the last record."""
        with self._parts.held():
            return self._parts.journal.last.sequence

    def records(self, after: int, limit: int) -> list[Record]:
        """At most `limit` records after that number, from the oldest one that there is. Raises `LedgerCorrupt`."""
        with self._parts.held():
            self._parts.commit()
            archived, last = self._parts.archived.sequence, self._parts.journal.last.sequence
        if after >= last:
            return []
        if after < archived:
            return list(islice(self._parts.archive.replay(self._parts.archive.before_record(after + 1)), limit))
        with self._parts.held():
            return self._parts.journal.read(self._parts.journal.before(after + 1), limit)

    def every(self) -> Iterator[Record]:
        """Every record up to the last one now, oldest first. Raises `LedgerCorrupt`."""
        with self._parts.held():
            self._parts.commit()
            last = self._parts.journal.last
            archived = self._parts.archived
        yield from self._parts.archive.replay()
        position = archived
        while position.sequence < last.sequence:
            with self._parts.held():
                found = self._parts.journal.read(position, min(_AT_ONCE, last.sequence - position.sequence))
            yield from found
            position = found[-1].position

    def verify_some(self, after: Position | None) -> Verified:
        """Go on verifying after `after`, from the oldest record when that is None. Damage is mended where it can be."""
        parts = self._parts
        with parts.held():
            parts.commit()
            known_restored = len(parts.journal.restored)
            countersigned = parts.store.countersigned()
            archived, last = parts.archived, parts.journal.last
        found: list[Record] = []
        bad: str | None = None
        try:
            if after is None or after.sequence < archived.sequence:
                found = self._next_archived(after or START)
            else:
                with parts.held():
                    found = parts.journal.read(after, _AT_ONCE)
            with parts.held():
                for record in found:
                    self._check(record)
        except LedgerCorrupt as error:
            bad = str(error)
        position = found[-1].position if found and bad is None else after or START
        restored = tuple(parts.journal.restored[known_restored:])
        return Verified(
            position=position,
            first=found[0].sequence if found else None,
            last=last.sequence,
            records=len(found),
            checkpoints=sum(record.type is RecordType.CHECKPOINT for record in found),
            restored=restored,
            first_bad=bad,
            countersigned=countersigned,
            done=bad is None and position.sequence >= last.sequence,
        )

    def check(self) -> Health:
        """Besides the records: the database's structure, the room that is left, how the journal lies on its device."""
        parts = self._parts
        with parts.held():
            parts.commit()
            segments = parts.archive.segments()
            return Health(
                database=parts.store.integrity(),
                slots=parts.journal.capacity,
                free_slots=parts.journal.free_slots,
                alignment=_said(self._journal),
                second=_second(parts),
                segments=len(segments),
                archived=parts.archived.sequence,
                unsent=sum(each.count for each in parts.store.unsent()),
                unshown=len(parts.store.unshown()),
                lost_payloads=tuple(parts.journal.lost_payloads),
                free_bytes=shutil.disk_usage(self._directory).free,
            )

    @property
    def current_key(self) -> bytes:
        """The id of the data key under which this ledger seals."""
        return self._keys.data.current.id

    def key_use(self) -> dict[str, dict[bytes, int]]:
        """What is sealed under which data key: cells, records (both copies are alike), and what is in the archive."""
        with self._parts.held():
            self._parts.commit()
            cells, kept = self._parts.store.sealed_under(), self._parts.store.records_under()
        return {"cells": cells, "records": kept, "archive": self._parts.archive.sealed_under()}

    def write_backup(self, path: Path) -> backup.Contents:
        """A sealed copy of every record in one file, read back. Raises `BackupError`, `LedgerCorrupt`."""
        with self._parts.held():
            self._parts.commit()
            last, epoch = self._parts.journal.last, self._parts.journal.epoch
        return backup.write(
            path,
            epoch=epoch,
            position=last,
            records=((record.trimmed, record.payload) for record in self.every() if record.sequence <= last.sequence),
            data=self._keys.data,
            chain=self._keys.chain,
            made_at_ms=self._clock.wall_ms(),
            entropy=self._entropy,
        )

    def _next_archived(self, after: Position) -> list[Record]:
        """The next segment's records. The journal's own follow once these are through."""
        found = list(islice(self._parts.archive.replay(after), _ARCHIVED_AT_ONCE))
        if not found and not after.sequence:
            with self._parts.held():
                journal = self._parts.journal
                return journal.read(journal.before(journal.first), _AT_ONCE)
        return found

    def _check(self, record: Record) -> None:
        """What goes beyond the chain: the database's copy, and who signed a checkpoint."""
        copy = self._parts.store.copy(record.sequence)
        if copy is not None:
            self._compare(record, *copy)
        if record.type is not RecordType.CHECKPOINT or record.payload is None:
            return
        signer = self._keys.signing.public_key()
        try:
            payload = self._parts.journal.open_payload(record.trimmed, record.payload).decode("ascii")
            said = msgspec.json.decode(jws.verify(payload, signer, typ=ENVELOPE_TYPE, kid=key_id(signer)))
        except (jws.JwsError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise LedgerCorrupt.at_record(record.sequence, "has no valid signature") from error
        if (said["sequence"], said["mac"]) != (record.sequence - 1, record.previous_mac.hex()):
            raise LedgerCorrupt.at_record(record.sequence, "was signed for another place")

    def _compare(self, record: Record, trimmed: bytes, payload: bytes | None) -> None:
        """Where the copies differ, the record at hand is authentic. Two that both are would be two histories."""
        if trimmed != record.trimmed and self._codec.authenticate(trimmed) is not None:
            raise LedgerCorrupt.at_record(record.sequence, "is another one in ledger.db")
        same = trimmed == record.trimmed and (payload is None or record.payload in {None, payload})
        if not same or not self._parts.store.files(record):
            raise LedgerCorrupt(
                f"the copy of journal record {record.sequence} in ledger.db is damaged: no sale is lost, the journal "
                "holds them all; restart, and ledger.db is rebuilt from there"
            )


def _said(journal: Path) -> str:
    match alignment(journal):
        case Aligned():
            return "slots lie on whole flash pages"
        case Misaligned(skew_bytes):
            return (
                f"{skew_bytes} bytes off the flash pages: a power cut may harm a neighbour, which the other copy mends"
            )
        case Unknown(reason):
            return f"unknown ({reason})"


def _second(parts: Parts) -> str:
    if parts.mirror is None:
        return "none is configured"
    return "in step" if not parts.mirror.behind_bytes else f"{parts.mirror.behind_bytes} bytes behind"

"""Bringing a backup back: the same history, continued under a new epoch.

Nothing that is newer is lost. A ledger that is whole and holds the backup's last record needs no restoring, and is left
as it is. From one that is damaged, whatever continues the backup's chain is taken along, as far as it can be read. The
restored ledger is built beside the one that is there, opened and verified, and only then takes its place; what was
there is renamed, never deleted.

The new epoch is for the host: this chain and the one of a card that was thought lost can no longer be confused. Sales
that wait in the backup are sent again under their old names, and are booked once whether they had been sent or not.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Final

from terminal.clock import Clock, Entropy
from terminal.ledger import backup
from terminal.ledger.archive import Archive
from terminal.ledger.errors import BackupError, LedgerCorrupt, LedgerError
from terminal.ledger.journal import FileMedium, Journal, Position, Record, RecordCodec, storage_errors, sync_directory
from terminal.ledger.keys import TerminalKeys
from terminal.ledger.ledger import ARCHIVE_NAME, DATABASE_NAME, JOURNAL_NAME, Ledger, LedgerSettings, locked
from terminal.ledger.salvage import Salvage
from terminal.ledger.upkeep import by_month

_SEGMENT_RECORDS_MAX: Final = 2_048


@dataclass(frozen=True, slots=True)
class Restored:
    """`newer` records continued the backup; `replaced` is where the former ledger is now."""

    records: int
    newer: int
    epoch: int
    unsent: int
    replaced: Path | None


def restore(
    directory: Path, path: Path, keys: TerminalKeys, *, settings: LedgerSettings, clock: Clock, entropy: Entropy
) -> Restored:
    """Bring the backup at `path` back into `directory`. Raises `BackupError`, `KeyUnavailable`, `LedgerLocked`."""
    contents = backup.verify(path, keys.data, keys.chain)
    if settings.journal is not None:
        raise BackupError(
            f"the journal is configured to lie in {settings.journal}: a backup is brought back into files; take "
            "`journal` out of the configuration first. Nothing was changed"
        )
    fill = _Filling(keys, clock, entropy, settings)
    existed = (directory / JOURNAL_NAME).exists() or (directory / DATABASE_NAME).exists()
    if existed:
        _refuse_needless(directory, contents, fill)
    with locked(directory.parent / directory.name):
        beside = directory.with_name(directory.name + ".restoring")
        with storage_errors():
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(mode=0o700)
        codec = RecordCodec(keys.data, keys.chain)
        saved = (codec.read(*copy) for copy in backup.read(path, keys.data, keys.chain))
        last, total = fill.archive(
            beside, chain(saved, _continuing(directory, contents.position, fill) if existed else ())
        )
        epoch = fill.begin(beside, last)
        with closing(fill.open(beside)) as ledger:
            unsent = sum(each.count for each in ledger.unsent())
            ledger.note("restored", backup=path.name, records=contents.records, newer=total - contents.records)
        return Restored(
            records=total,
            newer=total - contents.records,
            epoch=epoch,
            unsent=unsent,
            replaced=_exchange(directory, beside, existed=existed),
        )


class _Filling:
    """Makes the restored ledger."""

    def __init__(self, keys: TerminalKeys, clock: Clock, entropy: Entropy, settings: LedgerSettings) -> None:
        self.keys = keys
        self._clock = clock
        self._entropy = entropy
        self._settings = replace(settings, second_journal=None)

    def archive(self, directory: Path, records: Iterable[Record]) -> tuple[Record, int]:
        """Everything goes into the archive, from where the database is built; the last record, and how many."""
        archive = self.archive_of(directory)
        last, total = None, 0
        for piece in by_month(records, _SEGMENT_RECORDS_MAX):
            if last is None and piece[0].sequence > 1:
                archive.begin(Position(piece[0].sequence - 1, piece[0].previous_mac))
            archive.append(piece)
            last, total = piece[-1], total + len(piece)
        if last is None:
            raise BackupError("the backup holds no record: nothing was changed; use another backup")
        return last, total

    def begin(self, directory: Path, last: Record) -> int:
        """A blank journal that continues the chain in the next epoch."""
        with storage_errors():
            tape = FileMedium.create(directory / JOURNAL_NAME, self._settings.journal_size_bytes)
        with closing(tape):
            journal = self.journal_on(tape, epoch=last.epoch + 1)
            journal.begin(
                after=last.position,
                epoch_of={"epoch": last.epoch, "sequence": last.sequence, "mac": last.mac.hex()},
            )
        return last.epoch + 1

    def open(self, directory: Path) -> Ledger:
        return Ledger.open(directory, self.keys, clock=self._clock, entropy=self._entropy, settings=self._settings)

    def archive_of(self, directory: Path) -> Archive:
        return Archive(directory / ARCHIVE_NAME, self.keys.data, self.keys.chain, self._entropy)

    def journal_on(self, tape: FileMedium, *, epoch: int, salvage: Salvage | None = None) -> Journal:
        return Journal(
            tape,
            data=self.keys.data,
            chain=self.keys.chain,
            epoch=epoch,
            clock=self._clock,
            entropy=self._entropy,
            copies=None if salvage is None else salvage.record,
        )


def _refuse_needless(directory: Path, contents: backup.Contents, fill: _Filling) -> None:
    """A whole ledger is never replaced by its own past. One that belongs to another history is not touched either."""
    try:
        ledger = fill.open(directory)
    except LedgerCorrupt:
        return
    with closing(ledger):
        found = ledger.inspection.records(contents.position.sequence - 1, 1)
        known = bool(found) and found[0].position == contents.position
    if known:
        raise BackupError(
            f"the ledger in {directory} is whole and holds everything that is in this backup: nothing was changed, and "
            "nothing needs to be brought back"
        )
    raise BackupError(
        f"the ledger in {directory} is whole and has another history than this backup: nothing was changed; move it "
        "away yourself if it is really to be replaced, its unsent sales with it"
    )


def _continuing(directory: Path, position: Position, fill: _Filling) -> Iterator[Record]:
    """What the damaged ledger holds beyond the backup, as far as it is readable and continues the chain."""
    with suppress(LedgerError, OSError):
        for record in fill.archive_of(directory).replay(position):
            yield record
            position = record.position
    with (
        suppress(LedgerError, OSError),
        Salvage(directory / DATABASE_NAME) as salvage,
        closing(FileMedium(directory / JOURNAL_NAME)) as tape,
    ):
        journal = fill.journal_on(tape, epoch=1, salvage=salvage)
        if journal.identify():
            journal.reclaim(position.sequence)
            yield from journal.replay(position, thorough=True)


def _exchange(directory: Path, beside: Path, *, existed: bool) -> Path | None:
    replaced = next(
        name for number in count(1) if not (name := directory.with_name(f"{directory.name}.replaced-{number}")).exists()
    )
    with storage_errors():
        directory.rename(replaced)
        beside.rename(directory)
        sync_directory(directory.parent)
        if not existed:
            replaced.rmdir()  # it was made for the lock
            return None
    return replaced

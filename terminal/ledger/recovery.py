"""What happens between a power cut and the next sale.

Two steps. `recover` makes ledger.db say what journal and archive say: records that it misses are applied, a database
that is missing or damaged is built anew (the damaged one is moved aside, never deleted), slots of the journal that are
damaged are written again from the database, a journal that is gone altogether, too, and erasures that were cut off are
finished. Only what is new is read; everything only for a rebuild. `resolve` then ends what was cut off, and never by
guessing: without a cryptogram nothing can have been charged, so it is void; where the host may have been asked and
nothing was accepted, or an inserted card's last word is missing, it is reversed; what was sold but perhaps never shown
is for a person to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import UUID

from terminal.ledger.archive import Archive
from terminal.ledger.errors import DiskTrouble, LedgerCorrupt, LedgerError
from terminal.ledger.journal import START, Copies, Journal, Position, Record, storage_errors, sync_directory
from terminal.ledger.salvage import Salvage
from terminal.ledger.sealing import Envelopes
from terminal.ledger.store import Store
from terminal.ledger.values import Decision, ReversalReason, Transaction

if TYPE_CHECKING:
    from terminal.ledger.ledger import Ledger

_ASIDE_MAX: Final = 100  # more damaged databases than that are a dying card: somebody should look
_AT_ONCE: Final = 2_000  # records of a rebuild in one transaction: it may be cut off, and goes on from there


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What opening the ledger did.

    `redone` counts the records applied, `restored` names those that were damaged in the journal and written again;
    `position` is the last one's number.
    """

    made: bool
    rebuilt: bool
    moved_aside: Path | None
    redone: int
    erased: int
    restored: tuple[int, ...]
    position: int


@dataclass(frozen=True, slots=True)
class Resolution:
    """What `resolve` ended, and what waits for a person's word: keep or void."""

    voided: tuple[UUID, ...]
    reversed: tuple[UUID, ...]
    unshown: tuple[Transaction, ...]


class SecondCopy:
    """Where the journal finds a record that its own slot has lost: the database, or what can still be read of it."""

    def __init__(self) -> None:
        self._sources: list[Copies] = []

    def use(self, source: Copies) -> None:
        self._sources.append(source)

    def __call__(self, sequence: int) -> tuple[bytes, bytes | None] | None:
        for source in self._sources:
            with suppress(LedgerError):
                if (found := source(sequence)) is not None:
                    return found
        return None


def recover(
    journal: Journal,
    archive: Archive,
    path: Path,
    make_store: Callable[[], Store],
    second: SecondCopy,
    *,
    log_size_bytes: int,
) -> tuple[Store, RecoveryReport]:
    """Bring the database at `path` up to the journal's end. Raises `KeyUnavailable` before anything is written."""
    began = journal.identify()
    existed = path.exists()
    if began:
        _mend_end(journal, archive)
    if not began and not existed:
        if archive.last is not None:
            raise LedgerCorrupt(
                "journal and ledger.db are both missing though there is an archive: no sale is taken; restore a backup"
            )
        journal.begin()
    bring_up = partial(
        _bring_up,
        journal,
        archive,
        path,
        make_store,
        second,
        log_size_bytes=log_size_bytes,
        began=began,
    )
    try:
        return bring_up(aside=None)
    except LedgerCorrupt as error:
        if error.sequence is not None or not (began and existed):
            raise  # it is the journal that is damaged
        aside = move_aside(path)
    # What is whole in the damaged database still mends the journal while the new one is built from that.
    with ExitStack() as opened:
        second.use(opened.enter_context(Salvage(aside)).record)
        return bring_up(aside=aside)


def _bring_up(
    journal: Journal,
    archive: Archive,
    path: Path,
    make_store: Callable[[], Store],
    second: SecondCopy,
    *,
    log_size_bytes: int,
    began: bool,
    aside: Path | None,
) -> tuple[Store, RecoveryReport]:
    existed = path.exists()
    with storage_errors():
        path.touch(mode=0o600)
        sync_directory(path.parent)
    store = make_store()
    try:
        position = store.open()
        if position is None:
            store.create(journal.epoch)
            position = START
        second.use(store.copy)
        if not began and existed:
            _refill(journal, archive, position)
        archived = archive.last or START
        journal.reclaim(archived.sequence)  # those may be half overwritten
        redone = _redo(store, journal, archive, position)
        lost = store.lost_envelope()
        if lost is not None and position != START:
            raise LedgerCorrupt("ledger.db has lost an envelope that the host still waits for: the journal may have it")
        if lost is not None:
            raise LedgerCorrupt.at_record(lost, "has lost the envelope that the host still waits for")
        store.at_risk()  # reads every cell that the limits depend on: if one is damaged, now is the time
        erasable = store.erasable()
        for sequence in erasable:
            journal.erase(sequence)
        if archived.sequence:
            archive.erase_payloads([sequence for sequence in erasable if sequence <= archived.sequence])
        journal.clear_beyond()
        journal.flush()
        store.apply((), erasable)
        store.offer_again()
        store.size_log(log_size_bytes)
    except BaseException:
        with suppress(LedgerError):
            store.close()
        raise
    report = RecoveryReport(
        made=not (began or existed),
        rebuilt=(began or archived != START) and position == START,
        moved_aside=aside,
        redone=redone,
        erased=len(erasable),
        restored=tuple(journal.restored),
        position=journal.last.sequence,
    )
    return store, report


def _mend_end(journal: Journal, archive: Archive) -> None:
    """The newest segment tells where the archive ends. Where that cannot be read, the ring still has its records."""
    try:
        archive.last  # noqa: B018 (whether it can be read is the question)
    except LedgerCorrupt:
        newest = archive.segments()[-1]
        with suppress(LedgerCorrupt):
            found = islice(journal.replay(journal.before(newest.first), thorough=True), newest.last - newest.first + 1)
            archive.restore(newest, list(found))


def _refill(journal: Journal, archive: Archive, position: Position) -> None:
    """The journal is blank, the database is not: what only the journal held besides it is written there again."""
    archived = archive.last or START
    for sequence in range(max(archived.sequence, position.sequence - journal.capacity) + 1, position.sequence + 1):
        journal.mend(sequence)
    journal.flush()
    if not journal.identify():
        raise LedgerCorrupt(
            "the journal is blank and ledger.db holds no copy of it: no sale is taken; restore a backup"
        )


def _redo(store: Store, journal: Journal, archive: Archive, position: Position) -> int:
    """Apply what the database misses, from the archive as far as it goes, then from the journal; how many records."""
    archived = archive.last or START
    behind = position.sequence < archived.sequence
    older: Iterator[Record] = archive.replay(position) if behind else iter(())
    newer = journal.replay(archived if behind else position, thorough=behind or position == START)
    missing, count = chain(older, newer), 0
    while done := store.apply(islice(missing, _AT_ONCE)):
        count += done
    return count


def move_aside(path: Path) -> Path:
    """Rename a damaged database and its log, so that a person can still look at them."""
    for number in range(1, _ASIDE_MAX + 1):
        aside = path.with_name(f"{path.name}.damaged-{number}")
        if not aside.exists():
            break
    else:
        raise DiskTrouble(
            f"ledger.db was found damaged {_ASIDE_MAX} times: no sale is lost, the journal holds them; "
            "replace the SD card"
        )
    with storage_errors():
        log = path.with_name(path.name + "-wal")
        if log.exists():
            log.rename(aside.with_name(aside.name + "-wal"))
        path.rename(aside)
        sync_directory(path.parent)
    return aside


def resolve(ledger: Ledger, envelopes: Envelopes) -> Resolution:
    """End what was cut off. Only at the start, before the first sale: a running one would look cut off, too."""
    opened, authorising = ledger.opened(), [*ledger.authorising(), *ledger.completing()]
    for transaction in opened:
        ledger.commit_outcome(transaction.id, decision=Decision.VOID, reason="recovered")
    for transaction in authorising:
        reversal = partial(_reversal, envelopes, transaction)
        ledger.commit_reversal(transaction.id, ReversalReason.RECOVERED, reversal)
    return Resolution(
        voided=tuple(transaction.id for transaction in opened),
        reversed=tuple(transaction.id for transaction in authorising),
        unshown=tuple(ledger.unshown()),
    )


def _reversal(envelopes: Envelopes, transaction: Transaction, number: int) -> str:
    return envelopes.reversal(transaction, number=number, reason=ReversalReason.RECOVERED)

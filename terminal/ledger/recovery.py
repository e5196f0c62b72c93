"""What happens between a power cut and the next sale.

Two steps. `recover` makes ledger.db say what the journal says: records that it misses are applied, a database that is
missing or damaged is built anew (the damaged one is moved aside, never deleted), and erasures that were cut off are
finished. Only what is new is read; the whole journal only for a rebuild. `resolve` then ends what was cut off, and
never by guessing: without a cryptogram nothing can have been charged, so it is void; where the host may have been asked
and nothing was accepted, or an inserted card's last word is missing, it is reversed; what was sold but perhaps never
shown is for a person to decide.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import UUID

from terminal.ledger.errors import DiskTrouble, LedgerCorrupt, LedgerError
from terminal.ledger.journal import START, Journal, storage_errors, sync_directory
from terminal.ledger.sealing import Envelopes
from terminal.ledger.store import Store
from terminal.ledger.values import Decision, ReversalReason, Transaction

if TYPE_CHECKING:
    from terminal.ledger.ledger import Ledger

_ASIDE_MAX: Final = 100  # more damaged databases than that are a dying card: somebody should look


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What opening the ledger did. `redone` counts the records applied; `position` is the last one's number."""

    made: bool
    rebuilt: bool
    moved_aside: Path | None
    redone: int
    erased: int
    position: int


@dataclass(frozen=True, slots=True)
class Resolution:
    """What `resolve` ended, and what waits for a person's word: keep or void."""

    voided: tuple[UUID, ...]
    reversed: tuple[UUID, ...]
    unshown: tuple[Transaction, ...]


def recover(
    journal: Journal, path: Path, make_store: Callable[[], Store], *, log_size_bytes: int
) -> tuple[Store, RecoveryReport]:
    """Bring the database at `path` up to the journal's end. Raises `KeyUnavailable` before anything is written."""
    began = journal.identify()
    existed = path.exists()
    if not began:
        if existed:
            raise LedgerCorrupt(
                "the journal is missing or blank though ledger.db is there: no sale is taken, since records may be "
                "lost; restore the journal, or keep the state directory and start a new epoch"
            )
        journal.begin()
    try:
        return _bring_up(journal, path, make_store, log_size_bytes, began=began, aside=None)
    except LedgerCorrupt as error:
        if error.sequence is not None or not existed:
            raise  # it is the journal that is damaged
        aside = move_aside(path)
    return _bring_up(journal, path, make_store, log_size_bytes, began=began, aside=aside)


def _bring_up(
    journal: Journal,
    path: Path,
    make_store: Callable[[], Store],
    log_size_bytes: int,
    *,
    began: bool,
    aside: Path | None,
) -> tuple[Store, RecoveryReport]:
    with storage_errors():
        path.touch(mode=0o600)
        sync_directory(path.parent)
    store = make_store()
    try:
        position = store.open()
        if position is None:
            store.create(journal.epoch)
            position = START
        rebuilding = position == START
        redone = store.apply(journal.replay(position, thorough=rebuilding))
        lost = store.lost_envelope()
        if lost is not None:
            raise LedgerCorrupt.at_record(lost, "has lost the envelope that the host still waits for")
        store.at_risk()  # reads every cell that the limits depend on: if one is damaged, now is the time
        erasable = store.erasable()
        for sequence in erasable:
            journal.erase(sequence)
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
        made=not began,
        rebuilt=began and rebuilding,
        moved_aside=aside,
        redone=redone,
        erased=len(erasable),
        position=journal.last.sequence,
    )
    return store, report


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

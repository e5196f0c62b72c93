"""What the ledger needs done while nobody waits, one bounded piece at a time.

A ring must be emptied at its tail: records that are delivered and erased move into the archive, then their slots may be
used again. Delivered sales are forgotten in time, first their cards, then they themselves; what is not delivered never
is. Cells under a retired key move to the current one, free space is put by for the next sales, the journal is read
through once a day so that damage is found while its other copy is whole, and the host is given checkpoints to sign.

Every piece is safe to be cut off anywhere and takes the ledger's lock for a moment only: a sale may come at any time.
What may be forgotten is told by the wall clock, so nothing is while that clock is not synchronised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

from terminal.clock import Clock, Entropy
from terminal.ledger.inspection import Inspection
from terminal.ledger.journal import Position, Record, storage_errors
from terminal.ledger.parts import Parts
from terminal.ledger.sealing import Envelopes
from terminal.ledger.values import Total, Transaction

_ARCHIVE_AT_ONCE_MAX: Final = 2_048  # records: half a second of work on a small Pi, and 32 MiB of slots
_ARCHIVE_SHARE: Final = 8  # of the ring: it is never more than so little full of what could have been moved
_READ_AT_ONCE: Final = 64  # records under one holding of the lock
_PRUNE_AT_ONCE: Final = 50
_RESEAL_AT_ONCE: Final = 100
_SPARE_PAGES: Final = 1_024  # 4 MiB: some three hundred sales
_SPARE_PAGES_LOW: Final = 256
_DAY_MS: Final = 86_400_000
_LOOK_EVERY_MS: Final = 10_000  # whether there is something to do; what there is goes on without a pause
_SOME_RECORDS: Final = 500  # after which a start is worth a checkpoint


@dataclass(frozen=True, slots=True)
class Retention:
    """How long what is delivered is kept."""

    sales_days: int = 120
    card_days: int = 60
    audit_months: int = 12


class Upkeep:
    """Made by the ledger. `step` may be called from a thread of its own."""

    def __init__(
        self,
        parts: Parts,
        inspection: Inspection,
        *,
        retention: Retention,
        keys: Sequence[str],
        clock: Clock,
        entropy: Entropy,
        commit_checkpoint: Callable[[UUID, Callable[[int], str]], None],
    ) -> None:
        self._parts = parts
        self._inspection = inspection
        self._retention = retention
        self._keys = keys
        self._clock = clock
        self._entropy = entropy
        self._commit_checkpoint = commit_checkpoint
        self._due_ms: dict[str, int] = {}
        self._scrubbed: Position | None = None
        self._read_through = False
        self._checkpoint_ms: int | None = None  # when one was last made, or found fresh enough, in this run
        self.damage: str | None = None
        """What the last reading through the journal found that no copy could mend."""

    def step(self, envelopes: Envelopes | None = None) -> bool:
        """One piece of work. False when nothing is due now. Raises `LedgerError`.

        `envelopes` signs checkpoints; without it none is made.
        """
        pieces: dict[str, tuple[int, Callable[[], bool]]] = {
            "space": (_LOOK_EVERY_MS, self._put_space_by),
            "archive": (_LOOK_EVERY_MS, self._archive_some),
            "forget": (_LOOK_EVERY_MS, self._forget_some),
            "reseal": (_LOOK_EVERY_MS, self._reseal_some),
            "drop": (_DAY_MS, self._drop_old_segments),
            "scrub": (_DAY_MS, self._scrub_some),
            "second": (_LOOK_EVERY_MS, self._catch_up),
        }
        if envelopes is not None:
            pieces["checkpoint"] = (_LOOK_EVERY_MS, lambda: self._checkpoint(envelopes))
        now_ms = self._clock.monotonic_ms()
        for name, (every_ms, piece) in pieces.items():
            if now_ms < self._due_ms.get(name, now_ms):
                continue
            if piece():
                return True
            self._due_ms[name] = now_ms + every_ms
        return False

    # Pieces

    def _put_space_by(self) -> bool:
        with self._parts.held():
            if self._parts.store.spare_pages() >= _SPARE_PAGES_LOW:
                return False
            self._parts.store.reserve(_SPARE_PAGES)
            return True

    def _archive_some(self) -> bool:
        """Move the oldest records that nothing waits for; afterwards the ring has room for as many new ones."""
        parts = self._parts
        with parts.held():
            parts.commit()
            archived = parts.archived
            through = min(parts.store.reclaimable(), parts.journal.last.sequence)
            batch = max(1, min(_ARCHIVE_AT_ONCE_MAX, parts.journal.capacity // _ARCHIVE_SHARE))
            if through - archived.sequence < batch:
                return False
        records: list[Record] = []
        while len(records) < batch:
            position = records[-1].position if records else archived
            with parts.held():
                records += parts.journal.read(position, min(_READ_AT_ONCE, batch - len(records)))
        for month in by_month(records, batch):
            parts.archive.append(month)
        with parts.held():
            parts.reclaim()
        return True

    def _forget_some(self) -> bool:
        """Cards, then sales, that are delivered and past their time."""
        if not self._clock.synchronised():
            return False
        now_ms, parts = self._clock.wall_ms(), self._parts
        with parts.held():
            parts.commit()
            old = parts.store.with_card_before(now_ms - self._retention.card_days * _DAY_MS, _PRUNE_AT_ONCE)
            if old:
                self._erase_cards(old)
                return True
            pruned = parts.store.prune(now_ms - self._retention.sales_days * _DAY_MS, _PRUNE_AT_ONCE)
            dropped = parts.store.drop_records(parts.archived.sequence, _PRUNE_AT_ONCE * 8) if not pruned else 0
        return bool(pruned or dropped)

    def _reseal_some(self) -> bool:
        if not self._parts.has_retired_keys:
            return False
        with self._parts.held():
            self._parts.commit()
            self._parts.has_retired_keys = self._parts.store.reseal(_RESEAL_AT_ONCE) > 0
        return self._parts.has_retired_keys

    def _checkpoint(self, envelopes: Envelopes) -> bool:
        """Once a day, or at a start after some records: where the journal stands, for the host to countersign."""
        parts, now_ms = self._parts, self._clock.monotonic_ms()
        with parts.held():
            parts.commit()
            at, last = parts.journal.last, parts.store.last_checkpoint()
            epoch_of = parts.store.epoch_of()
            began = 0 if epoch_of is None else epoch_of["sequence"]  # the host learns of a new epoch by its first one
            fresh = last is not None and last > began and at.sequence - last < _SOME_RECORDS
            since_ms = None if self._checkpoint_ms is None else now_ms - self._checkpoint_ms
            if fresh if since_ms is None else since_ms < _DAY_MS:
                self._checkpoint_ms = now_ms if since_ms is None else self._checkpoint_ms
                return False
            self._checkpoint_ms = now_ms
            id_ = UUID(bytes=self._entropy(16), version=4)
            self._commit_checkpoint(
                id_,
                lambda number: envelopes.checkpoint(
                    id_,
                    number=number,
                    sequence=at.sequence,
                    mac=at.mac,
                    totals=_sold(parts.store.totals()),
                    unsent=((each.currency.code, each.count, each.sum_minor) for each in parts.store.unsent()),
                    archived=parts.archive.last,
                    keys=self._keys,
                    taken_at_ms=self._clock.wall_ms(),
                    clock_synchronised=self._clock.synchronised(),
                    epoch_of=epoch_of,
                ),
            )
        return True

    def _drop_old_segments(self) -> bool:
        if not self._clock.synchronised():
            return False
        month = timedelta(days=31)  # a day too long rather than one too short
        before = datetime.fromtimestamp(self._clock.wall_ms() / 1000, UTC) - month * self._retention.audit_months
        self._parts.archive.drop_before(int(before.timestamp() * 1000))
        return False

    def _scrub_some(self) -> bool:
        """Read on through the journal; damage is mended from the other copy while that is whole."""
        step = self._inspection.verify_some(self._scrubbed)
        self.damage = step.first_bad
        self._scrubbed = None if step.done or step.first_bad else step.position
        self._read_through = self._read_through or step.done
        return self._scrubbed is not None

    def _catch_up(self) -> bool:
        """Bring the journal's second copy up to date, once the first has been read through and mended from it."""
        mirror = self._parts.mirror
        if mirror is None or not self._read_through or not mirror.behind_bytes:
            return False
        with self._parts.held(), storage_errors():
            return mirror.resync(1) > 0

    # Privacy

    def of_card(self, card_ref: str) -> list[Transaction]:
        """The transactions of one card, by the host's name for it."""
        with self._parts.held():
            self._parts.commit()
            return self._parts.store.by_card_ref(card_ref)

    def erase_card(self, card_ref: str) -> tuple[int, int]:
        """Forget what names the card; how many transactions do so now, and how many keep it until they are answered."""
        with self._parts.held():
            found = self.of_card(card_ref)
            waiting = self._parts.store.waiting_transactions()
            done = [transaction.id for transaction in found if transaction.id not in waiting]
            if done:
                self._erase_cards(done)
            return len(done), len(found) - len(done)

    def _erase_cards(self, transactions: list[UUID]) -> None:
        self._parts.erase(self._parts.store.reduce(transactions))


def _sold(totals: Iterable[Total]) -> list[tuple[str, int, int]]:
    """Count and sum per currency."""
    sums: dict[str, tuple[int, int]] = {}
    for total in totals:
        count, minor = sums.get(total.currency.code, (0, 0))
        sums[total.currency.code] = (count + total.count, minor + total.sum_minor)
    return [(code, count, minor) for code, (count, minor) in sorted(sums.items())]


def by_month(records: Iterable[Record], at_most: int) -> Iterator[list[Record]]:
    """Runs of records, each of one UTC month as their clocks had it, and at most so many."""
    piece: list[Record] = []
    for record in records:
        if piece and (len(piece) == at_most or _month(piece[0]) != _month(record)):
            yield piece
            piece = []
        piece.append(record)
    if piece:
        yield piece


def _month(record: Record) -> tuple[int, int]:
    moment = datetime.fromtimestamp(record.wall_ms / 1000, UTC)
    return moment.year, moment.month

"""The ledger: what the rest of the terminal sees of journal and database.

Each commit writes the journal and flushes it (the commit point), then brings the database up to date in one
transaction, flushed as well: two copies, two flushes. Only when a method has returned may anybody be told. Every change
goes through the states table first, under one lock, so of two threads that race for a transaction the second is
refused.

After a storage error nobody knows which of the last writes are durable; the ledger then refuses everything until it is
opened again, and recovery reads what is really there.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeAlias
from uuid import UUID

import msgspec

from terminal.clock import Clock, ClockSet, ClockStepped, ClockWatch, Entropy
from terminal.ledger.archive import Archive
from terminal.ledger.days import RANGE_MAX, closing
from terminal.ledger.errors import (
    AnswerRejected,
    DayStaysOpen,
    DiskTrouble,
    IllegalTransition,
    JournalFull,
    KeyUnavailable,
    LedgerCorrupt,
    LedgerError,
    LedgerLocked,
    NoRoom,
    NoSuchTransaction,
    NotRefundable,
    ReferenceTaken,
)
from terminal.ledger.inspection import Inspection
from terminal.ledger.journal import (
    UNFLUSHED_MAX,
    FileMedium,
    Journal,
    Medium,
    RecordType,
    storage_errors,
    sync_directory,
)
from terminal.ledger.keys import TerminalKeys, key_id
from terminal.ledger.medium import MirrorMedium
from terminal.ledger.parts import Parts
from terminal.ledger.recovery import RecoveryReport, SecondCopy, move_aside, recover
from terminal.ledger.sealing import digest
from terminal.ledger.states import AT_RISK, SOLD, State, advance
from terminal.ledger.store import Store, facts_of, outbox_key
from terminal.ledger.upkeep import Retention, Upkeep
from terminal.ledger.values import (
    OF_NO_SALE,
    Answer,
    Batch,
    CardSummary,
    Decision,
    Event,
    Exposure,
    HostStatus,
    Kind,
    OpenDay,
    OutboxItem,
    ReversalReason,
    Standing,
    Total,
    Transaction,
    Unsent,
    Verdict,
    ended_by,
)
from terminal.money import Amount, Currency

JOURNAL_NAME: Final = "journal"
DATABASE_NAME: Final = "ledger.db"
ARCHIVE_NAME: Final = "archive"

ANSWERS_MAX: Final = UNFLUSHED_MAX  # in one commit: as many records as the journal takes between two flushes
REFERENCE_CHARS_MAX: Final = 64  # it must fit into a record's body whatever its letters
REASON_CHARS_MAX: Final = 64

# Room that a new sale must leave, so that everything already begun can still be finished and told.
_SLOTS_OF_A_SALE: Final = 9  # OPEN CARD OUTCOME SHOWN ANSWER, deferred OUTCOME, REVERSAL ANSWER SHOWN
_SLOTS_OF_AN_ENVELOPE: Final = 4  # ANSWER REVERSAL ANSWER SHOWN
_SLOTS_OF_EVENTS: Final = 64  # starts, stops and link reports until somebody has come
_SPARE_PAGES_OF_A_SALE: Final = 16  # of the database: a sale to its end takes eight to twelve

_PAGE: Final = 100
_RECENT: Final = 64  # sales among which the latest time is looked for: a clock that was wrong longer was noticed
_NOTES_MAX: Final = 12  # of one kind within the time below: a flapping link must not fill the journal in days
_NOTE_CHARS_MAX: Final = 300  # of one detail, so that a note fits into its record whatever somebody else's message says
_NOTES_PER_MS: Final = 3_600_000
_HEAD_EVERY_MS: Final = 600_000  # of sync's journal: what was put back loses more than ten minutes

_WAITING: Final = frozenset({State.AUTHORISING, State.ACCEPTED, State.REVERSING})
"""An envelope waits for the host's answer."""

OpenMedium: TypeAlias = Callable[[Path, int], Medium]
MakeEnvelope: TypeAlias = Callable[[int], str]
MakeBatch: TypeAlias = Callable[[Batch, int], str]
MakeRefund: TypeAlias = Callable[[Transaction, int], str]
Delivered: TypeAlias = tuple[UUID, Event, Answer, str]
"""Whose answer it is, to which event, what it says, and the host's signed text."""


@dataclass(frozen=True, slots=True)
class LedgerSettings:
    """Where and how large. The journal's size and the epoch count when a ledger is made."""

    journal_size_bytes: int = 256 * 1024 * 1024  # 16,384 slots: about 3,200 sales of five records wait for the host
    wal_size_bytes: int = 4 * 1024 * 1024  # some forty sales between two checkpoints
    epoch: int = 1
    journal: Path | None = None  # a file or partition of its own; otherwise in the ledger's directory
    second_journal: Path | None = None
    retention: Retention = field(default_factory=Retention)
    may_begin: bool = True  # where there is no ledger; false, and a disk that is not mounted is no new terminal


@dataclass(frozen=True, slots=True)
class Head:
    """A place in a journal's chain, as one service tells it to the other; `mac` in hex."""

    epoch: int
    sequence: int
    mac: str


class Ledger:
    """One terminal's ledger. Thread-safe. Made by `open` only."""

    def __init__(
        self,
        *,
        directory: Path,
        parts: Parts,
        report: RecoveryReport,
        second: _Second,
        keys: TerminalKeys,
        settings: LedgerSettings,
        clock: Clock,
        entropy: Entropy,
    ) -> None:
        self._directory = directory
        self._released = False
        self._release = ExitStack()  # what `open` took: database, journal, lock
        self._parts = parts
        self._clock = clock
        self._entropy = entropy
        self._latest_wall_ms: int | None = None
        self._noted: dict[str, list[int]] = {}
        self._left_out: dict[str, int] = {}
        self._watch = ClockWatch(clock)
        self._files = _Files(directory)
        self._ran_ms = parts.store.running().until(clock) - clock.monotonic_ms()
        self._at_risk = {transaction.id: transaction for transaction in parts.store.at_risk()}
        self._running = {each.id for each in self._at_risk.values() if each.state is not State.ACCEPTED}
        # Kept here, for the idle screen asks every second: reading thousands of encrypted rows as often would be felt.
        self._waiting = {each.id: each for each in parts.store.in_states(_WAITING)}
        self._next_number = parts.store.last_number() + 1
        self._next_envelope = parts.store.last_envelope_number() + 1
        self._second = second
        self._sync_head_ms: int | None = None
        self._host_status = parts.store.host_status()
        self.epoch: Final = parts.journal.epoch
        self.recovery: Final = report
        self.inspection: Final = Inspection(
            parts,
            directory=directory,
            journal=settings.journal or directory / JOURNAL_NAME,
            keys=keys,
            clock=clock,
            entropy=entropy,
        )
        self.upkeep: Final = Upkeep(
            parts,
            self.inspection,
            retention=settings.retention,
            keys=[keys.data.current.id.hex(), keys.chain.id.hex(), key_id(keys.host_sealing)],
            clock=clock,
            entropy=entropy,
            commit_checkpoint=self._commit_checkpoint,
        )

    @classmethod
    def open(
        cls,
        directory: Path,
        keys: TerminalKeys,
        *,
        clock: Clock,
        entropy: Entropy,
        settings: LedgerSettings | None = None,
        medium: OpenMedium = FileMedium.create,
    ) -> Ledger:
        """Open, or make, the ledger in `directory`, and recover it.

        Raises `LedgerLocked`, `KeyUnavailable`, `LedgerCorrupt`, `LedgerTooNew`, `DiskTrouble`.
        """
        settings = settings or LedgerSettings()
        path = directory / DATABASE_NAME
        mirror: MirrorMedium | None = None
        second_state = _Second()
        with ExitStack() as opened:
            if not settings.may_begin and not (path.exists() or (directory / JOURNAL_NAME).exists()):
                raise DiskTrouble(
                    f"there is no ledger in {directory}, and none is to be begun: nothing was charged; mount the "
                    "storage that holds it, or set `begin = true` in [ledger] for a terminal that is really new"
                )
            opened.enter_context(locked(directory))
            with storage_errors():
                tape = medium(settings.journal or directory / JOURNAL_NAME, settings.journal_size_bytes)
            if settings.second_journal is not None:
                tape = mirror = MirrorMedium(tape, settings.second_journal, second_state.changed)
            opened.callback(tape.close)
            second = SecondCopy()
            journal = Journal(
                tape,
                data=keys.data,
                chain=keys.chain,
                epoch=settings.epoch,
                clock=clock,
                entropy=entropy,
                copies=second,
            )
            archive = Archive(directory / ARCHIVE_NAME, keys.data, keys.chain, entropy)
            store, report = recover(
                journal,
                archive,
                path,
                lambda: Store(path, keys.data, keys.chain, entropy),
                second,
                log_size_bytes=settings.wal_size_bytes,
            )
            opened.callback(store.close)
            parts = Parts(journal, store, archive, mirror)
            parts.has_retired_keys = bool(keys.data.retired)
            parts.reclaim()
            ledger = cls(
                directory=directory,
                parts=parts,
                report=report,
                second=second_state,
                keys=keys,
                settings=settings,
                clock=clock,
                entropy=entropy,
            )
            ledger._release = opened.pop_all()
            return ledger

    def close(self) -> None:
        """Make everything durable and let go. A database found damaged is moved aside, the next start rebuilds it."""
        if self._released:
            return
        self._released = True
        try:
            self._parts.shut()
        finally:
            with self._release:
                self._parts.store.close()
                broken = self._parts.broken
                if isinstance(broken, LedgerCorrupt) and broken.sequence is None:
                    move_aside(self._directory / DATABASE_NAME)

    # Changes

    def begin(self, amount: Amount, reference: str | None) -> Transaction:
        """Open a sale and reserve its amount. Not durable by itself: nothing has been promised yet.

        A reference that came before with the same amount returns that sale, in whatever state it is. Raises
        `ReferenceTaken`, `JournalFull`.
        """
        with self._parts.held():
            earlier = self._earlier(Kind.SALE, amount, reference, None)
            return earlier or self._open(Kind.SALE, amount, reference, None)

    def commit_outcome(
        self,
        transaction: UUID,
        *,
        decision: Decision,
        reason: str,
        card: CardSummary | None = None,
        envelope: MakeEnvelope | None = None,
    ) -> Transaction:
        """The end of an attempt, durable on return: two flushes.

        `online` and `accepted` bring the card and an envelope, made for the number that it is called with; `accepted`
        after `online` brings none, the one under way stands. `completed` may bring an advice of what the card said
        last. Raises `IllegalTransition`, `NoSuchTransaction`, `DiskTrouble`.
        """
        if len(reason) > REASON_CHARS_MAX:
            raise ValueError(f"a reason has at most {REASON_CHARS_MAX} characters")
        with self._parts.held():
            before = self._find(transaction)
            advance(before.state, decision.change)
            sends = before.state is State.OPENED and decision in {Decision.ONLINE, Decision.ACCEPTED}
            advises = decision is Decision.COMPLETED and envelope is not None
            if (sends or advises) != (envelope is not None) or (sends and card is None):
                raise ValueError(
                    "an envelope and a card come with the first outcome online or accepted, and only there"
                )
            card = card or before.card
            # Every body is complete in itself.
            body = facts_of(before) | {
                "decision": decision.value,
                "reason": reason,
                "scheme": None if card is None else card.scheme,
                "contact": card is not None and card.contact,
                "envelope": None,
            }
            if envelope is not None:
                # CARD first: an OUTCOME that continues the chain then never lacks its envelope.
                body["envelope"] = self._append_card(transaction, decision.event, envelope)
            # What names the card is the payload: it can be erased, the record and its place in the chain stay.
            self._parts.append(RecordType.OUTCOME, body, b"" if card is None else msgspec.json.encode(asdict(card)))
            self._parts.commit()
            return self._settle(transaction)

    def commit_refund(self, sale: UUID, amount: Amount, reference: str | None, envelope: MakeRefund) -> Transaction:
        """Pay back a sale, or a part of it; durable on return and queued for the host, after the sale itself.

        `envelope` is called with the refund and the number to make it for. A reference that came before for the same
        returns that refund. Raises `NotRefundable`, `NoSuchTransaction`, `ReferenceTaken`, `JournalFull`,
        `DiskTrouble`.
        """
        with self._parts.held():
            earlier = self._earlier(Kind.REFUND, amount, reference, sale)
            if earlier is not None:
                return earlier
            sold = self._find(sale)
            self._check_refund(sold, amount)
            refund = self._open(Kind.REFUND, amount, reference, sale)
            sent = self._append_card(refund.id, Event.REFUND, lambda number: envelope(refund, number))
            body = facts_of(refund) | {
                "decision": Decision.ONLINE.value,
                "reason": "refund",
                "scheme": sold.scheme,
                "contact": False,
                "envelope": sent,
            }
            self._parts.append(RecordType.OUTCOME, body)
            self._parts.commit()
            return self._settle(refund.id)

    def commit_answer(self, transaction: UUID, event: Event, answer: Answer, jws: str) -> Transaction:
        """The host's verified answer on a sale, durable on return; card data is erased. A repetition changes nothing.

        Raises `IllegalTransition`, `NoSuchTransaction`, `AnswerRejected` (for another envelope), `DiskTrouble`.
        """
        (outcome,) = self.commit_answers([(transaction, event, answer, jws)])
        if isinstance(outcome, LedgerError):
            raise outcome
        assert isinstance(outcome, Transaction), "an answer that is about no sale has no sale to give"  # noqa: S101
        return outcome

    def commit_answers(self, answers: Sequence[Delivered]) -> list[Transaction | Verdict | LedgerError]:
        """Verified answers, at most `ANSWERS_MAX`, durable on return, all with the two flushes of one commit.

        For each: the sale as it then is, the verdict if it is about no sale, or why it was not taken, as
        `commit_answer` would raise it; the others are not concerned. Raises `DiskTrouble`, `LedgerCorrupt`: then nobody
        knows which of them are durable, and each may be delivered again.
        """
        if len(answers) > ANSWERS_MAX:
            raise ValueError(f"a group has at most {ANSWERS_MAX} answers")
        outcomes: list[Verdict | LedgerError | None] = []
        group = _Group()
        with self._parts.held():
            self._parts.make_window(len(answers))
            for transaction, event, answer, jws in answers:
                try:
                    outcomes.append(self._append_answer(group, transaction, event, answer, jws))
                except (IllegalTransition, NoSuchTransaction, AnswerRejected, JournalFull) as error:
                    outcomes.append(error)
            if group.appended:
                self._parts.commit()
                self._parts.overwrite(self._parts.store.erasable())
            after = {transaction: self._settle(transaction) for transaction in group.states}
        return [
            (after.get(transaction) or self.transaction(transaction)) if outcome is None else outcome
            for outcome, (transaction, *_) in zip(outcomes, answers, strict=True)
        ]

    def commit_reversal(
        self,
        transaction: UUID,
        reason: ReversalReason,
        envelope: MakeEnvelope,
        advice: MakeEnvelope | None = None,
    ) -> Transaction:
        """Take a sale back, durable on return and queued for the host; with an advice, if the card has said why.

        `timeout` and `recovered` fit only while no answer has come; `void` also takes back what was sold, as long as
        nothing of it was paid back. A refund is never taken back: it is sent until it is answered. Raises
        `IllegalTransition`, `NotRefundable`, `NoSuchTransaction`, `DiskTrouble`.
        """
        with self._parts.held():
            before = self._find(transaction)
            if before.kind is not Kind.SALE:
                raise NotRefundable("refund", "a refund cannot be taken back: nothing was changed; charge it anew")
            advance(before.state, reason.change)
            if reason is ReversalReason.VOID and self._refunded_minor(transaction):
                raise NotRefundable(
                    "refunded",
                    "something of this sale was paid back already: nothing was changed; refund what is left of it",
                )
            body: dict[str, Any] = {"transaction": str(transaction), "reason": reason.value}
            if advice is not None:
                body["advice"] = self._append_card(transaction, Event.ADVICE, advice)
            jws, sent = self._numbered(envelope)
            self._parts.append(RecordType.REVERSAL, body | sent, jws.encode("ascii"))
            self._parts.commit()
            return self._settle(transaction)

    def end_day(self, envelope: MakeBatch) -> Batch:
        """Close the day: one batch of everything since the last one, durable on return and queued for the host.

        `envelope` is called with the batch and the number to make it for. Raises `DayStaysOpen`, `DiskTrouble`.
        """
        with self._parts.held():
            self._parts.commit()
            day = self._parts.store.open_day()
            if self._running or self._parts.opened or self._parts.store.in_states([State.COMPLETING]):
                raise DayStaysOpen("a sale is being taken: finish or cancel it, then end the day; nothing was changed")
            if day.last < day.first:
                raise DayStaysOpen("nothing was sold or tried since the last day's end: there is nothing to end")
            first = max(day.first, self.first_number())
            batch = Batch(
                id=UUID(bytes=self._entropy(16), version=4),
                no=day.no,
                first=max(first, day.last - RANGE_MAX + 1),
                last=day.last,
                sold=day.sold,
                corrected=day.corrected,
                taken_at_ms=self._clock.wall_ms(),
                decision=None,
                host=None,
                missing=(),
            )
            jws, sent = self._numbered(lambda number: envelope(batch, number))
            self._parts.append(RecordType.CHECKPOINT, closing(batch) | sent, jws.encode("ascii"))
            self._parts.commit()
            return batch

    def mark_shown(self, transaction: UUID, screen: str) -> None:
        """The customer was shown a result. Durable with the next commit or `flush`: showing it twice harms nobody."""
        with self._parts.held():
            if self._find(transaction).shown == screen:
                return
            self._parts.append_unflushed(RecordType.SHOWN, {"transaction": str(transaction), "screen": screen})
            self._parts.shown[transaction] = screen

    def note(self, what: str, **details: str | int | bool | None) -> bool:
        """Write something into the audit trail; durable with the next commit or `flush`. No card data, no keys.

        False when the journal's remaining room is kept for money: audit must not cost a sale its answer. A link or a
        reader that flaps is written down now and then, with the number of times that were left out.
        """
        with self._parts.held():
            if self._parts.journal.free_slots <= self._slots_kept():
                return False
            now_ms = self._clock.monotonic_ms()
            written = [at_ms for at_ms in self._noted.get(what, ()) if now_ms - at_ms < _NOTES_PER_MS]
            if len(written) >= _NOTES_MAX:
                self._left_out[what] = self._left_out.get(what, 0) + 1
                return False
            self._noted[what] = [*written, now_ms]
            if left_out := self._left_out.pop(what, 0):
                details["left_out"] = left_out
            for name, value in details.items():
                if isinstance(value, str):
                    details[name] = value[:_NOTE_CHARS_MAX]
            self._parts.append_unflushed(RecordType.EVENT, {"what": what, "details": details})
            return True

    def head(self) -> Head:
        """The last record that is durable."""
        with self._parts.held():
            at = self._parts.committed
            return Head(self.epoch, at.sequence, at.mac.hex())

    def holds(self, head: Head) -> bool:
        """Whether this record is in the chain, or so old that nobody can tell."""
        with self._parts.held():
            if head.sequence > self._parts.journal.last.sequence:
                return False
            copy = self._parts.store.copy(head.sequence)
        if copy is not None:
            return copy[0].endswith(bytes.fromhex(head.mac))
        found = self.inspection.records(head.sequence - 1, 1)
        return not found or found[0].sequence != head.sequence or found[0].mac.hex() == head.mac

    def sync_head(self) -> Head | None:
        """The newest head of sync's journal that is written down here."""
        with self._parts.held():
            held = self._parts.store.sync_head()
        return None if held is None else Head(held["epoch"], held["sequence"], held["mac"])

    def note_sync_head(self, head: Head) -> None:
        """Write it down, unless that was done or one was written not long ago."""
        if self._sync_head_ms is not None and self._clock.monotonic_ms() - self._sync_head_ms < _HEAD_EVERY_MS:
            return
        if self.sync_head() != head and self.note("sync_head", **asdict(head)):
            self._sync_head_ms = self._clock.monotonic_ms()

    @property
    def host_status(self) -> HostStatus | None:
        """What the operator's host last said of this terminal; None before it has said anything."""
        return self._host_status

    @property
    def second_trouble(self) -> str | None:
        """Why there is only one copy of the journal though two are configured."""
        return self._second.trouble

    def look_around(self) -> None:
        """For idle time: write down what happened to the clock and to the journal's second copy.

        True times are filled in from the first: an unset clock does not stay in the books.
        """
        while self._second.news:
            self.note("second_journal", trouble=self._second.news.pop(0))
        for happened in self._watch.look():
            match happened:
                case ClockSet(boot_id, offset_ms):
                    self.note("clock_set", boot_id=str(boot_id), offset_ms=offset_ms)
                case ClockStepped(by_ms):
                    self.note("clock_step", by_ms=by_ms)

    def acknowledge(self, transaction: UUID, uid: int) -> bool:
        """Somebody has seen that the host said no: `alerts` names it no more. Durable on return.

        False when there was nothing to acknowledge. Raises `NoSuchTransaction`, `DiskTrouble`.
        """
        with self._parts.held():
            self._find(transaction)
            if transaction not in {each.id for each in self._parts.store.alerts()}:
                return False
            details = {"transaction": str(transaction), "uid": uid}
            self._parts.append(RecordType.EVENT, {"what": "alert_acknowledged", "details": details})
            self._parts.commit()
            return True

    def commit_host_status(self, status: HostStatus) -> None:
        """What the operator's host says of this terminal, if that has changed. Durable on return."""
        with self._parts.held():
            self._parts.append(RecordType.EVENT, {"what": "host_status", "details": asdict(status)})
            self._parts.commit()
            self._host_status = status

    def flush(self) -> None:
        """For idle time: everything so far is durable on return."""
        with self._parts.held():
            self._parts.commit()

    def mark_handed_over(self, keys: Iterable[str]) -> None:
        """Sync has stored these durably: not offered again until the next start.

        Not flushed: whoever gets an item twice knows it by its key, and offering everything unanswered again at each
        start heals a spool that was lost.
        """
        with self._parts.held():
            self._parts.store.mark_handed_over(keys)

    def offer_again(self) -> None:
        """Sync has lost its spool: offer everything unanswered again."""
        with self._parts.held():
            self._parts.store.offer_again()

    # Questions

    def open_day(self) -> OpenDay:
        """What has been sold since the last day's end."""
        with self._parts.held():
            self._parts.commit()
            return self._parts.store.open_day()

    def last_batch(self) -> Batch | None:
        """The last day's end, with the host's word on it if that has come."""
        with self._parts.held():
            return self._parts.store.last_batch()

    def unsent_between(self, first: int, last: int) -> list[tuple[str, int, int]]:
        """Of transactions `first` to `last`, what waits for the host: currency code, count, sum in minor units."""
        sums: dict[str, tuple[int, int]] = {}
        with self._parts.held():
            for each in self._waiting.values():
                if first <= each.number <= last:
                    count, minor = sums.get(each.amount.currency.code, (0, 0))
                    sums[each.amount.currency.code] = count + 1, minor + each.signed_minor
        return [(code, *sums[code]) for code in sorted(sums)]

    def transaction(self, transaction: UUID) -> Transaction:
        """Raises `NoSuchTransaction`."""
        with self._parts.held():
            return self._find(transaction)

    def by_reference(self, reference: str) -> Transaction | None:
        with self._parts.held():
            return self._by_reference(reference)

    def transactions(self, limit: int, before: int | None = None) -> list[Transaction]:
        """Newest first; `before` leaves out that number and all later ones, for the next page."""
        with self._parts.held():
            before = self._next_number if before is None else before
            pending = [transaction for transaction in self._parts.opened.values() if transaction.number < before]
            pending.sort(key=lambda transaction: -transaction.number)
            return [*pending, *map(self._overlaid, self._parts.store.transactions(limit, before))][:limit]

    def authorising(self) -> list[Transaction]:
        """What waits for the host while a customer waits."""
        with self._parts.held():
            return [
                transaction
                for transaction in self._at_risk.values()
                if transaction.state is State.AUTHORISING and transaction.kind is Kind.SALE
            ]

    def completing(self) -> list[Transaction]:
        """Approved by the host, the card's last word missing."""
        with self._parts.held():
            return self._parts.store.in_states([State.COMPLETING])

    def opened(self) -> list[Transaction]:
        with self._parts.held():
            return [transaction for transaction in self._at_risk.values() if transaction.state is State.OPENED]

    def unshown(self) -> list[Transaction]:
        """Sold as far as the ledger knows, but the customer may never have seen it."""
        with self._parts.held():
            return [
                transaction for transaction in self._parts.store.unshown() if transaction.id not in self._parts.shown
            ]

    def alerts(self) -> list[Transaction]:
        """What the host said no to after a customer was told yes, until somebody has acknowledged it."""
        with self._parts.held():
            return self._parts.store.alerts()

    def refunded(self, sale: UUID) -> Amount:
        """How much of a sale was paid back, or is being. Raises `NoSuchTransaction`."""
        with self._parts.held():
            return Amount(self._refunded_minor(sale), self._find(sale).amount.currency)

    def booking_states(self, first: int, last: int, limit: int) -> list[Standing]:
        """Transactions with a number from `first` to `last`, in order, at most `limit`: to be held against the host's.

        What is open, with nothing recorded but that it was begun, is not among them.
        """
        with self._parts.held():
            return self._parts.store.standings(first, last, limit)

    def first_number(self) -> int:
        """Of the oldest transaction of this epoch that is still here: hosts count by epochs."""
        with self._parts.held():
            epoch_of = self._parts.store.epoch_of()
            return self._parts.store.first_number(0 if epoch_of is None else epoch_of["sequence"]) or self._next_number

    def number_at(self, wall_ms: int) -> int:
        """Of the first transaction that was opened then or later; where clocks were wrong, rather an earlier one."""
        before = None
        while page := self.transactions(_PAGE, before):
            for transaction in page:
                if transaction.opened_at_ms < wall_ms:
                    return transaction.number + 1
            before = page[-1].number
        return self.first_number()

    def last_number(self) -> int:
        """Of the newest transaction; 0 before the first."""
        with self._parts.held():
            return self._next_number - 1

    def outbox(self, limit: int) -> list[OutboxItem]:
        """What is to be handed over to sync: urgent first, then in the order of its numbers."""
        with self._parts.held():
            return [self._with_envelope(item, held) for item, held in self._parts.store.outbox(limit)]

    def outbox_item(self, key: str) -> OutboxItem:
        """Raises `NoSuchTransaction`."""
        with self._parts.held():
            found = self._parts.store.outbox_item(key)
            if found is None:
                raise NoSuchTransaction(key)
            return self._with_envelope(*found)

    def unsent(self) -> list[Unsent]:
        """What waits for the host's answer, handed over or not, per currency."""
        with self._parts.held():
            waiting = list(self._waiting.values())
        by_code: dict[str, list[Transaction]] = {}
        for transaction in waiting:
            by_code.setdefault(transaction.amount.currency.code, []).append(transaction)
        return [
            Unsent(
                currency=some[0].amount.currency,
                sum_minor=sum(one.signed_minor for one in some),
                count=len(some),
                oldest_wall_ms=min(one.opened_at_ms for one in some),
            )
            for _, some in sorted(by_code.items())
        ]

    def exposure(self, currency: Currency) -> Exposure:
        """What the merchant stands to lose, open sales included."""
        with self._parts.held():
            some = [
                transaction
                for transaction in self._at_risk.values()
                if transaction.amount.currency == currency and transaction.kind is Kind.SALE
            ]
        return Exposure(
            sum_minor=sum(transaction.amount.minor for transaction in some),
            count=len(some),
            oldest_wall_ms=min((transaction.opened_at_ms for transaction in some), default=None),
            age_ms=max(map(self._age_ms, some), default=0),
        )

    def totals(self) -> list[Total]:
        with self._parts.held():
            return self._parts.store.totals()

    @property
    def latest_wall_ms(self) -> int:
        """The latest moment at which a sale was opened, by whatever the clock said."""
        with self._parts.held():
            if self._latest_wall_ms is None:
                recent = self._parts.store.transactions(_RECENT, sys.maxsize)
                opened = [each.opened_at_ms for each in (*recent, *self._parts.opened.values())]
                self._latest_wall_ms = max(opened, default=0)
            return self._latest_wall_ms

    @property
    def free_slots(self) -> int:
        with self._parts.held():
            return self._parts.journal.free_slots

    # Inside

    def _numbered(self, envelope: MakeEnvelope) -> tuple[str, dict[str, Any]]:
        """An envelope made for the next number, and what its record says of it."""
        number = self._next_envelope
        jws = envelope(number)
        self._next_envelope += 1
        return jws, {"number": number, "sha256": digest(jws)}

    def _append_card(self, transaction: UUID, event: Event, envelope: MakeEnvelope) -> dict[str, Any]:
        """Write an envelope into a slot of its own, which is overwritten once it is answered; its number and digest."""
        jws, sent = self._numbered(envelope)
        named = {"transaction": str(transaction), "event": event.value}
        self._parts.append(RecordType.CARD, named | sent, jws.encode("ascii"))
        return sent

    def _earlier(self, kind: Kind, amount: Amount, reference: str | None, of: UUID | None) -> Transaction | None:
        """What this reference was given to before. Raises `ReferenceTaken` if that was something else."""
        if reference is None:
            return None
        if not 0 < len(reference) <= REFERENCE_CHARS_MAX:
            raise ValueError(f"a reference has 1 to {REFERENCE_CHARS_MAX} characters")
        earlier = self._by_reference(reference)
        if earlier is not None and (earlier.kind, earlier.amount, earlier.of) != (kind, amount, of):
            raise ReferenceTaken
        return earlier

    def _open(self, kind: Kind, amount: Amount, reference: str | None, of: UUID | None) -> Transaction:
        self._make_sure_of_room()
        transaction = Transaction(
            id=UUID(bytes=self._entropy(16), version=4),
            number=self._next_number,
            kind=kind,
            amount=amount,
            reference=reference,
            opened_at_ms=self._clock.wall_ms(),
            clock_synchronised=self._clock.synchronised(),
            state=State.OPENED,
            running_ms=self._running_ms(),
            of=of,
        )
        self._parts.append_unflushed(RecordType.OPEN, facts_of(transaction))
        self._next_number += 1
        self._parts.opened[transaction.id] = transaction
        if self._latest_wall_ms is not None:
            self._latest_wall_ms = max(self._latest_wall_ms, transaction.opened_at_ms)
        self._at_risk[transaction.id] = transaction
        self._running.add(transaction.id)
        return transaction

    def _refunded_minor(self, sale: UUID) -> int:
        """What stands, or is on its way to the host."""
        refunds = {refund.id: refund for refund in self._parts.store.refunds(sale)}
        refunds |= {each.id: each for each in self._parts.opened.values() if each.of == sale}
        return sum(each.amount.minor for each in refunds.values() if each.state not in {State.DECLINED, State.VOID})

    def _check_refund(self, sale: Transaction, amount: Amount) -> None:
        """Raises `NotRefundable`."""
        if sale.kind is not Kind.SALE or sale.state not in SOLD:
            raise NotRefundable(
                "not_sold", f"transaction {sale.number} is no sale that stands: nothing was paid back; check its state"
            )
        if sale.amount.currency != amount.currency:
            raise NotRefundable(
                "currency", f"it was sold in {sale.amount.currency.code}: nothing was paid back; refund it in that"
            )
        left = Amount(sale.amount.minor - self._refunded_minor(sale.id), sale.amount.currency)
        if not 0 < amount.minor <= left.minor:
            raise NotRefundable(
                "over_refunded", f"{left} of this sale can still be paid back: nothing was; give an amount up to that"
            )

    def _append_answer(
        self, group: _Group, transaction: UUID, event: Event, answer: Answer, jws: str
    ) -> Verdict | None:
        """Write one answer of a group, unless it is known; its verdict if it is about no sale."""
        key = outbox_key(transaction, event)
        found = self._parts.store.outbox_item(key)
        if found is None:
            raise NoSuchTransaction(key)
        item, _ = found
        of_sale = event not in OF_NO_SALE
        if item.answered or key in group.answered:
            return None if of_sale else answer.decision
        if (answer.transaction, answer.event, answer.envelope) != (transaction, event, item.sha256):
            raise AnswerRejected("envelope", "it answers another envelope")
        body: dict[str, str | None] = {
            "transaction": str(transaction),
            "event": event.value,
            "decision": answer.decision.value,
            "sha256": item.sha256,
        }
        state: State | None = None
        if event is Event.ADVICE:
            body |= {"reason": None, "authorisation_code": None, "rrn": None}
        elif of_sale:
            sale = self._find(transaction)
            before = group.states.get(transaction, sale.state)
            contact = sale.card is not None and sale.card.contact
            state = advance(before, answer.decision.change(before, contact=contact))
            body |= {
                "reason": answer.reason,
                "authorisation_code": answer.authorisation_code,
                "rrn": answer.rrn,
            }
        self._parts.append(RecordType.ANSWER, body, jws.encode("ascii"))
        group.appended = True
        group.answered |= {outbox_key(transaction, each) for each in ended_by(event)}
        if state is not None:
            group.states[transaction] = state
        return None if of_sale else answer.decision

    def _settle(self, transaction: UUID) -> Transaction:
        """Read back what was committed, and keep the sum at risk in step."""
        after = self._find(transaction)
        if after.state in AT_RISK:
            self._at_risk[transaction] = after
        else:
            self._at_risk.pop(transaction, None)
        if after.state not in AT_RISK or after.state is State.ACCEPTED or after.kind is Kind.REFUND:
            self._running.discard(transaction)
        if after.state in _WAITING:
            self._waiting[transaction] = after
        else:
            self._waiting.pop(transaction, None)
        return after

    def _age_ms(self, transaction: Transaction) -> int:
        """By running time, which no setting of a clock changes; by wall time, too, where that can be trusted."""
        ages_ms = [self._running_ms() - transaction.running_ms]
        if (transaction.clock_synchronised or transaction.corrected) and self._clock.synchronised():
            ages_ms.append(self._clock.wall_ms() - transaction.opened_at_ms)
        return max(0, *ages_ms)

    def _running_ms(self) -> int:
        """How long this terminal has been running, over all its boots."""
        return self._ran_ms + self._clock.monotonic_ms()

    def _make_sure_of_room(self) -> None:
        """Before the card is asked: this sale can be written down to its end. Raises `NoRoom`, `DiskTrouble`."""
        self._files.check()
        if self._parts.journal.free_slots < self._slots_kept() + _SLOTS_OF_A_SALE:
            self._parts.commit()
            self._parts.reclaim()
        if self._parts.journal.free_slots < self._slots_kept() + _SLOTS_OF_A_SALE:
            raise JournalFull(
                "the journal has room only for what is already running or waiting for the host: this sale was not "
                "begun and nothing was charged; bring back the network, so that what waits can be sent"
            )
        if self._parts.store.spare_pages() < _SPARE_PAGES_OF_A_SALE:
            try:
                self._parts.store.reserve(_SPARE_PAGES_OF_A_SALE)
            except DiskTrouble as error:
                if not error.full:
                    raise
                raise NoRoom(
                    "the storage is full: this sale was not begun and nothing was charged, what is recorded is safe; "
                    "make space, it goes on by itself"
                ) from error

    def _commit_checkpoint(self, id_: UUID, envelope: MakeEnvelope) -> None:
        """For upkeep: where the journal stands, queued for the host; an older one that still waits need not be sent."""
        jws, sent = self._numbered(envelope)
        self._parts.append(RecordType.CHECKPOINT, {"checkpoint": str(id_)} | sent, jws.encode("ascii"))
        self._parts.commit()
        self._parts.overwrite(self._parts.store.erasable())

    def _find(self, transaction: UUID) -> Transaction:
        found = self._parts.opened.get(transaction) or self._parts.store.transaction(transaction)
        if found is None:
            raise NoSuchTransaction(f"transaction {transaction}")
        return self._overlaid(found)

    def _by_reference(self, reference: str) -> Transaction | None:
        for transaction in self._parts.opened.values():
            if transaction.reference == reference:
                return transaction
        found = self._parts.store.by_reference(reference)
        return None if found is None else self._overlaid(found)

    def _overlaid(self, transaction: Transaction) -> Transaction:
        shown = self._parts.shown.get(transaction.id)
        return transaction if shown is None else replace(transaction, shown=shown)

    def _with_envelope(self, item: OutboxItem, held: tuple[bytes, bytes] | None) -> OutboxItem:
        if item.answered:
            return item
        if held is None:
            raise LedgerCorrupt(f"the envelope of {item.key} is gone from ledger.db: it is rebuilt at the next start")
        altered = LedgerCorrupt(
            f"the envelope of {item.key} is not the one recorded: ledger.db is rebuilt at the next start"
        )
        try:
            jws = self._parts.journal.open_payload(*held).decode("ascii")
        except (LedgerCorrupt, KeyUnavailable, struct.error) as error:
            raise altered from error  # it is the database's copy that was read
        if digest(jws) != item.sha256:
            raise altered
        return replace(item, envelope=jws)

    def _slots_kept(self) -> int:
        """What the running sales, and the envelopes that wait, may still have to write."""
        running, waiting = len(self._running), self._parts.store.waiting_count()
        return _SLOTS_OF_EVENTS + _SLOTS_OF_A_SALE * running + _SLOTS_OF_AN_ENVELOPE * waiting


@dataclass(slots=True)
class _Group:
    """What the answers of a group have come to so far: the later ones are to see it, though it is not applied yet."""

    appended: bool = False
    states: dict[UUID, State] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Second:
    """How the journal's second copy is, and what of that is not written down yet."""

    trouble: str | None = None
    news: list[str | None] = field(default_factory=list)

    def changed(self, trouble: str | None) -> None:
        self.trouble = trouble
        self.news.append(trouble)


class _Files:
    """Whether the ledger's files are still those that were opened: what is written elsewhere is lost in the end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._opened = self._identities()

    def check(self) -> None:
        """Raises `DiskTrouble`."""
        if self._identities() != self._opened:
            raise DiskTrouble(
                "the ledger's files were exchanged while it was open: nothing was charged; bring the storage back, it "
                "goes on by itself"
            )

    def _identities(self) -> list[tuple[int, int]]:
        with storage_errors():
            found = [(self._directory / name).stat() for name in (".", DATABASE_NAME)]
        return [(status.st_dev, status.st_ino) for status in found]


@contextmanager
def locked(directory: Path) -> Generator[None]:
    """The exclusive lock on a ledger's directory, which is made if it is not there. Raises `LedgerLocked`."""
    with storage_errors():
        if not directory.exists():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_directory(directory.parent)
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LedgerLocked(
                f"another process works with the ledger in {directory}: nothing was read or changed; use the "
                "running service, or stop it first"
            ) from error
        yield
    finally:
        os.close(lock)

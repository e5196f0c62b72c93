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
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias
from uuid import UUID

from terminal.clock import Clock, Entropy
from terminal.ledger.errors import (
    AnswerRejected,
    DiskTrouble,
    JournalFull,
    LedgerCorrupt,
    LedgerError,
    LedgerLocked,
    NoSuchTransaction,
    ReferenceTaken,
)
from terminal.ledger.journal import UNFLUSHED_MAX, FileMedium, Journal, Medium, Record, RecordType, storage_errors
from terminal.ledger.keys import TerminalKeys
from terminal.ledger.recovery import RecoveryReport, move_aside, recover
from terminal.ledger.sealing import digest
from terminal.ledger.states import AT_RISK, State, advance
from terminal.ledger.store import Store, facts_of, outbox_key
from terminal.ledger.values import (
    Answer,
    CardSummary,
    Decision,
    Event,
    Exposure,
    Kind,
    OutboxItem,
    ReversalReason,
    Total,
    Transaction,
    Unsent,
)
from terminal.money import Amount, Currency

JOURNAL_NAME: Final = "journal"
DATABASE_NAME: Final = "ledger.db"

REFERENCE_CHARS_MAX: Final = 64  # it must fit into a record's body whatever its letters
REASON_CHARS_MAX: Final = 64

# Room that a new sale must leave, so that everything already begun can still be finished and told.
_SLOTS_OF_A_SALE: Final = 9  # OPEN CARD OUTCOME SHOWN ANSWER, deferred OUTCOME, REVERSAL ANSWER SHOWN
_SLOTS_OF_AN_ENVELOPE: Final = 4  # ANSWER REVERSAL ANSWER SHOWN
_SLOTS_OF_EVENTS: Final = 64  # starts, stops and link reports while the journal is being replaced

_PENDING_MAX: Final = UNFLUSHED_MAX - 4  # a commit adds two records at most

_RECENT: Final = 64  # sales among which the latest time is looked for: a clock that was wrong longer was noticed
_NOTES_MAX: Final = 12  # of one kind within the time below: a flapping link must not fill the journal in days
_NOTE_CHARS_MAX: Final = 300  # of one detail, so that a note fits into its record whatever somebody else's message says
_NOTES_PER_MS: Final = 3_600_000

OpenMedium: TypeAlias = Callable[[Path, int], Medium]
MakeEnvelope: TypeAlias = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class LedgerSettings:
    """The journal's size and the epoch count when a ledger is made."""

    journal_size_bytes: int = 256 * 1024 * 1024  # 16,384 slots: about 3,200 sales of five records
    wal_size_bytes: int = 4 * 1024 * 1024  # some forty sales between two checkpoints
    epoch: int = 1


class Ledger:
    """One terminal's ledger. Thread-safe. Made by `open` only."""

    def __init__(
        self,
        *,
        directory: Path,
        journal: Journal,
        store: Store,
        report: RecoveryReport,
        clock: Clock,
        entropy: Entropy,
    ) -> None:
        self._directory = directory
        self._release = ExitStack()  # what `open` took: database, journal, lock
        self._journal = journal
        self._store = store
        self._clock = clock
        self._entropy = entropy
        self._lock = threading.RLock()
        self._broken: LedgerError | None = None
        self._closed = False
        self._pending: list[Record] = []  # written to the journal, not yet applied to the database
        self._opened: dict[UUID, Transaction] = {}  # what OPEN records among them began
        self._shown: dict[UUID, str] = {}  # what SHOWN records among them say
        self._latest_wall_ms: int | None = None
        self._noted: dict[str, list[int]] = {}
        self._left_out: dict[str, int] = {}
        self._overwritten: set[int] = set()  # payloads zeroed in the journal, not yet flushed
        self._at_risk = {transaction.id: transaction for transaction in store.at_risk()}
        # When each came to be, on this boot's running clock: setting the wall clock makes no sale older or younger.
        self._born_ms = {transaction.id: self._birth_ms(transaction) for transaction in self._at_risk.values()}
        self._next_number = store.last_number() + 1
        self._next_envelope = store.last_envelope_number() + 1
        self.epoch: Final = journal.epoch
        self.recovery: Final = report

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
        with ExitStack() as opened:
            with storage_errors():
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, lock)
            _take(lock, directory)
            with storage_errors():
                tape = medium(directory / JOURNAL_NAME, settings.journal_size_bytes)
            opened.callback(tape.close)
            journal = Journal(
                tape, data=keys.data, chain=keys.chain, epoch=settings.epoch, clock=clock, entropy=entropy
            )
            store, report = recover(
                journal,
                path,
                lambda: Store(path, keys.data, keys.chain, entropy),
                log_size_bytes=settings.wal_size_bytes,
            )
            opened.callback(store.close)
            ledger = cls(
                directory=directory,
                journal=journal,
                store=store,
                report=report,
                clock=clock,
                entropy=entropy,
            )
            ledger._release = opened.pop_all()
            return ledger

    def close(self) -> None:
        """Make everything durable and let go. A database found damaged is moved aside, the next start rebuilds it."""
        with self._lock:
            if self._closed:
                return
            try:
                if self._broken is None:
                    self.flush()
            finally:
                self._closed = True
                with self._release:
                    self._store.close()
                    if isinstance(self._broken, LedgerCorrupt) and self._broken.sequence is None:
                        move_aside(self._directory / DATABASE_NAME)

    # Changes

    def begin(self, kind: Kind, amount: Amount, reference: str | None) -> Transaction:
        """Open a transaction and reserve its amount. Not durable by itself: nothing has been promised yet.

        A reference that came before with the same amount returns that transaction, in whatever state it is. Raises
        `ReferenceTaken`, `JournalFull`.
        """
        if reference is not None and not 0 < len(reference) <= REFERENCE_CHARS_MAX:
            raise ValueError(f"a reference has 1 to {REFERENCE_CHARS_MAX} characters")
        with self._held():
            earlier = None if reference is None else self._by_reference(reference)
            if earlier is not None:
                if earlier.amount != amount:
                    raise ReferenceTaken
                return earlier
            if self._journal.free_slots < self._slots_kept() + _SLOTS_OF_A_SALE:
                raise JournalFull(
                    "the journal has room only for what is already running or waiting for the host: this sale was not "
                    "begun and nothing was charged; send what is waiting, then start a new epoch on fresh storage"
                )
            transaction = Transaction(
                id=UUID(bytes=self._entropy(16), version=4),
                number=self._next_number,
                kind=kind,
                amount=amount,
                reference=reference,
                opened_at_ms=self._clock.wall_ms(),
                clock_synchronised=self._clock.synchronised(),
                state=State.OPENED,
            )
            self._append_unflushed(RecordType.OPEN, facts_of(transaction))
            self._next_number += 1
            self._opened[transaction.id] = transaction
            if self._latest_wall_ms is not None:
                self._latest_wall_ms = max(self._latest_wall_ms, transaction.opened_at_ms)
            self._at_risk[transaction.id] = transaction
            self._born_ms[transaction.id] = self._clock.monotonic_ms()
            return transaction

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
        after `online` brings none, the one under way stands. Raises `IllegalTransition`, `NoSuchTransaction`,
        `DiskTrouble`.
        """
        if len(reason) > REASON_CHARS_MAX:
            raise ValueError(f"a reason has at most {REASON_CHARS_MAX} characters")
        with self._held():
            before = self._find(transaction)
            advance(before.state, decision.change)
            sends = before.state is State.OPENED and decision in {Decision.ONLINE, Decision.ACCEPTED}
            if sends != (envelope is not None) or (sends and card is None):
                raise ValueError(
                    "an envelope and a card come with the first outcome online or accepted, and only there"
                )
            card = card or before.card
            # Every body is complete in itself.
            body = facts_of(before) | {
                "decision": decision.value,
                "reason": reason,
                "card": None if card is None else asdict(card),
                "envelope": None,
            }
            if envelope is not None:
                jws = envelope(self._next_envelope)
                sent = {"number": self._next_envelope, "sha256": digest(jws)}
                body["envelope"] = sent
                # CARD first: an OUTCOME that continues the chain then never lacks its envelope.
                named = {"transaction": str(transaction), "event": Event.AUTHORISATION.value}
                self._append(RecordType.CARD, named | sent, jws.encode("ascii"))
            self._append(RecordType.OUTCOME, body)
            self._commit()
            self._next_envelope += envelope is not None
            return self._settle(transaction)

    def commit_answer(self, transaction: UUID, event: Event, answer: Answer, jws: str) -> Transaction:
        """The host's verified answer, durable on return; card data is erased. A repetition changes nothing.

        Raises `IllegalTransition`, `NoSuchTransaction`, `AnswerRejected` (for another envelope), `DiskTrouble`.
        """
        key = outbox_key(transaction, event)
        with self._held():
            found = self._store.outbox_item(key)
            if found is None:
                raise NoSuchTransaction(key)
            item, _ = found
            before = self._find(transaction)
            if item.answered:
                return before
            if (answer.transaction, answer.event, answer.envelope) != (transaction, event, item.sha256):
                raise AnswerRejected("envelope", "it answers another envelope")
            contact = before.card is not None and before.card.contact
            advance(before.state, answer.decision.change(before.state, contact=contact))
            body = {
                "transaction": str(transaction),
                "event": event.value,
                "decision": answer.decision.value,
                "reason": answer.reason,
                "authorisation_code": answer.authorisation_code,
                "rrn": answer.rrn,
                "card_ref": answer.card_ref,
                "sha256": item.sha256,
            }
            self._append(RecordType.ANSWER, body, jws.encode("ascii"))
            self._commit()
            for sequence in self._store.erasable():
                self._journal.erase(sequence)
                self._overwritten.add(sequence)
            return self._settle(transaction)

    def commit_reversal(self, transaction: UUID, reason: ReversalReason, envelope: MakeEnvelope) -> Transaction:
        """Take a sale back, durable on return and queued for the host.

        `timeout` and `recovered` fit only while no answer has come; `void` also takes back what was sold. Raises
        `IllegalTransition`, `NoSuchTransaction`, `DiskTrouble`.
        """
        with self._held():
            advance(self._find(transaction).state, reason.change)
            jws = envelope(self._next_envelope)
            body = {
                "transaction": str(transaction),
                "reason": reason.value,
                "number": self._next_envelope,
                "sha256": digest(jws),
            }
            self._append(RecordType.REVERSAL, body, jws.encode("ascii"))
            self._commit()
            self._next_envelope += 1
            return self._settle(transaction)

    def mark_shown(self, transaction: UUID, screen: str) -> None:
        """The customer was shown a result. Durable with the next commit or `flush`: showing it twice harms nobody."""
        with self._held():
            if self._find(transaction).shown == screen:
                return
            self._append_unflushed(RecordType.SHOWN, {"transaction": str(transaction), "screen": screen})
            self._shown[transaction] = screen

    def note(self, what: str, **details: str | int | bool | None) -> bool:
        """Write something into the audit trail; durable with the next commit or `flush`. No card data, no keys.

        False when the journal's remaining room is kept for money: audit must not cost a sale its answer. A link or a
        reader that flaps is written down now and then, with the number of times that were left out.
        """
        with self._held():
            if self._journal.free_slots <= self._slots_kept():
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
            self._append_unflushed(RecordType.EVENT, {"what": what, "details": details})
            return True

    def flush(self) -> None:
        """For idle time: everything so far is durable on return."""
        with self._held():
            if self._pending or self._overwritten:
                self._commit()

    def mark_handed_over(self, keys: Iterable[str]) -> None:
        """Sync has stored these durably: not offered again until the next start.

        Not flushed: whoever gets an item twice knows it by its key, and offering everything unanswered again at each
        start heals a spool that was lost.
        """
        with self._held():
            self._store.mark_handed_over(keys)

    def offer_again(self) -> None:
        """Sync has lost its spool: offer everything unanswered again."""
        with self._held():
            self._store.offer_again()

    # Questions

    def transaction(self, transaction: UUID) -> Transaction:
        """Raises `NoSuchTransaction`."""
        with self._held():
            return self._find(transaction)

    def by_reference(self, reference: str) -> Transaction | None:
        with self._held():
            return self._by_reference(reference)

    def transactions(self, limit: int, before: int | None = None) -> list[Transaction]:
        """Newest first; `before` leaves out that number and all later ones, for the next page."""
        with self._held():
            before = self._next_number if before is None else before
            pending = [transaction for transaction in self._opened.values() if transaction.number < before]
            pending.sort(key=lambda transaction: -transaction.number)
            return [*pending, *map(self._overlaid, self._store.transactions(limit, before))][:limit]

    def authorising(self) -> list[Transaction]:
        """What waits for the host while a customer waits."""
        with self._held():
            return [transaction for transaction in self._at_risk.values() if transaction.state is State.AUTHORISING]

    def completing(self) -> list[Transaction]:
        """Approved by the host, the card's last word missing."""
        with self._held():
            return self._store.in_states([State.COMPLETING])

    def opened(self) -> list[Transaction]:
        with self._held():
            return [transaction for transaction in self._at_risk.values() if transaction.state is State.OPENED]

    def unshown(self) -> list[Transaction]:
        """Sold as far as the ledger knows, but the customer may never have seen it."""
        with self._held():
            return [transaction for transaction in self._store.unshown() if transaction.id not in self._shown]

    def outbox(self, limit: int) -> list[OutboxItem]:
        """What is to be handed over to sync: urgent first, then in the order of its numbers."""
        with self._held():
            return [self._with_envelope(item, held) for item, held in self._store.outbox(limit)]

    def outbox_item(self, key: str) -> OutboxItem:
        """Raises `NoSuchTransaction`."""
        with self._held():
            found = self._store.outbox_item(key)
            if found is None:
                raise NoSuchTransaction(key)
            return self._with_envelope(*found)

    def unsent(self) -> list[Unsent]:
        """What waits for the host's answer, handed over or not, per currency."""
        with self._held():
            return self._store.unsent()

    def exposure(self, currency: Currency) -> Exposure:
        """What the merchant stands to lose, open sales included."""
        with self._held():
            some = [transaction for transaction in self._at_risk.values() if transaction.amount.currency == currency]
            now_ms = self._clock.monotonic_ms()
        return Exposure(
            sum_minor=sum(transaction.amount.minor for transaction in some),
            count=len(some),
            oldest_wall_ms=min((transaction.opened_at_ms for transaction in some), default=None),
            age_ms=max((now_ms - self._born_ms[transaction.id] for transaction in some), default=0),
        )

    def totals(self) -> list[Total]:
        with self._held():
            return self._store.totals()

    @property
    def latest_wall_ms(self) -> int:
        """The latest moment at which a sale was opened, by whatever the clock said."""
        with self._held():
            if self._latest_wall_ms is None:
                recent = self._store.transactions(_RECENT, sys.maxsize)
                opened = [each.opened_at_ms for each in (*recent, *self._opened.values())]
                self._latest_wall_ms = max(opened, default=0)
            return self._latest_wall_ms

    @property
    def free_slots(self) -> int:
        with self._held():
            return self._journal.free_slots

    def verify(self) -> int:
        """Read the whole journal, compare it with the ledger's copy; the number of records. Raises `LedgerCorrupt`.

        For an idle hour, since sales wait meanwhile: a start only reads what is new.
        """
        with self._held():
            self._commit()
            count = 0
            for record in self._journal.audit():
                if self._store.record(record.sequence) != record.trimmed:
                    raise LedgerCorrupt(
                        "the ledger's copy of the journal differs: ledger.db is rebuilt at the next start"
                    )
                count += 1
            return count

    # Inside

    @contextmanager
    def _held(self) -> Generator[None]:
        """The lock, and the rule that a ledger in doubt does nothing."""
        with self._lock:
            if self._closed:
                raise LedgerError("the ledger is closed: nothing was recorded; open it again")
            if self._broken is not None:
                raise type(self._broken)(str(self._broken)) from self._broken
            try:
                yield
            except (DiskTrouble, LedgerCorrupt) as error:
                self._broken = error
                raise

    def _append(self, type_: RecordType, body: dict[str, Any], payload: bytes = b"") -> None:
        self._pending.append(self._journal.append(type_, body, payload))

    def _append_unflushed(self, type_: RecordType, body: dict[str, Any]) -> None:
        """For what has no flush of its own; bounded, so that a commit never finds the journal's window full."""
        if len(self._pending) >= _PENDING_MAX:
            self._commit()
        self._append(type_, body)

    def _commit(self) -> None:
        self._journal.flush()
        self._store.apply(self._pending, self._overwritten)
        self._pending.clear()
        self._opened.clear()
        self._shown.clear()
        self._overwritten.clear()

    def _settle(self, transaction: UUID) -> Transaction:
        """Read back what was committed, and keep the sum at risk in step."""
        after = self._find(transaction)
        if after.state in AT_RISK:
            self._at_risk[transaction] = after
        else:
            self._at_risk.pop(transaction, None)
            self._born_ms.pop(transaction, None)
        return after

    def _birth_ms(self, transaction: Transaction) -> int:
        """Of a sale from an earlier run: by the wall clock if that could be trusted then and now, else from now on."""
        now_ms = self._clock.monotonic_ms()
        if not (transaction.clock_synchronised and self._clock.synchronised()):
            return now_ms
        return now_ms - max(0, self._clock.wall_ms() - transaction.opened_at_ms)

    def _find(self, transaction: UUID) -> Transaction:
        found = self._opened.get(transaction) or self._store.transaction(transaction)
        if found is None:
            raise NoSuchTransaction(f"transaction {transaction}")
        return self._overlaid(found)

    def _by_reference(self, reference: str) -> Transaction | None:
        for transaction in self._opened.values():
            if transaction.reference == reference:
                return transaction
        found = self._store.by_reference(reference)
        return None if found is None else self._overlaid(found)

    def _overlaid(self, transaction: Transaction) -> Transaction:
        shown = self._shown.get(transaction.id)
        return transaction if shown is None else replace(transaction, shown=shown)

    def _with_envelope(self, item: OutboxItem, held: tuple[bytes, bytes] | None) -> OutboxItem:
        if item.answered:
            return item
        if held is None:
            raise LedgerCorrupt(f"the envelope of {item.key} is gone from ledger.db: it is rebuilt at the next start")
        jws = self._journal.open_payload(*held).decode("ascii")
        if digest(jws) != item.sha256:
            raise LedgerCorrupt(
                f"the envelope of {item.key} is not the one recorded: ledger.db is rebuilt at the next start"
            )
        return replace(item, envelope=jws)

    def _slots_kept(self) -> int:
        running = sum(transaction.state is not State.ACCEPTED for transaction in self._at_risk.values())
        return _SLOTS_OF_EVENTS + _SLOTS_OF_A_SALE * running + _SLOTS_OF_AN_ENVELOPE * self._store.waiting_count()


def _take(lock: int, directory: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise LedgerLocked(
            f"another process works with the ledger in {directory}: nothing was read or changed; use the "
            "running service, or stop it first"
        ) from error

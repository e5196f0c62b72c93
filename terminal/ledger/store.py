"""What the journal's records mean, as rows.

`apply` is the only way that a row comes to be or changes, while selling as well as when a journal is replayed after a
power cut; so what recovery builds is what the running terminal had. Every record is applied exactly once: the
transaction that applies it stores its position. Queries are below it, then what forgets: who may be forgotten when is
the caller's rule, that nothing is forgotten which somebody waits for is kept here. The ledger's lock serialises all of
this.
"""

from __future__ import annotations

import hmac
import sqlite3
from base64 import urlsafe_b64decode
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar
from uuid import UUID

import msgspec
from peewee import SQL, IntegrityError, Model, PeeweeException, fn

from terminal.clock import Clock, Entropy
from terminal.ledger.days import Book, Closed, Said
from terminal.ledger.errors import DiskTrouble, IllegalTransition, KeyUnavailable, LedgerCorrupt, LedgerTooNew
from terminal.ledger.fields import KEY_ID_BYTES, FieldCipher
from terminal.ledger.journal import START, Position, Record, RecordType
from terminal.ledger.keys import Keyring, SecretKey
from terminal.ledger.migrations import migrate
from terminal.ledger.models import (
    READER_VERSION_MIN,
    SCHEMA_VERSION,
    LedgerDatabase,
    MetaRow,
    OutboxRow,
    Rows,
    Tables,
    TotalRow,
    TransactionRow,
    compiled,
)
from terminal.ledger.states import AT_RISK, LOST, SOLD, State, advance
from terminal.ledger.tally import Tally
from terminal.ledger.values import (
    ASIDE,
    OF_NO_SALE,
    Batch,
    CardSummary,
    Decision,
    Event,
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
from terminal.money import Amount, currency

_META_ID: Final = 1
_TAG_BYTES: Final = 16
# SQLITE_ERROR: a table or column that is always there is not, since the schema's text is damaged.
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR})
_RECORD_KEY_ID_AT: Final = 12  # docs/formats.md, Journal

_ALTERED: Final = (
    "ledger.db is not as it was written: no sale is lost, the journal holds them all; it is rebuilt from there"
)

_UNFINISHED: Final = frozenset({State.OPENED, State.AUTHORISING, State.ACCEPTED, State.COMPLETING, State.REVERSING})
"""Somebody still has to say something; every other state stays unless a person takes the sale back."""

_UNDATED: Final = 0  # as `final_ms`: final, but the clock was not to be trusted
_REFUND_SHOWN: Final = "refund"  # there is no card in front of it that must be told
_BOOK: Final = "day"  # the row of `totals` that holds the book of days
_TOUCHED_MAX: Final = 64  # rows held back: a whole journal is applied in one go when the ledger is rebuilt
_AT_ONCE: Final = 500  # transactions of one card, records dropped: what is found under one holding of the lock


@dataclass(frozen=True, slots=True)
class Running:
    """How long this terminal had been running, over all its boots, when the last record was written."""

    running_ms: int
    boot_id: UUID | None
    monotonic_ms: int

    def until(self, clock: Clock) -> int:
        """The same, now. In another boot: what was recorded, and what this boot has run so far."""
        since_ms = self.monotonic_ms if clock.boot_id == self.boot_id else 0
        return self.running_ms + max(0, clock.monotonic_ms() - since_ms)


def outbox_key(transaction: UUID, event: Event) -> str:
    return f"{transaction}/{event}"


def facts_of(transaction: Transaction) -> dict[str, Any]:
    """What OPEN and OUTCOME say of a transaction (docs/formats.md, Journal)."""
    return {
        "transaction": str(transaction.id),
        "number": transaction.number,
        "kind": transaction.kind.value,
        "amount": transaction.amount.minor,
        "currency": transaction.amount.currency.code,
        "reference": transaction.reference,
        "opened_at": transaction.opened_at_ms,
        "clock_synchronised": transaction.clock_synchronised,
    } | ({} if transaction.of is None else {"of": str(transaction.of)})


class Store:
    """ledger.db. Raises `LedgerCorrupt` when SQLite finds it damaged, `DiskTrouble` when the storage fails it."""

    def __init__(self, path: Path, data: Keyring, chain: SecretKey, entropy: Entropy) -> None:
        self._path = path
        self._data = data
        self._database = LedgerDatabase(path, FieldCipher(data, entropy))
        self._tables = Tables(self._database)
        self._meta = Rows(self._tables.meta)
        self._records = Rows(self._tables.records)
        self._transactions = Rows(self._tables.transactions)
        self._touched = _Touched(self._transactions)
        self._outbox = Rows(self._tables.outbox)
        self._totals = Rows(self._tables.totals)
        self._sql = _Statements(self._tables)
        self._tally = Tally(self._tables, SecretKey(chain.derive(b"payterm ledger rows")))
        self._chain_key_id = chain.id
        self._references = SecretKey(chain.derive(b"payterm reference lookup"))
        self._cards = SecretKey(chain.derive(b"payterm card lookup"))

    def open(self) -> Position | None:
        """Connect, and bring an older form up to date; the position up to which the journal is applied.

        None for a database that has not begun. Raises `LedgerCorrupt`, `KeyUnavailable`, `LedgerTooNew`.
        """
        with _translated():
            self._database.connect()
            tables = self._database.get_tables()
            if not tables:
                return None
            if "meta" not in tables:
                raise LedgerCorrupt("ledger.db is not a ledger: it is rebuilt from the journal")
            version = self._identify()
            if version < SCHEMA_VERSION:
                self._know_keys()
                migrate(self._database, self._path, version, self._card_tag, seal=self._seal_anew)
            meta = self._the_meta()
            unsealed = meta.seal is None and not meta.sequence  # nothing was applied yet
            self._tally.watch(None if unsealed else bytes(meta.settled or b""))
            whole = unsealed or hmac.compare_digest(bytes(meta.seal or b""), self._tally.seal(meta))
            named = bytes(meta.chain_key_id) == self._chain_key_id
            if named != whole and not unsealed:  # with another chain key it would be neither
                raise LedgerCorrupt(_ALTERED)
            self._know_keys()
            if not whole or (self._tally.is_small() and not self._tally.is_whole()):
                raise LedgerCorrupt(_ALTERED)
            current = self._data.current.id
            if current not in _ids(meta.data_key_id):  # before any cell is sealed under it
                with self._changing() as meta:
                    meta.data_key_id = bytes(meta.data_key_id) + current
        return Position(meta.sequence, bytes(meta.mac))

    def create(self, epoch: int) -> None:
        """Make the tables, nothing applied yet."""
        with _translated(), self._database.atomic():
            self._tables.create()
            self._meta.insert(
                id=_META_ID,
                schema_version=SCHEMA_VERSION,
                reader_version_min=READER_VERSION_MIN,
                epoch=epoch,
                data_key_id=self._data.current.id,
                chain_key_id=self._chain_key_id,
                sequence=0,
                mac=START.mac,
            )
        with _translated():
            self._tally.watch(None)

    def size_log(self, size_bytes: int) -> None:
        with _translated():
            self._database.size_log(size_bytes)

    def clear_log(self) -> None:
        """Before a clean close, which deletes the log: what it holds of erased rows is overwritten."""
        with _translated():
            self._database.clear_log()

    def close(self) -> None:
        with _translated():
            self._database.close()

    def _identify(self) -> int:
        """The database's form, if this release can read it."""
        version, reader_version_min, *_ = self._front()
        if not 1 <= reader_version_min <= version:
            raise LedgerCorrupt(_ALTERED)
        if reader_version_min > SCHEMA_VERSION:
            raise LedgerTooNew(
                f"the ledger has form {version}, this release reads up to {SCHEMA_VERSION}: nothing was "
                "changed; install the newer release again"
            )
        return version

    def _know_keys(self) -> None:
        """Raises `KeyUnavailable` where these are not the database's keys."""
        *_, data_key_ids, chain_key_id = self._front()
        unknown = [id_ for id_ in _ids(data_key_ids) if self._data.by_id(id_) is None]
        if unknown or bytes(chain_key_id) != self._chain_key_id:
            name = f"data-key (id {unknown[0].hex()})" if unknown else "chain-key"
            raise KeyUnavailable(
                f"ledger.db was made with another {name}: nothing was changed; restore the keys that belong to it"
            )

    def _front(self) -> tuple[int, int, bytes, bytes]:
        """What stands in every form: its version, the oldest that can read it, the ids of its keys."""
        columns = ("schema_version", "reader_version_min", "data_key_id", "chain_key_id")
        table = self._tables.meta
        match table.select(*(getattr(table, name) for name in columns)).tuples().first():
            case (int() as version, int() as reader_version_min, bytes() as data_key_ids, bytes() as chain_key_id):
                return version, reader_version_min, data_key_ids, chain_key_id
            case _:
                raise LedgerCorrupt("ledger.db is not a ledger: it is rebuilt from the journal")

    def _seal_anew(self) -> None:
        """Of a form that had no seal: from here on it does, and a book of days, in which all that stands is open."""
        with self._book():
            pass
        meta = self._the_meta()
        meta.settled = self._tally.formed()
        meta.seal = self._tally.seal(meta)
        self._meta.save(meta)

    @contextmanager
    def _changing(self, *, flushed: bool = True) -> Generator[MetaRow]:
        """One transaction, which also seals what the rows have become. What is assigned to `meta` is saved."""
        with self._database.atomic() if flushed else self._database.unflushed(), self._tally.kept():
            meta = self._the_meta()
            yield meta
            meta.settled = self._tally.settled
            meta.seal = self._tally.seal(meta)
            self._meta.save(meta)

    # Applying records

    def apply(self, records: Iterable[Record], erased: Collection[int] = ()) -> int:
        """Apply records in one transaction, which also stores their position; how many. Durable on return.

        `erased` are records whose payload is durably gone from the journal.
        """
        count = 0
        self._touched = _Touched(self._transactions)
        with _translated(), self._changing() as meta:
            for record in records:
                try:
                    self._apply(record, meta)
                except (IllegalTransition, KeyError) as error:
                    raise LedgerCorrupt.at_record(record.sequence, "does not fit what came before it") from error
                meta.sequence, meta.mac = record.sequence, record.mac
                count += 1
            self._touched.write()
            for sequence in erased:
                self._run(self._sql.erased_item, sequence=sequence)
                self._run(self._sql.erased_payload, sequence=sequence)
        return count

    def _apply(self, record: Record, meta: MetaRow) -> None:
        if meta.first_sequence is None:
            meta.first_sequence = record.sequence
        _run_on(meta, record)
        about = _transaction_of(record)
        self._records.insert(
            sequence=record.sequence,
            type=record.type.value,
            trimmed=record.trimmed,
            payload=record.payload,
            transaction=about,
        )
        match record.type:
            case RecordType.OPEN:
                self._insert(record, meta)
            case RecordType.OUTCOME:
                self._apply_outcome(record, meta)
            case RecordType.SHOWN:
                row = self._row(record, meta)
                if row is not None:
                    row.shown = record.body["screen"]
                    row.last_sequence = record.sequence
            case RecordType.ANSWER:
                self._apply_answer(record, meta)
            case RecordType.REVERSAL:
                self._apply_reversal(record, meta)
            case RecordType.CHECKPOINT:
                self._apply_checkpoint(record, meta)
            case RecordType.EVENT:
                self._apply_event(record, meta)
            case RecordType.CARD:
                pass  # it counts with the OUTCOME that follows it

    def _insert(self, record: Record, meta: MetaRow) -> TransactionRow:
        body = record.body
        meta.last_number = max(meta.last_number, body["number"])
        is_refund = Kind(body["kind"]) is Kind.REFUND
        return self._touched.insert(
            id=UUID(body["transaction"]),
            number=body["number"],
            state=State.OPENED.value,
            opened_sequence=record.sequence,
            reference_tag=self._tag(body["reference"]),
            amount_minor=body["amount"],
            currency=body["currency"],
            details={name: body[name] for name in ("kind", "reference", "opened_at", "clock_synchronised")},
            last_sequence=record.sequence,
            boot_id=record.boot_id.bytes,
            monotonic_ms=record.monotonic_ms,
            running_ms=meta.running_ms,
            synchronised=body["clock_synchronised"],
            of=UUID(body["of"]) if is_refund else None,
            shown=_REFUND_SHOWN if is_refund else None,
        )

    def _apply_outcome(self, record: Record, meta: MetaRow) -> None:
        body = record.body
        id_ = UUID(body["transaction"])
        row = self._touched.get(id_) or self._insert(record, meta)
        learnt = {"reason": body["reason"]}
        if body["scheme"] is not None:
            learnt |= {"scheme": body["scheme"], "contact": body["contact"]}
        if record.content is not None:
            learnt["card"] = msgspec.json.decode(record.content, type=dict[str, Any])
            row.has_card = True
        decision = Decision(body["decision"])
        self._move(row, advance(State(row.state), decision.change), learnt, record)
        if body["envelope"] is not None:
            # CARD is written first: an OUTCOME that continues the chain has its CARD right before it.
            event = Event.REFUND if row.of is not None else decision.event
            urgent = decision is Decision.ONLINE and row.of is None
            self._queue(record.sequence - 1, id_, event, body["envelope"], meta, urgent=urgent)
        elif decision is Decision.ACCEPTED:
            self._run(self._sql.no_hurry, key=outbox_key(id_, Event.AUTHORISATION))

    def _apply_reversal(self, record: Record, meta: MetaRow) -> None:
        row = self._row(record, meta)
        if row is not None:
            reason = ReversalReason(record.body["reason"])
            self._move(row, advance(State(row.state), reason.change), {"reason": reason.value}, record)
        id_ = UUID(record.body["transaction"])
        if (advice := record.body.get("advice")) is not None:
            self._queue(record.sequence - 1, id_, Event.ADVICE, advice, meta, urgent=False)
        self._queue(record.sequence, id_, Event.REVERSAL, record.body, meta, urgent=True)

    def _apply_answer(self, record: Record, meta: MetaRow) -> None:
        body = record.body
        id_, event = UUID(body["transaction"]), Event(body["event"])
        if event in OF_NO_SALE:
            item = self._outbox.get(outbox_key(id_, event))
            if item is None:
                raise KeyError(id_)
            if event is Event.CHECKPOINT:
                meta.countersigned = item.sequence
            else:
                said = None if record.content is None else _payload_of(record.content, Said)
                with self._book() as book:
                    book.answer(id_, Verdict(body["decision"]), said)
            self._answered([item])
            return
        row = self._row(record, meta)
        if row is not None and event is Event.ADVICE:
            row.last_sequence = record.sequence
        elif row is not None:
            learnt = {name: body[name] for name in ("reason", "authorisation_code", "rrn") if body[name] is not None}
            card_ref = None if record.content is None else _payload_of(record.content, _Named).card_ref
            if card_ref is not None:
                learnt["card_ref"] = card_ref
                row.card_tag, row.has_card = self._card_tag(card_ref), True
            before = State(row.state)
            change = Verdict(body["decision"]).change(before, contact=bool(row.details.get("contact")))
            state = advance(before, change)
            if state is State.REVERSING:
                learnt.pop("reason", None)  # why it is being reversed stays
            self._move(row, state, learnt, record)
            # Nobody waits in front of a refund: whoever paid it back learns of a decline by this only.
            row.alert = state in LOST or (row.of is not None and state is State.DECLINED)
        items = self._outbox.all(self._sql.of_transaction, transaction=id_.hex)
        self._answered([item for item in items if Event(item.event) in ended_by(event)])

    def _apply_checkpoint(self, record: Record, meta: MetaRow) -> None:
        """Of checkpoints only the newest is worth sending; a day's end is sent whatever comes after it."""
        meta.epoch = record.epoch
        if "batch" in record.body:
            closed = msgspec.convert(record.body, Closed)
            with self._book() as book:
                book.close(closed)
            self._queue(record.sequence, closed.batch, Event.BATCH, record.body, meta, urgent=False)
            return
        if "checkpoint" not in record.body:
            meta.epoch_of = _encoded(record.body["epoch_of"])
            if meta.epoch_of is not None:
                with self._book() as book:
                    book.begin_epoch(meta.last_number)
            return  # the first record of an epoch
        self._answered(self._outbox.all(self._sql.unanswered_checkpoints))
        id_ = UUID(record.body["checkpoint"])
        self._queue(record.sequence, id_, Event.CHECKPOINT, record.body, meta, urgent=False)
        meta.last_checkpoint = record.sequence

    def _apply_event(self, record: Record, meta: MetaRow) -> None:
        """Of what is only noted, a little counts."""
        match record.body["what"]:
            case "clock_set":
                self._apply_clock_set(record)
            case "sync_head":
                meta.sync_head = _encoded(record.body["details"])
            case "host_status":
                meta.host_status = _encoded(record.body["details"])
            case "alert_acknowledged":
                self._apply_acknowledgement(record)
            case _:
                pass

    def _apply_clock_set(self, record: Record) -> None:
        """Fill in true times: of what was opened in that boot, and of what became final without one."""
        details = record.body["details"]
        boot_id, offset_ms = UUID(details["boot_id"]).bytes, details["offset_ms"]
        self._touched.write()
        for row in self._transactions.all(self._sql.unsynchronised, boot_id=boot_id):
            counted = State(row.state) in SOLD
            if counted:
                self._count(row, -1)
            row.details = {**row.details, "opened_at": offset_ms + row.monotonic_ms, "corrected": True}
            self._transactions.save(row)
            if counted:
                self._count(row, 1)
        if record.synchronised:
            # Later than it was, so it is kept rather too long.
            self._run(self._sql.date_final, now=record.wall_ms)

    def _apply_acknowledgement(self, record: Record) -> None:
        row = self._touched.get(UUID(record.body["details"]["transaction"]))
        if row is not None:  # forgotten since: then nothing is left to be seen
            row.alert = False

    def _queue(
        self, sequence: int, id_: UUID, event: Event, envelope: dict[str, Any], meta: MetaRow, *, urgent: bool
    ) -> None:
        meta.last_envelope_number = max(meta.last_envelope_number, envelope["number"])
        self._outbox.insert(
            key=outbox_key(id_, event),
            transaction=id_,
            event=event.value,
            number=envelope["number"],
            urgent=urgent,
            sequence=sequence,
            sha256=envelope["sha256"],
        )

    def _answered(self, items: Iterable[OutboxRow]) -> None:
        for item in items:
            self._run(self._sql.answered_item, key=item.key)
            self._run(self._sql.answered_payload, sequence=item.sequence)

    def _move(self, row: TransactionRow, state: State, learnt: dict[str, Any], record: Record) -> None:
        """Change the state, and with it the totals."""
        change = (state in SOLD) - (State(row.state) in SOLD)
        row.state = state.value
        row.details = {**row.details, **learnt}
        row.last_sequence = record.sequence
        row.final_ms = None if state in _UNFINISHED else record.wall_ms if record.synchronised else _UNDATED
        if change:
            self._count(row, change)

    def _count(self, row: TransactionRow, change: int) -> None:
        details = row.details
        day = datetime.fromtimestamp(details["opened_at"] / 1000, UTC).date().isoformat()
        key = f"{day}/{row.currency}/{details['scheme']}"
        by_minor = change * (row.amount_minor if row.of is None else -row.amount_minor)
        with self._book() as book:
            book.count(row.number, f"{row.currency}/{details['scheme']}", change, by_minor)
        total = self._totals.get(key)
        if total is None:
            self._totals.insert(key=key, figures={"count": change, "sum": by_minor})
        else:
            figures = total.figures
            total.figures = {"count": figures["count"] + change, "sum": figures["sum"] + by_minor}
            self._totals.save(total)

    @contextmanager
    def _book(self) -> Generator[Book]:
        """The book of days; what is changed in it is saved. A ledger that had none has not ended a day."""
        row = self._totals.get(_BOOK)
        book = self._read_book(row)
        yield book
        figures = msgspec.to_builtins(book)
        if row is None:
            self._totals.insert(key=_BOOK, figures=figures)
        else:
            row.figures = figures
            self._totals.save(row)

    def _read_book(self, row: TotalRow | None) -> Book:
        return Book(sold=self._sold()) if row is None else msgspec.convert(row.figures, Book)

    def _sold(self) -> dict[str, tuple[int, int]]:
        """Everything that stands, by currency and scheme."""
        sums: dict[str, tuple[int, int]] = {}
        for total in self._day_totals():
            key = f"{total.currency.code}/{total.scheme}"
            count, minor = sums.get(key, (0, 0))
            sums[key] = count + total.count, minor + total.sum_minor
        return sums

    def _row(self, record: Record, meta: MetaRow) -> TransactionRow | None:
        """The transaction that a record goes on with. None only where the records before it are gone for good."""
        id_ = UUID(record.body["transaction"])
        row = self._touched.get(id_)
        if row is None and meta.first_sequence == 1:
            raise KeyError(id_)
        return row

    def _the_meta(self) -> MetaRow:
        meta = self._meta.get(_META_ID)
        if meta is None:
            raise LedgerCorrupt("ledger.db is not a ledger: it is rebuilt from the journal")
        return meta

    def _run(self, statement: str, **values: object) -> None:
        self._database.rows(statement, values)

    # Questions

    def transaction(self, transaction: UUID) -> Transaction | None:
        with _translated():
            row = self._transactions.get(transaction)
            return None if row is None else _transaction(row)

    def by_reference(self, reference: str) -> Transaction | None:
        with _translated():
            row = self._transactions.first(self._sql.by_tag, tag=self._tag(reference))
            return None if row is None else _transaction(row)

    def transactions(self, limit: int, before: int) -> list[Transaction]:
        """Newest first, of those with a smaller number than `before`."""
        table = self._tables.transactions
        with _translated():
            query = table.select().where(table.number < before).order_by(table.number.desc()).limit(limit)
            return [_transaction(row) for row in query]

    def in_states(self, states: Iterable[State]) -> list[Transaction]:
        table = self._tables.transactions
        with _translated():
            query = table.select().where(table.state << [state.value for state in states]).order_by(table.number)
            return [_transaction(row) for row in query]

    def at_risk(self) -> list[Transaction]:
        return self.in_states(AT_RISK)

    def unshown(self) -> list[Transaction]:
        table = self._tables.transactions
        with _translated():
            query = table.select().where(table.shown.is_null(), table.state << [state.value for state in SOLD])
            return sorted(map(_transaction, query), key=lambda transaction: transaction.number)

    def alerts(self) -> list[Transaction]:
        """What the host said no to after a customer was told yes, and nobody has acknowledged."""
        table = self._tables.transactions
        with _translated():
            query = table.select().where(table.alert == SQL("1")).order_by(table.number)
            return [_transaction(row) for row in query]

    def refunds(self, sale: UUID) -> list[Transaction]:
        """What was or is being paid back of a sale, whatever became of it."""
        table = self._tables.transactions
        with _translated():
            return [_transaction(row) for row in table.select().where(table.of == sale).order_by(table.number)]

    def standings(self, first: int, last: int, limit: int) -> list[Standing]:
        """Transactions with a number from `first` to `last`, in order, at most `limit`."""
        table = self._tables.transactions
        with _translated():
            query = table.select().where(table.number.between(first, last)).order_by(table.number).limit(limit)
            return [self._standing(_transaction(row)) for row in query]

    def first_number(self, after_sequence: int) -> int | None:
        """Of the oldest transaction that was opened after this record."""
        table = self._tables.transactions
        with _translated():
            query = table.select(fn.MIN(table.number)).where(table.opened_sequence > after_sequence)
            found: int | None = query.scalar()
            return found

    def last_number(self) -> int:
        """Of transactions, also of those that were forgotten since."""
        with _translated():
            return self._the_meta().last_number

    def last_envelope_number(self) -> int:
        with _translated():
            return self._the_meta().last_envelope_number

    def running(self) -> Running:
        with _translated():
            meta = self._the_meta()
        boot_id = None if meta.boot_id is None else UUID(bytes=meta.boot_id)
        return Running(meta.running_ms, boot_id, meta.monotonic_ms)

    def last_checkpoint(self) -> int | None:
        """The record that holds the newest checkpoint."""
        with _translated():
            return self._the_meta().last_checkpoint

    def epoch_of(self) -> dict[str, Any] | None:
        """The epoch, record and MAC that this epoch continues; None for a terminal's first."""
        with _translated():
            held = self._the_meta().epoch_of
        return None if held is None else msgspec.json.decode(held, type=dict[str, Any])

    def sync_head(self) -> dict[str, Any] | None:
        """The newest head of sync's journal that was written down: epoch, sequence, mac."""
        with _translated():
            held = self._the_meta().sync_head
        return None if held is None else msgspec.json.decode(held, type=dict[str, Any])

    def host_status(self) -> HostStatus | None:
        """What the operator's host last said of this terminal."""
        with _translated():
            held = self._the_meta().host_status
        return None if held is None else msgspec.json.decode(held, type=HostStatus)

    def countersigned(self) -> int | None:
        """The record that holds the newest checkpoint which the host has countersigned."""
        with _translated():
            return self._the_meta().countersigned

    def outbox_item(self, key: str) -> tuple[OutboxItem, tuple[bytes, bytes] | None] | None:
        """An item without its envelope, and the record and payload that hold it as long as it is there."""
        with _translated():
            row = self._outbox.get(key)
            return None if row is None else self._with_payload(row)

    def outbox(self, limit: int) -> list[tuple[OutboxItem, tuple[bytes, bytes] | None]]:
        """What is to be handed over: urgent first, then in the order of its numbers."""
        with _translated():
            found = [self._with_payload(row) for row in self._outbox.all(self._sql.to_hand_over, limit=limit)]
            return [(self._with_figures(item), payload) for item, payload in found]

    def unsent(self) -> list[Unsent]:
        outbox, transactions = self._tables.outbox, self._tables.transactions
        with _translated():
            money = SQL(f"event NOT IN ({_quoted(ASIDE)})")
            waiting = outbox.select(outbox.transaction).where(outbox.answered == False, money)  # noqa: E712 (SQL)
            rows = [_transaction(row) for row in transactions.select().where(transactions.id << waiting)]
        by_code: dict[str, list[Transaction]] = {}
        for row in rows:
            by_code.setdefault(row.amount.currency.code, []).append(row)
        return [
            Unsent(
                currency=currency(code),
                sum_minor=sum(one.signed_minor for one in some),
                count=len(some),
                oldest_wall_ms=min(one.opened_at_ms for one in some),
            )
            for code, some in sorted(by_code.items())
        ]

    def waiting_count(self) -> int:
        """Envelopes that the host has not answered and on which money hangs."""
        with _translated():
            return self._database.number(self._sql.waiting) - self._database.number(self._sql.waiting_aside)

    def waiting_transactions(self) -> set[UUID]:
        """The transactions of those envelopes."""
        with _translated():
            return {row.transaction for row in self._outbox.all(self._sql.unanswered)}

    def by_card_ref(self, card_ref: str) -> list[Transaction]:
        """The transactions of one card, by the host's name for it: the oldest ones, if they are very many."""
        with _translated():
            rows = self._transactions.all(self._sql.by_card, tag=self._card_tag(card_ref), limit=_AT_ONCE)
            return [_transaction(row) for row in rows]

    def with_card_before(self, before_ms: int, limit: int) -> list[UUID]:
        """Transactions that were final and delivered by then, and still say what card it was."""
        with _translated():
            return [row.id for row in self._transactions.all(self._sql.with_card, before=before_ms, limit=limit)]

    def totals(self) -> list[Total]:
        with _translated():
            found = self._day_totals()
        return [total for total in found if total.count]  # a wrong day keeps nothing once the true one is known

    def _day_totals(self) -> list[Total]:
        table = self._tables.totals
        query = table.select().where(table.key != _BOOK).order_by(table.key)
        return [_total(row.key, row.figures) for row in query]

    def open_day(self) -> OpenDay:
        """What has been sold since the last day's end."""
        with _translated():
            last = self._the_meta().last_number
            book = self._read_book(self._totals.get(_BOOK))
        return book.open_day(last)

    def last_batch(self) -> Batch | None:
        """The last day's end."""
        with _translated():
            book = self._read_book(self._totals.get(_BOOK))
        return book.last_batch()

    def copy(self, sequence: int) -> tuple[bytes, bytes | None] | None:
        """`Record.trimmed` and `Record.payload` of a record, as far as they are here."""
        with _translated():
            found = self._database.rows(self._sql.copy, {"sequence": sequence})
        match found:
            case []:
                return None
            case [(bytes() as trimmed, (bytes() | None) as payload)]:
                return trimmed, payload
            case _:
                raise LedgerCorrupt(_ALTERED)

    def files(self, record: Record) -> bool:
        """Whether what is said of this record besides its bytes is right: its type, and whose it is or was."""
        about = _transaction_of(record)
        right = (record.type.value, None if about is None else about.hex)
        with _translated():
            found = self._database.rows(self._sql.filed, {"sequence": record.sequence})
        return not found or found[0] in {right, (record.type.value, None)}

    def sealed_under(self) -> dict[bytes, int]:
        """How many cells are sealed under which key, by its id."""
        counts: dict[bytes, int] = {}
        with _translated():
            for model, names in self._tables.encrypted():
                for name in names:
                    for id_, count in self._database.rows(_count_by(model, getattr(model, name), 0)):
                        counts[id_] = counts.get(id_, 0) + count
        return counts

    def records_under(self) -> dict[bytes, int]:
        """How many copies of journal records are sealed under which key, by its id."""
        table = self._tables.records
        with _translated():
            return dict(self._database.rows(_count_by(table, table.trimmed, _RECORD_KEY_ID_AT)))

    # Handing over and erasing

    def mark_handed_over(self, keys: Iterable[str]) -> None:
        table = self._tables.outbox
        with _translated(), self._changing(flushed=False):
            for key in keys:
                table.update(handed_over=True).where(table.key == key).execute()

    def offer_again(self) -> None:
        table = self._tables.outbox
        with _translated(), self._changing(flushed=False):
            table.update(handed_over=False).where(table.answered == False, table.handed_over == True).execute()  # noqa: E712

    def lost_envelope(self) -> int | None:
        """The record of an envelope that the host still waits for and that is gone; None when all are there."""
        outbox, records = self._tables.outbox, self._tables.records
        with _translated():
            row = (
                outbox.select()
                .join(records, on=(records.sequence == outbox.sequence))
                .where(outbox.answered == SQL("0"), records.payload.is_null())
                .order_by(outbox.sequence)
                .first()
            )
        return None if row is None else row.sequence

    def erasable(self) -> list[int]:
        """Records whose payload the journal is to erase.

        Answered, or of a sale that was cut off before its outcome, or forgotten by `reduce`.
        """
        with _translated():
            return [sequence for (sequence,) in self._database.rows(self._sql.erasable)]

    def reclaimable(self) -> int:
        """The last record of which nothing is needed from the journal any more, and of none before it.

        What is unfinished, unshown or not erased yet needs its records from the first one on. Checkpoints do not count.
        """
        with _translated():
            needed: list[int | None] = [self._database.rows(query)[0][0] for query in self._sql.needed]
            last: int = self._the_meta().sequence
        return min([last, *(sequence - 1 for sequence in needed if sequence is not None)])

    # Forgetting, and moving to another key

    def reduce(self, transactions: Collection[UUID]) -> list[int]:
        """Forget what these say of the card. Durable on return.

        Gives the records whose payload is to be erased in journal and archive as well. `erasable` names them, too,
        until `apply` is told that it is done.
        """
        forgotten: list[int] = []
        with _translated(), self._changing():
            for id_ in transactions:
                row = self._transactions.get(id_)
                if row is None or not row.has_card:
                    continue
                row.details = {name: value for name, value in row.details.items() if name not in {"card", "card_ref"}}
                row.has_card, row.card_tag = False, None
                self._transactions.save(row)
                span = {"transaction": id_.hex, "first": row.opened_sequence, "last": row.last_sequence}
                found = self._database.rows(self._sql.with_content, span)
                for (sequence,) in found:
                    self._run(self._sql.forget_payload, sequence=sequence)
                    forgotten.append(sequence)
        return sorted(forgotten)

    def prune(self, before_ms: int, limit: int) -> int:
        """Forget transactions that were final before that time, at most `limit`; how many. The totals stay.

        Kept is what the host has not answered, what nobody has seen, what is not yet erased in the journal, a sale as
        long as one of its refunds is here, and what became final while the clock was not to be trusted. The records
        themselves stay until `drop_records`.
        """
        with _translated(), self._changing(flushed=False):
            rows = self._transactions.all(self._sql.prunable, before=before_ms, limit=limit)
            for row in rows:
                span = {"transaction": row.id.hex, "first": row.opened_sequence, "last": row.last_sequence}
                for statement in (self._sql.release_records, self._sql.delete_items, self._sql.delete_transaction):
                    self._run(statement, **span)
            self._run(self._sql.delete_checkpoints)
        return len(rows)

    def drop_records(self, through: int, limit: int = _AT_ONCE) -> int:
        """Drop the copies of records up to `through` that no transaction and no outbox needs; how many."""
        with _translated(), self._changing(flushed=False):
            found = self._database.rows(self._sql.unneeded, {"through": through, "limit": limit})
            sequences = [sequence for (sequence,) in found]
            for sequence in sequences:
                self._run(self._sql.delete_record, sequence=sequence)
        return len(sequences)

    def reseal(self, limit: int) -> int:
        """Move at most `limit` cells to the current key; how many are left under others.

        May be cut off anywhere: a cell is under one key or the other, and both are known until none is left.
        """
        cipher, left = self._database.cipher, 0
        with _translated(), self._changing(flushed=False) as meta:
            for model, names in self._tables.encrypted():
                key: Any = model._meta.primary_key
                for name in names:
                    field = getattr(model, name)
                    other = _key_id(field, 0) != SQL(":current")
                    current: dict[str, object] = {"current": cipher.current_id}
                    cells = self._database.rows(
                        compiled(model.select(key, field).where(other).limit(SQL(":limit"))), current | {"limit": limit}
                    )
                    reseal = compiled(model.update({field: SQL(":sealed")}).where(key == SQL(":key")))
                    for stored_key, sealed in cells:
                        row = str(key.python_value(stored_key))
                        place = {"table": model._meta.table_name, "column": field.column_name, "row": row}
                        self._run(reseal, sealed=cipher.seal(cipher.open(sealed, **place), **place), key=stored_key)
                    limit -= len(cells)
                    left += self._database.rows(compiled(model.select(fn.COUNT(SQL("*"))).where(other)), current)[0][0]
            if not left:
                meta.data_key_id = cipher.current_id
        return left

    # Space, and health

    def integrity(self) -> str:
        """`whole`, or what is wrong: by SQLite's word, and by the sums over all rows. Reads the whole database."""
        with _translated():
            ((said,),) = self._database.rows("PRAGMA integrity_check(1)")
            if said != "ok":
                return str(said)
            return "whole" if self._tally.is_whole() else "rows are not those that were written: it is to be rebuilt"

    def spare_pages(self) -> int:
        """Pages of the database that hold nothing."""
        with _translated():
            return self._database.spare_pages()

    def reserve(self, pages: int) -> None:
        """Let the database have so many of them, on the storage: what fits in needs no space. Raises `DiskTrouble`."""
        with _translated():
            self._database.reserve(pages)

    def _standing(self, about: Transaction) -> Standing:
        items = self._outbox.all(self._sql.of_transaction, transaction=about.id.hex)
        newest = max(items, key=lambda item: item.number, default=None)
        return Standing(
            number=about.number,
            id=about.id,
            kind=about.kind,
            of=about.of,
            amount=about.amount,
            state=about.state,
            sent=newest is not None,
            answered=newest is not None and newest.answered,
        )

    def _with_figures(self, item: OutboxItem) -> OutboxItem:
        """What whoever carries it has to know of the transaction."""
        about = self._transactions.get(item.transaction)
        if about is None:  # a checkpoint is about none
            return item
        change_minor = about.amount_minor if about.of is None else -about.amount_minor
        if item.event is Event.REVERSAL:
            change_minor = -change_minor
        return replace(item, after=about.of, change_minor=change_minor, currency=currency(about.currency))

    def _with_payload(self, row: OutboxRow) -> tuple[OutboxItem, tuple[bytes, bytes] | None]:
        item = OutboxItem(
            key=row.key,
            transaction=row.transaction,
            event=Event(row.event),
            number=row.number,
            urgent=row.urgent,
            sha256=row.sha256,
            handed_over=row.handed_over,
            answered=row.answered,
            envelope=None,
        )
        match self.copy(row.sequence):
            case (trimmed, bytes() as payload):
                return item, (trimmed, payload)
            case _:
                return item, None

    def _tag(self, reference: str | None) -> bytes | None:
        return None if reference is None else self._references.derive(reference.encode())[:_TAG_BYTES]

    def _card_tag(self, card_ref: str) -> bytes:
        return self._cards.derive(card_ref.encode())[:_TAG_BYTES]


class _Touched:
    """Transactions that the records being applied are about: read once, written once, however many records that are."""

    def __init__(self, rows: Rows[TransactionRow]) -> None:
        self._rows = rows
        self._read: dict[UUID, TransactionRow] = {}
        self._made: dict[UUID, TransactionRow] = {}

    def get(self, id_: UUID) -> TransactionRow | None:
        known = self._made.get(id_) or self._read.get(id_)
        if known is not None:
            return known
        self._bound()
        row = self._rows.get(id_)
        if row is not None:
            self._read[id_] = row
        return row

    def insert(self, **values: Any) -> TransactionRow:
        self._bound()
        row = self._rows.model(**values)
        if row.id in self._made:
            raise KeyError(row.id)
        self._made[row.id] = row
        return row

    def write(self) -> None:
        for row in self._made.values():
            self._rows.add(row)
        for row in self._read.values():
            self._rows.save(row)
        self._made.clear()
        self._read.clear()

    def _bound(self) -> None:
        if len(self._made) + len(self._read) >= _TOUCHED_MAX:
            self.write()


class _Statements:
    """What is asked or told often, or must use an index that holds little: put together once.

    A partial index is used only where the query has its very condition, so those are written out and not bound.
    """

    def __init__(self, tables: Tables) -> None:
        records, transactions, outbox = tables.records, tables.transactions, tables.outbox
        zero, one = SQL("0"), SQL("1")
        money = SQL(f"event NOT IN ({_quoted(ASIDE)})")
        aside = SQL(f"event IN ({_quoted(ASIDE)})")
        checkpoint = outbox.event == SQL(f"'{Event.CHECKPOINT}'")
        unanswered = outbox.answered == zero
        unfinished = SQL(f"state IN ({_quoted(_UNFINISHED)})")
        unshown = transactions.shown.is_null() & SQL(f"state IN ({_quoted(SOLD)})")
        this = records.sequence == SQL(":sequence")

        self.copy: Final = compiled(records.select(records.trimmed, records.payload).where(this))
        self.filed: Final = compiled(records.select(records.type, records.transaction).where(this))
        self.by_tag: Final = compiled(transactions.select().where(transactions.reference_tag == SQL(":tag")))
        self.by_card: Final = compiled(
            transactions.select()
            .where(transactions.card_tag == SQL(":tag"))
            .order_by(transactions.number)
            .limit(SQL(":limit"))
        )
        self.of_transaction: Final = compiled(outbox.select().where(outbox.transaction == SQL(":transaction")))
        self.unanswered: Final = compiled(outbox.select().where(unanswered, money))
        self.unanswered_checkpoints: Final = compiled(outbox.select().where(unanswered, checkpoint))
        counted = outbox.select(fn.COUNT(SQL("*"))).where(unanswered)
        self.waiting: Final = compiled(counted)  # by the index alone, which does not hold the event
        self.waiting_aside: Final = compiled(counted.where(aside))
        self.to_hand_over: Final = compiled(
            outbox.select()
            .where(unanswered, outbox.handed_over == zero)
            .order_by(outbox.urgent.desc(), outbox.number)
            .limit(SQL(":limit"))
        )
        self.unsynchronised: Final = compiled(
            transactions.select()
            .where(transactions.synchronised == zero, transactions.boot_id == SQL(":boot_id"))
            .order_by(transactions.number)
        )

        self.no_hurry: Final = compiled(outbox.update({outbox.urgent: zero}).where(outbox.key == SQL(":key")))
        self.answered_item: Final = compiled(outbox.update({outbox.answered: one}).where(outbox.key == SQL(":key")))
        self.answered_payload: Final = compiled(records.update({records.payload: SQL("NULL")}).where(this))
        self.erased_item: Final = compiled(
            outbox.update({outbox.erased: one}).where(outbox.sequence == SQL(":sequence"))
        )
        self.erased_payload: Final = compiled(
            records.update({records.payload: SQL("NULL"), records.forgotten: zero}).where(this)
        )
        self.forget_payload: Final = compiled(
            records.update({records.payload: SQL("NULL"), records.forgotten: one}).where(this)
        )
        self.date_final: Final = compiled(
            transactions.update({transactions.final_ms: SQL(":now")}).where(transactions.final_ms == SQL(str(_UNDATED)))
        )

        answered = outbox.select(outbox.sequence).where(outbox.answered == one, outbox.erased == zero)
        cut_off = records.select(records.sequence).where(
            records.type == SQL(str(RecordType.CARD.value)),
            records.payload.is_null(False),
            records.sequence.not_in(outbox.select(outbox.sequence)),
        )
        forgotten = records.select(records.sequence).where(records.forgotten == one)
        self.erasable: Final = " UNION ".join(map(compiled, (answered, cut_off, forgotten)))
        self.needed: Final = tuple(  # MIN(+x): by the partial indexes, not down the whole of x's own
            f"SELECT MIN(+{column}) FROM ({compiled(query)})"  # noqa: S608 (of statements made here)
            for column, query in (
                ("opened_sequence", transactions.select(transactions.opened_sequence).where(unfinished)),
                ("opened_sequence", transactions.select(transactions.opened_sequence).where(unshown)),
                ("sequence", outbox.select(outbox.sequence).where(unanswered, money)),
                ("sequence", answered),
                ("sequence", cut_off),
                ("sequence", forgotten),
            )
        )

        at_rest = ~fn.EXISTS(
            outbox.select(one).where(
                outbox.transaction == transactions.id,
                ((outbox.answered == zero) & money) | ((outbox.answered == one) & (outbox.erased == zero)),
            )
        )
        old = (transactions.final_ms > SQL(str(_UNDATED))) & (transactions.final_ms < SQL(":before"))
        by_age = transactions.final_ms
        self.with_card: Final = compiled(
            transactions.select()
            .where(transactions.has_card == one, old, at_rest)
            .order_by(by_age)
            .limit(SQL(":limit"))
        )
        refund = transactions.alias()
        refunded = fn.EXISTS(refund.select(one).where(refund.of == transactions.id, refund.of.is_null(False)))
        self.prunable: Final = compiled(
            transactions.select()
            .where(old, at_rest, ~unshown, ~refunded, transactions.alert == zero)
            .order_by(by_age)
            .limit(SQL(":limit"))
        )
        span = (
            (records.transaction == SQL(":transaction"))
            & (records.sequence >= SQL(":first"))
            & (records.sequence <= SQL(":last"))
        )
        contents = SQL(f"({RecordType.OUTCOME.value}, {RecordType.ANSWER.value})")
        self.with_content: Final = compiled(
            records.select(records.sequence).where(span, records.payload.is_null(False), records.type << contents)
        )
        self.release_records: Final = compiled(records.update({records.transaction: SQL("NULL")}).where(span))
        self.delete_items: Final = compiled(outbox.delete().where(outbox.transaction == SQL(":transaction")))
        self.delete_transaction: Final = compiled(transactions.delete().where(transactions.id == SQL(":transaction")))
        newest = outbox.alias()
        self.delete_checkpoints: Final = compiled(
            outbox.delete().where(
                SQL(f"event IN ({_quoted(OF_NO_SALE)})"),
                outbox.answered == one,
                outbox.erased == one,
                outbox.number < newest.select(fn.MAX(newest.number)).where(newest.event == outbox.event),
            )
        )
        self.unneeded: Final = compiled(
            records.select(records.sequence)
            .where(
                records.transaction.is_null(),
                records.sequence <= SQL(":through"),
                records.forgotten == zero,
                ~fn.EXISTS(outbox.select(one).where(outbox.sequence == records.sequence)),
            )
            .order_by(records.sequence)
            .limit(SQL(":limit"))
        )
        self.delete_record: Final = compiled(records.delete().where(this))


def _key_id(field: Any, at: int) -> Any:
    """The key id that stands at `at` in a sealed column."""
    return fn.SUBSTR(field, SQL(str(at + 1)), SQL(str(KEY_ID_BYTES)))


def _count_by(model: type[Model], field: Any, at: int) -> str:
    key_id = _key_id(field, at)
    return compiled(model.select(key_id, fn.COUNT(SQL("*"))).group_by(key_id))


def _quoted(words: Iterable[State | Event]) -> str:
    return ", ".join(f"'{word}'" for word in sorted(words))


def _ids(together: bytes) -> list[bytes]:
    """Key ids that stand one after the other."""
    return [bytes(together[at : at + KEY_ID_BYTES]) for at in range(0, len(together), KEY_ID_BYTES)]


def _run_on(meta: MetaRow, record: Record) -> None:
    """Add the running time since the record before. Within a boot it never goes back, whatever two threads write."""
    boot_id = record.boot_id.bytes
    since_ms = meta.monotonic_ms if meta.boot_id == boot_id else 0
    passed_ms = max(0, record.monotonic_ms - since_ms)
    meta.running_ms, meta.boot_id, meta.monotonic_ms = meta.running_ms + passed_ms, boot_id, since_ms + passed_ms


def _transaction_of(record: Record) -> UUID | None:
    """Whose record it is. An answer to a checkpoint or a batch is nobody's."""
    named = record.body.get("transaction")
    return None if named is None or record.body.get("event") in OF_NO_SALE else UUID(named)


class _Named(msgspec.Struct, frozen=True):
    """What the host calls the card."""

    card_ref: str | None


_Part = TypeVar("_Part")


def _payload_of(jws: bytes, kind: type[_Part]) -> _Part:
    """What an answer says, that was verified before it was recorded."""
    encoded = jws.split(b".")[1]
    return msgspec.json.decode(urlsafe_b64decode(encoded + b"=" * (-len(encoded) % 4)), type=kind)


def _encoded(value: dict[str, Any] | None) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()


def _transaction(row: TransactionRow) -> Transaction:
    details = row.details
    card = details.get("card")
    return Transaction(
        id=row.id,
        number=row.number,
        kind=Kind(details["kind"]),
        amount=Amount(row.amount_minor, currency(row.currency)),
        reference=details["reference"],
        opened_at_ms=details["opened_at"],
        clock_synchronised=details["clock_synchronised"],
        state=State(row.state),
        reason=details.get("reason"),
        card=None if card is None else CardSummary(**card),
        authorisation_code=details.get("authorisation_code"),
        rrn=details.get("rrn"),
        card_ref=details.get("card_ref"),
        shown=row.shown,
        corrected=details.get("corrected", False),
        running_ms=row.running_ms,
        of=row.of,
        scheme=details.get("scheme"),
    )


def _total(key: str, figures: dict[str, Any]) -> Total:
    day, code, scheme = key.split("/", 2)
    return Total(day=day, currency=currency(code), scheme=scheme, sum_minor=figures["sum"], count=figures["count"])


@contextmanager
def _translated() -> Generator[None]:
    """Translate the database's errors."""
    try:
        yield
    except (IntegrityError, sqlite3.IntegrityError) as error:
        raise LedgerCorrupt(
            "the journal records something twice: nothing was changed; keep the state directory"
        ) from error
    except (PeeweeException, sqlite3.Error, UnicodeDecodeError) as error:
        cause = getattr(error, "orig", error)
        # An error that SQLite has no number for is text that cannot be read, a value's or, in a message, the schema's.
        if getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in _DAMAGED:
            raise LedgerCorrupt(
                "ledger.db is damaged: no sale is lost, the journal holds them all; restart, and it is "
                "rebuilt from there"
            ) from error
        raise DiskTrouble.of(cause) from error

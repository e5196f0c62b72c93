"""What the journal's records mean, as rows.

`apply` is the only way that a row comes to be or changes, while selling as well as when a journal is replayed after a
power cut; so what recovery builds is what the running terminal had. Every record is applied exactly once: the
transaction that applies it stores its position. Queries are below it. The ledger's lock serialises all of this.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from peewee import IntegrityError, PeeweeException

from terminal.clock import Entropy
from terminal.ledger.errors import DiskTrouble, IllegalTransition, KeyUnavailable, LedgerCorrupt, LedgerTooNew
from terminal.ledger.fields import FieldCipher
from terminal.ledger.journal import START, Position, Record, RecordType
from terminal.ledger.keys import SecretKey
from terminal.ledger.models import READER_VERSION_MIN, SCHEMA_VERSION, LedgerDatabase, OutboxRow, Tables, TransactionRow
from terminal.ledger.states import AT_RISK, SOLD, State, advance
from terminal.ledger.values import (
    CardSummary,
    Decision,
    Event,
    Kind,
    OutboxItem,
    ReversalReason,
    Total,
    Transaction,
    Unsent,
    Verdict,
)
from terminal.money import Amount, currency

_META_ID: Final = 1
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


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
    }


class Store:
    """ledger.db. Raises `LedgerCorrupt` when SQLite finds it damaged, `DiskTrouble` when the storage fails it."""

    def __init__(self, path: Path, data: SecretKey, chain: SecretKey, entropy: Entropy) -> None:
        self._database = LedgerDatabase(path, FieldCipher(data, entropy))
        self._tables = Tables(self._database)
        self._data_key_id = data.id
        self._chain_key_id = chain.id
        self._references = SecretKey(chain.derive(b"payterm reference lookup"))

    def open(self) -> Position | None:
        """Connect; the position up to which the journal is applied, None for a database that has not begun.

        Raises `LedgerCorrupt`, `KeyUnavailable`, `LedgerTooNew`.
        """
        with _translated():
            self._database.connect()
            tables = self._database.get_tables()
            if not tables:
                return None
            meta = self._tables.meta.get_or_none() if "meta" in tables else None
        if meta is None:
            raise LedgerCorrupt("ledger.db is not a ledger: it is rebuilt from the journal")
        if meta.reader_version_min > SCHEMA_VERSION:
            raise LedgerTooNew(
                f"the ledger has form {meta.schema_version}, this release reads up to {SCHEMA_VERSION}: nothing was "
                "changed; install the newer release again"
            )
        if (bytes(meta.data_key_id), bytes(meta.chain_key_id)) != (self._data_key_id, self._chain_key_id):
            raise KeyUnavailable(
                "ledger.db was made with other keys: nothing was changed; restore the keys that belong to it"
            )
        return Position(meta.sequence, bytes(meta.mac))

    def create(self, epoch: int) -> None:
        """Make the tables, nothing applied yet."""
        with _translated(), self._database.atomic():
            self._tables.create()
            self._tables.meta.create(
                id=_META_ID,
                schema_version=SCHEMA_VERSION,
                reader_version_min=READER_VERSION_MIN,
                epoch=epoch,
                data_key_id=self._data_key_id,
                chain_key_id=self._chain_key_id,
                sequence=0,
                mac=START.mac,
            )

    def size_log(self, size_bytes: int) -> None:
        with _translated():
            self._database.size_log(size_bytes)

    def close(self) -> None:
        with _translated():
            self._database.close()

    # Applying records

    def apply(self, records: Iterable[Record], erased: Collection[int] = ()) -> int:
        """Apply records in one transaction, which also stores their position; how many. Durable on return.

        `erased` are records whose payload is durably gone from the journal.
        """
        count, last = 0, None
        with _translated(), self._database.atomic():
            for record in records:
                try:
                    self._apply(record)
                except (IllegalTransition, KeyError) as error:
                    raise LedgerCorrupt.at_record(record.sequence, "does not fit what came before it") from error
                count, last = count + 1, record
            if last is not None:
                meta = self._tables.meta
                meta.update(sequence=last.sequence, mac=last.mac).where(meta.id == _META_ID).execute()
            if erased:
                outbox, kept = self._tables.outbox, self._tables.records
                outbox.update(erased=True).where(outbox.sequence << list(erased)).execute()
                kept.update(payload=None).where(kept.sequence << list(erased)).execute()
        return count

    def _apply(self, record: Record) -> None:
        self._tables.records.create(
            sequence=record.sequence, type=record.type.value, trimmed=record.trimmed, payload=record.payload
        )
        match record.type:
            case RecordType.OPEN:
                self._insert(record)
            case RecordType.OUTCOME:
                self._apply_outcome(record)
            case RecordType.SHOWN:
                row = self._row(UUID(record.body["transaction"]))
                row.shown = record.body["screen"]
                row.save()
            case RecordType.ANSWER:
                self._apply_answer(record)
            case RecordType.REVERSAL:
                self._apply_reversal(record)
            case RecordType.CARD | RecordType.EVENT | RecordType.CHECKPOINT:
                pass  # a CARD counts with the OUTCOME that follows it

    def _insert(self, record: Record) -> TransactionRow:
        body = record.body
        row = self._tables.transactions(
            id=UUID(body["transaction"]),
            number=body["number"],
            state=State.OPENED.value,
            opened_sequence=record.sequence,
            reference_tag=self._tag(body["reference"]),
            amount_minor=body["amount"],
            currency=body["currency"],
            details={name: body[name] for name in ("kind", "reference", "opened_at", "clock_synchronised")},
        )
        row.save(force_insert=True)
        return row

    def _apply_outcome(self, record: Record) -> None:
        body = record.body
        row = self._tables.transactions.get_or_none(id=UUID(body["transaction"])) or self._insert(record)
        learnt = {"reason": body["reason"]}
        if body["card"] is not None:
            learnt["card"] = body["card"]
        decision = Decision(body["decision"])
        self._move(row, advance(State(row.state), decision.change), learnt)
        if body["envelope"] is not None:
            # CARD is written first: an OUTCOME that continues the chain has its CARD right before it.
            self._queue(record.sequence - 1, row.id, Event.AUTHORISATION, body["envelope"], decision is Decision.ONLINE)
        elif decision is Decision.ACCEPTED:
            outbox = self._tables.outbox
            key = outbox_key(row.id, Event.AUTHORISATION)
            outbox.update(urgent=False).where(outbox.key == key).execute()

    def _apply_reversal(self, record: Record) -> None:
        row = self._row(UUID(record.body["transaction"]))
        reason = ReversalReason(record.body["reason"])
        self._move(row, advance(State(row.state), reason.change), {"reason": reason.value})
        self._queue(record.sequence, row.id, Event.REVERSAL, record.body, urgent=True)

    def _apply_answer(self, record: Record) -> None:
        body = record.body
        row = self._row(UUID(body["transaction"]))
        learnt = {
            name: body[name] for name in ("reason", "authorisation_code", "rrn", "card_ref") if body[name] is not None
        }
        before, card = State(row.state), row.details.get("card")
        state = advance(before, Verdict(body["decision"]).change(before, contact=bool(card and card["contact"])))
        if state is State.REVERSING:
            learnt.pop("reason", None)  # why it is being reversed stays
        self._move(row, state, learnt)
        outbox, records = self._tables.outbox, self._tables.records
        settled = outbox.transaction == row.id
        if Event(body["event"]) is not Event.REVERSAL:  # a reversal that is done ends the authorisation's waiting, too
            settled &= outbox.event == body["event"]
        sequences = [item.sequence for item in outbox.select().where(settled)]
        outbox.update(answered=True).where(settled).execute()
        records.update(payload=None).where(records.sequence << sequences).execute()

    def _queue(self, sequence: int, transaction: UUID, event: Event, envelope: dict[str, Any], urgent: bool) -> None:
        self._tables.outbox.create(
            key=outbox_key(transaction, event),
            transaction=transaction,
            event=event.value,
            number=envelope["number"],
            urgent=urgent,
            sequence=sequence,
            sha256=envelope["sha256"],
        )

    def _move(self, row: TransactionRow, state: State, learnt: dict[str, Any]) -> None:
        """Change the state, and with it the totals."""
        before = State(row.state) in SOLD
        row.state = state.value
        row.details = {**row.details, **learnt}
        row.save()
        change = (state in SOLD) - before
        if change:
            self._count(row, change)

    def _count(self, row: TransactionRow, change: int) -> None:
        details = row.details
        day = datetime.fromtimestamp(details["opened_at"] / 1000, UTC).date().isoformat()
        key = f"{day}/{row.currency}/{details['card']['scheme']}"
        total = self._tables.totals.get_or_none(key=key)
        figures = {"count": 0, "sum": 0} if total is None else total.figures
        figures = {"count": figures["count"] + change, "sum": figures["sum"] + change * row.amount_minor}
        if total is None:
            self._tables.totals.create(key=key, figures=figures)
        else:
            total.figures = figures
            total.save()

    def _row(self, transaction: UUID) -> TransactionRow:
        row = self._tables.transactions.get_or_none(id=transaction)
        if row is None:
            raise KeyError(transaction)
        return row

    # Questions

    def transaction(self, transaction: UUID) -> Transaction | None:
        with _translated():
            row = self._tables.transactions.get_or_none(id=transaction)
        return None if row is None else _transaction(row)

    def by_reference(self, reference: str) -> Transaction | None:
        table = self._tables.transactions
        with _translated():
            row = table.get_or_none(table.reference_tag == self._tag(reference))
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

    def last_number(self) -> int:
        table = self._tables.transactions
        with _translated():
            row = table.select().order_by(table.number.desc()).first()
        return 0 if row is None else row.number

    def last_envelope_number(self) -> int:
        table = self._tables.outbox
        with _translated():
            row = table.select().order_by(table.number.desc()).first()
        return 0 if row is None else row.number

    def outbox_item(self, key: str) -> tuple[OutboxItem, tuple[bytes, bytes] | None] | None:
        """An item without its envelope, and the record and payload that hold it as long as it is there."""
        with _translated():
            row = self._tables.outbox.get_or_none(key=key)
            return None if row is None else self._with_payload(row)

    def outbox(self, limit: int) -> list[tuple[OutboxItem, tuple[bytes, bytes] | None]]:
        """What is to be handed over: urgent first, then in the order of its numbers."""
        table = self._tables.outbox
        with _translated():
            query = table.select().where(table.answered == False, table.handed_over == False)  # noqa: E712 (SQL)
            rows = list(query.order_by(table.urgent.desc(), table.number).limit(limit))
            return [self._with_payload(row) for row in rows]

    def unsent(self) -> list[Unsent]:
        outbox, transactions = self._tables.outbox, self._tables.transactions
        with _translated():
            waiting = outbox.select(outbox.transaction).where(outbox.answered == False)  # noqa: E712 (SQL)
            rows = [_transaction(row) for row in transactions.select().where(transactions.id << waiting)]
        by_code: dict[str, list[Transaction]] = {}
        for row in rows:
            by_code.setdefault(row.amount.currency.code, []).append(row)
        return [
            Unsent(
                currency=currency(code),
                sum_minor=sum(one.amount.minor for one in some),
                count=len(some),
                oldest_wall_ms=min(one.opened_at_ms for one in some),
            )
            for code, some in sorted(by_code.items())
        ]

    def waiting_count(self) -> int:
        table = self._tables.outbox
        with _translated():
            return int(table.select().where(table.answered == False).count())  # noqa: E712 (SQL)

    def totals(self) -> list[Total]:
        table = self._tables.totals
        with _translated():
            return [_total(row.key, row.figures) for row in table.select().order_by(table.key)]

    def record(self, sequence: int) -> bytes | None:
        """A record's trimmed block."""
        with _translated():
            row = self._tables.records.get_or_none(sequence=sequence)
        return None if row is None else bytes(row.trimmed)

    # Handing over and erasing

    def mark_handed_over(self, keys: Iterable[str]) -> None:
        table = self._tables.outbox
        with _translated(), self._database.unflushed():
            for key in keys:
                table.update(handed_over=True).where(table.key == key).execute()

    def offer_again(self) -> None:
        table = self._tables.outbox
        with _translated(), self._database.unflushed():
            table.update(handed_over=False).where(table.answered == False, table.handed_over == True).execute()  # noqa: E712

    def lost_envelope(self) -> int | None:
        """The record of an envelope that the host still waits for and that is gone; None when all are there."""
        outbox, records = self._tables.outbox, self._tables.records
        with _translated():
            row = (
                outbox.select()
                .join(records, on=(records.sequence == outbox.sequence))
                .where(outbox.answered == False, records.payload.is_null())  # noqa: E712 (SQL)
                .order_by(outbox.sequence)
                .first()
            )
        return None if row is None else row.sequence

    def erasable(self) -> list[int]:
        """Records whose payload the journal is to erase: answered, or of a sale that was cut off before its outcome."""
        outbox, records = self._tables.outbox, self._tables.records
        with _translated():
            answered = outbox.select().where(outbox.answered == True, outbox.erased == False)  # noqa: E712 (SQL)
            cut_off = records.select().where(
                records.type == RecordType.CARD.value,
                records.payload.is_null(False),
                records.sequence.not_in(outbox.select(outbox.sequence)),
            )
            return [row.sequence for row in (*answered, *cut_off)]

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
        record = self._tables.records.get_by_id(row.sequence)
        held = None if record.payload is None else (bytes(record.trimmed), bytes(record.payload))
        return item, held

    def _tag(self, reference: str | None) -> bytes | None:
        return None if reference is None else self._references.derive(reference.encode())[:16]


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
    )


def _total(key: str, figures: dict[str, Any]) -> Total:
    day, code, scheme = key.split("/", 2)
    return Total(day=day, currency=currency(code), scheme=scheme, sum_minor=figures["sum"], count=figures["count"])


@contextmanager
def _translated() -> Generator[None]:
    """Translate the database's errors."""
    try:
        yield
    except IntegrityError as error:
        raise LedgerCorrupt(
            "the journal records something twice: nothing was changed; keep the state directory"
        ) from error
    except (PeeweeException, sqlite3.Error) as error:
        cause = getattr(error, "orig", error)
        # An error that SQLite has no number for is a value that cannot be read.
        if getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in _DAMAGED:
            raise LedgerCorrupt(
                "ledger.db is damaged: no sale is lost, the journal holds them all; restart, and it is "
                "rebuilt from there"
            ) from error
        raise DiskTrouble.of(cause) from error

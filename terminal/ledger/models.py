"""The ledger's tables, and how their database is opened.

`records` holds the journal's bytes once more, so that journal and ledger are two full copies; the other tables say what
the records mean. The state of a transaction and what selects rows stand in plain columns, everything else is encrypted.
A register's reference is found by a keyed hash: an index over it shows neither the reference nor which sales are alike.

One process, one connection: SQLite before 3.51.3 can lose commits in WAL mode when several connections checkpoint.
`psow=0` because a power cut while a block is written may harm the block's other bytes; the log is sized once and then
overwritten in place, so that a commit is one flush.
"""

from __future__ import annotations

import types
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar
from urllib.parse import quote

from peewee import BlobField, BooleanField, IntegerField, Model, SqliteDatabase, TextField, UUIDField

from terminal.ledger.fields import EncryptedInt, EncryptedJson, EncryptedText, FieldCipher

SCHEMA_VERSION: Final = 1
READER_VERSION_MIN: Final = 1  # the oldest release form that can still read what this one writes

_PAGE_BYTES: Final = 4096

_M = TypeVar("_M", bound=Model)


class LedgerDatabase(SqliteDatabase):
    """SQLite, opened so that a commit survives the power cut that follows it."""

    def __init__(self, path: Path, cipher: FieldCipher) -> None:
        super().__init__(
            f"file:{quote(str(path))}?psow=0",
            uri=True,
            lock_type="immediate",
            thread_safe=False,  # one connection for all threads: the ledger's own lock serialises them
            check_same_thread=False,
            timeout=0,
            pragmas=[
                ("page_size", _PAGE_BYTES),
                # Before the journal mode: the log's index then lives in this process only.
                ("locking_mode", "EXCLUSIVE"),
                ("journal_mode", "WAL"),
                ("synchronous", "FULL"),
                ("secure_delete", "ON"),
                ("cell_size_check", "ON"),
                ("trusted_schema", "OFF"),
                ("temp_store", "MEMORY"),
            ],
        )
        self.cipher = cipher

    def run(self, statement: str, *values: object) -> None:
        """One statement of SQL that returns nothing."""
        self.execute_sql(statement, values)  # type: ignore[no-untyped-call]

    def size_log(self, size_bytes: int) -> None:
        """Give the log its full size, and overwrite what earlier transactions left in it."""
        with self.atomic():
            self.run("CREATE TABLE filler (zeros BLOB)")
            self.run("INSERT INTO filler VALUES (zeroblob(?))", size_bytes)
            self.run("DROP TABLE filler")
        # A quarter is left for the commit that passes the mark, so that the log starts over and never grows.
        self.run(f"PRAGMA wal_autocheckpoint = {max(1, size_bytes * 3 // 4 // _PAGE_BYTES)}")
        self.run("PRAGMA wal_checkpoint(RESTART)")

    @contextmanager
    def unflushed(self) -> Generator[None]:
        """For what may be forgotten by a power cut: commits inside become durable with the next ordinary one."""
        self.run("PRAGMA synchronous = NORMAL")
        try:
            with self.atomic():
                yield
        finally:
            self.run("PRAGMA synchronous = FULL")


class MetaRow(Model):
    """One row: which form, whose keys, and up to where the journal is applied."""

    id = IntegerField(primary_key=True)
    schema_version = IntegerField()
    reader_version_min = IntegerField()
    epoch = IntegerField()
    data_key_id = BlobField()
    chain_key_id = BlobField()
    sequence = IntegerField()
    mac = BlobField()

    class Meta:
        table_name = "meta"


class RecordRow(Model):
    """A journal record's bytes, and its payload as long as the journal has it."""

    sequence = IntegerField(primary_key=True)
    type = IntegerField()
    trimmed = BlobField()
    payload = BlobField(null=True)

    class Meta:
        table_name = "records"


class TransactionRow(Model):
    id = UUIDField(primary_key=True)
    number = IntegerField(index=True)
    state = TextField(index=True)
    opened_sequence = IntegerField()
    shown = TextField(null=True)
    reference_tag = BlobField(null=True, unique=True)
    amount_minor = EncryptedInt()
    currency = EncryptedText()
    details = EncryptedJson()

    class Meta:
        table_name = "transactions"
        only_save_dirty = True


class OutboxRow(Model):
    """What the host is asked, in the order of its numbers. The envelope itself is the payload of record `sequence`."""

    key = TextField(primary_key=True)
    transaction = UUIDField(index=True)
    event = TextField()
    number = IntegerField(unique=True)
    urgent = BooleanField()
    sequence = IntegerField(index=True)
    sha256 = TextField()
    handed_over = BooleanField(default=False)
    answered = BooleanField(default=False)
    erased = BooleanField(default=False)

    class Meta:
        table_name = "outbox"
        only_save_dirty = True


class TotalRow(Model):
    key = TextField(primary_key=True)
    figures = EncryptedJson()

    class Meta:
        table_name = "totals"
        only_save_dirty = True


class Tables:
    """The models, bound to one database: two ledgers in one process do not meet."""

    _INDEXES: ClassVar = (
        # Partial: they hold what is waiting, not the years behind it.
        "CREATE INDEX outbox_waiting ON outbox (handed_over, urgent DESC, number) WHERE answered = 0",
        "CREATE INDEX outbox_unerased ON outbox (sequence) WHERE answered = 1 AND erased = 0",
        "CREATE INDEX transactions_unshown ON transactions (state) WHERE shown IS NULL",
        "CREATE INDEX records_with_card ON records (sequence) WHERE payload IS NOT NULL AND type = 3",
    )

    def __init__(self, database: LedgerDatabase) -> None:
        self.database = database
        self.meta = _bound(MetaRow, database)
        self.records = _bound(RecordRow, database)
        self.transactions = _bound(TransactionRow, database)
        self.outbox = _bound(OutboxRow, database)
        self.totals = _bound(TotalRow, database)

    def create(self) -> None:
        self.database.create_tables([self.meta, self.records, self.transactions, self.outbox, self.totals])
        for statement in self._INDEXES:
            self.database.run(statement)


def _bound(model: type[_M], database: LedgerDatabase) -> type[_M]:
    settings: dict[str, Any] = {
        "database": database,
        "table_name": model._meta.table_name,
        "only_save_dirty": model._meta.only_save_dirty,
    }
    # peewee binds a database to a class, so each ledger gets classes of its own.
    body = {"Meta": type("Meta", (), settings)}
    bound: type[_M] = types.new_class(model.__name__, (model,), exec_body=lambda names: names.update(body))
    return bound

"""The ledger's tables, and how their database is opened.

`records` holds the journal's bytes once more, so that journal and ledger are two full copies; the other tables say what
the records mean. The state of a transaction and what selects rows stand in plain columns, everything else is encrypted.
A register's reference is found by a keyed hash: an index over it shows neither the reference nor which sales are alike.
Columns are only ever added, in `migrations`, and stand last in their model, so that a new database and an old one that
was brought up to date are alike.

peewee is the schema, and asks whatever is asked rarely. It puts its SQL together anew for each call, which takes it
longer than SQLite takes to run it: `Rows` lets it do so once.

One process, one connection: SQLite before 3.51.3 can lose commits in WAL mode when several connections checkpoint.
`psow=0` because a power cut while a block is written may harm the block's other bytes; the log is sized once and then
overwritten in place, so that a commit is one flush.
"""

from __future__ import annotations

import types
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final, Generic, TypeVar
from urllib.parse import quote

from peewee import SQL, BlobField, BooleanField, IntegerField, Model, SqliteDatabase, TextField, UUIDField

from terminal.ledger.fields import EncryptedField, EncryptedInt, EncryptedJson, EncryptedText, FieldCipher

SCHEMA_VERSION: Final = 3
READER_VERSION_MIN: Final = 3  # the oldest release form that can still read what this one writes

_PAGE_BYTES: Final = 4096
_LOG_BYTES_DEFAULT: Final = 1000 * _PAGE_BYTES  # where SQLite itself starts its log over, until `size_log` says more

_ZERO: Final = SQL("DEFAULT 0")

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
        self._log_size_bytes = _LOG_BYTES_DEFAULT

    def rollback(self) -> None:
        # On a full disk or an I/O error SQLite has already done so, and that error is the one to be told.
        if self.connection().in_transaction:  # type: ignore[no-untyped-call]
            super().rollback()

    def run(self, statement: str, *values: object) -> None:
        """One statement of SQL that returns nothing."""
        self.execute_sql(statement, values)  # type: ignore[no-untyped-call]

    def rows(self, statement: str, values: Mapping[str, object] | None = None) -> list[tuple[Any, ...]]:
        """What a statement of SQL with named values gives. Past peewee: for what is run with every sale."""
        found: list[tuple[Any, ...]] = self.connection().execute(statement, values or {}).fetchall()  # type: ignore[no-untyped-call]
        return found

    def number(self, statement: str) -> int:
        """What a statement of SQL counts."""
        return int(self.rows(statement)[0][0])

    def size_log(self, size_bytes: int) -> None:
        """Give the log its full size, and overwrite what earlier transactions left in it."""
        self._remove_filler()
        self.run("PRAGMA wal_checkpoint(RESTART)")  # from its beginning on
        with self.atomic():
            self.run("CREATE TABLE filler (zeros BLOB)")
            self.run("INSERT INTO filler VALUES (zeroblob(?))", size_bytes)
            self.run("DROP TABLE filler")
        # A quarter is left for the commit that passes the mark, so that the log starts over and never grows.
        self.run(f"PRAGMA wal_autocheckpoint = {max(1, size_bytes * 3 // 4 // _PAGE_BYTES)}")
        self.run("PRAGMA wal_checkpoint(RESTART)")
        self._log_size_bytes = size_bytes

    def clear_log(self) -> None:
        """Overwrite the log, before it is deleted: its blocks would keep what was erased from the database."""
        self.size_log(self._log_size_bytes)

    def spare_pages(self) -> int:
        """Pages of the file that hold nothing: so many can be filled before the file has to grow."""
        return self.number("PRAGMA freelist_count")

    def reserve(self, pages: int) -> None:
        """Let the file have so many spare pages, on the storage and not only in the log."""
        self._remove_filler()
        if self.spare_pages() >= pages:
            return
        piece = max(1, self._log_size_bytes // 4 // _PAGE_BYTES)  # what the log takes without growing
        try:
            self.run("CREATE TABLE filler (id INTEGER PRIMARY KEY, zeros BLOB)")
            for begin in range(0, pages, piece):  # it takes the spare pages that are there, then new ones
                size_bytes = min(piece, pages - begin) * _PAGE_BYTES
                self.run("INSERT INTO filler (zeros) VALUES (zeroblob(?))", size_bytes)
            self.run("PRAGMA wal_checkpoint(RESTART)")
        finally:
            self._remove_filler()
        self.run("PRAGMA wal_checkpoint(RESTART)")

    def _remove_filler(self) -> None:
        """Also what a call left that was cut off. Row by row, as secure_delete writes every page once more."""
        if "filler" not in self.get_tables():
            return
        while self.number("SELECT COUNT(*) FROM filler"):
            self.run("DELETE FROM filler WHERE rowid = (SELECT MAX(rowid) FROM filler)")
        self.run("DROP TABLE filler")

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
    """One row: which form, whose keys, up to where the journal is applied, and what counts on.

    The first six columns are in every form, past and to come: they say whether the rest may be read.
    """

    id = IntegerField(primary_key=True)
    schema_version = IntegerField()
    reader_version_min = IntegerField()
    epoch = IntegerField()
    data_key_id = BlobField()  # of every data key that a cell may be sealed under, one after the other
    chain_key_id = BlobField()
    sequence = IntegerField()
    mac = BlobField()
    first_sequence = IntegerField(null=True)  # the first record applied; null before that
    running_ms = IntegerField(constraints=[_ZERO], default=0)
    boot_id = BlobField(null=True)
    monotonic_ms = IntegerField(constraints=[_ZERO], default=0)
    last_number = IntegerField(constraints=[_ZERO], default=0)
    last_envelope_number = IntegerField(constraints=[_ZERO], default=0)
    last_checkpoint = IntegerField(null=True)
    countersigned = IntegerField(null=True)
    epoch_of = TextField(null=True)  # JSON, as in the first record of the epoch
    sync_head = TextField(null=True)  # JSON, as in the newest event of that name
    settled = BlobField(null=True)  # the sum over the rows that nothing happens to any more
    seal = BlobField(null=True)  # MAC over this row and the sum of all others; null: not applied to since it was made
    host_status = TextField(null=True)  # JSON, as in the newest event of that name

    class Meta:
        table_name = "meta"
        only_save_dirty = True


class RecordRow(Model):
    """A journal record's bytes, and its payload as long as the journal has it."""

    sequence = IntegerField(primary_key=True)
    type = IntegerField()
    trimmed = BlobField()
    payload = BlobField(null=True)
    transaction = UUIDField(null=True)  # null: no row here needs this record
    forgotten = BooleanField(constraints=[_ZERO], default=False)  # its payload is still to be erased in the journal

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
    last_sequence = IntegerField(constraints=[_ZERO], default=0)
    boot_id = BlobField(null=True)  # when it was opened: in which boot, how long after its start,
    monotonic_ms = IntegerField(null=True)
    running_ms = IntegerField(constraints=[_ZERO], default=0)  # and how long over all boots
    synchronised = BooleanField(constraints=[SQL("DEFAULT 1")], default=True)
    final_ms = IntegerField(null=True)  # null: not final; 0: final, but no clock said when
    has_card = BooleanField(constraints=[_ZERO], default=False)
    card_tag = BlobField(null=True)
    of = UUIDField(null=True)  # the sale that a refund is about
    alert = BooleanField(constraints=[_ZERO], default=False)  # the host has said no afterwards; nobody has seen it yet

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


class Rows(Generic[_M]):
    """One model's rows, read and written by statements that peewee has put together once.

    Values are bound by name. They go through the model's fields as always, so an encrypted cell is sealed to its row.
    """

    def __init__(self, model: type[_M]) -> None:
        meta: Any = model._meta  # peewee's stubs know little of it
        self.model: Final = model
        self._database: LedgerDatabase = meta.database
        self._key: Any = meta.primary_key
        self._fields: dict[str, Any] = {field.name: field for field in meta.sorted_fields}
        self._readers = [(name, field.python_value) for name, field in self._fields.items()]
        self._writers = [(name, field.db_value, field.default) for name, field in self._fields.items()]
        self._encrypts = any(isinstance(field, EncryptedField) for field in self._fields.values())
        self._insert, _ = model.insert({field: SQL(f":{name}") for name, field in self._fields.items()}).sql()
        self._updates: dict[tuple[str, ...], str] = {}
        self._by_key = compiled(model.select().where(self._key == SQL(":key")))

    def get(self, key: object) -> _M | None:
        return self.first(self._by_key, key=self._key.db_value(key))

    def first(self, statement: str, **values: object) -> _M | None:
        return next(iter(self.all(statement, **values)), None)

    def all(self, statement: str, **values: object) -> list[_M]:
        return [self._row(found) for found in self._database.rows(statement, values)]

    def insert(self, **values: Any) -> None:
        if self._encrypts:
            self.add(self.model(**values))  # a cell is sealed to a row, so there must be one
        else:
            bound = {name: write(values.get(name, default)) for name, write, default in self._writers}
            self._database.rows(self._insert, bound)

    def add(self, row: _M) -> None:
        """Write a row that was made outside."""
        values = {name: field.db_value(row.__data__.get(name)) for name, field in self._fields.items()}
        self._database.rows(self._insert, values)
        row._dirty.clear()  # type: ignore[attr-defined]  # the stubs leave it out

    def save(self, row: _M) -> None:
        """Write what was assigned since the row was read."""
        dirty: set[str] = row._dirty  # type: ignore[attr-defined]
        names = tuple(name for name in self._fields if name in dirty)
        if not names:
            return
        if names not in self._updates:
            changes = {self._fields[name]: SQL(f":{name}") for name in names}
            self._updates[names] = compiled(self.model.update(changes).where(self._key == SQL(":key")))
        values = {name: self._fields[name].db_value(row.__data__[name]) for name in names}
        self._database.rows(self._updates[names], values | {"key": self._key.db_value(row.__data__[self._key.name])})
        dirty.clear()

    def _row(self, found: tuple[Any, ...]) -> _M:
        values = {name: read(value) for (name, read), value in zip(self._readers, found, strict=True)}
        row = self.model(__no_default__=True, **values)
        row._dirty.clear()  # type: ignore[attr-defined]
        return row


def compiled(query: Any) -> str:
    """The SQL of a query in which every value is written as `SQL(":name")`."""
    statement, values = query.sql()
    assert not values, "a statement that is used again takes its values by name"  # noqa: S101
    return str(statement)


class Tables:
    """The models, bound to one database: two ledgers in one process do not meet."""

    _INDEXES: ClassVar = (
        # Partial: they hold what is waiting, not the years behind it.
        "CREATE INDEX outbox_waiting ON outbox (handed_over, urgent DESC, number) WHERE answered = 0",
        "CREATE INDEX outbox_unerased ON outbox (sequence) WHERE answered = 1 AND erased = 0",
        "CREATE INDEX transactions_unshown ON transactions (state) WHERE shown IS NULL",
        "CREATE INDEX records_with_card ON records (sequence) WHERE payload IS NOT NULL AND type = 3",
        'CREATE INDEX records_unneeded ON records (sequence) WHERE "transaction" IS NULL',
        "CREATE INDEX outbox_checkpoints ON outbox (number) WHERE event IN ('batch', 'checkpoint')",
        "CREATE INDEX outbox_aside ON outbox (key) WHERE answered = 0 AND event IN ('advice', 'batch', 'checkpoint')",
        "CREATE INDEX records_forgotten ON records (sequence) WHERE forgotten = 1",
        "CREATE INDEX transactions_unsynchronised ON transactions (boot_id) WHERE synchronised = 0",
        "CREATE INDEX transactions_final ON transactions (final_ms) WHERE final_ms IS NOT NULL",
        "CREATE INDEX transactions_with_card ON transactions (final_ms) WHERE has_card = 1",
        "CREATE INDEX transactions_of_card ON transactions (card_tag) WHERE card_tag IS NOT NULL",
        'CREATE INDEX transactions_of_sale ON transactions ("of") WHERE "of" IS NOT NULL',
        "CREATE INDEX transactions_alert ON transactions (number) WHERE alert = 1",
    )

    def __init__(self, database: LedgerDatabase) -> None:
        self.database = database
        self.meta = _bound(MetaRow, database)
        self.records = _bound(RecordRow, database)
        self.transactions = _bound(TransactionRow, database)
        self.outbox = _bound(OutboxRow, database)
        self.totals = _bound(TotalRow, database)

    @property
    def all(self) -> tuple[type[Model], ...]:
        return (self.meta, self.records, self.transactions, self.outbox, self.totals)

    def encrypted(self) -> Iterator[tuple[type[Model], list[str]]]:
        """Each model that has encrypted fields, with their names."""
        for model in self.all:
            fields = model._meta.sorted_fields
            if names := [field.name for field in fields if isinstance(field, EncryptedField)]:
                yield model, names

    def create(self) -> None:
        self.database.create_tables(self.all)
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

"""The host's books: one SQLite file, one connection, one transaction for each message that is taken in.

A booking, the answer that was given for it and the counter that its card used up are written together or not at all. Of
a card there is a keyed hash, whose key lies outside the file, the last four digits, and the random names that merchants
know it by. What a message means is decided elsewhere; this module only remembers.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from enum import Enum
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from hwsim.host.messages import Checkpoint, PlaceInEpoch
from hwsim.issuer import Account

TERMINALS_MAX: Final = 1_000  # in one listing
GAPS_MAX: Final = 1_000  # in one listing; a person begins with the first
_ROWID_MAX: Final = 2**63 - 1
ROWS_MAX: Final = 100_000  # what one listing returns at most; the tables themselves are the operator's to prune
_VERSION_FIRST: Final = 2  # what came before was never released
_BUSY_MS: Final = 5_000  # a command line beside a running host waits this long for a booking to finish

# The primary keys of message and booking are the promise of exactly once: the code asks first, the table insists.
_FIRST_SCHEMA: Final = """
CREATE TABLE terminal_key (
    kid TEXT PRIMARY KEY, terminal TEXT NOT NULL, merchant TEXT NOT NULL, public_pem BLOB NOT NULL
) STRICT;
CREATE TABLE account (
    card BLOB PRIMARY KEY, last4 TEXT NOT NULL, expires TEXT NOT NULL, blocked INTEGER NOT NULL, limit_minor INTEGER
) STRICT;
CREATE TABLE card_name (
    pan BLOB NOT NULL, merchant TEXT NOT NULL, card_ref TEXT NOT NULL UNIQUE, PRIMARY KEY (pan, merchant)
) STRICT;
CREATE TABLE counter (
    card BLOB NOT NULL, atc INTEGER NOT NULL, cryptogram BLOB NOT NULL, transaction_id TEXT NOT NULL,
    PRIMARY KEY (card, atc)
) STRICT;
CREATE TABLE message (
    transaction_id TEXT NOT NULL, event TEXT NOT NULL,
    terminal TEXT NOT NULL, epoch INTEGER NOT NULL, number INTEGER NOT NULL,
    envelope_sha256 TEXT NOT NULL, answer TEXT NOT NULL, received INTEGER NOT NULL, first_received_ms INTEGER NOT NULL,
    PRIMARY KEY (transaction_id, event), UNIQUE (terminal, epoch, number)
) STRICT;
CREATE TABLE booking (
    transaction_id TEXT PRIMARY KEY, terminal TEXT NOT NULL, merchant TEXT NOT NULL,
    amount INTEGER NOT NULL, currency TEXT NOT NULL, state TEXT NOT NULL, decision TEXT, reason TEXT,
    authorisation_code TEXT, rrn TEXT NOT NULL, card_ref TEXT, last4 TEXT
) STRICT;
CREATE TABLE epoch (
    terminal TEXT NOT NULL, epoch INTEGER NOT NULL, kid TEXT NOT NULL,
    of_epoch INTEGER, of_sequence INTEGER, of_mac TEXT,
    PRIMARY KEY (terminal, epoch)
) STRICT;
CREATE TABLE checkpoint (
    checkpoint_id TEXT PRIMARY KEY, terminal TEXT NOT NULL, epoch INTEGER NOT NULL, number INTEGER NOT NULL,
    sequence INTEGER NOT NULL, mac TEXT NOT NULL, payload BLOB NOT NULL, received_ms INTEGER NOT NULL,
    UNIQUE (terminal, epoch, number)
) STRICT;
CREATE INDEX checkpoint_place ON checkpoint (terminal, epoch, sequence);
CREATE TABLE fork (
    envelope_sha256 TEXT PRIMARY KEY, terminal TEXT NOT NULL, epoch INTEGER NOT NULL, number INTEGER NOT NULL,
    sequence INTEGER NOT NULL, detail TEXT NOT NULL, first_received_ms INTEGER NOT NULL, received INTEGER NOT NULL
) STRICT;
"""

# What brings the books of the version before to this one. Steps add and fill in; none drops anything. New books go
# through all of them, too, so there is one description of what a version is.
_STEPS: Final = {
    3: """
ALTER TABLE booking ADD COLUMN kind TEXT NOT NULL DEFAULT 'sale';
ALTER TABLE booking ADD COLUMN of_transaction TEXT;
ALTER TABLE booking ADD COLUMN advice TEXT;
ALTER TABLE booking ADD COLUMN sequence INTEGER;
ALTER TABLE booking ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0;
ALTER TABLE booking ADD COLUMN number INTEGER NOT NULL DEFAULT 0;
ALTER TABLE booking ADD COLUMN first_received_ms INTEGER NOT NULL DEFAULT 0;
UPDATE booking SET (epoch, number, first_received_ms) = (
    SELECT epoch, number, first_received_ms FROM message
    WHERE message.transaction_id = booking.transaction_id ORDER BY event LIMIT 1
);
CREATE INDEX booking_place ON booking (terminal, epoch, sequence);
CREATE INDEX booking_of ON booking (of_transaction) WHERE of_transaction IS NOT NULL;
CREATE INDEX booking_time ON booking (first_received_ms);
CREATE TABLE certificate (
    certificate_id TEXT PRIMARY KEY, terminal TEXT NOT NULL, envelope_sha256 TEXT NOT NULL, answer TEXT NOT NULL,
    expires_ms INTEGER, received INTEGER NOT NULL, first_received_ms INTEGER NOT NULL
) STRICT;
CREATE TABLE revocation (terminal TEXT PRIMARY KEY, revoked_ms INTEGER NOT NULL) STRICT;
CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
""",
}
SCHEMA_VERSION: Final = max(_STEPS)

_BOOKINGS: Final = """
SELECT booking.*, booking.rowid AS place,
    coalesce(own.received, 0) AS received, coalesce(undo.received, 0) AS reversals_received
FROM booking
LEFT JOIN message AS own ON own.transaction_id = booking.transaction_id
    AND own.event = CASE booking.kind WHEN 'refund' THEN 'refund' ELSE 'authorisation' END
LEFT JOIN message AS undo ON undo.transaction_id = booking.transaction_id AND undo.event = 'reversal'
"""


class StoreError(Exception):
    """The books cannot be used: nothing was booked."""


class State(Enum):
    """What has become of a transaction in the books. Only `BOOKED` is money."""

    BOOKED = "booked"
    DECLINED = "declined"
    REVERSED = "reversed"
    TOMBSTONE = "tombstone"  # reversed before the sale or refund itself came, which will be declined


@dataclass(frozen=True, slots=True)
class Booking:
    """One transaction in the books.

    `epoch`, `number` and `sequence` are those of its own envelope, or of its reversal as long as only that has come.
    """

    transaction: str
    terminal: str
    merchant: str
    amount: int  # negative for a refund
    currency: str
    state: State
    decision: Literal["approved", "declined"] | None  # None as long as only its reversal has come
    reason: str | None
    authorisation_code: str | None
    rrn: str
    card_ref: str | None
    last4: str | None
    epoch: int = 0
    number: int = 0
    first_received_ms: int = 0
    received: int = 0  # how often its own envelope came
    reversals_received: int = 0
    sequence: int | None = None  # unknown of what was booked before books of version 3
    kind: Literal["sale", "refund"] = "sale"
    of: str | None = None  # the sale that a refund is about
    advice: Literal["completed", "refused"] | None = None  # what the card said last


@dataclass(frozen=True, slots=True)
class Message:
    """An envelope taken in, with the answer that it got and always will get."""

    transaction: str
    event: str
    terminal: str
    epoch: int
    number: int
    envelope_sha256: str
    answer: str


@dataclass(frozen=True, slots=True)
class Epoch:
    """One life of a terminal's journal, and where it continues an earlier one (None: nowhere)."""

    terminal: str
    epoch: int
    kid: str
    epoch_of: PlaceInEpoch | None


@dataclass(frozen=True, slots=True)
class Fork:
    """A checkpoint that was refused because it contradicts others: a terminal's store was put back, or copied."""

    envelope: str
    terminal: str
    epoch: int
    number: int
    sequence: int
    detail: str
    first_received_ms: int
    received: int = 1


@dataclass(frozen=True, slots=True)
class Issued:
    """A request for a certificate, with the answer that it got and always will get."""

    certificate: str
    terminal: str
    envelope_sha256: str
    answer: str
    expires_ms: int | None  # None: declined


@dataclass(frozen=True, slots=True)
class Entry:
    """A booking as reconciliation compares it."""

    sequence: int
    transaction: str
    state: State
    amount: int
    currency: str


@dataclass(frozen=True, slots=True)
class DayTotal:
    """What was booked on one UTC day in one currency, by when it came: sales less refunds."""

    day: date
    currency: str
    sales: int
    refunds: int
    sum: int


@dataclass(frozen=True, slots=True)
class Gap:
    """Envelope numbers that have not come although a later one has."""

    terminal: str
    epoch: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class TerminalSummary:
    """How a terminal stands."""

    terminal: str
    merchant: str
    revoked_ms: int | None
    epoch: int | None  # of the newest envelope; None: nothing has come yet
    number: int | None
    last_received_ms: int | None
    certificate_expires_ms: int | None


@dataclass(frozen=True, slots=True)
class TerminalKey:
    """A terminal's registered signing key."""

    terminal: str
    merchant: str
    public_pem: bytes


class Store:
    """The books. Everything but `close` belongs inside `with store.transaction():`, one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_BUSY_MS / 1000)
        self._database.row_factory = sqlite3.Row
        # A rollback journal, because a command line may look into the books beside the host, and a WAL with several
        # connections is only safe since SQLite 3.51.3. Its file stays: a commit ends by overwriting the journal's
        # header and flushing it, which spares making and unlinking a file, with a flush of the directory after each.
        self._database.execute("PRAGMA journal_mode = PERSIST")
        self._database.execute("PRAGMA synchronous = EXTRA")
        try:
            with self.transaction():
                self._create(path)
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        with self._lock:
            self._database.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, durable when it ends without an exception."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _create(self, path: Path) -> None:
        """Make the books, or bring older ones to this version, having copied them first."""
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._script(_FIRST_SCHEMA)
            version = _VERSION_FIRST
        elif not _VERSION_FIRST <= version <= SCHEMA_VERSION:
            raise StoreError(
                f"{path}: books of version {version}, this host keeps version {SCHEMA_VERSION}: nothing was changed"
            )
        elif version < SCHEMA_VERSION:
            _copy(path, path.with_name(f"{path.name}.before-{SCHEMA_VERSION}"))
        for step in range(version + 1, SCHEMA_VERSION + 1):
            self._script(_STEPS[step])
        self._database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _script(self, script: str) -> None:
        for statement in script.split(";"):  # executescript would commit
            self._database.execute(statement)

    # Terminals

    def add_terminal_key(self, kid: str, key: TerminalKey) -> None:
        """Register a key; doing so again changes nothing. Raises `StoreError` if it is another terminal's."""
        known = self.terminal_key(kid)
        if known is not None and (known.terminal, known.merchant) != (key.terminal, key.merchant):
            raise StoreError(f"this key is already registered for terminal {known.terminal}: nothing was changed")
        self._database.execute(
            "INSERT OR IGNORE INTO terminal_key VALUES (?, ?, ?, ?)", (kid, key.terminal, key.merchant, key.public_pem)
        )

    def terminal_key(self, kid: str) -> TerminalKey | None:
        row = self._database.execute(
            "SELECT terminal, merchant, public_pem FROM terminal_key WHERE kid = ?", (kid,)
        ).fetchone()
        return None if row is None else TerminalKey(*row)

    def registered(self, terminal: str) -> bool:
        return self._value("SELECT 1 FROM terminal_key WHERE terminal = ?", terminal) is not None

    def revoked(self, terminal: str) -> bool:
        return self._value("SELECT 1 FROM revocation WHERE terminal = ?", terminal) is not None

    def set_revoked(self, terminal: str, revoked_ms: int | None) -> None:
        """None: it is admitted again."""
        if revoked_ms is None:
            self._database.execute("DELETE FROM revocation WHERE terminal = ?", (terminal,))
        else:
            self._database.execute("INSERT OR IGNORE INTO revocation VALUES (?, ?)", (terminal, revoked_ms))

    def configuration(self) -> str | None:
        value = self._value("SELECT value FROM setting WHERE name = 'configuration'")
        return None if value is None else str(value)

    def set_configuration(self, version: str) -> None:
        self._database.execute("INSERT OR REPLACE INTO setting VALUES ('configuration', ?)", (version,))

    def terminals(self) -> list[TerminalSummary]:
        """All that are registered, by name."""
        rows = self._database.execute(
            "SELECT terminal, max(merchant) FROM terminal_key GROUP BY terminal ORDER BY terminal LIMIT ?",
            (TERMINALS_MAX,),
        ).fetchall()
        return [self._summary(terminal, merchant) for terminal, merchant in rows]

    def _summary(self, terminal: str, merchant: str) -> TerminalSummary:
        newest = self._database.execute(
            "SELECT epoch, number, first_received_ms FROM message WHERE terminal = ? "
            "ORDER BY epoch DESC, number DESC LIMIT 1",
            (terminal,),
        ).fetchone()
        epoch, number, last_received_ms = newest or (None, None, None)
        return TerminalSummary(
            terminal=terminal,
            merchant=merchant,
            revoked_ms=self._value("SELECT revoked_ms FROM revocation WHERE terminal = ?", terminal),
            epoch=epoch,
            number=number,
            last_received_ms=last_received_ms,
            certificate_expires_ms=self._value("SELECT max(expires_ms) FROM certificate WHERE terminal = ?", terminal),
        )

    def issued(self, certificate: str) -> Issued | None:
        row = self._database.execute(
            "SELECT certificate_id, terminal, envelope_sha256, answer, expires_ms FROM certificate "
            "WHERE certificate_id = ?",
            (certificate,),
        ).fetchone()
        return None if row is None else Issued(*row)

    def add_issued(self, issued: Issued, received_ms: int) -> None:
        self._database.execute(
            "INSERT INTO certificate VALUES (?, ?, ?, ?, ?, 1, ?)",
            (
                issued.certificate,
                issued.terminal,
                issued.envelope_sha256,
                issued.answer,
                issued.expires_ms,
                received_ms,
            ),
        )

    def count_repeated_request(self, certificate: str) -> None:
        self._database.execute(
            "UPDATE certificate SET received = received + 1 WHERE certificate_id = ?", (certificate,)
        )

    # Cards

    def put_account(self, card: bytes, last4: str, account: Account) -> None:
        """Open an account, or change it. `card` is a keyed hash."""
        self._database.execute(
            "INSERT OR REPLACE INTO account VALUES (?, ?, ?, ?, ?)",
            (card, last4, account.expires.isoformat(), account.blocked, account.limit_minor),
        )

    def account(self, card: bytes) -> Account | None:
        row = self._database.execute(
            "SELECT expires, blocked, limit_minor FROM account WHERE card = ?", (card,)
        ).fetchone()
        return None if row is None else Account(date.fromisoformat(row[0]), bool(row[1]), row[2])

    def claim_counter(self, card: bytes, atc: int, cryptogram: bytes, transaction: str) -> tuple[bytes, str]:
        """The first cryptogram seen with this counter, and the transaction that it came in: these, if none was."""
        self._database.execute(
            "INSERT OR IGNORE INTO counter VALUES (?, ?, ?, ?)", (card, atc, cryptogram, transaction)
        )
        first: tuple[bytes, str] = tuple(
            self._database.execute(
                "SELECT cryptogram, transaction_id FROM counter WHERE card = ? AND atc = ?", (card, atc)
            ).fetchone()
        )
        return first

    def card_ref(self, pan: bytes, merchant: str, fresh: str) -> str:
        """The name by which a merchant knows a card: `fresh`, if it has none. `pan` is a keyed hash."""
        self._database.execute("INSERT OR IGNORE INTO card_name VALUES (?, ?, ?)", (pan, merchant, fresh))
        (name,) = self._database.execute(
            "SELECT card_ref FROM card_name WHERE pan = ? AND merchant = ?", (pan, merchant)
        ).fetchone()
        return str(name)

    # Messages and bookings

    def message(self, transaction: str, event: str) -> Message | None:
        row = self._database.execute(
            "SELECT transaction_id, event, terminal, epoch, number, envelope_sha256, answer FROM message "
            "WHERE transaction_id = ? AND event = ?",
            (transaction, event),
        ).fetchone()
        return None if row is None else Message(*row)

    def number_taken(self, terminal: str, epoch: int, number: int) -> bool:
        """Whether an envelope has come under this number."""
        row = self._database.execute(
            "SELECT 1 FROM message WHERE terminal = ? AND epoch = ? AND number = ?", (terminal, epoch, number)
        ).fetchone()
        return row is not None

    def count_repetition(self, transaction: str, event: str) -> None:
        self._database.execute(
            "UPDATE message SET received = received + 1 WHERE transaction_id = ? AND event = ?", (transaction, event)
        )

    def add_message(self, message: Message, received_ms: int) -> None:
        self._database.execute(
            "INSERT INTO message VALUES (?, ?, ?, ?, ?, ?, ?, 1, ?)",
            (
                message.transaction,
                message.event,
                message.terminal,
                message.epoch,
                message.number,
                message.envelope_sha256,
                message.answer,
                received_ms,
            ),
        )

    def next_rrn(self) -> str:
        """Retrieval reference number: twelve digits that count bookings (ISO 8583, field 37)."""
        newest = self._value("SELECT max(rowid) FROM booking") or 0
        return f"{newest + 1:012d}"

    def add_booking(self, booking: Booking) -> None:
        self._database.execute(
            "INSERT INTO booking (transaction_id, terminal, merchant, amount, currency, state, decision, reason, "
            "authorisation_code, rrn, card_ref, last4, kind, of_transaction, advice, sequence, epoch, number, "
            "first_received_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                booking.transaction,
                booking.terminal,
                booking.merchant,
                booking.amount,
                booking.currency,
                booking.state.value,
                booking.decision,
                booking.reason,
                booking.authorisation_code,
                booking.rrn,
                booking.card_ref,
                booking.last4,
                booking.kind,
                booking.of,
                booking.advice,
                booking.sequence,
                booking.epoch,
                booking.number,
                booking.first_received_ms,
            ),
        )

    def change_booking(
        self, transaction: str, state: State, decision: Literal["approved", "declined"] | None, reason: str | None
    ) -> None:
        self._database.execute(
            "UPDATE booking SET state = ?, decision = ?, reason = ? WHERE transaction_id = ?",
            (state.value, decision, reason, transaction),
        )

    def place_booking(self, transaction: str, epoch: int, number: int, sequence: int, of: str | None) -> None:
        """A tombstone has met what it stands for, which says where in the terminal's counts it belongs."""
        self._database.execute(
            "UPDATE booking SET epoch = ?, number = ?, sequence = ?, of_transaction = ? WHERE transaction_id = ?",
            (epoch, number, sequence, of, transaction),
        )

    def note_advice(self, transaction: str, outcome: Literal["completed", "refused"]) -> None:
        self._database.execute("UPDATE booking SET advice = ? WHERE transaction_id = ?", (outcome, transaction))

    def booking(self, transaction: str) -> Booking | None:
        row = self._database.execute(f"{_BOOKINGS} WHERE booking.transaction_id = ?", (transaction,)).fetchone()
        return None if row is None else _booking(row)

    def refunded(self, sale: str) -> int:
        """What has been paid back of a sale, in minor units."""
        return -int(
            self._value(
                "SELECT coalesce(sum(amount), 0) FROM booking WHERE of_transaction = ? AND state = 'booked'", sale
            )
        )

    def bookings(self) -> list[Booking]:
        """In the order in which they came."""
        rows = self._database.execute(f"{_BOOKINGS} ORDER BY booking.rowid LIMIT ?", (ROWS_MAX,))
        return [_booking(row) for row in rows]

    def page(self, before: int | None, limit: int) -> list[tuple[int, Booking]]:
        """The newest bookings, each with its place in the books; `before` is a place."""
        rows = self._database.execute(
            f"{_BOOKINGS} WHERE booking.rowid < ? ORDER BY booking.rowid DESC LIMIT ?",
            (_ROWID_MAX if before is None else before, limit),
        )
        return [(row["place"], _booking(row)) for row in rows]

    def day_totals(self, days: int) -> list[DayTotal]:
        """Of the newest days, newest first."""
        rows = self._database.execute(
            "SELECT first_received_ms / 86400000 AS day, currency, sum(kind = 'sale'), sum(kind = 'refund'), "
            "sum(amount) FROM booking WHERE state = 'booked' AND first_received_ms >= "
            "((SELECT coalesce(max(first_received_ms), 0) FROM booking) / 86400000 - ? + 1) * 86400000 "
            "GROUP BY day, currency ORDER BY day DESC, currency LIMIT ?",
            (days, ROWS_MAX),
        )
        return [DayTotal(date(1970, 1, 1) + timedelta(days=row[0]), *row[1:]) for row in rows]

    def entries(self, terminal: str, epoch: int, first: int, last: int) -> list[Entry]:
        """What has come of these transactions, in order. A range of messages.RANGE_MAX bounds it."""
        rows = self._database.execute(
            "SELECT sequence, transaction_id, state, amount, currency FROM booking "
            "WHERE terminal = ? AND epoch = ? AND sequence BETWEEN ? AND ? ORDER BY sequence, rowid LIMIT ?",
            (terminal, epoch, first, last, ROWS_MAX),
        )
        return [Entry(row[0], row[1], State(row[2]), row[3], row[4]) for row in rows]

    def gaps(self, terminal: str, epoch: int) -> list[tuple[int, int]]:
        """Numbers that have not come although a later one has, as (first, last)."""
        rows = self._database.execute(
            "WITH came AS (SELECT number, lag(number, 1, 0) OVER (ORDER BY number) AS before FROM message "
            "WHERE terminal = ? AND epoch = ?) "
            "SELECT before + 1, number - 1 FROM came WHERE number > before + 1 ORDER BY number LIMIT ?",
            (terminal, epoch, ROWS_MAX),
        )
        return [(row[0], row[1]) for row in rows]

    def all_gaps(self) -> list[Gap]:
        """The same of all terminals and epochs."""
        rows = self._database.execute(
            "WITH came AS (SELECT terminal, epoch, number, lag(number, 1, 0) OVER "
            "(PARTITION BY terminal, epoch ORDER BY number) AS before FROM message) "
            "SELECT terminal, epoch, before + 1, number - 1 FROM came WHERE number > before + 1 "
            "ORDER BY terminal, epoch, number LIMIT ?",
            (GAPS_MAX,),
        )
        return [Gap(*row) for row in rows]

    # Checkpoints

    def epoch(self, terminal: str, epoch: int) -> Epoch | None:
        return next(iter(self._epochs("terminal = ? AND epoch = ?", terminal, epoch)), None)

    def epochs_under(self, terminal: str, kid: str) -> list[Epoch]:
        """Those that were registered by this signing key."""
        return self._epochs("terminal = ? AND kid = ?", terminal, kid)

    def successors(self, terminal: str, epoch: int) -> list[Epoch]:
        """The epochs that continue this one: at most one, unless a person has registered another key since."""
        return self._epochs("terminal = ? AND of_epoch = ?", terminal, epoch)

    def add_epoch(self, epoch: Epoch) -> None:
        of = epoch.epoch_of
        place = (None, None, None) if of is None else (of.epoch, of.sequence, of.mac)
        self._database.execute(
            "INSERT INTO epoch VALUES (?, ?, ?, ?, ?, ?)", (epoch.terminal, epoch.epoch, epoch.kid, *place)
        )

    def checkpoint_before(self, terminal: str, epoch: int, number: int) -> Checkpoint | None:
        """The last one that the terminal made before its envelope of this number, as far as they have come."""
        return self._checkpoint("epoch = ? AND number < ? ORDER BY number DESC", terminal, epoch, number)

    def checkpoint_after(self, terminal: str, epoch: int, number: int) -> Checkpoint | None:
        return self._checkpoint("epoch = ? AND number > ? ORDER BY number", terminal, epoch, number)

    def checkpoint_at(self, terminal: str, epoch: int, sequence: int) -> Checkpoint | None:
        """One about this very record."""
        return self._checkpoint("epoch = ? AND sequence = ?", terminal, epoch, sequence)

    def add_checkpoint(self, checkpoint: Checkpoint, received_ms: int) -> None:
        self._database.execute(
            "INSERT INTO checkpoint VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                checkpoint.checkpoint,
                checkpoint.terminal,
                checkpoint.epoch,
                checkpoint.number,
                checkpoint.sequence,
                checkpoint.mac,
                msgspec.json.encode(checkpoint),
                received_ms,
            ),
        )

    def newest_checkpoints(self) -> list[Checkpoint]:
        """Of each terminal and epoch the one with the highest number."""
        rows = self._database.execute(
            "SELECT payload, max(number) FROM checkpoint GROUP BY terminal, epoch ORDER BY terminal, epoch LIMIT ?",
            (ROWS_MAX,),
        )
        return [msgspec.json.decode(row["payload"], type=Checkpoint) for row in rows]

    def add_fork(self, fork: Fork) -> None:
        """Remember it; one that comes again is counted."""
        self._database.execute(
            "INSERT INTO fork VALUES (?, ?, ?, ?, ?, ?, ?, 1) "
            "ON CONFLICT (envelope_sha256) DO UPDATE SET received = received + 1",
            (
                fork.envelope,
                fork.terminal,
                fork.epoch,
                fork.number,
                fork.sequence,
                fork.detail,
                fork.first_received_ms,
            ),
        )

    def forks(self) -> list[Fork]:
        """In the order in which they came."""
        rows = self._database.execute("SELECT * FROM fork ORDER BY rowid LIMIT ?", (ROWS_MAX,))
        return [Fork(*row) for row in rows]

    def _value(self, query: str, *values: object) -> Any:
        """The first column of the first row; None if there is none."""
        row = self._database.execute(query, values).fetchone()
        return None if row is None else row[0]

    def _epochs(self, where: str, *values: object) -> list[Epoch]:
        rows = self._database.execute(
            f"SELECT * FROM epoch WHERE {where} ORDER BY epoch LIMIT ?",  # noqa: S608 (our own words)
            (*values, ROWS_MAX),
        )
        return [_epoch(row) for row in rows]

    def _checkpoint(self, where: str, terminal: str, *values: int) -> Checkpoint | None:
        row = self._database.execute(
            f"SELECT payload FROM checkpoint WHERE terminal = ? AND {where} LIMIT 1",  # noqa: S608 (our own words)
            (terminal, *values),
        ).fetchone()
        return None if row is None else msgspec.json.decode(row["payload"], type=Checkpoint)


def _epoch(row: sqlite3.Row) -> Epoch:
    of = None if row["of_epoch"] is None else PlaceInEpoch(row["of_sequence"], row["of_mac"], row["of_epoch"])
    return Epoch(row["terminal"], row["epoch"], row["kid"], of)


def _booking(row: sqlite3.Row) -> Booking:
    return Booking(
        transaction=row["transaction_id"],
        terminal=row["terminal"],
        merchant=row["merchant"],
        amount=row["amount"],
        currency=row["currency"],
        state=State(row["state"]),
        decision=row["decision"],
        reason=row["reason"],
        authorisation_code=row["authorisation_code"],
        rrn=row["rrn"],
        card_ref=row["card_ref"],
        last4=row["last4"],
        epoch=row["epoch"],
        number=row["number"],
        first_received_ms=row["first_received_ms"],
        received=row["received"],
        reversals_received=row["reversals_received"],
        sequence=row["sequence"],
        kind=row["kind"],
        of=row["of_transaction"],
        advice=row["advice"],
    )


def _copy(path: Path, to: Path) -> None:
    """A copy of books that nobody is writing to, durable before it has its name."""
    if to.exists():
        return
    new = to.with_name(f"{to.name}.new")
    shutil.copyfile(path, new)
    new.chmod(0o600)
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(to)

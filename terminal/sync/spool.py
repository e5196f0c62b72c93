"""The spool: what the terminal has handed over, stored so that each item is sent under one key and with one body.

One row per (transaction, event, destination). Key and body are on the card before the first byte leaves, and no later
attempt can choose others: that is how a sale that is sent five times is booked once. The table `TRANSITIONS` is all
that can happen to a row, and `Spool.move` the only code that makes it happen. What belongs together is one durable
transaction (`together`): many uploads at once cost one flush, not one each.

A destination may follow another (`Follower`): it is told what became of a sale once the terminal has committed that.
Its rows are made here, in the transaction in which that is learnt, so that a power cut leaves both or neither.

When a row is due is counted in running time, never by the wall clock, which a Pi may have wrong by years. Running time
starts anew with each boot, so after a boot every row is due at once; that floods nobody, because the first failure
silences all the others (`breaker`). Within a boot due times outlive a restart of this process.

The model is the schema. What is asked for each item is SQL by hand: selecting by an index costs the same whether ten
rows wait or a hundred thousand. Sending is left to `step`, and what an answer is worth to the terminal.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Protocol
from uuid import UUID

import peewee

from terminal.clock import Clock, Entropy
from terminal.ledger.errors import LedgerError
from terminal.ledger.fields import EncryptedText, FieldCipher
from terminal.ledger.keys import Keyring, SecretKey
from terminal.sync.destinations import Parcel
from terminal.sync.errors import SpoolCorrupt, SpoolKeyWrong, SpoolUnavailable, Unreadable

VERSION: Final = 2  # of this file's layout
FILLER_BYTES: Final = 4_194_304  # the WAL's size before SQLite starts it again (1,000 pages), so that it never grows
DELIVERED_MAX: Final = 10_000  # finished rows kept to recognise an item that comes again: months of a small shop, 5 MB
NAMED_MAX: Final = 100_000  # finished rows kept because they hold a destination's name for a sale: refunds need it
FORGET_EVERY: Final = 64  # deliveries: old rows are removed a few at a time, never in one long breath
URGENT_ATTEMPTS_MAX: Final = 16  # more than fit into the time that a customer waits; afterwards it is backlog
ERROR_CHARACTERS_MAX: Final = 300  # enough for any message of ours
_IDEMPOTENCY_KEY_BYTES: Final = 16  # never met twice, by anybody
_TABLE: Final = "item"

_log = logging.getLogger(__name__)


class State(StrEnum):
    """Where an item stands."""

    QUEUED = "queued"  # not taken by the destination so far, surely
    SENDING = "sending"  # first attempt under way
    AMBIGUOUS = "ambiguous"  # the destination may have booked it; repeated under the same key with the same body
    ANSWERED = "answered"  # the answer is stored here, the terminal has not acknowledged it yet
    DELIVERED = "delivered"  # the terminal has committed the answer: body and answer are erased
    REFUSED = "refused"  # the destination will never take it; kept for a person
    HELD = "held"  # repeating it could book it twice, or it cannot be read; kept for a person


class On(StrEnum):
    """What happens to an item."""

    SEND = "send"
    NOT_TAKEN = "not taken"
    UNSURE = "unsure"
    ANSWER = "answer"
    REFUSE = "refuse"
    DELIVER = "deliver"
    UNDELIVERED = "undelivered"
    DISBELIEVE = "disbelieve"
    HOLD = "hold"
    OFFERED_AGAIN = "offered again"
    RETRY = "retry"
    RESTART = "restart"


# Nothing leads from ambiguous to queued: once a destination may have booked an item, no failure of a later attempt
# proves that it has not. Hence a repetition stays ambiguous while it is under way, and has no need of `sending`.
TRANSITIONS: Final[Mapping[tuple[State, On], State]] = {
    (State.QUEUED, On.SEND): State.SENDING,
    (State.SENDING, On.RESTART): State.AMBIGUOUS,  # the process died in the middle
    (State.SENDING, On.NOT_TAKEN): State.QUEUED,
    (State.SENDING, On.UNSURE): State.AMBIGUOUS,
    (State.SENDING, On.ANSWER): State.ANSWERED,
    (State.SENDING, On.REFUSE): State.REFUSED,
    (State.AMBIGUOUS, On.SEND): State.AMBIGUOUS,
    (State.AMBIGUOUS, On.NOT_TAKEN): State.AMBIGUOUS,
    (State.AMBIGUOUS, On.UNSURE): State.AMBIGUOUS,
    (State.AMBIGUOUS, On.ANSWER): State.ANSWERED,
    (State.AMBIGUOUS, On.REFUSE): State.REFUSED,
    (State.ANSWERED, On.DELIVER): State.DELIVERED,
    (State.ANSWERED, On.UNDELIVERED): State.ANSWERED,  # the terminal is there but could not take it now
    (State.ANSWERED, On.DISBELIEVE): State.AMBIGUOUS,  # not the host's word, as far as the terminal can see: ask again
    (State.QUEUED, On.HOLD): State.HELD,
    (State.AMBIGUOUS, On.HOLD): State.HELD,
    (State.DELIVERED, On.HOLD): State.HELD,
    (State.REFUSED, On.HOLD): State.HELD,
    (State.DELIVERED, On.OFFERED_AGAIN): State.AMBIGUOUS,  # the terminal has lost the answer: ask for it again
    (State.REFUSED, On.RETRY): State.AMBIGUOUS,  # by a person
    (State.HELD, On.RETRY): State.AMBIGUOUS,
}

OPEN: Final = frozenset({State.QUEUED, State.SENDING, State.AMBIGUOUS, State.ANSWERED})  # goes on by itself
SENDABLE: Final = frozenset({State.QUEUED, State.AMBIGUOUS})
APART: Final = frozenset({State.REFUSED, State.HELD})  # waits for a person, and for nothing else


class IllegalTransition(AssertionError):
    """A fault of this program: nothing was changed."""


@dataclass(frozen=True, slots=True)
class OutboxItem:
    """What the terminal hands over: a signed envelope in which the card data is sealed."""

    key: str  # "UUID/event", the terminal's name for it
    transaction: UUID
    event: str
    number: int
    urgent: bool
    envelope: str = field(repr=False)
    after: UUID | None = None  # what was sent earlier for this one must be delivered first
    amount_minor: int | None = None  # what the merchant gets by it; a refund's is negative, most events have none
    currency: str | None = None


@dataclass(frozen=True, slots=True)
class Moment:
    """A point in time as this machine knew it."""

    boot_id: str
    monotonic_ms: int
    wall_ms: int
    synchronised: bool

    @classmethod
    def now(cls, clock: Clock) -> Moment:
        return cls(str(clock.boot_id), clock.monotonic_ms(), clock.wall_ms(), clock.synchronised())

    @classmethod
    def parse(cls, text: str) -> Moment:
        boot_id, monotonic_ms, wall_ms, synchronised = text.split(" ")
        return cls(boot_id, int(monotonic_ms), int(wall_ms), synchronised == "1")

    def __str__(self) -> str:
        return f"{self.boot_id} {self.monotonic_ms} {self.wall_ms} {int(self.synchronised)}"

    def until_ms(self, later: Moment) -> int | None:
        """Time passed, or None if no clock can tell: another boot, and one of both walls was not synchronised."""
        if self.boot_id == later.boot_id:
            return later.monotonic_ms - self.monotonic_ms
        if self.synchronised and later.synchronised:
            return max(0, later.wall_ms - self.wall_ms)
        return None


@dataclass(frozen=True, slots=True)
class Told:
    """One item for a destination that follows another."""

    transaction: UUID
    event: str
    body: str = field(repr=False)
    amount_minor: int | None = None
    currency: str | None = None


class Follower(Protocol):
    """A destination that is told what became of a sale, by the envelopes and what the terminal made of the answers."""

    @property
    def name(self) -> str: ...

    def stored(self, item: OutboxItem, at: Moment) -> Sequence[Told]:
        """The terminal has handed this over."""

    def settled(self, event: str, envelope: str, state: str, at: Moment, known: frozenset[str]) -> Sequence[Told]:
        """The terminal has committed the answer: the sale is in `state` now. `known`: what was told of the sale."""

    def subject(self, event: str, envelope: str) -> UUID | None:
        """The sale that it is about; None if it is about none."""


@dataclass(frozen=True, slots=True)
class Row:
    """One item at one destination, without its contents."""

    number_here: int  # counts rows of this spool
    id: str  # "UUID/event/destination"
    key: str
    transaction: UUID
    event: str
    destination: str
    number: int
    urgent: bool
    state: State
    attempts: int
    stored: Moment
    first_attempt: Moment | None
    error: str | None
    due_ms: int
    after: UUID | None


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits for one destination."""

    queued: int = 0  # goes on by itself
    held: int = 0  # waits for a person
    sums_minor: Mapping[str, int] = field(default_factory=dict)  # of what goes on by itself, by currency code
    oldest_ms: int | None = None  # age of the oldest that goes on by itself; at least that, if no clock can tell


@dataclass(slots=True)
class _Count:
    queued: int = 0
    held: int = 0
    sums_minor: Counter[str] = field(default_factory=Counter)


class _Item(peewee.Model):
    id = peewee.TextField(primary_key=True)
    key = peewee.TextField()
    transaction = peewee.TextField()
    event = peewee.TextField()
    destination = peewee.TextField()
    number = peewee.IntegerField()
    urgent = peewee.BooleanField()
    state = peewee.TextField()
    idempotency_key = peewee.TextField()
    sha256 = peewee.TextField()  # of the envelope, to tell another one offered under the same name
    body = EncryptedText(null=True)
    answer = EncryptedText(null=True)
    attempts = peewee.IntegerField(default=0)
    due_ms = peewee.IntegerField(default=0)  # running time of the boot in `_Meta`
    stored = peewee.TextField()  # a `Moment`, as the next
    first_attempt = peewee.TextField(null=True)
    error = peewee.TextField(null=True)
    # Since layout 2; columns are only ever added, last.
    after = peewee.TextField(null=True)
    receipt = peewee.TextField(null=True)
    figures = EncryptedText(null=True)  # "1250 EUR"

    class Meta:
        table_name = _TABLE


class _Meta(peewee.Model):
    name = peewee.TextField(primary_key=True)
    value = peewee.TextField()

    class Meta:
        table_name = "meta"


def _these(states: frozenset[State]) -> str:
    return ", ".join(sorted(f"'{state.value}'" for state in states))


_IN_SENDABLE: Final = f"state IN ({_these(SENDABLE)})"
_INDEXES: Final = (
    # Partial: what waits is in them, not the months behind it. Each ends with the rowid, which is the age.
    f"CREATE INDEX IF NOT EXISTS item_sendable ON item (destination, urgent, attempts) WHERE {_IN_SENDABLE}",
    f"CREATE INDEX IF NOT EXISTS item_due ON item (destination, due_ms) WHERE {_IN_SENDABLE} AND due_ms > 0",
    f"CREATE INDEX IF NOT EXISTS item_open ON item (destination) WHERE state IN ({_these(OPEN)})",
    f"CREATE INDEX IF NOT EXISTS item_apart ON item (destination) WHERE state IN ({_these(APART)})",
    "CREATE INDEX IF NOT EXISTS item_answered ON item (urgent) WHERE state = 'answered'",
    "CREATE INDEX IF NOT EXISTS item_delivered ON item (state) WHERE state = 'delivered' AND receipt IS NULL",
    "CREATE INDEX IF NOT EXISTS item_named ON item (state) WHERE state = 'delivered' AND receipt IS NOT NULL",
    'CREATE INDEX IF NOT EXISTS item_transaction ON item ("transaction")',
    "DROP INDEX IF EXISTS item_state",  # layout 1's
)
_ADDED: Final = (
    "ALTER TABLE item ADD COLUMN after TEXT",
    "ALTER TABLE item ADD COLUMN receipt TEXT",
    "ALTER TABLE item ADD COLUMN figures BLOB",
)
_ROW: Final = (
    'rowid, id, key, "transaction", event, destination, number, urgent, state, attempts, stored, first_attempt, error, '
    "due_ms, after"
)
# An earlier item of the transaction that this one comes after is not through yet: an answer alone is not enough, since
# the terminal may not believe it. A batch comes after everything that still goes on by itself, for the host compares
# its sums with what it has then.
_FREE: Final = (
    '(after IS NULL OR NOT EXISTS (SELECT 1 FROM item AS earlier WHERE earlier."transaction" = item.after '
    "AND earlier.destination = item.destination AND earlier.rowid < item.rowid "
    "AND earlier.state <> 'delivered')) AND (event <> 'batch' OR NOT EXISTS (SELECT 1 FROM item AS "
    "earlier WHERE earlier.destination = item.destination AND earlier.rowid < item.rowid "
    "AND earlier.state IN ('queued', 'sending', 'ambiguous', 'answered')))"
)


class _Database(peewee.SqliteDatabase):
    """Lends its cipher to the encrypted fields."""

    def __init__(self, path: Path, cipher: FieldCipher) -> None:
        # psow=0: a power cut in the middle of a block may harm its other bytes, so commits must not share blocks.
        super().__init__(
            f"{path.absolute().as_uri()}?psow=0",
            uri=True,
            lock_type="immediate",
            thread_safe=False,  # one thread uses it; the one that opens it may be another
            check_same_thread=False,
            timeout=1,  # of a second process on a lock that is never released: no use in waiting
            autoconnect=False,
            pragmas={"locking_mode": "EXCLUSIVE", "journal_mode": "wal", "synchronous": "FULL", "secure_delete": 1},
        )
        self.cipher = cipher


class Spool:
    """The store. One process, one thread, one connection; a second process is turned away."""

    def __init__(
        self, directory: Path, key: SecretKey, *, clock: Clock, entropy: Entropy, followers: Sequence[Follower] = ()
    ) -> None:
        """Open or create it, and settle what an earlier process left half done. Raises `SpoolUnavailable`."""
        self._clock = clock
        self._entropy = entropy
        self._key_id = key.id.hex()
        self._followers = tuple(followers)
        self._cipher = FieldCipher(Keyring(key), entropy)
        self._counts: dict[str, _Count] | None = None
        self._inside = False
        self._deliveries = 0
        self._path = directory / "spool.db"
        _private(directory)
        self._database = _Database(self._path, self._cipher)
        try:
            with self._translated():
                self._database.connect()
                self._sql: sqlite3.Connection = self._database.connection()  # type: ignore[no-untyped-call]
                self._check()
                self._presize()
                self._recover()
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        self._database.close()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All changes inside are one durable transaction, or none of them happened."""
        if self._inside:
            yield
            return
        self._inside = True
        try:
            with self._translated():
                self._sql.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self._sql.execute("COMMIT")
                except BaseException:
                    self._counts = None  # they may be ahead of what is stored
                    if self._sql.in_transaction:
                        self._sql.execute("ROLLBACK")
                    raise
        finally:
            self._inside = False

    # ---- what comes in

    def store(self, items: Sequence[OutboxItem], destinations: Sequence[str]) -> Sequence[OutboxItem]:
        """Take items over, durably, each with its idempotency key. Returns those that were not known yet."""
        new: dict[str, OutboxItem] = {}
        now = Moment.now(self._clock)
        with self.together():
            for item in items:
                digest = hashlib.sha256(item.envelope.encode()).hexdigest()
                for destination in destinations:
                    known = self._sql.execute(
                        "SELECT id, state, sha256 FROM item WHERE id = ?", (f"{item.key}/{destination}",)
                    ).fetchone()
                    if known is not None:
                        self._offered_again(known, item, digest)
                        continue
                    new[item.key] = item
                    self._insert(item, destination, digest, now)
            for item in new.values():
                for follower in self._followers:
                    for told in follower.stored(item, now):
                        self._tell(follower.name, told, item.number, now)
        return tuple(new.values())

    def _insert(self, item: OutboxItem, destination: str, digest: str, now: Moment) -> None:
        row = f"{item.key}/{destination}"
        figures = None if item.amount_minor is None else f"{item.amount_minor} {item.currency}"
        self._sql.execute(
            'INSERT INTO item (id, key, "transaction", event, destination, number, urgent, state, idempotency_key, '
            "sha256, body, attempts, due_ms, stored, after, figures) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, 'queued', ?, ?, ?, 0, 0, ?, ?, ?)",
            (
                row,
                item.key,
                str(item.transaction),
                item.event,
                destination,
                item.number,
                item.urgent,
                self._entropy(_IDEMPOTENCY_KEY_BYTES).hex(),
                digest,
                self._seal("body", row, item.envelope),
                str(now),
                None if item.after is None else str(item.after),
                None if figures is None else self._seal("figures", row, figures),
            ),
        )
        self._count(destination, None, State.QUEUED, figures)

    def _tell(self, destination: str, told: Told, number: int, now: Moment) -> None:
        """Put in what a follower is to be told; it hears of one sale in order."""
        key = f"{told.transaction}/{told.event}"
        if self._sql.execute("SELECT 1 FROM item WHERE id = ?", (f"{key}/{destination}",)).fetchone():
            return
        digest = hashlib.sha256(told.body.encode()).hexdigest()
        item = OutboxItem(
            key,
            told.transaction,
            told.event,
            number,
            urgent=False,
            envelope=told.body,
            after=told.transaction,
            amount_minor=told.amount_minor,
            currency=told.currency,
        )
        self._insert(item, destination, digest, now)

    def _offered_again(self, known: tuple[str, str, str], item: OutboxItem, digest: str) -> None:
        """The terminal missed our receipt, or has lost the answer (restored from a backup)."""
        row_id, state, sha256 = known
        if not hmac.compare_digest(sha256, digest):
            if (State(state), On.HOLD) in TRANSITIONS:
                self.move(row_id, On.HOLD, error="the terminal has made two different envelopes for this event")
        elif State(state) is State.DELIVERED:
            self._sql.execute(
                "UPDATE item SET body = ? WHERE id = ?", (self._seal("body", row_id, item.envelope), row_id)
            )
            self.move(row_id, On.OFFERED_AGAIN, error="the terminal asks for the answer again")

    # ---- what is sent

    def parcel(self, row: Row) -> Parcel:
        """What to send for this row: the same every time. Raises `Unreadable`."""
        with self._translated():
            key, body = self._sql.execute("SELECT idempotency_key, body FROM item WHERE id = ?", (row.id,)).fetchone()
            earlier = None
            if row.after is not None:
                earlier = self._sql.execute(
                    'SELECT receipt FROM item WHERE "transaction" = ? AND destination = ? AND receipt IS NOT NULL '
                    "ORDER BY rowid LIMIT 1",
                    (str(row.after), row.destination),
                ).fetchone()
            text = self._open("body", row.id, body)
        return Parcel(row.transaction, row.event, key, text, earlier[0] if earlier else None)

    def answer(self, row: Row) -> str:
        """The stored answer. Raises `Unreadable`."""
        with self._translated():
            (sealed,) = self._sql.execute("SELECT answer FROM item WHERE id = ?", (row.id,)).fetchone()
            return self._open("answer", row.id, sealed)

    def move(
        self,
        row_id: str,
        on: On,
        *,
        due_in_ms: int = 0,
        error: str | None = None,
        answer: str | None = None,
        receipt: str | None = None,
        settled: str | None = None,
    ) -> State:
        """The only thing that changes a row: one transition, durable on return (or with `together`).

        `settled`: of a delivery, the state of the sale as the terminal has committed it. Raises `IllegalTransition`.
        """
        with self.together():
            state, event, destination, number, body, figures = self._sql.execute(
                "SELECT state, event, destination, number, body, figures FROM item WHERE id = ?", (row_id,)
            ).fetchone()
            before = State(state)
            after = TRANSITIONS.get((before, on))
            if after is None:
                raise IllegalTransition(f"{row_id}: {on.value} while {before.value}")
            changes: dict[str, object] = {
                "state": after.value,
                "due_ms": self._clock.monotonic_ms() + due_in_ms if due_in_ms else 0,
            }
            if error is not None:
                changes["error"] = error[:ERROR_CHARACTERS_MAX]
            match on:
                case On.ANSWER:
                    changes |= {"answer": self._seal("answer", row_id, answer or ""), "receipt": receipt}
                case On.DISBELIEVE:
                    changes["answer"] = None
                case On.DELIVER:
                    if settled is not None and body is not None:
                        self._settled(row_id, event, body, settled, number)
                    changes |= {"body": None, "answer": None, "error": None}
                case _:
                    pass
            if on is On.RETRY:
                changes["first_attempt"] = None  # a person has looked: what was too old to be repeated counts anew
            if after is State.QUEUED:
                changes["first_attempt"] = None  # nothing of it can have arrived: its age begins with the next attempt
            names = ", ".join(f"{name} = :{name}" for name in changes)
            if on is On.SEND:
                names += ", attempts = attempts + 1, first_attempt = coalesce(first_attempt, :now)"
                changes["now"] = str(Moment.now(self._clock))
            self._sql.execute(
                f"UPDATE item SET {names} WHERE id = :id",  # noqa: S608 - names of columns
                changes | {"id": row_id},
            )
            if (before in OPEN, before in APART) != (after in OPEN, after in APART):
                text = None if figures is None else self._open("figures", row_id, figures)
                self._count(destination, before, after, text)
            if after is State.DELIVERED:
                self._forget_delivered()
        _log.debug("%s: %s, %s -> %s%s", row_id, on.value, before.value, after.value, f" ({error})" if error else "")
        return after

    def _settled(self, row_id: str, event: str, sealed: bytes, state: str, number: int) -> None:
        now = Moment.now(self._clock)
        for follower in self._followers:
            try:
                envelope = self._open("body", row_id, sealed)
            except LedgerError:
                _log.error("%s: its envelope is damaged, %s is not told of it", row_id, follower.name)
                return
            sale = follower.subject(event, envelope)
            if sale is None:
                continue
            known = frozenset(
                found
                for (found,) in self._sql.execute(
                    'SELECT event FROM item WHERE "transaction" = ? AND destination = ?', (str(sale), follower.name)
                )
            )
            for told in follower.settled(event, envelope, state, now, known):
                self._tell(follower.name, told, number, now)

    def to_send(
        self,
        destination: str,
        limit: int,
        *,
        without: Collection[str] = (),
        urgent_only: bool = False,
        fresh_only: bool = False,
    ) -> list[Row]:
        """The most urgent rows that are due, but for those that are under way (`without`).

        `urgent_only`: what a customer waits for; `fresh_only`: of that, what was never tried. Urgent ones come newest
        first, for that customer stands at the terminal; the backlog oldest first. Before both counts how often an item
        was tried: those that a destination chokes on fall behind the others.
        """
        if limit <= 0:
            return []
        now_ms = self._clock.monotonic_ms()
        wanted = limit + len(without)
        select = (
            f"SELECT {_ROW} FROM item WHERE destination = ? AND {_IN_SENDABLE} "  # noqa: S608
            f"AND urgent = ? AND attempts BETWEEN ? AND ? AND due_ms <= ? AND ({_FREE}) "
            "ORDER BY attempts, rowid {} LIMIT ?"
        )
        last = 0 if fresh_only else URGENT_ATTEMPTS_MAX - 1
        with self._translated():
            found = self._sql.execute(select.format("DESC"), (destination, 1, 0, last, now_ms, wanted)).fetchall()
            if not (urgent_only or fresh_only) and len(found) < wanted:
                backlog = [
                    *self._sql.execute(select.format("ASC"), (destination, 0, 0, 2**31, now_ms, wanted)),
                    *self._sql.execute(
                        select.format("ASC"), (destination, 1, URGENT_ATTEMPTS_MAX, 2**31, now_ms, wanted)
                    ),
                ]
                found += sorted(backlog, key=lambda row: (row[9], row[0]))
        rows = (_row(values) for values in found)
        return [row for row in rows if row.id not in without][:limit]

    def to_deliver(self, limit: int, *, without: Collection[str] = ()) -> list[Row]:
        """The most urgent rows whose answer should go to the terminal now."""
        with self._translated():
            found = self._sql.execute(
                f"SELECT {_ROW} FROM item WHERE state = 'answered' AND due_ms <= ? "  # noqa: S608
                "ORDER BY urgent DESC, rowid LIMIT ?",
                (self._clock.monotonic_ms(), limit + len(without)),
            ).fetchall()
        return [row for row in map(_row, found) if row.id not in without][:limit]

    def next_due_ms(self, destination: str) -> int | None:
        """When the next row that was put off is due, in running time of this boot."""
        with self._translated():
            (due_ms,) = self._sql.execute(
                f"SELECT MIN(due_ms) FROM item WHERE destination = ? AND {_IN_SENDABLE} "  # noqa: S608
                "AND due_ms > ? AND due_ms > 0",
                (destination, self._clock.monotonic_ms()),
            ).fetchone()
        return due_ms  # type: ignore[no-any-return]

    def next_delivery_ms(self) -> int | None:
        """When the next answer that the terminal could not take is due again."""
        with self._translated():
            (due_ms,) = self._sql.execute("SELECT MIN(due_ms) FROM item WHERE state = 'answered'").fetchone()
        return due_ms  # type: ignore[no-any-return]

    # ---- what people ask

    def state(self, row_id: str) -> State:
        with self._translated():
            (found,) = self._sql.execute("SELECT state FROM item WHERE id = ?", (row_id,)).fetchone()
        return State(found)

    def row(self, row_id: str) -> Row | None:
        with self._translated():
            found = self._sql.execute(f"SELECT {_ROW} FROM item WHERE id = ?", (row_id,)).fetchone()  # noqa: S608
        return None if found is None else _row(found)

    def rows(self, *, limit: int = 1_000) -> Sequence[Row]:
        """What is not delivered, oldest first. Nothing waits that is not listed here; `waiting` counts all of it."""
        return self.page(limit)

    def page(
        self,
        limit: int,
        *,
        after: int = 0,
        destination: str | None = None,
        states: frozenset[State] = OPEN | APART,
    ) -> Sequence[Row]:
        """A part of the list, oldest first, from behind row `after` on."""
        where, values = "", [after]
        if destination is not None:
            where, values = " AND destination = ?", [after, destination]  # type: ignore[list-item]
        with self._translated():
            found = self._sql.execute(
                f"SELECT {_ROW} FROM item WHERE rowid > ? AND state IN ({_these(states)}){where} "  # noqa: S608
                "ORDER BY rowid LIMIT ?",
                (*values, limit),
            ).fetchall()
        return tuple(_row(values) for values in found)

    def figures(self, row: Row) -> tuple[int, str] | None:
        """Amount in minor units and currency code, if the item has any."""
        with self._translated():
            (sealed,) = self._sql.execute("SELECT figures FROM item WHERE id = ?", (row.id,)).fetchone()
            if sealed is None:
                return None
            amount, _, code = self._open("figures", row.id, sealed).partition(" ")
        return int(amount), code

    def particulars(self, row: Row) -> tuple[str, str, bool, str | None]:
        """Digest of the body, digest of the key, whether an answer is stored, and the destination's name for it."""
        with self._translated():
            sha256, key, answered, receipt = self._sql.execute(
                "SELECT sha256, idempotency_key, answer IS NOT NULL, receipt FROM item WHERE id = ?", (row.id,)
            ).fetchone()
        return sha256, hashlib.sha256(key.encode()).hexdigest(), bool(answered), receipt

    def told(self, transaction: UUID, destination: str) -> Sequence[Row]:
        """Everything that is known of a transaction at a destination, delivered or not."""
        with self._translated():
            found = self._sql.execute(
                f'SELECT {_ROW} FROM item WHERE "transaction" = ? AND destination = ? ORDER BY rowid',  # noqa: S608
                (str(transaction), destination),
            ).fetchall()
        return tuple(_row(values) for values in found)

    def waiting(self, destination: str) -> Waiting:
        """What waits for this destination: kept count of, not counted anew."""
        count = self._counted().get(destination, _Count())
        with self._translated():
            oldest = self._sql.execute(
                f"SELECT stored FROM item WHERE destination = ? AND state IN ({_these(OPEN)}) "  # noqa: S608
                "ORDER BY rowid LIMIT 1",
                (destination,),
            ).fetchone()
        return Waiting(
            count.queued,
            count.held,
            {code: sum_minor for code, sum_minor in sorted(count.sums_minor.items()) if sum_minor},
            None if oldest is None else self._age_ms(Moment.parse(oldest[0])),
        )

    def destinations(self) -> Sequence[str]:
        """Those that something waits for, configured or not."""
        return sorted(name for name, count in self._counted().items() if count.queued or count.held)

    def retry(self, row_id: str, reason: str) -> None:
        """A person wants a refused or held item sent again, under its old key. The reason is kept with it."""
        self.move(row_id, On.RETRY, error=f"sent again by hand: {reason}")

    def hold(self, row_id: str, reason: str) -> None:
        """A person wants an item not to be sent for now. The reason is kept with it."""
        self.move(row_id, On.HOLD, error=f"held by hand: {reason}")

    def hurry(self) -> None:
        """Nothing that is to be sent waits for its own turn any more."""
        with self.together():
            self._sql.execute(f"UPDATE item SET due_ms = 0 WHERE {_IN_SENDABLE} AND due_ms > 0")  # noqa: S608

    def remembered(self, name: str) -> str | None:
        """A note of this service for itself."""
        with self._translated():
            found = self._sql.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if found is None else found[0]

    def remember(self, name: str, value: str) -> None:
        with self.together():
            self._sql.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    # ---- counts

    def _count(self, destination: str, before: State | None, after: State, figures: str | None) -> None:
        if self._counts is None:
            return
        count = self._counts.setdefault(destination, _Count())
        amount, _, code = (figures or "0 ").partition(" ")
        for state, by in ((before, -1), (after, 1)):
            if state in OPEN:
                count.queued += by
                if code:
                    count.sums_minor[code] += by * int(amount)
            elif state in APART:
                count.held += by

    def _counted(self) -> dict[str, _Count]:
        if self._counts is None:
            self._counts = {}
            with self._translated():
                found = self._sql.execute(
                    f"SELECT id, destination, state, figures FROM item WHERE state IN ({_these(OPEN | APART)})"  # noqa: S608
                )
                for row_id, destination, state, sealed in found:
                    figures = None if sealed is None else self._open("figures", row_id, sealed)
                    self._count(destination, None, State(state), figures)
        return self._counts

    def _age_ms(self, moment: Moment) -> int:
        now = Moment.now(self._clock)
        age_ms = moment.until_ms(now)
        return now.monotonic_ms if age_ms is None else age_ms  # it is older than this boot

    # ---- cells

    def _seal(self, column: str, row_id: str, text: str) -> bytes:
        return self._cipher.seal(text.encode(), table=_TABLE, column=column, row=row_id)

    def _open(self, column: str, row_id: str, sealed: bytes | None) -> str:
        if sealed is None:
            raise Unreadable("what was stored of it is erased; the terminal's ledger has this sale")
        return self._cipher.open(sealed, table=_TABLE, column=column, row=row_id).decode()

    # ---- the file

    def _forget_delivered(self) -> None:
        self._deliveries += 1
        if self._deliveries % FORGET_EVERY:
            return
        (newest,) = self._sql.execute("SELECT MAX(rowid) FROM item").fetchone()
        for receipt, kept in (("IS NULL", DELIVERED_MAX), ("IS NOT NULL", NAMED_MAX)):
            self._sql.execute(
                "DELETE FROM item WHERE rowid IN (SELECT rowid FROM item "  # noqa: S608
                f"WHERE state = 'delivered' AND receipt {receipt} AND rowid <= ? ORDER BY rowid LIMIT ?)",
                (newest - kept, 2 * FORGET_EVERY),
            )

    def _presize(self) -> None:
        """Write the WAL to its full size at each start: a growing one costs a second flush for every commit.

        It also overwrites what an earlier run has left in it of erased rows.
        """
        with self.together():
            self._sql.execute("CREATE TABLE filler (bytes BLOB)")
            self._sql.execute("INSERT INTO filler VALUES (zeroblob(?))", (FILLER_BYTES,))
            self._sql.execute("DROP TABLE filler")
        self._sql.execute("PRAGMA wal_checkpoint(RESTART)")

    def _check(self) -> None:
        (verdict,) = self._sql.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise SpoolCorrupt(
                "the spool is damaged: nothing is sent and nothing was changed. The terminal's ledger has every sale; "
                "set spool.db aside and have the sales offered again"
            )
        version = self._version()
        if version > VERSION:
            raise SpoolCorrupt(
                f"the spool has layout {version}, this program knows {VERSION}: nothing is sent and "
                "nothing was changed. Install the newer version again"
            )
        if 0 < version < VERSION:
            self._keep_copy(version)
        with self.together():
            if 0 < version < VERSION:
                for statement in _ADDED:
                    self._sql.execute(statement)
            with self._database.bind_ctx([_Item, _Meta]):
                self._database.create_tables([_Item, _Meta])
            for statement in _INDEXES:
                self._sql.execute(statement)
            self._sql.execute("INSERT OR REPLACE INTO meta VALUES ('version', ?)", (str(VERSION),))
            self._sql.execute("INSERT OR IGNORE INTO meta VALUES ('key', ?)", (self._key_id,))
            (key,) = self._sql.execute("SELECT value FROM meta WHERE name = 'key'").fetchone()
            if key != self._key_id:
                raise SpoolKeyWrong(
                    "the spool was written with another key: nothing is sent and nothing is lost. "
                    "Restore the credential spool-key"
                )

    def _version(self) -> int:
        """0 of a new file."""
        if not self._sql.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            return 0
        found = self._sql.execute("SELECT value FROM meta WHERE name = 'version'").fetchone()
        return 0 if found is None else int(found[0])

    def _keep_copy(self, version: int) -> None:
        """What an upgrade changes is copied first, and the copy is left there."""
        copy = self._path.with_suffix(f".layout-{version}")
        self._sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        try:
            shutil.copyfile(self._path, copy)
            copy.chmod(0o600)
            for path in (copy, copy.parent):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise SpoolUnavailable(
                f"the spool cannot be copied before its upgrade ({error.strerror}): nothing is sent, nothing was "
                "changed. Make room for a second copy of it"
            ) from error

    def _recover(self) -> None:
        boot = str(self._clock.boot_id)
        with self.together():
            if self.remembered("boot") != boot:
                self._sql.execute("UPDATE item SET due_ms = 0 WHERE due_ms <> 0")
                self.remember("boot", boot)
            cut_short = self._sql.execute("SELECT id FROM item WHERE state = 'sending'").fetchall()
            for (row_id,) in cut_short:
                self.move(row_id, On.RESTART, error="stopped in the middle of sending")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except LedgerError as error:
            raise Unreadable("what is stored of it is damaged; the terminal's ledger has this sale") from error
        except (peewee.OperationalError, sqlite3.OperationalError) as error:
            raise SpoolUnavailable(
                f"the spool cannot be used ({error}): nothing is sent, everything stays stored. "
                "Is another payterm-sync running, or the disk full?"
            ) from error
        except (peewee.DatabaseError, sqlite3.DatabaseError) as error:
            raise SpoolCorrupt(
                f"the spool is damaged ({error}): nothing is sent and nothing was changed. The terminal's ledger has "
                "every sale; set spool.db aside and have the sales offered again"
            ) from error


def _private(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = directory.stat().st_mode & 0o777
        (directory / "spool.db").touch(mode=0o600)
    except OSError as error:
        raise SpoolUnavailable(f"{directory}: {error.strerror}. Nothing is sent, everything stays stored") from error
    if mode & 0o077:
        raise SpoolUnavailable(
            f"{directory} is open to other users (mode {mode:o}): nothing is sent. chmod 700 it, owned by the sync user"
        )


def _row(values: Sequence[Any]) -> Row:
    (
        number_here,
        row_id,
        key,
        transaction,
        event,
        destination,
        number,
        urgent,
        state,
        attempts,
        stored,
        first_attempt,
        error,
        due_ms,
        after,
    ) = values
    return Row(
        number_here=number_here,
        id=row_id,
        key=key,
        transaction=UUID(transaction),
        event=event,
        destination=destination,
        number=number,
        urgent=bool(urgent),
        state=State(state),
        attempts=attempts,
        stored=Moment.parse(stored),
        first_attempt=None if first_attempt is None else Moment.parse(first_attempt),
        error=error,
        due_ms=due_ms,
        after=None if after is None else UUID(after),
    )

"""The spool: what the terminal has handed over, stored so that each item is sent under one key and with one body.

One row per (transaction, event, destination). Key and body are on the card before the first byte leaves, and no later
attempt can choose others: that is how a sale that is sent five times is booked once. The table `TRANSITIONS` is all
that can happen to a row, and `Spool.move` the only code that makes it happen; each move is one durable transaction.

When a row is due is counted in running time, never by the wall clock, which a Pi may have wrong by years. Running time
starts anew with each boot, so after a boot every row is due at once; that floods nobody, because the first failure
silences all the others (`step`). Within a boot due times outlive a restart of this process.

Sending is left to `step`, and what an answer is worth to the terminal.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import peewee

from terminal.clock import Clock, Entropy
from terminal.ledger.errors import LedgerError
from terminal.ledger.fields import EncryptedText, FieldCipher
from terminal.ledger.keys import Keyring, SecretKey
from terminal.sync.destinations import Parcel
from terminal.sync.errors import SpoolCorrupt, SpoolKeyWrong, SpoolUnavailable, Unreadable

VERSION: Final = 1  # of this file's layout
FILLER_BYTES: Final = 4_194_304  # the WAL's size before SQLite starts it again (1,000 pages), so that it never grows
DELIVERED_MAX: Final = 10_000  # finished rows kept to recognise an item that comes again: months of a small shop, 5 MB
URGENT_ATTEMPTS_MAX: Final = 16  # more than fit into the time that a customer waits; afterwards it is backlog
ERROR_CHARACTERS_MAX: Final = 300  # enough for any message of ours
_IDEMPOTENCY_KEY_BYTES: Final = 16  # never met twice, by anybody

_log = logging.getLogger(__name__)


class State(Enum):
    """Where an item stands."""

    QUEUED = "queued"  # not taken by the destination so far, surely
    SENDING = "sending"  # first attempt under way
    AMBIGUOUS = "ambiguous"  # the destination may have booked it; repeated under the same key with the same body
    ANSWERED = "answered"  # the answer is stored here, the terminal has not acknowledged it yet
    DELIVERED = "delivered"  # the terminal has committed the answer: body and answer are erased
    REFUSED = "refused"  # the destination will never take it; kept for a person
    HELD = "held"  # repeating it could book it twice, or it cannot be read; kept for a person


class On(Enum):
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

    def until_ms(self, later: Moment) -> int | None:
        """Time passed, or None if no clock can tell: another boot, and one of both walls was not synchronised."""
        if self.boot_id == later.boot_id:
            return later.monotonic_ms - self.monotonic_ms
        if self.synchronised and later.synchronised:
            return max(0, later.wall_ms - self.wall_ms)
        return None


@dataclass(frozen=True, slots=True)
class Row:
    """One item at one destination, without its contents."""

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


@dataclass(frozen=True, slots=True)
class Summary:
    """What waits."""

    queued: int  # goes on by itself
    held: int  # waits for a person
    oldest_ms: int | None  # age of the oldest that goes on by itself; at least that, if no clock can tell


class _MomentField(peewee.TextField):
    def db_value(self, value: Moment | None) -> str | None:
        if value is None:
            return None
        return f"{value.boot_id} {value.monotonic_ms} {value.wall_ms} {int(value.synchronised)}"

    def python_value(self, value: str | None) -> Moment | None:
        if value is None:
            return None
        boot_id, monotonic_ms, wall_ms, synchronised = value.split(" ")
        return Moment(boot_id, int(monotonic_ms), int(wall_ms), synchronised == "1")


class _Item(peewee.Model):
    id = peewee.TextField(primary_key=True)
    key = peewee.TextField()
    transaction = peewee.TextField()
    event = peewee.TextField()
    destination = peewee.TextField()
    number = peewee.IntegerField()
    urgent = peewee.BooleanField()
    state = peewee.TextField(index=True)
    idempotency_key = peewee.TextField()
    sha256 = peewee.TextField()  # of the envelope, to tell another one offered under the same name
    body = EncryptedText(null=True)
    answer = EncryptedText(null=True)
    attempts = peewee.IntegerField(default=0)
    due_ms = peewee.IntegerField(default=0)  # running time of the boot in `_Meta`
    stored = _MomentField()
    first_attempt = _MomentField(null=True)
    error = peewee.TextField(null=True)

    class Meta:
        table_name = "item"
        only_save_dirty = True  # a change of state must not write the body again


class _Meta(peewee.Model):
    name = peewee.TextField(primary_key=True)
    value = peewee.TextField()

    class Meta:
        table_name = "meta"


class _Database(peewee.SqliteDatabase):
    """Lends its cipher to the encrypted fields."""

    def __init__(self, path: Path, cipher: FieldCipher) -> None:
        # psow=0: a power cut in the middle of a block may harm its other bytes, so commits must not share blocks.
        super().__init__(
            f"{path.absolute().as_uri()}?psow=0",
            uri=True,
            lock_type="immediate",
            timeout=1,  # of a second process on a lock that is never released: no use in waiting
            autoconnect=False,
            pragmas={"locking_mode": "EXCLUSIVE", "journal_mode": "wal", "synchronous": "FULL", "secure_delete": 1},
        )
        self.cipher = cipher

    def execute_sql(self, sql: str, params: Sequence[object] | None = None) -> Any:
        return super().execute_sql(sql, params)  # type: ignore[no-untyped-call]


class Spool:
    """The store. One process, one thread, one connection; a second process is turned away."""

    def __init__(self, directory: Path, key: SecretKey, *, clock: Clock, entropy: Entropy) -> None:
        """Open or create it, and settle what an earlier process left half done. Raises `SpoolUnavailable`."""
        self._clock = clock
        self._entropy = entropy
        self._key_id = key.id.hex()
        _private(directory)
        self._database = _Database(directory / "spool.db", FieldCipher(Keyring(key), entropy))
        try:
            with self._translated():
                self._database.connect()
                self._check()
                self._presize()
                self._recover()
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        self._database.close()

    def store(self, items: Sequence[OutboxItem], destinations: Sequence[str]) -> Sequence[OutboxItem]:
        """Take items over, durably, each with its idempotency key. Returns those that were not known yet."""
        new: dict[str, OutboxItem] = {}
        now = Moment.now(self._clock)
        with self._transaction():
            for item in items:
                digest = hashlib.sha256(item.envelope.encode()).hexdigest()
                for destination in destinations:
                    row = f"{item.key}/{destination}"
                    known = _Item.get_or_none(_Item.id == row)
                    if known is not None:
                        self._offered_again(known, item, digest)
                        continue
                    new[item.key] = item
                    _Item.create(
                        id=row,
                        key=item.key,
                        transaction=str(item.transaction),
                        event=item.event,
                        destination=destination,
                        number=item.number,
                        urgent=item.urgent,
                        state=State.QUEUED.value,
                        idempotency_key=self._entropy(_IDEMPOTENCY_KEY_BYTES).hex(),
                        sha256=digest,
                        body=item.envelope,
                        stored=now,
                    )
        return tuple(new.values())

    def parcel(self, row: Row) -> Parcel:
        """What to send for this row: the same every time. Raises `Unreadable`."""
        with self._translated():
            item = _Item.get_by_id(row.id)
            return Parcel(row.transaction, row.event, item.idempotency_key, _plain(item.body))

    def answer(self, row: Row) -> str:
        """The stored answer. Raises `Unreadable`."""
        with self._translated():
            return _plain(_Item.get_by_id(row.id).answer)

    def move(
        self, row_id: str, on: On, *, due_in_ms: int = 0, error: str | None = None, answer: str | None = None
    ) -> State:
        """The only thing that changes a row: one transition, durable on return. Raises `IllegalTransition`."""
        with self._transaction():
            item: Any = _Item.get_by_id(row_id)  # peewee's types do not know that a column may be NULL
            before = State(item.state)
            after = TRANSITIONS.get((before, on))
            if after is None:
                raise IllegalTransition(f"{row_id}: {on.value} while {before.value}")
            item.state = after.value
            item.due_ms = self._clock.monotonic_ms() + due_in_ms if due_in_ms else 0
            if error is not None:
                item.error = error[:ERROR_CHARACTERS_MAX]
            match on:
                case On.SEND:
                    item.attempts += 1
                    item.first_attempt = item.first_attempt or Moment.now(self._clock)
                case On.ANSWER:
                    item.answer = answer
                case On.DISBELIEVE:
                    item.answer = None
                case On.DELIVER:
                    item.body = item.answer = item.error = None
                case _:
                    pass
            item.save()
            if after is State.DELIVERED:
                self._forget_delivered()
        _log.info("%s: %s, %s -> %s%s", row_id, on.value, before.value, after.value, f" ({error})" if error else "")
        return after

    def next_to_send(self, destination: str, *, fresh_only: bool = False) -> Row | None:
        """The most urgent row that is due; with `fresh_only` only an urgent one that was never tried."""
        wanted = (_Item.destination == destination) & (_Item.due_ms <= self._clock.monotonic_ms())
        if fresh_only:
            wanted &= _Item.urgent & (_Item.attempts == 0)
        return self._first(SENDABLE, wanted)

    def next_to_deliver(self) -> Row | None:
        """The most urgent row whose answer should go to the terminal now."""
        return self._first({State.ANSWERED}, _Item.due_ms <= self._clock.monotonic_ms())

    def next_due_ms(self, states: frozenset[State], destination: str | None = None) -> int | None:
        """When the next of these rows is due, in running time of this boot."""
        wanted = _among(states)
        if destination is not None:
            wanted &= _Item.destination == destination
        with self._translated():
            due_ms: int | None = _Item.select(peewee.fn.MIN(_Item.due_ms)).where(wanted).scalar()
        return due_ms

    def row(self, row_id: str) -> Row | None:
        with self._translated():
            item = _Item.get_or_none(_Item.id == row_id)
        return None if item is None else _row(item)

    def rows(self, *, limit: int = 1_000) -> Sequence[Row]:
        """What is not delivered, oldest first. Nothing waits that is not listed here; `summary` counts all of it."""
        with self._translated():
            query = _Item.select().where(_among(OPEN | APART)).order_by(peewee.SQL("rowid")).limit(limit)
            return tuple(_row(item) for item in query)

    def summary(self) -> Summary:
        with self._translated():
            queued = _Item.select().where(_among(OPEN)).count()
            held = _Item.select().where(_among(APART)).count()
            oldest = _Item.select().where(_among(OPEN)).order_by(peewee.SQL("rowid")).first()
        return Summary(queued, held, None if oldest is None else self._age_ms(oldest.stored))

    def retry(self, row_id: str, reason: str) -> None:
        """A person wants a refused or held item sent again, under its old key. The reason is kept with it."""
        self.move(row_id, On.RETRY, error=f"sent again by hand: {reason}")

    def _age_ms(self, moment: Moment) -> int:
        now = Moment.now(self._clock)
        age_ms = moment.until_ms(now)
        return now.monotonic_ms if age_ms is None else age_ms  # it is older than this boot

    def _first(self, states: set[State] | frozenset[State], wanted: Any) -> Row | None:
        """Urgent ones newest first, for that customer stands at the terminal; the backlog oldest first.

        Before both counts how often an item was tried: those that a destination chokes on fall behind the others.
        """
        urgent = _Item.urgent & (_Item.attempts < URGENT_ATTEMPTS_MAX)
        age = peewee.Case(None, ((urgent, peewee.SQL("-rowid")),), peewee.SQL("rowid"))
        with self._translated():
            query = _Item.select().where(_among(states) & wanted)
            item = query.order_by(urgent.desc(), _Item.attempts, age).first()
        return None if item is None else _row(item)

    def _offered_again(self, known: Any, item: OutboxItem, digest: str) -> None:
        """The terminal missed our receipt, or has lost the answer (restored from a backup)."""
        state = State(known.state)
        if not hmac.compare_digest(known.sha256, digest):
            if (state, On.HOLD) in TRANSITIONS:
                self.move(known.id, On.HOLD, error="the terminal has made two different envelopes for this event")
        elif state is State.DELIVERED:
            known.body = item.envelope
            known.save()
            self.move(known.id, On.OFFERED_AGAIN, error="the terminal asks for the answer again")

    @staticmethod
    def _forget_delivered() -> None:
        newest = _Item.select(peewee.fn.MAX(peewee.SQL("rowid"))).scalar()
        old = peewee.SQL("rowid") <= newest - DELIVERED_MAX
        _Item.delete().where(_among({State.DELIVERED}) & old).execute()

    def _presize(self) -> None:
        """Write the WAL to its full size at each start: a growing one costs a second flush for every commit.

        It also overwrites what an earlier run has left in it of erased rows.
        """
        with self._database.atomic():
            self._database.execute_sql("CREATE TABLE filler (bytes BLOB)")
            self._database.execute_sql("INSERT INTO filler VALUES (zeroblob(?))", (FILLER_BYTES,))
            self._database.execute_sql("DROP TABLE filler")
        self._database.execute_sql("PRAGMA wal_checkpoint(RESTART)")

    def _check(self) -> None:
        (verdict,) = self._database.execute_sql("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise SpoolCorrupt(
                "the spool is damaged: nothing is sent and nothing was changed. The terminal's ledger has every sale; "
                "set spool.db aside and have the sales offered again"
            )
        with self._database.atomic():
            self._database.create_tables([_Item, _Meta])
            meta = {entry.name: entry.value for entry in _Meta.select()}
            if int(meta.setdefault("version", str(VERSION))) != VERSION:
                raise SpoolCorrupt(
                    f"the spool has layout {meta['version']}, this program knows {VERSION}: nothing is sent and "
                    "nothing was changed. Install the newer version again"
                )
            if meta.setdefault("key", self._key_id) != self._key_id:
                raise SpoolKeyWrong(
                    "the spool was written with another key: nothing is sent and nothing is lost. "
                    "Restore the credential spool-key"
                )
            for name, value in meta.items():
                _remember(name, value)

    def _recover(self) -> None:
        boot = str(self._clock.boot_id)
        with self._database.atomic():
            known = _Meta.get_or_none(_Meta.name == "boot")
            if known is None or known.value != boot:
                _Item.update(due_ms=0).execute()
                _remember("boot", boot)
            for item in list(_Item.select(_Item.id).where(_among({State.SENDING}))):
                self.move(item.id, On.RESTART, error="stopped in the middle of sending")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._translated(), self._database.atomic():
            yield

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            with self._database.bind_ctx([_Item, _Meta]):
                yield
        except LedgerError as error:
            raise Unreadable("what is stored of it is damaged; the terminal's ledger has this sale") from error
        except peewee.OperationalError as error:
            raise SpoolUnavailable(
                f"the spool cannot be used ({error}): nothing is sent, everything stays stored. "
                "Is another payterm-sync running, or the disk full?"
            ) from error
        except peewee.DatabaseError as error:
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


def _remember(name: str, value: str) -> None:
    _Meta.insert(name=name, value=value).on_conflict_replace().execute()


def _plain(text: str | None) -> str:
    if text is None:
        raise Unreadable("what was stored of it is erased; the terminal's ledger has this sale")
    return text


def _among(states: set[State] | frozenset[State]) -> Any:
    return _Item.state.in_([state.value for state in states])


def _row(item: Any) -> Row:
    return Row(
        id=item.id,
        key=item.key,
        transaction=UUID(item.transaction),
        event=item.event,
        destination=item.destination,
        number=item.number,
        urgent=item.urgent,
        state=State(item.state),
        attempts=item.attempts,
        stored=item.stored,
        first_attempt=item.first_attempt,
        error=item.error,
    )

"""What the database's tests share: records as the journal hands them over, and a look into every cell."""

from __future__ import annotations

import random
import shutil
import sqlite3
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from ledger_rig import SUMMARY, seeded

from terminal.ledger.fields import FieldCipher
from terminal.ledger.journal import Record, RecordType
from terminal.ledger.keys import Keyring, SecretKey
from terminal.ledger.models import LedgerDatabase
from terminal.ledger.store import Store

OLD, NEW, CHAIN = (SecretKey(seeded(seed)(32)) for seed in (11, 12, 13))
KEYS = Keyring(OLD)
DAY_MS = 86_400_000
START_MS = 1_790_000_000_000

ENCRYPTED = {"transactions": ("amount_minor", "currency", "details"), "totals": ("figures",)}
PRIMARY = {"transactions": "id", "totals": "key"}


class PowerCut(BaseException):
    """No more electricity: nothing may catch this."""


def open_store(path: Path, keys: Keyring = KEYS, *, seed: int = 1, chain: SecretKey = CHAIN) -> Store:
    store = Store(path, keys, chain, seeded(seed))
    if store.open() is None:
        store.create(1)
    return store


@dataclass
class Tape:
    """Writes records that continue each other. `now_ms` is this boot's running time; the wall is `offset_ms` later."""

    key: SecretKey = OLD
    chance: random.Random = field(default_factory=lambda: random.Random(7))
    records: list[Record] = field(default_factory=list)
    boot: int = 1
    now_ms: int = 1_000
    offset_ms: int = START_MS
    synchronised: bool = True
    envelopes: int = 0
    sales: int = 0

    def write(
        self, type_: RecordType, body: dict[str, Any], payload: bytes | None = None, content: bytes | None = None
    ) -> Record:
        sequence = len(self.records) + 1
        front = bytes((80, 84, 74, 49, 1, type_, 0, 0, 0, 0, 0, 1)) + self.key.id
        record = Record(
            sequence=sequence,
            type=type_,
            epoch=1,
            boot_id=UUID(int=self.boot),
            monotonic_ms=self.now_ms,
            wall_ms=self.now_ms + self.offset_ms,
            synchronised=self.synchronised,
            mac=self.chance.randbytes(32),
            body=body,
            trimmed=front + self.chance.randbytes(300),
            payload=payload,
            content=content,
        )
        self.records.append(record)
        return record

    def number(self) -> dict[str, Any]:
        self.envelopes += 1
        return {"number": self.envelopes, "sha256": f"{self.envelopes:064x}"}

    def reboot(self, *, synchronised: bool, offset_ms: int = 0) -> None:
        self.boot, self.now_ms, self.synchronised = self.boot + 1, 500, synchronised
        self.offset_ms = START_MS if synchronised else offset_ms

    def open(self, minor: int = 1250, reference: str | None = None) -> dict[str, Any]:
        """OPEN; gives the facts, which the later records repeat."""
        self.now_ms += 1_000
        self.sales += 1
        facts = {
            "transaction": str(UUID(bytes=self.chance.randbytes(16), version=4)),
            "number": self.sales,
            "kind": "sale",
            "amount": minor,
            "currency": "EUR",
            "reference": reference,
            "opened_at": self.now_ms + self.offset_ms,
            "clock_synchronised": self.synchronised,
        }
        self.write(RecordType.OPEN, facts)
        return facts

    def outcome(self, facts: dict[str, Any], decision: str, *, sends: bool, contact: bool = False) -> None:
        self.now_ms += 200
        envelope = None
        if sends:
            envelope = self.number()
            named = {"transaction": facts["transaction"], "event": "authorisation"}
            self.write(RecordType.CARD, named | envelope, self.chance.randbytes(1_200))
        card = msgspec.json.encode(asdict(replace(SUMMARY, contact=contact))) if decision != "void" else None
        body = facts | {
            "decision": decision,
            "reason": "test",
            "scheme": "visa" if card else None,
            "contact": contact,
            "envelope": envelope,
        }
        self.write(RecordType.OUTCOME, body, self.chance.randbytes(250) if card else None, card)

    def sell(self, decision: str = "accepted", *, contact: bool = False, **kwargs: Any) -> dict[str, Any]:
        facts = self.open(**kwargs)
        self.outcome(facts, decision, sends=True, contact=contact)
        return facts

    def show(self, facts: dict[str, Any]) -> None:
        self.write(RecordType.SHOWN, {"transaction": facts["transaction"], "screen": "approved"})

    def answer(
        self, facts: dict[str, Any], decision: str, event: str = "authorisation", card_ref: str | None = "card-1"
    ) -> None:
        self.now_ms += 300
        body = {
            "transaction": facts["transaction"],
            "event": event,
            "decision": decision,
            "reason": None,
            "authorisation_code": "123456",
            "rrn": None,
            "sha256": "00",
        }
        payload = urlsafe_b64encode(msgspec.json.encode({"card_ref": card_ref})).rstrip(b"=")
        self.write(RecordType.ANSWER, body, self.chance.randbytes(400), b"e30." + payload + b".c2ln")

    def reverse(self, facts: dict[str, Any], reason: str = "void") -> None:
        body = {"transaction": facts["transaction"], "reason": reason} | self.number()
        self.write(RecordType.REVERSAL, body, self.chance.randbytes(600))

    def checkpoint(self) -> dict[str, Any]:
        body = {"checkpoint": str(UUID(bytes=self.chance.randbytes(16), version=4))} | self.number()
        self.write(RecordType.CHECKPOINT, body, self.chance.randbytes(500))
        return {"transaction": body["checkpoint"]}

    def event(self, what: str, **details: Any) -> None:
        self.write(RecordType.EVENT, {"what": what, "details": details})

    def clock_set(self, offset_ms: int = START_MS) -> None:
        self.offset_ms, self.synchronised = offset_ms, True
        self.event("clock_set", boot_id=str(UUID(int=self.boot)), offset_ms=offset_ms)


def sold(tape: Tape, **kwargs: Any) -> dict[str, Any]:
    """A sale from its beginning to its end: accepted here, shown, approved by the host."""
    facts = tape.sell(**kwargs)
    tape.show(facts)
    tape.answer(facts, "approved")
    return facts


def erase(store: Store) -> list[int]:
    """What the ledger does with what the store names: the journal has erased it."""
    erasable = store.erasable()
    store.apply((), erasable)
    return erasable


def cells(path: Path, keys: Keyring = KEYS) -> dict[str, list[dict[str, Any]]]:
    """Every cell of a closed database, encrypted ones in clear."""
    cipher = FieldCipher(keys, seeded(9))
    found: dict[str, list[dict[str, Any]]] = {}
    with closing(sqlite3.connect(path)) as database:
        database.row_factory = sqlite3.Row
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            rows = [dict(row) for row in database.execute(f'SELECT * FROM "{table}" ORDER BY 1')]  # noqa: S608
            for row in rows:
                row.pop("seal", None)  # both are over cells as they are sealed, so never alike
                row.pop("settled", None)
            for row in rows:
                for column in ENCRYPTED.get(table, ()):
                    key = row[PRIMARY[table]]
                    place = str(UUID(key)) if table == "transactions" else key
                    row[column] = cipher.open(row[column], table=table, column=column, row=place)
                    if column in {"details", "figures"}:
                        row[column] = msgspec.json.decode(row[column])
            found[table] = rows
    return found


def copied(path: Path, into: Path) -> Path:
    """The files as a power cut leaves them."""
    into.mkdir()
    for file in path.parent.glob(path.name + "*"):
        shutil.copy(file, into)
    return into / path.name


@contextmanager
def cut_at(patch: pytest.MonkeyPatch, statement: int) -> Iterator[Callable[[], int]]:
    """The power fails before the n-th statement that reaches SQLite from now on."""
    count = 0

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == statement:
                raise PowerCut
            return real(*args, **kwargs)

        return counted

    with patch.context() as patched:
        patched.setattr(LedgerDatabase, "rows", counting(LedgerDatabase.rows))
        patched.setattr(LedgerDatabase, "execute_sql", counting(LedgerDatabase.execute_sql))
        yield lambda: count

"""A day at the till on a card that loses power: the program that is recorded, and the judge of what is left.

The program (`python -m power_cut_rig sell`) drives the real ledger through named phases. Before each step it says on
the control file what it is about to do, after it what it has promised. The judge opens what a cut has left with the
real recovery. What it then demands it reads with code of its own, from docs/formats.md: the journal's blocks, and the
database by plain SQL; the product's readers would share the product's mistakes.

Plants are faults for the program to have, so that the judge can be seen to find them. They are put in from outside, at
`sqlite3.connect`, at the medium and at the words on the control file.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple
from uuid import UUID

import peewee
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from ledger_rig import SUMMARY, Rig, seeded

from hwsim.sdcard import MODES, Cut, Found, Judge, Mode, Recording, Remark, Tally, campaign, choose
from hwsim.sdcard.files import FileRecording
from terminal.ledger.errors import LedgerCorrupt
from terminal.ledger.journal import FileMedium, Medium
from terminal.ledger.keys import Keyring, SecretKey
from terminal.ledger.ledger import Ledger, LedgerSettings
from terminal.ledger.medium import sync_directory
from terminal.ledger.recovery import resolve
from terminal.ledger.states import State
from terminal.ledger.values import Decision, Event, ReversalReason, Transaction
from terminal.money import EUR

SETTINGS: Final = LedgerSettings(journal_size_bytes=5 * 1024 * 1024, wal_size_bytes=128 * 1024)
DIRECTORY: Final = "ledger"  # on the card

BLOCK, SLOT = 4096, 16384
RUNS_MAX: Final = 100  # of one program: seeds of different runs do not meet


# The program


class Till:
    """The real ledger, and a mouth: what is about to be done, and what has been promised."""

    def __init__(self, directory: Path, say: Callable[[dict[str, Any]], None], *, seed: int, plant: str) -> None:
        self.rig = rig_on(directory, seed)
        self._turned = directory.with_name("key-turned")
        if not self._turned.exists():
            self.rig.keys = replace(self.rig.keys, data=Keyring(*self.rig.keys.data.retired))
        self.chance = random.Random(seed)
        self._say = say
        self._plant = plant
        self._count = 0
        self._run = 0
        self._seed = seed
        self.ledger: Ledger

    def open(self) -> None:
        """Start, and end what the last run left open."""
        self._run += 1
        self.rig.clock.now_ms += 3_600_000
        self.ledger = self.rig.open(medium_of(self._plant))
        cut_off = [
            *((sale, "void") for sale in self.ledger.opened()),
            *((sale, "reversing") for sale in (*self.ledger.authorising(), *self.ledger.completing())),
        ]
        for sale, state in cut_off:
            self._say({"will": sale.reference, "state": state, "minor": sale.amount.minor})
        resolve(self.ledger, self.rig.envelopes)
        for sale, state in cut_off:
            self._promise(self.ledger.transaction(sale.id), state)

    def turn_key(self) -> None:
        """From the next opening on, a new data key seals."""
        if not self._turned.exists():
            self._turned.touch()
            sync_directory(self._turned.parent)
            self.rig.keys = rig_on(self.rig.directory, 0).keys

    @property
    def marks(self) -> str:
        return f"{self._seed}-{self._run}-{self._count}"

    def begin(self) -> Transaction:
        self._count += 1
        reference = self.marks
        minor = self.chance.randint(1, 99_999)
        self._say({"will": reference, "state": "opened", "minor": minor})
        return self.rig.begin(self.ledger, minor=minor, reference=reference)

    def sell(self, decision: Decision, state: str, *, contact: bool = False) -> Transaction:
        sale = self.begin()
        sends = decision in {Decision.ONLINE, Decision.ACCEPTED}
        envelope = self.rig.authorisation(sale, deferred=decision is Decision.ACCEPTED) if sends else None
        card = replace(SUMMARY, contact=contact) if sends else None
        return self._commit(
            sale,
            state,
            lambda: self.ledger.commit_outcome(sale.id, decision=decision, reason="test", card=card, envelope=envelope),
        )

    def refund(self, sale: Transaction) -> Transaction:
        """Pay back a part of it."""
        self._count += 1
        reference = self.marks
        minor = self.chance.randint(1, sale.amount.minor // 2)
        for state in ("opened", "authorising"):
            self._say({"will": reference, "state": state, "minor": minor, "refund": True})
        after = self.rig.refund(self.ledger, sale, minor, reference)
        self._promise(after, "authorising")
        return after

    def outcome(self, sale: Transaction, decision: Decision, state: str) -> Transaction:
        return self._commit(sale, state, lambda: self.ledger.commit_outcome(sale.id, decision=decision, reason="test"))

    def answer(self, sale: Transaction, decision: str, state: str, event: Event = Event.AUTHORISATION) -> Transaction:
        jws = self.rig.host.answer(self.rig.envelope(self.ledger, sale.id, event), decision)
        return self._commit(
            sale, state, lambda: self.rig.deliver(self.ledger, sale.id, event, jws), f"{sale.id}/{event}"
        )

    def reverse(self, sale: Transaction, reason: ReversalReason) -> Transaction:
        envelope = self.rig.reversal(sale, reason)
        return self._commit(sale, "reversing", lambda: self.ledger.commit_reversal(sale.id, reason, envelope))

    def show(self, sale: Transaction, screen: str = "approved") -> None:
        self.ledger.mark_shown(sale.id, screen)

    def _commit(
        self, sale: Transaction, state: str, step: Callable[[], Transaction], answered: str | None = None
    ) -> Transaction:
        self._say({"will": sale.reference, "state": state, "minor": sale.amount.minor})
        if self._plant == "early":
            self._promise(sale, state, answered)
        after = step()
        assert after.state == state, f"the program expected {state}, the ledger says {after.state}"
        self._promise(after, state, answered)
        return after

    def _promise(self, sale: Transaction, state: str, answered: str | None = None) -> None:
        self._say({
            "did": sale.reference,
            "sale": str(sale.id),
            "number": sale.number,
            "minor": sale.amount.minor,
            "state": state,
            "answered": answered,
            "exposure": self.ledger.exposure(EUR).sum_minor,
        })  # fmt: skip


def offline(till: Till) -> None:
    """Accepted without the host, and shown."""
    for _ in range(3):
        till.show(till.sell(Decision.ACCEPTED, "accepted"))
    till.ledger.note("link", online=False)
    till.ledger.flush()


def online(till: Till) -> None:
    """The host answers while the customer waits."""
    for verdict in ("approved", "declined"):
        sale = till.sell(Decision.ONLINE, "authorising")
        till.ledger.mark_handed_over([item.key for item in till.ledger.outbox(1)])
        till.show(till.answer(sale, verdict, verdict), verdict)


def inserted(till: Till) -> None:
    """An inserted card has the last word; one of two refuses."""
    sale = till.sell(Decision.ONLINE, "authorising", contact=True)
    till.answer(sale, "approved", "completing")
    till.show(till.outcome(sale, Decision.COMPLETED, "approved"))
    sale = till.sell(Decision.ONLINE, "authorising", contact=True)
    till.answer(sale, "approved", "completing")
    till.reverse(sale, ReversalReason.CARD)


def late(till: Till) -> None:
    """Time-outs: one is declined and reversed, one is accepted all the same and settled later."""
    sale = till.sell(Decision.ONLINE, "authorising")
    till.reverse(sale, ReversalReason.TIMEOUT)
    till.answer(sale, "approved", "reversing")
    till.answer(sale, "reversed", "reversed", Event.REVERSAL)
    sale = till.sell(Decision.ONLINE, "authorising")
    till.show(till.outcome(sale, Decision.ACCEPTED, "accepted"))
    till.answer(sale, "approved", "settled")


def deliveries(till: Till) -> None:
    """What was accepted goes to the host, which takes most of it; card data is erased."""
    sales = [till.sell(Decision.ACCEPTED, "accepted") for _ in range(3)]
    for sale in sales:
        till.show(sale)
    till.ledger.mark_handed_over([item.key for item in till.ledger.outbox(9)])
    for sale, verdict, state in zip(
        sales, ("approved", "declined", "approved"), ("settled", "refused", "settled"), strict=True
    ):
        till.answer(sale, verdict, state)
    till.ledger.flush()


def voids(till: Till) -> None:
    """A merchant takes back what was sold."""
    sale = till.sell(Decision.ACCEPTED, "accepted")
    till.show(sale)
    till.reverse(sale, ReversalReason.VOID)
    till.answer(sale, "reversed", "reversed", Event.REVERSAL)
    till.sell(Decision.DECLINED, "declined")


def refunds(till: Till) -> None:
    """A part of a sale is paid back, before and after the host has the sale; the host declines one of two."""
    sale = till.sell(Decision.ACCEPTED, "accepted")
    till.show(sale)
    first = till.refund(sale)
    till.answer(sale, "approved", "settled")
    second = till.refund(sale)
    till.answer(first, "approved", "approved", Event.REFUND)
    till.answer(second, "declined", "declined", Event.REFUND)
    till.ledger.acknowledge(second.id, 0)
    till.refund(sale)  # that one waits


def cut_off(till: Till) -> None:
    """The process dies with sales at every stage, and the next one starts."""
    till.begin()
    till.sell(Decision.ONLINE, "authorising")
    sale = till.sell(Decision.ONLINE, "authorising", contact=True)
    till.answer(sale, "approved", "completing")
    till.begin()
    raise Killed


def restart(till: Till) -> None:
    """A clean stop and start: SQLite removes its log and makes it anew."""
    till.sell(Decision.ACCEPTED, "accepted")
    till.ledger.close()
    till.open()


def tidy(till: Till) -> None:
    """All is answered and two months go by: records move into the archive, cards are forgotten, the chain is signed."""
    for item in till.ledger.outbox(99):
        sale = till.ledger.transaction(item.transaction) if item.event is not Event.CHECKPOINT else None
        if sale is not None and item.event is Event.REVERSAL:
            till.answer(sale, "reversed", "reversed", Event.REVERSAL)
        elif sale is not None and sale.state is State.ACCEPTED:
            till.answer(sale, "approved", "settled")
        elif sale is not None and item.event is Event.REFUND:
            till.answer(sale, "approved", "approved", Event.REFUND)
    for sale in till.ledger.unshown():
        till.show(sale)
    till.rig.clock.now_ms += 61 * 86_400_000
    for _ in range(UPKEEP_STEPS_MAX):
        if not till.ledger.upkeep.step(till.rig.envelopes):
            break
    till.sell(Decision.ACCEPTED, "accepted")


def rotate(till: Till) -> None:
    """A new data key takes over what is stored, while selling goes on."""
    till.ledger.close()
    till.turn_key()
    till.open()
    till.sell(Decision.ACCEPTED, "accepted")
    for _ in range(UPKEEP_STEPS_MAX):
        if not till.ledger.upkeep.step():
            break
    till.sell(Decision.ONLINE, "authorising")


def copied(till: Till) -> None:
    """A backup is written beside it."""
    till.sell(Decision.ACCEPTED, "accepted")
    till.ledger.inspection.write_backup(till.rig.directory.parent / f"backup-{till.marks}")
    till.sell(Decision.ACCEPTED, "accepted")


UPKEEP_STEPS_MAX: Final = 200
_PHASES: Final = (offline, online, inserted, late, deliveries, voids, refunds, cut_off, restart, tidy, rotate, copied)
PHASES: Final[dict[str, Callable[[Till], None]]] = {phase.__name__: phase for phase in _PHASES}


class Killed(Exception):
    """The process ends here, and nothing is closed."""


def rig_on(directory: Path, seed: int) -> Rig:
    """The same keys each time, and randomness that no other run has had."""
    rig = Rig(directory, settings=SETTINGS)
    rig.entropy = seeded(1_000_003 * (seed + 1))
    # Whoever comes after a cut has both data keys, as an operator would.
    rig.keys = replace(rig.keys, data=Keyring(SecretKey(seeded(77)(32)), (rig.keys.data.current,)))
    return rig


# Plants


SKEW: Final = 3 * BLOCK


class _Skewed:
    """A journal file whose slots begin 12 KiB into a flash page: a record shares one with the payload before it."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        fresh = not path.exists()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if fresh:
            os.pwrite(self._descriptor, bytes(size_bytes + SLOT), 0)
            os.fsync(self._descriptor)

    def pread(self, size_bytes: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size_bytes, offset + SKEW)

    def pwrite(self, data: bytes, offset: int) -> None:
        os.pwrite(self._descriptor, data, offset + SKEW)

    def flush(self) -> None:
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def medium_of(plant: str) -> Callable[[Path, int], Medium]:
    return _Skewed if plant == "unaligned" else FileMedium.create


REWRITTEN: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "normal": (("synchronous = FULL", "synchronous = NORMAL"), ("synchronous=FULL", "synchronous=NORMAL")),
    "psow": (("psow=0", "psow=1"),),
    "delete": (
        *(("journal_mode = WAL", "journal_mode = DELETE"), ("journal_mode=WAL", "journal_mode=DELETE")),
        *(("locking_mode = EXCLUSIVE", "locking_mode = NORMAL"), ("locking_mode=EXCLUSIVE", "locking_mode=NORMAL")),
    ),
}
PLANTS: Final = (*REWRITTEN, "early", "unaligned")
MOUNTS: Final = ("nobarrier",)


def plant_database(plant: str) -> None:
    """Have SQLite told something else than the ledger says."""
    pairs = REWRITTEN.get(plant, ())
    if not pairs:
        return

    def rewritten(text: str) -> str:
        for old, new in pairs:
            text = text.replace(old, new)
        return text

    class Cursor(sqlite3.Cursor):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            return super().execute(rewritten(sql), *values)

    class Connection(sqlite3.Connection):
        def cursor(self, factory: Any = Cursor) -> Any:
            return super().cursor(factory)

        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            return self.cursor().execute(sql, *values)

    def connect(database: str, **settings: Any) -> sqlite3.Connection:
        return sqlite3.connect(rewritten(database), factory=Connection, **settings)

    peewee.sqlite3 = SimpleNamespace(**{**vars(sqlite3), "connect": connect})


# What was said


@dataclass
class Sale:
    """One sale as the outside world knows it."""

    minor: int
    will: set[str] = field(default_factory=set)  # states that were begun since then
    did: str | None = None  # the last state that was promised
    id: str | None = None
    number: int | None = None
    answered: set[str] = field(default_factory=set)
    refund: bool = False

    def states(self, settled: dict[str, str]) -> set[str | None]:
        """Those it may be in; None: not there at all."""
        if self.refund:  # a start takes none back
            settled = {"opened": settled["opened"]} if "opened" in settled else {}
        return {state if state is None else settled.get(state, state) for state in {self.did, *self.will}}


RESOLVED: Final = {"opened": "void", "authorising": "reversing", "completing": "reversing"}
AT_RISK: Final = {"opened", "authorising", "accepted"}
SOLD: Final = {"accepted", "approved", "settled"}


def said_on(told: bytes) -> dict[str, Sale]:
    """Everything that was said, by reference."""
    sales: dict[str, Sale] = {}
    for line in told.splitlines():
        word = json.loads(line)
        sale = sales.setdefault(word.get("will") or word["did"], Sale(word["minor"]))
        if "will" in word:
            sale.will.add(word["state"])
            sale.refund = sale.refund or "refund" in word
        else:
            sale.did = word["state"]
            sale.will.clear()
            sale.id, sale.number = word["sale"], word["number"]
            if word["answered"]:
                sale.answered.add(word["answered"])
    return sales


# What is there, read by code that shares nothing with the ledger


class Broken(Exception):
    """A promise is broken; the message says which."""


class Damaged(Broken):
    """ledger.db cannot be read: seen, not silent."""


class Entry(NamedTuple):
    """One record of the journal."""

    sequence: int
    type: int
    body: dict[str, Any]
    trimmed: bytes
    payload: bytes | None


@dataclass
class Row:
    """One sale as a copy has it."""

    reference: str | None
    number: int
    minor: int
    state: str
    contact: bool = False
    refund: bool = False


OPEN, OUTCOME, CARD, SHOWN, ANSWER, REVERSAL = range(1, 7)
_HEADER: Final = struct.Struct(">4sBBHI4sQ16sQqHHI32s32s12s")
_BODY_AT: Final = _HEADER.size
_DECIDED: Final = {"online": "authorising", "completed": "approved"}
_ANSWERED: Final = {
    ("authorising", "approved"): "approved",
    ("authorising", "declined"): "declined",
    ("accepted", "approved"): "settled",
    ("accepted", "declined"): "refused",
}


@dataclass
class Keys:
    """What the copies are read with."""

    chain: bytes
    data: dict[bytes, AESGCM]

    @classmethod
    def of(cls, rig: Rig) -> Keys:
        keys: Any = rig.keys.data
        ring = [keys.current, *keys.retired] if hasattr(keys, "current") else [keys]
        return cls(rig.keys.chain.material, {key.id: AESGCM(key.material) for key in ring})


def read_journal(path: Path, keys: Keys, *, whole: bool) -> list[Entry]:
    """Every authentic record in the order of its number; `whole` wants an unbroken chain up to the last one."""
    content = path.read_bytes()
    found: dict[int, tuple[Entry, bytes, bytes]] = {}
    for at in range(0, len(content), BLOCK):
        block = content[at : at + BLOCK]
        if block[:4] != b"PTJ1":
            continue
        end = _BODY_AT + int.from_bytes(block[56:58])
        # The MAC covers the record with or without the zeros behind it, according to its form.
        macs = [hmac.digest(keys.chain, block[:length], "sha256") for length in (end, BLOCK - 32)]
        if not any(hmac.compare_digest(mac, block[-32:]) for mac in macs):
            continue
        header = _HEADER.unpack_from(block)
        kind, key, sequence, payload_bytes = header[2], header[5], header[6], header[11]
        body = json.loads(keys.data[key].decrypt(header[15], block[_BODY_AT:end], block[:128]))
        payload = content[at + BLOCK : at + BLOCK + payload_bytes]
        there = payload_bytes and hashlib.sha256(payload).digest() == header[13]
        trimmed = block[:end] + block[-32:]
        found[sequence] = (Entry(sequence, kind, body, trimmed, payload if there else None), header[14], block[-32:])
    entries: list[Entry] = []
    previous = None
    for sequence in sorted(found):
        entry, before, mac = found[sequence]
        if previous is not None and (entries[-1].sequence + 1, previous) != (sequence, before):
            if whole:
                raise Broken(f"the journal's chain breaks between {entries[-1].sequence} and {sequence}")
            if entries[-1].sequence + 1 == sequence:
                break  # written after a start that had not seen the end: never flushed
        entries.append(entry)
        previous = mac
    return entries


def rows_of_journal(entries: Iterable[Entry]) -> dict[str, Row]:
    """What the records say, in their own words."""
    rows: dict[str, Row] = {}
    for entry in entries:
        body, sale = entry.body, entry.body.get("transaction", "")
        row = rows.get(sale)
        if entry.type in {OPEN, OUTCOME} and row is None:
            row = rows[sale] = Row(
                body["reference"], body["number"], body["amount"], "opened", refund=body["kind"] == "refund"
            )
        if row is None:
            continue
        match entry.type:
            case 2:
                row.state = _DECIDED.get(body["decision"], body["decision"])
                card = body.get("card") or {}
                row.contact = row.contact or bool(body.get("contact", card.get("contact", False)))
            case 5:
                waits = row.contact and (row.state, body["decision"]) == ("authorising", "approved")
                if body["decision"] == "reversed":
                    row.state = "reversed"  # whatever it was: its REVERSAL may have died with its erased envelope
                else:
                    row.state = "completing" if waits else _ANSWERED.get((row.state, body["decision"]), row.state)
            case 6:
                row.state = "reversing"
            case _:
                pass
    return rows


class Database:
    """ledger.db, by plain SQL and its own decryption."""

    def __init__(self, path: Path, keys: Keys) -> None:
        self._connection = sqlite3.connect(path)
        names = [each.stem.split("-") for each in (path.parent / "archive").glob("*.segment")]
        self.archived = max((int(name[-1]) for name in names), default=0)
        self._keys = keys

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def select(self, sql: str) -> list[tuple[Any, ...]]:
        return self._connection.execute(sql).fetchall()

    def cell(self, sealed: bytes, table: str, column: str, row: str) -> bytes:
        place = b"\0".join((b"payterm field 1", table.encode(), column.encode(), row.encode()))
        return self._keys.data[sealed[:4]].decrypt(sealed[4:16], sealed[16:], place)

    def rows(self) -> dict[str, Row]:
        rows = {}
        for key, number, state, minor, details in self.select(
            "SELECT id, number, state, amount_minor, details FROM transactions"
        ):
            sale = str(UUID(key))
            amount = int(self.cell(minor, "transactions", "amount_minor", sale))
            known = json.loads(self.cell(details, "transactions", "details", sale))
            rows[sale] = Row(known["reference"], number, amount, state, refund=known["kind"] == "refund")
        return rows

    def check_pages(self) -> None:
        if (said := self.select("PRAGMA quick_check")) != [("ok",)]:
            raise Damaged(f"ledger.db: {said[0][0]}")

    def check(self, entries: list[Entry]) -> None:
        """What must hold inside it, and between it and the journal."""
        kept = {sequence: (bytes(trimmed), payload) for sequence, trimmed, payload in self.select(
            "SELECT sequence, trimmed, payload FROM records")}  # fmt: skip
        for entry in entries:
            if entry.sequence <= self.archived and entry.sequence not in kept:
                continue  # nobody needs it: the archive has it
            if entry.sequence not in kept or kept[entry.sequence][0] != entry.trimmed:
                raise Broken(f"the database has no exact copy of record {entry.sequence}")
        journal = {entry.sequence: entry for entry in entries}
        for key, sequence, answered, sha256 in self.select("SELECT key, sequence, answered, sha256 FROM outbox"):
            payload = kept[sequence][1]
            if answered and (payload is not None or journal[sequence].payload is not None):
                raise Broken(f"the envelope of {key} is answered and not erased")
            if not answered and (payload is None or payload != journal[sequence].payload):
                raise Broken(f"the envelope of {key} is wanted and not in both copies ({sha256[:8]})")
        numbers = [number for (number,) in self.select("SELECT number FROM outbox ORDER BY number")]
        if numbers != list(range(1, len(numbers) + 1)):
            raise Broken(f"the numbers of the envelopes have gaps: {numbers}")
        figures = {
            key: json.loads(self.cell(sealed, "totals", "figures", key))
            for key, sealed in self.select("SELECT key, figures FROM totals")
        }
        book = figures.pop("day", {"sold": {}, "corrected": {}})
        totals = sum(each["sum"] for each in figures.values())
        sold = sum(-row.minor if row.refund else row.minor for row in self.rows().values() if row.state in SOLD)
        if totals != sold:
            raise Broken(f"the totals say {totals}, the sales {sold}")
        open_ = sum(minor for part in ("sold", "corrected") for _, minor in book[part].values())
        if open_ != sold:  # no day is ended here
            raise Broken(f"the day says {open_}, the sales {sold}")


def compare(copy: str, rows: dict[str, Row], sales: dict[str, Sale], settled: dict[str, str]) -> None:
    """Every promise is in this copy, and nothing that nobody began."""
    by_reference = {row.reference: (sale, row) for sale, row in rows.items()}
    for reference, (_, row) in by_reference.items():
        if reference not in sales:
            raise Broken(f"{copy}: sale {reference} was never begun")
        if sales[reference].minor != row.minor:
            raise Broken(f"{copy}: sale {reference} is of {row.minor}, not {sales[reference].minor}")
    for reference, sale in sales.items():
        there = by_reference.get(reference)
        state = None if there is None else there[1].state
        allowed = sale.states(settled)
        if sale.did is None:
            allowed |= {settled.get("opened", "opened")}  # its OPEN may have come with somebody else's commit
        if state not in allowed:
            raise Broken(f"{copy}: sale {reference} is {state}, may be {allowed}")
        if there is not None and sale.did is not None and (sale.id, sale.number) != (there[0], there[1].number):
            raise Broken(f"{copy}: sale {reference} has another id or number")


# The judge


def judge(argument: str) -> Judge:
    """The judge for `hwsim.sdcard.campaign`; its argument is JSON: `plant`, and `alone` (judge the copies as found)."""
    settings = json.loads(argument or "{}")
    plant, alone = settings.get("plant", ""), settings.get("alone", True)
    keys = Keys.of(rig_on(Path("/nowhere"), 0))

    def word(found: Found) -> str | None:
        sales = said_on(found.told)
        directory = found.directory / DIRECTORY
        try:
            if alone and any(sale.did for sale in sales.values()):
                judge_as_found(directory, sales, keys, found.cut.mode)
            return judge_recovered(directory, sales, keys, plant, found.cut)
        except (Broken, InvalidTag, sqlite3.Error) as error:
            return f"{type(error).__name__}: {error}"

    return word


def judge_as_found(directory: Path, sales: dict[str, Sale], keys: Keys, mode: Mode) -> None:
    """Each copy holds every promise by itself, before anything is repaired."""
    # A flash page that dies may take an erased envelope's record with it: that one the other copy gives back.
    entries = read_journal(directory / "journal", keys, whole=False)
    compare("journal as found", rows_of_journal(entries), sales, {})
    if mode is Mode.COLLATERAL:
        return  # SQLite's pages are no match for that; the journal's slots are
    with tempfile.TemporaryDirectory(dir=in_memory()) as made:
        for name in ("ledger.db", "ledger.db-wal", "ledger.db-journal"):
            if (directory / name).exists():
                shutil.copyfile(directory / name, Path(made) / name)
        with Database(Path(made) / "ledger.db", keys) as database:
            compare("ledger.db as found", database.rows(), sales, {})


def judge_recovered(directory: Path, sales: dict[str, Sale], keys: Keys, plant: str, cut: Cut) -> str | None:
    """The next start, and what it makes of it."""
    rig = rig_on(directory, cut.seed)
    rig.clock.now_ms += 100 * 3_600_000
    try:
        judge_start(rig, medium_of(plant), sales)
        judge_copies(directory, sales, keys)
    except (Damaged, LedgerCorrupt, InvalidTag, sqlite3.DatabaseError) as damage:
        if cut.mode is not Mode.COLLATERAL or (isinstance(damage, LedgerCorrupt) and damage.sequence is not None):
            raise
        # Pages died beside the one being written. The start need not see it, but the ledger must, and mend it.
        rig.close_all()
        try:
            judge_mended(rig, medium_of(plant), sales)
        except Broken as error:
            raise Broken(f"{damage}, but {error}") from damage
        try:
            judge_copies(directory, sales, keys)
        except Damaged as still:
            # Noticed, and every row is right: it is an index that the ledger has not come across yet.
            judge_copies(directory, sales, keys, pages=False)
            return Remark(f"not mended: {still}")
        return Remark(f"mended: {type(damage).__name__}: {damage}")
    return None


def judge_start(rig: Rig, medium: Callable[[Path, int], Medium], sales: dict[str, Sale]) -> None:
    """What the ledger says of itself."""
    ledger = rig.open(medium)
    answered = {key for sale in sales.values() for key in sale.answered}
    if again := {item.key for item in ledger.outbox(999)} & answered:
        raise Broken(f"offered anew though answered: {again}")
    judge_limits(ledger, sales, {})
    resolve(ledger, rig.envelopes)
    judge_limits(ledger, sales, RESOLVED)
    ledger.close()


def judge_limits(ledger: Ledger, sales: dict[str, Sale], settled: dict[str, str]) -> None:
    """The limits are not to see less than is at risk."""
    risked = sum(sale.minor for sale in sales.values() if not sale.refund and sale.states(settled) <= AT_RISK)
    if (exposure := ledger.exposure(EUR).sum_minor) < risked:
        raise Broken(f"the limits see {exposure} at risk, it is {risked}")


def judge_copies(directory: Path, sales: dict[str, Sale], keys: Keys, *, pages: bool = True) -> None:
    """Both copies hold every promise, and say the same."""
    entries = read_journal(directory / "journal", keys, whole=True)
    rows = rows_of_journal(entries)
    compare("journal", rows, sales, RESOLVED)
    with Database(directory / "ledger.db", keys) as database:
        if pages:
            database.check_pages()
        kept = database.rows()
        compare("ledger.db", kept, sales, RESOLVED)
        if {sale: row.state for sale, row in rows.items()} != {sale: row.state for sale, row in kept.items()}:
            raise Broken("journal and ledger.db do not say the same")
        database.check(entries)


def judge_mended(rig: Rig, medium: Callable[[Path, int], Medium], sales: dict[str, Sale]) -> None:
    """A damaged database is noticed when it is looked over or sold with, and the start after that builds it anew."""
    ledger = rig.open(medium)
    noticed = ledger.recovery.moved_aside is not None or ledger.recovery.rebuilt
    sales["next"] = Sale(1250, will={"accepted"})
    try:
        noticed = noticed or not sound(ledger)
        rig.sell(ledger, reference="next")  # passes through every index
    except LedgerCorrupt:
        noticed = True
    finally:
        ledger.close()
    if not noticed:
        raise Broken("ledger.db is damaged, and neither looking it over nor selling notices")
    ledger = rig.open(medium)
    resolve(ledger, rig.envelopes)
    ledger.close()


def sound(ledger: Any) -> bool:
    """What the ledger finds when it looks itself over; may raise `LedgerCorrupt` instead."""
    if not hasattr(ledger, "inspection"):
        ledger.verify()
        return True
    position, done = None, False
    while not done:
        verified = ledger.inspection.verify_some(position)
        if verified.first_bad is not None:
            return False
        position, done = verified.position, verified.done
    return bool(ledger.inspection.check().database == "whole")


def in_memory() -> str | None:
    memory = "/dev/shm"  # noqa: S108 (a directory of our own is made in it)
    return memory if Path(memory).is_dir() else None


# Recording and cutting


def record(
    path: Path, *words: str, on_files: bool = False, mount: str = "", after: Path | None = None, cut: Cut | None = None
) -> None:
    """Record this program, called with `words`; `after` a cut of another recording, if that is given."""
    options = ["--files"] if on_files else []
    options += ["--mount", mount] if mount else []
    options += ["--after", str(after), "--cut", str(cut)] if after is not None else []
    # In a process of its own: it mounts, and a test's process has threads, which do not go with forking.
    subprocess.run(
        [
            *(sys.executable, "-m", "hwsim.sdcard", "record", *options, str(path)),
            *("--", sys.executable, "-m", "power_cut_rig", *words),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=True,
        timeout=120,
    )


def cuts_of(path: Path, count: int, seed: int, modes: Sequence[Mode] = MODES) -> list[Cut]:
    return choose(FileRecording.load(path) if FileRecording.is_one(path) else Recording.load(path), count, seed, modes)


def judged(path: Path, cuts: Sequence[Cut], plant: str = "") -> Tally:
    """Every one of these states, on all processors."""
    argument = json.dumps({"plant": plant})
    return campaign.run(path, cuts, "power_cut_rig:judge", argument, jobs=os.cpu_count() or 1)


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("sell", "recover"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plant", default="")
    parser.add_argument("--phases", default="", help=f"in this order; default: in any, {','.join(PHASES)}")
    parser.add_argument("--run", type=int, default=0, help="how often this process has been killed")
    options = parser.parse_args(arguments)
    plant_database(options.plant)
    control = os.open(os.environ["SD_TOLD"], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def say(word: dict[str, Any]) -> None:
        os.write(control, json.dumps(word).encode() + b"\n")

    seed = options.seed * RUNS_MAX + options.run
    till = Till(Path(os.environ["SD_CARD"]) / DIRECTORY, say, seed=seed, plant=options.plant)
    till.rig.clock.now_ms += options.run * 86_400_000
    till.open()
    names = options.phases.split(",") if options.phases else till.chance.sample(list(PHASES), len(PHASES))
    while options.what == "sell" and names:
        name = names.pop(0)
        try:
            PHASES[name](till)
        except Killed:
            rest = ["--phases", ",".join(names)] if names else []
            words = ["sell" if names else "recover", "--seed", str(options.seed), "--plant", options.plant]
            words += [*rest, "--run", str(options.run + 1)]
            # Replacing the process closes its files and nothing else, as killing it does.
            os.execv(sys.executable, [sys.executable, "-m", "power_cut_rig", *words])  # noqa: S606
    till.ledger.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

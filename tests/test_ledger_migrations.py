"""An older database is brought up to date: as if it had always been of this form, whatever cuts it off.

`ledger_form_1.db.xz` was written by the release that had form 1: an accepted sale, one that the host approved, one
being reversed, a declined one, and, after a boot without a synchronised clock, a settled and an open one.
"""

from __future__ import annotations

import json
import lzma
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from ledger_rig import seeded
from store_rig import PowerCut, Tape, cells, copied, cut_at

from terminal.ledger.errors import DiskTrouble, KeyUnavailable, LedgerError, LedgerTooNew
from terminal.ledger.fields import FieldCipher
from terminal.ledger.journal import Record, RecordType
from terminal.ledger.keys import Keyring, SecretKey
from terminal.ledger.migrations import COPIES_MAX, MIGRATIONS, Migration, migrate
from terminal.ledger.models import SCHEMA_VERSION, LedgerDatabase
from terminal.ledger.states import State
from terminal.ledger.store import Store

_made = seeded(42)  # as the release's tests made their keys
DATA, CHAIN = SecretKey(_made(32)), SecretKey(_made(32))
KEYS = Keyring(DATA)
FORM_1 = lzma.decompress(Path(__file__).with_name("ledger_form_1.db.xz").read_bytes())


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "state" / "ledger.db"
    path.parent.mkdir()
    path.write_bytes(FORM_1)
    yield path


def opened(path: Path) -> Store:
    store = Store(path, KEYS, CHAIN, seeded(3))
    assert store.open() is not None
    return store


def schema(path: Path) -> tuple[dict[str, list[Any]], set[str]]:
    with closing(sqlite3.connect(path)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = {name: list(database.execute(f'PRAGMA table_info("{name}")')) for name in tables}
        indexes = {
            str(row) for row in database.execute("SELECT name, tbl_name, sql FROM sqlite_master WHERE type = 'index'")
        }
    return columns, indexes


def as_now(path: Path) -> list[Record]:
    """The old database's records, with the bodies that this release would have written."""
    records = []
    with closing(sqlite3.connect(path)) as database:
        for sequence, type_, trimmed, payload in database.execute(
            "SELECT sequence, type, trimmed, payload FROM records ORDER BY sequence"
        ):
            plain = AESGCM(DATA.material).decrypt(trimmed[128:140], trimmed[140:-32], trimmed[:128])
            body, content = json.loads(plain), None
            if type_ == RecordType.CHECKPOINT:
                body["epoch_of"] = None
            if type_ == RecordType.OUTCOME:
                card = body.pop("card")
                body |= {"scheme": card and card["scheme"], "contact": bool(card and card["contact"])}
                content = card and json.dumps(card).encode()
            records.append(
                Record(
                    sequence=sequence,
                    type=RecordType(type_),
                    epoch=1,
                    boot_id=UUID(bytes=trimmed[24:40]),
                    monotonic_ms=int.from_bytes(trimmed[40:48], "big"),
                    wall_ms=int.from_bytes(trimmed[48:56], "big"),
                    synchronised=bool(trimmed[7] & 1),
                    mac=trimmed[-32:],
                    body=body,
                    trimmed=trimmed,
                    payload=payload,
                    content=content or answer(body.get("card_ref")),
                )
            )
    return records


def answer(card_ref: str | None) -> bytes | None:
    tape = Tape()
    tape.answer({"transaction": "x"}, "approved", card_ref=card_ref)
    return tape.records[0].content if card_ref else None


def test_an_old_database_becomes_as_if_it_had_always_been_new(path: Path, tmp_path: Path) -> None:
    """Two ways that share no code: form 1 brought up to date, and the newest built from the same records."""
    store = opened(path)
    assert [(sale.number, sale.state, sale.amount.minor) for sale in store.transactions(9, 99)] == [
        (6, State.OPENED, 3200),
        (5, State.SETTLED, 1600),
        (4, State.DECLINED, 800),
        (3, State.REVERSING, 400),
        (2, State.APPROVED, 200),
        (1, State.ACCEPTED, 100),
    ]
    assert [sale.number for sale in store.by_card_ref("card-ref-b")] == [2, 5]
    reference = store.by_reference("order-1")
    assert reference is not None
    assert reference.number == 1
    assert (store.last_number(), store.last_envelope_number(), store.running().boot_id) == (6, 5, UUID(int=8))
    store.close()

    fresh = tmp_path / "fresh.db"
    other = Store(fresh, KEYS, CHAIN, seeded(4))
    other.open()
    other.create(1)
    other.apply(as_now(path))
    other.apply((), other.erasable())
    other.close()
    assert schema(path) == schema(fresh)
    migrated, built = cells(path, KEYS), cells(fresh, KEYS)
    for row in (*migrated["transactions"], *built["transactions"]):
        row["details"] = dict(sorted(row["details"].items()))
    assert migrated == built


def test_the_old_database_is_kept_and_opens_as_it_was(path: Path) -> None:
    opened(path).close()
    kept = path.with_name(f"ledger.db.before-{SCHEMA_VERSION}")
    assert kept.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(kept)) as copy, closing(sqlite3.connect(":memory:")) as before:
        before.deserialize(FORM_1.replace(FORM_1[18:20], b"\1\1", 1))  # not WAL: memory has none
        assert list(copy.iterdump()) == list(before.iterdump())
    made = kept.stat().st_mtime_ns
    opened(path).close()  # once
    assert kept.stat().st_mtime_ns == made


def test_only_so_many_copies_are_kept(path: Path) -> None:
    for number in range(5):
        path.with_name(f"ledger.db.before-0{number}").write_bytes(b"older")
    opened(path).close()
    kept = sorted(copy.name for copy in path.parent.glob("ledger.db.before-*"))
    assert len(kept) == COPIES_MAX
    assert f"ledger.db.before-{SCHEMA_VERSION}" in kept


def test_cut_off_at_any_statement_it_starts_again(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(path).close()
    whole = cells(path, KEYS)
    cuts, states = 0, set()
    for statement in range(1, 1_000):
        one = tmp_path / f"cut-{statement}" / "ledger.db"
        one.parent.mkdir()
        one.write_bytes(FORM_1)
        store = Store(one, KEYS, CHAIN, seeded(statement))
        through = False
        with cut_at(monkeypatch, statement), suppress(PowerCut):
            store.open()
            through = True
        if through:
            store.close()
            break
        cuts += 1
        left = copied(one, tmp_path / f"left-{statement}")
        store.close()
        states.add(version(left))
        again = opened(left)
        again.close()
        assert cells(left, KEYS) == whole, f"cut at statement {statement}"
    assert cuts > 50
    assert states == {1, 2, 3}  # of the cuts some came before a step's commit and some after it


def version(path: Path) -> int:
    """Looked up in a copy, so that looking changes nothing."""
    looked = copied(path, path.parent / "look")
    with closing(sqlite3.connect(looked)) as database:
        return int(database.execute("SELECT schema_version FROM meta").fetchone()[0])


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE totals",
        "DELETE FROM outbox WHERE number = 1",
        'ALTER TABLE records DROP COLUMN "type"',
        "ALTER TABLE transactions RENAME COLUMN shown TO seen",
    ],
)
def test_a_step_that_loses_something_is_taken_back(path: Path, statement: str) -> None:
    def contract(database: LedgerDatabase, _: object) -> None:
        for index in ("records_with_card", "transactions_unshown"):
            database.run(f"DROP INDEX {index}")
        database.run(statement)

    database = LedgerDatabase(path, FieldCipher(KEYS, seeded(5)))
    database.connect()
    with pytest.raises(LedgerError, match="taken back"):
        migrate(database, path, 1, lambda _: b"", seal=lambda: None, steps=[Migration(2, 2, contract)])
    database.close()
    with closing(sqlite3.connect(path)) as after, closing(sqlite3.connect(":memory:")) as before:
        before.deserialize(FORM_1.replace(FORM_1[18:20], b"\1\1", 1))
        assert list(after.iterdump()) == list(before.iterdump())
    opened(path).close()  # control: the step that only adds is not


def test_without_room_for_the_copy_nothing_is_changed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        store = Store(path, KEYS, CHAIN, seeded(6))
        with pytest.raises(DiskTrouble, match="No space"):
            store.open()
        store.close()
    assert version(path) == 1
    opened(path).close()


def test_another_key_or_a_newer_form_is_left_alone(path: Path) -> None:
    for keys, chain in ((Keyring(SecretKey(bytes(32))), CHAIN), (KEYS, SecretKey(bytes(32)))):
        store = Store(path, keys, chain, seeded(7))
        with pytest.raises(KeyUnavailable):
            store.open()
        store.close()
    assert version(path) == 1
    assert [file.name for file in path.parent.glob("*before*")] == []
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE meta SET schema_version = 9, reader_version_min = 9")
        database.commit()
    store = Store(path, KEYS, CHAIN, seeded(7))
    with pytest.raises(LedgerTooNew, match="form 9"):
        store.open()
    store.close()


def test_the_steps_are_in_order_and_lead_here() -> None:
    assert [step.version for step in MIGRATIONS] == list(range(2, SCHEMA_VERSION + 1))


def test_it_goes_on_from_there(path: Path) -> None:
    store = opened(path)
    tape = Tape(key=DATA, boot=8, now_ms=10_000_000)
    tape.records.extend([None] * 23)  # type: ignore[list-item]
    tape.sales, tape.envelopes = 6, 5
    tape.clock_set()
    sale = tape.sell()
    assert store.apply(tape.records[23:]) == 4
    assert store.last_number() == 7
    settled = store.transactions(9, 6)[0]
    assert (settled.number, settled.corrected, settled.clock_synchronised) == (5, True, False)
    assert store.transaction(UUID(sale["transaction"])) is not None
    store.close()

"""Encrypted fields: round trips, bound to their cell, and closed to every way around."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from ledger_rig import seeded

from terminal.ledger.errors import LedgerCorrupt
from terminal.ledger.fields import FieldCipher
from terminal.ledger.keys import Keyring, SecretKey
from terminal.ledger.models import LedgerDatabase, Rows, Tables, TransactionRow, compiled

KEY = SecretKey(seeded(5)(32))


@pytest.fixture
def tables(tmp_path: Path) -> Iterator[Tables]:
    database = LedgerDatabase(tmp_path / "a b?.db", FieldCipher(Keyring(KEY), seeded(6)))
    database.connect()
    tables = Tables(database)
    tables.create()
    yield tables
    database.close()


def insert(tables: Tables, number: int, **values: Any) -> TransactionRow:
    values = {"amount_minor": 1250, "currency": "EUR", "details": {"kind": "sale", "ö": [1, None]}} | values
    return tables.transactions.create(id=UUID(int=number), number=number, state="opened", opened_sequence=1, **values)


def raw(tables: Tables, column: str, number: int) -> bytes:
    cursor = tables.database.execute_sql(f"SELECT {column} FROM transactions WHERE number = ?", (number,))  # noqa: S608
    return bytes(cursor.fetchone()[0])


def move(tables: Tables, value: bytes, column: str, number: int) -> None:
    tables.database.execute_sql(f"UPDATE transactions SET {column} = ? WHERE number = ?", (value, number))  # noqa: S608


def read(tables: Tables, number: int) -> TransactionRow:
    return tables.transactions.get_by_id(UUID(int=number))


def test_round_trip_and_update(tables: Tables) -> None:
    insert(tables, 1)
    row = read(tables, 1)
    assert (row.amount_minor, row.currency, row.details) == (1250, "EUR", {"kind": "sale", "ö": [1, None]})
    row.amount_minor = -7
    row.save()
    assert read(tables, 1).amount_minor == -7
    assert read(tables, 1).currency == "EUR"


def test_equal_values_look_different(tables: Tables) -> None:
    insert(tables, 1)
    insert(tables, 2)
    assert raw(tables, "currency", 1) != raw(tables, "currency", 2)
    assert raw(tables, "currency", 1).startswith(KEY.id)
    assert b"EUR" not in raw(tables, "currency", 1)


@pytest.mark.parametrize(("column", "number"), [("amount_minor", 2), ("currency", 1)])
def test_a_moved_value_does_not_decrypt(tables: Tables, column: str, number: int) -> None:
    insert(tables, 1)
    insert(tables, 2)
    move(tables, raw(tables, "amount_minor", 1), column, number)
    with pytest.raises(LedgerCorrupt, match=column):
        getattr(read(tables, number), column)
    move(tables, raw(tables, "amount_minor", 1), "amount_minor", 1)  # control: put where it came from
    assert read(tables, 1).amount_minor == 1250


def test_every_flipped_bit_is_noticed(tables: Tables) -> None:
    insert(tables, 1)
    sealed = raw(tables, "amount_minor", 1)
    for bit in range(len(sealed) * 8):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        move(tables, bytes(flipped), "amount_minor", 1)
        with pytest.raises(LedgerCorrupt):
            _ = read(tables, 1).amount_minor


def test_only_an_assigned_value_is_stored(tables: Tables) -> None:
    insert(tables, 1)
    table = tables.transactions
    for way_around in (
        lambda: table.insert_many([{"id": UUID(int=9), "amount_minor": 5}]).execute(),
        lambda: table.update(amount_minor=5).execute(),
        lambda: list(table.select().where(table.amount_minor == 1250)),
        lambda: list(table.select().where(table.currency << ["EUR"])),
        lambda: table(amount_minor=5).save(force_insert=True),
    ):
        with pytest.raises(TypeError, match="encrypted"):
            way_around()
    assert read(tables, 1).amount_minor == 1250


def test_decryption_is_lazy(tables: Tables) -> None:
    insert(tables, 1)
    move(tables, b"damaged", "details", 1)
    assert read(tables, 1).state == "opened"
    with pytest.raises(LedgerCorrupt):
        _ = read(tables, 1).details


def test_a_retired_key_opens_and_never_seals() -> None:
    place = {"table": "t", "column": "c", "row": "1"}
    new = SecretKey(seeded(7)(32))
    old_cell = FieldCipher(Keyring(KEY), seeded(6)).seal(b"secret", **place)
    both = FieldCipher(Keyring(new, (KEY,)), seeded(6))
    assert both.open(old_cell, **place) == b"secret"
    assert both.seal(b"secret", **place)[:4] == new.id
    for ring in (Keyring(new), Keyring(new, (SecretKey(seeded(8)(32)),))):  # control: without it, it does not open
        with pytest.raises(LedgerCorrupt):
            FieldCipher(ring, seeded(6)).open(old_cell, **place)


def test_precompiled_statements_seal_to_the_same_cell(tables: Tables) -> None:
    """What `Rows` writes peewee reads, and the other way round; and it is closed to the same ways around."""
    rows = Rows(tables.transactions)
    values = {"number": 1, "state": "opened", "opened_sequence": 1, "amount_minor": 1250, "currency": "EUR"}
    rows.insert(id=UUID(int=1), details={"kind": "sale"}, **values)
    row = read(tables, 1)
    assert (row.amount_minor, row.currency, row.details, row.shown) == (1250, "EUR", {"kind": "sale"}, None)
    mine = rows.get(UUID(int=1))
    assert mine is not None
    before = raw(tables, "currency", 1)
    mine.amount_minor, mine.state = 99, "void"
    rows.save(mine)
    assert (read(tables, 1).amount_minor, read(tables, 1).state) == (99, "void")
    assert raw(tables, "currency", 1) == before  # only what was assigned is written
    insert(tables, 2)
    move(tables, raw(tables, "amount_minor", 1), "amount_minor", 2)
    moved = rows.get(UUID(int=2))
    assert moved is not None
    with pytest.raises(LedgerCorrupt, match="amount_minor"):
        _ = moved.amount_minor
    assert rows.get(UUID(int=3)) is None
    with pytest.raises(AssertionError, match="by name"):
        compiled(tables.transactions.select().where(tables.transactions.state == "void"))


def test_two_databases_in_one_process_do_not_meet(tables: Tables, tmp_path: Path) -> None:
    database = LedgerDatabase(tmp_path / "other.db", FieldCipher(Keyring(SecretKey(seeded(8)(32))), seeded(9)))
    database.connect()
    other = Tables(database)
    other.create()
    insert(other, 1, amount_minor=99)
    insert(tables, 1)
    assert (read(tables, 1).amount_minor, read(other, 1).amount_minor) == (1250, 99)
    database.close()

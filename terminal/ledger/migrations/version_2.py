"""Form 2: running time and true times, what must be known in order to forget, checkpoints.

What the new columns hold is read from the records, as if they had been there from the first one on. The layout of
records and cells is that of form 1, and stays written down here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from terminal.ledger.errors import LedgerCorrupt
from terminal.ledger.models import LedgerDatabase

_COLUMNS: Final = (
    'ALTER TABLE "meta" ADD COLUMN "first_sequence" INTEGER',
    'ALTER TABLE "meta" ADD COLUMN "running_ms" INTEGER NOT NULL DEFAULT 0',
    'ALTER TABLE "meta" ADD COLUMN "boot_id" BLOB',
    'ALTER TABLE "meta" ADD COLUMN "monotonic_ms" INTEGER NOT NULL DEFAULT 0',
    'ALTER TABLE "meta" ADD COLUMN "last_number" INTEGER NOT NULL DEFAULT 0',
    'ALTER TABLE "meta" ADD COLUMN "last_envelope_number" INTEGER NOT NULL DEFAULT 0',
    'ALTER TABLE "meta" ADD COLUMN "last_checkpoint" INTEGER',
    'ALTER TABLE "meta" ADD COLUMN "countersigned" INTEGER',
    'ALTER TABLE "meta" ADD COLUMN "epoch_of" TEXT',
    'ALTER TABLE "meta" ADD COLUMN "sync_head" TEXT',
    'ALTER TABLE "meta" ADD COLUMN "settled" BLOB',
    'ALTER TABLE "meta" ADD COLUMN "seal" BLOB',
    'ALTER TABLE "records" ADD COLUMN "transaction" TEXT',
    'ALTER TABLE "records" ADD COLUMN "forgotten" INTEGER NOT NULL DEFAULT 0',
    'ALTER TABLE "transactions" ADD COLUMN "last_sequence" INTEGER NOT NULL DEFAULT 0',
    'ALTER TABLE "transactions" ADD COLUMN "boot_id" BLOB',
    'ALTER TABLE "transactions" ADD COLUMN "monotonic_ms" INTEGER',
    'ALTER TABLE "transactions" ADD COLUMN "running_ms" INTEGER NOT NULL DEFAULT 0',
    'ALTER TABLE "transactions" ADD COLUMN "synchronised" INTEGER NOT NULL DEFAULT 1',
    'ALTER TABLE "transactions" ADD COLUMN "final_ms" INTEGER',
    'ALTER TABLE "transactions" ADD COLUMN "has_card" INTEGER NOT NULL DEFAULT 0',
    'ALTER TABLE "transactions" ADD COLUMN "card_tag" BLOB',
)
_INDEXES: Final = (
    'CREATE INDEX records_unneeded ON records (sequence) WHERE "transaction" IS NULL',
    "CREATE INDEX records_forgotten ON records (sequence) WHERE forgotten = 1",
    "CREATE INDEX outbox_checkpoints ON outbox (number) WHERE event = 'checkpoint'",
    "CREATE INDEX transactions_unsynchronised ON transactions (boot_id) WHERE synchronised = 0",
    "CREATE INDEX transactions_final ON transactions (final_ms) WHERE final_ms IS NOT NULL",
    "CREATE INDEX transactions_with_card ON transactions (final_ms) WHERE has_card = 1",
    "CREATE INDEX transactions_of_card ON transactions (card_tag) WHERE card_tag IS NOT NULL",
)

_UNFINISHED: Final = {"opened", "authorising", "accepted", "completing", "reversing"}
_DECIDING: Final = {2, 5, 6}  # OUTCOME, ANSWER, REVERSAL: what changes a state
_HEADER: Final = struct.Struct(">8xI4sQ16sQq")  # epoch, data key, sequence, boot, monotonic and wall time


class _Seen(NamedTuple):
    """What the records say of one transaction: of its first one, and of the last that changed its state."""

    boot_id: bytes
    monotonic_ms: int
    running_ms: int
    last_sequence: int
    decided_ms: int


def expand(database: LedgerDatabase, card_tag: Callable[[str], bytes]) -> None:
    for statement in (*_COLUMNS, *_INDEXES):
        database.run(statement)
    seen = _read_records(database)
    cells = {"table": "transactions", "column": "details"}
    rows = database.execute_sql("SELECT id, state, opened_sequence, details FROM transactions").fetchall()  # type: ignore[no-untyped-call]
    for id_, state, opened_sequence, sealed in rows:
        place = cells | {"row": str(UUID(id_))}
        details: dict[str, Any] = msgspec.json.decode(database.cipher.open(sealed, **place))
        card, card_ref = details.get("card"), details.get("card_ref")
        if card is not None:
            details |= {"scheme": card["scheme"], "contact": card["contact"]}
        known = seen.get(UUID(id_))
        if known is None:
            raise LedgerCorrupt("ledger.db lacks the records of a transaction: it is rebuilt from the journal")
        database.run(
            "UPDATE transactions SET details = ?, last_sequence = ?, boot_id = ?, monotonic_ms = ?, running_ms = ?, "
            "synchronised = ?, final_ms = ?, has_card = ?, card_tag = ? WHERE id = ?",
            database.cipher.seal(msgspec.json.encode(details), **place),
            max(known.last_sequence, opened_sequence),
            known.boot_id,
            known.monotonic_ms,
            known.running_ms,
            details["clock_synchronised"],
            None if state in _UNFINISHED else known.decided_ms,
            card is not None or card_ref is not None,
            None if card_ref is None else card_tag(card_ref),
            id_,
        )
    database.run(
        "UPDATE meta SET last_number = (SELECT COALESCE(MAX(number), 0) FROM transactions), "
        "last_envelope_number = (SELECT COALESCE(MAX(number), 0) FROM outbox)"
    )


def _read_records(database: LedgerDatabase) -> dict[UUID, _Seen]:
    """Name each record's transaction, and sum up how long the terminal was running."""
    seen: dict[UUID, _Seen] = {}
    first, running_ms, boot_id, monotonic_ms = None, 0, None, 0
    for sequence, type_, trimmed in database.execute_sql(
        "SELECT sequence, type, trimmed FROM records ORDER BY sequence"
    ).fetchall():  # type: ignore[no-untyped-call]
        _, _, _, boot, at_ms, wall_ms = _HEADER.unpack_from(trimmed)
        since_ms = monotonic_ms if boot == boot_id else 0
        passed_ms = max(0, at_ms - since_ms)
        first = sequence if first is None else first
        running_ms, boot_id, monotonic_ms = running_ms + passed_ms, boot, since_ms + passed_ms
        named = _body(database, trimmed).get("transaction")
        if named is None:
            continue
        id_ = UUID(named)
        database.run('UPDATE records SET "transaction" = ? WHERE sequence = ?', id_.hex, sequence)
        known = seen.get(id_, _Seen(boot, at_ms, running_ms, 0, 0))
        synchronised = trimmed[7] & 1
        if type_ in _DECIDING:
            known = known._replace(decided_ms=wall_ms if synchronised else 0)
        seen[id_] = known._replace(last_sequence=sequence)
    database.run(
        "UPDATE meta SET first_sequence = ?, running_ms = ?, boot_id = ?, monotonic_ms = ?",
        first,
        running_ms,
        boot_id,
        monotonic_ms,
    )
    return seen


def _body(database: LedgerDatabase, trimmed: bytes) -> dict[str, Any]:
    key = database.cipher.keys.by_id(trimmed[12:16])
    try:
        if key is None:
            raise ValueError("the id of no known key")
        plaintext = AESGCM(key.material).decrypt(trimmed[128:140], trimmed[140:-32], trimmed[:128])
    except (InvalidTag, ValueError) as error:
        raise LedgerCorrupt("ledger.db holds a record that was altered: it is rebuilt from the journal") from error
    return msgspec.json.decode(plaintext, type=dict[str, Any])

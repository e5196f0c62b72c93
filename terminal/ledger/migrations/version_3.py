"""Form 3: refunds name their sale, days end, and what the host said no to afterwards waits until somebody has seen it.

Older releases would count a refund as a sale. What was refused before this form is brought to somebody's notice now.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from terminal.ledger.models import LedgerDatabase

_STATEMENTS: Final = (
    'ALTER TABLE "transactions" ADD COLUMN "of" TEXT',
    'ALTER TABLE "transactions" ADD COLUMN "alert" INTEGER NOT NULL DEFAULT 0',
    'CREATE INDEX transactions_of_sale ON transactions ("of") WHERE "of" IS NOT NULL',
    "CREATE INDEX transactions_alert ON transactions (number) WHERE alert = 1",
    "UPDATE transactions SET alert = 1 WHERE state = 'refused'",
    'ALTER TABLE "meta" ADD COLUMN "host_status" TEXT',
    "DROP INDEX outbox_checkpoints",
    "CREATE INDEX outbox_checkpoints ON outbox (number) WHERE event IN ('batch', 'checkpoint')",
    "CREATE INDEX outbox_aside ON outbox (key) WHERE answered = 0 AND event IN ('advice', 'batch', 'checkpoint')",
)


def expand(database: LedgerDatabase, _: Callable[[str], bytes]) -> None:
    for statement in _STATEMENTS:
        database.run(statement)

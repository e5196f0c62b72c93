"""What the terminal remembers: the journal (what happened, chained) and the ledger (the queryable state).

`Ledger` is the way in; `Envelopes` and `verify_answer` are the way to the host and back; `resolve` ends, at the start,
what a power cut had cut off.
"""

from terminal.ledger.errors import (
    AnswerRejected,
    DiskTrouble,
    IllegalTransition,
    JournalFull,
    KeyUnavailable,
    LedgerCorrupt,
    LedgerError,
    LedgerLocked,
    LedgerTooNew,
    NoSuchTransaction,
    ReferenceTaken,
)
from terminal.ledger.keys import KeyStore, TerminalKeys, fingerprint, generate, key_id
from terminal.ledger.ledger import Ledger, LedgerSettings
from terminal.ledger.recovery import RecoveryReport, Resolution, resolve
from terminal.ledger.sealing import Envelopes, digest, verify_answer
from terminal.ledger.states import FINAL, SOLD, Change, State, advance
from terminal.ledger.values import (
    Answer,
    CardSummary,
    Decision,
    Event,
    Exposure,
    Kind,
    OutboxItem,
    ReversalReason,
    Total,
    Transaction,
    Unsent,
    Verdict,
)

__all__ = [
    "FINAL",
    "SOLD",
    "Answer",
    "AnswerRejected",
    "CardSummary",
    "Change",
    "Decision",
    "DiskTrouble",
    "Envelopes",
    "Event",
    "Exposure",
    "IllegalTransition",
    "JournalFull",
    "KeyStore",
    "KeyUnavailable",
    "Kind",
    "Ledger",
    "LedgerCorrupt",
    "LedgerError",
    "LedgerLocked",
    "LedgerSettings",
    "LedgerTooNew",
    "NoSuchTransaction",
    "OutboxItem",
    "RecoveryReport",
    "ReferenceTaken",
    "Resolution",
    "ReversalReason",
    "State",
    "TerminalKeys",
    "Total",
    "Transaction",
    "Unsent",
    "Verdict",
    "advance",
    "digest",
    "fingerprint",
    "generate",
    "key_id",
    "resolve",
    "verify_answer",
]

"""What can go wrong with the ledger. The class says the remedy; the message says what happened, what it means for the
money, and what to do. No message holds card data, a key or an amount.
"""

from __future__ import annotations

import errno
import sqlite3
from typing import Final

from terminal.errors import TerminalError

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_FULL_DATABASE: Final = frozenset({sqlite3.SQLITE_FULL})


class LedgerError(TerminalError):
    """Anything that the ledger reports."""

    exit_code = 5


class KeyUnavailable(LedgerError):
    """A key is missing, unreadable, or not the one that this ledger was made with. Nothing was written."""


class LedgerLocked(LedgerError):
    """Another process holds this ledger."""


class LedgerTooNew(LedgerError):
    """A newer release wrote this ledger in a form that this one does not understand. Nothing was written."""


class LedgerCorrupt(LedgerError):
    """Something that was safely recorded is damaged. `sequence` names the first bad record, where one is known."""

    def __init__(self, message: str, sequence: int | None = None) -> None:
        super().__init__(message)
        self.sequence = sequence

    @classmethod
    def at_record(cls, sequence: int, what: str) -> LedgerCorrupt:
        return cls(
            f"journal record {sequence} {what}: sales from there on may be misread, so none is taken; "
            "keep the state directory as it is and restore a copy, or replace the storage",
            sequence,
        )


class NoRoom(LedgerError):
    """No room for another sale. What is running or waiting for the host can still be finished."""


class JournalFull(NoRoom):
    """The journal holds as much as it can that waits for the host."""


class DiskTrouble(LedgerError):
    """The storage refused a read, a write or a flush (full, read-only, I/O error)."""

    full = False

    @classmethod
    def of(cls, error: BaseException) -> DiskTrouble:
        made = cls(
            f"the storage failed ({error}): whether the last sale was recorded is known only after a restart, so do "
            "not hand over goods for it; check the SD card and free space, then restart"
        )
        made.full = getattr(error, "errno", None) in _FULL or getattr(error, "sqlite_errorcode", None) in _FULL_DATABASE
        return made


class IllegalTransition(LedgerError):
    """A transaction cannot change like this from where it stands; it stays as it is. Whoever was first has won."""

    def __init__(self, state: str, change: str) -> None:
        super().__init__(
            f"a transaction that is {state} does not take '{change}': nothing was changed; read its state and show that"
        )
        self.state = state
        self.change = change


class AnswerRejected(LedgerError):
    """What came as the host's answer is not believed. `reason` is a stable word."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(
            f"the answer is not believed ({detail}): the transaction stays as it is and is asked again; "
            "if this repeats, compare the host's key and the terminal's configuration"
        )
        self.reason = reason


class BackupError(LedgerError):
    """A backup could not be written, or what is read is no whole backup. The ledger itself is not concerned."""


class NoSuchTransaction(LedgerError):
    """There is no such transaction, reference or outbox item in this ledger."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is not in this ledger: nothing was charged under it here; check what was asked for")


class DayStaysOpen(LedgerError):
    """The day cannot end now: nothing was changed."""


class NotRefundable(LedgerError):
    """This refund, or this void, would pay back more than was sold. Nothing was changed. `reason` is a stable word."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ReferenceTaken(LedgerError):
    """A register's reference came again with another amount, or for something else."""

    def __init__(self) -> None:
        super().__init__(
            "this reference already belongs to a sale or refund of another amount: nothing new was charged or paid "
            "back; use a fresh reference"
        )

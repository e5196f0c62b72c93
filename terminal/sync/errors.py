"""What can go wrong in the sync service. What a destination answers is no error but a value: see `destinations`."""

from __future__ import annotations

from terminal.control import TerminalUnavailable
from terminal.errors import TerminalError

__all__ = [
    "AnswerRejected",
    "SpoolCorrupt",
    "SpoolKeyWrong",
    "SpoolUnavailable",
    "SyncError",
    "TerminalUnavailable",
    "Unreadable",
    "Unsendable",
]


class NotListed(Exception):
    """What a destination has cannot be listed now. The message says why."""


class SyncError(TerminalError):
    """Anything that the sync service reports; the message says what it means for the money and what to do."""

    exit_code = 5


class AnswerRejected(SyncError):
    """The terminal does not believe a host's answer: nothing was decided, the item is sent again."""


class SpoolUnavailable(SyncError):
    """The spool cannot be opened or written: nothing is sent. Sales stay stored in the terminal's own ledger."""


class SpoolCorrupt(SpoolUnavailable):
    """The spool's file is damaged or from a newer version: it is left as it is, nothing is sent."""


class SpoolKeyWrong(SpoolUnavailable):
    """The spool was written with another key: put the right one back."""


class Unsendable(SyncError):
    """The configuration of a destination cannot be used: nothing is sent, everything stays stored."""


class Unreadable(SyncError):
    """One stored item cannot be decrypted: it is held for a person, the others go on."""

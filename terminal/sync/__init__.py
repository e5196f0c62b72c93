"""The sync service: uploads what the terminal has committed, and brings back the answers.

It runs as its own user with its own store and key, reaches the network, and can neither read a card nor forge an
approval: envelopes arrive signed and sealed, and answers are verified by the terminal. `spool` stores, `step` decides
what can be done now, `couriers` carry, `destinations` speak to the other side, `loop` waits.
"""

from terminal.sync.destinations.host import HostSettings
from terminal.sync.errors import AnswerRejected, SpoolUnavailable, SyncError, TerminalUnavailable, Unsendable
from terminal.sync.loop import Place, SyncSettings, run
from terminal.sync.spool import OutboxItem
from terminal.sync.step import Backoff, LinkReport, Terminal

__all__ = [
    "AnswerRejected",
    "Backoff",
    "HostSettings",
    "LinkReport",
    "OutboxItem",
    "Place",
    "SpoolUnavailable",
    "SyncError",
    "SyncSettings",
    "Terminal",
    "TerminalUnavailable",
    "Unsendable",
    "run",
]

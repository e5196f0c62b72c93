"""Where the register and the flow meet: one sale at a time lies on the desk.

The register's calls arrive on their own threads, the flow runs on the main thread; the desk passes a sale in, a
cancellation in, and the result out. What a result is worth is never decided here: it is read from the ledger.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Final
from uuid import UUID

from drivers.interfaces import Key
from terminal.ledger.values import Transaction

_KEYS_MAX: Final = 16  # one amount and a confirmation, typed while a screen was being drawn


class DeskBusy(Exception):
    """Another sale is being taken."""


class Desk:
    """Thread-safe."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: Transaction | None = None
        self._running: UUID | None = None
        self._decided: UUID | None = None
        self._cancelled = False
        self._asking = False  # a question in the middle of a sale: keys are its answer
        self._keys: deque[Key] = deque(maxlen=_KEYS_MAX)
        self._verdicts: dict[UUID, bool] = {}

    def lay(self, transaction: Transaction) -> None:
        """A register asks for this sale. Raises `DeskBusy`; laying the same sale again is harmless."""
        with self._condition:
            current = self._waiting.id if self._waiting else self._running
            if current is not None and current != transaction.id:
                raise DeskBusy("another sale is being taken: finish or cancel it first; nothing was charged")
            if current is None:
                self._waiting = transaction
                self._cancelled = False
                self._condition.notify_all()

    def take(self, timeout_ms: int) -> Transaction | Key | None:
        """The flow waits for what comes next: a register's sale, or a key."""
        with self._condition:
            self._condition.wait_for(lambda: self._waiting is not None or self._keys, timeout_ms / 1000)
            taken, self._waiting = self._waiting, None
            self._running = taken.id if taken else None
            if taken is None and self._keys:
                return self._keys.popleft()
            return taken

    def begin(self, transaction: Transaction) -> bool:
        """A sale that was typed on the device itself. False when a register was quicker; keys typed before are gone."""
        with self._condition:
            self._keys.clear()
            if self._waiting is not None:
                return False
            self._running = transaction.id
            self._cancelled = False
            return True

    def press(self, key: Key) -> None:
        """A key was pressed. In a sale only cancel counts, and what answers a question; the rest is forgotten."""
        with self._condition:
            if self._running is not None:
                self._cancelled = self._cancelled or key is Key.CANCEL
            if self._running is None or self._asking:
                self._keys.append(key)
            self._condition.notify_all()

    def ask(self) -> None:
        """From here on keys answer a question of the sale that is taken; none that was pressed before."""
        with self._condition:
            self._keys.clear()
            self._asking = True

    def answer(self, timeout_ms: int) -> Key | None:
        """The next key of the answer. None when nothing was pressed, or the sale was cancelled from elsewhere."""
        with self._condition:
            self._condition.wait_for(lambda: self._keys or self._cancelled, timeout_ms / 1000)
            return self._keys.popleft() if self._keys else None

    def answered(self) -> None:
        """The question is over, however it ended."""
        with self._condition:
            self._keys.clear()
            self._asking = False

    def decided(self) -> None:
        """The flow has shown the result; the card may still lie on the reader."""
        with self._condition:
            self._decided = self._running
            self._condition.notify_all()

    def done(self) -> None:
        """The device is free for the next sale."""
        with self._condition:
            self._running = self._decided = None
            self._condition.notify_all()

    def cancel(self, transaction: UUID) -> bool:
        """Ask the flow to stop waiting for a card. False when this sale is not being taken."""
        with self._condition:
            current = self._waiting.id if self._waiting else self._running
            if current != transaction:
                return False
            self._cancelled = True
            self._condition.notify_all()
            return True

    def is_taking(self, transaction: UUID) -> bool:
        """Whether this sale lies here and nobody has decided it yet."""
        with self._condition:
            return self._is_undecided(transaction)

    @property
    def busy(self) -> bool:
        """A sale is being taken, or its card still lies on the reader."""
        with self._condition:
            return self._waiting is not None or self._running is not None

    @property
    def cancelled(self) -> bool:
        with self._condition:
            return self._cancelled

    def wait_until_decided(self, transaction: UUID, timeout_ms: int) -> bool:
        """A register waits for the result of its sale. False when the device is still busy with it."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._is_undecided(transaction), timeout_ms / 1000)

    def resolve(self, transaction: UUID, *, keep: bool) -> None:
        """A person says whether a sale that was never shown stands."""
        with self._condition:
            self._verdicts[transaction] = keep
            self._condition.notify_all()

    def verdict(self, transaction: UUID, timeout_ms: int) -> bool | None:
        """Wait for that word. None when nobody has said anything yet."""
        with self._condition:
            self._condition.wait_for(lambda: transaction in self._verdicts, timeout_ms / 1000)
            return self._verdicts.pop(transaction, None)

    def _is_undecided(self, transaction: UUID) -> bool:
        waiting = self._waiting.id if self._waiting else None
        return transaction == waiting or (transaction == self._running and transaction != self._decided)

"""What each card paid here last: a sale may be split to stay below the floor limit (EMV 4.4 Book 3, 10.6.1).

Terminal risk management adds the latest earlier amount of the same card to this one's. Which card it was is kept as a
keyed hash, as in the exception file, in memory only: after a restart nobody has paid yet, which costs no more than one
split sale that is not noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from terminal.emv.configuration import ExceptionEntry
from terminal.emv.exception_file import digest
from terminal.emv.outcome import Pan
from terminal.money import Amount, Currency

CARDS_MAX: Final = 1_000  # a busy shop's day; the one that was longest ago makes room
AGE_MAX_MS: Final = 24 * 3_600_000  # parts of one sale are paid one after the other, not on two days


class RecentSales:
    """The latest sale of each card. `key`: random bytes, never written. One thread at a time."""

    __slots__ = ("_key", "_now_ms", "_sales")

    def __init__(self, key: bytes, now_ms: Callable[[], int]) -> None:
        self._key = key
        self._now_ms = now_ms
        self._sales: dict[bytes, tuple[Amount, int]] = {}

    def note(self, pan: Pan, psn: bytes, amount: Amount) -> None:
        """This card has just paid."""
        known_as = self._known_as(pan, psn)
        self._sales.pop(known_as, None)  # so that the order is that of time
        self._sales[known_as] = amount, self._now_ms()
        if len(self._sales) > CARDS_MAX:
            del self._sales[next(iter(self._sales))]

    def earlier_minor(self, currency: Currency) -> Callable[[Pan, bytes], int]:
        """For `Environment.earlier_minor`, in a sale of this currency: amounts in another do not add up."""

        def earlier(pan: Pan, psn: bytes) -> int:
            amount, at_ms = self._sales.get(self._known_as(pan, psn), (Amount(0, currency), 0))
            recent = self._now_ms() - at_ms <= AGE_MAX_MS
            return amount.minor if recent and amount.currency == currency else 0

        return earlier

    def _known_as(self, pan: Pan, psn: bytes) -> bytes:
        number = psn.hex()
        return digest(self._key, ExceptionEntry(pan, int(number) if number.isdecimal() else None))

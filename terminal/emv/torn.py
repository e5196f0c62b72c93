"""What is remembered of a transaction whose card left while it computed its cryptogram (Book C-2, 3.7 and 6.9).

A card that knows RECOVER AC can be asked once more for the cryptogram that was lost on the air, instead of computing a
second one: its counters then count one sale. What the terminal had said must be taken up again exactly, or the
signature would not hold.

A memory belongs to one sale and ends with it. It holds card data, so that it never leaves the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from terminal.emv.decision import AcType
from terminal.emv.outcome import Cvm, OdaResult
from terminal.emv.results import Tvr

RECORDS_MAX: Final = 4  # several cards may be tried in one sale; the kernel's own limit is DF811D


@dataclass(frozen=True, slots=True, repr=False)
class TornRecord:
    """A transaction at the moment of its GENERATE AC."""

    pan: bytes
    psn: bytes | None
    drdol_data: bytes
    pdol_data: bytes
    cdol_data: bytes
    terminal: Mapping[int, bytes]
    card: Mapping[int, bytes]  # what it said of relay resistance, which it signs
    tvr: Tvr
    cvm: Cvm
    oda: OdaResult
    asked: AcType
    sign: bool

    def is_of(self, pan: bytes, psn: bytes | None) -> bool:
        return (self.pan, self.psn) == (pan, psn)


@dataclass(slots=True)
class TornRecords:
    """The records of one sale, the latest last."""

    _records: list[TornRecord] = field(default_factory=list, repr=False)

    def keep(self, record: TornRecord, at_most: int) -> None:
        """The oldest goes when there are too many."""
        self._records = [*self._records, record][-min(at_most, RECORDS_MAX) :]

    def find(self, pan: bytes, psn: bytes | None) -> TornRecord | None:
        return next((record for record in reversed(self._records) if record.is_of(pan, psn)), None)

    def drop(self, record: TornRecord) -> None:
        self._records = [each for each in self._records if each is not record]

    def __len__(self) -> int:
        return len(self._records)

"""What a kernel lets others see on its way: how far it has come, and what is known there.

A transaction can end long before there is a cryptogram, and its outcome then says no more than why. Whoever has to
account for it, as a replay must, looks on: each step is reported once it is done, with the data objects as they stand.
The view stays what it is, live, so that it also shows what came after the last step that was completed.

Looking on changes nothing. Whoever has seen enough raises an exception of its own: a kernel catches none but those of
its card, and a generator that is left this way has sent nothing further.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from terminal.emv.configuration import Activation


class Step(Enum):
    """What is done, in this order."""

    CANDIDATE_LIST = "candidate_list"
    SELECTION = "selection"
    INITIATION = "initiation"
    RECORDS = "records"
    AUTHENTICATION = "authentication"  # as far as it goes before a cryptogram: CDA and fast DDA come with one


class Listed(NamedTuple):
    """A line of the candidate list. `kernel` None: contact. `priority`: 1 is best, 0 states none."""

    adf_name: bytes
    label: bytes
    priority: int
    confirm: bool
    kernel: int | None


class View(Protocol):
    """What is known of a transaction under way; card data in clear, so that it stays in memory."""

    @property
    def activation(self) -> Activation: ...

    @property
    def kernel(self) -> int: ...

    @property
    def card(self) -> Mapping[int, bytes]: ...

    @property
    def terminal(self) -> Mapping[int, bytes]: ...


def _unseen_candidates(candidates: Sequence[Listed]) -> None:
    """Nobody looks on."""


def _unseen_step(step: Step, view: View) -> None:
    """Nobody looks on."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Who looks on: at the candidate list, then at each step of each application that was selected."""

    candidates: Callable[[Sequence[Listed]], None] = _unseen_candidates
    step: Callable[[Step, View], None] = _unseen_step

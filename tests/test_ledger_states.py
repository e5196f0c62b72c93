"""The states table: exactly the transitions of docs/formats.md, and nothing else moves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from terminal.ledger.errors import IllegalTransition
from terminal.ledger.states import FINAL, SOLD, Change, State, advance

FORMATS = Path(__file__).parents[1] / "docs" / "formats.md"


def documented() -> dict[tuple[State, Change], State]:
    """The table as people read it."""
    section = FORMATS.read_text(encoding="utf-8").split("## Transaction states")[1].split("\n## ")[0]
    table: dict[tuple[State, Change], State] = {}
    for sources, on, target in re.findall(
        r"^\| ([a-z, ]+) \| ([A-Z]+ [a-z, ]+) \| ([a-z]+) \|$", section, re.MULTILINE
    ):
        word, words = on.split(" ", 1)
        for source in sources.split(", "):
            for one in words.split(", "):
                table[State(source), Change(f"{word.lower()} {one}")] = State(target)
    return table


def test_every_pair_is_as_documented() -> None:
    table = documented()
    assert len(table) == 23
    for state in State:
        for change in Change:
            if (state, change) in table:
                assert advance(state, change) is table[state, change]
            else:
                with pytest.raises(IllegalTransition) as caught:
                    advance(state, change)
                assert (caught.value.state, caught.value.change) == (state, change)


def test_final_states_are_final_and_sold_ones_can_be_taken_back() -> None:
    assert {State.DECLINED, State.VOID, State.REFUSED, State.REVERSED} == FINAL
    assert all(advance(state, Change.VOIDED) is State.REVERSING for state in SOLD)


def test_a_time_out_never_takes_back_an_approval() -> None:
    with pytest.raises(IllegalTransition):
        advance(State.APPROVED, Change.TIMED_OUT)

"""The model, searched whole; the code's tables held against its own; and its histories played on the real stores."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
from model import tables
from model.conformance import Real
from model.search import Counterexample, Found, Search, varied
from model.steps import Flaw, Scenario, Step

from terminal.ledger.errors import IllegalTransition
from terminal.ledger.states import Change, State, advance
from terminal.sync import spool as spool_module
from terminal.sync.spool import TRANSITIONS

SCENARIOS = {
    "a tapped card, three faults": Scenario(faults=3),
    "a tapped card, two faults, a person who voids or holds": Scenario(faults=2, acts=1),
    "an inserted card, two faults": Scenario(("chip",), faults=2),
    "a tapped card and Stripe, one fault": Scenario(stripe=True, faults=1, may_accept=False, local_ends=False),
    "an inserted card and Stripe, one fault": Scenario(
        ("chip",), stripe=True, faults=1, may_accept=False, local_ends=False
    ),
    "accepted offline, Stripe, two faults": Scenario(stripe=True, faults=2, online=False, local_ends=False),
    "accepted offline and refunded, one fault": Scenario(("tap", "refund"), faults=1, online=False, local_ends=False),
    "two sales": Scenario(("tap", "tap"), faults=0),
}

ONLINE = Scenario(faults=2)
WITH_STRIPE = Scenario(stripe=True, faults=2, online=False, local_ends=False)
CONTROLS = {
    Flaw.FRESH_KEY: (ONLINE, "booked twice"),
    Flaw.DELIVERED_FIRST: (ONLINE, "no queue lists it"),
    Flaw.REPEATED_LATE: (WITH_STRIPE, "two payment records"),
    Flaw.REVERSAL_FORGOTTEN: (ONLINE, "the host's books say booked, the ledger declined"),
    Flaw.RECOVERY_FORGETS: (ONLINE, "the host's books say booked, the ledger declined"),
    Flaw.NO_TOMBSTONE: (ONLINE, "the host's books say booked, the ledger reversed"),
    Flaw.LATE_ANSWER: (ONLINE, "told declined, and it is approved"),
    Flaw.BACK_TO_QUEUED: (Scenario(stripe=True, faults=3, online=False, local_ends=False), "two payment records"),
    Flaw.RESTART_FORGETS: (WITH_STRIPE, "two payment records"),
    Flaw.ACKNOWLEDGED_FIRST: (ONLINE, "no queue lists it"),
    Flaw.SHOWN_FIRST: (ONLINE, "told approved before that was committed"),
    Flaw.DECIDES_AGAIN: (ONLINE, "booked twice"),
    Flaw.ALERT_FORGOTTEN: (ONLINE, "nobody is alerted"),
    Flaw.OUT_OF_ORDER: (
        Scenario(stripe=True, faults=0, acts=1, local_ends=False, may_accept=False),
        "Stripe says guaranteed, the ledger reversed",
    ),
    Flaw.PAID_BACK_TWICE: (
        Scenario(("tap", "refund"), faults=0, acts=1, local_ends=False, may_accept=False),
        "paid back twice",
    ),
    Flaw.AGE_KEPT: (WITH_STRIPE, "go round for ever"),
    Flaw.COMPLETION_UNHEARD: (Scenario(("chip",), stripe=True, faults=0), "Stripe says reported, the ledger approved"),
}


@functools.cache
def searched(scenario: Scenario) -> tuple[Search, Found]:
    search = Search(scenario)
    return search, search.run()


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_history_keeps_the_promises_and_comes_to_rest(name: str) -> None:
    _, found = searched(SCENARIOS[name])
    print(f"{name}: {found.states} states, {found.steps} steps, {found.rests} at rest")
    assert found.rests > 1


@pytest.mark.parametrize("flaw", Flaw, ids=lambda flaw: flaw.name.lower())
def test_control_a_planted_flaw_is_found(flaw: Flaw) -> None:
    scenario, what = CONTROLS[flaw]
    with pytest.raises(Counterexample, match=what) as caught:
        Search(scenario, flaw).run()
    print(f"{flaw.value}: {caught.value}")


def test_a_counterexample_reads_as_a_story() -> None:
    with pytest.raises(Counterexample) as caught:
        Search(ONLINE, Flaw.FRESH_KEY).run()
    assert str(caught.value).splitlines() == [
        "sale 1: booked twice",
        "  1. terminal: opens sale 1",
        "  2. terminal: commits sale 1 and its request to the host",
        "  3. sync: stores authorisation of sale 1",
        "  4. sync: sends authorisation of sale 1",
        "  5. host: takes in authorisation of sale 1: approved",
        "  6. network: loses the answer to authorisation of sale 1",
        "  7. sync: sends authorisation of sale 1",
        "  8. host: takes in authorisation of sale 1: approved",
    ]


def test_the_search_has_used_every_edge_of_the_models_tables() -> None:
    taken = frozenset[tuple[str, str]]().union(*(searched(each)[1].taken for each in SCENARIOS.values()))
    assert taken == tables.LEDGER.keys() | tables.SPOOL.keys()


def test_the_ledgers_table_is_the_models_and_the_remainder() -> None:
    assert differences(_ledgers_table(), tables.LEDGER, tables.LEDGER_REMAINDER) == []


def test_the_spools_table_is_the_models_and_the_remainder() -> None:
    code = {(state.value, on.value): after.value for (state, on), after in TRANSITIONS.items()}
    assert differences(code, tables.SPOOL, tables.SPOOL_REMAINDER) == []


def test_control_an_edge_that_one_side_lacks_is_named() -> None:
    code = {("a", "x"): "b", ("b", "y"): "c", ("c", "z"): "a"}
    assert differences(code, {("a", "x"): "b"}, {("b", "y", "c"): "known"}) == ["the model lacks c, z -> a"]
    assert differences({}, {("a", "x"): "b"}, {("b", "y", "c"): "known"}) == [
        "the code lacks a, x -> b",
        "the code lacks b, y -> c",
    ]
    assert differences({("a", "x"): "c"}, {("a", "x"): "b"}, {}) == [
        "the code lacks a, x -> b",
        "the model lacks a, x -> c",
    ]


SEED = 20_261_124

# Refunds and advices are not played.
PLAYED = (
    Scenario(stripe=True, faults=1, may_accept=False, local_ends=False),
    Scenario(faults=2, acts=1),
    Scenario(("chip",), faults=2, advice=False),
    Scenario(("chip",), stripe=True, faults=0, may_accept=False, local_ends=False, advice=False),
)


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "FILLER_BYTES", 65_536)


def test_ledger_and_spool_stand_as_the_model_does(tmp_path: Path) -> None:
    print(f"seed {SEED}")
    chance, seen, number = random.Random(SEED), set[tuple[str, str, str]](), 0
    for scenario in PLAYED:
        search, _ = searched(scenario)
        for history in varied(search, chance, seen):
            number += 1
            print(f"history {number}")
            play(tmp_path / str(number), scenario, history)
    assert number > 20


@pytest.mark.parametrize("flaw", [Flaw.LATE_ANSWER, Flaw.BACK_TO_QUEUED, Flaw.RESTART_FORGETS, Flaw.OUT_OF_ORDER])
def test_control_ledger_and_spool_do_not_follow_a_model_that_is_wrong(flaw: Flaw, tmp_path: Path) -> None:
    scenario, _ = CONTROLS[flaw]
    with pytest.raises(Counterexample) as caught:
        Search(scenario, flaw).run()
    with pytest.raises(AssertionError):
        play(tmp_path, scenario, caught.value.story)


def play(directory: Path, scenario: Scenario, history: list[Step]) -> None:
    world, real = scenario.start(), Real(directory, scenario)
    try:
        for step in history:
            print(step)
            real.follow(world, step)
            world = step.world
    finally:
        real.close()


def differences(code: tables.Table, model: tables.Table, remainder: Mapping[tuple[str, str, str], str]) -> list[str]:
    """Edges that only one side has, in words."""
    there = {(state, on, after) for (state, on), after in code.items()}
    known = {(state, on, after) for (state, on), after in model.items()} | remainder.keys()
    missing = [f"the code lacks {state}, {on} -> {after}" for state, on, after in sorted(known - there)]
    return missing + [f"the model lacks {state}, {on} -> {after}" for state, on, after in sorted(there - known)]


def _ledgers_table() -> dict[tuple[str, str], str]:
    table = {}
    for state in State:
        for change in Change:
            try:
                table[state.value, change.value] = advance(state, change).value
            except IllegalTransition:
                continue
    return table

"""Anything in any order: sales, moods of the host, an absent or disbelieving terminal, kills, reboots, wrong clocks.

Whatever happens, no item is booked twice or changes, and each is somewhere: still in the terminal's outbox, in the
spool, or answered. When all is well again, every item is answered within two minutes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sync_rig import FakeClock, FakeHost, FakeTerminal, Mood, Rig, sale, seeded

from terminal.sync import spool as spool_module
from terminal.sync import step as step_module
from terminal.sync.destinations import Parcel
from terminal.sync.spool import APART, OPEN, On, Row, Spool, State

MINUTE_MS = 60_000
SALES_MAX = 12  # enough to be a backlog, few enough to be quick


class SyncMachine(RuleBasedStateMachine):
    open_spool: type[Spool] = Spool

    @initialize(seed=st.integers(0, 2**32))
    def start(self, seed: int) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.host, self.terminal, self.clock = FakeHost(), FakeTerminal(), FakeClock()
        self.rig = Rig(Path(self.directory.name), self.terminal, [self.host], self.clock, seeded(seed), self.open_spool)
        self.numbers = 0
        self.sell(urgent=True, reversed_=False)

    @precondition(lambda self: self.numbers < SALES_MAX)
    @rule(urgent=st.booleans(), reversed_=st.booleans())
    def sell(self, urgent: bool, reversed_: bool) -> None:
        self.numbers += 1
        self.terminal.sell(sale(self.numbers, urgent=urgent))
        if reversed_:
            self.terminal.sell(sale(self.numbers, urgent=True, event="reversal"))

    @precondition(lambda self: self.terminal.outbox)
    @rule(data=st.data(), mood=st.sampled_from(Mood))
    def host_chokes_on(self, data: st.DataObject, mood: Mood) -> None:
        self.host.moods[data.draw(st.sampled_from(sorted(self.terminal.outbox)))] = mood

    @rule(milliseconds=st.sampled_from([None, 0, 1_000, 30_000, 3_600_000]))
    def host_asks_for_time(self, milliseconds: int | None) -> None:
        self.host.retry_after_ms = milliseconds

    @rule(up=st.booleans())
    def terminal_is(self, up: bool) -> None:
        self.terminal.up = up

    @rule(rejects=st.booleans())
    def terminal_believes(self, rejects: bool) -> None:
        self.terminal.rejects = rejects

    @rule(calls=st.sets(st.sampled_from(["stored", "deliver"])))
    def terminal_replies_are_lost(self, calls: set[str]) -> None:
        self.terminal.deaf_to = calls

    @rule(mood=st.sampled_from(Mood), wait_ms=st.sampled_from([0, 1_000, 60_000]), steps=st.integers(1, 12))
    def work(self, mood: Mood, wait_ms: int, steps: int) -> None:
        self.host.mood = mood
        self.clock.advance(wait_ms)
        for _ in range(steps):
            self.rig.sync.step()

    @rule()
    def crash(self) -> None:
        self.rig.crash()

    @precondition(lambda self: self.terminal.outbox)
    @rule()
    def crash_while_sending(self) -> None:
        for row in self.rig.spool.to_send("host", 1):
            self.rig.spool.move(row.id, On.SEND)
            self.host.send(self.rig.spool.parcel(row))
            self.rig.crash()

    @rule(synchronised=st.booleans(), wall_ms=st.sampled_from([0, 1_700_000_000_000, 4_000_000_000_000]))
    def lose_power(self, synchronised: bool, wall_ms: int) -> None:
        self.clock.reboot(synchronised=synchronised, wall_ms=wall_ms)
        self.rig.crash()

    @rule()
    def person_retries(self) -> None:
        for row in self.rig.spool.rows():
            if row.state in APART:
                self.rig.spool.retry(row.id, "tried again")

    @invariant()
    def nothing_is_booked_twice_or_lost(self) -> None:
        self.host.books.check()
        waiting = {row.key for row in self.rig.spool.rows()}
        for key in self.terminal.outbox:
            assert key not in self.terminal.handed_over or key in waiting or key in self.terminal.answers, f"{key} lost"

    def teardown(self) -> None:
        """All is well: everything is delivered."""
        if not hasattr(self, "rig"):
            return
        try:
            self.host.mood, self.host.moods = Mood.WELL, {}
            self.terminal.up, self.terminal.rejects, self.terminal.deaf_to = True, False, set()
            self.clock.advance(3_600_000)  # whatever time a host asked for
            self.person_retries()
            self.rig.settle(within_ms=2 * MINUTE_MS)
            self.host.books.check()
            assert set(self.terminal.answers) == set(self.terminal.outbox), "not delivered"
            assert sorted(self.host.books.booked.values()) == sorted(self.terminal.outbox)
            assert not [row for row in self.rig.spool.rows() if row.state in OPEN]
        finally:
            self.rig.close()
            self.directory.cleanup()


class FreshKeyAfterAmbiguity(Spool):
    """Planted: a new key for what is sent again."""

    def parcel(self, row: Row) -> Parcel:
        parcel = super().parcel(row)
        if row.state is State.AMBIGUOUS:
            return Parcel(parcel.transaction, parcel.event, self._entropy(16).hex(), parcel.body)
        return parcel


class PlantedMachine(SyncMachine):
    open_spool = FreshKeyAfterAmbiguity


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "FILLER_BYTES", 65_536)
    monkeypatch.setattr(step_module, "IDLE_MS", 20_000)


SETTINGS = settings(
    max_examples=20,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_any_order_of_events_books_once_loses_nothing_and_delivers() -> None:
    run_state_machine_as_test(SyncMachine, settings=SETTINGS)


def test_control_a_planted_fresh_key_is_found() -> None:
    with pytest.raises(AssertionError, match=r"booked twice|was not the same"):
        run_state_machine_as_test(
            PlantedMachine, settings=settings(SETTINGS, report_multiple_bugs=False, phases=[Phase.generate])
        )

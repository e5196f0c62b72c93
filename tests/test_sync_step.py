"""The sync service step by step: what is sent when, what a failure leaves behind, nothing booked twice, nothing lost.

Time stands still unless a test moves it. Tests in the last part are named for what users of other terminals were hurt
by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from sync_rig import (
    Authority,
    Books,
    FakeClock,
    FakeHost,
    FakeTerminal,
    Mood,
    Rig,
    TlsHost,
    answers,
    forges,
    loses_answer,
    loses_request,
    sale,
    says,
    seeded,
    serving,
)

from terminal.sync import spool as spool_module
from terminal.sync import step as step_module
from terminal.sync.destinations import Parcel, Result
from terminal.sync.destinations.host import HostDestination, HostSettings
from terminal.sync.spool import On, Row, Spool, State
from terminal.sync.step import Backoff, Delivered, LinkReport, Offer

MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests open some hundred spools and idle for hours: neither that file's size nor looking often matters."""
    monkeypatch.setattr(spool_module, "FILLER_BYTES", 65_536)
    monkeypatch.setattr(step_module, "IDLE_MS", MINUTE_MS)


@dataclasses.dataclass
class World:
    rig: Rig
    host: FakeHost
    terminal: FakeTerminal
    clock: FakeClock

    def states(self) -> list[State]:
        return [row.state for row in self.rig.spool.rows()]

    def row(self) -> Row:
        [row] = self.rig.spool.rows()
        return row

    def answered(self) -> list[int]:
        return sorted(self.terminal.outbox[key].number for key in self.terminal.answers)

    def check(self) -> None:
        self.host.books.check()
        assert not [
            key
            for key in self.terminal.handed_over - set(self.terminal.answers)
            if self.rig.spool.row(f"{key}/host") is None
        ], "lost"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    host, terminal, clock = FakeHost(), FakeTerminal(), FakeClock()
    rig = Rig(tmp_path, terminal, [host], clock, seeded(7))
    world = World(rig, host, terminal, clock)
    yield world
    world.check()
    rig.close()


# The order of work


def test_a_sale_is_sent_answered_and_delivered(world: World) -> None:
    world.terminal.sell(sale(1))
    world.rig.settle()
    assert world.answered() == [1]
    assert world.rig.spool.rows() == ()
    assert world.rig.sync.report() == LinkReport(True, None, queued=0, held=0, oldest_ms=None)


@pytest.mark.parametrize(
    ("event", "word", "differ"),
    [("batch", "differs", True), ("batch", "balanced", False), ("authorisation", "differs", False)],
)
def test_a_days_end_that_differs_is_noticed(world: World, event: str, word: str, differ: bool) -> None:
    world.terminal.says = word
    world.terminal.sell(sale(1, event=event))
    world.rig.settle()
    assert world.rig.sync.books_differ is differ


def test_nothing_to_do_is_said_without_sleeping(world: World) -> None:
    assert world.rig.sync.step().in_ms == step_module.IDLE_MS


def test_an_item_is_durable_before_the_terminal_lets_go_of_it(world: World) -> None:
    world.terminal.sell(sale(1))
    world.terminal.stored = lambda keys: world.rig.crash()  # type: ignore[method-assign]
    world.rig.sync.fetch(wait_ms=0)
    assert world.states() == [State.QUEUED]


def test_an_authorisation_passes_a_long_backlog(world: World) -> None:
    world.terminal.sell(*(sale(number) for number in range(1, 31)))
    for _ in range(20):
        world.rig.sync.step()
    world.terminal.sell(sale(99, urgent=True))
    tried = len(world.host.tried)
    while 99 not in world.answered():
        world.rig.sync.step()
    assert world.host.tried[tried] == sale(99).key


def test_answers_go_to_the_terminal_before_anything_else(world: World) -> None:
    world.terminal.sell(*(sale(number) for number in range(1, 4)))
    while not world.host.tried:
        world.rig.sync.step()
    world.terminal.sell(sale(99, urgent=True))
    world.rig.sync.step()
    assert world.answered() == [1]


# Failures: nothing is lost, nothing hurries


@pytest.mark.parametrize(
    ("mood", "state"),
    [
        (Mood.DOWN, State.QUEUED),
        (Mood.BUSY, State.QUEUED),
        (Mood.FORBIDS, State.QUEUED),
        (Mood.FAULT, State.AMBIGUOUS),
        (Mood.FAULT_BOOKED, State.AMBIGUOUS),
        (Mood.LOSES_REQUEST, State.AMBIGUOUS),
        (Mood.LOSES_ANSWER, State.AMBIGUOUS),
        (Mood.GARBAGE, State.AMBIGUOUS),
        (Mood.FORGED, State.AMBIGUOUS),
        (Mood.CONDEMNS, State.REFUSED),
    ],
)
def test_what_each_failure_leaves_behind(world: World, mood: Mood, state: State) -> None:
    world.host.mood = mood
    world.terminal.sell(sale(1))
    world.rig.settle()
    assert world.row().state is state
    assert world.row().error
    assert world.rig.sync.report().online is (mood is Mood.CONDEMNS)
    world.host.mood = Mood.WELL
    if state is State.REFUSED:
        world.rig.spool.retry(world.row().id, "the host was mistaken")
    world.rig.settle(within_ms=2 * MINUTE_MS)
    assert world.answered() == [1]
    assert world.rig.sync.report().online


def test_once_ambiguous_a_host_that_is_down_does_not_make_it_queued(world: World) -> None:
    world.host.mood = Mood.LOSES_ANSWER
    world.terminal.sell(sale(1))
    world.rig.settle()
    world.host.mood = Mood.DOWN
    world.rig.settle(within_ms=MINUTE_MS)
    assert world.row().state is State.AMBIGUOUS
    assert world.row().attempts > 2


def test_a_host_that_is_down_is_probed_with_single_items_ever_more_seldom(world: World) -> None:
    world.host.mood = Mood.DOWN
    world.terminal.sell(*(sale(number) for number in range(1, 101)))
    world.rig.settle(within_ms=MINUTE_MS)
    first = len(world.host.tried)
    assert 4 <= first <= 30  # a hundred items, not a hundred attempts
    world.rig.settle(within_ms=15 * MINUTE_MS)
    assert 15 <= len(world.host.tried) - first <= 60  # full jitter halves a ceiling of one minute
    assert len(set(world.host.tried)) > 20  # mostly another one: an item may be what the host chokes on


def test_when_the_network_is_back_the_whole_backlog_goes_within_two_minutes(world: World) -> None:
    world.host.mood = Mood.DOWN
    world.terminal.sell(*(sale(number) for number in range(1, 101)))
    world.rig.settle(within_ms=20 * MINUTE_MS)
    world.host.mood = Mood.WELL
    world.rig.settle(within_ms=2 * MINUTE_MS, until=lambda: len(world.answered()) == 100)
    assert len(world.answered()) == 100


def test_an_authorisation_goes_out_at_once_while_the_backlog_waits(world: World) -> None:
    world.host.mood = Mood.DOWN
    world.terminal.sell(*(sale(number) for number in range(1, 11)))
    world.rig.settle(within_ms=10 * MINUTE_MS)
    world.host.mood = Mood.WELL
    world.terminal.sell(sale(99, urgent=True))
    tried = len(world.host.tried)
    world.rig.settle()
    assert world.host.tried[tried] == sale(99).key
    assert len(world.answered()) > 1  # and its success opens the way for the others


def test_a_reversal_is_as_urgent(world: World) -> None:
    world.host.mood = Mood.DOWN
    world.terminal.sell(sale(1))
    world.rig.settle(within_ms=10 * MINUTE_MS)
    world.terminal.sell(sale(2, urgent=True, event="reversal"))
    world.rig.settle()
    assert world.host.tried[-1] == sale(2, event="reversal").key


def test_after_a_new_authorisation_the_waits_begin_small_again(world: World) -> None:
    world.host.mood = Mood.DOWN
    world.terminal.sell(sale(1))
    world.rig.settle(within_ms=10 * MINUTE_MS)
    tried = len(world.host.tried)
    world.terminal.sell(sale(2, urgent=True))
    world.rig.settle(within_ms=8_000)  # as long as a customer waits
    assert len(world.host.tried) - tried >= 3


@pytest.mark.parametrize("mood", [Mood.BUSY, Mood.FAULT])
def test_retry_after_is_obeyed(world: World, mood: Mood) -> None:
    world.host.mood, world.host.retry_after_ms = mood, 5 * MINUTE_MS
    world.terminal.sell(*(sale(number) for number in range(1, 5)))
    world.rig.settle(within_ms=5 * MINUTE_MS - 1_000)
    assert len(world.host.tried) == 1
    # A customer's first attempt is made in spite of it, once.
    world.terminal.sell(sale(99, urgent=True))
    world.rig.settle(within_ms=4 * MINUTE_MS)
    assert world.host.tried.count(sale(99).key) == 1
    assert len(world.host.tried) == 2
    world.host.mood = Mood.WELL
    world.rig.settle(within_ms=7 * MINUTE_MS)
    assert len(world.answered()) == 5


def test_a_customer_does_not_cut_short_what_the_host_asked_for(world: World) -> None:
    world.host.mood, world.host.retry_after_ms = Mood.BUSY, 5 * MINUTE_MS
    world.terminal.sell(*(sale(number) for number in range(1, 5)))
    world.rig.settle()
    world.host.retry_after_ms = None
    world.terminal.sell(sale(99, urgent=True))
    world.rig.settle(within_ms=4 * MINUTE_MS)
    assert len(world.host.tried) == 2


def test_full_jitter_spreads_and_is_capped() -> None:
    backoff, entropy = Backoff(first_ms=500, ceiling_ms=60_000), seeded(3)
    for failures, ceiling_ms in ((0, 500), (1, 1_000), (6, 32_000), (7, 60_000), (100_000, 60_000)):
        drawn = [backoff.draw_ms(failures, entropy) for _ in range(500)]
        assert 0 <= min(drawn) < ceiling_ms * 0.05
        assert ceiling_ms * 0.95 < max(drawn) < ceiling_ms


def test_a_refused_item_is_held_apart_and_blocks_nothing(world: World) -> None:
    world.host.moods[sale(1).key] = Mood.CONDEMNS
    world.terminal.sell(*(sale(number, urgent=number == 1) for number in range(1, 6)))
    world.rig.settle()
    assert world.answered() == [2, 3, 4, 5]
    assert world.row().state is State.REFUSED
    assert world.rig.sync.report() == LinkReport(True, None, queued=0, held=1, oldest_ms=None)
    world.rig.settle(within_ms=10 * MINUTE_MS)
    assert world.host.tried.count(sale(1).key) == 1


@pytest.mark.parametrize("mood", [Mood.FAULT, Mood.LOSES_REQUEST, Mood.FORGED])
@pytest.mark.parametrize("urgent", [True, False])
def test_a_poisonous_item_blocks_nothing(world: World, mood: Mood, urgent: bool) -> None:
    world.host.moods[sale(1).key] = mood
    world.terminal.sell(*(sale(number, urgent=urgent and number == 1) for number in range(1, 31)))
    world.rig.settle(within_ms=2 * MINUTE_MS)
    assert world.answered() == list(range(2, 31))
    assert world.row().state is State.AMBIGUOUS


def test_a_wrong_setting_condemns_no_queue(world: World) -> None:
    """403 or 404 for everything: all waits, nothing is refused."""
    world.host.mood = Mood.FORBIDS
    world.terminal.sell(*(sale(number) for number in range(1, 6)))
    world.rig.settle(within_ms=10 * MINUTE_MS)
    assert world.states() == [State.QUEUED] * 5


def test_a_fault_of_ours_in_one_item_stops_no_other(world: World, caplog: pytest.LogCaptureFixture) -> None:
    send = world.host.send

    def faulty(parcel: Parcel) -> Result:
        if parcel.transaction == sale(1).transaction:
            raise ZeroDivisionError
        return send(parcel)

    world.host.send = faulty  # type: ignore[method-assign]
    world.terminal.sell(sale(1), sale(2))
    world.rig.settle(within_ms=MINUTE_MS)
    assert world.answered() == [2]
    assert world.row().state is State.AMBIGUOUS
    assert "a fault in sending" in caplog.text


def test_a_damaged_item_is_held_and_stops_no_other(world: World) -> None:
    world.terminal.sell(sale(1), sale(2))
    world.rig.sync.fetch(wait_ms=0)
    world.rig.spool._database.execute_sql("UPDATE item SET body = zeroblob(90) WHERE number = 1")
    world.rig.settle()
    assert world.answered() == [2]
    assert (world.row().state, world.row().number) == (State.HELD, 1)


# The terminal is away, or does not believe


def test_terminal_down_while_the_host_answers(world: World) -> None:
    world.terminal.sell(*(sale(number) for number in range(1, 4)))
    world.rig.sync.fetch(wait_ms=0)
    world.terminal.up = False
    world.rig.settle()
    assert world.states() == [State.ANSWERED] * 3
    world.rig.crash()
    assert world.states() == [State.ANSWERED] * 3
    world.terminal.up = True
    world.clock.advance(2_000)
    world.rig.settle()
    assert world.answered() == [1, 2, 3]
    assert len(world.host.tried) == 3  # the host was not asked again


def test_an_absent_terminal_is_asked_once_a_second(world: World) -> None:
    world.terminal.up = False
    asked = []
    fetch = world.terminal.fetch

    def counting(max: int, wait_ms: int) -> Offer:
        asked.append(world.clock.monotonic_ms())
        return fetch(max, wait_ms)

    world.terminal.fetch = counting  # type: ignore[method-assign]
    world.rig.settle(within_ms=MINUTE_MS)
    assert 55 <= len(asked) <= 61


def test_the_absence_of_the_terminal_is_logged_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        world.terminal.up = False
        world.rig.settle(within_ms=20_000)
        assert world.rig.sync.tell(world.rig.sync.report()) is False
        world.terminal.up = True
        world.clock.advance(1_000)
        world.rig.settle()
        assert world.rig.sync.tell(world.rig.sync.report())
    assert caplog.text.count("the terminal service does not answer") == 2


@pytest.mark.parametrize("call", ["stored", "deliver"])
def test_a_lost_reply_of_the_terminal_changes_nothing(world: World, call: str) -> None:
    world.terminal.deaf_to = {call}
    world.terminal.sell(sale(1))
    world.rig.settle(within_ms=10_000)
    world.terminal.deaf_to = set()
    world.rig.settle(within_ms=10_000)
    assert world.answered() == [1]
    assert world.rig.spool.rows() == ()
    assert len(world.host.tried) == 1


def test_an_answer_that_the_terminal_does_not_believe(world: World) -> None:
    world.terminal.rejects = True
    world.terminal.sell(sale(1))
    world.rig.settle(within_ms=10 * MINUTE_MS)
    assert world.row().state is State.AMBIGUOUS
    assert "not the host's" in (world.row().error or "")
    assert not world.rig.sync.report().online
    assert 5 < len(world.terminal.rejections) < 60  # asked again, ever more seldom
    world.terminal.rejects = False
    world.rig.settle(within_ms=MINUTE_MS)
    assert world.answered() == [1]


def test_answers_that_are_never_believed_do_not_hammer_the_host(world: World) -> None:
    world.terminal.rejects = True
    world.terminal.sell(*(sale(number) for number in range(1, 101)))
    world.rig.settle(within_ms=10 * MINUTE_MS)
    assert len(world.host.tried) < 100  # not even each of them once in ten minutes


def test_an_answer_that_the_terminal_cannot_take_now_blocks_no_other(world: World) -> None:
    judge = world.terminal.judge

    def stumbling(key: str, answer: str) -> Delivered:
        if key == sale(1).key:
            return Delivered(key, error="the call failed; the terminal's log says why")
        return judge(key, answer)

    world.terminal.judge = stumbling  # type: ignore[method-assign]
    world.terminal.sell(sale(1, urgent=True), sale(2))
    world.rig.settle(within_ms=MINUTE_MS)
    assert world.answered() == [2]
    assert world.row().state is State.ANSWERED
    world.terminal.judge = judge  # type: ignore[method-assign]
    world.rig.settle(within_ms=MINUTE_MS)
    assert world.answered() == [1, 2]


def test_offline_is_not_said_for_ever_when_nothing_is_left_to_probe_with(world: World) -> None:
    world.host.moods[sale(1).key] = Mood.FAULT
    world.terminal.sell(sale(1))
    world.rig.settle()
    assert world.rig.sync.report() == LinkReport(False, "500, not booked", queued=1, held=0, oldest_ms=0)
    world.rig.spool.move(world.row().id, On.HOLD)
    assert world.rig.sync.report().online


# Destinations where a repetition is safe for a time only


def limited(tmp_path: Path, clock: FakeClock) -> tuple[Rig, FakeHost, FakeTerminal]:
    host, terminal = FakeHost(name="limited", repeat_safe_ms=23 * HOUR_MS), FakeTerminal()
    return Rig(tmp_path, terminal, [host], clock, seeded(7)), host, terminal


@pytest.mark.parametrize(
    ("synchronised", "hours", "state"), [(True, 22, None), (True, 24, State.HELD), (False, 1, State.HELD)]
)
def test_an_old_ambiguous_item_is_held_and_not_repeated(
    tmp_path: Path, synchronised: bool, hours: int, state: State | None
) -> None:
    """Also when no clock can tell how old it is."""
    clock = FakeClock()
    rig, host, terminal = limited(tmp_path, clock)
    host.mood = Mood.LOSES_ANSWER
    terminal.sell(sale(1))
    rig.settle()
    host.mood = Mood.WELL
    clock.reboot(synchronised=synchronised, wall_ms=clock.wall_ms() + hours * HOUR_MS)
    rig.crash()
    rig.settle(within_ms=MINUTE_MS)
    assert [row.state for row in rig.spool.rows()] == ([] if state is None else [state])
    assert len(host.tried) == (2 if state is None else 1)
    rig.close()


def test_what_was_never_sent_may_wait_for_ever(tmp_path: Path) -> None:
    clock = FakeClock()
    rig, host, terminal = limited(tmp_path, clock)
    host.mood = Mood.DOWN
    terminal.sell(sale(1))
    rig.settle(within_ms=MINUTE_MS)
    clock.advance(100 * HOUR_MS)
    clock.reboot(synchronised=False, wall_ms=0)
    rig.crash()
    host.mood = Mood.WELL
    rig.settle(within_ms=MINUTE_MS)
    assert list(terminal.answers) == [sale(1).key]
    rig.close()


# Killed at every point, against a real server


class Killed(BaseException):
    """As SIGKILL: nothing after it runs."""


@dataclasses.dataclass
class Fuse:
    """Blows once, at the given one of all the points that it is wired to."""

    point: int
    blown: bool = False

    def pass_by(self) -> None:
        if not self.blown:
            self.point -= 1
            if self.point < 0:
                self.blown = True
                raise Killed

    def wire(self, target: Any, *names: str) -> None:
        """A point before each call of these methods: what lies between two of them is only memory."""
        for name in names:
            setattr(target, name, self._around(getattr(target, name)))

    def _around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def fused(*arguments: Any, **named: Any) -> Any:
            self.pass_by()
            return call(*arguments, **named)

        return fused


class FusedSpool(Spool):
    fuse: ClassVar[Fuse]

    def store(self, *arguments: Any, **named: Any) -> Any:
        return self.fuse._around(super().store)(*arguments, **named)

    def move(self, *arguments: Any, **named: Any) -> Any:
        return self.fuse._around(super().move)(*arguments, **named)


class FreshKeys(FusedSpool):
    """Planted: what made 8 orders into 19 charges."""

    def parcel(self, row: Row) -> Parcel:
        return dataclasses.replace(super().parcel(row), idempotency_key=self._entropy(16).hex())


class FreshBodies(FusedSpool):
    """Planted: the same item, written a little differently each time."""

    def parcel(self, row: Row) -> Parcel:
        parcel = super().parcel(row)
        return dataclasses.replace(parcel, body=f"{parcel.body}{row.attempts}")


class BelievesAnything(FusedSpool):
    """Planted: an answer is taken for good, whatever the terminal says of it."""

    def move(self, row_id: str, on: On, **named: Any) -> Any:
        return super().move(row_id, On.DELIVER if on is On.DISBELIEVE else on, **named)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TlsHost, HostSettings]]:
    authority = Authority(tmp_path_factory.mktemp("certificates"), "ours")
    with serving(authority.issue("127.0.0.1")) as server:
        yield server, HostSettings(server.url, authority.file)


def killed_at(
    point: int, directory: Path, server: TlsHost, settings: HostSettings, spool: type[FusedSpool] = FusedSpool
) -> bool:
    """One customer, one deferred sale, one reversal, a moody host, and a kill. False if there is no such point."""
    server.books = Books()
    server.script = [loses_answer, loses_request, says(500, books=True), says(429), forges, answers, loses_answer]
    clock, terminal = FakeClock(), FakeTerminal()
    fuse = Fuse(point)
    spool.fuse = fuse
    fuse.wire(terminal, "fetch", "stored", "deliver")
    destination = HostDestination(settings)
    fuse.wire(destination, "send")
    terminal.sell(sale(1, urgent=True), sale(2), sale(1, urgent=True, event="reversal"))
    rig = Rig(directory, terminal, [destination], clock, seeded(point), spool)

    def done() -> bool:
        return not rig.spool.rows() and terminal.handed_over == set(terminal.outbox)

    try:
        rig.settle(within_ms=10 * MINUTE_MS, until=done)
    except Killed:
        clock.reboot(synchronised=False, wall_ms=0)
        rig.crash()
        rig.settle(within_ms=10 * MINUTE_MS, until=done)
    try:
        server.books.check()
        assert set(terminal.answers) == set(terminal.outbox), "lost"
        assert sorted(server.books.booked.values()) == sorted(terminal.outbox)
        assert rig.spool.rows() == ()
    finally:
        rig.close()
        destination.close()
    return fuse.blown


def test_killed_at_any_point_every_item_is_booked_once_and_none_is_lost(
    tmp_path: Path, server: tuple[TlsHost, HostSettings]
) -> None:
    points = 0
    while killed_at(points, tmp_path / str(points), *server):
        points += 1
    assert points > 50


@pytest.mark.parametrize("planted", [FreshKeys, FreshBodies, BelievesAnything])
def test_control_the_same_test_finds_planted_faults(
    tmp_path: Path, server: tuple[TlsHost, HostSettings], planted: type[FusedSpool]
) -> None:
    with pytest.raises(AssertionError, match=r"booked twice|was not the same|lost"):
        killed_at(10**6, tmp_path, *server, planted)


# What users of other terminals were hurt by


def test_8_orders_do_not_become_19_charges(world: World) -> None:
    """Forwarded again while draining, each time under a new key."""
    world.terminal.sell(*(sale(number) for number in range(1, 9)))
    for mood in (Mood.LOSES_ANSWER, Mood.FAULT_BOOKED, Mood.GARBAGE):
        world.host.mood = mood
        world.rig.settle(within_ms=5 * MINUTE_MS)
        world.rig.crash()
    world.host.mood = Mood.WELL
    world.rig.settle(within_ms=5 * MINUTE_MS)
    assert len(world.host.books.booked) == 8
    assert len(world.host.books.attempts) > 8
    assert world.answered() == list(range(1, 9))


def test_device_said_failed_while_the_dashboard_said_paid(world: World) -> None:
    """A time-out is neither: it is ambiguous until the host has answered."""
    world.host.mood = Mood.LOSES_ANSWER
    world.terminal.sell(sale(1))
    world.rig.settle(within_ms=5 * MINUTE_MS)
    assert world.row().state is State.AMBIGUOUS
    assert world.answered() == []


def test_stored_payments_are_not_purged_after_15_days(world: World) -> None:
    world.host.mood = Mood.DOWN
    world.terminal.sell(sale(1))
    world.rig.settle(within_ms=MINUTE_MS)
    for _ in range(40):
        world.clock.advance(240 * HOUR_MS)
        world.rig.settle()
    assert world.row().state is State.QUEUED
    assert (world.rig.sync.report().oldest_ms or 0) >= 400 * 24 * HOUR_MS
    world.host.mood = Mood.WELL
    world.rig.settle(within_ms=2 * MINUTE_MS)
    assert world.answered() == [1]


def test_it_starts_while_offline_and_without_a_clock(tmp_path: Path) -> None:
    host, terminal, clock = FakeHost(), FakeTerminal(), FakeClock(synchronised=False)
    clock.set_wall(0)
    host.mood = Mood.DOWN
    rig = Rig(tmp_path, terminal, [host], clock, seeded(1))
    terminal.sell(sale(1))
    rig.settle(within_ms=MINUTE_MS)
    host.mood = Mood.WELL
    rig.settle(within_ms=2 * MINUTE_MS)
    assert list(terminal.answers) == [sale(1).key]
    rig.close()


def test_a_refused_one_can_be_sent_again(world: World) -> None:
    world.host.mood = Mood.CONDEMNS
    world.terminal.sell(sale(1))
    world.rig.settle()
    world.host.mood = Mood.WELL
    world.rig.spool.retry(world.row().id, "operator: host mended")
    world.rig.settle()
    assert world.answered() == [1]


def test_what_was_held_for_its_age_can_be_sent_again_by_hand(tmp_path: Path) -> None:
    host, terminal, clock = FakeHost(repeat_safe_ms=HOUR_MS), FakeTerminal(), FakeClock()
    rig = Rig(tmp_path, terminal, [host], clock, seeded(7))
    host.mood = Mood.LOSES_REQUEST
    terminal.sell(sale(1))
    rig.settle()
    clock.advance(2 * HOUR_MS)
    rig.settle()
    [row] = rig.spool.rows()
    assert row.state is State.HELD
    host.mood = Mood.WELL
    rig.spool.retry(row.id, "it is not in the dashboard")
    rig.settle()
    assert rig.spool.rows() == ()
    host.books.check()
    rig.close()


def test_an_item_that_is_held_while_it_is_under_way_stops_nothing(world: World) -> None:
    send = world.host.send

    def restored(parcel: Parcel) -> Result:
        """While the attempt is under way, a terminal that was restored offers another envelope for the same sale."""
        world.rig.spool.store([sale(1, envelope="another.one.here")], ["host"])
        return send(parcel)

    world.host.moods[sale(1).key] = Mood.LOSES_ANSWER
    world.terminal.sell(sale(1))
    world.rig.settle()
    world.host.moods.clear()
    world.host.send = restored  # type: ignore[method-assign]
    world.rig.settle(within_ms=MINUTE_MS)
    assert world.row().state is State.HELD
    world.host.send = send  # type: ignore[method-assign]
    world.terminal.sell(sale(2))
    world.rig.settle(within_ms=MINUTE_MS)
    assert world.answered() == [2]

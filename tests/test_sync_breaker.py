"""The breaker, the schedule and the couriers."""

from __future__ import annotations

import threading
import time as times
from datetime import UTC, datetime, time
from uuid import UUID

import pytest
from sync_rig import FakeClock, FakeHost, Mood

from terminal.sync.breaker import STABLE_SUCCESSES, Breaker, Position
from terminal.sync.couriers import URGENT_ROOM, Errand, Fleet
from terminal.sync.destinations import Answered, Parcel, Result
from terminal.sync.schedule import Mode, Schedule, Window
from terminal.sync.spool import Moment, Row, State, Waiting


def fail(
    breaker: Breaker, now_ms: int, *, round_: int | None = None, wait_ms: int = 1_000, asked: bool = False
) -> None:
    breaker.failed(
        "down", round_=breaker.round if round_ is None else round_, now_ms=now_ms, wait_ms=wait_ms, asked_for=asked
    )


def test_after_an_outage_one_is_tried_then_twice_as_many() -> None:
    breaker = Breaker(6)
    assert breaker.allows(0, 0) == 6
    fail(breaker, 0)
    assert (breaker.position(0), breaker.allows(500, 0)) == (Position.OPEN, 0)
    assert (breaker.position(1_000), breaker.allows(1_000, 0)) == (Position.TRYING, 1)
    widths = []
    for _ in range(4):
        breaker.succeeded(1_100)
        widths.append(breaker.allows(1_100, 0))
    assert widths == [2, 4, 6, 6]
    assert breaker.position(1_100) is Position.CLOSED


def test_those_that_fail_together_count_once() -> None:
    breaker = Breaker(6)
    round_ = breaker.round
    for _ in range(6):
        fail(breaker, 0, round_=round_)
    assert breaker.failures == 1
    fail(breaker, 2_000)
    assert breaker.failures == 2


def test_the_way_is_open_at_the_first_success_and_stable_after_some() -> None:
    breaker = Breaker(2)
    fail(breaker, 0)
    assert not breaker.online
    seen = []
    for _ in range(STABLE_SUCCESSES):
        breaker.succeeded(10)
        seen.append((breaker.online, breaker.stable))
    assert seen == [(True, False)] * (STABLE_SUCCESSES - 1) + [(True, True)]


def test_what_was_asked_for_is_not_cut_short() -> None:
    breaker = Breaker(2)
    fail(breaker, 0, wait_ms=30_000, asked=True)
    fail(breaker, 10, wait_ms=100)
    breaker.hurry()
    assert breaker.silent_ms(10) == 29_990
    fail(breaker, 20, wait_ms=60_000, asked=True)
    assert breaker.silent_ms(20) == 60_000


MONDAY_NOON = int(datetime(2026, 11, 23, 12, 0, tzinfo=UTC).timestamp() * 1000)


def moment(hour: int, *, synchronised: bool = True) -> Moment:
    return Moment("boot", 3_600_000, MONDAY_NOON + (hour - 12) * 3_600_000, synchronised)


def test_windows_over_midnight_and_by_day() -> None:
    night = Window.parse("22:00-06:00")
    assert [hour for hour in range(24) if night.holds(time(hour))] == [0, 1, 2, 3, 4, 5, 22, 23]
    lunch = Window.parse("12:00-13:00")
    assert [hour for hour in range(24) if lunch.holds(time(hour))] == [12]
    for wrong in ("22:00", "22-06", "12:00-12:00", "25:00-26:00"):
        with pytest.raises(ValueError, match=r"window|empty|hour"):
            Window.parse(wrong)


def test_each_mode_opens_the_backlog_when_it_says() -> None:
    night = Schedule(Mode.WINDOW, windows=(Window.parse("22:00-06:00"),), zone=UTC)
    assert not night.open(moment(12), Waiting(5), last_drained_ms=None)
    assert night.open(moment(23), Waiting(5), last_drained_ms=None)
    assert night.open(moment(12, synchronised=False), Waiting(5), last_drained_ms=None), "no clock says what time it is"
    every = Schedule(Mode.INTERVAL, interval_ms=600_000)
    assert every.open(moment(12), Waiting(5), last_drained_ms=None)
    assert not every.open(moment(12), Waiting(5), last_drained_ms=3_300_000)
    assert every.open(moment(12), Waiting(5), last_drained_ms=3_000_000)
    metered = Schedule(Mode.METERED, metered_count=50, metered_age_ms=1_000)
    assert not metered.open(moment(12), Waiting(49, oldest_ms=999), last_drained_ms=0)
    assert metered.open(moment(12), Waiting(50, oldest_ms=0), last_drained_ms=0)
    assert metered.open(moment(12), Waiting(1, oldest_ms=1_000), last_drained_ms=0)
    assert not Schedule(Mode.MANUAL).open(moment(12), Waiting(10_000), last_drained_ms=None)
    assert Schedule().open(moment(12), Waiting(1), last_drained_ms=None)


def errand(number: int) -> Errand:
    transaction = UUID(int=number)
    now = Moment.now(FakeClock())
    row = Row(
        number, str(number), "", transaction, "", "host", number, False, State.QUEUED, 0, now, None, None, 0, None
    )
    return Errand(row, Parcel(transaction, "authorisation", f"key {number}", f"body {number}"), 0)


def test_a_fleet_carries_several_at_once_each_over_its_own_connection() -> None:
    together = threading.Barrier(3, timeout=10)
    built: list[object] = []

    class Slow(FakeHost):
        def send(self, parcel: Parcel) -> Result:
            together.wait()  # only three at once get past it
            return super().send(parcel)

    def build() -> Slow:
        built.append(Slow())
        return built[-1]  # type: ignore[return-value]

    woken = threading.Semaphore(0)
    fleet = Fleet(build, room=3, wake=woken.release)
    for number in range(3):
        fleet.send(errand(number))
    for _ in range(3):
        assert woken.acquire(timeout=10)
    ended = fleet.ended()
    assert {done.errand.row.number for done in ended} == {0, 1, 2}
    assert all(isinstance(done.result, Answered) for done in ended)
    assert len(built) == 3
    fleet.close()


def test_one_stuck_courier_leaves_the_others_going() -> None:
    release = threading.Event()

    class Stuck(FakeHost):
        def send(self, parcel: Parcel) -> Result:
            if parcel.transaction == UUID(int=0):
                release.wait(10)
            return super().send(parcel)

    fleet = Fleet(Stuck, room=2, wake=lambda: None)
    for number in range(5):
        fleet.send(errand(number))
    end_s = times.monotonic() + 10
    found: set[int] = set()
    while len(found) < 4 and times.monotonic() < end_s:
        found |= {done.errand.row.number for done in fleet.ended()}
        times.sleep(0.01)
    assert found == {1, 2, 3, 4}
    release.set()
    fleet.close()
    assert len(fleet._threads) <= 2 + URGENT_ROOM


def test_a_fault_of_ours_is_an_unsure_end() -> None:
    host = FakeHost()
    host.mood = Mood.WELL
    host.send = lambda parcel: 1 / 0  # type: ignore[assignment,method-assign]
    ended = threading.Event()
    fleet = Fleet(lambda: host, room=1, wake=ended.set)
    fleet.send(errand(1))
    assert ended.wait(10)
    [done] = fleet.ended()
    assert "a fault in this program" in str(done.result)
    fleet.close()

"""What is known of the way to the host, and waiting for it: presence, silence, grace."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from terminal_rig import HandClock

from terminal.link import RETRY_GRACE_MS, SYNC_SILENCE_MAX_MS, Link, LinkState

PATIENCE_S = 10  # a thread that has not ended by then never will


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def link(clock: HandClock) -> Link:
    return Link(clock)


def test_without_a_word_from_sync_nothing_is_presumed(link: Link) -> None:
    assert not link.presumed_up()
    assert link.state() == LinkState(online=None, sync_present=False, error=None, queued=0)


def test_sync_that_asks_for_work_is_presumed_to_reach_the_host(link: Link) -> None:
    link.heard()
    assert link.presumed_up()
    assert link.state() == LinkState(online=None, sync_present=True, error=None, queued=0)


def test_the_last_report_counts(link: Link) -> None:
    link.report(online=False, error="no route", queued=2)
    assert not link.presumed_up()
    assert link.state() == LinkState(online=False, sync_present=True, error="no route", queued=2)
    link.heard()
    assert not link.presumed_up()  # that sync is there says nothing of the host
    link.report(online=True, error=None, queued=0)
    assert link.presumed_up()


@pytest.mark.parametrize(("silence_ms", "up"), [(SYNC_SILENCE_MAX_MS, True), (SYNC_SILENCE_MAX_MS + 1, False)])
def test_silence_means_that_sync_is_not_there(link: Link, clock: HandClock, silence_ms: int, up: bool) -> None:
    link.report(online=True, error=None, queued=0)
    clock.sleep_ms(silence_ms)
    assert link.presumed_up() is up
    assert link.state().sync_present is up
    link.heard()
    assert link.presumed_up()


# ---- waiting for an answer

STEP_MS = 100
WAIT_MAX_MS = 20_000  # of the test's clock: more than any time-out here


def waited_ms(link: Link, clock: HandClock, events: dict[int, Callable[[], None]]) -> int:
    """How long somebody waits, 8 s at most, in whose time these things happen at these moments."""
    looked = threading.Semaphore(0)

    def look() -> bool:
        looked.release()
        return False

    thread = threading.Thread(target=lambda: link.wait_for_answer(look, timeout_ms=8_000), daemon=True)
    thread.start()
    assert looked.acquire(timeout=PATIENCE_S)
    for passed_ms in range(0, WAIT_MAX_MS, STEP_MS):
        if not thread.is_alive():
            return passed_ms
        if passed_ms in events:
            events[passed_ms]()
        clock.sleep_ms(STEP_MS)
        link.answered()  # time goes on: whoever waits looks again
        while thread.is_alive() and not looked.acquire(timeout=0.01):
            pass
    pytest.fail("it waits for ever")


def test_an_answer_that_is_there_is_not_waited_for(link: Link) -> None:
    link.wait_for_answer(lambda: True, timeout_ms=8_000)


def test_the_time_is_up_at_the_time_out(link: Link, clock: HandClock) -> None:
    link.report(online=True, error=None, queued=0)
    assert waited_ms(link, clock, {}) == pytest.approx(8_000, abs=2 * STEP_MS)


def test_a_failed_try_leaves_a_grace(link: Link, clock: HandClock) -> None:
    link.report(online=True, error=None, queued=0)
    events = {1_000: lambda: link.report(online=False, error="lost", queued=1)}
    assert waited_ms(link, clock, events) == pytest.approx(1_000 + RETRY_GRACE_MS, abs=2 * STEP_MS)


def test_more_failed_tries_do_not_prolong_the_grace(link: Link, clock: HandClock) -> None:
    link.report(online=True, error=None, queued=0)
    events = {at_ms: lambda: link.report(online=False, error="lost", queued=1) for at_ms in (1_000, 2_000, 3_000)}
    assert waited_ms(link, clock, events) == pytest.approx(1_000 + RETRY_GRACE_MS, abs=2 * STEP_MS)


def test_the_grace_is_never_longer_than_the_time_out(link: Link, clock: HandClock) -> None:
    link.report(online=True, error=None, queued=0)
    events = {7_000: lambda: link.report(online=False, error="lost", queued=1)}
    assert waited_ms(link, clock, events) == pytest.approx(8_000, abs=2 * STEP_MS)


def test_a_host_that_is_back_has_the_whole_time_again(link: Link, clock: HandClock) -> None:
    link.report(online=True, error=None, queued=0)
    events = {
        1_000: lambda: link.report(online=False, error="lost", queued=1),
        2_000: lambda: link.report(online=True, error=None, queued=1),
    }
    assert waited_ms(link, clock, events) == pytest.approx(8_000, abs=2 * STEP_MS)


def test_an_answer_wakes_whoever_waits(link: Link) -> None:
    arrived, waiting = threading.Event(), threading.Event()

    def look() -> bool:
        waiting.set()
        return arrived.is_set()

    thread = threading.Thread(target=lambda: link.wait_for_answer(look, timeout_ms=600_000), daemon=True)
    thread.start()
    assert waiting.wait(PATIENCE_S)
    arrived.set()
    link.answered()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


# ---- waiting for something to send


def test_what_is_there_to_send_is_not_waited_for(link: Link) -> None:
    link.wait_for_outbox(lambda: True, timeout_ms=600_000)


def test_nothing_to_send_ends_with_the_time(link: Link, clock: HandClock) -> None:
    clock.hurry_ms = 1_000
    link.wait_for_outbox(lambda: False, timeout_ms=1_000)
    link.wait_for_outbox(lambda: False, timeout_ms=0)


def test_a_new_item_wakes_sync(link: Link) -> None:
    filled, looked = threading.Event(), threading.Event()

    def look() -> bool:
        looked.set()
        return filled.is_set()

    thread = threading.Thread(target=lambda: link.wait_for_outbox(look, timeout_ms=600_000), daemon=True)
    thread.start()
    assert looked.wait(PATIENCE_S)
    filled.set()
    link.outbox_changed()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_an_item_that_comes_between_look_and_wait_is_not_missed(link: Link) -> None:
    """The change falls right after the look that saw nothing: the version tells."""
    looks: list[bool] = []

    def look() -> bool:
        looks.append(True)
        if len(looks) == 1:
            link.outbox_changed()
            return False
        return True

    thread = threading.Thread(target=lambda: link.wait_for_outbox(look, timeout_ms=600_000), daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "the wake-up was lost"
    assert len(looks) == 2

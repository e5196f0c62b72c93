"""The sync service as a whole, in real time: how fast a sale goes out, how it stops, what it reports."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from sync_rig import (
    SPOOL_KEY,
    Authority,
    FakeTerminal,
    TlsHost,
    faster_than,
    hangs,
    loses_answer,
    sale,
    says,
    serving,
)

from terminal.clock import SystemClock, system_entropy
from terminal.sync import Backoff, HostSettings, Place, SpoolUnavailable, SyncSettings, Unsendable, run
from terminal.sync import step as step_module
from terminal.sync.destinations.host import HostDestination
from terminal.sync.journal import read

WITHIN_S = 10.0  # far more than anything here takes


@dataclass
class Service:
    terminal: FakeTerminal
    server: TlsHost
    settings: SyncSettings
    stop: threading.Event = field(default_factory=threading.Event)
    beats: int = 0

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + WITHIN_S
        with self.terminal.changed:
            while not condition():
                assert time.monotonic() < end, "it did not happen"
                self.terminal.changed.wait(0.05)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.stop.clear()
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self.stop.set()
            thread.join(WITHIN_S)
            assert not thread.is_alive()

    def _run(self) -> None:
        run(
            self.settings,
            lambda: self.terminal,
            clock=SystemClock(),
            entropy=system_entropy,
            stop=self.stop,
            alive=self._beat,
        )

    def _beat(self) -> None:
        self.beats += 1


@pytest.fixture(autouse=True)
def _short_polls(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Each test ends by a stop, and a stop waits for the long poll."""
    if request.function not in {test_a_stop_while_idle_is_quick, test_a_new_sale_wakes_a_sleeping_service_in_no_time}:
        monkeypatch.setattr(step_module, "IDLE_MS", 400)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    authority = Authority(tmp_path, "ours")
    with serving(authority.issue("127.0.0.1")) as server:
        host = HostSettings(server.url, authority.file, total_timeout_ms=800)
        yield Service(
            FakeTerminal(),
            server,
            SyncSettings(
                tmp_path / "sync",
                SPOOL_KEY,
                [Place(partial(HostDestination, host))],
                backoff=Backoff(first_ms=20, ceiling_ms=100),
            ),
        )


def test_a_new_sale_wakes_a_sleeping_service_in_no_time(service: Service) -> None:
    with service.running():
        service.terminal.sell(sale(1, urgent=True))
        service.wait_for(lambda: len(service.terminal.answers) == 1)
        time.sleep(0.3)  # it sleeps in the long poll
        with faster_than(0.5):
            service.terminal.sell(sale(2, urgent=True))
            service.wait_for(lambda: len(service.terminal.answers) == 2)
    service.server.books.check()


def test_it_sleeps_when_there_is_nothing_to_do(service: Service) -> None:
    with service.running():
        service.wait_for(lambda: bool(service.terminal.reports))
        before = service.beats
        time.sleep(0.5)
        assert service.beats - before <= 3


def test_it_waits_for_an_absent_terminal_and_catches_up(service: Service) -> None:
    service.terminal.up = False
    service.terminal.sell(sale(1), sale(2))
    with service.running():
        time.sleep(0.5)
        assert service.beats <= 3
        service.terminal.up = True
        service.wait_for(lambda: len(service.terminal.answers) == 2)


def test_a_terminal_that_was_away_is_told_again(service: Service) -> None:
    """It may have been restarted, and know nothing of the link."""
    with service.running():
        service.wait_for(lambda: bool(service.terminal.reports))
        service.terminal.up = False
        time.sleep(0.6)
        told = len(service.terminal.reports)
        service.terminal.up = True
        service.wait_for(lambda: len(service.terminal.reports) > told)


def test_changes_of_the_link_are_reported(service: Service) -> None:
    service.server.script = [loses_answer, says(500), says(429)]
    with service.running():
        service.terminal.sell(sale(1))
        service.wait_for(lambda: bool(service.terminal.answers) and service.terminal.reports[-1].queued == 0)
    reports = service.terminal.reports
    assert not reports[0].error
    errors = [report.error for report in reports if not report.online]
    assert "broke off" in str(errors[0])
    assert "500" in str(errors[1])
    assert "429" in str(errors[2])
    assert (reports[-1].online, reports[-1].error, reports[-1].queued) == (True, None, 0)
    assert len(reports) < 12  # changes, not heartbeats


def test_each_run_leaves_its_trail(service: Service) -> None:
    service.terminal.chain.grow(3)
    for number in (1, 2):
        with service.running():
            service.terminal.sell(sale(number))
            service.wait_for(lambda: len(service.terminal.answers) == number)  # noqa: B023 (waited for here)
    said = [record.body.get("what") for record in read(service.settings.state_directory, SPOOL_KEY)]
    for what in ("start", "stored", "answered", "link", "stop"):
        assert said.count(what) == 2, what
    assert said.count("terminal_head") == 1
    assert said[-1] == "stop"


def test_a_stop_finishes_the_piece_in_hand_and_a_restart_goes_on(service: Service) -> None:
    service.server.script = [hangs]
    with service.running():
        service.terminal.sell(sale(1))
        service.wait_for(lambda: bool(service.server.books.attempts))
        service.stop.set()
    assert service.terminal.answers == {}
    with service.running():
        service.wait_for(lambda: bool(service.terminal.answers))
    service.server.books.check()


def test_a_stop_while_idle_is_quick(service: Service) -> None:
    with service.running():
        service.wait_for(lambda: bool(service.terminal.reports))
        began = time.monotonic()
    assert time.monotonic() - began < 3


def test_what_cannot_work_ends_the_service_with_a_reason(service: Service, tmp_path: Path) -> None:
    service.settings.state_directory.mkdir(mode=0o755)
    service.settings.state_directory.chmod(0o755)
    with pytest.raises(SpoolUnavailable, match="chmod 700"):
        service._run()
    service.settings = SyncSettings(
        tmp_path / "other", SPOOL_KEY, [Place(partial(HostDestination, HostSettings("http://plain.example")))]
    )
    with pytest.raises(Unsendable, match="Write https"):
        service._run()
    assert "SecretKey" not in repr(service.settings)

"""What users of other terminals were hurt by, each by its name. Where a whole file tests it, a short case stands here.

Some are elsewhere under their names: eight orders that became nineteen charges, a device that said failed while the
dashboard said paid, a refused one that could not be sent again (`test_sync_step`), an upgrade that needed an empty
queue (`test_sync_queue`). What this terminal cannot do yet is not here: to be reset.
"""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sync_rig import FakeClock, FakeHost, FakeTerminal, Mood, Rig, sale, seeded
from terminal_rig import Terminal
from test_cli import no_traceback, payterm
from test_ledger_migrations import FORM_1, opened
from test_reconcile import Books, HostDoor, Near, reconciler

from terminal.control import asked
from terminal.ledger.migrations import MIGRATIONS
from terminal.ledger.states import State
from terminal.sync import spool as spool_module
from terminal.sync.queue import Queue
from terminal.sync.reconcile import Run
from terminal.sync.spool import APART, OPEN
from terminal.sync.spool import State as Waiting
from terminal.ui import screens
from terminal.ui.flow import result_screen

DAY_MS = 86_400_000


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "FILLER_BYTES", 65_536)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with tempfile.TemporaryDirectory(prefix="payterm-") as directory:
        made = Terminal(Path(directory))
        yield made
        made.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, FakeTerminal(), [FakeHost()], FakeClock(), seeded(7))
    yield made
    made.close()


def test_a_failed_migration_loses_no_stored_payment(tmp_path: Path) -> None:
    """The recovery of a failed one dropped their table. Here each step is taken back whole, and a copy was made."""
    path = tmp_path / "state" / "ledger.db"
    path.parent.mkdir()
    path.write_bytes(FORM_1)
    opened(path).close()
    with contextlib.closing(sqlite3.connect(path.with_name(f"ledger.db.before-{MIGRATIONS[-1].version}"))) as copy:
        ((kept,),) = copy.execute("SELECT COUNT(*) FROM transactions")
    with contextlib.closing(opened(path)) as store:
        assert len(store.transactions(99, 99)) == kept == 6


def test_a_success_that_never_arrived_is_found(terminal: Terminal) -> None:
    """Sequence numbers are compared with the host: what it lacks is named, with what to do."""
    terminal.online()
    lost = terminal.pay(1250)
    kept = terminal.pay(1300)
    key = terminal.host.keys.answer
    forgetful = Books({kept.number: (kept.id, "booked", 1300, "EUR")}, key=key, named=key)
    report = reconciler(Near(terminal.calls), forgetful).run(Run())
    (difference,) = report["differences"]
    assert (difference["transaction"], difference["theirs"]) == (str(lost.id), None)
    assert "payterm reconcile --repair" in difference["remedy"]
    assert reconciler(Near(terminal.calls), HostDoor(terminal=terminal)).run(Run())["differences"] == []  # control


def test_late_forwarding_can_be_forced_and_its_age_is_seen(rig: Rig) -> None:
    host = rig.destinations[0]
    assert isinstance(host, FakeHost)
    host.mood = Mood.DOWN
    rig.terminal.sell(sale(1))  # type: ignore[attr-defined]
    rig.settle(within_ms=60_000)
    (waiting,) = rig.sync.destinations()
    assert waiting.queued == 1
    assert waiting.oldest_ms is not None
    assert waiting.oldest_ms > 0
    host.mood = Mood.WELL
    assert rig.sync.press() == 1
    rig.settle(within_ms=0)
    assert rig.spool.rows() == ()


def test_a_sale_accepted_offline_looks_different(terminal: Terminal) -> None:
    terminal.offline()
    accepted = result_screen(terminal.pay(1250))
    terminal.online()
    approved = result_screen(terminal.pay(1250))
    assert isinstance(accepted, screens.AcceptedOffline)
    assert isinstance(approved, screens.Approved)
    assert screens.render(accepted, "en").tobytes() != screens.render(approved, "en").tobytes()


def test_a_decline_after_forwarding_is_reported(terminal: Terminal) -> None:
    """In the ledger, in the status until somebody has seen it, in the journal, and at the register."""
    terminal.offline()
    refused = terminal.pay(1251)
    assert terminal.state(refused.id) is State.ACCEPTED
    assert terminal.carry() == ["refused"]
    assert [alert["id"] for alert in terminal.call("status")["alerts"]] == [str(refused.id)]
    assert terminal.call("sale.result", transaction=str(refused.id))["state"] == "refused"
    said = [record["details"] for record in terminal.call("audit.page")["records"] if record["type"] == "ANSWER"]
    assert said[-1]["decision"] == "declined"


def test_no_queue_is_hidden(rig: Rig) -> None:
    """Whatever has a row is listed, in whatever state, until it is through."""
    host = rig.destinations[0]
    assert isinstance(host, FakeHost)
    moods = (Mood.LOSES_ANSWER, Mood.CONDEMNS, Mood.FORGED)
    rig.terminal.sell(*(sale(number) for number in range(1, 10)))  # type: ignore[attr-defined]
    for number in range(1, 10):
        host.moods[sale(number).key] = moods[number % 3]
    rig.settle(within_ms=10_000)
    calls = Queue(rig.spool, rig.clock).calls()
    listed = {item["id"] for item in asked(calls, "queue.list", {})["items"]}
    there = {row.id for row in rig.spool.page(99, states=frozenset(Waiting) - {Waiting.DELIVERED})}
    assert listed == there
    assert len(there) == 9
    assert {state.value for state in OPEN | APART} >= {row.state.value for row in rig.spool.rows()}


@pytest.mark.parametrize("command", [("recover",), ("ledger", "list")])
def test_a_missing_key_says_so_and_loses_nothing(
    terminal: Terminal, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    terminal.offline()
    terminal.pay(1250)
    terminal.ledger.close()
    key = terminal.keys_directory / "data-key"
    kept = key.read_bytes()
    key.unlink()
    assert payterm(terminal, *command) == 5
    no_traceback(capsys, "data-key")
    key.write_bytes(kept)
    key.chmod(0o600)
    assert payterm(terminal, "recover") == 0
    assert "1 unsent" in capsys.readouterr().out


def test_it_starts_and_sells_while_offline_and_without_a_clock(terminal: Terminal) -> None:
    terminal.ledger.close()
    terminal.clock.is_synchronised = False
    terminal.start()
    terminal.offline()
    assert terminal.pay(1250).state is State.ACCEPTED


@pytest.mark.parametrize("days", [15, 400])
def test_nothing_unsent_is_purged(terminal: Terminal, days: int) -> None:
    terminal.offline()
    kept = terminal.pay(1250)
    terminal.ledger.mark_shown(kept.id, "accepted")
    terminal.clock.sleep_ms(days * DAY_MS)
    for _ in range(50):
        if not terminal.ledger.upkeep.step():
            break
    assert terminal.state(kept.id) is State.ACCEPTED
    assert terminal.carry() == ["settled"]

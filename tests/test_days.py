"""A day's end: each transaction is in one batch and no more, and the host's sums are held against it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from ledger_rig import Rig
from terminal_rig import Terminal
from test_cli import payterm, serving
from test_ledger_commits import inserted

from terminal.commands import day as commands
from terminal.control import CallRefused
from terminal.days import Days
from terminal.ledger.errors import AnswerRejected
from terminal.ledger.sealing import verify_batch
from terminal.ledger.states import State
from terminal.ledger.values import Decision, Event, ReversalReason

DAY_MS = 86_400_000


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "ledger")
    yield rig
    rig.close_all()


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path)
    terminal.online()
    yield terminal
    terminal.close()


def sums(figures: list[dict[str, Any]]) -> list[tuple[str, str, int, int]]:
    return [(each["currency"], each["scheme"], each["count"], each["sum_minor"]) for each in figures]


def shown(terminal: Terminal) -> dict[str, Any]:
    return terminal.call("day.show")


def test_the_days_totals_are_those_of_its_sales(terminal: Terminal) -> None:
    assert shown(terminal)["open"] | {"since_ms": None} == {
        "no": 1, "first": 1, "last": 0, "sold": [], "corrected": [], "since_ms": None,
    }  # fmt: skip
    terminal.pay(1250)
    sale = terminal.pay(300)
    terminal.call("sale.refund", sale=str(sale.id), amount=100, currency="EUR")
    opened = shown(terminal)["open"]
    assert sums(opened["sold"]) == [("EUR", "Visa", 3, 1450)]
    assert (opened["first"], opened["last"]) == (1, 3)


def test_the_host_holds_the_same_sums(terminal: Terminal) -> None:
    for minor in (1250, 300, 1251):  # the last one is declined
        terminal.pay(minor)
    ended = terminal.call("day.end", wait_ms=1000)
    assert (ended["no"], ended["first"], ended["last"], ended["decision"]) == (1, 1, 3, "balanced")
    assert sums(ended["sold"]) == [("EUR", "Visa", 2, 1550)]
    assert ended["host"] == [{"currency": "EUR", "count": 2, "sum_minor": 1550}]
    assert shown(terminal)["last"] == ended
    assert shown(terminal)["open"]["sold"] == []
    terminal.pay(200)
    assert sums(shown(terminal)["open"]["sold"]) == [("EUR", "Visa", 1, 200)]


def test_a_sale_that_the_host_lacks_is_said(terminal: Terminal) -> None:
    """Offline, and the envelope never comes: the day's end is not balanced, and says where the hole is."""
    terminal.pay(1250)
    terminal.offline()
    lost = terminal.pay(400)
    assert lost.state is State.ACCEPTED
    terminal.call("outbox.stored", keys=[item["key"] for item in terminal.items()])
    terminal.online()
    ended = terminal.call("day.end", wait_ms=1000)
    assert ended["decision"] == "differs"
    assert ended["host"] == [{"currency": "EUR", "count": 1, "sum_minor": 1250}]
    assert ended["missing"] == [[2, 2]]


def test_what_changes_afterwards_is_a_correction_and_in_no_batch_twice(terminal: Terminal) -> None:
    yesterday = terminal.pay(1250)
    terminal.call("day.end", wait_ms=1000)
    terminal.call("sale.void", sale=str(yesterday.id))
    terminal.pay(300)
    opened = shown(terminal)["open"]
    assert sums(opened["sold"]) == [("EUR", "Visa", 1, 300)]
    assert sums(opened["corrected"]) == [("EUR", "Visa", -1, -1250)]
    ended = terminal.call("day.end", wait_ms=1000)
    assert (ended["no"], ended["first"], ended["decision"]) == (2, 2, "balanced")
    assert sums(ended["corrected"]) == [("EUR", "Visa", -1, -1250)]
    assert shown(terminal)["open"]["corrected"] == []


def test_a_day_without_anything_in_it_stays_open(terminal: Terminal) -> None:
    with pytest.raises(CallRefused) as refused:
        terminal.call("day.end")
    assert refused.value.code == "day_stays_open"


def test_a_day_does_not_end_in_the_middle_of_a_sale(terminal: Terminal) -> None:
    terminal.pay(100)
    sale = terminal.begin(200)
    with pytest.raises(CallRefused) as refused:
        terminal.call("day.end")
    assert refused.value.code == "day_stays_open"
    terminal.payments.void(sale, "cancelled")
    assert terminal.call("day.end")["last"] == 2


@pytest.mark.parametrize("rebuild", [False, True])
def test_the_days_outlive_a_restart_and_a_lost_database(terminal: Terminal, rebuild: bool) -> None:
    yesterday = terminal.pay(1250)
    terminal.call("day.end", wait_ms=1000)
    terminal.pay(300)
    terminal.call("sale.void", sale=str(yesterday.id))
    before = shown(terminal)
    terminal.ledger.close()
    if rebuild:
        (terminal.config.ledger.directory / "ledger.db").unlink()
    terminal.start()
    assert shown(terminal) == before


def test_a_batch_waits_unanswered_through_a_restart(terminal: Terminal) -> None:
    terminal.pay(1250)
    terminal.offline()
    ended = terminal.call("day.end")
    assert ended["decision"] is None
    assert terminal.ledger.unsent() == [], "a day's end is no money"
    terminal.restart()
    terminal.online()
    (item,) = terminal.items()
    assert (item["event"], item["urgent"], item["amount"], item["after"]) == ("batch", False, None, None)
    terminal.carry()
    assert shown(terminal)["last"]["decision"] == "balanced"
    assert terminal.items() == []


def test_an_answer_to_another_batch_is_not_believed(terminal: Terminal) -> None:
    terminal.offline()
    for minor in (100, 200):
        terminal.pay(minor)
        terminal.call("day.end")
    first, second = (item for item in terminal.items() if item["event"] == "batch")
    answer = terminal.answer_to(first)
    with pytest.raises(CallRefused) as refused:
        terminal.deliver(second["key"], answer)
    assert refused.value.code == "answer_rejected"
    assert shown(terminal)["last"]["decision"] is None
    item = terminal.ledger.outbox_item(first["key"])
    with pytest.raises(AnswerRejected):
        verify_batch(answer, terminal.keys.host_answer, id_=item.transaction, terminal="T-other", envelope=item.sha256)
    # The host's word on an older batch is recorded, and is not taken for the newest one's.
    assert terminal.deliver(first["key"], answer) == "differs"
    assert shown(terminal)["last"]["decision"] is None


def test_batches_and_advices_keep_no_sale_and_no_room(rig: Rig) -> None:
    """A host that takes none of them must not fill the journal."""
    ledger = rig.open()
    for _ in range(3):
        sale = rig.sell(ledger)
        rig.deliver(ledger, sale.id, Event.AUTHORISATION, rig.host.answer(rig.envelope(ledger, sale.id)))
        ledger.end_day(
            lambda batch, number: rig.envelopes.batch(batch, number=number, unsent=(), clock_synchronised=True)
        )
    assert [item.event for item in ledger.outbox(9)] == [Event.BATCH] * 3
    assert ledger._parts.store.waiting_count() == 0
    assert ledger.upkeep.erase_card("nobody") == (0, 0)


def test_the_card_s_last_word_is_advised_and_books_nothing(rig: Rig) -> None:
    ledger = rig.open()
    sale = inserted(rig, ledger)
    sale = rig.deliver(ledger, sale.id, Event.AUTHORISATION, rig.host.answer(rig.envelope(ledger, sale.id)))
    assert sale.state is State.COMPLETING
    advice = lambda number: rig.envelopes.advice(  # noqa: E731
        sale, number=number, card=b"\x9f\x26\x01\xaa", kernel=0, scheme="Visa", completed=True
    )
    done = ledger.commit_outcome(sale.id, decision=Decision.COMPLETED, reason="online", envelope=advice)
    assert done.state is State.APPROVED
    (item,) = ledger.outbox(9)
    assert (item.event, item.urgent) == (Event.ADVICE, False)
    assert rig.host.unseal(item.envelope or "", done) == b"\x9f\x26\x01\xaa"
    assert ledger.unsent() == []
    assert ledger._parts.store.waiting_count() == 0
    with pytest.raises(AnswerRejected):
        rig.deliver(ledger, sale.id, Event.ADVICE, rig.host.answer(item.envelope or "", "approved"))
    after = rig.deliver(ledger, sale.id, Event.ADVICE, rig.host.answer(item.envelope or "", "noted"))
    assert after.state is State.APPROVED and after.authorisation_code == done.authorisation_code
    assert ledger.outbox(9) == []
    rig.close_all()
    assert rig.open().transaction(sale.id) == after


def test_a_refusing_card_is_advised_and_reversed_and_the_reversal_ends_both(rig: Rig) -> None:
    ledger = rig.open()
    sale = inserted(rig, ledger)
    sale = rig.deliver(ledger, sale.id, Event.AUTHORISATION, rig.host.answer(rig.envelope(ledger, sale.id)))
    reversed_ = ledger.commit_reversal(
        sale.id,
        ReversalReason.CARD,
        rig.reversal(sale, ReversalReason.CARD),
        lambda number: rig.envelopes.advice(
            sale, number=number, card=b"\x9f\x26\x01\xbb", kernel=0, scheme="Visa", completed=False
        ),
    )
    assert reversed_.state is State.REVERSING
    items = {item.event: item for item in ledger.outbox(9)}
    assert set(items) == {Event.ADVICE, Event.REVERSAL}
    assert items[Event.ADVICE].number < items[Event.REVERSAL].number
    answer = rig.host.answer(items[Event.REVERSAL].envelope or "", "reversed")
    assert rig.deliver(ledger, sale.id, Event.REVERSAL, answer).state is State.REVERSED
    assert ledger.outbox(9) == []


# ---- by itself


def days(terminal: Terminal, at: str | None) -> Days:
    section = msgspec.structs.replace(terminal.config.terminal, day_end=at)
    config = msgspec.structs.replace(terminal.config, terminal=section)
    return Days(config, terminal.ledger, terminal.payments._envelopes, terminal.link, terminal.clock)


def at_time(terminal: Terminal, hour: int, minute: int, day: int = 0) -> None:
    """Set the clock to this local time of its day."""
    now = datetime.fromtimestamp(terminal.clock.wall_ms() / 1000, UTC).astimezone()
    then = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    terminal.clock.sleep_ms(int(then.timestamp() * 1000 + day * DAY_MS - terminal.clock.wall_ms()))


def test_the_day_ends_by_itself_once(terminal: Terminal) -> None:
    at_time(terminal, 22, 0, 1)
    ends = days(terminal, "23:30")
    terminal.pay(100)
    ends.look()
    assert terminal.ledger.last_batch() is None, "too early"
    at_time(terminal, 23, 31)
    ends.look()
    batch = terminal.ledger.last_batch()
    assert batch is not None and batch.no == 1
    terminal.pay(200)
    at_time(terminal, 23, 40)
    ends.look()
    assert terminal.ledger.open_day().no == 2, "it has ended today"
    at_time(terminal, 23, 35, 1)
    ends.look()
    assert terminal.ledger.open_day().no == 3


def test_no_day_ends_by_itself_unless_it_is_told_to_or_knows_the_time(terminal: Terminal) -> None:
    terminal.pay(100)
    for ends, known in ((days(terminal, None), True), (days(terminal, "23:30"), False)):
        terminal.clock.is_synchronised = known
        terminal.clock.sleep_ms(3 * DAY_MS)
        ends.look()
    assert terminal.ledger.last_batch() is None


# ---- the command


@pytest.fixture
def served(terminal: Terminal) -> Iterator[Terminal]:
    with serving(terminal):
        yield terminal


def run(terminal: Terminal, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = payterm(terminal, *arguments)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out


def test_the_commands_tell_and_end_the_day(served: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(served, capsys, "day", "last") == (0, "no day was ended yet\n")
    served.pay(1250)
    code, out = run(served, capsys, "day", "totals")
    assert code == 0 and "12.50 EUR" in out and "Visa" in out and "transactions 1 to 1" in out
    code, out = run(served, capsys, "day", "end")
    assert code == 0 and "the host holds the same sums" in out
    code, out = run(served, capsys, "day", "last", "--json")
    assert code == 0 and json.loads(out)["decision"] == "balanced"


def test_a_difference_has_an_exit_code_of_its_own(served: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    served.offline()
    served.pay(1250)
    served.call("outbox.stored", keys=[item["key"] for item in served.items()])
    code, out = run(served, capsys, "day", "end", "--wait", "0")
    assert code == 0 and "not compared it yet" in out
    served.online()
    served.carry()
    code, out = run(served, capsys, "day", "last")
    assert code == commands.DIFFERS
    assert "THE HOST DIFFERS" in out and "payterm reconcile" in out

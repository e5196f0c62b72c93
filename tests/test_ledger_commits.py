"""The ledger while it runs: what each commit costs, keeps, refuses, and says afterwards."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ledger_rig import SUMMARY, TERMINAL, CountingMedium, Host, MemoryMedium, Rig, verified

from terminal.ledger.errors import (
    AnswerRejected,
    IllegalTransition,
    JournalFull,
    LedgerError,
    LedgerLocked,
    NoSuchTransaction,
    ReferenceTaken,
)
from terminal.ledger.journal import SLOT_BYTES, Medium
from terminal.ledger.ledger import ANSWERS_MAX, Delivered, Ledger, LedgerSettings
from terminal.ledger.recovery import resolve
from terminal.ledger.sealing import verify_answer
from terminal.ledger.states import State
from terminal.ledger.values import CardSummary, Decision, Event, Exposure, ReversalReason, Total, Transaction
from terminal.money import EUR, JPY, USD, Amount


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "state")
    yield rig
    rig.close_all()


def answered(rig: Rig, ledger: Ledger, sale: Transaction, decision: str = "approved") -> Transaction:
    envelope = rig.envelope(ledger, sale.id)
    return rig.deliver(ledger, sale.id, Event.AUTHORISATION, rig.host.answer(envelope, decision))


def reverse(rig: Rig, ledger: Ledger, sale: Transaction, reason: ReversalReason) -> Transaction:
    return ledger.commit_reversal(sale.id, reason, rig.reversal(sale, reason))


# Life of a sale


def test_an_offline_sale(rig: Rig) -> None:
    ledger = rig.open()
    opened = rig.begin(ledger, reference="order-1")
    assert opened.state is State.OPENED
    sale = rig.finish(ledger, opened)
    assert (sale.state, sale.amount, sale.card, sale.number) == (State.ACCEPTED, Amount(1250, EUR), SUMMARY, 1)
    (item,) = ledger.outbox(10)
    assert (item.key, item.number, item.urgent) == (f"{sale.id}/authorisation", 1, False)
    assert rig.host.read(item.envelope or "")["deferred"] is True
    assert ledger.unshown() == [sale]
    ledger.mark_shown(sale.id, "approved")
    assert ledger.unshown() == []
    settled = answered(rig, ledger, sale)
    assert (settled.state, settled.card_ref, settled.shown) == (State.SETTLED, "card-ref-1", "approved")
    assert ledger.outbox(10) == []
    assert ledger.outbox_item(item.key).envelope is None


def test_an_online_sale_that_falls_back_to_deferred_keeps_its_envelope(rig: Rig) -> None:
    ledger = rig.open()
    sale = rig.sell(ledger, Decision.ONLINE)
    assert ledger.authorising() == [sale]
    assert ledger.outbox(1)[0].urgent
    accepted = ledger.commit_outcome(sale.id, decision=Decision.ACCEPTED, reason="host unreachable")
    assert (accepted.state, accepted.card) == (State.ACCEPTED, SUMMARY)
    assert ledger.authorising() == []
    (item,) = ledger.outbox(10)
    assert (item.number, item.urgent) == (1, False)
    assert answered(rig, ledger, sale, "declined").state is State.REFUSED


def test_a_decline_stores_no_card_data(rig: Rig) -> None:
    ledger = rig.open()
    sale = rig.begin(ledger)
    declined = ledger.commit_outcome(sale.id, decision=Decision.DECLINED, reason="expired", card=SUMMARY)
    assert (declined.state, declined.reason) == (State.DECLINED, "expired")
    assert ledger.outbox(10) == []
    with pytest.raises(ValueError, match="envelope"):
        ledger.commit_outcome(
            rig.begin(ledger).id,
            decision=Decision.DECLINED,
            reason="x",
            envelope=rig.authorisation(sale, deferred=False),
        )


@pytest.mark.parametrize("missing", ["card", "envelope"])
def test_nothing_is_accepted_without_card_and_envelope(rig: Rig, missing: str) -> None:
    ledger = rig.open()
    sale = rig.begin(ledger)
    given = {"card": SUMMARY, "envelope": rig.authorisation(sale, deferred=True)}
    given.pop(missing)
    with pytest.raises(ValueError, match="envelope"):
        ledger.commit_outcome(sale.id, decision=Decision.ACCEPTED, reason="x", **given)  # type: ignore[arg-type]
    assert ledger.transaction(sale.id).state is State.OPENED


def test_envelopes_are_numbered_without_gaps(rig: Rig) -> None:
    ledger = rig.open()
    sales = [rig.sell(ledger, decision) for decision in (Decision.ONLINE, Decision.ACCEPTED, Decision.ONLINE)]
    reverse(rig, ledger, sales[0], ReversalReason.TIMEOUT)

    def fails(number: int) -> str:
        raise RuntimeError(str(number))

    ledger.commit_outcome(rig.begin(ledger).id, decision=Decision.DECLINED, reason="card")  # sends nothing
    with pytest.raises(RuntimeError, match="5"):
        ledger.commit_outcome(
            rig.begin(ledger).id, decision=Decision.ACCEPTED, reason="x", card=SUMMARY, envelope=fails
        )
    ledger.close()
    ledger = rig.open()
    rig.sell(ledger)
    items = ledger.outbox(10)
    assert sorted(item.number for item in items) == [1, 2, 3, 4, 5]
    assert [rig.host.read(item.envelope or "")["number"] for item in items] == [item.number for item in items]
    # What somebody waits for goes first: online authorisations and reversals.
    assert [item.number for item in items] == [1, 3, 4, 2, 5]


def test_a_void_takes_back_what_was_sold(rig: Rig) -> None:
    ledger = rig.open()
    sale = rig.sell(ledger)
    assert reverse(rig, ledger, sale, ReversalReason.VOID).state is State.REVERSING
    assert {item.key for item in ledger.outbox(9)} == {f"{sale.id}/authorisation", f"{sale.id}/reversal"}
    envelope = rig.envelope(ledger, sale.id, Event.REVERSAL)
    done = rig.deliver(ledger, sale.id, Event.REVERSAL, rig.host.answer(envelope, "reversed"))
    assert (done.state, done.reason) == (State.REVERSED, "void")
    # Nothing waits any more: the host keeps a tombstone for an authorisation that comes later.
    assert ledger.outbox(9) == []
    assert ledger.unsent() == []
    assert ledger.totals() == []


# Once, and whoever is first


def test_a_reference_names_one_sale(rig: Rig) -> None:
    ledger = rig.open()
    first = rig.begin(ledger, reference="Bon №1")
    assert rig.begin(ledger, reference="Bon №1") == first
    with pytest.raises(ReferenceTaken):
        rig.begin(ledger, minor=1251, reference="Bon №1")
    sale = rig.finish(ledger, first)
    ledger.close()
    ledger = rig.open()
    assert rig.begin(ledger, reference="Bon №1") == sale
    assert ledger.by_reference("Bon №1") == sale
    assert ledger.by_reference("Bon №2") is None
    with pytest.raises(ReferenceTaken):
        ledger.begin(Amount(1250, USD), "Bon №1")
    with pytest.raises(ValueError, match="64"):
        rig.begin(ledger, reference="x" * 65)


def test_the_longest_reference_fits_a_record(rig: Rig) -> None:
    ledger = rig.open()
    assert rig.sell(ledger, reference='\U0001f4b6"\\\x01' * 16).state is State.ACCEPTED


def test_a_repeated_answer_is_acknowledged_and_changes_nothing(rig: Rig) -> None:
    ledger = rig.open()
    sale = rig.sell(ledger)
    envelope = rig.envelope(ledger, sale.id)
    first = rig.deliver(ledger, sale.id, Event.AUTHORISATION, rig.host.answer(envelope))
    used = ledger.free_slots
    again = rig.deliver(ledger, sale.id, Event.AUTHORISATION, rig.host.answer(envelope))
    contrary = rig.deliver(ledger, sale.id, Event.AUTHORISATION, rig.host.answer(envelope, "declined"))
    assert first == again == contrary
    assert ledger.free_slots == used


def test_an_answer_to_another_envelope_is_not_committed(rig: Rig) -> None:
    ledger = rig.open()
    sale, other = rig.sell(ledger), rig.sell(ledger)
    envelope = rig.envelope(ledger, other.id)
    jws = rig.host.answer(envelope)
    sha256 = ledger.outbox_item(f"{other.id}/authorisation").sha256
    answer = verify_answer(
        jws,
        rig.keys.host_answer,
        transaction=other,
        event=Event.AUTHORISATION,
        terminal=TERMINAL,
        envelope=sha256,
    )
    with pytest.raises(AnswerRejected):
        ledger.commit_answer(sale.id, Event.AUTHORISATION, answer, jws)
    with pytest.raises(NoSuchTransaction):
        ledger.commit_answer(sale.id, Event.REVERSAL, answer, jws)
    assert ledger.transaction(sale.id) == sale


def test_a_late_time_out_loses_and_a_late_answer_changes_nothing(rig: Rig) -> None:
    ledger = rig.open()
    early = rig.sell(ledger, Decision.ONLINE)
    answered(rig, ledger, early)
    with pytest.raises(IllegalTransition) as caught:
        reverse(rig, ledger, early, ReversalReason.TIMEOUT)
    assert caught.value.state == State.APPROVED
    with pytest.raises(IllegalTransition):
        ledger.commit_outcome(early.id, decision=Decision.ACCEPTED, reason="deferred")
    late = rig.sell(ledger, Decision.ONLINE)
    reverse(rig, ledger, late, ReversalReason.TIMEOUT)
    after = answered(rig, ledger, late)
    assert (after.state, after.reason) == (State.REVERSING, "timeout")


def test_of_an_answer_and_a_time_out_that_race_exactly_one_wins(rig: Rig) -> None:
    ledger = rig.open()
    winners: dict[State, int] = {}
    for _ in range(30):
        sale = rig.sell(ledger, Decision.ONLINE)
        jws = rig.host.answer(rig.envelope(ledger, sale.id))
        start, told = threading.Barrier(2), []

        def answer(
            sale: Transaction = sale, jws: str = jws, start: threading.Barrier = start, told: list = told
        ) -> None:
            start.wait()
            told.append(rig.deliver(ledger, sale.id, Event.AUTHORISATION, jws).state)

        def time_out(sale: Transaction = sale, start: threading.Barrier = start, told: list = told) -> None:
            start.wait()
            try:
                told.append(reverse(rig, ledger, sale, ReversalReason.TIMEOUT).state)
            except IllegalTransition:
                told.append(ledger.transaction(sale.id).state)

        threads = [threading.Thread(target=target) for target in (answer, time_out)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        final = ledger.transaction(sale.id).state
        assert told == [final, final]
        winners[final] = winners.get(final, 0) + 1
        assert (f"{sale.id}/reversal" in {item.key for item in ledger.outbox(99)}) == (final is State.REVERSING)
    assert set(winners) <= {State.APPROVED, State.REVERSING}
    assert verified(ledger)


def test_unknown_transactions(rig: Rig) -> None:
    ledger, other = rig.open(), Rig(rig.directory.parent / "other", seed=1)
    stranger = rig.begin(other.open())
    other.close_all()
    with pytest.raises(NoSuchTransaction):
        ledger.transaction(stranger.id)
    with pytest.raises(NoSuchTransaction):
        rig.finish(ledger, stranger)
    with pytest.raises(NoSuchTransaction):
        ledger.outbox_item(f"{stranger.id}/authorisation")


# Answers in groups


def delivered(
    rig: Rig, ledger: Ledger, sale: Transaction, decision: str, event: Event = Event.AUTHORISATION
) -> Delivered:
    jws = rig.host.answer(rig.envelope(ledger, sale.id, event), decision)
    sha256 = ledger.outbox_item(f"{sale.id}/{event}").sha256
    answer = verify_answer(jws, rig.keys.host_answer, transaction=sale, event=event, terminal=TERMINAL, envelope=sha256)
    return sale.id, event, answer, jws


def test_a_group_of_answers_is_one_commit(rig: Rig) -> None:
    media: list[CountingMedium] = []

    def counting(path: Path, size_bytes: int) -> Medium:
        CountingMedium.create(path, size_bytes).close()
        media.append(CountingMedium(path))
        return media[0]

    ledger = rig.open(counting)
    sales = [rig.sell(ledger) for _ in range(ANSWERS_MAX)]
    group = [delivered(rig, ledger, sale, "approved") for sale in sales]
    ledger.flush()
    before = media[0].flushes
    outcomes = ledger.commit_answers(group)
    assert media[0].flushes == before + 1
    assert [each.state for each in outcomes if isinstance(each, Transaction)] == [State.SETTLED] * ANSWERS_MAX
    assert ledger.unsent() == []
    assert ledger.exposure(EUR) == Exposure(0, 0, None)
    assert ledger.commit_answers(group) == outcomes  # a repetition changes nothing
    assert media[0].flushes == before + 1
    with pytest.raises(ValueError, match="at most"):
        ledger.commit_answers([*group, group[0]])
    # Control: one by one they cost as many commits as there are answers.
    more = [rig.sell(ledger) for _ in range(3)]
    singly = [delivered(rig, ledger, sale, "approved") for sale in more]
    before = media[0].flushes
    for one in singly:
        ledger.commit_answer(*one)
    assert media[0].flushes == before + 3
    assert verified(ledger)


def test_what_is_wrong_with_one_answer_does_not_stop_the_others(rig: Rig) -> None:
    ledger = rig.open()
    first, other, last = (rig.sell(ledger) for _ in range(3))
    good, wrong, fine = (delivered(rig, ledger, sale, "approved") for sale in (first, other, last))
    swapped = (other.id, Event.AUTHORISATION, good[2], good[3])
    unknown = (other.id, Event.REVERSAL, wrong[2], wrong[3])
    outcomes = ledger.commit_answers([good, swapped, unknown, fine])
    assert [type(each) for each in outcomes] == [Transaction, AnswerRejected, NoSuchTransaction, Transaction]
    assert [ledger.transaction(sale.id).state for sale in (first, other, last)] == [
        State.SETTLED,
        State.ACCEPTED,
        State.SETTLED,
    ]


def test_two_answers_for_one_sale_work_in_order(rig: Rig) -> None:
    ledger = rig.open()
    sale = rig.sell(ledger)
    reverse(rig, ledger, sale, ReversalReason.VOID)
    approved = delivered(rig, ledger, sale, "approved")
    reversed_ = delivered(rig, ledger, sale, "reversed", Event.REVERSAL)
    free = ledger.free_slots
    outcomes = ledger.commit_answers([approved, reversed_, approved])
    assert [each.state for each in outcomes if isinstance(each, Transaction)] == [State.REVERSED] * 3
    assert ledger.free_slots == free - 2
    # The other way round the reversal ends the waiting for both.
    sale = rig.sell(ledger)
    reverse(rig, ledger, sale, ReversalReason.VOID)
    approved = delivered(rig, ledger, sale, "approved")
    reversed_ = delivered(rig, ledger, sale, "reversed", Event.REVERSAL)
    free = ledger.free_slots
    ledger.commit_answers([reversed_, approved])
    assert ledger.transaction(sale.id).state is State.REVERSED
    assert ledger.free_slots == free - 1
    # An answer that does not fit what the group has made of the sale so far is refused, as it would be alone.
    sale = rig.sell(ledger, Decision.ONLINE)
    declined = delivered(rig, ledger, sale, "declined")
    ledger.commit_answers([declined, declined])
    with pytest.raises(IllegalTransition):
        reverse(rig, ledger, sale, ReversalReason.TIMEOUT)
    assert ledger.outbox(9) == []
    assert verified(ledger)


class PowerCut(BaseException):
    """No more electricity: nothing may catch this."""


class Forgetful(MemoryMedium):
    """The planted fault: once it forgets, a flush says that it is done and has done nothing."""

    forgets = False

    def flush(self) -> None:
        if self.forgets:
            self.on_operation("flushed")
        else:
            super().flush()


def cut_in_a_group(rig: Rig, left_in: Path, at: str, chance: random.Random, *, forgets: bool = False) -> int:
    """The power goes within the one flush of six answers; how many of them are there at the next start.

    Whatever that is, all are delivered again, and taken.
    """
    medium = Forgetful(rig.settings.journal_size_bytes)
    ledger = rig.open(lambda *_: medium)
    sales = [rig.sell(ledger) for _ in range(6)]
    group = [delivered(rig, ledger, sale, "approved") for sale in sales]

    def cut(operation: str) -> None:
        if operation == at:
            raise PowerCut

    medium.on_operation, medium.forgets = cut, forgets
    with pytest.raises(PowerCut):
        ledger.commit_answers(group)
    left = medium.power_cut(chance)
    shutil.copytree(rig.directory, left_in)
    medium.on_operation = lambda _: None
    rig.close_all()
    ledger = rig.open(lambda *_: left, directory=left_in)
    states = [ledger.transaction(sale.id).state for sale in sales]
    settled = states.count(State.SETTLED)
    # A record counts only with all before it, so what is there is a beginning of the group.
    assert states == [State.SETTLED] * settled + [State.ACCEPTED] * (6 - settled)
    outcomes = ledger.commit_answers(group)
    assert [each.state for each in outcomes if isinstance(each, Transaction)] == [State.SETTLED] * 6
    assert ledger.unsent() == []
    assert ledger.outbox(9) == []
    assert verified(ledger)
    ledger.close()
    return settled


def test_of_a_group_that_is_cut_off_any_part_may_be_durable(tmp_path: Path) -> None:
    found = {
        cut_in_a_group(Rig(tmp_path / f"{seed}"), tmp_path / f"left-{seed}", "flush", random.Random(seed))
        for seed in range(16)
    }
    assert len(found) > 1


@pytest.mark.parametrize("forgets", [False, True])
def test_a_group_is_durable_once_the_journal_is_flushed(tmp_path: Path, forgets: bool) -> None:
    """With a medium that does not flush as the control, which must be noticed."""
    found = {
        cut_in_a_group(
            Rig(tmp_path / f"{seed}"), tmp_path / f"left-{seed}", "flushed", random.Random(seed), forgets=forgets
        )
        for seed in range(8)
    }
    assert (found == {6}) is not forgets


# What it costs


def test_two_flushes_for_an_offline_sale_one_of_them_the_journals(rig: Rig) -> None:
    media: list[CountingMedium] = []

    def counting(path: Path, size_bytes: int) -> Medium:
        CountingMedium.create(path, size_bytes).close()
        media.append(CountingMedium(path))
        return media[0]

    ledger = rig.open(counting)
    for _ in range(20):
        sale = rig.begin(ledger)
        before = media[0].flushes
        rig.finish(ledger, sale)
        assert media[0].flushes == before + 1
        ledger.mark_shown(sale.id, "approved")
        ledger.note("test")
        assert media[0].flushes == before + 1
    ledger.flush()
    assert media[0].flushes == before + 2
    ledger.flush()
    assert media[0].flushes == before + 2  # nothing to do


def test_the_log_is_sized_once(rig: Rig) -> None:
    """A log that grows costs a second flush for each sale."""
    ledger, log = rig.open(), rig.directory / "ledger.db-wal"
    size_bytes, salts = log.stat().st_size, log.read_bytes()[16:24]
    assert size_bytes >= rig.settings.wal_size_bytes
    for _ in range(40):
        rig.sell(ledger)
    assert log.read_bytes()[16:24] != salts  # it has started over
    assert log.stat().st_size == size_bytes


SALES = """
import sys
from pathlib import Path
from ledger_rig import LedgerSettings, Rig
rig = Rig(Path(sys.argv[1]), settings=LedgerSettings(journal_size_bytes=1 << 24))
ledger = rig.open()
for _ in range(int(sys.argv[2])):
    sale = rig.sell(ledger)
    ledger.mark_shown(sale.id, "approved")
rig.close_all()
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="counting SQLite's flushes needs strace")
def test_the_kernel_sees_two_flushes_for_a_sale(tmp_path: Path) -> None:
    def flushes(sales: int) -> int:
        log = tmp_path / f"{sales}.strace"
        subprocess.run(
            ["strace", "-f", "-e", "trace=fsync,fdatasync", "-o", str(log), sys.executable, "-c", SALES,
             str(tmp_path / f"{sales}"), str(sales)],
            check=True,
            env={"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}", "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        return len(re.findall(r"f(?:data)?sync\(\d+\) += 0", log.read_text()))

    assert flushes(14) - flushes(4) == 20


# What it says


def test_exposure_counts_what_is_accepted_or_reserved(rig: Rig) -> None:
    ledger = rig.open()
    assert ledger.exposure(EUR) == Exposure(0, 0, None)
    first = rig.sell(ledger, minor=100)
    online = rig.sell(ledger, Decision.ONLINE, minor=200)
    opened = rig.begin(ledger, minor=400)
    assert ledger.exposure(EUR) == Exposure(700, 3, first.opened_at_ms)
    assert ledger.exposure(JPY) == Exposure(0, 0, None)
    ledger.commit_outcome(opened.id, decision=Decision.VOID, reason="cancelled")
    assert ledger.exposure(EUR).sum_minor == 300
    answered(rig, ledger, online)
    assert ledger.exposure(EUR) == Exposure(100, 1, first.opened_at_ms)
    ledger.close()
    ledger = rig.open()
    assert ledger.exposure(EUR) == Exposure(100, 1, first.opened_at_ms)
    answered(rig, ledger, first, "declined")
    assert ledger.exposure(EUR) == Exposure(0, 0, None)


def test_totals_and_unsent(rig: Rig) -> None:
    ledger = rig.open()
    sales = [rig.sell(ledger, minor=minor) for minor in (100, 200, 400)]
    rig.sell(ledger, Decision.ONLINE, minor=800)
    assert ledger.totals() == [Total("2026-09-21", EUR, "visa", 700, 3)]
    answered(rig, ledger, sales[0])
    answered(rig, ledger, sales[1], "declined")
    assert ledger.totals() == [Total("2026-09-21", EUR, "visa", 500, 2)]
    (unsent,) = ledger.unsent()
    assert (unsent.currency, unsent.sum_minor, unsent.count) == (EUR, 1200, 2)
    assert unsent.oldest_wall_ms == sales[2].opened_at_ms
    rig.begin(ledger, minor=1600)
    assert [sale.amount.minor for sale in ledger.transactions(3)] == [1600, 800, 400]
    assert [sale.amount.minor for sale in ledger.transactions(3, before=5)] == [800, 400, 200]
    assert [sale.amount.minor for sale in ledger.transactions(3, before=2)] == [100]


def test_handed_over_items_are_offered_again_after_a_start_or_on_demand(rig: Rig) -> None:
    ledger = rig.open()
    for _ in range(3):
        rig.sell(ledger)
    keys = [item.key for item in ledger.outbox(2)]
    ledger.mark_handed_over(keys)
    assert [item.number for item in ledger.outbox(9)] == [3]
    assert ledger.unsent()[0].count == 3
    ledger.offer_again()
    assert len(ledger.outbox(9)) == 3
    ledger.mark_handed_over(keys)
    ledger.close()
    assert len(rig.open().outbox(9)) == 3


def test_card_summaries_keep_four_digits() -> None:
    with pytest.raises(ValueError, match="four"):
        CardSummary("visa", "A0", "TEST", "34567899", 3, 1, "00", "fdda", "none")


# Who may, and how many


def test_one_process_at_a_time(rig: Rig) -> None:
    first = rig.open()
    with pytest.raises(LedgerLocked):
        rig.open()
    sale = rig.sell(first)
    first.close()
    assert rig.open().transaction(sale.id) == sale
    with pytest.raises(LedgerError, match="closed"):
        first.transactions(1)


def test_files_are_for_their_owner_only(rig: Rig) -> None:
    rig.sell(rig.open())
    assert rig.directory.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in rig.directory.iterdir()} == {
        "journal": 0o600,
        "ledger.db": 0o600,
        "ledger.db-wal": 0o600,
    }


def test_a_nearly_full_journal_refuses_sales_but_ends_what_it_began(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "state", settings=LedgerSettings(journal_size_bytes=200 * SLOT_BYTES, wal_size_bytes=65536))
    medium = MemoryMedium(200 * SLOT_BYTES)
    ledger = rig.open(lambda *_: medium)
    sales: list[Transaction] = []
    with pytest.raises(JournalFull, match="not begun"):
        for _ in range(200):
            sales.append(rig.sell(ledger, Decision.ONLINE if len(sales) % 2 else Decision.ACCEPTED))
            ledger.mark_shown(sales[-1].id, "any")
    assert len(sales) >= 8
    noted = 0
    while ledger.note(f"start {noted}"):
        noted += 1
        assert noted < 200
    # The worst case for every one of them, and all of it fits.
    for sale in sales:
        if sale.state is State.AUTHORISING:
            ledger.commit_outcome(sale.id, decision=Decision.ACCEPTED, reason="deferred")
        answered(rig, ledger, sale)
        reverse(rig, ledger, sale, ReversalReason.VOID)
        ledger.mark_shown(sale.id, "void")
        envelope = rig.envelope(ledger, sale.id, Event.REVERSAL)
        rig.deliver(ledger, sale.id, Event.REVERSAL, rig.host.answer(envelope, "reversed"))
    assert {sale.state for sale in ledger.transactions(99)} == {State.REVERSED}
    assert ledger.free_slots >= 0
    assert verified(ledger) == 200 - ledger.free_slots
    ledger.close()


def test_a_host_of_another_key_opens_nothing(rig: Rig) -> None:
    ledger = rig.open()
    sale = rig.sell(ledger)
    with pytest.raises(Exception):  # noqa: B017 (whatever the library says: it does not open)
        Host(seed=2).unseal(rig.envelope(ledger, sale.id), sale)


def test_what_flaps_is_not_written_down_every_time(rig: Rig) -> None:
    ledger = rig.open()
    assert [ledger.note("link", online=False) for _ in range(20)].count(True) == 12
    assert ledger.note("reader_lost")
    rig.clock.now_ms += 3_600_000
    assert ledger.note("link", online=True)


# An inserted card has the last word


def inserted(rig: Rig, ledger: Ledger) -> Transaction:
    opened = rig.begin(ledger)
    return ledger.commit_outcome(
        opened.id,
        decision=Decision.ONLINE,
        reason="online",
        card=replace(SUMMARY, contact=True),
        envelope=rig.authorisation(opened, deferred=False),
    )


def test_an_approval_waits_for_an_inserted_card(rig: Rig) -> None:
    ledger = rig.open()
    sale = answered(rig, ledger, inserted(rig, ledger))
    assert sale.state is State.COMPLETING
    assert ledger.unshown() == [] and ledger.totals() == []
    done = ledger.commit_outcome(sale.id, decision=Decision.COMPLETED, reason="completed")
    assert done.state is State.APPROVED and ledger.unshown() == [done]


def test_a_card_that_refuses_after_the_host_approved_is_reversed(rig: Rig) -> None:
    ledger = rig.open()
    sale = answered(rig, ledger, inserted(rig, ledger))
    assert reverse(rig, ledger, sale, ReversalReason.CARD).state is State.REVERSING
    assert [item.event for item in ledger.outbox(10)] == [Event.REVERSAL]


def test_a_power_cut_before_the_cards_last_word_is_reversed(rig: Rig) -> None:
    ledger = rig.open()
    sale = answered(rig, ledger, inserted(rig, ledger))
    rig.close_all()
    ledger = rig.open()
    resolution = resolve(ledger, rig.envelopes)
    assert resolution.reversed == (sale.id,)
    assert ledger.transaction(sale.id).state is State.REVERSING

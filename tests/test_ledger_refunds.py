"""Refunds in the ledger: never more than was sold, kept with their sale, and the same again from the journal alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ledger_rig import MemoryMedium, Rig, verified

from terminal.ledger.errors import NoSuchTransaction, NotRefundable, ReferenceTaken
from terminal.ledger.ledger import Ledger, LedgerSettings
from terminal.ledger.recovery import resolve
from terminal.ledger.states import State
from terminal.ledger.upkeep import Retention
from terminal.ledger.values import Decision, Event, Kind, ReversalReason, Transaction
from terminal.money import EUR, USD, Amount

DAY_MS = 86_400_000


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "ledger")
    yield made
    made.close_all()


def sold(rig: Rig, ledger: Ledger, minor: int = 1250) -> Transaction:
    """Approved, seen and answered."""
    sale = rig.sell(ledger, Decision.ONLINE, minor=minor)
    ledger.mark_shown(sale.id, "approved")
    return rig.deliver(ledger, sale.id, Event.AUTHORISATION, rig.host.answer(rig.envelope(ledger, sale.id)))


def answered(rig: Rig, ledger: Ledger, refund: Transaction, decision: str = "approved") -> Transaction:
    jws = rig.host.answer(rig.envelope(ledger, refund.id, Event.REFUND), decision)
    return rig.deliver(ledger, refund.id, Event.REFUND, jws)


def figures(ledger: Ledger) -> list[tuple[int, int]]:
    return [(total.count, total.sum_minor) for total in ledger.totals()]


def test_the_envelope_names_the_sale_and_nothing_of_the_card(rig: Rig) -> None:
    ledger = rig.open()
    sale = sold(rig, ledger)
    refund = rig.refund(ledger, sale, 500)
    said = rig.host.read(rig.envelope(ledger, refund.id, Event.REFUND))
    assert {name: said[name] for name in ("event", "kind", "of", "amount", "currency", "sequence")} == {
        "event": "refund",
        "kind": "refund",
        "of": str(sale.id),
        "amount": 500,
        "currency": "EUR",
        "sequence": 2,
    }
    assert not {"sealed", "scheme", "host_key"} & set(said)
    (item,) = ledger.outbox(9)
    assert (item.after, item.change_minor, item.currency, item.urgent) == (sale.id, -500, EUR, False)


@pytest.mark.parametrize("state", ["opened", "authorising", "declined", "void", "reversing", "refused"])
def test_only_what_was_sold_is_paid_back(rig: Rig, state: str) -> None:
    ledger = rig.open()
    match state:
        case "opened":
            sale = rig.begin(ledger)
        case "authorising":
            sale = rig.sell(ledger, Decision.ONLINE)
        case "declined":
            sale = rig.begin(ledger)
            ledger.commit_outcome(sale.id, decision=Decision.DECLINED, reason="test")
        case "void":
            sale = rig.begin(ledger)
            ledger.commit_outcome(sale.id, decision=Decision.VOID, reason="test")
        case "reversing":
            sale = rig.sell(ledger)
            ledger.commit_reversal(sale.id, ReversalReason.VOID, rig.reversal(sale, ReversalReason.VOID))
        case _:
            sale = rig.sell(ledger)
            jws = rig.host.answer(rig.envelope(ledger, sale.id), "declined")
            rig.deliver(ledger, sale.id, Event.AUTHORISATION, jws)
    assert ledger.transaction(sale.id).state == state
    free = ledger.free_slots
    with pytest.raises(NotRefundable) as refused:
        rig.refund(ledger, sale)
    assert refused.value.reason == "not_sold"
    assert ledger.free_slots == free
    assert ledger.refunded(sale.id) == Amount(0, EUR)


def test_parts_add_up_and_what_was_declined_does_not_count(rig: Rig) -> None:
    ledger = rig.open()
    sale = sold(rig, ledger, 1000)
    first = rig.refund(ledger, sale, 600)
    for minor in (401, 1000):
        with pytest.raises(NotRefundable, match=r"4\.00 EUR"):
            rig.refund(ledger, sale, minor)
    assert answered(rig, ledger, first, "declined").state is State.DECLINED
    assert figures(ledger) == [(1, 1000)]
    second = rig.refund(ledger, sale, 1000)
    assert figures(ledger) == [(1, 1000)]  # nothing is paid back before the host has said so
    assert answered(rig, ledger, second).state is State.APPROVED
    assert figures(ledger) == [(2, 0)]
    with pytest.raises(NotRefundable):
        rig.refund(ledger, sale, 1)
    with pytest.raises(NotRefundable, match="EUR"):
        ledger.commit_refund(sale.id, Amount(1, USD), None, lambda *_: "")
    with pytest.raises(NoSuchTransaction):
        rig.refund(ledger, replace(sale, id=second.id.__class__(int=5)))


def test_a_sale_is_reversed_or_refunded_and_never_both(rig: Rig) -> None:
    ledger = rig.open()
    sale = sold(rig, ledger)
    refund = rig.refund(ledger, sale, 1)
    for one in (sale, refund):
        with pytest.raises(NotRefundable):
            ledger.commit_reversal(one.id, ReversalReason.VOID, rig.reversal(one, ReversalReason.VOID))
    answered(rig, ledger, refund, "declined")  # control: now nothing of it was paid back
    after = ledger.commit_reversal(sale.id, ReversalReason.VOID, rig.reversal(sale, ReversalReason.VOID))
    assert after.state is State.REVERSING


def test_a_reference_is_of_one_refund_of_one_sale(rig: Rig) -> None:
    ledger = rig.open()
    sale, other = sold(rig, ledger), sold(rig, ledger)
    refund = rig.refund(ledger, sale, 500, "back-1")
    assert rig.refund(ledger, sale, 500, "back-1") == refund
    for wrong in (lambda: rig.refund(ledger, sale, 501, "back-1"), lambda: rig.refund(ledger, other, 500, "back-1")):
        with pytest.raises(ReferenceTaken):
            wrong()
    with pytest.raises(ReferenceTaken):
        rig.begin(ledger, 500, "back-1")


def test_the_journal_alone_tells_the_same(rig: Rig) -> None:
    ledger = rig.open()
    sale = sold(rig, ledger)
    kept, gone = rig.refund(ledger, sale, 500), rig.refund(ledger, sale, 250)
    answered(rig, ledger, kept)
    answered(rig, ledger, gone, "declined")
    lost = rig.sell(ledger)
    rig.deliver(ledger, lost.id, Event.AUTHORISATION, rig.host.answer(rig.envelope(ledger, lost.id), "declined"))
    assert ledger.acknowledge(gone.id, 7)
    waiting = rig.refund(ledger, sale, 100)
    before = ledger.transactions(9), ledger.totals(), ledger.alerts(), ledger.outbox(9), ledger.refunded(sale.id)
    assert [each.id for each in ledger.alerts()] == [lost.id]
    ledger.close()
    (rig.directory / "ledger.db").unlink()
    ledger = rig.open()
    assert ledger.recovery.rebuilt
    after = ledger.transactions(9), ledger.totals(), ledger.alerts(), ledger.outbox(9), ledger.refunded(sale.id)
    assert after == before
    resolve(ledger, rig.envelopes)
    assert ledger.transaction(waiting.id).state is State.AUTHORISING  # a start takes no refund back
    assert ledger.unshown() == []
    assert verified(ledger) > 10


def test_a_power_cut_anywhere_leaves_a_refund_whole_or_void(rig: Rig) -> None:
    class PowerCut(Exception):
        pass

    seen = set()
    for cut in itertools.count():
        one = Rig(rig.directory.with_name(f"cut-{cut}"))
        medium = MemoryMedium(one.settings.journal_size_bytes)
        ledger = one.open(lambda *_, made=medium: made)
        sale = sold(one, ledger)
        operations = itertools.count()

        def fail(_: str, counting: Iterator[int] = operations, at: int = cut) -> None:
            if next(counting) == at:
                raise PowerCut

        medium.on_operation = fail
        try:
            one.refund(ledger, sale, 500, "back")
            through = True
        except PowerCut:
            through = False
        left = MemoryMedium(medium.size_bytes)
        left.now[:] = left.durable[:] = medium.now
        after = one.open(lambda *_, made=left: made, one.directory.with_name(f"after-{cut}"))
        resolve(after, one.envelopes)
        found = after.by_reference("back")
        state = None if found is None else found.state
        assert state in {None, State.VOID, State.AUTHORISING}
        assert len([item for item in after.outbox(9) if item.event is Event.REFUND]) == (state is State.AUTHORISING)
        seen.add(state)
        one.close_all()
        if through:
            break
    assert seen == {None, State.VOID, State.AUTHORISING}


def test_a_sale_is_not_forgotten_before_its_refund(rig: Rig) -> None:
    rig.settings = LedgerSettings(
        journal_size_bytes=2 * 1024 * 1024,
        wal_size_bytes=256 * 1024,
        retention=Retention(sales_days=10, card_days=3, audit_months=12),
    )
    ledger = rig.open()
    sale = sold(rig, ledger)
    rig.clock.now_ms += 9 * DAY_MS
    refund = rig.refund(ledger, sale, 500)
    answered(rig, ledger, refund)

    def forget() -> list[int]:
        for _ in range(200):
            if not ledger.upkeep.step():
                break
        rig.clock.now_ms += 60_000
        return [each.number for each in ledger.transactions(9)]

    rig.clock.now_ms += 5 * DAY_MS
    assert forget() == [2, 1]
    assert ledger.refunded(sale.id) == Amount(500, EUR)
    rig.clock.now_ms += 6 * DAY_MS
    forget()
    assert forget() == []


def test_what_is_held_against_the_hosts_books(rig: Rig) -> None:
    ledger = rig.open()
    sale = sold(rig, ledger)
    refund = rig.refund(ledger, sale, 500)
    void = rig.begin(ledger)
    ledger.commit_outcome(void.id, decision=Decision.VOID, reason="test")
    assert [
        (each.number, each.kind, each.of, each.amount.minor, each.state, each.sent, each.answered)
        for each in ledger.booking_states(1, 99, 99)
    ] == [
        (1, Kind.SALE, None, 1250, State.APPROVED, True, True),
        (2, Kind.REFUND, sale.id, 500, State.AUTHORISING, True, False),
        (3, Kind.SALE, None, 1250, State.VOID, False, False),
    ]
    assert [each.id for each in ledger.booking_states(2, 99, 1)] == [refund.id]
    assert ledger.last_number() == 3

"""The ledger held against Stripe's records: what differs is found, what is on its way or another terminal's is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from stripe_rig import Shop, notice, refund, stripe_shop
from sync_rig import FakeClock
from test_reconcile import Books, Shelf, day, terminal_of
from test_sync_stripe import record, sent

from hwsim.stripe_double.faults import Fail, Garbage
from terminal.control import Call
from terminal.ledger.states import State
from terminal.sync.destinations.stripe import Event, StripeDestination
from terminal.sync.errors import NotListed
from terminal.sync.queue import List
from terminal.sync.reconcile import Reconciler, Run
from terminal.sync.records import Recorded, compare


@dataclass
class Till:
    """The terminal's and the queue's calls."""

    standings: list[dict[str, Any]] = field(default_factory=list)
    waiting: list[UUID] = field(default_factory=list)
    later: list[dict[str, Any]] | None = None  # the same at the second look
    looks: int = 0

    def ask(self, do: str, given: dict[str, Any]) -> dict[str, Any]:
        assert do == "reconcile.standings"
        listed = self.standings if self.later is None or not self.looks else self.later
        self.looks += 1
        found = [each for each in listed if each["number"] >= given["first"]][:3]
        more = bool(found) and found[-1]["number"] < listed[-1]["number"]
        return {"standings": found, "opened_at_ms": 10_000_000, "next": found[-1]["number"] + 1 if more else None}

    def queue(self, do: str, given: dict[str, Any]) -> dict[str, Any]:
        assert (do, given["destination"]) == ("queue.list", "stripe")
        at = given["after"] or 0
        items = [{"transaction": str(each)} for each in self.waiting[at : at + 1]]
        return {"items": items, "more": at + 1 if at + 1 < len(self.waiting) else None}


@dataclass
class Records:
    """Implements `Register`."""

    held: list[Recorded]
    asked: list[int | None] = field(default_factory=list)

    def recorded(self, *, created_after_ms: int | None) -> Iterator[Recorded]:
        self.asked.append(created_after_ms)
        yield from self.held

    def close(self) -> None:
        pass


def standing(number: int, state: str = "approved", **changed: Any) -> dict[str, Any]:
    return {
        "number": number, "id": str(UUID(int=number)), "of": None, "amount_minor": 1_000, "currency": "EUR",
        "state": state, "sent": True, "answered": True,
    } | changed  # fmt: skip


def recorded(number: int, **changed: int) -> Recorded:
    amounts = {"guaranteed_minor": 0, "failed_minor": 0, "canceled_minor": 0, "refunded_minor": 0} | changed
    return Recorded(f"pr_{number}", UUID(int=number), "EUR", 1_000, **amounts)


def differences(till: Till, *held: Recorded) -> list[tuple[int, str]]:
    found = compare(till.ask, till.queue, Records(list(held)), 1, 1_000)
    return [(each["sequence"], each["meaning"]) for each in found["differences"]]


AGREE = [
    ("approved", {"guaranteed_minor": 1_000}),
    ("settled", {"guaranteed_minor": 1_000}),
    ("refused", {"failed_minor": 1_000}),
    ("declined", {"failed_minor": 1_000}),
    ("reversed", {"canceled_minor": 1_000}),
    ("reversed", {"guaranteed_minor": 1_000, "refunded_minor": 1_000}),
    ("accepted", {}),
    ("reversing", {"guaranteed_minor": 1_000}),
]


@pytest.mark.parametrize(("state", "amounts"), AGREE)
def test_what_fits_is_no_difference(state: str, amounts: dict[str, int]) -> None:
    assert differences(Till([standing(1, state)]), recorded(1, **amounts)) == []


@pytest.mark.parametrize(
    ("state", "amounts", "words"),
    [
        ("approved", {}, "not guaranteed"),
        ("approved", {"failed_minor": 1_000}, "not guaranteed"),
        ("settled", {"canceled_minor": 1_000}, "not guaranteed"),
        ("settled", {"guaranteed_minor": 1_000, "refunded_minor": 300}, "paid back differs"),
        ("refused", {"guaranteed_minor": 1_000}, "not failed"),
        ("declined", {}, "not failed"),
        ("reversed", {"guaranteed_minor": 1_000}, "neither canceled nor refunded"),
    ],
)
def test_what_does_not_fit_is_named(state: str, amounts: dict[str, int], words: str) -> None:
    ((number, meaning),) = differences(Till([standing(1, state)]), recorded(1, **amounts))
    assert number == 1 and words in meaning


def test_another_amount_and_no_record_are_named() -> None:
    other = replace(recorded(1, guaranteed_minor=999), requested_minor=999)
    found = differences(Till([standing(1), standing(2)]), other)
    assert [number for number, _ in found] == [1, 2]
    assert "another amount" in found[0][1] and "no record" in found[1][1]


def test_refunds_of_a_sale_are_summed_whenever_they_came() -> None:
    paid = [standing(number, of=str(UUID(int=1)), amount_minor=200) for number in (5, 1_001)]
    declined = standing(6, "declined", of=str(UUID(int=1)), amount_minor=100)
    till = Till([standing(1), paid[0], declined, paid[1]])
    assert differences(till, recorded(1, guaranteed_minor=600, refunded_minor=400)) == []
    assert differences(till, recorded(1, guaranteed_minor=1_000, refunded_minor=400)) == []
    assert len(differences(till, recorded(1, guaranteed_minor=800, refunded_minor=200))) == 1


def test_what_is_on_its_way_or_was_never_sent_is_no_difference() -> None:
    till = Till(
        [standing(1), standing(2), standing(3, answered=False), standing(4, "declined", sent=False, answered=False)],
        waiting=[UUID(int=1), UUID(int=2)],
    )
    found = compare(till.ask, till.queue, Records([]), 1, 9)
    assert (found["differences"], found["under_way"], found["compared"]) == ([], 2, 0)


def test_what_becomes_of_it_meanwhile_is_no_difference() -> None:
    till = Till([standing(1)], later=[standing(1, "reversed")])
    assert differences(till, recorded(1, canceled_minor=1_000)) == []


def test_records_of_others_are_passed_over() -> None:
    assert differences(Till([standing(1)]), recorded(77), recorded(1, guaranteed_minor=1_000)) == []


def test_it_asks_from_the_first_sale_on_with_room_for_a_wrong_clock() -> None:
    till, held = Till([standing(1)]), Records([recorded(1, guaranteed_minor=1_000)])
    compare(till.ask, till.queue, held, 1, 9)
    assert held.asked == [10_000_000 - 3_600_000]


# ---- with Stripe's library and the double


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with stripe_shop(tmp_path) as shop:
        yield shop


def listed(shop: Shop, after_ms: int | None = None) -> list[Recorded]:
    with shop.destination() as destination:
        assert isinstance(destination, StripeDestination)
        return list(destination.recorded(created_after_ms=after_ms))


def test_every_record_is_listed_with_its_amounts(shop: Shop) -> None:
    known = record(shop)
    sent(shop, notice(event=Event.GUARANTEED), earlier=known)
    sent(shop, refund(7, amount=400), earlier=known)
    for number in range(2, 253):
        sent(shop, notice(number))
    found = {each.sale: each for each in listed(shop)}
    assert len(found) == 252
    first = found[UUID(int=1)]
    assert (first.record, first.currency, first.requested_minor) == (known, "EUR", 1_001)
    assert (first.guaranteed_minor, first.refunded_minor, first.failed_minor, first.canceled_minor) == (
        1_001,
        400,
        0,
        0,
    )
    assert listed(shop, shop.clock.wall_ms() + 7_200_000) == []


@pytest.mark.parametrize("fault", [Fail(status=500), Fail(status=429), Garbage(body="{}"), Garbage(body="no JSON")])
def test_a_list_that_does_not_come_is_said(shop: Shop, fault: Any) -> None:
    sent(shop)
    shop.double.faults.arm(fault)
    with pytest.raises(NotListed) as error:
        listed(shop)
    assert "Stripe" in str(error.value)


def test_the_report_has_both_books_and_says_why_one_is_missing(tmp_path: Path) -> None:
    ours, books = day([(State.APPROVED, True, True, "booked")] * 3)

    class Nothing(Records):
        def recorded(self, *, created_after_ms: int | None) -> Iterator[Recorded]:
            raise NotListed("Stripe is busy: ask again later")

    def report(register: Records) -> dict[str, Any]:
        assert isinstance(books, Books)
        queue = Till().queue
        calls = {"queue.list": Call(List, lambda _: queue("queue.list", {"destination": "stripe", "after": None}))}
        made = Reconciler(
            lambda: terminal_of(Shelf(ours)), lambda: books, calls, tmp_path, FakeClock(), stripe=lambda: register
        )
        return made.run(Run())

    assert report(Nothing([]))["stripe"] == {"error": "Stripe is busy: ask again later"}
    at_stripe = report(Records([]))["stripe"]
    assert [each["sequence"] for each in at_stripe["differences"]] == [1, 2, 3]

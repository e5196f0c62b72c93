"""Stripe through the real spool: told of each sale once, in order, of nothing too early, and never in the host's way.

The last tests are named for what users of other terminals were hurt by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar
from uuid import UUID

import pytest
from stripe_rig import HOUR_MS, Shop, envelope, stripe_shop
from sync_rig import FakeHost, FakeTerminal, Mood, Rig, seeded

from hwsim.stripe_double import Fail, State
from terminal.sync import spool as spool_module
from terminal.sync import step as step_module
from terminal.sync.destinations.stripe import StripeDestination
from terminal.sync.notices import StripeFollower
from terminal.sync.spool import OutboxItem, Row, Spool
from terminal.sync.spool import State as RowState
from terminal.sync.step import Delivered


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "FILLER_BYTES", 65_536)
    monkeypatch.setattr(step_module, "IDLE_MS", 60_000)


class Ledger(FakeTerminal):
    """Says of each sale what state the host's answer has brought it to."""

    states: ClassVar[dict[str, str]] = {}

    def judge(self, key: str, answer: str) -> Delivered:
        word = super().judge(key, answer)
        return Delivered(key, state=self.states.get(key, word.state or ""), error=word.error, believed=word.believed)


@dataclass
class World:
    shop: Shop
    host: FakeHost
    terminal: Ledger
    stripe: StripeDestination
    root: Path
    rig: Rig = field(init=False)

    def __post_init__(self) -> None:
        self.rig = Rig(
            self.root,
            self.terminal,
            [self.host, self.stripe],
            self.shop.clock,
            seeded(7),
            open_spool=partial(Spool, followers=[StripeFollower()]),
            takes_envelopes=["host"],
        )

    def sell(
        self, number: int, event: str = "authorisation", *, state: str = "approved", deferred: bool = False
    ) -> str:
        transaction = UUID(int=number)
        key = f"{transaction}/{event}"
        extra = {"reason": "void"} if event == "reversal" else {"deferred": deferred}
        self.terminal.states[key] = state
        self.terminal.sell(OutboxItem(key, transaction, event, number, False, envelope(number, event, **extra)))
        return key

    def pass_ms(self, duration_ms: int = 60_000) -> None:
        self.rig.settle(within_ms=duration_ms)

    def calls(self) -> list[str]:
        return [each.path.rpartition("/")[2] for each in self.shop.double.requests() if each.method == "POST"]

    def row(self, number: int, word: str = "notice.reported") -> Row:
        row = self.rig.spool.row(f"{UUID(int=number)}/{word}/stripe")
        assert row is not None
        return row


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    (tmp_path / "spool").mkdir()
    Ledger.states.clear()
    with stripe_shop(tmp_path / "stripe") as shop, shop.destination() as destination:
        world = World(shop, FakeHost(), Ledger(), destination, tmp_path / "spool")
        yield world
        shop.check()
        world.rig.close()


def test_an_approved_sale_is_reported_and_then_guaranteed(world: World) -> None:
    world.sell(1)
    world.pass_ms()
    assert world.calls() == ["report_payment", "report_payment_attempt_guaranteed"]
    [booking] = world.shop.double.bookings()
    assert booking.state is State.GUARANTEED
    assert world.rig.spool.rows() == ()


def test_an_inserted_card_that_refuses_what_the_host_approved(world: World) -> None:
    world.sell(1, state="completing")
    world.pass_ms()
    world.sell(1, "reversal", state="reversed")
    world.pass_ms()
    assert world.calls() == ["report_payment", "report_payment_attempt_guaranteed", "report_refund"]


def test_nothing_is_guaranteed_before_the_host_has_answered(world: World) -> None:
    world.host.mood = Mood.DOWN
    world.sell(1, state="settled", deferred=True)
    world.pass_ms()
    assert world.calls() == ["report_payment"]
    world.host.mood = Mood.WELL
    world.pass_ms(5 * 60_000)
    assert world.calls() == ["report_payment", "report_payment_attempt_guaranteed"]


def test_nothing_is_guaranteed_that_the_terminal_does_not_believe(world: World) -> None:
    world.terminal.rejects = True
    world.sell(1)
    world.pass_ms()
    assert world.calls() == ["report_payment"]


def test_a_void_before_and_after_the_guarantee(world: World) -> None:
    world.sell(1)
    world.pass_ms()
    world.sell(1, "reversal", state="reversed")
    world.pass_ms()
    assert world.calls()[2:] == ["report_refund"]
    world.host.moods[world.sell(2)] = Mood.DOWN
    world.pass_ms(1_000)
    world.sell(2, "reversal", state="reversed")
    world.pass_ms(1_000)
    assert world.calls()[3:] == ["report_payment", "report_payment_attempt_canceled"]


def test_what_follows_waits_for_the_report(world: World) -> None:
    world.shop.double.faults.arm(Fail(status=503), times=2)
    world.sell(1)
    world.pass_ms(5 * 60_000)
    assert world.calls()[-2:] == ["report_payment", "report_payment_attempt_guaranteed"]
    assert world.calls().count("report_payment") == 3


def test_a_dead_stripe_keeps_no_sale_from_the_host_and_no_customer_offline(world: World) -> None:
    world.shop.server.stop()
    for number in range(1, 6):
        world.sell(number)
    world.pass_ms(10 * 60_000)
    assert len(world.terminal.answers) == 5
    report = world.rig.sync.report()
    assert (report.online, report.error) == (True, None)
    assert report.queued == 10  # it waits, seen and counted
    [host, stripe] = world.rig.sync.destinations()
    assert (host.queued, stripe.queued, stripe.online) == (0, 10, False)
    world.shop.server.start()
    world.pass_ms(30 * 60_000)
    assert len(world.shop.double.bookings()) == 5


def test_a_kill_between_any_two_steps_tells_stripe_once(world: World) -> None:
    for number in range(1, 6):
        world.sell(number)
        for _ in range(number):
            world.rig.sync.step()
        world.rig.crash()
    world.pass_ms(10 * 60_000)
    assert [booking.state for booking in world.shop.double.bookings()] == [State.GUARANTEED] * 5


# What users of other terminals were hurt by


def test_a_decline_after_forwarding_is_reported(world: World) -> None:
    world.sell(1, state="refused", deferred=True)
    world.pass_ms()
    assert world.calls() == ["report_payment", "report_payment_attempt_failed"]


def test_ambiguous_for_too_long_is_looked_up_and_not_sent_again(world: World) -> None:
    world.shop.double.faults.arm(Fail(status=500), times=1)
    world.sell(1)
    world.rig.settle(until=lambda: bool(world.calls()))
    world.shop.server.stop()
    world.pass_ms(1_000)
    world.shop.clock.advance(23 * HOUR_MS + 60_000)
    world.shop.server.start()
    before = world.calls().count("report_payment")
    world.pass_ms(HOUR_MS)
    assert world.calls().count("report_payment") == before
    assert world.row(1).state in {RowState.DELIVERED, RowState.HELD}


def test_retrying_by_hand_what_was_held_uses_the_old_key(world: World) -> None:
    world.host.moods[world.sell(1)] = Mood.CONDEMNS
    world.pass_ms()
    key = f"{UUID(int=1)}/authorisation/host"
    held = world.rig.spool.row(key)
    assert held is not None
    assert held.state is RowState.REFUSED
    before = world.rig.spool.parcel(held)
    world.host.moods.clear()
    world.rig.spool.retry(key, "the operator has mended it")
    world.pass_ms()
    assert world.rig.spool.row(key) is not None
    assert world.host.books.attempts[-1][1] == before.idempotency_key
    assert world.calls()[-1] == "report_payment_attempt_guaranteed"

"""The model's histories, played on the real ledger and the real spool, which after every step must stand as it does.

Host, Stripe, network and customer stay the model's: what they answer is signed by the rig's host. The sync service's
steps are taken by hand, since `Sync` takes several in one; `tests/test_sync_machine.py` has that one whole.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final
from uuid import UUID

import pytest
from ledger_rig import SUMMARY, Host
from ledger_rig import Rig as LedgerRig
from sync_rig import SPOOL_KEY, FakeClock, seeded

from model.steps import SAID, Scenario, Step, Steps
from model.world import ANSWERED, HANDED, NONE, SOLD, WAITING, Item, Sale, World
from model.world import Row as ModelRow
from terminal.ledger.errors import AnswerRejected
from terminal.ledger.ledger import Ledger
from terminal.ledger.recovery import resolve
from terminal.ledger.values import Decision, Event, ReversalReason
from terminal.sync.notices import StripeFollower
from terminal.sync.spool import On, OutboxItem, Row, Spool, State

LIMIT: Final = 100  # rows: no history here has more
_CHIP: Final = replace(SUMMARY, contact=True)
_OUTCOMES: Final = {
    "authorising": Decision.ONLINE,
    "accepted": Decision.ACCEPTED,
    "declined": Decision.DECLINED,
    "void": Decision.VOID,
}


class Real:
    """A real ledger and a real spool that follow the model step by step."""

    def __init__(self, directory: Path, scenario: Scenario) -> None:
        self._directory = directory
        self._scenario = scenario
        self._rig = LedgerRig(directory / "ledger-0")
        self._starts = 0
        self._ledger: Ledger | None = self._rig.open()
        self._clock = FakeClock()
        self._entropy = seeded(7)
        self._followers = (StripeFollower(),) if scenario.stripe else ()
        self._spool = self._open_spool()
        self._ids: dict[int, UUID] = {}
        self._parcels: dict[str, tuple[str, str]] = {}

    def close(self) -> None:
        self._rig.close_all()
        self._spool.close()

    def follow(self, before: World, step: Step) -> None:
        """Do what the step says, and compare."""
        after = step.world
        self._clock.advance(1)
        if before.up and not after.up:
            self._power_fails()
        elif after.up and not before.up:
            self._ledger = self._rig.open(directory=self._rig.directory)
            resolve(self._ledger, self._rig.envelopes)
        if step.story.startswith("sync: crashes"):
            self._spool.close()
            self._spool = self._open_spool()
        for i, (old, new) in enumerate(zip(before.sales, after.sales, strict=True)):
            if before.up and after.up:
                self._terminal(i, old, new)
            for j, item in enumerate(new.items):
                was = old.items[j] if j < len(old.items) else None
                self._row(i, was, item, step)
        self._compare(after)

    # ---- doing

    def _terminal(self, i: int, old: Sale, new: Sale) -> None:
        ledger = self._up()
        for was, item in zip(old.items, new.items, strict=False):
            if (
                was.row is not None
                and item.row is not None
                and item.row.attempt.startswith(SAID)
                and not was.row.attempt
            ):
                self._answer(i, item.event, was.row.answer)
                return  # that is what has changed the sale
        match old.ledger, new.ledger:
            case before, after if before == after:
                pass
            case "", "opened":
                self._ids[i] = self._rig.begin(ledger).id
            case "opened", after:
                self._outcome(i, new, _OUTCOMES[after])
            case "authorising", "accepted":
                ledger.commit_outcome(self._ids[i], decision=Decision.ACCEPTED, reason="no_answer")
            case "completing", "approved":
                ledger.commit_outcome(self._ids[i], decision=Decision.COMPLETED, reason="online")
            case before, "reversing":
                reasons = {"authorising": ReversalReason.TIMEOUT, "completing": ReversalReason.CARD}
                reason = reasons.get(before, ReversalReason.VOID)
                sale = ledger.transaction(self._ids[i])
                ledger.commit_reversal(sale.id, reason, self._rig.reversal(sale, reason))
            case before, after:
                raise AssertionError(f"{before} to {after}: no commit leads there")
        if new.shown and not old.shown:
            ledger.mark_shown(self._ids[i], new.told)

    def _outcome(self, i: int, sale: Sale, decision: Decision) -> None:
        ledger = self._up()
        transaction = ledger.transaction(self._ids[i])
        sends = decision in (Decision.ONLINE, Decision.ACCEPTED)
        envelope = self._rig.authorisation(transaction, deferred=decision is Decision.ACCEPTED) if sends else None
        card = None if decision is Decision.VOID else _CHIP if sale.kind == "chip" else SUMMARY
        ledger.commit_outcome(transaction.id, decision=decision, reason="test", card=card, envelope=envelope)

    def _answer(self, i: int, event: str, decision: str) -> None:
        ledger = self._up()
        body = self._spool.parcel(self._real_row(i, event, "host")).body
        self._rig.deliver(ledger, self._ids[i], Event(event), self._rig.host.answer(body, decision))

    def _disbelieved(self, i: int, event: str) -> None:
        body = self._spool.parcel(self._real_row(i, event, "host")).body
        with pytest.raises(AnswerRejected):
            self._rig.deliver(self._up(), self._ids[i], Event(event), Host(seed=2).answer(body))

    def _row(self, i: int, was: Item | None, item: Item, step: Step) -> None:
        """What has happened to one item. A notice comes by itself, in the transaction of what it follows."""
        old, new = None if was is None else was.row, item.row
        if new is None:
            return
        offered = was is not None and was.outbox == WAITING and item.outbox in (WAITING, HANDED)
        if offered and old is None:
            self._store(i, item)
        elif offered and item.outbox == HANDED:
            self._store(i, item)  # again, which changes nothing
        if old is not None and old != new:
            self._move(i, item, step, old)
        if offered and item.outbox == HANDED:
            self._up().mark_handed_over([f"{self._ids[i]}/{item.event}"])

    def _move(self, i: int, item: Item, step: Step, old: ModelRow) -> None:
        key = self._key(i, item)
        match step.on:
            case "deliver":
                self._spool.move(key, On.DELIVER, settled=old.attempt.removeprefix(SAID) or None)
            case "disbelieve":
                self._disbelieved(i, item.event)
                self._spool.move(key, On.DISBELIEVE)
            case "answer":
                self._spool.move(key, On.ANSWER, answer="an answer", receipt="pr_1")
            case "send":
                assert key in {row.id for row in self._spool.to_send(item.to, LIMIT)}, "it has to wait"
                self._spool.move(key, On.SEND)
            case on if on:
                self._spool.move(key, On(on))
            case _ if step.story.startswith(("host: crashes", "everybody:")):
                if old.state in ("sending", "ambiguous") and old.attempt:
                    self._spool.move(key, On.UNSURE)
            case _:  # what the other side does, and what a start of the spool or the terminal has done
                pass

    def _store(self, i: int, item: Item) -> None:
        key = f"{self._ids[i]}/{item.event}"
        offered = self._up().outbox_item(key)
        assert offered.envelope is not None
        stored = OutboxItem(
            key, offered.transaction, offered.event.value, offered.number, offered.urgent, offered.envelope
        )
        self._spool.store([stored], ["host"])

    def _power_fails(self) -> None:
        """The files as they are, nothing said good-bye to."""
        self._starts += 1
        copy = self._directory / f"ledger-{self._starts}"
        shutil.copytree(self._rig.directory, copy)
        self._rig.close_all()
        self._rig.directory = copy
        self._ledger = None

    def _open_spool(self) -> Spool:
        return Spool(
            self._directory / "spool", SPOOL_KEY, clock=self._clock, entropy=self._entropy, followers=self._followers
        )

    # ---- comparing

    def _compare(self, world: World) -> None:
        if world.up:
            self._compare_ledger(world)
        rows: dict[str, str] = {}
        sendable: dict[str, set[str]] = {"host": set(), "stripe": set()}
        under_way = set()
        steps = Steps(self._scenario)
        for i, sale in enumerate(world.sales):
            for j, item in enumerate(sale.items):
                if (row := item.row) is None:
                    continue
                key = self._key(i, item)
                rows[key] = row.state
                if row.state in ("queued", "ambiguous"):
                    if row.attempt:
                        under_way.add(key)
                    elif not steps.must_wait(world, i, j, item):
                        sendable[item.to].add(key)
        listed = {row.id: row.state.value for row in self._spool.rows()}
        assert listed == {key: state for key, state in rows.items() if state != "delivered"}
        for key, state in rows.items():
            found = self._spool.row(key)
            assert found is not None
            assert found.state is State(state)
            if state != "delivered":
                parcel = self._spool.parcel(found)
                fixed = parcel.idempotency_key, parcel.body
                assert self._parcels.setdefault(key, fixed) == fixed, "another key, or another body"
        for destination, expected in sendable.items():
            found_ = {row.id for row in self._spool.to_send(destination, LIMIT, without=under_way)}
            assert found_ == expected

    def _compare_ledger(self, world: World) -> None:
        ledger = self._up()
        waiting, offered, unshown = set(), set(), set()
        for i, sale in enumerate(world.sales):
            if not sale.ledger:
                continue
            assert ledger.transaction(self._ids[i]).state == sale.ledger
            if sale.ledger in SOLD and not sale.shown:
                unshown.add(self._ids[i])
            for item in sale.items:
                if item.outbox not in (NONE, ANSWERED):
                    key = f"{self._ids[i]}/{item.event}"
                    waiting.add(key)
                    if item.outbox == WAITING:
                        offered.add(key)
                elif item.outbox == ANSWERED:
                    assert ledger.outbox_item(f"{self._ids[i]}/{item.event}").answered
        assert {item.key for item in ledger.outbox(LIMIT)} == offered
        assert {sale.id for sale in ledger.unshown()} == unshown
        assert all(not ledger.outbox_item(key).answered for key in waiting)

    # ---- names

    def _up(self) -> Ledger:
        assert self._ledger is not None
        return self._ledger

    def _key(self, i: int, item: Item) -> str:
        event = f"notice.{item.event}" if item.to == "stripe" else item.event
        return f"{self._ids[i]}/{event}/{item.to}"

    def _real_row(self, i: int, event: str, to: str) -> Row:
        row = self._spool.row(f"{self._ids[i]}/{event}/{to}")
        assert row is not None
        return row

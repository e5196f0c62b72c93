"""What can happen next in a world. Each step is one durable commit of one component, or one thing that goes wrong.

Steps that the components take by themselves, or people because they are asked to (keep or void, send it again), are
*free*: they go on for as long as there are any. Everything else is taken from a budget: faults, and acts of a person
that nobody had to make. So the search sees every history with so many faults, at every moment and in every order.

`Flaw` is how the model is shown to bite: each member plants one mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NamedTuple

from model.tables import LEDGER, SPOOL
from model.world import (
    ANSWERED,
    APART,
    DURABLE,
    FETCHED,
    FORGED,
    HANDED,
    NONE,
    NOTED,
    OUT,
    SOLD,
    WAITING,
    Item,
    Row,
    Sale,
    World,
)

SAID: Final = "said "  # begins what the terminal said to an answer: the sale's state
UNSEEN: Final = "before its note"  # a power cut that also takes what was written and not flushed
COMMITS: Final = "commits "  # only of a faulty terminal: it said that it has, and has not yet
_SHOWN_AS: Final = {
    "approved": "approved",
    "settled": "approved",
    "accepted": "accepted",
    "declined": "declined",
    "refused": "declined",
    "reversing": "declined",
    "reversed": "declined",
}


class Flaw(Enum):
    """A planted mistake."""

    FRESH_KEY = "a fresh idempotency key for each attempt"
    DELIVERED_FIRST = "the terminal acknowledges an answer before it has committed it"
    REPEATED_LATE = "an ambiguous item is repeated after Stripe has forgotten its key"
    REVERSAL_FORGOTTEN = "after a time-out the sale is declined, and no reversal queued"
    RECOVERY_FORGETS = "after a power cut the sale is declined, and no reversal queued"
    NO_TOMBSTONE = "a reversal that overtakes its sale leaves no tombstone"
    LATE_ANSWER = "an answer is accepted after the time-out has already reversed the sale"
    BACK_TO_QUEUED = "an ambiguous item that was surely not taken this time is queued again"
    RESTART_FORGETS = "after a crash an item that was being sent is queued again"
    ACKNOWLEDGED_FIRST = "sync acknowledges an item before it has stored it"
    SHOWN_FIRST = "an approval is shown before it is committed"
    DECIDES_AGAIN = "the host decides a repetition anew"
    ALERT_FORGOTTEN = "nobody is told when the host declines what was accepted offline"
    OUT_OF_ORDER = "Stripe's notices are sent in any order"
    PAID_BACK_TWICE = "a sale that was refunded can be voided"
    AGE_KEPT = "what was held for its age is sent again by a person, and held for its age again"
    COMPLETION_UNHEARD = "Stripe is told nothing of an approval that an inserted card has yet to agree to"


class ImpossibleStep(Exception):
    """Something happens for which a table has no edge: the code would stop there, and go on with nothing."""


@dataclass(frozen=True)
class Scenario:
    """What a search covers."""

    sales: tuple[str, ...] = ("tap",)
    faults: int = 2
    acts: int = 0
    stripe: bool = False
    online: bool = True  # there is thought to be a way to the host, so that a sale is not accepted at once
    may_accept: bool = True  # the offline policy is `deferred`
    local_ends: bool = True  # a card may decline, and a sale be cancelled
    advice: bool = True  # what an inserted card says last goes to the host
    symmetric: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "symmetric", len(set(self.sales)) == 1 < len(self.sales))

    def start(self) -> World:
        return World(tuple(Sale(kind=kind) for kind in self.sales), faults=self.faults, acts=self.acts)


class Step(NamedTuple):
    """One step. `story` is a sentence with places for the sale and the event."""

    story: str
    sale: int
    event: str
    free: bool
    world: World
    on: str = NONE  # what happens to a row of the spool

    def __str__(self) -> str:
        return self.story.format(sale=f"sale {self.sale + 1}", event=self.event)


class Steps:
    """All steps of a scenario. `taken` notes which edges of the tables were used."""

    def __init__(self, scenario: Scenario, flaw: Flaw | None = None) -> None:
        self.scenario = scenario
        self.flaw = flaw
        self.taken: set[tuple[str, str]] = set()
        self._ledger = dict(LEDGER)
        self._spool = dict(SPOOL)
        match flaw:
            case Flaw.REVERSAL_FORGOTTEN | Flaw.RECOVERY_FORGETS:
                change = "timeout" if flaw is Flaw.REVERSAL_FORGOTTEN else "recovered"
                self._ledger["authorising", f"reversal {change}"] = "declined"
                self._ledger["declined", "answer approved"] = self._ledger["declined", "answer declined"] = "declined"
            case Flaw.LATE_ANSWER:
                self._ledger["reversing", "answer approved"] = "approved"
            case Flaw.BACK_TO_QUEUED:
                self._spool["ambiguous", "not taken"] = "queued"
            case Flaw.RESTART_FORGETS:
                self._spool["sending", "restart"] = "queued"
            case Flaw.DELIVERED_FIRST:
                self._spool["delivered", "offered again"] = "ambiguous"
            case _:
                pass

    def after(self, world: World) -> list[Step]:
        steps = list(self._terminal(world)) if world.up else [self._recovers(world)]
        for i, sale in enumerate(world.sales):
            for j, item in enumerate(sale.items):
                if item.outbox == WAITING and world.up:
                    steps += self._handing_over(world, i, j, item)
                if item.row is not None:
                    steps += self._row(world, i, j, item, item.row)
        if world.faults:
            steps += self._disasters(world._replace(faults=world.faults - 1))
        if self.scenario.symmetric:
            steps = [step._replace(world=canonical(step.world)) for step in steps]
        return steps

    # ---- the terminal and its people

    def _terminal(self, world: World) -> Iterator[Step]:
        unshown = [sale.ledger in SOLD and not sale.at_till and not sale.shown for sale in world.sales]
        busy = any(unshown) or any(sale.at_till for sale in world.sales)
        for i, sale in enumerate(world.sales):
            if sale.ledger == NONE:
                if not busy and (sale.kind != "refund" or world.sales[i - 1].ledger in SOLD):
                    opened = sale._replace(ledger="opened", at_till=True)
                    yield Step("terminal: opens {sale}", i, "", True, _put(world, i, opened))
            elif sale.at_till:
                yield from self._serves(world, i, sale)
            elif unshown[i]:
                kept = sale._replace(told=_SHOWN_AS[sale.ledger], shown=NOTED)
                yield Step("person: keeps {sale}, which may not have been shown", i, "", True, _put(world, i, kept))
                story = "person: voids {sale}, which may not have been shown; a reversal is queued"
                yield Step(story, i, "", True, self._voided(world, i, sale))
            elif world.acts and sale.ledger in SOLD and sale.kind != "refund" and not self._is_refunded(world, i):
                fewer = world._replace(acts=world.acts - 1)
                yield Step("person: voids {sale}; a reversal is queued", i, "", False, self._voided(fewer, i, sale))

    def _is_refunded(self, world: World, i: int) -> bool:
        """Or is about to be: the terminal takes back a sale, or pays it back, and never both."""
        refund = world.sales[i + 1] if i + 1 < len(world.sales) else Sale()
        if refund.kind != "refund" or self.flaw is Flaw.PAID_BACK_TWICE:
            return False
        return refund.ledger not in (NONE, "declined", "void", "reversed")

    def _serves(self, world: World, i: int, sale: Sale) -> Iterator[Step]:
        if sale.ledger == "opened":
            world = world._replace(sales=tuple(map(_flushed, world.sales)))

        def to(story: str, after: Sale) -> Step:
            return Step(story, i, "", True, _put(world, i, after))

        accepts = self.scenario.may_accept and sale.kind != "refund"
        match sale.ledger:
            case "opened":
                event = "refund" if sale.kind == "refund" else "authorisation"
                ask = self._changed(sale, "outcome online", Item(event, outbox=WAITING))
                if self.scenario.online or sale.kind == "refund":
                    yield to("terminal: commits {sale} and its request to the host", ask)
                if accepts:
                    accept = self._changed(sale, "outcome accepted", Item(event, outbox=WAITING))
                    yield to("terminal: accepts {sale} offline and commits it", accept)
                if self.scenario.local_ends:
                    yield to("card: declines {sale}, which is committed", self._changed(sale, "outcome declined"))
                    void = self._changed(sale, "outcome void")._replace(at_till=False)
                    yield to("customer: cancels {sale}", void)
            case "authorising":
                reversal = Item("reversal", outbox=WAITING)
                if self.flaw is Flaw.REVERSAL_FORGOTTEN:
                    yield to(
                        "terminal: time-out of {sale}, committed as declined", self._changed(sale, "reversal timeout")
                    )
                else:
                    undo = self._changed(sale, "reversal timeout", reversal)
                    yield to("terminal: time-out of {sale}, committed; a reversal is queued", undo)
                if accepts:
                    accept = self._changed(sale, "outcome accepted")
                    yield to("terminal: time-out of {sale}, accepted offline all the same and committed", accept)
                asked = sale.items[0].row
                if self.flaw is Flaw.SHOWN_FIRST and asked is not None and asked.answer == "approved" and not sale.told:
                    yield to("terminal: shows {sale} as approved", sale._replace(told="approved"))
            case "completing":
                advice = (Item("advice", outbox=WAITING),) if self.scenario.advice else ()
                done = self._changed(sale, "outcome completed", *advice)
                yield to("card: agrees to {sale}, which is committed", done)
                undo = self._changed(sale, "reversal card", Item("reversal", outbox=WAITING))
                yield to("card: refuses {sale} or is pulled; a reversal is queued", undo)
            case state:
                shown = _SHOWN_AS[state]
                yield to(f"terminal: shows {{sale}} as {shown}", sale._replace(told=shown, shown=NOTED, at_till=False))

    def _recovers(self, world: World) -> Step:
        sales = []
        for sale in world.sales:
            match sale.ledger:
                case "opened":
                    sales.append(self._changed(sale, "outcome void"))
                case "authorising" | "completing":
                    reversal = () if self.flaw is Flaw.RECOVERY_FORGETS else (Item("reversal", outbox=WAITING),)
                    sales.append(self._changed(sale, "reversal recovered", *reversal))
                case _:
                    sales.append(sale)
        return Step("terminal: starts, and ends what was cut off", 0, "", True, World(tuple(sales), True, *world[2:]))

    def _voided(self, world: World, i: int, sale: Sale) -> World:
        voided = self._changed(sale, "reversal void", Item("reversal", outbox=WAITING))
        return _put(world, i, voided._replace(told="declined"))

    def _changed(self, sale: Sale, change: str, *items: Item) -> Sale:
        """One commit of the ledger."""
        if (sale.ledger, change) not in self._ledger:
            raise ImpossibleStep(f"the ledger cannot take {change} while {sale.ledger}")
        self.taken.add((sale.ledger, change))
        return sale._replace(ledger=self._ledger[sale.ledger, change], items=sale.items + items)

    def _commits(self, sale: Sale, event: str, answer: str) -> Sale:
        """The terminal commits an answer that it believes; one that it has already changes nothing."""
        item = sale.item(event)
        assert item is not None
        if item.outbox == ANSWERED:
            return sale
        if event != "advice":  # of which the host has only taken note
            waits = sale.kind == "chip" and sale.ledger == "authorising" and answer == "approved"
            sale = self._changed(sale, f"answer {answer}{' while the card waits' if waits else ''}")
        if sale.ledger == "refused" and self.flaw is not Flaw.ALERT_FORGOTTEN:
            sale = sale._replace(alert=True)
        ended = [one.outbox and (event in (one.event, "reversal")) for one in sale.items]
        items = (one._replace(outbox=ANSWERED) if end else one for one, end in zip(sale.items, ended, strict=True))
        return sale._replace(items=tuple(items))

    # ---- sync

    def _handing_over(self, world: World, i: int, j: int, item: Item) -> Iterator[Step]:
        row = item.row
        if row is None and self.flaw is Flaw.ACKNOWLEDGED_FIRST:
            world = _set(world, i, j, item._replace(outbox=HANDED, row=Row(FETCHED)))
            yield Step("sync: fetches and acknowledges {event} of {sale}", i, item.event, True, world)
        elif row is None:
            yield Step("sync: stores {event} of {sale}", i, item.event, True, self._stores(world, i, j, HANDED))
            if world.faults:
                lost = self._stores(world._replace(faults=world.faults - 1), i, j, WAITING)
                story = "sync: stores {event} of {sale}; the acknowledgement is lost"
                yield Step(story, i, item.event, False, lost)
        else:
            if (row.state, "offered again") in self._spool:
                row = row._replace(state=self._spool[row.state, "offered again"])
            world = _set(world, i, j, item._replace(outbox=HANDED, row=row))
            yield Step("sync: is offered {event} of {sale} again and acknowledges it", i, item.event, True, world)

    def _stores(self, world: World, i: int, j: int, outbox: str) -> World:
        item = world.sales[i].items[j]
        world = _set(world, i, j, item._replace(outbox=outbox, row=Row()))
        if self.scenario.stripe and item.event == "authorisation":
            sale = world.sales[i]
            world = _put(world, i, sale._replace(items=(*sale.items, Item("reported", "stripe", row=Row()))))
        return world

    def _row(self, world: World, i: int, j: int, item: Item, row: Row) -> Iterator[Step]:
        if row.state == FETCHED:
            yield Step("sync: stores {event} of {sale}", i, item.event, True, self._stores(world, i, j, HANDED))
            return
        if row.stray:
            yield from self._arrives(world, i, j, row._replace(stray=False), stray=True)
        if row.attempt == OUT:
            yield from self._arrives(world, i, j, row, stray=False)
        match row.state:
            case "sending" | "ambiguous" if row.attempt:
                yield from self._ends(world, i, j, item, row)
            case "queued" | "ambiguous":
                yield from self._begins(world, i, j, item, row)
            case "answered" if item.to == "host":
                yield from self._delivers(world, i, j, item, row)
            case "answered":
                yield self._move("sync: is content with Stripe's answer to {event} of {sale}", world, i, j, "deliver")
            case "refused" | "held" if not row.old or self.flaw is Flaw.AGE_KEPT:
                yield self._move("person: has {event} of {sale} sent again", world, i, j, "retry")
            case _:
                if row.attempt.startswith(COMMITS) and world.up:
                    answer = row.attempt.removeprefix(COMMITS)
                    world = _set(world, i, j, item._replace(row=row._replace(attempt=NONE)))
                    world = _put(world, i, self._commits(world.sales[i], item.event, answer))
                    yield Step("terminal: commits the answer to {event} of {sale}", i, item.event, True, world)

    def _begins(self, world: World, i: int, j: int, item: Item, row: Row) -> Iterator[Step]:
        if row.state == "ambiguous" and row.old and item.to == "stripe" and self.flaw is not Flaw.REPEATED_LATE:
            there = world.sales[i].stripe
            if there.state == item.event or (there.made and item.event == "reported"):
                yield self._move("sync: finds {event} of {sale} at Stripe", world, i, j, "answer", answer="done")
            yield self._move("sync: does not find {event} of {sale} at Stripe and holds it", world, i, j, "hold")
        elif not self.must_wait(world, i, j, item):
            key = row.key + (self.flaw is Flaw.FRESH_KEY and row.state == "ambiguous")
            yield self._move("sync: sends {event} of {sale}", world, i, j, "send", key=key, attempt=OUT)
        if world.acts:
            fewer = world._replace(acts=world.acts - 1)
            yield self._move("person: holds {event} of {sale} back", fewer, i, j, "hold", free=False)

    def must_wait(self, world: World, i: int, j: int, item: Item) -> bool:
        """Whether something is to be through first: a refund's sale, Stripe's notices one after the other.

        Through is what is delivered: an answer alone may not be believed.
        """
        if item.to == "stripe":
            before = world.sales[i].items[:j] if self.flaw is not Flaw.OUT_OF_ORDER else ()
        else:
            before = world.sales[i - 1].items if item.event == "refund" else ()
        return any(one.row is not None and one.row.state != "delivered" for one in before if one.to == item.to)

    def _ends(self, world: World, i: int, j: int, item: Item, row: Row) -> Iterator[Step]:
        """How an attempt may end."""
        if row.attempt != OUT:
            story = f"sync: stores the answer to {{event}} of {{sale}}: {row.attempt}"
            yield self._move(story, world, i, j, "answer", answer=row.attempt, attempt=NONE)
        if not world.faults:
            return
        world = world._replace(faults=world.faults - 1)
        if row.attempt == OUT:
            story = "network: loses {event} of {sale}, and sync gives up waiting"
            yield self._move(story, world, i, j, "unsure", free=False, attempt=NONE)
            if not row.stray:
                story = "network: is slow with {event} of {sale}, and sync gives up waiting"
                yield self._move(story, world, i, j, "unsure", free=False, attempt=NONE, stray=True)
            who = "Stripe" if item.to == "stripe" else "host"
            story = f"{who}: is busy or cannot be reached, {{event}} of {{sale}} surely was not taken"
            yield self._move(story, world, i, j, "not taken", free=False, attempt=NONE)
            story = f"{who}: refuses {{event}} of {{sale}} for good"
            yield self._move(story, world, i, j, "refuse", free=False, attempt=NONE)
        else:
            story = "network: loses the answer to {event} of {sale}"
            yield self._move(story, world, i, j, "unsure", free=False, attempt=NONE)
            if item.to == "host":
                story = "network: somebody else answers {event} of {sale}, and sync stores that"
                yield self._move(story, world, i, j, "answer", free=False, answer=FORGED, attempt=NONE)

    def _delivers(self, world: World, i: int, j: int, item: Item, row: Row) -> Iterator[Step]:
        """Terminal and spool commit one after the other; between the two only the sync service's memory knows."""
        self.taken.add(("answered", "undelivered"))  # a terminal that cannot take it now: nothing has changed
        if row.attempt.startswith(SAID):
            after = self._spooled(world, i, j, "deliver", attempt=NONE, answer=NONE)
            told = self._notices(after.sales[i], item.event, row.attempt.removeprefix(SAID))
            story = "sync: notes {event} of {sale} as delivered"
            yield Step(story, i, item.event, True, _put(after, i, told), "deliver")
        elif not world.up:
            return
        elif row.answer == FORGED:
            yield self._move("terminal: does not believe the answer to {event} of {sale}", world, i, j, "disbelieve")
        elif self.flaw is Flaw.DELIVERED_FIRST:
            story = "terminal: acknowledges the answer to {event} of {sale}, and sync notes that"
            yield self._move(story, world, i, j, "deliver", answer=NONE, attempt=COMMITS + row.answer)
        else:
            sale = self._commits(world.sales[i], item.event, row.answer)
            said = sale.items[j]._replace(row=row._replace(attempt=SAID + sale.ledger))
            story = f"terminal: commits the answer to {{event}} of {{sale}}: {row.answer}; it is {sale.ledger}"
            yield Step(story, i, item.event, True, _set(_put(world, i, sale), i, j, said))

    def _notices(self, sale: Sale, event: str, state: str) -> Sale:
        """What Stripe is told of an answer that the terminal has committed, in the commit that notes the delivery."""
        known = {item.event for item in sale.items if item.to == "stripe"}
        if event in ("refund", "advice") or "reported" not in known or known & {"failed", "canceled", "refunded"}:
            return sale
        match state:
            case "completing" if self.flaw is Flaw.COMPLETION_UNHEARD:
                return sale
            case "approved" | "settled" | "completing":  # the host's last word, if not the card's
                notice = "guaranteed"
            case "declined" | "refused":
                notice = "failed"
            case "reversed":
                notice = "refunded" if "guaranteed" in known else "canceled"
            case _:
                return sale
        if notice in known:
            return sale
        return sale._replace(items=(*sale.items, Item(notice, "stripe", row=Row())))

    def _move(self, story: str, world: World, i: int, j: int, on: str, *, free: bool = True, **changes: Any) -> Step:
        return Step(story, i, world.sales[i].items[j].event, free, self._spooled(world, i, j, on, **changes), on)

    def _spooled(self, world: World, i: int, j: int, on: str, **changes: Any) -> World:
        """One commit of the spool."""
        item = world.sales[i].items[j]
        row = item.row
        assert row is not None
        if (row.state, on) not in self._spool:
            raise ImpossibleStep(f"the spool cannot take {on} while {row.state}")
        self.taken.add((row.state, on))
        if on == "disbelieve":
            changes["answer"] = NONE
        after = row._replace(state=self._spool[row.state, on], **changes)
        return _set(world, i, j, item._replace(row=after))

    # ---- the other side

    def _arrives(self, world: World, i: int, j: int, row: Row, *, stray: bool) -> Iterator[Step]:
        """The host, or Stripe, takes in a request, in one commit; whoever waits for the answer is about to get it."""
        item = world.sales[i].items[j]
        who = "Stripe" if item.to == "stripe" else "host"
        late = ", late" if stray else ""
        for sale, answer in (
            self._reports(world, i, item, row) if item.to == "stripe" else self._decides(world, i, item, row)
        ):
            story = f"{who}: takes in {{event}} of {{sale}}{late}: {answer}"
            after = _put(world, i, sale)
            answered = row if stray else row._replace(attempt=answer)
            yield Step(story, i, item.event, True, _set(after, i, j, item._replace(row=answered)))
            if world.faults and not stray and not row.stray:
                story = f"{who}: takes in {{event}} of {{sale}}: {answer}; the network has made a copy of it"
                copied = answered._replace(stray=True)
                world_ = after._replace(faults=world.faults - 1)
                yield Step(story, i, item.event, False, _set(world_, i, j, item._replace(row=copied)))

    def _decides(self, world: World, i: int, item: Item, row: Row) -> Iterator[tuple[Sale, str]]:
        """A harsher host than the documented one: it knows a repetition by its key, not by transaction and event."""
        sale = world.sales[i]
        book = sale.host
        before = [answer for event, key, answer in book.answers if (event, key) == (item.event, row.key)]
        if before and not (self.flaw is Flaw.DECIDES_AGAIN and item.event == "authorisation"):
            yield sale, before[0]
            return
        decisions = {
            "reversal": ["reversed"],
            "advice": ["noted"],
            "refund": ["approved", "declined"],
            "authorisation": ["approved", "declined"],
        }[item.event]
        overtaken = book.state == "tombstone" and item.event != "reversal"
        if overtaken or (item.event == "refund" and world.sales[i - 1].host.state != "booked"):
            decisions = ["declined"]
        for decision in decisions:
            state, bookings = book.state, book.bookings
            match decision:
                case "approved":
                    state, bookings = "booked", bookings + 1
                case "declined" if state == NONE:
                    state = "declined"
                case "reversed" if state == "booked":
                    state = "reversed"
                case "reversed" if state == NONE and self.flaw is not Flaw.NO_TOMBSTONE:
                    state = "tombstone"
                case _:
                    pass
            others = tuple(one for one in book.answers if one[:2] != (item.event, row.key))
            answers = tuple(sorted((*others, (item.event, row.key, decision))))
            yield sale._replace(host=book._replace(state=state, bookings=bookings, answers=answers)), decision

    def _reports(self, world: World, i: int, item: Item, row: Row) -> Iterator[tuple[Sale, str]]:
        sale = world.sales[i]
        there = sale.stripe
        if (item.event, row.key) not in there.keys:
            keys = tuple(sorted((*there.keys, (item.event, row.key))))
            if item.event == "reported":
                there = there._replace(made=there.made + 1, state=there.state or "reported", keys=keys)
            else:
                there = there._replace(state=item.event, keys=keys)
        yield sale._replace(stripe=there), "done"

    # ---- what strikes everything at once; `world` has paid for it

    def _disasters(self, world: World) -> Iterator[Step]:
        if world.up:
            down = world._replace(up=False, sales=tuple(map(_powerless, world.sales)))
            yield Step("terminal: power fails", 0, "", False, down)
            for i, sale in enumerate(down.sales):
                if sale.shown == NOTED and sale.ledger in SOLD:
                    lost = _put(down, i, sale._replace(shown=NONE))
                    story = f"terminal: power fails {UNSEEN} that {{sale}} was shown is durable"
                    yield Step(story, i, "", False, lost)
        rows = [row for sale in world.sales for item in sale.items if (row := item.row) is not None]
        if any(row.attempt or row.state == FETCHED for row in rows):
            yield Step("sync: crashes and starts again", 0, "", False, self._each_row(world, self._forgotten))
        if sum(row.state in ("sending", "ambiguous") and row.attempt != NONE for row in rows) > 1:
            yield Step("host: crashes; all attempts break off", 0, "", False, self._each_row(world, self._broken_off))
        nobody_waits = not any(sale.at_till for sale in world.sales)
        if self.scenario.stripe and nobody_waits and any(sale.stripe.keys for sale in world.sales):
            world = self._each_row(world, self._aged)
            forgotten = (sale._replace(stripe=sale.stripe._replace(keys=())) for sale in world.sales)
            yield Step("everybody: a long time passes", 0, "", False, world._replace(sales=tuple(forgotten)))

    def _each_row(self, world: World, change: Callable[[Item, Row], Row | None]) -> World:
        sales = []
        for sale in world.sales:
            items = (item if item.row is None else item._replace(row=change(item, item.row)) for item in sale.items)
            sales.append(sale._replace(items=tuple(items)))
        return world._replace(sales=tuple(sales))

    def _forgotten(self, _: Item, row: Row) -> Row | None:
        """The sync service's memory is lost; what has left, has left."""
        if row.state == FETCHED:
            return None
        if row.state == "sending":
            self.taken.add(("sending", "restart"))
            row = row._replace(state=self._spool["sending", "restart"])
        return row._replace(attempt=NONE, stray=row.stray or row.attempt == OUT)

    def _broken_off(self, _: Item, row: Row) -> Row:
        if row.state == "sending" and row.attempt:
            return row._replace(state=self._spool["sending", "unsure"], attempt=NONE)
        return row._replace(attempt=NONE) if row.state == "ambiguous" else row

    def _aged(self, item: Item, row: Row) -> Row:
        """A day later no attempt is under way, and no network still holds a request."""
        row = self._broken_off(item, row)._replace(stray=False)
        return row._replace(old=True) if item.to == "stripe" and row.state in ("ambiguous", *APART) else row


def canonical(world: World) -> World:
    """Sales of one kind may change places: one order of them stands for all."""
    return world._replace(sales=tuple(sorted(world.sales, key=hash)))


def _put(world: World, i: int, sale: Sale) -> World:
    return world._replace(sales=(*world.sales[:i], sale, *world.sales[i + 1 :]))


def _set(world: World, i: int, j: int, item: Item) -> World:
    sale = world.sales[i]
    return _put(world, i, sale._replace(items=(*sale.items[:j], item, *sale.items[j + 1 :])))


def _flushed(sale: Sale) -> Sale:
    return sale._replace(shown=DURABLE) if sale.shown else sale


def _powerless(sale: Sale) -> Sale:
    """What the terminal no longer knows: its customer, what it has handed over, and what it was about to say."""
    items = []
    for item in sale.items:
        row = item.row
        if row is not None and row.attempt.startswith((SAID, COMMITS)):
            row = row._replace(attempt=NONE)
        items.append(item._replace(outbox=WAITING if item.outbox == HANDED else item.outbox, row=row))
    return sale._replace(at_till=False, items=tuple(items))

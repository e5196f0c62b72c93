"""Breadth first through all worlds of a scenario, so that the first counterexample is a shortest one.

Three things are looked for: a world in which a promise is broken; a world in which nothing more happens by itself and
which is not one to rest in; and a circle of free steps, in which everything could go round for ever. If there is none
of them, then from every world that can be reached, whatever has gone wrong so far, everything comes to rest well as
soon as nothing more goes wrong, whichever way it goes.
"""

from __future__ import annotations

import gc
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from model.invariants import broken, unfinished
from model.steps import UNSEEN, Flaw, ImpossibleStep, Scenario, Step, Steps
from model.world import ANSWERED, World

STATES_MAX = 20_000_000  # of the largest soak a tenth; ends a scenario that somebody made too large


class Counterexample(AssertionError):
    """A promise that does not hold, and the shortest story that shows it."""

    def __init__(self, what: str, story: list[Step]) -> None:
        self.what = what
        self.story = story
        lines = [f"{number:3}. {step}" for number, step in enumerate(story, 1)]
        super().__init__("\n".join([what, *lines]))


@dataclass(frozen=True)
class Found:
    """What a search has covered, all of it well."""

    states: int
    steps: int
    rests: int  # worlds in which nothing more happens by itself
    longest: int  # steps in the longest of the shortest histories
    taken: frozenset[tuple[str, str]]  # edges of both tables that some step used


class Search:
    """One scenario, searched. Keeps every world, each with the one that it was first reached from."""

    def __init__(self, scenario: Scenario, flaw: Flaw | None = None) -> None:
        self.steps = Steps(scenario, flaw)
        start = scenario.start()
        self._numbers = {start: 0}
        self.worlds = [start]
        self._came_from = array("l", [-1])

    def run(self) -> Found:
        """Raises `Counterexample`."""
        # Worlds are trees, which need no collector: it would look through millions of them, again and again.
        gc.collect()
        gc.disable()
        try:
            return self._run()
        finally:
            gc.freeze()
            gc.enable()

    def _run(self) -> Found:
        numbers, worlds = self._numbers, self.worlds
        free_from, free_to = array("l"), array("l")
        steps_taken = rests = at = 0
        while at < len(worlds):
            free = 0
            try:
                possible = self.steps.after(worlds[at])
            except ImpossibleStep as impossible:
                raise Counterexample(str(impossible), self.story(at)) from impossible
            for step in possible:
                world = step.world
                number = numbers.setdefault(world, len(worlds))
                if number == len(worlds):
                    worlds.append(world)
                    self._came_from.append(at)
                    if (what := broken(world)) is not None:
                        raise Counterexample(what, self.story(number))
                steps_taken += 1
                if step.free:
                    free += 1
                    free_from.append(at)
                    free_to.append(number)
            if not free:
                rests += 1
                if (what := unfinished(worlds[at])) is not None:
                    raise Counterexample(f"it ends like this: {what}", self.story(at))
            at += 1
            assert at < STATES_MAX, "the scenario is too large"
        self._find_circle(free_from, free_to)
        return Found(len(worlds), steps_taken, rests, len(self.story(len(worlds) - 1)), frozenset(self.steps.taken))

    def story(self, number: int) -> list[Step]:
        """A shortest history that leads to a world."""
        path = [number]
        while path[-1]:
            path.append(self._came_from[path[-1]])
        path.reverse()
        return list(self._along(path))

    def _along(self, path: list[int]) -> Iterator[Step]:
        for before, after in pairwise(path):
            yield next(step for step in self.steps.after(self.worlds[before]) if step.world == self.worlds[after])

    def _find_circle(self, froms: array[int], tos: array[int]) -> None:
        """Take away worlds that no free step leads to any more; what is left at the end goes round."""
        into = array("l", bytes(self._came_from.itemsize * len(self.worlds)))
        for to in tos:
            into[to] += 1
        first = array("l", [0]) * (len(self.worlds) + 1)
        for from_ in froms:
            first[from_ + 1] += 1
        for number in range(len(self.worlds)):
            first[number + 1] += first[number]
        left = [number for number, count in enumerate(into) if not count]
        gone = 0
        while left:
            number = left.pop()
            gone += 1
            for to in tos[first[number] : first[number + 1]]:  # worlds are worked off in order: so are the steps
                into[to] -= 1
                if not into[to]:
                    left.append(to)
        if gone == len(self.worlds):
            return
        # What is left lies on a circle or behind one. Against the steps one always comes to a circle.
        before = {to: from_ for from_, to in zip(froms, tos, strict=True) if into[from_] and into[to]}
        at = next(iter(before))
        back: dict[int, None] = {}
        while at not in back:
            back[at] = None
            at = before[at]
        circle = [at, *reversed(list(back)[list(back).index(at) :])]
        raise Counterexample("it can go round for ever", [*self.story(at), *self._along(circle)])


def varied(search: Search, chance: Random, seen: set[tuple[str, str, str]]) -> Iterator[list[Step]]:
    """For everything that can happen to a sale or to a row a shortest history with it, and from there on to rest.

    `seen` is what earlier ones had, and is added to. What no file can show, a power cut that takes what was written and
    not flushed, is left out.
    """
    for number, world in enumerate(search.worlds):
        for step in search.steps.after(world):
            if UNSEEN in step.story or _happens(world, step) <= seen:
                continue
            history = [*search.story(number), step]
            while free := [one for one in search.steps.after(history[-1].world) if one.free]:
                history.append(chance.choice(free))
            if not any(UNSEEN in one.story for one in history):
                for before, after in zip([search.worlds[0], *(one.world for one in history)], history, strict=False):
                    seen |= _happens(before, after)
                yield history


def _happens(before: World, step: Step) -> set[tuple[str, str, str]]:
    """What a step does to sales and to rows: from where, and to where or by what."""
    found = set()
    for old, new in zip(before.sales, step.world.sales, strict=True):
        if old.ledger != new.ledger:
            found.add(("sale", old.ledger, new.ledger))
        for was, item in zip(old.items, new.items, strict=False):
            if was.row is not None and item.row is not None and was.row != item.row:
                found.add((item.to, was.row.state, step.on or item.row.state))
            if ANSWERED == item.outbox != was.outbox:
                found.add((item.event, old.ledger, new.ledger))
    return found

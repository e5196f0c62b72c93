"""The sync service's loop: one thread decides, others wait for something and wake it.

    terminal   a long poll for what it has to send (`Poll`)
    couriers   an upload each (`couriers.Fleet`)
    network    the kernel's word that a link came up (`network`)
    socket     what people ask (`Desk`), answered between two steps

A stop is seen between two steps. What is under way is finished, for an attempt that is broken off is an ambiguous one:
at most the exchange's total time-out plus one idle wait.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from terminal.clock import Clock, Entropy
from terminal.control import Call, CallRefused, ControlError, ControlServer, Roles
from terminal.ledger.keys import SecretKey
from terminal.sync import step
from terminal.sync.couriers import Couriers, Fleet
from terminal.sync.destinations import Destination
from terminal.sync.journal import SyncJournal
from terminal.sync.network import NetworkWatch
from terminal.sync.queue import Queue
from terminal.sync.reconcile import Asking, ClosableRegister, Daily, Reconciler
from terminal.sync.registrar import Office, Registrar
from terminal.sync.schedule import Schedule
from terminal.sync.spool import Follower, Spool
from terminal.sync.status import status_calls
from terminal.sync.step import FETCH_MAX, Backoff, Delivered, LinkReport, Offer, Seen, Sync, Terminal

REPORT_EVERY_MS: Final = 30_000  # the age of the oldest unsent sale is on the screen in minutes
UPLOADS: Final = 6  # under way at once: fills a line of 100 ms round trip, and a Pi Zero's memory easily
_ASK_S: Final = 20.0  # a step is over by then, whatever the network does
_AWAY_S: Final = 1.0  # a restarting terminal is found again within a second

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """A destination as it is configured. `build` makes one connection's worth of it."""

    build: Callable[[], Destination]
    takes_envelopes: bool = True
    uploads: int = UPLOADS


@dataclass(frozen=True, slots=True)
class SyncSettings:
    """What the service needs to know. The first place is the host."""

    state_directory: Path  # the service's own, mode 0700
    spool_key: SecretKey = field(repr=False)
    places: Sequence[Place]
    followers: Sequence[Follower] = ()
    backoff: Backoff = field(default_factory=Backoff)
    schedule: Schedule = field(default_factory=Schedule)
    socket: Path | None = None
    ask: Callable[[], Asking] | None = None  # a connection to the terminal for comparing the books
    terminal: str = ""
    reconcile_days: int | None = None  # by itself, once a day, so far back
    stripe: Callable[[], ClosableRegister] | None = None  # to be compared as well
    office: Callable[[], Office] | None = None  # the host, to be asked about this terminal
    enrol: bool = False  # get a client certificate from it


class Poll:
    """The terminal with its long poll in a thread of its own: `fetch` gives what has come and never waits.

    Uses two terminals, since a call that waits must not hold up the others. What is fetched is offered to the step
    once, and the next poll begins when it has been acknowledged.
    """

    def __init__(self, asking: Terminal, polling: Terminal, wake: Callable[[], None]) -> None:
        self._asking = asking
        self._polling = polling
        self._wake = wake
        self._found: queue.SimpleQueue[Offer | ControlError] = queue.SimpleQueue()
        self._go_on = threading.Semaphore(0)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="poll", daemon=True)
        self._thread.start()

    def fetch(self, max: int, wait_ms: int) -> Offer:
        try:
            found = self._found.get_nowait()
        except queue.Empty:
            return Offer(())
        if isinstance(found, ControlError):
            raise found
        return found

    def stored(self, keys: Sequence[str]) -> None:
        try:
            self._asking.stored(keys)
        finally:
            self._go_on.release()

    def deliver(self, answers: Sequence[tuple[str, str]]) -> Sequence[Delivered]:
        return self._asking.deliver(answers)

    def report(self, report: LinkReport) -> Seen:
        return self._asking.report(report)

    def close(self) -> None:
        """Poll no more. A poll under way is left to end by itself: nothing that it brings is taken over."""
        self._closing.set()
        self._go_on.release()

    def _poll(self) -> None:
        head = None
        while not self._closing.is_set():
            try:
                offer = self._polling.fetch(FETCH_MAX, step.IDLE_MS)
            except ControlError as error:
                self._found.put(error)
                self._wake()
                self._closing.wait(_AWAY_S)
                continue
            if not offer.items and offer.head == head:
                continue
            head = offer.head
            self._found.put(offer)
            self._wake()
            if offer.items:
                self._go_on.acquire()


class Desk:
    """Where people's questions wait for the one thread that may answer them."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._waiting: queue.SimpleQueue[tuple[Callable[[Any], Any], Any, Future[Any]]] = queue.SimpleQueue()

    def calls(self, table: Mapping[str, Call]) -> Mapping[str, Call]:
        """The same table, for the socket's threads."""
        return {name: replace(call, handle=self._passed_on(call.handle)) for name, call in table.items()}

    def serve(self) -> None:
        """Answer what waits."""
        with contextlib.suppress(queue.Empty):
            while True:
                handle, arguments, answer = self._waiting.get_nowait()
                try:
                    answer.set_result(handle(arguments))
                except Exception as error:  # noqa: BLE001 - it goes to whoever asked
                    answer.set_exception(error)

    def _passed_on(self, handle: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def ask(arguments: Any) -> Any:
            answer: Future[Any] = Future()
            self._waiting.put((handle, arguments, answer))
            self._wake()
            try:
                return answer.result(_ASK_S)
            except TimeoutError:
                raise CallRefused("busy", "the sync service is busy: ask again in a moment") from None

        return ask


def run(
    settings: SyncSettings,
    connect: Callable[[], Terminal],
    *,
    clock: Clock,
    entropy: Entropy,
    stop: threading.Event,
    alive: Callable[[], None],
) -> None:
    """Serve until `stop`. `connect` makes a connection to the terminal; `alive` is called before each step.

    Raises `SpoolUnavailable`, `Unsendable`.
    """
    woken = threading.Event()
    with contextlib.ExitStack() as open_:
        couriers: list[Couriers] = [
            open_.enter_context(contextlib.closing(Fleet(place.build, room=place.uploads, wake=woken.set)))
            for place in settings.places
        ]
        spool = open_.enter_context(
            contextlib.closing(
                Spool(
                    settings.state_directory,
                    settings.spool_key,
                    clock=clock,
                    entropy=entropy,
                    followers=settings.followers,
                )
            )
        )
        # After the spool, whose lock keeps a second process out of the whole directory.
        journal = open_.enter_context(
            contextlib.closing(SyncJournal(settings.state_directory, settings.spool_key, clock=clock, entropy=entropy))
        )
        terminal = open_.enter_context(contextlib.closing(Poll(connect(), connect(), woken.set)))
        takes = [each.name for each, place in zip(couriers, settings.places, strict=True) if place.takes_envelopes]
        sync = Sync(
            spool,
            couriers,
            terminal,
            journal,
            clock=clock,
            entropy=entropy,
            backoff=settings.backoff,
            takes_envelopes=takes,
            schedule=settings.schedule,
        )
        changed = threading.Event()

        def network_changed() -> None:
            changed.set()
            woken.set()

        open_.enter_context(contextlib.closing(NetworkWatch(network_changed)))
        desk = Desk(woken.set)
        queue_calls = desk.calls(Queue(spool, clock, sync.is_under_way).calls())
        registrar = _registrar(settings, clock)
        reconciler = daily = None
        if settings.ask is not None:
            host = settings.places[0].build
            reconciler = Reconciler(
                settings.ask, host, queue_calls, settings.state_directory, clock, stripe=settings.stripe
            )
            if settings.reconcile_days is not None:
                daily = Daily(reconciler, clock, terminal=settings.terminal, days=settings.reconcile_days)
        if settings.socket is not None:
            table = {
                **queue_calls,
                **desk.calls(status_calls(sync, clock, reconciler.last if reconciler else lambda: None)),
                **(reconciler.calls() if reconciler else {}),
            }
            roles = Roles.build(sync_user=None, register_user=None)
            try:
                open_.enter_context(contextlib.closing(ControlServer(settings.socket, roles, table)))
            except ControlError as error:
                # Money goes on without being asked after.
                _log.error("%s Uploads go on; the commands sync and queue cannot reach this service.", error)
        reporter = _Reporter(sync, clock)
        while not stop.is_set():
            alive()
            woken.clear()
            desk.serve()
            if changed.is_set():
                changed.clear()
                sync.network_changed()
            due = sync.step()
            report = sync.report()
            reporter.tell(report)
            sync.note(report)
            if daily is not None:
                daily.look(report, sync.schedule.mode, now=sync.books_differ)
                sync.books_differ = False
            if registrar is not None and not sync.terminal_away:
                registrar.look(sync.schedule.mode, report.error)
            if due.in_ms:
                journal.tidy()
                woken.wait(due.in_ms / 1000)


def _registrar(settings: SyncSettings, clock: Clock) -> Registrar | None:
    if settings.ask is None or settings.office is None:
        return None
    return Registrar(
        settings.ask,
        settings.office,
        settings.state_directory,
        clock,
        terminal=settings.terminal,
        enrol=settings.enrol,
    )


class _Reporter:
    """Tells the terminal how the link stands: on every change, and from time to time because ages change."""

    def __init__(self, sync: Sync, clock: Clock) -> None:
        self._sync = sync
        self._clock = clock
        self._told: LinkReport | None = None
        self._told_ms = 0

    def tell(self, report: LinkReport) -> None:
        if self._sync.terminal_away:
            self._told = None  # it may come back restarted, and know nothing
            return
        now_ms = self._clock.monotonic_ms()
        known = self._told is not None and replace(report, oldest_ms=None) == replace(self._told, oldest_ms=None)
        if known and now_ms - self._told_ms < REPORT_EVERY_MS:
            return
        if self._told is None or self._told.online != report.online:
            _log.info("host: %s", report.error or "online")
        self._told = report if self._sync.tell(report) else None
        self._told_ms = now_ms

"""What happens at the device, in order: wait for a sale, ask for the card, show how it ended.

The flow owns the reader and the display and nothing else. It asks `terminal.payment` what became of a sale and shows
what that says; a sale is shown only after its state is committed, and the showing itself is recorded.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, TypeAlias

from drivers.interfaces import (
    CardChannel,
    CardCollision,
    CardLost,
    CardReader,
    ReaderFault,
    ReaderMissing,
)
from terminal import VERSION
from terminal.clock import Clock
from terminal.config import Config
from terminal.desk import Desk
from terminal.emv.outcome import (
    Approved,
    Declined,
    EndApplication,
    OnlineRequest,
    SelectNext,
    Torn,
    TryAgain,
    TryAnotherInterface,
    UiRequest,
)
from terminal.ledger.errors import IllegalTransition, LedgerError
from terminal.ledger.ledger import Ledger
from terminal.ledger.states import State
from terminal.ledger.values import ReversalReason, Transaction
from terminal.link import Link
from terminal.payment import Payments
from terminal.ui import screens
from terminal.ui.panel import Panel
from terminal.ui.screens import Screen

POLL_MS: Final = 200  # how long one look for a card lasts: the delay with which a cancellation is noticed
IDLE_MS: Final = 1_000  # how often the idle screen is brought up to date
REOPEN_MS: Final = 1_000  # between attempts to find a missing reader: soon enough for a person, no busy loop
ATTEMPTS_MAX: Final = 20  # card presentations in one sale: a card that never works ends the sale, not the day

Result: TypeAlias = screens.Approved | screens.AcceptedOffline | screens.Declined | screens.Error

_log = logging.getLogger(__name__)


class Flow:
    """The device's main loop. `run` returns when `stopping` says so. Owns the reader, shows on the panel."""

    def __init__(
        self,
        *,
        config: Config,
        reader: CardReader,
        panel: Panel,
        ledger: Ledger,
        payments: Payments,
        link: Link,
        desk: Desk,
        clock: Clock,
        stopping: Callable[[], bool],
        alive: Callable[[], None],
    ) -> None:
        self._config = config
        self._reader = reader
        self._panel = panel
        self._ledger = ledger
        self._payments = payments
        self._link = link
        self._desk = desk
        self._clock = clock
        self._stopping = stopping
        self._alive = alive
        self._reader_fault: ReaderFault | None = None
        self._reader_due_ms = 0

    def run(self) -> None:
        """Until stopped: unfinished business of the last run first, then sale after sale."""
        self._panel.show(screens.Start(VERSION))
        self._reader_ready()
        self._attend_unshown()
        while not self._stopping():
            self._alive()
            self._reader_ready()
            self._panel.show(self._idle_screen())
            if (transaction := self._desk.take(IDLE_MS)) is None:
                self._ledger.flush()  # what needs no flush of its own (SHOWN, events) gets one while nobody waits
                continue
            try:
                self._sale(transaction)
            except LedgerError as error:
                _log.error("sale %s: %s", transaction.id, error)
                self._panel.show(screens.Error("ledger"))
                self._clock.sleep_ms(self._config.sale.result_hold_ms)
            finally:
                self._desk.done()

    def _sale(self, transaction: Transaction) -> None:
        deadline_ms = self._clock.monotonic_ms() + self._config.sale.card_timeout_ms
        for _ in range(ATTEMPTS_MAX):
            channel = self._card(transaction, deadline_ms)
            if channel is None:
                reason = "cancelled" if self._desk.cancelled else "no_card"
                self._payments.void(transaction, reason)
                return
            outcome = self._read(transaction, channel)
            if outcome is not None:
                self._finish(transaction, outcome)
                return
        self._payments.void(transaction, "no_usable_card")

    def _card(self, transaction: Transaction, deadline_ms: int) -> CardChannel | None:
        """Ask for a card until there is one, the time is up, or somebody cancels."""
        prompt: Screen = screens.PresentCard(transaction.amount)
        while self._clock.monotonic_ms() < deadline_ms and not self._desk.cancelled and not self._stopping():
            self._alive()
            if not self._reader_ready():
                self._panel.show(_reader_screen(self._reader_fault))
                self._clock.sleep_ms(POLL_MS)
                continue
            self._panel.show(prompt)
            try:
                channel = self._reader.wait_for_card(POLL_MS)
            except CardCollision:
                self._panel.show(screens.OneCardOnly())
                self._wait_for_removal()
            except CardLost:
                prompt = screens.TryAgain(transaction.amount, "card_lost")
            except ReaderFault as fault:
                self._lose_reader(fault)
            else:
                if channel is not None:
                    return channel
        return None

    def _read(self, transaction: Transaction, channel: CardChannel) -> Approved | Declined | OnlineRequest | None:
        """One presentation. None when it decided nothing and the card is to be presented again."""
        self._panel.show(screens.Reading(transaction.amount))
        try:
            outcome = self._payments.read(transaction, channel, self._notify)
        except ReaderFault as fault:
            self._lose_reader(fault)
            return None
        except CardLost as lost:
            _log.info("sale %s: %s", transaction.id, lost)
            outcome = TryAgain("card_lost")
        finally:
            channel.close()
        match outcome:
            case Approved() | Declined() | OnlineRequest():
                return outcome
            case TryAgain(reason=reason, ui=ui) | Torn(reason=reason, ui=ui):
                self._panel.show(screens.TryAgain(transaction.amount, reason))
                self._clock.sleep_ms(ui.hold_ms)  # field off meanwhile: a phone needs the time
            case TryAnotherInterface(reason=reason) | EndApplication(reason=reason) | SelectNext(reason=reason):
                _log.info("sale %s: card not usable: %s", transaction.id, reason)
                self._panel.show(screens.UseOtherCard(transaction.amount))
        self._wait_for_removal()
        return None

    def _finish(self, transaction: Transaction, outcome: Approved | Declined | OnlineRequest) -> None:
        if isinstance(outcome, OnlineRequest):
            self._panel.show(screens.Authorising(transaction.amount))
        decided = self._payments.decide(transaction, outcome)
        result = result_screen(decided)
        if self._panel.show(result):
            self._ledger.mark_shown(decided.id, decided.state.value)
        self._desk.decided()
        _log.info("sale %s: %s", decided.id, decided.state.value)
        self._clock.sleep_ms(self._config.sale.result_hold_ms)
        if not self._removed():
            self._panel.show(screens.RemoveCard(None if isinstance(result, screens.Error) else result))
            self._wait_for_removal()

    def _attend_unshown(self) -> None:
        """Sales that stood when the power went but were never shown: a person says keep or void before the next one."""
        for transaction in self._ledger.unshown():
            keep: bool | None = None
            while keep is None and not self._stopping():
                self._alive()
                self._panel.show(screens.KeepOrVoid(transaction.amount))
                keep = self._desk.verdict(transaction.id, IDLE_MS)
            if keep is None:
                return
            self._ledger.note("kept" if keep else "voided", transaction=str(transaction.id))
            if not keep:
                with contextlib.suppress(IllegalTransition):  # the host has declined it meanwhile: nothing to take back
                    self._payments.reverse(transaction, ReversalReason.VOID)
            self._ledger.mark_shown(transaction.id, "kept" if keep else "voided")

    def _idle_screen(self) -> Screen:
        if self._reader_fault is not None:
            return _reader_screen(self._reader_fault)
        unsent = self._ledger.unsent()
        now_ms = self._clock.wall_ms()
        clock = (
            f"{datetime.fromtimestamp(now_ms / 1000, tz=UTC).astimezone():%H:%M}"
            if self._clock.synchronised()
            else None
        )
        oldest_ms = min((each.oldest_wall_ms for each in unsent), default=None)
        oldest = None if oldest_ms is None else max(0, now_ms - oldest_ms) // 60_000
        return screens.Idle(
            time=clock,
            online=self._link.presumed_up(),
            unsent=sum(each.count for each in unsent),
            oldest_minutes=oldest,
        )

    def _notify(self, request: UiRequest) -> None:
        """The kernel's own requests in the middle of a reading. Nothing of them needs a screen besides "reading"."""
        _log.debug("kernel: message %02X status %d", request.message, request.status)

    def _reader_ready(self) -> bool:
        """True when the reader works; tries to take it up again now and then when it does not."""
        if self._reader_fault is None and self._reader_due_ms:
            return True
        if self._clock.monotonic_ms() < self._reader_due_ms:
            return False
        self._reader_due_ms = self._clock.monotonic_ms() + REOPEN_MS
        try:
            self._reader.open()
        except ReaderFault as fault:
            if str(fault) != str(self._reader_fault):
                _log.error("%s", fault)
            self._reader_fault = fault
            return False
        if self._reader_fault is not None:
            self._ledger.note("reader_found", reader=self._reader.name)
        self._reader_fault = None
        _log.info("reader ready: %s", self._reader.name)
        return True

    def _lose_reader(self, fault: ReaderFault) -> None:
        _log.error("%s", fault)
        self._ledger.note("reader_lost", reader=self._reader.name, reason=str(fault))
        self._reader.close()
        self._reader_fault = fault
        self._reader_due_ms = self._clock.monotonic_ms()
        self._panel.show(_reader_screen(fault))

    def _removed(self) -> bool:
        try:
            return self._reader.wait_for_removal(0)
        except ReaderFault as fault:
            self._lose_reader(fault)
            return True

    def _wait_for_removal(self) -> None:
        deadline_ms = self._clock.monotonic_ms() + self._config.sale.card_timeout_ms
        while self._clock.monotonic_ms() < deadline_ms and not self._stopping():
            self._alive()
            try:
                if self._reader.wait_for_removal(POLL_MS):
                    return
            except ReaderFault as fault:
                self._lose_reader(fault)
                return


def result_screen(transaction: Transaction) -> Result:
    """How a decided sale is shown. Only states that the ledger holds durably come here."""
    card = transaction.card
    scheme, last4 = (card.scheme, card.last4) if card else ("", "")
    match transaction.state:
        case State.APPROVED | State.SETTLED:
            return screens.Approved(transaction.amount, scheme, last4)
        case State.ACCEPTED:
            return screens.AcceptedOffline(transaction.amount, scheme, last4)
        case State.DECLINED | State.REFUSED | State.REVERSING | State.REVERSED:
            return screens.Declined(transaction.amount, transaction.reason or "declined")
        case State.OPENED | State.AUTHORISING | State.COMPLETING | State.VOID:
            return screens.Error("not_completed")


def _reader_screen(fault: ReaderFault | None) -> Screen:
    return screens.Error("reader_missing" if isinstance(fault, ReaderMissing) else "reader_fault")

"""What happens at the device, in order: wait for a sale, ask for the card, show how it ended.

The flow owns readers and panel and nothing else. It asks `terminal.payment` what became of a sale and shows
what that says; a sale is shown only after its state is committed, and the showing itself is recorded.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TypeAlias

from drivers.interfaces import (
    CardChannel,
    CardCollision,
    CardLost,
    Interface,
    Key,
    ReaderFault,
    ReaderMissing,
    Tone,
)
from terminal import VERSION
from terminal.clock import Clock
from terminal.config import Config
from terminal.desk import Desk
from terminal.emv import selection
from terminal.emv.contact_selection import Candidate
from terminal.emv.outcome import (
    Approved,
    Declined,
    EndApplication,
    OnlineRequest,
    Outcome,
    SelectNext,
    Torn,
    TryAgain,
    TryAnotherInterface,
    UiRequest,
)
from terminal.ledger.errors import IllegalTransition, JournalFull, LedgerError, NoRoom
from terminal.ledger.ledger import Ledger
from terminal.ledger.states import State
from terminal.ledger.values import ReversalReason, Transaction
from terminal.link import Link
from terminal.money import AMOUNT_MINOR_MAX, Amount
from terminal.payment import Payments, SaleRefused
from terminal.ui import messages, screens
from terminal.ui.panel import Panel
from terminal.ui.readers import Readers
from terminal.ui.screens import Screen

POLL_MS: Final = 200  # how long one look for a card lasts: the delay with which a cancellation is noticed
IDLE_MS: Final = 1_000  # how often the idle screen is brought up to date
ENTRY_MS: Final = 30_000  # an amount that nobody finishes is forgotten
REFUSAL_HOLD_MS: Final = 2_000
ATTEMPTS_MAX: Final = 20  # card presentations in one sale: a card that never works ends the sale, not the day

Result: TypeAlias = screens.Approved | screens.AcceptedOffline | screens.Declined | screens.Error

_log = logging.getLogger(__name__)


class Flow:
    """The device's main loop. `run` returns when `stopping` says so."""

    def __init__(
        self,
        *,
        config: Config,
        readers: Readers,
        panel: Panel,
        ledger: Ledger,
        payments: Payments,
        link: Link,
        desk: Desk,
        clock: Clock,
        stopping: Callable[[], bool],
        alive: Callable[[], None],
        has_keys: bool = False,
    ) -> None:
        self._config = config
        self._readers = readers
        self._panel = panel
        self._ledger = ledger
        self._payments = payments
        self._link = link
        self._desk = desk
        self._clock = clock
        self._stopping = stopping
        self._alive = alive
        self._has_keys = has_keys

    def run(self) -> None:
        """Until stopped: unfinished business of the last run first, then sale after sale."""
        self._panel.show(screens.Start(VERSION))
        self._readers.look_after()
        self._attend_unshown()
        while not self._stopping():
            self._alive()
            self._readers.look_after()
            told = self._ledger.host_status
            revoked = told is not None and told.revoked
            self._panel.show(screens.Error("revoked") if revoked else self._idle_screen())
            match self._desk.take(IDLE_MS):
                case None:
                    self._ledger.look_around()
                    self._ledger.flush()  # what needs no flush of its own (SHOWN, events) gets one while nobody waits
                case Key() as key:
                    self._enter_amount(key)
                case transaction:
                    self._serve(transaction)

    def _serve(self, transaction: Transaction) -> None:
        """Take one sale to its end, whatever that is; the device is free afterwards."""
        try:
            # A register that repeats itself may have laid a copy of a sale that has ended meanwhile.
            if self._ledger.transaction(transaction.id).state is State.OPENED:
                self._sale(transaction)
        except LedgerError as error:
            _log.error("sale %s: %s", transaction.id, error)
            self._panel.show(screens.Error("ledger"))
            self._clock.sleep_ms(self._config.sale.result_hold_ms)
        finally:
            self._panel.speak(None)  # the next customer reads something else
            self._desk.done()

    def _enter_amount(self, key: Key) -> None:
        """Digits from the right, as minor units; clear takes one back, cancel all, enter begins the sale."""
        minor = 0
        event: Key | Transaction | None = key
        while isinstance(event, Key):
            self._panel.sound(Tone.CLICK)
            match event:
                case Key.ENTER if minor:
                    self._begin(Amount(minor, self._config.currency))
                    return
                case Key.CLEAR:
                    minor //= 10
                case Key.CANCEL:
                    return
                case _ if event.value.isdigit() and minor <= AMOUNT_MINOR_MAX // 10:
                    minor = min(minor * 10 + int(event.value), AMOUNT_MINOR_MAX)
                case _:
                    pass
            self._alive()
            self._panel.show(screens.EnterAmount(Amount(minor, self._config.currency)))
            event = self._desk.take(ENTRY_MS)
        if event is not None:
            self._serve(event)  # a register was quicker than the fingers

    def _begin(self, amount: Amount) -> None:
        """A sale that was typed here."""
        try:
            transaction = self._payments.begin(amount, None)
        except SaleRefused as refused:
            _log.warning("%s", refused)
            self._panel.show(screens.Error(refused.code))
        except NoRoom as full:
            _log.error("%s", full)
            self._panel.show(screens.Error("journal_full" if isinstance(full, JournalFull) else "storage_full"))
        else:
            if self._desk.begin(transaction):
                self._serve(transaction)
            else:
                self._payments.void(transaction, "cancelled")
            return
        self._clock.sleep_ms(REFUSAL_HOLD_MS)

    def _sale(self, transaction: Transaction) -> None:
        deadline_ms = self._clock.monotonic_ms() + self._config.sale.card_timeout_ms
        for _ in range(ATTEMPTS_MAX):
            channel = self._card(transaction, deadline_ms)
            if channel is None:
                reason = "cancelled" if self._desk.cancelled else "no_card"
                self._payments.void(transaction, reason)
                return
            if self._present(transaction, channel):
                return
        self._payments.void(transaction, "no_usable_card")

    def _card(self, transaction: Transaction, deadline_ms: int) -> CardChannel | None:
        """Ask for a card until there is one, the time is up, or somebody cancels."""
        again: Screen | None = None
        while self._clock.monotonic_ms() < deadline_ms and not self._desk.cancelled and not self._stopping():
            self._alive()
            if not self._readers.look_after():
                self._panel.show(_reader_screen(self._readers.fault))
                self._clock.sleep_ms(POLL_MS)
                continue
            self._panel.show(again or screens.PresentCard(transaction.amount, contact=self._readers.contact))
            try:
                channel = self._readers.wait_for_card(POLL_MS)
            except CardCollision:
                self._panel.show(screens.OneCardOnly())
                self._wait_for_removal()
            except CardLost:
                again = screens.TryAgain(transaction.amount, "card_lost")
            else:
                if channel is not None:
                    return channel
        return None

    def _present(self, transaction: Transaction, channel: CardChannel) -> bool:
        """One presentation. False when it decided nothing and a card is to be presented again."""
        self._panel.show(screens.Reading(transaction.amount))
        try:
            outcome = self._read(transaction, channel)
            match outcome:
                case Approved() | Declined() | OnlineRequest():
                    if channel.interface is Interface.CONTACTLESS:
                        channel.close()  # it has said all that it will; the customer may take it away
                    self._finish(transaction, self._decide(transaction, outcome, channel))
                    return True
                case None:
                    return False
                # With a restart the same card is to come again: a phone whose owner has looked at it.
                case (
                    TryAgain(reason=reason, ui=ui)
                    | Torn(reason=reason, ui=ui)
                    | EndApplication(reason=reason, restart=UiRequest() as ui)
                ):
                    channel.close()
                    self._panel.show(screens.TryAgain(transaction.amount, reason))
                    self._clock.sleep_ms(ui.hold_ms)  # field off meanwhile: a phone needs the time
                case TryAnotherInterface(reason=reason) | EndApplication(reason=reason) | SelectNext(reason=reason):
                    channel.close()
                    _log.info("sale %s: card not usable: %s", transaction.id, reason)
                    self._panel.show(screens.UseOtherCard(transaction.amount))
        finally:
            channel.close()
        self._wait_for_removal()
        return False

    def _read(self, transaction: Transaction, channel: CardChannel) -> Outcome | None:
        """None when the reader broke, which says nothing of the card."""
        try:
            asked = _Cardholder(self._ask, transaction.amount) if self._has_keys else None
            return self._payments.read(transaction, channel, self._notify, asked, self._reads)
        except ReaderFault as fault:
            self._readers.lost(channel.interface, fault)
            self._panel.show(_reader_screen(fault))
            return None
        except CardLost as lost:
            _log.info("sale %s: %s", transaction.id, lost)
            return TryAgain("card_lost")

    def _decide(
        self, transaction: Transaction, outcome: Approved | Declined | OnlineRequest, channel: CardChannel
    ) -> Transaction:
        if isinstance(outcome, OnlineRequest):
            self._panel.show(screens.Authorising(transaction.amount))
        return self._payments.decide(transaction, outcome, channel)

    def _finish(self, transaction: Transaction, decided: Transaction) -> None:
        result = result_screen(decided)
        if self._panel.show(result):
            self._ledger.mark_shown(decided.id, decided.state.value)
        self._desk.decided()
        _log.info("sale %s: %s", decided.id, decided.state.value)
        self._clock.sleep_ms(self._config.sale.result_hold_ms)
        if not self._readers.wait_for_removal(0):
            self._panel.show(screens.RemoveCard(None if isinstance(result, screens.Error) else result))
        self._wait_for_removal()

    def _attend_unshown(self) -> None:
        """Sales that stood when the power went but were never shown: a person says keep or void before the next one."""
        for transaction in self._ledger.unshown():
            keep: bool | None = None
            while keep is None and not self._stopping():
                if transaction.id not in {each.id for each in self._ledger.unshown()}:
                    break  # the host has declined it meanwhile: there is nothing left to decide
                self._alive()
                self._panel.show(screens.KeepOrVoid(transaction.amount))
                keep = self._desk.verdict(transaction.id, IDLE_MS)
            if keep is None:
                continue
            self._ledger.note("kept" if keep else "voided", transaction=str(transaction.id))
            if not keep:
                with contextlib.suppress(IllegalTransition):  # the host has declined it meanwhile: nothing to take back
                    self._payments.reverse(transaction, ReversalReason.VOID)
            self._ledger.mark_shown(transaction.id, "kept" if keep else "voided")

    def _idle_screen(self) -> Screen:
        if (fault := self._readers.fault) is not None:
            return _reader_screen(fault)
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
            lost=len(self._ledger.alerts()),
        )

    def _notify(self, request: UiRequest) -> None:
        """The kernel's own requests in the middle of a reading. Nothing of them needs a screen besides "reading"."""
        _log.debug("kernel: message %02X status %d", request.message, request.status)

    def _reads(self, preferred: Sequence[str]) -> None:
        """The cardholder's languages, as the card states them (EMV 4.4 Book 4, 11.1)."""
        self._panel.speak(selection.language(preferred, messages.spoken()))

    def _ask(self, names: Sequence[str], amount: Amount) -> int | None:
        """By arrows or by its number, the place of the chosen name. None: nobody wanted any, or nobody answered."""
        at, deadline_ms = 0, self._clock.monotonic_ms() + self._config.sale.card_timeout_ms
        self._desk.ask()
        try:
            while self._clock.monotonic_ms() < deadline_ms and not self._desk.cancelled and not self._stopping():
                self._alive()
                self._panel.show(screens.ChooseApplication(tuple(names), at))
                match self._desk.answer(POLL_MS):
                    case Key.ENTER:
                        return at
                    case Key.CLEAR | Key.CANCEL:
                        return None
                    case Key.UP:
                        at = max(at - 1, 0)
                    case Key.DOWN:
                        at = min(at + 1, len(names) - 1)
                    case Key() as key if key.value.isdigit() and 1 <= int(key.value) <= len(names):
                        at = int(key.value) - 1
                    case _:
                        pass
            return None
        finally:
            self._desk.answered()
            self._panel.show(screens.Reading(amount))

    def _wait_for_removal(self) -> None:
        deadline_ms = self._clock.monotonic_ms() + self._config.sale.card_timeout_ms
        while self._clock.monotonic_ms() < deadline_ms and not self._stopping():
            self._alive()
            if self._readers.wait_for_removal(POLL_MS):
                if (fault := self._readers.fault) is not None:
                    self._panel.show(_reader_screen(fault))
                return


@dataclass(frozen=True, slots=True)
class _Cardholder:
    """Answers for the card on the keypad (`contact_selection.Cardholder`); the inserted card waits meanwhile."""

    ask: Callable[[Sequence[str], Amount], int | None]
    amount: Amount

    def choose(self, offered: Sequence[Candidate]) -> Candidate | None:
        at = self.ask([candidate.name for candidate in offered], self.amount)
        return None if at is None else offered[at]

    def confirm(self, offered: Candidate) -> bool:
        return self.ask([offered.name], self.amount) is not None


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

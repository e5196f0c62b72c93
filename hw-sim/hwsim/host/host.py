"""The host itself, without HTTP: takes signed envelopes, keeps books, gives signed answers.

`Host.receive` is the whole promise. An envelope is verified (who signed it, and is it about what the request says),
then taken in under one lock and one database transaction: the same envelope again gets the stored answer, another one
for the same event is refused, a new one is decided and booked. Nothing that is refused leaves a trace in the books.
`Host.countersign` does the same for checkpoints, only that one which contradicts earlier ones is remembered as a fork.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime
from enum import Enum
from pathlib import Path
from typing import Final, Literal

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke

from hwsim.cards.personalise import CardProfile, Pan
from hwsim.host import jose, keys, messages, tls
from hwsim.host.checkpoints import contradiction
from hwsim.host.decide import Decision, decide
from hwsim.host.jose import JoseError
from hwsim.host.messages import (
    ANSWER_TYPE,
    ENVELOPE_TYPE,
    Answer,
    Authorisation,
    Checkpoint,
    Countersignature,
    Envelope,
    Reversal,
    SaleEnvelope,
)
from hwsim.host.store import Booking, Epoch, Fork, Message, State, Store, TerminalKey
from hwsim.issuer import Account, Issuer

EVENTS: Final = ("authorisation", "reversal")  # of a transaction
_CHECKPOINT: Final = "checkpoint"
_CARD_REF_BYTES: Final = 12
_SEALING: Final = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)

_log = logging.getLogger(__name__)


class Problem(Enum):
    """Why an envelope is no decision: HTTP status, stable word, title (RFC 9457)."""

    MALFORMED = 400, "malformed", "The body is not a signed envelope of version 1"
    PATH_MISMATCH = 400, "path-mismatch", "Path and envelope do not name the same thing"
    TERMINAL_UNKNOWN = 403, "terminal-unknown", "The terminal or its signing key is not registered here"
    SIGNATURE_WRONG = 403, "signature-wrong", "The envelope is not signed with the key that it names"
    CONFLICT = 409, "conflict", "This transaction and event, or checkpoint, came before with another envelope"
    NUMBER_REUSED = 409, "number-reused", "This envelope number came before with another envelope"
    SALE_MISMATCH = 409, "sale-mismatch", "The reversal is not about the sale that was received"
    FORK = 409, "fork", "The checkpoint contradicts what this terminal has shown before"
    CANNOT_UNSEAL = 422, "cannot-unseal", "The card data does not open with the host's key for this sale"

    @property
    def status(self) -> int:
        return self.value[0]

    @property
    def word(self) -> str:
        return self.value[1]

    @property
    def title(self) -> str:
        return self.value[2]


class Refused(Exception):
    """No decision, and nothing was booked. Sending the same envelope again will not help: a person has to look."""

    def __init__(self, problem: Problem, detail: str) -> None:
        super().__init__(f"{problem.title}: {detail}")
        self.problem = problem
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Reply:
    """A signed answer, and whether it had been given before."""

    answer: str
    repeated: bool


@dataclass(frozen=True, slots=True)
class Known:
    """What the host knows of one transaction: its booking, and by event the messages that it took in."""

    booking: Booking
    messages: tuple[Message, ...]


def provision(directory: Path, *, now: datetime, entropy: Callable[[int], bytes]) -> Path:
    """Make a host's keys, authority and server certificate, unless they are there; returns the public directory.

    It holds what a terminal is given: host-sealing-key, host-answer-key, ca.pem, fingerprints.json.
    """
    keys.make(directory, entropy)
    tls.make(directory, now)
    return directory / "public"


class Host:
    """The operator's host over a provisioned directory. Safe to use from several threads.

    `imk_ac` is the master key of the issuer behind it, `today` the date that this issuer believes in.
    """

    def __init__(
        self,
        directory: Path,
        *,
        imk_ac: bytes,
        wall_ms: Callable[[], int],
        today: Callable[[], date],
        entropy: Callable[[int], bytes],
    ) -> None:
        self.directory = directory
        self.keys = keys.load(directory)
        self._imk_ac = imk_ac
        self._wall_ms = wall_ms
        self._today = today
        self._entropy = entropy
        self._store = Store(directory / "host.db")

    def close(self) -> None:
        self._store.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def register(self, terminal: str, merchant: str, public_pem: bytes) -> str:
        """Accept envelopes signed with this key, from this terminal for this merchant; returns the key's id.

        A terminal may have several keys, as after a factory reset. Raises `HostKeyError`, `StoreError`.
        """
        kid = keys.key_id(keys.signing_public_key(public_pem))
        with self._store.transaction():
            self._store.add_terminal_key(kid, TerminalKey(terminal, merchant, public_pem))
        return kid

    def enrol(self, profile: CardProfile, *, blocked: bool = False, limit_minor: int | None = None) -> None:
        """Open, or change, the account of a personalised card."""
        card = _card_hash(self.keys.card, profile.pan.digits, profile.psn)
        with self._store.transaction():
            self._store.put_account(card, profile.pan.digits[-4:], Account(profile.expires, blocked, limit_minor))

    def receive(self, transaction: str, event: str, body: bytes) -> Reply:
        """Take in an envelope that came for this transaction and event. Raises `Refused`."""
        envelope, _ = self._verified(body)
        if isinstance(envelope, Checkpoint) or (envelope.transaction, _event(envelope)) != (transaction, event):
            raise Refused(Problem.PATH_MISMATCH, "the envelope is for another transaction or event than the request")
        sha256 = hashlib.sha256(body).hexdigest()
        with self._store.transaction():
            known = self._store.message(transaction, event)
            if known is not None:
                if known.envelope_sha256 != sha256:
                    raise Refused(Problem.CONFLICT, "the first one stands, and its answer with it")
                self._store.count_repetition(transaction, event)
                return Reply(known.answer, repeated=True)
            if self._store.number_taken(envelope.terminal, envelope.epoch, envelope.number):
                raise _number_reused(envelope)
            answer = self._sign(self._book(envelope, sha256))
            self._store.add_message(
                Message(transaction, event, envelope.terminal, envelope.epoch, envelope.number, sha256, answer),
                self._wall_ms(),
            )
        return Reply(answer, repeated=False)

    def countersign(self, checkpoint: str, body: bytes) -> Reply:
        """Take in a checkpoint that came under this id. Raises `Refused`; what contradicts earlier ones is kept."""
        envelope, kid = self._verified(body)
        if not isinstance(envelope, Checkpoint) or envelope.checkpoint != checkpoint:
            raise Refused(Problem.PATH_MISMATCH, "the envelope is not the checkpoint that the request names")
        sha256 = hashlib.sha256(body).hexdigest()
        with self._store.transaction():
            known = self._store.message(checkpoint, _CHECKPOINT)
            if known is not None and known.envelope_sha256 == sha256:
                self._store.count_repetition(checkpoint, _CHECKPOINT)
                return Reply(known.answer, repeated=True)
            refusal = self._fork(envelope, kid, known)
            if refusal is None:
                return Reply(self._take_in(envelope, kid, sha256), repeated=False)
            self._store.add_fork(
                Fork(
                    envelope=sha256,
                    terminal=envelope.terminal,
                    epoch=envelope.epoch,
                    number=envelope.number,
                    sequence=envelope.sequence,
                    detail=refusal.detail,
                    first_received_ms=self._wall_ms(),
                )
            )
        # Raised only here, or the note would be undone with everything else.
        _log.error("host: terminal %s, epoch %d: %s", envelope.terminal, envelope.epoch, refusal)
        raise refusal

    def known(self, transaction: str) -> Known | None:
        """What is on the books about a transaction."""
        with self._store.transaction():
            booking = self._store.booking(transaction)
            if booking is None:
                return None
            taken_in = (self._store.message(transaction, event) for event in EVENTS)
            return Known(booking, tuple(message for message in taken_in if message is not None))

    def bookings(self) -> list[Booking]:
        """All of the books, in the order in which the transactions came."""
        with self._store.transaction():
            return self._store.bookings()

    def gaps(self, terminal: str, epoch: int) -> list[tuple[int, int]]:
        """Envelope numbers that have not come although a later one has, as (first, last)."""
        with self._store.transaction():
            return self._store.gaps(terminal, epoch)

    def checkpoints(self) -> list[Checkpoint]:
        """Of each terminal and epoch the newest."""
        with self._store.transaction():
            return self._store.newest_checkpoints()

    def forks(self) -> list[Fork]:
        """Checkpoints that contradict others, in the order in which they came. Each wants a person."""
        with self._store.transaction():
            return self._store.forks()

    def _verified(self, body: bytes) -> tuple[Envelope, str]:
        """The envelope, if a registered terminal signed it, and the id of the key that it used."""
        try:
            signed = jose.read(body, ENVELOPE_TYPE)
        except JoseError as error:
            raise Refused(Problem.MALFORMED, str(error)) from error
        with self._store.transaction():
            key = self._store.terminal_key(signed.kid)
        if key is None:
            raise Refused(Problem.TERMINAL_UNKNOWN, "register the signing key that the header names")
        try:
            envelope = messages.read_envelope(signed.verified(keys.signing_public_key(key.public_pem)))
        except JoseError as error:
            raise Refused(Problem.SIGNATURE_WRONG, str(error)) from error
        except msgspec.MsgspecError as error:
            raise Refused(Problem.MALFORMED, str(error)) from error
        if (envelope.terminal, envelope.merchant) != (key.terminal, key.merchant):
            raise Refused(Problem.TERMINAL_UNKNOWN, "the key is registered for another terminal or merchant")
        return envelope, signed.kid

    def _fork(self, envelope: Checkpoint, kid: str, known: Message | None) -> Refused | None:
        if known is not None:
            return Refused(Problem.CONFLICT, "the first one stands, and its countersignature with it")
        if self._store.number_taken(envelope.terminal, envelope.epoch, envelope.number):
            return _number_reused(envelope)
        detail = contradiction(envelope, kid, self._store)
        return None if detail is None else Refused(Problem.FORK, detail)

    def _take_in(self, envelope: Checkpoint, kid: str, sha256: str) -> str:
        """The countersignature; the first checkpoint of an epoch registers the epoch."""
        now_ms = self._wall_ms()
        answer = self._sign(
            Countersignature(
                checkpoint=envelope.checkpoint,
                terminal=envelope.terminal,
                epoch=envelope.epoch,
                sequence=envelope.sequence,
                mac=envelope.mac,
                envelope=sha256,
                answered_at=now_ms,
            )
        )
        if self._store.epoch(envelope.terminal, envelope.epoch) is None:
            self._store.add_epoch(Epoch(envelope.terminal, envelope.epoch, kid, envelope.epoch_of))
        self._store.add_checkpoint(envelope, now_ms)
        self._store.add_message(
            Message(
                envelope.checkpoint, _CHECKPOINT, envelope.terminal, envelope.epoch, envelope.number, sha256, answer
            ),
            now_ms,
        )
        return answer

    def _book(self, envelope: SaleEnvelope, sha256: str) -> Answer:
        match envelope:
            case Authorisation():
                return self._book_sale(envelope, sha256)
            case Reversal():
                return self._book_reversal(envelope, sha256)

    def _book_sale(self, envelope: Authorisation, sha256: str) -> Answer:
        tombstone = self._store.booking(envelope.transaction)
        if tombstone is not None:
            self._store.change_booking(envelope.transaction, State.TOMBSTONE, "declined", "reversed")
            return self._answer(envelope, sha256, "declined", reason="reversed", rrn=tombstone.rrn)
        record = self._unseal(envelope)
        book = _CardBook(self._store, self.keys.card, envelope.transaction)
        decision = decide(envelope, record, Issuer(self._imk_ac, book, self._today))
        booking = Booking(
            transaction=envelope.transaction,
            terminal=envelope.terminal,
            merchant=envelope.merchant,
            amount=envelope.amount,
            currency=envelope.currency,
            state=State.BOOKED if decision.approved else State.DECLINED,
            decision="approved" if decision.approved else "declined",
            reason=decision.reason,
            authorisation_code=decision.authorisation_code,
            rrn=self._store.next_rrn(),
            card_ref=self._card_ref(decision.pan, envelope.merchant),
            last4=None if decision.pan is None else decision.pan.digits[-4:],
        )
        self._store.add_booking(booking)
        return self._sale_answer(envelope, sha256, booking, decision)

    def _book_reversal(self, envelope: Reversal, sha256: str) -> Answer:
        booking = self._store.booking(envelope.transaction)
        if booking is None:
            booking = Booking(
                transaction=envelope.transaction,
                terminal=envelope.terminal,
                merchant=envelope.merchant,
                amount=envelope.amount,
                currency=envelope.currency,
                state=State.TOMBSTONE,
                decision=None,
                reason=envelope.reason,
                authorisation_code=None,
                rrn=self._store.next_rrn(),
                card_ref=None,
                last4=None,
            )
            self._store.add_booking(booking)
        elif (booking.terminal, booking.amount, booking.currency) != (
            envelope.terminal,
            envelope.amount,
            envelope.currency,
        ):
            raise Refused(Problem.SALE_MISMATCH, "terminal, amount or currency differ: nothing was reversed")
        elif booking.state is State.BOOKED:
            self._store.change_booking(envelope.transaction, State.REVERSED, booking.decision, envelope.reason)
        return self._answer(
            envelope, sha256, "reversed", reason=envelope.reason, rrn=booking.rrn, card_ref=booking.card_ref
        )

    def _unseal(self, envelope: Authorisation) -> bytes:
        if envelope.host_key != self.keys.sealing_id:
            raise Refused(Problem.CANNOT_UNSEAL, f"it is sealed to key {envelope.host_key}, which is not here")
        try:
            sealed = jose.from_base64url(envelope.sealed)
            return _SEALING.decrypt(sealed, self.keys.sealing, info=messages.sealing_info(envelope))
        except (JoseError, InvalidTag) as error:
            # No decline: a terminal erases its copy on a decline, and this may be a mistake that can be put right.
            raise Refused(Problem.CANNOT_UNSEAL, "it is damaged, or sealed for another sale") from error

    def _sale_answer(self, envelope: Authorisation, sha256: str, booking: Booking, decision: Decision) -> Answer:
        return self._answer(
            envelope,
            sha256,
            "approved" if decision.approved else "declined",
            reason=booking.reason,
            rrn=booking.rrn,
            card_ref=booking.card_ref,
            authorisation_code=booking.authorisation_code,
            issuer_data=decision.issuer_data.hex() or None,
        )

    def _answer(
        self,
        envelope: SaleEnvelope,
        sha256: str,
        decision: Literal["approved", "declined", "reversed"],
        *,
        reason: str | None,
        rrn: str,
        card_ref: str | None = None,
        authorisation_code: str | None = None,
        issuer_data: str | None = None,
    ) -> Answer:
        return Answer(
            event=_event(envelope),
            transaction=envelope.transaction,
            terminal=envelope.terminal,
            amount=envelope.amount,
            currency=envelope.currency,
            envelope=sha256,
            decision=decision,
            reason=reason,
            authorisation_code=authorisation_code,
            rrn=rrn,
            card_ref=card_ref,
            issuer_data=issuer_data,
            answered_at=self._wall_ms(),
        )

    def _sign(self, answer: Answer | Countersignature) -> str:
        return jose.sign(msgspec.json.encode(answer), typ=ANSWER_TYPE, kid=self.keys.answer_id, key=self.keys.answer)

    def _card_ref(self, pan: Pan | None, merchant: str) -> str | None:
        if pan is None:
            return None
        fresh = self._entropy(_CARD_REF_BYTES).hex()
        return self._store.card_ref(_card_hash(self.keys.card, pan.digits), merchant, fresh)


class _CardBook:
    """The issuer's memory, in the host's books, on behalf of one transaction (and inside its database transaction)."""

    def __init__(self, store: Store, card_key: bytes, transaction: str) -> None:
        self._store = store
        self._card_key = card_key
        self._transaction = transaction

    def account(self, pan: str, psn: str) -> Account | None:
        return self._store.account(_card_hash(self._card_key, pan, psn))

    def claim_counter(self, pan: str, psn: str, atc: int, cryptogram: bytes) -> bytes:
        """A cryptogram pays for one transaction: in any other it counts as replayed, even if it is the same one."""
        card = _card_hash(self._card_key, pan, psn)
        first, transaction = self._store.claim_counter(card, atc, cryptogram, self._transaction)
        return first if transaction == self._transaction else b""


def _card_hash(key: bytes, *digits: str) -> bytes:
    """Recognises a PAN, or a PAN and its sequence number, without keeping it."""
    return hmac.digest(key, "|".join(digits).encode(), "sha256")


def _number_reused(envelope: Envelope) -> Refused:
    return Refused(
        Problem.NUMBER_REUSED,
        f"terminal {envelope.terminal} has used number {envelope.number} of epoch {envelope.epoch}: "
        "its store was restored or copied without a new epoch",
    )


def _event(envelope: SaleEnvelope) -> Literal["authorisation", "reversal"]:
    match envelope:
        case Authorisation():
            return "authorisation"
        case Reversal():
            return "reversal"

"""The host itself, without HTTP: takes signed envelopes, keeps books, gives signed answers.

`Host.receive` is the whole promise. An envelope is verified (who signed it, and is it about what the request says),
then taken in under one lock and one database transaction: the same envelope again gets the stored answer, another one
for the same event is refused, a new one is decided and booked. Nothing that is refused leaves a trace in the books.
`Host.countersign` does the same for checkpoints, only that one which contradicts earlier ones is remembered as a fork,
`Host.close_batch` for a day's end, `Host.certify` for a client certificate. `Host.reconcile` only looks.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from enum import Enum
from pathlib import Path
from typing import Final, Literal, TypeVar

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
    ENVELOPE_BYTES_MAX,
    ENVELOPE_TYPE,
    EVENTS,
    STATUS_TYPE,
    Advice,
    Answer,
    Authorisation,
    Batch,
    BatchAnswer,
    CertificateAnswer,
    CertificateRequest,
    Checkpoint,
    Countersignature,
    DecisionName,
    Envelope,
    EventName,
    Numbered,
    Reconciliation,
    ReconciliationAnswer,
    Refund,
    Reversal,
    Signable,
    Sum,
    TerminalStatus,
    Total,
    TransactionEnvelope,
)
from hwsim.host.store import (
    Booking,
    DayTotal,
    Entry,
    Epoch,
    Fork,
    Gap,
    Issued,
    Message,
    State,
    Store,
    StoreError,
    TerminalKey,
    TerminalSummary,
)
from hwsim.issuer import Account, Issuer

_CHECKPOINT: Final = "checkpoint"
_BATCH: Final = "batch"
_CARD_REF_BYTES: Final = 12
_MISSING_MAX: Final = 64  # ranges that one answer names
_ENTRIES_MAX: Final = 64
_CONFIGURATION_CHARACTERS_MAX: Final = 64
_SEALING: Final = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)

_E = TypeVar("_E", bound=Envelope)
_N = TypeVar("_N", bound=Numbered)

_log = logging.getLogger(__name__)


class Problem(Enum):
    """Why an envelope is no decision: HTTP status, stable word, title (RFC 9457)."""

    MALFORMED = 400, "malformed", "The body is not a signed envelope of version 1"
    PATH_MISMATCH = 400, "path-mismatch", "Path and envelope do not name the same thing"
    TERMINAL_UNKNOWN = 403, "terminal-unknown", "The terminal or its signing key is not registered here"
    TERMINAL_REVOKED = 403, "terminal-revoked", "The terminal is revoked: only reversals and checkpoints are taken in"
    CERTIFICATE_MISMATCH = 403, "certificate-mismatch", "The client certificate is another terminal's"
    SIGNATURE_WRONG = 403, "signature-wrong", "The envelope is not signed with the key that it names"
    TERMINAL_NOT_FOUND = 404, "terminal-not-found", "No terminal of this name is registered here"
    CONFLICT = 409, "conflict", "This came before with another envelope"
    NUMBER_REUSED = 409, "number-reused", "This envelope number came before with another envelope"
    SALE_MISMATCH = 409, "sale-mismatch", "The envelope is not about the sale or refund that was received"
    SALE_REFUNDED = 409, "sale-refunded", "Something of the sale has been paid back: it cannot be reversed any more"
    FORK = 409, "fork", "The checkpoint contradicts what this terminal has shown before"
    CANNOT_UNSEAL = 422, "cannot-unseal", "The card data does not open with the host's key for this sale"
    SALE_NOT_RECEIVED = 425, "sale-not-received", "The sale that this is about has not come yet"

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
    """No decision, and nothing was booked. Sending the same envelope again will not help: a person has to look.

    (`SALE_NOT_RECEIVED` excepted, which the sale's arrival cures.)
    """

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
        self.wall_ms = wall_ms
        self._today = today
        self._entropy = entropy
        self._store = Store(directory / "host.db")
        self._authority = tls.load_authority(directory)
        self._seen_ms: dict[str, int] = {}  # by terminal; only registered ones get here

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

    def revoke(self, terminal: str) -> None:
        """Take nothing more from this terminal but what settles the past. Raises `StoreError` if there is none."""
        self._admit(terminal, revoked=True)

    def readmit(self, terminal: str) -> None:
        """Take everything from it again. Raises `StoreError`."""
        self._admit(terminal, revoked=False)

    def _admit(self, terminal: str, *, revoked: bool) -> None:
        with self._store.transaction():
            if not self._store.registered(terminal):
                raise StoreError(f"no terminal {terminal} is registered: nothing was changed")
            self._store.set_revoked(terminal, self.wall_ms() if revoked else None)

    def set_configuration(self, version: str) -> None:
        """The version of the configuration that terminals should have. Raises `StoreError` if it is no such word."""
        if not version.isprintable() or not 0 < len(version) <= _CONFIGURATION_CHARACTERS_MAX:
            raise StoreError("a version is one line of at most 64 characters: nothing was changed")
        with self._store.transaction():
            self._store.set_configuration(version)

    def receive(self, transaction: str, event: str, body: bytes, *, by: str | None = None) -> Reply:
        """Take in an envelope that came for this transaction and event. Raises `Refused`.

        `by` is here and below the terminal that the connection's client certificate names, if one was asked for.
        """
        envelope, _ = self._verified(body, by)
        if isinstance(envelope, Checkpoint | Batch | Reconciliation | CertificateRequest) or (
            envelope.transaction,
            _event(envelope),
        ) != (transaction, event):
            raise Refused(Problem.PATH_MISMATCH, "the envelope is for another transaction or event than the request")
        return self._take_in(transaction, event, envelope, body, self._book)

    def close_batch(self, batch: str, body: bytes, *, by: str | None = None) -> Reply:
        """Compare a day's end with the books. Raises `Refused`."""
        envelope = self._expected(body, by, Batch, "batch", batch)
        return self._take_in(batch, _BATCH, envelope, body, self._compare_batch)

    def countersign(self, checkpoint: str, body: bytes, *, by: str | None = None) -> Reply:
        """Take in a checkpoint that came under this id. Raises `Refused`; what contradicts earlier ones is kept."""
        envelope, kid = self._verified(body, by)
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
                answer = self._register_place(envelope, kid, sha256)
                self._store.add_message(_message(checkpoint, _CHECKPOINT, envelope, sha256, answer), self.wall_ms())
                return Reply(answer, repeated=False)
            self._store.add_fork(
                Fork(
                    envelope=sha256,
                    terminal=envelope.terminal,
                    epoch=envelope.epoch,
                    number=envelope.number,
                    sequence=envelope.sequence,
                    detail=refusal.detail,
                    first_received_ms=self.wall_ms(),
                )
            )
        # Raised only here, or the note would be undone with everything else.
        _log.error("host: terminal %s, epoch %d: %s", envelope.terminal, envelope.epoch, refusal)
        raise refusal

    def reconcile(self, reconciliation: str, body: bytes, *, by: str | None = None) -> Reply:
        """What the books hold of a range of transactions, now. It leaves no trace, so it is answered anew each time."""
        envelope = self._expected(body, by, Reconciliation, "reconciliation", reconciliation)
        with self._store.transaction():
            entries = self._store.entries(envelope.terminal, envelope.epoch, envelope.first, envelope.last)
        missing = _missing(entries, envelope.first, envelope.last)
        answer = ReconciliationAnswer(
            reconciliation=reconciliation,
            terminal=envelope.terminal,
            epoch=envelope.epoch,
            first=envelope.first,
            last=envelope.last,
            envelope=hashlib.sha256(body).hexdigest(),
            totals=_totals(entries),
            received=len(entries),
            missing=missing[:_MISSING_MAX],
            missing_more=len(missing) > _MISSING_MAX,
            digest=hashlib.sha256(b"".join(_line(entry) for entry in entries)).hexdigest(),
            entries=[
                (each.sequence, each.transaction, each.state.value, each.amount, each.currency) for each in entries
            ],
            answered_at=self.wall_ms(),
        )
        signed = self._sign(answer) if len(entries) <= _ENTRIES_MAX else None
        if signed is None or len(signed) > ENVELOPE_BYTES_MAX:
            signed = self._sign(msgspec.structs.replace(answer, entries=None))
        return Reply(signed, repeated=False)

    def certify(self, certificate: str, body: bytes, *, by: str | None = None) -> Reply:
        """Issue a TLS client certificate to a terminal that proves by its signing key who it is. Raises `Refused`."""
        envelope = self._expected(body, by, CertificateRequest, "certificate", certificate)
        sha256 = hashlib.sha256(body).hexdigest()
        with self._store.transaction():
            known = self._store.issued(certificate)
            if known is not None:
                if known.envelope_sha256 != sha256:
                    raise Refused(Problem.CONFLICT, "the first one stands, and its answer with it")
                self._store.count_repeated_request(certificate)
                return Reply(known.answer, repeated=True)
            answer, expires_ms = self._issue(envelope, sha256)
            self._store.add_issued(Issued(certificate, envelope.terminal, sha256, answer, expires_ms), self.wall_ms())
        return Reply(answer, repeated=False)

    def status(self, terminal: str) -> str:
        """What the operator wants of this terminal, signed. Raises `Refused`."""
        with self._store.transaction():
            if not self._store.registered(terminal):
                raise Refused(Problem.TERMINAL_NOT_FOUND, "have it registered")
            status = TerminalStatus(
                terminal=terminal,
                configuration=self._store.configuration(),
                revoked=self._store.revoked(terminal),
                time=self.wall_ms(),
            )
        return self._sign(status, STATUS_TYPE)

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

    def page(self, before: int | None, limit: int) -> list[tuple[int, Booking]]:
        """The newest bookings, each with its place; before a place, if one is given."""
        with self._store.transaction():
            return self._store.page(before, limit)

    def day_totals(self, days: int) -> list[DayTotal]:
        """Of the newest days, newest first."""
        with self._store.transaction():
            return self._store.day_totals(days)

    def terminals(self) -> list[TerminalSummary]:
        """All that are registered, by name."""
        with self._store.transaction():
            terminals = self._store.terminals()
        return [
            replace(each, last_received_ms=max(each.last_received_ms or 0, self._seen_ms.get(each.terminal, 0)) or None)
            for each in terminals
        ]

    def configuration(self) -> str | None:
        """The version of the configuration that terminals should have."""
        with self._store.transaction():
            return self._store.configuration()

    def gaps(self, terminal: str, epoch: int) -> list[tuple[int, int]]:
        """Envelope numbers that have not come although a later one has, as (first, last)."""
        with self._store.transaction():
            return self._store.gaps(terminal, epoch)

    def all_gaps(self) -> list[Gap]:
        """The same of all terminals and epochs."""
        with self._store.transaction():
            return self._store.all_gaps()

    def checkpoints(self) -> list[Checkpoint]:
        """Of each terminal and epoch the newest."""
        with self._store.transaction():
            return self._store.newest_checkpoints()

    def forks(self) -> list[Fork]:
        """Checkpoints that contradict others, in the order in which they came. Each wants a person."""
        with self._store.transaction():
            return self._store.forks()

    def _expected(self, body: bytes, by: str | None, kind: type[_E], member: str, id_: str) -> _E:
        """The envelope, if it is of this kind and has this id."""
        envelope, _ = self._verified(body, by)
        if not isinstance(envelope, kind) or getattr(envelope, member) != id_:
            raise Refused(Problem.PATH_MISMATCH, f"the envelope is not the {member} that the request names")
        return envelope

    def _verified(self, body: bytes, by: str | None) -> tuple[Envelope, str]:
        """The envelope, if a registered terminal signed it that may, and the id of the key that it used."""
        try:
            signed = jose.read(body, ENVELOPE_TYPE)
        except JoseError as error:
            raise Refused(Problem.MALFORMED, str(error)) from error
        with self._store.transaction():
            key = self._store.terminal_key(signed.kid)
            revoked = key is not None and self._store.revoked(key.terminal)
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
        if by is not None and by != envelope.terminal:
            raise Refused(Problem.CERTIFICATE_MISMATCH, f"it was issued to terminal {by}")
        # What settles the past is taken in all the same: a customer's money must not hang on a stolen terminal.
        if revoked and not isinstance(envelope, Reversal | Checkpoint):
            raise Refused(Problem.TERMINAL_REVOKED, "ask the operator")
        self._seen_ms[envelope.terminal] = self.wall_ms()
        return envelope, signed.kid

    def _take_in(
        self, id_: str, event: str, envelope: _N, body: bytes, decide_on: Callable[[_N, str], Signable]
    ) -> Reply:
        """Once per id and event: the same envelope again gets the stored answer, a new one is decided on and stored."""
        sha256 = hashlib.sha256(body).hexdigest()
        with self._store.transaction():
            known = self._store.message(id_, event)
            if known is not None:
                if known.envelope_sha256 != sha256:
                    raise Refused(Problem.CONFLICT, "the first one stands, and its answer with it")
                self._store.count_repetition(id_, event)
                return Reply(known.answer, repeated=True)
            if self._store.number_taken(envelope.terminal, envelope.epoch, envelope.number):
                raise _number_reused(envelope)
            answer = self._sign(decide_on(envelope, sha256))
            self._store.add_message(_message(id_, event, envelope, sha256, answer), self.wall_ms())
        return Reply(answer, repeated=False)

    def _fork(self, envelope: Checkpoint, kid: str, known: Message | None) -> Refused | None:
        if known is not None:
            return Refused(Problem.CONFLICT, "the first one stands, and its countersignature with it")
        if self._store.number_taken(envelope.terminal, envelope.epoch, envelope.number):
            return _number_reused(envelope)
        detail = contradiction(envelope, kid, self._store)
        return None if detail is None else Refused(Problem.FORK, detail)

    def _register_place(self, envelope: Checkpoint, kid: str, sha256: str) -> str:
        """The countersignature; the first checkpoint of an epoch registers the epoch."""
        now_ms = self.wall_ms()
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
        return answer

    def _compare_batch(self, envelope: Batch, sha256: str) -> BatchAnswer:
        entries = self._store.entries(envelope.terminal, envelope.epoch, envelope.first, envelope.last)
        totals, missing = _totals(entries), _missing(entries, envelope.first, envelope.last)
        return BatchAnswer(
            batch=envelope.batch,
            terminal=envelope.terminal,
            epoch=envelope.epoch,
            first=envelope.first,
            last=envelope.last,
            envelope=sha256,
            decision="balanced" if _figures(totals) == _figures(envelope.totals) else "differs",
            totals=totals,
            missing=missing[:_MISSING_MAX],
            missing_more=len(missing) > _MISSING_MAX,
            answered_at=self.wall_ms(),
        )

    def _issue(self, envelope: CertificateRequest, sha256: str) -> tuple[str, int | None]:
        """The answer to a request, and when its certificate expires (None: it was declined)."""
        chain, reason, expires_ms = None, None, None
        try:
            issued = self._authority.issue_client(envelope.csr.encode(), envelope.terminal, self.wall_ms())
        except tls.RequestRefused as refused:
            reason = refused.word
        else:
            chain, expires_ms = issued.chain.decode(), issued.expires_ms
        answer = CertificateAnswer(
            certificate=envelope.certificate,
            terminal=envelope.terminal,
            envelope=sha256,
            decision="declined" if chain is None else "issued",
            reason=reason,
            chain=chain,
            answered_at=self.wall_ms(),
        )
        return self._sign(answer), expires_ms

    def _book(self, envelope: TransactionEnvelope, sha256: str) -> Answer:
        match envelope:
            case Authorisation():
                return self._book_sale(envelope, sha256)
            case Refund():
                return self._book_refund(envelope, sha256)
            case Advice():
                return self._note_advice(envelope, sha256)
            case Reversal():
                return self._book_reversal(envelope, sha256)

    def _book_sale(self, envelope: Authorisation, sha256: str) -> Answer:
        tombstone = self._tombstone(envelope)
        if tombstone is not None:
            return self._answer(envelope, sha256, "declined", reason="reversed", rrn=tombstone.rrn)
        record = self._unseal(envelope)
        book = _CardBook(self._store, self.keys.card, envelope.transaction)
        decision = decide(envelope, record, Issuer(self._imk_ac, book, self._today))
        booking = self._booking(
            envelope,
            State.BOOKED if decision.approved else State.DECLINED,
            "approved" if decision.approved else "declined",
            decision.reason,
            authorisation_code=decision.authorisation_code,
            card_ref=self._card_ref(decision.pan, envelope.merchant),
            last4=None if decision.pan is None else decision.pan.digits[-4:],
        )
        self._store.add_booking(booking)
        return self._sale_answer(envelope, sha256, booking, decision)

    def _book_refund(self, envelope: Refund, sha256: str) -> Answer:
        tombstone = self._tombstone(envelope)
        if tombstone is not None:
            return self._answer(envelope, sha256, "declined", reason="reversed", rrn=tombstone.rrn)
        sale = self._store.booking(envelope.of)
        if sale is None:
            raise Refused(Problem.SALE_NOT_RECEIVED, "send the refund again when the sale has been answered")
        reason = self._refund_refusal(envelope, sale)
        booking = self._booking(
            envelope,
            State.BOOKED if reason is None else State.DECLINED,
            "approved" if reason is None else "declined",
            reason,
            authorisation_code=None if reason else self._authorisation_code(),
            card_ref=None if reason else sale.card_ref,
            last4=None if reason else sale.last4,
            of=envelope.of,
        )
        self._store.add_booking(booking)
        return self._answer(
            envelope,
            sha256,
            "approved" if reason is None else "declined",
            reason=reason,
            rrn=booking.rrn,
            card_ref=booking.card_ref,
            authorisation_code=booking.authorisation_code,
        )

    def _refund_refusal(self, envelope: Refund, sale: Booking) -> str | None:
        """Why nothing is paid back, as a word; None if it is."""
        if sale.merchant != envelope.merchant or sale.kind != "sale":
            return "unknown_sale"  # of another merchant's sales not even their existence is told
        if sale.state is not State.BOOKED:
            return "not_sold"
        if sale.currency != envelope.currency:
            return "currency_mismatch"
        if self._store.refunded(sale.transaction) + envelope.amount > sale.amount:
            return "over_refunded"
        return None

    def _note_advice(self, envelope: Advice, sha256: str) -> Answer:
        """What the card said last stands beside the sale. Whether the sale is money is not the card's to say here."""
        sale = self._store.booking(envelope.transaction)
        if sale is None:
            raise Refused(Problem.SALE_NOT_RECEIVED, "send the advice again when the sale has been answered")
        _same(envelope, sale)
        self._unseal(envelope)
        self._store.note_advice(envelope.transaction, envelope.outcome)
        return self._answer(envelope, sha256, "noted", reason=None, rrn=sale.rrn, card_ref=sale.card_ref)

    def _book_reversal(self, envelope: Reversal, sha256: str) -> Answer:
        booking = self._store.booking(envelope.transaction)
        if booking is None:
            booking = self._booking(envelope, State.TOMBSTONE, None, envelope.reason)
            self._store.add_booking(booking)
        else:
            _same(envelope, booking)
            if booking.state is State.BOOKED:
                if self._store.refunded(booking.transaction):
                    raise Refused(Problem.SALE_REFUNDED, "nothing was reversed: refund what is left")
                self._store.change_booking(envelope.transaction, State.REVERSED, booking.decision, envelope.reason)
        return self._answer(
            envelope, sha256, "reversed", reason=envelope.reason, rrn=booking.rrn, card_ref=booking.card_ref
        )

    def _tombstone(self, envelope: Authorisation | Refund) -> Booking | None:
        """The tombstone that waits for this sale or refund, which is declined with that; None if there is none."""
        booking = self._store.booking(envelope.transaction)
        if booking is None:
            return None
        _same(envelope, booking)
        self._store.change_booking(envelope.transaction, State.TOMBSTONE, "declined", "reversed")
        of = envelope.of if isinstance(envelope, Refund) else None
        self._store.place_booking(envelope.transaction, envelope.epoch, envelope.number, envelope.sequence, of)
        return booking

    def _booking(
        self,
        envelope: Authorisation | Refund | Reversal,
        state: State,
        decision: Literal["approved", "declined"] | None,
        reason: str | None,
        *,
        authorisation_code: str | None = None,
        card_ref: str | None = None,
        last4: str | None = None,
        of: str | None = None,
    ) -> Booking:
        return Booking(
            transaction=envelope.transaction,
            terminal=envelope.terminal,
            merchant=envelope.merchant,
            amount=_signed_minor(envelope),
            currency=envelope.currency,
            state=state,
            decision=decision,
            reason=reason,
            authorisation_code=authorisation_code,
            rrn=self._store.next_rrn(),
            card_ref=card_ref,
            last4=last4,
            epoch=envelope.epoch,
            number=envelope.number,
            first_received_ms=self.wall_ms(),
            sequence=envelope.sequence,
            kind=envelope.kind,
            of=of,
        )

    def _unseal(self, envelope: Authorisation | Advice) -> bytes:
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
        envelope: TransactionEnvelope,
        sha256: str,
        decision: DecisionName,
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
            answered_at=self.wall_ms(),
        )

    def _sign(self, answer: Signable, typ: str = ANSWER_TYPE) -> str:
        return jose.sign(msgspec.json.encode(answer), typ=typ, kid=self.keys.answer_id, key=self.keys.answer)

    def _authorisation_code(self) -> str:
        return f"{int.from_bytes(self._entropy(4)) % 1_000_000:06d}"

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


def _number_reused(envelope: Numbered) -> Refused:
    return Refused(
        Problem.NUMBER_REUSED,
        f"terminal {envelope.terminal} has used number {envelope.number} of epoch {envelope.epoch}: "
        "its store was restored or copied without a new epoch",
    )


def _message(id_: str, event: str, envelope: Numbered, sha256: str, answer: str) -> Message:
    return Message(id_, event, envelope.terminal, envelope.epoch, envelope.number, sha256, answer)


def _event(envelope: TransactionEnvelope) -> EventName:
    match envelope:
        case Authorisation():
            return "authorisation"
        case Refund():
            return "refund"
        case Advice():
            return "advice"
        case Reversal():
            return "reversal"


def _signed_minor(envelope: TransactionEnvelope) -> int:
    """What it means for the merchant: a refund is negative."""
    return envelope.amount if envelope.kind == "sale" else -envelope.amount


def _same(envelope: TransactionEnvelope, booking: Booking) -> None:
    """Raises `Refused` unless both are about the same sale or refund."""
    if (booking.terminal, booking.kind, booking.amount, booking.currency) != (
        envelope.terminal,
        envelope.kind,
        _signed_minor(envelope),
        envelope.currency,
    ):
        raise Refused(Problem.SALE_MISMATCH, "terminal, kind, amount or currency differ: nothing was changed")


def _line(entry: Entry) -> bytes:
    return f"{entry.sequence} {entry.transaction} {entry.state.value} {entry.amount} {entry.currency}\n".encode()


def _totals(entries: Sequence[Entry]) -> list[Total]:
    """What is booked, by currency: sales and refunds counted, sales less refunds summed."""
    sums: dict[str, tuple[int, int]] = {}
    for entry in entries:
        if entry.state is State.BOOKED:
            count, total = sums.get(entry.currency, (0, 0))
            sums[entry.currency] = count + 1, total + entry.amount
    return [Total(currency, *sums[currency]) for currency in sorted(sums)][: messages.CURRENCIES_MAX]


def _figures(totals: Iterable[Total | Sum]) -> dict[str, tuple[int, int]]:
    """For comparing: that nothing was sold in a currency need not be said."""
    return {each.currency: (each.count, each.sum) for each in totals if each.count or each.sum}


def _missing(entries: Sequence[Entry], first: int, last: int) -> list[tuple[int, int]]:
    """Sequence numbers of which nothing has come, as (first, last)."""
    missing, next_ = [], first
    for sequence in [*(entry.sequence for entry in entries), last + 1]:
        if sequence > next_:
            missing.append((next_, sequence - 1))
        next_ = max(next_, sequence + 1)
    return missing

"""Envelopes to the host, and its answers (docs/formats.md, Sealed card data, Envelope and answer).

Card data is sealed with HPKE to the host's public key, bound to its sale by the `info` string: this terminal cannot
open it again. The envelope around it is a signed JWS, so that whoever carries it can withhold it but not alter it. An
answer counts only with the host's signature over exactly the sale and the envelope that were sent. Any JOSE library
reads both.

A checkpoint is an envelope without a sale: it says how far the journal has come. With the host's countersignature over
it, nobody who holds every key of this terminal can replace what was recorded before without the host seeing it.
"""

from __future__ import annotations

import hashlib
import re
import struct
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeVar
from uuid import UUID

import msgspec
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from terminal.ledger import jws as signatures
from terminal.ledger.days import by_currency
from terminal.ledger.errors import AnswerRejected
from terminal.ledger.journal import PAYLOAD_BYTES_MAX, Position
from terminal.ledger.keys import key_id
from terminal.ledger.values import Answer, Batch, Event, ReversalReason, Transaction, Verdict

CARD_BYTES_MAX: Final = 4096  # the data objects of the online record are under 600 bytes
ENVELOPE_CHARS_MAX: Final = PAYLOAD_BYTES_MAX  # it must fit beside its record in the journal
ANSWER_CHARS_MAX: Final = PAYLOAD_BYTES_MAX
ENTRIES_MAX: Final = 64  # the host names single transactions from there on down (docs/host-api.yaml)
_ID: Final = re.compile(r"[\x21-\x7e]{1,64}", re.ASCII)

_SUITE: Final = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
_SEALING_ADDS_BYTES: Final = 48  # encapsulated key and tag
ENVELOPE_TYPE: Final = "payterm-envelope"
_ANSWER_TYPE: Final = "payterm-answer"
_STATUS_TYPE: Final = "payterm-status"


def digest(jws: str) -> str:
    """SHA-256 of an envelope as it is sent, in hex: what an answer refers to."""
    return hashlib.sha256(jws.encode("ascii")).hexdigest()


def sealing_info(host_key_id: str, terminal: str, epoch: int, transaction: Transaction) -> bytes:
    """What binds sealed card data to its sale; whoever opens it must build the same."""
    name = terminal.encode("ascii")
    return b"".join((
        b"payterm sealed card 1\0",
        bytes.fromhex(host_key_id),
        bytes((len(name),)),
        name,
        struct.pack(">I", epoch),
        transaction.id.bytes,
        struct.pack(">Q", transaction.amount.minor),
        transaction.amount.currency.code.encode("ascii"),
    ))  # fmt: skip


class Envelopes:
    """Seals and signs for one terminal in one epoch."""

    def __init__(
        self,
        signing_key: Ed25519PrivateKey,
        host_sealing_key: X25519PublicKey,
        terminal: str,
        merchant: str,
        epoch: int,
    ) -> None:
        for name in (terminal, merchant):
            if not _ID.fullmatch(name):
                raise ValueError(f"{name!r} is no id: 1 to 64 printable ASCII characters without blanks")
        self._signing_key = signing_key
        self._verifying_key = signing_key.public_key()
        self._host_sealing_key = host_sealing_key
        self._host_key_id = key_id(host_sealing_key)
        self._kid = key_id(self._verifying_key)
        self.terminal: Final = terminal
        self._merchant = merchant
        self._epoch = epoch

    def authorisation(
        self,
        transaction: Transaction,
        *,
        number: int,
        card: bytes,
        deferred: bool,
        kernel: int,
        scheme: str,
        oda: str,
        cvm: str,
    ) -> str:
        """Ask the host to authorise, or (`deferred`) to take over what was accepted here. `card`: BER-TLV in clear."""
        return self._sign({
            **self._facts(transaction, Event.AUTHORISATION, number),
            "deferred": deferred,
            "kernel": kernel,
            "scheme": scheme,
            "oda": oda,
            "cvm": cvm,
            **self._sealed(transaction, card),
        })  # fmt: skip

    def advice(
        self, transaction: Transaction, *, number: int, card: bytes, kernel: int, scheme: str, completed: bool
    ) -> str:
        """Tell the host what an inserted card said last of a sale that it had approved. `card`: BER-TLV in clear."""
        return self._sign({
            **self._facts(transaction, Event.ADVICE, number),
            "kernel": kernel,
            "scheme": scheme,
            "outcome": "completed" if completed else "refused",
            **self._sealed(transaction, card),
        })  # fmt: skip

    def refund(self, refund: Transaction, *, number: int) -> str:
        """Ask the host to pay back to the card of the sale: it knows that card, so nothing of it is said here."""
        return self._sign({**self._facts(refund, Event.REFUND, number), "of": str(refund.of)})

    def reversal(self, transaction: Transaction, *, number: int, reason: ReversalReason) -> str:
        """Tell the host that the sale did not happen."""
        return self._sign({**self._facts(transaction, Event.REVERSAL, number), "reason": reason.value})

    def reconciliation(self, id_: UUID, *, first: int, last: int, asked_at_ms: int) -> str:
        """Ask the host what it holds of these transactions. It changes nothing there, so it has no number."""
        return self._sign({
            "v": 1,
            "event": "reconciliation",
            "reconciliation": str(id_),
            "terminal": self.terminal,
            "merchant": self._merchant,
            "epoch": self._epoch,
            "number": None,
            "first": first,
            "last": last,
            "asked_at": asked_at_ms,
        })  # fmt: skip

    def certificate(self, id_: UUID, *, csr: str, asked_at_ms: int) -> str:
        """Ask the host to sign a TLS client key. It has no number: nothing is missing if it never arrives."""
        return self._sign({
            "v": 1,
            "event": "certificate",
            "certificate": str(id_),
            "terminal": self.terminal,
            "merchant": self._merchant,
            "epoch": self._epoch,
            "number": None,
            "csr": csr,
            "asked_at": asked_at_ms,
        })  # fmt: skip

    def batch(
        self,
        batch: Batch,
        *,
        number: int,
        unsent: Iterable[tuple[str, int, int]],
        clock_synchronised: bool,
    ) -> str:
        """The day's end: so much this terminal believes to have sold. `unsent`: currency code, count, minor units."""
        return self._sign({
            "v": 1,
            "event": Event.BATCH.value,
            "batch": str(batch.id),
            "terminal": self.terminal,
            "merchant": self._merchant,
            "epoch": self._epoch,
            "number": number,
            "first": batch.first,
            "last": batch.last,
            "totals": _sums(by_currency(batch.sold)),
            "unsent": _sums(unsent),
            "taken_at": batch.taken_at_ms,
            "clock_synchronised": clock_synchronised,
        })  # fmt: skip

    def checkpoint(
        self,
        id_: UUID,
        *,
        number: int,
        sequence: int,
        mac: bytes,
        totals: Iterable[tuple[str, int, int]],
        unsent: Iterable[tuple[str, int, int]],
        archived: Position | None,
        keys: Sequence[str],
        taken_at_ms: int,
        clock_synchronised: bool,
        epoch_of: Mapping[str, Any] | None = None,
    ) -> str:
        """Show the host where the journal stands: `sequence` and `mac` of a record that is durable.

        `totals` (what is sold) and `unsent` are (currency code, count, sum in minor units); `keys` are the ids of the
        keys in use. `epoch_of` is the epoch, sequence and mac that this epoch continues, as in its first record; None
        for a terminal's first. It is said with every checkpoint, since the first one of an epoch may never arrive.
        """
        if epoch_of is not None and not (epoch_of["epoch"] < self._epoch and epoch_of["sequence"] < sequence):
            raise ValueError("an epoch continues an earlier one, and a checkpoint of it is about a later record")
        return self._sign({
            "v": 1,
            "event": Event.CHECKPOINT.value,
            "checkpoint": str(id_),
            "terminal": self.terminal,
            "merchant": self._merchant,
            "epoch": self._epoch,
            "number": number,
            "sequence": sequence,
            "mac": mac.hex(),
            "epoch_of": None if epoch_of is None else {name: epoch_of[name] for name in ("epoch", "sequence", "mac")},
            "totals": _sums(totals),
            "unsent": _sums(unsent),
            "archived": None if archived is None else {"sequence": archived.sequence, "mac": archived.mac.hex()},
            "keys": list(keys),
            "taken_at": taken_at_ms,
            "clock_synchronised": clock_synchronised,
        })  # fmt: skip

    def _sealed(self, transaction: Transaction, card: bytes) -> dict[str, str]:
        if not 0 < len(card) <= CARD_BYTES_MAX:
            raise ValueError(f"card data has 1 to {CARD_BYTES_MAX} bytes")
        info = sealing_info(self._host_key_id, self.terminal, self._epoch, transaction)
        sealed = _SUITE.encrypt(card, self._host_sealing_key, info=info)
        # Only the host can open it; what can be seen from here is that it is not the plaintext.
        if len(sealed) != len(card) + _SEALING_ADDS_BYTES or card in sealed:
            raise ValueError("sealing the card data failed")
        return {"host_key": self._host_key_id, "sealed": urlsafe_b64encode(sealed).rstrip(b"=").decode()}

    def _facts(self, transaction: Transaction, event: Event, number: int) -> dict[str, Any]:
        return {
            "v": 1,
            "event": event.value,
            "transaction": str(transaction.id),
            "terminal": self.terminal,
            "merchant": self._merchant,
            "epoch": self._epoch,
            "number": number,
            "kind": transaction.kind.value,
            "amount": transaction.amount.minor,
            "currency": transaction.amount.currency.code,
            "opened_at": transaction.opened_at_ms,
            "clock_synchronised": transaction.clock_synchronised,
            "sequence": transaction.number,
        }

    def _sign(self, payload: dict[str, Any]) -> str:
        encoded = msgspec.json.encode(payload)
        jws = signatures.sign(encoded, self._signing_key, typ=ENVELOPE_TYPE, kid=self._kid)
        if len(jws) > ENVELOPE_CHARS_MAX:
            raise ValueError(f"an envelope has at most {ENVELOPE_CHARS_MAX} characters")
        # Verify before writing: the host refuses a bad signature only when the customer is long gone.
        if signatures.verify(jws, self._verifying_key, typ=ENVELOPE_TYPE, kid=self._kid) != encoded:
            raise ValueError("the signed envelope does not read back")
        return jws


def _sums(figures: Iterable[tuple[str, int, int]]) -> list[dict[str, Any]]:
    return [{"currency": code, "count": count, "sum": sum_minor} for code, count, sum_minor in figures]


_Word = Annotated[str, msgspec.Meta(pattern=r"\A[\x20-\x7e]*\Z", max_length=64)]  # goes to screens and receipts
_Hex = Annotated[
    str, msgspec.Meta(pattern=r"\A(?:[0-9A-Fa-f]{2})*\Z", max_length=1024)
]  # scripts: 2 of 128 bytes at most


_Count = Annotated[int, msgspec.Meta(ge=1, le=2**53 - 1)]
_CURRENCIES_MAX: Final = 64
_RANGES_MAX: Final = 64


class _Sum(msgspec.Struct, frozen=True):
    """What the host holds in one currency; minor units."""

    currency: Annotated[str, msgspec.Meta(pattern=r"\A[A-Z]{3}\Z")]
    count: Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
    sum: Annotated[int, msgspec.Meta(ge=1 - 2**53, le=2**53 - 1)]


class _Answer(msgspec.Struct, frozen=True):
    """The payload of an answer, version 1. Names that are not listed are ignored: a host may say more."""

    v: Literal[1]
    event: Literal["authorisation", "refund", "advice", "reversal"]
    transaction: UUID
    terminal: str
    amount: int
    currency: str
    envelope: str
    decision: Literal["approved", "declined", "noted", "reversed"]
    reason: _Word | None
    authorisation_code: _Word | None
    rrn: _Word | None
    card_ref: _Word | None
    issuer_data: _Hex | None
    answered_at: int


class _Countersignature(msgspec.Struct, frozen=True):
    """The payload of the answer to a checkpoint, version 1."""

    v: Literal[1]
    event: Literal["checkpoint"]
    checkpoint: UUID
    terminal: str
    envelope: str
    decision: Literal["countersigned"]
    answered_at: int


class _BatchAnswer(msgspec.Struct, frozen=True):
    """The payload of the answer to a batch, version 1."""

    v: Literal[1]
    event: Literal["batch"]
    batch: UUID
    terminal: str
    first: int
    last: int
    envelope: str
    decision: Literal["balanced", "differs"]
    totals: Annotated[tuple[_Sum, ...], msgspec.Meta(max_length=_CURRENCIES_MAX)]
    missing: Annotated[tuple[tuple[_Count, _Count], ...], msgspec.Meta(max_length=_RANGES_MAX)]
    answered_at: int


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A transaction as the host has it. `amount` in minor units, negative for a refund."""

    sequence: Annotated[int, msgspec.Meta(ge=1)]
    transaction: UUID
    state: Literal["booked", "declined", "reversed", "tombstone"]
    amount: int
    currency: Annotated[str, msgspec.Meta(pattern=r"\A[A-Z]{3}\Z")]


class Reconciled(msgspec.Struct, frozen=True):
    """The payload of the answer to a reconciliation, version 1. What is not read here is for people's own tools."""

    v: Literal[1]
    event: Literal["reconciliation"]
    reconciliation: UUID
    terminal: str
    first: int
    last: int
    envelope: str
    decision: Literal["compared"]
    received: int
    digest: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    entries: Annotated[tuple[Entry, ...], msgspec.Meta(max_length=ENTRIES_MAX)] | None
    answered_at: int


class Issued(msgspec.Struct, frozen=True):
    """The payload of the answer to a certificate request, version 1."""

    v: Literal[1]
    event: Literal["certificate"]
    certificate: UUID
    terminal: str
    envelope: str
    decision: Literal["issued", "declined"]
    reason: _Word | None
    chain: str | None
    answered_at: int


class TerminalStatus(msgspec.Struct, frozen=True):
    """What the operator wants of a terminal, version 1."""

    v: Literal[1]
    terminal: str
    configuration: _Word | None
    revoked: bool
    time: Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]


_Payload = TypeVar("_Payload", _Answer, _Countersignature, _BatchAnswer, Reconciled, Issued, TerminalStatus)
_DECIDED: Final = frozenset({Verdict.APPROVED, Verdict.DECLINED})
_MAY_ANSWER: Final = {Event.REVERSAL: frozenset({Verdict.REVERSED}), Event.ADVICE: frozenset({Verdict.NOTED})}


def verify_answer(
    jws: str,
    answer_key: Ed25519PublicKey,
    *,
    transaction: Transaction,
    event: Event,
    terminal: str,
    envelope: str,
) -> Answer:
    """The host's answer to one envelope (`envelope` is its `digest`). Raises `AnswerRejected`; its `reason` says why.

    Reasons: `size`, `form`, `signature`, `header`, or the name of what is not as it was sent.
    """
    answer = _read(jws, answer_key, _Answer)
    sent: dict[str, object] = {
        "transaction": transaction.id,
        "event": event.value,
        "terminal": terminal,
        "amount": transaction.amount.minor,
        "currency": transaction.amount.currency.code,
        "envelope": envelope,
    }
    _compare(answer, sent)
    decision = Verdict(answer.decision)
    if decision not in _MAY_ANSWER.get(event, _DECIDED):
        raise AnswerRejected("decision", f"'{decision}' answers no {event}")
    return Answer(
        transaction=answer.transaction,
        event=event,
        envelope=answer.envelope,
        decision=decision,
        reason=answer.reason,
        authorisation_code=answer.authorisation_code,
        rrn=answer.rrn,
        card_ref=answer.card_ref,
        issuer_data=None if answer.issuer_data is None else bytes.fromhex(answer.issuer_data),
        answered_at_ms=answer.answered_at,
    )


def verify_countersignature(
    jws: str, answer_key: Ed25519PublicKey, *, id_: UUID, terminal: str, envelope: str
) -> Answer:
    """The host's answer to one checkpoint: `transaction` of the result is the checkpoint's id.

    Raises `AnswerRejected` like `verify_answer`. What was countersigned (epoch, record, MAC) is what the envelope says.
    """
    answer = _read(jws, answer_key, _Countersignature)
    _compare(answer, {"checkpoint": id_, "terminal": terminal, "envelope": envelope})
    return _of_no_sale(answer.checkpoint, Event.CHECKPOINT, answer)


def verify_batch(jws: str, answer_key: Ed25519PublicKey, *, id_: UUID, terminal: str, envelope: str) -> Answer:
    """The host's answer to a day's end: `transaction` of the result is the batch's id. Raises `AnswerRejected`."""
    answer = _read(jws, answer_key, _BatchAnswer)
    _compare(answer, {"batch": id_, "terminal": terminal, "envelope": envelope})
    return _of_no_sale(answer.batch, Event.BATCH, answer)


def _of_no_sale(id_: UUID, event: Event, answer: _Countersignature | _BatchAnswer) -> Answer:
    return Answer(
        transaction=id_,
        event=event,
        envelope=answer.envelope,
        decision=Verdict(answer.decision),
        reason=None,
        authorisation_code=None,
        rrn=None,
        card_ref=None,
        issuer_data=None,
        answered_at_ms=answer.answered_at,
    )


def verify_reconciliation(
    jws: str, answer_key: Ed25519PublicKey, *, id_: UUID, terminal: str, first: int, last: int, envelope: str
) -> Reconciled:
    """What the host holds of a range. Raises `AnswerRejected` like `verify_answer`."""
    answer = _read(jws, answer_key, Reconciled)
    sent = {"reconciliation": id_, "terminal": terminal, "first": first, "last": last, "envelope": envelope}
    _compare(answer, sent)
    numbers = [entry.sequence for entry in answer.entries or ()]
    if numbers != sorted(set(numbers)) or not all(first <= number <= last for number in numbers):
        raise AnswerRejected("entries", "its entries are not those of the range")
    return answer


def verify_certificate(jws: str, answer_key: Ed25519PublicKey, *, id_: UUID, terminal: str, envelope: str) -> Issued:
    """The host's answer to a certificate request. Raises `AnswerRejected` like `verify_answer`."""
    answer = _read(jws, answer_key, Issued)
    _compare(answer, {"certificate": id_, "terminal": terminal, "envelope": envelope})
    if (answer.decision == "issued") != (answer.chain is not None):
        raise AnswerRejected("chain", "it says one thing and means another")
    return answer


def verify_terminal_status(jws: str, answer_key: Ed25519PublicKey, *, terminal: str) -> TerminalStatus:
    """What the host says of this terminal. Raises `AnswerRejected` like `verify_answer`."""
    status = _read(jws, answer_key, TerminalStatus, _STATUS_TYPE)
    _compare(status, {"terminal": terminal})
    return status


def _read(jws: str, answer_key: Ed25519PublicKey, kind: type[_Payload], typ: str = _ANSWER_TYPE) -> _Payload:
    """What the host has signed, if it is of this kind."""
    if len(jws) > ANSWER_CHARS_MAX:
        raise AnswerRejected("size", f"it is longer than {ANSWER_CHARS_MAX} characters")
    try:
        payload = signatures.verify(jws, answer_key, typ=typ, kid=key_id(answer_key))
    except signatures.JwsError as error:
        raise AnswerRejected(error.reason, str(error)) from error
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AnswerRejected("form", str(error)) from error


def _compare(answer: msgspec.Struct, sent: Mapping[str, object]) -> None:
    for name, expected in sent.items():
        if getattr(answer, name) != expected:
            raise AnswerRejected(name, f"its {name} is not what was sent")

"""Envelopes that only the host opens, and answers that only the host can give."""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from jwt.api_jws import PyJWS
from ledger_rig import CARD_TLV, MERCHANT, TERMINAL, TEST_PAN, FixedClock, Host, seeded

from terminal.ledger.errors import AnswerRejected
from terminal.ledger.journal import Position
from terminal.ledger.keys import Ed25519PrivateKey, key_id
from terminal.ledger.sealing import (
    ANSWER_CHARS_MAX,
    CARD_BYTES_MAX,
    Envelopes,
    digest,
    verify_answer,
    verify_countersignature,
)
from terminal.ledger.states import State
from terminal.ledger.values import Answer, Event, Kind, ReversalReason, Transaction, Verdict
from terminal.money import EUR, USD, Amount

HOST = Host()
SIGNING = Ed25519PrivateKey.from_private_bytes(seeded(2)(32))
ENVELOPES = Envelopes(SIGNING, HOST.sealing.public_key(), TERMINAL, MERCHANT, 1)
SALE = Transaction(
    id=UUID(int=99, version=4),
    number=5,
    kind=Kind.SALE,
    amount=Amount(1250, EUR),
    reference=None,
    opened_at_ms=FixedClock().now_ms,
    clock_synchronised=False,
    state=State.OPENED,
)


def authorisation(sale: Transaction = SALE, card: bytes = CARD_TLV, deferred: bool = True) -> str:
    return ENVELOPES.authorisation(
        sale, number=7, card=card, deferred=deferred, kernel=3, scheme="visa", oda="fdda", cvm="none"
    )


def verify(jws: str, envelope: str, event: Event = Event.AUTHORISATION, **changed: Any) -> Answer:
    expected: dict[str, Any] = {"transaction": SALE, "event": event, "terminal": TERMINAL, "envelope": digest(envelope)}
    return verify_answer(jws, HOST.signing.public_key(), **(expected | changed))


def test_the_host_reads_what_was_meant() -> None:
    jws = authorisation()
    whole = PyJWS().decode_complete(jws, SIGNING.public_key(), algorithms=["EdDSA"])
    assert whole["header"] == {"alg": "EdDSA", "typ": "payterm-envelope", "kid": key_id(SIGNING.public_key())}
    said = json.loads(whole["payload"])
    sealed = said.pop("sealed")
    assert "=" not in sealed
    assert said == {
        "v": 1,
        "event": "authorisation",
        "transaction": str(SALE.id),
        "terminal": TERMINAL,
        "merchant": MERCHANT,
        "epoch": 1,
        "number": 7,
        "kind": "sale",
        "amount": 1250,
        "currency": "EUR",
        "opened_at": SALE.opened_at_ms,
        "clock_synchronised": False,
        "sequence": 5,
        "deferred": True,
        "kernel": 3,
        "scheme": "visa",
        "oda": "fdda",
        "cvm": "none",
        "host_key": key_id(HOST.sealing.public_key()),
    }
    assert HOST.unseal(jws, SALE) == CARD_TLV
    assert TEST_PAN not in repr(HOST.read(jws))


@pytest.mark.parametrize(
    "other",
    [replace(SALE, id=UUID(int=98)), replace(SALE, amount=Amount(1251, EUR)), replace(SALE, amount=Amount(1250, USD))],
)
def test_sealed_card_data_fits_its_sale_only(other: Transaction) -> None:
    with pytest.raises(InvalidTag):
        HOST.unseal(authorisation(), other)
    with pytest.raises(InvalidTag):
        HOST.unseal(authorisation(), SALE, epoch=2)


def test_the_binding_is_as_documented() -> None:
    """docs/formats.md, Sealed card data: byte by byte, without the code under test."""
    host_key = bytes.fromhex(key_id(HOST.sealing.public_key()))
    info = b"payterm sealed card 1\x00" + host_key + b"\x06till-1" + b"\x00\x00\x00\x01" + SALE.id.bytes
    info += (1250).to_bytes(8, "big") + b"EUR"
    sealed = HOST.read(authorisation())["sealed"]
    suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    assert suite.decrypt(urlsafe_b64decode(sealed + "=="), HOST.sealing, info=info) == CARD_TLV


def test_a_reversal_holds_no_card() -> None:
    said = HOST.read(ENVELOPES.reversal(SALE, number=8, reason=ReversalReason.TIMEOUT))
    assert (said["event"], said["reason"], said["number"]) == ("reversal", "timeout", 8)
    assert "sealed" not in said


def test_limits() -> None:
    with pytest.raises(ValueError, match=str(CARD_BYTES_MAX)):
        authorisation(card=b"x" * (CARD_BYTES_MAX + 1))
    assert len(authorisation(card=b"x" * CARD_BYTES_MAX)) < ANSWER_CHARS_MAX
    with pytest.raises(ValueError, match="id"):
        Envelopes(SIGNING, HOST.sealing.public_key(), "till 1", MERCHANT, 1)


@pytest.mark.parametrize("decision", ["approved", "declined"])
def test_an_honest_answer_is_believed(decision: str) -> None:
    envelope = authorisation()
    answer = verify(HOST.answer(envelope, decision, issuer_data="910A01020304", new_in_version_1="ignored"), envelope)
    assert answer.decision is Verdict(decision)
    assert answer.issuer_data == bytes.fromhex("910A01020304")
    assert (answer.authorisation_code, answer.card_ref, answer.reason) == ("123456", "card-ref-1", None)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"amount": 1251}, "amount"),
        ({"amount": 1250.0}, "form"),
        ({"amount": "1250"}, "form"),
        ({"currency": "USD"}, "currency"),
        ({"transaction": str(UUID(int=1))}, "transaction"),
        ({"transaction": "no uuid"}, "form"),
        ({"terminal": "till-2"}, "terminal"),
        ({"envelope": "00" * 32}, "envelope"),
        ({"event": "reversal"}, "event"),
        ({"event": "void"}, "form"),
        ({"decision": "reversed"}, "decision"),
        ({"decision": "APPROVED"}, "form"),
        ({"decision": None}, "form"),
        ({"v": 2}, "form"),
        ({"v": True}, "form"),
        ({"reason": "x" * 65}, "form"),
        ({"reason": "ok\n"}, "form"),
        ({"card_ref": 5}, "form"),
        ({"issuer_data": "91f"}, "form"),
        ({"answered_at": None}, "form"),
    ],
)
def test_a_signed_answer_must_fit(changed: dict[str, Any], reason: str) -> None:
    envelope = authorisation()
    with pytest.raises(AnswerRejected) as caught:
        verify(HOST.sign(HOST.claims(envelope, "approved") | changed), envelope)
    assert caught.value.reason == reason


def encoded(part: object) -> str:
    return urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def forgeries(envelope: str) -> dict[str, tuple[str, str]]:
    """What somebody in the middle may try, and how it is refused."""
    honest = HOST.answer(envelope)
    header, payload, signature = honest.split(".")
    claims, key = HOST.claims(envelope, "approved"), key_id(HOST.signing.public_key())
    head = {"typ": "payterm-answer", "kid": key}
    public = HOST.signing.public_key().public_bytes_raw()
    return {
        "another key": (Host(seed=2).answer(envelope), "signature"),
        "no signature": (f"{header}.{payload}.", "signature"),
        "alg none": (f"{encoded(head | {'alg': 'none'})}.{payload}.", "signature"),
        "alg none, signed": (f"{encoded(head | {'alg': 'none'})}.{payload}.{signature}", "signature"),
        "public key as HMAC key": (
            PyJWS().encode(json.dumps(claims).encode(), public, algorithm="HS256", headers=head),
            "signature",
        ),
        "altered": (f"{header}.{encoded(HOST.claims(envelope, 'declined'))}.{signature}", "signature"),
        "another type": (HOST.sign(claims, typ="payterm-envelope"), "header"),
        "another key id": (HOST.sign(claims, kid="0" * 16), "header"),
        "a key in the header": (HOST.sign(claims, jwk={"kty": "OKP"}), "header"),
        "critical extension": (HOST.sign(claims, crit=["b64"], x=1), "header"),
        "the envelope itself": (envelope, "signature"),
        "too long": (honest + "A" * ANSWER_CHARS_MAX, "size"),
        "not ASCII": (honest + "é", "form"),
        "blank": (honest + " ", "form"),
        "padded": (honest + "==", "form"),
        "another spelling": (honest[:-1] + chr(ord(honest[-1]) ^ 1), "form"),
        "nothing": ("", "form"),
        "not JSON": (PyJWS().encode(b"\xff", HOST.signing, "EdDSA", head), "form"),
        "a list": (PyJWS().encode(b"[]", HOST.signing, "EdDSA", head), "form"),
    }


@pytest.mark.parametrize("forgery", forgeries(authorisation()))
def test_a_forged_answer_is_refused(forgery: str) -> None:
    envelope = authorisation()
    jws, reason = forgeries(envelope)[forgery]
    with pytest.raises(AnswerRejected) as caught:
        verify(jws, envelope)
    assert caught.value.reason == reason
    verify(HOST.answer(envelope), envelope)  # control: the honest one is believed


def test_answers_of_other_events_do_not_serve() -> None:
    reversal = ENVELOPES.reversal(SALE, number=8, reason=ReversalReason.VOID)
    assert verify(HOST.answer(reversal, "reversed"), reversal, Event.REVERSAL).decision is Verdict.REVERSED
    with pytest.raises(AnswerRejected):
        verify(HOST.answer(reversal, "approved"), reversal, Event.REVERSAL)
    with pytest.raises(AnswerRejected):
        verify(HOST.answer(authorisation(), "approved"), reversal)


# Checkpoints

CHECKPOINT = UUID(int=7, version=4)
MAC = bytes(range(32))


def checkpoint(id_: UUID = CHECKPOINT, **changed: Any) -> str:
    said: dict[str, Any] = {
        "number": 9,
        "sequence": 212,
        "mac": MAC,
        "totals": [("EUR", 41, 104_250), ("JPY", 1, 500)],
        "unsent": [("EUR", 2, 2_500)],
        "archived": Position(100, MAC[::-1]),
        "keys": ["0f1e2d3c"],
        "taken_at_ms": FixedClock().now_ms,
        "clock_synchronised": True,
    }
    return Envelopes(SIGNING, HOST.sealing.public_key(), TERMINAL, MERCHANT, 4).checkpoint(id_, **(said | changed))


def countersigned(envelope: str, /, **changed: Any) -> dict[str, Any]:
    return {
        "v": 1,
        "event": "checkpoint",
        "checkpoint": str(CHECKPOINT),
        "terminal": TERMINAL,
        "envelope": digest(envelope),
        "decision": "countersigned",
        "answered_at": 1_790_000_000_500,
    } | changed


def believed(jws: str, envelope: str) -> Answer:
    key = HOST.signing.public_key()
    return verify_countersignature(jws, key, id_=CHECKPOINT, terminal=TERMINAL, envelope=digest(envelope))


def test_a_checkpoint_says_where_the_journal_stands() -> None:
    of = {"epoch": 3, "sequence": 120, "mac": "ab" * 32, "chain_key": "not for the host"}
    whole = PyJWS().decode_complete(checkpoint(epoch_of=of), SIGNING.public_key(), algorithms=["EdDSA"])
    assert whole["header"] == {"alg": "EdDSA", "typ": "payterm-envelope", "kid": key_id(SIGNING.public_key())}
    assert json.loads(whole["payload"]) == {
        "v": 1,
        "event": "checkpoint",
        "checkpoint": str(CHECKPOINT),
        "terminal": TERMINAL,
        "merchant": MERCHANT,
        "epoch": 4,
        "number": 9,
        "sequence": 212,
        "mac": MAC.hex(),
        "epoch_of": {"epoch": 3, "sequence": 120, "mac": "ab" * 32},
        "totals": [{"currency": "EUR", "count": 41, "sum": 104_250}, {"currency": "JPY", "count": 1, "sum": 500}],
        "unsent": [{"currency": "EUR", "count": 2, "sum": 2_500}],
        "archived": {"sequence": 100, "mac": MAC[::-1].hex()},
        "keys": ["0f1e2d3c"],
        "taken_at": FixedClock().now_ms,
        "clock_synchronised": True,
    }


@pytest.mark.parametrize(("epoch", "sequence"), [(4, 120), (5, 120), (3, 212), (3, 300)])
def test_a_checkpoint_continues_what_was_before_it(epoch: int, sequence: int) -> None:
    with pytest.raises(ValueError, match="continues an earlier one"):
        checkpoint(epoch_of={"epoch": epoch, "sequence": sequence, "mac": "ab" * 32})


def test_a_countersignature_is_believed() -> None:
    envelope = checkpoint()
    answer = believed(HOST.sign(countersigned(envelope, sequence=212, new_in_version_1="ignored")), envelope)
    assert (answer.transaction, answer.event, answer.decision) == (CHECKPOINT, Event.CHECKPOINT, Verdict.COUNTERSIGNED)
    assert (answer.envelope, answer.answered_at_ms) == (digest(envelope), 1_790_000_000_500)
    assert (answer.authorisation_code, answer.card_ref, answer.issuer_data) == (None, None, None)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"checkpoint": str(UUID(int=1))}, "checkpoint"),
        ({"terminal": "till-2"}, "terminal"),
        ({"envelope": digest(checkpoint(number=10))}, "envelope"),
        ({"event": "authorisation"}, "form"),
        ({"decision": "approved"}, "form"),
        ({"decision": None}, "form"),
        ({"v": 2}, "form"),
        ({"answered_at": None}, "form"),
    ],
)
def test_a_countersignature_must_fit(changed: dict[str, Any], reason: str) -> None:
    envelope = checkpoint()
    with pytest.raises(AnswerRejected) as caught:
        believed(HOST.sign(countersigned(envelope, **changed)), envelope)
    assert caught.value.reason == reason


def test_only_the_host_countersigns() -> None:
    envelope = checkpoint()
    for forged in (Host(seed=2).sign(countersigned(envelope)), envelope, HOST.sign(countersigned(envelope))[:-4]):
        with pytest.raises(AnswerRejected):
            believed(forged, envelope)


def test_a_countersignature_answers_no_sale_and_no_answer_countersigns() -> None:
    sale, envelope = authorisation(), checkpoint()
    as_sale = countersigned(sale, transaction=str(SALE.id), amount=1250, currency="EUR", decision="approved")
    for event in Event:
        with pytest.raises(AnswerRejected):
            verify(HOST.sign(as_sale), sale, event)
    with pytest.raises(AnswerRejected):
        believed(HOST.sign(HOST.claims(sale, "approved") | {"envelope": digest(envelope)}), envelope)

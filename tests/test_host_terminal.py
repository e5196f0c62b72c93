"""The terminal's envelopes and the host's answers, each made by one implementation and read by the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from host_rig import Rig, Sender, make_bureau, register, rig
from jwt.api_jws import PyJWS
from test_host_server import schema

from hwsim.host import Host
from terminal.ledger.journal import Position
from terminal.ledger.sealing import Envelopes, digest, verify_answer, verify_countersignature
from terminal.ledger.states import State
from terminal.ledger.values import Batch, Event, Figure, Kind, ReversalReason, Transaction, Verdict
from terminal.money import EUR, Amount

SALE = Transaction(
    id=UUID("8f2f9c1e-4c59-4c39-9d0a-6a3a1f0f7d11"),
    number=57,
    kind=Kind.SALE,
    amount=Amount(1250, EUR),
    reference="table 7",
    opened_at_ms=1_718_280_000_000,
    clock_synchronised=True,
    state=State.AUTHORISING,
)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Rig]:
    with rig(tmp_path / "host", *make_bureau()) as made:
        yield made


@pytest.fixture
def sender(place: Rig) -> Sender:
    """Only for its card and its keys: the envelopes here are the terminal's own."""
    return Sender(place.public, place.card, signing_key=Ed25519PrivateKey.generate())


@pytest.fixture
def host(place: Rig, sender: Sender) -> Iterator[Host]:
    with place.open() as opened:
        register(opened, sender, place.card)
        yield opened


@pytest.mark.parametrize("reason", ReversalReason)
def test_each_understands_what_the_other_writes(host: Host, sender: Sender, reason: ReversalReason) -> None:
    envelopes = Envelopes(sender.signing_key, sender.sealing_key, sender.terminal, sender.merchant, 3)
    sale = envelopes.authorisation(
        SALE, number=1, card=sender.record(1250), deferred=True, kernel=3, scheme="visa", oda="ok", cvm="none"
    )
    reversal = envelopes.reversal(SALE, number=2, reason=reason)
    for event, envelope, verdict in (
        (Event.AUTHORISATION, sale, Verdict.APPROVED),
        (Event.REVERSAL, reversal, Verdict.REVERSED),
    ):
        reply = host.receive(str(SALE.id), event.value, envelope.encode())
        answer = verify_answer(
            reply.answer,
            sender.answer_key,
            transaction=SALE,
            event=event,
            terminal=sender.terminal,
            envelope=digest(envelope),
        )
        assert answer.decision is verdict


def test_a_checkpoint_is_understood_and_so_is_its_countersignature(host: Host, sender: Sender) -> None:
    for epoch, epoch_of in ((3, None), (4, {"epoch": 3, "sequence": 212, "mac": "ab" * 32})):
        envelopes = Envelopes(sender.signing_key, sender.sealing_key, sender.terminal, sender.merchant, epoch)
        id_ = UUID(int=epoch, version=4)
        envelope = envelopes.checkpoint(
            id_,
            number=1,
            sequence=212 if epoch == 3 else 240,
            mac=b"\xab" * 32,
            totals=[("EUR", 41, 104_250)],
            unsent=[],
            archived=Position(100, bytes(32)),
            keys=["0f1e2d3c", "9a8b7c6d5e4f3021"],
            taken_at_ms=1_718_280_000_000,
            clock_synchronised=True,
            epoch_of=epoch_of,
        )
        reply = host.countersign(str(id_), envelope.encode())
        answer = verify_countersignature(
            reply.answer, sender.answer_key, id_=id_, terminal=sender.terminal, envelope=digest(envelope)
        )
        assert answer.decision is Verdict.COUNTERSIGNED


def written(sender: Sender) -> dict[str, str]:
    """Every kind of envelope that a terminal makes."""
    made = Envelopes(sender.signing_key, sender.sealing_key, sender.terminal, sender.merchant, 3)
    refund = replace(SALE, kind=Kind.REFUND, of=SALE.id, id=UUID(int=9, version=4))
    sold = (Figure(EUR, "Visa", 41, 104_250), Figure(EUR, "Mastercard", 2, -300))
    batch = Batch(UUID(int=5, version=4), 1, 1, 57, sold, (), 1_718_280_000_000, None, None, ())
    card = sender.record(1250)
    return {
        "authorisation": made.authorisation(
            SALE, number=1, card=card, deferred=True, kernel=3, scheme="visa", oda="ok", cvm="none"
        ),
        "refund": made.refund(refund, number=2),
        "advice": made.advice(SALE, number=3, card=card, kernel=0, scheme="visa", completed=False),
        "reversal": made.reversal(SALE, number=4, reason=ReversalReason.CARD),
        "checkpoint": made.checkpoint(
            UUID(int=6, version=4),
            number=5,
            sequence=212,
            mac=bytes(32),
            totals=[("EUR", 43, 103_950)],
            unsent=[],
            archived=None,
            keys=["0f1e2d3c"],
            taken_at_ms=1_718_280_000_000,
            clock_synchronised=False,
        ),
        "batch": made.batch(batch, number=6, unsent=[("EUR", 1, 1250)], clock_synchronised=True),
        "reconciliation": made.reconciliation(UUID(int=7, version=4), first=1, last=57, asked_at_ms=1_718_280_000_000),
        "certificate": made.certificate(UUID(int=8, version=4), csr="-----BEGIN", asked_at_ms=1_718_280_000_000),
    }


def test_what_the_terminal_writes_is_what_the_interface_says(sender: Sender) -> None:
    for event, envelope in written(sender).items():
        payload = json.loads(PyJWS().decode(envelope, options={"verify_signature": False}))
        assert payload["event"] == event
        schema("Envelope").validate(payload)
        with pytest.raises(Exception, match="is not valid under any"):
            schema("Envelope").validate(payload | {"more": 1})

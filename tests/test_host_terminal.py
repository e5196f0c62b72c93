"""The terminal's envelopes and the host's answers, each made by one implementation and read by the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from host_rig import Rig, Sender, make_bureau, register, rig

from hwsim.host import Host
from terminal.ledger.journal import Position
from terminal.ledger.sealing import Envelopes, digest, verify_answer, verify_countersignature
from terminal.ledger.states import State
from terminal.ledger.values import Event, Kind, ReversalReason, Transaction, Verdict
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

"""Nothing in the state directory can be read without the keys, and what was erased is gone.

The search looks for each secret as bytes, hex in either case, text and base64, in every file; a control plants each and
finds it.
"""

from __future__ import annotations

import shutil
import sqlite3
from base64 import b64encode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from ledger_rig import CARD_TLV, TEST_PAN, TRACK2, Rig, slots_start, verified

from terminal.ledger.values import Decision, Event, ReversalReason


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "state")
    yield rig
    rig.close_all()


def shapes(secret: bytes) -> set[bytes]:
    """How a secret may look in a file. Base64 has three alignments; the part that all neighbours leave alone counts."""
    found = {secret, secret.hex().encode(), secret.hex().upper().encode()}
    for shift in range(3):
        for encode in (b64encode, urlsafe_b64encode):
            found.add(encode(bytes(shift) + secret)[4 if shift else 0 :].rstrip(b"=")[:-1])
    return found


def secrets(rig: Rig) -> dict[str, bytes]:
    signing = rig.keys.signing.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    return {
        "pan": bytes.fromhex(TEST_PAN),
        "pan digits": TEST_PAN.encode(),
        "track 2": TRACK2[:-1],
        "tlv": CARD_TLV,
        "data key": rig.keys.data.current.material,
        "chain key": rig.keys.chain.material,
        "signing key": signing,
        "amount": b'"amount":1250',
        "reference": b"order-4711",
        "card_ref": b"card-ref-1",
        "label": b"TEST DEBIT",
        "authorisation code": b'"123456"',
    }


def found_in(directory: Path, secrets: dict[str, bytes]) -> set[tuple[str, str]]:
    return {
        (path.name, name)
        for path in directory.rglob("*")
        if path.is_file()
        for name, secret in secrets.items()
        for shape in shapes(secret)
        if shape in path.read_bytes()
    }


def a_day(rig: Rig) -> list[bytes]:
    """Sales in every stage; the sealed card data of those that were answered."""
    ledger = rig.open()
    rig.sell(ledger, reference="order-4711")
    declined = rig.begin(ledger)
    ledger.commit_outcome(declined.id, decision=Decision.DECLINED, reason="card")
    sealed = []
    for decision in (Decision.ACCEPTED, Decision.ONLINE):
        sale = rig.sell(ledger, decision)
        envelope = rig.envelope(ledger, sale.id)
        sealed.append(urlsafe_b64decode(rig.host.read(envelope)["sealed"] + "=="))
        ledger.commit_reversal(sale.id, ReversalReason.VOID, rig.reversal(sale, ReversalReason.VOID))
        rig.deliver(ledger, sale.id, Event.AUTHORISATION, rig.host.answer(envelope))
    ledger.note("operator", name="till")
    ledger.flush()
    return sealed


def test_no_secret_in_any_file(rig: Rig) -> None:
    a_day(rig)
    assert {path.name for path in rig.directory.iterdir()} == {"journal", "ledger.db", "ledger.db-wal"}
    assert found_in(rig.directory, secrets(rig)) == set()
    rig.close_all()
    assert found_in(rig.directory, secrets(rig)) == set()


@pytest.mark.parametrize("way", ["plain", "hex", "base64"])
def test_a_planted_secret_is_found(rig: Rig, way: str) -> None:
    """Control: the test above can fail."""
    a_day(rig)
    rig.close_all()
    for name, secret in secrets(rig).items():
        planted = {"plain": secret, "hex": secret.hex().encode(), "base64": b64encode(b"{?" + secret + b"}")}[way]
        with (rig.directory / "journal").open("r+b") as file:
            file.seek(1_000_003)
            file.write(planted)
        assert ("journal", name) in found_in(rig.directory, {name: secret})


def test_answered_card_data_is_gone_from_journal_and_ledger(rig: Rig) -> None:
    """Even what is sealed twice: the stored payloads are remembered, then looked for."""
    ledger = rig.open()
    sale = rig.sell(ledger)
    envelope = rig.envelope(ledger, sale.id)
    ledger.flush()
    content = (rig.directory / "journal").read_bytes()
    payload = content[slots_start(rig.directory) + 2 * 16384 + 4096 :][:200]
    assert any(payload)
    assert found_in(rig.directory, {"payload": payload}) == {("journal", "payload"), ("ledger.db-wal", "payload")}
    rig.deliver(ledger, sale.id, Event.AUTHORISATION, rig.host.answer(envelope))
    cut_off = shutil.copytree(rig.directory, rig.directory.parent / "cut off")
    with closing(sqlite3.connect(cut_off / "ledger.db")) as database:
        assert database.execute("SELECT payload FROM records WHERE sequence = 3").fetchone() == (None,)
    ledger.flush()
    rig.close_all()
    assert found_in(rig.directory, {"payload": payload}) == set()
    assert verified(rig.open()) > 4

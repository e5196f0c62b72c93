"""What the ledger's tests share: keys, a host that can open and answer, media that lose power, and one sale."""

from __future__ import annotations

import json
import random
from base64 import urlsafe_b64decode
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from jwt.api_jws import PyJWS

from terminal.ledger.errors import LedgerCorrupt
from terminal.ledger.journal import BLOCK_BYTES, FileMedium, Medium
from terminal.ledger.keys import Keyring, SecretKey, TerminalKeys, key_id
from terminal.ledger.ledger import Ledger, LedgerSettings
from terminal.ledger.sealing import Envelopes, digest, sealing_info, verify_answer
from terminal.ledger.values import CardSummary, Decision, Event, Transaction
from terminal.money import EUR, Amount

TERMINAL, MERCHANT = "till-1", "shop-1"
TEST_PAN = "4000001234567899"
TRACK2 = bytes.fromhex("4000001234567899D29122010000000000000F")
CARD_TLV = bytes.fromhex("5713") + TRACK2 + bytes.fromhex("5A08") + bytes.fromhex(TEST_PAN)
SMALL = LedgerSettings(journal_size_bytes=16 * 1024 * 1024, wal_size_bytes=256 * 1024)
SUMMARY = CardSummary(
    scheme="visa",
    aid="A0000000031010",
    label="TEST DEBIT",
    last4="7899",
    kernel=3,
    atc=17,
    cryptogram="0102030405060708",
    oda="fdda",
    cvm="none",
)


class FixedClock:
    """Time that passes only when told to."""

    boot_id = UUID(int=7)

    def __init__(self) -> None:
        self.now_ms = 1_790_000_000_000

    def monotonic_ms(self) -> int:
        return self.now_ms - 1_789_999_000_000

    def wall_ms(self) -> int:
        return self.now_ms

    def synchronised(self) -> bool:
        return True


def seeded(seed: int) -> Callable[[int], bytes]:
    return random.Random(seed).randbytes


class Host:
    """The other end: holds the private keys, opens envelopes, answers."""

    def __init__(self, seed: int = 1) -> None:
        chance = seeded(seed)
        self.sealing = X25519PrivateKey.from_private_bytes(chance(32))
        self.signing = Ed25519PrivateKey.from_private_bytes(chance(32))

    def read(self, envelope: str) -> dict[str, Any]:
        return dict(json.loads(PyJWS().decode(envelope, options={"verify_signature": False})))

    def unseal(self, envelope: str, transaction: Transaction, epoch: int = 1) -> bytes:
        sealed = self.read(envelope)["sealed"]
        info = sealing_info(key_id(self.sealing.public_key()), TERMINAL, epoch, transaction)
        suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
        return suite.decrypt(urlsafe_b64decode(sealed + "=" * (-len(sealed) % 4)), self.sealing, info=info)

    def claims(self, envelope: str, decision: str, **changed: Any) -> dict[str, Any]:
        asked = self.read(envelope)
        copied = {name: asked[name] for name in ("event", "transaction", "terminal", "amount", "currency")}
        said = {
            "v": 1,
            "envelope": digest(envelope),
            "decision": decision,
            "reason": None,
            "authorisation_code": "123456",
            "rrn": "000000000001",
            "card_ref": "card-ref-1",
            "issuer_data": None,
            "answered_at": 1_790_000_000_500,
        }
        return copied | said | changed

    def sign(self, claims: dict[str, Any], **header: Any) -> str:
        headers = {"alg": "EdDSA", "typ": "payterm-answer", "kid": key_id(self.signing.public_key())} | header
        return PyJWS().encode(json.dumps(claims).encode(), self.signing, algorithm="EdDSA", headers=headers)

    def answer(self, envelope: str, decision: str = "approved", **changed: Any) -> str:
        return self.sign(self.claims(envelope, decision, **changed))


class MemoryMedium:
    """A journal in memory that knows what was flushed. `power_cut` keeps that, and any part of the rest.

    `on_operation` is called before every write and flush and after every flush, and may raise.
    """

    def __init__(self, size_bytes: int, on_operation: Callable[[str], None] | None = None) -> None:
        self.size_bytes = size_bytes
        self.durable = bytearray(size_bytes)
        self.now = bytearray(size_bytes)
        self.unflushed: list[tuple[int, bytes]] = []  # blocks, in the order of writing
        self.flushes = 0
        self.on_operation = on_operation or (lambda _: None)

    def pread(self, size_bytes: int, offset: int) -> bytes:
        return bytes(self.now[offset : offset + size_bytes])

    def pwrite(self, data: bytes, offset: int) -> None:
        self.on_operation("write")
        assert offset % BLOCK_BYTES == 0
        assert len(data) % BLOCK_BYTES == 0
        assert offset + len(data) <= self.size_bytes
        self.now[offset : offset + len(data)] = data
        for start in range(0, len(data), BLOCK_BYTES):
            self.unflushed.append((offset + start, data[start : start + BLOCK_BYTES]))

    def flush(self) -> None:
        self.on_operation("flush")
        self.flushes += 1
        for offset, block in self.unflushed:
            self.durable[offset : offset + BLOCK_BYTES] = block
        self.unflushed.clear()
        self.on_operation("flushed")

    def close(self) -> None:
        pass

    def power_cut(self, chance: random.Random) -> MemoryMedium:
        """What the next start finds."""
        left = MemoryMedium(self.size_bytes)
        image = bytearray(self.durable)
        for offset, block in self.unflushed:
            match chance.choice(("lost", "written", "torn")):
                case "written":
                    image[offset : offset + BLOCK_BYTES] = block
                case "torn":
                    for sector in range(0, BLOCK_BYTES, 512):
                        if chance.random() < 0.5:
                            image[offset + sector : offset + sector + 512] = block[sector : sector + 512]
                case _:
                    pass
        left.durable[:] = image
        left.now[:] = image
        return left


class CountingMedium(FileMedium):
    """The real file, counting flushes."""

    flushes = 0

    def flush(self) -> None:
        self.flushes += 1
        super().flush()


@dataclass
class Rig:
    """A terminal's ledger with everything around it. `open` may be called again: that is a restart."""

    directory: Path
    host: Host = field(default_factory=Host)
    clock: FixedClock = field(default_factory=FixedClock)
    seed: int = 42
    settings: LedgerSettings = SMALL
    keys: TerminalKeys = field(init=False)
    envelopes: Envelopes = field(init=False)
    _open: list[Ledger] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.entropy = seeded(self.seed)
        self.keys = TerminalKeys(
            data=Keyring(SecretKey(self.entropy(32))),
            chain=SecretKey(self.entropy(32)),
            signing=Ed25519PrivateKey.from_private_bytes(self.entropy(32)),
            host_sealing=self.host.sealing.public_key(),
            host_answer=self.host.signing.public_key(),
        )
        self.envelopes = Envelopes(self.keys.signing, self.keys.host_sealing, TERMINAL, MERCHANT, 1)

    def open(
        self, medium: Callable[[Path, int], Medium] = FileMedium.create, directory: Path | None = None, **changed: Any
    ) -> Ledger:
        ledger = Ledger.open(
            directory or self.directory,
            changed.pop("keys", self.keys),
            clock=self.clock,
            entropy=self.entropy,
            settings=self.settings,
            medium=medium,
        )
        self._open.append(ledger)
        return ledger

    def close_all(self) -> None:
        for ledger in self._open:
            ledger.close()

    def begin(self, ledger: Ledger, minor: int = 1250, reference: str | None = None) -> Transaction:
        self.clock.now_ms += 1000
        return ledger.begin(Amount(minor, EUR), reference)

    def refund(
        self, ledger: Ledger, sale: Transaction, minor: int | None = None, reference: str | None = None
    ) -> Transaction:
        self.clock.now_ms += 1000
        amount = sale.amount if minor is None else Amount(minor, sale.amount.currency)
        return ledger.commit_refund(
            sale.id, amount, reference, lambda refund, number: self.envelopes.refund(refund, number=number)
        )

    def finish(self, ledger: Ledger, transaction: Transaction, decision: Decision = Decision.ACCEPTED) -> Transaction:
        return ledger.commit_outcome(
            transaction.id,
            decision=decision,
            reason="test",
            card=SUMMARY,
            envelope=self.authorisation(transaction, deferred=decision is Decision.ACCEPTED),
        )

    def sell(self, ledger: Ledger, decision: Decision = Decision.ACCEPTED, **kwargs: Any) -> Transaction:
        return self.finish(ledger, self.begin(ledger, **kwargs), decision)

    def authorisation(self, transaction: Transaction, *, deferred: bool) -> Callable[[int], str]:
        def make(number: int) -> str:
            return self.envelopes.authorisation(
                transaction,
                number=number,
                card=CARD_TLV,
                deferred=deferred,
                kernel=3,
                scheme="visa",
                oda="fdda",
                cvm="none",
            )

        return make

    def reversal(self, transaction: Transaction, reason: Any) -> Callable[[int], str]:
        return lambda number: self.envelopes.reversal(transaction, number=number, reason=reason)

    def deliver(self, ledger: Ledger, transaction: UUID, event: Event, jws: str) -> Transaction:
        """What the local socket does with an answer that sync brings."""
        item = ledger.outbox_item(f"{transaction}/{event}")
        answer = verify_answer(
            jws,
            self.keys.host_answer,
            transaction=ledger.transaction(transaction),
            event=event,
            terminal=TERMINAL,
            envelope=item.sha256,
        )
        return ledger.commit_answer(transaction, event, answer, jws)

    def envelope(self, ledger: Ledger, transaction: UUID, event: Event = Event.AUTHORISATION) -> str:
        envelope = ledger.outbox_item(f"{transaction}/{event}").envelope
        assert envelope is not None
        return envelope


def verified(ledger: Ledger) -> int:
    """Go along the whole chain; how many records. Raises `LedgerCorrupt` for the first that is not whole."""
    count, position = 0, None
    while True:
        step = ledger.inspection.verify_some(position)
        if step.first_bad is not None:
            raise LedgerCorrupt(step.first_bad)
        count, position = count + step.records, step.position
        if step.done:
            return count


def slots_start(directory: Path) -> int:
    """Where the first slot lies in the journal's file: that depends on how the file lies on its device."""
    return (directory / "journal").read_bytes().index(b"PTJ1")

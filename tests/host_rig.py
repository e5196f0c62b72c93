"""What the tests of the host have in common: a provisioned host, a card, and a sender of envelopes.

The sender builds envelopes from docs/formats.md with PyJWT and `struct`; it shares no code with the host that reads
them, nor with the terminal.
"""

from __future__ import annotations

import base64
import hashlib
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import jwt
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from cryptography.x509.oid import NameOID

from hwsim.cards.bertlv import encode
from hwsim.cards.cryptogram import CryptogramType, application_cryptogram, issuer_application_data
from hwsim.cards.personalise import Bureau, CardProfile, laboratory_pan, personalise
from hwsim.host import Booking, Host, State, provision

SEED = 20240613
TODAY = date(2024, 6, 13)
TERMINAL, MERCHANT = "T-0001", "M-0001"
# What an answer repeats of the envelope that it is about, by event; all others are about a sale or refund.
REPEATED = {
    "checkpoint": ("event", "checkpoint", "terminal", "epoch", "sequence", "mac"),
    "batch": ("event", "batch", "terminal", "epoch", "first", "last"),
    "reconciliation": ("event", "reconciliation", "terminal", "epoch", "first", "last"),
    "certificate": ("event", "certificate", "terminal"),
}
KEY_FILES = ("host-sealing-key", "host-answer-key")
Payload = dict[str, Any]


def seeded(seed: int = SEED) -> Callable[[int], bytes]:
    return random.Random(seed).randbytes


def make_bureau() -> tuple[Bureau, CardProfile]:
    """One issuer and one card, small keys: nobody here verifies their certificates."""
    bureau = Bureau.create(seeded(), ca_key_bits=1024, issuer_key_bits=1024)
    return bureau, personalise(bureau, seeded(), pan=laboratory_pan(7899))


@dataclass
class Rig:
    """A host in a directory, and what is needed to open it again."""

    directory: Path
    bureau: Bureau
    card: CardProfile
    now_ms: int = 1_718_280_000_000
    entropy: Callable[[int], bytes] = field(default_factory=seeded)

    def open(self, kind: type[Host] = Host) -> Host:
        return kind(
            self.directory,
            imk_ac=self.bureau.imk_ac,
            wall_ms=self._tick,
            today=lambda: TODAY,
            entropy=self.entropy,
        )

    def _tick(self) -> int:
        self.now_ms += 1  # no two answers are given at the same time, so that a second answer would differ
        return self.now_ms

    @property
    def public(self) -> Path:
        return self.directory / "public"


@contextmanager
def rig(directory: Path, bureau: Bureau, card: CardProfile) -> Iterator[Rig]:
    provision(directory, now=datetime.now(UTC), entropy=seeded())
    yield Rig(directory, bureau, card)


def register(host: Host, sender: Sender, card: CardProfile) -> None:
    """What an operator does before the first sale."""
    host.register(sender.terminal, sender.merchant, sender.public_pem)
    host.enrol(card)


@dataclass
class Sender:
    """Builds envelopes as docs/formats.md says, and reads answers."""

    public: Path
    card: CardProfile
    terminal: str = TERMINAL
    merchant: str = MERCHANT
    epoch: int = 3
    signing_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    number: int = 0
    atc: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(f"{SEED} {self.terminal}")

    @property
    def public_pem(self) -> bytes:
        return self.signing_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def kid(self) -> str:
        return fingerprint(self.signing_key.public_key())[:16]

    @property
    def sealing_key(self) -> X25519PublicKey:
        key = load_pem_public_key((self.public / "host-sealing-key").read_bytes())
        assert isinstance(key, X25519PublicKey)
        return key

    @property
    def answer_key(self) -> Ed25519PublicKey:
        key = load_pem_public_key((self.public / "host-answer-key").read_bytes())
        assert isinstance(key, Ed25519PublicKey)
        return key

    def transaction(self) -> str:
        return str(UUID(bytes=self._random.randbytes(16), version=4))

    def record(self, amount: int, *, currency: str = "0978", kind: str = "00", atc: int | None = None) -> bytes:
        """The online record of one tap, with a true cryptogram."""
        if atc is None:
            self.atc += 1
            atc = self.atc
        assert self.card.card_key is not None
        objects = {
            0x9F02: bytes.fromhex(f"{amount:012d}"),
            0x9F03: bytes(6),
            0x9F1A: b"\x02\x76",
            0x95: bytes(5),
            0x5F2A: bytes.fromhex(currency),
            0x9A: b"\x24\x06\x13",
            0x9C: bytes.fromhex(kind),
            0x9F37: self._random.randbytes(4),
            0x82: self.card.aip,
            0x9F36: struct.pack(">H", atc),
            0x9F10: issuer_application_data(self.card.cvn, self.card.dki, CryptogramType.ARQC),
            0x9F27: b"\x80",
            0x57: self.card.track2,
            0x5F34: bytes.fromhex(self.card.psn),
        }
        objects[0x9F26] = application_cryptogram(self.card.card_key, objects)
        return b"".join(encode(tag, value) for tag, value in objects.items())

    def info(self, payload: Mapping[str, Any]) -> bytes:
        terminal = payload["terminal"].encode()
        return (
            b"payterm sealed card 1\x00"
            + bytes.fromhex(payload["host_key"])
            + struct.pack(">B", len(terminal))
            + terminal
            + struct.pack(">I", payload["epoch"])
            + UUID(payload["transaction"]).bytes
            + struct.pack(">Q", payload["amount"])
            + payload["currency"].encode()
        )

    def sale(self, amount: int = 1250, *, record: bytes | None = None, **changes: Any) -> Payload:
        """The payload of an authorisation. `changes` are in it before it is sealed."""
        payload = self._facts("authorisation", amount) | {
            "deferred": False,
            "kernel": 3,
            "scheme": "visa",
            "oda": "ok",
            "cvm": "none",
            "host_key": fingerprint(self.sealing_key)[:16],
        }
        payload |= changes
        return payload | {"sealed": self._seal(record or self.record(amount), payload)}

    def reversal(self, sale: Payload, reason: str = "timeout") -> Payload:
        """The payload of the reversal of this sale or refund."""
        return self._about(sale, "reversal") | {"reason": reason}

    def refund(self, sale: Payload, amount: int = 500, **changes: Any) -> Payload:
        """The payload of a refund of so much of this sale."""
        return self._facts("refund", amount) | {"kind": "refund", "of": sale["transaction"]} | changes

    def advice(self, sale: Payload, outcome: str = "completed", **changes: Any) -> Payload:
        """The payload of what the card said last of this sale. `changes` are in it before it is sealed."""
        payload = self._about(sale, "advice") | {"kernel": 0, "scheme": "visa", "outcome": outcome}
        payload |= {"host_key": fingerprint(self.sealing_key)[:16]} | changes
        return payload | {"sealed": self._seal(self.record(sale["amount"]), payload)}

    def batch(self, first: int, last: int, /, *totals: tuple[str, int, int], **changes: Any) -> Payload:
        """The payload of a day's end."""
        self.number += 1
        return {
            "v": 1,
            "event": "batch",
            "batch": self.transaction(),
            "terminal": self.terminal,
            "merchant": self.merchant,
            "epoch": self.epoch,
            "number": self.number,
            "first": first,
            "last": last,
            "totals": [dict(zip(("currency", "count", "sum"), each, strict=True)) for each in totals],
            "unsent": [],
            "taken_at": 1_718_280_000_000,
            "clock_synchronised": True,
        } | changes

    def reconciliation(self, first: int, last: int, /, **changes: Any) -> Payload:
        """The payload of a question."""
        return self._unnumbered("reconciliation") | {"first": first, "last": last} | changes

    def certificate_request(self, csr: str, **changes: Any) -> Payload:
        """The payload of a request for a TLS client certificate."""
        return self._unnumbered("certificate") | {"csr": csr} | changes

    def _unnumbered(self, event: str) -> Payload:
        return {
            "v": 1,
            "event": event,
            event: self.transaction(),
            "terminal": self.terminal,
            "merchant": self.merchant,
            "epoch": self.epoch,
            "number": None,
            "asked_at": 1_718_280_000_000,
        }

    def _about(self, sale: Payload, event: str) -> Payload:
        facts = self._facts(event, sale["amount"])
        return facts | {name: sale[name] for name in ("transaction", "kind", "currency", "sequence")}

    def checkpoint(self, sequence: int, /, **changes: Any) -> Payload:
        """The payload of a checkpoint. The MAC is the one that this terminal's journal has at that record."""
        self.number += 1
        return {
            "v": 1,
            "event": "checkpoint",
            "checkpoint": self.transaction(),
            "terminal": self.terminal,
            "merchant": self.merchant,
            "epoch": self.epoch,
            "number": self.number,
            "sequence": sequence,
            "mac": self.mac(sequence),
            "epoch_of": None,
            "totals": [{"currency": "EUR", "count": 2, "sum": 2500}],
            "unsent": [],
            "archived": None,
            "keys": ["0f1e2d3c"],
            "taken_at": 1_718_280_000_000,
            "clock_synchronised": True,
        } | changes

    def mac(self, sequence: int, life: str = "") -> str:
        """Of a record in the journal of this life of the terminal."""
        return hashlib.sha256(f"{self.terminal} {life} {sequence}".encode()).hexdigest()

    def _seal(self, record: bytes, payload: Payload) -> str:
        suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
        sealed = suite.encrypt(record, self.sealing_key, info=self.info(payload))
        return base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()

    def _facts(self, event: str, amount: int) -> Payload:
        self.number += 1
        return {
            "v": 1,
            "event": event,
            "transaction": self.transaction(),
            "terminal": self.terminal,
            "merchant": self.merchant,
            "epoch": self.epoch,
            "number": self.number,
            "kind": "sale",
            "amount": amount,
            "currency": "EUR",
            "opened_at": 1_718_280_000_000,
            "clock_synchronised": True,
            "sequence": self.number,
        }

    def sign(self, payload: Payload, *, key: Ed25519PrivateKey | None = None, **header: Any) -> bytes:
        headers = {"typ": "payterm-envelope", "kid": self.kid} | header
        body = msgspec.json.encode(payload)
        return jwt.api_jws.encode(body, key or self.signing_key, algorithm="EdDSA", headers=headers).encode()

    def read(self, answer: str | bytes, sent: bytes) -> Payload:
        """An answer that a terminal would believe. Fails when it would not."""
        text = answer if isinstance(answer, str) else answer.decode()
        whole = jwt.api_jws.decode_complete(text, self.answer_key, algorithms=["EdDSA"])
        assert whole["header"] == {
            "alg": "EdDSA",
            "typ": "payterm-answer",
            "kid": fingerprint(self.answer_key)[:16],
        }
        said: Payload = msgspec.json.decode(whole["payload"])
        asked = msgspec.json.decode(jwt.api_jws.decode_complete(sent, options={"verify_signature": False})["payload"])
        for member in REPEATED.get(asked["event"], ("event", "transaction", "terminal", "amount", "currency")):
            assert said[member] == asked[member], member
        assert said["envelope"] == hashlib.sha256(sent).hexdigest()
        return said


def fingerprint(key: Ed25519PublicKey | X25519PublicKey) -> str:
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def countersign(host: Host, sender: Sender, payload: Payload) -> Payload:
    """Send a checkpoint straight to the host; its countersignature, read."""
    return deliver(host, sender, payload)


def take_in(host: Host, payload: Payload, envelope: bytes) -> str:
    """The host's answer to an envelope of whatever event."""
    match payload["event"]:
        case "checkpoint":
            return host.countersign(payload["checkpoint"], envelope).answer
        case "batch":
            return host.close_batch(payload["batch"], envelope).answer
        case "reconciliation":
            return host.reconcile(payload["reconciliation"], envelope).answer
        case "certificate":
            return host.certify(payload["certificate"], envelope).answer
        case event:
            return host.receive(payload["transaction"], event, envelope).answer


def path_of(payload: Payload) -> str:
    """Where docs/host-api.yaml has it put."""
    event = payload["event"]
    if event in REPEATED:
        plural = "batches" if event == "batch" else f"{event}s"
        return f"/v1/{plural}/{payload[event]}"
    return f"/v1/transactions/{payload.get('transaction')}/{event}"


def certificate_signing_request(key: ec.EllipticCurvePrivateKey, name: str = "anybody") -> str:
    """PKCS #10, PEM."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(Encoding.PEM).decode()


def deliver(host: Host, sender: Sender, payload: Payload) -> Payload:
    """Send straight to the host; the answer, read."""
    envelope = sender.sign(payload)
    return sender.read(take_in(host, payload, envelope), envelope)


def flip(payload: Payload, member: str) -> Payload:
    """The same with one bit of a base64url member changed."""
    raw = bytearray(base64.urlsafe_b64decode(payload[member] + "=="))
    raw[-1] ^= 1
    return payload | {member: base64.urlsafe_b64encode(bytes(raw)).rstrip(b"=").decode()}


def assert_booked_exactly_once(bookings: Iterable[Booking], expected: Mapping[str, int]) -> None:
    """Each of these transactions stands once on the books, for its amount, and nothing else does."""
    booked = [booking for booking in bookings if booking.state is State.BOOKED]
    count = Counter(booking.transaction for booking in booked)
    assert count == Counter(expected.keys()), "not booked exactly once"
    assert {booking.transaction: booking.amount for booking in booked} == dict(expected)

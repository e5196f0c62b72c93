"""TLS client certificates: enrolled and renewed by signed requests, asked for if the operator wants, one for each."""

from __future__ import annotations

import contextlib
import http.client
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from host_rig import (
    Payload,
    Rig,
    Sender,
    certificate_signing_request,
    deliver,
    make_bureau,
    register,
    rig,
    take_in,
)
from test_host_server import Client, Response, schema

from hwsim.host import Host, Problem, Refused
from hwsim.host.server import HostServer
from hwsim.host.tls import CLIENT_VALID_DAYS


@pytest.fixture(scope="module")
def issuing() -> tuple[Any, Any]:
    return make_bureau()


@pytest.fixture
def place(tmp_path: Path, issuing: tuple[Any, Any]) -> Iterator[Rig]:
    with rig(tmp_path / "host", *issuing) as made:
        made.now_ms = int(datetime.now(UTC).timestamp() * 1000)  # TLS goes by the machine's clock
        yield made


@pytest.fixture
def sender(place: Rig) -> Sender:
    return Sender(place.public, place.card)


@pytest.fixture
def host(place: Rig, sender: Sender) -> Iterator[Host]:
    with place.open() as opened:
        register(opened, sender, place.card)
        yield opened


@pytest.fixture
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def enrolled(host: Host, sender: Sender, key: ec.EllipticCurvePrivateKey) -> Payload:
    return deliver(host, sender, sender.certificate_request(certificate_signing_request(key)))


# What is issued


def test_a_certificate_is_issued_to_the_terminals_name(
    host: Host, sender: Sender, place: Rig, key: ec.EllipticCurvePrivateKey
) -> None:
    request = sender.certificate_request(certificate_signing_request(key, name="T-0002"))
    schema("Envelope").validate(request)
    said = deliver(host, sender, request)
    schema("CertificateAnswer").validate(said)
    assert (said["decision"], said["reason"]) == ("issued", None)
    issued, authority = x509.load_pem_x509_certificates(said["chain"].encode())
    assert issued.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "T-0001"
    assert issued.public_key() == key.public_key()
    usage = issued.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]  # it cannot pass for a host
    assert issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    issued.verify_directly_issued_by(authority)
    assert authority.public_bytes(Encoding.PEM) == (place.public / "ca.pem").read_bytes()
    lasts = issued.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=CLIENT_VALID_DAYS - 1) < lasts <= timedelta(days=CLIENT_VALID_DAYS, minutes=1)
    (terminal,) = host.terminals()
    assert terminal.certificate_expires_ms == int(issued.not_valid_after_utc.timestamp() * 1000)


def test_the_same_request_gets_the_same_certificate(
    host: Host, sender: Sender, key: ec.EllipticCurvePrivateKey
) -> None:
    request = sender.certificate_request(certificate_signing_request(key))
    envelope = sender.sign(request)
    first, again = (host.certify(request["certificate"], envelope) for _ in range(2))
    assert (first.answer, first.repeated, again.repeated) == (again.answer, False, True)
    other = request | {"asked_at": 1}
    with pytest.raises(Refused) as refused:
        take_in(host, other, sender.sign(other))
    assert refused.value.problem is Problem.CONFLICT
    assert host.gaps(sender.terminal, sender.epoch) == []  # not numbered


def _tampered(csr: str) -> str:
    request = x509.load_pem_x509_csr(csr.encode())
    der = bytearray(request.public_bytes(Encoding.DER))
    der[-1] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM).decode()


def _request_of(key: Any) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(Encoding.PEM).decode()


@pytest.mark.parametrize(
    "text", ["", "csr", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"]
)
def test_what_is_no_request_is_declined(host: Host, sender: Sender, text: str) -> None:
    said = deliver(host, sender, sender.certificate_request(text))
    assert (said["decision"], said["reason"], said["chain"]) == ("declined", "unreadable", None)


def test_a_request_for_a_key_that_its_sender_has_not_is_declined(
    host: Host, sender: Sender, key: ec.EllipticCurvePrivateKey
) -> None:
    said = deliver(host, sender, sender.certificate_request(_tampered(certificate_signing_request(key))))
    assert (said["decision"], said["reason"]) == ("declined", "wrong_signature")
    assert host.terminals()[0].certificate_expires_ms is None


@pytest.mark.parametrize(
    ("key", "decision"),
    [
        (ec.generate_private_key(ec.SECP384R1()), "issued"),
        (ed25519.Ed25519PrivateKey.generate(), "issued"),
        (rsa.generate_private_key(65537, 2048), "issued"),
        (rsa.generate_private_key(65537, 1024), "declined"),  # noqa: S505 (that is the point)
        (ec.generate_private_key(ec.SECP256K1()), "declined"),
    ],
    ids=["P-384", "Ed25519", "RSA 2048", "RSA 1024", "secp256k1"],
)
def test_only_suitable_keys_are_certified(host: Host, sender: Sender, key: Any, decision: str) -> None:
    said = deliver(host, sender, sender.certificate_request(_request_of(key)))
    assert (said["decision"], said["reason"]) == (decision, None if decision == "issued" else "unsuitable_key")


def test_another_terminal_cannot_ask_in_a_terminals_name(
    host: Host, sender: Sender, place: Rig, key: ec.EllipticCurvePrivateKey
) -> None:
    stranger = Sender(place.public, place.card)
    request = stranger.certificate_request(certificate_signing_request(key))
    with pytest.raises(Refused) as refused:
        take_in(host, request, stranger.sign(request))
    assert refused.value.problem is Problem.TERMINAL_UNKNOWN


# A host that asks for them


class Certified(Client):
    """A client that shows a certificate."""

    file: Path | None = None

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Response:
        if self._connection is None and self.file is not None:
            context = ssl.create_default_context(cafile=str(self.ca))
            context.load_cert_chain(self.file)
            self._connection = http.client.HTTPSConnection(self.name, self.port, timeout=20, context=context)
        return super().ask(method, path, body, **headers)


@pytest.fixture
def strict(host: Host) -> Iterator[HostServer]:
    with HostServer(host, client_certificates=True) as running:
        yield running


def client(server: HostServer, place: Rig, file: Path | None = None) -> contextlib.closing[Certified]:
    made = Certified(server.port, place.public / "ca.pem")
    made.file = file
    return contextlib.closing(made)


def saved(place: Rig, name: str, key: ec.EllipticCurvePrivateKey, chain: str) -> Path:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    file = place.directory / f"{name}.pem"
    file.write_text(pem + chain)
    return file


def test_without_a_certificate_there_is_nothing_but_the_way_to_one(
    strict: HostServer, host: Host, sender: Sender, place: Rig, key: ec.EllipticCurvePrivateKey
) -> None:
    sale = sender.sale()
    with client(strict, place) as bare:
        for payload in (sale, sender.batch(1, 2), sender.reconciliation(1, 2), sender.checkpoint(3)):
            response = bare.put(payload, sender.sign(payload))
            assert (response.status, response.problem()) == (401, "certificate-required")
            assert response.headers["WWW-Authenticate"] == "Certificate"
        for path in (f"/v1/transactions/{sale['transaction']}", "/v1/terminals/T-0001"):
            assert bare.ask("GET", path).problem() == "certificate-required"
        assert host.bookings() == []
        assert bare.ask("GET", "/v1/status").status == 200
        request = sender.certificate_request(certificate_signing_request(key))
        answer = bare.put(request, envelope := sender.sign(request))
        chain = sender.read(answer.body, envelope)["chain"]
    with client(strict, place, saved(place, "first", key, chain)) as certified:
        assert certified.put(sale, sender.sign(sale)).status == 200
        assert certified.ask("GET", f"/v1/transactions/{sale['transaction']}").status == 200
        assert certified.ask("GET", "/v1/terminals/T-0001").status == 200


def test_a_certificate_is_renewed_while_it_lasts(
    strict: HostServer, host: Host, sender: Sender, place: Rig, key: ec.EllipticCurvePrivateKey
) -> None:
    old = saved(place, "old", key, enrolled(host, sender, key)["chain"])
    fresh = ec.generate_private_key(ec.SECP256R1())
    with client(strict, place, old) as certified:
        request = sender.certificate_request(certificate_signing_request(fresh))
        answer = certified.put(request, envelope := sender.sign(request))
        chain = sender.read(answer.body, envelope)["chain"]
    sale = sender.sale()
    with client(strict, place, saved(place, "new", fresh, chain)) as renewed:
        assert renewed.put(sale, sender.sign(sale)).status == 200


def test_a_certificate_speaks_for_its_terminal_alone(
    strict: HostServer, host: Host, sender: Sender, place: Rig, key: ec.EllipticCurvePrivateKey
) -> None:
    other = Sender(place.public, place.card, terminal="T-0002", atc=100)
    host.register("T-0002", "M-0001", other.public_pem)
    theirs = saved(place, "theirs", key, enrolled(host, other, key)["chain"])
    with client(strict, place, theirs) as certified:
        for payload in (sender.sale(), sender.certificate_request(certificate_signing_request(key))):
            response = certified.put(payload, sender.sign(payload))
            assert (response.status, response.problem()) == (403, "certificate-mismatch")
        assert certified.ask("GET", "/v1/terminals/T-0001").problem() == "certificate-mismatch"
    assert host.bookings() == []


def test_a_revoked_terminal_is_kept_out_whatever_it_shows(
    strict: HostServer, host: Host, sender: Sender, place: Rig, key: ec.EllipticCurvePrivateKey
) -> None:
    file = saved(place, "revoked", key, enrolled(host, sender, key)["chain"])
    host.revoke("T-0001")
    with client(strict, place, file) as certified:
        for payload in (sender.sale(), sender.certificate_request(certificate_signing_request(key))):
            assert certified.put(payload, sender.sign(payload)).problem() == "terminal-revoked"
        undo = sender.reversal(sender.sale())
        assert certified.put(undo, sender.sign(undo)).status == 200


@pytest.mark.parametrize("wrong", ["server", "self-signed", "expired"])
def test_a_certificate_that_is_not_for_this_ends_the_handshake(
    strict: HostServer, sender: Sender, place: Rig, key: ec.EllipticCurvePrivateKey, wrong: str
) -> None:
    host = strict.host
    match wrong:
        case "server":  # of the right authority, for another use
            file = place.directory / "private" / "server-good.pem"
        case "self-signed":
            name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "T-0001")])
            now = datetime.now(UTC)
            made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(1)).sign(
                key, hashes.SHA256()
            )
            file = saved(place, wrong, key, made.public_bytes(Encoding.PEM).decode())
        case _:
            place.now_ms -= (CLIENT_VALID_DAYS + 1) * 86_400_000
            file = saved(place, wrong, key, enrolled(host, sender, key)["chain"])
    sale = sender.sale()
    with client(strict, place, file) as certified, pytest.raises((OSError, http.client.HTTPException)):
        certified.put(sale, sender.sign(sale))
    assert host.bookings() == []


def test_a_host_that_does_not_ask_takes_no_notice(host: Host, sender: Sender, place: Rig) -> None:
    sale = sender.sale()
    with HostServer(host) as server, client(server, place) as bare:
        assert bare.put(sale, sender.sign(sale)).status == 200


def test_the_operator_needs_no_client_certificate(strict: HostServer, host: Host, place: Rig) -> None:
    with client(strict, place) as bare:
        assert bare.ask("GET", "/v1/bookings", Authorization=f"Bearer {host.keys.operator_token}").status == 200
        assert bare.ask("GET", "/merchant").status == 401  # the login

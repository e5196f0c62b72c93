"""A certificate authority for tests, the host's server certificate, and the certificates that a terminal must refuse.

Certificates are as a public authority would issue them (RFC 5280: basic constraints, key usage, key identifiers, names
in the SAN), so that a client may verify as strictly as it likes. The wrong ones are wrong in one thing each.
"""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hwsim.host.keys import HostKeyError, write_private

NAMES: Final = ("localhost", "127.0.0.1")
_VALID_DAYS: Final = 3650  # a laboratory's directory should still work when somebody comes back to it
_BACKDATED: Final = datetime.timedelta(days=2)  # a Pi whose clock lags a little still believes a new certificate


class Certificate(Enum):
    """Which certificate the server shows: the right one, or one that is wrong in one thing."""

    GOOD = "good"
    EXPIRED = "expired"
    WRONG_NAME = "wrong_name"
    UNTRUSTED = "untrusted"


@dataclass(frozen=True, slots=True)
class Authority:
    """A root that signs server certificates."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @classmethod
    def create(cls, now: datetime.datetime) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("payterm test authority")
        builder = (
            _builder(key, subject=name, issuer=name, not_before=now - _BACKDATED)
            .not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(certificates=True), critical=True)
        )
        return cls(key, builder.sign(key, hashes.SHA256()))

    def issue(self, names: tuple[str, ...], not_before: datetime.datetime, not_after: datetime.datetime) -> bytes:
        """A server's private key and certificate, PEM, in one."""
        key = ec.generate_private_key(ec.SECP256R1())
        issuer_identifier = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        certificate = (
            _builder(key, subject=_name(names[0]), issuer=self.certificate.subject, not_before=not_before)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_identifier), critical=False
            )
            .sign(self.key, hashes.SHA256())
        )
        return _key_pem(key) + certificate.public_bytes(Encoding.PEM)


def make(directory: Path, now: datetime.datetime) -> None:
    """The authority and the server certificate of a host's directory, made unless they are there."""
    authority_file, server_file = directory / "private" / "authority.pem", _server_file(directory, Certificate.GOOD)
    if not authority_file.exists():
        authority = Authority.create(now)
        write_private(authority_file, _key_pem(authority.key) + authority.pem)
    authority = _load_authority(authority_file)
    (directory / "public" / "ca.pem").write_bytes(authority.pem)
    if not server_file.exists():
        _issue(directory, Certificate.GOOD, now)


def server_context(directory: Path, certificate: Certificate, now: datetime.datetime) -> ssl.SSLContext:
    """What a server needs to speak TLS 1.2 or 1.3 with this certificate; the wrong ones are issued when asked for."""
    file = _server_file(directory, certificate)
    if not file.exists():
        _issue(directory, certificate, now)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(file)
    return context


def _issue(directory: Path, certificate: Certificate, now: datetime.datetime) -> None:
    authority = _load_authority(directory / "private" / "authority.pem")
    names: tuple[str, ...] = NAMES
    not_before, not_after = now - _BACKDATED, now + datetime.timedelta(days=_VALID_DAYS)
    match certificate:
        case Certificate.GOOD:
            pass
        case Certificate.EXPIRED:
            not_after = now - datetime.timedelta(days=1)
        case Certificate.WRONG_NAME:
            names = ("host.invalid",)
        case Certificate.UNTRUSTED:
            authority = Authority.create(now)
    write_private(_server_file(directory, certificate), authority.issue(names, not_before, not_after))


def _server_file(directory: Path, certificate: Certificate) -> Path:
    return directory / "private" / f"server-{certificate.value}.pem"


def _load_authority(file: Path) -> Authority:
    pem = file.read_bytes()
    key = load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise HostKeyError(f"{file}: the authority's key is not an elliptic curve key")
    return Authority(key, x509.load_pem_x509_certificate(pem))


def _builder(
    key: ec.EllipticCurvePrivateKey, *, subject: x509.Name, issuer: x509.Name, not_before: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        key_cert_sign=certificates,
        crl_sign=certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

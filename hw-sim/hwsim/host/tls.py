"""A certificate authority for tests, the certificates it gives to the host and its terminals, and those to be refused.

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
from typing import Final, TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hwsim.host.keys import HostKeyError, write_private

NAMES: Final = ("localhost", "127.0.0.1")
CLIENT_VALID_DAYS: Final = 365  # a terminal renews its own long before
_RSA_BITS_MIN, _RSA_BITS_MAX = 2048, 8192  # the larger ones would cost every handshake
_VALID_DAYS: Final = 3650  # a laboratory's directory should still work when somebody comes back to it
_BACKDATED: Final = datetime.timedelta(days=2)  # a Pi whose clock lags a little still believes a new certificate

_PublicKey: TypeAlias = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey


class Certificate(Enum):
    """Which certificate the server shows: the right one, or one that is wrong in one thing."""

    GOOD = "good"
    EXPIRED = "expired"
    WRONG_NAME = "wrong_name"
    UNTRUSTED = "untrusted"


class RequestRefused(Exception):
    """No certificate for this request. `word` says why, for the answer."""

    def __init__(self, word: str) -> None:
        super().__init__(word)
        self.word = word


@dataclass(frozen=True, slots=True)
class Issued:
    """A client certificate and the root that vouches for it, PEM."""

    chain: bytes
    expires_ms: int


@dataclass(frozen=True, slots=True)
class Authority:
    """A root that signs certificates of servers and terminals."""

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
            _builder(key.public_key(), subject=name, issuer=name, not_before=now - _BACKDATED)
            .not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(certificates=True), critical=True)
        )
        return cls(key, builder.sign(key, hashes.SHA256()))

    def issue(self, names: tuple[str, ...], not_before: datetime.datetime, not_after: datetime.datetime) -> bytes:
        """A server's private key and certificate, PEM, in one."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(key.public_key(), names[0], not_before, not_after, ExtendedKeyUsageOID.SERVER_AUTH)
        certificate = builder.add_extension(
            x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False
        ).sign(self.key, hashes.SHA256())
        return _key_pem(key) + certificate.public_bytes(Encoding.PEM)

    def issue_client(self, csr_pem: bytes, terminal: str, now_ms: int) -> Issued:
        """A certificate for the key of this request, to this terminal's name. Raises `RequestRefused`.

        Of the request only the key is used, and the proof that its sender has the private half.
        """
        try:
            csr = x509.load_pem_x509_csr(csr_pem)
            proven, key = csr.is_signature_valid, csr.public_key()
        except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
            raise RequestRefused("unreadable") from error
        if not proven:
            raise RequestRefused("wrong_signature")
        now = datetime.datetime.fromtimestamp(now_ms / 1000, datetime.UTC)
        expires = (now + datetime.timedelta(days=CLIENT_VALID_DAYS)).replace(microsecond=0)
        certificate = self._builder(
            _suitable(key), terminal, now - _BACKDATED, expires, ExtendedKeyUsageOID.CLIENT_AUTH
        ).sign(self.key, hashes.SHA256())
        return Issued(certificate.public_bytes(Encoding.PEM) + self.pem, int(expires.timestamp()) * 1000)

    def _builder(
        self,
        key: _PublicKey,
        name: str,
        not_before: datetime.datetime,
        not_after: datetime.datetime,
        usage: x509.ObjectIdentifier,
    ) -> x509.CertificateBuilder:
        """A certificate for one end of a connection."""
        issuer_identifier = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return (
            _builder(key, subject=_name(name), issuer=self.certificate.subject, not_before=not_before)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_identifier), critical=False
            )
        )


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


def load_authority(directory: Path) -> Authority:
    """The authority of a provisioned directory. Raises `HostKeyError`."""
    return _load_authority(directory / "private" / "authority.pem")


def server_context(
    directory: Path, certificate: Certificate, now: datetime.datetime, *, client_certificates: bool = False
) -> ssl.SSLContext:
    """What a server needs to speak TLS 1.2 or 1.3 with this certificate; the wrong ones are issued when asked for.

    With `client_certificates` it asks for one of its own authority's. A client may still come without, for its first.
    """
    file = _server_file(directory, certificate)
    if not file.exists():
        _issue(directory, certificate, now)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(file)
    if client_certificates:
        context.verify_mode = ssl.CERT_OPTIONAL
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_verify_locations(directory / "public" / "ca.pem")
    return context


def _issue(directory: Path, certificate: Certificate, now: datetime.datetime) -> None:
    authority = load_authority(directory)
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
    try:
        pem = file.read_bytes()
        key = load_pem_private_key(pem, password=None)
    except (OSError, ValueError) as error:
        raise HostKeyError(f"{file}: the authority's key cannot be read, so no certificate can be issued") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise HostKeyError(f"{file}: the authority's key is not an elliptic curve key")
    return Authority(key, x509.load_pem_x509_certificate(pem))


def _builder(
    key: _PublicKey, *, subject: x509.Name, issuer: x509.Name, not_before: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _suitable(key: object) -> _PublicKey:
    """The key, if it is one to speak TLS with."""
    match key:
        case ed25519.Ed25519PublicKey() | ec.EllipticCurvePublicKey(curve=ec.SECP256R1() | ec.SECP384R1()):
            return key
        case rsa.RSAPublicKey(key_size=size) if _RSA_BITS_MIN <= size <= _RSA_BITS_MAX:
            return key
        case _:
            raise RequestRefused("unsuitable_key")


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

"""The terminal's keys: files, read once, never written by a running terminal.

In service they are systemd credentials: decrypted by systemd into a directory that only this service sees. For
development they are 0600 files in a directory outside the state. A key that is missing or not as it should be is
`KeyUnavailable`; no default, no new key, nothing overwritten: a ledger under a key made up in passing could not be read
again. A host's public key counts only with the fingerprint that a person compared.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from terminal.clock import Entropy
from terminal.ledger.errors import KeyUnavailable

DATA_KEY: Final = "data-key"
CHAIN_KEY: Final = "chain-key"
SIGNING_KEY: Final = "signing-key"
HOST_SEALING_KEY: Final = "host-sealing-key"
HOST_ANSWER_KEY: Final = "host-answer-key"
SPOOL_KEY: Final = "spool-key"

_SECRET_BYTES: Final = 32  # AES-256 and HMAC-SHA256 alike
_FILE_BYTES_MAX: Final = 4096  # a PEM of either kind of key is under 200 bytes
_HEX: Final = re.compile(r"[0-9a-f]{64}", re.ASCII | re.IGNORECASE)

PublicKey: TypeAlias = Ed25519PublicKey | X25519PublicKey


@dataclass(frozen=True, slots=True)
class SecretKey:
    """A symmetric key. Its id names it and gives nothing away."""

    material: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.material) != _SECRET_BYTES:
            raise ValueError(f"a secret key has {_SECRET_BYTES} bytes")

    @property
    def id(self) -> bytes:
        return self.derive(b"payterm key id")[:4]

    def derive(self, purpose: bytes) -> bytes:
        """32 bytes for one purpose."""
        return hmac.digest(self.material, purpose, "sha256")


def fingerprint(key: PublicKey) -> str:
    """SHA-256 of the DER SubjectPublicKeyInfo, 64 hex digits: what people compare."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def key_id(key: PublicKey) -> str:
    """The first 16 digits of the fingerprint: what envelopes and answers carry."""
    return fingerprint(key)[:16]


class KeyStore:
    """A directory of key files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # systemd's own credentials directory is reachable by this service only; the mode of its files is systemd's.
        self._guarded = os.environ.get("CREDENTIALS_DIRECTORY") == str(directory)

    def secret(self, name: str) -> SecretKey:
        text = self._read(name, private=True).decode("ascii", "replace").strip()
        if not _HEX.fullmatch(text):
            raise _unavailable(name, "does not hold 64 hex digits")
        return SecretKey(bytes.fromhex(text))

    def signing(self) -> Ed25519PrivateKey:
        pem = self._read(SIGNING_KEY, private=True)
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            # The cause is dropped on purpose: a parser's message may quote what it read.
            raise _unavailable(SIGNING_KEY, "is no unencrypted PKCS#8 PEM") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise _unavailable(SIGNING_KEY, "is no Ed25519 key")
        return key

    def host_sealing(self, confirmed: str) -> X25519PublicKey:
        key = self._public(HOST_SEALING_KEY, confirmed)
        if not isinstance(key, X25519PublicKey):
            raise _unavailable(HOST_SEALING_KEY, "is no X25519 key")
        return key

    def host_answer(self, confirmed: str) -> Ed25519PublicKey:
        key = self._public(HOST_ANSWER_KEY, confirmed)
        if not isinstance(key, Ed25519PublicKey):
            raise _unavailable(HOST_ANSWER_KEY, "is no Ed25519 key")
        return key

    def _public(self, name: str, confirmed: str) -> PublicKey:
        try:
            key = serialization.load_pem_public_key(self._read(name, private=False))
        except (ValueError, UnsupportedAlgorithm):
            raise _unavailable(name, "is no SubjectPublicKeyInfo PEM") from None
        if not isinstance(key, Ed25519PublicKey | X25519PublicKey):
            raise _unavailable(name, "is a key of another kind")
        if not hmac.compare_digest(fingerprint(key), confirmed.strip().lower().replace(":", "")):
            raise _unavailable(name, f"has the fingerprint {fingerprint(key)}, which is not the configured one")
        return key

    def _read(self, name: str, *, private: bool) -> bytes:
        try:
            descriptor = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise _unavailable(name, f"cannot be read from {self._directory} ({error.strerror})") from error
        with open(descriptor, "rb") as file:  # noqa: PTH123 (a descriptor, not a path)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _unavailable(name, "is not a regular file")
            if private and not self._guarded:
                if status.st_uid != os.geteuid():
                    raise _unavailable(name, "belongs to another user")
                if stat.S_IMODE(status.st_mode) not in {0o600, 0o400}:
                    raise _unavailable(name, "can be read by others: its mode must be 0600 or 0400")
            content = file.read(_FILE_BYTES_MAX + 1)
        if len(content) > _FILE_BYTES_MAX:
            raise _unavailable(name, f"is longer than {_FILE_BYTES_MAX} bytes")
        return content


@dataclass(frozen=True, slots=True)
class TerminalKeys:
    """What the terminal holds: it can seal card data and sign envelopes, and open nothing that it has sealed."""

    data: SecretKey = field(repr=False)
    chain: SecretKey = field(repr=False)
    signing: Ed25519PrivateKey = field(repr=False)
    host_sealing: X25519PublicKey
    host_answer: Ed25519PublicKey

    @classmethod
    def load(cls, directory: Path, sealing_fingerprint: str, answer_fingerprint: str) -> TerminalKeys:
        """Read all five. Raises `KeyUnavailable`."""
        store = KeyStore(directory)
        return cls(
            data=store.secret(DATA_KEY),
            chain=store.secret(CHAIN_KEY),
            signing=store.signing(),
            host_sealing=store.host_sealing(sealing_fingerprint),
            host_answer=store.host_answer(answer_fingerprint),
        )


def generate(directory: Path, entropy: Entropy) -> None:
    """Make the terminal's own three keys for development, 0600, and `signing-key.pub` for the host to know it by.

    The host's public keys are not made here: they come from the host. Raises `KeyUnavailable` where a key already is.
    """
    signing = Ed25519PrivateKey.from_private_bytes(entropy(_SECRET_BYTES))
    _write_new(
        directory,
        {
            DATA_KEY: _new_secret(entropy),
            CHAIN_KEY: _new_secret(entropy),
            SIGNING_KEY: signing.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            SIGNING_KEY + ".pub": signing.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            ),
        },
    )


def generate_spool_key(directory: Path, entropy: Entropy) -> None:
    """Make the sync service's key for development. Raises `KeyUnavailable` where it already is."""
    _write_new(directory, {SPOOL_KEY: _new_secret(entropy)})


def _new_secret(entropy: Entropy) -> bytes:
    return entropy(_SECRET_BYTES).hex().encode() + b"\n"


def _write_new(directory: Path, contents: Mapping[str, bytes]) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in contents:
        if (directory / name).exists():
            raise KeyUnavailable(
                f"{name} is already in {directory}: it was left as it is, since a ledger may depend on it; "
                "choose another directory, or remove it yourself together with the ledger"
            )
    for name, content in contents.items():
        descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:  # noqa: PTH123 (a descriptor, not a path)
            file.write(content)
            file.flush()
            os.fsync(descriptor)


def _unavailable(name: str, what: str) -> KeyUnavailable:
    return KeyUnavailable(
        f"the key {name} {what}: no sale can be recorded or sent, what is recorded is safe; restore the right key file"
    )

"""The host's keys, made once and kept in its directory.

`private/` is for the host alone. `public/` is what a terminal is given, under the names of docs/formats.md, with the
fingerprints that a person compares before a terminal trusts them. What exists is never overwritten: a new sealing key
would orphan every envelope that is under way.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

KEY_ID_DIGITS: Final = 16
_SECRET_BYTES: Final = 32


class HostKeyError(Exception):
    """A key of the host that is missing or not what its name says."""


@dataclass(frozen=True, slots=True)
class HostKeys:
    """What the host needs to open, to sign, to recognise a card again, and to let its operator in."""

    sealing: X25519PrivateKey = field(repr=False)
    answer: Ed25519PrivateKey = field(repr=False)
    card: bytes = field(repr=False)
    operator_token: str = field(repr=False)

    @property
    def sealing_id(self) -> str:
        return key_id(self.sealing.public_key())

    @property
    def answer_id(self) -> str:
        return key_id(self.answer.public_key())


def public_pem(key: Ed25519PublicKey | X25519PublicKey) -> bytes:
    """SubjectPublicKeyInfo, PEM."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def fingerprint(key: Ed25519PublicKey | X25519PublicKey) -> str:
    """SHA-256 of the DER SubjectPublicKeyInfo, 64 hex digits."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def key_id(key: Ed25519PublicKey | X25519PublicKey) -> str:
    """How headers name a public key: the start of its fingerprint."""
    return fingerprint(key)[:KEY_ID_DIGITS]


def signing_public_key(pem: bytes) -> Ed25519PublicKey:
    """A terminal's public key. Raises `HostKeyError`."""
    try:
        key = load_pem_public_key(pem)
    except ValueError as error:
        raise HostKeyError("this is no public key in PEM: nothing was registered") from error
    if not isinstance(key, Ed25519PublicKey):
        raise HostKeyError("a terminal signs with Ed25519, this key is of another kind: nothing was registered")
    return key


def make(directory: Path, entropy: Callable[[int], bytes]) -> None:
    """Make whatever key is missing, and write the public halves anew."""
    private, public = directory / "private", directory / "public"
    private.mkdir(mode=0o700, parents=True, exist_ok=True)
    public.mkdir(mode=0o755, parents=True, exist_ok=True)
    _keep(private / "sealing-key", lambda: _private_pem(X25519PrivateKey.generate()))
    _keep(private / "answer-key", lambda: _private_pem(Ed25519PrivateKey.generate()))
    _keep(private / "card-key", lambda: entropy(_SECRET_BYTES).hex().encode())
    _keep(private / "operator-token", lambda: entropy(_SECRET_BYTES).hex().encode())
    keys = load(directory)
    sealing, answer = keys.sealing.public_key(), keys.answer.public_key()
    (public / "host-sealing-key").write_bytes(public_pem(sealing))
    (public / "host-answer-key").write_bytes(public_pem(answer))
    (public / "fingerprints.json").write_text(
        json.dumps({"host-sealing-key": fingerprint(sealing), "host-answer-key": fingerprint(answer)}, indent=2) + "\n",
        encoding="utf-8",
    )


def load(directory: Path) -> HostKeys:
    """Read the keys of a provisioned directory. Raises `HostKeyError`."""
    private = directory / "private"
    try:
        sealing = load_pem_private_key((private / "sealing-key").read_bytes(), password=None)
        answer = load_pem_private_key((private / "answer-key").read_bytes(), password=None)
        card = bytes.fromhex((private / "card-key").read_text(encoding="ascii"))
        token = (private / "operator-token").read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise HostKeyError(f"{private}: the host's keys cannot be read, so it cannot open or sign anything") from error
    if not isinstance(sealing, X25519PrivateKey) or not isinstance(answer, Ed25519PrivateKey):
        raise HostKeyError(f"{private}: a key is not of the kind that its name says")
    return HostKeys(sealing, answer, card, token)


def write_private(path: Path, content: bytes) -> None:
    """A new file that only its owner can read, from its first byte on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _keep(path: Path, make_content: Callable[[], bytes]) -> None:
    if not path.exists():
        write_private(path, make_content())


def _private_pem(key: X25519PrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

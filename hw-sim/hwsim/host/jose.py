"""JWS in compact form (RFC 7515) with Ed25519 (RFC 8037), as narrow as the two messages that need it.

One algorithm, three header members, one way to write each byte: an envelope is named by the SHA-256 of its bytes, so
base64url that decodes to the same but is written otherwise is refused. Which key to verify with is the caller's affair.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Final, Literal

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_COMPACT: Final = re.compile(rb"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")


class JoseError(Exception):
    """Not a signed message of ours: nothing in it can be believed."""


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Exactly what docs/formats.md lists; above all no `crit`, no `jwk`, and no algorithm to choose."""

    alg: Literal["EdDSA"]
    typ: str
    kid: str


@dataclass(frozen=True, slots=True)
class Signed:
    """A message whose form is right and whose signature nobody has checked yet."""

    kid: str
    unverified_payload: bytes
    signing_input: bytes
    signature: bytes

    def verified(self, key: Ed25519PublicKey) -> bytes:
        """The payload, which the holder of `key` did sign. Raises `JoseError`."""
        try:
            key.verify(self.signature, self.signing_input)
        except InvalidSignature as error:
            raise JoseError("the signature is not that of the key it names") from error
        return self.unverified_payload


def read(compact: bytes, typ: str) -> Signed:
    """Take a compact JWS of this type apart. Raises `JoseError`."""
    match = _COMPACT.fullmatch(compact)
    if match is None:
        raise JoseError("not three base64url parts with dots between them")
    protected, payload, signature = match.groups()
    try:
        header = msgspec.json.decode(from_base64url(protected.decode()), type=Header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise JoseError("the header is not exactly alg EdDSA, typ and kid") from error
    if header.typ != typ:
        raise JoseError(f"the header's typ is not {typ}")
    return Signed(
        kid=header.kid,
        unverified_payload=from_base64url(payload.decode()),
        signing_input=protected + b"." + payload,
        signature=from_base64url(signature.decode()),
    )


def sign(payload: bytes, *, typ: str, kid: str, key: Ed25519PrivateKey) -> str:
    """A compact JWS over these bytes."""
    header = msgspec.json.encode(Header(alg="EdDSA", typ=typ, kid=kid))
    signing_input = f"{to_base64url(header)}.{to_base64url(payload)}"
    return f"{signing_input}.{to_base64url(key.sign(signing_input.encode()))}"


def to_base64url(data: bytes) -> str:
    """Without padding (RFC 7515, 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def from_base64url(text: str) -> bytes:
    """The one text that `to_base64url` gives for these bytes, and no other. Raises `JoseError`."""
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError as error:
        raise JoseError("not base64url") from error
    if to_base64url(data) != text:
        raise JoseError("not base64url as an encoder writes it")
    return data

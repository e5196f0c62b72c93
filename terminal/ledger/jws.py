"""JSON Web Signatures, compact form, Ed25519 only (RFC 7515, RFC 8037).

A JOSE library would do, but each brings an HTTP client for fetching keys into the one process that must reach no
network, and a choice of algorithms that this protocol does not have. The tests read what is written here with such a
library.
"""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_PARTS = 3  # header, payload, signature


class JwsError(Exception):
    """Not a signature of this key over this text. `reason` is a stable word: form, header, signature."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def header(typ: str, kid: str) -> dict[str, str]:
    """The only header that is ever written or believed."""
    return {"alg": "EdDSA", "typ": typ, "kid": kid}


def sign(payload: bytes, key: Ed25519PrivateKey, *, typ: str, kid: str) -> str:
    """Sign bytes."""
    signed = _encode(msgspec.json.encode(header(typ, kid))) + b"." + _encode(payload)
    return (signed + b"." + _encode(key.sign(signed))).decode("ascii")


def verify(text: str, key: Ed25519PublicKey, *, typ: str, kid: str) -> bytes:
    """The payload, if this key has signed it under exactly this header. Raises `JwsError`."""
    parts = text.encode("ascii", "replace").split(b".")
    if len(parts) != _PARTS:
        raise JwsError("form", "it has not three parts")
    try:
        head, payload, signature = (_decode(part) for part in parts)
        key.verify(signature, parts[0] + b"." + parts[1])
    except ValueError as error:
        raise JwsError("form", "it is not base64url") from error
    except InvalidSignature as error:
        raise JwsError("signature", "it is not signed with the expected key") from error
    # After the signature, as nothing that a stranger wrote is parsed. No other algorithm, key, type or extension.
    if _json(head) != header(typ, kid):
        raise JwsError("header", "its header is another one")
    return payload


def _json(data: bytes) -> Mapping[str, object] | None:
    try:
        return msgspec.json.decode(data, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _encode(data: bytes) -> bytes:
    return urlsafe_b64encode(data).rstrip(b"=")


def _decode(part: bytes) -> bytes:
    """Strict: one text for one value, so that a digest of the text names the value."""
    try:
        data = urlsafe_b64decode(part + b"=" * (-len(part) % 4))
    except binascii.Error as error:
        raise ValueError("not base64url") from error
    if _encode(data) != part:
        raise ValueError("not canonical base64url")
    return data

"""Encrypted peewee fields: what the database stores is sealed to the very cell that it stands in.

AES-256-GCM with a random nonce; associated data names table, column and primary key, so that a value copied into
another row or column does not decrypt (layout: docs/formats.md, Encrypted fields). Random 96-bit nonces are good for
2^32 messages under one key; a terminal writes some ten for each sale, and would need four hundred million sales.

New values are sealed under the current key. A value under a retired key opens as long as that key is on the ring, so
the cells can move to a new key in small steps while sales go on.

A field's `db_value` is not told which row it serves. So the accessor wraps what is assigned together with its row, and
`db_value` takes nothing else: `insert_many`, `update` and `where` on such a field raise `TypeError` instead of storing
or comparing plaintext. What is read stays sealed until somebody looks at it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from peewee import Field, FieldAccessor, Model

from terminal.clock import Entropy
from terminal.ledger.errors import LedgerCorrupt
from terminal.ledger.keys import Keyring

KEY_ID_BYTES: Final = 4
_NONCE_BYTES: Final = 12
_VALUE = TypeVar("_VALUE")


class FieldCipher:
    """Seals single cells with the current data key, opens them with whichever key of the ring they name."""

    def __init__(self, keys: Keyring, entropy: Entropy) -> None:
        self.keys: Final = keys
        self.current_id: Final = keys.current.id
        self._ciphers = {key.id: AESGCM(key.material) for key in (*keys.retired, keys.current)}
        self._current = self._ciphers[self.current_id]
        self._entropy = entropy

    def seal(self, plaintext: bytes, *, table: str, column: str, row: str) -> bytes:
        nonce = self._entropy(_NONCE_BYTES)
        return self.current_id + nonce + self._current.encrypt(nonce, plaintext, _cell(table, column, row))

    def open(self, sealed: bytes, *, table: str, column: str, row: str) -> bytes:
        """Raises `LedgerCorrupt` for a cell that was altered or moved. That no key is missing was made sure before."""
        nonce = sealed[KEY_ID_BYTES : KEY_ID_BYTES + _NONCE_BYTES]
        cipher = self._ciphers.get(sealed[:KEY_ID_BYTES])
        try:
            if cipher is None:
                raise ValueError("the id of no known key")
            return cipher.decrypt(nonce, sealed[KEY_ID_BYTES + _NONCE_BYTES :], _cell(table, column, row))
        except (InvalidTag, ValueError) as error:
            raise LedgerCorrupt(
                f"a value in {table}.{column} was altered or moved: it is not used, and nothing is lost, since it was "
                "recorded twice; restart, and it is rebuilt"
            ) from error


def _cell(table: str, column: str, row: str) -> bytes:
    return b"\0".join((b"payterm field 1", table.encode(), column.encode(), row.encode()))


class _Assigned(NamedTuple):
    """Plaintext on its way into a row."""

    row: Model
    value: Any


class _Sealed(bytes):
    """What came out of the database."""


class _Accessor(FieldAccessor):
    def __get__(self, instance: Model | None, instance_type: type[Model] | None = None) -> Any:
        if instance is None:
            return self.field
        match instance.__data__.get(self.name):
            case _Assigned(value=value):
                return value
            case _Sealed() as sealed:
                return self.field.unseal(sealed, instance)
            case _:
                return None

    def __set__(self, instance: Model, value: Any) -> None:
        keep = value is None or isinstance(value, _Sealed)
        instance.__data__[self.name] = value if keep else _Assigned(instance, value)
        instance._dirty.add(self.name)  # type: ignore[attr-defined]  # the stubs leave it out


if TYPE_CHECKING:
    TypedField = Field
else:

    class TypedField(Field):
        """peewee's fields are generic in its stubs only."""

        def __class_getitem__(cls, value: object) -> type[Field]:
            return cls


class EncryptedField(TypedField[_VALUE]):
    """Base of the encrypted fields. The database that its model is bound to must have a `cipher`."""

    field_type: ClassVar[str] = "BLOB"
    accessor_class = _Accessor

    def db_value(self, value: object) -> bytes | None:
        if value is None:
            return None
        if not isinstance(value, _Assigned):
            raise TypeError(
                f"{self.column_name} is encrypted: assign it to a row; it cannot be compared or bulk-written"
            )
        if _primary_key(value.row) is None:
            raise TypeError(f"{self.column_name} is encrypted to its row: give the row its primary key first")
        return self._cipher().seal(self._encode(value.value), **self._place(value.row))

    def python_value(self, value: object) -> _Sealed | None:
        if value is None:
            return None
        return _Sealed(value if isinstance(value, bytes) else b"")  # what is no blob does not open

    def unseal(self, sealed: bytes, row: Model) -> _VALUE:
        return self._decode(self._cipher().open(sealed, **self._place(row)))

    def _cipher(self) -> FieldCipher:
        cipher = self.model._meta.database.cipher
        assert isinstance(cipher, FieldCipher)  # noqa: S101 (models are bound to a LedgerDatabase, which has one)
        return cipher

    def _place(self, row: Model) -> dict[str, str]:
        return {"table": self.model._meta.table_name, "column": self.column_name, "row": str(_primary_key(row))}

    @abstractmethod
    def _encode(self, value: _VALUE) -> bytes:
        """The plaintext of a value."""

    @abstractmethod
    def _decode(self, plaintext: bytes) -> _VALUE:
        """The value of a plaintext."""


def _primary_key(row: Model) -> object:
    return row.get_id()  # type: ignore[no-untyped-call]


class EncryptedText(EncryptedField[str]):
    def _encode(self, value: str) -> bytes:
        return value.encode()

    def _decode(self, plaintext: bytes) -> str:
        return plaintext.decode()


class EncryptedInt(EncryptedField[int]):
    def _encode(self, value: int) -> bytes:
        return b"%d" % value

    def _decode(self, plaintext: bytes) -> int:
        return int(plaintext)


class EncryptedJson(EncryptedField[dict[str, Any]]):
    """A structure; assign a new one to change it, changes inside it are not noticed."""

    def _encode(self, value: dict[str, Any]) -> bytes:
        return msgspec.json.encode(value)

    def _decode(self, plaintext: bytes) -> dict[str, Any]:
        return msgspec.json.decode(plaintext, type=dict[str, Any])

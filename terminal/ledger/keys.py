"""The terminal's keys: files, read once, never written by a running terminal.

In service they are systemd credentials: decrypted by systemd into a directory that only this service sees. For
development they are 0600 files in a directory outside the state. A key that is missing or not as it should be is
`KeyUnavailable`; no default, no new key, nothing overwritten: a ledger under a key made up in passing could not be read
again. A host's public key counts only with the fingerprint that a person compared.

How a key gives way to another is left to `keychanges`.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import re
import stat
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
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
TERMINAL_KEYS: Final = (DATA_KEY, CHAIN_KEY, SIGNING_KEY, HOST_SEALING_KEY, HOST_ANSWER_KEY)

UNFINISHED: Final = ".new"  # the end of a name that an interrupted command leaves: never read
REMOVED: Final = ".removed"
RETIRED_MAX: Final = 64  # each is read at every start; a rotation a month fills it in five years
SECRET_BYTES: Final = 32  # AES-256 and HMAC-SHA256 alike

_FILE_BYTES_MAX: Final = 4096  # a PEM of either kind of key is under 200 bytes
_ENTRIES_MAX: Final = 1000  # of a directory of keys: more means that it is some other directory
_HEX: Final = re.compile(r"[0-9a-f]{64}", re.ASCII | re.IGNORECASE)

PublicKey: TypeAlias = Ed25519PublicKey | X25519PublicKey


@dataclass(frozen=True, slots=True)
class SecretKey:
    """A symmetric key. Its id names it and gives nothing away."""

    material: bytes = field(repr=False)
    id: bytes = field(init=False)  # four bytes; computed once, since every record and cell is looked up by it

    def __post_init__(self) -> None:
        if len(self.material) != SECRET_BYTES:
            raise ValueError(f"a secret key has {SECRET_BYTES} bytes")
        object.__setattr__(self, "id", self.derive(b"payterm key id")[:4])

    def derive(self, purpose: bytes) -> bytes:
        """32 bytes for one purpose."""
        return hmac.digest(self.material, purpose, "sha256")


def fingerprint(key: PublicKey) -> str:
    """SHA-256 of the DER SubjectPublicKeyInfo, 64 hex digits: what people compare."""
    return hashlib.sha256(der(key)).hexdigest()


def key_id(key: PublicKey) -> str:
    """The first 16 digits of the fingerprint: what envelopes and answers carry."""
    return fingerprint(key)[:16]


@dataclass(frozen=True, slots=True)
class Keyring:
    """One current key, which seals everything new, and retired ones, which only open what they once sealed."""

    current: SecretKey
    retired: tuple[SecretKey, ...] = ()

    def by_id(self, id_: bytes) -> SecretKey | None:
        """The key with this id, current or retired; None when it is not here."""
        return next((key for key in (self.current, *self.retired) if key.id == id_), None)


class KeyStore:
    """A directory of key files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # systemd's own credentials directory is reachable by this service only; the mode of its files is systemd's.
        self._guarded = is_service_credentials(directory)

    def text(self, name: str) -> str:
        """A secret that somebody else has made: the key of an interface. Its form is for the caller to judge."""
        return self._read(name, private=True).decode("ascii", "replace").strip()

    def secret(self, name: str) -> SecretKey:
        text = self.text(name)
        if not _HEX.fullmatch(text):
            raise _unavailable(name, "does not hold 64 hex digits")
        return SecretKey(bytes.fromhex(text))

    def keyring(self, name: str) -> Keyring:
        """The current key `name` and every retired one, `name.<8 hex id>`. One that cannot be read refuses them all:
        what is sealed under it would be found missing only in the middle of a sale.
        """
        current = self.secret(name)
        retired = []
        for kept in self.retired_names(name):
            key = self.secret(kept)
            if kept != retired_name(name, key.id):
                raise _unavailable(kept, f"holds another key than its name says: its id is {key.id.hex()}")
            if key.id != current.id:
                retired.append(key)
            elif not hmac.compare_digest(key.material, current.material):
                raise _unavailable(kept, f"has the id of {name} and is another key")
            # Otherwise a rotation was interrupted after it had kept the key and before there was a new one.
        return Keyring(current, tuple(retired))

    def retired_names(self, name: str) -> list[str]:
        """The names of retired keys that are there, in order of name."""
        pattern = re.compile(re.escape(name) + r"\.[0-9a-fA-F]{8}")
        names = [entry for entry in self.entries() if pattern.fullmatch(entry)]
        if len(names) > RETIRED_MAX:
            raise _unavailable(name, f"has more than {RETIRED_MAX} retired ones beside it")
        return names

    def entries(self) -> list[str]:
        """Every name in the directory, in order."""
        try:
            names = sorted(os.listdir(self._directory))  # noqa: PTH208 (names are all that is wanted)
        except OSError as error:
            raise KeyUnavailable(
                f"the keys in {self._directory} cannot be read ({error.strerror}): no sale can be recorded or sent, "
                "what is recorded is safe; restore the directory, or name the right one"
            ) from error
        if len(names) > _ENTRIES_MAX:
            raise KeyUnavailable(
                f"{self._directory} holds more than {_ENTRIES_MAX} files and is no directory of keys: no sale can be "
                "recorded or sent, what is recorded is safe; name the right directory"
            )
        return names

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
        key = self._confirmed(HOST_SEALING_KEY, confirmed)
        if not isinstance(key, X25519PublicKey):
            raise _unavailable(HOST_SEALING_KEY, "is no X25519 key")
        return key

    def host_answer(self, confirmed: str) -> Ed25519PublicKey:
        key = self._confirmed(HOST_ANSWER_KEY, confirmed)
        if not isinstance(key, Ed25519PublicKey):
            raise _unavailable(HOST_ANSWER_KEY, "is no Ed25519 key")
        return key

    def public(self, name: str) -> PublicKey:
        """A public key as it stands in its file: not confirmed by anybody yet."""
        return parse_public(name, self._read(name, private=False))

    def _confirmed(self, name: str, confirmed: str) -> PublicKey:
        wanted = normal_fingerprint(confirmed)
        key = self.public(name)
        if fingerprint(key) == wanted:
            return key
        # A new host key is brought in first and configured then: until it is, the previous one goes on.
        previous = f"{name}.{wanted[:16]}"
        if previous in self.entries() and fingerprint(kept := self.public(previous)) == wanted:
            return kept
        raise _unavailable(name, f"has the fingerprint {fingerprint(key)}, which is not the configured one")

    def _read(self, name: str, *, private: bool) -> bytes:
        try:
            descriptor = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise _unavailable(name, "is not a regular file")
                if private and not self._guarded:
                    if status.st_uid != os.geteuid():
                        raise _unavailable(name, "belongs to another user than the one who reads it")
                    if stat.S_IMODE(status.st_mode) not in {0o600, 0o400}:
                        raise _unavailable(name, "can be read by others: its mode must be 0600 or 0400")
                content = os.read(descriptor, _FILE_BYTES_MAX + 1)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _unavailable(name, f"cannot be read from {self._directory} ({error.strerror})") from error
        if len(content) > _FILE_BYTES_MAX:
            raise _unavailable(name, f"is longer than {_FILE_BYTES_MAX} bytes")
        return content


@dataclass(frozen=True, slots=True)
class TerminalKeys:
    """What the terminal holds: it can seal card data and sign envelopes, and open nothing that it has sealed."""

    data: Keyring = field(repr=False)
    chain: SecretKey = field(repr=False)
    signing: Ed25519PrivateKey = field(repr=False)
    host_sealing: X25519PublicKey
    host_answer: Ed25519PublicKey

    @classmethod
    def load(cls, directory: Path, sealing_fingerprint: str, answer_fingerprint: str) -> TerminalKeys:
        """Read all of them. Raises `KeyUnavailable`."""
        store = KeyStore(directory)
        return cls(
            data=store.keyring(DATA_KEY),
            chain=store.secret(CHAIN_KEY),
            signing=store.signing(),
            host_sealing=store.host_sealing(sealing_fingerprint),
            host_answer=store.host_answer(answer_fingerprint),
        )


def generate(directory: Path, entropy: Entropy) -> None:
    """Make the terminal's own three keys for development, 0600, and `signing-key.pub` for the host to know it by.

    The host's public keys are not made here: they come from the host. Raises `KeyUnavailable` where a key already is.
    """
    signing = Ed25519PrivateKey.from_private_bytes(entropy(SECRET_BYTES))
    _write_new(
        directory,
        {
            DATA_KEY: new_secret_file(SecretKey(entropy(SECRET_BYTES))),
            CHAIN_KEY: new_secret_file(SecretKey(entropy(SECRET_BYTES))),
            SIGNING_KEY: signing.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            SIGNING_KEY + ".pub": pem(signing.public_key()),
        },
    )


def generate_spool_key(directory: Path, entropy: Entropy) -> None:
    """Make the sync service's key for development. Raises `KeyUnavailable` where it already is."""
    _write_new(directory, {SPOOL_KEY: new_secret_file(SecretKey(entropy(SECRET_BYTES)))})


class KeyState(StrEnum):
    CURRENT = "current"
    RETIRED = "retired"  # a data key that opens what it once sealed
    PREVIOUS = "previous"  # a host key that was replaced
    UNFINISHED = "unfinished"  # left by an interrupted command: nothing was ever sealed under it, or any longer is
    MISSING = "missing"
    FOREIGN = "foreign"  # no key of this terminal


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """One file as people may see it. `identity`: id of a secret key, fingerprint of a public or signing key."""

    name: str
    kind: str
    identity: str | None
    state: KeyState
    modified_ms: int | None  # wall time; for credentials that is when the service started
    problem: str | None


_KINDS: Final = {
    DATA_KEY: "AES-256",
    CHAIN_KEY: "HMAC-SHA256",
    SPOOL_KEY: "AES-256",
    SIGNING_KEY: "Ed25519, private",
    SIGNING_KEY + ".pub": "Ed25519, public",
    HOST_SEALING_KEY: "X25519, public",
    HOST_ANSWER_KEY: "Ed25519, public",
}


_PUBLIC: Final[Mapping[str, type[PublicKey]]] = {
    SIGNING_KEY + ".pub": Ed25519PublicKey,
    HOST_SEALING_KEY: X25519PublicKey,
    HOST_ANSWER_KEY: Ed25519PublicKey,
}


def inventory(directory: Path, expected: Collection[str] = TERMINAL_KEYS) -> list[KeyInfo]:
    """Every file in a directory of keys and what is expected and not there. Reads all, holds no key material.

    Raises `KeyUnavailable` only where the directory itself cannot be read.
    """
    store = KeyStore(directory)
    entries = store.entries()
    found = [_info(store, directory, name) for name in entries]
    missing = [
        KeyInfo(name, _KINDS.get(name, ""), None, KeyState.MISSING, None, "is not there: no sale can be taken")
        for name in expected
        if name not in entries
    ]
    return found + missing


def _info(store: KeyStore, directory: Path, name: str) -> KeyInfo:
    base, state = _place(name)
    identity = problem = None
    if state is KeyState.FOREIGN:
        problem = "is no key of this terminal"
    elif state is KeyState.UNFINISHED:
        problem = "was left by an interrupted command, and nothing is sealed under it: it may be deleted"
    else:
        try:
            identity = _identity(store, base, name)
            if base != name and not identity.startswith(name.removeprefix(base + ".")):
                problem = "holds another key than its name says"
        except KeyUnavailable as error:
            problem = str(error)
    try:
        modified_ms = (directory / name).lstat().st_mtime_ns // 1_000_000
    except OSError:
        modified_ms = None
    return KeyInfo(name, _KINDS.get(base, ""), identity, state, modified_ms, problem)


def _place(name: str) -> tuple[str, KeyState]:
    """What a file's name says: whose it is, and where it stands."""
    if name in _KINDS:
        return name, KeyState.CURRENT
    base, _, rest = name.partition(".")
    if base in _KINDS and rest and name.endswith((UNFINISHED, REMOVED)):
        return base, KeyState.UNFINISHED
    if base == DATA_KEY and re.fullmatch(r"[0-9a-f]{8}", rest):
        return base, KeyState.RETIRED
    if base in {HOST_SEALING_KEY, HOST_ANSWER_KEY} and re.fullmatch(r"[0-9a-f]{16}", rest):
        return base, KeyState.PREVIOUS
    return name, KeyState.FOREIGN


def _identity(store: KeyStore, base: str, name: str) -> str:
    if base == SIGNING_KEY:
        return fingerprint(store.signing().public_key())
    if base not in _PUBLIC:
        return store.secret(name).id.hex()
    key = store.public(name)
    if not isinstance(key, _PUBLIC[base]):
        raise _unavailable(name, "is a key of another kind")
    return fingerprint(key)


def new_secret_file(key: SecretKey) -> bytes:
    """What stands in a secret key's file."""
    return key.material.hex().encode() + b"\n"


def pem(key: PublicKey) -> bytes:
    """What stands in a public key's file."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def der(key: PublicKey) -> bytes:
    """What is fingerprinted, and signed by a root."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def parse_public(name: str, content: bytes) -> PublicKey:
    """A public key from its PEM; `name` is what to call it. Raises `KeyUnavailable`."""
    try:
        key = serialization.load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        # Without the cause: somebody may have brought a private key by mistake.
        raise _unavailable(name, "is no SubjectPublicKeyInfo PEM") from None
    if not isinstance(key, Ed25519PublicKey | X25519PublicKey):
        raise _unavailable(name, "is a key of another kind")
    return key


def normal_fingerprint(text: str) -> str:
    """A fingerprint as people write it (capitals, colons, blanks), as `fingerprint` does."""
    return "".join(text.split()).lower().replace(":", "")


def retired_name(name: str, id_: bytes) -> str:
    """The file that keeps a retired secret key."""
    return f"{name}.{id_.hex()}"


def is_service_credentials(directory: Path) -> bool:
    """Whether this is where systemd gives this service its credentials."""
    return os.environ.get("CREDENTIALS_DIRECTORY") == str(directory)


def write_new_file(directory: int, name: str, content: bytes, mode: int) -> None:
    """A new file in an open directory, its content durable; its name is so only with the directory's next fsync."""
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=directory)
    try:
        os.fchmod(descriptor, mode)  # whatever the umask is
        if os.write(descriptor, content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_new(directory: Path, contents: Mapping[str, bytes]) -> None:
    written: list[str] = []
    try:
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with opened(directory) as descriptor:
            for name in contents:
                if os.path.lexists(directory / name):
                    raise KeyUnavailable(
                        f"{name} is already in {directory}: it was left as it is, since a ledger may depend on it; "
                        "choose another directory, or remove it yourself together with the ledger"
                    )
            try:
                for name, content in contents.items():
                    written.append(name)
                    write_new_file(descriptor, name, content, 0o600)
                os.fsync(descriptor)
            except FileExistsError:
                written.pop()
                raise
            for path in made:
                with opened(path.parent) as parent:
                    os.fsync(parent)  # a ledger must not outlive its keys because a directory's name was not durable
    except OSError as error:
        for name in written:
            (directory / name).unlink(missing_ok=True)  # made just now: nothing is sealed under them
        raise KeyUnavailable(
            f"no keys were made in {directory} ({error.strerror}), and none was changed: "
            "nothing depends on them yet; check the directory and its free space, then do it again"
        ) from error


@contextmanager
def opened(directory: Path) -> Generator[int]:
    """A directory's descriptor. Errors are `OSError`."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _unavailable(name: str, what: str) -> KeyUnavailable:
    return KeyUnavailable(
        f"the key {name} {what}: no sale can be recorded or sent, what is recorded is safe; restore the right key file"
    )

"""How a key gives way to another, without ever being lost.

A data key that is rotated stays under a second name, which is durable before the first one is given to the new key:
wherever the power fails, what is sealed can be read. A terminal that runs goes on with the keys that it has read; it
seals under the new one from its next start, and the store then moves what is sealed under the old one, bit by bit. Only
when nothing is left under it may a retired key be removed.

Credentials are encrypted by root's own tools, so for them there is a script that the operator reads and runs, with the
same order in it. A host's key comes in with a fingerprint that a person compared, or signed by the configured root.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from terminal.clock import Entropy
from terminal.ledger.errors import KeyUnavailable
from terminal.ledger.keys import (
    DATA_KEY,
    HOST_ANSWER_KEY,
    HOST_SEALING_KEY,
    REMOVED,
    RETIRED_MAX,
    SECRET_BYTES,
    UNFINISHED,
    Keyring,
    KeyStore,
    PublicKey,
    SecretKey,
    der,
    fingerprint,
    is_service_credentials,
    new_secret_file,
    normal_fingerprint,
    opened,
    parse_public,
    pem,
    retired_name,
    write_new_file,
)

CREDENTIALS: Final = Path("/etc/payterm/credentials")  # where the units take encrypted credentials from
UNITS: Final = Path("/etc/systemd/system")

_DRAWS_MAX: Final = 8  # a key whose four-byte id is taken already comes once in millions of draws
_SIGNATURE_BYTES: Final = 64
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")
_RUNTIME_CREDENTIALS: Final = Path("/run/credentials")  # systemd's, of whichever service
_PRINT_ID: Final = (  # the id of a secret key, with what every system has
    "import hmac, sys; key = bytes.fromhex(sys.stdin.read()); assert len(key) == 32; "
    'print(hmac.digest(key, b"payterm key id", "sha256").hex()[:8])'
)
_UNITS_WITH_DATA_KEY: Final = ("payterm.service", "payterm-recover.service")

_HOST_KINDS: Final[Mapping[str, type[PublicKey]]] = {
    HOST_SEALING_KEY: X25519PublicKey,
    HOST_ANSWER_KEY: Ed25519PublicKey,
}
_UnitCommand: TypeAlias = Callable[[Path, str, Path], str]

# --- The data key changes -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rotation:
    """The ids of the key that was current and of the one that is."""

    retired: bytes
    current: bytes


def rotate_data_key(directory: Path, entropy: Entropy) -> Rotation:
    """Make a new current data key and keep the old one as retired.

    A terminal that runs goes on with the keys that it has read; at its next start it seals under the new one. May be
    repeated after an interruption. Raises `KeyUnavailable`; then the current key is the old one or, if the storage
    failed at the very end, the new one, and the old one is there in either case.
    """
    if _is_credentials(directory):
        raise _refused(
            f"{directory} holds systemd credentials, which root makes",
            "run the script of `credential_rotation`, which makes the new one",
        )
    with _changing(directory) as descriptor:
        before = KeyStore(directory).keyring(DATA_KEY)
        if len(before.retired) >= RETIRED_MAX:
            raise _refused(f"there are {RETIRED_MAX} retired data keys", "remove those that nothing is sealed under")
        new = _fresh_secret(before, entropy)
        _replace(
            descriptor, DATA_KEY, new_secret_file(new), kept_as=retired_name(DATA_KEY, before.current.id), mode=0o600
        )
        after = KeyStore(directory).keyring(DATA_KEY)
        if after.current != new or any(after.by_id(key.id) != key for key in (before.current, *before.retired)):
            raise KeyUnavailable(
                f"the data keys in {directory} do not read back as they were written: what is recorded is safe as long "
                "as they are left alone; do not restart the terminal, copy the directory, and check the storage"
            )
    return Rotation(retired=before.current.id, current=new.id)


def retire(directory: Path, id_: bytes, *, sealed: int, sealing: bytes) -> None:
    """Remove a retired data key for good.

    `sealed` counts whatever is still sealed under it: cells, journal records, archive segments; `sealing` is the id of
    the key under which the terminal that counted seals now. Backups made under a retired key cannot be counted, and
    nobody will read them again. Raises `KeyUnavailable` unless `sealed` is 0 and the terminal uses the current key.
    """
    name = retired_name(DATA_KEY, id_)
    if _is_credentials(directory):
        raise _refused(
            f"{directory} holds systemd credentials, which root removes", "run the script of `credential_retirement`"
        )
    with _changing(directory) as descriptor:
        keyring = KeyStore(directory).keyring(DATA_KEY)
        if id_ == keyring.current.id:
            raise _refused(f"the data key {id_.hex()} is the current one", "rotate first")
        if keyring.by_id(id_) is None:
            raise _refused(f"there is no {name} in {directory}", "look at the list of keys")
        if sealing != keyring.current.id:
            raise _refused(f"the terminal still seals under the data key {sealing.hex()}", "restart it first")
        _check_unused(name, sealed)
        removed = name + REMOVED
        # Under another name first: a key that is half erased under its own would refuse the whole keyring.
        os.rename(name, removed, src_dir_fd=descriptor, dst_dir_fd=descriptor)
        os.fsync(descriptor)
        _erase(descriptor, removed)
        os.fsync(descriptor)


# --- The host's keys change ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compared:
    """A person has compared the key's fingerprint with what the host's operator said."""

    fingerprint: str


@dataclass(frozen=True, slots=True)
class Signed:
    """The configured root has signed the key: Ed25519 over its DER SubjectPublicKeyInfo."""

    root_pem: bytes
    root_fingerprint: str  # as configured
    signature: bytes


@dataclass(frozen=True, slots=True)
class HostKeyChange:
    """Fingerprints before and after; `kept_as` names the file that keeps the previous key."""

    name: str
    previous: str | None
    current: str
    kept_as: str | None


def read_host_key(which: str, content: bytes) -> PublicKey:
    """The key in a PEM that somebody brings as `which`: to show its fingerprint. Raises `KeyUnavailable`."""
    if which not in _HOST_KINDS:
        raise _refused(f"{which} is no key of the host", f"name {HOST_SEALING_KEY} or {HOST_ANSWER_KEY}")
    key = _brought(which, content)
    if not isinstance(key, _HOST_KINDS[which]):
        raise _refused(f"what was brought as {which} is a key of another kind", "bring the right file")
    return key


def import_host_key(directory: Path, which: str, content: bytes, proof: Compared | Signed) -> HostKeyChange:
    """Put a host key into its place, if the proof holds; the previous one is kept under its id.

    The terminal takes the new key when its fingerprint is configured, and goes on with the previous one until then.
    Raises `KeyUnavailable`.
    """
    key = read_host_key(which, content)
    now = fingerprint(key)
    match proof:
        case Compared(fingerprint=confirmed):
            if normal_fingerprint(confirmed) != now:
                raise _refused(
                    f"the key brought as {which} has the fingerprint {now}, and {_shown(confirmed)} was confirmed",
                    "ask the host's operator which one is right",
                )
        case Signed():
            _check_root(key, which, proof)
    if _is_credentials(directory):
        raise _refused(
            f"{directory} is what systemd made of the credentials",
            f"name {CREDENTIALS.parent}, where it takes them from",
        )
    with _changing(directory) as descriptor:
        store = KeyStore(directory)
        entries = store.entries()
        previous = fingerprint(store.public(which)) if which in entries else None
        if previous == now:
            return HostKeyChange(which, previous, now, None)
        kept_as = f"{which}.{previous[:16]}" if previous else None
        if kept_as in entries and fingerprint(store.public(kept_as)) != previous:
            raise _refused(f"{kept_as} holds another key than its name says", "move it elsewhere")
        _replace(descriptor, which, pem(key), kept_as=kept_as, mode=0o644)
        if fingerprint(store.public(which)) != now:
            raise _refused(f"{which} does not read back as it was written", "check the storage")
    return HostKeyChange(which, previous, now, kept_as)


def _brought(as_: str, content: bytes) -> PublicKey:
    try:
        return parse_public(as_, content)
    except KeyUnavailable:
        raise _refused(
            f"what was brought as {as_} is no Ed25519 or X25519 public key (SubjectPublicKeyInfo PEM)",
            "bring the right file",
        ) from None


def _check_root(key: PublicKey, which: str, proof: Signed) -> None:
    root = _brought("root", proof.root_pem)
    if not isinstance(root, Ed25519PublicKey):
        raise _refused("the root is no Ed25519 key", "bring the right file")
    if fingerprint(root) != normal_fingerprint(proof.root_fingerprint):
        raise _refused(
            f"the root has the fingerprint {fingerprint(root)}, and {_shown(proof.root_fingerprint)} is configured",
            "bring the root that is configured",
        )
    try:
        if len(proof.signature) != _SIGNATURE_BYTES:
            raise InvalidSignature
        root.verify(proof.signature, der(key))
    except InvalidSignature:
        raise _refused(
            f"the root has not signed the key brought as {which}, {fingerprint(key)}",
            "bring the signature that belongs to it, or compare the fingerprint",
        ) from None


# --- With systemd credentials -------------------------------------------------------------------------------------


def credential_rotation(current: bytes, *, credentials: Path = CREDENTIALS, units: Path = UNITS) -> str:
    """The script that rotates the data key with this id where the keys are systemd credentials; root runs it in bash.

    The same order as `rotate_data_key`, each step durable before the next. It may be run again after an interruption;
    once the key with this id is no longer the current one, it stops before it has changed anything.
    """
    now, kept, id_ = credentials / DATA_KEY, credentials / retired_name(DATA_KEY, current), current.hex()
    return _script(
        f"""
        id_of() {{ systemd-creds decrypt --name="$1" "$2" - | python3 -c {shlex.quote(_PRINT_ID)}; }}
        stop() {{ echo "$1: no key was changed" >&2; exit 1; }}
        # 1. Nothing happens unless this is the current key.
        [ "$(id_of {DATA_KEY} {_q(now)})" = {id_} ] || stop '{id_} is not the current data key'
        # 2. It is kept under its retired name.
        if [ ! -e {_q(kept)} ]; then
            systemd-creds decrypt --name={DATA_KEY} {_q(now)} - |
                systemd-creds encrypt --name={kept.name} - {_q(kept, UNFINISHED)}
            sync {_q(kept, UNFINISHED)}
            mv -T {_q(kept, UNFINISHED)} {_q(kept)}
        fi
        sync {_q(kept)} {_q(credentials)}
        [ "$(id_of {kept.name} {_q(kept)})" = {id_} ] || stop '{kept} is another key'
        # 3. The services read the retired key from their next start.
        {_each_unit(units, kept, _drop_in)}
        # 4. The new key, read back before it takes the place.
        od -An -vtx1 -N{SECRET_BYTES} /dev/urandom | tr -d ' \n' |
            systemd-creds encrypt --name={DATA_KEY} - {_q(now, UNFINISHED)}
        new=$(id_of {DATA_KEY} {_q(now, UNFINISHED)})
        sync {_q(now, UNFINISHED)}
        mv -T {_q(now, UNFINISHED)} {_q(now)}
        sync {_q(credentials)}
        echo "the current data key is $new, {id_} is retired"
        systemctl daemon-reload
        systemctl restart payterm-recover.service payterm.service
        """
    )


def credential_retirement(
    id_: bytes, *, sealed: int, sealing: bytes, credentials: Path = CREDENTIALS, units: Path = UNITS
) -> str:
    """The script that removes a retired data key where the keys are systemd credentials; root runs it in bash.

    `sealed` and `sealing` as for `retire`. Raises `KeyUnavailable` like it.
    """
    kept = credentials / retired_name(DATA_KEY, id_)
    if sealing == id_:
        raise _refused(f"the terminal still seals under the data key {id_.hex()}", "rotate, and restart it first")
    _check_unused(kept.name, sealed)
    return _script(
        f"""
        # The units first: one that names a credential that is not there does not start.
        {_each_unit(units, kept, _no_drop_in)}
        systemctl daemon-reload
        rm -f {_q(kept)}
        sync {_q(credentials)}
        """
    )


def _drop_in(directory: Path, name: str, credential: Path) -> str:
    line = f"LoadCredentialEncrypted={credential.name}:{credential}"
    return f"""mkdir -p {_q(directory)}
        printf '%s\\n' '[Service]' {shlex.quote(line)} > {_q(directory / name, UNFINISHED)}
        sync {_q(directory / name, UNFINISHED)}
        mv -T {_q(directory / name, UNFINISHED)} {_q(directory / name)}
        sync {_q(directory)} {_q(directory.parent)}"""


def _no_drop_in(directory: Path, name: str, _: Path) -> str:
    return f"rm -f {_q(directory / name)}"


def _each_unit(units: Path, credential: Path, command: _UnitCommand) -> str:
    return "\n        ".join(
        command(units / f"{unit}.d", f"{credential.name}.conf", credential) for unit in _UNITS_WITH_DATA_KEY
    )


def _script(commands: str) -> str:
    # In parentheses: bash reads the whole of it before it runs the first line, so half a script does nothing.
    lines = [line.removeprefix(" " * 8) for line in commands.strip("\n").rstrip().splitlines()]
    return "\n".join(["(", "set -euo pipefail", "umask 077", *lines, ")", ""])


def _q(path: Path, suffix: str = "") -> str:
    return shlex.quote(f"{path}{suffix}")


# --- How it is done -----------------------------------------------------------------------------------------------


@contextmanager
def _changing(directory: Path) -> Generator[int]:
    """The open directory, for one command at a time. The storage's errors become `KeyUnavailable`."""
    try:
        with opened(directory) as descriptor:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _refused(f"another command is changing the keys in {directory}", "wait for it") from None
            yield descriptor
    except OSError as error:
        raise KeyUnavailable(
            f"the storage of {directory} failed ({error.strerror}): the change was broken off, no key is lost, and a "
            "running terminal is not concerned; check free space and the right to write there, then do it again"
        ) from error


def _replace(directory: int, name: str, content: bytes, *, kept_as: str | None, mode: int) -> None:
    """Give `name` to a new key; the old one stays as `kept_as`. May be repeated after an interruption at any point.

    The second name is a hard link: the old key is never written again, so there is nothing that could be half written.
    It is durable before `name` leaves the old key, and the new key is durable before it takes `name`.
    """
    if kept_as is not None:
        with suppress(FileExistsError):  # from an interrupted run; the caller has made sure that it is the same key
            os.link(name, kept_as, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        _sync_file(directory, kept_as)
        os.fsync(directory)
    unfinished = name + UNFINISHED
    with suppress(FileNotFoundError):
        os.unlink(unfinished, dir_fd=directory)  # it never had its name: nothing is sealed under it
    write_new_file(directory, unfinished, content, mode)
    os.rename(unfinished, name, src_dir_fd=directory, dst_dir_fd=directory)
    os.fsync(directory)


def _sync_file(directory: int, name: str) -> None:
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _erase(directory: int, name: str) -> None:
    """Overwrite in place, then unlink. What a card's controller keeps elsewhere is out of reach."""
    descriptor = os.open(name, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory)
    try:
        status = os.fstat(descriptor)
        if status.st_nlink == 1:  # with a second name it is somebody's copy, too
            os.write(descriptor, bytes(status.st_size))
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.unlink(name, dir_fd=directory)


def _check_unused(name: str, sealed: int) -> None:
    if sealed:
        raise _refused(f"{sealed} things are still sealed under {name}", "let the terminal move them to the new key")


def _fresh_secret(taken: Keyring, entropy: Entropy) -> SecretKey:
    for _ in range(_DRAWS_MAX):
        key = SecretKey(entropy(SECRET_BYTES))
        if taken.by_id(key.id) is None:
            return key
    raise _refused("the random generator repeats itself", "do not use this machine until that is understood")


def _is_credentials(directory: Path) -> bool:
    return is_service_credentials(directory) or directory.absolute().is_relative_to(_RUNTIME_CREDENTIALS)


def _shown(text: str) -> str:
    """What somebody typed as a fingerprint, if it is one: anything else may be a secret in the wrong place."""
    text = normal_fingerprint(text)
    return text if _FINGERPRINT.fullmatch(text) else "no fingerprint"


def _refused(what: str, remedy: str) -> KeyUnavailable:
    return KeyUnavailable(f"{what}: no key was changed, and what is recorded is safe; {remedy}")

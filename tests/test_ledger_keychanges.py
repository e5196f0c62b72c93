"""Keys change and none is lost: power cuts at every step, storage errors at every call, and what must be refused.

A power cut leaves what was flushed, and of the rest any part: each name that was given or taken since the directory's
last fsync may be there or not, each content that was not flushed may be missing, half or whole.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from terminal.ledger.errors import KeyUnavailable
from terminal.ledger.keychanges import (
    Compared,
    Signed,
    credential_retirement,
    credential_rotation,
    import_host_key,
    read_host_key,
    retire,
    rotate_data_key,
)
from terminal.ledger.keys import (
    HOST_ANSWER_KEY,
    HOST_SEALING_KEY,
    Keyring,
    KeyStore,
    SecretKey,
    der,
    fingerprint,
    generate,
    inventory,
    pem,
)

CALLS = ("link", "open", "write", "fsync", "rename", "unlink")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    generate(tmp_path / "keys", Random(3).randbytes)
    return tmp_path / "keys"


def keyring(directory: Path) -> Keyring:
    return KeyStore(directory).keyring("data-key")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- Rotation -----------------------------------------------------------------------------------------------------


def test_a_rotated_key_still_opens(directory: Path) -> None:
    before = keyring(directory).current
    rotation = rotate_data_key(directory, Random(4).randbytes)
    after = keyring(directory)
    assert (rotation.retired, rotation.current) == (before.id, after.current.id)
    assert after.current != before
    assert after.retired == (before,)
    again = rotate_data_key(directory, Random(5).randbytes)
    assert {key.id for key in keyring(directory).retired} == {before.id, again.retired}
    assert stat.S_IMODE((directory / "data-key").stat().st_mode) == 0o600
    assert not [info for info in inventory(directory, ()) if info.problem]


@dataclass
class Storage:
    """Calls on one directory, as they are made, and what a power cut after any of them leaves."""

    directory: Path
    names: dict[str, int] = field(default_factory=dict)  # what is durable
    data: dict[int, bytes] = field(default_factory=dict)
    log: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for path in self.directory.iterdir():
            self.names[path.name] = path.stat().st_ino
            self.data[path.stat().st_ino] = path.read_bytes()

    def record(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = {name: getattr(os, name) for name in CALLS}

        def inode(name: str) -> int:
            return (self.directory / name).lstat().st_ino

        def link(source: str, target: str, **options: Any) -> None:
            real["link"](source, target, **options)
            self.log.append(("names", ((), ((target, inode(target)),))))

        def open_(name: Any, flags: int, *mode: int, **options: Any) -> int:
            descriptor: int = real["open"](name, flags, *mode, **options)
            if flags & os.O_CREAT:
                self.log.append(("names", ((), ((name, inode(name)),))))
            return descriptor

        def write(descriptor: int, content: bytes) -> int:
            self.log.append(("write", (os.fstat(descriptor).st_ino, bytes(content))))
            return int(real["write"](descriptor, content))

        def fsync(descriptor: int) -> None:
            real["fsync"](descriptor)
            status = os.fstat(descriptor)
            self.log.append(("fsync directory", None) if stat.S_ISDIR(status.st_mode) else ("fsync", status.st_ino))

        def rename(source: str, target: str, **options: Any) -> None:
            number = inode(source)
            real["rename"](source, target, **options)
            self.log.append(("names", ((source,), ((target, number),))))

        def unlink(name: str, **options: Any) -> None:
            real["unlink"](name, **options)
            self.log.append(("names", ((name,), ())))

        for name, call in zip(CALLS, (link, open_, write, fsync, rename, unlink), strict=True):
            monkeypatch.setattr(os, name, call)

    def power_cuts(self) -> Iterator[dict[str, bytes]]:
        """Every directory that a power cut can leave."""
        for end in range(len(self.log) + 1):
            names, data = dict(self.names), dict(self.data)
            pending: list[tuple[tuple[str, ...], tuple[tuple[str, int], ...]]] = []
            unflushed: dict[int, bytes] = {}
            for what, value in self.log[:end]:
                match what:
                    case "names":
                        pending.append(value)
                    case "write":
                        unflushed[value[0]] = value[1]
                    case "fsync":
                        data |= {number: content for number, content in unflushed.items() if number == value}
                        unflushed.pop(value, None)
                    case _:
                        for change in pending:
                            apply(names, change)
                        pending = []
            for kept in itertools.product((False, True), repeat=len(pending)):
                left = dict(names)
                for change in itertools.compress(pending, kept):
                    apply(left, change)
                for part in (0.0, 0.5, 1.0):
                    torn = {number: content[: int(len(content) * part)] for number, content in unflushed.items()}
                    yield {name: (data | torn).get(number, b"") for name, number in left.items()}


def apply(names: dict[str, int], change: tuple[tuple[str, ...], tuple[tuple[str, int], ...]]) -> None:
    gone, come = change
    for name in gone:
        names.pop(name, None)
    names.update(come)


def lost(states: Iterator[dict[str, bytes]], needed: SecretKey, tmp_path: Path) -> list[str]:
    """What is wrong with the directories that power cuts left, and how many there were."""
    wrong = []
    for count, state in enumerate({tuple(sorted(state.items())) for state in states}):
        directory = tmp_path / "left" / str(count)
        directory.mkdir(parents=True)
        for name, content in state:
            (directory / name).write_bytes(content)
            (directory / name).chmod(0o600)
        try:
            if keyring(directory).by_id(needed.id) != needed:
                wrong.append("lost")
            # The terminal starts; and whoever repeats the command ends well.
            rotate_data_key(directory, Random(6).randbytes)
            if keyring(directory).by_id(needed.id) != needed or keyring(directory).current == needed:
                wrong.append("lost when repeated")
        except KeyUnavailable as error:
            wrong.append(f"unusable: {error}")
    assert count >= 4  # or nothing was tried
    return wrong


def test_a_power_cut_at_any_step_of_a_rotation_loses_no_key(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, storage = keyring(directory).current, Storage(directory)
    with monkeypatch.context() as patched:
        storage.record(patched)
        rotate_data_key(directory, Random(4).randbytes)
    assert lost(storage.power_cuts(), before, tmp_path) == []


def drop(what: str) -> Callable[[Storage], None]:
    def change(storage: Storage) -> None:
        storage.log = [entry for entry in storage.log if entry[0] != what]

    return change


def swap_names(storage: Storage) -> None:
    """The new key takes the name first, and the old one is kept afterwards."""
    at = [index for index, entry in enumerate(storage.log) if entry[0] == "names"]
    kept = storage.log[at[0]]
    storage.log = storage.log[: at[0]] + storage.log[at[0] + 1 :] + [kept, ("fsync directory", None)]


@pytest.mark.parametrize("harm", [drop("fsync directory"), drop("fsync"), swap_names], ids=["dir", "file", "order"])
def test_the_power_cuts_find_a_wrong_order(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Storage], None]
) -> None:
    before, storage = keyring(directory).current, Storage(directory)
    with monkeypatch.context() as patched:
        storage.record(patched)
        rotate_data_key(directory, Random(4).randbytes)
    harm(storage)
    assert lost(storage.power_cuts(), before, tmp_path)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "Input/output error"), Killed()], ids=["error", "killed"])
def test_a_call_that_fails_loses_no_key(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    before = keyring(directory).current
    for fatal in range(1, 100):
        copy, calls = tmp_path / f"copy{fatal}", itertools.count(1)
        shutil.copytree(directory, copy)

        def failing(name: str, calls: Iterator[int] = calls, fatal: int = fatal) -> Callable[..., Any]:
            real = getattr(os, name)

            def call(*arguments: Any, **options: Any) -> Any:
                if next(calls) == fatal:
                    raise failure
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patched:
            for name in CALLS:
                patched.setattr(os, name, failing(name))
            try:
                rotate_data_key(copy, Random(4).randbytes)
                break
            except (KeyUnavailable, Killed) as error:
                assert before.material.hex() not in str(error)
        assert keyring(copy).by_id(before.id) == before
        rotate_data_key(copy, Random(5).randbytes)
        assert keyring(copy).by_id(before.id) == before
        assert keyring(copy).current != before
    else:
        pytest.fail("it never came to an end")
    assert fatal > 10  # or nothing was interrupted


def test_a_short_write_is_no_key(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = contents(directory), os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, content: real(descriptor, content[:20]))
        with pytest.raises(KeyUnavailable, match="No space left"):
            rotate_data_key(directory, Random(4).randbytes)
    assert keyring(directory).current.material.hex().encode() == before["data-key"].strip()


@pytest.mark.parametrize("where", ["environment", "/run/credentials/payterm.service"])
def test_credentials_are_rotated_by_root(directory: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    if where == "environment":
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(directory))
    credentials, before = directory if where == "environment" else Path(where), contents(directory)
    with pytest.raises(KeyUnavailable, match="credential_rotation"):
        rotate_data_key(credentials, Random(4).randbytes)
    with pytest.raises(KeyUnavailable, match="credential_retirement"):
        retire(credentials, b"abcd", sealed=0, sealing=b"efgh")
    with pytest.raises(KeyUnavailable, match="name /etc/payterm,"):
        import_host_key(credentials, HOST_ANSWER_KEY, pem(ANSWER), Compared(fingerprint(ANSWER)))
    assert contents(directory) == before


def test_one_command_at_a_time(directory: Path) -> None:
    before, descriptor = contents(directory), os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(KeyUnavailable, match="another command"):
        rotate_data_key(directory, Random(4).randbytes)
    os.close(descriptor)
    assert contents(directory) == before
    rotate_data_key(directory, Random(4).randbytes)


def test_a_random_generator_that_repeats_itself_is_refused(directory: Path) -> None:
    material, before = keyring(directory).current.material, contents(directory)
    with pytest.raises(KeyUnavailable, match="repeats itself"):
        rotate_data_key(directory, lambda _: material)
    assert contents(directory) == before


@pytest.mark.parametrize("harm", ["data-key", "data-key.00000000"])
def test_a_harmed_directory_is_not_rotated(directory: Path, harm: str) -> None:
    (directory / harm).write_text("short")
    (directory / harm).chmod(0o600)
    before = contents(directory)
    with pytest.raises(KeyUnavailable, match=harm):
        rotate_data_key(directory, Random(4).randbytes)
    assert contents(directory) == before


# --- Retirement ---------------------------------------------------------------------------------------------------


def test_a_retired_key_goes_when_nothing_is_sealed_under_it(directory: Path) -> None:
    rotation = rotate_data_key(directory, Random(4).randbytes)
    old = directory / f"data-key.{rotation.retired.hex()}"
    material, before = old.read_bytes().strip(), contents(directory)
    with pytest.raises(KeyUnavailable, match="3 things"):
        retire(directory, rotation.retired, sealed=3, sealing=rotation.current)
    with pytest.raises(KeyUnavailable, match="restart it first"):
        retire(directory, rotation.retired, sealed=0, sealing=rotation.retired)
    with pytest.raises(KeyUnavailable, match="current one"):
        retire(directory, rotation.current, sealed=0, sealing=rotation.current)
    with pytest.raises(KeyUnavailable, match="there is no"):
        retire(directory, b"none", sealed=0, sealing=rotation.current)
    assert contents(directory) == before
    descriptor = os.open(old, os.O_RDONLY)
    retire(directory, rotation.retired, sealed=0, sealing=rotation.current)
    assert keyring(directory).retired == ()
    assert not any(material in content for content in contents(directory).values())
    assert not os.pread(descriptor, 100, 0).strip(b"\0")  # overwritten in place, not only unlinked
    os.close(descriptor)


def test_a_power_cut_while_a_key_is_removed_leaves_a_terminal_that_starts(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rotation = rotate_data_key(directory, Random(4).randbytes)
    current, storage = keyring(directory).current, Storage(directory)
    with monkeypatch.context() as patched:
        storage.record(patched)
        retire(directory, rotation.retired, sealed=0, sealing=rotation.current)
    assert lost(storage.power_cuts(), current, tmp_path) == []


# --- The host's keys ----------------------------------------------------------------------------------------------

SEALING = X25519PrivateKey.from_private_bytes(Random(10).randbytes(32)).public_key()
ANSWER = Ed25519PrivateKey.from_private_bytes(Random(11).randbytes(32)).public_key()
NEXT = Ed25519PrivateKey.from_private_bytes(Random(12).randbytes(32)).public_key()
ROOT = Ed25519PrivateKey.from_private_bytes(Random(13).randbytes(32))
STRANGER = Ed25519PrivateKey.from_private_bytes(Random(14).randbytes(32))


def test_a_host_key_comes_with_its_fingerprint_and_the_previous_one_is_kept(directory: Path) -> None:
    first = import_host_key(directory, HOST_ANSWER_KEY, pem(ANSWER), Compared(fingerprint(ANSWER)))
    assert (first.previous, first.current, first.kept_as) == (None, fingerprint(ANSWER), None)
    typed = " ".join(re.findall("....", fingerprint(NEXT).upper()))
    change = import_host_key(directory, HOST_ANSWER_KEY, pem(NEXT), Compared(typed))
    assert change.previous == fingerprint(ANSWER)
    assert change.kept_as == f"host-answer-key.{fingerprint(ANSWER)[:16]}"
    store = KeyStore(directory)
    # Until the new fingerprint is configured the terminal goes on with the previous key; never with another.
    assert fingerprint(store.host_answer(fingerprint(ANSWER))) == fingerprint(ANSWER)
    assert fingerprint(store.host_answer(fingerprint(NEXT))) == fingerprint(NEXT)
    with pytest.raises(KeyUnavailable, match=fingerprint(NEXT)):
        store.host_answer(fingerprint(STRANGER.public_key()))
    # The same once more changes nothing, and the way back is open.
    before = contents(directory)
    assert import_host_key(directory, HOST_ANSWER_KEY, pem(NEXT), Compared(typed)).kept_as is None
    assert contents(directory) == before
    back = import_host_key(directory, HOST_ANSWER_KEY, pem(ANSWER), Compared(fingerprint(ANSWER)))
    assert (back.previous, back.current) == (fingerprint(NEXT), fingerprint(ANSWER))


def test_another_fingerprint_is_refused_and_both_are_shown(directory: Path) -> None:
    before = contents(directory)
    with pytest.raises(KeyUnavailable) as caught:
        import_host_key(directory, HOST_ANSWER_KEY, pem(ANSWER), Compared(fingerprint(NEXT)))
    assert fingerprint(ANSWER) in str(caught.value)
    assert fingerprint(NEXT) in str(caught.value)
    for typed in ("", "hunter2 ä", fingerprint(ANSWER)[:16]):
        with pytest.raises(KeyUnavailable, match="no fingerprint") as caught:
            import_host_key(directory, HOST_ANSWER_KEY, pem(ANSWER), Compared(typed))
        assert "hunter2" not in str(caught.value)  # a secret in the wrong place stays one
    assert contents(directory) == before


def test_a_root_may_bring_a_host_key(directory: Path) -> None:
    root = ROOT.public_key()
    proof = Signed(pem(root), fingerprint(root), ROOT.sign(der(SEALING)))
    assert import_host_key(directory, HOST_SEALING_KEY, pem(SEALING), proof).current == fingerprint(SEALING)
    assert KeyStore(directory).host_sealing(fingerprint(SEALING))


@pytest.mark.parametrize(
    ("root", "configured", "signature", "says"),
    [
        (STRANGER, ROOT, STRANGER.sign(der(SEALING)), "configured"),
        (ROOT, ROOT, STRANGER.sign(der(SEALING)), "has not signed"),
        (ROOT, ROOT, ROOT.sign(der(ANSWER)), "has not signed"),
        (ROOT, ROOT, ROOT.sign(pem(SEALING)), "has not signed"),
        (ROOT, ROOT, ROOT.sign(der(SEALING))[:-1], "has not signed"),
        (ROOT, ROOT, b"", "has not signed"),
    ],
)
def test_a_root_that_did_not_sign_brings_none(
    directory: Path, root: Ed25519PrivateKey, configured: Ed25519PrivateKey, signature: bytes, says: str
) -> None:
    before = contents(directory)
    proof = Signed(pem(root.public_key()), fingerprint(configured.public_key()), signature)
    with pytest.raises(KeyUnavailable, match=says):
        import_host_key(directory, HOST_SEALING_KEY, pem(SEALING), proof)
    assert contents(directory) == before


def test_what_is_brought_must_be_the_right_kind(directory: Path) -> None:
    before = contents(directory)
    private = before["signing-key"]
    for which, content in (
        (HOST_SEALING_KEY, pem(ANSWER)),
        (HOST_ANSWER_KEY, pem(SEALING)),
        (HOST_ANSWER_KEY, b""),
        (HOST_ANSWER_KEY, private),
        ("chain-key", pem(ANSWER)),
    ):
        with pytest.raises(KeyUnavailable) as caught:
            import_host_key(directory, which, content, Compared(fingerprint(ANSWER)))
        assert not content or content.splitlines()[1].decode() not in str(caught.value)
    assert contents(directory) == before
    assert fingerprint(read_host_key(HOST_SEALING_KEY, pem(SEALING))) == fingerprint(SEALING)


# --- systemd credentials: the script, with stand-ins for what encrypts and restarts ---------------------------------

STAND_INS = {
    "systemd-creds": """
        name=${2#--name=}
        case "$1" in
            encrypt) { echo "$name"; cat "$3"; } > "$4" ;;
            decrypt) [ "$(head -n 1 "$3")" = "$name" ] && tail -n +2 "$3" ;;
        esac""",
    "systemctl": """echo "$@" >> "$LOG" """,
}


@dataclass
class Machine:
    root: Path

    @property
    def credentials(self) -> Path:
        return self.root / "credentials"

    @property
    def units(self) -> Path:
        return self.root / "units"

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.root / 'bin'}:{os.environ['PATH']}"
        environment = {"PATH": path, "LOG": str(self.root / "log")}
        return subprocess.run(["bash"], input=script, env=environment, text=True, capture_output=True, check=False)

    def decrypted(self) -> Path:
        """The directory that a service would see, from its unit's own line and the drop-ins."""
        seen = Path(str(self.root / "seen"))
        shutil.rmtree(seen, ignore_errors=True)
        seen.mkdir()
        loaded = [("data-key", self.credentials / "data-key")]
        for conf in (self.units / "payterm.service.d").glob("*.conf"):
            section, line = conf.read_text().splitlines()
            assert section == "[Service]"
            name, _, source = line.removeprefix("LoadCredentialEncrypted=").partition(":")
            loaded.append((name, Path(source)))
        for name, source in loaded:
            label, _, content = source.read_text().partition("\n")
            assert label == name  # systemd refuses a credential that was encrypted under another name
            (seen / name).write_text(content)
            (seen / name).chmod(0o600)
        return seen


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path / "machine")
    for path in (machine.root / "bin", machine.credentials, machine.units):
        path.mkdir(parents=True)
    for name, body in STAND_INS.items():
        (machine.root / "bin" / name).write_text(f"#!/bin/bash\nset -euo pipefail\n{body}\n")
        (machine.root / "bin" / name).chmod(0o755)
    (machine.root / "bin" / "python3").symlink_to(Path(sys.executable).resolve())  # and not what searches for one
    (machine.credentials / "data-key").write_text("data-key\n" + Random(3).randbytes(32).hex() + "\n")
    return machine


def test_the_script_rotates_credentials_and_removes_them(machine: Machine) -> None:
    old = keyring(machine.decrypted()).current
    script = credential_rotation(old.id, credentials=machine.credentials, units=machine.units)
    assert old.material.hex() not in script
    ran = machine.run(script)
    assert ran.returncode == 0, ran.stderr
    after = keyring(machine.decrypted())
    assert after.retired == (old,)
    assert f"the current data key is {after.current.id.hex()}" in ran.stdout
    assert (machine.root / "log").read_text().splitlines()[-1].startswith("restart")
    # Once more with the old id: it would rotate the new key away under the old one's name.
    state = contents(machine.credentials)
    again = machine.run(script)
    assert again.returncode
    assert "no key was changed" in again.stderr
    assert contents(machine.credentials) == state
    with pytest.raises(KeyUnavailable, match="1 things"):
        credential_retirement(old.id, sealed=1, sealing=after.current.id)
    with pytest.raises(KeyUnavailable, match="still seals"):
        credential_retirement(old.id, sealed=0, sealing=old.id)
    end = credential_retirement(
        old.id, sealed=0, sealing=after.current.id, credentials=machine.credentials, units=machine.units
    )
    assert machine.run(end).returncode == 0
    assert keyring(machine.decrypted()) == Keyring(after.current)


def test_the_script_interrupted_anywhere_loses_no_key(machine: Machine) -> None:
    old = keyring(machine.decrypted()).current
    script = credential_rotation(old.id, credentials=machine.credentials, units=machine.units)
    fresh = machine.root.with_name("fresh")
    shutil.copytree(machine.root, fresh, symlinks=True)
    steps = 0
    for fatal in range(1, 100):
        shutil.rmtree(machine.root)
        shutil.copytree(fresh, machine.root, symlinks=True)
        # DEBUG traps run before every simple command: end there, as a power cut would.
        trap = f"n=0; set -T; trap 'n=$((n+1)); [ $n -lt {fatal} ] || kill -9 $BASHPID' DEBUG\n"
        ended = machine.run(script.replace("set -euo pipefail\n", "set -euo pipefail\n" + trap, 1))
        assert keyring(machine.decrypted()).by_id(old.id) == old
        if ended.returncode == 0:
            break
        steps += 1
        machine.run(script)
        after = keyring(machine.decrypted())
        assert after.by_id(old.id) == old
        assert after.current != old
    assert steps > 15


@pytest.mark.parametrize("harm", ["truncated", "other id", "no decryption"])
def test_the_script_stops_where_the_key_is_not_as_it_should_be(machine: Machine, harm: str) -> None:
    old = keyring(machine.decrypted()).current
    script = credential_rotation(old.id, credentials=machine.credentials, units=machine.units)
    match harm:
        case "truncated":
            (machine.credentials / "data-key").write_text("data-key\n1234")
        case "other id":
            script = credential_rotation(b"none", credentials=machine.credentials, units=machine.units)
        case _:
            (machine.root / "bin" / "systemd-creds").write_text("#!/bin/bash\nexit 1\n")
    before = contents(machine.credentials)
    assert machine.run(script).returncode
    assert contents(machine.credentials) == before
    assert list(machine.units.iterdir()) == []


def test_half_a_script_does_nothing(machine: Machine) -> None:
    old = keyring(machine.decrypted()).current
    script = credential_rotation(old.id, credentials=machine.credentials, units=machine.units)
    before = hashlib.sha256(repr(contents(machine.credentials)).encode()).digest()
    for end in range(0, len(script) - 3, 50):
        machine.run(script[:end])
    assert hashlib.sha256(repr(contents(machine.credentials)).encode()).digest() == before

"""Keys: read or refused, never made up, never printed."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path
from random import Random

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from terminal.ledger.errors import KeyUnavailable
from terminal.ledger.keys import (
    RETIRED_MAX,
    Keyring,
    KeyState,
    KeyStore,
    SecretKey,
    TerminalKeys,
    fingerprint,
    generate,
    generate_spool_key,
    inventory,
    key_id,
)

HOST_SEALING = X25519PrivateKey.from_private_bytes(Random(1).randbytes(32)).public_key()
HOST_ANSWER = Ed25519PrivateKey.from_private_bytes(Random(2).randbytes(32)).public_key()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A complete set of key files."""
    keys = tmp_path / "keys"
    generate(keys, Random(3).randbytes)
    for name, key in (("host-sealing-key", HOST_SEALING), ("host-answer-key", HOST_ANSWER)):
        (keys / name).write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return keys


def load(directory: Path) -> TerminalKeys:
    return TerminalKeys.load(directory, fingerprint(HOST_SEALING), fingerprint(HOST_ANSWER).upper())


def test_generated_keys_load_and_differ(directory: Path) -> None:
    keys = load(directory)
    data = keys.data.current
    assert data.material != keys.chain.material
    assert len(data.id) == 4
    assert data.id != data.material[:4]
    assert key_id(keys.host_answer) == fingerprint(keys.host_answer)[:16]
    assert {stat.S_IMODE((directory / name).stat().st_mode) for name in ("data-key", "chain-key", "signing-key")} == {
        0o600
    }


def test_no_key_in_a_repr(directory: Path) -> None:
    keys = load(directory)
    material = keys.data.current.material
    printed = repr(keys) + repr(keys.data) + repr(keys.data.current) + str(keys)
    assert material.hex() not in printed
    assert repr(material) not in printed
    assert material.hex() in repr(material.hex())  # the search itself works


def test_generate_leaves_what_is_there(directory: Path) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(KeyUnavailable, match="left as it is"):
        generate(directory, Random(4).randbytes)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize("name", ["data-key", "chain-key", "signing-key", "host-sealing-key", "host-answer-key"])
@pytest.mark.parametrize(
    "harm", ["missing", "empty", "nonsense", "long", "truncated", "wrong kind", "link", "fifo", "directory", "socket"]
)
def test_a_harmed_key_is_refused_and_left(directory: Path, name: str, harm: str) -> None:
    path = directory / name
    content = path.read_bytes()
    path.unlink()
    match harm:
        case "missing":
            pass
        case "link":
            (directory / "elsewhere").write_bytes(content)
            path.symlink_to(directory / "elsewhere")
        case "fifo":
            os.mkfifo(path, 0o600)
        case "directory":
            path.mkdir(mode=0o700)
        case "socket":
            with contextlib.chdir(directory), socket.socket(socket.AF_UNIX) as server:
                server.bind(name)
        case _:
            other_kind = (directory / ("data-key" if name == "signing-key" else "signing-key")).read_bytes()
            harmed = {
                "empty": b"",
                "nonsense": b"\xff\x00nonsense",
                "long": content + b"\n" * 5000,
                "truncated": content[: len(content) // 2],
                "wrong kind": other_kind,
            }
            path.write_bytes(harmed[harm])
            path.chmod(0o600)
    with pytest.raises(KeyUnavailable, match=name) as caught:
        load(directory)
    assert "nonsense" not in str(caught.value)
    assert content.decode().strip() not in str(caught.value)
    assert path.exists() == (harm != "missing")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o700])
def test_a_key_that_others_can_read_is_refused(directory: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "data-key").chmod(mode)
    with pytest.raises(KeyUnavailable, match="0600 or 0400"):
        load(directory)
    # Inside systemd's credentials directory the mode is systemd's affair.
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(directory))
    assert load(directory).data.current.id


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_key_of_another_user_is_refused(directory: Path) -> None:
    os.chown(directory / "data-key", 12345, -1)
    with pytest.raises(KeyUnavailable, match="another user"):
        load(directory)


def test_a_host_key_counts_only_with_its_fingerprint(directory: Path) -> None:
    other = X25519PrivateKey.from_private_bytes(Random(9).randbytes(32)).public_key()
    (directory / "host-sealing-key").write_bytes(other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(KeyUnavailable, match=fingerprint(other)):
        load(directory)


def test_kinds_of_keys_are_not_confused(directory: Path) -> None:
    (directory / "host-sealing-key").write_bytes((directory / "host-answer-key").read_bytes())
    with pytest.raises(KeyUnavailable, match="X25519"):
        KeyStore(directory).host_sealing(fingerprint(HOST_ANSWER))


# --- Current and retired ---


def keep(directory: Path, key: SecretKey, name: str | None = None) -> Path:
    path = directory / (name or f"data-key.{key.id.hex()}")
    path.write_text(key.material.hex())
    path.chmod(0o600)
    return path


OTHER = SecretKey(Random(21).randbytes(32))


def test_retired_keys_open_and_the_current_one_seals(directory: Path) -> None:
    current = KeyStore(directory).secret("data-key")
    keep(directory, OTHER)
    (directory / "data-key.new").write_text("left by an interrupted command")
    keep(directory, current)  # a rotation that got no further than this
    keyring = load(directory).data
    assert keyring == Keyring(current, (OTHER,))
    assert keyring.by_id(OTHER.id) == OTHER
    assert keyring.by_id(current.id) == current
    assert keyring.by_id(b"none") is None


@pytest.mark.parametrize("name", ["data-key.00000000", f"data-key.{OTHER.id.hex().upper()}"])
def test_a_retired_key_must_be_the_one_that_its_name_says(directory: Path, name: str) -> None:
    keep(directory, OTHER, name)
    with pytest.raises(KeyUnavailable, match=OTHER.id.hex()):
        load(directory)


def test_two_keys_with_one_id_are_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bytes may collide; then nobody could tell which of the two opens a cell."""
    monkeypatch.setattr(SecretKey, "derive", lambda *_: b"same" * 8)
    keep(directory, SecretKey(Random(21).randbytes(32)))
    with pytest.raises(KeyUnavailable, match="is another key"):
        KeyStore(directory).keyring("data-key")


@pytest.mark.parametrize("harm", ["truncated", "readable", "link"])
def test_a_harmed_retired_key_refuses_them_all(directory: Path, harm: str) -> None:
    path = keep(directory, OTHER)
    match harm:
        case "truncated":
            path.write_text(path.read_text()[:-1])
        case "readable":
            path.chmod(0o644)
        case _:
            path.rename(directory / "elsewhere")
            path.symlink_to("elsewhere")
    with pytest.raises(KeyUnavailable, match=path.name):
        load(directory)


def test_the_number_of_retired_keys_is_bounded(directory: Path) -> None:
    chance = Random(22).randbytes
    for _ in range(RETIRED_MAX):
        keep(directory, SecretKey(chance(32)))
    assert len(load(directory).data.retired) == RETIRED_MAX
    keep(directory, OTHER)
    with pytest.raises(KeyUnavailable, match="more than 64"):
        load(directory)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    for look in (load, inventory):
        with pytest.raises(KeyUnavailable, match="cannot be read"):
            look(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_failing_storage_leaves_no_half_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = os.write, []

    def full(descriptor: int, content: bytes) -> int:
        written.append(content)
        return write(descriptor, content[:10] if len(written) == 2 else content)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(KeyUnavailable, match="No space left"):
        generate(tmp_path / "keys", Random(3).randbytes)
    assert list((tmp_path / "keys").iterdir()) == []
    generate(tmp_path / "keys", Random(3).randbytes)


# --- What people are shown ---


def test_the_inventory_shows_states_and_no_key(directory: Path) -> None:
    keys = load(directory)
    keep(directory, OTHER)
    keep(directory, OTHER, "data-key.00000000")
    (directory / "data-key.new").write_bytes(b"")
    (directory / "notes.txt").write_bytes(b"")
    (directory / "chain-key").chmod(0o644)
    (directory / "host-answer-key").unlink()
    (directory / "signing-key.pub").write_bytes((directory / "host-sealing-key").read_bytes())
    found = {info.name: info for info in inventory(directory)}
    assert {name: info.state.value for name, info in found.items()} == {
        "data-key": "current",
        f"data-key.{OTHER.id.hex()}": "retired",
        "data-key.00000000": "retired",
        "data-key.new": "unfinished",
        "chain-key": "current",
        "signing-key": "current",
        "signing-key.pub": "current",
        "host-sealing-key": "current",
        "host-answer-key": "missing",
        "notes.txt": "foreign",
    }
    assert {name for name, info in found.items() if info.problem} == {
        "data-key.00000000",
        "data-key.new",
        "chain-key",
        "host-answer-key",
        "signing-key.pub",
        "notes.txt",
    }
    assert found["data-key"].identity == keys.data.current.id.hex()
    assert found["host-sealing-key"].identity == fingerprint(keys.host_sealing)
    assert found["signing-key"].identity == fingerprint(keys.signing.public_key())
    printed = repr(list(found.values())).lower()
    assert keys.data.current.material.hex() not in printed
    assert OTHER.material.hex() not in printed
    assert keys.chain.material.hex() not in printed


def test_the_inventory_of_the_other_service(tmp_path: Path) -> None:
    generate_spool_key(tmp_path, Random(1).randbytes)
    (info,) = inventory(tmp_path, expected=["spool-key"])
    assert (info.name, info.state, info.problem) == ("spool-key", KeyState.CURRENT, None)

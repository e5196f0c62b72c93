"""Keys: read or refused, never made up, never printed."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from ledger_rig import Host, seeded

from terminal.ledger.errors import KeyUnavailable
from terminal.ledger.keys import KeyStore, TerminalKeys, fingerprint, generate, key_id


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A complete set of key files."""
    keys, host = tmp_path / "keys", Host()
    generate(keys, seeded(3))
    for name, key in (
        ("host-sealing-key", host.sealing.public_key()),
        ("host-answer-key", host.signing.public_key()),
    ):
        (keys / name).write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return keys


def load(directory: Path) -> TerminalKeys:
    host = Host()
    return TerminalKeys.load(
        directory, fingerprint(host.sealing.public_key()), fingerprint(host.signing.public_key()).upper()
    )


def test_generated_keys_load_and_differ(directory: Path) -> None:
    keys = load(directory)
    assert keys.data.material != keys.chain.material
    assert len(keys.data.id) == 4
    assert keys.data.id != keys.data.material[:4]
    assert key_id(keys.host_answer) == fingerprint(keys.host_answer)[:16]
    assert {stat.S_IMODE((directory / name).stat().st_mode) for name in ("data-key", "chain-key", "signing-key")} == {
        0o600
    }


def test_no_key_in_a_repr(directory: Path) -> None:
    keys = load(directory)
    printed = repr(keys) + repr(keys.data) + str(keys)
    assert keys.data.material.hex() not in printed
    assert repr(keys.data.material) not in printed
    assert keys.data.material.hex() in repr(keys.data.material.hex())  # the search itself works


def test_generate_leaves_what_is_there(directory: Path) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(KeyUnavailable, match="left as it is"):
        generate(directory, seeded(4))
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize("name", ["data-key", "chain-key", "signing-key", "host-sealing-key", "host-answer-key"])
@pytest.mark.parametrize("harm", ["missing", "empty", "nonsense", "long", "link"])
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
        case _:
            path.write_bytes({"empty": b"", "nonsense": b"\xff\x00nonsense", "long": content + b"\n" * 5000}[harm])
            path.chmod(0o600)
    with pytest.raises(KeyUnavailable, match=name) as caught:
        load(directory)
    assert "nonsense" not in str(caught.value)
    assert path.exists() == (harm != "missing")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o700])
def test_a_key_that_others_can_read_is_refused(directory: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "data-key").chmod(mode)
    with pytest.raises(KeyUnavailable, match="0600 or 0400"):
        load(directory)
    # Inside systemd's credentials directory the mode is systemd's affair.
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(directory))
    assert load(directory).data.id


def test_a_host_key_counts_only_with_its_fingerprint(directory: Path) -> None:
    other = X25519PrivateKey.from_private_bytes(seeded(9)(32)).public_key()
    (directory / "host-sealing-key").write_bytes(other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(KeyUnavailable, match=fingerprint(other)):
        load(directory)


def test_kinds_of_keys_are_not_confused(directory: Path) -> None:
    host = Host()
    (directory / "host-sealing-key").write_bytes((directory / "host-answer-key").read_bytes())
    with pytest.raises(KeyUnavailable, match="X25519"):
        KeyStore(directory).host_sealing(fingerprint(host.signing.public_key()))

"""The local socket: calls, roles, and peers that speak nonsense."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from terminal.control import (
    CONNECTIONS_MAX,
    LINE_BYTES_MAX,
    Call,
    CallRefused,
    ControlClient,
    ControlServer,
    Role,
    Roles,
    TerminalUnavailable,
)


class Echo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str
    wait_ms: int = 0


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


def fail(_: Any) -> None:
    raise RuntimeError("a bug")


CALLS = {
    "echo": Call(Echo, lambda arguments: {"text": arguments.text}),
    "operate": Call(Nothing, lambda _: {}, frozenset({Role.OPERATOR})),
    "upload": Call(Nothing, lambda _: {}, frozenset({Role.SYNC})),
    "fail": Call(Nothing, fail),
}


@pytest.fixture
def path() -> Iterator[Path]:
    # Not under tmp_path: the path of a Unix socket may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="payterm-") as directory:
        yield Path(directory) / "terminal.sock"


@pytest.fixture
def server(path: Path) -> Iterator[ControlServer]:
    roles = Roles({os.getuid(): frozenset({Role.OPERATOR})})
    made = ControlServer(path, roles, CALLS)
    yield made
    made.close()


@pytest.fixture
def client(path: Path, server: ControlServer) -> Iterator[ControlClient]:
    made = ControlClient(path)
    yield made
    made.close()


def test_a_call_is_answered(client: ControlClient) -> None:
    for text in ("one", "zwei", "üç"):
        assert client.call("echo", {"text": text}) == {"text": text}


@pytest.mark.parametrize(
    ("do", "arguments", "code"),
    [
        ("upload", {}, "not_allowed"),
        ("nonsense", {}, "unknown_call"),
        ("echo", {}, "malformed"),
        ("echo", {"text": 7}, "malformed"),
        ("echo", {"text": "x", "more": 1}, "malformed"),
        ("fail", {}, "internal"),
    ],
)
def test_a_refusal_names_its_reason(client: ControlClient, do: str, arguments: dict[str, Any], code: str) -> None:
    with pytest.raises(CallRefused) as refused:
        client.call(do, arguments)
    assert refused.value.code == code
    assert client.call("operate") == {}  # the connection still serves


def test_roles_follow_the_user_not_the_message() -> None:
    roles = Roles.build(sync_user="nobody", register_user=None)
    nobody = 65534
    assert roles.held_by(os.getuid()) == {Role.OPERATOR, Role.REGISTER}
    assert roles.held_by(nobody) == {Role.SYNC}
    assert roles.held_by(12345) == frozenset()


def test_without_a_server_the_client_says_so(path: Path) -> None:
    with pytest.raises(TerminalUnavailable, match="start payterm"):
        ControlClient(path).call("echo", {"text": "x"})


def test_the_client_comes_back_after_a_restart(path: Path) -> None:
    roles = Roles({os.getuid(): frozenset()})
    client = ControlClient(path)
    for _ in range(2):
        server = ControlServer(path, roles, CALLS)
        assert client.call("echo", {"text": "x"}) == {"text": "x"}
        client.close()
        server.close()
    with pytest.raises(TerminalUnavailable):
        client.call("echo", {"text": "x"})


def raw(path: Path, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(5)
        peer.connect(str(path))
        with_newline = data if data.endswith(b"\n") else data + b"\n"
        try:
            peer.sendall(with_newline)
            peer.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: peer.recv(65536), b""))
        except (BrokenPipeError, ConnectionResetError):
            return b""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200).filter(lambda data: b"\n" not in data))
def test_nonsense_is_answered_in_kind(path: Path, server: ControlServer, data: bytes) -> None:
    answer = raw(path, data)
    assert msgspec.json.decode(answer.splitlines()[0])["error"]["code"] == "malformed"


def test_an_endless_line_is_cut_off(path: Path, server: ControlServer, client: ControlClient) -> None:
    assert raw(path, b"x" * (LINE_BYTES_MAX + 1)) == b""
    assert client.call("operate") == {}


def test_more_connections_than_places_are_turned_away(path: Path, server: ControlServer) -> None:
    held = []
    for _ in range(CONNECTIONS_MAX):
        client = ControlClient(path)
        client.call("operate")
        held.append(client)
    with pytest.raises(TerminalUnavailable):
        ControlClient(path).call("operate")
    for client in held:
        client.close()
    done = threading.Event()
    for _ in range(100):
        try:
            extra = ControlClient(path)
            extra.call("operate")
            extra.close()
            break
        except TerminalUnavailable:
            done.wait(0.02)
    else:
        pytest.fail("places are not given back")

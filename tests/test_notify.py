"""What systemd is told, and that nothing happens where there is none."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from terminal import notify

SAID = [(notify.ready, b"READY=1"), (notify.alive, b"WATCHDOG=1"), (notify.stopping, b"STOPPING=1")]


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.settimeout(5)
        yield listening


@pytest.mark.parametrize("abstract", [False, True], ids=["file", "abstract"])
def test_it_is_said(systemd: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    path = "@payterm-test-" + tmp_path.name if abstract else str(tmp_path / "notify")
    systemd.bind("\0" + path[1:] if abstract else path)
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    for say, expected in SAID:
        say()
        assert systemd.recv(100) == expected


@pytest.mark.parametrize("path", [None, "", "/nonexistent/notify"])
def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
    if path is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", path)
    for say, _ in SAID:
        say()

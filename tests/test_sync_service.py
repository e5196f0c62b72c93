"""What the sync service says on the local socket (docs/formats.md, Local socket), and understands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sync_rig import sale

from terminal.control import Call, ControlClient, ControlServer, Role, Roles
from terminal.sync.journal import Head, History
from terminal.sync.service import SocketTerminal
from terminal.sync.step import LinkReport, Offer, Seen

HEAD, OTHER = Head(1, 7, "ab" * 32), Head(2, 9, "cd" * 32)
REPORT = LinkReport(False, "no network", queued=3, held=1, oldest_ms=900, history=History.DIFFERS, head=HEAD)


class Terminal:
    """Answers as it is told, and keeps what it was asked."""

    def __init__(self, path: Path) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        calls = {name: Call(dict[str, Any], self._answer(name)) for name in ("outbox.fetch", "link.report")}
        roles = Roles.build(sync_user=None, register_user=None)
        assert any(Role.SYNC in held for held in roles.of_uid.values())
        self.server = ControlServer(path, roles, calls)

    def _answer(self, name: str) -> Any:
        def handle(arguments: dict[str, Any]) -> Any:
            self.asked.append((name, arguments))
            return self.answers[name]

        return handle


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(tmp_path / "terminal.sock")
    yield made
    made.server.close()


@pytest.fixture
def caller(terminal: Terminal, tmp_path: Path) -> Iterator[SocketTerminal]:
    client = ControlClient(tmp_path / "terminal.sock")
    yield SocketTerminal(client)
    client.close()


def test_items_come_with_the_terminals_head(terminal: Terminal, caller: SocketTerminal) -> None:
    item = msgspec.to_builtins(sale(1))
    for head, understood in ((msgspec.to_builtins(HEAD), HEAD), (None, None)):
        terminal.answers["outbox.fetch"] = {"items": [item], "head": head}
        assert caller.fetch(4, 0) == Offer([sale(1)], understood)
    terminal.answers["outbox.fetch"] = {"items": []}
    assert caller.fetch(4, 0) == Offer([])
    assert terminal.asked[0] == ("outbox.fetch", {"max": 4, "wait_ms": 0})


def test_a_report_carries_both_heads(terminal: Terminal, caller: SocketTerminal) -> None:
    terminal.answers["link.report"] = {"sync_head": msgspec.to_builtins(OTHER), "differs": True}
    assert caller.report(REPORT) == Seen(OTHER, differs=True)
    assert terminal.asked == [
        (
            "link.report",
            {
                "online": False,
                "error": "no network",
                "queued": 3,
                "held": 1,
                "oldest_ms": 900,
                "history": "differs",
                "head": {"epoch": 1, "sequence": 7, "mac": "ab" * 32},
                "terminal_head": None,
            },
        )
    ]
    terminal.answers["link.report"] = {"sync_head": None, "differs": False}
    assert caller.report(REPORT) == Seen()

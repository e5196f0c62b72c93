"""What people see of the upload side: `payterm sync` and `payterm queue`, by the running service and without one."""

from __future__ import annotations

import json
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sync_rig import SPOOL_KEY, Authority, FakeTerminal, TlsHost, sale, says, serving
from terminal_rig import Terminal
from test_cli import no_traceback, payterm

from terminal.clock import SystemClock, system_entropy
from terminal.sync import HostSettings, Place, SyncSettings, run
from terminal.sync import spool as spool_module
from terminal.sync import step as step_module
from terminal.sync.destinations.host import HostDestination
from terminal.sync.spool import On, Spool
from terminal.sync.step import Backoff

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

Capsys = pytest.CaptureFixture[str]
WITHIN_S = 10.0


@dataclass
class Site:
    """A configuration whose sync directory and socket are here."""

    config: Path
    directory: Path
    socket: Path


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "FILLER_BYTES", 65_536)
    monkeypatch.setattr(step_module, "IDLE_MS", 200)
    monkeypatch.setattr("terminal.commands.sync._LOOK_EVERY_S", 0.05)
    monkeypatch.setattr("terminal.commands.sync._STILL_MAX_S", 0.5)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Site]:
    terminal = Terminal(tmp_path / "t")
    directory, keys = tmp_path / "sync", tmp_path / "sync-keys"
    keys.mkdir(mode=0o700)
    (keys / "spool-key").write_text(SPOOL_KEY.material.hex())
    (keys / "spool-key").chmod(0o600)
    path = tmp_path / "s.sock"
    text = terminal.config_path.read_text()
    text += f'\n[sync]\ndirectory = "{directory}"\nkeys = "{keys}"\nsocket = "{path}"\n'
    config = tmp_path / "payterm.toml"
    config.write_text(text)
    terminal.close()
    yield Site(config, directory, path)


@contextmanager
def spool_of(place: Site) -> Iterator[Spool]:
    with closing(Spool(place.directory, SPOOL_KEY, clock=SystemClock(), entropy=system_entropy)) as spool:
        yield spool


@contextmanager
def service(place: Site, terminal: FakeTerminal, server: TlsHost, authority: Authority) -> Iterator[None]:
    host = HostSettings(server.url, authority.file, total_timeout_ms=800)
    settings = SyncSettings(
        place.directory,
        SPOOL_KEY,
        [Place(partial(HostDestination, host))],
        backoff=Backoff(first_ms=20, ceiling_ms=100),
        socket=place.socket,
    )
    stop = threading.Event()
    thread = threading.Thread(
        target=lambda: run(
            settings, lambda: terminal, clock=SystemClock(), entropy=system_entropy, stop=stop, alive=lambda: None
        )
    )
    thread.start()
    try:
        end = time.monotonic() + WITHIN_S
        while not answers(place.socket):
            assert time.monotonic() < end
            time.sleep(0.01)
        yield
    finally:
        stop.set()
        thread.join(WITHIN_S)
        assert not thread.is_alive()


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@pytest.fixture
def running(place: Site, tmp_path: Path) -> Iterator[tuple[Site, FakeTerminal, TlsHost]]:
    authority, terminal = Authority(tmp_path, "ours"), FakeTerminal()
    with serving(authority.issue("127.0.0.1")) as server, service(place, terminal, server, authority):
        yield place, terminal, server


def fill(place: Site, count: int) -> None:
    with spool_of(place) as spool:
        spool.store([sale(number, urgent=False) for number in range(1, count + 1)], ["host"])


def said(capsys: Capsys) -> Any:
    return json.loads(capsys.readouterr().out)


def wait_for(terminal: FakeTerminal, count: int) -> None:
    end = time.monotonic() + WITHIN_S
    while len(terminal.answers) < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def until_status_is(code: int, place: Site, capsys: Capsys) -> Any:
    end = time.monotonic() + WITHIN_S
    while payterm(place.config, "sync", "status", "--json") != code:
        assert time.monotonic() < end
        capsys.readouterr()
        time.sleep(0.02)
    return said(capsys)


# ---- sync


def test_status_says_what_waits_and_why(running: tuple[Site, FakeTerminal, TlsHost], capsys: Capsys) -> None:
    place, terminal, server = running
    assert payterm(place.config, "sync", "status") == 0
    assert "not tried yet" in capsys.readouterr().out
    server.script = [says(503)] * 500
    terminal.sell(sale(1, urgent=False))
    (host,) = until_status_is(8, place, capsys)["destinations"]
    assert (host["name"], host["queued"], host["online"]) == ("host", 1, False)
    assert payterm(place.config, "sync", "status") == 8
    told = capsys.readouterr().out
    assert "not reached" in told
    assert "503" in told
    server.script = []
    assert payterm(place.config, "sync", "now", "--wait") == 0
    assert capsys.readouterr().out in {"1 item sent\n", "nothing waited\n"}  # it may have gone by itself a moment ago
    assert payterm(place.config, "sync", "now") == 0
    assert capsys.readouterr().out == "nothing waits\n"


def test_now_gives_up_waiting_when_nothing_moves(running: tuple[Site, FakeTerminal, TlsHost], capsys: Capsys) -> None:
    place, terminal, server = running
    server.script = [says(503)] * 500
    terminal.sell(*(sale(number, urgent=False) for number in range(1, 4)))
    until_status_is(8, place, capsys)
    assert payterm(place.config, "sync", "now", "--wait", "--json") == 8
    assert said(capsys)["left"] == 3
    assert payterm(place.config, "sync", "now", "--wait") == 8
    assert "3 items of 3 could not be sent for now; stored safely" in capsys.readouterr().out


def test_what_is_held_is_the_gravest(running: tuple[Site, FakeTerminal, TlsHost], capsys: Capsys) -> None:
    place, terminal, server = running
    server.script = [says(409)]
    terminal.sell(sale(1, urgent=False))
    until_status_is(6, place, capsys)
    assert payterm(place.config, "sync", "status") == 6
    assert "1 held for a person: payterm queue list" in capsys.readouterr().out
    assert payterm(place.config, "queue", "list", "--state", "refused", "--json") == 0
    (item,) = said(capsys)
    assert "409" in item["error"]
    assert payterm(place.config, "queue", "retry", str(item["row"]), "--reason", "the host was mended") == 0
    assert "sent again by itself" in capsys.readouterr().out
    wait_for(terminal, 1)
    assert payterm(place.config, "sync", "now", "--wait", "--json") == 0


def test_without_a_service_sync_says_what_to_start(place: Site, capsys: Capsys) -> None:
    for given in (("sync", "status"), ("sync", "now"), ("queue", "list")):
        assert payterm(place.config, *given) == 3
        no_traceback(capsys, "payterm-sync does not answer", "start payterm-sync")


# ---- queue


def test_the_queue_reads_the_same_with_and_without_the_service(
    place: Site, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    fill(place, 120)
    with spool_of(place) as spool:
        spool.move(f"{sale(7).key}/host", On.HOLD, error="somebody looks at it, and that for quite a long while now")
    assert payterm(place.config, "queue", "list", "--json") == 0
    items = said(capsys)
    assert [item["number"] for item in items] == list(range(1, 121))  # over several pages
    assert payterm(place.config, "queue", "list", "--limit", "3", "--state", "queued", "--destination", "host") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["row", "no.", "event", "to", "state", "age", "tries", "amount"]
    assert len(lines) == 3
    assert payterm(place.config, "queue", "list") == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 122
    assert max(map(len, listed[:121])) <= 80
    assert listed[121].startswith("row 7: somebody looks at it")
    assert "held" in listed[7]
    for name in (sale(7).key + "/host", str(items[6]["row"]), sale(7).key):
        assert payterm(place.config, "queue", "show", name, "--json") == 0
        assert said(capsys)["id"] == sale(7).key + "/host"
    assert payterm(place.config, "queue", "show", "7") == 0
    assert "somebody looks at it, and that for quite a long while now" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("show", "999"), "no item that waits has the row 999"),
        (("show", "abc"), "too short"),
        (("show", "ffffffff"), "begins with 'ffffffff'"),
        (("show", "ffffffff/authorisation/host"), "nothing in the queue"),
        (("retry", "1", "--reason", "why not"), "only what is refused or held"),
        (("list", "--state", "sent"), "no state 'sent'"),
    ],
)
def test_what_is_not_there_is_said(place: Site, capsys: Capsys, given: tuple[str, ...], words: str) -> None:
    fill(place, 2)
    assert payterm(place.config, "queue", *given) == 4
    no_traceback(capsys, words)


def test_a_prefix_of_many_names_none(place: Site, capsys: Capsys) -> None:
    fill(place, 12)
    prefix = str(sale(1).transaction)[:4]
    with spool_of(place) as spool:
        fits = [row.id for row in spool.rows() if row.id.startswith(prefix)]
    assert len(fits) > 1
    assert payterm(place.config, "queue", "show", prefix) == 4
    no_traceback(capsys, f"may be any of {len(fits)}")


def test_hold_and_retry_by_hand(place: Site, capsys: Capsys) -> None:
    fill(place, 1)
    assert payterm(place.config, "queue", "hold", "1", "--reason", "the customer asks") == 0
    assert "kept back" in capsys.readouterr().out
    assert payterm(place.config, "queue", "hold", "1", "--reason", "again") == 4
    no_traceback(capsys, "only what still waits can be held back")
    assert payterm(place.config, "queue", "retry", "1", "--reason", "she paid", "--json") == 0
    assert said(capsys)["state"] in {"queued", "ambiguous"}


def test_an_export_is_whole_private_and_never_over_something(place: Site, tmp_path: Path, capsys: Capsys) -> None:
    fill(place, 11)
    target = tmp_path / "moved.jsonl"
    assert payterm(place.config, "queue", "export", str(target)) == 0
    assert f"{target}: 11 items" in capsys.readouterr().out
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(1, 12))
    assert lines[0]["body"] == sale(1).envelope
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert payterm(place.config, "queue", "export", str(target)) == 4
    no_traceback(capsys, "is there already")
    assert payterm(place.config, "queue", "export", "-") == 0
    assert len(capsys.readouterr().out.splitlines()) == 11
    assert payterm(place.config, "queue", "export", str(tmp_path / "missing" / "x")) == 4
    no_traceback(capsys, "nothing was exported")
    full = Path("/dev/full")
    if full.exists():
        link = tmp_path / "full.new"
        link.symlink_to(full)
        assert payterm(place.config, "queue", "export", str(tmp_path / "full")) == 4
        no_traceback(capsys, "No space left")


def test_a_queue_in_use_or_without_its_key_says_so(place: Site, capsys: Capsys) -> None:
    fill(place, 1)
    with spool_of(place):
        assert payterm(place.config, "queue", "list") == 5
        no_traceback(capsys, "everything stays stored")
    (place.directory.parent / "sync-keys" / "spool-key").unlink()
    assert payterm(place.config, "queue", "list") == 5
    no_traceback(capsys, "spool-key")

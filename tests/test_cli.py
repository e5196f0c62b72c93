"""The commands, as scripts and people meet them: exit codes, what is printed where, and never a traceback."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest
from terminal_rig import LAST4, Display, HandClock, Reader, Tap, Terminal, picture, seeded

from drivers.interfaces import ReaderMissing
from terminal import cli
from terminal.app import Hardware
from terminal.config import Config
from terminal.control import ControlServer, Roles
from terminal.ledger.keys import generate_spool_key
from terminal.ledger.ledger import Ledger
from terminal.ledger.states import State
from terminal.ui import screens

# Commands leave their socket to the end of the process, which is right after.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

PATIENCE_S = 20
ROOT = Path(__file__).parent.parent


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    # Not under tmp_path: the path of a Unix socket may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="payterm-") as directory:
        made = Terminal(Path(directory))
        yield made
        made.close()


@pytest.fixture(autouse=True)
def _short_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow looks up from its idle screen once in this time, also to see that it is to stop."""
    monkeypatch.setattr("terminal.ui.flow.IDLE_MS", 20)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


class Bench:
    """The hardware that a composition root would bring."""

    def __init__(self) -> None:
        self.reader, self.display = Reader(HandClock()), Display()

    def __call__(self, _: Config) -> Hardware:
        return Hardware(readers=(self.reader,), display=self.display)


def payterm(terminal: Terminal | Path, *arguments: str, bench: Bench | None = None) -> int:
    path = terminal if isinstance(terminal, Path) else terminal.config_path
    return cli.main(["--config", str(path), *arguments], bench or Bench())


@contextmanager
def serving(terminal: Terminal) -> Iterator[None]:
    """The terminal's calls on its socket, and its flow at work."""
    stop = threading.Event()
    terminal.stopping = stop.is_set
    flow = threading.Thread(target=terminal.flow.run, daemon=True)
    server = ControlServer(terminal.config.socket.path, Roles.build(sync_user=None, register_user=None), terminal.calls)
    flow.start()
    try:
        yield
    finally:
        stop.set()
        flow.join(PATIENCE_S)
        server.close()


def no_traceback(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("payterm: ")
    for word in words:
        assert word in line


# ---- a sale


@pytest.mark.parametrize(
    ("amount", "card", "code"), [("12.50", "normal", 0), ("12,51", "normal", 1), ("12.50", "declines", 1)]
)
def test_the_exit_code_of_a_sale_is_its_end(
    terminal: Terminal, capsys: pytest.CaptureFixture[str], amount: str, card: str, code: int
) -> None:
    terminal.online()
    terminal.reader.script.append(Tap(terminal.card(card)))
    with serving(terminal):
        assert payterm(terminal, "sale", amount, "--json", "--reference", "bill-7") == code
    said = capsys.readouterr()
    sale = json.loads(said.out)
    assert (sale["state"], sale["reference"], sale["last4"]) == ("declined" if code else "approved", "bill-7", LAST4)
    assert said.err == ""


def test_a_sale_is_told_to_people(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.offline()
    terminal.reader.script.append(Tap(terminal.card()))
    with serving(terminal):
        assert payterm(terminal, "sale", "12.50") == 0
    said = capsys.readouterr()
    assert said.out.startswith("12.50 EUR: accepted  ")
    assert said.err == "12.50 EUR: present card\n"


def test_a_sale_without_a_card_is_not_made(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(terminal):
        assert payterm(terminal, "sale", "12.50") == 1
    assert "void (no_card)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("sale", "12.345"), 2, "decimals"),
        (("sale", "-5"), 2, "without sign"),
        (("sale", "five"), 2, "no amount"),
        (("sale", "1", "XYZ"), 2, "ISO 4217"),
        (("sale", "600"), 4, "nothing was charged"),
        (("sale", "0"), 4, "nothing was charged"),
        (("sale", "1", "USD"), 4, "not set up for USD"),
        (("keep", "00000000-0000-4000-8000-000000000000"), 4, "does not wait"),
        (("void", "7"), 4, "no transaction has the number 7"),
        (("refund", "7"), 4, "no transaction has the number 7"),
        (("acknowledge", "00000000-0000-4000-8000-000000000000"), 4, "not in this ledger"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_is_refused(
    terminal: Terminal, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, words: str
) -> None:
    with serving(terminal):
        assert payterm(terminal, *arguments) == code
    no_traceback(capsys, words)
    assert terminal.ledger.transactions(10) == []


def test_ctrl_c_cancels_the_sale(
    terminal: Terminal, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started us may have had it ignored
    asked, cancelled = threading.Event(), threading.Event()
    wait, cancel = terminal.desk.wait_until_decided, terminal.desk.cancel

    def watched_wait(sale: UUID, timeout_ms: int) -> bool:
        asked.set()
        return wait(sale, timeout_ms)

    def watched_cancel(sale: UUID) -> bool:
        found = cancel(sale)
        cancelled.set()
        return found

    monkeypatch.setattr(terminal.desk, "wait_until_decided", watched_wait)
    monkeypatch.setattr(terminal.desk, "cancel", watched_cancel)

    def interrupt() -> None:
        assert asked.wait(PATIENCE_S)
        os.kill(os.getpid(), signal.SIGINT)
        assert cancelled.wait(PATIENCE_S)

    terminal.reader.script.append(interrupt)
    try:
        with serving(terminal):
            assert payterm(terminal, "sale", "12.50") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    (sale,) = terminal.ledger.transactions(10)
    assert (sale.state, sale.reason) == (State.VOID, "cancelled")
    assert "Traceback" not in capsys.readouterr().err


# ---- asking


def test_status_for_people_and_scripts(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.offline()
    sale = terminal.pay(1250)
    with serving(terminal):
        assert payterm(terminal, "status") == 0
        told = capsys.readouterr().out
        assert payterm(terminal, "status", "--json") == 0
        assert json.loads(capsys.readouterr().out)["unsent"]["count"] == 1
        assert payterm(terminal, "keep", str(sale.id)) == 0
    assert "host      not reached: no route to the host" in told
    assert "sync      running" in told
    assert "unsent    1 (12.50 EUR), the oldest" in told
    assert f"payterm keep|void {sale.id}" in told


def test_status_before_anything_is_known(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(terminal):
        assert payterm(terminal, "status") == 0
    told = capsys.readouterr().out
    assert "host      not tried yet" in told
    assert "sync      not running" in told
    assert told.rstrip().endswith("unsent    0")


def test_a_void_by_a_person_reaches_the_host(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.offline()
    sale = terminal.pay(1250)
    terminal.carry()
    terminal.online()
    with serving(terminal):
        assert payterm(terminal, "void", str(sale.id)) == 0
        while terminal.state(sale.id) is not State.REVERSED:
            threading.Event().wait(0.01)
    assert "voided" in capsys.readouterr().out
    assert terminal.booked() == {}


def test_the_list_is_the_same_with_and_without_the_service(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    for minor in (100, 200, 300):
        terminal.payments.void(terminal.begin(minor), "no_card")
    with serving(terminal):
        assert payterm(terminal, "ledger", "list", "--json") == 0
        assert payterm(terminal, "ledger", "list", "--json", "--limit", "2") == 0
    terminal.ledger.close()
    assert payterm(terminal, "ledger", "list", "--json") == 0
    served, two, stored = map(json.loads, capsys.readouterr().out.splitlines())
    assert [sale["amount_minor"] for sale in served] == [300, 200, 100]
    assert served == stored
    assert two == served[:2]


def test_the_list_for_people(
    terminal: Terminal, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    terminal.offline()
    terminal.pay(1250)
    terminal.payments.void(terminal.begin(700, "bill-7"), "no_card")
    terminal.ledger.close()
    assert payterm(terminal, "ledger", "list") == 0
    head, second, first = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "no."
    assert "void" in second and "bill-7" in second
    assert f"Visa {LAST4}" in first


# ---- paying back


def test_a_refund_for_people_and_scripts(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.online()
    sale = terminal.pay(1250)
    with serving(terminal):
        assert payterm(terminal, "refund", "1", "5.00", "--reference", "back-1") == 0
        assert "5.00 EUR: paid back" in capsys.readouterr().out
        terminal.offline()
        assert payterm(terminal, "refund", str(sale.id), "--wait", "0", "--json") == 0
        refund = json.loads(capsys.readouterr().out)
        assert (refund["amount_minor"], refund["state"], refund["of"]) == (750, "authorising", str(sale.id))
        assert payterm(terminal, "refund", "1", "0.01") == 4
        no_traceback(capsys, "0.00 EUR of this sale can still be paid back")
        assert payterm(terminal, "void", "1") == 4
        no_traceback(capsys, "paid back already")
        assert payterm(terminal, "refund", "1", "a lot") == 2
        no_traceback(capsys, "a lot")
    assert terminal.carry() == ["approved"]
    assert sum(terminal.booked().values()) == 0


@pytest.mark.parametrize("given", [("void", "nonsense"), ("refund", "0"), ("refund", "1", "--wait", "61")])
def test_what_names_no_sale_is_a_mistake_in_the_arguments(
    terminal: Terminal, capsys: pytest.CaptureFixture[str], given: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as left:
        payterm(terminal, *given)
    assert left.value.code == 2
    assert repr(given[-1]) in capsys.readouterr().err


def test_a_lost_sale_is_in_the_status_until_it_is_acknowledged(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.offline()
    terminal.pay(1251)
    assert terminal.carry() == ["refused"]
    with serving(terminal):
        assert payterm(terminal, "status") == 0
        assert "LOST      12.51 EUR sold, declined by the host since: payterm acknowledge 1" in capsys.readouterr().out
        assert payterm(terminal, "acknowledge", "1") == 0
        assert payterm(terminal, "status") == 0
    assert "LOST" not in capsys.readouterr().out


# ---- nothing there


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("sale", "1"),
        ("keep", "x"),
        ("ledger", "list"),
        ("run",),
        ("recover",),
        ("sync", "run"),
        ("config", "check"),
    ],
    ids="-".join,
)
def test_without_a_configuration_nothing_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert payterm(tmp_path / "missing.toml", *arguments) == 2
    no_traceback(capsys, "missing.toml", "No such file", "Nothing was started")


@pytest.mark.parametrize(
    "arguments", [("status",), ("sale", "1"), ("keep", "x"), ("void", "1"), ("refund", "1", "2.50")], ids="-".join
)
def test_without_the_service_commands_say_so(
    terminal: Terminal, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert payterm(terminal, *arguments) == 3
    no_traceback(capsys, "does not answer", "start payterm")


def test_a_list_without_service_and_ledger(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.ledger.close()
    terminal.config.ledger.directory.rename(terminal.directory / "elsewhere")
    assert payterm(terminal, "ledger", "list") == 3
    no_traceback(capsys, "does not answer")
    assert not terminal.config.ledger.directory.exists()  # asking makes no ledger


def test_a_list_while_somebody_holds_the_ledger(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    assert payterm(terminal, "ledger", "list") == 3
    no_traceback(capsys, "another process", "look at its log")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody who may not read the ledger")
def test_a_list_by_somebody_who_may_not_read_the_ledger(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.directory.chmod(0o755)
    private = terminal.directory / "private"
    private.mkdir(mode=0o700)
    text = terminal.config_path.read_text().replace(f"{terminal.directory}/ledger", f"{private}/ledger")
    terminal.config_path.write_text(text)
    os.seteuid(65_534)
    try:
        code = payterm(terminal, "ledger", "list")
    finally:
        os.seteuid(0)
    assert code == 2
    no_traceback(capsys, "Permission denied")


def test_recovery_says_what_it_found(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.offline()
    terminal.pay(1250)
    terminal.ledger.close()
    assert payterm(terminal, "recover") == 0
    assert capsys.readouterr().out == "ledger ready: 1 unsent, 1 waiting for keep or void\n"


@pytest.mark.parametrize("command", ["recover", "run"])
def test_a_locked_ledger_is_left_alone(terminal: Terminal, capsys: pytest.CaptureFixture[str], command: str) -> None:
    bench = Bench()
    assert payterm(terminal, command, bench=bench) == 5
    no_traceback(capsys, "another process")
    if command == "run":
        assert bench.display.pictures[-1] == picture(screens.Error("ledger"))


@pytest.mark.parametrize("name", ["data-key", "chain-key", "signing-key", "host-sealing-key", "host-answer-key"])
def test_without_its_keys_no_terminal_starts(terminal: Terminal, capsys: pytest.CaptureFixture[str], name: str) -> None:
    terminal.ledger.close()
    (terminal.keys_directory / name).unlink()
    bench = Bench()
    assert payterm(terminal, "run", bench=bench) == 5
    no_traceback(capsys, name)
    assert bench.display.pictures[-1] == picture(screens.Error("key"))  # and it stays there
    assert bench.display.closed == 0
    assert bench.reader.closed == 1


def test_without_its_key_sync_does_not_start(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    text = terminal.config_path.read_text()
    terminal.config_path.write_text(f'{text}\n[sync]\ndirectory = "{terminal.directory}/sync"\nkeys = "/nonexistent"\n')
    assert payterm(terminal, "sync", "run") == 5
    no_traceback(capsys, "spool-key")


# ---- services


def test_the_terminal_runs_until_it_is_told_to_stop(terminal: Terminal) -> None:
    """Idle, then SIGTERM: the panel goes dark, the reader is let go, the ledger is free for the next."""
    terminal.ledger.close()
    bench = Bench()
    bench.reader.opening.append(ReaderMissing("none"))

    def stop(shown: bytes) -> None:
        if shown == picture(screens.Error("reader_missing")):
            os.kill(os.getpid(), signal.SIGTERM)

    bench.display.watch = stop
    assert payterm(terminal, "run", bench=bench) == 0
    assert bench.display.pictures[0] == picture(screens.Recovering())
    assert (bench.display.closed, bench.reader.closed) == (1, 1)
    assert not terminal.config.socket.path.exists()
    terminal.start()
    assert isinstance(terminal.ledger, Ledger)


def test_sync_runs_until_it_is_told_to_stop(terminal: Terminal) -> None:
    generate_spool_key(terminal.directory / "sync-keys", seeded())
    more = f'[sync]\ndirectory = "{terminal.directory}/sync"\nkeys = "{terminal.directory}/sync-keys"\n'
    terminal.config_path.write_text(terminal.config_path.read_text() + more)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert payterm(terminal, "sync", "run") == 0
    timer.join()


def test_an_unknown_user_of_the_socket_is_said(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.ledger.close()
    text = terminal.config_path.read_text().replace("[socket]", '[socket]\nregister_user = "nobody-of-this-name"')
    terminal.config_path.write_text(text)
    assert payterm(terminal, "run") == 2
    no_traceback(capsys, "nobody-of-this-name")


def test_a_socket_that_cannot_be_made_is_said(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.ledger.close()
    text = terminal.config_path.read_text().replace(f"{terminal.directory}/terminal.sock", f"{terminal.config_path}/s")
    terminal.config_path.write_text(text)
    assert payterm(terminal, "run") != 0
    no_traceback(capsys, "payterm.toml")


# ---- keys and configuration


def test_keys_are_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keys", "init", str(tmp_path / "keys")], Bench()) == 0
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in made} == {"data-key", "chain-key", "signing-key", "signing-key.pub", "spool-key"}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.rglob("*") if path.is_file())
    capsys.readouterr()
    assert cli.main(["keys", "init", str(tmp_path / "keys")], Bench()) == 5
    no_traceback(capsys, "already")
    assert made == {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_keys_that_cannot_be_made_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["keys", "init", str(tmp_path / "file" / "keys")], Bench()) == 5
    no_traceback(capsys, "Not a directory")


def test_a_good_configuration_is_good(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    assert payterm(terminal, "config", "check") == 0
    assert capsys.readouterr().out == f"{terminal.config_path}: good\n"


def test_a_configuration_is_not_good_if_the_terminal_would_not_start(terminal: Terminal) -> None:
    text = terminal.config_path.read_text().replace('checksum = "', 'checksum = "00')
    terminal.config_path.write_text(text)
    assert payterm(terminal, "config", "check") == 2


@pytest.mark.parametrize(
    "arguments", [(), ("--help",), ("--version",), ("nonsense",), ("ledger",), ("keys", "init")], ids=" ".join
)
def test_arguments_end_as_arguments_do(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments, Bench())
    assert ended.value.code == (0 if arguments in {("--help",), ("--version",)} else 2)
    assert "Traceback" not in capsys.readouterr().err


# ---- the other end of the pipe


def into_a_closed_pipe(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(
            [sys.executable, "-m", "terminal", *arguments],
            stdout=writing,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            timeout=PATIENCE_S,
            check=False,
        )
    finally:
        os.close(writing)


def test_a_reader_that_has_seen_enough_is_no_error(terminal: Terminal) -> None:
    result = into_a_closed_pipe("--config", str(terminal.config_path), "config", "check")
    assert (result.returncode, result.stderr) == (0, b"")

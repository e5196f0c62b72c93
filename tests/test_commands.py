"""Commands that look at, check, copy and erase what is stored: by the running terminal, and by themselves."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ledger_rig import slots_start
from terminal_rig import LAST4, Terminal
from test_cli import no_traceback, payterm, serving

from terminal.ledger.journal import SLOT_BYTES
from terminal.ledger.ledger import Ledger
from terminal.ledger.states import State

# Commands leave their socket to the end of the process, which is right after.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with tempfile.TemporaryDirectory(prefix="payterm-") as directory:
        made = Terminal(Path(directory))
        yield made
        made.close()


@pytest.fixture(autouse=True)
def _short_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("terminal.ui.flow.IDLE_MS", 20)


def said(capsys: Capsys) -> Any:
    return json.loads(capsys.readouterr().out)


def by_itself(terminal: Terminal) -> None:
    terminal.ledger.close()


# ---- audit


def test_the_trail_is_the_same_with_and_without_the_service(terminal: Terminal, capsys: Capsys) -> None:
    terminal.online()
    sale = terminal.pay(1250)
    terminal.ledger.flush()
    with serving(terminal):
        assert payterm(terminal, "audit", "show", "--json", "--transaction", str(sale.id)) == 0
    served = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by_itself(terminal)
    assert payterm(terminal, "audit", "show", "--json", "--transaction", str(sale.id)) == 0
    stored = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["type"] for record in served][:4] == ["OPEN", "CARD", "OUTCOME", "ANSWER"]
    assert stored[:4] == served[:4]
    everything = json.dumps(served)
    assert LAST4 not in everything  # the trail says what happened, not whose card it was


def test_the_trail_for_people_and_its_filters(terminal: Terminal, capsys: Capsys) -> None:
    terminal.offline()
    terminal.pay(1250)
    terminal.ledger.note("link", online=False)
    by_itself(terminal)
    assert payterm(terminal, "audit", "show", "--type", "event", "--what", "link") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all("EVENT" in line and "what=link" in line for line in lines)
    assert payterm(terminal, "audit", "show", "--last", "2") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert payterm(terminal, "audit", "show", "--since", "2099-01-01") == 0
    assert capsys.readouterr().out == ""
    assert payterm(terminal, "audit", "show", "--since", "yesterday") == 2
    assert "no date" in capsys.readouterr().err


def test_verify_says_whole_mends_and_names(terminal: Terminal, capsys: Capsys) -> None:
    terminal.offline()
    terminal.pay(1250)
    with serving(terminal):
        assert payterm(terminal, "audit", "verify") == 0
    assert capsys.readouterr().out.startswith("whole: ")
    by_itself(terminal)
    harm(terminal, 3)
    assert payterm(terminal, "audit", "verify", "--json") == 0
    assert said(capsys)["restored"] == [3]
    harm(terminal, 3)
    with sqlite3.connect(terminal.config.ledger.directory / "ledger.db") as database:
        database.execute("UPDATE records SET trimmed = zeroblob(200)")
    database.close()
    assert payterm(terminal, "audit", "verify") == 1
    assert "record 3 " in capsys.readouterr().out


def harm(terminal: Terminal, sequence: int) -> None:
    directory = terminal.config.ledger.directory
    at = slots_start(directory) + (sequence - 1) * SLOT_BYTES + 150
    with (directory / "journal").open("r+b") as file:
        file.seek(at)
        file.write(b"\xa5\x5a\xa5\x5a")


# ---- ledger


@pytest.mark.parametrize("served", [True, False])
def test_check_for_people_and_scripts(terminal: Terminal, capsys: Capsys, served: bool) -> None:
    terminal.offline()
    terminal.pay(1250)
    if served:
        with serving(terminal):
            assert payterm(terminal, "ledger", "check", "--json") == 0
    else:
        by_itself(terminal)
        assert payterm(terminal, "ledger", "check", "--json") == 0
        assert payterm(terminal, "ledger", "check") == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[0])
    assert found["whole"]
    assert (found["unsent"], found["database"]) == (1, "whole")
    if not served:
        assert "1 for the host, 1 for keep or void" in out


def test_rebuild_makes_the_database_anew_and_keeps_the_former(terminal: Terminal, capsys: Capsys) -> None:
    terminal.offline()
    sale = terminal.pay(1250)
    assert payterm(terminal, "ledger", "rebuild") == 5
    no_traceback(capsys, "another process")
    by_itself(terminal)
    assert payterm(terminal, "ledger", "rebuild") == 0
    assert "the former one is ledger.db.damaged-1" in capsys.readouterr().out
    assert payterm(terminal, "ledger", "list", "--json") == 0
    assert [each["id"] for each in said(capsys)] == [str(sale.id)]


@pytest.mark.parametrize("served", [True, False])
def test_a_backup_is_made_and_brought_back(terminal: Terminal, capsys: Capsys, served: bool) -> None:
    terminal.offline()
    sale = terminal.pay(1250)
    terminal.ledger.mark_shown(sale.id, "accepted")
    file = terminal.directory / "backup"
    if served:
        with serving(terminal):
            assert payterm(terminal, "ledger", "backup", str(file)) == 0
        by_itself(terminal)
    else:
        by_itself(terminal)
        assert payterm(terminal, "ledger", "backup", str(file)) == 0
    told = capsys.readouterr()
    assert "records, read back and whole" in told.out
    assert "NO KEY IS IN THIS BACKUP" in told.err
    assert payterm(terminal, "ledger", "backup", str(file)) in {4, 5}
    assert "is there already" in capsys.readouterr().err
    assert payterm(terminal, "ledger", "restore", str(file)) == 5
    assert "nothing needs to be brought back" in capsys.readouterr().err
    shutil.rmtree(terminal.config.ledger.directory)
    assert payterm(terminal, "ledger", "restore", str(file)) == 0
    told = capsys.readouterr()
    assert "epoch 2" in told.out
    assert "1 sales wait for the host" in told.out
    assert payterm(terminal, "ledger", "list", "--json") == 0
    assert [each["id"] for each in said(capsys)] == [str(sale.id)]


@pytest.mark.parametrize("content", [b"", b"nonsense", bytes(5000)])
def test_what_is_no_backup_is_said(terminal: Terminal, capsys: Capsys, content: bytes) -> None:
    by_itself(terminal)
    file = terminal.directory / "backup"
    file.write_bytes(content)
    assert payterm(terminal, "ledger", "restore", str(file)) == 5
    no_traceback(capsys)
    assert payterm(terminal, "ledger", "restore", str(terminal.directory / "missing")) in {2, 5}
    no_traceback(capsys)


def test_a_state_directory_that_was_moved_is_read_where_it_is(terminal: Terminal, capsys: Capsys) -> None:
    terminal.offline()
    terminal.pay(1250)
    by_itself(terminal)
    text = terminal.config_path.read_text().replace(f"{terminal.directory}/", "")
    terminal.config_path.write_text(text)
    moved = terminal.directory.with_name(terminal.directory.name + "-moved")
    shutil.copytree(terminal.directory, moved)
    shutil.copy(terminal.config_path, moved / "payterm.toml")
    try:
        shutil.rmtree(terminal.config.ledger.directory)
        assert payterm(terminal, "ledger", "list", "--json", "--state", str(moved)) == 0
        assert len(said(capsys)) == 1
    finally:
        shutil.rmtree(moved)


# ---- keys


def test_keys_are_listed_and_never_shown(terminal: Terminal, capsys: Capsys) -> None:
    assert payterm(terminal, "keys", "list", "--json") == 0
    found = {each["name"]: each for each in said(capsys)}
    assert found["data-key"]["identity"] == terminal.keys.data.current.id.hex()
    assert payterm(terminal, "keys", "list") == 0
    shown = capsys.readouterr().out
    assert terminal.keys.data.current.material.hex() not in shown
    assert "X25519" in shown


def test_a_data_key_is_rotated_used_and_retired(terminal: Terminal, capsys: Capsys) -> None:
    terminal.offline()
    sale = terminal.pay(1250)
    old = terminal.keys.data.current.id
    by_itself(terminal)
    assert payterm(terminal, "keys", "rotate") == 0
    assert f"{old.hex()} is retired" in capsys.readouterr().out
    assert payterm(terminal, "ledger", "list", "--json") == 0
    assert said(capsys)[0]["id"] == str(sale.id)
    assert payterm(terminal, "keys", "retire", old.hex()) == 5
    no_traceback(capsys, "sealed under")
    assert payterm(terminal, "keys", "retire", "nonsense") == 2
    no_traceback(capsys, "no id of a key")


def test_a_host_key_comes_in_only_with_its_fingerprint(terminal: Terminal, capsys: Capsys) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from terminal.ledger.keys import fingerprint, pem

    key = Ed25519PrivateKey.generate().public_key()
    file = terminal.directory / "new.pem"
    file.write_bytes(pem(key))
    bring = ("keys", "import-host-key", "host-answer-key", str(file))
    assert payterm(terminal, *bring) == 2
    no_traceback(capsys, "--fingerprint")
    assert payterm(terminal, *bring, "--fingerprint", "00" * 32) == 5
    no_traceback(capsys, "fingerprint")
    assert payterm(terminal, *bring, "--fingerprint", fingerprint(key)) == 0
    assert fingerprint(key) in capsys.readouterr().out


@pytest.mark.parametrize("how", ["missing", "nonsense", "readable by others", "another"])
def test_without_its_key_nothing_is_sold_and_nothing_overwritten(terminal: Terminal, capsys: Capsys, how: str) -> None:
    by_itself(terminal)
    directory = terminal.directory / "keys"
    before = {path.name: path.read_bytes() for path in terminal.config.ledger.directory.iterdir() if path.is_file()}
    match how:
        case "missing":
            (directory / "data-key").unlink()
        case "nonsense":
            (directory / "data-key").write_text("nonsense")
        case "readable by others":
            (directory / "data-key").chmod(0o644)
        case _:
            (directory / "data-key").write_text("ab" * 32)
    for command in (("run",), ("recover",), ("ledger", "list")):
        assert payterm(terminal, *command) == 5
        no_traceback(capsys, "key")
    after = {path.name: path.read_bytes() for path in terminal.config.ledger.directory.iterdir() if path.is_file()}
    assert after == before


# ---- privacy


def test_a_cardholder_is_exported_and_erased(terminal: Terminal, capsys: Capsys) -> None:
    terminal.online()
    sale = terminal.pay(1250)
    card_ref = terminal.ledger.transaction(sale.id).card_ref
    assert card_ref is not None
    with serving(terminal):
        assert payterm(terminal, "privacy", "export", card_ref) == 0
        found = said(capsys)
        assert [each["id"] for each in found["transactions"]] == [str(sale.id)]
        assert found["transactions"][0]["card"]["last4"] == LAST4
        assert payterm(terminal, "privacy", "erase", card_ref) == 0
        assert capsys.readouterr().out.startswith("1 sales no longer name their card")
        assert payterm(terminal, "privacy", "export", card_ref) == 0
        assert said(capsys)["transactions"] == []
    assert terminal.ledger.transaction(sale.id).state is State.APPROVED
    assert isinstance(terminal.ledger, Ledger)

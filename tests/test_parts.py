"""A card and the chip by themselves, as commands: driven by lines, read through the real library."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivers.nfc import Pn532Reader
from hwsim import __main__ as payterm_sim
from hwsim import parts
from hwsim.cards.profile import CardProfile

PPSE = "00A404000E325041592E5359532E444446303100"
PSE = "00A404000E315041592E5359532E444446303100"


def asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, *arguments: str
) -> tuple[int, list[str], str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    with pytest.raises(SystemExit) as ended:
        payterm_sim.main(["card", *arguments])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out.splitlines(), said.err


def test_a_card_answers_by_its_antenna_and_by_its_contacts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, (answer,), _ = asked(monkeypatch, capsys, f"# a comment\n\n{PPSE}\n")
    assert code == 0 and answer.startswith("6F") and "325041592E" in answer and answer.endswith("9000")
    code, (atr, answer), _ = asked(monkeypatch, capsys, PSE, "mastercard-credit", "--contact")
    assert code == 0 and atr.startswith("# ATR 3B") and "315041592E" in answer and answer.endswith("9000")


def test_reset_forgets_what_was_selected(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    select, gpo = "00A4040007A000000003101000", "80A8000002830000"
    _, (first, second), _ = asked(monkeypatch, capsys, f"{select}\nreset\n{gpo}\n")
    assert first.endswith("9000") and not second.endswith("9000")


def test_what_is_no_apdu_is_said_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answers, said = asked(monkeypatch, capsys, f"zz\n00A4\n{'00' * 300}\n{PPSE}\n")
    assert code == 1 and len(answers) == 1
    assert said.count("is no APDU in hex") == 3


def test_a_card_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("nobody", "/nowhere/card.json"):
        code, answers, said = asked(monkeypatch, capsys, PPSE, name)
        assert (code, answers) == (2, []) and name in said and "Traceback" not in said
    code, answers, _ = asked(monkeypatch, capsys, "", "--designs")
    assert code == 0 and "visa-credit" in answers


def test_a_card_from_a_file_keeps_what_its_chip_has_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    parts.load("visa-credit").profile.save(path)
    before = CardProfile.load(path).atc
    amounts = "000000001250" + "000000000000" + "0978" + "0000000000" + "0978"
    gpo = "80A80000238321" + "26000000" + amounts + "261124" + "00" + "AABBCCDD" + "00"
    code, answers, _ = asked(monkeypatch, capsys, f"00A4040007A000000003101000\n{gpo}\n", str(path))
    assert code == 0 and len(answers) == 2
    assert CardProfile.load(path).atc == before + 1, answers


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "hwsim", "pn532", "--link", str(tmp_path / "nfc")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    yield process
    process.kill()
    process.communicate()


def order(chip: subprocess.Popen[str], line: str) -> None:
    assert chip.stdin is not None
    chip.stdin.write(line + "\n")
    chip.stdin.flush()


def test_nfcpy_reads_a_card_at_a_chip_that_stands_alone(chip: subprocess.Popen[str]) -> None:
    assert chip.stdout is not None
    reader = Pn532Reader(chip.stdout.readline().strip())
    reader.open()
    order(chip, "present visa-debit")
    channel = None
    for _ in range(40):
        if (channel := reader.wait_for_card(250)) is not None:
            break
    assert channel is not None
    assert channel.transmit(bytes.fromhex(PPSE)).endswith(b"\x90\x00")
    order(chip, "remove")
    order(chip, "fly away")
    order(chip, "quit")
    reader.close()
    assert chip.wait(10) == 0
    assert chip.stderr is not None and "there is no order 'fly away'" in chip.stderr.read()

"""The import contracts hold, and each of them bites: a planted import of the forbidden kind fails it by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PLANTED = [
    ("drivers/interfaces.py", "import terminal.money", "Imports point one way"),
    ("terminal/payment.py", "import hwsim.world", "Imports point one way"),
    ("terminal/payment.py", "import drivers.nfc", "Concrete drivers are imported only by"),
    ("hw-sim/hwsim/world.py", "import drivers.oled", "Concrete drivers are imported only by"),
    ("terminal/emv/kernel3.py", "import time", "The EMV kernel does no I/O"),
    ("terminal/emv/tlv.py", "import drivers.interfaces", "The EMV kernel does no I/O"),
    ("terminal/emv/outcome.py", "import terminal.ledger", "The EMV kernel does no I/O"),
    ("terminal/payment.py", "import nfc", "The terminal names no hardware library"),
    ("hw-sim/hwsim/cards/visa.py", "import terminal.emv.tlv", "A simulated card shares no code"),
    ("terminal/app.py", "import terminal.sync", "The terminal service carries no upload"),
    ("terminal/sync/step.py", "import terminal.ledger.store", "The sync service cannot open the ledger"),
]


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'hw-sim'}", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for name in ("terminal", "drivers", "hw-sim"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "fonts", "locale"))
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def test_the_tree_keeps_its_contracts(tree: Path) -> None:
    result = lint(tree)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(("file", "line", "contract"), PLANTED, ids=lambda value: value if "/" in value else None)
def test_each_contract_bites(tree: Path, file: str, line: str, contract: str) -> None:
    path = tree / file
    before = path.read_text(encoding="utf-8")
    path.write_text(before + f"\n{line}\n", encoding="utf-8")
    try:
        result = lint(tree)
    finally:
        path.write_text(before, encoding="utf-8")
    broken = [text for text in result.stdout.splitlines() if text.endswith("BROKEN")]
    assert result.returncode == 1, result.stdout + result.stderr
    assert any(text.startswith(contract) for text in broken), broken

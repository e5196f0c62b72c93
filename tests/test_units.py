"""The systemd units: they verify, they confine as they are meant to, and nobody loosens them in passing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

from terminal.config import SaleSection

UNITS = Path(__file__).parent.parent / "systemd"
NAMES = ("payterm-recover", "payterm", "payterm-sync")
# Ten times the exposure that `systemd-analyze security` reckons, as reached; 100 is open to everything.
EXPOSURE_MAX = {"payterm": 7, "payterm-recover": 7, "payterm-sync": 13}

analyses = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here")


def settings(name: str) -> dict[str, list[str]]:
    """The lines of a unit, by key."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / f"{name}.service").read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def one(name: str, key: str) -> str:
    (value,) = settings(name)[key]
    return value


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The units under a root in which what they start is there, so that only the units themselves can be wrong."""
    root = tmp_path_factory.mktemp("root")
    program = root / "opt/payterm/bin/payterm"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    folder = root / "etc/systemd/system"
    folder.mkdir(parents=True)
    for name in NAMES:
        text = (UNITS / f"{name}.service").read_text(encoding="utf-8")
        (folder / f"{name}.service").write_text(text.replace("/opt/payterm/bin/payterm", str(program)))
    return folder


def analyse(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_there_are_no_other_units() -> None:
    assert {path.stem for path in UNITS.glob("*.service")} == set(NAMES)


@analyses
def test_the_units_verify(installed: Path) -> None:
    result = analyse("verify", "--man=no", *(str(installed / f"{name}.service") for name in NAMES))
    ours = [line for line in result.stderr.splitlines() if "payterm" in line]
    assert ours == []


@analyses
def test_a_planted_mistake_does_not_verify(installed: Path, tmp_path: Path) -> None:
    text = (installed / "payterm.service").read_text().replace("ProtectHome=yes", "ProtectHouse=yes")
    broken = tmp_path / "payterm.service"
    broken.write_text(text)
    assert "ProtectHouse" in analyse("verify", "--man=no", str(broken)).stderr


def is_within(unit: Path, threshold: int) -> bool:
    return analyse("security", "--no-pager", "--offline=yes", f"--threshold={threshold}", str(unit)).returncode == 0


@analyses
@pytest.mark.parametrize("name", NAMES)
def test_the_exposure_is_no_more_than_it_was(tmp_path: Path, name: str) -> None:
    unit = UNITS / f"{name}.service"
    assert is_within(unit, EXPOSURE_MAX[name])
    looser = tmp_path / unit.name
    looser.write_text(unit.read_text(encoding="utf-8").replace("SystemCallFilter=", "#"), encoding="utf-8")
    assert not is_within(looser, EXPOSURE_MAX[name])


def test_each_service_is_somebody_and_has_its_own_place() -> None:
    for name, user in (("payterm", "payterm"), ("payterm-recover", "payterm"), ("payterm-sync", "payterm-sync")):
        assert one(name, "User") == one(name, "Group") == one(name, "StateDirectory") == user
        assert one(name, "StateDirectoryMode") == "0700"
        assert one(name, "UMask") == "0077"
        assert one(name, "CapabilityBoundingSet") == ""
        assert one(name, "LimitCORE") == "0"  # no core file with card data in it
        assert one(name, "MemorySwapMax") == "0"  # no card data on the SD card by way of swap


@pytest.mark.parametrize("name", ["payterm", "payterm-recover"])
def test_the_terminal_reaches_no_network(name: str) -> None:
    assert one(name, "PrivateNetwork") == "yes"
    assert one(name, "RestrictAddressFamilies") == "AF_UNIX"
    assert one(name, "IPAddressDeny") == "any"


def test_sync_touches_no_device_and_listens_nowhere() -> None:
    assert one("payterm-sync", "PrivateDevices") == "yes"
    assert one("payterm-sync", "DevicePolicy") == "closed"
    assert "DeviceAllow" not in settings("payterm-sync")
    assert "SupplementaryGroups" not in settings("payterm-sync")
    assert one("payterm-sync", "SocketBindDeny") == "any"


def test_each_service_is_given_its_own_keys_only() -> None:
    keys = {
        name: {
            value.partition(":")[0]
            for key in ("LoadCredential", "LoadCredentialEncrypted")
            for value in settings(name).get(key, [])
        }
        for name in NAMES
    }
    terminals = {"data-key", "chain-key", "signing-key", "host-sealing-key", "host-answer-key"}
    assert keys == {"payterm": terminals, "payterm-recover": terminals, "payterm-sync": {"spool-key"}}


def test_no_sale_before_recovery() -> None:
    assert "payterm-recover.service" in one("payterm", "After")
    assert "payterm-recover.service" in one("payterm", "Requires")


@pytest.mark.parametrize("name", ["payterm", "payterm-sync"])
def test_a_service_that_hangs_or_dies_is_started_again(name: str) -> None:
    assert one(name, "Type") == "notify"
    assert one(name, "Restart") == "always"
    assert int(one(name, "WatchdogSec")) > 0


@pytest.mark.parametrize("name", ["authorisation_timeout_ms", "result_hold_ms"])
def test_no_wait_can_be_configured_that_the_watchdog_would_end(name: str) -> None:
    """Both are waited for in one piece, by the thread that feeds it."""
    watchdog_ms = int(one("payterm", "WatchdogSec")) * 1000
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({name: watchdog_ms}, SaleSection)

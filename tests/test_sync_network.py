"""The kernel's word that the network has changed: an address comes and goes."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading

import pytest

from terminal.sync.network import NetworkWatch

ADDRESS = "127.77.7.7/32"  # on loopback: it disturbs nobody


def change(what: str) -> None:
    ip = shutil.which("ip")
    if ip is None:
        pytest.skip("no ip command here (iproute2)")
    done = subprocess.run([ip, "addr", what, ADDRESS, "dev", "lo"], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no address can be set here ({done.stderr.strip()}): it takes root")


def test_a_change_is_noticed_within_a_second() -> None:
    changed = threading.Event()
    with contextlib.closing(NetworkWatch(changed.set)) as watch:
        assert watch.listening
        assert not changed.wait(0.5), "nothing has changed yet"
        for what in ("add", "del"):
            change(what)
            assert changed.wait(1.5)  # a second, and a busy machine
            changed.clear()


def test_it_ends_at_once_when_nothing_happens() -> None:
    watch = NetworkWatch(lambda: None)
    watch.close()
    assert not watch.listening

"""Fixtures that several tests share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from hwsim.world import World

pytest_plugins = ["screens_plugin"]

# How long an example takes says nothing on a machine that does other things, too.
settings.register_profile("payterm", settings.default, deadline=None)
settings.load_profile("payterm")


@pytest.fixture(scope="module")
def shop() -> Iterator[World]:
    """A whole installation, every part running. Shared by a module: its tests leave the device idle and mended."""
    from hwsim.world import World  # here, so that a unit test does not pay for the whole simulator

    # Not under tmp_path: the path of a Unix socket may have 107 bytes.
    with (
        tempfile.TemporaryDirectory(prefix="payterm-") as directory,
        World.create(Path(directory), result_hold_ms=0, authorisation_timeout_ms=5000) as world,
    ):
        world.start_host()
        world.start_device()
        world.start_terminal()
        world.start_sync()
        yield world

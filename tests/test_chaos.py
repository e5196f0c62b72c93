"""Exactly once at both destinations, whatever fails: 10,000 sales and refunds under seeded chaos, and what it catches.

`CHAOS_SEED` starts the seeds elsewhere; each test says its own, and a run is repeated by it. `python -m
tests.soak.chaos` goes on for longer.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_rig import Broken, Chaos, Forgetful, FreshKeys, Hasty

SEED = int(os.environ.get("CHAOS_SEED", "20261124"))
SHARDS, TRANSACTIONS = 8, 1_250
# Process kills need no disk: the files of a killed process are as it left them, wherever they lie.
MEMORY = Path("/dev/shm")  # noqa: S108 (made with a name of its own there)


@pytest.fixture(autouse=True)
def _small_spool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("terminal.sync.spool.FILLER_BYTES", 65_536)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="payterm-chaos-", dir=MEMORY if MEMORY.is_dir() else None) as made:
        yield Path(made)


def lived(directory: Path, seed: int, transactions: int, **planted: Any) -> dict[str, int]:
    chaos = Chaos(directory, seed, **planted)
    try:
        chaos.run(transactions)
        chaos.heal()
        return chaos.judge()
    finally:
        chaos.close()


@pytest.mark.parametrize("shard", range(SHARDS))
def test_nothing_is_lost_doubled_or_unexplained(directory: Path, shard: int) -> None:
    counted = lived(directory, SEED + shard, TRANSACTIONS)
    print(f"seed {SEED + shard}: {counted}")
    assert counted["transactions"] >= TRANSACTIONS
    assert counted["booked"] > TRANSACTIONS / 2
    assert counted["kills"] > 10
    assert counted["faults"] > TRANSACTIONS / 2


@pytest.mark.parametrize(
    ("planted", "what"),
    [
        ({"open_spool": FreshKeys}, "times at Stripe"),
        ({"repeats_for_ever": True, "long_rests": 0.2}, "times at Stripe"),
        ({"wire": Hasty}, "at the host|left in the queue|paid back|nobody is told"),
        ({"wire": Forgetful}, "at the host"),
    ],
    ids=["a fresh key per attempt", "an ambiguous one repeated after 24 h", "delivered before the commit", "reversals"],
)
def test_control_the_same_judge_finds_what_is_planted(directory: Path, planted: dict[str, Any], what: str) -> None:
    with pytest.raises(Broken, match=what):
        lived(directory, SEED, 150, **planted)


def test_control_without_a_plant_those_days_are_clean(directory: Path) -> None:
    assert lived(directory, SEED, 150, long_rests=0.2)["transactions"] >= 150

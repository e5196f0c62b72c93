"""Inputs that fuzzing has found to reach the most (`python -m tests.fuzz`), run again in every test run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from terminal.emv import dol, tlv
from terminal.emv.apdu import CardRemoved
from terminal.emv.records import CardFault
from tests.fuzz.__main__ import corpus
from tests.fuzz.targets import TARGETS

INPUTS_MIN = 20  # a corpus that was lost must not look like one that passes


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_input_ends_in_an_outcome(target: str) -> None:
    inputs = corpus(target)
    assert len(inputs) >= INPUTS_MIN
    for data in inputs:
        try:
            TARGETS[target](data)
        except Exception as error:
            error.add_note(f"{target}: {data.hex()}")
            raise


def _not_checked(dol_: bytes, *_: object) -> bytes:
    return b"\x00" * dol_[1]  # trusts that a list has two bytes


def _greedy(data: bytes, at: int) -> tuple[int, int]:
    return data[at], at + 1  # trusts that there is a length


@pytest.mark.parametrize(
    ("target", "module", "name", "planted"),
    [
        ("dol", dol, "build", _not_checked),
        ("tlv", tlv, "read_length", _greedy),
        ("contact", dol, "build", _not_checked),
        ("contactless", tlv, "read_length", _greedy),
    ],
)
def test_a_planted_fault_is_found(
    target: str, module: object, name: str, planted: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the corpus reaches what it is kept for."""
    monkeypatch.setattr(module, name, planted)
    with pytest.raises((AssertionError, IndexError, ValueError, CardRemoved, CardFault)):
        for data in corpus(target):
            TARGETS[target](data)

"""A slot for the contact path: a virtual reader for this process, and a card to put into it."""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from nfc_rig import Asked

from hwsim.vpcd import VirtualReader, unavailable

T0_ATR = bytes.fromhex("3b6500002063cb6800")
T1_ATR = bytes.fromhex("3b8401454d5631ea")


class ContactAsked(Asked):
    """Answers as asked; tells a cold reset from a warm one, and may have an ATR for each."""

    def __init__(self, cold_atr: bytes = T0_ATR, warm_atr: bytes | None = None) -> None:
        super().__init__()
        self._atrs = {True: cold_atr, False: cold_atr if warm_atr is None else warm_atr}
        self.atr = b""
        self.cold_resets: list[bool] = []

    def reset(self, cold: bool = True) -> None:
        super().reset()
        self.cold_resets.append(cold)
        self.atr = self._atrs[cold]


class Scripted(ContactAsked):
    """Gives these answers in turn, whatever it is asked."""

    def __init__(self, answers: Sequence[bytes]) -> None:
        super().__init__()
        self._answers = iter(answers)

    def apdu(self, command: bytes) -> bytes:
        super().apdu(command)
        return next(self._answers)


@contextmanager
def virtual_reader() -> Iterator[VirtualReader]:
    """Started, one at a time: the PC/SC library of a process keeps to the socket that it was told first."""
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    with VirtualReader(_directory()) as reader:
        os.environ.update(reader.environment)
        yield reader


@cache
def _directory() -> Path:
    directory = tempfile.TemporaryDirectory(prefix="payterm-pcsc-")
    atexit.register(directory.cleanup)
    return Path(directory.name)

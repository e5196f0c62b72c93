"""The machine's clocks, as the terminal reads them."""

from __future__ import annotations

import time
from pathlib import Path
from uuid import UUID

import pytest

from terminal.clock import SystemClock, system_entropy


def test_running_time_goes_on_and_sleeping_is_part_of_it() -> None:
    clock = SystemClock()
    before_ms = clock.monotonic_ms()
    clock.sleep_ms(20)
    assert clock.monotonic_ms() - before_ms >= 20


def test_wall_time_is_the_machines() -> None:
    assert SystemClock().wall_ms() == pytest.approx(time.time() * 1000, abs=2_000)


def test_the_boot_is_named_as_the_kernel_names_it() -> None:
    named = UUID(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    assert SystemClock().boot_id == named == SystemClock().boot_id


@pytest.mark.parametrize(("answer", "synchronised"), [(0, True), (1, True), (4, True), (5, False)])
def test_only_the_kernels_time_error_means_that_nobody_sets_the_clock(
    monkeypatch: pytest.MonkeyPatch, answer: int, synchronised: bool
) -> None:
    """adjtimex(2): 0 to 4 are about leap seconds."""
    clock = SystemClock()

    class Libc:
        @staticmethod
        def adjtimex(asked: object) -> int:
            assert bytes(asked) == bytes(256)  # type: ignore[call-overload]  # nothing is asked to change
            return answer

    monkeypatch.setattr(clock, "_libc", Libc)
    assert clock.synchronised() is synchronised


def test_the_real_kernel_is_asked_without_harm() -> None:
    assert isinstance(SystemClock().synchronised(), bool)


def test_randomness_has_the_length_asked_for() -> None:
    assert [len(system_entropy(size)) for size in (0, 4, 32)] == [0, 4, 32]
    assert system_entropy(16) != system_entropy(16)

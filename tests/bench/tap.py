"""How long a tap takes: our reader, ISO-DEP and kernel, against bare nfcpy sending the same commands to the same card.

The chip is the emulated PN532 in a process of its own, its card answering at once: what is timed is software, ours,
nfcpy's and the emulator's, the last two alike on both sides. The air and the serial line are computed from the bytes
and printed beside it. A round is one tap through the terminal's own path, then the commands that this very tap sent,
replayed through nfcpy's Type 4 tag layer.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import nfc.clf
import nfc.clf.pn532
import nfc.clf.transport
import nfc.tag

from drivers.nfc import Pn532Reader
from hwsim.world import CARD, World
from terminal import emvsetup
from terminal.clock import system_entropy
from terminal.config import load
from terminal.emv import configuration, entry_point
from terminal.emv.outcome import OnlineRequest
from terminal.money import EUR, Amount
from terminal.payment import drive
from tests.bench.report import Row, Section, measured

ROUNDS: Final = 40
WARM_UP: Final = 3  # taps before the first round: imports inside nfcpy, tables of the kernel
CARD_WAIT_MS: Final = 2_000

_RF_BIT_S: Final = 128 / 13.56e6  # at 106 kbit/s
_RF_BITS_A_BYTE: Final = 9  # parity (ISO/IEC 14443-3, 6.2)
_RF_BYTES_A_BLOCK: Final = 3  # PCB and CRC; an APDU here is one block each way or little more
_UART_BITS_A_BYTE: Final = 10
_UART_BAUD: Final = 115_200  # the default, and all that a Pi's mini-UART does
_GOODS: Final = 0x00


@dataclass
class Tap:
    """One tap through the terminal's own path."""

    found_ms: float = 0.0  # from the first field to an activated card
    exchanged_ms: float = 0.0  # inside the channel
    kernel_ms: float = 0.0
    kernel_cpu_ms: float = 0.0
    commands: list[bytes] = field(default_factory=list)
    answer_bytes: int = 0

    @property
    def whole_ms(self) -> float:
        return self.found_ms + self.exchanged_ms + self.kernel_ms

    @property
    def byte_count(self) -> int:
        return sum(map(len, self.commands)) + self.answer_bytes


def run(place: Path) -> Section:
    """All figures of this benchmark, files in `place`."""
    taps: list[Tap] = []
    bare: list[tuple[float, float]] = []
    with World.create(place / "w") as world:
        setup = emvsetup.build(load(world.config))
        world.start_device()
        world.device.present(CARD)
        path = str(world.directory / "device" / "nfc")
        for number in range(WARM_UP + ROUNDS):
            tap = _tap(path, setup)
            found_ms, exchanged_ms = _bare(path, tap.commands)
            if number >= WARM_UP:
                taps.append(tap)
                bare.append((found_ms, exchanged_ms))

    def of(figure: Callable[[Tap], float]) -> list[float]:
        return [figure(tap) for tap in taps]

    whole, exchanged = of(lambda tap: tap.whole_ms), of(lambda tap: tap.exchanged_ms)
    bare_found, bare_exchanged = [found for found, _ in bare], [took for _, took in bare]
    apdus, total = len(taps[0].commands), taps[0].byte_count
    rf_ms = (total + 2 * apdus * _RF_BYTES_A_BLOCK) * _RF_BITS_A_BYTE * _RF_BIT_S * 1000
    uart_ms = total * _UART_BITS_A_BYTE / _UART_BAUD * 1000
    rows = [
        measured(
            "tap to decision", whole, "ms", peer=[a + b for a, b in bare], against="bare nfcpy, field to last APDU"
        ),
        measured("  finding the card", of(lambda tap: tap.found_ms), "ms", peer=bare_found, against="bare nfcpy"),
        measured(f"  {apdus} APDUs", exchanged, "ms", peer=bare_exchanged, against="bare nfcpy, the same commands"),
        measured("  kernel, between them", of(lambda tap: tap.kernel_ms), "ms", peer=whole, against="of the tap"),
        measured("  kernel, processor", of(lambda tap: tap.kernel_cpu_ms), "ms", peer=whole, against="of the tap"),
        measured("bare nfcpy: sense, activate", bare_found, "ms"),
        measured(f"bare nfcpy: {apdus} APDUs", bare_exchanged, "ms"),
        Row(
            "computed: air at 106 kbit/s", rf_ms, "ms", against=f"{total} bytes in {apdus} APDUs; nothing goes below it"
        ),
        Row("computed: serial at 115,200", uart_ms, "ms", against="their bytes once; 921,600 baud takes an eighth"),
    ]
    return Section(
        "tap",
        "from the first field to the kernel's outcome (Visa-like, fDDA verified), no card or line delays",
        rows,
        [
            "finding: ours looks for collisions in both types and resets the field (3 pauses of 6 ms), nfcpy does not.",
            "on a Pi come the air, the serial line and the card's own thinking; practice asks for under 500 ms in all.",
        ],
    )


def _tap(path: str, setup: configuration.Setup) -> Tap:
    """One sale's reading, as `terminal.payment` does it."""
    tap = Tap()
    inside_cpu_s = 0.0
    reader = Pn532Reader(path)
    reader.open()
    try:
        begun = time.perf_counter()
        channel = reader.wait_for_card(CARD_WAIT_MS)
        tap.found_ms = (time.perf_counter() - begun) * 1000
        if channel is None:
            raise RuntimeError("the simulated card was not found")

        def transmit(command: bytes) -> bytes:
            nonlocal inside_cpu_s
            wall, cpu = time.perf_counter(), time.thread_time()
            answer = channel.transmit(command)
            inside_cpu_s += time.thread_time() - cpu
            tap.exchanged_ms += (time.perf_counter() - wall) * 1000
            tap.commands.append(command)
            tap.answer_bytes += len(answer)
            return answer

        request = configuration.Request(
            amount=Amount(1250, EUR),
            transaction_type=_GOODS,
            date=datetime.datetime.now(datetime.UTC).date(),
            time=datetime.datetime.now(datetime.UTC).time(),
        )
        environment = configuration.Environment(unpredictable_number=lambda: system_entropy(4), notify=lambda _: None)
        begun, cpu = time.perf_counter(), time.thread_time()
        outcome = drive(entry_point.run(setup, request, environment), transmit)
        tap.kernel_ms = (time.perf_counter() - begun) * 1000 - tap.exchanged_ms
        tap.kernel_cpu_ms = (time.thread_time() - cpu - inside_cpu_s) * 1000
        channel.close()
    finally:
        reader.close()
    if not isinstance(outcome, OnlineRequest):
        raise TypeError(f"the tap ended as {type(outcome).__name__}: other work than was to be measured")
    return tap


def _bare(path: str, commands: list[bytes]) -> tuple[float, float]:
    """The same commands through nfcpy alone: milliseconds to the activated tag, and for the exchange."""
    port = os.path.realpath(path)
    device: Any = nfc.clf.pn532.init(nfc.clf.transport.TTY(port))
    device._path = path
    frontend: Any = nfc.clf.ContactlessFrontend()
    frontend.device = device
    try:
        begun = time.perf_counter()
        target = frontend.sense(nfc.clf.RemoteTarget("106A"))
        tag: Any = nfc.tag.activate(frontend, target)
        found_ms = (time.perf_counter() - begun) * 1000
        begun = time.perf_counter()
        for command in commands:
            tag.transceive(bytearray(command))
        return found_ms, (time.perf_counter() - begun) * 1000
    finally:
        frontend.close()

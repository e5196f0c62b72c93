"""The header of the Pi and what is wired to it: a keypad, five lamps, a buzzer.

`Board` is the hardware. It knows levels, pull resistors and contacts: what is joined by a pressed key shares one level,
so three keys in the corners of a rectangle make the fourth appear pressed, contacts bounce when a key goes down or up,
and two outputs that fight each other over a contact are counted as shorts. What people would see and hear is kept with
its times: lamps, tones.

`RpiGpio` is the software's side: a module with the interface of RPi.GPIO, so that gpiozero's own RPiGPIOFactory runs
above it as it is. `install` puts it where `from RPi import GPIO` finds it. Both in one process are joined by the board
itself; in two by `SocketWires`, each request a frame with an answer, each change of level a frame of its own.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import queue
import random
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Final, Protocol

from drivers.interfaces import KEYPAD_LAYOUT, Key

PINS: Final = 28  # GPIO 0 to 27 are on the header
REVISION: Final = 0xC03115  # a Pi 4 B with 4 GB
HISTORY_MAX: Final = 1_000  # changes of lamps and tones kept; older ones are forgotten
ANSWER_TIMEOUT_S: Final = 1.0  # a board that stopped answering must look broken, not hang the terminal
EDGES_MAX: Final = 1_000  # not yet handed to a callback; as in the kernel, more are lost
BOUNCES: Final = (1, 5)  # how often a contact opens again before it stays closed, and the other way round
BOUNCE_S: Final = (0.0001, 0.0015)  # between two of them; 15 ms at the most altogether

_FRAME: Final = struct.Struct(">BBBBdd")  # request, pin, two small arguments, two large ones
_ANSWER: Final = struct.Struct(">BI")  # what it is, all levels
_RECEIVE_BYTES: Final = 4096
_SEND_TIMEOUT: Final = struct.pack("ll", 1, 0)  # struct timeval: a second, for sending only

_log = logging.getLogger(__name__)


class Pull(IntEnum):
    """A pin's own resistor, by RPi.GPIO's numbers."""

    OFF = 20
    DOWN = 21
    UP = 22


class PinBusy(RuntimeError):
    """Another program holds the pin."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """Which pin (BCM number) is soldered to what. Deliberately not taken from the driver's configuration."""

    rows: tuple[int, ...] = (5, 6, 13, 19)
    columns: tuple[int, ...] = (12, 16, 20, 21)
    lamps: tuple[int, ...] = (17, 27, 22, 23)
    status: int = 26
    buzzer: int = 18


@dataclass(frozen=True, slots=True)
class Lit:
    """A change of the lamps: when (monotonic seconds of this machine), the four green ones, the status lamp."""

    at_s: float
    green: tuple[bool, ...]
    status: bool


@dataclass(frozen=True, slots=True)
class Sound:
    """Something heard: when it began, when it ended (None: it still sounds), and how it was driven."""

    from_s: float
    to_s: float | None
    frequency_hz: float
    duty: float


@dataclass(slots=True)
class _Pin:
    """How the software has set a pin. After reset all are inputs."""

    output: bool = False
    pull: Pull = Pull.OFF
    high: bool = False
    pwm: tuple[float, float] | None = None  # hertz, duty from 0 to 1


class Wires(Protocol):
    """What lies between software and board. All but `close` raise OSError when the board is not there."""

    @property
    def levels(self) -> int:
        """One bit for each pin."""

    def watch(self, changed: Callable[[int], None]) -> None:
        """Call `changed` with the levels after each change, from any thread. One watcher at a time."""

    def setup(self, pin: int, *, output: bool, pull: Pull = Pull.OFF, high: bool = False) -> None:
        """Raises `PinBusy`, too."""

    def output(self, pin: int, *, high: bool) -> None: ...

    def pwm(self, pin: int, frequency_hz: float, duty: float) -> None:
        """Hertz and duty from 0 to 1; 0 Hz ends it and leaves the pin low."""

    def close(self) -> None: ...


# ---- the hardware


class Board:
    """Keypad, lamps and buzzer on a header. Safe to use from several threads.

    `bounce` is the chance by which contacts bounce; None gives contacts that do not.
    """

    def __init__(self, wiring: Wiring | None = None, *, bounce: random.Random | None = None) -> None:
        self.wiring = Wiring() if wiring is None else wiring
        self.shorts = 0  # times that a high and a low output were joined: on a real Pi, damage
        self._bounce = bounce
        self._lock = threading.RLock()
        self._pins = [_Pin() for _ in range(PINS)]
        self._busy: set[int] = set()
        self._contacts: set[tuple[int, int]] = set()  # row pin, column pin
        self._shorted = False
        self._levels = 0
        self._watcher: Callable[[int], None] | None = None
        self._lit: deque[Lit] = deque([Lit(time.monotonic(), (False,) * len(self.wiring.lamps), False)], HISTORY_MAX)
        self._sounds: deque[Sound] = deque(maxlen=HISTORY_MAX)

    # -- for whoever holds the device

    def press(self, key: Key) -> None:
        """Put a finger on it; returns when the contact has come to rest."""
        self._move(key, closed=True)

    def release(self, key: Key) -> None:
        """Take the finger off."""
        self._move(key, closed=False)

    def lamps(self) -> Lit:
        """What is lit now, and since when."""
        with self._lock:
            return self._lit[-1]

    def lamp_history(self) -> tuple[Lit, ...]:
        """Each change, oldest first; the first entry is the moment of power-on."""
        with self._lock:
            return tuple(self._lit)

    def sounds(self) -> tuple[Sound, ...]:
        """What the buzzer has sounded, oldest first."""
        with self._lock:
            return tuple(self._sounds)

    def take(self, pin: int) -> None:
        """Let another program hold the pin."""
        with self._lock:
            self._busy.add(pin)

    def give_back(self, pin: int) -> None:
        """End what `take` began."""
        with self._lock:
            self._busy.discard(pin)

    # -- for the software; see `Wires`

    @property
    def levels(self) -> int:
        with self._lock:
            return self._levels

    def watch(self, changed: Callable[[int], None] | None) -> None:
        with self._lock:
            self._watcher = changed

    def setup(self, pin: int, *, output: bool, pull: Pull = Pull.OFF, high: bool = False) -> None:
        with self._lock:
            if pin in self._busy:
                raise PinBusy(f"GPIO {pin} is held by another program")
            self._pins[pin] = _Pin(output, pull, high)
            self._settle()

    def output(self, pin: int, *, high: bool) -> None:
        with self._lock:
            self._pins[pin].high = high
            self._settle()

    def pwm(self, pin: int, frequency_hz: float, duty: float) -> None:
        with self._lock:
            self._pins[pin].pwm = (frequency_hz, duty) if frequency_hz else None
            self._pins[pin].high = False
            self._settle()

    def close(self) -> None:
        """The software ended: its PWM with it, the levels stay."""
        with self._lock:
            self._watcher = None
            for pin in self._pins:
                pin.pwm = None
            self._settle()

    def serve(self, connection: socket.socket) -> None:
        """Obey the `SocketWires` at the other end until it closes; half a request at the end is dropped."""

        def tell(kind: _Kind, levels: int) -> None:
            connection.sendall(_ANSWER.pack(kind, levels))

        def changed(levels: int) -> None:
            try:
                tell(_Kind.CHANGED, levels)
            except OSError:  # gone, or it stopped reading: end the loop below, a person's finger must not wait for it
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_TIMEOUT)
        with self._lock:  # no change may slip in between the first word and the first change
            changed(self._levels)
            self.watch(changed)
        try:
            buffer = b""
            while received := connection.recv(_RECEIVE_BYTES):
                buffer += received
                while len(buffer) >= _FRAME.size:
                    frame, buffer = buffer[: _FRAME.size], buffer[_FRAME.size :]
                    with self._lock:
                        tell(_obey(self, frame), self._levels)
        finally:
            self.close()

    # -- electricity

    def _contact(self, key: Key) -> tuple[int, int]:
        row, column = next((row, keys.index(key)) for row, keys in enumerate(KEYPAD_LAYOUT) if key in keys)
        return self.wiring.rows[row], self.wiring.columns[column]

    def _move(self, key: Key, *, closed: bool) -> None:
        contact = self._contact(key)
        for state, rest_s in self._travel(closed):
            with self._lock:
                if state:
                    self._contacts.add(contact)
                else:
                    self._contacts.discard(contact)
                self._settle()
            time.sleep(rest_s)

    def _travel(self, closed: bool) -> Iterable[tuple[bool, float]]:
        if self._bounce is not None:
            for _ in range(self._bounce.randint(*BOUNCES)):
                yield closed, self._bounce.uniform(*BOUNCE_S)
                yield not closed, self._bounce.uniform(*BOUNCE_S)
        yield closed, 0

    def _settle(self) -> None:
        """Work out all levels, note what can be seen and heard, tell the watcher."""
        levels, shorted = 0, False
        for node in self._nodes():
            driven = {self._pins[number].high for number in node if self._pins[number].output}
            pulled = {self._pins[number].pull for number in node if not self._pins[number].output} - {Pull.OFF}
            shorted |= len(driven) == 2
            # A short pulls low; without a driver the resistors decide; what floats is read as low.
            if driven == {True} or (not driven and pulled == {Pull.UP}):
                levels |= sum(1 << number for number in node)
        self.shorts += shorted and not self._shorted
        self._shorted = shorted
        changed, self._levels = levels != self._levels, levels
        self._look()
        self._listen()
        if changed and self._watcher is not None:
            self._watcher(levels)

    def _nodes(self) -> Iterator[set[int]]:
        """The pins, grouped by what closed contacts join."""
        group = {number: {number} for number in range(PINS)}
        for row, column in self._contacts:
            joined = group[row] | group[column]
            for number in joined:
                group[number] = joined
        seen: set[int] = set()
        for number, node in group.items():
            if number not in seen:
                seen |= node
                yield node

    def _look(self) -> None:
        green = tuple(bool(self._levels >> number & 1) for number in self.wiring.lamps)
        status = bool(self._levels >> self.wiring.status & 1)
        if (green, status) != (self._lit[-1].green, self._lit[-1].status):
            self._lit.append(Lit(time.monotonic(), green, status))

    def _listen(self) -> None:
        """A buzzer without electronics of its own: a steady level is silent."""
        frequency_hz, duty = self._pins[self.wiring.buzzer].pwm or (0.0, 0.0)
        sounding = self._sounds[-1] if self._sounds and self._sounds[-1].to_s is None else None
        if sounding is not None:
            if (sounding.frequency_hz, sounding.duty) == (frequency_hz, duty):
                return
            self._sounds[-1] = Sound(sounding.from_s, time.monotonic(), sounding.frequency_hz, sounding.duty)
        if 0 < duty < 1:
            self._sounds.append(Sound(time.monotonic(), None, frequency_hz, duty))


# ---- wires between two processes


class _Request(IntEnum):
    SETUP = 0
    OUTPUT = 1
    PWM = 2


class _Kind(IntEnum):
    CHANGED = 0
    DONE = 1
    REFUSED = 2


def _obey(board: Board, frame: bytes) -> _Kind:
    request, pin, first, second, large, larger = _FRAME.unpack(frame)
    try:
        match _Request(request):
            case _Request.SETUP:
                board.setup(pin, output=bool(first), pull=Pull(second), high=bool(large))
            case _Request.OUTPUT:
                board.output(pin, high=bool(first))
            case _Request.PWM:
                board.pwm(pin, large, larger)
    except PinBusy:
        return _Kind.REFUSED
    return _Kind.DONE


class SocketWires:
    """The wires to a board in another process. Connects when first used, and again after the connection broke."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._one_at_a_time = threading.Lock()
        self._connection: socket.socket | None = None
        self._answers: queue.SimpleQueue[_Kind | None] = queue.SimpleQueue()
        self._changed: Callable[[int], None] = lambda _: None
        self._levels = 0

    @property
    def levels(self) -> int:
        return self._levels

    def watch(self, changed: Callable[[int], None]) -> None:
        self._changed = changed

    def setup(self, pin: int, *, output: bool, pull: Pull = Pull.OFF, high: bool = False) -> None:
        if self._ask(_Request.SETUP, pin, output, pull, high) is _Kind.REFUSED:
            raise PinBusy(f"GPIO {pin} is held by another program")

    def output(self, pin: int, *, high: bool) -> None:
        self._ask(_Request.OUTPUT, pin, high)

    def pwm(self, pin: int, frequency_hz: float, duty: float) -> None:
        self._ask(_Request.PWM, pin, 0, 0, frequency_hz, duty)

    def close(self) -> None:
        with self._one_at_a_time:
            self._disconnect()

    def _ask(self, request: _Request, pin: int, first: int = 0, second: int = 0, *large: float) -> _Kind:
        large = (*large, 0.0, 0.0)[:2]
        with self._one_at_a_time:
            connection = self._connection or self._connect()
            try:
                connection.sendall(_FRAME.pack(request, pin, first, second, *large))
                answer = self._answers.get(timeout=ANSWER_TIMEOUT_S)
            except (OSError, queue.Empty) as error:
                self._disconnect()
                raise OSError(errno.EREMOTEIO, f"the board at {self._path} does not answer") from error
            if answer is None:
                self._disconnect()
                raise OSError(errno.EPIPE, f"the board at {self._path} went away")
            return answer

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_TIMEOUT)
        try:
            connection.connect(str(self._path))
        except OSError:
            connection.close()
            raise
        self._connection, self._answers = connection, queue.SimpleQueue()
        threading.Thread(target=self._receive, args=(connection, self._answers), name="gpio-wires", daemon=True).start()
        return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes the receiving thread, which closes it

    def _receive(self, connection: socket.socket, answers: queue.SimpleQueue[_Kind | None]) -> None:
        buffer = b""
        with connection:
            with contextlib.suppress(OSError):
                while received := connection.recv(_RECEIVE_BYTES):
                    buffer += received
                    while len(buffer) >= _ANSWER.size:
                        kind, levels = _ANSWER.unpack(buffer[: _ANSWER.size])
                        buffer = buffer[_ANSWER.size :]
                        self._take(levels)
                        if kind != _Kind.CHANGED:
                            answers.put(_Kind(kind))
            answers.put(None)
            if self._connection in (connection, None):
                self._take(0)  # a pulled plug: nothing holds the inputs up any more

    def _take(self, levels: int) -> None:
        changed, self._levels = levels != self._levels, levels
        if changed:
            self._changed(levels)


# ---- the software's side


@dataclass(frozen=True, slots=True)
class _Detection:
    edge: int
    callback: Callable[[int], None] | None


@dataclass(slots=True)
class _Channel:
    direction: int
    pwm: bool = False
    detection: _Detection | None = None


@dataclass(slots=True)
class _Edges:
    """Hands edges to callbacks on a thread of its own, as RPi.GPIO does: callbacks may use pins again."""

    waiting: queue.Queue[tuple[Callable[[int], None], int] | None] = field(
        default_factory=lambda: queue.Queue(EDGES_MAX)
    )
    thread: threading.Thread | None = None

    def put(self, callback: Callable[[int], None], channel: int) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="gpio-edges", daemon=True)
            self.thread.start()
        with contextlib.suppress(queue.Full):
            self.waiting.put_nowait((callback, channel))

    def close(self) -> None:
        if self.thread is not None:
            self.waiting.put(None)
            self.thread.join(ANSWER_TIMEOUT_S)
            self.thread = None

    def _run(self) -> None:
        while (edge := self.waiting.get()) is not None:
            callback, channel = edge
            try:
                callback(channel)
            except Exception:  # noqa: BLE001 - a callback's fault is reported and survived, as by RPi.GPIO
                _log.exception("callback of GPIO %d", channel)


class RpiGpio(ModuleType):
    """A module with RPi.GPIO's interface (0.7), as far as BCM numbering goes, and as strict as that."""

    BOARD, BCM = 10, 11
    OUT, IN = 0, 1
    LOW, HIGH = 0, 1
    PUD_OFF, PUD_DOWN, PUD_UP = Pull
    RISING, FALLING, BOTH = 31, 32, 33
    SERIAL, SPI, I2C, HARD_PWM, UNKNOWN = 40, 41, 42, 43, -1
    VERSION = "0.7.1"

    def __init__(self, wires: Wires) -> None:
        super().__init__("RPi.GPIO")
        self._wires = wires
        self._numbering: int | None = None
        self._channels: dict[int, _Channel] = {}
        self._edges = _Edges()
        self._levels = wires.levels
        self.PWM = functools.partial(_Pwm, self)
        wires.watch(self._changed)

    def close(self) -> None:
        """End the threads and let go of the wires. Not part of RPi.GPIO."""
        self._wires.close()
        self._edges.close()

    # -- RPi.GPIO

    def setmode(self, mode: int) -> None:
        if mode != self.BCM:
            raise ValueError("an invalid mode was passed to setmode(): this board counts as the chip does (BCM)")
        self._numbering = mode

    def getmode(self) -> int | None:
        return self._numbering

    def setwarnings(self, state: bool) -> None:
        """There are none."""

    def setup(self, channel: int, direction: int, pull_up_down: int = PUD_OFF, initial: int | None = None) -> None:
        self._check(channel)
        if direction == self.OUT and pull_up_down != self.PUD_OFF:
            raise ValueError("pull_up_down parameter is not valid for outputs")
        if direction == self.IN and initial is not None:
            raise ValueError("initial parameter is not valid for inputs")
        if direction not in (self.IN, self.OUT):
            raise ValueError("an invalid direction was passed to setup()")
        known = self._channels.get(channel, _Channel(direction))
        high = bool(self._wires.levels >> channel & 1) if initial is None else bool(initial)
        self._wires.setup(channel, output=direction == self.OUT, pull=Pull(pull_up_down), high=high)
        known.direction = direction
        self._channels[channel] = known

    def output(self, channel: int, value: int) -> None:
        if not isinstance(value, int):
            raise ValueError(  # noqa: TRY004 - as the original does
                "Value must be an integer/boolean or a list/tuple of integers/booleans"
            )
        if self._channel(channel).direction != self.OUT:
            raise RuntimeError("The GPIO channel has not been set up as an OUTPUT")
        self._wires.output(channel, high=bool(value))

    def input(self, channel: int) -> int:
        self._channel(channel)
        return self._wires.levels >> channel & 1

    def gpio_function(self, channel: int) -> int:
        self._check(channel)
        known = self._channels.get(channel)
        return self.IN if known is None else known.direction

    def add_event_detect(
        self, channel: int, edge: int, callback: Callable[[int], None] | None = None, bouncetime: int = -666
    ) -> None:
        known = self._channel(channel)
        if known.direction != self.IN:
            raise RuntimeError("You must setup() the GPIO channel as an input first")
        if edge not in (self.RISING, self.FALLING, self.BOTH):
            raise ValueError("The edge must be set to RISING, FALLING or BOTH")
        if bouncetime != -666:
            raise ValueError("this board does not suppress bounces: that is what it is there to show")
        if known.detection is not None:
            raise RuntimeError("Conflicting edge detection already enabled for this GPIO channel")
        known.detection = _Detection(edge, callback)

    def remove_event_detect(self, channel: int) -> None:
        if (known := self._channels.get(channel)) is not None:
            known.detection = None

    def cleanup(self, channel: int | Iterable[int] | None = None) -> None:
        """Make inputs of what this program has set up. Like the original, deaf to a board that is gone."""
        wanted = list(self._channels) if channel is None else [channel] if isinstance(channel, int) else list(channel)
        for each in wanted:
            if self._channels.pop(each, None) is not None:
                with contextlib.suppress(OSError, PinBusy):
                    self._wires.setup(each, output=False)

    # -- inside

    def _check(self, channel: int) -> None:
        if self._numbering is None:
            raise RuntimeError("Please set pin numbering mode using GPIO.setmode(GPIO.BOARD) or GPIO.setmode(GPIO.BCM)")
        if not 0 <= channel < PINS:
            raise ValueError("The channel sent is invalid on a Raspberry Pi")

    def _channel(self, channel: int) -> _Channel:
        self._check(channel)
        if channel not in self._channels:
            raise RuntimeError("You must setup() the GPIO channel first")
        return self._channels[channel]

    def _changed(self, levels: int) -> None:
        before, self._levels = self._levels, levels
        for number, known in list(self._channels.items()):
            detection, level = known.detection, levels >> number & 1
            if detection is None or detection.callback is None or level == before >> number & 1:
                continue
            if detection.edge in (self.BOTH, self.RISING if level else self.FALLING):
                self._edges.put(detection.callback, number)


class _Pwm:
    """What `RpiGpio.PWM` does, in RPi.GPIO's words."""

    def __init__(self, module: RpiGpio, channel: int, frequency_hz: float) -> None:
        known = module._channel(channel)
        if known.direction != module.OUT:
            raise RuntimeError("You must setup() the GPIO channel as an output first")
        if known.pwm:
            raise RuntimeError("A PWM object already exists for this GPIO channel")
        known.pwm = True
        self._module, self._channel, self._known = module, channel, known
        self._running = False
        self._duty = 0.0
        self.ChangeFrequency(frequency_hz)

    def start(self, dutycycle: float) -> None:
        self._running = True
        self.ChangeDutyCycle(dutycycle)

    def ChangeDutyCycle(self, dutycycle: float) -> None:  # noqa: N802 - RPi.GPIO's name
        if not 0 <= dutycycle <= 100:
            raise ValueError("dutycycle must have a value from 0.0 to 100.0")
        self._duty = dutycycle / 100
        self._drive()

    def ChangeFrequency(self, frequency: float) -> None:  # noqa: N802 - RPi.GPIO's name
        if frequency <= 0:
            raise ValueError("frequency must be greater than 0.0")
        self._frequency_hz = frequency
        self._drive()

    def stop(self) -> None:
        """Never fails, as the original's does not: a board that is gone has stopped anyway."""
        self._running = self._known.pwm = False
        with contextlib.suppress(OSError):
            self._module._wires.pwm(self._channel, 0, 0)

    def _drive(self) -> None:
        if self._running:
            self._module._wires.pwm(self._channel, self._frequency_hz, self._duty)


def install(wires: Wires) -> RpiGpio:
    """Be RPi.GPIO for this process, which from here on believes to run on a Pi. Before gpiozero builds its factory.

    May be called again with other wires, once the pin factory over the earlier ones is closed.
    """
    module, package = RpiGpio(wires), ModuleType("RPi")
    package.__path__ = []
    package.__dict__["GPIO"] = module
    sys.modules["RPi"], sys.modules["RPi.GPIO"] = package, module
    sys.modules.pop("gpiozero.pins.rpigpio", None)  # holds on to the module that it was imported with
    import gpiozero.pins.local

    # gpiozero asks the kernel which Pi it runs on, to know the pins of its header.
    gpiozero.pins.local.get_pi_revision = lambda: REVISION
    return module

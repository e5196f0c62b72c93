"""Keys, lamps and sound on the header of a Pi, through gpiozero.

gpiozero knows the pins, whichever library moves them (`Gpio` is told which); here its errors become `PinFault`, a
matrix of contacts becomes keys, and lights and tones become patterns that play by themselves. Nothing is polled while
nothing happens: keys are waited for by edge detection with all rows driven, patterns sleep from one step to the next.

The keypad is a plain matrix without diodes. While it is scanned, one row at a time is driven and the others are let
go, so that two keys in a column never join a high output to a low one. Three keys in the corners of a rectangle make
the fourth appear pressed; `_Typing` therefore believes in one key at a time and in nothing when there are three.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from gpiozero import GPIODevice, InputDevice, OutputDevice, PWMOutputDevice
from gpiozero.pins import Factory

from drivers.interfaces import KEYPAD_LAYOUT, Key, KeyPress, LampState, PinFault, Tone

BackEnd: TypeAlias = Literal["lgpio", "rpigpio"]

_HEADER_PINS: Final = range(2, 28)  # 0 and 1 are for the identification of HATs

SCAN_S: Final = 0.005  # between two looks at keys that move
HELD_S: Final = 0.02  # between two looks at a key that is held: a release is seen before the next key goes down
STUCK_S: Final = 10.0  # held longer than anybody holds a key: from then on looked at seldom
STUCK_SCAN_S: Final = 0.25
DEBOUNCE_S: Final = 0.015  # contacts at rest for so long have stopped bouncing, which takes good ones 5 ms
LONG_S: Final = 1.0
KEYS_MAX: Final = 16  # typed ahead: more than the longest amount; what comes after is dropped
KEYS_COUNTED_MAX: Final = 2  # the most that a matrix shows without doubt
_CLOSE_S: Final = 1.0  # for a thread to notice that it is to end; it sleeps 0.25 s at the most

# EMV Contactless Book A, user interface: idle blink, success and alert tone. The click is ours.
IDLE_ON_S: Final = 0.2
IDLE_PERIOD_S: Final = 5.0
ERROR_BLINK_S: Final = 0.5
TONES: Final[dict[Tone, tuple[tuple[int, float], ...]]] = {  # hertz (0: silence), seconds
    Tone.SUCCESS: ((1500, 0.5),),
    Tone.ALERT: ((750, 0.2), (0, 0.2), (750, 0.2)),
    Tone.CLICK: ((2000, 0.015),),
}
_DUTY: Final = 0.5  # the loudest for a piezo, and a square wave


@dataclass(frozen=True, slots=True)
class Pins:
    """What is wired to which pin, in the chip's own numbers (GPIO 5 is pin 29 of the header).

    The defaults leave I2C (2, 3), UART (14, 15), SPI (7 to 11) and the data and reset lines of an SPI display (24, 25)
    free. Rows and columns are those of `KEYPAD_LAYOUT`. Lamps are lit by a high level.
    """

    rows: tuple[int, ...] = (5, 6, 13, 19)
    columns: tuple[int, ...] = (12, 16, 20, 21)
    lamps: tuple[int, ...] = (17, 27, 22, 23)
    status: int = 26
    buzzer: int = 18

    def __post_init__(self) -> None:
        for name, count in (("rows", 4), ("columns", 4), ("lamps", 4)):
            if len(getattr(self, name)) != count:
                raise PinFault(f"pins.{name} names {len(getattr(self, name))} pins; name {count}")
        named: set[int] = set()
        for pin in (*self.rows, *self.columns, *self.lamps, self.status, self.buzzer):
            if pin not in _HEADER_PINS:
                raise PinFault(f"GPIO {pin} is not on the header; use {_HEADER_PINS[0]} to {_HEADER_PINS[-1]}")
            if pin in named:
                raise PinFault(f"GPIO {pin} is named twice; wire each part to a pin of its own and say which")
            named.add(pin)


class Gpio:
    """The header, through the library that the configuration names; shared by all who have a pin on it.

    "lgpio" works on every Pi with a current kernel. "rpigpio" is whatever provides the module RPi.GPIO: on current
    kernels that is the package rpi-lgpio, for RPi.GPIO itself has no edge detection there. Both lgpio and rpi-lgpio
    make a pipe in the working directory, or in the one that LG_WD names: a service must be able to write there.
    """

    def __init__(self, back_end: BackEnd = "lgpio") -> None:
        self._back_end = back_end
        self._lock = threading.Lock()
        self._factory: Factory | None = None

    def factory(self) -> Factory:
        """gpiozero's pin factory, built when first asked for. Raises `PinFault`; may be tried again."""
        with self._lock:
            if self._factory is None:
                try:
                    self._factory = self._build()
                except Exception as error:  # see `_faults`
                    raise PinFault(
                        f"the pins cannot be used through {self._back_end} ({error}): sales go on without keys, lamps "
                        "and sound. Check that this is a Raspberry Pi, that the library is installed, and that the "
                        "service's user is in the group gpio"
                    ) from error
            return self._factory

    def close(self) -> None:
        """Let go of the library, after everything that has a pin was closed. Never raises."""
        with self._lock:
            factory, self._factory = self._factory, None
            if factory is not None:
                with contextlib.suppress(PinFault), _faults("the header"):
                    factory.close()

    def _build(self) -> Factory:
        # Imported here: each needs a library that is there only if it is configured.
        match self._back_end:
            case "lgpio":
                from gpiozero.pins.lgpio import LGPIOFactory  # noqa: PLC0415

                return LGPIOFactory()
            case "rpigpio":
                from gpiozero.pins.rpigpio import RPiGPIOFactory  # noqa: PLC0415

                return RPiGPIOFactory()


@contextlib.contextmanager
def _faults(what: str) -> Iterator[None]:
    """Whatever goes wrong in here is a fault of `what`."""
    try:
        yield
    except PinFault:
        raise
    except Exception as error:
        # Of any kind: below gpiozero is one of several libraries, each with errors of its own that derive from nothing
        # in common (lgpio's from Exception itself).
        raise PinFault(
            f"{what} cannot be used ({error}): sales go on without it. Check that the configuration names the right "
            "pin and that no other program or overlay uses it"
        ) from error


class _Parts:
    """The gpiozero devices of one driver, each with the pin's number in its faults."""

    def __init__(self, gpio: Gpio) -> None:
        self._gpio = gpio
        self._devices: list[GPIODevice] = []

    def add(self, kind: Callable[..., Any], pin: int, what: str, **settings: object) -> Any:
        factory = self._gpio.factory()
        with _faults(f"GPIO {pin} ({what})"):
            try:
                device = kind(pin, pin_factory=factory, **settings)
            except Exception as error:
                # A device that gpiozero could not finish still holds its pin, for as long as an error remembers it.
                traceback.clear_frames(error.__traceback__)
                raise
        self._devices.append(device)
        return device

    def close(self) -> None:
        """Never raises: a pin that is gone needs no release."""
        devices, self._devices = self._devices, []
        for device in devices:
            with contextlib.suppress(PinFault), _faults("a pin"):
                device.close()


# ---- keys


class _Typing:
    """Keys as a person means them, from what the matrix shows at rest.

    One key counts at a time. A second one that goes down before the first is up (fast typing) counts when it is alone.
    Two that go down together, or three, whoever they are, count for nothing until all are up.
    """

    def __init__(self) -> None:
        self._counted: Key | None = None
        self._since_s = 0.0
        self._long = False
        self._confused = False

    def settled(self, down: frozenset[Key], now_s: float) -> KeyPress | None:
        """What this means, if it means a key."""
        if not down:
            self._counted, self._confused = None, False
            return None
        self._confused |= len(down) > KEYS_COUNTED_MAX or (len(down) > 1 and self._counted not in down)
        if self._confused or len(down) > 1:
            self._long = True  # who touches other keys meanwhile does not mean a long press
            return None
        (key,) = down
        if key is not self._counted:
            self._counted, self._since_s, self._long = key, now_s, False
            return KeyPress(key)
        if not self._long and now_s - self._since_s >= LONG_S:
            self._long = True
            return KeyPress(key, long=True)
        return None


class MatrixKeypad:
    """Sixteen contacts between four rows and four columns. Implements `interfaces.Keypad`.

    A keypad that was unplugged cannot be told from one that nobody touches.
    """

    def __init__(self, gpio: Gpio, pins: Pins) -> None:
        self._pins = pins
        self._parts = _Parts(gpio)
        self._rows: list[GPIODevice] = []
        self._columns: list[InputDevice] = []
        self._edge = threading.Event()  # something moved, or `close` wants the thread to look up
        self._closing = False
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._presses: deque[KeyPress] = deque()
        self._fault: PinFault | None = None

    def open(self) -> None:
        self.close()
        try:
            self._rows = [
                self._parts.add(GPIODevice, pin, f"keypad row {number}")
                for number, pin in enumerate(self._pins.rows, start=1)
            ]
            self._columns = [
                self._parts.add(InputDevice, pin, f"keypad column {number}", pull_up=True)
                for number, pin in enumerate(self._pins.columns, start=1)
            ]
            with _faults("the keypad"):
                self._drive_all()
                for column in self._columns:
                    column.pin.edges = "both"
                    column.pin.when_changed = self._moved
        except PinFault:
            self._parts.close()
            raise
        self._closing = False
        self._edge.set()  # a key may be down already
        self._thread = threading.Thread(target=self._watch, name="keypad", daemon=True)
        self._thread.start()

    def read(self, timeout_ms: int) -> KeyPress | None:
        with self._changed:
            if self._thread is None:
                raise PinFault("the keypad is not open")
            self._changed.wait_for(lambda: self._presses or self._fault, timeout_ms / 1000)
            if self._presses:
                return self._presses.popleft()
            fault = self._fault
        if fault is not None:
            self.close()
            raise fault
        return None

    def discard(self) -> None:
        with self._changed:
            self._presses.clear()

    def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._closing = True
            self._edge.set()
            thread.join(_CLOSE_S)
        self._parts.close()
        with self._changed:
            self._presses.clear()
            self._fault = None

    # -- the thread

    def _moved(self, _ticks: object, _state: object) -> None:
        """Edge detection's only use: to look. Which edges come, and how often, differs between libraries."""
        self._edge.set()

    def _watch(self) -> None:
        try:
            with _faults("the keypad"):
                while not self._closing:
                    self._edge.wait()
                    self._edge.clear()
                    self._follow()
        except PinFault as fault:
            with self._changed:
                self._fault = fault
                self._changed.notify_all()

    def _follow(self) -> None:
        """From the first movement until all keys are up and at rest."""
        typing = _Typing()
        down, since_s = self._scan(), time.monotonic()
        while not self._closing:
            at_rest_s = time.monotonic() - since_s
            if at_rest_s >= DEBOUNCE_S:
                if (press := typing.settled(down, time.monotonic())) is not None:
                    self._report(press)
                if not down:
                    return
            time.sleep(SCAN_S if at_rest_s < DEBOUNCE_S else HELD_S if at_rest_s < STUCK_S else STUCK_SCAN_S)
            before, down = down, self._scan()
            if down != before:
                since_s = time.monotonic()

    def _report(self, press: KeyPress) -> None:
        with self._changed:
            if len(self._presses) < KEYS_MAX:
                self._presses.append(press)
                self._changed.notify_all()

    # -- the matrix

    def _scan(self) -> frozenset[Key]:
        """The keys whose contacts are closed now, ghosts included."""
        if not any(column.value for column in self._columns):
            return frozenset()
        for row in self._rows:
            _release(row)
        down: set[Key] = set()
        for row, keys in zip(self._rows, KEYPAD_LAYOUT, strict=True):
            _drive(row)
            down.update(key for key, column in zip(keys, self._columns, strict=True) if column.value)
            _release(row)
        self._drive_all()
        return frozenset(down)

    def _drive_all(self) -> None:
        for row in self._rows:
            _drive(row)


def _drive(row: GPIODevice) -> None:
    """Low: a closed contact pulls its column down."""
    row.pin.output_with_state(0)


def _release(row: GPIODevice) -> None:
    row.pin.input_with_pull("up")


# ---- patterns in time


_Steps: TypeAlias = Generator[float, None, None]  # does something, then says after how many seconds it will go on


class _Player:
    """Plays one pattern at a time; a new one ends the old. The first step is done by whoever calls."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._changed = threading.Condition()
        self._steps: _Steps | None = None
        self._due_s = 0.0
        self._fault: PinFault | None = None
        self._thread: threading.Thread | None = None

    def play(self, steps: _Steps) -> None:
        """Raises `PinFault`: of this pattern's first step, or of what played since the last call."""
        with self._changed:
            self._end()
            fault, self._fault = self._fault, None
            if fault is not None:
                raise fault
            self._due_s = time.monotonic()
            with _faults(self._what):
                self._advance(steps)
            if self._thread is None and self._steps is not None:
                self._thread = threading.Thread(target=self._run, name=self._what, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def stop(self) -> None:
        """End the pattern and the thread. Never raises."""
        with self._changed:
            thread, self._thread = self._thread, None
            self._end()
            self._fault = None
            self._changed.notify_all()
        if thread is not None:
            thread.join(_CLOSE_S)

    def _run(self) -> None:
        me = threading.current_thread()
        with self._changed:
            while self._thread is me:
                if self._steps is None:
                    self._changed.wait()
                elif (rest_s := self._due_s - time.monotonic()) > 0:
                    self._changed.wait(rest_s)
                else:
                    try:
                        with _faults(self._what):
                            self._advance(self._steps)
                    except PinFault as fault:
                        self._steps, self._fault = None, fault

    def _advance(self, steps: _Steps) -> None:
        delay_s = next(steps, None)
        self._steps = None if delay_s is None else steps
        self._due_s += delay_s or 0  # from when it was due, not from when it was done: no drift

    def _end(self) -> None:
        steps, self._steps = self._steps, None
        if steps is not None:
            try:
                with _faults(self._what):
                    steps.close()
            except PinFault as fault:
                self._fault = fault


# ---- lamps


class HeaderLamps:
    """Four green lamps and a status lamp. Implements `interfaces.Lamps`."""

    def __init__(self, gpio: Gpio, pins: Pins) -> None:
        self._pins = pins
        self._parts = _Parts(gpio)
        self._green: list[OutputDevice] = []
        self._status: OutputDevice | None = None
        self._player = _Player("a lamp")

    def open(self) -> None:
        self.close()
        try:
            self._green = [
                self._parts.add(OutputDevice, pin, f"lamp {number}")
                for number, pin in enumerate(self._pins.lamps, start=1)
            ]
            self._status = self._parts.add(OutputDevice, self._pins.status, "status lamp")
        except PinFault:
            self.close()
            raise

    def show(self, state: LampState) -> None:
        if self._status is None:
            raise PinFault("the lamps are not open")
        self._player.play(self._pattern(state))

    def close(self) -> None:
        self._player.stop()
        self._parts.close()
        self._green, self._status = [], None

    def _pattern(self, state: LampState) -> _Steps:
        match state:
            case LampState.NOT_READY:
                self._light(0, status=False)
            case LampState.IDLE:
                while True:
                    self._light(1)
                    yield IDLE_ON_S
                    self._light(0)
                    yield IDLE_PERIOD_S - IDLE_ON_S
            case LampState.READY | LampState.PROCESSING:
                self._light(1)
            case LampState.CARD_READ:
                self._light(4)
            case LampState.ERROR:
                while True:
                    self._light(0)
                    yield ERROR_BLINK_S
                    self._light(0, status=False)
                    yield ERROR_BLINK_S

    def _light(self, count: int, *, status: bool = True) -> None:
        """The first `count` green lamps, and the status lamp."""
        for number, lamp in enumerate(self._green):
            lamp.value = number < count
        if self._status is not None:
            self._status.value = status


# ---- sound


class PwmBuzzer:
    """A piezo without electronics of its own, driven by a square wave. Implements `interfaces.Buzzer`."""

    def __init__(self, gpio: Gpio, pins: Pins) -> None:
        self._pins = pins
        self._parts = _Parts(gpio)
        self._piezo: PWMOutputDevice | None = None
        self._player = _Player("the buzzer")

    def open(self) -> None:
        self.close()
        piezo = self._parts.add(PWMOutputDevice, self._pins.buzzer, "buzzer")
        self._piezo = piezo
        try:
            self._player.play(_sounding(piezo, ()))
        except PinFault:
            self.close()
            raise

    def play(self, tone: Tone) -> None:
        if self._piezo is None:
            raise PinFault("the buzzer is not open")
        self._player.play(_sounding(self._piezo, TONES[tone]))

    def close(self) -> None:
        self._player.stop()
        self._parts.close()
        self._piezo = None


def _sounding(piezo: PWMOutputDevice, notes: tuple[tuple[int, float], ...]) -> _Steps:
    try:
        for frequency_hz, duration_s in notes:
            _sound(piezo, frequency_hz)
            yield duration_s
    finally:
        _sound(piezo, 0)


def _sound(piezo: PWMOutputDevice, frequency_hz: int) -> None:
    # Without a frequency there is no wave at all: one of duty 0 would still cost a library's thread its wake-ups.
    piezo.frequency = frequency_hz or None
    if frequency_hz:
        piezo.value = _DUTY
    else:
        piezo.pin.state = 0  # a level left high would heat the transistor; an integer, for RPi.GPIO takes no other


# ---- lines for a display


class OutputLines:
    """Plain outputs in the way luma asks for them: what a display on SPI needs beside the bus."""

    OUT: int = 0
    LOW: int = 0
    HIGH: int = 1

    def __init__(self, gpio: Gpio) -> None:
        self._parts = _Parts(gpio)
        self._lines: dict[int, OutputDevice] = {}

    def setup(self, pin: int, _direction: int) -> None:
        """Take the pin. Raises `PinFault`."""
        self._lines[pin] = self._parts.add(OutputDevice, pin, "display line")

    def output(self, pin: int, level: int) -> None:
        """Raises `PinFault`."""
        with _faults(f"GPIO {pin} (display line)"):
            self._lines[pin].value = level

    def close(self) -> None:
        """Release the pins; they can be set up again."""
        self._parts.close()
        self._lines.clear()

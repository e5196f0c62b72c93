"""Keys, lamps and sound through gpiozero's own RPiGPIOFactory, on the simulated header.

Every test ends with the check that no two outputs were ever joined by a key: on a real Pi that would do damage.
"""

from __future__ import annotations

import dataclasses
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import gpiozero.pins.local
import pytest

from drivers.gpio import DEBOUNCE_S, KEYS_MAX, LONG_S, Gpio, HeaderLamps, MatrixKeypad, OutputLines, Pins, PwmBuzzer
from drivers.interfaces import (
    KEYPAD_LAYOUT,
    Buzzer,
    Key,
    Keypad,
    KeyPress,
    Lamps,
    LampState,
    PinFault,
    Tone,
)
from hwsim.gpio import REVISION, Board, PinBusy, Pull, RpiGpio, SocketWires, Wires, Wiring, install

SEED: Final = 20_261_124
SOON_MS: Final = 2_000  # far more than a key needs, on a busy machine as well
QUIET_MS: Final = 120  # several times what a key needs: what has not come by then does not come
UP_S: Final = 0.08  # for the driver to see that all keys are up
SLACK_S: Final = 0.25  # by which a loaded machine may be late

Installed = Callable[[Wires], RpiGpio]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    """`install`, undone at the end."""
    modules: list[RpiGpio] = []
    for name in ("RPi", "RPi.GPIO"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(gpiozero.pins.local, "get_pi_revision", gpiozero.pins.local.get_pi_revision)

    def put(wires: Wires) -> RpiGpio:
        modules.append(install(wires))
        return modules[-1]

    yield put
    for module in modules:
        module.close()
    sys.modules.pop("gpiozero.pins.rpigpio", None)


@pytest.fixture
def board() -> Iterator[Board]:
    print(f"seed {SEED}")
    board = Board(bounce=random.Random(SEED))
    yield board
    assert board.shorts == 0


@pytest.fixture
def gpio(board: Board, installed: Installed) -> Iterator[Gpio]:
    installed(board)
    gpio = Gpio("rpigpio")
    yield gpio
    gpio.close()


@pytest.fixture
def keypad(gpio: Gpio) -> Iterator[MatrixKeypad]:
    keypad = MatrixKeypad(gpio, Pins())
    keypad.open()
    yield keypad
    keypad.close()


@pytest.fixture
def lamps(gpio: Gpio) -> Iterator[HeaderLamps]:
    lamps = HeaderLamps(gpio, Pins())
    lamps.open()
    yield lamps
    lamps.close()


@pytest.fixture
def buzzer(gpio: Gpio) -> Iterator[PwmBuzzer]:
    buzzer = PwmBuzzer(gpio, Pins())
    buzzer.open()
    yield buzzer
    buzzer.close()


def typed(keypad: Keypad) -> list[KeyPress]:
    """Everything that was reported, and nothing more is coming."""
    presses = []
    while (press := keypad.read(QUIET_MS)) is not None:
        presses.append(press)
    return presses


def wait_until(true: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s, "it never came"
        time.sleep(0.002)


def test_the_drivers_are_what_the_terminal_asks_for(gpio: Gpio) -> None:
    keypad: Keypad = MatrixKeypad(gpio, Pins())
    lamps: Lamps = HeaderLamps(gpio, Pins())
    buzzer: Buzzer = PwmBuzzer(gpio, Pins())
    for driver in (keypad, lamps, buzzer):
        driver.close()  # safe at any time
        driver.open()
        driver.open()
        driver.close()
        driver.close()


def test_the_factory_is_gpiozeros_own(gpio: Gpio) -> None:
    factory = gpio.factory()
    assert type(factory).__module__ == "gpiozero.pins.rpigpio"
    assert type(factory).__name__ == "RPiGPIOFactory"
    assert factory.board_info.revision == f"{REVISION:x}"
    assert gpio.factory() is factory


def test_the_configured_pins_are_the_soldered_ones() -> None:
    assert dataclasses.asdict(Pins()) == dataclasses.asdict(Wiring())


# --- Keys -------------------------------------------------------------------------------------------------------------


def test_each_key_is_reported_once(keypad: MatrixKeypad, board: Board) -> None:
    """With bouncing contacts, down and up."""
    assert sorted(key.value for row in KEYPAD_LAYOUT for key in row) == sorted(key.value for key in Key)
    for key in Key:
        board.press(key)
        assert keypad.read(SOON_MS) == KeyPress(key)
        board.release(key)
        time.sleep(UP_S)
    assert typed(keypad) == []


def test_the_same_key_again_counts_again(keypad: MatrixKeypad, board: Board) -> None:
    for _ in range(4):
        board.press(Key.ZERO)
        time.sleep(UP_S)
        board.release(Key.ZERO)
        time.sleep(UP_S)
    assert typed(keypad) == [KeyPress(Key.ZERO)] * 4


def test_contacts_do_bounce(board: Board, installed: Installed) -> None:
    """Negative control: without debouncing there would be more edges than keys."""
    edges: list[int] = []
    module = installed(board)
    module.setmode(module.BCM)
    row, column = board.wiring.rows[1], board.wiring.columns[1]
    module.setup(row, module.OUT, initial=0)
    module.setup(column, module.IN, module.PUD_UP)
    module.add_event_detect(column, module.FALLING, callback=edges.append)
    for _ in range(5):
        board.press(Key.FIVE)
        board.release(Key.FIVE)
    wait_until(lambda: len(edges) > 10)
    assert set(edges) == {column}


def test_a_touch_shorter_than_a_bounce_is_none(gpio: Gpio, board: Board) -> None:
    keypad = MatrixKeypad(gpio, Pins())
    board._bounce = None
    keypad.open()
    for _ in range(5):
        board.press(Key.ENTER)
        time.sleep(DEBOUNCE_S / 10)
        board.release(Key.ENTER)
        time.sleep(UP_S)
    assert typed(keypad) == []
    keypad.close()


def test_a_key_that_is_down_before_is_reported_when_opened(gpio: Gpio, board: Board) -> None:
    board.press(Key.MENU)
    keypad = MatrixKeypad(gpio, Pins())
    keypad.open()
    assert keypad.read(SOON_MS) == KeyPress(Key.MENU)
    keypad.close()


def test_a_long_press_is_reported_on_top(keypad: MatrixKeypad, board: Board) -> None:
    from_s = time.monotonic()
    board.press(Key.CLEAR)
    assert keypad.read(SOON_MS) == KeyPress(Key.CLEAR)
    assert keypad.read(SOON_MS) == KeyPress(Key.CLEAR, long=True)
    assert LONG_S <= time.monotonic() - from_s < LONG_S + 2 * SLACK_S
    assert keypad.read(400) is None, "once"
    board.release(Key.CLEAR)
    time.sleep(UP_S)
    board.press(Key.CLEAR)
    assert typed(keypad) == [KeyPress(Key.CLEAR)]


def test_a_long_press_with_other_keys_is_none(keypad: MatrixKeypad, board: Board) -> None:
    board.press(Key.CANCEL)
    assert keypad.read(SOON_MS) == KeyPress(Key.CANCEL)
    board.press(Key.ONE)
    time.sleep(UP_S)
    board.release(Key.ONE)
    assert keypad.read(int(LONG_S * 1000) + 300) is None


def test_fast_typing_loses_nothing(keypad: MatrixKeypad, board: Board) -> None:
    """The next key is down before the last is up; in one row, in one column, and across."""
    keys = (Key.ONE, Key.TWO, Key.FIVE, Key.ZERO, Key.ENTER, Key.CANCEL, Key.SEVEN)
    for number, key in enumerate(keys):
        board.press(key)
        time.sleep(0.05)
        if number:
            board.release(keys[number - 1])
        time.sleep(UP_S)
    board.release(keys[-1])
    assert typed(keypad) == [KeyPress(key) for key in keys]


@pytest.mark.parametrize("pair", [(Key.ONE, Key.TWO), (Key.TWO, Key.EIGHT), (Key.SIX, Key.ZERO)])
def test_two_at_once_count_for_nothing(gpio: Gpio, board: Board, pair: tuple[Key, Key]) -> None:
    """A finger between two keys: neither, whichever is up first; the next key counts again."""
    board._bounce = None
    keypad = MatrixKeypad(gpio, Pins())
    keypad.open()
    for first_up, last_up in (pair, pair[::-1]):
        for key in pair:
            board.press(key)
        time.sleep(UP_S)
        board.release(first_up)
        time.sleep(UP_S)
        board.release(last_up)
        assert typed(keypad) == []
    board.press(Key.NINE)
    assert keypad.read(SOON_MS) == KeyPress(Key.NINE)
    keypad.close()


def rectangles() -> list[tuple[Key, Key, Key, Key]]:
    """Three keys in corners and the ghost in the fourth."""
    chance = random.Random(SEED)
    found = []
    for _ in range(3):
        (top, bottom), (left, right) = chance.sample(range(4), 2), chance.sample(range(4), 2)
        found.append((*(KEYPAD_LAYOUT[row][column] for row, column in ((top, left), (top, right), (bottom, left))),
                      KEYPAD_LAYOUT[bottom][right]))  # fmt: skip
    return found


@pytest.mark.parametrize("keys", rectangles(), ids=lambda keys: "-".join(key.value for key in keys))
def test_ghosts_are_not_believed(keypad: MatrixKeypad, board: Board, keys: tuple[Key, Key, Key, Key]) -> None:
    *pressed, ghost = keys
    for key in pressed:
        board.press(key)
        time.sleep(UP_S)
    assert typed(keypad) == [KeyPress(pressed[0])], "the first was alone"
    for key in (pressed[1], pressed[0], pressed[2]):
        board.release(key)
        time.sleep(UP_S)
    assert typed(keypad) == [], "what is left of a hand on the keys is no key either"
    board.press(ghost)
    assert keypad.read(SOON_MS) == KeyPress(ghost)


def test_the_board_does_make_ghosts(board: Board) -> None:
    """Negative control: 1, 2 and 4 look like 5 as well."""
    rows, columns = board.wiring.rows, board.wiring.columns
    for column in columns:
        board.setup(column, output=False, pull=Pull.UP)
    board.setup(rows[1], output=True, high=False)
    for key in (Key.ONE, Key.TWO):
        board.press(key)
    assert board.levels >> columns[1] & 1, "the second row alone pulls nothing down"
    board.press(Key.FOUR)
    assert not board.levels >> columns[1] & 1


def test_the_board_does_notice_shorts() -> None:
    """Negative control for the check at the end of every test."""
    board = Board()
    board.setup(board.wiring.rows[0], output=True, high=False)
    board.setup(board.wiring.rows[1], output=True, high=True)
    board.press(Key.ONE)
    assert board.shorts == 0
    board.press(Key.FOUR)
    assert board.shorts == 1


def test_typing_ahead_is_kept_to_a_limit_and_can_be_forgotten(keypad: MatrixKeypad, board: Board) -> None:
    for _ in range(KEYS_MAX + 2):
        board.press(Key.SEVEN)
        time.sleep(0.05)
        board.release(Key.SEVEN)
        time.sleep(0.05)
    assert len(typed(keypad)) == KEYS_MAX
    board.press(Key.ENTER)
    time.sleep(UP_S)
    keypad.discard()
    assert keypad.read(0) is None


def test_reading_waits_as_long_as_it_was_told(keypad: MatrixKeypad, board: Board) -> None:
    from_s = time.monotonic()
    assert keypad.read(150) is None
    assert 0.15 <= time.monotonic() - from_s < 0.15 + SLACK_S
    assert keypad.read(0) is None


def test_a_closed_keypad_says_so(gpio: Gpio) -> None:
    keypad = MatrixKeypad(gpio, Pins())
    with pytest.raises(PinFault, match="not open"):
        keypad.read(0)


# --- Lamps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "green", "status"),
    [
        (LampState.NOT_READY, (False, False, False, False), False),
        (LampState.READY, (True, False, False, False), True),
        (LampState.PROCESSING, (True, False, False, False), True),
        (LampState.CARD_READ, (True, True, True, True), True),
    ],
)
def test_steady_lamps(
    lamps: HeaderLamps, board: Board, state: LampState, green: tuple[bool, ...], status: bool
) -> None:
    lamps.show(LampState.CARD_READ)
    lamps.show(state)
    assert (board.lamps().green, board.lamps().status) == (green, status), "when `show` returns"
    history = board.lamp_history()
    time.sleep(0.1)
    assert board.lamp_history() == history, "steady"


def test_idle_blinks_and_costs_nothing(
    lamps: HeaderLamps, keypad: MatrixKeypad, buzzer: PwmBuzzer, board: Board
) -> None:
    """200 ms every 5 s; meanwhile nothing is polled: not the keys, not the lamps, not the silent buzzer."""
    time.sleep(UP_S)
    cpu_s, from_s = time.process_time(), time.monotonic()
    lamps.show(LampState.IDLE)
    time.sleep(5.45)
    cpu_s, wall_s = time.process_time() - cpu_s, time.monotonic() - from_s
    print(f"idle: {cpu_s * 1000:.1f} ms of processor time in {wall_s:.1f} s")
    assert cpu_s < 0.005 * wall_s
    # Green and status lamps do not change in the same instant: keep the status lamp's own change out of it.
    lit = [each for each in board.lamp_history() if each.at_s >= from_s and each.status]
    assert [each.green[0] for each in lit] == [True, False, True, False]
    on, off, again, off_again = (each.at_s - from_s for each in lit)
    assert on < SLACK_S
    assert off == pytest.approx(0.2, abs=SLACK_S)
    assert again == pytest.approx(5.0, abs=SLACK_S)
    assert off_again == pytest.approx(5.2, abs=SLACK_S)
    assert not any(any(each.green[1:]) for each in lit)


def test_a_fault_blinks_the_status_lamp(lamps: HeaderLamps, board: Board) -> None:
    lamps.show(LampState.ERROR)
    time.sleep(1.1)
    lamps.show(LampState.READY)
    blinks = [each for each in board.lamp_history() if not any(each.green)][1:]
    assert [each.status for each in blinks] == [True, False, True]
    assert blinks[1].at_s - blinks[0].at_s == pytest.approx(0.5, abs=SLACK_S)
    assert board.lamps().green == (True, False, False, False)
    history = board.lamp_history()
    time.sleep(0.55)
    assert board.lamp_history() == history, "the old pattern has ended"


def test_closed_lamps_are_dark(gpio: Gpio, board: Board) -> None:
    lamps = HeaderLamps(gpio, Pins())
    with pytest.raises(PinFault, match="not open"):
        lamps.show(LampState.READY)
    lamps.open()
    assert not any(board.lamps().green)
    lamps.show(LampState.CARD_READ)
    lamps.close()
    assert not any(board.lamps().green)
    assert not board.lamps().status


# --- Sound ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tone", "expected"),
    [
        (Tone.SUCCESS, [(1500, 0.0, 0.5)]),
        (Tone.ALERT, [(750, 0.0, 0.2), (750, 0.4, 0.6)]),
        (Tone.CLICK, [(2000, 0.0, 0.015)]),
    ],
)
def test_tones(buzzer: PwmBuzzer, board: Board, tone: Tone, expected: list[tuple[int, float, float]]) -> None:
    from_s = time.monotonic()
    buzzer.play(tone)
    assert time.monotonic() - from_s < SLACK_S, "it plays by itself"
    time.sleep(expected[-1][2] + 0.1)
    sounds = board.sounds()
    assert [(sound.frequency_hz, sound.duty) for sound in sounds] == [(hertz, 0.5) for hertz, _, _ in expected]
    for sound, (_, begins_s, ends_s) in zip(sounds, expected, strict=True):
        assert sound.to_s is not None, "silent in the end"
        assert sound.from_s - from_s == pytest.approx(begins_s, abs=SLACK_S)
        assert sound.to_s - from_s == pytest.approx(ends_s, abs=SLACK_S)
        assert sound.to_s - sound.from_s > (ends_s - begins_s) * 0.5


def test_a_new_tone_cuts_the_old(buzzer: PwmBuzzer, board: Board) -> None:
    buzzer.play(Tone.SUCCESS)
    time.sleep(0.1)
    buzzer.play(Tone.ALERT)
    first, second = board.sounds()
    assert first.to_s is not None
    assert first.to_s - first.from_s < 0.5 - SLACK_S
    assert (second.frequency_hz, second.to_s) == (750, None)


def test_a_closed_buzzer_is_silent(gpio: Gpio, board: Board) -> None:
    buzzer = PwmBuzzer(gpio, Pins())
    with pytest.raises(PinFault, match="not open"):
        buzzer.play(Tone.CLICK)
    buzzer.open()
    assert board.sounds() == ()
    buzzer.play(Tone.SUCCESS)
    buzzer.close()
    (sound,) = board.sounds()
    assert sound.to_s is not None


# --- Pins that cannot be had ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "pin", "what"),
    [
        (MatrixKeypad, Pins().rows[0], "keypad row 1"),
        (MatrixKeypad, Pins().columns[3], "keypad column 4"),
        (HeaderLamps, Pins().lamps[2], "lamp 3"),
        (HeaderLamps, Pins().status, "status lamp"),
        (PwmBuzzer, Pins().buzzer, "buzzer"),
    ],
)
def test_a_pin_that_another_program_holds(
    gpio: Gpio, board: Board, kind: type[MatrixKeypad | HeaderLamps | PwmBuzzer], pin: int, what: str
) -> None:
    board.take(pin)
    driver = kind(gpio, Pins())
    with pytest.raises(PinFault, match=rf"GPIO {pin} \({what}\).*sales go on.*no other program") as caught:
        driver.open()
    assert isinstance(caught.value.__cause__, PinBusy)
    board.give_back(pin)
    driver.open()
    driver.close()


def test_a_pin_of_our_own_that_is_used_twice(gpio: Gpio) -> None:
    first, second = MatrixKeypad(gpio, Pins()), MatrixKeypad(gpio, Pins())
    first.open()
    with pytest.raises(PinFault, match=rf"GPIO {Pins().rows[0]} \(keypad row 1\).*in use"):
        second.open()
    first.close()
    second.open()
    second.close()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"status": 18}, "GPIO 18 is named twice"),
        ({"buzzer": 28}, "GPIO 28 is not on the header"),
        ({"rows": (5, 6, 13)}, "pins.rows names 3 pins; name 4"),
    ],
)
def test_pins_that_cannot_be(wrong: dict[str, int | tuple[int, ...]], message: str) -> None:
    with pytest.raises(PinFault, match=message):
        Pins(**wrong)  # type: ignore[arg-type]


def on_a_pi() -> bool:
    return Path("/proc/device-tree/system/linux,revision").exists()


def lgpio_factory(directory: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: lgpio leaves a pipe where it is told to, and a thread."""
    code = (
        "from drivers.gpio import Gpio\nfrom drivers.interfaces import PinFault\n"
        "try: print(type(Gpio('lgpio').factory()).__name__)\nexcept PinFault as fault: print(fault)"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "LG_WD": str(directory)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


@pytest.mark.skipif(on_a_pi(), reason="this machine has a header")
def test_a_machine_without_a_header(tmp_path: Path) -> None:
    assert "sales go on without keys, lamps and sound. Check that this is a" in lgpio_factory(tmp_path).stdout


@pytest.mark.skipif(not on_a_pi(), reason="lgpio's factory needs a GPIO chip and a Pi's revision; this machine is none")
def test_lgpio_on_a_pi(tmp_path: Path) -> None:
    pytest.importorskip("lgpio", reason="lgpio is not installed")
    assert lgpio_factory(tmp_path).stdout.strip() == "LGPIOFactory"


def test_output_lines(gpio: Gpio, board: Board) -> None:
    lines = OutputLines(gpio)
    for _ in range(2):
        lines.setup(24, lines.OUT)
        lines.output(24, lines.HIGH)
        assert board.levels >> 24 & 1
        lines.output(24, lines.LOW)
        assert not board.levels >> 24 & 1
        lines.close()
    board.take(25)
    with pytest.raises(PinFault, match="GPIO 25"):
        lines.setup(25, lines.OUT)


# --- RPi.GPIO's own strictness ----------------------------------------------------------------------------------------


@pytest.fixture
def module(board: Board, installed: Installed) -> RpiGpio:
    module = installed(board)
    module.setmode(module.BCM)
    return module


@pytest.mark.parametrize(
    ("misuse", "error"),
    [
        (lambda module: module.input(4), RuntimeError),
        (lambda module: module.output(17, 1), RuntimeError),
        (lambda module: (module.setup(17, module.IN), module.output(17, 1)), RuntimeError),
        (lambda module: (module.setup(17, module.OUT), module.output(17, 0.5)), ValueError),
        (lambda module: module.setup(17, module.OUT, module.PUD_UP), ValueError),
        (lambda module: module.setup(17, module.IN, initial=1), ValueError),
        (lambda module: module.setup(28, module.IN), ValueError),
        (lambda module: module.setmode(module.BOARD), ValueError),
        (lambda module: (module.setup(4, module.OUT), module.add_event_detect(4, module.BOTH)), RuntimeError),
        (lambda module: (module.setup(4, module.IN), module.add_event_detect(4, 7)), ValueError),
        (lambda module: (module.setup(18, module.IN), module.PWM(18, 50)), RuntimeError),
        (lambda module: (module.setup(18, module.OUT), module.PWM(18, 0)), ValueError),
        (lambda module: (module.setup(18, module.OUT), module.PWM(18, 50), module.PWM(18, 50)), RuntimeError),
        (lambda module: (module.setup(18, module.OUT), module.PWM(18, 50).start(101)), ValueError),
    ],
)
def test_misuse_is_refused_as_by_the_original(
    module: RpiGpio, misuse: Callable[[RpiGpio], object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        misuse(module)


def test_nothing_goes_without_a_numbering(board: Board, installed: Installed) -> None:
    with pytest.raises(RuntimeError, match="setmode"):
        installed(board).setup(4, 1)


def test_a_callback_may_fail_and_use_pins(module: RpiGpio, board: Board, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []

    def callback(channel: int) -> None:
        seen.append(module.input(channel))
        module.setup(26, module.OUT, initial=1)
        raise ValueError("of no consequence")

    module.setup(board.wiring.rows[0], module.OUT, initial=0)
    module.setup(board.wiring.columns[0], module.IN, module.PUD_UP)
    module.add_event_detect(board.wiring.columns[0], module.RISING, callback=callback)
    for _ in range(2):
        board.press(Key.ONE)
        board.release(Key.ONE)
        wait_until(lambda: bool(seen))
    wait_until(lambda: board.lamps().status)
    assert "callback of GPIO 12" in caplog.text
    module.remove_event_detect(board.wiring.columns[0])


# --- Board and terminal in two processes ------------------------------------------------------------------------------


class ServedBoard:
    """A board behind a socket, as the simulated device serves it: one terminal after the other."""

    def __init__(self, path: Path, board: Board) -> None:
        self.board = board
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def unplug(self) -> None:
        if self._connection is not None:
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.unplug()
        self._thread.join(5)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self._connection = connection
                self.board.serve(connection)
                self._connection = None


@pytest.fixture
def served(tmp_path: Path, board: Board) -> Iterator[ServedBoard]:
    served = ServedBoard(tmp_path / "gpio.sock", board)
    yield served
    served.close()


@pytest.fixture
def far(served: ServedBoard, tmp_path: Path, installed: Installed) -> Iterator[Gpio]:
    installed(SocketWires(tmp_path / "gpio.sock"))
    gpio = Gpio("rpigpio")
    yield gpio
    gpio.close()


def test_all_of_it_through_a_socket(far: Gpio, board: Board) -> None:
    keypad, lamps, buzzer = MatrixKeypad(far, Pins()), HeaderLamps(far, Pins()), PwmBuzzer(far, Pins())
    for driver in (keypad, lamps, buzzer):
        driver.open()
    for row in KEYPAD_LAYOUT:
        board.press(row[1])
        assert keypad.read(SOON_MS) == KeyPress(row[1])
        board.release(row[1])
        time.sleep(UP_S)
    lamps.show(LampState.CARD_READ)
    assert board.lamps().green == (True,) * 4
    buzzer.play(Tone.CLICK)
    wait_until(lambda: bool(board.sounds()) and board.sounds()[-1].to_s is not None)
    assert typed(keypad) == []
    for driver in (keypad, lamps, buzzer):
        driver.close()
    board.take(Pins().buzzer)
    with pytest.raises(PinFault, match="held by another program"):
        buzzer.open()


def test_pulled_wires_are_a_fault_and_heal(far: Gpio, served: ServedBoard, board: Board) -> None:
    keypad, lamps, buzzer = MatrixKeypad(far, Pins()), HeaderLamps(far, Pins()), PwmBuzzer(far, Pins())
    for driver in (keypad, lamps, buzzer):
        driver.open()
    lamps.show(LampState.CARD_READ)
    lamps.show(LampState.IDLE)
    buzzer.play(Tone.SUCCESS)
    served.unplug()
    with pytest.raises(PinFault, match="sales go on") as caught:
        keypad.read(SOON_MS)  # told by the inputs that fell, not by the next key
    assert isinstance(caught.value.__cause__, OSError)
    wait_until(lambda: board.sounds()[-1].to_s is not None)  # the wave was the terminal's
    served.board.take(Pins().lamps[0])
    with pytest.raises(PinFault, match="GPIO 17"):
        lamps.open()
    served.board.give_back(Pins().lamps[0])
    for driver in (keypad, lamps, buzzer):
        driver.open()
    board.press(Key.THREE)
    assert keypad.read(SOON_MS) == KeyPress(Key.THREE)
    lamps.show(LampState.READY)
    assert board.lamps().green[0]
    for driver in (keypad, lamps, buzzer):
        driver.close()


def test_a_blink_that_failed_is_reported_by_the_next_call(far: Gpio, served: ServedBoard, board: Board) -> None:
    """Although the wires would carry that call again: the lamps are not what they were told to be."""
    lamps = HeaderLamps(far, Pins())
    lamps.open()
    lamps.show(LampState.ERROR)
    served.unplug()
    time.sleep(0.5 + SLACK_S)
    with pytest.raises(PinFault, match="a lamp cannot be used"):
        lamps.show(LampState.READY)
    lamps.open()
    lamps.show(LampState.READY)
    assert board.lamps().green[0]
    lamps.close()


def test_everything_can_be_closed_when_the_board_is_gone(
    far: Gpio, served: ServedBoard, board: Board, tmp_path: Path
) -> None:
    drivers = (keypad, lamps, buzzer) = MatrixKeypad(far, Pins()), HeaderLamps(far, Pins()), PwmBuzzer(far, Pins())
    for driver in drivers:
        driver.open()
    lamps.show(LampState.IDLE)
    buzzer.play(Tone.SUCCESS)
    (tmp_path / "gpio.sock").rename(tmp_path / "elsewhere")
    served.unplug()
    wait_until(lambda: board.sounds()[-1].to_s is not None)
    for driver in drivers:
        driver.close()
    (tmp_path / "elsewhere").rename(tmp_path / "gpio.sock")
    for driver in drivers:
        driver.open()
    buzzer.play(Tone.ALERT)
    assert board.sounds()[-1].to_s is None
    board.press(Key.UP)
    assert keypad.read(SOON_MS) == KeyPress(Key.UP)
    for driver in drivers:
        driver.close()


def test_a_board_that_is_not_there(tmp_path: Path, installed: Installed) -> None:
    installed(SocketWires(tmp_path / "nothing.sock"))
    gpio = Gpio("rpigpio")
    for driver in (MatrixKeypad(gpio, Pins()), HeaderLamps(gpio, Pins()), PwmBuzzer(gpio, Pins())):
        with pytest.raises(PinFault, match="No such file"):
            driver.open()
        driver.close()
    gpio.close()


def test_lamps_outlive_the_terminal(tmp_path: Path, served: ServedBoard, installed: Installed) -> None:
    wires = SocketWires(tmp_path / "gpio.sock")
    wires.setup(17, output=True, high=True)
    wires.setup(18, output=True)
    wires.pwm(18, 1500, 0.5)
    assert served.board.sounds()[-1].to_s is None
    wires._connection.sendall(b"\x01\x11")  # type: ignore[union-attr]  # killed in the middle of a request
    wires.close()
    wait_until(lambda: served.board.sounds()[-1].to_s is not None)
    assert served.board.lamps().green[0]


def test_a_terminal_that_stopped_reading_holds_up_no_finger(tmp_path: Path, served: ServedBoard) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as terminal:
        terminal.connect(str(tmp_path / "gpio.sock"))
        frame = struct.Struct(">BBBBdd")
        for pin in Wiring().columns:
            terminal.sendall(frame.pack(0, pin, 0, Pull.UP, 0, 0))
        terminal.sendall(frame.pack(0, Wiring().rows[0], 1, Pull.OFF, 0, 0))
        wait_until(lambda: bool(served.board.levels >> Wiring().columns[0] & 1))
        served.board._bounce = None
        from_s = time.monotonic()
        for _ in range(1_000):
            served.board.press(Key.ONE)
            served.board.release(Key.ONE)
        assert time.monotonic() - from_s < 10


BOARD_PROCESS: Final = """\
import random, socket, sys, threading, time
from drivers.interfaces import Key
from hwsim.gpio import Board
board = Board(bounce=random.Random(int(sys.argv[2])))
listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
listener.bind(sys.argv[1])
listener.listen()
print("ready", "gpiozero" in sys.modules, flush=True)
threading.Thread(target=lambda: board.serve(listener.accept()[0]), daemon=True).start()
for line in sys.stdin:
    what, name = line.split()
    at_s = time.monotonic()
    getattr(board, what)(Key(name))
    print(at_s, board.shorts, flush=True)
"""


def test_two_processes(tmp_path: Path, installed: Installed) -> None:
    """The board in a process of its own; how long a key takes is printed, not judged."""
    path = tmp_path / "gpio.sock"
    root = Path(__file__).parent.parent
    board = subprocess.Popen(
        [sys.executable, "-c", BOARD_PROCESS, str(path), str(SEED)],
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'hw-sim'}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert board.stdin is not None
    assert board.stdout is not None
    try:
        assert board.stdout.readline() == "ready False\n", "the device needs no gpiozero"
        installed(SocketWires(path))
        gpio = Gpio("rpigpio")
        keypad = MatrixKeypad(gpio, Pins())
        keypad.open()
        latencies_ms = []
        for key in (Key.ONE, Key.TWO, Key.FIVE, Key.ZERO, Key.ENTER) * 2:
            for what in ("press", "release"):
                print(what, key.value, file=board.stdin, flush=True)
                if what == "press":
                    assert keypad.read(SOON_MS) == KeyPress(key)
                    now_s = time.monotonic()
                at_s, shorts = board.stdout.readline().split()
                assert shorts == "0"
                if what == "press":
                    latencies_ms.append((now_s - float(at_s)) * 1000)
            time.sleep(UP_S)
        print(
            f"from the first touch of a bouncing contact to the key: median {statistics.median(latencies_ms):.0f} ms, "
            f"at most {max(latencies_ms):.0f} ms, of which {DEBOUNCE_S * 1000:.0f} ms are for bounces"
        )
        keypad.close()
        gpio.close()
    finally:
        board.stdin.close()
        board.stdout.close()
        board.kill()
        board.wait(5)

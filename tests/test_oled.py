"""The OLED's driver over the real luma.oled, and the simulated panels below it, SSD1306 and SH1106."""

from __future__ import annotations

import gc
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from luma.core.error import DeviceNotFoundError
from luma.oled.device import sh1106, ssd1306
from PIL import Image

from drivers.interfaces import DISPLAY_SIZE_PX, DisplayFault, PinFault
from drivers.oled import Controller, Oled
from hwsim.console import draw
from hwsim.ssd1306 import BusDecoder, LocalBus, Sh1106, SocketBus, SpiBus, Ssd1306, serve_bus
from terminal.money import EUR, Amount
from terminal.ui.screens import Approved, PresentCard, render

SALE = Amount(1250, EUR)
SEED = 20_261_123
PANELS: dict[Controller, type[Ssd1306]] = {"ssd1306": Ssd1306, "sh1106": Sh1106}


class WatchedBus(LocalBus):
    """Counts what crosses the bus and breaks at a chosen transfer."""

    def __init__(self, panel: Ssd1306) -> None:
        super().__init__(panel)
        self.transfers = 0
        self.data_bytes = 0
        self.closed = 0
        self.breaks_at: int | None = None
        self.error: Exception = OSError(121, "Remote I/O error")

    def command(self, *command: int) -> None:
        self._transfer()
        super().command(*command)

    def data(self, data: Sequence[int]) -> None:
        self._transfer()
        self.data_bytes += len(data)
        super().data(data)

    def cleanup(self) -> None:
        self.closed += 1

    def _transfer(self) -> None:
        self.transfers += 1
        if self.breaks_at is not None and self.transfers >= self.breaks_at:
            raise self.error


@pytest.fixture(params=PANELS)
def controller(request: pytest.FixtureRequest) -> Controller:
    found: Controller = request.param
    return found


@pytest.fixture
def panel(controller: Controller) -> Ssd1306:
    return PANELS[controller]()


@pytest.fixture
def bus(panel: Ssd1306) -> WatchedBus:
    return WatchedBus(panel)


@pytest.fixture
def oled(bus: WatchedBus, controller: Controller) -> Iterator[Oled]:
    display = Oled(lambda: bus, controller=controller)
    yield display
    bus.breaks_at = None
    display.close()


def noise(seed: int = SEED) -> Image.Image:
    return Image.frombytes("1", DISPLAY_SIZE_PX, random.Random(seed).randbytes(1024))


def pictures() -> list[Image.Image]:
    return [render(Approved(SALE, "Visa", "7899"), "de"), render(PresentCard(SALE), "en"), noise()]


# --- Driver -----------------------------------------------------------------------------------------------------------


def test_the_panel_shows_what_was_drawn(oled: Oled, panel: Ssd1306) -> None:
    oled.open()
    assert panel.on
    for picture in [*pictures(), *reversed(pictures())]:
        oled.show(picture)
        assert panel.picture().tobytes() == picture.tobytes()


def test_one_wrong_pixel_is_seen(oled: Oled, panel: Ssd1306) -> None:
    """Negative control: each corner counts, and nothing else hides it."""
    oled.open()
    for corner in ((0, 0), (127, 0), (0, 63), (127, 63)):
        picture = noise()
        oled.show(picture)
        picture.putpixel(corner, 255 - int(picture.getpixel(corner) or 0))  # type: ignore[arg-type]
        assert panel.picture().tobytes() != picture.tobytes()
        oled.show(picture)
        assert panel.picture().tobytes() == picture.tobytes()


def test_only_changed_rows_are_sent(oled: Oled, bus: WatchedBus) -> None:
    picture = noise()
    oled.open()
    oled.show(picture)
    transfers, data_bytes = bus.transfers, bus.data_bytes
    oled.show(picture.copy())
    assert bus.transfers == transfers, "the same picture costs nothing"
    picture.putpixel((5, 20), 255 - int(picture.getpixel((5, 20)) or 0))  # type: ignore[arg-type]
    oled.show(picture)
    assert bus.data_bytes == data_bytes + 128, "one page of eight rows"


@pytest.mark.parametrize(("controller", "pages"), [("ssd1306", 6), ("sh1106", 2)], indirect=["controller"])
def test_what_lies_between_two_changes(oled: Oled, bus: WatchedBus, panel: Ssd1306, pages: int) -> None:
    """One window of the SSD1306 is cheaper than two; the SH1106 is addressed by the page anyway."""
    picture = noise()
    oled.open()
    oled.show(picture)
    data_bytes = bus.data_bytes
    for y in (9, 55):
        picture.putpixel((64, y), 255 - int(picture.getpixel((64, y)) or 0))  # type: ignore[arg-type]
    oled.show(picture)
    assert bus.data_bytes == data_bytes + pages * 128
    assert panel.picture().tobytes() == picture.tobytes()


@pytest.mark.parametrize(("wired", "configured"), [("ssd1306", "sh1106"), ("sh1106", "ssd1306")])
def test_the_wrong_controller_is_seen(wired: Controller, configured: Controller) -> None:
    """Negative control: the two are not so alike that either driver would do."""
    panel = PANELS[wired]()
    display = Oled(lambda: LocalBus(panel), controller=configured)
    try:
        display.open()
        display.show(noise())
    except ValueError:
        return  # a command that the controller does not have
    assert panel.picture().tobytes() != noise().tobytes()


class Lines:
    """The display's two lines beside the SPI, and which of them another program holds."""

    OUT, LOW, HIGH = 0, 0, 1

    def __init__(self) -> None:
        self.levels: dict[int, int] = {}
        self.resets = 0
        self.busy: int | None = None

    def setup(self, pin: int, direction: int) -> None:
        if pin == self.busy:
            raise PinFault(f"GPIO {pin} (display line) cannot be used")
        assert direction == self.OUT
        self.levels[pin] = self.LOW

    def output(self, pin: int, level: int) -> None:
        self.resets += pin == 25 and level == self.HIGH
        self.levels[pin] = level

    def close(self) -> None:
        self.levels.clear()


def test_on_spi(monkeypatch: pytest.MonkeyPatch, panel: Ssd1306, controller: Controller) -> None:
    lines = Lines()
    bus = SpiBus(panel, lambda: bool(lines.levels[24]))
    monkeypatch.setitem(sys.modules, "spidev", SimpleNamespace(SpiDev=lambda: bus))
    display = Oled.on_spi(lines, 0, 1, controller=controller)
    for number in range(2):
        display.open()
        assert (bus.opened, lines.resets) == ((0, 1), number + 1)
        assert bus.max_speed_hz == {"ssd1306": 8_000_000, "sh1106": 4_000_000}[controller]
        for picture in pictures():
            display.show(picture)
            assert panel.picture().tobytes() == picture.tobytes()
        display.close()
        assert bus.opened is None
        assert lines.levels == {}, "released"


def test_what_spi_can_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines()
    display = Oled.on_spi(lines)
    monkeypatch.setitem(sys.modules, "spidev", None)
    with pytest.raises(DisplayFault, match=r"SSD1306 on /dev/spidev0.0, lines GPIO 24 and 25.*sales go on") as caught:
        display.open()
    assert isinstance(caught.value.__cause__, ImportError)
    assert lines.levels == {}

    def missing(_port: int, _device: int) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setitem(sys.modules, "spidev", SimpleNamespace(SpiDev=lambda: SimpleNamespace(open=missing)))
    with pytest.raises(DisplayFault, match="SPI device not found"):
        display.open()
    assert lines.levels == {}
    lines.busy = 25
    with pytest.raises(DisplayFault, match="GPIO 25") as caught:
        display.open()
    assert isinstance(caught.value.__cause__, PinFault)
    assert lines.levels == {}


@pytest.mark.parametrize("error", [OSError(121, "Remote I/O error"), DeviceNotFoundError("no device"), TimeoutError()])
@pytest.mark.parametrize("transfer", range(1, 9))
def test_a_broken_bus_is_a_display_fault_and_heals(
    oled: Oled, bus: WatchedBus, panel: Ssd1306, transfer: int, error: Exception
) -> None:
    bus.breaks_at, bus.error = transfer, error
    with pytest.raises(DisplayFault, match="sales go on") as caught:
        oled.open()
        for picture in pictures():
            oled.show(picture)
    assert caught.value.__cause__ is error
    assert bus.closed == 1
    with pytest.raises(DisplayFault, match="not open"):
        oled.show(pictures()[0])
    bus.breaks_at = None
    oled.open()
    oled.show(pictures()[1])
    assert panel.picture().tobytes() == pictures()[1].tobytes()


def test_after_a_fault_nothing_is_taken_for_shown(controller: Controller) -> None:
    """The panel was unplugged and has forgotten its picture: the same one must be sent again."""
    panels = [PANELS[controller](), PANELS[controller]()]
    buses = [WatchedBus(panel) for panel in panels]
    waiting = iter(buses)
    display = Oled(lambda: next(waiting), controller=controller)
    display.open()
    display.show(noise())
    buses[0].breaks_at = 0
    with pytest.raises(DisplayFault):
        display.show(noise(SEED + 1))
    display.open()
    display.show(noise(SEED + 1))
    assert panels[1].picture().tobytes() == noise(SEED + 1).tobytes()


def test_failed_attempts_leave_nothing_behind(oled: Oled, bus: WatchedBus) -> None:
    """luma keeps every device until the process ends; a panel that is missing for days must not fill the memory."""

    def devices() -> int:
        gc.collect()
        return sum(isinstance(each, (ssd1306, sh1106)) for each in gc.get_objects())

    before = devices()
    bus.breaks_at = 0
    for _ in range(5):
        with pytest.raises(DisplayFault):
            oled.open()
    assert devices() == before
    assert bus.closed == 5


def test_a_bus_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DisplayFault, match="sales go on"):
        Oled(lambda: SocketBus(tmp_path / "nothing.sock")).open()
    with pytest.raises(DisplayFault, match="i2c-255") as caught:
        Oled.on_i2c(port=255).open()
    assert isinstance(caught.value.__cause__, DeviceNotFoundError)


def test_closing_blanks_and_is_always_safe(oled: Oled, bus: WatchedBus, panel: Ssd1306) -> None:
    oled.close()
    oled.open()
    oled.show(noise())
    oled.close()
    assert not panel.on
    assert bus.closed == 1
    oled.close()
    oled.open()
    bus.breaks_at = 0
    oled.close()
    assert bus.closed == 2


@pytest.mark.parametrize("picture", [Image.new("L", DISPLAY_SIZE_PX), Image.new("1", (64, 128))])
def test_wrong_pictures_are_refused(oled: Oled, picture: Image.Image) -> None:
    oled.open()
    with pytest.raises(ValueError, match="the panel takes"):
        oled.show(picture)


@pytest.mark.filterwarnings("ignore:.*getdata:DeprecationWarning")
@pytest.mark.skipif(not hasattr(Image.Image, "getdata"), reason="luma's own drawing needs a method that Pillow dropped")
def test_luma_by_itself_draws_the_same(panel: Ssd1306, controller: Controller) -> None:
    """Our way of sending pages against luma's own, through the same panel."""
    device = {"ssd1306": ssd1306, "sh1106": sh1106}[controller](serial_interface=LocalBus(panel))
    device.display(noise())
    assert panel.picture().tobytes() == noise().tobytes()


# --- Panel ------------------------------------------------------------------------------------------------------------

only_ssd1306 = pytest.mark.parametrize("controller", ["ssd1306"], indirect=True)
only_sh1106 = pytest.mark.parametrize("controller", ["sh1106"], indirect=True)
INIT = (0xAE, 0xA8, 0x3F, 0xD3, 0, 0x40, 0x8D, 0x14, 0x20, 0, 0xA1, 0xC8, 0xA4, 0xA6, 0x21, 0, 127, 0x22, 0, 7, 0xAF)


def lit(panel: Ssd1306) -> list[tuple[int, int]]:
    picture = panel.picture()
    return [(x, y) for y in range(64) for x in range(128) if picture.getpixel((x, y))]


@only_ssd1306
@pytest.mark.parametrize(
    ("commands", "data", "expected"),
    [
        ((), b"\x01", [(0, 0)]),
        ((), b"\x80", [(0, 7)]),
        ((0x21, 126, 127, 0x22, 3, 4), b"\x01\x00\x01", [(126, 24), (126, 32)]),
        ((0x21, 5, 5, 0x22, 7, 7), b"\x01\x02", [(5, 57)]),
        ((0x20, 1, 0x22, 6, 7), b"\x01\x01\x01", [(0, 48), (1, 48), (0, 56)]),
        ((0x20, 2, 0xB2, 0x05, 0x11), b"\x01\x01", [(21, 16), (22, 16)]),
        ((0xA0,), b"\x01", [(127, 0)]),
        ((0xC0,), b"\x01", [(0, 63)]),
        ((0x48,), b"\x00" * 128 + b"\x01", [(0, 0)]),
        ((0xD3, 60), b"\x01", [(0, 4)]),
        ((0xA8, 0x1F, 0x22, 4, 7), b"\x01", []),
        ((0xAE,), b"\xff", []),
        ((0x8D, 0x10), b"\xff", []),
    ],
)
def test_the_panel_follows_the_data_sheet(
    panel: Ssd1306, commands: tuple[int, ...], data: bytes, expected: list[tuple[int, int]]
) -> None:
    for byte in (*INIT, *commands):  # one at a time: arguments may come in a later transfer
        panel.command(byte)
    panel.data(data)
    assert sorted(lit(panel)) == sorted(expected)


SH1106_INIT = (0xAE, 0xA8, 0x3F, 0xD3, 0, 0x40, 0xAD, 0x8B, 0xA1, 0xC8, 0xA4, 0xA6, 0xB0, 0x02, 0x10, 0xAF)


@only_sh1106
@pytest.mark.parametrize(
    ("commands", "data", "expected"),
    [
        ((), b"\x01", [(0, 0)]),
        ((0x00,), b"\x01\x01\x01", [(0, 0)]),
        ((0x01, 0x18), b"\x01\x01\x01\x01", [(127, 0)]),
        ((0xB3, 0x05, 0x11), b"\x01\x80", [(19, 24), (20, 31)]),
        ((0x0F, 0x1F), b"\xff", []),
        ((0xA0,), b"\x01", [(127, 0)]),
        ((0xC0,), b"\x01", [(0, 63)]),
        ((), b"\x00" * 131 + b"\xff\xff", []),
        ((0xAD, 0x8A), b"\xff", []),
        ((0x8D, 0x20, 0x32), b"\x01", [(0, 0)]),
    ],
)
def test_the_sh1106_follows_its_own(
    panel: Ssd1306, commands: tuple[int, ...], data: bytes, expected: list[tuple[int, int]]
) -> None:
    for byte in (*SH1106_INIT, *commands):
        panel.command(byte)
    panel.data(data)
    assert sorted(lit(panel)) == sorted(expected)


@only_sh1106
@pytest.mark.parametrize("command", [0x21, 0x22, 0x2E, 0xD1])
def test_the_sh1106_has_no_windows(panel: Ssd1306, command: int) -> None:
    with pytest.raises(ValueError, match=f"the SH1106 has no command {command:#x}"):
        panel.command(command)


@only_ssd1306
def test_inversion_contrast_and_lamp_test(panel: Ssd1306) -> None:
    panel.command(*INIT, 0xA7, 0x81, 0x10)
    assert len(lit(panel)) == 128 * 64
    assert (panel.inverted, panel.contrast) == (True, 0x10)
    panel.command(0xA6)
    assert lit(panel) == []
    panel.command(0xA5)
    assert len(lit(panel)) == 128 * 64


def test_an_unknown_command_is_refused(panel: Ssd1306) -> None:
    with pytest.raises(ValueError, match="0xd1"):
        panel.command(0xD1)
    panel.command(0xAF)
    assert panel.on


# --- Bus between processes --------------------------------------------------------------------------------------------


def test_frames_in_any_pieces() -> None:
    stream = b"".join(
        kind + len(payload).to_bytes(2, "big") + payload
        for kind, payload in ((b"C", bytes(INIT)), (b"D", noise().tobytes()), (b"C", b""), (b"D", b"\x55"))
    )
    whole = Ssd1306()
    BusDecoder(whole).feed(stream)
    generator = random.Random(SEED)
    for _ in range(20):
        pieced, position = Ssd1306(), 0
        decoder = BusDecoder(pieced)
        while position < len(stream):
            size = generator.choice((1, 2, 3, 7, 500))
            decoder.feed(stream[position : position + size])
            position += size
        assert pieced.picture().tobytes() == whole.picture().tobytes()


@only_ssd1306
def test_what_is_no_frame_is_refused(panel: Ssd1306) -> None:
    with pytest.raises(ValueError, match="C or D"):
        BusDecoder(panel).feed(b"X\x00\x00")


@only_ssd1306
def test_the_picture_outlives_the_terminal(tmp_path: Path, panel: Ssd1306) -> None:
    path = tmp_path / "oled.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve_twice() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    serve_bus(connection, panel)

        server = threading.Thread(target=serve_twice)
        server.start()
        buses: list[SocketBus] = []

        def connect() -> SocketBus:
            buses.append(SocketBus(path))
            return buses[-1]

        first = Oled(connect)
        first.open()
        first.show(noise())
        buses[0]._send(b"D", b"")
        buses[0]._socket.sendall(b"D\x00\xff\x00")  # killed in the middle of a frame
        buses[0].cleanup()
        wait_until(lambda: panel.picture().tobytes() == noise().tobytes())
        with pytest.raises(DisplayFault):
            first.show(noise(SEED + 1))
        first.open()
        first.show(noise(SEED + 2))
        wait_until(lambda: panel.picture().tobytes() == noise(SEED + 2).tobytes())
        first.close()
        server.join(timeout=5)
        assert not server.is_alive()
        assert not panel.on


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not true():
        assert time.monotonic() < deadline, "the picture never came"
        time.sleep(0.002)


# --- Console ----------------------------------------------------------------------------------------------------------


def test_braille_shows_every_pixel_in_80_columns() -> None:
    lines = draw(noise(), columns=80, encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 80
    picture = Image.new("1", DISPLAY_SIZE_PX)
    places = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))  # bit 0 to 7 of a braille letter
    for row, line in enumerate(lines[1:-1]):
        for column, letter in enumerate(line[1:-1]):
            for bit, (dx, dy) in enumerate(places):
                picture.putpixel((column * 2 + dx, row * 4 + dy), 255 * (ord(letter) - 0x2800 >> bit & 1))
    assert picture.tobytes() == noise().tobytes()


def test_half_blocks_show_every_pixel_where_there_is_room() -> None:
    lines = draw(noise(), columns=140, encoding="utf-8").splitlines()
    picture = Image.new("1", DISPLAY_SIZE_PX)
    for row, line in enumerate(lines[1:-1]):
        for column, letter in enumerate(line[1:-1]):
            picture.putpixel((column, row * 2), 255 * (letter in "▀█"))
            picture.putpixel((column, row * 2 + 1), 255 * (letter in "▄█"))
    assert picture.tobytes() == noise().tobytes()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "no-such-encoding"])
def test_any_console_can_carry_it(encoding: str) -> None:
    text = draw(noise(), columns=80, encoding=encoding)
    assert text.isascii()
    assert {len(line) for line in text.splitlines()} == {66}
    assert text != draw(noise(SEED + 1), columns=80, encoding=encoding)

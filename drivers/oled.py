"""A panel of 128 by 64 pixels with an SSD1306 or SH1106 controller, on I2C or SPI, through luma.oled.

luma knows the controllers and the buses; here its errors become `DisplayFault`, only what changed is sent, and a panel
that was unplugged is taken up again by `open`. A display is for people: a fault here never decides anything about
money.

A full picture is 1,025 bytes on the wire: 23 ms on I2C at 400 kHz, 92 ms at the Pi's default of 100 kHz, so set
`dtparam=i2c_arm_baudrate=400000`. On SPI it is 1 ms at 8 MHz. The controllers keep their picture in pages of eight
rows; pages that did not change are not sent. The SSD1306 takes a window of pages in one piece. The SH1106, whose memory
is 132 columns wide with the glass over the middle, takes each page by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, Protocol, TypeAlias

from luma.core.error import Error as LumaError
from luma.core.interface.serial import i2c, spi
from luma.oled.device import sh1106, ssd1306
from PIL import Image

from drivers.interfaces import DISPLAY_SIZE_PX, DisplayFault, PinFault

_WIDTH_PX, _HEIGHT_PX = DISPLAY_SIZE_PX
_PAGES: Final = _HEIGHT_PX // 8
_DISPLAY_OFF: Final = 0xAE
_SH1106_LEFT: Final = 2  # the column of its memory that lies under the left edge of the glass
_BUS_ERRORS: Final = (LumaError, OSError, PinFault)

Controller: TypeAlias = Literal["ssd1306", "sh1106"]
_RESET_S: Final = 0.001  # a reset pulse is 10 µs at least, by either data sheet
_SPI_HZ: Final[dict[Controller, int]] = {"ssd1306": 8_000_000, "sh1106": 4_000_000}  # within the data sheets' limits


class SerialInterface(Protocol):
    """What luma needs of a bus. Its own `i2c` and `spi` are such, and so is the simulator's."""

    def command(self, *command: int) -> None: ...

    def data(self, data: Sequence[int]) -> None: ...

    def cleanup(self) -> None: ...


class OutputLines(Protocol):
    """Plain outputs, as luma's SPI asks for them. `drivers.gpio.OutputLines` is such."""

    OUT: int
    LOW: int
    HIGH: int

    def setup(self, pin: int, direction: int, /) -> None: ...

    def output(self, pin: int, level: int, /) -> None: ...

    def close(self) -> None: ...


class Oled:
    """The panel behind the bus that `connect` opens. Not thread-safe: one thread owns it."""

    def __init__(
        self, connect: Callable[[], SerialInterface], *, controller: Controller = "ssd1306", name: str | None = None
    ) -> None:
        self._connect = connect
        self._controller = controller
        self._name = name or controller.upper()
        self._panel: _Panel | None = None

    @classmethod
    def on_i2c(cls, port: int = 1, address: int = 0x3C, *, controller: Controller = "ssd1306") -> Oled:
        """The usual wiring on a Pi: /dev/i2c-1, address 0x3C (some modules are set to 0x3D)."""
        name = f"{controller.upper()} on /dev/i2c-{port}, address {address:#x}"
        return cls(lambda: i2c(port=port, address=address), controller=controller, name=name)

    @classmethod
    def on_spi(
        cls,
        lines: OutputLines,
        port: int = 0,
        device: int = 0,
        *,
        data_command: int = 24,
        reset: int = 25,
        controller: Controller = "ssd1306",
    ) -> Oled:
        """/dev/spidev0.0 and two more lines, by the numbers of their pins: data or command, and reset."""
        name = f"{controller.upper()} on /dev/spidev{port}.{device}, lines GPIO {data_command} and {reset}"
        return cls(
            lambda: _Spi(
                lines,
                port=port,
                device=device,
                gpio_DC=data_command,
                gpio_RST=reset,
                bus_speed_hz=_SPI_HZ[controller],
                reset_hold_time=_RESET_S,
                reset_release_time=_RESET_S,
            ),
            controller=controller,
            name=name,
        )

    def open(self) -> None:
        """Initialise the panel; called again after a `DisplayFault`. Raises `DisplayFault`."""
        self._release()
        bus = None
        try:
            bus = self._connect()
            # Ask before luma builds its device: an exit hook keeps each of those in memory until the process ends,
            # which for a panel unplugged over the weekend would be gigabytes of attempts.
            bus.command(_DISPLAY_OFF)
            self._panel = _PANELS[self._controller](serial_interface=bus)
        except (*_BUS_ERRORS, ImportError) as error:  # luma imports what its buses need when they are opened
            if bus is not None:
                _close(bus.cleanup)
            raise self._fault(error) from error

    def show(self, frame: Image.Image) -> None:
        """Show a picture of mode "1" and `DISPLAY_SIZE_PX`. Raises `DisplayFault`."""
        if frame.mode != "1" or frame.size != DISPLAY_SIZE_PX:
            raise ValueError(
                f'the panel takes pictures of mode "1" and {DISPLAY_SIZE_PX}, not {frame.mode} {frame.size}'
            )
        if self._panel is None:
            raise DisplayFault(f"{self._name} is not open")
        try:
            self._panel.display(frame)
        except _BUS_ERRORS as error:
            self._release()
            raise self._fault(error) from error

    def close(self) -> None:
        """Blank the panel and release the bus. Safe to call at any time."""
        if self._panel is not None:
            _close(self._panel.hide)
        self._release()

    def _release(self) -> None:
        """Let go of the bus, whatever state it is in, and leave the panel as it is."""
        panel, self._panel = self._panel, None
        if panel is not None:
            _close(panel.release)

    def _fault(self, error: Exception) -> DisplayFault:
        return DisplayFault(
            f"{self._name} does not answer ({error}): sales go on and are recorded, but nobody sees them. "
            "Check the panel's plug; it is taken up again by itself"
        )


class _Spi(spi):  # type: ignore[misc]  # luma has no types
    """luma's SPI over lines that are ours, and so are released here."""

    def __init__(self, lines: OutputLines, **settings: Any) -> None:
        self._lines = lines
        try:
            super().__init__(gpio=lines, **settings)
        except Exception:
            lines.close()
            raise

    def cleanup(self) -> None:
        super().cleanup()
        self._lines.close()


class _Panel(Protocol):
    """luma's device, as it is used here."""

    def display(self, image: Image.Image) -> None: ...

    def hide(self) -> None: ...

    def release(self) -> None: ...


class _ChangedPages(ABC):
    """What both controllers have in common over luma's own: pages that did not change are not sent."""

    _serial_interface: SerialInterface

    def __init__(self, serial_interface: SerialInterface) -> None:
        self._sent: list[bytes] = [b""] * _PAGES
        super().__init__(serial_interface=serial_interface)  # type: ignore[call-arg]  # luma's device comes next

    def display(self, image: Image.Image) -> None:
        # luma's own way reads single pixels by a method that Pillow 14 drops; this one also takes a sixth of the time.
        pages = [_page(image, number) for number in range(_PAGES)]
        changed = [number for number in range(_PAGES) if pages[number] != self._sent[number]]
        if changed:
            self._send(pages, changed)
        self._sent = pages  # only now: what broke on the way is sent again

    def release(self) -> None:
        """Close the bus; unlike `cleanup`, without a word to the panel."""
        self._serial_interface.cleanup()

    @abstractmethod
    def _send(self, pages: list[bytes], changed: list[int]) -> None:
        """Bring at least the pages numbered in `changed` to the panel."""


class _Ssd1306(_ChangedPages, ssd1306):  # type: ignore[misc]  # luma has no types
    """A window from the first page that changed to the last."""

    def _send(self, pages: list[bytes], changed: list[int]) -> None:
        first, last = changed[0], changed[-1]
        const: Any = self._const
        self.command(const.COLUMNADDR, 0, _WIDTH_PX - 1, const.PAGEADDR, first, last)
        self.data(list(b"".join(pages[first : last + 1])))


class _Sh1106(_ChangedPages, sh1106):  # type: ignore[misc]  # luma has no types
    """Page by page: the only way this controller is addressed."""

    def _send(self, pages: list[bytes], changed: list[int]) -> None:
        for number in changed:
            self.command(0xB0 | number, _SH1106_LEFT & 0x0F, 0x10 | _SH1106_LEFT >> 4)
            self.data(list(pages[number]))


_PANELS: Final[dict[Controller, Callable[..., _Panel]]] = {"ssd1306": _Ssd1306, "sh1106": _Sh1106}


def _page(image: Image.Image, number: int) -> bytes:
    """Eight rows as the controller keeps them: a byte for each column, its lowest bit the uppermost row."""
    rows = image.crop((0, number * 8, _WIDTH_PX, number * 8 + 8))
    return rows.transpose(Image.Transpose.TRANSPOSE).tobytes("raw", "1;R")


def _close(close: Callable[[], None]) -> None:
    """A bus that is gone cannot be closed properly, and need not be."""
    try:
        close()
    except (*_BUS_ERRORS, TypeError):
        return  # TypeError: smbus2, asked a second time for its closed file

"""An SSD1306 panel of 128 by 64 pixels, through luma.oled.

luma knows the controller and the bus; here its errors become `DisplayFault`, only what changed is sent, and a panel
that was unplugged is taken up again by `open`. A display is for people: a fault here never decides anything about
money.

A full picture is 1,025 bytes on the wire: 23 ms on I2C at 400 kHz, 92 ms at the Pi's default of 100 kHz, so set
`dtparam=i2c_arm_baudrate=400000`. The controller keeps its picture in pages of eight rows; pages that did not change
are not sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from luma.core.error import Error as LumaError
from luma.core.interface.serial import i2c
from luma.oled.device import ssd1306
from PIL import Image

from drivers.interfaces import DISPLAY_SIZE_PX, DisplayFault

_WIDTH_PX, _HEIGHT_PX = DISPLAY_SIZE_PX
_PAGES: Final = _HEIGHT_PX // 8
_DISPLAY_OFF: Final = 0xAE


class SerialInterface(Protocol):
    """What luma needs of a bus. Its own `i2c` and `spi` are such, and so is the simulator's."""

    def command(self, *command: int) -> None: ...

    def data(self, data: Sequence[int]) -> None: ...

    def cleanup(self) -> None: ...


class Oled:
    """The panel behind the bus that `connect` opens. Not thread-safe: one thread owns it."""

    def __init__(self, connect: Callable[[], SerialInterface], *, name: str = "SSD1306") -> None:
        self._connect = connect
        self._name = name
        self._panel: _Panel | None = None

    @classmethod
    def on_i2c(cls, port: int = 1, address: int = 0x3C) -> Oled:
        """The usual wiring on a Pi: /dev/i2c-1, address 0x3C (some modules are set to 0x3D)."""
        name = f"SSD1306 on /dev/i2c-{port}, address {address:#x}"
        return cls(lambda: i2c(port=port, address=address), name=name)

    def open(self) -> None:
        """Initialise the panel; called again after a `DisplayFault`. Raises `DisplayFault`."""
        self._release()
        bus = None
        try:
            bus = self._connect()
            # Ask before luma builds its device: an exit hook keeps each of those in memory until the process ends,
            # which for a panel unplugged over the weekend would be gigabytes of attempts.
            bus.command(_DISPLAY_OFF)
            self._panel = _Panel(serial_interface=bus)
        except (LumaError, OSError) as error:
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
        except (LumaError, OSError) as error:
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


class _Panel(ssd1306):  # type: ignore[misc]  # luma has no types
    """luma's device, which sends the pages of eight rows that changed instead of all."""

    def __init__(self, serial_interface: SerialInterface) -> None:
        self._sent: list[bytes] = [b""] * _PAGES
        super().__init__(serial_interface=serial_interface)

    def display(self, image: Image.Image) -> None:
        # luma's own way reads single pixels by a method that Pillow 14 drops; this one also takes a sixth of the time.
        pages = [_page(image, number) for number in range(_PAGES)]
        changed = [number for number in range(_PAGES) if pages[number] != self._sent[number]]
        if not changed:
            return
        first, last = changed[0], changed[-1]
        const: Any = self._const
        self.command(const.COLUMNADDR, 0, _WIDTH_PX - 1, const.PAGEADDR, first, last)
        self.data(list(b"".join(pages[first : last + 1])))
        self._sent = pages  # only now: what broke on the way is sent again

    def release(self) -> None:
        """Close the bus; unlike `cleanup`, without a word to the panel."""
        self._serial_interface.cleanup()


def _page(image: Image.Image, number: int) -> bytes:
    """Eight rows as the controller keeps them: a byte for each column, its lowest bit the uppermost row."""
    rows = image.crop((0, number * 8, _WIDTH_PX, number * 8 + 8))
    return rows.transpose(Image.Transpose.TRANSPOSE).tobytes("raw", "1;R")


def _close(close: Callable[[], None]) -> None:
    """A bus that is gone cannot be closed properly, and need not be."""
    try:
        close()
    except (LumaError, OSError, TypeError):
        return  # TypeError: smbus2, asked a second time for its closed file

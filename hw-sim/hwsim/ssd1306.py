"""The panel: an SSD1306 or SH1106 that understands the bytes on its bus and shows what a person would see.

It sits below luma.oled, where the I2C bus would be, and decodes commands and data into the controller's display
memory (GDDRAM) after the data sheet (Solomon Systech SSD1306, chapters 8 to 10): addressing windows, scan directions,
start line, contrast, inversion, sleep, charge pump. What luma or the driver gets wrong looks wrong here. Scrolling,
which nothing here uses, is refused as any unknown byte is. The SH1106 (Sino Wealth) differs in few things, and those
are all that `Sh1106` says. `SpiBus` is the SPI of either, where a line tells commands from data.

`LocalBus` joins a panel in the same process, `SocketBus` one in another, so that a picture outlives the terminal that
drew it. On the socket each transfer is a frame: "C" or "D", length in two bytes (big-endian), payload.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Final

from PIL import Image, ImageChops

WIDTH: Final = 128
HEIGHT: Final = 64
PAGES: Final = HEIGHT // 8

FRAME_HEADER_BYTES: Final = 3
SEND_TIMEOUT_S: Final = 1.0  # a panel that stopped reading must look broken, not hang the terminal
_RECEIVE_BYTES: Final = 4096

# How many bytes follow each command (data sheet, table 9-1); ranges carry their argument in themselves.
_ARGUMENTS: Final[dict[int, int]] = {
    **dict.fromkeys(range(0x20), 0),  # lower and higher column start, page addressing mode
    0x20: 1, 0x21: 2, 0x22: 2, 0x2E: 0,
    **dict.fromkeys(range(0x40, 0x80), 0),  # start line
    0x81: 1, 0x8D: 1, 0xA0: 0, 0xA1: 0, 0xA4: 0, 0xA5: 0, 0xA6: 0, 0xA7: 0, 0xA8: 1, 0xAE: 0, 0xAF: 0,
    **dict.fromkeys(range(0xB0, 0xB8), 0),  # page start, page addressing mode
    0xC0: 0, 0xC8: 0, 0xD3: 1, 0xD5: 1, 0xD9: 1, 0xDA: 1, 0xDB: 1, 0xE3: 0,
}  # fmt: skip
_HORIZONTAL, _VERTICAL, _BY_PAGE = range(3)
_SH1106_ARGUMENTS: Final[dict[int, int]] = {
    **dict.fromkeys(range(0x20), 0),  # lower and higher column start
    # Two commands of the SSD1306 that luma sends to an SH1106 as well. To this one they are reserved, single bytes that
    # do nothing; the argument after each is then a command of its own, here a column.
    0x20: 0, 0x8D: 0,
    **dict.fromkeys(range(0x30, 0x34), 0),  # pump voltage
    **dict.fromkeys(range(0x40, 0x80), 0),  # start line
    0x81: 1, 0xA0: 0, 0xA1: 0, 0xA4: 0, 0xA5: 0, 0xA6: 0, 0xA7: 0, 0xA8: 1, 0xAD: 1, 0xAE: 0, 0xAF: 0,
    **dict.fromkeys(range(0xB0, 0xB8), 0),  # page
    0xC0: 0, 0xC8: 0, 0xD3: 1, 0xD5: 1, 0xD9: 1, 0xDA: 1, 0xDB: 1, 0xE3: 0,
}  # fmt: skip


class Ssd1306:
    """The controller with its glass, mounted as modules are: upright with segments remapped and COM scan downwards."""

    NAME: ClassVar = "SSD1306"
    COLUMNS: ClassVar = WIDTH  # of the memory; the glass lies over the middle
    ARGUMENTS: ClassVar = _ARGUMENTS

    def __init__(self) -> None:
        self.on = False
        self.contrast = 0x7F
        self.inverted = False
        self._all_lit = False
        self._pumped = False  # without charge pump the glass stays dark, whatever the memory holds
        self._mirrored = self._upside_down = True  # reset values of A0/A1 and C0/C8, as seen on a module
        self._start_line = self._offset = 0
        self._rows = HEIGHT
        self._mode = _BY_PAGE
        self._columns, self._pages = (0, WIDTH - 1), (0, PAGES - 1)
        self._column = self._page = 0
        self._memory = bytes(
            self.COLUMNS * PAGES
        )  # never changed in place: `picture` may be asked for by another thread
        self._pending: list[int] = []

    def command(self, *sent: int) -> None:
        """Bytes of the command stream; arguments may come in a later call. Raises ValueError for an unknown command."""
        for byte in sent:
            self._pending.append(byte)
            code, *arguments = self._pending
            if code not in self.ARGUMENTS:
                self._pending.clear()
                raise ValueError(f"the {self.NAME} has no command {code:#04x}")
            if len(arguments) == self.ARGUMENTS[code]:
                self._pending.clear()
                self._execute(code, arguments)

    def data(self, sent: bytes) -> None:
        """Bytes for the display memory, each eight pixels of one column, lowest bit uppermost."""
        memory = bytearray(self._memory)
        for byte in sent:
            memory[self._page * self.COLUMNS + self._column] = byte
            self._advance()
        self._memory = bytes(memory)

    def picture(self) -> Image.Image:
        """What a person sees: mode "1", 128 by 64."""
        if not (self.on and self._pumped):
            return Image.new("1", (WIDTH, HEIGHT))
        if self._all_lit:
            return Image.new("1", (WIDTH, HEIGHT), 255)
        picture, memory = Image.new("1", (WIDTH, HEIGHT)), self._memory
        left = (self.COLUMNS - WIDTH) // 2
        for page in range(PAGES):
            first = page * self.COLUMNS + left
            # Read as 128 rows of eight pixels, then flipped over the diagonal: a byte becomes a column.
            rows = Image.frombytes("1", (8, WIDTH), memory[first : first + WIDTH], "raw", "1;R")
            picture.paste(rows.transpose(Image.Transpose.TRANSPOSE), (0, page * 8))
        picture = ImageChops.offset(picture, 0, -(self._start_line + self._offset))
        if self.inverted:
            picture = ImageChops.invert(picture)
        picture.paste(0, (0, self._rows, WIDTH, HEIGHT))  # rows beyond the multiplex ratio are not driven
        if self._mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if self._upside_down else picture

    def _execute(self, code: int, arguments: list[int]) -> None:  # noqa: PLR0912 - one case for each command
        match code, arguments:
            case 0x20, [mode]:
                self._mode = mode & 3
            case 0x21, [first, last]:
                self._columns, self._column = (first & 0x7F, last & 0x7F), first & 0x7F
            case 0x22, [first, last]:
                self._pages, self._page = (first & 7, last & 7), first & 7
            case 0x81, [level]:
                self.contrast = level
            case 0x8D, [pump]:
                self._pumped = bool(pump & 4)
            case 0xA8, [ratio]:
                self._rows = (ratio & 0x3F) + 1
            case 0xD3, [offset]:
                self._offset = offset & 0x3F
            case ((0xA0 | 0xA1), _):
                self._mirrored = code == 0xA0
            case ((0xA4 | 0xA5), _):
                self._all_lit = code == 0xA5
            case ((0xA6 | 0xA7), _):
                self.inverted = code == 0xA7
            case ((0xAE | 0xAF), _):
                self.on = code == 0xAF
            case ((0xC0 | 0xC8), _):
                self._upside_down = code == 0xC0
            case _ if code < 0x10:
                self._column = self._column & 0x70 | code
            case _ if code < 0x20:
                self._column = (code & 7) << 4 | self._column & 0x0F
            case _ if 0x40 <= code < 0x80:
                self._start_line = code & 0x3F
            case _ if 0xB0 <= code < 0xB8:
                self._page = code & 7
            case _:
                pass  # clock, pre-charge, COM pins, VCOMH, scroll off, NOP: nothing that this glass could show

    def _advance(self) -> None:
        """Where the next byte goes (data sheet, 10.1.3)."""
        match self._mode:
            case 0:
                self._column, wrapped = _next(self._column, self._columns)
                if wrapped:
                    self._page, _ = _next(self._page, self._pages)
            case 1:
                self._page, wrapped = _next(self._page, self._pages)
                if wrapped:
                    self._column, _ = _next(self._column, self._columns)
            case _:
                self._column = (self._column + 1) % WIDTH


class Sh1106(Ssd1306):
    """The controller of many 1.3 inch modules: 132 columns of memory, addressed page by page only."""

    NAME = "SH1106"
    COLUMNS = 132
    ARGUMENTS = _SH1106_ARGUMENTS

    def __init__(self) -> None:
        super().__init__()
        self._pumped = True  # its converter is on after reset

    def _execute(self, code: int, arguments: list[int]) -> None:
        match code, arguments:
            case 0x20 | 0x8D, _:
                pass
            case 0xAD, [converter]:
                self._pumped = bool(converter & 1)
            case _ if code < 0x10:
                self._column = self._column & 0xF0 | code
            case _ if code < 0x20:
                self._column = min((code & 0x0F) << 4 | self._column & 0x0F, self.COLUMNS - 1)
            case _:
                super()._execute(code, arguments)

    def _advance(self) -> None:
        self._column = min(self._column + 1, self.COLUMNS - 1)  # stays at the last column, which no glass shows


def _next(position: int, window: tuple[int, int]) -> tuple[int, bool]:
    first, last = window
    return (first, True) if position == last else (position + 1, False)


class LocalBus:
    """The wires to a panel in this process; what luma calls a serial interface."""

    def __init__(self, panel: Ssd1306) -> None:
        self._panel = panel

    def command(self, *command: int) -> None:
        self._panel.command(*command)

    def data(self, data: Sequence[int]) -> None:
        self._panel.data(bytes(data))

    def cleanup(self) -> None:
        """Nothing to let go of."""


class SpiBus:
    """The SPI to a panel in this process, in the manner of a `spidev.SpiDev`.

    `data` is the line that tells data (high) from commands.
    """

    def __init__(self, panel: Ssd1306, data: Callable[[], bool]) -> None:
        self.max_speed_hz = 0
        self.opened: tuple[int, int] | None = None
        self._panel = panel
        self._data = data

    def open(self, port: int, device: int) -> None:
        self.opened = port, device

    def writebytes(self, sent: Sequence[int]) -> None:
        if self.opened is None:
            raise OSError("the bus is not open")
        if self._data():
            self._panel.data(bytes(sent))
        else:
            self._panel.command(*sent)

    def close(self) -> None:
        self.opened = None


class SocketBus:
    """The wires to a panel in another process. Raises OSError when nothing is there, as a bus does."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(SEND_TIMEOUT_S)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise

    def command(self, *command: int) -> None:
        self._send(b"C", bytes(command))

    def data(self, data: Sequence[int]) -> None:
        self._send(b"D", bytes(data))

    def cleanup(self) -> None:
        self._socket.close()

    def _send(self, kind: bytes, payload: bytes) -> None:
        self._socket.sendall(kind + len(payload).to_bytes(2, "big") + payload)


class BusDecoder:
    """The panel's end of a `SocketBus`: takes the stream in any pieces, passes whole frames on."""

    def __init__(self, panel: Ssd1306) -> None:
        self._panel = panel
        self._buffer = bytearray()  # never more than one frame (64 KiB) and what was received with its end

    def feed(self, received: bytes) -> None:
        """ValueError for what is no frame."""
        self._buffer += received
        while len(self._buffer) >= FRAME_HEADER_BYTES:
            end = FRAME_HEADER_BYTES + int.from_bytes(self._buffer[1:3], "big")
            take = self._taker(bytes(self._buffer[:1]))
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[FRAME_HEADER_BYTES:end])
            del self._buffer[:end]
            take(payload)

    def _taker(self, kind: bytes) -> Callable[[bytes], None]:
        match kind:
            case b"C":
                return lambda payload: self._panel.command(*payload)
            case b"D":
                return self._panel.data
            case other:
                raise ValueError(f"a frame on the display's bus is C or D, not {other!r}")


def serve_bus(connection: socket.socket, panel: Ssd1306) -> None:
    """Pass on what comes until the other end closes; half a frame at the end is dropped, as on a pulled wire."""
    decoder = BusDecoder(panel)
    while received := connection.recv(_RECEIVE_BYTES):
        decoder.feed(received)

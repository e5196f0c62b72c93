"""What the terminal asks of its hardware.

The seam between terminal and drivers is bytes: a reader hands over a channel, the channel carries command and response
APDUs as they are, status words included, and a display shows a picture. What the bytes mean is the terminal's affair;
which chip, bus or library carries them is the driver's. Concrete drivers translate their library's errors at this edge
into the few below and keep the cause (`raise CardLost(...) from error`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from PIL import Image

DISPLAY_SIZE_PX = (128, 64)  # width, height of the SSD1306 and SH1106 panels that fit a HAT


class DriverError(Exception):
    """Anything that a driver reports; the message says what happened and what to do."""


class CardLost(DriverError):
    """The card is gone or no longer understood: it left the field, fell silent, or broke the transmission protocol.

    EMV treats all three alike: no further retry on this activation, field reset, poll again.
    """


class CardCollision(DriverError):
    """More than one card is in the field: present one card only."""


class ReaderFault(DriverError):
    """The reader does not answer, or answers nonsense. `CardReader.open` may be tried again."""


class ReaderMissing(ReaderFault):
    """There is no reader where the configuration says, or it was unplugged."""


class DisplayFault(DriverError):
    """The display does not take the picture."""


class PinFault(DriverError):
    """A pin of the header cannot be had, or its library failed; the message names it. Keys, lamps and sound are for
    people: without them a sale still counts, so this is reported and `open` tried again, never a reason to stop one.
    """


class Interface(Enum):
    """How the card is spoken to."""

    CONTACT = "contact"
    CONTACTLESS = "contactless"


class CardChannel(Protocol):
    """An activated card. It lives until the card is lost or the channel is closed."""

    @property
    def interface(self) -> Interface: ...

    @property
    def activation(self) -> bytes:
        """ATS (contactless A), ATQB (contactless B) or ATR (contact), as received."""

    def transmit(self, command: bytes) -> bytes:
        """Send one command APDU, return the whole response APDU, SW1 SW2 last.

        Raises `CardLost` or `ReaderFault`. Status words are never interpreted here: 61xx and 6Cxx go up.
        """

    def close(self) -> None:
        """Power the card off (contactless: reset the field). Never raises for a card that is gone already."""


class CardReader(Protocol):
    """One reader. Not thread-safe: one thread owns it."""

    @property
    def name(self) -> str:
        """For people: what and where, as "PN532 on /dev/ttyAMA0"."""

    @property
    def interface(self) -> Interface: ...

    def open(self) -> None:
        """Find and initialise the reader; called again after a `ReaderFault`. Raises `ReaderMissing`, `ReaderFault`."""

    def wait_for_card(self, timeout_ms: int) -> CardChannel | None:
        """Poll until one card is activated, at most `timeout_ms`; None when no card came.

        Raises `CardCollision` (more than one card), `CardLost` (it came and went), `ReaderFault`.
        """

    def wait_for_removal(self, timeout_ms: int) -> bool:
        """True as soon as no card is in the field; False when one still is after `timeout_ms`. Raises `ReaderFault`."""

    def close(self) -> None:
        """Field off, device released. Safe to call at any time."""


class Display(Protocol):
    """A monochrome panel of `DISPLAY_SIZE_PX`."""

    def open(self) -> None:
        """Initialise the panel; called again after a `DisplayFault`. Raises `DisplayFault`."""

    def show(self, frame: Image.Image) -> None:
        """Show a picture of mode "1" and `DISPLAY_SIZE_PX`. Raises `DisplayFault`."""

    def close(self) -> None:
        """Blank the panel and release the bus. Safe to call at any time."""


class Key(Enum):
    """The keys of a 4 by 4 keypad."""

    ZERO = "0"
    ONE = "1"
    TWO = "2"
    THREE = "3"
    FOUR = "4"
    FIVE = "5"
    SIX = "6"
    SEVEN = "7"
    EIGHT = "8"
    NINE = "9"
    CANCEL = "cancel"
    CLEAR = "clear"
    ENTER = "enter"
    MENU = "menu"
    UP = "up"
    DOWN = "down"


# Digits as on a telephone; in the right column cancel, clear and enter in the order (red, yellow, green) that payment
# terminals have them in. On a keypad with the common print, A is cancel, B clear, C menu, D enter, * up and # down.
# There is no decimal key: amounts are typed in minor units, 1250 for 12.50.
KEYPAD_LAYOUT: Final = (
    (Key.ONE, Key.TWO, Key.THREE, Key.CANCEL),
    (Key.FOUR, Key.FIVE, Key.SIX, Key.CLEAR),
    (Key.SEVEN, Key.EIGHT, Key.NINE, Key.MENU),
    (Key.UP, Key.ZERO, Key.DOWN, Key.ENTER),
)


@dataclass(frozen=True, slots=True)
class KeyPress:
    """A key went down (`long` false), or has now been held for a second (`long` true: the same key's second report)."""

    key: Key
    long: bool = False


class Keypad(Protocol):
    """Keys, in the order in which they were pressed; a few are kept until they are read."""

    def open(self) -> None:
        """Take the pins and listen; called again after a `PinFault`. Raises `PinFault`."""

    def read(self, timeout_ms: int) -> KeyPress | None:
        """The next key, or None when none was pressed for `timeout_ms`. Raises `PinFault`; then open again."""

    def discard(self) -> None:
        """Forget what was pressed and not read: before a question, so that no earlier key answers it."""

    def close(self) -> None:
        """Release the pins. Safe to call at any time."""


class LampState(Enum):
    """What the lamps say: four green ones for the card (EMV Contactless Book A, user interface), one for the terminal.

    The status lamp is lit while the terminal is in service.
    """

    NOT_READY = "not_ready"  # all dark
    IDLE = "idle"  # the first green one blinks, 200 ms every 5 s
    READY = "ready"  # the first one is lit: present a card
    PROCESSING = "processing"  # the first one is lit: hold the card still
    CARD_READ = "card_read"  # all four are lit: the card may go, which says nothing yet of the sale
    ERROR = "error"  # the green ones are dark, the status lamp blinks: read the screen


class Lamps(Protocol):
    """The lamps. They keep their state, and go on blinking, until another is shown."""

    def open(self) -> None:
        """Take the pins, all lamps dark; called again after a `PinFault`. Raises `PinFault`."""

    def show(self, state: LampState) -> None:
        """Returns at once. Raises `PinFault`, also for a blink that failed since the last call."""

    def close(self) -> None:
        """All dark, pins released. Safe to call at any time."""


class Tone(Enum):
    """What the buzzer can say. People take the success tone for "paid": play it only when that is durable."""

    SUCCESS = "success"
    ALERT = "alert"
    CLICK = "click"


class Buzzer(Protocol):
    """One voice: a new tone cuts the one before short."""

    def open(self) -> None:
        """Take the pin; called again after a `PinFault`. Raises `PinFault`."""

    def play(self, tone: Tone) -> None:
        """Returns at once. Raises `PinFault`, also for a tone that failed since the last call."""

    def close(self) -> None:
        """Silence, pin released. Safe to call at any time."""

"""What the terminal asks of its hardware.

The seam between terminal and drivers is bytes: a reader hands over a channel, the channel carries command and response
APDUs as they are, status words included, and a display shows a picture. What the bytes mean is the terminal's affair;
which chip, bus or library carries them is the driver's. Concrete drivers translate their library's errors at this edge
into the few below and keep the cause (`raise CardLost(...) from error`).
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

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

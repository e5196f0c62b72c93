"""The contactless reader: a PN532 on a serial line, driven by nfcpy, its cards spoken to through `drivers.isodep`.

nfcpy opens the chip, finds cards and carries single frames (`clf.exchange`). What it does not do well enough for
payment is done here and in `isodep`: two cards in the field are told apart from one, waiting times are the card's own,
blocks are asked for again, and whatever goes wrong comes up as one of four errors. nfcpy indexes and unpacks answers
unchecked, so nonsense from a reader surfaces as almost any exception; none of them leaves this module, and after one
the reader is closed, so that `open` starts afresh. EMV's reset and polling sequence is that of Contactless Book D,
chapter 9, with the collision check for both types before activation.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import stat
import struct
import termios
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import nfc.clf
import nfc.clf.pn53x
import nfc.clf.pn532
import nfc.clf.transport
import serial

from drivers import isodep
from drivers.interfaces import CardCollision, CardLost, Interface, ReaderFault, ReaderMissing

# nfcpy writes every frame into its debug log, card data and all: never here, whatever the application's log level is.
# What it logs as an error comes up as one of ours.
logging.getLogger("nfc").setLevel(logging.CRITICAL + 1)

# nfcpy hands the path to a shell (`stty -F ...`).
_PORT_PATTERN = re.compile(r"/dev/[A-Za-z0-9_./-]+")

_CHIP_ERROR = nfc.clf.pn53x.Chipset.Error
# Lookup to struct.error are what nfcpy runs into when it takes an answer apart that is not one.
_NFCPY_ERRORS = (
    OSError,
    termios.error,
    nfc.clf.Error,
    _CHIP_ERROR,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)

_WRITE_TIMEOUT_S = 1.0  # a full frame takes 25 ms at 115,200 baud; longer means that nobody takes the bytes
_LIST_TIMEOUT_S = 1.0  # the chip's answer to one poll, a few ms; nfcpy allows it as much
_FAST_BAUD = 921_600  # what nfcpy switches to, and what the chip is left at when the process is killed
_SET_115200_BAUD = bytes.fromhex("0000ff03fdd410041800")
_WAKE_UP = bytes(10)
_COMMAND_TIME_S = 0.02  # for the chip to act on a command whose answer nobody reads

_FIELD_OFF_S = 0.006  # tRESET: 5.1 ms at least, 10 at most
_FIELD_ON_S = 0.006  # tP, from power to the first command: 5.1 ms at least
_CARDS_LISTED_MAX = 2  # all the chip can tell apart, and enough to see a collision
_POLL_PAUSE_S = 0.02  # spares a Raspberry Pi half the polls; nobody notices so short a wait
_SILENCES_FOR_REMOVAL = 3  # a card at the edge of the field misses a poll now and then

_CHIP_TIMER_MAX_S = 3.2  # the longest step of the chip's own timer is 3.28 s; above, the host does the waiting
_CHIP_TIMER_SLACK = 1.01  # nfcpy picks a step up to 1 % shorter than asked for
_CHIP_TIMER_OFF = b"\x0a\x0b\x00"  # the third byte; the others are nfcpy's


class _Type(Enum):
    """What to poll for: nfcpy's name, and the data of InListPassiveTarget (baud rate and type, AFI for all)."""

    A = ("106A", b"\x00")
    B = ("106B", b"\x03\x00")


class Pn532Reader:
    """A PN532 at a serial device, such as /dev/ttyAMA0 or /dev/serial0. Implements `interfaces.CardReader`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._line: _SerialLine | None = None
        self._frontend: nfc.clf.ContactlessFrontend | None = None
        self._channel: Pn532Channel | None = None

    @property
    def name(self) -> str:
        return f"PN532 on {self._path}"

    @property
    def interface(self) -> Interface:
        return Interface.CONTACTLESS

    def open(self) -> None:
        self.close()
        # nfcpy knows the slow and the odd ports of a Raspberry Pi by their real names.
        port = os.path.realpath(self._path)
        self._check_port(port)
        try:
            self._line = _SerialLine(port)
            try:
                device = nfc.clf.pn532.init(self._line)
            except OSError:
                self._line.return_to_115200_baud(port)
                device = nfc.clf.pn532.init(self._line)
        except _NFCPY_ERRORS as error:
            self.close()
            raise self._why_not(error) from error
        device._path = self._path  # as nfcpy's own `open` does, which does not accept every path
        self._frontend = nfc.clf.ContactlessFrontend()
        self._frontend.device = device

    def wait_for_card(self, timeout_ms: int) -> Pn532Channel | None:
        """See `CardReader`. A card that does not speak ISO/IEC 14443-4 is no payment card: it is not seen at all."""
        deadline_s = time.monotonic() + timeout_ms / 1000
        self.release()
        while True:
            found = self._poll()
            if len(found) > 1:
                raise CardCollision("More than one card is in the field. Present one card only.")
            if found and (channel := self._activate(found[0])):
                self._channel = channel
                return channel
            if time.monotonic() >= deadline_s:
                return None
            time.sleep(_POLL_PAUSE_S)

    def wait_for_removal(self, timeout_ms: int) -> bool:
        """See `CardReader`. Ends the channel: the field is switched off and on for every poll."""
        deadline_s = time.monotonic() + timeout_ms / 1000
        self.release()
        silences = 0
        while True:
            silences = 0 if self._poll() else silences + 1
            if silences == _SILENCES_FOR_REMOVAL or time.monotonic() >= deadline_s:
                return silences == _SILENCES_FOR_REMOVAL

    def close(self) -> None:
        self._channel = None
        frontend, self._frontend = self._frontend, None
        line, self._line = self._line, None
        with contextlib.suppress(*_NFCPY_ERRORS):
            if frontend is not None:
                frontend.close()  # puts the chip to sleep, and with it the field out
        if line is not None:
            line.close()

    # ---- for the channel

    def is_current(self, channel: Pn532Channel) -> bool:
        """Whether this card is still the one in an unbroken field."""
        return self._channel is channel

    def release(self) -> None:
        """End the activation, if there is one: no channel, no field."""
        self._channel = None
        with self._faults() as frontend:
            frontend.device.mute()

    # ---- the field: off, but while it is polled and while a channel lives

    def _poll(self) -> list[_Type]:
        """Ask who is there: one entry for each card that answers."""
        with self._faults() as frontend:
            chipset = frontend.device.chipset
            time.sleep(_FIELD_OFF_S)
            chipset.rf_configuration(0x01, b"\x01")
            time.sleep(_FIELD_ON_S)
            found = []
            for kind in _Type:
                _, request = kind.value
                answer = chipset.command(0x4A, bytes((_CARDS_LISTED_MAX,)) + request, _LIST_TIMEOUT_S)
                found += [kind] * answer[0]
            frontend.device.mute()
            return found

    def _activate(self, kind: _Type) -> Pn532Channel | None:
        """Select the one card and start ISO-DEP with it."""
        with self._faults() as frontend:
            time.sleep(_FIELD_OFF_S)
            name, _ = kind.value
            target = frontend.sense(nfc.clf.RemoteTarget(name))  # switches the field on
        try:
            if target is None:
                raise isodep.IsoDepError("the card did not wait to be selected")
            if kind is _Type.B:
                return Pn532Channel(self, isodep.activate_b(self._exchange, time, bytes(target.sensb_res)))
            if not target.sel_res[0] & 0x20:  # SAK: not compliant with ISO/IEC 14443-4
                self.release()
                return None
            return Pn532Channel(self, isodep.activate_a(self._exchange, time))
        except isodep.IsoDepError as error:
            self.release()
            raise CardLost("The card came and went before it was read. Hold it still to the reader.") from error

    def _exchange(self, block: bytes, timeout_s: float) -> bytes:
        """The link that `isodep` works on."""
        with self._faults() as frontend:
            try:
                if timeout_s > _CHIP_TIMER_MAX_S:
                    received = _exchange_without_timer(frontend.device.chipset, block, timeout_s)
                else:
                    received = frontend.exchange(block, timeout_s * _CHIP_TIMER_SLACK)
            except nfc.clf.TimeoutError as error:
                raise isodep.CardSilent("no answer from the card") from error
            except nfc.clf.CommunicationError as error:
                raise isodep.TransmissionError("a damaged answer from the card") from error
            return bytes(received)

    # ---- the reader

    @contextlib.contextmanager
    def _faults(self) -> Iterator[nfc.clf.ContactlessFrontend]:
        """Whatever nfcpy raises in here is a fault of the reader, and the end of it until it is opened again."""
        if self._frontend is None:
            raise ReaderFault(f"{self.name} is not open.")
        try:
            yield self._frontend
        except _NFCPY_ERRORS as error:
            self.close()
            if not Path(self._path).exists():
                raise ReaderMissing(
                    f"{self.name} was unplugged. No card can be read until it is plugged in again."
                ) from error
            raise ReaderFault(
                f"{self.name} does not answer sensibly. No card can be read until it does; if it does not recover "
                "when it is opened again, check its wiring and power."
            ) from error

    def _check_port(self, port: str) -> None:
        try:
            is_device = stat.S_ISCHR(Path(port).stat().st_mode)
        except OSError as error:
            raise ReaderMissing(
                f"{self.name}: there is no such device. Check the reader's cable, the configured path, and on the "
                "header of a Raspberry Pi that the UART is enabled."
            ) from error
        if not is_device or not _PORT_PATTERN.fullmatch(port):
            raise ReaderMissing(f"{self.name}: this is not a serial device. Correct the configured path.")

    def _why_not(self, error: Exception) -> ReaderFault:
        match getattr(error, "errno", None):
            case errno.EACCES | errno.EPERM:
                return ReaderFault(f"{self.name}: no permission. Add the service's user to the group dialout.")
            case errno.EAGAIN | errno.EBUSY:
                return ReaderFault(f"{self.name} is in use by another program. Stop that one first.")
            case _:
                return ReaderMissing(
                    f"{self.name}: the device is there, but no PN532 answers. Check power and wiring, that the "
                    "jumpers select UART, and that no serial console runs on this port."
                )


class Pn532Channel:
    """An activated card in the reader's field. Implements `interfaces.CardChannel`."""

    def __init__(self, reader: Pn532Reader, card: isodep.IsoDep) -> None:
        self._reader = reader
        self._card = card

    @property
    def interface(self) -> Interface:
        return Interface.CONTACTLESS

    @property
    def activation(self) -> bytes:
        return self._card.activation

    def transmit(self, command: bytes) -> bytes:
        if not self._reader.is_current(self):
            raise CardLost("The card is no longer in the field. Present it again.")
        try:
            response = self._card.transceive(command)
            if len(response) < 2:
                raise isodep.IsoDepError("an answer without a status word")
        except isodep.IsoDepError as error:
            self._reader.release()
            raise CardLost(f"The card was lost: {error}. Present it again.") from error
        return response

    def close(self) -> None:
        if not self._reader.is_current(self):
            return
        with contextlib.suppress(ReaderFault):  # shows again, and is reported, at the next poll
            self._card.deselect()
            self._reader.release()


class _SerialLine(nfc.clf.transport.TTY):  # type: ignore[misc]  # nfcpy is untyped
    """nfcpy's serial line for a device that others may want to use, that may stop taking bytes, or disappear."""

    def open(self, port: str, baudrate: int = 115_200) -> None:
        self.close()
        self.tty = serial.Serial(port, baudrate, timeout=0.05, write_timeout=_WRITE_TIMEOUT_S, exclusive=True)

    def close(self) -> None:
        # Without nfcpy's flush: on a device that has gone it fails, and the descriptor would stay open.
        if self.tty is not None:
            self.tty.close()
            self.tty = None

    def return_to_115200_baud(self, port: str) -> None:
        """A chip whose process was killed is still at the fast rate, and deaf to nfcpy, until it is told otherwise."""
        self.open(port, _FAST_BAUD)
        self.write(_WAKE_UP + _SET_115200_BAUD)
        time.sleep(_COMMAND_TIME_S)
        self.write(bytes(nfc.clf.pn53x.Chipset.ACK))
        time.sleep(_COMMAND_TIME_S)


def _exchange_without_timer(chipset: nfc.clf.pn53x.Chipset, block: bytes, timeout_s: float) -> bytearray:
    """`clf.exchange` for waits beyond the chip's timer, which is switched off: the host cancels the command instead.

    The framing is that of the exchanges before, of which activation was the first.
    """
    chipset.rf_configuration(0x02, _CHIP_TIMER_OFF)
    try:
        return chipset.in_communicate_thru(block, timeout_s)  # type: ignore[no-any-return]
    except OSError as error:
        if error.errno == errno.ETIMEDOUT:
            raise nfc.clf.TimeoutError("cancelled by the host") from error
        raise
    except _CHIP_ERROR as error:
        raise nfc.clf.TransmissionError(str(error)) from error

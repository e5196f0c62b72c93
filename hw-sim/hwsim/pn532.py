"""A PN532 on a pseudo-terminal: nfcpy opens it as it opens the chip, unmodified, and finds cards in its field.

`Pn532` owns the pty, the RF field and the cards in it. It speaks the chip's host frames (PN532 user manual, 6.2)
over the serial line: an ACK at once, then the answer. The commands are those that nfcpy needs for Type A and Type B
cards; the chip's own ISO-DEP (automatic RATS, InDataExchange), target mode, FeliCa and Jewel are left out and meet
the error frame. The chip is also a model of what goes wrong with it: `Disturbance` on the air, `wedge`, `babble`,
`unplug` and `replug` on the wire.

`serve()` is the loop; it blocks, and belongs in a thread of a process other than the terminal's (in the terminal's
own process the two would fight over the interpreter lock, and nfcpy waits only 100 ms for an ACK). Every other public
method may be called from any thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import select
import termios
import threading
import time
import tty
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from random import Random

from hwsim.cards.iso14443 import Modulation, ProximityCard, Reply

_log = logging.getLogger(__name__)

_START = b"\x00\xff"
_ACK = bytes.fromhex("0000ff00ff00")
_ERROR_FRAME = bytes.fromhex("0000ff01ff7f8100")
_TO_CHIP, _FROM_CHIP = 0xD4, 0xD5
_FRAME_MAX_BYTES = 265  # TFI, command and data, as the chip's buffer has it
_READ_BYTES = 4096  # what a pty holds

_FIRMWARE = bytes.fromhex("32010607")  # a PN532, version 1.6, types A, B and ISO 18092
_SPEEDS = (9600, 19200, 38400, 57600, 115_200, 230_400, 460_800, 921_600)
_SPEED_AT_POWER_ON = 115_200
_TERMIOS_SPEEDS = {getattr(termios, f"B{speed}"): speed for speed in _SPEEDS}

_TX_MODE, _RX_MODE, _FIFO_DATA = 0x6302, 0x6303, 0x6339
_FRAMING = {0x00: Modulation.A, 0x03: Modulation.B}  # the low two bits of TxMode
_CRC_ON = 0x80
_REQA = 0x26

_OK, _TIMED_OUT, _CRC_ERROR = 0x00, 0x01, 0x02
_TIMER_AT_POWER_ON = 0x0A  # 51.2 ms


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What goes wrong between this card and the reader.

    Frames on the air are counted from 1 since the card was presented, both directions in one row and polling left
    out: with nothing disturbed, odd ones come from the reader, even ones from the card. APDUs are counted since the
    card's activation. `random_errors` is the share of frames that are lost or damaged, chosen by `seed`.
    """

    lost_frames: frozenset[int] = frozenset()
    damaged_frames: frozenset[int] = frozenset()
    mute_from_frame: int | None = None  # found by polling, but nothing more gets through
    pulled_at_frame: int | None = None  # out of the field before this frame has gone through
    pulled_after_apdu: int | None = None
    torn_at_apdu: int | None = None  # executed by the card, but the card is gone before it answers
    random_errors: float = 0.0
    seed: int = 0


class _Fate(Enum):
    """What becomes of a frame on the air."""

    ARRIVES = auto()
    LOST = auto()
    DAMAGED = auto()  # arrives with a wrong CRC


@dataclass(slots=True, eq=False)
class _Presence:
    """A card in the field, and how it is disturbed."""

    card: ProximityCard
    disturbance: Disturbance
    random: Random
    frames: int = 0
    gone: bool = False
    crashed: bool = False  # the card model raised an exception: mute until the next field reset

    def power(self, field_on: bool) -> None:
        self.crashed = False
        self.card.power(field_on)

    def hear(self, frame: bytes) -> Reply | _Fate:
        """The reader's frame to the card; the card's answer, or what became of it."""
        if self.crashed or self._fate() is not _Fate.ARRIVES:
            return _Fate.LOST  # a card is silent about a damaged frame, too
        try:
            reply = self.card.receive(frame)
        except Exception:  # noqa: BLE001 - whatever a card model does, the reader goes on
            _log.exception("the card model failed; it is mute until the field is reset")
            self.crashed = True
            return _Fate.LOST
        if reply is None:
            return _Fate.LOST
        plan, executed = self.disturbance, self.card.apdus_executed
        if plan.torn_at_apdu is not None and executed >= plan.torn_at_apdu:
            self.gone = True
            return _Fate.LOST
        fate = self._fate()
        if plan.pulled_after_apdu is not None and executed >= plan.pulled_after_apdu and not self.card.answering:
            self.gone = True  # once this frame is through
        return reply if fate is _Fate.ARRIVES else fate

    def _fate(self) -> _Fate:
        self.frames += 1
        plan, number = self.disturbance, self.frames
        if plan.pulled_at_frame is not None and number >= plan.pulled_at_frame:
            self.gone = True
            return _Fate.LOST
        if number in plan.lost_frames or (plan.mute_from_frame is not None and number >= plan.mute_from_frame):
            return _Fate.LOST
        if number in plan.damaged_frames:
            return _Fate.DAMAGED
        if self.random.random() < plan.random_errors:
            return self.random.choice((_Fate.LOST, _Fate.DAMAGED))
        return _Fate.ARRIVES


@dataclass(slots=True)
class _Field:
    """The RF field and what is in it."""

    on: bool = False
    cards: list[_Presence] = field(default_factory=list)

    def switch(self, on: bool) -> None:
        if on != self.on:
            self.on = on
            for presence in self.cards:
                presence.power(on)

    def within_reach(self, modulation: Modulation | None) -> list[_Presence]:
        return [each for each in self.cards if self.on and each.card.modulation is modulation]

    def clear_away(self) -> None:
        """Take out what was pulled."""
        for presence in [each for each in self.cards if each.gone]:
            self.cards.remove(presence)
            presence.power(False)


@dataclass(frozen=True, slots=True)
class _Due:
    """An answer that the chip still owes the host."""

    after_s: float | None  # None: never, the host has to cancel
    payload: bytes
    presence: _Presence | None = None  # whose answer it is: once it is out of the field, it never comes


class _BadCommand(Exception):
    """Answered with the error frame."""


class Pn532:
    """The chip. With `link`, a symlink that leads to the pty as long as the reader is plugged in.

    `realtime=False` makes cards answer and RF time-outs pass at once (they are still compared with each other, so that
    an answer later than the reader waits is lost); only a command that the chip is told to wait for without limit
    takes the time it takes the host to cancel it.
    """

    def __init__(self, link: Path | None = None, *, realtime: bool = True) -> None:
        self._link = link
        self._realtime = realtime
        self._lock = threading.RLock()
        self._wake_reader, self._wake_writer = os.pipe()
        self._stopping = False
        self._field = _Field()
        self._commands: dict[int, Callable[[bytes], bytes | _Due]] = {
            0x00: self._diagnose,
            0x02: self._firmware_version,
            0x06: self._read_registers,
            0x08: self._write_registers,
            0x10: self._set_speed,
            0x12: self._set_parameters,
            0x14: self._configure_sam,
            0x16: self._power_down,
            0x32: self._configure_rf,
            0x42: self._communicate,
            0x4A: self._list_targets,
        }
        self._master: int | None = None
        self._slave: int | None = None
        self._pty_name = ""
        self._wedged = False
        self._nonsense: bytes | None = None
        self.replug()

    @property
    def path(self) -> str:
        """Where to open the reader."""
        return str(self._link or self._pty_name)

    # ---- the cards

    def present(self, card: ProximityCard, *, disturbance: Disturbance = Disturbance()) -> None:
        """Bring a card into the field; several may be there at once."""
        with self._lock:
            self._field.cards.append(_Presence(card, disturbance, Random(disturbance.seed)))
            card.power(self._field.on)

    def remove(self, card: ProximityCard | None = None) -> None:
        """Take this card away, or all. What it was about to answer never arrives."""
        with self._lock:
            for presence in self._field.cards:
                presence.gone = presence.gone or card is None or presence.card is card
            self._field.clear_away()

    @property
    def cards(self) -> tuple[ProximityCard, ...]:
        """What is in the field now."""
        with self._lock:
            return tuple(presence.card for presence in self._field.cards)

    @property
    def field_on(self) -> bool:
        with self._lock:
            return self._field.on

    # ---- the reader's own faults

    def wedge(self) -> None:
        """Take every byte, answer nothing."""
        with self._lock:
            self._wedged = True

    def babble(self, nonsense: bytes) -> None:
        """Answer whatever comes with these bytes."""
        with self._lock:
            self._nonsense = nonsense

    def behave(self) -> None:
        """End `wedge` and `babble`."""
        with self._lock:
            self._wedged = False
            self._nonsense = None

    def unplug(self) -> None:
        """The serial device disappears."""
        with self._lock:
            if self._link is not None:
                self._link.unlink(missing_ok=True)
            for descriptor in (self._master, self._slave):
                if descriptor is not None:
                    os.close(descriptor)
            self._master = self._slave = None
            self._field.switch(False)
            self._wake()

    def replug(self) -> None:
        """The serial device appears (again), the chip as after power-on."""
        with self._lock:
            if self._master is not None:
                return
            self._reset()
            self._master, self._slave = pty.openpty()
            # We keep the slave open: nfcpy closes and opens it again, and a master without a slave reads as an error.
            tty.setraw(self._slave)
            os.set_blocking(self._master, False)
            self._pty_name = os.ttyname(self._slave)
            if self._link is not None:
                self._link.unlink(missing_ok=True)
                self._link.symlink_to(self._pty_name)
            self._wake()

    # ---- the loop

    def serve(self) -> None:
        """Answer the host until `stop`."""
        while not self._stopping:
            with self._lock:
                master = self._master
                wait_s = None if self._due_s is None else max(0.0, self._due_s - time.monotonic())
            poll = select.poll()  # of a descriptor that is closed meanwhile it says so, and goes on
            poll.register(self._wake_reader, select.POLLIN)
            if master is not None:
                poll.register(master, select.POLLIN)
            ready = dict(poll.poll(None if wait_s is None else wait_s * 1000))
            if self._wake_reader in ready:
                os.read(self._wake_reader, _READ_BYTES)
            with self._lock:
                if master is not None and master == self._master and master in ready:
                    self._receive(master)
                self._answer_if_due()

    def stop(self) -> None:
        """End `serve`."""
        self._stopping = True
        self._wake()

    def close(self) -> None:
        """Release the pty, after `serve` has returned."""
        self.unplug()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _wake(self) -> None:
        os.write(self._wake_writer, b"!")

    # ---- host frames

    def _reset(self) -> None:
        """As after power-on."""
        self._buffer = bytearray()
        self._due: _Due | None = None
        self._due_s: float | None = None
        self._registers: dict[int, int] = {}
        self._timer = _TIMER_AT_POWER_ON
        self._speed = self._next_speed = _SPEED_AT_POWER_ON

    def _receive(self, master: int) -> None:
        try:
            received = os.read(master, _READ_BYTES)
        except OSError:
            return
        if self._nonsense is not None:
            self._write(self._nonsense)
        elif not self._wedged and self._speed_is_right():
            self._buffer += received
            while (frame := _take_frame(self._buffer)) is not None:
                if frame:
                    self._execute(frame[1], frame[2:])
                else:
                    self._acknowledged()

    def _speed_is_right(self) -> bool:
        """At another speed than its own, the chip hears noise."""
        if self._slave is None:
            return False
        if self._next_speed != self._speed:
            return True  # about to change: a pty does not tell at which speed the host's ACK was written
        return _TERMIOS_SPEEDS.get(termios.tcgetattr(self._slave)[5]) == self._speed

    def _acknowledged(self) -> None:
        """An ACK from the host cancels what is being done, and makes a new speed take effect."""
        self._due = self._due_s = None
        self._speed = self._next_speed

    def _execute(self, code: int, data: bytes) -> None:
        self._write(_ACK)
        self._due = self._due_s = None
        try:
            answer = self._commands[code](data)
        except (_BadCommand, LookupError):
            self._write(_ERROR_FRAME)
            return
        due = answer if isinstance(answer, _Due) else _Due(0.0, answer)
        self._due = _Due(due.after_s, bytes((code + 1,)) + due.payload, due.presence)
        if due.after_s is not None:
            self._due_s = time.monotonic() + (due.after_s if self._realtime else 0.0)
        self._answer_if_due()

    def _answer_if_due(self) -> None:
        if self._due is None or self._due_s is None or self._due_s > time.monotonic():
            return
        payload, presence = self._due.payload, self._due.presence
        self._due = self._due_s = None
        if presence is not None and presence not in self._field.cards:
            payload = bytes((payload[0], _TIMED_OUT))
        self._write(_frame(payload))

    def _write(self, frame: bytes) -> None:
        # A host that does not read its answers loses them, as it would on a real line.
        if self._master is not None:
            with contextlib.suppress(BlockingIOError):
                os.write(self._master, frame)

    # ---- commands (PN532 user manual, 7)

    def _diagnose(self, data: bytes) -> bytes:
        if data[0] != 0x00:
            raise _BadCommand
        return data

    def _firmware_version(self, _: bytes) -> bytes:
        return _FIRMWARE

    def _read_registers(self, data: bytes) -> bytes:
        addresses = [int.from_bytes(data[at : at + 2]) for at in range(0, len(data), 2)]
        return bytes(self._registers.get(address, 0) for address in addresses)

    def _write_registers(self, data: bytes) -> bytes:
        for at in range(0, len(data), 3):
            self._registers[int.from_bytes(data[at : at + 2])] = data[at + 2]
        return b""

    def _set_speed(self, data: bytes) -> bytes:
        self._next_speed = _SPEEDS[data[0]]
        return b""

    def _set_parameters(self, data: bytes) -> bytes:
        if data[0] & 0x10:  # automatic RATS
            raise _BadCommand
        return b""

    def _configure_sam(self, _: bytes) -> bytes:
        return b""

    def _power_down(self, _: bytes) -> bytes:
        self._field.switch(False)
        return b"\x00"

    def _configure_rf(self, data: bytes) -> bytes:
        if data[0] == 0x01:
            self._field.switch(bool(data[1] & 0x01))
        elif data[0] == 0x02:
            self._timer = data[3]  # for InCommunicateThru; 0: none
        return b""

    def _communicate(self, frame: bytes) -> _Due:
        """InCommunicateThru: status and frame."""
        timer_s = 100e-6 * 2 ** (self._timer - 1) if self._timer else None
        within_reach = self._field.within_reach(_FRAMING.get(self._registers.get(_TX_MODE, 0) & 0x03))
        heard = [(each, each.hear(frame)) for each in within_reach]
        answers = [(presence, answer) for presence, answer in heard if answer is not _Fate.LOST]
        self._field.clear_away()
        match answers:
            case [(presence, Reply() as reply)] if timer_s is None or reply.after_s <= timer_s:
                return _Due(reply.after_s, bytes((_OK,)) + reply.frame, None if presence.gone else presence)
            case [] | [(_, Reply())]:
                return _Due(timer_s, bytes((_TIMED_OUT,)))
            case _:  # damaged, or several at once
                return _Due(0.0, bytes((_CRC_ERROR,)))

    def _list_targets(self, data: bytes) -> bytes:
        """InListPassiveTarget: how many, and for each its number and what it said."""
        targets_max, kind = data[0], data[1]
        self._field.switch(True)
        framing = {0x00: 0x00, 0x03: 0x03}.get(kind)
        if framing is None:
            return b"\x00"
        self._registers[_TX_MODE] = self._registers[_RX_MODE] = _CRC_ON | framing
        found: list[bytes] = []
        selected: ProximityCard | None = None
        for presence in self._field.within_reach(_FRAMING[framing]):
            if presence.crashed or len(found) == targets_max:
                continue
            if selected is not None:
                selected.receive(b"\x50\x00")  # HLTA: one target at a time is awake
            number = len(found) + 1
            said = (_select_a if framing == 0x00 else _select_b)(presence.card, number)
            if said is not None:
                found.append(bytes((number,)) + said)
                selected = presence.card if framing == 0x00 else None
        if not found and framing == 0x00:
            self._registers[_FIFO_DATA] = _REQA  # still there: nobody answered it
        return bytes((len(found),)) + b"".join(found)


def _select_a(card: ProximityCard, _: int) -> bytes | None:
    atqa = card.request_a(wake_up=False)
    selected = card.select()
    if atqa is None or selected is None:
        return None
    uid, sak = selected
    return atqa + bytes((sak, len(uid))) + uid


def _select_b(card: ProximityCard, number: int) -> bytes | None:
    atqb = card.receive(bytes.fromhex("050000"))
    if atqb is None:
        return None
    # The firmware goes on to ATTRIB by itself: frames of 64 bytes, the target's number as its CID.
    attrib = card.receive(b"\x1d" + atqb.frame[1:5] + bytes((0x00, 0x05, 0x01, number)))
    if attrib is None:
        return None
    return atqb.frame + bytes((len(attrib.frame),)) + attrib.frame


def _frame(payload: bytes) -> bytes:
    """Response frame; the extended form from 255 bytes on."""
    body = bytes((_FROM_CHIP,)) + payload
    size = len(body)
    if size < 255:
        head = bytes((size, -size & 0xFF))
    else:
        high, low = divmod(size, 256)
        head = bytes((0xFF, 0xFF, high, low, -(high + low) & 0xFF))
    return b"\x00" + _START + head + body + bytes((-sum(body) & 0xFF, 0x00))


def _take_frame(buffer: bytearray) -> bytes | None:
    """Take the next command (TFI, code, data) out of the buffer, or an ACK (empty). None: not complete yet.

    What has a wrong checksum is passed over in silence, as is all noise between frames.
    """
    while True:
        start = buffer.find(_START)
        if start < 0:
            del buffer[:-1]
            return None
        del buffer[:start]
        if len(buffer) < 4:
            return None
        size, size_check, head = buffer[2], buffer[3], 4
        if (size, size_check) == (0x00, 0xFF):
            del buffer[:4]
            return b""
        if (size, size_check) == (0xFF, 0xFF):
            if len(buffer) < 7:
                return None
            size, size_check, head = buffer[4] << 8 | buffer[5], buffer[4] + buffer[5] + buffer[6], 7
        else:
            size_check += size
        if size_check & 0xFF or not 2 <= size <= _FRAME_MAX_BYTES:
            del buffer[:2]
            continue
        if len(buffer) < head + size + 1:
            return None
        body, checksum = bytes(buffer[head : head + size]), buffer[head + size]
        if (sum(body) + checksum) & 0xFF or body[0] != _TO_CHIP:
            del buffer[:2]
            continue
        del buffer[: head + size + 1]
        return body

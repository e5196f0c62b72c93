"""ISO-DEP, the reader's side of ISO/IEC 14443-4: APDUs in, APDUs out, blocks on the air.

A protocol engine with no I/O of its own. It is given a link, `link(block, timeout_s) -> block`, which carries one
block to the card and one back (the chip adds and checks the CRC), and a clock. It activates the card (RATS or
ATTRIB), cuts command APDUs into blocks the card can take, puts its answer together, grants waiting time extensions
and asks again for what was lost. The rules are those that EMV (Contactless Book D, chapters 5, 6 and 10) leaves of
the standard: no CID, no NAD, no PPS, 106 kbit/s. Polling, anticollision and the field belong to the reader.

Two things can go wrong. `TransmissionError` says that one block did not come through; the link raises it and this
module recovers from it. `IsoDepError` says that the card is lost to this activation: nothing is asked again, the
field has to be reset. Anything else that the link raises passes through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Link = Callable[[bytes, float], bytes]

CARRIER_HZ = 13_560_000

FRAME_SIZES_BYTES = (16, 24, 32, 40, 48, 64, 96, 128, 256)  # by FSCI and FSDI; whatever is above 8 means 8
FRAME_OVERHEAD_BYTES = 3  # PCB and two bytes of CRC
FSDI = 8  # the reader takes frames of 256 bytes

I_BLOCK = 0x02
R_ACK = 0xA2
R_NAK = 0xB2
S_DESELECT = 0xC2
S_WTX = 0xF2
CHAINING = 0x10  # of an I-block
BLOCK_NUMBER = 0x01
# CID (08) and NAD (04) are included in the mask, so that a block carrying either is neither I nor R.
BLOCK_TYPE_MASK = 0xEE

FWI_DEFAULT = 4  # also stands for the reserved value 15
FSCI_DEFAULT = 2
INDEX_RESERVED = 15  # as FWI and as SFGI
WAITING_MARGIN_S = 49_152 / CARRIER_HZ  # the reader waits FWT and this much longer
ATS_WAIT_S = 71_680 / CARRIER_HZ
DESELECT_WAIT_S = 65_536 / CARRIER_HZ
RETRANSMISSION_S = 0.003  # earliest moment to send again after an error

WTXM_RANGE = range(1, 60)
ACTIVATION_TRIES_MAX = 3  # RATS and ATTRIB, each sent again only on silence
RETRANSMISSIONS_MAX = 2  # per block; a card that fails three times in a row is gone
# A card that computes an RSA signature while granting itself the shortest waiting times asks some hundred times.
EXTENSIONS_IN_A_ROW_MAX = 255
APDU_MAX_S = 20.0  # four times the longest FWT: nobody holds a card longer than that
# The longest short APDUs (261 bytes out, 258 in) cut into single bytes, and every other block lost.
BLOCKS_MAX = 1040
ANSWER_MAX_BYTES = 65_538  # 65,536 and SW1 SW2: ISO/IEC 7816-4 knows no longer response APDU


class Clock(Protocol):
    """The module `time`, or a clock that a test winds."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


class TransmissionError(Exception):
    """One block did not come through: CRC, parity or framing error, or a frame cut short."""


class CardSilent(TransmissionError):
    """No answer within the waiting time."""


class IsoDepError(Exception):
    """The card broke the protocol or fell silent for good: reset the field, poll again."""


@dataclass(frozen=True, slots=True)
class CardLimits:
    """What a card declares in its ATS or ATQB."""

    frame_size_bytes: int  # FSC, with PCB and CRC
    waiting_time_s: float  # FWT
    guard_time_s: float  # SFGT, before the first block


def parse_ats(ats: bytes) -> CardLimits:
    """Answer to select, from TL on (ISO/IEC 14443-4, 5.2). Absent bytes mean their defaults."""
    if not ats or ats[0] != len(ats):
        raise IsoDepError("ATS: its length byte does not count its bytes")
    if len(ats) == 1:
        return _limits(FSCI_DEFAULT, FWI_DEFAULT, 0)
    t0 = ats[1]
    ta, tb, tc = (bool(t0 & bit) for bit in (0x10, 0x20, 0x40))
    if len(ats) < 2 + ta + tb + tc:
        raise IsoDepError("ATS: shorter than its format byte says")
    if not tb:
        return _limits(t0 & 0x0F, FWI_DEFAULT, 0)
    interface_byte = ats[2 + ta]
    return _limits(t0 & 0x0F, interface_byte >> 4, interface_byte & 0x0F)


def parse_atqb(atqb: bytes) -> CardLimits:
    """Answer to request B, from its 50 on (ISO/IEC 14443-3, 7.9); the optional 13th byte carries SFGI."""
    if len(atqb) not in {12, 13} or atqb[0] != 0x50:
        raise IsoDepError("ATQB: neither 12 nor 13 bytes, or not an ATQB")
    size_and_type = atqb[10]
    if size_and_type & 0x09 != 0x01:
        raise IsoDepError("ATQB: the card does not speak ISO/IEC 14443-4")
    return _limits(size_and_type >> 4, atqb[11] >> 4, atqb[12] >> 4 if len(atqb) == 13 else 0)


def _limits(fsci: int, fwi: int, sfgi: int) -> CardLimits:
    fwi = FWI_DEFAULT if fwi == INDEX_RESERVED else fwi
    sfgi = 0 if sfgi == INDEX_RESERVED else sfgi
    return CardLimits(
        frame_size_bytes=_frame_size_bytes(fsci),
        waiting_time_s=4096 * 2**fwi / CARRIER_HZ,
        guard_time_s=(4096 + 384) * 2**sfgi / CARRIER_HZ if sfgi else 0.0,
    )


def _frame_size_bytes(index: int) -> int:
    return FRAME_SIZES_BYTES[min(index, len(FRAME_SIZES_BYTES) - 1)]


WAITING_TIME_MAX_S = _limits(0, 14, 0).waiting_time_s  # FWTmax, 4.95 s


def activate_a(link: Link, clock: Clock, *, fsdi: int = FSDI) -> IsoDep:
    """Request the ATS of a selected Type A card (ISO/IEC 14443-4, 5.1). Raises `IsoDepError`."""
    ats = _first_answer(link, clock, bytes((0xE0, fsdi << 4)), ATS_WAIT_S)
    return IsoDep(link, clock, ats, parse_ats(ats), fsdi)


def activate_b(link: Link, clock: Clock, atqb: bytes, *, fsdi: int = FSDI) -> IsoDep:
    """Select a Type B card that sent this ATQB (ISO/IEC 14443-3, 7.10). Raises `IsoDepError`."""
    limits = parse_atqb(atqb)
    attrib = b"\x1d" + atqb[1:5] + bytes((0x00, fsdi, 0x01, 0x00))
    answer = _first_answer(link, clock, attrib, limits.waiting_time_s + WAITING_MARGIN_S)
    if len(answer) != 1 or answer[0] & 0x0F:
        raise IsoDepError("answer to ATTRIB: not one byte with CID 0")
    return IsoDep(link, clock, atqb, limits, fsdi)


def _first_answer(link: Link, clock: Clock, request: bytes, timeout_s: float) -> bytes:
    for attempt in range(ACTIVATION_TRIES_MAX):
        if attempt:
            clock.sleep(RETRANSMISSION_S)
        try:
            return link(request, timeout_s)
        except CardSilent:
            continue  # perhaps it did not hear us
        except TransmissionError as error:
            # It heard us, and is past the state in which it would answer the same request again.
            raise IsoDepError("the card's answer to activation was damaged") from error
    raise IsoDepError("the card does not answer its activation")


class IsoDep:
    """An activated card. Made by `activate_a` and `activate_b`; of no more use after its first `IsoDepError`."""

    def __init__(self, link: Link, clock: Clock, activation: bytes, limits: CardLimits, fsdi: int) -> None:
        self.activation = activation  # ATS or ATQB
        self.limits = limits
        self._link = link
        self._clock = clock
        self._frame_max_bytes = _frame_size_bytes(fsdi)
        self._block_number = 0
        self._in_step = True
        self._blocks_left = 0
        self._deadline_s = 0.0
        clock.sleep(limits.guard_time_s)

    def transceive(self, command: bytes) -> bytes:
        """One command APDU, one response APDU. Raises `IsoDepError`."""
        if not self._in_step:
            raise IsoDepError("this activation has ended")
        self._in_step = False  # whatever is raised below leaves card and reader out of step
        self._blocks_left = BLOCKS_MAX
        self._deadline_s = self._clock.monotonic() + APDU_MAX_S
        response = self._receive(self._send(command))
        self._in_step = True
        return response

    def deselect(self) -> None:
        """Tell the card that this is the end (S(DESELECT)), for phones to see it is one. Once: the field goes off."""
        if not self._in_step:
            return
        self._in_step = False
        try:
            self._link(bytes((S_DESELECT,)), DESELECT_WAIT_S + WAITING_MARGIN_S)
        except TransmissionError:
            return  # gone already

    def _send(self, command: bytes) -> bytes:
        """Send the command, chained if it must be; return the first block of the answer."""
        part_bytes = self.limits.frame_size_bytes - FRAME_OVERHEAD_BYTES
        *chained, last = [command[at : at + part_bytes] for at in range(0, len(command), part_bytes)] or [b""]
        for part in chained:
            acknowledgement = self._deliver(bytes((I_BLOCK | CHAINING | self._block_number,)) + part)
            if acknowledgement[0] != R_ACK | self._block_number:
                raise IsoDepError("the card did not acknowledge a part of the command")
            self._block_number ^= BLOCK_NUMBER
        return self._deliver(bytes((I_BLOCK | self._block_number,)) + last)

    def _receive(self, block: bytes) -> bytes:
        """Put the answer together, of which this is the first block."""
        answer = bytearray()
        while True:
            if block[0] & ~CHAINING != I_BLOCK | self._block_number:
                raise IsoDepError("not the I-block that is next")
            self._block_number ^= BLOCK_NUMBER
            answer += block[1:]
            if len(answer) > ANSWER_MAX_BYTES:
                raise IsoDepError("the answer has no end")
            if not block[0] & CHAINING:
                return bytes(answer)
            block = self._deliver(bytes((R_ACK | self._block_number,)))

    def _deliver(self, block: bytes) -> bytes:
        """Get one block to the card and its I-block or R(ACK) back, well-formed but perhaps not the one expected.

        (ISO/IEC 14443-4, 7.5.5, as EMV Contactless Book D, 10.3 narrows it.)
        """
        card_is_chaining = block[0] & ~BLOCK_NUMBER == R_ACK
        recovery = block if card_is_chaining else bytes((R_NAK | self._block_number,))
        unheard = R_ACK | self._block_number ^ BLOCK_NUMBER  # "I still await the block you asked about"
        sending, waiting_time_s = block, self.limits.waiting_time_s
        failures = repetitions = extensions = 0
        while self._blocks_left:
            self._blocks_left -= 1
            if self._clock.monotonic() > self._deadline_s:
                raise IsoDepError("the card takes longer than a customer has")
            try:
                received = self._link(sending, waiting_time_s + WAITING_MARGIN_S)
                if not received:
                    raise TransmissionError("an empty frame")
            except TransmissionError as error:
                failures += 1
                if failures > RETRANSMISSIONS_MAX:
                    raise IsoDepError("the card no longer answers") from error
                self._clock.sleep(RETRANSMISSION_S)
                # An extension that was granted stays granted: the card may have heard, and be counting on it.
                sending = recovery
                continue
            failures = 0
            self._check_form(received)
            if received[0] == S_WTX:
                extensions += 1
                if extensions > EXTENSIONS_IN_A_ROW_MAX:
                    raise IsoDepError("the card asks for more time without end")
                sending = received
                # For the next block only (ISO/IEC 14443-4, 7.3).
                waiting_time_s = min(self.limits.waiting_time_s * received[1], WAITING_TIME_MAX_S)
            elif received[0] == unheard and sending[0] & ~BLOCK_NUMBER == R_NAK:
                repetitions += 1
                if repetitions > RETRANSMISSIONS_MAX:
                    raise IsoDepError("the card does not take the block")
                sending, waiting_time_s = block, self.limits.waiting_time_s
            else:
                return received
        raise IsoDepError("too many blocks for one APDU")

    def _check_form(self, block: bytes) -> None:
        if len(block) + FRAME_OVERHEAD_BYTES - 1 > self._frame_max_bytes:
            raise IsoDepError("a block longer than the reader announced to take")
        pcb = block[0]
        is_information = pcb & BLOCK_TYPE_MASK == I_BLOCK
        is_acknowledgement = pcb & ~BLOCK_NUMBER == R_ACK and len(block) == 1  # a card never sends R(NAK)
        is_extension = pcb == S_WTX and len(block) == 2 and block[1] in WTXM_RANGE
        if not (is_information or is_acknowledgement or is_extension):
            raise IsoDepError(f"a malformed block, PCB {pcb:02X}")

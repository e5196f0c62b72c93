"""A contactless card below its application: ISO/IEC 14443-3 states and ISO/IEC 14443-4 blocks, Type A and Type B.

`ProximityCard` wraps an application (`reset`, `apdu`) and lives in the field of a simulated reader, which powers it,
polls it and hands it frames without CRC; it answers with frames, or not at all. It is written from the card's rules
of the standard and shares no code with the reader's side in `drivers`, so that each checks the other. It is strict:
what a card must not answer meets silence. Anticollision is left to the reader's chip, which sees one card at a time;
bit rates other than 106 kbit/s, PPS, NAD and blocks with a CID (but for S(DESELECT)) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple, Protocol

_CARRIER_HZ = 13_560_000
_FRAME_SIZES_BYTES = {0: 16, 1: 24, 2: 32, 3: 40, 4: 48, 5: 64, 6: 96, 7: 128, 8: 256}
_FWT_MAX_S = 4096 * 2**14 / _CARRIER_HZ
_SHARE_OF_EXTENSION_USED = 0.9  # a card that asked for time uses it: a reader that granted too little misses the answer
COMMAND_MAX_BYTES = 65_544  # the longest extended command APDU (ISO/IEC 7816-4, 5.1): a chain beyond it meets silence


class CardApplication(Protocol):
    """What runs on the card."""

    def reset(self) -> None:
        """The card was activated: forget selection and session, keep what is in the EEPROM."""

    def apdu(self, command: bytes) -> bytes:
        """Execute a command APDU, return the response APDU with its status word."""


class Modulation(Enum):
    """How a card hears and is heard: a reader polls for one at a time."""

    A = "A"
    B = "B"


class Reply(NamedTuple):
    """A frame from the card, without CRC, and how long after the reader's frame it starts."""

    frame: bytes
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TypeA:
    """What a Type A card tells in anticollision and in its ATS."""

    uid: bytes = bytes.fromhex("08112233")
    atqa: bytes = bytes.fromhex("0004")  # high byte first
    sak: int = 0x20  # speaks ISO/IEC 14443-4
    fsci: int = 8
    fwi: int = 7
    sfgi: int = 0
    historical: bytes = b""
    ats: bytes | None = None  # sent as it is in place of one made from the above; FSCI and FWI should then agree

    def answer_to_select(self) -> bytes:
        """TL T0 TA TB TC and historical bytes (ISO/IEC 14443-4, 5.2), 106 kbit/s only, neither CID nor NAD."""
        if self.ats is not None:
            return self.ats
        body = bytes((0x70 | self.fsci, 0x80, self.fwi << 4 | self.sfgi, 0x00)) + self.historical
        return bytes((1 + len(body),)) + body


@dataclass(frozen=True, slots=True)
class TypeB:
    """What a Type B card tells in its ATQB."""

    pupi: bytes = bytes.fromhex("08112233")
    application_data: bytes = bytes(4)
    protocol_type: int = 0x01  # speaks ISO/IEC 14443-4
    fsci: int = 8
    fwi: int = 7
    sfgi: int | None = None  # None: a basic ATQB of 12 bytes

    def answer_to_request(self) -> bytes:
        """50 PUPI, application data, protocol info (ISO/IEC 14443-3, 7.9)."""
        info = bytes((0x00, self.fsci << 4 | self.protocol_type, self.fwi << 4))
        extended = b"" if self.sfgi is None else bytes((self.sfgi << 4,))
        return b"\x50" + self.pupi + self.application_data + info + extended


class _State(Enum):
    OFF = auto()
    IDLE = auto()
    READY = auto()
    ACTIVE = auto()  # selected, before RATS (Type A only)
    PROTOCOL = auto()  # activated: there is a session
    HALT = auto()


@dataclass(slots=True)
class _Session:
    """The block protocol between activation and its end."""

    frame_max_bytes: int  # what the reader takes: FSD
    cid: int
    block_number: int = 1
    last: bytes = b""  # for retransmission
    command: bytearray = field(default_factory=bytearray)
    parts: list[bytes] = field(default_factory=list)  # of the answer, still to be sent
    extensions: list[int] = field(default_factory=list)  # WTXM still to be asked for before `held` goes out
    held: bytes | None = None


class ProximityCard:
    """A card with an antenna. `receive` and the rest are called by one thread at a time: the reader's field.

    `extensions` maps the number of an APDU (from 1, since activation) to the WTXM values that the card asks for, one
    after the other, before it answers it; `chain_extensions` are asked for before each block inside a chain.
    """

    def __init__(
        self,
        application: CardApplication,
        radio: TypeA | TypeB = TypeA(),
        *,
        extensions: Mapping[int, tuple[int, ...]] | None = None,
        chain_extensions: tuple[int, ...] = (),
    ) -> None:
        self.application = application
        self.radio = radio
        self.modulation = Modulation.A if isinstance(radio, TypeA) else Modulation.B
        self.apdus_executed = 0  # since activation
        self._extensions = dict(extensions or {})
        self._chain_extensions = chain_extensions
        self._fwt_s = 4096 * 2**radio.fwi / _CARRIER_HZ
        self._frame_max_bytes = _FRAME_SIZES_BYTES[radio.fsci]
        self._state = _State.OFF
        self._was_halted = False
        self._session: _Session | None = None

    @property
    def answering(self) -> bool:
        """In the middle of an answer: asked for time, or with parts still to send."""
        return self._session is not None and bool(self._session.held or self._session.parts)

    # ---- field, request and selection (ISO/IEC 14443-3)

    def power(self, field_on: bool) -> None:
        """The field went on or off. Without power a card forgets where it was."""
        self._enter(_State.IDLE if field_on else _State.OFF)
        self._was_halted = False

    def request_a(self, *, wake_up: bool) -> bytes | None:
        """REQA, or WUPA, which also wakes halted cards (6.5): ATQA, or silence."""
        if isinstance(self.radio, TypeA) and self._hears_request(wake_up):
            self._enter(_State.READY)
            return self.radio.atqa
        self._fall_back()
        return None

    def select(self) -> tuple[bytes, int] | None:
        """The whole anticollision loop with this card as its winner: UID and SAK."""
        if not isinstance(self.radio, TypeA) or self._state is not _State.READY:
            self._fall_back()
            return None
        self._enter(_State.ACTIVE)
        return self.radio.uid, self.radio.sak

    def receive(self, frame: bytes) -> Reply | None:
        """A frame in this card's modulation. None: the card stays silent."""
        if not frame or len(frame) + 2 > self._frame_max_bytes:
            return None
        if self._session is not None:
            return self._receive_block(self._session, frame)
        if isinstance(self.radio, TypeB):
            return self._receive_b(self.radio, frame)
        return self._receive_a(self.radio, frame)

    def _receive_a(self, radio: TypeA, frame: bytes) -> Reply | None:
        if self._state is not _State.ACTIVE:
            self._fall_back()
        elif frame == b"\x50\x00":  # HLTA
            self._enter(_State.HALT)
            self._was_halted = True
        elif len(frame) == 2 and frame[0] == 0xE0 and radio.sak & 0x20:
            self._activate(fsdi=frame[1] >> 4, cid=frame[1] & 0x0F)
            return Reply(radio.answer_to_select())
        else:
            self._fall_back()
        return None

    def _receive_b(self, radio: TypeB, frame: bytes) -> Reply | None:
        if len(frame) == 3 and frame[0] == 0x05:  # REQB, or WUPB with bit 08; one time slot only
            if self._hears_request(wake_up=bool(frame[2] & 0x08)) or self._state is _State.READY:
                self._enter(_State.READY)
                return Reply(radio.answer_to_request())
        elif self._state is _State.READY and frame[1:5] == radio.pupi:
            if frame[0] == 0x1D and len(frame) >= 9:
                self._activate(fsdi=frame[6] & 0x0F, cid=frame[8] & 0x0F)
                return Reply(bytes((frame[8] & 0x0F,)))  # no MBLI; the CID
            if frame[0] == 0x50:  # HLTB
                self._enter(_State.HALT)
                return Reply(b"\x00")
        return None

    def _hears_request(self, wake_up: bool) -> bool:
        return self._state is _State.IDLE or (wake_up and self._state is _State.HALT)

    def _fall_back(self) -> None:
        """What a Type A card does not expect takes it back to where it was woken from."""
        if self._state in {_State.READY, _State.ACTIVE}:
            self._enter(_State.HALT if self._was_halted else _State.IDLE)

    def _enter(self, state: _State) -> None:
        self._state = state
        self._session = None

    def _activate(self, fsdi: int, cid: int) -> None:
        self._enter(_State.PROTOCOL)
        self._session = _Session(_FRAME_SIZES_BYTES[min(fsdi, 8)], cid)
        self.apdus_executed = 0
        self.application.reset()

    # ---- blocks (ISO/IEC 14443-4, 7)

    def _receive_block(self, session: _Session, frame: bytes) -> Reply | None:
        pcb, rest = frame[0], frame[1:]
        if pcb in {0x02, 0x03, 0x12, 0x13} and session.cid == 0:
            return self._information(session, rest, more=pcb >= 0x12)
        if pcb in {0xA2, 0xA3, 0xB2, 0xB3} and not rest and session.cid == 0:
            return self._acknowledgement(session, pcb & 1, negative=pcb >= 0xB2)
        if pcb == 0xF2 and frame == session.last and session.held is not None:
            return self._extension_granted(session, session.held, wtxm=rest[0])
        if frame == (bytes((0xCA, session.cid)) if session.cid else b"\xc2"):
            self._enter(_State.HALT)
            self._was_halted = True
            return Reply(frame)
        return None

    def _information(self, session: _Session, data: bytes, *, more: bool) -> Reply | None:
        session.block_number ^= 1  # rule D: whatever number the block has
        session.parts.clear()
        session.extensions.clear()
        session.held = None
        session.command += data
        if len(session.command) > COMMAND_MAX_BYTES:
            return None
        if more:
            return self._answer(session, bytes((0xA2 | session.block_number,)), self._chain_extensions)
        command = bytes(session.command)
        session.command.clear()
        answer = self.application.apdu(command)
        self.apdus_executed += 1
        size = session.frame_max_bytes - 3
        session.parts = [answer[at : at + size] for at in range(0, len(answer), size)] or [b""]
        return self._next_part(session, self._extensions.get(self.apdus_executed, ()))

    def _next_part(self, session: _Session, extensions: tuple[int, ...]) -> Reply:
        part = session.parts.pop(0)
        pcb = 0x02 | session.block_number | (0x10 if session.parts else 0)
        return self._answer(session, bytes((pcb,)) + part, extensions)

    def _acknowledgement(self, session: _Session, number: int, *, negative: bool) -> Reply | None:
        if number == session.block_number:
            return Reply(session.last) if session.last else None  # rule 11: once more
        if negative:
            return Reply(bytes((0xA2 | session.block_number,)))  # rule 12: what you mean has not arrived
        if session.parts and session.held is None:
            session.block_number ^= 1
            return self._next_part(session, self._chain_extensions)
        return None

    def _answer(self, session: _Session, block: bytes, extensions: tuple[int, ...]) -> Reply:
        if extensions:
            session.held, session.extensions = block, list(extensions)
            session.last = bytes((0xF2, session.extensions.pop(0)))
        else:
            session.last = block
        return Reply(session.last)

    def _extension_granted(self, session: _Session, held: bytes, *, wtxm: int) -> Reply:
        if session.extensions:
            session.last = bytes((0xF2, session.extensions.pop(0)))
        else:
            session.held, session.last = None, held
        return Reply(session.last, _SHARE_OF_EXTENSION_USED * min(self._fwt_s * wtxm, _FWT_MAX_S))

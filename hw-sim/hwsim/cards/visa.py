"""A simulated Visa-like contactless card (EMV Contactless Book C-3, card side): command APDU in, response APDU out.

The card runs on its own: it knows nothing of readers, blocks or fields, which are ISO-DEP's affair, and nothing of the
kernel it is going to meet. It answers every byte string with a status word, never with an exception, and keeps its
transaction counter for as long as the object lives (`VisaCard.profile` is the card to store again).

Cards that a terminal must cope with are made by `hwsim.cards.variants`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Final, NamedTuple

from hwsim.cards.apdu import Command, Refused, StatusWord, parse
from hwsim.cards.bertlv import decode_dol, encode
from hwsim.cards.bureau import Entropy
from hwsim.cards.chip import Chip
from hwsim.cards.cryptogram import CryptogramType, issuer_application_data
from hwsim.cards.misbehaviour import said
from hwsim.cards.profile import CardProfile, Standing
from hwsim.cards.variants import VARIANTS

__all__ = ["VARIANTS", "VisaCard"]

PPSE: Final = b"2PAY.SYS.DDF01"
KERNEL_ID: Final = b"\x03"
AID_BYTES_MIN: Final = 5  # a RID; less names no application

AFL_WITHOUT_ODA: Final = bytes.fromhex("0801010018010100")
AFL_WITH_ODA: Final = bytes.fromhex("080101001001020018010201")  # record 1 of file 3 is under the ICC certificate
DYNAMIC_RECORD: Final = (3, 2)  # 9F69, and 9F4B where it does not fit into the response to GET PROCESSING OPTIONS

FORM_FACTOR: Final = bytes.fromhex("20700000")  # a plain contactless card
SDAD_IN_GPO_BYTES_MAX: Final = 128  # a longer one would push the response over 256 bytes
REFUND: Final = b"\x20"


class State(Enum):
    """How far the conversation has come."""

    IDLE = auto()
    DIRECTORY = auto()
    SELECTED = auto()
    INITIATED = auto()


class Step(Enum):
    """What a command does to the conversation."""

    SELECT_DIRECTORY = auto()
    SELECT_APPLICATION = auto()
    SELECT_BLOCKED = auto()
    INITIATE = auto()
    READ = auto()


_NEXT: Final[Mapping[tuple[State, Step], State]] = {
    **{(state, Step.SELECT_DIRECTORY): State.DIRECTORY for state in State},
    **{(state, Step.SELECT_APPLICATION): State.SELECTED for state in State},
    **{(state, Step.SELECT_BLOCKED): State.DIRECTORY for state in State},  # named, but not entered
    (State.SELECTED, Step.INITIATE): State.INITIATED,  # once for each selection
    (State.INITIATED, Step.READ): State.INITIATED,
}


class _Answer(NamedTuple):
    data: bytes
    step: Step
    sw: int = StatusWord.OK


class _Choice(NamedTuple):
    kind: CryptogramType
    ctq: bytes


class VisaCard:
    """One card. It is activated with `reset` and then asked with `apdu`."""

    def __init__(self, profile: CardProfile | Chip, entropy: Entropy) -> None:
        self._chip = profile if isinstance(profile, Chip) else Chip(profile, entropy)
        self._state = State.IDLE
        self._records: dict[tuple[int, int], bytes] = {}
        self._handlers: Mapping[tuple[int, int], Callable[[Command], _Answer]] = {
            (0x00, 0xA4): self._select,
            (0x80, 0xA8): self._get_processing_options,
            (0x00, 0xB2): self._read_record,
        }

    @property
    def profile(self) -> CardProfile:
        """The card as it is now, transaction counter included."""
        return self._chip.profile

    def reset(self) -> None:
        """The card enters the field: nothing is selected any more."""
        self._state = State.IDLE
        self._records = {}

    def apdu(self, command: bytes) -> bytes:
        """Answer one command APDU. Whatever the bytes are, the response ends in a status word."""
        try:
            parsed = parse(command)
            handler = self._handlers.get((parsed.cla, parsed.ins))
            if handler is None:
                known_class = any(parsed.cla == cla for cla, _ in self._handlers)
                raise Refused(StatusWord.WRONG_INSTRUCTION if known_class else StatusWord.WRONG_CLASS)
            answer = handler(parsed)
        except Refused as refusal:
            return refusal.sw.to_bytes(2, "big")
        self._state = _NEXT[self._state, answer.step]
        return said(self.profile.misbehaviour, parsed, answer.data) + answer.sw.to_bytes(2, "big")

    def _require(self, step: Step) -> None:
        if (self._state, step) not in _NEXT:
            raise Refused(StatusWord.CONDITIONS_NOT_SATISFIED)

    def _select(self, command: Command) -> _Answer:
        """SELECT by name: the directory of contactless applications, or the application (EMV 4.4 Book 1, 11.3)."""
        if command.p1 != 0x04 or command.p2 not in (0x00, 0x02):
            raise Refused(StatusWord.WRONG_PARAMETERS)
        if not command.data:
            raise Refused(StatusWord.WRONG_LENGTH)
        profile = self.profile
        if profile.standing is Standing.CARD_BLOCKED:
            raise Refused(StatusWord.NOT_SUPPORTED)
        # There is one application: "next occurrence" (P2 = 02) finds nothing after it.
        if profile.standing is Standing.ABSENT or command.p2 == 0x02:
            raise Refused(StatusWord.NOT_FOUND)
        if command.data == PPSE:
            return _Answer(self._directory(), Step.SELECT_DIRECTORY)
        if len(command.data) < AID_BYTES_MIN or not profile.aid.startswith(command.data):
            raise Refused(StatusWord.NOT_FOUND)
        self._records = {}
        if profile.standing is Standing.BLOCKED:
            return _Answer(self._application(), Step.SELECT_BLOCKED, StatusWord.SELECTED_BLOCKED)
        return _Answer(self._application(), Step.SELECT_APPLICATION)

    def _directory(self) -> bytes:
        entry = encode(
            0x61,
            encode(0x4F, self.profile.aid),
            encode(0x50, self.profile.label.encode("ascii")),
            encode(0x87, b"\x01"),
            encode(0x9F2A, KERNEL_ID),
        )
        return encode(0x6F, encode(0x84, PPSE), encode(0xA5, encode(0xBF0C, entry)))

    def _application(self) -> bytes:
        proprietary = encode(
            0xA5,
            encode(0x50, self.profile.label.encode("ascii")),
            encode(0x87, b"\x01"),
            encode(0x9F38, self.profile.contactless.pdol),
            encode(0x5F2D, self.profile.language.encode("ascii")),
        )
        return encode(0x6F, encode(0x84, self.profile.aid), proprietary)

    def _get_processing_options(self, command: Command) -> _Answer:
        """GET PROCESSING OPTIONS: take the terminal's data, decide, sign (EMV Contactless Book C-3)."""
        self._require(Step.INITIATE)
        if (command.p1, command.p2) != (0x00, 0x00):
            raise Refused(StatusWord.WRONG_PARAMETERS)
        terminal = _terminal_data(self.profile.contactless.pdol, command.data)
        choice = _decide(self.profile, terminal)
        self._chip.count()
        return _Answer(self._sign(terminal, choice), Step.INITIATE)

    def _sign(self, terminal: Mapping[int, bytes], choice: _Choice) -> bytes:
        """Everything that changes with the transaction; lays out the records on the way."""
        profile = self.profile
        atc = self._chip.atc
        iad = issuer_application_data(profile.cvn, profile.dki, choice.kind)
        cryptogram = self._chip.cryptogram({**terminal, 0x82: profile.aip, 0x9F36: atc, 0x9F10: iad})
        body = [
            encode(0x82, profile.aip),
            encode(0x57, profile.track2),
            encode(0x5F34, bytes.fromhex(profile.psn)),
            encode(0x9F10, iad),
            encode(0x9F26, cryptogram),
            encode(0x9F27, bytes((choice.kind,))),
            encode(0x9F36, atc),
            encode(0x9F6C, choice.ctq),
            encode(0x9F6E, FORM_FACTOR),
        ]
        self._records = {(record.sfi, record.number): record.data for record in profile.records}
        if _offers_authentication(profile, terminal, choice.kind):
            # Version, card's unpredictable number, and the CTQ once more: this copy is the signed one.
            card_data = b"\x01" + self._chip.entropy(4) + choice.ctq
            signature = encode(0x9F4B, self._signed_dynamic_data(atc, terminal, card_data))
            body.append(encode(0x94, AFL_WITH_ODA))
            if profile.sdad_size_bytes <= SDAD_IN_GPO_BYTES_MAX:
                body.append(signature)
                signature = b""
            self._records[DYNAMIC_RECORD] = encode(0x70, signature, encode(0x9F69, card_data))
        else:
            body.append(encode(0x94, AFL_WITHOUT_ODA))
        return encode(0x77, *body)

    def _signed_dynamic_data(self, atc: bytes, terminal: Mapping[int, bytes], card_data: bytes) -> bytes:
        """The fDDA signature: the ATC inside, both sides' data under the hash (EMV Contactless Book C-3, Annex C)."""
        dynamic = bytes((len(atc),)) + atc
        return self._chip.signed_dynamic_data(dynamic, terminal[0x9F37], terminal[0x9F02], terminal[0x5F2A], card_data)

    def _read_record(self, command: Command) -> _Answer:
        """READ RECORD, one record by number (EMV 4.4 Book 3, 6.5.11)."""
        self._require(Step.READ)
        if command.data:
            raise Refused(StatusWord.WRONG_LENGTH)
        sfi, mode = command.p2 >> 3, command.p2 & 0x07
        if mode != 0x04 or command.p1 == 0:
            raise Refused(StatusWord.WRONG_PARAMETERS)
        if all(sfi != file for file, _ in self._records):
            raise Refused(StatusWord.NOT_FOUND)
        record = self._records.get((sfi, command.p1))
        if record is None:
            raise Refused(StatusWord.RECORD_NOT_FOUND)
        return _Answer(record, Step.READ)


def _terminal_data(pdol: bytes, data: bytes) -> dict[int, bytes]:
    """What the PDOL asked for, by tag."""
    if not data.startswith(b"\x83"):
        raise Refused(StatusWord.WRONG_DATA)
    entries = decode_dol(pdol)
    size = sum(length for _, length in entries)
    if len(data) != 2 + size or data[1] != size:
        raise Refused(StatusWord.WRONG_LENGTH)
    values: dict[int, bytes] = {}
    rest = data[2:]
    for tag, length in entries:
        values[tag], rest = rest[:length], rest[length:]
    return values


def _decide(profile: CardProfile, terminal: Mapping[int, bytes]) -> _Choice:
    """The card's own risk management: which cryptogram, and what it asks of the reader (9F6C)."""
    ttq = terminal[0x9F66]
    emv_mode, contact, offline_only = ttq[0] & 0x20, ttq[0] & 0x10, ttq[0] & 0x08
    online_pin, signature = ttq[0] & 0x04, ttq[0] & 0x02
    online_wanted, cvm_required = ttq[1] & 0x80, ttq[1] & 0x40
    if not emv_mode:
        raise Refused(StatusWord.CONDITIONS_NOT_SATISFIED)
    amount, currency = terminal[0x9F02].hex(), terminal[0x5F2A].hex()
    if not (amount.isdecimal() and currency.isdecimal()):
        raise Refused(StatusWord.WRONG_DATA)
    # A refund takes nothing from the cardholder: the card gives its data and no consent.
    if profile.declines or terminal[0x9C] == REFUND:
        return _Choice(CryptogramType.AAC, profile.ctq)
    ctq = profile.ctq
    within_limit = 0 < int(amount) <= profile.offline_limit_minor  # no amount at all asks about the account: online
    go_online = online_wanted or not within_limit or int(currency) != profile.currency
    if cvm_required:
        if online_pin and not offline_only:
            ctq = bytes((ctq[0] | 0x80, ctq[1]))
            go_online = True
        elif signature:
            ctq = bytes((ctq[0] | 0x40, ctq[1]))
        elif contact:
            raise Refused(StatusWord.TRY_ANOTHER_INTERFACE)
        else:
            return _Choice(CryptogramType.AAC, ctq)
    if not go_online:
        return _Choice(CryptogramType.TC, ctq)
    return _Choice(CryptogramType.AAC if offline_only else CryptogramType.ARQC, ctq)


def _offers_authentication(profile: CardProfile, terminal: Mapping[int, bytes], kind: CryptogramType) -> bool:
    """fDDA goes with an offline approval, and with an online request if the reader asks for it (TTQ byte 1 bit 1)."""
    if not profile.aip[0] & 0x20:
        return False
    match kind:
        case CryptogramType.TC:
            return True
        case CryptogramType.ARQC:
            return bool(terminal[0x9F66][0] & 0x01)
        case CryptogramType.AAC:
            return False

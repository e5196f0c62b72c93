"""An EMV application that decides in GENERATE AC (EMV 4.4 Book 3): contact cards of both schemes, contactless M/Chip.

This is what they have in common: SELECT by name, GET PROCESSING OPTIONS, READ RECORD, GET DATA, and the first GENERATE
AC, combined with a signature (CDA) where the terminal asks for it. What may follow on what is the table `_NEXT`;
nothing else changes the state. Directories, and what only a contact card understands, are in the subclasses.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import ClassVar, Final, NamedTuple

from hwsim.cards.apdu import Command, Refused, StatusWord
from hwsim.cards.bertlv import decode_dol, encode
from hwsim.cards.chip import Chip
from hwsim.cards.cryptogram import (
    NOTHING_FOUND,
    CryptogramType,
    Finding,
    Online,
    issuer_application_data,
)
from hwsim.cards.misbehaviour import said
from hwsim.cards.profile import LOG_RECORDS, ApplicationData, CardProfile, Standing

AID_BYTES_MIN: Final = 5  # a RID; less names no application
ICC_NUMBER_BYTES: Final = 8  # ICC dynamic number, 9F4C
LOG_SFI: Final = 11
LOG_FORMAT: Final = bytes.fromhex("9A039F02065F2A029F3602")
REFUND: Final = b"\x20"

_CDA: Final = 0x01  # AIP byte 1
_CDA_REQUESTED: Final = 0x10  # P1 of GENERATE AC
_UPPER_LIMIT: Final = 0x9F23


class State(Enum):
    """How far the conversation has come."""

    IDLE = auto()
    DIRECTORY = auto()
    SELECTED = auto()
    INITIATED = auto()
    ONLINE = auto()  # an ARQC is out
    ANSWERED = auto()  # EXTERNAL AUTHENTICATE has come, which it does once
    DONE = auto()


class Step(Enum):
    """What a command does to the conversation."""

    SELECT_DIRECTORY = auto()
    SELECT_APPLICATION = auto()
    SELECT_BLOCKED = auto()
    READ_DIRECTORY = auto()
    INITIATE = auto()
    READ = auto()
    GET_DATA = auto()
    AUTHENTICATE = auto()
    REQUEST = auto()
    CONCLUDE = auto()
    ANSWER = auto()
    SCRIPT = auto()


_STARTED: Final = (State.INITIATED, State.ONLINE, State.ANSWERED, State.DONE)
_NEXT: Final[Mapping[tuple[State, Step], State]] = {
    **{(state, Step.SELECT_DIRECTORY): State.DIRECTORY for state in State},
    **{(state, Step.SELECT_APPLICATION): State.SELECTED for state in State},
    **{(state, Step.SELECT_BLOCKED): State.IDLE for state in State},  # named, but not entered
    (State.DIRECTORY, Step.READ_DIRECTORY): State.DIRECTORY,
    (State.SELECTED, Step.INITIATE): State.INITIATED,  # once for each selection
    **{(state, Step.READ): state for state in _STARTED},
    **{(state, Step.GET_DATA): state for state in (State.SELECTED, *_STARTED)},
    (State.INITIATED, Step.AUTHENTICATE): State.INITIATED,
    (State.INITIATED, Step.REQUEST): State.ONLINE,
    (State.INITIATED, Step.CONCLUDE): State.DONE,
    (State.ONLINE, Step.ANSWER): State.ANSWERED,
    (State.ONLINE, Step.CONCLUDE): State.DONE,
    (State.ANSWERED, Step.CONCLUDE): State.DONE,
    **{(state, Step.SCRIPT): state for state in (State.ONLINE, State.ANSWERED, State.DONE)},
}


class Answer(NamedTuple):
    """What a command brings, and does."""

    data: bytes
    step: Step
    sw: int = StatusWord.OK


Handler = Callable[[Command], Answer]


class Application(ABC):
    """`execute` takes one command and answers it; `handlers` of a subclass say which commands there are."""

    directory_name: ClassVar[bytes]

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self._state = State.IDLE
        self._handlers = self.handlers()
        self._forget()

    # ---- of the subclasses

    def handlers(self) -> dict[tuple[int, int], Handler]:
        """By CLA and INS."""
        return {
            (0x00, 0xA4): self._select,
            (0x80, 0xA8): self._get_processing_options,
            (0x00, 0xB2): self._read_record,
            (0x80, 0xCA): self._get_data,
            (0x80, 0xAE): self._generate_ac,
        }

    @abstractmethod
    def data(self) -> ApplicationData:
        """The application as this interface shows it."""

    def names(self) -> tuple[bytes, ...]:
        """The application's names, in the order of "next occurrence"."""
        return (self.profile.aid,)

    @abstractmethod
    def directory(self) -> bytes:
        """The FCI of the directory of applications."""

    # ---- what is common

    @property
    def profile(self) -> CardProfile:
        """The card as it is now."""
        return self.chip.profile

    def reset(self) -> None:
        """Power, or field, comes up: nothing is selected any more."""
        self._state = State.IDLE
        self._forget()

    def execute(self, command: Command) -> Answer:
        """Raises `Refused`: state and counter then stay as they are."""
        handler = self._handlers.get((command.cla, command.ins))
        if handler is None:
            known_class = any(command.cla == cla for cla, _ in self._handlers)
            raise Refused(StatusWord.WRONG_INSTRUCTION if known_class else StatusWord.WRONG_CLASS)
        answer = handler(command)
        self._state = _NEXT[self._state, answer.step]
        return answer._replace(data=said(self.profile.misbehaviour, command, answer.data))

    def _require(self, *steps: Step) -> None:
        """At least one of these may be taken now."""
        if all((self._state, step) not in _NEXT for step in steps):
            raise Refused(StatusWord.CONDITIONS_NOT_SATISFIED)

    def _forget(self) -> None:
        """No transaction is under way."""
        self._selected = b""
        self._initiated = b""  # values of the PDOL
        self._first: dict[int, bytes] = {}  # what the first cryptogram is about
        self._first_values = b""  # of CDOL1
        self._findings = NOTHING_FOUND
        self._online: Online | None = None

    def _select(self, command: Command) -> Answer:
        """SELECT by name, which may be the beginning of one (EMV 4.4 Book 1, 11.3)."""
        if command.p1 != 0x04 or command.p2 not in (0x00, 0x02):
            raise Refused(StatusWord.WRONG_PARAMETERS)
        if not command.data:
            raise Refused(StatusWord.WRONG_LENGTH)
        following = command.p2 == 0x02
        if self.profile.standing is Standing.CARD_BLOCKED:
            raise Refused(StatusWord.NOT_SUPPORTED)
        if self.profile.standing is Standing.ABSENT:
            raise Refused(StatusWord.NOT_FOUND)
        if command.data == self.directory_name and not following:
            self._forget()
            return Answer(self.directory(), Step.SELECT_DIRECTORY)
        names = self.names()
        # Next occurrence goes on behind the name that is selected now.
        candidates = names[names.index(self._selected) + 1 if self._selected else len(names) :] if following else names
        found = next((name for name in candidates if name.startswith(command.data)), None)
        if found is None or len(command.data) < AID_BYTES_MIN:
            raise Refused(StatusWord.NOT_FOUND)
        self._forget()
        self._selected = found
        if self.profile.standing is Standing.BLOCKED:
            return Answer(self.application(found), Step.SELECT_BLOCKED, StatusWord.SELECTED_BLOCKED)
        return Answer(self.application(found), Step.SELECT_APPLICATION)

    def application(self, name: bytes) -> bytes:
        """The FCI of the application under this name."""
        pdol = self.data().pdol
        proprietary = encode(
            0xA5,
            encode(0x50, self.profile.label.encode("ascii")),
            encode(0x87, bytes((self.names().index(name) + 1,))),
            encode(0x9F38, pdol) if pdol else b"",
            encode(0x5F2D, self.profile.language.encode("ascii")),
            encode(0xBF0C, encode(0x9F4D, bytes((LOG_SFI, LOG_RECORDS)))),
        )
        return encode(0x6F, encode(0x84, name), proprietary)

    def _get_processing_options(self, command: Command) -> Answer:
        """GET PROCESSING OPTIONS: the transaction begins and is counted (EMV 4.4 Book 3, 6.5.8)."""
        self._require(Step.INITIATE)
        if (command.p1, command.p2) != (0x00, 0x00):
            raise Refused(StatusWord.WRONG_PARAMETERS)
        data = self.data()
        size = dol_size(data.pdol)
        if not command.data.startswith(b"\x83"):
            raise Refused(StatusWord.WRONG_DATA)
        if len(command.data) != 2 + size or command.data[1] != size:
            raise Refused(StatusWord.WRONG_LENGTH)
        self.chip.count()
        self._initiated = command.data[2:]
        if self.profile.online_incomplete:
            self._findings |= Finding.ONLINE_INCOMPLETE
        if self._limit_exceeded():
            self._findings |= Finding.LIMIT_EXCEEDED
        if data.response_format == 1:
            return Answer(encode(0x80, data.aip, data.afl), Step.INITIATE)
        return Answer(encode(0x77, encode(0x82, data.aip), encode(0x94, data.afl)), Step.INITIATE)

    def _read_record(self, command: Command) -> Answer:
        """READ RECORD, one record by number (EMV 4.4 Book 3, 6.5.11)."""
        self._require(Step.READ)
        if command.data:
            raise Refused(StatusWord.WRONG_LENGTH)
        sfi = record_file(command)
        if sfi == LOG_SFI:
            records = dict(enumerate(self.profile.log, start=1))
        else:
            records = {record.number: record.data for record in self.data().records if record.sfi == sfi}
            if not records:
                raise Refused(StatusWord.NOT_FOUND)
        if command.p1 not in records:
            raise Refused(StatusWord.RECORD_NOT_FOUND)
        return Answer(records[command.p1], Step.READ)

    def _get_data(self, command: Command) -> Answer:
        """GET DATA: counters, PIN tries left (the card has no PIN), format of the log (EMV 4.4 Book 3, 6.5.7)."""
        self._require(Step.GET_DATA)
        if command.data:
            raise Refused(StatusWord.WRONG_LENGTH)
        tag = command.p1 << 8 | command.p2
        values = {
            0x9F36: self.chip.atc,
            0x9F13: self.profile.atc_last_online.to_bytes(2, "big"),
            0x9F17: b"\x00",
            0x9F4F: LOG_FORMAT,
        }
        if tag not in values:
            raise Refused(StatusWord.DATA_NOT_FOUND)
        return Answer(encode(tag, values[tag]), Step.GET_DATA)

    def _generate_ac(self, command: Command) -> Answer:
        """GENERATE AC, the first (EMV 4.4 Book 3, 6.5.5 and 9)."""
        self._require(Step.REQUEST)
        asked, combined = self._asked(command)
        values = dol_values(self.data().cdol1, command.data)
        kind = self._decide(asked, values)
        self._first, self._first_values = values, command.data
        reply, cryptogram = self._cryptogram(kind, None, values, command.data, combined=combined)
        if kind is not CryptogramType.ARQC:
            self._log(kind, values)
            return Answer(reply, Step.CONCLUDE)
        self.chip.remember(online_incomplete=True)  # until the second GENERATE AC says otherwise
        self._online = Online(self.profile.cvn, self.chip.atc, values[0x9F37], cryptogram)
        return Answer(reply, Step.REQUEST)

    def _asked(self, command: Command) -> tuple[CryptogramType, bool]:
        """Which cryptogram, and whether with a signature."""
        kind, combined = command.p1 & 0xC0, bool(command.p1 & _CDA_REQUESTED)
        if kind == 0xC0 or command.p1 & ~(0xC0 | _CDA_REQUESTED) or command.p2:
            raise Refused(StatusWord.WRONG_PARAMETERS)
        if combined and not self.data().aip[0] & _CDA:
            raise Refused(StatusWord.WRONG_PARAMETERS)
        return CryptogramType(kind), combined

    def _decide(self, asked: CryptogramType, values: Mapping[int, bytes]) -> CryptogramType:
        """The card's own risk management: never more than the terminal asks for."""
        # A refund takes nothing from the cardholder: the card gives its data and no consent.
        if self.profile.declines or values[0x9C] == REFUND:
            return CryptogramType.AAC
        match asked:
            case CryptogramType.AAC | CryptogramType.ARQC:
                return asked
            case CryptogramType.TC:
                alone = self._within_limit(values) and not self._limit_exceeded()
                return CryptogramType.TC if alone else CryptogramType.ARQC

    def _within_limit(self, values: Mapping[int, bytes]) -> bool:
        """An amount that the card approves by itself, in its own currency."""
        amount, currency = values[0x9F02].hex(), values[0x5F2A].hex()
        if not (amount.isdecimal() and currency.isdecimal()):
            raise Refused(StatusWord.WRONG_DATA)
        return 0 < int(amount) <= self.profile.offline_limit_minor and int(currency) == self.profile.currency

    def _limit_exceeded(self) -> bool:
        """Too many transactions since the last online one, this one included."""
        upper = self.profile.contact.find(_UPPER_LIMIT)
        return upper is not None and self.profile.atc - self.profile.atc_last_online > upper[0]

    def _cryptogram(
        self,
        kind: CryptogramType,
        second: CryptogramType | None,
        objects: Mapping[int, bytes],
        values: bytes,
        *,
        combined: bool,
    ) -> tuple[bytes, bytes]:
        """The reply to GENERATE AC, and the cryptogram in it. `values`: of all CDOLs so far, as they came."""
        profile, data = self.profile, self.data()
        given = kind if second is None else second
        icc_number = self.chip.entropy(ICC_NUMBER_BYTES)
        signed = combined and given is not CryptogramType.AAC  # an AAC is worth nothing: it is never signed
        if signed:
            self._findings |= Finding.CDA_DONE
        iad = issuer_application_data(
            profile.cvn,
            profile.dki,
            kind,
            second=second,
            findings=self._findings,
            icc_number=icc_number[:2] if signed else bytes(2),
            counters=(profile.atc - profile.atc_last_online).to_bytes(8, "big"),
        )
        atc, information = self.chip.atc, bytes((given,))
        cryptogram = self.chip.cryptogram({**objects, 0x82: data.aip, 0x9F36: atc, 0x9F10: iad})
        if signed:
            front = encode(0x9F27, information) + encode(0x9F36, atc)
            back = encode(0x9F10, iad)
            digest = hashlib.sha1(self._initiated + values + front + back, usedforsecurity=False).digest()
            dynamic = bytes((ICC_NUMBER_BYTES,)) + icc_number + information + cryptogram + digest
            signature = encode(0x9F4B, self.chip.signed_dynamic_data(dynamic, objects[0x9F37]))
            return encode(0x77, front, signature, back), cryptogram
        if data.response_format == 1:
            return encode(0x80, information, atc, cryptogram, iad), cryptogram
        parts = ((0x9F27, information), (0x9F36, atc), (0x9F26, cryptogram), (0x9F10, iad))
        return encode(0x77, *(encode(tag, value) for tag, value in parts)), cryptogram

    def _log(self, kind: CryptogramType, values: Mapping[int, bytes]) -> None:
        """What was approved goes into the log (EMV 4.4 Book 3, Annex D)."""
        if kind is CryptogramType.TC:
            own = {0x9F36: self.chip.atc}
            entry = b"".join({**values, **own}[tag] for tag, _ in decode_dol(LOG_FORMAT))
            self.chip.remember(log=(entry, *self.profile.log)[:LOG_RECORDS])


def record_file(command: Command) -> int:
    """The short file identifier in a READ RECORD by record number."""
    if command.p2 & 0x07 != 0x04 or command.p1 == 0:
        raise Refused(StatusWord.WRONG_PARAMETERS)
    return command.p2 >> 3


def dol_size(dol: bytes) -> int:
    return sum(length for _, length in decode_dol(dol))


def dol_values(dol: bytes, data: bytes) -> dict[int, bytes]:
    """What a data object list asked for, by tag."""
    if len(data) != dol_size(dol):
        raise Refused(StatusWord.WRONG_LENGTH)
    values: dict[int, bytes] = {}
    rest = data
    for tag, length in decode_dol(dol):
        values[tag], rest = rest[:length], rest[length:]
    return values

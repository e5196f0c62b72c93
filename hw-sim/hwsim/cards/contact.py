"""A simulated contact card of either scheme (EMV 4.4 Books 1 to 3, card side), over T=0 or T=1.

    select                1PAY.SYS.DDF01 and its records, or names one after the other
    offline               INTERNAL AUTHENTICATE (DDA), VERIFY (there is no PIN), first GENERATE AC, with CDA if asked
    the issuer's answer   EXTERNAL AUTHENTICATE (Visa) or 91 in the second GENERATE AC (Mastercard), script commands
    conclusion            second GENERATE AC: what the card thinks of that answer

Over T=0 the card shows what the protocol has no words for: 61xx and GET RESPONSE where data comes back to a command
that carried some, 6Cxx where Le is not what there is. TPDUs and their procedure bytes are the reader's affair.
"""

from __future__ import annotations

import hmac
from enum import Enum
from typing import ClassVar, Final

from hwsim.cards.apdu import Command, Refused, StatusWord, parse
from hwsim.cards.application import (
    ICC_NUMBER_BYTES,
    Answer,
    Application,
    Handler,
    State,
    Step,
    dol_size,
    dol_values,
    record_file,
)
from hwsim.cards.bertlv import encode
from hwsim.cards.bureau import Entropy
from hwsim.cards.chip import Chip
from hwsim.cards.cryptogram import (
    MAC_BYTES,
    CryptogramType,
    Cvn,
    Finding,
    Online,
    command_mac,
    response_cryptogram,
)
from hwsim.cards.profile import ApplicationData, CardProfile, Standing

PSE_SFI: Final = 1
WRITABLE: Final = (0x9F14, 0x9F23)  # by PUT DATA: the consecutive offline limits
_APPROVALS: Final = (b"00", b"10", b"11")
_UNABLE_ONLINE: Final = (b"Y3", b"Z3")
_CSU_APPROVED: Final = 0x80  # byte 2 of the card status update
_DDA: Final = 0x20  # AIP byte 1
_ISSUER_AUTHENTICATION: Final = 0x04
_PROOF_BYTES_MIN, _PROOF_BYTES_MAX = 8, 16  # tag 91
_READING: Final = (0xB2, 0xCA)  # READ RECORD, GET DATA: nothing goes to the card
_GET_RESPONSE: Final = (0x00, 0xC0)
_SHORT_MAX: Final = 256


class Protocol(Enum):
    """How the card speaks; the value is an answer to reset that says so."""

    T0 = bytes.fromhex("3B6500002063CB6800")
    T1 = bytes.fromhex("3B8401454D5631EA")


class ContactCard(Application):
    """One card. It is powered with `reset` and then asked with `apdu`."""

    directory_name: ClassVar[bytes] = b"1PAY.SYS.DDF01"

    def __init__(self, profile: CardProfile | Chip, entropy: Entropy, protocol: Protocol = Protocol.T0) -> None:
        super().__init__(profile if isinstance(profile, Chip) else Chip(profile, entropy))
        self.protocol = protocol
        self._waiting = b""  # for GET RESPONSE
        self._issuer_approves: bool | None = None  # None: no proof of what the issuer said

    @property
    def atr(self) -> bytes:
        """Answer to reset, the same cold and warm."""
        return self.protocol.value

    def reset(self, cold: bool = True) -> None:
        """Power came up (cold), or the reset line moved: both forget what is under way and nothing else."""
        del cold
        super().reset()
        self._waiting = b""

    def apdu(self, command: bytes) -> bytes:
        """Answer one command. Whatever the bytes are, the response ends in a status word."""
        try:
            match self.protocol:
                case Protocol.T0:
                    return self._exchange_t0(command)
                case Protocol.T1:
                    return self._exchange_t1(command)
        except Refused as refusal:
            return refusal.sw.to_bytes(2, "big")

    # ---- transport (EMV 4.4 Book 1, 9)

    def _exchange_t0(self, command: bytes) -> bytes:
        waiting, self._waiting = self._waiting, b""
        if len(command) < 4:
            raise Refused(StatusWord.WRONG_LENGTH)
        cla, ins, p1, p2 = command[:4]
        p3, data = command[4] if len(command) > 4 else 0, command[5:]
        if (cla, ins) == _GET_RESPONSE:
            return self._get_response(waiting, p3 or _SHORT_MAX, p1 or p2 or data)
        if ins in _READING:
            answer = self.execute(Command(cla, ins, p1, p2, data))
            if (p3 or _SHORT_MAX) != len(answer.data):
                raise Refused(StatusWord.WRONG_LE | len(answer.data) & 0xFF)
            return answer.data + answer.sw.to_bytes(2, "big")
        if len(data) != p3:  # a Le behind the data is a fault: P3 is the only length there is
            raise Refused(StatusWord.WRONG_LENGTH)
        answer = self.execute(Command(cla, ins, p1, p2, data))
        self._waiting = answer.data
        if answer.data and answer.sw == StatusWord.OK:
            return (StatusWord.MORE_DATA | len(answer.data) & 0xFF).to_bytes(2, "big")
        return answer.sw.to_bytes(2, "big")  # data waits behind a warning, too

    def _get_response(self, waiting: bytes, expected: int, wrong: int | bytes) -> bytes:
        if wrong:
            raise Refused(StatusWord.WRONG_PARAMETERS)
        if not waiting:
            raise Refused(StatusWord.CONDITIONS_NOT_SATISFIED)
        if expected > len(waiting):
            self._waiting = waiting
            raise Refused(StatusWord.WRONG_LE | len(waiting))
        self._waiting = waiting[expected:]
        sw = StatusWord.MORE_DATA | len(self._waiting) if self._waiting else StatusWord.OK
        return waiting[:expected] + sw.to_bytes(2, "big")

    def _exchange_t1(self, command: bytes) -> bytes:
        if len(command) == 5 and command[1] in _READING:
            cla, ins, p1, p2, expected = command
            answer = self.execute(Command(cla, ins, p1, p2, b""))
            if expected not in (0, len(answer.data)):
                raise Refused(StatusWord.WRONG_LE | len(answer.data) & 0xFF)
        else:
            answer = self.execute(parse(command))
        return answer.data + answer.sw.to_bytes(2, "big")

    # ---- commands

    def handlers(self) -> dict[tuple[int, int], Handler]:
        return super().handlers() | {
            (0x00, 0x88): self._internal_authenticate,
            (0x00, 0x82): self._external_authenticate,
            (0x00, 0x20): self._verify,
            (0x84, 0x1E): self._block,
            (0x84, 0x18): self._unblock,
            (0x04, 0xDA): self._put_data,
        }

    def data(self) -> ApplicationData:
        return self.profile.contact

    def names(self) -> tuple[bytes, ...]:
        return (self.profile.aid, *self.profile.more_aids)

    def directory(self) -> bytes:
        language = encode(0x5F2D, self.profile.language.encode("ascii"))
        return encode(0x6F, encode(0x84, self.directory_name), encode(0xA5, encode(0x88, bytes((PSE_SFI,))), language))

    def _forget(self) -> None:
        super()._forget()
        self._issuer_approves = None

    def _read_record(self, command: Command) -> Answer:
        """As ever; while the directory is selected, its one record (EMV 4.4 Book 1, 10.1.2)."""
        if self._state is not State.DIRECTORY:
            return super()._read_record(command)
        if command.data:
            raise Refused(StatusWord.WRONG_LENGTH)
        if record_file(command) != PSE_SFI:
            raise Refused(StatusWord.NOT_FOUND)
        if command.p1 != 1:
            raise Refused(StatusWord.RECORD_NOT_FOUND)
        label = encode(0x50, self.profile.label.encode("ascii"))
        entries = (
            encode(0x61, encode(0x4F, name), label, encode(0x87, bytes((priority,))))
            for priority, name in enumerate(self.names(), start=1)
        )
        return Answer(encode(0x70, *entries), Step.READ_DIRECTORY)

    def _internal_authenticate(self, command: Command) -> Answer:
        """INTERNAL AUTHENTICATE: dynamic data authentication (EMV 4.4 Book 2, 6.5)."""
        self._require(Step.AUTHENTICATE)
        data = self.data()
        if (command.p1, command.p2) != (0x00, 0x00):
            raise Refused(StatusWord.WRONG_PARAMETERS)
        if not data.aip[0] & _DDA:
            raise Refused(StatusWord.CONDITIONS_NOT_SATISFIED)
        if len(command.data) != dol_size(data.ddol):
            raise Refused(StatusWord.WRONG_LENGTH)
        dynamic = bytes((ICC_NUMBER_BYTES,)) + self.chip.entropy(ICC_NUMBER_BYTES)
        signature = self.chip.signed_dynamic_data(dynamic, command.data)
        self._findings |= Finding.DDA_DONE
        if data.response_format == 1:
            return Answer(encode(0x80, signature), Step.AUTHENTICATE)
        return Answer(encode(0x77, encode(0x9F4B, signature)), Step.AUTHENTICATE)

    def _verify(self, command: Command) -> Answer:
        """VERIFY: there is no PIN on this card, so no try is left and no key to encipher one for (Book 3, 6.5.12)."""
        self._require(Step.AUTHENTICATE)
        match command.p2:
            case 0x80:
                raise Refused(StatusWord.METHOD_BLOCKED)
            case 0x88:
                raise Refused(StatusWord.DATA_UNUSABLE)
            case _:
                raise Refused(StatusWord.WRONG_PARAMETERS)

    def _external_authenticate(self, command: Command) -> Answer:
        """EXTERNAL AUTHENTICATE: the issuer's proof, once in a transaction (EMV 4.4 Book 3, 6.5.4)."""
        self._require(Step.ANSWER)
        if (command.p1, command.p2) != (0x00, 0x00):
            raise Refused(StatusWord.WRONG_PARAMETERS)
        if not self.data().aip[0] & _ISSUER_AUTHENTICATION:
            raise Refused(StatusWord.CONDITIONS_NOT_SATISFIED)
        if not _PROOF_BYTES_MIN <= len(command.data) <= _PROOF_BYTES_MAX:
            raise Refused(StatusWord.WRONG_LENGTH)
        believed = self._hear_issuer(command.data)
        return Answer(b"", Step.ANSWER, StatusWord.OK if believed else StatusWord.AUTHENTICATION_FAILED)

    def _hear_issuer(self, proof: bytes) -> bool:
        """Check tag 91 against the ARQC that went out; what it says counts only if it is true."""
        profile = self.profile
        match profile.cvn:
            case Cvn.CVN18 | Cvn.CVN22:
                arpc, said = proof[:4], proof[4:8]
                approves = bool(said[1] & _CSU_APPROVED)
            case Cvn.CVN10 | Cvn.CVN16 | Cvn.CVN17 | Cvn.CVN20 | Cvn.CVN21:
                arpc, said = proof[:8], proof[8:10]
                approves = said in _APPROVALS
        believed = not profile.distrusts_issuer
        if profile.card_key is not None:  # a card without the key cannot tell, and pretends
            expected = response_cryptogram(profile.card_key, self._asked_online(), said)
            believed = believed and hmac.compare_digest(expected, arpc)
        if believed:
            self._issuer_approves = approves
        self._findings |= Finding.ISSUER_AUTHENTICATED if believed else Finding.ISSUER_AUTHENTICATION_FAILED
        return believed

    def _generate_ac(self, command: Command) -> Answer:
        """GENERATE AC: the first, or after an ARQC the second (EMV 4.4 Book 3, 10.11)."""
        if self._state not in (State.ONLINE, State.ANSWERED):
            return super()._generate_ac(command)
        asked, combined = self._asked(command)
        if asked is CryptogramType.ARQC:
            raise Refused(StatusWord.CONDITIONS_NOT_SATISFIED)
        values = dol_values(self.data().cdol2, command.data)
        unable = values.get(0x8A) in _UNABLE_ONLINE
        if unable:
            self._findings |= Finding.UNABLE_ONLINE
        elif self._state is State.ONLINE and any(values.get(0x91, b"")):
            self._hear_issuer(values[0x91])
        objects = {**self._first, **values}
        kind = CryptogramType.TC if self._consents(asked, objects, unable=unable) else CryptogramType.AAC
        if not unable and (self._issuer_approves is not None or not self.profile.needs_issuer_authentication):
            self.chip.remember(atc_last_online=self.profile.atc, online_incomplete=False)
        sent = self._first_values + command.data
        reply, _ = self._cryptogram(CryptogramType.ARQC, kind, objects, sent, combined=combined)
        self._log(kind, objects)
        return Answer(reply, Step.CONCLUDE)

    def _consents(self, asked: CryptogramType, objects: dict[int, bytes], *, unable: bool) -> bool:
        """Whether the card, too, approves after the issuer's answer, or without one."""
        profile = self.profile
        heard = not unable and Finding.ISSUER_AUTHENTICATION_FAILED not in self._findings
        if heard and self._issuer_approves is None:
            self._findings |= Finding.ISSUER_AUTHENTICATION_MISSING
            heard = not profile.needs_issuer_authentication
        if asked is not CryptogramType.TC or profile.declines_after_approval or profile.standing is Standing.BLOCKED:
            return False
        if unable:
            return self._within_limit(objects) and not self._limit_exceeded()
        return heard and self._issuer_approves is not False

    # ---- the issuer's commands (EMV 4.4 Book 3, 6.5.1 and 6.5.2; PUT DATA as the schemes have it)

    def _block(self, command: Command) -> Answer:
        """APPLICATION BLOCK."""
        self._unwrapped(command, 0)
        self.chip.remember(standing=Standing.BLOCKED)
        return Answer(b"", Step.SCRIPT)

    def _unblock(self, command: Command) -> Answer:
        """APPLICATION UNBLOCK."""
        self._unwrapped(command, 0)
        self.chip.remember(standing=Standing.ACTIVE)
        return Answer(b"", Step.SCRIPT)

    def _put_data(self, command: Command) -> Answer:
        """PUT DATA: a consecutive offline limit, where the card has one."""
        tag = command.p1 << 8 | command.p2
        if tag not in WRITABLE or self.data().find(tag) is None:
            raise Refused(StatusWord.DATA_NOT_FOUND)
        value = self._unwrapped(command, 1)
        self.chip.remember(contact=self.data().changed(tag, value))
        return Answer(b"", Step.SCRIPT)

    def _unwrapped(self, command: Command, size: int) -> bytes:
        """The data of a command that the issuer has secured with a MAC over it and this transaction's ARQC."""
        self._require(Step.SCRIPT)
        online = self._asked_online()
        value, mac = command.data[:-MAC_BYTES], command.data[-MAC_BYTES:]
        key = self.profile.script_key
        if key is None or not hmac.compare_digest(command_mac(key, online, command.header, value), mac):
            self._findings |= Finding.SCRIPT_FAILED
            raise Refused(StatusWord.WRONG_MAC)
        if len(value) != size or (size == 0 and (command.p1 or command.p2)):
            self._findings |= Finding.SCRIPT_FAILED
            raise Refused(StatusWord.WRONG_LENGTH if len(value) != size else StatusWord.WRONG_PARAMETERS)
        self._findings |= Finding.SCRIPT_RECEIVED
        return value

    def _asked_online(self) -> Online:
        if self._online is None:  # concluded without the issuer, who then has nothing to prove himself with
            raise Refused(StatusWord.CONDITIONS_NOT_SATISFIED)
        return self._online

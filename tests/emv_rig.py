"""Scripted cards (Visa-like, Mastercard-like, inserted), the keys behind them, and a pump: what the EMV tests share.

Everything is written from the books' tables with nothing of the kernel's own code, so that the two cannot share a
mistake. The keys are made here from a fixed seed and open nothing. The PAN is a test number.
"""

from __future__ import annotations

import datetime
import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Protocol

from terminal.emv import contact, entry_point
from terminal.emv.apdu import CardRemoved, Command, Exchange, Response, T
from terminal.emv.authentication import CaKey, CaKeys
from terminal.emv.configuration import CONTACT, Combination, Environment, Limits, Request, Setup
from terminal.emv.outcome import IssuerAnswer, OnlineRequest, Outcome, UiRequest
from terminal.money import EUR, Amount

VISA = bytes.fromhex("A0000000031010")
RID = VISA[:5]
CA_INDEX = 0x92
PAN = "4000001234567899"
DATE = datetime.date(2026, 3, 14)
TIME = datetime.time(15, 9, 26)
UN = bytes.fromhex("11223344")
ATC = bytes.fromhex("0007")
ICC_NUMBER = bytes.fromhex("17C21AAA")
CTQ_PLAIN = bytes.fromhex("0000")
TTQ = bytes.fromhex("36004000")  # EMV, contact chip, online PIN, signature
TTQ_ODA_FOR_ONLINE = bytes.fromhex("37004000")
COMMANDS_MAX = 400  # a kernel that asks for more than this hangs


class Answering(Protocol):
    """Anything that answers commands."""

    def answer(self, command: Command) -> Response: ...


def tlv(tag: str, *values: bytes) -> bytes:
    value = b"".join(values)
    size = len(value)
    length = bytes([size]) if size < 128 else bytes([0x81, size]) if size < 256 else bytes([0x82, *divmod(size, 256)])
    return bytes.fromhex(tag) + length + value


def sha1(data: bytes) -> bytes:
    return hashlib.sha1(data, usedforsecurity=False).digest()


# Keys and certificates (Book 2, tables 1, 3, 4 and 13)


@dataclass(frozen=True)
class RsaKey:
    n: int
    d: int
    e: int = 3

    @property
    def size(self) -> int:
        return (self.n.bit_length() + 7) // 8

    @property
    def modulus(self) -> bytes:
        return self.n.to_bytes(self.size, "big")

    @property
    def exponent(self) -> bytes:
        return self.e.to_bytes((self.e.bit_length() + 7) // 8, "big")

    def sign(self, middle: bytes, also_hashed: bytes, *, head: int = 0x6A, tail: int = 0xBC) -> bytes:
        """Frame, hash and sign: `middle` must fill what head, hash and tail leave."""
        assert len(middle) == self.size - 22
        plain = bytes([head]) + middle + sha1(middle + also_hashed) + bytes([tail])
        return _power(int.from_bytes(plain, "big"), self.d, self.n).to_bytes(self.size, "big")


@lru_cache(maxsize=4096)  # the same card signs the same in most tests
def _power(base: int, exponent: int, modulus: int) -> int:
    return pow(base, exponent, modulus)


def _is_prime(number: int, chance: random.Random) -> bool:
    if any(number % small == 0 for small in (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)):
        return False
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(20):
        power = pow(chance.randrange(2, number - 1), odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


@cache
def rsa_key(name: str, size: int) -> RsaKey:
    """A key of `size` bytes, the same in every run: the name is the seed."""
    chance = random.Random(f"payterm test key {name} {size}")
    bits = size * 4

    def prime() -> int:
        while True:
            number = chance.getrandbits(bits) | 3 << (bits - 2) | 1
            if number % 3 == 2 and _is_prime(number, chance):
                return number

    p, q = prime(), prime()
    return RsaKey(p * q, pow(3, -1, (p - 1) * (q - 1)))


@dataclass(frozen=True)
class Pki:
    """CA, issuer and card, with everything in their certificates that a test may want to be wrong."""

    ca: RsaKey = field(default_factory=lambda: rsa_key("ca", 144))
    issuer: RsaKey = field(default_factory=lambda: rsa_key("issuer", 128))
    icc: RsaKey = field(default_factory=lambda: rsa_key("icc", 112))
    iin: str = PAN[:6]
    pan: str = PAN
    issuer_expiry: str = "1230"  # MMYY
    icc_expiry: str = "1230"
    serial: bytes = bytes.fromhex("00A1B2")
    issuer_kind: int = 2
    icc_kind: int = 4
    hash_algorithm: int = 1
    key_algorithm: int = 1
    rid: bytes = RID

    @property
    def ca_key(self) -> CaKey:
        checksum = sha1(self.rid + bytes([CA_INDEX]) + self.ca.modulus + self.ca.exponent)
        return CaKey(self.rid, CA_INDEX, self.ca.modulus, self.ca.exponent, checksum)

    def objects(self, static_data: bytes = b"") -> dict[str, bytes]:
        """90, 92, 9F32, 9F46, 9F48, 9F47 and 8F."""
        algorithms = bytes([self.hash_algorithm, self.key_algorithm])
        issuer_field, issuer_rest = self._split(self.issuer.modulus, self.ca.size - 36)
        issuer = self.ca.sign(
            bytes([self.issuer_kind])
            + bytes.fromhex(self.iin.ljust(8, "F") + self.issuer_expiry)
            + self.serial
            + algorithms
            + bytes([self.issuer.size, 1])
            + issuer_field,
            issuer_rest + self.issuer.exponent,
        )
        icc_field, icc_rest = self._split(self.icc.modulus, self.issuer.size - 42)
        icc = self.issuer.sign(
            bytes([self.icc_kind])
            + bytes.fromhex(self.pan.ljust(20, "F") + self.icc_expiry)
            + self.serial
            + algorithms
            + bytes([self.icc.size, 1])
            + icc_field,
            icc_rest + self.icc.exponent + static_data,
        )
        found = {
            "8F": bytes([CA_INDEX]),
            "90": issuer,
            "92": issuer_rest,
            "9F32": self.issuer.exponent,
            "9F46": icc,
            "9F48": icc_rest,
            "9F47": self.icc.exponent,
        }
        return {tag: value for tag, value in found.items() if value}

    @staticmethod
    def _split(modulus: bytes, room: int) -> tuple[bytes, bytes]:
        return modulus[:room].ljust(room, b"\xbb"), modulus[room:]

    def sign_dynamic(self, dynamic_data: bytes, terminal_data: bytes, kind: int = 5, hash_algorithm: int = 1) -> bytes:
        middle = bytes([kind, hash_algorithm, len(dynamic_data)]) + dynamic_data
        return self.icc.sign(middle.ljust(self.icc.size - 22, b"\xbb"), terminal_data)

    def sign_static(self, static_data: bytes, *, kind: int = 3, hash_algorithm: int = 1) -> bytes:
        """93, with data authentication code DAC0."""
        middle = bytes([kind, hash_algorithm]) + bytes.fromhex("DAC0")
        return self.issuer.sign(middle.ljust(self.issuer.size - 22, b"\xbb"), static_data)

    def sign_cryptogram(
        self, cid: int, cryptogram: bytes, transaction_data: bytes, un: bytes, more: bytes = b""
    ) -> bytes:
        """9F4B of a combined signature."""
        number = bytes([len(ICC_NUMBER)]) + ICC_NUMBER
        return self.sign_dynamic(number + bytes([cid]) + cryptogram + sha1(transaction_data) + more, un)


# The contactless card


PDOL = bytes.fromhex("9F66049F02069F03069F1A0295055F2A029A039C019F3704")


@dataclass(frozen=True)
class Card:
    """What the card answers. Data objects by tag in hex; None in place of a value leaves the object out."""

    ppse: bytes | None = None
    applications: Mapping[bytes, bytes] = field(default_factory=dict)  # AID: whole FCI
    options: bytes = b""
    records: Mapping[tuple[int, int], bytes] = field(default_factory=dict)
    options_sw: int = 0x9000
    record_sw: int = 0x9000

    def answer(self, command: Command) -> Response:
        match command.ins:
            case 0xA4 if command.data == b"2PAY.SYS.DDF01":
                return Response(self.ppse, 0x9000) if self.ppse is not None else Response(b"", 0x6A82)
            case 0xA4 if command.data in self.applications:
                return Response(self.applications[command.data], 0x9000)
            case 0xA4:
                return Response(b"", 0x6A82)
            case 0xA8:
                return Response(self.options if self.options_sw == 0x9000 else b"", self.options_sw)
            case 0xB2:
                record = self.records.get((command.p2 >> 3, command.p1))
                return Response(b"", 0x6A83) if record is None else Response(record, self.record_sw)
        raise AssertionError(f"a command that no kernel here sends: {command.encode().hex()}")


def directory_entry(aid: bytes, priority: int | None = 1, **more: bytes) -> bytes:
    """One 61 of a PPSE; `more` as tag_9F2A=b"..."."""
    extra = [tlv(name.removeprefix("tag_"), value) for name, value in more.items()]
    rank = b"" if priority is None else tlv("87", bytes([priority]))
    return tlv("61", tlv("4F", aid), tlv("50", b"VISA CREDIT"), rank, *extra)


def ppse(*entries: bytes) -> bytes:
    return tlv("6F", tlv("84", b"2PAY.SYS.DDF01"), tlv("A5", tlv("BF0C", *entries)))


def fci(aid: bytes, pdol: bytes | None = PDOL, *more: bytes) -> bytes:
    asks = [] if pdol is None else [tlv("9F38", pdol)]
    return tlv("6F", tlv("84", aid), tlv("A5", tlv("50", b"VISA CREDIT"), *asks, *more))


def fast_dda_data(amount_minor: int, ctq: bytes = CTQ_PLAIN, version: int = 1) -> tuple[bytes, bytes]:
    """9F69, and what an amount in euro makes of the terminal dynamic data."""
    related = bytes([version]) + bytes.fromhex("CAFEF00D") + ctq
    return related, UN + bytes.fromhex(f"{amount_minor:012d}") + bytes.fromhex("0978") + related


def visa_card(
    changes: Mapping[str, bytes | None] | None = None,
    *,
    kind: str = "ARQC",
    amount_minor: int = 1250,
    pki: Pki | None = None,
    signature: bytes | None = None,
    related: bytes | None = None,
    with_authentication: bool = True,
) -> Card:
    """A card that answers GET PROCESSING OPTIONS with this cryptogram; `changes` replaces or removes data objects."""
    pki = pki or Pki()
    cid = {"AAC": 0x00, "TC": 0x40, "ARQC": 0x80, "RFU": 0xC0}[kind]
    changes = changes or {}
    ctq = changes.get("9F6C", CTQ_PLAIN) or CTQ_PLAIN
    own_related, signed = fast_dda_data(amount_minor, ctq)
    options: dict[str, bytes | None] = {
        "82": bytes.fromhex("2000"),
        "94": bytes.fromhex("08010100" + "10010301") if with_authentication else bytes.fromhex("08010100"),
        "57": bytes.fromhex(f"{PAN}D30122010000012345"),
        "5F34": b"\x01",
        "9F10": bytes.fromhex("06011203") + bytes([0x80 | cid >> 2, 0, 0]),
        "9F26": bytes.fromhex("0102030405060708"),
        "9F27": bytes([cid]),
        "9F36": ATC,
        "9F6C": CTQ_PLAIN,
        "9F6E": bytes.fromhex("20700000"),
        "9F7C": b"closed loop",
    }
    holder: dict[str, bytes | None] = {
        "5A": bytes.fromhex(PAN),
        "5F24": bytes.fromhex("301231"),
        "5F28": bytes.fromhex("0276"),
        "9F07": bytes.fromhex("FFC0"),
    }
    # The first authenticated record holds what the card's certificate vouches for.
    static: dict[str, bytes | None] = {"5F25": bytes.fromhex("200101")}
    static_data = _objects(static, changes)
    certificates: dict[str, bytes | None] = dict(pki.objects(static_data))
    if with_authentication:
        certificates["9F69"] = related or own_related
        certificates["9F4B"] = signature or pki.sign_dynamic(b"\x02" + ATC, signed)
    rest = {tag: certificates.pop(tag) for tag in ("9F46", "9F48", "9F47", "9F69", "9F4B") if tag in certificates}
    known = options | holder | static | certificates | rest
    options |= {tag: value for tag, value in changes.items() if tag not in known}
    return Card(
        ppse=ppse(directory_entry(VISA)),
        applications={VISA: fci(VISA)},
        options=tlv("77", _objects(options, changes)),
        records={
            (1, 1): tlv("70", _objects(holder, changes)),
            (2, 1): tlv("70", static_data),
            (2, 2): tlv("70", _objects(certificates, changes)),
            (2, 3): tlv("70", _objects(rest, changes)),
        },
    )


def _objects(values: Mapping[str, bytes | None], changes: Mapping[str, bytes | None]) -> bytes:
    final = {tag: changes.get(tag, value) for tag, value in values.items()}
    return b"".join(tlv(tag, value) for tag, value in final.items() if value is not None)


# The inserted card, and the Mastercard-like one: both answer GENERATE AC


MASTERCARD = bytes.fromhex("A0000000041010")
CRYPTOGRAMS = (bytes.fromhex("A1A2A3A4A5A6A7A8"), bytes.fromhex("B1B2B3B4B5B6B7B8"))
CIDS = {"AAC": 0x00, "TC": 0x40, "ARQC": 0x80, "RFU": 0xC0}
CHIP_PDOL = bytes.fromhex("9F1A029F3501")
CDOL1 = bytes.fromhex("9F02069F03069F1A0295055F2A029A039C019F37049F34038A02")
CDOL2 = bytes.fromhex("8A02910A95059B029F3704")
CHIP_OBJECTS: dict[str, bytes | None] = {
    "5A": bytes.fromhex(PAN),
    "5F24": bytes.fromhex("301231"),
    "5F25": bytes.fromhex("200101"),
    "5F28": bytes.fromhex("0276"),
    "5F34": b"\x01",
    "9F07": bytes.fromhex("FFC0"),
    "9F08": bytes.fromhex("0002"),
    "9F0D": bytes(5),
    "9F0E": bytes(5),
    "9F0F": bytes(5),
    "9F42": bytes.fromhex("0978"),
    "8C": CDOL1,
    "8D": CDOL2,
    "8E": bytes.fromhex("0000000000000000 1F03"),
    "57": bytes.fromhex(f"{PAN}D30122010000012345"),
}


@dataclass
class ChipCard:
    """A card with a GENERATE AC: data objects by tag in hex, None leaves one out; `kinds` it answers in turn.

    `spoil` is applied to the signature before it is sent. It keeps what was sent to it, as a card does, to sign it.
    """

    aip: bytes = bytes.fromhex("7D00")  # SDA, DDA, CVM, risk management, issuer authentication, CDA
    changes: Mapping[str, bytes | None] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("ARQC", "TC")
    pki: Pki = field(default_factory=Pki)
    aid: bytes = VISA
    pdol: bytes | None = CHIP_PDOL
    files: Mapping[bytes, bytes] | None = None  # what a SELECT of this name finds; by default `aid` and the PSE
    directory: tuple[bytes, ...] | None = None  # records of the PSE; by default one with `aid`
    format_1: bool = False
    answer_objects: Mapping[str, bytes | None] = field(default_factory=dict)  # changes to the answer to GENERATE AC
    spoil: Callable[[bytes], bytes] | None = None
    more_signed: bytes = b""
    unpredictable_number: bytes = UN  # what it signs
    signed_cid: int | None = None  # says one thing in clear and signs another
    data: Mapping[str, bytes] = field(default_factory=dict)  # GET DATA
    sw: Mapping[int, int] = field(default_factory=dict)  # status word by INS
    scripts: list[bytes] = field(default_factory=list)  # what it took of other commands
    _transaction_data: bytes = b""
    _cryptograms: int = 0

    def objects(self) -> dict[str, bytes | None]:
        return {**CHIP_OBJECTS, **self.changes}

    def _record(self, *tags: str, extra: Mapping[str, bytes] | None = None) -> bytes:
        known = {**(extra or {}), **self.changes}
        return b"".join(tlv(tag, value) for tag in tags if (value := known.get(tag)) is not None)

    def records(self) -> dict[tuple[int, int], bytes]:
        static = tlv("5F20", b"TEST/CARD")
        vouched = static + self.aip
        keys = self.pki.objects(vouched) | {
            "93": self.pki.sign_static(vouched),
            "9F49": bytes.fromhex("9F3704"),
            "9F4A": b"\x82",
        }
        named = keys.keys()
        holder = {tag: value for tag, value in self.objects().items() if tag not in named}
        found = {
            (1, 1): tlv("70", *(tlv(tag, value) for tag, value in holder.items() if value is not None)),
            (2, 1): tlv("70", static),
            (2, 2): tlv("70", self._record("8F", "90", "92", "9F32", extra=keys)),
            (2, 3): tlv("70", self._record("9F46", "9F48", "9F47", "9F49", "9F4A", extra=keys)),
            (2, 4): tlv("70", self._record("93", extra=keys)),
        }
        records = self.directory if self.directory is not None else (tlv("70", directory_entry(self.aid)),)
        return found | {(10, number): record for number, record in enumerate(records, start=1)}

    def answer(self, command: Command) -> Response:  # noqa: PLR0911
        sw = self.sw.get(command.ins, 0x9000)
        if sw != 0x9000:
            return Response(b"", sw)
        match command.ins:
            case 0xA4:
                return self._select(command)
            case 0xA8:
                self._transaction_data = command.data[2:]
                self._cryptograms = 0
                body = {"82": self.aip, "94": bytes.fromhex("08010100 10010401")}
                return Response(tlv("77", *(tlv(tag, value) for tag, value in body.items())), 0x9000)
            case 0xB2:
                record = self.records().get((command.p2 >> 3, command.p1))
                return Response(b"", 0x6A83) if record is None else Response(record, 0x9000)
            case 0x88:
                number = bytes([len(ICC_NUMBER)]) + ICC_NUMBER
                signature = self.pki.sign_dynamic(number, command.data)
                return Response(tlv("80", self.spoil(signature) if self.spoil else signature), 0x9000)
            case 0xCA:
                value = self.data.get(f"{command.p1:02X}{command.p2:02X}")
                return Response(b"", 0x6A88) if value is None else Response(value, 0x9000)
            case 0xAE:
                return self._generate_ac(command)
        self.scripts.append(command.encode())
        return Response(b"", 0x9000)

    def _select(self, command: Command) -> Response:
        files = self.files
        if files is None:
            pse = tlv("6F", tlv("84", b"1PAY.SYS.DDF01"), tlv("A5", tlv("88", b"\x0a")))
            files = {
                b"1PAY.SYS.DDF01": pse,
                b"2PAY.SYS.DDF01": ppse(directory_entry(self.aid)),
                self.aid: fci(self.aid, self.pdol),
            }
        if command.p2 == 0 and command.data in files:
            return Response(files[command.data], 0x9000)
        return Response(b"", 0x6A82)

    def _generate_ac(self, command: Command) -> Response:
        kind = self.kinds[min(self._cryptograms, len(self.kinds) - 1)]
        cryptogram = CRYPTOGRAMS[self._cryptograms]
        self._cryptograms += 1
        self._transaction_data += command.data
        cid, iad = CIDS[kind], bytes.fromhex("06011203A00000")
        if self.format_1:
            return Response(tlv("80", bytes([cid]), ATC, cryptogram, iad), 0x9000)
        body: dict[str, bytes | None] = {"9F27": bytes([cid]), "9F36": ATC, "9F10": iad}
        if command.p1 & 0x10 and kind != "AAC":
            clear = b"".join(tlv(tag, value) for tag, value in self._changed(body).items() if value is not None)
            signed = cid if self.signed_cid is None else self.signed_cid
            signature = self.pki.sign_cryptogram(
                signed, cryptogram, self._transaction_data + clear, self.unpredictable_number, self.more_signed
            )
            body["9F4B"] = self.spoil(signature) if self.spoil else signature
        else:
            body["9F26"] = cryptogram
        objects = [tlv(tag, value) for tag, value in self._changed(body).items() if value is not None]
        return Response(tlv("77", *objects), 0x9000)

    def _changed(self, body: Mapping[str, bytes | None]) -> dict[str, bytes | None]:
        return {**body, **self.answer_objects}


class OverT0:
    """The same card over T=0: no data with a command that has data, lengths must be right, Le after data is unknown."""

    def __init__(self, card: Answering) -> None:
        self._card, self._waiting = card, b""

    def answer(self, command: Command) -> Response:
        if command.ins == 0xC0:
            return self._hand_over(self._waiting, command)
        if command.data and command.le is not None:
            return Response(b"", 0x6700)
        response = self._card.answer(command)
        if not response.data:
            return response
        if command.data:
            self._waiting = response.data
            return Response(b"", 0x6100 | len(response.data) & 0xFF)
        return self._hand_over(response.data, command)

    @staticmethod
    def _hand_over(data: bytes, command: Command) -> Response:
        if command.le != len(data) & 0xFF:
            return Response(b"", 0x6C00 | len(data) & 0xFF)
        return Response(data, 0x9000)


class OverT1:
    """The same card over T=1: without Le it sends nothing."""

    def __init__(self, card: Answering) -> None:
        self._card = card

    def answer(self, command: Command) -> Response:
        response = self._card.answer(command)
        return response if command.le is not None else Response(b"", response.sw)


# The terminal


TERMINAL = {
    0x9F1A: bytes.fromhex("0276"),
    0x9F33: bytes.fromhex("E0F8C8"),
    0x9F35: b"\x22",
    0x9F40: bytes.fromhex("6000F0A001"),
    0x9F4E: b"CORNER SHOP",
}


def visa(ttq: bytes | None = TTQ, aid: bytes = VISA, kernel: int = 3, **limits: object) -> Combination:
    return Combination(aid, kernel, replace(Limits(), **limits), {} if ttq is None else {0x9F66: ttq})


def setup(*combinations: Combination, pki: Pki | None = None) -> Setup:
    return Setup(TERMINAL, combinations or (visa(),), CaKeys([(pki or Pki()).ca_key]))


def request(amount_minor: int = 1250, transaction_type: int = 0, other_minor: int = 0) -> Request:
    return Request(Amount(amount_minor, EUR), DATE, TIME, transaction_type, other_minor)


@dataclass
class Attempt:
    """What came of one card in the field."""

    outcome: Outcome
    commands: list[Command]
    shown: list[UiRequest]


def attempt(
    card: Answering,
    with_setup: Setup | None = None,
    with_request: Request | None = None,
    *,
    removed_at: int | None = None,
    kernels: Mapping[int, entry_point.Kernel] = entry_point.KERNELS,
) -> Attempt:
    """Run entry point against `card`; `removed_at` counts commands from 0: that one finds no card."""
    shown: list[UiRequest] = []
    environment = Environment(unpredictable_number=lambda: UN, notify=shown.append)
    exchange = entry_point.run(with_setup or setup(), with_request or request(), environment, kernels)
    outcome, commands = pump(exchange, card, removed_at)
    return Attempt(outcome, commands, shown)


def pump(exchange: Exchange[T], card: Answering, removed_at: int | None = None) -> tuple[T, list[Command]]:
    commands: list[Command] = []
    try:
        command = next(exchange)
        while True:
            commands.append(command)
            assert len(commands) <= COMMANDS_MAX, "the kernel does not come to an end"
            if removed_at == len(commands) - 1:
                command = exchange.throw(CardRemoved())
            else:
                command = exchange.send(card.answer(command))
    except StopIteration as stop:
        outcome: T = stop.value
        return outcome, commands


# The whole way of an inserted card


def inserted(aid: bytes = VISA, tags: Mapping[int, bytes] | None = None, **limits: object) -> Combination:
    """Settings for contact: version 0002, floor limit 100.00, no action codes."""
    limits = {"terminal_floor": 10_000, **limits}
    return Combination(aid, CONTACT, replace(Limits(), **limits), {0x9F09: bytes.fromhex("0002"), **(tags or {})})


def insert(
    card: Answering,
    combination: Combination | None = None,
    with_request: Request | None = None,
    *,
    removed_at: int | None = None,
    terminal: Mapping[int, bytes] | None = None,
    **environment: object,
) -> Attempt:
    """Run the contact kernel against `card`."""
    shown: list[UiRequest] = []
    lent = Environment(unpredictable_number=lambda: UN, notify=shown.append, **environment)  # type: ignore[arg-type]
    with_setup = replace(
        setup(combination or inserted()), terminal={**TERMINAL, **(terminal or {})}, ca_keys=CaKeys([Pki().ca_key])
    )
    outcome, commands = pump(contact.run(with_setup, with_request or request(), lent), card, removed_at)
    return Attempt(outcome, commands, shown)


def complete(
    outcome: Outcome, card: Answering, answer: IssuerAnswer | None, removed_at: int | None = None
) -> tuple[Outcome, list[Command]]:
    """Give an online request the host's answer."""
    assert isinstance(outcome, OnlineRequest)
    assert outcome.resume is not None
    return pump(outcome.resume(answer), card, removed_at)

"""A scripted Visa-like card, the keys and certificates behind it, and a pump: what the EMV tests share.

Everything is written from the books' tables with nothing of the kernel's own code, so that the two cannot share a
mistake. The keys are made here from a fixed seed and open nothing. The PAN is a test number.
"""

from __future__ import annotations

import datetime
import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from terminal.emv import entry_point
from terminal.emv.apdu import CardRemoved, Command, Exchange, Response
from terminal.emv.authentication import CaKey, CaKeys
from terminal.emv.configuration import Combination, Environment, Limits, Request, Setup
from terminal.emv.outcome import Outcome, UiRequest
from terminal.money import EUR, Amount

VISA = bytes.fromhex("A0000000031010")
RID = VISA[:5]
CA_INDEX = 0x92
PAN = "4000001234567899"
DATE = datetime.date(2026, 3, 14)
TIME = datetime.time(15, 9, 26)
UN = bytes.fromhex("11223344")
ATC = bytes.fromhex("0007")
CTQ_PLAIN = bytes.fromhex("0000")
TTQ = bytes.fromhex("36004000")  # EMV, contact chip, online PIN, signature
TTQ_ODA_FOR_ONLINE = bytes.fromhex("37004000")
COMMANDS_MAX = 400  # a kernel that asks for more than this hangs


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
        return pow(int.from_bytes(plain, "big"), self.d, self.n).to_bytes(self.size, "big")


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

    @property
    def ca_key(self) -> CaKey:
        checksum = sha1(RID + bytes([CA_INDEX]) + self.ca.modulus + self.ca.exponent)
        return CaKey(RID, CA_INDEX, self.ca.modulus, self.ca.exponent, checksum)

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


# The card


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
    card: Card,
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


def pump(exchange: Exchange[Outcome], card: Card, removed_at: int | None = None) -> tuple[Outcome, list[Command]]:
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
        outcome: Outcome = stop.value
        return outcome, commands

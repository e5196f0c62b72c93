"""What the kernels cost in processor time, without any card: BER-TLV, a certificate chain, a whole transaction.

Data objects are parsed in turn with those who do the same in Python (pyemv, ber-tlv, and python-emv where it is
installed: it pins old versions of what we use, `pip install --no-deps emv`). A chain has no peer that does it; it is
set beside the three modular powers that nobody can leave out. Transactions are those of an honest card; its own time
is taken off.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import ber_tlv.tlv  # type: ignore[import-untyped,unused-ignore]
import pyemv.tlv

from hwsim.cards.bertlv import encode
from hwsim.cards.bureau import Bureau, Scheme
from hwsim.cards.card import Card
from hwsim.cards.personalise import personalise
from terminal.clock import system_entropy
from terminal.emv import authentication, contact, entry_point, tlv
from terminal.emv.apdu import Command, Exchange, Response
from terminal.emv.authentication import CaKey, CaKeys
from terminal.emv.configuration import CONTACT, Combination, Environment, Limits, Request, Setup
from terminal.emv.outcome import OdaStatus, Outcome
from terminal.money import EUR, Amount
from tests.bench.report import Row, Section, measured
from tests.emv_rig import DATE, ICC_NUMBER, RID, TERMINAL, TIME, UN, Pki, rsa_key

ROUNDS: Final = 30
PARSES: Final = 400  # a round
CHAINS: Final = 40
TRANSACTIONS: Final = 10

_OBJECTS: Final = {  # a record as cards have them; none of it is of a real card
    0x5F20: b"TEST/CARD HOLDER".hex(), 0x5F24: "301231", 0x5F25: "200101", 0x5F28: "0276", 0x5F34: "01",
    0x8C: "9F02069F03069F1A0295055F2A029A039C019F3704", 0x8D: "91108A0295059F37049F4C08",
    0x8E: "000000000000000042031E031F03", 0x9F07: "FFC0", 0x9F08: "0002", 0x9F0D: "B050808000", 0x9F0E: "0000000000",
    0x9F0F: "B070809800", 0x9F42: "0978", 0x5F30: "0201", 0x9F4A: "82", 0x9F1F: "30" * 10,
}  # fmt: skip
_RECORD_BYTES: Final = 200


def _record() -> bytes:
    body = b"".join(encode(tag, bytes.fromhex(value)) for tag, value in _OBJECTS.items())
    return encode(0x70, body, encode(0x9F48, bytes(_RECORD_BYTES - 3 - len(body) - 3)))  # what is left of a key


RECORD: Final = _record()


def run(place: Path) -> Section:
    """All figures of this benchmark."""
    del place
    return Section("emv", "the kernels' processor time", [*_parsing(), *_chain(), *_transactions()], _NOTES)


_NOTES: Final = [
    "goals: TLV no slower than pyemv's; a DDA chain 1984/1408/1408 bits, e = 3, 150 us; a CDA tap at 1408 bits, 2 ms.",
    "a transaction's time is the kernel's alone: the card's, whose signatures cost more, is taken off.",
]


def _timed(act: Callable[[], object], times: int) -> float:
    """Microseconds of one."""
    begun = time.perf_counter_ns()
    for _ in range(times):
        act()
    return (time.perf_counter_ns() - begun) / times / 1000


def _parsing() -> list[Row]:
    if len(RECORD) != _RECORD_BYTES:
        raise RuntimeError("the record has another length than it says")
    peers: dict[str, Callable[[], object]] = {
        "pyemv": lambda: pyemv.tlv.decode(RECORD),
        "ber-tlv": lambda: ber_tlv.tlv.Tlv.parse(RECORD, True),
    }
    try:
        structures: Any = importlib.import_module("emv.protocol.structures")
    except ImportError:
        pass
    else:
        peers["python-emv"] = lambda: structures.TLV.unmarshal(RECORD)
    ours: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(ROUNDS):
        ours.append(_timed(lambda: tlv.parse(RECORD), PARSES))
        for name, parse in peers.items():
            theirs[name].append(_timed(parse, PARSES))
    rows = [measured("TLV: a record of 200 bytes", ours, "us", peer=theirs["pyemv"], against="pyemv (goal 1.0)")]
    return rows + [measured(f"  {name}", took, "us", peer=ours, against="ours") for name, took in theirs.items()]


def _chain() -> list[Row]:
    """CA key of 1984 bits, issuer's and card's of 1408: down to a dynamic signature."""
    pki = Pki(rsa_key("ca", 248), rsa_key("issuer", 176), rsa_key("icc", 176))
    static, terminal_data = bytes(120), UN
    found = {int(tag, 16): value for tag, value in pki.objects(static).items()}
    objects = found | {0x5A: bytes.fromhex(pki.pan)}
    trust = authentication.Trust(CaKeys([pki.ca_key]), frozenset(), DATE)
    signature = pki.sign_dynamic(bytes((len(ICC_NUMBER),)) + ICC_NUMBER, terminal_data)

    def chain() -> bytes:
        key = authentication.card_key(objects, RID, static, trust)
        return authentication.dda(key, signature, terminal_data)

    if chain() != ICC_NUMBER:
        raise RuntimeError("the chain does not hold: there is nothing to measure")
    powers = [(int.from_bytes(found[0x90], "big"), pki.ca), (int.from_bytes(found[0x9F46], "big"), pki.issuer)]
    powers.append((int.from_bytes(signature, "big"), pki.icc))
    numbers = [(signed, int.from_bytes(key.modulus, "big")) for signed, key in powers]

    def bare() -> None:
        for signed, modulus in numbers:
            pow(signed, 3, modulus)

    ours, limit = [], []
    for _ in range(ROUNDS):
        ours.append(_timed(chain, CHAINS))
        limit.append(_timed(bare, CHAINS))
    return [
        measured("DDA chain 1984/1408/1408, e = 3", ours, "us", peer=limit, against="its three powers (goal 150 us)"),
        measured("  three modular powers", limit, "us"),
    ]


def _transactions() -> list[Row]:
    """Whole transactions, contactless with CDA and fast DDA at 1408 bits, contact with CDA."""
    rows = []
    for what, scheme, tapped in (
        ("kernel 2: a CDA tap, keys of 1408 bits", Scheme.MASTERCARD, True),
        ("kernel 3: a fast DDA tap, 1408 bits", Scheme.VISA, True),
        ("contact: to the first cryptogram, 1408 bits", Scheme.MASTERCARD, False),
    ):
        bureau = Bureau.create(system_entropy, scheme=scheme, ca_key_bits=1408, issuer_key_bits=1408)
        card = Card(
            personalise(bureau, system_entropy, icc_key_bits=1152 if scheme is Scheme.VISA else 1408), system_entropy
        )
        setup = _setup(bureau)
        took = [_transaction(setup, card, tapped=tapped) for _ in range(ROUNDS * TRANSACTIONS)]
        rows.append(measured(what, took[TRANSACTIONS:], "ms"))
    return rows


def _setup(bureau: Bureau) -> Setup:
    key = bureau.ca_public_key
    kernel = 2 if bureau.scheme is Scheme.MASTERCARD else 3
    limit = bytes.fromhex("000000099999")
    of_kernel_2 = dict.fromkeys((14647587, 14647588, 14647589, 14647590), limit) | {0xDF811F: b"\x08"}
    aid = bureau.rid + b"\x10\x10"
    return Setup(
        TERMINAL,
        (
            Combination(aid, kernel, Limits(ttq=bytes.fromhex("37004000")), of_kernel_2 if kernel == 2 else {}),
            Combination(aid, CONTACT, Limits(terminal_floor=10_000), {}),
        ),
        CaKeys([CaKey(key.rid, key.index, key.modulus, key.exponent, key.checksum)]),
    )


def _transaction(setup: Setup, card: Card, *, tapped: bool) -> float:
    """Milliseconds of the kernel's own in one."""
    environment = Environment(lambda: system_entropy(4), lambda _: None, random_percent=lambda: 99)
    request = Request(Amount(1250, EUR), DATE, TIME)
    side: Any = card.contactless if tapped else card.contact
    side.reset()
    started: Exchange[Outcome] = (entry_point.run if tapped else contact.run)(setup, request, environment)
    spent, answer = 0, None
    try:
        while True:
            begun = time.thread_time_ns()
            command: Command = next(started) if answer is None else started.send(answer)
            spent += time.thread_time_ns() - begun
            answer = Response.decode(side.apdu(command.encode()))
    except StopIteration as end:
        spent += time.thread_time_ns() - begun
        outcome = end.value
    card_read = getattr(outcome, "card", None)
    if card_read is None or card_read.oda.status is not OdaStatus.OK:
        raise RuntimeError(f"{outcome}: there is nothing to measure")
    return spent / 1e6

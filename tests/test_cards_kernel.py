"""Every card of the rack against the terminal's kernels and its own issuer: two implementations that share no code.

A table says what each card comes to, in front of a terminal with a host and of one without.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Generator
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import pytest
from cards_rig import make_bureaus, seeded

from hwsim.cards.bertlv import decode, encode
from hwsim.cards.bureau import Bureau, Scheme
from hwsim.cards.card import Card
from hwsim.cards.contact import Protocol as Transmission
from hwsim.cards.designs import REVOKED_SERIAL
from hwsim.cards.personalise import rack
from hwsim.cards.profile import CardProfile
from hwsim.issuer import Authorisation, Issuer, MemoryCardBook
from terminal.emv import contact, entry_point
from terminal.emv.apdu import Command, Response
from terminal.emv.authentication import CaKey, CaKeys, RevokedCertificate
from terminal.emv.configuration import CONTACT, Combination, Environment, Limits, Request, Setup
from terminal.emv.outcome import Approved, CardRead, IssuerAnswer, OdaStatus, OnlineRequest, Outcome
from terminal.money import EUR, Amount

TODAY = datetime.date(2024, 6, 14)
SEALED = (
    0x57, 0x5A, 0x5F24, 0x5F34, 0x82, 0x84, 0x95, 0x9A, 0x9C, 0x5F2A, 0x9F02, 0x9F03, 0x9F10, 0x9F1A, 0x9F26, 0x9F27,
    0x9F33, 0x9F36, 0x9F37, 0x9F39,
)  # fmt: skip
AIDS = {"A0000000031010": 3, "A0000000041010": 2}
T = TypeVar("T")


class Answering(Protocol):
    def apdu(self, command: bytes) -> bytes: ...


@pytest.fixture(scope="module")
def bureaus() -> dict[Scheme, Bureau]:
    return make_bureaus()


@pytest.fixture(scope="module")
def cards(bureaus: dict[Scheme, Bureau]) -> dict[str, CardProfile]:
    return rack(bureaus, seeded())


@pytest.fixture
def issuer(bureaus: dict[Scheme, Bureau], cards: dict[str, CardProfile]) -> Issuer:
    book = MemoryCardBook()
    for each in cards.values():
        book.enrol(each)
    return Issuer(bureaus[Scheme.VISA].imk_ac, book, lambda: TODAY)


@pytest.fixture(scope="module")
def setup(bureaus: dict[Scheme, Bureau]) -> Setup:
    """Attended, no CVM but signature, CDA, DDA; floor limit 100.00 on contact."""
    contactless = [
        Combination(
            bytes.fromhex(aid), kernel, Limits(contactless_transaction=50_000, ttq=bytes.fromhex("36000000")), tags
        )
        for aid, kernel in AIDS.items()
        for tags in [
            {0xDF8117: b"\x00", 0xDF8118: b"\x28", 0xDF8119: b"\x08", 0xDF811F: b"\x08", 0xDF811B: b"\xb0"}
            if kernel == 2
            else {}
        ]
    ]
    inserted = [Combination(bytes.fromhex(aid), CONTACT, Limits(terminal_floor=10_000), {}) for aid in AIDS]
    return Setup(
        terminal={
            0x9F1A: b"\x02\x76", 0x9F33: bytes.fromhex("2028C8"), 0x9F40: bytes.fromhex("6000000000"), 0x9F35: b"\x22",
        },
        combinations=(*contactless, *inserted),
        ca_keys=CaKeys(
            CaKey(key.rid, key.index, key.modulus, key.exponent, key.checksum)
            for key in (bureau.ca_public_key for bureau in bureaus.values())
        ),
        revoked=frozenset(
            RevokedCertificate(bureau.rid, bureau.ca_index, bytes.fromhex(REVOKED_SERIAL))
            for bureau in bureaus.values()
        ),
    )  # fmt: skip


def pump(exchange: Generator[Command, Response, T], card: Answering) -> T:
    try:
        command = next(exchange)
        for _ in range(200):
            command = exchange.send(Response.decode(card.apdu(command.encode())))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError("the kernel never ends")


def environment(seed: int = 7) -> Environment:
    chance = random.Random(seed)
    return Environment(lambda: chance.randbytes(4), lambda _: None, random_percent=lambda: 99)


def request(amount_minor: int) -> Request:
    return Request(Amount(amount_minor, EUR), TODAY, datetime.time(12, 0))


def tap(setup: Setup, card: Card, amount_minor: int = 1250) -> Outcome:
    card.contactless.reset()
    return pump(entry_point.run(setup, request(amount_minor), environment()), card.contactless)


def dip(setup: Setup, card: Card, amount_minor: int = 1250) -> Outcome:
    card.contact.reset(cold=True)
    return pump(contact.run(setup, request(amount_minor), environment()), card.contact)


def record(read: CardRead) -> bytes:
    return b"".join(encode(tag, read.tags[tag]) for tag in SEALED if tag in read.tags)


def told(answer: Authorisation) -> IssuerAnswer:
    """What payment makes of the host's issuer data."""
    scripts: dict[int, list[bytes]] = {0x71: [], 0x72: []}
    rest = answer.scripts
    while rest:
        size = 2 + rest[1]
        scripts[rest[0]].append(rest[2:size])
        rest = rest[size:]
    return IssuerAnswer(
        answer.response_code.encode(),
        answer.issuer_authentication_data or None,
        tuple(scripts[0x71]),
        tuple(scripts[0x72]),
    )


def word(outcome: Outcome) -> str:
    return type(outcome).__name__ + (f" {outcome.reason}" if hasattr(outcome, "reason") else "")


def oda(outcome: Any) -> OdaStatus:
    read: CardRead = outcome.card
    return read.oda.status


def complete(card: Card, issuer: Issuer, asked: Outcome) -> tuple[str, str]:
    """The host's code, and what the inserted card makes of it."""
    assert isinstance(asked, OnlineRequest), word(asked)
    assert asked.resume is not None
    answer = issuer.authorise(record(asked.card))
    return answer.response_code, word(pump(asked.resume(told(answer)), card.contact))


NONE, OK, FAILED = OdaStatus.NOT_PERFORMED, OdaStatus.OK, OdaStatus.FAILED
# Tapped: outcome, what its authentication came to, the issuer's code. Inserted: the same, and the end.
RACK: dict[str, tuple[str, OdaStatus | None, str | None, str, OdaStatus | None, str | None, str | None]] = {
    "visa-debit": ("OnlineRequest", NONE, "00", "OnlineRequest", OK, "00", "Approved"),
    "visa-credit": ("Approved", OK, "00", "OnlineRequest", OK, "00", "Approved"),  # inserted for the first time
    "mastercard-debit": ("OnlineRequest", OK, "00", "OnlineRequest", OK, "00", "Approved"),
    "mastercard-credit": ("OnlineRequest", OK, "00", "Approved", OK, None, None),
    "two-names": ("OnlineRequest", NONE, "00", "OnlineRequest", OK, "00", "Approved"),
    "indifferent": ("OnlineRequest", NONE, "00", "OnlineRequest", OK, "00", "Approved"),
    "no-fdda": ("OnlineRequest", NONE, "00", "OnlineRequest", NONE, "00", "Approved"),
    "broken-certificate": ("OnlineRequest", NONE, "00", "OnlineRequest", FAILED, "00", "Approved"),
    "wrong-key": ("OnlineRequest", NONE, "63", "OnlineRequest", OK, "63", "Declined host_declined"),
    "emulator": ("OnlineRequest", NONE, "63", "OnlineRequest", FAILED, "63", "Declined host_declined"),
    "expired": ("OnlineRequest", NONE, "54", "OnlineRequest", OK, "54", "Declined host_declined"),
    "declines": ("Declined card_declined", NONE, "05", "Declined card_declined", OK, None, None),
    "declines-after-approval": ("OnlineRequest", NONE, "00", "OnlineRequest", OK, "00", "Declined card_declined"),
    "distrusts-issuer": ("OnlineRequest", NONE, "00", "OnlineRequest", OK, "00", "Declined card_declined"),
    "mastercard-declines": ("Declined card_declined", NONE, "05", "Declined card_declined", NONE, None, None),
    "mastercard-declines-after-approval": (
        "OnlineRequest", OK, "00", "OnlineRequest", OK, "00", "Declined card_declined",
    ),
    "mastercard-distrusts-issuer": ("OnlineRequest", OK, "00", "OnlineRequest", OK, "00", "Declined card_declined"),
    "mastercard-wrong-key": ("OnlineRequest", OK, "63", "OnlineRequest", OK, "63", "Declined host_declined"),
    "mastercard-emulator": ("EndApplication oda_failed", None, None, "Declined oda_failed", FAILED, None, None),
    "mastercard-broken-certificate": (
        "EndApplication oda_failed", None, None, "Declined terminal_declined", FAILED, None, None,
    ),
    "blocked": (
        "EndApplication no_common_application", None, None, "EndApplication application_blocked", None, None, None,
    ),
    # Cards that break the books, one way each.
    "certificate-expired": ("OnlineRequest", NONE, "00", "OnlineRequest", FAILED, "00", "Approved"),
    "mastercard-certificate-expired": (
        "EndApplication oda_failed", None, None, "Declined terminal_declined", FAILED, None, None,
    ),
    "revoked": ("OnlineRequest", NONE, "00", "OnlineRequest", FAILED, "00", "Approved"),
    "mastercard-revoked": (
        "EndApplication oda_failed", None, None, "Declined terminal_declined", FAILED, None, None,
    ),
    "card-blocked": (
        "EndApplication no_common_application", None, None, "EndApplication card_blocked", None, None, None,
    ),
    "wrong-length": ("EndApplication parse_error", None, None, "EndApplication parse_error", None, None, None),
    "duplicated-tag": ("EndApplication duplicate_data", None, None, "EndApplication duplicate_data", None, None, None),
    "mastercard-duplicated-tag": (
        "EndApplication duplicate_data", None, None, "EndApplication duplicate_data", None, None, None,
    ),
    "missing-data": ("EndApplication missing_data", None, None, "EndApplication missing_data", None, None, None),
    "mastercard-missing-data": (
        "EndApplication missing_data", None, None, "EndApplication missing_data", None, None, None,
    ),
    "absurd-length": ("EndApplication parse_error", None, None, "EndApplication parse_error", None, None, None),
    "mastercard-absurd-length": (
        "EndApplication parse_error", None, None, "EndApplication parse_error", None, None, None,
    ),
    "afl-loop": ("EndApplication duplicate_data", None, None, "EndApplication duplicate_data", None, None, None),
    "mastercard-afl-loop": (
        "EndApplication duplicate_data", None, None, "EndApplication duplicate_data", None, None, None,
    ),
    "endless-afl": ("EndApplication parse_error", None, None, "EndApplication parse_error", None, None, None),
    "overreaches": ("OnlineRequest", NONE, "00", "Approved", OK, None, None),  # it was asked for that: see below
    "mastercard-overreaches": (
        "EndApplication card_error", None, None, "Declined oda_failed", FAILED, None, None,  # signed as it was
    ),
    "stalls": ("OnlineRequest", NONE, "00", "OnlineRequest", OK, "00", "Approved"),  # it is the reader that it stalls
    "not-supported": (
        "EndApplication no_common_application", None, None, "EndApplication no_common_application", None, None, None,
    ),
}  # fmt: skip


def test_the_table_names_every_card(cards: dict[str, CardProfile]) -> None:
    assert set(RACK) == set(cards)


@pytest.mark.parametrize("transmission", Transmission)
@pytest.mark.parametrize("name", RACK)
def test_what_each_card_comes_to(
    setup: Setup, cards: dict[str, CardProfile], issuer: Issuer, name: str, transmission: Transmission
) -> None:
    card = Card(cards[name], seeded(), transmission)
    tapped, tapped_oda, tapped_code, inserted, inserted_oda, inserted_code, end = RACK[name]
    outcome: Any = tap(setup, card)
    assert word(outcome) == tapped
    if tapped_oda is not None:
        assert (oda(outcome), issuer.authorise(record(outcome.card)).response_code) == (tapped_oda, tapped_code)
    outcome = dip(setup, card)
    assert word(outcome) == inserted
    if inserted_oda is not None:
        assert oda(outcome) is inserted_oda
    if end is not None:
        assert complete(card, issuer, outcome) == (inserted_code, end)


@pytest.mark.parametrize(
    ("name", "end"), [("overreaches", "EndApplication card_error"), ("visa-debit", "OnlineRequest")]
)
def test_more_than_was_asked_for(setup: Setup, cards: dict[str, CardProfile], name: str, end: str) -> None:
    """Over the floor limit the host is wanted: a card that approves then is not believed (Book 3, 9.3)."""
    assert word(dip(setup, Card(cards[name], seeded()), 15_000)) == end


@pytest.mark.parametrize("name", ["visa-debit", "visa-credit", "mastercard-debit", "mastercard-credit"])
@pytest.mark.parametrize(
    ("amount_minor", "code", "end"),
    [
        (10_050, "00", "Approved"),
        (10_051, "51", "Declined host_declined"),
        (10_071, "00", "Approved"),
        (10_072, "00", "Approved"),
        (10_073, "00", "Approved"),
        (10_074, "00", "Approved"),
        (10_075, "00", "Declined card_declined"),
        (10_076, "00", "Declined card_declined"),
        (10_077, "00", "Approved"),
        (10_091, "00", "Declined card_declined"),
        (10_092, "00", "Declined card_declined"),
    ],
)
def test_every_amount_that_means_something(
    setup: Setup, cards: dict[str, CardProfile], issuer: Issuer, *, name: str, amount_minor: int, code: str, end: str
) -> None:
    card = Card(cards[name], seeded())
    assert complete(card, issuer, dip(setup, card, amount_minor)) == (code, end)
    blocked = amount_minor in (10_073, 10_075)
    assert (word(dip(setup, card, amount_minor)) == "EndApplication application_blocked") == blocked


def test_without_a_host_the_card_decides(setup: Setup, cards: dict[str, CardProfile]) -> None:
    for name, amount_minor, end in (
        ("visa-debit", 1250, "Declined"),
        ("mastercard-credit", 2501, "Declined"),  # over its own limit: it says no
        ("mastercard-credit", 2500, "Approved"),
    ):
        card = Card(cards[name], seeded())
        outcome = dip(setup, card, amount_minor)
        if isinstance(outcome, OnlineRequest):
            assert outcome.resume is not None
            outcome = pump(outcome.resume(None), card.contact)
        assert word(outcome).split()[0] == end


def test_offline_approvals_are_advised_and_stand(setup: Setup, cards: dict[str, CardProfile], issuer: Issuer) -> None:
    for name in ("visa-credit", "mastercard-credit"):
        card = Card(replace(cards[name], atc=1, atc_last_online=1), seeded())  # has been online once
        outcome = dip(setup, card, 1251)
        assert isinstance(outcome, Approved)
        answer = issuer.authorise(record(outcome.card))
        assert (answer.response_code, answer.issuer_authentication_data, answer.scripts) == ("00", b"", b"")


def test_the_counter_is_one_for_taps_and_dips(setup: Setup, cards: dict[str, CardProfile], issuer: Issuer) -> None:
    card = Card(cards["mastercard-debit"], seeded())
    for atc in range(1, 7):
        outcome: Any = tap(setup, card) if atc % 2 else dip(setup, card)
        assert outcome.card.atc == atc
        assert issuer.authorise(record(outcome.card)).response_code == "00"
    assert decode(record(outcome.card))[0x9F39] == b"\x05"

"""The issuer: believes genuine cards, and nobody else; answers the same request the same way."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyemv import cvn, tlv

from hwsim.cards.cryptogram import CryptogramType, Cvn
from hwsim.cards.personalise import Bureau, CardProfile, Entropy, laboratory_pan, personalise
from hwsim.cards.visa import VARIANTS, VisaCard
from hwsim.issuer import Issuer, MemoryCardBook, Reason

SEED = 20240613
TODAY = date(2024, 6, 13)
OLD_DES = pytest.mark.filterwarnings("ignore:.*TripleDES:cryptography.utils.CryptographyDeprecationWarning")
SELECT_AID = bytes.fromhex("00A4040007A000000003101000")
Record = dict[str, bytes]


def seeded() -> Entropy:
    """The same bytes in every run."""
    return random.Random(SEED).randbytes


@pytest.fixture(scope="module")
def bureau() -> Bureau:
    return Bureau.create(seeded())


@pytest.fixture(scope="module")
def profile(bureau: Bureau) -> CardProfile:
    return personalise(bureau, seeded(), offline_limit_minor=500)


@pytest.fixture
def book(profile: CardProfile) -> MemoryCardBook:
    book = MemoryCardBook()
    book.enrol(profile)
    return book


@pytest.fixture
def issuer(bureau: Bureau, book: MemoryCardBook) -> Issuer:
    return Issuer(bureau.imk_ac, book, lambda: TODAY)


def tap(card: VisaCard, amount_minor: int = 1250, *, kind: str = "00", un: str = "11223344") -> Record:
    """One purchase up to the online record, as a contactless kernel puts it together."""
    terminal = {
        "9F66": "27000000", "9F02": f"{amount_minor:012d}", "9F03": "00" * 6, "9F1A": "0276", "95": "00" * 5,
        "5F2A": "0978", "9A": "240613", "9C": kind, "9F37": un,
    }  # fmt: skip
    values = bytes.fromhex("".join(terminal.values()))
    card.reset()
    assert card.apdu(SELECT_AID).endswith(b"\x90\x00")
    answer = card.apdu(bytes.fromhex("80A80000238321") + values + b"\x00")
    assert answer.endswith(b"\x90\x00")
    (started,) = tlv.decode(answer[:-2]).values()
    own = {tag: bytes(started[tag]) for tag in ("9F26", "9F27", "82", "9F36", "5F34", "9F10", "57", "9F6E")}
    return own | {tag: bytes.fromhex(value) for tag, value in terminal.items() if tag != "9F66"} | {"9F39": b"\x07"}


def encoded(record: Record) -> bytes:
    return bytes(tlv.encode(record))


def insert(profile: CardProfile) -> VisaCard:
    return VisaCard(profile, seeded())


@pytest.mark.parametrize("version", Cvn)
def test_a_genuine_request_is_approved(bureau: Bureau, version: Cvn) -> None:
    profile = personalise(bureau, seeded(), pan=laboratory_pan(version), cvn=version)
    book = MemoryCardBook()
    book.enrol(profile)
    answer = Issuer(bureau.imk_ac, book, lambda: TODAY).authorise(encoded(tap(insert(profile))))
    assert (answer.approved, answer.response_code, answer.text) == (True, "00", "approved")
    assert answer.authorisation_code is not None
    assert len(answer.authorisation_code) == 6
    request = answer.verification.request
    assert request is not None
    assert (answer.verification.pan, answer.verification.atc) == (profile.pan, 1)
    assert (request.amount_minor, request.currency) == (1250, 978)
    assert request.application_data.kind is CryptogramType.ARQC


PEER: dict[Cvn, Any] = {Cvn.CVN10: cvn.VisaCVN10, Cvn.CVN18: cvn.VisaCVN18, Cvn.CVN22: cvn.VisaCVN22}


@OLD_DES
@pytest.mark.parametrize("version", Cvn)
@pytest.mark.parametrize(("amount_minor", "code", "csu"), [(1250, "00", "00800000"), (1251, "51", "00000000")])
def test_the_response_cryptogram_is_what_another_implementation_makes(
    bureau: Bureau, version: Cvn, amount_minor: int, code: str, csu: str
) -> None:
    profile = personalise(bureau, seeded(), cvn=version)
    book = MemoryCardBook()
    book.enrol(profile)
    record = tap(insert(profile), amount_minor)
    answer = Issuer(bureau.imk_ac, book, lambda: TODAY).authorise(encoded(record))
    peer = PEER[version](bureau.imk_ac, bureau.imk_ac, bureau.imk_ac, profile.pan.digits, profile.psn)
    if version is Cvn.CVN10:
        expected = peer.generate_arpc(record["9F26"], code.encode()) + code.encode()
    else:
        expected = peer.generate_arpc(record["9F26"], record["9F36"], bytes.fromhex(csu)) + bytes.fromhex(csu)
    assert answer.issuer_authentication_data == expected


def flipped(record: Record, tag: str) -> Record:
    return record | {tag: record[tag][:-1] + bytes((record[tag][-1] ^ 0x01,))}


@pytest.mark.parametrize(
    "tag", ["9F02", "9F03", "9F1A", "95", "5F2A", "9A", "9C", "9F37", "82", "9F36", "9F10", "9F26"]
)
def test_whatever_is_changed_the_cryptogram_tells(issuer: Issuer, profile: CardProfile, tag: str) -> None:
    record = tap(insert(profile))
    forged = issuer.authorise(encoded(flipped(record, tag)))
    assert forged.verification.reason is Reason.WRONG_CRYPTOGRAM
    assert (forged.approved, forged.authorisation_code, forged.issuer_authentication_data) == (False, None, b"")
    assert issuer.authorise(encoded(record)).approved  # the forgery has not used up the counter


def test_another_card_s_cryptogram_is_refused(bureau: Bureau, book: MemoryCardBook, profile: CardProfile) -> None:
    other = personalise(bureau, seeded(), pan=laboratory_pan(2))
    book.enrol(other)
    issuer = Issuer(bureau.imk_ac, book, lambda: TODAY)
    record = tap(insert(profile)) | {"57": other.track2}
    assert issuer.verify(encoded(record)).reason is Reason.WRONG_CRYPTOGRAM
    assert issuer.verify(encoded(tap(insert(profile)) | {"5F34": b"\x02"})).reason is Reason.UNKNOWN_CARD


def test_another_bank_s_key_finds_nothing_genuine(book: MemoryCardBook, profile: CardProfile) -> None:
    stranger = Issuer(bytes(range(16)), book, lambda: TODAY)
    assert stranger.verify(encoded(tap(insert(profile)))).reason is Reason.WRONG_CRYPTOGRAM


@pytest.mark.parametrize("variant", ["emulator", "wrong-key"])
def test_a_card_without_the_issuer_s_key_is_refused(issuer: Issuer, profile: CardProfile, variant: str) -> None:
    pretender = VARIANTS[variant](profile, seeded())
    answer = issuer.authorise(encoded(tap(insert(pretender))))
    assert (answer.response_code, answer.text) == ("63", "security violation")


@pytest.mark.parametrize("variant", ["no-fdda", "broken-certificate"])
def test_offline_faults_do_not_concern_the_issuer(issuer: Issuer, profile: CardProfile, variant: str) -> None:
    assert issuer.authorise(encoded(tap(insert(VARIANTS[variant](profile, seeded()))))).approved


def test_a_repeated_request_gets_the_same_answer_and_a_reused_counter_none(
    issuer: Issuer, profile: CardProfile
) -> None:
    record = encoded(tap(insert(profile)))
    assert issuer.authorise(record) == issuer.authorise(record)
    # The same card file presented twice: a clone with the true key, and the counter of the original.
    clone = issuer.authorise(encoded(tap(insert(profile), un="55667788")))
    assert (clone.verification.reason, clone.response_code) == (Reason.REPLAYED_COUNTER, "94")
    card = insert(replace(profile, atc=1))
    assert issuer.authorise(encoded(tap(card, un="55667788"))).approved


@pytest.mark.parametrize(
    ("amount_minor", "code"),
    [(1200, "00"), (1205, "05"), (51, "00"), (1251, "51"), (1257, "57"), (1261, "61"), (5100, "00"), (10_001, "61")],
)
def test_amounts_decide(bureau: Bureau, profile: CardProfile, amount_minor: int, code: str) -> None:
    book = MemoryCardBook()
    book.enrol(profile, limit_minor=10_000)
    issuer = Issuer(bureau.imk_ac, book, lambda: TODAY)
    # Up to 5.00 this card approves on its own: such a sale stands, whatever its last digits.
    assert issuer.authorise(encoded(tap(insert(profile), amount_minor))).response_code == code


def test_a_blocked_account_and_a_declining_card_are_declined(
    issuer: Issuer, book: MemoryCardBook, profile: CardProfile
) -> None:
    declining = VARIANTS["declines"](profile, seeded())
    answer = issuer.authorise(encoded(tap(insert(declining))))
    assert (answer.verification.ok, answer.response_code, answer.issuer_authentication_data) == (True, "05", b"")
    book.enrol(profile, blocked=True)
    assert issuer.authorise(encoded(tap(insert(replace(profile, atc=5))))).response_code == "62"


def test_a_refund_needs_no_consent_of_the_card(issuer: Issuer, book: MemoryCardBook, profile: CardProfile) -> None:
    card = insert(profile)
    assert issuer.authorise(encoded(tap(card, 1251, kind="20"))).approved
    book.enrol(profile, blocked=True)
    assert not issuer.authorise(encoded(tap(card, 1251, kind="20"))).approved


@pytest.mark.parametrize(("today", "reason"), [((2030, 12, 31), Reason.GENUINE), ((2031, 1, 1), Reason.EXPIRED)])
def test_a_card_is_good_through_the_last_day_of_its_month(
    bureau: Bureau, book: MemoryCardBook, profile: CardProfile, today: tuple[int, int, int], reason: Reason
) -> None:
    issuer = Issuer(bureau.imk_ac, book, lambda: date(*today))
    assert issuer.verify(encoded(tap(insert(profile)))).reason is reason


CONTRADICTIONS: dict[str, Callable[[Record], Record]] = {
    "another PAN beside the track": lambda record: record | {"5A": bytes.fromhex(laboratory_pan(9).digits)},
    "a plain type that promises more": lambda record: record | {"9F27": b"\x40"},
    "a longer validity": lambda record: record | {"57": bytes.fromhex(record["57"].hex().replace("d3012", "d3112"))},
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradicting_data_is_refused(issuer: Issuer, profile: CardProfile, name: str) -> None:
    record = CONTRADICTIONS[name](tap(insert(profile)))
    assert issuer.verify(encoded(record)).reason is Reason.INCONSISTENT
    agreeing = tap(insert(profile)) | {"5A": bytes.fromhex(profile.pan.digits)}
    assert issuer.verify(encoded(agreeing)).ok


def test_unknown_cards_are_refused(bureau: Bureau, profile: CardProfile) -> None:
    answer = Issuer(bureau.imk_ac, MemoryCardBook(), lambda: TODAY).authorise(encoded(tap(insert(profile))))
    assert (answer.response_code, answer.verification.pan) == ("14", profile.pan)


REQUIRED = ["9F02", "9F03", "9F1A", "95", "5F2A", "9A", "9C", "9F37", "82", "9F36", "9F10", "9F26", "57"]


@pytest.mark.parametrize("tag", REQUIRED)
def test_incomplete_or_misshapen_requests_are_format_errors(issuer: Issuer, profile: CardProfile, tag: str) -> None:
    record = tap(insert(profile))
    broken = [{name: value for name, value in record.items() if name != tag}, record | {tag: b""}]
    if tag != "57":  # its discretionary data is the issuer's own and may have any length
        broken.append(record | {tag: record[tag][:-1]})
    for each in broken:
        assert issuer.authorise(encoded(each)).response_code == "30"
    assert issuer.authorise(encoded(record) + encoded({tag: record[tag]})).response_code == "30"  # doubled
    assert issuer.authorise(encoded(record)[:-1]).response_code == "30"


@given(data=st.binary(max_size=200), at=st.integers(0, 200), bit=st.integers(0, 7))
def test_nothing_raises_and_nothing_forged_is_approved(
    forge: tuple[Issuer, bytes], data: bytes, at: int, bit: int
) -> None:
    issuer, genuine = forge
    assert not issuer.authorise(data).approved
    at %= len(genuine)
    forged = genuine[:at] + bytes((genuine[at] ^ (1 << bit),)) + genuine[at + 1 :]
    answer = issuer.authorise(forged)
    if answer.approved:  # only data that no cryptogram covers may differ
        covered = {tag: value for tag, value in tlv.decode(forged).items() if tag in REQUIRED and tag != "57"}
        assert covered.items() <= tlv.decode(genuine).items()
        assert answer.verification.pan == issuer.authorise(genuine).verification.pan


@pytest.fixture(scope="module")
def forge(bureau: Bureau, profile: CardProfile) -> tuple[Issuer, bytes]:
    book = MemoryCardBook()
    book.enrol(profile)
    return Issuer(bureau.imk_ac, book, lambda: TODAY), encoded(tap(insert(profile)))


def test_no_representation_shows_the_account_number(issuer: Issuer, profile: CardProfile) -> None:
    answer = issuer.authorise(encoded(tap(insert(profile))))
    assert profile.pan.digits not in repr(answer)
    assert f"Pan(...{profile.pan.digits[-4:]})" in repr(answer)

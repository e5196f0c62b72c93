"""The issuer: believes genuine cards, and nobody else; answers the same request the same way."""

from __future__ import annotations

import functools
import operator
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from typing import Any

import cards_rig
import pytest
from cards_rig import OLD_DES, Visit, make_bureaus
from hypothesis import given
from hypothesis import strategies as st
from pyemv import cvn, tlv

from hwsim.cards import bertlv, designs
from hwsim.cards.bureau import Bureau, Entropy, Scheme
from hwsim.cards.contact import ContactCard
from hwsim.cards.cryptogram import (
    MCHIP_VERSIONS,
    VISA_VERSIONS,
    CryptogramType,
    Cvn,
    Finding,
    issuer_application_data,
    read_issuer_application_data,
)
from hwsim.cards.mastercard import MastercardCard
from hwsim.cards.personalise import personalise
from hwsim.cards.profile import CardProfile, Standing, laboratory_pan
from hwsim.cards.variants import VARIANTS
from hwsim.cards.visa import VisaCard
from hwsim.host.decide import decide
from hwsim.host.messages import Authorisation
from hwsim.issuer import ARPC_AMOUNTS, MAGIC_AMOUNTS, SCRIPT_AMOUNTS, Issuer, MemoryCardBook, Reason

SEED = 20240613
TODAY = date(2024, 6, 13)
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


@pytest.mark.parametrize("version", VISA_VERSIONS)
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
@pytest.mark.parametrize("version", VISA_VERSIONS)
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
        # Flat, as the issuer reads it: a changed tag may have become that of a template.
        covered = {tag: value for tag, value in bertlv.decode(forged).items() if f"{tag:X}" in REQUIRED and tag != 0x57}
        assert covered.items() <= bertlv.decode(genuine).items()
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


# ---- both schemes, both interfaces


@pytest.fixture(scope="module")
def bureaus() -> dict[Scheme, Bureau]:
    return make_bureaus()


@pytest.fixture(scope="module")
def cards(bureaus: dict[Scheme, Bureau]) -> dict[str, CardProfile]:
    names = ("visa-debit", "visa-credit", "mastercard-debit", "mastercard-credit")
    visa, mastercard = bureaus[Scheme.VISA], bureaus[Scheme.MASTERCARD]
    made = {
        name: personalise(bureaus[design.scheme], cards_rig.seeded(), design)
        for name in names
        for design in [designs.load(name)]
    }
    others = [(visa, each, 30) for each in VISA_VERSIONS] + [(mastercard, each, 40) for each in MCHIP_VERSIONS]
    for bureau, version, serial in others:
        pan = laboratory_pan(serial + version, bureau.iin)
        made[version.name] = personalise(bureau, cards_rig.seeded(), pan=pan, cvn=version)
    return made


@pytest.fixture
def bank(bureaus: dict[Scheme, Bureau], cards: dict[str, CardProfile]) -> Issuer:
    """One issuer for all of them: the bureaus share its master key."""
    book = MemoryCardBook()
    for each in cards.values():
        book.enrol(each)
    return Issuer(bureaus[Scheme.MASTERCARD].imk_ac, book, lambda: TODAY)


def asked(begun: Visit, answer: Record, *, contact: bool = True, **values: str) -> bytes:
    """The online record of a card that decides in GENERATE AC."""
    terminal = ("9F02", "9F03", "9F1A", "95", "5F2A", "9A", "9C", "9F37")
    record = {tag: bytes.fromhex((cards_rig.VALUES | dict(begun.values) | values)[tag]) for tag in terminal}
    record |= {tag: begun.found[tag] for tag in ("82", "57", "5A", "5F34", "5F24")}
    record |= {tag: answer[tag] for tag in ("9F26", "9F27", "9F36", "9F10")}
    return encoded(record | {"9F39": b"\x05" if contact else b"\x07"})


def dip(profile: CardProfile, amount_minor: int = 1250, **values: str) -> tuple[Visit, Record]:
    """A contact card up to its ARQC."""
    begun = Visit.begin(ContactCard(profile, cards_rig.seeded()), profile, **{"9F02": f"{amount_minor:012d}"}, **values)
    return begun, begun.generate(cards_rig.ARQC)


def deliver(begun: Visit, proof: bytes, scripts: bytes, template: str) -> list[str]:
    """Bring proof and scripts to the card; the status words of the scripts in this template."""
    if template == "71" and begun.found["82"][0] & 0x04 and proof:
        begun.card.apdu(cards_rig.case4(begun.card, "00820000", proof))
    return [cards_rig.sw(begun.card.apdu(bytes(command))) for command in commands(scripts, template)]


def commands(scripts: bytes, template: str) -> list[bytes]:
    found: list[bytes] = []
    rest = scripts
    while rest:
        body = rest[2 : 2 + rest[1]]
        if rest[0] == int(template, 16):
            found.append(bytes(tlv.decode(body)["86"]))
        rest = rest[2 + rest[1] :]
    return found


def conclude(begun: Visit, proof: bytes, p1: int = cards_rig.TC) -> int:
    in_list = {"91": proof.hex()} if proof and not begun.found["82"][0] & 0x04 else {}
    return begun.generate(p1, "8D", **in_list)["9F27"][0]


EVERY_VERSION = pytest.mark.parametrize("version", [*VISA_VERSIONS, *MCHIP_VERSIONS], ids=lambda each: each.name)


@OLD_DES
@EVERY_VERSION
@pytest.mark.parametrize(("amount_minor", "code", "kind"), [(1250, "00", 0x40), (1251, "51", 0x00)])
def test_a_contact_card_and_its_issuer_believe_each_other(
    bureaus: dict[Scheme, Bureau],
    cards: dict[str, CardProfile],
    bank: Issuer,
    version: Cvn,
    *,
    amount_minor: int,
    code: str,
    kind: int,
) -> None:
    profile = cards[version.name]
    begun, request = dip(profile, amount_minor)
    answer = bank.authorise(asked(begun, request))
    assert (answer.verification.reason, answer.response_code, answer.scripts) == (Reason.GENUINE, code, b"")
    expected = cards_rig.peer_proof(bureaus[profile.scheme], profile, request, approve=code == "00")
    assert answer.issuer_authentication_data == expected
    deliver(begun, expected, b"", "71")
    assert conclude(begun, expected) == kind


@EVERY_VERSION
@pytest.mark.parametrize("tag", ["9F02", "9F03", "9F1A", "95", "5F2A", "9A", "9C", "9F37", "82", "9F36", "9F26"])
def test_whatever_is_changed_in_a_contact_request_the_cryptogram_tells(
    cards: dict[str, CardProfile], bank: Issuer, version: Cvn, tag: str
) -> None:
    begun, request = dip(cards[version.name])
    record = asked(begun, request)
    forged = flipped({str(each): bytes(value) for each, value in tlv.decode(record).items()}, tag)
    assert bank.verify(encoded(forged)).reason is Reason.WRONG_CRYPTOGRAM
    assert bank.verify(record).ok


def test_what_9f10_says_is_under_the_cryptogram(cards: dict[str, CardProfile], bank: Issuer) -> None:
    begun, request = dip(cards["CVN21"])
    covered = [bank.verify(asked(begun, request | {"9F10": changed_at(request["9F10"], at)})).ok for at in range(18)]
    # Key index, date and number of the signature are not; version, results and counters are.
    assert [at for at, believed in enumerate(covered) if believed] == [0, 8, 9]


def changed_at(value: bytes, at: int) -> bytes:
    return value[:at] + bytes((value[at] ^ 0x01,)) + value[at + 1 :]


@pytest.mark.parametrize("name", ["mastercard-debit", "mastercard-credit"])
def test_a_contactless_mastercard_is_believed(cards: dict[str, CardProfile], bank: Issuer, name: str) -> None:
    profile = cards[name]
    begun = Visit.begin(MastercardCard(profile, cards_rig.seeded()), profile)
    begun.key = cards_rig.modulus(profile)
    request = begun.generate(cards_rig.ARQC | cards_rig.CDA)
    answer = bank.authorise(asked(begun, request, contact=False))
    assert (answer.approved, answer.verification.pan) == (True, profile.pan)
    assert len(answer.issuer_authentication_data) == 10


@pytest.mark.parametrize("name", ["visa-credit", "mastercard-credit"])
def test_offline_approvals_stand(cards: dict[str, CardProfile], bank: Issuer, name: str) -> None:
    profile = cards[name]
    card = ContactCard(profile, cards_rig.seeded())
    begun = Visit.begin(card, profile, **{"9F02": "000000001251"})
    answer = bank.authorise(asked(begun, begun.generate(cards_rig.TC)))
    assert (answer.approved, answer.issuer_authentication_data, answer.scripts) == (True, b"", b"")
    # Unable to go online: TC (Y3) or AAC (Z3) of the second GENERATE AC.
    for p1, code, response in ((cards_rig.TC, b"Y3", "00"), (cards_rig.AAC, b"Z3", "05")):
        begun = Visit.begin(card, profile, **{"9F02": "000000001251"})
        begun.generate(cards_rig.ARQC)
        late = begun.generate(p1, "8D", **{"8A": code.hex()})
        assert bank.authorise(asked(begun, late)).response_code == response


# What each amount brings: status words of the scripts before and after the second GENERATE AC, and that one's type.
DELIVERIES = {
    71: (["9000"], [], 0x40),
    72: ([], ["9000"], 0x40),
    73: ([], ["9000"], 0x40),
    74: (["6988"], [], 0x40),
    75: (["9000"], [], 0x00),
    76: (["9000"], ["9000"], 0x00),
    77: ([], ["6988", "9000"], 0x40),
}


@OLD_DES
@pytest.mark.parametrize("name", ["CVN10", "CVN18", "CVN22", "CVN16", "CVN21"])
@pytest.mark.parametrize("cents", SCRIPT_AMOUNTS)
def test_scripts_by_amount(
    bureaus: dict[Scheme, Bureau], cards: dict[str, CardProfile], bank: Issuer, name: str, cents: int
) -> None:
    # A card with limits to be written: of the credit design, whatever its cryptogram.
    profile = cards[name]
    credit = {Scheme.VISA: "visa-credit", Scheme.MASTERCARD: "mastercard-credit"}[profile.scheme]
    profile = replace(profile, contact=cards[credit].contact, icc_key=cards[credit].icc_key)
    begun, request = dip(profile, 1200 + cents)
    record = {str(tag): bytes(value) for tag, value in tlv.decode(asked(begun, request)).items()}
    record |= {"57": profile.track2, "5A": bytes.fromhex(profile.pan.digits)}  # the records are the credit card's
    answer = bank.authorise(encoded(record))
    assert answer.approved
    before, after, kind = DELIVERIES[cents]
    proof = answer.issuer_authentication_data
    assert deliver(begun, proof, answer.scripts, "71") == before
    assert conclude(begun, proof) == kind
    assert deliver(begun, proof, answer.scripts, "72") == after
    assert isinstance(begun.card, ContactCard)
    held = begun.card.profile
    assert held.standing is (Standing.BLOCKED if cents in (73, 75) else Standing.ACTIVE)
    assert held.contact.find(0x9F23) == {71: b"\x09", 72: b"\x09", 77: b"\x0a"}.get(cents, b"\x05")
    if cents == 73:
        (block,) = commands(answer.scripts, "72")
        assert block == cards_rig.peer_command(bureaus[profile.scheme], profile, request, "841E0000")


def test_scripts_and_faulty_proofs_are_for_contact_cards_that_ask(cards: dict[str, CardProfile], bank: Issuer) -> None:
    assert len({*SCRIPT_AMOUNTS, *ARPC_AMOUNTS, *MAGIC_AMOUNTS}) == 7 + 2 + 4  # no amount means two things
    for cents in (*SCRIPT_AMOUNTS, *ARPC_AMOUNTS):
        begun, request = dip(replace(cards["visa-debit"], atc=cents), 1200 + cents)
        contactless = bank.authorise(asked(begun, request, contact=False))
        assert (contactless.scripts, len(contactless.issuer_authentication_data)) == (b"", 8), cents
    begun = Visit.begin(
        ContactCard(replace(cards["visa-credit"], atc=50, atc_last_online=50), cards_rig.seeded()),
        cards["visa-credit"],
        **{"9F02": "000000001273"},
    )
    assert bank.authorise(asked(begun, begun.generate(cards_rig.TC))).scripts == b""


def test_a_declined_request_brings_no_script(bureaus: dict[Scheme, Bureau], cards: dict[str, CardProfile]) -> None:
    book = MemoryCardBook()
    book.enrol(cards["visa-debit"], blocked=True)
    begun, request = dip(cards["visa-debit"], 1271)
    answer = Issuer(bureaus[Scheme.VISA].imk_ac, book, lambda: TODAY).authorise(asked(begun, request))
    assert (answer.response_code, len(answer.issuer_authentication_data), answer.scripts) == ("62", 8, b"")


@pytest.mark.parametrize("name", ["visa-debit", "mastercard-debit"])
@pytest.mark.parametrize("amount_minor", [1291, 1292])
def test_an_approval_without_a_true_proof_is_not_taken_by_the_card(
    cards: dict[str, CardProfile], bank: Issuer, name: str, amount_minor: int
) -> None:
    begun, request = dip(cards[name], amount_minor)
    answer = bank.authorise(asked(begun, request))
    assert answer.approved
    assert (answer.issuer_authentication_data == b"") == (amount_minor == 1292)
    deliver(begun, answer.issuer_authentication_data, b"", "71")
    assert conclude(begun, answer.issuer_authentication_data) == 0x00


# ---- what the host tells the terminal


def envelope(amount: int = 1250, currency: str = "EUR") -> Authorisation:
    return Authorisation(
        v=1, transaction="8f2f9c1e-4c59-4c39-9d0a-6a3a1f0f7d11", terminal="T-0001", merchant="M-0001", epoch=1,
        number=1, kind="sale", amount=amount, currency=currency, opened_at=0, clock_synchronised=True, sequence=1,
        deferred=False, kernel=0, scheme=None, oda=None, cvm=None, host_key="0" * 16, sealed="AA",
    )  # fmt: skip


def test_the_host_s_answer_carries_what_the_card_waits_for(cards: dict[str, CardProfile], bank: Issuer) -> None:
    begun, request = dip(cards["visa-debit"], 1276)
    decision = decide(envelope(1276), asked(begun, request), bank)
    objects = tlv.decode(decision.issuer_data)
    assert decision.approved
    assert list(objects) == ["8A", "91", "71", "72"]
    assert (objects["8A"], len(objects["91"])) == (b"00", 8)
    assert objects["71"]["9F18"] == b"\x00\x00\x00\x01"
    assert objects["72"]["86"][:2].hex() == "8418"
    begun, request = dip(replace(cards["mastercard-debit"]), 1251)
    declined = decide(envelope(1251), asked(begun, request), bank)
    objects = tlv.decode(declined.issuer_data)
    assert (declined.approved, declined.reason, list(objects)) == (False, "insufficient_funds", ["8A", "91"])
    assert (objects["8A"], objects["91"][8:]) == (b"51", b"51")
    assert conclude(begun, bytes(objects["91"])) == 0x00


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"amount": 1251}, "amount_mismatch"), ({"currency": "USD"}, "currency_mismatch"), ({}, "kind_mismatch")],
)
def test_a_record_for_another_sale_is_declined_and_leaves_no_trace(
    cards: dict[str, CardProfile], bank: Issuer, changes: dict[str, Any], reason: str
) -> None:
    begun, request = dip(cards["mastercard-debit"], **({"9C": "01"} if reason == "kind_mismatch" else {}))
    record = asked(begun, request)
    decision = decide(envelope(**changes), record, bank)
    assert (decision.approved, decision.reason, decision.issuer_data, decision.pan) == (False, reason, b"", None)
    assert bank.authorise(record).approved


# ---- issuer application data


FINDINGS = st.sets(st.sampled_from(list(Finding))).map(
    lambda chosen: functools.reduce(operator.or_, chosen, Finding(0))
)


@given(
    version=st.sampled_from(Cvn),
    first=st.sampled_from(CryptogramType),
    second=st.sampled_from([None, CryptogramType.AAC, CryptogramType.TC]),
    findings=FINDINGS,
)
def test_issuer_application_data_is_read_as_it_was_written(
    version: Cvn, first: CryptogramType, second: CryptogramType | None, findings: Finding
) -> None:
    iad = issuer_application_data(version, 1, first, second=second, findings=findings)
    read = read_issuer_application_data(iad)
    assert (read.cvn, read.kind) == (version, first if second is None else second)
    assert read.cvr in iad


@given(st.one_of(st.binary(max_size=40), *(st.binary(min_size=size, max_size=size) for size in (7, 18, 32))))
def test_any_issuer_application_data_is_read_or_refused(iad: bytes) -> None:
    try:
        assert read_issuer_application_data(iad).cvn in Cvn
    except ValueError as refusal:
        assert str(refusal)

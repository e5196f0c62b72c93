"""The contactless M/Chip card: every command in every state, its decisions, its cryptogram and combined signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from cards_rig import (
    AAC,
    ARQC,
    CDA,
    OLD_DES,
    TC,
    Visit,
    exchange,
    fill,
    make_bureaus,
    modulus,
    peer_cryptogram,
    seeded,
    sw,
)
from hypothesis import given
from hypothesis import strategies as st
from pyemv import tlv

from hwsim.cards import designs
from hwsim.cards.bureau import Bureau, Scheme
from hwsim.cards.cryptogram import MCHIP_VERSIONS, Cvn
from hwsim.cards.mastercard import MastercardCard
from hwsim.cards.personalise import personalise
from hwsim.cards.profile import CardProfile, Pan
from hwsim.cards.variants import VARIANTS

SELECT_PPSE = bytes.fromhex("00A404000E325041592E5359532E444446303100")
SELECT_AID = bytes.fromhex("00A4040007A000000004101000")
OPTIONS = bytes.fromhex("80A8000002830000")


@pytest.fixture(scope="module")
def bureau() -> Bureau:
    return make_bureaus()[Scheme.MASTERCARD]


@pytest.fixture(scope="module")
def profile(bureau: Bureau) -> CardProfile:
    return personalise(bureau, seeded())


@pytest.fixture(scope="module")
def credit(bureau: Bureau) -> CardProfile:
    return personalise(bureau, seeded(), designs.load("mastercard-credit"))


def insert(profile: CardProfile) -> MastercardCard:
    card = MastercardCard(profile, seeded())
    card.reset()
    return card


def visit(card: MastercardCard, **values: str) -> Visit:
    begun = Visit.begin(card, card.profile, **values)
    begun.key = modulus(card.profile) if card.profile.icc_key else b""
    return begun


def test_directory_and_application_are_found(profile: CardProfile) -> None:
    card = insert(profile)
    (directory,) = tlv.decode(card.apdu(SELECT_PPSE)[:-2]).values()
    entry = directory["A5"]["BF0C"]["61"]
    assert directory["84"] == b"2PAY.SYS.DDF01"
    assert (entry["4F"].hex(), entry["9F2A"], entry["87"]) == ("a0000000041010", b"\x02", b"\x01")
    (application,) = tlv.decode(card.apdu(SELECT_AID)[:-2]).values()
    assert (application["84"].hex(), application["A5"]["50"]) == ("a0000000041010", b"DEBIT MASTERCARD")
    assert "9F38" not in application["A5"]


def test_processing_options_come_in_either_format(profile: CardProfile, credit: CardProfile) -> None:
    for each, start in ((profile, 0x77), (credit, 0x80)):
        card = insert(each)
        card.apdu(SELECT_AID)
        pdol = fill(each.contactless.pdol)
        answer = card.apdu(bytes.fromhex("80A80000") + bytes((len(pdol) + 2, 0x83, len(pdol))) + pdol + b"\x00")
        assert (sw(answer), answer[0]) == ("9000", start)
        assert {"57", "5A", "5F24", "8C", "8D", "8E", "90", "9F46", "9F4A", "9F0D", "9F0E", "9F0F"} <= set(
            visit(insert(each)).found
        )


GENERATE = bytes.fromhex("80AE90002E") + fill(
    bytes.fromhex("9F02069F03069F1A0295055F2A029A039C019F37049F35019F45029F4C089F34039F2103")
) + b"\x00"  # fmt: skip

REACH: dict[str, list[bytes]] = {
    "idle": [],
    "directory": [SELECT_PPSE],
    "selected": [SELECT_PPSE, SELECT_AID],
    "initiated": [SELECT_PPSE, SELECT_AID, OPTIONS],
    "online": [SELECT_PPSE, SELECT_AID, OPTIONS, GENERATE],
}
# Command, and the status word in each state of REACH; one alone means all of them.
COMMANDS: dict[str, tuple[bytes, str]] = {
    "select directory": (SELECT_PPSE, "9000"),
    "select application": (SELECT_AID, "9000"),
    "select by RID": (bytes.fromhex("00A4040005A00000000400"), "9000"),
    "select by less": (bytes.fromhex("00A4040004A000000000"), "6A82"),
    "select another scheme": (bytes.fromhex("00A4040007A000000003101000"), "6A82"),
    "select contact directory": (bytes.fromhex("00A404000E315041592E5359532E444446303100"), "6A82"),
    "select next": (bytes.fromhex("00A4040207A000000004101000"), "6A82"),
    "select next directory": (SELECT_PPSE[:3] + b"\x02" + SELECT_PPSE[4:], "6A82"),
    "select by file": (bytes.fromhex("00A40000023F0000"), "6A86"),
    "select nothing": (bytes.fromhex("00A4040000"), "6700"),
    "start": (OPTIONS, "6985 6985 9000 6985 6985"),
    "start with P1": (bytes.fromhex("80A8010002830000"), "6985 6985 6A86 6985 6985"),
    "start with data": (bytes.fromhex("80A800000383010000"), "6985 6985 6700 6985 6985"),
    "start with another template": (bytes.fromhex("80A8000002840000"), "6985 6985 6A80 6985 6985"),
    "read": (bytes.fromhex("00B2011400"), "6985 6985 6985 9000 9000"),
    "read beyond the file": (bytes.fromhex("00B2091400"), "6985 6985 6985 6A83 6A83"),
    "read an absent file": (bytes.fromhex("00B2014C00"), "6985 6985 6985 6A82 6A82"),
    "read an empty log": (bytes.fromhex("00B2015C00"), "6985 6985 6985 6A83 6A83"),
    "read record zero": (bytes.fromhex("00B2001400"), "6985 6985 6985 6A86 6A86"),
    "read all records": (bytes.fromhex("00B2011500"), "6985 6985 6985 6A86 6A86"),
    "generate AC": (GENERATE, "6985 6985 6985 9000 6985"),
    "generate AC without signature": (b"\x80\xae\x80" + GENERATE[3:], "6985 6985 6985 9000 6985"),
    "generate the type that is none": (b"\x80\xae\xc0" + GENERATE[3:], "6985 6985 6985 6A86 6985"),
    "generate AC with P2": (GENERATE[:3] + b"\x01" + GENERATE[4:], "6985 6985 6985 6A86 6985"),
    "generate AC with data cut": (b"\x80\xae\x90\x00\x04" + bytes(4) + b"\x00", "6985 6985 6985 6700 6985"),
    "get ATC": (bytes.fromhex("80CA9F3600"), "6985 6985 9000 9000 9000"),
    "get what is not there": (bytes.fromhex("80CA9F5000"), "6985 6985 6A88 6A88 6A88"),
    "compute checksum": (bytes.fromhex("802A8E80041122334400"), "6D00"),
    "exchange relay resistance data": (bytes.fromhex("80EA0000041122334400"), "6D00"),
    "external authenticate": (bytes.fromhex("0082000008") + bytes(8) + b"\x00", "6D00"),
    "unknown class": (b"\x90" + SELECT_AID[1:], "6E00"),
    "nothing": (b"", "6700"),
    "data cut short": (SELECT_AID[:-3], "6700"),
    "data too long": (SELECT_AID + b"\x00", "6700"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_in_every_state(profile: CardProfile, name: str) -> None:
    command, expected = COMMANDS[name]
    words = expected.split() * (len(REACH) if " " not in expected else 1)
    for state, word in zip(REACH, words, strict=True):
        card = insert(profile)
        for step in REACH[state]:
            assert sw(card.apdu(step)) == "9000", step.hex()
        answer = card.apdu(command)
        assert sw(answer) == word, state
        assert (len(answer) > 2) == (word == "9000"), state


def test_a_refused_command_moves_neither_state_nor_counter(profile: CardProfile) -> None:
    card = insert(profile)
    for step in REACH["initiated"]:
        card.apdu(step)
    for command, expected in COMMANDS.values():
        if "9000" not in expected:
            card.apdu(command)
    assert sw(card.apdu(GENERATE)) == "9000"
    assert card.profile.atc == 1


@OLD_DES
@pytest.mark.parametrize("version", MCHIP_VERSIONS)
@pytest.mark.parametrize("pan", ["5100000000078996", "5100000000000000003"], ids=["16-digits", "19-digits"])
def test_the_cryptogram_is_what_another_implementation_makes(bureau: Bureau, version: Cvn, pan: str) -> None:
    profile = personalise(bureau, seeded(), pan=Pan(pan), cvn=version)
    card = insert(replace(profile, atc=7))
    for p1 in (ARQC, ARQC | CDA):  # two counters, two session keys, and the same cryptogram inside a signature
        answer = visit(card).generate(p1)
        aip = profile.contactless.aip
        assert answer["9F26"] == peer_cryptogram(bureau, profile, answer, aip)
        assert answer["9F26"] != peer_cryptogram(bureau, profile, answer, aip, **{"9F02": "000000001251"})
        assert answer["9F26"] != peer_cryptogram(bureau, profile, answer, aip, **{"9F37": "11223345"})
        assert answer["9F10"][1] == version
        assert len(answer["9F10"]) == 18


@pytest.mark.parametrize("kind", [ARQC, TC])
def test_the_combined_signature_binds_everything_that_was_said(credit: CardProfile, kind: int) -> None:
    begun = visit(insert(credit))
    answer = begun.generate(kind | CDA)
    assert answer["9F27"] == bytes((kind,))
    assert answer["9F10"][8:10] == answer["9F4C"][:2]  # ICC dynamic number, repeated for the issuer
    clear = {tag: value for tag, value in answer.items() if tag not in ("9F26", "9F4C")}
    begun.combined(clear)
    for tag in ("9F27", "9F36", "9F10", "9F4B"):
        with pytest.raises(AssertionError):
            begun.combined(clear | {tag: clear[tag][:-1] + bytes((clear[tag][-1] ^ 1,))})
    with pytest.raises(AssertionError):
        begun.combined(clear, un="11223345")
    begun.sent = begun.sent[:-1] + b"\xff"  # a value of the CDOL; the first bytes are those of the PDOL
    with pytest.raises(AssertionError):
        begun.combined(clear)


def test_an_aac_is_never_signed(profile: CardProfile) -> None:
    answer = visit(insert(profile)).generate(AAC | CDA)
    assert ("9F4B" in answer, answer["9F27"], len(answer["9F26"])) == (False, b"\x00", 8)


LIMIT = "000000002500"
OVER = "000000002501"


@pytest.mark.parametrize(
    ("asked", "values", "given"),
    [
        (TC, {"9F02": LIMIT}, TC),
        (TC, {"9F02": OVER}, ARQC),
        (TC, {"9F02": LIMIT, "5F2A": "0840"}, ARQC),
        (TC, {"9F02": "000000000000"}, ARQC),
        (ARQC, {"9F02": LIMIT}, ARQC),
        (AAC, {"9F02": LIMIT}, AAC),
        (TC, {"9F02": LIMIT, "9C": "20"}, AAC),
        (ARQC, {"9C": "20"}, AAC),
    ],
)
def test_decisions(credit: CardProfile, asked: int, values: dict[str, str], given: int) -> None:
    answer = visit(insert(credit), **values).generate(asked, **values)
    assert answer["9F27"] == bytes((given,))
    assert {0x00: AAC, 0x10: TC, 0x20: ARQC}[answer["9F10"][2] & 0x30] == given
    declining = insert(replace(credit, declines=True))
    assert visit(declining, **values).generate(asked, **values)["9F27"] == b"\x00"


def test_after_too_many_offline_purchases_it_asks_the_issuer(credit: CardProfile) -> None:
    card = insert(credit)
    given = [visit(card).generate(TC)["9F27"][0] for _ in range(7)]
    assert given == [TC] * 5 + [ARQC] * 2
    assert card.profile.atc == 7
    again = insert(card.profile)  # the counters last
    answer = visit(again).generate(TC)
    assert (answer["9F27"][0], answer["9F36"]) == (ARQC, b"\x00\x08")
    assert answer["9F10"][6] & 0x40  # upper limit exceeded
    assert answer["9F10"][5] & 0x80  # the last online transaction was not completed


def test_an_amount_that_is_none_is_refused(credit: CardProfile) -> None:
    card = insert(credit)
    begun = visit(card)
    data = fill(begun.found["8C"], **{"9F02": "00000000125A"})
    assert sw(exchange(card, bytes.fromhex("80AE4000") + bytes((len(data),)) + data + b"\x00")) == "6A80"


def test_the_last_counter_never_pays(profile: CardProfile) -> None:
    card = insert(replace(profile, atc=0xFFFE))
    visit(card)
    assert card.profile.atc == 0xFFFF
    card.apdu(SELECT_AID)
    assert sw(card.apdu(OPTIONS)) == "6985"


@OLD_DES
def test_variants_are_wrong_in_their_own_way_only(bureau: Bureau, profile: CardProfile) -> None:
    for name, (cryptogram_holds, signature_holds) in {
        "normal": (True, True),
        "wrong-key": (False, True),
        "emulator": (False, False),
    }.items():
        card = insert(VARIANTS[name](profile, seeded()))
        begun = visit(card)
        answer = begun.generate(ARQC)
        assert (answer["9F26"] == peer_cryptogram(bureau, profile, answer, profile.aip)) == cryptogram_holds, name
        begun = Visit.begin(card, profile)
        begun.key = modulus(profile)
        if signature_holds:
            assert "9F4C" in begun.generate(ARQC | CDA)
        else:
            with pytest.raises(AssertionError):
                begun.generate(ARQC | CDA)
    bare = insert(VARIANTS["no-fdda"](profile, seeded()))
    begun = visit(bare)
    assert (begun.found["82"].hex(), "9F46" in begun.found) == ("1880", False)
    data = fill(begun.found["8C"])
    assert sw(bare.apdu(bytes.fromhex("80AE9000") + bytes((len(data),)) + data + b"\x00")) == "6A86"
    blocked = insert(VARIANTS["blocked"](profile, seeded()))
    assert [sw(blocked.apdu(each)) for each in (SELECT_PPSE, SELECT_AID, OPTIONS)] == ["9000", "6283", "6985"]
    absent = insert(VARIANTS["not-supported"](profile, seeded()))
    assert [sw(absent.apdu(each)) for each in (SELECT_PPSE, SELECT_AID, OPTIONS)] == ["6A82", "6A82", "6985"]


HEADERS = st.sampled_from([command[:4] for command, _ in COMMANDS.values() if len(command) >= 4])
BODIES = st.binary(max_size=80).map(lambda data: bytes((len(data),)) + data + b"\x00")
CDOLS = st.binary(min_size=46, max_size=46).map(lambda data: GENERATE[:5] + data + b"\x00")
ANY_COMMAND = st.one_of(
    st.binary(max_size=300),
    st.tuples(HEADERS, BODIES).map(b"".join),
    st.sampled_from([command for command, _ in COMMANDS.values()]),
    CDOLS,
)


@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    commands=st.lists(ANY_COMMAND, max_size=8),
    start=st.sampled_from(list(REACH)),
)
def test_whatever_comes_the_card_answers_with_a_status_word(
    card_maker: Callable[[str], MastercardCard], variant: str, commands: list[bytes], start: str
) -> None:
    card = card_maker(variant)
    for command in [*REACH[start], *commands]:
        answer = card.apdu(command)
        assert 2 <= len(answer) <= 258
        assert answer[-2] in (0x90, 0x62, 0x67, 0x69, 0x6A, 0x6D, 0x6E)


@pytest.fixture(scope="module")
def card_maker(profile: CardProfile) -> Callable[[str], MastercardCard]:
    return lambda variant: insert(VARIANTS[variant](profile, seeded()))

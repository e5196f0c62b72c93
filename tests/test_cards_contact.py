"""The contact card of both schemes: every command in every state, T=0 and T=1, what it proves and whom it believes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cards_rig import (
    AAC,
    ARQC,
    CDA,
    OLD_DES,
    TC,
    Objects,
    Visit,
    case4,
    exchange,
    fill,
    make_bureaus,
    modulus,
    peer_command,
    peer_cryptogram,
    peer_proof,
    rsa,
    seeded,
    select,
    sha1,
    sw,
    told,
)
from hypothesis import given
from hypothesis import strategies as st
from pyemv import tlv

from hwsim.cards import designs
from hwsim.cards.bureau import Bureau, Scheme
from hwsim.cards.card import Card
from hwsim.cards.contact import ContactCard, Protocol
from hwsim.cards.cryptogram import MCHIP_VERSIONS, VISA_VERSIONS, Cvn
from hwsim.cards.mastercard import MastercardCard
from hwsim.cards.personalise import personalise
from hwsim.cards.profile import CardProfile, Standing
from hwsim.cards.variants import VARIANTS
from hwsim.cards.visa import VisaCard

PSE = b"1PAY.SYS.DDF01"
Personalise = Callable[..., CardProfile]


@pytest.fixture(scope="module")
def bureaus() -> dict[Scheme, Bureau]:
    return make_bureaus()


@pytest.fixture(scope="module")
def made(bureaus: dict[Scheme, Bureau]) -> Personalise:
    """Personalises once for each design and version."""
    store: dict[Any, CardProfile] = {}

    def make(name: str, cvn: Cvn | None = None) -> CardProfile:
        if (name, cvn) not in store:
            design = designs.load(name)
            store[name, cvn] = personalise(bureaus[design.scheme], seeded(), design, cvn=cvn)
        return store[name, cvn]

    return make


def insert(profile: CardProfile, protocol: Protocol = Protocol.T0) -> ContactCard:
    card = ContactCard(profile, seeded(), protocol)
    card.reset(cold=True)
    return card


def visit(card: ContactCard, **values: str) -> Visit:
    begun = Visit.begin(card, card.profile, **values)
    begun.key = modulus(card.profile) if card.profile.icc_key else b""
    return begun


# ---- selection


@pytest.mark.parametrize("name", ["visa-debit", "mastercard-debit"])
def test_the_directory_leads_to_the_application(made: Personalise, name: str) -> None:
    card = insert(made(name))
    (pse,) = tlv.decode(told(card, select(card, PSE))).values()
    assert (pse["84"], pse["A5"]["88"]) == (PSE, b"\x01")
    (directory,) = tlv.decode(told(card, bytes.fromhex("00B2010C00"))).values()
    entry = directory["61"]
    assert (entry["4F"], entry["87"]) == (card.profile.aid, b"\x01")
    assert sw(exchange(card, bytes.fromhex("00B2020C00"))) == "6A83"
    (application,) = tlv.decode(told(card, select(card, entry["4F"]))).values()
    assert application["84"] == card.profile.aid
    assert application["A5"]["50"] == entry["50"] == card.profile.label.encode()
    assert sw(exchange(card, bytes.fromhex("00B2010C00"))) == "6985"  # the directory is no longer selected


def test_names_that_begin_alike_are_found_one_after_the_other(made: Personalise) -> None:
    card = insert(made("two-names"))
    assert sw(exchange(card, select(card, bytes.fromhex("A0000000031010"), p2=2))) == "6A82"  # after nothing
    for number in (1, 2):
        answer = told(card, select(card, bytes.fromhex("A0000000031010"), p2=0 if number == 1 else 2))
        (fci,) = tlv.decode(answer).values()
        assert (fci["84"].hex(), fci["A5"]["87"][0]) == (f"a00000000310100{number}", number)
    assert sw(exchange(card, select(card, bytes.fromhex("A0000000031010"), p2=2))) == "6A82"
    assert sw(exchange(card, case4(card, "80A80000", b"\x83\x00"))) == "9000"  # the second is still selected
    assert told(card, select(card, bytes.fromhex("A000000003101002"))).hex().startswith("6f")
    told(card, select(card, PSE))
    assert told(card, bytes.fromhex("00B2010C00")).count(b"\x4f\x08") == 2


# ---- every command in every state


def generate(profile: CardProfile, p1: int, dol: bytes = b"", **values: str) -> bytes:
    data = fill(dol or profile.contact.cdol1, **values)
    return bytes((0x80, 0xAE, p1, 0x00, len(data))) + data


def reach(profile: CardProfile) -> dict[str, list[bytes]]:
    """T=0 commands that lead to each state; data that waits for GET RESPONSE is left there, as a terminal may."""
    pse = bytes.fromhex("00A404000E") + PSE
    aid = bytes((0x00, 0xA4, 0x04, 0x00, len(profile.aid))) + profile.aid
    options = bytes.fromhex("80A80000028300")
    started = [pse, aid, options]
    return {
        "idle": [],
        "directory": [pse],
        "selected": [pse, aid],
        "initiated": started,
        "online": [*started, generate(profile, ARQC)],
        "answered": [*started, generate(profile, ARQC), bytes.fromhex("0082000008") + bytes(8)],
        "done": [*started, generate(profile, AAC)],
    }


STATES = ("idle", "directory", "selected", "initiated", "online", "answered", "done")
# Command over T=0, and the status word in each of STATES; one alone means all of them, xx is any length.
COMMANDS: dict[str, tuple[str, str]] = {
    "select directory": ("00A404000E" + PSE.hex(), "61xx"),
    "select application": ("00A4040007A0000000031010", "61xx"),
    "select by RID": ("00A4040005A000000003", "61xx"),
    "select by less than a RID": ("00A4040004A0000000", "6A82"),
    "select by longer name": ("00A4040008A000000003101001", "6A82"),
    "select another scheme": ("00A4040007A0000000041010", "6A82"),
    "select contactless directory": ("00A404000E" + b"2PAY.SYS.DDF01".hex(), "6A82"),
    "select next": ("00A4040207A0000000031010", "6A82"),
    "select by file": ("00A40000023F00", "6A86"),
    "select nothing": ("00A4040000", "6700"),
    "start": ("80A80000028300", "6985 6985 61xx 6985 6985 6985 6985"),
    "start with P2": ("80A80001028300", "6985 6985 6A86 6985 6985 6985 6985"),
    "start with more than was asked for": ("80A8000003830101", "6985 6985 6700 6985 6985 6985 6985"),
    "start with another template": ("80A80000028400", "6985 6985 6A80 6985 6985 6985 6985"),
    "read": ("00B2011400", "6985 6A82 6985 6Cxx 6Cxx 6Cxx 6Cxx"),
    "read the first file": ("00B2010C00", "6985 6Cxx 6985 6Cxx 6Cxx 6Cxx 6Cxx"),
    "read beyond the file": ("00B2091400", "6985 6A82 6985 6A83 6A83 6A83 6A83"),
    "read an absent file": ("00B2014C00", "6985 6A82 6985 6A82 6A82 6A82 6A82"),
    "read record zero": ("00B2000C00", "6985 6A86 6985 6A86 6A86 6A86 6A86"),
    "read all records": ("00B2010D00", "6985 6A86 6985 6A86 6A86 6A86 6A86"),
    "read with data": ("00B2010C0100", "6985 6700 6985 6700 6700 6700 6700"),
    "get ATC": ("80CA9F3605", "6985 6985 9000 9000 9000 9000 9000"),
    "get last online ATC": ("80CA9F1300", "6985 6985 6C05 6C05 6C05 6C05 6C05"),
    "get PIN try counter": ("80CA9F1700", "6985 6985 6C04 6C04 6C04 6C04 6C04"),
    "get log format": ("80CA9F4F00", "6985 6985 6C0E 6C0E 6C0E 6C0E 6C0E"),
    "get what is not there": ("80CA9F5000", "6985 6985 6A88 6A88 6A88 6A88 6A88"),
    "internal authenticate": ("008800000411223344", "6985 6985 6985 61xx 6985 6985 6985"),
    "internal authenticate, too short": ("0088000003112233", "6985 6985 6985 6700 6985 6985 6985"),
    "internal authenticate with P1": ("008801000411223344", "6985 6985 6985 6A86 6985 6985 6985"),
    "verify": ("0020008008241234FFFFFFFFFF", "6985 6985 6985 6983 6985 6985 6985"),
    "verify, enciphered": ("0020008808" + "00" * 8, "6985 6985 6985 6984 6985 6985 6985"),
    "verify something else": ("0020000008" + "00" * 8, "6985 6985 6985 6A86 6985 6985 6985"),
    "get challenge": ("0084000000", "6D00"),
    "external authenticate": ("0082000008" + "00" * 8, "6985 6985 6985 6985 6300 6985 6985"),
    "external authenticate, too short": ("0082000007" + "00" * 7, "6985 6985 6985 6985 6700 6985 6985"),
    "external authenticate with P2": ("0082000108" + "00" * 8, "6985 6985 6985 6985 6A86 6985 6985"),
    "generate a type that is none": ("80AEC0001D" + "00" * 29, "6985 6985 6985 6A86 6A86 6A86 6985"),
    "generate AC with a signature it cannot make": ("80AE90001D" + "00" * 29, "6985 6985 6985 6A86 6A86 6A86 6985"),
    "generate AC, too short": ("80AE000001" + "00", "6985 6985 6985 6700 6700 6700 6985"),
    "block, without MAC": ("841E000000", "6985 6985 6985 6985 6988 6988 6985"),
    "block, wrong MAC": ("841E000008" + "00" * 8, "6985 6985 6985 6985 6988 6988 6985"),
    "unblock, wrong MAC": ("8418000008" + "00" * 8, "6985 6985 6985 6985 6988 6988 6985"),
    "put data that it has not": ("04DA9F230909" + "00" * 8, "6A88"),
    "put data that is not its": ("04DA9F360909" + "00" * 8, "6A88"),
    "block in another class": ("801E000000", "6D00"),
    "unknown class": ("90A4040007A0000000031010", "6E00"),
    "nothing": ("", "6700"),
    "a header cut short": ("00A404", "6700"),
    "data cut short": ("00A4040007A00000000310", "6700"),
    "a Le behind the data": ("00A4040007A000000003101000", "6700"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_in_every_state(made: Personalise, name: str) -> None:
    profile = made("visa-debit")
    text, expected = COMMANDS[name]
    words = expected.split() * (len(STATES) if " " not in expected else 1)
    for state, word in zip(STATES, words, strict=True):
        card = insert(profile)
        for step in reach(profile)[state]:
            assert card.apdu(step)[-2] in (0x90, 0x61, 0x63), step.hex()
        answer = card.apdu(bytes.fromhex(text))
        assert (sw(answer) == word) if "x" not in word else sw(answer).startswith(word[:2]), (state, sw(answer))
        assert (len(answer) > 2) == (word == "9000"), state


def test_generate_ac_in_every_state(made: Personalise) -> None:
    profile = made("visa-debit")
    second = generate(profile, TC, profile.contact.cdol2)
    for state in STATES:
        for p1, command, good in (
            (ARQC, generate(profile, ARQC), ("initiated",)),
            (AAC, generate(profile, AAC), ("initiated",)),
            (TC, second, ("online", "answered")),
        ):
            card = insert(profile)
            for step in reach(profile)[state]:
                card.apdu(step)
            word = sw(card.apdu(command))
            if state in good:
                assert word.startswith("61"), (state, p1)
            else:  # in a state for the other list the length is wrong, unless the request itself is out of place
                misplaced = state not in ("initiated", "online", "answered") or (p1 == ARQC and state != "initiated")
                assert word == ("6985" if misplaced else "6700"), (state, p1)
    card = insert(profile)
    for step in reach(profile)["online"]:
        card.apdu(step)
    assert sw(card.apdu(generate(profile, ARQC, profile.contact.cdol2))) == "6985"  # never a second request
    assert sw(card.apdu(second))[:2] == "61"
    assert sw(card.apdu(second)) == "6985"  # nor a third cryptogram


def test_a_refused_command_moves_neither_state_nor_counter(made: Personalise) -> None:
    profile = made("visa-debit")
    card = insert(profile)
    for step in reach(profile)["initiated"]:
        card.apdu(step)
    for text, expected in COMMANDS.values():
        if "61" not in expected:
            card.apdu(bytes.fromhex(text))
    assert sw(card.apdu(generate(profile, ARQC)))[:2] == "61"
    assert card.profile.atc == 1


def test_a_reset_warm_or_cold_forgets_the_transaction_and_keeps_the_counter(made: Personalise) -> None:
    for cold in (True, False):
        card = insert(made("visa-debit"))
        visit(card)
        card.reset(cold=cold)
        assert [sw(card.apdu(bytes.fromhex(each))) for each in ("00B2011400", "00C0000000")] == ["6985", "6985"]
        assert visit(card).generate(ARQC)["9F36"] == b"\x00\x02"


# ---- T=0 and T=1


def test_over_t0_data_is_fetched_whole_in_parts_and_once(made: Personalise) -> None:
    card = insert(made("visa-debit"))
    command = select(card, card.profile.aid)
    waiting = card.apdu(command)
    assert (waiting[0], len(waiting)) == (0x61, 2)
    size = waiting[1]
    assert sw(card.apdu(bytes((0x00, 0xC0, 0x00, 0x00, size + 1)))) == f"6C{size:02X}"
    assert sw(card.apdu(bytes.fromhex("00C0000000"))) == f"6C{size:02X}"
    first = card.apdu(bytes.fromhex("00C0000005"))
    assert (len(first), sw(first)) == (7, f"61{size - 5:02X}")
    rest = card.apdu(bytes((0x00, 0xC0, 0x00, 0x00, size - 5)))
    assert sw(rest) == "9000"
    assert first[:-2] + rest[:-2] == told(card, command)
    assert sw(card.apdu(bytes.fromhex("00C0000001"))) == "6985"  # it was fetched
    card.apdu(command)
    card.apdu(bytes.fromhex("80CA9F3605"))
    assert sw(card.apdu(bytes((0x00, 0xC0, 0x00, 0x00, size)))) == "6985"  # another command came between
    card.apdu(command)
    assert sw(card.apdu(bytes.fromhex("00C0010001"))) == "6A86"


def test_over_t0_the_expected_length_must_be_the_length_there_is(made: Personalise) -> None:
    card = insert(made("visa-debit"))
    visit(card)
    size = card.apdu(bytes.fromhex("00B2011400"))[-1]
    for wrong in (0, 1, size - 1, size + 1, 255):
        assert card.apdu(bytes((0x00, 0xB2, 0x01, 0x14, wrong))) == bytes((0x6C, size))
    assert len(card.apdu(bytes((0x00, 0xB2, 0x01, 0x14, size)))) == size + 2
    assert sw(card.apdu(bytes.fromhex("00B20114"))) == f"6C{size:02X}"  # no Le is 00 to a card


def test_over_t0_data_waits_behind_a_warning(made: Personalise) -> None:
    card = insert(VARIANTS["blocked"](made("visa-debit"), seeded()))
    assert card.apdu(select(card, card.profile.aid)).hex() == "6283"
    size = card.apdu(bytes.fromhex("00C0000000"))
    assert size[0] == 0x6C
    assert card.apdu(bytes((0x00, 0xC0, 0x00, 0x00, size[1])))[0] == 0x6F
    assert sw(card.apdu(bytes.fromhex("80A80000028300"))) == "6985"


def test_over_t1_answers_come_whole(made: Personalise) -> None:
    card = insert(made("visa-debit"), Protocol.T1)
    assert card.atr.hex().upper() == "3B8401454D5631EA"
    command = bytes((0x00, 0xA4, 0x04, 0x00, 7)) + card.profile.aid
    whole = card.apdu(command + b"\x00")
    assert (sw(whole), whole[0]) == ("9000", 0x6F)
    assert card.apdu(command) == whole  # a forgotten Le is forgiven
    assert sw(card.apdu(command + b"\x10")) == "6700"
    assert sw(card.apdu(bytes.fromhex("80A8000002830000"))) == "9000"
    record = card.apdu(bytes.fromhex("00B2011400"))
    size = len(record) - 2
    assert (sw(record), card.apdu(bytes((0x00, 0xB2, 0x01, 0x14, size)))) == ("9000", record)
    assert card.apdu(bytes.fromhex("00B2011401")) == bytes((0x6C, size))
    assert sw(card.apdu(bytes.fromhex("00C0000000"))) == "6D00"  # there is no GET RESPONSE


def test_the_answers_to_reset_say_which_protocol(made: Personalise) -> None:
    assert insert(made("visa-debit")).atr.hex().upper() == "3B6500002063CB6800"
    t1 = insert(made("visa-debit"), Protocol.T1).atr
    check = 0
    for byte in t1[1:]:
        check ^= byte
    assert check == 0  # TCK is there because it is not T=0 alone


# ---- what the card proves


ALL = [("visa-debit", each) for each in VISA_VERSIONS] + [("mastercard-debit", each) for each in MCHIP_VERSIONS]
EVERY_VERSION = pytest.mark.parametrize(("name", "version"), ALL, ids=lambda value: getattr(value, "name", value))


@OLD_DES
@EVERY_VERSION
def test_both_cryptograms_are_what_another_implementation_makes(
    bureaus: dict[Scheme, Bureau], made: Personalise, name: str, version: Cvn
) -> None:
    profile = made(name, version)
    bureau, aip = bureaus[profile.scheme], profile.contact.aip
    begun = visit(insert(replace(profile, atc=41)))
    first = begun.generate(ARQC, **{"95": "0000008000"})
    assert (first["9F27"][0], first["9F36"].hex()) == (ARQC, "002a")
    assert first["9F26"] == peer_cryptogram(bureau, profile, first, aip, **{"95": "0000008000"})
    assert first["9F26"] != peer_cryptogram(bureau, profile, first, aip)
    proof = peer_proof(bureau, profile, first)
    second = conclude(begun, proof, TC, **{"95": "0000018000"})
    assert (second["9F27"][0], second["9F36"].hex()) == (TC, "002a")
    assert second["9F26"] == peer_cryptogram(bureau, profile, second, aip, **{"95": "0000018000"})
    result = second["9F10"][4 if profile.scheme is Scheme.VISA else 2]
    assert (result & 0xF0) == 0x60  # TC after ARQC


def conclude(begun: Visit, proof: bytes, p1: int, **values: str) -> Objects:
    """Bring the issuer's proof as the card wants it, and ask for the second cryptogram."""
    if begun.found["82"][0] & 0x04:
        if proof:
            exchange(begun.card, case4(begun.card, "00820000", proof))
    elif proof:
        values = {"91": proof.hex()} | values
    return begun.generate(p1, "8D", **values)


def test_dda_signs_what_the_terminal_sent(made: Personalise) -> None:
    for name, format_ in (("visa-debit", 0x80), ("mastercard-debit", 0x77)):
        card = insert(made(name))
        begun = visit(card)
        raw = told(card, case4(card, "00880000", bytes.fromhex("11223344")))
        ((tag, value),) = tlv.decode(raw).items()
        assert int(tag, 16) == format_
        block = rsa(begun.key, bytes(value if tag == "80" else value["9F4B"]))
        assert (block[:5].hex(), block[-1]) == ("6a05010908", 0xBC)
        assert set(block[13:-21]) == {0xBB}
        assert sha1(block[1:-21] + bytes.fromhex("11223344")) == block[-21:-1]
        assert sha1(block[1:-21] + bytes.fromhex("11223345")) != block[-21:-1]
        again = told(card, case4(card, "00880000", bytes.fromhex("11223344")))
        assert again != raw  # another ICC dynamic number


@OLD_DES
@pytest.mark.parametrize("name", ["visa-credit", "mastercard-credit"])
def test_cda_signs_both_cryptograms(bureaus: dict[Scheme, Bureau], made: Personalise, name: str) -> None:
    profile = made(name)
    begun = visit(insert(profile))
    first = begun.generate(ARQC | CDA)  # the rig verifies the signature and fills 9F26
    clear = {tag: value for tag, value in first.items() if tag not in ("9F26", "9F4C")}
    for tag in ("9F27", "9F36", "9F10"):
        with pytest.raises(AssertionError):
            begun.combined(clear | {tag: clear[tag][:-1] + bytes((clear[tag][-1] ^ 1,))})
    second = conclude(begun, peer_proof(bureaus[profile.scheme], profile, first), TC | CDA)
    assert (second["9F27"][0], "9F4C" in second) == (TC, True)
    begun.sent = begun.sent[1:]
    with pytest.raises(AssertionError):
        begun.combined({tag: value for tag, value in second.items() if tag not in ("9F26", "9F4C")})
    declined = visit(insert(profile)).generate(AAC | CDA)
    assert "9F4B" not in declined


# ---- what the card decides


LIMIT, OVER = "000000005000", "000000005001"


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
    ],
)
def test_first_decisions(made: Personalise, asked: int, values: dict[str, str], given: int) -> None:
    profile = made("visa-credit")
    answer = visit(insert(profile), **values).generate(asked)
    assert answer["9F27"] == bytes((given,))
    assert {0x00: AAC, 0x10: TC, 0x20: ARQC}[answer["9F10"][4] & 0x30] == given
    assert visit(insert(replace(profile, declines=True)), **values).generate(asked)["9F27"] == b"\x00"
    online_only = visit(insert(replace(profile, offline_limit_minor=0)), **values).generate(asked)["9F27"][0]
    assert online_only == (ARQC if given == TC else given)


# Name of the card, whether the issuer says yes, what of its proof comes, and what the card then says to TC.
CONCLUSIONS = {
    "approved": ("visa-debit", True, "true", TC),
    "declined": ("visa-debit", False, "true", AAC),
    "forged": ("visa-debit", True, "forged", AAC),
    "missing": ("visa-debit", True, "none", AAC),
    "missing, and not missed": ("indifferent", True, "none", TC),
    "forged, to one that does not need it": ("indifferent", True, "forged", AAC),
    "declined, to one that does not need it": ("indifferent", False, "true", AAC),
    "approved, but distrusted": ("distrusts-issuer", True, "true", AAC),
    "approved, but the card will not": ("declines-after-approval", True, "true", AAC),
    "approved in CDOL2": ("mastercard-debit", True, "true", TC),
    "declined in CDOL2": ("mastercard-debit", False, "true", AAC),
    "forged in CDOL2": ("mastercard-debit", True, "forged", AAC),
    "missing in CDOL2": ("mastercard-debit", True, "none", AAC),
    "distrusted in CDOL2": ("mastercard-distrusts-issuer", True, "true", AAC),
    "unwilling after CDOL2": ("mastercard-declines-after-approval", True, "true", AAC),
}


@OLD_DES
@pytest.mark.parametrize("case", CONCLUSIONS)
def test_the_second_cryptogram_says_what_the_card_thinks_of_the_answer(
    bureaus: dict[Scheme, Bureau], made: Personalise, case: str
) -> None:
    name, approve, sent, given = CONCLUSIONS[case]
    profile = made(name)
    card = insert(profile)
    begun = visit(card)
    first = begun.generate(ARQC)
    assert card.profile.online_incomplete
    proof = {
        "true": peer_proof(bureaus[profile.scheme], profile, first, approve=approve),
        "forged": bytes((peer_proof(bureaus[profile.scheme], profile, first)[0] ^ 1,))
        + peer_proof(bureaus[profile.scheme], profile, first)[1:],
        "none": b"",
    }[sent]
    answer = conclude(begun, proof, TC)
    assert answer["9F27"] == bytes((given,))
    heard = (sent == "true" and "distrust" not in case) or name == "indifferent"
    assert (card.profile.atc_last_online, card.profile.online_incomplete) == ((1, False) if heard else (0, True))
    assert told(card, bytes.fromhex("80CA9F1305"))[3:] == card.profile.atc_last_online.to_bytes(2, "big")
    cvr = answer["9F10"][3:7] if profile.scheme is Scheme.VISA else answer["9F10"][2:8]
    failed = sent == "forged" or "distrust" in case
    if profile.scheme is Scheme.VISA:
        assert (bool(cvr[1] & 0x08), bool(cvr[2] & 0x04)) == (failed, sent == "none")
    else:
        assert (bool(cvr[4] & 0x04), bool(cvr[1] & 0x10)) == (failed, sent == "true" and not failed)
    assert sw(exchange(card, generate(profile, AAC, profile.contact.cdol2))) == "6985"


@OLD_DES
def test_external_authenticate_says_whether_it_believes_and_listens_once(
    bureaus: dict[Scheme, Bureau], made: Personalise
) -> None:
    for version in VISA_VERSIONS:
        profile = made("visa-debit", version)
        card = insert(profile)
        begun = visit(card)
        proof = peer_proof(bureaus[Scheme.VISA], profile, begun.generate(ARQC))
        for at in range(len(proof)):
            other = insert(replace(profile, atc=0))
            visit(other).generate(ARQC)
            forged = proof[:at] + bytes((proof[at] ^ 0x40,)) + proof[at + 1 :]
            assert sw(exchange(other, case4(other, "00820000", forged))) == "6300", at
        assert sw(exchange(card, case4(card, "00820000", proof))) == "9000"
        assert sw(exchange(card, case4(card, "00820000", proof))) == "6985"
    mastercard = insert(made("mastercard-debit"))
    visit(mastercard).generate(ARQC)
    assert sw(exchange(mastercard, case4(mastercard, "00820000", bytes(10)))) == "6985"  # its AIP offers none


@OLD_DES
def test_yesterday_s_approval_approves_nothing_today(bureaus: dict[Scheme, Bureau], made: Personalise) -> None:
    for name in ("visa-debit", "mastercard-debit"):
        profile = made(name)
        card = insert(profile)
        begun = visit(card)
        old = peer_proof(bureaus[profile.scheme], profile, begun.generate(ARQC))
        assert conclude(begun, old, TC)["9F27"][0] == TC
        begun = visit(card)
        begun.generate(ARQC)
        assert conclude(begun, old, TC)["9F27"][0] == AAC


@pytest.mark.parametrize(("amount", "given"), [(LIMIT, TC), (OVER, AAC)])
def test_unable_to_go_online_it_decides_alone(made: Personalise, amount: str, given: int) -> None:
    for asked, code in ((TC, b"Y3"), (AAC, b"Z3")):
        card = insert(made("visa-credit"))
        begun = visit(card, **{"9F02": amount})
        begun.generate(ARQC)
        answer = conclude(begun, b"", asked, **{"8A": code.hex()})
        assert answer["9F27"][0] == (given if asked == TC else AAC)
        assert answer["9F10"][4] & 0x01  # unable to go online
        assert (card.profile.atc_last_online, card.profile.online_incomplete) == (0, True)
        assert visit(card).generate(ARQC)["9F10"][5] & 0x80  # says so to the issuer the next time


@OLD_DES
def test_consecutive_offline_purchases_end_and_begin_again_after_an_online_one(
    bureaus: dict[Scheme, Bureau], made: Personalise
) -> None:
    profile = made("visa-credit")
    card = insert(profile)
    assert [visit(card).generate(TC)["9F27"][0] for _ in range(5)] == [TC] * 5
    card = insert(card.profile)  # the counters last
    begun = visit(card)
    sixth = begun.generate(TC)
    assert (sixth["9F27"][0], sixth["9F10"][5] & 0x20) == (ARQC, 0x20)
    conclude(begun, peer_proof(bureaus[Scheme.VISA], profile, sixth), TC)
    assert told(card, bytes.fromhex("80CA9F1305")).hex() == "9f13020006"
    assert visit(card).generate(TC)["9F27"][0] == TC


def test_what_was_approved_is_in_the_log_newest_first(made: Personalise) -> None:
    card = insert(made("visa-credit"))
    assert told(card, select(card, card.profile.aid)).hex().count("9f4d020b0a") == 1
    for number in range(1, 5):
        visit(card, **{"9F02": f"{number:012d}"}).generate(TC)
    visit(card).generate(AAC)
    assert told(card, bytes.fromhex("80CA9F4F0E")).hex() == "9f4f0b9a039f02065f2a029f3602"
    entries = [told(card, bytes((0x00, 0xB2, number, 0x5C, 0x00))).hex() for number in range(1, 5)]
    assert entries == [f"240614{number:012d}0978{number:04x}" for number in (4, 3, 2, 1)]
    assert sw(exchange(card, bytes.fromhex("00B2055C00"))) == "6A83"
    full = insert(replace(card.profile, log=(b"\x00",) * 10, atc_last_online=5))
    visit(full).generate(TC)
    assert len(full.profile.log) == 10


# ---- the issuer's commands


@OLD_DES
@EVERY_VERSION
def test_a_secured_command_is_obeyed_and_no_other(
    bureaus: dict[Scheme, Bureau], made: Personalise, name: str, version: Cvn
) -> None:
    profile = made(name, version)
    bureau = bureaus[profile.scheme]
    card = insert(profile)
    begun = visit(card)
    first = begun.generate(ARQC)
    block = peer_command(bureau, profile, first, "841E0000")
    for at in range(len(block)):
        forged = block[:at] + bytes((block[at] ^ 1,)) + block[at + 1 :]
        assert sw(card.apdu(forged)) != "9000", at
    assert card.profile.standing is Standing.ACTIVE
    assert sw(card.apdu(block)) == "9000"
    assert card.profile.standing is Standing.BLOCKED
    answer = conclude(begun, peer_proof(bureau, profile, first), TC)
    assert answer["9F27"][0] == AAC  # blocked: it does not pay any more
    assert sw(exchange(card, block)) == "9000"  # after the conclusion, too
    assert sw(card.apdu(select(card, profile.aid))) == "6283"
    again = insert(card.profile)
    assert sw(again.apdu(select(again, profile.aid))) == "6283"  # and it lasts


@OLD_DES
def test_block_and_unblock_within_one_transaction(bureaus: dict[Scheme, Bureau], made: Personalise) -> None:
    profile = made("visa-debit")
    bureau, card = bureaus[Scheme.VISA], insert(profile)
    begun = visit(card)
    first = begun.generate(ARQC)
    for header in ("841E0000", "84180000"):
        assert sw(card.apdu(peer_command(bureau, profile, first, header))) == "9000"
    answer = conclude(begun, peer_proof(bureau, profile, first), TC)
    assert (answer["9F27"][0], answer["9F10"][6] & 0x18) == (TC, 0x10)  # a script came, and did not fail
    next_one = visit(card)
    next_one.generate(ARQC)
    assert sw(card.apdu(peer_command(bureau, profile, first, "841E0000"))) == "6988"  # yesterday's command
    assert next_one.generate(AAC, "8D")["9F10"][6] & 0x18 == 0x08


@OLD_DES
def test_put_data_changes_a_limit_for_good(bureaus: dict[Scheme, Bureau], made: Personalise) -> None:
    profile = made("visa-credit")
    bureau, card = bureaus[Scheme.VISA], insert(profile)
    begun = visit(card)
    first = begun.generate(ARQC)
    assert begun.found["9F23"] == b"\x05"
    assert sw(card.apdu(peer_command(bureau, profile, first, "04DA9F23", b"\x01\x02"))) == "6700"
    assert sw(card.apdu(peer_command(bureau, profile, first, "04DA9F23", b"\x01"))) == "9000"
    conclude(begun, peer_proof(bureau, profile, first), TC)
    card = insert(card.profile)
    assert visit(card).found["9F23"] == b"\x01"
    card.reset()
    assert visit(card).generate(TC)["9F27"][0] == ARQC  # the second since then


@OLD_DES
def test_put_data_of_what_the_card_has_not_is_refused(bureaus: dict[Scheme, Bureau], made: Personalise) -> None:
    profile = made("visa-debit")
    card = insert(profile)
    first = visit(card).generate(ARQC)
    assert sw(card.apdu(peer_command(bureaus[Scheme.VISA], profile, first, "04DA9F23", b"\x01"))) == "6A88"
    assert card.profile.contact == profile.contact


def test_without_an_online_request_there_is_no_command(made: Personalise) -> None:
    card = insert(made("visa-debit"))
    visit(card).generate(AAC)
    assert sw(card.apdu(bytes.fromhex("841E000008") + bytes(8))) == "6985"


# ---- one chip


@OLD_DES
def test_both_interfaces_lead_to_one_chip(bureaus: dict[Scheme, Bureau], made: Personalise) -> None:
    for name, kind in (("visa-debit", VisaCard), ("mastercard-debit", MastercardCard)):
        profile = made(name)
        card = Card(profile, seeded())
        assert isinstance(card.contactless, kind)
        card.contact.reset(cold=True)
        begun = visit(card.contact)
        first = begun.generate(ARQC)
        block = peer_command(bureaus[profile.scheme], profile, first, "841E0000")
        card.contactless.reset()
        name_command = bytes((0x00, 0xA4, 0x04, 0x00, 7)) + profile.aid + b"\x00"
        assert sw(card.contactless.apdu(name_command)) == "9000"
        assert sw(card.contact.apdu(block)) == "9000"
        assert sw(card.contactless.apdu(name_command)) == "6283"
        assert card.profile.atc == card.contactless.profile.atc == card.contact.profile.atc == 1


@OLD_DES
def test_variants_are_wrong_in_their_own_way_only(bureaus: dict[Scheme, Bureau], made: Personalise) -> None:
    profile = made("visa-credit")
    bureau = bureaus[Scheme.VISA]
    for name, (cryptogram_holds, signature_holds) in {
        "normal": (True, True),
        "wrong-key": (False, True),
        "emulator": (False, False),
    }.items():
        card = insert(VARIANTS[name](profile, seeded()))
        begun = Visit.begin(card, profile)
        answer = begun.generate(ARQC)
        assert (answer["9F26"] == peer_cryptogram(bureau, profile, answer, profile.contact.aip)) == cryptogram_holds
        proof = peer_proof(bureau, profile, answer)
        believes = sw(exchange(card, case4(card, "00820000", proof))) == "9000"
        assert believes == (name != "wrong-key")  # an emulator believes whatever it is told
        begun = Visit.begin(card, profile, **{"9F02": "000000000100"})
        begun.key = modulus(profile)
        if signature_holds:
            assert "9F4C" in begun.generate(TC | CDA)
        else:
            with pytest.raises(AssertionError):
                begun.generate(TC | CDA)
    emulator = insert(VARIANTS["emulator"](profile, seeded()))
    first = visit(emulator).generate(ARQC)
    assert sw(emulator.apdu(peer_command(bureau, profile, first, "841E0000"))) == "6988"
    bare = insert(VARIANTS["no-fdda"](profile, seeded()))
    begun = visit(bare)
    assert (begun.found["82"].hex(), begun.found["94"][-1]) == ("1c00", 0)
    assert sw(exchange(bare, case4(bare, "00880000", bytes(4)))) == "6985"
    absent = insert(VARIANTS["not-supported"](profile, seeded()))
    assert [sw(absent.apdu(select(absent, each))) for each in (PSE, profile.aid)] == ["6A82", "6A82"]


HEADERS = st.sampled_from([bytes.fromhex(text)[:4] for text, _ in COMMANDS.values() if len(text) >= 8])
BODIES = st.binary(max_size=80).map(lambda data: bytes((len(data),)) + data)
LISTS = st.tuples(st.sampled_from([0x00, 0x40, 0x80, 0x90, 0x50, 0x10]), st.integers(20, 50)).flatmap(
    lambda pair: st.binary(min_size=pair[1], max_size=pair[1]).map(
        lambda data: bytes((0x80, 0xAE, pair[0], 0x00, len(data))) + data
    )
)
ANY_COMMAND = st.one_of(
    st.binary(max_size=300),
    st.tuples(HEADERS, BODIES).map(b"".join),
    st.sampled_from([bytes.fromhex(text) for text, _ in COMMANDS.values()]),
    st.integers(0, 255).map(lambda expected: bytes((0x00, 0xC0, 0x00, 0x00, expected))),
    LISTS,
)


@given(
    name=st.sampled_from(["visa-debit", "visa-credit", "mastercard-credit"]),
    variant=st.sampled_from(sorted(VARIANTS)),
    protocol=st.sampled_from(Protocol),
    commands=st.lists(ANY_COMMAND, max_size=8),
    start=st.sampled_from(STATES),
)
def test_whatever_comes_the_card_answers_with_a_status_word(
    made: Personalise, *, name: str, variant: str, protocol: Protocol, commands: list[bytes], start: str
) -> None:
    profile = made(name)
    card = insert(VARIANTS[variant](profile, seeded()), protocol)
    for command in [*reach(profile)[start], *commands]:
        answer = card.apdu(command)
        assert 2 <= len(answer) <= 258
        assert answer[-2] in (0x90, 0x61, 0x62, 0x63, 0x67, 0x69, 0x6A, 0x6C, 0x6D, 0x6E)
        assert len(answer) == 2 or answer[-2] in (0x90, 0x61, 0x62)

"""The Visa-like card: every command in every state, its decisions, its cryptogram and its signature."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyemv import cvn, tlv

from hwsim.cards.cryptogram import VISA_VERSIONS, Cvn
from hwsim.cards.personalise import Bureau, CardProfile, Entropy, Pan, personalise
from hwsim.cards.visa import VARIANTS, VisaCard

SEED = 20240612
SELECT_PPSE = bytes.fromhex("00A404000E325041592E5359532E444446303100")
SELECT_AID = bytes.fromhex("00A4040007A000000003101000")
OLD_DES = pytest.mark.filterwarnings("ignore:.*TripleDES:cryptography.utils.CryptographyDeprecationWarning")

TTQ = "27000000"  # EMV mode, online PIN, signature, authentication for online too
OFFLINE_ONLY, NO_ODA_ONLINE, ONLINE_WANTED = "2F000000", "26000000", "27800000"


def seeded() -> Entropy:
    """The same bytes in every run."""
    return random.Random(SEED).randbytes


@pytest.fixture(scope="module")
def bureau() -> Bureau:
    return Bureau.create(seeded())


@pytest.fixture(scope="module")
def profile(bureau: Bureau) -> CardProfile:
    return personalise(bureau, seeded())


def insert(profile: CardProfile) -> VisaCard:
    card = VisaCard(profile, seeded())
    card.reset()
    return card


def options(
    *,
    ttq: str = TTQ,
    amount: str = "000000001250",
    other: str = "000000000000",
    currency: str = "0978",
    kind: str = "00",
    un: str = "11223344",
) -> bytes:
    """GET PROCESSING OPTIONS with the values that the card's PDOL asks for, in its order."""
    values = bytes.fromhex(f"{ttq}{amount}{other}0276{'00' * 5}{currency}240611{kind}{un}")
    return bytes.fromhex("80A80000") + bytes((len(values) + 2, 0x83, len(values))) + values + b"\x00"


def read(sfi: int, number: int) -> bytes:
    return bytes((0x00, 0xB2, number, sfi << 3 | 4, 0x00))


def sw(answer: bytes) -> str:
    return answer[-2:].hex().upper()


def pay(card: VisaCard, **values: str) -> dict[str, bytes]:
    """Select, start, and return the objects of the answer."""
    assert sw(card.apdu(SELECT_AID)) == "9000"
    answer = card.apdu(options(**values))
    assert sw(answer) == "9000", sw(answer)
    (body,) = tlv.decode(answer[:-2]).values()
    return {str(tag): bytes(value) for tag, value in body.items()}


def listed_records(card: VisaCard, started: dict[str, bytes]) -> dict[str, bytes]:
    """All objects of the records in the AFL; a tag that comes twice fails, as it would at a terminal."""
    found: dict[str, bytes] = {}
    afl = started["94"]
    for sfi, first, last in zip(afl[0::4], afl[1::4], afl[2::4], strict=True):
        for number in range(first, last + 1):
            answer = card.apdu(read(sfi >> 3, number))
            assert sw(answer) == "9000"
            (template,) = tlv.decode(answer[:-2]).values()
            assert not set(template) & (set(found) | set(started))
            found |= template
    return found


def test_directory_and_application_are_found(profile: CardProfile) -> None:
    card = insert(profile)
    (directory,) = tlv.decode(card.apdu(SELECT_PPSE)[:-2]).values()
    entry = directory["A5"]["BF0C"]["61"]
    assert directory["84"] == b"2PAY.SYS.DDF01"
    assert (entry["4F"].hex(), entry["9F2A"], entry["87"]) == ("a0000000031010", b"\x03", b"\x01")
    (application,) = tlv.decode(card.apdu(SELECT_AID)[:-2]).values()
    assert application["84"].hex() == "a0000000031010"
    assert application["A5"]["9F38"].hex().upper() == "9F66049F02069F03069F1A0295055F2A029A039C019F3704"


REACH: dict[str, list[bytes]] = {
    "idle": [],
    "directory": [SELECT_PPSE],
    "selected": [SELECT_PPSE, SELECT_AID],
    "initiated": [SELECT_PPSE, SELECT_AID, options()],
}
# Command, and the status word in each state of REACH; one alone means all of them.
COMMANDS: dict[str, tuple[bytes, str]] = {
    "select directory": (SELECT_PPSE, "9000"),
    "select application": (SELECT_AID, "9000"),
    "select without Le": (SELECT_AID[:-1], "9000"),
    "select by partial name": (bytes.fromhex("00A4040006A0000000031000"), "9000"),
    "select by RID": (bytes.fromhex("00A4040005A00000000300"), "9000"),
    "select by less than a RID": (bytes.fromhex("00A4040004A000000000"), "6A82"),
    "select by longer name": (bytes.fromhex("00A4040008A00000000310100100"), "6A82"),
    "select another scheme": (bytes.fromhex("00A4040007A000000004101000"), "6A82"),
    "select contact directory": (bytes.fromhex("00A404000E315041592E5359532E444446303100"), "6A82"),
    "select next": (bytes.fromhex("00A4040207A000000003101000"), "6A82"),
    "select by file": (bytes.fromhex("00A40000023F0000"), "6A86"),
    "select last": (bytes.fromhex("00A4040107A000000003101000"), "6A86"),
    "select nothing": (bytes.fromhex("00A4040000"), "6700"),
    "start": (options(), "6985 6985 9000 6985"),
    "start with P2": (b"\x80\xa8\x00\x01" + options()[4:], "6985 6985 6A86 6985"),
    "start without data": (bytes.fromhex("80A80000028300" + "00"), "6985 6985 6700 6985"),
    "start with another template": (bytes.fromhex("80A80000028400" + "00"), "6985 6985 6A80 6985"),
    "start with an amount that is none": (options(amount="00000000125A"), "6985 6985 6A80 6985"),
    "start for magnetic stripe": (options(ttq="80000000"), "6985 6985 6985 6985"),
    "read": (read(2, 1), "6985 6985 6985 9000"),
    "read beyond the file": (read(2, 9), "6985 6985 6985 6A83"),
    "read an absent file": (read(9, 1), "6985 6985 6985 6A82"),
    "read record zero": (read(2, 0), "6985 6985 6985 6A86"),
    "read all records": (bytes.fromhex("00B2011500"), "6985 6985 6985 6A86"),
    "read with data": (bytes.fromhex("00B20114010000"), "6985 6985 6985 6700"),
    "generate AC": (bytes.fromhex("80AE8000010000"), "6D00"),
    "internal authenticate": (bytes.fromhex("00880000041122334400"), "6D00"),
    "select in the wrong class": (b"\x80" + SELECT_AID[1:], "6D00"),
    "unknown class": (b"\x90" + SELECT_AID[1:], "6E00"),
    "nothing": (b"", "6700"),
    "a header cut short": (b"\x00\xa4\x04", "6700"),
    "data cut short": (SELECT_AID[:-3], "6700"),
    "data too long": (SELECT_AID + b"\x00", "6700"),
    "Le that is not zero": (SELECT_AID[:-1] + b"\x10", "6700"),
    "extended length": (bytes.fromhex("00A40400000007A0000000031010"), "6700"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_in_every_state(profile: CardProfile, name: str) -> None:
    command, expected = COMMANDS[name]
    words = expected.split() * (len(REACH) if " " not in expected else 1)
    for state, word in zip(REACH, words, strict=True):
        card = insert(profile)
        for step in REACH[state]:
            assert sw(card.apdu(step)) == "9000"
        answer = card.apdu(command)
        assert sw(answer) == word, state
        assert (len(answer) > 2) == (word == "9000"), state


def test_a_refused_command_moves_neither_state_nor_counter(profile: CardProfile) -> None:
    card = insert(profile)
    card.apdu(SELECT_AID)
    for command, expected in COMMANDS.values():
        if "9000" not in expected:
            card.apdu(command)
    assert card.profile.atc == profile.atc
    assert sw(card.apdu(options())) == "9000"
    for command, expected in COMMANDS.values():
        if "9000" not in expected:
            card.apdu(command)
    assert sw(card.apdu(read(3, 1))) == "9000"


def test_leaving_the_field_forgets_everything_but_the_counter(profile: CardProfile) -> None:
    card = insert(replace(profile, atc=41))
    assert pay(card)["9F36"] == b"\x00\x2a"
    card.reset()
    assert sw(card.apdu(read(2, 1))) == "6985"
    assert sw(card.apdu(options())) == "6985"
    assert pay(card)["9F36"] == b"\x00\x2b"
    assert insert(card.profile).profile.atc == 43


def test_a_worn_out_counter_pays_once_more_and_never_again(profile: CardProfile) -> None:
    card = insert(replace(profile, atc=0xFFFE))
    assert pay(card)["9F36"] == b"\xff\xff"
    card.apdu(SELECT_AID)
    assert sw(card.apdu(options())) == "6985"


AAC, TC, ARQC = "00", "40", "80"
LIMIT = 2000


@pytest.mark.parametrize(
    ("limit_minor", "values", "expected"),
    [
        (0, {}, (ARQC, "2800", True)),
        (0, {"ttq": NO_ODA_ONLINE}, (ARQC, "2800", False)),
        (0, {"ttq": OFFLINE_ONLY}, (AAC, "2800", False)),
        (LIMIT, {"amount": "000000000000"}, (ARQC, "2800", True)),
        (LIMIT, {}, (TC, "2800", True)),
        (LIMIT, {"ttq": NO_ODA_ONLINE}, (TC, "2800", True)),
        (LIMIT, {"ttq": OFFLINE_ONLY}, (TC, "2800", True)),
        (LIMIT, {"amount": "000000002000"}, (TC, "2800", True)),
        (LIMIT, {"amount": "000000002001"}, (ARQC, "2800", True)),
        (LIMIT, {"amount": "000000002001", "ttq": OFFLINE_ONLY}, (AAC, "2800", False)),
        (LIMIT, {"currency": "0840"}, (ARQC, "2800", True)),
        (LIMIT, {"ttq": ONLINE_WANTED}, (ARQC, "2800", True)),
        (LIMIT, {"kind": "20"}, (AAC, "2800", False)),
        (LIMIT, {"ttq": "27400000"}, (ARQC, "A800", True)),  # PIN wanted: only the issuer can check it
        (LIMIT, {"ttq": "23400000"}, (TC, "6800", True)),  # signature, which needs nobody
        (LIMIT, {"ttq": "2F400000"}, (TC, "6800", True)),  # PIN pad, but offline: signature again
        (LIMIT, {"ttq": "21400000"}, (AAC, "2800", False)),  # nothing in common
    ],
)
def test_decisions(
    profile: CardProfile, limit_minor: int, values: dict[str, str], expected: tuple[str, str, bool]
) -> None:
    cid, ctq, signed = expected
    card = insert(replace(profile, offline_limit_minor=limit_minor))
    started = pay(card, **values)
    records = listed_records(card, started)
    assert (started["9F27"].hex(), started["9F6C"].hex().upper()) == (cid, ctq)
    # Byte 5 of the issuer application data repeats the type, where the cryptogram protects it.
    assert {0x00: AAC, 0x10: TC, 0x20: ARQC}[started["9F10"][4] & 0x30] == cid
    assert ("9F4B" in records, "9F69" in records, "90" in records) == (signed, signed, signed)
    assert {"5A", "5F24", "5F20", "9F07"} <= set(records)


def test_without_a_common_cvm_it_asks_for_the_contact_interface(profile: CardProfile) -> None:
    card = insert(profile)
    card.apdu(SELECT_AID)
    assert sw(card.apdu(options(ttq="31400000"))) == "6984"
    assert card.profile.atc == 0


PEER: dict[Cvn, Any] = {Cvn.CVN10: cvn.VisaCVN10, Cvn.CVN18: cvn.VisaCVN18, Cvn.CVN22: cvn.VisaCVN22}


def peer_cryptogram(bureau: Bureau, profile: CardProfile, started: dict[str, bytes], **changed: str) -> bytes:
    """The cryptogram by another implementation, from the issuer's master key."""
    peer = PEER[profile.cvn](bureau.imk_ac, bureau.imk_ac, bureau.imk_ac, profile.pan.digits, profile.psn)
    values = {
        "9f02": "000000001250", "9f03": "000000000000", "9f1a": "0276", "95": "00" * 5, "5f2a": "0978",
        "9a": "240611", "9c": "00", "9f37": "11223344",
    } | changed  # fmt: skip
    arguments = {f"tag_{tag}": bytes.fromhex(value) for tag, value in values.items()}
    arguments |= {"tag_82": started["82"], "tag_9f36": started["9F36"]}
    iad = {"cvr": started["9F10"][3:7]} if profile.cvn is Cvn.CVN10 else {"tag_9f10": started["9F10"]}
    return bytes(peer.generate_ac(**arguments, **iad))


@OLD_DES
@pytest.mark.parametrize("version", VISA_VERSIONS)
@pytest.mark.parametrize("pan", ["4000000000078990", "4000000000000000006"], ids=["16-digits", "19-digits"])
def test_the_cryptogram_is_what_another_implementation_makes(bureau: Bureau, version: Cvn, pan: str) -> None:
    profile = personalise(bureau, seeded(), pan=Pan(pan), cvn=version)
    card = insert(profile)
    for _ in range(2):  # two counters, two session keys
        started = pay(card)
        assert started["9F26"] == peer_cryptogram(bureau, profile, started)
        assert started["9F26"] != peer_cryptogram(bureau, profile, started, **{"9f37": "11223345"})
        assert started["9F26"] != peer_cryptogram(bureau, profile, started, **{"9f02": "000000001251"})


def recovered_by(key: bytes, exponent: int, signature: bytes) -> bytes:
    assert len(signature) == len(key)
    return pow(int.from_bytes(signature, "big"), exponent, int.from_bytes(key, "big")).to_bytes(len(key), "big")


def signature_holds(profile: CardProfile, atc: bytes, objects: dict[str, bytes], amount: str = "000000001250") -> bool:
    """fDDA as a terminal checks it, with the ICC key taken from the profile before anybody changed it."""
    assert profile.icc_key is not None
    block = recovered_by(profile.icc_key.modulus, profile.icc_key.exponent, objects["9F4B"])
    terminal = bytes.fromhex(f"11223344{amount}0978")
    digest = hashlib.sha1(block[1:-21] + terminal + objects["9F69"], usedforsecurity=False).digest()
    start = b"\x6a\x05\x01\x03\x02" + atc
    return block.startswith(start) and set(block[7:-21]) == {0xBB} and block[-21:] == digest + b"\xbc"


@pytest.mark.parametrize("icc_key_bits", [1024, 1152])
def test_the_signature_binds_amount_counter_and_card_data(bureau: Bureau, icc_key_bits: int) -> None:
    profile = personalise(bureau, seeded(), icc_key_bits=icc_key_bits, cvn=Cvn.CVN22)
    card = insert(profile)
    started = pay(card)
    objects = started | listed_records(card, started)
    assert ("9F4B" in started) == (icc_key_bits == 1024)  # a short signature travels at once
    assert signature_holds(profile, started["9F36"], objects)
    assert not signature_holds(profile, started["9F36"], objects, amount="000000001251")
    assert not signature_holds(profile, b"\x00\x02", objects)
    assert not signature_holds(profile, started["9F36"], objects | {"9F69": objects["9F69"][:-1] + b"\x01"})
    assert objects["9F69"][0] == 1
    assert objects["9F69"][5:] == started["9F6C"]
    again = pay(card)
    assert listed_records(card, again)["9F69"][1:5] != objects["9F69"][1:5]


@OLD_DES
def test_variants_are_wrong_in_their_own_way_only(bureau: Bureau, profile: CardProfile) -> None:
    entropy = seeded()
    genuine = {"normal": (True, True), "wrong-key": (False, True), "emulator": (False, False)}
    for name, (cryptogram_holds, authentic) in genuine.items():
        variant = VARIANTS[name](profile, entropy)
        card = insert(variant)
        started = pay(card)
        objects = started | listed_records(card, started)
        assert (started["9F26"] == peer_cryptogram(bureau, profile, started)) == cryptogram_holds, name
        assert signature_holds(profile, started["9F36"], objects) == authentic, name
    online_only = insert(VARIANTS["no-fdda"](replace(profile, offline_limit_minor=LIMIT), entropy))
    started = pay(online_only)
    assert (started["82"].hex(), started["9F27"].hex()) == ("0000", ARQC)
    assert "9F4B" not in started | listed_records(online_only, started)
    assert pay(insert(VARIANTS["declines"](profile, entropy)))["9F27"].hex() == AAC


def test_blocked_and_absent_applications_never_start(profile: CardProfile) -> None:
    entropy = seeded()
    blocked = insert(VARIANTS["blocked"](profile, entropy))
    assert sw(blocked.apdu(SELECT_PPSE)) == "9000"
    warned = blocked.apdu(SELECT_AID)
    assert (sw(warned), warned[0]) == ("6283", 0x6F)
    assert sw(blocked.apdu(options())) == "6985"
    absent = insert(VARIANTS["not-supported"](profile, entropy))
    assert [sw(absent.apdu(command)) for command in (SELECT_PPSE, SELECT_AID, options())] == ["6A82", "6A82", "6985"]


HEADERS = st.sampled_from([command[:4] for command, _ in COMMANDS.values() if len(command) >= 4])
BODIES = st.binary(max_size=80).map(lambda data: bytes((len(data),)) + data + b"\x00")
STARTS = st.binary(min_size=33, max_size=33).map(lambda data: bytes.fromhex("80A80000238321") + data + b"\x00")
ANY_COMMAND = st.one_of(
    st.binary(max_size=300),
    st.tuples(HEADERS, BODIES).map(b"".join),
    st.sampled_from([command for command, _ in COMMANDS.values()]),
    STARTS,
)


@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    commands=st.lists(ANY_COMMAND, max_size=8),
    start=st.sampled_from(list(REACH)),
)
def test_whatever_comes_the_card_answers_with_a_status_word(
    card_maker: Callable[[str], VisaCard], variant: str, commands: list[bytes], start: str
) -> None:
    card = card_maker(variant)
    for command in [*REACH[start], *commands]:
        answer = card.apdu(command)
        assert 2 <= len(answer) <= 258
        assert answer[-2] in (0x90, 0x62, 0x67, 0x69, 0x6A, 0x6D, 0x6E)


@pytest.fixture(scope="module")
def card_maker(profile: CardProfile) -> Callable[[str], VisaCard]:
    return lambda variant: insert(VARIANTS[variant](profile, seeded()))

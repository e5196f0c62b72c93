"""Personalisation: certificates that an independent verifier accepts, card files that survive, nothing that leaks."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyemv import tlv

from hwsim.cards import bertlv, designs
from hwsim.cards.bureau import Bureau, Entropy, RsaKey, Scheme
from hwsim.cards.designs import DESIGNS
from hwsim.cards.files import CardFileError
from hwsim.cards.personalise import personalise, rack
from hwsim.cards.profile import ApplicationData, CardProfile, Pan, Standing, laboratory_pan
from hwsim.cards.variants import VARIANTS

VECTORS = Path(__file__).parents[2] / "shared" / "vectors" / "oda_emv_utils.json"
SEED = 20240611


def seeded() -> Entropy:
    """The same bytes in every run."""
    return random.Random(SEED).randbytes


@pytest.fixture(scope="module")
def bureau() -> Bureau:
    return Bureau.create(seeded())


@pytest.fixture(scope="module")
def profile(bureau: Bureau) -> CardProfile:
    return personalise(bureau, seeded())


@dataclass(frozen=True)
class Recovered:
    identifier: str
    expires_mmyy: str
    modulus: bytes


def recover(
    certificate: bytes,
    modulus: bytes,
    exponent: bytes,
    *,
    remainder: bytes,
    subject_exponent: bytes,
    static: bytes = b"",
) -> Recovered:
    """What a terminal does with a certificate (EMV 4.4 Book 2, 5.3 and 6.4), written from the tables."""
    assert len(certificate) == len(modulus)
    number = pow(int.from_bytes(certificate, "big"), int.from_bytes(exponent, "big"), int.from_bytes(modulus, "big"))
    block = number.to_bytes(len(modulus), "big")
    assert (block[0], block[-1]) == (0x6A, 0xBC)
    identifier_size = {0x02: 4, 0x04: 10}[block[1]]
    identifier, rest = block[2 : 2 + identifier_size], block[2 + identifier_size : -21]
    expires, _serial, hash_id, algorithm, size, exponent_size = (
        rest[:2], rest[2:5], rest[5], rest[6], rest[7], rest[8],
    )  # fmt: skip
    assert (hash_id, algorithm, exponent_size) == (1, 1, len(subject_exponent))
    hashed = block[1:-21] + remainder + subject_exponent + static
    assert hashlib.sha1(hashed, usedforsecurity=False).digest() == block[-21:-1]
    key = rest[9:]
    if size <= len(key):
        assert set(key[size:]) <= {0xBB}
        assert not remainder
    else:
        assert len(remainder) == size - len(key)
    return Recovered(identifier.hex().upper(), expires.hex(), (key + remainder)[:size])


def objects(profile: CardProfile, sfi: int, number: int) -> dict[str, bytes]:
    """Of a record on the contactless interface."""
    record = next(record for record in profile.records if (record.sfi, record.number) == (sfi, number))
    (template,) = tlv.decode(record.data).values()
    return {str(tag): bytes(value) for tag, value in template.items()}


def static_data(application: ApplicationData) -> bytes:
    """What the ICC certificate covers: the record that carries 9F4A, without its template, and the AIP."""
    (signed,) = (
        body for record in application.records if 0x9F4A in bertlv.decode(body := bertlv.decode(record.data)[0x70])
    )
    return signed + application.aip


def follow_chain(profile: CardProfile, application: ApplicationData | None = None) -> bytes:
    """The ICC's modulus, trusting nothing but the CA's public key record."""
    application = application or profile.contactless
    ca = {name: bytes.fromhex(value) for name, value in profile.ca_public_key.record().items()}

    def found(tag: int) -> bytes:
        value = application.find(tag)
        assert value is not None, f"{tag:X} is missing"
        return value

    assert found(0x8F) == ca["index"]
    issuer = recover(
        found(0x90),
        ca["modulus"],
        ca["exponent"],
        remainder=application.find(0x92) or b"",
        subject_exponent=found(0x9F32),
    )
    assert issuer.identifier == profile.pan.digits[:6] + "FF"
    icc = recover(
        found(0x9F46),
        issuer.modulus,
        found(0x9F32),
        remainder=application.find(0x9F48) or b"",
        subject_exponent=found(0x9F47),
        static=static_data(application),
    )
    assert icc.identifier == profile.pan.digits.ljust(20, "F")
    assert (issuer.expires_mmyy, icc.expires_mmyy) == ("1240", "1240")
    return icc.modulus


def test_the_chain_leads_from_the_ca_to_the_icc_key(profile: CardProfile) -> None:
    assert profile.icc_key is not None
    assert follow_chain(profile) == follow_chain(profile, profile.contact) == profile.icc_key.modulus
    assert "92" in objects(profile, 2, 1)
    assert "9F48" in objects(profile, 2, 2)


@pytest.mark.parametrize(
    ("exponent", "issuer_bits", "icc_bits"),
    [(3, 1024, 1024), (65537, 1408, 1152), (65537, 1152, 1152), (3, 1024 + 8 * 12, 1024)],
    ids=["no-remainder", "long-exponent", "remainder-of-the-icc-only", "remainder-none-but-full"],
)
def test_every_size_of_key_is_certified(exponent: int, issuer_bits: int, icc_bits: int) -> None:
    bureau = Bureau.create(seeded(), exponent=exponent, issuer_key_bits=issuer_bits)
    profile = personalise(bureau, seeded(), icc_key_bits=icc_bits)
    assert profile.icc_key is not None
    assert follow_chain(profile) == profile.icc_key.modulus
    issuer_room, icc_room = 176 - 36, issuer_bits // 8 - 42
    assert len(objects(profile, 2, 1).get("92", b"")) == max(0, issuer_bits // 8 - issuer_room)
    assert len(objects(profile, 2, 2).get("9F48", b"")) == max(0, icc_bits // 8 - icc_room)


@pytest.mark.parametrize("tag", ["5A", "5F24", "5F28", "9F07"])
def test_changed_static_data_breaks_the_icc_certificate(profile: CardProfile, tag: str) -> None:
    for application in (profile.contactless, profile.contact):
        value = application.find(int(tag, 16))
        assert value is not None
        forged = application.changed(int(tag, 16), bytes((value[0] ^ 1,)) + value[1:])
        assert forged != application
        with pytest.raises(AssertionError):
            follow_chain(profile, forged)


def test_a_switched_off_aip_and_a_broken_certificate_break_the_chain(profile: CardProfile) -> None:
    broken = VARIANTS["broken-certificate"](profile, seeded())
    for interface in ("contactless", "contact"):
        application: ApplicationData = getattr(profile, interface)
        with pytest.raises(AssertionError):
            follow_chain(profile, replace(application, aip=b"\x00\x00"))
        with pytest.raises(AssertionError):
            follow_chain(profile, getattr(broken, interface))
    follow_chain(VARIANTS["emulator"](profile, seeded()))  # copied certificates stay true


@pytest.mark.skipif(not VECTORS.exists(), reason="the published certificates are not beside this checkout")
def test_the_verifier_of_these_tests_agrees_with_published_certificates() -> None:
    for case in json.loads(VECTORS.read_text(encoding="utf-8"))["cases"]:
        capk, icc_data = case["capk"], case["icc_data"]
        modulus, exponent = bytes.fromhex(capk["modulus"]), bytes.fromhex(capk["exponent"])
        key = {"remainder": bytes.fromhex(icc_data["92"]), "subject_exponent": bytes.fromhex(icc_data["9F32"])}
        recover(bytes.fromhex(case["tag_90"]), modulus, exponent, **key)
        if "tag_90_invalid" in case:
            with pytest.raises(AssertionError):
                recover(bytes.fromhex(case["tag_90_invalid"]), modulus, exponent, **key)


def test_the_ca_record_is_what_a_terminal_checks(bureau: Bureau) -> None:
    record = bureau.ca_public_key.record()
    parts = bytes.fromhex(record["rid"] + record["index"] + record["modulus"] + record["exponent"])
    assert hashlib.sha1(parts, usedforsecurity=False).hexdigest().upper() == record["checksum"]
    assert (record["rid"], record["index"], len(record["modulus"])) == ("A000000003", "F0", 352)


def test_what_is_signed_fills_the_key() -> None:
    key = RsaKey.generate(1024, 3)
    assert len(key.sign(bytes(key.room_bytes))) == key.size_bytes == 128
    with pytest.raises(ValueError, match="not as long as the modulus"):
        key.sign(bytes(key.room_bytes - 1))


def test_the_card_carries_what_was_asked_for(bureau: Bureau) -> None:
    pan = laboratory_pan(7899)
    profile = personalise(bureau, seeded(), pan=pan, psn="02", expires=date(2029, 2, 28))
    assert pan.digits == "4000000000078990"
    assert profile.track2.hex() == f"{pan.digits}d2902201" + "0" * 10
    assert objects(profile, 3, 1)["5A"].hex() == pan.digits
    assert objects(profile, 3, 1)["5F24"].hex() == "290228"


@pytest.mark.parametrize("digits", ["4000000000000001", "400000", "40000000000000000000", "400000000000000x", ""])
def test_impossible_account_numbers_are_refused_without_being_quoted(digits: str) -> None:
    with pytest.raises(ValueError, match="PAN") as refusal:
        Pan(digits)
    assert not digits or digits not in str(refusal.value)


def test_profiles_and_bureaus_survive_their_files(bureau: Bureau, profile: CardProfile, tmp_path: Path) -> None:
    bureau.save(tmp_path / "bureau.json")
    assert Bureau.load(tmp_path / "bureau.json") == bureau
    entropy = seeded()
    for name, variant in VARIANTS.items():
        card = replace(
            variant(profile, entropy), atc=77, atc_last_online=5, online_incomplete=True, log=(b"\x01", b"\x02")
        )
        card.save(tmp_path / f"{name}.json")
        assert CardProfile.load(tmp_path / f"{name}.json") == card
    assert CardProfile.load(tmp_path / "blocked.json").standing is Standing.BLOCKED


def without(document: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != key}


def test_damaged_files_say_what_to_do(bureau: Bureau, profile: CardProfile, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    profile.save(path)
    good = json.loads(path.read_text(encoding="utf-8"))
    damaged = [without(good, key) for key in good] + [good | {"pan": "4000000000000001"}, []]
    damaged += [good | {"contact": 3}, good | {"contact": good["contact"] | {"records": 3}}]
    for document in damaged:
        path.write_text(json.dumps(document), encoding="utf-8")
        with pytest.raises(CardFileError, match="anew"):
            CardProfile.load(path)
    for text in ("{", ""):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(CardFileError):
            CardProfile.load(path)
    with pytest.raises(CardFileError):
        CardProfile.load(tmp_path / "missing.json")
    bureau.save(path)
    with pytest.raises(CardFileError, match="is no 'payterm test card"):
        CardProfile.load(path)
    path.write_text(path.read_text(encoding="utf-8").replace("imk_ac", "imk"), encoding="utf-8")
    with pytest.raises(CardFileError, match="new bureau"):
        Bureau.load(path)


def test_no_representation_shows_card_data_or_keys(bureau: Bureau, profile: CardProfile) -> None:
    assert profile.icc_key is not None
    assert profile.card_key is not None
    shown = repr(profile) + str(profile) + repr(bureau) + f"{profile.pan}"
    secrets = (repr(profile.card_key), repr(profile.script_key), repr(bureau.imk_ac))
    for secret in (profile.pan.digits, str(profile.icc_key.p), *secrets):
        assert secret not in shown
    assert f"Pan(...{profile.pan.digits[-4:]})" in shown


TAGS = st.sampled_from([0x57, 0x5A, 0x82, 0x5F24, 0x9F02, 0x9F10, 0x9F36, 0xDF8129])


@given(st.dictionaries(TAGS, st.binary(max_size=300)))
def test_tlv_is_read_back_by_us_and_by_others(values: dict[int, bytes]) -> None:
    data = b"".join(bertlv.encode(tag, value) for tag, value in values.items())
    assert bertlv.decode(data) == values
    assert {int(tag, 16): bytes(value) for tag, value in tlv.decode(data).items()} == values


@given(st.binary(max_size=64))
def test_arbitrary_bytes_are_tlv_or_refused(data: bytes) -> None:
    for read in (bertlv.decode, bertlv.decode_dol):
        try:
            read(data)
        except bertlv.TlvError as refusal:
            assert str(refusal)


@pytest.mark.parametrize("data", ["5A", "5A02", "5A0201", "9F", "9F81", "5A80", "5A83000001FF", "5A01005A0100"])
def test_broken_tlv_is_refused(data: str) -> None:
    with pytest.raises(bertlv.TlvError):
        bertlv.decode(bytes.fromhex(data))


def test_a_flood_of_objects_is_refused() -> None:
    objects = [bertlv.encode(0xDF8100 + number, b"") for number in range(0x80)]
    objects += [bertlv.encode(0x9F8100 + number, b"") for number in range(0x80)]
    assert len(bertlv.decode(b"".join(objects))) == bertlv.OBJECTS_MAX
    with pytest.raises(bertlv.TlvError, match="more than 256"):
        bertlv.decode(b"".join(objects) + bertlv.encode(0x82, b""))


# ---- designs


@pytest.fixture(scope="module")
def cards(bureau: Bureau) -> dict[str, CardProfile]:
    mastercard = Bureau.create(seeded(), scheme=Scheme.MASTERCARD, imk_ac=bureau.imk_ac)
    return rack({Scheme.VISA: bureau, Scheme.MASTERCARD: mastercard}, seeded())


MISBEHAVING = {
    "no-fdda", "broken-certificate", "mastercard-broken-certificate", "certificate-expired",
    "mastercard-certificate-expired",
}  # fmt: skip


def test_every_design_becomes_a_card_with_an_account_of_its_own(cards: dict[str, CardProfile], tmp_path: Path) -> None:
    assert {"visa-debit", "visa-credit", "mastercard-debit", "mastercard-credit"} <= set(cards) == set(designs.names())
    assert len({card.pan.digits for card in cards.values()}) == len(cards)
    for name, card in cards.items():
        assert card.aid.startswith(card.scheme.rid)
        assert card.ca_public_key.rid == card.scheme.rid
        assert card.pan.digits.startswith(card.scheme.iin)
        for application in (card.contactless, card.contact):
            assert max(len(record.data) for record in application.records) <= 252  # what READ RECORD can bring
            if name not in MISBEHAVING:
                assert len(follow_chain(card, application)) == 144
        card.save(tmp_path / "card.json")
        assert CardProfile.load(tmp_path / "card.json") == card


def test_a_design_says_what_is_on_the_card(cards: dict[str, CardProfile]) -> None:
    debit, credit = cards["visa-debit"], cards["mastercard-credit"]
    assert (debit.contact.aip.hex(), debit.contactless.aip.hex()) == ("3c00", "2000")
    assert (credit.contact.aip.hex(), credit.contactless.aip.hex()) == ("3900", "1980")
    assert debit.ctq.hex() == "2800"
    assert debit.contact.cdol1.hex() == "9f02069f03069f1a0295055f2a029a039c019f3704"
    assert (debit.contact.find(0x8E) or b"").hex() == "0000000000000000" + "4203" + "5e03" + "1f00"
    assert (debit.contact.find(0x9F0F) or b"").hex() == "f868fcf800"
    assert (credit.contact.find(0x9F14), credit.contact.find(0x9F23)) == (b"\x03", b"\x05")
    assert (credit.language, credit.offline_limit_minor) == ("en", 2500)
    assert cards["expired"].expires == date(2021, 6, 30)
    assert (cards["expired"].contact.find(0x5F24) or b"").hex() == "210630"
    assert cards["two-names"].more_aids == (bytes.fromhex("A000000003101002"),)
    assert not cards["no-fdda"].contact.aip[0] & 0x61
    assert cards["no-fdda"].contact.afl.hex() == "08010100" + "18010200"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("scheme =", "Invalid value"),
        ('like = "itself"', "never end"),
        ('like = "absent"', "No such file"),
        ('like = "visa-debit"\ncolour = "blue"', "unknown field"),
        ('like = "visa-debit"\nversion = "CVN99"', "CVN99"),
        ('like = "visa-debit"\naid = "A0000000041010"', "another scheme"),
        ('like = "visa-debit"\nmisbehaves = "badly"', "no known way"),
        ('like = "visa-debit"\noffline_limit_minor = -1', "offline_limit_minor"),
        ('like = "visa-debit"\n[contact]\naip = ["telepathy"]', "telepathy"),
        ('like = "visa-debit"\n[contact]\ncdol1 = "9F02"', "cryptogram covers"),
        ('like = "visa-debit"\n[contact]\ncdol2 = "9F99"', "no card design"),
        ('like = "visa-debit"\n[contact]\ncvm = [{ method = "horoscope" }]', "horoscope"),
        ('like = "visa-debit"\n[contact]\niac_online = "F8"', "iac_online"),
    ],
)
def test_a_design_that_makes_no_sense_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "visa-debit.toml").write_bytes((DESIGNS / "visa-debit.toml").read_bytes())
    (tmp_path / "itself.toml").write_text(text, encoding="utf-8")
    assert designs.load("visa-debit", tmp_path) == designs.load("visa-debit")
    with pytest.raises(CardFileError, match="no card design") as refusal:
        designs.load("itself", tmp_path)
    assert complaint in str(refusal.value)


def test_what_a_design_does_not_say_it_takes_from_the_one_it_is_like() -> None:
    plain, other = designs.load("visa-debit"), designs.load("declines")
    assert (plain.declines, other.declines) == (False, True)
    assert (plain.contact, plain.contactless, plain.label) == (other.contact, other.contactless, other.label)
    assert plain.serial != other.serial


def test_a_card_is_made_by_a_bureau_of_its_scheme(bureau: Bureau) -> None:
    with pytest.raises(CardFileError, match="needs a bureau of that scheme"):
        personalise(bureau, seeded(), designs.load("mastercard-debit"))

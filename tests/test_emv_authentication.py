"""Offline data authentication (Book 2, 5 and 6; Book C-3, Annex C): each link of the chain, whole and tampered with."""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from emv_rig import ATC, CA_INDEX, DATE, PAN, RID, UN, Pki, fast_dda_data, rsa_key, sha1

from terminal.emv import authentication
from terminal.emv.authentication import (
    AuthenticationFailed,
    CaKey,
    CaKeyError,
    CaKeys,
    PublicKey,
    RevokedCertificate,
    Trust,
)
from terminal.emv.outcome import OdaMethod, OdaResult, OdaStatus
from terminal.emv.results import Aip

VECTORS = Path(__file__).parents[2] / "shared" / "vectors"
AMOUNT_MINOR = 1250
STATIC = bytes.fromhex("5F2503200101")
OK = OdaResult(OdaStatus.OK, OdaMethod.FDDA)


def vectors(name: str) -> Any:
    path = VECTORS / name
    if not path.exists():
        pytest.skip("the published vectors are not beside this project")
    return json.loads(path.read_text(encoding="utf-8"))


def card(pki: Pki, **changes: bytes | None) -> dict[int, bytes]:
    """Everything fast DDA looks at; changes as tag_92=b"..."."""
    related, signed = fast_dda_data(AMOUNT_MINOR)
    objects: dict[str, bytes | None] = {
        **pki.objects(STATIC),
        "5A": bytes.fromhex(PAN),
        "82": bytes.fromhex("2000"),
        "9F36": ATC,
        "9F37": UN,
        "9F02": bytes.fromhex(f"{AMOUNT_MINOR:012d}"),
        "5F2A": bytes.fromhex("0978"),
        "9F69": related,
        "9F4B": pki.sign_dynamic(b"\x02" + ATC, signed),
    }
    objects |= {tag.removeprefix("tag_"): value for tag, value in changes.items()}
    return {int(tag, 16): value for tag, value in objects.items() if value is not None}


def trust(pki: Pki, date: datetime.date = DATE, *revoked: RevokedCertificate) -> Trust:
    return Trust(CaKeys([pki.ca_key]), frozenset(revoked), date)


def verdict(pki: Pki, records: bytes | None = STATIC, **changes: bytes | None) -> OdaResult:
    return authentication.fast_dda(card(pki, **changes), RID, records, trust(Pki()))


def failed(reason: str) -> OdaResult:
    return OdaResult(OdaStatus.FAILED, OdaMethod.FDDA, reason)


def flip(value: bytes, at: int = -1) -> bytes:
    changed = bytearray(value)
    changed[at] ^= 0x01
    return bytes(changed)


# 6.3, 6.4, C-3 Annex C: the whole chain


def test_fast_dda() -> None:
    assert verdict(Pki()) == OK


def test_keys_that_fit_their_certificates_need_no_remainder() -> None:
    pki = Pki(issuer=rsa_key("issuer", 104), icc=rsa_key("icc", 56))
    assert not {"92", "9F48"} & pki.objects().keys()
    assert verdict(pki) == OK


@pytest.mark.parametrize("tag", ["8F", "90", "9F32", "9F46", "9F47", "9F4B", "9F69", "5A", "9F36", "9F37"])
def test_a_missing_object(tag: str) -> None:
    assert verdict(Pki(), **{f"tag_{tag}": None}) == failed("missing_data")


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        ("90", "issuer_certificate"),
        ("92", "issuer_certificate"),
        ("9F32", "issuer_certificate"),
        ("9F46", "icc_certificate"),
        ("9F48", "icc_certificate"),
        ("9F47", "icc_certificate"),
        ("9F4B", "signature"),
        ("9F69", "signature"),
        ("9F36", "signature"),
        ("9F37", "signature"),
        ("9F02", "signature"),
        ("5F2A", "signature"),
        ("8F", "ca_key_missing"),
    ],
)
def test_one_bit_anywhere_breaks_the_chain(tag: str, reason: str) -> None:
    whole = card(Pki())
    assert verdict(Pki(), **{f"tag_{tag}": flip(whole[int(tag, 16)])}) == failed(reason)


@pytest.mark.parametrize(
    ("tag", "reason"),
    [("90", "issuer_certificate"), ("9F46", "icc_certificate"), ("9F4B", "signature")],
)
def test_a_signature_must_be_as_long_as_the_modulus(tag: str, reason: str) -> None:
    whole = card(Pki())[int(tag, 16)]
    assert verdict(Pki(), **{f"tag_{tag}": whole[1:]}) == failed(reason)
    assert verdict(Pki(), **{f"tag_{tag}": b"\x00" + whole}) == failed(reason)


def test_a_remainder_must_have_the_exact_length() -> None:
    short = replace(rsa_key("issuer", 128))
    pki = Pki(issuer=short)
    rest = card(pki)[0x92]
    assert verdict(pki, tag_92=None) == failed("missing_data")
    assert verdict(pki, tag_92=rest + b"\x00") == failed("issuer_certificate")


def test_a_remainder_of_wrong_length_under_a_right_hash() -> None:
    """Only a CA could sign this: the certificate claims a key one byte longer than field and remainder hold."""

    class Long(Pki):
        @staticmethod
        def _split(modulus: bytes, room: int) -> tuple[bytes, bytes]:
            return modulus[:room].ljust(room, b"\xbb"), modulus[room:-1]

    assert verdict(Long()) == failed("issuer_certificate")


# 6.3: the issuer certificate


@pytest.mark.parametrize(
    ("pki", "reason"),
    [
        (Pki(issuer_kind=4), "issuer_certificate"),
        (Pki(hash_algorithm=2), "issuer_certificate"),
        (Pki(key_algorithm=2), "issuer_certificate"),
        (Pki(iin="400001"), "issuer_certificate"),
        (Pki(iin="40"), "issuer_certificate"),  # fewer than three digits name nobody
        (Pki(iin=""), "issuer_certificate"),
        (Pki(issuer_expiry="1330"), "issuer_certificate"),
        (Pki(issuer_expiry="0030"), "issuer_certificate"),
        (Pki(issuer_expiry="1A30"), "issuer_certificate"),
        (Pki(issuer_expiry="0226"), "expired"),
        (Pki(icc_kind=2), "icc_certificate"),
        (Pki(pan="4000001234567890"), "icc_certificate"),
        (Pki(icc_expiry="0226"), "expired"),
        (Pki(icc_expiry="1399"), "icc_certificate"),
        (Pki(ca=rsa_key("another ca", 144)), "issuer_certificate"),
    ],
)
def test_book_2_6_3_a_certificate_that_does_not_fit(pki: Pki, reason: str) -> None:
    assert verdict(pki) == failed(reason)


@pytest.mark.parametrize("iin", ["400", "40000012"])
def test_issuer_identifiers_of_three_to_eight_digits(iin: str) -> None:
    assert verdict(Pki(iin=iin)) == OK


def test_pan_of_odd_length_is_compared_without_padding() -> None:
    pan = "4000001234567899019"
    assert verdict(Pki(pan=pan), tag_5A=bytes.fromhex(pan + "F")) == OK


@pytest.mark.parametrize(
    ("expiry", "date", "result"),
    [
        ("0326", datetime.date(2026, 3, 31), OK),  # through the last day of its month
        ("0326", datetime.date(2026, 4, 1), failed("expired")),
        ("0127", datetime.date(2026, 3, 14), OK),  # January
        ("1249", datetime.date(2049, 12, 31), OK),
        ("1299", datetime.date(2026, 3, 14), failed("expired")),  # 99 is 1999
    ],
)
def test_book_2_6_expiry(expiry: str, date: datetime.date, result: OdaResult) -> None:
    pki = Pki(issuer_expiry=expiry, icc_expiry="1249")
    assert authentication.fast_dda(card(pki), RID, STATIC, trust(pki, date)) == result


def test_revocation_names_scheme_key_and_serial() -> None:
    pki = Pki()
    listed = RevokedCertificate(RID, CA_INDEX, pki.serial)
    for entry, result in [
        (listed, failed("revoked")),
        (replace(listed, serial=flip(pki.serial)), OK),
        (replace(listed, index=CA_INDEX + 1), OK),
        (replace(listed, rid=flip(RID)), OK),
    ]:
        assert authentication.fast_dda(card(pki), RID, STATIC, trust(pki, DATE, entry)) == result


def test_the_exponent_is_3_or_65537() -> None:
    issuer = rsa_key("issuer", 128)
    wide = replace(issuer, e=65537, d=pow(65537, -1, _totient(issuer)))
    assert verdict(Pki(issuer=wide)) == OK
    seventeen = replace(issuer, e=17, d=pow(17, -1, _totient(issuer)))
    assert verdict(Pki(issuer=seventeen)) == failed("issuer_certificate")


def _totient(key: Any) -> int:
    """A multiple of the order, from e * d = 1: enough to invert another exponent."""
    multiple: int = key.e * key.d - 1
    while multiple % 17 == 0:
        multiple //= 17
    return multiple


def test_a_key_of_zeros_recovers_nothing() -> None:
    assert PublicKey(bytes(64), b"\x03").recover(bytes(64), 5) is None


def test_years_of_two_digits() -> None:
    """Book 4, 6.7.3."""
    assert [authentication.full_year(year) for year in (0, 49, 50, 99)] == [2000, 2049, 1950, 1999]


def test_the_shortest_frame() -> None:
    """Head, format, tail, 20 bytes of hash, and one byte that is signed."""
    for size, framed in ((23, False), (24, True)):
        key = rsa_key("short", size)
        signed = key.sign(b"\x05".ljust(size - 22, b"\xbb"), b"")
        assert (PublicKey(key.modulus, key.exponent).recover(signed, 5) is not None) is framed


def test_a_key_that_just_fits_its_certificate_needs_no_remainder() -> None:
    assert verdict(Pki(rsa_key("ca", 144), rsa_key("issuer", 108), rsa_key("icc", 66))) == OK


@pytest.mark.parametrize("tag", [0x9F46, 0x9F47])
def test_what_is_missing_is_said_before_a_key_is_looked_for(tag: int) -> None:
    objects = {name: value for name, value in card(Pki()).items() if name != tag}
    with pytest.raises(AuthenticationFailed, match=r"^missing_data$"):
        authentication.card_key(objects, flip(RID), STATIC, trust(Pki()))


def test_fast_dda_over_data_of_ones_own_needs_the_cards_part() -> None:
    objects = {name: value for name, value in card(Pki()).items() if name != 0x9F69}
    assert authentication.fast_dda_over(UN, objects, RID, STATIC, trust(Pki())) == failed("missing_data")


def test_without_an_aip_the_tag_list_adds_nothing() -> None:
    assert authentication.static_data_to_authenticate(b"records", {0x9F4A: b"\x82"}) == b"records"


def test_a_key_too_short_for_a_frame_recovers_nothing() -> None:
    key = PublicKey(b"\xff" * 20, b"\x03")
    assert all(key.recover(bytes(19) + bytes([last]), 5) is None for last in range(8))


def test_an_issuer_key_too_short_for_a_card_certificate() -> None:
    """40 bytes hold a frame, but no card certificate: nothing is read beyond its end."""
    pki = Pki(issuer=rsa_key("tiny issuer", 40))
    middle = b"\x04".ljust(pki.issuer.size - 22, b"\x00")
    certificate = pki.issuer.sign(middle, b"")
    objects = card(Pki()) | {0x9F46: certificate}
    issuer = PublicKey(pki.issuer.modulus, pki.issuer.exponent)
    with pytest.raises(AuthenticationFailed, match="icc_certificate"):
        authentication.icc_key(issuer, objects, STATIC, DATE)


# Book 3, 10.3: static data


def test_static_data_is_vouched_for_by_the_card_certificate() -> None:
    assert verdict(Pki(), records=flip(STATIC)) == failed("icc_certificate")
    assert verdict(Pki(), records=b"") == failed("icc_certificate")


def test_static_data_that_cannot_be_authenticated() -> None:
    assert verdict(Pki(), records=None) == failed("static_data")


def test_the_aip_joins_the_static_data_when_the_tag_list_says_so() -> None:
    aip = bytes.fromhex("2000")
    vouched = {tag: value for tag, value in card(Pki()).items() if tag not in {0x9F46, 0x9F48}}
    certificates = Pki().objects(STATIC + aip)
    objects = vouched | {0x9F46: certificates["9F46"], 0x9F48: certificates["9F48"], 0x9F4A: b"\x82"}
    assert authentication.fast_dda(objects, RID, STATIC, trust(Pki())) == OK
    without_list = {tag: value for tag, value in objects.items() if tag != 0x9F4A}
    assert authentication.fast_dda(without_list, RID, STATIC, trust(Pki())) == failed("icc_certificate")


@pytest.mark.parametrize("tag_list", ["", "8282", "825A", "5A"])
def test_any_other_tag_list_fails(tag_list: str) -> None:
    assert verdict(Pki(), tag_9F4A=bytes.fromhex(tag_list)) == failed("static_data")


# 6.5.2 and C-3 Annex C: the signature


def test_the_signature_of_another_transaction() -> None:
    pki = Pki()
    _, dearer = fast_dda_data(AMOUNT_MINOR + 1)
    assert verdict(pki, tag_9F4B=pki.sign_dynamic(b"\x02" + ATC, dearer)) == failed("signature")


@pytest.mark.parametrize("dynamic_data", [b"\x02\x00\x08", b"\x03\x00\x07\x00", b"\x02", b"", b"\x00\x07"])
def test_the_signature_must_hold_the_transaction_counter(dynamic_data: bytes) -> None:
    pki = Pki()
    _, signed = fast_dda_data(AMOUNT_MINOR)
    assert verdict(pki, tag_9F4B=pki.sign_dynamic(dynamic_data, signed)) == failed("signature")


def test_the_signature_format_and_hash_are_stated() -> None:
    pki = Pki()
    _, signed = fast_dda_data(AMOUNT_MINOR)
    for wrong in ({"kind": 3}, {"hash_algorithm": 2}):
        assert verdict(pki, tag_9F4B=pki.sign_dynamic(b"\x02" + ATC, signed, **wrong)) == failed("signature")


def test_dynamic_data_longer_than_its_room() -> None:
    pki = Pki()
    _, signed = fast_dda_data(AMOUNT_MINOR)
    room = pki.icc.size - 25
    icc = PublicKey(pki.icc.modulus, pki.icc.exponent)
    for size, fits in [(room, True), (room + 1, False), (255, False)]:
        middle = bytes([5, 1, size]) + (b"\x02" + ATC).ljust(room, b"\xbb")
        signature = pki.icc.sign(middle, signed)
        if fits:
            assert len(authentication.icc_dynamic_data(icc, signature, signed)) == room
        else:
            with pytest.raises(AuthenticationFailed, match=r"^signature$"):
                authentication.icc_dynamic_data(icc, signature, signed)


@pytest.mark.parametrize(("head", "tail"), [(0x6B, 0xBC), (0x6A, 0xCC)])
def test_head_and_tail_of_the_frame(head: int, tail: int) -> None:
    pki = Pki()
    _, signed = fast_dda_data(AMOUNT_MINOR)
    middle = (bytes([5, 1, 3, 2]) + ATC).ljust(pki.icc.size - 22, b"\xbb")
    assert verdict(pki, tag_9F4B=pki.icc.sign(middle, signed)) == OK
    assert verdict(pki, tag_9F4B=pki.icc.sign(middle, signed, head=head, tail=tail)) == failed("signature")


def test_version_00_is_not_accepted() -> None:
    """It signs the unpredictable number alone: a card that is merely relayed could sign any amount."""
    pki = Pki()
    related, signed = fast_dda_data(AMOUNT_MINOR, version=0)
    for data in (signed, UN):
        assert verdict(pki, tag_9F69=related, tag_9F4B=pki.sign_dynamic(b"\x02" + ATC, data)) == failed("signature")


# Book 2, 5.4: static data authentication


def static_card(pki: Pki, **changes: bytes | None) -> dict[int, bytes]:
    return card(pki, **{"tag_93": pki.sign_static(STATIC), **changes})


def test_static_data_authentication() -> None:
    pki = Pki()
    assert authentication.sda(static_card(pki), RID, STATIC, trust(pki)) == bytes.fromhex("DAC0")


@pytest.mark.parametrize(
    ("records", "changes", "reason"),
    [
        (flip(STATIC), {}, "signature"),
        (None, {}, "static_data"),
        (STATIC, {"tag_93": None}, "missing_data"),
        (STATIC, {"tag_90": None}, "missing_data"),
        (STATIC, {"tag_93": bytes(128)}, "signature"),
        (STATIC, {"tag_93": Pki().sign_static(STATIC)[1:]}, "signature"),
        (STATIC, {"tag_93": Pki().sign_static(STATIC, kind=5)}, "signature"),
        (STATIC, {"tag_93": Pki().sign_static(STATIC, hash_algorithm=2)}, "signature"),
        (STATIC, {"tag_9F4A": b"\x82"}, "signature"),  # then the AIP is vouched for, too
        (STATIC, {"tag_9F4A": b"\x5a"}, "static_data"),
    ],
)
def test_static_data_that_is_not_vouched_for(
    records: bytes | None, changes: dict[str, bytes | None], reason: str
) -> None:
    pki = Pki()
    with pytest.raises(AuthenticationFailed) as failed:
        authentication.sda(static_card(pki, **changes), RID, records, trust(pki))
    assert failed.value.reason == reason


# Book 2, 6.5 and 6.6: dynamic data, combined with the cryptogram


@pytest.mark.parametrize(
    ("dynamic_data", "number"),
    [
        ("02ABCD", "ABCD"),
        ("08 0102030405060708 FF", "0102030405060708"),
        ("01AB", None),
        ("09 010203040506070809", None),
        ("03ABCD", None),  # longer than what is there
        ("02", None),
        ("", None),
    ],
)
def test_icc_dynamic_number(dynamic_data: str, number: str | None) -> None:
    pki = Pki()
    icc = PublicKey(pki.icc.modulus, pki.icc.exponent)
    signature = pki.sign_dynamic(bytes.fromhex(dynamic_data), UN)
    if number is None:
        with pytest.raises(AuthenticationFailed, match=r"^signature$"):
            authentication.dda(icc, signature, UN)
    else:
        assert authentication.dda(icc, signature, UN) == bytes.fromhex(number)
    with pytest.raises(AuthenticationFailed, match=r"^signature$"):
        authentication.dda(icc, signature, flip(UN))


@pytest.mark.parametrize(("short", "whole"), [(0, True), (1, False), (29, False)])
def test_signed_cryptogram(short: int, whole: bool) -> None:
    pki = Pki()
    icc = PublicKey(pki.icc.modulus, pki.icc.exponent)
    signed = bytes.fromhex("02ABCD 40 0102030405060708") + sha1(b"said")
    signature = pki.sign_dynamic(signed[: len(signed) - short], UN)
    if whole:
        found = authentication.cda(icc, signature, UN)
        assert found == (b"\xab\xcd", 0x40, bytes.fromhex("0102030405060708"), sha1(b"said"), b"")
    else:
        with pytest.raises(AuthenticationFailed, match=r"^signature$"):
            authentication.cda(icc, signature, UN)


@pytest.mark.parametrize(
    ("aip", "capabilities", "method"),
    [
        (0x6100, "0000C8", OdaMethod.CDA),
        (0x6100, "0000C0", OdaMethod.DDA),
        (0x4100, "0000C0", OdaMethod.SDA),
        (0x6100, "000080", OdaMethod.SDA),
        (0x6000, "000008", None),
        (0x0000, "0000C8", None),
        (0x6100, "", None),
    ],
)
def test_book_3_10_3_the_best_method_that_both_know(aip: int, capabilities: str, method: OdaMethod | None) -> None:
    assert authentication.choose(Aip(aip), bytes.fromhex(capabilities)) is method


# 11.2.2: CA public keys


def test_ca_keys_are_found_by_scheme_and_index() -> None:
    key = Pki().ca_key
    keys = CaKeys([key, key])
    assert len(keys) == 1
    assert keys.find(RID, CA_INDEX) == PublicKey(key.modulus, key.exponent)
    assert keys.find(RID, CA_INDEX + 1) is None
    assert keys.find(flip(RID), CA_INDEX) is None


def test_two_keys_of_one_name() -> None:
    key = Pki().ca_key
    with pytest.raises(CaKeyError, match="two different"):
        CaKeys([key, replace(key, modulus=flip(key.modulus), checksum=None)])


@pytest.mark.parametrize(
    "change",
    [
        {"modulus": flip(Pki().ca_key.modulus)},
        {"exponent": b"\x01\x00\x01"},
        {"index": CA_INDEX + 1},
        {"rid": flip(RID)},
        {"checksum": bytes(20)},
    ],
)
def test_a_checksum_that_does_not_match(change: dict[str, Any]) -> None:
    with pytest.raises(CaKeyError, match="checksum"):
        replace(Pki().ca_key, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"exponent": bytes(4)},
        {"exponent": b""},
        {"modulus": b""},
        {"modulus": b"\xff" * 257},
        {"rid": b"\xa0"},
        {"index": 256},
    ],
)
def test_a_key_that_no_card_can_be_authenticated_with(change: dict[str, Any]) -> None:
    with pytest.raises(CaKeyError):
        replace(Pki().ca_key, checksum=None, **change)


def test_a_ca_key_of_exponent_2_authenticates_nothing() -> None:
    key = replace(Pki().ca_key, exponent=b"\x02", checksum=None)
    believed = Trust(CaKeys([key]), frozenset(), DATE)
    assert authentication.fast_dda(card(Pki()), RID, STATIC, believed) == failed("issuer_certificate")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rid": RID[:4]}, "A0000000/92: a RID has 5 bytes"),
        ({"index": 0x100}, "A000000003/100: a RID has 5 bytes and an index one"),
        ({"modulus": b""}, "A000000003/92: a modulus has 1 to 256 bytes"),
        ({"modulus": bytes(257)}, "A000000003/92: a modulus has 1 to 256 bytes"),
        ({"checksum": bytes(20)}, "A000000003/92 does not match its checksum"),
    ],
)
def test_a_key_that_is_refused_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(CaKeyError, match=re.escape(says)):
        CaKey(**{"rid": RID, "index": 0x92, "modulus": bytes(64), "exponent": b"\x03", "checksum": None, **change})


def test_the_bounds_of_a_key_are_keys() -> None:
    keys = [CaKey(RID, index, bytes(size), bytes(exponent)) for index, size, exponent in ((0, 1, 1), (0xFF, 256, 3))]
    assert list(CaKeys(keys)) == keys
    with pytest.raises(CaKeyError, match="two different CA public keys A000000003/FF: remove one"):
        CaKeys([*keys, CaKey(RID, 0xFF, bytes(7), b"\x03")])


def test_without_a_checksum_none_is_checked() -> None:
    key = Pki().ca_key
    assert replace(key, checksum=None).computed_checksum() == key.checksum


# Published vectors: certificates and signatures that nobody here made


def _load(entry: dict[str, Any]) -> CaKey:
    checksum = entry.get("checksum_sha1")
    return CaKey(
        bytes.fromhex(entry["rid"]),
        int(entry["index"], 16),
        bytes.fromhex(entry["modulus"]),
        bytes.fromhex(entry["exponent"]),
        bytes.fromhex(checksum) if checksum else None,
    )


def test_published_ca_keys() -> None:
    refused = []
    entries = vectors("capk.json")["keys"]
    for entry in entries:
        try:
            _load(entry)
        except CaKeyError:
            refused.append((entry["rid"], entry["index"]))
    assert len(entries) == 149
    assert sorted(refused) == [("A000000004", "FB"), ("A000000004", "FC"), ("A000000004", "FD"), ("F105000003", "92")]


@pytest.mark.parametrize("case_id", ["eu-sda-dda", "eu-cda"])
def test_published_certificates(case_id: str) -> None:
    case = next(case for case in vectors("oda_emv_utils.json")["cases"] if case["id"] == case_id)
    expected = case["expected"]
    if case_id == "eu-cda":
        issuer_modulus, icc_modulus = expected["issuer"][3], expected["icc"][3]
    else:
        issuer_modulus, icc_modulus = expected["issuer_modulus"], expected["icc_modulus"]
    objects = {int(tag, 16): bytes.fromhex(value) for tag, value in case["icc_data"].items() if value}
    objects |= {
        0x8F: bytes.fromhex(case["capk"]["index"]),
        0x90: bytes.fromhex(case["tag_90"]),
        0x9F46: bytes.fromhex(case["tag_9F46"]),
    }
    rid = bytes.fromhex(case["capk"]["rid"])
    believed = Trust(CaKeys([_load(case["capk"])]), frozenset(), datetime.date(2022, 5, 6))

    issuer = authentication.issuer_key(objects, rid, believed)
    assert issuer == PublicKey(bytes.fromhex(issuer_modulus), b"\x03")
    plain = issuer.recover(objects[0x9F46], 4)
    assert plain is not None
    assert icc_modulus.startswith(plain[21 : 21 + len(issuer.modulus) - 42].hex().upper())

    # The static data behind the card certificate is not published; the card key is, so the signature can be checked.
    icc = PublicKey(bytes.fromhex(icc_modulus), b"\x03")
    terminal_data = bytes.fromhex(case["ddol_data"])
    dynamic_data = authentication.icc_dynamic_data(icc, bytes.fromhex(case["tag_9F4B"]), terminal_data)
    if case_id == "eu-cda":
        assert dynamic_data[1:9].hex().upper() == expected["sdad"][0]
        signed = authentication.cda(icc, bytes.fromhex(case["tag_9F4B"]), terminal_data)
        assert [signed.icc_dynamic_number, signed.cryptogram, signed.transaction_data_hash] == [
            bytes.fromhex(value) for value in expected["sdad"][:3]
        ]
        assert signed.cid == 0x00
    else:
        number = authentication.dda(icc, bytes.fromhex(case["tag_9F4B"]), terminal_data)
        assert number.hex().upper() == expected["sdad"][0]
        static = issuer.recover(bytes.fromhex(case["tag_93"]), 3)
        assert static is not None
        assert [static[3:5].hex().upper(), static[-21:-1].hex().upper()] == expected["ssad"]
        assert issuer.recover(bytes.fromhex(case["tag_93_invalid"]), 3) is None
    with pytest.raises(AuthenticationFailed, match=r"^signature$"):
        authentication.icc_dynamic_data(icc, bytes.fromhex(case["tag_9F4B_invalid"]), terminal_data)
    with pytest.raises(AuthenticationFailed, match=r"^signature$"):
        authentication.icc_dynamic_data(icc, bytes.fromhex(case["tag_9F4B"]), flip(terminal_data))
    with pytest.raises(AuthenticationFailed, match="icc_certificate"):
        authentication.icc_key(issuer, objects, b"other static data", believed.date)

    if "tag_90_invalid" in case:
        with pytest.raises(AuthenticationFailed, match="issuer_certificate"):
            authentication.issuer_key(objects | {0x90: bytes.fromhex(case["tag_90_invalid"])}, rid, believed)
    for check in case.get("date_checks", []):
        date = datetime.datetime.strptime(check["txn_date"] + "+0000", "%y%m%d%z").date()
        if "expired" in check["note"]:
            with pytest.raises(AuthenticationFailed, match="expired"):
                authentication.issuer_key(objects, rid, replace(believed, date=date))
        else:
            assert authentication.issuer_key(objects, rid, replace(believed, date=date)) == issuer


def test_the_rig_is_not_the_kernel() -> None:
    """A negative control: the rig's certificates recover to exactly what the books' tables say."""
    pki = Pki()
    plain = PublicKey(pki.ca.modulus, pki.ca.exponent).recover(pki.objects()["90"], 2)
    assert plain is not None
    assert plain[:15].hex().upper() == "6A02" + "400000FF" + "1230" + "00A1B2" + "0101" + "8001"
    assert plain[-21:-1] == sha1(plain[1:-21] + pki.objects()["92"] + b"\x03")

"""Authentication files and risk files: one part of a transaction, with what it would find in a whole one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from emv_rig import ATC, ICC_NUMBER, PAN, RID, UN, Pki, fast_dda_data, rsa_key, sha1
from replay_rig import said

from terminal.replay import formats, steps
from terminal.replay.formats import UnusableFile

STATIC = bytes.fromhex("5F2503200101")
AIP = bytes.fromhex("7D00")
AC = bytes.fromhex("A1A2A3A4A5A6A7A8")
SENT = bytes.fromhex("000000001250")
ANSWER = bytes.fromhex("9F2701809F36020007")


def hexed(values: Mapping[str, bytes]) -> dict[str, str]:
    return {tag: value.hex().upper() for tag, value in values.items()}


def key(pki: Pki, **changes: Any) -> dict[str, Any]:
    ca = pki.ca_key
    return {
        "rid": RID.hex().upper(),
        "index": f"{ca.index:02X}",
        "modulus": ca.modulus.hex().upper(),
        "exponent": "03",
        "checksum": None,
        **changes,
    }


def oda(method: str, pki: Pki | None = None, card: Mapping[str, str | None] | None = None, **changes: Any) -> Any:
    pki = pki or Pki()
    related, signed = fast_dda_data(1250)
    static = STATIC + AIP if method == "cda" else STATIC
    objects = pki.objects(static) | {"5A": bytes.fromhex(PAN), "82": AIP, "9F36": ATC}
    if method == "cda":
        objects["9F4A"] = b"\x82"
    objects |= {
        "sda": lambda: {"93": pki.sign_static(static)},
        "dda": lambda: {"9F4B": pki.sign_dynamic(bytes([len(ICC_NUMBER)]) + ICC_NUMBER, UN)},
        "cda": lambda: {"9F4B": pki.sign_cryptogram(0x80, AC, SENT + ANSWER, UN), "9F27": b"\x80"},
        "fdda": lambda: {"9F4B": pki.sign_dynamic(b"\x02" + ATC, signed), "9F69": related},
    }[method]()
    stated = {**hexed(objects), **(card or {})}
    file = {
        "method": method,
        "date": "2026-03-14",
        "capks": [key(pki)],
        "card": {tag: value for tag, value in stated.items() if value is not None},
        "static_data": STATIC.hex().upper(),
        "dynamic_data": {"dda": UN, "fdda": signed}.get(method, b"").hex().upper(),
        "transaction_data": (SENT + ANSWER).hex().upper(),
        "unpredictable_number": UN.hex().upper(),
        **changes,
    }
    return steps.authenticate(formats.decode(json.dumps(file).encode(), formats.OdaFile, "it"))


TVR = {"sda": "02", "dda": "00", "cda": "00", "fdda": "00"}
FAILED = {"sda": "42", "dda": "08", "cda": "04", "fdda": "00"}


@pytest.mark.parametrize("method", TVR)
def test_a_whole_chain(method: str) -> None:
    answer, pki = oda(method), Pki()
    assert (answer["result"], answer["reason"], answer["tvr"]) == ("ok", None, TVR[method] + "00000000")
    icc = None if method == "sda" else pki.icc.modulus.hex().upper()
    assert answer["recovered"] | {"icc_modulus": icc} == {
        "issuer_modulus": pki.issuer.modulus.hex().upper(),
        "icc_modulus": icc,
        "data_authentication_code": "DAC0" if method == "sda" else None,
        "icc_dynamic_number": {"dda": ICC_NUMBER, "cda": ICC_NUMBER, "fdda": ATC}[method].hex().upper()
        if method != "sda"
        else None,
        "cid": "80" if method == "cda" else None,
        "cryptogram": AC.hex().upper() if method == "cda" else None,
    }


@pytest.mark.parametrize("method", TVR)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"capks": []}, "ca_key_missing"),
        ({"capks": [key(Pki(), checksum="00" * 20)]}, "ca_key_missing"),
        ({"revoked": [{"rid": RID.hex().upper(), "index": "92", "serial": "00A1B2"}]}, "revoked"),
        ({"date": "2031-01-01"}, "expired"),
        ({"card": {"9F32": None}}, "missing_data"),
        ({"card": {"90": "00" * 144}}, "issuer_certificate"),
    ],
)
def test_a_broken_chain(method: str, changes: dict[str, Any], reason: str) -> None:
    answer = oda(method, **changes)
    bits = int(FAILED[method], 16) | (0x20 if reason == "missing_data" and method != "fdda" else 0)
    assert (answer["result"], answer["reason"], answer["tvr"]) == ("failed", reason, f"{bits:02X}00000000")
    assert answer["recovered"]["icc_modulus"] is None


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("dda", {"dynamic_data": "11223345"}),
        ("cda", {"unpredictable_number": "11223345"}),
        ("cda", {"transaction_data": "00"}),
        ("cda", {"card": {"9F27": "40"}}),
        ("fdda", {"dynamic_data": "11223345"}),
        ("fdda", {"card": {"9F36": "0008"}}),
    ],
)
def test_a_signature_over_something_else(method: str, changes: dict[str, Any]) -> None:
    assert oda(method, **changes)["reason"] == "signature"


def test_a_remainder_that_is_not_there_is_missing() -> None:
    """Only where the certificate says that the key does not fit into it (Book 3, 7.5)."""
    pki = Pki(ca=rsa_key("ca", 144), issuer=rsa_key("issuer", 144), icc=rsa_key("icc", 112))
    assert oda("dda", pki)["result"] == "ok"
    for tag in ("92", "9F48"):
        answer = oda("dda", pki, card={tag: None})
        assert (answer["reason"], answer["tvr"]) == ("missing_data", "2800000000"), tag


def test_a_ddol_without_the_unpredictable_number_proves_nothing() -> None:
    assert oda("dda", card={"9F49": "9F3704"})["result"] == "ok"
    assert oda("dda", card={"9F49": "9F0206"})["reason"] == "signature"
    with pytest.raises(UnusableFile, match="DDOL"):
        oda("dda", card={"9F49": "9F"})


def test_the_last_day_of_a_certificate() -> None:
    assert oda("dda", date="2030-12-31")["result"] == "ok"


def test_the_longest_keys() -> None:
    pki = Pki(ca=rsa_key("ca", 248), issuer=rsa_key("issuer", 248), icc=rsa_key("icc", 248))
    assert oda("dda", pki)["result"] == "ok"


def test_static_data_with_or_without_the_aip_behind_it() -> None:
    assert oda("cda", static_data=(STATIC + AIP).hex().upper())["result"] == "ok"
    assert oda("cda", static_data=(STATIC + b"\x00").hex().upper())["reason"] == "icc_certificate"


def test_whose_key_it_is() -> None:
    other = key(Pki(), rid="A000000004")
    with pytest.raises(UnusableFile, match="84"):
        oda("dda", capks=[key(Pki()), other])
    assert oda("dda", capks=[key(Pki()), other], card={"84": "A0000000031010"})["result"] == "ok"
    assert oda("dda", card={"84": "A0000000041010"})["reason"] == "ca_key_missing"


def test_a_hash_of_sha_1_is_meant() -> None:
    assert len(sha1(b"")) == 20
    assert oda("dda", Pki(hash_algorithm=2))["reason"] == "issuer_certificate"


# Risk files

TRANSACTION = {"9F02": "000000001250", "9A": "260314", "9C": "00", "5F2A": "0978"}
TERMINAL = {"9F1A": "0276", "9F33": "E0F8C8", "9F35": "22", "9F40": "6000F0A001", "9F09": "0002"}
CHANCE = {"terminal_floor": 9999, "random": {"threshold": 0, "target_percent": 5, "max_target_percent": 5}}
EARLIER = {"pan": PAN, "psn": None, "date": "260314", "amount": 10}


def risk(step: str, **changes: Any) -> Any:
    file = {"step": step, "terminal": TERMINAL, "transaction": TRANSACTION, **changes}
    return steps.find(formats.decode(json.dumps(file).encode(), formats.RiskFile, "it"))


def test_restrictions() -> None:
    card = {"9F08": "0001", "5F24": "260313", "5F25": "260315", "9F07": "0000"}
    assert risk("processing_restrictions", card=card, tvr="8000000000") == {
        "tvr": "80F0000000", "tsi": "0000", "cvm_results": None, "decision": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cvm_list", "results", "tvr"),
    [
        ("1F03", "1F0302", "0000000000"),
        ("1E03", "1E0300", "0000000000"),
        ("0000", "000001", "0000800000"),
        ("0100", "3F0001", "0000900000"),
        ("41001F03", "1F0302", "0000100000"),
        ("0200", "020000", "0000040000"),
        ("2A00", "3F0001", "0000C00000"),
        ("1F06", "3F0001", "0000800000"),
    ],
)
def test_cardholder_verification(cvm_list: str, results: str, tvr: str) -> None:
    card = {"82": "1000", "8E": "00" * 8 + cvm_list, "9F42": "0978"}
    answer = risk("cardholder_verification", card=card)
    assert (answer["cvm_results"], answer["tvr"], answer["tsi"]) == (results, tvr, "4000")


def test_no_cardholder_verification() -> None:
    assert risk("cardholder_verification", card={"82": "0000"})["tsi"] == "0000"
    assert risk("cardholder_verification", card={"82": "1000"})["tvr"] == "2000000000"
    assert risk("cardholder_verification", card={"8E": "00" * 8 + "1F00"})["cvm_results"] == "1F0002"
    for card in ({}, {"82": "1000", "8E": "00" * 9}, {"82": "10"}):
        with pytest.raises(UnusableFile, match="card"):
            risk("cardholder_verification", card=card)


@pytest.mark.parametrize(
    ("changes", "tvr"),
    [
        ({}, "0000000000"),  # no floor limit at all
        ({"limits": {"terminal_floor": 0}}, "0000008000"),
        ({"limits": {"terminal_floor": 1251}}, "0000000000"),
        ({"limits": {"terminal_floor": 1250}}, "0000008000"),
        ({"terminal": TERMINAL | {"9F1B": "000004E3"}}, "0000000000"),
        ({"limits": {"terminal_floor": 1260}, "log": [EARLIER]}, "0000008000"),
        ({"limits": {"terminal_floor": 9999}, "exceptions": [{"pan": PAN, "psn": None}]}, "1000000000"),
        ({"limits": {"terminal_floor": 9999}, "exceptions": [{"pan": PAN, "psn": "02"}]}, "0000000000"),
        ({"limits": CHANCE, "random": [5]}, "0000001000"),
        ({"limits": CHANCE, "random": [6]}, "0000000000"),
    ],
)  # fmt: skip
def test_risk_management(changes: dict[str, Any], tvr: str) -> None:
    answer = risk("risk_management", card={"5A": PAN, "5F34": "01"}, **changes)
    assert (answer["tvr"], answer["tsi"]) == (tvr, "0800")


@pytest.mark.parametrize(
    ("counters", "tvr"),
    [
        ({"9F36": "0005", "9F13": "0004"}, "0000000000"),
        ({"9F36": "0007", "9F13": "0004"}, "0000004000"),
        ({"9F36": "0008", "9F13": "0004"}, "0000006000"),
        ({"9F36": "0005", "9F13": "0005"}, "0000006000"),
        ({"9F36": "0002", "9F13": "0000"}, "0008000000"),
        ({"9F36": "0005"}, "0000006000"),
    ],
)
def test_velocity(counters: dict[str, str], tvr: str) -> None:
    exchanges = said(*((f"80CA{tag}00", f"{tag}02{value}9000") for tag, value in counters.items()))
    card = {"5A": PAN, "9F14": "02", "9F23": "03"}
    assert risk("risk_management", card=card, exchanges=exchanges, limits={"terminal_floor": 9999})["tvr"] == tvr


@pytest.mark.parametrize(
    ("tvr", "terminal_type", "card", "decision"),
    [
        ("0000000000", "22", {}, "TC"),
        ("0080000000", "22", {}, "ARQC"),  # without issuer codes every bit goes online
        ("0080000000", "22", {"9F0F": "0000000000"}, "TC"),
        ("0080000000", "22", {"9F0E": "0080000000"}, "AAC"),
        ("0080000000", "23", {}, "AAC"),
        ("0080000000", "23", {"9F0D": "0000000000"}, "TC"),
        ("0000000000", "21", {}, "ARQC"),
        ("0000000000", "23", {}, "TC"),
    ],
)
def test_action_analysis(tvr: str, terminal_type: str, card: dict[str, str], decision: str) -> None:
    answer = risk("action_analysis", tvr=tvr, terminal=TERMINAL | {"9F35": terminal_type}, card=card)
    assert (answer["decision"], answer["tvr"]) == (decision, tvr)
    refused = risk("action_analysis", tvr="0000008000", terminal=TERMINAL | {"DF8121": "0000008000"})
    assert refused["decision"] == "AAC"


# What others wrote

VECTORS = Path(__file__).parents[2] / "shared" / "vectors" / "oda_emv_utils.json"


@pytest.mark.skipif(not VECTORS.exists(), reason="the published vectors are not beside this project")
def test_published_certificates() -> None:
    """1984 and 1408 bits. What the cards' own certificates are over is not published, so the chain ends there."""
    for case in json.loads(VECTORS.read_text(encoding="utf-8"))["cases"]:
        ca, expected = case["capk"], case["expected"]
        card = {**case["icc_data"], "8F": ca["index"], "84": ca["rid"] + "1010"}
        card |= {name.removeprefix("tag_"): case[name] for name in ("tag_90", "tag_9F46", "tag_9F4B")}
        file = {
            "method": "dda",
            "date": "2022-05-06",
            "capks": [{**{name: ca[name] for name in ("rid", "index", "modulus", "exponent")}, "checksum": None}],
            "card": card,
            "dynamic_data": case["ddol_data"],
        }

        def checked(file: dict[str, Any]) -> Any:
            return steps.authenticate(formats.decode(json.dumps(file).encode(), formats.OdaFile, "it"))

        answer = checked(file)
        issuer = expected["issuer"][3] if "issuer" in expected else expected["issuer_modulus"]
        assert (answer["reason"], answer["recovered"]["issuer_modulus"]) == ("icc_certificate", issuer)
        assert checked(file | {"date": "2032-01-01"})["reason"] == "expired"
        altered = card | {"90": card["90"][:-2] + f"{int(card['90'][-2:], 16) ^ 1:02X}"}
        assert checked(file | {"card": altered})["reason"] == "issuer_certificate"

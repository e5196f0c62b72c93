"""`payterm emv decode`: what it explains, what it hides, and that nothing makes it fall over."""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from terminal.commands import emv, emv_decode
from terminal.commands.base import Commands
from terminal.commands.emv_decode import DecodeError
from terminal.emv import tlv
from terminal.emv.describe import decoding
from terminal.emv.describe.decoding import Item, Report

PAN: Final = "4000001234567899"  # a test number
LUHN_PAN: Final = "4000000000001000"
TRACK_2: Final = f"{PAN}D251220111438780899F"
RECORD: Final = f"57{len(TRACK_2) // 2:02X}{TRACK_2}"


def h(text: str) -> bytes:
    return bytes.fromhex(text)


class Ran:
    def __init__(self, code: int, out: str, error: str) -> None:
        self.code, self.out, self.error = code, out, error

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


@pytest.fixture
def decode(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> Ran:
        root = argparse.ArgumentParser()
        emv.add(Commands(root.add_subparsers(required=True)))
        options = root.parse_args(["emv", "decode", *arguments])
        code, error = 0, ""
        try:
            code = options.command(options, lambda _: None)
        except DecodeError as refused:
            code, error = refused.exit_code, str(refused)
        return Ran(code, capsys.readouterr().out, error)

    return run


def painted(report: Report, width: int = 100) -> str:
    stream = io.StringIO()
    emv_decode.paint(report, Console(file=stream, width=width, highlight=False))
    return stream.getvalue()


def everything(report: Report) -> str:
    """All that the report says, in both forms, without what only lays it out."""
    return json.dumps(emv_decode.as_json(report)) + re.sub(r"[\s│├└─]+", "", painted(report, 4000))


def flat(items: tuple[Item, ...]) -> list[Item]:
    return [each for item in items for each in (item, *flat(item.children))]


# What it explains


def test_a_response_as_a_tree(decode: Any) -> None:
    ran = decode("--json", "6F1A840E325041592E5359532E4444463031A5088801015F2D02656E")
    assert ran.code == 0
    (fci,) = ran.json["objects"]
    assert (fci["tag"], fci["offset"], fci["length"]) == ("6F", 0, 26)
    dedicated, proprietary = fci["children"]
    assert dedicated["meaning"] == '"2PAY.SYS.DDF01", the PPSE'
    assert [(each["tag"], each["offset"], each["meaning"]) for each in proprietary["children"]] == [
        ("88", 20, "SFI 1"),
        ("5F2D", 23, "English"),
    ]


def test_amounts_are_shown_in_the_currency_beside_them(decode: Any) -> None:
    assert "12.50 EUR" in decode("9F0206000000001250 5F2A020978").out
    assert "1250 minor units" in decode("9F0206000000001250").out


def test_the_aid_says_whose_tags_they_are(decode: Any) -> None:
    visa, mastercard = (
        decode("--json", f"840 7{aid}9F6E0420700000".replace(" ", "")).json
        for aid in ("A0000000031010", "A0000000041010")
    )
    assert (visa["kernel"], visa["objects"][1]["name"]) == (3, "Form Factor Indicator (FFI)")
    assert (mastercard["kernel"], mastercard["objects"][1]["name"]) == (2, "Third Party Data")
    assert mastercard["objects"][1]["problem"] == "has 4 bytes, not 5 to 32"
    assert decode("--json", "--kernel", "2", "9F6E0420700000").json["objects"][0]["name"] == "Third Party Data"


@pytest.mark.parametrize(
    "typed",
    [
        ["9F02 06 00 00 00 00 12 50"],
        ["9F", "02", "06", "0000", "0000", "1250"],
        ["9f:02:06:00:00:00:00:12:50"],
        ["0x9F 0x02 0x06 0x00 0x00 0x00 0x00 0x12 0x50"],
        ["9F0206\n0000\r\n00001250"],
        ["9F0206 # an amount\n000000001250"],
    ],
)
def test_hexadecimal_as_people_paste_it(decode: Any, typed: list[str]) -> None:
    assert decode("--json", *typed).json["objects"][0]["value"] == "000000001250"


def test_standard_input(decode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("9A03\n260314\n"))
    assert "2026-03-14" in decode("-").out


@pytest.mark.parametrize(
    ("arguments", "kind", "expected"),
    [
        (["3BE100FF8131FE450A1F"], "ATR", "guard time: the least"),
        (["--atr", "3B6500002063CB6800"], "ATR", "direct convention"),
        (["0578807002"], "ATS", "256 bytes (FSCI 8)"),
        (["--ats", "0578807002"], "ATS", "supports CID"),
        (["--sw", "6A82"], "status word", "file or application not found"),
        (["--sw", "63C1"], "status word", "1 tries left"),
        (["--dol", "9F66049F0206"], "data object list", "Terminal Transaction Qualifiers"),
        (["--tag", "95", "8000000000"], "value of 95", "was not performed"),
        (["--apdu", "80AE9000 02 0000 00"], "APDU", "ARQC requested, with CDA signature"),
        (["--apdu", "00B2010C00"], "APDU", "SFI 1, record 1"),
        (["80A80000028300 00"], "APDU", "GET PROCESSING OPTIONS"),
        (["770A 82020080 9404 08010100 9000"], "APDU", "SFI 1, record 1"),
        (["6985"], "APDU", "conditions of use not satisfied"),
    ],
)
def test_what_else_it_knows(decode: Any, arguments: list[str], kind: str, expected: str) -> None:
    ran = decode(*arguments)
    assert ran.code == 0, ran.error
    assert ran.out.startswith(kind)
    assert expected in ran.out


def test_a_conversation_explains_what_its_lists_asked_for(decode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        "> 00A4040007A000000003101000\n< 6F16 8407A0000000031010 A50B 9F3808 9F6604 9F0206 9C01 9000\n"
        "> 80A80000 0D 830B 21004080 000000001250 00 00\n< 8006 2000 08010100 9000\n"
        "> 80AE8000 02 0000 00\n< 800B 80 0001 1122334455667788 9000\n"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    ran = decode("--json", "--apdu", "-")
    assert ran.code == 0, ran.error
    found = {}

    def gather(item: dict[str, Any]) -> None:
        found.setdefault(item["tag"] or item["name"], item)
        for child in item["children"]:
            gather(child)

    for item in ran.json["objects"]:
        gather(item)
    assert found["9F66"]["value"] == "21004080"
    assert found["9F02"]["value"] == "000000001250"
    assert found["94"]["details"] == [{"where": "entry 1", "text": "SFI 1, record 1"}]
    assert found["9F27"]["value"] == "80"
    assert found["9F36"]["meaning"] == "1"


# What is wrong


@pytest.mark.parametrize(
    ("arguments", "at"),
    [
        (["9F0206 0000"], 0),
        (["9A03260314 9F"], 5),
        (["7005 9A03260314 7003 9A0326"], 9),
        (["9A03260314 5A80"], 6),
        (["zz"], 0),
        (["9A0"], 1),
        (["--sw", "90"], 1),
        (["--dol", "9F02069F37"], 3),
        (["--atr", "3B65"], 2),
        (["--ats", "0678807002"], 0),
        (["--apdu", "00A40400 0A 315041"], 4),
        (["--tag", "95", "80"], 0),
        (["3B65"], 2),
    ],
)
def test_errors_name_the_offset(decode: Any, arguments: list[str], at: int) -> None:
    ran = decode(*arguments)
    assert ran.code == 2
    assert f"offset {at}: " in ran.error


def test_what_could_be_read_is_shown_before_the_error(decode: Any) -> None:
    ran = decode("--json", "7008 9A03260314 9F0206")
    assert ran.code == 2
    assert ran.json["error"] == {"offset": 7, "reason": "6 bytes are stated, 0 are there"}
    assert ran.json["objects"][0]["children"][0]["meaning"] == "2026-03-14"


@pytest.mark.parametrize("tag", ["", "9F", "00", "9F0206", "xx"])
def test_a_tag_that_is_none(decode: Any, tag: str) -> None:
    assert decode("--tag", tag, "00").code == 2


# What it hides


def wrapped(value: str) -> list[str]:
    return [
        value,
        tlv.encode(0x70, h(value)).hex(),
        tlv.encode(0x70, tlv.encode(0xBF0C, h(value))).hex(),
        tlv.encode(0xE1, h(value)).hex(),  # a template that nobody knows
        tlv.encode(0x70, h(value)).hex() + "9000",
        tlv.encode(0xC1, h(value)).hex(),  # inside a primitive object that nobody knows
    ]


CARRIERS: Final = {
    "5A": f"5A08{PAN}",
    "5A, odd": "5A0A" + PAN + "123F",
    "57": RECORD,
    "9F6B": "9F6B" + RECORD[2:],
    "56": tlv.encode(0x56, f"B{PAN}^DOE/JANE^25122011143878089".encode()).hex(),
}


@pytest.mark.parametrize("name", CARRIERS)
def test_no_pan_wherever_it_stands(name: str) -> None:
    for data in wrapped(CARRIERS[name]):
        for cut in (len(data) // 2, len(data) // 2 - 2):
            report = decoding.recognise(h(data)[:cut])
            told = everything(report)
            assert PAN[:12] not in told, (data, cut)
            assert PAN.encode().hex().upper()[:20] not in told, (data, cut)
            assert "1143878" not in told, (data, cut)
            assert "DOE" not in told


def test_a_record_cut_short_keeps_the_names_of_its_objects() -> None:
    report = decoding.recognise(h(f"7040{RECORD}5F34"))
    assert [child.label for child in report.items[0].children] == ["57", ""]
    assert PAN[:12] not in everything(report)


def test_the_last_four_digits_stay() -> None:
    report = decoding.recognise(h(f"7029 {RECORD} 5A08{PAN} 5F2008444F452F4A414E45"))
    assert report.fault is None
    track, pan, name = report.items[0].children
    assert track.value == "*" * 12 + "7899D2512201" + "*" * 11 + "F"
    assert dict(track.lines)["expiry"] == "2025-12"
    assert (pan.value, pan.text) == ("*" * 12 + "7899", "16 digits, ends in 7899")
    assert (name.value, name.text) == ("*" * 16, "hidden")


@pytest.mark.parametrize(
    "tag", [0x5F20, 0x9F0B, 0x9F1F, 0x9F20, 0xDF812A, 0xDF812B, 0x9F46, 0x9F2D]
)  # names, discretionary data; and certificates, in which the PAN can be read with a published key
def test_hidden_whole(tag: int) -> None:
    secret = b"SECRET 1234567 DATA OF A CARDHOLDER"
    told = everything(decoding.recognise(tlv.encode(tag, secret)))
    assert "SECRET" not in told
    assert secret.hex().upper()[:12] not in told
    shown = decoding.recognise(tlv.encode(tag, secret), show=True)
    assert shown.items[0].value == secret.hex().upper()


def test_a_pan_that_was_seen_is_hidden_everywhere() -> None:
    """As digits that no check would find, and as text."""
    again = tlv.encode(0x9F7C, b"id:" + PAN.encode()).hex() + tlv.encode(0xC1, h("A" + PAN + "B")).hex()
    assert PAN not in everything(decoding.recognise(h(f"5A08{PAN}" + again)))


def test_what_looks_like_a_pan_is_hidden_where_nobody_knows_what_it_is() -> None:
    for data in (f"C108{LUHN_PAN}", f"9F05 08{LUHN_PAN}", f"C9 5A08{LUHN_PAN}", f"DF01 10 {LUHN_PAN.encode().hex()}"):
        told = everything(decoding.recognise(h(data)))
        assert LUHN_PAN not in told, data
        assert LUHN_PAN.encode().hex() not in told, data
    # and where somebody knows, digits are digits
    assert decoding.recognise(h(f"9F2608{LUHN_PAN}")).items[0].value == LUHN_PAN


def test_show_pan(decode: Any) -> None:
    ran = decode("--json", "--show-pan", f"5A08{PAN}{RECORD}")
    assert [each["value"] for each in ran.json["objects"]] == [PAN, TRACK_2]
    assert PAN not in decode("--json", f"5A08{PAN}{RECORD}").out


def test_a_pin_is_shown_to_nobody() -> None:
    for show in (False, True):
        report = decoding.conversation([h("0020008008241234FFFFFFFFFF")], show=show)
        assert "241234" not in everything(report)
        assert "241234" not in everything(decoding.recognise(h("9908241234FFFFFFFFFF"), show=show))


@given(st.binary(max_size=40), st.binary(max_size=40), st.sampled_from(sorted(CARRIERS)), st.integers(0, 3))
def test_garbage_around_card_data_uncovers_nothing(before: bytes, after: bytes, name: str, cut: int) -> None:
    data = before + h(CARRIERS[name])
    data = data[: len(data) - cut] if cut else data + after
    if name.startswith("5A"):
        return  # a PAN that fails Luhn's check and has lost its tag looks like any other number
    for report in (
        decoding.recognise(data),
        decoding.ber_tlv(data),
        decoding.conversation([data]),
        decoding.data_object_list(data),
        decoding.value_of(0x70, data),
    ):
        assert PAN[:12] not in everything(report)


# Nothing makes it fall over


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_have_a_report(data: bytes, show: bool) -> None:
    for report in (
        decoding.recognise(data, show=show),
        decoding.conversation([data[:20], data[20:]], show=show),
        decoding.data_object_list(data, show=show),
        decoding.status_word(data),
        decoding.answer_to_reset(data),
        decoding.answer_to_reset(data, contactless=True),
        decoding.value_of(0x9F10, data, show=show),
    ):
        assert report.fault is None or 0 <= report.fault.at <= max(len(data), 40)
        assert everything(report)


@given(st.text(max_size=60), st.sampled_from([[], ["--apdu"], ["--dol"], ["--sw"], ["--atr"], ["--tag", "57"]]))
def test_any_text_ends_well(text: str, kind: list[str]) -> None:
    root = argparse.ArgumentParser()
    emv.add(Commands(root.add_subparsers(required=True)))
    options = root.parse_args(["emv", "decode", "--json", *kind, "--", text]) if text != "-" else None
    if options is None:
        return
    keep, sys.stdout = sys.stdout, io.StringIO()
    try:
        options.command(options, lambda _: None)
    except DecodeError as error:
        assert error.exit_code == 2
    finally:
        sys.stdout = keep


@given(st.lists(st.sampled_from([0x61, 0x6F, 0x70, 0xA5, 0xE1, 0xFF8105]), max_size=12), st.binary(max_size=30))
def test_nesting_without_end(templates: list[int], inner: bytes) -> None:
    for tag in templates:
        inner = tlv.encode(tag, inner)
    report = decoding.recognise(inner)
    assert (report.fault is not None) or len(templates) <= tlv.DEPTH_MAX


@given(st.binary(max_size=200))
def test_it_agrees_with_the_kernels_parser(data: bytes) -> None:
    report = decoding.ber_tlv(data)
    try:
        nodes = tlv.parse(data)
    except tlv.TlvError as error:
        assert report.fault is not None
        assert error.at == report.fault.at or "looks like card data" in report.fault.reason
    else:
        assert report.fault is None or "looks like card data" in report.fault.reason
        assert len(report.items) == len(nodes)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    data = h("7081" + "BE" + "9F4681B0" + "AB" * 176 + "9F4701039F49039F3704") + h("9505FFFFFFFFFF")
    lines = painted(decoding.recognise(data), width).splitlines()
    assert max(map(len, lines)) <= width


def test_no_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    report = decoding.recognise(h("9A03260314"))
    outputs = []
    for variables in ({"FORCE_COLOR": "1"}, {"FORCE_COLOR": "1", "NO_COLOR": "1"}):
        stream = io.StringIO()
        environ = {"TERM": "xterm-256color", **variables}
        emv_decode.paint(report, Console(file=stream, width=80, highlight=False, force_terminal=True, _environ=environ))
        outputs.append(stream.getvalue())
    assert "\x1b[1;36m" in outputs[0]  # tags in cyan
    assert "36m" not in outputs[1]

"""Names, formats, bits and meanings of EMV data; ATR and ATS; published CA keys; the example configuration."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from terminal import config, emvsetup, money
from terminal.emv import atr
from terminal.emv.authentication import CaKeyError, CaKeys, RevokedCertificate
from terminal.emv.configuration import RandomSelection, Setup
from terminal.emv.describe import bits, iso, values
from terminal.emv.describe.names import COMMON, KERNEL_2, KERNEL_3
from terminal.emv.describe.values import Context, Unfit
from terminal.emv.exception_file import ExceptionFile
from terminal.emv.outcome import Pan
from terminal.emv.risk import excepted
from terminal.emv.tags import ActionCode, Format, Kernel2Tag, Kernel3Tag, Source, Tag, lookup
from terminal.emv_keys import Use, published

ROOT = Path(__file__).parents[1]
VECTORS = ROOT.parent / "shared" / "vectors"
EXAMPLE = ROOT / "docs" / "payterm.example.toml"


def h(text: str) -> bytes:
    return bytes.fromhex(text)


# The tables


def test_every_tag_has_a_name_and_every_name_a_format() -> None:
    assert {int(tag) for table in (Tag, ActionCode) for tag in table} == set(COMMON)
    assert {int(tag) for tag in Kernel2Tag} == set(KERNEL_2)
    assert {int(tag) for tag in Kernel3Tag} == set(KERNEL_3) - set(COMMON)
    assert all(lookup(tag, kernel) for kernel, table in ((2, KERNEL_2), (3, KERNEL_3)) for tag in table)


def test_templates_are_templates() -> None:
    tables = {**COMMON, **KERNEL_2, **KERNEL_3}
    for tag, name in tables.items():
        for template in name.templates:
            assert int(template, 16) in tables, f"{tag:X} in {template}"
            assert template in {"77", "80", "70", "9F31"} or h(template)[0] & 0x20, f"{tag:X} in {template}"


@pytest.mark.parametrize(
    ("tag", "kernel", "format_", "length", "source"),
    [
        (0x5A, None, Format.CN, 10, Source.CARD),
        (0x9F02, None, Format.N, 6, Source.TERMINAL),
        (0x5F56, None, Format.A, 3, Source.CARD),
        (0x91, None, Format.B, 16, Source.ISSUER),
        (0xDF8104, 2, Format.N, 6, Source.TERMINAL),
        (0x9F6E, 2, Format.B, 32, Source.CARD),
        (0x9F6E, 3, Format.B, 4, Source.CARD),
        (0x9F5D, 3, Format.N, 6, Source.CARD),
    ],
)
def test_formats(tag: int, kernel: int | None, format_: Format, length: int, source: Source) -> None:
    known = lookup(tag, kernel)
    assert known is not None
    assert (known.format, known.length_max, known.source) == (format_, length, source)


def test_currencies_agree_with_those_that_are_sold_in() -> None:
    for code in ("EUR", "USD", "GBP", "JPY", "KWD", "TND", "ISK", "XOF", "BHD"):
        unit = money.currency(code)
        assert iso.CURRENCIES[unit.number] == (unit.code, unit.exponent)
    assert (iso.COUNTRIES[276], iso.COUNTRIES[528], len(iso.COUNTRIES)) == ("Germany", "Netherlands", 249)


def test_the_running_terminal_carries_no_descriptions() -> None:
    """They cost memory that a small Pi has better use for."""
    code = (
        "import sys, terminal.app, terminal.cli, terminal.emv.entry_point, terminal.emvsetup;"
        "print([name for name in sys.modules if 'describe' in name or name == 'terminal.emv.atr'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


# Values


def said(tag: int, value: str, kernel: int | None = None, **known: int) -> list[str]:
    meaning = values.meaning(tag, h(value), Context(kernel, **known))
    return [each for each in (meaning.text, *(f"{where}: {text}" for where, text in meaning.lines)) if each]


@pytest.mark.parametrize(
    ("tag", "kernel", "value", "expected"),
    [
        (0x95, 0, "8000008000", ["byte 1 bit 8: offline data authentication was not performed",
                                 "byte 4 bit 8: transaction exceeds floor limit"]),
        (0x95, 2, "0000000002", ["byte 5 bit 2-1: relay resistance protocol performed"]),
        (0x95, 0, "0000000000", ["no bit is set"]),
        (0x95, 0, "0004000000", ["byte 2 bit 3: reserved, yet set"]),
        (0x9B, None, "E800", ["byte 1 bit 8: offline data authentication was performed",
                              "byte 1 bit 7: cardholder verification was performed",
                              "byte 1 bit 6: card risk management was performed",
                              "byte 1 bit 4: terminal risk management was performed"]),
        (0x82, 2, "0180", ["byte 1 bit 1: CDA is supported", "byte 2 bit 8: EMV mode is supported"]),
        (0x82, 3, "2080", ["byte 1 bit 6: DDA is supported", "byte 2 bit 8: mag-stripe (MSD) is supported"]),
        (0x9F27, None, "80", ["byte 1 bit 8-7: ARQC: online authorisation requested"]),
        (0x9F34, None, "1F0302", ["byte 1: no CVM required", "byte 2: if the terminal supports the CVM",
                                  "byte 3: successful"]),
        (0x9F34, None, "3F0001", ["no CVM performed; failed"]),
        (0x8E, None, "000003E8000000004203 1F00".replace(" ", ""),
         ["X: 1000 minor units", "Y: 0 minor units",
          "rule 1: enciphered PIN, verified online, if the terminal supports the CVM; else the next rule",
          "rule 2: no CVM required, always"]),
        (0x94, None, "0801030118010100",
         ["entry 1: SFI 1, records 1 to 3; the first signed", "entry 2: SFI 3, record 1"]),
        (0x9F33, None, "200848", ["byte 1 bit 6: IC with contacts", "byte 2 bit 4: no CVM required",
                                  "byte 3 bit 7: DDA",
                                  "byte 3 bit 4: CDA"]),
        (0x9F66, 3, "21004080", ["byte 1 bit 6: EMV mode is supported",
                                 "byte 1 bit 1: offline data authentication for online authorisations is supported",
                                 "byte 3 bit 7: consumer device CVM is supported",
                                 "byte 4 bit 8: fDDA version 1 is supported"]),
        (0x9F6C, 3, "0080", ["byte 2 bit 8: consumer device CVM performed"]),
        (0x9F35, None, "22", ["of a merchant; attended; offline with online capability"]),
        (0x9A, None, "260229", None),  # 2026 has no 29 February
        (0x9A, None, "240229", ["2024-02-29"]),
        (0x5F25, None, "991231", ["1999-12-31"]),
        (0x9F21, None, "235960", None),
        (0x5F2A, None, "0978", ["EUR"]),
        (0x9F1A, None, "0276", ["Germany"]),
        (0x8A, None, "5A33", ['"Z3": unable to go online, declined offline']),
        (0x9F39, None, "07", ["contactless, chip data"]),
        (0x9F5B, None, "1212345678", ["script 12345678: failed at command 2"]),
        (0x9F2A, None, "03", ["kernel 3, Visa"]),
        (0x4F, None, "A0000000041010", ["Mastercard credit or debit"]),
        (0x9F4A, None, "82", ["82: Application Interchange Profile (AIP)"]),
        (0x9C, None, "20", ["refund"]),
        (0x95, None, "00", None),
        (0x9F02, None, "00000000125A", None),
        (0x94, None, "09010301", None),
        (0xDF8129, 2, "10F0F000B0F0FF00", ["byte 1: approved", "byte 2: start: not available", "byte 4: CVM: no CVM",
                                           "byte 5 bit 8: UI request on outcome", "byte 5 bit 6: data record",
                                           "byte 5 bit 5: discretionary data", "byte 8: removal timeout 0 ms"]),
    ],
)  # fmt: skip
def test_meanings(tag: int, kernel: int | None, value: str, expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(Unfit):
            said(tag, value, kernel)
    else:
        assert said(tag, value, kernel) == expected


@pytest.mark.parametrize(
    ("number", "shown"), [(978, "12.50 EUR"), (392, "1250 JPY"), (414, "1.250 KWD"), (1, "1250 minor units")]
)
def test_amounts_have_the_digits_of_their_currency(number: int, shown: str) -> None:
    assert said(0x9F02, "000000001250", currency=number) == [shown]


def test_issuer_application_data_of_known_formats() -> None:
    visa = said(0x9F10, "06010A03A42002", kernel=3)
    assert visa[0] == "Visa, format 0, 1 or 3"
    assert "CVN: 0A: CVN 10" in visa
    assert "CVR byte 2 bit 6-5: first GENERATE AC or GPO: ARQC" in visa
    assert "CVR byte 3 bit 6: velocity counters exceeded" in visa
    assert said(0x9F10, "1F12" + "00" * 30, kernel=3)[0] == "Visa, format 2 or 4"
    mchip = said(0x9F10, "0110A50003240000" + "00" * 10, kernel=2)
    assert mchip[:3] == ["M/Chip", "DKI: 01", "CVN: 10: session key: Mastercard SKD"]
    assert "CVR byte 3: 0 script commands, 3 PIN tries left" in mchip
    assert said(0x9F10, "FFFF") == ["format not known"]


@given(st.sampled_from([*Tag, *Kernel2Tag, *Kernel3Tag]), st.binary(max_size=40), st.sampled_from([None, 0, 2, 3]))
def test_every_value_has_a_meaning_or_is_unfit(tag: int, value: bytes, kernel: int | None) -> None:
    try:
        meaning = values.meaning(tag, value, Context(kernel))
    except Unfit:
        return
    assert all(isinstance(text, str) and isinstance(where, str) for where, text in meaning.lines)


@given(st.binary(min_size=1, max_size=5))
def test_no_set_bit_goes_unsaid(value: bytes) -> None:
    layout = bits.LAYOUTS[0x9F40]
    assert len(bits.read(layout, value)) == sum(byte.bit_count() for byte in value)


# ATR and ATS


def test_atr() -> None:
    parts = {part.name: part.text for part in atr.atr(h("3B6500002063CB6800"))}
    assert parts["TS"] == "direct convention"
    assert parts["T0"] == "5 historical bytes; TB1, TC1 follow"
    assert parts["TB1"] == "VPP is not connected"
    assert "TCK" not in parts


@pytest.mark.parametrize(("check", "verdict"), [("1F", "right"), ("1E", "wrong: 1F expected")])
def test_atr_of_t_1(check: str, verdict: str) -> None:
    parts = {part.name: part.text for part in atr.atr(h("3BE100FF8131FE450A" + check))}
    assert parts["TD1"] == "protocol T=1; TD2 follows"
    assert parts["TA3"].endswith("254 bytes")
    assert parts["TCK"] == f"check byte, {verdict}"


@pytest.mark.parametrize(
    ("data", "at"),
    [("", 0), ("3C00", 0), ("3B", 1), ("3B65", 2), ("3B02AA", 2), ("3B0000", 2), ("3B" + "00" * 40, 33), ("3B8001", 3)],
)
def test_what_is_no_atr(data: str, at: int) -> None:
    with pytest.raises(atr.AtrError) as caught:
        atr.atr(h(data))
    assert caught.value.at == at


def test_ats() -> None:
    parts = {part.name: part.text for part in atr.ats(h("0578807002"))}
    assert parts["T0"].startswith("the card takes frames of 256 bytes (FSCI 8)")
    assert parts["TB(1)"].startswith("frame waiting time 38.7 ms (FWI 7)")
    assert parts["TC(1)"] == "supports CID"


@pytest.mark.parametrize(("data", "at"), [("", 0), ("0678807002", 0), ("0278", 2), ("0280", 1)])
def test_what_is_no_ats(data: str, at: int) -> None:
    with pytest.raises(atr.AtrError) as caught:
        atr.ats(h(data))
    assert caught.value.at == at


@given(st.binary(max_size=40))
def test_arbitrary_bytes_are_atr_and_ats_or_say_why(data: bytes) -> None:
    for parse in (atr.atr, atr.ats):
        try:
            parts = parse(data)
        except atr.AtrError as error:
            assert 0 <= error.at <= max(len(data), atr.ATR_BYTES_MAX)
        else:
            assert b"".join(part.value for part in parts) == data


# Published CA public keys


def test_published_keys_are_apart_and_whole() -> None:
    counts = {use: len(published(use)) for use in Use}
    assert counts == {Use.LIVE: 12, Use.TEST: 28, Use.UNMARKED: 101}
    for use in Use:
        CaKeys(published(use))  # no two of one name
    live, test = ({key.modulus for key in published(use)} for use in (Use.LIVE, Use.TEST))
    assert not live & test
    assert published() == published(Use.LIVE)


def test_published_keys_are_those_of_the_lists() -> None:
    path = VECTORS / "capk.json"
    if not path.exists():
        pytest.skip("the published vectors are not beside this project")
    listed = {
        (entry["rid"], int(entry["index"], 16), entry["modulus"], entry["exponent"])
        for entry in json.loads(path.read_text(encoding="utf-8"))["keys"]
    }
    for use in Use:
        for key in published(use):
            name = key.rid.hex().upper(), key.index, key.modulus.hex().upper(), key.exponent.hex().upper()
            assert name in listed


def test_an_altered_key_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = resources.files("terminal.emv_keys")
    good = source.joinpath("live.toml").read_text(encoding="utf-8")
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    for bad in (good.replace('modulus = "C6', 'modulus = "C7', 1), good.replace("modulus = ", "module = ", 1), "[["):
        (tmp_path / "live.toml").write_text(bad, encoding="utf-8")
        with pytest.raises(CaKeyError):
            published()
    (tmp_path / "live.toml").write_text(good, encoding="utf-8")
    assert published()


# The example configuration

REVOKED = '[[revoked]]\nrid = "A000000003"\nindex = "92"\nserial = "00A1B2"\n'
JPY = '\n[limits.JPY]\ntransaction = "50000"\noffline_transaction = "4000"\noffline_sum = "10000"\n'


def _uncommented() -> str:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    return "\n".join(line[1:] if line.startswith("#") and line[1:2] not in {"", " "} else line for line in lines)


def test_the_example_configuration_is_right(tmp_path: Path) -> None:
    path = tmp_path / "payterm.toml"
    path.write_text(EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    example = config.load(path)
    emvsetup.build(example)
    assert example.contact is None
    assert example.aids == config.STANDARD_AIDS


def test_the_example_shows_every_setting_and_its_default(tmp_path: Path) -> None:
    path = tmp_path / "payterm.toml"
    (tmp_path / "revoked.toml").write_text(REVOKED, encoding="utf-8")
    text = _uncommented().replace("/etc/payterm/revoked.toml", "revoked.toml") + JPY
    path.write_text(text, encoding="utf-8")
    whole = config.load(path)
    assert len(emvsetup.build(whole).revoked) == 1
    written = tomllib.loads(_uncommented())
    shown = {name: table[0] if isinstance(table, list) else table for name, table in written.items()}
    shown["limits"] = written["limits"]["EUR"]
    sections = {
        "terminal": config.TerminalSection, "host": config.HostSection, "limits": config.LimitsSection,
        "ledger": config.LedgerSection, "retention": config.RetentionSection, "socket": config.SocketSection,
        "reader": config.ReaderSection, "contact": config.ContactSection, "display": config.DisplaySection,
        "pins": config.PinsSection, "sale": config.SaleSection, "sync": config.SyncSection,
        "emv": config.EmvSection, "aids": config.AidSection, "ca_keys": config.CaKeySection,
    }  # fmt: skip
    assert set(shown) == set(config.Config.__struct_fields__)
    for name, section in sections.items():
        assert set(shown[name]) == set(section.__struct_fields__), name
    bare = tmp_path / "bare.toml"
    bare.write_text(EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    defaults = config.load(bare)
    assert set(written["aids"][0]["limits"]["JPY"]) == set(config.AidLimitsSection.__struct_fields__)
    for name in ("reader", "display", "sale", "retention"):
        assert getattr(whole, name) == getattr(defaults, name), name
    assert whole.pins == config.PinsSection()


# What is trusted, and what is refused


def configured(tmp_path: Path, text: str) -> config.Config:
    path = tmp_path / "payterm.toml"
    path.write_text(EXAMPLE.read_text(encoding="utf-8").replace("[emv]\n", f"[emv]\n{text}\n", 1), encoding="utf-8")
    return config.load(path)


@pytest.mark.parametrize(("word", "trusted"), [("none", None), ("test", Use.TEST), ("live", Use.LIVE)])
def test_published_keys_are_trusted_only_if_it_is_said(tmp_path: Path, word: str, trusted: Use | None) -> None:
    setup = emvsetup.build(configured(tmp_path, f'published_ca_keys = "{word}"'))
    assert tuple(setup.ca_keys) == (published(trusted) if trusted else ())
    assert len(emvsetup.build(configured(tmp_path, "")).ca_keys) == 0
    with pytest.raises(config.ConfigError, match="published_ca_keys"):
        configured(tmp_path, 'published_ca_keys = "all"')


def test_a_key_of_ones_own_may_be_published_too(tmp_path: Path) -> None:
    key = published(Use.LIVE)[0]
    table = (
        f'[[ca_keys]]\nrid = "{key.rid.hex()}"\nindex = "{key.index:02X}"\nmodulus = "{key.modulus.hex()}"\n'
        f'exponent = "{key.exponent.hex()}"\n'
    )
    path = tmp_path / "payterm.toml"
    text = EXAMPLE.read_text(encoding="utf-8").replace("[emv]\n", '[emv]\npublished_ca_keys = "live"\n', 1)
    path.write_text(f"{text}\n{table}", encoding="utf-8")
    assert len(emvsetup.build(config.load(path)).ca_keys) == len(published(Use.LIVE))
    path.write_text(f"{text}\n{table.replace(key.modulus.hex(), 'AA' * 128)}", encoding="utf-8")
    with pytest.raises(config.ConfigError, match="two different"):
        emvsetup.build(config.load(path))


def test_withdrawn_certificates_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "revoked.toml").write_text(REVOKED, encoding="utf-8")
    setup = emvsetup.build(configured(tmp_path, 'revoked = "revoked.toml"'))
    assert setup.revoked == {RevokedCertificate(bytes.fromhex("A000000003"), 0x92, bytes.fromhex("00A1B2"))}


@pytest.mark.parametrize("text", [None, "[[", "", REVOKED.replace("00A1B2", "00A1"), REVOKED + 'reason = "x"\n'])
def test_a_revocation_list_that_cannot_be_read_starts_nothing(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "revoked.toml").write_text(text, encoding="utf-8")
    with pytest.raises(config.ConfigError, match="revocation list"):
        emvsetup.build(configured(tmp_path, 'revoked = "revoked.toml"'))


CARD, OTHER = Pan("4000001234567899"), Pan("4000001234567881")


def with_exceptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None) -> Setup:
    keys = tmp_path / "credentials"
    keys.mkdir(exist_ok=True)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(keys))
    if text is not None:
        (keys / emvsetup.EXCEPTIONS).write_text(text, encoding="utf-8")
    return emvsetup.build(configured(tmp_path, "exceptions = true"))


def test_the_exception_list_is_a_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = with_exceptions(tmp_path, monkeypatch, f"# stolen\n\n{CARD.digits}  # yesterday\n{OTHER.digits} 1\n")
    on_it = [(CARD, b"\x01"), (CARD, b""), (OTHER, b"\x01"), (OTHER, b"\x02"), (OTHER, b""), (Pan("4000"), b"")]
    assert [excepted(setup, pan, psn) for pan, psn in on_it] == [True, True, True, False, False, False]


def test_no_card_number_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the number nor a hash that would be the same tomorrow, or on the next terminal."""
    setups = [with_exceptions(tmp_path, monkeypatch, CARD.digits) for _ in range(2)]
    files = [setup.exceptions for setup in setups]
    assert all(isinstance(file, ExceptionFile) for file in files)
    stored = [pickle.dumps([getattr(file, name) for name in ExceptionFile.__slots__]) for file in files]
    assert stored[0] != stored[1]
    assert not any(CARD.digits.encode() in each or bytes.fromhex(CARD.digits) in each for each in stored)
    assert repr(files[0]) == "ExceptionFile(1 cards)"


@pytest.mark.parametrize("text", [None, "400000123456789x", "4000001", f"{CARD.digits} 123", f"{CARD.digits} 1 2"])
def test_an_exception_list_that_cannot_be_read_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    with pytest.raises(config.ConfigError, match="exception list") as caught:
        with_exceptions(tmp_path, monkeypatch, text)
    assert "4000001" not in str(caught.value), "the message names the line and quotes none"


def test_an_exception_list_is_asked_for_only_if_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert not excepted(emvsetup.build(configured(tmp_path, "")), CARD, b"")
    assert not excepted(emvsetup.build(configured(tmp_path, "exceptions = true")), CARD, b""), "a check has no keys"


# Applications


def test_what_an_application_is_taken_with(tmp_path: Path) -> None:
    path = tmp_path / "payterm.toml"
    table = """
[[aids]]
aid = "A0000000041010"
kernel = 0
partial = false
transaction_types = ["00", "20"]
random = { threshold = 2000, target_percent = 5, max_target_percent = 20 }
terminal_floor = 5000
tags = { 9F49 = "9F3704", DF8121 = "0000008000" }
[aids.limits.JPY]
terminal_floor = 700
"""
    path.write_text(EXAMPLE.read_text(encoding="utf-8") + JPY + table, encoding="utf-8")
    setup = emvsetup.build(config.load(path))
    (found,) = setup.combinations
    assert (found.partial, found.limits.transaction_types) == (False, {0x00, 0x20})
    assert found.limits.random == RandomSelection(2000, 5, 20)
    assert found.tags == {0x9F49: bytes.fromhex("9F3704"), 0xDF8121: bytes.fromhex("0000008000")}
    (yen,) = setup.in_currency("JPY").combinations
    assert (found.limits.terminal_floor, yen.limits.terminal_floor, yen.limits.random) == (5000, 700, None)
    assert yen.limits.cvm_required == 0, "strict where nothing is said"
    assert setup.in_currency("EUR").combinations == setup.combinations


@pytest.mark.parametrize(
    "setting",
    [
        "random = { threshold = 0, target_percent = 30, max_target_percent = 20 }",
        'tags = { 9F1B = "00" }',
        'tags = { 9G = "00" }',
        'transaction_types = ["0"]',
        "limits = { JPY = { terminal_floor = 1 } }",
    ],
)
def test_an_application_that_cannot_be(tmp_path: Path, setting: str) -> None:
    path = tmp_path / "payterm.toml"
    table = f'\n[[aids]]\naid = "A0000000041010"\nkernel = 0\n{setting}\n'
    path.write_text(EXAMPLE.read_text(encoding="utf-8") + table, encoding="utf-8")
    with pytest.raises(config.ConfigError, match="Nothing was started"):
        emvsetup.build(config.load(path))

"""Cardholder verification (Book 3, 10.5): rules, conditions, and what 9F34 says of them."""

from __future__ import annotations

import pytest

from terminal.emv.cardholder import Verification, verify
from terminal.emv.outcome import Cvm
from terminal.emv.records import CardFault
from terminal.emv.results import Tvr

AMOUNTS = "000003E8 000007D0"  # X 10.00, Y 20.00
NOBODY, SIGN, PIN = "E008C8", "E028C8", "E068C8"  # 9F33: no CVM; and signature; and online PIN
BASE = {
    "82": "1000",
    "9F33": SIGN,
    "9F35": "22",
    "9C": "00",
    "9F02": "000000001250",
    "9F03": "000000000000",
    "5F2A": "0978",
    "9F42": "0978",
}
PAD, UNKNOWN, FAILED = Tvr.PIN_PAD_ABSENT, Tvr.CVM_UNRECOGNISED, Tvr.CVM_FAILED


def check(rules: str | None, **changes: str | None) -> Verification:
    listed = {} if rules is None else {"8E": AMOUNTS + rules}
    objects = {**BASE, **listed, **{tag.removeprefix("tag_"): value for tag, value in changes.items()}}
    return verify({int(tag, 16): bytes.fromhex(value) for tag, value in objects.items() if value is not None})


@pytest.mark.parametrize(
    ("rules", "capabilities", "results", "tvr", "cvm"),
    [
        ("1F00", NOBODY, "1F0002", Tvr.NONE, Cvm.NONE),
        ("5F00", NOBODY, "5F0002", Tvr.NONE, Cvm.NONE),
        ("1E00", SIGN, "1E0000", Tvr.NONE, Cvm.SIGNATURE),
        ("5E031F00", SIGN, "5E0300", Tvr.NONE, Cvm.SIGNATURE),
        ("0200", PIN, "020000", Tvr.ONLINE_PIN_ENTERED, Cvm.ONLINE_PIN),
        # fails, and stops
        ("1E001F00", NOBODY, "3F0001", FAILED, Cvm.FAILED),
        ("02001F00", SIGN, "3F0001", FAILED | PAD, Cvm.FAILED),
        ("01001F00", SIGN, "3F0001", FAILED | PAD, Cvm.FAILED),
        ("06001F00", SIGN, "3F0001", FAILED | UNKNOWN, Cvm.FAILED),
        ("20001F00", SIGN, "3F0001", FAILED | UNKNOWN, Cvm.FAILED),
        ("00001F00", SIGN, "000001", FAILED, Cvm.FAILED),
        ("0003", SIGN, "000301", FAILED, Cvm.FAILED),
        # fails, and goes on
        ("5E001F00", NOBODY, "1F0002", Tvr.NONE, Cvm.NONE),
        ("42001F00", SIGN, "1F0002", PAD, Cvm.NONE),
        ("410044005F00", SIGN, "5F0002", PAD, Cvm.NONE),
        ("43004500", SIGN, "3F0001", FAILED | PAD, Cvm.FAILED),
        ("60001E00", SIGN, "1E0000", UNKNOWN, Cvm.SIGNATURE),
        ("40001F00", SIGN, "1F0002", Tvr.NONE, Cvm.NONE),
        ("40001F01", SIGN, "400001", FAILED, Cvm.FAILED),  # the last one performed was the one that fails
        ("40004200", SIGN, "3F0001", FAILED | PAD, Cvm.FAILED),
        # what earlier rules found stays
        ("41000200", PIN, "020000", PAD | Tvr.ONLINE_PIN_ENTERED, Cvm.ONLINE_PIN),
        ("46004100", SIGN, "3F0001", FAILED | PAD | UNKNOWN, Cvm.FAILED),
        ("06001F00", "E0FFC8", "3F0001", FAILED | UNKNOWN, Cvm.FAILED),  # every bit of 9F33 set: still unknown
        # no rule fits
        ("1F01", SIGN, "3F0001", FAILED, Cvm.FAILED),
        ("41034203", SIGN, "3F0001", FAILED, Cvm.FAILED),
        ("410342031E031F03", SIGN, "1E0300", Tvr.NONE, Cvm.SIGNATURE),
        ("410342031E031F03", NOBODY, "1F0302", Tvr.NONE, Cvm.NONE),
        ("26031F00", SIGN, "1F0002", Tvr.NONE, Cvm.NONE),
    ],
)
def test_book_3_10_5_cardholder_verification(rules: str, capabilities: str, results: str, tvr: Tvr, cvm: Cvm) -> None:
    assert check(rules, tag_9F33=capabilities) == Verification(bytes.fromhex(results), tvr, cvm, attempted=True)


NOTHING = bytes.fromhex("3F0000")


def test_cards_that_ask_for_nothing() -> None:
    assert check("1F00", tag_82="0000") == Verification(NOTHING)
    for empty in (check(None), check("")):
        assert empty == Verification(NOTHING, Tvr.CARD_DATA_MISSING)


@pytest.mark.parametrize("cvm_list", ["00", "00" * 7, "00" * 9, "00" * 8 + "1F001E"])
def test_a_list_that_cannot_be_read(cvm_list: str) -> None:
    with pytest.raises(CardFault, match="parse_error"):
        check(None, tag_8E=cvm_list)


ATTENDED, UNATTENDED = "22", "25"


@pytest.mark.parametrize(
    ("condition", "holds", "changes"),
    [
        ("00", True, {}),
        ("01", True, {"tag_9C": "01", "tag_9F35": UNATTENDED}),
        ("01", False, {"tag_9C": "01", "tag_9F35": ATTENDED}),
        ("01", False, {"tag_9F35": UNATTENDED}),
        ("02", True, {}),
        ("02", True, {"tag_9F35": UNATTENDED}),
        ("02", False, {"tag_9C": "01"}),
        ("02", False, {"tag_9C": "17", "tag_9F35": UNATTENDED}),
        ("02", False, {"tag_9C": "09"}),
        ("02", False, {"tag_9F03": "000000000001"}),
        ("03", True, {}),
        ("03", False, {"tag_9F33": "E020C8"}),
        ("04", True, {"tag_9C": "01"}),
        ("04", False, {"tag_9C": "01", "tag_9F35": UNATTENDED}),
        ("04", False, {}),
        ("05", True, {"tag_9C": "09"}),
        ("05", True, {"tag_9F03": "000000000001"}),
        ("05", False, {}),
        ("06", True, {"tag_9F02": "000000000999"}),
        ("06", False, {"tag_9F02": "000000001000"}),
        ("07", True, {"tag_9F02": "000000001001"}),
        ("07", False, {"tag_9F02": "000000001000"}),
        ("08", True, {"tag_9F02": "000000001999"}),
        ("08", False, {"tag_9F02": "000000002000"}),
        ("09", True, {"tag_9F02": "000000002001"}),
        ("09", False, {"tag_9F02": "000000002000"}),
        ("06", False, {"tag_9F02": "000000000001", "tag_9F42": "0840"}),
        ("07", False, {"tag_9F42": None}),
        ("01", False, {"tag_9C": "01", "tag_9F35": None}),  # attended, for all that is known
        ("04", True, {"tag_9C": "01", "tag_9F35": None}),
        ("0A", False, {}),
        ("FF", False, {}),
    ],
)
def test_book_3_c3_cvm_condition_codes(condition: str, holds: bool, changes: dict[str, str | None]) -> None:
    found = check("1F" + condition, **changes)
    assert (found.cvm is Cvm.NONE) is holds
    assert found.results == bytes.fromhex(f"1F{condition}02" if holds else "3F0001")


def test_amounts_x_and_y_have_four_bytes() -> None:
    """20,000,000.00 each: more than three bytes can state."""
    wide = "77359400" * 2
    for condition, holds in (("06", True), ("07", False), ("08", True), ("09", False)):
        found = check(None, tag_8E=wide + "1F" + condition, tag_9F02="001999999999")
        assert (found.cvm is Cvm.NONE) is holds


def test_a_terminal_without_capabilities_verifies_nobody() -> None:
    assert check("1F00", tag_9F33=None).cvm is Cvm.FAILED

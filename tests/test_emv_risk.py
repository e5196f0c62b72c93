"""Terminal risk management (Book 3, 10.6) and terminal action analysis (10.7)."""

from __future__ import annotations

import pickle

import pytest

from terminal.emv import decision, risk
from terminal.emv.configuration import ConfigurationError, RandomSelection
from terminal.emv.decision import ActionCodes, AcType, Reach
from terminal.emv.outcome import Pan
from terminal.emv.recent import AGE_MAX_MS, CARDS_MAX, RecentSales
from terminal.emv.results import Aip, Tsi, Tvr
from terminal.emv.tags import ActionCode, Tag
from terminal.money import EUR, JPY, Amount

CARD = Pan("4000001234567899")
LOWER, UPPER, NEW = Tvr.LOWER_OFFLINE_LIMIT_EXCEEDED, Tvr.UPPER_OFFLINE_LIMIT_EXCEEDED, Tvr.NEW_CARD


# 10.6.1: floor limit


@pytest.mark.parametrize(
    ("amount", "earlier", "exceeded"),
    [(4999, 0, False), (5000, 0, True), (5001, 0, True), (2500, 2499, False), (2500, 2500, True), (0, 5000, True)],
)
def test_book_3_10_6_1_floor_limits(amount: int, earlier: int, exceeded: bool) -> None:
    assert risk.floor_limit(amount, earlier, 5000) == (Tvr.FLOOR_LIMIT_EXCEEDED if exceeded else Tvr.NONE)


def test_no_floor_limit_is_never_reached() -> None:
    assert risk.floor_limit(999_999, 999_999, None) == Tvr.NONE
    chance = RandomSelection(threshold=0, target_percent=20, max_target_percent=80)
    assert [bool(risk.random_selection(999_999, None, chance, number)) for number in (20, 21)] == [True, False]


def test_a_floor_limit_of_zero_is_always_reached() -> None:
    assert risk.floor_limit(0, 0, 0) == Tvr.FLOOR_LIMIT_EXCEEDED


# 10.6.2: random transaction selection

SELECTION = RandomSelection(threshold=2000, target_percent=20, max_target_percent=80)


@pytest.mark.parametrize(
    ("amount", "percent"),
    [(0, 20), (1999, 20), (2000, 20), (2050, 21), (2099, 21), (3500, 50), (4950, 79), (4999, 79)],
)
def test_book_3_10_6_2_random_transaction_selection(amount: int, percent: int) -> None:
    """The chance rises in a straight line from 20 percent at 20.00 to 80 percent at the floor limit of 50.00."""
    hits = [number for number in range(1, 100) if risk.random_selection(amount, 5000, SELECTION, number)]
    assert hits == list(range(1, percent + 1))


def test_no_target_selects_nothing() -> None:
    never = RandomSelection(threshold=0, target_percent=0, max_target_percent=0)
    assert not any(risk.random_selection(amount, 5000, never, 1) for amount in range(0, 5000, 100))


@pytest.mark.parametrize("values", [(0, 50, 20), (0, -1, 20), (0, 20, 100), (-1, 0, 0)])
def test_a_selection_that_cannot_be(values: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigurationError, match="random selection"):
        RandomSelection(*values)


# 10.6.3: velocity checking


@pytest.mark.parametrize(
    ("atc", "last_online", "found"),
    [
        (10, 8, Tvr.NONE),  # limits are 2 and 4
        (11, 8, LOWER),
        (12, 8, LOWER),
        (13, 8, LOWER | UPPER),
        (8, 8, LOWER | UPPER),
        (7, 8, LOWER | UPPER),
        (None, 8, LOWER | UPPER),
        (10, None, LOWER | UPPER),
        (None, None, LOWER | UPPER),
        (1, 0, NEW),
        (9, 0, NEW | LOWER | UPPER),
        (None, 0, NEW | LOWER | UPPER),
    ],
)
def test_book_3_10_6_3_velocity_checking(atc: int | None, last_online: int | None, found: Tvr) -> None:
    assert risk.velocity(atc, last_online, 2, 4) == found


# 10.7: terminal action analysis

EXPIRED = Tvr.EXPIRED
BOTH, ONLINE, OFFLINE = Reach.OFFLINE_AND_ONLINE, Reach.ONLINE_ONLY, Reach.OFFLINE_ONLY


def codes(denial: Tvr = Tvr.NONE, online: Tvr = Tvr.NONE, default: Tvr = Tvr.NONE) -> ActionCodes:
    return ActionCodes(denial, online, default)


@pytest.mark.parametrize(
    ("tvr", "with_codes", "reach", "asked"),
    [
        (EXPIRED, codes(denial=EXPIRED), BOTH, AcType.AAC),
        (EXPIRED, codes(denial=EXPIRED, online=EXPIRED), ONLINE, AcType.AAC),
        (EXPIRED, codes(denial=EXPIRED), OFFLINE, AcType.AAC),
        (EXPIRED, codes(online=EXPIRED), BOTH, AcType.ARQC),
        (EXPIRED, codes(default=EXPIRED), BOTH, AcType.TC),
        (EXPIRED, codes(denial=~EXPIRED, online=~EXPIRED), BOTH, AcType.TC),
        (Tvr.NONE, codes(), ONLINE, AcType.ARQC),  # it never decides alone
        (EXPIRED, codes(online=EXPIRED), OFFLINE, AcType.TC),
        (EXPIRED, codes(default=EXPIRED), OFFLINE, AcType.AAC),
        (Tvr.NONE, codes(Tvr.NONE, ~Tvr.NONE, ~Tvr.NONE), BOTH, AcType.TC),
    ],
)
def test_book_3_10_7_terminal_action_analysis(tvr: Tvr, with_codes: ActionCodes, reach: Reach, asked: AcType) -> None:
    assert decision.first(tvr, with_codes, reach) is asked


@pytest.mark.parametrize(
    ("tvr", "with_codes", "reach", "asked"),
    [
        (EXPIRED, codes(default=EXPIRED), BOTH, AcType.AAC),
        (EXPIRED, codes(denial=EXPIRED, online=EXPIRED), BOTH, AcType.TC),
        (Tvr.NONE, codes(), ONLINE, AcType.AAC),
        (Tvr.NONE, codes(), OFFLINE, AcType.TC),
    ],
)
def test_book_3_10_7_default_action_codes(tvr: Tvr, with_codes: ActionCodes, reach: Reach, asked: AcType) -> None:
    assert decision.unable_to_go_online(tvr, with_codes, reach) is asked


@pytest.mark.parametrize(
    ("type_", "reach"),
    [("21", ONLINE), ("24", ONLINE), ("22", BOTH), ("25", BOTH), ("23", OFFLINE), ("36", OFFLINE), ("", BOTH)],
)
def test_book_4_a1_terminal_type(type_: str, reach: Reach) -> None:
    assert Reach.of(bytes.fromhex(type_)) is reach


def test_book_3_10_7_action_codes_are_joined() -> None:
    ours, theirs = Tvr.EXPIRED.encode(), Tvr.NEW_CARD.encode()
    found = ActionCodes.of(
        {
            Tag.IAC_DENIAL: theirs,
            ActionCode.DENIAL: ours,
            Tag.IAC_ONLINE: theirs,
            ActionCode.DEFAULT: ours,
            Tag.IAC_DEFAULT: bytes(5),
        }
    )
    assert found == codes(Tvr.EXPIRED | Tvr.NEW_CARD, Tvr.NEW_CARD, Tvr.EXPIRED)


def test_absent_action_codes() -> None:
    everything = Tvr(0xFFFFFFFFFF)
    assert ActionCodes.of({}) == codes(Tvr.NONE, everything, everything)
    assert ActionCodes.of({}, b"\x84\x00\x00\x00\x0c").denial == Tvr(0x840000000C)


# Annex C


@pytest.mark.parametrize(
    ("bit", "value"),
    [
        (Tvr.ODA_NOT_PERFORMED, "8000000000"),
        (Tvr.CARD_DATA_MISSING, "2000000000"),
        (Tvr.ON_EXCEPTION_FILE, "1000000000"),
        (Tvr.CDA_FAILED, "0400000000"),
        (Tvr.SDA_SELECTED, "0200000000"),
        (Tvr.VERSIONS_DIFFER, "0080000000"),
        (Tvr.NEW_CARD, "0008000000"),
        (Tvr.CVM_FAILED, "0000800000"),
        (Tvr.ONLINE_PIN_ENTERED, "0000040000"),
        (Tvr.FLOOR_LIMIT_EXCEEDED, "0000008000"),
        (Tvr.MERCHANT_FORCED_ONLINE, "0000000800"),
        (Tvr.DEFAULT_TDOL_USED, "0000000080"),
        (Tvr.SCRIPT_FAILED_AFTER, "0000000010"),
        (Tvr.RELAY_RESISTANCE_NOT_PERFORMED, "0000000001"),
        (Tsi.ODA_PERFORMED, "8000"),
        (Tsi.SCRIPT_PERFORMED, "0400"),
    ],
)
def test_bits_stand_where_the_books_put_them(bit: Tvr | Tsi, value: str) -> None:
    assert bit.encode() == bytes.fromhex(value)


def test_aip() -> None:
    assert Aip.decode(bytes.fromhex("7F80")) == (
        Aip.SDA | Aip.DDA | Aip.CVM | Aip.RISK_MANAGEMENT | Aip.ISSUER_AUTHENTICATION | Aip.ON_DEVICE_CVM | Aip.CDA
        | Aip.EMV_MODE
    )  # fmt: skip


# 10.6.1: split sales


def test_what_a_card_paid_last() -> None:
    now = [0]
    recent = RecentSales(bytes(32), lambda: now[0])
    in_euro = recent.earlier_minor(EUR)
    assert in_euro(CARD, b"\x01") == 0
    recent.note(CARD, b"\x01", Amount(4000, EUR))
    recent.note(CARD, b"\x01", Amount(900, EUR))
    assert in_euro(CARD, b"\x01") == 900, "the latest, not the sum"
    assert [in_euro(CARD, b"\x02"), in_euro(CARD, b""), in_euro(Pan("4000001234567881"), b"\x01")] == [0, 0, 0]
    assert recent.earlier_minor(JPY)(CARD, b"\x01") == 0
    now[0] = AGE_MAX_MS
    assert in_euro(CARD, b"\x01") == 900
    now[0] += 1
    assert in_euro(CARD, b"\x01") == 0


def test_what_is_remembered_is_bounded_and_names_no_card() -> None:
    recent = RecentSales(b"k" * 32, lambda: 0)
    pans = [Pan(f"400000{number:010d}") for number in range(CARDS_MAX + 1)]
    for pan in pans[:-1]:
        recent.note(pan, b"", Amount(1, EUR))
    recent.note(pans[0], b"", Amount(2, EUR))  # the first is now the latest
    recent.note(pans[-1], b"", Amount(3, EUR))
    paid = recent.earlier_minor(EUR)
    assert [paid(pans[at], b"") for at in (0, 1, 2, -1)] == [2, 0, 1, 3]
    stored = pickle.dumps([getattr(recent, name) for name in RecentSales.__slots__ if name != "_now_ms"])
    assert not any(pan.digits.encode() in stored for pan in pans)

"""Amounts: what a person types, what a screen shows, never a float."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from terminal.money import AMOUNT_MINOR_MAX, EUR, JPY, KWD, Amount, Currency, MoneyError, currency

CURRENCIES = st.sampled_from([EUR, JPY, KWD])


@pytest.mark.parametrize(
    ("text", "unit", "minor"),
    [
        ("12.50", EUR, 1250),
        ("12,5", EUR, 1250),
        ("12", EUR, 1200),
        ("12.", EUR, 1200),
        (" 0.01 ", EUR, 1),
        ("1200", JPY, 1200),
        ("1.234", KWD, 1234),
        ("999999.99", EUR, AMOUNT_MINOR_MAX),
    ],
)
def test_reads_what_people_write(text: str, unit: Currency, minor: int) -> None:
    assert Amount.parse(text, unit) == Amount(minor, unit)


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("", EUR),
        ("-1", EUR),
        ("1.234", EUR),
        ("1.5", JPY),
        ("1,234.50", EUR),
        ("1 000", EUR),
        ("1e3", EUR),
        ("٣", EUR),
        ("1000000.00", EUR),
        ("NaN", EUR),
    ],
)
def test_refuses_what_could_be_meant_otherwise(text: str, unit: Currency) -> None:
    with pytest.raises(MoneyError):
        Amount.parse(text, unit)


@given(st.integers(0, AMOUNT_MINOR_MAX), CURRENCIES)
def test_what_is_shown_reads_back(minor: int, unit: Currency) -> None:
    amount = Amount(minor, unit)
    assert Amount.parse(amount.format("en").replace(",", ""), unit) == amount
    assert Amount.parse(amount.format("de").replace(".", ""), unit) == amount


def test_exponents_show() -> None:
    assert [str(Amount(123456, unit)) for unit in (EUR, JPY, KWD)] == ["1,234.56 EUR", "123,456 JPY", "123.456 KWD"]
    assert Amount(123456, EUR).format("de") == "1.234,56"


def test_unknown_currency_says_what_to_use() -> None:
    with pytest.raises(MoneyError, match="ISO 4217"):
        currency("XYZ")

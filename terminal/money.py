"""Amounts: integer minor units with their currency, never a float.

The table is ISO 4217's: alphabetic code, numeric code (carried by EMV tag 5F2A), exponent (how many digits the
minor unit has: 0 for JPY, 3 for KWD). It holds the currencies that a terminal is likely to be set to; a missing one
is a line to add.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from terminal.errors import TerminalError

AMOUNT_MINOR_MAX: Final = 99_999_999  # 8 digits: what keypad, screen and receipt can show whole (EMV would carry 12)

_AMOUNT = re.compile(r"(?P<major>\d{1,12})(?:[.,](?P<minor>\d*))?", re.ASCII)


class MoneyError(TerminalError):
    """An amount or currency that cannot be meant; the message says why."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Currency:
    """One currency of ISO 4217."""

    code: str
    number: int
    exponent: int


_TABLE: Final = {
    code: Currency(code, number, exponent)
    for code, number, exponent in (
        ("AED", 784, 2), ("AUD", 36, 2), ("BGN", 975, 2), ("BHD", 48, 3), ("BRL", 986, 2), ("CAD", 124, 2),
        ("CHF", 756, 2), ("CLP", 152, 0), ("CNY", 156, 2), ("CZK", 203, 2), ("DKK", 208, 2), ("EGP", 818, 2),
        ("EUR", 978, 2), ("GBP", 826, 2), ("HKD", 344, 2), ("HUF", 348, 2), ("IDR", 360, 2), ("ILS", 376, 2),
        ("INR", 356, 2), ("IQD", 368, 3), ("ISK", 352, 0), ("JOD", 400, 3), ("JPY", 392, 0), ("KRW", 410, 0),
        ("KWD", 414, 3), ("LYD", 434, 3), ("MAD", 504, 2), ("MXN", 484, 2), ("MYR", 458, 2), ("NOK", 578, 2),
        ("NZD", 554, 2), ("OMR", 512, 3), ("PHP", 608, 2), ("PLN", 985, 2), ("PYG", 600, 0), ("QAR", 634, 2),
        ("RON", 946, 2), ("RSD", 941, 2), ("SAR", 682, 2), ("SEK", 752, 2), ("SGD", 702, 2), ("THB", 764, 2),
        ("TND", 788, 3), ("TRY", 949, 2), ("TWD", 901, 2), ("UAH", 980, 2), ("UGX", 800, 0), ("USD", 840, 2),
        ("VND", 704, 0), ("XAF", 950, 0), ("XOF", 952, 0), ("XPF", 953, 0), ("ZAR", 710, 2),
    )
}  # fmt: skip

EUR: Final = _TABLE["EUR"]
GBP: Final = _TABLE["GBP"]
JPY: Final = _TABLE["JPY"]
KWD: Final = _TABLE["KWD"]
USD: Final = _TABLE["USD"]


def currency(code: str) -> Currency:
    """The currency with this alphabetic code. Raises `MoneyError`."""
    try:
        return _TABLE[code.upper()]
    except KeyError:
        raise MoneyError(f"{code!r} is no currency known here; use an ISO 4217 code such as EUR") from None


@dataclass(frozen=True, slots=True)
class Amount:
    """So many minor units of a currency: `Amount(1250, EUR)` is 12.50 euro."""

    minor: int
    currency: Currency

    def __post_init__(self) -> None:
        if not 0 <= self.minor <= AMOUNT_MINOR_MAX:
            raise MoneyError(f"the amount is outside 0 to {AMOUNT_MINOR_MAX} minor units: nothing was charged")

    @classmethod
    def parse(cls, text: str, currency: Currency) -> Amount:
        """Read what a person types: "12.50", "12,5" or "12". Raises `MoneyError` for anything ambiguous."""
        match = _AMOUNT.fullmatch(text.strip())
        if match is None:
            raise MoneyError(f"{text!r} is no amount: write it as 12.50, without sign, blanks or group separators")
        fraction = match["minor"] or ""
        if len(fraction) > currency.exponent:
            raise MoneyError(f"{text!r} has more decimals than {currency.code} has: it takes {currency.exponent}")
        scale: int = 10**currency.exponent
        return cls(int(match["major"]) * scale + int(fraction.ljust(currency.exponent, "0") or "0"), currency)

    def format(self, language: str = "en") -> str:
        """The number for people, without the currency: 1,234.50 in English, 1.234,50 in German."""
        return _number(self.minor, self.currency, language)

    def __str__(self) -> str:
        return sum_of(self.minor, self.currency)


def sum_of(minor: int, currency: Currency) -> str:
    """A sum for people, which may be below nothing or above what one amount may be: -1,234.50 EUR."""
    return f"{'-' if minor < 0 else ''}{_number(abs(minor), currency, 'en')} {currency.code}"


def _number(minor: int, currency: Currency, language: str) -> str:
    point, group = (".", ",") if language == "en" else (",", ".")
    scale: int = 10**currency.exponent
    major, rest = divmod(minor, scale)
    text = f"{major:,}".replace(",", group)
    return f"{text}{point}{rest:0{currency.exponent}d}" if currency.exponent else text

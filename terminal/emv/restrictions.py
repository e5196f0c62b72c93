"""Processing restrictions (EMV 4.4 Book 3, 10.4): may this application be used, here, today, and for this?

`check` looks at the data objects of card and terminal in one mapping and returns the bits that it found.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Final

from terminal.emv.authentication import full_year
from terminal.emv.results import Tvr
from terminal.emv.tags import Tag

PURCHASE: Final = 0x00
CASHBACK: Final = 0x09
CASH: Final = frozenset({0x01, 0x17})
REFUND: Final = 0x20

_ATM_TYPES: Final = frozenset({0x14, 0x15, 0x16})
_GIVES_CASH: Final = 0x80  # 9F40 byte 1


def check(objects: Mapping[int, bytes]) -> Tvr:
    """Application version, usage control, effective and expiration date (Book 3, 10.4.1 to 10.4.3).

    Expects objects of the right length, dates that are `readable`, and 9A and 9C to be there.
    """
    found = Tvr.NONE
    if Tag.APPLICATION_VERSION_CARD in objects and objects[Tag.APPLICATION_VERSION_CARD] != objects.get(
        Tag.APPLICATION_VERSION_TERMINAL
    ):
        found |= Tvr.VERSIONS_DIFFER
    if not _usage_allowed(objects):
        found |= Tvr.SERVICE_NOT_ALLOWED
    today = _ordered(objects[Tag.TRANSACTION_DATE])
    if Tag.EFFECTIVE_DATE in objects and today < _ordered(objects[Tag.EFFECTIVE_DATE]):
        found |= Tvr.NOT_YET_EFFECTIVE
    if Tag.EXPIRATION_DATE in objects and today > _ordered(objects[Tag.EXPIRATION_DATE]):
        found |= Tvr.EXPIRED
    return found


def readable(date: bytes) -> bool:
    """Whether these are six decimal digits, as a date YYMMDD must be."""
    return len(date) == 3 and date.hex().isdecimal()


def not_after(date: datetime.date, expiration: bytes) -> bool:
    """Whether `date` is no later than a readable YYMMDD: an application is good through the day it names."""
    return _ordered(bytes.fromhex(f"{date:%y%m%d}")) <= _ordered(expiration)


def _ordered(date: bytes) -> tuple[int, str]:
    digits = date.hex()
    return full_year(int(digits[:2])), digits[2:]


def _usage_allowed(objects: Mapping[int, bytes]) -> bool:
    """Application usage control (Book 3, 10.4.2). A card that states none restricts nothing."""
    usage = objects.get(Tag.APPLICATION_USAGE_CONTROL)
    if usage is None:
        return True
    if not usage[0] & (0x02 if _is_atm(objects) else 0x01):
        return False
    country = objects.get(Tag.ISSUER_COUNTRY_CODE)
    if country is None:
        return True
    # Each service has two bits, side by side: domestic and international.
    shift = 0 if country == objects.get(Tag.TERMINAL_COUNTRY_CODE) else 1
    kind = objects[Tag.TRANSACTION_TYPE][0]
    if kind in CASH and not usage[0] & 0x80 >> shift:
        return False
    if kind in {PURCHASE, CASHBACK} and not usage[0] & (0x20 | 0x08) >> shift:
        return False
    return not has_cashback(objects) or bool(usage[1] & 0x80 >> shift)


def has_cashback(objects: Mapping[int, bytes]) -> bool:
    return objects[Tag.TRANSACTION_TYPE][0] == CASHBACK or any(objects.get(Tag.AMOUNT_OTHER, b""))


def _is_atm(objects: Mapping[int, bytes]) -> bool:
    """Book 4, A1: an unattended terminal of a financial institution that gives cash."""
    terminal_type = objects.get(Tag.TERMINAL_TYPE, b"\x00")[0]
    capabilities = objects.get(Tag.ADDITIONAL_TERMINAL_CAPABILITIES, b"\x00")[0]
    return terminal_type in _ATM_TYPES and bool(capabilities & _GIVES_CASH)

"""Cardholder verification (EMV 4.4 Book 3, 10.5): which of the card's rules applies, and what became of it.

The terminal here enters no PIN of its own: what is left of the methods is no verification, signature, and (for
contactless kernels, whose reader leaves it to the host) online PIN. A rule that asks for anything else fails, and the
next one is tried if the card allows. Nothing is asked of anybody here: a signature is taken after the transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from terminal.emv.outcome import Cvm
from terminal.emv.records import CardFault
from terminal.emv.restrictions import CASH, has_cashback
from terminal.emv.results import Aip, Tvr
from terminal.emv.tags import Tag

_FAIL, _ONLINE_PIN, _SIGNATURE, _NO_CVM = 0x00, 0x02, 0x1E, 0x1F  # CVM codes (Book 3, C3), low six bits
_PIN_OFFLINE: Final = frozenset({0x01, 0x03, 0x04, 0x05})
_NONE_PERFORMED: Final = 0x3F
_APPLY_NEXT: Final = 0x40  # CVM code bit 7: if this fails, try the next rule

_CAPABILITY: Final = {_ONLINE_PIN: 0x40, _SIGNATURE: 0x20, _NO_CVM: 0x08}  # 9F33 byte 2
_METHOD: Final = {_ONLINE_PIN: Cvm.ONLINE_PIN, _SIGNATURE: Cvm.SIGNATURE, _NO_CVM: Cvm.NONE}

_UNKNOWN, _FAILED, _SUCCESSFUL = 0x00, 0x01, 0x02  # CVM results byte 3; a signature's success is not known yet
NOT_PERFORMED: Final = bytes((_NONE_PERFORMED, 0x00, 0x00))
_NO_RULE_FITS: Final = bytes((_NONE_PERFORMED, 0x00, _FAILED))


@dataclass(frozen=True, slots=True)
class Verification:
    """What cardholder verification came to. `attempted`: the card had rules, so that TSI says it was performed."""

    results: bytes  # 9F34
    tvr: Tvr = Tvr.NONE
    cvm: Cvm = Cvm.NONE
    attempted: bool = False


class _Rule(NamedTuple):
    code: int
    condition: int

    @property
    def method(self) -> int:
        return self.code & 0x3F


def verify(objects: Mapping[int, bytes]) -> Verification:
    """Go through the card's rules (Book 3, 10.5). Raises `CardFault("parse_error")` for a list that cannot be read."""
    if not Aip.decode(objects[Tag.AIP]) & Aip.CVM:
        return Verification(NOT_PERFORMED)
    amounts, rules = _read(objects.get(Tag.CVM_LIST))
    if not rules:
        return Verification(NOT_PERFORMED, Tvr.CARD_DATA_MISSING)
    found, results = Tvr.NONE, _NO_RULE_FITS
    for rule in rules:
        if not _applies(rule, amounts, objects):
            continue
        if _supported(rule.method, objects) and rule.method != _FAIL:
            success = _SUCCESSFUL if rule.method == _NO_CVM else _UNKNOWN
            if rule.method == _ONLINE_PIN:
                found |= Tvr.ONLINE_PIN_ENTERED
            return Verification(bytes((*rule, success)), found, _METHOD[rule.method], attempted=True)
        if rule.method == _FAIL:
            results = bytes((*rule, _FAILED))
        else:
            results = _NO_RULE_FITS
            found |= _why_unsupported(rule.method)
        if not rule.code & _APPLY_NEXT:
            break
    return Verification(results, found | Tvr.CVM_FAILED, Cvm.FAILED, attempted=True)


def _read(cvm_list: bytes | None) -> tuple[tuple[int, int], list[_Rule]]:
    """Amounts X and Y, and the rules."""
    if not cvm_list:
        return (0, 0), []
    if len(cvm_list) < 8 or len(cvm_list) % 2:
        raise CardFault("parse_error")
    amounts = int.from_bytes(cvm_list[:4], "big"), int.from_bytes(cvm_list[4:8], "big")
    return amounts, [_Rule(cvm_list[at], cvm_list[at + 1]) for at in range(8, len(cvm_list), 2)]


def _applies(rule: _Rule, amounts: tuple[int, int], objects: Mapping[int, bytes]) -> bool:
    """Whether the rule's condition holds (Book 3, C3). One that is unknown, or whose data is absent, does not."""
    cash = objects[Tag.TRANSACTION_TYPE][0] in CASH
    unattended = objects.get(Tag.TERMINAL_TYPE, b"\x00").hex()[-1] in "456"
    amount = int(objects[Tag.AMOUNT_AUTHORISED].hex())
    in_card_currency = objects.get(Tag.APPLICATION_CURRENCY_CODE) == objects[Tag.TRANSACTION_CURRENCY_CODE]
    x, y = amounts
    conditions = {
        0x00: True,
        0x01: cash and unattended,
        0x02: not cash and not has_cashback(objects),
        0x03: _supported(rule.method, objects),
        0x04: cash and not unattended,
        0x05: has_cashback(objects),
        0x06: in_card_currency and amount < x,
        0x07: in_card_currency and amount > x,
        0x08: in_card_currency and amount < y,
        0x09: in_card_currency and amount > y,
    }
    return conditions.get(rule.condition, False)


def _supported(method: int, objects: Mapping[int, bytes]) -> bool:
    if method == _FAIL:
        return True
    return bool(objects.get(Tag.TERMINAL_CAPABILITIES, bytes(3))[1] & _CAPABILITY.get(method, 0))


def _why_unsupported(method: int) -> Tvr:
    if method in _PIN_OFFLINE or method == _ONLINE_PIN:
        return Tvr.PIN_PAD_ABSENT
    return Tvr.NONE if method in _METHOD else Tvr.CVM_UNRECOGNISED

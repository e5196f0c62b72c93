"""Terminal risk management (EMV 4.4 Book 3, 10.6): what protects acquirer, issuer and terminal from offline fraud.

Each check looks at one thing and returns the bits that it found; `manage` runs them all, which asks the card for its
counters. It is always run: the card's AIP can demand it, not forbid it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from terminal.emv import tlv
from terminal.emv.apdu import Command, Exchange, transceive
from terminal.emv.configuration import Environment, ExceptionEntry, RandomSelection, Request, Setup
from terminal.emv.decision import Reach
from terminal.emv.outcome import Pan
from terminal.emv.results import Tvr
from terminal.emv.tags import Tag

_BOTH_LIMITS: Final = Tvr.LOWER_OFFLINE_LIMIT_EXCEEDED | Tvr.UPPER_OFFLINE_LIMIT_EXCEEDED


def floor_limit(amount_minor: int, earlier_minor: int, floor_minor: int | None) -> Tvr:
    """Floor limit (Book 3, 10.6.1). `earlier_minor`: what this card paid here last, in case a sale was split."""
    reached = floor_minor is not None and amount_minor + earlier_minor >= floor_minor
    return Tvr.FLOOR_LIMIT_EXCEEDED if reached else Tvr.NONE


def random_selection(amount_minor: int, floor_minor: int | None, selection: RandomSelection, number: int) -> Tvr:
    """Random transaction selection (Book 3, 10.6.2); `number` is drawn from 1 to 99.

    Below the threshold every amount has the same chance; from there it rises in a straight line up to the floor limit.
    Without a floor limit there is no such line.
    """
    percent = selection.target_percent
    if floor_minor is not None and selection.threshold <= amount_minor < floor_minor:
        rise = selection.max_target_percent - selection.target_percent
        percent += rise * (amount_minor - selection.threshold) // (floor_minor - selection.threshold)
    return Tvr.RANDOMLY_SELECTED if number <= percent else Tvr.NONE


def velocity(atc: int | None, last_online_atc: int | None, lower_limit: int, upper_limit: int) -> Tvr:
    """Velocity checking (Book 3, 10.6.3); None for a counter that the card does not give."""
    found = Tvr.NEW_CARD if last_online_atc == 0 else Tvr.NONE
    if atc is None or last_online_atc is None or atc <= last_online_atc:
        return found | _BOTH_LIMITS
    offline = atc - last_online_atc
    if offline > lower_limit:
        found |= Tvr.LOWER_OFFLINE_LIMIT_EXCEEDED
    if offline > upper_limit:
        found |= Tvr.UPPER_OFFLINE_LIMIT_EXCEEDED
    return found


def excepted(setup: Setup, pan: Pan, psn: bytes) -> bool:
    """Whether the terminal's exception file names this card, with its sequence number or as a whole."""
    digits = psn.hex()
    named = {ExceptionEntry(pan)}
    if digits.isdecimal():
        named.add(ExceptionEntry(pan, int(digits)))
    return any(entry in setup.exceptions for entry in named)


def manage(
    setup: Setup,
    request: Request,
    environment: Environment,
    card: Mapping[int, bytes],
    *,
    pan: Pan,
    floor_minor: int | None,
    selection: RandomSelection | None,
    reach: Reach,
) -> Exchange[tuple[Tvr, dict[int, bytes]]]:
    """All of it, for contact: the bits, and the counters that the card gave. `floor_minor` None: no floor limit."""
    amount, psn = request.amount.minor, card.get(Tag.PAN_SEQUENCE_NUMBER, b"")
    found = floor_limit(amount, environment.earlier_minor(pan, psn), floor_minor)
    may_select = not found and reach is not Reach.OFFLINE_ONLY
    if may_select and selection is not None and environment.random_percent is not None:
        found |= random_selection(amount, floor_minor, selection, environment.random_percent())
    if excepted(setup, pan, psn):
        found |= Tvr.ON_EXCEPTION_FILE
    if request.force_online:
        found |= Tvr.MERCHANT_FORCED_ONLINE
    lower = card.get(Tag.LOWER_CONSECUTIVE_OFFLINE_LIMIT)
    upper = card.get(Tag.UPPER_CONSECUTIVE_OFFLINE_LIMIT)
    if not lower or not upper:
        return found, {}
    atc = yield from _get_data(Tag.ATC)
    last_online_atc = yield from _get_data(Tag.LAST_ONLINE_ATC)
    found |= velocity(_number(atc), _number(last_online_atc), lower[0], upper[0])
    counters = {int(Tag.ATC): atc, int(Tag.LAST_ONLINE_ATC): last_online_atc}
    return found, {tag: value for tag, value in counters.items() if value is not None}


def _get_data(tag: Tag) -> Exchange[bytes | None]:
    """GET DATA (Book 3, 6.5.7). A card that refuses, or answers something else, gives nothing."""
    response = yield from transceive(Command(0x80, 0xCA, tag >> 8, tag & 0xFF, le=0))
    if response.sw != 0x9000:
        return None
    try:
        value = tlv.parse_one(response.data, tag).value
    except tlv.TlvError:
        return None
    return value if tag.length_min <= len(value) <= tag.length_max else None


def _number(value: bytes | None) -> int | None:
    return None if value is None else int.from_bytes(value, "big")

"""Relay resistance (Book C-2, 3.10 and state R1): is the card really here, or at the far end of somebody's radio?

The card states how long it takes to answer, and answers a challenge; the reader measures. Whoever relays the exchange
over a distance adds time that nobody can take away again. What was said is then part of what the card signs (CDA), so
that its statement cannot be exchanged.

The clock is the caller's: each `Response` brings how long it took. One that was not measured counts as the least that
the card promises, so that a conversation without times can be replayed. All times of the books are in 0.1 ms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from terminal.emv import tlv
from terminal.emv.apdu import Command, Exchange, transceive
from terminal.emv.records import CardFault
from terminal.emv.results import Aip, Tvr
from terminal.emv.tags import Kernel2Tag, Tag
from terminal.emv.transaction import Transaction

ATTEMPTS_MAX: Final = 3  # a card in a weak field may answer late twice
_UNIT_US: Final = 100
_ANSWER_BYTES: Final = 10  # entropy 4, shortest and longest processing time 2 each, transmission time of the answer 2
_MEASURED_MAX: Final = 0xFFFF
_RELAY_RESISTANCE: Final = 0x10  # kernel configuration, bit 5
_LONG_PAN_DIGITS: Final = 17  # from here on track 2 has room for ten digits of discretionary data, not thirteen

_DEFAULTS: Final[Mapping[Kernel2Tag, int]] = {  # C-2, A.1
    Kernel2Tag.RELAY_GRACE_MIN: 0x0014,
    Kernel2Tag.RELAY_GRACE_MAX: 0x0032,
    Kernel2Tag.EXPECTED_COMMAND_TIME: 0x0012,
    Kernel2Tag.EXPECTED_RESPONSE_TIME: 0x0018,
    Kernel2Tag.RELAY_ACCURACY_THRESHOLD: 0x012C,
    Kernel2Tag.RELAY_MISMATCH_THRESHOLD: 0x32,
}
_STATED: Final = (Kernel2Tag.RELAY_TIME_MIN, Kernel2Tag.RELAY_TIME_MAX, Kernel2Tag.RELAY_RESPONSE_TIME_ESTIMATE)
ANSWERED: Final = (Kernel2Tag.DEVICE_RELAY_ENTROPY, *_STATED)  # by the card
_SIGNED: Final = (Kernel2Tag.TERMINAL_RELAY_ENTROPY, *ANSWERED)


def resist(transaction: Transaction) -> Exchange[None]:
    """Run the protocol if card and terminal both know it, and note in the TVR what came of it.

    The unpredictable number is drawn anew for each attempt, and stays the transaction's. Raises `CardFault` for an
    answer that came sooner than the card can compute it, `TlvError`, `CardRemoved`.
    """
    configured = transaction.terminal[Kernel2Tag.KERNEL_CONFIGURATION][0]
    if not (transaction.aip & Aip.RELAY_RESISTANCE and configured & _RELAY_RESISTANCE):
        transaction.note(Tvr.RELAY_RESISTANCE_NOT_PERFORMED)
        return
    transaction.note(Tvr.RELAY_RESISTANCE_PERFORMED)
    for attempt in range(ATTEMPTS_MAX):
        yield from _exchange(transaction, attempt)
        measured = _number(transaction, Kernel2Tag.RELAY_TIME_MEASURED)
        shortest, longest = (_number(transaction, tag) for tag in _STATED[:2])
        if measured < shortest - _number(transaction, Kernel2Tag.RELAY_GRACE_MIN):
            raise CardFault("card_error")
        if measured <= longest + _number(transaction, Kernel2Tag.RELAY_GRACE_MAX):
            break
    else:
        transaction.note(Tvr.RELAY_TIME_LIMITS_EXCEEDED)
    if _inaccurate(transaction, measured - shortest):
        transaction.note(Tvr.RELAY_THRESHOLD_EXCEEDED)


def signed_data(objects: Mapping[int, bytes]) -> bytes:
    """What a card that took part signs behind the transaction data hash (C-2, 6.9)."""
    return b"".join(objects.get(tag, b"") for tag in _SIGNED)


def into_track_2(transaction: Transaction) -> None:
    """Tell the issuer in track 2 what only a signature would have vouched for (C-2, 6.9, where CDA is not asked for).

    The discretionary data become key index, number of the attempt, part of the card's entropy, and the time measured.
    """
    track_2 = transaction.card.get(Tag.TRACK_2_EQUIVALENT, b"").hex().upper()
    pan, separator, rest = track_2.partition("D")
    if not separator or len(rest) < 7:
        return
    index = int.from_bytes(transaction.card.get(Tag.CA_PUBLIC_KEY_INDEX, b""), "big")
    entropy = int.from_bytes(transaction.card[Kernel2Tag.DEVICE_RELAY_ENTROPY][2:], "big")
    digits = f"{index if index < 10 else 0}{_number(transaction, Kernel2Tag.RELAY_COUNTER)}{entropy:05d}"
    if len(pan) < _LONG_PAN_DIGITS:
        digits += f"{min(_number(transaction, Kernel2Tag.RELAY_TIME_MEASURED), 999):03d}"
    discretionary = digits.ljust(13 if len(pan) < _LONG_PAN_DIGITS else 10, "0")
    whole = pan + separator + rest[:7] + discretionary  # expiry 4, service code 3
    transaction.card[Tag.TRACK_2_EQUIVALENT] = bytes.fromhex(whole + "F" * (len(whole) % 2))


def _exchange(transaction: Transaction, attempt: int) -> Exchange[None]:
    """EXCHANGE RELAY RESISTANCE DATA (C-2, 5.3)."""
    entropy = transaction.new_unpredictable_number()
    transaction.terminal[Kernel2Tag.TERMINAL_RELAY_ENTROPY] = entropy
    transaction.terminal[Kernel2Tag.RELAY_COUNTER] = bytes((attempt,))
    response = yield from transceive(Command(0x80, 0xEA, 0x00, 0x00, entropy, le=0))
    if response.sw != 0x9000:
        raise CardFault("card_error")
    answer = tlv.parse_one(response.data, Tag.RESPONSE_FORMAT_1).value
    if len(answer) != _ANSWER_BYTES:
        raise CardFault("parse_error")
    transaction.card[Kernel2Tag.DEVICE_RELAY_ENTROPY] = answer[:4]
    for tag, at in zip(_STATED, (4, 6, 8), strict=True):
        transaction.card[tag] = answer[at : at + 2]
    measured = _processing_time(transaction, response.elapsed_us)
    transaction.terminal[Kernel2Tag.RELAY_TIME_MEASURED] = measured.to_bytes(2, "big")


def _processing_time(transaction: Transaction, elapsed_us: int | None) -> int:
    """What is left of the time when that on the air is taken away."""
    if elapsed_us is None:
        return _number(transaction, Kernel2Tag.RELAY_TIME_MIN)
    on_the_air = _number(transaction, Kernel2Tag.EXPECTED_COMMAND_TIME) + min(
        _number(transaction, Kernel2Tag.RELAY_RESPONSE_TIME_ESTIMATE),
        _number(transaction, Kernel2Tag.EXPECTED_RESPONSE_TIME),
    )
    return min(max(0, elapsed_us // _UNIT_US - on_the_air), _MEASURED_MAX)


def _inaccurate(transaction: Transaction, beyond_shortest: int) -> bool:
    """Whether card and terminal think differently of the air, or the card took its time."""
    theirs = _number(transaction, Kernel2Tag.RELAY_RESPONSE_TIME_ESTIMATE)
    ours = _number(transaction, Kernel2Tag.EXPECTED_RESPONSE_TIME)
    percent = _number(transaction, Kernel2Tag.RELAY_MISMATCH_THRESHOLD)
    return (
        theirs * 100 < percent * ours
        or ours * 100 < percent * theirs
        or beyond_shortest > _number(transaction, Kernel2Tag.RELAY_ACCURACY_THRESHOLD)
    )


def _number(transaction: Transaction, tag: Kernel2Tag) -> int:
    value = transaction.terminal.get(tag) or transaction.card.get(tag)
    return _DEFAULTS.get(tag, 0) if value is None else int.from_bytes(value, "big")

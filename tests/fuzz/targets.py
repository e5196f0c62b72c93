"""What is fuzzed: functions of bytes that must return, whatever the bytes are, and raise for nothing but a fault.

`tlv` and `dol` take the bytes as a card's. `contact` and `contactless` take them as a script: the first byte chooses an
honest card and its terminal, then one step for each command that the kernel sends. A step leaves the answer as it is,
changes it, puts another in its place, or takes the card away; when the script ends the card is honest again, so that a
change far down in a transaction needs only a few bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from typing import Final

from emv_rig import (
    CDOL1,
    MASTERCARD,
    TTQ_ODA_FOR_ONLINE,
    UN,
    VISA,
    Answering,
    ChipCard,
    OverT0,
    Pki,
    directory_entry,
    fci,
    inserted,
    request,
    setup,
    visa,
    visa_card,
)
from emv_rig import tlv as encoded
from hostile_rig import ANSWER, check, drive, finish

from terminal.emv import contact as contact_kernel
from terminal.emv import dol as data_object_lists
from terminal.emv import entry_point, tags
from terminal.emv import tlv as ber
from terminal.emv.apdu import Command, Response
from terminal.emv.atr import AtrError, atr, ats
from terminal.emv.configuration import Combination, Environment, Limits, Setup
from terminal.emv.contact_selection import Candidate
from terminal.emv.describe import decoding
from terminal.emv.outcome import Approved, IssuerAnswer, OdaStatus, Torn, TryAgain
from terminal.emv.torn import TornRecords

# Tag-length-value, data object lists


def tlv(data: bytes) -> None:
    """Parsed, described and put together again: the same data objects, or an error of the parser's own."""
    try:
        nodes = ber.parse(data)
    except ber.TlvError as error:
        assert error.at is None or 0 <= error.at <= len(data)
    else:
        again = b"".join(ber.encode(node.tag, node.value) for node in nodes)
        assert ber.parse(again) == nodes
        for node in ber.primitives(nodes):
            tags.lookup(node.tag)
            assert ber.without(data, node.tag) is not None
    decoding.ber_tlv(data)


def dol(data: bytes) -> None:
    """A list and what answers it: as long as the list says, and to be taken apart again."""
    size = data[0] if data else 0
    asked, value = data[1 : 1 + size], data[1 + size :]
    try:
        entries = list(data_object_lists.entries(asked))
    except ber.TlvError:
        return
    values: Mapping[int, bytes] = {tag: value for tag, _ in entries}
    for kernel in (None, 2, 3):
        answer = data_object_lists.build(asked, values, kernel)
        assert len(answer) == sum(length for _, length in entries)
        assert [entry for entry, _ in data_object_lists.split(asked, answer)] == entries


def answer_to_reset(data: bytes) -> None:
    """What a card says of itself before anything is asked."""
    for read in (atr, ats):
        try:
            read(data)
        except AtrError:
            continue


def described(data: bytes) -> None:
    """Whatever it is, there is a report of it."""
    decoding.recognise(data)
    decoding.conversation([part for part in data.split(b"\xff\xff") if part])


# Whole transactions

STEPS_MAX: Final = 64  # a longer script only repeats itself
_RELAY_ANSWER: Final = bytes.fromhex("800A 11223344 0005 0014 0018")


class Script:
    """Reads a script, and answers for an honest card as it says."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at, self._steps = data, 0, 0

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def some(self) -> bytes:
        size = self.byte()
        self._at += size
        return self._data[self._at - size : self._at]

    def answer(self, card: Answering, command: Command) -> bytes | None:
        response = card.answer(command)
        honest = response.data + response.sw.to_bytes(2, "big")
        self._steps += 1
        if self._at >= len(self._data) or self._steps > STEPS_MAX:
            return honest
        return self._changed(honest)

    def _changed(self, honest: bytes) -> bytes | None:  # noqa: PLR0911 - one step each
        match self.byte() % 8:
            case 1:
                return honest[:-2] + bytes((self.byte(), self.byte()))
            case 2:
                at, bits = self.byte() % len(honest), self.byte()
                return honest[:at] + bytes((honest[at] ^ bits,)) + honest[at + 1 :]
            case 3:
                return self.some() + b"\x90\x00"
            case 4:
                return self.some()
            case 5:
                return honest[: self.byte()] + honest[-2:]
            case 6:
                return None
            case 7:
                at, more = self.byte() % len(honest), self.some()
                return honest[:at] + more + honest[at:]
            case _:
                return honest


class _Tapped(ChipCard):
    """Knows relay resistance, the recovery of a cryptogram, and its balance."""

    _last: Response = Response(b"", 0x6985)

    def answer(self, command: Command) -> Response:
        if command.ins == 0xEA:
            return Response(_RELAY_ANSWER, 0x9000, elapsed_us=4_000)
        if command.ins == 0xD0:
            return self._last
        response = super().answer(command)
        if command.ins == 0xAE:
            self._last = response
        return response


_PKI: Final = Pki(rid=MASTERCARD[:5])
_VELOCITY: Final[Mapping[str, bytes | None]] = {"9F14": b"\x02", "9F23": b"\x04"}
_COUNTERS: Final = {"9F36": bytes.fromhex("9F36020007"), "9F13": bytes.fromhex("9F13020003")}
_SEVERAL: Final = (
    encoded("70", directory_entry(VISA), directory_entry(VISA + b"\x01", 2), directory_entry(VISA + b"\x02", 0x83)),
)
_BLOCK: Final = IssuerAnswer(b"05", bytes(16), (), (encoded("86", bytes.fromhex("841E000004FFFFFFFF")),))

_INSERTED: Final[list[tuple[Callable[[], Answering], IssuerAnswer | None]]] = [
    (ChipCard, ANSWER),  # CDA
    (lambda: ChipCard(kinds=("TC",)), None),
    (lambda: OverT0(ChipCard(kinds=("ARQC", "AAC"))), ANSWER),
    (lambda: ChipCard(aip=bytes.fromhex("3C00"), kinds=("TC",)), None),  # DDA
    (lambda: ChipCard(aip=bytes.fromhex("3C00")), _BLOCK),
    (lambda: OverT0(ChipCard(aip=bytes.fromhex("5800"), format_1=True)), None),  # SDA
    (lambda: ChipCard(aip=bytes.fromhex("5C00"), kinds=("AAC",), changes=_VELOCITY, data=_COUNTERS), None),
    (lambda: ChipCard(changes=_VELOCITY, data=_COUNTERS, format_1=True, aip=bytes.fromhex("1C00")), None),
    (lambda: ChipCard(directory=_SEVERAL, files=None), ANSWER),
    (lambda: ChipCard(files={VISA: fci(VISA, None)}, pdol=None), ANSWER),  # no directory
]
_LIMIT: Final = bytes.fromhex("000000099999")
_BASE: Final = dict.fromkeys((14647587, 14647588, 14647589, 14647590), _LIMIT) | {
    tag: bytes(5) for tag in (0xDF8120, 0xDF8121, 0xDF8122)
}
_EVERYTHING: Final = _BASE | {0xDF811B: b"\xb0", 0xDF811D: b"\x02", 0xDF8104: bytes(6), 0xDF8105: bytes(6)}
_MC_CDOL: Final = bytes.fromhex("9F02069F370495059F3403")


def _mastercard(aip: str, *kinds: str, **changes: bytes) -> Callable[[], Answering]:
    objects: dict[str, bytes | None] = {
        "8C": _MC_CDOL,
        **{name.removeprefix("tag_"): it for name, it in changes.items()},
    }
    return lambda: _Tapped(
        aip=bytes.fromhex(aip),
        aid=MASTERCARD,
        pki=_PKI,
        changes=objects,
        kinds=kinds,
        data={"9F50": bytes.fromhex("9F5006000000004200")},
    )


def _setups() -> list[tuple[Setup, Callable[[], Answering]]]:
    def mastercard(tags: Mapping[int, bytes]) -> Setup:
        return setup(Combination(MASTERCARD, 2, Limits(), tags), pki=_PKI)

    drdol = bytes.fromhex("9F02069F3704")
    visa_cards = {kind: visa_card(kind=kind) for kind in ("TC", "ARQC", "AAC")}
    return [
        (setup(visa(TTQ_ODA_FOR_ONLINE)), lambda: visa_cards["TC"]),
        (setup(visa(TTQ_ODA_FOR_ONLINE)), lambda: visa_cards["ARQC"]),
        (setup(visa(bytes.fromhex("3EC04000"))), lambda: visa_cards["AAC"]),
        (mastercard(_BASE), _mastercard("1980", "TC")),
        (mastercard(_BASE), _mastercard("1980", "ARQC")),
        (mastercard(_EVERYTHING), _mastercard("1981", "TC", tag_9F51=drdol, tag_9F5D=bytes.fromhex("000300"))),
        (mastercard(_EVERYTHING), _mastercard("1B81", "ARQC", tag_9F51=drdol, tag_9F6E=bytes.fromhex("027600003131"))),
        (mastercard(_EVERYTHING), _mastercard("1881", "AAC", tag_9F5D=bytes.fromhex("000100"))),
        (mastercard(_BASE | {0xDF811B: b"\x20"}), _mastercard("0080", "ARQC", tag_8C=CDOL1)),
    ]


_INSERTED_SETUP: Final = setup(inserted())
_TAPPED: Final = _setups()


def contact(data: bytes) -> None:
    """An inserted card, to the last cryptogram."""
    script = Script(data)
    make, of_the_host = _INSERTED[script.byte() % len(_INSERTED)]
    card = make()

    def choose(remaining: tuple[Candidate, ...]) -> Candidate | None:  # whoever asks, as a cardholder would
        return remaining[-1] if remaining else None

    lent = Environment(unpredictable_number=lambda: UN, notify=lambda ui: None, random_percent=lambda: 50)
    several = len(data) % 2 == 1
    started = contact_kernel.run(_INSERTED_SETUP, request(), lent, **({"choose": choose} if several else {}))  # type: ignore[arg-type]

    def answer(at: int, command: Command) -> bytes | None:
        return script.answer(card, command)

    outcome, sent = drive(started, answer)
    check(finish(outcome, answer, sent, of_the_host))


def contactless(data: bytes) -> None:
    """A tapped card, and once more if it left in the middle."""
    script = Script(data)
    with_setup, make = _TAPPED[script.byte() % len(_TAPPED)]
    card = make()
    numbers = count(int.from_bytes(UN, "big"))
    lent = Environment(unpredictable_number=lambda: UN, notify=lambda ui: None, torn=TornRecords())
    if isinstance(card, _Tapped) and card.aip[-1] & 1:  # with relay resistance each number is another one
        lent = replace(lent, unpredictable_number=lambda: next(numbers).to_bytes(4, "big"))

    def answer(at: int, command: Command) -> bytes | None:
        return script.answer(card, command)

    for _ in range(2):
        outcome, _sent = drive(entry_point.run(with_setup, request(), lent), answer)
        check(outcome)
        if with_setup.combinations[0].kernel == 3 and isinstance(outcome, Approved):
            assert outcome.card.oda.status is OdaStatus.OK, "approved offline without authentication"
        if not isinstance(outcome, Torn | TryAgain):
            break


TARGETS: Final[Mapping[str, Callable[[bytes], None]]] = {
    "tlv": tlv,
    "dol": dol,
    "atr": answer_to_reset,
    "described": described,
    "contact": contact,
    "contactless": contactless,
}

"""A card may answer anything: entry point and kernel end in an outcome, soon, and never in an exception."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from emv_rig import (
    TTQ_ODA_FOR_ONLINE,
    UN,
    VISA,
    Card,
    attempt,
    directory_entry,
    fci,
    ppse,
    request,
    setup,
    tlv,
    visa,
    visa_card,
)
from hypothesis import given
from hypothesis import strategies as st

from terminal.emv import entry_point
from terminal.emv.apdu import CardRemoved, Command, Response
from terminal.emv.configuration import Environment
from terminal.emv.outcome import Approved, Declined, EndApplication, OdaStatus, OnlineRequest, Outcome, SelectNext
from terminal.emv.records import RECORDS_MAX
from terminal.emv.selection import DIRECTORY_ENTRIES_MAX

# One directory, a SELECT and a GET PROCESSING OPTIONS for each of its entries, and the records of the one that answers.
COMMANDS_MAX = 1 + 2 * DIRECTORY_ENTRIES_MAX + RECORDS_MAX


def drive(answer: Callable[[int, Command], bytes | None], ttq: bytes = TTQ_ODA_FOR_ONLINE) -> tuple[Outcome, int]:
    """Run entry point against raw answers; None is a card that leaves."""
    environment = Environment(unpredictable_number=lambda: UN, notify=lambda ui: None)
    exchange = entry_point.run(setup(visa(ttq)), request(), environment)
    count = 0
    try:
        command = next(exchange)
        while True:
            count += 1
            assert count <= COMMANDS_MAX, "the kernel does not come to an end"
            assert 4 <= len(command.encode()) <= 261
            raw = answer(count - 1, command)
            command = exchange.throw(CardRemoved()) if raw is None else exchange.send(Response.decode(raw))
    except StopIteration as stop:
        outcome: Outcome = stop.value
        return outcome, count


def check(outcome: Outcome) -> None:
    """What holds whatever the card said."""
    assert not isinstance(outcome, SelectNext), "this outcome is entry point's own"
    match outcome:
        case Approved(card):
            assert card.oda.status is OdaStatus.OK, "approved offline without authentication"
            assert card.cid & 0xC0 == 0x40
        case OnlineRequest(card) | Declined(card=card) if card is not None:
            assert {0x57, 0x9F26, 0x9F27, 0x9F36, 0x9F10, 0x82, 0x84} <= card.tags.keys()
            assert card.tags[0x9F02] == bytes.fromhex("000000001250")
        case _:
            assert getattr(outcome, "reason", "")


ANSWERS = st.one_of(
    st.none(),
    st.binary(max_size=258),
    st.binary(max_size=256).map(lambda data: data + b"\x90\x00"),
    st.builds(
        lambda tag, data: tlv(tag, data) + b"\x90\x00",
        st.sampled_from(["6F", "70", "77", "80"]),
        st.binary(max_size=250),
    ),
)


@given(st.lists(ANSWERS, min_size=1, max_size=8))
def test_arbitrary_answers(answers: Sequence[bytes | None]) -> None:
    outcome, _ = drive(lambda at, command: answers[at % len(answers)])
    check(outcome)


CARDS = {kind: visa_card(kind=kind) for kind in ("AAC", "TC", "ARQC")}


def raw_answers(card: Card) -> list[bytes]:
    return [
        response.data + response.sw.to_bytes(2, "big")
        for response in (card.answer(command) for command in attempt(card).commands)
    ]


TRANSCRIPTS = {kind: raw_answers(card) for kind, card in CARDS.items()}


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, int, bytes | None]:
    """One answer of an honest card, changed: bits flipped, bytes inserted, cut out, or cut off."""
    kind = draw(st.sampled_from(sorted(TRANSCRIPTS)))
    at = draw(st.integers(0, len(TRANSCRIPTS[kind]) - 1))
    raw = bytearray(TRANSCRIPTS[kind][at])
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.integers(0, len(raw) - 1)) if raw else 0
        match draw(st.sampled_from(["flip", "insert", "cut out", "cut off", "zero"])):
            case "flip" if raw:
                raw[where] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                raw[where:where] = draw(st.binary(max_size=4))
            case "cut out":
                del raw[where : where + draw(st.integers(1, 4))]
            case "cut off":
                del raw[where:]
            case _ if raw:
                raw[where] = 0
    return kind, at, bytes(raw)


@given(mutations(), st.sampled_from([bytes.fromhex("36004000"), TTQ_ODA_FOR_ONLINE, bytes.fromhex("3EC04000")]))
def test_an_honest_card_changed_on_the_way(mutation: tuple[str, int, bytes | None], ttq: bytes) -> None:
    kind, at, changed = mutation
    honest = CARDS[kind]

    def answer(now: int, command: Command) -> bytes | None:
        if now == at:
            return changed
        response = honest.answer(command)
        return response.data + response.sw.to_bytes(2, "big")

    outcome, _ = drive(answer, ttq)
    check(outcome)
    if kind != "TC" and isinstance(outcome, Approved):
        # The CID travels in clear: only the cryptogram itself, checked by the issuer, and fast DDA speak for a TC.
        assert at == 2, "approved although the card did not approve"


@pytest.mark.parametrize("size", [257, 5_000, 70_000])
@pytest.mark.parametrize("at", range(4))
def test_answers_longer_than_any_card_can_send(size: int, at: int) -> None:
    honest = CARDS["ARQC"]

    def answer(now: int, command: Command) -> bytes:
        response = honest.answer(command)
        filler = bytes(size) if now == at else b""
        return response.data + filler + response.sw.to_bytes(2, "big")

    outcome, _ = drive(answer)
    check(outcome)


def test_a_huge_pdol_is_refused_before_it_is_answered() -> None:
    pdol = bytes.fromhex("9F6604") + bytes.fromhex("9F4EFF") * 20_000
    card = replace(CARDS["ARQC"], applications={VISA: fci(VISA, bytes.fromhex("9F6604")) + pdol})
    assert attempt(card).outcome == EndApplication("parse_error")
    record = b"".join((b"\x82", (len(pdol)).to_bytes(2, "big"), pdol))
    long_fci = b"\x6f\x82" + (len(record) + 11).to_bytes(2, "big") + tlv("84", VISA) + b"\x9f\x38" + record
    assert attempt(replace(card, applications={VISA: long_fci})).outcome == EndApplication("parse_error")


def test_a_card_that_always_refuses_is_asked_only_so_often() -> None:
    names = [VISA + bytes([number]) for number in range(60)]
    card = Card(ppse(*map(directory_entry, names)), {name: fci(name) for name in names}, options_sw=0x6985)
    result = attempt(card)
    assert len(result.commands) == 1 + 2 * DIRECTORY_ENTRIES_MAX


def test_a_card_of_endless_records_is_read_only_so_far() -> None:
    afl = bytes.fromhex("08018000")
    card = visa_card({"94": afl})
    empty = {(1, number): b"\x70\x00" for number in range(2, 129)}
    result = attempt(replace(card, records={**card.records, **empty}))
    assert sum(command.ins == 0xB2 for command in result.commands) == RECORDS_MAX
    assert isinstance(result.outcome, OnlineRequest)
    too_many = attempt(visa_card({"94": afl + bytes.fromhex("10010100")}))
    assert too_many.outcome == EndApplication("parse_error")


@given(st.integers(0, 6), st.integers(0, 0xFFFF))
def test_any_status_word_at_any_command(at: int, sw: int) -> None:
    honest = CARDS["TC"]

    def answer(now: int, command: Command) -> bytes:
        response = honest.answer(command)
        return response.data + (sw if now == at else response.sw).to_bytes(2, "big")

    outcome, _ = drive(answer)
    check(outcome)
    assert isinstance(outcome, Approved) is (sw == 0x9000)

"""An inserted or a Mastercard-like card may answer anything, too: the kernel ends, soon, and never in an exception."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from emv_rig import (
    MASTERCARD,
    TERMINAL,
    UN,
    Answering,
    ChipCard,
    Pki,
    inserted,
    request,
    setup,
    tlv,
)
from hostile_rig import check, drive, finish
from hypothesis import given, settings
from hypothesis import strategies as st

from terminal.emv import contact, entry_point
from terminal.emv.apdu import Command, Exchange
from terminal.emv.configuration import Combination, Environment, Limits, Setup
from terminal.emv.outcome import (
    Approved,
    IssuerAnswer,
    OdaStatus,
    OnlineRequest,
    Outcome,
)

LIMIT = bytes.fromhex("000000099999")
LIMITS = {0xDF8123: LIMIT, 0xDF8124: LIMIT, 0xDF8125: LIMIT, 0xDF8126: LIMIT}
CODES = {0xDF8120: bytes(5), 0xDF8121: bytes(5), 0xDF8122: bytes(5)}
PKI = Pki(rid=MASTERCARD[:5])
TAPPED: Setup = setup(Combination(MASTERCARD, 2, Limits(), {**LIMITS, **CODES}), pki=PKI)
INSERTED: Setup = setup(inserted())

LENT = Environment(unpredictable_number=lambda: UN, notify=lambda ui: None, random_percent=lambda: 1)


def exchange(kernel: str) -> Exchange[Outcome]:
    if kernel == "contact":
        return contact.run(INSERTED, request(), LENT)
    return entry_point.run(TAPPED, request(), LENT)


ANSWERS = st.one_of(
    st.none(),
    st.binary(max_size=258),
    st.binary(max_size=256).map(lambda data: data + b"\x90\x00"),
    st.sampled_from([bytes.fromhex(sw) for sw in ("6110", "6100", "6C10", "6283", "6A81", "6A82", "6A83", "6700")]),
    st.builds(
        lambda tag, data: tlv(tag, data) + b"\x90\x00",
        st.sampled_from(["6F", "70", "77", "80"]),
        st.binary(max_size=250),
    ),
)
KERNELS = st.sampled_from(["contact", "kernel 2"])


@given(KERNELS, st.lists(ANSWERS, min_size=1, max_size=8))
def test_arbitrary_answers(kernel: str, answers: Sequence[bytes | None]) -> None:
    def answer(at: int, command: Command) -> bytes | None:
        return answers[at % len(answers)]

    outcome, count = drive(exchange(kernel), answer)
    check(finish(outcome, answer, count))


def honest(kernel: str, kind: str) -> ChipCard:
    if kernel == "contact":
        return ChipCard(kinds=(kind, "TC"))
    changes = {"8C": bytes.fromhex("9F02069F370495059F3403")}
    return ChipCard(aip=bytes.fromhex("1980"), aid=MASTERCARD, pki=PKI, changes=changes, kinds=(kind,))


def raw(card: Answering, command: Command) -> bytes:
    response = card.answer(command)
    return response.data + response.sw.to_bytes(2, "big")


def change(draw: st.DrawFn, answer: bytes) -> bytes:
    """Bits flipped, bytes inserted, cut out, or cut off."""
    changed = bytearray(answer)
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.integers(0, len(changed) - 1)) if changed else 0
        match draw(st.sampled_from(["flip", "insert", "cut out", "cut off", "zero"])):
            case "flip" if changed:
                changed[where] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                changed[where:where] = draw(st.binary(max_size=4))
            case "cut out":
                del changed[where : where + draw(st.integers(1, 4))]
            case "cut off":
                del changed[where:]
            case _ if changed:
                changed[where] = 0
    return bytes(changed)


@settings(max_examples=300)
@given(KERNELS, st.sampled_from(["TC", "ARQC", "AAC"]), st.integers(0, 14), st.data())
def test_an_honest_card_changed_on_the_way(kernel: str, kind: str, at: int, data: st.DataObject) -> None:
    card = honest(kernel, kind)

    def answer(now: int, command: Command) -> bytes:
        whole = raw(card, command)
        return data.draw(st.composite(change)(whole)) if now == at else whole

    outcome, count = drive(exchange(kernel), answer)
    finished = finish(outcome, answer, count)
    check(finished)
    if kind == "AAC":
        assert not isinstance(finished, Approved), "approved although the card did not approve"


@pytest.mark.parametrize("kernel", ["contact", "kernel 2"])
def test_the_honest_card_is_one(kernel: str) -> None:
    """A negative control: unchanged, it is approved, by a signature."""
    card = honest(kernel, "TC")
    outcome, _ = drive(exchange(kernel), lambda at, command: raw(card, command))
    assert isinstance(outcome, Approved)
    assert outcome.card.oda.status is OdaStatus.OK


@given(KERNELS, st.integers(0, 12), st.integers(0, 0xFFFF))
def test_any_status_word_at_any_command(kernel: str, at: int, sw: int) -> None:
    card = honest(kernel, "ARQC")

    def answer(now: int, command: Command) -> bytes:
        response = card.answer(command)
        return response.data + (sw if now == at else response.sw).to_bytes(2, "big")

    outcome, count = drive(exchange(kernel), answer)
    check(finish(outcome, answer, count))


@pytest.mark.parametrize("kernel", ["contact", "kernel 2"])
@pytest.mark.parametrize("size", [257, 5_000, 70_000])
@pytest.mark.parametrize("at", range(11))
def test_answers_longer_than_any_card_can_send(kernel: str, size: int, at: int) -> None:
    card = honest(kernel, "TC")

    def answer(now: int, command: Command) -> bytes:
        whole = raw(card, command)
        return whole[:-2] + (bytes(size) if now == at else b"") + whole[-2:]

    outcome, _ = drive(exchange(kernel), answer)
    check(outcome)


@given(st.builds(IssuerAnswer, st.binary(max_size=4), st.none() | st.binary(max_size=300),
                 st.lists(st.binary(max_size=40), max_size=3).map(tuple),
                 st.lists(st.binary(max_size=40), max_size=3).map(tuple)))  # fmt: skip
def test_a_host_may_answer_anything(answer: IssuerAnswer) -> None:
    card = honest("contact", "ARQC")
    outcome, _ = drive(exchange("contact"), lambda at, command: raw(card, command))
    assert isinstance(outcome, OnlineRequest)
    assert outcome.resume is not None
    finished, _ = drive(outcome.resume(answer), lambda at, command: raw(card, command))
    assert isinstance(finished, Approved) is (answer.response_code in {b"00", b"10", b"11"})


def test_a_terminal_that_states_little() -> None:
    """Bare configurations end somewhere, too."""
    for terminal in ({}, {0x9F33: TERMINAL[0x9F33]}, {0x9F35: b"\x22"}):
        for kernel, bare in (("contact", INSERTED), ("kernel 2", TAPPED)):
            card = honest(kernel, "ARQC")
            with_terminal = replace(bare, terminal=terminal)
            run = contact.run if kernel == "contact" else entry_point.run
            outcome, _ = drive(run(with_terminal, request(), LENT), lambda at, command, card=card: raw(card, command))  # type: ignore[misc]
            check(outcome)

"""Book 1, 9.3.1 and Annex A: what an inserted card's protocol does to a conversation, and vectors nobody here wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from emv_rig import ChipCard, OverT0, OverT1, complete, insert

from terminal.emv.apdu import GET_RESPONSES_MAX, CardRemoved, Command, ContactLine, Exchange, Response, transceive
from terminal.emv.outcome import Approved, IssuerAnswer, OnlineRequest

VECTORS = Path(__file__).parents[2] / "shared" / "vectors" / "apdu_scripts_emv_utils.json"
SELECT = Command(0x00, 0xA4, 0x04, 0x00, b"1PAY.SYS.DDF01", le=0)
READ = Command(0x00, 0xB2, 0x01, 0x0C, le=0)


def scripted(line: ContactLine, command: Command, answers: Sequence[str]) -> tuple[tuple[bytes, int], list[str]]:
    """Send one command over a line whose card answers so."""
    exchange = line.carry(transceive(command))
    sent = [next(exchange).encode().hex().upper()]
    for answer in answers:
        try:
            sent.append(exchange.send(Response.decode(bytes.fromhex(answer))).encode().hex().upper())
        except StopIteration as finished:
            return (finished.value.data, finished.value.sw), sent
    raise AssertionError(f"more was sent than was answered: {sent}")


def without_le(command: str) -> str:
    """Case 4 as T=0 has it."""
    raw = bytes.fromhex(command)
    return (raw[:-1] if len(raw) > 5 and len(raw) == 6 + raw[4] else raw).hex().upper()


def vectors() -> list[Any]:
    return json.loads(VECTORS.read_text(encoding="utf-8"))["cases"] if VECTORS.exists() else []


@pytest.mark.skipif(not VECTORS.exists(), reason="the published vectors are not beside this project")
@pytest.mark.parametrize(
    "case", [case for case in vectors() if case["id"].startswith("emv_ttl_pcsc_test")], ids=lambda case: case["id"]
)
def test_published_conversations(case: Any) -> None:
    command = SELECT if "case_4" in case["id"] else READ
    response, sent = scripted(ContactLine(), command, [answer for _, answer in case["apdus"]])
    assert sent == [without_le(command) for command, _ in case["apdus"]]
    data = "" if case["r_apdu"] == case["sw"].removeprefix("0x") else case["r_apdu"]
    assert response == (bytes.fromhex(data), int(case["sw"], 16))


@pytest.mark.parametrize(
    ("answers", "sent", "data", "sw"),
    [
        (["6102", "ABCD9000"], ["A4", "C0000002"], "ABCD", 0x9000),
        (["6100", "ABCD9000"], ["A4", "C0000000"], "ABCD", 0x9000),
        (["6101", "AB6101", "CD9000"], ["A4", "C0000001", "C0000001"], "ABCD", 0x9000),
        (["ABCD9000"], ["A4"], "ABCD", 0x9000),
        (["6A82"], ["A4"], "", 0x6A82),
        (["6283", "ABCD9000"], ["A4", "C0000000"], "ABCD", 0x6283),  # a warning comes before the data it warns of
        (["6283", "6D00"], ["A4", "C0000000"], "", 0x6283),
        (["ABCD6283"], ["A4"], "ABCD", 0x6283),
        (["6102", "6985"], ["A4", "C0000002"], "", 0x6985),
        (["6102", "6C01", "AB9000"], ["A4", "C0000002", "C0000001"], "AB", 0x9000),
        (["6102", "6C01", "6C01"], ["A4", "C0000002", "C0000001"], "", 0x6C01),  # corrected once, no more
        (["6700", "ABCD9000"], ["A4", "A4 Le"], "ABCD", 0x9000),
        (["9000", "ABCD9000"], ["A4", "A4 Le"], "ABCD", 0x9000),
        (["6700", "6700"], ["A4", "A4 Le"], "", 0x6700),
    ],
)
def test_select(answers: list[str], sent: list[str], data: str, sw: int) -> None:
    select = SELECT.encode().hex().upper()
    written = [{"A4": select[:-2], "A4 Le": select}.get(each, "00" + each) for each in sent]
    assert scripted(ContactLine(), SELECT, answers) == ((bytes.fromhex(data), sw), written)


def test_the_protocol_is_learned_from_an_application_that_answers() -> None:
    """A card without a directory says nothing of its protocol yet."""
    line = ContactLine()
    select, generate = SELECT.encode().hex().upper(), Command(0x80, 0xAE, 0x40, 0x00, b"\x01", le=0)
    assert scripted(line, SELECT, ["6A82"])[1] == [select[:-2]]
    assert scripted(line, SELECT, ["9000", "AB9000"])[1] == [select[:-2], select]
    assert scripted(line, generate, ["AB9000"])[1] == ["80AE4000010100"]
    other = ContactLine()
    scripted(other, SELECT, ["AB9000"])
    assert scripted(other, generate, ["9000"])[1] == ["80AE40000101"]  # not sent twice: it counts transactions


def test_commands_without_data_keep_their_length() -> None:
    assert scripted(ContactLine(), READ, ["6C02", "ABCD9000"]) == ((b"\xab\xcd", 0x9000), ["00B2010C00", "00B2010C02"])
    verify = Command(0x00, 0x82, 0x00, 0x00, bytes(8))
    assert scripted(ContactLine(), verify, ["6300"]) == ((b"", 0x6300), ["0082000008" + "00" * 8])


def test_a_response_that_does_not_end() -> None:
    (_, sw), sent = scripted(ContactLine(), READ, ["AB6101"] * 100)
    assert (sw, len(sent)) == (0x6101, 1 + GET_RESPONSES_MAX)


def test_a_card_that_leaves_is_told_to_the_step_that_waits() -> None:
    def step() -> Exchange[str]:
        try:
            yield from transceive(READ)
        except CardRemoved:
            response = yield from transceive(SELECT)
            return f"{response.sw:04X}"
        return "not told"

    exchange = ContactLine().carry(step())
    assert next(exchange) == READ
    assert exchange.throw(CardRemoved()).ins == SELECT.ins
    with pytest.raises(StopIteration) as finished:
        exchange.send(Response(b"", 0x6A82))
    assert finished.value.value == "6A82"


@pytest.mark.parametrize("protocol", [OverT0, OverT1])
def test_a_whole_transaction(protocol: type[OverT0 | OverT1]) -> None:
    card = protocol(ChipCard())
    asked = insert(card)
    assert isinstance(asked.outcome, OnlineRequest)
    direct = insert(ChipCard())
    assert isinstance(direct.outcome, OnlineRequest)
    assert asked.outcome.card == direct.outcome.card
    assert isinstance(complete(asked.outcome, card, IssuerAnswer(b"00", bytes(8)))[0], Approved)


def test_without_the_line_t0_is_a_dead_end() -> None:
    """Negative control: the rig's T=0 card does need what the line does."""
    assert OverT0(ChipCard()).answer(SELECT).sw == 0x6700
    assert OverT0(ChipCard()).answer(SELECT._replace(le=None)).sw >> 8 == 0x61

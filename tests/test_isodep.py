"""The reader's side of ISO/IEC 14443-4: against scripts, block by block, and against the simulated card's side."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nfc_rig import Asked, answer_to, command

from drivers import isodep
from drivers.isodep import CardLimits, CardSilent, IsoDep, IsoDepError, TransmissionError, activate_a, activate_b
from hwsim.cards.iso14443 import ProximityCard, TypeA, TypeB

FWT_4_S = 4096 * 2**4 / 13_560_000
MARGIN_S = 49_152 / 13_560_000


class Clock:
    """Goes only when somebody sleeps or waits."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float, /) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds


class Script:
    """A peer that follows a script: `>hex` the block it expects, `<hex` what it answers, `!T` silence, `!E` damage.

    After a `>` without an answer the next word must be `!T` or `!E`. Keeps the waits that it was granted.
    """

    def __init__(self, text: str) -> None:
        self.words = text.split()
        self.waits_s: list[float] = []
        self.clock = Clock()

    def link(self, block: bytes, timeout_s: float) -> bytes:
        self.waits_s.append(timeout_s)
        assert self.words, f"one block too many: {block.hex()}"
        assert f">{block.hex()}" == self.words.pop(0)
        answer = self.words.pop(0)
        match answer[0], answer[1:]:
            case "!", "T":
                raise CardSilent
            case "!", "E":
                raise TransmissionError
            case "<", block_hex:
                return bytes.fromhex(block_hex)
        raise AssertionError(f"unreadable script: {answer}")

    def card(self, *, fsc: int = 16, fsdi: int = 8, fwt_s: float = FWT_4_S) -> IsoDep:
        return IsoDep(self.link, self.clock, b"", CardLimits(fsc, fwt_s, 0.0), fsdi)


def exchanged(script: str, request: bytes, **options: int) -> bytes:
    peer = Script(script)
    answer = peer.card(**options).transceive(request)
    assert not peer.words, "the script was not played to its end"
    return answer


# ---- errors and recovery (the command is aa, the answer 9000)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(">02aa <029000", id="undisturbed"),
        pytest.param(">02aa !T >b2 <a3 >02aa <029000", id="command lost"),
        pytest.param(">02aa !T >b2 <029000", id="answer lost"),
        pytest.param(">02aa !E >b2 <029000", id="answer damaged"),
        pytest.param(">02aa < >b2 <029000", id="empty frame"),
        pytest.param(">02aa !T >b2 !E >b2 <029000", id="answer lost twice"),
        pytest.param(">02aa !T >b2 <a3 >02aa !T >b2 <a3 >02aa <029000", id="command lost twice"),
        pytest.param(">02aa <f205 >f205 <029000", id="waiting time extension"),
        pytest.param(">02aa <f201 >f201 <f23b >f23b <029000", id="smallest and largest extension in a row"),
        pytest.param(">02aa <f205 >f205 !T >b2 <f205 >f205 <029000", id="grant lost"),
        pytest.param(">02aa <f205 >f205 !T >b2 <029000", id="answer after grant lost"),
        pytest.param(">02aa !T >b2 <f205 >f205 !T >b2 !T >b2 <029000", id="retransmissions count per block"),
        pytest.param(">02aa <1290 >a3 <0300", id="card chaining"),
        pytest.param(">02aa <12 >a3 <1390 >a2 <0200", id="card chaining with an empty part"),
        pytest.param(">02aa <1290 >a3 !T >a3 <0300", id="part lost"),
        pytest.param(">02aa <1290 >a3 !E >a3 !T >a3 <0300", id="part damaged and lost"),
        pytest.param(">02aa <1290 >a3 <f202 >f202 <0300", id="extension in card chaining"),
        pytest.param(">02aa <1290 >a3 <f202 >f202 !T >a3 <f202 >f202 <0300", id="grant lost in card chaining"),
    ],
)
def test_recovers(script: str) -> None:
    assert exchanged(script, b"\xaa") == bytes.fromhex("9000")


PARTS = ("00" * 13, "11" * 13, "22")  # FSC 16 leaves 13 bytes of INF


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(">12{0} <a2 >13{1} <a3 >02{2} <029000", id="undisturbed"),
        pytest.param(">12{0} !T >b2 <a3 >12{0} <a2 >13{1} <a3 >02{2} <029000", id="first part lost"),
        pytest.param(">12{0} !T >b2 <a2 >13{1} <a3 >02{2} <029000", id="acknowledgement lost"),
        pytest.param(">12{0} <a2 >13{1} <a3 >02{2} !T >b2 <a3 >02{2} <029000", id="last part lost"),
        pytest.param(">12{0} <f202 >f202 <a2 >13{1} <a3 >02{2} <029000", id="extension in reader chaining"),
        pytest.param(">12{0} <a2 >13{1} <a3 >02{2} <1290 >a3 <0300", id="chained both ways"),
    ],
)
def test_chains_a_long_command(script: str) -> None:
    assert exchanged(script.format(*PARTS), bytes.fromhex("".join(PARTS))) == bytes.fromhex("9000")


def test_chained_command_whose_acknowledgement_is_lost_as_in_the_standard() -> None:
    request = bytes.fromhex(PARTS[0] + "22")
    assert exchanged(f">12{PARTS[0]} <a2 >0322 !T >b3 <a2 >0322 <039000", request) == b"\x90\x00"


@pytest.mark.parametrize(("length", "blocks"), [(0, 1), (1, 1), (13, 1), (14, 2), (26, 2), (27, 3)])
def test_parts_fill_the_frame(length: int, blocks: int) -> None:
    sizes: list[int] = []

    def link(block: bytes, _: float) -> bytes:
        sizes.append(len(block) + 2)
        return bytes((0xA2 | block[0] & 1,)) if block[0] & 0x10 else bytes((block[0], 0x90, 0x00))

    IsoDep(link, Clock(), b"", CardLimits(16, FWT_4_S, 0.0), 8).transceive(bytes(length))
    assert len(sizes) == blocks
    assert all(size == 16 for size in sizes[:-1])
    assert sizes[-1] <= 16


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(">02aa !T >b2 !T >b2 !T", id="mute"),
        pytest.param(">02aa !E >b2 !T >b2 !E", id="only damage"),
        pytest.param(">02aa <1290 >a3 !T >a3 !T >a3 !T", id="mute while it chains"),
        pytest.param(">02aa <f205 >f205 !T >b2 !T >b2 !T", id="mute after an extension"),
        pytest.param(">02aa !T >b2 <a3 >02aa !T >b2 <a3 >02aa !T >b2 <a3", id="never takes the command, but says so"),
        # Protocol errors: not one block more.
        pytest.param(">02aa <039000", id="wrong block number"),
        pytest.param(">02aa <1290 >a3 <0200", id="wrong block number while it chains"),
        pytest.param(">02aa <a2", id="acknowledges the last part"),
        pytest.param(">02aa <a3", id="asks for a repetition unasked"),
        pytest.param(">02aa <f205 >f205 <a3", id="asks for a repetition after a grant"),
        pytest.param(">02aa !T >b2 <a2", id="acknowledges in answer to R(NAK)"),
        pytest.param(">02aa <b2", id="R(NAK) from a card"),
        pytest.param(">02aa <b3", id="R(NAK) from a card, other number"),
        pytest.param(">02aa <1290 >a3 <a3", id="R(ACK) while it chains"),
        pytest.param(">02aa <1290 >a3 !T >a3 <a2", id="R(ACK), other number, while it chains"),
        pytest.param(">02aa !T >b2 <a300", id="R(ACK) with INF"),
        pytest.param(">02aa <c2", id="S(DESELECT) from a card"),
        pytest.param(">02aa <0a009000", id="I-block with CID"),
        pytest.param(">02aa <06009000", id="I-block with NAD"),
        pytest.param(">02aa <aa00", id="R(ACK) with CID"),
        pytest.param(">02aa <fa0005", id="S(WTX) with CID"),
        pytest.param(">02aa <00", id="PCB without its fixed bit"),
        pytest.param(">02aa <229000", id="PCB with a reserved bit"),
        pytest.param(">02aa <d00100", id="PPS"),
        pytest.param(">02aa <ff", id="PCB ff"),
        pytest.param(">02aa <f2", id="S(WTX) without WTXM"),
        pytest.param(">02aa <f20500", id="S(WTX) too long"),
        pytest.param(">02aa <f200", id="WTXM 0"),
        pytest.param(">02aa <f23c", id="WTXM 60"),
        pytest.param(">02aa <f23f", id="WTXM 63"),
        pytest.param(">02aa <f245", id="WTXM with a power level"),
        pytest.param(">02aa <f285", id="WTXM with a power level, high bit"),
    ],
)
def test_gives_up_without_another_block(script: str) -> None:
    with pytest.raises(IsoDepError):
        exchanged(script, b"\xaa")


def test_a_command_that_is_not_acknowledged_ends_the_chain() -> None:
    for answer in ("a3", "029000", "129000", "b2", "a200"):
        with pytest.raises(IsoDepError):
            exchanged(f">12{PARTS[0]} <{answer}", bytes(14))


def test_a_block_may_fill_the_readers_frame_and_no_more() -> None:
    assert exchanged(f">02aa <02{'00' * 13}", b"\xaa", fsdi=0) == bytes(13)
    with pytest.raises(IsoDepError, match="longer"):
        exchanged(f">02aa <02{'00' * 14}", b"\xaa", fsdi=0)
    assert len(exchanged(f">02aa <02{'00' * 253}", b"\xaa")) == 253
    with pytest.raises(IsoDepError, match="longer"):
        exchanged(f">02aa <02{'00' * 254}", b"\xaa")


def test_block_numbers_go_on_from_one_apdu_to_the_next() -> None:
    peer = Script(">02aa <029000 >03bb <1390 >a2 <0200 >03cc <039000")
    card = peer.card()
    assert [card.transceive(bytes.fromhex(each)).hex() for each in ("aa", "bb", "cc")] == ["9000"] * 3


def test_after_an_error_the_card_is_not_touched_again() -> None:
    peer = Script(">02aa <ff")
    card = peer.card()
    with pytest.raises(IsoDepError):
        card.transceive(b"\xaa")
    with pytest.raises(IsoDepError, match="ended"):
        card.transceive(b"\xaa")
    card.deselect()


def test_an_error_of_the_reader_passes_through_and_ends_the_activation() -> None:
    def link(block: bytes, timeout_s: float) -> bytes:
        raise OSError("unplugged")

    card = IsoDep(link, Clock(), b"", CardLimits(16, FWT_4_S, 0.0), 8)
    with pytest.raises(OSError, match="unplugged"):
        card.transceive(b"\xaa")
    with pytest.raises(IsoDepError):
        card.transceive(b"\xaa")


@pytest.mark.parametrize("answer", ["<c2", "!T", "!E", "<ff"])
def test_deselect_is_said_once_whatever_comes_back(answer: str) -> None:
    peer = Script(f">c2 {answer}")
    card = peer.card()
    card.deselect()
    card.deselect()
    assert not peer.words
    with pytest.raises(IsoDepError):
        card.transceive(b"\xaa")


# ---- waiting times


def waits(script: str, **options: float) -> list[float]:
    peer = Script(script)
    peer.card(**options).transceive(b"\xaa")  # type: ignore[arg-type]
    assert peer.clock.slept_s == [0.0] + [0.003] * script.count("!"), "at least 3 ms before a retransmission"
    return [wait - MARGIN_S for wait in peer.waits_s]


def test_an_extension_holds_for_the_next_block_only() -> None:
    assert waits(">02aa <f205 >f205 <1290 >a3 <0300") == pytest.approx([FWT_4_S, 5 * FWT_4_S, FWT_4_S])


def test_an_extension_holds_while_its_answer_is_asked_for_again() -> None:
    granted = waits(">02aa <f205 >f205 !T >b2 <f205 >f205 <029000")
    assert granted == pytest.approx([FWT_4_S, 5 * FWT_4_S, 5 * FWT_4_S, 5 * FWT_4_S])


def test_a_repeated_command_has_its_usual_time() -> None:
    granted = waits(">02aa <f205 >f205 !T >b2 <a3 >02aa <029000")
    assert granted == pytest.approx([FWT_4_S, 5 * FWT_4_S, 5 * FWT_4_S, FWT_4_S])


def test_no_extension_exceeds_the_longest_waiting_time() -> None:
    assert waits(">02aa <f23b >f23b <029000", fwt_s=1.0) == pytest.approx([1.0, 4.949], abs=0.001)


# ---- bounds


def endless(answer: Callable[[bytes], bytes], fwt_s: float = FWT_4_S, share_of_fwt: float = 0.0) -> tuple[int, float]:
    """How many blocks a card gets that answers like this for ever, and how long they take together."""
    blocks, clock = 0, Clock()

    def link(block: bytes, timeout_s: float) -> bytes:
        nonlocal blocks
        blocks += 1
        clock.now_s += share_of_fwt * (timeout_s - MARGIN_S)
        return answer(block)

    with pytest.raises(IsoDepError):
        IsoDep(link, clock, b"", CardLimits(256, fwt_s, 0.0), 8).transceive(b"\xaa")
    return blocks, clock.now_s


def test_a_card_cannot_ask_for_time_without_end() -> None:
    blocks, _ = endless(lambda _: b"\xf2\x01")
    assert 100 < blocks <= 257  # slow cards with a short FWT do ask a hundred times


@pytest.mark.parametrize("pcb", [0xF2, 0x12], ids=["extensions", "a chain"])
def test_a_card_cannot_hold_the_terminal_for_minutes(pcb: int) -> None:
    _, seconds = endless(
        lambda block: b"\xf2\x3b" if pcb == 0xF2 else bytes((pcb | block[0] & 1, 0)), fwt_s=4.949, share_of_fwt=1.0
    )
    assert 20 < seconds < 26


@pytest.mark.parametrize("size", [0, 1, 253])
def test_an_answer_without_end_ends(size: int) -> None:
    blocks, _ = endless(lambda block: bytes((0x12 | block[0] & 1,)) + bytes(size))
    assert blocks <= isodep.BLOCKS_MAX


def test_the_longest_answer_is_let_through() -> None:
    part, rest = divmod(isodep.ANSWER_MAX_BYTES, 253)

    def link(block: bytes, _: float) -> bytes:
        nonlocal part
        part -= 1
        number = block[0] & 1
        return bytes((0x12 | number,)) + bytes(253) if part >= 0 else bytes((0x02 | number,)) + bytes(rest)

    card = IsoDep(link, Clock(), b"", CardLimits(256, FWT_4_S, 0.0), 8)
    assert len(card.transceive(b"\xaa")) == 65_538


# ---- activation

DEFAULTS = CardLimits(32, FWT_4_S, 0.0)


@pytest.mark.parametrize(
    ("ats", "fsc", "fwi", "sfgi"),
    [
        ("01", 32, 4, 0),
        ("02 05", 64, 4, 0),
        ("03 15 80", 64, 4, 0),
        ("03 25 71", 64, 7, 1),
        ("03 45 02", 64, 4, 0),
        ("04 35 80 71", 64, 7, 1),
        ("04 68 71 02", 256, 7, 1),
        ("04 58 80 02", 256, 4, 0),
        ("05 78 80 71 02", 256, 7, 1),
        ("08 78 80 71 02 80 31 C1", 256, 7, 1),
        ("04 05 AA BB", 64, 4, 0),  # historical bytes alone
        ("02 00", 16, 4, 0),
        ("02 09", 256, 4, 0),  # FSCI above 8
        ("02 0F", 256, 4, 0),
        ("03 28 00", 256, 0, 0),
        ("03 28 E8", 256, 14, 8),
        ("03 28 F0", 256, 4, 0),  # FWI 15 is reserved
        ("03 28 7F", 256, 7, 0),  # SFGI 15 is reserved
    ],
)
def test_ats(ats: str, fsc: int, fwi: int, sfgi: int) -> None:
    limits = isodep.parse_ats(bytes.fromhex(ats))
    assert limits.frame_size_bytes == fsc
    assert limits.waiting_time_s == pytest.approx(4096 * 2**fwi / 13.56e6)
    assert limits.guard_time_s == pytest.approx((4096 + 384) * 2**sfgi / 13.56e6 if sfgi else 0)


def test_waiting_times_as_published() -> None:
    published_ms = {0: 0.302, 4: 4.83, 7: 38.7, 8: 77.3, 14: 4949}
    for fwi, expected_ms in published_ms.items():
        limits = isodep.parse_ats(bytes((3, 0x28, fwi << 4)))
        assert limits.waiting_time_s * 1000 == pytest.approx(expected_ms, rel=0.002)


@pytest.mark.parametrize(
    "ats", ["", "00", "02", "01 00", "02 78 80", "02 10", "02 78", "03 78 80", "04 78 80 71", "03 68 71", "05 78 80 71"]
)
def test_ats_that_does_not_add_up(ats: str) -> None:
    with pytest.raises(IsoDepError, match="ATS"):
        isodep.parse_ats(bytes.fromhex(ats))


ATQB = bytes.fromhex("50 08112233 00000000 00 81 71".replace(" ", ""))


@pytest.mark.parametrize(
    ("info", "limits"),
    [
        ("008171", CardLimits(256, 4096 * 2**7 / 13.56e6, 0.0)),
        ("000141", CardLimits(16, FWT_4_S, 0.0)),
        ("00F1F0", CardLimits(256, FWT_4_S, 0.0)),
        ("00814010", CardLimits(256, FWT_4_S, 2 * 4480 / 13.56e6)),
        ("008140F0", CardLimits(256, FWT_4_S, 0.0)),
    ],
)
def test_atqb(info: str, limits: CardLimits) -> None:
    parsed = isodep.parse_atqb(ATQB[:9] + bytes.fromhex(info))
    assert parsed.frame_size_bytes == limits.frame_size_bytes
    assert parsed.waiting_time_s == pytest.approx(limits.waiting_time_s)
    assert parsed.guard_time_s == pytest.approx(limits.guard_time_s)


@pytest.mark.parametrize(
    "atqb", [b"", ATQB[:11], ATQB + b"\0\0", b"\x51" + ATQB[1:], ATQB[:10] + b"\x80\x71", ATQB[:10] + b"\x89\x71"]
)
def test_atqb_of_a_card_that_is_none_of_ours(atqb: bytes) -> None:
    peer = Script("")
    with pytest.raises(IsoDepError, match="ATQB"):
        activate_b(peer.link, peer.clock, atqb)


def test_type_a_is_activated_by_rats() -> None:
    peer = Script(">e080 <0578807102 >02aa <029000")
    card = activate_a(peer.link, peer.clock)
    assert card.activation == bytes.fromhex("0578807102")
    assert card.transceive(b"\xaa") == b"\x90\x00"
    assert peer.waits_s[0] == pytest.approx(71_680 / 13.56e6)
    assert peer.clock.slept_s == pytest.approx([2 * 4480 / 13.56e6]), "SFGT before the first block"


def test_type_b_is_activated_by_attrib() -> None:
    peer = Script(">1d0811223300080100 <10 >02aa <029000")
    card = activate_b(peer.link, peer.clock, ATQB)
    assert card.activation == ATQB
    assert card.transceive(b"\xaa") == b"\x90\x00"
    assert peer.waits_s[0] == pytest.approx(4096 * 2**7 / 13.56e6 + MARGIN_S)


def test_activation_announces_the_readers_frame_size() -> None:
    peer = Script(">e000 <01 >1d0811223300000100 <00")
    activate_a(peer.link, peer.clock, fsdi=0)
    activate_b(peer.link, peer.clock, ATQB, fsdi=0)


def test_activation_is_tried_three_times_on_silence() -> None:
    activate_a(Script(">e080 !T >e080 !T >e080 <01").link, Clock())
    for script in (">e080 !T >e080 !T >e080 !T", ">e080 !E", ">e080 <02", ">e080 <"):
        peer = Script(script)
        with pytest.raises(IsoDepError):
            activate_a(peer.link, Clock())
        assert not peer.words


@pytest.mark.parametrize("answer", ["<", "<01", "<0000", "!E"])
def test_answer_to_attrib_must_be_one_byte_with_cid_0(answer: str) -> None:
    with pytest.raises(IsoDepError):
        activate_b(Script(f">1d0811223300080100 {answer}").link, Clock(), ATQB)


# ---- against the simulated card


class Air:
    """Between reader and card: each exchange may be disturbed. Past the plan, everything goes through."""

    def __init__(self, card: ProximityCard, plan: Sequence[str] = ()) -> None:
        self.card = card
        self.plan = list(plan)
        card.power(True)
        if isinstance(card.radio, TypeA):
            card.request_a(wake_up=True)
            card.select()

    def activate(self, fsdi: int = 8) -> IsoDep:
        if isinstance(self.card.radio, TypeA):
            return activate_a(self.link, Clock(), fsdi=fsdi)
        atqb = self.link(bytes.fromhex("050008"), 1.0)
        return activate_b(self.link, Clock(), atqb, fsdi=fsdi)

    def link(self, block: bytes, timeout_s: float) -> bytes:
        fate = self.plan.pop(0) if self.plan else "passes"
        if fate == "command lost":
            raise CardSilent
        reply = self.card.receive(block)
        if reply is None or fate == "answer lost" or reply.after_s > timeout_s:
            raise CardSilent
        if fate == "answer damaged":
            raise TransmissionError
        return reply.frame


@pytest.mark.parametrize("radio", [TypeA, TypeB])
@pytest.mark.parametrize("fsci", range(9))
@pytest.mark.parametrize("fsdi", [0, 1, 5, 8])
def test_every_frame_size_both_ways(radio: type[TypeA] | type[TypeB], fsci: int, fsdi: int) -> None:
    application = Asked()
    card = Air(ProximityCard(application, radio(fsci=fsci, fwi=4), chain_extensions=(2, 5))).activate(fsdi)
    requests = [command(length, length) for length in (0, 1, 2, 11, 12, 13, 14, 26, 27, 251, 252, 253, 254, 509, 700)]
    for request in requests:
        assert card.transceive(request) == answer_to(request)
    assert application.executed == requests


def test_a_card_uses_the_time_it_was_granted() -> None:
    """So a reader that grants less hears silence; the one that grants enough never does."""
    card = ProximityCard(Asked(), TypeA(fwi=8), extensions={1: (10, 59)})

    def silences(granted_at_most_s: float) -> int:
        air = Air(card)
        count = 0

        def link(block: bytes, timeout_s: float) -> bytes:
            nonlocal count
            try:
                return air.link(block, min(timeout_s, granted_at_most_s))
            except CardSilent:
                count += 1
                raise

        assert activate_a(link, Clock()).transceive(command(3)) == answer_to(command(3))
        return count

    assert silences(granted_at_most_s=5.0) == 0
    assert silences(granted_at_most_s=0.1) == 2


FATES = ["passes", "command lost", "answer lost", "answer damaged"]


@settings(max_examples=300, deadline=None)
@given(
    plan=st.lists(st.sampled_from(FATES), max_size=40),
    request=st.builds(command, st.integers(0, 60), st.integers(0, 60)),
    extensions=st.lists(st.integers(1, 59), max_size=2).map(tuple),
    typed=st.sampled_from([TypeA(fsci=0, fwi=3), TypeB(fsci=1, fwi=3)]),
)
@example(plan=["answer lost"], request=command(5), extensions=(), typed=TypeA(fsci=0, fwi=3))
def test_whatever_is_lost_a_command_is_executed_once_or_the_card_is_lost(
    plan: list[str], request: bytes, extensions: tuple[int, ...], typed: TypeA | TypeB
) -> None:
    application = Asked()
    air = Air(ProximityCard(application, typed, extensions={1: extensions}, chain_extensions=extensions))
    card = air.activate(fsdi=0)
    air.plan = list(plan)
    disturbed = sum(fate != "passes" for fate in plan)
    try:
        assert card.transceive(request) == answer_to(request)
        assert application.executed == [request]
    except IsoDepError:
        assert disturbed > 2, "two failures are never the end"
        assert application.executed in ([], [request])


# ---- arbitrary bytes


@settings(max_examples=500, deadline=None)
@given(
    answers=st.lists(
        st.one_of(
            st.binary(max_size=20),
            st.binary(max_size=300),
            st.builds(
                lambda pcb, inf: bytes((pcb,)) + inf,
                st.sampled_from([0x02, 0x03, 0x12, 0x13, 0xA2, 0xA3, 0xB2, 0xF2, 0xC2]),
                st.binary(max_size=3),
            ),
        ),
        min_size=1,
        max_size=30,
    ),
    request=st.binary(max_size=60),
    first=st.sampled_from(["ats", "atqb", "valid"]),
)
def test_arbitrary_bytes_never_raise_anything_else_and_never_loop(
    answers: list[bytes], request: bytes, first: str
) -> None:
    count = 0

    def link(block: bytes, timeout_s: float) -> bytes:
        nonlocal count
        count += 1
        assert 0 < timeout_s < 6
        assert count < 4 * isodep.BLOCKS_MAX
        return answers[count % len(answers)]

    try:
        match first:
            case "ats":
                card = activate_a(link, Clock())
            case "atqb":
                card = activate_b(link, Clock(), answers[0])
            case _:
                card = IsoDep(link, Clock(), b"", DEFAULTS, 8)
        for _ in range(3):
            assert isinstance(card.transceive(request), bytes)
    except IsoDepError as error:
        assert not re.search(r"[0-9A-F]{6}", str(error)), "no card data in messages"

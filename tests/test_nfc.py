"""The contactless reader end to end: `Pn532Reader`, the real nfcpy and pyserial, a pty, the simulated chip and card."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from nfc_rig import UNDISTURBED, Asked, Bench, Failing, answer_to, command, simulated_reader

from drivers.interfaces import (
    CardChannel,
    CardCollision,
    CardLost,
    CardReader,
    Interface,
    ReaderFault,
    ReaderMissing,
)
from drivers.nfc import Pn532Reader
from hwsim.cards.iso14443 import ProximityCard, TypeA, TypeB
from hwsim.pn532 import Disturbance

SOON_MS = 2000


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with simulated_reader(tmp_path_factory.mktemp("dev") / "reader") as bench:
        yield bench


@pytest.fixture
def bench(process: Bench) -> Iterator[Bench]:
    yield process
    process.remove()
    process.call("behave")
    process.call("replug")


@pytest.fixture
def reader(bench: Bench) -> Iterator[CardReader]:
    reader: CardReader = Pn532Reader(bench.path)
    reader.open()
    yield reader
    reader.close()


def card(radio: TypeA | TypeB = TypeA(), **options: object) -> ProximityCard:  # noqa: B008 - frozen
    return ProximityCard(Asked(), radio, **options)  # type: ignore[arg-type]


def tap(reader: CardReader, bench: Bench, card: ProximityCard, disturbance: Disturbance = UNDISTURBED) -> CardChannel:
    bench.remove()
    bench.present(card, disturbance)
    channel = reader.wait_for_card(SOON_MS)
    assert channel is not None
    return channel


def works(reader: CardReader, bench: Bench) -> None:
    """The proof that nothing is left over: a whole tap, card away at its end."""
    channel = tap(reader, bench, card())
    for request in (command(0), command(300, 260)):
        assert channel.transmit(request) == answer_to(request)
    channel.close()
    bench.remove()
    assert reader.wait_for_removal(SOON_MS)


# ---- taps


def test_says_what_it_is(reader: CardReader, bench: Bench) -> None:
    assert reader.name == f"PN532 on {bench.path}"
    assert reader.interface is Interface.CONTACTLESS


def test_no_card(reader: CardReader) -> None:
    started_s = time.monotonic()
    assert reader.wait_for_card(100) is None
    assert 0.1 <= time.monotonic() - started_s < 1
    assert reader.wait_for_card(0) is None
    assert reader.wait_for_removal(SOON_MS)


RADIOS = [
    pytest.param(TypeA(), "0578807000", id="A"),
    pytest.param(TypeA(ats=b"\x01", fsci=2, fwi=4), "01", id="A, TL only"),
    pytest.param(TypeA(ats=bytes.fromhex("0205"), fsci=5, fwi=4), "0205", id="A, FSCI only"),
    pytest.param(TypeA(fsci=0, historical=b"\x80\x31"), "07708070008031", id="A, FSC 16"),
    pytest.param(TypeA(uid=bytes(range(1, 8)), atqa=b"\x00\x44", fsci=3), "0573807000", id="A, UID of 7 bytes"),
    pytest.param(TypeA(uid=bytes(range(10)), sak=0x28, sfgi=1), "0578807100", id="A, with a MIFARE bit"),
    pytest.param(TypeB(), "500811223300000000008170", id="B"),
    pytest.param(TypeB(fsci=0, sfgi=1), "50081122330000000000017010", id="B, FSC 16, extended ATQB"),
]


@pytest.mark.parametrize(("radio", "activation"), RADIOS)
def test_apdus_of_every_size_both_ways(reader: CardReader, bench: Bench, radio: TypeA | TypeB, activation: str) -> None:
    channel = tap(reader, bench, card(radio))
    assert channel.interface is Interface.CONTACTLESS
    assert channel.activation.hex() == activation
    requests = [command(size, size) for size in (0, 1, 12, 13, 14, 60, 61, 62, 250, 251, 252, 253, 254, 300, 700)]
    for request in requests:
        assert channel.transmit(request) == answer_to(request)
    assert bench.executed() == requests


def test_the_field_is_off_but_for_a_card_in_use(reader: CardReader, bench: Bench) -> None:
    def field_on() -> bool:
        return bool(bench.call("field_on"))

    assert reader.wait_for_card(0) is None
    assert not field_on()
    channel = tap(reader, bench, card())
    assert field_on(), "a selected card needs it"
    channel.close()
    assert not field_on()
    tap(reader, bench, card(), Disturbance(mute_from_frame=3))
    assert not reader.wait_for_removal(0)
    assert not field_on()
    bench.present(card(OTHER))
    with pytest.raises(CardCollision):
        reader.wait_for_card(0)
    assert not field_on()
    channel = tap(reader, bench, card(), Disturbance(mute_from_frame=3))
    with pytest.raises(CardLost):
        channel.transmit(command(1))
    assert not field_on()
    tap(reader, bench, card())
    reader.close()
    assert not field_on()


@pytest.mark.parametrize("radio", [TypeA(fsci=0), TypeB(fsci=0)], ids="AB")
def test_extensions_everywhere(reader: CardReader, bench: Bench, radio: TypeA | TypeB) -> None:
    channel = tap(reader, bench, card(radio, extensions={1: (5,), 2: (1, 59, 3)}, chain_extensions=(2,)))
    for request in (command(2), command(300, 40)):
        assert channel.transmit(request) == answer_to(request)


def test_lost_and_damaged_frames_are_made_up_for(reader: CardReader, bench: Bench) -> None:
    # 1, 2: RATS and ATS. 3..10: a command of three parts and its answer of two, when nothing is disturbed.
    request = command(16, 30)
    for number in range(3, 13):
        for fault in ({"lost_frames": frozenset({number})}, {"damaged_frames": frozenset({number})}):
            channel = tap(reader, bench, card(TypeA(fsci=0)), Disturbance(**fault))  # type: ignore[arg-type]
            assert channel.transmit(request) == answer_to(request)
            assert bench.executed() == [request], "once"


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_card_is_read_right_or_lost(reader: CardReader, bench: Bench, seed: int) -> None:
    bench.present(card(TypeA(fsci=0)), Disturbance(random_errors=0.15, seed=seed))
    try:
        channel = reader.wait_for_card(SOON_MS)
        assert channel is not None
        for size in range(10, 100, 10):
            assert channel.transmit(command(size, size)) == answer_to(command(size, size))
    except CardLost:
        pass
    works(reader, bench)


@pytest.mark.parametrize("radio", [TypeA(fsci=0), TypeB(fsci=0)], ids="AB")
def test_a_card_pulled_at_any_frame_is_lost_and_the_next_tap_works(
    reader: CardReader, bench: Bench, radio: TypeA | TypeB
) -> None:
    request, frames, channel = command(300, 30), 0, None
    while True:
        frames += 1
        bench.remove()
        bench.present(card(radio, extensions={1: (2,)}), Disturbance(pulled_at_frame=frames))
        try:
            channel = reader.wait_for_card(0)
            if channel is not None:
                channel.transmit(request)
                break
        except CardLost:
            continue
        assert radio == TypeB(fsci=0), "only a Type B card's selection goes through frames that are counted"
    # Activation 2 (B: 3 exchanges more), command 3 parts, one extension, answer 2 parts: two frames each.
    assert frames == (2 if isinstance(radio, TypeA) else 6) + 2 * (3 + 1 + 1) + 1
    assert channel is not None
    channel.close()
    works(reader, bench)


def test_a_lost_card_stays_lost_until_it_is_presented_again(reader: CardReader, bench: Bench) -> None:
    channel = tap(reader, bench, card(), Disturbance(pulled_after_apdu=1))
    assert channel.transmit(command(1)) == answer_to(command(1))
    with pytest.raises(CardLost):
        channel.transmit(command(2))
    bench.present(card())
    with pytest.raises(CardLost, match="no longer in the field"):
        channel.transmit(command(2))
    channel.close()
    assert bench.executed() == []
    works(reader, bench)


def test_torn(reader: CardReader, bench: Bench) -> None:
    channel = tap(reader, bench, card(), Disturbance(torn_at_apdu=2))
    assert channel.transmit(command(1)) == answer_to(command(1))
    with pytest.raises(CardLost):
        channel.transmit(command(2))
    assert bench.executed() == [command(1), command(2)]


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(ProximityCard(Asked(), TypeA(ats=b"")), id="empty ATS"),
        pytest.param(ProximityCard(Asked(), TypeA(ats=b"\x05\x78\x80")), id="ATS cut short"),
        pytest.param(ProximityCard(Asked(), TypeB(protocol_type=0x00)), id="B, another protocol"),
    ],
)
def test_a_card_that_cannot_be_activated(reader: CardReader, bench: Bench, odd: ProximityCard) -> None:
    bench.present(odd)
    with pytest.raises(CardLost):
        reader.wait_for_card(SOON_MS)
    works(reader, bench)


@pytest.mark.parametrize("mute_from_frame", [1, 3, 4])
def test_a_mute_card(reader: CardReader, bench: Bench, mute_from_frame: int) -> None:
    bench.present(card(), Disturbance(mute_from_frame=mute_from_frame))
    with pytest.raises(CardLost):
        (reader.wait_for_card(SOON_MS) or pytest.fail("not seen")).transmit(command(1))
    works(reader, bench)


def test_a_card_model_with_a_bug(reader: CardReader, bench: Bench) -> None:
    channel = tap(reader, bench, ProximityCard(Failing()))
    with pytest.raises(CardLost):
        channel.transmit(command(1))
    works(reader, bench)


class TooShort(Asked):
    def apdu(self, command: bytes) -> bytes:
        return b"\x90"


def test_an_answer_without_a_status_word(reader: CardReader, bench: Bench) -> None:
    channel = tap(reader, bench, ProximityCard(TooShort()))
    with pytest.raises(CardLost, match="status word"):
        channel.transmit(command(1))


def test_a_card_that_is_no_payment_card_is_not_seen(reader: CardReader, bench: Bench) -> None:
    bench.present(card(TypeA(sak=0x08)))
    assert reader.wait_for_card(50) is None
    assert not reader.wait_for_removal(50)
    works(reader, bench)


OTHER = TypeA(uid=bytes.fromhex("08998877"))


@pytest.mark.parametrize(
    "radios",
    [
        (TypeA(), OTHER),
        (TypeB(), TypeB(pupi=bytes.fromhex("08998877"))),
        (TypeA(), TypeB()),
        (TypeA(sak=0x08), OTHER),
        (TypeA(), OTHER, TypeB()),
    ],
)
def test_collision(reader: CardReader, bench: Bench, radios: tuple[TypeA | TypeB, ...]) -> None:
    for radio in radios:
        bench.present(card(radio))
    with pytest.raises(CardCollision):
        reader.wait_for_card(SOON_MS)
    assert not reader.wait_for_removal(0)
    bench.remove()
    assert reader.wait_for_removal(SOON_MS)
    works(reader, bench)


def test_removal(reader: CardReader, bench: Bench) -> None:
    channel = tap(reader, bench, card())
    started_s = time.monotonic()
    assert not reader.wait_for_removal(100)
    assert 0.1 <= time.monotonic() - started_s < 1
    with pytest.raises(CardLost):
        channel.transmit(command(1))
    bench.remove()
    assert reader.wait_for_removal(SOON_MS)


def test_closing_the_channel_powers_the_card_off(reader: CardReader, bench: Bench) -> None:
    channel = tap(reader, bench, card())
    channel.close()
    channel.close()
    with pytest.raises(CardLost):
        channel.transmit(command(1))
    again = reader.wait_for_card(SOON_MS)
    assert again is not None
    assert again.transmit(command(1)) == answer_to(command(1))


def test_waits_beyond_the_chips_timer(reader: CardReader, bench: Bench) -> None:
    """59 x 77 ms is 4.6 s, of which the card takes 4.1; nfcpy and the chip's timer end at 3.3 s."""
    # Frames: 1, 2 activation, 3, 4 command and S(WTX), 5, 6 its grant and the answer. A seventh would ask again.
    channel = tap(reader, bench, card(TypeA(fwi=8), extensions={1: (59,)}), Disturbance(pulled_at_frame=7))
    assert channel.transmit(command(1)) == answer_to(command(1))
    assert bench.executed() == [command(1)]


def test_silence_beyond_the_chips_timer_is_cancelled_by_the_host(reader: CardReader, bench: Bench) -> None:
    # 43 x 77 ms = 3.32 s; the answer is lost.
    channel = tap(reader, bench, card(TypeA(fwi=8), extensions={1: (43,)}), Disturbance(lost_frames=frozenset({6})))
    started_s = time.monotonic()
    assert channel.transmit(command(1)) == answer_to(command(1))
    assert 3.3 < time.monotonic() - started_s < 5


# ---- faults of the reader


def test_missing_at_open(tmp_path: Path) -> None:
    with pytest.raises(ReaderMissing, match="no such device"):
        Pn532Reader(str(tmp_path / "nothing")).open()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ReaderMissing, match="not a serial device"):
        Pn532Reader(str(tmp_path / "file")).open()
    with pytest.raises(ReaderMissing, match="no PN532 answers"):
        Pn532Reader("/dev/null").open()


def test_a_port_without_a_reader(tmp_path: Path) -> None:
    master, slave = os.openpty()
    with pytest.raises(ReaderMissing, match="no PN532 answers"):
        Pn532Reader(os.ttyname(slave)).open()
    os.close(master)
    os.close(slave)


def test_in_use_by_another_program(reader: CardReader, bench: Bench) -> None:
    with pytest.raises(ReaderFault, match="in use"):
        Pn532Reader(bench.path).open()
    works(reader, bench)


def test_not_open(bench: Bench) -> None:
    reader = Pn532Reader(bench.path)
    for use in (lambda: reader.wait_for_card(0), lambda: reader.wait_for_removal(0)):
        with pytest.raises(ReaderFault, match="not open"):
            use()
    reader.close()


def test_open_and_close_as_often_as_you_like(reader: CardReader, bench: Bench) -> None:
    reader.open()
    works(reader, bench)
    reader.close()
    reader.close()
    reader.open()
    works(reader, bench)


def test_unplugged_and_plugged_in_again(reader: CardReader, bench: Bench) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for moment in ("waiting", "transmitting", "removing", "closing"):
        channel = tap(reader, bench, card())
        bench.call("unplug")
        match moment:
            case "waiting":
                with pytest.raises(ReaderMissing, match="unplugged"):
                    reader.wait_for_card(SOON_MS)
            case "transmitting":
                with pytest.raises(ReaderMissing, match="unplugged"):
                    channel.transmit(command(1))
                with pytest.raises(CardLost):
                    channel.transmit(command(1))
            case "removing":
                with pytest.raises(ReaderMissing, match="unplugged"):
                    reader.wait_for_removal(SOON_MS)
            case _:
                channel.close()
                reader.close()
        with pytest.raises(ReaderMissing, match="no such device"):
            reader.open()
        bench.call("replug")
        reader.open()
        works(reader, bench)
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "no descriptor is left behind"


def test_the_chip_is_at_its_fast_rate_after_the_process_was_killed(bench: Bench) -> None:
    killed = Pn532Reader(bench.path)
    killed.open()
    line = killed._line
    assert line is not None
    line.close()  # the descriptor, and nothing said to the chip: what the kernel does for the dead
    survivor = Pn532Reader(bench.path)
    survivor.open()
    works(survivor, bench)
    survivor.close()


@pytest.mark.parametrize("moment", ["waiting", "transmitting", "removing", "closing"])
def test_wedged(reader: CardReader, bench: Bench, moment: str) -> None:
    channel = tap(reader, bench, card())
    bench.call("wedge")
    started_s = time.monotonic()
    match moment:
        case "waiting":
            with pytest.raises(ReaderFault, match="does not answer"):
                reader.wait_for_card(SOON_MS)
        case "transmitting":
            with pytest.raises(ReaderFault, match="does not answer"):
                channel.transmit(command(1))
        case "removing":
            with pytest.raises(ReaderFault, match="does not answer"):
                reader.wait_for_removal(SOON_MS)
        case _:
            channel.close()
            reader.close()
    with pytest.raises(ReaderMissing, match="no PN532 answers"):
        reader.open()
    assert time.monotonic() - started_s < 3
    bench.call("behave")
    reader.open()
    works(reader, bench)


ACK = "0000ff00ff00"
NONSENSE = [
    "00",
    "000000",
    "0000ff",
    "ff" * 300,
    "0000ffffffffff02",
    ACK,
    ACK + "00",
    ACK + "0000ff00ff00",
    ACK + "0000ff01ff7f8100",
    ACK + "0000ff02fed5092200",
    ACK + "0000ff02fed5072400",
    ACK + "0000ff03fdd54bffe100",
    ACK + "0000ff02fed54be000",
    ACK + "0000ffffff0000000000",
    ACK + "0000ff01ffd52b00",
    ACK + "0000ff00000000",
]
_random = Random(14443)
NONSENSE += [_random.randbytes(_random.randrange(1, 40)).hex() for _ in range(2)]
NONSENSE += [ACK + _random.randbytes(_random.randrange(1, 40)).hex() for _ in range(2)]


def test_nonsense_from_the_reader_is_a_fault_and_nothing_else(reader: CardReader, bench: Bench) -> None:
    for number, nonsense in enumerate(NONSENSE):
        channel = tap(reader, bench, card())
        bench.call("babble", bytes.fromhex(nonsense))
        with pytest.raises(ReaderFault):
            match number % 3:
                case 0:
                    channel.transmit(command(1))
                case 1:
                    reader.wait_for_card(0)
                case _:
                    reader.wait_for_removal(0)
        if number < 4:
            with pytest.raises(ReaderMissing):
                reader.open()
        bench.call("behave")
        taken_up_again(reader)
    works(reader, bench)


def taken_up_again(reader: CardReader) -> None:
    """As the terminal does it: now and then. nfcpy waits 100 ms for an ACK, which a busy machine may miss."""
    for _ in range(4):
        with contextlib.suppress(ReaderFault):
            reader.open()
            return
    reader.open()


# ---- discretion


def test_no_card_data_in_logs_or_messages(reader: CardReader, bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(0):
        logging.getLogger().setLevel(1)
        secret = bytes.fromhex("0020cafe4711cafe4711")
        channel = tap(reader, bench, card(), Disturbance(pulled_after_apdu=1))
        response = channel.transmit(secret)
        with pytest.raises(CardLost) as lost:
            channel.transmit(secret)
        bench.call("wedge")
        with pytest.raises(ReaderFault):
            reader.wait_for_card(0)
    told = caplog.text + str(lost.value) + repr(lost.value.__cause__) + repr(channel)
    assert "cafe" not in told.lower()
    assert response[:4].hex() not in told.lower()
    assert not [record for record in caplog.records if record.name.startswith("nfc")]

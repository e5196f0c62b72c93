"""The simulated PN532 on its wire: host frames in, host frames out, without nfcpy in between."""

from __future__ import annotations

import logging
import os
import select
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nfc_rig import Asked, Failing, answer_to, command

from hwsim.cards.iso14443 import ProximityCard, TypeA, TypeB
from hwsim.pn532 import Disturbance, Pn532

ACK = "0000ff00ff00"
LIST_A, LIST_B, FIELD_OFF = "4a0100", "4a010300", "320102"
NOBODY, LISTED_A = "00", "01010004200408112233"


class Host:
    """The other end of the line."""

    def __init__(self, pn532: Pn532) -> None:
        self.pn532 = pn532
        self.line = os.open(pn532.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        self.set_speed(termios.B115200)

    def set_speed(self, speed: int) -> None:
        settings = termios.tcgetattr(self.line)
        settings[4] = settings[5] = speed
        termios.tcsetattr(self.line, termios.TCSANOW, settings)

    def write(self, frame_hex: str) -> None:
        os.write(self.line, bytes.fromhex(frame_hex))

    def read(self, size: int = -1, within_s: float = 0.05) -> str:
        """So many bytes (2 s at most), or what comes until the line has been quiet."""
        received, patience_s = b"", 2.0 if size >= 0 else within_s
        while len(received) != size and select.select([self.line], [], [], patience_s)[0]:
            received += os.read(self.line, size - len(received) if size >= 0 else 4096)
        return received.hex()

    def says(self, request_hex: str, answer_hex: str) -> None:
        self.write("0000ff" + request_hex)
        expected = ACK + "0000ff" + answer_hex
        assert self.read(len(expected) // 2) == expected

    def send(self, command_hex: str) -> None:
        """A command (code and data), in a normal frame."""
        body = b"\xd4" + bytes.fromhex(command_hex)
        self.write(f"0000ff{len(body):02x}{-len(body) & 0xFF:02x}{body.hex()}{-sum(body) & 0xFF:02x}00")
        assert self.read(6) == ACK

    def asks(self, command_hex: str) -> str:
        """A command, and what follows the code in its answer; "error" for the error frame."""
        self.send(command_hex)
        head = bytes.fromhex(self.read(5))
        answer = bytes.fromhex(self.read(head[3] + 2))
        if answer[0] == 0x7F:
            return "error"
        assert answer[:2] == bytes((0xD5, int(command_hex[:2], 16) + 1))
        return answer[2:-2].hex()

    def thru(self, frame_hex: str) -> str:
        """InCommunicateThru: status and frame."""
        return self.asks("42" + frame_hex)


@pytest.fixture
def pn532(tmp_path: Path) -> Iterator[Pn532]:
    yield from served(Pn532(tmp_path / "reader", realtime=False))


def served(pn532: Pn532) -> Iterator[Pn532]:
    thread = threading.Thread(target=pn532.serve)
    thread.start()
    yield pn532
    pn532.stop()
    thread.join(5)
    assert not thread.is_alive()
    pn532.close()


@pytest.fixture
def host(pn532: Pn532) -> Iterator[Host]:
    host = Host(pn532)
    yield host
    os.close(host.line)


def test_opening_as_nfcpy_does_it(host: Host) -> None:
    host.write("00" * 10)
    host.says("02fed4022a00", "06fad50332010607e800")
    host.write("00" * 10)
    host.says("05fbd4140100001700", "02fed5151600")
    host.says("03fdd412001a00", "02fed5131800")
    for configuration in ("06fad43202000b0ae300", "04fcd4320400f600", "06fad43205010001f300", "04fcd4320102f700"):
        host.says(configuration, "02fed533f800")
    assert host.asks("08630200630300630540") == ""
    assert host.asks("06630263036305") == "000040"
    host.says("04fcd416b0006600", "03fdd517001400")


def test_line_test_with_the_longest_frame(host: Host) -> None:
    data = "00" + bytes(range(256)).hex() + "000102030405"
    host.says(f"ffff0109f6d400{data}9d00", f"ffff0109f6d501{data}9b00")


def test_a_normal_frame_of_255_bytes_and_the_first_extended_answer(host: Host) -> None:
    data = bytes(253)
    host.says(f"ff01d400{data.hex()}2c00", f"ffff00ff01d501{data.hex()}2a00")


def test_noise_and_wrong_checksums_are_passed_over(host: Host) -> None:
    host.write("ff00ff0102" + "0000ff02fed4022b00" + "0000ff02fdd4022a00" + "0000ffffff0109f7d400" + "55")
    assert host.read() == ""
    host.says("02fed4022a00", "06fad50332010607e800")


@pytest.mark.parametrize("request_hex", ["400100a4040000", "988c", "32", "3201", "086302", "1210", "4a01", "0001"])
def test_what_is_not_modelled_or_cut_short_meets_the_error_frame(host: Host, request_hex: str) -> None:
    assert host.asks(request_hex) == "error"


def test_polling(host: Host, pn532: Pn532) -> None:
    host.says("04fcd44a0100e100", "03fdd54b00e000")
    host.says("04fcd40663398a00", "03fdd50726fe00")  # the unanswered REQA is still in the FIFO
    pn532.present(ProximityCard(Asked()))
    host.says("04fcd44a0100e100", "0cf4d54b010100042004081122334800")
    pn532.remove()
    assert host.asks(LIST_A) == NOBODY
    pn532.present(ProximityCard(Asked(), TypeB()))
    assert host.asks(LIST_A) == NOBODY
    assert host.asks(LIST_B) == "0101" + "500811223300000000008170" + "0101"
    assert host.asks("4a0101") == NOBODY  # FeliCa


def test_two_cards(host: Host, pn532: Pn532) -> None:
    pn532.present(ProximityCard(Asked()))
    pn532.present(ProximityCard(Asked(), TypeA(uid=bytes.fromhex("08998877"))))
    host.says("04fcd44a0200e000", "15ebd54b020100042004081122330200042004089988777d00")
    assert host.asks("4a0200") == NOBODY, "one is selected, one halted: REQA wakes neither"
    host.asks(FIELD_OFF)
    assert host.asks(LIST_A) == LISTED_A, "after a reset, both are back"


def test_iso_dep_through_the_chip(host: Host, pn532: Pn532) -> None:
    application = Asked()
    pn532.present(ProximityCard(application, TypeA(fsci=8, fwi=7, sfgi=0), extensions={2: (5,)}))
    assert host.asks(LIST_A) == LISTED_A
    assert host.thru("e080") == "00" + "0578807000"
    request = command(7)
    assert host.thru("02" + request.hex()) == "0002" + answer_to(request).hex()
    assert host.thru("03" + request.hex()) == "00f205"
    assert host.thru("f201") == "01", "not what it asked for"
    # The card takes 0.17 s of the time it asked for; the timer stands at 51.2 ms, as after power-on.
    assert host.thru("f205") == "01"
    assert host.thru("b3") == "0003" + answer_to(request).hex()
    assert host.thru("c2") == "00c2"
    assert host.thru("e080") == "01", "deselected, it waits to be woken"
    assert application.executed == [request, request]
    assert application.resets == 1


def test_two_cards_answering_at_once_are_one_damaged_answer(host: Host, pn532: Pn532) -> None:
    for pupi in ("08112233", "89988777"):
        pn532.present(ProximityCard(Asked(), TypeB(pupi=bytes.fromhex(pupi))))
    host.asks("08630203")  # TxMode: Type B
    host.asks("320101")  # field on
    assert host.thru("050008") == "02"


def test_no_field_no_answer(host: Host, pn532: Pn532) -> None:
    pn532.present(ProximityCard(Asked()))
    assert host.thru("e080") == "01"
    assert host.asks(LIST_A) == LISTED_A
    host.asks(FIELD_OFF)
    assert host.thru("e080") == "01"


def test_the_speed_changes_after_the_hosts_ack_and_back_by_replugging(host: Host, pn532: Pn532) -> None:
    host.says("03fdd410071500", "02fed5111a00")
    host.write(ACK)
    host.set_speed(termios.B921600)
    host.says("02fed4022a00", "06fad50332010607e800")
    host.set_speed(termios.B115200)
    host.write("0000ff02fed4022a00")
    assert host.read() == "", "at another speed the chip is deaf"
    os.close(host.line)
    pn532.unplug()
    pn532.replug()
    again = Host(pn532)
    again.says("02fed4022a00", "06fad50332010607e800")
    host.line = again.line


def test_a_bug_in_a_card_model_does_not_end_the_reader(
    host: Host, pn532: Pn532, caplog: pytest.LogCaptureFixture
) -> None:
    pn532.present(ProximityCard(Failing()))
    assert host.asks(LIST_A) == LISTED_A
    host.thru("e080")
    with caplog.at_level(logging.ERROR):
        assert host.thru("02" + command(1).hex()) == "01"
    assert "bug in the card model" in caplog.text
    assert host.thru("b2") == "01", "mute"
    host.asks(FIELD_OFF)
    assert host.asks(LIST_A) == LISTED_A
    assert host.thru("e080").startswith("00")


@pytest.mark.parametrize(
    ("disturbance", "statuses", "executed"),
    [
        (Disturbance(), "00 00 00", 2),
        (Disturbance(lost_frames=frozenset({3})), "00 01 00", 1),
        (Disturbance(lost_frames=frozenset({4})), "00 01 00", 2),
        (Disturbance(damaged_frames=frozenset({3})), "00 01 00", 1),
        (Disturbance(damaged_frames=frozenset({4})), "00 02 00", 2),
        (Disturbance(mute_from_frame=4), "00 01 01", 1),
        (Disturbance(pulled_at_frame=1), "01 01 01", 0),
        (Disturbance(pulled_at_frame=4), "00 01 01", 1),
        (Disturbance(pulled_after_apdu=0), "00 01 01", 0),
        (Disturbance(pulled_after_apdu=1), "00 00 01", 1),
        (Disturbance(torn_at_apdu=1), "00 01 01", 1),
        (Disturbance(torn_at_apdu=2), "00 00 01", 2),
        (Disturbance(random_errors=1.0), "01 01 01", 0),
    ],
)
def test_disturbances(host: Host, pn532: Pn532, disturbance: Disturbance, statuses: str, executed: int) -> None:
    application = Asked()
    pn532.present(ProximityCard(application), disturbance=disturbance)
    assert host.asks(LIST_A) == LISTED_A
    request = command(1).hex()
    assert " ".join(host.thru(frame)[:2] for frame in ("e080", "02" + request, "03" + request)) == statuses
    assert len(application.executed) == executed
    pulled = disturbance.pulled_at_frame or disturbance.torn_at_apdu or disturbance.pulled_after_apdu is not None
    assert bool(pn532.cards) is not bool(pulled)


def test_random_errors_follow_their_seed(host: Host, pn532: Pn532) -> None:
    def run(seed: int) -> list[str]:
        pn532.remove()
        host.asks(FIELD_OFF)
        pn532.present(ProximityCard(Asked()), disturbance=Disturbance(random_errors=0.5, seed=seed))
        assert host.asks(LIST_A) == LISTED_A
        return [host.thru("e080")[:2]] + [host.thru("b2")[:2] for _ in range(30)]

    assert run(1) == run(1) != run(2)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Host]:
    """A reader in real time, waiting 0.41 s at most for a card that takes 0.9 * 5 * 77 ms = 0.35 s."""
    for pn532 in served(Pn532(tmp_path / "reader")):
        host = Host(pn532)
        pn532.present(ProximityCard(Asked(), TypeA(fwi=8), extensions={1: (5,)}))
        assert host.asks(LIST_A) == LISTED_A
        host.asks("32020a0b0d")
        host.thru("e080")
        assert host.thru("02" + command(1).hex()) == "00f205"
        yield host
        os.close(host.line)


def test_in_real_time_a_card_takes_its_time(slow: Host) -> None:
    started_s = time.monotonic()
    assert slow.thru("f205") == "0002" + answer_to(command(1)).hex()
    assert 0.34 < time.monotonic() - started_s < 2


def test_an_ack_cancels_what_is_pending(slow: Host) -> None:
    slow.send("42f205")
    slow.write(ACK)
    assert slow.read(within_s=0.5) == ""
    slow.says("02fed4022a00", "06fad50332010607e800")


def test_a_card_removed_in_thought_never_answers(slow: Host) -> None:
    slow.send("42f205")
    slow.pn532.remove()
    assert slow.read(10) == "0000ff03fdd54301e700"


def test_a_wait_without_limit_ends_only_by_the_hosts_ack(host: Host) -> None:
    host.asks("32020a0b00")
    host.send("42e080")
    assert host.read(within_s=0.2) == ""
    host.write(ACK)
    host.asks("32020a0b0a")
    assert host.thru("e080") == "01"

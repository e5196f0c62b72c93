"""The contact reader end to end: `PcscReader`, the real pyscard, PC/SC library and pcscd, vpcd, the simulated card."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nfc_rig import answer_to, command
from pcsc_rig import T0_ATR, T1_ATR, ContactAsked, Scripted, virtual_reader
from smartcard import scard

from drivers.interfaces import CardLost, CardReader, DriverError, Interface, ReaderFault, ReaderMissing
from drivers.pcsc import PcscChannel, PcscReader
from hwsim.vpcd import READER_NAME, ContactFault, VirtualReader

SOON_MS = 10_000  # pcscd looks into the slot every 0.4 s; the rest is for a busy machine
ROOT = Path(__file__).parents[1]
NOBODY = 65534


@pytest.fixture(scope="module")
def process() -> Iterator[VirtualReader]:
    with virtual_reader() as reader:
        yield reader


@pytest.fixture
def slot(process: VirtualReader) -> Iterator[VirtualReader]:
    yield process
    process.remove()


@pytest.fixture
def reader(slot: VirtualReader) -> Iterator[PcscReader]:
    reader = PcscReader(READER_NAME)
    reader.open()
    assert reader.wait_for_removal(SOON_MS), "what the test before left in"
    yield reader
    reader.close()


def insert(
    reader: PcscReader, slot: VirtualReader, card: ContactAsked, fault: ContactFault | None = None
) -> PcscChannel:
    slot.insert(card, fault=fault or ContactFault())
    channel = reader.wait_for_card(SOON_MS)
    assert channel is not None
    return channel


def works(reader: PcscReader, slot: VirtualReader) -> None:
    """The proof that nothing is left over: a whole insertion, card out at its end."""
    slot.remove()
    assert reader.wait_for_removal(SOON_MS)
    card = ContactAsked(T1_ATR)
    channel = insert(reader, slot, card)
    for request in (command(0), command(300, 260)):
        assert channel.transmit(request) == answer_to(request)
    channel.close()
    assert len(card.executed) == 2
    slot.remove()
    assert reader.wait_for_removal(SOON_MS)


# ---- insertions


def test_says_what_it_is(reader: PcscReader) -> None:
    as_interface: CardReader = reader
    assert as_interface.name == READER_NAME
    assert as_interface.interface is Interface.CONTACT


def test_no_card(reader: PcscReader) -> None:
    started_s = time.monotonic()
    assert reader.wait_for_card(200) is None
    assert 0.2 <= time.monotonic() - started_s < 5
    assert reader.wait_for_card(0) is None
    assert reader.wait_for_removal(0)


@pytest.mark.parametrize(("atr", "protocol"), [(T0_ATR, 0), (T1_ATR, 1)], ids=["T=0", "T=1"])
def test_apdus_of_every_size_both_ways(reader: PcscReader, slot: VirtualReader, atr: bytes, protocol: int) -> None:
    card = ContactAsked(atr)
    channel = insert(reader, slot, card)
    assert channel.interface is Interface.CONTACT
    assert channel.activation == atr
    assert channel.protocol == protocol
    requests = [command(size, max(4, size)) for size in (0, 1, 5, 254, 255, 256, 260, 261, 300, 3000)]
    for request in requests:
        assert channel.transmit(request) == answer_to(request)
    assert card.executed == requests


def test_status_words_go_up_as_they_are(reader: PcscReader, slot: VirtualReader) -> None:
    answers = [bytes.fromhex(answer) for answer in ("6110", "6c0a", "9000", "01026105", "6985")]
    card = Scripted(answers)
    channel = insert(reader, slot, card)
    assert [channel.transmit(command(0)) for _ in answers] == answers
    assert len(card.executed) == len(answers), "nothing was sent on our behalf"


def test_warm_and_cold_reset(reader: PcscReader, slot: VirtualReader) -> None:
    card = ContactAsked(cold_atr=T0_ATR, warm_atr=T1_ATR)
    channel = insert(reader, slot, card)
    assert card.cold_resets == [True]
    assert channel.reset(cold=False) == channel.activation == T1_ATR
    assert channel.protocol == 1
    assert channel.transmit(command(3)) == answer_to(command(3))
    assert channel.reset(cold=True) == channel.activation == T0_ATR
    assert channel.protocol == 0
    assert channel.transmit(command(3)) == answer_to(command(3))
    assert card.cold_resets == [True, False, True]


def test_power_is_off_between_channels(reader: PcscReader, slot: VirtualReader) -> None:
    card = ContactAsked()
    channel = insert(reader, slot, card)
    channel.close()
    with pytest.raises(CardLost):
        channel.transmit(command(0))
    with pytest.raises(CardLost):
        channel.reset(cold=False)
    again = reader.wait_for_card(0)
    assert again is not None, "a card that stays in is seen at once"
    assert card.cold_resets == [True, True]
    with pytest.raises(CardLost):
        channel.transmit(command(0))
    channel.close()
    assert again.transmit(command(1)) == answer_to(command(1)), "the old channel's end is not the new one's"
    assert not reader.wait_for_removal(0)
    with pytest.raises(CardLost):
        again.transmit(command(0))
    reader.close()
    reader.close()
    reader.open()
    assert reader.wait_for_card(0)


def test_removal_is_seen_while_waiting(reader: PcscReader, slot: VirtualReader) -> None:
    insert(reader, slot, ContactAsked())
    timer = threading.Timer(0.3, slot.remove)
    timer.start()
    assert reader.wait_for_removal(SOON_MS)
    assert slot.card is None
    timer.join()


# ---- cards that are lost


@pytest.mark.parametrize("torn", [False, True], ids=["before it executes", "before it answers"])
def test_a_card_pulled_at_any_apdu_is_lost_and_the_next_works(
    reader: PcscReader, slot: VirtualReader, torn: bool
) -> None:
    requests = [command(size) for size in (1, 20, 300)]
    for at in range(1, len(requests) + 1):
        card, answered = ContactAsked(), 0
        fault = ContactFault(torn_at_apdu=at) if torn else ContactFault(pulled_at_apdu=at)
        channel = insert(reader, slot, card, fault)
        with pytest.raises(CardLost):
            for request in requests:
                assert channel.transmit(request) == answer_to(request)
                answered += 1
        with pytest.raises(CardLost, match="no longer in use"):
            channel.transmit(requests[0])
        assert answered == at - 1
        assert card.executed == requests[: at if torn else at - 1]
        slot.remove()
        assert reader.wait_for_removal(SOON_MS)


def test_a_card_pulled_between_apdus(reader: PcscReader, slot: VirtualReader) -> None:
    channel = insert(reader, slot, ContactAsked())
    assert channel.transmit(command(1)) == answer_to(command(1))
    slot.remove()
    with pytest.raises(CardLost):
        channel.transmit(command(1))
    channel = insert(reader, slot, ContactAsked())
    slot.remove()
    time.sleep(0.5)  # so that pcscd knows
    with pytest.raises(CardLost):
        channel.reset(cold=True)


@pytest.mark.parametrize(
    ("card", "fault"),
    [
        pytest.param(ContactAsked(), ContactFault(mute=True), id="the wrong way in"),
        pytest.param(ContactAsked(cold_atr=b""), ContactFault(), id="a dead chip"),
        pytest.param(ContactAsked(cold_atr=b"\x3b"), ContactFault(), id="ATR cut short"),
        pytest.param(ContactAsked(cold_atr=bytes.fromhex("f00dcafe00")), ContactFault(), id="nonsense for an ATR"),
    ],
)
def test_a_card_that_does_not_answer_to_reset(
    reader: PcscReader, slot: VirtualReader, card: ContactAsked, fault: ContactFault
) -> None:
    slot.insert(card, fault=fault)
    with pytest.raises(CardLost, match="chip side"):
        reader.wait_for_card(SOON_MS)
    with pytest.raises(CardLost, match="chip side"):
        reader.wait_for_card(0)
    assert not reader.wait_for_removal(0)
    slot.remove()
    assert reader.wait_for_removal(SOON_MS)


def test_a_card_that_is_mute_after_a_warm_reset(reader: PcscReader, slot: VirtualReader) -> None:
    channel = insert(reader, slot, ContactAsked(warm_atr=b""))
    with pytest.raises(CardLost, match="chip side"):
        channel.reset(cold=False)
    with pytest.raises(CardLost):
        channel.transmit(command(0))
    works(reader, slot)


def test_a_card_that_falls_silent(reader: PcscReader, slot: VirtualReader) -> None:
    channel = insert(reader, slot, ContactAsked(), ContactFault(mute_at_apdu=2))
    assert channel.transmit(command(1)) == answer_to(command(1))
    with pytest.raises(CardLost):
        channel.transmit(command(2))
    with pytest.raises(CardLost):
        channel.transmit(command(3))
    works(reader, slot)


def test_an_answer_without_a_status_word(reader: PcscReader, slot: VirtualReader) -> None:
    channel = insert(reader, slot, Scripted([b"\x90"]))
    with pytest.raises(CardLost, match="status word"):
        channel.transmit(command(1))


def test_a_slow_card_is_waited_for(reader: PcscReader, slot: VirtualReader) -> None:
    channel = insert(reader, slot, ContactAsked(), ContactFault(answer_after_ms=600))
    started_s = time.monotonic()
    assert channel.transmit(command(1)) == answer_to(command(1))
    assert time.monotonic() - started_s >= 0.6


def test_a_card_model_with_a_bug(reader: PcscReader, slot: VirtualReader, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(ContactAsked):
        def apdu(self, command: bytes) -> bytes:
            raise RuntimeError("bug in the card model")

    channel = insert(reader, slot, Failing())
    with pytest.raises(CardLost):
        channel.transmit(command(1))
    assert "the card model failed" in caplog.text


# ---- the reader


@pytest.mark.parametrize("name", [READER_NAME, "icc 00 00", "ICC 00 00"])
def test_a_reader_is_found_by_a_part_of_its_name(slot: VirtualReader, name: str) -> None:
    reader = PcscReader(name)
    assert reader.name == name
    reader.open()
    assert reader.name == READER_NAME
    reader.close()


def test_no_such_reader(slot: VirtualReader) -> None:
    reader = PcscReader("Some Other Reader")
    with pytest.raises(ReaderMissing, match=f'no chip card reader "Some Other Reader".*{READER_NAME}'):
        reader.open()


@pytest.mark.parametrize("name", [None, "simulated"])
def test_several_readers_and_none_named(slot: VirtualReader, name: str | None) -> None:
    with pytest.raises(ReaderMissing, match=f"several.*{READER_NAME}"):
        PcscReader(name).open()


def test_the_only_reader_needs_no_name(slot: VirtualReader, monkeypatch: pytest.MonkeyPatch) -> None:
    # vpcd always has two slots.
    monkeypatch.setattr(scard, "SCardListReaders", lambda *_: [scard.SCARD_S_SUCCESS, [READER_NAME]])
    reader = PcscReader(None)
    reader.open()
    assert reader.name == READER_NAME
    assert reader.wait_for_removal(SOON_MS), "pcscd may not have seen yet that the card of the test before is out"
    reader.close()


def test_another_program_holds_the_card(reader: PcscReader, slot: VirtualReader) -> None:
    slot.insert(ContactAsked())
    while not reader.wait_for_card(SOON_MS):
        pass
    reader.close()
    _, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_USER)
    result, other, _ = scard.SCardConnect(context, READER_NAME, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T0)
    assert result == scard.SCARD_S_SUCCESS
    reader.open()
    with pytest.raises(ReaderFault, match="another program holds the card"):
        reader.wait_for_card(SOON_MS)
    scard.SCardDisconnect(other, scard.SCARD_UNPOWER_CARD)
    scard.SCardReleaseContext(context)
    reader.open()
    channel = reader.wait_for_card(SOON_MS)
    assert channel is not None
    assert channel.transmit(command(1)) == answer_to(command(1))


def test_a_card_in_use_is_ours_alone(reader: PcscReader, slot: VirtualReader) -> None:
    insert(reader, slot, ContactAsked())
    _, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_USER)
    result, *_ = scard.SCardConnect(context, READER_NAME, scard.SCARD_SHARE_SHARED, scard.SCARD_PROTOCOL_T0)
    scard.SCardReleaseContext(context)
    assert result == scard.SCARD_E_SHARING_VIOLATION


def test_pcscd_killed_and_back(reader: PcscReader, slot: VirtualReader, monkeypatch: pytest.MonkeyPatch) -> None:
    polling, drawing = PcscReader(READER_NAME), PcscReader(READER_NAME)
    polling.open()
    drawing.open()
    channel = insert(reader, slot, ContactAsked())
    slot.kill_daemon()
    with pytest.raises(ReaderFault, match="pcscd"):
        channel.reset(cold=True)
    with pytest.raises(ReaderFault, match="pcscd"):
        polling.wait_for_card(0)
    with pytest.raises(ReaderFault, match="pcscd"):
        drawing.wait_for_removal(SOON_MS)
    channel.close()
    for each in (reader, polling, drawing):
        with pytest.raises(ReaderFault, match="not open"):
            each.wait_for_card(0)
        with pytest.raises(ReaderFault, match="does not run"):
            each.open()
    with monkeypatch.context() as patched, pytest.raises(ReaderFault, match="refuses this user"):
        patched.setattr(os, "access", lambda *_: False)
        reader.open()
    slot.restart_daemon()
    for each in (polling, drawing, reader):
        each.open()
    assert reader.wait_for_card(SOON_MS), "the card is still in"
    works(reader, slot)


@pytest.mark.parametrize("moment", ["transmitting", "waiting"])
def test_pcscd_killed_in_the_middle(reader: PcscReader, slot: VirtualReader, moment: str) -> None:
    killer = threading.Timer(0.3, slot.kill_daemon)
    if moment == "transmitting":
        channel = insert(reader, slot, ContactAsked(), ContactFault(answer_after_ms=1000))
        killer.start()
        with pytest.raises(ReaderFault, match="pcscd"):
            channel.transmit(command(1))
    else:
        killer.start()
        with pytest.raises(ReaderFault, match="pcscd"):
            reader.wait_for_card(SOON_MS)
    killer.join()
    slot.restart_daemon()
    reader.open()
    works(reader, slot)


def test_pcscd_restarted_unnoticed(reader: PcscReader, slot: VirtualReader) -> None:
    channel = insert(reader, slot, ContactAsked())
    slot.restart_daemon()
    with pytest.raises(ReaderFault, match="pcscd"):
        channel.transmit(command(1))
    reader.open()
    slot.restart_daemon()
    with pytest.raises(ReaderFault, match="pcscd"):
        reader.wait_for_card(0)
    reader.open()
    works(reader, slot)


def test_the_reader_unplugged_and_back(reader: PcscReader, slot: VirtualReader) -> None:
    slot.restart_daemon(plugged=False)
    with pytest.raises(ReaderFault):
        reader.wait_for_card(0)
    with pytest.raises(ReaderMissing, match="no chip card reader"):
        reader.open()
    slot.restart_daemon()
    reader.open()
    works(reader, slot)


REPORTS: list[tuple[str, type[DriverError], str]] = [
    ("E_NOT_TRANSACTED", CardLost, "removed"),
    ("W_REMOVED_CARD", CardLost, "removed"),
    ("E_NO_SMARTCARD", CardLost, "removed"),
    ("E_COMM_DATA_LOST", CardLost, "removed"),
    ("W_RESET_CARD", CardLost, "removed"),
    ("W_UNPOWERED_CARD", CardLost, "chip side"),
    ("E_READER_UNAVAILABLE", ReaderMissing, "unplugged"),
    ("E_UNKNOWN_READER", ReaderMissing, "unplugged"),
    ("E_NO_SERVICE", ReaderFault, "does not run"),
    ("E_SERVICE_STOPPED", ReaderFault, "does not run"),
    ("E_INVALID_HANDLE", ReaderFault, "restarted"),
    ("W_SECURITY_VIOLATION", ReaderFault, "refuses this user"),
    ("E_SHARING_VIOLATION", ReaderFault, "another program"),
    ("E_NO_MEMORY", ReaderFault, "0x80100006"),
]


def test_what_pcsc_reports_becomes_one_of_ours(
    reader: PcscReader, slot: VirtualReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What real readers report and vpcd cannot."""
    slot.insert(ContactAsked())
    for name, error, words in REPORTS:
        channel = reader.wait_for_card(SOON_MS)
        assert channel is not None, "also after what was reported before"
        code = getattr(scard, f"SCARD_{name}")
        with monkeypatch.context() as patched, pytest.raises(error, match=words) as raised:
            patched.setattr(scard, "SCardTransmit", lambda *_, code=code: [code, []])
            channel.transmit(command(1))
        assert type(raised.value) is error, name
        assert raised.value.__cause__ is not None
        with pytest.raises(CardLost):
            channel.transmit(command(1))
        if error is not CardLost:
            with pytest.raises(ReaderFault, match="not open"):
                reader.wait_for_card(0)
            reader.open()


# ---- waiting


def test_waiting_takes_no_processor_time(reader: PcscReader, slot: VirtualReader) -> None:
    before_s = time.process_time()
    assert reader.wait_for_card(2000) is None
    used_s = time.process_time() - before_s
    slot.insert(ContactAsked())
    assert reader.wait_for_card(SOON_MS)
    before_s = time.process_time()
    assert not reader.wait_for_removal(1000)
    assert max(used_s, time.process_time() - before_s) < 0.1


def test_a_poll_is_cheap(reader: PcscReader) -> None:
    """It stands in a loop beside the contactless reader."""
    polls = 200
    before_s = time.process_time()
    for _ in range(polls):
        assert reader.wait_for_card(0) is None
    assert (time.process_time() - before_s) / polls < 0.002


# ---- the simulated reader itself

# Only the standard library: another user may not be able to read what is installed for us.
OWNER = """
import sys
from pathlib import Path
from hwsim.vpcd import VirtualReader

class Card:
    atr = bytes.fromhex("3b8401454d5631ea")
    def reset(self, cold): pass
    def apdu(self, command): return command + bytes.fromhex("9000")

with VirtualReader(Path(sys.argv[1])) as slot:
    slot.insert(Card())
    print(slot.daemon_pid, slot.environment["PCSCLITE_CSOCK_NAME"], flush=True)
    sys.stdin.read()
"""

CLIENT = """
from drivers.pcsc import PcscReader
reader = PcscReader("simulated ICC 00 00")
reader.open()
channel = reader.wait_for_card(10_000)
print(channel.activation.hex(), channel.transmit(bytes(5)).hex())
"""


def start_owner(directory: Path, python: str = sys.executable, user: int | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [python, "-c", OWNER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**python_path(ROOT / "hw-sim"), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/",
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )


def serves(owner: subprocess.Popen[str]) -> int:
    """Pay at the owner's reader from a process of its own; pcscd's pid."""
    assert owner.stdout is not None
    pid, path = owner.stdout.readline().split()
    environment = {**python_path(ROOT), "PCSCLITE_CSOCK_NAME": path}
    done = subprocess.run([sys.executable, "-c", CLIENT], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [T1_ATR.hex(), "00000000009000"]
    return int(pid)


def python_path(first: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(first), os.environ.get("PYTHONPATH", "")))}


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_pcscd_ends_with_its_owner(slot: VirtualReader, killed: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="payterm-pcsc-") as directory:
        owner = start_owner(Path(directory))
        try:
            pid = serves(owner)
            assert is_alive(pid)
            assert slot.daemon_pid is not None
            assert is_alive(slot.daemon_pid), "several run side by side"
            if killed:
                owner.send_signal(signal.SIGKILL)
        finally:
            owner.communicate()
        deadline_s = time.monotonic() + 10
        while is_alive(pid) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert not is_alive(pid)


def test_without_root(slot: VirtualReader) -> None:
    if os.geteuid() != 0:
        pytest.skip("all tests of this file run without root")
    if not nobody_can("unshare", "--user", "--map-root-user", "--mount", "true"):
        pytest.skip("this machine does not allow namespaces to users")
    probe = "import sys; sys.exit(sys.version_info < (3, 11))"
    python = next((path for path in (sys.executable, "/usr/bin/python3") if nobody_can(path, "-c", probe)), None)
    if python is None or not nobody_can("ls", str(ROOT / "hw-sim/hwsim")):
        pytest.skip("other users can run no Python 3.11 here, or not read this project")
    with tempfile.TemporaryDirectory(prefix="payterm-pcsc-") as directory:
        os.chown(directory, NOBODY, NOBODY)
        owner = start_owner(Path(directory), python, NOBODY)
        try:
            pid = serves(owner)
            assert Path(f"/proc/{pid}").stat().st_uid == NOBODY
        finally:
            owner.communicate()


def nobody_can(*arguments: str) -> bool:
    with contextlib.suppress(OSError):
        done = subprocess.run(
            arguments, check=False, capture_output=True, cwd="/", user=NOBODY, group=NOBODY, extra_groups=[]
        )
        return done.returncode == 0
    return False


def test_a_daemon_outlives_the_thread_that_started_it(slot: VirtualReader) -> None:
    thread = threading.Thread(target=slot.restart_daemon)
    thread.start()
    thread.join()
    time.sleep(0.2)
    pid = slot.daemon_pid
    assert pid is not None
    assert is_alive(pid)


def test_the_machines_own_pcscd_is_left_alone(slot: VirtualReader) -> None:
    assert slot.daemon_pid is not None
    ours, theirs = Path(f"/proc/{slot.daemon_pid}/ns/mnt"), Path("/proc/self/ns/mnt")
    if ours.readlink() == theirs.readlink():
        pytest.skip("this machine does not allow mount namespaces; it has no pcscd of its own either")
    assert (Path(f"/proc/{slot.daemon_pid}/root/run/pcscd")).exists() or os.geteuid() != 0
    assert not list(Path(f"/proc/{slot.daemon_pid}/root/usr/lib/pcsc/drivers").glob("*.bundle/*"))

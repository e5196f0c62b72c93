"""Disk trouble as a person meets it: full, read-only, failing, missing, not ours; by real means on a disk of its own.

The ledger lies on an ext4 image that is mounted for it (so these tests need root). Three promises: a sale is refused
before a card is asked, with a screen that says why; nothing that was shown is lost; and when the trouble is gone, sales
go on by themselves, within seconds and in the same process. `Restart=always` is played for what does end, as systemd
would, so that each promise is judged by itself.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import pytest

from hwsim import sales
from hwsim.device import DeviceClient
from hwsim.world import CARD, World, WorldError
from terminal.control import CallRefused, TerminalUnavailable
from terminal.money import EUR, Amount
from terminal.ui import screens
from tests import syscalls_rig as rig
from tests.test_kill import SOLD, good_news

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts a disk of its own: needs root"),
]

DISK_MIB: Final = 48  # journal 16, database and WAL 10, and ext4's own
CHECKPOINTS_SALES: Final = 100  # some forty sales lie between two checkpoints of the database
SOON_S: Final = 10.0
AGAIN_S: Final = 1.0  # RestartSec of systemd/payterm.service
STEP_S: Final = 0.1

Trouble: TypeAlias = Callable[["Shop"], AbstractContextManager[None]]


@dataclass(slots=True)
class Shop:
    """An installation whose ledger has a disk of its own."""

    world: World
    image: Path
    sold: int = 0

    @property
    def disk(self) -> Path:
        return self.world.directory / "disk"

    @property
    def ledger(self) -> Path:
        return self.disk / "ledger"

    @property
    def process(self) -> int:
        return self.world.processes["terminal"].pid

    def mount(self) -> None:
        self.disk.mkdir(exist_ok=True)
        _run("mount", "-o", "loop,errors=remount-ro", str(self.image), str(self.disk))

    def unmount(self) -> None:
        """As soon as nobody holds files on it; on return the kernel has forgotten it, too."""
        known = Path("/sys/fs/ext4", self._device())
        deadline_s = time.monotonic() + SOON_S
        while subprocess.run(["umount", str(self.disk)], stderr=subprocess.DEVNULL, check=False).returncode:
            assert time.monotonic() < deadline_s, "somebody holds on to files on a disk that failed"
            time.sleep(STEP_S)
        deadline_s += 3 * SOON_S  # the kernel lets go in its own time, and other mount namespaces may have seen it
        while known.exists():
            assert time.monotonic() < deadline_s, "the disk was unmounted but is still in use"
            time.sleep(STEP_S)

    def fail(self) -> bool:
        """Have ext4 find an error and go read-only. False where the kernel does not offer that."""
        trigger = Path("/sys/fs/ext4", self._device(), "trigger_fs_error")
        if trigger.exists():
            trigger.write_text("disk trouble, by a test\n", encoding="ascii")
            return True
        return False

    def _device(self) -> str:
        found = subprocess.run(["findmnt", "-no", "SOURCE", str(self.disk)], capture_output=True, text=True, check=True)
        return Path(found.stdout.strip()).name

    def start(self) -> None:
        """As systemd does: no matter whether it comes up."""
        with contextlib.suppress(WorldError):
            self.world.start_terminal()

    def supervise(self) -> None:
        """Restart=always."""
        if self.world.processes["terminal"].poll() is not None:
            self.world.kill("terminal")
            time.sleep(AGAIN_S)
            self.start()

    def sell(self) -> Attempt:
        """One sale, as far as it goes."""
        self.sold += 1
        amount = Amount(100 + 10 * self.sold, EUR)
        refusal = state = sale = ""
        self.world.device.pictures()
        try:
            sale = self.world.sell(amount)
            self.world.device.present(CARD)
            state = str(self.world.result(sale, timeout_s=8)["state"])
        except (CallRefused, TerminalUnavailable, WorldError) as error:
            refusal = str(error)
        time.sleep(STEP_S)
        self.world.device.remove()
        with contextlib.suppress(CallRefused, TerminalUnavailable, WorldError):
            self.world.wait(lambda: not self.world.status()["busy"] or None, "the device to be free", timeout_s=2)
        seen = {picture.image.tobytes() for picture in self.world.device.pictures()}
        return Attempt(
            sale=sale,
            made=bool(seen & good_news(self.world, amount)) or state in SOLD,
            card_asked=bool(seen & _asking(amount)),
            refusal=refusal,
        )

    def keep(self) -> None:
        """What was stored but never shown stands."""
        for sale in self.world.status()["attention"]:
            self.world.call("attention.resolve", transaction=sale["id"], keep=True)

    def sell_soon(self) -> Attempt:
        """Until one is made, at most for seconds."""
        deadline_s = time.monotonic() + SOON_S
        while True:
            with contextlib.suppress(CallRefused, TerminalUnavailable):
                self.keep()
                if (attempt := self.sell()).made:
                    return attempt
            assert time.monotonic() < deadline_s, f"no sale within {SOON_S:.0f} s of the end of the trouble"
            self.supervise()
            time.sleep(STEP_S)

    def says(self, *reasons: str) -> bool:
        """Whether the panel shows one of these errors, or comes to, soon."""
        clear = {screens.render(screens.Error(reason), "en").tobytes() for reason in reasons}
        with contextlib.closing(DeviceClient(self.world.directory / "device")) as device:
            deadline_s = time.monotonic() + SOON_S
            while time.monotonic() < deadline_s:
                if any(picture.image.tobytes() in clear for picture in device.pictures(wait_ms=100)):
                    return True
        return False


@dataclass(frozen=True, slots=True)
class Attempt:
    """How a sale went. `made`: somebody was told that it is."""

    sale: str
    made: bool
    card_asked: bool
    refusal: str


@pytest.fixture
def shop() -> Iterator[Shop]:
    with tempfile.TemporaryDirectory(prefix="payterm-") as place:
        image, directory = Path(place) / "disk.img", Path(place) / "w"
        directory.mkdir()
        with image.open("wb") as file:
            file.truncate(DISK_MIB << 20)
        _run("mkfs.ext4", "-q", "-m", "0", "-E", "nodiscard,lazy_itable_init=0", str(image))
        with contextlib.ExitStack() as cleanup:
            # Mounts go first to come, last to leave: every process has ended by then.
            cleanup.callback(
                subprocess.run, ["umount", "-l", str(directory / "disk")], capture_output=True, check=False
            )
            world = cleanup.enter_context(World.create(directory, result_hold_ms=0))
            made = Shop(world, image)
            # Before the disk is mounted: the device's card service has mounts of its own, and would keep this one.
            world.start_device()
            made.mount()
            text = world.config.read_text(encoding="utf-8")
            text = text.replace(f"{directory}/ledger", f"{made.ledger}").replace(
                "offline_count = 10", "offline_count = 99"
            )
            world.config.write_text(text, encoding="utf-8")
            world.modules["terminal"] = "tests.unprivileged"
            yield made


# The troubles: each begins with the block and is over after it.


@contextlib.contextmanager
def full(shop: Shop) -> Iterator[None]:
    filler = shop.disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size_bytes in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size_bytes))
    os.sync()
    assert os.statvfs(shop.disk).f_bavail == 0
    yield
    filler.unlink()


@contextlib.contextmanager
def read_only(shop: Shop) -> Iterator[None]:
    """What ext4 does when it finds an error, as on a card that has locked itself: only a new mount mends it."""
    if not shop.fail():
        pytest.skip("this kernel lets nobody trigger a file system error")
    yield
    shop.unmount()
    subprocess.run(["e2fsck", "-fy", str(shop.image)], capture_output=True, check=False)
    shop.mount()


@contextlib.contextmanager
def failing(shop: Shop) -> Iterator[None]:
    """Every write and flush of the process that runs now ends with EIO."""
    strace = shutil.which("strace")
    assert strace is not None, "strace is missing: run make, which installs it"
    calls = "pwrite64,fdatasync,fsync,ftruncate"
    attached = subprocess.Popen(
        [
            *(strace, "-f", "-o", "/dev/null", "-p", str(shop.process)),
            *("-e", f"trace={calls}", "-e", f"inject={calls}:error=EIO"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert attached.stderr is not None
    assert "attached" in attached.stderr.readline()
    yield
    attached.send_signal(signal.SIGINT)  # detaches
    attached.communicate()


TROUBLES: Final[dict[str, Trouble]] = {"full": full, "read-only": read_only, "failing": failing}


_troubles = pytest.mark.parametrize("trouble", TROUBLES.values(), ids=list(TROUBLES))


@_troubles
def test_a_sale_is_refused_before_a_card_is_asked(shop: Shop, trouble: Trouble) -> None:
    """Or made: space may be reserved for it. Never begun with a customer and then lost to the disk."""
    shop.start()
    assert shop.sell().made
    with trouble(shop):
        attempts = [shop.sell() for _ in range(3)]
        clear = shop.says("ledger", "journal_full", "storage", "storage_full") or all(
            attempt.made for attempt in attempts
        )
    print(attempts)
    assert not [attempt for attempt in attempts if attempt.card_asked and not attempt.made]
    assert clear, "the panel does not say why"


def test_a_disk_that_fills_up_while_selling(shop: Shop) -> None:
    """Long enough for the write-ahead log to be carried over into a database that cannot grow."""
    state, ack = shop.disk / "state", shop.world.directory / "ack"
    sales.provision(state, journal_mib=16)
    with ThreadPoolExecutor(1) as background:
        running = background.submit(rig.run, state, ack, count=CHECKPOINTS_SALES)
        while not (ack.exists() and ack.stat().st_size) and not running.done():
            time.sleep(STEP_S)
        with full(shop):
            run = running.result()
    print(f"{len(run.acknowledged)} of {CHECKPOINTS_SALES} sales on a full disk, exit code {run.code}")
    rig.said_honestly(run, "a full disk", CHECKPOINTS_SALES)
    again = rig.run(state, ack, count=1)
    assert again.code == 0, again.said
    assert rig.missing(state, (*run.acknowledged, *again.acknowledged)) == []


@_troubles
def test_nothing_that_was_shown_is_lost(shop: Shop, trouble: Trouble) -> None:
    shop.start()
    attempts = [shop.sell()]
    with trouble(shop):
        attempts += [shop.sell() for _ in range(3)]
    attempts.append(shop.sell_soon())
    shop.world.stop("terminal")
    shop.start()
    states = {each["id"]: each["state"] for each in shop.world.ledger()}
    made = [attempt.sale for attempt in attempts if attempt.made]
    assert len(made) >= 2
    assert [sale for sale in made if states.get(sale) not in SOLD] == []


@_troubles
def test_sales_go_on_by_themselves(shop: Shop, trouble: Trouble) -> None:
    shop.start()
    assert shop.sell().made
    process = shop.process
    with trouble(shop):
        shop.sell()
        time.sleep(2)  # for the idle screen, and whatever looks after the ledger
    shop.sell_soon()
    assert shop.process == process, "the service ended"


# The trouble is there before the terminal is.


@contextlib.contextmanager
def mounted_read_only(shop: Shop) -> Iterator[None]:
    _run("mount", "-o", "remount,ro", str(shop.disk))
    yield
    _run("mount", "-o", "remount,rw", str(shop.disk))


@contextlib.contextmanager
def not_a_directory(shop: Shop) -> Iterator[None]:
    aside = shop.disk / "aside"
    shop.ledger.rename(aside)
    shop.ledger.write_bytes(b"")
    yield
    shop.ledger.unlink()
    aside.rename(shop.ledger)


@contextlib.contextmanager
def of_another_user(shop: Shop) -> Iterator[None]:
    """Root without its privilege over files is an ordinary user."""
    shop.ledger.chmod(0o700)
    os.chown(shop.ledger, 65534, 65534)
    yield
    os.chown(shop.ledger, 0, 0)


AT_START: Final[dict[str, Trouble]] = {
    "read-only": mounted_read_only,
    "no directory": not_a_directory,
    "of another user": of_another_user,
}


@pytest.mark.parametrize("trouble", AT_START.values(), ids=AT_START)
def test_trouble_at_the_start_is_said_and_nothing_is_lost(shop: Shop, trouble: Trouble) -> None:
    shop.start()
    before = shop.sell()
    shop.world.stop("terminal")
    with trouble(shop):
        shop.start()
        assert shop.says("ledger", "storage")
    after = shop.sell_soon()
    assert {before.sale, after.sale} <= {sale["id"] for sale in shop.world.ledger() if sale["state"] in SOLD}


def test_a_state_directory_that_is_gone_does_not_begin_a_new_ledger(shop: Shop) -> None:
    """A disk that was not mounted must not look like a terminal that never sold: the host would see a fork."""
    shop.start()
    assert shop.sell().made
    shop.world.stop("terminal")
    shop.unmount()
    text = shop.world.config.read_text(encoding="utf-8")
    shop.world.config.write_text(text.replace("[ledger]\n", "[ledger]\nbegin = false\n", 1), encoding="utf-8")
    shop.start()
    begun = shop.ledger.exists()
    shop.world.kill("terminal")
    shutil.rmtree(shop.ledger, ignore_errors=True)
    shop.mount()
    assert not begun


def _asking(amount: Amount) -> set[bytes]:
    asking = (*(screens.PresentCard(amount, contact=contact) for contact in (False, True)), screens.Reading(amount))
    return {screens.render(screen, "en").tobytes() for screen in asking}


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=True)

"""What somebody finds who takes the SD card out and reads every block of it.

A ledger lives for months on an ext4 image: sales, answers, reversals, erasures, archive, forgetting, a new data key, a
database rebuilt or brought up to date. Then the image is unmounted and searched, live files and free blocks alike: for
card data in every shape, and for what it was sealed into, which must be gone once the host has answered. Needs root.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from base64 import urlsafe_b64decode
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import pytest
from ledger_rig import CARD_TLV, SUMMARY, TEST_PAN, TRACK2, Rig, seeded
from test_ledger_migrations import FORM_1, opened
from test_ledger_secrets import shapes

from terminal.ledger.journal import RecordType
from terminal.ledger.keys import Keyring, SecretKey
from terminal.ledger.ledger import Ledger, LedgerSettings
from terminal.ledger.medium import SLOT_BYTES
from terminal.ledger.models import SCHEMA_VERSION
from terminal.ledger.upkeep import Retention
from terminal.ledger.values import Decision, Event, ReversalReason, Transaction

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("mkfs.ext4") or not shutil.which("losetup"),
    reason="only root can mount an image, with mkfs.ext4 and losetup",
)

SETTINGS: Final = LedgerSettings(
    journal_size_bytes=192 * SLOT_BYTES,
    wal_size_bytes=256 * 1024,
    retention=Retention(sales_days=20, card_days=5, audit_months=1),
)
IMAGE_BYTES: Final = 64 * 1024 * 1024
DAY_MS: Final = 86_400_000
_STEPS_MAX: Final = 500
_SAMPLE_BYTES: Final = 48  # of a sealed payload: so many bytes do not come twice by chance
_OVERLAP_BYTES: Final = 4096  # of the pieces that are searched: longer than any shape
_PIECE_BYTES: Final = 1024 * 1024

CARD: Final = {
    "pan": bytes.fromhex(TEST_PAN),
    "pan digits": TEST_PAN.encode(),
    "track 2": TRACK2[:-1],
    "tlv": CARD_TLV,
    "label": SUMMARY.label.encode(),
    "card_ref": b"card-ref-1",
}


@dataclass
class Sealed:
    """What card data was sealed into, by the sale: remembered while it is there, looked for when it must be gone."""

    found: dict[str, bytes] = field(default_factory=dict)

    def remember(self, rig: Rig, ledger: Ledger, sale: Transaction, event: Event = Event.AUTHORISATION) -> str:
        """The envelope, the sealed card in it, and the payload as the journal has it; the envelope."""
        envelope = rig.envelope(ledger, sale.id, event)
        name = f"{len(self.found)} {event}"
        self.found[f"{name} envelope"] = envelope.encode()
        if "sealed" in (said := rig.host.read(envelope)):
            self.found[f"{name} hpke"] = urlsafe_b64decode(said["sealed"] + "==")
        for record in ledger.inspection.records(max(0, ledger.inspection.last - 8), 8):
            if record.type in {RecordType.CARD, RecordType.REVERSAL} and record.payload is not None:
                self.found[f"{record.sequence} payload"] = record.payload
        return envelope


@contextmanager
def mounted(image: Path, at: Path) -> Iterator[Rig]:
    """A terminal whose storage is this image; on leaving, everything is closed and on the image."""
    # discard must stay off: what a deleted file leaves behind is to be found.
    options = ["-o", "loop,nodiscard"]
    done = subprocess.run(["mount", *options, image, at], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no image can be mounted here: {done.stderr.strip()}")
    rig = Rig(at / "state", settings=SETTINGS)
    try:
        yield rig
    finally:
        rig.close_all()
        subprocess.run(["umount", at], check=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "card.img"
    with path.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    quiet = ["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"]
    subprocess.run(["mkfs.ext4", *quiet, path], check=True, capture_output=True)
    (tmp_path / "card").mkdir()
    return path


def search(image: Path, wanted: dict[str, set[bytes]]) -> dict[str, list[int]]:
    """Where on the image each secret stands, in any of its shapes."""
    found: dict[str, list[int]] = {}
    with image.open("rb") as file:
        for begin in range(0, image.stat().st_size, _PIECE_BYTES):
            file.seek(begin)
            piece = file.read(_PIECE_BYTES + _OVERLAP_BYTES)
            if piece.count(0) == len(piece):
                continue
            for name, patterns in wanted.items():
                for pattern in patterns:
                    if (at := piece.find(pattern)) >= 0:
                        found.setdefault(name, []).append(begin + at)
    return found


def shaped(secrets: dict[str, bytes]) -> dict[str, set[bytes]]:
    return {name: shapes(secret) for name, secret in secrets.items()}


def samples(sealed: dict[str, bytes]) -> dict[str, set[bytes]]:
    """A piece of the beginning and of the middle of each: what half an overwriting leaves counts, too."""
    return {name: {secret[at : at + _SAMPLE_BYTES] for at in (0, len(secret) // 2)} for name, secret in sealed.items()}


def holder(image: Path, offset: int) -> str:
    """Which file has this place of the image, for the message of a test that fails."""
    asked = f"icheck {offset // 4096}\n"
    said = subprocess.run(["debugfs", "-f", "-", image], input=asked, check=False, capture_output=True, text=True)
    return f"{offset:#x}: {' '.join(said.stdout.split()[-2:])}"


def explained(image: Path, found: dict[str, list[int]]) -> dict[str, list[str]]:
    return {name: [holder(image, offset) for offset in offsets[:3]] for name, offsets in found.items()}


def tidy(rig: Rig, ledger: Ledger) -> None:
    rig.clock.now_ms += 11_000
    for _ in range(_STEPS_MAX):
        if not ledger.upkeep.step(rig.envelopes):
            return
    raise AssertionError("upkeep finds no end")


def sold(rig: Rig, ledger: Ledger, sealed: Sealed, decision: Decision = Decision.ACCEPTED) -> tuple[Transaction, str]:
    sale = rig.sell(ledger, decision)
    envelope = sealed.remember(rig, ledger, sale)
    ledger.mark_shown(sale.id, "approved")
    return sale, envelope


def delivered(rig: Rig, ledger: Ledger, sealed: Sealed, decision: str = "approved") -> Transaction:
    sale, envelope = sold(rig, ledger, sealed)
    return rig.deliver(ledger, sale.id, Event.AUTHORISATION, rig.host.answer(envelope, decision))


def taken_back(rig: Rig, ledger: Ledger, sealed: Sealed) -> None:
    sale, _ = sold(rig, ledger, sealed, Decision.ONLINE)
    ledger.commit_reversal(sale.id, ReversalReason.TIMEOUT, rig.reversal(sale, ReversalReason.TIMEOUT))
    sealed.remember(rig, ledger, sale, Event.REVERSAL)
    reversal = rig.envelope(ledger, sale.id, Event.REVERSAL)
    rig.deliver(ledger, sale.id, Event.REVERSAL, rig.host.answer(reversal, "reversed", reason="timeout"))


def months(rig: Rig, sealed: Sealed) -> Ledger:
    """Everything that moves or forgets records, twice over; open at the end, everything delivered."""
    ledger = rig.open()
    for month in range(3):
        for day in range(3):
            for _ in range(6):
                delivered(rig, ledger, sealed)
            delivered(rig, ledger, sealed, "declined")
            taken_back(rig, ledger, sealed)
            tidy(rig, ledger)
            rig.clock.now_ms += (1 + 10 * day) * DAY_MS
        ledger.upkeep.erase_card("card-ref-1")
        tidy(rig, ledger)
        ledger.close()
        if month == 1:
            rig.keys = replace(
                rig.keys, data=Keyring(SecretKey(seeded(99)(32)), (rig.keys.data.current, *rig.keys.data.retired))
            )
        if month == 2:
            older(rig.directory / "ledger.db")
        ledger = rig.open()
    delivered(rig, ledger, sealed)
    tidy(rig, ledger)
    return ledger


def older(path: Path) -> None:
    """As a damaged page leaves it: the start moves the database aside and builds another."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE outbox SET answered = 1 - answered WHERE number = (SELECT MAX(number) FROM outbox)")
        database.commit()


def test_nothing_of_a_card_is_left_on_the_storage(image: Path, tmp_path: Path) -> None:
    sealed = Sealed()
    with mounted(image, tmp_path / "card") as rig:
        ledger = months(rig, sealed)
        sold(rig, ledger, Sealed())
        names = {path.name for path in rig.directory.rglob("*")}
        last = ledger.inspection.check()
        ledger.close()
    assert last.archived > 0
    assert "floor" in names
    assert any("damaged" in name for name in names)
    assert len(sealed.found) > 150
    assert explained(image, search(image, shaped(CARD))) == {}
    assert explained(image, search(image, samples(sealed.found))) == {}
    # Control: what still waits for the host is there, sealed, and the search sees it.
    with mounted(image, tmp_path / "card") as again:
        again.keys = rig.keys
        ledger = again.open()
        (record,) = (each for each in ledger.inspection.every() if each.type is RecordType.CARD and each.payload)
        assert record.payload is not None
    assert search(image, samples({"waiting": record.payload})).keys() == {"waiting"}


@pytest.mark.parametrize("killed", [False, True], ids=["closed", "killed"])
def test_what_was_answered_is_gone_at_once(image: Path, tmp_path: Path, killed: bool) -> None:
    """Not only after months: the very answer erases, from the log of the database as well, before the next start."""
    sealed = Sealed()
    with mounted(image, tmp_path / "card") as rig:
        ledger = rig.open()
        for _ in range(5):
            delivered(rig, ledger, sealed)
            taken_back(rig, ledger, sealed)
        ledger.flush()
        if killed:  # what the process leaves when it ends here, and what a start makes of it
            left = shutil.copytree(rig.directory, tmp_path / "card" / "left")
            tidy(rig, rig.open(directory=left))
    assert explained(image, search(image, shaped(CARD))) == {}
    assert explained(image, search(image, samples(sealed.found))) == {}


def test_a_database_of_an_older_form_leaves_nothing_behind(image: Path, tmp_path: Path) -> None:
    """The copy that is kept of it, and the pages that it left, hold no card in clear."""
    with mounted(image, tmp_path / "card") as rig:
        rig.directory.mkdir()
        path = rig.directory / "ledger.db"
        path.write_bytes(FORM_1)
        opened(path).close()
        assert path.with_name(f"ledger.db.before-{SCHEMA_VERSION}").exists()
    assert explained(image, search(image, shaped(CARD))) == {}


def test_what_a_deleted_file_leaves_is_found(image: Path, tmp_path: Path) -> None:
    """Control: the searches above can fail, for each secret and each shape of it."""
    planted = CARD | {"sealed": seeded(5)(300)}
    with mounted(image, tmp_path / "card") as rig:
        rig.sell(rig.open())
        lost = tmp_path / "card" / "lost"
        lost.write_bytes(b"".join(shape.ljust(1000, b".") for secret in planted.values() for shape in shapes(secret)))
        with lost.open("rb") as file:
            os.fsync(file.fileno())
        lost.unlink()
    for name, patterns in shaped(planted).items():
        for pattern in patterns:
            assert search(image, {name: {pattern}}).keys() == {name}
    assert search(image, samples({"sealed": planted["sealed"]})).keys() == {"sealed"}


def test_an_answer_that_erased_nothing_would_be_found(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: without the overwriting in the journal, the sealed card data stays on the storage."""
    from terminal.ledger.parts import Parts

    monkeypatch.setattr(Parts, "overwrite", lambda *_: None)
    sealed = Sealed()
    with mounted(image, tmp_path / "card") as rig:
        ledger = rig.open()
        delivered(rig, ledger, sealed)
    assert {name.split()[1] for name in search(image, samples(sealed.found))} == {"payload"}

"""Power cuts at every write and flush, damaged and missing files, and what the next start makes of them.

A script of sales runs on a journal that loses power at a chosen operation. What the next start finds is what had been
flushed and any part of the rest, with the database as its last commit left it (or, harder, without it). Whatever was
told to anybody must then be there.
"""

from __future__ import annotations

import errno
import random
import resource
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from ledger_rig import SMALL, MemoryMedium, Rig, seeded, slots_start, verified

from terminal.ledger.errors import DiskTrouble, KeyUnavailable, LedgerCorrupt, LedgerTooNew
from terminal.ledger.journal import SLOT_BYTES, FileMedium, Medium
from terminal.ledger.keys import Keyring, SecretKey, TerminalKeys
from terminal.ledger.ledger import Ledger, LedgerSettings
from terminal.ledger.recovery import resolve
from terminal.ledger.sealing import digest
from terminal.ledger.states import State
from terminal.ledger.values import Decision, Event, ReversalReason, Transaction

TINY = LedgerSettings(journal_size_bytes=192 * SLOT_BYTES, wal_size_bytes=32768)


class PowerCut(BaseException):
    """No more electricity: nothing may catch this."""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "state", settings=TINY)
    yield rig
    rig.close_all()


@dataclass
class Told:
    """What the outside world has been told: that is what must survive."""

    states: dict[UUID, State] = field(default_factory=dict)
    envelopes: dict[UUID, str] = field(default_factory=dict)

    def sale(self, ledger: Ledger, sale: Transaction) -> Transaction:
        self.states[sale.id] = sale.state
        item = next((item for item in ledger.outbox(99) if item.key == f"{sale.id}/authorisation"), None)
        if item is not None and item.envelope is not None:
            self.envelopes[sale.id] = item.envelope
        return sale


def script(rig: Rig, ledger: Ledger, told: Told) -> None:
    """A short day: offline, online, declined, timed out, answered, voided, cut off."""
    offline = told.sale(ledger, rig.sell(ledger, minor=100))
    ledger.mark_shown(offline.id, "approved")
    online = told.sale(ledger, rig.sell(ledger, Decision.ONLINE, minor=200))
    jws = rig.host.answer(told.envelopes[online.id])
    told.sale(ledger, rig.deliver(ledger, online.id, Event.AUTHORISATION, jws))
    ledger.mark_shown(online.id, "approved")
    ledger.note("link", online=True)
    late = told.sale(ledger, rig.sell(ledger, Decision.ONLINE, minor=400))
    reversal = rig.reversal(late, ReversalReason.TIMEOUT)
    told.sale(ledger, ledger.commit_reversal(late.id, ReversalReason.TIMEOUT, reversal))
    ledger.flush()
    jws = rig.host.answer(told.envelopes[offline.id])
    told.sale(ledger, rig.deliver(ledger, offline.id, Event.AUTHORISATION, jws))
    told.sale(ledger, rig.sell(ledger, Decision.ONLINE, minor=800))
    rig.begin(ledger, minor=1600)


SUCCESSORS = {
    State.AUTHORISING: {State.AUTHORISING, State.APPROVED, State.REVERSING},
    State.ACCEPTED: {State.ACCEPTED, State.SETTLED},
}


def check(rig: Rig, ledger: Ledger, told: Told) -> None:
    """Everything told is there; what was in flight may have come one step further."""
    for transaction, state in told.states.items():
        found = ledger.transaction(transaction)
        assert found.state in SUCCESSORS.get(state, {state}), f"{found.state} after {state}"
        item = ledger.outbox_item(f"{transaction}/authorisation")
        assert item.sha256 == digest(told.envelopes[transaction])
        if not item.answered:
            assert item.envelope == told.envelopes[transaction]
            assert rig.host.unseal(item.envelope, found)
    for item in ledger.outbox(99):
        assert item.envelope
    verified(ledger)


def run_until(rig: Rig, operation: int, medium: MemoryMedium) -> Told:
    """Run the script on `medium`; the power fails at its n-th write or flush."""
    told, count = Told(), 0

    def tick(_: str) -> None:
        nonlocal count
        count += 1
        if count == operation:
            raise PowerCut

    ledger = rig.open(lambda *_: medium)
    medium.on_operation = tick
    try:
        script(rig, ledger, told)
    except PowerCut:
        pass
    finally:
        medium.on_operation = lambda _: None
    return told


def restart(
    rig: Rig, medium: Medium, *, with_database: bool = True, name: str = "after", keys: TerminalKeys | None = None
) -> Ledger:
    """Start on what the power cut left: the files as they are now, not as a clean end would leave them."""
    directory = rig.directory.parent / name
    directory.mkdir()
    if with_database:
        for suffix in ("", "-wal"):
            shutil.copy(rig.directory / f"ledger.db{suffix}", directory)
    return rig.open(lambda *_: medium, directory, keys=keys or rig.keys)


def operations(tmp_path: Path) -> int:
    rig, medium = Rig(tmp_path / "count", settings=TINY), MemoryMedium(TINY.journal_size_bytes)
    count = 0

    def tick(_: str) -> None:
        nonlocal count
        count += 1

    ledger = rig.open(lambda *_: medium)
    medium.on_operation = tick
    script(rig, ledger, Told())
    medium.on_operation = lambda _: None
    rig.close_all()
    return count


def harm(
    rig: Rig, tmp_path: Path, make: Callable[[], MemoryMedium], *, with_database: bool, step: int = 1
) -> list[str]:
    """Cut the power at every operation; what went wrong, by operation."""
    wrong = []
    total = operations(tmp_path)
    assert total >= 35
    for operation in range(1, total + 2, step):
        one = Rig(tmp_path / f"cut-{operation}" / "state", settings=TINY, seed=operation)
        medium = make()
        told = run_until(one, operation, medium)
        chance = random.Random(operation)
        try:
            left = medium.power_cut(chance)
            ledger = restart(one, left, with_database=with_database)
            check(one, ledger, told)
            assert not any(left.now[verified(ledger) * SLOT_BYTES :])  # nothing half written stays behind
            resolution = resolve(ledger, one.envelopes)
            assert not ledger.opened()
            assert not ledger.authorising()
            assert {sale.id for sale in resolution.unshown} == {sale.id for sale in ledger.unshown()}
            # And on: sell, lose power again, start again.
            sale = told.sale(ledger, one.sell(ledger))
            after = {sale.id: sale for sale in ledger.transactions(99)}
            again = restart(one, left.power_cut(chance), with_database=False, name="again")
            assert {sale.id: sale for sale in again.transactions(99)} == after
            assert again.transaction(sale.id).state is State.ACCEPTED
        except Exception as error:  # noqa: BLE001 (collected: the test or its control judges)
            wrong.append(f"operation {operation} (seed {operation}): {error!r}")
        finally:
            one.close_all()
            shutil.rmtree(tmp_path / f"cut-{operation}")
    return wrong


@pytest.mark.parametrize("with_database", [True, False], ids=["with ledger.db", "from the journal alone"])
def test_a_power_cut_at_any_moment_loses_nothing_that_was_told(rig: Rig, tmp_path: Path, with_database: bool) -> None:
    assert harm(rig, tmp_path, lambda: MemoryMedium(TINY.journal_size_bytes), with_database=with_database) == []


class LyingMedium(MemoryMedium):
    """Says that it has flushed."""

    def flush(self) -> None:
        self.on_operation("flush")


def test_a_skipped_flush_is_noticed(rig: Rig, tmp_path: Path) -> None:
    """Control: the test above can fail. With ledger.db beside it, the journal would be mended from there."""
    wrong = harm(rig, tmp_path, lambda: LyingMedium(TINY.journal_size_bytes), with_database=False, step=9)
    assert len(wrong) >= 3


def test_what_a_skipped_flush_lost_is_written_again_from_the_other_copy(rig: Rig, tmp_path: Path) -> None:
    assert harm(rig, tmp_path, lambda: LyingMedium(TINY.journal_size_bytes), with_database=True, step=5) == []


def test_a_kill_between_journal_and_ledger_loses_nothing(rig: Rig) -> None:
    medium = MemoryMedium(TINY.journal_size_bytes)
    ledger = rig.open(lambda *_: medium)
    sale = rig.begin(ledger)

    def killed(operation: str) -> None:
        if operation == "flushed":
            raise PowerCut

    medium.on_operation = killed
    with pytest.raises(PowerCut):
        rig.finish(ledger, sale)
    medium.on_operation = lambda _: None
    after = restart(rig, medium)
    assert after.recovery.redone == 3
    assert after.transaction(sale.id).state is State.ACCEPTED
    assert after.exposure(sale.amount.currency).sum_minor == 1250
    assert after.totals()[0].count == 1
    assert after.unshown() == [after.transaction(sale.id)]


@pytest.mark.parametrize("operation", [1, 2, 3])
def test_what_a_killed_process_left_in_memory_counts_only_when_flushed(rig: Rig, operation: int) -> None:
    """Killed before the flush; the power fails while the next start is at work."""
    medium = MemoryMedium(TINY.journal_size_bytes)
    ledger = rig.open(lambda *_: medium)
    told = rig.sell(ledger)
    pending = rig.begin(ledger)

    def cut_at(number: int, kind: str) -> Callable[[str], None]:
        count = 0

        def tick(operation: str) -> None:
            nonlocal count
            count += operation == kind or not kind
            if count == number:
                raise PowerCut

        return tick

    medium.on_operation = cut_at(1, "flush")
    with pytest.raises(PowerCut):
        rig.finish(ledger, pending)
    medium.on_operation = cut_at(operation, "")
    with suppress(PowerCut):
        restart(rig, medium)
    medium.on_operation = lambda _: None
    left = MemoryMedium(medium.size_bytes)
    left.now[:] = left.durable[:] = medium.durable
    database = rig.directory.parent / "after"
    shutil.copytree(database, rig.directory.parent / "last")
    after = rig.open(lambda *_: left, rig.directory.parent / "last")
    assert after.transaction(told.id) == told
    verified(after)


# Ledger and journal damaged


def copies_of(ledger: Ledger) -> tuple[object, ...]:
    return (ledger.transactions(99), ledger.outbox(99), ledger.totals(), ledger.unsent(), ledger.unshown())


@pytest.mark.parametrize("how", ["missing", "empty", "nonsense", "truncated", "page", "cell", "text", "log"])
def test_a_damaged_database_is_rebuilt_and_kept(rig: Rig, how: str) -> None:
    rig.settings = SMALL  # its log holds the whole script
    ledger = rig.open()
    script(rig, ledger, Told())
    ledger.flush()
    before = copies_of(ledger)
    path = rig.directory / "ledger.db"
    if (
        how == "log"
    ):  # the log of a terminal that was cut off, one bit flipped: SQLite drops what follows without a word
        after = rig.directory.parent / "after"
        shutil.copytree(rig.directory, after)
        log = after / "ledger.db-wal"
        content = bytearray(log.read_bytes())
        content[9000] ^= 1
        log.write_bytes(content)
        ledger = rig.open(directory=after)
        assert ledger.recovery.redone > 0
        assert copies_of(ledger) == before
        return
    ledger.close()
    content = path.read_bytes()
    match how:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "nonsense":
            path.write_bytes(seeded(1)(len(content)))
        case "truncated":
            path.write_bytes(content[:8192])
        case "page":
            path.write_bytes(content[:4096] + seeded(1)(65536) + content[4096 + 65536 :])
        case _:
            database = sqlite3.connect(path)
            if how == "text":
                database.execute("UPDATE transactions SET amount_minor = CAST(amount_minor AS TEXT)")
            database.execute("UPDATE transactions SET amount_minor = currency WHERE state = 'opened'")
            database.commit()
            database.close()
    ledger = rig.open()
    assert ledger.recovery.rebuilt
    kept = ledger.recovery.moved_aside
    assert (kept is not None and kept.exists()) == (how not in {"missing", "empty"})
    assert copies_of(ledger) == before
    ledger.close()
    assert not rig.open().recovery.rebuilt


def test_damage_found_while_running_is_rebuilt_at_the_next_start(rig: Rig) -> None:
    ledger = rig.open()
    sale = rig.sell(ledger)
    jws = rig.host.answer(rig.envelope(ledger, sale.id))
    rig.deliver(ledger, sale.id, Event.AUTHORISATION, jws)
    ledger._parts.store._database.run("UPDATE transactions SET details = currency")  # a start would notice
    with pytest.raises(LedgerCorrupt, match="details"):
        ledger.transaction(sale.id)
    with pytest.raises(LedgerCorrupt):
        rig.begin(ledger)
    ledger.close()
    ledger = rig.open()
    assert ledger.recovery.rebuilt
    assert ledger.transaction(sale.id).state is State.SETTLED


def flip(rig: Rig, sequence: int, bit: int) -> None:
    with (rig.directory / "journal").open("r+b") as file:
        file.seek(slots_start(rig.directory) + (sequence - 1) * SLOT_BYTES + bit // 8)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes((byte ^ 1 << bit % 8,)))


SEQUENCES = pytest.mark.parametrize("sequence", [1, 2, 4, 9])
BITS = pytest.mark.parametrize("bit", [5, 8 * 130, 8 * 500 + 3, 8 * 4095])


@SEQUENCES
@BITS
def test_a_flipped_bit_is_mended_from_the_other_copy(rig: Rig, sequence: int, bit: int) -> None:
    ledger = rig.open()
    script(rig, ledger, Told())
    before = copies_of(ledger)
    ledger.close()
    whole = (rig.directory / "journal").read_bytes()
    flip(rig, sequence, bit)
    ledger = rig.open()
    verified(ledger)
    assert copies_of(ledger) == before
    ledger.close()
    assert (rig.directory / "journal").read_bytes() == whole


@SEQUENCES
@BITS
def test_a_flipped_bit_without_another_copy_is_named(rig: Rig, sequence: int, bit: int) -> None:
    ledger = rig.open()
    script(rig, ledger, Told())
    ledger.close()
    flip(rig, sequence, bit)
    (rig.directory / "ledger.db").unlink()
    with pytest.raises(LedgerCorrupt) as caught:
        rig.open()
    assert caught.value.sequence == sequence


def test_damage_in_both_copies_is_named_and_ends_selling(rig: Rig) -> None:
    ledger = rig.open()
    script(rig, ledger, Told())
    ledger.close()
    flip(rig, 4, 8 * 130)
    database = sqlite3.connect(rig.directory / "ledger.db")
    database.execute("UPDATE records SET trimmed = zeroblob(300) WHERE sequence = 4")
    database.commit()
    database.close()
    ledger = rig.open()  # a start reads only what is new
    with pytest.raises(LedgerCorrupt, match="record 4"):
        verified(ledger)


def test_damage_at_the_position_is_mended_at_the_start(rig: Rig) -> None:
    ledger = rig.open()
    rig.sell(ledger)
    last = verified(ledger)
    ledger.close()
    flip(rig, last, 8 * 77)
    assert rig.open().recovery.restored == (last,)


def test_an_envelope_that_waits_and_is_gone_from_both_is_damage(rig: Rig) -> None:
    ledger = rig.open()
    rig.sell(ledger)
    ledger.note("idle")  # vouches for the sale; without it, only ledger.db would
    ledger.close()
    with (rig.directory / "journal").open("r+b") as file:
        file.seek(slots_start(rig.directory) + 2 * SLOT_BYTES + 4096)
        file.write(bytes(SLOT_BYTES - 4096))
    rig.open().close()  # the ledger's copy serves
    (rig.directory / "ledger.db").unlink()
    with pytest.raises(LedgerCorrupt, match="record 3"):
        rig.open()


@pytest.mark.parametrize("how", ["missing", "blank"])
def test_a_journal_that_is_gone_is_written_again_from_the_ledger(rig: Rig, how: str) -> None:
    ledger = rig.open()
    script(rig, ledger, Told())
    before, last = copies_of(ledger), verified(ledger)
    ledger.close()
    path = rig.directory / "journal"
    path.write_bytes(bytes(path.stat().st_size))
    if how == "missing":
        path.unlink()
    ledger = rig.open()
    assert len(ledger.recovery.restored) == last
    assert verified(ledger) == last
    assert copies_of(ledger) == before
    ledger.close()
    (rig.directory / "ledger.db").unlink()
    assert copies_of(rig.open()) == before


@pytest.mark.parametrize("name", ["data", "chain"])
@pytest.mark.parametrize("database", [True, False])
def test_another_key_writes_nothing(rig: Rig, name: str, database: bool) -> None:
    ledger = rig.open()
    sale = rig.sell(ledger)
    ledger.close()
    if not database:
        (rig.directory / "ledger.db").unlink()

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in rig.directory.iterdir()}

    before = files()
    keys: dict[str, Any] = {"data": rig.keys.data, "chain": rig.keys.chain}
    other = SecretKey(seeded(77)(32))
    keys[name] = Keyring(other) if name == "data" else other
    wrong = TerminalKeys(
        **keys, signing=rig.keys.signing, host_sealing=rig.keys.host_sealing, host_answer=rig.keys.host_answer
    )
    with pytest.raises(KeyUnavailable, match=name):
        rig.open(keys=wrong)
    assert files() == before
    assert rig.open().transaction(sale.id) == sale


def test_a_newer_form_is_left_alone(rig: Rig) -> None:
    rig.open().close()
    database = sqlite3.connect(rig.directory / "ledger.db")
    database.execute("UPDATE meta SET schema_version = 9, reader_version_min = 9")
    database.commit()
    database.close()
    with pytest.raises(LedgerTooNew, match="form 9"):
        rig.open()


# Storage that refuses


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("where", ["write", "flush"])
def test_a_journal_that_cannot_be_written_stops_sales_and_loses_none(rig: Rig, number: int, where: str) -> None:
    medium = MemoryMedium(TINY.journal_size_bytes)
    ledger = rig.open(lambda *_: medium)
    sold = rig.sell(ledger)
    opened = rig.begin(ledger)

    def refuse(operation: str) -> None:
        if operation == where:
            raise OSError(number, "refused")

    medium.on_operation = refuse
    with pytest.raises(DiskTrouble, match="refused"):
        rig.finish(ledger, opened)
    medium.on_operation = lambda _: None
    for attempt in (lambda: rig.begin(ledger), lambda: ledger.transaction(sold.id), ledger.flush):
        with pytest.raises(DiskTrouble):  # nobody knows what is durable: not even a retry that would succeed
            attempt()
    after = restart(rig, medium.power_cut(random.Random(1)))
    assert after.transaction(sold.id) == sold
    resolve(after, rig.envelopes)
    assert not after.opened()


def sell_until_trouble(rig: Rig, ledger: Ledger, sold: list[Transaction]) -> Transaction | None:
    """The last one that could be begun. By itself, since a traceback that is kept keeps the database's statements."""
    opened = None
    for _ in range(600):
        try:
            opened = rig.begin(ledger)
            sold.append(rig.finish(ledger, opened))
        except DiskTrouble:
            return opened
    raise AssertionError("600 sales found room")


def test_a_full_disk_under_the_database_loses_nothing(rig: Rig) -> None:
    medium = MemoryMedium(SMALL.journal_size_bytes)
    ledger = rig.open(lambda *_: medium)
    sold = [rig.sell(ledger)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow any more.
    resource.setrlimit(resource.RLIMIT_FSIZE, ((rig.directory / "ledger.db-wal").stat().st_size, hard))
    try:
        opened = sell_until_trouble(rig, ledger, sold)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert opened is not None
    ledger.close()
    ledger = rig.open(lambda *_: medium)
    assert [ledger.transaction(sale.id) for sale in sold] == sold
    assert sold[-1].id == opened.id  # it was refused before it was begun
    rig.sell(ledger)


def test_a_read_only_disk_says_so(rig: Rig) -> None:
    def refuse(path: Path, size_bytes: int) -> Medium:
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.raises(DiskTrouble, match="Read-only"):
        rig.open(refuse)
    rig.open()  # and the lock was let go


# What was cut off


def test_resolve_ends_what_was_cut_off(rig: Rig) -> None:
    medium = MemoryMedium(TINY.journal_size_bytes)
    ledger = rig.open(lambda *_: medium)
    asked, sold = rig.sell(ledger, Decision.ONLINE), rig.sell(ledger)
    seen = rig.sell(ledger)
    ledger.mark_shown(seen.id, "approved")
    opened = rig.begin(ledger)
    ledger.flush()
    after = restart(rig, medium)
    resolution = resolve(after, rig.envelopes)
    assert resolution.voided == (opened.id,)
    assert resolution.reversed == (asked.id,)
    assert [sale.id for sale in resolution.unshown] == [sold.id]
    assert after.transaction(opened.id).state is State.VOID
    reversal = after.outbox_item(f"{asked.id}/reversal")
    assert rig.host.read(reversal.envelope or "")["reason"] == "recovered"
    assert reversal.urgent
    assert resolve(after, rig.envelopes).reversed == ()


def test_an_erasure_that_was_cut_off_is_finished(rig: Rig) -> None:
    medium = MemoryMedium(TINY.journal_size_bytes)
    ledger = rig.open(lambda *_: medium)
    sale = rig.sell(ledger)
    jws = rig.host.answer(rig.envelope(ledger, sale.id))
    rig.deliver(ledger, sale.id, Event.AUTHORISATION, jws)
    left = MemoryMedium(medium.size_bytes)
    left.now[:] = left.durable[:] = medium.durable  # the zeros were never flushed
    payload = slice(2 * SLOT_BYTES + 4096, 3 * SLOT_BYTES)
    assert any(left.now[payload])
    after = restart(rig, left)
    assert after.recovery.erased == 1
    assert not any(left.durable[payload])


def test_a_sale_cut_off_between_card_and_outcome_keeps_no_card_data(rig: Rig) -> None:
    medium = MemoryMedium(TINY.journal_size_bytes)
    ledger = rig.open(lambda *_: medium)
    sale = rig.begin(ledger)
    writes = 0

    def cut(operation: str) -> None:
        nonlocal writes
        writes += operation == "write"
        if writes == 2:
            raise PowerCut

    medium.on_operation = cut
    with pytest.raises(PowerCut):
        rig.finish(ledger, sale)
    medium.on_operation = lambda _: None
    payload = slice(2 * SLOT_BYTES + 4096, 3 * SLOT_BYTES)
    left = MemoryMedium(medium.size_bytes)
    left.now[:] = left.durable[:] = medium.now  # CARD reached the storage, OUTCOME did not
    assert any(left.durable[payload])
    after = restart(rig, left)
    assert after.recovery.erased == 1
    assert not any(left.durable[payload])
    assert resolve(after, rig.envelopes).voided == (sale.id,)
    assert after.outbox(9) == []
    assert rig.sell(after).number == 2


def test_the_journal_file_is_whole_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "journal.new").write_bytes(b"half made")
    medium = FileMedium.create(tmp_path / "journal", 3 * SLOT_BYTES)
    assert medium.size_bytes == 3 * SLOT_BYTES
    assert not any(medium.pread(3 * SLOT_BYTES, 0))
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]
    medium.close()

"""What is done while nobody waits: archiving, forgetting, resealing, checkpoints, reading through, bringing back."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from ledger_rig import MERCHANT, SMALL, TERMINAL, MemoryMedium, Rig, seeded, slots_start, verified

from terminal.ledger import restoring
from terminal.ledger.errors import BackupError, JournalFull, LedgerCorrupt, LedgerLocked
from terminal.ledger.journal import SLOT_BYTES
from terminal.ledger.keys import Keyring, SecretKey
from terminal.ledger.ledger import Ledger
from terminal.ledger.recovery import resolve
from terminal.ledger.sealing import Envelopes, verify_countersignature
from terminal.ledger.states import State
from terminal.ledger.upkeep import Retention
from terminal.ledger.values import Event, ReversalReason, Transaction, Verdict

SLOTS = 192
RING = replace(SMALL, journal_size_bytes=SLOTS * SLOT_BYTES)
DAY_MS = 86_400_000
STEPS_MAX = 2_000


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "state", settings=RING)
    yield made
    made.close_all()


def tidy(rig: Rig, ledger: Ledger) -> int:
    """Everything that is due now; how many pieces that were."""
    rig.clock.now_ms += 11_000  # upkeep looks every ten seconds
    for count in range(STEPS_MAX):
        if not ledger.upkeep.step(rig.envelopes):
            return count
    raise AssertionError("upkeep finds no end")


def sell(rig: Rig, ledger: Ledger, minor: int = 100, *, answered: bool = True) -> Transaction:
    sale = rig.sell(ledger, minor=minor)
    ledger.mark_shown(sale.id, "approved")
    if answered:
        sale = rig.deliver(ledger, sale.id, Event.AUTHORISATION, rig.host.answer(rig.envelope(ledger, sale.id)))
    return sale


def test_the_ring_goes_round_and_nothing_is_lost(rig: Rig) -> None:
    ledger = rig.open()
    sold = []
    for number in range(3 * SLOTS // 5):
        sold.append(sell(rig, ledger, minor=100 + number))
        if number % 5 == 0:
            tidy(rig, ledger)
    assert ledger.inspection.last > 2 * SLOTS
    assert verified(ledger) == ledger.inspection.last  # from the first record on: archive, then journal
    ledger.close()
    (rig.directory / "ledger.db").unlink()
    ledger = rig.open()
    assert ledger.recovery.rebuilt
    assert [ledger.transaction(sale.id) for sale in sold] == [replace(sale, shown="approved") for sale in sold]
    assert ledger.totals()[0].count == len(sold)


def test_without_upkeep_a_full_ring_refuses_before_the_card_is_asked(rig: Rig) -> None:
    ledger = rig.open()
    with pytest.raises(JournalFull):
        for _ in range(SLOTS):
            sell(rig, ledger)
    tidy(rig, ledger)
    sell(rig, ledger)


def test_what_is_unsent_is_never_archived_nor_overwritten(rig: Rig) -> None:
    ledger = rig.open()
    waiting = sell(rig, ledger, answered=False)
    with pytest.raises(JournalFull, match="network"):
        for _ in range(SLOTS):
            sell(rig, ledger)
            tidy(rig, ledger)
    assert ledger.inspection.check().archived == 0
    assert rig.envelope(ledger, waiting.id)
    rig.deliver(ledger, waiting.id, Event.AUTHORISATION, rig.host.answer(rig.envelope(ledger, waiting.id)))
    tidy(rig, ledger)
    sell(rig, ledger)


@pytest.mark.parametrize("seed", range(12))
def test_a_power_cut_in_upkeep_loses_nothing(rig: Rig, seed: int) -> None:
    """The journal's medium loses power while records move; archive and database are as they were last left."""
    chance = random.Random(seed)
    medium = MemoryMedium(RING.journal_size_bytes)
    ledger = rig.open(lambda *_: medium)
    sold = [sell(rig, ledger, minor=100 + number) for number in range(6)]
    for _ in range(8):
        sold.extend(sell(rig, ledger) for _ in range(3))
        rig.clock.now_ms += 11_000
        for _ in range(chance.randrange(6)):
            ledger.upkeep.step(rig.envelopes)
        left = medium.power_cut(chance)
        after = rig.directory.with_name(f"cut-{len(sold)}")
        shutil.copytree(rig.directory, after)
        with closing(rig.open(lambda *_, left=left: left, after)) as found:  # type: ignore[misc]
            assert {found.transaction(sale.id).state for sale in sold} == {State.SETTLED}
            assert verified(found) == found.inspection.last
            assert found.outbox(99) == [] or {item.event for item in found.outbox(99)} == {Event.CHECKPOINT}


def test_the_second_copy_serves_where_the_first_is_damaged(rig: Rig, tmp_path: Path) -> None:
    second = tmp_path / "stick" / "journal"
    second.parent.mkdir()
    second.write_bytes(bytes(RING.journal_size_bytes + SLOT_BYTES))
    rig.settings = replace(RING, second_journal=second)
    ledger = rig.open()
    sale = sell(rig, ledger, answered=False)
    tidy(rig, ledger)
    assert ledger.inspection.check().second == "in step"
    ledger.close()
    (rig.directory / "ledger.db").unlink()
    with (rig.directory / "journal").open("r+b") as file:
        file.seek(slots_start(rig.directory) + 3 * SLOT_BYTES)
        file.write(seeded(1)(SLOT_BYTES))
    ledger = rig.open()
    assert 4 in ledger.recovery.restored
    assert ledger.transaction(sale.id).state is State.ACCEPTED
    second.unlink()
    ledger.close()
    ledger = rig.open()
    assert "second copy" in (ledger.second_trouble or "")
    sell(rig, ledger)  # it never stops a sale
    ledger.look_around()
    assert any(record.body.get("what") == "second_journal" for record in ledger.inspection.records(0, 99))


# Forgetting


def test_cards_then_sales_are_forgotten_in_time_and_totals_stay(rig: Rig) -> None:
    rig.settings = replace(RING, retention=Retention(sales_days=10, card_days=3, audit_months=12))
    ledger = rig.open()
    old = sell(rig, ledger)
    waiting = sell(rig, ledger, answered=False)
    before = ledger.totals()
    rig.clock.now_ms += 4 * DAY_MS
    young = sell(rig, ledger)
    tidy(rig, ledger)
    assert ledger.transaction(old.id).card is None
    assert ledger.transaction(old.id).card_ref is None
    assert ledger.transaction(waiting.id).card is not None
    assert ledger.transaction(young.id).card is not None
    rig.clock.now_ms += 7 * DAY_MS
    tidy(rig, ledger)
    assert {sale.id for sale in ledger.transactions(99)} == {waiting.id, young.id}
    assert next(total.count for total in ledger.totals()) == before[0].count
    assert verified(ledger) == ledger.inspection.last


def test_nothing_is_forgotten_while_the_clock_is_not_set(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.settings = replace(RING, retention=Retention(sales_days=1, card_days=1, audit_months=1))
    ledger = rig.open()
    sale = sell(rig, ledger)
    monkeypatch.setattr(type(rig.clock), "synchronised", lambda _: False)
    rig.clock.now_ms += 400 * DAY_MS
    tidy(rig, ledger)
    assert ledger.transaction(sale.id).card is not None


def test_one_cardholder_is_exported_and_erased_everywhere(rig: Rig) -> None:
    ledger = rig.open()
    mine = sell(rig, ledger)
    archived = [sell(rig, ledger) for _ in range(6)]
    tidy(rig, ledger)
    assert ledger.inspection.check().archived > 0
    later = sell(rig, ledger)
    found = ledger.upkeep.of_card("card-ref-1")
    assert {sale.id for sale in found} == {mine.id, later.id, *(sale.id for sale in archived)}
    assert ledger.upkeep.erase_card("card-ref-1") == (8, 0)
    assert ledger.upkeep.of_card("card-ref-1") == []
    ledger.close()
    (rig.directory / "ledger.db").unlink()
    ledger = rig.open()  # from journal and archive: they do not bring it back
    assert ledger.upkeep.of_card("card-ref-1") == []
    assert all(sale.card is None for sale in ledger.transactions(99))
    assert ledger.transaction(mine.id).state is State.SETTLED
    assert verified(ledger) == ledger.inspection.last


def test_what_waits_for_the_host_is_kept_and_counted(rig: Rig) -> None:
    ledger = rig.open()
    sale = sell(rig, ledger)
    ledger.commit_reversal(sale.id, ReversalReason.VOID, rig.reversal(sale, ReversalReason.VOID))
    assert ledger.upkeep.erase_card("card-ref-1") == (0, 1)
    assert ledger.transaction(sale.id).card is not None


# Keys


def test_a_new_data_key_takes_over_while_selling_goes_on(rig: Rig) -> None:
    ledger = rig.open()
    sold = [sell(rig, ledger, minor=100 + number) for number in range(9)]
    ledger.close()
    old, new = rig.keys.data.current, SecretKey(seeded(99)(32))
    rig.keys = replace(rig.keys, data=Keyring(new, (old,)))
    ledger = rig.open()
    between = sell(rig, ledger)
    tidy(rig, ledger)
    use = ledger.inspection.key_use()
    assert set(use["cells"]) == {new.id}
    assert old.id in use["records"] or old.id in use["archive"]  # they cannot change: the chain is over them
    assert [ledger.transaction(sale.id).amount for sale in sold] == [sale.amount for sale in sold]
    assert ledger.transaction(between.id).state is State.SETTLED
    ledger.close()
    (rig.directory / "ledger.db").unlink()
    assert [rig.open().transaction(sale.id).amount for sale in sold[:1]] == [sold[0].amount]


# Checkpoints


def checkpoints(ledger: Ledger) -> list[Any]:
    return [item for item in ledger.outbox(99) if item.event is Event.CHECKPOINT]


def test_a_checkpoint_is_signed_and_countersigned(rig: Rig) -> None:
    ledger = rig.open()
    sell(rig, ledger)
    tidy(rig, ledger)
    (item,) = checkpoints(ledger)
    said = rig.host.read(item.envelope)
    assert said["event"] == "checkpoint"
    assert said["totals"] == [{"currency": "EUR", "count": 1, "sum": 100}]
    assert ledger.unsent() == []  # a checkpoint is no money
    verified(ledger)
    assert tidy(rig, ledger) == 0  # one a day
    rig.clock.now_ms += DAY_MS
    tidy(rig, ledger)
    (newer,) = checkpoints(ledger)
    assert newer.key != item.key  # the older one need not be sent any more
    jws = countersigned(rig, newer.envelope)
    id_ = UUID(newer.key.partition("/")[0])
    answer = verify_countersignature(
        jws, rig.keys.host_answer, id_=id_, terminal=said["terminal"], envelope=newer.sha256
    )
    for _ in range(2):  # a repetition is acknowledged
        assert ledger.commit_answers([(id_, Event.CHECKPOINT, answer, jws)]) == [Verdict.COUNTERSIGNED]
    assert checkpoints(ledger) == []
    assert ledger.inspection.verify_some(None).countersigned == rig.host.read(newer.envelope)["sequence"] + 1


def countersigned(rig: Rig, envelope: str) -> str:
    from terminal.ledger.sealing import digest

    asked = rig.host.read(envelope)
    return rig.host.sign({
        "v": 1, "event": "checkpoint", "checkpoint": asked["checkpoint"], "terminal": asked["terminal"],
        "sequence": asked["sequence"], "mac": asked["mac"], "envelope": digest(envelope),
        "decision": "countersigned", "reason": None, "answered_at": 1_790_000_000_500,
    })  # fmt: skip


# Time


def test_times_of_an_unset_clock_are_filled_in(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    right_ms = rig.clock.now_ms
    synchronised = False
    monkeypatch.setattr(type(rig.clock), "synchronised", lambda _: synchronised)
    wrong_by_ms = 20 * 365 * DAY_MS  # the Pi woke up in the past
    monkeypatch.setattr(type(rig.clock), "wall_ms", lambda clock: clock.now_ms - (0 if synchronised else wrong_by_ms))
    ledger = rig.open()
    sale = sell(rig, ledger)
    assert ledger.transaction(sale.id).opened_at_ms < right_ms - wrong_by_ms + DAY_MS
    assert not ledger.transaction(sale.id).corrected
    rig.clock.now_ms += 3_600_000
    synchronised = True
    ledger.look_around()
    ledger.flush()
    mended = ledger.transaction(sale.id)
    assert mended.corrected
    assert mended.opened_at_ms == right_ms + 1000
    (total,) = ledger.totals()
    assert total.day.startswith("2026")
    notes = [record.body["what"] for record in ledger.inspection.records(0, 99) if "what" in record.body]
    assert "clock_step" in notes
    assert "clock_set" in notes


def test_age_is_running_time_over_restarts_whatever_the_clock_says(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(rig.clock), "synchronised", lambda _: False)
    ledger = rig.open()
    sale = sell(rig, ledger, answered=False)
    ledger.note("idle")
    for hours in (5, 7, 9):
        rig.clock.now_ms += hours * 3_600_000
        ledger.note("idle")
        ledger.close()
        rig.clock.boot_id = UUID(int=hours)  # type: ignore[misc]
        started_ms = rig.clock.now_ms
        monkeypatch.setattr(type(rig.clock), "monotonic_ms", lambda clock, at=started_ms: clock.now_ms - at)
        monkeypatch.setattr(type(rig.clock), "wall_ms", lambda _: 0)  # 1970
        ledger = rig.open()
    age_ms = ledger.exposure(sale.amount.currency).age_ms
    assert 21 * 3_600_000 <= age_ms < 21 * 3_600_000 + 60_000


# Looking, and bringing back


@pytest.mark.parametrize("how", ["changed", "removed", "reordered", "replayed", "cut off"])
def test_verification_names_the_first_record_that_is_not_right(rig: Rig, how: str) -> None:
    ledger = rig.open()
    for _ in range(3):
        sell(rig, ledger)
    last = verified(ledger)
    ledger.close()
    with sqlite3.connect(rig.directory / "ledger.db") as database:
        database.execute("UPDATE records SET trimmed = zeroblob(200), payload = NULL")  # no copy to mend it from
    database.close()
    start = slots_start(rig.directory)
    content = bytearray((rig.directory / "journal").read_bytes())

    def slot(sequence: int) -> slice:
        return slice(start + (sequence - 1) * SLOT_BYTES, start + sequence * SLOT_BYTES)

    match how:
        case "changed":
            content[slot(5)][200:201] = b"\xff"
            content[start + 4 * SLOT_BYTES + 150] ^= 1
        case "removed":
            content[slot(5)] = bytes(SLOT_BYTES)
        case "reordered":
            content[slot(5)], content[slot(6)] = content[slot(6)], content[slot(5)]
        case "replayed":
            content[slot(5)] = content[slot(4)]
        case _:
            for sequence in range(5, last):
                content[slot(sequence)] = bytes(SLOT_BYTES)
    (rig.directory / "journal").write_bytes(content)
    ledger = rig.open()
    with pytest.raises(LedgerCorrupt, match="record 5 "):
        verified(ledger)


def test_a_backup_is_restored_under_a_new_epoch_with_what_waits(rig: Rig, tmp_path: Path) -> None:
    ledger = rig.open()
    done = [sell(rig, ledger) for _ in range(8)]
    tidy(rig, ledger)
    waiting = sell(rig, ledger, answered=False)
    envelope = rig.envelope(ledger, waiting.id)
    made = ledger.inspection.write_backup(tmp_path / "backup")
    assert made.records == verified(ledger)
    ledger.close()
    shutil.rmtree(rig.directory)
    restored = restore(rig, tmp_path / "backup")
    assert (restored.records, restored.newer, restored.epoch, restored.unsent) == (made.records, 0, 2, 1)
    assert restored.replaced is None
    ledger = rig.open()
    assert ledger.epoch == 2
    rig.envelopes = Envelopes(rig.keys.signing, rig.keys.host_sealing, TERMINAL, MERCHANT, ledger.epoch)
    assert rig.envelope(ledger, waiting.id) == envelope  # the very same: the host knows it if it has come before
    assert {ledger.transaction(sale.id).state for sale in done} == {State.SETTLED}
    rig.deliver(ledger, waiting.id, Event.AUTHORISATION, rig.host.answer(envelope))
    assert sell(rig, ledger).number > waiting.number
    tidy(rig, ledger)
    assert verified(ledger) == ledger.inspection.last
    (checkpoint,) = checkpoints(ledger)
    assert rig.host.read(checkpoint.envelope)["epoch_of"]["epoch"] == 1


def restore(rig: Rig, path: Path) -> restoring.Restored:
    return restoring.restore(rig.directory, path, rig.keys, settings=rig.settings, clock=rig.clock, entropy=rig.entropy)


def test_a_whole_ledger_is_not_replaced_by_its_past(rig: Rig, tmp_path: Path) -> None:
    ledger = rig.open()
    sell(rig, ledger)
    ledger.inspection.write_backup(tmp_path / "backup")
    newer = sell(rig, ledger)
    with pytest.raises(LedgerLocked):
        restore(rig, tmp_path / "backup")
    ledger.close()
    with pytest.raises(BackupError, match="nothing needs to be brought back"):
        restore(rig, tmp_path / "backup")
    assert rig.open().transaction(newer.id).state is State.SETTLED


def test_newer_sales_of_a_damaged_ledger_are_taken_along(rig: Rig, tmp_path: Path) -> None:
    ledger = rig.open()
    first = sell(rig, ledger)
    ledger.inspection.write_backup(tmp_path / "backup")
    newer = [sell(rig, ledger, answered=False) for _ in range(3)]
    ledger.close()
    (rig.directory / "ledger.db").unlink()
    with (rig.directory / "journal").open("r+b") as file:  # the beginning is gone: this one does not open any more
        file.seek(slots_start(rig.directory) + SLOT_BYTES)
        file.write(seeded(3)(2 * SLOT_BYTES))
    with pytest.raises(LedgerCorrupt):
        rig.open()
    restored = restore(rig, tmp_path / "backup")
    assert restored.newer > 0
    assert restored.unsent == 3
    assert restored.replaced is not None
    assert (restored.replaced / "journal").exists()
    ledger = rig.open()
    assert {ledger.transaction(sale.id).state for sale in newer} == {State.ACCEPTED}
    assert ledger.transaction(first.id).state is State.SETTLED
    assert resolve(ledger, rig.envelopes).voided == ()


def test_another_history_is_not_replaced(rig: Rig, tmp_path: Path) -> None:
    ledger = rig.open()
    sell(rig, ledger)
    ledger.inspection.write_backup(tmp_path / "backup")
    ledger.close()
    shutil.rmtree(rig.directory)
    ledger = rig.open()
    sell(rig, ledger)
    ledger.close()
    with pytest.raises(BackupError, match="another history"):
        restore(rig, tmp_path / "backup")

"""The database by itself: what records make of it, what it forgets and keeps, keys, space."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_rig import FixedClock, seeded
from store_rig import (
    CHAIN,
    DAY_MS,
    KEYS,
    NEW,
    OLD,
    START_MS,
    PowerCut,
    Tape,
    cells,
    copied,
    cut_at,
    erase,
    open_store,
    sold,
)

from terminal.ledger.errors import DiskTrouble, KeyUnavailable, LedgerCorrupt
from terminal.ledger.journal import Record, RecordType
from terminal.ledger.keys import Keyring, SecretKey
from terminal.ledger.states import State
from terminal.ledger.store import Running, Store

BOTH = Keyring(NEW, (OLD,))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state" / "ledger.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = open_store(path)
    yield store
    store.close()


@pytest.fixture
def tape() -> Tape:
    return Tape()


def id_of(facts: dict[str, str]) -> UUID:
    return UUID(facts["transaction"])


def state_of(store: Store, facts: dict[str, str]) -> State:
    found = store.transaction(id_of(facts))
    assert found is not None
    return found.state


# What is applied and what is rebuilt

_ACTIONS: list[Callable[[Tape, random.Random], object]] = [
    lambda tape, _: sold(tape),
    lambda tape, chance: tape.sell(reference=f"order-{chance.random()}"),
    lambda tape, _: tape.outcome(tape.open(), "declined", sends=False),
    lambda tape, _: tape.outcome(tape.open(), "void", sends=False),
    lambda tape, _: tape.open(),
    lambda tape, _: tape.answer(tape.sell("online"), "declined", card_ref=None),
    lambda tape, _: tape.outcome(tape.sell("online"), "accepted", sends=False),
    lambda tape, _: tape.reverse(sold(tape)),
    lambda tape, _: inserted(tape),
    lambda tape, _: voided(tape),
    lambda tape, _: tape.checkpoint(),
    lambda tape, _: tape.answer(tape.checkpoint(), "countersigned", "checkpoint"),
    lambda tape, _: tape.event("link", online=True),
    lambda tape, chance: tape.reboot(synchronised=chance.random() < 0.5, offset_ms=chance.randrange(START_MS)),
    lambda tape, chance: tape.clock_set(START_MS + chance.randrange(3) * DAY_MS),
]


def inserted(tape: Tape) -> None:
    sale = tape.sell("online", contact=True)
    tape.answer(sale, "approved")
    tape.outcome(sale, "completed", sends=False, contact=True)


def voided(tape: Tape) -> None:
    sale = tape.sell()
    tape.reverse(sale)
    tape.answer(sale, "reversed", "reversal")


def without_what_was_erased(records: list[Record], erased: set[int]) -> list[Record]:
    """As a journal gives them again whose payloads have been overwritten."""
    return [replace(r, payload=None, content=None) if r.sequence in erased else r for r in records]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    actions=st.lists(st.integers(0, len(_ACTIONS) - 1), min_size=1, max_size=25),
    seed=st.integers(0, 2**16),
    reduces=st.booleans(),
)
def test_what_is_rebuilt_equals_what_was_applied_cell_by_cell(
    tmp_path_factory: pytest.TempPathFactory, actions: list[int], seed: int, reduces: bool
) -> None:
    directory = tmp_path_factory.mktemp("cells")
    chance = random.Random(seed)
    tape = Tape(chance=chance)
    for action in actions:
        _ACTIONS[action](tape, chance)
    erased: set[int] = set()
    with closing(open_store(directory / "applied.db")) as applied:
        records = iter(tape.records)
        while batch := list(islice(records, chance.randint(1, 5))):
            applied.apply(batch)
            erased.update(erase(applied))
        if reduces:
            applied.reduce([sale.id for sale in applied.transactions(5, 99)])
            erased.update(erase(applied))
    with closing(open_store(directory / "rebuilt.db", seed=2)) as rebuilt:
        rebuilt.apply(without_what_was_erased(tape.records, erased))
        erase(rebuilt)
    assert cells(directory / "applied.db") == cells(directory / "rebuilt.db")


def test_the_comparison_notices_one_cell(path: Path, store: Store, tape: Tape) -> None:
    """Control: the test above can fail."""
    sold(tape)
    store.apply(tape.records)
    store.close()
    other = path.with_name("other.db")
    changed = [replace(r, body=r.body | {"rrn": "1"}) if r.type is RecordType.ANSWER else r for r in tape.records]
    with closing(open_store(other)) as second:
        second.apply(changed)
    assert cells(path) != cells(other)


def test_a_record_counts_once_and_a_batch_wholly_or_not_at_all(store: Store, tape: Tape) -> None:
    sale = sold(tape)
    store.apply(tape.records)
    before = (store.transaction(id_of(sale)), store.totals())
    with pytest.raises(LedgerCorrupt, match="twice"):
        store.apply(tape.records[-1:])
    good = tape.sell()
    tape.outcome(good, "completed", sends=False)  # fits no accepted sale
    with pytest.raises(LedgerCorrupt) as caught:
        store.apply(tape.records[5:])
    assert caught.value.sequence == tape.records[-1].sequence
    assert store.transaction(id_of(good)) is None
    assert (store.transaction(id_of(sale)), store.totals()) == before
    with pytest.raises(LedgerCorrupt):
        stranger = Tape(chance=random.Random(99))
        stranger.records.extend(tape.records[:5])
        stranger.show({"transaction": str(UUID(int=5))})
        store.apply(stranger.records[5:])


def test_records_from_the_middle_are_applied_as_far_as_they_speak_for_themselves(store: Store, tape: Tape) -> None:
    """The oldest ones are gone for good: a late SHOWN or ANSWER is then no contradiction, a reversal still goes out."""
    sale = sold(tape)
    first = len(tape.records)
    tape.show(sale)
    tape.reverse(sale)
    later = tape.sell()
    store.apply(tape.records[first:])
    assert store.transaction(id_of(sale)) is None
    assert state_of(store, later) is State.ACCEPTED
    assert [item.key for item, _ in store.outbox(9)] == [
        f"{sale['transaction']}/reversal",
        f"{later['transaction']}/authorisation",
    ]
    tape.answer(sale, "reversed", "reversal")
    store.apply(tape.records[-1:])
    assert store.waiting_transactions() == {id_of(later)}


# Checkpoints


def test_only_the_newest_checkpoint_waits_and_none_is_money(store: Store, tape: Tape) -> None:
    sale = tape.sell()
    older, newer = tape.checkpoint(), tape.checkpoint()
    store.apply(tape.records)
    keys = [item.key for item, held in store.outbox(9) if held]
    assert keys == [f"{sale['transaction']}/authorisation", f"{newer['transaction']}/checkpoint"]
    assert store.waiting_count() == 1
    assert [each.count for each in store.unsent()] == [1]
    assert store.erasable() == [4]  # the older one's
    assert store.outbox_item(f"{older['transaction']}/checkpoint") is not None
    assert (store.last_checkpoint(), store.countersigned()) == (5, None)
    tape.answer(newer, "countersigned", "checkpoint")
    store.apply(tape.records[5:])
    assert (store.last_checkpoint(), store.countersigned()) == (5, 5)
    assert [item.key for item, _ in store.outbox(9)] == [f"{sale['transaction']}/authorisation"]
    assert store.last_envelope_number() == 3
    erase(store)
    store.prune(0, 1)
    assert store.outbox_item(f"{older['transaction']}/checkpoint") is None
    assert store.outbox_item(f"{newer['transaction']}/checkpoint") is not None


# Time


def test_running_time_is_summed_over_boots_and_never_goes_back(store: Store, tape: Tape) -> None:
    tape.now_ms = 10_000
    tape.event("start")
    tape.now_ms = 12_000
    tape.event("a")
    tape.now_ms = 11_000  # two threads: the later record has the earlier time
    tape.event("b")
    tape.now_ms = 13_000
    first = tape.open()
    tape.reboot(synchronised=True)
    second = tape.open()
    store.apply(tape.records)
    found = [store.transaction(id_of(sale)) for sale in (first, second)]
    assert [sale and sale.running_ms for sale in found] == [14_000, 15_500]
    running = store.running()
    assert running == Running(15_500, UUID(int=2), 1_500)
    clock = FixedClock()
    assert running.until(clock) == 15_500 + clock.monotonic_ms()  # another boot
    clock.boot_id = UUID(int=2)
    assert running.until(clock) == 15_500 + clock.monotonic_ms() - 1_500


def test_a_clock_that_is_set_corrects_this_boots_sales_and_their_day(store: Store, tape: Tape) -> None:
    tape.reboot(synchronised=False, offset_ms=5 * DAY_MS)
    other_boot = tape.sell(minor=100)
    tape.reboot(synchronised=False, offset_ms=9 * DAY_MS)
    unshown = tape.sell(minor=200)
    declined = tape.open(minor=400)
    tape.outcome(declined, "declined", sends=False)
    store.apply(tape.records)
    assert [(total.day, total.sum_minor) for total in store.totals()] == [("1970-01-06", 100), ("1970-01-10", 200)]
    tape.clock_set()
    store.apply(tape.records[-1:])
    corrected = store.transaction(id_of(unshown))
    assert corrected is not None
    assert (corrected.opened_at_ms, corrected.corrected, corrected.clock_synchronised) == (
        START_MS + 1_500,
        True,
        False,
    )
    left = store.transaction(id_of(other_boot))
    assert left is not None
    assert (left.opened_at_ms // DAY_MS, left.corrected) == (5, False)
    totals = {total.day: (total.sum_minor, total.count) for total in store.totals() if total.count}
    assert totals == {"1970-01-06": (100, 1), "2026-09-21": (200, 1)}
    # What became final without a clock counts from when there was one: it is not forgotten at once.
    assert store.prune(START_MS, 9) == 0
    assert store.prune(START_MS + DAY_MS, 9) == 1
    assert store.transaction(id_of(declined)) is None


# Forgetting


def test_a_card_is_forgotten_and_nothing_else(path: Path, store: Store, tape: Tape) -> None:
    mine, other = sold(tape), None
    other = tape.sell()
    tape.answer(other, "approved", card_ref="card-2")
    store.apply(tape.records)
    erase(store)
    before = store.transaction(id_of(mine))
    assert before is not None
    assert [sale.id for sale in store.by_card_ref("card-1")] == [id_of(mine)]
    sequences = store.reduce([id_of(mine), UUID(int=1)])
    types = {record.sequence: record.type for record in tape.records}
    assert [types[sequence] for sequence in sequences] == [RecordType.OUTCOME, RecordType.ANSWER]
    assert store.by_card_ref("card-1") == []
    assert store.transaction(id_of(mine)) == replace(before, card=None, card_ref=None)
    assert [sale.id for sale in store.by_card_ref("card-2")] == [id_of(other)]
    assert all(copy and copy[1] is None for copy in map(store.copy, sequences))
    # Until the journal has done so, too, a restart finds what is left to do, and no slot is given up.
    assert store.reclaimable() < sequences[0]
    store.close()
    again = open_store(path)
    assert again.erasable() == sequences
    erase(again)
    assert again.erasable() == []
    assert again.reclaimable() >= sequences[-1]
    assert again.reduce([id_of(mine)]) == []
    again.close()
    row = next(row for row in cells(path)["transactions"] if row["number"] == 1)
    assert (row["card_tag"], row["has_card"], row["details"]["scheme"]) == (None, 0, "visa")


def test_what_somebody_waits_for_is_not_pruned(store: Store, tape: Tape) -> None:
    done = sold(tape)
    unshown = tape.sell()
    tape.answer(unshown, "approved")
    waiting, reversing = tape.sell(), tape.sell()
    tape.show(waiting)
    tape.reverse(reversing)
    opened = tape.open()
    tape.synchronised = False
    undated = sold(tape)
    store.apply(tape.records)
    assert store.prune(START_MS + DAY_MS, 9) == 0  # nothing is erased in the journal yet
    assert store.with_card_before(START_MS + DAY_MS, 9) == []
    erase(store)
    assert store.prune(START_MS, 9) == 0  # nothing is that old
    assert store.with_card_before(START_MS + DAY_MS, 9) == [id_of(done), id_of(unshown)]
    totals, numbers = store.totals(), (store.last_number(), store.last_envelope_number())
    assert store.prune(START_MS + DAY_MS, 9) == 1
    assert store.transaction(id_of(done)) is None
    assert store.outbox_item(f"{done['transaction']}/authorisation") is None
    assert all(store.transaction(id_of(sale)) for sale in (unshown, waiting, reversing, opened, undated))
    assert store.totals() == totals
    tape.synchronised = True
    tape.show(unshown)
    store.apply(tape.records[-1:])
    assert store.prune(START_MS + DAY_MS, 9) == 1
    assert (store.last_number(), store.last_envelope_number()) == numbers


def test_prune_keeps_to_its_limit_and_numbers_go_on(path: Path, store: Store, tape: Tape) -> None:
    for _ in range(5):
        sold(tape)
    store.apply(tape.records)
    erase(store)
    assert [store.prune(START_MS + DAY_MS, 2) for _ in range(4)] == [2, 2, 1, 0]
    assert store.transactions(9, 99) == []
    store.close()
    with closing(open_store(path)) as again:
        assert (again.last_number(), again.last_envelope_number()) == (5, 5)


def test_records_are_dropped_only_when_nothing_needs_them(store: Store, tape: Tape) -> None:
    tape.event("start")
    old, kept = sold(tape), tape.sell()
    tape.checkpoint()
    tape.event("stop")
    store.apply(tape.records)
    erase(store)
    assert store.drop_records(6, 9) == 1  # the first event
    assert store.prune(START_MS + DAY_MS, 9) == 1
    assert [store.drop_records(6, 3) for _ in range(3)] == [3, 2, 0]
    assert [sequence for sequence in range(1, 12) if store.copy(sequence)] == [7, 8, 9, 10, 11]
    assert store.drop_records(11, 9) == 1  # the last event; the checkpoint waits
    assert store.transaction(id_of(old)) is None
    assert state_of(store, kept) is State.ACCEPTED
    assert store.lost_envelope() is None


def test_what_the_journal_may_reuse(store: Store, tape: Tape) -> None:
    def after(records: int) -> int:
        store.apply(tape.records[records:])
        erase(store)
        return store.reclaimable()

    sale = sold(tape)
    assert after(0) == 5
    waiting = tape.sell()  # 6, 7, 8
    tape.checkpoint()
    assert after(5) == 5
    tape.show(waiting)
    tape.answer(waiting, "approved")
    assert after(9) == 11
    unshown = tape.sell("online")
    tape.answer(unshown, "approved")
    assert after(11) == 11
    tape.show(unshown)
    assert after(15) == 16
    tape.reverse(sale)  # 17
    assert after(16) == 0  # its own records from the first one on
    tape.answer(sale, "reversed", "reversal")
    assert after(17) == 18


# Keys


def filled(path: Path, tape: Tape) -> int:
    """A database under the old key; how many cells it has."""
    with closing(open_store(path)) as store:
        for minor in (100, 200, 300):
            sold(tape, minor=minor)
        store.apply(tape.records)
        assert set(store.sealed_under()) == {OLD.id}
        return store.sealed_under()[OLD.id]


def test_cells_move_to_the_current_key_in_small_steps(path: Path, tape: Tape) -> None:
    total = filled(path, tape)
    before = cells(path)
    store = open_store(path, BOTH)
    left = [store.reseal(4) for _ in range(4)]
    assert left == [total - 4, total - 8, 0, 0]
    assert store.sealed_under() == {NEW.id: total}
    assert store.records_under() == {OLD.id: len(tape.records)}
    store.close()
    after = cells(path, Keyring(NEW))
    assert after.pop("meta")[0]["data_key_id"] == NEW.id
    before.pop("meta")
    assert after == before


def test_while_cells_are_under_two_keys_both_are_needed(path: Path, tape: Tape) -> None:
    filled(path, tape)
    store = open_store(path, BOTH)
    store.reseal(4)
    store.close()
    for keys in (Keyring(OLD), Keyring(NEW), Keyring(SecretKey(bytes(32)))):
        alone = Store(path, keys, CHAIN, seeded(1))
        with pytest.raises(KeyUnavailable):
            alone.open()
        alone.close()
    with closing(open_store(path, BOTH)) as store:
        assert store.reseal(99) == 0
    with closing(open_store(path, Keyring(NEW))) as store:  # control: now one is enough
        assert len(store.transactions(9, 99)) == 3


def test_resealing_cut_off_at_any_statement_loses_nothing(
    path: Path, tmp_path: Path, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(path, tape)
    before = cells(path)["transactions"]
    cuts = 0
    for statement in range(1, 200):
        one = copied(path, tmp_path / f"cut-{statement}")
        store = open_store(one, BOTH)
        through = False
        with cut_at(monkeypatch, statement), suppress(PowerCut):
            while store.reseal(4):
                pass
            through = True
        left = copied(one, tmp_path / f"left-{statement}")
        store.close()
        with closing(open_store(left, BOTH)) as again:
            assert [sale.amount.minor for sale in again.transactions(9, 99)] == [300, 200, 100]
            while again.reseal(3):
                pass
        assert cells(left, Keyring(NEW))["transactions"] == before, f"cut at statement {statement}"
        if through:
            break
        cuts += 1
    assert cuts > 20


def test_a_cell_that_was_copied_is_not_sealed_anew(path: Path, tape: Tape) -> None:
    """Moving to another key must not make a forged cell genuine."""
    filled(path, tape)
    with closing(open_store(path, BOTH)) as store:
        store._database.run(
            "UPDATE transactions SET amount_minor = (SELECT amount_minor FROM transactions WHERE number = 3)"
            " WHERE number = 1"
        )
        with pytest.raises(LedgerCorrupt, match="amount_minor"):
            store.reseal(99)
        assert set(store.sealed_under()) == {OLD.id}  # all or nothing


# Space


def fill_up(store: Store) -> None:
    """The disk is full: the database cannot grow by a page."""
    pages = store._database.number("PRAGMA page_count")
    store._database.rows(f"PRAGMA max_page_count = {pages}")


def test_reserved_pages_take_sales_on_a_full_disk(path: Path, store: Store, tape: Tape) -> None:
    store.size_log(64 * 4096)
    log = path.with_name("ledger.db-wal")
    log_bytes = log.stat().st_size
    store.reserve(300)
    assert 300 <= store.spare_pages() <= 400
    size_bytes = path.stat().st_size
    assert size_bytes >= 300 * 4096  # on the storage, not only in the log
    fill_up(store)
    for _ in range(60):
        done = len(tape.records)
        sold(tape)
        store.apply(tape.records[done:])
        erase(store)
    assert (path.stat().st_size, log.stat().st_size) == (size_bytes, log_bytes)
    assert store.integrity() == "whole"


def test_a_full_disk_is_said_before_the_sale_and_loses_nothing(path: Path, store: Store, tape: Tape) -> None:
    sale = sold(tape)
    store.apply(tape.records)
    fill_up(store)
    with pytest.raises(DiskTrouble, match="full"):
        store.reserve(500)
    spare = store.spare_pages()
    with pytest.raises(DiskTrouble, match="full"):  # control: without reserved pages a sale does not fit
        while True:
            done = len(tape.records)
            sold(tape)
            store.apply(tape.records[done:])
    assert state_of(store, sale) is State.SETTLED
    assert spare < 500
    store.close()
    with closing(open_store(path)) as again:
        again.reserve(500)  # there is room again; what the attempt had left is gone
        assert again.spare_pages() >= 500
        assert again.integrity() == "whole"


def test_reserving_cut_off_at_any_statement_is_tidied_up(
    path: Path, tmp_path: Path, store: Store, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    sold(tape)
    store.apply(tape.records)
    store.close()
    before = cells(path)
    for statement in range(1, 200):
        one = copied(path, tmp_path / f"cut-{statement}")
        cut = open_store(one)
        cut.size_log(16 * 4096)
        through = False
        with cut_at(monkeypatch, statement), suppress(PowerCut):
            cut.reserve(30)
            through = True
        left = copied(one, tmp_path / f"left-{statement}")
        cut.close()
        with closing(open_store(left)) as again:
            again.size_log(16 * 4096)
            again.reserve(30)
        assert cells(left) == before
        if through:
            break
    assert statement > 15


def test_keys_are_looked_at_before_anything_is_written(path: Path, tape: Tape) -> None:
    filled(path, tape)
    before = path.read_bytes()
    for keys, chain in ((Keyring(NEW), CHAIN), (KEYS, SecretKey(bytes(32)))):
        store = Store(path, keys, chain, seeded(1))
        with pytest.raises(KeyUnavailable, match="nothing was changed"):
            store.open()
        store.close()
    assert path.read_bytes() == before

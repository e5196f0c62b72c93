"""One bit, or one block, of the storage goes bad, anywhere: nobody is told anything wrong, and no sale is lost.

Two thousand flipped bits and five hundred destroyed blocks over every file, one at a time, each judged on its own
(corruption_rig). `python -m tests.soak.corruption` does more of the same with other seeds.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from corruption_rig import STATE, Damage, Finding, Ground, Variant, Verdict, Way, damages, ground, judge, workplace

from terminal.ledger.journal import BLOCK_BYTES, SLOT_BYTES
from terminal.ledger.ledger import Ledger
from terminal.ledger.recovery import SecondCopy
from terminal.ledger.tally import Tally
from terminal.ledger.values import Transaction
from terminal.money import Amount

CHUNKS = 5  # of each variant: so that they can run beside each other
FLIPS = {Variant.CLOSED: 120, Variant.KILLED: 120, Variant.MIRRORED: 100, Variant.AGED: 60}  # in each
BLOCKS = {variant: flips // 4 for variant, flips in FLIPS.items()}


@pytest.fixture
def root() -> Iterator[Path]:
    made = workplace()
    yield made / "files"
    shutil.rmtree(made)


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("variant", Variant, ids=lambda variant: variant.value)
def test_no_damage_is_silent_and_none_costs_a_sale(root: Path, variant: Variant, chunk: int) -> None:
    made = ground(variant)
    seed = 1000 * chunk + 1
    findings = [judge(made, damage, root) for damage in damages(made, seed, FLIPS[variant], BLOCKS[variant])]
    assert [f"seed {seed}: {finding}" for finding in findings if finding.verdict.wrong] == []
    assert {Path(finding.damage.file).suffix for finding in findings if finding.verdict is Verdict.NAMED} <= {
        ".segment"
    }
    counts = Counter(finding.verdict for finding in findings)
    print(f"{variant.value}, seed {seed}: {dict(counts)}")
    assert counts[Verdict.HEALED] >= FLIPS[variant] // 10  # or hardly anything was hit


# What is changed, and no structure suffers: SQLite says nothing to any of these.
WAITING = "(SELECT MAX(sequence) FROM outbox WHERE answered = 0)"
CHANGES = (
    "UPDATE outbox SET answered = 1 WHERE number = (SELECT MAX(number) FROM outbox WHERE answered = 0)",
    "UPDATE outbox SET answered = 0 WHERE number = (SELECT MIN(number) FROM outbox WHERE answered = 1)",
    "UPDATE outbox SET sequence = sequence + 1 WHERE number = (SELECT MAX(number) FROM outbox)",
    "UPDATE outbox SET sha256 = replace(sha256, 'a', 'b')",
    "UPDATE transactions SET state = 'settled' WHERE state = 'accepted'",
    "UPDATE transactions SET state = 'acceptee' WHERE state = 'accepted'",
    "UPDATE transactions SET shown = 'approved' WHERE shown IS NULL",
    "UPDATE transactions SET number = 9999 WHERE number = 20",
    "UPDATE transactions SET running_ms = running_ms + 1048576 WHERE number = 20",
    "UPDATE transactions SET reference_tag = randomblob(16) WHERE number = 20",
    "UPDATE transactions SET card_tag = randomblob(16) WHERE number = 5",
    "UPDATE transactions SET id = 'no id' WHERE number = 20",
    "UPDATE records SET forgotten = 1 WHERE sequence = :waiting",
    "UPDATE records SET payload = NULL WHERE sequence = :waiting",
    "UPDATE records SET payload = randomblob(900) WHERE sequence = :waiting",
    "UPDATE records SET trimmed = randomblob(400) WHERE sequence = :waiting",
    "UPDATE records SET \"transaction\" = 'no id' WHERE sequence = (SELECT MAX(sequence) FROM outbox)",
    "UPDATE records SET type = 7 WHERE sequence = 100",
    "UPDATE meta SET last_number = 3",
    "UPDATE meta SET last_envelope_number = 3",
    "UPDATE meta SET sequence = sequence - 3",
    "UPDATE meta SET mac = randomblob(32)",
    "UPDATE meta SET running_ms = 0",
    "UPDATE meta SET data_key_id = randomblob(4)",
    "UPDATE meta SET chain_key_id = randomblob(4)",
    "UPDATE meta SET schema_version = 4",
    "UPDATE meta SET reader_version_min = 4",
    "DELETE FROM totals",
)


@pytest.mark.parametrize("change", CHANGES)
def test_no_value_is_believed_that_was_not_written(root: Path, change: str) -> None:
    made = ground(Variant.CLOSED)
    made.lay_out(root)
    path = root / STATE / "ledger.db"
    with closing(sqlite3.connect(path)) as database:
        assert database.execute(change.replace(":waiting", WAITING)).rowcount > 0
        database.commit()
    after = path.read_bytes()
    found = judge(replace(made, files=made.files | {f"{STATE}/ledger.db": after}), NOTHING, root)
    assert found.verdict is Verdict.HEALED, str(found)


def test_an_index_that_lost_its_entries_is_noticed(root: Path) -> None:
    """The rows are all there: only whoever asks for what waits, or is at risk, would not find them."""
    made = ground(Variant.CLOSED)
    made.lay_out(root)
    path = root / STATE / "ledger.db"
    with closing(sqlite3.connect(path)) as database:
        pages = dict(database.execute("SELECT name, rootpage FROM sqlite_master WHERE type = 'index'"))
    for name, page in pages.items():
        if name.startswith(("transaction", "outbox", "records_with_card", "records_forgotten")):
            empty = b"\x0a" + bytes(4) + b"\x10\x00\x00"  # the head of a leaf without cells
            content = empty.ljust(BLOCK_BYTES, b"\0")
            found = judge(made, Damage(f"{STATE}/ledger.db", Way.OTHER, (page - 1) * BLOCK_BYTES, content), root)
            assert not found.verdict.wrong, f"{name}: {found}"


NOTHING = Damage(f"{STATE}/journal", Way.ZEROS, 0, b"")


@pytest.mark.parametrize("variant", Variant, ids=lambda variant: variant.value)
def test_without_damage_nothing_is_found(root: Path, variant: Variant) -> None:
    made = ground(variant)
    found = judge(made, NOTHING, root)
    assert found.verdict in {Verdict.WHOLE, Verdict.HEALED}, str(found)  # healed: what a killed process left to redo


def newest_segment(made: Ground) -> str:
    return max(name for name in made.files if name.endswith(".segment"))


@pytest.mark.parametrize("variant", [Variant.CLOSED, Variant.AGED], ids=lambda variant: variant.value)
def test_the_front_of_the_newest_segment_is_written_again_from_the_ring(root: Path, variant: Variant) -> None:
    """It says where the archive ends: without it, nothing would start."""
    made = ground(variant)
    name = newest_segment(made)
    found = judge(made, Damage(name, Way.RANDOM, 0, bytes(BLOCK_BYTES)), root)
    assert found.verdict in {Verdict.WHOLE, Verdict.HEALED}, str(found)
    assert (root / name).read_bytes() != bytes(BLOCK_BYTES)


def test_a_damaged_segment_is_named_and_stops_no_sale(root: Path) -> None:
    made = ground(Variant.AGED)
    name = min(name for name in made.files if name.endswith(".segment"))
    found = judge(made, Damage(name, Way.FLIP, 8 * 1000), root)
    assert found.verdict is Verdict.NAMED
    assert Path(name).name in found.detail


# Controls: what is above can fail.


def live_slot(made: Ground) -> Damage:
    """The newest record's block, zeros."""
    start = made.files[f"{STATE}/journal"].index(b"PTJ1") % SLOT_BYTES
    return Damage(f"{STATE}/journal", Way.ZEROS, start + (made.last - 8) * SLOT_BYTES, bytes(BLOCK_BYTES))


def test_without_the_second_copy_a_damaged_record_ends_selling(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ground(Variant.CLOSED)
    assert judge(made, live_slot(made), root).verdict is Verdict.HEALED
    monkeypatch.setattr(SecondCopy, "__call__", lambda *_: None)
    found = judge(made, live_slot(made), root)
    assert found.verdict is Verdict.REFUSED
    assert f"record {made.last - 7} " in found.detail


def test_without_the_sum_damage_of_the_database_is_believed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ground(Variant.CLOSED)
    monkeypatch.setattr(Tally, "seal", lambda *_: b"never changes")
    monkeypatch.setattr(Tally, "indexed", lambda _: True)
    made = replace(made, files=made.files | {f"{STATE}/ledger.db": unsealed(made, root)})
    path = root / STATE / "ledger.db"
    verdicts = Counter[Verdict]()
    for change in CHANGES:
        made.lay_out(root)
        with closing(sqlite3.connect(path)) as database:
            database.execute(change.replace(":waiting", WAITING))
            database.commit()
        changed = replace(made, files=made.files | {f"{STATE}/ledger.db": path.read_bytes()})
        verdicts[judge(changed, NOTHING, root).verdict] += 1
    assert verdicts[Verdict.SILENT] >= 3, verdicts
    assert verdicts[Verdict.CRASHED] + verdicts[Verdict.REFUSED] >= 3, verdicts


def unsealed(made: Ground, root: Path) -> bytes:
    made.lay_out(root)
    path = root / STATE / "ledger.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE meta SET seal = CAST('never changes' AS BLOB)")
        database.commit()
    return path.read_bytes()


@pytest.mark.parametrize("what", ["amount", "missing", "envelope", "exposure"])
def test_the_judge_sees_one_wrong_answer(root: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    made = ground(Variant.CLOSED)
    asked = Ledger.transactions

    def wrong(ledger: Ledger, *args: int) -> list[Transaction]:
        found = asked(ledger, *args)
        if what == "missing":
            return found[1:]
        return [replace(found[0], amount=Amount(found[0].amount.minor + 1, found[0].amount.currency)), *found[1:]]

    match what:
        case "amount" | "missing":
            monkeypatch.setattr(Ledger, "transactions", wrong)
        case "envelope":
            monkeypatch.setattr(Ledger, "outbox", lambda *_: [])
        case _:
            exposure = Ledger.exposure
            monkeypatch.setattr(Ledger, "exposure", lambda *args: replace(exposure(*args), sum_minor=1))
    found: Finding = judge(made, NOTHING, root)
    assert found.verdict is Verdict.SILENT
    assert found.detail


def test_every_state_and_every_kind_of_file_is_there() -> None:
    states = {sale.state.value for sale in ground(Variant.CLOSED).told.transactions.values()}
    assert states == {
        "opened", "authorising", "accepted", "declined", "void", "completing", "approved", "settled", "refused",
        "reversing", "reversed",
    }  # fmt: skip
    files = {Path(name).name.partition(".")[2] or Path(name).name for v in Variant for name in ground(v).files}
    assert files == {"journal", "db", "db-wal", "segment", "floor"}

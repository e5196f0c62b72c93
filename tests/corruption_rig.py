"""Ledgers to be damaged, damage, and a judge.

A ledger with sales in every state is made once a variant and kept as bytes. Then one damage at a time is done to a copy
of its files, and the copy is lived with as a terminal would: start, read everything, verify the whole chain, sell and
deliver; where the ledger says that it is damaged, start again, once. The judge asks two things. Is everything that was
ever told to anybody exactly as it was? If not, did a clear `LedgerError` say so? A single damage leaves the other copy
whole, so that error is accepted for the archive only, which is the one copy of what was delivered long ago.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest.mock import patch
from uuid import UUID

from ledger_rig import SUMMARY, Host, Rig, seeded, verified

from terminal.ledger import store
from terminal.ledger.errors import LedgerCorrupt, LedgerError, NoSuchTransaction
from terminal.ledger.fields import FieldCipher
from terminal.ledger.journal import BLOCK_BYTES, SLOT_BYTES
from terminal.ledger.keys import Keyring, SecretKey
from terminal.ledger.ledger import Head, Ledger, LedgerSettings
from terminal.ledger.models import LedgerDatabase, Tables
from terminal.ledger.states import AT_RISK, SOLD, State
from terminal.ledger.upkeep import Retention
from terminal.ledger.values import Decision, Event, ReversalReason, Total, Transaction, Unsent
from terminal.money import EUR

SLOTS: Final = 320  # room for what is kept free, and for every sale that waits
SETTINGS: Final = LedgerSettings(
    journal_size_bytes=SLOTS * SLOT_BYTES,
    wal_size_bytes=256 * 1024,
    retention=Retention(sales_days=120, card_days=60, audit_months=12),
)
DAY_MS: Final = 86_400_000
STARTS_MAX: Final = 3  # the first, one after damage was named, and one to see that it stays mended
STATE: Final = "state"
_OWN: Final = "afterwards-"  # how the references of the judge's own sales begin
_STEPS_MAX: Final = 500
_ANY_KEY: Final = SecretKey(bytes(32))
_ZERO_BLOCK: Final = bytes(BLOCK_BYTES)


class Told(NamedTuple):
    """Everything that a ledger can be asked, and that somebody relies on."""

    transactions: dict[UUID, Transaction]
    running: dict[UUID, int]
    references: dict[str, UUID | None]
    envelopes: dict[str, object]
    offered: list[str]
    of_card: set[UUID]
    totals: list[Total]
    unsent: list[Unsent]
    at_risk: tuple[int, int, int]
    unshown: list[UUID]
    opened: set[UUID]
    authorising: set[UUID]
    completing: list[UUID]
    sync_head: Head | None

    def less(self, other: Told) -> str:
        """What differs, named and without values; nothing when they are alike."""
        parts = []
        for name, mine, theirs in zip(self._fields, self, other, strict=True):
            if mine == theirs:
                continue
            if isinstance(mine, dict) and isinstance(theirs, dict):
                wrong = [str(key) for key in {*mine, *theirs} if mine.get(key) != theirs.get(key)]
                parts.append(f"{name} of {', '.join(sorted(wrong)[:3])}")
            else:
                parts.append(name)
        return "; ".join(parts)


def told(ledger: Ledger, references: Iterable[str] = (), keys: Iterable[str] = ()) -> Told:
    """Ask for everything; `keys` are those of the outbox, answered ones too."""
    transactions = {sale.id: sale for sale in ledger.transactions(999)}
    at_risk = ledger.exposure(EUR)
    found = {}
    for key in keys:
        with suppress(NoSuchTransaction):
            item = ledger.outbox_item(key)
            found[key] = (item, item.envelope)

    def named(reference: str) -> UUID | None:
        sale = ledger.by_reference(reference)
        return None if sale is None else sale.id

    return Told(
        transactions=transactions,
        running={id_: sale.running_ms for id_, sale in transactions.items()},
        references={reference: named(reference) for reference in references},
        envelopes=found,
        offered=[item.key for item in ledger.outbox(999)],
        of_card={sale.id for sale in ledger.upkeep.of_card("card-ref-1")},
        totals=list(ledger.totals()),
        unsent=list(ledger.unsent()),
        at_risk=(at_risk.sum_minor, at_risk.count, at_risk.age_ms),
        unshown=[sale.id for sale in ledger.unshown()],
        opened={sale.id for sale in ledger.opened()},
        authorising={sale.id for sale in ledger.authorising()},
        completing=[sale.id for sale in ledger.completing()],
        sync_head=ledger.sync_head(),
    )


# Ledgers


class Variant(Enum):
    CLOSED = "closed"
    KILLED = "killed"
    """Its log holds what the database itself does not have yet."""
    MIRRORED = "mirrored"
    """Killed, with a second copy of the journal."""
    AGED = "aged"
    """Closed; with a retired key, a ring that went round, forgotten sales and dropped segments."""


@dataclass
class Ground:
    """A ledger as bytes, by the path of each file, and what it had told."""

    variant: Variant
    files: dict[str, bytes]
    rig: Rig
    references: list[str]
    keys: list[str]
    told: Told
    rebuilt: Told
    last: int
    now_ms: int
    journal: dict[str, bytes] = field(default_factory=dict)
    """The journal, and the archive, as a start without damage leaves them."""

    def lay_out(self, root: Path) -> Rig:
        """Write the files below `root`; what is zeros is left out, so that this is quick."""
        for name, content in self.files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for begin, end in _used(content):
                    file.seek(begin)
                    file.write(content[begin:end])
                file.truncate(len(content))
        return self.rig_at(root)

    def rig_at(self, root: Path) -> Rig:
        rig = Rig(root / STATE, host=self.rig.host, seed=self.rig.seed, settings=_settings(self.variant, root))
        rig.keys, rig.envelopes, rig.entropy = self.rig.keys, self.rig.envelopes, seeded(77)
        rig.clock.now_ms = self.now_ms
        return rig

    def alike(self, name: str, content: bytes) -> bool:
        """Whether a file of journal or archive is as it would be had nothing been damaged, up to the last record."""
        if name.endswith("journal"):
            return all(content[begin:end] == self.journal[name][begin:end] for begin, end in self._old_slots(name))
        return content == self.journal[name]

    def _old_slots(self, name: str) -> Iterator[tuple[int, int]]:
        start = self.files[name].index(b"PTJ1") % SLOT_BYTES
        for slot in range(SLOTS):
            if (slot - self.last) % SLOTS >= 16:  # those that the sale afterwards is written to
                yield start + slot * SLOT_BYTES, start + (slot + 1) * SLOT_BYTES


def _settings(variant: Variant, root: Path) -> LedgerSettings:
    return replace(SETTINGS, second_journal=root / "second" / "journal") if variant is Variant.MIRRORED else SETTINGS


def _used(content: bytes) -> list[tuple[int, int]]:
    return [
        (at, min(at + BLOCK_BYTES, len(content)))
        for at in range(0, len(content), BLOCK_BYTES)
        if content.count(0, at, at + BLOCK_BYTES) != min(BLOCK_BYTES, len(content) - at)
    ]


def workplace() -> Path:
    """In memory where that is possible: a disk that flushes slowly would only take longer to say the same."""
    memory = Path("/dev/shm")  # noqa: S108 (a new directory of its own is made in it)
    return Path(tempfile.mkdtemp(prefix="payterm-damage-", dir=memory if memory.is_dir() else None))


@cache
def _statements() -> Any:
    """Every start puts the same SQL together anew, a quarter of its time: for thousands of starts, once will do."""
    return store._Statements(Tables(LedgerDatabase(Path("never opened"), FieldCipher(Keyring(_ANY_KEY), seeded(1)))))


@cache
def ground(variant: Variant, seed: int = 1) -> Ground:
    """The ledger of one variant, the same for the same seed."""
    root = workplace()
    try:
        return _made(variant, seed, root)
    finally:
        shutil.rmtree(root)


def _made(variant: Variant, seed: int, root: Path) -> Ground:
    rig = Rig(root / STATE, host=Host(seed), seed=seed, settings=_settings(variant, root))
    if variant is Variant.MIRRORED:
        (root / "second").mkdir()
        (root / "second" / "journal").write_bytes(bytes(SETTINGS.journal_size_bytes + SLOT_BYTES))
    shop = _Shop(rig)
    ledger = rig.open()
    if variant is Variant.AGED:
        for _ in range(9):
            for _ in range(8):
                shop.delivered(ledger)
            tidy(rig, ledger)
        rig.clock.now_ms += 450 * DAY_MS
        for _ in range(10):
            shop.delivered(ledger)
        tidy(rig, ledger)
        rig.clock.now_ms += DAY_MS
        tidy(rig, ledger)
        ledger.close()
        rig.keys = replace(rig.keys, data=Keyring(SecretKey(rig.entropy(32)), (rig.keys.data.current,)))
        ledger = rig.open()
    for _ in range(8 if variant is Variant.AGED else 16):
        shop.delivered(ledger)
    tidy(rig, ledger)
    shop.day(ledger)
    ledger.note_sync_head(Head(1, 5, "ab" * 32))
    ledger.note("link", online=False)
    ledger.flush()
    if variant in {Variant.CLOSED, Variant.AGED}:
        ledger.close()
    files = {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    last = ledger.inspection.last if variant in {Variant.KILLED, Variant.MIRRORED} else 0
    rig.close_all()
    shutil.rmtree(root)
    known = shop.references[-40:]  # of what was forgotten since, one says as much as all
    made = Ground(variant, files, rig, known, shop.keys[-60:], _NOTHING, _NOTHING, last, rig.clock.now_ms)
    _learn(made, root)
    return made


def _learn(made: Ground, root: Path) -> None:
    """What a start without damage says, and one that builds the database anew."""
    rig = made.lay_out(root)
    ledger = rig.open()
    made.last = ledger.inspection.last
    made.told = told(ledger, made.references, made.keys)
    ledger.close()
    for name in made.files:
        if "ledger.db" not in name:
            made.journal[name] = (root / name).read_bytes()
    (root / STATE / "ledger.db").unlink()
    ledger = rig.open()
    made.rebuilt = told(ledger, made.references, made.keys)
    ledger.close()
    root.mkdir(exist_ok=True)


_NOTHING: Final = Told({}, {}, {}, {}, [], set(), [], [], (0, 0, 0), [], set(), set(), [], None)


def tidy(rig: Rig, ledger: Ledger) -> None:
    rig.clock.now_ms += 11_000
    for _ in range(_STEPS_MAX):
        if not ledger.upkeep.step(rig.envelopes):
            return
    raise AssertionError("upkeep finds no end")


class _Shop:
    """Sells, and remembers references and envelopes."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.references: list[str] = []
        self.keys: list[str] = []
        self._numbers = count(1)

    def sold(self, ledger: Ledger, decision: Decision) -> Transaction:
        number = next(self._numbers)
        reference = f"order-{number}"
        sale = self.rig.sell(ledger, decision, minor=100 + number, reference=reference)
        self.references.append(reference)
        self.keys.append(f"{sale.id}/authorisation")
        return sale

    def inserted(self, ledger: Ledger) -> Transaction:
        sale = self.rig.begin(ledger, minor=900)
        self.keys.append(f"{sale.id}/authorisation")
        return ledger.commit_outcome(
            sale.id,
            decision=Decision.ONLINE,
            reason="test",
            card=replace(SUMMARY, contact=True),
            envelope=self.rig.authorisation(sale, deferred=False),
        )

    def answered(self, ledger: Ledger, sale: Transaction, decision: str = "approved") -> Transaction:
        jws = self.rig.host.answer(self.rig.envelope(ledger, sale.id), decision)
        return self.rig.deliver(ledger, sale.id, Event.AUTHORISATION, jws)

    def reversed(self, ledger: Ledger, sale: Transaction, reason: ReversalReason) -> Transaction:
        after = ledger.commit_reversal(sale.id, reason, self.rig.reversal(sale, reason))
        self.keys.append(f"{sale.id}/reversal")
        return after

    def delivered(self, ledger: Ledger) -> Transaction:
        sale = self.sold(ledger, Decision.ACCEPTED)
        ledger.mark_shown(sale.id, "approved")
        return self.answered(ledger, sale)

    def day(self, ledger: Ledger) -> None:
        """Every state there is, twice over."""
        for _ in range(2):
            waiting = self.sold(ledger, Decision.ACCEPTED)
            ledger.mark_shown(waiting.id, "approved")
            self.delivered(ledger)
            self.answered(ledger, self.sold(ledger, Decision.ACCEPTED), "declined")  # refused
            approved = self.answered(ledger, self.sold(ledger, Decision.ONLINE))
            ledger.mark_shown(approved.id, "approved")
            self.answered(ledger, self.sold(ledger, Decision.ONLINE), "declined")
            self.sold(ledger, Decision.ONLINE)  # authorising
            self.sold(ledger, Decision.ACCEPTED)  # unshown
            late = self.sold(ledger, Decision.ONLINE)
            self.reversed(ledger, late, ReversalReason.TIMEOUT)
            void = self.answered(ledger, self.sold(ledger, Decision.ACCEPTED))
            ledger.mark_shown(void.id, "approved")
            self.reversed(ledger, void, ReversalReason.VOID)
            jws = self.rig.host.answer(self.rig.envelope(ledger, void.id, Event.REVERSAL), "reversed", reason="void")
            self.rig.deliver(ledger, void.id, Event.REVERSAL, jws)
            declined = self.rig.begin(ledger, reference=f"declined-{next(self._numbers)}")
            self.references.append(declined.reference or "")
            ledger.commit_outcome(declined.id, decision=Decision.DECLINED, reason="card")
            cancelled = self.rig.begin(ledger)
            ledger.commit_outcome(cancelled.id, decision=Decision.VOID, reason="cancelled")
            inserted = self.inserted(ledger)
            self.answered(ledger, inserted)  # completing: the card has not said its last word
            self.rig.begin(ledger, minor=77)


# Damage


class Way(Enum):
    FLIP = "flip"
    RANDOM = "random"
    ZEROS = "zeros"
    OTHER = "other"
    """The block holds what belongs into another one."""


class Damage(NamedTuple):
    """`offset` is of a bit for a flip, of a block otherwise."""

    file: str
    way: Way
    offset: int
    content: bytes = b""

    def __str__(self) -> str:
        unit = f"bit {self.offset}" if self.way is Way.FLIP else f"block {self.offset // BLOCK_BYTES}"
        return f"{self.file}, {self.way.value}, {unit}"

    def do(self, root: Path) -> None:
        with (root / self.file).open("r+b") as file:
            if self.way is Way.FLIP:
                file.seek(self.offset // 8)
                byte = file.read(1)[0]
                file.seek(self.offset // 8)
                file.write(bytes((byte ^ 1 << self.offset % 8,)))
            else:
                file.seek(self.offset)
                file.write(self.content)


_WEIGHTS: Final = {"journal": 6, "ledger.db": 6, "ledger.db-wal": 4, "floor": 1}
_WEIGHT_OF_A_SEGMENT: Final = 1
_REBUILT_ANYWAY: Final = 7
_UNUSED_SHARE: Final = 0.04  # of damage: what holds zeros only can hardly be harmed


def damages(made: Ground, seed: int, flips: int, blocks: int) -> Iterator[Damage]:
    """So many of each, spread over all files; the same for the same seed."""
    chance = random.Random(seed)
    names = sorted(made.files)
    weights = [_WEIGHTS.get(Path(name).name, _WEIGHT_OF_A_SEGMENT) for name in names]
    for number in range(flips + blocks):
        name = chance.choices(names, weights)[0]
        content = made.files[name]
        used = _used(content)
        if chance.random() < _UNUSED_SHARE:
            begin = chance.randrange(len(content)) // BLOCK_BYTES * BLOCK_BYTES
        else:
            begin = chance.choice(used)[0]
        end = min(begin + BLOCK_BYTES, len(content))
        if number < flips:
            bytes_used = [at for at in range(begin, end) if content[at]]
            at = chance.choice(bytes_used) if bytes_used and chance.random() < 0.8 else chance.randrange(begin, end)
            yield Damage(name, Way.FLIP, at * 8 + chance.randrange(8))
            continue
        way = chance.choice((Way.RANDOM, Way.ZEROS, Way.OTHER))
        match way:
            case Way.RANDOM:
                block = chance.randbytes(end - begin)
            case Way.ZEROS:
                block = bytes(end - begin)
            case _:
                other = chance.choice(used)[0]
                block = content[other : other + end - begin].ljust(end - begin, b"\0")
        yield Damage(name, way, begin, block)


# The judge


class Verdict(Enum):
    WHOLE = "whole"
    """Nothing was noticed, and nothing was wrong."""
    HEALED = "healed"
    NAMED = "named"
    """The damaged part of the archive was named; selling went on."""
    REFUSED = "refused"
    """It does not sell any more, though one copy was whole."""
    SILENT = "silent"
    """Something told to somebody is not so any more, and nobody said a word."""
    CRASHED = "crashed"
    """It ended in something that is no `LedgerError`."""

    @property
    def wrong(self) -> bool:
        return self in {Verdict.REFUSED, Verdict.SILENT, Verdict.CRASHED}


class Finding(NamedTuple):
    damage: Damage
    verdict: Verdict
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.damage}: {self.verdict.value} {self.detail}".rstrip()


def judge(made: Ground, damage: Damage, root: Path) -> Finding:
    """One damage, done to a copy below `root`, and what comes of it."""
    if root.exists():
        shutil.rmtree(root)
    rig = made.lay_out(root)
    damage.do(root)
    made_once = _statements()
    try:
        with patch.object(store, "_Statements", lambda _: made_once):
            return _lived_with(made, damage, root, rig)
    finally:
        for ledger in rig._open:
            with suppress(Exception):
                ledger.close()


def _lived_with(made: Ground, damage: Damage, root: Path, rig: Rig) -> Finding:  # noqa: PLR0911
    archived = "archive" in damage.file
    notes: list[str] = []
    starts = 0
    while True:
        starts += 1
        ledger: Ledger | None = None
        try:
            ledger = rig.open()
            said = told(ledger, made.references, made.keys)
            named = _verified(ledger, archived=archived)
            sale = _sold_one(rig, ledger, f"{_OWN}{starts}")
            after = told(ledger)
            break
        except LedgerError as error:
            notes.append(f"{type(error).__name__}: {error}")
            if ledger is not None:
                with suppress(LedgerError):
                    ledger.close()
            if starts == STARTS_MAX or not isinstance(error, LedgerCorrupt):
                return Finding(damage, Verdict.REFUSED, " | ".join(notes))
        except Exception as error:  # noqa: BLE001 (that is the finding)
            notes.append(f"{type(error).__name__}: {error}")
            return Finding(damage, Verdict.CRASHED, " | ".join(notes))
    report = ledger.recovery
    wanted = made.rebuilt if report.rebuilt else made.told
    if wrong := _difference(wanted, said):
        return Finding(damage, Verdict.SILENT, wrong)
    single = wanted._replace(references={}, envelopes={})  # single ones have been asked for already
    if wrong := _after_the_sale(single, after, sale, ledger):
        return Finding(damage, Verdict.SILENT, f"after the next sale: {wrong}")
    ledger.close()
    if named:
        return Finding(damage, Verdict.NAMED, named)
    harmed = [name for name in made.journal if not made.alike(name, (root / name).read_bytes())]
    # As long as journal and archive hold what they would hold without damage, it is known what is built from them.
    # Otherwise, and now and then anyway, that is done.
    restored = ledger._parts.journal.restored
    healed = bool(restored or report.rebuilt or report.moved_aside or report.redone or notes)
    if harmed or damage.offset % _REBUILT_ANYWAY == 0:
        for name in ("ledger.db", "ledger.db-wal"):
            (root / STATE / name).unlink(missing_ok=True)
        try:
            anew = rig.open()
            rebuilt = told(anew, made.references, made.keys)
        except LedgerError as error:
            return Finding(damage, Verdict.REFUSED, f"without ledger.db: {error}")
        if wrong := _after_the_sale(made.rebuilt, rebuilt, sale, anew):
            return Finding(damage, Verdict.SILENT, f"without ledger.db: {wrong}")
        anew.close()
    return Finding(damage, Verdict.HEALED if healed else Verdict.WHOLE)


def _verified(ledger: Ledger, *, archived: bool) -> str:
    """Raises `LedgerCorrupt`; of a damaged archive it returns what was said."""
    try:
        verified(ledger)
    except LedgerCorrupt as error:
        if not archived:
            raise
        assert "of the archive" in str(error), str(error)
        return str(error)
    return ""


def _sold_one(rig: Rig, ledger: Ledger, reference: str) -> Transaction:
    sale = rig.sell(ledger, minor=4242, reference=reference)
    ledger.mark_shown(sale.id, "approved")
    return rig.deliver(ledger, sale.id, Event.AUTHORISATION, rig.host.answer(rig.envelope(ledger, sale.id)))


def _after_the_sale(wanted: Told, found: Told, sale: Transaction, ledger: Ledger) -> str:
    """What is not as it was before, but for one sale more."""
    if ledger.transaction(sale.id).state is not State.SETTLED or ledger.by_reference(sale.reference or "") is None:
        return "the sale itself"
    if sale.number <= max(each.number for each in wanted.transactions.values()):
        return "its number"
    return _difference(wanted, found)


def _difference(wanted: Told, found: Told) -> str:
    """What is not as it was, but for the judge's own sales, which are there in whatever state they came to."""
    own = {id_: sale for id_, sale in found.transactions.items() if (sale.reference or "").startswith(_OWN)}
    if not own:
        return found.less(wanted)
    waiting = [sale.amount.minor for sale in own.values() if sale.state in AT_RISK]
    sold = [sale.amount.minor for sale in own.values() if sale.state in SOLD]
    figures = Counter({(each.day, each.scheme): each.sum_minor for each in found.totals})
    figures.subtract({(each.day, each.scheme): each.sum_minor for each in wanted.totals})
    if sum(figures.values()) != sum(sold) or min(figures.values()) < 0:
        return "totals"
    unsent = [(each.sum_minor - sum(waiting), each.count - len(waiting)) for each in found.unsent]
    if unsent != [(each.sum_minor, each.count) for each in wanted.unsent]:
        return "unsent"
    return found._replace(
        transactions={id_: each for id_, each in found.transactions.items() if id_ not in own},
        running={id_: ran for id_, ran in found.running.items() if id_ not in own},
        of_card=found.of_card - own.keys(),
        offered=[key for key in found.offered if UUID(key.partition("/")[0]) not in own],
        unshown=[id_ for id_ in found.unshown if id_ not in own],
        opened=found.opened - own.keys(),
        totals=wanted.totals,
        unsent=wanted.unsent,
        # Time has gone on.
        at_risk=(found.at_risk[0] - sum(waiting), found.at_risk[1] - len(waiting), wanted.at_risk[2]),
    ).less(wanted)

"""docs/compliance.md says what is true: every row is there, and every test, file and command that it names.

The second half holds the tests for what the document claims and no other file shows: what the audit trail says of each
act, that no log holds card data, that with all its own keys the terminal reads four digits and no more, whom files
belong to, and how long things stay.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import hmac
import json
import logging
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from cryptography.hazmat.primitives import hpke
from ledger_rig import Rig, seeded
from sync_rig import FakeClock, FakeHost, FakeTerminal, sale
from sync_rig import Rig as SyncRig
from terminal_rig import TERMINAL, Tap, Terminal, picture, profiles, terminal_in
from test_cli import Bench, payterm
from test_ledger_upkeep import DAY_MS, RING, sell, tidy

from drivers.interfaces import ReaderMissing
from hwsim.cards.personalise import laboratory_pan
from terminal import cli
from terminal.app import ledger_settings
from terminal.config import Config, RetentionSection
from terminal.control import CallRefused
from terminal.emv import tlv
from terminal.ledger import backup, restoring
from terminal.ledger.journal import RecordType
from terminal.ledger.keychanges import rotate_data_key
from terminal.ledger.keys import generate, generate_spool_key, key_id
from terminal.ledger.recovery import move_aside
from terminal.ledger.sealing import sealing_info
from terminal.ledger.upkeep import Retention
from terminal.ledger.values import ReversalReason
from terminal.sync import journal as sync_journal
from terminal.sync import spool as sync_spool
from terminal.ui import screens

ROOT: Final = Path(__file__).parent.parent
DOCUMENT: Final = ROOT / "docs" / "compliance.md"
LINE_CHARACTERS_MAX: Final = 150
STATES: Final = ("done", "partly", "not done", "operator", "nothing here")
# The structure of PCI DSS 4.0.1: how many requirements each section has, and which of them have parts.
SECTIONS: Final = {
    "3.1": 2, "3.2": 1, "3.3": 3, "3.4": 2, "3.5": 1, "3.6": 1, "3.7": 9, "4.1": 2, "4.2": 2, "7.1": 2, "7.2": 6,
    "7.3": 3, "8.1": 2, "8.2": 8, "8.3": 11, "8.4": 3, "8.5": 1, "8.6": 3, "10.1": 2, "10.2": 2, "10.3": 4,
    "10.4": 3, "10.5": 1, "10.6": 3, "10.7": 3,
}  # fmt: skip
PARTS: Final = {
    "3.3.1": 3, "3.5.1": 3, "3.6.1": 4, "4.2.1": 2, "7.2.5": 1, "8.3.10": 1, "10.2.1": 7, "10.4.1": 1, "10.4.2": 1,
}  # fmt: skip
ARTICLES: Final = tuple(f"Art. {number}" for number in (5, 6, 15, 17, 20, 25, 30, 32, 33, 34))
CLASSES: Final = (
    "Sealed card data", "What is kept of a card", "Transactions", "Totals", "Audit trail", "Spool", "Journal of sync",
    "Logs", "Backups", "Copies put aside", "Keys", "Memory",
)  # fmt: skip
FACTS: Final = ("where", "protected", "kept", "read by", "erased", "shown by")

# Tags that may be sealed (docs/formats.md, Sealed card data).
SEALED_TAGS: Final = (
    "57 5A 5F24 5F2A 5F34 82 84 95 9A 9C 9F02 9F03 9F10 9F1A 9F26 9F27 9F33 9F34 9F36 9F37 9F39 9F6E 9F7C"
)
ANY_PIN: Final = 0x80 | 0x40 | 0x10  # of terminal capabilities, byte 2 (Book 4, A2)
NAMING_A_CARD: Final = (RecordType.OUTCOME, RecordType.ANSWER)  # their payloads (docs/formats.md)

_TEST: Final = re.compile(r"`(tests/\w+\.py)::(\w+)`")
_PATH: Final = re.compile(r"`((?:terminal|systemd|docs|drivers|hw-sim|tests)/[\w./-]*)`")
_COMMAND: Final = re.compile(r"`payterm ([a-z][a-z -]*)`")
_DEFAULT: Final = re.compile(r"`(\w+_(?:days|months))` \((\d+)\)")
_ROW: Final = re.compile(r"^- \*\*((?:Art\. )?[\d.]+)\*\* (.*(?:\n  .*)*)", re.MULTILINE)


# ---- the document


@dataclass(frozen=True, slots=True)
class Row:
    number: str
    state: str | None
    text: str


def rows(text: str) -> list[Row]:
    found = []
    for number, body in _ROW.findall(text):
        state = re.search(rf"\*\*({'|'.join(STATES)})\*\*", body)
        found.append(Row(number, state and state[1], body))
    return found


def requirements() -> list[str]:
    numbers = [f"{section}.{last}" for section, count in SECTIONS.items() for last in range(1, count + 1)]
    return numbers + [f"{number}.{last}" for number, count in PARTS.items() for last in range(1, count + 1)]


@cache
def functions(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def commands() -> set[str]:
    """Every command of the command line, its words joined."""

    def under(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> Iterator[str]:
        places = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        for place in places:
            for name, below in place.choices.items():
                yield from under(below, (*words, name))
        if not places:
            yield " ".join(words)

    return set(under(cli.parser("payterm"), ()))


def unknown_tests(text: str) -> list[str]:
    return [
        f"{path}::{name}"
        for path, name in _TEST.findall(text)
        if not (name.startswith("test_") and (ROOT / path).is_file() and name in functions(ROOT / path))
    ]


def unknown_paths(text: str) -> list[str]:
    return [path for path in _PATH.findall(text) if not (ROOT / path).exists()]


def unknown_commands(text: str) -> list[str]:
    known = commands()
    return [words for words in _COMMAND.findall(text) if words.partition(" -")[0] not in known]


def wrong_rows(text: str) -> list[str]:
    """Requirements and articles without a row or with two, and rows of nothing."""
    wanted, found = [*requirements(), *ARTICLES], [row.number for row in rows(text)]
    return [number for number in wanted if found.count(number) != 1] + [each for each in found if each not in wanted]


def unfounded_rows(text: str) -> list[str]:
    """What is done has a place and a test; what is not says what is missing; what is the operator's says what to do."""
    found = []
    for row in rows(text):
        is_shown = bool(_TEST.search(row.text) and _PATH.search(row.text))
        says = {word: f"*{word}:*" in row.text for word in ("Missing", "Operator")}
        match row.state:
            case "done":
                good = is_shown and not says["Missing"]
            case "partly":
                good = is_shown and says["Missing"]
            case "not done":
                good = says["Missing"]
            case "operator":
                good = says["Operator"]
            case "nothing here":
                good = not says["Missing"]
            case _:
                good = False
        if not good:
            found.append(row.number)
    return found


def wrong_counts(text: str) -> list[str]:
    """The summary at the top: `| done | 12 | ... |` for each state, over the requirements of PCI DSS."""
    states = [row.state for row in rows(text) if not row.number.startswith("Art")]
    said = {state: re.search(rf"^\| {state} \| (\d+) \|", text, re.MULTILINE) for state in STATES}
    return [state for state in STATES if (found := said[state]) is None or int(found[1]) != states.count(state)]


def wrong_defaults(text: str) -> list[str]:
    """Every `name` (number) against what configuration and ledger really start with, and each of them is named."""
    said = [(name, int(number)) for name, number in _DEFAULT.findall(text)]
    true = msgspec.to_builtins(RetentionSection())
    kept = Retention()
    assert true == {name: getattr(kept, name) for name in true}
    return [f"{name} ({number})" for name, number in said if true.get(name) != number] + [
        name for name in true if name not in dict(said)
    ]


def incomplete_classes(text: str) -> list[str]:
    """Each class of data has a table with every fact."""
    missing = []
    for name in CLASSES:
        section = re.search(rf"^### {re.escape(name)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
        body = section[1] if section else ""
        missing += [f"{name}: {fact}" for fact in FACTS if not re.search(rf"^\| {fact} \| .+ \|$", body, re.MULTILINE)]
    return missing


def long_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if len(line) > LINE_CHARACTERS_MAX]


Check = Callable[[str], list[str]]
CHECKS: Final[tuple[Check, ...]] = (
    unknown_tests, unknown_paths, unknown_commands, wrong_rows, unfounded_rows, wrong_counts, wrong_defaults,
    incomplete_classes, long_lines,
)  # fmt: skip


@pytest.fixture(scope="module")
def document() -> str:
    return DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_document_is_true(document: str, check: Check) -> None:
    assert check(document) == []


def test_the_structure_is_the_standards() -> None:
    """Some numbers that there are, counted out of the standard; control: some that there are not."""
    wanted = requirements()
    assert len(wanted) == len(set(wanted)) == sum(SECTIONS.values()) + sum(PARTS.values())
    assert {"3.2.1", "3.3.1.3", "3.3.2", "3.4.1", "3.5.1", "3.7.9", "4.2.1.2", "8.3.10.1", "10.2.1.7"} <= set(wanted)
    assert not {"3.8.1", "3.3.4", "8.3.12", "10.2.1.8", "10.7.4"} & set(wanted)


PLANTED: Final[tuple[tuple[Check, str], ...]] = (
    (unknown_tests, "`tests/test_money.py::test_that_is_not_there`"),
    (unknown_tests, "`tests/test_nothing.py::test_the_document_is_true`"),
    (unknown_tests, "`tests/terminal_rig.py::terminal_in`"),  # there, and no test
    (unknown_paths, "`terminal/ledger/retention.py`"),
    (unknown_commands, "`payterm privacy forget`"),
    (unknown_commands, "`payterm keys`"),  # a group is no command
    (wrong_rows, "- **3.3.9** Nothing asks for this. **operator** *Operator:* nothing."),
    (wrong_rows, "- **3.2.1** A second row. **operator** *Operator:* nothing."),
    (wrong_rows, "- **Art. 7** Not one of these. **operator** *Operator:* nothing."),
    (unfounded_rows, "- **3.2.1** Without test and place. **done**"),
    (
        unfounded_rows,
        "- **3.2.1** Done, yet something is *Missing:* `tests/a.py::test_b`, `terminal/app.py`. **done**",
    ),
    (unfounded_rows, "- **3.2.1** Nothing is said to be missing. **not done**"),
    (unfounded_rows, "- **3.2.1** Whose duty it is, not what it is. **operator**"),
    (unfounded_rows, "- **3.2.1** In no state."),
    (wrong_counts, "- **3.2.1** One more. **operator** *Operator:* nothing."),
    (wrong_defaults, "`card_days` (61)"),
    (wrong_defaults, "`cash_days` (60)"),
    (long_lines, "x" * (LINE_CHARACTERS_MAX + 1)),
)


@pytest.mark.parametrize(("check", "planted"), PLANTED)
def test_control_a_planted_untruth_is_found(document: str, check: Check, planted: str) -> None:
    assert check(f"{document}\n{planted}\n")


def test_control_whatever_is_left_out_is_missed(document: str) -> None:
    """Each row, each state, each default and each fact of each class of data in turn."""
    for row in rows(document):
        without = document.replace(f"- **{row.number}** ", "- ", 1)
        assert row.number in wrong_rows(without)
    for state in STATES:
        assert state in wrong_counts(re.sub(rf"^\| {state} \|.*$", "", document, flags=re.MULTILINE))
    for name in msgspec.to_builtins(RetentionSection()):
        assert name in wrong_defaults(re.sub(rf"`{name}` \(\d+\)", "", document))
    for name in CLASSES:
        assert len(incomplete_classes(document.replace(f"### {name}\n", "", 1))) >= len(FACTS)


# ---- what the audit trail says (10.2)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    with terminal_in(tmp_path) as made:
        yield made


def a_day(terminal: Terminal) -> None:
    """Sales that end in each way, a forged answer, a network that goes and comes."""
    terminal.online()
    terminal.enter(1250, "order-1")
    terminal.run(Tap(terminal.card()))
    terminal.offline()
    terminal.enter(1300, "order-2")
    terminal.run(Tap(terminal.card()))
    terminal.payments.reverse(terminal.pay(1500), ReversalReason.VOID)
    terminal.payments.void(terminal.begin(1600), "cancelled")
    item = terminal.items()[0]
    with pytest.raises(CallRefused):
        terminal.deliver(item["key"], "aaaa.bbbb.cccc")
    terminal.online()
    terminal.carry()
    terminal.ledger.flush()


def trail(terminal: Terminal) -> list[dict[str, Any]]:
    return list(terminal.call("audit.page", after=0, limit=50)["records"])


def without_facts(record: dict[str, Any]) -> list[str]:
    """What 10.2.2 asks for and this record does not say; who did it is known to be missing (the document says so)."""
    facts = {
        "type": record["type"] != "EVENT" or record["details"].get("what"),
        "time": record["wall_ms"] and isinstance(record["synchronised"], bool) and record["sequence"],
        "origin": record["boot"] and record["epoch"],
        "object": record["type"] in ("EVENT", "CHECKPOINT") or record["transaction"],
        "outcome": {
            "OUTCOME": record["details"].get("decision"),
            "ANSWER": record["details"].get("decision"),
            "SHOWN": record["details"].get("screen"),
        }.get(record["type"], True),
    }
    return [name for name, said in facts.items() if not said]


def test_each_record_says_what_when_where_of_what_and_how_it_ended(terminal: Terminal) -> None:
    a_day(terminal)
    told = trail(terminal)
    assert {each["type"] for each in told} >= {"CHECKPOINT", "OPEN", "CARD", "OUTCOME", "ANSWER", "SHOWN", "EVENT"}
    assert {each["details"]["decision"] for each in told if each["type"] == "OUTCOME"} >= {"online", "accepted", "void"}
    assert [each["sequence"] for each in told] == list(range(1, len(told) + 1))  # none is left out
    assert {each["sequence"]: without_facts(each) for each in told if without_facts(each)} == {}
    assert "answer_rejected" in {each["details"].get("what") for each in told}
    assert {each["details"].get("online") for each in told if each["details"].get("what") == "link"} == {True, False}


@pytest.mark.parametrize(
    ("fact", "harm"),
    [
        ("type", {"details": {"online": True}}),
        ("time", {"synchronised": None}),
        ("origin", {"boot": ""}),
        ("object", {"type": "OPEN", "transaction": None}),
        ("outcome", {"type": "OUTCOME", "transaction": "x"}),
    ],
)
def test_control_a_record_that_leaves_something_out_is_found(
    terminal: Terminal, fact: str, harm: dict[str, Any]
) -> None:
    terminal.offline()
    terminal.ledger.flush()
    (record,) = (each for each in trail(terminal) if each["details"].get("what") == "link")
    assert without_facts(record) == []
    assert without_facts({**record, **harm}) == [fact]


# ---- card data: in no log, and nothing but four digits for whoever has every key of the terminal (3.3, 3.5)


def forms_of_card_data() -> dict[str, set[str]]:
    """The card's number and track 2, as they might slip into a message or a stored value."""
    pan, track2 = laboratory_pan(7899).digits, profiles()["normal"].track2
    packed = bytes.fromhex(pan + "F" * (len(pan) % 2))
    grouped = {separator.join(pan[at : at + 4] for at in range(0, len(pan), 4)) for separator in " -"}
    hashes = {hashlib.new(name, pan.encode()).hexdigest() for name in ("md5", "sha1", "sha256")}
    return {
        "number": {pan, pan[:8], pan[-8:], *grouped, packed.hex(" "), repr(packed)[2:-1]},
        "track 2": {
            track2.hex().rstrip("f"),
            track2.hex().upper().rstrip("F"),
            track2.hex(" "),
            repr(track2)[2:-1],
        },
        "base64": {base64.b64encode(each).decode().rstrip("=")[:-1] for each in (pan.encode(), packed, track2)},
        "hash": hashes | {base64.b64encode(bytes.fromhex(each)).decode() for each in hashes},
    }


def card_data_in(text: str) -> set[str]:
    return {name for name, forms in forms_of_card_data().items() if any(form in text for form in forms)}


def test_no_log_holds_card_data_even_at_debug(terminal: Terminal, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.NOTSET):
        logging.getLogger().setLevel(1)
        a_day(terminal)
        for lost_at in (3, 5):
            number = terminal.enter(1700 + lost_at)
            cancel = partial(terminal.call, "sale.cancel", transaction=number)
            terminal.run(Tap(terminal.card(), lost_at=lost_at), cancel)
        with pytest.raises(msgspec.ValidationError):
            terminal.call("sale.start", amount=laboratory_pan(7899).digits, currency="EUR")
        told = caplog.text + "".join(repr(record.args) for record in caplog.records)
    assert {record.name.partition(".")[0] for record in caplog.records} >= {"terminal", "peewee"}
    assert card_data_in(told) == set()
    assert card_data_in(json.dumps(trail(terminal))) == set()


@pytest.mark.parametrize("name", ["number", "track 2", "base64", "hash"])
def test_control_card_data_in_a_log_is_found(name: str, caplog: pytest.LogCaptureFixture) -> None:
    for form in sorted(forms_of_card_data()[name]):
        caplog.clear()
        logging.getLogger("terminal").error("card: %s.", form)
        assert name in card_data_in(caplog.text), form


def everything_readable(terminal: Terminal) -> str:
    """All that the terminal's own keys open: every body and payload of the journal, every sale of the database."""
    parts = []
    journal = terminal.ledger._parts.journal
    for record in terminal.ledger.inspection.every():
        parts.append(json.dumps(record.body))
        if record.payload:
            text = journal.open_payload(record.trimmed, record.payload).decode()
            inside = text.split(".") if text.count(".") == 2 else []  # of an envelope or an answer
            parts += [text, *(base64.urlsafe_b64decode(part + "==").decode("latin-1") for part in inside)]
    parts += [repr(each) for each in terminal.ledger.transactions(99)]
    return "\n".join(parts)


def test_with_all_its_keys_the_terminal_reads_four_digits_and_no_more(terminal: Terminal) -> None:
    terminal.offline()
    sold = terminal.pay(1250)
    terminal.ledger.flush()
    text = everything_readable(terminal)
    assert sold.card is not None
    assert f'"last4":"{sold.card.last4}"' in text  # the search sees payloads
    assert '"sealed":"' in text  # and the inside of the envelope
    assert card_data_in(text) == set()
    pan = laboratory_pan(7899).digits.encode()
    for key in (terminal.keys.data.current, terminal.keys.chain):
        for material in (key.material, key.derive(b"payterm card lookup"), key.derive(b"payterm reference lookup")):
            assert hmac.digest(material, pan, "sha256").hex()[:32] not in text


def test_control_a_number_among_what_is_kept_is_found(terminal: Terminal) -> None:
    terminal.offline()
    terminal.ledger.note("planted", label=laboratory_pan(7899).digits)
    terminal.ledger.flush()
    assert card_data_in(everything_readable(terminal)) == {"number"}


# ---- whom files belong to (3.5, 7.2, 10.3.1)


@pytest.fixture
def open_umask() -> Iterator[None]:
    """Nothing is to depend on the umask of whoever starts it."""
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(directory: Path, *, public: tuple[str, ...] = ()) -> dict[str, str]:
    """Files and directories that anybody but their owner could use, or that may be executed."""
    found = {}
    for path in (directory, *directory.rglob("*")):
        mode = path.stat().st_mode & 0o7777
        if mode & ~(0o700 if path.is_dir() else 0o600) and path.name not in public:
            found[str(path.relative_to(directory))] = oct(mode)
    return found


@pytest.mark.usefixtures("open_umask")
def test_what_the_terminal_makes_is_for_its_owner_alone(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "state" / "ledger", settings=RING)
    ledger = rig.open()
    for _ in range(8):
        sell(rig, ledger)
    tidy(rig, ledger)
    ledger.inspection.write_backup(rig.directory / "backup")
    ledger.close()
    move_aside(rig.directory / "ledger.db")
    rig.open()
    assert {path.name for path in rig.directory.iterdir()} >= {
        "archive", "backup", "journal", "ledger.db", "ledger.db-wal", "ledger.db.damaged-1",
    }  # fmt: skip
    assert any(path.suffix == ".segment" for path in (rig.directory / "archive").iterdir())
    assert open_to_others(rig.directory) == {}
    rig.close_all()
    (rig.directory / "journal").chmod(0o640)  # control
    assert open_to_others(rig.directory) == {"journal": "0o640"}


@pytest.mark.usefixtures("open_umask")
def test_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    generate(tmp_path / "terminal", seeded(1))
    rotate_data_key(tmp_path / "terminal", seeded(2))
    generate_spool_key(tmp_path / "sync", seeded(3))
    for directory in (tmp_path / "terminal", tmp_path / "sync"):
        assert open_to_others(directory) == {}
    assert len(list((tmp_path / "terminal").glob("data-key*"))) == 2


def test_what_sync_makes_is_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_spool, "FILLER_BYTES", 65_536)
    before = os.umask(0o077)  # as its unit sets it
    try:
        far = FakeTerminal()
        rig = SyncRig(tmp_path, far, [FakeHost()], FakeClock(), seeded(5))
        far.sell(sale(1))
        rig.settle()
        for _ in range(90):
            rig.journal.note("stored")
        assert {path.name for path in rig.directory.iterdir()} >= {"spool.db", "journal", "archive"}
        assert open_to_others(rig.directory) == {}
        rig.close()
    finally:
        os.umask(before)


# ---- how long things stay, and what an erasure reaches (3.2.1, 10.5.1, Art. 17)


def test_the_defaults_reach_the_ledger(terminal: Terminal) -> None:
    assert ledger_settings(terminal.config).retention == Retention(sales_days=120, card_days=60, audit_months=12)
    other = RetentionSection(sales_days=9, card_days=8, audit_months=13)
    changed = msgspec.structs.replace(terminal.config, retention=other)
    assert ledger_settings(changed).retention == Retention(sales_days=9, card_days=8, audit_months=13)
    assert sync_journal.KEPT_MS >= 366 * DAY_MS


def test_the_trail_is_whole_for_twelve_months_and_then_goes(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "state", settings=RING)
    ledger = rig.open()
    for _ in range(8):
        sell(rig, ledger)
    tidy(rig, ledger)
    rig.clock.now_ms += 366 * DAY_MS
    for _ in range(8):
        sell(rig, ledger)
    tidy(rig, ledger)
    assert ledger.transactions(99)[-1].number > 1  # the first sales are forgotten
    assert ledger.inspection.records(0, 1)[0].sequence == 1  # what happened to them is not
    rig.clock.now_ms += 12 * DAY_MS
    for _ in range(8):
        sell(rig, ledger)
    tidy(rig, ledger)
    assert ledger.inspection.records(0, 1)[0].sequence > 1
    rig.close_all()


def test_an_erasure_reaches_the_next_backup_and_not_the_last(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "state", settings=RING)
    ledger = rig.open()
    sell(rig, ledger)

    def naming_a_card(path: Path) -> int:
        """Records of a new backup that say what card it was: OUTCOME and ANSWER with their payload."""
        ledger.inspection.write_backup(path)
        saved = backup.read(path, rig.keys.data, rig.keys.chain)
        return sum(payload is not None and trimmed[5] in NAMING_A_CARD for trimmed, payload in saved)

    assert naming_a_card(tmp_path / "before") == 2
    assert ledger.upkeep.erase_card("card-ref-1") == (1, 0)
    assert naming_a_card(tmp_path / "after") == 0
    assert [each.body["what"] for each in ledger.inspection.every() if each.type is RecordType.EVENT][-1] == "erased"
    rig.close_all()


# ---- no secret in the configuration (8.6.2)


def secret_settings(section: type[msgspec.Struct]) -> list[str]:
    """Settings in which somebody could write a secret: named like one, and neither a path nor a public value."""
    found = []
    for each in msgspec.structs.fields(section):
        is_secret = re.search(r"key|secret|password|token|credential", each.name) and each.name not in (
            "keys",
            "ca_keys",
            "published_ca_keys",
        )
        if is_secret and "Path" not in str(each.type):
            found.append(f"{section.__name__}.{each.name}")
        for part in (each.type, *getattr(each.type, "__args__", ())):
            if isinstance(part, type) and issubclass(part, msgspec.Struct):
                found += secret_settings(part)
    return found


def test_no_secret_can_be_written_into_the_configuration() -> None:
    class Careless(msgspec.Struct):
        api_token: str

    assert secret_settings(Config) == []
    assert secret_settings(Careless) == ["Careless.api_token"]


# ---- the rest of what is claimed


def test_only_what_an_online_request_needs_is_sealed(terminal: Terminal) -> None:
    """Opened with the host's key: no name of the cardholder, no track 1, nothing that the host has no use for."""
    terminal.offline()
    sold = terminal.pay(1250)
    (item,) = terminal.items()
    sealed = json.loads(base64.urlsafe_b64decode(item["envelope"].split(".")[1] + "=="))["sealed"]
    info = sealing_info(key_id(terminal.keys.host_sealing), TERMINAL, terminal.ledger.epoch, sold)
    suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    plaintext = suite.decrypt(base64.urlsafe_b64decode(sealed + "=="), terminal.host.keys.sealing, info=info)
    tags = {node.tag for node in tlv.parse(plaintext)}
    assert 0x57 in tags
    assert not tags & {0x56, 0x5F20, 0x9F0B, 0x9F1F, 0x9F6B}  # track 1, names, discretionary data
    assert tags <= {int(word, 16) for word in SEALED_TAGS.split()}
    (capabilities,) = (node.value for node in tlv.parse(plaintext) if node.tag == 0x9F33)
    assert not capabilities[1] & ANY_PIN  # the card is told that no PIN can be entered


def test_start_and_stop_are_in_the_trail(terminal: Terminal) -> None:
    terminal.ledger.close()
    bench = Bench()
    bench.reader.opening.append(ReaderMissing("none"))
    bench.display.watch = lambda shown: (
        os.kill(os.getpid(), signal.SIGTERM) if shown == picture(screens.Error("reader_missing")) else None
    )
    assert payterm(terminal, "run", bench=bench) == 0
    terminal.start()
    said = [each["details"].get("what") for each in trail(terminal) if each["type"] == "EVENT"]
    assert said.index("start") < said.index("stop")


@pytest.mark.parametrize(("keep", "word"), [(True, "kept"), (False, "voided")])
def test_what_a_person_decides_is_in_the_trail(terminal: Terminal, keep: bool, word: str) -> None:
    terminal.offline()
    unseen = terminal.pay(1250)
    terminal.call("attention.resolve", transaction=str(unseen.id), keep=keep)
    terminal.enter(1300)
    terminal.run(Tap(terminal.card()))
    terminal.ledger.flush()
    decided = [each["details"] for each in trail(terminal) if each["details"].get("what") in ("kept", "voided")]
    assert decided == [{"what": word, "transaction": str(unseen.id)}]


def test_a_restored_ledger_says_so_in_its_trail(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "state", settings=RING)
    ledger = rig.open()
    sell(rig, ledger)
    ledger.inspection.write_backup(tmp_path / "backup")
    ledger.close()
    rig.directory.rename(tmp_path / "lost")
    restoring.restore(rig.directory, tmp_path / "backup", rig.keys, settings=RING, clock=rig.clock, entropy=rig.entropy)
    records = list(rig.open().inspection.every())
    assert [each.epoch for each in records if each.type is RecordType.CHECKPOINT] == [1, 2]
    assert {"what": "restored", "details": {"backup": "backup", "records": 6, "newer": 0}} in [
        each.body for each in records
    ]
    rig.close_all()


def test_no_service_may_set_the_clock() -> None:
    units = sorted((ROOT / "systemd").glob("*.service"))
    assert len(units) == 3
    for unit in units:
        lines = unit.read_text(encoding="utf-8").splitlines()
        assert {"ProtectClock=yes", "CapabilityBoundingSet=", "NoNewPrivileges=yes"} <= set(lines), unit

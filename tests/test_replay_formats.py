"""What stands in the files: the published schemas say what is read, and whatever is wrong is named, never raised."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from emv_rig import ChipCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replay_rig import AID, PPSE, PSE, conversation, file_of, said

from terminal.commands import replay as commands
from terminal.commands.base import Commands
from terminal.errors import TerminalError
from terminal.replay import formats, run, steps
from terminal.replay.formats import UnusableFile

ODA = {"method": "dda", "date": "2026-03-14", "capks": [], "card": {"5A": "4000001234567899"}}
RISK = {"step": "action_analysis", "tvr": "0000000000"}
ENTRY_POINT = file_of(
    interface="contactless",
    aids=[{"aid": AID, "kernel": "3", "limits": {"ttq": "36004000", "transaction_types": ["00"]}}],
    exchanges=said((PPSE, "6A82")),
    kernel_outcomes=[{"outcome": "approved", "start": None, "ui": [{"message": 3}], "ui_on_restart": None}],
    choices=[True, AID],
    host={"8A": "3030", "91": "00", "71": ["86"], "72": []},
    exceptions=[{"pan": "4000001234567899", "psn": "01"}, {"pan": "4000001234567899", "psn": 1}],
    log=[{"pan": "4000001234567899", "psn": None, "date": "260314", "amount": 1}],
    revoked=[{"rid": AID[:10], "index": "92", "serial": "000001"}],
    random=[1, 99],
)
RISING_DOWN = {"threshold": 1, "target_percent": 9, "max_target_percent": 8}
EXAMPLES: dict[str, dict[str, Any]] = {"replay": ENTRY_POINT, "oda": ODA, "risk": RISK}
RUNS: dict[str, Callable[[Any], Any]] = {"replay": run.replay, "oda": steps.authenticate, "risk": steps.find}


def command_line(*arguments: str) -> int:
    root = argparse.ArgumentParser()
    commands.add(Commands(root.add_subparsers(required=True)))
    options = root.parse_args(arguments)
    code: int = options.command(options, lambda config: pytest.fail("no hardware is needed"))
    return code


def read(name: str, value: Any) -> Any:
    return formats.decode(json.dumps(value).encode(), formats.SCHEMAS[name], "it")  # type: ignore[type-var]


@pytest.mark.parametrize("name", formats.SCHEMAS)
def test_the_published_schema_is_the_one_that_files_are_read_by(name: str) -> None:
    assert formats.schema_path(name).read_text(encoding="utf-8") == formats.schema(name)
    jsonschema.Draft202012Validator.check_schema(json.loads(formats.schema(name)))


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_fit(name: str) -> None:
    jsonschema.validate(EXAMPLES[name], json.loads(formats.schema(name)))
    RUNS[name](read(name, EXAMPLES[name]))


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, each in inside for place in _places(each, (*at, key)))]


def _put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = _put(value[place[0]], place[1:], new)
    return copy


# A float without a fraction is an integer to JSON Schema, though none to whoever wrote it: both readings may stand.
FRACTIONS = st.floats(allow_nan=False, allow_infinity=False).filter(lambda number: not number.is_integer())
WRONG = st.one_of(
    st.none(), st.booleans(), st.integers(-1, 2**40), FRACTIONS, st.text(max_size=4),
    st.sampled_from(["", "0", "zz", "ab", "AB", "AB\n", " AB", "00" * 5, AID, "5A", "2026-13-01", "2026-03-14"]),
    st.binary(max_size=20).map(lambda raw: raw.hex().upper()),
    st.just([]), st.just({}), st.just([[]]), st.just({"unheard": 1}),
    st.dictionaries(
        st.sampled_from(["9F02", "9A", "9C", "5F2A", "5F36", "82", "8E", "5A"]),
        st.binary(max_size=8).map(lambda raw: raw.hex().upper()),
    ),
)  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_schema_and_reader_agree_and_nothing_else_is_raised(name: str, data: st.DataObject) -> None:
    example = EXAMPLES[name]
    changed = _put(example, data.draw(st.sampled_from(_places(example))), data.draw(WRONG))
    fits = jsonschema.Draft202012Validator(json.loads(formats.schema(name))).is_valid(changed)
    try:
        file = read(name, changed)
    except UnusableFile:
        assert not fits
        return
    assert fits
    try:
        json.dumps(RUNS[name](file))
    except UnusableFile as error:
        assert "4000001234567899" not in str(error)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_a_card_says_a_run_ends(data: st.DataObject) -> None:
    """Every response of a whole conversation, shortened, lengthened or with other bytes in it."""
    file = CONVERSATION
    index = data.draw(st.integers(0, len(file["exchanges"]) - 1))
    raw = bytearray(bytes.fromhex(file["exchanges"][index]["response"]))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    changed = _put(file, ("exchanges", index, "response"), bytes(raw).hex().upper())
    changed = changed | {"order": data.draw(st.sampled_from(["strict", "any"]))}
    json.dumps(run.replay(read("replay", changed)))


CONVERSATION = conversation(lambda: ChipCard(kinds=("ARQC", "TC")), host={"8A": "3030", "91": "00" * 10})


@given(st.binary(max_size=40))
def test_bytes_that_are_no_json(data: bytes) -> None:
    for kind in formats.SCHEMAS.values():
        with pytest.raises(UnusableFile, match=r"^it: "):
            formats.decode(data, kind, "it")  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"unheard": 1}, "unheard"),
        ({"aids": [{"aid": AID, "limits": {"florr": 1}}]}, r"florr.*\$\.aids\[0\]\.limits"),
        ({"terminal": {"9F1A": "27"}}, "9F1A"),
        ({"terminal": {"9F1A": "0z"}}, r"\$\.terminal"),
        ({"transaction": {"9F02": "00000000125A", "9A": "260314"}}, "decimal digits"),
        ({"transaction": {"9A": "260231"}}, "9A"),
        ({"clock": "2026-02-30T00:00:00"}, "clock"),
        ({"clock": ..., "transaction": {}}, "clock"),
        ({"exchanges": ...}, "exchanges"),
        ({"aids": [{"aid": AID, "limits": {"random": RISING_DOWN}}]}, "random"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UnusableFile, match=says) as caught:
        run.replay(read("replay", file_of(**change)))
    assert caught.value.exit_code == 2


def test_lower_case_is_not_the_format() -> None:
    with pytest.raises(UnusableFile):
        read("replay", file_of(terminal={"9F1A": "02af"}))


def test_deep_and_endless_files() -> None:
    with pytest.raises(UnusableFile):
        formats.decode(b'{"exchanges":' + b"[" * 200_000, formats.ReplayFile, "it")
    with pytest.raises(UnusableFile, match="longer than"):
        formats.decode(b" " * (formats.FILE_BYTES_MAX + 1), formats.ReplayFile, "it")


# The command line


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(file_of(exchanges=said((PSE, "6A81")))), encoding="utf-8")
    assert command_line("replay", str(path)) == 0
    assert json.loads(capsys.readouterr().out)["reason"] == "card_blocked"
    path.write_text(json.dumps(file_of(exchanges=said((PPSE, "6A81")))), encoding="utf-8")
    assert command_line("replay", str(path)) == 3
    assert json.loads(capsys.readouterr().out)["mismatch"] == {"index": 0, "expected": PPSE, "got": PSE}
    path.write_text("{", encoding="utf-8")
    for command in ("replay", "oda", "risk"):
        with pytest.raises(TerminalError) as caught:
            command_line(command, str(path))
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["oda", "risk"])
def test_the_smaller_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(EXAMPLES[name]), encoding="utf-8")
    assert command_line(name, str(path)) == 0
    assert json.loads(capsys.readouterr().out)["tvr"]


def test_card_data_is_masked_unless_it_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(CONVERSATION), encoding="utf-8")
    assert command_line("replay", str(path)) == 0
    masked = json.loads(capsys.readouterr().out)
    assert command_line("replay", str(path), "--show-pan") == 0
    whole = json.loads(capsys.readouterr().out)
    assert (masked["tags"]["5A"], whole["tags"]["5A"]) == ("************7899", "4000001234567899")
    assert "4000001234567899" not in json.dumps(masked)

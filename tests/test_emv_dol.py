"""Data object lists from the other side: which value answers which entry, and where a list stops making sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from terminal.emv import dol, tlv
from terminal.emv.tags import Tag
from terminal.emv.tlv import TlvError

VECTORS = Path(__file__).parents[2] / "shared" / "vectors"


def h(text: str) -> bytes:
    return bytes.fromhex(text)


def test_split_gives_each_entry_its_value() -> None:
    parts = dol.split(h("9F0206 9A03 9C01"), h("000000001250 260314 00"))
    assert parts == (((0x9F02, 6), h("000000001250")), ((0x9A, 3), h("260314")), ((0x9C, 1), h("00")))
    assert dol.split(b"", b"") == ()


@pytest.mark.parametrize(("data", "at"), [("0000000012", 5), ("00000000125000", 6)])
def test_split_takes_neither_more_nor_less(data: str, at: int) -> None:
    with pytest.raises(TlvError) as caught:
        dol.split(h("9F0206"), h(data))
    assert caught.value.at == at


@given(st.lists(st.tuples(st.sampled_from(list(Tag)), st.integers(0, 20)), max_size=10))
def test_what_is_built_can_be_split(asked: list[tuple[Tag, int]]) -> None:
    list_ = b"".join(tlv.encode(tag, b"")[:-1] + bytes((length,)) for tag, length in asked)
    parts = dol.split(list_, dol.build(list_, {Tag.AMOUNT_AUTHORISED: h("000000001250")}))
    assert [entry for entry, _ in parts] == asked
    assert all(len(value) == entry.length for entry, value in parts)


@pytest.mark.parametrize(("list_", "at"), [("9F", 0), ("9F02069F37", 3), ("9A039C", 2), ("9A03DF8181810100", 2)])
def test_a_broken_list_says_where(list_: str, at: int) -> None:
    with pytest.raises(TlvError, match=f"offset {at}:") as caught:
        tuple(dol.entries(h(list_)))
    assert caught.value.at == at


@pytest.mark.parametrize(
    ("data", "at"),
    [
        ("9A0326", 0),
        ("9A03260314 9F", 5),
        ("9A03260314 70059A0326", 5),
        ("7005 9A03260314 7003 9A0326", 9),  # inside the second template
        ("0000 7006 00 A503 9C0200", 7),  # two levels down, after padding
        ("5A80 00", 1),
    ],
)
def test_broken_tlv_says_where(data: str, at: int) -> None:
    with pytest.raises(TlvError) as caught:
        tlv.parse(h(data))
    assert caught.value.at == at


def test_new_formats_are_kept_when_padded() -> None:
    """Numbers that only kernel 2 knows are padded on the left, like all numbers."""
    assert dol.build(h("DF810408"), {0xDF8104: h("000000001250")}, kernel=2) == h("0000000000001250")
    assert dol.build(h("9F2501"), {0x9F25: h("1234")}) == h("34")
    assert dol.build(h("5F5503"), {0x5F55: b"DE"}) == b"DE\x00"


def test_published_vectors_split_as_they_were_built() -> None:
    path = VECTORS / "dol_emv_utils.json"
    if not path.exists():
        pytest.skip("the published vectors are not beside this project")
    built = [case for case in json.loads(path.read_text(encoding="utf-8"))["cases"] if case["expected_data"]]
    assert len(built) == 2
    for case in built:
        parts = dol.split(h(case["dol"]), h(case["expected_data"]))
        assert b"".join(value for _, value in parts) == h(case["expected_data"])

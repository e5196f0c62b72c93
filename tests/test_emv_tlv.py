"""BER-TLV (Book 3, Annex B), data object lists (Book 3, 5.4) and the table of data objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from terminal.emv import dol, tags, tlv
from terminal.emv.tags import Format, Kernel3Tag, Source, Tag
from terminal.emv.tlv import Node, TlvError

VECTORS = Path(__file__).parents[2] / "shared" / "vectors"


def h(text: str) -> bytes:
    return bytes.fromhex(text)


# Annex B1: tags and lengths


@pytest.mark.parametrize(
    ("data", "tag", "value"),
    [
        ("9A03260314", 0x9A, "260314"),
        ("9F3704 11223344", 0x9F37, "11223344"),
        ("DF811701E0", 0xDF8117, "E0"),
        ("5A00", 0x5A, ""),
        ("5081025649", 0x50, "5649"),  # longer than needed, and allowed by ISO 8825
        ("508200025649", 0x50, "5649"),
    ],
)
def test_one_object(data: str, tag: int, value: str) -> None:
    assert tlv.parse(h(data)) == (Node(tag, h(value)),)


@pytest.mark.parametrize(
    "data",
    [
        "9A0326",  # value cut short
        "9F",  # tag cut short
        "DF81",
        "DF81818101 00",  # a tag of four bytes and more
        "9A",  # no length
        "5A80 1234 0000",  # indefinite length
        "5A83 000001 12",  # more length bytes than EMV has
        "5A81",  # length cut short
        "5A8201",
        "7003 9A0326",  # cut short one level down
        "700180",
        "9A03260314FF",  # FF is no padding
    ],
)
def test_what_is_no_tlv(data: str) -> None:
    with pytest.raises(TlvError):
        tlv.parse(h(data))


def test_padding_between_objects_means_nothing() -> None:
    assert tlv.parse(h("0000 9A03260314 00 7004 00 9C0100 00")) == (
        Node(0x9A, h("260314")),
        Node(0x70, h("009C0100"), (Node(0x9C, h("00")),)),
    )


def test_padding_inside_a_value_stays() -> None:
    assert tlv.parse(h("9F0206000000001250"))[0].value == h("000000001250")


def test_templates_open_in_order() -> None:
    nodes = tlv.parse(h("6F0C 8402AABB A506 5001 41 870101 9C0100"))
    assert [node.tag for node in tlv.primitives(nodes)] == [0x84, 0x50, 0x87, 0x9C]
    proprietary = nodes[0].find(0xA5)
    assert proprietary is not None
    assert proprietary.find(0x87) == Node(0x87, h("01"))
    assert proprietary.find(0x88) is None


def test_depth_is_bounded() -> None:
    def nested(levels: int) -> bytes:
        return tlv.encode(0x70, nested(levels - 1)) if levels else b""

    assert tlv.parse(nested(tlv.DEPTH_MAX - 1))
    with pytest.raises(TlvError, match="deeper"):
        tlv.parse(nested(tlv.DEPTH_MAX + 1))


def test_size_is_bounded() -> None:
    assert tlv.parse(bytes(tlv.SIZE_MAX)) == ()
    with pytest.raises(TlvError, match="more than"):
        tlv.parse(bytes(tlv.SIZE_MAX + 1))
    with pytest.raises(TlvError, match="longer than"):
        tlv.encode(0x50, bytes(tlv.SIZE_MAX + 1))


def test_parse_one_takes_one_object_of_that_tag_and_nothing_else() -> None:
    assert tlv.parse_one(h("70039C0100"), 0x70).children == (Node(0x9C, h("00")),)
    for wrong in ("", "70009C0100", "7000 7000", "7700"):
        with pytest.raises(TlvError):
            tlv.parse_one(h(wrong), 0x70)


def test_errors_do_not_quote_the_data() -> None:
    with pytest.raises(TlvError) as caught:
        tlv.parse(h("5A08 4000001234"))
    assert "4000" not in str(caught.value)


PRIMITIVE_TAGS = st.sampled_from([tag for tag in Tag if not tlv.is_constructed(tag)] + [0xDF8117])
TEMPLATES = st.sampled_from([0x61, 0x6F, 0x70, 0xA5, 0xBF0C])
TREES = st.recursive(
    st.builds(lambda tag, value: Node(int(tag), value), PRIMITIVE_TAGS, st.binary(max_size=300)),
    lambda inner: st.builds(
        lambda tag, children: Node(tag, b"", tuple(children)), TEMPLATES, st.lists(inner, max_size=3)
    ),
    max_leaves=6,
)


def encode_tree(node: Node) -> bytes:
    if tlv.is_constructed(node.tag):
        return tlv.encode(node.tag, b"".join(map(encode_tree, node.children)))
    return tlv.encode(node.tag, node.value)


def shape(node: Node) -> Any:
    return node.tag, ([shape(child) for child in node.children] if tlv.is_constructed(node.tag) else node.value)


def depth(node: Node) -> int:
    return 1 + max(map(depth, node.children), default=0)


@given(st.lists(TREES, max_size=4).filter(lambda trees: all(depth(tree) < tlv.DEPTH_MAX for tree in trees)))
def test_what_is_encoded_is_parsed(trees: list[Node]) -> None:
    parsed = tlv.parse(b"".join(map(encode_tree, trees)))
    assert [shape(node) for node in parsed] == [shape(tree) for tree in trees]


@given(st.binary(max_size=600))
def test_arbitrary_bytes_parse_or_raise_tlv_error(data: bytes) -> None:
    try:
        nodes = tlv.parse(data)
    except TlvError:
        return
    assert sum(len(node.value) for node in tlv.primitives(nodes)) <= len(data)


# The table


def test_a_tag_is_a_number() -> None:
    assert {0x5A: "found"}[Tag.PAN] == "found"
    assert Tag.PAN == 0x5A
    assert (Tag.AMOUNT_AUTHORISED.format, Tag.AMOUNT_AUTHORISED.length_max) == (Format.N, 6)


def test_a_kernel_has_its_own_meanings_first() -> None:
    assert tags.lookup(0x9F6C, kernel=3) is Kernel3Tag.CTQ
    assert tags.lookup(0x9F6C, kernel=2) is None
    assert tags.lookup(0x9F6C) is None
    assert tags.lookup(0x5A, kernel=3) is Tag.PAN
    ttq = tags.lookup(0x9F66, kernel=3)
    assert ttq is not None
    assert ttq.source is Source.TERMINAL


# 5.4: data object lists

AMOUNT = {0x9F02: h("000123456789")}


@pytest.mark.parametrize(
    ("list_", "values", "data"),
    [
        ("9F0206", {0x9F02: h("000123456789")}, "000123456789"),
        ("9F0203", {0x9F02: h("000123456789")}, "456789"),  # n drops leading
        ("9F0208", {0x9F02: h("000123456789")}, "0000000123456789"),  # n is padded leading
        ("9F0200", {0x9F02: h("000123456789")}, ""),
        ("5A05", {0x5A: h("4000001234567899")}, "4000001234"),  # others drop trailing
        ("5A0A", {0x5A: h("4000001234567899")}, "4000001234567899FFFF"),  # cn is padded with F
        ("9F3706", {0x9F37: h("11223344")}, "112233440000"),  # others are padded with 00
        ("9F3702", {0x9F37: h("11223344")}, "1122"),
        ("9F4E04", {0x9F4E: b"AB"}, "41420000"),
        ("9F7A03", {}, "000000"),  # unknown, and not there
        ("9F7A03", {0x9F7A: h("01")}, "010000"),  # unknown, but configured
        ("7002", {0x70: h("9C00")}, "0000"),  # constructed
        ("", {}, ""),
    ],
)
def test_building(list_: str, values: dict[int, bytes], data: str) -> None:
    assert dol.build(h(list_), values, kernel=3) == h(data)


def test_formats_are_the_kernels_own() -> None:
    spending = {0x9F5D: h("000000001250")}
    assert dol.build(h("9F5D02"), spending, kernel=3) == h("1250")  # n to kernel 3
    assert dol.build(h("9F5D02"), spending) == h("0000")  # unknown without it


@pytest.mark.parametrize("list_", ["9F02", "9F", "9F02069F37"])
def test_a_list_cut_short(list_: str) -> None:
    with pytest.raises(TlvError):
        dol.build(h(list_), AMOUNT)


@given(st.lists(st.tuples(PRIMITIVE_TAGS, st.integers(0, 255), st.binary(max_size=20)), max_size=8))
def test_the_answer_has_the_length_that_was_asked_for(asked: list[tuple[int, int, bytes]]) -> None:
    list_ = b"".join(tlv.encode(tag, b"")[:-1] + bytes((length,)) for tag, length, _ in asked)
    assert [(entry.tag, entry.length) for entry in dol.entries(list_)] == [(tag, length) for tag, length, _ in asked]
    assert len(dol.build(list_, {tag: value for tag, _, value in asked})) == sum(length for _, length, _ in asked)


def test_published_vectors() -> None:
    path = VECTORS / "dol_emv_utils.json"
    if not path.exists():
        pytest.skip("the published vectors are not beside this project")
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 7
    for case in cases:
        list_ = h(case["dol"])
        cut_short = "invalid" in case["title"]
        if case["entries"] is not None:
            found, entries = [], dol.entries(list_)
            if cut_short:
                with pytest.raises(TlvError):
                    for entry in entries:
                        found.append(entry)
            else:
                found = list(entries)
            assert found == [(int(tag, 16), length) for tag, length in case["entries"]], case["id"]
        elif case["expected_data"] is not None:
            values = {int(tag, 16): h(value) for tag, value in [*case["source2"], *case["source1"]]}
            assert dol.build(list_, values) == h(case["expected_data"]), case["id"]
        elif cut_short:
            with pytest.raises(TlvError):
                dol.build(list_, {})
        else:
            assert len(dol.build(list_, {})) == 29, case["id"]


# What is hashed as it was sent


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        ("9F2701 80 9F4B02 ABCD 9F3602 0007", "9F270180 9F36020007"),
        ("9F278101 80 00 9F4B02 ABCD 00", "9F27810180 0000"),  # a length longer than needed stays as it was
        ("70059F4B02ABCD", "70059F4B02ABCD"),  # only outermost objects
        ("9F4B00 9F4B01AA", ""),
        ("", ""),
    ],
)
def test_without(data: str, kept: str) -> None:
    assert tlv.without(h(data), 0x9F4B) == h(kept)


def test_without_reads_strictly() -> None:
    for data in ("9F4B", "9F4B02AB", "9F"):
        with pytest.raises(TlvError):
            tlv.without(h(data), 0x9F4B)


@given(st.binary(max_size=60))
def test_without_takes_whatever_can_be_parsed(data: bytes) -> None:
    try:
        nodes = tlv.parse(data)
    except TlvError:
        return
    kept = tlv.parse(tlv.without(data, 0x9F4B))
    assert kept == tuple(node for node in nodes if node.tag != 0x9F4B)

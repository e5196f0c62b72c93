"""Processing restrictions (Book 3, 10.4)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from terminal.emv import restrictions
from terminal.emv.results import Tvr

VECTORS = Path(__file__).parents[2] / "shared" / "vectors" / "processing_restrictions_emv_utils.json"
CASES = json.loads(VECTORS.read_text(encoding="utf-8"))["cases"] if VECTORS.exists() else []
BASE = {
    "9F09": "0002",
    "9F35": "22",
    "9F40": "6000000000",
    "9F1A": "0276",
    "9C": "00",
    "9A": "260314",
    "9F03": "000000000000",
    "5F24": "301231",
}


def check(**changes: str | None) -> Tvr:
    objects = {**BASE, **{tag.removeprefix("tag_"): value for tag, value in changes.items()}}
    return restrictions.check({int(tag, 16): bytes.fromhex(value) for tag, value in objects.items() if value})


@pytest.mark.skipif(not CASES, reason="the published vectors are not beside this project")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_published_vectors(case: Any) -> None:
    given = [*case["config"], *case["params"], *case["icc"]]
    objects = {int(tag, 16): bytes.fromhex(value) for tag, value in given}
    assert restrictions.check(objects).encode().hex().upper() == case["expected_tvr"]


# 10.4.1: application version


@pytest.mark.parametrize(
    ("card", "terminal", "found"),
    [
        ("0002", "0002", Tvr.NONE),
        ("0001", "0002", Tvr.VERSIONS_DIFFER),
        (None, "0002", Tvr.NONE),
        ("0002", None, Tvr.VERSIONS_DIFFER),  # a terminal that states none cannot claim the same
    ],
)
def test_book_3_10_4_1_application_version_number(card: str | None, terminal: str | None, found: Tvr) -> None:
    assert check(tag_9F08=card, tag_9F09=terminal) == found


# 10.4.2: application usage control


@pytest.mark.parametrize(
    ("usage", "country", "type_", "other", "allowed"),
    [
        ("2100", "0276", "00", "0", True),  # goods suffice
        ("0900", "0276", "00", "0", True),  # services, too
        ("D7FF", "0276", "00", "0", False),
        ("1100", "0250", "00", "0", True),
        ("0500", "0250", "00", "0", True),
        ("EBFF", "0250", "00", "0", False),
        ("2000", "0276", "00", "0", False),  # not at other than ATMs
        ("8100", "0276", "01", "0", True),
        ("7FFF", "0276", "01", "0", False),
        ("4100", "0250", "17", "0", True),
        ("BFFF", "0250", "17", "0", False),
        ("2180", "0276", "09", "0", True),
        ("217F", "0276", "09", "0", False),
        ("0180", "0276", "09", "0", False),  # the goods that come with the cash
        ("1140", "0250", "00", "500", True),
        ("11BF", "0250", "00", "500", False),
        ("0100", None, "00", "500", True),  # without a country only the kind of terminal counts
        ("0000", None, "00", "0", False),
        (None, "0276", "00", "0", True),
        ("0100", "0276", "20", "0", True),  # a refund is none of the services
    ],
)
def test_book_3_10_4_2_application_usage_control(
    usage: str | None, country: str | None, type_: str, other: str, allowed: bool
) -> None:
    found = check(tag_9F07=usage, tag_5F28=country, tag_9C=type_, tag_9F03=other.zfill(12))
    assert found == (Tvr.NONE if allowed else Tvr.SERVICE_NOT_ALLOWED)


@pytest.mark.parametrize(
    ("type_", "capabilities", "usage", "allowed"),
    [
        ("14", "80", "02", True),
        ("15", "80", "01", False),
        ("16", "80", "02", True),
        ("14", "60", "01", True),  # gives no cash: no ATM
        ("24", "80", "01", True),
        ("13", "80", "02", False),
    ],
)
def test_book_3_10_4_2_atm(type_: str, capabilities: str, usage: str, allowed: bool) -> None:
    found = check(tag_9F35=type_, tag_9F40=capabilities + "00000000", tag_9F07=usage + "00")
    assert found == (Tvr.NONE if allowed else Tvr.SERVICE_NOT_ALLOWED)


# 10.4.3: effective and expiration date


@pytest.mark.parametrize(
    ("effective", "expires", "found"),
    [
        ("260314", "260314", Tvr.NONE),  # from the first day through the last
        ("260315", "260314", Tvr.NOT_YET_EFFECTIVE),
        ("260314", "260313", Tvr.EXPIRED),
        (None, "491231", Tvr.NONE),
        (None, "501231", Tvr.EXPIRED),  # 1950
        ("991231", "491231", Tvr.NONE),  # 1999
        ("270101", "250101", Tvr.NOT_YET_EFFECTIVE | Tvr.EXPIRED),
    ],
)
def test_book_3_10_4_3_effective_and_expiration_dates(effective: str | None, expires: str, found: Tvr) -> None:
    assert check(tag_5F25=effective, tag_5F24=expires) == found

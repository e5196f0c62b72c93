"""Replay files, run: selection, the steps to both cryptograms, entry point alone; and conversations that others wrote.

Which bits a step finds is the kernel tests' affair. Here it is that a file says everything that decides, that the
answer says everything that was found, and that the conversation is the one of the list.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from emv_rig import ATC, ChipCard, Pki, directory_entry, fci, ppse, rsa_key, tlv, visa_card
from replay_rig import AID, PPSE, PSE, conversation, decoded, file_of, replayed, said

from terminal.emv.tlv import parse
from terminal.replay import formats, run, steps

VECTORS = Path(__file__).parents[2] / "shared" / "vectors"
MASTERCARD = "A0000000041010"
YES = {"8A": "3030", "91": "00" * 10}
CONTACTLESS = {"interface": "contactless", "aids": [{"aid": AID, "kernel": "03", "limits": {"ttq": "36004000"}}]}
READY, FIELD_ON, FIELD_OFF = (0x15, 2), "field_on", "field_off"


def vectors(name: str) -> Any:
    path = VECTORS / name
    if not path.exists():
        pytest.skip("the published vectors are not beside this project")
    return json.loads(path.read_text(encoding="utf-8"))


def hexed(value: bytes) -> str:
    return value.hex().upper()


def select(name: str) -> str:
    return f"00A40400{len(name) // 2:02X}{name}"


def record(*entries: bytes) -> str:
    return hexed(tlv("70", *entries)) + "9000"


def entry(name: str, priority: int | None = 1) -> bytes:
    return directory_entry(bytes.fromhex(name), priority)


PSE_FCI = hexed(tlv("6F", tlv("84", b"1PAY.SYS.DDF01"), tlv("A5", tlv("88", b"\x01")))) + "9000"


def directory(*entries: bytes) -> list[tuple[str, str | None]]:
    return [(PSE, PSE_FCI), ("00B2010C00", record(*entries)), ("00B2020C00", "6A83")]


def shown(answer: dict[str, Any]) -> list[Any]:
    return [each if isinstance(each, str) else (each["message"], each["status"]) for each in answer["ui"]]


BLOCKED = hexed(fci(bytes.fromhex(AID))) + "6283"


# Selection (Book 1, 12)


def listed(exchanges: Sequence[tuple[str, str | None]], **keys: Any) -> dict[str, Any]:
    return replayed(exchanges=said(*exchanges), until="candidate_list", **keys)


def test_the_candidate_list() -> None:
    answer = listed(directory(entry(AID + "01", 2), entry(AID + "02", 0x81), entry(MASTERCARD)))
    assert answer["candidates"] == [
        {"aid": AID + "02", "label": "VISA CREDIT", "priority": 1, "confirm": True, "kernel": None},
        {"aid": AID + "01", "label": "VISA CREDIT", "priority": 2, "confirm": False, "kernel": None},
    ]
    assert (answer["outcome"], answer["mismatch"]) == (None, None)


def test_exact_names_only() -> None:
    answer = listed(directory(entry(AID + "01"), entry(AID)), aids=[{"aid": AID, "partial": False}])
    assert [each["aid"] for each in answer["candidates"]] == [AID]


@pytest.mark.parametrize(
    ("exchanges", "end"),
    [
        ([(PSE, "6A81")], ("end_application", "card_blocked")),
        ([(PSE, "6A82"), (select(AID), "6A81")], ("end_application", "card_blocked")),
        ([(PSE, "6A82"), (select(AID), "6A82")], ("end_application", "no_common_application")),
        ([(PSE, "6A82"), (select(AID), BLOCKED)], ("end_application", "application_blocked")),
        ([(PSE, None)], ("try_again", "card_lost")),
    ],
)  # fmt: skip
def test_no_application(exchanges: list[tuple[str, str | None]], end: tuple[str, str]) -> None:
    answer = replayed(exchanges=said(*exchanges))
    assert ((answer["outcome"], answer["reason"]), answer["mismatch"]) == (end, None)


TWO = directory(entry(AID + "01", 0x01), entry(AID + "02", 0x82))
FIRST, SECOND = (select(AID + number) for number in ("01", "02"))


@pytest.mark.parametrize(
    ("choices", "selected", "asked"),
    [
        (None, FIRST, [{"choose": [AID + "01", AID + "02"]}]),
        ([AID + "02"], SECOND, [{"choose": [AID + "01", AID + "02"]}]),
        ([AID + "01"], FIRST, [{"choose": [AID + "01", AID + "02"]}]),
        ([True], FIRST, []),
    ],
)
def test_the_cardholder_chooses(choices: Any, selected: str, asked: Any) -> None:
    answer = replayed(exchanges=said(*TWO), choices=choices)
    assert (answer["mismatch"]["got"], answer["cardholder_choices"]) == (selected, asked)


@pytest.mark.parametrize(("choices", "agrees"), [(None, True), ([True], True), ([False], False)])
def test_the_cardholder_confirms(choices: Any, agrees: bool) -> None:
    answer = replayed(exchanges=said(*directory(entry(AID, 0x81))), choices=choices)
    assert answer["cardholder_choices"] == [{"confirm": AID}]
    if agrees:
        assert answer["mismatch"]["got"] == select(AID)
    else:
        assert (answer["outcome"], answer["reason"], answer["mismatch"]) == ("end_application", "not_confirmed", None)


def test_a_directory_may_name_what_is_blocked() -> None:
    both = directory(entry(AID + "01", 1), entry(AID + "02", 2))
    one = [*both, (FIRST, BLOCKED), (SECOND, "6A82")]
    assert replayed(exchanges=said(*one))["reason"] == "application_blocked"
    assert replayed(exchanges=said(*both, (FIRST, "6A82"), (SECOND, "6A82")))["reason"] == "no_common_application"


def test_an_application_that_nobody_offers() -> None:
    with pytest.raises(formats.UnusableFile, match="choices"):
        replayed(exchanges=said(*TWO), choices=[MASTERCARD])


# The list


def test_the_first_command_that_differs_ends_the_run() -> None:
    answer = replayed(exchanges=said((PSE, "6A82"), (select(AID + "01"), "6A82")))
    assert answer["mismatch"] == {"index": 1, "expected": select(AID + "01"), "got": select(AID)}
    assert (answer["outcome"], len(answer["commands"])) == (None, 2)


def test_a_list_that_goes_on_is_no_match() -> None:
    answer = replayed(exchanges=said((PSE, "6A81"), (PSE, "6A81")))
    assert answer["mismatch"] == {"index": 1, "expected": PSE, "got": None}


def test_a_list_that_ends_too_early() -> None:
    assert replayed(exchanges=[])["mismatch"] == {"index": 0, "expected": None, "got": PSE}


def test_le_behind_data_does_not_count() -> None:
    assert replayed(exchanges=said((PSE + "00", "6A81")))["mismatch"] is None
    assert replayed(exchanges=said((PSE + "01", "6A81")))["mismatch"] is None
    read = [(PSE, PSE_FCI), ("00B2010C10", "6A83")]
    assert replayed(exchanges=said(*read))["mismatch"] is not None, "Le of a command without data does"


def test_any_order() -> None:
    """The n-th time the n-th answer, the last one again, and a status word for what nobody wrote down."""
    listing = said(("00B2020C00", "6A83"), *directory(entry(AID, 1))[:2], (PSE, "6A81"))
    answer = replayed(exchanges=listing, order="any", unknown_command="6A82")
    assert (answer["outcome"], answer["reason"]) == ("end_application", "no_common_application")
    assert answer["commands"] == [PSE, "00B2010C00", "00B2020C00", select(AID)]
    assert replayed(exchanges=[], order="any", unknown_command="6A81")["reason"] == "card_blocked"


def test_pieces_and_lengths_are_part_of_the_conversation() -> None:
    whole = directory(entry(AID))[1][1] or ""
    size = len(whole) // 2 - 2
    answer = replayed(
        exchanges=said(
            (PSE, "610A"),
            ("00C000000A", f"{PSE_FCI[:20]}61{len(PSE_FCI) // 2 - 12:02X}"),
            (f"00C00000{len(PSE_FCI) // 2 - 12:02X}", PSE_FCI[20:]),
            ("00B2010C00", f"6C{size:02X}"),
            (f"00B2010C{size:02X}", whole),
            ("00B2020C00", "6A83"),
        ),
        until="candidate_list",
    )
    assert ([each["aid"] for each in answer["candidates"]], answer["mismatch"]) == ([AID], None)


@pytest.mark.parametrize("fetched", [True, False])
def test_what_waits_behind_a_warning_is_fetched_where_the_list_says_so(fetched: bool) -> None:
    waiting = [("00C0000000", "6C26"), ("00C0000026", hexed(fci(bytes.fromhex(AID))) + "9000")] if fetched else []
    answer = replayed(exchanges=said((PSE, "6283"), *waiting, (select(AID), "6A82")))
    assert answer["mismatch"] is None


# A whole transaction (Book 3)


@pytest.mark.parametrize(
    ("kinds", "host", "end"),
    [
        (("TC",), None, ("approved", None)),
        (("AAC",), None, ("declined", "card_declined")),
        (("ARQC", "TC"), YES, ("approved", None)),
        (("ARQC", "AAC"), YES, ("declined", "card_declined")),
        (("ARQC", "AAC"), {"8A": "3035"}, ("declined", "host_declined")),
        (("ARQC", "TC"), None, ("approved", None)),
        (("ARQC",), ..., ("online_request", None)),
    ],
)
def test_both_cryptograms(kinds: tuple[str, ...], host: Any, end: tuple[str, str | None]) -> None:
    file = conversation(lambda: ChipCard(kinds=kinds), host=host)
    answer = run.replay(decoded(file))
    assert (answer["outcome"], answer["reason"]) == end
    assert answer["oda"]["method"] == ("cda" if kinds[0] != "AAC" else None), "an AAC is not signed"
    assert answer["cid"] == {"TC": "40", "AAC": "00", "ARQC": "80"}[kinds[-1]]
    assert (answer["aid"], answer["kernel"], answer["tags"]["9F36"]) == (AID, None, hexed(ATC))


def test_without_a_word_about_the_host_the_list_decides() -> None:
    """It ends at the online request, or shows what came behind one that nobody answered."""
    whole = conversation(lambda: ChipCard(kinds=("ARQC", "TC")), host=None)
    silent = {key: value for key, value in whole.items() if key != "host"}
    assert run.replay(decoded(silent))["outcome"] == "approved"
    assert run.replay(decoded(silent | {"exchanges": whole["exchanges"][:-1]}))["outcome"] == "online_request"


def test_unpredictable_numbers() -> None:
    """One for each application that is started; the last one stays."""
    both = directory(entry(AID + "01", 1), entry(AID + "02", 2))
    refused = [(hexed(fci(bytes.fromhex(AID + number), bytes.fromhex("9F3704"))) + "9000") for number in ("01", "02")]
    for numbers, second in ((["11111111", "22222222"], "22222222"), (["11111111"], "11111111"), ([], "00000000")):
        first = numbers[0] if numbers else second
        answer = replayed(
            exchanges=said(
                *both,
                (FIRST, refused[0]),
                (f"80A80000068304{first}", "6985"),
                (SECOND, refused[1]),
                (f"80A80000068304{second}", "6985"),
            ),
            unpredictable_numbers=numbers,
        )
        assert (answer["reason"], answer["mismatch"]) == ("not_accepted", None)


def test_what_the_host_says_goes_to_the_card() -> None:
    host = {
        "8A": "3030",
        "91": "0102030405060708",
        "71": ["9F180400000001860484240000"],
        "72": ["720686048418000" + "0"],
    }
    file = conversation(lambda: ChipCard(kinds=("ARQC", "TC")), host=host)
    answer = run.replay(decoded(file))
    sent = [command[:4] for command in answer["commands"]]
    assert sent[-5:] == ["80AE", "0082", "8424", "80AE", "8418"]
    assert (answer["outcome"], answer["tsi"], answer["tags"]["9F5B"]) == ("approved", "FC00", "20000000012000000000")


def test_signatures_give_what_they_hold() -> None:
    pki = Pki()
    for method, found in (("E0F880", "sda"), ("E0F840", "dda"), ("E0F808", "cda")):
        terminal = file_of()["terminal"] | {"9F33": method}
        answer = run.replay(decoded(conversation(lambda: ChipCard(kinds=("TC",)), terminal=terminal)))
        oda, recovered = answer["oda"], answer["oda"]["recovered"]
        assert (oda["method"], oda["result"], recovered["issuer_modulus"]) == (found, "ok", hexed(pki.issuer.modulus))
        assert recovered["data_authentication_code"] == ("DAC0" if found == "sda" else None)
        assert recovered["cryptogram"] == (answer["cryptogram"] if found == "cda" else None)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"capks": []}, "ca_key_missing"),
        ({"revoked": [{"rid": AID[:10], "index": "92", "serial": "00A1B2"}]}, "revoked"),
        ({"clock": "2031-01-01T00:00:00"}, "expired"),
    ],
)
def test_trust_is_the_files(keys: dict[str, Any], reason: str) -> None:
    answer = run.replay(decoded(conversation(lambda: ChipCard(kinds=("AAC",)), **keys)))
    assert (answer["oda"]["result"], answer["oda"]["reason"]) == ("failed", reason)


def test_a_key_with_a_wrong_checksum_is_not_there() -> None:
    key = file_of()["capks"][0]
    for checksum, reason in (("00" * 20, "ca_key_missing"), (hexed(Pki().ca_key.computed_checksum()), None)):
        card = conversation(lambda: ChipCard(kinds=("AAC",)), capks=[key | {"checksum": checksum}])
        assert run.replay(decoded(card))["oda"]["reason"] == reason


def test_keys_of_1984_bits() -> None:
    pki = Pki(ca=rsa_key("ca", 248), issuer=rsa_key("issuer", 240), icc=rsa_key("icc", 176))
    key = file_of()["capks"][0] | {"modulus": hexed(pki.ca.modulus)}
    file = conversation(lambda: ChipCard(kinds=("TC",), pki=pki), capks=[key])
    assert run.replay(decoded(file))["oda"]["result"] == "ok"


@pytest.mark.parametrize("until", ["selection", "initiation", "records", "authentication"])
def test_until(until: str) -> None:
    last = {"selection": "A4", "initiation": "A8", "records": "B2", "authentication": "88"}[until]
    terminal = file_of()["terminal"] | {"9F33": "E0F840"}
    answer = run.replay(decoded(conversation(ChipCard, terminal=terminal, until=until)))
    assert (answer["outcome"], answer["mismatch"], answer["commands"][-1][2:4]) == (None, None, last)
    assert ("5A" in answer["tags"]) == (until in {"records", "authentication"})


def test_an_end_says_what_was_found_before_it() -> None:
    answer = run.replay(decoded(conversation(lambda: ChipCard(sw={0xAE: 0x6985}))))
    assert (answer["outcome"], answer["reason"], answer["decision"]) == ("end_application", "card_error", "TC")
    assert (answer["tvr"], answer["cvm_results"], answer["cid"]) == ("0000000000", "1F0302", None)


@pytest.mark.parametrize(
    ("log", "above"),
    [
        ([], False),
        ([{"date": "260313", "amount": 8_750}], True),
        ([{"date": "260313", "amount": 8_749}], False),
        ([{"date": "260313", "amount": 8_750}, {"date": "260314", "amount": 1}], False),
        ([{"date": "260314", "amount": 1}, {"date": "260313", "amount": 8_750}], False),
        ([{"date": "260314", "amount": 1}, {"date": "260314", "amount": 8_750}], True),
        ([{"date": "991231", "amount": 8_750}, {"date": "260314", "amount": 1}], False),
        ([{"date": "260313", "amount": 8_750, "psn": "02"}], False),
        ([{"date": "260313", "amount": 8_750, "psn": 1}], True),
        ([{"date": "260313", "amount": 8_750, "pan": "4000001234567898"}], False),
    ],
)
def test_split_sales(log: list[dict[str, Any]], above: bool) -> None:
    entries = [{"pan": "4000001234567899", "psn": None} | each for each in log]
    answer = run.replay(decoded(conversation(lambda: ChipCard(kinds=("AAC",)), log=entries)))
    assert answer["tvr"][6:8] == ("80" if above else "00")


@pytest.mark.parametrize(("random", "selected"), [(None, False), ([50], True), ([51], False), ([], False)])
def test_random_selection(random: Any, selected: bool) -> None:
    chance = {"threshold": 5_000, "target_percent": 50, "max_target_percent": 99}
    aids = [{"aid": AID, "tags": {"9F09": "0002"}, "limits": {"terminal_floor": 10_000, "random": chance}}]
    keys = {"aids": aids, **({} if random is None else {"random": random})}
    answer = run.replay(decoded(conversation(lambda: ChipCard(kinds=("AAC",)), **keys)))
    assert answer["tvr"][6:8] == ("10" if selected else "00")


def test_amounts_of_twelve_digits() -> None:
    transaction = file_of()["transaction"] | {"9F02": "999999999999"}
    answer = run.replay(decoded(conversation(lambda: ChipCard(kinds=("AAC",)), transaction=transaction)))
    assert (answer["tags"]["9F02"], answer["tags"]["81"]) == ("999999999999", "FFFFFFFF")


# A card that vanishes


def test_a_card_that_vanishes_stays_away() -> None:
    """Scripts go on after a failure, and a second GENERATE AC is due: none of it reaches a card that is gone."""
    host = YES | {"71": ["860484240000", "860484180000"]}
    file = conversation(lambda: ChipCard(kinds=("ARQC", "TC")), host=host)
    at = next(index for index, each in enumerate(file["exchanges"]) if each["command"].startswith("8424"))
    gone = file | {"exchanges": [*file["exchanges"][:at], {"command": "84240000", "response": None}]}
    answer = run.replay(decoded(gone))
    assert (answer["outcome"], answer["reason"], answer["mismatch"]) == ("torn", "card_lost", None)


# Contactless


def taps(*kinds: str, **keys: Any) -> dict[str, Any]:
    card = visa_card(kind=kinds[0])
    return run.replay(decoded(conversation(lambda: card, **{**CONTACTLESS, **keys})), show_pan=True)


def test_a_tap() -> None:
    answer = taps("ARQC")
    assert (answer["outcome"], answer["kernel"], answer["mismatch"]) == ("online_request", "03", None)
    assert shown(answer) == [READY, FIELD_ON, (0x17, 4), (0x1B, 4), FIELD_OFF]


def test_no_combination_is_left() -> None:
    aids = [{"aid": AID, "kernel": "3", "limits": {"contactless_transaction": 1250}}]
    answer = replayed(interface="contactless", aids=aids)
    assert (answer["outcome"], answer["reason"]) == ("try_another_interface", "amount_over_limit")
    assert (answer["commands"], shown(answer)) == ([], [(0x18, 5)])


KERNELS = [{"aid": AID, "kernel": kernel, "limits": {"cvm_required": 1}} for kernel in ("2", "03", "810203")]


def entry_point(*outcomes: dict[str, Any], exchanges: Sequence[tuple[str, str | None]], **keys: Any) -> dict[str, Any]:
    return replayed(
        **{**CONTACTLESS, "aids": KERNELS, **keys}, exchanges=said(*exchanges), kernel_outcomes=list(outcomes)
    )


def found(*entries: bytes) -> tuple[str, str | None]:
    return PPSE, hexed(ppse(*entries)) + "9000"


def chosen(name: str = AID) -> tuple[str, str | None]:
    return select(name), hexed(fci(bytes.fromhex(name))) + "9000"


@pytest.mark.parametrize(("identifier", "kernel"), [(None, "03"), (b"\x02", "02"), (b"\x81\x02\x03", "810203")])
def test_entry_point_hands_over(identifier: bytes | None, kernel: str) -> None:
    more = {"tag_9F2A": identifier} if identifier else {}
    listing = found(directory_entry(bytes.fromhex(AID), 1, **more))
    said_so = {"outcome": "approved", "ui": [{"message": 3, "status": 4, "hold_ms": 100, "language": "en"}]}
    answer = entry_point(said_so, exchanges=[listing, chosen()])
    assert (answer["outcome"], [each["kernel"] for each in answer["handovers"]]) == ("approved", [kernel])
    assert answer["handovers"][0]["indicators"] == {
        "status_check_requested": False,
        "contactless_not_allowed": False,
        "zero_amount": False,
        "cvm_required_exceeded": True,
        "floor_exceeded": False,
    }
    assert answer["ui"][-2] == {"message": 3, "status": 4, "hold_ms": 100, "language": "en", "value": None}


def test_select_next_takes_the_next_candidate() -> None:
    both = found(entry(AID + "01", 1), entry(AID + "02", 2))
    conversation_ = [both, chosen(AID + "01"), chosen(AID + "02")]
    answer = entry_point({"outcome": "select_next"}, {"outcome": "declined"}, exchanges=conversation_)
    assert (answer["outcome"], [each["aid"] for each in answer["handovers"]]) == ("declined", [AID + "01", AID + "02"])
    none_left = entry_point({"outcome": "select_next"}, exchanges=[found(entry(AID)), chosen()])
    assert (none_left["outcome"], none_left["reason"]) == ("end_application", "no_common_application")
    assert shown(none_left)[-2:] == [(0x1C, 2), FIELD_OFF]


def test_try_again_asks_for_the_card_again() -> None:
    once = [found(entry(AID)), chosen()]
    again = {"outcome": "try_again", "start": "B", "ui_on_restart": {"message": 0x21, "status": 2}}
    answer = entry_point(again, {"outcome": "online_request"}, exchanges=[*once, *once])
    assert (answer["outcome"], answer["mismatch"], len(answer["handovers"])) == ("online_request", None, 2)
    assert shown(answer) == [READY, FIELD_ON, FIELD_OFF, (0x21, 2), FIELD_ON, FIELD_OFF]


def test_a_kernel_that_starts_again_by_itself() -> None:
    once = [found(entry(AID)), chosen()]
    answer = entry_point({"outcome": "end_application", "start": "D"}, {"outcome": "approved"}, exchanges=once)
    assert (answer["outcome"], len(answer["handovers"]), answer["mismatch"]) == ("approved", 2, None)


def test_more_handovers_than_outcomes() -> None:
    with pytest.raises(formats.UnusableFile, match="kernel_outcomes"):
        entry_point(exchanges=[found(entry(AID)), chosen()])


# What others wrote


def test_published_candidate_lists() -> None:
    script = vectors("apdu_scripts_emv_utils.json")
    aids = [{"aid": aid, "partial": match == "PARTIAL_MATCH"} for aid, match in script["terminal_aids"]]
    for case in (each for each in script["cases"] if each["function"] == "emv_build_candidate_list"):
        answer = listed(case["apdus"], aids=aids)
        assert answer["mismatch"] is None, case["id"]
        assert (answer["reason"] == "card_blocked") == case["expected_result"].endswith("CARD_BLOCKED")
        assert (answer["candidates"] == []) == case["candidate_list_empty"]


def _expected(result: str) -> tuple[str | None, str | None]:
    return {
        "OK(0)": (None, None),
        "EMV_OUTCOME_CARD_BLOCKED": ("end_application", "card_blocked"),
        "EMV_OUTCOME_TRY_AGAIN": ("end_application", "no_common_application"),  # the only candidate is dropped
        "EMV_OUTCOME_GPO_NOT_ACCEPTED": ("end_application", "not_accepted"),
        "EMV_TAL_ERROR_READ_RECORD_FAILED": ("end_application", "card_error"),
    }.get(result, ("end_application", "parse_error"))


def test_published_final_selections() -> None:
    for case in vectors("apdu_scripts_emv_utils.json")["cases"]:
        if case["function"] != "emv_select_application":
            continue
        ((command, _),) = case["apdus"]
        name = command[10:-2]
        exchanges = [*directory(entry(name)), *case["apdus"]]
        answer = replayed(exchanges=said(*exchanges), until="selection", aids=[{"aid": AID}])
        assert answer["mismatch"] is None, case["id"]
        assert (answer["outcome"], answer["reason"]) == _expected(case["expected_result"]), case["id"]


def test_published_initiations_and_records() -> None:
    for case in vectors("apdu_scripts_emv_utils.json")["cases"]:
        inputs = {key.partition("_")[2]: value for key, value in case.get("inputs", {}).items()}
        if case["function"] == "emv_initiate_application_processing":
            application, until = inputs["fci"], "initiation"
            name = hexed(parse(bytes.fromhex(application))[0].children[0].value)
            exchanges = case["apdus"]
        elif "afl" in inputs:
            name, application, until = AID, hexed(fci(bytes.fromhex(AID), None)), "records"
            options = tlv("80", bytes.fromhex("7800" + inputs["afl"]))
            exchanges = [("80A80000028300", hexed(options) + "9000"), *case["apdus"]]
        else:
            continue
        before = [(PSE, "6A82"), (select(name), application + "9000"), (select(name), application + "9000")]
        terminal = file_of()["terminal"] | {"9F33": "60F0C8"}
        answer = replayed(exchanges=said(*before, *exchanges), until=until, aids=[{"aid": name}], terminal=terminal)
        assert answer["mismatch"] is None, case["id"]
        assert (answer["outcome"], answer["reason"]) == _expected(case["expected_result"]), case["id"]


def test_published_restrictions() -> None:
    for case in vectors("processing_restrictions_emv_utils.json")["cases"]:
        file = {
            "step": "processing_restrictions",
            "terminal": dict(case["config"]),
            "transaction": dict(case["params"]),
            "card": dict(case["icc"]),
        }
        found_ = steps.find(formats.decode(json.dumps(file).encode(), formats.RiskFile, "it"))
        assert found_["tvr"] == case["expected_tvr"], case["name"]


def test_a_published_card() -> None:
    """A recorded T=0 card: directory, DDA, both cryptograms. Its terminal said other things in between."""
    vector = vectors("card_emvpt.json")
    modulus = vector["keys"]["AFFFFFFFFF_92_ca_private_key.pem"]["modulus"]
    exchanges = said(*vector["apdus"])
    file = file_of(
        terminal={"9F1A": "0246", "9F33": "E0F0C8", "9F35": "22", "9F40": "6000F0A001"},
        transaction={"9F02": "000000100000", "9A": "200724", "9C": "00", "5F2A": "0978"},
        clock="2020-07-24T12:00:00",
        aids=[{"aid": "AFFFFFFFFF1234", "tags": {"9F09": "0096"}, "limits": {"terminal_floor": 1}}],
        capks=[{"rid": "AFFFFFFFFF", "index": "92", "modulus": modulus, "exponent": "03"}],
        unpredictable_numbers=["01234567"],
        host={"8A": "3030", "91": "1234567812345678"},
        order="any",
    )
    for _ in range(2):  # put our own GENERATE AC in place of the recorded one: the first, then both
        asked = run.replay(decoded(file | {"exchanges": exchanges}))["commands"]
        ours = [command for command in asked if command.startswith("80AE")]
        theirs = [each for each in exchanges if each["command"].startswith("80AE")]
        for mine, recorded in zip(ours, theirs, strict=False):
            recorded["command"] = mine
    answer = run.replay(decoded(file | {"exchanges": exchanges}))
    assert (answer["outcome"], answer["oda"]["method"], answer["oda"]["result"]) == ("approved", "dda", "ok")
    assert (answer["cid"], answer["tags"]["9F36"], answer["tags"]["9F4C"]) == ("40", "00F3", "002C")
    assert (
        answer["oda"]["recovered"]["icc_modulus"]
        == vector["keys"]["icc_1234560012345608_e_3_private_key.pem"]["modulus"]
    )

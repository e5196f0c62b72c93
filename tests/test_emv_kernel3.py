"""Kernel 3 (Book C-3): each row of its decisions, and a card that leaves at every command."""

from __future__ import annotations

from dataclasses import replace

import pytest
from emv_rig import (
    ATC,
    PAN,
    PDOL,
    TTQ_ODA_FOR_ONLINE,
    UN,
    VISA,
    Attempt,
    Card,
    Pki,
    attempt,
    fast_dda_data,
    fci,
    pump,
    request,
    rsa_key,
    setup,
    tlv,
    visa,
    visa_card,
)

from terminal.emv import entry_point
from terminal.emv.configuration import Environment, ExceptionEntry
from terminal.emv.outcome import (
    Approved,
    CardRead,
    Cvm,
    Declined,
    EndApplication,
    MessageId,
    OdaMethod,
    OdaResult,
    OdaStatus,
    OnlineRequest,
    Outcome,
    Pan,
    Status,
    TryAgain,
    TryAnotherInterface,
    UiRequest,
)

NOT_PERFORMED = OdaResult()
FDDA_OK = OdaResult(OdaStatus.OK, OdaMethod.FDDA)


def h(text: str) -> bytes:
    return bytes.fromhex(text)


def card_read(outcome: Outcome) -> CardRead:
    assert isinstance(outcome, Approved | OnlineRequest | Declined)
    assert outcome.card is not None
    return outcome.card


def word(outcome: Outcome) -> str:
    """An outcome in one line, for tables."""
    match outcome:
        case Approved(card) | OnlineRequest(card):
            return f"{type(outcome).__name__} {card.cvm.value}"
        case _:
            return f"{type(outcome).__name__} {outcome.reason}"


def with_ttq(ttq: str, amount_minor: int = 1250, **limits: object) -> Attempt:
    return attempt(visa_card(), setup(visa(h(ttq), **limits)), request(amount_minor))


# 5.2: initiate application


def test_get_processing_options() -> None:
    command = attempt(visa_card()).commands[2]
    data = "36004000 000000001250 000000000000 0276 0000000000 0978 260314 00 11223344"
    assert command.encode() == h("80A80000 23 8321" + data + "00")


def test_the_unpredictable_number_is_fresh_for_each_application() -> None:
    numbers = iter([h("00000001"), h("00000002")])
    second = VISA + b"\x02"
    card = replace(
        visa_card(),
        ppse=tlv("6F", tlv("A5", tlv("BF0C", tlv("61", tlv("4F", VISA)), tlv("61", tlv("4F", second))))),
        applications={VISA: fci(VISA, h("9F66049F3704")), second: fci(second, h("9F66049F3704"))},
        options_sw=0x6985,
    )
    environment = Environment(unpredictable_number=lambda: next(numbers), notify=lambda ui: None)
    _, commands = pump(entry_point.run(setup(), request(), environment), card)
    assert [command.data[-4:] for command in commands if command.ins == 0xA8] == [h("00000001"), h("00000002")]


@pytest.mark.parametrize(
    ("sw", "outcome"),
    [
        (
            0x6984,
            TryAnotherInterface("other_interface_required", UiRequest(MessageId.INSERT_CARD, Status.PROCESSING_ERROR)),
        ),
        (0x6986, TryAgain("confirm_on_phone", UiRequest(MessageId.SEE_PHONE, Status.PROCESSING_ERROR, hold_ms=1300))),
        (0x6985, EndApplication("no_common_application", UiRequest(MessageId.OTHER_CARD, Status.READY_TO_READ))),
        (0x6A81, EndApplication("card_error")),
        (0x6700, EndApplication("card_error")),
        (0x0000, EndApplication("card_error")),
        (0x6100, EndApplication("card_error")),
        (0x9001, EndApplication("card_error")),
    ],
)
def test_c3_5_2_status_words_of_get_processing_options(sw: int, outcome: Outcome) -> None:
    result = attempt(replace(visa_card(), options_sw=sw))
    assert result.outcome == outcome
    assert result.commands[-1].ins == 0xA8
    assert not result.shown


def test_a_pdol_that_no_command_can_hold() -> None:
    card = replace(visa_card(), applications={VISA: fci(VISA, h("9F66049F4EFF"))})
    assert attempt(card).outcome == EndApplication("parse_error")


def test_a_long_pdol_takes_a_long_length() -> None:
    card = replace(visa_card(), applications={VISA: fci(VISA, h("9F66049F4EC8"))})
    command = attempt(card).commands[2]
    assert (len(command.data), command.data[:3], command.data[7:18]) == (207, h("8381CC"), b"CORNER SHOP")


@pytest.mark.parametrize("pdol", ["9F66", "9F66049F", "9F660401"])
def test_a_pdol_cut_short(pdol: str) -> None:
    card = replace(visa_card(), applications={VISA: fci(VISA, h(pdol))})
    assert attempt(card).outcome == EndApplication("parse_error")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (tlv("6F", tlv("A5", tlv("9F38", PDOL))), "missing_data"),  # no DF name
        (tlv("6F", tlv("84", b""), tlv("A5", tlv("9F38", PDOL))), "missing_data"),
        (fci(VISA, PDOL, tlv("50", b"AGAIN")), "duplicate_data"),
        (fci(VISA) + fci(VISA), "parse_error"),
        (tlv("70", tlv("84", VISA)), "parse_error"),
        (fci(VISA)[:-1], "parse_error"),
    ],
)
def test_an_fci_that_cannot_be_used(answer: bytes, reason: str) -> None:
    assert attempt(replace(visa_card(), applications={VISA: answer})).outcome == EndApplication(reason)


def test_another_scheme_without_pdol_ends_in_the_kernel() -> None:
    other = h("F00000000101")
    card = Card(
        tlv("6F", tlv("A5", tlv("BF0C", tlv("61", tlv("4F", other))))),
        {other: fci(other, None)},
    )
    assert attempt(card, setup(visa(aid=other))).outcome == EndApplication("missing_data")


# 5.3, 5.4: response formats, records


def test_response_format_1() -> None:
    """AIP and AFL alone: what format 2 would have carried comes in the first record."""
    card = visa_card()
    objects = card.options[2:] if card.options[1] < 0x80 else card.options[3:]
    without = objects.replace(tlv("82", h("2000")), b"").replace(tlv("94", h("0801010010010301")), b"")
    holder = card.records[1, 1][2:]
    moved = {**card.records, (1, 1): tlv("70", holder, without)}
    format_1 = replace(card, options=tlv("80", h("2000 0801010010010301")), records=moved)
    assert word(attempt(format_1).outcome) == "OnlineRequest none"
    assert card_read(attempt(format_1).outcome) == card_read(attempt(card).outcome)


@pytest.mark.parametrize(
    "answer",
    ["", "80", "800120", "8000", "7782", "6F00", "770082020000", "77008000", "9000", "7703820200"],
)
def test_an_answer_that_cannot_be_read(answer: str) -> None:
    card = replace(visa_card(), options=h(answer))
    assert attempt(card).outcome == EndApplication("parse_error")


@pytest.mark.parametrize(
    "afl",
    [
        "080101",  # not a multiple of four
        "09010100",  # low bits of the SFI byte
        "00010100",  # SFI 0
        "F8010100",  # SFI 31
        "08000100",  # record 0
        "08020100",  # last before first
        "08010102",  # more authenticated records than records
        "0801FE00",  # more records than any card has
        "08014000 10014100",
    ],
)
def test_an_afl_that_cannot_be_followed(afl: str) -> None:
    result = attempt(visa_card({"94": h(afl)}))
    assert result.outcome == EndApplication("parse_error")
    assert result.commands[-1].ins == 0xA8


def test_records_are_read_in_the_order_of_the_afl() -> None:
    commands = attempt(visa_card({"94": h("1001030108010100")})).commands
    assert [command.encode() for command in commands[3:]] == [
        h("00B2011400"), h("00B2021400"), h("00B2031400"), h("00B2010C00")
    ]  # fmt: skip


def test_the_afl_may_be_absent() -> None:
    card = visa_card({"94": None})
    result = attempt(card)
    assert word(result.outcome) == "OnlineRequest none"
    assert [command.ins for command in result.commands] == [0xA4, 0xA4, 0xA8]


@pytest.mark.parametrize("sw", [0x6A83, 0x6985, 0x6281, 0x6C10])
def test_a_record_that_is_refused(sw: int) -> None:
    result = attempt(replace(visa_card(), record_sw=sw))
    assert result.outcome == EndApplication("card_error")
    assert result.commands[-1].ins == 0xB2


@pytest.mark.parametrize("record", ["", "7700", "70035A", "5A0140", "70007000", "7081"])
def test_a_record_that_is_no_template(record: str) -> None:
    card = visa_card()
    damaged = replace(card, records={**card.records, (1, 1): h(record)})
    assert attempt(damaged).outcome == EndApplication("parse_error")


def test_files_above_10_may_hold_anything() -> None:
    """Their data objects are taken if there is a template; what is none is passed over."""
    card = visa_card({"94": h("0801010058010100 60010100")})
    with_more = replace(
        card, records={**card.records, (11, 1): b"\x01\x02\x03", (12, 1): tlv("70", tlv("5F20", b"A/B"))}
    )
    found = card_read(attempt(with_more).outcome)
    assert found.tags[0x5F20] == b"A/B"


@pytest.mark.parametrize(
    ("record", "oda"),
    [
        (tlv("70", tlv("5F20", b"A/B")), FDDA_OK),
        (b"\x01\x02\x03", OdaResult(OdaStatus.FAILED, OdaMethod.FDDA, "static_data")),
    ],
)
def test_static_data_of_a_file_above_10_is_the_whole_record(record: bytes, oda: OdaResult) -> None:
    """SFI 11 counts with tag and length, SFI 2 without (Book 3, 10.3)."""
    pki = Pki()
    vouched = tlv("5F25", h("200101"))
    certificates = pki.objects(record + vouched)
    card = visa_card({"94": h("0801010058010101 10010301")}, pki=pki)
    related, signed = fast_dda_data(1250)
    signature = pki.sign_dynamic(b"\x02" + ATC, signed)
    rest = [tlv(tag, certificates[tag]) for tag in ("9F46", "9F48", "9F47")]
    records = {
        **card.records,
        (2, 3): tlv("70", *rest, tlv("9F69", related), tlv("9F4B", signature)),
        (11, 1): record,
    }
    result = attempt(replace(card, records=records), setup(visa(TTQ_ODA_FOR_ONLINE)))
    assert card_read(result.outcome).oda == oda


def test_static_data_stays_lost_after_a_record_that_is_no_template() -> None:
    card = visa_card({"94": h("0801010058010101 10010301")})
    damaged = replace(card, records={**card.records, (11, 1): b"\x00"})
    oda = card_read(attempt(damaged, setup(visa(TTQ_ODA_FOR_ONLINE))).outcome).oda
    assert oda == OdaResult(OdaStatus.FAILED, OdaMethod.FDDA, "static_data")


def test_card_read_is_announced_after_the_last_record() -> None:
    assert attempt(visa_card()).shown == [UiRequest(MessageId.CARD_READ_OK, Status.CARD_READ_OK)]
    assert attempt(visa_card({"57": None})).shown == []


# 5.4: mandatory and contradictory data


@pytest.mark.parametrize("tag", ["9F26", "82", "9F36", "9F10", "57"])
def test_missing_data(tag: str) -> None:
    assert attempt(visa_card({tag: None})).outcome == EndApplication("missing_data")
    assert attempt(visa_card({tag: b""})).outcome == EndApplication("missing_data")


def test_a_terminal_without_a_country() -> None:
    nowhere = replace(setup(), terminal={})
    assert attempt(visa_card(), nowhere).outcome == EndApplication("missing_data")


@pytest.mark.parametrize("tag", ["9F26", "82", "9F36", "9F27", "9F6C", "5F34"])
def test_a_length_that_cannot_be(tag: str) -> None:
    assert attempt(visa_card({tag: bytes(9)})).outcome == EndApplication("parse_error")
    assert attempt(visa_card({"9F10": bytes(33)})).outcome == EndApplication("parse_error")


@pytest.mark.parametrize("tag", ["9F26", "57", "82"])
def test_the_same_object_in_two_places(tag: str) -> None:
    card = visa_card()
    doubled = tlv("70", card.records[1, 1][2:], tlv(tag, h("0102030405060708")))
    assert attempt(replace(card, records={**card.records, (1, 1): doubled})).outcome == EndApplication("duplicate_data")


def test_the_same_object_twice_in_one_answer() -> None:
    card = visa_card({"DF01": b"a"})
    twice = tlv("77", card.options[3:], tlv("DF01", b"a"))
    assert attempt(replace(card, options=twice)).outcome == EndApplication("duplicate_data")


@pytest.mark.parametrize(
    "track_2",
    [
        "4000001234567899",
        "D3012201",
        "4000001D3012201",
        "40000012345678990123D301",
        f"{PAN}D30F2201",
        "4A00001234567899D301F",
    ],
)
def test_track_2_that_names_no_card(track_2: str) -> None:
    value = h(track_2 if len(track_2) % 2 == 0 else track_2 + "F")
    assert attempt(visa_card({"57": value})).outcome == EndApplication("parse_error")


def test_the_pan_must_be_the_one_in_track_2() -> None:
    assert attempt(visa_card({"5A": h("4000001234567890")})).outcome == EndApplication("pan_mismatch")
    assert word(attempt(visa_card({"5A": None})).outcome) == "OnlineRequest none"


@pytest.mark.parametrize("pan", ["40000012", "4000001234567", "4000001234567899019"])
def test_pans_of_other_lengths(pan: str) -> None:
    track_2, padded = pan + "D3012201", pan + "F" * (len(pan) % 2)
    value = h(track_2 + "F" * (len(track_2) % 2))
    found = card_read(attempt(visa_card({"57": value, "5A": h(padded)})).outcome)
    assert found.pan == Pan(pan)


# 5.4: what the card decided


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        ("AAC", "Declined card_declined"),
        ("TC", "Approved none"),
        ("ARQC", "OnlineRequest none"),
        ("RFU", "Declined card_declined"),
    ],
)
def test_c3_5_4_cryptogram_types(kind: str, outcome: str) -> None:
    assert word(attempt(visa_card(kind=kind)).outcome) == outcome
    assert word(attempt(visa_card({"9F27": None}, kind=kind)).outcome) == outcome  # then the IAD says it


def test_the_cid_comes_before_the_issuer_application_data() -> None:
    says_tc = h("06011203900000")
    assert word(attempt(visa_card({"9F10": says_tc}, kind="AAC")).outcome) == "Declined card_declined"


def test_a_derived_cid_is_part_of_the_record() -> None:
    found = card_read(attempt(visa_card({"9F27": None})).outcome)
    assert (found.cid, found.tags[0x9F27]) == (0x80, b"\x80")


def test_neither_cid_nor_enough_issuer_application_data() -> None:
    assert attempt(visa_card({"9F27": None, "9F10": h("06011203")})).outcome == EndApplication("missing_data")


def test_the_other_bits_of_the_cid_do_not_matter() -> None:
    assert word(attempt(visa_card({"9F27": h("BF")})).outcome) == "OnlineRequest none"


@pytest.mark.parametrize(
    ("limits", "amount_minor"), [({"contactless_floor": 1000}, 1250), ({"status_check": True}, 100), ({}, 0)]
)
def test_an_approval_goes_online_where_the_terminal_demands_it(limits: dict[str, object], amount_minor: int) -> None:
    card = visa_card(kind="TC", amount_minor=amount_minor)
    outcome = attempt(card, setup(visa(**limits)), request(amount_minor)).outcome
    assert word(outcome) == "OnlineRequest none"
    assert card_read(outcome).cid == 0x40


def test_a_decline_stays_a_decline_where_the_terminal_demands_online() -> None:
    outcome = attempt(visa_card(kind="AAC"), setup(visa(contactless_floor=0))).outcome
    assert word(outcome) == "Declined card_declined"


def test_a_refund_asks_the_card_for_nothing() -> None:
    needs_cvm = setup(visa(h("32004000"), cvm_required=0))
    refund = attempt(visa_card({"9F6C": None}, kind="AAC"), needs_cvm, request(transaction_type=0x20)).outcome
    assert word(refund) == "OnlineRequest none"
    assert card_read(refund).cid == 0x00


# 5.5: expiry


@pytest.mark.parametrize(
    ("expires", "outcome"),
    [
        ("260314", "Approved none"),  # through its last day
        ("260313", "Declined expired"),
        ("270101", "Approved none"),
        ("491231", "Approved none"),
        ("991231", "Declined expired"),  # 1999
        ("2612", "Declined expired"),
        ("26FFFF", "Declined expired"),
        (None, "Declined expired"),
    ],
)
def test_c3_5_5_expiry(expires: str | None, outcome: str) -> None:
    value = None if expires is None else h(expires)
    assert word(attempt(visa_card({"5F24": value}, kind="TC")).outcome) == outcome


@pytest.mark.parametrize(("ctq", "outcome"), [("0800", "OnlineRequest none"), ("F700", "Declined expired")])
def test_the_card_may_want_an_expired_application_online(ctq: str, outcome: str) -> None:
    card = visa_card({"5F24": h("250101"), "9F6C": h(ctq)}, kind="TC")
    assert word(attempt(card).outcome) == outcome


def test_expiry_is_the_hosts_affair_when_it_is_asked() -> None:
    assert word(attempt(visa_card({"5F24": h("250101")})).outcome) == "OnlineRequest none"


# 5.5: exception file


@pytest.mark.parametrize(
    ("entry", "outcome"),
    [
        (ExceptionEntry(Pan(PAN)), "Declined exception_file"),
        (ExceptionEntry(Pan(PAN), 1), "Declined exception_file"),
        (ExceptionEntry(Pan(PAN), 2), "Approved none"),
        (ExceptionEntry(Pan("4000001234567890")), "Approved none"),
    ],
)
def test_c3_5_5_exception_file(entry: ExceptionEntry, outcome: str) -> None:
    listed = replace(setup(), exceptions=frozenset({entry}))
    assert word(attempt(visa_card(kind="TC"), listed).outcome) == outcome
    assert PAN not in repr(listed)


def test_exception_file_without_a_sequence_number() -> None:
    listed = replace(setup(), exceptions=frozenset({ExceptionEntry(Pan(PAN), 1)}))
    assert word(attempt(visa_card({"5F34": None}, kind="TC"), listed).outcome) == "Approved none"


# 5.5: application usage control


@pytest.mark.parametrize(
    ("usage", "country", "type_", "other_minor", "ctq", "outcome"),
    [
        ("0000", "0276", 0x00, 0, "0000", "Approved none"),  # goods are not asked about
        ("8000", "0276", 0x01, 0, "0000", "Approved none"),
        ("4000", "0276", 0x01, 0, "0000", "Declined not_allowed"),
        ("4000", "0250", 0x01, 0, "0000", "Approved none"),
        ("8000", "0250", 0x17, 0, "0000", "Declined not_allowed"),
        ("0000", "0276", 0x01, 0, "0400", "TryAnotherInterface not_allowed"),
        ("0000", "0276", 0x01, 0, "0200", "Declined not_allowed"),
        ("0080", "0276", 0x09, 500, "0000", "Approved none"),
        ("0080", "0250", 0x09, 500, "0000", "Declined not_allowed"),
        ("0040", "0250", 0x00, 500, "0000", "Approved none"),
        ("0040", "0276", 0x00, 500, "0200", "TryAnotherInterface not_allowed"),
        ("0040", "0276", 0x00, 500, "0400", "Declined not_allowed"),
        ("", "0276", 0x01, 0, "0000", "Approved none"),
        ("0000", "", 0x01, 0, "0000", "Approved none"),
    ],
)
def test_c3_5_5_usage_control(  # noqa: PLR0917
    usage: str, country: str, type_: int, other_minor: int, ctq: str, outcome: str
) -> None:
    card = visa_card({"9F07": h(usage) or None, "5F28": h(country) or None, "9F6C": h(ctq)}, kind="TC")
    result = attempt(card, with_request=request(transaction_type=type_, other_minor=other_minor)).outcome
    assert word(result) == outcome
    if isinstance(result, TryAnotherInterface):
        assert result.ui.message is MessageId.INSERT_OR_SWIPE


# 5.6: offline data authentication

BAD = Pki(icc=rsa_key("icc", 112), ca=rsa_key("another ca", 144))


def test_an_approval_rests_on_fast_dda() -> None:
    outcome = attempt(visa_card(kind="TC")).outcome
    assert outcome == Approved(card_read(outcome))
    assert card_read(outcome).oda == FDDA_OK


@pytest.mark.parametrize(
    ("ttq", "ctq", "outcome"),
    [
        ("36004000", "0000", "Declined oda_failed"),
        ("36004000", "2000", "OnlineRequest none"),
        ("3E004000", "2000", "Declined oda_failed"),  # offline only
        ("36004000", "1000", "TryAnotherInterface oda_failed"),
        ("26004000", "1000", "Declined oda_failed"),  # no contact chip
        ("36004000", "3000", "OnlineRequest none"),
        ("3E004000", "3000", "TryAnotherInterface oda_failed"),
        ("36004000", None, "Declined oda_failed"),
    ],
)
@pytest.mark.parametrize("how", ["certificate", "aip", "objects"])
def test_c3_5_6_failed_authentication(ttq: str, ctq: str | None, outcome: str, how: str) -> None:
    changes: dict[str, bytes | None] = {"9F6C": h(ctq) if ctq else None}
    match how:
        case "certificate":
            card = visa_card(changes, kind="TC", pki=BAD)
        case "aip":
            card = visa_card(changes | {"82": h("0000")}, kind="TC")
        case _:
            card = visa_card(changes, kind="TC", with_authentication=False)
    result = attempt(card, setup(visa(h(ttq)), pki=Pki())).outcome
    assert word(result) == outcome
    if isinstance(result, TryAnotherInterface):
        assert result.ui.message is MessageId.INSERT_CARD


def sda_card(dac: bytes | None = None, **changes: bytes | None) -> Card:
    """A card without keys of its own: static data, signed by its issuer once."""
    pki = Pki()
    signed = tlv("5F25", h("200101"))
    return visa_card(
        {"82": h("4000"), "9F46": None, "9F4B": None, "9F69": None, "93": dac or pki.sign_static(signed), **changes},
        kind="TC",
    )


def test_c3_5_6_static_data_authentication() -> None:
    outcome = attempt(sda_card()).outcome
    assert card_read(outcome).oda == OdaResult(OdaStatus.OK, OdaMethod.SDA)
    assert isinstance(outcome, Approved)
    assert card_read(outcome).tags[0x9F45] == h("DAC0")
    false = attempt(sda_card(Pki().sign_static(b"other data"), **{"9F6C": h("2000")})).outcome
    assert isinstance(false, OnlineRequest)
    assert false.card.oda == OdaResult(OdaStatus.FAILED, OdaMethod.SDA, "signature")


@pytest.mark.parametrize(
    ("aosa", "left"), [("000000004200", 4200), ("0000004200", None), ("00000000420A", None), (None, None)]
)
def test_what_is_left_on_the_card_is_for_the_cardholder(aosa: str | None, left: int | None) -> None:
    outcome = attempt(visa_card({"9F5D": h(aosa) if aosa else None}, kind="TC")).outcome
    assert isinstance(outcome, Approved)
    assert outcome.ui.balance_minor == left


@pytest.mark.parametrize("name", ["amount", "signature of another card", "un"])
def test_what_fast_dda_protects(name: str) -> None:
    match name:
        case "amount":
            card = visa_card(kind="TC", amount_minor=100)
        case "un":
            _, signed = fast_dda_data(1250)
            card = visa_card(kind="TC", signature=Pki().sign_dynamic(b"\x02" + ATC, signed.replace(UN, bytes(4))))
        case _:
            _, signed = fast_dda_data(1250)
            other = Pki(icc=rsa_key("another icc", 112))
            card = visa_card(kind="TC", signature=other.sign_dynamic(b"\x02" + ATC, signed))
    outcome = attempt(card).outcome
    assert word(outcome) == "Declined oda_failed"
    assert card_read(outcome).oda == OdaResult(OdaStatus.FAILED, OdaMethod.FDDA, "signature")


@pytest.mark.parametrize(
    ("card", "oda"),
    [
        (visa_card(), FDDA_OK),
        (visa_card(pki=BAD), OdaResult(OdaStatus.FAILED, OdaMethod.FDDA, "issuer_certificate")),
        (visa_card({"8F": h("93")}), OdaResult(OdaStatus.FAILED, OdaMethod.FDDA, "ca_key_missing")),
        (visa_card({"9F4B": None}), OdaResult(reason="missing_data")),
        (visa_card({"9F46": None}), OdaResult(OdaStatus.FAILED, OdaMethod.FDDA, "missing_data")),
        (visa_card({"82": h("0000")}), OdaResult(reason="not_supported")),
    ],
)
def test_for_an_online_request_authentication_only_informs(card: Card, oda: OdaResult) -> None:
    outcome = attempt(card, setup(visa(TTQ_ODA_FOR_ONLINE))).outcome
    assert word(outcome) == "OnlineRequest none"
    assert card_read(outcome).oda == oda
    assert card_read(attempt(card).outcome).oda == NOT_PERFORMED  # TTQ byte 1 bit 1 not set


# 5.7: cardholder verification

PIN, SIGN, BOTH, NEITHER = "34", "32", "36", "30"
NEVER, ALWAYS = None, 0  # CVM required limit


@pytest.mark.parametrize(
    ("means", "limit", "outcome"),
    [
        (BOTH, NEVER, "OnlineRequest none"),
        (BOTH, ALWAYS, "OnlineRequest signature"),
        (SIGN, ALWAYS, "OnlineRequest signature"),
        (PIN, ALWAYS, "OnlineRequest online_pin"),
        (NEITHER, ALWAYS, "Declined cvm_failed"),
    ],
)
def test_c3_5_7_cvm_of_a_card_without_ctq(means: str, limit: int | None, outcome: str) -> None:
    result = attempt(visa_card({"9F6C": None}), setup(visa(h(means + "004000"), cvm_required=limit)))
    assert word(result.outcome) == outcome


@pytest.mark.parametrize(
    ("ctq", "means", "limit", "outcome"),
    [
        ("8000", BOTH, NEVER, "OnlineRequest online_pin"),
        ("8000", SIGN, NEVER, "OnlineRequest none"),
        ("8000", SIGN, ALWAYS, "Declined cvm_failed"),
        ("8080", BOTH, NEVER, "OnlineRequest online_pin"),
        ("8080", SIGN, NEVER, "OnlineRequest cdcvm"),
        ("C000", BOTH, NEVER, "OnlineRequest online_pin"),
        ("C000", SIGN, NEVER, "OnlineRequest signature"),
        ("0080", NEITHER, ALWAYS, "OnlineRequest cdcvm"),
        ("4080", SIGN, ALWAYS, "OnlineRequest cdcvm"),
        ("4000", SIGN, ALWAYS, "OnlineRequest signature"),
        ("4000", PIN, ALWAYS, "Declined cvm_failed"),
        ("4000", PIN, NEVER, "OnlineRequest none"),
        ("0000", BOTH, ALWAYS, "Declined cvm_failed"),
        ("0000", BOTH, NEVER, "OnlineRequest none"),
    ],
)
def test_c3_5_7_cvm_of_a_card_with_ctq(ctq: str, means: str, limit: int | None, outcome: str) -> None:
    result = attempt(visa_card({"9F6C": h(ctq)}), setup(visa(h(means + "004000"), cvm_required=limit)))
    assert word(result.outcome) == outcome


@pytest.mark.parametrize(
    ("kind", "related", "outcome"),
    [
        ("ARQC", "01CAFEF00D0080", "OnlineRequest cdcvm"),
        ("ARQC", "01CAFEF00D0000", "Declined cvm_failed"),
        ("ARQC", "01CAFEF00D", "Declined cvm_failed"),
        ("ARQC", "01CAFEF00D0080FFFF", "OnlineRequest cdcvm"),  # longer is allowed, the CTQ stay at bytes 6 and 7
        ("ARQC", "01CAFEF00D00000080", "Declined cvm_failed"),
        ("ARQC", None, "OnlineRequest cdcvm"),
        ("TC", None, "Declined cvm_failed"),  # online by the terminal's wish, and nothing signed
    ],
)
def test_cdcvm_must_be_signed_for(kind: str, related: str | None, outcome: str) -> None:
    changes: dict[str, bytes | None] = {"9F6C": h("0080"), "9F69": h(related) if related else None}
    assert word(attempt(visa_card(changes, kind=kind), setup(visa(contactless_floor=0))).outcome) == outcome


def test_an_approval_with_online_pin_goes_online() -> None:
    assert word(attempt(visa_card({"9F6C": h("8000")}, kind="TC")).outcome) == "OnlineRequest online_pin"
    without_ctq = attempt(visa_card({"9F6C": None}, kind="TC"), setup(visa(h("34004000"), cvm_required=0)))
    assert word(without_ctq.outcome) == "OnlineRequest online_pin"


def test_approvals_say_how_the_cardholder_was_verified() -> None:
    signed = attempt(visa_card({"9F6C": h("4000")}, kind="TC")).outcome
    assert word(signed) == "Approved signature"
    assert isinstance(signed, Approved)
    assert signed.ui == UiRequest(MessageId.APPROVED_SIGN, Status.CARD_READ_OK)
    on_device = attempt(visa_card({"9F6C": h("0080")}, kind="TC")).outcome
    assert word(on_device) == "Approved cdcvm"
    assert isinstance(on_device, Approved)
    assert on_device.ui == UiRequest(MessageId.APPROVED, Status.CARD_READ_OK)


def test_a_declined_card_is_not_asked_for_verification() -> None:
    assert card_read(attempt(visa_card({"9F6C": h("8000")}, kind="AAC")).outcome).cvm is Cvm.NONE


# The online record


def test_the_online_record_is_complete() -> None:
    found = card_read(attempt(visa_card()).outcome)
    assert (found.aid, found.kernel, found.label, found.atc) == (VISA, 3, "VISA CREDIT", 7)
    assert (found.pan, found.cid, found.cryptogram) == (Pan(PAN), 0x80, h("0102030405060708"))
    expected = {
        0x57: h(f"{PAN}D30122010000012345"), 0x5A: h(PAN), 0x5F24: h("301231"), 0x5F34: h("01"),
        0x82: h("2000"), 0x84: VISA, 0x95: bytes(5), 0x9A: h("260314"), 0x9C: h("00"), 0x5F2A: h("0978"),
        0x9F02: h("000000001250"), 0x9F03: bytes(6), 0x9F10: h("06011203A00000"), 0x9F1A: h("0276"),
        0x9F26: h("0102030405060708"), 0x9F27: h("80"), 0x9F33: h("E0F8C8"), 0x9F36: ATC, 0x9F37: UN,
        0x9F39: h("07"), 0x9F6E: h("20700000"), 0x9F7C: b"closed loop", 0x9F21: h("150926"), 0x9F66: h("36004000"),
    }  # fmt: skip
    assert {tag: found.tags[tag] for tag in expected} == expected
    assert PAN not in repr(found)


@pytest.mark.parametrize("tag", ["9F02", "9F37", "95", "9F66", "9C", "9F15", "8A", "91"])
def test_a_card_cannot_state_what_is_not_its_own(tag: str) -> None:
    found = card_read(attempt(visa_card({tag: b"\xff" * 6})).outcome)
    assert found.tags == card_read(attempt(visa_card()).outcome).tags


def test_what_the_terminal_states_stands_against_the_card() -> None:
    """Also for tags that no book knows."""
    configured = replace(setup(), terminal={**setup().terminal, 0xDF02: b"terminal"})
    found = card_read(attempt(visa_card({"DF02": b"card"}), configured).outcome)
    assert found.tags[0xDF02] == b"terminal"


def test_the_amount_of_cashback() -> None:
    found = card_read(attempt(visa_card(), with_request=request(1250, 0x09, 500)).outcome)
    assert (found.tags[0x9C], found.tags[0x9F03]) == (h("09"), h("000000000500"))


# A card that leaves


@pytest.mark.parametrize("kind", ["ARQC", "TC", "AAC"])
def test_a_card_lost_at_any_command(kind: str) -> None:
    """Nothing was authorised before the last record was there: the card is simply presented again."""
    card = visa_card(kind=kind)
    whole = attempt(card)
    assert len(whole.commands) == 7
    for at in range(len(whole.commands)):
        lost = attempt(card, removed_at=at)
        assert lost.outcome == TryAgain("card_lost"), f"lost at command {at}"
        assert lost.commands == whole.commands[: at + 1]
        assert not lost.shown

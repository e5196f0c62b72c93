"""Kernel 2 (Book C-2): limits, CVM, action analysis, CDA, and where a decline leads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from emv_rig import (
    CRYPTOGRAMS,
    MASTERCARD,
    PAN,
    TERMINAL,
    Attempt,
    ChipCard,
    Pki,
    attempt,
    fci,
    ppse,
    request,
    rsa_key,
    setup,
    tlv,
)

from terminal.emv import entry_point
from terminal.emv.apdu import CardRemoved, Command, Response
from terminal.emv.configuration import Combination, ConfigurationError, Environment, Limits
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
    Torn,
    TryAgain,
    TryAnotherInterface,
    UiRequest,
)

PKI = Pki(rid=MASTERCARD[:5])
CDA_CARD, NO_CDA_CARD, PHONE = "1980", "1880", "1B80"  # AIP: CVM, risk management, EMV mode; CDA; on-device CVM
CDOL1 = bytes.fromhex("9F02069F03069F1A0295055F2A029A039C019F37049F34039F3303")
NONE_LEFT = EndApplication("no_common_application", UiRequest(MessageId.OTHER_CARD, Status.READY_TO_READ))


def h(text: str) -> bytes:
    return bytes.fromhex(text)


def amount(minor: int) -> bytes:
    return h(f"{minor:012d}")


TAGS: dict[int, bytes] = {
    0xDF8117: h("20"),  # a contact reader
    0xDF8118: h("60"),
    0xDF8119: h("08"),
    0xDF811F: h("08"),
    0xDF811B: h("A0"),
    0xDF8120: bytes(5),
    0xDF8121: bytes(5),
    0xDF8122: bytes(5),
    0xDF8123: amount(10_000),
    0xDF8124: amount(20_000),
    0xDF8125: amount(30_000),
    0xDF8126: amount(5_000),
}


def card(aip: str = CDA_CARD, changes: Mapping[str, bytes | None] | None = None, **more: object) -> ChipCard:
    objects = {"8C": CDOL1, **(changes or {})}
    defaults: dict[str, object] = {"kinds": ("TC",), "pki": PKI, "pdol": h("9F33039F1D08")}
    return ChipCard(aip=h(aip), changes=objects, aid=MASTERCARD, **{**defaults, **more})  # type: ignore[arg-type]


def tap(
    chip: ChipCard | None = None,
    tags: Mapping[int, bytes | None] | None = None,
    minor: int = 1250,
    *,
    limits: Limits | None = None,
    transaction_type: int = 0,
    removed_at: int | None = None,
    terminal: Mapping[int, bytes] | None = None,
) -> Attempt:
    merged = {tag: value for tag, value in {**TAGS, **(tags or {})}.items() if value is not None}
    combination = Combination(MASTERCARD, 2, limits or Limits(), merged)
    with_setup = replace(setup(combination, pki=PKI), terminal={**TERMINAL, **(terminal or {})})
    return attempt(chip or card(), with_setup, request(minor, transaction_type), removed_at=removed_at)


def card_of(outcome: Outcome) -> CardRead:
    assert isinstance(outcome, Approved | OnlineRequest | Declined)
    assert outcome.card is not None
    return outcome.card


def word(outcome: Outcome) -> str:
    return f"{type(outcome).__name__} {getattr(outcome, 'reason', '')}".strip()


def tag(outcome: Outcome, name: int) -> str:
    return card_of(outcome).tags[name].hex().upper()


def asked(result: Attempt) -> Command:
    (found,) = [command for command in result.commands if command.ins == 0xAE]
    return found


# The conversation


def test_the_whole_of_it() -> None:
    result = tap()
    assert [command.ins for command in result.commands] == [0xA4, 0xA4, 0xA8, *[0xB2] * 5, 0xAE]
    found = card_of(result.outcome)
    assert isinstance(result.outcome, Approved)
    assert (found.kernel, found.aid, found.pan, found.cvm) == (2, MASTERCARD, Pan(PAN), Cvm.NONE)
    assert (found.cryptogram, found.oda) == (CRYPTOGRAMS[0], OdaResult(OdaStatus.OK, OdaMethod.CDA))
    assert result.shown == [UiRequest(MessageId.CARD_READ_OK, Status.CARD_READ_OK)]
    assert asked(result).encode() == h(
        "80AE5000 23 000000001250 000000000000 0276 0000000001 0978 260314 00 11223344 1F0302 200808 00"
    )


def test_capabilities_in_the_pdol_know_no_amount_yet() -> None:
    """9F33 takes its second byte only when the amount is weighed."""
    data = tap(minor=5_001).commands[2].data
    assert data == h("830B 200008") + bytes(8)


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (b"\x6f\x7f", NONE_LEFT),
        (tlv("6F", tlv("A5", b"")), NONE_LEFT),
        (fci(MASTERCARD, None, tlv("50", b"AGAIN")), NONE_LEFT),
        (fci(MASTERCARD, h("9F33")), EndApplication("parse_error")),
    ],
)
def test_an_fci_that_cannot_be_used(answer: bytes, outcome: Outcome) -> None:
    listed = ppse(tlv("61", tlv("4F", MASTERCARD)))
    assert tap(card(files={b"2PAY.SYS.DDF01": listed, MASTERCARD: answer})).outcome == outcome


@pytest.mark.parametrize(
    ("ins", "sw", "outcome"),
    [
        (0xA8, 0x6985, NONE_LEFT),
        (0xA8, 0x6A81, NONE_LEFT),
        (0xB2, 0x6985, EndApplication("card_error")),
        (0xAE, 0x6985, EndApplication("card_error")),
    ],
)
def test_a_command_that_is_refused(ins: int, sw: int, outcome: Outcome) -> None:
    assert tap(card(sw={ins: sw})).outcome == outcome


def test_mag_stripe_cards_are_not_taken() -> None:
    insert = EndApplication("mag_stripe_only", UiRequest(MessageId.INSERT_CARD, Status.PROCESSING_ERROR))
    assert tap(card("1900")).outcome == insert
    assert tap(tags={0xDF811B: h("E0")}).outcome == insert  # a reader that is not to use EMV mode


@pytest.mark.parametrize("name", ["5A", "5F24", "8C"])
def test_missing_data(name: str) -> None:
    assert tap(card(changes={name: None})).outcome == EndApplication("missing_data")
    assert isinstance(tap(card(changes={"8D": None})).outcome, Approved)  # one GENERATE AC, one list


# Limits: every one of them may be reached, none exceeded


@pytest.mark.parametrize(
    ("aip", "minor", "allowed"),
    [
        (CDA_CARD, 20_000, True),
        (CDA_CARD, 20_001, False),
        (PHONE, 30_000, True),
        (PHONE, 30_001, False),
    ],
)
def test_transaction_limit(aip: str, minor: int, allowed: bool) -> None:
    outcome = tap(card(aip), minor=minor).outcome
    assert outcome == NONE_LEFT if not allowed else isinstance(outcome, Approved | Declined)


def test_a_reader_that_knows_no_phones_has_one_limit() -> None:
    assert tap(card(PHONE), {0xDF811B: h("80")}, minor=20_001).outcome == NONE_LEFT


def test_limits_of_the_combination_stand_in() -> None:
    bare: dict[int, bytes | None] = dict.fromkeys((0xDF8123, 0xDF8124, 0xDF8125, 0xDF8126))
    limits = Limits(contactless_transaction=2000, contactless_floor=1000, cvm_required=1100)
    found = tap(tags=bare, limits=limits).outcome
    assert tag(found, 0x95) == "0000808001"
    assert tap(tags=bare).outcome == NONE_LEFT  # and without any of them nothing is allowed
    assert tag(tap(limits=limits).outcome, 0x95) == "0000000001"  # kernel 2's own come first


@pytest.mark.parametrize(("minor", "tvr"), [(10_000, "0000800001"), (10_001, "0000808001")])
def test_floor_limit(minor: int, tvr: str) -> None:
    assert tag(tap(minor=minor).outcome, 0x95) == tvr


def test_parameters_that_cannot_be() -> None:
    for wrong in ({0xDF8124: b"\x01"}, {0xDF8126: h("00000000000A")}, {0xDF8121: bytes(4)}):
        with pytest.raises(ConfigurationError):
            tap(tags=wrong)


def test_defaults() -> None:
    """What the terminal as a whole can do, where nothing says what the kernel can."""
    bare: dict[int, bytes | None] = dict.fromkeys((0xDF8117, 0xDF8118, 0xDF8119, 0xDF811B, 0xDF811F))
    terminal = {0x9F33: h("E0F8C8")}
    below, above = tap(tags=bare, terminal=terminal), tap(tags=bare, minor=5_001, terminal=terminal)
    assert asked(below).data[-3:] == h("E00808")
    assert asked(above).data[-3:] == h("E0F008")
    tags = card_of(below.outcome).tags
    assert (tags[0x9F09], tags[0xDF810C], tags[0x9F7E]) == (h("0002"), b"\x02", b"\x01")
    phone = tap(card(PHONE), bare, 25_000, terminal=terminal)
    assert card_of(phone.outcome).cvm is Cvm.CDCVM


# CVM


@pytest.mark.parametrize(
    ("aip", "rules", "minor", "results", "tvr", "cvm"),
    [
        (PHONE, "1F00", 5_000, "3F0002", "0000000001", Cvm.NONE),
        (PHONE, "1F00", 5_001, "010002", "0000000001", Cvm.CDCVM),
        (CDA_CARD, "1F03", 5_000, "1F0302", "0000000001", Cvm.NONE),
        (CDA_CARD, "1F03", 5_001, "3F0001", "0000800001", Cvm.FAILED),
        (CDA_CARD, "420342031E031F03", 5_001, "420300", "0000040001", Cvm.ONLINE_PIN),
        (CDA_CARD, "420342031E031F03", 5_000, "1F0302", "0000000001", Cvm.NONE),
        (CDA_CARD, "5E031F03", 5_001, "5E0300", "0000000001", Cvm.SIGNATURE),
        (CDA_CARD, "4100 1E00", 5_001, "1E0000", "0000000001", Cvm.SIGNATURE),
        (CDA_CARD, "", 1, "3F0000", "2000000001", Cvm.NONE),
        ("0980", "1F03", 1, "3F0000", "0000000001", Cvm.NONE),
    ],
)
def test_c2_7_5_cvm(aip: str, rules: str, minor: int, results: str, tvr: str, cvm: Cvm) -> None:  # noqa: PLR0917
    outcome = tap(card(aip, {"8E": bytes(8) + h(rules)}), minor=minor).outcome
    assert (tag(outcome, 0x9F34), tag(outcome, 0x95), card_of(outcome).cvm) == (results, tvr, cvm)
    if isinstance(outcome, Approved):
        sign = cvm is Cvm.SIGNATURE
        assert outcome.ui.message is (MessageId.APPROVED_SIGN if sign else MessageId.APPROVED)


# Action analysis


@pytest.mark.parametrize(
    ("tags", "changes", "type_", "p1"),
    [
        ({}, {}, "22", 0x50),
        ({}, {}, "21", 0x90),
        ({0xDF8122: h("0000000001")}, {}, "22", 0x90),
        ({0xDF8121: h("0000000001")}, {}, "22", 0x00),
        ({0xDF8121: h("0000000001")}, {"9F5D": h("000100")}, "22", 0x10),
        ({0xDF8120: h("0000000001")}, {}, "23", 0x00),
        ({}, {"9F0F": None}, "22", 0x90),
        ({0xDF8120: None, 0xDF8121: None, 0xDF8122: None}, {}, "22", 0x50),
        ({0xDF8121: None}, {"9F46": None}, "22", 0x00),  # the default TAC: a card without CDA is not taken
    ],
)
def test_c2_6_7_what_is_asked_for(
    tags: Mapping[int, bytes | None], changes: Mapping[str, bytes | None], type_: str, p1: int
) -> None:
    result = tap(card(changes=changes, kinds=("AAC",)), tags, terminal={0x9F35: h(type_)})
    assert asked(result).p1 == p1


@pytest.mark.parametrize(
    ("aip", "changes", "security", "tvr", "p1"),
    [
        (CDA_CARD, {}, "08", "0000000001", 0x50),
        (CDA_CARD, {}, "00", "8000000001", 0x40),
        (NO_CDA_CARD, {}, "08", "8000000001", 0x40),
        ("1A80", {}, "08", "8000000001", 0x00),  # a phone that cannot prove what it verified
        (PHONE, {"8F": b"\x01"}, "08", "0400000001", 0x00),
        (CDA_CARD, {"8F": b"\x01"}, "08", "0400000001", 0x40),
        (CDA_CARD, {"8F": None}, "08", "2400000001", 0x40),
        (CDA_CARD, {"90": None}, "08", "2400000001", 0x40),
        (CDA_CARD, {"9F32": None}, "08", "2400000001", 0x40),
        (CDA_CARD, {"9F46": None}, "08", "2400000001", 0x40),
        (CDA_CARD, {"9F47": None}, "08", "2400000001", 0x40),
        (CDA_CARD, {"9F4A": None}, "08", "2400000001", 0x40),
    ],
)
def test_whether_cda_can_be_had(
    aip: str, changes: Mapping[str, bytes | None], security: str, tvr: str, p1: int
) -> None:
    kind = "TC" if p1 != 0x00 else "AAC"
    result = tap(card(aip, changes, kinds=(kind,)), {0xDF811F: h(security), 0xDF8117: b"\x00"})
    assert (tag(result.outcome, 0x95), asked(result).p1) == (tvr, p1)


def test_any_other_tag_list_ends_it() -> None:
    assert tap(card(changes={"9F4A": h("8282")})).outcome == EndApplication("card_error")


def test_restrictions() -> None:
    changes: dict[str, bytes | None] = {"5F24": h("250101"), "5F25": h("270101"), "9F07": h("0000"), "9F08": h("0009")}
    assert tag(tap(card(changes=changes)).outcome, 0x95) == "00F0000001"


# What the card answers


@pytest.mark.parametrize(
    ("kind", "online_only", "outcome"),
    [
        ("TC", False, "Approved"),
        ("ARQC", False, "OnlineRequest"),
        ("ARQC", True, "OnlineRequest"),
        ("TC", True, "EndApplication card_error"),  # more than was asked for
        ("RFU", False, "EndApplication card_error"),
        ("AAC", False, "TryAnotherInterface card_declined"),
    ],
)
@pytest.mark.parametrize("aip", [CDA_CARD, NO_CDA_CARD])
def test_cryptograms(kind: str, online_only: bool, outcome: str, aip: str) -> None:
    terminal = {0x9F35: h("21" if online_only else "22")}
    assert word(tap(card(aip, kinds=(kind,)), terminal=terminal).outcome) == outcome


def test_an_online_request_has_nothing_to_resume() -> None:
    outcome = tap(card(kinds=("ARQC",))).outcome
    assert isinstance(outcome, OnlineRequest)
    assert (outcome.resume, outcome.ui.message, outcome.card.cid) == (None, MessageId.AUTHORISING, 0x80)


@pytest.mark.parametrize(
    ("changes", "data_input", "type_", "outcome", "message"),
    [
        ({}, "20", 0x00, "TryAnotherInterface card_declined", MessageId.INSERT_CARD),
        ({}, "20", 0x09, "TryAnotherInterface card_declined", MessageId.INSERT_CARD),
        ({}, "20", 0x01, "TryAnotherInterface card_declined", MessageId.INSERT_CARD),
        ({}, "20", 0x17, "TryAnotherInterface card_declined", MessageId.INSERT_CARD),
        ({}, "20", 0x20, "EndApplication card_declined", MessageId.CLEAR_DISPLAY),
        ({}, "00", 0x00, "Declined card_declined", MessageId.DECLINED),
        ({"9F6E": h("0276000031 31")}, "20", 0x00, "Declined card_declined", MessageId.DECLINED),
        ({"9F6E": h("0276000030 30")}, "20", 0x00, "TryAnotherInterface card_declined", MessageId.INSERT_CARD),
        ({"9F6E": h("0276800031 31")}, "20", 0x00, "TryAnotherInterface card_declined", MessageId.INSERT_CARD),
        ({"9F6E": h("0276000031")}, "20", 0x00, "TryAnotherInterface card_declined", MessageId.INSERT_CARD),
    ],
)
def test_c2_6_9_where_a_decline_leads(
    changes: Mapping[str, bytes | None], data_input: str, type_: int, outcome: str, message: MessageId
) -> None:
    result = tap(card(changes=changes, kinds=("AAC",)), {0xDF8117: h(data_input)}, transaction_type=type_).outcome
    assert word(result) == outcome
    assert isinstance(result, TryAnotherInterface | EndApplication | Declined)
    assert result.ui.message is message


def test_a_decline_that_the_terminal_wanted() -> None:
    declined = tap(card(kinds=("AAC",)), {0xDF8121: h("0000000001"), 0xDF8117: b"\x00"}).outcome
    assert word(declined) == "Declined terminal_declined"


@pytest.mark.parametrize(
    ("interaction", "message"),
    [
        ("000001", MessageId.SEE_PHONE),
        ("000100", MessageId.SEE_PHONE),
        ("000200", MessageId.SEE_PHONE),
        ("000402", MessageId.SEE_PHONE),
        ("000002", MessageId.DECLINED),
        ("001000", None),  # all is well with the phone
        ("000000", None),
    ],
)
@pytest.mark.parametrize("kind", ["TC", "AAC"])
def test_what_a_phone_wants(interaction: str, message: MessageId | None, kind: str) -> None:
    chip = card(kinds=(kind,), answer_objects={"DF4B": h(interaction)})
    outcome = tap(chip).outcome
    if message is None:
        assert isinstance(outcome, Approved | TryAnotherInterface)
    else:
        assert outcome == EndApplication(
            "confirm_on_phone",
            UiRequest(message, Status.NOT_READY, hold_ms=1300),
            restart=UiRequest(message, Status.READY_TO_READ),
        )
        slow = tap(chip, {0xDF812D: h("000030")}).outcome
        assert isinstance(slow, EndApplication)
        assert slow.ui.hold_ms == 3000


def test_the_phone_message_table_may_be_another() -> None:
    chip = card(answer_objects={"DF4B": h("000002")})
    table = h("000008 000008 20 00  000002 000002 21 02  000000 000000 07 00")
    outcome = tap(chip, {0xDF8131: table}).outcome
    assert isinstance(outcome, EndApplication)
    assert outcome.ui == UiRequest(MessageId.PRESENT_AGAIN, Status.READY_TO_READ, hold_ms=1300)
    for wrong in (table[:-1], h("0000020000020000")[:7] + b"\x09", h("000002000002 F1 00")):
        with pytest.raises(ConfigurationError, match="DF8131"):
            tap(chip, {0xDF8131: wrong})


# CDA


def flip(value: bytes) -> bytes:
    return value[:-1] + bytes([value[-1] ^ 1])


@pytest.mark.parametrize(
    "chip",
    [
        card(spoil=flip),
        card(kinds=("ARQC",), spoil=flip),
        card(spoil=lambda _: PKI.sign_cryptogram(0x40, CRYPTOGRAMS[0], b"another transaction", bytes(4))),
        card(pki=replace(PKI, icc_expiry="0126")),
        card(pki=replace(PKI, ca=rsa_key("another ca", 144))),
        card(changes={"9F5D": h("000100")}, kinds=("AAC",), answer_objects={"9F4B": bytes(112)}),
    ],
)
def test_a_signature_that_does_not_hold(chip: ChipCard) -> None:
    assert tap(chip).outcome == EndApplication("oda_failed")


def test_an_aac_may_be_signed() -> None:
    class Signs(ChipCard):
        def answer(self, command: Command) -> Response:
            if command.ins != 0xAE:
                return super().answer(command)
            assert command.p1 == 0x10
            clear = tlv("9F27", b"\x00") + tlv("9F36", h("0007")) + tlv("9F10", h("06011203A00000"))
            data = self._transaction_data + command.data + clear
            signature = self.pki.sign_cryptogram(0x00, CRYPTOGRAMS[0], data, h("11223344"))
            return Response(tlv("77", clear, tlv("9F4B", signature)), 0x9000)

    signs = Signs(aip=h(CDA_CARD), changes={"8C": CDOL1, "9F5D": h("000100")}, aid=MASTERCARD, pki=PKI, pdol=None)
    outcome = tap(signs, {0xDF8121: h("0000000001"), 0xDF8117: b"\x00"}).outcome
    assert word(outcome) == "Declined terminal_declined"
    assert card_of(outcome).oda == OdaResult(OdaStatus.OK, OdaMethod.CDA)
    assert card_of(outcome).cryptogram == CRYPTOGRAMS[0]


@pytest.mark.parametrize(
    ("aip", "changes", "outcome"),
    [
        (CDA_CARD, {"9F4B": None}, EndApplication("card_error")),
        (CDA_CARD, {"9F4B": None, "9F26": bytes(8)}, EndApplication("card_error")),
        (NO_CDA_CARD, {"9F26": None}, EndApplication("missing_data")),
        (NO_CDA_CARD, {"9F27": None}, EndApplication("missing_data")),
        (NO_CDA_CARD, {"9F36": b"\x01"}, EndApplication("parse_error")),
    ],
)
def test_an_answer_that_lacks_something(aip: str, changes: dict[str, bytes | None], outcome: Outcome) -> None:
    assert tap(card(aip, answer_objects=changes)).outcome == outcome


# A card that leaves


def test_a_card_that_leaves() -> None:
    """Up to the records nothing was asked of it; during GENERATE AC there may be a cryptogram that nobody has."""
    total = len(tap().commands)
    outcomes = [tap(removed_at=at).outcome for at in range(total)]
    assert outcomes == [TryAgain("card_lost")] * (total - 1) + [Torn("card_lost")]


# A reader that knows mag-stripe mode


@pytest.mark.parametrize(("configuration", "records"), [("A0", 5), ("20", 4)])
def test_the_record_of_mag_stripe_mode_is_skipped(configuration: str, records: int) -> None:
    """With the bit "mag-stripe mode not supported" it is read like any other. (What stands in it is then missing.)"""
    result = tap(tags={0xDF811B: h(configuration)})
    assert [command.ins for command in result.commands].count(0xB2) == records
    assert result.outcome == EndApplication("missing_data") if records == 4 else isinstance(result.outcome, Approved)


# Balance


def balance_of(chip: ChipCard, *where: int) -> tuple[Attempt, list[int]]:
    result = tap(chip, dict.fromkeys(where, b""))
    return result, [command.ins for command in result.commands if command.ins in {0xCA, 0xAE}]


def test_the_balance_is_read_before_and_after() -> None:
    chip = card(changes={"9F5D": h("000200")}, data={"9F50": h("9F5006000000004200")})
    result, order = balance_of(chip, 0xDF8104, 0xDF8105)
    assert order == [0xCA, 0xAE, 0xCA]
    assert isinstance(result.outcome, Approved)
    assert result.outcome.ui.balance_minor == 4200
    assert tag(result.outcome, 0xDF8105) == "000000004200"
    assert balance_of(chip, 0xDF8105)[1] == [0xAE, 0xCA]
    assert balance_of(chip)[1] == [0xAE]  # nobody asked


@pytest.mark.parametrize("data", [None, "9F50", "9F500600000000420A", "9F5003000042", "9F5106000000004200"])
def test_a_balance_that_cannot_be_had(data: str | None) -> None:
    chip = card(changes={"9F5D": h("000200")}, data={"9F50": h(data)} if data else {})
    outcome = balance_of(chip, 0xDF8105)[0].outcome
    assert isinstance(outcome, Approved)
    assert outcome.ui.balance_minor is None


def test_a_card_that_does_not_offer_its_balance_is_not_asked() -> None:
    assert balance_of(card(data={"9F50": h("9F5006000000004200")}), 0xDF8104, 0xDF8105)[1] == [0xAE]


def test_a_card_that_leaves_while_its_balance_is_read() -> None:
    chip = card(changes={"9F5D": h("000200")}, data={"9F50": h("9F5006000000004200")})
    tags: dict[int, bytes | None] = {0xDF8104: b"", 0xDF8105: b""}
    total = len(tap(chip, tags).commands)
    assert tap(chip, tags, removed_at=total - 3).outcome == TryAgain("card_lost")  # before the cryptogram
    assert isinstance(tap(chip, tags, removed_at=total - 1).outcome, Approved)  # and after it


# Relay resistance

RELAYING = "1981"  # AIP with relay resistance
RESIST: dict[int, bytes | None] = {0xDF811B: h("B0")}
TIMES = h("0010 0040 0018")  # 1.6 to 6.4 ms of processing, 2.4 ms for the answer on the air
ON_THE_AIR_US = 1_800 + 2_400


class Relaying(ChipCard):
    """Answers the challenge after `lasts_us`, one after the other; signs what was said."""

    lasts_us: tuple[int | None, ...] = (ON_THE_AIR_US + 2_000,)
    times: bytes = TIMES
    challenges: list[bytes]

    def answer(self, command: Command) -> Response:
        if command.ins != 0xEA:
            return super().answer(command)
        self.challenges = [*getattr(self, "challenges", []), command.data]
        lasts_us = self.lasts_us[min(len(self.challenges), len(self.lasts_us)) - 1]
        self.more_signed = command.data + h("CAFEF00D") + self.times
        return Response(tlv("80", h("CAFEF00D") + self.times), 0x9000, lasts_us)


def relaying(*lasts_us: int | None, times: bytes = TIMES, aip: str = RELAYING, **more: object) -> Relaying:
    made: dict[str, object] = {"kinds": ("TC",), "pki": PKI, "changes": {"8C": CDOL1}, **more}
    chip = Relaying(aip=h(aip), aid=MASTERCARD, pdol=h("9F33039F1D08"), **made)  # type: ignore[arg-type]
    chip.times = times
    if lasts_us:
        chip.lasts_us = lasts_us
    return chip


@pytest.mark.parametrize(
    ("beyond_us", "tvr", "attempts"),
    [
        ((2_000,), "0000000002", 1),
        ((11_400,), "0000000002", 1),  # 6.4 ms and 5.0 ms of grace
        ((11_500, 2_000), "0000000002", 2),
        ((11_500, 11_500, 2_000), "0000000002", 3),
        ((11_500, 11_500, 11_500), "0000000006", 3),
        ((40_000,), "000000000E", 3),
    ],
)
def test_c2_3_10_how_long_the_card_took(beyond_us: tuple[int, ...], tvr: str, attempts: int) -> None:
    chip = relaying(*(ON_THE_AIR_US + each for each in beyond_us))
    outcome = tap(chip, {**RESIST, 0xDF8122: bytes(5)}).outcome
    assert (tag(outcome, 0x95), len(chip.challenges)) == (tvr, attempts)
    assert tag(outcome, 0xDF8307) == f"{attempts - 1:02X}"
    assert card_of(outcome).oda == OdaResult(OdaStatus.OK, OdaMethod.CDA)  # what was said is signed


def test_an_answer_that_comes_too_soon_was_not_computed() -> None:
    quick = relaying(0, times=h("0040 0080 0018"))
    assert tap(quick, RESIST).outcome == EndApplication("card_error")
    assert isinstance(tap(relaying(None, times=h("0040 0080 0018")), RESIST).outcome, Approved)  # nobody measured


@pytest.mark.parametrize(
    ("estimate", "tvr"), [("000C", "02"), ("000B", "0A"), ("0030", "02"), ("0031", "0A"), ("0000", "0A")]
)
def test_card_and_terminal_should_agree_on_the_air(estimate: str, tvr: str) -> None:
    chip = relaying(None, times=h("0010 0040" + estimate))
    assert tag(tap(chip, RESIST).outcome, 0x95)[-2:] == tvr


def test_what_was_said_must_be_signed() -> None:
    class Liar(Relaying):
        def answer(self, command: Command) -> Response:
            response = super().answer(command)
            if command.ins == 0xEA:
                self.more_signed = command.data + h("CAFEF00D") + h("0010 0041 0018")
            return response

    liar = Liar(aip=h(RELAYING), aid=MASTERCARD, pdol=None, kinds=("TC",), pki=PKI, changes={"8C": CDOL1})
    assert tap(liar, RESIST).outcome == EndApplication("oda_failed")


@pytest.mark.parametrize(("aip", "configuration"), [(CDA_CARD, "B0"), (RELAYING, "A0")])
def test_both_must_know_it(aip: str, configuration: str) -> None:
    result = tap(card(aip), {0xDF811B: h(configuration)})
    assert 0xEA not in [command.ins for command in result.commands]
    assert tag(result.outcome, 0x95)[-2:] == "01"


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (Response(b"", 0x6985), "EndApplication card_error"),
        (Response(tlv("80", bytes(9)), 0x9000), "EndApplication parse_error"),
        (Response(tlv("77", bytes(10)), 0x9000), "EndApplication parse_error"),
        (Response(b"", 0x9000), "EndApplication parse_error"),
    ],
)
def test_an_answer_that_is_none(answer: Response, outcome: str) -> None:
    class Odd(ChipCard):
        def answer(self, command: Command) -> Response:
            return answer if command.ins == 0xEA else super().answer(command)

    odd = Odd(aip=h(RELAYING), aid=MASTERCARD, pdol=None, kinds=("TC",), pki=PKI, changes={"8C": CDOL1})
    assert word(tap(odd, RESIST).outcome) == outcome


def test_without_a_signature_track_2_tells_the_issuer() -> None:
    """Key index, attempt, the card's entropy F00D in five digits, and 20 for 2 ms in three."""
    chip = relaying(
        ON_THE_AIR_US + 2_000, aip="1881", changes={"8C": CDOL1, "8F": b"\x05", "57": h(f"{PAN}D30122010000012345")}
    )
    outcome = tap(chip, {**RESIST, 0xDF8121: bytes(5)}).outcome
    assert tag(outcome, 0x57) == f"{PAN}D3012201" + "50" + f"{0xF00D:05d}" + "020" + "000F"


# A card that was torn away


class Recovering(ChipCard):
    """Leaves during its first GENERATE AC, and gives what it computed then when it is asked to."""

    forgets: bool = False
    commands: list[Command]
    _lost: Response | None = None

    def answer(self, command: Command) -> Response:
        self.commands = [*getattr(self, "commands", []), command]
        if command.ins == 0xD0:
            return Response(b"", 0x6985) if self.forgets or self._lost is None else self._lost
        if command.ins == 0xAE:
            self.unpredictable_number = command.data[25:29]  # where CDOL1 has it
        response = super().answer(command)
        if command.ins == 0xAE and self._lost is None:
            self._lost = response
        return response


DRDOL = "9F0206 9F3704"
REMEMBER: dict[int, bytes | None] = {0xDF811D: b"\x01"}


def recovering(**more: object) -> Recovering:
    changes = {"8C": CDOL1, "9F51": h(DRDOL), **more}
    return Recovering(aip=h(CDA_CARD), aid=MASTERCARD, pdol=h("9F3704"), kinds=("TC",), pki=PKI, changes=changes)  # type: ignore[arg-type]


def taps(chips: list[Recovering], tags: Mapping[int, bytes | None] = REMEMBER) -> list[Outcome]:
    """Each is presented in turn in one sale; the first leaves with its GENERATE AC done and not received."""
    numbers = iter(bytes((0x10 + n,)) * 4 for n in range(9))
    merged = {tag: value for tag, value in {**TAGS, **tags}.items() if value is not None}
    with_setup = setup(Combination(MASTERCARD, 2, Limits(), merged), pki=PKI)
    lent = Environment(unpredictable_number=lambda: next(numbers), notify=lambda _: None)
    outcomes = []
    for at, chip in enumerate(chips):
        lost = at == 0

        exchange = entry_point.run(with_setup, request(1250), lent)
        try:
            command = next(exchange)
            while True:
                response = chip.answer(command)
                command = exchange.throw(CardRemoved()) if lost and command.ins == 0xAE else exchange.send(response)
        except StopIteration as stop:
            outcomes.append(stop.value)
    return outcomes


def test_a_cryptogram_lost_on_the_air_is_recovered() -> None:
    chip = recovering()
    torn, outcome = taps([chip, chip])
    assert torn == Torn("card_lost")
    assert isinstance(outcome, Approved)
    (asked_again,) = [command for command in chip.commands if command.ins == 0xD0]
    assert asked_again.encode() == h("80D00000 0A 000000001250 10101010 00")  # what was said then, not what is said now
    assert [command.ins for command in chip.commands].count(0xAE) == 1  # one cryptogram, one count
    assert card_of(outcome).oda == OdaResult(OdaStatus.OK, OdaMethod.CDA)
    assert (tag(outcome, 0x9F37), card_of(outcome).cryptogram) == ("10101010", CRYPTOGRAMS[0])


def test_a_card_that_has_forgotten_computes_another_one() -> None:
    chip = recovering()
    chip.forgets = True
    outcome = taps([chip, chip])[1]
    assert isinstance(outcome, Approved)
    assert tag(outcome, 0x9F37) == "11111111"
    assert [command.ins for command in chip.commands if command.ins >= 0xAE][-3:] == [0xB2, 0xD0, 0xAE]


@pytest.mark.parametrize(
    ("first", "second", "tags"),
    [
        ({}, {}, {}),  # the reader keeps nothing
        ({"9F51": None}, {"9F51": None}, REMEMBER),
        ({}, {"5F34": b"\x02"}, REMEMBER),  # another card
        ({}, {"5A": h("5413330089010434")}, REMEMBER),
    ],
)
def test_when_there_is_nothing_to_recover(
    first: dict[str, bytes | None], second: dict[str, bytes | None], tags: dict[int, bytes | None]
) -> None:
    chips = [recovering(**first), recovering(**second)]
    taps(chips, tags)
    assert 0xD0 not in [command.ins for command in chips[1].commands]


def test_what_is_recovered_must_be_right() -> None:
    chip, other = recovering(), recovering()
    taps([other])
    taps([chip])
    chip._lost = Response(other._lost.data[:-1] + b"\x00", 0x9000) if other._lost else None
    assert word(taps([chip, chip])[1]) in {"EndApplication oda_failed", "EndApplication parse_error"}

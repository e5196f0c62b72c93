"""Entry point (Book B): pre-processing, candidate list, final selection, and what happens with a kernel's outcome."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from emv_rig import (
    TERMINAL,
    TTQ,
    VISA,
    Attempt,
    Card,
    attempt,
    directory_entry,
    fci,
    ppse,
    request,
    setup,
    tlv,
    visa,
    visa_card,
)

from terminal.emv import entry_point
from terminal.emv.apdu import Exchange
from terminal.emv.configuration import (
    CONTACT,
    Activation,
    Combination,
    ConfigurationError,
    Environment,
    Indicators,
    Limits,
    Setup,
)
from terminal.emv.configuration import Request as PaymentRequest
from terminal.emv.entry_point import Kernel, Prepared, preprocess
from terminal.emv.outcome import (
    Declined,
    EndApplication,
    MessageId,
    OnlineRequest,
    Outcome,
    SelectNext,
    Status,
    TryAgain,
    TryAnotherInterface,
    UiRequest,
)
from terminal.emv.selection import default_kernel, label
from terminal.money import JPY, KWD, Amount

MASTERCARD = bytes.fromhex("A0000000041010")
OTHER = bytes.fromhex("F00000000101")
NONE_LEFT = EndApplication("no_common_application", UiRequest(MessageId.OTHER_CARD, Status.READY_TO_READ))


def prepared(combination: Combination, with_request: PaymentRequest) -> Prepared:
    found = preprocess(setup(combination), with_request)
    assert not isinstance(found, TryAnotherInterface)
    return found[0]


def refusal(combination: Combination, with_request: PaymentRequest) -> TryAnotherInterface:
    found = preprocess(setup(combination), with_request)
    assert isinstance(found, TryAnotherInterface)
    return found


# 3.1.1: pre-processing


def test_nothing_configured_finds_nothing() -> None:
    assert prepared(visa(None), request()) == Prepared(visa(None), Indicators(), None)


@pytest.mark.parametrize(
    ("amount_minor", "requested"), [(100, True), (99, False), (101, False), (1, False), (0, False)]
)
def test_status_check_is_a_single_unit_of_currency(amount_minor: int, requested: bool) -> None:
    found = prepared(visa(status_check=True), request(amount_minor))
    assert found.indicators.status_check_requested is requested
    assert not prepared(visa(), request(amount_minor)).indicators.status_check_requested


@pytest.mark.parametrize(("currency", "amount_minor"), [(JPY, 1), (KWD, 1000)])
def test_a_single_unit_depends_on_the_currency(currency: object, amount_minor: int) -> None:
    base = request()
    one = PaymentRequest(Amount(amount_minor, currency), base.date, base.time)  # type: ignore[arg-type]
    assert prepared(visa(status_check=True), one).indicators.status_check_requested


@pytest.mark.parametrize(("allowed", "found"), [(None, True), (True, True)])
def test_zero_amount_allowed(allowed: bool | None, found: bool) -> None:
    assert prepared(visa(zero_amount_allowed=allowed), request(0)).indicators.zero_amount is found


def test_zero_amount_not_allowed() -> None:
    assert refusal(visa(zero_amount_allowed=False), request(0)).reason == "not_allowed"
    assert prepared(visa(zero_amount_allowed=False), request(1)).indicators == Indicators()


@pytest.mark.parametrize(("amount_minor", "allowed"), [(4999, True), (5000, False), (5001, False)])
def test_the_transaction_limit_is_itself_too_much(amount_minor: int, allowed: bool) -> None:
    combination = visa(contactless_transaction=5000)
    if allowed:
        assert prepared(combination, request(amount_minor)).indicators == Indicators()
    else:
        assert refusal(combination, request(amount_minor)) == TryAnotherInterface(
            "amount_over_limit", UiRequest(MessageId.INSERT_OR_SWIPE, Status.PROCESSING_ERROR)
        )


@pytest.mark.parametrize(("amount_minor", "exceeded"), [(4999, False), (5000, False), (5001, True)])
def test_the_floor_limit_may_be_reached(amount_minor: int, exceeded: bool) -> None:
    for limits in (
        {"contactless_floor": 5000},
        {"terminal_floor": 5000},
        {"contactless_floor": 5000, "terminal_floor": 0},
    ):
        assert prepared(visa(**limits), request(amount_minor)).indicators.floor_exceeded is exceeded


def test_a_reader_floor_of_zero_is_a_limit() -> None:
    assert prepared(visa(contactless_floor=0, terminal_floor=9999), request(1)).indicators.floor_exceeded


@pytest.mark.parametrize(("amount_minor", "exceeded"), [(4999, False), (5000, True), (5001, True)])
def test_the_cvm_limit_is_itself_too_much(amount_minor: int, exceeded: bool) -> None:
    found = prepared(visa(cvm_required=5000), request(amount_minor))
    assert found.indicators.cvm_required_exceeded is exceeded
    assert found.ttq == bytes.fromhex("36404000" if exceeded else "36004000")


@pytest.mark.parametrize(
    ("configured", "limits", "amount_minor", "ttq"),
    [
        ("36C04000", {}, 1250, "36004000"),  # both bits are the transaction's, not the configuration's
        ("36FF4000", {}, 1250, "363F4000"),
        ("36004000", {"contactless_floor": 1000}, 1250, "36804000"),
        ("36004000", {"status_check": True}, 100, "36804000"),
        ("36004000", {}, 0, "36804000"),
        ("36004000", {"contactless_floor": 0, "cvm_required": 0}, 1, "36C04000"),
    ],
)
def test_book_b_3_1_1_ttq(configured: str, limits: dict[str, object], amount_minor: int, ttq: str) -> None:
    assert prepared(visa(bytes.fromhex(configured), **limits), request(amount_minor)).ttq == bytes.fromhex(ttq)


def test_zero_amount_on_an_offline_only_terminal() -> None:
    assert refusal(visa(bytes.fromhex("3E004000")), request(0)).reason == "not_allowed"


def test_zero_amount_without_ttq() -> None:
    assert prepared(visa(None), request(0)) == Prepared(visa(None), Indicators(zero_amount=True), None)


def test_ttq_in_the_limits_stands_in_for_the_tag() -> None:
    both = Combination(VISA, 3, Limits(ttq=bytes.fromhex("26000000")), {0x9F66: TTQ})
    assert prepared(both, request()).ttq == bytes.fromhex("26000000")


def test_transaction_types() -> None:
    combination = visa(transaction_types=frozenset({0x00, 0x09}))
    assert prepared(combination, request(transaction_type=0x09))
    assert refusal(combination, request(transaction_type=0x20)).reason == "not_allowed"


def test_what_is_left_keeps_its_order() -> None:
    low, high = visa(contactless_transaction=1000), visa(contactless_transaction=9000, aid=VISA[:6])
    found = preprocess(setup(low, high), request(5000))
    assert not isinstance(found, TryAnotherInterface)
    assert [each.combination for each in found] == [high]


def test_a_refusal_asks_no_card_for_anything() -> None:
    refused = attempt(visa_card(), setup(visa(contactless_transaction=1000)))
    assert isinstance(refused.outcome, TryAnotherInterface)
    assert not refused.commands


@pytest.mark.parametrize(("aid", "ttq"), [(VISA[:4], TTQ), (bytes(17), TTQ), (VISA, b""), (VISA, TTQ + b"\x00")])
def test_a_combination_that_cannot_be_used(aid: bytes, ttq: bytes) -> None:
    with pytest.raises(ConfigurationError):
        visa(ttq, aid)


# 3.3.2: candidate list


def stand_in(outcome: Outcome, seen: list[Activation]) -> Kernel:
    """A kernel that only notes what it was handed."""

    def kernel(
        setup: Setup, request: PaymentRequest, environment: Environment, activation: Activation
    ) -> Exchange[Outcome]:
        seen.append(activation)
        return outcome
        yield

    return kernel


def handed_over(
    card: Card, *combinations: Combination, outcome: Outcome | None = None
) -> tuple[list[Activation], Attempt]:
    """What each kernel is started with; by default every one of them says Select Next."""
    seen: list[Activation] = []
    kernel = stand_in(outcome or SelectNext("test"), seen)
    kernels: Mapping[int, Kernel] = dict.fromkeys((1, 2, 3, 4, 5, 6, 7, 0x810203, 0x8102, 0x800000, 0xC00000), kernel)
    return seen, attempt(card, setup(*combinations), kernels=kernels)


def card_with(*entries: bytes, **fcis: bytes | None) -> Card:
    names = [VISA, VISA + b"\x01", VISA + b"\x02", MASTERCARD, OTHER, VISA + b"\xee"]
    pdol = bytes.fromhex("9F6604")
    return Card(ppse(*entries), {name: fci(name, pdol) for name in names})


def selected(seen: list[Activation]) -> list[tuple[bytes, int]]:
    return [(activation.adf_name, activation.combination.kernel) for activation in seen]


@pytest.mark.parametrize(
    "card", [Card(), Card(ppse=ppse()), Card(ppse=tlv("6F", tlv("84", b"x"))), Card(ppse=tlv("6F", tlv("A5", b"")))]
)
def test_no_directory_or_an_empty_one(card: Card) -> None:
    result = attempt(card)
    assert result.outcome == NONE_LEFT
    assert [command.encode().hex().upper() for command in result.commands] == [
        "00A404000E325041592E5359532E444446303100"
    ]


@pytest.mark.parametrize("answer", ["", "6F", "6F05", "7000", "6F00 6F00", "6F03 A50180"])
def test_a_directory_that_cannot_be_read(answer: str) -> None:
    result = attempt(Card(ppse=bytes.fromhex(answer)))
    assert result.outcome == EndApplication("parse_error", UiRequest(MessageId.OTHER_CARD, Status.READY_TO_READ))


@pytest.mark.parametrize(
    "entry",
    [
        tlv("61", tlv("50", b"NO NAME")),
        directory_entry(VISA[:4]),
        directory_entry(VISA.ljust(17, b"\x00")),
        directory_entry(MASTERCARD),
        directory_entry(VISA[:6]),  # shorter than the terminal's AID
        directory_entry(VISA, tag_9F29=bytes(10)),  # with its extension longer than a name can be
    ],
)
def test_entries_that_are_passed_over(entry: bytes) -> None:
    seen, result = handed_over(card_with(entry, directory_entry(VISA + b"\x01", 2)), visa())
    assert selected(seen) == [(VISA + b"\x01", 3)]
    assert result.outcome == NONE_LEFT


def test_an_adf_name_may_begin_with_the_aid() -> None:
    seen, _ = handed_over(card_with(directory_entry(VISA + b"\x01")), visa(aid=VISA[:5]))
    assert selected(seen) == [(VISA + b"\x01", 3)]


@pytest.mark.parametrize(
    ("identifier", "kernel", "wanted"),
    [
        ("", 3, True),  # empty: the scheme's default
        ("00", 3, True),  # any
        ("00", 2, True),
        ("03", 3, True),
        ("03", 2, False),
        ("02", 3, False),
        ("43", 0x43, False),  # reserved coding, taken as it stands; no such kernel here
        ("810203", 0x810203, True),  # domestic: three bytes
        ("810203FF", 0x810203, True),
        ("8102", 0x8102, False),  # cut short
        ("8103", 3, False),
        ("800000", 0x800000, False),  # to be determined otherwise
        ("C00000", 0xC00000, False),
    ],
)
def test_book_b_3_3_2_the_kernel_that_the_card_asks_for(identifier: str, kernel: int, wanted: bool) -> None:
    entry = directory_entry(VISA, tag_9F2A=bytes.fromhex(identifier))
    seen, _ = handed_over(card_with(entry), visa(kernel=kernel))
    assert selected(seen) == ([(VISA, kernel)] if wanted else [])


def test_without_an_identifier_the_scheme_has_a_kernel() -> None:
    seen, _ = handed_over(card_with(directory_entry(VISA)), visa(kernel=2), visa(kernel=3))
    assert selected(seen) == [(VISA, 3)]
    seen, _ = handed_over(card_with(directory_entry(OTHER)), visa(aid=OTHER, kernel=5))
    assert selected(seen) == [(OTHER, 5)]  # a scheme nobody knows leaves the choice to the terminal


@pytest.mark.parametrize(
    ("rid", "kernel"),
    [("04", 2), ("03", 3), ("25", 4), ("65", 5), ("0152", 6), ("0324", 6), ("0333", 7), ("99", 0)],
)
def test_book_b_3_3_2_default_kernels(rid: str, kernel: int) -> None:
    assert default_kernel(bytes.fromhex("A0" + rid.rjust(8, "0") + "1010")) == kernel


def test_a_kernel_that_this_terminal_lacks() -> None:
    assert attempt(card_with(directory_entry(MASTERCARD)), setup(visa(aid=MASTERCARD, kernel=5))).outcome == NONE_LEFT


def test_settings_for_contact_are_none_of_entry_points() -> None:
    assert refusal(visa(kernel=CONTACT), request()).reason == "not_allowed"
    assert prepared(visa(), request()).combination.kernel == 3
    seen, _ = handed_over(card_with(directory_entry(VISA)), visa(kernel=CONTACT), visa())
    assert selected(seen) == [(VISA, 3)]


# 3.3.3: final combination selection


@pytest.mark.parametrize(
    ("priorities", "order"),
    [
        ((1, 2), [0, 1]),
        ((2, 1), [1, 0]),
        ((0, 15), [1, 0]),  # 0 states no priority and comes last
        ((None, 15), [1, 0]),
        ((0xF2, 0x01), [1, 0]),  # the low nibble counts
        ((0xF1, 0x02), [0, 1]),
        ((3, 3), [0, 1]),  # as in the directory
    ],
)
def test_book_b_3_3_3_order(priorities: tuple[int | None, int | None], order: list[int]) -> None:
    names = [VISA + b"\x02", VISA + b"\x01"]
    entries = [directory_entry(name, priority) for name, priority in zip(names, priorities, strict=True)]
    seen, _ = handed_over(card_with(*entries), visa())
    assert [activation.adf_name for activation in seen] == [names[at] for at in order]


def test_select_next_falls_back_until_nothing_is_left() -> None:
    seen, result = handed_over(card_with(directory_entry(VISA), directory_entry(VISA + b"\x01", 2)), visa())
    assert len(seen) == 2
    assert result.outcome == NONE_LEFT


def test_another_outcome_ends_the_search() -> None:
    cards = card_with(directory_entry(VISA), directory_entry(VISA + b"\x01", 2))
    seen, result = handed_over(cards, visa(), outcome=Declined("test"))
    assert (len(seen), result.outcome) == (1, Declined("test"))


def test_an_application_that_cannot_be_selected_is_dropped() -> None:
    unknown = VISA + b"\x09"
    seen, _ = handed_over(card_with(directory_entry(unknown), directory_entry(VISA, 2)), visa())
    assert selected(seen) == [(VISA, 3)]


def test_handover() -> None:
    combination = visa(cvm_required=1000)
    seen, _ = handed_over(card_with(directory_entry(VISA)), combination)
    pdol = bytes.fromhex("9F6604")
    assert seen == [
        Activation(
            combination,
            Indicators(cvm_required_exceeded=True),
            bytes.fromhex("36404000"),
            VISA,
            b"VISA CREDIT",
            fci(VISA, pdol),
        )
    ]


@pytest.mark.parametrize(("supported", "name"), [(True, VISA + b"\xee"), (False, VISA)])
def test_extended_selection(supported: bool, name: bytes) -> None:
    entry = directory_entry(VISA, tag_9F29=b"\xee")
    _, result = handed_over(card_with(entry), visa(extended_selection=supported))
    assert [command.data for command in result.commands[1:]] == [name]


def test_a_visa_card_that_does_not_ask_for_the_ttq() -> None:
    older = Card(ppse(directory_entry(VISA)), {VISA: fci(VISA, bytes.fromhex("9F3704"))})
    seen, result = handed_over(older, visa())
    assert (seen, result.outcome) == ([], NONE_LEFT)
    seen, _ = handed_over(older, visa(), visa(None, kernel=1))
    assert selected(seen) == [(VISA, 1)]
    without = Card(ppse(directory_entry(VISA)), {VISA: fci(VISA, None)})
    assert handed_over(without, visa())[0] == []


def test_only_visa_must_ask_for_the_ttq() -> None:
    other = Card(ppse(directory_entry(OTHER)), {OTHER: fci(OTHER, None)})
    assert selected(handed_over(other, visa(aid=OTHER))[0]) == [(OTHER, 3)]


def test_an_unreadable_answer_is_the_kernels_to_judge() -> None:
    damaged = Card(ppse(directory_entry(VISA)), {VISA: b"\x6f\x7f"})
    assert selected(handed_over(damaged, visa())[0]) == [(VISA, 3)]
    assert attempt(damaged).outcome == EndApplication("parse_error")


def test_only_so_many_entries_are_looked_at() -> None:
    entries = [directory_entry(VISA, None) for _ in range(200)]
    assert len(handed_over(card_with(*entries), visa())[0]) == 28


@pytest.mark.parametrize("at", [0, 1])
def test_a_card_lost_during_selection(at: int) -> None:
    result = attempt(visa_card(), removed_at=at)
    assert result.outcome == TryAgain("card_lost")
    assert len(result.commands) == at + 1


def test_a_whole_attempt() -> None:
    result = attempt(visa_card())
    assert isinstance(result.outcome, OnlineRequest)
    assert [command.ins for command in result.commands] == [0xA4, 0xA4, 0xA8, 0xB2, 0xB2, 0xB2, 0xB2]


def test_the_unpredictable_number_must_have_four_bytes() -> None:
    environment = Environment(unpredictable_number=lambda: b"123", notify=lambda ui: None)
    exchange = entry_point.run(setup(), request(), environment)
    card = visa_card()
    command = next(exchange)
    with pytest.raises(ConfigurationError):
        while True:
            command = exchange.send(card.answer(command))


# Book 4, 11.3: the name of the application


@pytest.mark.parametrize(
    ("card", "capabilities", "text"),
    [
        ({0x50: b"VISA CREDIT"}, "6000F0A001", "VISA CREDIT"),
        ({0x50: b"VISA", 0x9F12: "Crédit".encode("latin-1"), 0x9F11: b"\x01"}, "6000F0A001", "Crédit"),
        ({0x50: b"VISA", 0x9F12: b"Credit", 0x9F11: b"\x02"}, "6000F0A001", "VISA"),  # a table not on board
        ({0x50: b"VISA", 0x9F12: b"Credit"}, "6000F0A001", "VISA"),  # no table named
        ({0x50: b"VISA", 0x9F12: b"Credit", 0x9F11: b"\x0a"}, "6000F0A201", "Credit"),
        ({0x50: b"VISA", 0x9F12: b"Credit", 0x9F11: b"\x0b"}, "6000F0FFFF", "VISA"),
        ({0x50: b"VISA", 0x9F12: b"Credit", 0x9F11: b"\x01"}, "", "VISA"),
        ({}, "", "DIRECTORY"),
        ({0x50: b"A\x1b[2J\x00B\xff" + b"C" * 20}, "", "A[2JBCCCCCCCC"),  # nothing that moves a cursor
    ],
)
def test_label(card: dict[int, bytes], capabilities: str, text: str) -> None:
    assert label(card, b"DIRECTORY", bytes.fromhex(capabilities)) == text


def test_terminal_data_is_not_changed_by_a_run() -> None:
    before = dict(TERMINAL)
    attempt(visa_card())
    assert before == TERMINAL

"""Application selection on contact (Book 1, 12), and conversations nobody here wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from emv_rig import MASTERCARD, VISA, directory_entry, fci, pump, request, setup, tlv

from terminal.emv import contact_selection, selection
from terminal.emv.apdu import Command, ContactLine, Exchange, Response
from terminal.emv.configuration import CONTACT, Combination, Limits
from terminal.emv.contact_selection import Candidate, activate, asked_of, candidates, without_confirmation
from terminal.emv.records import CardFault

VECTORS = Path(__file__).parents[2] / "shared" / "vectors" / "apdu_scripts_emv_utils.json"
CASES = json.loads(VECTORS.read_text(encoding="utf-8"))["cases"] if VECTORS.exists() else []
needs_vectors = pytest.mark.skipif(not CASES, reason="the published vectors are not beside this project")

PSE = b"1PAY.SYS.DDF01"
PSE_FCI = tlv("6F", tlv("84", PSE), tlv("A5", tlv("88", b"\x01")))
VISA_5 = VISA[:5]


def ours(aid: bytes = VISA, kernel: int = CONTACT, *, partial: bool = True, **limits: object) -> Combination:
    return Combination(aid, kernel, replace(Limits(), **limits), partial=partial)


class Chip:
    """Answers SELECT by name (the n-th P2=02 with the n-th next one) and READ RECORD, and notes what it was sent."""

    def __init__(
        self,
        names: Mapping[bytes, bytes | int | Sequence[bytes | int]],
        records: Sequence[bytes | int] = (),
    ) -> None:
        self._names, self._records = names, records
        self._occurrence = 0
        self.sent: list[str] = []

    def answer(self, command: Command) -> Response:
        self.sent.append(f"{command.ins:02X}{command.p2:02X} {command.data.hex().upper()}".strip())
        if command.ins == 0xB2:
            found = self._records[command.p1 - 1] if command.p1 <= len(self._records) else 0x6A83
            return self._response(found)
        known = self._names.get(command.data, 0x6A82)
        self._occurrence = 0 if command.p2 == 0 else self._occurrence + 1
        if isinstance(known, bytes | int):
            known = [known]
        return self._response(known[self._occurrence] if self._occurrence < len(known) else 0x6A82)

    @staticmethod
    def _response(found: bytes | int) -> Response:
        return Response(b"", found) if isinstance(found, int) else Response(found, 0x9000)


def listed(card: Chip, *combinations: Combination) -> tuple[Candidate, ...]:
    found, _ = pump(candidates(setup(*(combinations or (ours(),))), request()), card)
    return found


def names(found: Sequence[Candidate]) -> list[str]:
    return [candidate.adf_name.hex().upper() for candidate in found]


def entry(name: bytes, priority: int | None = 1) -> bytes:
    return directory_entry(name, priority)


# 12.4: what is asked of the cardholder


class Holder:
    """Takes what it is told to, and keeps the questions."""

    def __init__(self, number: int | None = 0, *, agrees: bool = True) -> None:
        self._number, self._agrees = number, agrees
        self.asked: list[str] = []

    def choose(self, offered: Sequence[Candidate]) -> Candidate | None:
        self.asked.append("choose " + ", ".join(each.name for each in offered))
        return None if self._number is None else offered[self._number]

    def confirm(self, offered: Candidate) -> bool:
        self.asked.append(f"confirm {offered.name}")
        return self._agrees


def offered(label: str, *, confirm: bool = False) -> Candidate:
    return Candidate(VISA, label.encode(), 1, confirm, ours())


DEBIT, CREDIT = offered("DEBIT"), offered("CREDIT", confirm=True)


@pytest.mark.parametrize(
    ("remaining", "holder", "taken", "asked"),
    [
        ((DEBIT, CREDIT), Holder(1), CREDIT, ["choose DEBIT, CREDIT"]),
        ((DEBIT, CREDIT), Holder(None), None, ["choose DEBIT, CREDIT"]),
        ((DEBIT,), Holder(), DEBIT, []),
        ((CREDIT,), Holder(), CREDIT, ["confirm CREDIT"]),
        ((CREDIT,), Holder(agrees=False), None, ["confirm CREDIT"]),
        ((), Holder(), None, []),
    ],
)
def test_what_the_cardholder_is_asked(
    remaining: Sequence[Candidate], holder: Holder, taken: Candidate | None, asked: list[str]
) -> None:
    assert asked_of(holder)(remaining) is taken
    assert holder.asked == asked


def test_a_label_is_made_fit_for_a_screen() -> None:
    assert offered("A\x00B\u00e9" + "C" * 20).name == "AB" + "C" * 11


def test_who_cannot_ask_takes_what_needs_no_answer() -> None:
    assert without_confirmation((CREDIT, DEBIT)) is DEBIT
    assert without_confirmation((CREDIT,)) is None


# Book 4, 11.1: language


def test_the_directory_says_which_language_a_choice_is_offered_in() -> None:
    told: list[Sequence[str]] = []
    named = tlv("6F", tlv("84", PSE), tlv("A5", tlv("88", b"\x01"), tlv("5F2D", b"nlen")))
    pump(candidates(setup(ours()), request(), told.append), Chip({PSE: named}, [tlv("70", entry(VISA))]))
    pump(candidates(setup(ours()), request(), told.append), Chip({PSE: PSE_FCI}, [tlv("70", entry(VISA))]))
    assert told == [("nl", "en")]


@pytest.mark.parametrize(
    ("preference", "languages", "screen"),
    [
        (b"deen", ("de", "en"), "de"),
        (b"nlDE", ("nl", "de"), "de"),
        (b"nlfr", ("nl", "fr"), None),
        (b"", (), None),
        (b"d", (), None),
        (b"\xffe12de", ("de",), "de"),
        (b"enenen", ("en",), "en"),
    ],
)
def test_the_first_language_that_both_know(preference: bytes, languages: tuple[str, ...], screen: str | None) -> None:
    assert selection.languages(preference) == languages
    assert selection.language(languages, {"en", "de"}) == screen


# 12.3.2: PSE


def test_directory() -> None:
    card = Chip({PSE: PSE_FCI}, [tlv("70", entry(VISA), entry(MASTERCARD, 2))])
    assert listed(card) == (Candidate(VISA, b"VISA CREDIT", 1, False, ours()),)
    assert card.sent == [f"A400 {PSE.hex().upper()}", "B20C", "B20C"]


@pytest.mark.parametrize(
    ("priorities", "order"),
    [((2, 1), [1, 0]), ((0, 15), [1, 0]), ((None, 15), [1, 0]), ((3, 3), [0, 1]), ((0x81, 2), [0, 1])],
)
def test_priority(priorities: tuple[int | None, int | None], order: list[int]) -> None:
    both = [VISA + b"\x01", VISA + b"\x02"]
    records = [tlv("70", entry(name, priority)) for name, priority in zip(both, priorities, strict=True)]
    assert [each.adf_name for each in listed(Chip({PSE: PSE_FCI}, records))] == [both[at] for at in order]


def test_without_priority_the_card_has_the_order() -> None:
    """Book 1, 12.4: as they were met, whatever stands first in the terminal's list."""
    records = [tlv("70", entry(VISA, None), entry(MASTERCARD, None), entry(MASTERCARD + b"\x01", 9))]
    mastercard, visa = (MASTERCARD.hex().upper(), VISA.hex().upper())
    for combinations in ((ours(), ours(MASTERCARD)), (ours(MASTERCARD), ours())):
        assert names(listed(Chip({PSE: PSE_FCI}, records), *combinations)) == [f"{mastercard}01", visa, mastercard]


def test_an_exact_name_is_not_asked_for_again() -> None:
    """What an AID that must fit exactly brings up is another entry's business, and so is the next occurrence."""
    card = Chip({PSE: 0x6A82, VISA_5: [fci(VISA), fci(VISA + b"\x01")], VISA: fci(VISA)})
    assert names(listed(card, ours(VISA_5, partial=False), ours(VISA))) == [VISA.hex().upper()]
    assert [sent[:4] for sent in card.sent] == ["A400"] * 3


def test_blocked_without_a_word() -> None:
    """T=0 may say 6283 and nothing else."""
    with pytest.raises(CardFault, match="application_blocked"):
        listed(Chip({PSE: 0x6A82, VISA: 0x6283}))


def test_confirmation() -> None:
    records = [tlv("70", entry(VISA, 0x81), entry(VISA + b"\x02", 0x02))]
    found = listed(Chip({PSE: PSE_FCI}, records))
    assert [candidate.confirm for candidate in found] == [True, False]
    assert without_confirmation(found) == found[1]
    assert without_confirmation(found[:1]) is None
    assert without_confirmation(()) is None


@pytest.mark.parametrize(
    "bad",
    [
        tlv("61", tlv("50", b"NO NAME")),
        entry(VISA[:4]),
        entry(VISA.ljust(17, b"\x00")),
        entry(MASTERCARD),
        tlv("5F20", b"A"),
        tlv("61", tlv("9D", b"DDFxx")),
        entry(VISA + b"\x01"),  # twice the same name
    ],
)
def test_entries_that_are_passed_over(bad: bytes) -> None:
    good = entry(VISA + b"\x01", 2)
    assert names(listed(Chip({PSE: PSE_FCI}, [tlv("70", good, bad)]))) == [f"{VISA.hex().upper()}01"]


def test_a_record_that_cannot_be_read_holds_nothing() -> None:
    card = Chip({PSE: PSE_FCI}, [b"\x70\x7f", tlv("77", entry(VISA)), tlv("70", entry(VISA + b"\x01"))])
    assert names(listed(card)) == [f"{VISA.hex().upper()}01"]


@pytest.mark.parametrize(
    ("pse", "records"),
    [
        (0x6A82, []),
        (0x6283, []),
        (0x6985, []),
        (b"", []),
        (b"\x6f\x7f", []),
        (tlv("6F", tlv("84", PSE)), []),
        (tlv("6F", tlv("A5", b"")), []),
        (tlv("6F", tlv("A5", tlv("88", b"\x0b"))), []),  # SFI 11 is none of EMV's
        (tlv("6F", tlv("A5", tlv("88", b"\x00"))), []),
        (tlv("6F", tlv("A5", tlv("88", b"\x01\x01"))), []),
        (PSE_FCI, []),
        (PSE_FCI, [tlv("70", entry(MASTERCARD))]),
        (PSE_FCI, [tlv("70", entry(VISA + b"\x07")), 0x6985]),  # a directory that breaks off is not believed
    ],
)
def test_the_list_of_aids_makes_up_for_a_directory(pse: bytes | int, records: list[bytes | int]) -> None:
    card = Chip({PSE: pse, VISA: fci(VISA)}, records)
    assert names(listed(card)) == [VISA.hex().upper()]


def test_only_so_many_directory_records() -> None:
    card = Chip({PSE: PSE_FCI}, [tlv("70", entry(MASTERCARD))] * 255)
    listed(card)
    assert card.sent.count("B20C") == contact_selection.DIRECTORY_RECORDS_MAX


def test_only_so_many_candidates() -> None:
    entries = [entry(VISA + bytes([number])) for number in range(200)]
    assert len(listed(Chip({PSE: PSE_FCI}, [tlv("70", *entries)]))) == contact_selection.CANDIDATES_MAX


@pytest.mark.parametrize("card", [Chip({PSE: 0x6A81}), Chip({PSE: 0x6A82, VISA: 0x6A81})])
def test_a_blocked_card(card: Chip) -> None:
    with pytest.raises(CardFault, match="card_blocked"):
        listed(card)


# 12.3.3: list of AIDs


def test_each_aid_is_asked_for() -> None:
    card = Chip({MASTERCARD: fci(MASTERCARD)})
    assert names(listed(card, ours(), ours(kernel=3), ours(MASTERCARD))) == [MASTERCARD.hex().upper()]
    assert card.sent[1:] == [f"A400 {VISA.hex().upper()}", f"A400 {MASTERCARD.hex().upper()}"]


def test_partial_selection_finds_every_occurrence() -> None:
    one, two = fci(VISA + b"\x01", None, tlv("87", b"\x02")), fci(VISA, None, tlv("87", b"\x01"))
    card = Chip({VISA_5: [one, two, 0x6A82]})
    found = listed(card, ours(VISA_5))
    assert names(found) == [VISA.hex().upper(), f"{VISA.hex().upper()}01"]
    assert card.sent[1:] == [f"A4{p2} {VISA_5.hex().upper()}" for p2 in ("00", "02", "02")]


@pytest.mark.parametrize(
    ("answers", "sent", "found"),
    [
        ([fci(VISA)], 1, 1),  # exactly that: nothing more is asked
        ([fci(VISA + b"\x01"), 0x6283], 2, 1),
        ([fci(VISA + b"\x01"), fci(MASTERCARD), fci(VISA + b"\x02")], 2, 1),  # a name of another kind ends it
        ([fci(VISA + b"\x01"), 0x6A81], 2, 1),
        ([fci(MASTERCARD)], 1, 0),
        ([tlv("6F", tlv("A5", b""))], 1, 0),
        ([b"\x6f"], 1, 0),
        ([tlv("6F", tlv("84", VISA))], 1, 1),
        ([0x6999], 1, 0),
    ],
)
def test_next_occurrence(answers: list[bytes | int], sent: int, found: int) -> None:
    card = Chip({VISA: answers})
    assert (len(listed(card)), len(card.sent) - 1) == (found, sent)


def test_exact_selection_wants_the_very_name() -> None:
    card = Chip({VISA: [fci(VISA + b"\x01"), fci(VISA + b"\x02")]})
    assert (listed(card, ours(partial=False)), len(card.sent)) == ((), 2)
    assert listed(Chip({PSE: PSE_FCI}, [tlv("70", entry(VISA + b"\x01"))]), ours(partial=False)) == ()


def test_a_card_that_repeats_itself() -> None:
    card = Chip({VISA: [fci(VISA + b"\x01")] * 99})
    assert (len(listed(card)), len(card.sent)) == (1, 2 + contact_selection.OCCURRENCES_MAX)


class Blocked(Chip):
    """Its applications answer, with a warning that they are blocked."""

    def answer(self, command: Command) -> Response:
        response = super().answer(command)
        return response._replace(sw=0x6283) if response.data else response


def test_blocked_applications() -> None:
    with pytest.raises(CardFault, match="application_blocked"):
        listed(Blocked({VISA: fci(VISA)}))
    one_of_two = [fci(VISA + b"\x01"), fci(VISA + b"\x02")]
    with pytest.raises(CardFault, match="application_blocked"):
        listed(Blocked({VISA: one_of_two}))


# Which settings fit


def test_the_longest_aid_fits_best_and_contact_comes_first() -> None:
    short, contactless, inserted = ours(VISA_5), ours(kernel=3), ours()
    card = {PSE: PSE_FCI}
    records = [tlv("70", entry(VISA))]
    for combinations in ((short, contactless, inserted), (inserted, contactless, short)):
        assert listed(Chip(card, records), *combinations)[0].combination == inserted
    assert listed(Chip(card, records), short, contactless)[0].combination == contactless


def test_transaction_types() -> None:
    refunds = ours(transaction_types=frozenset({0x20}))
    assert listed(Chip({PSE: PSE_FCI}, [tlv("70", entry(VISA))]), refunds) == ()


# 12.4: final selection

CANDIDATE = Candidate(VISA, b"VISA", 1, False, ours())


@pytest.mark.parametrize(
    ("answer", "taken"),
    [
        (fci(VISA), True),
        (fci(VISA + b"\x01"), False),
        (tlv("6F", tlv("85", VISA)), False),
        (b"\x6f", False),
        (0x6283, False),
        (0x6A82, False),
    ],
)
def test_final_select(answer: bytes | int, taken: bool) -> None:
    activation, commands = pump(activate(CANDIDATE), Chip({VISA: answer}))
    assert (activation is not None, len(commands)) == (taken, 1)
    if activation:
        assert (activation.adf_name, activation.fci, activation.combination) == (VISA, answer, ours())


def test_final_select_of_a_blocked_card() -> None:
    with pytest.raises(CardFault, match="card_blocked"):
        pump(activate(CANDIDATE), Chip({VISA: 0x6A81}))


# Conversations of others


class Recorded:
    """Plays a recorded conversation, in which case 4 commands carry Le."""

    def __init__(self, apdus: Sequence[tuple[str, str]]) -> None:
        self._left = list(apdus)

    def answer(self, command: Command) -> Response:
        wanted, answer = self._left.pop(0)
        assert command.encode().hex().upper() in {wanted, wanted[:-2]}
        return Response.decode(bytes.fromhex(answer))

    def at_end(self) -> bool:
        return not self._left


def case(name: str) -> Any:
    return next(each for each in CASES if each["id"].endswith(name))


def over_contact(exchange: Exchange[Any], card: Recorded) -> Any:
    return pump(ContactLine().carry(exchange), card)[0]


@needs_vectors
def test_published_blocked_cards() -> None:
    for name in ("test_pse_card_blocked", "test_aid_card_blocked"):
        card = Recorded(case(name)["apdus"])
        with pytest.raises(CardFault, match="card_blocked"):
            over_contact(candidates(setup(ours()), request()), card)
        assert card.at_end()


@needs_vectors
def test_published_priorities() -> None:
    card = Recorded(case("test_sorted_app_priority")["apdus"])
    rids = [bytes.fromhex(f"A0000000{rid}10") for rid in ("03", "04")]
    found = over_contact(candidates(setup(*map(ours, rids)), request()), card)
    assert [candidate.label for candidate in found] == [f"APP {number}".encode() for number in range(1, 8)]
    assert card.at_end()


@needs_vectors
def test_published_confirmation() -> None:
    card = Recorded(case("test_app_cardholder_confirmation")["apdus"])
    (found,) = over_contact(candidates(setup(ours()), request()), card)
    assert (found.confirm, found.priority) == (True, 1)


@needs_vectors
def test_published_final_selection() -> None:
    def chosen(name: str) -> Any:
        published = case(name)
        wanted = bytes.fromhex(published["apdus"][0][0])[5:-1]
        return over_contact(activate(replace(CANDIDATE, adf_name=wanted)), Recorded(published["apdus"]))

    assert chosen("test_select_app_success") is not None
    assert chosen("test_repeat_select_app_success") is not None
    assert chosen("test_select_app5") is None
    with pytest.raises(CardFault, match="card_blocked"):
        chosen("test_select_app3")

"""What people see: every screen by picture, in every language, with the longest texts and amounts that may come."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Final, get_args

import pytest
from babel.messages.catalog import Catalog
from babel.messages.extract import extract_from_file
from babel.messages.mofile import read_mo
from babel.messages.pofile import read_po
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from drivers.interfaces import DISPLAY_SIZE_PX
from terminal.money import EUR, JPY, KWD, Amount
from terminal.ui import messages, screens
from terminal.ui.fonts import font, icons
from terminal.ui.screens import (
    AcceptedOffline,
    Approved,
    Authorising,
    Busy,
    ChooseApplication,
    Declined,
    EnterAmount,
    Error,
    Icon,
    Idle,
    KeepOrVoid,
    OneCardOnly,
    PresentCard,
    Reading,
    Recovering,
    RemoveCard,
    Screen,
    Start,
    Text,
    TryAgain,
    UseOtherCard,
    lay_out,
    render,
)
from tests.screens_plugin import GOLDENS, Golden, difference, different_pixels

UI = Path(messages.__file__).parent
LANGUAGES = ("en", *sorted(path.name for path in (UI / "locale").iterdir()))
TRANSLATED = LANGUAGES[1:]
FONTS = sorted(path.stem for path in (UI / "fonts").glob("*.bdf"))
TEXT_FONTS = [name for name in FONTS if "a" in font(name)]

SALE = Amount(1250, EUR)
WIDE_SALE = Amount(125_000, EUR)
LARGEST = (Amount(99_999_999, EUR), Amount(99_999_999, JPY), Amount(99_999_999, KWD))
DECLINES = (
    "card_declined", "expired", "not_allowed", "oda_failed", "cvm_failed", "unable_to_go_online", "timeout",
    "insufficient_funds", "exceeds_amount_limit", "declined",
)  # fmt: skip
RETRIES = ("card_lost", "confirm_on_phone", "parse_error")
TROUBLES = (
    "reader_missing", "reader_fault", "not_completed", "key", "ledger", "journal_full", "storage", "storage_full",
    "over_limit", "revoked", "fault",
)  # fmt: skip

SAMPLES: Final[dict[str, Screen]] = {
    "start": Start("0.1.0"),
    "recovering": Recovering(),
    "busy": Busy(),
    "idle": Idle("14:05", online=True, unsent=0, oldest_minutes=None),
    "idle-offline": Idle("14:05", online=False, unsent=3, oldest_minutes=12),
    "idle-days": Idle("09:30", online=False, unsent=128, oldest_minutes=3 * 24 * 60, disclaimer=False),
    "idle-declined-later": Idle("14:05", online=True, unsent=2, oldest_minutes=1, lost=1),
    "idle-clock-unset": Idle(None, online=True, unsent=1, oldest_minutes=None),
    "enter-amount": EnterAmount(SALE),
    "enter-amount-empty": EnterAmount(Amount(0, EUR)),
    "enter-amount-eur": EnterAmount(LARGEST[0]),
    "enter-amount-jpy": EnterAmount(LARGEST[1]),
    "enter-amount-kwd": EnterAmount(LARGEST[2]),
    "present-card": PresentCard(SALE),
    "present-card-contact": PresentCard(WIDE_SALE, contact=True),
    "reading": Reading(SALE),
    "choose-application": ChooseApplication(("VISA CREDIT", "VISA DEBIT", "girocard", "V PAY"), 1),
    "choose-application-two": ChooseApplication(("MASTERCARD", "Maestro")),
    "confirm-application": ChooseApplication(("girocard",)),
    "authorising": Authorising(SALE),
    "approved": Approved(SALE, "Visa", "7899"),
    "approved-largest": Approved(LARGEST[0], "American Express", "7899"),
    "accepted-offline": AcceptedOffline(SALE, "Mastercard", "7899"),
    "remove-card": RemoveCard(),
    "remove-card-approved": RemoveCard(Approved(SALE, "Visa", "7899")),
    "remove-card-accepted": RemoveCard(AcceptedOffline(SALE, "Visa", "7899")),
    "remove-card-declined": RemoveCard(Declined(SALE, "expired")),
    "one-card-only": OneCardOnly(),
    "use-other-card": UseOtherCard(SALE),
    "keep-or-void": KeepOrVoid(SALE),
    **{f"declined-{word}": Declined(SALE, word) for word in DECLINES},
    **{f"try-again-{word}": TryAgain(SALE, word) for word in RETRIES},
    **{f"error-{word}": Error(word) for word in TROUBLES},
}


def largest_of(amount: Amount) -> list[Screen]:
    return [
        EnterAmount(amount),
        PresentCard(amount),
        PresentCard(amount, contact=True),
        Reading(amount),
        Authorising(amount),
        Approved(amount, "American Express", "7899"),
        AcceptedOffline(amount, "American Express", "7899"),
        UseOtherCard(amount),
        KeepOrVoid(amount),
        *(Declined(amount, word) for word in DECLINES),
        *(TryAgain(amount, word) for word in RETRIES),
    ]


LONGEST: Final[Sequence[Screen]] = [
    Idle("23:59", online=False, unsent=9_999, oldest_minutes=99 * 24 * 60),
    *(screen for amount in LARGEST for screen in largest_of(amount)),
]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", SAMPLES)
def test_looks_as_recorded(name: str, language: str, golden: Golden) -> None:
    golden(f"{language}/{name}", render(SAMPLES[name], language))


def test_no_golden_without_screen(recording: bool) -> None:
    wanted = {GOLDENS / language / f"{name}.png" for language in LANGUAGES for name in SAMPLES}
    orphans = set(GOLDENS.rglob("*.png")) - wanted
    if recording:
        for path in orphans:
            path.unlink()
    else:
        assert not orphans, "no test draws these any more: delete them, or run pytest --ui=record"


def test_every_screen_has_a_sample() -> None:
    assert {type(screen) for screen in SAMPLES.values()} == set(get_args(Screen))


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("screen", [*SAMPLES.values(), *LONGEST], ids=repr)
def test_everything_fits(screen: Screen, language: str) -> None:
    sheet = lay_out(screen, language)
    width, height = DISPLAY_SIZE_PX
    for mark in sheet.marks:
        assert mark.box.left >= 0 and mark.box.top >= 0, mark
        assert mark.box.right <= width and mark.box.bottom <= height, mark
        assert not (isinstance(mark, Text) and mark.shortened), mark
    for one, other in combinations([mark for mark in sheet.marks if isinstance(mark, Text | Icon)], 2):
        a, b = one.box, other.box
        apart = a.right <= b.left or b.right <= a.left or a.bottom <= b.top or b.bottom <= a.top
        assert apart or not _ink_meets(one, other), (one, other)


def test_ink_that_meets_is_seen() -> None:
    """Negative control for the test above."""
    assert _ink_meets(Text("88", "helvR10-75dpi", 10, 20), Text("88", "helvR10-75dpi", 12, 20))
    assert _ink_meets(Icon("tick", 0, 0), Text("M", "helvB18-75dpi", 2, 20))


def test_text_too_long_ends_in_an_ellipsis() -> None:
    sheet = lay_out(Approved(SALE, "A scheme with a name that nobody foresaw", "7899"), "en")
    (shortened,) = [mark for mark in sheet.marks if isinstance(mark, Text) and mark.shortened]
    assert shortened.text.endswith("…")
    assert shortened.box.right <= DISPLAY_SIZE_PX[0]


@given(text=st.text(max_size=40), language=st.sampled_from(LANGUAGES))
def test_no_text_breaks_the_picture(text: str, language: str) -> None:
    for screen in (Approved(SALE, text, text), Declined(SALE, text), TryAgain(SALE, text), Error(text), Start(text)):
        picture = render(screen, language)
        assert (picture.mode, picture.size) == ("1", DISPLAY_SIZE_PX)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", SAMPLES)
def test_only_approved_is_bright(name: str, language: str) -> None:
    """At a glance, across the counter: nothing that is not approved may look like it."""
    lit = render(SAMPLES[name], language).histogram()[255] / (128 * 64)
    if isinstance(SAMPLES[name], Approved):
        assert lit > 0.6
    else:
        assert lit < 0.35


@pytest.mark.parametrize("amount", [SALE, *LARGEST], ids=str)
def test_amounts_are_large(amount: Amount) -> None:
    for screen in (EnterAmount(amount), PresentCard(amount), Approved(amount, "Visa", "7899")):
        (text,) = [m for m in lay_out(screen, "de").marks if isinstance(m, Text) and m.text == amount.format("de")]
        assert font(text.font).height >= 18


def test_a_new_reason_still_says_something() -> None:
    assert (
        render(Declined(SALE, "word_of_next_year"), "en").tobytes()
        == render(SAMPLES["declined-declined"], "en").tobytes()
    )
    assert "exception" not in messages.decline("exception_file"), (
        "a stolen card must not be told that it is known as one"
    )


def test_a_language_without_catalogue_is_english() -> None:
    assert render(SAMPLES["one-card-only"], "xx").tobytes() == render(SAMPLES["one-card-only"], "en").tobytes()


# --- Comparison itself ------------------------------------------------------------------------------------------------


def test_one_wrong_pixel_is_seen(golden: Golden, recording: bool, tmp_path: Path) -> None:
    if recording:
        pytest.skip("nothing is compared while recording")
    picture = render(SAMPLES["approved"], "en")
    picture.putpixel((77, 40), 255 - int(picture.getpixel((77, 40)) or 0))  # type: ignore[arg-type]
    with pytest.raises(pytest.fail.Exception, match="1 pixels differ"):
        golden("en/approved", picture)
    (shown,) = tmp_path.glob("*.png")
    with Image.open(shown) as sheet:
        red = [colour for _, colour in sheet.getcolors() or [] if colour == (255, 0, 0)]
    assert red, "the difference is marked"


def test_another_size_is_seen() -> None:
    small, large = Image.new("1", (10, 10)), Image.new("1", (12, 8))
    assert different_pixels(small, large)
    assert difference(small, large).size == (12 * 4, 32 * 4)


# --- Letters and words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT_FONTS)
def test_letters_of_the_languages_that_follow(name: str) -> None:
    letters = "ÄÖÜäöüßĞğİıŞşÇçÂâÎîÛûÀàÉéÈèÊêËëÏïÔôŒœÙùŸÿ«»ÑñÁáÍíÓóÚú¿¡ÅåÆæØø„“”‘’–—…€•\u00a0\u202f"
    assert [letter for letter in letters if letter not in font(name)] == []


@pytest.mark.parametrize("name", FONTS)
def test_figures_of_every_font(name: str) -> None:
    assert all(letter in font(name) for letter in "0123456789.,' \u00a0\u202f’")
    assert len({font(name).width(figure) for figure in "0123456789"}) == 1, "amounts do not jump while they are typed"


def test_every_icon_is_used() -> None:
    drawn = {m.name for screen in SAMPLES.values() for m in lay_out(screen, "en").marks if isinstance(m, Icon)}
    assert drawn == set(icons())


def test_every_font_is_used() -> None:
    named = set(re.findall(r'"(helv\w+-\d+dpi)"', Path(screens.__file__).read_text(encoding="utf-8")))
    assert named == set(FONTS)


@pytest.mark.parametrize("language", TRANSLATED)
def test_every_string_is_translated(language: str) -> None:
    strings = _strings()
    catalogue = _catalogue(language)
    translated = {str(message.id): message for message in catalogue if message.id}
    assert set(translated) == strings, "edit the .po file: one side has a string that the other lacks"
    assert [text for text, message in translated.items() if not message.string or message.fuzzy] == []
    for text, message in translated.items():
        assert re.findall(r"\{\w+\}", text) == re.findall(r"\{\w+\}", str(message.string)), text
        for name in TEXT_FONTS:
            missing = [letter for letter in str(message.string) if letter not in font(name)]
            assert not missing, f"{name} lacks {missing} for {message.string!r}"


@pytest.mark.parametrize("language", TRANSLATED)
def test_compiled_catalogue_is_up_to_date(language: str) -> None:
    with (UI / "locale" / language / "LC_MESSAGES" / "payterm.mo").open("rb") as file:
        compiled = {message.id: message.string for message in read_mo(file) if message.id}
    source = {message.id: message.string for message in _catalogue(language) if message.id}
    assert compiled == source, "run: pybabel compile -D payterm -d terminal/ui/locale"


def _strings() -> set[str]:
    found = {
        text
        for module in (messages, screens)
        for _, text, _, _ in extract_from_file("python", str(module.__file__), keywords={"say": None, "mark": None})
    }
    assert len(found) > 40, "the extraction finds the strings at all"
    return {str(text) for text in found}


def _catalogue(language: str) -> Catalog:
    with (UI / "locale" / language / "LC_MESSAGES" / "payterm.po").open("rb") as file:
        return read_po(file)


def _ink_meets(one: Text | Icon, other: Text | Icon) -> bool:
    """Whether two marks share a pixel; their boxes may overlap, as those of a comma and the line below it do."""
    pictures = []
    for mark in (one, other):
        picture = Image.new("1", DISPLAY_SIZE_PX)
        mark.paint(picture)
        pictures.append(picture)
    both = pictures[0].copy()
    both.paste(255, (0, 0), pictures[1])
    return both.histogram()[255] < sum(picture.histogram()[255] for picture in pictures)

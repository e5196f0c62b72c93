"""The screens: what the terminal has to say, as a picture of 128 by 64 pixels.

A `Screen` is a plain value, `lay_out` says what stands where on it, and `render` paints that. All three are pure: no
clock, no device, no state, so each screen is tested by picture. The same grid serves all of them: a line of small
print above (on panels with two colours the upper 16 rows are yellow), what matters in the middle, context below.

One difference must never be missed: only money that the host or the card has approved makes the panel light up
bright, with dark letters. A sale that is accepted and still to be sent stays dark, behind a crossed-out cloud.

What becomes of a sale and in which order screens follow is the flow's affair; words are those of
`terminal.ui.messages`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

from PIL import Image, ImageChops

from drivers.interfaces import DISPLAY_SIZE_PX
from terminal.money import Amount
from terminal.ui import messages
from terminal.ui.fonts import LIT, font, icons

# --- What can be said -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """The first picture after power-on."""

    version: str


@dataclass(frozen=True, slots=True)
class Recovering:
    """The records are being read and mended; sales have to wait."""


@dataclass(frozen=True, slots=True)
class Busy:
    """Something takes a moment."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Ready for a sale. `time` is None while the clock is not synchronised; what is `lost` is said before `unsent`."""

    time: str | None
    online: bool
    unsent: int
    oldest_minutes: int | None
    disclaimer: bool = True
    lost: int = 0  # of what was promised, declined by the host since; nobody has acknowledged it


@dataclass(frozen=True, slots=True)
class EnterAmount:
    """The amount as typed so far."""

    amount: Amount


@dataclass(frozen=True, slots=True)
class PresentCard:
    """Asks for the card; `contact` where there is a slot, too."""

    amount: Amount
    contact: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """The card is being read and must stay."""

    amount: Amount


@dataclass(frozen=True, slots=True)
class ChooseApplication:
    """The card offers several ways to pay, best first, `at` the one under the bar; one alone is to be agreed to."""

    names: tuple[str, ...]
    at: int = 0


@dataclass(frozen=True, slots=True)
class Authorising:
    """The host is being asked."""

    amount: Amount


@dataclass(frozen=True, slots=True)
class Approved:
    """Approved, and durable."""

    amount: Amount
    scheme: str
    last4: str


@dataclass(frozen=True, slots=True)
class AcceptedOffline:
    """Accepted at the merchant's risk, durable, and still to be sent."""

    amount: Amount
    scheme: str
    last4: str


@dataclass(frozen=True, slots=True)
class Declined:
    """Not paid. `reason` is a word of the outcome or of the host."""

    amount: Amount
    reason: str


@dataclass(frozen=True, slots=True)
class RemoveCard:
    """Asks for the card to be taken away; says once more how the sale ended."""

    after: Approved | AcceptedOffline | Declined | None = None


@dataclass(frozen=True, slots=True)
class TryAgain:
    """The same card once more; nothing has happened yet."""

    amount: Amount
    reason: str


@dataclass(frozen=True, slots=True)
class OneCardOnly:
    """Several cards are in the field."""


@dataclass(frozen=True, slots=True)
class UseOtherCard:
    """This card does not work here, another one may."""

    amount: Amount


@dataclass(frozen=True, slots=True)
class KeepOrVoid:
    """A sale that stood when the power went and was never shown: a person has to say what became of it."""

    amount: Amount


@dataclass(frozen=True, slots=True)
class Error:
    """The terminal itself is in trouble. `reason` is a word of `terminal.ui.messages`."""

    reason: str


Screen: TypeAlias = (
    Start | Recovering | Busy | Idle | EnterAmount | PresentCard | Reading | ChooseApplication | Authorising
    | Approved | AcceptedOffline | Declined | RemoveCard | TryAgain | OneCardOnly | UseOtherCard | KeepOrVoid | Error
)  # fmt: skip

# --- What stands where ------------------------------------------------------------------------------------------------


class Box(NamedTuple):
    """A part of the panel, in pixels; right and bottom are the first ones outside."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True, slots=True)
class Text:
    """One line of text, pen first at `x` on `baseline`. `shortened` when even the smallest font was too wide."""

    text: str
    font: str
    x: int
    baseline: int
    shortened: bool = False

    @property
    def box(self) -> Box:
        left, top, width, height = font(self.font).box(self.text)
        return Box(self.x + left, self.baseline + top, self.x + left + width, self.baseline + top + height)

    def paint(self, frame: Image.Image) -> None:
        font(self.font).draw(frame, self.x, self.baseline, self.text)


@dataclass(frozen=True, slots=True)
class Icon:
    """A drawing, by its upper left corner."""

    name: str
    x: int
    y: int

    @property
    def box(self) -> Box:
        picture = icons()[self.name]
        return Box(self.x, self.y, self.x + picture.width, self.y + picture.height)

    def paint(self, frame: Image.Image) -> None:
        frame.paste(LIT, (self.x, self.y), icons()[self.name])


@dataclass(frozen=True, slots=True)
class Rule:
    """A dotted line from edge to edge."""

    y: int

    @property
    def box(self) -> Box:
        return Box(0, self.y, WIDTH, self.y + 1)

    def paint(self, frame: Image.Image) -> None:
        for x in range(0, WIDTH, 2):
            frame.putpixel((x, self.y), LIT)


@dataclass(frozen=True, slots=True)
class Bar:
    """Turns light and dark of what was painted before it."""

    box: Box

    def paint(self, frame: Image.Image) -> None:
        frame.paste(ImageChops.invert(frame.crop(self.box)), self.box)


Mark: TypeAlias = Text | Icon | Rule | Bar


@dataclass(frozen=True, slots=True)
class Sheet:
    """A screen laid out; `bright` ones are dark on light."""

    marks: tuple[Mark, ...]
    bright: bool = False


def render(screen: Screen, language: str) -> Image.Image:
    """The picture of a screen: mode "1", `DISPLAY_SIZE_PX`."""
    sheet = lay_out(screen, language)
    frame = Image.new("1", DISPLAY_SIZE_PX)
    for mark in sheet.marks:
        mark.paint(frame)
    return ImageChops.invert(frame) if sheet.bright else frame


def lay_out(screen: Screen, language: str) -> Sheet:  # noqa: PLR0911, PLR0912 - one case for each screen
    """What stands where on a screen."""
    say = messages.speaker(language)
    match screen:
        case Start(version=version):
            name = _text("payterm", TITLE, Box(0, 2, WIDTH, 19))
            number = _text(version, LINE, Box(0, 22, WIDTH, 33))
            warning = _text(
                say("Not certified: test and closed-loop cards only"), BODY, Box(MARGIN, 38, WIDTH - MARGIN, 62)
            )
            return Sheet((*name, *number, Rule(36), *warning))
        case Recovering():
            return _notice("hourglass", say("Checking records"), say("Do not switch off"))
        case Busy():
            return _notice("hourglass", say("Please wait"), "")
        case Idle():
            return Sheet(tuple(_idle(screen, say)))
        case EnterAmount(amount=amount):
            return _amount(say("Amount"), amount, language, say("Confirm to go on"), ())
        case PresentCard(amount=amount, contact=True):
            return _amount(say("To pay"), amount, language, say("Tap or insert"), ("waves", "insert"))
        case PresentCard(amount=amount):
            return _amount(say("To pay"), amount, language, say("Hold card here"), ("waves",))
        case Reading(amount=amount):
            return _amount(say("Reading card"), amount, language, say("Keep card here"), ("waves",))
        case ChooseApplication():
            return Sheet(tuple(_choice(screen, say)))
        case Authorising(amount=amount):
            return _amount(say("Asking the bank"), amount, language, say("Please wait"), ("sand",))
        case Approved(amount=amount, scheme=scheme, last4=last4):
            return _result("tick", say("Approved"), amount, language, card=f"{scheme} •{last4}", bright=True)
        case AcceptedOffline(amount=amount, scheme=scheme, last4=last4):
            card, note = f"{scheme} •{last4}", say("not yet sent")
            return _result("cloud_off", say("Accepted"), amount, language, card=card, note=note)
        case Declined(amount=amount, reason=reason):
            return _notice("cross", say("Declined"), say(messages.decline(reason)), amount, language)
        case RemoveCard(after=after):
            return _notice("remove", say("Remove card"), say(_ending(after)) if after else "")
        case TryAgain(amount=amount, reason=reason):
            return _notice("retry", say("Try again"), say(messages.retry(reason)), amount, language)
        case OneCardOnly():
            return _notice("cards", say("One card only"), say("Several cards are near the reader"))
        case UseOtherCard(amount=amount):
            text = say("Not usable here")
            return _notice("other", say("Use another card"), text, amount, language)
        case KeepOrVoid(amount=amount):
            text = say("Keep or void it? Answer at the register")
            return _notice("bolt", say("Power failed"), text, amount, language)
        case Error(reason=reason):
            title, advice = messages.trouble(reason)
            return _notice("warning", say(title), say(advice))


WIDTH, HEIGHT = DISPLAY_SIZE_PX
MARGIN: Final = 2  # the bezel of cheap panels covers the outermost pixels
ICON_GAP: Final = 5

HEAD: Final = Box(MARGIN, 1, WIDTH - MARGIN, 13)
MIDDLE: Final = Box(0, 15, WIDTH, 43)
FOOT: Final = Box(MARGIN, 51, WIDTH - MARGIN, 62)  # letters that reach below the line need the last two rows
BADGE: Final = Box(MARGIN, 1, 30, 29)  # the large icon; the title stands beside it

CHOICES: Final = Box(MARGIN, 15, WIDTH - MARGIN, 51)
_CHOICE_HEIGHT: Final = 12
_CHOICES_SHOWN: Final = 3

# Fonts to try in turn, each with the number of lines that it may take: the first into which a text fits is taken.
Fonts: TypeAlias = Sequence[tuple[str, int]]
HUGE: Final[Fonts] = (("helvB24-100dpi", 1), ("helvB24-75dpi", 1))
LARGE: Final[Fonts] = (("helvB24-75dpi", 1),)
TITLE: Final[Fonts] = (
    ("helvB18-75dpi", 1), ("helvB14-75dpi", 1), ("helvB14-75dpi", 2), ("helvB12-75dpi", 2), ("helvB10-75dpi", 2)
)  # fmt: skip
LABEL: Final[Fonts] = (("helvB10-75dpi", 1),)
SUBTITLE: Final[Fonts] = (("helvB14-75dpi", 1), ("helvB12-75dpi", 1), ("helvB10-75dpi", 1))
BODY: Final[Fonts] = (("helvR10-75dpi", 2), ("helvR08-75dpi", 3))
LINE: Final[Fonts] = (("helvR10-75dpi", 1), ("helvR08-75dpi", 1))

START, CENTRE, END = 0.0, 0.5, 1.0
_AGES: Final = (
    (24 * 60, messages.mark("{count} d")),
    (60, messages.mark("{count} h")),
    (1, messages.mark("{count} min")),
)


def _idle(screen: Idle, say: Callable[[str], str]) -> Iterator[Mark]:
    yield from _text(screen.time or "--:--", LABEL, HEAD, START)
    state = icons()["online" if screen.online else "offline"]
    yield Icon("online" if screen.online else "offline", WIDTH - MARGIN - state.width, 3)
    if not screen.online:
        yield from _text(say("Offline"), LINE, HEAD._replace(right=WIDTH - MARGIN - state.width - 4), END)
    yield Rule(14)
    bottom = 52 if screen.disclaimer else HEIGHT
    if screen.unsent or screen.lost:
        told = say("{count} declined later").format(count=screen.lost) if screen.lost else _unsent(screen, say)
        yield from _text(say("Ready"), TITLE, Box(0, 16, WIDTH, bottom - 14))
        yield from _text(told, LINE, Box(MARGIN, bottom - 14, WIDTH - MARGIN, bottom - 2))
    else:
        yield from _text(say("Ready"), TITLE, Box(0, 16, WIDTH, bottom))
    if screen.disclaimer:
        yield from _text(say("Test and closed-loop only"), LINE, FOOT)


def _unsent(screen: Idle, say: Callable[[str], str]) -> str:
    if screen.oldest_minutes is None:
        return say("{count} unsent").format(count=screen.unsent)
    size, unit = next((age for age in _AGES if screen.oldest_minutes >= age[0]), _AGES[-1])
    age = say(unit).format(count=screen.oldest_minutes // size)
    return say("{count} unsent, oldest {age}").format(count=screen.unsent, age=age)


def _choice(screen: ChooseApplication, say: Callable[[str], str]) -> Iterator[Mark]:
    """A window of lines on the list, a bar over one."""
    several = len(screen.names) > 1
    yield from _text(say("Pay with?") if several else say("Use this?"), LABEL, HEAD, START)
    if several:
        yield from _text(f"{screen.at + 1}/{len(screen.names)}", LABEL, HEAD, END)
    yield Rule(14)
    first = max(0, min(screen.at - 1, len(screen.names) - _CHOICES_SHOWN))
    shown = screen.names[first : first + _CHOICES_SHOWN]
    top = CHOICES.top + (CHOICES.bottom - CHOICES.top - len(shown) * _CHOICE_HEIGHT) // 2
    for row, name in enumerate(shown, start=first):
        line = Box(MARGIN, top, WIDTH - MARGIN, top + _CHOICE_HEIGHT)
        yield from _text(name or "-", LINE, line._replace(left=MARGIN + 3, right=WIDTH - MARGIN - 3), START)
        if row == screen.at:
            yield Bar(line)
        top += _CHOICE_HEIGHT
    yield from _text(say("Arrows, then confirm") if several else say("Confirm or cancel"), LINE, FOOT)


def _amount(head: str, amount: Amount, language: str, foot: str, pictures: Sequence[str]) -> Sheet:
    """A sale on its way: the amount as large as it goes."""
    code = _text(amount.currency.code, LABEL, HEAD, END)
    marks: list[Mark] = [*_text(head, LABEL, HEAD._replace(right=code[0].x - ICON_GAP), START), *code, Rule(14)]
    marks += _text(amount.format(language), HUGE, MIDDLE)
    widths = [icons()[name].width + ICON_GAP for name in pictures]
    (line,) = _text(foot, LINE, FOOT._replace(left=MARGIN + sum(widths)), START)
    x = (WIDTH - line.box.right + line.box.left - sum(widths)) // 2
    for name, width in zip(pictures, widths, strict=True):
        marks.append(Icon(name, x, HEIGHT - icons()[name].height))
        x += width
    return Sheet((*marks, Text(line.text, line.font, x, line.baseline, line.shortened)))


def _result(
    icon: str, title: str, amount: Amount, language: str, *, card: str, note: str = "", bright: bool = False
) -> Sheet:
    """A sale that stands."""
    beside = Box(BADGE.right + ICON_GAP, BADGE.top, WIDTH - MARGIN, BADGE.bottom)
    marks = [_badge(icon)]
    if note:
        marks += _text(title, SUBTITLE, beside._replace(bottom=16), START)
        marks += _text(note, LINE, beside._replace(top=17), START)
    else:
        marks += _text(title, TITLE, beside, START)
    marks += _text(amount.format(language), LARGE, Box(0, BADGE.bottom - 1, WIDTH, FOOT.top - 1))
    code = _text(amount.currency.code, LABEL, FOOT, START)
    marks += [*code, *_text(card, LINE, FOOT._replace(left=code[0].box.right + ICON_GAP), END)]
    return Sheet(tuple(marks), bright)


def _notice(icon: str, title: str, text: str, amount: Amount | None = None, language: str = "") -> Sheet:
    """Something to know or to do."""
    down = 0 if text else (HEIGHT - BADGE.bottom) // 2
    beside = Box(BADGE.right + ICON_GAP, BADGE.top + down, WIDTH - MARGIN, BADGE.bottom + down)
    marks = [_badge(icon, down), *_text(title, TITLE, beside, START)]
    if amount is None:
        marks += _text(text, BODY, Box(MARGIN, BADGE.bottom, WIDTH - MARGIN, HEIGHT))
    else:
        marks += _text(text, BODY, Box(MARGIN, BADGE.bottom, WIDTH - MARGIN, FOOT.top))
        marks += _text(f"{amount.format(language)} {amount.currency.code}", LABEL, FOOT)
    return Sheet(tuple(marks))


def _badge(name: str, down: int = 0) -> Mark:
    picture = icons()[name]
    return Icon(
        name,
        BADGE.left + (BADGE.right - BADGE.left - picture.width) // 2,
        BADGE.top + (BADGE.bottom - BADGE.top - picture.height) // 2 + down,
    )


def _ending(screen: Approved | AcceptedOffline | Declined) -> str:
    match screen:
        case Approved():
            return messages.mark("Approved")
        case AcceptedOffline():
            return messages.mark("Accepted, not yet sent")
        case Declined():
            return messages.mark("Declined")


def _text(text: str, fonts: Fonts, box: Box, align: float = CENTRE) -> list[Text]:
    """The text in the first of these fonts in which it fits into the box; centred in height, aligned in width."""
    width, height = box.right - box.left, box.bottom - box.top
    for name, lines_max in fonts:
        face = font(name)
        lines = _wrapped(text, name, width, lines_max)
        needed = face.height + face.leading * (len(lines) - 1)
        if needed <= height and all(face.width(line) <= width for line in lines):
            break
    first = box.top + (height - needed) // 2 + face.height
    if lines:
        first = max(first, -face.box(lines[0])[1])  # accents stand higher than capitals: none may leave the panel
    marks = []
    for row, line in enumerate(lines):
        shown = _shortened(line, name, width)
        x = box.left + int((width - face.width(shown)) * align)
        marks.append(Text(shown, name, x, first + row * face.leading, shown != line))
    return marks


@lru_cache(maxsize=256)  # a terminal has some hundred sentences
def _wrapped(text: str, name: str, width: int, lines_max: int) -> tuple[str, ...]:
    """Whole words in as few lines as possible, those about equally long. What is too much stands in the last line."""
    lines = _filled(text, name, width)
    for narrower in range(width - 1, 0, -1):
        if len(balanced := _filled(text, name, narrower)) > len(lines):
            break
        lines = balanced
    return (*lines[: lines_max - 1], " ".join(lines[lines_max - 1 :])) if len(lines) > lines_max else tuple(lines)


def _filled(text: str, name: str, width: int) -> list[str]:
    """Lines of whole words, each as long as the width allows."""
    lines: list[str] = []
    for word in text.split():
        if lines and font(name).width(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _shortened(line: str, name: str, width: int) -> str:
    """The line, or as much of it as fits, with an ellipsis: half a word helps a merchant more than a fault would."""
    if font(name).width(line) <= width:
        return line
    cut = next((end for end in range(len(line), 0, -1) if font(name).width(line[:end] + "…") <= width), 0)
    return line[:cut] + "…"

"""From bytes to a tree that says what they are: BER-TLV, data object lists, command and response APDUs, ATR and ATS.

Reading goes in three passes. The first takes the bytes apart as far as they can be, and notes the first fault; the
second draws the veil (`masking`) over what must not be seen, wherever it was found; only the third puts into words what
is left to see. No input raises: what is wrong with one stands in its report.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from terminal.emv import atr, dol
from terminal.emv.apdu import Response
from terminal.emv.describe import apdus, values
from terminal.emv.describe.masking import Veil
from terminal.emv.describe.names import COMMON, KERNEL_2, KERNEL_3
from terminal.emv.describe.values import Context, Line, Meaning, Unfit
from terminal.emv.tags import Format, Kernel2Tag, Tag
from terminal.emv.tlv import (
    DEPTH_MAX,
    LENGTH_BYTES_MAX,
    SIZE_MAX,
    TAG_BYTES_MAX,
    TlvError,
    is_constructed,
    read_length,
    read_tag,
)

_PANS: Final = frozenset({Tag.PAN})
_TRACKS_2: Final = frozenset({Tag.TRACK_2_EQUIVALENT, Kernel2Tag.TRACK_2_DATA})
_HIDDEN: Final = frozenset(
    {
        Tag.CARDHOLDER_NAME,
        Tag.CARDHOLDER_NAME_EXTENDED,
        Tag.TRACK_1_DISCRETIONARY_DATA,
        Tag.TRACK_2_DISCRETIONARY_DATA,
        Kernel2Tag.DD_CARD_TRACK_1,
        Kernel2Tag.DD_CARD_TRACK_2,
        # Whoever has the published CA key opens these, and finds the PAN (Book 2, 6.4).
        Tag.ICC_CERTIFICATE,
        Tag.PIN_CERTIFICATE,
    }
)
# As good as random: digits in them mean nothing, and some would look like a PAN by chance.
_RANDOM: Final = frozenset(
    {
        Tag.ISSUER_CERTIFICATE,
        Tag.ISSUER_REMAINDER,
        Tag.SIGNED_STATIC_DATA,
        Tag.CRYPTOGRAM,
        Tag.ICC_REMAINDER,
        Tag.PIN_REMAINDER,
        Tag.SIGNED_DYNAMIC_DATA,
        Tag.ICC_DYNAMIC_NUMBER,
        Tag.UNPREDICTABLE_NUMBER,
        Tag.TC_HASH,
    }
)
_HEADER_BYTES_MAX: Final = TAG_BYTES_MAX + 1 + LENGTH_BYTES_MAX
_LISTS: Final = (Tag.PDOL, Tag.CDOL1, Tag.CDOL2, Tag.DDOL, Kernel2Tag.UDOL, Kernel2Tag.DRDOL)
_KERNEL_OF_RID: Final = {b"\xa0\x00\x00\x00\x03": 3, b"\xa0\x00\x00\x00\x04": 2}


@dataclass(frozen=True, slots=True)
class Fault:
    """Where the input stops making sense, and why."""

    at: int
    reason: str


@dataclass(frozen=True, slots=True)
class Item:
    """One data object, or one part of an APDU, explained; `value` in hexadecimal, hidden digits as `*`."""

    label: str
    name: str
    at: int
    length: int
    value: str
    format: str = ""
    source: str = ""
    templates: tuple[str, ...] = ()
    text: str = ""
    lines: tuple[Line, ...] = ()
    problem: str = ""
    children: tuple[Item, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """What the input is, what it says, and the first thing that is wrong with it."""

    kind: str
    items: tuple[Item, ...]
    fault: Fault | None = None
    kernel: int | None = None
    table: bool = False  # its items are parts in a row, not objects that nest


class _Raw(NamedTuple):
    """A stretch of the input. `tag` None: not a data object; `name` then says what it is."""

    tag: int | None
    start: int
    head: int  # where its value begins
    end: int
    children: tuple[_Raw, ...] = ()
    name: str = ""
    text: str = ""
    problem: str = ""
    random: bool = False  # its digits mean nothing


# First pass: apart


class _Walk:
    """Takes BER-TLV apart, as far as it goes. `fault` is the first thing that did not go."""

    def __init__(self, data: bytes, veil: Veil) -> None:
        self.data = data
        self.fault: Fault | None = None
        self._veil = veil

    def blame(self, at: int, reason: str) -> str:
        if self.fault is None:
            self.fault = Fault(at, reason)
        return reason

    def objects(self, at: int, end: int, depth: int = DEPTH_MAX) -> tuple[_Raw, ...]:
        return tuple(self._objects(at, end, depth))

    def _objects(self, at: int, end: int, depth: int) -> Iterator[_Raw]:
        first = at
        while at < end:
            if self.data[at] == 0:
                at += 1
                continue
            start = at
            header = self.data[start : min(end, start + _HEADER_BYTES_MAX)]
            try:
                tag, size = read_tag(header, 0)
                length, size = read_length(header, size)
            except TlvError as error:
                problem = self.blame(start + (error.at or 0), error.reason)
                self._veil.suspicious(first, end, thorough=True)  # what came before may have been misread, too
                yield _Raw(None, start, start, end, name="not read", problem=problem)
                return
            at = start + size
            stop, problem = at + length, ""
            if stop > end:
                problem = self.blame(start, f"{length} bytes are stated, {end - at} are there")
                self._veil.suspicious(first, end, thorough=True)
                stop = end
            yield self._object(_Raw(tag, start, at, stop, problem=problem), depth)
            at = stop

    def _object(self, plain: _Raw, depth: int) -> _Raw:
        tag = plain.tag
        if tag is None or not is_constructed(tag):
            return plain
        if depth == 1:
            return plain._replace(problem=self.blame(plain.start, f"data objects are nested deeper than {DEPTH_MAX}"))
        known = any(tag in table for table in (COMMON, KERNEL_2, KERNEL_3))
        if not known and self._veil.suspicious(plain.head, plain.end, thorough=True):
            # Card data out of place: taken for data objects, its digits would show up as their tags and lengths.
            return plain._replace(problem=self.blame(plain.head, "what looks like card data is no BER-TLV"))
        return plain._replace(children=self.objects(plain.head, plain.end, depth - 1))


def _flat(raws: Iterable[_Raw]) -> Iterator[_Raw]:
    for raw in raws:
        yield raw
        yield from _flat(raw.children)


# Second pass: the veil


def _draw(raws: Sequence[_Raw], veil: Veil, context: Context) -> None:
    for raw in _flat(raws):
        if not raw.children:
            _hide(raw, veil, context)
    size = max((raw.end for raw in raws), default=0)
    veil.everywhere(0, size)


def _hide(raw: _Raw, veil: Veil, context: Context) -> None:
    at, end, tag = raw.head, raw.end, raw.tag
    if tag == Tag.TRANSACTION_PIN_DATA or raw.name == "PIN":
        veil.pin(at, end)
    elif raw.problem and tag in _PANS | _TRACKS_2 | _HIDDEN | {Kernel2Tag.TRACK_1_DATA, Tag.IBAN}:
        veil.all(at, end)
    elif tag in _PANS:
        veil.pan(at, end)
    elif tag in _TRACKS_2:
        veil.track_2(at, end)
    elif tag == Kernel2Tag.TRACK_1_DATA:
        veil.track_1(at, end)
    elif tag in _HIDDEN:
        veil.all(at, end)
    elif tag == Tag.IBAN:
        veil.ending(at, end)
    else:
        definition = None if tag is None else values.definition(tag, end - at, context)[1]
        explained = tag is not None and values.renderer(tag, values.kernel_of(tag, end - at, context)) is not None
        opaque = definition is None or (definition.format is Format.B and not explained) or bool(raw.problem)
        opaque = opaque or tag == Tag.ISSUER_SCRIPT_COMMAND  # explained is its header, not what it writes
        thorough = opaque and not raw.random and tag not in _RANDOM
        if not raw.random:
            veil.suspicious(at, end, thorough=thorough)


# Third pass: into words


def _items(raws: Sequence[_Raw], data: bytes, veil: Veil, context: Context, base: int = 0) -> tuple[Item, ...]:
    return tuple(_item(raw, data, veil, context, base) for raw in raws)


def _item(raw: _Raw, data: bytes, veil: Veil, context: Context, base: int) -> Item:
    value = veil.text(raw.head, raw.end)
    if raw.tag is None:
        return Item(
            "", raw.name, raw.start - base, raw.end - raw.head, value, text=raw.text, problem=raw.problem,
            children=_items(raw.children, data, veil, context, base),
        )  # fmt: skip
    inner = replace(context, parent=raw.tag)
    name, known = values.definition(raw.tag, raw.end - raw.head, context)
    meaning, problem = Meaning(), raw.problem
    if not raw.children and not problem:
        meaning, problem = _meaning(raw, data, veil, context)
    label = f"{raw.tag:02X}"
    misread = raw.head > raw.start and raw.tag not in _PANS | _TRACKS_2
    if misread and veil.covers(raw.start, raw.start + len(label) // 2):
        label = veil.text(raw.start, raw.start + len(label) // 2)
    return Item(
        label=label,
        name=name.name if name else "unknown",
        at=raw.start - base,
        length=raw.end - raw.head,
        value=value,
        format=known.format.value if known else "",
        source=known.source.value if known else "",
        templates=name.templates if name else (),
        text=raw.text or meaning.text,
        lines=meaning.lines,
        problem=problem,
        children=_items(raw.children, data, veil, inner, base),
    )


def _meaning(raw: _Raw, data: bytes, veil: Veil, context: Context) -> tuple[Meaning, str]:
    """What it says, and what is wrong with it. Of a hidden value only those speak that know what to leave out."""
    tag = raw.tag or 0
    if is_constructed(tag):
        return Meaning("empty" if raw.head == raw.end else ""), ""
    speaks = tag in _PANS | _TRACKS_2 | {Tag.IBAN}
    if veil.covers(raw.head, raw.end) and not speaks:
        if tag in {Tag.ICC_CERTIFICATE, Tag.PIN_CERTIFICATE}:
            return Meaning("hidden: the PAN can be recovered from it"), ""
        return Meaning(
            "hidden"
            if tag in _HIDDEN or tag == Tag.TRANSACTION_PIN_DATA
            else "hidden: looks like card data"
            if tag != Kernel2Tag.TRACK_1_DATA
            else ""
        ), ""
    try:
        return values.meaning(tag, data[raw.head : raw.end], context), ""
    except Unfit as unfit:
        return Meaning(), str(unfit)


# What is known from elsewhere in the input


def _learn(raws: Iterable[_Raw], data: bytes, context: Context) -> Context:
    """The kernel by the AID, currencies, and data object lists, from what was read so far."""
    lists = dict(context.lists)
    kernel, currency, own = context.kernel, context.currency, context.card_currency
    for raw in _flat(raws):
        value = data[raw.head : raw.end]
        match raw.tag:
            case Tag.DF_NAME | Tag.ADF_NAME | Tag.AID if kernel is None:
                kernel = _KERNEL_OF_RID.get(value[:5])
            case Tag.TRANSACTION_CURRENCY_CODE if value.hex().isdecimal():
                currency = int(value.hex())
            case Tag.APPLICATION_CURRENCY_CODE if value.hex().isdecimal():
                own = int(value.hex())
            case int() if raw.tag in _LISTS:
                lists[int(raw.tag)] = value
            case _:
                pass
    return replace(context, kernel=kernel, currency=currency, card_currency=own, lists=lists)


# The inputs


def ber_tlv(data: bytes, *, kernel: int | None = None, show: bool = False) -> Report:
    """Data objects, one after the other."""
    veil = Veil(data, show=show)
    walk = _Walk(data, veil)
    raws = walk.objects(0, len(data))
    context = _learn(raws, data, Context(kernel))
    _draw(raws, veil, context)
    return Report("BER-TLV", _items(raws, data, veil, context), walk.fault, context.kernel)


def value_of(tag: int, data: bytes, *, kernel: int | None = None, show: bool = False) -> Report:
    """The value of one data object, without tag and length."""
    veil = Veil(data, show=show)
    walk = _Walk(data, veil)
    children = walk.objects(0, len(data)) if is_constructed(tag) else ()
    raws = (_Raw(tag, 0, 0, len(data), children),)
    context = _learn(raws, data, Context(kernel))
    _draw(raws, veil, context)
    items = _items(raws, data, veil, context)
    fault = walk.fault
    if fault is None and items[0].problem:
        fault = Fault(0, f"the value {items[0].problem}")
    return Report(f"value of {tag:02X}", items, fault, context.kernel)


def data_object_list(data: bytes, *, kernel: int | None = None, show: bool = False) -> Report:
    """What a card asks to be sent."""
    veil = Veil(data, show=show)
    veil.suspicious(0, len(data), thorough=True)
    context, items, at = Context(kernel), [], 0
    fault = None
    try:
        for entry in dol.entries(data):
            name, known = values.definition(entry.tag, entry.length, context)
            size = len(f"{entry.tag:02X}") // 2
            items.append(
                Item(
                    label=veil.text(at, at + size),
                    name=name.name if name else "unknown",
                    at=at,
                    length=entry.length,
                    value="",
                    format=known.format.value if known else "",
                    source=known.source.value if known else "",
                )
            )
            at += size + 1
    except TlvError as error:
        fault = Fault(error.at or at, error.reason)
        items.append(Item("", "not read", at, len(data) - at, veil.text(at, len(data)), problem=error.reason))
    return Report(
        f"data object list, asks for {sum(item.length for item in items if item.label)} bytes",
        tuple(items),
        fault,
        table=True,
    )


def status_word(data: bytes) -> Report:
    """SW1 SW2."""
    if len(data) != 2:
        return Report("status word", (), Fault(min(len(data), 2), f"a status word has 2 bytes, not {len(data)}"))
    said = apdus.status_word(int.from_bytes(data, "big"))
    return Report("status word", (Item("SW", "", 0, 2, data.hex().upper(), text=said or "unknown"),), table=True)


def answer_to_reset(data: bytes, *, contactless: bool = False) -> Report:
    """ATR, or ATS of a contactless card."""
    kind = "ATS" if contactless else "ATR"
    veil = Veil(data, show=False)
    veil.suspicious(0, len(data), thorough=False)
    try:
        parts = atr.ats(data) if contactless else atr.atr(data)
    except atr.AtrError as error:
        return Report(kind, (), Fault(error.at, error.reason))
    return Report(kind, tuple(
        Item(part.name, "", part.at, len(part.value), veil.text(part.at, part.at + len(part.value)),
             text="hidden" if veil.covers(part.at, part.at + len(part.value)) else part.text)
        for part in parts
    ), table=True)  # fmt: skip


def conversation(messages: Sequence[bytes], *, kernel: int | None = None, show: bool = False) -> Report:
    """Command and response APDUs in the order in which they were exchanged; or one of them."""
    data = b"".join(messages)
    veil = Veil(data, show=show)
    walk = _Walk(data, veil)
    context = Context(kernel)
    found: list[tuple[_Raw, Context]] = []
    asked, at = "", 0
    for message in messages:
        end = at + len(message)
        command = _is_command(message)
        read = _command(walk, at, end, context) if command else _response(walk, at, end, asked, context)
        if command:
            name = apdus.command_parts(message).name if len(message) >= 4 and read.problem == "" else ""
            asked = asked if name == "GET RESPONSE" else name
        context = _learn([read], data, context)
        found.append((read, context))
        at = end
    _draw([read for read, _ in found], veil, context)
    items = tuple(_item(read, data, veil, seen, read.start) for read, seen in found)
    kind = "APDU" if len(items) == 1 else f"{len(items)} APDUs"
    return Report(kind, items, walk.fault, context.kernel)


def _is_command(apdu: bytes) -> bool:
    try:
        known = bool(apdus.command_parts(apdu).name)
    except TlvError:
        known = len(apdu) >= 5 and (apdu[0], apdu[1]) in apdus.COMMANDS and not _ends_in_status(apdu)
    return known or not _ends_in_status(apdu)


def _ends_in_status(apdu: bytes) -> bool:
    return len(apdu) >= 2 and bool(apdus.status_word(int.from_bytes(apdu[-2:], "big")))


def _command(walk: _Walk, at: int, end: int, context: Context) -> _Raw:
    apdu = walk.data[at:end]
    try:
        parts = apdus.command_parts(apdu)
    except TlvError as error:
        problem = walk.blame(at + (error.at or 0), error.reason)
        return _Raw(None, at, at, end, name="command", problem=problem)
    children = []
    if parts.end > parts.at:
        children.append(_command_data(walk, parts.name, at + parts.at, at + parts.end, context))
    if parts.le is not None:
        children.append(
            _Raw(None, end - 1, end - 1, end, name="Le", text=f"{parts.le or 256} bytes at most", random=True)
        )
    said = apdus.parameters(parts.name, apdu) if parts.name else ""
    head = _Raw(None, at, at, at + 4, name="header", text=said, random=True)
    return _Raw(None, at, at, end, (head, *children), name=f"command: {parts.name or 'unknown'}")


def _command_data(  # noqa: PLR0911 - one case for each command
    walk: _Walk, name: str, at: int, end: int, context: Context
) -> _Raw:
    match name:
        case "SELECT":
            return _Raw(Tag.DF_NAME, at, at, end)
        case "VERIFY":
            return _Raw(None, at, at, end, name="PIN", text="never shown")
        case "GET PROCESSING OPTIONS":
            read = walk.objects(at, end)
            if len(read) == 1 and read[0].tag == Tag.COMMAND_TEMPLATE and not read[0].problem:
                answers = _answers(walk, (Tag.PDOL,), read[0].head, end, context)
                read = (read[0]._replace(children=answers),)
            return _Raw(None, at, at, end, read, name="data")
        case "GENERATE AC":
            return _Raw(None, at, at, end, _answers(walk, (Tag.CDOL1, Tag.CDOL2), at, end, context), name="data")
        case "INTERNAL AUTHENTICATE":
            return _Raw(None, at, at, end, _answers(walk, (Tag.DDOL,), at, end, context), name="data")
        case "EXTERNAL AUTHENTICATE":
            return _Raw(Tag.ISSUER_AUTHENTICATION_DATA, at, at, end)
        case "EXCHANGE RELAY RESISTANCE DATA":
            return _Raw(Kernel2Tag.TERMINAL_RELAY_ENTROPY, at, at, end)
        case _:
            return _Raw(None, at, at, end, name="data")


def _answers(walk: _Walk, lists: Sequence[int], at: int, end: int, context: Context) -> tuple[_Raw, ...]:
    """The values that answer a data object list, if one that was seen before fits."""
    for tag in lists:
        asked = context.lists.get(int(tag))
        if not asked:
            continue
        try:
            parts = dol.split(asked, walk.data[at:end])
        except TlvError:
            continue
        found = []
        for entry, _ in parts:
            found.append(_Raw(entry.tag, at, at, at + entry.length))
            at += entry.length
        return tuple(found)
    return ()


def _response(walk: _Walk, at: int, end: int, asked: str, context: Context) -> _Raw:
    sw = Response.decode(walk.data[at:end]).sw
    stop = end - 2
    status = _Raw(None, stop, stop, end, name="status", text=apdus.status_word(sw, asked) or "unknown", random=True)
    if asked in {"GET CHALLENGE", "EXCHANGE RELAY RESISTANCE DATA"} and walk.data[at:stop][:1] != b"\x80" and stop > at:
        body: tuple[_Raw, ...] = (_Raw(None, at, at, stop, name="data", random=True),)
    else:
        body = tuple(_format_1(walk.data, raw, asked) for raw in walk.objects(at, stop))
    return _Raw(None, at, at, end, (*body, status), name="response", text="")


def _format_1(data: bytes, raw: _Raw, asked: str) -> _Raw:
    """Template 80 holds values without tags: which ones, the command says, or else their lengths (Book 3, 6.5)."""
    size = raw.end - raw.head
    if raw.tag != Tag.RESPONSE_FORMAT_1 or raw.problem:
        return raw
    if not asked:
        asked = (
            "GET PROCESSING OPTIONS"
            if size % 4 == 2 and _is_afl(data[raw.head + 2 : raw.end])
            else "GENERATE AC"
            if 11 <= size <= 43
            else ""
        )
    match asked:
        case "GET PROCESSING OPTIONS" if size >= 2:
            layout: tuple[tuple[int, int], ...] = ((Tag.AIP, 2), (Tag.AFL, size - 2))
        case "GENERATE AC" | "RECOVER AC" if size >= 11:
            layout = (
                (Tag.CRYPTOGRAM_INFORMATION, 1),
                (Tag.ATC, 2),
                (Tag.CRYPTOGRAM, 8),
                (Tag.ISSUER_APPLICATION_DATA, size - 11),
            )
        case "INTERNAL AUTHENTICATE":
            layout = ((Tag.SIGNED_DYNAMIC_DATA, size),)
        case "EXCHANGE RELAY RESISTANCE DATA" if size == 10:
            layout = ((0xDF8302, 4), (0xDF8303, 2), (0xDF8304, 2), (0xDF8305, 2))
        case _:
            return raw
    at, children = raw.head, []
    for tag, length in layout:
        if length:
            children.append(_Raw(int(tag), at, at, at + length))
        at += length
    return raw._replace(children=tuple(children))


def _is_afl(value: bytes) -> bool:
    try:
        values.afl(value, Context())
    except Unfit:
        return False
    return True


def recognise(data: bytes, *, kernel: int | None = None, show: bool = False) -> Report:  # noqa: PLR0911
    """Bytes of which nobody has said what they are: BER-TLV, unless they can only be something else."""
    if len(data) > SIZE_MAX:
        return Report("BER-TLV", (), Fault(SIZE_MAX, f"more than {SIZE_MAX} bytes"))
    reset = answer_to_reset(data) if data[:1] in {b"\x3b", b"\x3f"} else None
    if reset is not None and reset.fault is None:
        return reset
    report = ber_tlv(data, kernel=kernel, show=show)
    if report.fault is None:
        # A response with its status word reads as BER-TLV that ends in an empty certificate.
        if len(report.items) > 1 and data[-2:] == b"\x90\x00" and report.items[-1].label == "90":
            return conversation([data], kernel=kernel, show=show)
        return report
    if len(data) > 1 and (other := answer_to_reset(data, contactless=True)).fault is None:
        return other
    if len(data) >= 2 and (_known_command(data) or _ends_in_status(data)):
        other = conversation([data], kernel=kernel, show=show)
        if other.fault is None:
            return other
    return reset or report


def _known_command(apdu: bytes) -> bool:
    try:
        return bool(apdus.command_parts(apdu).name)
    except TlvError:
        return False

"""`payterm emv decode`: reads what was typed or pasted, has `terminal.emv.describe` explain it, and paints the tree."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from terminal.commands.base import print_json
from terminal.emv.describe import decoding
from terminal.emv.describe.decoding import Item, Report
from terminal.emv.tlv import SIZE_MAX, TlvError, read_tag
from terminal.errors import TerminalError

_INPUT_MAX: Final = 1 << 20  # characters: an exchange of hundreds of APDUs
_MESSAGES_MAX: Final = 2_000
_SHORT: Final = 24  # digits of a value that leaves room for its meaning in the same line
_ARROW: Final = re.compile(r"^\s*(?:[CR](?:-?APDU)?\s*[:>]+|[-=]*>+|<+[-=]*)\s*", re.IGNORECASE)
_SKIPPED: Final = re.compile(r"0x|[\s:,;\-_.]+", re.IGNORECASE)


class DecodeError(TerminalError):
    """What was given is not what it should be; the message says where, and never quotes it."""

    exit_code = 2


def run(options: argparse.Namespace) -> int:
    """Explain and print. Raises `DecodeError` after everything that could be read was printed."""
    report = _report(options)
    if options.json:
        print_json(as_json(report))
    else:
        paint(report, Console(highlight=False, soft_wrap=False))
    if report.fault is not None:
        sys.stdout.flush()
        raise DecodeError(f"{report.kind}: offset {report.fault.at}: {report.fault.reason}")
    return 0


def _report(options: argparse.Namespace) -> Report:
    lines = _lines(options.hex)
    if options.apdu:
        return decoding.conversation(_messages(lines), kernel=options.kernel, show=options.show_pan)
    data = _bytes("".join(lines))
    if options.sw:
        return decoding.status_word(data)
    if options.atr or options.ats:
        return decoding.answer_to_reset(data, contactless=options.ats)
    if options.dol:
        return decoding.data_object_list(data, kernel=options.kernel, show=options.show_pan)
    if options.tag is not None:
        return decoding.value_of(_tag(options.tag), data, kernel=options.kernel, show=options.show_pan)
    if not data:
        raise DecodeError("there is nothing to decode: give hexadecimal digits, or - and a file on standard input")
    return decoding.recognise(data, kernel=options.kernel, show=options.show_pan)


# What was typed


def _lines(words: Sequence[str]) -> list[str]:
    """Arguments and lines of standard input; what follows # is a comment."""
    found: list[str] = []
    for word in words:
        text = sys.stdin.read(_INPUT_MAX + 1) if word == "-" else word
        if len(text) > _INPUT_MAX:
            raise DecodeError(f"more than {_INPUT_MAX} characters: give it in parts")
        found += [line for line in (line.partition("#")[0].strip() for line in text.splitlines()) if line]
    return found


def _messages(lines: Sequence[str]) -> list[bytes]:
    """One APDU a line, unless the lines are pieces that only together are one."""
    bare = [_ARROW.sub("", line) for line in lines]
    if len(bare) > _MESSAGES_MAX:
        raise DecodeError(f"more than {_MESSAGES_MAX} APDUs: give them in parts")
    digits = [_SKIPPED.sub("", line) for line in bare]
    if any(len(each) < 8 and not (len(each) == 4 and each[0] in "69") for each in digits):
        return [_bytes("".join(bare))]
    return [_bytes(each) for each in bare]


def _bytes(text: str) -> bytes:
    digits = _SKIPPED.sub("", text)
    wrong = re.search(r"[^0-9A-Fa-f]", digits)
    if wrong is not None:
        raise DecodeError(f"offset {wrong.start() // 2}: {wrong[0]!r} is no hexadecimal digit")
    if len(digits) % 2:
        raise DecodeError(f"offset {len(digits) // 2}: half a byte, {len(digits)} digits in all")
    if len(digits) // 2 > SIZE_MAX:
        raise DecodeError(f"offset {SIZE_MAX}: more than {SIZE_MAX} bytes")
    return bytes.fromhex(digits)


def _tag(text: str) -> int:
    data = _bytes(text)
    try:
        tag, end = read_tag(data, 0) if data else (0, -1)
    except TlvError as error:
        raise DecodeError(f"--tag {text}: {error.reason}") from error
    if end != len(data) or tag == 0:
        raise DecodeError(f"--tag {text}: that is no tag; write it as 95 or 9F02")
    return tag


# What is printed


def as_json(report: Report) -> dict[str, Any]:
    fault = report.fault
    return {
        "kind": report.kind,
        "kernel": report.kernel,
        "objects": [_item_json(item) for item in report.items],
        "error": None if fault is None else {"offset": fault.at, "reason": fault.reason},
    }


def _item_json(item: Item) -> dict[str, Any]:
    return {
        "tag": item.label or None,
        "name": item.name,
        "offset": item.at,
        "length": item.length,
        "value": item.value,
        "format": item.format or None,
        "source": item.source or None,
        "templates": list(item.templates),
        "meaning": item.text or None,
        "details": [{"where": where, "text": text} for where, text in item.lines],
        "problem": item.problem or None,
        "children": [_item_json(child) for child in item.children],
    }


def paint(report: Report, console: Console) -> None:
    """The tree, as wide as the terminal; colours where there are any (NO_COLOR is honoured)."""
    kernel = f", kernel {report.kernel}" if report.kernel else ""
    console.print(Text(f"{report.kind}{kernel}", style="bold underline"))
    if report.table:
        console.print(_table(report))
        return
    tree = Tree("", hide_root=True, guide_style="dim")
    for item in report.items:
        _grow(tree, item)
    console.print(tree)


def _table(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(style="green", overflow="fold")
    table.add_column()
    table.add_column(style="dim", justify="right", no_wrap=True)
    for item in report.items:
        about = f"{item.format} · {item.source} · {item.length} B" if item.format else ""
        said = Text(item.problem, style="bold red") if item.problem else Text(item.text or item.name)
        table.add_row(item.label, item.value, said, about)
    return table


def _grow(tree: Tree, item: Item) -> None:
    branch = tree.add(_painted(item))
    for child in item.children:
        _grow(branch, child)


def _painted(item: Item) -> RenderableType:
    head = Table.grid(expand=True, padding=(0, 1))
    head.add_column(overflow="fold")
    head.add_column(justify="right", no_wrap=True)
    title = Text()
    if item.label:
        title.append(item.label, style="bold cyan")
        title.append("  ")
    title.append(item.name, style="bold" if item.name != "unknown" else "dim")
    about = [part for part in (item.format, item.source, f"{item.length} B") if part]
    head.add_row(title, Text(" · ".join(about), style="dim"))
    parts: list[RenderableType] = [head]
    leaf = not item.children
    said = Text(item.text, style="yellow")
    indent = len(item.label) + 2 if item.label else 2
    if leaf and item.value:
        hidden = len(item.value) > _SHORT and not item.value.strip("*")
        value = Text("*" * 12 if hidden else item.value, style="green")
        if item.text and len(value) <= _SHORT:
            value = Text.assemble(value, "  ", said)
            said = Text()
        value.overflow = "fold"
        parts.append(Padding(value, (0, 0, 0, indent)))
    if said:
        parts.append(Padding(said, (0, 0, 0, indent)))
    if item.lines:
        lines = Table.grid(padding=(0, 2))
        lines.add_column(style="dim", no_wrap=True)
        lines.add_column()
        for where, text in item.lines:
            lines.add_row(where, Text(text, style="red" if text.startswith("reserved, yet") else ""))
        parts.append(Padding(lines, (0, 0, 0, indent)))
    if item.problem:
        parts.append(Padding(Text(item.problem, style="bold red"), (0, 0, 0, indent)))
    return Group(*parts)

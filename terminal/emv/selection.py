"""Reading the directory and choosing an application (EMV 4.4 Book 1, 12; Book B, 3.3).

What a card's directory says, which of the terminal's combinations it fits and in which order they are to be tried. The
conversation itself is led by `entry_point`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from terminal.emv import tlv
from terminal.emv.apdu import Command
from terminal.emv.configuration import AID_BYTES_MAX, AID_BYTES_MIN, Environment
from terminal.emv.tags import Tag
from terminal.emv.tlv import Node

PPSE: Final = b"2PAY.SYS.DDF01"
DIRECTORY_ENTRIES_MAX: Final = 28  # what fits into a response of 256 bytes: 61 07 4F 05 and a name of five bytes
LABEL_LENGTH_MAX: Final = 16
LANGUAGES_MAX: Final = 4  # 5F2D has 2 to 8 bytes

ANY_KERNEL: Final = 0
_KERNEL_BY_RID: Final = {  # Book B, table 3-6: what a card means that names no kernel
    bytes.fromhex("A000000004"): 2,
    bytes.fromhex("A000000003"): 3,
    bytes.fromhex("A000000025"): 4,
    bytes.fromhex("A000000065"): 5,
    bytes.fromhex("A000000152"): 6,
    bytes.fromhex("A000000324"): 6,
    bytes.fromhex("A000000333"): 7,
}


def select(name: bytes) -> Command:
    """SELECT by name, first or only occurrence (Book 1, 11.3)."""
    return Command(0x00, 0xA4, 0x04, 0x00, name, le=0)


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """One application in a card's directory (Book 1, 12.2.3; Book B, 3.3.1)."""

    adf_name: bytes
    label: bytes = b""
    priority: int = 0  # 1 is best, 0 states none
    confirm: bool = False  # contact: only if the cardholder agrees
    kernel_identifier: bytes = b""
    extended_selection: bytes = b""

    @property
    def rank(self) -> int:
        """For sorting: an entry without a priority comes last (Book B, 3.3.3)."""
        return self.priority or 16

    def usable(self) -> bool:
        """Whether the ADF name, with and without its extension, is one that can be selected."""
        return len(self.adf_name) >= AID_BYTES_MIN and len(self.adf_name + self.extended_selection) <= AID_BYTES_MAX

    def requested_kernel(self) -> int | None:
        """The kernel that the card asks for, `ANY_KERNEL`, or None when it states one that cannot be had."""
        identifier = self.kernel_identifier
        if not identifier:
            return default_kernel(self.adf_name)
        if not identifier[0] & 0x80:  # international or reserved: the first byte says it all
            return identifier[0]
        if len(identifier) < 3 or not identifier[0] & 0x3F:
            return None  # domestic or proprietary, and either cut short or left to be determined otherwise
        return int.from_bytes(identifier[:3], "big")

    def select(self, extended: bool) -> Command:
        """Select this application; `extended`: this terminal supports extended selection."""
        return select(self.adf_name + self.extended_selection if extended else self.adf_name)


def default_kernel(aid: bytes) -> int:
    """The kernel of an AID's scheme, or `ANY_KERNEL`."""
    return _KERNEL_BY_RID.get(aid[:5], ANY_KERNEL)


def directory(fci: bytes) -> tuple[DirectoryEntry, ...]:
    """The usable entries of a PPSE's FCI, in order. Raises `TlvError`."""
    node: Node | None = tlv.parse_one(fci, Tag.FCI_TEMPLATE)
    for tag in (Tag.FCI_PROPRIETARY_TEMPLATE, Tag.FCI_ISSUER_DISCRETIONARY_DATA):
        node = node.find(tag) if node else None
    templates = [child for child in node.children if child.tag == Tag.APPLICATION_TEMPLATE] if node else []
    entries = (directory_entry(each.children) for each in templates[:DIRECTORY_ENTRIES_MAX])
    return tuple(entry for entry in entries if entry.usable())


def directory_entry(objects: Sequence[Node]) -> DirectoryEntry:
    """What the data objects of a directory entry come to."""
    values = {node.tag: node.value for node in reversed(objects)}  # of a tag given twice the first counts
    indicator = int.from_bytes(values.get(Tag.PRIORITY_INDICATOR, b""), "big")
    return DirectoryEntry(
        adf_name=values.get(Tag.ADF_NAME, b""),
        label=values.get(Tag.APPLICATION_LABEL, b""),
        priority=indicator & 0x0F,
        confirm=bool(indicator & 0x80),
        kernel_identifier=values.get(Tag.KERNEL_IDENTIFIER, b""),
        extended_selection=values.get(Tag.EXTENDED_SELECTION, b""),
    )


def application(fci: bytes) -> tuple[Node, ...]:
    """Every primitive data object of a selected application's FCI (Book 1, 11.3.4). Raises `TlvError`."""
    return tuple(tlv.primitives([tlv.parse_one(fci, Tag.FCI_TEMPLATE)]))


def languages(preference: bytes) -> tuple[str, ...]:
    """The languages that a cardholder reads, best first: language preference 5F2D (Book 4, 11.1).

    Two letters each (ISO 639); what is none is left out.
    """
    pairs = (preference[at : at + 2].decode("ascii", errors="ignore").lower() for at in range(0, len(preference), 2))
    return tuple(dict.fromkeys(pair for pair in pairs if len(pair) == 2 and pair.isalpha()))[:LANGUAGES_MAX]


def tell_languages(card: Mapping[int, bytes], environment: Environment) -> None:
    """Let the screen know what the cardholder reads, once an application is selected (Book 4, 11.1)."""
    if preferred := languages(card.get(Tag.LANGUAGE_PREFERENCE, b"")):
        environment.reads(preferred)


def language(preferred: Sequence[str], spoken: Collection[str]) -> str | None:
    """The first that the terminal speaks, too. None: the terminal's own stays."""
    return next((each for each in preferred if each in spoken), None)


def label(card: Mapping[int, bytes], directory_label: bytes, additional_capabilities: bytes) -> str:
    """What to call the application on screen and receipt (Book 4, 11.3).

    The preferred name only if the terminal has its code table (9F40, bytes 4 and 5), else the label.
    """
    table = int.from_bytes(card.get(Tag.ISSUER_CODE_TABLE_INDEX, b""), "big")
    capabilities = int.from_bytes(additional_capabilities[3:5], "big")
    preferred = card.get(Tag.PREFERRED_NAME, b"")
    if preferred and 1 <= table <= 10 and capabilities >> (table - 1) & 1:
        return printable(preferred, f"iso8859_{table}")
    return printable(card.get(Tag.APPLICATION_LABEL) or directory_label)


def printable(text: bytes, encoding: str = "ascii") -> str:
    """A card's text without what is no text, short enough for a screen."""
    decoded = text[:LABEL_LENGTH_MAX].decode(encoding, errors="ignore")
    return "".join(character for character in decoded if character.isprintable()).strip()

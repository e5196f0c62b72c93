"""Application selection on contact (EMV 4.4 Book 1, 12): which of the card's applications this terminal can run.

The card's own directory (PSE) is asked first; a card without one, or whose directory holds nothing for us, is asked
for each of the terminal's AIDs. Which application to take is a question to whoever calls (`Choose`): a terminal that
can ask answers with its `Cardholder` (`asked_of`); one that cannot takes the best, and leaves out what the cardholder
would have to confirm (`without_confirmation`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from terminal.emv import tlv
from terminal.emv.apdu import Command, Exchange, Response, transceive
from terminal.emv.configuration import CONTACT, Activation, Combination, Indicators, Request, Setup
from terminal.emv.progress import Listed
from terminal.emv.records import SFI_EMV_MAX, CardFault, read_record
from terminal.emv.selection import DirectoryEntry, application, directory_entry, languages, printable, select
from terminal.emv.tags import Tag
from terminal.emv.tlv import Node, TlvError

Choose: TypeAlias = Callable[[Sequence["Candidate"]], "Candidate | None"]
Reads: TypeAlias = Callable[[Sequence[str]], None]

PSE: Final = b"1PAY.SYS.DDF01"
DIRECTORY_RECORDS_MAX: Final = 32  # a card has a handful of applications, a record holds several
OCCURRENCES_MAX: Final = 16  # applications under one AID: more than this is a card that never says "no more"
CANDIDATES_MAX: Final = 32  # each may cost a SELECT and a GET PROCESSING OPTIONS

_NEXT_OCCURRENCE: Final = 0x02  # P2 of SELECT
_NO_PRIORITY: Final = 16  # behind all of the nibble's
_SELECTED: Final = frozenset({0x90, 0x62, 0x63})  # SW1: selected, perhaps with a warning
_FUNCTION_NOT_SUPPORTED, _RECORD_NOT_FOUND, _FILE_INVALIDATED = 0x6A81, 0x6A83, 0x6283


@dataclass(frozen=True, slots=True)
class Candidate:
    """An application that card and terminal share. `priority`: 1 is best, 0 states none and comes last."""

    adf_name: bytes
    label: bytes
    priority: int
    confirm: bool
    combination: Combination

    @property
    def name(self) -> str:
        """What to call it on a screen."""
        return printable(self.label)

    def listed(self) -> Listed:
        return Listed(self.adf_name, self.label, self.priority, self.confirm, None)


def candidates(setup: Setup, request: Request, reads: Reads | None = None) -> Exchange[tuple[Candidate, ...]]:
    """The candidate list, best first (Book 1, 12.3 and 12.4).

    Equal priorities stand in the order in which they were met, and so do applications without one, which come last.
    `reads` is told the languages that the directory prefers, in time for a choice to be offered in one of them.
    Raises `CardFault`: card_blocked; application_blocked when nothing but blocked applications was found.
    """
    ours = [
        combination
        for combination in setup.combinations
        if combination.limits.transaction_types is None
        or request.transaction_type in combination.limits.transaction_types
    ]
    found = yield from _from_directory(ours, reads)
    if not found:
        found = yield from _from_aids(ours)

    return tuple(sorted(found, key=lambda candidate: candidate.priority or _NO_PRIORITY))


class Cardholder(Protocol):
    """Whoever answers for the card. May take its time: an inserted card waits."""

    def choose(self, offered: Sequence[Candidate]) -> Candidate | None:
        """One of several, best first. None: none of them."""

    def confirm(self, offered: Candidate) -> bool:
        """Whether this application may be used: it is the only one left, and its issuer wants that asked."""


def asked_of(cardholder: Cardholder) -> Choose:
    """What a terminal takes that can ask (Book 1, 12.4). Who has picked an application need not confirm it."""

    def choose(remaining: Sequence[Candidate]) -> Candidate | None:
        if len(remaining) > 1:
            return cardholder.choose(remaining)
        return next((each for each in remaining if not each.confirm or cardholder.confirm(each)), None)

    return choose


def without_confirmation(remaining: Sequence[Candidate]) -> Candidate | None:
    """The best candidate that needs nobody's consent: what a terminal takes that cannot ask."""
    return next((candidate for candidate in remaining if not candidate.confirm), None)


def activate(candidate: Candidate) -> Exchange[Activation | None]:
    """Final SELECT (Book 1, 12.4). None: drop this candidate. Raises `CardFault("card_blocked")`."""
    return activation(candidate, (yield from final_select(candidate)))


def final_select(candidate: Candidate) -> Exchange[Response]:
    """Final SELECT alone. Raises `CardFault("card_blocked")`."""
    return (yield from _select(select(candidate.adf_name)))


def is_blocked(response: Response) -> bool:
    """Whether SELECT found an application that its issuer has blocked (Book 1, 11.3.5)."""
    return response.sw == _FILE_INVALIDATED


def activation(candidate: Candidate, response: Response) -> Activation | None:
    """What final SELECT came to. None: drop this candidate."""
    entry = _fci_entry(response.data)
    if response.sw != 0x9000 or entry is None or entry.adf_name != candidate.adf_name:
        return None
    return Activation(candidate.combination, Indicators(), None, candidate.adf_name, candidate.label, response.data)


def _from_directory(ours: Sequence[Combination], reads: Reads | None) -> Exchange[list[Candidate]]:
    """PSE method (Book 1, 12.3.2). Whatever is wrong with a directory, the list of AIDs makes up for it."""
    response = yield from _select(select(PSE))
    sfi = _directory_sfi(response.data) if response.sw == 0x9000 else None
    if sfi is None:
        return []
    objects = {each.tag: each.value for each in application(response.data)}
    preferred = languages(objects.get(Tag.LANGUAGE_PREFERENCE, b""))
    if reads is not None and preferred:
        reads(preferred)
    found: list[Candidate] = []
    for number in range(1, DIRECTORY_RECORDS_MAX + 1):
        response = yield from transceive(read_record(sfi, number))
        if response.sw == _RECORD_NOT_FOUND:
            break
        if response.sw != 0x9000:
            return []
        for entry in _directory_entries(response.data):
            _add(found, entry, ours)
    return found


def _from_aids(ours: Sequence[Combination]) -> Exchange[list[Candidate]]:
    """List of AIDs method (Book 1, 12.3.3)."""
    found: list[Candidate] = []
    blocked = False
    for aid in dict.fromkeys(combination.aid for combination in ours):
        partial = any(combination.partial for combination in ours if combination.aid == aid)
        response = yield from _select(select(aid))
        for occurrence in range(OCCURRENCES_MAX):
            blocked = blocked or is_blocked(response)
            entry = _fci_entry(response.data) if response.sw >> 8 in _SELECTED else None
            if entry is None or not entry.adf_name.startswith(aid):
                break
            if entry.adf_name != aid and not partial:
                break  # another application than the one that was meant, which may have an entry of its own
            if response.sw == 0x9000:
                _add(found, entry, ours)
            if entry.adf_name == aid and occurrence == 0:
                break  # the very name that was asked for: nothing else is meant
            response = yield from transceive(select(aid)._replace(p2=_NEXT_OCCURRENCE))
    if blocked and not found:
        raise CardFault("application_blocked")
    return found


def _select(command: Command) -> Exchange[Response]:
    response = yield from transceive(command)
    if response.sw == _FUNCTION_NOT_SUPPORTED:
        raise CardFault("card_blocked")
    return response


def _add(found: list[Candidate], entry: DirectoryEntry, ours: Sequence[Combination]) -> None:
    """Take in an application that this terminal knows; a name that was listed twice counts once."""
    combination = _combination(ours, entry.adf_name)
    if combination is None or not entry.usable() or any(known.adf_name == entry.adf_name for known in found):
        return
    if len(found) < CANDIDATES_MAX:
        found.append(Candidate(entry.adf_name, entry.label, entry.priority, entry.confirm, combination))


def _combination(ours: Sequence[Combination], adf_name: bytes) -> Combination | None:
    """The settings that fit an application best: the longest AID, and one made for contact before a contactless one."""
    fitting = [each for each in ours if each.aid == adf_name or (each.partial and adf_name.startswith(each.aid))]
    return max(fitting, key=lambda each: (len(each.aid), each.kernel == CONTACT), default=None)


def _directory_sfi(fci: bytes) -> int | None:
    """Where the directory is, by the FCI of the PSE (Book 1, 11.3.4)."""
    try:
        proprietary = tlv.parse_one(fci, Tag.FCI_TEMPLATE).find(Tag.FCI_PROPRIETARY_TEMPLATE)
    except TlvError:
        return None
    node = proprietary.find(Tag.SFI) if proprietary else None
    return node.value[0] if node and len(node.value) == 1 and 1 <= node.value[0] <= SFI_EMV_MAX else None


def _directory_entries(record: bytes) -> list[DirectoryEntry]:
    """The applications in a directory record (Book 1, 12.2.3); one that cannot be read names none."""
    try:
        templates = tlv.parse_one(record, Tag.RECORD_TEMPLATE).children
    except TlvError:
        return []
    return [directory_entry(template.children) for template in templates if template.tag == Tag.APPLICATION_TEMPLATE]


def _fci_entry(fci: bytes) -> DirectoryEntry | None:
    """What the FCI of an application says of itself, as a directory would (Book 1, 11.3.4)."""
    try:
        template = tlv.parse_one(fci, Tag.FCI_TEMPLATE)
    except TlvError:
        return None
    name, proprietary = template.find(Tag.DF_NAME), template.find(Tag.FCI_PROPRIETARY_TEMPLATE)
    if name is None:
        return None
    return directory_entry((*(proprietary.children if proprietary else ()), Node(Tag.ADF_NAME, name.value)))

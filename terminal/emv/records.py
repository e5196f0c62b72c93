"""What a card has said so far, and the reading of its records (EMV 4.4 Book 3, 7 and 10.2).

`CardObjects` gathers data objects from FCI, GET PROCESSING OPTIONS and records under the two rules that hold for all of
them: no primitive data object twice, and nothing that is the terminal's or the issuer's to state. Which objects must be
there, and what they decide, is each kernel's affair. Inside a kernel a card that breaks the books raises `CardFault`;
the kernel turns that into its outcome.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from terminal.emv import tags, tlv
from terminal.emv.apdu import Command, Exchange, transceive
from terminal.emv.tags import DataObject, Source, Tag
from terminal.emv.tlv import Node, TlvError

RECORDS_MAX: Final = (
    128  # cards in use have under 20; an AFL may name 16,000, which would hold the terminal for minutes
)
SFI_MAX: Final = 30
SFI_EMV_MAX: Final = 10  # files 1 to 10 are EMV's own, their records must be templates 70


class CardFault(Exception):
    """The card broke the books; `reason` is the stable word that the outcome carries."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class CardObjects(dict[int, bytes]):
    """The data objects of one application, by tag. Shows their number only: most are card data."""

    def __init__(self, kernel: int | None = None) -> None:
        super().__init__()
        self._kernel = kernel

    def __repr__(self) -> str:
        return f"CardObjects({len(self)} data objects)"

    def receive(self, nodes: Iterable[Node]) -> None:
        """Take in every primitive data object. Raises `CardFault("duplicate_data")`."""
        for node in tlv.primitives(nodes):
            definition = tags.lookup(node.tag, self._kernel)
            if definition is not None and definition.source is not Source.CARD:
                continue  # a card that states the amount or the TVR is not believed
            if node.tag in self:
                raise CardFault("duplicate_data")
            self[node.tag] = node.value

    def require(self, *wanted: int) -> None:
        """Raises `CardFault("missing_data")` unless all are there and not empty."""
        if not all(self.get(tag) for tag in wanted):
            raise CardFault("missing_data")

    def check_lengths(self, wanted: Iterable[DataObject]) -> None:
        """Raises `CardFault("parse_error")` if one of these is there with a length that it cannot have."""
        for tag in wanted:
            if tag in self and not tag.length_min <= len(self[tag]) <= tag.length_max:
                raise CardFault("parse_error")


class AflEntry(NamedTuple):
    """Records `first` to `last` of file `sfi`; the first `authenticated` of them count as static data."""

    sfi: int
    first: int
    last: int
    authenticated: int


def afl_entries(afl: bytes) -> Iterator[AflEntry]:
    """Application File Locator (Book 3, 10.2). Raises `CardFault("parse_error")`: at once for one that is no list or
    too long, else at the entry that cannot be.
    """
    if (
        len(afl) % 4
        or sum(max(0, last - first + 1) for first, last in zip(afl[1::4], afl[2::4], strict=True)) > RECORDS_MAX
    ):
        raise CardFault("parse_error")
    for at in range(0, len(afl), 4):
        sfi_byte, first, last, authenticated = afl[at : at + 4]
        entry = AflEntry(sfi_byte >> 3, first, last, authenticated)
        if (
            sfi_byte & 0x07
            or not 1 <= entry.sfi <= SFI_MAX
            or not 1 <= first <= last
            or authenticated > last - first + 1
        ):
            raise CardFault("parse_error")
        yield entry


def read_record(sfi: int, number: int) -> Command:
    """READ RECORD (Book 3, 6.5.11)."""
    return Command(0x00, 0xB2, number, sfi << 3 | 0x04, le=0)


def read_records(afl: bytes, objects: CardObjects) -> Exchange[bytes | None]:
    """Read what the AFL names into `objects`; returns the static data to be authenticated (Book 3, 10.3).

    None stands for static data that cannot be authenticated, because a record in it is no template 70.
    Raises `CardFault` and `TlvError`.
    """
    static_data: bytes | None = b""
    for entry in afl_entries(afl):
        for number in range(entry.first, entry.last + 1):
            response = yield from transceive(read_record(entry.sfi, number))
            if response.sw != 0x9000:
                raise CardFault("card_error")
            template = _template(entry.sfi, response.data)
            if template is not None:
                objects.receive(template.children)
            if number - entry.first < entry.authenticated and static_data is not None:
                if template is None:
                    static_data = None
                else:
                    static_data += template.value if entry.sfi <= SFI_EMV_MAX else response.data
    return static_data


def _template(sfi: int, record: bytes) -> Node | None:
    try:
        return tlv.parse_one(record, Tag.RECORD_TEMPLATE)
    except TlvError:
        if sfi <= SFI_EMV_MAX:
            raise
        return None  # files above 10 are the scheme's or the issuer's: their records may be anything

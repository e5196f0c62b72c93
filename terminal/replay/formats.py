"""What stands in the files, as types: whatever does not fit is refused before anything runs, and its place is named.

The types are the only definition. The JSON Schemas beside this module are made from them (`schema`), and a test holds
the two together, so that a file that the schema accepts is a file that can be read, and the other way round. Byte
strings are upper-case hexadecimal, amounts integers in minor units.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from terminal.errors import TerminalError

FILE_BYTES_MAX: Final = 16 * 1024 * 1024  # a long conversation has a few hundred kilobytes
EXCHANGES_MAX: Final = 10_000  # no card is asked a tenth of that
LIST_MAX: Final = 4_096  # keys, revoked certificates, exceptions, log entries, numbers, answers
AIDS_MAX: Final = 256  # each may cost SELECT commands
DATA_BYTES_MAX: Final = 65_535

# "$" alone would let a line end pass.
_END: Final = r"$(?!\n)"


def _hex(shortest: int, longest: int) -> Meta:
    return Meta(pattern=rf"^([0-9A-F]{{2}}){{{shortest},{longest}}}{_END}")


Tag = Annotated[str, Meta(pattern=rf"^([0-9A-F]{{2}}){{1,3}}{_END}")]
Bytes = Annotated[str, Meta(pattern=rf"^([0-9A-F]{{2}})*{_END}", max_length=2 * DATA_BYTES_MAX)]
Command = Annotated[str, _hex(4, 261)]
StatusWord = Annotated[str, _hex(2, 2)]
Aid = Annotated[str, _hex(5, 16)]
Rid = Annotated[str, _hex(5, 5)]
Byte = Annotated[str, _hex(1, 1)]
Kernel = Annotated[str, Meta(pattern=rf"^[0-9A-F]{{1,6}}{_END}")]
Pan = Annotated[str, Meta(pattern=rf"^[0-9]{{8,19}}F?{_END}")]
Psn = Annotated[str, Meta(pattern=rf"^[0-9]{{2}}{_END}")] | Annotated[int, Meta(ge=0, le=99)]
Date6 = Annotated[str, Meta(pattern=rf"^[0-9]{{6}}{_END}")]
Moment = Annotated[
    str, Meta(pattern=rf"^[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}([T ][0-9:.]{{2,15}}(Z|[+-][0-9:]{{2,6}})?)?{_END}")
]
Date = Annotated[str, Meta(pattern=rf"^[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}{_END}")]
AmountMinor = Annotated[int, Meta(ge=0, le=999_999_999_999)]  # 12 digits, as 9F02
FloorMinor = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]  # four bytes, as 9F1B
Percent = Annotated[int, Meta(ge=0, le=99)]
Objects = dict[Tag, Bytes]

OutcomeName = Literal[
    "approved",
    "declined",
    "online_request",
    "try_again",
    "select_next",
    "try_another_interface",
    "end_application",
    "torn",
]


class UnusableFile(TerminalError):
    """A file that cannot be run; the message names the place and what would do."""

    exit_code = 2


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing but what is named."""


class Random(_Part, frozen=True, kw_only=True):
    """Random transaction selection."""

    threshold: AmountMinor
    target_percent: Percent
    max_target_percent: Percent


class Limits(_Part, frozen=True, kw_only=True):
    """What entry point and risk management weigh; without a key there is no such limit."""

    status_check: bool | None = None
    zero_amount_allowed: bool | None = None
    contactless_transaction: AmountMinor | None = None
    contactless_floor: AmountMinor | None = None
    terminal_floor: FloorMinor | None = None
    cvm_required: AmountMinor | None = None
    ttq: Annotated[str, _hex(4, 4)] | None = None
    extended_selection: bool | None = None
    transaction_types: Annotated[list[Byte], Meta(max_length=256)] | None = None
    random: Random | None = None


class Application(_Part, frozen=True, kw_only=True):
    """An AID that the terminal takes, and its settings."""

    aid: Aid
    partial: bool = True
    kernel: Kernel | None = None
    tags: Objects = {}
    limits: Limits = Limits()


class CaPublicKey(_Part, frozen=True, kw_only=True):
    """A CA public key; a checksum that is there must be right."""

    rid: Rid
    index: Byte
    modulus: Annotated[str, _hex(1, 256)]
    exponent: Annotated[str, _hex(1, 3)]
    checksum: Annotated[str, _hex(20, 20)] | None = None


class Revoked(_Part, frozen=True, kw_only=True):
    """An issuer certificate that was withdrawn."""

    rid: Rid
    index: Byte
    serial: Annotated[str, _hex(3, 3)]


class ExceptionCard(_Part, frozen=True, kw_only=True):
    """A card on the exception file, with one sequence number or with any."""

    pan: Pan
    psn: Psn | None = None


class LogEntry(_Part, frozen=True, kw_only=True):
    """What a card paid here before."""

    pan: Pan
    psn: Psn | None = None
    date: Date6
    amount: AmountMinor


class Host(_Part, frozen=True, kw_only=True):
    """The host's answer."""

    response_code: Annotated[str, _hex(2, 2)] = msgspec.field(name="8A")
    authentication_data: Bytes | None = msgspec.field(name="91", default=None)
    scripts_before: Annotated[list[Bytes], Meta(max_length=64)] | None = msgspec.field(name="71", default=None)
    scripts_after: Annotated[list[Bytes], Meta(max_length=64)] | None = msgspec.field(name="72", default=None)


class Exchange(_Part, frozen=True, kw_only=True):
    """A command and its response; null is a card that vanishes there."""

    command: Command
    response: Bytes | None
    elapsed_us: Annotated[int, Meta(ge=0)] | None = None


class Ui(_Part, frozen=True, kw_only=True):
    """A user interface request."""

    message: Annotated[int, Meta(ge=0, le=255)]
    status: Annotated[int, Meta(ge=0, le=255)] = 255
    hold_ms: Annotated[int, Meta(ge=0)] = 0
    language: str | None = None
    value: Any = None


class KernelOutcome(_Part, frozen=True, kw_only=True):
    """What a kernel is taken to have said."""

    outcome: OutcomeName
    start: Literal["A", "B", "C", "D"] | None = None
    ui: Annotated[list[Ui], Meta(max_length=64)] = []
    ui_on_restart: Ui | None = None


class ReplayFile(_Part, frozen=True, kw_only=True):
    """A conversation and all that it depends on."""

    interface: Literal["contact", "contactless"]
    terminal: Objects = {}
    transaction: Objects = {}
    aids: Annotated[list[Application], Meta(max_length=AIDS_MAX)] = []
    capks: Annotated[list[CaPublicKey], Meta(max_length=LIST_MAX)] = []
    revoked: Annotated[list[Revoked], Meta(max_length=LIST_MAX)] = []
    exceptions: Annotated[list[ExceptionCard], Meta(max_length=LIST_MAX)] = []
    log: Annotated[list[LogEntry], Meta(max_length=LIST_MAX)] = []
    unpredictable_numbers: Annotated[list[Annotated[str, _hex(4, 4)]], Meta(max_length=LIST_MAX)] = []
    random: Annotated[list[Annotated[int, Meta(ge=1, le=99)]], Meta(max_length=LIST_MAX)] | None = None
    clock: Moment | None = None
    choices: Annotated[list[bool | Aid], Meta(max_length=LIST_MAX)] | None = None
    host: Host | UnsetType | None = UNSET
    exchanges: Annotated[list[Exchange], Meta(max_length=EXCHANGES_MAX)]
    unknown_command: StatusWord = "6D00"
    order: Literal["strict", "any"] = "strict"
    until: Literal["candidate_list", "selection", "initiation", "records", "authentication"] | None = None
    kernel_outcomes: Annotated[list[KernelOutcome], Meta(max_length=LIST_MAX)] | None = None
    masked: bool = False


class OdaFile(_Part, frozen=True, kw_only=True):
    """Offline data authentication alone."""

    method: Literal["sda", "dda", "cda", "fdda"]
    date: Date
    capks: Annotated[list[CaPublicKey], Meta(max_length=LIST_MAX)]
    revoked: Annotated[list[Revoked], Meta(max_length=LIST_MAX)] = []
    card: Objects
    static_data: Bytes = ""
    dynamic_data: Bytes = ""
    transaction_data: Bytes = ""
    unpredictable_number: Annotated[str, _hex(4, 4)] | None = None


class RiskFile(_Part, frozen=True, kw_only=True):
    """One step of what the terminal finds out, alone."""

    step: Literal["processing_restrictions", "cardholder_verification", "risk_management", "action_analysis"]
    terminal: Objects = {}
    transaction: Objects = {}
    card: Objects = {}
    limits: Limits = Limits()
    tvr: Annotated[str, _hex(5, 5)] = "0000000000"
    log: Annotated[list[LogEntry], Meta(max_length=LIST_MAX)] = []
    exceptions: Annotated[list[ExceptionCard], Meta(max_length=LIST_MAX)] = []
    random: Annotated[list[Annotated[int, Meta(ge=1, le=99)]], Meta(max_length=LIST_MAX)] | None = None
    exchanges: Annotated[list[Exchange], Meta(max_length=EXCHANGES_MAX)] = []


File = TypeVar("File", ReplayFile, OdaFile, RiskFile)
SCHEMAS: Final = {"replay": ReplayFile, "oda": OdaFile, "risk": RiskFile}


def load(path: Path, kind: type[File]) -> File:
    """Read a file. Raises `UnusableFile`, and `OSError` for one that cannot be read at all."""
    with path.open("rb") as stream:
        data = stream.read(FILE_BYTES_MAX + 1)
    return decode(data, kind, str(path))


def decode(data: bytes, kind: type[File], name: str) -> File:
    """The same, from bytes; `name` is for messages. Raises `UnusableFile`."""
    if len(data) > FILE_BYTES_MAX:
        raise UnusableFile(f"{name}: longer than {FILE_BYTES_MAX} bytes; nothing was run. No conversation is so long.")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnusableFile(f"{name}: {error}. Nothing was run; correct the file.") from error


def encode(file: ReplayFile) -> bytes:
    """A file's text, one exchange to a line or more, for people to read and compare."""
    return msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n"


def schema(name: str) -> str:
    """The JSON Schema of a kind of file, as it is published."""
    made = msgspec.json.schema(SCHEMAS[name])
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"payterm {name} file"}
    return json.dumps(head | made, indent=1) + "\n"


def schema_path(name: str) -> Path:
    """Where it is published."""
    return Path(__file__).with_name(f"{name}.schema.json")

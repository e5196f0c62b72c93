"""What the value of each data object says, in words.

A `Meaning` is one line of text and, for what has parts, lines below it. A value that does not fit its definition gets
no meaning but what is wrong with it: guessing would mislead whoever looks for the error.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from terminal.emv import dol
from terminal.emv.describe import apdus, bits
from terminal.emv.describe.iso import COUNTRIES, CURRENCIES, LANGUAGES
from terminal.emv.describe.names import COMMON, KERNEL_2, KERNEL_3, WITHIN, Name
from terminal.emv.tags import DataObject, Format, lookup
from terminal.emv.tlv import TlvError, read_tag

Line = tuple[str, str]  # where it stands in the value, what it says


class Meaning(NamedTuple):
    """What a value says: in a line, and in its parts."""

    text: str = ""
    lines: tuple[Line, ...] = ()


class Unfit(ValueError):
    """A value that is not what its definition says."""


@dataclass(frozen=True, slots=True)
class Context:
    """What has to be known to read a value: the kernel (None: not known), the currency, and the lists seen so far."""

    kernel: int | None = None
    currency: int | None = None  # 5F2A
    card_currency: int | None = None  # 9F42
    parent: int | None = None
    lists: Mapping[int, bytes] = field(default_factory=dict)


def kernel_of(tag: int, length: int, context: Context) -> int | None:
    """Whose meaning of `tag` applies: the one kernel's that has it, the context's, or the one that the length fits."""
    owners = [kernel for kernel, table in ((3, KERNEL_3), (2, KERNEL_2)) if tag in table]
    if not owners or context.kernel in owners or (context.kernel is not None and tag in COMMON):
        return context.kernel
    fitting = [
        kernel
        for kernel in owners
        if (known := lookup(tag, kernel)) is not None and known.length_min <= length <= known.length_max
    ]
    return (fitting or owners)[0]


def definition(tag: int, length: int, context: Context) -> tuple[Name | None, DataObject | None]:
    """Name and format of a tag, as it is meant here."""
    within = WITHIN.get(context.parent or 0, {}).get(tag)
    if within:
        return within, None
    kernel = kernel_of(tag, length, context)
    own = KERNEL_2 if kernel == 2 else KERNEL_3 if kernel == 3 else {}
    return own.get(tag) or COMMON.get(tag), lookup(tag, kernel)


def tag_name(tag: int, length: int, context: Context) -> str:
    name, _ = definition(tag, length, context)
    return name.name if name else "unknown"


# Formats


def _digits(value: bytes) -> str:
    text = value.hex().upper()
    if not text.isdecimal():
        raise Unfit("has a digit that is none")
    return text


def _number(value: bytes) -> int:
    return int(_digits(value)) if value else 0


def _text(value: bytes) -> str:
    text = value.decode("latin-1")
    if not text.isprintable():
        raise Unfit("has a character that cannot be printed")
    return text.rstrip()


def _plain(value: bytes) -> str:
    return value.hex().upper()


def _length(value: bytes, *wanted: int) -> None:
    if len(value) not in wanted:
        raise Unfit(f"has {len(value)} bytes, not {' or '.join(map(str, wanted))}")


Renderer = Callable[[bytes, Context], Meaning]


def amount(minor: int, number: int | None) -> str:
    """An amount in its currency as far as that is known."""
    known = CURRENCIES.get(number or 0)
    if known is None:
        return f"{minor} minor units"
    if not known.exponent:
        return f"{minor} {known.code}"
    major, rest = divmod(minor, 10**known.exponent)
    return f"{major}.{rest:0{known.exponent}d} {known.code}"


def _amount_n(value: bytes, context: Context) -> Meaning:
    _length(value, 6)
    return Meaning(amount(_number(value), context.currency))


def _amount_card(value: bytes, context: Context) -> Meaning:
    return Meaning(amount(_number(value), context.card_currency or context.currency))


def _amount_b(value: bytes, context: Context) -> Meaning:
    _length(value, 4)
    return Meaning(amount(int.from_bytes(value, "big"), context.currency))


def currency_name(value: bytes, _: Context) -> Meaning:
    _length(value, 2)
    known = CURRENCIES.get(_number(value))
    return Meaning(known.code if known else "no currency of ISO 4217")


def _currencies(value: bytes, _: Context) -> Meaning:
    numbers = [_number(value[at : at + 2]) for at in range(0, len(value), 2)]
    return Meaning(
        ", ".join(CURRENCIES[number].code if number in CURRENCIES else f"{number:03d}" for number in numbers)
    )


def _country(value: bytes, _: Context) -> Meaning:
    _length(value, 2)
    return Meaning(COUNTRIES.get(_number(value), "no country of ISO 3166-1"))


def date(value: bytes, _: Context) -> Meaning:
    _length(value, 3)
    digits = _digits(value)
    year = int(digits[:2])
    try:
        found = datetime.date(year + (2000 if year < 50 else 1900), int(digits[2:4]), int(digits[4:]))  # Book 4, 6.7.3
    except ValueError as error:
        raise Unfit("is no date") from error
    return Meaning(found.isoformat())


def _time(value: bytes, _: Context) -> Meaning:
    _length(value, 3)
    digits = _digits(value)
    try:
        found = datetime.time(int(digits[:2]), int(digits[2:4]), int(digits[4:]))
    except ValueError as error:
        raise Unfit("is no time") from error
    return Meaning(found.isoformat())


def _count(value: bytes, _: Context) -> Meaning:
    return Meaning(str(int.from_bytes(value, "big")))


def _as_text(value: bytes, _: Context) -> Meaning:
    return Meaning(f'"{_text(value)}"')


def _words(table: Mapping[int, str], otherwise: str = "reserved") -> Renderer:
    def render(value: bytes, _: Context) -> Meaning:
        _length(value, 1)
        return Meaning(table.get(value[0], otherwise))

    return render


def _bits(layout: bits.Layout) -> Renderer:
    def render(value: bytes, _: Context) -> Meaning:
        if not value or len(value) > layout.size:
            raise Unfit(f"has {len(value)} bytes, not {layout.size}")
        said = tuple(bits.read(layout, value))
        return Meaning("" if said else "no bit is set", said)

    return render


def _hundred_ms(value: bytes, _: Context) -> Meaning:
    return Meaning(f"{_number(value) * 100} ms")


def _tenth_ms(value: bytes, _: Context) -> Meaning:
    return Meaning(f"{int.from_bytes(value, 'big') / 10:g} ms")


# Selection

RIDS: Final = {
    "A000000003": "Visa",
    "A000000004": "Mastercard",
    "A000000025": "American Express",
    "A000000029": "Link",
    "A000000042": "Cartes Bancaires",
    "A000000065": "JCB",
    "A000000098": "Visa USA",
    "A000000121": "Dankort",
    "A000000141": "PagoBancomat",
    "A000000152": "Discover",
    "A000000277": "Interac",
    "A000000324": "Discover ZIP",
    "A000000333": "UnionPay",
    "A000000359": "girocard",
    "A000000384": "eftpos Australia",
    "A000000524": "RuPay",
    "A000000658": "Mir",
}
_AIDS: Final = {
    "A0000000031010": "Visa credit or debit",
    "A0000000032010": "Visa Electron",
    "A0000000033010": "Visa Interlink",
    "A0000000038010": "Visa Plus",
    "A0000000041010": "Mastercard credit or debit",
    "A0000000042203": "Mastercard US Maestro",
    "A0000000043060": "Maestro",
    "A0000000046000": "Cirrus",
    "A0000000980840": "Visa US common debit",
    "A000000025010": "American Express",
    "A0000001523010": "Discover",
    "A000000333010101": "UnionPay debit",
    "A000000333010102": "UnionPay credit",
    "A0000003591010028001": "girocard",
}
KERNELS: Final = {2: "Mastercard", 3: "Visa", 4: "American Express", 5: "JCB", 6: "Discover", 7: "UnionPay"}


def aid_name(value: bytes) -> str:
    text = _plain(value)
    known = max((aid for aid in _AIDS if text.startswith(aid)), key=len, default="")
    return _AIDS[known] if known else RIDS.get(text[:10], "")


def _aid(value: bytes, _: Context) -> Meaning:
    if value in {b"1PAY.SYS.DDF01", b"2PAY.SYS.DDF01"}:
        return Meaning(f'"{_text(value)}", the {"PSE" if value[0] == 0x31 else "PPSE"}')
    if not 5 <= len(value) <= 16:
        raise Unfit(f"has {len(value)} bytes, not 5 to 16")
    return Meaning(aid_name(value))


def _priority(value: bytes, _: Context) -> Meaning:
    _length(value, 1)
    rank = value[0] & 0x0F
    confirm = "; the cardholder must confirm" if value[0] & 0x80 else ""
    return Meaning((f"rank {rank}" if rank else "no rank") + confirm)


def _sfi(value: bytes, _: Context) -> Meaning:
    _length(value, 1)
    return Meaning(f"SFI {value[0]}" if 1 <= value[0] <= 30 else "no SFI")


def _languages(value: bytes, _: Context) -> Meaning:
    text = _text(value)
    if len(text) % 2 or not 2 <= len(text) <= 8:
        raise Unfit("is no list of two-letter codes")
    codes = [text[at : at + 2].lower() for at in range(0, len(text), 2)]
    return Meaning(", ".join(LANGUAGES.get(code, code) for code in codes))


def _code_table(value: bytes, _: Context) -> Meaning:
    _length(value, 1)
    number = _number(value)
    return Meaning(f"ISO/IEC 8859-{number}" if 1 <= number <= 10 else "reserved")


def _kernel_identifier(value: bytes, _: Context) -> Meaning:
    if not value:
        return Meaning("by the AID's RID")
    kind, number = value[0] >> 6, value[0] & 0x3F
    if kind < 2:
        return Meaning(
            f"kernel {value[0]}" + (f", {KERNELS[number]}" if number in KERNELS else "") if number else "by the RID"
        )
    where = "international" if kind == 2 else "domestic"
    if len(value) < 3:
        raise Unfit("is too short for a domestic kernel identifier")
    return Meaning(f"{where} kernel {_plain(value[:3])}")


def _log_entry(value: bytes, _: Context) -> Meaning:
    _length(value, 2)
    return Meaning(f"SFI {value[0]}, {value[1]} records")


def _registered_data(value: bytes, _: Context) -> Meaning:
    lines, at = [], 0
    while at < len(value):
        if at + 3 > len(value) or at + 3 + value[at + 2] > len(value):
            raise Unfit("is cut short")
        end = at + 3 + value[at + 2]
        lines.append((f"id {_plain(value[at : at + 2])}", _plain(value[at + 3 : end])))
        at = end
    return Meaning("", tuple(lines))


# Application


def afl(value: bytes, _: Context) -> Meaning:
    if not value or len(value) % 4:
        raise Unfit("is no multiple of 4 bytes")
    lines = []
    for at in range(0, len(value), 4):
        sfi, first, last, signed = value[at : at + 4]
        if sfi & 7 or not 1 <= sfi >> 3 <= 30 or not 1 <= first <= last or signed > last - first + 1:
            raise Unfit(f"has a wrong entry {at // 4 + 1}")
        which = f"record {first}" if first == last else f"records {first} to {last}"
        authenticated = ""
        if signed:
            all_ = signed == last - first + 1
            authenticated = (
                "; signed" if all_ else f"; the first {signed} signed" if signed > 1 else "; the first signed"
            )
        lines.append((f"entry {at // 4 + 1}", f"SFI {sfi >> 3}, {which}{authenticated}"))
    return Meaning("", tuple(lines))


def _tag_list(value: bytes, context: Context) -> Meaning:
    lines, at = [], 0
    while at < len(value):
        try:
            tag, end = read_tag(value, at)
        except TlvError as error:
            raise Unfit(f"is no list of tags: {error}") from error
        lines.append((_plain(value[at:end]), tag_name(tag, 0, context)))
        at = end
    return Meaning("" if lines else "empty", tuple(lines))


def dol_lines(value: bytes, context: Context) -> Meaning:
    try:
        entries = tuple(dol.entries(value))
    except TlvError as error:
        raise Unfit(f"is no data object list: {error}") from error
    lines = tuple(
        (
            f"{entry.tag:X}",
            f"{tag_name(entry.tag, entry.length, context)}, {entry.length} byte{'s' * (entry.length != 1)}",
        )
        for entry in entries
    )
    return Meaning(f"{sum(entry.length for entry in entries)} bytes in all", lines)


def cvm_rule(code: int) -> str:
    method = bits.CVM_METHODS.get(code & 0x3F)
    if method is None:
        method = (
            "reserved for the issuer"
            if code & 0x30 == 0x30
            else "reserved for the payment system"
            if code & 0x20
            else "reserved"
        )
    return method


def _cvm_list(value: bytes, context: Context) -> Meaning:
    if len(value) < 8 or len(value) % 2:
        raise Unfit("is no X, Y and rules of 2 bytes")
    own = context.card_currency
    x, y = (amount(int.from_bytes(part, "big"), own) for part in (value[:4], value[4:8]))
    lines = [("X", x), ("Y", y)]
    for number, at in enumerate(range(8, len(value), 2), 1):
        code, condition = value[at], value[at + 1]
        when = bits.CVM_CONDITIONS.get(condition, f"if condition {condition:02X}")
        after = "else the next rule" if code & 0x40 else "else fail"
        lines.append(
            (f"rule {number}", f"{cvm_rule(code)}, {when}" + ("" if code & 0x3F in {0x00, 0x1F} else f"; {after}"))
        )
    return Meaning("" if len(value) > 8 else "no rules", tuple(lines))


def _cvm_results(value: bytes, _: Context) -> Meaning:
    _length(value, 3)
    result = {0: "unknown (signature, online PIN)", 1: "failed", 2: "successful"}.get(value[2], "reserved")
    when = bits.CVM_CONDITIONS.get(value[1], f"condition {value[1]:02X}")
    if value[0] == 0x3F:
        return Meaning(f"{cvm_rule(value[0])}; {result}")
    return Meaning("", (("byte 1", cvm_rule(value[0])), ("byte 2", when), ("byte 3", result)))


def _aip(value: bytes, context: Context) -> Meaning:
    return _bits(bits.AIP.get(context.kernel, bits.AIP[None]))(value, context)


def _tvr(value: bytes, context: Context) -> Meaning:
    _length(value, 5)
    return _bits(bits.TVR.get(context.kernel, bits.TVR[0 if context.kernel == 3 else None]))(value, context)


def _service_code(value: bytes, _: Context) -> Meaning:
    _length(value, 2)
    return Meaning(service_code(_digits(value)[1:]))


def service_code(digits: str) -> str:
    """ISO/IEC 7813: interchange, authorisation, and what is allowed."""
    area = {
        "1": "international",
        "2": "international, chip",
        "5": "national",
        "6": "national, chip",
        "7": "private",
        "9": "test",
    }
    processing = {
        "0": "normal authorisation",
        "2": "by the issuer online",
        "4": "by the issuer online unless agreed otherwise",
    }
    services = {
        "0": "no restrictions, PIN required",
        "1": "no restrictions",
        "2": "goods and services only",
        "3": "ATM only, PIN required",
        "4": "cash only",
        "5": "goods and services only, PIN required",
        "6": "no restrictions, PIN where feasible",
        "7": "goods and services only, PIN where feasible",
    }
    parts = (area.get(digits[0]), processing.get(digits[1]), services.get(digits[2]))
    return f"{digits}: " + "; ".join(part or "reserved" for part in parts)


def track_2_parts(value: bytes, _: Context) -> Meaning:
    """Expiry and service code: what of track 2 may be said."""
    digits = value.hex().upper().rstrip("F")
    pan, separator, rest = digits.partition("D")
    if not separator or not pan.isdecimal() or len(rest) < 7 or not rest.isdecimal():
        raise Unfit("is no track 2 data")
    return Meaning(
        "",
        (
            ("PAN", f"{len(pan)} digits, ends in {pan[-4:]}"),
            ("expiry", f"20{rest[:2]}-{rest[2:4]}"),
            ("service code", service_code(rest[4:7])),
        ),
    )


def _pan(value: bytes, _: Context) -> Meaning:
    digits = value.hex().upper().rstrip("F")
    if not digits.isdecimal() or not 8 <= len(digits) <= 19:
        raise Unfit("is no PAN")
    return Meaning(f"{len(digits)} digits, ends in {digits[-4:]}")


# Transaction

TRANSACTION_TYPES: Final = {
    0x00: "purchase of goods or services",
    0x01: "cash advance",
    0x09: "purchase with cashback",
    0x17: "cash disbursement",
    0x20: "refund",
    0x21: "deposit",
    0x30: "balance inquiry",
    0x31: "available funds inquiry",
}
_TERMINAL_TYPES: Final = {
    10 * owner + unit: f"{who}; {'attended' if unit <= 3 else 'unattended'}; {how}"
    for owner, who in ((1, "of a financial institution"), (2, "of a merchant"), (3, "of the cardholder"))
    for unit, how in zip(
        range(1, 7), ("online only", "offline with online capability", "offline only") * 2, strict=True
    )
}
_ENTRY_MODES: Final = {
    0x00: "unspecified",
    0x01: "manual key entry",
    0x02: "magnetic stripe",
    0x03: "bar code",
    0x04: "optical character reader",
    0x05: "chip, inserted",
    0x07: "contactless, chip data",
    0x10: "credential on file",
    0x80: "magnetic stripe after the chip failed",
    0x90: "magnetic stripe, read whole",
    0x91: "contactless, magnetic stripe data",
    0x95: "chip, inserted; card verification data unreliable",
}
_ARCS: Final = {
    "00": "approved",
    "10": "approved for a part of the amount",
    "11": "approved, VIP",
    "01": "refer to the card issuer",
    "02": "refer to the card issuer, special conditions",
    "05": "declined",
    "51": "declined: insufficient funds",
    "54": "declined: expired card",
    "55": "declined: wrong PIN",
    "65": "declined: strong authentication wanted, insert the card",
    "Y1": "approved offline",
    "Z1": "declined offline",
    "Y2": "approved after card-initiated referral",
    "Z2": "declined after card-initiated referral",
    "Y3": "unable to go online, approved offline",
    "Z3": "unable to go online, declined offline",
}


_CATEGORIES: Final = {
    ord("A"): "vehicle rental", ord("C"): "cash disbursement", ord("F"): "restaurant", ord("H"): "hotel",
    ord("O"): "college or hospital", ord("P"): "payment", ord("R"): "retail", ord("T"): "mail or telephone order",
    ord("U"): "unique", ord("X"): "transport", ord("Z"): "cash at an ATM",
}  # fmt: skip


def _terminal_type(value: bytes, _: Context) -> Meaning:
    _length(value, 1)
    return Meaning(_TERMINAL_TYPES.get(_number(value), "reserved"))


def _arc(value: bytes, _: Context) -> Meaning:
    _length(value, 2)
    text = _text(value)
    return Meaning(f'"{text}"' + (f": {_ARCS[text]}" if text in _ARCS else ""))


def _issuer_authentication(value: bytes, context: Context) -> Meaning:
    if not 8 <= len(value) <= 16:
        raise Unfit(f"has {len(value)} bytes, not 8 to 16")
    tail = value[8:]
    if len(value) == 10 and tail.isalnum() and tail.isascii():
        return Meaning("", (("ARPC", _plain(value[:8])), ("ARC", _arc(tail, context).text)))
    if len(value) == 8 or context.kernel == 3:
        said = tuple((f"CSU {where}", text) for where, text in bits.read(bits.CSU, value[4:8]))
        tries = ("PIN tries", str(value[4] & 0x0F))
        return Meaning(
            "ARPC method 2, if it is that",
            (("ARPC", _plain(value[:4])), ("CSU", _plain(value[4:8])), *_without_reserved(said), tries),
        )
    return Meaning("", (("ARPC", _plain(value[:8])), ("rest", _plain(tail))))


def _without_reserved(lines: tuple[Line, ...]) -> tuple[Line, ...]:
    return tuple(line for line in lines if not line[1].startswith("reserved"))


def _iad(value: bytes, context: Context) -> Meaning:
    """The formats that are published: Visa 0/1/3 and 2/4, M/Chip, and Common Core."""
    if len(value) == 32 and value[0] == 0x0F and value[16] == 0x0F:
        lines: list[Line] = [
            ("CCI", _plain(value[1:2])),
            ("DKI", _plain(value[2:3])),
            ("CVR", _plain(value[3:8])),
            ("counters", _plain(value[8:16])),
        ]
        return Meaning("Common Core Definitions", tuple(lines))
    if len(value) >= 7 and value[0] == 6 and value[3] == 3 and context.kernel != 2:
        cvr = value[4:7]
        lines = [("DKI", _plain(value[1:2])), ("CVN", f"{value[2]:02X}: CVN {value[2]}"), ("CVR", _plain(value[3:7]))]
        lines += _cvr(bits.VISA_CVR, bytes((cvr[0], cvr[1], cvr[2] & 0x0F)), 2)
        lines.append(("CVR byte 4", f"{cvr[2] >> 4} issuer script commands received"))
        issuers_own = value[8:] if len(value) > 7 and value[7] == len(value) - 8 else value[7:]
        if issuers_own:
            lines.append(("discretionary", _plain(issuers_own)))
        return Meaning("Visa, format 0, 1 or 3", tuple(lines))
    if len(value) == 32 and value[0] == 0x1F:
        lines = [
            ("CVN", f"{value[1]:02X}: CVN {value[1]}"),
            ("DKI", _plain(value[2:3])),
            ("CVR", _plain(value[3:8])),
            ("discretionary", _plain(value[8:])),
        ]
        return Meaning("Visa, format 2 or 4", tuple(lines))
    if len(value) in {18, 20, 26, 28} and context.kernel != 3:
        cvn, cvr = value[1], value[2:8]
        key = {0x00: "session key: Mastercard SKD", 0x04: "session key: EMV CSK"}.get(cvn & 0x0E, "session key: other")
        counters = "; counters in the cryptogram" if cvn & 1 else ""
        lines = [("DKI", _plain(value[:1])), ("CVN", f"{cvn:02X}: {key}{counters}"), ("CVR", _plain(cvr))]
        lines += _cvr(bits.MCHIP_CVR, cvr[:2] + b"\x00" + cvr[3:5] + b"\x00", 1)
        lines.append(("CVR byte 3", f"{cvr[2] >> 4} script commands, {cvr[2] & 0x0F} PIN tries left"))
        lines.append(("DAC or ICC number", _plain(value[8:10])))
        lines.append(("counters", _plain(value[10:])))
        return Meaning("M/Chip", tuple(lines))
    return Meaning("format not known")


def _cvr(layout: bits.Layout, value: bytes, first_byte: int) -> list[Line]:
    """Bits of a CVR, its bytes counted from `first_byte`."""
    found = []
    for where, text in bits.read(layout, value):
        number, _, rest = where.removeprefix("byte ").partition(" ")
        found.append((f"CVR byte {int(number) + first_byte - 1} {rest}", text))
    return found


def _script_command(value: bytes, _: Context) -> Meaning:
    try:
        parts = apdus.command_parts(value)
    except TlvError as error:
        raise Unfit(f"is no command: {error}") from error
    lines = [("command", parts.name or "unknown"), ("header", _plain(value[:4]))]
    said = apdus.parameters(parts.name, value) if parts.name else ""
    return Meaning("", (*lines, ("", said)) if said else tuple(lines))


def _script_results(value: bytes, _: Context) -> Meaning:
    if not value or len(value) % 5:
        raise Unfit("is no multiple of 5 bytes")
    lines = []
    for at in range(0, len(value), 5):
        what = ("not performed", "failed", "successful")[value[at] >> 4] if value[at] >> 4 < 3 else "reserved"
        command = value[at] & 0x0F
        which = (
            f" at command {command}{' or later' if command == 15 else ''}" if value[at] >> 4 == 1 and command else ""
        )
        lines.append((f"script {_plain(value[at + 1 : at + 5])}", what + which))
    return Meaning("", tuple(lines))


# Kernel 2 and kernel 3


def _third_party(value: bytes, context: Context) -> Meaning:
    if not 5 <= len(value) <= 32:
        raise Unfit(f"has {len(value)} bytes, not 5 to 32")
    lines = [("country", _country(value[:2], context).text), ("unique identifier", _plain(value[2:4]))]
    rest = value[4:]
    if not value[2] & 0x80 and len(rest) >= 2:
        device = {
            "00": "card",
            "01": "mobile phone",
            "02": "key fob",
            "03": "watch",
            "04": "mobile tag",
            "05": "wristband",
        }
        text = rest[:2].decode("latin-1")
        lines.append(("device type", device.get(text, "reserved") if text.isdecimal() else "reserved"))
        rest = rest[2:]
    lines.append(("proprietary", _plain(rest)))
    return Meaning("", tuple(lines))


def _form_factor(value: bytes, context: Context) -> Meaning:
    _length(value, 4)
    return _bits(bits.LAYOUTS_KERNEL_3[0x9F6E])(value, context)


def _authentication_data(value: bytes, context: Context) -> Meaning:
    if not 5 <= len(value) <= 16:
        raise Unfit(f"has {len(value)} bytes, not 5 to 16")
    lines = [("version", str(value[0])), ("card's UN", _plain(value[1:5]))]
    if len(value) >= 7:
        lines.append(("CTQ", _plain(value[5:7])))
        lines += [(f"CTQ {where}", text) for where, text in bits.read(bits.LAYOUTS_KERNEL_3[0x9F6C], value[5:7])]
    if len(value) > 7:
        lines.append(("rest", _plain(value[7:])))
    return Meaning("", tuple(lines))


_OUTCOMES: Final = {
    1: "approved", 2: "declined", 3: "online request", 4: "end application", 5: "select next",
    6: "try another interface", 7: "try again", 15: "not available",
}  # fmt: skip
_CVM_OUTCOMES: Final = {
    0: "no CVM",
    1: "signature",
    2: "online PIN",
    3: "confirmation code verified",
    15: "not available",
}
_STARTS: Final = {0: "A", 1: "B", 2: "C", 3: "D", 15: "not available"}


def _outcome(value: bytes, _: Context) -> Meaning:
    _length(value, 8)
    lines = [
        ("byte 1", _OUTCOMES.get(value[0] >> 4, "reserved")),
        ("byte 2", f"start: {_STARTS.get(value[1] >> 4, 'reserved')}"),
        ("byte 4", f"CVM: {_CVM_OUTCOMES.get(value[3] >> 4, 'reserved')}"),
    ]
    flags = ("UI request on outcome", "UI request on restart", "data record", "discretionary data", "receipt")
    lines += [(f"byte 5 bit {8 - place}", flag) for place, flag in enumerate(flags) if value[4] >> (7 - place) & 1]
    if value[6] != 0xFF:
        lines.append(("byte 7", f"field off for {value[6] * 100} ms"))
    lines.append(("byte 8", f"removal timeout {value[7] * 100} ms"))
    return Meaning("", tuple(lines))


MESSAGES: Final = {
    0x03: "approved", 0x07: "declined", 0x09: "please enter your PIN", 0x0F: "processing error",
    0x10: "please remove card",
    0x14: "welcome", 0x15: "present card", 0x16: "processing", 0x17: "card read OK", 0x18: "insert or swipe card",
    0x19: "present one card only", 0x1A: "approved, please sign", 0x1B: "authorising, please wait",
    0x1C: "insert, swipe or try another card", 0x1D: "please insert card", 0x1E: "clear display", 0x20: "see phone",
    0x21: "present card again", 0xFF: "not available",
}  # fmt: skip
_STATUSES: Final = {
    0: "not ready", 1: "idle", 2: "ready to read", 3: "processing", 4: "card read successfully", 5: "processing error",
    0xFF: "not available",
}  # fmt: skip


def _user_interface(value: bytes, context: Context) -> Meaning:
    _length(value, 22)
    lines = [
        ("message", MESSAGES.get(value[0], "reserved")),
        ("status", _STATUSES.get(value[1], "reserved")),
        ("hold time", _hundred_ms(value[2:5], context).text),
    ]
    language = value[5:13].rstrip(b"\x00")
    if language:
        lines.append(("language", _text(language)))
    qualifier = {0x00: "none", 0x10: "amount", 0x20: "balance"}.get(value[13], "reserved")
    lines.append(
        (
            "value",
            qualifier
            if value[13] in {0, 255}
            else f"{qualifier} {amount(_number(value[14:20]), _number(value[20:22]))}",
        )
    )
    return Meaning("", tuple(lines))


def _error_indication(value: bytes, _: Context) -> Meaning:
    _length(value, 6)
    tables: tuple[tuple[str, ...], ...] = (
        ("none", "timeout", "transmission error", "protocol error"),
        ("none", "card data missing", "CAM failed", "status bytes", "parsing error", "maximum limit exceeded",
         "card data error", "mag-stripe not supported", "no PPSE", "PPSE fault", "empty candidate list",
         "IDS read error", "IDS write error", "IDS data error", "IDS no matching AC", "terminal data error"),
        ("none", "timeout", "stop", "amount not present"),
    )  # fmt: skip
    lines = [
        (f"L{number}", table[byte] if byte < len(table) else "reserved")
        for number, (byte, table) in enumerate(zip(value, tables, strict=False), 1)
    ]
    return Meaning("", (*lines, ("SW1 SW2", _plain(value[3:5])), ("message", MESSAGES.get(value[5], "reserved"))))


def _phone_messages(value: bytes, _: Context) -> Meaning:
    if not value or len(value) % 8:
        raise Unfit("is no multiple of 8 bytes")
    rows = [value[at : at + 8] for at in range(0, len(value), 8)]
    lines = []
    for number, row in enumerate(rows, 1):
        shown = f"{MESSAGES.get(row[6], 'reserved')}; {_STATUSES.get(row[7], 'reserved')}"
        lines.append((f"row {number}", f"DF4B & {_plain(row[:3])} = {_plain(row[3:6])}: {shown}"))
    return Meaning("", tuple(lines))


def _kernel_number(value: bytes, _: Context) -> Meaning:
    _length(value, 1)
    return Meaning(f"kernel {value[0]}" + (f", {KERNELS[value[0]]}" if value[0] in KERNELS else ""))


def _iban(value: bytes, _: Context) -> Meaning:
    return Meaning(f"an account in {value[:2].decode('latin-1')}" if value[:2].isalpha() else "")


_COMMON: Final[dict[int, Renderer]] = {
    0x4F: _aid, 0x84: _aid, 0x9D: _aid, 0x9F06: _aid, 0x57: track_2_parts, 0x5A: _pan,
    0x87: _priority, 0x88: _sfi, 0x5F2D: _languages, 0x9F11: _code_table, 0x9F2A: _kernel_identifier,
    0x9F4D: _log_entry, 0x9F0A: _registered_data, 0x5F53: _iban,
    0x5F24: date, 0x5F25: date, 0x9A: date, 0x9F21: _time,
    0x5F28: _country, 0x9F1A: _country, 0x5F2A: currency_name, 0x9F3C: currency_name, 0x9F42: currency_name,
    0x9F3B: _currencies, 0x5F30: _service_code,
    0x81: _amount_b, 0x9F04: _amount_b, 0x9F1B: _amount_b, 0x9F02: _amount_n, 0x9F03: _amount_n,
    0x82: _aip, 0x94: afl, 0x95: _tvr, 0x9F0D: _tvr, 0x9F0E: _tvr, 0x9F0F: _tvr,
    0xDF8120: _tvr, 0xDF8121: _tvr, 0xDF8122: _tvr,
    0x8C: dol_lines, 0x8D: dol_lines, 0x97: dol_lines, 0x9F38: dol_lines, 0x9F49: dol_lines, 0x9F4F: dol_lines,
    0x9F4A: _tag_list, 0x8E: _cvm_list, 0x9F34: _cvm_results, 0x9F35: _terminal_type, 0x9C: _words(TRANSACTION_TYPES),
    0x9F39: _words(_ENTRY_MODES), 0x8A: _arc, 0x91: _issuer_authentication, 0x9F10: _iad, 0x86: _script_command,
    0x9F5B: _script_results,
    0x5F57: _words({0x00: "default", 0x10: "savings", 0x20: "cheque or debit", 0x30: "credit"}),
    0x9F36: _count, 0x9F13: _count, 0x9F14: _count, 0x9F17: _count, 0x9F23: _count,
    0x9F53: _words(_CATEGORIES),
}  # fmt: skip
_KERNEL_2: Final[dict[int, Renderer]] = {
    0x9F50: _amount_card, 0xDF8104: _amount_card, 0xDF8105: _amount_card, 0x9F51: dol_lines, 0x9F5B: dol_lines,
    0x9F69: dol_lines, 0xDF811A: dol_lines, 0x9F6B: track_2_parts, 0x9F6E: _third_party,
    0xDF8123: _amount_n, 0xDF8124: _amount_n, 0xDF8125: _amount_n, 0xDF8126: _amount_n, 0xDF8106: _tag_list,
    0xDF8112: _tag_list, 0xDF8115: _error_indication, 0xDF8116: _user_interface, 0xDF8129: _outcome,
    0xDF8131: _phone_messages, 0xDF812D: _hundred_ms, 0xDF810C: _kernel_number, 0x9F64: _count, 0x9F67: _count,
    0xDF811C: _count, 0xDF811D: _count, 0xDF8127: _count, 0xDF8136: _count, 0xDF8137: _count, 0xDF8307: _count,
    0xDF8130: lambda value, _: Meaning(f"{int.from_bytes(value, 'big') * 100} ms"),
    **dict.fromkeys(range(0xDF8132, 0xDF8136), _tenth_ms), **dict.fromkeys(range(0xDF8303, 0xDF8307), _tenth_ms),
}  # fmt: skip
_KERNEL_3: Final[dict[int, Renderer]] = {
    0x9F5B: _script_results, 0x9F5D: _amount_card, 0x9F69: _authentication_data, 0x9F6E: _form_factor,
}  # fmt: skip


def renderer(tag: int, kernel: int | None) -> Renderer | None:
    """What puts this tag's value into words, where it has any; formats alone say the rest."""
    own, layouts = (
        (_KERNEL_2, bits.LAYOUTS_KERNEL_2)
        if kernel == 2
        else (_KERNEL_3, bits.LAYOUTS_KERNEL_3)
        if kernel == 3
        else ({}, {})
    )
    if tag in own:
        return own[tag]
    layout = layouts.get(tag) or bits.LAYOUTS.get(tag)
    if layout is not None:
        return _bits(layout)
    return _COMMON.get(tag)


def meaning(tag: int, value: bytes, context: Context) -> Meaning:
    """What `value` says. Raises `Unfit` for one that its definition does not allow."""
    if WITHIN.get(context.parent or 0, {}).get(tag):
        return _count(value, context) if context.parent in {0xBF4C, 0xBF4D} else Meaning()
    kernel = kernel_of(tag, len(value), context)
    known = lookup(tag, kernel)
    if known is not None and value and not known.length_min <= len(value) <= known.length_max:
        span = (
            str(known.length_min)
            if known.length_min == known.length_max
            else f"{known.length_min} to {known.length_max}"
        )
        raise Unfit(f"has {len(value)} bytes, not {span}")
    if not value:
        return Meaning("empty")
    render = renderer(tag, kernel)
    if render is not None:
        return render(value, context)
    match known.format if known else None:
        case Format.N:
            _digits(value)  # they are read as they stand
            return Meaning()
        case Format.A | Format.AN | Format.ANS:
            return _as_text(value, context)
        case _:
            return Meaning()

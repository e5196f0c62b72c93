"""What each bit of the bit-coded data objects says (EMV 4.4 Book 3, Annex C; Book 4, Annex A; Books A, C-2 and C-3).

A line is `byte.bit text`, bit 8 the most significant, or `byte.high-low=value text` for bits that are one number; such
a line is said whenever the number fits, also for zero. Bits that no line names are reserved.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple


class Bits(NamedTuple):
    """A number `value` in bits `high` to `low` of byte `byte` (from 1), and what it says."""

    byte: int
    high: int
    low: int
    value: int
    text: str

    @property
    def where(self) -> str:
        return f"byte {self.byte} bit {self.high}" + (f"-{self.low}" if self.high != self.low else "")


class Layout(NamedTuple):
    """A bit-coded object: how many bytes it has at most, its lines, and a word for a value that says nothing."""

    size: int
    lines: tuple[Bits, ...]
    nothing: str


_LINE: Final = re.compile(r"(\d+)\.(\d)(?:-(\d))?(?:=([01]+))? (.+)")


def _layout(size: int, text: str, nothing: str = "nothing") -> Layout:
    lines = []
    for line in filter(None, text.splitlines()):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(line)
        byte, high, low, value, said = match.groups()
        lines.append(Bits(int(byte), int(high), int(low or high), int(value or "1", 2), said))
    return Layout(size, tuple(lines), nothing)


def read(layout: Layout, value: bytes) -> list[tuple[str, str]]:
    """What `value` says, as (where, text), in the order of its bytes and bits."""
    found: list[tuple[int, int, str, str]] = []
    for number, byte in enumerate(value[: layout.size], 1):
        reserved = byte
        for line in layout.lines:
            if line.byte != number:
                continue
            mask = (1 << (line.high - line.low + 1)) - 1
            reserved &= ~(mask << (line.low - 1))
            if byte >> (line.low - 1) & mask == line.value:
                found.append((number, -line.high, line.where, line.text))
        found += [
            (number, -bit, f"byte {number} bit {bit}", "reserved, yet set")
            for bit in range(8, 0, -1)
            if reserved >> (bit - 1) & 1
        ]
    return [(where, text) for _, _, where, text in sorted(found, key=lambda each: each[:2])]


_AIP_BYTE_1: Final = """
1.8 XDA is supported
1.7 SDA is supported
1.6 DDA is supported
1.5 cardholder verification is supported
1.4 terminal risk management is to be performed
1.3 issuer authentication is supported
1.1 CDA is supported
"""
AIP: Final = {
    0: _layout(2, _AIP_BYTE_1 + "1.2 reserved for contactless"),
    2: _layout(2, _AIP_BYTE_1 + """1.2 on-device cardholder verification is supported
2.8 EMV mode is supported
2.1 relay resistance protocol is supported"""),
    3: _layout(2, _AIP_BYTE_1 + """1.2 reserved
2.8 mag-stripe (MSD) is supported
2.7 mobile phone
2.6 contactless transaction"""),
    None: _layout(2, _AIP_BYTE_1 + """1.2 on-device cardholder verification is supported (kernel 2)
2.8 EMV mode is supported (kernel 2); mag-stripe mode is supported (kernel 3)
2.7 mobile phone (kernel 3)
2.6 contactless transaction (kernel 3)
2.1 relay resistance protocol is supported (kernel 2)"""),
}  # fmt: skip

_TVR: Final = """
1.8 offline data authentication was not performed
1.7 SDA failed
1.6 ICC data missing
1.5 card is on the exception file
1.4 DDA failed
1.3 CDA failed
1.2 SDA selected
1.1 XDA selected
2.8 card and terminal have different application versions
2.7 expired application
2.6 application not yet effective
2.5 requested service not allowed for this card
2.4 new card
2.2 biometric performed and successful
2.1 biometric template format not supported
3.8 cardholder verification was not successful
3.7 unrecognised CVM
3.6 PIN try limit exceeded
3.5 PIN entry required, PIN pad not present or not working
3.4 PIN entry required, PIN pad present, but PIN was not entered
3.3 online CVM captured
3.2 biometric required, but capture device not working
3.1 biometric required, device present, but biometric was not entered
4.8 transaction exceeds floor limit
4.7 lower consecutive offline limit exceeded
4.6 upper consecutive offline limit exceeded
4.5 selected randomly for online processing
4.4 merchant forced the transaction online
4.3 biometric try limit exceeded
4.2 a selected biometric type not supported
4.1 XDA failed
5.8 default TDOL used
5.7 issuer authentication failed
5.6 script processing failed before final GENERATE AC
5.5 script processing failed after final GENERATE AC
"""
_TVR_RELAY: Final = """
5.4 relay resistance threshold exceeded
5.3 relay resistance time limits exceeded
5.2-1=00 relay resistance protocol not supported
5.2-1=01 relay resistance protocol not performed
5.2-1=10 relay resistance protocol performed
"""
TVR: Final = {
    0: _layout(5, _TVR + "5.3 CA ECC key missing\n5.4 reserved"),
    2: _layout(5, _TVR + _TVR_RELAY),
    None: _layout(
        5,
        _TVR
        + """
5.4 relay resistance threshold exceeded (kernel 2)
5.3 relay resistance time limits exceeded (kernel 2); CA ECC key missing (contact)
5.2-1=01 relay resistance protocol not performed (kernel 2)
5.2-1=10 relay resistance protocol performed (kernel 2)
""",
    ),
}

CVM_METHODS: Final = {
    0x00: "fail CVM processing",
    0x01: "plaintext PIN, verified by the card",
    0x02: "enciphered PIN, verified online",
    0x03: "plaintext PIN, verified by the card, and signature",
    0x04: "enciphered PIN, verified by the card",
    0x05: "enciphered PIN, verified by the card, and signature",
    0x06: "facial biometric, verified by the card",
    0x07: "facial biometric, verified online",
    0x08: "finger biometric, verified by the card",
    0x09: "finger biometric, verified online",
    0x0A: "palm biometric, verified by the card",
    0x0B: "palm biometric, verified online",
    0x0C: "iris biometric, verified by the card",
    0x0D: "iris biometric, verified online",
    0x0E: "voice biometric, verified by the card",
    0x0F: "voice biometric, verified online",
    0x1E: "signature (paper)",
    0x1F: "no CVM required",
    0x3F: "no CVM performed",
}
CVM_CONDITIONS: Final = {
    0x00: "always",
    0x01: "if unattended cash",
    0x02: "if not unattended cash, manual cash or purchase with cashback",
    0x03: "if the terminal supports the CVM",
    0x04: "if manual cash",
    0x05: "if purchase with cashback",
    0x06: "if in the application currency and under X",
    0x07: "if in the application currency and over X",
    0x08: "if in the application currency and under Y",
    0x09: "if in the application currency and over Y",
}

_CVM_CAPABILITY: Final = """
{0}.8 plaintext PIN for ICC verification
{0}.7 enciphered PIN for online verification
{0}.6 signature (paper)
{0}.5 enciphered PIN for offline verification
{0}.4 no CVM required
{0}.3 online biometric
{0}.2 offline biometric
{0}.1 ECC-enciphered PIN for offline verification
"""
_SECURITY: Final = """
{0}.8 SDA
{0}.7 DDA
{0}.6 card capture
{0}.4 CDA
{0}.3 XDA
"""
_INPUT: Final = """
{0}.8 manual key entry
{0}.7 magnetic stripe
{0}.6 IC with contacts
"""
_MAG_STRIPE_CVM: Final = _layout(1, """
1.8-5=0000 no CVM
1.8-5=0001 signature
1.8-5=0010 online PIN
1.8-5=1111 not applicable
""")  # fmt: skip

LAYOUTS: Final[dict[int, Layout]] = {
    0x9B: _layout(2, """
1.8 offline data authentication was performed
1.7 cardholder verification was performed
1.6 card risk management was performed
1.5 issuer authentication was performed
1.4 terminal risk management was performed
1.3 script processing was performed
"""),
    0x9F07: _layout(2, """
1.8 valid for domestic cash transactions
1.7 valid for international cash transactions
1.6 valid for domestic goods
1.5 valid for international goods
1.4 valid for domestic services
1.3 valid for international services
1.2 valid at ATMs
1.1 valid at terminals other than ATMs
2.8 domestic cashback allowed
2.7 international cashback allowed
"""),
    0x9F33: _layout(3, _INPUT.format(1) + _CVM_CAPABILITY.format(2) + _SECURITY.format(3)),
    0x9F40: _layout(5, """
1.8 cash
1.7 goods
1.6 services
1.5 cashback
1.4 inquiry
1.3 transfer
1.2 payment
1.1 administrative
2.8 cash deposit
3.8 numeric keys
3.7 alphabetic and special character keys
3.6 command keys
3.5 function keys
4.8 print or electronic, attendant
4.7 print or electronic, cardholder
4.6 display, attendant
4.5 display, cardholder
4.2 code table 10
4.1 code table 9
5.8 code table 8
5.7 code table 7
5.6 code table 6
5.5 code table 5
5.4 code table 4
5.3 code table 3
5.2 code table 2
5.1 code table 1
"""),
    0x9F27: _layout(1, """
1.8-7=00 AAC: declined
1.8-7=01 TC: approved offline
1.8-7=10 ARQC: online authorisation requested
1.8-7=11 reserved
1.6-5=01 payment system specific
1.6-5=10 payment system specific
1.6-5=11 payment system specific
1.4 advice required
1.3-1=001 reason: service not allowed
1.3-1=010 reason: PIN try limit exceeded
1.3-1=011 reason: issuer authentication failed
"""),
    0x9F30: _layout(3, """
1.8 facial
1.7 finger
1.6 iris
1.5 palm
1.4 voice
"""),
    0xDF8117: _layout(1, _INPUT.format(1)),
    0xDF8118: _layout(1, _CVM_CAPABILITY.format(1)),
    0xDF8119: _layout(1, _CVM_CAPABILITY.format(1)),
    0xDF811F: _layout(1, _SECURITY.format(1)),
    0xDF811E: _MAG_STRIPE_CVM,
    0xDF812C: _MAG_STRIPE_CVM,
    0xDF811B: _layout(1, """
1.8 mag-stripe mode is not supported
1.7 EMV mode is not supported
1.6 on-device cardholder verification is supported
1.5 relay resistance protocol is supported
1.4 reserved for the payment system
1.3 all records are read, even without CDA
"""),
    0xDF8114: _layout(1, """
1.8-7=00 AAC requested
1.8-7=01 TC requested
1.8-7=10 ARQC requested
1.5 CDA signature requested
"""),
}  # fmt: skip

LAYOUTS_KERNEL_2: Final[dict[int, Layout]] = {
    0x9F5D: _layout(3, """
1.8-5=0000 data storage version: not supported
1.8-5=0001 data storage version 1
1.8-5=0010 data storage version 2
2.3 support for field off detection
2.2 balance reading is supported
2.1 CDA also over an AAC
3.8-1=00000000 data storage: undefined scheme
3.8-1=00000001 data storage: ODS in scheme 1
"""),
    0x9F5F: _layout(1, "1.8 permanent slot available\n1.7 volatile slot available"),
    0x9F6F: _layout(1, """
1.8 permanent slot
1.7 volatile slot
1.6 low volatility
1.5 locked slot
1.1 deactivated slot
"""),
    0x9F7E: _layout(1, "1.2 on-device cardholder verification required\n1.1 mobile is supported"),
    0x9F1D: _layout(3, """
1.8 restart is supported
1.7 contactless: enciphered PIN, verified online
1.6 contactless: signature (paper)
1.5 contactless: enciphered PIN, verified by the card
1.4 contactless: no CVM required
1.3 contactless: consumer device CVM
1.2 contactless: plaintext PIN, verified by the card
1.1 present and hold is supported
2.8 CVM limit exceeded
2.7 contact: enciphered PIN, verified online
2.6 contact: signature (paper)
2.5 contact: enciphered PIN, verified by the card
2.4 contact: no CVM required
2.3 contact: consumer device CVM
2.2 contact: plaintext PIN, verified by the card
3.8 contactless mag-stripe mode is not supported
3.7 contactless EMV mode is not supported
3.6 consumer device CVM without CDA is supported
"""),
    0xDF4B: _layout(3, """
2.5 on-device cardholder verification successful
2.4 context is conflicting
2.3 offline change PIN required
2.2 acknowledgement required
2.1 on-device cardholder verification required
3.2 wallet must be activated
3.1 second tap expected
"""),
    0xDF8128: _layout(1, "1.8 read\n1.7 write"),
    0xDF810B: _layout(1, """
1.8 successful read
1.7 successful write
"""),
    0xDF62: _layout(1, """
1.8 permanent slot type
1.7 volatile slot type
1.6 low volatility
1.4 decline in case of data storage error
"""),
}  # fmt: skip

LAYOUTS_KERNEL_3: Final[dict[int, Layout]] = {
    0x9F66: _layout(4, """
1.8 mag-stripe mode is supported
1.7 reserved
1.6 EMV mode is supported
1.5 EMV contact chip is supported
1.4 offline-only reader
1.3 online PIN is supported
1.2 signature is supported
1.1 offline data authentication for online authorisations is supported
2.8 online cryptogram required
2.7 CVM required
2.6 (contact chip) offline PIN is supported
3.8 issuer update processing is supported
3.7 consumer device CVM is supported
4.8 fDDA version 1 is supported
"""),
    0x9F6C: _layout(2, """
1.8 online PIN required
1.7 signature required
1.6 go online if offline data authentication fails and the reader is online capable
1.5 switch interface if offline data authentication fails and the reader supports contact chip
1.4 go online if the application has expired
1.3 switch interface for cash transactions
1.2 switch interface for cashback transactions
1.1 not valid for contactless ATM transactions
2.8 consumer device CVM performed
2.7 card supports issuer update processing at the POS
"""),
    0x9F6E: _layout(4, """
1.8-6=001 version 1
1.5-1=00000 standard card
1.5-1=00001 mini card
1.5-1=00010 non-card form factor
1.5-1=00011 consumer mobile phone
1.5-1=00100 wrist-worn device
2.8 passcode capable
2.7 signature panel
2.6 hologram
2.5 CVV2 printed
2.4 two-way messaging
2.3 cloud-based payment credentials
2.2 biometric cardholder verification capable
4.4-1=0000 ISO/IEC 14443 contactless
"""),
}  # fmt: skip

# Issuer Application Data: card verification results of the formats that are published.
VISA_CVR: Final = _layout(3, """
1.8-7=00 second GENERATE AC: AAC
1.8-7=01 second GENERATE AC: TC
1.8-7=10 second GENERATE AC not requested
1.6-5=00 first GENERATE AC or GPO: AAC
1.6-5=01 first GENERATE AC or GPO: TC
1.6-5=10 first GENERATE AC or GPO: ARQC
1.4 issuer authentication performed and failed
1.3 offline PIN verification performed
1.2 offline PIN verification failed
1.1 unable to go online
2.8 last online transaction not completed
2.7 PIN try limit exceeded
2.6 velocity counters exceeded
2.5 new card
2.4 issuer authentication failed on last online transaction
2.3 issuer authentication not performed after online authorisation
2.2 application blocked because PIN try limit exceeded
2.1 SDA failed on last transaction
3.4 issuer script processing failed
3.3 DDA failed on last transaction
3.2 DDA performed
3.1 PIN verification command not received though expected
""")  # fmt: skip
MCHIP_CVR: Final = _layout(6, """
1.8-7=00 second GENERATE AC: AAC
1.8-7=01 second GENERATE AC: TC
1.8-7=10 second GENERATE AC not requested
1.6-5=00 first GENERATE AC: AAC
1.6-5=01 first GENERATE AC: TC
1.6-5=10 first GENERATE AC: ARQC
1.4 date check failed
1.3 offline PIN verification performed
1.2 offline encrypted PIN verification performed
1.1 offline PIN verification successful
2.8 DDA returned
2.7 CDA returned in first GENERATE AC
2.6 CDA returned in second GENERATE AC
2.5 issuer authentication performed
2.4 CIAC default skipped on CAT3
2.3 offline change PIN successful
2.2 issuer discretionary
2.1 issuer discretionary
4.8 last online transaction not completed
4.7 unable to go online
4.6 offline PIN verification not performed
4.5 offline PIN verification failed
4.4 PIN try limit exceeded
4.3 international transaction
4.2 domestic transaction
4.1 terminal erroneously considers offline PIN OK
5.8 lower consecutive offline limit exceeded
5.7 upper consecutive offline limit exceeded
5.6 lower cumulative offline limit exceeded
5.5 upper cumulative offline limit exceeded
5.4 go online on next transaction
5.3 issuer authentication failed
5.2 script received
5.1 script failed
""")  # fmt: skip

# Card Status Update, which the issuer sends with ARPC method 2 (Book 3, C10).
CSU: Final = _layout(4, """
1.8 proprietary authentication data included
2.8 issuer approves the online transaction
2.7 card block
2.6 application block
2.5 update PIN try counter
2.4 go online on next transaction
2.3 created by a proxy for the issuer
2.2-1=00 do not update velocity checking counters
2.2-1=01 set velocity checking counters to upper offline limits
2.2-1=10 reset velocity checking counters to zero
2.2-1=11 add the transaction to velocity checking counters
""")  # fmt: skip

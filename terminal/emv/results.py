"""What the terminal has found out so far, as the books' bits: TVR, TSI, and the AIP they are judged against
(EMV 4.4 Book 3, Annex C).

Steps return the bits that they found; whoever runs them joins them with `|`. A bit never declines by itself: action
analysis (`decision`) weighs them.
"""

from __future__ import annotations

from enum import IntFlag


class Tvr(IntFlag):
    """Terminal Verification Results 95 as one number of 40 bits: byte 1 is the leftmost (Book 3, C5)."""

    NONE = 0
    ODA_NOT_PERFORMED = 0x80_00000000
    SDA_FAILED = 0x40_00000000
    CARD_DATA_MISSING = 0x20_00000000
    ON_EXCEPTION_FILE = 0x10_00000000
    DDA_FAILED = 0x08_00000000
    CDA_FAILED = 0x04_00000000
    SDA_SELECTED = 0x02_00000000
    VERSIONS_DIFFER = 0x80_000000
    EXPIRED = 0x40_000000
    NOT_YET_EFFECTIVE = 0x20_000000
    SERVICE_NOT_ALLOWED = 0x10_000000
    NEW_CARD = 0x08_000000
    CVM_FAILED = 0x80_0000
    CVM_UNRECOGNISED = 0x40_0000
    PIN_TRIES_EXCEEDED = 0x20_0000
    PIN_PAD_ABSENT = 0x10_0000
    PIN_NOT_ENTERED = 0x08_0000
    ONLINE_PIN_ENTERED = 0x04_0000
    FLOOR_LIMIT_EXCEEDED = 0x80_00
    LOWER_OFFLINE_LIMIT_EXCEEDED = 0x40_00
    UPPER_OFFLINE_LIMIT_EXCEEDED = 0x20_00
    RANDOMLY_SELECTED = 0x10_00
    MERCHANT_FORCED_ONLINE = 0x08_00
    DEFAULT_TDOL_USED = 0x80
    ISSUER_AUTHENTICATION_FAILED = 0x40
    SCRIPT_FAILED_BEFORE = 0x20  # before the final GENERATE AC
    SCRIPT_FAILED_AFTER = 0x10
    # Kernel 2 alone:
    RELAY_THRESHOLD_EXCEEDED = 0x08
    RELAY_TIME_LIMITS_EXCEEDED = 0x04
    RELAY_RESISTANCE_PERFORMED = 0x02
    RELAY_RESISTANCE_NOT_PERFORMED = 0x01

    @classmethod
    def decode(cls, value: bytes) -> Tvr:
        return cls(int.from_bytes(value, "big"))

    def encode(self) -> bytes:
        return int(self).to_bytes(5, "big")


class Tsi(IntFlag):
    """Transaction Status Information 9B as one number of 16 bits (Book 3, C6)."""

    NONE = 0
    ODA_PERFORMED = 0x80_00
    CVM_PERFORMED = 0x40_00
    CARD_RISK_MANAGEMENT_PERFORMED = 0x20_00
    ISSUER_AUTHENTICATION_PERFORMED = 0x10_00
    TERMINAL_RISK_MANAGEMENT_PERFORMED = 0x08_00
    SCRIPT_PERFORMED = 0x04_00

    def encode(self) -> bytes:
        return int(self).to_bytes(2, "big")


class Aip(IntFlag):
    """Application Interchange Profile 82 as one number of 16 bits (Book 3, C1; Book C-2, A.1.16)."""

    SDA = 0x40_00
    DDA = 0x20_00
    CVM = 0x10_00
    RISK_MANAGEMENT = 0x08_00
    ISSUER_AUTHENTICATION = 0x04_00
    ON_DEVICE_CVM = 0x02_00
    CDA = 0x01_00
    # Kernel 2 alone:
    EMV_MODE = 0x00_80
    RELAY_RESISTANCE = 0x00_01

    @classmethod
    def decode(cls, value: bytes) -> Aip:
        return cls(int.from_bytes(value, "big"))

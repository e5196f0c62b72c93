"""From the configuration to what the EMV kernel runs with: who the terminal is, what it takes, what it trusts."""

from __future__ import annotations

from typing import Final

from terminal.config import Config, ConfigError
from terminal.emv.authentication import CaKey, CaKeyError, CaKeys
from terminal.emv.configuration import Combination, ConfigurationError, Limits, Setup, bcd
from terminal.emv.tags import Tag

# No CVM only: no PIN entry, no signature (Book 4, A2). SDA, DDA and CDA are understood.
_CAPABILITIES: Final = bytes.fromhex("0008C8")
_GOODS_AND_SERVICES: Final = bytes.fromhex("6000000000")
_ATTENDED_MERCHANT: Final = bytes.fromhex("22")  # attended, offline with online capability (Book 4, A1)


def build(config: Config) -> Setup:
    """Check and convert the EMV part of the configuration. Raises `ConfigError`."""
    try:
        return Setup(
            terminal={
                int(Tag.TERMINAL_COUNTRY_CODE): bcd(config.terminal.country, 2),
                int(Tag.TERMINAL_CAPABILITIES): _CAPABILITIES,
                int(Tag.ADDITIONAL_TERMINAL_CAPABILITIES): _GOODS_AND_SERVICES,
                int(Tag.TERMINAL_TYPE): _ATTENDED_MERCHANT,
            },
            combinations=tuple(
                Combination(
                    aid=bytes.fromhex(aid.aid),
                    kernel=aid.kernel,
                    limits=Limits(
                        contactless_transaction=aid.contactless_transaction,
                        contactless_floor=aid.contactless_floor,
                        cvm_required=aid.cvm_required,
                        zero_amount_allowed=aid.zero_amount_allowed,
                        ttq=bytes.fromhex(aid.ttq),
                    ),
                )
                for aid in config.aids
            ),
            ca_keys=CaKeys(
                CaKey(
                    rid=bytes.fromhex(key.rid),
                    index=int(key.index, 16),
                    modulus=bytes.fromhex(key.modulus),
                    exponent=bytes.fromhex(key.exponent),
                    checksum=bytes.fromhex(key.checksum) if key.checksum else None,
                )
                for key in config.ca_keys
            ),
        )
    except (CaKeyError, ConfigurationError) as error:
        raise ConfigError(f"EMV configuration: {error}. Nothing was started.") from error

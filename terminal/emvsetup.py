"""From the configuration to what the EMV kernel runs with: who the terminal is, what it takes, what it trusts."""

from __future__ import annotations

from typing import Final

from terminal.config import Config, ConfigError
from terminal.emv.authentication import CaKey, CaKeyError, CaKeys
from terminal.emv.configuration import CONTACT, Combination, ConfigurationError, Limits, Setup, bcd
from terminal.emv.tags import Tag

# IC with contacts; no CVM only, neither PIN entry nor signature; DDA and CDA (Book 4, A2). SDA proves nothing here.
_CAPABILITIES: Final = bytes.fromhex("200848")
_KERNEL_3: Final = 3
_TTQ: Final = bytes.fromhex("21004080")  # EMV mode, ODA for online, CDCVM, fDDA version 1 (C-3, tag 9F66)
_ACTION_DEFAULT, _ACTION_DENIAL, _ACTION_ONLINE = 0xDF8120, 0xDF8121, 0xDF8122
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
                        terminal_floor=aid.terminal_floor if aid.kernel == CONTACT else None,
                        ttq=bytes.fromhex(aid.ttq) if aid.ttq else (_TTQ if aid.kernel == _KERNEL_3 else None),
                    ),
                    tags={
                        int(tag): bytes.fromhex(value)
                        for tag, value in (
                            (Tag.APPLICATION_VERSION_TERMINAL, aid.version),
                            (_ACTION_DEFAULT, aid.action_default),
                            (_ACTION_DENIAL, aid.action_denial),
                            (_ACTION_ONLINE, aid.action_online),
                        )
                        if value
                    },
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

"""From the configuration to what the EMV kernel runs with: who the terminal is, what it takes, what it trusts.

Everything is checked here, before a card is asked: lengths, checksums of CA public keys, lists that cannot be read.
The exception list is card data, so it is no file of the configuration: it comes as a credential, which systemd decrypts
for this service alone, and is turned into keyed hashes whose key is made here and never written.
"""

from __future__ import annotations

import secrets
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from terminal.config import AidLimitsSection, AidSection, Config, ConfigError, RevocationList, credentials
from terminal.emv.authentication import CaKey, CaKeyError, CaKeys, RevokedCertificate
from terminal.emv.configuration import (
    Combination,
    ConfigurationError,
    ExceptionEntry,
    Limits,
    RandomSelection,
    Setup,
    bcd,
)
from terminal.emv.exception_file import KEY_BYTES, ExceptionFile
from terminal.emv.outcome import Pan
from terminal.emv.tags import ActionCode, Tag
from terminal.emv_keys import Use, published

# IC with contacts; no CVM only, neither PIN entry nor signature; DDA and CDA (Book 4, A2). SDA proves nothing here.
_CAPABILITIES: Final = bytes.fromhex("200848")
_KERNEL_3: Final = 3
_TTQ: Final = bytes.fromhex("21004080")  # EMV mode, ODA for online, CDCVM, fDDA version 1 (C-3, tag 9F66)
_GOODS_AND_SERVICES: Final = bytes.fromhex("6000000000")
_ATTENDED_MERCHANT: Final = bytes.fromhex("22")  # attended, offline with online capability (Book 4, A1)
EXCEPTIONS: Final = "emv-exceptions"  # the credential
LIST_BYTES_MAX: Final = 4 * 1024 * 1024  # 200,000 cards; a credential of systemd ends at 1 MiB


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
            combinations=tuple(_combination(aid) for aid in config.aids),
            ca_keys=_ca_keys(config),
            revoked=_revoked(config.emv.revoked) if config.emv.revoked is not None else frozenset(),
            exceptions=_exceptions(config) if config.emv.exceptions else frozenset(),
        )
    except (CaKeyError, ConfigurationError) as error:
        raise ConfigError(f"EMV configuration: {error}. Nothing was started.") from error


def _combination(aid: AidSection) -> Combination:
    tags = {int(tag, 16): bytes.fromhex(value) for tag, value in aid.tags.items()}
    named = (
        (Tag.APPLICATION_VERSION_TERMINAL, aid.version),
        (ActionCode.DEFAULT, aid.action_default),
        (ActionCode.DENIAL, aid.action_denial),
        (ActionCode.ONLINE, aid.action_online),
    )
    return Combination(
        aid=bytes.fromhex(aid.aid),
        kernel=aid.kernel,
        limits=_limits(aid, aid),
        tags=tags | {int(tag): bytes.fromhex(value) for tag, value in named if value},
        partial=aid.partial,
        limits_elsewhere={code: _limits(aid, elsewhere) for code, elsewhere in aid.limits.items()},
    )


def _limits(aid: AidSection, amounts: AidSection | AidLimitsSection) -> Limits:
    """The application's settings with the amounts of one currency. Contact without a floor limit would have none."""
    chance = amounts.random
    return Limits(
        status_check=aid.status_check,
        zero_amount_allowed=aid.zero_amount_allowed,
        contactless_transaction=amounts.contactless_transaction,
        contactless_floor=amounts.contactless_floor,
        terminal_floor=amounts.terminal_floor,
        cvm_required=amounts.cvm_required,
        ttq=bytes.fromhex(aid.ttq) if aid.ttq else (_TTQ if aid.kernel == _KERNEL_3 else None),
        extended_selection=aid.extended_selection,
        transaction_types=frozenset(int(each, 16) for each in aid.transaction_types)
        if aid.transaction_types is not None
        else None,
        random=RandomSelection(chance.threshold, chance.target_percent, chance.max_target_percent) if chance else None,
    )


def _ca_keys(config: Config) -> CaKeys:
    """The configuration's own keys, and published ones if it says so. Raises `CaKeyError`."""
    named = config.emv.published_ca_keys
    return CaKeys(
        [
            *(
                CaKey(
                    rid=bytes.fromhex(key.rid),
                    index=int(key.index, 16),
                    modulus=bytes.fromhex(key.modulus),
                    exponent=bytes.fromhex(key.exponent),
                    checksum=bytes.fromhex(key.checksum) if key.checksum else None,
                )
                for key in config.ca_keys
            ),
            *(published(Use(named)) if named != "none" else ()),
        ]
    )


def _revoked(path: Path) -> frozenset[RevokedCertificate]:
    """Raises `ConfigError`: a list that cannot be read must not look like an empty one."""
    try:
        listed = msgspec.convert(tomllib.loads(_text(path)), RevocationList, strict=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: {error}. The certificate revocation list cannot be read, and nothing was started: a withdrawn "
            "certificate would be trusted. Correct the file, or remove `revoked` from [emv]."
        ) from error
    return frozenset(
        RevokedCertificate(bytes.fromhex(each.rid), int(each.index, 16), bytes.fromhex(each.serial))
        for each in listed.revoked
    )


def _exceptions(config: Config) -> ExceptionFile:
    """The exception list, as hashes. Without any credentials, as when a file is checked, it is empty: nothing is sold.

    Raises `ConfigError`, which names lines and quotes none.
    """
    try:
        path = credentials(config.ledger.keys) / EXCEPTIONS
    except ConfigError:
        return ExceptionFile((), bytes(KEY_BYTES))
    try:
        return ExceptionFile(_listed(_text(path)), secrets.token_bytes(KEY_BYTES))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: {error}. The exception list cannot be read, and nothing was started: a card on it would be "
            "accepted. Provide the credential, or set `exceptions` of [emv] to false."
        ) from None  # the cause may quote what it could not read


def _listed(text: str) -> Iterator[ExceptionEntry]:
    """One card a line: its number, and its sequence number if only that one is meant. Raises `ValueError`."""
    for number, line in enumerate(text.splitlines(), start=1):
        match line.partition("#")[0].split():
            case []:
                continue
            case [pan] if _is_pan(pan):
                yield ExceptionEntry(Pan(pan))
            case [pan, psn] if _is_pan(pan) and psn.isascii() and psn.isdecimal() and len(psn) <= 2:
                yield ExceptionEntry(Pan(pan), int(psn))
            case _:
                raise ValueError(f"line {number} is no card number of 8 to 19 digits, alone or with a sequence number")


def _is_pan(text: str) -> bool:
    return text.isascii() and text.isdecimal() and 8 <= len(text) <= 19


def _text(path: Path) -> str:
    """Raises `OSError`, `ValueError`."""
    with path.open("rb") as stream:
        data = stream.read(LIST_BYTES_MAX + 1)
    if len(data) > LIST_BYTES_MAX:
        raise ValueError(f"longer than {LIST_BYTES_MAX} bytes")
    return data.decode("utf-8")

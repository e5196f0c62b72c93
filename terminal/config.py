"""Configuration: one TOML file, read by both services, checked whole before anything starts.

Every value is typed and named, an unknown key is an error, and a message names the place
(`$.limits.EUR.offline_sum`), what is wrong and what would do. Secrets are never here:
keys come from credentials (`terminal.ledger.keys`).
"""

from __future__ import annotations

import os
import tomllib
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from terminal.errors import TerminalError
from terminal.money import AMOUNT_MINOR_MAX, Amount, Currency, MoneyError, currency

_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
_Hex = Annotated[str, msgspec.Meta(pattern=r"\A([0-9A-Fa-f]{2})+\Z")]
_Fingerprint = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Window = Annotated[str, msgspec.Meta(pattern=r"\A([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d\Z")]
_Pin = Annotated[int, msgspec.Meta(ge=2, le=27)]
# Waited for without a sign of life: well under the watchdog's minute.
_WaitMs = Annotated[int, msgspec.Meta(ge=1, le=45_000)]
_PositiveMs = Annotated[int, msgspec.Meta(ge=1, le=600_000)]


class ConfigError(TerminalError):
    """The configuration cannot be used: nothing was started, no sale was touched."""

    exit_code = 2


class OfflinePolicy(Enum):
    """What becomes of a sale that the host cannot decide in time."""

    EMV = "emv"  # by the card's and the terminal's rules: after a contactless ARQC that is a decline
    DEFERRED = "deferred"  # accepted within limits at the merchant's risk, the host decides later
    DECLINE = "decline"


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class TerminalSection(_Section, frozen=True):
    """Who this terminal is and how it speaks. `day_end`: when the day ends by itself; else it does when told to."""

    id: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9-]{1,32}\Z")]
    merchant: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9-]{1,32}\Z")]
    country: Annotated[int, msgspec.Meta(ge=1, le=999)]  # ISO 3166-1 numeric, EMV tag 9F1A
    currency: str
    language: Annotated[str, msgspec.Meta(pattern=r"\A[a-z]{2}\Z")] = "en"
    configuration: Annotated[str, msgspec.Meta(pattern=r"\A[\x21-\x7e]{1,64}\Z")] | None = None  # this file's version
    day_end: Annotated[str, msgspec.Meta(pattern=r"\A([01]\d|2[0-3]):[0-5]\d\Z")] | None = None  # local time


class LedgerSection(_Section, frozen=True):
    """Where the terminal service keeps its own store. `keys` defaults to systemd's credentials directory.

    `journal` may be a partition of its own, `second_journal` a file on another medium: what one loses the other has.
    `begin`: a ledger is made where there is none. Say false once there is one, and a disk that is not mounted is
    not taken for a new terminal.
    """

    directory: Path = Path("/var/lib/payterm/ledger")
    keys: Path | None = None
    journal: Path | None = None
    journal_mib: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 256
    second_journal: Path | None = None
    begin: bool = True


class RetentionSection(_Section, frozen=True):
    """How long what is delivered is kept. What is not delivered is kept until it is (docs/compliance.md)."""

    sales_days: Annotated[int, msgspec.Meta(ge=1, le=3_660)] = 120
    card_days: Annotated[int, msgspec.Meta(ge=1, le=3_660)] = 60  # last four digits, card_ref: for refunds and disputes
    audit_months: Annotated[int, msgspec.Meta(ge=1, le=120)] = 12  # PCI DSS 4.0.1, 10.5.1: twelve at least


class SocketSection(_Section, frozen=True):
    """The local socket. A user named here alone holds that role; root and the service's own user hold the others."""

    path: Path = Path("/run/payterm/terminal.sock")
    sync_user: str | None = None
    register_user: str | None = None


class ReaderSection(_Section, frozen=True):
    """The contactless reader: a PN532 on a serial line."""

    path: str = "/dev/ttyAMA0"


class ContactSection(_Section, frozen=True):
    """The contact reader, by PC/SC. `reader`: part of its name, where there are several."""

    reader: str | None = None


class DisplaySection(_Section, frozen=True):
    """The OLED, on I2C unless `bus` says otherwise."""

    controller: Literal["ssd1306", "sh1106"] = "ssd1306"
    bus: Literal["i2c", "spi"] = "i2c"
    i2c_port: Annotated[int, msgspec.Meta(ge=0, le=31)] = 1
    i2c_address: Annotated[int, msgspec.Meta(ge=0x08, le=0x77)] = 0x3C
    spi_port: Annotated[int, msgspec.Meta(ge=0, le=7)] = 0
    spi_device: Annotated[int, msgspec.Meta(ge=0, le=7)] = 0
    data_command: _Pin = 24
    reset: _Pin = 25


class PinsSection(_Section, frozen=True):
    """Keypad, lamps and buzzer on the header, by BCM numbers. Without this section there are none."""

    back_end: Literal["lgpio", "rpigpio"] = "lgpio"
    rows: tuple[_Pin, ...] = (5, 6, 13, 19)
    columns: tuple[_Pin, ...] = (12, 16, 20, 21)
    lamps: tuple[_Pin, ...] = (17, 27, 22, 23)
    status: _Pin = 26
    buzzer: _Pin = 18


class SaleSection(_Section, frozen=True):
    """How long each part of a sale may take, and what happens without the host."""

    offline: OfflinePolicy = OfflinePolicy.DEFERRED
    authorisation_timeout_ms: _WaitMs = 8_000
    card_timeout_ms: _PositiveMs = 60_000
    result_hold_ms: Annotated[int, msgspec.Meta(ge=0, le=45_000)] = 1_500


class LimitsSection(_Section, frozen=True):
    """Per currency: the most that one sale may be, and how much may stand accepted without the host's answer."""

    transaction: str
    offline_transaction: str
    offline_sum: str
    offline_count: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 50
    offline_age_hours: Annotated[int, msgspec.Meta(ge=1, le=8_760)] = 72


class HostSection(_Section, frozen=True):
    """The operator's host. The fingerprints are compared by a person with those the operator gives out."""

    url: Annotated[str, msgspec.Meta(pattern=r"\Ahttps://[^/].*\Z")]
    sealing_fingerprint: _Fingerprint
    answer_fingerprint: _Fingerprint
    ca: Path | None = None
    client_certificate: Path | None = None
    enrol: bool = False  # get the client certificate from the host, and renew it
    connect_timeout_ms: _PositiveMs = 4_000
    read_timeout_ms: _PositiveMs = 10_000
    root_fingerprint: _Fingerprint | None = None  # whose signature may bring in a new host key


class SyncSection(_Section, frozen=True):
    """The sync service: its store, its socket, and when the backlog is sent. `keys` defaults to systemd's credentials.

    What a customer waits for is sent at once in every mode.
    """

    directory: Path = Path("/var/lib/payterm-sync")
    keys: Path | None = None
    socket: Path = Path("/run/payterm-sync/sync.sock")
    backoff_min_ms: _PositiveMs = 500
    backoff_max_ms: _PositiveMs = 60_000
    uploads: Annotated[int, msgspec.Meta(ge=1, le=16)] = 6  # under way at once
    mode: Literal["immediate", "interval", "window", "metered", "manual"] = "immediate"
    interval_minutes: Annotated[int, msgspec.Meta(ge=1, le=1_440)] = 15
    windows: tuple[_Window, ...] = ()
    metered_count: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 50  # so many waiting are worth a connection
    metered_minutes: Annotated[int, msgspec.Meta(ge=1, le=10_080)] = 360  # or so old a one
    reconcile_days: Annotated[int, msgspec.Meta(ge=0, le=366)] = 3  # compared once a day, so far back; 0: never


class StripeSection(_Section, frozen=True):
    """Sales are reported to Stripe as payment records. `live` must be said for a live key to be used."""

    live: bool = False
    url: Annotated[str, msgspec.Meta(pattern=r"\Ahttps://[^/].*\Z")] = "https://api.stripe.com"
    ca: Path | None = None


class RandomSection(_Section, frozen=True):
    """Random selection for the host below the floor limit (Book 3, 10.6.2); the threshold in minor units."""

    threshold: Annotated[int, msgspec.Meta(ge=0)]
    target_percent: Annotated[int, msgspec.Meta(ge=0, le=99)]
    max_target_percent: Annotated[int, msgspec.Meta(ge=0, le=99)]


class AidLimitsSection(_Section, frozen=True):
    """An application's limits for another currency, in its minor units: strict where nothing is said."""

    terminal_floor: int = 0
    contactless_transaction: int | None = None
    contactless_floor: int = 0
    cvm_required: int = 0
    random: RandomSection | None = None


class AidSection(_Section, frozen=True):
    """An application that this terminal takes, with its kernel and limits (Book A, 5). Kernel 0: inserted cards.

    `limits`, by ISO 4217 code, for currencies other than the terminal's.
    """

    aid: _Hex
    kernel: Annotated[int, msgspec.Meta(ge=0, le=255)]
    ttq: _Hex | None = None  # 9F66 for kernel 3; `terminal.emvsetup` has its default
    version: _Hex | None = None  # 9F09
    action_default: _Hex | None = None  # terminal action codes, DF8120 to DF8122
    action_denial: _Hex | None = None
    action_online: _Hex | None = None
    terminal_floor: int | None = 0  # inserted cards: above it the host is asked
    contactless_transaction: int | None = None
    contactless_floor: int | None = 0  # above it the card is asked for an online cryptogram
    cvm_required: int | None = 5_000  # this terminal verifies no cardholder itself: above it only a phone will do
    zero_amount_allowed: bool = False
    status_check: bool = False
    extended_selection: bool = False
    partial: bool = True  # inserted cards: also applications whose name only begins with the AID
    transaction_types: tuple[Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-Fa-f]{2}\Z")], ...] | None = None
    random: RandomSection | None = None
    tags: dict[_Hex, _Hex] = {}  # whatever else is stated: default DDOL 9F49, TDOL 97, a kernel's DF81xx
    limits: dict[str, AidLimitsSection] = {}


class EmvSection(_Section, frozen=True):
    """What this terminal trusts of cards, and which it does not take.

    `published_ca_keys`: keys that schemes or laboratories have published, part of this software, besides `[[ca_keys]]`.
    Live and test keys are never trusted together: with a test key anybody can make a card. `revoked` names a file of
    `[[revoked]]` tables; `exceptions` says that the credential `emv-exceptions` lists cards to be refused.
    """

    published_ca_keys: Literal["none", "test", "live"] = "none"
    revoked: Path | None = None
    exceptions: bool = False


class RevokedSection(_Section, frozen=True):
    """An issuer certificate that its scheme has withdrawn (Book 2, 5.1.2)."""

    rid: Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-Fa-f]{10}\Z")]
    index: Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-Fa-f]{2}\Z")]
    serial: Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-Fa-f]{6}\Z")]


class RevocationList(_Section, frozen=True):
    """The file that `[emv] revoked` names."""

    revoked: tuple[RevokedSection, ...]


class CaKeySection(_Section, frozen=True):
    """A certification authority public key. The checksum is verified when it is loaded (Book 2, 11.2.2)."""

    rid: _Hex
    index: _Hex
    modulus: _Hex
    exponent: _Hex
    checksum: _Hex | None = None


# What an inserted card must not approve alone: not authenticated, expired, not allowed, holder not verified (C5).
_CAREFUL = "DC4000A800"

STANDARD_AIDS = (
    AidSection(aid="A000000003", kernel=3),
    AidSection(aid="A000000004", kernel=2, contactless_transaction=AMOUNT_MINOR_MAX),
    AidSection(aid="A000000003", kernel=0, version="008C", action_default=_CAREFUL, action_online=_CAREFUL),
    AidSection(aid="A000000004", kernel=0, version="0002", action_default=_CAREFUL, action_online=_CAREFUL),
)


class Config(_Section, frozen=True):
    """The whole file."""

    terminal: TerminalSection
    host: HostSection
    limits: dict[str, LimitsSection]
    ledger: LedgerSection = LedgerSection()
    retention: RetentionSection = RetentionSection()
    socket: SocketSection = SocketSection()
    reader: ReaderSection = ReaderSection()
    contact: ContactSection | None = None
    display: DisplaySection = DisplaySection()
    pins: PinsSection | None = None
    sale: SaleSection = SaleSection()
    sync: SyncSection = SyncSection()
    stripe: StripeSection | None = None
    emv: EmvSection = EmvSection()
    aids: tuple[AidSection, ...] = STANDARD_AIDS
    ca_keys: tuple[CaKeySection, ...] = ()

    @property
    def currency(self) -> Currency:
        return currency(self.terminal.currency)

    def limit(self, name: str, code: str | None = None) -> Amount:
        """One of the amounts of a `LimitsSection`, in the terminal's currency unless said otherwise."""
        unit = currency(code or self.terminal.currency)
        return Amount.parse(getattr(self.limits[unit.code], name), unit)


def load(path: Path) -> Config:
    """Read and check a configuration file. Raises `ConfigError` with the place, the reason and the remedy."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}. Nothing was started. Name a readable file with --config, or create this one."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}. Nothing was started.") from error
    try:
        config = msgspec.convert(raw, Config, dec_hook=partial(_decode, path.absolute().parent), strict=True)
        _check(config)
    except (msgspec.ValidationError, MoneyError) as error:
        raise ConfigError(f"{path}: {error}. Nothing was started.") from error
    return config


def _decode(base: Path, kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return base / value  # a directory with everything in it may be moved
    raise ValueError(f"{value!r} is no {kind.__name__}")


def _check(config: Config) -> None:
    """What types cannot say: amounts that parse, and limits for the terminal's own currency."""
    if config.currency.code not in config.limits:
        raise MoneyError(f"[limits.{config.currency.code}] is missing: the terminal's currency needs its limits")
    for keys, state in ((config.ledger.keys, config.ledger.directory), (config.sync.keys, config.sync.directory)):
        if keys is not None and keys.absolute().is_relative_to(state.absolute()):
            raise MoneyError(f"keys in {keys} lie beside what they protect in {state}: name another directory")
    if config.host.enrol and config.host.client_certificate is not None:
        raise MoneyError("[host] enrol and client_certificate exclude each other: remove one of them")
    if config.sync.mode == "window" and not config.sync.windows:
        raise MoneyError('[sync] mode is "window", and there are no windows: name some, like windows = ["22:00-06:00"]')
    for text in config.sync.windows:
        if len(set(text.split("-"))) == 1:
            raise MoneyError(f"[sync] windows: {text!r} is empty; for a whole day use the mode immediate")
    for code in (code for aid in config.aids for code in aid.limits):
        if code not in config.limits:
            raise MoneyError(f"[aids.limits.{code}] needs [limits.{code}]: this terminal takes no {code} without it")
    for code in config.limits:
        if currency(code).code != code:
            raise MoneyError(f"[limits.{code}] must be written [limits.{currency(code).code}]")
        for name in ("transaction", "offline_transaction", "offline_sum"):
            config.limit(name, code)


def credentials(configured: Path | None) -> Path:
    """Where a service's keys are: the configured directory, or the one that systemd gives it. Raises `ConfigError`."""
    if configured is not None:
        return configured
    try:
        return Path(os.environ["CREDENTIALS_DIRECTORY"])
    except KeyError:
        raise ConfigError(
            "there are no keys: neither does systemd give credentials nor does the configuration name `keys`. "
            "Nothing was started. For development: payterm keys init DIRECTORY"
        ) from None

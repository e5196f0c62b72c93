"""The configuration file: whatever is wrong with it is said with its place, and nothing starts."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from terminal_rig import CONFIG, bureau

from terminal import emvsetup
from terminal.config import Config, ConfigError, OfflinePolicy, credentials, load
from terminal.money import EUR, JPY, Amount

GOOD: Final = CONFIG.format(
    directory="/nonexistent",
    sale="",
    more="",
    sealing="0a" * 32,
    answer="0b" * 32,
    ca_key="\n".join(f'{name} = "{value}"' for name, value in bureau().ca_public_key.record().items()),
)
MINIMAL: Final = f"""
[terminal]
id = "T-1"
merchant = "M-1"
country = 276
currency = "EUR"
[limits.EUR]
transaction = "500"
offline_transaction = "40"
offline_sum = "150"
[host]
url = "https://host.example"
sealing_fingerprint = "{"0a" * 32}"
answer_fingerprint = "{"0b" * 32}"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "payterm.toml"


def loaded(path: Path, text: str) -> Config:
    path.write_text(text, encoding="utf-8")
    return load(path)


def changed(before: str, after: str) -> str:
    assert GOOD.count(before) >= 1, before
    return GOOD.replace(before, after, 1)


def complaint(path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as error:
        loaded(path, text)
    assert error.value.exit_code == 2
    said = str(error.value)
    assert said.startswith(f"{path}: ")
    assert "Nothing was started." in said
    return said


def test_a_good_file_is_read(path: Path) -> None:
    config = loaded(path, GOOD)
    assert config.terminal.id == "T-0001"
    assert config.currency == EUR
    assert config.limit("offline_sum") == Amount(10_000, EUR)
    assert config.sale.offline is OfflinePolicy.DEFERRED
    assert config.ledger.directory == Path("/nonexistent/ledger")
    assert len(config.ca_keys) == 1
    emvsetup.build(config)


def test_what_is_left_out_has_a_default(path: Path) -> None:
    config = loaded(path, MINIMAL)
    assert config.ledger.directory == Path("/var/lib/payterm/ledger")
    assert config.socket.path == Path("/run/payterm/terminal.sock")
    assert config.sale.authorisation_timeout_ms == 8_000
    assert (config.ledger.keys, config.sync.keys) == (None, None)
    assert [(aid.aid[-1], aid.kernel) for aid in config.aids] == [("3", 3), ("4", 2), ("3", 0), ("4", 0)]
    emvsetup.build(config)


def test_a_second_currency_has_limits_of_its_own(path: Path) -> None:
    more = '\n[limits.JPY]\ntransaction = "50000"\noffline_transaction = "4000"\noffline_sum = "10000"\n'
    assert loaded(path, MINIMAL + more).limit("transaction", "JPY") == Amount(50_000, JPY)
    assert "decimals" in complaint(path, MINIMAL + more.replace('"4000"', '"40.00"'))


# Each of these is one mistake in a good file, and the words by which a person finds it.
WRONG: Final = {
    "an unknown section": ("[sale]", "[sail]", "sail"),
    "an unknown key": ("card_timeout_ms", "card_timeout", "card_timeout"),
    "an unknown key in a limit": ("offline_count = 3", "offline_number = 3", "$.limits"),
    "an unknown key in a list": ("rid =", "rit =", "$.ca_keys[0]"),
    "a missing section": ("[host]", "[socket2]", "socket2"),
    "a missing key": ('merchant = "M-0001"\n', "", "merchant"),
    "a word for a number": ("country = 276", 'country = "276"', "$.terminal.country"),
    "a number for a word": ('id = "T-0001"', "id = 1", "$.terminal.id"),
    "a fraction for an integer": ("journal_mib = 4", "journal_mib = 4.5", "$.ledger.journal_mib"),
    "a truth value for an integer": ("journal_mib = 4", "journal_mib = true", "$.ledger.journal_mib"),
    "a float for an amount": ('transaction = "500.00"', "transaction = 500.00", "$.limits"),
    "an amount with a sign": ('transaction = "500.00"', 'transaction = "-500.00"', "-500.00"),
    "an amount with too many decimals": ('transaction = "500.00"', 'transaction = "500.001"', "500.001"),
    "an amount that is none": ('offline_sum = "100.00"', 'offline_sum = "much"', "much"),
    "an amount beyond all": ('offline_sum = "100.00"', 'offline_sum = "100000000000.00"', "outside"),
    "a country out of range": ("country = 276", "country = 1000", "$.terminal.country"),
    "an unknown currency": ('currency = "EUR"', 'currency = "EUX"', "EUX"),
    "limits for another currency only": ("[limits.EUR]", "[limits.USD]", "[limits.EUR] is missing"),
    "an unknown currency in the limits": ("[limits.EUR]", "[limits.EUX]", "limits.EUR"),
    "a terminal id with a blank": ('id = "T-0001"', 'id = "T 0001"', "$.terminal.id"),
    "a terminal id with a line feed": ('id = "T-0001"', 'id = "T-0001\\n"', "$.terminal.id"),
    "a merchant with a line feed": ('merchant = "M-0001"', 'merchant = "M-0001\\n"', "$.terminal.merchant"),
    "an id that is too long": ('id = "T-0001"', f'id = "{"T" * 33}"', "$.terminal.id"),
    "an empty id": ('id = "T-0001"', 'id = ""', "$.terminal.id"),
    "an id in other digits": ('id = "T-0001"', 'id = "T-٠٠٠١"', "$.terminal.id"),
    "http": ("https://127", "http://127", "$.host.url"),
    "no host": ('"https://127.0.0.1:1"', '"https://"', "$.host.url"),
    "a short fingerprint": ("0a" * 32, "0a" * 31, "$.host.sealing_fingerprint"),
    "a fingerprint with a line feed": ("0a" * 32, "0a" * 32 + "\\n", "$.host.sealing_fingerprint"),
    "a fingerprint in capitals": ("0b" * 32, "0B" * 32, "$.host.answer_fingerprint"),
    "an unknown policy": ("[sale]", '[sale]\noffline = "always"', "$.sale.offline"),
    "a time-out of nothing": ("authorisation_timeout_ms = 1000", "authorisation_timeout_ms = 0", "$.sale"),
    "a time-out beyond all": ("authorisation_timeout_ms = 1000", "authorisation_timeout_ms = 600001", "$.sale"),
    "a negative count": ("offline_count = 3", "offline_count = -1", "offline_count"),
    "no age at all": ("offline_age_hours = 24", "offline_age_hours = 0", "offline_age_hours"),
    "half a byte in hex": ('index = "F0"', 'index = "F"', "$.ca_keys[0].index"),
    "hex with a line feed": ('index = "F0"', 'index = "F0\\n"', "$.ca_keys[0].index"),
    "the same key twice": ("country = 276", "country = 276\ncountry = 276", "line"),
    "no TOML": ("[terminal]", "[terminal", "line 1"),
}


@pytest.mark.parametrize(("before", "after", "place"), WRONG.values(), ids=WRONG.keys())
def test_a_mistake_is_said_with_its_place(path: Path, before: str, after: str, place: str) -> None:
    assert place in complaint(path, changed(before, after))


def test_a_path_that_is_none_is_said_with_its_place(path: Path) -> None:
    said = complaint(path, changed('directory = "/nonexistent/ledger"', "directory = 7"))
    assert "$.ledger.directory" in said


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\xff\xfe", "decode"), (b"", "terminal"), (b"\x00", "line 1")],
    ids=["no UTF-8", "empty", "zero"],
)
def test_what_is_no_configuration_at_all(path: Path, content: bytes, words: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load(path)


def test_a_file_that_is_not_there(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*Name a readable file with --config"):
        load(path)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)


def test_a_currency_in_small_letters_is_said_or_understood(path: Path) -> None:
    small = '\n[limits.usd]\ntransaction = "50"\noffline_transaction = "4"\noffline_sum = "10"\n'
    assert "usd" in complaint(path, MINIMAL + small)


@pytest.mark.parametrize("keys", ["/nonexistent/ledger", "/nonexistent/ledger/keys"])
def test_keys_do_not_lie_beside_what_they_protect(path: Path, keys: str) -> None:
    assert keys in complaint(path, changed("/nonexistent/keys", keys))


# ---- the EMV part


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('checksum = "', 'checksum = "00', "checksum"),
        ('modulus = "', 'modulus = "AA', "checksum"),
        ('rid = "A000000003"', 'rid = "A0000000"', "EMV"),
        ('index = "F0"', 'index = "F0F0"', "EMV"),
    ],
)
def test_a_ca_key_that_cannot_be_right_starts_nothing(path: Path, before: str, after: str, words: str) -> None:
    config = loaded(path, changed(before, after))
    with pytest.raises(ConfigError, match=rf"(?s){words}.*Nothing was started"):
        emvsetup.build(config)


@pytest.mark.parametrize(
    "aid",
    [
        'aid = "A0"\nkernel = 3',
        f'aid = "{"A0" * 17}"\nkernel = 3',
        'aid = "A000000003"\nkernel = 3\nttq = "2100"',
    ],
    ids=["a short AID", "a long AID", "a short TTQ"],
)
def test_an_application_that_cannot_be_right_starts_nothing(path: Path, aid: str) -> None:
    with pytest.raises(ConfigError):
        emvsetup.build(loaded(path, MINIMAL + f"\n[[aids]]\n{aid}\n"))


def test_a_terminal_without_applications_takes_no_card_and_says_so(path: Path) -> None:
    """Setting `aids` replaces the default."""
    config = loaded(path, MINIMAL + '\n[[aids]]\naid = "A0000000043060"\nkernel = 3\n')
    assert [combination.aid.hex().upper() for combination in emvsetup.build(config).combinations] == ["A0000000043060"]


# ---- keys


def test_configured_keys_come_before_systemds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/payterm")
    assert credentials(Path("/keys")) == Path("/keys")
    assert credentials(None) == Path("/run/credentials/payterm")


def test_without_keys_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(ConfigError, match=r"Nothing was started.*payterm keys init"):
        credentials(None)

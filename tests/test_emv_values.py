"""What values mean in words, a row for each way of reading one (EMV 4.4 Book 3, Annexes A and C; C-2, C-3, Annex A)."""

from __future__ import annotations

import pytest

from terminal.emv import tags
from terminal.emv.describe.decoding import Item, conversation, value_of


def explained(tag: int, value: str, kernel: int | None = None) -> str:
    """Everything that is said of it, in one line."""
    report = value_of(tag, bytes.fromhex(value), kernel=kernel, show=True)
    (item,) = report.items
    said = [item.text, *(f"{where}: {text}" for where, text in item.lines), item.problem]
    return " | ".join(part for part in said if part)


@pytest.mark.parametrize(
    ("tag", "kernel", "value", "expected"),
    [
        (0x4F, None, "315041592E5359532E4444463031", "the PSE"),
        (0x84, None, "325041592E5359532E4444463031", "the PPSE"),
        (0x84, None, "A000", "has 2 bytes"),
        (0x81, None, "000004E2", "1250 minor units"),
        (0x9F3C, None, "0978", "EUR"),
        (0x9F3B, None, "09780392", "EUR, JPY"),
        (0x9F3B, None, "0001", "001"),
        (0x9F42, None, "0001", "no currency"),
        (0x9F21, None, "150926", "15:09:26"),
        (0x9F21, None, "256100", "is no time"),
        (0x87, None, "81", "rank 1; the cardholder must confirm"),
        (0x87, None, "00", "no rank"),
        (0x88, None, "0A", "SFI 10"),
        (0x88, None, "1F", "no SFI"),
        (0x5F2D, None, "64656E6C", "German"),
        (0x5F2D, None, "646565", "is no list"),
        (0x9F11, None, "01", "ISO/IEC 8859-1"),
        (0x9F11, None, "11", "reserved"),
        (0x9F2A, None, "", "empty"),
        (0x9F2A, None, "02", "kernel 2, Mastercard"),
        (0x9F2A, None, "00", "by the RID"),
        (0x9F2A, None, "810978", "international kernel 810978"),
        (0x9F2A, None, "C10978", "domestic kernel C10978"),
        (0x9F2A, None, "C1", "too short"),
        (0x9F4D, None, "0B0A", "SFI 11, 10 records"),
        (0x9F0A, None, "0001030102030002020102", "id 0001: 010203 | id 0002: 0102"),
        (0x9F0A, None, "000105", "is cut short"),
        (0x9F4A, None, "82", "Application Interchange Profile"),
        (0x9F4A, None, "", "empty"),
        (0x9F4A, None, "9F", "is no list of tags"),
        (0x9F49, None, "9F3704", "Unpredictable Number (UN), 4 bytes"),
        (0x9F49, None, "9F37", "is no data object list"),
        (0x8E, None, "0000000000000000 2A03 3503 0903", "reserved for the payment system"),
        (0x8E, None, "0000000000000000 2A03 3503 09", "is no X, Y and rules"),
        (0x8E, None, "00000000000000", "has 7 bytes"),
        (0x8A, None, "5933", '"Y3"'),
        (0x9F35, None, "22", "merchant"),
        (0x9F35, None, "99", "reserved"),
        (0x91, None, "0102030405060708 3030", "ARC"),
        (0x91, None, "01020304 03800000", "CSU"),
        (0x91, None, "0102030405060708 00FF", "rest"),
        (0x91, None, "01020304050607", "not 8 to 16"),
        (0x9F10, None, "0F" + "A5" + "00" * 14 + "0F" + "00" * 15, "Common Core"),
        (0x9F10, None, "06010A03A00000", "Visa, format 0, 1 or 3"),
        (0x9F10, None, "06010A03A0000003010203", "discretionary: 010203"),
        (0x9F10, None, "1F1201" + "00" * 29, "18"),
        (0x9F10, 2, "0110A00000000000DAC00000000000000000", "DAC"),
        (0x9F6E, 2, "0276000030310102", "mobile phone"),
        (0x9F6E, 2, "02760000414201", "reserved"),
        (0x9F6E, 2, "0276800001", "proprietary: 01"),
        (0x9F6E, 2, "0276", "not 5 to 32"),
        (0x9F6E, 3, "20700000", "byte 1"),
        (0x9F69, 3, "0111223344000001", "card's UN: 11223344"),
        (0x9F69, 3, "0111223344000001", "rest: 01"),
        (0x9F69, 3, "01112233", "not 5 to 16"),
        (0xDF8129, 2, "10F0F000B0F0FF00", "approved"),
        (0xDF8129, 2, "30F0F020B8F00D05", "field off for 1300 ms"),
        (0xDF8129, 2, "30F0F020B8F00D05", "online PIN"),
        (0xDF8129, 2, "90F0F000B0F0FF00", "reserved"),
        (0xDF8129, 2, "10", "has 1 bytes"),
        (0xDF8116, 2, "2000000013" + "6465" + "00" * 6 + "00" + "00" * 8, "see phone"),
        (0xDF8116, 2, "0304000000" + "00" * 8 + "20" + "000000001250" + "0978", "balance 12.50 EUR"),
        (0xDF8115, 2, "0002009000FF", "CAM failed"),
        (0xDF8115, 2, "0101016985FF", "6985"),
        (0xDF8115, 2, "0F0F0F0000FF", "reserved"),
        (0xDF8131, 2, "0000010000012000", "DF4B & 000001 = 000001"),
        (0xDF8131, 2, "00000100000120", "no multiple of 8"),
        (0xDF810C, 2, "02", "kernel 2, Mastercard"),
        (0xDF8130, 2, "0D", "1300 ms"),
        (0xDF8132, 2, "0014", "2 ms"),
        (0x95, 2, "0000000001", "byte 5"),
        (0x95, 3, "0000000000", "no bit is set"),
        (0x95, None, "000000", "has 3 bytes"),
        (0x9F33, None, "", "empty"),
    ],
)
def test_what_a_value_means(tag: int, kernel: int | None, value: str, expected: str) -> None:
    assert expected.lower() in explained(tag, value, kernel).lower()


@pytest.mark.parametrize("kernel", [None, 2, 3])
@pytest.mark.parametrize("fill", [0x00, 0x12, 0x41, 0x99, 0xFF])
def test_every_object_says_something_of_every_value(kernel: int | None, fill: int) -> None:
    """Shortest, longest and impossible values of every known tag: an explanation or a problem, never a fault."""
    for number in KNOWN:
        definition = tags.lookup(number, kernel)
        if definition is None:
            continue
        for size in {0, 1, definition.length_min, min(definition.length_max, 40), 7, 10, 18, 22, 26}:
            (item,) = value_of(number, bytes((fill,)) * size, kernel=kernel).items
            assert isinstance(item, Item)
            assert item.name


KNOWN = sorted({int(tag) for table in (tags.Tag, tags.Kernel2Tag, tags.Kernel3Tag, tags.ActionCode) for tag in table})


@pytest.mark.parametrize(
    ("apdu", "expected"),
    [
        ("80CA9F1700", "GET DATA"),
        ("00840000", "GET CHALLENGE"),
        ("0020008008241234FFFFFFFFFF", "VERIFY"),
        ("841E000004AABBCCDD", "APPLICATION BLOCK"),
        ("80D000000A00000000125011111111", "RECOVER"),
        ("80EA0000041122334400", "RELAY"),
    ],
)
def test_what_a_command_is(apdu: str, expected: str) -> None:
    report = conversation([bytes.fromhex(apdu)])
    assert expected in " ".join(f"{item.label} {item.name} {item.text}" for item in report.items).upper()

"""From a card to a file and back: what was recorded says the same, byte for byte, when it is run."""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cards_rig import make_bureaus, seeded
from emv_rig import PAN, ChipCard, OverT0, OverT1, Pki, inserted, pump, setup

from drivers.interfaces import CardLost, Interface
from hwsim.cards.card import Card
from hwsim.cards.contact import Protocol as Transmission
from hwsim.cards.personalise import rack
from terminal.commands import replay as commands
from terminal.commands.base import Commands
from terminal.emv import contact
from terminal.emv.apdu import Command, Response
from terminal.emv.authentication import CaKey, CaKeys
from terminal.emv.configuration import CONTACT, Combination, Environment, Limits, RandomSelection, Request, Setup
from terminal.emv.outcome import CardRead, OnlineRequest
from terminal.money import EUR, Amount
from terminal.replay import formats, recording, run

NOW = datetime.datetime(2024, 6, 14, 12, 30, 15)  # noqa: DTZ001 - local time, as a terminal shows it
VISA, MASTERCARD = bytes.fromhex("A0000000031010"), bytes.fromhex("A0000000041010")
NAMES = (
    "visa-debit",
    "mastercard-debit",
    "declines",
    "blocked",
    "wrong-key",
    "broken-certificate",
    "mastercard-credit",
)


class Channel:
    """A card on a reader; from command `lost_at` on it is gone."""

    def __init__(
        self,
        apdu: Callable[[bytes], bytes],
        interface: Interface = Interface.CONTACT,
        lost_at: int | None = None,
    ) -> None:
        self._apdu, self._lost_at = apdu, lost_at
        self.interface = interface
        self.activation = b""
        self.sent: list[str] = []

    def transmit(self, command: bytes) -> bytes:
        if self._lost_at is not None and len(self.sent) >= self._lost_at:
            raise CardLost("gone")
        self.sent.append(command.hex().upper())
        return self._apdu(command)

    def close(self) -> None:
        """Nothing to switch off."""


@pytest.fixture(scope="module")
def issued() -> tuple[dict[str, Any], Setup]:
    """Cards of both schemes, and a terminal that knows them."""
    bureaus = make_bureaus()
    keys = [bureau.ca_public_key for bureau in bureaus.values()]
    contactless = [
        Combination(VISA, 3, Limits(contactless_transaction=50_000, ttq=bytes.fromhex("37000000"))),
        Combination(MASTERCARD, 2, Limits(contactless_transaction=50_000), {0xDF811F: b"\x08", 0xDF8119: b"\x08"}),
    ]
    chance = RandomSelection(threshold=0, target_percent=50, max_target_percent=50)
    contacts = [Combination(aid, CONTACT, Limits(terminal_floor=10_000, random=chance)) for aid in (VISA, MASTERCARD)]
    terminal = {0x9F1A: "0276", 0x9F33: "2028C8", 0x9F40: "6000000000", 0x9F35: "22", 0x9F1E: "3132333435363738"}
    configured = Setup(
        {tag: bytes.fromhex(value) for tag, value in terminal.items()},
        (*contactless, *contacts),
        CaKeys(CaKey(key.rid, key.index, key.modulus, key.exponent, key.checksum) for key in keys),
    )
    return rack(bureaus, seeded()), configured


def lent(seed: int = 3) -> Environment:
    chance = random.Random(seed)
    return Environment(lambda: chance.randbytes(4), lambda _: None, random_percent=lambda: chance.randint(1, 99))


def record(channel: Channel, configured: Setup, *, masked: bool = False, minor: int = 1250) -> formats.ReplayFile:
    ticks = itertools.count(step=1000)
    request = Request(Amount(minor, EUR), NOW.date(), NOW.time())
    return recording.record(
        channel,
        configured,
        request,
        lent(),
        clock=lambda: NOW,
        elapsed_us=lambda: next(ticks),
        masked=masked,
    )


def through_text(file: formats.ReplayFile) -> formats.ReplayFile:
    return formats.decode(formats.encode(file), formats.ReplayFile, "recorded")


def unmasked(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "tags"}


@pytest.mark.parametrize("transmission", Transmission)
@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_card_says_the_same_again(issued: Any, name: str, transmission: Transmission) -> None:
    cards, configured = issued
    card = Card(cards[name], seeded(), transmission)
    card.contact.reset(cold=True)
    channel = Channel(card.contact.apdu)
    answer = run.replay(through_text(record(channel, configured)))
    assert answer["mismatch"] is None
    assert answer["commands"] == channel.sent

    # The same card, asked by the kernel itself, with nothing of the replay in between.
    again = Card(cards[name], seeded(), transmission)
    again.contact.reset(cold=True)

    class Asked:
        def answer(self, command: Command) -> Response:
            return Response.decode(again.contact.apdu(command.encode()))

    request = Request(Amount(1250, EUR), NOW.date(), NOW.time())
    outcome, _ = pump(contact.run(configured, request, lent()), Asked())
    if isinstance(outcome, OnlineRequest):
        assert outcome.resume is not None
        outcome, _ = pump(outcome.resume(None), Asked())
    name_of = {"Approved": "approved", "Declined": "declined", "EndApplication": "end_application"}
    assert (answer["outcome"], answer["reason"]) == (
        name_of[type(outcome).__name__],
        getattr(outcome, "reason", None),
    )
    read = getattr(outcome, "card", None)
    if isinstance(read, CardRead):
        assert answer["cryptogram"] == read.cryptogram.hex().upper()
        assert answer["tvr"] == read.tags[0x95].hex().upper()
        assert answer["oda"]["result"] == read.oda.status.value


@pytest.mark.parametrize("name", ["visa-debit", "mastercard-debit"])
def test_a_recorded_tap(issued: Any, name: str) -> None:
    cards, configured = issued
    card = Card(cards[name], seeded())
    card.contactless.reset()
    channel = Channel(card.contactless.apdu, Interface.CONTACTLESS)
    file = through_text(record(channel, configured))
    answer = run.replay(file)
    assert (answer["mismatch"], answer["outcome"], answer["commands"]) == (None, "online_request", channel.sent)
    assert all(exchange.elapsed_us == 1000 for exchange in file.exchanges)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("interface", Interface)
def test_a_masked_recording_agrees_with_itself(issued: Any, name: str, interface: Interface) -> None:
    cards, configured = issued
    card = Card(cards[name], seeded())
    if interface is Interface.CONTACT:
        card.contact.reset(cold=True)
        channel = Channel(card.contact.apdu)
    else:
        card.contactless.reset()
        channel = Channel(card.contactless.apdu, interface)
    file = record(channel, configured, masked=True)
    text = formats.encode(file).decode()
    pan = cards[name].pan.digits
    assert pan not in text
    assert pan.encode().hex().upper() not in text
    answer = run.replay(through_text(file), show_pan=True)
    assert answer["mismatch"] is None
    assert pan not in json.dumps(answer)
    assert answer["oda"] | {"recovered": None} == {
        "method": None, "result": "not_performed", "reason": "masked", "recovered": None,
    }  # fmt: skip


@pytest.mark.parametrize("lost_at", range(0, 12, 2))
def test_a_card_that_leaves_while_it_is_recorded(issued: Any, lost_at: int) -> None:
    cards, configured = issued
    card = Card(cards["visa-debit"], seeded())
    card.contact.reset(cold=True)
    file = record(Channel(card.contact.apdu, lost_at=lost_at), configured)
    assert file.exchanges[-1].response is None
    answer = run.replay(through_text(file))
    assert (answer["mismatch"], answer["outcome"], answer["reason"]) == (None, "try_again", "card_lost")


@pytest.mark.parametrize("over", [OverT0, OverT1])
def test_what_the_protocol_adds_is_part_of_the_conversation(over: Any) -> None:
    """61xx and 6Cxx over T=0; over T=1 a SELECT that has to be sent again, with Le."""
    card = over(ChipCard(kinds=("ARQC", "AAC")))
    channel = Channel(lambda raw: _raw(card.answer(_command(raw))))
    file = record(channel, setup(inserted(), pki=Pki()))
    answer = run.replay(through_text(file))
    assert (answer["mismatch"], answer["commands"]) == (None, channel.sent)
    repeated = [first for first, second in itertools.pairwise(channel.sent) if second == f"{first}00"]
    assert bool(repeated) == (over is OverT1)


def test_a_number_that_cannot_be_taken_out_is_not_written() -> None:
    """The card repeats it half a byte further, in an object that nobody knows."""
    hidden = bytes.fromhex(f"0{PAN}0")
    channel = Channel(lambda raw: _raw(_with(ChipCard(changes={"DF01": hidden}), raw)))
    with pytest.raises(recording.CannotMask, match="Nothing was written") as caught:
        record(channel, setup(inserted(), pki=Pki()), masked=True)
    assert PAN not in str(caught.value)
    assert record(channel, setup(inserted(), pki=Pki())).exchanges


def _with(card: ChipCard, raw: bytes) -> Response:
    return card.answer(_command(raw))


def _command(raw: bytes) -> Command:
    cla, ins, p1, p2, *body = raw
    if len(body) <= 1:
        return Command(cla, ins, p1, p2, le=body[0] if body else None)
    size = body[0]
    return Command(cla, ins, p1, p2, bytes(body[1 : 1 + size]), body[1 + size] if len(body) > 1 + size else None)


def _raw(response: Response) -> bytes:
    return response.data + response.sw.to_bytes(2, "big")


class Reader:
    """A contact reader with a card already in it, or with none."""

    name = "reader"
    interface = Interface.CONTACT

    def __init__(self, channel: Channel | None) -> None:
        self._channel = channel

    def open(self) -> None:
        """Nothing to find."""

    def wait_for_card(self, timeout_ms: int) -> Channel | None:
        return self._channel

    def close(self) -> None:
        """Nothing to release."""


def command_line(path: Path, channel: Channel | None, *more: str, config: Path) -> int:
    root = argparse.ArgumentParser()
    root.add_argument("--config", type=Path, default=config)
    commands.add(Commands(root.add_subparsers(required=True)))
    options = root.parse_args(["record", str(path), *more])
    code: int = options.command(options, lambda _: SimpleNamespace(readers=(Reader(channel),)))
    return code


def test_the_command(issued: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards, configured = issued
    monkeypatch.setattr("terminal.emvsetup.build", lambda config: configured)
    terminal = SimpleNamespace(currency="EUR")
    monkeypatch.setattr("terminal.config.load", lambda path: SimpleNamespace(terminal=terminal))
    path = tmp_path / "card.json"
    card = Card(cards["visa-debit"], seeded())
    card.contact.reset(cold=True)
    assert command_line(path, Channel(card.contact.apdu), "--amount", "12.50", config=tmp_path) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    answer = run.replay(formats.load(path, formats.ReplayFile))
    assert (answer["mismatch"], answer["tags"]["9F02"], answer["oda"]["reason"]) == (None, "000000001250", "masked")
    with pytest.raises(commands.RecordingFailed, match="not written over"):
        command_line(path, None, config=tmp_path)
    other = tmp_path / "other.json"
    for more, says in (((), "no card came"), (("--interface", "contactless"), "no such reader")):
        with pytest.raises(commands.RecordingFailed, match=says):
            command_line(other, None, *more, config=tmp_path)
    assert not other.exists()

"""What holds whatever a card says: the pump that counts, and the judge of outcomes. For tests of hostile cards."""

from __future__ import annotations

from collections.abc import Callable

from emv_rig import tlv

from terminal.emv.apdu import GET_RESPONSES_MAX, CardRemoved, Command, Exchange, Response
from terminal.emv.contact_selection import CANDIDATES_MAX, DIRECTORY_RECORDS_MAX, OCCURRENCES_MAX
from terminal.emv.outcome import (
    Approved,
    Declined,
    EndApplication,
    IssuerAnswer,
    OdaMethod,
    OnlineRequest,
    Outcome,
    SelectNext,
    Torn,
    TryAgain,
    TryAnotherInterface,
)
from terminal.emv.records import RECORDS_MAX

# Selection, an application or two dozen of them, records and the rest; each over T=0 with its GET RESPONSEs.
COMMANDS_MAX = (DIRECTORY_RECORDS_MAX + OCCURRENCES_MAX + 2 * CANDIDATES_MAX + RECORDS_MAX + 20) * (
    3 + 2 * GET_RESPONSES_MAX
)
COMMAND_BYTES_MAX = 261  # header, Lc, 255 bytes, Le
ANSWER = IssuerAnswer(b"00", bytes(8), (tlv("86", bytes.fromhex("84240000")),), (b"\x86",))
Raw = Callable[[int, Command], "bytes | None"]


def drive(started: Exchange[Outcome], answer: Raw) -> tuple[Outcome, int]:
    """Pump `started` with raw answers, None for a card that leaves; its outcome, and how many commands it took."""
    count = 0
    try:
        command = next(started)
        while True:
            count += 1
            assert count <= COMMANDS_MAX, "the kernel does not come to an end"
            assert 4 <= len(command.encode()) <= COMMAND_BYTES_MAX
            raw = answer(count - 1, command)
            command = started.throw(CardRemoved()) if raw is None else started.send(Response.decode(raw))
    except StopIteration as stop:
        outcome: Outcome = stop.value
        return outcome, count


def finish(outcome: Outcome, answer: Raw, count: int, of_the_host: IssuerAnswer | None = ANSWER) -> Outcome:
    """Give an online request of contact its answer, from the same card."""
    if isinstance(outcome, OnlineRequest) and outcome.resume is not None:
        outcome, _ = drive(outcome.resume(of_the_host), lambda at, command: answer(at + count, command))
        assert isinstance(outcome, Approved | Declined | Torn)
    return outcome


def check(outcome: Outcome) -> None:
    """What holds whatever the card said."""
    match outcome:
        case Approved(card):
            assert card.cid & 0xC0 == 0x40
            assert len(card.cryptogram) == 8
            # What a failed SDA or DDA is worth, the action codes say; a combined signature that fails is a false card.
            assert (card.oda.method, card.oda.reason) != (OdaMethod.CDA, "signature")
        case OnlineRequest(card):
            # Kernel 3 sends a TC to the host, too: where the terminal wants that, or the card could not be verified.
            assert card.cid & 0xC0 in ({0x40, 0x80} if card.kernel == 3 else {0x80})
        case Declined(card=card):
            assert card is not None
            assert card.tags[0x9F02] == bytes.fromhex("000000001250")
        case TryAgain() | Torn() | EndApplication() | TryAnotherInterface():
            assert outcome.reason
        case SelectNext():
            raise AssertionError("this outcome is entry point's own")

"""A replay file, made from a card on a reader: a whole transaction, at the end of which nothing was sold.

The terminal's own settings are used, and what they were is written down with what was said. An online request is
answered as if there were no way to the host, because nobody is asked.

A recording is masked unless the whole card number is wanted. A card whose certificate was taken out cannot be
authenticated when the file is run, and a terminal that did not authenticate says so to the card: for the recording to
agree with itself, the terminal does without authentication from the start.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, TypeAlias

from drivers.interfaces import CardChannel, CardLost, Interface
from terminal.emv import configuration, contact, entry_point
from terminal.emv.apdu import Response
from terminal.emv.authentication import CaKey, CaKeys
from terminal.emv.configuration import CONTACT, Combination, Environment, Request, Setup
from terminal.emv.outcome import OnlineRequest
from terminal.emv.tags import Kernel2Tag, Tag
from terminal.replay import formats, masking, run, settings
from terminal.replay.formats import UnusableFile
from terminal.replay.script import pump

_AUTHENTICATES: Final = 0xCC  # SDA, DDA, CDA, XDA in byte 3 of 9F33
_MORE: Final = 0x61

_Said: TypeAlias = tuple[bytes, bytes | None, int]  # command, response, how long it took


class CannotMask(UnusableFile):
    """The card's number stands where it cannot be taken out."""


def record(
    channel: CardChannel,
    setup: Setup,
    request: Request,
    environment: Environment,
    *,
    clock: Callable[[], datetime.datetime],
    elapsed_us: Callable[[], int],
    masked: bool = True,
) -> formats.ReplayFile:
    """Carry a transaction out and write it down. `elapsed_us` is a clock that only ever goes forward.

    Raises `ReaderFault`, and `CannotMask`: then nothing of the card was written.
    """
    now = clock()
    if masked:
        setup = _without_authentication(setup)
    tape = _Tape(channel, elapsed_us)
    numbers: list[bytes] = []
    percents: list[int] = []
    environment = replace(
        environment,
        unpredictable_number=_kept(environment.unpredictable_number, numbers),
        random_percent=_kept(environment.random_percent, percents) if environment.random_percent else None,
    )
    inserted = channel.interface is Interface.CONTACT
    if inserted:
        outcome = pump(contact.run(setup, request, environment), tape.transmit)
        if isinstance(outcome, OnlineRequest) and outcome.resume is not None:
            pump(outcome.resume(None), tape.transmit)
    else:
        pump(entry_point.run(setup, request, environment), tape.transmit)
    file = formats.ReplayFile(
        interface="contact" if inserted else "contactless",
        terminal=_objects(setup.terminal),
        transaction=_objects(_transaction(request)),
        # Inserted cards take any of them (`contact_selection`); what is for inserted cards alone is never tapped.
        aids=[_application(each) for each in setup.combinations if inserted or each.kernel != CONTACT],
        capks=[_ca_key(each) for each in setup.ca_keys],
        revoked=[
            formats.Revoked(rid=_hex(each.rid), index=f"{each.index:02X}", serial=_hex(each.serial))
            for each in sorted(setup.revoked, key=lambda each: (each.rid, each.index, each.serial))
        ],
        unpredictable_numbers=[_hex(number) for number in numbers],
        random=percents if environment.random_percent is not None else None,
        clock=now.replace(tzinfo=None).isoformat(timespec="seconds"),
        host=None,
        exchanges=tape.exchanges(masked=masked),
        masked=masked,
    )
    if run.replay(file)["mismatch"] is not None:
        raise CannotMask(
            "the recording does not agree with itself: the card's number is part of what the card was asked. Nothing "
            "was written, nothing was sold. Record with the whole number, if this is a test card."
        )
    return file


class _Tape:
    """Carries commands to the card, and keeps what was said."""

    def __init__(self, channel: CardChannel, elapsed_us: Callable[[], int]) -> None:
        self._channel = channel
        self._elapsed_us = elapsed_us
        self._said: list[_Said] = []

    def transmit(self, command: bytes) -> Response | None:
        start = self._elapsed_us()
        response: bytes | None
        try:
            response = self._channel.transmit(command)
        except CardLost:
            response = None
        elapsed_us = max(0, self._elapsed_us() - start)
        self._said.append((command, response, elapsed_us))
        return None if response is None else Response.decode(response, elapsed_us)

    def exchanges(self, *, masked: bool) -> list[formats.Exchange]:
        """What was said. Raises `CannotMask`."""
        replacement = masking.Replacement(_data(self._said) if masked else ())
        said = [
            (replacement.apply(command), None if response is None else replacement.apply(response), elapsed_us)
            for command, response, elapsed_us in self._said
        ]
        if any(replacement.leaks(data) for data in (*_data(said), *(command for command, _, _ in said))):
            raise CannotMask(
                "the card's number stands in places that are not known to hold it. Nothing was written, nothing was "
                "sold. Record with the whole number, if this is a test card."
            )
        return [
            formats.Exchange(
                command=_hex(command), response=None if response is None else _hex(response), elapsed_us=elapsed_us
            )
            for command, response, elapsed_us in said
        ]


def _data(said: Iterable[_Said]) -> Iterator[bytes]:
    """The data of each response, what came in pieces put together."""
    pieces = b""
    for _, response, _ in said:
        if response is None or len(response) < 2:
            continue
        pieces += response[:-2]
        if response[-2] != _MORE:
            yield pieces
            pieces = b""


def _kept(source: Callable[[], Any], into: list[Any]) -> Callable[[], Any]:
    def draw() -> Any:
        into.append(source())
        return into[-1]

    return draw


def _without_authentication(setup: Setup) -> Setup:
    terminal = dict(setup.terminal)
    if capabilities := terminal.get(Tag.TERMINAL_CAPABILITIES):
        terminal[Tag.TERMINAL_CAPABILITIES] = capabilities[:2] + bytes((capabilities[2] & ~_AUTHENTICATES & 0xFF,))
    combinations = tuple(
        replace(each, tags={**each.tags, int(Kernel2Tag.SECURITY_CAPABILITY): b"\x00"})
        if Kernel2Tag.SECURITY_CAPABILITY in each.tags
        else each
        for each in setup.combinations
    )
    return replace(setup, terminal=terminal, combinations=combinations, ca_keys=CaKeys())


def _transaction(request: Request) -> dict[int, bytes]:
    return settings.stated(request) | {
        int(Tag.TRANSACTION_CURRENCY_EXPONENT): configuration.bcd(request.amount.currency.exponent, 1),
        int(Tag.TRANSACTION_DATE): bytes.fromhex(f"{request.date:%y%m%d}"),
        int(Tag.TRANSACTION_TIME): bytes.fromhex(f"{request.time:%H%M%S}"),
        **request.objects,
    }


def _application(combination: Combination) -> formats.Application:
    limits = combination.limits
    return formats.Application(
        aid=_hex(combination.aid),
        partial=combination.partial,
        kernel=None if combination.kernel == CONTACT else f"{combination.kernel:02X}",
        tags=_objects(combination.tags),
        limits=formats.Limits(
            status_check=limits.status_check,
            zero_amount_allowed=limits.zero_amount_allowed,
            contactless_transaction=limits.contactless_transaction,
            contactless_floor=limits.contactless_floor,
            terminal_floor=limits.terminal_floor,
            cvm_required=limits.cvm_required,
            ttq=None if limits.ttq is None else _hex(limits.ttq),
            extended_selection=limits.extended_selection,
            transaction_types=(
                None
                if limits.transaction_types is None
                else [f"{each:02X}" for each in sorted(limits.transaction_types)]
            ),
            random=(
                None
                if limits.random is None
                else formats.Random(
                    threshold=limits.random.threshold,
                    target_percent=limits.random.target_percent,
                    max_target_percent=limits.random.max_target_percent,
                )
            ),
        ),
    )


def _ca_key(key: CaKey) -> formats.CaPublicKey:
    return formats.CaPublicKey(
        rid=_hex(key.rid),
        index=f"{key.index:02X}",
        modulus=_hex(key.modulus),
        exponent=_hex(key.exponent),
        checksum=None if key.checksum is None else _hex(key.checksum),
    )


def _objects(values: Mapping[int, bytes]) -> formats.Objects:
    return {f"{int(tag):02X}": _hex(value) for tag, value in values.items()}


def _hex(value: bytes) -> str:
    return value.hex().upper()

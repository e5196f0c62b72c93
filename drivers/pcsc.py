"""The contact reader: any chip card reader that PC/SC knows, through pyscard and the system's pcscd.

pcscd powers the card, negotiates T=0 or T=1 and carries what it is given. This module finds the reader, holds the card
for itself alone while it is in use, and turns PC/SC's result codes into the few errors of `interfaces`; after a fault
of the reader or of pcscd nothing is kept, so that `open` starts afresh. It works on `smartcard.scard`, pyscard's thin
layer, in which every call answers with its result code: the objects above it keep a context of their own beyond the
end of the pcscd that gave it.

Status words are left to whoever sends the command, and so is what T=0 makes of a command (EMV 4.4 Book 1, 9.3): neither
pcscd nor this module sends GET RESPONSE, or a command again with another Le. The wait for an answer to a command is
bounded by the reader's driver in pcscd, which knows the waiting times that the card asked for.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from smartcard import scard

from drivers.interfaces import CardLost, Interface, ReaderFault, ReaderMissing

_SERVICE_SOCKET = "/run/pcscd/pcscd.comm"  # unless PCSCLITE_CSOCK_NAME says otherwise

_SLICE_MS = 1000  # of a longer wait: Python handles signals only between calls
_CODE = 0xFFFF_FFFF  # PC/SC's results are 32 bits wide; pyscard's may be negative

_PROTOCOLS = scard.SCARD_PROTOCOL_T0 | scard.SCARD_PROTOCOL_T1
_PCI = {scard.SCARD_PROTOCOL_T0: scard.SCARD_PCI_T0, scard.SCARD_PROTOCOL_T1: scard.SCARD_PCI_T1}
_NUMBER = {scard.SCARD_PROTOCOL_T0: 0, scard.SCARD_PROTOCOL_T1: 1}

_NO_READER_STATES = scard.SCARD_STATE_UNKNOWN | scard.SCARD_STATE_UNAVAILABLE | scard.SCARD_STATE_IGNORE


def _codes(*names: str) -> frozenset[int]:
    return frozenset(getattr(scard, f"SCARD_{name}") & _CODE for name in names)


_CARD_GONE = _codes("W_REMOVED_CARD", "E_NO_SMARTCARD", "E_NOT_TRANSACTED", "E_COMM_DATA_LOST", "W_RESET_CARD")
_CARD_MUTE = _codes(
    "W_UNRESPONSIVE_CARD", "W_UNPOWERED_CARD", "W_UNSUPPORTED_CARD", "E_CARD_UNSUPPORTED", "E_INVALID_ATR",
    "E_UNKNOWN_CARD", "E_PROTO_MISMATCH",
)  # fmt: skip
_READER_GONE = _codes("E_UNKNOWN_READER", "E_READER_UNAVAILABLE", "E_NO_READERS_AVAILABLE")
_SERVICE_GONE = _codes("E_NO_SERVICE", "E_SERVICE_STOPPED", "F_COMM_ERROR", "E_INVALID_HANDLE")
_REFUSED = _codes("E_NO_ACCESS", "W_SECURITY_VIOLATION")
_IN_USE = _codes("E_SHARING_VIOLATION")


class PcscError(Exception):
    """A call of PC/SC that did not succeed. It leaves this module only as the cause of another."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call}: {scard.SCardGetErrorMessage(code)} (0x{code:08X})")
        self.code = code


class PcscReader:
    """A contact reader. Implements `interfaces.CardReader`.

    `name` is the reader's name as PC/SC has it, or any part of it that fits one reader only; None takes the only reader
    that there is.
    """

    def __init__(self, name: str | None = None) -> None:
        self._wanted = name
        self._found: str | None = None
        self._context: int | None = None
        self._card: int | None = None
        self._channel: PcscChannel | None = None

    @property
    def name(self) -> str:
        return self._found or self._wanted or "contact reader"

    @property
    def interface(self) -> Interface:
        return Interface.CONTACT

    def open(self) -> None:
        self.close()
        with self._faults():
            self._context = _call(scard.SCardEstablishContext, scard.SCARD_SCOPE_USER)
            self._found = self._choose(_list_readers(self._context))

    def wait_for_card(self, timeout_ms: int) -> PcscChannel | None:
        """See `CardReader`. A card that does not answer is lost at every call, until it is taken out."""
        self.release()
        with self._faults():
            if not self._wait_until(present=True, timeout_ms=timeout_ms):
                return None
            self._card, protocol = _call(
                scard.SCardConnect, self._context, self._found, scard.SCARD_SHARE_EXCLUSIVE, _PROTOCOLS
            )
            self._channel = PcscChannel(self, self._answer_to_reset(), protocol)
        return self._channel

    def wait_for_removal(self, timeout_ms: int) -> bool:
        """See `CardReader`. Ends the channel: a card is without power when it is drawn."""
        self.release()
        with self._faults():
            return self._wait_until(present=False, timeout_ms=timeout_ms)

    def close(self) -> None:
        self.release()
        context, self._context = self._context, None
        if context is not None:
            scard.SCardReleaseContext(context)  # of a pcscd that is gone, it fails: there is nothing left to release

    # ---- for the channel

    def is_current(self, channel: PcscChannel) -> bool:
        """Whether this card is still the one that was activated."""
        return self._channel is channel

    def release(self) -> None:
        """End the activation, if there is one: the card is powered off, others may use it."""
        self._channel = None
        card, self._card = self._card, None
        if card is not None:
            scard.SCardDisconnect(card, scard.SCARD_UNPOWER_CARD)  # fails when card or pcscd is gone: no power either

    def transmit(self, command: bytes, protocol: int) -> bytes:
        with self._faults():
            return bytes(_call(scard.SCardTransmit, self._card, _PCI[protocol], list(command)))

    def reset(self, *, cold: bool) -> tuple[bytes, int]:
        """Reset the card: its ATR and PC/SC's word for the protocol."""
        how = scard.SCARD_UNPOWER_CARD if cold else scard.SCARD_RESET_CARD
        with self._faults():
            protocol = _call(scard.SCardReconnect, self._card, scard.SCARD_SHARE_EXCLUSIVE, _PROTOCOLS, how)
            return self._answer_to_reset(), protocol

    def _answer_to_reset(self) -> bytes:
        _, _, _, atr = _call(scard.SCardStatus, self._card)
        return bytes(atr)

    # ---- the slot

    def _wait_until(self, *, present: bool, timeout_ms: int) -> bool:
        if self._context is None:
            raise ReaderFault(f"{self.name} is not open.")
        deadline_s = time.monotonic() + timeout_ms / 1000
        seen, wait_ms = scard.SCARD_STATE_UNAWARE, 0  # the first call tells how things are, the others wait for news
        while True:
            seen = self._slot(seen, wait_ms)
            if bool(seen & scard.SCARD_STATE_PRESENT) is present:
                return True
            left_ms = round((deadline_s - time.monotonic()) * 1000)
            if left_ms <= 0:
                return False
            wait_ms = min(left_ms, _SLICE_MS)

    def _slot(self, seen: int, wait_ms: int) -> int:
        """The slot's state, as soon as it is another than `seen`."""
        try:
            [(_, state, _)] = _call(scard.SCardGetStatusChange, self._context, wait_ms, [(self._found, seen)])
        except PcscError as error:
            if error.code == scard.SCARD_E_TIMEOUT & _CODE:
                return seen
            raise
        if state & _NO_READER_STATES:
            raise PcscError("SCardGetStatusChange", scard.SCARD_E_READER_UNAVAILABLE & _CODE)
        return int(state & ~scard.SCARD_STATE_CHANGED)

    # ---- the reader

    def _choose(self, names: list[str]) -> str:
        listed = ", ".join(f'"{name}"' for name in names)
        if self._wanted is None:
            fitting = names
        elif self._wanted in names:
            fitting = [self._wanted]
        else:
            fitting = [name for name in names if self._wanted.casefold() in name.casefold()]
        match names, fitting:
            case _, [name]:
                return name
            case [], _:
                raise ReaderMissing("There is no chip card reader. Plug it in; check that pcscd has a driver for it.")
            case _, []:
                raise ReaderMissing(f'There is no chip card reader "{self._wanted}". Connected: {listed}.')
            case _:
                raise ReaderMissing(f"There are several chip card readers. Name one in the configuration: {listed}.")

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """Whatever PC/SC reports in here ends the activation, and a fault of the reader also the connection to it."""
        try:
            yield
        except PcscError as error:
            self._raise(error)
        except ReaderMissing:
            self.close()
            raise

    def _raise(self, error: PcscError) -> NoReturn:
        code = error.code
        if code in _CARD_GONE:
            self.release()
            raise CardLost("The card was removed before it was done. Insert it again and leave it in.") from error
        if code in _CARD_MUTE:
            self.release()
            raise CardLost(
                "The card does not answer. Check that the chip side is in, that the chip is clean, and insert it again."
            ) from error
        self.close()
        if code in _READER_GONE:
            raise ReaderMissing(
                f"{self.name} was unplugged, or never there. No chip can be read until it is plugged in."
            ) from error
        if code in _IN_USE:
            raise ReaderFault(
                f"{self.name}: another program holds the card. No chip can be read until it lets go; stop that program."
            ) from error
        if code in _REFUSED or (code in _SERVICE_GONE and _socket_is_closed_to_us()):
            raise ReaderFault(
                "pcscd refuses this user. No chip can be read; let the service's user access pcscd (its socket, and "
                "where there is polkit the rules for org.debian.pcsc-lite)."
            ) from error
        if code in _SERVICE_GONE:
            raise ReaderFault(
                "pcscd, the smart card service, does not run or was restarted. No chip can be read until it is opened "
                "again; if it does not recover: systemctl start pcscd.socket."
            ) from error
        raise ReaderFault(
            f"{self.name} does not work as it should: {error}. No chip can be read until it does; if it does not "
            "recover when it is opened again, unplug the reader and plug it in."
        ) from error


class PcscChannel:
    """A card in the slot, powered. Implements `interfaces.CardChannel`."""

    def __init__(self, reader: PcscReader, atr: bytes, protocol: int) -> None:
        self._reader = reader
        self._atr = atr
        self._protocol = protocol

    @property
    def interface(self) -> Interface:
        return Interface.CONTACT

    @property
    def activation(self) -> bytes:
        return self._atr

    @property
    def protocol(self) -> int:
        """0 for T=0, 1 for T=1."""
        return _NUMBER[self._protocol]

    def transmit(self, command: bytes) -> bytes:
        self._check()
        response = self._reader.transmit(command, self._protocol)
        if len(response) < 2:
            self._reader.release()
            raise CardLost("The card was lost: an answer without a status word. Insert it again.")
        return response

    def reset(self, *, cold: bool) -> bytes:
        """Reset the card, warm or (power off and on) cold; its ATR. Raises `CardLost` when it does not answer.

        `activation` and `protocol` are then those of the new ATR (EMV 4.4 Book 1, 6.1.3 and 8.1).
        """
        self._check()
        self._atr, self._protocol = self._reader.reset(cold=cold)
        return self._atr

    def close(self) -> None:
        if self._reader.is_current(self):
            self._reader.release()

    def _check(self) -> None:
        if not self._reader.is_current(self):
            raise CardLost("The card is no longer in use. Insert it again.")


def _call(function: Any, *arguments: Any) -> Any:
    """Call PC/SC: what it answers beside the result code, which must be success."""
    result = function(*arguments)
    code, *values = result if isinstance(result, list | tuple) else [result]
    if code != scard.SCARD_S_SUCCESS:
        raise PcscError(function.__name__, code & _CODE)
    return values[0] if len(values) == 1 else values


def _list_readers(context: int) -> list[str]:
    try:
        return list(_call(scard.SCardListReaders, context, []))
    except PcscError as error:
        if error.code == scard.SCARD_E_NO_READERS_AVAILABLE & _CODE:
            return []
        raise
    except SystemError as error:  # what pyscard makes of a pcscd that ended since the context was made
        raise PcscError("SCardListReaders", scard.SCARD_E_NO_SERVICE & _CODE) from error


def _socket_is_closed_to_us() -> bool:
    socket = Path(os.environ.get("PCSCLITE_CSOCK_NAME", _SERVICE_SOCKET))
    return socket.exists() and not os.access(socket, os.W_OK)

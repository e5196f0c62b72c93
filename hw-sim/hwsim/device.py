"""The device that a person holds, in a process of its own: the reader's field, a rack of cards, the panel.

It outlives the terminal, as real hardware does: kill the terminal and the last picture stays on the panel. In its
directory it leaves `nfc` (the reader's serial line), `oled.sock` (the display's bus), `gpio.sock` (the header's pins)
and `device.sock`, on which a person or a test presents cards, presses keys, breaks the reader and looks at the panel.
The calls are those of `terminal.control`.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from PIL import Image

from drivers.interfaces import DISPLAY_SIZE_PX, Key
from hwsim.cards.card import Card
from hwsim.cards.iso14443 import ProximityCard
from hwsim.cards.misbehaviour import Misbehaviour
from hwsim.cards.profile import CardProfile
from hwsim.gpio import Board
from hwsim.pn532 import Disturbance, Pn532
from hwsim.ssd1306 import Ssd1306, serve_bus
from hwsim.vpcd import ContactFault, VirtualReader, unavailable
from terminal.clock import system_entropy
from terminal.control import Call, CallRefused, ControlClient, ControlServer, Role, Roles

_log = logging.getLogger(__name__)

PAGE: Final = 16  # pictures in one answer, which is one line of the socket
PICTURES_MAX: Final = 512  # what a long demonstration shows; older ones are forgotten
WAIT_MS_MAX: Final = 60_000
_FINGER_MS: Final = 45  # down and up again as fast as people type; longer than the contact bounces
_BOUNCE_SEED: Final = 4
_GPO_NUMBER: Final = 3  # SELECT PPSE, SELECT, GET PROCESSING OPTIONS
_STALLING_EXTENSIONS: Final[tuple[int, ...]] = (59,) * 1_000  # more than any reader grants
_SLOW_EXTENSIONS: Final = (59,)  # 59 times the frame waiting time of 39 ms


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Present(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A card to bring into the field, and how its tap goes wrong (see `Disturbance`)."""

    card: str
    pulled_after_apdu: int | None = None
    torn_at_apdu: int | None = None
    insert: bool = False  # into the contact reader, in place of tapping it
    slow: bool = False  # asks for about two seconds more before it answers GET PROCESSING OPTIONS


class Watch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    seen: int = 0
    wait_ms: Annotated[int, msgspec.Meta(ge=0, le=WAIT_MS_MAX)] = 0


class Press(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys to press one after the other, by their names on the keypad."""

    keys: list[str]
    hold_ms: Annotated[int, msgspec.Meta(ge=0, le=5_000)] = 0


class Break(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    fault: str  # unplug, wedge or babble


@dataclass(frozen=True, slots=True)
class Picture:
    """What stood on the panel: its number, when (monotonic seconds of this machine), and the image."""

    number: int
    at_s: float
    image: Image.Image


class Device:
    """Reader, cards and panel."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._reader = Pn532(directory / "nfc")
        self._panel = _WatchedPanel(self._picture_written)
        self._changed = threading.Condition()
        self._pictures: deque[Picture] = deque(maxlen=PICTURES_MAX)
        self._number = 0
        self._bus = _listen(directory / "oled.sock")
        self._board = Board(bounce=random.Random(_BOUNCE_SEED))
        self._pins = _listen(directory / "gpio.sock")
        self._slot = VirtualReader(directory / "pcsc")
        self._cards: dict[str, Card] = {}
        for path in sorted((directory / "cards").glob("*.json")):
            self._cards[path.stem] = Card(CardProfile.load(path), system_entropy)

    def serve(self, stop: threading.Event) -> None:
        """Until `stop` is set."""
        threading.Thread(target=self._reader.serve, name="pn532", daemon=True).start()
        threading.Thread(target=self._serve_bus, name="oled", daemon=True).start()
        threading.Thread(target=self._serve_pins, name="gpio", daemon=True).start()
        if (why_not := unavailable()) is None:
            (self.directory / "pcsc").mkdir(mode=0o700, exist_ok=True)
            self._slot.start()
            (self.directory / "pcsc.json").write_bytes(msgspec.json.encode(self._slot.environment))
        else:
            _log.warning("no contact reader: %s", why_not)
        control = ControlServer(
            self.directory / "device.sock", Roles.build(sync_user=None, register_user=None), self._calls()
        )
        stop.wait()
        control.close()
        self._reader.stop()
        self._slot.stop()

    def _calls(self) -> Mapping[str, Call]:
        anybody: frozenset[Role] = frozenset()
        return {
            "rack": Call(Nothing, lambda _: {"cards": sorted(self._cards)}, anybody),
            "present": Call(Present, self._present, anybody),
            "remove": Call(Nothing, self._remove, anybody),
            "break_reader": Call(Break, self._break_reader, anybody),
            "mend_reader": Call(Nothing, self._mend_reader, anybody),
            "press": Call(Press, self._press, anybody),
            "lights": Call(Nothing, self._lights, anybody),
            "watch": Call(Watch, self._watch, anybody),
        }

    def _present(self, arguments: Present) -> dict[str, Any]:
        card = self._cards.get(arguments.card)
        if card is None:
            raise CallRefused("no_such_card", f"the rack holds {', '.join(sorted(self._cards))}, no {arguments.card}")
        if arguments.insert:
            return self._insert(card, arguments)
        if any(present.application is card.contactless for present in self._reader.cards):
            raise CallRefused("in_field", f"{arguments.card} is in the field already")
        disturbance = Disturbance(pulled_after_apdu=arguments.pulled_after_apdu, torn_at_apdu=arguments.torn_at_apdu)
        extensions: dict[int, tuple[int, ...]] = {_GPO_NUMBER: _SLOW_EXTENSIONS} if arguments.slow else {}
        if card.profile.misbehaviour is Misbehaviour.STALLS:
            extensions = {_GPO_NUMBER: _STALLING_EXTENSIONS}
        self._reader.present(ProximityCard(card.contactless, extensions=extensions), disturbance=disturbance)
        return {}

    def _insert(self, card: Card, arguments: Present) -> dict[str, Any]:
        pulled_after = arguments.pulled_after_apdu
        fault = ContactFault(
            pulled_at_apdu=None if pulled_after is None else pulled_after + 1, torn_at_apdu=arguments.torn_at_apdu
        )
        self._slot.insert(card.contact, fault=fault)
        return {}

    def _remove(self, _: Nothing) -> dict[str, Any]:
        """Take every card away, and keep what its chip has counted: a card is never younger than it was."""
        self._reader.remove()
        if self._slot.card is not None:
            self._slot.remove()
        for name, card in self._cards.items():
            card.profile.save(self.directory / "cards" / f"{name}.json")
        return {}

    def _break_reader(self, arguments: Break) -> dict[str, Any]:
        match arguments.fault:
            case "unplug":
                self._reader.unplug()
            case "wedge":
                self._reader.wedge()
            case "stop_pcscd":
                self._slot.kill_daemon()
            case "babble":
                self._reader.babble(b"\x55\xaa not a frame \x00\x00\xff")
            case other:
                raise CallRefused(
                    "no_such_fault", f"a reader can unplug, wedge or babble, and pcscd stop (stop_pcscd), not {other}"
                )
        return {}

    def _mend_reader(self, _: Nothing) -> dict[str, Any]:
        self._reader.behave()
        self._reader.replug()
        if self._slot.daemon_pid is None and unavailable() is None:
            self._slot.restart_daemon()
        return {}

    def _press(self, arguments: Press) -> dict[str, Any]:
        """A finger goes down and comes up again; each contact bounces."""
        for name in arguments.keys:
            try:
                key = Key(name)
            except ValueError:
                raise CallRefused("no_such_key", f"the keypad has {', '.join(each.value for each in Key)}") from None
            self._board.press(key)
            time.sleep(max(arguments.hold_ms, _FINGER_MS) / 1000)
            self._board.release(key)
            time.sleep(_FINGER_MS / 1000)
        return {}

    def _lights(self, _: Nothing) -> dict[str, Any]:
        """What is lit now, and what has sounded so far."""
        lit = self._board.lamps()
        return {
            "green": list(lit.green),
            "status": lit.status,
            "sounds": [
                {"frequency_hz": sound.frequency_hz, "from_s": sound.from_s, "to_s": sound.to_s}
                for sound in self._board.sounds()
            ],
        }

    def _watch(self, arguments: Watch) -> dict[str, Any]:
        """Pictures newer than `seen`; waits for one."""
        with self._changed:
            self._changed.wait_for(lambda: self._number > arguments.seen, arguments.wait_ms / 1000)
            newer = [picture for picture in self._pictures if picture.number > arguments.seen][:PAGE]
        return {
            "pictures": [
                {"number": picture.number, "at_s": picture.at_s, "bits": picture.image.tobytes()} for picture in newer
            ]
        }

    def _serve_bus(self) -> None:
        while True:
            connection, _ = self._bus.accept()
            with connection, contextlib.suppress(OSError):
                serve_bus(connection, self._panel)

    def _serve_pins(self) -> None:
        while True:
            connection, _ = self._pins.accept()
            with connection, contextlib.suppress(OSError):
                self._board.serve(connection)

    def _picture_written(self, image: Image.Image) -> None:
        """Keep each picture, however short it stood."""
        with self._changed:
            if not self._pictures or image.tobytes() != self._pictures[-1].image.tobytes():
                self._number += 1
                self._pictures.append(Picture(self._number, time.monotonic(), image))
                self._changed.notify_all()


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(4)
    return listener


class _WatchedPanel(Ssd1306):
    """A panel that says when a picture has been written to it: the driver sends each in one piece of data."""

    def __init__(self, written: Callable[[Image.Image], None]) -> None:
        super().__init__()
        self._written = written

    def data(self, sent: bytes) -> None:
        super().data(sent)
        if self.on:
            self._written(self.picture())


class DeviceClient:
    """The other end, for people, demonstrations and tests."""

    def __init__(self, directory: Path) -> None:
        self._client = ControlClient(directory / "device.sock")
        self._seen = 0

    def present(self, card: str, **disturbance: int | bool | None) -> None:
        self._client.call("present", {"card": card, **disturbance})

    def remove(self) -> None:
        self._client.call("remove")

    def break_reader(self, fault: str) -> None:
        self._client.call("break_reader", {"fault": fault})

    def mend_reader(self) -> None:
        self._client.call("mend_reader")

    def rack(self) -> list[str]:
        return list(self._client.call("rack")["cards"])

    def press(self, *keys: str, hold_ms: int = 0) -> None:
        """By their names on the keypad: "1", "enter", "cancel"."""
        self._client.call("press", {"keys": list(keys), "hold_ms": hold_ms})

    def lights(self) -> dict[str, Any]:
        """Lamps that are lit now, and every sound so far."""
        return self._client.call("lights")

    def pictures(self, wait_ms: int = 0) -> list[Picture]:
        """What has stood on the panel since the last call; waits for something new, at most `wait_ms`."""
        pictures: list[Picture] = []
        while page := self._client.call("watch", {"seen": self._seen, "wait_ms": wait_ms})["pictures"]:
            for each in page:
                image = Image.frombytes("1", DISPLAY_SIZE_PX, base64.b64decode(each["bits"]))
                pictures.append(Picture(each["number"], each["at_s"], image))
            self._seen, wait_ms = pictures[-1].number, 0
        return pictures

    def close(self) -> None:
        self._client.close()

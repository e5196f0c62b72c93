"""The device that a person holds, in a process of its own: the reader's field, a rack of cards, the panel.

It outlives the terminal, as real hardware does: kill the terminal and the last picture stays on the panel. In its
directory it leaves `nfc` (the reader's serial line), `oled.sock` (the display's bus) and `device.sock`, on which a
person or a test puts cards into the field, pulls them, breaks the reader and looks at the panel. The calls are those
of `terminal.control`.
"""

from __future__ import annotations

import base64
import contextlib
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

from drivers.interfaces import DISPLAY_SIZE_PX
from hwsim.cards.iso14443 import ProximityCard
from hwsim.cards.personalise import CardProfile
from hwsim.cards.visa import VisaCard
from hwsim.pn532 import Disturbance, Pn532
from hwsim.ssd1306 import Ssd1306, serve_bus
from terminal.clock import system_entropy
from terminal.control import Call, CallRefused, ControlClient, ControlServer, Role, Roles

PAGE: Final = 16  # pictures in one answer, which is one line of the socket
PICTURES_MAX: Final = 512  # what a long demonstration shows; older ones are forgotten
WAIT_MS_MAX: Final = 60_000
_GPO_NUMBER: Final = 3  # SELECT PPSE, SELECT, GET PROCESSING OPTIONS
_SLOW_EXTENSIONS: Final = (59,)  # 59 times the frame waiting time of 39 ms


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Present(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A card to bring into the field, and how its tap goes wrong (see `Disturbance`)."""

    card: str
    pulled_after_apdu: int | None = None
    torn_at_apdu: int | None = None
    slow: bool = False  # asks for about two seconds more before it answers GET PROCESSING OPTIONS


class Watch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    seen: int = 0
    wait_ms: Annotated[int, msgspec.Meta(ge=0, le=WAIT_MS_MAX)] = 0


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
        self._bus = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        bus_path = directory / "oled.sock"
        bus_path.unlink(missing_ok=True)
        self._bus.bind(str(bus_path))
        self._bus.listen(4)
        self._cards: dict[str, VisaCard] = {}
        for path in sorted((directory / "cards").glob("*.json")):
            self._cards[path.stem] = VisaCard(CardProfile.load(path), system_entropy)

    def serve(self, stop: threading.Event) -> None:
        """Until `stop` is set."""
        threading.Thread(target=self._reader.serve, name="pn532", daemon=True).start()
        threading.Thread(target=self._serve_bus, name="oled", daemon=True).start()
        control = ControlServer(
            self.directory / "device.sock", Roles.build(sync_user=None, register_user=None), self._calls()
        )
        stop.wait()
        control.close()
        self._reader.stop()

    def _calls(self) -> Mapping[str, Call]:
        anybody: frozenset[Role] = frozenset()
        return {
            "rack": Call(Nothing, lambda _: {"cards": sorted(self._cards)}, anybody),
            "present": Call(Present, self._present, anybody),
            "remove": Call(Nothing, self._remove, anybody),
            "break_reader": Call(Break, self._break_reader, anybody),
            "mend_reader": Call(Nothing, self._mend_reader, anybody),
            "watch": Call(Watch, self._watch, anybody),
        }

    def _present(self, arguments: Present) -> dict[str, Any]:
        card = self._cards.get(arguments.card)
        if card is None:
            raise CallRefused("no_such_card", f"the rack holds {', '.join(sorted(self._cards))}, no {arguments.card}")
        if any(present.application is card for present in self._reader.cards):
            raise CallRefused("in_field", f"{arguments.card} is in the field already")
        disturbance = Disturbance(pulled_after_apdu=arguments.pulled_after_apdu, torn_at_apdu=arguments.torn_at_apdu)
        extensions = {_GPO_NUMBER: _SLOW_EXTENSIONS} if arguments.slow else {}
        self._reader.present(ProximityCard(card, extensions=extensions), disturbance=disturbance)
        return {}

    def _remove(self, _: Nothing) -> dict[str, Any]:
        self._reader.remove()
        return {}

    def _break_reader(self, arguments: Break) -> dict[str, Any]:
        match arguments.fault:
            case "unplug":
                self._reader.unplug()
            case "wedge":
                self._reader.wedge()
            case "babble":
                self._reader.babble(b"\x55\xaa not a frame \x00\x00\xff")
            case other:
                raise CallRefused("no_such_fault", f"a reader can unplug, wedge or babble, not {other}")
        return {}

    def _mend_reader(self, _: Nothing) -> dict[str, Any]:
        self._reader.behave()
        self._reader.replug()
        return {}

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

    def _picture_written(self, image: Image.Image) -> None:
        """Keep each picture, however short it stood."""
        with self._changed:
            if not self._pictures or image.tobytes() != self._pictures[-1].image.tobytes():
                self._number += 1
                self._pictures.append(Picture(self._number, time.monotonic(), image))
                self._changed.notify_all()


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

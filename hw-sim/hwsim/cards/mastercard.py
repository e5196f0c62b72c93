"""A simulated M/Chip contactless card (EMV Contactless Book C-2, card side): command APDU in, response APDU out.

EMV mode only: PPSE, application, processing options, records, and one GENERATE AC with a combined signature. Magstripe
mode, relay resistance, torn transaction recovery and data storage are left out, and not offered in AIP or FCI.
"""

from __future__ import annotations

from typing import ClassVar, Final

from hwsim.cards.apdu import Refused, parse
from hwsim.cards.application import Application
from hwsim.cards.bertlv import encode
from hwsim.cards.bureau import Entropy
from hwsim.cards.chip import Chip
from hwsim.cards.profile import ApplicationData, CardProfile

KERNEL_ID: Final = b"\x02"


class MastercardCard(Application):
    """One card. It is activated with `reset` and then asked with `apdu`."""

    directory_name: ClassVar[bytes] = b"2PAY.SYS.DDF01"

    def __init__(self, profile: CardProfile | Chip, entropy: Entropy) -> None:
        super().__init__(profile if isinstance(profile, Chip) else Chip(profile, entropy))

    def apdu(self, command: bytes) -> bytes:
        """Answer one command APDU. Whatever the bytes are, the response ends in a status word."""
        try:
            answer = self.execute(parse(command))
        except Refused as refusal:
            return refusal.sw.to_bytes(2, "big")
        return answer.data + answer.sw.to_bytes(2, "big")

    def data(self) -> ApplicationData:
        return self.profile.contactless

    def directory(self) -> bytes:
        entry = encode(
            0x61,
            encode(0x4F, self.profile.aid),
            encode(0x50, self.profile.label.encode("ascii")),
            encode(0x87, b"\x01"),
            encode(0x9F2A, KERNEL_ID),
        )
        return encode(0x6F, encode(0x84, self.directory_name), encode(0xA5, encode(0xBF0C, entry)))

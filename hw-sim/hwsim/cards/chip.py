"""The chip that a card's applications share: its keys, and what it remembers from one transaction to the next.

Contact and contactless interface lead to the same chip, so there is one transaction counter, one log, and a block that
comes through the contacts holds for both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from hwsim.cards.apdu import Refused, StatusWord
from hwsim.cards.bureau import Entropy
from hwsim.cards.cryptogram import application_cryptogram
from hwsim.cards.profile import CardProfile

ATC_MAX: Final = 0xFFFF  # a card at its last transaction counter never pays again
_SHA1: Final = 0x01


class Chip:
    """`profile` is the card as it is now, counters included: what to store."""

    def __init__(self, profile: CardProfile, entropy: Entropy) -> None:
        self.profile = profile
        self.entropy = entropy

    @property
    def atc(self) -> bytes:
        """Application transaction counter, tag 9F36."""
        return self.profile.atc.to_bytes(2, "big")

    def count(self) -> None:
        """A transaction begins. Raises `Refused` when the counter is used up."""
        if self.profile.atc >= ATC_MAX:
            raise Refused(StatusWord.CONDITIONS_NOT_SATISFIED)
        self.remember(atc=self.profile.atc + 1)

    def remember(self, **changes: Any) -> None:
        """Write to the EEPROM."""
        self.profile = replace(self.profile, **changes)

    def cryptogram(self, objects: dict[int, bytes]) -> bytes:
        """Tag 9F26; a random number on a card without the key."""
        key = self.profile.card_key
        return self.entropy(8) if key is None else application_cryptogram(key, objects)

    def signed_dynamic_data(self, dynamic: bytes, *terminal: bytes) -> bytes:
        """Tag 9F4B: the dynamic data inside, the terminal's under the hash (EMV 4.4 Book 2, table 15)."""
        key = self.profile.icc_key
        if key is None:
            return self.entropy(self.profile.sdad_size_bytes)
        head = bytes((0x05, _SHA1, len(dynamic))) + dynamic
        return key.sign(head + b"\xbb" * (key.room_bytes - len(head)), *terminal)

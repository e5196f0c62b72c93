"""A card as a person holds it: one chip, reached through its contacts or its antenna."""

from __future__ import annotations

from hwsim.cards.bureau import Entropy, Scheme
from hwsim.cards.chip import Chip
from hwsim.cards.contact import ContactCard, Protocol
from hwsim.cards.mastercard import MastercardCard
from hwsim.cards.profile import CardProfile
from hwsim.cards.visa import VisaCard


class Card:
    """Both applications on one chip: counters, log and blocking are common. One thread at a time asks one of them."""

    contactless: VisaCard | MastercardCard

    def __init__(self, profile: CardProfile, entropy: Entropy, protocol: Protocol = Protocol.T0) -> None:
        self._chip = Chip(profile, entropy)
        self.contact = ContactCard(self._chip, entropy, protocol)
        match profile.scheme:
            case Scheme.VISA:
                self.contactless = VisaCard(self._chip, entropy)
            case Scheme.MASTERCARD:
                self.contactless = MastercardCard(self._chip, entropy)

    @property
    def profile(self) -> CardProfile:
        """The card as it is now, to be stored."""
        return self._chip.profile

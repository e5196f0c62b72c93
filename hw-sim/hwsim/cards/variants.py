"""Cards that a terminal must cope with, made from an ordinary one: broken, blocked, and an emulator, which has copied
everything that a reader can read but holds none of the keys.

An expired card is none of them: its date is under a signature, so it is personalised that way, and so is one whose
certificate has ended or was withdrawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, TypeAlias

from hwsim.cards.bureau import Entropy
from hwsim.cards.cryptogram import KEY_BYTES, odd_parity
from hwsim.cards.misbehaviour import Misbehaviour
from hwsim.cards.profile import ApplicationData, CardProfile, Standing

_ICC_CERTIFICATE: Final = 0x9F46
_AUTHENTICATION: Final = 0x61  # SDA, DDA and CDA in byte 1 of the AIP


def without_fdda(profile: CardProfile, _entropy: Entropy) -> CardProfile:
    """An online-only card: no certificates, every purchase asks the issuer."""

    def bare(application: ApplicationData) -> ApplicationData:
        certificates = {
            record.sfi
            for record in application.records
            if replace(application, records=(record,)).find(_ICC_CERTIFICATE) is not None
        }
        entries = [application.afl[at : at + 4] for at in range(0, len(application.afl), 4)]
        # Nothing is signed any more: no entry may name records for authentication.
        afl = b"".join(entry[:3] + b"\x00" for entry in entries if entry[0] >> 3 not in certificates)
        kept = tuple(record for record in application.records if record.sfi not in certificates)
        aip = bytes((application.aip[0] & ~_AUTHENTICATION, application.aip[1]))
        return replace(application, aip=aip, afl=afl, records=kept)

    return replace(
        profile,
        contactless=bare(profile.contactless),
        contact=bare(profile.contact),
        icc_key=None,
        offline_limit_minor=0,
    )


def with_broken_certificate(profile: CardProfile, _entropy: Entropy) -> CardProfile:
    """One bit of the ICC certificate is wrong: nothing that the card signs can be trusted."""

    def broken(application: ApplicationData) -> ApplicationData:
        certificate = application.find(_ICC_CERTIFICATE)
        if certificate is None:
            return application
        middle = len(certificate) // 2
        flipped = bytes((certificate[middle] ^ 0x01,))
        return application.changed(_ICC_CERTIFICATE, certificate[:middle] + flipped + certificate[middle + 1 :])

    return replace(profile, contactless=broken(profile.contactless), contact=broken(profile.contact))


def with_wrong_key(profile: CardProfile, entropy: Entropy) -> CardProfile:
    """The cryptogram is made with another key than the issuer's: only the issuer can tell."""
    return replace(profile, card_key=odd_parity(entropy(KEY_BYTES)))


def emulator(profile: CardProfile, _entropy: Entropy) -> CardProfile:
    """What anyone can build who has read the card once: true certificates, random cryptogram, random signature."""
    return replace(profile, card_key=None, script_key=None, icc_key=None)


Variant: TypeAlias = Callable[[CardProfile, Entropy], CardProfile]


def _misbehaving(misbehaviour: Misbehaviour) -> Variant:
    return lambda profile, _entropy: replace(profile, misbehaviour=misbehaviour)


VARIANTS: Final[Mapping[str, Variant]] = {
    "normal": lambda profile, _entropy: profile,
    "no-fdda": without_fdda,
    "declines": lambda profile, _entropy: replace(profile, declines=True),
    "broken-certificate": with_broken_certificate,
    "wrong-key": with_wrong_key,
    "blocked": lambda profile, _entropy: replace(profile, standing=Standing.BLOCKED),
    "not-supported": lambda profile, _entropy: replace(profile, standing=Standing.ABSENT),
    "emulator": emulator,
    "card-blocked": lambda profile, _entropy: replace(profile, standing=Standing.CARD_BLOCKED),
    **{each.value: _misbehaving(each) for each in Misbehaviour if each is not Misbehaviour.NONE},
}
"""By the name that a design's `misbehaves` gives."""

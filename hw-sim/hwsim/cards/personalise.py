"""Personalisation: how a test card gets its keys, certificates and records.

`personalise` makes a card of a design, for a bureau: an ICC key with a certificate for each interface (each signs its
own static data and AIP), records as READ RECORD gives them, and the master keys of its cryptograms. `rack` makes all
designs that come with the simulator. What comes out is a `CardProfile`; what the card says and when is in
`hwsim.cards.visa`, `.mastercard` and `.contact`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Final

from hwsim.cards import designs
from hwsim.cards.bertlv import encode
from hwsim.cards.bureau import Bureau, Certificate, Entropy, RsaKey, Scheme, certify, month_and_year, packed
from hwsim.cards.cryptogram import Cvn, derive_card_key
from hwsim.cards.designs import Design, InterfaceDesign
from hwsim.cards.files import CardFileError
from hwsim.cards.profile import ApplicationData, CardProfile, Pan, Record, Standing, laboratory_pan
from hwsim.cards.variants import VARIANTS

__all__ = [
    "Bureau",
    "CardFileError",
    "CardProfile",
    "Entropy",
    "Pan",
    "Record",
    "RsaKey",
    "Scheme",
    "Standing",
    "laboratory_pan",
    "personalise",
    "rack",
]

ORDINARY: Final[Mapping[Scheme, str]] = {Scheme.VISA: "visa-debit", Scheme.MASTERCARD: "mastercard-debit"}
"""The design of a card about which nothing is said."""

CONTACT_AFL: Final = bytes.fromhex("080101001001020018010201")  # record 1 of file 3 is under the ICC certificate
MCHIP_AFL: Final = bytes.fromhex("1001010118010200")  # a reader that knows magstripe mode skips a file 1 here
_STATIC_TAG_LIST: Final = encode(0x9F4A, b"\x82")  # the AIP is under the certificate, or a thief could switch it off


def personalise(
    bureau: Bureau,
    entropy: Entropy,
    design: Design | None = None,
    *,
    pan: Pan | None = None,
    psn: str = "01",
    expires: date | None = None,
    cardholder: str | None = None,
    cvn: Cvn | None = None,
    country: int = 276,
    currency: int = 978,
    offline_limit_minor: int | None = None,
    icc_key_bits: int | None = None,
    icc_key: RsaKey | None = None,
) -> CardProfile:
    """Make a card. `country` and `currency` are ISO numbers; what is not said here, the design says.

    A card with an offline limit approves (TC) purchases up to it in its own currency, if the terminal lets it.
    Raises `CardFileError` for a design of another scheme than the bureau's.
    """
    design = designs.load(ORDINARY[bureau.scheme]) if design is None else design
    if design.scheme is not bureau.scheme:
        raise CardFileError(f"a {design.scheme.value} design needs a bureau of that scheme, not {bureau.scheme.value}")
    account = laboratory_pan(design.serial, bureau.iin) if pan is None else pan
    version = design.cvn if cvn is None else cvn
    expiry = design.expires if expires is None else expires
    name = design.cardholder if cardholder is None else cardholder
    if icc_key is None:
        bits = design.icc_key_bits if icc_key_bits is None else icc_key_bits
        icc_key = RsaKey.generate(bits, bureau.issuer_key.exponent)
    track2 = packed(f"{account.digits}D{expiry:%y%m}{design.service_code}0000000000")
    # What each interface has in common, without PAN sequence number: contactless Visa sends that with its cryptogram.
    identity = (
        encode(0x5A, packed(account.digits)),
        encode(0x5F24, bytes.fromhex(f"{expiry:%y%m%d}")),
        encode(0x5F28, bytes.fromhex(f"{country:04d}")),
        encode(0x9F07, bytes.fromhex(design.usage_control)),
    )
    person = encode(0x70, encode(0x5F20, name.encode("ascii")))
    details = (
        encode(0x5F25, bytes.fromhex(f"{design.effective:%y%m%d}")),
        encode(0x5F34, bytes.fromhex(psn)),
        encode(0x9F42, bytes.fromhex(f"{currency:04d}")),
    )
    # A new serial number for each certificate.
    certificates = _Certificates(_signing(bureau, design), account, icc_key, entropy, design.certificates_end)

    def visa_contactless(plan: InterfaceDesign) -> ApplicationData:
        signed = b"".join((*identity, _STATIC_TAG_LIST))
        issuer, icc = certificates.records(signed, plan.aip_bytes)
        records = (Record(1, 1, person), Record(2, 1, issuer), Record(2, 2, icc), Record(3, 1, encode(0x70, signed)))
        return ApplicationData(plan.aip_bytes, records, pdol=designs.dol(plan.pdol))

    def mchip_contactless(plan: InterfaceDesign) -> ApplicationData:
        signed = b"".join((encode(0x57, track2), *identity, *details, *_rules(plan), *_lists(plan), _STATIC_TAG_LIST))
        issuer, icc = certificates.records(signed, plan.aip_bytes)
        records = (Record(2, 1, encode(0x70, signed)), Record(3, 1, issuer), Record(3, 2, icc))
        return _application(plan, MCHIP_AFL, records)

    def contact(plan: InterfaceDesign) -> ApplicationData:
        service_code = encode(0x5F30, bytes.fromhex(design.service_code.zfill(4)))
        signed = b"".join((*identity, *details, service_code, *_rules(plan), _STATIC_TAG_LIST))
        issuer, icc = certificates.records(signed, plan.aip_bytes)
        holder = encode(0x70, encode(0x57, track2), encode(0x5F20, name.encode("ascii")))
        lists = [*_lists(plan), encode(0x9F49, designs.dol(plan.ddol))]
        if plan.consecutive_offline is not None:
            lower, upper = plan.consecutive_offline
            lists += [encode(0x9F14, bytes((lower,))), encode(0x9F23, bytes((upper,)))]
        records = (
            Record(1, 1, holder),
            Record(2, 1, issuer),
            Record(2, 2, icc),
            Record(3, 1, encode(0x70, signed)),
            Record(3, 2, encode(0x70, *lists)),
        )
        return _application(plan, CONTACT_AFL, records)

    contactless = {Scheme.VISA: visa_contactless, Scheme.MASTERCARD: mchip_contactless}[design.scheme]
    profile = CardProfile(
        scheme=design.scheme,
        aid=design.aid_bytes,
        more_aids=tuple(bytes.fromhex(aid) for aid in design.more_aids),
        label=design.label,
        language=design.language,
        pan=account,
        psn=psn,
        expires=expiry,
        track2=track2,
        contactless=contactless(design.contactless),
        contact=contact(design.contact),
        ctq=design.contactless.ctq_bytes,
        cvn=version,
        dki=1,
        card_key=derive_card_key(bureau.imk_ac, account.digits, psn, version),
        script_key=derive_card_key(bureau.imk_smi, account.digits, psn, version),
        icc_key=icc_key,
        sdad_size_bytes=icc_key.size_bytes,
        ca_public_key=bureau.ca_public_key,
        currency=currency,
        offline_limit_minor=design.offline_limit_minor if offline_limit_minor is None else offline_limit_minor,
        declines=design.declines,
        declines_after_approval=design.declines_after_approval,
        distrusts_issuer=design.distrusts_issuer,
        needs_issuer_authentication=design.needs_issuer_authentication,
    )
    return VARIANTS[design.misbehaves](profile, entropy)


def rack(bureaus: Mapping[Scheme, Bureau], entropy: Entropy) -> dict[str, CardProfile]:
    """A card of every design of these schemes, by the design's name, each with an account number of its own."""
    found = {name: designs.load(name) for name in designs.names()}
    cards: dict[str, CardProfile] = {}
    shared: dict[Scheme, RsaKey] = {}
    for name, design in found.items():
        if design.scheme not in bureaus:
            continue
        broken = design.misbehaves != "normal"
        card = personalise(
            bureaus[design.scheme], entropy, design, icc_key=shared.get(design.scheme) if broken else None
        )
        if broken and card.icc_key is not None:
            shared[design.scheme] = card.icc_key  # keys take time, and nothing is learned of a broken card's own
        cards[name] = card
    return cards


def _signing(bureau: Bureau, design: Design) -> Bureau:
    """The bank, with the issuer certificate that this design names."""
    if design.issuer_serial is None:
        return bureau
    return bureau.with_issuer_serial(bytes.fromhex(design.issuer_serial))


class _Certificates:
    """Issuer and ICC certificates as records."""

    def __init__(
        self, bureau: Bureau, account: Pan, icc_key: RsaKey, entropy: Entropy, end: date | None = None
    ) -> None:
        self._bureau = bureau
        self._account = account
        self._icc_key = icc_key
        self._entropy = entropy
        self._end = end or bureau.certificates_expire

    def records(self, signed: bytes, aip: bytes) -> tuple[bytes, bytes]:
        """The issuer's and the card's, the latter over this static data."""
        bureau, icc_key = self._bureau, self._icc_key
        valid = month_and_year(self._end)
        head = b"\x04" + packed(self._account.digits, 10) + valid + self._entropy(3)
        certificate = certify(bureau.issuer_key, head, icc_key, signed, aip)
        issuer = encode(
            0x70,
            encode(0x8F, bytes((bureau.ca_index,))),
            encode(0x90, bureau.issuer_certificate.certificate),
            _remainder(0x92, bureau.issuer_certificate),
            encode(0x9F32, bureau.issuer_key.exponent_bytes),
        )
        icc = encode(
            0x70,
            encode(0x9F46, certificate.certificate),
            encode(0x9F47, icc_key.exponent_bytes),
            _remainder(0x9F48, certificate),
        )
        return issuer, icc


def _application(plan: InterfaceDesign, afl: bytes, records: tuple[Record, ...]) -> ApplicationData:
    return ApplicationData(
        aip=plan.aip_bytes,
        records=records,
        afl=afl,
        pdol=designs.dol(plan.pdol),
        cdol1=designs.dol(plan.cdol1),
        cdol2=designs.dol(plan.cdol2),
        ddol=designs.dol(plan.ddol),
        response_format=plan.response_format,
    )


def _rules(plan: InterfaceDesign) -> list[bytes]:
    """What the card wants of the terminal: CVM list and issuer action codes."""
    codes = ((0x9F0D, plan.iac_default), (0x9F0E, plan.iac_denial), (0x9F0F, plan.iac_online))
    cvm = [encode(0x8E, plan.cvm_list)] if plan.cvm else []
    return cvm + [encode(tag, bytes.fromhex(code)) for tag, code in codes]


def _lists(plan: InterfaceDesign) -> list[bytes]:
    return [encode(0x8C, designs.dol(plan.cdol1)), encode(0x8D, designs.dol(plan.cdol2))]


def _remainder(tag: int, certificate: Certificate) -> bytes:
    return encode(tag, certificate.remainder) if certificate.remainder else b""

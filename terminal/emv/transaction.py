"""A transaction under way, for the kernels in which the terminal decides (contact and kernel 2).

One place for what card and terminal have said and what was found out, so that a data object list takes every value as
it stands at that moment. The steps are elsewhere: they look at this, and return what they found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from terminal.emv import authentication, cryptogram, decision, dol, restrictions, selection
from terminal.emv.authentication import AuthenticationFailed, PublicKey, Trust
from terminal.emv.configuration import Activation, Environment, Request, Setup
from terminal.emv.cryptogram import Answer
from terminal.emv.outcome import CardRead, Cvm, OdaMethod, OdaResult, OdaStatus, Pan
from terminal.emv.records import CardFault, CardObjects
from terminal.emv.results import Aip, Tsi, Tvr
from terminal.emv.tags import Tag

PAN_DIGITS_MIN: Final = 8
_USED: Final = (  # what decides, so that its length must be right
    Tag.DF_NAME,
    Tag.PAN,
    Tag.PAN_SEQUENCE_NUMBER,
    Tag.EXPIRATION_DATE,
    Tag.EFFECTIVE_DATE,
    Tag.AIP,
    Tag.APPLICATION_USAGE_CONTROL,
    Tag.APPLICATION_VERSION_CARD,
    Tag.ISSUER_COUNTRY_CODE,
    Tag.APPLICATION_CURRENCY_CODE,
    Tag.IAC_DEFAULT,
    Tag.IAC_DENIAL,
    Tag.IAC_ONLINE,
    Tag.LOWER_CONSECUTIVE_OFFLINE_LIMIT,
    Tag.UPPER_CONSECUTIVE_OFFLINE_LIMIT,
)
_FAILED: Final = {
    OdaMethod.SDA: Tvr.SDA_FAILED,
    OdaMethod.DDA: Tvr.DDA_FAILED,
    OdaMethod.CDA: Tvr.CDA_FAILED,
}


@dataclass(slots=True, repr=False)  # without a repr: nearly all of it is card data
class Transaction:
    """Everything known of one transaction. `kernel` as in `CardRead`; `tsi` is contact's alone."""

    setup: Setup
    request: Request
    environment: Environment
    activation: Activation
    kernel: int
    card: CardObjects
    terminal: dict[int, bytes]
    pdol_data: bytes = b""
    records: bytes | None = b""  # the records' part of the static data
    cdol_data: bytes = b""  # what has been sent with GENERATE AC so far
    tvr: Tvr = Tvr.NONE
    tsi: Tsi = Tsi.NONE
    oda: OdaResult = field(default_factory=OdaResult)
    icc_key: PublicKey | None = None
    cvm: Cvm = Cvm.NONE
    asked: decision.AcType | None = None  # what terminal action analysis came to

    @property
    def objects(self) -> dict[int, bytes]:
        """All data objects; what the terminal states cannot be overridden by the card."""
        return {**self.card, **self.terminal}

    @property
    def aip(self) -> Aip:
        return Aip.decode(self.card[Tag.AIP])

    @property
    def pan(self) -> Pan:
        return Pan(self.card[Tag.PAN].hex().upper().rstrip("F"))

    @property
    def reach(self) -> decision.Reach:
        return decision.Reach.of(self.terminal.get(Tag.TERMINAL_TYPE, b""))

    @property
    def rid(self) -> bytes:
        return self.activation.adf_name[: authentication.RID_BYTES]

    @property
    def trust(self) -> Trust:
        return self.setup.trust(self.request)

    def new_unpredictable_number(self) -> bytes:
        """Draw another one, which is this transaction's from now on. Raises `ConfigurationError`."""
        number = self.environment.new_unpredictable_number()
        self.terminal[Tag.UNPREDICTABLE_NUMBER] = number
        return number

    def note(self, tvr: Tvr = Tvr.NONE, tsi: Tsi = Tsi.NONE) -> None:
        """Add what a step found."""
        self.tvr |= tvr
        self.tsi |= tsi
        self.terminal[Tag.TVR] = self.tvr.encode()
        if Tag.TSI in self.terminal:
            self.terminal[Tag.TSI] = self.tsi.encode()

    def check_card_data(self, *mandatory: Tag) -> None:
        """What must be there and readable (Book 3, 7.2 and 7.5). Raises `CardFault`."""
        self.card.require(*mandatory)
        check_card_data(self.card)

    def default(self, tag: Tag) -> bytes | None:
        """What this terminal uses where the card has no such object of its own."""
        value = self.activation.combination.tags.get(tag)
        return self.setup.terminal.get(tag) if value is None else value

    def answer_list(self, tag: Tag) -> bytes:
        """What CDOL1 or CDOL2 asks for. Raises `TlvError`."""
        asked = self.card[tag]
        if dol.asks_for(asked, Tag.TC_HASH):
            if Tag.TDOL not in self.card:
                self.note(Tvr.DEFAULT_TDOL_USED)
            tdol = self.card.get(Tag.TDOL) or self.default(Tag.TDOL) or b""
            self.terminal[Tag.TC_HASH] = authentication.sha1(dol.build(tdol, self.objects, self.kernel))
        return dol.build(asked, self.objects, self.kernel)

    def authenticated(self, method: OdaMethod) -> None:
        self.oda = OdaResult(OdaStatus.OK, method)
        self.note(tsi=Tsi.ODA_PERFORMED)

    def authentication_failed(self, method: OdaMethod, reason: str) -> None:
        """TVR bits of a failed method (Book 3, 10.3)."""
        self.oda = OdaResult(OdaStatus.FAILED, method, reason)
        self.icc_key = None
        self.note(failed_authentication(method, reason), Tsi.ODA_PERFORMED)

    def take(self, answer: Answer, *, signed: bool, more: bytes = b"") -> bool:
        """Take in the answer to GENERATE AC. False: it was to be signed (CDA), and the signature does not hold.

        `more`: what the signature must vouch for besides, behind the hash. An AAC is never signed. Raises `CardFault`
        if a cryptogram in clear is missing.
        """
        for of_an_earlier_answer in (Tag.CRYPTOGRAM, Tag.SIGNED_DYNAMIC_DATA):
            self.card.pop(of_an_earlier_answer, None)
        self.card.update(answer.objects)
        if not signed or self.icc_key is None or (answer.kind is decision.AcType.AAC and answer.signature is None):
            self.card.require(Tag.CRYPTOGRAM)
            return True
        try:
            vouched = cryptogram.verify_signature(
                self.icc_key,
                answer,
                self.terminal[Tag.UNPREDICTABLE_NUMBER],
                self.pdol_data + self.cdol_data,
                more,
            )
        except AuthenticationFailed as failed:
            # Not "data missing", whatever is missing here: that bit is about records (Book 2, 6.6.2).
            self.oda = OdaResult(OdaStatus.FAILED, OdaMethod.CDA, failed.reason)
            self.icc_key = None
            self.note(Tvr.CDA_FAILED, Tsi.ODA_PERFORMED)
            return False
        self.card.update(vouched)
        self.authenticated(OdaMethod.CDA)
        return True

    def read(self) -> CardRead:
        """All that is known, once the card has given a cryptogram."""
        return read_card(
            self.activation,
            self.card,
            self.terminal,
            kernel=self.kernel,
            pan=self.pan,
            oda=self.oda,
            cvm=self.cvm,
        )


def check_card_data(card: CardObjects) -> None:
    """Whether what decides can be read, as far as it is there. Raises `CardFault("parse_error")`."""
    card.check_lengths(_USED)
    digits = card[Tag.PAN].hex().upper().rstrip("F") if Tag.PAN in card else None
    if digits is not None and (not digits.isdecimal() or len(digits) < PAN_DIGITS_MIN):
        raise CardFault("parse_error")
    dates = (card.get(Tag.EXPIRATION_DATE), card.get(Tag.EFFECTIVE_DATE))
    if not all(restrictions.readable(date) for date in dates if date is not None):
        raise CardFault("parse_error")


def failed_authentication(method: OdaMethod, reason: str) -> Tvr:
    """TVR bits of a method that failed before a cryptogram (Book 3, 10.3)."""
    return _FAILED[method] | (Tvr.CARD_DATA_MISSING if reason == "missing_data" else Tvr.NONE)


def read_card(
    activation: Activation,
    card: Mapping[int, bytes],
    terminal: Mapping[int, bytes],
    *,
    kernel: int,
    pan: Pan,
    oda: OdaResult,
    cvm: Cvm,
) -> CardRead:
    """What a card said, for issuer, receipt and ledger."""
    return CardRead(
        aid=card[Tag.DF_NAME],
        kernel=kernel,
        label=selection.label(card, activation.label, terminal.get(Tag.ADDITIONAL_TERMINAL_CAPABILITIES, b"")),
        pan=pan,
        cid=card[Tag.CRYPTOGRAM_INFORMATION][0],
        cryptogram=card.get(Tag.CRYPTOGRAM, b""),
        atc=int.from_bytes(card[Tag.ATC], "big"),
        oda=oda,
        cvm=cvm,
        tags={**card, **terminal},
    )

"""From an opened envelope to a decision: is this record for this sale, and what does the issuer say?

The sealed card data and the envelope come from the same terminal and could still tell two stories. What the card has
put its cryptogram over is the true one, so a record for another amount, currency or kind is declined, whoever signed
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hwsim.cards.bertlv import encode
from hwsim.cards.profile import Pan
from hwsim.host.messages import Authorisation
from hwsim.issuer import Issuer, Request, read_request

_PURCHASE: Final = b"\x00"  # 9C, transaction type

# ISO 4217, the numeric codes. Kept apart from the terminal's table: the host checks the terminal, not itself.
_CURRENCY_NUMBERS: Final = {
    "AED": 784, "AUD": 36, "BGN": 975, "BHD": 48, "BRL": 986, "CAD": 124, "CHF": 756, "CLP": 152, "CNY": 156,
    "CZK": 203, "DKK": 208, "EGP": 818, "EUR": 978, "GBP": 826, "HKD": 344, "HUF": 348, "IDR": 360, "ILS": 376,
    "INR": 356, "IQD": 368, "ISK": 352, "JOD": 400, "JPY": 392, "KRW": 410, "KWD": 414, "LYD": 434, "MAD": 504,
    "MXN": 484, "MYR": 458, "NOK": 578, "NZD": 554, "OMR": 512, "PHP": 608, "PLN": 985, "PYG": 600, "QAR": 634,
    "RON": 946, "RSD": 941, "SAR": 682, "SEK": 752, "SGD": 702, "THB": 764, "TND": 788, "TRY": 949, "TWD": 901,
    "UAH": 980, "UGX": 800, "USD": 840, "VND": 704, "XAF": 950, "XOF": 952, "XPF": 953, "ZAR": 710,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Decision:
    """What to tell the terminal, and the card that it is about if its cryptogram was genuine."""

    approved: bool
    reason: str | None
    authorisation_code: str | None = None
    issuer_data: bytes = b""  # tags 8A, 91, 71, 72: for the card, while it waits
    pan: Pan | None = None


def decide(envelope: Authorisation, record: bytes, issuer: Issuer) -> Decision:
    """Decide on a sale by its online record."""
    try:
        request = read_request(record)
    except ValueError:
        pass  # the issuer says so in its own words
    else:
        contradiction = _contradiction(envelope, request)
        if contradiction is not None:  # before the issuer sees it: this uses up no counter of the card
            return Decision(approved=False, reason=contradiction)
    answer = issuer.authorise(record)
    issuer_data = encode(0x8A, answer.response_code.encode("ascii"))
    if answer.issuer_authentication_data:
        issuer_data += encode(0x91, answer.issuer_authentication_data)
    issuer_data += answer.scripts
    return Decision(
        approved=answer.approved,
        reason=None if answer.approved else answer.text.replace(" ", "_"),
        authorisation_code=answer.authorisation_code,
        issuer_data=issuer_data,
        pan=answer.verification.pan if answer.verification.ok else None,
    )


def _contradiction(envelope: Authorisation, request: Request) -> str | None:
    if request.amount_minor != envelope.amount:
        return "amount_mismatch"
    if request.currency != _CURRENCY_NUMBERS.get(envelope.currency):
        return "currency_mismatch"
    if request.transaction_type != _PURCHASE:
        return "kind_mismatch"
    return None

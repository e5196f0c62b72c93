"""What the screens say, in the language of the terminal.

English is the source; other languages are gettext catalogues in `locale/`. The stable words that kernels, ledger and
host give as reasons ("card_lost", "expired") become sentences for people here, and a word that is not known becomes
the general sentence: a screen is never empty because a host says something new. A lost or stolen card is told nothing
but "declined".

Strings are marked by `mark` (in the tables here) and `say` (in `terminal.ui.screens`). To add or change some: edit
the .po file, then `pybabel compile -D payterm -d terminal/ui/locale`. The tests say what is missing, stale or too
long.
"""

from __future__ import annotations

import gettext
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

_LOCALE: Final = Path(__file__).with_name("locale")


@cache
def speaker(language: str) -> Callable[[str], str]:
    """What translates into this language; English for a language that has no catalogue."""
    return gettext.translation("payterm", _LOCALE, languages=[language], fallback=True).gettext


@cache
def spoken() -> frozenset[str]:
    """The languages that there are (ISO 639)."""
    return frozenset({"en", *(path.name for path in _LOCALE.iterdir())})


def mark(text: str) -> str:
    """Marks a string for translation where it is not yet time to translate it."""
    return text


_DECLINES: Final = {
    "card_declined": mark("Declined by the card"),
    "expired": mark("Card has expired"),
    "not_allowed": mark("Card not accepted here"),
    "oda_failed": mark("Card not verified"),
    "cvm_failed": mark("Cardholder not verified"),
    "unable_to_go_online": mark("No connection to the bank"),
    "timeout": mark("No answer from the bank"),
    "no_answer": mark("No answer from the bank"),
    "insufficient_funds": mark("Not enough funds"),
    "exceeds_amount_limit": mark("Above the card's limit"),
    "expired_card": mark("Card has expired"),
}
_RETRIES: Final = {
    "card_lost": mark("Card was moved too soon"),
    "confirm_on_phone": mark("Confirm on your phone"),
}
_TROUBLES: Final = {
    "reader_missing": (mark("No reader"), mark("Check the reader's plug and power")),
    "reader_fault": (mark("Reader fault"), mark("No cards can be read at the moment")),
    "not_completed": (mark("Not completed"), mark("Check the sale at the register")),
    "key": (mark("Key unavailable"), mark("No sales can be taken. Call the operator")),
    "ledger": (mark("Storage fault"), mark("Check the sale at the register")),
    "storage": (mark("Storage fault"), mark("No sales for now. Check the SD card")),
    "storage_full": (mark("Storage full"), mark("No sales for now. Make space")),
    "journal_full": (mark("Storage full"), mark("Connect to the network to send sales")),
    "revoked": (mark("Out of service"), mark("No sales can be taken. Call the operator")),
    "over_limit": (mark("Limit exceeded"), mark("Nothing was charged")),
}


def decline(reason: str) -> str:
    """Why a sale was declined, in English."""
    return _DECLINES.get(reason, mark("Use another way to pay"))


def retry(reason: str) -> str:
    """Why the card is wanted once more, in English."""
    return _RETRIES.get(reason, mark("Card could not be read"))


def trouble(reason: str) -> tuple[str, str]:
    """Heading and advice for a fault of the terminal itself, in English."""
    return _TROUBLES.get(reason, (mark("Fault"), mark("No sales can be taken. Call the operator")))

"""The whole terminal as processes: real nfcpy, luma, SQLite, TLS; simulated chip, panel, card and host."""

from __future__ import annotations

import base64
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hwsim import books
from hwsim.cards.profile import CardProfile
from hwsim.faults import Fault
from hwsim.host import controls
from hwsim.host.tls import Certificate
from hwsim.world import CARD, World
from terminal.control import CallRefused
from terminal.money import EUR, Amount
from terminal.ui.screens import Approved, ChooseApplication, TryAgain, render

pytestmark = pytest.mark.processes

PAID = {"approved", "accepted", "settled"}  # settled: sync sent an accepted one before the test asked
APDUS_OF_A_TAP = 9  # SELECT PPSE, SELECT, GPO and six records; more than enough if a card has fewer


@pytest.fixture(autouse=True)
def tidy(shop: World) -> Iterator[None]:
    """Whatever a test did to network, host and reader is mended, and the books balance before the next one."""
    yield
    shop.network(Fault.PASS)
    shop.device.mend_reader()
    shop.device.remove()
    settled(shop)


def settled(world: World) -> None:
    """Everything has been sent and answered, and the books balance."""
    world.wait(lambda: world.status()["unsent"]["count"] == 0 or None, "everything to be sent", timeout_s=30)
    assert books.differences(world.ledger(), world.bookings()) == []


def booking(world: World, transaction: str) -> dict[str, Any]:
    return next(entry for entry in world.bookings() if entry["transaction"] == transaction)


def advised(world: World, transaction: str) -> str | None:
    word: str | None = booking(world, transaction)["advice"]
    return word


def free(world: World) -> None:
    world.device.remove()
    world.wait(lambda: not world.status()["busy"] or None, "the device to be free")


def test_a_tap_is_approved_and_booked_once(shop: World) -> None:
    result = shop.tap(Amount(1250, EUR))
    assert (result["state"], result["scheme"]) == ("approved", "Visa")
    booking = next(entry for entry in shop.bookings() if entry["transaction"] == result["id"])
    assert (booking["state"], booking["amount"], booking["received"]) == ("booked", 1250, 1)
    assert booking["authorisation_code"] == result["authorisation_code"]


def test_the_host_declines(shop: World) -> None:
    result = shop.tap(Amount(1251, EUR))
    assert (result["state"], result["reason"]) == ("declined", "insufficient_funds")


def test_a_reference_is_never_charged_twice(shop: World) -> None:
    sale = shop.sell(Amount(300, EUR), "bill-7")
    assert shop.sell(Amount(300, EUR), "bill-7") == sale
    shop.device.present(CARD)
    assert shop.result(sale)["state"] == "approved"
    free(shop)
    assert shop.sell(Amount(300, EUR), "bill-7") == sale
    assert not shop.status()["busy"]
    with pytest.raises(CallRefused) as refused:
        shop.sell(Amount(301, EUR), "bill-7")
    assert refused.value.code == "reference_taken"


@pytest.mark.parametrize(
    ("minor", "code"), [(0, "zero_amount"), (50_001, "over_limit"), (-1, "malformed")], ids=["zero", "over", "negative"]
)
def test_limits_hold_before_a_card_is_asked(shop: World, minor: int, code: str) -> None:
    with pytest.raises(CallRefused) as refused:
        shop.call("sale.start", amount=minor, currency="EUR")
    assert refused.value.code == code
    assert not shop.status()["busy"]


@pytest.mark.parametrize("apdus", range(APDUS_OF_A_TAP))
@pytest.mark.parametrize("how", ["pulled_after_apdu", "torn_at_apdu"])
def test_a_card_pulled_at_any_apdu_costs_nothing(shop: World, how: str, apdus: int) -> None:
    """A clear screen, a true ledger, and the next tap of the same sale works."""
    sale = shop.sell(Amount(520 + apdus, EUR))
    shop.device.present(CARD, **{how: apdus + 1})
    time.sleep(0.3)
    result = shop.call("sale.result", transaction=sale)
    assert result["state"] in {"opened", "authorising", "approved"}
    if result["state"] == "opened":
        shop.device.remove()
        shop.device.present(CARD)
    assert shop.result(sale)["state"] == "approved"
    free(shop)
    assert [entry["state"] for entry in shop.bookings() if entry["transaction"] == sale] == ["booked"]


CONTACT_APDUS = 16  # PSE to second GENERATE AC, GET RESPONSE included; a card with fewer is simply approved


@pytest.mark.parametrize("apdus", range(CONTACT_APDUS))
@pytest.mark.parametrize("how", ["pulled_after_apdu", "torn_at_apdu"])
def test_an_inserted_card_pulled_at_any_apdu_costs_nothing(shop: World, how: str, apdus: int) -> None:
    """Before the first GENERATE AC the sale goes on; after it, it is approved, declined or taken back at the host."""
    sale = shop.sell(Amount(620 + apdus, EUR))
    shop.device.present("mastercard-debit", insert=True, **{how: apdus + 1})
    time.sleep(1.0)
    shop.device.remove()
    if shop.call("sale.result", transaction=sale)["state"] == "opened":
        shop.device.present(CARD)
    state = shop.result(sale)["state"]
    assert state in {"approved", "declined", "reversing", "reversed"}
    free(shop)
    settled(shop)
    booked = [entry["state"] for entry in shop.bookings() if entry["transaction"] == sale]
    assert booked == {"approved": ["booked"], "declined": []}.get(state, ["reversed"])


def test_an_inserted_card_completes_what_the_host_approves(shop: World) -> None:
    for card, scheme in (("visa-credit", "Visa"), ("mastercard-credit", "Mastercard")):
        result = shop.tap(Amount(1250, EUR), card, insert=True)
        assert (result["state"], result["scheme"]) == ("approved", scheme)
        shop.wait(partial(advised, shop, result["id"]), "the card's last word to arrive")


def test_a_day_ends_and_the_host_holds_the_same_sums(shop: World) -> None:
    shop.tap(Amount(1250, EUR))
    free(shop)
    ended = shop.call("day.end", wait_ms=20_000)
    assert ended["decision"] == "balanced", ended
    assert shop.call("day.show")["open"]["sold"] == []


@pytest.mark.parametrize(("card", "minor"), [("declines-after-approval", 1400), ("mastercard-debit", 1491)])
def test_a_card_that_refuses_after_the_host_approved_is_reversed(shop: World, card: str, minor: int) -> None:
    result = shop.tap(Amount(minor, EUR), card, insert=True)
    assert (result["state"], result["reason"]) == ("reversing", "card")
    settled(shop)
    assert shop.state(result["id"]) == "reversed"


def test_an_inserted_card_offline_is_its_own_judge_within_limits(shop: World) -> None:
    shop.network(Fault.REFUSE)
    assert shop.tap(Amount(100, EUR))["state"] == "accepted"  # and sync has noticed
    result = shop.tap(Amount(900, EUR), "visa-debit", insert=True)
    assert result["state"] in {"accepted", "declined"}
    assert not [entry for entry in shop.bookings() if entry["transaction"] == result["id"]]


def asks(shop: World, *names: str, at: int = 0) -> bool | None:
    """Whether the panel has shown this question since it was looked at last, in the card's language."""
    wanted = render(ChooseApplication(names, at), "en").tobytes()
    return any(picture.image.tobytes() == wanted for picture in shop.device.pictures(wait_ms=200)) or None


TWO = ("VISA DEBIT", "VISA DEBIT")


def test_the_cardholder_chooses_with_the_keys(shop: World) -> None:
    sale = shop.sell(Amount(1250, EUR))
    shop.device.present("two-names", insert=True)
    shop.wait(lambda: asks(shop, *TWO), "the question")
    shop.device.press("down")
    shop.wait(lambda: asks(shop, *TWO, at=1), "the bar on the second name")
    shop.device.press("enter")
    assert shop.result(sale)["state"] == "approved"
    free(shop)


def test_the_screen_speaks_the_cards_language(shop: World) -> None:
    """German first, says this card; the terminal itself speaks English, and does so again afterwards."""
    shop.device.pictures()
    german = shop.tap(Amount(333, EUR), "mastercard-debit")
    free(shop)
    english = shop.tap(Amount(334, EUR))
    seen = [picture.image.tobytes() for picture in shop.device.pictures()]
    for sale, language in ((german, "de"), (english, "en")):
        shown = Approved(Amount(sale["amount_minor"], EUR), sale["scheme"], sale["last4"])
        assert render(shown, language).tobytes() in seen


def test_a_cardholder_who_wants_none_of_them_pays_nothing(shop: World) -> None:
    sale = shop.sell(Amount(1250, EUR))
    shop.device.present("two-names", insert=True)
    shop.wait(lambda: asks(shop, *TWO), "the question")

    def cancelled() -> bool | None:  # a busy machine may miss a finger
        shop.device.press("cancel")
        return shop.call("sale.result", transaction=sale, wait_ms=500)["decided"] or None

    shop.device.remove()
    shop.wait(cancelled, "the sale to be cancelled")
    assert shop.state(sale) == "void"
    free(shop)
    shop.tap(Amount(700, EUR))


@pytest.mark.parametrize("card", ["endless-afl", "duplicated-tag", "absurd-length", "missing-data", "afl-loop"])
def test_a_card_that_breaks_the_books_leaves_the_sale_to_the_next(shop: World, card: str) -> None:
    sale = shop.sell(Amount(1250, EUR))
    shop.device.present(card)
    time.sleep(1.0)
    shop.device.remove()
    time.sleep(0.7)  # one card after the other: the field has to be seen empty
    assert shop.call("sale.result", transaction=sale)["state"] == "opened"
    shop.device.present(CARD)
    assert shop.result(sale)["state"] == "approved"
    free(shop)


def test_a_card_that_asks_for_time_without_end_is_given_up(shop: World) -> None:
    """After 20 seconds for one command, however politely it asks."""
    sale = shop.sell(Amount(1250, EUR))
    shop.device.pictures()
    shop.device.present("stalls")
    given_up = render(TryAgain(Amount(1250, EUR), "card_lost"), "en").tobytes()
    shop.wait(
        lambda: any(each.image.tobytes() == given_up for each in shop.device.pictures(wait_ms=200)) or None,
        "the terminal to give the card up",
        timeout_s=40,
    )
    shop.device.remove()
    time.sleep(1.0)
    shop.device.present(CARD)
    assert shop.result(sale)["state"] == "approved"
    free(shop)


def test_a_mastercard_is_tapped(shop: World) -> None:
    result = shop.tap(Amount(333, EUR), "mastercard-debit")
    assert (result["state"], result["scheme"]) == ("approved", "Mastercard")


def test_an_amount_is_typed_on_the_keypad(shop: World) -> None:
    before = {sale["id"] for sale in shop.ledger()}
    shop.device.press("7", "8", "clear", "9", "0", "enter")
    shop.wait(lambda: shop.status()["busy"] or None, "the sale to be asked for")
    shop.device.present(CARD)
    sale = shop.wait(
        lambda: next((each for each in shop.ledger() if each["id"] not in before and each["authorisation_code"]), None),
        "the sale to be approved",
    )
    assert (sale["amount_minor"], sale["state"]) == (790, "approved")
    shop.wait(
        lambda: any(sound["frequency_hz"] == 1500 for sound in shop.device.lights()["sounds"]) or None, "the tone"
    )
    free(shop)


def test_cancel_on_the_keypad_ends_a_sale(shop: World) -> None:
    sale = shop.sell(Amount(810, EUR))
    time.sleep(0.3)
    shop.device.press("cancel")
    assert shop.result(sale)["state"] == "void"


def test_pcscd_stopped_and_started_again(shop: World) -> None:
    """Taps go on meanwhile; the contact reader is taken up again by itself."""
    shop.device.break_reader("stop_pcscd")
    time.sleep(1.5)
    assert shop.tap(Amount(420, EUR))["state"] == "approved"
    shop.device.mend_reader()
    time.sleep(2.5)
    assert shop.tap(Amount(430, EUR), "mastercard-debit", insert=True)["state"] == "approved"


def test_a_sale_is_cancelled_while_it_waits(shop: World) -> None:
    sale = shop.sell(Amount(800, EUR))
    assert shop.call("sale.cancel", transaction=sale) == {"cancelling": True}
    assert shop.result(sale)["state"] == "void"


@pytest.mark.parametrize("card", ["emulator", "broken-certificate", "no-fdda"])
def test_a_card_that_proves_nothing_buys_nothing_offline(shop: World, card: str) -> None:
    shop.network(Fault.REFUSE)
    shop.wait(lambda: shop.status()["link"]["online"] is False or None, "sync to notice") if known_offline(
        shop
    ) else None
    result = shop.tap(Amount(400, EUR), card)
    assert result["state"] == "declined"


def known_offline(world: World) -> bool:
    """Make sync notice that the network is gone: it notices when it has something to send."""
    result = world.tap(Amount(100, EUR))
    assert result["state"] == "accepted"
    return True


def test_offline_limits_hold(shop: World) -> None:
    shop.network(Fault.REFUSE)
    assert shop.tap(Amount(4_000, EUR))["state"] == "accepted"  # and sync has noticed
    assert shop.tap(Amount(4_001, EUR))["reason"] == "unable_to_go_online"
    for minor in (4_000, 4_000):
        assert shop.tap(Amount(minor, EUR))["state"] == "accepted"
    beyond = shop.tap(Amount(3_001, EUR))
    assert (beyond["state"], beyond["reason"]) == ("declined", "unable_to_go_online")
    assert shop.tap(Amount(3_000, EUR))["state"] == "accepted"


def test_an_offline_sale_that_the_host_declines_later_says_so(shop: World) -> None:
    shop.network(Fault.REFUSE)
    result = shop.tap(Amount(451, EUR))
    assert result["state"] == "accepted"
    shop.network(Fault.PASS)
    shop.wait(lambda: shop.state(result["id"]) == "refused" or None, "the later decline", timeout_s=20)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault.REFUSE, "host"),
        (Certificate.UNTRUSTED, "certificate"),
        (Certificate.EXPIRED, "expired"),
        (Certificate.WRONG_NAME, "name"),
    ],
    ids=lambda value: value.name.lower() if hasattr(value, "name") else None,
)
def test_no_way_to_the_host_is_said_and_the_sale_waits(shop: World, fault: Fault | Certificate, message: str) -> None:
    if isinstance(fault, Fault):
        shop.network(fault)
    else:
        controls.order(shop.directory / "host", controls.Show(fault))
        assert shop.proxy is not None
        shop.proxy.cut()
    try:
        result = shop.tap(Amount(610, EUR))
        assert result["state"] == "accepted"
        status = shop.wait(
            lambda: found if (found := shop.status())["link"]["online"] is False else None, "sync to notice"
        )
        assert message in status["link"]["error"].lower(), status["link"]["error"]
        assert status["unsent"]["count"] == 1
    finally:
        controls.order(shop.directory / "host", controls.Show(Certificate.GOOD))


@pytest.mark.parametrize(
    "misbehaviour",
    [
        controls.LoseAnswer(),
        controls.Garbage(),
        controls.CaptivePortal(),
        controls.WrongKey(),
        controls.OtherAnswer({"amount": 1}),
        controls.OtherAnswer({"decision": "approved", "transaction": "00000000-0000-4000-8000-000000000000"}),
        controls.Fail(500, booked=True),
        controls.Fail(503, retry_after_s=1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_the_host_answers_the_sale_is_booked_once(shop: World, misbehaviour: controls.Misbehaviour) -> None:
    shop.misbehave(misbehaviour)
    result = shop.tap(Amount(777, EUR))
    assert result["state"] in PAID
    settled(shop)
    assert shop.state(result["id"]) in {"approved", "settled"}


def test_sync_killed_and_away_loses_nothing(shop: World) -> None:
    shop.misbehave(controls.Delay(1500))
    sale = shop.sell(Amount(900, EUR))
    shop.device.present(CARD)
    shop.wait(lambda: shop.state(sale) == "authorising" or None, "the sale to be on its way")
    time.sleep(0.3)
    shop.kill("sync")
    shop.start_sync()
    assert shop.result(sale)["state"] in PAID
    free(shop)
    settled(shop)


@pytest.mark.parametrize("fault", ["unplug", "wedge", "babble"])
def test_a_broken_reader_is_said_and_taken_up_again(shop: World, fault: str) -> None:
    shop.device.pictures()
    sale = shop.sell(Amount(350, EUR))
    shop.device.break_reader(fault)
    time.sleep(2.5)
    assert shop.call("sale.result", transaction=sale)["state"] == "opened"
    assert shop.device.pictures(), "the panel says nothing of the broken reader"
    shop.device.mend_reader()
    time.sleep(1.5)
    shop.device.present(CARD)
    assert shop.result(sale)["state"] == "approved"
    free(shop)


# ---- nobody here can read it


def secrets_of(world: World) -> dict[str, bytes]:
    """What must stand nowhere in clear: card numbers and keys, as their digits or bytes."""
    card = CardProfile.load(world.directory / "device" / "cards" / f"{CARD}.json")
    track2 = card.track2.hex().upper()
    return {
        "PAN": card.pan.digits.encode(),
        "track 2 (BCD)": card.track2,
        "track 2 (digits)": track2.replace("F", "").encode(),
        "data key": bytes.fromhex((world.directory / "keys" / "terminal" / "data-key").read_text()),
        "chain key": bytes.fromhex((world.directory / "keys" / "terminal" / "chain-key").read_text()),
        "spool key": bytes.fromhex((world.directory / "keys" / "sync" / "spool-key").read_text()),
    }


def found_in_clear(world: World, extra: Path | None = None) -> list[str]:
    """Every secret in every encoding that could slip through, over all that the services have written."""
    needles = {}
    for name, secret in secrets_of(world).items():
        forms = {secret, secret.hex().encode(), secret.hex().upper().encode(), base64.b64encode(secret)[:-4]}
        if secret.isdigit():
            packed = bytes.fromhex(secret.decode() + "F" * (len(secret) % 2))
            forms |= {packed, packed.hex().encode(), packed.hex().upper().encode()}
            forms.add(b" ".join(secret[at : at + 4] for at in range(0, len(secret), 4)))
        needles[name] = forms
    places = [world.directory / name for name in ("ledger", "sync", "log", "run")]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert len(files) >= 6, files
    return [
        f"{name} in {path}"
        for path in [*files, *([extra] if extra else [])]
        for content in [path.read_bytes()]
        for name, forms in needles.items()
        if any(form in content for form in forms)
    ]


def test_no_secret_stands_anywhere_in_clear(shop: World, tmp_path: Path) -> None:
    assert shop.tap(Amount(640, EUR))["state"] == "approved"
    shop.network(Fault.REFUSE)
    assert shop.tap(Amount(650, EUR))["state"] == "accepted"
    assert found_in_clear(shop) == []
    # The search itself works: each secret is found in each encoding when it is planted.
    for name, secret in secrets_of(shop).items():
        for form in (secret, secret.hex().encode(), base64.b64encode(secret)):
            planted = tmp_path / "planted"
            planted.write_bytes(b"before" + form + b"after")
            assert any(found.startswith(f"{name} in") for found in found_in_clear(shop, planted)), (name, form)


# ---- commands


def payterm(world: World, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "terminal", "--config", str(world.config), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_commands_answer_scripts_and_people(shop: World) -> None:
    status = payterm(shop, "status", "--json")
    assert json.loads(status.stdout)["terminal"] == "T-0001"
    assert re.search(r"^host +reached", payterm(shop, "status").stdout, re.MULTILINE)
    sales = json.loads(payterm(shop, "ledger", "list", "--json", "--limit", "500").stdout)
    assert {"id", "sequence", "state", "amount_minor", "currency"} <= set(sales[0])
    assert len(sales) == len({sale["id"] for sale in sales}) > 5
    assert all(earlier["sequence"] > later["sequence"] for earlier, later in itertools.pairwise(sales))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("sale", "12.345"), 2),
        (("sale", "600"), 4),
        (("sale", "1", "XYZ"), 2),
        (("keep", "00000000-0000-4000-8000-000000000000"), 4),
        (("keep", "nonsense"), 4),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_nonsense_is_refused_without_a_traceback(shop: World, arguments: tuple[str, ...], code: int) -> None:
    result = payterm(shop, *arguments)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("payterm: ")

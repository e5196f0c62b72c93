"""The Stripe destination against the double over TLS: what is sent, what each failure is called, nothing booked twice.

The official library is in between, so that what is tested is what it makes of our requests.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import stripe
from stripe_rig import (
    HOUR_MS,
    LIFE,
    Notice,
    Queue,
    Shop,
    envelope,
    form,
    notice,
    parcel,
    refund,
    refund_envelope,
    stripe_shop,
)
from sync_rig import faster_than

from hwsim.stripe_double import Delay, DropAnswer, Fail, Garbage, State, When
from hwsim.stripe_double.faults import Fault
from hwsim.stripe_double.server import twice
from terminal.ledger.errors import KeyUnavailable
from terminal.sync.destinations import Answered, Busy, NotSent, Parcel, Refused, Result, Unsure
from terminal.sync.destinations.stripe import (
    ApiKey,
    Event,
    Reply,
    StripeDestination,
    StripeSettings,
    event_of,
    facts_of,
    word_of,
)
from terminal.sync.errors import Unsendable

SALE = "00000000-0000-0000-0000-000000000001"


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with stripe_shop(tmp_path / "stripe") as shop:
        yield shop


def sent(shop: Shop, of: Notice | None = None, *, times: int = 1, earlier: str | None = None, **changed: Any) -> Result:
    with shop.destination(**changed) as destination:
        result: Result = NotSent("never tried")
        for _ in range(times):
            result = destination.send(parcel(of or notice(), earlier=earlier))
    return result


def record(shop: Shop, of: Notice | None = None) -> str:
    """A sale that Stripe knows; its payment record."""
    result = sent(shop, of)
    assert isinstance(result, Answered), result
    assert result.receipt is not None
    return result.receipt


def message(result: Result) -> str:
    assert not isinstance(result, Answered)
    return result.message


# ---- what is sent


def test_a_sale_is_reported_without_an_outcome(shop: Shop) -> None:
    result = sent(shop)
    assert isinstance(result, Answered)
    [post] = shop.posts()
    assert post == {
        "amount_requested[currency]": "eur",
        "amount_requested[value]": "1001",
        "initiated_at": "1799999990",
        "customer_presence": "on_session",
        "payment_method_details[type]": "custom",
        "payment_method_details[custom][display_name]": "Payment terminal",
        "processor_details[type]": "custom",
        "processor_details[custom][payment_reference]": SALE,
        "metadata[terminal_id]": "T-0001",
        "metadata[local_id]": "1/1",
        "metadata[stored_at]": "2027-01-15T07:59:51Z",
        "metadata[offline]": "false",
    }
    [booking] = shop.double.bookings()
    [request] = shop.double.requests()
    assert booking.state is State.OPEN, "nobody has guaranteed anything"
    assert Reply.read(result.answer) == Reply(booking.id, request.request_id)
    assert result.receipt == booking.id


@pytest.mark.parametrize(
    ("event", "path", "expected"),
    [
        (Event.GUARANTEED, "report_payment_attempt_guaranteed", {"guaranteed_at": "1799999991"}),
        (Event.FAILED, "report_payment_attempt_failed", {"failed_at": "1799999991"}),
        (Event.CANCELED, "report_payment_attempt_canceled", {"canceled_at": "1799999991"}),
        (
            Event.REFUNDED,
            "report_refund",
            {
                "outcome": "refunded",
                "amount[currency]": "eur",
                "amount[value]": "1001",
                "processor_details[type]": "custom",
                "processor_details[custom][refund_reference]": SALE,
                "refunded[refunded_at]": "1799999991",
                "metadata[refund]": SALE,
            },
        ),
    ],
)
def test_what_follows_is_about_the_payment_record(
    shop: Shop, event: Event, path: str, expected: dict[str, str]
) -> None:
    known = record(shop)
    if event is Event.REFUNDED:
        sent(shop, notice(event=Event.GUARANTEED), earlier=known)
    result = sent(shop, notice(event=event), earlier=known)
    assert isinstance(result, Answered), result
    assert result.receipt == known
    last = shop.double.requests()[-1]
    assert last.path == f"/v1/payment_records/{known}/{path}"
    assert form(last.body) == expected


def test_only_what_is_needed_goes_along(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stripe, "enable_telemetry", True)  # as the library has it
    with shop.destination() as destination:
        destination.send(parcel(notice()))
        destination.send(parcel(notice(2), key="another"))
    for request in shop.double.requests():
        assert request.headers["stripe-version"] == "2026-10-28.endive"
        assert request.idempotency_key in {f"key of {SALE}/notice.reported", "another"}
        assert not [name for name in request.headers if "telemetry" in name]
        assert set(json.loads(request.headers["x-stripe-client-user-agent"])) <= {
            "bindings_version", "lang", "httplib", "lang_version", "ai_agent",
        }  # fmt: skip


def test_a_newer_library_changes_no_version(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stripe._api_version._ApiVersion.CURRENT", "2027-12-31.fern")
    assert isinstance(sent(shop), Answered)


def test_the_body_is_a_function_of_what_happened() -> None:
    for event in Event:
        assert notice(event=event).body == notice(event=event).body


@pytest.mark.parametrize(("currency", "value"), [("JPY", 500), ("KWD", 500), ("ISK", 50_000), ("UGX", 50_000)])
def test_minor_units_are_stripes(currency: str, value: int) -> None:
    params = json.loads(notice(currency=currency, amount=500).body)["params"]
    assert params["amount_requested"] == {"currency": currency.lower(), "value": value}


@pytest.mark.parametrize(("opened", "stored"), [(False, False), (False, True), (True, False)])
def test_a_time_that_cannot_be_believed_says_so(opened: bool, stored: bool) -> None:
    told = notice(opened_at=5_000, clock_synchronised=opened, synchronised=stored, deferred=True)
    params = json.loads(told.body)["params"]
    assert params["metadata"]["clock"] == "not synchronised"
    assert params["metadata"]["offline"] == "true"
    assert params["initiated_at"] == (5 if opened else told.at_ms // 1000)


@pytest.mark.parametrize("event", [event for event in Event if event is not Event.REPORTED])
def test_what_follows_is_dated_by_its_own_clock(event: Event) -> None:
    sure = json.loads(notice(event=event, clock_synchronised=False).body)["params"]
    unsure = json.loads(notice(event=event, synchronised=False).body)["params"]
    assert "clock" not in sure.get("metadata", {})
    assert unsure["metadata"]["clock"] == "not synchronised"


# ---- what envelopes are about


def test_the_facts_of_a_refund_are_about_its_sale() -> None:
    facts = facts_of(refund_envelope(9, of=1, amount=300))
    assert facts is not None
    assert (facts.sale, facts.refund, facts.amount_minor) == (UUID(int=1), UUID(int=9), 300)
    assert word_of(Event.REFUNDED, facts) == f"notice.refunded.{UUID(int=9)}"
    with pytest.raises(ValueError, match="never guaranteed"):
        dataclasses.replace(notice(event=Event.GUARANTEED), facts=facts).body  # noqa: B018


@pytest.mark.parametrize("event", ["checkpoint", "advice", "batch", "reconciliation", "certificate", "anything"])
def test_envelopes_about_no_money_tell_nothing(event: str, caplog: pytest.LogCaptureFixture) -> None:
    assert facts_of(envelope(event=event)) is None
    assert not caplog.records


@pytest.mark.parametrize(
    "text",
    [
        "", "a.b", "a.!!.c", "a.bnVsbA.c", "é.é.é", envelope(amount=0), envelope(amount="12"), envelope(v=2),
        envelope(currency="eur"), envelope(transaction="4000001234567899"), envelope(terminal="a b"),
        envelope(kind="refund"), envelope(of=SALE), envelope(opened_at=-1),
    ],
)  # fmt: skip
def test_an_envelope_that_cannot_be_read_keeps_nothing_from_the_host(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert facts_of(text) is None, "and it does not raise: the host's row is stored in the same transaction"
    assert "cannot be read" in caplog.text
    assert "4000001234567899" not in caplog.text


R, G, F, C = (f"notice.{event.value}" for event in (Event.REPORTED, Event.GUARANTEED, Event.FAILED, Event.CANCELED))


@pytest.mark.parametrize(
    ("state", "known", "event"),
    [
        ("approved", {R}, Event.GUARANTEED),
        ("settled", {R}, Event.GUARANTEED),
        ("declined", {R}, Event.FAILED),
        ("refused", {R}, Event.FAILED),
        ("reversed", {R}, Event.CANCELED),
        ("reversed", {R, G}, Event.REFUNDED),
        ("approved", {R, G}, None),
        ("reversed", {R, F}, None),
        ("reversed", {R, C}, None),
        ("approved", set(), None),  # sold before Stripe was configured
        ("completing", {R}, Event.GUARANTEED),
        ("reversing", {R}, None),
        ("accepted", {R}, None),
        ("authorising", {R}, None),
    ],
)
def test_what_a_state_means(state: str, known: set[str], event: Event | None) -> None:
    assert event_of(notice().facts, state, known) is event


@pytest.mark.parametrize(
    ("state", "event"), [("approved", Event.REFUNDED), ("declined", None), ("reversed", None), ("reversing", None)]
)
def test_what_the_state_of_a_refund_means(state: str, event: Event | None) -> None:
    facts = refund(9, amount=300).facts
    assert event_of(facts, state, {R, G}) is event
    assert event_of(facts, state, {R, G, word_of(Event.REFUNDED, facts)}) is None
    assert event_of(facts, state, {R, G, word_of(Event.REFUNDED, refund(8, amount=1).facts)}) is event


def test_guaranteed_only_after_the_hosts_final_answer() -> None:
    told = [state for state in ("accepted", "authorising", "completing", "reversing", "void", "opened", "approved")
            if event_of(notice().facts, state, {R}) is Event.GUARANTEED]  # fmt: skip
    assert told == ["completing", "approved"]


# ---- no card data

CARD = {
    "last4": "7899",
    "scheme": "visa-debit",
    "card_ref": "ref-5f3a9c",
    "sealed": "c2VhbGVkIGNhcmQ",
    "pan": "4000001234567899",
    "aid": "A0000000031010",
    "label": "TEST DEBIT",
}


def test_no_card_data_reaches_a_request(shop: Shop) -> None:
    """By what is sent at all: every parameter is one of these, none can hold a card, none holds one."""
    lives = {1: LIFE, 2: (Event.REPORTED, Event.FAILED), 3: (Event.REPORTED, Event.CANCELED)}
    with shop.destination() as destination:
        queue = Queue(shop.clock, destination)
        for number, events in lives.items():
            queue.tell(*(notice(number, event, **CARD) for event in events))
        queue.settle(3)
        destination.look_up(parcel(notice(9, **CARD)), first_attempt_ms=0)
    everything = ""
    names: set[str] = set()
    for request in shop.double.requests():
        everything += f"{request.path} {request.body} {request.headers}"
        names |= set(form(request.body))
    assert len(shop.double.requests()) == 8
    assert not [secret for secret in CARD.values() if secret in everything]
    assert "card" not in everything.lower()
    assert {name.partition("[")[0] for name in names} == {
        "amount", "amount_requested", "canceled_at", "customer_presence", "failed_at", "guaranteed_at", "initiated_at",
        "metadata", "outcome", "payment_method_details", "processor_details", "refunded",
    }  # fmt: skip
    assert {name for name in names if name.startswith("metadata")} == {
        "metadata[terminal_id]", "metadata[local_id]", "metadata[stored_at]", "metadata[offline]", "metadata[refund]",
    }  # fmt: skip


# ---- what a failure is called

BEFORE, AFTER = When.BEFORE, When.AFTER


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        pytest.param(
            Fail(status=500, when=AFTER), Unsure, "has a fault (500): sent again later [req_", id="500 booked"
        ),
        pytest.param(Fail(status=500, when=BEFORE), Unsure, "has a fault (500)", id="500 not booked"),
        pytest.param(Fail(status=503), Unsure, "has a fault (503)", id="503"),
        pytest.param(Fail(status=409), Unsure, "wants it sent again later (409) [req_", id="409"),
        pytest.param(Fail(status=429), Busy, "is busy (429): sent again later [req_", id="429"),
        pytest.param(Fail(status=400, should_retry=True), Unsure, "wants it sent again later (400)", id="400 retry"),
        pytest.param(Fail(status=400), Refused, "takes nothing (400): are payment records enabled", id="400"),
        pytest.param(Fail(status=403), Refused, "give it the permission to write and read", id="403"),
        pytest.param(Fail(status=404), Refused, "check [stripe] url", id="404"),
        pytest.param(DropAnswer(), Unsure, "broke off before its answer was whole", id="answer lost"),
        pytest.param(DropAnswer(booked=False), Unsure, "broke off before its answer was whole", id="request lost"),
        pytest.param(Delay(5_000), Unsure, "does not answer in time", id="late"),
        pytest.param(Garbage(), Unsure, "has a fault (200)", id="log-in page"),
        pytest.param(Garbage("[]"), Unsure, "garbled", id="list"),
        pytest.param(Garbage("null"), Unsure, "garbled", id="null"),
        pytest.param(Garbage('{"object":"payment_record","id":7}'), Unsure, "garbled", id="no id"),
        pytest.param(Garbage('{"object":"payment_record","id":"pr_1"}'), Unsure, "garbled", id="another record"),
        pytest.param(Garbage("x" * 2_000_000), Unsure, "broke off", id="huge"),
    ],
)
def test_every_failure_has_its_name(shop: Shop, fault: Fault, kind: type[Any], text: str) -> None:
    shop.double.faults.arm(fault)
    with faster_than(4.0):  # a machine that is busy with other things takes one
        result = sent(shop, read_timeout_ms=300 if isinstance(fault, Delay) else 3_000)
    assert isinstance(result, kind), result
    assert text in message(result), result
    if isinstance(result, Refused):
        assert not result.permanent, "what is not said of the item must not condemn the queue"


@pytest.mark.parametrize(("status", "kind"), [(429, Busy), (503, Unsure), (409, Unsure)])
def test_retry_after(shop: Shop, status: int, kind: type[Any]) -> None:
    shop.double.faults.arm(Fail(status=status, retry_after_s=7))
    result = sent(shop)
    assert isinstance(result, kind)
    assert result.retry_after_ms == 7_000


def test_what_is_said_of_the_item_is_permanent(shop: Shop) -> None:
    result = sent(shop, notice(opened_at=0))
    assert isinstance(result, Refused)
    assert result.permanent
    assert "refuses it (400, parameter_invalid, initiated_at): kept for a person" in result.message


def test_a_move_that_does_not_fit_is_permanent(shop: Shop) -> None:
    known = record(shop)
    assert isinstance(sent(shop, notice(event=Event.FAILED), earlier=known), Answered)
    result = sent(shop, notice(event=Event.GUARANTEED), earlier=known)
    assert isinstance(result, Refused)
    assert result.permanent


def test_a_payment_record_that_is_gone_is_permanent(shop: Shop) -> None:
    result = sent(shop, notice(event=Event.GUARANTEED), earlier="pr_gone")
    assert isinstance(result, Refused)
    assert result.permanent
    assert "resource_missing" in result.message


def test_other_parameters_under_the_same_key_are_refused(shop: Shop) -> None:
    sent(shop)
    result = sent(shop, notice(amount=99_999))
    assert isinstance(result, Refused)
    assert result.permanent
    assert "has had another request under this key" in result.message
    assert [booking.amount for booking in shop.double.bookings()] == [1_001]


@pytest.mark.parametrize("earlier", [None, "", "pr_1/../../charges", "pr_é", "ch_1"])
def test_nothing_leaves_without_the_payment_record(shop: Shop, earlier: str | None) -> None:
    result = sent(shop, notice(event=Event.GUARANTEED), earlier=earlier)
    assert isinstance(result, Refused)
    assert result.permanent, "the others go on"
    assert shop.double.requests() == []


def test_stripe_down(shop: Shop) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        result = sent(shop, base_url=f"https://127.0.0.1:{free.getsockname()[1]}")
    assert result == NotSent("Stripe (127.0.0.1) is down: it refuses connections")


def test_a_certificate_of_somebody_else_gets_nothing(shop: Shop, tmp_path: Path) -> None:
    with stripe_shop(tmp_path / "theirs") as theirs:
        result = sent(shop, base_url=theirs.server.url)
        assert isinstance(result, NotSent)
        assert "is not trusted: check [stripe] ca" in result.message
        assert theirs.double.requests() == []


def test_the_public_authorities_do_not_vouch_for_the_double(shop: Shop) -> None:
    assert isinstance(sent(shop, ca_file=None), NotSent)


@pytest.mark.parametrize(
    "url", ["http://api.stripe.com", "https://", "https://user@host", "https://host/v1", "file:/x"]
)
def test_only_plain_https(shop: Shop, url: str) -> None:
    with pytest.raises(Unsendable, match="stays stored"), shop.destination(base_url=url):
        pass


def test_a_lost_answer_is_replayed(shop: Shop) -> None:
    shop.double.faults.arm(DropAnswer())
    assert isinstance(sent(shop, times=2), Answered)
    shop.check()
    assert len(shop.double.bookings()) == 1


def test_a_429_is_no_result(shop: Shop) -> None:
    shop.double.faults.arm(Fail(status=429))
    assert isinstance(sent(shop, times=2), Answered)


# ---- a failure that Stripe has saved is looked up


def test_a_saved_500_of_a_booked_sale_is_found(shop: Shop) -> None:
    shop.double.faults.arm(Fail(status=500, when=AFTER))
    result = sent(shop, times=2)
    assert isinstance(result, Answered)
    reply = Reply.read(result.answer)
    assert reply.found
    assert [reply.record] == [result.receipt] == [booking.id for booking in shop.double.bookings()]


def test_a_saved_500_of_a_sale_that_is_not_there_stays_open(shop: Shop) -> None:
    shop.double.faults.arm(Fail(status=500, when=BEFORE))
    result = sent(shop, times=2)
    assert isinstance(result, Unsure)
    assert "failed in the middle (500) and does not know better: looked up later" in result.message
    assert shop.double.bookings() == []


def test_should_retry_overrides_the_status(shop: Shop) -> None:
    shop.double.faults.arm(Fail(status=500, when=AFTER, should_retry=False))
    assert isinstance(sent(shop), Answered), "told not to repeat: looked up at once"
    shop.double.faults.arm(Fail(status=500, when=AFTER, should_retry=True))
    with shop.destination() as destination:
        repeated = [destination.send(parcel(notice(2), key="second")) for _ in range(2)]
    assert all(isinstance(each, Unsure) and "has a fault (500)" in each.message for each in repeated), "told to repeat"


# ---- looking up


def test_found_among_many(shop: Shop) -> None:
    wanted = record(shop)
    with shop.destination() as destination:
        for number in range(2, 253):
            shop.clock.advance(1_000)
            destination.send(parcel(notice(number), key=f"{number}"))
        found = destination.look_up(parcel(notice()), first_attempt_ms=shop.clock.wall_ms() - HOUR_MS)
    assert isinstance(found, Answered)
    assert found.receipt == wanted
    pages = [request.path for request in shop.double.requests() if request.method == "GET"]
    assert len(pages) == 3
    assert all("created_after" in page and "created_before" in page for page in pages)


def test_absent_from_the_list(shop: Shop) -> None:
    sent(shop, notice(2))
    with shop.destination() as destination:
        assert destination.look_up(parcel(notice()), first_attempt_ms=shop.clock.wall_ms()) is None
        assert destination.look_up(parcel(notice()), first_attempt_ms=None) is None
        other = notice(2, amount=77)
        assert destination.look_up(parcel(other), first_attempt_ms=None) is None, "another amount is another sale"


def test_the_window_covers_clocks_that_differ(shop: Shop) -> None:
    sent(shop)
    here = shop.clock.wall_ms()
    with shop.destination() as destination:
        for first_attempt_ms in (here + 600_000, here - 600_000, here - 23 * HOUR_MS):
            assert isinstance(destination.look_up(parcel(notice()), first_attempt_ms=first_attempt_ms), Answered)
        assert destination.look_up(parcel(notice()), first_attempt_ms=here + 2 * HOUR_MS) is None


@pytest.mark.parametrize("event", [Event.GUARANTEED, Event.FAILED, Event.CANCELED])
def test_what_followed_is_found_on_the_payment_record(shop: Shop, event: Event) -> None:
    following = parcel(notice(event=event), earlier=record(shop))
    with shop.destination() as destination:
        assert destination.look_up(following, first_attempt_ms=None) is None
        destination.send(following)
        found = destination.look_up(following, first_attempt_ms=None)
    assert isinstance(found, Answered)
    assert found.receipt == following.earlier


def test_refunds_are_told_apart(shop: Shop) -> None:
    """A sum alone would take a smaller refund for arrived because a greater one has."""
    known = record(shop)
    guaranteed = parcel(notice(event=Event.GUARANTEED), earlier=known)
    first, second, last = (
        parcel(refund(number, amount=amount), earlier=known) for number, amount in ((7, 400), (8, 300), (9, 301))
    )
    with shop.destination() as destination:
        destination.send(guaranteed)
        for each in (first, second, last):
            assert destination.look_up(each, first_attempt_ms=None) is None
            assert isinstance(destination.send(each), Answered)
            assert isinstance(destination.look_up(each, first_attempt_ms=None), Answered)
        assert isinstance(destination.look_up(guaranteed, first_attempt_ms=None), Answered), "not hidden by refunds"
    references = [form(each.body).get("processor_details[custom][refund_reference]") for each in shop.double.requests()]
    assert [each for each in references if each] == [str(UUID(int=number)) for number in (7, 8, 9)]
    assert [booking.refunded for booking in shop.double.bookings()] == [1_001]


@pytest.mark.parametrize(
    "fault", [Fail(status=500), Fail(status=429), Fail(status=403), DropAnswer(), Garbage(), Garbage("7")]
)
def test_a_list_that_does_not_come_settles_nothing(shop: Shop, fault: Fault) -> None:
    sent(shop)
    shop.double.faults.arm(fault)
    with shop.destination() as destination:
        assert isinstance(destination.look_up(parcel(notice()), first_attempt_ms=None), Unsure)


# ---- keys

RK_TEST, RK_LIVE = "rk_test_0123456789abcdef", "rk_live_0123456789abcdef"


def test_keys_of_the_mode_that_is_configured() -> None:
    assert ApiKey.parse(RK_TEST, live=False).text == RK_TEST
    assert ApiKey.parse(RK_LIVE, live=True).text == RK_LIVE


@pytest.mark.parametrize(
    ("text", "live", "said"),
    [
        (RK_LIVE, False, "is a live key, and \\[stripe\\] does not say live = true"),
        (RK_TEST, True, "is a test key"),
        ("sk_test_0123456789abcdef", False, "is no restricted key"),
        ("sk_live_0123456789abcdef", True, "is no restricted key"),
        ("sk_live_0123456789abcdef", False, "is no restricted key"),
        ("pk_test_0123456789abcdef", False, "is no restricted key"),
        ("", False, "holds no key"),
        ("rk_test_0123456789abcdef\nx", False, "holds no key"),
        ("rk_test_é123456789abcdef", False, "holds no key"),
    ],
)
def test_keys_that_are_refused(text: str, live: bool, said: str) -> None:
    with pytest.raises(Unsendable, match=said) as refused:
        ApiKey.parse(text, live=live)
    assert "456789" not in str(refused.value)


def test_the_key_is_a_credential(tmp_path: Path) -> None:
    file = tmp_path / "stripe-key"
    with pytest.raises(KeyUnavailable):
        ApiKey.load(tmp_path, live=False)
    file.write_text(RK_TEST + "\n")
    file.chmod(0o644)
    with pytest.raises(KeyUnavailable, match="0600"):
        ApiKey.load(tmp_path, live=False)
    file.chmod(0o600)
    assert ApiKey.load(tmp_path, live=False).text == RK_TEST


def test_the_key_is_seen_nowhere(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """Stripe quotes parts of a key in its messages, and the library logs them."""
    caplog.set_level(logging.DEBUG)
    wrong = ApiKey.parse("rk_test_badbadbadbadbad1", live=False)
    result = sent(shop, key=wrong)
    assert isinstance(result, Refused)
    assert not result.permanent
    assert "replace the credential stripe-key" in result.message
    ours = shop.settings.key.text
    assert isinstance(sent(shop), Answered)
    for text in (caplog.text, repr(shop.settings), repr(wrong), result.message):
        assert "badbad" not in text
        assert "bad1" not in text
        assert ours not in text
    assert "request req_" in caplog.text, "by which Stripe finds it again"


# ---- a dead or blocked Stripe: what bounds an attempt


@pytest.fixture
def black_hole() -> Iterator[tuple[str, int]]:
    """It takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[:2]


@pytest.mark.parametrize("call", ["send", "look_up"])
def test_a_blocked_stripe_ends_within_its_limit(shop: Shop, black_hole: tuple[str, int], call: str) -> None:
    url = f"https://localhost:{black_hole[1]}"
    with shop.destination(base_url=url, connect_timeout_ms=200, total_timeout_ms=400) as destination, faster_than(3):
        if call == "send":
            result = destination.send(parcel(notice()))
            assert isinstance(result, NotSent), "no request was handed to the network"
        else:
            assert isinstance(destination.look_up(parcel(notice()), first_attempt_ms=None), Unsure)


def test_many_addresses_share_one_deadline(
    shop: Shop, black_hole: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of forty addresses may take the connect time-out, and all together the whole."""
    connects: list[float | None] = []

    class Mute(socket.socket):
        def connect(self, address: Any) -> None:
            connects.append(self.gettimeout())
            threading.Event().wait(self.gettimeout())
            raise TimeoutError

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", black_hole)] * 40
    with shop.destination(connect_timeout_ms=100, total_timeout_ms=350) as destination:
        monkeypatch.setattr("terminal.sync.destinations.wire.socket.getaddrinfo", lambda *_, **__: found)
        monkeypatch.setattr("terminal.sync.destinations.wire.socket.socket", Mute)
        with faster_than(3):
            assert isinstance(destination.send(parcel(notice())), NotSent)
    assert 2 <= len(connects) < 10


@pytest.mark.parametrize("event", [Event.GUARANTEED, Event.FAILED, Event.CANCELED])
@pytest.mark.parametrize("text", ["{}", '{"object":"payment_record","id":"pr_1"}', "[]"])
def test_an_answer_about_something_else_proves_nothing(shop: Shop, event: Event, text: str) -> None:
    """It would have an event laid aside for a person that Stripe has long had."""
    following = parcel(notice(event=event), earlier=record(shop))
    shop.double.faults.arm(Garbage(text))
    with shop.destination() as destination:
        assert isinstance(destination.look_up(following, first_attempt_ms=None), Unsure)
        assert destination.look_up(following, first_attempt_ms=None) is None  # control: now it is the record itself


def test_all_pages_of_a_look_up_share_one_deadline(shop: Shop) -> None:
    with shop.destination(total_timeout_ms=2_000) as destination:
        for number in range(2, 104):
            assert isinstance(destination.send(parcel(notice(number))), Answered)
        shop.double.faults.arm(Delay(600), times=2)
    with shop.destination(total_timeout_ms=900, read_timeout_ms=800) as destination, faster_than(3):
        assert isinstance(destination.look_up(parcel(notice()), first_attempt_ms=None), Unsure)


def test_the_limits_are_below_what_the_terminal_waits() -> None:
    """20 s of silence, and sync counts as gone."""
    settings = StripeSettings(ApiKey.parse(RK_TEST, live=False))
    assert max(settings.connect_timeout_ms, settings.read_timeout_ms) < settings.total_timeout_ms < 20_000


def test_each_thread_has_a_destination_of_its_own(shop: Shop, black_hole: tuple[str, int]) -> None:
    """One that is stuck delays no other, and all that go well book each sale once."""

    def report(numbers: range) -> list[Result]:
        with shop.destination() as destination:
            return [destination.send(parcel(notice(number))) for number in numbers]

    stuck_url = f"https://localhost:{black_hole[1]}"
    with ThreadPoolExecutor(4) as pool:
        stuck = pool.submit(sent, shop, notice(99), base_url=stuck_url, connect_timeout_ms=2_000)
        well = [pool.submit(report, range(first, first + 5)) for first in (1, 6, 11)]
        results = [result for each in well for result in each.result(timeout=10)]
        assert not stuck.done(), "the others did not wait for it"
        assert isinstance(stuck.result(timeout=10), NotSent)
    assert all(isinstance(each, Answered) for each in results)
    assert len({booking.payment_reference for booking in shop.double.bookings()}) == 15
    shop.check()


def test_certificates_are_always_checked(shop: Shop) -> None:
    with shop.destination() as destination:
        context: ssl.SSLContext = destination._http._session.adapters["https://"]._context  # type: ignore[attr-defined]
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED


# ---- what others have been hurt by


@pytest.fixture
def queue(shop: Shop) -> Iterator[Queue]:
    with shop.destination() as destination:
        yield Queue(shop.clock, destination)


def test_a_sale_from_report_to_refund(shop: Shop, queue: Queue) -> None:
    queue.tell(*(notice(event=event) for event in LIFE))
    queue.settle(3)
    [booking] = shop.double.bookings()
    assert (booking.state, booking.refunded) == (State.GUARANTEED, 1_001)
    assert {answer.receipt for answer in queue.answers.values()} == {booking.id}
    assert len({request.idempotency_key for request in shop.double.requests()}) == 3, "each report has its own key"
    shop.check()


def test_eight_orders_stay_eight_though_every_answer_is_lost_while_draining(shop: Shop, queue: Queue) -> None:
    for number in range(1, 9):
        queue.tell(notice(number), notice(number, Event.GUARANTEED))
    shop.double.faults.arm(DropAnswer(), 12)
    shop.double.faults.arm(Fail(status=500, when=AFTER), 4)
    queue.settle()
    assert queue.open == 0
    assert len(shop.double.bookings()) == 8
    assert {booking.state for booking in shop.double.bookings()} == {State.GUARANTEED}
    assert len(shop.posts()) > 16, "they were sent again"
    shop.check()


def test_a_timeout_then_409s_is_not_failed_but_unsure(shop: Shop, queue: Queue) -> None:
    """The device once said failed, and the dashboard said paid."""
    queue.tell(notice())
    shop.double.faults.arm(DropAnswer())
    shop.double.faults.arm(Fail(status=409), 3)
    queue.settle(4)
    assert (queue.open, queue.apart) == (1, [])
    queue.settle(1)
    assert queue.open == 0
    shop.check()


def test_never_sent_may_wait_for_ever(shop: Shop, queue: Queue) -> None:
    shop.server.stop()
    queue.tell(notice())
    shop.clock.advance(20 * 24 * HOUR_MS)
    shop.server.start()
    queue.settle(2)
    assert queue.open == 0
    shop.check()


def ambiguous(shop: Shop, queue: Queue) -> None:
    """Booked, but nobody here knows: the answer was lost."""
    queue.tell(notice())
    shop.double.faults.arm(DropAnswer())
    queue.round()
    assert len(shop.double.bookings()) == 1
    assert queue.open == 1


def test_what_is_ambiguous_after_23_hours_is_never_sent_again_and_found(shop: Shop, queue: Queue) -> None:
    ambiguous(shop, queue)
    shop.clock.advance(23 * HOUR_MS + 60_000)
    queue.settle(2)
    assert len(shop.posts()) == 1
    assert (queue.open, queue.apart) == (0, [])
    shop.check()


def test_what_is_ambiguous_and_not_in_the_list_is_left_to_a_person(shop: Shop, queue: Queue) -> None:
    queue.tell(notice())
    shop.double.faults.arm(DropAnswer(booked=False))
    queue.round()
    shop.clock.advance(23 * HOUR_MS + 60_000)
    queue.settle(3)
    assert [item.held for item in queue.apart] == ["ambiguous for too long"]
    assert len(shop.posts()) == 1
    assert shop.double.bookings() == []


def test_a_decline_after_forwarding_is_told(shop: Shop, queue: Queue) -> None:
    queue.tell(notice(deferred=True), notice(event=Event.FAILED, deferred=True))
    queue.settle(2)
    [booking] = shop.double.bookings()
    assert (booking.state, booking.metadata["offline"]) == (State.FAILED, "true")


class FreshKeys:
    """A destination as it must not be: another key for every attempt."""

    def __init__(self, destination: StripeDestination) -> None:
        self._destination = destination
        self.name = destination.name
        self.repeat_safe_ms: int | None = destination.repeat_safe_ms
        self._count = 0

    def send(self, parcel: Parcel) -> Result:
        self._count += 1
        return self._destination.send(dataclasses.replace(parcel, idempotency_key=f"fresh {self._count}"))

    def look_up(self, parcel: Parcel, *, first_attempt_ms: int | None) -> Answered | Unsure | None:
        return self._destination.look_up(parcel, first_attempt_ms=first_attempt_ms)

    def close(self) -> None:
        pass


class Careless(FreshKeys):
    """Another one: it repeats for ever, under the same key."""

    def __init__(self, destination: StripeDestination) -> None:
        super().__init__(destination)
        self.repeat_safe_ms = None

    def send(self, parcel: Parcel) -> Result:
        return self._destination.send(parcel)


def test_control_a_fresh_key_per_attempt_books_twice(shop: Shop) -> None:
    with shop.destination() as destination:
        queue = Queue(shop.clock, FreshKeys(destination))
        ambiguous(shop, queue)
        queue.settle(2)
    assert twice(shop.double.bookings()) == [SALE]
    with pytest.raises(AssertionError):
        shop.check()


def test_control_an_ambiguous_one_repeated_after_24_hours_books_twice(shop: Shop) -> None:
    with shop.destination() as destination:
        queue = Queue(shop.clock, Careless(destination))
        ambiguous(shop, queue)
        shop.clock.advance(24 * HOUR_MS)
        queue.settle(2)
    assert twice(shop.double.bookings()) == [SALE]
    with pytest.raises(AssertionError):
        shop.check()


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_each_sale_is_booked_once(shop: Shop, queue: Queue, seed: int) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    faults: list[Fault] = [
        DropAnswer(),
        DropAnswer(booked=False),
        Fail(status=500, when=BEFORE),
        Fail(status=500, when=AFTER),
        Fail(status=500, when=AFTER, should_retry=False),
        Fail(status=503),
        Fail(status=429, retry_after_s=2),
        Fail(status=409),
        Garbage(),
    ]
    last: dict[UUID, Event] = {}
    for number in range(1, 11):
        outcome = chance.choice([(Event.GUARANTEED,), (Event.FAILED,), (Event.CANCELED,), LIFE[1:]])
        last[UUID(int=number)] = outcome[-1]
        queue.tell(notice(number), *(notice(number, event) for event in outcome))
        for _ in range(chance.randrange(4)):
            shop.double.faults.arm(chance.choice(faults))
        queue.settle(chance.randrange(1, 4))
    shop.double.faults.clear()
    queue.settle()
    shop.check()
    booked = {booking.payment_reference: booking for booking in shop.double.bookings()}
    settled = [sale for sale, items in queue.waiting.items() if not items]
    assert len(settled) > 4  # the others wait for a look-up: a saved 500 that booked nothing
    for sale in settled:
        booking = booked[str(sale)]
        state = Event.GUARANTEED if last[sale] is Event.REFUNDED else last[sale]
        assert (booking.state.value, booking.refunded > 0) == (state.value, last[sale] is Event.REFUNDED)

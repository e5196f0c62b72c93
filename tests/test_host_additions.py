"""Refunds, advices, day's ends and reconciliation at the host, revocation, and books of an older version."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from host_rig import (
    Payload,
    Rig,
    Sender,
    assert_booked_exactly_once,
    deliver,
    flip,
    make_bureau,
    register,
    rig,
    take_in,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_host_server import Client, payload_of, schema

from hwsim.host import Booking, Host, Problem, Refused, State
from hwsim.host import host as host_module
from hwsim.host.messages import ENVELOPE_BYTES_MAX, RANGE_MAX
from hwsim.host.server import HostServer, main
from hwsim.host.store import SCHEMA_VERSION, StoreError


@pytest.fixture(scope="module")
def issuing() -> tuple[Any, Any]:
    return make_bureau()


@pytest.fixture
def place(tmp_path: Path, issuing: tuple[Any, Any]) -> Iterator[Rig]:
    with rig(tmp_path / "host", *issuing) as made:
        yield made


@pytest.fixture
def sender(place: Rig) -> Sender:
    return Sender(place.public, place.card)


@pytest.fixture
def host(place: Rig, sender: Sender) -> Iterator[Host]:
    with place.open() as opened:
        register(opened, sender, place.card)
        yield opened


def refusal(host: Host, sender: Sender, payload: Payload) -> Problem:
    """The problem that this envelope meets, having left no trace in the books."""
    before = host.bookings()
    with pytest.raises(Refused) as refused:
        take_in(host, payload, sender.sign(payload))
    assert host.bookings() == before
    return refused.value.problem


def sold(host: Host, sender: Sender, amount: int = 1250) -> Payload:
    sale = sender.sale(amount)
    assert deliver(host, sender, sale)["decision"] == "approved"
    return sale


def booking(host: Host, payload: Payload) -> Booking:
    (found,) = (each for each in host.bookings() if each.transaction == payload["transaction"])
    return found


# Refunds


def test_a_refund_is_booked_as_negative_to_the_card_of_the_sale(host: Host, sender: Sender) -> None:
    sale = sold(host, sender)
    refund = sender.refund(sale, 500)
    answer = deliver(host, sender, refund)
    assert (answer["decision"], answer["reason"], answer["issuer_data"]) == ("approved", None, None)
    assert len(answer["authorisation_code"]) == 6
    booked, of = booking(host, refund), booking(host, sale)
    assert (booked.amount, booked.kind, booked.of, booked.state) == (-500, "refund", of.transaction, State.BOOKED)
    assert (booked.card_ref, booked.last4) == (of.card_ref, of.last4)
    assert (of.amount, of.state) == (1250, State.BOOKED)


def test_never_more_is_paid_back_than_was_sold(host: Host, sender: Sender) -> None:
    sale = sold(host, sender)
    said = [deliver(host, sender, sender.refund(sale, amount)) for amount in (500, 751, 750, 1)]
    assert [(answer["decision"], answer["reason"]) for answer in said] == [
        ("approved", None),
        ("declined", "over_refunded"),
        ("approved", None),
        ("declined", "over_refunded"),
    ]
    assert sum(each.amount for each in host.bookings() if each.state is State.BOOKED) == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 900)), max_size=8))
def test_whatever_is_refunded_and_taken_back_the_merchant_never_pays(
    host: Host, sender: Sender, steps: list[tuple[bool, int]]
) -> None:
    sale = sold(host, sender)
    refunds: list[Payload] = []
    for take_back, amount in steps:
        if take_back and refunds:
            deliver(host, sender, sender.reversal(refunds.pop(), "void"))
        else:
            refunds.append(sender.refund(sale, amount))
            deliver(host, sender, refunds[-1])
        mine = [each for each in host.bookings() if sale["transaction"] in (each.transaction, each.of)]
        assert 0 <= sum(each.amount for each in mine if each.state is State.BOOKED) <= 1250


def test_a_refund_that_overtakes_its_sale_waits_for_it(host: Host, sender: Sender) -> None:
    sale = sender.sale()
    refund = sender.refund(sale)
    assert refusal(host, sender, refund) is Problem.SALE_NOT_RECEIVED
    assert Problem.SALE_NOT_RECEIVED.status == 425
    deliver(host, sender, sale)
    assert deliver(host, sender, refund)["decision"] == "approved"


def test_what_was_not_sold_is_not_paid_back(host: Host, sender: Sender, place: Rig) -> None:
    declined, reversed_, elsewhere = sender.sale(1251), sold(host, sender), sold(host, sender)
    deliver(host, sender, declined)
    deliver(host, sender, sender.reversal(reversed_))
    refund = sender.refund(elsewhere, 100)
    deliver(host, sender, refund)
    other = Sender(place.public, place.card, terminal="T-0002", merchant="M-0002", atc=100)
    host.register("T-0002", "M-0002", other.public_pem)
    for asks, payload, reason in (
        (sender, sender.refund(declined), "not_sold"),
        (sender, sender.refund(reversed_), "not_sold"),
        (sender, sender.refund(refund, 50), "unknown_sale"),
        (sender, sender.refund(elsewhere, currency="USD"), "currency_mismatch"),
        (other, other.refund(elsewhere), "unknown_sale"),
    ):
        answer = deliver(host, asks, payload)
        assert (answer["decision"], answer["reason"], answer["card_ref"]) == ("declined", reason, None)
        assert booking(host, payload).state is State.DECLINED


def test_another_till_of_the_same_merchant_may_pay_back(host: Host, sender: Sender, place: Rig) -> None:
    till = Sender(place.public, place.card, terminal="T-0002", atc=100)
    host.register("T-0002", "M-0001", till.public_pem)
    assert deliver(host, till, till.refund(sold(host, sender)))["decision"] == "approved"


def test_a_refund_is_booked_once(host: Host, sender: Sender) -> None:
    refund = sender.refund(sold(host, sender))
    envelope = sender.sign(refund)
    first = host.receive(refund["transaction"], "refund", envelope)
    again = host.receive(refund["transaction"], "refund", envelope)
    assert (first.answer, again.repeated) == (again.answer, True)
    assert booking(host, refund).received == 2
    dearer = refund | {"amount": 501}
    assert refusal(host, sender, dearer) is Problem.CONFLICT


def test_a_reversed_refund_is_not_paid_and_may_be_paid_anew(host: Host, sender: Sender) -> None:
    sale = sold(host, sender)
    refund = sender.refund(sale, 1250)
    deliver(host, sender, refund)
    assert deliver(host, sender, sender.reversal(refund, "void"))["decision"] == "reversed"
    assert booking(host, refund).state is State.REVERSED
    assert deliver(host, sender, sender.refund(sale, 1250))["decision"] == "approved"


def test_a_reversal_that_overtakes_its_refund_leaves_a_tombstone(host: Host, sender: Sender) -> None:
    refund = sender.refund(sold(host, sender))
    deliver(host, sender, sender.reversal(refund))
    assert (booking(host, refund).state, booking(host, refund).amount) == (State.TOMBSTONE, -500)
    answer = deliver(host, sender, refund)
    assert (answer["decision"], answer["reason"]) == ("declined", "reversed")
    met = booking(host, refund)
    assert (met.state, met.number, met.of) == (State.TOMBSTONE, refund["number"], refund["of"])


def test_a_sale_of_which_something_is_paid_back_is_not_reversed_as_well(host: Host, sender: Sender) -> None:
    sale = sold(host, sender)
    refund = sender.refund(sale)
    deliver(host, sender, refund)
    undo = sender.reversal(sale, "void")
    assert refusal(host, sender, undo) is Problem.SALE_REFUNDED
    deliver(host, sender, sender.reversal(refund, "void"))
    assert deliver(host, sender, undo)["decision"] == "reversed"


def test_one_uuid_is_either_a_sale_or_a_refund(host: Host, sender: Sender) -> None:
    sale = sold(host, sender)
    refund = sender.refund(sale)
    deliver(host, sender, refund)
    for payload in (
        sender.sale(500, transaction=refund["transaction"]),
        sender.reversal(refund) | {"kind": "sale"},
        sender.reversal(refund) | {"amount": 499},
        sender.refund(sale, 1250, transaction=sale["transaction"]),
        sender.advice(sender.sale(500, transaction=refund["transaction"])),
    ):
        assert refusal(host, sender, payload) is Problem.SALE_MISMATCH


# Advices


@pytest.mark.parametrize("outcome", ["completed", "refused"])
def test_an_advice_is_noted_and_books_nothing(host: Host, sender: Sender, outcome: str) -> None:
    sale = sender.sale()
    advice = sender.advice(sale, outcome)
    assert refusal(host, sender, advice) is Problem.SALE_NOT_RECEIVED
    deliver(host, sender, sale)
    answer = deliver(host, sender, advice)
    assert (answer["decision"], answer["reason"], answer["authorisation_code"]) == ("noted", None, None)
    noted = booking(host, sale)
    assert (noted.advice, noted.state) == (outcome, State.BOOKED)
    assert_booked_exactly_once(host.bookings(), {sale["transaction"]: 1250})


def test_an_advice_must_open_and_be_about_its_sale(host: Host, sender: Sender) -> None:
    sale = sold(host, sender)
    assert refusal(host, sender, flip(sender.advice(sale), "sealed")) is Problem.CANNOT_UNSEAL
    assert refusal(host, sender, sender.advice(sale, host_key="00" * 8)) is Problem.CANNOT_UNSEAL
    assert refusal(host, sender, sender.advice(sale | {"amount": 1}, amount=1)) is Problem.SALE_MISMATCH
    assert refusal(host, sender, sender.advice(sale, outcome="perhaps")) is Problem.MALFORMED
    assert booking(host, sale).advice is None


# Comparing books


def a_day(host: Host, sender: Sender) -> list[Payload]:
    """Sequences 1 to 6: two sold, one declined, one paid back in part, one reversed, one in dollars."""
    first, second, declined = sender.sale(1000), sender.sale(2000), sender.sale(1251)
    refund, reversed_ = sender.refund(first, 300), sender.sale(4000)
    dollars = sender.sale(500, record=sender.record(500, currency="0840"), currency="USD")
    day = [first, second, declined, refund, reversed_, dollars]
    for payload in day:
        deliver(host, sender, payload)
    deliver(host, sender, sender.reversal(reversed_))
    assert [payload["sequence"] for payload in day] == [1, 2, 3, 4, 5, 6]
    return day


def test_a_reconciliation_shows_what_is_held(host: Host, sender: Sender) -> None:
    day = a_day(host, sender)
    said = deliver(host, sender, sender.reconciliation(1, 8))
    schema("ReconciliationAnswer").validate(said)
    states = ["booked", "booked", "declined", "booked", "reversed", "booked"]
    amounts, currencies = [1000, 2000, 1251, -300, 4000, 500], ["EUR"] * 5 + ["USD"]
    expected = [
        [number, payload["transaction"], state, amount, currency]
        for number, (payload, state, amount, currency) in enumerate(
            zip(day, states, amounts, currencies, strict=True), 1
        )
    ]
    assert said["entries"] == expected
    lines = "".join(
        f"{number} {id_} {state} {amount} {currency}\n" for number, id_, state, amount, currency in expected
    )
    assert said["digest"] == hashlib.sha256(lines.encode()).hexdigest()
    assert said["totals"] == [{"currency": "EUR", "count": 3, "sum": 2700}, {"currency": "USD", "count": 1, "sum": 500}]
    assert (said["decision"], said["received"]) == ("compared", 6)
    assert (said["missing"], said["missing_more"]) == ([[7, 8]], False)


def test_a_reconciliation_changes_nothing_and_tells_how_things_are_now(host: Host, sender: Sender) -> None:
    question = sender.reconciliation(1, 5)
    sale = sender.sale()
    before = deliver(host, sender, question)
    deliver(host, sender, sale)
    after = deliver(host, sender, question)
    assert (before["received"], after["received"], before["missing"], after["missing"]) == (0, 1, [[1, 5]], [[2, 5]])
    assert host.gaps(sender.terminal, sender.epoch) == []


def test_each_terminal_and_epoch_is_reconciled_by_itself(host: Host, sender: Sender, place: Rig) -> None:
    deliver(host, sender, sender.sale())
    other = Sender(place.public, place.card, terminal="T-0002", atc=100)
    host.register("T-0002", "M-0001", other.public_pem)
    assert deliver(host, other, other.reconciliation(1, 5))["received"] == 0
    assert deliver(host, sender, sender.reconciliation(1, 5, epoch=4))["received"] == 0


def test_what_only_a_reversal_has_told_of_is_received(host: Host, sender: Sender) -> None:
    sale = sender.sale()
    deliver(host, sender, sender.reversal(sale))
    said = deliver(host, sender, sender.reconciliation(1, 1))
    assert said["entries"] == [[1, sale["transaction"], "tombstone", 1250, "EUR"]]
    assert (said["totals"], said["missing"]) == ([], [])


def test_many_entries_and_many_gaps_stay_within_an_answer(host: Host, sender: Sender) -> None:
    for index in range(66):
        deliver(host, sender, sender.reversal(sender.sale(999_999_999_999, sequence=2**53 - 1000 + 2 * index)))
    first = 2**53 - 1000
    for last, entries, missing, more in (
        (first + 131, None, 64, True),
        (first + 127, 64, 64, False),
        (first, 1, 0, False),
    ):
        payload = sender.reconciliation(first, last)
        envelope = sender.sign(payload)
        answer = take_in(host, payload, envelope)
        assert len(answer) <= ENVELOPE_BYTES_MAX
        said = sender.read(answer, envelope)
        assert (said["entries"] and len(said["entries"])) == entries
        assert (len(said["missing"]), said["missing_more"]) == (missing, more)


def test_an_answer_that_would_be_too_long_says_less(
    host: Host, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_day(host, sender)
    monkeypatch.setattr(host_module, "ENVELOPE_BYTES_MAX", 900)
    said = deliver(host, sender, sender.reconciliation(1, 6))
    assert (said["entries"], said["received"]) == (None, 6)


BALANCED = [("EUR", 3, 2700), ("USD", 1, 500)]


@pytest.mark.parametrize(
    ("totals", "decision"),
    [
        (BALANCED, "balanced"),
        ([*BALANCED[::-1], ("JPY", 0, 0)], "balanced"),
        ([("EUR", 3, 2701), BALANCED[1]], "differs"),
        ([("EUR", 2, 2700), BALANCED[1]], "differs"),
        (BALANCED[:1], "differs"),
        ([*BALANCED, ("JPY", 1, 100)], "differs"),
        ([], "differs"),
    ],
)
def test_a_days_end_balances_or_differs(
    host: Host, sender: Sender, totals: list[tuple[str, int, int]], decision: str
) -> None:
    a_day(host, sender)
    batch = sender.batch(1, 7, *totals)
    said = deliver(host, sender, batch)
    schema("BatchAnswer").validate(said)
    assert (said["decision"], said["missing"]) == (decision, [[7, 7]])
    assert [tuple(each.values()) for each in said["totals"]] == BALANCED
    deliver(host, sender, sender.sale(700))
    assert deliver(host, sender, batch) == said  # final, as any answer


def test_batches_count_with_the_sales(host: Host, sender: Sender) -> None:
    batch = sender.batch(1, 1)
    deliver(host, sender, sender.sale())
    assert host.gaps(sender.terminal, sender.epoch) == [(1, 1)]
    assert [(gap.first, gap.last) for gap in host.all_gaps()] == [(1, 1)]
    deliver(host, sender, batch)
    assert host.all_gaps() == []
    assert refusal(host, sender, sender.batch(1, 1, number=1)) is Problem.NUMBER_REUSED
    assert refusal(host, sender, sender.batch(1, 1, batch=batch["batch"])) is Problem.CONFLICT


@pytest.mark.parametrize(
    "changes",
    [
        {"first": 0},
        {"first": 3},
        {"last": RANGE_MAX + 1},
        {"number": 5},
        {"tip": 1},
        {"asked_at": None},
        {"last": None},
    ],
)
def test_a_question_is_read_strictly(host: Host, sender: Sender, changes: dict[str, Any]) -> None:
    assert refusal(host, sender, sender.reconciliation(1, 2, **changes)) is Problem.MALFORMED
    assert deliver(host, sender, sender.reconciliation(1, RANGE_MAX))["received"] == 0


def test_each_envelope_has_its_own_place(host: Host, sender: Sender) -> None:
    sale = sold(host, sender)
    sent = (sale, sender.refund(sale), sender.advice(sale), sender.reversal(sale), sender.checkpoint(5))
    sent += (sender.batch(1, 2), sender.reconciliation(1, 2), sender.certificate_request("csr"))
    assert {payload["event"] for payload in sent} == {
        "authorisation", "refund", "advice", "reversal", "checkpoint", "batch", "reconciliation", "certificate"
    }  # fmt: skip
    for payload in sent:
        envelope = sender.sign(payload)
        for other in sent:
            if other["event"] != payload["event"]:
                id_ = other.get("transaction") or other[other["event"]]
                elsewhere = other | {"transaction": id_} if "transaction" in other else other
                with pytest.raises(Refused) as refused:
                    take_in(host, elsewhere, envelope)
                assert refused.value.problem is Problem.PATH_MISMATCH


# Revocation and configuration


def test_from_a_revoked_terminal_only_what_settles_the_past_is_taken(host: Host, sender: Sender) -> None:
    sale, open_ = sold(host, sender), sender.sale()
    host.revoke(sender.terminal)
    for payload in (
        open_,
        sale,
        sender.refund(sale),
        sender.advice(sale),
        sender.batch(1, 2),
        sender.reconciliation(1, 2),
        sender.certificate_request("csr"),
    ):
        assert refusal(host, sender, payload) is Problem.TERMINAL_REVOKED
    assert deliver(host, sender, sender.reversal(sale))["decision"] == "reversed"
    assert deliver(host, sender, sender.checkpoint(5))["decision"] == "countersigned"
    host.readmit(sender.terminal)
    assert deliver(host, sender, open_)["decision"] == "approved"


def test_revocation_is_for_terminals_that_there_are(host: Host, place: Rig, sender: Sender) -> None:
    other = Sender(place.public, place.card, terminal="T-0002", atc=100)
    host.register("T-0002", "M-0001", other.public_pem)
    with pytest.raises(StoreError, match="T-9999"):
        host.revoke("T-9999")
    host.revoke("T-0002")
    assert deliver(host, sender, sender.sale())["decision"] == "approved"
    assert refusal(host, other, other.sale()) is Problem.TERMINAL_REVOKED


def test_a_terminals_status_is_signed(host: Host, place: Rig, sender: Sender) -> None:
    with HostServer(host) as server, contextlib.closing(Client(server.port, place.public / "ca.pem")) as client:
        assert client.ask("GET", "/v1/terminals/T-9999").problem() == "terminal-not-found"
        said = []
        for change in (lambda: None, lambda: host.set_configuration("2024-06-13.2"), lambda: host.revoke("T-0001")):
            change()
            response = client.ask("GET", "/v1/terminals/T-0001")
            assert (response.status, response.media_type) == (200, "application/jose")
            sender.answer_key.verify(*_signature(response.body))
            said.append(payload_of(response.body))
            schema("TerminalStatus").validate(said[-1])
    assert [(each["configuration"], each["revoked"]) for each in said] == [
        (None, False),
        ("2024-06-13.2", False),
        ("2024-06-13.2", True),
    ]
    assert said[0]["time"] < said[1]["time"] < said[2]["time"]


def _signature(jws: bytes) -> tuple[bytes, bytes]:
    from jwt.utils import base64url_decode

    signed, _, signature = jws.rpartition(b".")
    return base64url_decode(signature), signed


def test_the_operator_sees_terminals_and_gaps(host: Host, place: Rig, sender: Sender) -> None:
    sender.number = 4
    deliver(host, sender, sender.sale())
    host.revoke(sender.terminal)
    with HostServer(host) as server, contextlib.closing(Client(server.port, place.public / "ca.pem")) as client:
        assert client.ask("GET", "/v1/terminals").problem() == "operator-only"
        shown = client.ask("GET", "/v1/terminals", Authorization=f"Bearer {host.keys.operator_token}")
    document = json.loads(shown.body)
    schema("Terminals").validate(document)
    (terminal,) = document["terminals"]
    assert (terminal["terminal"], terminal["epoch"], terminal["number"]) == ("T-0001", 3, 5)
    assert terminal["revoked_ms"] is not None
    assert document["gaps"] == [{"terminal": "T-0001", "epoch": 3, "first": 1, "last": 4}]


def test_the_commands(place: Rig, sender: Sender, capsys: pytest.CaptureFixture[str]) -> None:
    place.bureau.save(place.directory / "bureau.json")
    with place.open() as host:
        register(host, sender, place.card)
        sale = sold(host, sender)
        deliver(host, sender, sender.refund(sale))
        sender.number = 9
        deliver(host, sender, sender.checkpoint(5))
    directory = str(place.directory)

    def told(*arguments: str) -> str:
        assert main([directory, *arguments]) == 0
        return capsys.readouterr().out

    assert "3/3 to 3/9" in told("--gaps")
    assert "revoked T-0001" in told("--revoke", "T-0001")
    assert "readmitted T-0001" in told("--readmit", "T-0001")
    assert "2024-06-13.2" in told("--configuration", "2024-06-13.2")
    assert "refund" in told("--bookings")
    printed = json.loads(told("--bookings", "--json"))
    for each in printed:
        schema("Booking").validate(each)
    assert [(each["sequence"], each["kind"], each["of"]) for each in printed] == [
        (1, "sale", None),
        (2, "refund", sale["transaction"]),
    ]
    for wrong in (("--revoke", "T-9999"), ("--configuration", "x" * 65)):
        assert main([directory, *wrong]) == 1
        assert "nothing was changed" in capsys.readouterr().err


# Books of version 2


VERSION_2 = """
ALTER TABLE booking DROP COLUMN kind; DROP INDEX booking_of; ALTER TABLE booking DROP COLUMN of_transaction;
ALTER TABLE booking DROP COLUMN advice; DROP INDEX booking_place; ALTER TABLE booking DROP COLUMN sequence;
ALTER TABLE booking DROP COLUMN epoch; ALTER TABLE booking DROP COLUMN number; DROP INDEX booking_time;
ALTER TABLE booking DROP COLUMN first_received_ms; DROP TABLE certificate; DROP TABLE revocation; DROP TABLE setting;
PRAGMA user_version = 2;
"""


def aged(place: Rig, sender: Sender, lines: Callable[[Host], Any]) -> Path:
    """Books as version 2 left them."""
    with place.open() as host:
        register(host, sender, place.card)
        lines(host)
    path = place.directory / "host.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(VERSION_2)
    return path


def test_books_of_version_2_are_brought_up_to_date_and_kept(place: Rig, sender: Sender) -> None:
    sales = [sender.sale(1000), sender.sale(1251), sender.sale(2000), sender.sale(3000)]

    def business(host: Host) -> None:
        deliver(host, sender, sales[0])
        deliver(host, sender, sales[1])
        for payload in (sender.reversal(sales[2]), sales[2], sender.reversal(sales[3])):
            deliver(host, sender, payload)
        business.before = host.bookings()  # type: ignore[attr-defined]

    path = aged(place, sender, business)
    old = path.read_bytes()
    with place.open() as host:
        for was, now in zip(business.before, host.bookings(), strict=True):  # type: ignore[attr-defined]
            assert now.sequence is None
            known = {name: getattr(now, name) for name in ("transaction", "amount", "state", "epoch", "number", "rrn")}
            assert known == {name: getattr(was, name) for name in known}
            assert was.received == now.received
            assert now.first_received_ms > 0
        envelope = sender.sign(sales[0])
        assert host.receive(sales[0]["transaction"], "authorisation", envelope).repeated
        assert deliver(host, sender, sender.refund(sales[0]))["decision"] == "approved"
    assert (place.directory / f"host.db.before-{SCHEMA_VERSION}").read_bytes() == old
    with place.open() as host:
        assert len(host.bookings()) == 5


def test_a_step_that_fails_leaves_the_books_as_they_were(place: Rig, sender: Sender) -> None:
    path = aged(place, sender, lambda host: sold(host, sender))
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE setting (in_the_way TEXT)")
    with pytest.raises(sqlite3.OperationalError, match="setting"):
        place.open()
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (2,)
        assert "kind" not in {row[1] for row in database.execute("PRAGMA table_info(booking)")}
        database.execute("DROP TABLE setting")
    with place.open() as host:
        assert len(host.bookings()) == 1


@pytest.mark.parametrize("version", [1, SCHEMA_VERSION + 1])
def test_books_of_other_versions_are_left_alone(place: Rig, version: int) -> None:
    place.open().close()
    path = place.directory / "host.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {version}")
    before = path.read_bytes()
    with pytest.raises(StoreError, match=f"version {version}"):
        place.open()
    assert path.read_bytes() == before


# Over the wire


def test_the_additions_are_as_described(host: Host, sender: Sender, place: Rig) -> None:
    sale = sender.sale()
    refund = sender.refund(sale)
    with HostServer(host) as server, contextlib.closing(Client(server.port, place.public / "ca.pem")) as client:
        early = client.put(refund, sender.sign(refund))
        assert (early.status, early.problem(), early.headers["Retry-After"]) == (425, "sale-not-received", None)
        for payload in (sale, refund, sender.advice(sale), sender.reversal(refund), sender.batch(1, 3)):
            schema("Envelope").validate(payload)
            envelope = sender.sign(payload)
            first, again = client.put(payload, envelope), client.put(payload, envelope)
            assert (first.status, first.media_type, first.body) == (200, "application/jose", again.body)
            assert again.headers["Idempotent-Replayed"] == "true"
            said = sender.read(first.body, envelope)
            schema("BatchAnswer" if payload["event"] == "batch" else "Answer").validate(said)
        question = sender.reconciliation(1, 3)
        schema("Envelope").validate(question)
        asked = client.put(question, envelope := sender.sign(question))
        schema("ReconciliationAnswer").validate(sender.read(asked.body, envelope))
        document = json.loads(client.ask("GET", f"/v1/transactions/{refund['transaction']}").body)
        schema("Transaction").validate(document)
        assert (document["state"], sorted(document["events"])) == ("reversed", ["refund", "reversal"])


PATHS = ("batches", "reconciliations", "certificates", "transactions")


_values = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.sampled_from(["sale", "refund", "void", "completed", "EUR", "batch"])
    | st.text("aF0-_=", max_size=70)
    | st.lists(st.integers(), max_size=3)
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_host_and_description_read_alike(host: Host, sender: Sender, data: st.DataObject) -> None:
    """Whatever a registered terminal signs: the host takes in what the schema allows, and calls all else malformed."""
    sale = sold(host, sender)
    made = [sender.sale(), sender.refund(sale), sender.advice(sale), sender.reversal(sale), sender.checkpoint(5)]
    made += [sender.batch(1, 9), sender.reconciliation(1, 9), sender.certificate_request("csr")]
    payload = data.draw(st.sampled_from(made), label="payload")
    for member in data.draw(st.lists(st.sampled_from([*sorted(payload), "tip"]), max_size=2), label="members"):
        if member not in ("event", "transaction", payload["event"]):
            payload |= {member: data.draw(_values, label=member)}
    envelope = sender.sign(payload)
    problem, said = None, None
    try:
        said = payload_of(take_in(host, payload, envelope))
    except Refused as refused:
        problem = refused.problem
    allowed = schema("Envelope").is_valid(payload)
    if allowed and payload["event"] in ("batch", "reconciliation"):  # the one rule that a schema cannot state
        allowed = payload["first"] <= payload["last"] < payload["first"] + RANGE_MAX
    assert allowed == (problem is not Problem.MALFORMED)
    if said is not None:
        schema(ANSWERS.get(payload["event"], "Answer")).validate(said)


ANSWERS = {
    "checkpoint": "Countersignature",
    "batch": "BatchAnswer",
    "reconciliation": "ReconciliationAnswer",
    "certificate": "CertificateAnswer",
}


def test_deep_and_large_bodies_are_refused(host: Host, sender: Sender, place: Rig) -> None:
    deep = sender.reconciliation(1, 2) | {"first": json.loads("[" * 900 + "]" * 900)}
    with HostServer(host) as server, contextlib.closing(Client(server.port, place.public / "ca.pem")) as client:
        assert client.put(deep, sender.sign(deep)).problem() == "malformed"
        for plural in PATHS[:3]:
            path = f"/v1/{plural}/{sender.transaction()}"
            put = {"Content_Type": "application/jose", "Idempotency_Key": "k"}
            assert client.ask("PUT", path, b"a" * (ENVELOPE_BYTES_MAX + 1), **put).problem() == "too-large"
            assert client.ask("PUT", path, b"..", **put).problem() == "malformed"
            assert client.ask("PUT", path, b"\xff" * 100, **put).problem() == "malformed"
        assert client.ask("POST", "/merchant/login", b"a" * (ENVELOPE_BYTES_MAX + 1)).problem() == "too-large"

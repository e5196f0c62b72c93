"""The double against what Stripe documents: keys, results, states, lists. Asked directly, and by the official library.

A double that forgives what Stripe does not would let every test above it pass.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import requests
import stripe
from stripe_rig import HOUR_MS, Shop, stripe_shop
from sync_rig import seeded

from hwsim.host.controls import OrderRefused
from hwsim.stripe_double import Delay, DropAnswer, Fail, Request, Response, State, StripeDouble, When
from hwsim.stripe_double import server as server_module
from hwsim.stripe_double.books import KEYS_LIVE_MS
from hwsim.stripe_double.checks import InvalidParam, parse_form
from hwsim.stripe_double.server import Advance, Behave, Bookings, Misbehave, Requests, main, order, serve, twice

WRITER, READER, LIVE = "rk_test_writer0000000", "rk_test_reader0000000", "rk_live_writer0000000"
RECORDS = "/v1/payment_records"
REPORT = f"{RECORDS}/report_payment"
PAYMENT = {
    "amount_requested[currency]": "eur",
    "amount_requested[value]": "1250",
    "initiated_at": "1799999990",
    "payment_method_details[type]": "custom",
    "payment_method_details[custom][display_name]": "Payment terminal",
    "processor_details[type]": "custom",
    "processor_details[custom][payment_reference]": "sale-1",
}


class Clock:
    now_ms = 1_800_000_000_000

    def __call__(self) -> int:
        return self.now_ms


class Client:
    """Asks the double without HTTP."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = Clock()
        self.double = self._open()

    def _open(self) -> StripeDouble:
        keys = {WRITER: frozenset({"read", "write"}), READER: frozenset({"read"}), LIVE: frozenset({"read", "write"})}
        return StripeDouble(self.directory, keys=keys, now_ms=self.clock, entropy=seeded(5 + self.clock.now_ms))

    def restart(self) -> None:
        self.double.close()
        self.double = self._open()

    def ask(
        self, method: str, target: str, params: dict[str, str] | None = None, *, key: str | None = None, **headers: str
    ) -> Response | None:
        sent = {"authorization": f"Bearer {WRITER}", "stripe-version": "2026-10-28.endive"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            sent["idempotency-key"] = key
        form = urlencode(params or {})
        if method == "GET":
            return self.double.answer(Request(method, f"{target}?{form}" if form else target, sent, ""))
        return self.double.answer(Request(method, target, sent, form))

    def post(self, target: str, params: dict[str, str], *, key: str | None = None, **headers: str) -> Response:
        response = self.ask("POST", target, params, key=key, **headers)
        assert response is not None
        return response

    def get(self, target: str, params: dict[str, str] | None = None, **headers: str) -> Response:
        response = self.ask("GET", target, params, **headers)
        assert response is not None
        return response

    def report(self, reference: str = "sale-1", *, key: str | None = None, **changed: str) -> str:
        """A payment record; its id."""
        params = PAYMENT | {"processor_details[custom][payment_reference]": reference} | changed
        response = self.post(REPORT, params, key=key)
        assert response.status == 200, response.body
        return str(json.loads(response.body)["id"])


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    client = Client(tmp_path)
    yield client
    client.double.close()


def error(response: Response) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(response.body)["error"]
    return found


# ---- idempotency keys


def test_the_same_request_again_gets_the_same_answer(client: Client) -> None:
    first, again = (client.post(REPORT, PAYMENT, key="k") for _ in range(2))
    assert (first.status, first.body) == (again.status, again.body)
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert first.headers["Request-Id"] != again.headers["Request-Id"]
    assert len(client.double.bookings()) == 1


def test_control_without_a_key_or_with_a_fresh_one_it_books_twice(client: Client) -> None:
    for key in (None, None, "a", "b"):
        client.post(REPORT, PAYMENT, key=key)
    assert len(client.double.bookings()) == 4
    assert twice(client.double.bookings()) == ["sale-1"]


@pytest.mark.parametrize("changed", [{"amount_requested[value]": "1251"}, {"metadata[a]": "b"}])
def test_other_parameters_under_the_same_key(client: Client, changed: dict[str, str]) -> None:
    client.post(REPORT, PAYMENT, key="k")
    response = client.post(REPORT, PAYMENT | changed, key="k")
    assert (response.status, error(response)["type"]) == (400, "idempotency_error")
    assert client.post(REPORT, PAYMENT, key="k").status == 200
    assert len(client.double.bookings()) == 1


def test_another_call_under_the_same_key(client: Client) -> None:
    record = client.report(key="k")
    response = client.post(f"{RECORDS}/{record}/report_payment_attempt_guaranteed", {"guaranteed_at": "1"}, key="k")
    assert error(response)["type"] == "idempotency_error"


def test_keys_are_forgotten_after_24_hours_from_their_first_use(client: Client) -> None:
    client.post(REPORT, PAYMENT, key="k")
    client.clock.now_ms += KEYS_LIVE_MS - 1
    assert client.post(REPORT, PAYMENT, key="k").headers["Idempotent-Replayed"] == "true"
    client.clock.now_ms += 1
    assert "Idempotent-Replayed" not in client.post(REPORT, PAYMENT, key="k").headers
    assert twice(client.double.bookings()) == ["sale-1"]


def test_a_restart_forgets_nothing(client: Client) -> None:
    first = client.post(REPORT, PAYMENT, key="k")
    client.clock.now_ms += HOUR_MS
    client.restart()
    assert client.post(REPORT, PAYMENT, key="k").body == first.body
    assert len(client.double.bookings()) == 1
    assert len(client.double.requests()) == 2


def test_test_and_live_are_apart(client: Client) -> None:
    client.post(REPORT, PAYMENT, key="k")
    live = client.post(REPORT, PAYMENT, key="k", authorization=f"Bearer {LIVE}")
    assert json.loads(live.body)["livemode"] is True
    assert json.loads(client.get(RECORDS).body)["data"][0]["livemode"] is False
    assert len(json.loads(client.get(RECORDS).body)["data"]) == 1


def test_a_key_in_use_is_a_conflict_that_is_not_saved(client: Client) -> None:
    client.double.faults.arm(Delay(30_000, working=True), times=2)
    answers: queue.Queue[Response] = queue.Queue()
    threads = [threading.Thread(target=lambda: answers.put(client.post(REPORT, PAYMENT, key="k"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        response = answers.get(timeout=10)  # of whoever came second: the first still works
        assert (response.status, error(response)["code"]) == (409, "idempotency_key_in_use")
        assert client.double.bookings() == []
    finally:
        client.double.stopping.set()
        for thread in threads:
            thread.join(10)
    assert answers.get(timeout=10).status == 200
    assert client.post(REPORT, PAYMENT, key="k").headers["Idempotent-Replayed"] == "true"
    assert len(client.double.bookings()) == 1


@pytest.mark.parametrize(("when", "booked"), [(When.BEFORE, 0), (When.AFTER, 1)])
def test_a_500_is_saved_once_work_has_begun(client: Client, when: When, booked: int) -> None:
    client.double.faults.arm(Fail(status=500, when=when, should_retry=False))
    first, again = (client.post(REPORT, PAYMENT, key="k") for _ in range(2))
    assert first.status == again.status == 500
    assert again.headers["Idempotent-Replayed"] == "true"
    assert first.headers["Stripe-Should-Retry"] == again.headers["Stripe-Should-Retry"] == "false"
    assert len(client.double.bookings()) == booked


@pytest.mark.parametrize("status", [409, 429, 500, 503])
def test_what_was_not_noticed_is_not_saved(client: Client, status: int) -> None:
    client.double.faults.arm(Fail(status=status, retry_after_s=3), times=2)
    for _ in range(2):
        response = client.post(REPORT, PAYMENT, key="k")
        assert (response.status, response.headers["Retry-After"]) == (status, "3")
    assert client.post(REPORT, PAYMENT, key="k").status == 200
    assert len(client.double.bookings()) == 1


@pytest.mark.parametrize("status", [409, 429])
def test_a_conflict_or_limit_is_never_saved(client: Client, status: int) -> None:
    client.double.faults.arm(Fail(status=status, when=When.AFTER))
    assert client.post(REPORT, PAYMENT, key="k").status == status
    assert client.double.bookings() == []


def test_parameters_that_are_refused_leave_the_key_free(client: Client) -> None:
    assert client.post(REPORT, PAYMENT | {"initiated_at": "never"}, key="k").status == 400
    assert client.post(REPORT, PAYMENT, key="k").status == 200


def test_work_that_is_refused_is_saved(client: Client) -> None:
    record = client.report()
    refund = {
        "outcome": "refunded",
        "processor_details[type]": "custom",
        "processor_details[custom][refund_reference]": "r1",
        "refunded[refunded_at]": "1",
    }
    assert client.post(f"{RECORDS}/{record}/report_refund", refund, key="k").status == 400
    client.post(f"{RECORDS}/{record}/report_payment_attempt_guaranteed", {"guaranteed_at": "1"})
    assert client.post(f"{RECORDS}/{record}/report_refund", refund, key="k").status == 400
    assert client.post(f"{RECORDS}/{record}/report_refund", refund, key="another").status == 200


@pytest.mark.parametrize("booked", [True, False])
def test_a_dropped_answer(client: Client, booked: bool) -> None:
    client.double.faults.arm(DropAnswer(booked=booked))
    assert client.ask("POST", REPORT, PAYMENT, key="k") is None
    assert len(client.double.bookings()) == booked
    assert client.double.requests()[0].status is None
    client.post(REPORT, PAYMENT, key="k")
    assert len(client.double.bookings()) == 1


# ---- parameters, keys, versions


@pytest.mark.parametrize(
    ("changed", "param", "code"),
    [
        ({"card": "x"}, "card", "parameter_unknown"),
        ({"api_key": "x"}, "api_key", "parameter_unknown"),
        (
            {"payment_method_details[custom][last4]": "7899"},
            "payment_method_details[custom][last4]",
            "parameter_unknown",
        ),
        ({"payment_method_details[type]": "card_present"}, "payment_method_details[type]", "parameter_invalid"),
        ({"amount_requested[currency]": "EUR"}, "amount_requested[currency]", "parameter_invalid"),
        ({"amount_requested[value]": "-1"}, "amount_requested[value]", "parameter_invalid"),
        ({"amount_requested[value]": "0"}, "amount_requested[value]", "parameter_invalid"),
        ({"amount_requested[value]": "12.50"}, "amount_requested[value]", "parameter_invalid"),
        ({"initiated_at": "1799999990000"}, "initiated_at", "parameter_invalid"),
        ({"customer_presence": "present"}, "customer_presence", "parameter_invalid"),
        ({"outcome": "refunded"}, "outcome", "parameter_invalid"),
        ({"outcome": "guaranteed"}, "guaranteed", "parameter_invalid"),
        ({"guaranteed[guaranteed_at]": "1799999990"}, "guaranteed", "parameter_invalid"),
        ({"metadata[k]": "v" * 501}, "metadata[k]", "parameter_invalid"),
        ({"metadata[a][b]": "c"}, "metadata", "parameter_invalid"),
        ({f"metadata[{number}x]": "v" for number in range(51)}, "metadata", "parameter_invalid"),
    ],
)
def test_parameters_that_stripe_would_not_take(client: Client, changed: dict[str, str], param: str, code: str) -> None:
    response = client.post(REPORT, PAYMENT | changed)
    assert response.status == 400, response.body
    assert (error(response)["param"], error(response)["code"]) == (param, code)
    assert client.double.bookings() == []


@pytest.mark.parametrize("missing", ["initiated_at", "amount_requested[currency]", "payment_method_details[type]"])
def test_parameters_that_are_missing(client: Client, missing: str) -> None:
    params = {name: value for name, value in PAYMENT.items() if name != missing}
    expected = 200 if missing == "payment_method_details[type]" else 400  # optional in the library's types
    assert client.post(REPORT, params).status == expected


@pytest.mark.parametrize("text", ["a=1&a=2", "a[b]=1&a=2", "a=1&a[b]=2", "[x]=1", "a[[b]=1", "noequals", "a[b=1"])
def test_forms_that_are_none(text: str) -> None:
    with pytest.raises(InvalidParam):
        parse_form(text)


def test_who_may_do_what(client: Client) -> None:
    assert client.post(REPORT, PAYMENT, authorization=f"Bearer {READER}").status == 403
    assert client.get(RECORDS, authorization=f"Bearer {READER}").status == 200
    refused = client.post(REPORT, PAYMENT, authorization="Bearer rk_test_nobody0000000")
    assert refused.status == 401
    assert client.double.bookings() == []
    assert not [each for each in client.double.requests() if "authorization" in each.headers], "no key is ever kept"


@pytest.mark.parametrize("version", ["2026-05-27.dahlia", "", "latest"])
def test_another_version_is_refused(client: Client, version: str) -> None:
    assert client.post(REPORT, PAYMENT, stripe_version=version).status == 400
    assert client.double.bookings() == []


def test_other_paths_are_unknown(client: Client) -> None:
    record = client.report()
    for path in ("/v1/charges", f"{RECORDS}/{record}/capture", f"{RECORDS}/{record}/report_payment", "/"):
        assert client.post(path, {}).status in {400, 404}, path
    assert client.post("/v1/payment_intents", {}).status == 404
    assert client.get(f"{RECORDS}/pr_none").status == 404


# ---- payment records

MOVES = {
    State.GUARANTEED: ("report_payment_attempt_guaranteed", {"guaranteed_at": "1"}),
    State.FAILED: ("report_payment_attempt_failed", {"failed_at": "1"}),
    State.CANCELED: ("report_payment_attempt_canceled", {"canceled_at": "1"}),
}


@pytest.mark.parametrize("second", MOVES)
@pytest.mark.parametrize("first", MOVES)
def test_the_first_outcome_is_the_last(client: Client, first: State, second: State) -> None:
    record = client.report()
    call, params = MOVES[first]
    document = json.loads(client.post(f"{RECORDS}/{record}/{call}", params).body)
    assert document[f"amount_{first.value}"] == {"currency": "eur", "value": 1250}
    call, params = MOVES[second]
    assert client.post(f"{RECORDS}/{record}/{call}", params).status == 400
    assert client.double.bookings()[0].state is first


def test_an_outcome_at_once(client: Client) -> None:
    client.report(**{"outcome": "guaranteed", "guaranteed[guaranteed_at]": "1799999990"})
    assert client.double.bookings()[0].state is State.GUARANTEED


def refund(client: Client, record: str, value: int | None, reference: str, currency: str = "eur") -> int:
    params = {
        "outcome": "refunded",
        "processor_details[type]": "custom",
        "processor_details[custom][refund_reference]": reference,
        "refunded[refunded_at]": "1799999999",
    }
    if value is not None:
        params |= {"amount[currency]": currency, "amount[value]": str(value)}
    return client.post(f"{RECORDS}/{record}/report_refund", params).status


def test_refunds(client: Client) -> None:
    record, other = client.report("sale-1"), client.report("sale-2")
    assert refund(client, record, 100, "r0") == 400, "not guaranteed"
    client.post(f"{RECORDS}/{record}/report_payment_attempt_guaranteed", {"guaranteed_at": "1"})
    client.post(f"{RECORDS}/{other}/report_payment_attempt_guaranteed", {"guaranteed_at": "1"})
    assert refund(client, record, 1_251, "r1") == 400, "more than was paid"
    assert refund(client, record, 1_000, "r1", "usd") == 400, "another currency"
    assert refund(client, record, 1_000, "r1") == 200
    assert refund(client, other, 1_000, "r1") == 400, "references are unique across all refunds"
    assert refund(client, record, 251, "r2") == 400, "more than is left"
    assert refund(client, record, None, "r2") == 200, "what is left"
    assert [booking.refunded for booking in client.double.bookings()] == [1_250, 0]


# ---- lists


def test_lists_come_newest_first_in_pages(client: Client) -> None:
    made = []
    for number in range(7):
        client.clock.now_ms += 1_000
        made.append(client.report(f"sale-{number}"))
    seen: list[str] = []
    params = {"limit": "3"}
    for more in (True, True, False):
        page = json.loads(client.get(RECORDS, params).body)
        assert page["has_more"] is more
        seen += [record["id"] for record in page["data"]]
        params["starting_after"] = seen[-1]
    assert seen == made[::-1]
    before = json.loads(client.get(RECORDS, {"limit": "2", "ending_before": made[0]}).body)
    assert [record["id"] for record in before["data"]] == [made[2], made[1]]
    start_s = 1_800_000_000
    window = {"created_after": str(start_s + 2), "created_before": str(start_s + 5)}
    within = json.loads(client.get(RECORDS, window).body)
    assert [record["id"] for record in within["data"]] == [made[3], made[2]]


@pytest.mark.parametrize(
    "params",
    [
        {"limit": "0"},
        {"limit": "101"},
        {"starting_after": "pr_none"},
        {"created": "1"},
        {"payment_reference": "sale-1"},  # no such search exists: a client has to page
    ],
)
def test_lists_that_are_refused(client: Client, params: dict[str, str]) -> None:
    assert client.get(RECORDS, params).status in {400, 404}


# ---- over HTTPS


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with stripe_shop(tmp_path / "stripe") as shop:
        yield shop


def library(shop: Shop) -> stripe.StripeClient:
    return stripe.StripeClient(
        shop.settings.key.text,
        base_addresses={"api": shop.server.url},
        http_client=stripe.RequestsClient(timeout=5, verify_ssl_certs=True),
        max_network_retries=0,
    )


def test_the_library_understands_it(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stripe, "ca_bundle_path", str(shop.server.ca_file))
    monkeypatch.setattr(stripe, "enable_telemetry", False)
    client = library(shop)
    params: Any = {
        "amount_requested": {"currency": "eur", "value": 1250},
        "initiated_at": 1_799_999_990,
        "payment_method_details": {"type": "custom", "custom": {"display_name": "x"}},
        "processor_details": {"type": "custom", "custom": {"payment_reference": "sale"}},
    }
    records = client.v1.payment_records
    made = [records.report_payment(params) for _ in range(12)]
    assert [record.id for record in records.list({"limit": 5}).auto_paging_iter()] == [
        record.id for record in reversed(made)
    ]
    guaranteed = records.report_payment_attempt_guaranteed(made[0].id, {"guaranteed_at": 1_799_999_991})
    assert guaranteed.amount_guaranteed.value == 1250
    with pytest.raises(stripe.InvalidRequestError) as refused:
        records.report_payment(params | {"card_number": "no"})
    assert refused.value.param == "card_number"
    assert str(refused.value.request_id).startswith("req_")
    client._requestor._get_http_client().close()


def test_it_stops_and_starts_on_the_same_port(shop: Shop) -> None:
    url = shop.server.url
    shop.server.stop()
    shop.server.start()
    assert shop.server.url == url


# ---- as a process


def test_orders_and_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, stop = tmp_path / "stripe", threading.Event()
    thread = threading.Thread(target=serve, args=(directory,), kwargs={"port": 0, "stop": stop})
    thread.start()
    try:
        for _ in range(2_000):
            with contextlib.suppress(OSError):
                assert order(directory, Bookings()) == []
                break
            stop.wait(0.005)
        assert order(directory, Misbehave(Fail(status=500, when=When.AFTER), times=3)) is None
        assert order(directory, Behave()) is None
        assert order(directory, Advance(24 * HOUR_MS)) is None
        assert order(directory, Requests()) == []
        assert main([str(directory), "--order", '{"do":"misbehave","fault":{"kind":"drop_answer"}}']) == 0
        with pytest.raises(OrderRefused):
            main([str(directory), "--order", '{"do":"explode"}'])
    finally:
        stop.set()
        thread.join(10)
    assert "stripe listening on port" in capsys.readouterr().out


def test_bookings_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "stripe"
    with contextlib.closing(server_module.open_double(directory)) as double:
        key = (directory / "public" / "stripe-key").read_text().strip()
        assert (directory / "public" / "stripe-key").stat().st_mode & 0o777 == 0o600
        headers = {"authorization": f"Bearer {key}", "stripe-version": "2026-10-28.endive"}
        double.answer(Request("POST", REPORT, headers, urlencode(PAYMENT)))
    assert main([str(directory), "--bookings", "--json"]) == 0
    [booking] = json.loads(capsys.readouterr().out)
    assert (booking["payment_reference"], booking["amount"], booking["state"]) == ("sale-1", 1250, "open")
    with contextlib.closing(server_module.open_double(directory)) as double:
        double.answer(Request("POST", REPORT, headers, urlencode(PAYMENT)))
    assert main([str(directory), "--bookings"]) == 1
    assert "sale-1 is booked more than once" in capsys.readouterr().out


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "payterm-sim stripe" in capsys.readouterr().out


def test_time_that_has_passed_stays_passed(client: Client) -> None:
    client.post(REPORT, PAYMENT, key="k")
    client.double.advance(KEYS_LIVE_MS)
    client.clock.now_ms += 1
    now_ms = client.double.now_ms()
    client.restart()
    assert client.double.now_ms() == now_ms
    client.post(REPORT, PAYMENT, key="k")
    assert twice(client.double.bookings()) == ["sale-1"], "a restart brought the key back"


def test_killed_it_loses_no_booking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it has answered is booked, though the process dies the moment the answer is out."""
    directory = tmp_path / "stripe"
    program = (
        "import sys; from hwsim.stripe_double.server import main; "
        f"sys.exit(main([{str(directory)!r}, '--port', '0', '--clock', '2027-01-15T08:00:00Z']))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().rpartition(" ")[2])
            key = (directory / "public" / "stripe-key").read_text(encoding="ascii").strip()
            headers = {"Authorization": f"Bearer {key}", "Stripe-Version": "2026-10-28.endive", "Idempotency-Key": "k"}
            answer = requests.post(
                f"https://localhost:{port}{REPORT}",
                data=PAYMENT, headers=headers, verify=str(directory / "public" / "ca.pem"), timeout=10,
            )  # fmt: skip
        finally:
            process.kill()
    assert answer.status_code == 200
    assert 1_800_000_000 <= answer.json()["created"] < 1_800_000_060
    assert main([str(directory), "--bookings", "--json"]) == 0
    [booking] = json.loads(capsys.readouterr().out)
    assert booking["id"] == answer.json()["id"]


@pytest.mark.parametrize("text", ["yesterday", "2026-11-24T08:00:00"])
def test_a_clock_needs_a_time(tmp_path: Path, text: str) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--clock", text])

"""Our requests against Stripe's published description of its interface.

What it asks of the five calls, of the list and of the single record is written down here without its prose, from
`latest/openapi.spec3.json` of github.com/stripe/openapi at commit 18fa2cc768024b47789dc6fa243acd48478acac2 (paths
`/v1/payment_records...`). Members of theirs that we never send are left out, which makes this stricter. No package
registry carries that file; where a copy is given (PAYTERM_STRIPE_SPEC), the whole of it is used as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import jsonschema
import pytest
from stripe_rig import LIFE, Queue, Shop, notice, parcel, refund, stripe_shop

from terminal.sync.destinations.stripe import Event

TEXT: Final[dict[str, Any]] = {"type": "string", "maxLength": 5000}
NUMBER: Final[dict[str, Any]] = {"type": "integer"}
METADATA: Final[dict[str, Any]] = {"type": "object", "additionalProperties": {"type": "string"}}


def _object(required: tuple[str, ...] = (), /, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "required": list(required), "properties": properties, "additionalProperties": False,
    }  # fmt: skip


def _custom(reference: str) -> dict[str, Any]:
    return _object(("type",), type={"enum": ["custom"]}, custom=_object((reference,), **{reference: TEXT}))


AMOUNT: Final = _object(("currency", "value"), currency={"type": "string"}, value=NUMBER)
PUBLISHED: Final[dict[tuple[str, str], dict[str, Any]]] = {
    ("POST", "/v1/payment_records/report_payment"): _object(
        ("amount_requested", "initiated_at", "payment_method_details"),
        amount_requested=AMOUNT,
        initiated_at=NUMBER,
        customer_presence={"enum": ["off_session", "on_session"]},
        payment_method_details=_object(type={"enum": ["custom"]}, custom=_object(display_name=TEXT)),
        processor_details=_custom("payment_reference"),
        metadata=METADATA,
    ),
    **{
        ("POST", f"/v1/payment_records/{{id}}/report_payment_attempt_{outcome}"): _object(
            (f"{outcome}_at",), **{f"{outcome}_at": NUMBER, "metadata": METADATA}
        )
        for outcome in ("guaranteed", "failed", "canceled")
    },
    ("POST", "/v1/payment_records/{id}/report_refund"): _object(
        ("outcome", "processor_details"),
        amount=AMOUNT,
        outcome={"enum": ["refunded"]},
        processor_details=_custom("refund_reference"),
        refunded=_object(("refunded_at",), refunded_at=NUMBER),
        metadata=METADATA,
    ),
    ("GET", "/v1/payment_records"): _object(
        created_after=NUMBER, created_before=NUMBER, starting_after=TEXT, ending_before=TEXT, limit=NUMBER
    ),
    ("GET", "/v1/payment_records/{id}"): _object(),
}


def _tree(form: str) -> dict[str, Any]:
    """deepObject style: `a[b]=1`. Digits are numbers, as a form has no types, but in metadata."""
    root: dict[str, Any] = {}
    for name, value in parse_qsl(form, keep_blank_values=True):
        first, *rest = name.replace("]", "").split("[")
        place, last = root, first
        for step in rest:
            place, last = place.setdefault(last, {}), step
        place[last] = int(value) if value.isdecimal() and first != "metadata" else value
    return root


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[str, str, dict[str, Any]]]]:
    """Every request of every kind, as it crossed the wire: method, path of the description, parameters."""
    with stripe_shop(tmp_path_factory.mktemp("stripe")) as shop, shop.destination() as destination:
        queue = Queue(shop.clock, destination)
        queue.tell(*(notice(1, event, synchronised=event is not Event.REFUNDED) for event in LIFE))
        queue.tell(notice(2, deferred=True, clock_synchronised=False), notice(2, Event.FAILED))
        queue.tell(notice(3), notice(3, Event.CANCELED))
        queue.tell(notice(4), notice(4, Event.GUARANTEED), refund(8, of=4, amount=5), refund(9, of=4, amount=6))
        queue.settle(4)
        assert queue.open == 0
        for number in range(10, 110):
            destination.send(parcel(notice(number)))
        destination.look_up(parcel(notice(999)), first_attempt_ms=shop.clock.wall_ms())
        destination.look_up(parcel(refund(9, of=4, amount=6), earlier=queue.receipts[notice(4).facts.sale]),
                            first_attempt_ms=None)  # fmt: skip
        yield _described(shop)


def _described(shop: Shop) -> list[tuple[str, str, dict[str, Any]]]:
    described = []
    for request in shop.double.requests():
        parts = urlsplit(request.path)
        path = "/".join("{id}" if part.startswith("pr_") else part for part in parts.path.split("/"))
        described.append((request.method, path, _tree(request.body or parts.query)))
    return described


def test_every_request_is_as_published(sent: list[tuple[str, str, dict[str, Any]]]) -> None:
    for method, path, params in sent:
        jsonschema.validate(params, PUBLISHED[method, path])
    assert {(method, path) for method, path, _ in sent} == set(PUBLISHED), "every kind was sent"


@pytest.mark.parametrize(
    "planted",
    [
        {"card": "no"},
        {"amount_requested": {"currency": "eur"}},
        {"customer_presence": "present"},
        {"processor_details": {"type": "custom", "custom": {"reference": "x"}}},
        {"payment_method_details": {"type": "card_present"}},
        {"initiated_at": "2026-11-24"},
    ],
)
def test_control_a_wrong_request_is_seen(sent: list[tuple[str, str, dict[str, Any]]], planted: dict[str, Any]) -> None:
    method, path, params = sent[0]
    assert path.endswith("report_payment")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(params | planted, PUBLISHED[method, path])


def test_every_request_fits_the_whole_description(sent: list[tuple[str, str, dict[str, Any]]]) -> None:
    copy = os.environ.get("PAYTERM_STRIPE_SPEC")
    if not copy:
        pytest.skip("no copy of github.com/stripe/openapi latest/openapi.spec3.json: name one in PAYTERM_STRIPE_SPEC")
    paths = json.loads(Path(copy).read_bytes())["paths"]
    for method, path, params in sent:
        operation = paths[path][method.lower()]
        if method == "POST":
            schema = operation["requestBody"]["content"]["application/x-www-form-urlencoded"]["schema"]
        else:
            queried = {each["name"]: each["schema"] for each in operation["parameters"] if each["in"] == "query"}
            schema = _object(**queried)
        jsonschema.validate(params, schema)

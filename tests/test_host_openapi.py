"""docs/host-api.yaml against the host itself: schemathesis asks what the description allows, and what it forbids.

Bodies that are to be right are really signed, so that what is behind the signature is reached; what the host answers is
checked down to the payload inside its own signature.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import schemathesis
from cryptography.hazmat.primitives.asymmetric import ec
from host_rig import Payload, Rig, Sender, certificate_signing_request, deliver, make_bureau, register, rig
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import Failure
from schemathesis.engine import events, from_schema
from test_host_server import API, payload_of, schema

from hwsim.host import Host, merchant
from hwsim.host.server import HostServer

SEED = 20240613
EXAMPLES_MAX = 8  # per operation, beside those of the phases that count themselves
KNOWN = "8f2f9c1e-4c59-4c39-9d0a-6a3a1f0f7d11"  # the transaction of the description's own examples


@pytest.fixture(scope="module")
def issuing() -> Any:
    return make_bureau()


@pytest.fixture
def place(tmp_path: Path, issuing: Any) -> Iterator[Rig]:
    with rig(tmp_path / "host", *issuing) as made:
        made.now_ms = int(datetime.now(UTC).timestamp() * 1000)
        yield made


@pytest.fixture
def sender(place: Rig) -> Sender:
    return Sender(place.public, place.card)


@pytest.fixture
def host(place: Rig, sender: Sender) -> Iterator[Host]:
    with place.open() as opened:
        register(opened, sender, place.card)
        sale = sender.sale(transaction=KNOWN)
        for payload in (sale, sender.refund(sale), sender.checkpoint(5)):
            deliver(opened, sender, payload)
        yield opened


class Signer:
    """Puts a true envelope for the path that was generated in the place of a body that is to be right."""

    def __init__(self, host: Host, sender: Sender) -> None:
        self._host = host
        self._sender = sender
        self._sequence = 10
        csr = certificate_signing_request(ec.generate_private_key(ec.SECP256R1()))
        self._make: dict[str, Callable[[str], Payload]] = {
            "authorisation": lambda id_: sender.sale(transaction=id_),
            "reversal": lambda id_: sender.reversal(sender.sale(transaction=id_)),
            "refund": lambda id_: sender.refund(self._sold(), transaction=id_),
            "advice": self._advice,
            "checkpoint": lambda id_: sender.checkpoint(self._grow(), checkpoint=id_),
            "batch": lambda id_: sender.batch(1, 50, ("EUR", 1, 1250), batch=id_),
            "reconciliation": lambda id_: sender.reconciliation(1, 50, reconciliation=id_),
            "certificate": lambda id_: sender.certificate_request(csr, certificate=id_),
        }

    def sign(self, case: Any) -> None:
        meta, media_type = case.meta, case.media_type
        if media_type != "application/jose" or meta is None or meta.generation.mode.is_negative:
            return
        path: dict[str, str] = case.path_parameters
        event = path.get("event") or next(iter(path))
        case.body = self._sender.sign(self._make[event](path.get("transaction") or path[event])).decode()

    def _sold(self) -> Payload:
        sale = self._sender.sale()
        deliver(self._host, self._sender, sale)
        return sale

    def _advice(self, transaction: str) -> Payload:
        sale = self._sender.sale(transaction=transaction)
        if self._host.known(transaction) is None:
            deliver(self._host, self._sender, sale)
        return self._sender.advice(sale)

    def _grow(self) -> int:
        self._sequence += 1
        return self._sequence


def signed_payload_conformance(ctx: Any, response: Any, case: Any) -> None:
    """The JSON inside a signed answer is what the description says of it."""
    if response.status_code != 200 or response.headers["content-type"] != ["application/jose"]:
        return
    described = API["paths"][case.operation.path][case.method.lower()]["responses"]["200"]["content"]
    jws = described["application/jose"]["schema"]["$ref"].rpartition("/")[2]
    inside = API["components"]["schemas"][jws]["x-payload"]["$ref"].rpartition("/")[2]
    errors = [error.message for error in schema(inside).iter_errors(payload_of(response.content))]
    if errors:
        raise Failure(operation=case.operation.label, title=f"no {inside}", message="; ".join(errors))


def _bytes(body: object) -> bytes:
    """A body as it is sent, of whatever type somebody takes it for."""
    match body:
        case bytes():
            return body
        case str():
            return body.encode(errors="replace")
        case _:
            return json.dumps(body).encode()


@contextmanager
def registered(signer: Signer) -> Iterator[None]:
    """schemathesis keeps hooks and checks for the whole process: what is put there is taken out again."""
    schemathesis.serializer("application/jose")(lambda context, value: _bytes(value))
    check = schemathesis.check(signed_payload_conformance)

    @schemathesis.hook
    def before_call(context: Any, case: Any, kwargs: Any) -> None:
        signer.sign(case)

    try:
        yield
    finally:
        schemathesis.hooks.unregister(before_call)
        schemathesis.checks.CHECKS.unregister(check.__name__)


def findings(
    server: HostServer, sender: Sender, description: dict[str, Any], *, operator: bool, only: str | None = None
) -> tuple[list[str], Counter[int]]:
    """What schemathesis finds, and how often each status was answered."""
    host = server.host
    config: dict[str, Any] = {
        "seed": SEED,
        "base-url": server.url,
        "tls-verify": str(host.directory / "public" / "ca.pem"),
        "continue-on-failure": True,
        "request-timeout": 20,
        "generation": {"max-examples": EXAMPLES_MAX, "database": "none"},
        # What the description has beside the usual: a body too long, or without a length.
        "checks": {
            "negative_data_rejection": {"expected-statuses": ["400", "401", "403", "404", "405", "411", "413", "415"]}
        },
        "phases": {"stateful": {"enabled": False}},  # no link leads from one answer to the next request
    }
    if operator:
        cookie = merchant.session(host.keys.operator_token, host.wall_ms()).partition(";")[0].partition("=")[2]
        config["auth"] = {
            "openapi": {
                "operatorToken": {"bearer": host.keys.operator_token},
                "merchantSession": {"api_key": cookie},
            }
        }
    api = schemathesis.openapi.from_dict(copy.deepcopy(description), config=SchemathesisConfig.from_dict(config))
    if only is not None:
        api = api.include(operation_id=only)
    found, statuses = [], Counter[int]()
    signer = Signer(host, sender)
    with registered(signer):
        for event in from_schema(api).execute():
            match event:
                case events.ScenarioFinished():
                    for interaction in event.recorder.interactions.values():
                        if interaction.response is not None:
                            statuses[interaction.response.status_code] += 1
                    for checks in event.recorder.checks.values():
                        found += [_told(event.recorder.label, each) for each in checks if each.failure_info]
                case events.NonFatalError() | events.FatalError():
                    found.append(f"error: {event}")
    print(f"seed {SEED}, statuses {dict(statuses)}")
    return found, statuses


def _told(label: str, check: Any) -> str:
    failure = check.failure_info.failure
    return f"{label}: {failure.title}: {failure.message}\n{check.failure_info.code_sample}"


def test_the_operators_requests_find_nothing_wrong(host: Host, sender: Sender) -> None:
    with HostServer(host) as server:
        found, statuses = findings(server, sender, API, operator=True)
    assert found == []
    # That the run got behind the door: without them "nothing" would mean little.
    assert {200, 303, 400, 401, 404, 405, 409, 413, 415} <= statuses.keys()
    assert statuses[200] > 50


def test_a_strangers_requests_find_nothing_wrong(host: Host, sender: Sender) -> None:
    with HostServer(host) as server:
        found, _ = findings(server, sender, API, operator=False)
    assert found == []


# Controls: each plants one mistake, in the host or in its description.


def _without_401(description: dict[str, Any]) -> None:
    del description["paths"]["/v1/bookings"]["get"]["responses"]["401"]


def _other_member(description: dict[str, Any]) -> None:
    description["components"]["schemas"]["Status"]["properties"]["sealing_key"] = {"type": "integer"}


def _other_media_type(description: dict[str, Any]) -> None:
    del description["components"]["responses"]["Login"]["content"]["text/html"]
    description["components"]["responses"]["Login"]["content"]["application/json"] = {"schema": {"type": "string"}}


@pytest.mark.parametrize(
    ("spoil", "only", "title"),
    [
        (_without_401, "getBookings", "Undocumented status code"),
        (_other_member, "getStatus", "Response violates schema"),
        (_other_media_type, "getMerchant", "Undocumented Content-Type"),
    ],
)
def test_control_a_wrong_description_is_found(
    host: Host, sender: Sender, spoil: Callable[[dict[str, Any]], None], only: str, title: str
) -> None:
    description = copy.deepcopy(API)
    spoil(description)
    with HostServer(host) as server:
        found, _ = findings(server, sender, description, operator=False, only=only)
    assert any(title in each for each in found), found


@pytest.mark.parametrize(
    ("only", "title", "spoil"),
    [
        ("getBookings", "API accepts requests", ("hwsim.host.server._Handler._operator_only", lambda _: None)),
        ("putReconciliation", "no ReconciliationAnswer", ("hwsim.host.host._missing", lambda *_: [(0, 0)])),
        ("putBatch", "Server error", ("hwsim.host.host._totals", lambda _: 1 // 0)),
        ("putCertificate", "Schema-valid request rejected", ("hwsim.host.server.ENVELOPE_BYTES_MAX", 64)),
    ],
)
def test_control_a_wrong_host_is_found(
    host: Host, sender: Sender, only: str, title: str, spoil: tuple[str, Any]
) -> None:
    with mock.patch(*spoil), HostServer(host) as server:
        found, _ = findings(server, sender, API, operator=True, only=only)
    assert any(title in each for each in found), found

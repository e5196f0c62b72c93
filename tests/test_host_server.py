"""The host over real HTTPS: its interface as docs/host-api.yaml has it, its misbehaviours, its certificates."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import jwt
import pytest
import yaml
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from host_rig import Payload, Rig, Sender, assert_booked_exactly_once, fingerprint, make_bureau, path_of, register, rig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from hwsim.cards.personalise import Bureau, CardProfile
from hwsim.host import Host
from hwsim.host.controls import (
    CaptivePortal,
    Delay,
    Fail,
    Garbage,
    LoseAnswer,
    Misbehaviour,
    OrderRefused,
    OtherAnswer,
    Show,
    WrongKey,
    order,
    order_json,
)
from hwsim.host.messages import ENVELOPE_BYTES_MAX
from hwsim.host.server import HostServer, main
from hwsim.host.tls import Certificate

ROOT = Path(__file__).resolve().parent.parent
API: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "host-api.yaml").read_text(encoding="utf-8"))


def schema(name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": API["components"]})


@dataclass
class Response:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def media_type(self) -> str:
        return self.headers.get_content_type()

    def problem(self) -> str:
        """The word of a problem, whose document has been checked."""
        assert self.media_type == "application/problem+json"
        document = json.loads(self.body)
        schema("Problem").validate(document)
        assert document["status"] == self.status
        return str(document["type"].rpartition(":")[2])


@dataclass
class Client:
    """A plain HTTPS client that keeps its connection, as a terminal does."""

    port: int
    ca: Path
    name: str = "localhost"
    minimum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2
    maximum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
    _connection: http.client.HTTPSConnection | None = field(default=None, repr=False)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Response:
        if self._connection is None:
            context = ssl.create_default_context(cafile=str(self.ca))
            context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
            context.minimum_version, context.maximum_version = self.minimum, self.maximum
            self._connection = http.client.HTTPSConnection(self.name, self.port, timeout=20, context=context)
        try:
            self._connection.request(
                method, path, body, {name.replace("_", "-"): value for name, value in headers.items()}
            )
            response = self._connection.getresponse()
            return Response(response.status, response.headers, response.read())
        except (OSError, http.client.HTTPException):
            self.close()
            raise

    def put(self, payload: Payload, envelope: bytes) -> Response:
        return self.ask("PUT", path_of(payload), envelope, Content_Type="application/jose", Idempotency_Key="4f1c")

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@pytest.fixture(scope="module")
def issuing() -> tuple[Bureau, CardProfile]:
    return make_bureau()


@pytest.fixture
def place(tmp_path: Path, issuing: tuple[Bureau, CardProfile]) -> Iterator[Rig]:
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


@pytest.fixture
def server(host: Host) -> Iterator[HostServer]:
    with HostServer(host) as running:
        yield running


@pytest.fixture
def client(server: HostServer, place: Rig) -> Iterator[Client]:
    with contextlib.closing(Client(server.port, place.public / "ca.pem")) as made:
        yield made


# The interface


def test_the_description_is_valid_and_so_are_its_examples() -> None:
    validate(API)
    shown = 0
    for name, described in API["components"]["schemas"].items():
        for example in described.get("examples", ()):
            schema(name).validate(example)
            shown += 1
        if (inside := described.get("x-payload")) is not None:
            assert API["components"]["schemas"][inside["$ref"].rpartition("/")[2]], name
    assert shown >= 17
    (authorisation,) = API["components"]["schemas"]["Authorisation"]["examples"]
    for wrong in (authorisation | {"tip": 1}, authorisation | {"amount": "12.50"}, authorisation | {"v": 2}):
        with pytest.raises(jsonschema.ValidationError):
            schema("Envelope").validate(wrong)


def payload_of(jws: bytes | str) -> Payload:
    text = jws if isinstance(jws, str) else jws.decode()
    said: Payload = json.loads(jwt.api_jws.decode_complete(text, options={"verify_signature": False})["payload"])
    return said


def test_envelopes_and_answers_are_as_described(client: Client, sender: Sender) -> None:
    approved, declined, overtaken = sender.sale(), sender.sale(1251), sender.sale()
    for payload in (approved, sender.reversal(approved), declined, sender.reversal(overtaken), overtaken):
        schema("Envelope").validate(payload)
        envelope = sender.sign(payload)
        response = client.put(payload, envelope)
        assert (response.status, response.media_type) == (200, "application/jose")
        schema("AnswerJws").validate(response.body.decode())
        schema("Answer").validate(sender.read(response.body, envelope))


def test_the_same_envelope_gets_the_same_bytes(client: Client, sender: Sender, host: Host) -> None:
    payload = sender.sale()
    envelope = sender.sign(payload)
    first, second = client.put(payload, envelope), client.put(payload, envelope)
    assert first.body == second.body
    assert (first.headers["Idempotent-Replayed"], second.headers["Idempotent-Replayed"]) == (None, "true")
    assert second.headers["Cache-Control"] == "no-store"
    assert_booked_exactly_once(host.bookings(), {payload["transaction"]: 1250})


def test_copies_on_many_connections_are_booked_once(server: HostServer, place: Rig, sender: Sender) -> None:
    payload = sender.sale()
    envelope = sender.sign(payload)
    start = threading.Barrier(8)

    def send() -> bytes:
        with contextlib.closing(Client(server.port, place.public / "ca.pem")) as own:
            start.wait()
            return own.put(payload, envelope).body

    with ThreadPoolExecutor(8) as pool:
        answers = {future.result() for future in [pool.submit(send) for _ in range(8)]}
    assert len(answers) == 1
    assert_booked_exactly_once(server.host.bookings(), {payload["transaction"]: 1250})


def test_refusals_come_as_problems(client: Client, sender: Sender, host: Host) -> None:
    payload = sender.sale()
    envelope = sender.sign(payload)
    path = f"/v1/transactions/{payload['transaction']}/authorisation"
    put = {"Content_Type": "application/jose", "Idempotency_Key": "k"}
    assert client.ask("PUT", path, b"no.such.jws", **put).problem() == "malformed"
    assert client.ask("PUT", path, b"", **put).problem() == "malformed"
    reversal = sender.sign(sender.reversal(payload))
    assert client.ask("PUT", path, reversal, **put).problem() == "path-mismatch"
    assert client.ask("PUT", path, envelope, Content_Type="application/jose").problem() == "idempotency-key"
    assert client.ask("PUT", path, envelope, **(put | {"Content_Type": "text/plain"})).status == 415
    assert client.ask("PUT", path.replace("authorisation", "refund"), envelope, **put).problem() == "path-mismatch"
    assert client.ask("PUT", path.replace("authorisation", "tip"), envelope, **put).status == 404
    assert client.ask("PUT", path.upper(), envelope, **put).status == 404
    assert client.ask("PUT", path + "/..", envelope, **put).status == 404
    for method in ("POST", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "TRACE"):
        response = client.ask(method, path, **put)
        assert (response.status, response.headers["Allow"]) == (405, "PUT")
        assert method == "HEAD" or response.problem() == "method"
    assert client.ask("PUT", "/v1/status").headers["Allow"] == "GET"
    assert client.ask("BREW", path).problem() == "request"
    assert host.bookings() == []
    assert client.put(payload, envelope).status == 200
    dearer = sender.sale(9999, transaction=payload["transaction"])
    assert client.put(dearer, sender.sign(dearer)).problem() == "conflict"


def test_the_body_is_bounded(client: Client, sender: Sender, host: Host) -> None:
    payload = sender.sale()
    response = client.put(payload, b"a" * (ENVELOPE_BYTES_MAX + 1))
    assert (response.status, response.problem(), response.headers["Connection"]) == (413, "too-large", "close")
    client.close()
    assert client.put(payload, b"a" * ENVELOPE_BYTES_MAX).status == 400
    path = f"/v1/transactions/{payload['transaction']}/authorisation"
    assert client.ask("PUT", path, b"", Transfer_Encoding="chunked").status == 411
    client.close()
    assert client.ask("PUT", path, b"", Content_Length="-1").status == 411
    assert host.bookings() == []


def test_a_client_that_asks_first_is_told_to_go_on(client: Client, sender: Sender) -> None:
    payload = sender.sale()
    path = f"/v1/transactions/{payload['transaction']}/authorisation"
    headers = {"Content_Type": "application/jose", "Idempotency_Key": "k", "Expect": "100-continue"}
    assert client.ask("PUT", path, sender.sign(payload), **headers).status == 200


def test_a_body_that_ends_early_is_no_refusal(client: Client, server: HostServer, place: Rig, sender: Sender) -> None:
    payload = sender.sale()
    envelope = sender.sign(payload)
    context = ssl.create_default_context(cafile=str(place.public / "ca.pem"))
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    with context.wrap_socket(raw, server_hostname="localhost") as stream:
        head = (
            f"PUT /v1/transactions/{payload['transaction']}/authorisation HTTP/1.1\r\nHost: h\r\n"
            f"Content-Type: application/jose\r\nIdempotency-Key: k\r\nContent-Length: {len(envelope)}\r\n\r\n"
        )
        stream.sendall(head.encode() + envelope[:-10])
        # Say that nothing more comes, and wait for the close. An answer in between would be another error.
        # Some releases of OpenSSL call the host's close an error, others do not.
        try:
            stream.unwrap()
        except OSError as closed:
            assert "APPLICATION_DATA" not in str(closed)
    assert server.host.bookings() == []
    assert client.put(payload, envelope).status == 200


def test_a_transaction_can_be_looked_up(client: Client, sender: Sender) -> None:
    sale = sender.sale()
    path = f"/v1/transactions/{sale['transaction']}"
    assert client.ask("GET", path).problem() == "transaction-unknown"
    undo = sender.reversal(sale)
    answers = {payload["event"]: client.put(payload, sender.sign(payload)).body.decode() for payload in (sale, undo)}
    document = json.loads(client.ask("GET", path).body)
    schema("Transaction").validate(document)
    assert document["state"] == "reversed"
    assert {event: entry["answer"] for event, entry in document["events"].items()} == answers


def test_the_books_are_for_the_operator(client: Client, sender: Sender, host: Host) -> None:
    payload = sender.sale()
    client.put(payload, sender.sign(payload))
    for header in ({}, {"Authorization": "Bearer guess"}, {"Authorization": f"Basic {host.keys.operator_token}"}):
        response = client.ask("GET", "/v1/bookings", **header)
        assert (response.problem(), response.headers["WWW-Authenticate"]) == ("operator-only", "Bearer")
    response = client.ask("GET", "/v1/bookings", Authorization=f"Bearer {host.keys.operator_token}")
    document = json.loads(response.body)
    schema("Bookings").validate(document)
    assert [booking["transaction"] for booking in document["bookings"]] == [payload["transaction"]]


def test_status_and_fingerprints_name_the_same_keys(client: Client, place: Rig) -> None:
    status = json.loads(client.ask("GET", "/v1/status").body)
    schema("Status").validate(status)
    named = json.loads((place.public / "fingerprints.json").read_text())
    for file, member in (("host-sealing-key", "sealing_key"), ("host-answer-key", "answer_key")):
        key = load_pem_public_key((place.public / file).read_bytes())
        assert named[file] == fingerprint(key)  # type: ignore[arg-type]
        assert named[file].startswith(status[member])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.binary(max_size=200) | st.from_regex(rb"\A[A-Za-z0-9_-]{0,60}(\.[A-Za-z0-9_-]{0,60}){2}\Z"),
    headers=st.fixed_dictionaries(
        {
            "Content_Type": st.sampled_from(["application/jose", "application/json", "", "application/jose; x=\xff"]),
            "Idempotency_Key": st.sampled_from(["k", "", " ", "x" * 300]),
        }
    ),
)
def test_arbitrary_uploads_are_refused_and_never_fail(
    client: Client, sender: Sender, host: Host, body: bytes, headers: dict[str, str]
) -> None:
    path = f"/v1/transactions/{sender.transaction()}/authorisation"
    response = client.ask("PUT", path, body, **headers)
    assert 400 <= response.status < 500
    response.problem()
    assert host.bookings() == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=st.binary(min_size=1, max_size=200).map(lambda raw: raw + b"\r\n\r\n"))
def test_arbitrary_bytes_do_not_stop_the_server(server: HostServer, place: Rig, client: Client, request: bytes) -> None:
    context = ssl.create_default_context(cafile=str(place.public / "ca.pem"))
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    with contextlib.suppress(OSError), context.wrap_socket(raw, server_hostname="localhost") as stream:
        stream.sendall(request)
        socket.socket.shutdown(stream, socket.SHUT_WR)
        answer = b"".join(iter(lambda: stream.recv(4096), b""))
        assert b" 500 " not in answer.partition(b"\r\n")[0]
    raw.close()
    assert client.ask("GET", "/v1/status").status == 200


# Misbehaviours


BOOKED_ALL_THE_SAME: list[Misbehaviour] = [
    LoseAnswer(),
    Fail(500, booked=True),
    Fail(503, retry_after_s=7, booked=True),
    Garbage(),
    WrongKey(),
    OtherAnswer({"transaction": "00000000-0000-4000-8000-000000000000"}),
    OtherAnswer({"amount": 1}),
    OtherAnswer({"decision": "approved", "envelope": "00" * 32}),
]


@pytest.mark.parametrize("misbehaviour", BOOKED_ALL_THE_SAME, ids=lambda each: type(each).__name__)
def test_whatever_becomes_of_the_answer_the_sale_is_booked_once(
    server: HostServer, client: Client, sender: Sender, misbehaviour: Misbehaviour
) -> None:
    server.controls.arm(misbehaviour, times=2)
    payload = sender.sale()
    envelope = sender.sign(payload)
    for _ in range(2):
        if isinstance(misbehaviour, LoseAnswer):
            with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
                client.put(payload, envelope)
        else:
            response = client.put(payload, envelope)
            with pytest.raises((AssertionError, jwt.InvalidTokenError, UnicodeDecodeError)):
                assert response.status == 200
                sender.read(response.body, envelope)
        assert_booked_exactly_once(server.host.bookings(), {payload["transaction"]: 1250})
    answer = sender.read(client.put(payload, envelope).body, envelope)
    assert answer["decision"] == "approved"
    assert_booked_exactly_once(server.host.bookings(), {payload["transaction"]: 1250})


def test_forged_answers_are_forged_as_they_say(server: HostServer, client: Client, sender: Sender) -> None:
    payload = sender.sale()
    envelope = sender.sign(payload)
    server.controls.arm(WrongKey())
    with pytest.raises(jwt.InvalidSignatureError):
        sender.read(client.put(payload, envelope).body, envelope)
    server.controls.arm(OtherAnswer({"amount": 1}))
    forged = client.put(payload, envelope).body.decode()
    jwt.api_jws.decode(forged, sender.answer_key, algorithms=["EdDSA"])  # the signature is the host's own
    assert payload_of(forged)["amount"] == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_host_that_fails_before_booking_has_not_booked(
    server: HostServer, client: Client, sender: Sender, status: int
) -> None:
    server.controls.arm(Fail(status, retry_after_s=3))
    payload = sender.sale()
    response = client.put(payload, sender.sign(payload))
    assert (response.status, response.headers["Retry-After"], response.problem()) == (status, "3", "unavailable")
    assert server.host.bookings() == []


def test_a_captive_portal_is_not_the_host(server: HostServer, client: Client, sender: Sender) -> None:
    server.controls.arm(CaptivePortal())
    payload = sender.sale()
    response = client.put(payload, sender.sign(payload))
    assert (response.status, response.media_type) == (200, "text/html")
    assert server.host.bookings() == []


def test_misbehaviour_can_be_called_off(server: HostServer, client: Client, sender: Sender) -> None:
    server.controls.arm(Fail(500), times=100)
    server.controls.clear()
    payload = sender.sale()
    assert client.put(payload, sender.sign(payload)).status == 200


def test_answers_can_be_late_and_a_stop_waits_for_them(server: HostServer, client: Client, sender: Sender) -> None:
    payload = sender.sale()
    server.controls.arm(Delay(delay_ms=60_000))
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(client.put, payload, sender.sign(payload))
        wait_until(lambda: bool(server.host.bookings()))
        assert not late.done()
        server.stop()
        assert late.result().status == 200


def test_listening_stops_and_starts_on_the_same_port(server: HostServer, client: Client, sender: Sender) -> None:
    payload = sender.sale()
    envelope = sender.sign(payload)
    first = client.put(payload, envelope)
    port = server.port
    server.stop()
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError, ssl.SSLError)):
        client.put(payload, envelope)  # the kept connection
    with pytest.raises(ConnectionRefusedError):
        client.put(payload, envelope)
    server.start()
    assert server.port == port
    assert client.put(payload, envelope).body == first.body


def wait_until(true: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


# Certificates


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_strict_client_accepts_the_certificate(
    server: HostServer, place: Rig, name: str, version: ssl.TLSVersion
) -> None:
    with contextlib.closing(
        Client(server.port, place.public / "ca.pem", name=name, minimum=version, maximum=version)
    ) as made:
        assert made.ask("GET", "/v1/status").status == 200


@pytest.mark.parametrize(
    ("certificate", "said"),
    [
        (Certificate.EXPIRED, "certificate has expired"),
        (Certificate.WRONG_NAME, "Hostname mismatch"),
        (Certificate.UNTRUSTED, "unable to get local issuer certificate"),
    ],
)
def test_a_wrong_certificate_is_wrong_in_one_thing(
    server: HostServer, client: Client, certificate: Certificate, said: str
) -> None:
    server.show(certificate)
    with pytest.raises(ssl.SSLCertVerificationError, match=said):
        client.ask("GET", "/v1/status")
    server.show(Certificate.GOOD)
    assert client.ask("GET", "/v1/status").status == 200


def test_old_tls_and_plain_http_get_nowhere(server: HostServer, client: Client) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain:
        plain.sendall(b"GET /v1/status HTTP/1.1\r\nHost: h\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert not plain.recv(100).startswith(b"HTTP")
    assert client.ask("GET", "/v1/status").status == 200


# As a process


def connected(port: int, place: Rig) -> contextlib.closing[Client]:
    return contextlib.closing(Client(port, place.public / "ca.pem"))


@contextlib.contextmanager
def process(directory: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "hwsim.host.server", str(directory), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'hw-sim'}"}
    ) as running:
        try:
            assert running.stdout is not None
            line = running.stdout.readline()
            assert line.startswith("host listening on port "), line
            yield running, int(line.split()[-1])
        finally:
            running.kill()


def test_the_host_as_a_process(place: Rig, sender: Sender, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place.bureau.save(place.directory / "bureau.json")
    place.card.save(tmp_path / "card.json")
    (tmp_path / "terminal.pem").write_bytes(sender.public_pem)
    payload = sender.sale()
    envelope = sender.sign(payload)
    with process(place.directory) as (running, port), connected(port, place) as client:
        # Its cards are valid and its terminal known from now on, although it is running already.
        terminal = ["--register", "T-0001", "M-0001", str(tmp_path / "terminal.pem")]
        assert main([str(place.directory), *terminal, "--enrol", str(tmp_path / "card.json")]) == 0
        order_json(place.directory, b'{"do":"misbehave","misbehaviour":{"kind":"lose_answer"}}')
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            client.put(payload, envelope)
        running.kill()
    with process(place.directory) as (running, port), connected(port, place) as client:
        answer = client.put(payload, envelope)
        assert answer.headers["Idempotent-Replayed"] == "true"
        assert sender.read(answer.body, envelope)["decision"] == "approved"
        order_json(place.directory, b'{"do":"listen","on":false}')
        with pytest.raises(OSError):
            client.put(payload, envelope)
        order_json(place.directory, b'{"do":"listen","on":true}')
        assert client.put(payload, envelope).body == answer.body
        order(place.directory, Show(Certificate.EXPIRED))
        client.close()
        with pytest.raises(ssl.SSLCertVerificationError):
            client.put(payload, envelope)
        order(place.directory, Show(Certificate.GOOD))
        (booking,) = order_json(place.directory, b'{"do":"bookings"}')
        assert (booking["transaction"], booking["received"]) == (payload["transaction"], 3)
        for wrong in (b"nonsense", b'{"do":"explode"}', b'{"do":"misbehave","misbehaviour":{"kind":"nice"}}'):
            with pytest.raises(OrderRefused):
                order_json(place.directory, wrong)
        capsys.readouterr()
        assert main([str(place.directory), "--bookings", "--json"]) == 0
        (printed,) = json.loads(capsys.readouterr().out)
        schema("Booking").validate(printed)
        assert main([str(place.directory), "--bookings"]) == 0
        assert payload["transaction"] in capsys.readouterr().out
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == 0
    assert not (place.directory / "control.sock").exists()

"""The host destination against a real HTTPS server on loopback: what each failure is called, and that nothing hangs."""

from __future__ import annotations

import gzip
import socket
import ssl
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sync_rig
from sync_rig import MARKER, Authority, Reply, TlsHost, answer_to, faster_than, sale, says, serving

from terminal.sync.destinations import Answered, Busy, NotSent, Parcel, Refused, Result, Unsure
from terminal.sync.destinations.host import ANSWER_BYTES_MAX, HostDestination, HostSettings
from terminal.sync.errors import Unsendable

PARCEL = Parcel(UUID(int=1), "authorisation", "5ec2e7", sale(1).envelope)


@dataclass(frozen=True)
class Certificates:
    authority: Authority
    other: Authority
    directory: Path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    directory = tmp_path_factory.mktemp("certificates")
    return Certificates(Authority(directory, "ours"), Authority(directory, "theirs"), directory)


@pytest.fixture(scope="module")
def server(certificates: Certificates) -> Iterator[TlsHost]:
    with serving(certificates.authority.issue("127.0.0.1")) as server:
        yield server


@pytest.fixture
def settings(certificates: Certificates, server: TlsHost) -> HostSettings:
    server.script.clear()
    return HostSettings(server.url, certificates.authority.file, total_timeout_ms=600, read_timeout_ms=300)


def sent(settings: HostSettings, parcel: Parcel = PARCEL) -> Result:
    destination = HostDestination(settings)
    try:
        return destination.send(parcel)
    finally:
        destination.close()


def message(result: Result) -> str:
    assert not isinstance(result, Answered)
    return result.message


def test_an_answer(server: TlsHost, settings: HostSettings) -> None:
    server.headers.clear()
    assert sent(settings) == Answered(answer_to(PARCEL.transaction, PARCEL.event, PARCEL.body))
    assert server.books.attempts[-1] == (f"{PARCEL.transaction}/authorisation", "5ec2e7", PARCEL.body)
    assert server.headers[0]["Content-Type"] == "application/jose"
    assert server.headers[0]["Idempotency-Key"] == "5ec2e7"
    assert "Authorization" not in server.headers[0]


CHECKPOINT = replace(PARCEL, event="checkpoint")


def test_a_checkpoint_has_a_path_of_its_own(server: TlsHost, settings: HostSettings) -> None:
    assert sent(settings, CHECKPOINT) == Answered(answer_to(PARCEL.transaction, "checkpoint", PARCEL.body))
    assert server.books.attempts[-1][0] == f"{PARCEL.transaction}/checkpoint"


@pytest.mark.parametrize("status", [404, 405])
def test_a_host_without_checkpoints_still_takes_sales(server: TlsHost, settings: HostSettings, status: int) -> None:
    """The checkpoint alone is refused; for a sale the same answer is about the address, and nothing is condemned."""
    server.script += [says(status), says(status)]
    of_checkpoint, of_sale = sent(settings, CHECKPOINT), sent(settings)
    assert isinstance(of_checkpoint, Refused)
    assert isinstance(of_sale, Refused)
    assert (of_checkpoint.permanent, of_sale.permanent) == (True, False)
    assert "takes no checkpoint" in of_checkpoint.message


PORTAL = b"<html>Welcome! Please log in.</html>"
BOMB = says(200, gzip.compress(b"a.b." + b"c" * 10**7)[:10_000], Content_Encoding="gzip")
LOG_IN = says(200, PORTAL, Content_Type="text/html")


@pytest.mark.parametrize(
    ("reply", "kind", "text"),
    [
        pytest.param(says(500, books=True), Unsure, "the host 127.0.0.1 has a fault (500)", id="500"),
        pytest.param(says(503), Unsure, "has a fault (503)", id="503"),
        pytest.param(says(204), Unsure, "gave no decision (204)", id="204"),
        pytest.param(says(429), Busy, "is busy (429): sent again later", id="429"),
        pytest.param(says(425), Busy, "waits for what comes before this", id="425"),
        pytest.param(says(400), Refused, "the item is malformed (400): kept for a person", id="400"),
        pytest.param(says(409), Refused, "already holds something that contradicts the item (409)", id="409"),
        pytest.param(says(422), Refused, "the item is invalid (422)", id="422"),
        pytest.param(says(401), Refused, "it wants a client certificate", id="401"),
        pytest.param(says(403), Refused, "it does not admit this terminal", id="403"),
        pytest.param(says(404), Refused, "check [host] url. Everything stays stored", id="404"),
        pytest.param(says(307, Location="https://127.0.0.1:1/"), Refused, "set the new address", id="redirect"),
        pytest.param(LOG_IN, Unsure, "is there a log-in page in the way?", id="captive portal"),
        pytest.param(says(200, b"!" * 50), Unsure, "is garbled", id="garbage"),
        pytest.param(says(200, b""), Unsure, "is garbled", id="empty"),
        pytest.param(says(200, b"a.b.c" * ANSWER_BYTES_MAX), Unsure, "is too long", id="huge"),
        pytest.param(sync_rig.floods, Unsure, "is too long", id="endless"),
        pytest.param(sync_rig.floods_headers, Unsure, "before its answer was whole", id="endless headers"),
        pytest.param(BOMB, Unsure, "is garbled", id="compressed"),
        pytest.param(sync_rig.loses_answer, Unsure, "broke off before its answer was whole", id="lost answer"),
        pytest.param(sync_rig.loses_request, Unsure, "broke off before its answer was whole", id="lost request"),
        pytest.param(sync_rig.breaks_off, Unsure, "broke off before its answer was whole", id="half an answer"),
        pytest.param(sync_rig.hangs, Unsure, "does not answer in time", id="hangs"),
        pytest.param(sync_rig.drips_headers, Unsure, "does not answer in time", id="slow drip, headers"),
        pytest.param(sync_rig.drips_body, Unsure, "does not answer in time", id="slow drip, body"),
        pytest.param(sync_rig.continues_for_ever, Unsure, "does not answer in time", id="endless 100"),
    ],
)
def test_every_failure_has_its_name(
    server: TlsHost, settings: HostSettings, reply: Reply, kind: type[Any], text: str
) -> None:
    server.script.append(reply)
    with faster_than(2.0):
        result = sent(settings)
    assert isinstance(result, kind), result
    assert text in message(result)
    assert message(result).startswith(("the host 127.0.0.1", "something answered for the host", "the answer of"))


@pytest.mark.parametrize(
    "reply", [sync_rig.floods, sync_rig.floods_headers, BOMB], ids=["body", "headers", "compressed"]
)
def test_a_hostile_host_costs_no_memory(server: TlsHost, settings: HostSettings, reply: Reply) -> None:
    """Whatever it pours out, an answer's bytes are all that is kept of it."""
    server.script += [reply, reply]
    sent(settings)  # what is loaded once
    tracemalloc.start()
    try:
        sent(settings)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 16_000_000, most_bytes


def test_the_whole_exchange_has_one_limit(server: TlsHost, settings: HostSettings) -> None:
    server.script.append(sync_rig.hangs)
    with faster_than(2.0):
        result = sent(replace(settings, read_timeout_ms=60_000, total_timeout_ms=300))
    assert "does not answer in time" in message(result)


def test_only_what_is_said_of_the_item_itself_is_permanent(server: TlsHost, settings: HostSettings) -> None:
    permanent = set()
    for status in (*range(300, 309), *range(400, 452)):
        server.script.append(says(status))
        result = sent(settings)
        assert isinstance(result, Refused) or status in {425, 429}
        if isinstance(result, Refused) and result.permanent:
            permanent.add(status)
    assert permanent == {400, 409, 413, 422}


@pytest.mark.parametrize(
    ("header", "expected_ms"),
    [("7", 7_000), ("999999999", 3_600_000), ("-1", None), ("Fri, 31 Dec 1999 23:59:59 GMT", None), ("9" * 99, None)],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after(
    server: TlsHost, settings: HostSettings, status: int, header: str, expected_ms: int | None
) -> None:
    server.script.append(says(status, Retry_After=header))
    result = sent(settings)
    assert isinstance(result, Busy | Unsure)
    assert result.retry_after_ms == expected_ms


def test_host_down(settings: HostSettings) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        result = sent(replace(settings, base_url=f"https://127.0.0.1:{free.getsockname()[1]}"))
    assert result == NotSent("the host 127.0.0.1 is down: it refuses connections")


def test_host_that_never_greets(settings: HostSettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, faster_than(2.0):
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        result = sent(replace(settings, base_url=url, connect_timeout_ms=200))
    assert isinstance(result, NotSent)
    assert "cannot be reached in time" in result.message


def test_a_name_that_is_not_found(settings: HostSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    result = sent(replace(settings, base_url="https://pay.example"))
    assert result == NotSent("the name of the host pay.example is not found (DNS): is there a network?")


def test_no_network(settings: HostSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    result = sent(settings)
    assert isinstance(result, NotSent)
    assert "there is no network to" in result.message


def refused_certificate(settings: HostSettings, certificate: Path, *, name: str = "127.0.0.1") -> str:
    with serving(certificate) as server:
        result = sent(replace(settings, base_url=f"https://{name}:{server.port}"))
        assert isinstance(result, NotSent), result
        assert server.headers == []
    return result.message


def test_a_certificate_of_another_authority(settings: HostSettings, certificates: Certificates) -> None:
    assert "is not trusted" in refused_certificate(settings, certificates.other.issue("127.0.0.1"))


def test_a_certificate_is_not_trusted_for_being_public(settings: HostSettings, certificates: Certificates) -> None:
    """Without a CA file the public authorities count, and ours is none of them."""
    certificate = certificates.authority.issue("127.0.0.1")
    assert "is not trusted" in refused_certificate(replace(settings, ca_file=None), certificate)


def test_an_expired_certificate(settings: HostSettings, certificates: Certificates) -> None:
    text = refused_certificate(settings, certificates.authority.issue("127.0.0.1", days=-1))
    assert "has expired, or this clock is wrong" in text


def test_a_certificate_of_the_future(settings: HostSettings, certificates: Certificates) -> None:
    """What a Pi without network time sees of every certificate."""
    text = refused_certificate(settings, certificates.authority.issue("127.0.0.1", from_days=1))
    assert "this clock is behind" in text


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_certificate_for_another_name(settings: HostSettings, certificates: Certificates, name: str) -> None:
    text = refused_certificate(settings, certificates.authority.issue("other.example"), name=name)
    assert text == f"the certificate of the host {name} is for another name: check [host] url"


def test_an_old_protocol_is_not_spoken(settings: HostSettings, certificates: Certificates) -> None:
    with serving(certificates.authority.issue("127.0.0.1")) as server:
        context = server.context
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        result = sent(replace(settings, base_url=server.url))
    assert isinstance(result, NotSent)
    assert "no secure connection (TLS)" in result.message


def test_client_certificate(settings: HostSettings, certificates: Certificates) -> None:
    ours = certificates.authority.issue("terminal-1")
    theirs = certificates.authority.issue("127.0.0.1")
    with serving(theirs, client_authority=certificates.authority.file) as server:
        settings = replace(settings, base_url=server.url)
        assert isinstance(sent(replace(settings, client_certificate=ours)), Answered)
        server.books.attempts.clear()
        assert not isinstance(sent(settings), Answered)
        assert server.books.attempts == []


@pytest.mark.parametrize("url", ["http://host.example", "host.example", "https://", "https://a:b@host.example"])
def test_only_plain_https_addresses(settings: HostSettings, url: str) -> None:
    with pytest.raises(Unsendable, match="Write https"):
        HostDestination(replace(settings, base_url=url))


@pytest.mark.parametrize("name", ["missing.pem", "broken.pem"])
def test_certificate_files_that_cannot_be_read(settings: HostSettings, tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.pem").write_text("no certificate")
    for unusable in (
        replace(settings, ca_file=tmp_path / name),
        replace(settings, client_certificate=tmp_path / name),
    ):
        with pytest.raises(Unsendable, match="everything stays stored"):
            HostDestination(unusable)


def test_the_environment_changes_nothing(
    settings: HostSettings, certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No proxy, no .netrc, no other authorities."""
    for name in ("HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.other.file))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.other.file))
    assert isinstance(sent(settings), Answered)
    assert "is not trusted" in refused_certificate(settings, certificates.other.issue("127.0.0.1"))


def test_a_connection_is_kept_while_it_is_fresh(settings: HostSettings, certificates: Certificates) -> None:
    now_s = 0.0
    with serving(certificates.authority.issue("127.0.0.1")) as server:
        destination = HostDestination(replace(settings, base_url=server.url), monotonic_s=lambda: now_s)
        for at_s, connections in ((0, 1), (20, 1), (60, 2), (70, 2)):
            now_s = at_s
            assert isinstance(destination.send(PARCEL), Answered)
            assert server.connections == connections
        server.script.append(says(500))
        destination.send(PARCEL)
        assert isinstance(destination.send(PARCEL), Answered)
        assert server.connections == 3  # none is inherited from a failure
        destination.close()


def test_a_connection_that_the_host_has_closed_is_replaced(settings: HostSettings, server: TlsHost) -> None:
    """An idle connection that ended must not make the next sale ambiguous."""
    destination = HostDestination(settings)
    server.script.append(says(200, b"a.b.c", Connection="close"))
    assert isinstance(destination.send(PARCEL), Answered)
    assert isinstance(destination.send(PARCEL), Answered)
    destination.close()


def test_no_message_quotes_the_other_side_or_the_item(server: TlsHost, settings: HostSettings) -> None:
    """A host may echo what it got, or say anything: neither belongs into a log."""
    for status in (200, 302, 400, 403, 409, 429, 500):
        server.script.append(says(status, PARCEL.body.encode() + PORTAL, Content_Type="text/plain", Location=MARKER))
        text = message(sent(settings))
        assert MARKER not in text
        assert "Welcome" not in text
        assert PARCEL.idempotency_key not in text

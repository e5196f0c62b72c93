"""The merchant's page: who may see it, what it shows, and that nothing shown can become more than text."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterator
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from host_rig import Rig, Sender, deliver, make_bureau, register, rig
from hypothesis import given
from hypothesis import strategies as st
from test_host_server import Client, Response

from hwsim.host import Booking, Fork, Host, Refused, State, merchant
from hwsim.host.server import HostServer
from hwsim.host.store import DayTotal, Gap, TerminalSummary

VOID = {"meta", "link", "input"}


class Reader(HTMLParser):
    """Reads a page as a browser would, and notes every element, attribute and text. Fails on unbalanced markup."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("href", "action")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def read(page: bytes) -> Reader:
    reader = Reader()
    reader.feed(page.decode())
    reader.close()
    assert not reader._open
    return reader


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


@pytest.fixture
def client(host: Host, place: Rig) -> Iterator[Client]:
    with HostServer(host) as server, contextlib.closing(Client(server.port, place.public / "ca.pem")) as made:
        yield made


def log_in(client: Client, token: str) -> Response:
    form = urlencode({"token": token}).encode()
    return client.ask("POST", "/merchant/login", form, Content_Type="application/x-www-form-urlencoded")


def cookie_of(response: Response) -> str:
    return response.headers["Set-Cookie"].partition(";")[0]


# Who may see it


def test_a_login_opens_the_page_and_a_logout_closes_it(client: Client, host: Host) -> None:
    for path in ("/", "/merchant"):
        closed = client.ask("GET", path)
        assert (closed.status, closed.media_type) == (401, "text/html")
        assert "Operator’s token" in read(closed.body).text
    opened = log_in(client, host.keys.operator_token)
    assert (opened.status, opened.headers["Location"]) == (303, "/merchant")
    name, *attributes = opened.headers["Set-Cookie"].split("; ")
    assert attributes == ["Path=/", "Max-Age=43200", "Secure", "HttpOnly", "SameSite=Strict"]
    assert name.startswith("__Host-")
    assert host.keys.operator_token not in name
    for path in ("/", "/merchant"):
        assert client.ask("GET", path, Cookie=f"other=1; {name}").status == 200
    left = client.ask("POST", "/merchant/logout")
    assert left.headers["Set-Cookie"].startswith("__Host-payterm=; Path=/; Max-Age=0;")
    assert client.ask("GET", "/merchant", Cookie=cookie_of(left)).status == 401


@pytest.mark.parametrize("token", ["", "guess", "é", "\x00", "a" * 5000])
def test_a_wrong_token_opens_nothing(client: Client, token: str) -> None:
    refused = log_in(client, token)
    assert (refused.status, refused.headers["Set-Cookie"]) == (401, None)
    assert "not the operator’s token" in read(refused.body).text


@pytest.mark.parametrize("form", [b"", b"token", b"&" * 100, b"token=%ff%fe", b"\xff", b"=&=&token=x&token=y"])
def test_what_is_no_form_opens_nothing(client: Client, form: bytes, host: Host) -> None:
    headers = {"Content_Type": "application/x-www-form-urlencoded"}
    assert client.ask("POST", "/merchant/login", form, **headers).status == 401
    twice = f"token={host.keys.operator_token}&token={host.keys.operator_token}".encode()
    assert client.ask("POST", "/merchant/login", twice, **headers).status == 401
    assert client.ask("POST", "/merchant/login", form, Content_Type="text/plain").problem() == "media-type"


def test_a_session_ends_and_cannot_be_made_up(client: Client, host: Host, place: Rig) -> None:
    cookie = cookie_of(log_in(client, host.keys.operator_token))
    name, _, value = cookie.partition("=")
    until, _, proof = value.partition(".")
    for wrong in (f"{int(until) + 1}.{proof}", f"{until}.{proof[:-1]}0", f"{until}.", ".", "", "é.é", "1" * 99, proof):
        if wrong != value:
            assert not merchant.is_session(host.keys.operator_token, f"{name}={wrong}", 0)
    assert merchant.is_session(host.keys.operator_token, cookie, int(until) - 1)
    assert not merchant.is_session(host.keys.operator_token, cookie, int(until))
    assert not merchant.is_session("another host's token", cookie, 0)
    place.now_ms += 12 * 3_600_000
    assert client.ask("GET", "/merchant", Cookie=cookie).status == 401


@given(cookies=st.text(max_size=60))
def test_arbitrary_cookies_are_no_session(cookies: str) -> None:
    assert not merchant.is_session("token", cookies, 0)
    assert not merchant.is_session("token", f"{merchant.COOKIE}={cookies}", 0)


def test_the_browser_is_told_to_run_and_load_nothing(client: Client, host: Host) -> None:
    cookie = cookie_of(log_in(client, host.keys.operator_token))
    for response in (client.ask("GET", "/merchant"), client.ask("GET", "/merchant", Cookie=cookie)):
        page = response.body.decode()
        policy = response.headers["Content-Security-Policy"]
        style = page.partition("<style>")[2].partition("</style>")[0]
        assert f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'" in policy
        assert policy.startswith("default-src 'none';")
        assert "script" not in policy
        assert "unsafe" not in policy
        assert (response.headers["X-Content-Type-Options"], response.headers["Cache-Control"]) == (
            "nosniff",
            "no-store",
        )
        seen = read(response.body)
        assert not seen.elements & {"script", "img", "iframe", "object", "base"}
        assert not {name for name in seen.attributes if name.startswith("on") or name == "style"}
        assert all(link == "data:," or link.startswith("/merchant") for link in seen.links)


# What it shows


def seen_by(client: Client, host: Host, path: str = "/merchant") -> Reader:
    cookie = cookie_of(log_in(client, host.keys.operator_token))
    response = client.ask("GET", path, Cookie=cookie)
    assert response.status == 200
    return read(response.body)


def test_a_day_of_business_is_shown(client: Client, host: Host, sender: Sender) -> None:
    assert "Nothing has come yet." in seen_by(client, host).text
    sale = sender.sale(123_450)
    for payload in (sale, sender.refund(sale, 500), sender.sale(1251), sender.checkpoint(212)):
        deliver(host, sender, payload)
    yen = sender.sale(5000, record=sender.record(5000, currency="0392"), currency="JPY")
    deliver(host, sender, yen)
    deliver(host, sender, sender.advice(sale, "refused"))
    host.set_configuration("2024-06-13.2")
    text = seen_by(client, host).text
    for shown in (
        "1 234.50 EUR",
        "refund −5.00 EUR",
        "declined insufficient funds",
        "booked card refused",
        "5 000 JPY",
        "1 229.50 EUR 1 sale, 1 refund",
        "Thursday, 2024-06-13",
        "T-0001 #1",
        "record 212 of epoch 3",
        "Configuration wanted: 2024-06-13.2",
        "admitted",
    ):
        assert shown in text, shown
    assert "Forks" not in text
    assert "Gaps" not in text


def test_what_wants_a_person_comes_first(client: Client, host: Host, sender: Sender) -> None:
    deliver(host, sender, sender.sale())
    sender.number += 3
    deliver(host, sender, sender.checkpoint(30))
    fork = sender.checkpoint(20)
    with pytest.raises(Refused):
        host.countersign(fork["checkpoint"], sender.sign(fork))
    host.revoke("T-0001")
    text = seen_by(client, host).text
    assert "T-0001, epoch 3: 2 to 4" in text
    assert "had come to record 30 before, and is now at 20" in text
    assert "revoked" in text
    assert text.index("Forks") < text.index("Gaps") < text.index("Sales Received")


def test_sales_are_paged_newest_first(client: Client, host: Host, sender: Sender) -> None:
    count = 2 * merchant.SALES_ON_A_PAGE + 1
    for _ in range(count):
        deliver(host, sender, sender.reversal(sender.sale(1250)))  # the cheapest thing to book
    found, path, sizes = [], "/merchant", []
    while path:
        seen = seen_by(client, host, path)
        numbers = [int(each) for each in re.findall(r"T-0001 #(\d+)", seen.text)]
        found += numbers
        sizes.append(len(numbers))
        path = next((link for link in seen.links if "before=" in link), "")
    assert sizes == [merchant.SALES_ON_A_PAGE, merchant.SALES_ON_A_PAGE, 1]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == count


@pytest.mark.parametrize(
    "query", ["before=", "before=x", "before=-1", "before=1&before=2", "x=1", "before=" + "9" * 19]
)
def test_a_query_is_read_strictly(client: Client, query: str) -> None:
    assert client.ask("GET", f"/merchant?{query}").problem() == "query"


# Nothing becomes more than text


HOSTILE = '"><script>alert(1)</script><a href=javascript:x onclick="y">&amp;\'</style>'
hostile = st.just(HOSTILE) | st.text(max_size=30)
times = st.integers(-(2**63), 2**63)


def strange(text: str, number: int, time_ms: int) -> merchant.Overview:
    """A page in which everything that could be chosen by somebody else is this."""
    booking = Booking(
        transaction=text, terminal=text, merchant=text, amount=number, currency=text, state=State.DECLINED,
        decision="declined", reason=text, authorisation_code=text, rrn=text, card_ref=text, last4=text,
        first_received_ms=time_ms, sequence=number, kind="refund", of=text,
    )  # fmt: skip
    fork = Fork(text, text, number, number, number, text, time_ms)
    return merchant.Overview(
        now_ms=time_ms,
        configuration=text,
        sales=[dataclasses.replace(booking, state=state) for state in State],
        older=7,
        newest=True,
        totals=[DayTotal(date(2024, 6, 13), text, 1, 2, number)],
        terminals=[TerminalSummary(text, text, time_ms, number, number, time_ms, time_ms)],
        checkpoints=[],
        gaps=[Gap(text, number, number, number + 1)] * 60,
        forks=[fork] * 60,
    )


def shape(page: bytes) -> tuple[set[str], set[str], int]:
    seen = read(page)
    return seen.elements, seen.attributes, len(seen.links)


@given(text=hostile, number=st.integers(-(2**53), 2**53), time_ms=times)
def test_whatever_is_shown_stays_text(text: str, number: int, time_ms: int) -> None:
    plain = shape(merchant.page(strange("plain", number, time_ms)))
    assert shape(merchant.page(strange(text or "x", number, time_ms))) == plain


def test_control_what_is_not_escaped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = shape(merchant.page(strange("plain", 1, 1)))
    monkeypatch.setattr(merchant, "escape", lambda text: text)
    with pytest.raises(AssertionError):
        assert shape(merchant.page(strange(HOSTILE, 1, 1))) == plain

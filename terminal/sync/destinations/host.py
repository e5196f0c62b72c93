"""The operator's host, over HTTPS (docs/formats.md, Transport).

One attempt is one PUT over one kept connection, in the bounds that `wire` keeps: its time as a whole, the size of the
answer, and whether a byte of it has left. urllib3 is used without requests around it, since of a backlog's processor
time requests would take the larger half. Whether an answer is true is left to the terminal, which holds the host's key;
here it only has to look like one.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

from urllib3.connectionpool import HTTPSConnectionPool
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse
from urllib3.util import Timeout

from terminal.sync.destinations import Answered, Busy, NotSent, Parcel, Refused, Result, Unsure
from terminal.sync.destinations.wire import IDLE_MAX_MS, Exchange, explain, open_pool, read_bounded, retry_after_ms
from terminal.sync.errors import Unsendable

ANSWER_BYTES_MAX: Final = 12_288  # what the journal has room for beside an ANSWER record

_JWS = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", re.ASCII)
# Answers about this very item. All other 4xx are about who asks, where or when: there a wrong setting must not
# condemn the whole queue.
_PERMANENT: Final = {
    400: "says that the item is malformed",
    409: "already holds something that contradicts the item",
    413: "says that the item is too large",
    422: "says that the item is invalid",
}
_LATER: Final = {425: "waits for what comes before this", 429: "is busy"}
# A host that does not know these still takes sales: nothing else must wait behind one.
_STATUS: Final = "status"  # of this terminal, and no item
_OPTIONAL: Final = frozenset({"advice", "batch", "certificate", "checkpoint", "reconciliation", _STATUS})
_UNKNOWN: Final = frozenset({404, 405})
_REMEDIES: Final = {
    401: "it wants a client certificate: set [host] enrol or client_certificate",
    403: "it does not admit this terminal: have the client certificate registered there",
    404: "it does not know the address: check [host] url",
}
_REDIRECT: Final = "redirects are not followed, set the new address in [host] url"


@dataclass(frozen=True, slots=True)
class HostSettings:
    """How to reach the host. `ca_file` None means the public authorities that come with requests."""

    base_url: str
    ca_file: Path | None = None
    client_certificate: Path | None = None  # PEM; holds the key, too, unless `client_key` does
    client_key: Path | None = None
    enrolled: Path | None = None  # a client certificate that comes, and changes, by itself (`registrar`)
    connect_timeout_ms: int = 4_000
    read_timeout_ms: int = 10_000  # between two pieces of the answer
    total_timeout_ms: int = 15_000  # the terminal takes sync for gone after 20 s of silence


class HostDestination:
    """Implements `Destination`. Not thread-safe."""

    def __init__(self, settings: HostSettings, *, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        """Raises `Unsendable` for settings that cannot work."""
        parts = urlsplit(settings.base_url)
        if parts.scheme != "https" or not parts.hostname or parts.username or parts.query or parts.fragment:
            raise Unsendable(
                "[host] url is no plain https address: nothing is sent, everything stays stored. Write https://host/path"
            )
        self._total_timeout_ms = settings.total_timeout_ms
        self._timeout = Timeout(connect=settings.connect_timeout_ms / 1000, read=settings.read_timeout_ms / 1000)
        self._base_path = quote(parts.path.rstrip("/"), safe="/%")
        self._who = f"the host {parts.hostname}"
        self._monotonic_s = monotonic_s
        self._exchange = Exchange(monotonic_s)
        self._used_s = -math.inf
        self._settings = settings
        self._host, self._port = parts.hostname, parts.port
        self._shown = self._certificate()
        self._pool = self._opened()

    @property
    def name(self) -> str:
        return "host"

    @property
    def repeat_safe_ms(self) -> None:
        """For ever: the host books once per transaction and event, whatever the key."""

    def send(self, parcel: Parcel) -> Result:
        return self._exchanged(lambda: self._put(parcel), parcel.event)

    def standing(self, terminal: str) -> Result:
        """What the host says of this terminal: a signed text, which the terminal is to verify."""
        return self._exchanged(lambda: self._get(f"/v1/terminals/{quote(terminal, safe='')}"), _STATUS)

    def _exchanged(self, request: Callable[[], BaseHTTPResponse], event: str) -> Result:
        shown = self._certificate()
        long_idle = self._monotonic_s() - self._used_s > IDLE_MAX_MS / 1000 and self._used_s > -math.inf
        if long_idle or shown != self._shown:
            self._pool.close()
            self._shown = shown
            self._pool = self._opened()
        self._exchange.begin(self._total_timeout_ms)
        try:
            with contextlib.closing(request()) as response:
                result = self._result(response, event)
        except (HTTPError, OSError) as error:
            begun = self._exchange.begun
            message = explain(error, who=self._who, section="host", begun=begun)
            result = Unsure(message) if begun else NotSent(message)
        self._used_s = self._monotonic_s()
        return result

    def look_up(self, parcel: Parcel, *, first_attempt_ms: int | None) -> None:
        """Never needed: see `repeat_safe_ms`."""

    def close(self) -> None:
        self._pool.close()

    def _opened(self) -> HTTPSConnectionPool:
        """Raises `Unsendable`."""
        if self._shown is not None:
            try:
                return self._opened_with(self._settings.enrolled)
            except Unsendable:
                pass  # damaged: without one the host says what it wants, and the next one comes by itself
        return self._opened_with(self._settings.client_certificate)

    def _opened_with(self, client_certificate: Path | None) -> HTTPSConnectionPool:
        """Raises `Unsendable`."""
        return open_pool(
            self._exchange,
            self._host,
            self._port,
            section="host",
            ca_file=self._settings.ca_file,
            client_certificate=client_certificate,
            client_key=self._settings.client_key,
        )

    def _certificate(self) -> tuple[int, int] | None:
        """Which file holds the client certificate that came by itself; None without one."""
        if self._settings.enrolled is None:
            return None
        try:
            status = self._settings.enrolled.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _get(self, path: str) -> BaseHTTPResponse:
        return self._pool.urlopen(
            "GET",
            f"{self._base_path}{path}",
            headers={"Accept": "application/jose", "Accept-Encoding": "identity", "User-Agent": "payterm"},
            timeout=self._timeout,
            redirect=False,
            preload_content=False,
            decode_content=False,
        )

    def _put(self, parcel: Parcel) -> BaseHTTPResponse:
        return self._pool.urlopen(
            "PUT",
            f"{self._base_path}{_path(parcel)}",
            body=parcel.body.encode(),
            headers={
                "Content-Type": "application/jose",
                "Accept": "application/jose",
                "Accept-Encoding": "identity",  # a compressed answer could grow without bound
                "Idempotency-Key": parcel.idempotency_key,
                "User-Agent": "payterm",
            },
            timeout=self._timeout,
            redirect=False,
            preload_content=False,
            decode_content=False,
        )

    def _result(self, response: BaseHTTPResponse, event: str) -> Result:
        status = response.status
        if status == 200:
            return self._answer(response)
        if status in _LATER:
            return Busy(
                f"{self._who} {_LATER[status]} ({status}): sent again later",
                retry_after_ms(response.headers.get("Retry-After")),
            )
        if status in _PERMANENT:
            return Refused(f"{self._who} {_PERMANENT[status]} ({status}): kept for a person", permanent=True)
        if status in _UNKNOWN and event in _OPTIONAL:
            return Refused(f"{self._who} takes no {event} ({status}): ask its operator", permanent=True)
        if 300 <= status < 500:
            remedy = _REDIRECT if status < 400 else _REMEDIES.get(status, "ask its operator")
            return Refused(f"{self._who} takes nothing ({status}): {remedy}. Everything stays stored", permanent=False)
        what = "has a fault" if status >= 500 else "gave no decision"
        return Unsure(
            f"{self._who} {what} ({status}): sent again later", retry_after_ms(response.headers.get("Retry-After"))
        )

    def _answer(self, response: BaseHTTPResponse) -> Result:
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/jose":
            return Unsure(
                f"something answered for {self._who} that is no payment host (content type is not application/jose): "
                "is there a log-in page in the way?"
            )
        raw = read_bounded(response, ANSWER_BYTES_MAX)
        if raw is None:
            return Unsure(f"the answer of {self._who} is too long to be one: sent again later")
        text = raw.decode("latin-1").strip()
        if _JWS.fullmatch(text) is None:
            return Unsure(f"the answer of {self._who} is garbled: sent again later")
        return Answered(text)


_OF_NO_TRANSACTION: Final = {
    "batch": "batches",
    "certificate": "certificates",
    "checkpoint": "checkpoints",
    "reconciliation": "reconciliations",
}


def _path(parcel: Parcel) -> str:
    if (collection := _OF_NO_TRANSACTION.get(parcel.event)) is not None:
        return f"/v1/{collection}/{parcel.transaction}"
    return f"/v1/transactions/{parcel.transaction}/{quote(parcel.event, safe='')}"

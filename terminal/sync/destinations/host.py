"""The operator's host, over HTTPS (docs/formats.md, Transport).

One attempt is one PUT. It ends in bounded time, whatever the other side does: connecting, every read and the whole
exchange have limits, and so has the size of the answer. Whether an item may have been received is not guessed from
the kind of error but observed: the TLS socket notes when the first byte of a request is handed to it. Whether an
answer is true is left to the terminal, which holds the host's key; here it only has to look like one.
"""

from __future__ import annotations

import contextlib
import errno
import math
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

from terminal.sync.destinations import Answered, Busy, NotSent, Parcel, Refused, Result, Unsure
from terminal.sync.errors import Unsendable

if TYPE_CHECKING:
    from typing_extensions import Buffer

ANSWER_BYTES_MAX: Final = 12_288  # what the journal has room for beside an ANSWER record
_PART_BYTES: Final = 4_096  # most answers are one part
RETRY_AFTER_MAX_MS: Final = 3_600_000  # a host in need asks for minutes; a slip must not stop a shop for a year
IDLE_MAX_MS: Final = 30_000  # routers forget idle connections after some minutes: the next sale would hang on one
_CAUSES_MAX: Final = 16  # requests, urllib3, ssl and socket wrap an error four or five times

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
_OPTIONAL: Final = frozenset({"checkpoint", "reconciliation"})
_UNKNOWN: Final = frozenset({404, 405})
_REMEDIES: Final = {
    401: "it wants a client certificate: set [host] client_certificate",
    403: "it does not admit this terminal: have the client certificate registered there",
    404: "it does not know the address: check [host] url",
}
_REDIRECT: Final = "redirects are not followed, set the new address in [host] url"
_X509_NOT_YET_VALID: Final = 9  # these: x509_vfy.h of OpenSSL
_X509_EXPIRED: Final = 10
_X509_WRONG_NAME: Final = frozenset({62, 64})  # host name, IP address


@dataclass(frozen=True, slots=True)
class HostSettings:
    """How to reach the host. `ca_file` None means the public authorities that come with requests."""

    base_url: str
    ca_file: Path | None = None
    client_certificate: Path | None = None  # PEM; holds the key, too, unless `client_key` does
    client_key: Path | None = None
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
        self._settings = settings
        self._base_url = settings.base_url.rstrip("/")
        self._who = f"the host {parts.hostname}"
        self._monotonic_s = monotonic_s
        self._exchange = _Exchange(monotonic_s)
        self._used_s = -math.inf
        self._session = self._open_session()

    @property
    def name(self) -> str:
        return "host"

    @property
    def repeat_safe_ms(self) -> None:
        """For ever: the host books once per transaction and event, whatever the key."""

    def send(self, parcel: Parcel) -> Result:
        if self._monotonic_s() - self._used_s > IDLE_MAX_MS / 1000:
            self._session.close()
        self._exchange.begin(self._settings.total_timeout_ms)
        try:
            with contextlib.closing(self._put(parcel)) as response:
                result = self._result(response, parcel)
        except (requests.RequestException, HTTPError, OSError) as error:
            message = self._explain(error)
            result = Unsure(message) if self._exchange.begun else NotSent(message)
        self._used_s = self._monotonic_s()
        return result

    def look_up(self, parcel: Parcel, *, first_attempt_ms: int | None) -> None:
        """Never needed: see `repeat_safe_ms`."""

    def close(self) -> None:
        self._session.close()

    def _open_session(self) -> requests.Session:
        settings = self._settings
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and name
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.sslsocket_class = _socket_class(self._exchange)
        try:
            if settings.ca_file is not None:
                context.load_verify_locations(settings.ca_file)
            if settings.client_certificate is not None:
                context.load_cert_chain(settings.client_certificate, settings.client_key)
        except OSError as error:  # ssl.SSLError is one
            raise Unsendable(
                f"a certificate or key file of [host] cannot be read ({error.strerror or 'not PEM'}): nothing is sent, "
                "everything stays stored. Check ca and client_certificate"
            ) from error
        session = requests.Session()
        session.trust_env = False  # no proxies, no .netrc, no CA bundle from the environment
        session.verify = True if settings.ca_file is None else str(settings.ca_file)
        session.mount("https://", _Adapter(context))
        return session

    def _put(self, parcel: Parcel) -> requests.Response:
        return self._session.put(
            f"{self._base_url}{_path(parcel)}",
            data=parcel.body.encode(),
            headers={
                "Content-Type": "application/jose",
                "Accept": "application/jose",
                "Accept-Encoding": "identity",  # a compressed answer could grow without bound
                "Idempotency-Key": parcel.idempotency_key,
                "User-Agent": "payterm",
            },
            timeout=(self._settings.connect_timeout_ms / 1000, self._settings.read_timeout_ms / 1000),
            allow_redirects=False,
            stream=True,
        )

    def _result(self, response: requests.Response, parcel: Parcel) -> Result:
        status = response.status_code
        if status == 200:
            return self._answer(response)
        if status in _LATER:
            return Busy(f"{self._who} {_LATER[status]} ({status}): sent again later", _retry_after_ms(response))
        if status in _PERMANENT:
            return Refused(f"{self._who} {_PERMANENT[status]} ({status}): kept for a person", permanent=True)
        if status in _UNKNOWN and parcel.event in _OPTIONAL:
            return Refused(f"{self._who} takes no {parcel.event} ({status}): ask its operator", permanent=True)
        if 300 <= status < 500:
            remedy = _REDIRECT if status < 400 else _REMEDIES.get(status, "ask its operator")
            return Refused(f"{self._who} takes nothing ({status}): {remedy}. Everything stays stored", permanent=False)
        what = "has a fault" if status >= 500 else "gave no decision"
        return Unsure(f"{self._who} {what} ({status}): sent again later", _retry_after_ms(response))

    def _answer(self, response: requests.Response) -> Result:
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/jose":
            return Unsure(
                f"something answered for {self._who} that is no payment host (content type is not application/jose): "
                "is there a log-in page in the way?"
            )
        raw = bytearray()
        # To the very end: only there urllib3 says that something is missing.
        while len(raw) <= ANSWER_BYTES_MAX and (part := response.raw.read(_PART_BYTES, decode_content=False)):
            raw += part
        if len(raw) > ANSWER_BYTES_MAX:
            return Unsure(f"the answer of {self._who} is too long to be one: sent again later")
        text = raw.decode("latin-1").strip()
        if _JWS.fullmatch(text) is None:
            return Unsure(f"the answer of {self._who} is garbled: sent again later")
        return Answered(text)

    def _explain(self, error: BaseException) -> str:
        """What to tell people. Only the kind of an error is used, never its text, which may quote the other side."""
        causes = tuple(_causes(error))
        for cause in causes:
            if (message := self._explain_cause(cause)) is not None:
                return message
        late = any(isinstance(cause, TimeoutError | requests.Timeout) for cause in causes)
        if self._exchange.begun:
            what = "does not answer in time" if late else "broke off before its answer was whole"
            return f"{self._who} {what}: sent again later"
        if late:
            return f"{self._who} cannot be reached in time: is the network slow or blocked?"
        if any(isinstance(cause, ssl.SSLError) for cause in causes):
            return f"no secure connection (TLS) to {self._who}: it may want a client certificate or a newer protocol"
        return f"{self._who} cannot be reached: the connection broke off"

    def _explain_cause(self, cause: BaseException) -> str | None:
        match cause:
            case ssl.SSLCertVerificationError(verify_code=code):
                return self._explain_certificate(code)
            case socket.gaierror():
                return f"the name of {self._who} is not found (DNS): is there a network?"
            case ConnectionRefusedError():
                return f"{self._who} is down: it refuses connections"
            case OSError(errno=errno.ENETUNREACH | errno.EHOSTUNREACH | errno.ENETDOWN):
                return f"there is no network to {self._who}: check cable, Wi-Fi or modem"
            case _:
                return None

    def _explain_certificate(self, code: int) -> str:
        if code == _X509_EXPIRED:
            return f"the certificate of {self._who} has expired, or this clock is wrong: check the date first"
        if code == _X509_NOT_YET_VALID:
            return f"the certificate of {self._who} is not valid yet: this clock is behind, wait for the network time"
        if code in _X509_WRONG_NAME:
            return f"the certificate of {self._who} is for another name: check [host] url"
        return f"the certificate of {self._who} is not trusted: check [host] ca. Nothing was sent"


_OF_NO_TRANSACTION: Final = {"checkpoint": "checkpoints", "reconciliation": "reconciliations"}


def _path(parcel: Parcel) -> str:
    if (collection := _OF_NO_TRANSACTION.get(parcel.event)) is not None:
        return f"/v1/{collection}/{parcel.transaction}"
    return f"/v1/transactions/{parcel.transaction}/{quote(parcel.event, safe='')}"


class _Exchange:
    """The deadline of the attempt under way, and whether any byte of its request has been handed to the network."""

    def __init__(self, monotonic_s: Callable[[], float]) -> None:
        self._monotonic_s = monotonic_s
        self._deadline_s = -math.inf
        self.begun = False

    def begin(self, timeout_ms: int) -> None:
        self._deadline_s = self._monotonic_s() + timeout_ms / 1000
        self.begun = False

    def left_s(self) -> float:
        left_s = self._deadline_s - self._monotonic_s()
        if left_s <= 0:
            raise TimeoutError("the exchange as a whole took too long")
        return left_s


def _socket_class(exchange: _Exchange) -> type[ssl.SSLSocket]:
    """TLS sockets that keep to the exchange's deadline: a time-out per read alone lets a slow drip last for ever."""

    class DeadlineSocket(ssl.SSLSocket):
        def send(self, data: Buffer, flags: int = 0) -> int:
            self._limit()
            exchange.begun = True
            return super().send(data, flags)

        def recv_into(self, buffer: Buffer, nbytes: int | None = None, flags: int = 0) -> int:
            self._limit()
            return super().recv_into(buffer, nbytes, flags)

        def _limit(self) -> None:
            left_s, timeout_s = exchange.left_s(), self.gettimeout()
            if timeout_s is None or timeout_s > left_s:
                self.settimeout(left_s)

    return DeadlineSocket


class _Adapter(HTTPAdapter):
    """Connects with our TLS context; makes no second attempt of its own."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__(pool_connections=1, pool_maxsize=1, max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, outermost first."""
    cause: BaseException | None = error
    for _ in range(_CAUSES_MAX):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or cause.__context__


def _retry_after_ms(response: requests.Response) -> int | None:
    """Retry-After in seconds (RFC 9110, 10.2.3); the form with a date is not used, for our clock may be wrong."""
    text = response.headers.get("Retry-After", "")
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        return None
    return min(int(text) * 1000, RETRY_AFTER_MAX_MS)

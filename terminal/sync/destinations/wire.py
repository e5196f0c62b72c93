"""What every destination over HTTPS needs: a session that ends in bounded time and notes what it has let go.

Whether an item may have been received is not guessed from the kind of an error but observed: the TLS socket notes when
the first byte of a request is handed to it. Connecting, every read, the whole exchange and the answer's size have
limits; looking up a name has the resolver's own (resolv.conf). A session belongs to one destination instance, and so to
one thread: threads share neither sockets nor deadlines. What an answer means is left to the destinations.
"""

from __future__ import annotations

import errno
import math
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from certifi import where as public_authorities
from urllib3.connection import HTTPSConnection
from urllib3.connectionpool import HTTPSConnectionPool
from urllib3.exceptions import TimeoutError as HTTPTimeout
from urllib3.response import BaseHTTPResponse

from terminal.sync.errors import Unsendable

if TYPE_CHECKING:
    from typing_extensions import Buffer

RETRY_AFTER_MAX_MS: Final = 3_600_000  # a host in need asks for minutes; a slip must not stop a shop for a year
IDLE_MAX_MS: Final = 30_000  # routers forget idle connections after some minutes: the next sale would hang on one
_PART_BYTES: Final = 4_096  # most answers are one part
_CAUSES_MAX: Final = 16  # requests, urllib3, ssl and socket wrap an error four or five times
_X509_NOT_YET_VALID: Final = 9  # these: x509_vfy.h of OpenSSL
_X509_EXPIRED: Final = 10
_X509_WRONG_NAME: Final = frozenset({62, 64})  # host name, IP address


class Exchange:
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


def open_pool(
    exchange: Exchange,
    host: str,
    port: int | None,
    *,
    section: str,
    ca_file: Path | None,
    client_certificate: Path | None = None,
    client_key: Path | None = None,
) -> HTTPSConnectionPool:
    """One kept connection to one host, with urllib3 alone: requests around it would be three times the work.

    `ca_file` None means the public authorities that come with requests. Raises `Unsendable`.
    """
    context = context_of(exchange, section, ca_file or Path(public_authorities()), client_certificate, client_key)
    return pool_class(exchange)(host, port, maxsize=1, ssl_context=context, retries=False)


def read_bounded(response: BaseHTTPResponse, bytes_max: int) -> bytes | None:
    """The body of an open response to its very end, where urllib3 says if something is missing. None: too long."""
    raw = bytearray()
    while len(raw) <= bytes_max and (part := response.read(_PART_BYTES, decode_content=False)):
        raw += part
    return None if len(raw) > bytes_max else bytes(raw)


def retry_after_ms(text: str | None) -> int | None:
    """Retry-After in seconds (RFC 9110, 10.2.3); the form with a date is not used, for our clock may be wrong."""
    if text is None or not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        return None
    return min(int(text) * 1000, RETRY_AFTER_MAX_MS)


def explain(error: BaseException, *, who: str, section: str, begun: bool) -> str:
    """What to tell people. Only the kind of an error is used, never its text, which may quote the other side."""
    causes = tuple(_causes(error))
    for cause in causes:
        if (message := _explain_cause(cause, who, section)) is not None:
            return message
    late = any(isinstance(cause, TimeoutError | HTTPTimeout) for cause in causes)
    if begun:
        what = "does not answer in time" if late else "broke off before its answer was whole"
        return f"{who} {what}: sent again later"
    if late:
        return f"{who} cannot be reached in time: is the network slow or blocked?"
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return f"no secure connection (TLS) to {who}: it may want a client certificate or a newer protocol"
    return f"{who} cannot be reached: the connection broke off"


def context_of(
    exchange: Exchange, section: str, ca_file: Path | None, client_certificate: Path | None, client_key: Path | None
) -> ssl.SSLContext:
    """TLS 1.2 or later, certificate and name checked, within the exchange's deadline. Raises `Unsendable`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = _socket_class(exchange)
    try:
        if ca_file is not None:
            context.load_verify_locations(ca_file)
        if client_certificate is not None:
            context.load_cert_chain(client_certificate, client_key)
    except OSError as error:  # ssl.SSLError is one
        raise Unsendable(
            f"a certificate or key file of [{section}] cannot be read ({error.strerror or 'not PEM'}): "
            "nothing is sent, everything stays stored. Check the files that it names"
        ) from error
    return context


def _explain_cause(cause: BaseException, who: str, section: str) -> str | None:
    match cause:
        case ssl.SSLCertVerificationError(verify_code=code):
            return _explain_certificate(code, who, section)
        case socket.gaierror():
            return f"the name of {who} is not found (DNS): is there a network?"
        case ConnectionRefusedError():
            return f"{who} is down: it refuses connections"
        case OSError(errno=errno.ENETUNREACH | errno.EHOSTUNREACH | errno.ENETDOWN):
            return f"there is no network to {who}: check cable, Wi-Fi or modem"
        case _:
            return None


def _explain_certificate(code: int, who: str, section: str) -> str:
    if code == _X509_EXPIRED:
        return f"the certificate of {who} has expired, or this clock is wrong: check the date first"
    if code == _X509_NOT_YET_VALID:
        return f"the certificate of {who} is not valid yet: this clock is behind, wait for the network time"
    if code in _X509_WRONG_NAME:
        return f"the certificate of {who} is for another name: check [{section}] url"
    return f"the certificate of {who} is not trusted: check [{section}] ca. Nothing was sent"


def _socket_class(exchange: Exchange) -> type[ssl.SSLSocket]:
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


def pool_class(exchange: Exchange) -> type[HTTPSConnectionPool]:
    """Connections that keep to the exchange's deadline: a name may have many addresses, and each takes its time-out."""

    class DeadlineConnection(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            addresses = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            limit_s = self.timeout if isinstance(self.timeout, int | float) else math.inf
            for number, (family, kind, protocol, _, address) in enumerate(addresses, start=1):
                connecting = socket.socket(family, kind, protocol)
                try:
                    connecting.settimeout(min(limit_s, exchange.left_s()))
                    connecting.connect(address)
                    for option in self.socket_options or ():
                        connecting.setsockopt(*option)
                except OSError:
                    connecting.close()
                    if number == len(addresses):
                        raise
                else:
                    return connecting
            raise OSError(errno.EHOSTUNREACH, "the name has no address")

    class DeadlinePool(HTTPSConnectionPool):
        ConnectionCls = DeadlineConnection

    return DeadlinePool


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, outermost first."""
    cause: BaseException | None = error
    for _ in range(_CAUSES_MAX):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or cause.__context__

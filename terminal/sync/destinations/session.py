"""A session of requests, which Stripe's library wants, in the bounds that `wire` keeps.

Apart from `wire`, so that a terminal that sends to its host alone does not carry the library.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from terminal.sync.destinations.wire import Exchange, context_of, pool_class


def open_session(
    exchange: Exchange,
    *,
    section: str,
    ca_file: Path | None,
    client_certificate: Path | None = None,
    client_key: Path | None = None,
) -> requests.Session:
    """A session that speaks TLS 1.2 or later and nothing else. Raises `Unsendable` for files that cannot be used."""
    context = context_of(exchange, section, ca_file, client_certificate, client_key)
    session = requests.Session()
    session.trust_env = False  # no proxies, no .netrc, no CA bundle from the environment
    session.verify = True if ca_file is None else str(ca_file)
    session.adapters.clear()  # nothing is ever sent in clear
    session.mount("https://", _Adapter(context, exchange))
    return session


class _Adapter(HTTPAdapter):
    """Connects with our TLS context and within the deadline; makes no second attempt of its own."""

    def __init__(self, context: ssl.SSLContext, exchange: Exchange) -> None:
        self._context = context
        self._pool_class = pool_class(exchange)
        super().__init__(pool_connections=1, pool_maxsize=1, max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"https": self._pool_class}

"""The sync service put together: settings from the configuration, the terminal at the far end of the local socket."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

import msgspec

from terminal import notify
from terminal.clock import Clock, Entropy
from terminal.config import Config, credentials
from terminal.control import CallRefused, ControlClient
from terminal.ledger.keys import SPOOL_KEY, KeyStore
from terminal.sync.destinations.host import HostSettings
from terminal.sync.errors import AnswerRejected
from terminal.sync.journal import Head
from terminal.sync.loop import SyncSettings
from terminal.sync.loop import run as run_loop
from terminal.sync.spool import OutboxItem
from terminal.sync.step import Backoff, LinkReport, Offer, Seen

_REJECTED: Final = "answer_rejected"


class SocketTerminal:
    """Implements `Terminal` by calls on the local socket. Not thread-safe."""

    def __init__(self, client: ControlClient) -> None:
        self._client = client

    def fetch(self, max: int, wait_ms: int) -> Offer:
        found = self._client.call("outbox.fetch", {"wait_ms": wait_ms, "max": max})
        items = [
            OutboxItem(
                key=item["key"],
                transaction=UUID(item["transaction"]),
                event=item["event"],
                number=item["number"],
                urgent=item["urgent"],
                envelope=item["envelope"],
            )
            for item in found["items"]
        ]
        return Offer(items, _head(found.get("head")))

    def stored(self, keys: Sequence[str]) -> None:
        self._client.call("outbox.stored", {"keys": list(keys)})

    def deliver(self, key: str, answer: str) -> None:
        try:
            self._client.call("answer.deliver", {"key": key, "answer": answer})
        except CallRefused as refused:
            if refused.code == _REJECTED:
                raise AnswerRejected(str(refused)) from refused
            raise

    def report(self, report: LinkReport) -> Seen:
        seen = self._client.call(
            "link.report",
            {
                "online": report.online,
                "error": report.error,
                "queued": report.queued,
                "held": report.held,
                "oldest_ms": report.oldest_ms,
                "history": report.history.value,
                "head": msgspec.to_builtins(report.head),
                "terminal_head": msgspec.to_builtins(report.terminal_head),
            },
        )
        return Seen(_head(seen.get("sync_head")), seen.get("differs", False))


def _head(said: Any) -> Head | None:
    """None from a terminal that does not say: it is served all the same."""
    return msgspec.convert(said, Head | None)


def run(config: Config, *, clock: Clock, entropy: Entropy, stop: threading.Event) -> None:
    """Serve until `stop`. Raises `KeyUnavailable`, `SpoolUnavailable`, `Unsendable`."""
    host = config.host
    settings = SyncSettings(
        state_directory=config.sync.directory,
        spool_key=KeyStore(credentials(config.sync.keys)).secret(SPOOL_KEY),
        host=HostSettings(
            base_url=host.url,
            ca_file=host.ca,
            client_certificate=host.client_certificate,
            connect_timeout_ms=host.connect_timeout_ms,
            read_timeout_ms=host.read_timeout_ms,
        ),
        backoff=Backoff(first_ms=config.sync.backoff_min_ms, ceiling_ms=config.sync.backoff_max_ms),
    )
    terminal = SocketTerminal(ControlClient(config.socket.path))
    # Ready is said with the first sign of life, when the spool is open: a locked or damaged one must not look started.
    run_loop(settings, terminal, clock=clock, entropy=entropy, stop=stop, alive=_FirstReady().alive)
    notify.stopping()


class _FirstReady:
    """Tells systemd "ready" once, then that the loop comes round."""

    def __init__(self) -> None:
        self._tell = notify.ready

    def alive(self) -> None:
        self._tell()
        self._tell = notify.alive

"""The sync service put together: settings from the configuration, the terminal at the far end of the local socket."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import msgspec

from terminal import notify
from terminal.clock import Clock, Entropy
from terminal.config import Config, credentials
from terminal.control import Call, ControlClient
from terminal.ledger.keys import SPOOL_KEY, KeyStore
from terminal.sync.destinations.host import HostDestination, HostSettings
from terminal.sync.journal import Head
from terminal.sync.loop import Place, SyncSettings
from terminal.sync.loop import run as run_loop
from terminal.sync.queue import Queue
from terminal.sync.registrar import CERTIFICATE_NAME
from terminal.sync.schedule import Mode, Schedule, Window
from terminal.sync.spool import Follower, OutboxItem, Spool
from terminal.sync.step import Backoff, Delivered, LinkReport, Offer, Seen

if TYPE_CHECKING:
    from terminal.sync.destinations.stripe import StripeDestination

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
                after=None if item.get("after") is None else UUID(item["after"]),
                amount_minor=item.get("amount"),
                currency=item.get("currency"),
            )
            for item in found["items"]
        ]
        return Offer(items, _head(found.get("head")))

    def stored(self, keys: Sequence[str]) -> None:
        self._client.call("outbox.stored", {"keys": list(keys)})

    def deliver(self, answers: Sequence[tuple[str, str]]) -> Sequence[Delivered]:
        said = self._client.call(
            "answers.deliver", {"answers": [{"key": key, "answer": each} for key, each in answers]}
        )
        return [_delivered(result) for result in said["results"]]

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


def _delivered(result: dict[str, Any]) -> Delivered:
    error = result.get("error")
    if error is None:
        return Delivered(result["key"], state=result["state"])
    return Delivered(result["key"], error=error["message"], believed=error["code"] != _REJECTED)


def run(config: Config, *, clock: Clock, entropy: Entropy, stop: threading.Event) -> None:
    """Serve until `stop`. Raises `KeyUnavailable`, `SpoolUnavailable`, `Unsendable`."""
    settings = SyncSettings(
        state_directory=config.sync.directory,
        spool_key=KeyStore(credentials(config.sync.keys)).secret(SPOOL_KEY),
        places=places(config),
        followers=followers(config),
        backoff=Backoff(first_ms=config.sync.backoff_min_ms, ceiling_ms=config.sync.backoff_max_ms),
        schedule=schedule(config),
        socket=config.sync.socket,
        ask=lambda: ControlClient(config.socket.path),
        terminal=config.terminal.id,
        reconcile_days=config.sync.reconcile_days or None,
        stripe=None if config.stripe is None else _stripe(config),
        office=partial(HostDestination, host_settings(config)),
        enrol=config.host.enrol,
    )

    def connect() -> SocketTerminal:
        return SocketTerminal(ControlClient(config.socket.path))

    # Ready is said with the first sign of life, when the spool is open: a locked or damaged one must not look started.
    run_loop(settings, connect, clock=clock, entropy=entropy, stop=stop, alive=_FirstReady().alive)
    notify.stopping()


@contextlib.contextmanager
def queue_at_rest(config: Config, clock: Clock, entropy: Entropy) -> Iterator[Mapping[str, Call]]:
    """The calls about single items, while no service runs. Raises `KeyUnavailable`, `SpoolUnavailable`."""
    key = KeyStore(credentials(config.sync.keys)).secret(SPOOL_KEY)
    spool = Spool(config.sync.directory, key, clock=clock, entropy=entropy, followers=followers(config))
    with contextlib.closing(spool):
        yield Queue(spool, clock).calls()


def places(config: Config) -> Sequence[Place]:
    """Where the configuration sends to, the host first. Raises `KeyUnavailable`, `Unsendable`."""
    found = [Place(partial(HostDestination, host_settings(config)), uploads=config.sync.uploads)]
    if config.stripe is not None:
        found.append(Place(_stripe(config), takes_envelopes=False, uploads=config.sync.uploads))
    return found


def host_settings(config: Config) -> HostSettings:
    """How to reach the host."""
    return HostSettings(
        base_url=config.host.url,
        ca_file=config.host.ca,
        client_certificate=config.host.client_certificate,
        enrolled=config.sync.directory / CERTIFICATE_NAME if config.host.enrol else None,
        connect_timeout_ms=config.host.connect_timeout_ms,
        read_timeout_ms=config.host.read_timeout_ms,
    )


def followers(config: Config) -> Sequence[Follower]:
    """Who is told what became of a sale. Stripe's library weighs 15 MB: it is loaded where it is used."""
    if config.stripe is None:
        return ()
    from terminal.sync.notices import StripeFollower  # noqa: PLC0415

    return (StripeFollower(),)


def schedule(config: Config) -> Schedule:
    sync = config.sync
    return Schedule(
        mode=Mode(sync.mode),
        interval_ms=sync.interval_minutes * 60_000,
        windows=tuple(Window.parse(text) for text in sync.windows),
        metered_count=sync.metered_count,
        metered_age_ms=sync.metered_minutes * 60_000,
    )


def _stripe(config: Config) -> Callable[[], StripeDestination]:
    from terminal.sync.destinations.stripe import ApiKey, StripeDestination, StripeSettings  # noqa: PLC0415

    section = config.stripe
    assert section is not None  # noqa: S101 - its caller has looked
    key = ApiKey.load(credentials(config.sync.keys), live=section.live)
    return partial(StripeDestination, StripeSettings(key=key, base_url=section.url, ca_file=section.ca))


class _FirstReady:
    """Tells systemd "ready" once, then that the loop comes round."""

    def __init__(self) -> None:
        self._tell = notify.ready

    def alive(self) -> None:
        self._tell()
        self._tell = notify.alive

"""The proxy: listens on loopback, and hands every connection to a link in its event loop.

The loop runs in a thread of its own, so that a test or a simulator without one can switch faults by plain calls: each
returns when it is in force.
"""

from __future__ import annotations

import asyncio
import functools
import random
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from hwsim.faults.network import Link, Network, Played, Stats, reset
from hwsim.faults.plan import CERTIFICATES, Fault, Plan, Severity
from hwsim.faults.terminating import TerminatingLink, Termination
from hwsim.faults.transparent import TransparentLink

CONNECTIONS_MAX: Final = 64  # many more than one terminal opens: a leak in the client shows as refused connections
UNRESOLVABLE_NAME: Final = "host.payterm.invalid"  # .invalid is never given to anybody (RFC 6761, 6.4)
_CALL_S: Final = 10.0  # a call into the loop waits for nothing but connections that end

_T = TypeVar("_T")


class FaultProxy:
    """A proxy on loopback in front of `upstream`; with a `termination` it sees exchanges, else bytes.

    Follows `plan`, or passes everything. `report` is told every fault that was played, from the loop's thread. Safe to
    use from several threads. `switch` and `follow` raise `ValueError` for what only a terminating proxy can do.
    """

    def __init__(
        self,
        upstream: tuple[str, int],
        *,
        port: int = 0,
        termination: Termination | None = None,
        plan: Plan | None = None,
        severity: Severity | None = None,
        seed: int = 0,
        report: Callable[[Played], None] = lambda _: None,
    ) -> None:
        self._seed = seed if plan is None else plan.seed
        self._termination = termination
        self._network = Network(
            upstream,
            Plan.always(Fault.PASS),
            severity or Severity(),
            report,
            terminating=termination is not None,
            jitter=random.Random(self._seed),
        )
        if plan is not None:
            self._network.plan = self._network.playable(plan)
        self._links: dict[Link, asyncio.Task[None]] = {}
        self._fault: Fault | None = Fault.PASS if plan is None else None
        self._listener: socket.socket | None = None
        self._acceptor: asyncio.Task[None] | None = None
        self.port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faults", daemon=True)
        self._thread.start()
        try:
            self._call(self._listen())
        except BaseException:
            self._stop()
            raise

    @property
    def url(self) -> str:
        """How clients are to be configured."""
        secure = self._termination is None or self._termination.tls
        return f"http{'s' if secure else ''}://127.0.0.1:{self.port}"

    @property
    def unresolvable_url(self) -> str:
        """The same by a name that does not resolve: this fault lies before every proxy."""
        return self.url.replace("127.0.0.1", UNRESOLVABLE_NAME)

    @property
    def upstream(self) -> tuple[str, int]:
        return self._network.upstream

    @property
    def fault(self) -> Fault | None:
        """The one that is switched; None while a plan is followed."""
        return self._fault

    @property
    def delay_ms(self) -> int:
        """Before each piece (transparent) or answer (terminating) that goes back to the client, apart from faults."""
        return self._network.delay_ms

    @delay_ms.setter
    def delay_ms(self, delay_ms: int) -> None:
        self._network.delay_ms = delay_ms

    @property
    def jitter_ms(self) -> int:
        """At most so much longer than `delay_ms`."""
        return self._network.jitter_ms

    @jitter_ms.setter
    def jitter_ms(self, jitter_ms: int) -> None:
        self._network.jitter_ms = jitter_ms

    @property
    def severity(self) -> Severity:
        return self._network.severity

    @severity.setter
    def severity(self, severity: Severity) -> None:
        self._network.severity = severity

    def switch(self, fault: Fault) -> None:
        """From now on the network does this and nothing else, to running connections, too."""
        self._call(self._change(Plan.always(fault, self._seed), fault))

    def follow(self, plan: Plan) -> None:
        """From now on the network does what this draws."""
        self._call(self._change(plan, None))

    def cut(self) -> int:
        """Reset every running connection; how many there were."""
        return self._call(self._cut(list(self._links)))

    def stats(self) -> Stats:
        """What has been carried and played since the start."""

        async def take() -> Stats:
            return self._network.stats()

        return self._call(take())

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._call(self._deafen())
        self.cut()
        self._stop()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_S)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _change(self, plan: Plan, fault: Fault | None) -> None:
        self._network.plan = self._network.playable(plan)
        self._fault = fault
        if fault is Fault.REFUSE:
            await self._deafen()
        elif self._listener is None:
            await self._listen()
        # A certificate is shown when a connection begins, so a client sees another one only when it comes again.
        ends_all = fault is Fault.REFUSE or fault in CERTIFICATES
        await self._cut([link for link in self._links if not link.redraw() or ends_all])

    async def _cut(self, links: list[Link]) -> int:
        running = [task for link in links if (task := self._links.get(link)) is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        return len(running)

    async def _listen(self) -> None:
        listener = socket.create_server(("127.0.0.1", self.port), backlog=CONNECTIONS_MAX)
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._acceptor = asyncio.create_task(self._accept(listener))

    async def _deafen(self) -> None:
        if self._listener is None or self._acceptor is None:
            return
        self._acceptor.cancel()
        await asyncio.gather(self._acceptor, return_exceptions=True)
        self._listener.close()
        self._listener = None

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            client, _ = await self._loop.sock_accept(listener)
            if len(self._links) >= CONNECTIONS_MAX:
                reset(client)
                continue
            if self._termination is None:
                link: Link = TransparentLink(self._network, client)
            else:
                link = TerminatingLink(self._network, client, self._termination)
            self._links[link] = task = asyncio.create_task(link.run())
            task.add_done_callback(functools.partial(self._forget, link))

    def _forget(self, link: Link, _: asyncio.Task[None]) -> None:
        del self._links[link]

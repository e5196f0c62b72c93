"""Notices at once that the network has changed: the kernel says so (rtnetlink(7)), nobody has to probe for it."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from typing import Final

_LINK, _IPV4_ADDRESS, _IPV4_ROUTE, _IPV6_ROUTE = 0x1, 0x10, 0x40, 0x400  # RTMGRP_*, linux/rtnetlink.h
_GROUPS: Final = _LINK | _IPV4_ADDRESS | _IPV4_ROUTE | _IPV6_ROUTE
_SETTLE_S: Final = 0.3  # a link that comes up is told of in a dozen messages
_MESSAGE_BYTES: Final = 65_536

_log = logging.getLogger(__name__)


class NetworkWatch:
    """Calls `changed` from a thread of its own. Where the kernel does not tell, a back-off's end has to do."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._closing = threading.Event()
        self._socket: socket.socket | None = None
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
            self._socket.bind((0, _GROUPS))
        except OSError as error:
            _log.info("the kernel does not tell of network changes (%s): found by trying", error.strerror)
            self._drop()
            return
        self._thread = threading.Thread(target=self._listen, args=(self._socket,), name="network", daemon=True)
        self._thread.start()

    @property
    def listening(self) -> bool:
        return self._socket is not None

    def close(self) -> None:
        self._closing.set()
        if self._socket is not None:
            self._socket.settimeout(0)
            self._thread.join(2 * _SETTLE_S + 1)
            self._drop()

    def _listen(self, messages: socket.socket) -> None:
        messages.settimeout(_SETTLE_S)
        while not self._closing.is_set():
            try:
                if not messages.recv(_MESSAGE_BYTES):
                    return
            except TimeoutError:
                continue
            except OSError:  # too many at once (ENOBUFS): that is a change, too
                if self._closing.is_set():
                    return
            self._closing.wait(_SETTLE_S)
            with contextlib.suppress(OSError):
                messages.setblocking(False)
                while messages.recv(_MESSAGE_BYTES):
                    pass
            messages.settimeout(_SETTLE_S)
            self._changed()

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

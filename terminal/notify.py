"""What systemd is told (sd_notify(3)): ready, alive, stopping. Without systemd, nothing."""

from __future__ import annotations

import contextlib
import os
import socket


def ready() -> None:
    """Start-up is over and calls are answered."""
    _send("READY=1")


def alive() -> None:
    """The main loop has come round; the watchdog counts from here."""
    _send("WATCHDOG=1")


def stopping() -> None:
    """The service is going down by itself."""
    _send("STOPPING=1")


def _send(message: str) -> None:
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path  # "@" stands for the abstract namespace
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify_socket:
        notify_socket.sendto(message.encode(), address)

"""A contact reader that is not there: a pcscd of our own whose only reader is vpcd, and the cards put into its slot.

The terminal meets the real pcscd through the real PC/SC library; only the reader's driver is simulated. vpcd, that
driver, waits for a card on a TCP port: connecting is inserting, closing is removing (the port is open to the network:
this is for a bench, not for a shop). It carries whole APDUs, so that what goes wrong with single characters or blocks
of T=0 and T=1 has no place here.

The daemon must not meet the machine's own pcscd nor take its readers. It gets its socket handed over, as from systemd,
and lives in a mount namespace with a /run of its own and without drivers for USB readers; that needs no root where
users may make namespaces. It is killed with its owner, whatever ends that one.

A client finds the daemon by `environment`. Its PC/SC library reads that once: the variables must be set before the
process first uses PC/SC, and are best given to it when it is started.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final, Protocol, Self

_log = logging.getLogger(__name__)

_DRIVERS: Final = Path("/usr/lib/pcsc/drivers")
_VPCD: Final = _DRIVERS / "serial/libifdvpcd.so"
_SYSTEM_SOCKET: Final = Path("/run/pcscd/pcscd.comm")
_FRIENDLY_NAME: Final = "payterm simulated ICC"
# vpcd always has two slots, on neighbouring ports. The second stays empty.
READER_NAME: Final = f"{_FRIENDLY_NAME} 00 00"

_IN_PRIVATE: Final = {"root": ("unshare", "--mount"), "user": ("unshare", "--user", "--map-root-user", "--mount")}
# Our pid stays pcscd's through every exec, so that LISTEN_PID is right and the signal at the owner's death reaches it;
# it is asked for last, because entering a namespace cancels it. An owner that died before is noticed by the new parent.
_HIDE: Final = """
mount -t tmpfs tmpfs /run || exit 1
for bundle in "$DRIVERS"/*.bundle; do
    [ ! -d "$bundle" ] || mount -t tmpfs tmpfs "$bundle" || exit 1
done
"""
_RUN: Final = """
exec 3<&0 </dev/null
export LISTEN_FDS=1 LISTEN_PID=$$
exec setpriv --pdeathsig KILL sh -c '[ "$PPID" = "$OWNER" ] && exec "$@"' sh "$@"
"""

_POWER_OFF, _POWER_ON, _RESET, _TELL_ATR = b"\x00", b"\x01", b"\x02", b"\x04"
_PLACEHOLDER_ATR: Final = bytes.fromhex("3b00")
# vpcd would wait for an empty message for ever. Of an ATR longer than one can be, it makes a power-up that failed.
_NO_ATR: Final = bytes(34)

# Below the ports that the kernel gives to outgoing connections, so that none of those takes ours.
_PORTS: Final = range(20_000, 32_000, 2)
_PORT_TRIES_MAX: Final = 100
_EMPTY_S: Final = 0.5  # for the slot to be seen empty: pcscd looks every 0.4 s, and people change cards more slowly
_START_S: Final = 20.0  # on a busy machine; a tenth of a second otherwise
_END_S: Final = 5.0  # for pcscd to end when asked to
_PROBE_S: Final = 10.0
_LOOK_S: Final = 0.005
_LISTEN: Final = "0A"  # a socket's state in /proc/net/tcp
_LOG_BYTES: Final = 2000  # of pcscd's last words in a message


class ContactCard(Protocol):
    """A card with contacts."""

    @property
    def atr(self) -> bytes:
        """What it answered to the last reset; empty when it does not answer."""

    def reset(self, cold: bool) -> None:
        """RST with power just switched on (cold), or under power (warm)."""

    def apdu(self, command: bytes) -> bytes:
        """Execute a command, return the response with its status word; under T=0 that may be 61xx or 6Cxx."""


@dataclass(frozen=True, slots=True)
class ContactFault:
    """What goes wrong with the card in the slot. APDUs are counted from 1 since it was inserted."""

    mute: bool = False  # the wrong way in: it is felt, but does not answer any reset
    pulled_at_apdu: int | None = None  # out before the card executes it
    torn_at_apdu: int | None = None  # executed by the card, but out before it answers
    mute_at_apdu: int | None = None  # executed, but not answered; the card stays in, and can be reset
    answer_after_ms: int = 0


@dataclass(slots=True, eq=False)
class _Presence:
    """A card in the slot."""

    card: ContactCard
    fault: ContactFault
    gone: threading.Event = field(default_factory=threading.Event)
    line: socket.socket | None = None
    apdus: int = 0


class _Mute(Exception):
    """The card gives no answer. vpcd has no time-out; breaking the line is what fails the command, as one would."""


class VirtualReader:
    """The reader and its pcscd. As a context manager it is started and stopped.

    `directory` takes the socket and the log (the path of a socket may have 107 bytes), and must not lie in /run.
    Every method may be called from any thread.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket = directory / "pcscd.comm"
        self._log = directory / "pcscd.log"
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._daemon: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._presence: _Presence | None = None
        self._empty_since_s = -_EMPTY_S
        # The kernel takes the end of the thread that made a child for the end of its owner.
        self._owner = ThreadPoolExecutor(1, thread_name_prefix="pcscd owner")

    @property
    def environment(self) -> Mapping[str, str]:
        """What a client's process needs, before it first uses PC/SC."""
        return {"PCSCLITE_CSOCK_NAME": str(self._socket)}

    @property
    def daemon_pid(self) -> int | None:
        with self._lock:
            return None if self._daemon is None else self._daemon.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- the daemon

    def start(self) -> None:
        """Returns when cards can be inserted. Raises RuntimeError when pcscd does not start, with the reason."""
        self.restart_daemon()

    def stop(self) -> None:
        """End everything. The reader cannot be started again."""
        self.remove()
        self._end_daemon(kill=False)
        self._owner.shutdown()

    def kill_daemon(self) -> None:
        """As by SIGKILL, without farewell to anybody. A card in the slot stays there."""
        self._end_daemon(kill=True)

    def restart_daemon(self, *, plugged: bool = True) -> None:
        """Stop pcscd, if it runs, and start it: with the reader, or as it is while the reader is unplugged."""
        reason = unavailable()
        if reason is not None:
            raise RuntimeError(reason)
        with self._lock:
            self._end_daemon(kill=False)
            port = _free_ports()
            daemon = self._owner.submit(self._spawn, port, plugged).result()
            try:
                self._await_start(daemon, {port, port + 1} if plugged else set())
            except BaseException:
                daemon.kill()
                daemon.wait()
                raise
            self._daemon, self._port = daemon, port if plugged else 0
            self._changed.notify_all()

    def _spawn(self, port: int, plugged: bool) -> subprocess.Popen[bytes]:
        readers = self._directory / "readers"
        readers.mkdir(exist_ok=True)
        (readers / "vpcd").write_text(
            f'FRIENDLYNAME "{_FRIENDLY_NAME}"\nDEVICENAME /dev/null:0x{port:X}\nLIBPATH {_VPCD}\nCHANNELID 0x{port:X}\n'
            if plugged
            else ""
        )
        self._socket.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening, self._log.open("wb") as log:
            listening.bind(str(self._socket))
            listening.listen(16)
            private = _private()
            script = (_HIDE if private else "") + _RUN
            pcscd = [_pcscd(), "--foreground", "--config", str(readers), *_options()]
            return subprocess.Popen(
                [*(private or ()), "sh", "-c", script, "sh", *pcscd],
                stdin=listening.fileno(),
                stdout=log,
                stderr=log,
                env={**os.environ, "DRIVERS": str(_DRIVERS), "OWNER": str(os.getpid())},
            )

    def _await_start(self, daemon: subprocess.Popen[bytes], ports: set[int]) -> None:
        deadline_s = time.monotonic() + _START_S
        while not ports <= _listening_ports():
            if daemon.poll() is not None or time.monotonic() > deadline_s:
                words = self._log.read_bytes()[-_LOG_BYTES:].decode(errors="replace")
                raise RuntimeError(f"pcscd does not start the virtual reader. It says:\n{words}")
            time.sleep(_LOOK_S)

    def _end_daemon(self, *, kill: bool) -> None:
        with self._lock:
            daemon, self._daemon, self._port = self._daemon, None, 0
            if daemon is None:
                return
            if not kill:
                daemon.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(_END_S)
            daemon.kill()
            daemon.wait()

    # ---- the slot

    @property
    def card(self) -> ContactCard | None:
        """What is in the slot now."""
        with self._lock:
            return None if self._presence is None else self._presence.card

    def insert(self, card: ContactCard, *, fault: ContactFault = ContactFault()) -> None:
        """Put a card in; after another one, when pcscd has had time to see the slot empty. It sees it within 0.4 s."""
        with self._lock:
            if self._presence is not None:
                raise ValueError("there is a card in the slot")
            self._presence = _Presence(card, fault)
            threading.Thread(target=self._serve, args=(self._presence,), name="card in slot", daemon=True).start()

    def remove(self) -> None:
        """Take the card out. What it was about to answer never arrives."""
        with self._lock:
            presence, self._presence = self._presence, None
            if presence is None:
                return
            presence.gone.set()
            self._empty_since_s = time.monotonic()
            if presence.line is not None:
                with contextlib.suppress(OSError):  # closed at the other end already
                    presence.line.shutdown(socket.SHUT_RDWR)
            self._changed.notify_all()

    def _serve(self, presence: _Presence) -> None:
        """The card's thread, from insertion to removal; it outlasts the daemon, as the card in the slot does."""
        while (line := self._connect(presence)) is not None:
            with line, contextlib.suppress(OSError, EOFError, _Mute):
                self._answer(presence, line)
            with self._lock:
                self._empty_since_s = time.monotonic()

    def _connect(self, presence: _Presence) -> socket.socket | None:
        """Connect as soon as there is a daemon; None when the card is taken out before."""
        with self._changed:
            while not presence.gone.is_set():
                wait_s = self._empty_since_s + _EMPTY_S - time.monotonic()
                if self._port and wait_s <= 0:
                    wait_s = _EMPTY_S  # if nobody listens: the daemon died by itself, and may be restarted
                    with contextlib.suppress(OSError):
                        presence.line = socket.create_connection(("127.0.0.1", self._port), _START_S)
                        presence.line.settimeout(None)
                        return presence.line
                self._changed.wait(wait_s if self._port else None)
            return None

    def _answer(self, presence: _Presence, line: socket.socket) -> None:
        """The card's side of vpcd's protocol: messages with their length in front, those of one byte for the slot."""
        powered = answers = True
        while not presence.gone.is_set():
            message = _receive(line, int.from_bytes(_receive(line, 2)))
            match message:
                case b"\x00":
                    powered = False
                case b"\x01" | b"\x02":
                    answers = self._reset(presence, cold=message == b"\x01" or not powered)
                    powered = True
                case b"\x04":
                    # The question for the ATR is also how vpcd feels for a card: only right after a reset is it meant.
                    _send(line, (presence.card.atr or _PLACEHOLDER_ATR) if answers else _NO_ATR)
                    answers = True
                case _:
                    response = self._execute(presence, message)
                    if response is not None:
                        _send(line, response)

    def _reset(self, presence: _Presence, *, cold: bool) -> bool:
        """Whether the card answers."""
        if presence.fault.mute:
            return False
        presence.card.reset(cold)
        return bool(presence.card.atr)

    def _execute(self, presence: _Presence, command: bytes) -> bytes | None:
        """The response; None when the card is gone before it is given."""
        fault = presence.fault
        presence.apdus += 1
        if presence.apdus == fault.pulled_at_apdu:
            self.remove()
            return None
        try:
            response = presence.card.apdu(command)
        except Exception:  # noqa: BLE001 - whatever a card model does, the reader goes on
            _log.exception("the card model failed; it does not answer")
            response = b""
        presence.gone.wait(fault.answer_after_ms / 1000)
        if presence.apdus == fault.torn_at_apdu:
            self.remove()
            return None
        if presence.apdus == fault.mute_at_apdu or not response:
            raise _Mute
        return response


def unavailable() -> str | None:
    """Why there can be no virtual reader on this machine; None when there can."""
    if not _pcscd() or not _VPCD.exists():
        return "the virtual contact reader needs the Debian packages pcscd and vsmartcard-vpcd"
    if _private() is None and (os.geteuid() != 0 or _SYSTEM_SOCKET.exists()):
        return "the virtual contact reader needs a mount namespace, which this machine does not allow"
    return None


def _pcscd() -> str:
    return shutil.which("pcscd", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin"))) or ""


@cache
def _private() -> tuple[str, ...] | None:
    """The command that runs another in a mount namespace. None: not allowed (as root in a container, we do without)."""
    ways = [_IN_PRIVATE["user"]] if os.geteuid() != 0 else [_IN_PRIVATE["root"], _IN_PRIVATE["user"]]
    for way in ways:
        probe = [*way, "mount", "-t", "tmpfs", "tmpfs", "/run"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run(probe, capture_output=True, timeout=_PROBE_S, check=False).returncode == 0:
                return way
    return None


@cache
def _options() -> tuple[str, ...]:
    """From version 2 on pcscd asks polkit who may use it; ours answers to whoever can open its socket."""
    usage = subprocess.run([_pcscd(), "--help"], capture_output=True, timeout=_PROBE_S, check=False)
    return ("--disable-polkit",) if b"--disable-polkit" in usage.stdout + usage.stderr else ()


def _listening_ports() -> set[int]:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == _LISTEN}


def _free_ports() -> int:
    """The first of two free neighbouring ports."""
    taken = _listening_ports()
    for _ in range(_PORT_TRIES_MAX):
        port = secrets.choice(_PORTS)
        if not taken & {port, port + 1}:
            return port
    raise RuntimeError("no free port for the virtual reader")


def _receive(line: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        # vpcd writes length and body apart, and the kernel holds the second back until we acknowledge the first: 40 ms
        # an APDU unless at once, which has to be said before every read.
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        part = line.recv(count - len(received))
        if not part:
            raise EOFError
        received += part
    return received


def _send(line: socket.socket, message: bytes) -> None:
    line.sendall(len(message).to_bytes(2) + message)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

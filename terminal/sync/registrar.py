"""What concerns this terminal at its host, and no sale: whether it is revoked, and its client certificate.

Asks from time to time, in a thread and with connections of its own, so that no sale waits for it. The client key is
made here and never leaves this service; who asks for a certificate the terminal's signature says. A certificate is
renewed once two thirds of its time are over, while the old one still lasts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol
from uuid import UUID

from terminal.clock import Clock
from terminal.control import ControlError
from terminal.sync.destinations import Answered, Destination, Parcel, Result
from terminal.sync.reconcile import Asking
from terminal.sync.schedule import Mode

if TYPE_CHECKING:
    from cryptography import x509

CERTIFICATE_NAME: Final = "client.pem"
LOOK_EVERY_MS: Final = 600_000
_SAVING_MS: Final = 86_400_000  # where connections cost money, or are made by hand
_AGAIN_MS: Final = 60_000  # a failure is tried again
_RENEW_SHARE: Final = 2 / 3

_log = logging.getLogger(__name__)


class Office(Destination, Protocol):
    """A destination that can be asked about a terminal."""

    def standing(self, terminal: str) -> Result:
        """What the host says of this terminal: a signed text."""


class RegistrarError(Exception):
    """It did not work now. The message says what it means."""


class Registrar:
    """Looks after one terminal's standing and certificate. `look` is for the loop and never waits."""

    def __init__(
        self,
        connect: Callable[[], Asking],
        build: Callable[[], Office],
        directory: Path,
        clock: Clock,
        *,
        terminal: str,
        enrol: bool,
    ) -> None:
        self._connect = connect
        self._build = build
        self._path = directory / CERTIFICATE_NAME
        self._clock = clock
        self._terminal = terminal
        self._enrol = enrol
        self._due_ms = clock.monotonic_ms()
        self._thread: threading.Thread | None = None
        self._said = ""
        self._error: str | None = None

    def look(self, mode: Mode, error: str | None = None) -> None:
        """Run in a thread of its own if it is time. A new `error` of the host's link may be that we are revoked."""
        now_ms = self._clock.monotonic_ms()
        if error != self._error:
            self._error = error
            self._due_ms = self._due_ms if error is None else now_ms
        if now_ms < self._due_ms or (self._thread is not None and self._thread.is_alive()):
            return
        self._due_ms = now_ms + (_SAVING_MS if mode in (Mode.METERED, Mode.MANUAL) else LOOK_EVERY_MS)
        self._thread = threading.Thread(target=self._run, name="registrar", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Get or renew the certificate, if one is to be had; then ask how this terminal stands.

        Raises `RegistrarError`, `ControlError`.
        """
        with contextlib.closing(self._connect()) as terminal, contextlib.closing(self._build()) as host:
            if self._enrol and self._is_due():
                self._renew(terminal, host)
            terminal.call("terminal.told", {"answer": _answer(host.standing(self._terminal))})

    def _run(self) -> None:
        try:
            self.run()
        except (RegistrarError, ControlError) as error:
            self._due_ms = min(self._due_ms, self._clock.monotonic_ms() + _AGAIN_MS)
            if str(error) != self._said:
                self._said = str(error)
                _log.warning("the host was not asked about this terminal: %s", error)
            return
        self._said = ""

    def _is_due(self) -> bool:
        """Whether there is no certificate, or not for long any more. Without a true clock an old one is kept."""
        certificate = self._held()
        if certificate is None:
            return True
        if not self._clock.synchronised():
            return False
        begin_s, end_s = (
            moment.timestamp() for moment in (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
        )
        return self._clock.wall_ms() / 1000 >= begin_s + _RENEW_SHARE * (end_s - begin_s)

    def _held(self) -> x509.Certificate | None:
        """The certificate that is in use; None if there is none, or none that can be read."""
        from cryptography import x509  # noqa: PLC0415 (heavy, and not everybody needs it)
        from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

        try:
            text = self._path.read_bytes()
            certificate = x509.load_pem_x509_certificate(text)
            own = load_pem_private_key(text, None).public_key() == certificate.public_key()
        except (OSError, ValueError, TypeError):
            return None
        return certificate if own else None

    def _renew(self, terminal: Asking, host: Office) -> None:
        from cryptography import x509  # noqa: PLC0415
        from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
        from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
            Encoding,
            NoEncryption,
            PrivateFormat,
        )

        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, self._terminal)])
        csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
        asked = terminal.call("certificate.request", {"csr": csr.public_bytes(Encoding.PEM).decode()})
        parcel = Parcel(UUID(asked["id"]), "certificate", asked["id"], asked["envelope"])
        issued = terminal.call("certificate.issued", {"id": asked["id"], "answer": _answer(host.send(parcel))})
        chain = issued["chain"]
        if chain is None:
            raise RegistrarError(f"the host issues no certificate ({issued['reason']}): ask its operator")
        try:
            own = x509.load_pem_x509_certificate(chain.encode()).public_key() == key.public_key()
        except ValueError:
            own = False
        if not own:
            raise RegistrarError("the host's certificate is not for the key that was sent: ask its operator")
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self._keep(private + chain.encode())
        _log.info("the host has issued a client certificate")

    def _keep(self, text: bytes) -> None:
        """Whole or not at all: every connection from now on shows it."""
        unfinished = self._path.with_name(CERTIFICATE_NAME + ".new")
        try:
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._path)
        except OSError as error:
            raise RegistrarError(f"the client certificate could not be stored: {error.strerror}") from error


def _answer(result: Result) -> str:
    """Raises `RegistrarError`."""
    if isinstance(result, Answered):
        return result.answer
    raise RegistrarError(result.message)

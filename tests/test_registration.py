"""What the host says of a terminal: believed only from the host, never older than what was said, and a certificate."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from sync_rig import FakeClock, sale
from terminal_rig import TERMINAL, Terminal
from test_cli import payterm, serving

from hwsim.host.server import HostServer
from hwsim.host.tls import CLIENT_VALID_DAYS
from terminal.control import CallRefused
from terminal.ledger.states import State
from terminal.payment import SaleRefused
from terminal.sync.destinations import Answered, NotSent, Parcel, Refused, Result
from terminal.sync.destinations.host import HostDestination, HostSettings
from terminal.sync.registrar import CERTIFICATE_NAME, LOOK_EVERY_MS, Registrar, RegistrarError
from terminal.sync.schedule import Mode

DAY_MS = 86_400_000


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path)
    terminal.clock.offset_ms = int(time.time() * 1000) - terminal.clock.running_ms  # TLS goes by the machine's clock
    terminal.online()
    yield terminal
    terminal.close()


def told(terminal: Terminal) -> dict[str, Any]:
    return terminal.call("terminal.told", answer=terminal.host.status(TERMINAL))


def operator(terminal: Terminal) -> dict[str, Any]:
    return dict(terminal.call("status")["operator"])


# ---- revoked


def test_a_revoked_terminal_sells_nothing_and_keeps_what_it_has(terminal: Terminal) -> None:
    terminal.offline()
    kept = terminal.pay(1250)
    terminal.host.revoke(TERMINAL)
    assert told(terminal) == {"revoked": True, "configuration": None}
    with pytest.raises(CallRefused) as refused:
        terminal.enter(300)
    assert refused.value.code == "revoked"
    assert terminal.state(kept.id) is State.ACCEPTED
    assert len(terminal.items()) == 1
    terminal.restart()
    with pytest.raises(SaleRefused):
        terminal.begin(300)
    terminal.clock.sleep_ms(1_000)
    terminal.host.readmit(TERMINAL)
    told(terminal)
    terminal.online()
    assert terminal.pay(300).state is State.APPROVED


def test_it_outlives_a_lost_database(terminal: Terminal) -> None:
    terminal.host.revoke(TERMINAL)
    told(terminal)
    terminal.ledger.close()
    (terminal.config.ledger.directory / "ledger.db").unlink()
    terminal.start()
    assert operator(terminal)["revoked"] is True


def test_an_older_word_does_not_undo_a_newer_one(terminal: Terminal) -> None:
    admitted = terminal.host.status(TERMINAL)
    terminal.clock.sleep_ms(1_000)
    terminal.host.revoke(TERMINAL)
    told(terminal)
    for _ in range(2):
        with pytest.raises(CallRefused) as refused:
            terminal.call("terminal.told", answer=admitted)
        assert refused.value.code == "answer_rejected"
        terminal.restart()
    assert operator(terminal)["revoked"] is True


def test_nobody_but_the_host_revokes_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    other = Terminal(tmp_path / "other")
    other.host.revoke(TERMINAL)
    forged = [other.host.status(TERMINAL), "a.b.c", ""]
    terminal.offline()
    terminal.pay(100)
    forged.append(terminal.answer_to(terminal.items()[0]))  # the host's signature, about something else
    for answer in forged:
        with pytest.raises(CallRefused) as refused:
            terminal.call("terminal.told", answer=answer)
        assert refused.value.code == "answer_rejected"
    other.close()
    assert operator(terminal)["revoked"] is False


def test_the_screen_and_the_status_say_so(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.host.set_configuration("2026-11.2")
    terminal.host.revoke(TERMINAL)
    told(terminal)
    with serving(terminal):
        assert payterm(terminal, "status") == 0
    out = capsys.readouterr().out
    assert "REVOKED" in out and "the operator wants 2026-11.2" in out


def test_the_same_word_again_writes_nothing(terminal: Terminal) -> None:
    told(terminal)
    terminal.ledger.flush()
    before = terminal.ledger.inspection.last
    for _ in range(5):
        terminal.clock.sleep_ms(1_000)
        told(terminal)
    assert terminal.ledger.inspection.last == before


# ---- the certificate


@dataclass
class Socket:
    """The terminal's socket without the socket."""

    terminal: Terminal

    def call(self, do: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self.terminal.call(do, **(arguments or {}))

    def close(self) -> None:
        pass


@dataclass
class Place:
    terminal: Terminal
    server: HostServer
    directory: Path

    @property
    def file(self) -> Path:
        return self.directory / CERTIFICATE_NAME

    def destination(self) -> HostDestination:
        ca = self.terminal.directory / "host" / "public" / "ca.pem"
        return HostDestination(HostSettings(self.server.url, ca, enrolled=self.file))

    def registrar(self, *, enrol: bool = True) -> Registrar:
        return Registrar(
            lambda: Socket(self.terminal),
            self.destination,
            self.directory,
            self.terminal.clock,
            terminal=TERMINAL,
            enrol=enrol,
        )

    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.file.read_bytes())


@pytest.fixture
def place(terminal: Terminal, tmp_path: Path) -> Iterator[Place]:
    with HostServer(terminal.host, client_certificates=True) as server:
        yield Place(terminal, server, tmp_path)


def carried(destination: HostDestination, terminal: Terminal) -> Result:
    terminal.offline()
    terminal.pay(1250)
    item = terminal.items()[-1]
    return destination.send(Parcel(item["transaction"], item["event"], "5ec2e7", item["envelope"]))


def test_a_certificate_is_got_and_used_by_connections_that_are_open_already(place: Place) -> None:
    destination = place.destination()
    refused = carried(destination, place.terminal)
    assert isinstance(refused, Refused) and not refused.permanent and "certificate" in refused.message
    place.registrar().run()
    assert place.file.stat().st_mode & 0o777 == 0o600
    names = place.certificate().subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    assert [name.value for name in names] == [TERMINAL]
    assert isinstance(carried(destination, place.terminal), Answered)
    destination.close()
    assert operator(place.terminal) == {"revoked": False, "configuration": None, "wanted": None}


def test_without_enrolling_a_strict_host_stays_closed(place: Place) -> None:
    with pytest.raises(RegistrarError) as error:
        place.registrar(enrol=False).run()
    assert "client certificate" in str(error.value)
    assert not place.file.exists()


def test_a_certificate_is_renewed_after_two_thirds_of_its_time(place: Place) -> None:
    registrar = place.registrar()
    registrar.run()
    first = place.certificate()
    registrar.run()
    assert place.certificate() == first
    place.terminal.clock.sleep_ms(int(CLIENT_VALID_DAYS * 0.7) * DAY_MS)
    place.terminal.clock.is_synchronised = False
    registrar.run()
    assert place.certificate() == first, "a clock that nobody set says nothing"
    place.terminal.clock.is_synchronised = True
    place.terminal.host.wall_ms = lambda: int(time.time() * 1000)  # or the new one would begin in the future
    registrar._renew(Socket(place.terminal), place.destination())
    assert place.certificate().public_key() != first.public_key()
    assert registrar._is_due()


def test_a_damaged_certificate_is_replaced(place: Place) -> None:
    registrar = place.registrar()
    for damage in (b"", b"no PEM at all"):
        registrar.run()
        assert load_pem_private_key(place.file.read_bytes(), None).public_key() == place.certificate().public_key()
        place.file.write_bytes(damage)
        assert registrar._is_due()


@dataclass
class Liar:
    """A host, as far as the registrar sees one, that answers with whatever a test wants."""

    certificate: Result
    stands: Result
    name: str = "host"
    repeat_safe_ms: int | None = None

    def send(self, parcel: Parcel) -> Result:
        return self.certificate

    def standing(self, terminal: str) -> Result:
        return self.stands

    def look_up(self, parcel: Parcel, *, first_attempt_ms: int | None) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_forged_certificate_is_not_kept(terminal: Terminal, tmp_path: Path) -> None:
    liar = Liar(Answered("a.b.c"), Answered(terminal.host.status(TERMINAL)))
    registrar = Registrar(
        lambda: Socket(terminal), lambda: liar, tmp_path, terminal.clock, terminal=TERMINAL, enrol=True
    )
    with pytest.raises(CallRefused) as refused:
        registrar.run()
    assert refused.value.code == "answer_rejected"
    assert not (tmp_path / CERTIFICATE_NAME).exists()


def test_an_answer_to_nobodys_request_is_refused(terminal: Terminal) -> None:
    with pytest.raises(CallRefused) as refused:
        terminal.call("certificate.issued", id=str(sale(1).transaction), answer="a.b.c")
    assert refused.value.code == "no_such_request"


def test_it_asks_from_time_to_time_and_sooner_after_a_failure(terminal: Terminal, tmp_path: Path) -> None:
    asked: list[str] = []

    class Counting(Liar):
        def standing(self, terminal: str) -> Result:
            asked.append(terminal)
            return self.stands

    liar = Counting(NotSent("no network"), NotSent("no network"))
    clock = FakeClock()
    registrar = Registrar(lambda: Socket(terminal), lambda: liar, tmp_path, clock, terminal=TERMINAL, enrol=False)

    def look(ms: int, error: str | None = None) -> int:
        clock.advance(ms)
        registrar.look(Mode.IMMEDIATE, error)
        if registrar._thread is not None:
            registrar._thread.join()
        return len(asked)

    assert [look(0), look(30_000), look(30_000)] == [1, 1, 2]
    liar.stands = Answered(terminal.host.status(TERMINAL))
    assert [look(60_000), look(60_000), look(LOOK_EVERY_MS - 60_000)] == [3, 3, 4]
    # Refused by the host all of a sudden: perhaps this terminal is revoked, so it asks at once, and once.
    assert [look(1_000, "it does not admit this terminal"), look(1_000, "it does not admit this terminal")] == [5, 5]
    assert look(1_000, None) == 5

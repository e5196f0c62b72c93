"""Checkpoints at the host: one that fits is countersigned, one that contradicts another is refused and remembered."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from host_rig import Payload, Rig, Sender, countersign, deliver, make_bureau, register, rig
from test_host_server import Client, schema

from hwsim.host import Host, Problem, Refused
from hwsim.host import host as host_module
from hwsim.host.controls import order_json
from hwsim.host.server import ControlSocket, HostServer


@pytest.fixture(scope="module")
def issuing() -> tuple[Any, Any]:
    return make_bureau()


@pytest.fixture
def place(tmp_path: Path, issuing: tuple[Any, Any]) -> Iterator[Rig]:
    with rig(tmp_path / "host", *issuing) as made:
        yield made


@pytest.fixture
def sender(place: Rig) -> Sender:
    return Sender(place.public, place.card)


@pytest.fixture
def host(place: Rig, sender: Sender) -> Iterator[Host]:
    with place.open() as opened:
        register(opened, sender, place.card)
        yield opened


def refusal(host: Host, sender: Sender, payload: Payload) -> tuple[Problem, str]:
    with pytest.raises(Refused) as refused:
        host.countersign(payload["checkpoint"], sender.sign(payload))
    return refused.value.problem, refused.value.detail


# What fits


def test_a_growing_journal_is_countersigned(host: Host, sender: Sender) -> None:
    for sequence in (4, 9, 9, 30):
        said = countersign(host, sender, sender.checkpoint(sequence))
        assert (said["decision"], said["sequence"]) == ("countersigned", sequence)
    assert host.forks() == []
    (newest,) = host.checkpoints()
    assert (newest.sequence, newest.number) == (30, 4)


def test_the_same_checkpoint_gets_the_same_answer(host: Host, sender: Sender) -> None:
    payload = sender.checkpoint(4)
    envelope = sender.sign(payload)
    first, again = (host.countersign(payload["checkpoint"], envelope) for _ in range(2))
    assert (first.repeated, again.repeated) == (False, True)
    assert first.answer == again.answer


def test_they_may_come_in_any_order(host: Host, sender: Sender) -> None:
    """Each is sent until it is answered, so an earlier one may arrive last: its number tells when it was made."""
    made = [sender.checkpoint(sequence) for sequence in (4, 9, 30)]
    for payload in reversed(made):
        countersign(host, sender, payload)
    assert host.forks() == []


def test_numbers_count_with_those_of_sales(host: Host, sender: Sender) -> None:
    deliver(host, sender, sender.sale())
    missing = sender.checkpoint(4)
    countersign(host, sender, sender.checkpoint(9))
    assert host.gaps(sender.terminal, sender.epoch) == [(2, 2)]
    countersign(host, sender, missing)
    assert host.gaps(sender.terminal, sender.epoch) == []


def continued(sender: Sender, epoch: int, sequence: int) -> dict[str, Any]:
    return {"epoch": epoch, "sequence": sequence, "mac": sender.mac(sequence)}


def begin(sender: Sender, epoch: int, sequence: int, of: tuple[int, int] | None, **changes: Any) -> Payload:
    """The first checkpoint that is sent in an epoch."""
    sender.epoch, sender.number = epoch, 0
    place = None if of is None else continued(sender, *of)
    return sender.checkpoint(sequence, **({"epoch_of": place, "mac": sender.mac(sequence, f"{epoch}")} | changes))


def test_an_epoch_is_registered_by_its_first_checkpoint(host: Host, sender: Sender) -> None:
    countersign(host, sender, sender.checkpoint(30))
    countersign(host, sender, begin(sender, 4, 40, (3, 30)))
    countersign(host, sender, begin(sender, 7, 60, (4, 50)))
    assert [(each.epoch, each.sequence) for each in host.checkpoints()] == [(3, 30), (4, 40), (7, 60)]
    assert host.forks() == []


def test_an_epoch_may_continue_one_of_which_nothing_was_shown(host: Host, sender: Sender) -> None:
    countersign(host, sender, begin(sender, 4, 40, (3, 30)))
    assert host.forks() == []


# Forks


def rolled_back(host: Host, sender: Sender) -> Payload:
    """The store as it was before the last checkpoint: the next envelopes have new numbers, the journal old records."""
    countersign(host, sender, sender.checkpoint(30))
    return sender.checkpoint(20)


def rewritten(host: Host, sender: Sender) -> Payload:
    countersign(host, sender, sender.checkpoint(30))
    return sender.checkpoint(30, mac=sender.mac(30, "another life"))


def copied(host: Host, sender: Sender) -> Payload:
    """Two stores spend the same numbers."""
    countersign(host, sender, sender.checkpoint(30))
    sender.number -= 1
    return sender.checkpoint(31)


def late_and_too_far(host: Host, sender: Sender) -> Payload:
    late = sender.checkpoint(50)
    countersign(host, sender, sender.checkpoint(30))
    return late


def another_beginning(host: Host, sender: Sender) -> Payload:
    """Two terminals were restored from one backup, each to an epoch of the same number."""
    countersign(host, sender, sender.checkpoint(30))
    countersign(host, sender, begin(sender, 4, 40, (3, 30)))
    return sender.checkpoint(60, epoch_of=continued(sender, 3, 35))


def two_successors(host: Host, sender: Sender) -> Payload:
    countersign(host, sender, sender.checkpoint(30))
    countersign(host, sender, begin(sender, 4, 40, (3, 30)))
    return begin(sender, 5, 40, (3, 30))


def goes_on_after_its_end(host: Host, sender: Sender) -> Payload:
    """A terminal was replaced by a copy and still runs."""
    countersign(host, sender, sender.checkpoint(30))
    number = sender.number
    countersign(host, sender, begin(sender, 4, 40, (3, 30)))
    sender.epoch, sender.number = 3, number
    return sender.checkpoint(31)


def continues_another_record(host: Host, sender: Sender) -> Payload:
    countersign(host, sender, sender.checkpoint(30))
    return begin(sender, 4, 40, (3, 30), epoch_of=continued(sender, 3, 30) | {"mac": sender.mac(30, "forged")})


def out_of_nothing(host: Host, sender: Sender) -> Payload:
    countersign(host, sender, sender.checkpoint(30))
    return begin(sender, 4, 40, None)


Fork = Callable[[Host, Sender], Payload]
FORKS: list[tuple[Fork, Problem, str]] = [
    (rolled_back, Problem.FORK, "had come to record 30"),
    (rewritten, Problem.FORK, "another MAC"),
    (copied, Problem.NUMBER_REUSED, "restored or copied"),
    (late_and_too_far, Problem.FORK, "was already at 50"),
    (another_beginning, Problem.FORK, "began elsewhere"),
    (two_successors, Problem.FORK, "continued by epoch 4 already"),
    (goes_on_after_its_end, Problem.FORK, "yet it went on"),
    (continues_another_record, Problem.FORK, "another record 30"),
    (out_of_nothing, Problem.FORK, "continues nothing"),
]


@pytest.mark.parametrize(("fork", "problem", "text"), FORKS, ids=lambda value: getattr(value, "__name__", None))
def test_a_contradiction_is_refused_and_remembered(
    host: Host, sender: Sender, fork: Fork, problem: Problem, text: str
) -> None:
    payload = fork(host, sender)
    known = host.checkpoints()
    for received in (1, 2):
        found, detail = refusal(host, sender, payload)
        assert found is problem
        assert found.status == 409
        assert text in detail
        (remembered,) = host.forks()
        assert (remembered.terminal, remembered.epoch) == (sender.terminal, payload["epoch"])
        assert (remembered.sequence, remembered.detail, remembered.received) == (payload["sequence"], detail, received)
    assert host.checkpoints() == known


@pytest.mark.parametrize("fork", [each for each, problem, _ in FORKS if problem is Problem.FORK])
def test_control_a_host_that_countersigns_anything_notices_nothing(
    host: Host, sender: Sender, fork: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "contradiction", lambda *_: None)
    countersign(host, sender, fork(host, sender))
    assert host.forks() == []


def test_a_fork_does_not_stop_sales(host: Host, sender: Sender) -> None:
    refusal(host, sender, rolled_back(host, sender))
    assert deliver(host, sender, sender.sale())["decision"] == "approved"


def test_another_checkpoint_under_the_same_id_is_refused(host: Host, sender: Sender) -> None:
    payload = sender.checkpoint(30)
    countersign(host, sender, payload)
    found, _ = refusal(host, sender, sender.checkpoint(31, checkpoint=payload["checkpoint"]))
    assert found is Problem.CONFLICT


def test_a_person_may_begin_a_terminal_anew_by_registering_a_new_key(host: Host, sender: Sender, place: Rig) -> None:
    countersign(host, sender, sender.checkpoint(30))
    sender.signing_key = Ed25519PrivateKey.generate()
    payload = begin(sender, 4, 1, None)
    assert refusal(host, sender, payload)[0] is Problem.TERMINAL_UNKNOWN
    register(host, sender, place.card)
    countersign(host, sender, payload)
    assert refusal(host, sender, begin(sender, 5, 1, None))[0] is Problem.FORK  # once


def test_another_terminals_journal_is_its_own(host: Host, sender: Sender, place: Rig) -> None:
    other = Sender(place.public, place.card, terminal="T-0002")
    register(host, other, place.card)
    countersign(host, sender, sender.checkpoint(30))
    countersign(host, other, other.checkpoint(20))
    assert refusal(host, other, sender.checkpoint(31))[0] is Problem.TERMINAL_UNKNOWN
    assert host.forks() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence": 0},
        {"mac": "00"},
        {"totals": [{"currency": "EUR", "count": -1, "sum": 0}]},
        {"totals": [{"currency": "EUR", "count": 1, "sum": 12.5}]},
        {"keys": ["not hex!"]},
        {"epoch_of": {"epoch": 3, "sequence": 4, "mac": "0" * 64}},
        {"epoch_of": {"epoch": 2, "sequence": 5, "mac": "0" * 64}},
        {"archived": {"sequence": 3}},
        {"note": "more than is known"},
    ],
)
def test_what_is_no_checkpoint_is_refused_without_a_trace(host: Host, sender: Sender, changes: dict[str, Any]) -> None:
    payload = sender.checkpoint(5, **changes)
    assert refusal(host, sender, payload)[0] is Problem.MALFORMED
    assert (host.forks(), host.checkpoints()) == ([], [])


def test_a_sale_is_no_checkpoint_and_a_checkpoint_no_sale(host: Host, sender: Sender) -> None:
    sale, checkpoint = sender.sale(), sender.checkpoint(5)
    for receive, payload in (
        (lambda envelope: host.countersign(sale["transaction"], envelope), sale),
        (lambda envelope: host.receive(checkpoint["checkpoint"], "authorisation", envelope), checkpoint),
        (lambda envelope: host.countersign(sale["transaction"], envelope), checkpoint),
    ):
        with pytest.raises(Refused) as refused:
            receive(sender.sign(payload))
        assert refused.value.problem is Problem.PATH_MISMATCH


# Over the wire


def test_the_interface_is_as_described(host: Host, sender: Sender, place: Rig) -> None:
    fits, contradicts = sender.checkpoint(30), sender.checkpoint(20)
    with HostServer(host) as server, contextlib.closing(Client(server.port, place.public / "ca.pem")) as client:
        for payload in (fits, begin(sender, 4, 40, (3, 30))):
            schema("Envelope").validate(payload)
            response = client.put(payload, envelope := sender.sign(payload))
            assert (response.status, response.media_type) == (200, "application/jose")
            schema("Countersignature").validate(sender.read(response.body, envelope))
        assert client.put(contradicts, sender.sign(contradicts)).problem() == "fork"
        path = f"/v1/checkpoints/{fits['checkpoint']}"
        assert client.ask("GET", path).headers["Allow"] == "PUT"
        assert client.ask("PUT", "/v1/checkpoints").headers["Allow"] == "GET"
        assert client.ask("GET", "/v1/checkpoints").problem() == "operator-only"
        shown = client.ask("GET", "/v1/checkpoints", Authorization=f"Bearer {host.keys.operator_token}")
    document = json.loads(shown.body)
    schema("Checkpoints").validate(document)
    assert [each["sequence"] for each in document["checkpoints"]] == [30, 40]
    assert [each["sequence"] for each in document["forks"]] == [20]


def test_forks_can_be_asked_for_by_another_process(host: Host, sender: Sender, place: Rig) -> None:
    refusal(host, sender, rolled_back(host, sender))
    with HostServer(host) as server:
        control = ControlSocket(place.directory / "control.sock", server.obey)
        try:
            (fork,) = order_json(place.directory, b'{"do": "forks"}')
        finally:
            control.close()
    assert fork["sequence"] == 20

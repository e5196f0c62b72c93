"""The host's books: what is booked, what never is, and that nothing is booked twice."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from host_rig import (
    Payload,
    Rig,
    Sender,
    assert_booked_exactly_once,
    deliver,
    flip,
    make_bureau,
    register,
    rig,
    seeded,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwsim.cards.bertlv import decode
from hwsim.cards.personalise import Bureau, CardProfile, laboratory_pan, personalise
from hwsim.host import Booking, Host, Problem, Refused, Reply, State
from hwsim.host.keys import HostKeyError
from hwsim.host.store import StoreError


@pytest.fixture(scope="module")
def issuing() -> tuple[Bureau, CardProfile]:
    return make_bureau()


@pytest.fixture
def place(tmp_path: Path, issuing: tuple[Bureau, CardProfile]) -> Iterator[Rig]:
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


def receive(host: Host, payload: Payload, envelope: bytes) -> Reply:
    return host.receive(payload["transaction"], payload["event"], envelope)


def refusal(host: Host, payload: Payload, envelope: bytes) -> Problem:
    """The problem that this envelope meets, having left no trace."""
    before = host.bookings()
    with pytest.raises(Refused) as refused:
        receive(host, payload, envelope)
    assert host.bookings() == before
    return refused.value.problem


# Sales


def test_a_sale_is_booked_and_answered(host: Host, sender: Sender, place: Rig) -> None:
    payload = sender.sale(1250)
    answer = deliver(host, sender, payload)
    assert (answer["v"], answer["decision"], answer["reason"]) == (1, "approved", None)
    assert len(answer["authorisation_code"]) == 6
    issuer_data = decode(bytes.fromhex(answer["issuer_data"]))
    assert issuer_data[0x8A] == b"00"
    assert len(issuer_data[0x91]) == 8
    (booking,) = host.bookings()
    assert booking == Booking(
        transaction=payload["transaction"],
        terminal="T-0001",
        merchant="M-0001",
        amount=1250,
        currency="EUR",
        state=State.BOOKED,
        decision="approved",
        reason=None,
        authorisation_code=answer["authorisation_code"],
        rrn=answer["rrn"],
        card_ref=answer["card_ref"],
        last4=place.card.pan.digits[-4:],
        epoch=3,
        number=1,
        first_received_ms=booking.first_received_ms,
        received=1,
        sequence=1,
        kind="sale",
        of=None,
    )


def test_a_declined_sale_is_kept_and_not_booked(host: Host, sender: Sender) -> None:
    answer = deliver(host, sender, sender.sale(1251))
    assert (answer["decision"], answer["reason"]) == ("declined", "insufficient_funds")
    assert answer["authorisation_code"] is None
    assert decode(bytes.fromhex(answer["issuer_data"]))[0x8A] == b"51"
    (booking,) = host.bookings()
    assert (booking.state, booking.decision, booking.reason) == (State.DECLINED, "declined", "insufficient_funds")
    assert_booked_exactly_once(host.bookings(), {})


def test_the_same_envelope_gets_the_same_answer(host: Host, sender: Sender) -> None:
    payload = sender.sale()
    envelope = sender.sign(payload)
    first = receive(host, payload, envelope)
    assert not first.repeated
    for _ in range(3):
        assert receive(host, payload, envelope) == Reply(first.answer, repeated=True)
    assert_booked_exactly_once(host.bookings(), {payload["transaction"]: 1250})
    assert host.bookings()[0].received == 4


def test_another_envelope_for_the_same_sale_is_a_conflict(host: Host, sender: Sender) -> None:
    payload = sender.sale()
    envelope = sender.sign(payload)
    receive(host, payload, envelope)
    dearer = sender.sale(9999, transaction=payload["transaction"])
    assert refusal(host, dearer, sender.sign(dearer)) is Problem.CONFLICT
    assert receive(host, payload, envelope).repeated


def test_books_survive_a_restart(place: Rig, sender: Sender) -> None:
    payload = sender.sale()
    envelope = sender.sign(payload)
    with place.open() as host:
        register(host, sender, place.card)
        first = receive(host, payload, envelope)
    with place.open() as host:
        assert receive(host, payload, envelope) == Reply(first.answer, repeated=True)
        assert_booked_exactly_once(host.bookings(), {payload["transaction"]: 1250})


def test_a_failure_in_the_middle_leaves_nothing_behind(
    place: Rig, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = sender.sale()
    envelope = sender.sign(payload)
    with monkeypatch.context() as broken:
        broken.setattr(Rig, "_tick", lambda _: 1 // 0)
        with place.open() as host:
            register(host, sender, place.card)
            with pytest.raises(ZeroDivisionError):
                receive(host, payload, envelope)
    with place.open() as host:
        assert host.bookings() == []
        assert deliver(host, sender, payload)["decision"] == "approved"


class PerRequest(Host):
    """A host that books whatever it is sent, as often as it is sent: what this whole protocol is against."""

    def receive(self, transaction: str, event: str, body: bytes) -> Reply:
        reply = super().receive(transaction, event, body)
        self.__dict__.setdefault("booked", []).extend(b for b in super().bookings() if b.transaction == transaction)
        return reply

    def bookings(self) -> list[Booking]:
        return list(self.__dict__.get("booked", []))


def bombard(place: Rig, sender: Sender, kind: type[Host]) -> None:
    """Eight sales, each sent six times from as many threads at once; all copies of a sale get one answer."""
    with place.open(kind) as host:
        register(host, sender, place.card)
        sales = [sender.sale(1000 + 100 * index) for index in range(8)]
        envelopes = {sale["transaction"]: sender.sign(sale) for sale in sales}
        start = threading.Barrier(6)

        def send_all() -> list[str]:
            start.wait()
            return [receive(host, sale, envelopes[sale["transaction"]]).answer for sale in sales]

        with ThreadPoolExecutor(6) as pool:
            answers = [future.result() for future in [pool.submit(send_all) for _ in range(6)]]
        assert all(each == answers[0] for each in answers)
        assert_booked_exactly_once(host.bookings(), {sale["transaction"]: sale["amount"] for sale in sales})


def test_a_sale_sent_on_many_connections_at_once_is_booked_once(place: Rig, sender: Sender) -> None:
    bombard(place, sender, Host)


def test_a_host_that_books_each_request_is_found_out(place: Rig, sender: Sender) -> None:
    with pytest.raises(AssertionError, match="not booked exactly once"):
        bombard(place, sender, PerRequest)


# Reversals


def test_a_reversal_takes_the_booking_back(host: Host, sender: Sender) -> None:
    sale = sender.sale()
    approved = deliver(host, sender, sale)
    undo = sender.reversal(sale)
    envelope = sender.sign(undo)
    first = receive(host, undo, envelope)
    answer = sender.read(first.answer, envelope)
    assert (answer["decision"], answer["rrn"], answer["issuer_data"]) == ("reversed", approved["rrn"], None)
    assert receive(host, undo, envelope) == Reply(first.answer, repeated=True)
    (booking,) = host.bookings()
    assert (booking.state, booking.decision, booking.reason) == (State.REVERSED, "approved", "timeout")
    assert (booking.received, booking.reversals_received) == (1, 2)


def test_a_reversal_that_overtakes_its_sale_leaves_a_tombstone(host: Host, sender: Sender) -> None:
    sale = sender.sale()
    assert deliver(host, sender, sender.reversal(sale))["decision"] == "reversed"
    assert [booking.state for booking in host.bookings()] == [State.TOMBSTONE]
    answer = deliver(host, sender, sale)
    assert (answer["decision"], answer["reason"], answer["authorisation_code"]) == ("declined", "reversed", None)
    (booking,) = host.bookings()
    assert (booking.state, booking.decision, booking.reason) == (State.TOMBSTONE, "declined", "reversed")
    assert_booked_exactly_once(host.bookings(), {})


def test_reversing_a_declined_sale_leaves_it_declined(host: Host, sender: Sender) -> None:
    sale = sender.sale(1251)
    deliver(host, sender, sale)
    assert deliver(host, sender, sender.reversal(sale))["decision"] == "reversed"
    assert [booking.state for booking in host.bookings()] == [State.DECLINED]


def test_after_a_reversal_a_repeated_sale_is_answered_but_not_booked_again(host: Host, sender: Sender) -> None:
    sale = sender.sale()
    envelope = sender.sign(sale)
    first = receive(host, sale, envelope)
    deliver(host, sender, sender.reversal(sale))
    assert receive(host, sale, envelope).answer == first.answer
    assert_booked_exactly_once(host.bookings(), {})


def test_a_reversal_of_another_amount_reverses_nothing(host: Host, sender: Sender) -> None:
    sale = sender.sale()
    deliver(host, sender, sale)
    wrong = sender.reversal(sale) | {"amount": 1}
    assert refusal(host, wrong, sender.sign(wrong)) is Problem.SALE_MISMATCH


def test_another_terminal_cannot_reverse(host: Host, sender: Sender, place: Rig) -> None:
    sale = sender.sale()
    deliver(host, sender, sale)
    stranger = Sender(place.public, place.card, terminal="T-0002")
    host.register("T-0002", "M-0001", stranger.public_pem)
    theirs = stranger.reversal(sale)
    assert refusal(host, theirs, stranger.sign(theirs)) is Problem.SALE_MISMATCH


# What is never believed


def test_a_wrong_signature_is_refused(host: Host, sender: Sender) -> None:
    payload = sender.sale()
    forged = sender.sign(payload, key=Ed25519PrivateKey.generate())
    assert refusal(host, payload, forged) is Problem.SIGNATURE_WRONG
    head, _, signature = sender.sign(payload).split(b".")
    _, other, _ = sender.sign(payload | {"amount": 1}).split(b".")
    assert refusal(host, payload, b".".join((head, other, signature))) is Problem.SIGNATURE_WRONG


def test_an_unknown_terminal_is_refused(host: Host, sender: Sender, place: Rig) -> None:
    stranger = Sender(place.public, place.card)
    payload = stranger.sale()
    assert refusal(host, payload, stranger.sign(payload)) is Problem.TERMINAL_UNKNOWN
    for member, value in (("terminal", "T-0002"), ("merchant", "M-0002")):
        masked = sender.sale(**{member: value})
        assert refusal(host, masked, sender.sign(masked)) is Problem.TERMINAL_UNKNOWN


@pytest.mark.parametrize(
    "header",
    [
        {"typ": "payterm-answer"},
        {"typ": "JWT"},
        {"crit": ["exp"], "exp": 0},
        {"jwk": {"kty": "OKP"}},
    ],
    ids=str,
)
def test_only_the_one_header_is_read(host: Host, sender: Sender, header: dict[str, Any]) -> None:
    payload = sender.sale()
    assert refusal(host, payload, sender.sign(payload, **header)) is Problem.MALFORMED


def test_a_signature_written_otherwise_is_another_envelope_and_is_refused(host: Host, sender: Sender) -> None:
    payload = sender.sale()
    envelope = sender.sign(payload)
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    # 64 bytes leave four unused bits in the last letter: the next letter decodes to the same signature.
    other = envelope[:-1] + alphabet[alphabet.index(envelope[-1:]) + 1 :][:1]
    assert refusal(host, payload, other) is Problem.MALFORMED
    assert refusal(host, payload, envelope + b"=") is Problem.MALFORMED
    assert receive(host, payload, envelope).answer


def test_path_and_envelope_must_agree(host: Host, sender: Sender) -> None:
    payload = sender.sale()
    envelope = sender.sign(payload)
    for transaction, event in ((sender.transaction(), "authorisation"), (payload["transaction"], "reversal")):
        with pytest.raises(Refused) as refused:
            host.receive(transaction, event, envelope)
        assert refused.value.problem is Problem.PATH_MISMATCH
    assert host.bookings() == []


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("v", 2),
        ("v", True),
        ("kind", "refund"),
        ("event", "advice"),
        ("amount", -1),
        ("amount", 12.5),
        ("amount", "1250"),
        ("amount", 10**12),
        ("amount", 2**70),
        ("currency", "eur"),
        ("currency", "EUR\n"),
        ("number", 0),
        ("epoch", 2**32),
        ("terminal", "T 1"),
        ("terminal", "T-0001\n"),
        ("clock_synchronised", 1),
        ("sealed", "=="),
        ("host_key", "0" * 15),
        ("tip", 100),
    ],
    ids=str,
)
def test_a_payload_is_read_strictly(host: Host, sender: Sender, member: str, value: object) -> None:
    payload = sender.sale()
    changed = sender.sign(payload | {member: value})
    assert refusal(host, payload, changed) is Problem.MALFORMED


def test_a_missing_member_is_refused(host: Host, sender: Sender) -> None:
    payload = sender.sale()
    for member in payload:
        lacking = {name: value for name, value in payload.items() if name != member}
        assert refusal(host, payload, sender.sign(lacking)) is Problem.MALFORMED, member


# Sealed card data


def test_tampered_card_data_does_not_open(host: Host, sender: Sender) -> None:
    payload = sender.sale()
    damaged = flip(payload, "sealed")
    assert refusal(host, payload, sender.sign(damaged)) is Problem.CANNOT_UNSEAL
    short = payload | {"sealed": payload["sealed"][:20]}
    assert refusal(host, payload, sender.sign(short)) is Problem.CANNOT_UNSEAL


@pytest.mark.parametrize(("member", "value"), [("amount", 1), ("currency", "USD"), ("epoch", 4), ("transaction", None)])
def test_card_data_sealed_for_another_sale_does_not_open(
    host: Host, sender: Sender, member: str, value: int | str | None
) -> None:
    payload = sender.sale()
    moved = payload | {member: sender.transaction() if value is None else value}
    assert refusal(host, moved, sender.sign(moved)) is Problem.CANNOT_UNSEAL


def test_card_data_sealed_to_another_key_is_refused(host: Host, sender: Sender, place: Rig) -> None:
    payload = sender.sale(host_key="00" * 8)
    assert refusal(host, payload, sender.sign(payload)) is Problem.CANNOT_UNSEAL
    other = X25519PrivateKey.generate().public_key()
    pem = other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    own_id = sender.sale()["host_key"]
    (place.public / "host-sealing-key").write_bytes(pem)
    misled = sender.sale(host_key=own_id)
    assert refusal(host, misled, sender.sign(misled)) is Problem.CANNOT_UNSEAL


@pytest.mark.parametrize(
    ("sealed", "reason"),
    [
        ({"amount": 1}, "amount_mismatch"),
        ({"amount": 125_000}, "amount_mismatch"),
        ({"amount": 1250, "currency": "0840"}, "currency_mismatch"),
        ({"amount": 1250, "kind": "20"}, "kind_mismatch"),  # a refund would be the merchant's money, and unlimited
    ],
    ids=str,
)
def test_what_the_card_agreed_to_is_what_counts(
    host: Host, sender: Sender, sealed: dict[str, Any], reason: str
) -> None:
    sale = sender.sale(1250, record=sender.record(**sealed))
    answer = deliver(host, sender, sale)
    assert (answer["decision"], answer["reason"], answer["card_ref"]) == ("declined", reason, None)
    assert_booked_exactly_once(host.bookings(), {})


@pytest.mark.parametrize("tag", [0x9F26, 0x9F02, 0x9F37])
def test_a_wrong_cryptogram_is_declined(host: Host, sender: Sender, tag: int) -> None:
    objects = decode(sender.record(1250))
    objects[tag] = objects[tag][:-1] + bytes((objects[tag][-1] ^ 1,))
    record = b"".join(_encoded(each, value) for each, value in objects.items())
    answer = deliver(host, sender, sender.sale(1251 if tag == 0x9F02 else 1250, record=record))
    assert (answer["decision"], answer["reason"]) == ("declined", "security_violation")
    assert answer["card_ref"] is None  # or a forger could learn which cards come here
    assert_booked_exactly_once(host.bookings(), {})


def _encoded(tag: int, value: bytes) -> bytes:
    return tag.to_bytes((tag.bit_length() + 7) // 8, "big") + bytes((len(value),)) + value


def test_one_cryptogram_pays_for_one_sale(host: Host, sender: Sender) -> None:
    record = sender.record(1250, atc=77)
    first = sender.sale(1250, record=record)
    assert deliver(host, sender, first)["decision"] == "approved"
    again = sender.sale(1250, record=record)  # the same tap in a second sale
    assert deliver(host, sender, again)["reason"] == "duplicate_transaction_counter"
    clone = sender.sale(1250, record=sender.record(1250, atc=77))  # another tap with the same counter
    assert deliver(host, sender, clone)["reason"] == "duplicate_transaction_counter"
    assert_booked_exactly_once(host.bookings(), {first["transaction"]: 1250})


def test_a_mismatch_uses_up_no_counter(host: Host, sender: Sender) -> None:
    record = sender.record(1250, atc=78)
    assert deliver(host, sender, sender.sale(1, record=record))["reason"] == "amount_mismatch"
    assert deliver(host, sender, sender.sale(1250, record=record))["decision"] == "approved"


@pytest.mark.parametrize("record", [b"\x00", b"\x9f\x02\x06", b"\x57\x01\x00", bytes(9)], ids=bytes.hex)
def test_card_data_that_cannot_be_read_is_declined(host: Host, sender: Sender, record: bytes) -> None:
    answer = deliver(host, sender, sender.sale(record=record))
    assert (answer["decision"], answer["reason"]) == ("declined", "format_error")


def test_accounts_decide(host: Host, sender: Sender, place: Rig) -> None:
    host.enrol(place.card, blocked=True)
    assert deliver(host, sender, sender.sale())["reason"] == "restricted_card"
    host.enrol(place.card, limit_minor=1000)
    assert deliver(host, sender, sender.sale())["reason"] == "exceeds_amount_limit"
    sender.card = personalise(place.bureau, seeded(), pan=laboratory_pan(2))
    assert deliver(host, sender, sender.sale())["reason"] == "no_such_card"


# Order, names, keys


def test_gaps_are_named(host: Host, sender: Sender) -> None:
    for number in (2, 3, 6, 9):
        sender.number = number - 1
        deliver(host, sender, sender.sale())
    assert host.gaps("T-0001", 3) == [(1, 1), (4, 5), (7, 8)]
    assert host.gaps("T-0001", 4) == []


def test_a_number_used_twice_betrays_a_copied_store(host: Host, sender: Sender) -> None:
    deliver(host, sender, sender.sale())
    fork = sender.sale(number=1)
    assert refusal(host, fork, sender.sign(fork)) is Problem.NUMBER_REUSED
    next_epoch = sender.sale(number=1, epoch=4)
    assert deliver(host, sender, next_epoch)["decision"] == "approved"


def test_a_card_has_one_random_name_for_each_merchant(host: Host, sender: Sender, place: Rig) -> None:
    names = {deliver(host, sender, sender.sale())["card_ref"] for _ in range(3)}
    other = Sender(place.public, place.card, terminal="T-0002", merchant="M-0002", atc=100)
    host.register("T-0002", "M-0002", other.public_pem)
    names.add(deliver(host, other, other.sale())["card_ref"])
    assert len(names) == 2


def test_no_card_number_and_no_track_is_stored(host: Host, sender: Sender, place: Rig) -> None:
    deliver(host, sender, sender.sale())
    host.close()
    pan = place.card.pan.digits
    forbidden = (
        pan.encode(),
        bytes.fromhex(pan),
        place.card.track2,
        place.card.track2.hex().encode(),
        place.card.track2.hex().upper().encode(),
        hashlib.sha256(pan.encode()).digest(),
    )
    files = [path for path in place.directory.rglob("*") if path.is_file()]
    assert place.directory / "host.db" in files
    for path in files:
        content = path.read_bytes()
        assert not [each for each in forbidden if each in content], path.name
    assert pan[-4:].encode() in (place.directory / "host.db").read_bytes()  # the search does find what is there


def test_secrets_are_for_their_owner_alone(place: Rig) -> None:
    assert (place.directory / "private").stat().st_mode & 0o777 == 0o700
    for path in (place.directory / "private").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path.name
    with place.open() as host:
        assert host.keys.operator_token not in repr(host.keys)
        assert host.keys.card.hex() not in repr(host.keys)


def test_provisioning_again_changes_no_key(place: Rig, issuing: tuple[Bureau, CardProfile]) -> None:
    before = {path: path.read_bytes() for path in place.directory.rglob("*") if path.is_file()}
    with rig(place.directory, *issuing):
        pass
    assert {path: path.read_bytes() for path in before} == before


def test_registration_takes_only_signing_keys_and_only_once(host: Host, sender: Sender, place: Rig) -> None:
    assert host.register("T-0001", "M-0001", sender.public_pem) == sender.kid
    with pytest.raises(StoreError):
        host.register("T-0002", "M-0001", sender.public_pem)
    for wrong in (b"", (place.public / "host-sealing-key").read_bytes()):
        with pytest.raises(HostKeyError):
            host.register("T-0003", "M-0001", wrong)


def test_books_of_another_version_are_not_touched(place: Rig) -> None:
    with place.open():
        pass
    database = sqlite3.connect(place.directory / "host.db")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StoreError, match="version 99"):
        place.open()


# Arbitrary bytes


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.one_of(st.binary(max_size=300), st.from_regex(rb"[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*")))
def test_arbitrary_bytes_are_refused(host: Host, sender: Sender, body: bytes) -> None:
    with pytest.raises(Refused):
        host.receive(sender.transaction(), "authorisation", body)
    assert host.bookings() == []


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_arbitrary_members_are_refused_or_leave_the_promise_intact(
    host: Host, sender: Sender, data: st.DataObject
) -> None:
    """Even a registered terminal that signs nonsense gets a refusal or a decision, and nobody is charged for it."""
    payload = sender.sale()
    for member in data.draw(st.lists(st.sampled_from(sorted(payload)), min_size=1, max_size=3), label="members"):
        payload[member] = data.draw(_json, label=member)
    booked_before = sum(booking.state is State.BOOKED for booking in host.bookings())
    transaction, event = payload["transaction"], payload["event"]
    try:
        host.receive(str(transaction), str(event), sender.sign(payload))
    except Refused:
        assert sum(booking.state is State.BOOKED for booking in host.bookings()) == booked_before

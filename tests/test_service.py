"""The calls on the local socket, without the socket: what each refuses, and that no answer but the host's counts."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.api_jws import PyJWS
from terminal_rig import Tap, Terminal, terminal_in

from terminal.control import CallRefused, Role
from terminal.ledger.keys import key_id
from terminal.ledger.states import State
from terminal.ledger.values import Transaction
from terminal.money import EUR

PATIENCE_S = 10
NOBODY = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    with terminal_in(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """Shared by what must leave it as it is."""
    with terminal_in(tmp_path_factory.mktemp("untouched")) as made:
        yield made


def refusal(terminal: Terminal, do: str, **arguments: Any) -> str:
    """The code with which this call is refused."""
    with pytest.raises((CallRefused, msgspec.ValidationError)) as refused:
        terminal.call(do, **arguments)
    return refused.value.code if isinstance(refused.value, CallRefused) else "malformed"


def disbelieved(terminal: Terminal, key: str, answer: str) -> str:
    """The code with which this answer is refused."""
    with pytest.raises(CallRefused) as refused:
        terminal.deliver(key, answer)
    return refused.value.code


def test_who_may_call_what(terminal: Terminal) -> None:
    sale, everyone = {Role.REGISTER, Role.OPERATOR}, frozenset[Role]()
    assert {name: call.roles for name, call in terminal.calls.items()} == {
        "outbox.fetch": {Role.SYNC},
        "outbox.stored": {Role.SYNC},
        "answers.deliver": {Role.SYNC},
        "link.report": {Role.SYNC},
        "sale.start": sale,
        "sale.result": sale,
        "sale.cancel": sale,
        "sale.void": sale,
        "sale.refund": sale,
        "attention.resolve": sale,
        "alert.acknowledge": sale,
        "day.show": sale,
        "day.end": sale,
        **{
            name: {Role.SYNC}
            for name in ("reconcile.begin", "reconcile.compare", "reconcile.ended", "reconcile.standings")
        },
        **{name: {Role.SYNC} for name in ("certificate.request", "certificate.issued", "terminal.told")},
        **{
            name: {Role.OPERATOR}
            for name in (
                "ledger.list",
                "ledger.check",
                "ledger.backup",
                "audit.page",
                "audit.verify",
                "keys.use",
                "privacy.export",
                "privacy.erase",
            )
        },
        "status": everyone,
    }


@pytest.mark.parametrize(
    ("do", "arguments", "code"),
    [
        ("outbox.fetch", {"max": 0}, "malformed"),
        ("outbox.fetch", {"max": 17}, "malformed"),
        ("outbox.fetch", {"wait_ms": -1}, "malformed"),
        ("outbox.fetch", {"wait_ms": 60_001}, "malformed"),
        ("outbox.stored", {}, "malformed"),
        ("outbox.stored", {"keys": ["x"] * 17}, "malformed"),
        ("answers.deliver", {"answers": [{"key": "x", "answer": "x" * 16_385}]}, "malformed"),
        ("answers.deliver", {}, "malformed"),
        ("answers.deliver", {"answers": [{"key": "x", "answer": ""}] * 33}, "malformed"),
        ("answers.deliver", {"answers": [{"key": "x"}]}, "malformed"),
        ("link.report", {}, "malformed"),
        ("link.report", {"online": "yes"}, "malformed"),
        ("sale.start", {}, "malformed"),
        ("sale.start", {"amount": -1, "currency": "EUR"}, "malformed"),
        ("sale.start", {"amount": 12.5, "currency": "EUR"}, "malformed"),
        ("sale.start", {"amount": "1250", "currency": "EUR"}, "malformed"),
        ("sale.start", {"amount": 100, "currency": "EUR", "reference": ""}, "malformed"),
        ("sale.start", {"amount": 100, "currency": "EUR", "reference": "x" * 65}, "malformed"),
        ("sale.start", {"amount": 100, "currency": "EUR", "tip": 1}, "malformed"),
        ("sale.start", {"amount": 0, "currency": "EUR"}, "zero_amount"),
        ("sale.start", {"amount": 50_001, "currency": "EUR"}, "over_limit"),
        ("sale.start", {"amount": 10**12, "currency": "EUR"}, "amount"),
        ("sale.start", {"amount": 100, "currency": "XXX"}, "amount"),
        ("sale.start", {"amount": 100, "currency": ""}, "amount"),
        ("sale.start", {"amount": 100, "currency": "USD"}, "currency"),
        ("sale.result", {}, "no_such_sale"),
        ("sale.result", {"transaction": NOBODY}, "no_such_sale"),
        ("sale.result", {"transaction": "nonsense"}, "malformed"),
        ("sale.result", {"reference": "unheard of"}, "no_such_sale"),
        ("sale.result", {"reference": ""}, "no_such_sale"),
        ("sale.cancel", {}, "malformed"),
        ("attention.resolve", {"transaction": NOBODY, "keep": True}, "no_such_sale"),
        ("attention.resolve", {"transaction": NOBODY}, "malformed"),
        ("sale.void", {"sale": NOBODY}, "no_such_sale"),
        ("sale.void", {"sale": 1}, "no_such_sale"),
        ("sale.void", {"sale": 0}, "malformed"),
        ("sale.refund", {"sale": NOBODY}, "no_such_sale"),
        ("sale.refund", {"sale": NOBODY, "amount": 0}, "malformed"),
        ("sale.refund", {"sale": NOBODY, "amount": 1.5}, "malformed"),
        ("alert.acknowledge", {"transaction": NOBODY}, "no_such_sale"),
        ("ledger.list", {"limit": 0}, "malformed"),
        ("ledger.list", {"limit": 101}, "malformed"),
        ("status", {"more": True}, "malformed"),
    ],
)
def test_what_is_refused_changes_nothing(untouched: Terminal, do: str, arguments: dict[str, Any], code: str) -> None:
    terminal, free = untouched, untouched.ledger.free_slots
    assert refusal(terminal, do, **arguments) == code
    assert terminal.ledger.transactions(10) == []
    assert terminal.ledger.free_slots == free
    assert not terminal.desk.busy


# ---- sales


def test_a_sale_as_the_register_sees_it(terminal: Terminal) -> None:
    terminal.online()
    started = terminal.call("sale.start", amount=1250, currency="eur", reference="bill-7")
    assert (started["state"], started["decided"], started["amount_minor"]) == ("opened", False, 1250)
    assert terminal.call("sale.result", reference="bill-7")["decided"] is False
    terminal.run(Tap(terminal.card()))
    result = terminal.call("sale.result", reference="bill-7")
    assert (result["id"], result["state"], result["decided"]) == (started["id"], "approved", True)
    assert len(result["authorisation_code"]) == 6
    assert terminal.call("sale.start", amount=1250, currency="EUR", reference="bill-7") == result
    assert not terminal.desk.busy
    assert refusal(terminal, "sale.start", amount=1251, currency="EUR", reference="bill-7") == "reference_taken"


def test_no_answer_holds_more_of_a_card_than_a_receipt(terminal: Terminal) -> None:
    terminal.online()
    sale = terminal.enter(1250)
    terminal.run(Tap(terminal.card()))
    told = json.dumps([terminal.call("sale.result", transaction=str(sale)), terminal.call("ledger.list")])
    profile = terminal.card().profile
    assert profile.pan.digits[-4:] in told
    assert profile.pan.digits[:12] not in told
    assert profile.track2.hex() not in told.lower()


def test_a_second_register_is_told_to_wait(terminal: Terminal) -> None:
    first = terminal.enter(1250)
    assert refusal(terminal, "sale.start", amount=900, currency="EUR") == "busy"
    assert terminal.call("sale.cancel", transaction=str(uuid4())) == {"cancelling": False}
    assert terminal.call("sale.cancel", transaction=str(first)) == {"cancelling": True}
    terminal.run()
    assert terminal.state(first) is State.VOID
    terminal.enter(900)


def test_a_refused_register_leaves_no_sale_behind(terminal: Terminal) -> None:
    """Whoever is told "busy" has not taken anything from the limits."""
    terminal.enter(1250)
    for _ in range(5):
        assert refusal(terminal, "sale.start", amount=4_000, currency="EUR") == "busy"
    assert terminal.ledger.exposure(EUR).sum_minor == 1250
    assert len(terminal.ledger.transactions(10)) == 1


def test_a_register_waits_for_its_result(terminal: Terminal) -> None:
    terminal.online()
    sale = terminal.enter(1250)
    heard: list[dict[str, Any]] = []
    thread = threading.Thread(
        target=lambda: heard.append(terminal.call("sale.result", transaction=str(sale), wait_ms=PATIENCE_S * 1000)),
        daemon=True,
    )
    thread.start()
    terminal.run(Tap(terminal.card()))
    thread.join(PATIENCE_S)
    assert [(result["state"], result["decided"]) for result in heard] == [("approved", True)]


@pytest.mark.parametrize("key", [f"{NOBODY}/authorisation", "nonsense", ""])
def test_an_answer_to_nothing_is_refused(terminal: Terminal, key: str) -> None:
    assert disbelieved(terminal, key, "") == "no_such_sale"


# ---- taking back and paying back


def test_a_sale_is_voided_once(terminal: Terminal) -> None:
    terminal.online()
    sale = terminal.pay(1250)
    terminal.offline()
    voided = terminal.call("sale.void", sale=sale.number)
    assert (voided["id"], voided["state"], voided["reason"]) == (str(sale.id), "reversing", "void")
    assert terminal.call("sale.void", sale=str(sale.id)) == voided  # whoever did not hear asks again
    assert [item["event"] for item in terminal.items()] == ["reversal"]
    assert terminal.carry() == ["reversed"]
    assert terminal.booked() == {}
    assert terminal.call("sale.void", sale=sale.number)["state"] == "reversed"
    assert terminal.items() == []
    assert terminal.ledger.totals() == []


def test_a_sale_that_never_stood_is_not_voided(terminal: Terminal) -> None:
    terminal.offline()
    waiting = terminal.enter(1250)
    assert refusal(terminal, "sale.void", sale=str(waiting)) == "busy"
    terminal.call("sale.cancel", transaction=str(waiting))
    terminal.run()
    assert refusal(terminal, "sale.void", sale=str(waiting)) == "not_sold"
    assert terminal.items() == []


def test_a_refund_is_paid_back_once_and_never_more_than_was_sold(terminal: Terminal) -> None:
    terminal.online()
    sale = terminal.pay(1250)
    terminal.offline()
    part = terminal.call("sale.refund", sale=sale.number, amount=500, reference="back-1")
    assert (part["kind"], part["state"], part["amount_minor"], part["of"]) == (
        "refund",
        "authorising",
        500,
        str(sale.id),
    )
    assert terminal.call("sale.refund", sale=sale.number, amount=500, reference="back-1") == part
    assert refusal(terminal, "sale.refund", sale=sale.number, amount=501, reference="back-1") == "reference_taken"
    assert refusal(terminal, "sale.start", amount=500, currency="EUR", reference="back-1") == "reference_taken"
    assert refusal(terminal, "sale.refund", sale=sale.number, amount=751) == "over_refunded"
    assert refusal(terminal, "sale.refund", sale=sale.number, amount=750, currency="USD") == "currency"
    assert refusal(terminal, "sale.refund", sale=part["sequence"]) == "not_sold"  # of a refund there is none
    assert refusal(terminal, "sale.void", sale=sale.number) == "refunded"
    assert refusal(terminal, "sale.void", sale=part["sequence"]) == "refund"
    (item,) = terminal.items()
    assert (item["event"], item["after"], item["amount"], item["currency"]) == ("refund", str(sale.id), -500, "EUR")
    assert terminal.carry() == ["approved"]
    rest = terminal.call("sale.refund", sale=sale.number, reference="back-2")
    assert rest["amount_minor"] == 750
    assert terminal.call("sale.refund", sale=sale.number, reference="back-2") == rest
    assert terminal.carry() == ["approved"]
    assert sum(terminal.booked().values()) == 0
    assert [(total.count, total.sum_minor) for total in terminal.ledger.totals()] == [(3, 0)]


def test_a_refund_that_waits_takes_nothing_from_the_limits(terminal: Terminal) -> None:
    terminal.online()
    sale = terminal.pay(1250)
    terminal.offline()
    terminal.call("sale.refund", sale=sale.number)
    assert terminal.ledger.exposure(EUR).count == 0
    (unsent,) = terminal.ledger.unsent()
    assert (unsent.count, unsent.sum_minor) == (1, -1250)
    terminal.restart()
    assert [item["event"] for item in terminal.items()] == ["refund"]  # recovery takes no refund back
    assert terminal.carry() == ["approved"]


def test_what_the_host_says_no_to_afterwards_is_told_until_somebody_has_seen_it(terminal: Terminal) -> None:
    terminal.offline()
    sale = terminal.pay(1251)  # the issuer has no money for it
    refund = terminal.call("sale.refund", sale=sale.number)
    assert terminal.call("status")["alerts"] == []
    assert terminal.carry() == ["refused", "declined"]
    alerts = terminal.call("status")["alerts"]
    assert [(alert["id"], alert["state"]) for alert in alerts] == [
        (str(sale.id), "refused"),
        (refund["id"], "declined"),
    ]
    assert not {"last4", "reference", "scheme"} & set(alerts[0])
    terminal.restart()
    assert [alert["id"] for alert in terminal.call("status")["alerts"]] == [str(sale.id), refund["id"]]
    assert terminal.call("alert.acknowledge", transaction=sale.number) == {"acknowledged": True}
    assert terminal.call("alert.acknowledge", transaction=str(sale.id)) == {"acknowledged": False}
    terminal.restart()
    assert [alert["id"] for alert in terminal.call("status")["alerts"]] == [refund["id"]]


# ---- what sync is given


def test_an_item_is_offered_until_it_is_stored(terminal: Terminal) -> None:
    terminal.offline()
    sale = terminal.pay(1250)
    (item,) = terminal.items()
    assert item["key"] == f"{sale.id}/authorisation"
    assert terminal.items() == [item]
    terminal.call("outbox.stored", keys=[item["key"], "unknown", "unknown"])
    assert terminal.items() == []
    terminal.restart()
    assert terminal.items() == [item]  # to heal a spool that was lost
    assert terminal.deliver(item["key"], terminal.answer_to(item)) == "settled"
    terminal.restart()
    assert terminal.items() == []


def test_answers_come_in_groups_and_each_stands_for_itself(terminal: Terminal) -> None:
    terminal.offline()
    good, forged, declined = terminal.pay(1250), terminal.pay(700), terminal.pay(1251)
    items = {item["transaction"]: item for item in terminal.items()}
    answers = [
        {"key": items[str(good.id)]["key"], "answer": terminal.answer_to(items[str(good.id)])},
        {"key": items[str(forged.id)]["key"], "answer": terminal.answer_to(items[str(good.id)])},
        {"key": "unheard/of", "answer": "x"},
        {"key": items[str(declined.id)]["key"], "answer": terminal.answer_to(items[str(declined.id)])},
    ]
    results = terminal.call("answers.deliver", answers=answers)["results"]
    assert [result["key"] for result in results] == [answer["key"] for answer in answers]
    told = [result.get("state") or result["error"]["code"] for result in results]
    assert told == ["settled", "answer_rejected", "no_such_sale", "refused"]
    states = [terminal.state(sale.id) for sale in (good, forged, declined)]
    assert states == [State.SETTLED, State.ACCEPTED, State.REFUSED]
    # Again, as after an acknowledgement that was lost: nothing changes, and the same is told.
    again = terminal.call("answers.deliver", answers=answers)["results"]
    assert again == results
    assert terminal.call("answers.deliver", answers=[]) == {"results": []}


def test_a_checkpoint_is_countersigned_in_the_group_of_a_sale(terminal: Terminal) -> None:
    terminal.offline()
    sale = terminal.pay(1250)
    for _ in range(20):
        if not terminal.ledger.upkeep.step(terminal.payments._envelopes):
            break
    items = terminal.items()
    assert {item["event"] for item in items} == {"authorisation", "checkpoint"}
    answers = []
    for item in items:
        if item["event"] == "checkpoint":
            said = terminal.host.countersign(item["transaction"], item["envelope"].encode()).answer
        else:
            said = terminal.answer_to(item)
        answers.append({"key": item["key"], "answer": said})
    results = terminal.call("answers.deliver", answers=answers)["results"]
    assert sorted(result["state"] for result in results) == ["countersigned", "settled"]
    assert terminal.state(sale.id) is State.SETTLED
    assert terminal.items() == []


def test_sync_is_heard_by_each_of_its_calls(terminal: Terminal) -> None:
    terminal.offline()
    sale = terminal.pay(1250)
    (item,) = terminal.items()
    answer = terminal.answer_to(item)
    for do, arguments in (
        ("outbox.fetch", {}),
        ("outbox.stored", {"keys": []}),
        ("answers.deliver", {"answers": [{"key": item["key"], "answer": answer}]}),
        ("link.report", {"online": True}),
    ):
        terminal.clock.sleep_ms(60_000)
        assert not terminal.link.state().sync_present
        terminal.call(do, **arguments)
        assert terminal.link.state().sync_present, do
    assert terminal.state(sale.id) is State.SETTLED


def test_a_waiting_fetch_gets_a_new_sale(terminal: Terminal) -> None:
    terminal.offline()
    got: list[list[Any]] = []
    thread = threading.Thread(
        target=lambda: got.append(terminal.call("outbox.fetch", wait_ms=PATIENCE_S * 1000)["items"]), daemon=True
    )
    thread.start()
    sale = terminal.pay(1250)
    thread.join(PATIENCE_S)
    assert [item["transaction"] for item in got[0]] == [str(sale.id)]


def test_status_says_what_waits_and_what_is_wrong(terminal: Terminal) -> None:
    assert terminal.call("status")["link"] == {"online": None, "sync": False, "error": None, "queued": 0}
    terminal.call("link.report", online=False, error="no route", queued=3, held=1, oldest_ms=1)
    terminal.pay(1250)
    terminal.pay(700)
    status = terminal.call("status")
    assert status["terminal"] == "T-0001"
    assert status["link"] == {"online": False, "sync": True, "error": "no route", "queued": 3}
    assert (status["unsent"]["count"], status["unsent"]["sums"]) == (2, {"EUR": 1950})
    assert [sale["amount_minor"] for sale in status["attention"]] == [1250, 700]


def test_the_list_comes_in_pages(terminal: Terminal) -> None:
    for minor in (100, 200, 300):
        terminal.payments.void(terminal.begin(minor), "no_card")
    first = terminal.call("ledger.list", limit=2)["transactions"]
    assert [sale["amount_minor"] for sale in first] == [300, 200]
    second = terminal.call("ledger.list", limit=2, before=first[-1]["sequence"])["transactions"]
    assert [sale["amount_minor"] for sale in second] == [100]
    assert terminal.call("ledger.list", limit=2, before=second[-1]["sequence"])["transactions"] == []


# ---- a sync service that lies


@dataclass
class Hostile:
    """All that a sync service holds that somebody has broken into: what it carried, and keys of its own."""

    terminal: Terminal
    sale: Transaction
    item: dict[str, Any]  # the envelope under way
    reversal: dict[str, Any]  # another sale's
    other: str  # the genuine approval of another sale
    own = Ed25519PrivateKey.generate()

    def claims(self, **changed: Any) -> dict[str, Any]:
        """A perfect approval, but for the key."""
        genuine = PyJWS().decode(self.other, options={"verify_signature": False})
        facts = json.loads(genuine)
        sent = json.loads(PyJWS().decode(self.item["envelope"], options={"verify_signature": False}))
        return {**facts, **{name: sent[name] for name in ("transaction", "amount", "currency", "terminal")}, **changed}

    def signed(self, claims: dict[str, Any], key: Ed25519PrivateKey, **header: Any) -> str:
        kid = key_id(self.terminal.keys.host_answer)
        return PyJWS().encode(
            json.dumps(claims).encode(), key, algorithm="EdDSA", headers={"typ": "payterm-answer", "kid": kid} | header
        )

    def spliced(self, **changed: Any) -> str:
        """Another sale's approval with its contents exchanged, the signature left."""
        head, body, signature = self.other.split(".")
        said = json.loads(base64.urlsafe_b64decode(body + "==")) | changed
        return ".".join((head, base64.urlsafe_b64encode(json.dumps(said).encode()).rstrip(b"=").decode(), signature))


def unsigned(hostile: Hostile) -> str:
    head = base64.urlsafe_b64encode(b'{"alg":"none","typ":"payterm-answer"}').rstrip(b"=").decode()
    body = base64.urlsafe_b64encode(json.dumps(hostile.claims()).encode()).rstrip(b"=").decode()
    return f"{head}.{body}."


def by_public_key(hostile: Hostile) -> str:
    """The old trick: the public key as a shared secret."""
    import hashlib
    import hmac

    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    head = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"payterm-answer"}').rstrip(b"=").decode()
    body = base64.urlsafe_b64encode(json.dumps(hostile.claims()).encode()).rstrip(b"=").decode()
    public = hostile.terminal.keys.host_answer.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    mac = hmac.digest(public, f"{head}.{body}".encode(), hashlib.sha256)
    return f"{head}.{body}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


FORGERIES: dict[str, Callable[[Hostile], str]] = {
    "of a key of its own": lambda it: it.signed(it.claims(), it.own),
    "named by its own key": lambda it: it.signed(it.claims(), it.own, kid=key_id(it.own.public_key())),
    "without a signature": unsigned,
    "with the public key as a secret": by_public_key,
    "another sale's approval": lambda it: it.other,
    "another sale's, renamed": lambda it: it.spliced(transaction=str(it.sale.id)),
    "another sale's, of another amount": lambda it: it.spliced(amount=1),
    "its own envelope": lambda it: str(it.item["envelope"]),
    "the terminal's reversal": lambda it: str(it.reversal["envelope"]),
    "garbage": lambda _: "garbage",
    "dots": lambda _: "..",
    "nothing": lambda _: "",
    "no ASCII": lambda _: "é.é.é",
    "a page of a captive portal": lambda _: "<html><body>please log in</body></html>",
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hostile]:
    """Shared by all forgeries, which must leave everything as it is."""
    with terminal_in(tmp_path_factory.mktemp("hostile")) as terminal:
        yield broken_into(terminal)


def broken_into(terminal: Terminal) -> Hostile:
    terminal.offline()
    earlier = terminal.pay(1250)
    (item,) = terminal.items()
    other = terminal.answer_to(item)
    terminal.deliver(item["key"], other)
    assert terminal.state(earlier.id) is State.SETTLED
    terminal.withheld()
    terminal.pay(4_500)
    (reversal,) = (item for item in terminal.items() if item["event"] == "reversal")
    terminal.carry()
    terminal.withheld()
    sale = terminal.pay(1250)
    (item,) = terminal.items()
    return Hostile(terminal, sale, item, reversal, other)


def standing(terminal: Terminal, sale: UUID) -> tuple[Any, ...]:
    """All that money depends on."""
    ledger = terminal.ledger
    return (ledger.transaction(sale), ledger.outbox(10), ledger.exposure(EUR), ledger.totals(), ledger.unsent())


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES.keys())
def test_no_forged_answer_changes_anything(hostile: Hostile, forgery: Callable[[Hostile], str]) -> None:
    terminal = hostile.terminal
    before = standing(terminal, hostile.sale.id)
    assert disbelieved(terminal, hostile.item["key"], forgery(hostile)) == "answer_rejected"
    assert standing(terminal, hostile.sale.id) == before
    assert terminal.state(hostile.sale.id) is State.ACCEPTED


def test_forgeries_leave_nothing_behind_and_do_not_hinder_the_truth(terminal: Terminal) -> None:
    """The negative control of the forgeries, too: an answer that is the host's is believed."""
    hostile = broken_into(terminal)
    for forgery in FORGERIES.values():
        disbelieved(terminal, hostile.item["key"], forgery(hostile))
    terminal.restart()
    assert terminal.state(hostile.sale.id) is State.ACCEPTED
    assert terminal.carry() == ["settled"]


@pytest.mark.parametrize(
    "changed",
    [
        {"amount": 1},
        {"currency": "USD"},
        {"terminal": "T-0002"},
        {"transaction": NOBODY},
        {"event": "reversal"},
        {"envelope": "0" * 64},
        {"decision": "reversed"},
        {"decision": "perhaps"},
        {"v": 2},
        {"authorisation_code": "\u202e123456"},
    ],
    ids="-".join,
)
def test_even_the_host_must_mean_what_was_sent(hostile: Hostile, changed: dict[str, Any]) -> None:
    """A host with a bug, or an answer of its that somebody recorded elsewhere."""
    terminal, key = hostile.terminal, hostile.terminal.host.keys.answer
    digest = terminal.ledger.outbox_item(hostile.item["key"]).sha256
    before = standing(terminal, hostile.sale.id)
    forged = hostile.signed(hostile.claims(envelope=digest) | changed, key)
    assert disbelieved(terminal, hostile.item["key"], forged) == "answer_rejected"
    assert standing(terminal, hostile.sale.id) == before


def test_what_the_host_meant_is_believed(terminal: Terminal) -> None:
    """The negative control: the same claims without a change."""
    hostile = broken_into(terminal)
    digest = terminal.ledger.outbox_item(hostile.item["key"]).sha256
    good = hostile.signed(hostile.claims(envelope=digest), terminal.host.keys.answer)
    assert terminal.deliver(hostile.item["key"], good) == "settled"


def test_an_approval_cannot_be_forged_while_a_customer_waits(terminal: Terminal) -> None:
    """Nothing that a hostile sync says makes the panel light up: the sale runs into its time-out."""
    terminal.call("link.report", online=True)
    own = Ed25519PrivateKey.generate()

    def forge() -> None:
        for item in terminal.items():
            sent = json.loads(PyJWS().decode(item["envelope"], options={"verify_signature": False}))
            claims = {name: sent[name] for name in ("event", "transaction", "terminal", "amount", "currency")} | {
                "v": 1,
                "envelope": terminal.ledger.outbox_item(item["key"]).sha256,
                "decision": "approved",
                "reason": None,
                "authorisation_code": "123456",
                "rrn": None,
                "card_ref": None,
                "issuer_data": None,
                "answered_at": 0,
            }
            headers = {"typ": "payterm-answer", "kid": key_id(terminal.keys.host_answer)}
            answer = PyJWS().encode(json.dumps(claims).encode(), own, algorithm="EdDSA", headers=headers)
            assert disbelieved(terminal, item["key"], answer) == "answer_rejected"
        terminal.clock.hurry_ms = 1_000

    terminal.link.on_outbox = forge
    assert terminal.pay(4_500).state is State.REVERSING


def test_an_answer_twice_is_the_same_answer(terminal: Terminal) -> None:
    terminal.offline()
    sale = terminal.pay(1250)
    (item,) = terminal.items()
    answer = terminal.answer_to(item)
    assert terminal.deliver(item["key"], answer) == "settled"
    after = standing(terminal, sale.id)
    assert terminal.deliver(item["key"], answer) == "settled"
    assert standing(terminal, sale.id) == after


def test_an_unbelievable_answer_is_in_the_audit_trail(terminal: Terminal) -> None:
    hostile, free = broken_into(terminal), terminal.ledger.free_slots
    disbelieved(terminal, hostile.item["key"], "garbage")
    assert terminal.ledger.free_slots == free - 1


# ---- a sync service that talks too much: 256 slots are all that the journal of these tests has

CHATTER = 300


def test_a_flapping_network_does_not_fill_the_journal(terminal: Terminal) -> None:
    for number in range(CHATTER):
        terminal.call("link.report", online=number % 2 == 0)
    assert terminal.begin(1250).state is State.OPENED


def test_a_lying_sync_does_not_fill_the_journal(terminal: Terminal) -> None:
    hostile = broken_into(terminal)
    for _ in range(CHATTER):
        disbelieved(terminal, hostile.item["key"], "garbage")
    assert terminal.begin(1250).state is State.OPENED


@pytest.mark.parametrize(
    "error",
    ["x" * 200, "x" * 10_000],
)
def test_a_long_complaint_is_taken(terminal: Terminal, error: str) -> None:
    terminal.call("link.report", online=False, error=error)
    assert terminal.call("status")["link"]["online"] is False

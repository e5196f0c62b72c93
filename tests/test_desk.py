"""One sale at a time lies on the desk, between the register's threads and the flow's."""

from __future__ import annotations

import threading
from uuid import UUID

import pytest

from drivers.interfaces import Key
from terminal.desk import Desk, DeskBusy
from terminal.ledger.states import State
from terminal.ledger.values import Kind, Transaction
from terminal.money import EUR, Amount

PATIENCE_S = 10


def sale(number: int) -> Transaction:
    return Transaction(
        id=UUID(int=number),
        number=number,
        kind=Kind.SALE,
        amount=Amount(1250, EUR),
        reference=None,
        opened_at_ms=0,
        clock_synchronised=True,
        state=State.OPENED,
    )


A, B = sale(1), sale(2)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_an_empty_desk(desk: Desk) -> None:
    assert not desk.busy
    assert desk.take(0) is None
    assert not desk.cancel(A.id)
    assert desk.wait_until_decided(A.id, 0)  # what does not lie here is not being decided


def test_a_sale_from_laying_to_done(desk: Desk) -> None:
    desk.lay(A)
    assert desk.busy
    assert not desk.wait_until_decided(A.id, 0)
    assert desk.take(0) == A
    assert desk.busy
    assert not desk.wait_until_decided(A.id, 0)
    desk.decided()
    assert desk.busy  # its card may still lie on the reader
    assert desk.wait_until_decided(A.id, 0)
    desk.done()
    assert not desk.busy
    assert desk.wait_until_decided(A.id, 0)


@pytest.mark.parametrize("taken", [False, True])
def test_there_is_room_for_one(desk: Desk, taken: bool) -> None:
    desk.lay(A)
    if taken:
        desk.take(0)
    with pytest.raises(DeskBusy, match="nothing was charged"):
        desk.lay(B)
    desk.lay(A)  # the same again is harmless, and not a second sale
    assert desk.take(0) == (None if taken else A)


def test_the_same_again_after_it_was_taken_is_not_taken_twice(desk: Desk) -> None:
    desk.lay(A)
    assert desk.take(0) == A
    desk.lay(A)
    desk.decided()
    desk.lay(A)
    desk.done()
    assert desk.take(0) is None


@pytest.mark.parametrize("taken", [False, True])
def test_a_cancellation_is_for_its_own_sale(desk: Desk, taken: bool) -> None:
    desk.lay(A)
    if taken:
        desk.take(0)
    assert not desk.cancel(B.id)
    assert not desk.cancelled
    assert desk.cancel(A.id)
    assert desk.cancelled
    desk.take(0)
    desk.done()
    desk.lay(B)
    assert not desk.cancelled


def test_a_sale_wakes_the_flow(desk: Desk) -> None:
    taken: list[Transaction | None] = []
    thread = threading.Thread(target=lambda: taken.append(desk.take(PATIENCE_S * 1000)), daemon=True)
    thread.start()
    desk.lay(A)
    thread.join(PATIENCE_S)
    assert taken == [A]


@pytest.mark.parametrize("end", ["decided", "done"])
def test_a_result_wakes_the_register(desk: Desk, end: str) -> None:
    heard: list[bool] = []
    desk.lay(A)
    desk.take(0)
    thread = threading.Thread(
        target=lambda: heard.append(desk.wait_until_decided(A.id, PATIENCE_S * 1000)), daemon=True
    )
    thread.start()
    getattr(desk, end)()
    thread.join(PATIENCE_S)
    assert heard == [True]


def test_of_many_registers_one_gets_the_desk(desk: Desk) -> None:
    start, laid, refused = threading.Barrier(8), [], []

    def lay(number: int) -> None:
        start.wait(PATIENCE_S)
        try:
            desk.lay(sale(number))
            laid.append(number)
        except DeskBusy:
            refused.append(number)

    threads = [threading.Thread(target=lay, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert (len(laid), len(refused)) == (1, 7)
    taken = desk.take(0)
    assert taken is not None
    assert taken.number == laid[0]


def test_keys_answer_a_question_in_the_middle_of_a_sale(desk: Desk) -> None:
    desk.lay(A)
    assert desk.take(0) == A
    desk.press(Key.ENTER)  # before the question: it answers nothing
    desk.ask()
    assert desk.answer(0) is None
    desk.press(Key.DOWN)
    desk.press(Key.ENTER)
    assert [desk.answer(0), desk.answer(0), desk.answer(0)] == [Key.DOWN, Key.ENTER, None]
    desk.press(Key.NINE)
    desk.answered()
    desk.press(Key.NINE)
    desk.done()
    assert desk.take(0) is None


def test_cancelling_from_elsewhere_ends_a_question(desk: Desk) -> None:
    desk.lay(A)
    desk.take(0)
    desk.ask()
    desk.cancel(A.id)
    assert desk.answer(PATIENCE_S * 1000) is None
    assert desk.cancelled


def test_a_verdict_is_heard_once_and_by_whom_it_is_for(desk: Desk) -> None:
    assert desk.verdict(A.id, 0) is None
    desk.resolve(A.id, keep=True)
    desk.resolve(B.id, keep=False)
    assert desk.verdict(B.id, 0) is False
    assert desk.verdict(A.id, 0) is True
    assert desk.verdict(A.id, 0) is None


def test_a_verdict_wakes_the_flow(desk: Desk) -> None:
    heard: list[bool | None] = []
    thread = threading.Thread(target=lambda: heard.append(desk.verdict(A.id, PATIENCE_S * 1000)), daemon=True)
    thread.start()
    desk.resolve(A.id, keep=False)
    thread.join(PATIENCE_S)
    assert heard == [False]

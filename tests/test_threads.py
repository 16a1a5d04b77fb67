"""What is made in a thread ahead of its use."""

import threading
import time
from contextlib import closing

import pytest

from rd_torch.threads import run_ahead


def test_items_come_in_order_from_a_thread_of_their_own():
    def items():
        for number in range(50):
            yield number, threading.get_ident()

    made = list(run_ahead(items(), 3))
    assert [number for number, _ in made] == list(range(50))
    assert threading.get_ident() not in {thread for _, thread in made}


def test_no_more_are_made_ahead_than_asked_for():
    begun, third = [], threading.Event()

    def items():
        for number in range(50):
            begun.append(number)
            if number == 3:
                third.set()
            yield number

    with closing(run_ahead(items(), 2)) as made:
        assert next(made) == 0
        assert third.wait(60)  # two wait, and one has been made that has no room
        assert begun == [0, 1, 2, 3]
        assert next(made) == 1


def test_an_error_comes_behind_the_items_made_before_it():
    def items():
        yield 1
        raise MemoryError("none left")

    made = run_ahead(items(), 2)
    assert next(made) == 1
    with pytest.raises(MemoryError, match="none left"):
        next(made)


def test_who_stops_waits_for_the_item_under_work():
    begun, made = threading.Event(), []

    def items():
        yield 0
        begun.set()
        time.sleep(0.2)
        made.append(1)
        yield 1
        made.append(2)
        yield 2

    with closing(run_ahead(items(), 1)) as ahead:
        assert next(ahead) == 0
        assert begun.wait(60)
    assert made == [1]

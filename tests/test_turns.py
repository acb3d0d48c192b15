"""Threads take turns in order of arrival, and one that waits can be stopped."""

from __future__ import annotations

import threading

from ipmerge_core.runtime.turns import Turns


def test_waiting_threads_get_a_turn_each_between_two_steps() -> None:
    turns, order, barrier = Turns(), [], threading.Barrier(3)

    def work(name: str) -> None:
        barrier.wait()
        with turns.taken():
            for _ in range(5):
                order.append(name)
                turns.switch(lambda: None, lambda: None)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    with turns.taken():  # until all of them wait
        for thread in threads:
            thread.start()
        while len(turns._queue) < 4:
            pass
    for thread in threads:
        thread.join()
    assert len(order) == 15
    rounds = [order[i : i + 3] for i in range(0, 15, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)


def test_what_a_turn_needs_is_installed_and_removed_around_the_others() -> None:
    turns, events = Turns(), []
    waits = threading.Event()

    def other() -> None:
        waits.set()
        with turns.taken():
            events.append("other")

    thread = threading.Thread(target=other)
    with turns.taken():
        turns.switch(lambda: events.append("left"), lambda: events.append("back"))
        assert events == []  # no other thread waits
        thread.start()
        waits.wait()
        while len(turns._queue) < 2:
            pass
        turns.switch(lambda: events.append("left"), lambda: events.append("back"))
    thread.join()
    assert events == ["left", "other", "back"]


def test_a_thread_that_waits_can_be_stopped() -> None:
    turns, stop, found = Turns(), threading.Event(), []

    def wait() -> None:
        with turns.taken([stop]) as mine:
            found.append(mine)

    thread = threading.Thread(target=wait)
    with turns.taken():
        thread.start()
        stop.set()
        thread.join()
        assert found == [False]
    with turns.taken() as mine:
        assert mine

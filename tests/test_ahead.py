"""Items made ahead: order, errors, bounded waiting, and a thread that always ends."""

from __future__ import annotations

import threading
import time

import pytest

from xicon_infer.ahead import Later, Stopped, ahead


def threads() -> int:
    return sum(thread.name == "ahead" for thread in threading.enumerate())


def test_items_come_in_order():
    assert list(ahead(range(50))) == list(range(50))
    assert list(ahead([])) == []
    assert list(ahead(ahead(ahead(range(20), 1), 3))) == list(range(20))


def test_an_error_comes_after_the_items_before_it():
    def source():
        yield 1
        yield 2
        raise ValueError("broken")

    taken = []
    with pytest.raises(ValueError, match="broken"):
        for item in ahead(ahead(source())):
            taken.append(item)  # noqa: PERF402
    assert taken == [1, 2]
    assert threads() == 0


def test_no_more_than_the_depth_is_made_ahead():
    made = []

    def source():
        for item in range(100):
            made.append(item)
            yield item

    items = ahead(source(), depth=3)
    next(items)
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) <= 1 + 3 + 1  # taken, waiting, and one in the hand
    items.close()


def test_stopping_early_ends_the_thread_and_closes_the_source():
    closed = []

    def source():
        try:
            yield from range(1000)
        finally:
            closed.append(True)

    items = ahead(ahead(source()))
    assert next(items) == 0
    items.close()
    assert closed == [True]
    assert threads() == 0


# A result made meanwhile


def test_a_result_is_made_while_the_caller_goes_on():
    go, events = threading.Event(), []

    def work(look):
        events.append("begins")
        assert go.wait(20)
        return 7

    later = Later(work)
    events.append("goes on")
    assert not later.done
    later.check()
    go.set()
    assert later.result() == 7
    assert later.done
    assert not later.failed
    assert sorted(events) == ["begins", "goes on"]
    assert threads() == 0


def test_an_error_is_raised_wherever_it_is_looked_for():
    def work(look):
        raise ValueError("broken")

    later = Later(work)
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            later.result()
    with pytest.raises(ValueError, match="broken"):
        later.check()
    assert later.failed


def test_work_that_is_not_wanted_any_more_ends():
    looked = threading.Event()

    def work(look):
        while True:
            look()
            looked.set()
            time.sleep(0.001)

    later = Later(work)
    assert looked.wait(20)
    later.stop()
    assert (later.done, later.failed) == (True, True)
    with pytest.raises(Stopped):
        later.result()
    assert threads() == 0

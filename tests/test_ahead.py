"""Items made ahead: order, errors, bounded waiting, and a thread that always ends."""

from __future__ import annotations

import threading
import time

import pytest

from xicon_infer.ahead import ahead


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

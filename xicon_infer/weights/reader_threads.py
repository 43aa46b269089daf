"""Work shared by threads that ends cleanly, and reads that are never short. No torch."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

Task = TypeVar("Task")

_VIEWS_PER_READ = 1024
"""IOV_MAX of Linux: most pieces of memory that one read can fill."""


class Read(Protocol):
    """`os.preadv`, or a stand-in for it in a test."""

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        """Fills the buffers with bytes of the file from an offset on; returns how many."""


def read_fully(
    fd: int, views: Sequence[memoryview], offset: int, *, read: Read = os.preadv
) -> None:
    """Fills memory with the bytes of a file from an offset on.

    A read that was interrupted by a signal is repeated by Python itself; one that gives fewer
    bytes than asked for goes on where it ended.

    Args:
        fd: of the file.
        views: writable bytes, filled one after the other.
        offset: in the file, bytes.
        read: for tests.

    Raises:
        EOFError: the file ends before the memory is full.
        OSError: the file cannot be read.
    """
    left = [view for view in views if view.nbytes]
    while left:
        count = read(fd, left[:_VIEWS_PER_READ], offset)
        if count <= 0:
            raise EOFError(f"the file ends at byte {offset}")
        offset += count
        filled = 0
        while filled < len(left) and count >= left[filled].nbytes:
            count -= left[filled].nbytes
            filled += 1
        left = left[filled:]
        if count:
            left[0] = left[0][count:]


def read_through(fd: int, start: int, end: int, scratch: memoryview) -> None:
    """Reads bytes of a file for the sake of the page cache alone.

    One system call fills the same scratch memory many times over: the data stay in the processor's
    cache, and Python's lock is taken once per call.

    Raises:
        EOFError, OSError: as `read_fully`.
    """
    whole, rest = divmod(end - start, scratch.nbytes)
    read_fully(fd, [scratch] * whole + [scratch[:rest]], start)


def share_out(
    tasks: Sequence[Task],
    work: Callable[[Task], int],
    *,
    threads: int,
    after: Callable[[int], None],
) -> None:
    """Does tasks in threads; returns when all are done and all threads have ended.

    The first error of a task, or what `after` or Ctrl-C raises here, stops the rest: each thread
    ends after the task in its hand, and the error is raised when all have ended.

    Args:
        tasks: begun in this order.
        work: does one; its result is given to `after`.
        threads: how many, at least 1.
        after: called in this thread after each task.

    Raises:
        ValueError: `threads` is below 1.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    done: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
    stop = threading.Event()
    for task in tasks:
        waiting.put(task)

    def run() -> None:
        while not stop.is_set():
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put(work(task))
            except BaseException as error:  # noqa: BLE001  raised again in the calling thread
                stop.set()
                done.put(error)

    started: list[threading.Thread] = []
    try:
        for number in range(min(threads, len(tasks))):
            thread = threading.Thread(target=run, name=f"reader-{number}", daemon=True)
            thread.start()
            started.append(thread)
        for _ in tasks:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            after(result)
    finally:
        stop.set()
        for thread in started:
            thread.join()

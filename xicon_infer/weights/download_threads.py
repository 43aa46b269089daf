"""Several downloads at the same time, watched and stopped from the thread that asked for them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from xicon_infer.errors import WeightsError
from xicon_infer.weights.download_http import Stop

Answer = TypeVar("Answer")

_POLL_S = 0.1
_STOP_S = 0.8
"""How long stopped threads are waited for; what still hangs then ends with the process."""


def run_together(
    tasks: Sequence[Callable[[], Answer]],
    *,
    jobs: int,
    stop: Stop,
    tick: Callable[[], None],
) -> list[Answer | WeightsError]:
    """Runs tasks in threads and returns what each returned, or the WeightsError it raised.

    Args:
        tasks: run in order, `jobs` at a time.
        jobs: number of threads.
        stop: set when this thread is stopped; the tasks then end.
        tick: called in this thread all the while; what it raises stops everything.
    """
    results: dict[int, Answer | BaseException] = {}
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(tasks)):
        waiting.put(number)

    def work() -> None:
        while not stop.is_set() and not waiting.empty():
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                results[number] = tasks[number]()
            except BaseException as error:  # noqa: BLE001  raised again in the calling thread
                results[number] = error

    threads = [
        threading.Thread(target=work, name=f"download-{number}", daemon=True)
        for number in range(min(jobs, len(tasks)))
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                tick()
                thread.join(_POLL_S)
    except BaseException:
        stop.set()
        deadline = time.monotonic() + _STOP_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        raise
    return [_answer(results[number]) for number in range(len(tasks))]


def _answer(result: Answer | BaseException) -> Answer | WeightsError:
    if isinstance(result, BaseException) and not isinstance(result, WeightsError):
        raise result
    return result

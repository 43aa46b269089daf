"""Stages that run at the same time: an iterator whose items are made ahead in a thread.

Decoding, detection, keypoints and bodies each release Python's lock while they work, so a chain
of `ahead(...)` keeps all of them busy, with at most `depth` items waiting between two stages.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

_POLL_S = 0.1
"""How often a stage that waits looks whether it should stop."""


class _End:
    """Marks the end of the items, with the error that ended them or None."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def ahead(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """Yields the items of an iterable, made ahead in a thread of their own.

    Args:
        items: consumed in the thread; what it raises is raised here, after the items before.
        depth: most items that wait, at least 1.

    When the caller stops early, or is stopped, the thread ends too and the source is closed.
    """
    waiting: queue.Queue[Item | _End] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: Item | _End) -> bool:
        while not stop.is_set():
            try:
                waiting.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        source = iter(items)
        error: BaseException | None = None
        try:
            for item in source:
                if not put(item):
                    break
        except BaseException as caught:  # noqa: BLE001  raised again where the items are taken
            error = caught
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()
        put(_End(error))

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = waiting.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stop.set()
        thread.join()

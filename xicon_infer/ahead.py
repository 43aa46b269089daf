"""Work that runs at the same time: items made ahead in a thread, and a result made meanwhile.

Decoding, detection, keypoints and bodies each release Python's lock while they work, so a chain
of `ahead(...)` keeps all of them busy, with at most `depth` items waiting between two stages.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar, cast

Item = TypeVar("Item")
Made = TypeVar("Made")

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


class Stopped(Exception):
    """Nobody wants the result of a `Later` any more."""


class Later(Generic[Made]):
    """A result that is made in a thread of its own, from now on.

    Args:
        work: makes it. It is given a function to call often, which raises `Stopped` when the
            result is not wanted any more.
    """

    def __init__(self, work: Callable[[Callable[[], None]], Made]) -> None:
        self._made: Made | None = None
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(work,), name="ahead", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Returns True if the thread has ended, well or not."""
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Returns True if there will be no result."""
        return self._error is not None

    def check(self) -> None:
        """Raises what the work raised, if it did already; who waits for more can give up."""
        if self._error is not None:
            raise self._error

    def result(self) -> Made:
        """Returns the result when it is there, or raises what the work raised."""
        while not self.done:  # in short waits, so that Ctrl-C is seen
            self._thread.join(_POLL_S)
        self.check()
        return cast("Made", self._made)

    def stop(self) -> None:
        """Has the work stop, and returns when its thread has ended."""
        self._stop.set()
        self._thread.join()

    def _run(self, work: Callable[[Callable[[], None]], Made]) -> None:
        try:
            self._made = work(self._look)
        except BaseException as error:  # noqa: BLE001  raised again where the result is taken
            self._error = error

    def _look(self) -> None:
        if self._stop.is_set():
            raise Stopped("the result is not wanted any more")

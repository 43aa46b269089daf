"""How far a job is: told to the client a few times, and to nobody after its result.

The platform's SDK sends each update from a thread of its own, in no order; one that arrives after
the result would leave the job in progress for ever. So at most one update is under way, and the
last one is waited for before the result is given.

Source: runpod/runpod-python: serverless/modules/rp_progress.py; its issue 250.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from xicon_infer.worker_stages import WEIGHTS, stage_of, start_percent

LEAST_PERCENT = 2.0
LEAST_S = 2.0
"""Between two updates of a stage: both must have passed; after a window, the seconds alone."""
LAST_WAIT_S = 5.0
"""Longest wait for the last update."""

_OWN_THREADS = ("ahead", "fetch", "door", "job")
"""Names of threads that this package starts."""

Payload: TypeAlias = "dict[str, Any]"
Send: TypeAlias = "Callable[[Mapping[str, Any], Payload], None]"
"""(event, payload): starts to send an update and returns at once."""


def send_to_platform(event: Mapping[str, Any], payload: Payload) -> None:
    """Sends an update to the platform, from a thread that the SDK starts."""
    from runpod.serverless.modules.rp_progress import progress_update

    progress_update(dict(event), payload)


class Sender:
    """Sends updates of one job, never two at once.

    Args:
        event: the job, as the platform gave it.
        send: starts to send; what it raises is told to `failed` and otherwise ignored.
        failed: told of an update that could not be started.
    """

    def __init__(
        self,
        event: Mapping[str, Any],
        send: Send,
        failed: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self._event = event
        self._send = send
        self._failed = failed
        self._threads: list[threading.Thread] = []
        self._closed = False

    def send(self, payload: Payload) -> bool:
        """Starts an update; returns False if it was dropped, because another is under way."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if self._threads or self._closed:
            return False
        before = set(threading.enumerate())
        try:
            self._send(self._event, payload)
        except Exception as error:  # noqa: BLE001 - an update that fails must not fail the job
            self._failed(error)
        self._threads = _senders([t for t in threading.enumerate() if t not in before])
        return True

    def close(self) -> bool:
        """Sends nothing more and waits for the last update; False if it is still under way."""
        self._closed = True
        for thread in self._threads:
            thread.join(LAST_WAIT_S)
        return not any(thread.is_alive() for thread in self._threads)


def _senders(started: list[threading.Thread]) -> list[threading.Thread]:
    """Returns the threads of the SDK among those that started; other work may start some too."""
    named = [thread for thread in started if "_thread_target" in thread.name]
    return named or [thread for thread in started if not thread.name.startswith(_OWN_THREADS)]


class JobProgress:
    """A `Progress` that stops the job when it must, and tells how far it is.

    Args:
        request_id: of the job, in every update.
        check: raises `Cancelled` when the job must stop.
        send: takes an update; False if it was dropped.
        on_stage: told of every new stage and the percent.
        clock: gives seconds.
    """

    def __init__(
        self,
        request_id: str,
        *,
        check: Callable[[], None],
        send: Callable[[Payload], bool],
        on_stage: Callable[[str, int], None] = lambda stage, percent: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.current = "accept"
        self.warnings: list[str] = []
        self._request_id, self._check, self._send_update = request_id, check, send
        self._on_stage, self._clock = on_stage, clock
        self._start = self._stage_start = self._since = clock()
        self._seconds: dict[str, float] = {}
        self._depth = 0
        self._percent = 0.0
        self._stage_percent = 0.0
        self._counts: dict[str, tuple[int, int]] = {}
        self._sent_percent, self._sent_at = -LEAST_PERCENT, -LEAST_S

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Goes on to a stage; after one inside another, the outer one goes on.

        What raises inside leaves the stage as it is, for the error.
        """
        self._check()
        outer = self.current
        self._enter(stage_of(name))
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        self._advance(start_percent(self.current) + WEIGHTS.get(self.current, 0))
        self._check()
        if self._depth:
            self._switch(outer)

    def step(self, done: int, total: int, unit: str = "step") -> None:
        """Counts what is done of the stage."""
        self._check()
        share = min(1.0, done / total) if total > 0 else 0.0
        if unit == "window":  # a part of a step
            self._counts[unit] = (done, total)
            step, steps = self._counts.get("step", (0, 0))
            share = min(1.0, (step + share) / steps) if steps else 0.0
        elif unit in ("step", "frame"):
            self._counts = {unit: (done, total)}
        self._advance(start_percent(self.current) + share * WEIGHTS.get(self.current, 0))
        moved = self._percent - self._sent_percent >= LEAST_PERCENT or unit == "window"
        if moved and self._clock() - self._sent_at >= LEAST_S:
            self._tell()

    def warn(self, message: str) -> None:
        """Keeps the message."""
        self._check()
        self.warnings.append(message)

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the end by the speed of the stage, None while nothing is known."""
        spent, moved = self._clock() - self._stage_start, self._percent - self._stage_percent
        if moved <= 0:
            spent, moved = self._clock() - self._start, self._percent
        return None if moved <= 0 or spent <= 0 else (100 - self._percent) * spent / moved

    def payload(self) -> Payload:
        """Returns an update: what is not known is None."""
        step, steps = self._counts.get("step", (None, None))
        window, windows = self._counts.get("window", (None, None))
        frames_done, frames = self._counts.get("frame", (None, None))
        remaining = self.remaining_s
        return {
            "stage": self.current,
            "percent": int(self._percent),
            "step": step,
            "steps": steps,
            "window": window,
            "windows": windows,
            "frames_done": frames_done,
            "frames": frames,
            "eta_s": None if remaining is None else round(remaining, 1),
            "elapsed_s": round(self._clock() - self._start, 1),
            "request_id": self._request_id,
            "value": step,
            "max": steps,
        }

    def timings(self) -> dict[str, float]:
        """Returns the seconds of each stage so far and of all, three decimals.

        What one stage does inside another counts for the inner one.
        """
        self._switch(self.current)
        total = self._clock() - self._start
        return {name: round(s, 3) for name, s in self._seconds.items()} | {"total": round(total, 3)}

    def _switch(self, stage: str) -> None:
        now = self._clock()
        self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self._since
        self.current, self._since = stage, now

    def _enter(self, stage: str) -> None:
        if stage == self.current:
            return
        self._switch(stage)
        self._counts = {}
        self._advance(start_percent(stage))
        self._stage_start, self._stage_percent = self._clock(), self._percent
        self._on_stage(stage, int(self._percent))
        self._tell()

    def _advance(self, percent: float) -> None:
        self._percent = min(100.0, max(self._percent, percent))

    def _tell(self) -> None:
        if self._send_update(self.payload()):
            self._sent_percent, self._sent_at = self._percent, self._clock()

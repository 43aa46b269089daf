"""The worker around the service: one job after the other, whatever happens to them.

The platform calls `Worker.handle` on its event loop. The work itself is done in one thread, so that
the loop sees stop signals; the next job begins only when that thread is free, because the device
holds one job and no more. Every exception becomes an answer: what escapes to the platform's SDK is
sent to the client with its traceback.

Source: runpod/runpod-python: serverless/modules/rp_job.py, rp_scale.py (1.12.0).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from xicon_infer.errors import Cancelled
from xicon_infer.request import Request
from xicon_infer.worker_cancel import CANCELLED, STOPPING, TIMEOUT, CancelFlag
from xicon_infer.worker_keep import KeptAnswers
from xicon_infer.worker_log import JsonLog
from xicon_infer.worker_metrics import Metrics
from xicon_infer.worker_progress import JobProgress, Payload, Send, Sender

STUCK_EXIT_CODE = 70
ANSWER_S = 20.0
"""How long the platform has to take the last answer of a worker that then ends itself."""
SHORT_S = 30.0
"""A job that ends within that time is finished when the worker is told to stop."""

Answer: TypeAlias = "dict[str, Any]"


class Jobs(Protocol):
    """What the worker asks of the jobs; `worker_job.RealJobs` is the real one."""

    def parse(self, event: Mapping[str, Any]) -> Request:
        """Returns the request of an event; raises `InvalidRequest`."""

    def quick(self, request: Request) -> Answer | None:
        """Returns the answer of what needs no device (health, a dry run), else None."""

    def make(self, request: Request, flag: CancelFlag, progress: JobProgress) -> Answer:
        """Makes the video and returns the answer; raises what goes wrong."""

    def failure(self, error: Exception, request_id: str, stage: str) -> Answer:
        """Returns the answer for an error."""

    def after(self, answer: Answer, *, worked: bool) -> Answer:
        """Returns the answer with `refresh_worker` where a fresh worker is needed.

        worked: the device was used for it.
        """


@dataclass(frozen=True)
class Limits:
    """Seconds that the worker waits for its own thread: a job, and a job that should stop."""

    job_s: float = 3300.0
    grace_s: float = 60.0


@dataclass
class _Running:
    request_id: str
    flag: CancelFlag
    progress: JobProgress


class Worker:
    """Takes jobs from the platform.

    Args:
        jobs: parses, makes and answers.
        log: told of every event.
        metrics: counts.
        limits: of the thread.
        send: starts to send an update of the progress; None writes it to the log only.
        exit: ends the process at once.
        clock: gives seconds.
        signals: take over SIGTERM from the SDK, and pass it on, with the first job.
    """

    def __init__(
        self,
        jobs: Jobs,
        *,
        log: JsonLog,
        metrics: Metrics,
        limits: Limits | None = None,
        send: Send | None = None,
        exit: Callable[[int], Any] = os._exit,
        clock: Callable[[], float] = time.monotonic,
        signals: bool = False,
    ) -> None:
        self._jobs, self._log, self._metrics = jobs, log, metrics
        self._limits, self._send = limits or Limits(), send
        self._exit, self._clock = exit, clock
        self._kept = KeptAnswers(clock)
        self._gpu = asyncio.Lock()
        self._door = ThreadPoolExecutor(max_workers=1, thread_name_prefix="door")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="job")
        self._running: _Running | None = None
        self._stopping = False
        self._signals = signals
        self._before: Any = None

    async def handle(self, event: Mapping[str, Any]) -> Answer:
        """Returns the answer to a job; never raises but to say that it was cancelled.

        Args:
            event: {id, input, ...} as the platform's SDK hands it over.

        Raises:
            asyncio.CancelledError: the platform stopped the job, and the device is free again.
        """
        named = dict(event) if isinstance(event, Mapping) else {"input": event}
        given = named.get("id")
        named["id"] = request_id = given if isinstance(given, str) and given else _drawn_id()
        self._watch_signals()
        try:
            return await self._answer(named)
        except Exception as error:  # noqa: BLE001 - the SDK would send the traceback to the client
            return self._failure(error, request_id, "accept")

    async def _answer(self, event: Mapping[str, Any]) -> Answer:
        request_id = event["id"]
        try:
            # In a thread, as 20 MB of base64 would hold up the loop; in one, to keep the order.
            loop = asyncio.get_running_loop()
            request, quick = await loop.run_in_executor(self._door, self._look, event)
        except Exception as error:  # noqa: BLE001 - becomes the answer
            return self._jobs.after(self._failure(error, request_id, "validate"), worked=False)
        if quick is not None:
            self._log.event("job.answered", request_id=request_id, form=request.form)
            return self._jobs.after(quick, worked=False)
        return await self._take_turn(request, event)

    def _look(self, event: Mapping[str, Any]) -> tuple[Request, Answer | None]:
        request = self._jobs.parse(event)
        return request, self._jobs.quick(request)

    async def _take_turn(self, request: Request, event: Mapping[str, Any]) -> Answer:
        """Waits until the device is free and makes the video."""
        await self._gpu.acquire()
        free = True
        try:
            kept = self._kept.find(event)
            if kept is not None:
                self._metrics.add("xicon_redelivered_total")
                self._log.event("job.redelivered", request_id=request.id)
                return kept
            if self._stopping:
                return self._failure(CancelFlag().error(STOPPING), request.id, "accept")
            answer, free = await self._run(request, event)
            if not answer.get("error"):
                self._kept.keep(event, answer)
            return answer
        except asyncio.CancelledError:
            free = self._running is None
            raise
        finally:
            if free:
                self._gpu.release()

    async def _run(self, request: Request, event: Mapping[str, Any]) -> tuple[Answer, bool]:
        """Returns the answer, and whether the thread is free again."""
        flag = CancelFlag(self._clock)
        seconds = min(request.timeout_s or self._limits.job_s, self._limits.job_s)
        flag.limit(seconds)
        sender = self._sender(event)
        progress = self._progress(request.id, flag, sender)
        self._running = _Running(request.id, flag, progress)
        self._metrics.put("xicon_job_running", 1)
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._thread, self._work, request, self._running, sender)
        try:
            done, _ = await asyncio.wait({work}, timeout=seconds + self._limits.grace_s)
        except asyncio.CancelledError:
            flag.stop(CANCELLED)
            await self._left(work, request.id)
            if work.done():  # finished in spite of it: kept, should the job come again
                self._kept.keep(event, work.result())
            raise
        if not done:
            flag.stop(TIMEOUT)
            self._log.event("job.stuck", level="ERROR", request_id=request.id)
            loop.call_later(ANSWER_S, self._exit, STUCK_EXIT_CODE)
            answer = self._failure(flag.error(TIMEOUT), request.id, progress.current)
            return answer | {"refresh_worker": True}, False
        return work.result(), True

    async def _left(self, work: asyncio.Future[Answer], request_id: str) -> None:
        """Waits until the thread is free, and ends the process if it does not come to that."""
        end = self._clock() + self._limits.grace_s
        while not work.done():
            try:
                done, _ = await asyncio.wait({work}, timeout=max(0.0, end - self._clock()))
            except asyncio.CancelledError:  # stopped twice: the device is still in use
                continue
            if not done:
                self._log.event("job.stuck", level="ERROR", request_id=request_id)
                self._exit(STUCK_EXIT_CODE)
                return
        self._log.event("job.cancelled", request_id=request_id)

    def _work(self, request: Request, running: _Running, sender: Sender) -> Answer:
        """Makes one video, in the thread of the jobs."""
        try:
            answer = self._jobs.make(request, running.flag, running.progress)
        except Exception as error:  # noqa: BLE001 - becomes the answer
            code = running.flag.reason
            told = running.flag.error(code) if code and isinstance(error, Cancelled) else error
            answer = self._failure(told, request.id, running.progress.current)
        finally:
            if not sender.close():
                self._log.event("progress.late", level="WARNING", request_id=request.id)
            self._metrics.put("xicon_job_running", 0)
            self._running = None
        return self._jobs.after(answer, worked=True)

    def _failure(self, error: Exception, request_id: str, stage: str) -> Answer:
        return self._jobs.failure(error, request_id, stage)

    def _sender(self, event: Mapping[str, Any]) -> Sender:
        request_id = event["id"]

        def failed(error: Exception) -> None:
            self._log.event(
                "progress.failed", level="WARNING", request_id=request_id, error=str(error)
            )

        return Sender(event, self._send or self._log_progress, failed)

    def _log_progress(self, event: Mapping[str, Any], payload: Payload) -> None:
        fields = {name: value for name, value in payload.items() if name != "request_id"}
        self._log.event("job.progress", level="DEBUG", request_id=event["id"], **fields)

    def _progress(self, request_id: str, flag: CancelFlag, sender: Sender) -> JobProgress:
        def on_stage(stage: str, percent: int) -> None:
            self._log.event("job.stage", request_id=request_id, stage=stage, percent=percent)

        return JobProgress(
            request_id, check=flag.check, send=sender.send, on_stage=on_stage, clock=self._clock
        )

    def _watch_signals(self) -> None:
        """Takes SIGTERM over from the SDK, whose own handler is in place by the first job."""
        if self._signals:
            self._signals = False
            self._before = signal.signal(signal.SIGTERM, self.on_sigterm)

    def on_sigterm(self, number: int, frame: Any) -> None:
        """Takes no more jobs; stops the one that runs, unless it ends within 30 s by its estimate.

        An estimate can be wrong, so the job is stopped then if it still runs. It logs nothing: a
        signal comes in the middle of anything.
        """
        self._stopping = True
        running = self._running
        if running is not None:
            remaining = running.progress.remaining_s
            if remaining is None or remaining > SHORT_S:
                running.flag.stop(STOPPING)
            else:
                running.flag.stop_in(STOPPING, SHORT_S)
        if callable(self._before):
            self._before(number, frame)
        elif running is None:
            raise SystemExit(128 + number)

    def close(self) -> None:
        """Lets the threads end."""
        self._door.shutdown(wait=False)
        self._thread.shutdown(wait=False)


def _drawn_id() -> str:
    return f"local-{secrets.token_hex(8)}"

"""One job, from its event to its answer.

fetch -> recipe -> deliver, in a folder of its own that is removed in every case. What a job needs
of the outside comes in as `Parts`, so that each of them can be another one in a test.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from xicon_infer import response
from xicon_infer.errors import Cancelled, OutOfMemory, XiconError
from xicon_infer.job import Job, make_job
from xicon_infer.media.deliver import Delivered
from xicon_infer.media.fetch_folder import job_folder
from xicon_infer.request import (
    Request,
    RequestContext,
    RequestWarning,
    parse_request,
    to_job_values,
)
from xicon_infer.request_job import choose_kernel, preferred_kernel
from xicon_infer.runtime import pick_seed, versions
from xicon_infer.settings import Settings
from xicon_infer.types import Progress, Result
from xicon_infer.worker_cancel import CANCELLED, CancelFlag
from xicon_infer.worker_files import first_frame
from xicon_infer.worker_log import JsonLog, prompt_fields
from xicon_infer.worker_machine import device_facts, free_disk, is_device_error
from xicon_infer.worker_memory import LowerJob, free_memory, lower_job, run_with_less
from xicon_infer.worker_metrics import Metrics
from xicon_infer.worker_moderation import Judge, ask
from xicon_infer.worker_progress import JobProgress
from xicon_infer.worker_record import coded, metadata
from xicon_infer.worker_refresh import RefreshPolicy
from xicon_infer.worker_tags import tag_video, tags

Answer = dict[str, Any]
_UNSTAGED = ("accept", "validate", "done")


class FilesPart(Protocol):
    """Fetches and delivers; `worker_files.Files` is the real one."""

    def fetch(self, request: Request, folder: Path, progress: Progress) -> dict[str, Path]:
        """Returns role -> local file."""

    def size_warning(self, request: Request, result: Result) -> RequestWarning | None:
        """Returns a warning where a result of that size seldom fits into an answer."""

    def deliver(
        self,
        request: Request,
        result: Result,
        *,
        overhead: Callable[[list[dict[str, Any]]], int],
        progress: Progress,
        cancelled: Callable[[], bool],
    ) -> Delivered:
        """Hands the videos over."""


class SessionPart(Protocol):
    """What stays loaded; `worker_session.WatchedSession` is the real one."""

    check: Callable[[], None]
    loaded: tuple[str, ...]


@dataclass
class Parts:
    """What jobs need of others.

    run: makes a video with what the session keeps. context: gives what the worker has, for an
    event. kernels: attention kernels that run here. modes: those whose weights are there.
    degraded: what is amiss, for `health`.
    """

    settings: Settings
    files: FilesPart
    session: SessionPart
    run: Callable[[Job, Progress], Result]
    context: Callable[[Mapping[str, Any]], RequestContext]
    refresh: RefreshPolicy
    log: JsonLog
    metrics: Metrics
    judge: Judge | None = None
    kernels: Collection[str] = ()
    lower: LowerJob = lower_job
    free: Callable[[], None] = free_memory
    degraded: Sequence[str] = ()
    modes: Collection[str] = ()
    clock: Callable[[], float] = time.monotonic


@dataclass
class _Told:
    """What one job has to say beside its video."""

    warnings: list[RequestWarning] = field(default_factory=list)


class RealJobs:
    """Parses requests, makes videos and answers; see `worker.Jobs`."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._cold = True

    def parse(self, event: Mapping[str, Any]) -> Request:
        """Returns the request of an event.

        Raises:
            InvalidRequest: the first fault.
        """
        request = parse_request(event, self.parts.settings, self.parts.context(event))
        prompt = str(request.resolved.get("prompt", ""))
        self.parts.log.event(
            "job.accepted",
            request_id=request.id,
            form=request.form,
            mode=request.mode,
            sources={role: media.kind for role, media in request.media.items()},
            **prompt_fields(prompt, shown=self.parts.settings.log_prompts),
        )
        return request

    def quick(self, request: Request) -> Answer | None:
        """Returns the answer of health and of a dry run, None for a video to make."""
        if request.action == "health":
            return self._health()
        return response.dry_run_answer(request) if request.dry_run else None

    def make(self, request: Request, flag: CancelFlag, progress: JobProgress) -> Answer:
        """Makes the video of a request and returns the answer; its folder is gone by then.

        Raises:
            XiconError: what went wrong. Cancelled: the flag is set.
        """
        parts = self.parts
        parts.settings.tmp.mkdir(mode=0o700, parents=True, exist_ok=True)
        parts.session.check = flag.check
        told = _Told()
        with job_folder(parts.settings.tmp) as folder:
            with progress.stage("fetch"):
                ask(parts.judge, "request", dict(request.resolved), None)
                files = parts.files.fetch(request, folder, progress)
            result, job = self._video(request, files, folder, progress, told)
            with progress.stage("encode"):
                ask(parts.judge, "result", dict(request.resolved), result.path)
                tag_video(result.path, tags(result, with_settings=parts.settings.embed_params))
            with progress.stage("upload"):
                answer = self._hand_over(request, result, job, progress, flag, told)
        self._count(request, result, answer, progress)
        self._cold = False
        return answer

    def failure(self, error: Exception, request_id: str, stage: str) -> Answer:
        """Returns the answer for an error, and writes it down; tracebacks go to the log only."""
        parts = self.parts
        if is_device_error(error):
            error = _device_lost(error)
        known = isinstance(error, XiconError)
        answer = response.failure(
            error, request_id=request_id, stage=stage, hint=getattr(error, "hint", None)
        )
        code = answer["error_code"]
        if code == CANCELLED:  # nobody gets this answer, and the worker writes it down itself
            parts.metrics.add("xicon_jobs_total", mode="", outcome="cancelled")
            return answer
        parts.metrics.last_error = code
        parts.metrics.add("xicon_errors_total", code=code)
        outcome = "cancelled" if isinstance(error, Cancelled) else "failed"
        parts.metrics.add("xicon_jobs_total", mode="", outcome=outcome)
        bug = not known or code in ("INTERNAL", "GPU_ERROR")
        shown = "".join(traceback.format_exception(error)) if bug else None
        parts.log.event(
            "job.failed",
            level="WARNING" if known else "ERROR",
            request_id=request_id,
            stage=stage,
            code=code,
            message=str(error),
            **({"traceback": shown} if shown else {}),
        )
        return answer

    def after(self, answer: Answer, *, worked: bool) -> Answer:
        """Returns the answer with `refresh_worker` where a fresh worker is needed."""
        code = str(answer.get("error_code", ""))
        if worked and code:
            self.parts.free()
        reason = self.parts.refresh.after_job(code, self.parts.session.loaded, worked=worked)
        if reason:
            self.parts.log.event("worker.refresh", level="WARNING", reason=reason)
        return answer | {"refresh_worker": True} if reason else answer

    def _video(
        self,
        request: Request,
        files: Mapping[str, Path],
        folder: Path,
        progress: JobProgress,
        told: _Told,
    ) -> tuple[Result, Job]:
        """Returns what the recipe made, with less memory if it must."""
        parts = self.parts
        job = self._job(request, files, folder)

        def tell(error: OutOfMemory, change: str) -> None:
            parts.metrics.add("xicon_gpu_oom_total")
            parts.log.event(
                "gpu.oom",
                level="WARNING",
                request_id=request.id,
                stage=progress.current,
                message=str(error),
                change=change,
            )
            if change:
                message = f"the device ran out of memory; the job was begun again: {change}"
                told.warnings.append(RequestWarning("MEMORY_FALLBACK", message))

        return run_with_less(
            job,
            lambda one: parts.run(one, progress),
            lower=parts.lower,
            free=parts.free,
            tell=tell,
        )

    def _job(self, request: Request, files: Mapping[str, Path], folder: Path) -> Job:
        """Returns the job of a request; its seed is drawn here, so that another try has it too."""
        settings = self.parts.settings
        values = to_job_values(request, files, folder / "result.mp4", kernels=self.parts.kernels)
        if request.resolved["attention_mode"] == "auto":
            values["attention"] = preferred_kernel(settings, self.parts.kernels)
        values["kernels"] = settings.kernels
        if settings.models_dir:
            values["models_dir"] = settings.models_dir[0]
        plain = {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}
        job = make_job(plain, source="request")
        return replace(job, seed=pick_seed(job.seed))

    def _hand_over(
        self,
        request: Request,
        result: Result,
        job: Job,
        progress: JobProgress,
        flag: CancelFlag,
        told: _Told,
    ) -> Answer:
        """Delivers the videos and returns the answer."""
        _, wanted = choose_kernel(request.resolved["attention_mode"], self.parts.kernels)
        large = self.parts.files.size_warning(request, result)
        own = [*map(coded, result.warnings), *told.warnings]
        own += [one for one in (wanted, large) if one]
        record = metadata(
            result,
            job,
            timings=_shown(progress.timings()),
            gpu=device_facts()["gpu"],
            cold_start=self._cold,
        )

        images = [first_frame(result)] if request.output["return_first_frame"] else []

        def answer(videos: list[dict[str, Any]], delivered: Delivered | None) -> Answer:
            late = [RequestWarning(**one) for one in (delivered.warnings if delivered else ())]
            return response.success(
                request,
                videos=videos,
                metadata=record,
                images=images,
                errors=delivered.errors if delivered else (),
                warnings=[*own, *late],
            )

        delivered = self.parts.files.deliver(
            request,
            result,
            overhead=lambda videos: response.json_bytes(answer(videos, None)),
            progress=progress,
            cancelled=lambda: bool(flag.reason),
        )
        record["timings"] = _shown(progress.timings())
        return answer(delivered.videos, delivered)

    def _count(
        self, request: Request, result: Result, answer: Answer, progress: JobProgress
    ) -> None:
        """Adds a finished job to the numbers and to the log."""
        metrics, seconds = self.parts.metrics, answer["metadata"]["timings"]
        peak = max((stage.peak_memory_bytes for stage in result.stages), default=0)
        size = sum(video.get("size_bytes", 0) for video in answer.get("videos", ()))
        metrics.add("xicon_jobs_total", mode=request.mode, outcome="success")
        metrics.add("xicon_job_seconds_total", seconds["total"], mode=request.mode)
        metrics.add("xicon_frames_total", result.num_frames, mode=request.mode)
        metrics.add("xicon_output_bytes_total", size)
        metrics.put("xicon_peak_memory_bytes", peak)
        for stage, spent in seconds.items():
            if stage != "total":
                metrics.add("xicon_stage_seconds_total", spent, stage=stage)
        for warning in answer["warnings"]:
            metrics.add("xicon_warnings_total", code=warning["code"])
            self.parts.log.event("job.warning", request_id=request.id, **warning)
        self.parts.log.event(
            "job.done",
            request_id=request.id,
            mode=request.mode,
            width=result.width,
            height=result.height,
            frames=result.num_frames,
            steps=answer["metadata"]["steps"],
            timings=seconds,
            peak_memory_bytes=peak,
            output_bytes=size,
            cold_start=self._cold,
        )

    def _health(self) -> Answer:
        parts, metrics = self.parts, self.parts.metrics
        facts = {
            "versions": versions(),
            **device_facts(),
            "disk_free_bytes": free_disk(parts.settings.tmp),
            "modes": list(parts.modes),
            "uptime_s": metrics.uptime_s,
        }
        answer = response.health(
            degraded=parts.degraded,
            facts=facts,
            jobs_done=int(metrics.get("xicon_jobs_total")),
            last_error=metrics.last_error or None,
        )
        return answer | {"metrics": metrics.numbers()}


def _shown(timings: Mapping[str, float]) -> dict[str, float]:
    return {stage: seconds for stage, seconds in timings.items() if stage not in _UNSTAGED}


def _device_lost(error: Exception) -> XiconError:
    found = XiconError(
        "The GPU failed during the job; a fresh worker takes over, send the request again",
        code="GPU_ERROR",
    )
    found.__cause__ = error
    return found

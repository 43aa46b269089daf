"""Makes a worker ready: leftovers are removed, needs are checked, weights loaded and run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from xicon_infer.checks import CheckNeeds, needs_of, ready_modes, require, run_checks
from xicon_infer.checks_weights import entries_of
from xicon_infer.job import Job
from xicon_infer.media.deliver import BucketConfig, check_bucket
from xicon_infer.media.deliver_volume import remove_leftovers
from xicon_infer.media.fetch_folder import clean_leftovers
from xicon_infer.ops.attention import probe_backends
from xicon_infer.request import RequestContext
from xicon_infer.runtime import download_dir, models_dirs
from xicon_infer.service import run_job
from xicon_infer.settings import Settings
from xicon_infer.types import Progress, Result, SilentProgress
from xicon_infer.weights.download import pull
from xicon_infer.worker import Worker
from xicon_infer.worker_context import Inputs, build_context
from xicon_infer.worker_files import files_of
from xicon_infer.worker_job import Parts, RealJobs
from xicon_infer.worker_log import Bridge
from xicon_infer.worker_machine import usage
from xicon_infer.worker_moderation import load_judge
from xicon_infer.worker_refresh import RefreshPolicy
from xicon_infer.worker_session import WatchedSession
from xicon_infer.worker_start import Tools
from xicon_infer.worker_warm import warm, warm_modes, warm_shape


def prepare(settings: Settings, tools: Tools) -> Worker:
    """Returns a worker with its weights loaded and run once.

    Raises:
        XiconError: it cannot work; the message says why.
    """
    for name in ("xicon_infer", "pipelines"):
        logging.getLogger(name).addHandler(Bridge(tools.log))
    removed = tools.timed("clean", lambda: clean_leftovers(settings.tmp))
    if settings.output_dir is not None:
        removed += remove_leftovers(settings.output_dir)
    if removed:
        tools.log.event("start.cleaned", removed=removed)
    judge = load_judge(settings.moderation)
    explicit = settings.models_dir[0] if settings.models_dir else None
    search_dirs = models_dirs(explicit)
    inputs = Inputs(settings.input_roots)
    files = files_of(settings, inputs)
    needs = needs_of(settings, search_dirs, bucket=_bucket_check(settings, files.bucket))
    modes: Sequence[str] = settings.modes
    degraded: tuple[str, ...] = ()
    if not tools.dry:
        if settings.download:
            entries = [entry for sets in needs.modes.values() for entry in entries_of(sets)]
            folder = download_dir(explicit)
            tools.timed("download", lambda: pull(entries, folder, progress=SilentProgress()))
        modes, degraded = _checked(needs, tools)
    session = WatchedSession()

    def run(job: Job, progress: Progress) -> Result:
        return run_job(job, progress, session)

    kernels = tools.timed("kernels", lambda: tuple(p.name for p in probe_backends() if p.available))
    gpu = torch.cuda.is_available()
    for mode in () if tools.dry else warm_modes(settings, modes):
        shape = warm_shape(mode, gpu=gpu)
        tools.timed(f"warm {mode}", partial(warm, mode, settings, run, shape=shape))

    has = tools.timed("context", lambda: build_context(settings, search_dirs, modes))

    def context(event: Mapping[str, Any]) -> RequestContext:
        return replace(has, input_files=frozenset(inputs.look(event)))

    policy = RefreshPolicy(
        always=settings.refresh_worker, max_jobs=settings.max_jobs, usage=usage(settings.tmp)
    )
    if session.loaded:
        policy.settle(session.loaded)
    parts = Parts(
        settings=settings,
        files=files,
        session=session,
        run=run,
        context=context,
        refresh=policy,
        log=tools.log,
        metrics=tools.metrics,
        judge=judge,
        kernels=kernels,
        degraded=degraded,
        modes=modes,
        clock=tools.clock,
    )
    return Worker(
        RealJobs(parts),
        log=tools.log,
        metrics=tools.metrics,
        limits=tools.limits,
        send=tools.send,
        clock=tools.clock,
        signals=True,
    )


def _checked(needs: CheckNeeds, tools: Tools) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the modes that can run here, and what is less than it should be.

    Raises:
        BackendUnavailable: something that every job needs is missing.
    """
    results = tools.timed("checks", lambda: run_checks(needs))
    for one in results:
        level = "INFO" if one.state == "ok" else "WARNING"
        tools.log.event("start.check", level=level, check=one.name, state=one.state, text=one.text)
    require(results)
    amiss = tuple(f"{one.name}: {one.text}" for one in results if one.state != "ok")
    return ready_modes(needs, results), amiss


def _bucket_check(settings: Settings, bucket: BucketConfig | None) -> Callable[[], None] | None:
    """Returns what tries the bucket; None where there is none, or it shall not be tried."""
    if bucket is None or settings.bucket_skip_check:
        return None

    def check() -> None:
        check_bucket(bucket)

    return check

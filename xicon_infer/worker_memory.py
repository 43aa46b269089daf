"""Out of memory in a job: free, take a lower plan, and begin the job again with the same seed.

At most twice; then the error goes to the client with what would fit. The first plans give the
same picture with less memory; tiles and a smaller context window change it, and are told.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from xicon_infer.errors import OutOfMemory
from xicon_infer.job import Job
from xicon_infer.types import Result

RETRIES = 2
_WINDOW_STEP = 16
_SMALLEST_WINDOW = 17

LowerJob = Callable[[Job, OutOfMemory], "Lowered | None"]


class Lowered:
    """A job that needs less, and a phrase that says how it differs."""

    def __init__(self, job: Job, change: str) -> None:
        self.job = job
        self.change = change


class Told(Protocol):
    """Is told of a fallback."""

    def __call__(self, error: OutOfMemory, change: str) -> None:
        """Takes the error and what is done about it, "" if nothing more can be."""


def lower_job(job: Job, error: OutOfMemory) -> Lowered | None:
    """Returns the job with the next lower plan; None if there is none that helps.

    In order: decoding in tiles; one network at a time on the device; streamed blocks; a context
    window 16 frames smaller, down to 17.
    """
    planned = error.field == "memory" or error.code == "HOST_OOM"
    if job.pipeline == "pose" or planned:  # a plan that was refused before the job began
        return None
    if job.tile is not True:
        return Lowered(replace(job, tile=True), "the video is decoded in tiles")
    if job.memory in ("auto", "resident"):
        swapped = "auto" if job.blocks_to_swap != "auto" else job.blocks_to_swap
        lowered = replace(job, memory="offload", blocks_to_swap=swapped)
        return Lowered(lowered, "one network at a time is on the device")
    if job.memory == "offload":
        lowered = replace(job, memory="stream", blocks_to_swap="auto")
        return Lowered(lowered, "the transformer's blocks come and go")
    frames = max(_SMALLEST_WINDOW, job.context_frames - _WINDOW_STEP)
    if frames == job.context_frames:
        return None
    overlap = min(job.context_overlap, frames - 1)
    lowered = replace(job, context_frames=frames, context_overlap=overlap)
    return Lowered(lowered, f"context windows of {frames} frames, which changes the picture")


def run_with_less(
    job: Job,
    run: Callable[[Job], Result],
    *,
    lower: LowerJob = lower_job,
    free: Callable[[], None],
    tell: Told,
) -> tuple[Result, Job]:
    """Returns the result, and the job as it was run in the end.

    Args:
        job: with its seed drawn, so that every try has the same noise.
        run: makes the video.
        lower: gives the next plan.
        free: gives memory back between two tries.
        tell: told of each time the memory did not suffice.

    Raises:
        OutOfMemory: after two lower plans, or where there is none.
    """
    for attempt in range(RETRIES + 1):
        try:
            return run(job), job
        except OutOfMemory as error:
            lowered = lower(job, error) if attempt < RETRIES else None
            tell(error, lowered.change if lowered else "")
            if lowered is None:
                raise
            _drop_frames(error)
        job = lowered.job
        free()
    raise AssertionError("the last try returns or raises")


def free_memory() -> None:
    """Collects what nothing refers to, and gives the cached blocks of the device back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _drop_frames(error: BaseException | None) -> None:
    """Lets go what the frames of an error hold: the tensors of the try that failed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__

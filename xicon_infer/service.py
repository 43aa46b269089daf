"""Jobs from files to files: read the inputs, run the recipe, write the outputs.

The recipe knows no path; this module knows no network. What each pipeline does between its files
stands in the `service_...` module of its name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xicon_infer.errors import OutOfMemory
from xicon_infer.job import Job
from xicon_infer.ops.attention import choose_backend
from xicon_infer.ops.fused_choice import choose_kernels
from xicon_infer.runtime import Recorder, keep_compiled_kernels, pick_device, pick_dtype
from xicon_infer.service_dancer import run_dancer_job
from xicon_infer.service_pose import run_pose_job
from xicon_infer.service_scail import run_scail_job
from xicon_infer.service_session import Session
from xicon_infer.service_wan import run_wan_job
from xicon_infer.types import Progress, Result

HEAD_DIM = 128
"""Of every published transformer and of the tiny ones."""


def run_job(job: Job, progress: Progress, session: Session | None = None) -> Result:
    """Returns what was made; the files lie at `job.outputs()`.

    Args:
        job: from `xicon_infer.job.make_job`.
        progress: told of every stage, step and warning; may raise to stop.
        session: keeps the networks for the next job; None lets them go.

    Raises:
        XiconError: of the kind that fits; nothing is left half-written.
    """
    keep_compiled_kernels()
    device = pick_device(job.device)
    recorder = Recorder(progress, device)
    for warning in job.warnings:
        recorder.warn(warning)
    if job.pipeline != "pose":  # a kernel that is not there is found before minutes of loading
        dtype = pick_dtype(job.dtype, device)
        choose_backend(job.attention, device, dtype, HEAD_DIM)
        choose_kernels(job.kernels, device, dtype)
    session = session or Session()
    try:
        return _run(job, recorder, device, session)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(
            f"{device} has not enough memory for {job.width}x{job.height}: {error}. Use fewer "
            "frames (--max-frames), a smaller size, or --preset fp8"
        ) from error
    finally:
        session.settle()


def run_jobs(jobs: Sequence[Job], progress: Progress) -> list[Result]:
    """Returns what was made of several jobs, for example one dance with several characters.

    The networks are loaded once where the jobs need the same; the prompt, the drawn pose and the
    poses found in a video are encoded and found once.

    Args:
        jobs: done one after the other.
        progress: told of every stage of each.

    Raises:
        XiconError: the first that occurs; the files of the jobs before it are complete.
    """
    session = Session()
    return [run_job(job, progress, session) for job in jobs]


def _run(job: Job, recorder: Recorder, device: torch.device, session: Session) -> Result:
    if job.pipeline == "pose":
        return run_pose_job(job, recorder, device, session.pose_models)
    if job.pipeline == "scail":
        return run_scail_job(job, recorder, device, session)
    if job.pipeline == "steady_dancer":
        return run_dancer_job(job, recorder, device, session)
    return run_wan_job(job, recorder, device, session)

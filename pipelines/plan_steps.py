"""What every sampling step of a job evaluates, per pipeline. Loads no torch."""

from __future__ import annotations

from pipelines.plan_types import StepPlan
from pipelines.steady_dancer_plan import Guidance
from xicon_infer import formulas
from xicon_infer.formulas import DitShape
from xicon_infer.job import Job
from xicon_infer.sampling.cache_options import CacheOptions, variant_of
from xicon_infer.sampling.schedule import make_schedule
from xicon_infer.sampling.windows import ContextOptions, weighted_windows
from xicon_infer.types import latent_frames


def plan_steps(
    job: Job, dit: DitShape, width: int, height: int, num_frames: int
) -> tuple[StepPlan, ...]:
    """Returns what every sampling step will evaluate.

    Args:
        job: the job.
        dit: its transformer.
        width: of the result, pixels.
        height: of the result, pixels.
        num_frames: F of the result.

    Raises:
        InvalidRequest: the sampler cannot make so many steps.
    """
    schedule = make_schedule(job.scheduler, job.num_inference_steps, job.shift)
    context, frames = context_of(job), latent_frames(num_frames)
    hw = formulas.frame_tokens(width, height)
    steps = []
    for index, timestep in enumerate(schedule.timesteps):
        windows = [frames]
        if context.active(num_frames):
            windows = [len(window) for window in weighted_windows(context, index, frames)[0]]
        pose, reference = _present(job, index)
        tokens = [_tokens(job, n, hw, pose=pose, reference=reference) for n in windows]
        branches = _branches(job, index)
        flops = branches * sum(formulas.forward_flops(dit, count) for count in tokens)
        steps.append(
            StepPlan(
                timestep=float(timestep),
                windows=tuple(windows),
                pose=pose,
                reference=reference,
                tokens=max(tokens),
                forwards=branches * len(windows),
                flops=flops,
            )
        )
    return tuple(steps)


def context_of(job: Job) -> ContextOptions:
    """Returns how a long video is cut into windows."""
    return ContextOptions(
        schedule=job.context_schedule,
        frames=job.context_frames,
        stride=job.context_stride,
        overlap=job.context_overlap,
        freenoise=job.freenoise,
        fuse=job.fuse_method,
    )


def cache_of(job: Job) -> CacheOptions:
    """Returns which steps may be skipped; "auto" is what is usual for the method."""
    threshold, start = job.step_cache_threshold, job.step_cache_start
    return CacheOptions(
        method=job.step_cache,
        threshold=None if threshold == "auto" else threshold,
        start=None if start == "auto" else start,
        end=job.step_cache_end,
        variant=variant_of(job.pipeline, job.transformer.name if job.transformer else job.preset),
    )


def most_branches(job: Job) -> int:
    """Returns the most forward passes that a step has, for one window."""
    return max(_branches(job, step) for step in range(job.num_inference_steps))


def guidance_of(job: Job) -> Guidance:
    """Returns what pulls the result of SteadyDancer, and in which steps."""
    return Guidance(
        guidance_scale=job.guidance_scale,
        condition_guide_scale=job.condition_guide_scale,
        st_cond_cfg=job.st_cond_cfg,
        end_cond_cfg=job.end_cond_cfg,
        pose_start=job.pose_start,
        pose_end=job.pose_end,
    )


def _present(job: Job, step: int) -> tuple[bool, bool]:
    """Returns whether the tokens of pose and reference are there in a step."""
    share = step / job.num_inference_steps
    if job.pipeline == "scail":
        return job.pose_start <= share <= job.pose_end, job.ref_start <= share <= job.ref_end
    if job.pipeline == "steady_dancer":
        acts = guidance_of(job).poses(step, job.num_inference_steps)
        return acts, acts
    return False, False


def _tokens(job: Job, frames: int, hw: int, *, pose: bool, reference: bool) -> int:
    if job.pipeline == "scail":
        return formulas.scail_tokens(frames, hw, pose=pose, reference=reference)
    if job.pipeline == "steady_dancer" and pose:
        return formulas.steady_dancer_tokens(frames, hw)
    return formulas.wan_tokens(frames, hw)


def _branches(job: Job, step: int) -> int:
    """Returns the forward passes of a step, for one window."""
    if job.pipeline == "steady_dancer":
        return len(guidance_of(job).branches(step, job.num_inference_steps))
    return 2 if job.guided else 1

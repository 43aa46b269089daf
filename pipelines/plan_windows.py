"""What the options of windows and of the step cache do in a video of a given length. No torch.

The recipes and the plan of a job tell the same: which options have no effect in it.
"""

from __future__ import annotations

from xicon_infer.sampling.cache_options import KEPT_TENSORS, CacheOptions
from xicon_infer.sampling.windows import ContextOptions, weighted_windows
from xicon_infer.types import latent_frames

STILL = "static_standard"
"""The schedule whose windows are the same in every step."""

_NAMES = {
    "stride": "context_stride",
    "overlap": "context_overlap",
    "freenoise": "freenoise",
    "fuse": "fuse_method",
}


def one_window(context: ContextOptions, num_frames: int) -> bool:
    """Returns True if a video of F pixel frames is a single window."""
    return latent_frames(num_frames) <= context.latents().frames


def cache_works(cache: CacheOptions, context: ContextOptions, num_frames: int) -> bool:
    """Returns True if a step cache can skip steps of a video.

    It keeps what a window made for the same window of a later step, and windows that move from
    step to step do not come again.
    """
    return cache.active and (one_window(context, num_frames) or context.schedule == STILL)


def cached_tokens(
    cache: CacheOptions, context: ContextOptions, num_frames: int, frame_tokens: int
) -> int:
    """Returns how many tokens a step cache keeps for one branch of the guidance.

    Args:
        cache: of the job.
        context: how the video is cut.
        num_frames: F of the result.
        frame_tokens: of one latent frame.
    """
    if not cache_works(cache, context, num_frames):
        return 0
    frames = latent_frames(num_frames)
    if not one_window(context, num_frames):
        frames = sum(len(window) for window in weighted_windows(context, 0, frames)[0])
    return KEPT_TENSORS[cache.method] * frames * frame_tokens


def idle_options(
    context: ContextOptions,
    num_frames: int,
    cache: CacheOptions | None = None,
    anchor: tuple[str, str] | None = None,
) -> list[str]:
    """Returns a warning for each option that was changed and does nothing in this video.

    Args:
        context: how long videos are cut.
        num_frames: F of the result.
        cache: of the job.
        anchor: what later windows start with, and the default of that; None where there is no such
            option.
    """
    found = []
    if cache is not None and cache.active and not cache_works(cache, context, num_frames):
        found.append(
            f"'step_cache' {cache.method} has no effect: the windows of {context.schedule} move "
            f"from step to step, so that no step of one comes again; use 'context_schedule' {STILL}"
        )
    if not one_window(context, num_frames):
        return found
    usual = ContextOptions()
    changed = [
        option
        for attribute, option in _NAMES.items()
        if getattr(context, attribute) != getattr(usual, attribute)
    ]
    if context.schedule != usual.schedule and not (context.looped and context.active(num_frames)):
        changed.insert(0, "context_schedule")
    if context.frames != usual.frames and one_window(usual, num_frames):
        changed.append("context_frames")
    if anchor is not None and anchor[0] != anchor[1]:
        changed.append("window_anchor")
    why = f"{num_frames} frames are one window of {context.frames}"
    return [*found, *(f"'{option}' has no effect: {why}" for option in changed)]

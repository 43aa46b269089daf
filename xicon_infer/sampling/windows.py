"""Context windows: a long video as overlapping clips, predicted one by one and fused.

Every step of the sampler gets its own list of windows, so that their edges do not show. Numbers
are latent frames, except in `ContextOptions`, which takes pixel frames as users give them.
This module needs neither torch nor numpy.

Differs from the reference in four guards. With a stride above one latent frame, a window can
leave the video: the reference stops there, here such a window becomes consecutive frames moved
inside. Or no window shows some frame, which gives 0 / 0 there: here a window around it is added
(example: 100 frames, context 49, stride 8, overlap 16, step 4, latent frame 1). A frame
whose weights are all 0 gives 0 / 0 too: here no weight is below `MIN_WEIGHT`. An overlap of less
than one latent frame breaks the ramps of the reference and is refused.

Source: rookiestar28/ComfyUI-WanVideoWrapper: context_windows/context.py, nodes_sampler.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from xicon_infer.errors import InvalidRequest
from xicon_infer.types import CONTEXT_SCHEDULES, FUSE_METHODS, TEMPORAL_STRIDE, latent_frames

Window = list[int]
"""Latent frame indices, in the order the model sees them."""

MIN_WEIGHT = 1e-8
"""Vanishes beside any other weight in float32, and decides alone where there is none."""


@dataclass(frozen=True)
class LatentContext:
    """`ContextOptions` in latent frames."""

    frames: int
    stride: int
    overlap: int


@dataclass(frozen=True)
class ContextOptions:
    """How a long video is cut, in PIXEL frames.

    schedule: "uniform_standard" (windows move from step to step), "static_standard" (they stay;
    8 to 30 % less work, another result), "uniform_looped" (the video is a loop). frames: length
    of a window. stride: largest distance of two frames of a window; 4 = neighbours in latents,
    and less means the same. overlap: frames shared by two windows. freenoise: shuffle the
    initial noise (`xicon_infer.sampling.noise.freenoise`). fuse: "linear" or "pyramid" weights.

    Raises:
        InvalidRequest: a value that cannot be used.
    """

    schedule: str = "uniform_standard"
    frames: int = 81
    stride: int = 4
    overlap: int = 16
    freenoise: bool = True
    fuse: str = "linear"

    def __post_init__(self) -> None:
        """Refuses what the windows cannot be made from."""
        _check_choice("context_schedule", self.schedule, CONTEXT_SCHEDULES)
        _check_choice("fuse_method", self.fuse, FUSE_METHODS)
        if self.stride < 1:
            raise _out_of_range("context_stride", f"must be at least 1, got {self.stride}")
        if self.overlap < TEMPORAL_STRIDE:
            raise _out_of_range(
                "context_overlap",
                f"must be at least {TEMPORAL_STRIDE} (one latent frame), got {self.overlap}",
            )
        if self.overlap >= self.frames:
            raise _out_of_range(
                "context_overlap",
                f"must be smaller than 'context_frames' ({self.frames}), got {self.overlap}",
            )

    @property
    def looped(self) -> bool:
        """Returns True if windows wrap from the last frame to the first."""
        return self.schedule == "uniform_looped"

    def latents(self) -> LatentContext:
        """Returns the same options in latent frames."""
        stride = max(1, self.stride // TEMPORAL_STRIDE)
        overlap = self.overlap // TEMPORAL_STRIDE
        return LatentContext(frames=latent_frames(self.frames), stride=stride, overlap=overlap)

    def active(self, num_frames: int) -> bool:
        """Returns True if a video of that many pixel frames is cut into windows.

        Args:
            num_frames: as requested, before it is rounded to 4 n + 1.
        """
        return self.frames <= num_frames


def weighted_windows(
    options: ContextOptions, step: int, num_latent_frames: int
) -> tuple[list[Window], list[list[float]]]:
    """Returns the windows of a step, and the fuse weights of each window's frames.

    Args:
        options: must be `active`.
        step: index in this run, from 0.
        num_latent_frames: T of the whole video.
    """
    context = options.latents()
    found = windows(
        options.schedule, step, num_latent_frames, context.frames, context.stride, context.overlap
    )
    weights = [
        window_weights(
            window, num_latent_frames, context.overlap, options.fuse, looped=options.looped
        )
        for window in found
    ]
    return found, weights


def windows_per_step(options: ContextOptions, num_frames: int, num_steps: int) -> list[int]:
    """Returns how many windows each step predicts, for planning: all 1 if not `active`."""
    if not options.active(num_frames):
        return [1] * num_steps
    total = latent_frames(num_frames)
    return [len(weighted_windows(options, step, total)[0]) for step in range(num_steps)]


def windows(
    schedule: str, step: int, latent_frames: int, context: int, stride: int, overlap: int
) -> list[Window]:
    """Returns the windows of one step; together they cover every frame.

    Args:
        schedule: from `CONTEXT_SCHEDULES`.
        step: index in this run, from 0; ignored by static_standard.
        latent_frames: T of the whole video, at least 1.
        context: frames of a window, at least 2.
        stride: passes with frames 1, 2, 4, ... apart, at least 1; ignored by static_standard.
        overlap: frames two windows share, 1 to context - 1.

    Raises:
        InvalidRequest: an unknown schedule.
    """
    _check_choice("context_schedule", schedule, CONTEXT_SCHEDULES)
    if latent_frames <= context:
        return [list(range(latent_frames))]
    if schedule == "static_standard":
        starts = [*range(0, latent_frames - context, context - overlap), latent_frames - context]
        return [list(range(start, start + context)) for start in starts]
    found = _wrapping_windows(step, latent_frames, context, stride, overlap)
    if schedule == "uniform_looped":
        return found
    found = _unrolled(found, latent_frames, context)
    for frame in range(latent_frames):
        if not any(frame in window for window in found):
            start = min(max(0, frame - context // 2), latent_frames - context)
            found.append(list(range(start, start + context)))
    return found


def window_weights(
    window: Window, latent_frames: int, overlap: int, fuse: str, *, looped: bool = False
) -> list[float]:
    """Returns the fuse weight of each frame of a window, `MIN_WEIGHT` to 1.

    Args:
        window: from `windows`.
        latent_frames: T of the whole video.
        overlap: length of the ramps, at least 1.
        fuse: "linear": 1 with ramps at the inner ends; "pyramid": rising to the middle.
        looped: ramps also where the video's first frame follows its last.
    """
    first, last = min(window) == 0, max(window) == latent_frames - 1
    overlap = min(overlap, len(window))
    rise = _ramp(overlap)
    if fuse == "pyramid":
        weights = _pyramid(len(window))
        if first and not looped:
            weights[:overlap] = map(max, weights[:overlap], rise)
        if last and not looped:
            # linspace(1, 0) of one value is 1, unlike linspace(0, 1).
            weights[-overlap:] = map(max, weights[-overlap:], _fall(overlap))
    else:
        weights = [1.0] * len(window)
        if not first or (looped and last):
            weights[:overlap] = rise
        if not last or (looped and first):
            weights[-overlap:] = _fall(overlap)
    return [max(weight, MIN_WEIGHT) for weight in weights]


def _wrapping_windows(
    step: int, total: int, context: int, stride: int, overlap: int
) -> list[Window]:
    """Returns windows that start at a place that depends on the step and wrap around the end."""
    levels = min(stride, math.ceil(math.log2(total / context)) + 1)
    offset = _halving(step)
    pad = round(total * offset)
    found = []
    for gap in (2**level for level in range(levels)):
        starts = range(int(offset * gap) + pad, total + pad, context * gap - overlap)
        found += [[(start + gap * i) % total for i in range(context)] for start in starts]
    return found


def _halving(step: int) -> float:
    """Returns 0, 1/2, 1/4, 3/4, 1/8, ...: the 64 bits of the step, reversed, over 2^64."""
    return int(f"{step:064b}"[::-1], 2) / 2**64


def _unrolled(found: list[Window], total: int, context: int) -> list[Window]:
    """Returns the windows with each that wraps moved to the end, and the gap it leaves filled.

    The list is walked while it grows, as in the reference: whether the next window holds the
    frame at which this one wrapped is asked before that next window is moved itself.
    """
    pending = [list(window) for window in found]
    index = 0
    while index < len(pending):
        window = pending[index]
        wrapped = next((b for a, b in pairwise(window) if b < a), None)
        if wrapped is not None:
            shifted = [(frame - window[0]) % total for frame in window]
            moved = [frame + total - 1 - shifted[-1] for frame in shifted]
            pending[index] = moved if max(moved) < total else list(range(total - context, total))
            if wrapped not in pending[(index + 1) % len(pending)]:
                # Inside the video: wrapped is below the stride 2^k < 2 total / context, hence at
                # most total - context.
                pending.insert(index + 1, list(range(wrapped, wrapped + context)))
        index += 1
    return [window for i, window in enumerate(pending) if window not in pending[:i]]


def _ramp(length: int) -> list[float]:
    return [i / max(1, length - 1) for i in range(length)]


def _fall(length: int) -> list[float]:
    return [1 - value for value in _ramp(length)]


def _pyramid(length: int) -> list[float]:
    """Returns 1, 2, ... up to the middle and down again, over the largest."""
    peak = (length + 1) // 2
    return [min(i + 1, length - i) / peak for i in range(length)]


def _check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidRequest(
            f"'{field}' must be one of {', '.join(allowed)}, got {value!r}",
            field=field,
            code="INVALID_CHOICE",
        )


def _out_of_range(field: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"'{field}' {problem}", field=field, code="OUT_OF_RANGE")

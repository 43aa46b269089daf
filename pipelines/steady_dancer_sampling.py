"""How SteadyDancer is sampled: what each branch and each window is told, and how they are combined.

A branch is a forward pass with the prompt or the negative one and the pose or the negative one.
Start image, appended frames and CLIP views stay those of the real pose in every branch.

A window of a long video takes its frames of noise, pose and start image. The fused pose is made
from the window's own pose frames, as the model was trained on clips and not on parts of them. The
appended frames are those of the whole video: the reference and the pose that it stands in.

Source: MCG-NJU/SteadyDancer: wan/image2video_dancer.py; for windows
rookiestar28/ComfyUI-WanVideoWrapper: nodes_sampler.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines.passes import Passes, begin_passes, end_passes
from pipelines.steady_dancer_options import SteadyDancerOptions
from pipelines.steady_dancer_plan import Branch, Guidance
from xicon_infer.models.passes import stack_contexts
from xicon_infer.models.steady_dancer import PoseSignal, SteadyDancerTransformer
from xicon_infer.models.wan import Context
from xicon_infer.sampling.denoise import classifier_free, denoise, fused_windows
from xicon_infer.sampling.noise import freenoise, initial_noise
from xicon_infer.sampling.schedule import make_schedule
from xicon_infer.sampling.windows import weighted_windows
from xicon_infer.types import Progress, pixel_frames

BATCHED_TOKENS = 8192
"""Noise tokens up to which all branches of a step share one forward pass."""

KEPT_WINDOWS = 8
"""Windows whose inputs are kept; 27 MB each at 480 x 832 and 81 frames. 481 frames have 7."""


@dataclass(frozen=True)
class SteadyDancerConditioning:
    """What the transformer is told, in its own terms; computed once per job.

    with_prompt, without_prompt: text and pictures; the second is None without guidance. start:
    mask and start image [1, 20, T, h, w]. reference, first_pose: tokens of the appended frames
    [1, n, D]. pose, negative_pose: latents [1, 16, T, h, w]; the second is None if no step uses it.
    """

    with_prompt: Context
    without_prompt: Context | None
    start: Tensor
    reference: Tensor
    first_pose: Tensor
    pose: Tensor
    negative_pose: Tensor | None


class WindowInputs(NamedTuple):
    """What a window is told: its start image, and the pose signals of its branches."""

    start: Tensor
    signals: dict[Branch, PoseSignal]


Branches = Callable[[Tensor, Tensor, int, "list[int] | None"], "dict[Branch, Tensor]"]
"""(latents, timestep [1], step, frames of the window or None) -> velocity of every branch."""


def sample(
    transformer: SteadyDancerTransformer,
    conditioning: SteadyDancerConditioning,
    options: SteadyDancerOptions,
    progress: Progress,
    facts: dict[str, Any] | None = None,
) -> Tensor:
    """Returns clean latents float32 [1, 16, T, H / 8, W / 8], as large as the pose.

    `facts` of the report get what the step cache did.
    """
    noise, generator = initial_noise(options.seed, conditioning.pose.shape[1:])
    windowed = is_windowed(conditioning, options)
    if windowed and options.context.freenoise:
        cut = options.context.latents()
        noise = freenoise(noise, cut.frames, cut.overlap, generator)
    schedule = make_schedule(options.scheduler, options.num_inference_steps, options.shift)
    windows = (options.context, pixel_frames(conditioning.pose.shape[2]))
    passes = begin_passes(transformer, schedule, options.step_cache, windows, progress)
    latents = denoise(
        make_predict(transformer, conditioning, options, passes),
        noise[None].to(transformer.device),
        schedule,
        generator=generator,
        progress=progress,
    )
    end_passes(passes, options.step_cache, progress, facts)
    return latents


def is_windowed(conditioning: SteadyDancerConditioning, options: SteadyDancerOptions) -> bool:
    """Returns whether the video is cut into windows."""
    return options.context.active(pixel_frames(conditioning.pose.shape[2]))


def make_predict(
    transformer: SteadyDancerTransformer,
    conditioning: SteadyDancerConditioning,
    options: SteadyDancerOptions,
    passes: Passes | None = None,
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Returns `predict(latents, timestep, step) -> velocity` for the sampling loop.

    With windows, every window of a step sees the same latents; the velocities are blended.
    `passes` are what all passes of the run share.
    """
    shared = passes or Passes()
    branches = make_branches(transformer, conditioning, options, shared)
    windowed, guidance = is_windowed(conditioning, options), options.guidance

    def predict(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        if not windowed:
            return combine(branches(latents, timestep, step, None), guidance)
        found, weights = weighted_windows(options.context, step, latents.shape[2])
        return fused_windows(
            lambda part, window: combine(branches(part, timestep, step, window), guidance),
            latents,
            found,
            weights,
            on_window=shared.on_window,
        )

    return predict


def combine(velocities: Mapping[Branch, Tensor], guidance: Guidance) -> Tensor:
    """Returns u + g (c - u) + k (c - n), float32; a branch that is not there adds nothing.

    Args:
        velocities: c "prompt", u "no_prompt" and n "no_pose", of one shape.
        guidance: g and k.
    """
    cond = velocities["prompt"].float()
    total = cond
    if "no_prompt" in velocities:
        total = classifier_free(cond, velocities["no_prompt"], guidance.guidance_scale)
    if "no_pose" in velocities:
        away = cond - velocities["no_pose"].float()
        total = total + guidance.condition_guide_scale * away
    return total


def make_branches(
    transformer: SteadyDancerTransformer,
    conditioning: SteadyDancerConditioning,
    options: SteadyDancerOptions,
    passes: Passes | None = None,
) -> Branches:
    """Returns what predicts every branch of a step, together or one after the other."""
    shared = passes or Passes()
    guidance, steps = options.guidance, options.num_inference_steps
    batched = batch_guidance(conditioning, options)
    kept: dict[tuple[int, ...], WindowInputs] = {}
    # Stacked once: keys and values of a 14B model are 0.6 GB.
    stacked: dict[tuple[Branch, ...], Context] = {}

    def inputs_of(window: list[int] | None) -> WindowInputs:
        key = tuple(window or ())
        if key not in kept:
            if len(kept) >= KEPT_WINDOWS:  # the windows of most schedules move at every step
                kept.clear()
            kept[key] = window_inputs(transformer, conditioning, options, window)
        return kept[key]

    def predict(
        latents: Tensor, timestep: Tensor, step: int, window: list[int] | None
    ) -> dict[Branch, Tensor]:
        names = guidance.branches(step, steps)
        start, signals = inputs_of(window)
        groups = [names] if batched else [(name,) for name in names]
        found: list[Tensor] = []
        for group in groups:
            if group not in stacked:
                stacked[group] = stack_branches(conditioning, group)
            pose = None
            if guidance.poses(step, steps):
                pose = stack_signals([signals[name] for name in group])
            velocity = transformer(
                latents.expand(len(group), -1, -1, -1, -1),
                shared.time(step, timestep.expand(len(group))),
                stacked[group],
                start,
                reuse=shared.reuse(step, group, window, pose is None),
                pose=pose,
            )
            found += velocity.chunk(len(group))
        return dict(zip(names, found, strict=True))

    return predict


def batch_guidance(conditioning: SteadyDancerConditioning, options: SteadyDancerOptions) -> bool:
    """Returns whether all branches of a step share one forward pass.

    "auto" says yes for short sequences, which alone do not fill a GPU; for long ones a batch
    only costs memory. EasyCache decides for each branch alone.
    """
    if options.step_cache.method == "easycache":
        return False
    noise_tokens = conditioning.pose[0, 0].numel() // 4
    together = {"batched": True, "sequential": False, "auto": noise_tokens <= BATCHED_TOKENS}
    return together[options.guidance_batching]


def window_inputs(
    transformer: SteadyDancerTransformer,
    conditioning: SteadyDancerConditioning,
    options: SteadyDancerOptions,
    window: list[int] | None,
) -> WindowInputs:
    """Returns what a window is told; None is the whole video.

    With the anchor "first", a window has the mask and the start image where the video has them,
    which is in its first latent frame or nowhere. With "every", as the ComfyUI wrapper does it,
    every window starts with the reference, and its own first pose is appended.
    """
    start = take_frames(conditioning.start, window)
    first_pose = conditioning.first_pose
    if window is not None and options.window_anchor == "every":
        start = torch.cat((conditioning.start[:, :, :1], start[:, :, 1:]), dim=2)
        own = conditioning.pose[:, :, window[0] : window[0] + 1]
        first_pose = transformer.embed_first_pose(own)

    def signal(pose: Tensor) -> PoseSignal:
        fused = transformer.fuse_pose(
            take_frames(pose, window),
            spatial=options.pose_strength * options.pose_strength_spatial,
            temporal=options.pose_strength * options.pose_strength_temporal,
        )
        return PoseSignal(fused, conditioning.reference, first_pose)

    positive = signal(conditioning.pose)
    signals: dict[Branch, PoseSignal] = {"prompt": positive, "no_prompt": positive}
    if conditioning.negative_pose is not None:
        signals["no_pose"] = signal(conditioning.negative_pose)
    return WindowInputs(start, signals)


def take_frames(x: Tensor, window: list[int] | None) -> Tensor:
    """Returns the latent frames of a window, of x [B, C, T, h, w]; a view of neighbours."""
    if window is None:
        return x
    first, count = window[0], len(window)
    if window == list(range(first, first + count)):
        return x.narrow(2, first, count)
    return x.index_select(2, torch.tensor(window).to(x.device, non_blocking=True))


def stack_branches(conditioning: SteadyDancerConditioning, names: tuple[Branch, ...]) -> Context:
    """Returns text and pictures of branches as those of one batch."""
    stacked: Context | None = None
    for name in names:
        context = conditioning.without_prompt if name == "no_prompt" else conditioning.with_prompt
        assert context is not None  # encoded whenever the guidance uses it
        stacked = context if stacked is None else stack_contexts(stacked, context)
    assert stacked is not None
    return stacked


def stack_signals(signals: list[PoseSignal]) -> PoseSignal:
    """Returns the signals of branches as those of one batch."""
    if len(signals) == 1:
        return signals[0]
    return PoseSignal(*(torch.cat(parts) for parts in zip(*signals, strict=True)))

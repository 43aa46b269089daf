"""The sampling loop, guidance, and the fusing of context windows.

The loop knows no model: it is given a callable. It reads nothing back from the device, so the
host runs ahead of it and draws the next noise while the model works.

Shapes: B batch, T latent frames, h and w latent rows and columns. Latents are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from xicon_infer.sampling.noise import step_noise
from xicon_infer.sampling.schedule import Schedule
from xicon_infer.sampling.solvers import make_solver
from xicon_infer.types import Progress

Predict = Callable[[Tensor, Tensor, int], Tensor]
"""(latents [B, 16, T, h, w], timesteps [B], step index) -> velocity like the latents."""

Conditioning = TypeVar("Conditioning")


@torch.no_grad()
def denoise(
    predict: Predict,
    latents: Tensor,
    schedule: Schedule,
    *,
    generator: torch.Generator | None,
    progress: Progress,
    step_noises: Sequence[Tensor] | None = None,
) -> Tensor:
    """Returns the latents after every step of the schedule, float32.

    Args:
        predict: the model with its conditioning; returns noise minus clean latents, any float
            dtype, in buffers it does not use again.
        latents: [B, 16, T, h, w], float32; noise, or what an earlier part of the schedule left.
        schedule: the levels to go through.
        generator: draws the noise of stochastic solvers; None if the solver needs none.
        progress: told after each step; may raise `Cancelled`.
        step_noises: given noise, one per step, instead of the generator's.

    Raises:
        ValueError: the latents are not float32, or the solver needs noise and has no source.
    """
    if latents.dtype != torch.float32:
        raise ValueError(f"latents must be float32, got {latents.dtype}")
    solver = make_solver(schedule)
    if solver.draws_noise and generator is None and step_noises is None:
        raise ValueError(f"{schedule.name} draws noise: pass a generator or step_noises")
    steps = schedule.num_steps
    timesteps = torch.tensor(schedule.timesteps, dtype=torch.float32)[:, None]
    timesteps = timesteps.to(latents.device).expand(steps, latents.shape[0])
    if schedule.initial_scale != 1.0:
        latents = latents * schedule.initial_scale
    for index in range(steps):
        velocity = predict(latents, timesteps[index], index)
        noise = None
        if step_noises is not None:
            noise = step_noises[index]
        elif solver.draws_noise and generator is not None:
            noise = step_noise(generator, latents.shape).to(latents.device, non_blocking=True)
        latents = solver.step(latents, velocity, index, noise)
        progress.step(index + 1, steps)
    return latents


def active_at(step_index: int, num_steps: int, start: float, end: float) -> bool:
    """Returns True if a condition with range [start, end] acts in a step: start <= i / n <= end.

    Both ends count: start 0, end 0.5 and 6 steps give steps 0, 1, 2 and 3.

    Source: rookiestar28/ComfyUI-WanVideoWrapper: nodes_sampler.py (current_step_percentage).
    """
    return start <= step_index / num_steps <= end


def classifier_free(velocity_cond: Tensor, velocity_uncond: Tensor, scale: float) -> Tensor:
    """Returns uncond + scale (cond - uncond), in float32.

    Args:
        velocity_cond: any shape and float dtype; prediction with the prompt.
        velocity_uncond: the same shape; prediction without, or with the negative prompt.
        scale: 1 gives velocity_cond, more follows the prompt closer.
    """
    uncond = velocity_uncond.float()
    return uncond + scale * (velocity_cond.float() - uncond)


def guide(
    predict: Callable[[Tensor, Tensor, Sequence[Conditioning]], Tensor],
    cond: Conditioning,
    uncond: Conditioning | None,
    scale: float,
    *,
    batched: bool = False,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns a function (latents, timesteps) -> guided velocity.

    Args:
        predict: (latents [N B, ...], timesteps [N B], N conditionings) -> velocity [N B, ...],
            the rows of one conditioning together, in order.
        cond: conditioning with the prompt.
        uncond: conditioning without; not looked at, and may be None, if scale is 1.
        scale: guidance scale; 1 runs the model once per step.
        batched: True runs both in one call of two conditionings (faster, twice the activation
            memory), False one after the other. The result is the same.

    Raises:
        ValueError: scale is not 1 and there is no uncond.
    """
    if math.isclose(scale, 1.0):
        return lambda latents, timesteps: predict(latents, timesteps, (cond,))
    if uncond is None:
        raise ValueError(f"a guidance scale of {scale} needs an unconditional branch")
    unguided = uncond

    def both(latents: Tensor, timesteps: Tensor) -> Tensor:
        if batched:
            doubled = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
            with_prompt, without = predict(*doubled, (cond, unguided)).chunk(2)
        else:
            with_prompt = predict(latents, timesteps, (cond,))
            without = predict(latents, timesteps, (unguided,))
        return classifier_free(with_prompt, without, scale)

    return both


def fused_windows(
    predict_window: Callable[[Tensor, list[int]], Tensor],
    latents: Tensor,
    windows: Sequence[list[int]],
    weights: Sequence[Sequence[float]],
    *,
    on_window: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Returns the velocity of the whole video: sum of w v over sum of w, frame by frame.

    Args:
        predict_window: (latents [B, 16, t, h, w], frame indices) -> velocity of that clip. Each
            call sees the same latents: windows do not depend on one another.
        latents: [B, 16, T, h, w], float32.
        windows: frame indices of each window; together they hold every frame.
        weights: fuse weight of each frame of each window, above 0.
        on_window: told (windows done, windows) after each; may raise `Cancelled`.

    Raises:
        ValueError: a frame is in no window.

    Source: rookiestar28/ComfyUI-WanVideoWrapper: nodes_sampler.py. Differs from it: weights are
    divided by their sums beforehand, so one buffer is filled and none is divided.
    """
    shares = _shares(windows, weights, latents.shape[2])
    # One transfer for all windows; .to(non_blocking) does not wait for the device.
    flat = torch.tensor(shares).to(latents.device, non_blocking=True)
    pieces = torch.split(flat[:, None, None], [len(window) for window in windows])
    fused = torch.zeros_like(latents)
    for done, (window, share) in enumerate(zip(windows, pieces, strict=True), start=1):
        start, count = window[0], len(window)
        if window == list(range(start, start + count)):
            velocity = predict_window(latents.narrow(2, start, count), window)
            fused.narrow(2, start, count).add_(velocity.float() * share)
        else:
            index = torch.tensor(window).to(latents.device, non_blocking=True)
            velocity = predict_window(latents.index_select(2, index), window)
            fused.index_add_(2, index, velocity.float() * share)
        if on_window is not None:
            on_window(done, len(windows))
    return fused


def _shares(
    windows: Sequence[list[int]], weights: Sequence[Sequence[float]], num_frames: int
) -> list[float]:
    """Returns every weight over the sum of its frame's weights, window after window."""
    totals = [0.0] * num_frames
    pairs = [
        (frame, weight)
        for window, of_window in zip(windows, weights, strict=True)
        for frame, weight in zip(window, of_window, strict=True)
    ]
    for frame, weight in pairs:
        totals[frame] += weight
    if min(totals) <= 0.0:
        raise ValueError(f"latent frame {totals.index(min(totals))} is in no window")
    return [weight / totals[frame] for frame, weight in pairs]

"""What the tests of the SteadyDancer recipe share: small jobs, poses, and models that watch."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch

from pipelines.steady_dancer import (
    PoseVideos,
    SteadyDancerOptions,
    choose_num_frames,
    encode_conditioning,
    fit_pose,
    fit_reference,
    sample,
)
from xicon_infer.sampling.windows import ContextOptions
from xicon_infer.types import Clip, SilentProgress

# Four steps put step 1 (0.25) between 0.1 and 0.4.
SMALL = SteadyDancerOptions(width=48, height=64, num_inference_steps=4, seed=3)
FAST = replace(
    SMALL,
    scheduler="dpm++_sde",
    guidance_scale=1.0,
    condition_guide_scale=0.0,
    num_inference_steps=2,
)


CONTEXT = ContextOptions(frames=17, overlap=4)
LONG = replace(FAST, context=CONTEXT, num_inference_steps=3)


def clip(frames: int, seed: int, size=(64, 48)) -> Clip:
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, *size, 3), np.uint8)
    return Clip(pixels, Fraction(16))


def poses(frames: int) -> PoseVideos:
    return PoseVideos(clip(frames, 1), clip(frames, 2))


def run(pipeline, image, options=FAST, pose=None, progress=None):
    return pipeline(image, pose or poses(5), options, progress)


@torch.inference_mode()
def told_of(pipeline, image, options, pose=None):
    """Returns the conditioning of a run."""
    pose, quiet = pose or poses(5), SilentProgress()
    reference = fit_reference(image, options)
    count = choose_num_frames(pose, options, quiet)
    size = reference.shape[:2]
    pictures = [fit_pose(pose.positive, count, size, options.pose_fit, quiet)]
    if options.needs_negative_pose:
        pictures.append(fit_pose(pose.negative, count, size, options.pose_fit, quiet))
    return encode_conditioning(pipeline.components, reference, pictures, options, quiet)


@torch.inference_mode()
def latents_of(pipeline, image, options, pose=None):
    """Returns what is sampled; without decoding it is quick, and small changes are seen."""
    told = told_of(pipeline, image, options, pose)
    return sample(pipeline.components.transformer, told, options, SilentProgress())


def assert_differs(first, second):
    assert first.shape == second.shape
    assert (first - second).abs().max() > 1e-4


class Counting(torch.nn.Module):
    """Counts the samples that go through the transformer, and those without a pose."""

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner, self.passes, self.unposed = inner, [], 0
        self.device = inner.device
        for name in ("fuse_pose", "embed_reference", "embed_first_pose", "embed_time"):
            setattr(self, name, getattr(inner, name))

    def forward(self, latents, *args, reuse=None, pose=None):
        self.passes.append(len(latents))
        self.unposed += len(latents) * (pose is None)
        return self.inner(latents, *args, reuse=reuse, pose=pose)


class Watching(Counting):
    """Keeps the start image and the appended pose frame that each window was given."""

    def __init__(self, inner) -> None:
        super().__init__(inner)
        self.seen = []

    def forward(self, latents, timestep, context, start, reuse=None, pose=None):
        self.seen.append((start, pose))
        return self.inner(latents, timestep, context, start, reuse=reuse, pose=pose)

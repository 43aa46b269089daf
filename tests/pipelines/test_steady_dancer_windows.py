"""Long videos of the SteadyDancer recipe: windows, what each is told, and loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.loading import load_tiny
from pipelines.steady_dancer import SteadyDancerPipeline, sample
from tests.pipelines.dancer_cases import (
    CONTEXT,
    FAST,
    LONG,
    SMALL,
    Watching,
    assert_differs,
    latents_of,
    poses,
    run,
    told_of,
)
from xicon_infer.sampling.windows import windows_per_step
from xicon_infer.types import SilentProgress


@pytest.fixture(scope="module")
def pipeline() -> SteadyDancerPipeline:
    return SteadyDancerPipeline(load_tiny("steady_dancer"))


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (70, 50, 3), np.uint8)


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": "static_standard"},
        {"overlap": 8},
        {"frames": 21},
        {"freenoise": False},
        {"fuse": "pyramid"},
        {"stride": 8},
    ],
    ids=str,
)
def test_every_window_option_changes_a_long_video(pipeline, image, change):
    pose = poses(41)
    first = latents_of(pipeline, image, LONG, pose)
    assert first.shape[2] == 11
    other = replace(LONG, context=replace(CONTEXT, **change))
    assert_differs(first, latents_of(pipeline, image, other, pose))


def test_three_windows_with_all_branches(pipeline, image):
    context = replace(CONTEXT, schedule="static_standard")
    options = replace(SMALL, width=32, height=32, context=context)
    assert windows_per_step(options.context, 41, 4) == [3] * 4
    output = run(pipeline, image, options, poses(41))
    assert output.clip.frames.shape == (41, 32, 32, 3)


def test_windows_are_off_for_short_videos(pipeline, image):
    pose = poses(13)
    first = latents_of(pipeline, image, FAST, pose)
    second = latents_of(pipeline, image, replace(FAST, context=CONTEXT), pose)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_loop_has_a_decoded_seam(pipeline, image):
    loop = replace(FAST, width=32, height=32, context=replace(CONTEXT, schedule="uniform_looped"))
    output = run(pipeline, image, loop, poses(33))
    assert len(output.clip.frames) == 36


@pytest.mark.parametrize("anchor", ["first", "every"])
@torch.inference_mode()
def test_where_a_long_video_starts_with_the_reference(pipeline, image, anchor):
    context = replace(CONTEXT, schedule="static_standard")
    options = replace(LONG, context=context, window_anchor=anchor, num_inference_steps=1)
    told = told_of(pipeline, image, options, poses(41))
    model = Watching(pipeline.components.transformer)
    sample(model, told, options, SilentProgress())
    assert len(model.seen) == 3
    masks = [float(start[:, :4, 0].mean()) for start, _ in model.seen]
    assert masks == ([1.0, 0.0, 0.0] if anchor == "first" else [1.0, 1.0, 1.0])
    for start, pose in model.seen:
        assert float(start[:, :4, 1:].abs().max()) == 0.0
        torch.testing.assert_close(pose.reference, told.reference)  # always the reference
    same = [torch.equal(pose.first_pose, told.first_pose) for _, pose in model.seen]
    assert same == ([True] * 3 if anchor == "first" else [True, False, False])


def test_the_anchor_changes_long_videos_alone(pipeline, image):
    pose = poses(41)
    other = replace(LONG, window_anchor="every")
    assert_differs(
        latents_of(pipeline, image, LONG, pose), latents_of(pipeline, image, other, pose)
    )
    short = [replace(FAST, window_anchor=anchor) for anchor in ("first", "every")]
    torch.testing.assert_close(*(latents_of(pipeline, image, o) for o in short), rtol=0, atol=0)

"""The SteadyDancer recipe on tiny components: every option counts, lengths, sizes, windows."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import fields, replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from pipelines.loading import load_tiny
from pipelines.steady_dancer import (
    PoseVideos,
    SteadyDancerOptions,
    SteadyDancerPipeline,
    check_negative_pose,
    fit_pose,
    fit_reference,
    sample,
)
from pipelines.steady_dancer_plan import passes_per_step
from pipelines.steady_dancer_sampling import batch_guidance, make_predict
from tests.pipelines.dancer_cases import (
    FAST,
    SMALL,
    Counting,
    assert_differs,
    clip,
    latents_of,
    poses,
    run,
    told_of,
)
from xicon_infer.errors import Cancelled, InvalidRequest
from xicon_infer.models.vae_tiling import TileOptions
from xicon_infer.sampling.windows import ContextOptions, windows_per_step
from xicon_infer.types import SilentProgress


@pytest.fixture(scope="module")
def pipeline() -> SteadyDancerPipeline:
    return SteadyDancerPipeline(load_tiny("steady_dancer"))


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (70, 50, 3), np.uint8)


def test_the_recipe_is_short():
    lines = inspect.getsource(SteadyDancerPipeline.__call__).splitlines()
    assert len(lines) <= 60


def test_a_video_of_the_right_shape(pipeline, image):
    progress = SilentProgress()
    output = run(pipeline, image, SMALL, progress=progress)
    assert output.clip.frames.shape == (5, 64, 48, 3)
    assert output.clip.frames.dtype == np.uint8
    assert output.clip.fps == Fraction(16)
    assert output.reference.shape == (64, 48, 3)
    np.testing.assert_array_equal(output.pose_frames, poses(5).positive.frames)
    assert output.clip.frames.std() > 1
    assert not progress.warnings


def test_the_same_seed_gives_the_same_video(pipeline, image):
    first, second = (run(pipeline, image).clip.frames for _ in range(2))
    np.testing.assert_array_equal(first, second)


CHANGES = {
    "seed": {"seed": 4},
    "prompt": {"prompt": "a robot waves"},
    "negative_prompt": {"negative_prompt": "blurry"},
    "num_inference_steps": {"num_inference_steps": 5},
    "shift": {"shift": 3.0},
    "scheduler": {"scheduler": "dpm++/official"},
    "guidance_scale": {"guidance_scale": 1.0},
    "condition_guide_scale": {"condition_guide_scale": 2.0},
    "st_cond_cfg": {"st_cond_cfg": 0.3},
    "end_cond_cfg": {"end_cond_cfg": 0.8},
    "pose_strength": {"pose_strength": 0.3},
    "pose_strength_spatial": {"pose_strength_spatial": 0.3},
    "pose_strength_temporal": {"pose_strength_temporal": 0.3},
    "pose_start": {"pose_start": 0.2},
    "pose_end": {"pose_end": 0.6},
    "pose_clip": {"pose_clip": False},
    "clip_preprocess": {"clip_preprocess": "center"},
    "image_fit": {"image_fit": "stretch"},
}


@pytest.fixture(scope="module")
def base(pipeline, image):
    return latents_of(pipeline, image, SMALL)


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_the_video(pipeline, image, base, name):
    assert_differs(base, latents_of(pipeline, image, replace(SMALL, **CHANGES[name])))


def test_every_option_has_such_a_test():
    elsewhere = {"width", "height", "area", "num_frames", "context", "window_anchor", "pose_fit"}
    elsewhere |= {"guidance_batching", "tiles", "step_cache"}
    assert {f.name for f in fields(SteadyDancerOptions)} == set(CHANGES) | elsewhere


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_both_poses_change_the_video(pipeline, image, base, side):
    changed = replace(poses(5), **{side: clip(5, 9)})
    assert_differs(base, latents_of(pipeline, image, SMALL, changed))


def test_the_fits_of_the_pose(pipeline):
    wide = clip(2, 1, size=(30, 90))
    quiet = SilentProgress()
    made = [fit_pose(wide, 2, (64, 48), fit, quiet) for fit in ("crop", "pad", "stretch")]
    for i, first in enumerate(made):
        assert first.shape == (2, 64, 48, 3)
        for second in made[i + 1 :]:
            assert (first != second).any()
    assert (made[1][:, 0] == 0).all()  # what is filled is black, as the canvas of a pose
    with pytest.raises(InvalidRequest, match="'pose_fit' must be one of crop, pad, stretch"):
        replace(SMALL, pose_fit="resize")


def test_tiles_change_the_decoded_video_a_little(pipeline, image):
    base = run(pipeline, image, pose=poses(1)).clip.frames.astype(int)
    tiled = replace(FAST, tiles=TileOptions(4, 4, 3, 3))
    difference = abs(run(pipeline, image, tiled, poses(1)).clip.frames - base)
    assert difference.max() > 0
    assert difference.mean() < 20


@pytest.mark.parametrize("change", [{}, {"guidance_scale": 1.0}, {"condition_guide_scale": 0.0}])
def test_batched_and_sequential_guidance_agree(pipeline, image, change):
    options = replace(SMALL, **change)
    told = told_of(pipeline, image, options)
    transformer = pipeline.components.transformer
    latents, t = torch.randn(1, 16, 2, 8, 6), torch.tensor([500.0])
    for step in (0, 1):
        results = []
        for choice, together in (("batched", True), ("sequential", False), ("auto", True)):
            chosen = replace(options, guidance_batching=choice)
            assert batch_guidance(told, chosen) == together
            with torch.inference_mode():
                results.append(make_predict(transformer, told, chosen)(latents, t, step))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(results[0], results[2])


def test_a_long_sequence_is_not_batched(pipeline, image):
    told = told_of(pipeline, image, SMALL)
    long = replace(told, pose=torch.zeros(1, 16, 21, 60, 104))
    assert not batch_guidance(long, SMALL)


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        ({}, 10),
        ({"guidance_batching": "sequential"}, 10),
        ({"guidance_scale": 1.0}, 10),
        ({"condition_guide_scale": 0.0}, 4),
        ({"guidance_scale": 1.0, "condition_guide_scale": 0.0}, 4),
        ({"pose_end": 0.2}, 10),
        ({"st_cond_cfg": 0.0, "end_cond_cfg": 1.0}, 3),
        ({"context": ContextOptions(frames=9, overlap=4)}, 4),
    ],
    ids=str,
)
@torch.inference_mode()
def test_the_plan_counts_the_passes_that_run(pipeline, image, change, steps):
    options = replace(SMALL, num_inference_steps=steps, **change)
    told = told_of(pipeline, image, options, poses(17))
    counter = Counting(pipeline.components.transformer)
    sample(counter, told, options, SilentProgress())
    per_window = passes_per_step(options.guidance, steps)
    windows = windows_per_step(options.context, 17, steps)
    assert sum(counter.passes) == sum(a * b for a, b in zip(per_window, windows, strict=True))
    without = sum(
        a * b
        for step, (a, b) in enumerate(zip(per_window, windows, strict=True))
        if not options.guidance.poses(step, steps)
    )
    assert counter.unposed == without


def test_nothing_is_encoded_that_no_step_uses(pipeline, image):
    told = told_of(pipeline, image, FAST, PoseVideos(clip(5, 1)))
    assert told.without_prompt is None
    assert told.negative_pose is None


def test_pose_guidance_without_guidance_by_the_prompt(pipeline, image):
    """No reference pipeline has this: two passes inside the window, one outside."""
    alone = replace(SMALL, guidance_scale=1.0)
    assert passes_per_step(alone.guidance, 4) == [1, 2, 1, 1]
    off = replace(alone, condition_guide_scale=0.0)
    assert_differs(latents_of(pipeline, image, alone), latents_of(pipeline, image, off))


def test_a_missing_negative_pose_is_refused(pipeline, image):
    with pytest.raises(InvalidRequest, match="'condition_guide_scale' 1 needs a negative pose"):
        run(pipeline, image, SMALL, PoseVideos(clip(5, 1)))
    with pytest.raises(InvalidRequest, match="'negative_pose' has 4 frames, ") as told:
        run(pipeline, image, SMALL, PoseVideos(clip(5, 1), clip(4, 2)))
    assert told.value.field == "negative_pose"
    run(pipeline, image, replace(FAST, guidance_scale=3.0), PoseVideos(clip(5, 1)))


def test_pose_guidance_that_no_step_reaches_is_told(pipeline):
    progress = SilentProgress()
    options = replace(SMALL, num_inference_steps=2)
    check_negative_pose(PoseVideos(clip(5, 1)), options, progress)
    assert len(progress.warnings) == 1
    assert "none of 2 steps that see the pose lies between 0.1 and 0.4" in progress.warnings[0]


@pytest.mark.parametrize(
    ("available", "requested", "made"),
    [(1, None, 1), (4, None, 1), (5, None, 5), (9, 7, 5), (3, 9, 9), (13, None, 13)],
)
def test_lengths(pipeline, image, available, requested, made):
    progress = SilentProgress()
    options = replace(FAST, num_frames=requested)
    output = run(pipeline, image, options, poses(available), progress)
    assert len(output.clip.frames) == len(output.pose_frames) == made
    assert bool(progress.warnings) == (available != made or (requested or made) != made)
    if made > available:
        np.testing.assert_array_equal(
            output.pose_frames[available:], output.pose_frames[-1:].repeat(made - available, 0)
        )


def test_an_area_takes_the_shape_of_the_reference(pipeline, image):
    output = run(pipeline, image, replace(FAST, area=64 * 64))
    assert output.clip.frames.shape[1:3] == (64, 48)  # 75.7 x 54.1 rounded down
    wide = np.zeros((60, 120, 3), np.uint8)
    output = run(pipeline, wide, replace(FAST, area=64 * 64))
    assert output.clip.frames.shape[1:3] == (32, 80)
    assert output.pose_frames.shape[1:3] == (32, 80)


def test_a_reference_that_keeps_its_aspect_decides_the_size(pipeline):
    wide = np.zeros((60, 120, 3), np.uint8)
    output = run(pipeline, wide, replace(FAST, image_fit="resize"))
    assert output.clip.frames.shape[1:3] == (16, 48)


@torch.inference_mode()
def test_the_first_latents_are_those_of_the_single_pictures(pipeline, image):
    """The VAE is causal: neither the reference nor the first pose is encoded alone."""
    from pipelines.frames import encode_frames

    parts, told = pipeline.components, told_of(pipeline, image, SMALL)
    reference = encode_frames(parts.vae, fit_reference(image, SMALL)[None], SilentProgress())
    first = encode_frames(parts.vae, poses(5).positive.frames[:1], SilentProgress())
    model = parts.transformer
    torch.testing.assert_close(
        told.reference, model.embed_reference(reference), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(told.first_pose, model.embed_first_pose(first), rtol=1e-4, atol=1e-5)
    assert told.start.shape == (1, 20, 2, 8, 6)


def test_cancelling_stops_within_a_step(pipeline, image):
    class Stop(SilentProgress):
        steps = 0

        def step(self, done: int, total: int, unit: str = "step") -> None:
            if unit == "step":
                self.steps += 1
                raise Cancelled("stopped by the test")

    progress = Stop()
    with pytest.raises(Cancelled):
        run(pipeline, image, progress=progress)
    assert progress.steps == 1


def test_what_cannot_be_made_is_refused():
    with pytest.raises(InvalidRequest, match="'width' must be a positive multiple of 16, got 50"):
        SteadyDancerOptions(width=50)
    with pytest.raises(InvalidRequest, match="'num_inference_steps' must be"):
        SteadyDancerOptions(num_inference_steps=0)


def test_stages_are_reported(pipeline, image):
    seen: list[str] = []

    class Watch(SilentProgress):
        @contextmanager
        def stage(self, name: str):
            seen.append(name)
            yield

    run(pipeline, image, progress=Watch())
    assert seen == [
        "fit pose",
        "encode text",
        "encode image",
        "encode image",
        "encode reference and pose",
        "project conditioning",
        "sample",
        "decode video",
    ]

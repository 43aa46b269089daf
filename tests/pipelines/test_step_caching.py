"""Step caches, windows and guidance in every recipe: what is skipped, told and kept apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines import wan_video
from pipelines.loading import load_tiny
from pipelines.scail import ScailOptions, ScailPipeline
from pipelines.steady_dancer import SteadyDancerOptions, SteadyDancerPipeline
from pipelines.wan_video import WanOptions, WanVideoPipeline
from tests.pipelines.dancer_cases import clip, poses
from xicon_infer.errors import InvalidRequest
from xicon_infer.sampling.cache_options import CacheOptions
from xicon_infer.sampling.windows import ContextOptions
from xicon_infer.types import SilentProgress

STEPS = 12
ALL = CacheOptions("magcache", threshold=1.0)
"""Skips as often as it may: four steps in a row."""
STILL = ContextOptions(schedule="static_standard", frames=17, overlap=8, freenoise=False)
PICTURE = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)

SMALL = {
    "scail": ScailOptions(width=32, height=32, num_inference_steps=STEPS, seed=1),
    "steady_dancer": SteadyDancerOptions(
        width=32, height=32, num_inference_steps=STEPS, guidance_scale=1.0, condition_guide_scale=0
    ),
    "wan_t2v": WanOptions(
        width=32, height=32, num_frames=5, num_inference_steps=STEPS, prompt="a fox"
    ),
}
KINDS = {
    "scail": ScailPipeline,
    "steady_dancer": SteadyDancerPipeline,
    "wan_t2v": WanVideoPipeline,
}


@pytest.fixture(scope="module", params=SMALL)
def made(request):
    return request.param, KINDS[request.param](load_tiny(request.param))


def run(made, frames=5, progress=None, **changes):
    """Returns the sampled latents' video and what the report says of the cache."""
    name, pipeline = made
    options = replace(SMALL[name], **changes)
    if name == "wan_t2v":
        output = pipeline(replace(options, num_frames=frames), progress=progress)
    elif name == "scail":
        output = pipeline(PICTURE, clip(frames, 1, (32, 32)), options, progress)
    else:
        output = pipeline(PICTURE, poses(frames), options, progress)
    return output.clip.frames.astype(int), pipeline.components.facts.get("step_cache")


def test_a_cache_skips_passes_changes_the_video_and_is_told(made):
    plain, facts = run(made)
    assert facts is None
    progress = SilentProgress()
    cached, facts = run(made, progress=progress, step_cache=ALL)
    assert (facts["method"], facts["passes"]) == ("magcache", STEPS)
    # Step 0 is outside, 1 is computed, then four of five are skipped. SCAIL computes once more
    # where the pose ends.
    assert facts["skipped"] in (7, 8)
    assert f"{facts['skipped']} of 12 forward passes were skipped" in progress.warnings[-1]
    assert abs(cached - plain).max() > 0
    assert np.array_equal(run(made, step_cache=ALL)[0], cached)  # nothing is left of the run before
    again, facts = run(made)
    assert facts is None
    assert np.array_equal(again, plain)


@pytest.mark.parametrize(
    "change", [{"threshold": 0.01}, {"start": 6}, {"end": 4}, {"method": "easycache", "start": 1}]
)
def test_every_option_of_the_cache_counts(made, change):
    _, facts = run(made, step_cache=ALL)
    _, other = run(made, step_cache=replace(ALL, **change))
    assert facts["skipped"] != other["skipped"]
    assert {name: other[name] for name in change} == change


def test_a_cache_that_never_skips_changes_nothing(made):
    plain, _ = run(made)
    for method in ("magcache", "easycache"):
        cached, facts = run(made, step_cache=CacheOptions(method, threshold=0.0, start=1))
        assert facts["skipped"] == 0
        assert np.array_equal(cached, plain)


def test_branches_decide_and_are_kept_apart(made):
    guided = {"guidance_scale": 3.0, "step_cache": ALL}
    apart, facts = run(made, **guided, guidance_batching="sequential")
    assert facts["passes"] == 2 * STEPS
    together, joined = run(made, **guided, guidance_batching="batched")
    assert joined["passes"] == STEPS
    assert 2 * joined["skipped"] == facts["skipped"]
    assert abs(apart - together).max() <= 2  # of 255: the rounding of a batch of two


def test_windows_are_kept_apart_and_moving_ones_are_not_cached(made):
    long = {"frames": 29, "context": STILL}
    progress = SilentProgress()
    _, facts = run(made, **long, progress=progress, step_cache=ALL)
    assert facts["passes"] == 2 * STEPS  # 8 latent frames in windows of 5
    assert facts["skipped"] * 12 >= 7 * facts["passes"]
    moving = replace(STILL, schedule="uniform_standard")
    progress = SilentProgress()
    cached, facts = run(made, frames=29, context=moving, progress=progress, step_cache=ALL)
    assert facts is None
    assert any("'step_cache' magcache has no effect" in text for text in progress.warnings)
    assert np.array_equal(cached, run(made, frames=29, context=moving)[0])


def test_options_without_effect_in_a_short_video_are_told(made):
    progress = SilentProgress()
    context = ContextOptions(schedule="static_standard", overlap=8, freenoise=False, fuse="pyramid")
    run(made, progress=progress, context=context, num_inference_steps=1)
    told = [text.split("'")[1] for text in progress.warnings if "has no effect" in text]
    assert told == ["context_schedule", "context_overlap", "freenoise", "fuse_method"]
    progress = SilentProgress()
    run(made, progress=progress, num_inference_steps=1)
    assert progress.warnings == []


def test_few_steps_are_refused_before_anything_is_loaded():
    for options in SMALL.values():
        with pytest.raises(InvalidRequest, match="at least 12 steps, got 11"):
            replace(options, num_inference_steps=11, step_cache=ALL)


def test_the_time_of_all_steps_at_once_is_that_of_each(made):
    model = made[1].components.transformer
    steps = torch.tensor([999.0, 500.0, 3.5])
    times = model.embed_time(steps)
    for index in range(3):
        for part, one in zip(times.row(index), model.embed_time(steps[index, None]), strict=True):
            torch.testing.assert_close(part, one, rtol=1e-6, atol=1e-6)


def test_guidance_batching_of_the_easy_cache_is_one_by_one():
    easy = replace(SMALL["wan_t2v"], guidance_scale=3.0, step_cache=CacheOptions("easycache"))
    assert not wan_video.batch_guidance(1, easy)
    assert wan_video.batch_guidance(1, replace(easy, step_cache=ALL))

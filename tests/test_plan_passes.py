"""Options that change how many forward passes a job makes: refused, told, counted in its plan."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.plan import make_plan
from pipelines.plan_memory import workload_of
from pipelines.plan_shapes import sizes_of
from pipelines.plan_stages import batch_of, kept_tokens
from pipelines.plan_steps import cache_of, most_branches, plan_steps
from pipelines.plan_text import format_plan
from tests.job_examples import LEAST
from xicon_infer.errors import InvalidRequest
from xicon_infer.job import Job, make_job

WINDOWS = {
    81: (6, 6),
    97: (13, 12),
    121: (17, 12),
    161: (20, 18),
    193: (21, 18),
    241: (28, 24),
    301: (33, 30),
    361: (39, 36),
    481: (51, 42),
}
"""Frames -> windows of six steps that move, and that stay; performance spec, section 1.3."""

NAMES = ("scail", "steady_dancer", "wan_i2v", "wan_t2v")
CACHED = {"num_inference_steps": 20, "step_cache": "teacache"}


def job_of(name: str = "wan_t2v", **values: Any) -> Job:
    return make_job({"pipeline": name, **LEAST[name], **values})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frames", WINDOWS)
def test_windows_of_every_pipeline_as_published(name: str, frames: int) -> None:
    moving, still = WINDOWS[frames]
    for schedule, total in (("uniform_standard", moving), ("static_standard", still)):
        job = job_of(name, num_inference_steps=6, context_schedule=schedule)
        dit = sizes_of(job, 512, 512, frames).dit
        assert sum(step.forwards for step in plan_steps(job, dit, 512, 512, frames)) == total


def test_a_cache_with_few_steps_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least 12 steps, got 4") as error:
        job_of(step_cache="magcache")
    assert error.value.field == "step_cache"
    assert job_of(step_cache="magcache", profile="quality").step_cache == "magcache"
    with pytest.raises(InvalidRequest, match="each branch alone"):
        job_of(**{**CACHED, "step_cache": "easycache"}, guidance_batching="batched")
    with pytest.raises(InvalidRequest, match="behind the last cached step"):
        job_of(**CACHED, step_cache_start=9, step_cache_end=8)


def test_numbers_of_no_cache_are_told() -> None:
    for name, value in (("threshold", 0.1), ("start", 3), ("end", 3)):
        (warning,) = job_of(**{f"step_cache_{name}": value}).warnings
        assert warning == f"'step_cache_{name}' has no effect without a step cache"


def test_the_options_of_the_cache_reach_the_recipe() -> None:
    job = job_of(**CACHED, step_cache_threshold=0.2, step_cache_start=3, step_cache_end=9)
    cache = cache_of(job)
    assert (cache.method, cache.threshold, cache.start, cache.end) == ("teacache", 0.2, 3, 9)
    usual = cache_of(job_of(**CACHED, preset="1.3b"))
    assert (usual.threshold, usual.start, usual.variant) == (None, None, "1_3B")


def test_the_plan_counts_at_most_and_the_memory_of_the_cache() -> None:
    values = {"num_inference_steps": 20, "num_frames": 81, "width": 832, "height": 480}
    plain, cached = (make_plan(job_of(**{**values, **more})) for more in ({}, CACHED))
    assert cached.forwards == plain.forwards == 20
    assert "work       up to 20 forward passes" in format_plan(cached)
    assert "work       20 forward passes" in format_plan(plain)
    kept = 21 * 1560 * 5120 * 2
    grown = cached.stages[-2].work_bytes - plain.stages[-2].work_bytes
    assert grown == kept
    two = make_plan(job_of(**{**values, "step_cache": "easycache"}))
    assert two.stages[-2].work_bytes - plain.stages[-2].work_bytes == 2 * kept


def test_the_memory_plan_counts_the_cache() -> None:
    def needs(**values: Any) -> int:
        job = job_of(num_frames=161, **{**CACHED, **values})
        sizes = sizes_of(job, 832, 480, 161)
        work = workload_of(
            job,
            sizes,
            "wan_t2v",
            window=81,
            batch=batch_of(job, sizes),
            kept_tokens=kept_tokens(job, sizes),
        )
        return work.kept_tokens

    still = {"context_schedule": "static_standard"}
    assert needs() == 0  # windows that move are not cached
    assert needs(**still) == 3 * 21 * 1560
    assert needs(**still, guidance_scale=4) == 2 * 3 * 21 * 1560
    assert needs(**still, step_cache="none") == 0


def test_three_branches_share_a_pass() -> None:
    job = job_of("steady_dancer", profile="quality", guidance_batching="batched")
    assert (most_branches(job), batch_of(job, sizes_of(job, 480, 832, 81))) == (3, 3)
    two = job_of("scail", guidance_scale=4, guidance_batching="batched")
    assert batch_of(two, sizes_of(two, 512, 896, 81)) == 2
    assert batch_of(job_of(), sizes_of(job_of(), 512, 512, 5)) == 1


def test_options_without_effect_in_a_short_video_are_told_by_the_plan() -> None:
    plan = make_plan(job_of(num_frames=33, context_overlap=32, freenoise=False))
    assert plan.warnings == (
        "'context_overlap' has no effect: 33 frames are one window of 81",
        "'freenoise' has no effect: 33 frames are one window of 81",
    )
    assert make_plan(job_of(num_frames=161, context_overlap=32)).warnings == ()
    assert make_plan(job_of(num_frames=121, context_frames=161)).warnings == ()
    (moving,) = make_plan(job_of(num_frames=161, **CACHED)).warnings
    assert moving.startswith("'step_cache' teacache has no effect: the windows of uniform")


def test_passes_that_no_cache_can_skip_are_counted_exactly() -> None:
    moving = make_plan(job_of(num_frames=161, **CACHED))
    assert not moving.skips
    assert f"work       {moving.forwards} forward passes" in format_plan(moving)
    still = make_plan(job_of(num_frames=161, context_schedule="static_standard", **CACHED))
    assert still.skips
    assert f"work       up to {still.forwards} forward passes" in format_plan(still)


def test_the_plan_says_what_decoding_leaves_out() -> None:
    assert make_plan(job_of()).notes == ()
    (tiny,) = make_plan(job_of(decoder="tiny")).notes
    (chunk,) = make_plan(job_of(vae_chunk=2)).notes
    assert "decoder tiny" in tiny
    assert "'vae_chunk'" in chunk


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"attention": "auto8", "kernels": "eager"}, ""),
        ({"attention": "torch_flash3"}, "attention 'torch_flash3' can run"),
        ({"kernels": "triton"}, "kernels 'triton' can run"),
        ({"attention": "sage", "kernels": "compile"}, "attention 'sage' and kernels 'compile' can"),
    ],
    ids=str,
)
def test_the_plan_says_that_it_asks_no_device(values, told) -> None:
    plan = make_plan(job_of(**values))
    assert [told in note and "doctor" in note for note in plan.notes] == [True] * bool(told)
    assert (told in format_plan(plan)) or not told


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"num_inference_steps": 1, "pose_end": 0.9}, ["pose_end"]),
        ({"num_inference_steps": 1, "pose_start": 0.2}, []),  # no step has the pose
        ({"num_inference_steps": 1, "ref_end": 0.3}, ["ref_end"]),
        ({"num_inference_steps": 6, "pose_end": 0.6}, ["pose_end"]),
        ({"num_inference_steps": 6, "pose_end": 0.7}, []),
        ({"profile": "quality", "pose_end": 0.99}, ["pose_end"]),
        ({"profile": "quality", "pose_end": 0.6}, []),
        ({"context_schedule": "static_standard", "context_stride": 8}, ["context_stride"]),
    ],
)
def test_ranges_that_move_no_step_are_told(values: dict[str, Any], told: list[str]) -> None:
    warnings = job_of("scail", **values).warnings
    assert [text.split("'")[1] for text in warnings] == told

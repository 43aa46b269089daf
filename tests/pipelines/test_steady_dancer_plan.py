"""SteadyDancer in numbers: passes per step, generation sizes, and that they need no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.steady_dancer_plan import (
    AREAS,
    SIZE_MULTIPLE,
    Guidance,
    generation_size,
    output_size,
    passes_per_step,
)
from xicon_infer.errors import InvalidRequest


@pytest.mark.parametrize(
    ("guidance", "steps", "passes"),
    [
        (Guidance(), 40, 91),
        (Guidance(), 50, 114),
        (Guidance(), 4, 9),
        (Guidance(condition_guide_scale=0.0), 40, 80),
        (Guidance(guidance_scale=1.0), 40, 51),
        (Guidance(guidance_scale=1.0, condition_guide_scale=0.0), 4, 4),
        (Guidance(end_cond_cfg=0.5), 40, 95),
        (Guidance(st_cond_cfg=0.2), 40, 87),
        (Guidance(pose_start=0.3), 40, 84),
        (Guidance(pose_end=0.2), 40, 84),
    ],
)
def test_passes(guidance, steps, passes):
    assert sum(passes_per_step(guidance, steps)) == passes


def test_the_window_leaves_both_ends_out():
    third = [step for step, n in enumerate(passes_per_step(Guidance(), 40)) if n == 3]
    assert third == list(range(5, 16))
    # 0 > 0 is false: the first step never has a third pass.
    from_start = Guidance(st_cond_cfg=0.0, end_cond_cfg=1.0)
    assert passes_per_step(from_start, 4) == [2, 3, 3, 3]


def test_the_pose_range_holds_both_ends():
    guidance = Guidance(pose_start=0.25, pose_end=0.5)
    assert [guidance.poses(step, 4) for step in range(4)] == [False, True, True, False]


def test_branches_come_in_the_authors_order():
    assert Guidance().branches(10, 40) == ("prompt", "no_prompt", "no_pose")
    assert Guidance().branches(0, 40) == ("prompt", "no_prompt")


def test_a_negative_pose_is_needed_only_where_a_step_uses_it():
    assert Guidance().needs_negative_pose(40)
    assert not Guidance().needs_negative_pose(2)  # steps at 0 and 0.5
    assert not Guidance(condition_guide_scale=0.0).needs_negative_pose(40)
    assert not Guidance(pose_end=0.1).needs_negative_pose(40)


@given(
    steps=st.integers(1, 60),
    start=st.floats(0, 1),
    end=st.floats(0, 1),
    g=st.sampled_from([1.0, 5.0]),
    k=st.sampled_from([0.0, 1.0]),
)
def test_passes_are_one_to_three(steps, start, end, g, k):
    guidance = Guidance(g, k, start, end)
    passes = passes_per_step(guidance, steps)
    base = 1 + (g != 1.0)
    inside = sum(start < i / steps < end for i in range(steps))
    assert len(passes) == steps
    assert sum(passes) == steps * base + inside * (k != 0.0)


def test_the_authors_rounding():
    """A root comes out below 480."""
    assert generation_size(832, 480, AREAS["832*480"]) == (832, 464)
    assert generation_size(480, 832, AREAS["832*480"]) == (480, 832)


@given(
    width=st.integers(64, 4000),
    height=st.integers(64, 4000),
    area=st.sampled_from([*AREAS.values()]),
)
def test_sizes_are_multiples_near_the_area(width, height, area):
    if max(width, height) > 8 * min(width, height):
        return
    w, h = generation_size(width, height, area)
    assert w % SIZE_MULTIPLE == 0
    assert h % SIZE_MULTIPLE == 0
    assert w * h <= area
    assert (w + SIZE_MULTIPLE) * (h + SIZE_MULTIPLE) > area
    assert abs(w - (area * width / height) ** 0.5) < SIZE_MULTIPLE + 1e-6


@pytest.mark.parametrize("case", [(0, 10, 4096), (10, 10, 0), (10, 0, 4096)])
def test_no_pixels_are_refused(case):
    with pytest.raises(InvalidRequest, match="'area' must be at least 1"):
        generation_size(*case)


def test_a_side_without_pixels_is_refused():
    with pytest.raises(InvalidRequest, match="both sides must be at least 16, use a larger area"):
        generation_size(4000, 10, 4096)


def test_output_size():
    target = (480, 832)
    assert output_size(1000, 1000, target=target, area=None, fit="crop") == target
    assert output_size(1000, 1000, target=target, area=None, fit="resize") == (480, 480)
    assert output_size(1000, 1000, target=target, area=832 * 480, fit="crop") == (624, 624)


def test_the_plan_loads_no_torch():
    code = "import sys, pipelines.steady_dancer_plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

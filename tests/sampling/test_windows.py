"""Context windows: coverage, weights, guards, options."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xicon_infer.errors import InvalidRequest
from xicon_infer.sampling.windows import (
    MIN_WEIGHT,
    ContextOptions,
    weighted_windows,
    window_weights,
    windows,
    windows_per_step,
)
from xicon_infer.types import CONTEXT_SCHEDULES, FUSE_METHODS


@st.composite
def cuts(draw):
    context = draw(st.integers(2, 24))
    return {
        "schedule": draw(st.sampled_from(CONTEXT_SCHEDULES)),
        "step": draw(st.integers(0, 60)),
        "latent_frames": draw(st.integers(1, 130)),
        "context": context,
        "stride": draw(st.integers(1, 4)),
        "overlap": draw(st.integers(1, context - 1)),
    }


@given(cuts())
@settings(max_examples=400, deadline=None)
def test_windows_cover_every_frame_and_stay_inside(cut):
    found = windows(**cut)
    total = cut["latent_frames"]
    assert {frame for window in found for frame in window} == set(range(total))
    assert {len(window) for window in found} == {min(total, cut["context"])}


@given(cuts(), st.sampled_from(FUSE_METHODS))
@settings(max_examples=400, deadline=None)
def test_weights_are_positive_and_at_most_one(cut, fuse):
    looped = cut["schedule"] == "uniform_looped"
    sums = [0.0] * cut["latent_frames"]
    for window in windows(**cut):
        weights = window_weights(window, len(sums), cut["overlap"], fuse, looped=looped)
        assert len(weights) == len(window)
        assert all(MIN_WEIGHT <= weight <= 1 for weight in weights)
        for frame, weight in zip(window, weights, strict=True):
            sums[frame] += weight
    assert min(sums) > 0


@given(cuts())
@settings(max_examples=100, deadline=None)
def test_every_window_of_neighbours_follows_on(cut):
    """With stride 1 a window is one stretch of the video, or of the loop."""
    total = cut["latent_frames"]
    for window in windows(**{**cut, "stride": 1}):
        steps = {(b - a) % total for a, b in pairwise(window)}
        assert steps <= {1}


def test_production_windows_of_the_specification():
    def ends(step, total):
        return [(w[0], w[-1]) for w in windows("uniform_standard", step, total, 21, 1, 4)]

    assert ends(0, 25) == [(0, 20), (4, 24)]
    assert ends(1, 25) == [(4, 24), (0, 20)]
    assert ends(4, 25) == [(3, 23), (4, 24), (0, 20)]
    assert ends(2, 41) == [(10, 30), (20, 40), (0, 20), (3, 23)]
    static = [(w[0], w[-1]) for w in windows("static_standard", 3, 41, 21, 1, 4)]
    assert static == [(0, 20), (17, 37), (20, 40)]


def test_counts_per_step_of_the_specification():
    options = ContextOptions()
    assert windows_per_step(options, 81, 6) == [1] * 6
    assert windows_per_step(options, 121, 6) == [2, 3, 3, 3, 3, 3]
    assert windows_per_step(options, 241, 6) == [4, 5, 5, 5, 4, 5]
    assert windows_per_step(options, 481, 4) == [7, 9, 9, 9]
    assert windows_per_step(options, 80, 2) == [1, 1]
    assert windows_per_step(ContextOptions(schedule="static_standard"), 481, 2) == [7, 7]


def test_a_frame_that_the_reference_leaves_out_is_shown():
    """100 frames, 49/8/16, step 4: no window of the reference holds latent frame 1."""
    found = windows("uniform_standard", 4, 25, 13, 2, 4)
    assert all(1 not in window for window in found[:3])
    assert found[3] == list(range(13))


def test_a_window_that_leaves_the_video_is_moved_inside():
    """81 frames, 49/8/16, step 0: the reference makes frames 17 to 37 of 21, and stops."""
    found = windows("uniform_standard", 0, 21, 13, 2, 4)
    assert found == [list(range(13)), list(range(8, 21))]


def test_linear_ramps_are_at_inner_ends_only():
    third = pytest.approx(1 / 3)
    first = window_weights(list(range(6)), 12, 4, "linear")
    assert first == [1, 1, 1, pytest.approx(2 / 3), third, MIN_WEIGHT]
    last = window_weights(list(range(6, 12)), 12, 4, "linear")
    assert last == pytest.approx(first[::-1])
    assert window_weights(list(range(6)), 6, 4, "linear") == [1] * 6
    looped = window_weights(list(range(6)), 6, 2, "linear", looped=True)
    assert looped == [MIN_WEIGHT, 1, 1, 1, 1, MIN_WEIGHT]


def test_pyramids_rise_to_the_middle():
    assert window_weights([2, 3, 4, 5], 12, 2, "pyramid") == [0.5, 1, 1, 0.5]
    assert window_weights([2, 3, 4], 12, 2, "pyramid") == [0.5, 1, 0.5]
    # The outer end of the video is lifted by a ramp as long as the overlap.
    assert window_weights([0, 1, 2, 3, 4], 12, 3, "pyramid")[:3] == [pytest.approx(1 / 3), 2 / 3, 1]
    assert window_weights([9, 10, 11], 12, 1, "pyramid") == [0.5, 1, 1]
    assert window_weights([9, 10, 11], 12, 1, "pyramid", looped=True) == [0.5, 1, 0.5]


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": "static_standard"},
        {"schedule": "uniform_looped"},
        {"frames": 49},
        {"stride": 8},
        {"overlap": 32},
        {"fuse": "pyramid"},
    ],
    ids=str,
)
def test_every_option_changes_the_result(change):
    base = weighted_windows(ContextOptions(), 1, 61)
    assert weighted_windows(ContextOptions(**change), 1, 61) != base


def test_windows_move_from_step_to_step():
    assert len({str(weighted_windows(ContextOptions(), step, 61)) for step in range(6)}) == 6


def test_options_in_latent_frames():
    default = ContextOptions().latents()
    assert (default.frames, default.stride, default.overlap) == (21, 1, 4)
    third_worker = ContextOptions(frames=80, overlap=20).latents()
    assert (third_worker.frames, third_worker.overlap) == (20, 5)
    assert ContextOptions(stride=3).latents().stride == 1
    assert ContextOptions(stride=16).latents().stride == 4


def test_windows_are_used_from_one_window_on():
    options = ContextOptions(frames=81)
    assert [options.active(frames) for frames in (80, 81, 100)] == [False, True, True]
    assert options.freenoise is not ContextOptions(freenoise=False).freenoise


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        ({"overlap": 3}, "context_overlap", "at least 4"),
        ({"overlap": 0}, "context_overlap", "at least 4"),
        ({"overlap": 81}, "context_overlap", "smaller than 'context_frames'"),
        ({"stride": 0}, "context_stride", "at least 1"),
        ({"schedule": "uniform"}, "context_schedule", "one of uniform_standard"),
        ({"fuse": "flat"}, "fuse_method", "one of linear, pyramid"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(values, field, message):
    with pytest.raises(InvalidRequest, match=message) as info:
        ContextOptions(**values)
    assert info.value.field == field


def test_an_unknown_schedule_is_refused():
    with pytest.raises(InvalidRequest, match="'context_schedule' must be one of"):
        windows("batched", 0, 25, 21, 1, 4)

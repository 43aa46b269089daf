"""Jitter falls, motion stays, and nothing happens unless asked for."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pose.people import make_track, with_scores, without_body
from tests.pose.scenes import dancer
from xicon_infer.errors import InvalidRequest
from xicon_infer.pose.smooth import SmoothOptions, one_euro, smooth_track
from xicon_infer.types import Track

FULL = SmoothOptions(strength=1.0)
ALL = slice(0, 133)


def still(frames: int = 48, *, noise: float = 0.0, fps: int = 24) -> Track:
    """Returns a person at rest, with jitter in millimetres and tenths of a pixel."""
    track = make_track(1, size=(720, 1280))
    draw = np.random.default_rng(0)
    joints = track.body.joints.repeat(frames, 0)
    points = track.pose.keypoints.repeat(frames, 0)
    joints += draw.normal(0, noise, joints.shape)
    points += draw.normal(0, noise / 10, points.shape)
    pose = replace(
        track.pose,
        keypoints=points.astype(np.float32),
        scores=track.pose.scores.repeat(frames, 0),
        bboxes=track.pose.bboxes.repeat(frames, 0),
    )
    body = replace(
        track.body,
        joints=joints.astype(np.float32),
        uncertainties=track.body.uncertainties.repeat(frames, 0),
    )
    return Track(pose, body, Fraction(fps))


def difference(one: Track, two: Track) -> tuple[float, float]:
    return (
        float(np.abs(one.pose.keypoints - two.pose.keypoints).max()),
        float(np.abs(one.body.joints - two.body.joints).max()),
    )


def test_the_default_leaves_the_track_alone():
    track = still(noise=5)
    assert smooth_track(track) is track
    assert smooth_track(track, SmoothOptions(strength=0, min_cutoff=0.1)) is track


def test_a_person_at_rest_stays():
    track = still()
    assert difference(smooth_track(track, FULL), track) == (0, 0)


@pytest.mark.parametrize("fps", [24, 120])
def test_jitter_falls(fps):
    track = still(noise=8, fps=fps)
    smooth = smooth_track(track, FULL)
    for rough, calm in (
        (track.body.joints, smooth.body.joints),
        (track.pose.keypoints, smooth.pose.keypoints),
    ):
        assert calm.var(axis=0).mean() < 0.5 * rough.var(axis=0).mean()
        steps = np.diff(calm, axis=0).var() / np.diff(rough, axis=0).var()
        assert steps < 0.1


def test_more_strength_and_lower_limits_smooth_more():
    track = still(noise=8)

    def roughness(**options) -> float:
        joints = smooth_track(track, SmoothOptions(**{"strength": 1.0, **options})).body.joints
        return float(np.diff(joints, axis=0).var())

    assert roughness(strength=1) < roughness(strength=0.5) < roughness(strength=0)
    assert roughness(min_cutoff=0.5) < roughness(min_cutoff=1.5) < roughness(min_cutoff=6)
    assert roughness(beta=0) < roughness(beta=10) < roughness(beta=200)


def test_strength_mixes():
    track = still(noise=8)
    half = smooth_track(track, SmoothOptions(strength=0.5)).body.joints
    whole = smooth_track(track, FULL).body.joints
    assert half == pytest.approx((track.body.joints + whole) / 2, abs=1e-3)


def test_only_places_change():
    track = still(noise=8)
    smooth = smooth_track(track, FULL)
    assert np.array_equal(smooth.pose.scores, track.pose.scores)
    assert np.array_equal(smooth.pose.bboxes, track.pose.bboxes)
    assert np.array_equal(smooth.body.uncertainties, track.body.uncertainties)
    assert smooth.body.joints.dtype == smooth.pose.keypoints.dtype == np.float32


def test_a_dance_does_not_lag_and_hardly_shrinks():
    dance = dancer()
    wrist = dance.body.joints[:, 20].astype(np.float64)
    calm = smooth_track(dance, FULL).body.joints[:, 20].astype(np.float64)
    errors = {lag: np.abs(calm[3 + lag : 209 + lag] - wrist[3:209]).mean() for lag in range(-3, 4)}
    assert min(errors, key=errors.__getitem__) == 0
    assert errors[0] < 30
    assert calm.std(axis=0) == pytest.approx(wrist.std(axis=0), rel=0.06)


def test_forwards_and_backwards_are_alike():
    dance = dancer()
    turned = Track(
        replace(
            dance.pose,
            keypoints=dance.pose.keypoints[::-1],
            scores=dance.pose.scores[::-1],
            bboxes=dance.pose.bboxes[::-1],
        ),
        replace(dance.body, joints=dance.body.joints[::-1]),
        dance.fps,
    )
    forwards, backwards = smooth_track(dance, FULL), smooth_track(turned, FULL)
    assert backwards.body.joints[::-1] == pytest.approx(forwards.body.joints, abs=1e-2)


def test_the_resolution_does_not_matter():
    track = still(noise=8)
    large = replace(
        track,
        pose=replace(
            track.pose,
            keypoints=track.pose.keypoints * 4,
            bboxes=track.pose.bboxes * 4,
            size=(2880, 5120),
        ),
    )
    one, two = smooth_track(track, FULL), smooth_track(large, FULL)
    assert two.pose.keypoints == pytest.approx(one.pose.keypoints * 4, abs=1e-2)


def test_gaps_start_the_filter_anew():
    track = still(40, noise=8)
    joints = track.body.joints.copy()
    joints[20:] += 500
    jump = replace(track, body=replace(track.body, joints=joints))
    gone = without_body(jump, [18, 19])
    smooth = smooth_track(gone, FULL)
    assert not smooth.body.joints[18:20].any()
    assert np.array_equal(smooth.pose.keypoints[18:20], gone.pose.keypoints[18:20])
    # Nothing of the other side gets through.
    for part in (slice(0, 18), slice(20, 40)):
        alone = Track(
            replace(
                gone.pose,
                keypoints=gone.pose.keypoints[part],
                scores=gone.pose.scores[part],
                bboxes=gone.pose.bboxes[part],
            ),
            replace(gone.body, joints=gone.body.joints[part]),
            gone.fps,
        )
        assert np.array_equal(smooth_track(alone, FULL).body.joints, smooth.body.joints[part])


def test_points_below_the_threshold_are_not_touched():
    track = with_scores(still(noise=8), slice(30, 40), slice(0, 48), 0.2)
    smooth = smooth_track(track, FULL)
    assert np.array_equal(smooth.pose.keypoints[:, 30:40], track.pose.keypoints[:, 30:40])
    assert not np.array_equal(smooth.pose.keypoints[:, 40:], track.pose.keypoints[:, 40:])


def test_one_frame_and_nobody_stay():
    for track in (still(1, noise=8), without_body(still(4), ALL)):
        assert difference(smooth_track(track, FULL), track) == (0, 0)


def test_a_track_without_boxes_is_measured_by_the_frame():
    track = still(noise=8)
    boxless = replace(track, pose=replace(track.pose, bboxes=track.pose.bboxes * 0))
    assert difference(smooth_track(boxless, FULL), boxless)[0] > 0


def scalar_one_euro(values, *, fps, min_cutoff, beta):
    """Returns the paper's filter of one coordinate, written plainly."""

    def share(cutoff):
        return 1 / (1 + fps / (2 * np.pi * cutoff))

    out, speed = [values[0]], 0.0
    for before, now in pairwise(values):
        speed = share(1.0) * (now - before) * fps + (1 - share(1.0)) * speed
        a = share(min_cutoff + beta * abs(speed))
        out.append(a * now + (1 - a) * out[-1])
    return out


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=12),
    st.floats(5, 120),
    st.floats(0.1, 10),
    st.floats(0, 50),
)
def test_one_coordinate_agrees_with_the_paper(values, fps, min_cutoff, beta):
    array = np.array(values)[:, None, None]
    options = {"fps": fps, "min_cutoff": min_cutoff, "beta": beta}
    out = one_euro(array, np.ones((len(values), 1), bool), **options)
    assert out[:, 0, 0] == pytest.approx(scalar_one_euro(values, **options), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(-np.pi, np.pi))
def test_the_result_stays_inside_and_turns_with_the_points(seed, angle):
    draw = np.random.default_rng(seed)
    values, present = draw.normal(size=(15, 4, 2)), draw.random((15, 4)) < 0.8
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    options = {"fps": 24.0, "min_cutoff": 1.0, "beta": 2.0}
    out = one_euro(values, present, **options)
    assert (out >= values.min(axis=0) - 1e-12).all()
    assert (out <= values.max(axis=0) + 1e-12).all()
    assert one_euro(values @ turn, present, **options) == pytest.approx(out @ turn)
    assert np.array_equal(out[~present], values[~present])


@pytest.mark.parametrize(
    ("field", "value"),
    [("strength", 1.1), ("strength", -0.1), ("min_cutoff", 0), ("beta", -1), ("beta", np.nan)],
)
def test_options_are_checked(field, value):
    with pytest.raises(InvalidRequest, match=f"{field} is") as error:
        SmoothOptions(**{field: value})
    assert error.value.field == field

"""Short gaps are closed, long ones stay, and guesses are hidden."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.pose.people import make_track, with_scores, without_body
from xicon_infer.pose.skeleton import FACE, LEFT_HAND, RIGHT_HAND, RIGHT_WRIST
from xicon_infer.pose.track import drop_unusable, fill_gaps, hide_unreliable

ALL = slice(0, 133)


def test_a_complete_track_is_unchanged():
    track = make_track(4)
    filled = fill_gaps(track)
    assert np.array_equal(filled.pose.keypoints, track.pose.keypoints)
    assert np.array_equal(filled.pose.scores, track.pose.scores)
    assert np.array_equal(filled.body.joints, track.body.joints)


def test_missing_joints_lie_on_the_line_between_their_neighbours():
    track = make_track(5)
    filled = fill_gaps(without_body(track, [1, 2, 3]))
    for frame, share in ((1, 0.25), (2, 0.5), (3, 0.75)):
        first, last = track.body.joints[0], track.body.joints[4]
        assert filled.body.joints[frame] == pytest.approx(first + share * (last - first))
        first, last = track.pose.keypoints[0], track.pose.keypoints[4]
        expected = first + share * (last - first)
        assert filled.pose.keypoints[frame] == pytest.approx(expected, abs=1e-3)
        assert filled.pose.scores[frame] == pytest.approx(0.9)


def test_scores_and_uncertainties_run_along():
    track = make_track(3)
    track = with_scores(track, ALL, [0], 0.5)
    body = replace(track.body, uncertainties=np.array([[10], [0], [30]], np.float32).repeat(24, 1))
    filled = fill_gaps(without_body(replace(track, body=body), [1]))
    assert filled.pose.scores[1] == pytest.approx(0.7)
    assert filled.body.uncertainties[1] == pytest.approx(20)


@pytest.mark.parametrize(("gap", "closed"), [(12, True), (13, False)])
def test_half_a_second_is_the_longest_gap(gap, closed):
    track = without_body(make_track(gap + 2), slice(1, gap + 1))
    filled = fill_gaps(track, 0.5)
    assert filled.body.joints[1:-1].any(axis=(1, 2)).tolist() == [closed] * gap
    assert (filled.pose.scores[1:-1] > 0).all() == closed


def test_the_longest_gap_follows_the_option_and_the_rate():
    track = without_body(make_track(6), slice(1, 4))
    for gap, fps, closed in ((0.0, 24, False), (0.1, 24, False), (0.13, 24, True), (0.1, 30, True)):
        filled = fill_gaps(replace(track, fps=fps), gap)
        assert filled.body.joints[1].any() == closed, (gap, fps)


def test_gaps_at_either_end_stay():
    filled = fill_gaps(without_body(make_track(6), [0, 5]))
    assert not filled.body.joints[[0, 5]].any()
    assert not filled.pose.scores[[0, 5]].any()
    nobody = without_body(make_track(3), slice(0, 3))
    assert not fill_gaps(nobody).body.joints.any()


def test_points_alone_are_filled_too():
    track = make_track(3)
    filled = fill_gaps(with_scores(track, slice(40, 41), [1], 0.1))
    assert filled.pose.scores[1, 40] == pytest.approx(0.9)
    assert np.array_equal(filled.pose.keypoints[:, :40], track.pose.keypoints[:, :40])
    joints = track.body.joints.copy()
    joints[1, 18] = 0
    filled = fill_gaps(replace(track, body=replace(track.body, joints=joints)))
    assert filled.body.joints == pytest.approx(track.body.joints)


def test_a_missing_hand_stays_at_a_wrist_that_swings():
    track = make_track(5)
    keypoints = track.pose.keypoints.copy()
    # The wrist swings out and back; a straight line would leave the hand behind.
    swing = np.array([0, 20, 30, 20, 0], np.float32)[:, None]
    keypoints[:, RIGHT_WRIST, 0] += swing[:, 0]
    keypoints[:, RIGHT_HAND, 0] += swing
    whole = replace(track, pose=replace(track.pose, keypoints=keypoints))
    holed = keypoints.copy()
    holed[1:4, RIGHT_HAND] = 0
    holed_track = with_scores(
        replace(track, pose=replace(track.pose, keypoints=holed)), RIGHT_HAND, [1, 2, 3], 0.0
    )
    filled = fill_gaps(holed_track)
    error = np.abs(filled.pose.keypoints - whole.pose.keypoints)[:, RIGHT_HAND]
    assert error.max() < 2


def test_long_gaps_of_a_hand_keep_their_values():
    track = with_scores(make_track(20), LEFT_HAND, slice(2, 18), 0.1)
    filled = fill_gaps(track)
    assert np.array_equal(filled.pose.keypoints, track.pose.keypoints)
    assert np.array_equal(filled.pose.scores, track.pose.scores)


@pytest.mark.parametrize("part", [FACE, LEFT_HAND, RIGHT_HAND])
def test_parts_with_a_low_mean_score_are_hidden(part):
    track = with_scores(make_track(3), part, [1], 0.2)
    # A few good points do not make a hand.
    track = with_scores(track, slice(part.start, part.start + 2), [1], 0.9)
    hidden = hide_unreliable(track).pose.scores
    assert not hidden[1, part].any()
    assert (hidden[[0, 2], part] > 0).all()
    others = [p for p in (FACE, LEFT_HAND, RIGHT_HAND) if p != part]
    assert all((hidden[1, p] > 0).all() for p in others)
    assert (hide_unreliable(track, 0.1).pose.scores[1, part] > 0).all()


def test_parts_that_project_far_outside_are_hidden():
    track = make_track(1)
    for part, joint in ((FACE, 15), (LEFT_HAND, 20), (RIGHT_HAND, 21)):
        for x, seen in ((-0.09, True), (-0.11, False), (1.09, True), (1.11, False)):
            joints = track.body.joints.copy()
            camera, (_, width) = track.body.intrinsics, track.pose.size
            joints[0, joint, 0] = (x * width - camera[0, 2]) / camera[0, 0] * joints[0, joint, 2]
            changed = replace(track, body=replace(track.body, joints=joints))
            scores = hide_unreliable(changed).pose.scores
            assert scores[0, part].any() == seen, (part, x)


def test_body_points_are_never_hidden():
    track = with_scores(make_track(2), ALL, slice(0, 2), 0.05)
    assert (hide_unreliable(track).pose.scores[:, :17] > 0).all()


def test_unusable_values_become_missing():
    track = make_track(3)
    joints, points = track.body.joints.copy(), track.pose.keypoints.copy()
    joints[0, 18] = np.nan
    joints[1, 19, 2] = -5
    points[2, 30] = np.inf
    broken = replace(
        track,
        pose=replace(track.pose, keypoints=points),
        body=replace(track.body, joints=joints),
    )
    clean = drop_unusable(broken)
    assert not clean.body.joints[0, 18].any()
    assert not clean.body.joints[1, 19].any()
    assert clean.pose.scores[2, 30] == 0
    assert np.isfinite(clean.pose.keypoints).all()
    assert (clean.body.joints != 0).sum() > 3 * 24 * 2


def test_tracks_are_not_changed_in_place():
    track = with_scores(without_body(make_track(5), [2]), FACE, [4], 0.1)
    before = [a.copy() for a in (track.pose.keypoints, track.pose.scores, track.body.joints)]
    hide_unreliable(fill_gaps(drop_unusable(track)))
    after = [track.pose.keypoints, track.pose.scores, track.body.joints]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))

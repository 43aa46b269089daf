"""133 points to the authors' figure: order, neck, thresholds, and their choice of hands."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pose.dancers import figure
from tests.pose.people import make_track
from xicon_infer.pose.dancer_points import (
    MIN_JOINTS,
    first_person,
    hidden_points,
    join,
    person_present,
    rows,
    to_dancer_figure,
)
from xicon_infer.pose.skeleton import FACE, LEFT_HAND, RIGHT_HAND


def scored(**changes: float):
    """Returns points [1, 133, 2] and scores of 0.9, some changed by keypoint number."""
    rng = np.random.default_rng(0)
    scores = np.full((1, 133), 0.9)
    for name, value in changes.items():
        scores[0, int(name.removeprefix("k"))] = value
    return rng.random((1, 133, 2)) * 100, scores


def test_points_come_in_their_order_as_shares_of_the_frame():
    points, scores = scored()
    found = to_dancer_figure(points, scores, size=(50, 200))
    share = points[0] / [200, 50]
    order = [0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
    for joint, keypoint in enumerate(order):
        expected = share[[5, 6]].mean(axis=0) if keypoint is None else share[keypoint]
        np.testing.assert_allclose(found.body[0, joint], expected)
    np.testing.assert_allclose(found.hands[0], [share[LEFT_HAND], share[RIGHT_HAND]])
    np.testing.assert_allclose(found.face[0], share[FACE])
    assert found.body.shape == (1, 18, 2)


@pytest.mark.parametrize(
    ("score", "neck", "shoulder"),
    [(0.30, False, False), (0.31, True, False), (0.35, True, False), (0.36, True, True)],
)
def test_a_weak_shoulder_hides_itself_before_the_neck(score, neck, shoulder):
    found = to_dancer_figure(*scored(k5=score))
    assert found.body_visible[0, 1] == neck
    assert found.body_visible[0, 5] == shoulder


@pytest.mark.parametrize(("score", "hidden"), [(0.349, True), (0.35, False)])
def test_weak_points_of_hands_and_face_are_hidden_and_of_the_body_are_not(score, hidden):
    points, scores = scored(k91=score, k23=score, k10=score)
    found = to_dancer_figure(points, scores)
    assert bool(hidden_points(found.hands)[0, 0, 0]) == hidden
    assert bool(hidden_points(found.face)[0, 0]) == hidden
    np.testing.assert_allclose(found.body[0, 4], points[0, 10])
    assert not found.body_visible[0, 4]


def test_of_two_persons_the_authors_take_two_left_hands():
    pair = join([figure(), figure(depth=2000.0)])
    taken = first_person(pair)
    np.testing.assert_array_equal(taken.body, pair.body[:1])
    np.testing.assert_array_equal(taken.hands[0], pair.hands[:, 0])
    np.testing.assert_array_equal(taken.hand_scores[0], pair.hand_scores[:, 0])
    alone = first_person(rows(pair, [1]))
    np.testing.assert_array_equal(alone.hands, pair.hands[1:])


def test_joining_frames_and_choosing_them_undo_each_other():
    film = figure(4)
    again = join([rows(film, [index]) for index in range(4)])
    for part in ("body", "body_visible", "hands", "face", "hand_scores", "face_scores"):
        np.testing.assert_array_equal(getattr(again, part), getattr(film, part))


@pytest.mark.parametrize("joints", [MIN_JOINTS - 1, MIN_JOINTS])
def test_a_person_needs_four_joints(joints):
    pose = make_track(1).pose
    scores = np.zeros_like(pose.scores)
    scores[0, 11 : 11 + joints] = 0.9
    found = to_dancer_figure(pose.keypoints, scores, size=pose.size)
    assert person_present(found).tolist() == [joints == MIN_JOINTS]

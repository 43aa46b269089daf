"""133 keypoints to the drawn figure: thresholds, layouts and the carry-over rule."""

from __future__ import annotations

import numpy as np
import pytest

from xicon_infer.pose.keypoints import to_node_figure, to_official_figure
from xicon_infer.pose.skeleton import BODY_PAIRS, LEFT_HAND, RIGHT_HAND


def points(frames=2, seed=0):
    random = np.random.default_rng(seed)
    return random.uniform(10, 90, (frames, 133, 2)), random.uniform(0, 1, (frames, 133))


def test_neck_is_between_the_shoulders_and_joints_are_where_they_belong():
    keypoints, scores = points()
    figure = to_node_figure(keypoints, scores)
    assert figure.body[:, 1] == pytest.approx((keypoints[:, 5] + keypoints[:, 6]) / 2)
    assert figure.body_scores[:, 1] == pytest.approx((scores[:, 5] + scores[:, 6]) / 2)
    for slot, keypoint in ((0, 0), (2, 6), (4, 10), (7, 9), (10, 16), (13, 15), (16, 4), (17, 3)):
        assert figure.body[:, slot] == pytest.approx(keypoints[:, keypoint])


def test_layouts_differ_in_hand_order_and_feet():
    keypoints, scores = points()
    node = to_node_figure(keypoints, scores, kp_score_thr=0)
    official = to_official_figure(keypoints, scores, kp_score_thr=0)
    assert node.hands[:, 0] == pytest.approx(keypoints[:, RIGHT_HAND])
    assert official.hands[:, 0] == pytest.approx(keypoints[:, LEFT_HAND])
    assert (node.body.shape, official.body.shape) == ((2, 18, 2), (2, 24, 2))
    assert official.body[:, 18:] == pytest.approx(keypoints[:, 17:23])
    assert official.body[:, :18] == pytest.approx(node.body)


@pytest.mark.parametrize("convert", [to_node_figure, to_official_figure])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_threshold_hides_weak_hand_and_face_points(convert, threshold):
    keypoints, scores = points()
    figure = convert(keypoints, scores, kp_score_thr=threshold)
    for place, values in ((figure.hands, figure.hand_scores), (figure.face, figure.face_scores)):
        assert ((place == -1).all(axis=-1) == (values < threshold)).all()


def test_body_joints_are_visible_above_three_tenths_whatever_the_threshold():
    keypoints, scores = points()
    scores[:, 0] = 0.3
    scores[:, 10] = 0.31
    for threshold in (0.0, 0.9):
        figure = to_node_figure(keypoints, scores, kp_score_thr=threshold)
        assert not figure.body_visible[:, 0].any()
        assert figure.body_visible[:, 4].all()


def test_neck_of_the_official_layout_needs_both_shoulders():
    keypoints, scores = points(3)
    scores[:, 5:7] = [(0.9, 0.9), (0.9, 0.2), (0.2, 0.9)]
    assert to_official_figure(keypoints, scores).body_scores[:, 1].tolist() == [1, 0, 0]
    assert to_node_figure(keypoints, scores).body_visible[:, 1].all()


def test_size_divides_x_by_width_and_y_by_height():
    keypoints, scores = points()
    figure = to_node_figure(keypoints, scores, size=(200, 100))
    pixels = to_node_figure(keypoints, scores)
    assert figure.body * [100, 200] == pytest.approx(pixels.body)


def test_carry_over_repeats_the_last_body_inside_but_not_the_hands():
    keypoints, scores = points(5)
    keypoints[[0, 2, 3], :, 0] *= -1
    plain = to_node_figure(keypoints, scores, kp_score_thr=0)
    carried = to_node_figure(keypoints, scores, kp_score_thr=0, carry_over=True)
    expected = [0, 1, 1, 1, 4]
    assert np.array_equal(carried.body, plain.body[expected])
    assert np.array_equal(carried.body_scores, plain.body_scores[expected])
    assert np.array_equal(carried.hands, plain.hands)
    assert not np.array_equal(carried.body, plain.body)


def test_carry_over_looks_at_the_toes_too():
    keypoints, scores = points(2)
    keypoints[1, :, 1] *= -1
    keypoints[1, 20:22] = 5
    assert max(max(pair) for pair in BODY_PAIRS[:18]) < 17
    carried = to_node_figure(keypoints, scores, carry_over=True)
    assert (carried.body[1] == to_node_figure(keypoints, scores).body[1]).all()


def test_input_is_not_changed():
    keypoints, scores = points()
    copies = keypoints.copy(), scores.copy()
    to_node_figure(keypoints, scores, size=(3, 4), carry_over=True)
    to_official_figure(keypoints, scores, size=(3, 4))
    assert np.array_equal(keypoints, copies[0])
    assert np.array_equal(scores, copies[1])

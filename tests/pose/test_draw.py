"""The flat figure: what is drawn, what is skipped, and how it lies over the capsules."""

from __future__ import annotations

import numpy as np
import pytest

from xicon_infer.pose import draw, skeleton
from xicon_infer.pose.keypoints import Figure, to_node_figure


def canvas(height=80, width=60):
    return np.zeros((height, width, 3), np.uint8)


def body(x=30.0, y=40.0):
    place = np.full((18, 2), [x, y])
    place[[14, 15, 16, 17]] += [(-6, -6), (6, -6), (-14, -2), (14, -2)]
    return place


def figure(x=30.0, y=40.0) -> Figure:
    points = np.full((1, 133, 2), [x, y])
    points[0, 91:] += np.stack([np.arange(42) - 20, np.arange(42) % 7], axis=1)
    points[0, 23:91] += np.stack([np.arange(68) % 20, np.arange(68) // 5], axis=1)
    points[0, 1:5] += [(6, -6), (-6, -6), (14, -2), (-14, -2)]
    return to_node_figure(points, np.ones((1, 133)))


def overlay(figures, **changes):
    settings = {"height": 80, "width": 60, **changes}
    return draw.draw_overlay(figures, 0, **settings)


def test_head_shows_only_visible_joints_and_sticks():
    everything, none = canvas(), canvas()
    visible = np.ones(18, bool)
    draw.paint_head(everything, body(), visible)
    draw.paint_head(none, body(), ~visible)
    assert everything.any()
    assert not none.any()
    visible[15] = False
    fewer = canvas()
    draw.paint_head(fewer, body(), visible)
    colors = {tuple(c) for c in fewer.reshape(-1, 3)}
    assert skeleton.STICK_COLORS[14] in colors
    assert skeleton.STICK_COLORS[15] not in colors


def test_sticks_are_dimmed_and_joints_are_not():
    picture = canvas()
    draw.paint_head(picture, body(), np.ones(18, bool))
    colors = {tuple(int(v) for v in c) for c in picture.reshape(-1, 3)}
    assert (51, 0, 153) in colors  # 0.6 x (85, 0, 255)
    assert skeleton.STICK_COLORS[0] in colors


def test_body_draws_more_than_the_head():
    place = body()
    place[2] = (10, 70)
    whole, head = canvas(), canvas()
    draw.paint_body(whole, place, np.ones(18, bool))
    draw.paint_head(head, place, np.ones(18, bool))
    assert whole[70, 10].tolist() == list(skeleton.STICK_COLORS[2])
    assert not head[70, 10].any()


@pytest.mark.parametrize("spot", [(0.9, 30), (30, 0.5), (-1, -1), (-40, 20)])
def test_points_in_the_first_column_or_row_are_skipped(spot):
    picture = canvas()
    draw.paint_face(picture, np.full((68, 2), spot))
    draw.paint_hands(picture, np.full((2, 21, 2), spot))
    assert not picture.any()


def test_only_brows_eyes_and_mouth_are_drawn():
    for index in range(68):
        face = np.full((68, 2), -1.0)
        face[index] = (20, 20)
        picture = canvas()
        draw.paint_face(picture, face)
        assert picture.any() == (17 <= index <= 26 or index >= 36)


def test_hand_lines_need_both_ends():
    hand = np.full((1, 21, 2), -1.0)
    hand[0, 0], hand[0, 1] = (10, 10), (40, 10)
    both, one = canvas(), canvas()
    draw.paint_hands(both, hand)
    hand[0, 1] = -1
    draw.paint_hands(one, hand)
    assert both[10, 25].tolist() == list(skeleton.HAND_EDGE_COLORS[0])
    assert not one[10, 25].any()
    assert one[10, 10].tolist() == list(skeleton.HAND_POINT_COLOR)


def test_lines_and_dots_are_wider_from_600_pixels_on():
    face = np.full((68, 2), -1.0)
    face[20] = (100, 100)
    small, large = canvas(599, 700), canvas(600, 700)
    draw.paint_face(small, face)
    draw.paint_face(large, face)
    assert (small > 0).sum() < (large > 0).sum()


@pytest.mark.parametrize("option", ["draw_face", "draw_hands"])
def test_options_remove_their_part_and_nothing_else(option):
    everything, fewer = overlay([figure()]), overlay([figure()], **{option: False})
    assert not np.array_equal(everything, fewer)
    assert overlay([figure()], draw_face=False, draw_hands=False).any()


def test_height_and_width_set_the_canvas():
    assert overlay([figure()], height=90, width=70).shape == (90, 70, 3)
    assert not overlay([]).any()


def test_persons_add_up_and_wrap_round():
    one, two = overlay([figure()]), overlay([figure(), figure()])
    assert np.array_equal(two, one + one)
    apart = overlay([figure(15, 20), figure(40, 60)])
    assert np.array_equal(apart, overlay([figure(15, 20)]) + overlay([figure(40, 60)]))


def test_moving_points_by_whole_pixels_moves_the_picture():
    before, after = overlay([figure()]), overlay([figure(33, 45)])
    assert np.array_equal(after[5:, 3:], before[:-5, :-3])


def test_points_far_away_do_no_harm():
    far = figure()
    far.body[:, 14] = (1e30, -1e30)
    far.hands[0, 0, 5] = (1e12, 1e12)
    far.face[0, 40] = (1e9, 5)
    picture = overlay([far])
    assert picture.any()


def test_composite_replaces_single_channels():
    frame = np.full((1, 1, 3), 100, np.uint8)
    draw.composite(frame, np.array([[[255, 0, 7]]], np.uint8))
    assert frame.tolist() == [[[255, 100, 7]]]


def test_tables_fit_together():
    assert len(skeleton.STICKS) == 17
    assert len(skeleton.STICK_COLORS) == 18
    assert len(skeleton.HAND_EDGES) == len(skeleton.HAND_EDGE_COLORS) == 20
    assert sorted(end for _, end in skeleton.HAND_EDGES) == list(range(1, 21))
    assert len(skeleton.SMPL_OF_OPENPOSE) == 14
    assert {joint for limb in skeleton.LIMBS for joint in limb} == set(range(14))
    assert all(len(colors) == len(skeleton.LIMBS) for colors in skeleton.PALETTES.values())
    parts = (skeleton.FEET, skeleton.FACE, skeleton.LEFT_HAND, skeleton.RIGHT_HAND)
    covered = [index for part in parts for index in range(part.start, part.stop)]
    assert covered == list(range(17, skeleton.KEYPOINTS))

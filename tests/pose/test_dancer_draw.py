"""Both drawing conventions: colours, brightness, widths, options, and points anywhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.pose.dancers import figure, hide_joints, with_body
from tests.pose.people import make_track
from xicon_infer.pose.dancer_comfy import draw_comfy, stick_width, to_comfy_figure
from xicon_infer.pose.dancer_draw import draw_dancer
from xicon_infer.pose.skeleton import STICK_COLORS, STICKS

SIZE = (448, 336)


def comfy(frames=1, score=0.9):
    pose = make_track(frames).pose
    return to_comfy_figure(pose.keypoints, np.full_like(pose.scores, score), size=pose.size)


def drawn(person, **options):
    return draw_dancer([person], 0, size=options.pop("size", SIZE), **options)


def crossing(first, second):
    """Returns a figure with one horizontal and one vertical stick, away from everything else."""
    body = np.full((1, 18, 2), 0.1)
    body[0, first], body[0, second] = [0.5, 0.5], [0.8, 0.5]
    visible = np.zeros((1, 18), bool)
    visible[0, [first, second]] = True
    hidden = replace(figure(), hands=np.full((1, 2, 21, 2), -1.0))
    return replace(with_body(hidden, body), body_visible=visible)


@pytest.mark.parametrize("stick", range(len(STICKS)))
def test_sticks_are_dim_joints_bright_and_both_red_for_blue(stick):
    first, second = STICKS[stick]
    picture = drawn(crossing(first, second))
    middle, joint = picture[224, 218], picture[224, 168]
    assert middle.tolist() == [int(c * 0.6) for c in STICK_COLORS[stick]][::-1]
    assert joint.tolist() == list(STICK_COLORS[first])[::-1]
    # Four pixels to either side, and a radius of four, whatever the size.
    assert picture[:, 218].any(axis=1).sum() == 9
    large = drawn(crossing(first, second), size=(896, 672))
    assert large[:, 436].any(axis=1).sum() == 9
    column = large[:, 336].any(axis=1)
    assert column.sum() == 9


def test_the_right_shoulder_is_blue_here_and_red_in_comfyui():
    body = figure().body
    place = ((body[0, 1] + body[0, 2]) / 2 * [SIZE[1], SIZE[0]]).astype(int)
    ours = draw_dancer([figure()], 0, size=SIZE)[place[1], place[0]]
    assert ours.tolist() == [0, 0, 153]
    person = comfy(score=1.0)
    place = ((person.body[0, 1] + person.body[0, 2]) / 2 * [SIZE[1], SIZE[0]]).astype(int)
    assert draw_comfy([person], 0, size=SIZE)[place[1], place[0]].tolist() == [153, 0, 0]


def test_a_hidden_joint_takes_its_sticks_along():
    base = drawn(figure())
    for joint in range(18):
        hidden = drawn(hide_joints(figure(), joint))
        assert hidden.any(axis=2).sum() < base.any(axis=2).sum()


def test_face_points_are_left_out_unless_asked_for():
    person = figure()
    plain, dotted = drawn(person), drawn(person, draw_face=True)
    assert (dotted == 255).all(axis=2).any()
    assert not (plain == 255).all(axis=2).any()
    spots = (person.face[0] * [SIZE[1], SIZE[0]]).astype(int)
    assert (dotted[spots[:, 1], spots[:, 0]] == 255).all()


def test_hands_have_red_dots_and_hidden_ones_are_not_drawn():
    person = figure()
    nobody = replace(person, body_visible=np.zeros((1, 18), bool))
    tips = (person.hands[0, :, [4, 20]].reshape(-1, 2) * [SIZE[1], SIZE[0]]).astype(int)
    assert (drawn(nobody)[tips[:, 1], tips[:, 0]] == [255, 0, 0]).all()
    hidden = replace(nobody, hands=np.full_like(person.hands, -1))
    assert not drawn(hidden).any()


def test_two_persons_are_both_drawn():
    left = figure()
    right = with_body(left, left.body + np.array([0.3, 0]))
    both = draw_dancer([left, right], 0, size=SIZE)
    for person in (left, right):
        assert (both.any(axis=2) >= draw_dancer([person], 0, size=SIZE).any(axis=2)).all()


@pytest.mark.parametrize("far", [-5.0, 3.0, 1e7, -1e12])
def test_points_far_outside_are_no_crash(far):
    for person, draw in ((figure(), draw_dancer), (comfy(), draw_comfy)):
        body, hands = person.body.copy(), person.hands.copy()
        body[0, ::2], hands[0, :, ::3] = far, far
        away = replace(person, body=body, hands=hands, face=person.face * 0 + far)
        assert draw([away], 0, size=(96, 64)).shape == (96, 64, 3)


def test_each_frame_is_its_own():
    film = figure(3)
    pictures = [draw_dancer([film], index, size=SIZE) for index in range(3)]
    assert not np.array_equal(pictures[0], pictures[2])


@pytest.mark.parametrize(
    ("size", "base", "expected"),
    [
        ((511, 300), 3, 3),
        ((512, 300), 3, 4),
        ((1080, 300), 3, 6),
        ((3840, 2160), 3, 10),
        ((2160, 2160), 2, 5),
        ((9000, 2160), 2, 8),
    ],
)
def test_comfyui_widths_follow_the_longer_side(size, base, expected):
    assert stick_width(*size, base) == stick_width(*size[::-1], base) == expected


def test_comfyui_colours_fade_with_the_score():
    levels = [int(draw_comfy([comfy(score=s)], 0, size=SIZE).max()) for s in (0.4, 0.7, 1.0)]
    assert levels == sorted(set(levels))
    assert not draw_comfy([comfy(score=0.0)], 0, size=SIZE).any()


def test_comfyui_options_for_face_and_head_count():
    person = comfy()
    pictures = {
        (face, head): draw_comfy([person], 0, size=SIZE, draw_face_points=face, draw_head=head)
        for face in ("full", "weak", "none")
        for head in ("full", "weak", "none")
    }
    assert len({picture.tobytes() for picture in pictures.values()}) == 9
    sums = {key: int(picture.sum()) for key, picture in pictures.items()}
    for other in ("full", "weak", "none"):
        assert sums["full", other] > sums["weak", other] > sums["none", other]
        assert sums[other, "full"] > sums[other, "weak"] > sums[other, "none"]

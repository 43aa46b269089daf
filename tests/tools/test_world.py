"""The drawn world: what a clip holds, what is held out, and that motion is a body's."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache

import numpy as np
import pytest
from PIL import Image

from tools.tiny import motion, world
from tools.tiny.character import (
    PARTS,
    SHIRT,
    Solids,
    build_solids,
    head_frame,
    is_held_out,
    make_character,
    shade_distance,
)
from tools.tiny.draw import SAMPLES, draw_solids
from tools.tiny.draw_background import MARGIN, draw_background, lay_backdrop, pan_path
from tools.tiny.draw_points import make_track
from xicon_infer.errors import InvalidRequest
from xicon_infer.pose.camera import default_intrinsics
from xicon_infer.pose.render import render_track

HEIGHT, WIDTH, FRAMES = 160, 96, 5


@lru_cache
def clip(seed=0, split="train", frames=FRAMES, height=HEIGHT, width=WIDTH):
    return world.make_clip(seed, split=split, num_frames=frames, height=height, width=width)


def test_a_clip_has_the_promised_shapes():
    made = clip()
    assert made.frames.shape == (FRAMES, HEIGHT, WIDTH, 3) and made.frames.dtype == np.uint8
    assert made.pose.shape == (FRAMES, HEIGHT // 2, WIDTH // 2, 3) and made.pose.dtype == np.uint8
    assert made.reference.shape == (HEIGHT, WIDTH, 3) and made.reference.dtype == np.uint8
    assert made.points.shape == (FRAMES, len(PARTS), 2) and made.points.dtype == np.float32
    assert made.visible.shape == (FRAMES, len(PARTS)) and made.visible.dtype == np.bool_
    assert made.colours.shape == (len(PARTS), 3) and made.colours.dtype == np.uint8


def test_the_pose_is_the_projects_own_drawing_of_the_track():
    made = clip()
    assert np.array_equal(made.pose, render_track([made.track], width=WIDTH, height=HEIGHT))


def test_a_clip_is_the_same_every_time():
    clip.cache_clear()
    first = clip()
    clip.cache_clear()
    second = clip()
    for field in fields(first):
        if field.name != "track":
            assert np.array_equal(getattr(first, field.name), getattr(second, field.name))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"split": "test"}, {"height": 192}, {"width": 128}, {"frames": 9}]
)
def test_every_argument_counts(change):
    other, made = clip(**change), clip()
    same = other.frames.shape == made.frames.shape and np.array_equal(other.frames, made.frames)
    assert not same


@pytest.mark.parametrize(
    ("change", "field"),
    [({"split": "all"}, "split"), ({"seed": -1}, "seed"), ({"frames": 0}, "num_frames")],
)
def test_what_is_not_allowed_is_said(change, field):
    with pytest.raises(InvalidRequest) as caught:
        clip(**change)
    assert caught.value.field == field


def test_the_reference_shows_another_pose_on_the_same_background():
    made = clip(seed=3)
    assert np.abs(made.reference.astype(int) - made.frames.astype(int)).max() > 60
    top = slice(0, 6)
    assert np.array_equal(made.reference[top, :6], made.frames[0, top, :6])


def test_visible_parts_show_their_colour_at_their_place():
    near = []
    for seed in range(4):
        made = clip(seed=seed)
        for frame, part in zip(*np.nonzero(made.visible), strict=True):
            x, y = made.points[frame, part].astype(int)
            patch = made.frames[frame, max(y - 6, 0) : y + 7, max(x - 6, 0) : x + 7] / 255
            near.append(shade_distance(patch, made.colours[part] / 255).min() < 0.08)
    assert np.mean(near) >= 0.97


def test_a_part_that_is_covered_is_not_visible():
    rng = np.random.default_rng(0)
    character = replace(make_character(rng, "train"), hair="long")
    turned = motion.rest_pose(character.bones) * np.array([-1.0, 1.0, -1.0])
    seen = []
    for pose in (motion.rest_pose(character.bones), turned):
        joints = pose[None] + [0, 800, 2600]
        camera = default_intrinsics(HEIGHT, WIDTH).astype(np.float32)
        backdrop = np.zeros((1, HEIGHT * SAMPLES, WIDTH * SAMPLES, 3), np.uint8)
        solids = build_solids(character, joints)
        seen.append(draw_solids(solids, character.colours, backdrop, intrinsics=camera).seen[0])
    face, hair = PARTS.index("face"), PARTS.index("hair")
    assert seen[1][face] < 0.4 * seen[0][face] and seen[1][hair] > 1.5 * seen[0][hair]


def test_the_nearer_shape_is_seen():
    camera = default_intrinsics(32, 32).astype(np.float32)
    backdrop = np.full((1, 64, 64, 3), 7, np.uint8)
    colours = np.arange(33, dtype=np.uint8).reshape(11, 3) * 7
    spots = np.array([[[0.0, 0, 1000], [0, 0, 1500]]])
    solids = Solids(spots, spots, np.full((2, 2), 90.0), np.array([2, 4]))
    drawing = draw_solids(solids, colours, backdrop, intrinsics=camera)
    assert drawing.seen[0, 2] > 0 and drawing.seen[0, 4] == 0
    swapped = Solids(spots[:, ::-1], spots[:, ::-1], solids.radii, solids.parts)
    assert draw_solids(swapped, colours, backdrop, intrinsics=camera).seen[0, 4] > 0
    assert (drawing.frames[0, 0, 0] == 7).all()


def test_characters_of_the_test_never_occur_in_training():
    for seed in range(6):
        for split in world.SPLITS:
            made = make_character(np.random.default_rng(seed), split)
            assert is_held_out(made.colours) == (split == "test")


def test_colours_of_one_picture_stay_apart_under_any_shade():
    for seed in range(5):
        made = make_character(np.random.default_rng(seed), "train")
        parts, behind = made.colours / 255, made.background / 255
        far = shade_distance(parts[:, None], np.concatenate([parts, behind])[None])
        far[np.arange(len(parts)), np.arange(len(parts))] = 1
        assert far.min() > 0.25


def test_shades_of_one_colour_are_not_apart_and_other_colours_are():
    red = np.array([0.9, 0.1, 0.1])
    assert shade_distance(red, 0.8 * red) < 1e-9
    assert shade_distance(red, 0.3 * red) > 0.3
    assert shade_distance(red, red[::-1]) > 0.7


@pytest.mark.parametrize("frames", [1, 17, 121])
def test_the_dance_is_cut_into_what_training_and_test_may_see(frames):
    for seed in range(30):
        rng = np.random.default_rng(seed)
        train = motion.dance_moments(rng, frames, "train")
        test = motion.dance_moments(rng, frames, "test")
        assert train.min() >= 0 and train.max() <= 150
        assert test.min() >= 152 and test.max() <= 211


@pytest.mark.parametrize("seed", range(6))
def test_bones_keep_their_length(seed):
    rng = np.random.default_rng(seed)
    bones = make_character(rng, "train").bones
    wanted = np.linalg.norm(bones[1:], axis=1)
    for joints in (
        motion.invent_motion(rng, bones, 9),
        motion.excerpt_dance(rng, bones, 9, "train"),
        motion.rest_pose(bones)[None],
    ):
        lengths = np.linalg.norm(joints[:, 1:] - joints[:, motion.PARENTS[1:]], axis=2)
        assert np.allclose(lengths, wanted, atol=1e-6)


def test_motion_is_smooth_and_knees_bend_backwards_only():
    for seed in range(20):
        joints = motion.invent_motion(np.random.default_rng(seed), motion.REST_MM, 33)
        assert np.linalg.norm(np.diff(joints, axis=0), axis=2).max() < 500
        left = joints[:, 1] - joints[:, 2]
        for hip, knee, ankle in ((1, 4, 7), (2, 5, 8)):
            thigh, shin = joints[:, knee] - joints[:, hip], joints[:, ankle] - joints[:, knee]
            # With +x to the left and y down, what bends backwards turns about +x.
            assert (np.cross(thigh, shin) * left).sum(axis=1).min() > 0


def test_a_figure_at_rest_looks_at_the_camera_with_its_left_hand_at_the_right():
    pose = motion.rest_pose(motion.REST_MM)[None]
    left, up, forward = head_frame(pose)
    assert left[0, 0] > 0.9 and up[0, 1] < -0.9 and forward[0, 2] < -0.9
    assert pose[0, 20, 0] > 0 > pose[0, 21, 0]


def test_a_mirrored_excerpt_swaps_left_and_right():
    back = np.array(motion.MIRRORED)
    assert np.array_equal(back[back], np.arange(24))
    assert np.allclose(motion.REST_MM[back] * [-1, 1, 1], motion.REST_MM)


def test_from_behind_the_face_is_not_sure():
    pose = motion.rest_pose(motion.REST_MM)[None] + [0, 800, 2600]
    camera = default_intrinsics(HEIGHT, WIDTH).astype(np.float32)
    front = make_track(pose, camera, (HEIGHT, WIDTH))
    turned = (pose - [0, 800, 2600]) * [-1, 1, -1] + [0, 800, 2600]
    behind = make_track(turned, camera, (HEIGHT, WIDTH))
    assert front.pose.scores.min() > 0.5
    assert behind.pose.scores[0, :3].max() < 0.3 and behind.pose.scores[0, 23:91].max() < 0.3
    assert behind.pose.scores[0, 3:23].min() > 0.5
    nose, left_eye, right_eye = front.pose.keypoints[0, :3]
    assert right_eye[0] < nose[0] < left_eye[0] and left_eye[1] < nose[1]


def test_figures_stand_large_in_the_picture():
    heights, feet = [], []
    for seed in range(8):
        y = clip(seed=seed).track.pose.keypoints[..., 1]
        heights.append(np.median(y.max(axis=1) - y.min(axis=1)) / HEIGHT)
        feet.append(y[:, 17:23].max())
    assert 0.5 < np.mean(heights) < 1.0 and max(feet) < HEIGHT


def test_a_pan_moves_the_background_and_a_shadow_darkens_it():
    paths = [pan_path(np.random.default_rng(seed), 9) for seed in range(60)]
    panned = [path for path in paths if path.any()]
    assert 0 < len(panned) < 20 and np.abs(panned).max() <= MARGIN
    colours = np.array([[200, 180, 160], [90, 120, 150]], np.uint8)
    picture = draw_background(np.random.default_rng(1), colours, height=64, width=48)
    far_off = np.array([[-500.0, 40, 10], [-500.0, 40, 10]])
    plain = lay_backdrop(picture, np.array([[0, 0], [3, 2]]), far_off)
    assert plain.shape == (2, 64, 48, 3)
    assert np.array_equal(plain[0, 2:, 3:], plain[1, :-2, :-3])
    shaded = lay_backdrop(picture, np.array([[0, 0]]), np.array([[24.0, 40, 10]]))
    assert shaded[0, 40, 24].sum() < plain[0, 40, 24].sum()
    assert np.array_equal(shaded[0, :20], plain[0, :20])


def test_the_sentence_names_the_clothes():
    made = clip(seed=2)
    assert world._colour_name(made.colours[SHIRT]) in made.prompt
    assert made.prompt.endswith("background.")


def test_the_command_writes_a_sheet(tmp_path):
    target = tmp_path / "sheet.png"
    world.main(
        ["--out", str(target), "--count", "2", "--frames", "3", "--height", "64", "--width", "64"]
    )
    with Image.open(target) as sheet:
        assert sheet.size == (15 * 64 * 2, 2 * 64 * 2)

"""Capsules: against a plain sphere tracer, and the properties a renderer must have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.pose.people import standing
from xicon_infer.errors import PoseError
from xicon_infer.pose.camera import default_intrinsics
from xicon_infer.pose.cylinders import RADIUS_MM, build_capsules, depth_range, render_bodies
from xicon_infer.pose.skeleton import PALETTES

SIZE = (48, 32)


def draw(joints, **changes):
    height, width = changes.pop("size", SIZE)
    camera = changes.pop("camera", default_intrinsics(height, width))
    return render_bodies(joints, camera, height=height, width=width, **changes)


def trace(joints, camera, size, palettes=("single",)):
    """Sphere tracing in float64, written from the specification and independent of our code."""
    table = build_capsules(joints, palettes)
    ends = np.concatenate([table.start[table.present], table.end[table.present]]).astype(float)
    near, deep = ends[:, 2].min(), ends[:, 2].max()
    rows, columns = np.mgrid[: size[0], : size[1]]
    ray = np.stack(
        [
            (columns - camera[0, 2]) / camera[0, 0],
            (rows - camera[1, 2]) / camera[1, 1],
            np.ones(size),
        ],
        axis=-1,
    )
    ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
    far = max(min(deep, 25000), 10000)
    pictures = []
    for start, end, there in zip(table.start, table.end, table.present, strict=True):
        a, b = start[there].astype(float), end[there].astype(float)
        color = table.color[there]

        def closest(p, a=a, b=b):
            axis = b - a
            h = np.clip(
                ((p[..., None, :] - a) * axis).sum(-1) / np.maximum((axis**2).sum(-1), 1e-12), 0, 1
            )
            offset = p[..., None, :] - a - h[..., None] * axis
            distance = np.linalg.norm(offset, axis=-1)
            first = (distance < distance.min(-1, keepdims=True) + 1e-6).argmax(-1)
            take = np.take_along_axis(offset, first[..., None, None], -2)[..., 0, :]
            return distance.min(-1) - RADIUS_MM, first, take

        t, hit = np.full(size, 0.1), np.zeros(size, bool)
        for _ in range(300 if len(a) else 0):
            distance, _, _ = closest(ray * t[..., None])
            hit |= (distance < 1e-3) & (t <= far)
            if (hit | (t > far)).all():
                break
            t = np.where(hit, t, t + np.maximum(distance, 1e-4))
        picture = np.zeros((*size, 4))
        if hit.any():
            p = ray * t[..., None]
            _, first, normal = closest(p)
            normal = normal / np.linalg.norm(normal, axis=-1, keepdims=True)
            half = -ray - [0, 0, 1]
            half /= np.linalg.norm(half, axis=-1, keepdims=True)
            diffuse = np.maximum(-normal[..., 2], 0)
            specular = np.maximum((normal * half).sum(-1), 0) ** 32
            fade = 1 - (p[..., 2] - max(near, 0.1)) / (min(deep + 6000, 20000) - 0.1)
            fade = np.clip(fade, 0, 1)[..., None]
            lit = color[first][..., :3] * (0.3 + 0.7 * diffuse[..., None]) * fade
            lit = lit + 0.5 * specular[..., None] * fade
            picture = np.where(
                hit[..., None], np.concatenate([lit, np.full((*size, 1), 0.8)], -1), 0
            )
        pictures.append((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return np.stack(pictures)


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_a_sphere_tracer(seed):
    random = np.random.default_rng(seed)
    # From far away to limbs that pass behind the camera.
    depth = [3000, 1500, 900, 400, 9000, 150][seed]
    joints = standing(2)[:, None] + random.normal(0, 80, (2, 1, 24, 3)).astype(np.float32)
    joints[..., 2] += depth - 3000
    camera = default_intrinsics(*SIZE) + np.array([[9, 0, 2.25], [0, -7, -1.5], [0, 0, 0]])
    ours, theirs = draw(joints, camera=camera), trace(joints, camera, SIZE)
    assert theirs.any()
    outline = (ours[..., 3] > 0) != (theirs[..., 3] > 0)
    assert outline.sum(axis=(1, 2)).max() <= 1
    both = (ours[..., 3] > 0) & (theirs[..., 3] > 0)
    levels = np.abs(ours.astype(int) - theirs)[both]
    assert levels.mean() < 0.3
    assert np.percentile(levels, 99) <= 2


def test_two_persons_agree_with_a_sphere_tracer():
    people = np.stack([standing(1), standing(1, depth=3200, x=150)], axis=1)
    palettes = ("saturated", "pale")
    ours = draw(people, palettes=palettes)
    theirs = trace(people, default_intrinsics(*SIZE), SIZE, palettes)
    assert (np.abs(ours.astype(int) - theirs).max(-1) > 2).sum() <= 2


@pytest.mark.parametrize("chunk", [1, 2, 4, 99])
def test_chunk_size_does_not_change_the_picture(chunk):
    joints = standing(5)[:, None]
    assert np.array_equal(draw(joints, chunk=chunk), draw(joints, chunk=16))


def test_frames_alone_equal_frames_together():
    joints = standing(4)[:, None]
    depths = depth_range(joints)
    alone = [draw(joints[i : i + 1], depths=depths)[0] for i in range(4)]
    assert np.array_equal(np.stack(alone), draw(joints))


def test_work_cut_to_fit_memory_gives_the_same_picture():
    # So near that every limb may be anywhere: 13 x 420 x 420 pairs are more than one pass holds.
    joints = standing(1, depth=35)[:, None] * np.array([0.03, 0.03, 1], np.float32)
    height, width = 420, 420
    camera = default_intrinsics(height, width)
    whole = draw(joints, size=(height, width), camera=camera)
    lower = camera.copy()
    lower[1, 2] -= 320
    part = draw(joints, size=(100, width), camera=lower)
    assert whole.any()
    assert np.array_equal(whole[:, 320:], part)


def test_missing_persons_and_empty_frames_are_black():
    person = standing(1)
    none = np.zeros((0, 24, 3), np.float32)
    ours = draw([person, none, np.zeros_like(person), person])
    assert ours[0].any()
    assert not ours[1].any()
    assert not ours[2].any()
    assert np.array_equal(ours[0], ours[3])
    assert not draw([none, none]).any()
    assert draw([none]).shape == (1, *SIZE, 4)
    assert draw([]).shape == (0, *SIZE, 4)


def test_a_person_slot_keeps_its_palette_when_another_is_missing():
    person = standing(1)
    pair = np.concatenate([np.zeros_like(person), person])
    second = draw([pair], palettes=("single", "pale"))
    assert np.array_equal(second, draw([person], palettes=("pale",)))


def test_a_limb_is_left_out_if_an_end_sums_to_zero():
    joints = standing(1)
    joints[0, 21] = (-100, -3000, 3100)
    assert joints[0, 21].sum() == 0
    there = build_capsules([joints]).present[0]
    assert there.tolist() == [limb != 2 for limb in range(13)]


def test_tables_have_the_stated_shapes_and_colours():
    table = build_capsules([standing(1), standing(1)[:0]], ("single",))
    assert table.start.shape == table.end.shape == (2, 13, 3)
    assert table.present.tolist() == [[True] * 13, [False] * 13]
    assert table.color[0].tolist() == [255 / 300 + 0.15, 0.15, 0.15, 0.8]
    for palette in PALETTES:
        assert len({tuple(c) for c in PALETTES[palette]}) == 13


def test_depth_range_covers_drawn_joints_of_all_frames():
    joints = standing(2)[:, None]
    joints[1, 0, 7, 2] = 4321
    joints[1, 0, 10, 2] = 9000  # the foot is no end of any limb
    low, high = depth_range(joints)
    assert high == 4321
    assert 2900 < low < 3000
    assert depth_range([np.zeros((1, 24, 3), np.float32)]) is None


def change(name):
    joints, camera = standing(2)[:, None], default_intrinsics(*SIZE)
    base = {"camera": camera, "palettes": ("single",), "depths": (2900.0, 3100.0)}
    other = {
        "camera": camera + np.array([[5, 0, 0], [0, 5, 0], [0, 0, 0]]),
        "palettes": ("pale",),
        "depths": (1000.0, 3100.0),
    }
    return draw(joints, **base), draw(joints, **{**base, name: other[name]})


@pytest.mark.parametrize("name", ["camera", "palettes", "depths"])
def test_every_argument_counts(name):
    before, after = change(name)
    assert not np.array_equal(before, after)


def test_moving_the_camera_centre_by_whole_pixels_moves_the_picture():
    joints, camera = standing(1)[:, None], default_intrinsics(64, 64)
    moved = camera + np.array([[0, 0, 5], [0, 0, 3], [0, 0, 0]])
    before = draw(joints, size=(64, 64), camera=camera)
    after = draw(joints, size=(64, 64), camera=moved)
    assert np.array_equal(after[:, 3:, 5:], before[:, :-3, :-5])


def test_nearer_persons_hide_farther_ones():
    near, far = standing(1, depth=2000), standing(1, depth=4000)
    both = draw([np.concatenate([far, near])], palettes=("pale", "single"))
    assert both.any()
    alone = draw([near], palettes=("single",), depths=depth_range([np.concatenate([far, near])]))
    covered = alone[..., 3] > 0
    assert np.array_equal(both[covered], alone[covered])


def test_joints_that_are_no_numbers_do_not_break_the_picture():
    joints = standing(1)[:, None]
    joints[0, 0, 21] = np.nan
    without = standing(1)[:, None]
    without[0, 0, 21] = 0
    assert np.array_equal(draw(joints), draw(without))


def test_wrong_shape_is_refused():
    with pytest.raises(PoseError, match=r"joints of frame 0 .* \[24, 3\].*\[persons, 24, 3\]"):
        draw(standing(2))


def test_threads_and_default_dtype_do_not_matter():
    joints = standing(2)[:, None]
    before = draw(joints)
    torch.set_default_dtype(torch.float64)
    try:
        after = draw(joints)
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.array_equal(before, after)


@pytest.mark.gpu
def test_gpu_draws_the_same_picture():
    joints = standing(3)[:, None]
    levels = np.abs(draw(joints, device="cuda").astype(int) - draw(joints))
    assert (levels > 1).mean() < 1e-3

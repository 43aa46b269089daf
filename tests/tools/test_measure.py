"""The measures, proven where the answer is known: on the truth, and on the truth made worse."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import pytest

from tools.tiny.measure import (
    colour_errors,
    figure_height,
    find_parts,
    flicker,
    flicker_ratio,
    identity_error,
    label_parts,
    pck,
    pose_agreement,
    psnr,
    seam,
    still_background,
)
from tools.tiny.world import make_clip
from xicon_infer.errors import InvalidRequest

SEEDS = range(6)


@lru_cache
def clips():
    return [make_clip(seed, split="test", num_frames=5, height=160, width=96) for seed in SEEDS]


def noisy(frames, spread):
    noise = np.random.default_rng(0).normal(0, spread, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def blurred(frames):
    return np.stack([cv2.GaussianBlur(frame, (5, 5), 0) for frame in frames])


def test_true_frames_agree_with_their_pose():
    assert np.mean([pose_agreement(clip.frames, clip) for clip in clips()]) >= 0.97


def test_a_still_reference_does_not_follow_and_a_smaller_threshold_is_stricter():
    still = [clip.reference[None].repeat(5, axis=0) for clip in clips()]
    loose = [pose_agreement(video, clip) for video, clip in zip(still, clips(), strict=True)]
    strict = [
        pose_agreement(video, clip, threshold=0.05)
        for video, clip in zip(still, clips(), strict=True)
    ]
    assert np.mean(strict) < np.mean(loose) < 0.8


def test_frames_of_another_motion_do_not():
    scores = []
    for clip, other in zip(clips(), clips()[1:], strict=False):
        points, _ = find_parts(other.frames, other.colours)
        scores.append(pck(points, clip.points, clip.visible, figure_height(clip)))
    assert np.mean(scores) < 0.6


def test_blur_and_noise_as_a_small_model_makes_them_are_borne():
    for clip in clips()[:3]:
        assert pose_agreement(noisy(blurred(clip.frames), 6), clip) >= 0.9


def test_empty_frames_hold_no_parts():
    points, found = find_parts(np.full_like(clips()[0].frames, 128), np.array([[255, 0, 0]] * 2))
    assert not found.any() and np.isnan(points).all()


def test_the_largest_blob_is_the_part():
    frame = np.full((1, 40, 60, 3), 200, np.uint8)
    frame[0, 10:20, 30:40] = (255, 0, 0)
    frame[0, 30:32, 2:6] = (210, 0, 0)
    points, found = find_parts(frame, np.array([[255, 0, 0], [0, 0, 255]], np.uint8))
    assert found.tolist() == [[True, False]]
    assert points[0, 0].tolist() == [35.0, 15.0]


def test_a_shade_belongs_to_its_part_and_a_stranger_to_none():
    colours = np.array([[200, 40, 40], [40, 200, 40]], np.uint8)
    row = np.array([[[160, 32, 32], [40, 200, 40], [40, 40, 220]]], np.uint8)
    assert label_parts(row[None], colours).tolist() == [[[0, 1, -1]]]
    errors = colour_errors(row[None], colours)
    assert errors.shape == (2, 1, 1, 3) and errors[0, 0, 0, 0] < 1 < errors[0, 0, 0, 1]


def test_pck_counts_the_near_ones():
    true = np.zeros((1, 4, 2), np.float32)
    found = np.array([[[5, 0], [15, 0], [np.nan, np.nan], [500, 0]]], np.float32)
    visible = np.array([[True, True, True, False]])
    assert pck(found, true, visible, 100) == pytest.approx(1 / 3)
    assert pck(found, true, visible, 100, threshold=0.2) == pytest.approx(2 / 3)
    assert pck(found, true, visible, 40) == 0
    assert pck(found, true, ~visible, 100) == 0


def test_identity_of_the_truth_is_right_and_of_a_stranger_wrong():
    own = [identity_error(clip.frames, clip) for clip in clips()]
    strangers = [
        identity_error(other.frames, clip)
        for clip, other in zip(clips(), clips()[1:], strict=False)
    ]
    assert np.mean(own) < 6 and np.mean(strangers) > 60
    clip = clips()[0]
    paler = (0.6 * clip.frames + 0.4 * 255).astype(np.uint8)
    assert own[0] + 15 < identity_error(paler, clip)


def test_flicker_grows_with_noise():
    frames = clips()[0].frames
    values = [flicker(noisy(frames, spread)) for spread in (0, 3, 8, 20)]
    assert values == sorted(values) and values[-1] > 3 * values[0] + 1
    assert flicker_ratio(frames, frames) == pytest.approx(1)
    assert flicker_ratio(noisy(frames, 8), frames) > 1.5
    assert flicker_ratio(frames[[0] * len(frames)], frames) == 0


def test_flicker_of_even_motion_is_none_and_a_mask_chooses():
    ramp = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((1, 4, 6, 3), 9, np.uint8)
    assert flicker(ramp) == 0
    ramp[2, :, :3] += 30
    left = np.zeros((4, 6), bool)
    left[:, :3] = True
    assert flicker(ramp, ~left) == 0 < flicker(ramp) < flicker(ramp, left)


def test_the_background_of_the_truth_is_still():
    for clip in clips():
        still = still_background(clip)
        assert 0.1 < still.mean() < 0.95 and flicker(clip.frames, still) < 1.5
        assert not still[tuple(clip.points[0, 2].astype(int)[::-1])] or still.mean() > 0.6


def test_a_seam_is_seen_where_it_is():
    first, second = clips()[0].frames, clips()[1].frames
    cut = np.concatenate([first, second])
    assert seam(cut, [len(first)]) > 3
    assert seam(cut, [2]) < 2
    assert seam(cut, [2, len(first)]) == pytest.approx(seam(cut, [len(first)]), rel=0.5)
    assert seam(first[[0] * 6], [3]) == 0


def test_psnr():
    black, grey = np.zeros((2, 3), np.uint8), np.full((2, 3), 255, np.uint8)
    assert psnr(black, black) == float("inf") and psnr(black, grey) == 0
    assert psnr(black, black + 1) == pytest.approx(48.13, abs=0.01)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda c: find_parts(c.frames[0], c.colours), "frames"),
        (lambda c: find_parts(c.frames / 255, c.colours), "frames"),
        (lambda c: pck(c.points[:1], c.points, c.visible, 100), "found_points"),
        (lambda c: pck(c.points, c.points, c.visible & False, 100), "visible"),
        (lambda c: identity_error(c.frames[:2], c), "frames"),
        (lambda c: flicker(c.frames[:2]), "frames"),
        (lambda c: flicker(c.frames, np.zeros((160, 96), bool)), "mask"),
        (lambda c: seam(c.frames, []), "joints"),
        (lambda c: seam(c.frames, [5]), "joints"),
        (lambda c: seam(c.frames, [1, 2, 3, 4]), "joints"),
        (lambda c: psnr(c.frames, c.frames[:1]), "b"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, field):
    with pytest.raises(InvalidRequest) as caught:
        call(clips()[0])
    assert caught.value.field == field

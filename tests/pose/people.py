"""Invented persons for the pose tests: a standing figure whose 2-D points fit its joints."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from xicon_infer.pose.camera import default_intrinsics, project
from xicon_infer.pose.skeleton import FACE, KEYPOINTS, LEFT_HAND, RIGHT_HAND
from xicon_infer.types import BodyTrack, PoseTrack, Track

Array = np.ndarray[Any, Any]

# x, y in millimetres of the SMPL-24 joints, facing the camera (left is at positive x).
_JOINTS = np.array(
    [
        (0, 0), (90, 60), (-90, 60), (0, -100), (100, 460), (-100, 460), (0, -230), (100, 860),
        (-100, 860), (0, -290), (110, 910), (-110, 910), (0, -480), (70, -420), (-70, -420),
        (0, -560), (170, -430), (-170, -430), (280, -220), (-280, -220), (360, -20), (-360, -20),
        (380, 60), (-380, 60),
    ],
    np.float32,
)  # fmt: skip
# The SMPL joint nearest to each of the 17 body keypoints; nose, eyes and ears follow the head.
_BODY = [15, 15, 15, 15, 15, 16, 17, 18, 19, 20, 21, 1, 2, 4, 5, 7, 8]
_HEAD_MM = np.array([(0, 0), (30, -30), (-30, -30), (70, -20), (-70, -20)], np.float32)


def standing(frames: int = 1, *, depth: float = 3000.0, x: float = 0.0) -> Array:
    """Returns joints float32 [F, 24, 3] of a person whose right arm rises every frame."""
    joints = np.zeros((frames, 24, 3), np.float32)
    joints[..., :2] = _JOINTS + np.array([x, -100], np.float32)
    joints[..., 2] = depth + 20 * np.sin(np.arange(24, dtype=np.float32))
    lift = np.arange(frames, dtype=np.float32)
    joints[:, [21, 23], 1] -= 40 * lift[:, None]
    joints[:, 19, 1] -= 20 * lift
    return joints


def make_track(
    frames: int = 3,
    *,
    size: tuple[int, int] = (192, 128),
    depth: float = 3000.0,
    x: float = 0.0,
    fps: int = 24,
) -> Track:
    """Returns a track seen by the default camera of `size` (H, W)."""
    camera = default_intrinsics(*size).astype(np.float32)
    joints = standing(frames, depth=depth, x=x)
    points = np.zeros((frames, KEYPOINTS, 3), np.float32)
    points[:, :17] = joints[:, _BODY]
    points[:, :5, :2] += _HEAD_MM
    points[:, 17:23] = np.repeat(joints[:, [10, 11]], 3, axis=1)
    points[:, FACE] = joints[:, 15:16]
    points[:, FACE, :2] += _ring(68, 70)
    for hand, wrist in ((LEFT_HAND, 20), (RIGHT_HAND, 21)):
        points[:, hand] = joints[:, wrist : wrist + 1]
        points[:, hand, :2] += _ring(21, 60) + np.array([0, 60], np.float32)
    keypoints = project(points, camera).astype(np.float32)
    low, high = keypoints.min(axis=1), keypoints.max(axis=1)
    return Track(
        PoseTrack(
            keypoints, np.full((frames, KEYPOINTS), 0.9, np.float32), np.hstack([low, high]), size
        ),
        BodyTrack(joints, np.zeros((frames, 24), np.float32), camera),
        Fraction(fps),
    )


def with_scores(track: Track, part: slice, frames: slice | list[int], score: float) -> Track:
    """Returns the track with one score for some points of some frames."""
    scores = track.pose.scores.copy()
    scores[frames, part] = score
    return replace(track, pose=replace(track.pose, scores=scores))


def without_body(track: Track, frames: slice | list[int]) -> Track:
    """Returns the track with the person missing in some frames."""
    joints = track.body.joints.copy()
    joints[frames] = 0
    gone = replace(track, body=replace(track.body, joints=joints))
    return with_scores(gone, slice(0, KEYPOINTS), frames, 0.0)


def moved(track: Track, dx: int, dy: int) -> Track:
    """Returns the track as seen after moving the picture by whole pixels."""
    camera = track.body.intrinsics + np.array([[0, 0, dx], [0, 0, dy], [0, 0, 0]], np.float32)
    keypoints = track.pose.keypoints + np.array([dx, dy], np.float32)
    return replace(
        track,
        pose=replace(track.pose, keypoints=keypoints),
        body=replace(track.body, intrinsics=camera),
    )


def _ring(points: int, radius: float) -> Array:
    angle = np.arange(points) * 2 * np.pi / points
    return (radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)).astype(np.float32)

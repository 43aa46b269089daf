"""The 133 flat points that a pose network would see on a figure: head, face, hands, body and feet.

Points hang on the 3-D joints at the size of a real person, because the tracks that will drive the
model are of real persons. What looks away from the camera gets a low score.

Shape letters: F frames, J = 24 joints, K = 133 points.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from tools.tiny.character import head_frame
from tools.tiny.motion import FPS, Float64Array
from xicon_infer.pose.camera import project
from xicon_infer.pose.skeleton import FACE, KEYPOINTS, LEFT_HAND, RIGHT_HAND
from xicon_infer.types import BodyTrack, Float32Array, PoseTrack, Track

# Leftwards, upwards and forwards of the head joint: nose, eyes and ears.
_HEAD_MM = np.array([(0, -12, 108), (30, 18, 94), (-30, 18, 94), (64, 6, 4), (-64, 6, 4)], float)
# The SMPL joint under each body point from the left shoulder on (COCO order).
_BODY = (16, 17, 18, 19, 20, 21, 1, 2, 4, 5, 7, 8)
_SURE, _UNSURE = 0.9, 0.1


def make_track(joints: Float64Array, intrinsics: Float32Array, size: tuple[int, int]) -> Track:
    """Returns the track of a figure.

    Args:
        joints: [F, J, 3], camera space, millimetres.
        intrinsics: [3, 3], pixels of the picture.
        size: (H, W).
    """
    points = np.zeros((len(joints), KEYPOINTS, 3))
    scores = np.full((len(joints), KEYPOINTS), _SURE)
    left, up, forward = head_frame(joints)
    axes = np.stack([left, up, forward], axis=1)
    points[:, :5] = joints[:, 15:16] + _HEAD_MM @ axes
    points[:, FACE] = joints[:, 15:16] + _face_mm() @ axes
    points[:, 5:17] = joints[:, _BODY]
    for first, ankle, foot in ((17, 7, 10), (20, 8, 11)):
        _set_foot(points[:, first : first + 3], joints[:, ankle], joints[:, foot])
    for part, elbow, wrist in ((LEFT_HAND, 18, 20), (RIGHT_HAND, 19, 21)):
        points[:, part] = _hand(joints[:, elbow], joints[:, wrist], left, forward)
    towards = -joints[:, 15] / np.linalg.norm(joints[:, 15], axis=1, keepdims=True)
    facing, leftwards = (forward * towards).sum(1), (left * towards).sum(1)
    scores[:, :3] = np.where(facing > 0.0, _SURE, _UNSURE)[:, None]
    scores[:, FACE] = np.where(facing > 0.1, _SURE, _UNSURE)[:, None]
    scores[:, 3] = np.where(leftwards > -0.5, _SURE, _UNSURE)
    scores[:, 4] = np.where(leftwards < 0.5, _SURE, _UNSURE)
    flat = project(points, intrinsics).astype(np.float32)
    boxes = np.concatenate([flat.min(axis=1), flat.max(axis=1)], axis=1)
    return Track(
        PoseTrack(flat, scores.astype(np.float32), boxes, size),
        BodyTrack(joints.astype(np.float32), np.zeros(joints.shape[:2], np.float32), intrinsics),
        Fraction(FPS),
    )


def _face_mm() -> Float64Array:
    """Returns the 68 face points in the head's axes, [68, 3]: jaw, brows, nose, eyes, mouth."""
    jaw = np.linspace(-np.pi / 2, np.pi / 2, 17)
    flat = [(68 * np.sin(angle), 20 - 90 * np.cos(angle)) for angle in jaw]
    flat += [(x, 46.0) for x in (-60, -50, -40, -29, -18, 18, 29, 40, 50, 60)]
    flat += [(0, y) for y in (28, 16, 4, -8)] + [(x, -18) for x in (-14, -7, 0, 7, 14)]
    for side in (-1, 1):
        ring = np.linspace(0, 2 * np.pi, 6, endpoint=False)
        flat += [(32 * side + 11 * np.cos(angle), 22 + 4 * np.sin(angle)) for angle in ring]
    for count, wide, high in ((12, 23, 9), (8, 15, 3)):
        ring = np.linspace(0, 2 * np.pi, count, endpoint=False)
        flat += [(wide * np.cos(angle), -46 + high * np.sin(angle)) for angle in ring]
    across, up = np.array(flat).T
    # The picture shows the face from the front, so the first points are the person's right.
    return np.stack([across, up, 108 - across**2 / 80], axis=1)


def _set_foot(points: Float64Array, ankle: Float64Array, foot: Float64Array) -> None:
    """Sets big toe, small toe and heel, [F, 3, 3], in place."""
    points[:, 0] = points[:, 1] = ankle + 1.3 * (foot - ankle)
    points[:, 2] = ankle - 0.3 * (foot - ankle)


def _hand(
    elbow: Float64Array, wrist: Float64Array, left: Float64Array, forward: Float64Array
) -> Float64Array:
    """Returns the 21 points of an open hand, [F, 21, 3]: wrist, then five fingers of four."""
    along = wrist - elbow
    along = along / np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-6)
    # Spread in the plane that faces as the body does, whatever the arm points at.
    spread = np.cross(along, 0.8 * forward + 0.6 * left)
    spread = spread / np.maximum(np.linalg.norm(spread, axis=1, keepdims=True), 1e-6)
    points = [wrist]
    for finger, length in enumerate((78, 128, 138, 130, 108)):
        angle = (finger - 2) * 0.26 + (-0.25 if finger == 0 else 0.0)
        way = np.cos(angle) * along + np.sin(angle) * spread
        points += [wrist + length * share * way for share in (0.45, 0.68, 0.85, 1.0)]
    return np.stack(points, axis=1)

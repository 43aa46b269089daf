"""2-D whole-body points with relative depth lifted to SMPL joints in millimetres, camera space.

The model is a pinhole camera. A point at pixel (u, v) whose depth differs by d from the root's
lies at (Z + d) ((u - cx) / fx, (v - cy) / fy, 1). So every joint projects exactly onto its 2-D
point, whatever the one unknown Z is. Z is the depth at which the limbs and the trunk get the
lengths of a person of an assumed stature.

Approximate, and meant so: the stature (size and distance of a person cannot be told apart in one
picture; a child comes out as a far adult), the proportions (a mean adult's), the network's depth,
and joints that are no keypoints: pelvis and neck are midpoints, the spine is the line between
them, collars lie on the shoulder line, the head is between the ears. Z is found in each frame
alone and is not smoothed here.

Shape letters: K = 133 keypoints, J = 24 joints, S segments.

Source: open-mmlab/mmpose: projects/rtmpose3d/rtmpose3d/pose_estimator.py lifts the same way with
a fixed Z of 5.14 m. Segment lengths: Drillis and Contini 1966, as in Winter, Biomechanics and
Motor Control of Human Movement, figure 4.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from xicon_infer.pose.camera import Float64Array
from xicon_infer.pose.skeleton import (
    KEYPOINTS,
    LEFT_HAND,
    LEFT_SHOULDER,
    LEFT_WRIST,
    RIGHT_HAND,
    RIGHT_SHOULDER,
    RIGHT_WRIST,
    SMPL_JOINTS,
)

FloatArray = npt.NDArray[np.floating[Any]]

STATURE_MM = 1700.0
"""The assumed height of the person; the contract of the NLF stand-in assumes the same."""

# Keypoint, keypoint, length as a share of the stature: trunk sides, upper arms, forearms, thighs,
# shanks. The widths of shoulders and hips are left out: they vary most, and vanish in a side view.
SEGMENTS: tuple[tuple[int, int, float], ...] = (
    (5, 11, 0.288),
    (6, 12, 0.288),
    (5, 7, 0.186),
    (6, 8, 0.186),
    (7, 9, 0.146),
    (8, 10, 0.146),
    (11, 13, 0.245),
    (12, 14, 0.245),
    (13, 15, 0.246),
    (14, 16, 0.246),
)

# A segment that looks this short, as a share of the focal length, says nothing about its distance:
# a whole bone would be 100 m away.
_SHORTEST = 1e-3
_NEAREST_MM = 100.0

_HIPS = (11, 12)
_SHOULDERS = (LEFT_SHOULDER, RIGHT_SHOULDER)


def _joint_weights() -> Float64Array:
    """Returns the mean of keypoints that makes each joint, float64 [J, K], rows sum to 1."""
    weights = np.zeros((SMPL_JOINTS, KEYPOINTS))
    # The root of the index finger to the root of the little finger.
    knuckles = (5, 9, 13, 17)
    means: dict[int, tuple[int, ...]] = {
        0: _HIPS,
        1: (11,),
        2: (12,),
        4: (13,),
        5: (14,),
        7: (15,),
        8: (16,),
        10: (17, 18),
        11: (20, 21),
        12: _SHOULDERS,
        15: (3, 4),
        16: (LEFT_SHOULDER,),
        17: (RIGHT_SHOULDER,),
        18: (7,),
        19: (8,),
        20: (LEFT_WRIST,),
        21: (RIGHT_WRIST,),
        22: tuple(LEFT_HAND.start + k for k in knuckles),
        23: tuple(RIGHT_HAND.start + k for k in knuckles),
    }
    for joint, points in means.items():
        weights[joint, list(points)] = 1.0 / len(points)
    pelvis, neck = weights[0], weights[12]
    for joint, share in ((3, 0.25), (6, 0.5), (9, 0.75)):
        weights[joint] = (1.0 - share) * pelvis + share * neck
    weights[13] = (2.0 * neck + weights[16]) / 3.0
    weights[14] = (2.0 * neck + weights[17]) / 3.0
    return weights


JOINT_WEIGHTS: Float64Array = _joint_weights()
"""float64 [24, 133]: each SMPL joint as a mean of COCO-WholeBody keypoints."""


def to_smpl(values: FloatArray) -> Float64Array:
    """Returns the values of the 24 joints, [..., 24, C], of those of the keypoints, [..., 133, C].

    Pixels and depths alike; a joint's pixel is the mean of its keypoints' pixels.
    """
    joints: Float64Array = JOINT_WEIGHTS @ np.asarray(values, np.float64)
    return joints


def lift(
    points: FloatArray, depths: FloatArray, root_depth: float, intrinsics: FloatArray
) -> Float64Array:
    """Returns where points lie in camera space.

    Args:
        points: [..., 2], pixels.
        depths: [...], millimetres behind the root; negative is nearer to the camera.
        root_depth: Z, millimetres. Raised if a point would lie less than 100 mm from the camera.
        intrinsics: [3, 3], pixels.

    Returns:
        float64 [..., 3], millimetres; each projects onto its point.
    """
    offset = np.asarray(depths, np.float64)
    depth = max(root_depth, _NEAREST_MM - float(offset.min())) + offset
    return _rays(points, intrinsics) * depth[..., None]


def root_depth(
    keypoints: FloatArray,
    depths: FloatArray,
    trusted: npt.NDArray[np.bool_],
    *,
    intrinsics: FloatArray,
    box_height: float,
    stature_mm: float = STATURE_MM,
) -> float:
    """Returns the distance at which a person's segments have their assumed lengths, millimetres.

    Each segment with both ends trusted gives the larger root of a quadratic; the mean is weighted
    by the squared length in the picture, because a segment that points at the camera says little.
    A segment that is longer in depth alone than its assumed length is left out. Without any the
    box is taken to be as high as the person.

    Args:
        keypoints: [133, 2], pixels.
        depths: [133], millimetres relative to the root.
        trusted: bool [133].
        intrinsics: [3, 3], pixels.
        box_height: of the person, pixels.
        stature_mm: the assumed height of the person.
    """
    pairs = np.array([(a, b) for a, b, _ in SEGMENTS])
    length = stature_mm * np.array([share for _, _, share in SEGMENTS])
    rays = _rays(keypoints, intrinsics)
    bent = rays * np.asarray(depths, np.float64)[:, None]
    # |Z a + b| = length, where a is the segment at depth 1 and b the part its ends' depths add.
    a, b = rays[pairs[:, 0]] - rays[pairs[:, 1]], bent[pairs[:, 0]] - bent[pairs[:, 1]]
    aa, ab, bb = (a * a).sum(axis=1), (a * b).sum(axis=1), (b * b).sum(axis=1)
    under = ab**2 - aa * (bb - length**2)
    usable = trusted[pairs].all(axis=1) & (under >= 0.0) & (aa > _SHORTEST**2)
    if not usable.any():
        return float(intrinsics[1, 1] * stature_mm / max(box_height, 1.0))
    found = (np.sqrt(under[usable]) - ab[usable]) / aa[usable]
    return float((found * aa[usable]).sum() / aa[usable].sum())


def _rays(points: FloatArray, intrinsics: FloatArray) -> Float64Array:
    """Returns the directions float64 [..., 3] of pixels [..., 2], their depth 1."""
    pixels = np.asarray(points, np.float64)
    x = (pixels[..., 0] - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (pixels[..., 1] - intrinsics[1, 2]) / intrinsics[1, 1]
    return np.stack([x, y, np.ones_like(x)], axis=-1)

"""Who in this frame is who in the last ones: unlikeness of persons, and the best pairing.

Pictures are not looked at: place, size, pose and depth tell persons apart. Everything is measured
in body heights and seconds, so neither resolution nor frame rate changes a decision.

Shape letters: N, M persons; K = 17 body points.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from xicon_infer.pose.camera import Float64Array
from xicon_infer.pose.keypoints import KP_SCORE_THR
from xicon_infer.pose.skeleton import SMPL_PELVIS
from xicon_infer.types import Float32Array

BODY = slice(0, 17)
"""The body among the 133 points; hands and face follow it."""

# Mean unlikeness beyond which two are not one person: at once, and what is added for somebody
# lost. A fast dance stays below 0.17 at 24 frames per second, and below 0.24 at 6.
_MAX_UNLIKE = (0.5, 0.15)
# Allowances at once, and per second since the person was last seen.
_MOVE_HEIGHTS = (0.35, 2.5)
_MOVE_HEIGHTS_MAX = 1.5
_PELVIS_MM = (500.0, 3000.0)
# The network's depth is several times less certain than the place across the line of sight.
_DOUBT = np.array([1.0, 1.0, 3.0])
_POSE_HEIGHTS = (0.15, 1.5)
# A box may shrink or grow by this factor: crouching, or legs that leave the picture.
_SIZE_RATIO = 2.5
# Somebody seen a moment ago goes before somebody lost; the whole of it after this time.
_LOST_COST, _LOST_S = 0.1, 0.5
# Leaving a person without a partner costs as much as the worst pair that is allowed.
_ALONE_COST = sum(_MAX_UNLIKE) + _LOST_COST
# Fewer common points say nothing about a pose.
_MIN_POINTS = 4
# Two detections are one person if the smaller box lies in the larger by this share, and points
# and pelvis agree; without points to compare, if the boxes are all but the same.
_COVERED_SHARE = 0.6
_SAME_POSE_HEIGHTS = 0.05
_SAME_PELVIS_MM = 300.0
_SAME_BOX_IOU = 0.85
_FAR = 1e6


class Look(NamedTuple):
    """How persons look in one frame, or are expected to.

    bboxes: float64 [N, 4], x1 y1 x2 y2. points: float64 [N, K, 2], pixels, not a number where
    unseen. pelvis: float64 [N, 3], millimetres, not a number without a body.
    detector_ids: int64 [N], -1 where the detector gives none.
    """

    bboxes: Float64Array
    points: Float64Array
    pelvis: Float64Array
    detector_ids: npt.NDArray[np.int64]


def make_look(
    bboxes: Float32Array,
    keypoints: Float32Array,
    scores: Float32Array,
    joints: Float32Array,
    detector_ids: tuple[int, ...],
) -> Look:
    """Returns the look of N persons.

    Args:
        bboxes: [N, 4] pixels.
        keypoints: [N, 133, 2] pixels; unseen where the score is below 0.3.
        scores: [N, 133], 0 to 1.
        joints: [N, 24, 3] millimetres; zeros where there is no body.
        detector_ids: N numbers, -1 for none.
    """
    seen = scores[:, BODY] >= KP_SCORE_THR
    pelvis = joints[:, SMPL_PELVIS].astype(np.float64)
    in_front = pelvis[:, 2:] > 0
    return Look(
        bboxes.astype(np.float64),
        np.where(seen[..., None], keypoints[:, BODY].astype(np.float64), np.nan),
        np.where(in_front, pelvis, np.nan),
        np.asarray(detector_ids, np.int64),
    )


def pair(expected: Look, found: Look, *, age_s: Float64Array, frame_s: float) -> list[int]:
    """Returns, for each of N expected persons, which of M found persons it is, or -1.

    Args:
        expected: N persons as they should look now.
        found: M persons of the frame.
        age_s: [N], seconds since each was last seen; one frame's time for the last frame.
        frame_s: seconds per frame.
    """
    persons, choices = len(expected.bboxes), len(found.bboxes)
    if not persons or not choices:
        return [-1] * persons
    unlike = _unlikeness(expected, found, age_s)
    lost = np.clip((age_s - frame_s) / _LOST_S, 0, 1)[:, None]
    most = _MAX_UNLIKE[0] + _MAX_UNLIKE[1] * lost
    costs = np.where(unlike <= most, unlike + _LOST_COST * lost, _FAR)
    alone = np.full((persons, persons), _ALONE_COST)
    chosen = assign(np.hstack([costs, alone]))
    return [int(column) if column < choices else -1 for column in chosen]


def find_duplicates(look: Look) -> list[int]:
    """Returns the rows that show a person whom an earlier row shows; put the best rows first."""
    overlap, inside = _overlaps(look.bboxes, look.bboxes)
    heights = look.bboxes[:, 3] - look.bboxes[:, 1]
    taller = np.maximum(heights[:, None], heights[None, :])
    apart = _mean_distance(look.points, look.points)
    pelvis = np.linalg.norm(look.pelvis[:, None] - look.pelvis[None, :], axis=2)
    # Without common points, or without bodies, the comparison is false for not a number.
    same_pose = (inside >= _COVERED_SHARE) & (apart < _SAME_POSE_HEIGHTS * taller)
    same = same_pose | (np.isnan(apart) & (overlap >= _SAME_BOX_IOU))
    same &= ~(pelvis >= _SAME_PELVIS_MM)
    ids = look.detector_ids
    same = (same & ~_other_ids(ids, ids)) | ((ids[:, None] == ids) & (ids >= 0))
    duplicates: list[int] = []
    for row in range(len(ids)):
        kept = [other for other in range(row) if other not in duplicates]
        if same[row, kept].any():
            duplicates.append(row)
    return duplicates


def assign(costs: Float64Array) -> list[int]:
    """Returns the column of each row in the pairing with the smallest sum of costs.

    Shortest augmenting paths with potentials (Kuhn, Munkres; Jonker and Volgenant), O(N^2 M).

    Args:
        costs: float64 [N, M], finite, N <= M.
    """
    rows, columns = costs.shape
    row_price, column_price = np.zeros(rows), np.zeros(columns + 1)
    # The last place of owner holds the row that looks for a column.
    owner = np.full(columns + 1, -1)
    for row in range(rows):
        owner[columns] = row
        column = columns
        slack = np.full(columns, np.inf)
        came_from = np.full(columns, columns)
        visited = np.zeros(columns + 1, bool)
        while owner[column] >= 0:
            visited[column] = True
            current = owner[column]
            reduced = costs[current] - row_price[current] - column_price[:columns]
            better = ~visited[:columns] & (reduced < slack)
            slack[better] = reduced[better]
            came_from[better] = column
            following = int(np.argmin(np.where(visited[:columns], np.inf, slack)))
            step = slack[following]
            row_price[owner[visited]] += step
            column_price[visited] -= step
            slack[~visited[:columns]] -= step
            column = following
        while column != columns:
            owner[column] = owner[came_from[column]]
            column = int(came_from[column])
    result = [-1] * rows
    for column in range(columns):
        if owner[column] >= 0:
            result[owner[column]] = column
    return result


def _unlikeness(expected: Look, found: Look, age_s: Float64Array) -> Float64Array:
    """Returns [N, M]: 0 for the same look, infinite where it cannot be the same person."""
    age = age_s[:, None]
    heights = np.maximum(expected.bboxes[:, 3] - expected.bboxes[:, 1], 1e-6)[:, None]
    found_heights = np.maximum(found.bboxes[:, 3] - found.bboxes[:, 1], 1e-6)
    centres = (expected.bboxes[:, :2] + expected.bboxes[:, 2:]) / 2
    found_centres = (found.bboxes[:, :2] + found.bboxes[:, 2:]) / 2
    move = np.linalg.norm(centres[:, None] - found_centres, axis=2) / heights
    move /= np.minimum(_allowance(_MOVE_HEIGHTS, age), _MOVE_HEIGHTS_MAX)
    size = np.abs(np.log(found_heights / heights)) / np.log(_SIZE_RATIO)
    pelvis = np.linalg.norm((expected.pelvis[:, None] - found.pelvis) / _DOUBT, axis=2)
    pose = _mean_distance(expected.points, found.points) / heights
    terms = np.stack(
        [
            move,
            size,
            1 - _overlaps(expected.bboxes, found.bboxes)[0],
            np.minimum(pelvis / _allowance(_PELVIS_MM, age), 1),
            np.minimum(pose / _allowance(_POSE_HEIGHTS, age), 1),
        ]
    )
    impossible = (move > 1) | (size > 1) | _other_ids(expected.detector_ids, found.detector_ids)
    return np.where(impossible, np.inf, _known_mean(terms, 1))


def _allowance(base_and_rate: tuple[float, float], age: Float64Array) -> Float64Array:
    base, rate = base_and_rate
    return base + rate * age


def _other_ids(
    first: npt.NDArray[np.int64],
    second: npt.NDArray[np.int64],
) -> npt.NDArray[np.bool_]:
    """Returns [N, M]: did the detector itself say that they are two persons?"""
    given = (first[:, None] >= 0) & (second >= 0)
    return given & (first[:, None] != second)


def _mean_distance(first: Float64Array, second: Float64Array) -> Float64Array:
    """Returns [N, M] mean pixels between common points; not a number for fewer than four."""
    distances = np.linalg.norm(first[:, None] - second, axis=3)
    return _known_mean(np.moveaxis(distances, 2, 0), _MIN_POINTS)


def _known_mean(values: Float64Array, fewest: int) -> Float64Array:
    """Returns the mean over axis 0 of what is a number; not a number for fewer than `fewest`."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0).sum(axis=0)
    return np.where(count >= fewest, total / np.maximum(count, 1), np.nan)


def _overlaps(first: Float64Array, second: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Returns [N, M] intersection over union, and intersection over the smaller box."""
    low = np.maximum(first[:, None, :2], second[:, :2])
    high = np.minimum(first[:, None, 2:], second[:, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    areas = (first[:, 2:] - first[:, :2]).prod(axis=1)[:, None]
    second_areas = (second[:, 2:] - second[:, :2]).prod(axis=1)
    union = areas + second_areas - common
    smaller = np.minimum(areas, second_areas)
    return common / np.maximum(union, 1e-9), common / np.maximum(smaller, 1e-9)

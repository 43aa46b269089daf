"""The camera that brings 3-D joints onto 2-D targets, exactly and without an optimiser.

The picture of the joints is scaled by m, stretched by s in height, and moved by p and q pixels:

    u = fx m X / Z + cx + p        v = fy m s Y / Z + cy + q

With a = m and b = m s the weighted squared error is a convex quadratic of (a, b, p, q), and every
bound is linear. So the optimum is the best permitted point among the minima on the faces of the
permitted region: each of the four unknowns is free or at one of its two ends, 81 tiny linear
systems in all. The references run a numeric optimiser (L-BFGS-B) towards the same point.

Shape letter: N points. It knows nothing of skeletons; `align.py` chooses points and weights.

Source: zai-org/SCAIL-Pose: NLFPoseExtract/align3d.py; rookiestar28/ComfyUI-SCAIL-Pose2:
NLFPoseExtract/align3d.py
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from xicon_infer.errors import PoseError
from xicon_infer.pose.camera import project

Float64Array = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.floating[Any]]
Range = tuple[float, float]

# Rounding may push a point of a face this far over the edge; relative for m and s, else pixels.
_SLACK = 1e-9


class Bounds(NamedTuple):
    """Lowest and highest m and s. p and q always stay within one picture width and height."""

    m: Range = (0.7, 1.4)
    s: Range = (0.8, 1.15)


BOUNDS = Bounds()
"""Those of both references."""

WIDE_BOUNDS = Bounds((0.2, 5.0), (0.2, 5.0))
"""For a half-length reference with a full-length driver, as the model's authors advise."""


class CameraFit(NamedTuple):
    """A solved camera.

    intrinsics: float64 [3, 3], the camera to draw with. m, s: scale, and extra stretch in height.
    p, q: shift in pixels. error_px: mean distance of the projected points from their targets.
    """

    intrinsics: Float64Array
    m: float
    s: float
    p: float
    q: float
    error_px: float


def solve_camera(
    points: FloatArray,
    targets: FloatArray,
    weights: FloatArray,
    *,
    intrinsics: FloatArray,
    size: tuple[int, int],
    bounds: Bounds = BOUNDS,
) -> CameraFit:
    """Returns the permitted camera with the least weighted squared distance to the targets.

    Args:
        points: [N, 3], millimetres in camera space, N at least 1, all in front of the camera.
        targets: [N, 2], pixels.
        weights: [N], more than 0.
        intrinsics: [3, 3], the camera to start from.
        size: (H, W) of the picture, pixels; p and q are held to -W..W and -H..H.
        bounds: of m and s.

    Raises:
        PoseError: if the shapes do not fit, a number is not finite, or a point is not in front.

    Source: zai-org/SCAIL-Pose: NLFPoseExtract/align3d.py. Differs from it: exact, and the start
    camera may have any focal lengths and centre.
    """
    joints, goals = np.asarray(points, np.float64), np.asarray(targets, np.float64)
    shares = np.asarray(weights, np.float64)
    _check(joints, goals, shares)
    focal = np.array([intrinsics[0, 0], intrinsics[1, 1]], np.float64)
    centre = np.array([intrinsics[0, 2], intrinsics[1, 2]], np.float64)
    matrix, wanted = _system(joints[:, :2] / joints[:, 2:] * focal, goals - centre, shares)
    best, least = np.array([1.0, 1.0, 0.0, 0.0]), np.inf
    for basis, origin in _faces(bounds, size):
        free = np.linalg.lstsq(matrix @ basis, wanted - matrix @ origin, rcond=None)[0]
        candidate = basis @ free + origin
        cost = float(np.square(matrix @ candidate - wanted).sum())
        if cost < least and _permitted(candidate, bounds, size):
            best, least = candidate, cost
    a, b, p, q = (float(value) for value in best)
    camera = np.array(
        [[focal[0] * a, 0.0, centre[0] + p], [0.0, focal[1] * b, centre[1] + q], [0.0, 0.0, 1.0]]
    )
    error = np.linalg.norm(project(joints, camera) - goals, axis=1).mean()
    return CameraFit(camera, a, b / a, p, q, float(error))


def _check(points: Float64Array, targets: Float64Array, weights: Float64Array) -> None:
    count = len(points)
    if count < 1 or (points.shape, targets.shape, weights.shape) != (
        (count, 3),
        (count, 2),
        (count,),
    ):
        raise PoseError(
            f"points {list(points.shape)}, targets {list(targets.shape)} and weights "
            f"{list(weights.shape)} do not fit; [N, 3], [N, 2] and [N] with N >= 1 are needed.",
            field="points",
            code="TRACK_INVALID",
        )
    numbers = np.isfinite(points).all() and np.isfinite(targets).all()
    if not numbers or not (points[:, 2] > 0).all() or not (weights > 0).all():
        raise PoseError(
            "points and targets must be finite, every depth and every weight more than 0; "
            "leave out the joints that are not.",
            field="points",
            code="TRACK_INVALID",
        )


def _system(
    rays: Float64Array, targets: Float64Array, weights: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Returns matrix [2N, 4] and wanted [2N] of the least-squares problem in (a, b, p, q)."""
    root, zero = np.sqrt(weights), np.zeros(len(weights))
    across = np.stack([rays[:, 0] * root, zero, root, zero], axis=1)
    down = np.stack([zero, rays[:, 1] * root, zero, root], axis=1)
    return np.concatenate([across, down]), (targets * root[:, None]).T.reshape(-1)


def _faces(bounds: Bounds, size: tuple[int, int]) -> Iterator[tuple[Float64Array, Float64Array]]:
    """Yields each face as basis [4, k] and origin [4]: its points are basis z + origin.

    None stands for a free unknown. The inside of the region, with nothing at an end, comes first.
    """
    height, width = size
    for m, s, p, q in product(
        (None, *bounds.m), (None, *bounds.s), (None, -width, width), (None, -height, height)
    ):
        basis, origin = np.eye(4), np.zeros(4)
        if s is not None:
            basis[1] = [s, 0.0, 0.0, 0.0]
        if m is not None:
            origin += basis[:, 0] * m
        for row, end in ((2, p), (3, q)):
            origin[row] = 0.0 if end is None else end
        fixed = [end is not None for end in (m, s, p, q)]
        yield basis[:, np.logical_not(fixed)], origin


def _permitted(candidate: Float64Array, bounds: Bounds, size: tuple[int, int]) -> bool:
    a, b, p, q = (float(value) for value in candidate)
    ranges = (
        (a, *bounds.m),
        (b, bounds.s[0] * a, bounds.s[1] * a),
        (p, -size[1], size[1]),
        (q, -size[0], size[0]),
    )
    return all(
        low - _SLACK * max(1.0, abs(low)) <= value <= high + _SLACK * max(1.0, abs(high))
        for value, low, high in ranges
    )

"""Pinhole camera, and the one affine that carries a driving frame onto a canvas.

The affine is applied to the intrinsics and to the 2-D keypoints alike, so capsules and overlay
stay together whatever the two aspect ratios are. The references use a fresh 55 degree camera on
the canvas instead, which agrees only where the aspects agree.

Shape letters: F frames, J joints, K keypoints; coordinates are x, y in pixels measured from the
corner of the picture (a pixel's centre is at + 0.5).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from xicon_infer.errors import InvalidRequest

Float64Array = npt.NDArray[np.float64]
CanvasFit = Literal["crop", "pad"]

FOV_DEGREES = 55.0
"""Field of view over the longer side that the 3-D joint network assumes."""


class Affine(NamedTuple):
    """A uniform scale followed by a shift in pixels: x -> scale x + dx, y -> scale y + dy."""

    scale: float
    dx: float
    dy: float


def default_intrinsics(height: int, width: int, fov_degrees: float = FOV_DEGREES) -> Float64Array:
    """Returns the camera of a picture whose longer side spans `fov_degrees`.

    Args:
        height: H, pixels.
        width: W, pixels.
        fov_degrees: field of view over the longer side.

    Returns:
        float64 [3, 3]; principal point (W / 2, H / 2).

    Source: zai-org/SCAIL-Pose: NLFPoseExtract/nlf_draw.py
    """
    focal = max(height, width) / (2.0 * math.tan(math.radians(fov_degrees) / 2.0))
    return np.array([[focal, 0.0, width / 2.0], [0.0, focal, height / 2.0], [0.0, 0.0, 1.0]])


def fit_affine(
    source_size: tuple[int, int], canvas_size: tuple[int, int], fit: CanvasFit = "crop"
) -> Affine:
    """Returns the centred map of a source frame onto a canvas.

    Args:
        source_size: (H, W) of the driving frames.
        canvas_size: (H, W) of the picture to draw.
        fit: "crop" covers the canvas and cuts the rest; "pad" fits inside and leaves bars.

    Raises:
        InvalidRequest: if `fit` is another word.
    """
    ratios = (canvas_size[0] / source_size[0], canvas_size[1] / source_size[1])
    if fit == "crop":
        scale = max(ratios)
    elif fit == "pad":
        scale = min(ratios)
    else:
        raise InvalidRequest(
            f"fit is {fit!r}; the pose stage allows 'crop' or 'pad'. Choose one.", field="fit"
        )
    dx = (canvas_size[1] - scale * source_size[1]) / 2.0
    dy = (canvas_size[0] - scale * source_size[0]) / 2.0
    return Affine(scale, dx, dy)


def map_points(points: npt.NDArray[np.floating[Any]], affine: Affine) -> Float64Array:
    """Returns points [..., 2] of the source frame as float64 points of the canvas."""
    shift = np.array([affine.dx, affine.dy])
    return np.asarray(points, np.float64) * affine.scale + shift


def map_intrinsics(intrinsics: npt.NDArray[np.floating[Any]], affine: Affine) -> Float64Array:
    """Returns the source camera [3, 3] as seen on the canvas, float64 [3, 3]."""
    matrix = np.array(
        [[affine.scale, 0.0, affine.dx], [0.0, affine.scale, affine.dy], [0.0, 0.0, 1.0]]
    )
    mapped: Float64Array = matrix @ np.asarray(intrinsics, np.float64)
    return mapped


def project(
    points: npt.NDArray[np.floating[Any]], intrinsics: npt.NDArray[np.floating[Any]]
) -> Float64Array:
    """Returns where 3-D points land on the picture.

    Args:
        points: [..., 3], millimetres, camera space.
        intrinsics: [3, 3], pixels.

    Returns:
        float64 [..., 2]; not a number where a point is not in front of the camera.
    """
    points = np.asarray(points, np.float64)
    depth = points[..., 2:]
    in_front = depth > 0.0
    rays = points[..., :2] / np.where(in_front, depth, 1.0)
    focal = np.array([intrinsics[0, 0], intrinsics[1, 1]], np.float64)
    centre = np.array([intrinsics[0, 2], intrinsics[1, 2]], np.float64)
    return np.where(in_front, rays * focal + centre, np.nan)

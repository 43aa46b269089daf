"""Round cones become a shaded picture: distance to the axis, a depth buffer, two by two samples.

Each shape is drawn as it looks from far away: its outline is the hull of two circles, and its
surface bulges towards the camera as a sphere does. That is exact enough for figures a few metres
off, and shapes join without seams because the nearest surface wins at every sample.

Shape letters: F frames, S shapes, h and w samples (twice the pixels), P parts.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from tools.tiny.character import FEATURES, PARTS, SHADE, Solids
from tools.tiny.motion import Float64Array
from xicon_infer.pose.camera import project
from xicon_infer.types import Float32Array, UInt8Array

SAMPLES = 2
"""Samples per pixel, each way."""

_SOFT_SAMPLES, _SOFTNESS = 6, 1.26
# Of an even kernel, whose middle lies between the two samples of a pixel.
_ANCHOR = (2, 2)

# Towards the lamp: above, to the left and in front (x right, y down, z forward).
_LIGHT = np.array([-0.45, -0.55, -0.70], np.float32)


class Drawing(NamedTuple):
    """frames uint8 [F, H, W, 3]; seen and whole int64 [F, P].

    `seen` counts the samples of each part in the picture, `whole` what they were if nothing hid
    it and the picture had no border.
    """

    frames: UInt8Array
    seen: npt.NDArray[np.int64]
    whole: npt.NDArray[np.int64]


def draw_solids(
    solids: Solids,
    colours: UInt8Array,
    backdrop: UInt8Array,
    *,
    intrinsics: Float32Array,
) -> Drawing:
    """Returns the shapes before a backdrop.

    Args:
        solids: the shapes of F frames.
        colours: uint8 [P, 3], by part.
        backdrop: uint8 [F, h, w, 3], the background at `SAMPLES` times the picture's size.
        intrinsics: [3, 3], pinhole, pixels of the picture.
    """
    frames, height, width = backdrop.shape[:3]
    ends, depths, radii = _to_screen(solids, intrinsics)
    palette = np.concatenate([colours, FEATURES]).astype(np.float32)[solids.parts]
    seen = np.zeros((frames, len(PARTS)), np.int64)
    samples = backdrop.copy()
    for frame in range(frames):
        winner, shade = _draw_frame(ends[frame], depths[frame], radii[frame], (height, width))
        hit = winner >= 0
        shapes = winner[hit]
        samples[frame][hit] = (palette[shapes] * shade[hit][:, None] + 0.5).astype(np.uint8)
        # Eyes and mouth count as the face.
        parts = np.clip(solids.parts[shapes], 0, None)
        seen[frame] = np.bincount(parts, minlength=len(PARTS))
    return Drawing(_soften(samples), seen, _whole_areas(solids, ends, radii))


def _soften(samples: UInt8Array) -> UInt8Array:
    """Returns the picture of samples [F, 2H, 2W, 3], with soft edges.

    Two samples to each side count, not only the four under a pixel: edges as hard as a pixel ask
    more of a small VAE than everything else in the picture together.
    """
    one = cv2.getGaussianKernel(_SOFT_SAMPLES, _SOFTNESS)
    softened = [cv2.sepFilter2D(picture, -1, one, one, anchor=_ANCHOR) for picture in samples]
    return np.stack(softened)[:, ::SAMPLES, ::SAMPLES]


def _to_screen(
    solids: Solids, intrinsics: Float32Array
) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Returns ends [F, S, 2, 2] in samples, depths [F, S, 2] and radii [F, S, 2] in samples.

    Depths are in samples too, so that a bulge has the same unit both ways.
    """
    points = np.stack([solids.start, solids.end], axis=2)
    scale = SAMPLES * float(intrinsics[0, 0]) / points[..., 2]
    ends = project(points, intrinsics) * SAMPLES
    # One scale for all depths keeps the order of shapes.
    depths = points[..., 2] * np.median(scale)
    radii = solids.radii[None] * scale
    return ends.astype(np.float32), depths.astype(np.float32), radii.astype(np.float32)


def _draw_frame(
    ends: Float32Array, depths: Float32Array, radii: Float32Array, size: tuple[int, int]
) -> tuple[npt.NDArray[np.int64], Float32Array]:
    """Returns the number of the nearest shape at every sample (-1: none), and its shade."""
    nearest = np.full(size, np.inf, np.float32)
    winner = np.full(size, -1, np.int64)
    shade = np.zeros(size, np.float32)
    low = np.floor((ends - radii[..., None]).min(axis=1)).astype(np.int64)
    high = np.ceil((ends + radii[..., None]).max(axis=1)).astype(np.int64) + 1
    limit = np.array(size[::-1])
    low, high = np.clip(low, 0, limit), np.clip(high, 0, limit)
    for number in range(len(ends)):
        (left, top), (right, bottom) = low[number], high[number]
        if left >= right or top >= bottom:
            continue
        box = (slice(top, bottom), slice(left, right))
        x = np.arange(left, right, dtype=np.float32)[None] + 0.5 - ends[number, 0, 0]
        y = np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5 - ends[number, 0, 1]
        surface, inside, light = _surface(x, y, ends[number], depths[number], radii[number])
        won = inside & (surface < nearest[box])
        nearest[box][won] = surface[won]
        shade[box][won] = light[won]
        winner[box][won] = number
    return winner, shade


def _surface(
    x: Float32Array, y: Float32Array, ends: Float32Array, depths: Float32Array, radii: Float32Array
) -> tuple[Float32Array, npt.NDArray[np.bool_], Float32Array]:
    """Returns depth, whether the shape is there, and shade, each [rows, columns].

    Args:
        x: [1, columns], samples from the first end.
        y: [rows, 1], likewise.
        ends: [2, 2], samples.
        depths: [2], likewise.
        radii: [2], likewise.
    """
    dx, dy = ends[1] - ends[0]
    share = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-3), 0, 1)
    x, y = x - share * dx, y - share * dy
    radius = radii[0] + share * (radii[1] - radii[0])
    squared = radius * radius - x * x - y * y
    inside = squared > 0
    bulge = np.sqrt(np.maximum(squared, 0))
    surface = depths[0] + share * (depths[1] - depths[0]) - bulge
    facing = (x * _LIGHT[0] + y * _LIGHT[1] - bulge * _LIGHT[2]) / radius
    dark, bright = SHADE
    # Nearly flat where the lamp falls, so that a part keeps its colour.
    return surface, inside, dark + (bright - dark) * np.clip(0.35 + 0.8 * facing, 0, 1)


def _whole_areas(solids: Solids, ends: Float32Array, radii: Float32Array) -> npt.NDArray[np.int64]:
    """Returns roughly the samples of each part's outline if nothing hid it, int64 [F, P]."""
    length = np.linalg.norm(ends[:, :, 1] - ends[:, :, 0], axis=-1)
    area = length * radii.sum(axis=-1) + np.pi * radii.mean(axis=-1) ** 2
    whole = np.zeros((len(ends), len(PARTS)))
    for number, part in enumerate(solids.parts):
        if part >= 0:
            whole[:, part] += area[:, number]
    return whole.astype(np.int64)


def centre_of_parts(solids: Solids, intrinsics: Float32Array) -> Float64Array:
    """Returns the pixel (x, y) of the middle of each part, [F, P, 2].

    Shapes count by the area of their outline.
    """
    ends, _, radii = _to_screen(solids, intrinsics)
    length = np.linalg.norm(ends[:, :, 1] - ends[:, :, 0], axis=-1)
    area = length * radii.sum(axis=-1) + np.pi * radii.mean(axis=-1) ** 2
    middle = ends.mean(axis=2) / SAMPLES
    centres = np.zeros((len(ends), len(PARTS), 2))
    for part in range(len(PARTS)):
        mine = solids.parts == part
        weight = area[:, mine, None]
        centres[:, part] = (middle[:, mine] * weight).sum(axis=1) / weight.sum(axis=1)
    return centres

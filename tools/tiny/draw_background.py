"""Smooth, simple backgrounds: gradients, a horizon, a few big soft shapes; and a soft shadow."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tools.tiny.motion import Float64Array
from xicon_infer.types import UInt8Array

MARGIN = 8
"""Samples around the picture that a pan may bring in."""


def draw_background(
    rng: np.random.Generator, colours: UInt8Array, *, height: int, width: int
) -> Float64Array:
    """Returns a background, [height + 2 MARGIN, width + 2 MARGIN, 3], 0 to 255.

    Args:
        rng: decides the kind and its shapes.
        colours: uint8 [2, 3], upper and lower.
        height: samples without the margin.
        width: likewise.
    """
    rows = np.linspace(-0.5, 0.5, height + 2 * MARGIN)[:, None]
    columns = np.linspace(-0.5, 0.5, width + 2 * MARGIN)[None]
    upper, lower = colours.astype(np.float64)
    kind = rng.choice(["gradient", "horizon", "shapes"], p=[0.3, 0.45, 0.25])
    if kind == "horizon":
        share = _step(rows - rng.uniform(0.1, 0.32) + 0 * columns, 0.006)
    else:
        angle = rng.uniform(0, 2 * np.pi)
        share = np.clip(0.5 + 1.1 * (rows * np.cos(angle) + columns * np.sin(angle)), 0, 1)
    picture = upper + share[..., None] * (lower - upper)
    if kind == "shapes":
        for _ in range(rng.integers(2, 5)):
            x, y = rng.uniform(-0.5, 0.5, 2)
            radius = rng.uniform(0.12, 0.35)
            far = np.hypot(columns - x, (rows - y) * height / width)
            light = rng.choice([-14.0, 14.0])
            picture = picture + (1 - _step(far - radius, 0.02))[..., None] * light
    elif rng.random() < 0.6:
        # A lamp on the wall: bright in the middle, darker towards the corners.
        picture = picture * (1.03 - 0.22 * (rows**2 + columns**2))[..., None]
    return np.clip(picture, 0, 255)


def pan_path(rng: np.random.Generator, num_frames: int) -> npt.NDArray[np.int64]:
    """Returns the shift of the background in samples (x, y), [F, 2]; zeros for most clips."""
    if rng.random() < 0.88:
        return np.zeros((num_frames, 2), np.int64)
    target = rng.uniform(-1, 1, 2) * np.array([MARGIN - 2, 2])
    return np.round(np.linspace(0, 1, num_frames)[:, None] * target).astype(np.int64)


def lay_backdrop(
    picture: Float64Array,
    pan: npt.NDArray[np.int64],
    shadows: Float64Array,
) -> UInt8Array:
    """Returns the background of every frame with a shadow under the figure, uint8 [F, h, w, 3].

    Args:
        picture: as `draw_background` gives it.
        pan: int64 [F, 2], at most `MARGIN` either way.
        shadows: [F, 3], middle x and y and half width, samples.
    """
    height, width = picture.shape[0] - 2 * MARGIN, picture.shape[1] - 2 * MARGIN
    frames = np.empty((len(pan), height, width, 3), np.uint8)
    rows, columns = np.arange(height)[:, None] + 0.5, np.arange(width)[None] + 0.5
    plain = picture.astype(np.float32)
    for frame, (x, y) in enumerate(MARGIN + pan):
        frames[frame] = plain[y : y + height, x : x + width]
        middle_x, middle_y, half = shadows[frame]
        top, bottom = (int(np.clip(middle_y + end * 0.5 * half, 0, height)) for end in (-1, 1))
        far = np.hypot((columns - middle_x) / half, (rows[top:bottom] - middle_y) / (0.28 * half))
        dark = 1 - 0.2 * np.clip(1.5 * (1 - far), 0, 1)
        frames[frame, top:bottom] = frames[frame, top:bottom] * dark[..., None]
    return frames


def _step(distance: Float64Array, softness: float) -> Float64Array:
    """Returns 0 below zero and 1 above it, with a soft edge."""
    share = np.clip(0.5 + distance / (2 * softness), 0, 1)
    return share * share * (3 - 2 * share)

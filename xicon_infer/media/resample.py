"""Interpolation without smoothing, for the resize methods that Pillow does not have.

Each axis is one matrix whose rows sum to 1, so a picture is resized by two products. The methods
are those of torch.nn.functional.interpolate, which the reference node uses for everything but
Lanczos; they skip pixels when shrinking far, so Lanczos is the default everywhere.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from xicon_infer.types import Float32Array, UInt8Array

Interpolation = Literal["bicubic", "bilinear", "area", "nearest"]

_CUBIC_A = -0.75
"""Sharpness of the cubic kernel, as in torch and OpenCV (Pillow has -0.5)."""


def interpolate(frame: UInt8Array, width: int, height: int, method: Interpolation) -> UInt8Array:
    """Returns one picture resized, rounded to the nearest level.

    Args:
        frame: uint8 [H, W, 3].
        width: new width in pixels.
        height: new height in pixels.
        method: "bicubic" and "bilinear" (edges repeated, not antialiased), "area" (mean of the
            pixels a new pixel touches) or "nearest".

    Returns:
        uint8 [height, width, 3].

    Source: pytorch/pytorch: torch/nn/functional.py interpolate (align_corners=False)
    """
    rows = axis_weights(frame.shape[0], height, method)
    columns = axis_weights(frame.shape[1], width, method)
    values = np.tensordot(rows, frame.astype(np.float32), axes=(1, 0))
    values = np.matmul(columns, values)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def axis_weights(source: int, target: int, method: Interpolation) -> Float32Array:
    """Returns float32 [target, source]: what each old pixel gives to each new one."""
    if method == "area":
        return _area_weights(source, target)
    taps = {"nearest": 1, "bilinear": 2, "bicubic": 4}[method]
    # Centre of each new pixel in old pixels, where the centre of the first old one is 0.
    centres = (np.arange(target) + 0.5) * (source / target) - 0.5
    if method == "bilinear":
        centres = np.maximum(centres, 0)
    first = np.floor(centres + 0.5 if taps == 1 else centres).astype(np.int64)
    fraction = centres - first
    weights = np.zeros((target, source), np.float32)
    for tap in range(taps):
        offset = tap - (taps - 1) // 2
        column = np.clip(first + offset, 0, source - 1)
        share = np.ones(target) if taps == 1 else _kernel(np.abs(fraction - offset), method)
        np.add.at(weights, (np.arange(target), column), share)
    return weights


def _kernel(distance: npt.NDArray[np.float64], method: str) -> npt.NDArray[np.float64]:
    """Returns the weight of a pixel at a distance below 2 (cubic) or at most 1 (linear)."""
    if method == "bilinear":
        return 1 - distance
    a = _CUBIC_A
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return np.where(distance <= 1, near, far)


def _area_weights(source: int, target: int) -> Float32Array:
    edges = np.arange(target + 1) * source
    starts, ends = edges[:-1] // target, -(-edges[1:] // target)
    index = np.arange(source)
    inside = (index >= starts[:, None]) & (index < ends[:, None])
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)

"""How good a generated video of the drawn world is, measured against the truth.

Every part of a character has its own flat colour, so a part is found by its colour and no network
is needed. Each figure answers one question and says nothing of the others: `pck` whether the parts
are where they should be, `identity_error` whether what is there has the right colour, `flicker`
whether pictures are steady, `seam` whether windows of a long video can be told apart.

Shape letters: F frames, H W pixels, P parts. Colours are RGB, 0 to 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from tools.tiny.character import SHADE
from tools.tiny.world import BoolArray, Clip
from xicon_infer.errors import InvalidRequest
from xicon_infer.types import Float32Array, UInt8Array

# A colour further than this from every part belongs to none; parts are at least 69 apart.
_TOLERANCE = 36.0
# A blob smaller than this share of the picture is an accident of blending edges.
_SMALLEST_SHARE = 1 / 2500
# Changes below a third of a level cannot be seen, so a still video has no seam in them.
_STILL_LEVELS = 0.3


def colour_errors(frames: UInt8Array, colours: UInt8Array) -> Float32Array:
    """Returns how far every pixel is from any shade of each colour, [P, F, H, W], levels.

    Args:
        frames: uint8 [F, H, W, 3].
        colours: uint8 [P, 3].
    """
    pixels = frames.reshape(-1, 3).astype(np.float32)
    flat = colours.astype(np.float32)
    own = np.square(pixels).sum(axis=1)
    dots = flat @ pixels.T
    lengths = np.maximum(np.square(flat).sum(axis=1), 1.0)[:, None]
    shade = np.clip(dots / lengths, *SHADE)
    squared = own - 2 * shade * dots + shade * shade * lengths
    errors: Float32Array = np.sqrt(np.maximum(squared, 0))
    return errors.reshape(len(colours), *frames.shape[:3])


def label_parts(frames: UInt8Array, colours: UInt8Array) -> npt.NDArray[np.int64]:
    """Returns the part with the nearest colour at every pixel, [F, H, W]; -1 where none is near.

    Args:
        frames: uint8 [F, H, W, 3].
        colours: uint8 [P, 3].

    Raises:
        InvalidRequest: if the frames are not uint8 [F, H, W, 3].
    """
    _check_frames(frames, "frames")
    errors = colour_errors(frames, colours)
    return np.where(errors.min(axis=0) < _TOLERANCE, errors.argmin(axis=0), -1)


def find_parts(frames: UInt8Array, colours: UInt8Array) -> tuple[Float32Array, BoolArray]:
    """Returns the middle of the largest blob of each part's colour, and whether there is one.

    Args:
        frames: uint8 [F, H, W, 3].
        colours: uint8 [P, 3].

    Returns:
        float32 [F, P, 2], pixel (x, y), not a number where the part is not found; bool [F, P].

    Raises:
        InvalidRequest: if the frames are not uint8 [F, H, W, 3].
    """
    labels = label_parts(frames, colours)
    smallest = labels[0].size * _SMALLEST_SHARE
    points = np.full((len(frames), len(colours), 2), np.nan, np.float32)
    for frame, picture in enumerate(labels):
        for part in range(len(colours)):
            mask = (picture == part).astype(np.uint8)
            _, _, blobs, middles = cv2.connectedComponentsWithStats(mask, connectivity=8)
            areas = blobs[1:, cv2.CC_STAT_AREA]
            if areas.size and areas.max() >= smallest:
                # A pixel's middle is half a pixel from its corner.
                points[frame, part] = middles[1 + int(areas.argmax())] + 0.5
    found = np.logical_and.reduce(np.isfinite(points), axis=-1)
    return points, found


def figure_height(clip: Clip) -> float:
    """Returns how tall the figure stands in the clip, pixels from its nose to its lowest toe."""
    y = clip.track.pose.keypoints[:, :, 1]
    return float(np.percentile(y[:, 17:23].max(axis=1) - y[:, 0], 95))


def pck(
    found_points: Float32Array,
    true_points: Float32Array,
    visible: BoolArray,
    height_px: float,
    threshold: float = 0.1,
) -> float:
    """Returns the share of visible parts found near their true place, 0 to 1.

    Args:
        found_points: [F, P, 2], pixels; a part that is not a number counts as missed.
        true_points: [F, P, 2], pixels.
        visible: bool [F, P], which parts count.
        height_px: height of the figure, pixels.
        threshold: how near, as a share of the height.

    Raises:
        InvalidRequest: if the shapes differ or nothing is visible.
    """
    if found_points.shape != true_points.shape or visible.shape != true_points.shape[:2]:
        raise InvalidRequest(
            f"found_points {found_points.shape}, true_points {true_points.shape} and visible "
            f"{visible.shape} do not belong together; give [F, P, 2] twice and [F, P].",
            field="found_points",
        )
    if not visible.any():
        raise InvalidRequest("visible holds no part; give a clip that shows one.", field="visible")
    far = np.linalg.norm(found_points - true_points, axis=-1)[visible]
    # A comparison with not a number is false: missed.
    return float((far <= threshold * height_px).mean())


def pose_agreement(frames: UInt8Array, clip: Clip, threshold: float = 0.1) -> float:
    """Returns `pck` of a video that should show the motion and the character of `clip`.

    Args:
        frames: uint8 [F, H, W, 3].
        clip: the truth.
        threshold: how near a part must be, as a share of the figure's height.

    Raises:
        InvalidRequest: if the shapes differ.
    """
    _check_pair(frames, clip.frames)
    points, _ = find_parts(frames, clip.colours)
    return pck(points, clip.points, clip.visible, figure_height(clip), threshold)


def identity_error(frames: UInt8Array, clip: Clip) -> float:
    """Returns the mean colour error of the visible parts, levels, 0 to 442.

    Where a part truly is, the pixels of the video are compared with the part's colour under the
    best shade; the median over the part forgives an edge that is a little off.

    Args:
        frames: uint8 [F, H, W, 3], of the same motion as the clip.
        clip: whose colours and places are the truth.

    Raises:
        InvalidRequest: if the shapes differ.
    """
    _check_pair(frames, clip.frames)
    truth = label_parts(clip.frames, clip.colours)
    medians = []
    errors = colour_errors(frames, clip.colours)
    for frame, part in zip(*np.nonzero(clip.visible), strict=True):
        mask = truth[frame] == part
        if mask.any():
            medians.append(float(np.median(errors[part, frame][mask])))
    return float(np.mean(medians)) if medians else 0.0


def still_background(clip: Clip, levels: int = 3) -> BoolArray:
    """Returns where the true frames stay within `levels`, bool [H, W]."""
    still: BoolArray = (np.ptp(clip.frames.astype(np.int16), axis=0) <= levels).all(axis=-1)
    return still


def flicker(frames: UInt8Array, mask: BoolArray | None = None) -> float:
    """Returns the mean absolute second difference over time, levels.

    Even motion of even surfaces gives little; what comes and goes from frame to frame gives much.

    Args:
        frames: uint8 [F, H, W, 3], three or more.
        mask: bool [H, W], which pixels count; all if None.

    Raises:
        InvalidRequest: if there are fewer than three frames, or the mask is empty or of another
            shape.
    """
    _check_frames(frames, "frames", fewest=3)
    if mask is not None and (mask.shape != frames.shape[1:3] or not mask.any()):
        raise InvalidRequest(
            f"mask is {mask.shape} with {int(mask.sum())} pixels; give at least one pixel of "
            f"{frames.shape[1:3]}.",
            field="mask",
        )
    values = frames.astype(np.float32) if mask is None else frames[:, mask].astype(np.float32)
    return float(np.abs(values[2:] - 2 * values[1:-1] + values[:-2]).mean())


def flicker_ratio(frames: UInt8Array, truth: UInt8Array, mask: BoolArray | None = None) -> float:
    """Returns the flicker of a video over that of the true one; arguments as `flicker`."""
    _check_pair(frames, truth)
    return flicker(frames, mask) / max(flicker(truth, mask), 1e-6)


def seam(frames: UInt8Array, joints: Sequence[int]) -> float:
    """Returns the largest change across a border over the typical change elsewhere.

    About 1 where no border can be told from any other pair of neighbouring frames.

    Args:
        frames: uint8 [F, H, W, 3].
        joints: numbers of the frames that begin a new window, 1 to F - 1.

    Raises:
        InvalidRequest: if there is no border, one is out of range, or no other pair is left.
    """
    _check_frames(frames, "frames", fewest=3)
    borders = np.unique(np.asarray(joints, np.int64))
    if not borders.size or borders[0] < 1 or borders[-1] >= len(frames):
        raise InvalidRequest(
            f"joints are {list(joints)}; frame numbers from 1 to {len(frames) - 1} are needed.",
            field="joints",
        )
    if len(borders) == len(frames) - 1:
        raise InvalidRequest(
            "joints leave no other pair of frames to compare with.", field="joints"
        )
    steps = np.abs(np.diff(frames.astype(np.float32), axis=0)).mean(axis=(1, 2, 3))
    typical = float(np.median(np.delete(steps, borders - 1)))
    return float(steps[borders - 1].max()) / max(typical, _STILL_LEVELS)


def psnr(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Returns the peak signal-to-noise ratio of two uint8 arrays of one shape, dB; inf if equal.

    Raises:
        InvalidRequest: if the shapes differ.
    """
    if a.shape != b.shape or not a.size:
        raise InvalidRequest(f"a is {a.shape} and b is {b.shape}; give one shape twice.", field="b")
    error = float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255.0**2 / error))


def _check_frames(frames: UInt8Array, name: str, fewest: int = 1) -> None:
    fits = frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3
    if not fits or len(frames) < fewest:
        raise InvalidRequest(
            f"{name} are {frames.dtype} {frames.shape}; uint8 [{fewest} or more, H, W, 3] needed.",
            field=name,
        )


def _check_pair(frames: UInt8Array, truth: UInt8Array) -> None:
    _check_frames(frames, "frames")
    if frames.shape != truth.shape:
        raise InvalidRequest(
            f"frames are {frames.shape} and the true ones {truth.shape}; they must agree.",
            field="frames",
        )

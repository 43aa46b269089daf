"""What the two networks for 3-D bodies share: their input, their camera, their empty answer.

Coordinates of this package are measured from the corner of the picture, so a pixel's centre is at
+ 0.5. Both networks count from the centre of the first pixel; each shifts by that half itself.

Shape letters: B frames, P persons of a frame, J = 24 joints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from xicon_infer.errors import InvalidRequest
from xicon_infer.pose.camera import Float64Array, default_intrinsics
from xicon_infer.pose.observations import Bodies, Boxes
from xicon_infer.pose.skeleton import SMPL_JOINTS
from xicon_infer.types import UInt8Array

FloatArray = npt.NDArray[np.floating[Any]]


def check_frames(frames: UInt8Array, boxes: Sequence[Boxes]) -> None:
    """Refuses frames that are not uint8 [B, H, W, 3] with one `Boxes` each.

    Raises:
        InvalidRequest: another dtype, shape or number. Float pictures in particular mean 0 to 1
            to one release of a network and 0 to 255 to another.
    """
    if frames.dtype != np.uint8:
        raise InvalidRequest(
            f"'frames' are {frames.dtype}; the body networks take uint8, 0 to 255. Convert them.",
            field="frames",
        )
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise InvalidRequest(
            f"'frames' have shape {list(frames.shape)}; [B, H, W, 3] is needed", field="frames"
        )
    if len(boxes) != len(frames):
        raise InvalidRequest(
            f"'boxes' are of {len(boxes)} frames, there are {len(frames)}. Give one per frame.",
            field="boxes",
        )


def camera_or_default(intrinsics: FloatArray | None, size: tuple[int, int]) -> Float64Array:
    """Returns the camera float64 [3, 3], the 55 degree one of frames of `size` (H, W) if None.

    Raises:
        InvalidRequest: not a pinhole matrix: another shape, or no positive focal lengths.
    """
    if intrinsics is None:
        return default_intrinsics(*size)
    camera = np.asarray(intrinsics, np.float64)
    if camera.shape != (3, 3) or not (camera[0, 0] > 0 and camera[1, 1] > 0):
        raise InvalidRequest(
            f"'intrinsics' are {camera.tolist()}; a 3 x 3 matrix with positive focal lengths in "
            "pixels is needed. Give one, or None for 55 degrees.",
            field="intrinsics",
        )
    return camera


def nobody(boxes: Boxes) -> Bodies:
    """Returns one body of zeros per person: nothing was found."""
    persons = len(boxes.bboxes)
    return Bodies(
        np.zeros((persons, SMPL_JOINTS, 3), np.float32),
        np.zeros((persons, SMPL_JOINTS), np.float32),
    )


def usable_rows(boxes: Boxes) -> npt.NDArray[np.intp]:
    """Returns which persons have a box that a network can look at: finite, with an area."""
    box = np.asarray(boxes.bboxes, np.float64).reshape(-1, 4)
    area = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])
    return np.flatnonzero(np.isfinite(box).all(axis=1) & area)

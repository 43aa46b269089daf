"""3-D bodies by RTMW3D, a whole-body network under Apache-2.0; the alternative to `nlf`.

The network looks at one person's crop and answers with 133 keypoints: two positions in the crop
and a depth relative to the hips in metres, each as the highest bin of a row. `lift` turns them
into the 24 SMPL joints in millimetres; what is approximate about that is said there. There are no
uncertainties, they are zeros.

Read off the public source; the published ONNX file itself was not at hand. Unverified there: that
its outputs come in the order x, y, z, and whether its batch axis is free. Its training data
includes sets for research only, see docs/pose-models.md.

Differs from rtmlib in two places, where it departs from how the network was trained: pictures are
RGB as the mean and deviation are (rtmlib passes OpenCV's BGR), and the depth axis is centred on
its own 576 bins (rtmlib divides by the height of the crop, which shifts and shrinks the depth). A
keypoint with no positive response keeps its place with that score, instead of going to a corner.

Shape letters: B frames, N crops, P persons of a frame, K = 133 keypoints.

Source: Tau-J/rtmlib: rtmlib/tools/pose_estimation/rtmpose3d.py, pre_processings.py; open-mmlab/
mmpose: projects/rtmpose3d/rtmpose3d/simcc_3d_label.py,
projects/rtmpose3d/configs/rtmw3d-x_8xb64_cocktail14-384x288.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.pose.bodies import (
    FloatArray,
    camera_or_default,
    check_frames,
    nobody,
    usable_rows,
)
from xicon_infer.pose.camera import Float64Array
from xicon_infer.pose.lift import STATURE_MM, lift, root_depth, to_smpl
from xicon_infer.pose.observations import Bodies, Boxes
from xicon_infer.pose.skeleton import KEYPOINTS, SMPL_JOINTS
from xicon_infer.types import UInt8Array

CROP_HEIGHT, CROP_WIDTH = 384, 288
BINS_PER_PIXEL = 2
DEPTH_BINS = 576
DEPTH_RANGE_MM = 2174.4869
"""The depth axis reaches this far before and behind the hips (the trainer's z_range, in metres)."""

CHUNK = 16
"""Crops per call."""

MIN_SCORE = 0.3
"""A keypoint with a lower score does not help to find the distance."""

_PADDING = 1.25
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)
# Shoulders to ankles; a person of whom fewer of them are seen is not there.
_BODY = slice(5, 17)
_FEWEST_POINTS = 4


class Network(Protocol):
    """What is needed of an ONNX model: a batch in, the outputs in the order of the file."""

    def run(self, batch: Tensor) -> list[Tensor]:
        """Returns the outputs for float32 [N, 3, 384, 288]."""


class Crop(NamedTuple):
    """One person's window: its centre in pixels, and crop pixels per picture pixel."""

    centre_x: float
    centre_y: float
    scale: float


class Rtmw3d:
    """The loaded network.

    Args:
        path: the `.onnx` file; not read if `model` is given.
        device: where it runs.
        model: an open model.
        min_score: see `MIN_SCORE`; 0 trusts every point.
        stature_mm: the assumed height of every person.
        chunk: crops per call, at least 1; changes memory, not the result.

    Raises:
        WeightsError: the file is missing or no ONNX model.
        InvalidRequest: chunk is below 1, or stature_mm is not positive.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        *,
        model: Network | None = None,
        min_score: float = MIN_SCORE,
        stature_mm: float = STATURE_MM,
        chunk: int = CHUNK,
    ) -> None:
        if chunk < 1:
            raise InvalidRequest(f"'chunk' is {chunk}; at least 1 crop is needed", field="chunk")
        if not stature_mm > 0:
            raise InvalidRequest(
                f"'stature_mm' is {stature_mm}; a height in millimetres is needed",
                field="stature_mm",
            )
        self._device = device
        self._model = _open(path, device) if model is None else model
        self._min_score = min_score
        self._stature_mm = stature_mm
        self._chunk = chunk

    def estimate(
        self, frames: UInt8Array, boxes: Sequence[Boxes], intrinsics: FloatArray | None = None
    ) -> list[Bodies]:
        """Returns the bodies of every frame; row i belongs to person i of the frame's boxes.

        Args:
            frames: uint8 [B, H, W, 3], RGB.
            boxes: the persons of each frame.
            intrinsics: [3, 3], pixels; None for 55 degrees over the longer side.

        Returns:
            B bodies; zeros for a person with fewer than four points from shoulder to ankle.

        Raises:
            InvalidRequest: frames that are not uint8, or arguments that do not fit together.
            WeightsError: the network answers in an unknown form.
        """
        check_frames(frames, boxes)
        camera = camera_or_default(intrinsics, (frames.shape[1], frames.shape[2]))
        bodies = [nobody(persons) for persons in boxes]
        places = [(i, int(row)) for i, b in enumerate(boxes) for row in usable_rows(b)]
        for start in range(0, len(places), self._chunk):
            part = places[start : start + self._chunk]
            crops = [crop_of(boxes[i].bboxes[row]) for i, row in part]
            pixels = [cut(frames[i], crop) for (i, _), crop in zip(part, crops, strict=True)]
            points, depths, scores = self._look(pixels, crops)
            for number, (i, row) in enumerate(part):
                bodies[i].joints[row] = self._body(
                    points[number],
                    depths[number],
                    scores[number] >= self._min_score,
                    boxes[i].bboxes[row],
                    camera,
                )
        return bodies

    def _look(
        self, pixels: list[UInt8Array], crops: list[Crop]
    ) -> tuple[Float64Array, Float64Array, Float64Array]:
        """Returns points [N, K, 2] in picture pixels, depths [N, K] in millimetres, scores."""
        batch = normalise(torch.from_numpy(np.stack(pixels)).to(self._device))
        return decode(self._model.run(batch), crops)

    def _body(
        self,
        points: Float64Array,
        depths: Float64Array,
        trusted: npt.NDArray[np.bool_],
        box: FloatArray,
        camera: Float64Array,
    ) -> FloatArray:
        """Returns the joints [24, 3] of one person, zeros if too little of it was seen."""
        if trusted[_BODY].sum() < _FEWEST_POINTS:
            return np.zeros((SMPL_JOINTS, 3))
        distance = root_depth(
            points,
            depths,
            trusted,
            intrinsics=camera,
            box_height=float(box[3] - box[1]),
            stature_mm=self._stature_mm,
        )
        return lift(to_smpl(points), to_smpl(depths[:, None])[:, 0], distance, camera)


def crop_of(box: FloatArray) -> Crop:
    """Returns the window of a box [4] (x1 y1 x2 y2): 1.25 times it, widened to 3 : 4."""
    x1, y1, x2, y2 = (float(side) for side in box)
    width, height = _PADDING * (x2 - x1), _PADDING * (y2 - y1)
    width = max(width, height * CROP_WIDTH / CROP_HEIGHT)
    return Crop((x1 + x2) / 2, (y1 + y2) / 2, CROP_WIDTH / width)


def cut(frame: UInt8Array, crop: Crop) -> UInt8Array:
    """Returns the window of a frame [H, W, 3] as uint8 [384, 288, 3]; black outside the frame."""
    x, y, scale = crop
    # OpenCV counts from the centre of the first pixel, boxes from its corner: hence the half. The
    # centre of the window falls on crop position (144, 192), where `decode` expects it.
    matrix = np.array(
        [
            [scale, 0.0, CROP_WIDTH / 2 - scale * (x - 0.5)],
            [0.0, scale, CROP_HEIGHT / 2 - scale * (y - 0.5)],
        ]
    )
    size = (CROP_WIDTH, CROP_HEIGHT)
    return np.asarray(cv2.warpAffine(frame, matrix, size, flags=cv2.INTER_LINEAR), np.uint8)


def normalise(pixels: Tensor) -> Tensor:
    """Returns what the network takes, float32 [N, 3, H, W], of uint8 RGB [N, H, W, 3]."""
    mean = torch.tensor(_MEAN, device=pixels.device)
    std = torch.tensor(_STD, device=pixels.device)
    return ((pixels.float() - mean) / std).permute(0, 3, 1, 2).contiguous()


def decode(
    outputs: Sequence[Tensor], crops: Sequence[Crop]
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Returns the highest bin of every row, as pixels, millimetres and a score.

    Args:
        outputs: responses along x [N, 133, 576], y [N, 133, 768] and depth [N, 133, 576].
        crops: the N windows.

    Returns:
        float64 points [N, 133, 2] in picture pixels, depths [N, 133] in millimetres relative to
        the hips, and scores [N, 133]: the smaller of the highest responses along x and y.

    Raises:
        WeightsError: another number of outputs, or other shapes.
    """
    expected = [
        (len(crops), KEYPOINTS, bins)
        for bins in (CROP_WIDTH * BINS_PER_PIXEL, CROP_HEIGHT * BINS_PER_PIXEL, DEPTH_BINS)
    ]
    shapes = [tuple(output.shape) for output in outputs]
    if shapes != expected:
        raise WeightsError(
            f"RTMW3D: the outputs have shapes {shapes}, needed are {expected} along x, y and "
            "depth. Use an RTMW3D file for crops of 384 x 288.",
            code="MODEL_MISMATCH",
        )
    best = [output.float().max(dim=-1) for output in outputs]
    places = [_float64(each.indices) for each in best]
    scores = np.minimum(_float64(best[0].values), _float64(best[1].values))
    windows = np.array(crops)[:, :, None]
    x = (places[0] / BINS_PER_PIXEL - CROP_WIDTH / 2) / windows[:, 2] + windows[:, 0]
    y = (places[1] / BINS_PER_PIXEL - CROP_HEIGHT / 2) / windows[:, 2] + windows[:, 1]
    depths = (places[2] / (DEPTH_BINS / 2) - 1.0) * DEPTH_RANGE_MM
    return np.stack([x, y], axis=-1), depths, scores


def _open(path: Path, device: torch.device) -> Network:
    from xicon_infer.pose.onnx_model import open_model

    return open_model(path, device)


def _float64(value: Tensor) -> Float64Array:
    array: Float64Array = value.cpu().double().numpy()
    return array

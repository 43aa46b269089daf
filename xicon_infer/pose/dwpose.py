"""133 keypoints of a person with DWPose (RTMPose whole-body) in ONNX form.

The network looks at a crop of 288 x 384 pixels around each box and answers, for every keypoint,
with one row of responses along x and one along y, two bins a pixel. The highest bin counts.

Differs from SteadyDancer's authors: the ONNX file knows no averaging with the mirrored picture.
Pictures are RGB as the network was trained, where the authors' program exchanges red and blue
first. Points are measured from the corner of the frame (a pixel's centre is at + 0.5), as in the
rest of this project, and so lie half a pixel farther than theirs. Nothing is hidden or clipped
here: `dancer_points` holds the threshold.

Shape letters: B frames, H W of a frame, N crops, K = 133 keypoints.

Source: MCG-NJU/SteadyDancer: preprocess/pose/config/dwpose-l_384x288.py; Tau-J/rtmlib:
rtmlib/tools/pose_estimation/rtmpose.py, pre_processings.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.pose.camera import Float64Array
from xicon_infer.pose.detector import check_chunk, frames_tensor
from xicon_infer.pose.onnx_model import open_model
from xicon_infer.pose.rtmw3d import (
    BINS_PER_PIXEL,
    CROP_HEIGHT,
    CROP_WIDTH,
    Crop,
    crop_of,
    cut,
    normalise,
)
from xicon_infer.pose.skeleton import KEYPOINTS
from xicon_infer.types import Float32Array, UInt8Array

BINS_X, BINS_Y = CROP_WIDTH * BINS_PER_PIXEL, CROP_HEIGHT * BINS_PER_PIXEL

_MAX_PX = 1e6


class DwPose:
    """Finds the keypoints of persons whose boxes are known.

    Args:
        path: the ONNX file, input [N, 3, 384, 288], outputs [N, 133, 576] and [N, 133, 768],
            fixed or free batch.
        device: cuda or cpu.
        chunk: crops in one call of the network, at least 1.
        threads: of the network on the CPU; as many as torch uses if None.

    Raises:
        InvalidRequest: if `chunk` is not allowed.
        WeightsError: if the file is missing, damaged or another network.
        BackendUnavailable: if the network cannot run on the device.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        *,
        chunk: int = 16,
        threads: int | None = None,
    ) -> None:
        check_chunk(chunk)
        self.model = open_model(path, device, threads=threads)
        self.model.require((None, 3, CROP_HEIGHT, CROP_WIDTH), [(None, KEYPOINTS, BINS_X)])
        self.chunk = chunk

    def estimate(
        self, frames: UInt8Array, frame_index: Sequence[int], bboxes: Float32Array
    ) -> tuple[Float32Array, Float32Array]:
        """Returns the keypoints of every box, and their scores.

        Args:
            frames: uint8 [B, H, W, 3] RGB.
            frame_index: for each box, the frame it lies in, 0 to B - 1.
            bboxes: float32 [N, 4], x1 y1 x2 y2 pixels; N may be 0.

        Returns:
            keypoints float32 [N, 133, 2], pixels; scores float32 [N, 133], the smaller of the two
            highest responses, about 0 to 1.

        Raises:
            InvalidRequest: if frames, indices or boxes do not fit each other.
            WeightsError: if the outputs of the network have other shapes.
        """
        pictures = frames_tensor(frames).numpy()
        _check_boxes(frame_index, bboxes, len(pictures))
        keypoints = np.empty((len(bboxes), KEYPOINTS, 2), np.float32)
        scores = np.empty((len(bboxes), KEYPOINTS), np.float32)
        crops = [crop_of(box) for box in bboxes]
        for start in range(0, len(bboxes), self.chunk):
            part = slice(start, start + self.chunk)
            places = zip(frame_index[part], crops[part], strict=True)
            pixels = np.stack([cut(pictures[index], crop) for index, crop in places])
            outputs = self.model.run(normalise(torch.from_numpy(pixels).to(self.model.device)))
            keypoints[part], scores[part] = decode_simcc(outputs, crops[part])
        return keypoints, scores


def decode_simcc(
    outputs: Sequence[Tensor], crops: Sequence[Crop]
) -> tuple[Float64Array, Float64Array]:
    """Returns the highest bin of every row, as a place in the frame and a score.

    Args:
        outputs: responses along x [N, 133, 576] and y [N, 133, 768].
        crops: the N windows.

    Returns:
        float64 points [N, 133, 2] in pixels of the frame, and scores [N, 133]. A point whose score
        is not above 0 lies half a crop pixel above and left of its crop.

    Raises:
        WeightsError: if there are other outputs, or other shapes.
    """
    expected = [(len(crops), KEYPOINTS, bins) for bins in (BINS_X, BINS_Y)]
    shapes = [tuple(output.shape) for output in outputs]
    if shapes != expected:
        raise WeightsError(
            f"DWPose: the outputs have shapes {shapes}, needed are {expected} along x and y. Use "
            "a whole-body RTMPose file (133 keypoints) for crops of 384 x 288.",
            code="MODEL_MISMATCH",
        )
    best = [output.double().cpu().max(dim=-1) for output in outputs]
    scores: Float64Array = torch.minimum(best[0].values, best[1].values).numpy()
    bins = torch.stack([each.indices for each in best], dim=-1).numpy()
    bins = np.where((scores > 0)[..., None], bins, -1)
    windows = np.array(crops, np.float64).reshape(-1, 1, 3)
    middle = np.array([CROP_WIDTH / 2, CROP_HEIGHT / 2])
    return (bins / BINS_PER_PIXEL - middle) / windows[..., 2:] + windows[..., :2], scores


def _check_boxes(frame_index: Sequence[int], bboxes: Float32Array, frames: int) -> None:
    if bboxes.ndim != 2 or bboxes.shape[1] != 4:
        raise InvalidRequest(
            f"bboxes have the shape {list(bboxes.shape)}; [N, 4] is needed.", field="bboxes"
        )
    sides = bboxes[:, 2:] - bboxes[:, :2]
    # Written this way round, the comparison is false for values that are no numbers.
    bad = np.flatnonzero(~((sides > 0).all(axis=1) & (np.abs(bboxes) < _MAX_PX).all(axis=1)))
    if bad.size:
        raise InvalidRequest(
            f"bboxes[{bad[0]}] is {bboxes[bad[0]].tolist()}; finite x1 < x2, y1 < y2 are needed.",
            field="bboxes",
        )
    inside = all(0 <= index < frames for index in frame_index)
    if len(frame_index) != len(bboxes) or not inside:
        raise InvalidRequest(
            f"frame_index must name a frame from 0 to {frames - 1} for each of {len(bboxes)} "
            "boxes.",
            field="frame_index",
        )

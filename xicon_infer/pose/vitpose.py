"""133 keypoints of a person with ViTPose whole-body in ONNX form.

Each box is widened to a crop of the network's aspect, plus a quarter. Crops of all frames and
persons share their batches. Cropping, normalisation and decoding run on the network's device.
Keypoints and scores are given as they are; nothing is hidden or clipped here.

Shape letters: B frames, H W of a frame, N crops, K = 133 keypoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.pose.detector import check_chunk, frames_tensor
from xicon_infer.pose.onnx_model import open_model
from xicon_infer.pose.skeleton import KEYPOINTS
from xicon_infer.pose.vitpose_decode import DECODES, Decode, decode_heatmaps
from xicon_infer.types import Float32Array, UInt8Array

Float64Array = npt.NDArray[np.float64]

INPUT_HEIGHT, INPUT_WIDTH = 256, 192
HEATMAP_HEIGHT, HEATMAP_WIDTH = 64, 48

_PADDING = 1.25
_ASPECT = INPUT_HEIGHT / INPUT_WIDTH
# ImageNet statistics of RGB in [0, 1].
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_HEATMAPS = (None, KEYPOINTS, HEATMAP_HEIGHT, HEATMAP_WIDTH)


@dataclass(frozen=True)
class Crops:
    """Where the network looks, in pixels of the frame.

    centers: float64 [N, 2], x and y. sizes: float64 [N, 2], width and height, not rounded.
    rects_xywh: int64 [N, 4], the whole pixels that are read; they may lie outside the frame.
    """

    centers: Float64Array
    sizes: Float64Array
    rects_xywh: npt.NDArray[np.int64]


class VitPose:
    """Finds the keypoints of persons whose boxes are known.

    Args:
        path: the ONNX file, input [N, 3, 256, 192], output [N, 133, 64, 48], fixed or free batch.
        device: cuda or cpu.
        decode: how peaks become points, see `vitpose_decode`.
        clamp_offset: keep a point within one heatmap cell of its peak.
        chunk: crops in one call of the network, at least 1.
        threads: of the network on the CPU; as many as torch uses if None.

    Raises:
        InvalidRequest: if `decode` or `chunk` is not allowed.
        WeightsError: if the file is missing, damaged or another network.
        BackendUnavailable: if the network cannot run on the device.

    Source: kijai/ComfyUI-WanAnimatePreprocess: models/onnx_models.py, pose_utils/pose2d_utils.py
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        *,
        decode: Decode = "dark",
        clamp_offset: bool = False,
        chunk: int = 16,
        threads: int | None = None,
    ) -> None:
        if decode not in DECODES:
            raise InvalidRequest(
                f"decode is {decode!r}; allowed: {', '.join(DECODES)}.", field="decode"
            )
        check_chunk(chunk)
        self.model = open_model(path, device, threads=threads)
        self.model.require((None, 3, INPUT_HEIGHT, INPUT_WIDTH), [_HEATMAPS])
        self.decode = decode
        self.clamp_offset = clamp_offset
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
            keypoints float32 [N, 133, 2], pixels; scores float32 [N, 133], raw heatmap peaks,
            about 0 to 1.

        Raises:
            InvalidRequest: if frames, indices or boxes do not fit each other.
            WeightsError: if the output of the network has another shape.
        """
        data = frames_tensor(frames)
        which = _checked_index(frame_index, len(data), len(bboxes))
        crops = crop_geometry(bboxes)
        device = self.model.device
        data = data.to(device)
        keypoints = np.empty((len(bboxes), KEYPOINTS, 2), np.float32)
        scores = np.empty((len(bboxes), KEYPOINTS), np.float32)
        for start in range(0, len(bboxes), self.chunk):
            part = slice(start, start + self.chunk)
            heatmaps = self._heatmaps(
                cut_crops(data, which[part].to(device), crops.rects_xywh[part])
            )
            points, peaks = decode_heatmaps(
                heatmaps,
                torch.from_numpy(crops.centers[part]).to(device),
                torch.from_numpy(crops.sizes[part]).to(device),
                decode=self.decode,
                clamp_offset=self.clamp_offset,
            )
            keypoints[part], scores[part] = points.cpu().numpy(), peaks.cpu().numpy()
        return keypoints, scores

    def _heatmaps(self, batch: Tensor) -> Tensor:
        heatmaps = self.model.run(batch)[0]
        expected = (len(batch), *_HEATMAPS[1:])
        if tuple(heatmaps.shape) != expected:
            raise WeightsError(
                f"{self.model.path} returns {list(heatmaps.shape)}; {list(expected)} is needed. "
                "Choose a whole-body ViTPose (133 keypoints).",
                code="MODEL_MISMATCH",
            )
        return heatmaps


def crop_geometry(bboxes: npt.NDArray[np.floating]) -> Crops:
    """Returns the crop of every box: the network's aspect, a quarter larger, same centre.

    Args:
        bboxes: [N, 4], x1 y1 x2 y2 pixels.

    Raises:
        InvalidRequest: if a box is not finite or empty, or the shape is another.
    """
    boxes = np.asarray(bboxes, np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise InvalidRequest(
            f"bboxes have the shape {list(boxes.shape)}; [N, 4] is needed.", field="bboxes"
        )
    sides = boxes[:, 2:] - boxes[:, :2]
    # Written this way round, the comparison is false for values that are no numbers.
    bad = np.flatnonzero(~((sides > 0).all(axis=1) & (np.abs(boxes) < 1e6).all(axis=1)))
    if bad.size:
        raise InvalidRequest(
            f"bboxes[{bad[0]}] is {boxes[bad[0]].tolist()}; finite x1 < x2 and y1 < y2 are needed.",
            field="bboxes",
        )
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    tall = np.maximum(_ASPECT * sides[:, 0], sides[:, 1])
    # The reference keeps sizes in units of 200 pixels; the order of operations is its own.
    sizes = 200 * (np.stack([tall / _ASPECT, tall], axis=1) / 200 * _PADDING)
    low, high = (np.rint(corner).astype(np.int64) for corner in _crop_corners(centers, sizes))
    # A box below one pixel still reads one.
    return Crops(centers, sizes, np.concatenate([low, np.maximum(high - low, 1)], axis=1))


def cut_crops(frames: Tensor, frame_index: Tensor, rects_xywh: npt.NDArray[np.int64]) -> Tensor:
    """Returns the network's input: crops stretched to 256 x 192, bilinear, and normalised.

    Outside the frame lies black, put there before normalisation, so it is not zero afterwards.

    Args:
        frames: [B, H, W, 3] RGB, uint8 or float 0 to 1.
        frame_index: int64 [N].
        rects_xywh: int64 [N, 4].

    Returns:
        float32 [N, 3, 256, 192].
    """
    device = frames.device
    rects = torch.from_numpy(rects_xywh).to(device)
    columns = _samples(rects[:, 0], rects[:, 2], INPUT_WIDTH, frames.shape[2])
    rows = _samples(rects[:, 1], rects[:, 3], INPUT_HEIGHT, frames.shape[1])
    pixels = frames.flatten(0, 2)
    start = frame_index * frames.shape[1]
    crop = torch.zeros((len(rects), INPUT_HEIGHT, INPUT_WIDTH, 3), device=device)
    for y, y_weight in rows:
        line = ((start[:, None] + y) * frames.shape[2])[:, :, None]
        across = torch.zeros_like(crop)
        for x, x_weight in columns:
            values = pixels.index_select(0, (line + x[:, None, :]).flatten()).view(crop.shape)
            across += values * x_weight[:, None, :, None]
        crop += across * y_weight[:, :, None, None]
    # One multiplication and one subtraction stand for /255, - mean, / std.
    largest = 1 if frames.is_floating_point() else 255
    mean, std = torch.tensor(_MEAN, device=device), torch.tensor(_STD, device=device)
    return crop.mul_(1 / (largest * std)).sub_(mean / std).permute(0, 3, 1, 2)


def _crop_corners(centers: Float64Array, sizes: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Returns the corners of the crops, float64 [N, 2] each, not rounded.

    They are centers -/+ sizes / 2, computed as the reference does: it inverts the matrix from the
    frame to the network's input. Boxes of whole pixels often give corners at exact halves, where
    the last bit decides to which pixel they are rounded.
    """
    points = np.array([INPUT_WIDTH, INPUT_HEIGHT], np.float64)
    height = sizes[:, 1:]
    sizes = np.concatenate([height / _ASPECT, height], axis=1)
    pixels_per_point = 1 / (points / sizes)
    low = -(points * (-centers / sizes + 0.5)) * pixels_per_point
    return low, points * pixels_per_point + low


def _samples(
    start: Tensor, length: Tensor, points: int, limit: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns for each output point of a resize the two cells that it lies between.

    Args:
        start: int64 [N], first cell of the crop along one axis of the frame.
        length: int64 [N], cells of the crop.
        points: outputs along the axis.
        limit: cells of the frame.

    Returns:
        twice (cell int64 [N, points] inside the frame, weight float32 [N, points]); the weight is
        0 where the cell lay outside of the frame.
    """
    last = (length - 1)[:, None]
    centre = torch.arange(points, device=start.device, dtype=torch.float64) + 0.5
    position = (centre * (length / points)[:, None] - 0.5).clamp_min(0)
    below = position.long().minimum(last)
    share = (position - below).clamp(0, 1)
    pair = []
    for cell, weight in ((below, 1 - share), ((below + 1).minimum(last), share)):
        absolute = cell + start[:, None]
        inside = (absolute >= 0) & (absolute < limit)
        pair.append((absolute.clamp(0, limit - 1), (weight * inside).float()))
    return pair[0], pair[1]


def _checked_index(frame_index: Sequence[int], frames: int, boxes: int) -> Tensor:
    """Returns the frame of each box as int64 [N]."""
    index = np.asarray(frame_index, np.int64)
    if index.shape != (boxes,) or (boxes and (index.min() < 0 or index.max() >= frames)):
        raise InvalidRequest(
            f"frame_index must name a frame from 0 to {frames - 1} for each of {boxes} boxes.",
            field="frame_index",
        )
    return torch.from_numpy(index)

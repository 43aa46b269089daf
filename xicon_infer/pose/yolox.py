"""Finding persons with YOLOX in ONNX form, at the thresholds of SteadyDancer's authors.

The network sees the frame fitted into a square, grey below or beside it, in BGR and unscaled, and
answers with raw anchors: the corner of a cell, log sizes, an objectness and 80 class scores.

Differs from the authors' program: it shows the network RGB by mistake, and a frame stretched to
multiples of 64 first; here the colours are those of the training, and the frame is its own. An
empty frame has no box unless select="reference".

Shape letters: B frames, H W of a frame, A anchors, R rows, P persons.

Source: MCG-NJU/SteadyDancer: preprocess/pose/script/wholebody.py,
preprocess/pose/config/yolox_l_8xb8-300e_coco.py; Tau-J/rtmlib:
rtmlib/tools/object_detection/yolox.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.pose.detector import (
    PERSON_CLASS,
    SELECTS,
    SIDE_PX,
    Select,
    check_chunk,
    frames_tensor,
)
from xicon_infer.pose.observations import Boxes
from xicon_infer.pose.onnx_model import open_model
from xicon_infer.types import Float32Array, UInt8Array

FloatArray = npt.NDArray[np.floating[Any]]

SCORE_THR = 0.5
"""A person must score above this."""

IOU_THR = 0.65
"""Of the detector's own suppression of overlaps."""

SECOND_IOU_THR = 0.7
"""Of the suppression that follows it, which counts the pixels of both borders."""

STRIDES = (8, 16, 32)
"""Pixels per cell of the three grids whose anchors follow one another."""

_ROW = 4 + 1 + 80
_ANCHORS = sum((SIDE_PX // stride) ** 2 for stride in STRIDES)
_GREY = 114.0


class YoloxDetector:
    """Finds persons, frame by frame.

    Args:
        path: the ONNX file, input [N, 3, 640, 640], output [N, 8400, 85] not decoded, fixed or
            free batch.
        device: cuda or cpu.
        select: "persons" for those that were found; "reference" takes a frame without any as one
            box, with score 0, as the authors do.
        score_thr: detections must score above this, 0 to below 1.
        chunk: frames in one call of the network, at least 1.
        threads: of the network on the CPU; as many as torch uses if None.

    Raises:
        InvalidRequest: if `select`, `score_thr` or `chunk` is not allowed.
        WeightsError: if the file is missing, damaged or another network.
        BackendUnavailable: if the network cannot run on the device.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        *,
        select: Select = "persons",
        score_thr: float = SCORE_THR,
        chunk: int = 16,
        threads: int | None = None,
    ) -> None:
        if select not in SELECTS:
            raise InvalidRequest(
                f"select is {select!r}; allowed: {', '.join(SELECTS)}.", field="select"
            )
        if not 0 <= score_thr < 1:
            raise InvalidRequest(
                f"score_thr is {score_thr}; 0 to below 1 is allowed.", field="score_thr"
            )
        check_chunk(chunk)
        self.model = open_model(path, device, threads=threads)
        self.model.require((None, 3, SIDE_PX, SIDE_PX), [(None, _ANCHORS, _ROW)])
        self.select = select
        self.score_thr = score_thr
        self.chunk = chunk

    def detect(self, frames: UInt8Array) -> list[Boxes]:
        """Returns the persons of every frame, best first, all ids -1.

        Args:
            frames: uint8 [B, H, W, 3] RGB.

        Raises:
            InvalidRequest: if the frames have another type or shape.
            WeightsError: if the output of the network has another shape.
        """
        data = frames_tensor(frames)
        height, width = data.shape[1:3]
        found: list[Boxes] = []
        for start in range(0, len(data), self.chunk):
            piece = data[start : start + self.chunk].to(self.model.device)
            pixels, scale = letterbox(piece)
            for rows in decode_anchors(self.model.run(pixels)[0]):
                bboxes, scores, labels = rows[:, :4] / scale, rows[:, 4], rows[:, 5]
                kept = select_persons(bboxes, scores, labels, score_thr=self.score_thr)
                if not len(kept) and self.select == "reference":
                    whole = np.array([[0, 0, width, height]], np.float32)
                    found.append(Boxes(whole, np.zeros(1, np.float32), (-1,)))
                else:
                    found.append(Boxes(bboxes[kept], scores[kept], (-1,) * len(kept)))
        return found


def letterbox(frames: Tensor) -> tuple[Tensor, float]:
    """Returns frames as the network takes them, and input pixels per pixel of the frame.

    Args:
        frames: uint8 [B, H, W, 3] RGB.

    Returns:
        float32 [B, 3, 640, 640] BGR, 0 to 255, grey to the right or below; and the scale.
    """
    height, width = frames.shape[1:3]
    scale = min(SIDE_PX / height, SIDE_PX / width)
    inner = (max(int(height * scale), 1), max(int(width * scale), 1))
    pixels = frames.flip(3).permute(0, 3, 1, 2).float()
    if inner != (height, width):
        # Whole levels, as a picture of bytes has them.
        pixels = interpolate(pixels, size=inner, mode="bilinear", align_corners=False).round_()
    return pad(pixels, (0, SIDE_PX - inner[1], 0, SIDE_PX - inner[0]), value=_GREY), scale


def decode_anchors(output: Tensor) -> list[Float32Array]:
    """Returns rows float32 [A, 6] of every frame: x1 y1 x2 y2 in input pixels, score, class.

    Only finite rows are returned.

    Args:
        output: [B, 8400, 85], as the network gives it.

    Raises:
        WeightsError: if the shape is another.
    """
    if output.shape[1:] != (_ANCHORS, _ROW):
        raise WeightsError(
            f"The person detector returns {list(output.shape)}; [B, {_ANCHORS}, {_ROW}] is "
            "needed. Choose a YOLOX exported for 640 x 640 pixels without suppression of overlaps.",
            code="MODEL_MISMATCH",
        )
    raw = output.float()
    corner, stride = _cells(raw.device)
    centre = (raw[..., :2] + corner) * stride
    half = raw[..., 2:4].exp() * stride / 2
    classes, labels = raw[..., 5:].max(dim=2, keepdim=True)
    scores = raw[..., 4:5] * classes
    rows = torch.cat([centre - half, centre + half, scores, labels.float()], dim=2)
    usable = rows.isfinite().all(dim=2)
    return [row[keep].cpu().numpy() for row, keep in zip(rows, usable, strict=True)]


def select_persons(
    bboxes: FloatArray,
    scores: FloatArray,
    labels: npt.NDArray[Any],
    *,
    score_thr: float = SCORE_THR,
) -> npt.NDArray[np.int64]:
    """Returns the rows of the persons that the authors keep, best score first.

    Boxes may end outside the frame; the network was trained so.

    Args:
        bboxes: [R, 4], x1 y1 x2 y2 pixels.
        scores: [R], 0 to 1.
        labels: [R], COCO classes.
        score_thr: a person must score above this.
    """
    solid = (bboxes[:, 2:] > bboxes[:, :2]).all(axis=1)
    kept = np.flatnonzero((labels == PERSON_CLASS) & (scores > score_thr) & solid)
    for limit, border in ((IOU_THR, 0.0), (SECOND_IOU_THR, 1.0)):
        kept = kept[_best_of_overlaps(bboxes[kept], scores[kept], limit, border)]
    return kept


def _best_of_overlaps(
    bboxes: FloatArray, scores: FloatArray, iou_thr: float, border_px: float
) -> npt.NDArray[np.int64]:
    """Returns rows, best first, of which no better one overlaps by more than `iou_thr`."""
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    areas = (bboxes[:, 2:] - bboxes[:, :2] + border_px).prod(axis=1)
    for row in order.tolist():
        low = np.maximum(bboxes[row, :2], bboxes[kept, :2])
        high = np.minimum(bboxes[row, 2:], bboxes[kept, 2:])
        shared = (high - low + border_px).clip(0).prod(axis=1)
        if (shared <= iou_thr * (areas[row] + areas[kept] - shared)).all():
            kept.append(row)
    return np.array(kept, np.int64)


def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the column and row [A, 2] and the stride [A, 1] of every anchor's cell."""
    corners, strides = [], []
    for stride in STRIDES:
        side = torch.arange(SIDE_PX // stride, device=device)
        y, x = torch.meshgrid(side, side, indexing="ij")
        corners.append(torch.stack([x, y], dim=-1).flatten(0, 1))
        strides.append(torch.full((side.numel() ** 2, 1), stride, device=device))
    return torch.cat(corners).float(), torch.cat(strides).float()

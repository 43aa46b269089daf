"""Finding persons with YOLOv10m in ONNX form.

The default keeps every person and leaves the choice of the subject to whoever follows them over
time. `select="reference"` picks one box per frame as the graphs this project reproduces do, with
its flaws: a better scored dog may delete a person, and the largest box wins whoever it is.

YOLOv10 weights are AGPL-3.0. Rows are x1 y1 x2 y2 score class, pixels of the 640 square.

Shape letters: B frames, H W of a frame, R rows, P persons, A anchors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.pose.observations import Boxes
from xicon_infer.pose.onnx_model import open_model
from xicon_infer.types import Float32Array, UInt8Array

Select = Literal["persons", "reference"]
SELECTS: tuple[Select, ...] = ("persons", "reference")

SIDE_PX = 640
SCORE_THR = 0.05
IOU_THR = 0.5
PERSON_CLASS = 0

_BOX_AND_CLASSES = 4 + 80
_ROW = 6
_OUTPUTS = ((None, None, _ROW), (None, _BOX_AND_CLASSES, None))
# The reference takes a smaller box, or none, as the whole picture.
_MIN_SIDE_PX = 10
# The reference skips a box whose longer side is below this share of the longest.
_MIN_SHARE = 0.4


class YoloDetector:
    """Finds persons, frame by frame.

    Args:
        path: the ONNX file; outputs [N, 300, 6] or [N, 84, 8400], fixed or free batch.
        device: cuda or cpu.
        select: "persons" for all of them, "reference" for one box per frame.
        score_thr: detections must score above this, 0 to 1; for "persons" only.
        chunk: frames in one call of the network, at least 1.
        threads: of the network on the CPU; as many as torch uses if None.

    Raises:
        InvalidRequest: if `select`, `score_thr` or `chunk` is not allowed.
        WeightsError: if the file is missing, damaged or another network.
        BackendUnavailable: if the network cannot run on the device.

    Source: kijai/ComfyUI-WanAnimatePreprocess: models/onnx_models.py
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
        self.model.require((None, 3, SIDE_PX, SIDE_PX), _OUTPUTS)
        self.select = select
        self.score_thr = score_thr
        self.chunk = chunk

    def detect(self, frames: UInt8Array) -> list[Boxes]:
        """Returns the persons of every frame, all ids -1.

        With select="reference" there is one box per frame; where nobody was found it is the whole
        frame with score 0.

        Args:
            frames: uint8 [B, H, W, 3] RGB.

        Raises:
            InvalidRequest: if the frames have another type or shape.
            WeightsError: if the output of the network has another shape.
        """
        found: list[Boxes] = []
        data = frames_tensor(frames)
        size = (data.shape[1], data.shape[2])
        for start in range(0, len(data), self.chunk):
            piece = data[start : start + self.chunk].to(self.model.device)
            output = self.model.run(stretch(piece))[0]
            for rows in detection_rows(output):
                if self.select == "reference":
                    found.append(_reference_boxes(rows, size))
                else:
                    found.append(person_boxes(rows, size, score_thr=self.score_thr))
        return found


def stretch(frames: Tensor) -> Tensor:
    """Returns frames as the detector takes them: bilinear, the aspect is not kept.

    Args:
        frames: uint8 [B, H, W, 3] RGB.

    Returns:
        float32 [B, 3, 640, 640], 0 to 1.
    """
    # Seen as channels-last, the bytes need no reordering before they are widened.
    pixels = frames.permute(0, 3, 1, 2).float()
    small = interpolate(pixels, size=(SIDE_PX, SIDE_PX), mode="bilinear", align_corners=False)
    return small.div_(255)


def detection_rows(output: Tensor) -> list[Float32Array]:
    """Returns the usable detections of every frame: rows float32 [R, 6], in the network's order.

    Args:
        output: [B, R, 6] rows, or [B, 84, A] with centre x, centre y, width, height and 80 class
            scores per anchor, pixels of the 640 square.

    Raises:
        WeightsError: if the shape is neither.
    """
    if output.ndim == 3 and output.shape[2] == _ROW:
        rows = output.float()
    elif output.ndim == 3 and output.shape[1] == _BOX_AND_CLASSES:
        center, half = output[:, :2].float(), output[:, 2:4].float() / 2
        scores, classes = output[:, 4:].float().max(dim=1, keepdim=True)
        rows = torch.cat([center - half, center + half, scores, classes.float()], dim=1).mT
    else:
        raise WeightsError(
            f"The person detector returns {list(output.shape)}; [B, R, {_ROW}] or "
            f"[B, {_BOX_AND_CLASSES}, A] is needed. Choose a detection model trained on COCO.",
            code="MODEL_MISMATCH",
        )
    usable = (rows[..., 4] >= SCORE_THR) & rows.isfinite().all(dim=2)
    return [row[keep].cpu().numpy() for row, keep in zip(rows, usable, strict=True)]


def person_boxes(
    rows: Float32Array, size: tuple[int, int], *, score_thr: float = SCORE_THR
) -> Boxes:
    """Returns every person among the detections, best first, cut to the frame.

    Differs from the reference: other classes are dropped before overlaps are, and boxes are not
    rounded.

    Args:
        rows: float32 [R, 6].
        size: (H, W) of the frame.
        score_thr: a person must score above this, and above 0.05 in any case.
    """
    keep = (rows[:, 5].astype(np.int64) == PERSON_CLASS) & (rows[:, 4] > score_thr)
    bboxes = _scaled(rows[keep], size)
    height, width = size
    bboxes = np.clip(bboxes, 0, np.array([width, height, width, height], np.float32))
    scores = rows[keep, 4]
    solid = (bboxes[:, 2:] > bboxes[:, :2]).all(axis=1)
    bboxes, scores = bboxes[solid], scores[solid]
    sides = bboxes[:, 2:] - bboxes[:, :2]
    kept = suppress_overlaps(np.concatenate([bboxes[:, :2], sides], axis=1), scores)
    return Boxes(bboxes[kept], scores[kept], (-1,) * len(kept))


def reference_box(rows: Float32Array, size: tuple[int, int]) -> Float32Array:
    """Returns the one box that the reference chooses.

    Boxes are cut to whole pixels, overlaps are dropped whatever the class, then the largest person
    wins. A person is passed over if its longer side is below 0.4 of the longest, where the longest
    is that of all persons until one is accepted, and from then on that of the last accepted.

    Args:
        rows: float32 [R, 6].
        size: (H, W) of the frame.

    Returns:
        float32 [5]: x1 y1 x2 y2 in whole pixels, and the score; the whole frame with score -1 if
        there is no person.

    Source: kijai/ComfyUI-WanAnimatePreprocess: models/onnx_models.py, Yolo
    """
    rows = rows[rows[:, 4] >= np.float32(SCORE_THR)]
    corners = _scaled(rows, size)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    boxes = boxes.astype(np.int32)
    kept = suppress_overlaps(boxes, rows[:, 4])
    kept = kept[rows[kept, 5].astype(np.int64) == PERSON_CLASS]
    best, best_area = -1, -1
    longest = int(boxes[kept, 2:].max(initial=0))
    for index in kept.tolist():
        width, height = (int(side) for side in boxes[index, 2:])
        if max(width, height) < _MIN_SHARE * longest or width * height <= best_area:
            continue
        best, best_area, longest = index, width * height, max(width, height)
    if best < 0:
        return np.array([0, 0, size[1], size[0], -1], np.float32)
    x, y, width, height = boxes[best].tolist()
    return np.array([x, y, x + width, y + height, rows[best, 4]], np.float32)


def suppress_overlaps(
    boxes_xywh: npt.NDArray[np.float32] | npt.NDArray[np.int32], scores: Float32Array
) -> npt.NDArray[np.int64]:
    """Returns the rows that stay when of two boxes that overlap the better one is kept.

    As OpenCV's NMSBoxes: scores must be above 0.05, equal scores keep their order, and an overlap
    (intersection over union) of exactly 0.5 is allowed.

    Args:
        boxes_xywh: [R, 4] left, top, width, height.
        scores: float32 [R].

    Returns:
        row numbers, best score first.
    """
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > np.float32(SCORE_THR)]
    overlaps = _overlaps(boxes_xywh.astype(np.float64)[order])
    kept: list[int] = []
    for row in range(len(order)):
        if (overlaps[row, kept] <= IOU_THR).all():
            kept.append(row)
    return order[kept].astype(np.int64)


def frames_tensor(frames: UInt8Array) -> Tensor:
    """Returns frames as a tensor on the host, without a copy where possible.

    Raises:
        InvalidRequest: if they are not uint8 [B, H, W, 3].
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise InvalidRequest(
            f"frames are {frames.dtype} {list(frames.shape)}; uint8 [B, H, W, 3] is needed.",
            field="frames",
        )
    # torch warns about arrays that cannot be written, such as decoded frames: copy those.
    return torch.from_numpy(np.require(frames, requirements=["C", "W"]))


def check_chunk(chunk: int) -> None:
    """Refuses a chunk below 1.

    Raises:
        InvalidRequest: if it is.
    """
    if chunk < 1:
        raise InvalidRequest(f"chunk is {chunk}; at least 1 is needed.", field="chunk")


def _reference_boxes(rows: Float32Array, size: tuple[int, int]) -> Boxes:
    """Returns the reference's box as its callers use it: the whole frame where it is poor."""
    *corners, score = reference_box(rows, size).tolist()
    x1, y1, x2, y2 = corners
    if score <= 0 or min(x2 - x1, y2 - y1) < _MIN_SIDE_PX:
        corners = [0, 0, size[1], size[0]]
    scores = np.array([max(score, 0)], np.float32)
    return Boxes(np.array([corners], np.float32), scores, (-1,))


def _scaled(rows: Float32Array, size: tuple[int, int]) -> Float32Array:
    """Returns the corners [R, 4] of rows in pixels of a frame of that (H, W)."""
    across, down = size[1] / SIDE_PX, size[0] / SIDE_PX
    return rows[:, :4] * np.array([across, down, across, down], np.float32)


def _overlaps(boxes: npt.NDArray[np.float64]) -> Float32Array:
    """Returns intersection over union [R, R] of boxes x y w h; 1 where both are empty."""
    low, sides = boxes[:, :2], boxes[:, 2:]
    shared = np.minimum(low + sides, (low + sides)[:, None]) - np.maximum(low, low[:, None])
    shared_area = shared.clip(0).prod(axis=2)
    area = sides.prod(axis=1)
    union = area + area[:, None] - shared_area
    return np.where(union > 0, shared_area / np.where(union > 0, union, 1), 1).astype(np.float32)

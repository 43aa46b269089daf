"""3-D joints by the published NLF TorchScript file: 24 joints in millimetres, camera space.

Of the dozen outputs only the non-parametric joints and their uncertainties are kept. The network
is asked about our own boxes (`estimate_smpl_batched`) where the file can do that: no second
detector runs and no other person can be picked. Otherwise it finds the persons itself
(`detect_smpl_batched`), and each of our boxes gets the one that overlaps it most.

The weights may be used for non-commercial research only; `rtmw3d` is the alternative. Loading a
TorchScript file runs the code in it: load files from a trusted place only.

Verified against the stand-in of the same interface, and read off the public PyTorch source of the
model family; the published file itself was not at hand.

Source: isarandi/nlf: nlf/pt/multiperson/multiperson_model.py; rookiestar28/
ComfyUI-WanVideoWrapper: MTV/nodes.py
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xicon_infer.errors import BackendUnavailable, InvalidRequest, OutOfMemory, WeightsError
from xicon_infer.pose.bodies import (
    FloatArray,
    camera_or_default,
    check_frames,
    nobody,
    usable_rows,
)
from xicon_infer.pose.camera import Float64Array, project
from xicon_infer.pose.observations import Bodies, Boxes
from xicon_infer.pose.skeleton import SMPL_JOINTS
from xicon_infer.types import Float32Array, UInt8Array

logger = logging.getLogger(__name__)

LICENCE_NOTE = (
    "The NLF weights are for non-commercial research only (isarandi/nlf: README.md); "
    "use RTMW3D for anything else, see docs/pose-models.md"
)

CHUNK = 16
"""Frames per call. The network copies whole frames in float16, so memory grows with this."""

MATCH_IOU = 0.3
"""A person whom the network found itself belongs to a box that it overlaps at least this much."""

_OUR_BOXES = "estimate_smpl_batched"
_OWN_DETECTOR = "detect_smpl_batched"
_JOINTS = "joints3d_nonparam"
_UNCERTAINTIES = "joint_uncertainties"

_Found = tuple[Float32Array, Float32Array]


class Nlf:
    """The loaded network.

    Args:
        path: the `.torchscript` file.
        device: where it runs.
        chunk: frames per call, at least 1; changes memory, not the result.
        own_detector: let the network find the persons itself, as the original graph does.

    Attributes:
        uses_boxes: True if it is asked about our boxes.

    Raises:
        WeightsError: the file is missing, no TorchScript, or lacks a method or an argument.
        BackendUnavailable: torchvision, whose operators the file contains, is not installed.
        InvalidRequest: chunk is below 1.
    """

    def __init__(
        self, path: Path, device: torch.device, *, chunk: int = CHUNK, own_detector: bool = False
    ) -> None:
        if chunk < 1:
            raise InvalidRequest(f"'chunk' is {chunk}; at least 1 frame is needed", field="chunk")
        self._device = device
        self._chunk = chunk
        self._model = _load(path, device)
        name = _method(self._model, path, own_detector=own_detector)
        self.uses_boxes = name == _OUR_BOXES
        self._call = getattr(self._model, name)
        logger.info(LICENCE_NOTE)

    def estimate(
        self, frames: UInt8Array, boxes: Sequence[Boxes], intrinsics: FloatArray | None = None
    ) -> list[Bodies]:
        """Returns the bodies of every frame; row i belongs to person i of the frame's boxes.

        Args:
            frames: uint8 [B, H, W, 3], RGB.
            boxes: the persons of each frame; frames without any cost nothing.
            intrinsics: [3, 3], pixels from the corner; None for 55 degrees over the longer side.

        Returns:
            B bodies; zeros for a person of whom the network found nothing.

        Raises:
            InvalidRequest: frames that are not uint8, or arguments that do not fit together.
            OutOfMemory: a chunk does not fit.
            WeightsError: the network fails, or answers in an unknown form.
        """
        check_frames(frames, boxes)
        camera = camera_or_default(intrinsics, (frames.shape[1], frames.shape[2]))
        bodies = [nobody(persons) for persons in boxes]
        rows = [usable_rows(persons) for persons in boxes]
        busy = [index for index, persons in enumerate(rows) if len(persons)]
        for start in range(0, len(busy), self._chunk):
            part = busy[start : start + self._chunk]
            wanted = [np.asarray(boxes[i].bboxes, np.float32)[rows[i]] for i in part]
            for index, found in zip(part, self._look(frames[part], wanted, camera), strict=True):
                bodies[index].joints[rows[index]] = found[0]
                bodies[index].uncertainties[rows[index]] = found[1]
        return bodies

    def _look(
        self, frames: UInt8Array, wanted: list[Float32Array], camera: Float64Array
    ) -> list[_Found]:
        """Returns joints [n, 24, 3] and uncertainties [n, 24] of the wanted boxes of each frame."""
        pictures = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))
        # The network counts pixels from the centre of the first one, this package from its corner.
        from_centre = camera - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
        matrix = torch.from_numpy(from_centre[None].astype(np.float32))
        arguments: dict[str, Any] = {
            "images": pictures.to(self._device),
            "intrinsic_matrix": matrix.to(self._device),
        }
        if self.uses_boxes:
            arguments["boxes"] = [torch.from_numpy(_xywh(w)).to(self._device) for w in wanted]
        try:
            with profiling_executor(), torch.no_grad():
                result = self._call(**arguments)
        except (torch.jit.Error, RuntimeError) as error:
            raise _explained(error, frames, self._chunk) from error
        found = read_result(result, len(frames))
        if not self.uses_boxes:
            theirs = _their_boxes(result, found, camera)
            return [_matched(*each) for each in zip(wanted, theirs, found, strict=True)]
        for ours, (joints, _) in zip(wanted, found, strict=True):
            if len(joints) != len(ours):
                raise WeightsError(
                    f"NLF: {len(ours)} boxes gave {len(joints)} bodies", code="MODEL_MISMATCH"
                )
        return [_finite(each) for each in found]


def read_result(result: Mapping[str, list[Tensor]], frames: int) -> list[_Found]:
    """Returns joints float32 [n, 24, 3] and uncertainties float32 [n, 24] of every frame.

    Uncertainties that the network does not give are zeros. Where nobody is found the published
    file leaves out its key "boxes", so nothing here depends on it.

    Args:
        result: name -> one tensor per frame.
        frames: how many there were.

    Raises:
        WeightsError: no joints, or of another shape or number.
    """
    if _JOINTS not in result:
        raise WeightsError(
            f"NLF: the answer holds no {_JOINTS!r}, it holds {', '.join(sorted(result))}. "
            "Use the file nlf_l_multi_0.3.2.torchscript.",
            code="MODEL_MISMATCH",
        )
    joints = [_numpy(each) for each in result[_JOINTS]]
    uncertainties = [_numpy(each) for each in result.get(_UNCERTAINTIES, [])]
    if not uncertainties:
        uncertainties = [np.zeros(each.shape[:2], np.float32) for each in joints]
    if len(joints) != frames or len(uncertainties) != frames:
        raise WeightsError(
            f"NLF: {frames} frames gave {len(joints)} answers", code="MODEL_MISMATCH"
        )
    for body, spread in zip(joints, uncertainties, strict=True):
        expected = (len(body), SMPL_JOINTS)
        if body.shape != (*expected, 3) or spread.shape != expected:
            raise WeightsError(
                f"NLF: joints have shape {list(body.shape)} and uncertainties "
                f"{list(spread.shape)}; [n, {SMPL_JOINTS}, 3] and [n, {SMPL_JOINTS}] are needed",
                code="MODEL_MISMATCH",
            )
    return list(zip(joints, uncertainties, strict=True))


def match_boxes(ours: FloatArray, theirs: FloatArray) -> list[int]:
    """Returns for each of our boxes the number of theirs that belongs to it, -1 for none.

    The pair that overlaps most is taken first; a box is used once.

    Args:
        ours: [P, 4], x1 y1 x2 y2.
        theirs: [N, 4], the same.
    """
    overlap = _iou(np.asarray(ours, np.float64), np.asarray(theirs, np.float64))
    chosen = [-1] * len(ours)
    while overlap.size and overlap.max() >= MATCH_IOU:
        row, column = np.unravel_index(int(overlap.argmax()), overlap.shape)
        chosen[int(row)] = int(column)
        overlap[row, :] = -1.0
        overlap[:, column] = -1.0
    return chosen


def _load(path: Path, device: torch.device) -> Any:
    if not path.is_file():
        raise WeightsError(
            f"NLF: {path} is not there. It is nlf_l_multi_0.3.2.torchscript of "
            "https://github.com/isarandi/nlf/releases. Fetch it, or correct the path."
        )
    try:
        import_module("torchvision")  # its operators must be known before the file is read
    except ImportError as error:
        raise BackendUnavailable(
            "NLF needs torchvision, which is not installed. Install the build for this torch."
        ) from error
    load: Any = torch.jit.load
    try:
        with warnings.catch_warnings():
            # torch 2.15 deprecates TorchScript; the weights are published in no other form.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            return load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise WeightsError(
            f"NLF: {path} is not a TorchScript file: {_last_line(error)}. Fetch it again.",
            code="MODEL_CORRUPT",
        ) from error


def _method(model: Any, path: Path, *, own_detector: bool) -> str:
    """Returns the name of the method to call; its arguments are read from the file."""
    wanted = (_OWN_DETECTOR,) if own_detector else (_OUR_BOXES, _OWN_DETECTOR)
    name = next((each for each in wanted if hasattr(model, each)), None)
    if name is None:
        raise WeightsError(
            f"NLF: {path} has no method {' or '.join(wanted)}. Use a 'multi' file, as "
            "nlf_l_multi_0.3.2.torchscript; a 'crop' file has neither.",
            code="MODEL_MISMATCH",
        )
    known = {argument.name for argument in getattr(model, name).schema.arguments}
    needed = {"images", "intrinsic_matrix"} | ({"boxes"} if name == _OUR_BOXES else set())
    if not needed <= known:
        raise WeightsError(
            f"NLF: {name} of {path} takes no {', '.join(sorted(needed - known))}. "
            "Use nlf_l_multi_0.3.2.torchscript.",
            code="MODEL_MISMATCH",
        )
    return name


@contextmanager
def profiling_executor() -> Iterator[None]:
    """Switches TorchScript's profiling executor on, and back to what it was.

    Other libraries switch it off for the whole process; the file then fails with "invalid vector
    subscript" or "vector::_M_range_check" (kijai/ComfyUI-SCAIL-Pose issue 1).
    """
    before = torch._C._jit_set_profiling_executor(True)
    try:
        yield
    finally:
        torch._C._jit_set_profiling_executor(before)


def _explained(error: Exception, frames: UInt8Array, chunk: int) -> OutOfMemory | WeightsError:
    """Returns the error of this package for one of the network.

    TorchScript passes CUDA's error on as a plain RuntimeError, so the text has to tell.
    """
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
        height, width = frames.shape[1:3]
        return OutOfMemory(
            f"NLF: {len(frames)} frames of {width}x{height} do not fit into the memory of the "
            f"device. Lower 'chunk' (it is {chunk}), or free the device of other models."
        )
    return WeightsError(
        f"NLF: the network failed: {_last_line(error)}. Try another release of it, or of torch.",
        code="MODEL_MISMATCH",
    )


def _matched(ours: Float32Array, theirs: FloatArray, found: _Found) -> _Found:
    """Returns the bodies in the order of our boxes; zeros for a box that nobody belongs to."""
    chosen = match_boxes(ours, theirs)
    joints = np.zeros((len(ours), SMPL_JOINTS, 3), np.float32)
    uncertainties = np.zeros((len(ours), SMPL_JOINTS), np.float32)
    for row, index in enumerate(chosen):
        if index >= 0:
            joints[row], uncertainties[row] = found[0][index], found[1][index]
    return _finite((joints, uncertainties))


def _their_boxes(
    result: Mapping[str, list[Tensor]], found: list[_Found], camera: Float64Array
) -> list[FloatArray]:
    """Returns x1 y1 x2 y2 of the persons the network found: its boxes, else of the joints."""
    given = [_numpy(each) for each in result.get("boxes", [])]
    joints = [each[0] for each in found]
    if [len(each) for each in given] == [len(each) for each in joints]:
        return [np.hstack([box[:, :2], box[:, :2] + box[:, 2:4]]) for box in given]
    points = [project(each, camera) for each in joints]
    return [np.hstack([each.min(axis=1), each.max(axis=1)]) for each in points]


def _finite(found: _Found) -> _Found:
    """Returns the bodies with zeros for those that are not numbers."""
    joints, uncertainties = found
    whole = np.isfinite(np.dstack([joints, uncertainties]))
    good = np.asarray(whole.all(axis=(1, 2), keepdims=True))
    return (
        np.where(good, joints, np.float32(0)),
        np.where(good[:, 0], uncertainties, np.float32(0)),
    )


def _iou(ours: Float64Array, theirs: Float64Array) -> Float64Array:
    """Returns float64 [P, N], intersection over union; 0 where a box is not a number."""
    low = np.maximum(ours[:, None, :2], theirs[None, :, :2])
    high = np.minimum(ours[:, None, 2:], theirs[None, :, 2:])
    shared = np.clip(high - low, 0.0, None).prod(axis=2)
    areas = [np.clip(box[:, 2:] - box[:, :2], 0.0, None).prod(axis=1) for box in (ours, theirs)]
    union = areas[0][:, None] + areas[1][None] - shared
    return np.nan_to_num(shared / np.maximum(union, 1e-9))


def _xywh(box: Float32Array) -> Float32Array:
    return np.hstack([box[:, :2], box[:, 2:] - box[:, :2]]).astype(np.float32)


def _numpy(value: Tensor) -> Float32Array:
    array: Float32Array = value.detach().to("cpu", torch.float32).numpy()
    return array


def _last_line(error: BaseException) -> str:
    """Returns the last line of an error; in TorchScript the traceback stands before it."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]

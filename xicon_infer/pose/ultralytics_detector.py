"""Finding persons with the ultralytics package, and following them with its trackers.

Only used when it is asked for: ultralytics is AGPL-3.0 and so are its weights, which binds whoever
ships or serves them. The package is imported in one function, with its telemetry, its downloads
and its own installation of packages switched off. A `.pt` file is a pickle that runs code when it
is read: open only files whose origin you trust.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from xicon_infer.errors import BackendUnavailable, InvalidRequest, WeightsError
from xicon_infer.pose.detector import PERSON_CLASS, check_chunk, frames_tensor
from xicon_infer.pose.observations import Boxes
from xicon_infer.runtime import forbid_ultralytics_network
from xicon_infer.types import UInt8Array

Tracker = Literal["botsort", "bytetrack"]
TRACKERS: tuple[Tracker, ...] = ("botsort", "bytetrack")

_SUFFIXES = (".pt", ".onnx", ".engine")
_LICENCE = "ultralytics is AGPL-3.0: whoever ships or serves it must offer the whole source"


class UltralyticsModel(Protocol):
    """What is used of `ultralytics.YOLO`; frames are BGR arrays, results have `.boxes`."""

    def predict(self, source: list[UInt8Array], **settings: Any) -> list[Any]:
        """Returns one result per frame."""

    def track(self, source: list[UInt8Array], **settings: Any) -> list[Any]:
        """Returns one result per frame, boxes with identities that last over calls."""


class UltralyticsDetector:
    """Finds persons, and follows them if a tracker is named.

    Args:
        path: a detection model, .pt, .onnx or .engine, whose class 0 is a person.
        device: cuda or cpu.
        tracker: "botsort" or "bytetrack"; ids are -1 if None.
        score_thr: smallest score, 0 to 1; ultralytics' own if None (0.25, with a tracker 0.1).
        chunk: frames in one call, at least 1.
        load: opens the model.

    Raises:
        InvalidRequest: if `tracker`, `score_thr` or `chunk` is not allowed.
        WeightsError: if the file is missing or has another ending.
        BackendUnavailable: if ultralytics is not installed.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        tracker: Tracker | None = None,
        *,
        score_thr: float | None = None,
        chunk: int = 16,
        load: Callable[[Path], UltralyticsModel] | None = None,
    ) -> None:
        if tracker is not None and tracker not in TRACKERS:
            raise InvalidRequest(
                f"tracker is {tracker!r}; allowed: none, {', '.join(TRACKERS)}.", field="tracker"
            )
        if score_thr is not None and not 0 < score_thr < 1:
            raise InvalidRequest(
                f"score_thr is {score_thr}; between 0 and 1 is allowed.", field="score_thr"
            )
        check_chunk(chunk)
        # ultralytics would try to download a file that is missing.
        if not path.is_file():
            raise WeightsError(f"The detector {path} is not there.")
        if path.suffix.lower() not in _SUFFIXES:
            raise WeightsError(
                f"{path} ends in {path.suffix!r}; {', '.join(_SUFFIXES)} are allowed.",
                code="MODEL_MISMATCH",
            )
        self.model = (load or load_ultralytics)(path)
        self.device = device
        self.tracker = tracker
        self.score_thr = score_thr
        self.chunk = chunk

    def detect(self, frames: UInt8Array) -> list[Boxes]:
        """Returns the persons of every frame, with ids if a tracker is used.

        Tracks go on from the call before: give the frames of a video in order, and call `reset`
        before those of another.

        Args:
            frames: uint8 [B, H, W, 3] RGB.

        Raises:
            InvalidRequest: if the frames have another type or shape.
        """
        frames_tensor(frames)
        settings: dict[str, Any] = {
            "device": self.device,
            "classes": [PERSON_CLASS],
            "verbose": False,
            "save": False,
        }
        if self.score_thr is not None:
            settings["conf"] = self.score_thr
        if self.tracker is not None:
            settings |= {"tracker": f"{self.tracker}.yaml", "persist": True}
        call = self.model.predict if self.tracker is None else self.model.track
        found: list[Boxes] = []
        threads = torch.get_num_threads()
        try:
            for start in range(0, len(frames), self.chunk):
                piece = frames[start : start + self.chunk]
                found += [_boxes(result) for result in call(_as_bgr(piece), **settings)]
        finally:
            # ultralytics may set the threads of the whole process.
            torch.set_num_threads(threads)
        return found

    def reset(self) -> None:
        """Forgets all tracks: the next frame starts another video."""
        predictor = getattr(self.model, "predictor", None)
        for tracker in getattr(predictor, "trackers", ()):
            tracker.reset()


def load_ultralytics(path: Path) -> UltralyticsModel:
    """Returns a detection model opened by ultralytics.

    Raises:
        BackendUnavailable: if ultralytics, or a package it needs, is not installed.
        WeightsError: if the file cannot be read.
    """
    forbid_ultralytics_network()
    try:
        ultralytics = importlib.import_module("ultralytics")
    except ImportError as error:
        raise BackendUnavailable(
            "This detector needs the package ultralytics: pip install ultralytics lap. "
            f"{_LICENCE}. The default detector does not need it.",
            field="detector",
        ) from error
    try:
        return ultralytics.YOLO(str(path), task="detect")
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError) as error:
        raise WeightsError(
            f"{path} cannot be read by ultralytics ({error}). Download it again.",
            code="MODEL_CORRUPT",
        ) from error


def _as_bgr(frames: UInt8Array) -> list[UInt8Array]:
    return [np.ascontiguousarray(frame[..., ::-1]) for frame in frames]


def _boxes(result: Any) -> Boxes:
    """Returns the boxes of one ultralytics result."""
    boxes = result.boxes
    bboxes = boxes.xyxy.cpu().numpy().astype(np.float32).reshape(-1, 4)
    scores = boxes.conf.cpu().numpy().astype(np.float32).reshape(-1)
    # A tracker that follows nobody yet leaves the ids out.
    ids = (-1,) * len(bboxes) if boxes.id is None else tuple(int(i) for i in boxes.id.tolist())
    return Boxes(bboxes, scores, ids)

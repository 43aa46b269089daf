"""The pose stage: a driving video becomes tracks of the persons to animate.

Stages run at the same time, a batch of frames apart: reading, detection, keypoints, bodies. Only
numbers are kept, so that a long video needs no more memory than a short one; pictures are drawn
afterwards, when the subject and the depth range of the whole video are known.

Every person is followed first and the subject chosen then, so that it never changes on the way.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from xicon_infer.ahead import ahead
from xicon_infer.errors import PoseError, WeightsError
from xicon_infer.pose.align import Alignment, AlignOptions, align_tracks
from xicon_infer.pose.align_solver import BOUNDS, WIDE_BOUNDS
from xicon_infer.pose.bodies import nobody
from xicon_infer.pose.camera import default_intrinsics
from xicon_infer.pose.detector import YoloDetector
from xicon_infer.pose.dwpose import DwPose
from xicon_infer.pose.follow import FollowedPerson, follow
from xicon_infer.pose.nlf import LICENCE_NOTE, Nlf
from xicon_infer.pose.observations import Bodies, Boxes, Observation
from xicon_infer.pose.report import PoseReport, make_report
from xicon_infer.pose.rtmw3d import Rtmw3d
from xicon_infer.pose.smooth import SmoothOptions, smooth_track
from xicon_infer.pose.subject import choose
from xicon_infer.pose.track import fill_gaps
from xicon_infer.pose.ultralytics_detector import UltralyticsDetector
from xicon_infer.pose.vitpose import VitPose
from xicon_infer.pose.yolox import YoloxDetector
from xicon_infer.types import Float32Array, PoseTrack, Progress, Track, UInt8Array
from xicon_infer.weights.manifest import (
    FileEntry,
    fetch_command,
    load_manifest,
    locate,
    missing_message,
)

BATCH = 16
"""Frames that go through the networks together."""

CPU_CHUNK = 2
"""Frames the detector stretches together on a CPU; 16 leave its cache and take longer."""

MAX_PERSONS = 6
"""Persons of a frame that are looked at; the largest of a crowd."""

BUILT_IN_DETECTORS = ("yolov10m", "yolox")


class Detector(Protocol):
    """Finds persons in frames uint8 [B, H, W, 3]."""

    def detect(self, frames: UInt8Array) -> list[Boxes]:
        """Returns the persons of each frame."""


class KeypointModel(Protocol):
    """Finds the 133 points of persons."""

    def estimate(
        self, frames: UInt8Array, frame_index: list[int], bboxes: Float32Array
    ) -> tuple[Float32Array, Float32Array]:
        """Returns keypoints [N, 133, 2] and scores [N, 133] of N boxes."""


class BodyModel(Protocol):
    """Finds 3-D joints of persons."""

    def estimate(
        self, frames: UInt8Array, boxes: list[Boxes], intrinsics: Float32Array | None
    ) -> list[Bodies]:
        """Returns the bodies of each frame, in the order of its boxes."""


@dataclass(frozen=True)
class PoseModels:
    """The networks, and what the user must be told about their licences.

    bodies: None where only points in the picture are wanted; all bodies are then missing.
    """

    detector: Detector
    keypoints: KeypointModel
    bodies: BodyModel | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PoseModelOptions:
    """Which networks, and where.

    body: "nlf" (weights for non-commercial use), "rtmw3d", or "none" for points alone. detector: a
    built-in one, or the path of an ultralytics model; tracker: its tracker, or "none".
    keypoint_model: size of ViTPose, or DWPose. keypoint_decode: of ViTPose, as the ComfyUI graph
    ("dark") or as the network was trained ("udp").
    """

    body: Literal["nlf", "rtmw3d", "none"] = "nlf"
    detector: str = BUILT_IN_DETECTORS[0]
    tracker: Literal["none", "botsort", "bytetrack"] = "none"
    keypoint_model: Literal["vitpose-h", "vitpose-l", "dwpose"] = "vitpose-h"
    keypoint_decode: Literal["dark", "udp"] = "dark"


@dataclass(frozen=True)
class MotionOptions:
    """Who is animated, and how the motion is treated.

    subject: "auto", "largest", "central", "confident", "all" or the number of a person. persons:
    1 or 2 are drawn. smooth: 0 (off) to 1. align: "auto", "wide" (looser bounds) or "off".
    """

    subject: str | int = "auto"
    persons: int = 1
    smooth: float = 0.0
    align: Literal["auto", "wide", "off"] = "auto"


def pose_entries(options: PoseModelOptions) -> list[FileEntry]:
    """Returns the manifest entries of the files that the networks are loaded from."""
    wanted: set[str] = {options.body, options.keypoint_model}
    if _built_in(options):
        wanted.add(options.detector)
    return [
        entry
        for entry in load_manifest().files
        if entry.component.startswith("pose_") and any(entry.id.startswith(n) for n in wanted)
    ]


def model_paths(options: PoseModelOptions, search_dirs: tuple[Path, ...]) -> dict[str, Path]:
    """Returns network -> file.

    Raises:
        WeightsError: files are missing; all of them are named, with where to get each.
    """
    found = {entry.id: locate(entry, search_dirs) for entry in pose_entries(options)}
    missing = [entry for entry in pose_entries(options) if found[entry.id] is None]
    if missing:
        raise WeightsError(
            " ".join(missing_message(entry, search_dirs) for entry in missing)
            + f" One command gets them: {fetch_command(missing)} ; then give --models-dir models "
            "(or set XICON_MODELS_DIR), or give the motion with --pose-video or --track.",
            field="models_dir",
        )
    names: list[str] = [options.keypoint_model]
    names += [options.body] if options.body != "none" else []
    names += [options.detector] if _built_in(options) else []
    paths = {
        name: next(p for i, p in found.items() if p and i.startswith(name) and _is_model(p))
        for name in names
    }
    return paths if _built_in(options) else {**paths, "detector": Path(options.detector)}


def load_pose_models(
    options: PoseModelOptions, device: torch.device, paths: dict[str, Path]
) -> PoseModels:
    """Returns the networks, loaded from `model_paths`.

    Raises:
        WeightsError: a file is damaged or of another network.
        BackendUnavailable: a GPU is asked for and onnxruntime cannot use it; or ultralytics is
            not installed.
    """
    notes = (LICENCE_NOTE,) if options.body == "nlf" else ()
    return PoseModels(
        _load_detector(options, device, paths),
        _load_keypoints(options, device, paths),
        _load_bodies(options, device, paths),
        notes,
    )


def _load_detector(
    options: PoseModelOptions, device: torch.device, paths: dict[str, Path]
) -> Detector:
    chunk = CPU_CHUNK if device.type == "cpu" else BATCH
    if options.detector == "yolox":
        return YoloxDetector(paths["yolox"], device, chunk=chunk)
    if _built_in(options):
        return YoloDetector(paths[options.detector], device, chunk=chunk)
    tracker = None if options.tracker == "none" else options.tracker
    return UltralyticsDetector(paths["detector"], device, tracker=tracker)


def _load_keypoints(
    options: PoseModelOptions, device: torch.device, paths: dict[str, Path]
) -> KeypointModel:
    if options.keypoint_model == "dwpose":
        return DwPose(paths["dwpose"], device)
    return VitPose(paths[options.keypoint_model], device, decode=options.keypoint_decode)


def _load_bodies(
    options: PoseModelOptions, device: torch.device, paths: dict[str, Path]
) -> BodyModel | None:
    if options.body == "none":
        return None
    return (Nlf if options.body == "nlf" else Rtmw3d)(paths[options.body], device)


def observe(
    frames: Iterable[UInt8Array], models: PoseModels, progress: Progress, total: int
) -> list[Observation]:
    """Returns what the networks see in each frame.

    Args:
        frames: uint8 [H, W, 3], one by one, all of one size; each is let go when it was looked at.
        models: from `load_pose_models`.
        progress: told of finished frames.
        total: about how many frames there are.

    Raises:
        PoseError: nobody is in any frame.
    """
    seen: list[Observation] = []
    # Closed at once when the job is stopped: an error that somebody keeps must not keep threads.
    with closing(_bodies(_keypoints(_boxes(_batches(frames), models), models), models)) as stages:
        for observations in stages:
            seen += observations
            progress.step(len(seen), max(total, len(seen)), "frame")
    if not any(len(observation.boxes.bboxes) for observation in seen):
        raise PoseError(
            f"no person was found in any of the {len(seen)} frames of the driving video; use a "
            "video where a person is seen whole and large, or give the motion with --track",
            field="video",
        )
    return seen


def find_tracks(
    observations: list[Observation],
    *,
    fps: Fraction,
    size: tuple[int, int],
    options: MotionOptions,
) -> tuple[list[Track], PoseReport]:
    """Returns the tracks to draw, and what was found and decided.

    Args:
        observations: of every frame.
        fps: frames per second.
        size: (H, W) of the frames.
        options: who, and how smooth.

    Raises:
        PoseError: there is no such person.
    """
    people: list[FollowedPerson] = follow(observations, fps=fps, size=size)
    chosen = choose(people, subject=options.subject, persons=options.persons, size=size)
    report = make_report(people, chosen, subject=options.subject)
    smooth = SmoothOptions(strength=options.smooth)
    tracks = [smooth_track(fill_gaps(people[index].track), smooth) for index in chosen]
    return tracks, report


def find_reference(image: UInt8Array, models: PoseModels) -> PoseTrack | None:
    """Returns the points of the character in a picture uint8 [H, W, 3], or None without one.

    Of several persons the largest is taken.
    """
    boxes = models.detector.detect(image[None])[0]
    if not len(boxes.bboxes):
        return None
    areas = np.prod(boxes.bboxes[:, 2:] - boxes.bboxes[:, :2], axis=1)
    bbox = boxes.bboxes[[int(areas.argmax())]]
    keypoints, scores = models.keypoints.estimate(image[None], [0], bbox)
    return PoseTrack(keypoints, _certainty(scores), bbox, image.shape[:2])


def align(
    tracks: list[Track],
    reference: PoseTrack | None,
    *,
    size: tuple[int, int],
    fit: Literal["crop", "pad"],
    options: MotionOptions,
) -> tuple[list[Track], Alignment]:
    """Returns the tracks fitted to the character, and how; unchanged where that is not possible.

    Args:
        tracks: of the driving video.
        reference: the character, in a picture already of the size of the result.
        size: (H, W) of the result.
        fit: how the driving frames lie on the result.
        options: `align` applies.
    """
    if options.align == "off":
        return tracks, Alignment("skipped", "switched off")
    if reference is None:
        return tracks, Alignment("skipped", "nobody was found in the reference image")
    bounds = WIDE_BOUNDS if options.align == "wide" else BOUNDS
    return align_tracks(tracks, reference, size=size, options=AlignOptions(bounds=bounds, fit=fit))


_Seen = tuple[UInt8Array, list[Boxes]]
_Pointed = tuple[UInt8Array, list[Boxes], list[Float32Array], list[Float32Array]]


def _batches(frames: Iterable[UInt8Array]) -> Iterator[UInt8Array]:
    def collect() -> Iterator[UInt8Array]:
        batch: list[UInt8Array] = []
        for frame in frames:
            batch.append(frame)
            if len(batch) == BATCH:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)

    return ahead(collect())


def _boxes(batches: Iterable[UInt8Array], models: PoseModels) -> Iterator[_Seen]:
    def look(frames: UInt8Array) -> _Seen:
        return frames, [_largest(found) for found in models.detector.detect(frames)]

    return ahead(look(frames) for frames in batches)


def _keypoints(batches: Iterable[_Seen], models: PoseModels) -> Iterator[_Pointed]:
    def look(frames: UInt8Array, boxes: list[Boxes]) -> _Pointed:
        counts = [len(found.bboxes) for found in boxes]
        index = [i for i, count in enumerate(counts) for _ in range(count)]
        bboxes = np.concatenate([found.bboxes for found in boxes])
        points, scores = models.keypoints.estimate(frames, index, bboxes)
        ends = np.cumsum(counts)[:-1]
        return frames, boxes, np.split(points, ends), np.split(_certainty(scores), ends)

    return ahead(look(frames, boxes) for frames, boxes in batches)


def _bodies(
    batches: Iterable[_Pointed], models: PoseModels
) -> Generator[list[Observation], None, None]:
    for frames, boxes, points, scores in batches:
        if models.bodies is None:
            bodies = [nobody(found) for found in boxes]
            yield [Observation(*parts) for parts in zip(boxes, points, scores, bodies, strict=True)]
            continue
        camera = default_intrinsics(*frames.shape[1:3]).astype(np.float32)
        bodies = models.bodies.estimate(frames, boxes, camera)
        yield [Observation(*parts) for parts in zip(boxes, points, scores, bodies, strict=True)]


def _largest(boxes: Boxes) -> Boxes:
    """Returns the largest persons of a crowd."""
    if len(boxes.bboxes) <= MAX_PERSONS:
        return boxes
    areas = np.prod(boxes.bboxes[:, 2:] - boxes.bboxes[:, :2], axis=1)
    kept = np.sort(np.argsort(-areas, kind="stable")[:MAX_PERSONS])
    return Boxes(boxes.bboxes[kept], boxes.scores[kept], tuple(boxes.ids[i] for i in kept))


def _certainty(scores: Float32Array) -> Float32Array:
    """Returns heatmap peaks as scores from 0 to 1; a network may overshoot a little."""
    return np.clip(scores, 0.0, 1.0)


def _built_in(options: PoseModelOptions) -> bool:
    return options.detector in BUILT_IN_DETECTORS


def _is_model(path: Path) -> bool:
    """Returns False for the external data that lies beside an ONNX file."""
    return path.suffix not in (".bin", ".data")

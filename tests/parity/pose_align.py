"""Alignment to the reference character against the references: solver, node, and whole chain.

`replay_*` claims the files that hold the solver alone. The whole-node and end-to-end files are
claimed by `pose.py`, which adds the checks made here; it hands over its drawing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from tests.parity.golden import Check, Golden, abs_max, exact
from xicon_infer.pose.align import (
    AlignOptions,
    align_tracks,
    choose_joints,
    joint_weights,
    openpose_joints,
)
from xicon_infer.pose.align_overlay import Overlay, align_overlay, face_ratio
from xicon_infer.pose.align_solver import CameraFit, solve_camera
from xicon_infer.pose.camera import default_intrinsics, project
from xicon_infer.pose.keypoints import to_node_figure
from xicon_infer.pose.skeleton import BODY_PAIRS, FACE, KEYPOINTS, LEFT_HAND, RIGHT_HAND
from xicon_infer.types import BodyTrack, PoseTrack, Track

Array = np.ndarray[Any, Any]
Points = dict[str, Array]
Draw = Callable[..., tuple[Array, Array]]

# Tolerances of the golden README.
CAMERA_PX = 0.02
POINTS = 1e-5
P99_LEVELS = 6.0
NODE_SHARE = 0.003
CHAIN_SHARE = 0.01


def replay_solver(golden: Golden) -> list[Check] | None:
    if golden.kind != "safetensors" or not _solver_cases(golden):
        return None
    told = {str(entry["case"]): entry for entry in _twin(golden, ".json").json}
    checks = []
    for case in _solver_cases(golden):
        stored = {k.removeprefix(f"in.{case}."): v.numpy() for k, v in golden.tensors.items()}
        entry = told[case]
        height, width = entry["image_hw"]
        camera = default_intrinsics(height, width)
        camera[[0, 1], [0, 1]] = entry["focal"]
        fit = solve_camera(
            stored["p3"],
            stored["p2"],
            joint_weights(entry["coco_indices"], entry["weighting"]),
            intrinsics=camera,
            size=(height, width),
        )
        error = camera_error(stored["p3"], fit.intrinsics, stored[f"out.{case}.K"])
        checks.append(Check(f"{golden.path.stem}:{case}:camera px", error, CAMERA_PX))
    return checks


def replay_solver_notes(golden: Golden) -> list[Check] | None:
    """Returns one check per case: the notes beside a solver file belong to its arrays."""
    if golden.kind != "json" or not isinstance(golden.json, list) or not golden.json:
        return None
    if not {"coco_indices", "weighting", "focal"} <= set(golden.json[0]):
        return None
    tensors = _twin(golden, ".safetensors").tensors
    checks = []
    for entry in golden.json:
        case, m, s = entry["case"], entry["m"], entry["s"]
        camera = tensors[f"out.{case}.K"].numpy()
        said = entry["focal"] * np.array([m, m * s])
        same_count = len(entry["coco_indices"]) == len(tensors[f"in.{case}.p3"])
        error = abs_max(camera[[0, 1], [0, 1]], said) if same_count else float("inf")
        checks.append(Check(f"{golden.path.stem}:{case}:notes fit arrays", error, 1e-6))
    return checks


def check_node_alignment(golden: Golden, draw: Draw) -> list[Check]:
    """Returns the checks of camera, points and picture for every aligned case of a node file."""
    arrays, checks = golden.arrays, []
    side = golden.path.with_suffix(".json")
    told = json.loads(side.read_text())["cases"] if side.exists() else {}
    for key in sorted(k for k in arrays if k.startswith("mid.") and k.endswith(".K")):
        case = key.removeprefix("mid.").removesuffix(".K")
        name = f"{golden.path.stem}:{case}:aligned"
        expected = arrays[f"out.{case}.frames"]
        size = (expected.shape[1], expected.shape[2])
        people = numbered(arrays, f"in.{case}.joints_")
        driving, reference = points_of(arrays, f"in.{case}.dw"), points_of(arrays, f"in.{case}.ref")
        note = told.get(case, {})
        solved = align_node(
            people,
            driving,
            reference,
            size,
            scale_hands=note.get("scale_hands", True),
            right_hand_first=note.get("swap_hands", True),
        )
        joints = arrays.get(f"mid.{case}.solver_p3", solved.joints)
        if f"mid.{case}.solver_p3" in arrays:
            targets = arrays[f"mid.{case}.solver_p2"]
            checks.append(Check(f"{name} joints mm", abs_max(solved.joints, joints), 0.0))
            checks.append(Check(f"{name} targets px", abs_max(solved.targets, targets), 1e-9))
        if note.get("mode", "none") != "none":
            checks.append(Check(f"{name} mode", exact(solved.weighting, note["mode"]), 0.0))
        error = camera_error(joints, solved.fit.intrinsics, arrays[key])
        checks.append(Check(f"{name} camera px", error, CAMERA_PX))
        for part, value in points_of(arrays, f"mid.{case}.dw_aligned").items():
            wrong = abs_max(solved.points[part], value)
            checks.append(Check(f"{name} {part}", wrong, POINTS))
        flags = {k: note[k] for k in ("draw_face", "draw_hands") if k in note}
        frames, _ = draw(people, solved.fit.intrinsics, solved.points, size, **flags)
        checks.append(
            Check(f"{name} pixels", share_of_pixels(frames, expected, P99_LEVELS), NODE_SHARE)
        )
    return checks


def check_e2e_alignment(golden: Golden, draw: Draw) -> list[Check]:
    """Returns the checks of an end-to-end file: camera, the same by way of tracks, and pictures."""
    arrays, stem = golden.arrays, golden.path.stem
    expected = arrays["out.frames_aligned"]
    size = (expected.shape[1], expected.shape[2])
    people = numbered(arrays, "mid.nlf_joints_")
    driving, reference = points_of(arrays, "mid.dw"), points_of(arrays, "mid.ref")
    if not arrays["mid.K_aligned"].any():
        frames, _ = draw(people, None, driving, size)
        return [
            Check(
                f"{stem}:skipped pixels", share_of_pixels(frames, expected, P99_LEVELS), CHAIN_SHARE
            )
        ]
    solved = align_node(people, driving, reference, size)
    camera = arrays["mid.K_aligned"]
    frames, _ = draw(people, solved.fit.intrinsics, solved.points, size)
    track, points = align_as_tracks(people, driving, reference, size)
    # With two bodies and one figure the node does not shift; a track is always one of each.
    in_track = np.array([len(frame) == 1 for frame in people])
    through = {k: v[in_track] for k, v in solved.points.items() if k != "subset"}
    return [
        Check(
            f"{stem}:aligned camera px",
            camera_error(solved.joints, solved.fit.intrinsics, camera),
            CAMERA_PX,
        ),
        Check(
            f"{stem}:aligned camera px by tracks",
            camera_error(solved.joints, track.body.intrinsics, camera),
            CAMERA_PX,
        ),
        *(
            Check(f"{stem}:aligned {part} by tracks", abs_max(points[part][in_track], v), POINTS)
            for part, v in through.items()
        ),
        Check(f"{stem}:aligned pixels", share_of_pixels(frames, expected, P99_LEVELS), CHAIN_SHARE),
    ]


class NodeAlignment(NamedTuple):
    """What the graph's node computes between its inputs and the drawing."""

    weighting: str
    joints: Array
    targets: Array
    fit: CameraFit
    points: Points


def align_node(
    people: list[Array],
    driving: Points,
    reference: Points,
    size: tuple[int, int],
    *,
    scale_hands: bool = True,
    right_hand_first: bool = True,
) -> NodeAlignment:
    """Returns the node's alignment; a frame whose counts of persons differ is not shifted."""
    first = next(frame for frame in people if len(frame) and np.abs(frame[0]).sum() > 0)
    slots = openpose_joints(first[0])
    visible = reference["subset"][0, 0, :18] != -1
    chosen, weighting = choose_joints(visible, slots.sum(axis=1) != 0, "node")
    scale, camera = np.array([size[1], size[0]], np.float64), default_intrinsics(*size)
    joints = slots[list(chosen)]
    targets = (reference["candidate"][0, 0] * scale)[list(chosen)]
    weights = joint_weights(chosen, weighting)
    fit = solve_camera(joints, targets, weights, intrinsics=camera, size=size)
    persons = driving["candidate"].shape[1]
    overlay = align_overlay(
        Overlay(
            driving["candidate"][:, 0] * scale,
            driving["hands"] * scale,
            driving["faces"][:, 0] * scale,
            right_hand_first,
        ),
        np.stack([f[0] if len(f) == persons else np.zeros((24, 3)) for f in people]),
        camera,
        fit,
        face_scale=face_ratio(
            reference["faces"][0, 0] * scale, driving["faces"][0, 0] * scale, size=size
        ),
        scale_hands=scale_hands,
    )
    points = {
        "subset": driving["subset"],
        "candidate": (overlay.body / scale)[:, None],
        "faces": (overlay.face / scale)[:, None],
        "hands": overlay.hands / scale,
    }
    return NodeAlignment(weighting, joints, targets, fit, points)


def align_as_tracks(
    people: list[Array], driving: Points, reference: Points, size: tuple[int, int]
) -> tuple[Track, Points]:
    """Returns the same by way of `align_tracks` on a driving frame twice as large."""
    large = (2 * size[0], 2 * size[1])
    joints = np.stack([frame[0] if len(frame) else np.zeros((24, 3)) for frame in people])
    camera = default_intrinsics(*large).astype(np.float32)
    body = BodyTrack(joints.astype(np.float32), np.zeros(joints.shape[:2], np.float32), camera)
    track = Track(as_keypoints(driving, large), body, Fraction(24))
    options = AlignOptions(variant="node", guard=False)
    aligned, _ = align_tracks([track], as_keypoints(reference, size), size=size, options=options)
    pose = aligned[0].pose
    figure = to_node_figure(pose.keypoints, pose.scores, size=size, kp_score_thr=0)
    points = {
        "candidate": figure.body[:, None],
        "faces": figure.face[:, None],
        "hands": figure.hands,
    }
    return aligned[0], points


def as_keypoints(points: Points, size: tuple[int, int]) -> PoseTrack:
    """Returns the node's points as COCO-WholeBody-133; the neck is left out, feet are zeros."""
    frames = len(points["candidate"])
    found = np.zeros((frames, KEYPOINTS, 2))
    scores = np.ones((frames, KEYPOINTS), np.float32)
    for slot, (first, second) in enumerate(BODY_PAIRS[:18]):
        if first == second:
            found[:, first] = points["candidate"][:, 0, slot]
            scores[:, first] = points["subset"][:, 0, slot] != -1
    found[:, FACE] = points["faces"][:, 0]
    found[:, RIGHT_HAND], found[:, LEFT_HAND] = points["hands"][:, 0], points["hands"][:, 1]
    found = (found * [size[1], size[0]]).astype(np.float32)
    return PoseTrack(found, scores, np.zeros((frames, 4), np.float32), size)


def camera_error(joints: Array, ours: Array, expected: Array) -> float:
    """Returns the largest distance in pixels of joints projected by two cameras."""
    apart = project(joints, ours) - project(joints, expected)
    return float(np.linalg.norm(apart, axis=1).max())


def share_of_pixels(ours: Array, expected: Array, levels: float = 0.0) -> float:
    """Returns the share of pixels that differ by more than `levels` (inf: other shape)."""
    if ours.shape != expected.shape:
        return float("inf")
    wrong = np.abs(ours.astype(int) - expected.astype(int)).max(axis=-1) > levels
    return float(wrong.mean())


def points_of(arrays: Points, prefix: str) -> Points:
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)}


def numbered(arrays: Points, prefix: str) -> list[Array]:
    count = sum(key.startswith(prefix) for key in arrays)
    return [arrays[f"{prefix}{index}"] for index in range(count)]


def _solver_cases(golden: Golden) -> list[str]:
    cases = [k.removeprefix("in.").removesuffix(".p3") for k in golden.keys if k.endswith(".p3")]
    return sorted(case for case in cases if f"out.{case}.K" in golden.keys)


def _twin(golden: Golden, suffix: str) -> Golden:
    """Returns the other half of a golden that is stored as two files."""
    return Golden(golden.path.with_suffix(suffix), golden.roots)


REPLAYS = (replay_solver, replay_solver_notes)

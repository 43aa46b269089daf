"""Pose drawing against the references: capsules, overlay, keypoint conversion, and both together.

The whole-node and end-to-end files also hold detection and alignment. Drawing is replayed from the
stored intermediates (`mid.*`) alone, and once more after our own alignment (`pose_align.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np

from tests.parity.golden import Check, Golden, abs_max, exact
from tests.parity.pose_align import (
    CHAIN_SHARE,
    NODE_SHARE,
    P99_LEVELS,
    check_e2e_alignment,
    check_node_alignment,
    share_of_pixels,
)
from tests.parity.pose_body import check_bodies
from tests.parity.pose_detect import chain_checks
from xicon_infer.pose import cylinders, draw
from xicon_infer.pose.camera import default_intrinsics
from xicon_infer.pose.keypoints import Figure, to_node_figure, to_official_figure

Array = np.ndarray[Any, Any]

# Tolerances of the golden README.
OUTLINE_PX = 2.0
MEAN_LEVELS = 1.5
# The goldens were drawn by OpenCV 5.0; another version may differ in single pixels.
DRAW_SHARE = 0.0 if cv2.__version__.startswith("5.0") else 0.001


def replay_render3d(golden: Golden) -> list[Check] | None:
    if golden.kind != "npz" or not any(k.endswith(".rgba_taichi") for k in golden.keys):
        return None
    arrays, checks = golden.arrays, []
    for scene in _cases(golden, "in.", ".K"):
        expected = arrays[f"out.{scene}.rgba_taichi"]
        people = slots(_people(arrays, scene))
        palettes = palettes_of(people)
        rgba = cylinders.render_bodies(
            people,
            arrays[f"in.{scene}.K"],
            height=expected.shape[1],
            width=expected.shape[2],
            palettes=palettes,
        )
        name = f"{golden.path.stem}:{scene}"
        checks += picture_checks(name, rgba, expected)
        if f"mid.{scene}.cyl_start" in arrays:
            checks += _table_checks(name, people, palettes, arrays, scene)
    return checks


def replay_draw2d(golden: Golden) -> list[Check] | None:
    if golden.kind != "npz" or not any(k.endswith(".size_hw") for k in golden.keys):
        return None
    arrays, checks = golden.arrays, []
    for case in _cases(golden, "in.", ".size_hw"):
        height, width = (int(side) for side in arrays[f"in.{case}.size_hw"])
        points = {k: arrays[f"in.{case}.{k}"] for k in ("candidate", "subset", "hands", "faces")}
        for key in sorted(k for k in golden.keys if k.startswith(f"out.{case}.")):
            variant = key.rsplit(".", 1)[1]
            name = f"{golden.path.stem}:{case}:{variant}"
            picture = draw_variant(variant, points, height, width)
            if picture is None:
                checks.append(Check(name, float("nan"), DRAW_SHARE, skip="unknown variant"))
            else:
                checks.append(Check(name, share_of_pixels(picture, arrays[key]), DRAW_SHARE))
    return checks


def replay_keypoints(golden: Golden) -> list[Check] | None:
    if golden.kind != "safetensors" or "in.keypoints133" not in golden.keys:
        return None
    stored = {key: value.numpy() for key, value in golden.tensors.items()}
    points, scores = np.split(stored["in.keypoints133"], [2], axis=2)
    width, height = (int(side) for side in stored["in.size_wh"])
    size, scores = (height, width), scores[..., 0]
    node = to_node_figure(points, scores, size=size, kp_score_thr=0, carry_over=True)
    official = to_official_figure(points, scores, size=size)
    ours = {
        **{f"out.comfy.{name}": value for name, value in _as_lists(node).items()},
        **{f"out.official.{name}": value for name, value in _as_lists(official).items()},
    }
    return [
        Check(f"{golden.path.stem}:{key[4:]}", abs_max(ours[key], stored[key]), 1e-9)
        for key in sorted(k for k in stored if k.startswith("out."))
    ]


def replay_node_drawing(golden: Golden) -> list[Check] | None:
    cases = _cases(golden, "out.", ".frames") if golden.kind == "npz" else []
    if not cases or f"in.{cases[0]}.joints_0" not in golden.keys:
        return None
    arrays, checks = golden.arrays, []
    side = golden.path.with_suffix(".json")
    options = json.loads(side.read_text())["cases"] if side.exists() else {}
    for case in cases:
        expected = arrays[f"out.{case}.frames"]
        prefix = f"mid.{case}.dw_aligned"
        if f"{prefix}.candidate" not in arrays:
            prefix = f"in.{case}.dw"
        flags = options.get(case, {})
        frames, outline = draw_node(
            _people(arrays, case),
            arrays.get(f"mid.{case}.K"),
            {k.rsplit(".", 1)[1]: v for k, v in arrays.items() if k.startswith(f"{prefix}.")},
            expected.shape[1:3],
            draw_face=flags.get("draw_face", True),
            draw_hands=flags.get("draw_hands", True),
        )
        name = f"{golden.path.stem}:{case}"
        wrong = (outline != (arrays[f"out.{case}.mask"] > 0)).sum(axis=(1, 2)).max()
        checks.append(Check(f"{name}:drawn outline px", float(wrong), OUTLINE_PX))
        share = share_of_pixels(frames, expected, P99_LEVELS)
        checks.append(Check(f"{name}:drawn pixels", share, NODE_SHARE))
    return checks + check_node_alignment(golden, draw_node)


def replay_node_options(golden: Golden) -> list[Check] | None:
    """Returns one check: the options beside a whole-node file fit its pictures."""
    twin = golden.path.with_suffix(".npz")
    if golden.kind != "json" or not twin.exists() or "size_wh" not in golden.json:
        return None
    pictures = Golden(twin, golden.roots)
    cases = _cases(pictures, "out.", ".frames")
    sizes = {pictures.arrays[f"out.{case}.frames"].shape[2:0:-1] for case in cases}
    said = (sorted(golden.json["cases"]), {tuple(golden.json["size_wh"])})
    return [Check(f"{golden.path.stem}:json fits pictures", exact(said, (cases, sizes)), 0.0)]


def replay_chain_drawing(golden: Golden) -> list[Check] | None:
    if golden.kind != "npz" or "out.frames_unaligned" not in golden.keys:
        return None
    arrays = golden.arrays
    expected = arrays["out.frames_unaligned"]
    people = [arrays[f"mid.nlf_joints_{index}"] for index in range(len(expected))]
    points = {k: arrays[f"mid.dw.{k}"] for k in ("candidate", "subset", "hands", "faces")}
    frames, _ = draw_node(people, None, points, expected.shape[1:3])
    share = share_of_pixels(frames, expected, P99_LEVELS)
    drawn = Check(f"{golden.path.stem}:unaligned drawn pixels", share, CHAIN_SHARE)
    found = [*check_bodies(golden), *chain_checks(golden)]
    return [drawn, *check_e2e_alignment(golden, draw_node), *found]


def draw_node(
    people: list[Array],
    camera: Array | None,
    points: dict[str, Array],
    size: tuple[int, ...],
    *,
    draw_face: bool = True,
    draw_hands: bool = True,
) -> tuple[Array, Array]:
    """Returns what the graph's node draws, uint8 [F, H, W, 3], and the outline of the bodies."""
    height, width = size
    camera = default_intrinsics(height, width) if camera is None else camera
    people = slots(people)
    rgba = cylinders.render_bodies(
        people, camera, height=height, width=width, palettes=palettes_of(people)
    )
    frames = rgba[..., :3].copy()
    for index in range(len(frames) if points else 0):
        figure = _figure({name: value[index] for name, value in points.items()}, height, width)
        overlay = draw.draw_overlay(
            figure, 0, height=height, width=width, draw_face=draw_face, draw_hands=draw_hands
        )
        draw.composite(frames[index], overlay)
    return frames, rgba[..., 3] > 0


def draw_variant(variant: str, points: dict[str, Array], height: int, width: int) -> Array | None:
    """Returns one of the references' drawings, persons added as uint8; None if unknown."""
    parts = {
        "scail_overlay": ("head", "hands", "face"),
        "cheek_only": ("head",),
        "hands_only": ("hands",),
        "face_only": ("face",),
        "body_hands_face": ("body", "hands", "face"),
    }.get(variant)
    if parts is None:
        return None
    total = np.zeros((height, width, 3), np.uint8)
    for figure in _figure(points, height, width):
        canvas = np.zeros_like(total)
        if "body" in parts:
            draw.paint_body(canvas, figure.body[0], figure.body_visible[0])
        if "head" in parts:
            draw.paint_head(canvas, figure.body[0], figure.body_visible[0])
        if "hands" in parts:
            draw.paint_hands(canvas, figure.hands[0])
        if "face" in parts:
            draw.paint_face(canvas, figure.face[0])
        total += canvas
    return total


def slots(people: list[Array]) -> list[Array]:
    """Returns the persons of each frame in fixed slots, if the first frame shows several.

    The reference's rule: each person of the frame before, in turn, takes the nearest pelvis left.
    """
    if len(people[0]) < 2:
        return people
    most = max(len(frame) for frame in people)
    ordered = [_padded(people[0], most)]
    for frame in people[1:]:
        row, free = np.zeros((most, 24, 3), np.float32), list(range(len(frame)))
        # An empty slot of the first frame is skipped by the reference; later ones are zeros.
        known = len(people[0]) if len(ordered) == 1 else most
        for slot in range(known):
            if free:
                pelvis = ordered[-1][slot, 0]
                nearest = min(free, key=lambda k: float(np.linalg.norm(pelvis - frame[k, 0])))
                row[slot] = frame[nearest]
                free.remove(nearest)
        ordered.append(row)
    return ordered


def palettes_of(people: list[Array]) -> tuple[Any, ...]:
    return ("saturated", "pale") if len(people[0]) > 1 else ("single",)


def picture_checks(name: str, ours: Array, expected: Array) -> list[Check]:
    outlines, means, p99s = [0.0], [0.0], [0.0]
    for a, e in zip(ours, expected, strict=True):
        outlines.append(float(((a[..., 3] > 0) != (e[..., 3] > 0)).sum()))
        covered = (a[..., 3] > 0) & (e[..., 3] > 0)
        if covered.any():
            levels = np.abs(a.astype(int) - e.astype(int))[covered][:, :3]
            means.append(float(levels.mean()))
            p99s.append(float(np.percentile(levels, 99)))
    return [
        Check(f"{name}:outline px", max(outlines), OUTLINE_PX),
        Check(f"{name}:mean levels", max(means), MEAN_LEVELS),
        Check(f"{name}:p99 levels", max(p99s), P99_LEVELS),
    ]


def _table_checks(
    name: str, people: list[Array], palettes: tuple[Any, ...], arrays: dict[str, Array], scene: str
) -> list[Check]:
    """Returns checks of the first frame's capsules, those present in order."""
    table = cylinders.build_capsules(people, palettes)
    there = table.present[0]
    ours = {
        "cyl_start": table.start[0][there],
        "cyl_end": table.end[0][there],
        "cyl_rgba": table.color[there],
    }
    return [
        Check(f"{name}:{key}", abs_max(value, arrays[f"mid.{scene}.{key}"]), 0.0)
        for key, value in ours.items()
    ]


def _figure(points: dict[str, Array], height: int, width: int) -> list[Figure]:
    """Returns one figure of one frame per person, in pixels."""
    scale = np.array([width, height], np.float64)
    persons = len(points["candidate"])
    hands = points["hands"].reshape(-1, 2, 21, 2)
    return [
        Figure(
            body=points["candidate"][p : p + 1] * scale,
            body_visible=points["subset"][p : p + 1] != -1,
            hands=hands[p : p + 1] * scale,
            face=points["faces"][p : p + 1] * scale,
            body_scores=np.ones((1, 18)),
            hand_scores=np.ones((1, 2, 21)),
            face_scores=np.ones((1, 68)),
        )
        for p in range(persons)
    ]


def _as_lists(figure: Figure) -> dict[str, Array]:
    """Returns the figure as the references name and shape it, one person."""
    joints = np.arange(figure.body.shape[1], dtype=np.float64)
    return {
        "candidate": figure.body[:, None],
        "subset": np.where(figure.body_visible, joints, -1.0)[:, None],
        "hands": figure.hands,
        "faces": figure.face[:, None],
        "body_score": figure.body_scores[:, None],
        "hand_score": figure.hand_scores,
        "face_score": figure.face_scores[:, None],
    }


def _people(arrays: dict[str, Array], case: str) -> list[Array]:
    prefix = f"in.{case}.joints_"
    count = sum(key.startswith(prefix) for key in arrays)
    return [arrays[f"{prefix}{index}"] for index in range(count)]


def _padded(frame: Array, persons: int) -> Array:
    row = np.zeros((persons, 24, 3), np.float32)
    row[: len(frame)] = frame
    return row


def _cases(golden: Golden, start: str, end: str) -> list[str]:
    found: Iterable[str] = (k for k in golden.keys if k.startswith(start) and k.endswith(end))
    return sorted(key.removeprefix(start).removesuffix(end) for key in found)


REPLAYS = (
    replay_render3d,
    replay_draw2d,
    replay_keypoints,
    replay_node_drawing,
    replay_node_options,
    replay_chain_drawing,
)

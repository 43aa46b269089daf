"""SteadyDancer's pose preprocessing against the authors' program, detections to pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from tests.parity.golden import Check, Golden, abs_max
from xicon_infer.pose.dancer_align import DancerAlignment, apply_alignment, measure
from xicon_infer.pose.dancer_draw import CANVAS_SCALE, draw_dancer
from xicon_infer.pose.dancer_negative import negative_draws, stretch_about_neck
from xicon_infer.pose.dancer_points import first_person, join, rows, to_dancer_figure
from xicon_infer.pose.keypoints import Figure
from xicon_infer.pose.yolox import select_persons

Array = np.ndarray[Any, Any]

POINTS = 1e-6
SCALES = 1e-9
_CASE = {"align_args", "aligned", "augmented", "dwpose_frames", "input", "aug_seed"}
_FRAMES = {"positive_canvas", "negative_canvas", "with_face_canvas"}
_COLOURS = {"positive_rgb": "aligned", "negative_rgb": "augmented"}
_PARTS = ("candidate", "subset", "hands", "faces")


def replay_case(golden: Golden) -> list[Check] | None:
    if (
        golden.kind != "json"
        or not isinstance(golden.json, dict)
        or not golden.json.keys() >= _CASE
    ):
        return None
    told, name = golden.json, golden.path.stem
    reference = persons_of(told["input"]["ref"], told["canvas_wh"])
    frames = [persons_of(entry, told["vid_size_wh"]) for entry in told["input"]["frames"]]
    checks = _conversion_checks(name, frames, told["dwpose_frames"])
    driver = join([first_person(persons) for persons in frames])
    alignment = measure(
        first_person(reference),
        rows(driver, [0]),
        driving_ratio=told["vid_size_wh"][0] / told["vid_size_wh"][1],
        canvas_ratio=told["canvas_wh"][0] / told["canvas_wh"][1],
        mode="official",
    )
    checks += _alignment_checks(name, alignment, told)
    aligned = apply_alignment(driver, alignment)
    draws = negative_draws(len(frames), told["aug_seed"])
    checks.append(Check(f"{name}:draws", abs_max(draws, told["aug_draws"]), 0.0))
    augmented = stretch_about_neck(aligned, draws, mode="official")
    for stage, figure in (("aligned", aligned), ("augmented", augmented)):
        expected = figure_of(told[stage])
        for part in ("body", "hands", "face"):
            error = abs_max(getattr(figure, part), getattr(expected, part))
            checks.append(Check(f"{name}:{stage} {part}", error, POINTS))
        wrong = float((figure.body_visible != expected.body_visible).sum())
        checks.append(Check(f"{name}:{stage} visible", wrong, 0.0))
    return checks + _picture_checks(golden)


def replay_frames(golden: Golden) -> list[Check] | None:
    if golden.kind != "npz" or not golden.keys >= _FRAMES:
        return None
    arrays, name = golden.arrays, golden.path.stem
    told = _case_of(golden)
    if told is None:
        return [Check(name, float("nan"), 0.0, skip="its case is not beside it")]
    drawn = {
        "positive_canvas": ("aligned", False),
        "negative_canvas": ("augmented", False),
        "with_face_canvas": ("aligned", True),
        **{key: (stage, False) for key, stage in _COLOURS.items()},
    }
    checks = []
    for key, (stage, draw_face) in drawn.items():
        if key not in arrays:
            continue
        expected = arrays[key]
        figure = figure_of(told[stage])
        ours = [
            draw_dancer([figure], i, size=expected.shape[1:3], draw_face=draw_face)
            for i in range(len(expected))
        ]
        pictures = np.stack(ours)
        if key not in _COLOURS:
            pictures = pictures[..., ::-1]
        checks.append(Check(f"{name}:{key}", _different(pictures, expected), 0.0))
    return checks


def persons_of(entry: dict[str, Any], size_wh: list[int]) -> Figure:
    """Returns the persons that are left of the detections of a frame, one row each.

    Without any the whole picture is the box, as the authors have it.
    """
    people = entry["people"]
    boxes = np.array([person["bbox"] for person in people], np.float64).reshape(-1, 4)
    kept = select_persons(
        boxes * np.tile(np.asarray(size_wh, np.float64), 2),
        np.array([person["det_score"] for person in people], np.float64),
        np.array([person["label"] for person in people], np.int64),
    )
    chosen = [people[row] for row in kept] or [entry["whole_image_person"]]
    keypoints = np.array([person["keypoints"] for person in chosen], np.float64)
    return to_dancer_figure(keypoints, np.array([person["scores"] for person in chosen]))


def figure_of(frames: list[dict[str, Any]]) -> Figure:
    """Returns stored frames of one person as a figure; its scores are unknown."""
    body, subset, hands, faces = (
        np.array([frame[part] for frame in frames], np.float64) for part in _PARTS
    )
    return Figure(
        body=body,
        body_visible=subset[:, 0] != -1,
        hands=hands,
        face=faces[:, 0],
        body_scores=np.zeros(body.shape[:2]),
        hand_scores=np.zeros(hands.shape[:3]),
        face_scores=np.zeros(faces.shape[:1] + faces.shape[2:3]),
    )


def _conversion_checks(
    name: str, frames: list[Figure], stored: list[dict[str, Any]]
) -> list[Check]:
    """Returns the checks of all persons of all frames before alignment."""
    worst = dict.fromkeys(_PARTS, 0.0)
    for persons, expected in zip(frames, stored, strict=True):
        joints = persons.body.shape[1]
        number = np.arange(persons.body_visible.size).reshape(-1, joints)
        ours = {
            "candidate": persons.body.reshape(-1, 2),
            "subset": np.where(persons.body_visible, number, -1),
            "hands": np.concatenate([persons.hands[:, 0], persons.hands[:, 1]]),
            "faces": persons.face,
        }
        for part, value in ours.items():
            worst[part] = max(worst[part], abs_max(value, expected[part]))
    return [Check(f"{name}:converted {part}", error, POINTS) for part, error in worst.items()]


def _alignment_checks(name: str, alignment: DancerAlignment, told: dict[str, Any]) -> list[Check]:
    checks = []
    for key, expected in told["align_args"].items():
        ours = alignment.scales[key.removeprefix("scale_")]
        error = 0.0 if ours == expected else abs(ours - expected) / abs(expected)
        checks.append(Check(f"{name}:{key}", error, SCALES))
    error = abs_max(alignment.offset, told["offset"])
    return [*checks, Check(f"{name}:offset", error, POINTS)]


def _picture_checks(golden: Golden) -> list[Check]:
    """Returns the checks of the pictures of frame 0 that lie beside a case."""
    told, checks = golden.json, []
    for path in sorted(golden.path.parent.glob(f"{golden.path.stem}_*tive_0*.png")):
        with Image.open(path) as picture:
            expected = np.asarray(picture.convert("RGB"))
        stage = "augmented" if "_negative_" in path.stem else "aligned"
        figure, (height, width) = figure_of(told[stage]), expected.shape[:2]
        ours = draw_dancer([figure], 0, size=(height, width))
        checks.append(Check(path.stem, _different(ours, expected), 0.0))
        if [width, height] == told["size_2x_wh"]:
            doubled = [CANVAS_SCALE * side for side in told["canvas_wh"]]
            checks.append(Check(f"{path.stem}:size", abs_max(doubled, [width, height]), 0.0))
    return checks


def _case_of(golden: Golden) -> Any:
    """Returns the case whose figures these frames show: of those beside it the nearest picture."""
    stored = golden.arrays["positive_canvas"]
    found = []
    for path in sorted(golden.path.parent.glob("*.json")):
        told = Golden(path, golden.roots).json
        if isinstance(told, dict) and told.keys() >= _CASE and len(told["aligned"]) == len(stored):
            first = draw_dancer([figure_of(told["aligned"])], 0, size=stored.shape[1:3])
            found.append((_different(first[..., ::-1], stored[0]), path.name, told))
    return min(found, key=lambda entry: entry[:2])[2] if found else None


def _different(ours: Array, expected: Array) -> float:
    """Returns the share of pixels that are not equal (inf if the shapes differ)."""
    if ours.shape != expected.shape:
        return float("inf")
    return float((ours != expected).any(axis=-1).mean())


REPLAYS = (replay_case, replay_frames)

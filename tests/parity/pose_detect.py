"""Person detection and keypoints against the references, and on networks with known answers.

The contract networks are not trained: one finds frames drawn in key colours, the other finds dots,
one colour per keypoint. What they should answer is known from what is drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.parity.golden import Check, Golden, abs_max, exact
from xicon_infer.pose.detector import YoloDetector, reference_box
from xicon_infer.pose.keypoints import to_node_figure
from xicon_infer.pose.observations import Boxes
from xicon_infer.pose.onnx_model import open_model
from xicon_infer.pose.vitpose import HEATMAP_WIDTH, VitPose, crop_geometry, cut_crops
from xicon_infer.pose.vitpose_decode import decode_heatmaps

Array = np.ndarray[Any, Any]

# Tolerances of the golden README.
GEOMETRY_PX = 1e-9
INPUT_ABS = 5e-5
STATS_ABS = 1e-4
POINT_PX = 1e-3
NOISE_PX = 0.2
POINT_SHARE = 2e-3
BOX_PX = 3.0
DOT_MEAN_PX = 1.3
DOT_MAX_PX = 2.5
ABSENT_SCORE = 0.05
# Uniform noise has a mean of half its peak, a map with peaks one near zero.
NOISE_MEAN_SHARE = 0.25

CPU = torch.device("cpu")
SHIPPED = Path(__file__).parents[1] / "golden" / "scail_pose"
GREY = 128
EDGE_PX = 4
# Width and height of frames, and x1 y1 x2 y2 of the person, the second person and the other thing.
SCENES: tuple[tuple[tuple[int, int], tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...] = (
    ((512, 896), (60, 80, 450, 780), (8, 810, 90, 890), (300, 800, 420, 880)),
    ((896, 512), (250, 20, 530, 500), (600, 100, 800, 500), (20, 60, 200, 300)),
    ((1280, 720), (100, 30, 480, 700), (700, 60, 1000, 690), (1050, 200, 1240, 600)),
)
# Keypoints whose dots are left out.
_ABSENT = (17, 60, 110)


def replay_yolo_select(golden: Golden) -> list[Check] | None:
    if golden.kind != "json" or not isinstance(golden.json, list):
        return None
    cases = golden.json
    if not cases or not all("rows_xyxy_score_class_in_640" in dict(c) for c in cases):
        return None
    checks = []
    for case in cases:
        rows = np.array(case["rows_xyxy_score_class_in_640"], np.float32).reshape(-1, 6)
        box = reference_box(rows, tuple(case["image_hw"])).tolist()
        name = f"{golden.path.stem}:{case['name']}"
        checks.append(Check(name, abs_max(box, case["chosen_xyxy_score"]), 0.0))
    return checks


def replay_vitpose_crop(golden: Golden) -> list[Check] | None:
    if golden.kind != "safetensors" or not {"in.boxes_xyxy", "out.crop_rect_xywh"} <= golden.keys:
        return None
    stored = golden.tensors
    crops = crop_geometry(stored["in.boxes_xyxy"].numpy())
    frames = stored["in.image"][None]
    which = torch.zeros(len(crops.centers), dtype=torch.int64)
    inputs = cut_crops(frames, which, crops.rects_xywh)
    flat = inputs.double().flatten(1)
    stats = torch.stack(
        [flat.mean(1), flat.std(1, correction=0), flat.amin(1), flat.amax(1)], dim=1
    )
    stem = golden.path.stem
    rects = torch.from_numpy(crops.rects_xywh)
    checks = [
        Check(f"{stem}:center", abs_max(crops.centers, stored["out.center"]), GEOMETRY_PX),
        Check(f"{stem}:scale", abs_max(crops.sizes / 200, stored["out.scale"]), GEOMETRY_PX),
        Check(f"{stem}:rectangle", exact(rects, stored["out.crop_rect_xywh"]), 0.0),
        Check(f"{stem}:stats", abs_max(stats, stored["out.input_stats"]), STATS_ABS),
    ]
    for key in sorted(k for k in golden.keys if k.startswith("out.input_")):
        index = key.removeprefix("out.input_")
        if index.isdigit():
            error = abs_max(inputs[int(index)], stored[key])
            checks.append(Check(f"{stem}:input_{index}", error, INPUT_ABS))
    return checks


def replay_vitpose_decode(golden: Golden) -> list[Check] | None:
    if golden.kind != "safetensors":
        return None
    cases = sorted(k.split(".")[1] for k in golden.keys if k.endswith(".heatmaps"))
    if not cases:
        return None
    stored, checks = golden.tensors, []
    for case in cases:
        maps = stored[f"in.{case}.heatmaps"]
        points, scores = decode_heatmaps(
            maps, stored[f"in.{case}.center"], stored[f"in.{case}.scale"] * 200
        )
        expected = stored[f"out.{case}.keypoints"]
        error = (points.double() - expected[..., :2].double()).abs().amax(dim=2)
        noise = _is_noise(maps)
        name = f"{golden.path.stem}:{case}"
        checks.append(Check(f"{name}:points", _largest(error[~noise]), POINT_PX))
        if noise.any():
            checks.append(Check(f"{name}:noise", _largest(error[noise]), NOISE_PX))
        checks.append(Check(f"{name}:scores", abs_max(scores, expected[..., 2]), 1e-6))
    return checks


def replay_contract_colours(golden: Golden) -> list[Check] | None:
    if golden.kind != "json" or not isinstance(golden.json, dict):
        return None
    if "vitpose_keypoint_rgb_uint8" not in golden.json:
        return None
    networks = contract_networks(golden.path.parent)
    stem = golden.path.stem
    if len(networks) < 2:
        reason = "the contract networks are not beside it"
        return [Check(stem, float("nan"), 0.0, skip=reason)]
    detector, vitpose = YoloDetector(networks[640], CPU), VitPose(networks[256], CPU)
    checks = []
    for (width, height), *boxes in SCENES:
        name = f"{stem}:{width}x{height}"
        frames, dots = draw_scene(golden.json, (width, height), boxes)
        keys = golden.json["person_key_colours"]
        found = detector.detect(frames[:1])[0]
        checks += _box_checks(name, found, boxes, list(keys.values()))
        points, scores = vitpose.estimate(frames, [1], np.array(boxes[:1], np.float32))
        checks += _dot_checks(name, points[0], scores[0], dots)
    return checks


def chain_checks(golden: Golden) -> list[Check]:
    """Returns checks of the boxes and 2-D points of an end-to-end file of the seed graph.

    The contract networks lie beside the file, or travel with the tests.
    """
    networks, arrays, name = contract_networks(golden.path.parent), golden.arrays, golden.path.stem
    detector = YoloDetector(networks[640], CPU, select="reference")
    vitpose = VitPose(networks[256], CPU)
    checks = []
    for source, frames in (("dw", arrays["in.frames"]), ("ref", arrays["in.ref"][None])):
        found = detector.detect(frames)
        bboxes = np.concatenate([boxes.bboxes for boxes in found])
        if source == "dw":
            scores = np.concatenate([boxes.scores for boxes in found])[:, None]
            expected = arrays["mid.yolo_boxes"].clip([-np.inf] * 4 + [0])
            error = abs_max(np.hstack([bboxes, scores]), expected.astype(np.float32))
            checks.append(Check(f"{name}:boxes", error, 0.0))
        points, scores = vitpose.estimate(frames, range(len(frames)), bboxes)
        size = frames.shape[1:3]
        figure = to_node_figure(points, scores, size=size, kp_score_thr=0, carry_over=True)
        seen = arrays[f"mid.{source}.subset"].reshape(figure.body_visible.shape) >= 0
        wrong = float((seen != figure.body_visible).sum())
        checks.append(Check(f"{name}:{source}.visible", wrong, 0.0))
        parts = {"candidate": figure.body, "faces": figure.face, "hands": figure.hands}
        for part, ours in parts.items():
            expected = arrays[f"mid.{source}.{part}"].reshape(ours.shape)
            check = Check(f"{name}:{source}.{part}", abs_max(ours, expected), POINT_SHARE)
            checks.append(check)
    return checks


def contract_networks(folder: Path) -> dict[int, Path]:
    """Returns the ONNX files of a folder by the height of their input: 640 boxes, 256 points.

    A folder without any gets those that travel with the tests.
    """
    files = sorted(folder.glob("*.onnx")) or sorted(SHIPPED.glob("*.onnx"))
    found = {open_model(path, CPU).input.shape[2]: path for path in files}
    return {side: path for side, path in found.items() if isinstance(side, int)}


def draw_scene(
    colours: dict[str, Any], size_wh: tuple[int, int], boxes: list[tuple[int, ...]]
) -> tuple[Array, Array]:
    """Returns two frames uint8 [2, H, W, 3] and the places of the dots [133, 2].

    Frame 0 has frames in the key colours around the boxes, frame 1 the dots in the first box.
    """
    frames = np.full((2, size_wh[1], size_wh[0], 3), GREY, np.uint8)
    keys = colours["person_key_colours"].values()
    for (x1, y1, x2, y2), key in zip(boxes, keys, strict=True):
        frames[0, y1:y2, x1:x2] = key["rgb"]
        frames[0, y1 + EDGE_PX : y2 - EDGE_PX, x1 + EDGE_PX : x2 - EDGE_PX] = GREY
    palette = colours["vitpose_keypoint_rgb_uint8"]
    x1, y1, x2, y2 = boxes[0]
    radius = 0.9 * 1.25 * max(x2 - x1, 0.75 * (y2 - y1)) / HEATMAP_WIDTH
    columns = 11
    rows = -(-len(palette) // columns)
    number = np.arange(len(palette))
    dots = np.stack(
        [
            x1 + (x2 - x1) * (number % columns + 0.5) / columns,
            y1 + (y2 - y1) * (number // columns + 0.5) / rows,
        ],
        axis=1,
    )
    dots += np.random.default_rng(0).uniform(-2, 2, dots.shape)
    y, x = np.mgrid[: size_wh[1], : size_wh[0]]
    for index, ((cx, cy), colour) in enumerate(zip(dots, palette, strict=True)):
        if index not in _ABSENT:
            frames[1][(x - cx) ** 2 + (y - cy) ** 2 <= radius**2] = colour
    return frames, dots


def _box_checks(
    name: str, found: Boxes, boxes: list[tuple[int, ...]], keys: list[dict[str, Any]]
) -> list[Check]:
    """Returns checks that exactly the boxes of class 0 were found, best first."""
    people = [i for i, key in enumerate(keys) if key["cls"] == 0]
    people.sort(key=lambda i: -keys[i]["score"])
    return [
        Check(f"{name}:boxes", abs_max(found.bboxes, [boxes[i] for i in people]), BOX_PX),
        Check(f"{name}:scores", abs_max(found.scores, [keys[i]["score"] for i in people]), 1e-6),
    ]


def _dot_checks(name: str, points: Array, scores: Array, dots: Array) -> list[Check]:
    there = np.ones(len(dots), bool)
    there[list(_ABSENT)] = False
    error = np.hypot(*(points - dots)[there].T)
    return [
        Check(f"{name}:dots mean", float(error.mean()), DOT_MEAN_PX),
        Check(f"{name}:dots max", float(error.max()), DOT_MAX_PX),
        Check(f"{name}:dots unseen", float((scores[there] < 0.3).mean()), 0.0),
        Check(f"{name}:absent score", float(scores[~there].max()), ABSENT_SCORE),
    ]


def _is_noise(heatmaps: torch.Tensor) -> torch.Tensor:
    mean, peak = heatmaps.mean(dim=(2, 3)), heatmaps.amax(dim=(2, 3))
    return (peak > 0) & (mean > NOISE_MEAN_SHARE * peak)


def _largest(errors: torch.Tensor) -> float:
    return float(errors.max()) if errors.numel() else 0.0


REPLAYS = (
    replay_yolo_select,
    replay_vitpose_crop,
    replay_vitpose_decode,
    replay_contract_colours,
)

"""The networks' part of the whole chain: contract networks on stored frames, to stored points."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.parity.golden import Check, Golden, abs_max
from xicon_infer.pose.detector import YoloDetector
from xicon_infer.pose.keypoints import to_node_figure
from xicon_infer.pose.vitpose import VitPose

POINT_SHARE = 2e-3
"""Of the frame's size, as the golden's README allows."""


def check_networks(golden: Golden) -> list[Check]:
    """Returns the boxes and points of the chain, found by the contract networks beside the file."""
    found = {name: _network(golden, name) for name in ("yolov10", "vitpose")}
    if not all(found.values()):
        return [
            Check(
                f"{golden.path.stem}:networks", np.nan, 0.0, skip="no contract networks beside it"
            )
        ]
    cpu = torch.device("cpu")
    detector = YoloDetector(Path(found["yolov10"]), cpu, select="reference")
    keypoints = VitPose(Path(found["vitpose"]), cpu)
    checks = []
    for what, frames in (
        ("dw", golden.arrays["in.frames"]),
        ("ref", golden.arrays["in.ref"][None]),
    ):
        boxes = detector.detect(frames)
        bboxes = np.concatenate([box.bboxes for box in boxes])
        if what == "dw":
            expected = golden.arrays["mid.yolo_boxes"]
            missing = expected[:, 4] < 0
            error = abs_max(bboxes[~missing], expected[~missing, :4])
            checks.append(Check(f"{golden.path.stem}:boxes", error, 0.0))
        points, scores = keypoints.estimate(frames, list(range(len(frames))), bboxes)
        figure = to_node_figure(
            points, scores, size=frames.shape[1:3], kp_score_thr=0, carry_over=True
        )
        stored = {name: golden.arrays[f"mid.{what}.{name}"] for name in ("candidate", "subset")}
        error = abs_max(figure.body, stored["candidate"][:, 0])
        checks.append(Check(f"{golden.path.stem}:{what} points", error, POINT_SHARE))
        seen = stored["subset"][:, 0] >= 0
        wrong = float((figure.body_visible != seen).sum())
        checks.append(Check(f"{golden.path.stem}:{what} visible points", wrong, 0.0))
        shown = seen.any(axis=1)
        for name, mine, theirs in (
            ("hands", figure.hands, golden.arrays[f"mid.{what}.hands"]),
            ("faces", figure.face[:, None], golden.arrays[f"mid.{what}.faces"]),
        ):
            error = abs_max(mine[shown], theirs[shown])
            checks.append(Check(f"{golden.path.stem}:{what} {name}", error, POINT_SHARE))
    return checks


def _network(golden: Golden, name: str) -> Path | None:
    """Returns a contract network: beside the file, or below a root."""
    for folder in (golden.path.parent, *golden.roots):
        for path in sorted(folder.rglob(f"{name}*.onnx")) if folder.is_dir() else ():
            return path
    return None

"""3-D bodies against the end-to-end file: the stand-in of the network on its stored frames.

The reference ran the network with its own detector on whole frames. Both ways of asking must give
its joints: with boxes, which are read off the key colours of the frames, and without. A file is
replayed once, so `check_bodies` is called by the replay that takes it, for the drawing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.parity.golden import Check, Golden
from xicon_infer.pose.nlf import Nlf
from xicon_infer.pose.observations import Bodies, Boxes

Array = np.ndarray[Any, Any]

MODEL = "nlf_contract.torchscript"
# The same TorchScript made the numbers; only the order of float32 operations may differ.
JOINTS_REL = 1e-5
# Its key colours, R G B of the first and of the second person: bright is over 191, dark below 64.
KEY_COLOURS = ((True, False, True), (False, True, True))


def check_bodies(golden: Golden) -> list[Check]:
    """Returns checks of `mid.nlf_joints_t` from `in.frames`; none if the file has neither."""
    if not {"in.frames", "mid.nlf_joints_0"} <= golden.keys:
        return []
    stem, arrays = golden.path.stem, golden.arrays
    path = find_model(golden)
    if path is None:
        return [Check(f"{stem}:nlf joints", float("nan"), JOINTS_REL, skip=f"no {MODEL}")]
    frames = arrays["in.frames"]
    expected = [arrays[f"mid.nlf_joints_{index}"] for index in range(len(frames))]
    coloured = [key_boxes(frame) for frame in frames]
    checks = []
    for own_detector in (False, True):
        nlf = Nlf(path, torch.device("cpu"), own_detector=own_detector)
        bodies = nlf.estimate(frames, coloured, None)
        way = "own detector" if own_detector else "given boxes"
        checks.append(Check(f"{stem}:nlf {way}", worst(bodies, expected), JOINTS_REL))
    if "mid.yolo_boxes" in arrays:
        bodies = nlf.estimate(frames, stored_boxes(arrays["mid.yolo_boxes"]), None)
        error = worst_chosen(bodies, expected)
        checks.append(Check(f"{stem}:nlf matched to boxes", error, JOINTS_REL))
    return checks


def find_model(golden: Golden) -> Path | None:
    """Returns the stand-in: beside the golden, below a root, or with the tests."""
    folders = (golden.path.parent, *golden.roots, Path(__file__).parents[1] / "golden")
    return next((path for folder in folders for path in sorted(folder.rglob(MODEL))), None)


def key_boxes(frame: Array) -> Boxes:
    """Returns the boxes of the key colours in a frame [H, W, 3], exact to the pixel."""
    found = []
    for colour in KEY_COLOURS:
        fits = [
            frame[..., k] > 0.75 * 255 if bright else frame[..., k] < 0.25 * 255
            for k, bright in enumerate(colour)
        ]
        rows, columns = np.nonzero(np.logical_and.reduce(fits))
        if len(rows):
            found.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    boxes = np.array(found, np.float32).reshape(-1, 4)
    return Boxes(boxes, np.ones(len(boxes), np.float32), (-1,) * len(boxes))


def stored_boxes(rows: Array) -> list[Boxes]:
    """Returns the detector's boxes, [F, 5] with a negative score where nobody was found."""
    return [
        Boxes(kept[:, :4].astype(np.float32), kept[:, 4].astype(np.float32), (-1,) * len(kept))
        for kept in (row[None][row[None, 4] >= 0] for row in rows)
    ]


def worst(bodies: list[Bodies], expected: list[Array]) -> float:
    """Returns the largest difference as a share of the largest number (inf: other persons)."""
    if [b.joints.shape for b in bodies] != [e.shape for e in expected]:
        return float("inf")
    ours, theirs = (np.concatenate(part) for part in ([b.joints for b in bodies], expected))
    return float(np.abs(ours - theirs).max(initial=0.0) / np.abs(theirs).max(initial=1e-30))


def worst_chosen(bodies: list[Bodies], expected: list[Array]) -> float:
    """Returns the same where a body may be any of the frame's, as the detector chose it."""
    errors = [0.0]
    for body, theirs in zip(bodies, expected, strict=True):
        # Where the reference found nobody, nothing may be found here: zeros.
        others = theirs if len(theirs) else np.zeros((1, 24, 3), np.float32)
        scale = max(float(np.abs(others).max()), 1.0)
        away = np.abs(body.joints[:, None] - others[None]).max(axis=(2, 3))
        errors += (away.min(axis=1) / scale).tolist()
    return max(errors)


REPLAYS = ()

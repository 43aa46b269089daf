"""What the pose networks saw, kept on disk by the content of the video and the settings.

The networks cost far more than everything after them; who is animated, smoothing and alignment
can then be tried without running them again. A file that cannot be read is made anew.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from xicon_infer.media.write import atomic_path
from xicon_infer.pose.observations import Bodies, Boxes, Observation

FORMAT = 1
"""Raised whenever the arrays or the networks' handling change."""

_CHUNK_BYTES = 2**20
_HEAD_BYTES = 2**20
"""Of a model file: its head, tail and size tell files apart without reading gigabytes."""


def cache_key(video: Path, settings: Mapping[str, object], models: Mapping[str, Path]) -> str:
    """Returns the name of the entry: a hash over the video's bytes, the settings and the models.

    Args:
        video: read whole.
        settings: JSON-able values that change what is seen.
        models: name -> file; told apart by size, head and tail.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, settings], sort_keys=True, default=str).encode())
    with video.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    for name in sorted(models):
        path = models[name]
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            file.seek(max(0, size - _HEAD_BYTES))
            digest.update(f"{name} {size}".encode() + head + file.read(_HEAD_BYTES))
    return digest.hexdigest()


def load_observations(folder: Path, key: str) -> list[Observation] | None:
    """Returns the entry, or None if there is none that can be read."""
    path = folder / f"{key}.npz"
    try:
        # Opened here, because np.load leaves a damaged file open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            counts = file["counts"]
            parts = {name: file[name] for name in _ARRAYS}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        return None
    ends = np.cumsum(counts)[:-1]
    split = {name: np.split(values, ends) for name, values in parts.items()}
    return [
        Observation(
            Boxes(split["bboxes"][i], split["box_scores"][i], tuple(split["ids"][i].tolist())),
            split["keypoints"][i],
            split["keypoint_scores"][i],
            Bodies(split["joints"][i], split["uncertainties"][i]),
        )
        for i in range(len(counts))
    ]


def save_observations(folder: Path, key: str, observations: list[Observation]) -> None:
    """Writes the entry; the folder is made if needed.

    Raises:
        MediaError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / f"{key}.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            counts=np.array([len(o.boxes.bboxes) for o in observations], np.int64),
            bboxes=np.concatenate([o.boxes.bboxes for o in observations]),
            box_scores=np.concatenate([o.boxes.scores for o in observations]),
            ids=np.concatenate([np.array(o.boxes.ids, np.int64) for o in observations]),
            keypoints=np.concatenate([o.keypoints for o in observations]),
            keypoint_scores=np.concatenate([o.keypoint_scores for o in observations]),
            joints=np.concatenate([o.bodies.joints for o in observations]),
            uncertainties=np.concatenate([o.bodies.uncertainties for o in observations]),
        )


_ARRAYS = (
    "bboxes",
    "box_scores",
    "ids",
    "keypoints",
    "keypoint_scores",
    "joints",
    "uncertainties",
)

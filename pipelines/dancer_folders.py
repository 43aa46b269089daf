"""Pose pictures of SteadyDancer in the authors' layout: numbered files in two folders.

The authors' preparation leaves `positive/0000.jpg ...` and `negative/0000.jpg ...`, and their
generator reads the first 81 of each. Here any number is read; a missing number is an error, because
the motion would jump.

Source: MCG-NJU/SteadyDancer: preprocess/dump_video_images.py, wan/image2video_dancer.py.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.dancer_pose import DancerPose, shrink
from xicon_infer.errors import MediaError
from xicon_infer.media.image import load_image
from xicon_infer.types import Clip, Progress

_PICTURES = (".jpg", ".jpeg", ".png")


def read_pose_folders(
    root: Path,
    *,
    size: tuple[int, int],
    fps: Fraction,
    progress: Progress,
    max_frames: int = 0,
    needs_negative: bool = False,
) -> DancerPose:
    """Returns the poses of the authors' layout: folders `positive` and `negative` of 0000.jpg ...

    Args:
        root: the folder that holds both; `negative` may be missing.
        size: (W, H) that pictures are brought to.
        fps: of the result; files have none.
        progress: told how many pictures were found.
        max_frames: read no more than these; 0 for all.
        needs_negative: refuse a missing `negative`.

    Raises:
        MediaError: a folder is missing or empty, a number is missing, sizes differ, the folders
            hold different numbers of pictures, or one cannot be read.
    """
    options: dict[str, Any] = {"size": size, "fps": fps, "max_frames": max_frames}
    positive = read_pose_folder(root / "positive", progress=progress, **options)
    folder, negative = root / "negative", None
    if needs_negative or folder.is_dir():
        negative = read_pose_folder(folder, progress=progress, **options)
        counts = len(positive.frames), len(negative.frames)
        if counts[0] != counts[1]:
            raise MediaError(
                f"{root}: 'positive' holds {counts[0]} pictures and 'negative' {counts[1]}; both "
                "must be of the same motion.",
                field="pose_folder",
            )
    report = {"folder": root.name, "frames": len(positive.frames), "size": list(size)}
    return DancerPose(positive, negative, {**report, "fps": str(fps)})


def read_pose_folder(
    folder: Path,
    *,
    size: tuple[int, int],
    fps: Fraction,
    progress: Progress,
    max_frames: int = 0,
) -> Clip:
    """Returns the numbered pictures of a folder, in order; arguments as `read_pose_folders`."""
    paths = _numbered(folder)
    chosen = paths[:max_frames] if max_frames else paths
    frames = np.empty((len(chosen), size[1], size[0], 3), np.uint8)
    first: tuple[int, ...] = ()
    for index, path in enumerate(chosen):
        picture = load_image(path, field="pose_folder")
        first = first or picture.shape
        if picture.shape != first:
            raise MediaError(
                f"{path} is {picture.shape[1]}x{picture.shape[0]}, but {chosen[0].name} is "
                f"{first[1]}x{first[0]}; all pictures of a folder must have one size.",
                field="pose_folder",
            )
        frames[index] = shrink(picture, size)
        progress.step(index + 1, len(chosen), "frame")
    if len(chosen) < len(paths):
        progress.warn(f"{folder.name}: {len(chosen)} of {len(paths)} pictures are used.")
    return Clip(frames, fps)


def _numbered(folder: Path) -> list[Path]:
    """Returns the pictures of a folder by number; names are numbers, without gaps."""
    if not folder.is_dir():
        raise MediaError(
            f"The folder {folder} is not there; pictures 0000.jpg, 0001.jpg ... are read from it.",
            field="pose_folder",
            code="MEDIA_NOT_FOUND",
        )
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)
    odd = [path.name for path in found if not path.stem.isdecimal()]
    if odd or not found:
        what = f"holds {odd[0]}" if odd else "holds no picture"
        raise MediaError(
            f"The folder {folder} {what}; names are frame numbers: 0000.jpg, 0001.jpg ...",
            field="pose_folder",
        )
    found.sort(key=lambda path: int(path.stem))
    numbers = [int(path.stem) for path in found]
    for expected, number in enumerate(numbers, start=numbers[0]):
        if number != expected:
            wrong = (
                f"picture {expected:04d} is missing"
                if number > expected
                else (f"there are two pictures {number:04d}")
            )
            raise MediaError(
                f"The folder {folder}: {wrong}; frames must be numbered without gaps.",
                field="pose_folder",
            )
    return found

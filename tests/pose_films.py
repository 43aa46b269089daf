"""Synthetic films for the contract networks: dots in key colours where the joints are.

The networks in tests/golden/scail_pose answer from colours: a box around everything magenta (or
cyan: a second person), one dot colour per keypoint. Films are lossless, so every answer is known.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from tests.media.samples import make_video
from xicon_infer.pose.observations import Bodies, Boxes
from xicon_infer.pose.track import load_tracks
from xicon_infer.types import Track

GOLDEN = Path(__file__).parent / "golden" / "scail_pose"
DANCE = Path(__file__).parents[1] / "examples" / "dance_fullbody.npz"
COLOURS = json.loads((GOLDEN / "contract_colours.json").read_text())["vitpose_keypoint_rgb_uint8"]
MAGENTA, CYAN = (255, 0, 255), (0, 255, 255)
BODY = (0, *range(5, 17))
"""Keypoints that get a dot: nose and limbs; those of face and hands would cover one another."""

MODEL_NAMES = {
    "yolov10_contract.onnx": "yolov10m.onnx",
    "vitpose_contract.onnx": "vitpose_h_wholebody_model.onnx",
    "nlf_contract.torchscript": "nlf_l_multi_0.3.2.torchscript",
}


def contract_models(folder: Path) -> Path:
    """Copies the contract networks under the published names; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for source, name in MODEL_NAMES.items():
        shutil.copy(GOLDEN / source, folder / name)
    # The contract network has its weights inside; the published one has them beside it.
    (folder / "vitpose_h_wholebody_data.bin").write_bytes(b"none")
    return folder


def dance(frames: int, fps: float = 24.0) -> np.ndarray:
    """Returns body keypoints [F, 133, 2] of the example dance at its own speed, 0 to 1."""
    track: Track = load_tracks(DANCE)[0]
    height, width = track.pose.size
    points = track.pose.keypoints / (width, height)
    times = np.arange(frames) * float(track.fps) / fps
    low = times.astype(int)
    share = (times - low)[:, None, None]
    return points[low] * (1 - share) + points[low + 1] * share


def draw(size: tuple[int, int], persons: Sequence[np.ndarray | None]) -> np.ndarray:
    """Returns one frame [H, W, 3] with the persons' keypoints [133, 2] in pixels as dots."""
    height, width = size
    frame = np.full((height, width, 3), 128, np.uint8)
    for colour, points in zip((MAGENTA, CYAN), persons, strict=False):
        if points is None:
            continue
        body = points[list(BODY)]
        low, high = body.min(axis=0) - 12, body.max(axis=0) + 12
        box_width, box_height = high - low
        radius = int(np.ceil(0.75 * 1.25 * max(box_width, 0.75 * box_height) / 48)) + 1
        corners = [tuple(int(v) for v in corner) for corner in (low - radius, high + radius)]
        cv2.rectangle(frame, *corners, colour, 3)
        for index in BODY:
            centre = tuple(round(float(v)) for v in points[index])
            cv2.circle(frame, centre, radius, COLOURS[index], -1)
    return frame


def film(
    path: Path,
    people: Sequence[np.ndarray],
    *,
    size: tuple[int, int],
    fps: int = 24,
    present: Sequence[np.ndarray] | None = None,
) -> Path:
    """Writes a lossless film of persons [F, 133, 2] (0 to 1); `present` [F] hides frames."""
    height, width = size
    scale = np.array([width, height])
    frames = []
    for index in range(len(people[0])):
        shown = [
            person[index] * scale if present is None or present[n][index] else None
            for n, person in enumerate(people)
        ]
        frames.append(draw(size, shown))
    make_video(path, np.stack(frames), fps=Fraction(fps), codec="ffv1", pix_fmt="bgr0")
    return path


def dancer(
    frames: int,
    *,
    size: tuple[int, int],
    tall: float = 0.8,
    centre: tuple[float, float] = (0.5, 0.5),
    fps: float = 24.0,
) -> np.ndarray:
    """Returns the dance [F, 133, 2] with its true proportions, 0 to 1 of a frame of `size`.

    The box around the body in all frames has `tall` of the height and lies around `centre`.
    """
    points = dance(frames, fps) * np.array(load_tracks(DANCE)[0].pose.size[::-1])
    body = points[:, list(BODY)].reshape(-1, 2)
    low, high = body.min(axis=0), body.max(axis=0)
    pixels = (points - (low + high) / 2) * tall * size[0] / (high[1] - low[1])
    return pixels / (size[1], size[0]) + np.array(centre)


def shots(
    people: Sequence[np.ndarray], *, size: tuple[int, int], in_front: int | None = None
) -> np.ndarray:
    """Returns the frames uint8 [F, H, W, 3] of a film.

    The person `in_front` hides what lies behind their box; without one, dots shine through.
    """
    scale = np.array([size[1], size[0]])
    if in_front is None:
        return np.stack([draw(size, [p[i] * scale for p in people]) for i in range(len(people[0]))])
    frames = []
    for index in range(len(people[0])):
        shown = [person[index] * scale for person in people]
        behind = draw(size, [None if n == in_front else p for n, p in enumerate(shown)])
        front = draw(size, [p if n == in_front else None for n, p in enumerate(shown)])
        rows, columns = np.nonzero((front != 128).any(axis=2))
        box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
        behind[box] = front[box]
        frames.append(behind)
    return np.stack(frames)


def save_shots(path: Path, frames: np.ndarray, **options: object) -> Path:
    """Writes frames without loss: H.264 in RGB for MP4, which has a display matrix, else FFV1."""
    if path.suffix == ".mp4":
        given = {"codec": "libx264rgb", "pix_fmt": "rgb24", "options": {"qp": "0"}}
    else:
        given = {"codec": "ffv1", "pix_fmt": "bgr0"}
    return make_video(path, frames, **(given | options))


class CountingNetworks:
    """Take the place of all three networks and count the frames on the way and in memory."""

    def __init__(self, slow: str) -> None:
        self.slow, self.read, self.finished, self.alive = slow, 0, 0, 0
        self.most = Counter()
        self.lock = threading.Lock()

    def watch(self, pixels: np.ndarray, count: int) -> None:
        self._change(count)
        weakref.finalize(pixels, self._change, -count)

    def _change(self, by: int) -> None:
        with self.lock:
            self.alive += by
            waiting = self.read - self.finished
            self.most |= Counter(alive=self.alive, waiting=waiting)

    def _pause(self, stage: str) -> None:
        time.sleep(0.002 if self.slow == stage else 0)

    def film(self, frames: int):
        for _ in range(frames):
            frame = np.zeros((4, 4, 3), np.uint8)
            self.read += 1
            self.watch(frame, 1)
            yield frame

    def detect(self, frames):
        self.watch(frames, len(frames))
        self._pause("detector")
        box = np.array([[0, 0, 4, 4]], np.float32)
        return [Boxes(box, np.ones(1, np.float32), (-1,)) for _ in frames]

    def estimate(self, frames, second, third):
        if isinstance(second[0], int):
            self._pause("keypoints")
            count = len(third)
            return np.ones((count, 133, 2), np.float32), np.ones((count, 133), np.float32)
        self._pause("bodies")
        self.finished += len(frames)
        joints, doubt = np.ones((1, 24, 3), np.float32), np.zeros((1, 24), np.float32)
        return [Bodies(joints, doubt) for _ in frames]

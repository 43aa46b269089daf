"""Requests for the reliability figures: good, bad, cancelled and broken ones, and nonsense."""

from __future__ import annotations

import base64
import random
import string
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tests.pose_films import contract_models, dance, film
from xicon_infer.media.write import write_png, write_video

SIDE = 128
KEYS = (
    *("mode", "image", "video", "pose_video", "prompt", "negative_prompt", "width", "height"),
    *("size", "num_frames", "max_frames", "fps", "profile", "steps", "cfg", "shift", "scheduler"),
    *("seed", "loras", "output", "dry_run", "strict", "timeout_s", "metadata", "workflow"),
    *("images", "videos", "image_url", "image_path", "image_base64", "video_url", "action"),
    *("api_version", "context_frames", "context_overlap", "attention_mode", "vae_tiling"),
    *("response_format", "frame_num", "sample_steps", "blocks_to_swap", "draw_face", "widht"),
)
_ODD = (
    *(None, True, False, 0, -1, 1, 5, 0.5, -0.0, 1e308, float("nan"), float("inf"), 10**400),
    *("", " ", "1", "-1", "1e9", "scail", "wan_t2v", "\x00", "\ud800", "{{seed}}", "é" * 50),
    *("http://a/b.png", "http://[::1/", "file:///etc/passwd", "data:image/png;base64,AAAA"),
    *("//x", "/../..", "http://2130706433/", "https://u:p@h/", "{", "[]", '{"a":1}'),
)

_LIKELY = (*(None, True, 1, 4, 16, 128, 512, 896.5, "24", "-1", 0.5, "auto", "crop", "quality"), [])
_PICTURE, _FILM = "data:image/png;base64,AAAA", "https://cdn.example.com/dance.mp4"
_NEAR: tuple[dict[str, Any], ...] = (
    {"mode": "scail", "image": _PICTURE, "pose_video": _FILM},
    {"mode": "steady_dancer", "image": _PICTURE, "video": {"url": _FILM}},
    {"mode": "wan_i2v", "image": {"base64": "AAAA"}, "prompt": "x"},
    {"mode": "wan_t2v", "prompt": "x"},
    {"mode": "pose_only", "video": _FILM},
    {"images": {"reference_image": _PICTURE}, "videos": {"dance_video": _FILM}, "prompt": "x"},
    {"image_base64": "AAAA", "video_url": _FILM},
)
"""Good requests, that a fuzz begins with: what is refused at once tests little."""


class Samples:
    """Small media, and requests made of them.

    Args:
        folder: for the files and the pose networks of known answers.
    """

    def __init__(self, folder: Path) -> None:
        self.models = contract_models(folder / "models")
        write_png(folder / "ref.png", np.full((SIDE, SIDE, 3), 128, np.uint8))
        frames = np.zeros((5, SIDE, SIDE, 3), np.uint8)
        write_video(folder / "pose.mp4", frames, fps=Fraction(16))
        film(folder / "dance.mkv", [dance(5)], size=(256, 128))
        self.image = _inline(folder / "ref.png", "image/png")
        self.pose = _inline(folder / "pose.mp4", "video/mp4")
        self.dance = _inline(folder / "dance.mkv", "video/x-matroska")

    def good(self, number: int) -> dict[str, Any]:
        """Returns a request that makes a video; the forms and modes take turns."""
        small: dict[str, Any] = {"width": SIDE, "height": SIDE, "steps": 1, "seed": number}
        prompt = f"request {number}"
        forms: tuple[dict[str, Any], ...] = (
            {"mode": "scail", "image": self.image, "pose_video": self.pose},
            {"mode": "wan_t2v", "prompt": prompt, "num_frames": 5},
            {
                "images": {"reference_image": self.image},
                "videos": {"dance_video": self.dance},
                "prompt": prompt,
            },
            {"image_base64": self.image, "video_base64": self.dance, "num_frames": 5},
        )
        return forms[number % len(forms)] | small

    def long(self, number: int) -> dict[str, Any]:
        """Returns a request that runs until somebody stops it."""
        return self.good(1) | {"seed": number, "steps": 100, "num_frames": 81}

    def bad(self, number: int) -> dict[str, Any]:
        """Returns a request that is refused."""
        faults: tuple[dict[str, Any], ...] = (
            {"mode": "wan_t2v"},
            {"mode": "nothing"},
            self.good(0) | {"width": 5},
            self.good(0) | {"image": "http://169.254.169.254/latest"},
            {"images": {"reference_image": self.image}, "prompt": "no video"},
            {"workflow": {"nodes": []}},
            {"action": "read_log"},
        )
        return faults[number % len(faults)]

    def faulty(self, number: int) -> dict[str, Any]:
        """Returns a request that is good and fails on the way."""
        broken = "data:video/mp4;base64," + base64.b64encode(bytes(range(256)) * 40).decode()
        page = "data:image/png;base64," + base64.b64encode(b"<html>not a picture</html>").decode()
        faults: tuple[dict[str, Any], ...] = (
            self.good(0) | {"pose_video": broken},
            self.good(0) | {"image": page},
            self.good(1) | {"metadata": {"fault": "oom"}},
            self.good(1) | {"metadata": {"fault": "bug"}},
            self.good(1) | {"metadata": {"fault": "disk"}},
        )
        return faults[number % len(faults)]


def nonsense(chance: random.Random) -> dict[str, Any]:
    """Returns an event with anything in it."""
    if chance.random() < 0.05:
        return {"id": chance.choice(_ODD), "input": chance.choice(_ODD)}
    near = chance.random() < 0.6
    given = dict(chance.choice(_NEAR)) if near else {}
    for _ in range(chance.randint(0, 2 if near else 9)):
        name = chance.choice(KEYS)
        given[name] = chance.choice(_LIKELY) if near else _value(chance, 3)
    if chance.random() < 0.1:
        given["".join(chance.choices(string.printable, k=8))] = _value(chance, 1)
    return {"id": f"fuzz-{chance.randint(0, 99)}", "input": given}


def _value(chance: random.Random, depth: int) -> Any:
    kind = chance.random()
    if depth and kind < 0.15:
        return [_value(chance, depth - 1) for _ in range(chance.randint(0, 3))]
    if depth and kind < 0.35:
        names = ("url", "base64", "path", "reference_image", "dance_video", "name", "strength")
        return {
            chance.choice(names): _value(chance, depth - 1) for _ in range(chance.randint(0, 3))
        }
    if kind < 0.5:
        return chance.randint(-(2**70), 2**70)
    if kind < 0.6:
        return "".join(chance.choices(string.printable, k=chance.randint(0, 40)))
    return chance.choice(_ODD)


def _inline(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"

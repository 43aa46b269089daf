"""Warm-up: the weights of every mode are loaded and run once before the first job.

The first enabled mode comes last, because one pipeline stays loaded. What a pass makes is thrown
away; that it ran is the proof that this worker can work.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from xicon_infer.job import Job, make_job
from xicon_infer.media.fetch_folder import job_folder
from xicon_infer.media.write import write_png, write_video
from xicon_infer.request_field import PIPELINES
from xicon_infer.request_job import MEMORY, choose_kernel
from xicon_infer.settings import Settings
from xicon_infer.types import Progress, Result, SilentProgress
from xicon_infer.worker_memory import free_memory, run_with_less

DEFAULT_SIZES = {"scail": (512, 896), "steady_dancer": (480, 832)}
WAN_SIZE = (832, 480)
WINDOW = 81
"""Frames of one context window: what compiled and tuned kernels are made for."""
SMALL_SIZE, SMALL_FRAMES = (128, 128), 5
"""On a CPU, where nothing is tuned."""
_NOT_WARMED = ("pose_only",)


@dataclass(frozen=True)
class WarmShape:
    """What a warm-up pass makes; one step of it."""

    width: int
    height: int
    frames: int


def warm_modes(settings: Settings, ready: Collection[str]) -> list[str]:
    """Returns the modes to warm, the one that stays loaded last; that one alone if told so.

    Args:
        settings: modes in order of importance, and XICON_WARMUP.
        ready: modes whose weights are there.
    """
    modes = [mode for mode in settings.modes if mode in ready and mode not in _NOT_WARMED]
    return modes[::-1] if settings.warmup else modes[:1]


def warm_shape(mode: str, *, gpu: bool) -> WarmShape:
    """Returns the default size of a mode with one whole window, or the smallest on a CPU."""
    if not gpu:
        return WarmShape(*SMALL_SIZE, SMALL_FRAMES)
    return WarmShape(*DEFAULT_SIZES.get(mode, WAN_SIZE), WINDOW)


def warm(
    mode: str,
    settings: Settings,
    run: Callable[[Job, Progress], Result],
    *,
    shape: WarmShape,
) -> Result:
    """Makes a video of one step with the weights of a mode, and returns what is known of it.

    Args:
        mode: of a request, not pose_only.
        settings: of the worker.
        run: makes the video; keeps what it loaded.
        shape: of the video.

    Raises:
        XiconError: the mode cannot run here.
    """
    settings.tmp.mkdir(mode=0o700, parents=True, exist_ok=True)
    with job_folder(settings.tmp) as folder:
        job = make_job(_values(mode, settings, folder, shape), source="request")
        result, _ = run_with_less(
            job,
            lambda one: run(one, SilentProgress()),
            free=free_memory,
            tell=lambda error, change: None,
        )
        return result


def _values(mode: str, settings: Settings, folder: Path, shape: WarmShape) -> dict[str, Any]:
    values: dict[str, Any] = {
        "pipeline": PIPELINES[mode],
        "width": shape.width,
        "height": shape.height,
        "num_frames": shape.frames,
        "num_inference_steps": 1,
        "fps": 16,
        "seed": 0,
        "prompt": "a person dances",
        "output": str(folder / "warm.mp4"),
        "attention": choose_kernel(settings.attention, None)[0],
        "kernels": settings.kernels,
        "memory": MEMORY[settings.memory],
    }
    if preset := settings.preset_for(mode):
        values["preset"] = preset
    if settings.models_dir:
        values["models_dir"] = str(settings.models_dir[0])
    if mode != "wan_t2v":
        picture = np.full((shape.height, shape.width, 3), 128, np.uint8)
        write_png(folder / "image.png", picture)
        values["image"] = str(folder / "image.png")
    if mode in DEFAULT_SIZES:
        frames = np.zeros((shape.frames, shape.height, shape.width, 3), np.uint8)
        write_video(folder / "pose.mp4", frames, fps=Fraction(16))
        values["pose_video"] = str(folder / "pose.mp4")
    return values

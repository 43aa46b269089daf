"""Small real media files for the tests of the command line."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from xicon_infer.types import Progress, Result, Stage

SIZE = ("--width", "128", "--height", "192")


def write_image(path: Path, width: int = 60, height: int = 90) -> Path:
    ramp = np.linspace(0, 255, width * height * 3).astype(np.uint8)
    Image.fromarray(ramp.reshape(height, width, 3)).save(path)
    return path


def write_video(path: Path, frames: int = 20, fps: int = 16) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 96, "yuv420p"
        for index in range(frames):
            picture = np.full((96, 64, 3), 10 * index % 255, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return path


def fake_result(path: Path) -> Result:
    return Result(
        path=path,
        mime_type="video/mp4",
        seed=7,
        num_frames=17,
        width=128,
        height=192,
        fps=Fraction(30000, 1001),
        settings={"prompt": "x"},
        stages=[Stage("sample", 1.5, 2**20)],
        warnings=["told"],
        versions={"torch": "2"},
        outputs={"report": path.with_suffix(".json")},
    )


def fake_run_job(job: object, progress: Progress) -> Result:
    """Reports like a job and makes nothing."""
    with progress.stage("sample"):
        progress.step(1, 2)
        progress.step(2, 2)
    progress.warn("told")
    return fake_result(job.output)  # type: ignore[attr-defined]

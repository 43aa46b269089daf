"""Context windows of a step, as a client sees them while a long video is made."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from pipelines.loading import load_tiny
from pipelines.scail import ScailOptions, ScailPipeline
from pipelines.steady_dancer import SteadyDancerPipeline
from pipelines.steady_dancer_options import PoseVideos, SteadyDancerOptions
from pipelines.wan_video import WanOptions, WanVideoPipeline
from tests.worker.fakes import Clock
from xicon_infer.sampling.windows import ContextOptions
from xicon_infer.types import Clip
from xicon_infer.worker_progress import JobProgress

FRAMES = 13
WINDOWS = ContextOptions(schedule="static_standard", frames=9, overlap=4, stride=4)
IMAGE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
POSE = Clip(np.random.default_rng(1).integers(0, 255, (FRAMES, 64, 64, 3), np.uint8), Fraction(16))
COMMON = {
    "width": 64,
    "height": 64,
    "num_frames": FRAMES,
    "num_inference_steps": 2,
    "seed": 1,
    "context": WINDOWS,
}


class Ticking(Clock):
    """Every look at the clock takes three seconds, so that every update is due."""

    def __call__(self) -> float:
        self.now += 3
        return self.now


def run_scail(progress):
    ScailPipeline(load_tiny("scail"))(IMAGE, POSE, ScailOptions(**COMMON), progress)


def run_dancer(progress):
    options = SteadyDancerOptions(**COMMON)
    SteadyDancerPipeline(load_tiny("steady_dancer"))(
        IMAGE, PoseVideos(POSE, POSE), options, progress
    )


def run_wan(progress):
    WanVideoPipeline(load_tiny("wan_t2v"))(WanOptions(**COMMON), progress=progress)


@pytest.mark.parametrize("run", [run_scail, run_dancer, run_wan])
def test_every_window_of_every_step_is_told(run):
    sent: list[dict] = []
    progress = JobProgress(
        "r", check=lambda: None, send=lambda p: sent.append(p) or True, clock=Ticking()
    )
    run(progress)
    told = [(p["window"], p["windows"]) for p in sent if p["window"] is not None]
    total = told[0][1]
    assert total > 1
    assert told == [(n, total) for _ in range(2) for n in range(1, total + 1)]
    percents = [p["percent"] for p in sent]
    assert percents == sorted(percents)


def test_a_window_is_a_part_of_a_step():
    sent: list[dict] = []
    progress = JobProgress(
        "r", check=lambda: None, send=lambda p: sent.append(p) or True, clock=Ticking()
    )
    with progress.stage("sample"):
        progress.step(1, 2, "window")
        first = progress.payload()
        progress.step(3, 6)
        before = progress.payload()
        progress.step(1, 2, "window")
        half = progress.payload()
        progress.step(2, 2, "window")
        whole = progress.payload()
    assert (first["window"], first["windows"], first["step"]) == (1, 2, None)
    assert (before["window"], before["step"], before["percent"]) == (None, 3, 55)
    assert (half["window"], half["step"], half["percent"]) == (1, 3, 60)
    assert (whole["window"], whole["percent"]) == (2, 65)
    with progress.stage("decode video"):
        assert progress.payload()["window"] is None

"""The trained tiny model dances as told, as whom it is told: the only test of what weights mean.

Clips, characters and motions are held out. The bounds leave room below what
benchmarks/results/tiny.json states; `python -m tools.tiny.evaluate` measures more of them.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from pipelines.loading import LoadOptions, load_tiny
from pipelines.scail import ScailPipeline
from pipelines.tiny_trained import FILES, LORA
from tools.tiny.evaluate import WINDOWS, cut, generate, held_out_clip, measure_vae, window_borders
from tools.tiny.measure import flicker_ratio, identity_error, pose_agreement, seam
from tools.tiny.world import Clip
from xicon_infer.types import UInt8Array

CLIPS = 3
ROOT = Path(__file__).parents[2]
RESULT, CARD = ROOT / "benchmarks" / "results" / "tiny.json", ROOT / "docs" / "tiny-model.md"


@lru_cache(maxsize=4)
def pipeline(loras: tuple[tuple[str, float], ...] = (), mode: str = "full") -> ScailPipeline:
    options = LoadOptions(loras=loras, lora_mode=mode)  # type: ignore[arg-type]
    return ScailPipeline(load_tiny("scail", options))


@lru_cache(maxsize=CLIPS)
def clip_of(index: int) -> Clip:
    return held_out_clip(index)


@lru_cache(maxsize=CLIPS)
def video_of(index: int) -> UInt8Array:
    return generate(pipeline(), clip_of(index))


def mean(values: list[float]) -> float:
    return float(np.mean(values))


def test_the_files_are_small() -> None:
    assert sum(path.stat().st_size for path in (*FILES.values(), LORA)) < 25e6


def test_the_vae_keeps_pictures() -> None:
    found = measure_vae(pipeline(), [clip_of(index) for index in range(CLIPS)])
    assert found["vae_psnr_db"] >= 27


def test_the_figure_follows_the_pose() -> None:
    clips = [clip_of(index) for index in range(CLIPS)]
    followed = mean([pose_agreement(video_of(i), clip) for i, clip in enumerate(clips)])
    two = clips[:2]  # what is far off needs fewer
    blind = mean([pose_agreement(generate(pipeline(), c, pose_strength=0.0), c) for c in two])
    wrong = mean(
        [
            pose_agreement(generate(pipeline(), c, track=clips[i - 1].track), c)
            for i, c in enumerate(two)
        ]
    )
    assert followed >= 0.8
    assert blind < followed - 0.15
    assert wrong < followed - 0.15


def test_the_figure_is_the_one_of_the_reference() -> None:
    clips = [clip_of(index) for index in range(CLIPS)]
    own = mean([identity_error(video_of(i), clip) for i, clip in enumerate(clips)])
    other = mean(
        [
            identity_error(generate(pipeline(), c, reference=clips[i - 1].reference), c)
            for i, c in enumerate(clips)
        ]
    )
    assert own < 0.5 * other


def test_pictures_are_steady() -> None:
    ratios = [flicker_ratio(video_of(i), clip_of(i).frames) for i in range(CLIPS)]
    assert mean(ratios) <= 2


def test_a_long_video_keeps_the_figure_and_shows_no_seam() -> None:
    clip = held_out_clip(0, 121)
    frames = generate(pipeline(), clip, context=WINDOWS)
    size = WINDOWS.frames
    first = identity_error(frames[:size], cut(clip, 0, size))
    last = identity_error(frames[-size:], cut(clip, 121 - size, 121))
    assert last < first + 15
    assert seam(frames, window_borders(121)) < 3


@pytest.mark.parametrize("mode", ["full", "merge"])
def test_the_lora_takes_the_colours_away(mode: str) -> None:
    coloured = np.ptp(video_of(0).astype(int), axis=-1).mean()
    grey = generate(pipeline(((str(LORA), 1.0),), mode), clip_of(0))
    assert np.ptp(grey.astype(int), axis=-1).mean() < 0.4 * coloured


def test_published_figures_meet_their_targets() -> None:
    figures = json.loads(RESULT.read_text())["figures"]
    assert figures["vae_psnr_db"] >= 28
    assert figures["large_pck"] >= 0.85
    assert figures["large_pck"] > figures["large_pck_still_reference"] + 0.1
    assert figures["pck"] >= 0.8
    assert figures["pck"] > figures["pck_without_pose"] + 0.15
    assert figures["identity_error"] < 0.5 * figures["identity_error_shuffled"]
    assert figures["flicker_ratio"] <= 2
    assert figures["long_seam"] < 1.5 * figures["long_seam_truth"] + 0.5


def test_the_card_states_the_published_figures() -> None:
    figures = json.loads(RESULT.read_text())["figures"]
    stated = re.findall(r"`([a-z0-9_]+)` (-?[0-9.]+)", CARD.read_text())
    assert len(stated) >= 25
    for name, text in stated:
        digits = len(text.partition(".")[2])
        assert float(text) == pytest.approx(figures[name], abs=0.5001 * 10**-digits), name

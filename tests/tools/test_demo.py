"""What the demo is made of: a held-out figure and dance, its GIF, and the look at many clips."""

from __future__ import annotations

import importlib.util
import json
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tools.tiny import look
from tools.tiny.character import make_character
from tools.tiny.evaluate import FIRST_SEED
from tools.tiny.world import SPLITS
from xicon_infer.media.video import read_clip
from xicon_infer.media.write import write_video
from xicon_infer.pose.track import load_tracks

EXAMPLES = Path(__file__).parents[2] / "examples"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_dancer_is_drawn_again_alike(tmp_path: Path) -> None:
    maker = script("make_tiny_dancer")
    maker.main([str(tmp_path)])
    again, stored = (
        np.asarray(Image.open(folder / "tiny_character.png")).astype(int)
        for folder in (tmp_path, EXAMPLES)
    )
    assert np.abs(again - stored).mean() < 0.5
    (mine,), (kept,) = (load_tracks(folder / "tiny_dance.npz") for folder in (tmp_path, EXAMPLES))
    assert np.abs(mine.body.joints - kept.body.joints).max() < 0.1
    assert (kept.pose.size, len(kept.body.joints), kept.fps) == ((224, 128), 97, Fraction(16))
    # Neither was looked at in training, nor is it one of the figures that are measured.
    assert not FIRST_SEED <= maker.SEED < FIRST_SEED + 500
    looks = np.random.default_rng([maker.SEED, SPLITS.index("test")]).spawn(3)[0]
    shown = np.unique(stored.reshape(-1, 3), axis=0)
    shirt = make_character(looks, "test").colours[2].astype(int)
    assert np.abs(shown - shirt).sum(axis=1).min() < 24


def test_the_gif_shows_reference_pose_and_result(tmp_path: Path) -> None:
    picture, video, out = tmp_path / "a.png", tmp_path / "a.mp4", tmp_path / "a.gif"
    Image.new("RGB", (32, 48), (200, 30, 30)).save(picture)
    frames = np.full((5, 48, 32, 3), (20, 160, 40), np.uint8)
    for index, frame in enumerate(frames):  # a GIF merges pictures that are alike
        frame[:8] = 50 * index
    write_video(video, frames, fps=Fraction(16))
    write_video(video.with_suffix(".pose.mp4"), frames[:, :24, :16] // 4, fps=Fraction(16))
    script("demo_gif").main(picture, video, out)
    with Image.open(out) as gif:
        assert (gif.size, gif.n_frames, gif.info["duration"]) == ((96, 48), 3, 120)
        shown = np.asarray(gif.convert("RGB"))
    for column, colour in ((16, (200, 30, 30)), (48, (5, 40, 10)), (80, (20, 160, 40))):
        assert np.abs(shown[24, column].astype(int) - colour).max() < 12


def test_a_look_at_one_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    look.main(["--out", str(tmp_path), "--clips", "1", "--kind", "96x160x17", "--threads", "1"])
    assert read_clip(tmp_path / "clip_000.mp4").frames.shape == (17, 160, 3 * 96, 3)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (96 * 11, 2 * 160)
    assert "make videos" in capsys.readouterr().err


def test_the_embedded_demo_needs_no_file_but_the_package() -> None:
    makefile = (EXAMPLES.parent / "Makefile").read_text()
    demo = makefile.split("\ndemo:")[1].split("\n\n")[0]
    assert "--preset tiny" in demo
    for name in ("tiny_character.png", "tiny_dance.npz", "demo_gif.py"):
        assert f"examples/{name}" in demo
        assert (EXAMPLES / name).is_file()
    request = json.loads((EXAMPLES.parent / "test_input.json").read_text())
    assert request["input"]["mode"] == "scail"

"""The example files that the README's command uses."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_script():
    spec = importlib.util.spec_from_file_location("make_character", EXAMPLES / "make_character.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_character_is_a_small_portrait_of_a_centred_figure():
    path = EXAMPLES / "character.png"
    assert path.stat().st_size <= 300_000
    with Image.open(path) as image:
        assert (image.mode, image.size) == ("RGB", (832, 1216))
        picture = np.asarray(image).astype(int)
    backdrop = picture[:, :1]
    figure = np.abs(picture - backdrop).max(axis=2) > 60
    rows, columns = np.flatnonzero(figure.any(axis=1)), np.flatnonzero(figure.any(axis=0))
    # Head to feet in view, with room all round for a video model to move the figure.
    assert rows[0] > 40
    assert rows[-1] < 1180
    assert rows[-1] - rows[0] > 950
    assert (columns[0] + columns[-1]) / 2 == pytest.approx(416, abs=15)
    assert columns[0] > 150


def test_shapes_of_the_script_are_smooth_and_mirrored():
    script = load_script()
    left, right = (
        script.ellipse((300, 400), (20, 10)),
        script.ellipse((300, 400), (20, 10), flip=True),
    )
    assert np.abs(left - right[:, ::-1]).max() < 0.2
    assert ((left > 0) & (left < 1)).any()
    area = left.sum() / script.SCALE**2
    # OpenCV draws outlines about half a pixel wide.
    assert area == pytest.approx(np.pi * 20 * 10, rel=0.06)
    normal = script.inflate(left[700:900, 500:700], 10.0)
    assert np.linalg.norm(normal, axis=2) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_script_draws_the_picture_again(tmp_path):
    script = load_script()
    script.main([str(tmp_path / "again.png")])
    again = np.asarray(Image.open(tmp_path / "again.png")).astype(int)
    stored = np.asarray(Image.open(EXAMPLES / "character.png")).astype(int)
    # Another OpenCV may round a few pixels differently.
    assert (np.abs(again - stored).max(axis=2) > 2).mean() < 1e-3


def test_example_dance_is_the_published_track():
    digest = hashlib.sha256((EXAMPLES / "dance_fullbody.npz").read_bytes()).hexdigest()
    assert digest == "e0618137752b1ae7d83382cfd70c1fb5ece61922093bced79c0fd85dbcc4688a"

"""Pose pictures in the authors' folders: order, gaps, sizes, counts."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.dancer_folders import read_pose_folder, read_pose_folders
from xicon_infer.errors import MediaError
from xicon_infer.types import SilentProgress

SIZE = (12, 8)


def fill(folder: Path, numbers, *, size=(24, 16), digits=4, suffix=".png") -> Path:
    """Writes one grey picture per number, as bright as its number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        picture = Image.new("RGB", size, (number, number, number))
        picture.save(folder / f"{number:0{digits}d}{suffix}")
    return folder


def read(folder: Path, **options):
    told = SilentProgress()
    given = {"size": SIZE, "fps": Fraction(16), "progress": told} | options
    reader = read_pose_folders if (folder / "positive").exists() else read_pose_folder
    return reader(folder, **given), told.warnings


@pytest.mark.parametrize("digits", [1, 4])
def test_pictures_come_by_number_at_the_size_of_the_result(tmp_path, digits):
    clip, told = read(fill(tmp_path / "positive", range(12), digits=digits))
    assert clip.frames.shape == (12, 8, 12, 3)
    assert clip.frames[:, 0, 0, 0].tolist() == list(range(12))
    assert clip.fps == 16
    assert told == []


def test_jpeg_is_read_and_shrunk_smoothly(tmp_path):
    folder = tmp_path / "positive"
    folder.mkdir()
    lines = np.zeros((16, 24, 3), np.uint8)
    lines[:, ::2] = 255
    Image.fromarray(lines).save(folder / "0000.jpg", quality=100, subsampling=0)
    clip, _ = read(folder)
    expected = Image.open(folder / "0000.jpg").resize(SIZE, Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(clip.frames[0], np.asarray(expected))
    assert 100 < clip.frames[0, 4, 6, 0] < 160


def test_no_more_are_read_than_asked_for(tmp_path):
    folder = fill(tmp_path / "positive", range(3, 9))
    clip, told = read(folder, max_frames=4)
    assert clip.frames[:, 0, 0, 0].tolist() == [3, 4, 5, 6]
    assert told == ["positive: 4 of 6 pictures are used."]
    assert len(read(folder, max_frames=99)[0].frames) == 6


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((0, 1, 3), "picture 0002 is missing"),
        ((), "holds no picture"),
    ],
)
def test_gaps_and_empty_folders_are_refused(tmp_path, numbers, words):
    with pytest.raises(MediaError, match=words) as caught:
        read(fill(tmp_path / "positive", numbers))
    assert caught.value.field == "pose_folder"


def test_two_pictures_of_a_number_and_other_names_are_refused(tmp_path):
    folder = fill(tmp_path / "positive", range(3))
    fill(folder, [1], suffix=".jpg")
    with pytest.raises(MediaError, match="two pictures 0001"):
        read(folder)
    (folder / "0001.jpg").rename(folder / "cover.jpg")
    with pytest.raises(MediaError, match=r"cover\.jpg"):
        read(folder)
    (folder / "cover.jpg").rename(folder / "notes.txt")
    assert len(read(folder)[0].frames) == 3


def test_pictures_of_other_sizes_are_refused(tmp_path):
    folder = fill(tmp_path / "positive", range(3))
    fill(folder, [2], size=(26, 16))
    with pytest.raises(MediaError, match=r"0002\.png is 26x16, but 0000\.png is 24x16"):
        read(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(MediaError, match="is not there") as caught:
        read(tmp_path / "nowhere")
    assert caught.value.code == "MEDIA_NOT_FOUND"


def test_both_folders_belong_together(tmp_path):
    fill(tmp_path / "positive", range(4))
    alone, _ = read(tmp_path)
    assert alone.negative is None
    with pytest.raises(MediaError, match="negative is not there"):
        read(tmp_path, needs_negative=True)
    fill(tmp_path / "negative", range(5))
    with pytest.raises(MediaError, match="'positive' holds 4 pictures and 'negative' 5"):
        read(tmp_path)
    pair, told = read(tmp_path, max_frames=4)
    assert pair.negative.frames.shape == pair.positive.frames.shape
    assert told == ["negative: 4 of 5 pictures are used."]
    assert pair.report == {
        "folder": tmp_path.name,
        "frames": 4,
        "size": [12, 8],
        "fps": "16",
    }

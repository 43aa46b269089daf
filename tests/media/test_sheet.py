"""Contact sheets."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from tests.media.samples import ramp
from xicon_infer.errors import InvalidRequest, MediaError
from xicon_infer.media.sheet import contact_sheet, moments, save_contact_sheet

RED = np.full((12, 30, 20, 3), (250, 0, 0), np.uint8)
GREEN = np.full((9, 60, 40, 3), (0, 250, 0), np.uint8)
BLUE = np.full((50, 40, 3), (0, 0, 250), np.uint8)


def boxes(sheet, color):
    """Returns the columns at which stretches of a colour begin, and its number of pixels."""
    mask = (sheet == color).all(axis=2)
    columns = mask.any(axis=0).astype(int)
    return np.flatnonzero(np.diff(columns, prepend=0) == 1).tolist(), int(mask.sum())


def test_rows_stand_below_one_another():
    sheet = contact_sheet([("a", RED), ("b", GREEN)], columns=4, cell_height=60)
    starts, count = boxes(sheet, (250, 0, 0))
    assert len(starts) == 4
    assert count == 4 * 60 * 40
    assert boxes(sheet, (0, 250, 0)) == (starts, count)
    rows = [np.flatnonzero((sheet == color).all(axis=2).any(axis=1)) for color in
            ((250, 0, 0), (0, 250, 0))]  # fmt: skip
    assert rows[0].max() < rows[1].min()


def test_a_still_is_shown_once():
    sheet = contact_sheet([("still", BLUE), ("clip", RED)], columns=5, cell_height=60)
    assert len(boxes(sheet, (0, 0, 250))[0]) == 1
    assert len(boxes(sheet, (250, 0, 0))[0]) == 5


def test_moments_are_equal_steps_from_first_to_last():
    assert moments(100, 8) == [0, 14, 28, 42, 57, 71, 85, 99]
    assert moments(97, 8)[-1] == 96
    assert moments(1, 8) == [0]
    assert moments(5, 1) == [0]


def test_frames_are_those_of_the_moments():
    sheet = contact_sheet([("a", ramp(9))], columns=3, cell_height=48)
    for level in (16, 16 + 6 * 4, 16 + 6 * 8):
        assert boxes(sheet, (level,) * 3)[1] >= 48 * 60


@pytest.mark.parametrize(
    "change",
    [{"columns": 3}, {"cell_height": 50}, {"fps": Fraction(24)}, {"numbers": [3, 9, 27]}],
)
def test_every_option_changes_the_sheet(change):
    options = {"columns": 4, "cell_height": 60}
    plain = contact_sheet([("a", RED)], **options)
    changed = contact_sheet([("a", RED)], **{**options, **change})
    assert plain.shape != changed.shape or not np.array_equal(plain, changed)


def test_labels_are_drawn_and_fit():
    short = contact_sheet([("a", RED)], columns=1, cell_height=60)
    long = contact_sheet([("a label\nthat is much longer " * 4, RED)], columns=1, cell_height=60)
    assert long.shape[1] > short.shape[1]
    assert (long[:, -28:] == long[0, 0]).all()  # nothing is drawn over the margin
    other = contact_sheet([("b", RED)], columns=1, cell_height=60)
    assert not np.array_equal(short, other)


def test_a_short_clip_gives_fewer_columns():
    assert len(boxes(contact_sheet([("a", RED[:2])], columns=8), (250, 0, 0))[0]) == 2


def test_odd_shapes_are_drawn():
    flat = np.zeros((3, 10, 400, 3), np.uint8)
    tall = np.zeros((3, 400, 10, 3), np.uint8)
    sheet = contact_sheet([("flat", flat), ("tall", tall), ("still", flat[0])])
    assert sheet.ndim == 3
    assert sheet.dtype == np.uint8


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([], {}),
        ([("a", RED[:0])], {}),
        ([("a", RED)], {"columns": 0}),
        ([("a", RED)], {"cell_height": 4}),
    ],
)
def test_impossible_sheets_are_refused(rows, options):
    with pytest.raises(InvalidRequest):
        contact_sheet(rows, **options)


def test_a_sheet_is_saved_whole(tmp_path):
    rows = [("a", RED)]
    save_contact_sheet(tmp_path / "a.png", rows, columns=2, fps=Fraction(16))
    saved = np.asarray(Image.open(tmp_path / "a.png"))
    assert np.array_equal(saved, contact_sheet(rows, columns=2, fps=Fraction(16)))
    with pytest.raises(MediaError) as caught:
        save_contact_sheet(tmp_path / "no" / "a.png", rows)
    assert caught.value.code == "MEDIA_WRITE"

"""Bringing pictures to a size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity.golden import Golden
from tests.parity.media import replay_resize, replay_resize_sizes
from xicon_infer.errors import InvalidRequest, MediaError
from xicon_infer.media.image import (
    METHODS,
    POSITIONS,
    Sizing,
    fit_frame,
    resize_frames,
    resized_size,
)
from xicon_infer.media.resample import interpolate
from xicon_infer.types import FITS

GOLDEN = Path(__file__).parents[1] / "golden" / "wan_core"
NOISE = np.random.default_rng(0).integers(0, 256, (2, 37, 53, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("file", "replay", "count"),
    [
        ("image_resize_kjv2.safetensors", replay_resize, 8),
        ("image_resize_kjv2.json", replay_resize_sizes, 8),
        ("image_resize_sizes.json", replay_resize_sizes, 64),
    ],
)
def test_equals_the_reference(file, replay, count):
    checks = replay(Golden(GOLDEN / file, []))
    assert len(checks) == count
    assert [check.name for check in checks if not check.ok] == []


@pytest.mark.parametrize(
    ("method", "torch_mode"),
    [
        ("bicubic", "bicubic"),
        ("bilinear", "bilinear"),
        ("area", "area"),
        ("nearest", "nearest-exact"),
    ],
)
@pytest.mark.parametrize("size", [(80, 60), (31, 20), (53, 37), (7, 90)])
def test_interpolation_equals_torch(method, torch_mode, size):
    width, height = size
    tensor = torch.from_numpy(NOISE[:1]).permute(0, 3, 1, 2).float()
    expected = torch.nn.functional.interpolate(tensor, size=(height, width), mode=torch_mode)
    found = interpolate(NOISE[0], width, height, method).astype(np.float32)
    difference = np.abs(found - expected[0].permute(1, 2, 0).clamp(0, 255).numpy())
    assert difference.max() <= 0.501  # rounding to a level


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    source=st.tuples(st.integers(8, 70), st.integers(8, 70)),
    target=st.tuples(st.integers(16, 60), st.integers(16, 60)),
    fit=st.sampled_from(FITS),
    divisor=st.sampled_from([0, 1, 2, 8]),
    position=st.sampled_from(POSITIONS),
)
def test_size_is_foretold_and_divisible(source, target, fit, divisor, position):
    options = {"fit": fit, "divisible_by": divisor}
    try:
        foretold = resized_size(*source, target_width=target[0], target_height=target[1], **options)
    except MediaError as error:
        assert error.code == "UNSUPPORTED_MEDIA"
        return
    picture = np.zeros((source[1], source[0], 3), np.uint8)
    result = resize_frames(picture, width=target[0], height=target[1], position=position, **options)
    assert result.shape[1::-1] == foretold
    if divisor:
        assert foretold[0] % divisor == 0
        assert foretold[1] % divisor == 0
    if fit in ("crop", "stretch"):
        assert all(t - max(divisor, 1) < f <= t for f, t in zip(foretold, target, strict=True))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("method", METHODS)
def test_a_stack_is_resized_picture_by_picture(fit, method):
    options = {"width": 30, "height": 24, "fit": fit, "method": method}
    stack = resize_frames(NOISE, **options)
    for frame, resized in zip(NOISE, stack, strict=True):
        assert np.array_equal(resize_frames(frame, **options), resized)


@pytest.mark.parametrize("method", METHODS)
def test_same_size_changes_nothing(method):
    same = resize_frames(NOISE, width=53, height=37, fit="stretch", method=method)
    assert np.array_equal(same, NOISE)


def test_crop_keeps_the_named_part():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, :, 0] = np.arange(30) * 8
    options = {"width": 10, "height": 10, "fit": "crop"}
    starts = {p: resize_frames(wide, **options, position=p)[0, 0, 0] // 8 for p in POSITIONS}
    assert starts == {"center": 10, "top": 10, "bottom": 10, "left": 0, "right": 20}
    tall = wide.transpose(1, 0, 2)
    starts = {p: resize_frames(tall, **options, position=p)[0, 0, 0] // 8 for p in POSITIONS}
    assert starts == {"center": 10, "top": 0, "bottom": 20, "left": 10, "right": 10}


@pytest.mark.parametrize(
    ("position", "top"), [("center", 5), ("top", 0), ("bottom", 10), ("left", 5), ("right", 5)]
)
def test_pad_places_the_picture_and_fills_the_rest(position, top):
    white = np.full((10, 20, 3), 255, np.uint8)
    options = {"width": 20, "height": 20, "fit": "pad", "position": position}
    padded = resize_frames(white, **options, pad_color=(9, 8, 7))
    inside = (padded == 255).all(axis=2)
    assert inside.sum() == 200
    assert inside[top : top + 10].all()
    assert (padded[~inside] == (9, 8, 7)).all()
    assert (resize_frames(white, **options) == 255).all()


def test_pad_gives_back_what_the_divisor_took():
    picture = np.zeros((100, 75, 3), np.uint8)
    padded = resize_frames(picture, width=64, height=96, fit="pad", divisible_by=32)
    # Fitted inside: 64 x 85, floored to 64 x 64; 11 rows were spare, 5 of them above.
    assert padded.shape == (96, 64, 3)
    assert (padded[:5] == 255).all()
    assert (padded[5:69] == 0).all()
    assert (padded[69:] == 255).all()


def test_one_side_zero_is_derived():
    assert resized_size(60, 40, target_width=0, target_height=20, fit="resize", divisible_by=1) == (
        30,
        20,
    )
    assert resized_size(60, 40, target_width=30, target_height=0, fit="pad", divisible_by=1) == (
        30,
        20,
    )
    assert resized_size(60, 40, target_width=0, target_height=0, fit="resize", divisible_by=16) == (
        48,
        32,
    )
    assert resized_size(60, 40, target_width=0, target_height=20, fit="crop", divisible_by=1) == (
        60,
        20,
    )


@pytest.mark.parametrize(
    "change",
    [
        {"width": 20},
        {"height": 20},
        {"fit": "stretch"},
        {"position": "left"},
        {"divisible_by": 16},
        {"method": "area"},
    ],
)
def test_every_option_changes_the_result(change):
    plain = {"width": 30, "height": 30}
    changed = fit_frame(NOISE[0], Sizing(**{**plain, **change}))
    original = fit_frame(NOISE[0], Sizing(**plain))
    assert changed.shape != original.shape or not np.array_equal(changed, original)


def test_pad_color_changes_the_result():
    options = {"width": 60, "height": 60, "fit": "pad"}
    black = resize_frames(NOISE[0], **options, pad_color=(0, 0, 0))
    assert not np.array_equal(black, resize_frames(NOISE[0], **options))


def test_a_sliver_is_refused_with_advice():
    with pytest.raises(MediaError, match="fit 'crop'") as caught:
        resized_size(
            4000, 10, target_width=416, target_height=672, fit="resize", divisible_by=32, field="x"
        )
    assert caught.value.code == "UNSUPPORTED_MEDIA"
    assert caught.value.field == "x"


@pytest.mark.parametrize(
    "option",
    [{"fit": "cover"}, {"position": "middle"}, {"method": "magic"}, {"width": -1}],
)
def test_unknown_options_are_refused(option):
    with pytest.raises(InvalidRequest, match=next(iter(option))):
        fit_frame(NOISE[0], Sizing(**{"width": 30, "height": 30, **option}))

"""The conversions between 8-bit frames and [-1, 1]."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from xicon_infer.errors import InvalidRequest
from xicon_infer.ops.pixels import NORMALIZATIONS, frames_to_model, half_size, model_to_frames

RAMP = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.just(3))


def video(*values):
    """A model video of one grey pixel per value."""
    return torch.tensor(values, dtype=torch.float32).view(1, 1, 1, 1, -1).repeat(1, 3, 1, 1, 1)


def levels(x, **kwargs):
    return model_to_frames(x, **kwargs)[0, 0, :, 0].tolist()


def test_every_level_becomes_x_over_127_5_minus_1():
    model = frames_to_model(RAMP)
    assert model.shape == (1, 3, 1, 16, 16)
    assert model.dtype == torch.float32
    wanted = np.arange(256, dtype=np.float32) / np.float32(127.5) - 1
    assert np.array_equal(model[0, 1, 0].flatten().numpy(), wanted)
    assert (model.min(), model.max()) == (-1, 1)


def test_channels_and_frames_stay_in_their_order():
    frames = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    model = frames_to_model(frames)
    assert model[0, 2, 1, 3, 4] == np.float32(frames[1, 3, 4, 2]) / 127.5 - 1


@settings(deadline=None)
@given(npst.arrays(np.uint8, SHAPES))
def test_there_and_back_is_the_identity(frames):
    assert np.array_equal(model_to_frames(frames_to_model(frames)), frames)
    assert np.array_equal(model_to_frames(frames_to_model(torch.from_numpy(frames))), frames)


def test_half_precision_is_rounded_after_float32():
    exact = frames_to_model(RAMP)
    for dtype in (torch.bfloat16, torch.float16):
        half = frames_to_model(RAMP, dtype=dtype)
        assert half.dtype == dtype
        assert torch.equal(half, exact.to(dtype))
    # float16 still tells every level apart.
    assert np.array_equal(model_to_frames(frames_to_model(RAMP, dtype=torch.float16)), RAMP)


def test_the_device_is_followed():
    assert frames_to_model(RAMP, device="meta").device.type == "meta"


def test_frames_that_cannot_be_written_or_lie_backwards_are_accepted():
    frozen = RAMP.copy()
    frozen.setflags(write=False)
    assert torch.equal(frames_to_model(frozen), frames_to_model(RAMP))
    assert torch.equal(frames_to_model(RAMP[:, ::-1]), frames_to_model(RAMP).flip(3))


def test_the_input_is_left_alone():
    x = video(-0.5, 2.0)
    before = x.clone()
    for normalization in NORMALIZATIONS:
        model_to_frames(x, normalization=normalization)
    assert torch.equal(x, before)


def test_default_clamps_and_rounds_half_up():
    half = 2 * (100.5 / 255) - 1
    assert levels(video(-7, -1, 0, half + 1e-6, half - 1e-6, 1, 3)) == [
        0,
        0,
        128,
        101,
        100,
        255,
        255,
    ]


def test_minmax_stretches_and_none_only_clamps():
    x = video(-3, 0, 1)
    assert levels(x, normalization="minmax") == [0, 191, 255]
    assert levels(x, normalization="none") == [0, 0, 255]
    assert levels(video(0.5, 0.25), normalization="none") == [128, 64]
    assert levels(video(2, 2), normalization="minmax") == [0, 0]


def test_chunks_give_the_frames_of_the_whole():
    x = torch.randn(1, 3, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    for normalization in NORMALIZATIONS:
        span = (x.min().item(), x.max().item())
        parts = [
            model_to_frames(part, normalization=normalization, value_range=span)
            for part in torch.split(x, 4, dim=2)
        ]
        whole = model_to_frames(x, normalization=normalization)
        assert np.array_equal(np.concatenate(parts), whole)
    first = model_to_frames(x[:, :, :1], normalization="minmax")
    assert not np.array_equal(first, model_to_frames(x, normalization="minmax")[:1])


def test_results_are_contiguous_uint8_arrays():
    frames = model_to_frames(torch.zeros(1, 3, 2, 4, 6, dtype=torch.bfloat16))
    assert frames.dtype == np.uint8
    assert frames.shape == (2, 4, 6, 3)
    assert frames.flags.c_contiguous


def test_half_size_is_the_mean_of_two_by_two():
    x = torch.arange(24, dtype=torch.float32).view(1, 4, 6)
    assert half_size(x).tolist() == [[[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]]
    interpolated = torch.nn.functional.interpolate(
        x[None], scale_factor=0.5, mode="bilinear", align_corners=False
    )
    assert torch.equal(half_size(x[None]), interpolated)
    frames = np.array([0, 1, 1, 0, 255, 255, 255, 254], np.uint8).reshape(2, 2, 2, 1)
    halves = half_size(frames.repeat(3, axis=3))
    assert halves.dtype == np.uint8
    assert halves[:, 0, 0, 1].tolist() == [1, 255]


@settings(deadline=None)
@given(npst.arrays(np.uint8, (2, 4, 6, 3)))
def test_half_size_of_bytes_is_that_of_the_floats_rounded_half_up(frames):
    floats = torch.from_numpy(frames).double().permute(3, 0, 1, 2)
    wanted = (half_size(floats) + 0.5).floor().permute(1, 2, 3, 0).numpy()
    assert np.array_equal(half_size(frames), wanted)


def test_wrong_inputs_are_refused():
    with pytest.raises(InvalidRequest, match="wanted uint8"):
        frames_to_model(RAMP.astype(np.float32))
    with pytest.raises(InvalidRequest, match="wanted uint8"):
        frames_to_model(RAMP[0])
    with pytest.raises(InvalidRequest, match=r"wanted \[1, 3, F, H, W\]"):
        model_to_frames(torch.zeros(2, 3, 1, 4, 4))
    with pytest.raises(InvalidRequest, match="'histogram'; allowed: default, minmax, none"):
        model_to_frames(video(0), normalization="histogram")
    with pytest.raises(InvalidRequest, match="3 high and 4 wide"):
        half_size(torch.zeros(3, 4))
    with pytest.raises(InvalidRequest, match="wanted a float one"):
        half_size(torch.zeros(1, 4, 4, 3, dtype=torch.uint8))

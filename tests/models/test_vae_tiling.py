"""Tiles: where they lie, how they are blended, and that they stream."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.vae_cases import noise, tiny_vae
from xicon_infer.errors import InvalidRequest
from xicon_infer.models.vae_tiling import (
    TileOptions,
    iter_tiled_decode,
    spans,
    tiled_decode,
    tiled_encode,
    tiled_encode_chunks,
)

TILES = TileOptions(4, 3, 3, 2)
LATENTS = noise(1, 4, 3, 7, 6)
VIDEO = noise(1, 3, 9, 56, 48)


def test_one_tile_over_everything_is_the_untiled_result():
    vae = tiny_vae()
    for tiles in (TileOptions(7, 6, 5, 5), TileOptions(34, 34, 18, 16)):
        assert torch.equal(tiled_decode(vae, LATENTS, tiles), vae.decode(LATENTS).clamp(-1, 1))
        assert torch.equal(tiled_encode(vae, VIDEO, tiles), vae.encode(VIDEO))


def test_the_defaults_are_the_values_of_the_graph():
    assert TileOptions.from_pixels(272, 272, 144, 128) == TileOptions()


def test_x_of_the_node_is_the_height():
    tiles = TileOptions.from_pixels(80, 64, 47, 32)
    assert tiles == TileOptions(height=10, width=8, stride_height=5, stride_width=4)


@pytest.mark.parametrize("field", ["height", "width", "stride_height", "stride_width"])
def test_every_option_changes_the_result(field):
    vae = tiny_vae()
    values = {"height": 4, "width": 4, "stride_height": 2, "stride_width": 2}
    changed = {**values, field: values[field] + 1}
    for run, x in ((tiled_decode, LATENTS), (tiled_encode, VIDEO)):
        a, b = (run(vae, x, TileOptions(**options)) for options in (values, changed))
        assert a.shape == b.shape
        assert not torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ((4, 4, 4, 2), "stride_height"),
        ((4, 4, 0, 2), "stride_height"),
        ((4, 4, 2, 5), "stride_width"),
        ((1, 4, 1, 1), "stride_height"),
    ],
)
def test_strides_that_leave_no_overlap_are_refused(values, field):
    with pytest.raises(InvalidRequest, match=f"{field} is .*below the tile's") as error:
        TileOptions(*values)
    assert error.value.field == field


@settings(deadline=None)
@given(length=st.integers(1, 60), size=st.integers(2, 40), data=st.data())
def test_tiles_cover_everything_and_none_is_needless(length, size, data):
    stride = data.draw(st.integers(1, size - 1))
    tiles = spans(length, size, stride)
    covered = {cell for start, stop in tiles for cell in range(start, stop)}
    assert covered == set(range(length))
    assert tiles[0][0] == 0
    assert tiles[-1][1] == length
    assert all(stop < length for _, stop in tiles[:-1])
    assert all(b[0] - a[0] == stride for a, b in pairwise(tiles))


class Ones:
    """A VAE that decodes and encodes anything to ones, and counts its calls."""

    def __init__(self, vae):
        self.config, self.conv2, self.begin = vae.config, vae.conv2, vae.begin
        self.calls = 0

    def embed(self, latents):
        return latents

    def decode_step(self, latents, state):
        self.calls += 1
        batch, _, frames, height, width = latents.shape
        return torch.full((batch, 3, frames, 8 * height, 8 * width), 0.5)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(2, 12), st.integers(2, 12), st.data())
def test_the_shares_of_the_tiles_sum_to_one_everywhere(height, width, tall, wide, data):
    tiles = TileOptions(
        tall, wide, data.draw(st.integers(1, tall - 1)), data.draw(st.integers(1, wide - 1))
    )
    vae = Ones(tiny_vae())
    video = tiled_decode(vae, torch.zeros(1, 4, 1, height, width), tiles)
    torch.testing.assert_close(video, torch.full((1, 3, 1, 8 * height, 8 * width), 0.5))
    counts = (spans(height, tall, tiles.stride_height), spans(width, wide, tiles.stride_width))
    assert vae.calls == len(counts[0]) * len(counts[1])


def test_the_result_is_that_of_whole_tiles_blended():
    # Two tiles side by side, blended by hand: 3 cells each, 1 shared, ramps of 8 pixels.
    vae, latents = tiny_vae(dtype=torch.float64), noise(1, 4, 3, 2, 5).double()
    left, right = vae.decode(latents[..., :3]), vae.decode(latents[..., 2:])
    ramp = torch.arange(1, 9, dtype=torch.float64) / 8
    up, down = ramp / (ramp + ramp.flip(0)), ramp.flip(0) / (ramp + ramp.flip(0))
    shared = left[..., 16:] * down + right[..., :8] * up
    wanted = torch.cat([left[..., :16], shared, right[..., 8:]], dim=-1).clamp(-1, 1)
    got = tiled_decode(vae, latents, TileOptions(2, 3, 1, 2))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_tiles_stream_over_time(chunk):
    vae = tiny_vae(dtype=torch.float64, fast=True)
    latents, video = LATENTS.double(), VIDEO.double()
    pieces = list(iter_tiled_decode(vae, latents, TILES, chunk=chunk))
    assert [piece.shape[2] for piece in pieces] == {1: [1, 4, 4], 2: [1, 8], 5: [1, 8]}[chunk]
    wanted = tiled_decode(vae, latents, TILES)
    torch.testing.assert_close(torch.cat(pieces, dim=2), wanted, rtol=1e-6, atol=1e-6)
    got = tiled_encode_chunks(vae, iter(torch.split(video, 2, dim=2)), TILES, chunk=chunk)
    wanted = tiled_encode(vae, video, TILES)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_tiled_results_keep_the_dtype_of_the_weights_and_the_range():
    vae = tiny_vae(dtype=torch.bfloat16)
    video = tiled_decode(vae, 5 * LATENTS, TILES)
    assert video.dtype == torch.bfloat16
    assert video.abs().max() == 1
    assert tiled_encode(vae, VIDEO, TILES).dtype == torch.bfloat16


def test_wrong_shapes_are_refused_at_once():
    vae = tiny_vae()
    with pytest.raises(InvalidRequest, match="latents is"):
        iter_tiled_decode(vae, torch.zeros(1, 3, 1, 4, 4), TILES)
    with pytest.raises(InvalidRequest, match="chunk is 0"):
        iter_tiled_decode(vae, LATENTS, TILES, chunk=0)
    with pytest.raises(InvalidRequest, match="video is"):
        tiled_encode(vae, torch.zeros(1, 3, 1, 12, 8), TILES)

"""Memory does not grow with the number of frames, and no frame is copied without need."""

from __future__ import annotations

import pytest
import torch

from tests.models.vae_cases import CudnnLayout, Meter, PlainKernels, noise, tiny_vae
from xicon_infer.models import vae, vae_layers
from xicon_infer.models.vae import VAEConfig
from xicon_infer.models.vae_layers import (
    AttentionBlock,
    CausalConv3d,
    Downsample,
    ResidualBlock,
    Upsample,
)
from xicon_infer.models.vae_tiling import TileOptions, iter_tiled_decode, tiled_encode_chunks
from xicon_infer.ops import vae_kernels

TILES = TileOptions(3, 3, 2, 2)


def decode(vae, frames, chunk=1):
    for piece in vae.iter_decode(noise(1, 4, (frames - 1) // 4 + 1, 4, 4), chunk=chunk):
        del piece


def decode_tiled(vae, frames):
    for piece in iter_tiled_decode(vae, noise(1, 4, (frames - 1) // 4 + 1, 4, 4), TILES):
        del piece


def frames_one_by_one(frames):
    for i in range(frames):
        yield noise(1, 3, 1, 32, 32, seed=i)


def encode(vae, frames):
    vae.encode_chunks(frames_one_by_one(frames))


def encode_tiled(vae, frames):
    tiled_encode_chunks(vae, frames_one_by_one(frames), TILES)


def peak(run, *args):
    with Meter() as meter:
        run(*args)
    return meter.peak


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("run", [decode, encode, decode_tiled, encode_tiled])
def test_the_peak_does_not_grow_with_the_number_of_frames(run, fast):
    vae = tiny_vae(fast=fast)
    short, long = peak(run, vae, 9), peak(run, vae, 33)
    # What may grow is the latents: 6 more of 4 x 4 x 4 floats, in, embedded and out.
    assert long - short <= 3 * 6 * 4 * 4 * 4 * 4
    assert short > 100_000


def test_the_meter_sees_what_grows():
    vae = tiny_vae()
    one = peak(decode, vae, 33)
    assert peak(decode, vae, 33, 4) > 1.5 * one

    def keep_all(frames):
        return list(vae.iter_decode(noise(1, 4, (frames - 1) // 4 + 1, 4, 4)))

    assert peak(keep_all, 33) > one + 16 * 3 * 32 * 32 * 4


SMALL = VAEConfig(dim=8, z_dim=4)
ALLOCATIONS = ("new_empty", "empty", "empty_like", "new_zeros", "zeros", "cat", "clone")
COPIES = ("copy_", "clone", "cat", "fill_", "zero_")


@pytest.fixture
def plain_kernels(monkeypatch):
    monkeypatch.setattr(vae_kernels, "_triton", lambda: PlainKernels)
    monkeypatch.setattr(vae, "why_not_fused", lambda *_: "")


@pytest.fixture(autouse=True)
def convolutions_of_a_gpu(monkeypatch):
    """What is counted here is what a GPU does, which has no oneDNN."""
    monkeypatch.setattr(vae_layers, "has_onednn", lambda: False)


def steady_decode(model, chunk=1):
    """The calls of the third step of a decode, when everything has its size."""
    state, embedded = model.begin(), model.embed(noise(1, 4, 1 + 3 * chunk, 4, 3))
    parts = torch.split(embedded, [1, chunk, chunk, chunk], dim=2)
    for part in parts[:3]:
        model.decode_step(part, state)
    with CudnnLayout() as meter:
        model.decode_step(parts[3], state)
    return meter.calls, state


def steady_encode(model, chunk=1):
    state, video = model.begin(), noise(1, 3, 1 + 12 * chunk, 32, 24)
    video = video.contiguous(memory_format=torch.channels_last_3d)
    parts = torch.split(video, [1, 4 * chunk, 4 * chunk, 4 * chunk], dim=2)
    for part in parts[:3]:
        model.encode_step(part, state)
    with CudnnLayout() as meter:
        model.encode_step(parts[3], state)
    return meter.calls, state


def total(calls, names):
    return sum(calls[name] for name in names)


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_plain_fast_step_stays_within_its_budget_of_copies(chunk):
    model = tiny_vae(SMALL, fast=True).to_channels_last()
    calls, state = steady_decode(model, chunk)
    # Remembered frames in and out of every convolution; input of the three without a norm; two
    # frames from one, twice. Before windows were reused: 71 copies and 34 new tensors.
    assert calls["copy_"] == 2 * len(state.kept) + 3 + 2 == 69
    assert total(calls, COPIES) - calls["cat"] == 69
    assert total(calls, ALLOCATIONS) == calls["cat"] == 1  # attention, joined from pieces
    assert calls["convolution"] == len(state.kept) + 3
    calls, state = steady_encode(model, chunk)
    # Besides, the picture with its border, three times in three calls; the latents as they go.
    assert calls["copy_"] == 2 * len(state.kept) + 3 + 3 == 54
    assert calls["fill_"] == 6
    assert total(calls, ALLOCATIONS) == 2


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_step_with_kernels_copies_nothing(plain_kernels, chunk):
    model = tiny_vae(SMALL, fast=True, kernels="triton").to_channels_last()
    calls, state = steady_decode(model, chunk)
    assert total(calls, COPIES) == total(calls, ALLOCATIONS) == calls["cat"] == 1
    assert calls["vae_window"] == len(state.kept) == 32
    # Every residual block ends in one, every doubling of the picture too.
    assert (calls["vae_add"], calls["vae_interleave"]) == (14 + 3, 2)
    # The one norm that no convolution follows in space, and its residual.
    assert (calls["linalg_vector_norm"], calls["add_"], calls["silu_"]) == (1, 1, 0)
    calls, state = steady_encode(model, chunk)
    assert (calls["copy_"], calls["fill_"], calls["clone"], calls["cat"]) == (3, 6, 1, 1)
    assert calls["vae_window"] == len(state.kept)


def test_weights_in_another_layout_are_converted_in_every_call(plain_kernels):
    # What `to_channels_last` is for; the loading of a VAE calls it.
    converted = [
        total_of["converted"]
        for run in (steady_decode, steady_encode)
        for model in (tiny_vae(SMALL, fast=True), tiny_vae(SMALL, fast=True).to_channels_last())
        for total_of, _ in [run(model)]
    ]
    assert converted[0] > 25
    assert converted[1] == 0
    assert converted[2] > 20
    assert converted[3] == 0


@pytest.mark.parametrize("kernels", ["eager", "triton"])
@pytest.mark.parametrize("frames", [1, 2])
def test_activations_keep_their_channels_last(plain_kernels, kernels, frames):
    """Every block, and every convolution in it, takes and gives channels that lie together."""
    model = tiny_vae(SMALL, fast=True, kernels=kernels).to_channels_last()
    seen, wrong = [], []

    def look(name):
        def hook(module, args, out):
            seen.append(name)
            if any(x.shape[-1] > 1 and x.stride(-1) != 1 for x in (args[0], out)):
                wrong.append(name)

        return hook

    kinds = (CausalConv3d, ResidualBlock, AttentionBlock, Upsample, Downsample)
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            module.register_forward_hook(look(name))
    with CudnnLayout():
        steady_decode(model, frames)
        steady_encode(model, frames)
    assert len(seen) == 348
    assert not wrong


def test_the_window_of_every_chunk_is_the_same_memory():
    model = tiny_vae(SMALL, fast=True)
    state, embedded = model.begin(), model.embed(noise(1, 4, 6, 4, 3))
    places = []
    for i in range(5):
        model.decode_step(embedded[:, :, i : i + 1], state)
        kept = tuple(value.data_ptr() for value in state.kept.values())
        places.append((state.scratch.memory.data_ptr(), state.scratch.memory.numel(), kept))
    assert places[1:] == places[1:2] * 4
    assert places[0] != places[1]
    # As large as the largest input of a convolution, in the last level.
    assert places[1][1] == (4 + 2) * 32 * 24 * SMALL.dim


def test_tiles_work_in_one_memory():
    model = tiny_vae(SMALL, fast=True)
    with Meter() as meter:
        for piece in iter_tiled_decode(model, noise(1, 4, 3, 6, 6), TILES):
            del piece
    alone = Meter()
    with alone:
        for piece in model.iter_decode(noise(1, 4, 3, 3, 3)):
            del piece
    # 25 tiles remember 25 times as much, but only one works at a time.
    assert meter.calls["new_empty"] < 2 * alone.calls["new_empty"]

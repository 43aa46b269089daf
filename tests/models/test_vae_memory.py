"""Memory does not grow with the number of frames, and no frame is copied without need."""

from __future__ import annotations

import pytest
import torch

from tests.models.vae_cases import Meter, noise, tiny_vae
from xicon_infer.models.vae import VAEConfig
from xicon_infer.models.vae_tiling import TileOptions, iter_tiled_decode, tiled_encode_chunks

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


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="layouts of oneDNN")
def test_a_fast_decode_step_stays_within_its_budget_of_copies():
    # Large enough for the kernels that keep the layout of their input.
    vae = tiny_vae(VAEConfig(dim=32, z_dim=4), fast=True).to_channels_last()
    state, latents = vae.begin(), noise(1, 4, 3, 54, 1)
    embedded = vae.embed(latents)
    for i in range(2):
        vae.decode_step(embedded[:, :, i : i + 1], state)
    with Meter() as meter:
        vae.decode_step(embedded[:, :, 2:], state)
    # Remembered frames in and out of every convolution; input of the three without a norm; two
    # frames from one, twice.
    assert meter.calls["copy_"] <= 2 * len(state.kept) + 3 + 2 * 2
    assert meter.calls["clone"] == 0
    assert meter.calls["cat"] <= 1
    assert meter.calls["convolution"] == len(state.kept) + 3

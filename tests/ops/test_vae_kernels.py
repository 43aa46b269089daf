"""The fused elementwise work of the VAE: its plain form here, its kernels in the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.models.vae_cases import noise, tiny_vae
from xicon_infer.errors import BackendUnavailable
from xicon_infer.ops.vae_kernels import (
    add_bias,
    channel_norm,
    fill_window,
    fits,
    interleave,
    why_not_fused,
)


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_a_window_has_the_past_in_front_and_remembers_its_end(frames):
    x, kept = noise(1, frames, 2, 3, 8), noise(1, 2, 2, 3, 8, seed=2)
    before, window = kept.clone(), torch.empty(1, 2 + frames, 2, 3, 8)
    fill_window(x, None, None, kept, window, fused=False)
    assert torch.equal(window, torch.cat((before, x), dim=1))
    assert torch.equal(kept, window[:, -2:])
    assert not torch.equal(kept, before)


def test_gain_and_bias_act():
    x, gain, bias = noise(1, 1, 2, 3, 8), noise(8, seed=3), noise(8, seed=4)
    results = []
    for parts in ((None, None), (gain, None), (gain, bias), (None, bias)):
        window = torch.empty(1, 2, 2, 3, 8)
        fill_window(x, *parts, torch.zeros(1, 1, 2, 3, 8), window, fused=False)
        results.append(window[:, 1:])
    assert torch.equal(results[0], x)
    assert torch.equal(results[3], x + bias)
    torch.testing.assert_close(results[1], torch.nn.functional.silu(channel_norm(x, gain)))
    assert not torch.allclose(results[1], results[2])


def test_the_plain_forms():
    y, other, bias = noise(1, 1, 2, 2, 4), noise(1, 1, 2, 2, 4, seed=2), noise(4, seed=3)
    assert torch.equal(add_bias(y.clone(), None, other, fused=False), y + other)
    assert torch.equal(add_bias(y.clone(), bias, None, fused=False), y + bias)
    changed = y.clone()
    assert add_bias(changed, bias, other, fused=False) is changed
    out = torch.empty(1, 2, 2, 2, 2)
    interleave(y, None, out, fused=False)
    assert torch.equal(out[:, :1], y[..., :2])
    assert torch.equal(out[:, 1:], y[..., 2:])


def test_the_kernels_say_why_they_do_not_run():
    assert "CUDA" in why_not_fused(torch.device("cpu"), torch.float32)
    assert "float64" in why_not_fused(torch.device("cpu"), torch.float64)
    assert fits(torch.bfloat16, 384)
    assert not fits(torch.float64, 384)
    assert not fits(torch.float32, 1025)
    with pytest.raises(BackendUnavailable, match="'triton' do not run in the VAE on cpu: needs a"):
        tiny_vae(fast=True, kernels="triton").begin()
    assert "asked" in tiny_vae(fast=True, kernels="eager").why_not_fused()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_on_a_gpu(dtype):
    assert why_not_fused(torch.device("cuda"), dtype) == ""


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*TF32")  # some PyTorch tell of another way to switch it off
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_vae_with_kernels_on_a_gpu(chunk):
    plain, fused = (tiny_vae(kernels=kernels).cuda() for kernels in ("eager", "triton"))
    latents = noise(1, 4, 5, 6, 9)
    # Not every kernel of cuDNN rounds to TF32, and another chunk may get another one.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        wanted, got = plain.decode(latents), fused.decode(latents, chunk=chunk)
    assert ((got - wanted).norm() / wanted.norm()) < 1e-3

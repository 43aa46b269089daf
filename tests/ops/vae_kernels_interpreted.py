"""The kernels of the VAE in Triton's interpreter; `test_vae_kernels` runs this file so.

Triton decides at import whether it interprets, so these tests need a process of their own.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.vae_cases import noise, tiny_vae
from xicon_infer.errors import BackendUnavailable
from xicon_infer.ops import vae_kernels, vae_triton

CPU = torch.device("cpu")


def draw(*size, seed, scale=1.0, dtype=torch.float32):
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(dtype)


def formula(x, gain, bias):
    """What a new frame of a window is, in float64."""
    x = x.double() + (0 if bias is None else bias.double())
    if gain is None:
        return x
    norm = x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    y = x / norm * math.sqrt(x.shape[-1]) * gain.double()
    return y * torch.sigmoid(y)


def test_triton_is_interpreted_here():
    assert vae_triton.is_interpreted()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert vae_kernels.why_not_fused(CPU, dtype) == ""
    assert "float64" in vae_kernels.why_not_fused(CPU, torch.float64)


WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([96, 192, 384, 1024]))


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, n) for n in (2, 5, 4, 5)]),
    channels=WIDTHS,
    keep=st.integers(1, 2),
    scale=st.sampled_from([0.0, 1e-20, 1.0, 1e4]),
    parts=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_a_window_is_what_the_formula_says(sizes, channels, keep, scale, parts, seed):
    batch, frames, *size = sizes
    x = draw(*sizes, channels, seed=seed, scale=scale)
    gain = draw(channels, seed=seed + 1) if parts[0] else None
    bias = draw(channels, seed=seed + 2, scale=scale) if parts[1] else None
    kept = draw(batch, keep, *size, channels, seed=seed + 3)
    wanted = torch.cat((kept.double(), formula(x, gain, bias)), dim=1)
    window = torch.full((batch, keep + frames, *size, channels), torch.nan)
    vae_kernels.fill_window(x, gain, bias, kept, window, fused=True)
    torch.testing.assert_close(window.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(kept, window[:, -keep:])


@settings(max_examples=5, deadline=None)
@given(frames=st.integers(1, 3), channels=st.integers(1, 200), seed=st.integers(0, 99))
def test_biases_residuals_and_interleaving(frames, channels, seed):
    size = (2, frames, 3, 5)
    y, other = draw(*size, channels, seed=seed), draw(*size, channels, seed=seed + 1)
    bias = draw(channels, seed=seed + 2)
    for residual in (None, other):
        wanted = y + bias + (0 if residual is None else residual)
        got = vae_kernels.add_bias(y.clone(), bias, residual, fused=True)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    pairs, bias = draw(*size, 2 * channels, seed=seed), draw(2 * channels, seed=seed)
    out = torch.empty(2, 2 * frames, 3, 5, channels)
    vae_kernels.interleave(pairs, bias, out, fused=True)
    first, second = (pairs + bias).chunk(2, dim=-1)
    assert torch.equal(out[:, ::2], first)
    assert torch.equal(out[:, 1::2], second)


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_half_precision_is_rounded_once(dtype, step):
    x, gain = draw(1, 2, 3, 4, 96, seed=0, dtype=dtype), draw(96, seed=1, dtype=dtype)
    kept, window = (
        torch.zeros(1, 2, 3, 4, 96, dtype=dtype),
        torch.empty(1, 4, 3, 4, 96, dtype=dtype),
    )
    vae_kernels.fill_window(x, gain, None, kept, window, fused=True)
    wanted = formula(x, gain, None)
    error = (window[:, 2:].double() - wanted).abs() / wanted.abs().clamp_min(1e-3)
    # The interpreter cuts bfloat16 off where a GPU rounds: one step and not half of one.
    assert error.max() <= step * 1.01


def test_what_is_not_a_number_stays_in_its_pixel():
    x = draw(1, 1, 2, 3, 8, seed=0)
    x[0, 0, 1, 2, 5] = torch.nan
    window = torch.zeros(1, 2, 2, 3, 8)
    vae_kernels.fill_window(x, torch.ones(8), None, torch.zeros(1, 1, 2, 3, 8), window, fused=True)
    bad = torch.isnan(window).any(dim=-1)
    assert bad.nonzero().tolist() == [[0, 1, 1, 2]]


def test_strides_do_not_matter():
    x = draw(1, 2, 8, 3, 4, seed=0).movedim(2, -1)
    assert not x.is_contiguous()
    windows = [torch.empty(1, 3, 3, 4, 8) for _ in range(2)]
    for given_x, window in zip((x, x.contiguous()), windows, strict=True):
        kept = torch.zeros(1, 1, 3, 4, 8)
        vae_kernels.fill_window(given_x, torch.ones(8), None, kept, window, fused=True)
    assert torch.equal(*windows)


def test_the_operators_tell_the_truth_about_themselves():
    gain, window = torch.ones(8), torch.zeros(1, 3, 2, 2, 8)
    x, kept = draw(1, 1, 2, 2, 8, seed=0), torch.zeros(1, 2, 2, 2, 8)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.xicon.vae_window, (x, gain, None, kept, window), test_utils=checks
    )
    torch.library.opcheck(torch.ops.xicon.vae_add, (x.clone(), gain, None), test_utils=checks)
    out = torch.empty(1, 2, 2, 2, 4)
    torch.library.opcheck(torch.ops.xicon.vae_interleave, (x, gain, out), test_utils=checks)


def test_a_graph_compiles_as_one():
    def step(x, gain, kept, window):
        vae_kernels.fill_window(x, gain, None, kept, window, fused=True)
        return window * 2

    x, gain = draw(1, 2, 2, 2, 8, seed=0), torch.ones(8)
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        kept, window = torch.zeros(1, 2, 2, 2, 8), torch.zeros(1, 4, 2, 2, 8)
        results.append((run(x, gain, kept, window), kept))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_whole_vae_gives_the_same_pictures(chunk, batch):
    plain, fused = (tiny_vae(fast=True, kernels=kernels) for kernels in ("eager", "triton"))
    assert fused.begin().fused
    assert not plain.begin().fused
    latents, video = noise(batch, 4, 4, 1, 2), noise(batch, 3, 9, 8, 8)
    for wanted, got in (
        (plain.decode(latents), fused.decode(latents, chunk=chunk)),
        (plain.encode(video), fused.encode(video, chunk=chunk)),
    ):
        assert ((got - wanted).norm() / wanted.norm()) < 2e-5


def test_too_many_channels_are_left_to_plain_operations(monkeypatch):
    monkeypatch.setattr("xicon_infer.models.vae.MAX_CHANNELS", 8)
    vae = tiny_vae(fast=True, kernels="triton")
    with pytest.raises(BackendUnavailable, match="8 channels"):
        vae.begin()
    assert not tiny_vae(fast=True).begin().fused

"""Several linear layers as one, plain and in fp8; rows that were rounded before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.ops.test_linear import random
from xicon_infer.ops import fused_eager
from xicon_infer.ops.linear import (
    FP8_DTYPES,
    MATMULS,
    Fp8Linear,
    QuantizedRows,
    dequantize,
    quantize_activation,
    quantize_weight,
    takes_rows,
)
from xicon_infer.ops.linear_fuse import fuse_linears, fusion_problem

K, N = 32, 16


def plain(seed, *, bias=True, dtype=torch.float32, width=K):
    layer = nn.Linear(width, N, bias=bias, dtype=dtype)
    layer.weight.data = random(N, width, seed=seed).to(dtype)
    if bias:
        layer.bias.data = random(N, seed=seed + 9).to(dtype)
    return layer.requires_grad_(False)


def in_fp8(seed, *, per_row=False, scaled=True, bias=True, dtype=FP8_DTYPES[0]):
    layer = Fp8Linear(K, N, bias=bias, dtype=dtype)
    # Other sizes, so that scales per tensor differ.
    weight, scale = quantize_weight(random(N, K, seed=seed) * (seed + 1), dtype, per_row=per_row)
    layer.weight.data, layer.scale_weight = weight, scale if scaled else None
    if bias:
        layer.bias.data = random(N, seed=seed + 9)
    return layer


def three(make, **options):
    return [make(seed, **options) for seed in range(3)]


def side_by_side(layers, x):
    return torch.cat([layer(x) for layer in layers], -1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_layers(bias, dtype):
    layers, x = three(plain, bias=bias, dtype=dtype), random(5, K).to(dtype)
    fused = fuse_linears(layers)
    assert type(fused) is nn.Linear and fused.weight.shape == (3 * N, K)
    torch.testing.assert_close(fused(x), side_by_side(layers, x))


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_dequantised_weights_are_the_same_bits(dtype, per_row, scaled):
    layers = three(in_fp8, per_row=per_row, scaled=scaled, dtype=dtype)
    fused = fuse_linears(layers)
    assert type(fused) is Fp8Linear and fused.weight.dtype == dtype
    assert (fused.scale_weight is None) == (not scaled)
    for compute in (torch.float32, torch.bfloat16):
        found = dequantize(fused.weight, fused.scale_weight, compute)
        parts = [dequantize(layer.weight, layer.scale_weight, compute) for layer in layers]
        assert torch.equal(found, torch.cat(parts))
        x = random(5, K).to(compute)
        assert torch.equal(fused(x), side_by_side(layers, x))


def test_layers_with_and_without_a_scale():
    layers = [in_fp8(0, scaled=False), in_fp8(1), in_fp8(2, per_row=True)]
    fused = fuse_linears(layers)
    assert fused.scale_weight is not None and fused.scale_weight.shape == (3 * N, 1)
    x = random(4, K)
    assert torch.equal(fused(x), side_by_side(layers, x))


@pytest.mark.parametrize("matmul", MATMULS[1:])
@pytest.mark.parametrize("per_row", [True, False])
def test_products_in_fp8(matmul, per_row):
    layers = three(in_fp8, per_row=per_row)
    for layer in layers:
        layer.matmul = matmul
    x = random(5, K).to(torch.bfloat16)
    fused = fuse_linears(layers)
    assert fused.matmul == matmul
    expected = side_by_side(layers, x).float()
    # Per tensor, scales that became rows multiply the output: product, scale and bias are each
    # rounded to bfloat16.
    exact = matmul == "scaled_mm_row"
    error = ((fused(x).float() - expected).norm() / expected.norm()).item()
    assert error <= (0 if exact else 3 * 2**-9)


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ([plain(0), in_fp8(1)], "merge LoRAs first.*Linear, Fp8Linear"),
        ([plain(0), nn.GELU()], "GELU"),
        ([plain(0), plain(1, dtype=torch.bfloat16)], "several dtypes"),
        ([plain(0), plain(1, width=8)], "several widths"),
        ([plain(0), plain(1, bias=False)], "some have a bias"),
        ([in_fp8(0), in_fp8(1, dtype=FP8_DTYPES[1])], "several dtypes"),
    ],
)
def test_what_cannot_be_fused(layers, match):
    with pytest.raises(TypeError, match=match):
        fuse_linears(layers)
    assert fusion_problem(layers)


def test_fp8_layers_that_multiply_in_several_ways():
    layers = three(in_fp8)
    layers[1].matmul = "scaled_mm_row"
    assert "several ways" in fusion_problem(layers)


def test_a_layer_with_a_lora_is_refused():
    from xicon_infer.ops.lora import LoraFp8Linear

    layers = three(in_fp8)
    layers[2].__class__ = LoraFp8Linear
    assert "merge LoRAs first" in fusion_problem(layers)
    layers[2].matmul = layers[0].matmul = "scaled_mm_row"
    assert takes_rows(layers[0]) and not takes_rows(*layers)


def test_rows_that_were_rounded_before_skip_a_pass():
    layer = in_fp8(0)
    layer.matmul = "scaled_mm_row"
    x = random(2, 3, K).to(torch.bfloat16)
    values, scale = quantize_activation(x.reshape(6, K), by_row=True)
    rows = QuantizedRows(values.reshape(2, 3, K), scale, torch.bfloat16)
    assert torch.equal(layer(rows), layer(x))
    finer, its_scale = fused_eager.quantize(x.float())
    close = layer(QuantizedRows(finer, its_scale, torch.bfloat16)).float()
    assert ((close - layer(x).float()).norm() / close.norm()).item() < 2e-2
    assert layer(QuantizedRows(finer, its_scale, torch.float32)).dtype == torch.float32


@pytest.mark.parametrize("matmul", ["dequant", "scaled_mm_tensor"])
def test_only_row_products_take_rows(matmul):
    layer = in_fp8(0)
    layer.matmul = matmul
    assert not takes_rows(layer) and not takes_rows(plain(0))


def test_a_broken_row_stays_broken_alone():
    x = random(3, K)
    x[1, 4] = float("nan")
    x[2, 0] = float("inf")
    _, scale = fused_eager.quantize(x)
    assert scale.flatten().isnan().tolist() == [False, True, True]

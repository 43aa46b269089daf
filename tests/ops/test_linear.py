"""fp8 storage: rounding, scales, the layer, replacement, and multiplying in fp8."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.parity.golden import Golden
from tests.parity.weights import replay_fp8_linear
from xicon_infer.errors import BackendUnavailable, InvalidRequest
from xicon_infer.ops.linear import (
    FP8_DTYPES,
    MATMULS,
    Fp8Linear,
    cast_fp8,
    dequantize,
    matmul_problem,
    quantize_weight,
    replace_linears,
    use_matmul,
)

GOLDEN = Path(__file__).parents[1] / "golden"
E4M3, E5M2 = FP8_DTYPES


def random(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def fp8_layer(*, dtype=E4M3, per_row=False, bias=True, n=48, k=32, scaled=True):
    weight, scale = quantize_weight(random(n, k, scale=0.02), dtype, per_row=per_row)
    layer = Fp8Linear(k, n, bias=bias, dtype=dtype, scale_shape=tuple(scale.shape))
    layer.weight.data = weight
    layer.scale_weight = scale if scaled else None
    if bias:
        layer.bias.data = random(n, seed=1)
    return layer


def test_golden():
    """CustomLinear of rookiestar28/ComfyUI-WanVideoWrapper; float32, 1e-5; casts exact."""
    path = GOLDEN / "wan_core" / "fp8_linear.safetensors"
    checks = replay_fp8_linear(Golden(path, []))
    assert len(checks) >= 20
    assert [check for check in checks if not check.ok] == []


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_cast_saturates_instead_of_nan(dtype):
    limit = torch.finfo(dtype).max
    x = torch.tensor([limit * 10, -limit * 10, torch.inf, -torch.inf, 1.0])
    assert cast_fp8(x, dtype).float().tolist() == [limit, -limit, limit, -limit, 1.0]


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("per_row", [False, True])
def test_quantize_uses_the_whole_range(dtype, per_row):
    weight = random(6, 10) * torch.logspace(-3, 3, 6)[:, None]
    fp8, scale = quantize_weight(weight, dtype, per_row=per_row)
    assert scale.dtype == torch.float32
    assert scale.shape == ((6, 1) if per_row else (1,))
    largest = fp8.float().abs().amax(1)
    limit = torch.finfo(dtype).max
    assert largest.max() == limit
    assert (largest == limit).sum() == (6 if per_row else 1)
    # Half a step of a number with 3 (e4m3) or 2 (e5m2) bits of mantissa.
    step = {E4M3: 2**-4, E5M2: 2**-3}[dtype]
    error = (dequantize(fp8, scale, torch.float32) - weight).abs()
    floor = scale.expand(6, 1) * torch.finfo(dtype).smallest_normal
    assert bool((error <= step * weight.abs() + floor).all())


def test_per_row_is_closer_than_per_tensor():
    weight = random(16, 32) * torch.logspace(-7, 0, 16)[:, None]
    errors = []
    for per_row in (False, True):
        fp8, scale = quantize_weight(weight, per_row=per_row)
        back = dequantize(fp8, scale, torch.float32)
        errors.append(((back - weight).norm(dim=1) / weight.norm(dim=1)).max().item())
    assert errors[1] < 0.05 < errors[0]


def test_zero_weight_and_zero_row():
    weight = random(3, 4)
    weight[1] = 0
    for tensor, per_row in ((weight, True), (torch.zeros(3, 4), False), (torch.zeros(3, 4), True)):
        fp8, scale = quantize_weight(tensor, per_row=per_row)
        back = dequantize(fp8, scale, torch.float32)
        assert torch.equal(back[1], torch.zeros(4))
        assert back.isfinite().all()


def test_quantize_refuses_other_dtypes():
    with pytest.raises(InvalidRequest, match="bfloat16"):
        quantize_weight(random(2, 2), torch.bfloat16)


@settings(max_examples=40, deadline=None)
@given(
    exponent=st.integers(-20, 20),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    per_row=st.booleans(),
    dtype=st.sampled_from(FP8_DTYPES),
)
def test_requantising_what_was_dequantised_changes_nothing(exponent, rows, columns, per_row, dtype):
    weight = random(rows, columns, seed=exponent) * 2.0**exponent
    fp8, scale = quantize_weight(weight, dtype, per_row=per_row)
    back = dequantize(fp8, scale, torch.float32)
    again, scale_again = quantize_weight(back, dtype, per_row=per_row)
    torch.testing.assert_close(scale_again, scale, rtol=1e-6, atol=0)
    assert torch.equal(again.view(torch.uint8), fp8.view(torch.uint8))


@settings(max_examples=20, deadline=None)
@given(exponent=st.integers(-30, 30), dtype=st.sampled_from(FP8_DTYPES))
def test_scale_follows_the_weight(exponent, dtype):
    weight = random(4, 4, seed=7)
    fp8, scale = quantize_weight(weight, dtype)
    moved, moved_scale = quantize_weight(weight * 2.0**exponent, dtype)
    assert torch.equal(moved.view(torch.uint8), fp8.view(torch.uint8))
    assert moved_scale.item() == scale.item() * 2.0**exponent


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(48, 1), (48,), (1,), (), (1, 1)])
def test_dequantize_rounds_once(compute, shape):
    weight = cast_fp8(random(48, 32, scale=100.0), E4M3)
    scale = (random(*shape, seed=3).abs() + 0.1) / 448
    inside = torch.promote_types(compute, torch.float32)
    expected = (weight.to(inside) * scale.reshape(-1, 1).to(inside)).to(compute)
    assert torch.equal(dequantize(weight, scale, compute), expected)


def test_dequantize_leaves_its_input_alone():
    weight = random(4, 4)
    before = weight.clone()
    dequantize(weight, torch.full((1,), 3.0), torch.float32)
    assert torch.equal(weight, before)
    assert dequantize(weight, None, torch.float32) is weight


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_layer_equals_linear_of_the_dequantised_weight(dtype, per_row, bias, compute):
    layer = fp8_layer(dtype=dtype, per_row=per_row, bias=bias)
    x = random(2, 5, 32, seed=5).to(compute)
    wide = dequantize(layer.weight, layer.scale_weight, compute)
    plain = F.linear(x, wide, layer.bias.to(compute) if bias else None)
    assert torch.equal(layer(x), plain)
    # The formula with the scale outside gives the same up to float32 rounding.
    outside = x.float() @ layer.weight.float().t() * layer.scale_weight.reshape(-1)
    outside = outside + layer.bias if bias else outside
    limit = 2e-6 if compute == torch.float32 else 1e-2
    assert (layer(x).float() - outside).norm() / outside.norm() < limit


def test_layer_is_sensitive_to_every_part():
    layer, x = fp8_layer(per_row=True), random(3, 32)
    y = layer(x)
    layer.scale_weight = layer.scale_weight * torch.linspace(1, 2, 48)[:, None]
    assert torch.equal(layer(x)[:, 0], y[:, 0])
    assert not torch.equal(layer(x)[:, 1], y[:, 1])
    layer.bias.data += 1
    assert not torch.equal(layer(x)[:, 0], y[:, 0])
    layer.scale_weight = None
    assert layer(x).abs().max() > 100 * y.abs().max()


def test_layer_without_scale_uses_the_raw_weight():
    layer, x = fp8_layer(scaled=False, bias=False), random(3, 32)
    assert torch.equal(layer(x), x @ layer.weight.float().t())


def test_float16_does_not_overflow_where_unscaled_products_do():
    layer = fp8_layer(bias=False, k=512)
    x = torch.full((1, 512), 8.0, dtype=torch.float16)
    layer.weight.data = cast_fp8(torch.full((48, 512), 448.0), E4M3)
    assert not F.linear(x, layer.weight.to(torch.float16)).isfinite().all()
    assert layer(x).isfinite().all()


@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.double])
def test_changing_the_dtype_of_a_model_keeps_fp8(move):
    model = nn.Sequential(fp8_layer(per_row=True), nn.Linear(48, 8))
    weight, scale = model[0].weight.data.clone(), model[0].scale_weight.clone()
    x = random(2, 32)
    before = model[0](x)
    move(model)
    assert model[0].weight.dtype == E4M3
    assert torch.equal(model[0].weight.view(torch.uint8), weight.view(torch.uint8))
    assert model[0].scale_weight.dtype == torch.float32
    assert torch.equal(model[0].scale_weight, scale)
    assert model[0].bias.dtype == model[1].weight.dtype != torch.float32
    torch.testing.assert_close(model[0](x), before, rtol=0, atol=0.02)


def test_state_dict_names_are_those_of_the_files():
    assert set(fp8_layer().state_dict()) == {"weight", "bias", "scale_weight"}
    assert set(fp8_layer(scaled=False, bias=False).state_dict()) == {"weight"}


def make_model():
    with torch.device("meta"):
        attention = nn.MultiheadAttention(8, 2)
        return nn.ModuleDict(
            {"a": nn.Linear(8, 16), "b": nn.Linear(8, 4, bias=False), "c": attention}
        )


def test_replace_linears_follows_the_file():
    model = make_model()
    dtypes = {
        "a.weight": E5M2,
        "b.weight": torch.bfloat16,
        "c.in_proj_weight": E4M3,
        "c.out_proj.weight": E4M3,  # read by its owner without being called: must stay
    }
    assert replace_linears(model, dtypes, {"a.scale_weight": (16, 1)}) == ["a"]
    assert isinstance(model["a"], Fp8Linear)
    assert (model["a"].weight.dtype, model["a"].weight.device.type) == (E5M2, "meta")
    assert (model["a"].in_features, model["a"].out_features) == (8, 16)
    assert model["a"].scale_weight.shape == (16, 1)
    assert type(model["b"]) is nn.Linear
    assert not any(isinstance(layer, Fp8Linear) for layer in model["c"].modules())


def test_replace_linears_without_scales_or_bias():
    model = make_model()
    assert replace_linears(model, {"a.weight": E4M3, "b.weight": E4M3}, {}) == ["a", "b"]
    assert model["a"].scale_weight is None
    assert model["a"].bias is not None
    assert model["b"].bias is None


@pytest.mark.parametrize("matmul", MATMULS[1:])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_scaled_mm_is_close_to_dequantising(matmul, per_row, dtype):
    """Both roundings of activations cost about 2.6 % per element, averaged over the sum."""
    layer, x = fp8_layer(per_row=per_row, dtype=dtype), random(2, 7, 32, seed=2)
    expected = layer(x)
    assert use_matmul(layer, matmul, torch.device("cpu")) == []
    y = layer(x)
    assert (y.shape, y.dtype) == (expected.shape, x.dtype)
    error = ((y - expected).norm() / expected.norm()).item()
    assert 0 < error < 0.05
    use_matmul(layer, "dequant", torch.device("cpu"))
    assert torch.equal(layer(x), expected)


def test_row_scales_survive_an_outlier_that_tensor_scales_do_not():
    layer, x = fp8_layer(bias=False), random(4, 32, seed=2)
    x[0] *= 1e5
    expected = layer(x)[1:]
    errors = []
    for matmul in MATMULS[1:]:
        use_matmul(layer, matmul, torch.device("cpu"))
        errors.append(((layer(x)[1:] - expected).norm() / expected.norm()).item())
    assert errors[0] < 0.05 < errors[1]


def test_layers_of_odd_width_stay_on_dequant():
    model = nn.Sequential(fp8_layer(n=40), fp8_layer(k=40), fp8_layer())
    assert use_matmul(model, "scaled_mm_row", torch.device("cpu")) == ["0", "1"]
    assert [layer.matmul for layer in model] == ["dequant", "dequant", "scaled_mm_row"]


def test_a_layer_that_became_wide_never_multiplies_in_fp8():
    layer = fp8_layer()
    use_matmul(layer, "scaled_mm_tensor", torch.device("cpu"))
    layer.weight.data, layer.scale_weight = random(48, 32), None
    x = random(3, 32)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert use_matmul(layer, "scaled_mm_tensor", torch.device("cpu")) == [""]


def test_forcing_what_the_device_lacks_is_an_error():
    assert matmul_problem("scaled_mm_row", "cpu") == ""
    assert matmul_problem("dequant", "meta") == ""
    layer = fp8_layer()
    with pytest.raises(BackendUnavailable, match=r"scaled_mm_row.*meta"):
        use_matmul(layer, "scaled_mm_row", torch.device("meta"))
    assert layer.matmul == "dequant"
    with pytest.raises(InvalidRequest, match=r"fast.*dequant, scaled_mm_row"):
        use_matmul(layer, "fast", torch.device("cpu"))

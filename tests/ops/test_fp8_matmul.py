"""Multiplying in fp8: kernels called as documented, no large copies, scales, bias, fallbacks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.test_linear import fp8_layer, random
from xicon_infer.errors import BackendUnavailable, InvalidRequest
from xicon_infer.ops.linear import (
    FP8_DTYPES,
    MATMULS,
    Fp8Linear,
    best_matmul,
    check_matmul,
    dequantize,
    matmul_problem,
    quantize_activation,
    quantize_weight,
    set_weight,
    use_matmul,
)

CPU = torch.device("cpu")
E4M3, E5M2 = FP8_DTYPES


class Calls(TorchDispatchMode):
    """Records each operation: name, dtype and size of its result, and its arguments."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.made.append((function.overloadpacket.__name__, result, args, kwargs or {}))
        return result

    def names(self):
        views = ("view", "t", "expand", "unsqueeze", "detach", "empty_like", "_unsafe_view")
        return [name for name, *_ in self.made if name not in views]


def in_fp8(matmul, *, compute=torch.bfloat16, **options):
    layer = fp8_layer(**options)
    if layer.bias is not None:
        layer.bias.data = layer.bias.to(compute)
    assert use_matmul(layer, matmul, CPU) == []
    return layer


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("matmul", MATMULS[1:])
def test_operations_of_a_call(matmul, compute):
    """Largest magnitude, scale (2), quotient, cast, product; fp16 after a row product: a cast."""
    layer = in_fp8(matmul, compute=compute, per_row=matmul == "scaled_mm_row")
    x = random(40, 32).to(compute)
    with Calls() as calls:
        y = layer(x)
    expected = ["linalg_vector_norm", "div", "clamp_", "div", "_to_copy", "_scaled_mm"]
    if compute == torch.float16 and matmul == "scaled_mm_row":  # rows: bfloat16 output only
        expected = [*expected[:-1], "_to_copy", "_scaled_mm", "_to_copy"]  # bias, product, output
    assert calls.names() == expected
    large = [r for _, r, *_ in calls.made if r.numel() >= x.numel() and r.dtype == torch.float32]
    assert large == [], "no float32 copy of the activations"
    assert y.dtype == compute


@pytest.mark.parametrize("matmul", MATMULS[1:])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_arguments_of_the_kernel(matmul, per_row, scaled):
    layer = in_fp8(matmul, per_row=per_row, scaled=scaled)
    with Calls() as calls:
        layer(random(5, 7, 32).bfloat16())
    ((_, _, args, kwargs),) = [call for call in calls.made if call[0] == "_scaled_mm"]
    a, b, scale_a, scale_b = args[:4]
    assert (a.shape, a.dtype, a.is_contiguous()) == ((35, 32), E4M3, True)
    assert (b.shape, b.stride()) == ((32, 48), (1, 32))  # column-major, the stored bytes
    assert b.data_ptr() == layer.weight.data_ptr()
    rows = matmul == "scaled_mm_row"
    assert (scale_a.shape, scale_b.shape) == (((35, 1), (1, 48)) if rows else ((), ()))
    assert scale_a.dtype == scale_b.dtype == torch.float32
    assert scale_a.is_contiguous()
    assert scale_b.is_contiguous()
    late = per_row and scaled and not rows
    bias = args[4] if len(args) > 4 else kwargs.get("bias")
    assert (bias is None) == late
    options = [v for v in (*args[4:], *kwargs.values()) if not isinstance(v, torch.Tensor)]
    assert torch.bfloat16 in options
    assert True in options  # fast accumulation


@pytest.mark.parametrize("matmul", MATMULS[1:])
@pytest.mark.parametrize("rows", [1, 3, 16, 257])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_number_of_rows_in_any_dtype(matmul, rows, compute):
    layer = in_fp8(matmul, compute=compute, per_row=True)
    x = random(rows, 32, seed=rows).to(compute)
    expected = F.linear(
        x.float(),
        dequantize(layer.weight, layer.scale_weight, torch.float32),
        layer.bias.float(),
    )
    y = layer(x)
    assert y.dtype == compute
    assert ((y.float() - expected).norm() / expected.norm()).item() < 0.05


def test_bias_counts_in_every_branch():
    for matmul in MATMULS[1:]:
        for per_row in (False, True):
            layer = in_fp8(matmul, per_row=per_row)
            x = random(3, 32).bfloat16()
            with_bias = layer(x)
            layer.bias = None
            torch.testing.assert_close(
                with_bias.float() - layer(x).float(),
                random(48, seed=1).expand(3, 48),
                atol=3e-2,
                rtol=2e-2,
            )


def test_float16_does_not_overflow_with_scales_per_row():
    """Unscaled sums reach 448 * 448 * K; the tensor-wise product must not be float16 then."""
    layer = Fp8Linear(512, 16, bias=False, scale_shape=(16, 1))
    layer.weight.data = torch.full((16, 512), 448.0).to(E4M3)
    layer.scale_weight = torch.full((16, 1), 1e-4)
    layer.matmul = "scaled_mm_tensor"
    y = layer(torch.full((2, 512), 8.0, dtype=torch.float16))
    assert torch.allclose(y.float(), torch.full((2, 16), 448 * 1e-4 * 8 * 512), rtol=1e-2)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_row", [False, True])
def test_activations_use_the_whole_range(compute, by_row):
    x = (random(64, 512) * torch.logspace(-2, 2, 64)[:, None]).to(compute)
    fp8, scale = quantize_activation(x, by_row=by_row)
    assert scale.shape == ((64, 1) if by_row else ())
    largest = fp8.float().abs().amax(1)
    assert largest.max() == 448
    assert (largest == 448).sum() == (64 if by_row else 1)
    error = (fp8.float() * scale - x.float()).norm() / x.float().norm()
    assert 0.02 < error < 0.028, "one rounding of e4m3 on normal numbers is 2.65 %"


def test_odd_activations():
    x = random(4, 32)
    x[0], x[1, 3], x[2, 1] = 0, torch.nan, torch.inf
    fp8, scale = quantize_activation(x, by_row=True)
    wide = fp8.float() * scale
    assert torch.equal(wide[0], torch.zeros(32))
    assert wide[1].isnan().all()
    assert wide[2].isnan().any()
    assert wide[3].isfinite().all()
    tiny = torch.full((1, 32), 6e-8, dtype=torch.float16)
    fp8, scale = quantize_activation(tiny, by_row=True)
    torch.testing.assert_close(fp8.float() * scale, tiny.float())


def test_best_matmul_and_reasons():
    assert best_matmul(CPU) == ("scaled_mm_row", {})
    matmul, problems = best_matmul(torch.device("meta"))
    assert matmul == "dequant"
    assert set(problems) == set(MATMULS[1:])
    assert all(problems.values())


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("matmul", MATMULS)
def test_probe_looks_at_the_kind_of_fp8(matmul, dtype):
    assert matmul_problem(matmul, "cpu", dtype) == ""


def test_check_matmul():
    check_matmul("dequant", torch.device("meta"))
    with pytest.raises(InvalidRequest, match="matmul: got 'row'"):
        check_matmul("row", CPU)
    with pytest.raises(BackendUnavailable, match="meta"):
        check_matmul("scaled_mm_tensor", torch.device("meta"))


def test_set_weight_changes_the_kind_of_layer_in_place():
    layer, x = nn.Linear(32, 48), random(3, 32)
    layer.requires_grad_(False)
    parameter, wide, before = layer.weight, layer.weight.clone(), layer(x)
    set_weight(layer, *quantize_weight(wide, per_row=True))
    assert type(layer) is Fp8Linear
    assert layer.weight is parameter
    assert set(layer.state_dict()) == {"weight", "bias", "scale_weight"}
    assert 0 < (layer(x) - before).norm() / before.norm() < 0.05
    assert use_matmul(layer, "scaled_mm_row", CPU) == []
    layer.to(torch.bfloat16)
    assert (layer.weight.dtype, layer.scale_weight.dtype) == (E4M3, torch.float32)
    set_weight(layer, wide, None)
    assert type(layer) is nn.Linear
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert not hasattr(layer, "matmul")
    assert torch.equal(layer.weight, wide)


@pytest.mark.gpu
@pytest.mark.parametrize("matmul", MATMULS)
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_on_a_gpu(matmul, compute):
    """Each way that the card claims to have is close to dequantising on the CPU."""
    device = torch.device("cuda")
    if matmul_problem(matmul, "cuda"):
        pytest.skip(matmul_problem(matmul, "cuda"))
    layer = fp8_layer(n=256, k=512, per_row=True)
    x = random(130, 512)
    expected = layer(x)
    layer = layer.to(device, compute)
    use_matmul(layer, matmul, device)
    y = layer(x.to(device, compute)).float().cpu()
    assert ((y - expected).norm() / expected.norm()).item() < 0.05

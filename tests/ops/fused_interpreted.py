"""The kernels between the products, in Triton's interpreter; `test_fused` runs this file so.

Triton decides at import whether it interprets, so these tests need a process of their own.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from xicon_infer.ops import fused, fused_choice, fused_eager, fused_triton
from xicon_infer.ops.linear import QuantizedRows
from xicon_infer.ops.rope import Rope, apply_rope

# The interpreter computes in numpy, which warns where a GPU makes NaN or infinity in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEP = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half a step of a number around 1, and for float32 what sums of another order cost."""

SHAPES = ((1, 3, 64), (2, 5, 48), (1, 2, 100), (2, 1, 10))


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def apart(batch, tokens, width, dtype=torch.float32, seed=0):
    """Returns rows that lie apart, as a third of a fused product."""
    return drawn(batch, tokens, 3 * width, dtype=dtype, seed=seed)[..., width : 2 * width]


def close(found, exact, dtype):
    """Compares with float64: one rounding of the result, and a little for the sums."""
    assert found.dtype == dtype
    off = (found.double() - exact).abs()
    allowed = STEP[dtype] * exact.abs() + 4e-6 * (1 + exact.abs())
    assert bool((off <= allowed).all()), (off - allowed).max()


def brought_back(rows):
    assert rows.values.dtype == torch.float8_e4m3fn
    return rows.values.double() * rows.scale.double().reshape(*rows.values.shape[:-1], 1)


def norm_of(x, factor, plus):
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * factor.double()
        + plus.double()
    )


def gelu_of(x):
    z = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + torch.tanh(z))


def test_kernels_are_interpreted_here():
    assert fused_triton.INTERPRETED
    for dtype in DTYPES:
        assert fused_choice.kernels_problem("triton", CPU, dtype) == ""
        assert fused_choice.choose_kernels("triton", CPU, dtype).kernels == "triton"
    assert fused_choice.choose_kernels("auto", CPU, torch.float32).kernels == "eager"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_modulate(shape, dtype):
    x = apart(*shape, dtype)
    shift, scale = drawn(shape[0], 6, shape[2]).unsqueeze(2).unbind(1)[:2]
    exact = norm_of(x, 1 + scale, shift)
    close(fused.norm_modulate(x, shift, scale, 1e-6, fp8=False), exact, dtype)
    rows = fused.norm_modulate(x, shift, scale, 1e-6, fp8=True)
    assert rows.dtype == dtype and rows.scale.shape == (shape[0] * shape[1], 1)
    assert bool(((brought_back(rows) - exact).abs() <= exact.abs() / 15 + 0.02).all())


@pytest.mark.parametrize("modulate", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_add_norm_and_gated_add(shape, dtype, gated, modulate):
    batch, _, width = shape
    x, update = apart(*shape, dtype), apart(*shape, dtype, seed=1)
    gate = drawn(batch, 1, width, seed=2) if gated else None
    affine = (
        (drawn(batch, 1, width, seed=3), drawn(batch, 1, width, seed=4))
        if modulate
        else (drawn(width, dtype=dtype, seed=3), drawn(width, dtype=dtype, seed=4))
    )
    total, normed = fused.add_norm(x, update, gate, affine, eps=1e-6, modulate=modulate, fp8=False)
    sum_ = x.double() + (1 if gate is None else gate.double()) * update.double()
    close(total, sum_, dtype)
    torch.testing.assert_close(fused.gated_add(x, update, gate), total, rtol=0, atol=0)
    factor = affine[0].double() + 1 if modulate else affine[0]
    close(normed, norm_of(total, factor, affine[1]), dtype)
    again, rows = fused.add_norm(x, update, gate, affine, eps=1e-6, modulate=modulate, fp8=True)
    torch.testing.assert_close(again, total, rtol=0, atol=0)
    exact = norm_of(total, factor, affine[1])
    assert bool(((brought_back(rows) - exact).abs() <= exact.abs() / 15 + 0.02).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "heads"), [((1, 3, 64), 2), ((2, 5, 48), 3), ((1, 2, 100), 5)])
def test_norm_rope(shape, heads, dtype):
    batch, tokens, width = shape
    x, weight = apart(*shape, dtype), drawn(width, dtype=dtype, seed=1)
    half = width // heads // 2
    # As for the pooled pose tokens of SCAIL, the pairs need not be rotations.
    rope = Rope(drawn(tokens, half, seed=2), drawn(tokens, half, seed=3))
    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    close(fused.norm_rope(x, weight, 1e-6, heads, None).flatten(2), normed, dtype)
    exact = apply_rope(normed.reshape(batch, tokens, heads, -1), Rope(*(t.double() for t in rope)))
    found = fused.norm_rope(x, weight, 1e-6, heads, rope)
    assert found.shape == (batch, tokens, heads, width // heads)
    close(found, exact, dtype)


@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_rows(dtype, gelu):
    x, more = apart(2, 5, 48, dtype), apart(2, 5, 48, dtype, seed=1)
    for extra in (None, more):
        exact = x.double() + (0 if extra is None else extra.double())
        exact = gelu_of(exact) if gelu else exact
        rows = fused.quantize_rows(x, extra, gelu=gelu)
        largest = exact.abs().amax(-1).reshape(-1, 1) / 448
        torch.testing.assert_close(rows.scale.double(), largest, rtol=1e-5, atol=1e-9)
        step = largest.reshape(2, 5, 1) * 2**-10  # of the smallest numbers of e4m3
        assert bool(((brought_back(rows) - exact).abs() <= exact.abs() / 16 + step + 1e-6).all())


@pytest.mark.parametrize("width", [1536, 5120, 8960, 13824])
def test_widths_of_the_models(width):
    x = drawn(1, 1, width, dtype=torch.bfloat16)
    exact = norm_of(x, torch.ones(1), torch.zeros(1))
    zero = torch.zeros(1, 1, width)
    close(fused.norm_modulate(x, zero, zero, 1e-6, fp8=False), exact, torch.bfloat16)
    assert_same_rows(fused.quantize_rows(x, gelu=True), fused_eager.to_quantize(x, None, gelu=True))


def assert_same_rows(rows, wide):
    """Compares with the formulas: scales to the last bits, numbers to one step of e4m3."""
    values, scale = fused_eager.quantize(wide)
    torch.testing.assert_close(rows.scale, scale, rtol=1e-5, atol=0, equal_nan=True)
    fine = scale.isfinite().reshape(*rows.values.shape[:-1], 1)
    found, right = rows.values.float(), values.float()
    off = torch.where(fine, (found - right).abs(), 0)
    # A sum of another order may end on the other side of a step, seldom.
    assert bool((off <= torch.maximum(found.abs(), right.abs()).nan_to_num() / 8 + 2**-9).all())
    assert int((off > 0).sum()) <= 1 + 0.02 * off.numel()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 4),
    width=st.integers(1, 70),
    gap=st.integers(0, 9),
    power=st.integers(-30, 17),
    dtype=st.sampled_from(DTYPES[:2]),
    special=st.sampled_from(["", "zeros", "nan", "inf"]),
    seed=st.integers(0, 10),
)
def test_any_rows_equal_the_formulas(batch, tokens, width, gap, power, dtype, special, seed):
    x = (drawn(batch, tokens, width + gap, seed=seed) * 10.0**power).to(dtype)[..., gap:]
    if special:
        x[0, 0] = 0
    if special in ("nan", "inf"):
        x[0, 0, -1] = float(special)
    update = (drawn(batch, tokens, width, seed=seed + 1) * 10.0**power).to(dtype)
    gate, shift, scale = (drawn(batch, 1, width, seed=seed + n) for n in (2, 3, 4))
    total, normed = fused.add_norm(
        x, update, gate, (scale, shift), eps=1e-6, modulate=True, fp8=False
    )
    sums, exact = fused_eager.norm_rows(x, update, gate, scale, shift, eps=1e-6, modulate=True)
    close_to = {"rtol": 2 * STEP[dtype], "atol": 0, "equal_nan": True}
    torch.testing.assert_close(total, sums, **close_to)
    torch.testing.assert_close(normed, exact.to(dtype), **{**close_to, "rtol": 0.02, "atol": 0.02})
    if special in ("nan", "inf"):
        assert not bool(total[0, 0, -1].isfinite())
        assert bool(normed[0, 0].isnan().all())
    rows = fused.quantize_rows(x, update)
    assert_same_rows(rows, fused_eager.to_quantize(x, update, gelu=False))
    if special in ("nan", "inf"):
        assert bool(rows.scale[0].isnan())
    assert bool(rows.scale.isfinite().all()) == (special in ("", "zeros"))


@pytest.mark.parametrize("size", [1e-37, 1e30])
def test_very_small_and_very_large_rows(size):
    x = drawn(1, 4, 40) * size
    rows = fused.quantize_rows(x)
    assert_same_rows(rows, x)
    assert bool(rows.scale.isfinite().all())


def test_zeros_stay_zeros():
    x = torch.zeros(1, 2, 40)
    rows = fused.quantize_rows(x)
    assert bool((brought_back(rows) == 0).all()) and bool((rows.scale > 0).all())
    zero = torch.zeros(1, 1, 40)
    assert bool((fused.norm_modulate(x, zero, zero, 1e-6, fp8=False) == 0).all())


def test_no_rows_at_all():
    x = torch.zeros(1, 0, 40)
    assert fused.gated_add(x, x, None).shape == x.shape
    assert fused.quantize_rows(x).values.shape == x.shape


def test_rows_that_are_not_side_by_side():
    x = drawn(1, 40, 6).transpose(1, 2)
    same = fused.quantize_rows(x.contiguous())
    found = fused.quantize_rows(x)
    assert torch.equal(found.values.float(), same.values.float())


def test_operators_are_what_they_say():
    """Schemas, fakes and the absence of hidden changes, by PyTorch's own checks."""
    x, gate = drawn(2, 3, 16), drawn(2, 1, 16)
    cases = {
        "norm_rows": [
            (x, x, gate, gate, gate, 1e-6, fused_triton.MODULATE, True),
            (x, None, None, gate, gate, 1e-6, fused_triton.AFFINE, False),
            (x, x, None, None, None, 0.0, fused_triton.NO_NORM, False),
        ],
        "rms_rope": [
            (x, drawn(16), drawn(3, 4), drawn(3, 4), 1e-6),
            (x, drawn(16), None, None, 1e-6),
        ],
        "quantize_rows": [(x, None, True), (x, x, False)],
    }
    checks = ("test_schema", "test_faketensor")
    for name, calls in cases.items():
        for call in calls:
            operator = getattr(torch.ops.xicon, name).default
            assert set(torch.library.opcheck(operator, call, test_utils=checks).values()) == {
                "SUCCESS"
            }


def test_a_compiled_graph_takes_them_whole():
    def both(x, gate, weight):
        total, rows = fused.add_norm(x, x, gate, (gate, gate), eps=1e-6, modulate=True, fp8=True)
        return fused.norm_rope(total, weight, 1e-6, 2, None), rows.values, rows.scale

    given_ = (drawn(1, 3, 16), drawn(1, 1, 16), drawn(16))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*given_), both(*given_), strict=True):
        assert torch.equal(found.float(), expected.float())


@pytest.mark.parametrize("name", ["norm_rope", "add_norm", "quantize_rows"])
def test_a_wrong_kernel_is_noticed(monkeypatch, name):
    right = getattr(fused, name)

    def wrong(*args, **options):
        found = right(*args, **options)
        if isinstance(found, QuantizedRows):
            return found._replace(scale=found.scale * 1.3)
        return (
            (found[0], found[1])
            if isinstance(found, tuple) and options["fp8"]
            else ((found[0] + 1, found[1]) if isinstance(found, tuple) else found * 1.3)
        )

    monkeypatch.setattr(fused, name, wrong)
    problem = fused_choice.kernels_problem.__wrapped__("triton", CPU, torch.float32)
    assert "is off by" in problem and name in problem


def test_a_kernel_that_fails_is_not_there(monkeypatch):
    def broken(*args, **options):
        raise ValueError("no such instruction\nand more")

    monkeypatch.setattr(fused, "norm_rope", broken)
    problem = fused_choice.kernels_problem.__wrapped__
    assert problem("triton", CPU, torch.float32) == "no such instruction"


def test_gelu_matches_torch():
    x = drawn(1, 4, 33) * 5
    torch.testing.assert_close(gelu_of(x.double()).float(), F.gelu(x, approximate="tanh"))

"""The kernels of 8-bit attention in Triton's interpreter; `test_attention_int8` runs this file so.

Triton decides at import whether it interprets, so these tests need a process of their own. The
interpreter multiplies bfloat16 as if it were integers, so values are float16 or float32 here.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.attention_cases import drawn, error_of, exact, with_outlier
from xicon_infer.ops import attention_int8_triton as kernels
from xicon_infer.ops.attention_int8 import KEY_BLOCK, emulate, key_mean

AGREE = 1e-3
"""Kernel against twin: sums in another order; a few numbers are rounded to the next step."""


def run(q, k, v, config=None):
    return kernels.launch(q, k, v, key_mean(k), config)


def test_triton_is_interpreted_here():
    assert kernels.interpreted()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [64, 128])
def test_the_kernel_is_its_twin_and_near_the_formula(width, dtype):
    q, k, v = drawn(70, 2 * KEY_BLOCK + 5, width=width, dtype=dtype)
    found = run(q, k, v)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert error_of(found, emulate(q, k, v)) < AGREE
    assert error_of(found, exact(q, k, v)) < 0.02


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 80), st.integers(1, 140), st.integers(1, 2), st.integers(1, 3), st.integers(0, 9)
)
def test_any_lengths(queries, keys, batch, heads, seed):
    q, k, v = drawn(queries, keys, batch=batch, heads=heads, seed=seed)
    found = run(q, k, v)
    assert found.shape == q.shape
    assert error_of(found, emulate(q, k, v)) < AGREE


def test_one_key_gives_its_value():
    q, k, v = drawn(5, 1)
    assert torch.equal(run(q, k, v), v.expand_as(q))


def test_strided_parts_are_read_where_they_are():
    """Heads of a fused projection: token strides of three widths, and kept rows of the queries."""
    fused = drawn(90, 90, heads=6)[0]
    q, k, v = fused.chunk(3, dim=2)
    q = q[:, 3:50]
    assert not q.is_contiguous()
    found = run(q, k, v)
    assert torch.equal(found, run(q.contiguous(), k.contiguous(), v.contiguous()))
    assert error_of(found, exact(q, k, v)) < 0.02


def test_tokens_behind_the_end_count_for_nothing():
    """Memory behind the last token holds other numbers; huge ones there must not act."""
    q, k, v = drawn(70, 200)
    for part in (k, v):
        part[:, 131:] = 1e4
    short = run(q[:, :33], k[:, :131], v[:, :131])
    clean = run(*(part.clone() for part in (q[:, :33], k[:, :131], v[:, :131])))
    assert torch.equal(short, clean)


@pytest.mark.parametrize("queries", [32, 64, 128])
def test_how_the_work_is_cut_changes_nothing(queries):
    q, k, v = drawn(150, 100)
    found = run(q, k, v, kernels.Config(queries, 4, 1))
    assert error_of(found, run(q, k, v)) < 1e-6


def test_an_outlier_channel_needs_the_mean_taken_off():
    q, k, v = with_outlier(*drawn(40, 130))
    smooth = error_of(run(q, k, v), exact(q, k, v))
    rough = error_of(kernels.launch(q, k, v, None), exact(q, k, v))
    assert smooth < 0.02 < 5 * smooth < rough


def test_what_is_written_in_8_bits():
    x = drawn(70, 1)[0]
    values, scales = kernels.quantize(x, None, 2.0, by_row=True)
    assert values.dtype == torch.int8
    assert values.abs().amax(-1).eq(127).all()
    back = values * scales[..., None] / 2
    assert ((back - x.transpose(1, 2)).abs() <= scales[..., None] / 4 * 1.001).all()
    shared = kernels.quantize(x, None, 1.0, by_row=False)[1]
    assert shared.shape == (1, 2, math.ceil(70 / KEY_BLOCK))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy tells of the rows that are all NaN
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_a_number_stays_visible(which):
    parts = [part.clone() for part in drawn(40, 70)]
    parts[which][0, 3, 0, 5] = float("nan")
    found = run(*parts)
    assert found[:, :, 0].isnan().any()
    assert found[:, :, 1].isfinite().all()


def test_rows_of_zeros_are_no_division_by_zero():
    q, k, v = drawn(20, 70)
    found = run(torch.zeros_like(q), torch.zeros_like(k), v)
    assert error_of(found, v.double().mean(1, keepdim=True).expand_as(q)) < 1e-3

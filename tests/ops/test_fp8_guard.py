"""Which layers must not be rounded to fp8."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_linear import random
from xicon_infer.errors import WeightsError
from xicon_infer.ops.fp8_guard import (
    MAX_ERROR,
    MAX_OUTLIER_ROWS,
    OUTLIER,
    guarded_quantize,
    outlier_rows,
    place_reason,
    requantization_error,
)
from xicon_infer.ops.linear import quantize_weight


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("blocks.0.ffn.0.weight", "in the first block"),
        ("blocks.1.ffn.0.weight", ""),
        ("blocks.38.cross_attn.k_img.weight", ""),
        ("blocks.39.self_attn.q.weight", "in the last block"),
        ("text_embedding.0.weight", "outside the blocks"),
        ("head.head.weight", "outside the blocks"),
        ("condition_embedding_align.blocks.1.ffn.weight", "outside the blocks"),
    ],
)
def test_places(name, reason):
    assert place_reason(name, 40) == reason


@pytest.mark.parametrize("scale", [1e-6, 0.02, 1e3])
def test_normal_weights_pass(scale):
    weight = random(64, 5120, scale=scale)
    fp8, row_scale, reason = guarded_quantize(weight, name="w")
    assert reason == ""
    assert fp8.dtype == torch.float8_e4m3fn
    assert row_scale.shape == (64, 1)
    assert 0.02 < requantization_error(weight, fp8, row_scale) < 0.03
    assert outlier_rows(weight) == 0


@pytest.mark.parametrize(("rows", "guarded"), [(2, False), (3, True)])
def test_share_of_rows_with_outliers(rows, guarded):
    """The threshold is 1 % of the rows: 2 of 256 are below it, 3 above."""
    weight = random(256, 5120)
    weight[:rows, 7] = 40.0
    assert 2 / 256 < MAX_OUTLIER_ROWS < 3 / 256
    reason = guarded_quantize(weight, name="w")[2]
    assert bool(reason) == guarded
    assert not guarded or "1.2% of its rows have a weight above 32 times" in reason


@pytest.mark.parametrize(("ratio", "counted"), [(0.95, 0.0), (1.05, 1.0)])
def test_size_of_an_outlier(ratio, counted):
    """A weight of r times the root mean square of a row of K; the others make up the rest."""
    k = 5120
    large = ratio * OUTLIER
    rest = ((k - large**2) / (k - 1)) ** 0.5
    weight = torch.full((4, k), rest)
    weight[:, 0] = large
    assert outlier_rows(weight) == counted


@pytest.mark.parametrize("step", [17 / 16, 1.0])
def test_error_of_weights_where_fp8_is_coarse(step):
    """17/16 lies half-way between two e4m3 numbers; 1 is one of them."""
    weight = torch.full((32, 64), step)
    weight[:, 0] = 1.75 * 2  # the largest e4m3 number is 1.75 * 256, so the scale is a power of two
    fp8, scale, reason = guarded_quantize(weight, name="w")
    error = requantization_error(weight, fp8, scale)
    assert (error > MAX_ERROR) == (step != 1)
    assert reason.startswith("rounding to fp8 costs 0.05") == (step != 1)


def test_error_is_relative_and_zero_for_zero():
    weight = random(16, 32)
    fp8, scale = quantize_weight(weight, per_row=True)
    error = requantization_error(weight, fp8, scale)
    assert requantization_error(weight * 8, fp8, scale * 8) == pytest.approx(error)
    assert requantization_error(weight, fp8, scale * 2) == pytest.approx(1, abs=0.05)
    zero = torch.zeros(4, 16)
    assert guarded_quantize(zero, name="w")[2] == ""
    assert requantization_error(zero, *quantize_weight(zero, per_row=True)) == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_damaged_weights_are_named(value):
    weight = random(4, 16)
    weight[1, 2] = value
    with pytest.raises(WeightsError, match=r"blocks\.3\.ffn\.2\.weight: .*NaN or infinity"):
        guarded_quantize(weight, name="blocks.3.ffn.2.weight")

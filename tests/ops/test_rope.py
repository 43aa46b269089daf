"""Rotary embedding: it rotates, it is relative, the axes do not mix."""

from __future__ import annotations

import torch

from tests.models.builders import normal
from xicon_infer.ops.rope import Rope, apply_rope, axis_pairs, concat_rope, grid_rope


def positions(n: int, start: float = 0.0) -> torch.Tensor:
    return torch.arange(n) + start


def test_pairs_of_the_real_head():
    assert axis_pairs(128) == (22, 21, 21)
    assert axis_pairs(32) == (6, 5, 5)
    assert all(sum(axis_pairs(d)) == d // 2 for d in range(2, 200, 2))


def test_lengths_are_kept_and_dtype_too():
    rope = grid_rope(positions(2), positions(3), positions(4), 32)
    x = normal(1, 24, 2, 32)
    torch.testing.assert_close(apply_rope(x, rope).norm(dim=-1), x.norm(dim=-1))
    assert apply_rope(x.bfloat16(), rope).dtype is torch.bfloat16


def test_products_depend_on_the_distance_only():
    q, k = normal(1, 1, 1, 32), normal(1, 1, 1, 32, seed=1)

    def product(a: tuple[float, ...], b: tuple[float, ...]) -> torch.Tensor:
        turned = [
            apply_rope(x, grid_rope(*(positions(1, p) for p in at), 32))
            for x, at in ((q, a), (k, b))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product((0, 0, 0), (1, 2, 3)), product((5, 7, 9), (6, 9, 12)))
    for moved in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not torch.isclose(product((0, 0, 0), moved), product((0, 0, 0), (0, 0, 0)))


def test_order_is_time_rows_columns():
    rope = grid_rope(positions(2), positions(3), positions(4), 32)
    assert len(rope.cos) == 24
    at = grid_rope(positions(1, 1), positions(1, 2), positions(1, 3), 32)
    torch.testing.assert_close(rope.cos[1 * 12 + 2 * 4 + 3], at.cos[0])
    both = concat_rope([rope, at])
    assert isinstance(both, Rope)
    assert len(both.sin) == 25


def test_far_positions_keep_their_precision():
    """A float32 angle of 1000 radians is off by 1e-5; the table is made in float64."""
    rope = grid_rope(positions(1, 1000), positions(1), positions(1), 32)
    assert abs(rope.cos[0, 0].item() - 0.5623790762907029) < 1e-7

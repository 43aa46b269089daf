"""Rotary position embedding over (time, height, width), real-valued.

A head of width `head_dim` has head_dim / 2 channel pairs; neighbouring channels 2i and 2i + 1 are
one pair. The pairs are shared out to the three axes (22, 21, 21 of 64), and each axis turns its
pairs by position * 10000^(-2k / axis width). Tables are computed in float64 and kept in float32,
because a bfloat16 angle is off by whole turns at the far end of a frame.

Not here: complex-valued RoPE. The averaged angles of SCAIL's pose tokens are not rotations
(their length is below one), so they cannot be written as unit complex numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10000.0


class Rope(NamedTuple):
    """The table of a sequence: cos and sin, float32 [L, head_dim / 2] each."""

    cos: Tensor
    sin: Tensor

    def to(self, device: torch.device) -> Rope:
        """Returns the table on `device`."""
        return Rope(self.cos.to(device), self.sin.to(device))


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Returns how many channel pairs time, height and width get (22, 21, 21 for 128)."""
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def _axis(positions: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, float64 [n, pairs], of one axis at `positions` [n]."""
    omega = THETA ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angle = positions.to(torch.float64)[:, None] * omega
    return angle.cos(), angle.sin()


def _pool_pairs(table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns cos and sin averaged over each two neighbouring positions, not renormalised."""
    cos, sin = ((part[0::2] + part[1::2]) / 2 for part in table)
    return cos, sin


def grid_rope(t: Tensor, h: Tensor, w: Tensor, head_dim: int, *, pool: bool = False) -> Rope:
    """Returns the table of a grid of tokens, ordered t, h, w with w fastest.

    Args:
        t: positions in time, [T].
        h: positions of the rows, [H] (or [2 H] with `pool`).
        w: positions of the columns, [W] (or [2 W] with `pool`).
        head_dim: width of one head; even.
        pool: average cos and sin over each 2 x 2 cell of rows and columns. The angle of a row
            does not depend on the column, so the two axes are averaged one by one.

    Returns:
        Rope with L = T * H * W.

    Source: Wan-Video/Wan2.1: wan/modules/model.py (rope_apply); zai-org/SCAIL:
        dit_video_crossattn_sc_xc.py (2 x 2 average).
    """
    pairs_t, pairs_h, pairs_w = axis_pairs(head_dim)
    table_t, table_h, table_w = _axis(t, pairs_t), _axis(h, pairs_h), _axis(w, pairs_w)
    if pool:
        table_h, table_w = _pool_pairs(table_h), _pool_pairs(table_w)
    size = (len(table_t[0]), len(table_h[0]), len(table_w[0]))
    cos, sin = (
        torch.cat(
            (
                a[:, None, None].expand(*size, pairs_t),
                b[None, :, None].expand(*size, pairs_h),
                c[None, None, :].expand(*size, pairs_w),
            ),
            dim=-1,
        )
        .flatten(0, 2)
        .float()
        for a, b, c in zip(table_t, table_h, table_w, strict=True)
    )
    return Rope(cos, sin)


def concat_rope(parts: list[Rope]) -> Rope:
    """Returns the tables one after the other."""
    return Rope(torch.cat([p.cos for p in parts]), torch.cat([p.sin for p in parts]))


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Returns x with every pair turned by its angle; the arithmetic is float32 (or wider).

    Args:
        x: queries or keys [B, L, heads, head_dim].
        rope: the table of the L tokens, on the device of x.

    Returns:
        Tensor [B, L, heads, head_dim], dtype of x.
    """
    cos, sin = rope.cos[:, None, :], rope.sin[:, None, :]
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)

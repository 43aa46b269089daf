"""What the kernels of `xicon_infer.ops.fused` compute, in plain PyTorch.

The same steps in the same order: float32 from the first to the last, one rounding on the store.
They are the reference of the tests and of the probe that decides whether the kernels may be used,
and run for any dtype on any device (float64 stays float64).

Shape letters: B batch, L tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xicon_infer.ops.linear import SMALLEST_SCALE


def norm_rows(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    eps: float,
    modulate: bool,
) -> tuple[Tensor, Tensor]:
    """Returns x + gate * update, in the dtype of x, and the LayerNorm of it, not rounded.

    Args:
        x: [B, L, D].
        update: [B, L, D], or None to add nothing.
        gate: [B, 1, D], or None for 1.
        scale: [B or 1, 1, D], what the norm is multiplied by; None for no norm: the sum twice.
        shift: as scale, what is added then.
        eps: of the norm.
        modulate: multiply by 1 + scale instead of scale.
    """
    total = x
    if update is not None:
        added = wide(update)
        total = (wide(x) + (added if gate is None else gate * added)).to(x.dtype)
    if scale is None or shift is None:
        return total, wide(total)
    factor = wide(scale) + 1 if modulate else wide(scale)
    normed = F.layer_norm(wide(total), (x.shape[-1],), eps=eps)
    return total, normed * factor + wide(shift)


def rms_rope(
    x: Tensor, weight: Tensor, table: tuple[Tensor, Tensor] | None, *, eps: float
) -> Tensor:
    """Returns the RMSNorm of x [B, L, D], its pairs turned by cos and sin [L, pairs of a head]."""
    normed = wide(x) * torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps) * wide(weight)
    if table is not None:
        cos, sin = (part[:, None, :] for part in table)
        heads = normed.reshape(*x.shape[:-1], -1, 2 * cos.shape[-1])
        even, odd = heads[..., 0::2], heads[..., 1::2]
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
        normed = turned.flatten(-3)
    return normed.to(x.dtype)


def to_quantize(x: Tensor, more: Tensor | None, *, gelu: bool) -> Tensor:
    """Returns x, or x + more, or GELU (tanh form) of that, not rounded."""
    row = wide(x) if more is None else wide(x) + wide(more)
    return F.gelu(row, approximate="tanh") if gelu else row


def quantize(row: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rows [..., D] as e4m3 and their scales float32 [M, 1].

    The largest magnitude of a row becomes 448. A row with NaN or infinity gets NaN as scale.
    """
    limit = torch.finfo(torch.float8_e4m3fn).max
    largest = row.abs().amax(-1, keepdim=True).float()
    scale = (largest / limit).clamp(min=SMALLEST_SCALE)
    values = (row * (1 / scale)).clamp(-limit, limit).to(torch.float8_e4m3fn)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return values, scale.reshape(-1, 1)


def wide(x: Tensor) -> Tensor:
    """Returns x in at least float32."""
    return x if x.dtype == torch.float64 else x.float()

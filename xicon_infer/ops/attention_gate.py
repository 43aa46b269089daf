"""Whether an 8-bit attention kernel is exact enough to be used: measured, on this device.

Queries and keys are drawn as a video transformer has them: the norm before attention leaves a few
channels in which all tokens are large, and among the keys they have the same sign, so that a
kernel which does not take the mean of the keys off loses the others. The lengths are no multiples
of any block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xicon_infer.ops.attention_packages import Call

TOLERANCE = 0.05
"""Largest |found - exact| / |exact| that passes.

Measured here: 8-bit scores 0.014, without taking the mean of the keys off 0.08. Kernels that round
weights and values to fp8 too can be expected at 0.04.
"""

_QUERIES, _KEYS, _HEADS = 300, 1001, 2
_OUTLIERS = 4
_OUTLIER_SIZE = 30.0
"""Mean of an outlier channel of the keys; all other numbers have mean 0 and deviation 1."""


def gate_reason(call: Call, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Returns "" if a kernel passes, else by how much it does not.

    Args:
        call: the kernel.
        device: where it runs.
        dtype: of its inputs.
        head_dim: width of a head.
    """
    error = gate_error(call, device, dtype, head_dim)
    if error <= TOLERANCE:
        return ""
    return f"its relative error is {error:.3g}, more than the {TOLERANCE:g} that are allowed"


def gate_error(call: Call, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """Returns |found - exact| / |exact| of a kernel against float32; NaN if it gives any."""
    q, k, v = (part.to(device, dtype) for part in gate_inputs(head_dim))
    exact = _exact(*(part.float() for part in (q, k, v)))
    found = call(q, k, v).float()
    return ((found - exact).norm() / exact.norm()).item()


def gate_inputs(head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q [1, L, H, D], k and v [1, S, H, D], float32 on the CPU, always the same."""
    generator = torch.Generator().manual_seed(head_dim)
    q, k, v = (
        torch.randn(1, length, _HEADS, head_dim, generator=generator)
        for length in (_QUERIES, _KEYS, _KEYS)
    )
    channels = torch.randperm(head_dim, generator=generator)[:_OUTLIERS]
    k[..., channels] += _OUTLIER_SIZE
    # Half of the outlier channels are large in the queries too.
    q[..., channels[: _OUTLIERS // 2]] *= 3
    return q, k, v


def _exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("blhd,bshd->bhls", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v)

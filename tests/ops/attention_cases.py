"""Inputs and the formula for the tests of 8-bit attention."""

from __future__ import annotations

import torch


def drawn(queries, keys, *, batch=1, heads=2, width=64, dtype=torch.float32, seed=0):
    """Returns q, k and v of normal numbers, [B, L or S, heads, width]."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, length, heads, width, generator=generator).to(dtype)
        for length in (queries, keys, keys)
    )


def with_outlier(q, k, v, size=40.0):
    """Returns the parts with one channel in which all keys are large."""
    k = k.clone()
    k[..., 3] += size
    return q, k, v


def exact(q, k, v):
    """Returns the textbook formula in float64."""
    q, k, v = (part.double().transpose(1, 2) for part in (q, k, v))
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)


def error_of(found, wanted):
    """Returns |found - wanted| / |wanted|."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()

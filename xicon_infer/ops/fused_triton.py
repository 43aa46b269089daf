"""Triton kernels between the large products of a block: one row of tokens per program.

Each kernel reads a row once, keeps it in float32 registers and writes it once; one rounding on the
store. Widths need not be powers of two: the lanes behind the end are masked and count for nothing.
`xicon_infer.ops.fused` calls them; `xicon_infer.ops.fused_eager` has the same formulas in PyTorch.

Triton's interpreter, in which the tests run, cuts bfloat16 off instead of rounding it and loses the
carry of e4m3 (124.7 becomes 64; Triton 3.9). There alone numbers are rounded by hand before the
cast (`SOFT`); on a GPU the cast rounds.

A row of 5120 takes 8192 lanes, 32 numbers for each of 256 threads; one of 13824 takes 16384 with
512 threads. Not here: rows above 65536, which no model has.

Shape letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NO_NORM, MODULATE, AFFINE = 0, 1, 2
"""What follows the sum of `_norm_kernel`: nothing; times 1 + scale; times a weight."""

FP8_MAX = tl.constexpr(448.0)
SMALLEST = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _round_off(x, BITS: tl.constexpr):
    """Rounds float32 to the nearest number, or the even one, without its last BITS bits."""
    bits = x.to(tl.int32, bitcast=True)
    bits += (1 << (BITS - 1)) - 1 + ((bits >> BITS) & 1)
    return ((bits >> BITS) << BITS).to(tl.float32, bitcast=True)


@triton.jit
def _cast(x, like, SOFT: tl.constexpr):
    """Rounds float32 to the dtype of another tensor."""
    if SOFT and like.dtype == tl.bfloat16:
        x = _round_off(x, 16)
    return x.to(like.dtype)


@triton.jit
def _store_fp8(row, out, out_scale, number, lanes, width, SOFT: tl.constexpr):
    """Writes a row as e4m3 with its scale; one that is not finite gets NaN as scale."""
    largest = tl.max(tl.abs(row), 0)
    # `max` may pass over a NaN; a sum does not, and an infinity cannot hide in `largest`.
    broken = (tl.sum((row != row).to(tl.int32), 0) > 0) | (largest == float("inf"))
    scale = tl.maximum(largest / FP8_MAX, SMALLEST)
    scaled = tl.minimum(tl.maximum(row * (1.0 / scale), -FP8_MAX), FP8_MAX)
    if SOFT:
        # Normal numbers have 3 of 23 bits; below 2^-6 all are multiples of 2^-9.
        few = (scaled + 24576.0) - 24576.0
        scaled = tl.where(tl.abs(scaled) < 0.015625, few, _round_off(scaled, 20))
    tl.store(out + number * width + lanes, scaled.to(tl.float8e4nv), mask=lanes < width)
    tl.store(out_scale + number, tl.where(broken, float("nan"), scale))


@triton.jit
def _norm_kernel(
    x, update, gate, scale, shift, total, out, out_scale,
    tokens, width, eps,
    x_batch, x_token, update_batch, update_token, gate_batch, scale_batch, shift_batch,
    NORM: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """Sum x + gate * update, then LayerNorm of that and a modulation or an affine map."""
    number = tl.program_id(0).to(tl.int64)
    batch, token = number // tokens, number % tokens
    lanes = tl.arange(0, BLOCK)
    inside = lanes < width
    row = tl.load(x + batch * x_batch + token * x_token + lanes, mask=inside, other=0.0)
    wide = row.to(tl.float32)
    if update is not None:
        place = update + batch * update_batch + token * update_token + lanes
        added = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            added *= tl.load(gate + batch * gate_batch + lanes, mask=inside, other=0.0)
        rounded = _cast(wide + added, row, SOFT)
        tl.store(total + number * width + lanes, rounded, mask=inside)
        wide = rounded.to(tl.float32)  # what the next layers read of it
    if NORM != 0:
        mean = tl.sum(wide, 0) / width
        centred = tl.where(inside, wide - mean, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
        times = tl.load(scale + batch * scale_batch + lanes, mask=inside, other=0.0).to(tl.float32)
        plus = tl.load(shift + batch * shift_batch + lanes, mask=inside, other=0.0).to(tl.float32)
        if NORM == 1:
            times += 1.0
        normed = tl.where(inside, normed * times + plus, 0.0)
        if FP8:
            _store_fp8(normed, out, out_scale, number, lanes, width, SOFT)
        else:
            tl.store(out + number * width + lanes, _cast(normed, row, SOFT), mask=inside)


@triton.jit
def _rms_rope_kernel(
    x, weight, cos, sin, out,
    tokens, width, eps, x_batch, x_token,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """RMSNorm over the whole row, times its weight; then every pair turned by its angle."""
    number = tl.program_id(0).to(tl.int64)
    batch, token = number // tokens, number % tokens
    lanes = tl.arange(0, BLOCK)
    inside = lanes < width
    row = tl.load(x + batch * x_batch + token * x_token + lanes, mask=inside, other=0.0)
    wide = row.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    normed = wide * factor * tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
    if cos is not None:
        even, odd = tl.split(tl.reshape(normed, [BLOCK // 2, 2]))
        pair = tl.arange(0, BLOCK // 2)
        table = token * PAIRS + pair % PAIRS
        turn = tl.load(cos + table, mask=2 * pair < width, other=0.0)
        over = tl.load(sin + table, mask=2 * pair < width, other=0.0)
        normed = tl.interleave(even * turn - odd * over, odd * turn + even * over)
    tl.store(out + number * width + lanes, _cast(normed, row, SOFT), mask=inside)


@triton.jit
def _quantize_kernel(
    x, more, out, out_scale,
    tokens, width, x_batch, x_token, more_batch, more_token,
    GELU: tl.constexpr, BLOCK: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """Makes x, or x + more, or GELU of that, e4m3 with a scale per row."""
    number = tl.program_id(0).to(tl.int64)
    batch, token = number // tokens, number % tokens
    lanes = tl.arange(0, BLOCK)
    inside = lanes < width
    row = tl.load(x + batch * x_batch + token * x_token + lanes, mask=inside, other=0.0)
    row = row.to(tl.float32)
    if more is not None:
        place = more + batch * more_batch + token * more_token + lanes
        row += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        # (1 + tanh z) / 2 is the logistic function of 2 z.
        z = 0.7978845608028654 * (row + 0.044715 * row * row * row)
        row = row * tl.sigmoid(2.0 * z)
    _store_fp8(row, out, out_scale, number, lanes, width, SOFT)


INTERPRETED = not isinstance(_norm_kernel, triton.JITFunction)
"""True where TRITON_INTERPRET=1 was set when this module was imported."""


def norm_rows(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    outs: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    eps: float,
    norm: int,
) -> None:
    """Fills (sum, normed, scale of normed) from rows; see `xicon_infer.ops.fused`.

    Args:
        x: [B, L, D], as `update`; last stride 1.
        update: what is added, or None.
        gate: float32 [B, 1, D], or None for 1.
        scale: [B or 1, 1, D], of the norm; None without a norm.
        shift: as scale.
        outs: contiguous [B, L, D] each, the last one [B L, 1]; None for what is not wanted.
        eps: of the norm.
        norm: one of `NO_NORM`, `MODULATE`, `AFFINE`.
    """
    total, out, out_scale = outs
    tokens, width = x.shape[1:]
    strides = [x.stride(0), x.stride(1), *_strides(update)]
    strides += [_step(each) for each in (gate, scale, shift)]
    _launch(
        _norm_kernel,
        x,
        (x, update, gate, scale, shift, total, out, out_scale, tokens, width, eps, *strides),
        {"NORM": norm, "FP8": out_scale is not None},
    )


def rms_rope(
    x: Tensor, weight: Tensor, table: tuple[Tensor, Tensor] | None, out: Tensor, eps: float
) -> None:
    """Fills out [B, L, D] from rows x [B, L, D] (last stride 1) and cos and sin [L, pairs]."""
    cos, sin = table or (None, None)
    pairs = 1 if cos is None else cos.shape[1]
    given = (x, weight, cos, sin, out, x.shape[1], x.shape[2], eps, x.stride(0), x.stride(1))
    _launch(_rms_rope_kernel, x, given, {"PAIRS": pairs})


def quantize_rows(
    x: Tensor, more: Tensor | None, out: Tensor, out_scale: Tensor, *, gelu: bool
) -> None:
    """Fills e4m3 out [B, L, D] and its scale [B L, 1] from rows x (+ more), last stride 1."""
    strides = [x.stride(0), x.stride(1), *_strides(more)]
    given = (x, more, out, out_scale, x.shape[1], x.shape[2], *strides)
    _launch(_quantize_kernel, x, given, {"GELU": gelu})


def _launch(kernel: Any, x: Tensor, given: tuple[Any, ...], fixed: dict[str, Any]) -> None:
    """Runs a kernel with one program for each row of x [B, L, D]."""
    batch, tokens, width = x.shape
    if not batch * tokens:
        return
    block = max(triton.next_power_of_2(width), 16)
    warps = min(max(block // 1024, 1), 16) if block > 4096 else 4
    with torch.cuda.device_of(x):
        kernel[(batch * tokens,)](
            *given, **fixed, BLOCK=block, SOFT=INTERPRETED, num_warps=warps, enable_fp_fusion=True
        )


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _step(each: Tensor | None) -> int:
    """Returns the elements between two samples of a [B or 1, 1, D] tensor."""
    return 0 if each is None or each.shape[0] == 1 else each.stride(0)

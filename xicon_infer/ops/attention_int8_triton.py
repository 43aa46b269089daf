"""Triton kernels of 8-bit attention: one that quantises, one that attends.

Written from the published idea (see `attention_int8`), not from its code. Neither has run on a GPU
yet; Triton's interpreter proves the arithmetic on the CPU. This module imports Triton, so it is
imported only where its kernels are launched.

Shape letters: B batch, L queries, S keys, H heads, D width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from xicon_infer.ops.attention_int8 import KEY_BLOCK, LOG2_E

_ROWS = 64
"""Rows that one program quantises; of keys they share one scale, so it is `KEY_BLOCK`."""


class Config(NamedTuple):
    """How the work is cut: queries per program, warps, tiles of keys in flight."""

    queries: int
    warps: int
    stages: int


# By the compute capability from which it holds, newest first, then by D; the first entry of a row
# is used, the others are for `benchmarks/attention.py`. Hopper has 227 KiB of shared memory for
# a program and multiplies with four warps together; Ampere (A100) 163 KiB; Ada, small Ampere and
# consumer Blackwell (12.0) 99 KiB. At D 128 a tile of keys and values takes 24 KiB for each stage
# but one, the queries 16 KiB: 48 to 66 KiB by Triton 3.9, so two programs share a multiprocessor.
CONFIGS: dict[tuple[int, int], dict[int, tuple[Config, ...]]] = {
    (12, 0): {
        64: (Config(128, 4, 3), Config(128, 8, 3), Config(64, 4, 3)),
        128: (Config(128, 8, 3), Config(64, 4, 3), Config(128, 8, 2)),
    },
    (9, 0): {
        64: (Config(128, 4, 4), Config(128, 8, 3), Config(64, 4, 4)),
        128: (Config(128, 8, 4), Config(128, 4, 3), Config(64, 4, 4)),
    },
    (8, 9): {
        64: (Config(128, 4, 3), Config(128, 8, 3), Config(64, 4, 3)),
        128: (Config(128, 8, 3), Config(64, 4, 3), Config(128, 8, 2)),
    },
    (8, 6): {
        64: (Config(128, 4, 2), Config(64, 4, 3), Config(128, 8, 2)),
        128: (Config(64, 4, 2), Config(128, 8, 2), Config(64, 4, 3)),
    },
    (8, 0): {
        64: (Config(128, 4, 3), Config(128, 8, 3), Config(64, 4, 4)),
        128: (Config(128, 8, 3), Config(128, 8, 4), Config(64, 4, 4)),
    },
}
_INTERPRETED = Config(64, 4, 1)


@triton.jit
def quantize_kernel(
    x, mean, out, scales, length, heads, stride_b, stride_l, stride_h, factor,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, SMOOTH: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """Writes int8 [B, H, L, D] of (x - mean) factor, and its scales.

    One program takes ROWS tokens of one head. BY_ROW: a scale per token [B, H, L]; else one per
    program [B, H, programs]. SMOOTH: `mean` [B, H, D] is taken off first.
    """
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = rows[:, None] < length
    source = x + batch * stride_b + head * stride_h
    # A row offset times the stride of a fused projection passes 2^31 in long videos.
    offsets = rows[:, None].to(tl.int64) * stride_l + columns[None, :]
    values = tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32)
    if SMOOTH:
        centre = tl.load(mean + (batch * heads + head) * WIDTH + columns)
        values = tl.where(inside, values - centre[None, :], 0.0)
    values = values * factor
    highest = tl.max(tl.abs(values), axis=1)
    # An integer cannot be NaN; the scale can, and what it is multiplied with then is NaN.
    broken = tl.sum((values != values).to(tl.int32), axis=1) > 0
    values = tl.where(values == values, values, 0.0)
    at = (batch * heads + head) * length
    if BY_ROW:
        scale = tl.maximum(highest, 1e-12) / 127.0
        told = tl.where(broken, float("nan"), scale)
        tl.store(scales + at + rows, told, mask=rows < length)
        values = values / scale[:, None]
    else:
        scale = tl.maximum(tl.max(highest, axis=0), 1e-12) / 127.0
        told = tl.where(tl.sum(broken.to(tl.int32), axis=0) > 0, float("nan"), scale)
        tl.store(scales + (batch * heads + head) * tl.num_programs(0) + block, told)
        values = values / scale
    # Conversion cuts towards zero, so halves are added first: rounding half away from zero.
    rounded = (values + tl.where(values >= 0, 0.5, -0.5)).to(tl.int8)
    target = (at + rows[:, None]) * WIDTH + columns[None, :]
    tl.store(out + target, rounded, mask=inside)


@triton.jit
def _attend_block(
    total, norm, highest, q, q_scale, k, k_scale, v, start, keys, stride_v,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Returns the running sum, norm and maximum after one more block of keys (base 2)."""
    at = start + tl.arange(0, KEYS)
    columns = tl.arange(0, WIDTH)
    key_at = k + at[None, :] * WIDTH + columns[:, None]
    value_at = v + at[:, None].to(tl.int64) * stride_v + columns[None, :]
    if TAIL:
        key_tile = tl.load(key_at, mask=at[None, :] < keys, other=0)
        value_tile = tl.load(value_at, mask=at[:, None] < keys, other=0.0)
    else:
        key_tile = tl.load(key_at)
        value_tile = tl.load(value_at)
    products = tl.dot(q, key_tile, out_dtype=tl.int32)
    scores = products.to(tl.float32) * (q_scale * tl.load(k_scale + start // KEYS))[:, None]
    if TAIL:
        scores = tl.where(at[None, :] < keys, scores, float("-inf"))
    above = tl.maximum(highest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - above[:, None])
    shrink = tl.exp2(highest - above)
    norm = norm * shrink + tl.sum(weights, axis=1)
    total = total * shrink[:, None]
    total = tl.dot(weights.to(value_tile.dtype), value_tile, total, input_precision="ieee")
    return total, norm, above


@triton.jit
def attention_kernel(
    q, q_scale, k, k_scale, v, out, length, keys, heads, stride_vb, stride_vl, stride_vh,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Writes softmax attention [B, L, H, D]; one program takes QUERIES queries of one head.

    q and k are int8 [B, H, L or S, D] with their scales, of which those of q hold
    log2(e) / sqrt(D); v is [B, S, H, D] with any strides but a last one of 1.
    """
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    plane = batch * heads + head
    rows = block * QUERIES + tl.arange(0, QUERIES)
    columns = tl.arange(0, WIDTH)
    inside = rows < length
    query_at = q + (plane * length + rows[:, None]) * WIDTH + columns[None, :]
    query_tile = tl.load(query_at, mask=inside[:, None], other=0)
    row_scale = tl.load(q_scale + plane * length + rows, mask=inside, other=0.0)
    k += plane * keys * WIDTH
    k_scale += plane * tl.cdiv(keys, KEYS)
    v += batch * stride_vb + head * stride_vh
    total = tl.zeros((QUERIES, WIDTH), tl.float32)
    norm = tl.zeros((QUERIES,), tl.float32)
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    whole = (keys // KEYS) * KEYS
    for start in range(0, whole, KEYS):
        total, norm, highest = _attend_block(
            total, norm, highest, query_tile, row_scale, k, k_scale, v, start, keys, stride_vl,
            WIDTH, KEYS, False,
        )  # fmt: skip
    if whole < keys:
        total, norm, highest = _attend_block(
            total, norm, highest, query_tile, row_scale, k, k_scale, v, whole, keys, stride_vl,
            WIDTH, KEYS, True,
        )  # fmt: skip
    result = total / norm[:, None]
    # Row l, head h of the output [B, L, H, D], which is contiguous.
    target = ((batch * length + rows[:, None]) * heads + head) * WIDTH + columns[None, :]
    tl.store(out + target, result.to(out.dtype.element_ty), mask=inside[:, None])


def configs_for(capability: tuple[int, int], head_dim: int) -> tuple[Config, ...]:
    """Returns how the work may be cut on a GPU, the one that is used first.

    Args:
        capability: of the GPU, (8, 9) for Ada.
        head_dim: 64 or 128.

    Raises:
        RuntimeError: the GPU is older than Ampere, whose tensor cores Triton uses for int8.
    """
    for least, rows in CONFIGS.items():
        if capability >= least:
            return rows[head_dim]
    raise RuntimeError(f"needs a GPU of capability 8.0 or newer, this has {capability}")


def quantize(x: Tensor, mean: Tensor | None, factor: float, *, by_row: bool) -> tuple[Tensor, ...]:
    """Returns int8 [B, H, L, D] of (x - mean) factor, and float32 scales.

    Args:
        x: [B, L, H, D], last stride 1, any others.
        mean: float32 [B, H, D], or None to take nothing off.
        factor: multiplied in before quantising.
        by_row: a scale per token [B, H, L], else one per block of 64 tokens [B, H, blocks].
    """
    batch, length, heads, width = x.shape
    blocks = triton.cdiv(length, _ROWS)
    out = torch.empty(batch, heads, length, width, dtype=torch.int8, device=x.device)
    scales = torch.empty(
        batch, heads, length if by_row else blocks, dtype=torch.float32, device=x.device
    )
    with torch.cuda.device_of(x):  # Triton launches on the current device
        quantize_kernel[(blocks, heads, batch)](
            x, out if mean is None else mean, out, scales, length, heads, *x.stride()[:3], factor,
            WIDTH=width, ROWS=_ROWS, SMOOTH=mean is not None, BY_ROW=by_row,
        )  # fmt: skip
    return out, scales


def launch(
    q: Tensor, k: Tensor, v: Tensor, mean: Tensor | None, config: Config | None = None
) -> Tensor:
    """Returns 8-bit attention [B, L, H, D], contiguous, in the dtype of q.

    Args:
        q: [B, L, H, D]; k, v: [B, S, H, D]; float16 or bfloat16 on a GPU, last strides 1.
        k: see q.
        v: see q.
        mean: of the keys, float32 [B, H, D]; None leaves them as they are.
        config: how the work is cut; None: the first of `configs_for`.

    Raises:
        RuntimeError: Triton cannot compile or launch the kernels here.
    """
    batch, length, heads, width = q.shape
    keys = k.shape[1]
    config = config or default_config(q.device, width)
    out = torch.empty(batch, length, heads, width, dtype=q.dtype, device=q.device)
    try:
        q8, q_scale = quantize(q, None, LOG2_E / width**0.5, by_row=True)
        k8, k_scale = quantize(k, mean, 1.0, by_row=False)
        with torch.cuda.device_of(q):
            attention_kernel[(triton.cdiv(length, config.queries), heads, batch)](
                q8, q_scale, k8, k_scale, v, out, length, keys, heads, *v.stride()[:3],
                WIDTH=width, QUERIES=config.queries, KEYS=KEY_BLOCK,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
    except TritonError as error:
        raise RuntimeError(f"Triton: {str(error).strip().splitlines()[0]}") from error
    return out


def default_config(device: torch.device, head_dim: int) -> Config:
    """Returns how the work is cut on a device; on the CPU that of the interpreter."""
    if device.type != "cuda":
        return _INTERPRETED
    return configs_for(torch.cuda.get_device_capability(device), head_dim)[0]


def interpreted() -> bool:
    """Returns True if the kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""
    return not isinstance(attention_kernel, triton.JITFunction)

"""Attention whose scores are products of 8-bit integers: a Triton kernel and its twin in PyTorch.

Queries and keys are quantised to int8, a query with a scale of its own, keys with one per block of
64. Scores are then made at the rate of int8 tensor cores, twice that of bfloat16 and more; softmax
and the product with the values stay in floating point. The mean of all keys is taken off the keys
first: it adds the same number to all scores of a query, which softmax does not see, and without it
the few channels in which all keys are large leave the others hardly any of the 255 steps.

`int8_attention` is one operator to torch.compile. On a GPU it is the kernel; on the CPU it is
`emulate`, the same quantisation in plain PyTorch, slow, for measuring what the precision costs.

Source: the idea is that of SageAttention, arXiv 2410.02367. Differs from it: a scale per query in
place of one per block of queries. It costs nothing, because a score is multiplied by a number of
its row either way, and a query of small norm keeps its precision beside a large one.

Shape letters: B batch, L queries, S keys, H heads, D width of a head.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

KEY_BLOCK = 64
"""Keys that share a scale, and that the kernel takes at once."""

HEAD_DIMS = (64, 128)
"""Widths for which the kernel's work is cut by hand."""

LOG2_E = 1.4426950408889634
"""The kernel's exponentials are powers of two, the cheaper ones on a GPU."""

_ROWS_AT_ONCE = 512
"""Queries that the twin takes at a time; all scores of a long video would fill the memory."""


# Defined without `torch.library.custom_op`, whose first call imports the whole compiler.
_LIBRARY: Any = torch.library.Library("xicon_infer", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("int8_attention(Tensor q, Tensor k, Tensor v) -> Tensor")


def int8_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v with 8-bit scores, contiguous [B, L, H, D].

    Args:
        q: [B, L, H, D], float16 or bfloat16 on a GPU, D 64 or 128. Any strides, but a last one
            of 1.
        k: [B, S, H, D], likewise.
        v: [B, S, H, D], likewise.

    Raises:
        RuntimeError: Triton cannot run the kernel here. ValueError: D is another.
    """
    return torch.ops.xicon_infer.int8_attention(q, k, v)


def _on_gpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    check_width(q.shape[-1])
    q, k, v = (part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v))
    return _kernels().launch(q, k, v, key_mean(k))


def _on_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    check_width(q.shape[-1])
    return emulate(q, k, v)


def _shape_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


_LIBRARY.impl("int8_attention", _on_gpu, "CUDA")
_LIBRARY.impl("int8_attention", _on_cpu, "CPU")
torch.library.register_fake("xicon_infer::int8_attention", _shape_only)


def check_width(head_dim: int) -> None:
    """Checks that the kernel is made for heads of this width.

    Raises:
        ValueError: it is not.
    """
    if head_dim not in HEAD_DIMS:
        allowed = " or ".join(map(str, HEAD_DIMS))
        raise ValueError(f"8-bit attention is made for heads of {allowed}, not {head_dim}")


def key_mean(k: Tensor) -> Tensor:
    """Returns the mean over all keys, float32 [B, H, D], of k [B, S, H, D]."""
    return k.mean(dim=1, dtype=torch.float32)


def emulate(q: Tensor, k: Tensor, v: Tensor, *, smooth: bool = True) -> Tensor:
    """Returns what the kernel computes, up to the order of sums; arguments of `int8_attention`.

    Args:
        q: [B, L, H, D], any floating dtype and D.
        k: [B, S, H, D].
        v: [B, S, H, D].
        smooth: take the mean of the keys off first; False shows what that is worth.
    """
    wide_k = k.float()
    if smooth:
        wide_k = wide_k - key_mean(k)[:, None]
    keys, key_scale = _quantize(wide_k.transpose(1, 2), KEY_BLOCK)
    values = v.transpose(1, 2)
    factor = LOG2_E / q.shape[-1] ** 0.5
    parts = []
    for rows in torch.split(q.transpose(1, 2), _ROWS_AT_ONCE, dim=2):
        queries, query_scale = _quantize(rows.float() * factor, 1)
        # Sums of 128 products of two 8-bit numbers are below 2^24: exact in float32.
        scores = (queries @ keys.mT) * query_scale * key_scale.mT
        weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
        total = weights.to(v.dtype).float() @ values.float()
        parts.append(total / weights.sum(-1, keepdim=True))
    return torch.cat(parts, dim=2).to(q.dtype).transpose(1, 2).contiguous()


def _quantize(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Returns whole numbers from -127 to 127, as float32, and their scales [B, H, L, 1].

    Args:
        x: float32 [B, H, L, D].
        block: tokens that share a scale.
    """
    highest = x.abs().amax(-1)
    padded = torch.nn.functional.pad(highest, (0, -highest.shape[-1] % block))
    shared = padded.reshape(*padded.shape[:-1], -1, block).amax(-1)
    shared = shared.repeat_interleave(block, dim=-1)
    scale = (shared[..., : x.shape[2]].clamp_min(1e-12) / 127)[..., None]
    steps = x / scale
    return torch.trunc(steps + torch.where(steps >= 0, 0.5, -0.5)), scale


@functools.cache
def _kernels() -> Any:
    """Returns the module of the kernels, which imports Triton; only where they are launched.

    Raises:
        RuntimeError: there is no Triton.
    """
    try:
        return importlib.import_module("xicon_infer.ops.attention_int8_triton")
    except ImportError as error:
        raise RuntimeError(f"Triton cannot be imported ({error})") from error

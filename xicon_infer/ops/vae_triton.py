"""The kernels of `vae_kernels` in Triton. Imported only where Triton is, and only when used.

Every program takes a block of pixels with all their channels, so that the norm of a pixel never
leaves its program. Several pixels share a program: one pixel of 96 channels is too little work to
fill the memory bus. Arithmetic is float32, rounded once when stored.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096
_WARPS = 8
# Numbers that change from chunk to chunk and must not each compile a kernel of their own.
_VARYING = ["frames", "pixels"]


@triton.jit(do_not_specialize=_VARYING)
def _window_kernel(
    x_ptr,
    gain_ptr,
    bias_ptr,
    kept_ptr,
    window_ptr,
    frames,
    pixels,
    channels,
    root,
    KEEP: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.arange(0, BLOCK_C)
    inside = (rows[:, None] < pixels) & (columns[None, :] < channels)
    at = rows[:, None].to(tl.int64) * channels + columns[None, :]
    size = pixels.to(tl.int64) * channels
    kept = kept_ptr + batch * KEEP * size + at
    window = window_ptr + batch * (KEEP + frames) * size + at
    source = x_ptr + batch * frames * size + at
    for index in range(KEEP):
        value = tl.load(kept + index * size, mask=inside)
        # A frame is overwritten only after every thread of this program has read it.
        tl.debug_barrier()
        tl.store(window + index * size, value, mask=inside)
        if index >= frames:
            tl.store(kept + (index - frames) * size, value, mask=inside)
    for index in range(frames):
        value = tl.load(source + index * size, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            bias = tl.load(bias_ptr + columns, mask=columns < channels, other=0.0)
            value += bias.to(tl.float32)[None, :]
        if NORM:
            gain = tl.load(gain_ptr + columns, mask=columns < channels, other=0.0)
            norm = tl.sqrt(tl.sum(value * value, axis=1))
            norm = tl.where(norm < 1e-12, 1e-12, norm)
            value = value / norm[:, None] * (gain.to(tl.float32) * root)[None, :]
            value = value / (1.0 + tl.exp(-value))
        stored = value.to(window_ptr.dtype.element_ty)
        tl.store(window + (KEEP + index) * size, stored, mask=inside)
        if index + KEEP >= frames:
            tl.store(kept + (index + KEEP - frames) * size, stored, mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def _add_kernel(
    y_ptr,
    bias_ptr,
    other_ptr,
    pixels,
    channels,
    OTHER: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.arange(0, BLOCK_C)
    inside = (rows[:, None] < pixels) & (columns[None, :] < channels)
    at = rows[:, None] * channels + columns[None, :]
    bias = tl.load(bias_ptr + columns, mask=columns < channels, other=0.0).to(tl.float32)
    value = tl.load(y_ptr + at, mask=inside).to(tl.float32) + bias[None, :]
    if OTHER:
        value += tl.load(other_ptr + at, mask=inside).to(tl.float32)
    tl.store(y_ptr + at, value.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def _interleave_kernel(
    pairs_ptr,
    bias_ptr,
    out_ptr,
    pixels,
    channels,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    frame = tl.program_id(1).to(tl.int64)
    half = frame % 2
    rows = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.arange(0, BLOCK_C)
    inside = (rows[:, None] < pixels) & (columns[None, :] < channels)
    size = pixels.to(tl.int64) * channels
    line = rows[:, None].to(tl.int64) * channels
    source = pairs_ptr + (frame // 2) * 2 * size + half * channels + 2 * line + columns[None, :]
    bias = tl.load(bias_ptr + half * channels + columns, mask=columns < channels, other=0.0)
    value = tl.load(source, mask=inside).to(tl.float32) + bias.to(tl.float32)[None, :]
    stored = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + frame * size + line + columns[None, :], stored, mask=inside)


def is_interpreted() -> bool:
    """Returns whether Triton runs these kernels on the host, one program after the other."""
    return type(_add_kernel).__name__ == "InterpretedFunction"


def fill_window(
    x: Tensor, gain: Tensor | None, bias: Tensor | None, kept: Tensor, window: Tensor
) -> None:
    """See `vae_kernels.fill_window`; all tensors contiguous."""
    batch, frames, height, width, channels = x.shape
    block_p, block_c = _blocks(channels)
    pixels = height * width
    _window_kernel[triton.cdiv(pixels, block_p), batch](
        x,
        x if gain is None else gain,
        x if bias is None else bias,
        kept,
        window,
        frames,
        pixels,
        channels,
        channels**0.5,
        KEEP=kept.shape[1],
        NORM=gain is not None,
        BIAS=bias is not None,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=_WARPS,
    )


def add_bias(y: Tensor, bias: Tensor, other: Tensor | None) -> None:
    """See `vae_kernels.add_bias`; all tensors contiguous."""
    channels = y.shape[-1]
    block_p, block_c = _blocks(channels)
    pixels = y.numel() // channels
    _add_kernel[(triton.cdiv(pixels, block_p),)](
        y,
        bias,
        y if other is None else other,
        pixels,
        channels,
        OTHER=other is not None,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=_WARPS,
    )


def interleave(pairs: Tensor, bias: Tensor, out: Tensor) -> None:
    """See `vae_kernels.interleave`; all tensors contiguous."""
    batch, frames, height, width, channels = out.shape
    block_p, block_c = _blocks(channels)
    pixels = height * width
    _interleave_kernel[triton.cdiv(pixels, block_p), batch * frames](
        pairs,
        bias,
        out,
        pixels,
        channels,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=_WARPS,
    )


def _blocks(channels: int) -> tuple[int, int]:
    """Returns (pixels, channels) of a program; the channels are all of them, rounded up."""
    block_c = triton.next_power_of_2(channels)
    return max(1, _ELEMENTS // block_c), block_c

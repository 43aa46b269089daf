"""The elementwise work between the convolutions of the video VAE, fused.

Half of a plain decode moves data: a norm, a SiLU, a copy into the input of the next convolution,
a copy of the frames that it remembers, a bias, a residual, each a pass over the largest tensors
of the model. Three functions do the same in one pass each:

    fill_window   [remembered | silu(norm(x + bias))], and what is remembered next
    add_bias      y + bias + residual, in place
    interleave    two frames from the two halves of the channels

Each runs as a Triton kernel, or, with `fused` False, as the plain operations it stands for. Both
compute in float32; a kernel rounds once where the plain operations round after each step.
Activations are [B, T, H, W, C], channels last in memory. The kernels are operators of their own
(`torch.ops.xicon.vae_...`), so that `torch.compile` and counters see one call.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_EPSILON = 1e-12
"""The reference's guard against a division by zero."""

MAX_CHANNELS = 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton launches on the current device, which need not be that of the tensors.
_device_of: Any = torch.cuda.device_of
# Of the largest value; the kernel and the plain operations differ by their roundings.
_TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def fill_window(
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    kept: Tensor,
    window: Tensor,
    *,
    fused: bool,
) -> None:
    """Writes [kept | x] into a window, and the window's last frames into `kept`.

    Args:
        x: [B, T, H, W, C], the new frames.
        gain: [C]; x becomes silu((x + bias) / ||x + bias|| * sqrt(C) * gain) on the way, the norm
            over the channels. None writes x + bias.
        bias: [C], of the convolution that made x; None for zeros.
        kept: [B, keep, H, W, C], the frames before; changed. keep may be larger than T.
        window: [B, keep + T, H, W, C]; changed.
        fused: with the kernel.
    """
    if fused:
        torch.ops.xicon.vae_window(x.contiguous(), gain, bias, kept, window)
        return
    keep = kept.shape[1]
    window[:, :keep] = kept
    new = window[:, keep:]
    if bias is not None:
        x = x + bias
    if gain is None:
        new.copy_(x)
    else:
        F.silu(channel_norm(x, gain, out=new), inplace=True)
    kept.copy_(window[:, -keep:])


def channel_norm(x: Tensor, gain: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns x / ||x|| * sqrt(C) * gain, [..., C], the norm over the channels.

    Args:
        x: [..., C].
        gain: [C].
        out: where to write it, of the shape and dtype of x; a new tensor if None.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    normed = torch.div(x, norm.clamp_min_(_EPSILON), out=out).to(x.dtype)
    return normed.mul_(gain * x.shape[-1] ** 0.5)


def add_bias(y: Tensor, bias: Tensor | None, other: Tensor | None, *, fused: bool) -> Tensor:
    """Returns y + bias + other, written over y.

    Args:
        y: [..., C], changed.
        bias: [C], or None for zeros.
        other: of the shape of y, or None for zeros.
        fused: with the kernel, where y and other have the channels last in memory.
    """
    if fused and bias is not None and y.is_contiguous():
        torch.ops.xicon.vae_add(y, bias, None if other is None else other.contiguous())
        return y
    if bias is not None:
        y.add_(bias)
    return y if other is None else y.add_(other)


def interleave(pairs: Tensor, bias: Tensor | None, out: Tensor, *, fused: bool) -> None:
    """Writes two frames for each: the first and the second half of the channels.

    Args:
        pairs: [B, T, H, W, 2C].
        bias: [2C], added; None for zeros.
        out: [B, 2T, H, W, C].
        fused: with the kernel.
    """
    if fused and bias is not None:
        torch.ops.xicon.vae_interleave(pairs.contiguous(), bias, out)
        return
    if bias is not None:
        pairs = pairs + bias
    batch, frames, height, width, channels = pairs.shape
    halves = pairs.reshape(batch, frames, height, width, 2, channels // 2)
    out.view(batch, frames, 2, height, width, channels // 2).copy_(halves.movedim(4, 2))


def fits(dtype: torch.dtype, channels: int) -> bool:
    """Returns whether the kernels take activations of that type and width."""
    return dtype in _DTYPES and channels <= MAX_CHANNELS


@functools.cache
def why_not_fused(device: torch.device, dtype: torch.dtype) -> str:
    """Returns "" if the kernels run on a device and agree with the plain operations, else why not.

    Args:
        device: where they are to run.
        dtype: of the activations.
    """
    if dtype not in _DTYPES:
        return f"the kernels do not take {dtype}"
    try:
        triton = _triton()
        if device.type != "cuda" and not triton.is_interpreted():
            return "needs a CUDA device"
        error = _largest_error(device, dtype)
    except ImportError as reason:
        return f"Triton cannot be imported ({reason})"
    except Exception as reason:  # noqa: BLE001  compilers and drivers raise classes of their own
        return f"the kernel does not run: {str(reason).strip().splitlines()[:1]}"
    allowed = _TOLERANCES[dtype]
    return "" if error <= allowed else f"the kernel is off by {error:.1e}, allowed is {allowed:.0e}"


def _largest_error(device: torch.device, dtype: torch.dtype) -> float:
    """Returns how far the kernels are from the plain operations on a small case."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    x, gain, bias, kept, pairs = (
        draw(1, 1, 3, 5, 24),
        draw(24),
        draw(24),
        draw(1, 2, 3, 5, 24),
        draw(1, 2, 3, 5, 48),
    )
    results = []
    for fused in (False, True):
        memory, window, doubled = kept.clone(), draw(1, 3, 3, 5, 24), draw(1, 4, 3, 5, 24)
        fill_window(x, gain, bias, memory, window, fused=fused)
        interleave(pairs, torch.cat((bias, gain)), doubled, fused=fused)
        total = add_bias(x.clone(), bias, x, fused=fused)
        results.append(torch.cat([part.flatten() for part in (memory, window, doubled, total)]))
    plain, own = (part.float() for part in results)
    error = (plain - own).abs().max() / plain.abs().max()
    return float(error) if torch.isfinite(own).all() else float("inf")


def _triton() -> ModuleType:
    """Returns the kernels; imported when first used, because Triton is not everywhere."""
    from xicon_infer.ops import vae_triton

    return vae_triton


@torch.library.custom_op("xicon::vae_window", mutates_args=("kept", "window"))
def _window_op(
    x: Tensor, gain: Tensor | None, bias: Tensor | None, kept: Tensor, window: Tensor
) -> None:
    with _device_of(x):
        _triton().fill_window(x, gain, bias, kept, window)


@torch.library.custom_op("xicon::vae_add", mutates_args=("y",))
def _add_op(y: Tensor, bias: Tensor, other: Tensor | None) -> None:
    with _device_of(y):
        _triton().add_bias(y, bias, other)


@torch.library.custom_op("xicon::vae_interleave", mutates_args=("out",))
def _interleave_op(pairs: Tensor, bias: Tensor, out: Tensor) -> None:
    with _device_of(out):
        _triton().interleave(pairs, bias, out)


@_window_op.register_fake
def _(x: Tensor, gain: Tensor | None, bias: Tensor | None, kept: Tensor, window: Tensor) -> None:
    return None


@_add_op.register_fake
def _(y: Tensor, bias: Tensor, other: Tensor | None) -> None:
    return None


@_interleave_op.register_fake
def _(pairs: Tensor, bias: Tensor, out: Tensor) -> None:
    return None

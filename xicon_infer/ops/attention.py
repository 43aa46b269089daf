"""One attention call for every model, and the choice of the kernel behind it.

`attention(q, k, v, backend)` is softmax(q k^T / sqrt(head_dim)) v without a mask. The kernel is
chosen once per process and shape class by `choose_backend`, which really runs each candidate on a
small tensor of the right dtype and head width: a kernel that imports but does not run is absent.
The choice is explicit because PyTorch's own order never puts cuDNN first, and cuDNN is the faster
one on Hopper.

PyTorch's kernels (flash, cuDNN, efficient, math) are selected by `kernel_context`, entered once
around a whole forward pass, so that the blocks themselves stay free of context managers and can
be compiled as one graph.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from xicon_infer.errors import BackendUnavailable

Backend = Literal["flash3", "flash2", "cudnn", "flash", "efficient", "xformers", "math"]
BACKENDS: tuple[Backend, ...] = (
    "flash3",
    "flash2",
    "cudnn",
    "flash",
    "efficient",
    "xformers",
    "math",
)

_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

# Fastest first. Hopper and newer: FlashAttention 3 and cuDNN reach 600-650 TFLOP/s where
# PyTorch's built-in FlashAttention 2 stays near 350; before Hopper cuDNN has no such lead.
_ORDER_SM90: tuple[Backend, ...] = (
    "flash3",
    "cudnn",
    "flash2",
    "flash",
    "xformers",
    "efficient",
    "math",
)
_ORDER_OLDER: tuple[Backend, ...] = ("flash2", "flash", "cudnn", "xformers", "efficient", "math")
_ORDER_CPU: tuple[Backend, ...] = ("flash", "math")

_EXTRA_MODULE = {
    "flash3": "flash_attn_interface",
    "flash2": "flash_attn",
    "xformers": "xformers.ops",
}


class Probe(NamedTuple):
    """Whether one back end runs here: `reason` says why not (empty if it does)."""

    name: Backend
    available: bool
    reason: str


def attention(q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
    """Returns softmax(q k^T / sqrt(head_dim)) v.

    Args:
        q: [B, L, heads, head_dim].
        k: [B, S, heads, head_dim].
        v: [B, S, heads, head_dim].
        backend: the kernel, as `choose_backend` gave it. For PyTorch's own kernels the caller
            is inside `kernel_context(backend)`; outside, PyTorch picks one itself.

    Returns:
        Tensor [B, L, heads, head_dim], dtype of q.
    """
    if backend == "flash3":
        out = _extra("flash3").flash_attn_func(q, k, v)
        # Some builds return (out, softmax_lse).
        return out[0] if isinstance(out, tuple) else out
    if backend == "flash2":
        return _extra("flash2").flash_attn_func(q, k, v)
    if backend == "xformers":
        return _extra("xformers").memory_efficient_attention(q, k, v)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


@contextmanager
def kernel_context(backend: Backend) -> Iterator[None]:
    """Makes PyTorch use exactly the kernel `backend` inside; does nothing for the packages."""
    if backend not in _SDPA:
        yield
        return
    with sdpa_kernel([_SDPA[backend]]):
        yield


def choose_backend(
    requested: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Backend:
    """Returns the kernel to use: the requested one, or with "auto" the fastest that runs.

    Args:
        requested: "auto" or a name of `BACKENDS`.
        device: where q, k and v live.
        dtype: their dtype.
        head_dim: their last dimension.

    Raises:
        BackendUnavailable: the name is unknown, or the kernel does not run here; says why.
    """
    if device.type == "meta":
        return "math"  # nothing is computed there; it is the one kernel whose work is counted
    if requested == "auto":
        for name in _order(device):
            if not (reason := _try(name, device, dtype, head_dim)):
                return name
        raise BackendUnavailable(f"no attention kernel runs on {device}: {reason}")
    if requested not in BACKENDS:
        allowed = ", ".join(("auto", *BACKENDS))
        raise BackendUnavailable(
            f"'attention' must be one of {allowed}, got {requested!r}", field="attention"
        )
    name = next(b for b in BACKENDS if b == requested)
    if reason := _try(name, device, dtype, head_dim):
        raise BackendUnavailable(
            f"attention {requested!r} does not run on {device} in {dtype}: {reason}; "
            "use 'auto' or see `xicon-infer doctor`",
            field="attention",
        )
    return name


def probe_backends(
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    head_dim: int = 128,
) -> list[Probe]:
    """Returns every back end with the reason why it is absent, fastest first.

    Args:
        device: default: the GPU if there is one.
        dtype: default: bfloat16 on a GPU, float32 on the CPU.
        head_dim: width of a head.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    order = _order(device)
    names = order + tuple(b for b in BACKENDS if b not in order)
    reasons = [(name, _try(name, device, dtype, head_dim)) for name in names]
    return [Probe(name, not reason, reason) for name, reason in reasons]


def _order(device: torch.device) -> tuple[Backend, ...]:
    if device.type != "cuda":
        return _ORDER_CPU
    return _ORDER_SM90 if torch.cuda.get_device_capability(device) >= (9, 0) else _ORDER_OLDER


@functools.cache
def _extra(name: str) -> Any:
    """Returns the optional package behind a back end; imported when first used."""
    return importlib.import_module(_EXTRA_MODULE[name])


@functools.cache
def _try(name: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Returns "" if the kernel gives finite numbers on a small tensor, else the reason."""
    if name in _EXTRA_MODULE:
        if device.type != "cuda":
            return "needs a CUDA device"
        try:
            _extra(name)
        except ImportError as error:
            return f"package {_EXTRA_MODULE[name].split('.')[0]!r} cannot be imported ({error})"
    elif name in ("cudnn", "efficient") and device.type != "cuda":
        return "needs a CUDA device"
    q = torch.ones(1, 16, 2, head_dim, device=device, dtype=dtype)
    try:
        with kernel_context(name):
            finite = bool(torch.isfinite(attention(q, q, q, name)).all())
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        # Each package refuses a shape, dtype or device with its own exception class.
        return str(error).strip().splitlines()[0]
    return "" if finite else "it gave numbers that are not finite"

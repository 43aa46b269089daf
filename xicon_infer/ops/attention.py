"""One attention call for every model, and the kernels behind it.

`attention(q, k, v, backend)` is softmax(q k^T / sqrt(head_dim)) v without a mask. What is offered
is tried: `choose_backend` really runs a kernel on a small tensor of the right dtype and head width,
and one that imports but does not run is absent. An 8-bit kernel must also be exact enough
(`attention_gate`). Which of those that run is fastest is measured by `attention_choice`; the order
here is where it begins, and what it falls back to. The choice is explicit because PyTorch's own
order never puts cuDNN first, and cuDNN is the faster one on Hopper.

PyTorch's kernels (flash, cuDNN, efficient, math) are selected by `kernel_context`, entered once
around a whole forward pass, so that the blocks themselves stay free of context managers and can
be compiled as one graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from xicon_infer.errors import BackendUnavailable
from xicon_infer.ops.attention_gate import gate_reason
from xicon_infer.ops.attention_int8 import check_width, int8_attention
from xicon_infer.ops.attention_packages import (
    FLASH_IMPLEMENTATIONS,
    MODULES,
    first_line,
    kernel_errors,
    package_call,
    use_flash,
)

Backend = Literal[
    "flash3", "flash2", "torch_flash3", "torch_flash4", "cudnn", "flash", "efficient", "xformers",
    "sdpa", "math", "sage", "int8",
]  # fmt: skip
BACKENDS: tuple[Backend, ...] = (
    "flash3",
    "flash2",
    "torch_flash3",
    "torch_flash4",
    "cudnn",
    "flash",
    "efficient",
    "xformers",
    "sdpa",
    "math",
    "sage",
    "int8",
)
POLICIES = ("auto", "auto8", "ordered")
"""Instead of a kernel: the fastest, the fastest with 8-bit ones, the first in a fixed order."""

EIGHT_BIT: tuple[Backend, ...] = ("sage", "int8")
"""Kernels that round scores to 8 bits; no choice but an explicit one takes them."""

_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "torch_flash3": SDPBackend.FLASH_ATTENTION,
    "torch_flash4": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PYTORCH: frozenset[str] = frozenset((*_SDPA, "sdpa"))
"""Kernels that `kernel_context` selects; of these, one forward pass can use a single one."""

# Fastest first, by the compute capability from which it holds. Blackwell: cuDNN before
# FlashAttention 4 (1.2 to 2 times at shapes of diffusion models, sgl-project/sglang PR 33655).
# Hopper: FlashAttention 3 and cuDNN reach 600-650 TFLOP/s where PyTorch's built-in
# FlashAttention 2 stays near 350. Ada: cuDNN is ahead or equal (pytorch/pytorch PR 192799).
# Ampere: cuDNN is behind (0.8 times).
_ORDERS: dict[tuple[int, int], tuple[Backend, ...]] = {
    (10, 0): ("cudnn", "torch_flash4", "flash2", "flash", "xformers", "efficient", "sdpa", "math"),
    (9, 0): (
        *("flash3", "torch_flash3", "cudnn", "torch_flash4"),
        *("flash2", "flash", "xformers", "efficient", "sdpa", "math"),
    ),
    (8, 9): ("cudnn", "flash2", "flash", "xformers", "efficient", "sdpa", "math"),
    (0, 0): ("flash2", "flash", "cudnn", "xformers", "efficient", "sdpa", "math"),
}
_ORDER_CPU: tuple[Backend, ...] = ("flash", "math")


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
    if backend in PYTORCH:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        return out.transpose(1, 2)
    if backend == "int8":
        return int8_attention(q, k, v)
    found = package_call(backend)(q, k, v)
    # Some builds of FlashAttention 3 return (out, softmax_lse).
    return found[0] if isinstance(found, tuple) else found


@contextmanager
def kernel_context(*backends: Backend) -> Iterator[None]:
    """Makes PyTorch use exactly the kernels `backends` inside; does nothing for the packages.

    Args:
        backends: those of one forward pass; of PyTorch's own at most one kind.

    Raises:
        ValueError: there are two kinds; one call would silently run the kernel of the other.
    """
    wanted = {name for name in backends if name in PYTORCH}
    if len(wanted) > 1:
        raise ValueError(f"one pass can use a single kernel of PyTorch's, got {sorted(wanted)}")
    if not wanted:
        yield
        return
    name = wanted.pop()
    use_flash(name)
    try:
        if name == "sdpa":
            with sdpa_kernel(_priority(), set_priority=True):
                yield
        else:
            with sdpa_kernel([_SDPA[name]]):
                yield
    finally:
        if name in FLASH_IMPLEMENTATIONS:
            use_flash("flash")


def choose_backend(
    requested: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Backend:
    """Returns the kernel to use: the requested one, or for a policy the first that runs.

    Args:
        requested: a name of `POLICIES` or of `BACKENDS`.
        device: where q, k and v live.
        dtype: their dtype.
        head_dim: their last dimension.

    Raises:
        BackendUnavailable: the name is unknown, or the kernel does not run here or is not exact
            enough; says why.
    """
    if device.type == "meta":
        return "math"  # nothing is computed there; it is the one kernel whose work is counted
    if requested in POLICIES:
        for name in order_for(device):
            if not (reason := problem_of(name, device, dtype, head_dim)):
                return name
        raise BackendUnavailable(f"no attention kernel runs on {device}: {reason}")
    if requested not in BACKENDS:
        allowed = ", ".join((*POLICIES, *BACKENDS))
        raise BackendUnavailable(
            f"'attention' must be one of {allowed}, got {requested!r}", field="attention"
        )
    name = next(b for b in BACKENDS if b == requested)
    if reason := problem_of(name, device, dtype, head_dim):
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
    """Returns every back end with the reason why it is absent, in the order of the device.

    Args:
        device: default: the GPU if there is one.
        dtype: default: bfloat16 on a GPU, float32 on the CPU.
        head_dim: width of a head.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    order = order_for(device)
    names = order + tuple(b for b in BACKENDS if b not in order)
    reasons = [(name, problem_of(name, device, dtype, head_dim)) for name in names]
    return [Probe(name, not reason, reason) for name, reason in reasons]


def order_for(device: torch.device) -> tuple[Backend, ...]:
    """Returns the kernels that a policy may take on a device, the first one wanted most."""
    if device.type != "cuda":
        return _ORDER_CPU
    capability = torch.cuda.get_device_capability(device)
    return next(order for least, order in _ORDERS.items() if capability >= least)


@functools.cache
def problem_of(name: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Returns "" if the kernel runs and gives right numbers on a small tensor, else the reason.

    Args:
        name: the kernel.
        device: where q, k and v live.
        dtype: their dtype.
        head_dim: their last dimension.
    """
    if device.type != "cuda" and name not in ("flash", "math", "sdpa", "int8"):
        return "needs a CUDA device"
    if name in MODULES:
        try:
            package_call(name)
        except ImportError as error:
            return f"package {MODULES[name].split('.')[0]!r} cannot be imported ({error})"
    try:
        if name in EIGHT_BIT:
            check_width(head_dim)
            run = functools.partial(attention, backend=name)
            return gate_reason(run, device, dtype, head_dim)
        q = torch.ones(1, 16, 2, head_dim, device=device, dtype=dtype)
        with kernel_context(name):
            finite = bool(torch.isfinite(attention(q, q, q, name)).all())
    except kernel_errors() as error:
        return first_line(error)
    return "" if finite else "it gave numbers that are not finite"


def _priority() -> list[SDPBackend]:
    """Returns PyTorch's kernels in our order, for calls of which not all take the same kernel."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [name for name in order_for(device) if name in _SDPA]
    return list(dict.fromkeys(_SDPA[name] for name in names))

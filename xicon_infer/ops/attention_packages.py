"""The optional packages behind some attention kernels: found, imported, called alike.

A package is imported when its kernel is first tried; none of them is needed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [B, L, H, D], k and v [B, S, H, D] -> [B, L, H, D]."""

MODULES = {
    "flash3": "flash_attn_interface",
    "flash2": "flash_attn",
    "xformers": "xformers.ops",
    "sage": "sageattention",
}
"""Kernel -> the module that has it."""

DISTRIBUTIONS = (
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "xformers",
    "sageattention",
    "triton",
)
"""Packages whose version changes how fast a kernel is."""

FLASH_IMPLEMENTATIONS = {"torch_flash3": "FA3", "torch_flash4": "FA4"}
"""Kernel -> what PyTorch calls the implementation that takes the place of its own flash kernel."""

_CALLS: dict[str, Call] = {}


def package_call(name: str) -> Call:
    """Returns the function of a kernel that is in a package.

    Raises:
        ImportError: the package is not there, or is not what it should be.
    """
    if name not in _CALLS:
        _CALLS[name] = _call_of(name, importlib.import_module(MODULES[name]))
    return _CALLS[name]


def _call_of(name: str, module: Any) -> Call:
    if name == "xformers":
        return module.memory_efficient_attention
    if name == "sage":
        return sage_attention
    return module.flash_attn_func


def sage_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns SageAttention's [B, L, H, D]; the package chooses its kernel by the GPU.

    One operator to torch.compile, because the package's own code is not made to be traced.
    """
    return torch.ops.xicon_infer.sage_attention(q, k, v)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return importlib.import_module(MODULES["sage"]).sageattn(q, k, v, tensor_layout="NHD")


def _sage_shape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


_LIBRARY: Any = torch.library.Library("xicon_infer", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("sage_attention(Tensor q, Tensor k, Tensor v) -> Tensor")
_LIBRARY.impl("sage_attention", _sage, "CUDA")
torch.library.register_fake("xicon_infer::sage_attention", _sage_shape)


def use_flash(kernel: str) -> None:
    """Makes PyTorch's flash kernel the implementation that `kernel` names, else its own.

    Raises:
        RuntimeError: this PyTorch, or its installation, does not have it. ImportError: likewise.
        ValueError: likewise.
    """
    implementation = FLASH_IMPLEMENTATIONS.get(kernel)
    flash: Any = torch.nn.attention
    # PyTorch 2.10 can put another implementation in place, but not take it away again.
    needed = ("activate_flash_attention_impl", "restore_flash_attention_impl")
    if not all(hasattr(flash, name) for name in needed):
        if implementation is None:
            return
        raise RuntimeError(f"PyTorch {torch.__version__} cannot exchange its flash kernel")
    if flash.current_flash_attention_impl() == implementation:
        return
    if implementation is None:
        flash.restore_flash_attention_impl()
    else:
        flash.activate_flash_attention_impl(implementation)


def kernel_errors() -> tuple[type[Exception], ...]:
    """Returns what a kernel may raise when it does not take a shape, a dtype or a device.

    Each package has its own way to refuse. Evaluated when something was raised: Triton's errors
    derive from none of Python's, and asking for them must not import Triton.
    """
    known: tuple[type[Exception], ...] = (
        *(RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError),
    )
    triton: Any = sys.modules.get("triton.errors")
    return known if triton is None else (*known, triton.TritonError)


def first_line(error: Exception) -> str:
    """Returns the first line of what an error says, or its class where it says nothing."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

"""Which kernels run between the products of a block: the choice, with its reason.

- "eager": PyTorch, one kernel for each step. Runs everywhere; the numbers of the golden files.
- "triton": the kernels of `xicon_infer.ops.fused`. A GPU with Triton; on the CPU only in Triton's
  interpreter, for tests.
- "compile": torch.compile makes kernels of each block. The first pass takes seconds to minutes.
- "auto": Triton's on a GPU where they run and agree with their formulas, else eager.

A kernel that runs and gives wrong numbers counts as unavailable: before the first use on a device
each one computes a small case, which is compared with `xicon_infer.ops.fused_eager`. Unverified on
a GPU.
"""

from __future__ import annotations

import functools
import importlib
import logging
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from xicon_infer.errors import BackendUnavailable
from xicon_infer.ops import fused, fused_eager
from xicon_infer.ops.linear import QuantizedRows
from xicon_infer.ops.rope import Rope

_LOG = logging.getLogger(__name__)

Kernels = Literal["eager", "triton", "compile"]
KERNELS: tuple[Kernels, ...] = ("eager", "triton", "compile")

RECOMPILES = 64
"""Graphs that one block may have: lengths, with and without pose, fp8 and wide layers."""

_CXX = ("c++", "g++", "clang++")

COMPILER = "inductor"
"""Back end of torch.compile."""

_FP8_FROM = (8, 9)
"""The compute capability from which a GPU converts to e4m3."""

_WORST = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference allowed, of numbers around 1: a few roundings."""


class Choice(NamedTuple):
    """Kernels, and why these."""

    kernels: Kernels
    why: str


def choose_kernels(requested: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """Returns the kernels to use.

    Args:
        requested: "auto" or one of `KERNELS`.
        device: where the blocks run.
        dtype: of the tokens.

    Raises:
        BackendUnavailable: the name is unknown, or the kernels do not run here; says why.
    """
    if requested == "auto":
        return _automatic(device, dtype)
    known = next((name for name in KERNELS if name == requested), None)
    if known is None:
        allowed = ", ".join(("auto", *KERNELS))
        raise BackendUnavailable(
            f"'kernels' must be one of {allowed}, got {requested!r}", field="kernels"
        )
    if device.type == "meta":
        return Choice("eager", "nothing is computed on the meta device")
    reason = kernels_problem(known, device, dtype)
    if reason:
        raise BackendUnavailable(
            f"kernels {requested!r} do not run on {device} in {_name(dtype)}: {reason}; use 'auto' "
            "or 'eager'",
            field="kernels",
        )
    return Choice(known, "as asked")


def probe_kernels() -> list[Choice]:
    """Returns every kind with the reason why it does not run here, "" if it does."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    return [Choice(kernels, kernels_problem(kernels, device, dtype)) for kernels in KERNELS]


@functools.cache
def kernels_problem(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> str:
    """Returns why kernels cannot be used on a device, or "" if they can. Tried once."""
    if kernels == "eager":
        return ""
    try:
        return _triton_problem(device, dtype) if kernels == "triton" else _compile_problem(device)
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise classes of their own
        return _first_line(error)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of a block compiled as one graph, for all blocks of a kind.

    The length of the sequence is a symbol from the first call on: another length needs no other
    graph.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES)
    ready = torch.compile(function, fullgraph=True, backend=COMPILER)

    def run(block: Any, x: Tensor, modulation: Tensor, rope: Rope, *rest: Any) -> Any:
        for tensor, axis in ((x, 1), (rope.cos, 0), (rope.sin, 0)):
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
        try:
            return ready(block, x, modulation, rope, *rest)
        except torch._dynamo.exc.TorchDynamoException as error:
            # What the compiler itself said, where torch.compile only passes it on.
            cause = getattr(error, "inner_exception", error)
            raise BackendUnavailable(
                f"kernels 'compile': {_first_line(cause)}; use 'eager'", field="kernels"
            ) from error

    return run


def _automatic(device: torch.device, dtype: torch.dtype) -> Choice:
    if device.type != "cuda":
        return Choice("eager", f"auto: the kernels are for CUDA, and this is {device.type}")
    reason = kernels_problem("triton", device, dtype)
    if reason:
        _say_once(f"kernels of Triton are not used on {device}: {reason}")
        return Choice("eager", f"auto: those of Triton do not run: {reason}")
    return Choice("triton", f"auto: they run on {device} and agree with their formulas")


@functools.cache
def _say_once(message: str) -> None:
    _LOG.warning(message)


def _triton_problem(device: torch.device, dtype: torch.dtype) -> str:
    if dtype not in _WORST:
        return "they compute in float32 and would lose digits"
    try:
        module = importlib.import_module("xicon_infer.ops.fused_triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if device.type != "cuda" and not module.INTERPRETED:
        return "they need a CUDA device"
    fp8 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= _FP8_FROM
    return _difference(device, dtype, fp8=fp8)


def _compile_problem(device: torch.device) -> str:
    """Returns what torch.compile lacks. Nothing is compiled: that alone takes ten seconds."""
    if device.type == "cuda":
        return "" if find_spec("triton") else "package 'triton' is not installed"
    return "" if any(map(shutil.which, _CXX)) else f"no C++ compiler ({', '.join(_CXX)}) is there"


def _difference(device: torch.device, dtype: torch.dtype, *, fp8: bool) -> str:
    """Returns which kernel is off, and by how much, or "" if all agree with their formulas."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, like)

    wide = torch.float32
    width, heads, eps = 96, 3, 1e-6
    x = drawn(2, 5, 3 * width)[..., width : 2 * width]
    update, weight, bias = drawn(2, 5, width), drawn(width), drawn(width)
    shift, scale, gate = (drawn(2, 1, width, like=wide) for _ in range(3))
    rope = Rope(drawn(5, width // heads // 2, like=wide), drawn(5, width // heads // 2, like=wide))
    total, modulated = fused_eager.norm_rows(x, update, gate, scale, shift, eps=eps, modulate=True)
    affine = fused_eager.norm_rows(x, update, None, weight, bias, eps=eps, modulate=False)[1]
    modulation, norm3 = (scale, shift), (weight, bias)
    found = fused.add_norm(x, update, gate, modulation, eps=eps, modulate=True, fp8=False)
    turned = fused_eager.rms_rope(x, weight, rope, eps=eps)
    pairs: dict[str, tuple[Any, Tensor]] = {
        "add_norm": (found[1], modulated),
        "sum of add_norm": (found[0], total),
        "norm_rope": (fused.norm_rope(x, weight, eps, heads, rope).flatten(2), turned),
    }
    if fp8:
        rows = fused.add_norm(x, update, None, norm3, eps=eps, modulate=False, fp8=True)[1]
        active = fused_eager.to_quantize(x, update, gelu=True)
        pairs["add_norm in fp8"] = (rows, affine)
        pairs["quantize_rows"] = (fused.quantize_rows(x, update, gelu=True), active)
    for name, (value, right) in pairs.items():
        rounded = isinstance(value, QuantizedRows)
        given = _brought_back(value) if rounded else value
        # A number in e4m3 is off by 1/16 of itself at most, here at most 6 %.
        off = ((given.float() - right.float()).abs() / right.float().abs().clamp(min=1)).max()
        if not off.item() <= (0.07 if rounded else _WORST[dtype]):
            return f"{name} is off by {off.item():.2g}"
    return ""


def _brought_back(rows: QuantizedRows) -> Tensor:
    scale = rows.scale.reshape(*rows.values.shape[:-1], 1)
    return rows.values.float() * scale


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

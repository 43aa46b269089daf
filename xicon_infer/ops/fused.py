"""What happens between the large products of a block, in few kernels instead of sixty.

- `norm_modulate`: LayerNorm without weights, then (1 + scale) x + shift.
- `norm_rope`: RMSNorm over all heads together, weight, rotary embedding; reads slices of a fused
  q, k, v product where they lie.
- `add_norm`: x + gate * update and the norm that follows, in one pass; the new x too.
- `gated_add`: x + gate * update alone.
- `quantize_rows`: e4m3 with one scale per row, of x, of a sum, or of GELU(x).

Norms can end in e4m3 as well (`fp8`), so that an fp8 product needs no pass of its own. Arithmetic
is float32 with one rounding at the end; the sum of `add_norm` is rounded to the dtype of x before
the norm reads it, as the layers behind it read it. `xicon_infer.ops.fused_eager` has the formulas.

Each is one opaque operator (`torch.ops.xicon`), so that torch.compile takes a block as one graph.
The operators run Triton kernels: on a GPU, or on the CPU in Triton's interpreter, for tests
(TRITON_INTERPRET=1 before Triton is imported). Unverified on a GPU.

Shape letters: B batch, L tokens, D width, H heads, M = B L.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from xicon_infer.ops.linear import QuantizedRows
from xicon_infer.ops.rope import Rope

_NO_NORM, _MODULATE, _AFFINE = 0, 1, 2  # as in `fused_triton`
_OPERATORS: Any = torch.library.Library("xicon", "FRAGMENT")  # type: ignore[no-untyped-call]
_FP8 = torch.float8_e4m3fn


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, fp8: bool
) -> Tensor | QuantizedRows:
    """Returns LayerNorm(x) (1 + scale) + shift, [B, L, D].

    Args:
        x: [B, L, D]; rows may lie apart.
        shift: float32 [B, 1, D].
        scale: float32 [B, 1, D].
        eps: of the norm.
        fp8: return e4m3 and a scale per row instead of the dtype of x.
    """
    found = _norm_rows(x, None, None, scale, shift, eps, _MODULATE, fp8)
    return _next(x, found)


def add_norm(
    x: Tensor,
    update: Tensor,
    gate: Tensor | None,
    affine: tuple[Tensor, Tensor],
    *,
    eps: float,
    modulate: bool,
    fp8: bool,
) -> tuple[Tensor, Tensor | QuantizedRows]:
    """Returns x + gate * update, and the norm of it.

    Args:
        x: [B, L, D]; rows may lie apart.
        update: [B, L, D].
        gate: float32 [B, 1, D], or None for 1.
        affine: (scale, shift), [B, 1, D] or the weights [D] of a LayerNorm.
        eps: of the norm.
        modulate: the norm is multiplied by 1 + scale, not by scale.
        fp8: return the norm as e4m3 and a scale per row.
    """
    scale, shift = (part.reshape(-1, 1, part.shape[-1]) for part in affine)
    norm = _MODULATE if modulate else _AFFINE
    found = _norm_rows(x, update, gate, scale, shift, eps, norm, fp8)
    return found[0], _next(x, found)


def gated_add(x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    """Returns x + gate * update, [B, L, D]; gate float32 [B, 1, D], or None for 1."""
    return _norm_rows(x, update, gate, None, None, 0.0, _NO_NORM, False)[0]


def norm_rope(x: Tensor, weight: Tensor, eps: float, heads: int, rope: Rope | None) -> Tensor:
    """Returns the normed heads [B, L, H, head_dim], turned where there is a table.

    Args:
        x: [B, L, D]; rows may lie apart.
        weight: [D], of the RMSNorm.
        eps: of the norm.
        heads: H.
        rope: the table of the L tokens, or None.
    """
    table = (None, None) if rope is None else rope
    out = torch.ops.xicon.rms_rope(_rows(x), weight, *table, eps)
    return out.reshape(*x.shape[:-1], heads, -1)


def quantize_rows(x: Tensor, more: Tensor | None = None, *, gelu: bool = False) -> QuantizedRows:
    """Returns x, x + more, or GELU (tanh form) of that, as e4m3 with a scale per row.

    Args:
        x: [B, L, D]; rows may lie apart.
        more: [B, L, D], or None.
        gelu: apply GELU.
    """
    more = None if more is None else _rows(more)
    values, scale = torch.ops.xicon.quantize_rows(_rows(x), more, gelu)
    return QuantizedRows(values, scale, x.dtype)


def _norm_rows(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    norm: int,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    update = None if update is None else _rows(update)
    return torch.ops.xicon.norm_rows(_rows(x), update, gate, scale, shift, eps, norm, fp8)


def _next(x: Tensor, found: tuple[Tensor, Tensor, Tensor]) -> Tensor | QuantizedRows:
    """Returns the normed rows of what an operator gave."""
    return QuantizedRows(*found[1:], x.dtype) if found[2].numel() else found[1]


def _rows(x: Tensor) -> Tensor:
    """Returns x with the numbers of a row side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _kernels() -> Any:
    """Returns the module of the kernels, which needs Triton; imported when first used."""
    return importlib.import_module("xicon_infer.ops.fused_triton")


def _empty_norm(
    x: Tensor, update: Tensor | None, norm: int, fp8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the outputs of `norm_rows`; those that are not wanted are empty."""
    batch, tokens, width = x.shape
    total = x.new_empty((batch, tokens, width) if update is not None else (0,))
    out = x.new_empty((batch, tokens, width) if norm else (0,), dtype=_FP8 if fp8 else x.dtype)
    scale = x.new_empty((batch * tokens, 1) if fp8 else (0,), dtype=torch.float32)
    return total, out, scale


def _empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the outputs of `quantize_rows`."""
    batch, tokens, width = x.shape
    values = x.new_empty((batch, tokens, width), dtype=_FP8)
    return values, x.new_empty((batch * tokens, 1), dtype=torch.float32)


def _run_norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    norm: int,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outs = _empty_norm(x, update, norm, fp8)
    wanted = (
        outs[0] if update is not None else None,
        outs[1] if norm else None,
        outs[2] if fp8 else None,
    )
    _kernels().norm_rows(x, update, gate, scale, shift, wanted, eps=eps, norm=norm)
    return outs


def _run_rms(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> Tensor:
    out = x.new_empty(x.shape)
    table = None if cos is None or sin is None else (cos.contiguous(), sin.contiguous())
    _kernels().rms_rope(x, weight, table, out, eps)
    return out


def _run_quantize(x: Tensor, more: Tensor | None, gelu: bool) -> tuple[Tensor, Tensor]:
    values, scale = _empty_rows(x)
    _kernels().quantize_rows(x, more, values, scale, gelu=gelu)
    return values, scale


def _register(schema: str, run: Any, shape: Any) -> None:
    """Makes an operator: what runs on GPU and CPU, and what torch.compile traces."""
    name = schema.split("(")[0]
    _OPERATORS.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CUDA", "CPU"):
        _OPERATORS.impl(name, run, device)
    torch.library.register_fake(f"xicon::{name}", shape, lib=_OPERATORS)


_register(
    "norm_rows(Tensor x, Tensor? update, Tensor? gate, Tensor? scale, Tensor? shift, float eps, "
    "int norm, bool fp8) -> (Tensor, Tensor, Tensor)",
    _run_norm,
    lambda x, update, gate, scale, shift, eps, norm, fp8: _empty_norm(x, update, norm, fp8),
)
_register(
    "rms_rope(Tensor x, Tensor weight, Tensor? cos, Tensor? sin, float eps) -> Tensor",
    _run_rms,
    lambda x, weight, cos, sin, eps: x.new_empty(x.shape),
)
_register(
    "quantize_rows(Tensor x, Tensor? more, bool gelu) -> (Tensor, Tensor)",
    _run_quantize,
    lambda x, more, gelu: _empty_rows(x),
)

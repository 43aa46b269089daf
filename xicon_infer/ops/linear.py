"""Linear layers whose weight is stored as 8-bit floats.

A stored fp8 weight stands for `weight * scale_weight`; the scale is one float32 number, or one
per output row, or absent. By default the layer brings the weight to the dtype of its input and
multiplies there: half the memory, the same speed class, the numbers of the file. Multiplying in
fp8 on the tensor cores is an option (`use_matmul`), off by default because it also rounds the
activations to three bits of mantissa. Activations are scaled by their own largest magnitude, per
row or per tensor, found anew at every call: a fixed scale clips what exceeds it.

The scale goes into the weight (one rounding of each weight), not into the output: products of
unscaled fp8 weights reach 1e4 and more, which float16 cannot hold at real activation sizes, and
bias and sum stay in one kernel. Relative error measured against float64 (in 1024, out 512, unit
normal input): bfloat16 2.3e-3 both ways; float16 2.6e-4 in the weight, 2.9e-4 in the output.

Shape letters: M rows of the input, K input width, N output width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xicon_infer.errors import BackendUnavailable, InvalidRequest

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

Matmul = Literal["dequant", "scaled_mm_row", "scaled_mm_tensor"]
"""How an fp8 layer multiplies: in the dtype of the input, or in fp8 with one activation scale per
row, or with one activation scale for the whole input."""

MATMULS: tuple[Matmul, ...] = ("dequant", "scaled_mm_row", "scaled_mm_tensor")

SCALED_MM_MULTIPLE = 16
"""K and N of a fp8 matrix product must be multiples of this; M may be any number."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Floor of a scale, so that an all-zero weight or row does not divide by zero."""


class QuantizedRows(NamedTuple):
    """Rounded activations: values e4m3 [..., K], scale float32 [M, 1], dtype of the output."""

    values: Tensor
    scale: Tensor
    dtype: torch.dtype


def cast_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x rounded to an fp8 dtype, saturated at its largest finite value.

    A plain cast turns what exceeds 448 into NaN for e4m3fn; hence the clamp.
    """
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def quantize_weight(
    weight: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, *, per_row: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns a weight as fp8 and the scale that brings it back.

    Args:
        weight: [N, ...] floating point.
        dtype: one of `FP8_DTYPES`.
        per_row: one scale per output row instead of one for all.

    Returns:
        The fp8 weight [N, ...], and the scale, float32 [1] or [N, 1]: largest magnitude over
        the largest fp8 number.

    Raises:
        InvalidRequest: dtype is not an fp8 type.
    """
    if dtype not in FP8_DTYPES:
        raise InvalidRequest(f"fp8 dtype: got {dtype}, allowed are {FP8_DTYPES}")
    wide = weight.float()
    rows = wide.flatten(1) if per_row else wide.reshape(1, -1)
    largest = rows.abs().amax(dim=1, keepdim=True)
    scale = (largest / torch.finfo(dtype).max).clamp(min=SMALLEST_SCALE)
    scaled = (rows / scale).reshape(weight.shape)
    return cast_fp8(scaled, dtype), scale if per_row else scale.reshape(1)


def dequantize(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns `weight * scale` in `dtype`, multiplied in float32 and rounded once.

    Args:
        weight: [N, ...], any floating dtype.
        scale: float32 with one element, or N elements ([N] or [N, 1]); None for no scale.
        dtype: of the result.
    """
    plain = weight.to(dtype)
    if scale is None:
        return plain
    rows = scale.reshape(-1, *(1,) * (weight.ndim - 1))
    # The float32 scale makes the product float32 inside the kernel; `out` rounds on the store,
    # so no float32 copy of the weight exists. fp8 to any wider dtype is exact.
    out = plain if plain is not weight else torch.empty_like(plain)
    return torch.mul(plain, rows, out=out)


class Fp8Linear(nn.Module):
    """A linear layer that holds its weight in the stored dtype, usually fp8.

    Parameter names match the files: `weight` [N, K], `bias` [N], `scale_weight` float32 with one
    or N elements. Moving the module to another dtype moves the bias only.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        dtype: of the stored weight.
        scale_shape: shape of `scale_weight`, or None for a file without scales.
        device: where to make the empty tensors.
    """

    scale_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float8_e4m3fn,
        scale_shape: tuple[int, ...] | None = (1,),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.matmul: Matmul = "dequant"
        weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        scale = None if scale_shape is None else torch.ones(scale_shape, device=device)
        self.register_buffer("scale_weight", scale)
        empty_bias = torch.zeros(out_features, device=device)
        self.bias = nn.Parameter(empty_bias, requires_grad=False) if bias else None

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """Returns [..., N] in the dtype of x, from x [..., K]; rows where `takes_rows` says so."""
        if isinstance(x, QuantizedRows):
            return _scaled_mm(x, self.weight, self.scale_weight, self.bias, "scaled_mm_row")
        if self.matmul == "dequant" or self.weight.dtype not in FP8_DTYPES:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, dequantize(self.weight, self.scale_weight, x.dtype), bias)
        return _scaled_mm(x, self.weight, self.scale_weight, self.bias, self.matmul)

    def extra_repr(self) -> str:
        """Returns what `print(module)` shows."""
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype}, {self.matmul}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """Moves the module; weight and scale follow to a device but never to another dtype."""
        weight, scale = self.weight.data, self.scale_weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight.dtype != weight.dtype:
            self.weight.data = weight.to(self.weight.device)
        moved = self.scale_weight
        if scale is not None and moved is not None and moved.dtype != scale.dtype:
            self.scale_weight = scale.to(moved.device)
        return self


def replace_linears(
    module: nn.Module,
    dtypes: Mapping[str, torch.dtype],
    scale_shapes: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """Replaces exactly the linear layers whose weight the file holds as fp8; returns their names.

    Subclasses of `nn.Linear` stay: the owners of those read the weight without calling it.

    Args:
        module: built on the meta device, before loading.
        dtypes: stored dtype by tensor name, as `blocks.0.ffn.0.weight`.
        scale_shapes: shape by scale name, as `blocks.0.ffn.0.scale_weight`; a layer that is not
            there has no scale.
    """
    replaced = []
    for name, layer in list(module.named_modules()):
        dtype = dtypes.get(f"{name}.weight")
        if type(layer) is not nn.Linear or dtype not in FP8_DTYPES:
            continue
        parent, _, leaf = name.rpartition(".")
        fp8 = Fp8Linear(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            dtype=dtype,
            scale_shape=scale_shapes.get(f"{name}.scale_weight"),
            device=layer.weight.device,
        )
        setattr(module.get_submodule(parent), leaf, fp8)
        replaced.append(name)
    return replaced


def set_weight(layer: nn.Linear | Fp8Linear, weight: Tensor, scale: Tensor | None) -> None:
    """Gives a linear layer another weight and makes it the kind of layer that holds it.

    The class changes in place, as torch.nn.utils.parametrize does: the layer's identity and the
    names of its parameters stay. It becomes an `Fp8Linear` for an fp8 weight, else an `nn.Linear`.

    Args:
        layer: exactly an `nn.Linear` or an `Fp8Linear`.
        weight: [N, K].
        scale: of an fp8 weight, or None.
    """
    layer.weight.data = weight
    if weight.dtype not in FP8_DTYPES:
        if isinstance(layer, Fp8Linear):
            del layer.scale_weight, layer.matmul
            layer.__class__ = nn.Linear  # type: ignore[assignment]
        return
    if not isinstance(layer, Fp8Linear):
        layer.__class__ = Fp8Linear  # type: ignore[assignment]
        layer.matmul = "dequant"  # type: ignore[assignment]
        layer.register_buffer("scale_weight", None)
    layer.scale_weight = scale


def takes_rows(*layers: nn.Module) -> bool:
    """Returns whether all of these layers multiply rows in fp8 and have nothing beside them."""
    return all(type(each) is Fp8Linear and each.matmul == "scaled_mm_row" for each in layers)


def use_matmul(module: nn.Module, matmul: Matmul, device: torch.device) -> list[str]:
    """Sets how every fp8 layer multiplies; returns the names of layers that stay on "dequant".

    A layer stays when its weight is not fp8, a width is not a multiple of 16, or the device
    cannot multiply with its kind of fp8.

    Args:
        module: holds the layers.
        matmul: one of `MATMULS`.
        device: where the layers will run.

    Raises:
        InvalidRequest: matmul is unknown.
        BackendUnavailable: the device cannot multiply this way.
    """
    check_matmul(matmul, device)
    left = []
    for name, layer in module.named_modules():
        if isinstance(layer, Fp8Linear):
            fits = _fits(layer) and not matmul_problem(matmul, str(device), layer.weight.dtype)
            layer.matmul = matmul if fits else "dequant"
            if not fits:
                left.append(name)
    return left


def check_matmul(matmul: str, device: torch.device) -> None:
    """Refuses a way to multiply that is unknown or that the device does not have.

    Raises:
        InvalidRequest: matmul is unknown.
        BackendUnavailable: the device cannot multiply this way.
    """
    known = next((m for m in MATMULS if m == matmul), None)
    if known is None:
        raise InvalidRequest(f"matmul: got {matmul!r}, allowed are {', '.join(MATMULS)}")
    reason = matmul_problem(known, str(device))
    if reason:
        raise BackendUnavailable(f"matmul {matmul!r} cannot be used on {device}: {reason}")


def best_matmul(device: torch.device) -> tuple[Matmul, dict[Matmul, str]]:
    """Returns the first way to multiply that works on a device, and why those before it do not.

    Per row, per tensor, dequantised. Per row before per tensor: the same speed class, and one
    outlier does not cost all rows their precision. A CPU works through fp8 products number by
    number; there dequantising is faster (`benchmarks/fp8_linear.py`).
    """
    problems: dict[Matmul, str] = {}
    candidates: tuple[Matmul, ...] = ("scaled_mm_row", "scaled_mm_tensor")
    for matmul in candidates:
        problem = matmul_problem(matmul, str(device))
        if not problem:
            return matmul, problems
        problems[matmul] = problem
    return "dequant", problems


@lru_cache(maxsize=64)
def matmul_problem(matmul: Matmul, device: str, dtype: torch.dtype = FP8_DTYPES[0]) -> str:
    """Returns why `device` cannot multiply this way, or "" if it can.

    Runs one small product and compares it with the dequantised one: a call that returns wrong
    numbers counts as unavailable.

    Args:
        matmul: one of `MATMULS`.
        device: as "cuda:0".
        dtype: of the weight, one of `FP8_DTYPES`.
    """
    if matmul == "dequant":
        return ""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 64, generator=generator).to(device, torch.bfloat16)
    bias = torch.randn(48, generator=generator).to(device, torch.bfloat16)
    wide = torch.randn(48, 64, generator=generator).to(device)
    weight, scale = quantize_weight(wide, dtype, per_row=matmul == "scaled_mm_row")
    try:
        y = _scaled_mm(x, weight, scale, bias, matmul).float()
        expected = F.linear(x.float(), dequantize(weight, scale, torch.float32), bias.float())
        error_norm = ((y - expected).norm() / expected.norm()).item()
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        return str(error).strip().split("\n")[0] or type(error).__name__
    # Rounding activations to e4m3 costs 2.6 % RMS per element; a wrong layout or scale costs 100 %.
    return "" if error_norm < 0.1 else f"its result is off by {error_norm:.2g} relative"


def quantize_activation(x: Tensor, *, by_row: bool) -> tuple[Tensor, Tensor]:
    """Returns activations as e4m3, and the float32 scale that brings them back.

    Nothing of the size of x is made in float32: the quotient is rounded to the dtype of x on the
    way. That rounding is at least 16 times finer than the one to e4m3.

    Args:
        x: [M, K], bfloat16, float16 or float32.
        by_row: one scale per row instead of one for all.

    Returns:
        [M, K] e4m3, and the scale [M, 1] or []. A row with NaN or infinity (or all) multiplies
        to NaN.
    """
    norm = torch.linalg.vector_norm
    if by_row:
        largest = norm(x, math.inf, dim=1, keepdim=True, dtype=torch.float32)
    else:
        largest = norm(x, math.inf, dtype=torch.float32)
    scale = (largest / torch.finfo(torch.float8_e4m3fn).max).clamp_(min=SMALLEST_SCALE)
    # As in `dequantize`: computed in float32 inside the kernel. No quotient exceeds 448 by more
    # than its rounding, so none needs to be clamped.
    scaled = torch.div(x, scale if by_row else scale.reshape(1), out=torch.empty_like(x))
    return scaled.to(torch.float8_e4m3fn), scale


def _fits(layer: Fp8Linear) -> bool:
    """Returns whether a layer's weight can be a factor of an fp8 product."""
    widths = (layer.in_features, layer.out_features)
    return layer.weight.dtype in FP8_DTYPES and not any(n % SCALED_MM_MULTIPLE for n in widths)


def _scaled_mm(
    x: Tensor | QuantizedRows,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    matmul: str,
) -> Tensor:
    """Returns x W^T scaled, plus bias, [..., N] in the dtype of x; x is rounded to e4m3.

    The kernels take scales per row with bfloat16 output only. Scales per weight row cannot join a
    product with one activation scale, so they multiply its output; that is bfloat16 too, because
    unscaled sums exceed float16. The bias is added inside the kernel where the output is of 16
    bits. Fast accumulation leaves partial sums in the tensor cores: its error is below that of the
    three-bit factors.

    Source: pytorch/pytorch: torch._scaled_mm (scales multiply, second factor column-major).
    """
    by_row = matmul == "scaled_mm_row"
    if isinstance(x, QuantizedRows):
        shape, activation, activation_scale = x.values.shape, x.values.flatten(0, -2), x.scale
    else:
        shape, rows = x.shape, x.reshape(-1, x.shape[-1])
        rows = rows.float() if x.dtype == torch.float64 else rows
        activation, activation_scale = quantize_activation(rows, by_row=by_row)
    flat = torch.ones(1, device=weight.device) if scale is None else scale.reshape(-1)
    late = flat.numel() > 1 and not by_row
    if by_row:
        weight_scale = flat.expand(weight.shape[0])[None].contiguous()
    else:
        weight_scale = torch.ones((), device=weight.device) if late else flat.reshape(())
    direct = not by_row and not late and x.dtype in (torch.float16, torch.float32)
    out_dtype = x.dtype if direct else torch.bfloat16
    fused = bias is not None and not late and out_dtype != torch.float32
    y = torch._scaled_mm(
        activation,
        weight.t(),
        activation_scale,
        weight_scale,
        bias=bias.to(out_dtype) if bias is not None and fused else None,
        out_dtype=out_dtype,
        use_fast_accum=True,
    )
    if late:
        y = y.mul_(flat)
    if bias is not None and not fused:
        y = y.add_(bias)
    return y.to(x.dtype).reshape(*shape[:-1], -1)

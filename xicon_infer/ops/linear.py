"""Linear layers whose weight is stored as 8-bit floats.

A stored fp8 weight stands for `weight * scale_weight`; the scale is one float32 number, or one
per output row, or absent. By default the layer brings the weight to the dtype of its input and
multiplies there: half the memory, the same speed class, the numbers of the file. Multiplying in
fp8 on the tensor cores is an option (`use_matmul`), off by default because it also rounds the
activations to three bits of mantissa.

The scale goes into the weight (one rounding of each weight), not into the output: products of
unscaled fp8 weights reach 1e4 and more, which float16 cannot hold at real activation sizes, and
bias and sum stay in one kernel. Relative error measured against float64 (in 1024, out 512, unit
normal input): bfloat16 2.3e-3 both ways; float16 2.6e-4 in the weight, 2.9e-4 in the output.

Shape letters: M rows of the input, K input width, N output width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Literal

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
"""K and N of a fp8 matrix product must be multiples of this."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Floor of a scale, so that an all-zero weight or row does not divide by zero."""


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

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., N] in the dtype of x, from x [..., K]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.matmul == "dequant" or self.weight.dtype not in FP8_DTYPES:
            return F.linear(x, dequantize(self.weight, self.scale_weight, x.dtype), bias)
        y = _scaled_mm(x, self.weight, self.scale_weight, self.matmul).to(x.dtype)
        return y if bias is None else y + bias

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


def use_matmul(module: nn.Module, matmul: Matmul, device: torch.device) -> list[str]:
    """Sets how every fp8 layer multiplies; returns the names of layers that stay on "dequant".

    A layer stays when its weight is not fp8 or a width is not a multiple of 16.

    Args:
        module: holds the layers.
        matmul: one of `MATMULS`.
        device: where the layers will run.

    Raises:
        InvalidRequest: matmul is unknown.
        BackendUnavailable: the device cannot multiply this way.
    """
    if matmul not in MATMULS:
        raise InvalidRequest(f"matmul: got {matmul!r}, allowed are {', '.join(MATMULS)}")
    reason = "" if matmul == "dequant" else matmul_problem(matmul, str(device))
    if reason:
        raise BackendUnavailable(f"matmul {matmul!r} cannot be used on {device}: {reason}")
    left = []
    for name, layer in module.named_modules():
        if isinstance(layer, Fp8Linear):
            fits = layer.weight.dtype in FP8_DTYPES and not (
                layer.in_features % SCALED_MM_MULTIPLE or layer.out_features % SCALED_MM_MULTIPLE
            )
            layer.matmul = matmul if fits else "dequant"
            if not fits:
                left.append(name)
    return left


@lru_cache(maxsize=32)
def matmul_problem(matmul: Matmul, device: str) -> str:
    """Returns why `device` cannot multiply this way, or "" if it can.

    Runs one small product and compares it with the dequantised one: a call that returns wrong
    numbers counts as unavailable.
    """
    if matmul == "dequant":
        return ""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, generator=generator).to(device, torch.bfloat16)
    weight, scale = quantize_weight(torch.randn(48, 64, generator=generator).to(device))
    try:
        y = _scaled_mm(x, weight, scale, matmul).float()
        expected = F.linear(x.float(), dequantize(weight, scale, torch.float32))
        error_norm = ((y - expected).norm() / expected.norm()).item()
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        return str(error).strip().split("\n")[0] or type(error).__name__
    # Rounding activations to e4m3 costs 2.6 % RMS per element; a wrong layout or scale costs 100 %.
    return "" if error_norm < 0.1 else f"its result is off by {error_norm:.2g} relative"


def _scaled_mm(x: Tensor, weight: Tensor, scale: Tensor | None, matmul: Matmul) -> Tensor:
    """Returns x W^T scaled, bfloat16 [..., N]; activations are rounded to e4m3 on the fly.

    Source: pytorch/pytorch: torch._scaled_mm (scales multiply, second factor column-major).
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    by_row = matmul == "scaled_mm_row"
    largest = rows.abs().amax(dim=1, keepdim=True) if by_row else rows.abs().amax()
    activation_scale = (largest / torch.finfo(torch.float8_e4m3fn).max).clamp(min=SMALLEST_SCALE)
    activation = cast_fp8(rows / activation_scale, torch.float8_e4m3fn)
    flat = torch.ones(1, device=x.device) if scale is None else scale.reshape(-1)
    per_row_weight = flat.numel() > 1 and not by_row
    if by_row:
        weight_scale = flat.expand(weight.shape[0])[None].contiguous()
    else:  # one number for the product; scales per weight row are applied to the output
        weight_scale = torch.ones((), device=x.device) if per_row_weight else flat.reshape(())
    y = torch._scaled_mm(
        activation, weight.t(), activation_scale, weight_scale, out_dtype=torch.bfloat16
    )
    y = y * flat if per_row_weight else y
    return y.to(torch.bfloat16).reshape(*x.shape[:-1], -1)

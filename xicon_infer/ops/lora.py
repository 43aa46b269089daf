"""LoRA on a loaded model: beside the weights, or merged into them.

Modes:
- "full" (default): low-rank parts run beside the linear layers, so an fp8 weight keeps its exact
  bytes; everything else (differences of norms, biases, modulation, convolutions) is added once
  to the parameter. Costs 2 r (in + out) operations per token and layer.
- "merge": everything is added to the weights, computed in float32. An fp8 weight is dequantised
  first and stored again as `requantize` says.
- "comfy_unmerged": what the ComfyUI wrapper applies with merge_loras = false: weights of linear
  layers outside the head, nothing else.
- "comfy_parity": the same with the wrapper's scaling fault. Where an fp8 weight has at least as
  many elements as the input, the wrapper multiplies the LoRA part by the fp8 scale too, which
  all but removes it.

`apply_loras` sets the whole state: what was applied before is removed first, so two calls never
add up, and an empty list restores the model. That is also how LoRAs are swapped between jobs
(`lora_undo.is_swappable` says whether they can be). A later change of device follows along.

Fused projections: apply before or after. `qkv` in a self-attention takes the deltas of q, k and v
as row blocks. A plain layer with a side path is no longer exactly an `nn.Linear`, so code that
fuses by type refuses it instead of losing the side path; merge, or fuse first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.ops.linear import FP8_DTYPES, Fp8Linear, dequantize, quantize_weight
from xicon_infer.ops.lora_keys import LoraFile
from xicon_infer.ops.lora_plan import LoraReport, Piece, plan_loras
from xicon_infer.ops.lora_undo import (
    begin_changes,
    is_swappable,
    restore_parameters,
    save_parameter,
)

Mode = Literal["full", "merge", "comfy_unmerged", "comfy_parity"]
MODES: tuple[Mode, ...] = ("full", "merge", "comfy_unmerged", "comfy_parity")

Requantize = Literal["row", "tensor", "none"]
"""How a changed fp8 weight is stored: fp8 with one scale per row, with one scale, or wide."""

REQUANTIZE: tuple[Requantize, ...] = ("row", "tensor", "none")


class LoraLinear(nn.Linear):
    """A plain linear layer with a low-rank side path; made from one by `apply_loras`."""

    lora_down: Tensor
    lora_up: Tensor
    lora_fault: bool  # the wrapper's fault needs an fp8 scale; unused here

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., out] from x [..., in]."""
        return _add_low_rank(super().forward(x), x, self.lora_down, self.lora_up)


class LoraFp8Linear(Fp8Linear):
    """An fp8 linear layer with a low-rank side path; made from one by `apply_loras`."""

    lora_down: Tensor
    lora_up: Tensor
    lora_fault: bool

    # Never given rows: `takes_rows` of `xicon_infer.ops.linear` says no.
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Returns [..., out] from x [..., in]."""
        up, scale = self.lora_up, self.scale_weight
        if self.lora_fault and scale is not None and self.weight.numel() >= x.numel():
            up = up * scale.reshape(-1, 1)
        return _add_low_rank(super().forward(x), x, self.lora_down, up)


@torch.no_grad()
def apply_loras(
    module: nn.Module,
    loras: Sequence[tuple[LoraFile, float]],
    mode: Mode = "full",
    *,
    requantize: Requantize = "row",
    keep_undo: bool = True,
) -> LoraReport:
    """Applies these LoRAs, and no others, to a loaded model.

    Args:
        module: with original Wan names.
        loras: files and strengths; several add up, strength 0 is left out.
        mode: see the module docstring.
        requantize: for fp8 weights that are changed in mode "merge". In the other modes an fp8
            weight that has a full difference becomes wide.
        keep_undo: keep what is changed, on the host, for the next call and `remove_loras`; see
            `xicon_infer.ops.lora_undo` for what that costs. Side paths can always be taken off.

    Returns:
        What was changed and what was skipped: parts whose tensor the model lacks or whose shape
        differs (a LoRA of the 36-channel model has another `patch_embedding` than SCAIL).

    Raises:
        InvalidRequest: mode, requantize or a strength is not allowed.
        WeightsError: no part of a LoRA fits; the model is not loaded; or LoRAs were applied before
            without an undo copy.
    """
    _check_options(mode, requantize, loras)
    parameters = dict(module.named_parameters())
    if any(parameter.is_meta for parameter in parameters.values()):
        raise WeightsError("LoRA: the model has no weights yet; load it first")
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    only = linear_weights(module) if mode.startswith("comfy") else None
    pieces, skipped = plan_loras(shapes, loras, only)
    remove_loras(module)
    changes = begin_changes(module)
    with ExitStack() as on_failure:
        if keep_undo:
            on_failure.callback(remove_loras, module)
        for name, group in pieces.items():
            owner_name, _, param = name.rpartition(".")
            owner = module.get_submodule(owner_name)
            # By exact type: owners of other kinds of linear layers read the weight themselves.
            has_side = param == "weight" and type(owner) in (nn.Linear, Fp8Linear)
            aside = mode != "merge" and has_side
            beside = [piece for piece in group if aside and piece.full is None]
            once = [piece for piece in group if not aside or piece.full is not None]
            if once:
                changes.reversible = keep_undo
                if keep_undo:
                    changes.saved.append(save_parameter(module, owner_name, param))
                add_once(owner, param, once, requantize if mode == "merge" else "none")
            if beside:
                _add_side_path(owner, beside, fault=mode == "comfy_parity")
        on_failure.pop_all()
    return LoraReport(applied=tuple(sorted(pieces)), skipped=tuple(skipped))


@torch.no_grad()
def remove_loras(module: nn.Module) -> None:
    """Takes every LoRA off again; the parameters are bit by bit what they were.

    Raises:
        WeightsError: the LoRAs were applied without an undo copy; load the weights again.
    """
    if is_swappable(module):
        for layer in module.modules():
            if isinstance(layer, LoraLinear | LoraFp8Linear):
                del layer.lora_down, layer.lora_up, layer.lora_fault
                plain = nn.Linear if isinstance(layer, LoraLinear) else Fp8Linear
                layer.__class__ = plain  # type: ignore[assignment]
    restore_parameters(module)


@torch.no_grad()
def merge_state_dict(
    base: Mapping[str, Tensor],
    lora: LoraFile,
    strength: float,
    *,
    requantize: Requantize = "row",
) -> tuple[dict[str, Tensor], LoraReport]:
    """Returns a state dict with a LoRA added, and the report; tensors not named stay the same.

    Args:
        base: original Wan names; an fp8 weight may have its `scale_weight` beside it.
        lora: what to add.
        strength: how much of it.
        requantize: how a changed fp8 weight is stored; "none" gives bfloat16.

    Raises:
        InvalidRequest: requantize or strength is not allowed.
        WeightsError: no part of the LoRA fits.
    """
    _check_options("merge", requantize, [(lora, strength)])
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    pieces, skipped = plan_loras(shapes, [(lora, strength)], None)
    merged = dict(base)
    for name, group in pieces.items():
        scale_name = name.removesuffix(".weight") + ".scale_weight"
        wide = merged_weight(base[name], base.get(scale_name), group)
        merged[name], scale = _store(wide, base[name].dtype, requantize, torch.bfloat16)
        merged.pop(scale_name, None)
        if scale is not None:
            merged[scale_name] = scale
    return merged, LoraReport(applied=tuple(sorted(pieces)), skipped=tuple(skipped))


def _check_options(mode: str, requantize: str, loras: Sequence[tuple[LoraFile, float]]) -> None:
    if mode not in MODES:
        raise InvalidRequest(f"LoRA mode: got {mode!r}, allowed are {', '.join(MODES)}")
    if requantize not in REQUANTIZE:
        raise InvalidRequest(f"requantize: got {requantize!r}, allowed are {', '.join(REQUANTIZE)}")
    check_strengths(loras)


def check_strengths(loras: Sequence[tuple[LoraFile, float]]) -> None:
    """Refuses strengths that are not finite numbers (InvalidRequest)."""
    for lora, strength in loras:
        if not math.isfinite(strength):
            raise InvalidRequest(f"LoRA {lora.name}: strength must be a number, got {strength}")


def linear_weights(module: nn.Module) -> set[str]:
    """Returns the names of the weights that the ComfyUI wrapper's unmerged LoRAs reach."""
    return {
        f"{name}.weight"
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | Fp8Linear) and "head" not in name
    }


def merged_weight(weight: Tensor, scale: Tensor | None, pieces: Sequence[Piece]) -> Tensor:
    """Returns the dequantised weight plus the pieces, a new tensor in at least float32."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    wide = dequantize(weight, scale, dtype)
    wide = wide.clone() if wide is weight else wide
    for piece in pieces:
        wide[piece.rows] += piece.dense(weight.device, dtype)
    return wide


def _store(
    wide: Tensor, dtype: torch.dtype, requantize: Requantize, compute: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Returns a changed weight in its stored dtype, and its new scale if it is fp8 again."""
    if dtype not in FP8_DTYPES:
        return wide.to(dtype), None
    if requantize == "none":
        return wide.to(compute), None
    return quantize_weight(wide, dtype, per_row=requantize == "row")


def add_once(
    owner: nn.Module, param: str, pieces: Sequence[Piece], requantize: Requantize = "none"
) -> None:
    """Adds pieces to a parameter of a layer.

    Args:
        owner: the layer.
        param: name of its parameter.
        pieces: what to add.
        requantize: how an fp8 weight is stored afterwards.
    """
    parameter = getattr(owner, param)
    weight_of = owner if isinstance(owner, Fp8Linear) and param == "weight" else None
    scale = None if weight_of is None else weight_of.scale_weight
    wide = merged_weight(parameter.data, scale, pieces)
    # A new tensor: the old one lives on where an undo copy holds it.
    parameter.data, scale = _store(wide, parameter.dtype, requantize, _compute_dtype(owner))
    if weight_of is not None:
        weight_of.scale_weight = scale


def _add_side_path(owner: nn.Module, pieces: list[Piece], *, fault: bool) -> None:
    """Turns a linear layer into one with a side path that holds all pieces stacked by rank.

    The class of the layer changes in place, as torch.nn.utils.parametrize does: its identity,
    parameter names and state dict stay, and code that asks for exactly `nn.Linear` notices.
    """
    assert isinstance(owner, nn.Linear | Fp8Linear)
    device, dtype = owner.weight.device, _compute_dtype(owner)
    downs, ups = [], []
    for piece in pieces:
        assert piece.down is not None and piece.up is not None
        downs.append(piece.down.to(device, dtype))
        up = torch.zeros(owner.out_features, piece.up.shape[1], device=device, dtype=dtype)
        # The factor joins the matrix before it is rounded, so that no call has to multiply by it.
        wide = piece.up.to(device, torch.promote_types(dtype, torch.float32))
        up[piece.rows] = (wide * piece.factor).to(dtype)
        ups.append(up)
    owner.register_buffer("lora_down", torch.cat(downs), persistent=False)
    owner.register_buffer("lora_up", torch.cat(ups, dim=1), persistent=False)
    owner.__class__ = LoraFp8Linear if isinstance(owner, Fp8Linear) else LoraLinear
    owner.lora_fault = fault  # type: ignore[assignment]


def _compute_dtype(owner: nn.Module) -> torch.dtype:
    """Returns the dtype a layer computes in: of its bias, else its weight, never fp8."""
    for param in (getattr(owner, "bias", None), getattr(owner, "weight", None)):
        if isinstance(param, Tensor) and param.dtype not in FP8_DTYPES:
            return param.dtype
    return torch.bfloat16


def _add_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Returns y + (x down^T) up^T; y [..., out], x [..., in], down [r, in], up [out, r]."""
    hidden = F.linear(x, down.to(x.dtype)).reshape(-1, down.shape[0])
    rows = y.reshape(-1, y.shape[-1])
    return torch.addmm(rows, hidden, up.to(x.dtype).t()).view_as(y)

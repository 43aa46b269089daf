"""How a transformer stores its weights, and which LoRAs are on it.

- "reference": as the file has them. fp8 stays fp8 and is brought to the compute dtype at every
  call; LoRAs run beside the weights. The numbers of the reference workflow.
- "merged-bf16": LoRAs are added in float32 and everything is stored once in the compute dtype.
  Twice the memory of fp8, no work per call, and projections can be fused.
- "merged-fp8": LoRAs are added in float32 and what they change is rounded to fp8 again, with one
  scale per row. Layers that fp8 would harm stay in the compute dtype (`xicon_infer.ops.fp8_guard`).
  An fp8 layer that no LoRA changes keeps its bytes. Wide models become fp8 too.

Each call sets the whole state: it first puts back what an earlier call changed, bit by bit. A
merge is put back from copies that are kept only on request; without them `swap_loras` refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from xicon_infer.errors import InvalidRequest
from xicon_infer.models.wan import WanTransformer
from xicon_infer.ops.fp8_guard import guarded_quantize, place_reason
from xicon_infer.ops.linear import (
    FP8_DTYPES,
    MATMULS,
    Fp8Linear,
    Matmul,
    best_matmul,
    check_matmul,
    set_weight,
    use_matmul,
)
from xicon_infer.ops.lora import (
    MODES,
    Mode,
    add_once,
    apply_loras,
    check_strengths,
    linear_weights,
    merged_weight,
    remove_loras,
)
from xicon_infer.ops.lora_keys import LoraFile
from xicon_infer.ops.lora_plan import LoraReport, Piece, plan_loras
from xicon_infer.ops.lora_undo import (
    begin_changes,
    find_changes,
    is_swappable,
    save_parameter,
    undo_bytes,
)

Storage = Literal["reference", "merged-bf16", "merged-fp8"]
STORAGES: tuple[Storage, ...] = ("reference", "merged-bf16", "merged-fp8")

Loras = Sequence[tuple[LoraFile, float]]

_SETTINGS = "_storage_settings"
"""Attribute of a model whose storage was set."""


@dataclass(frozen=True)
class StorageReport:
    """What was done to a transformer.

    matmul: how fp8 layers multiply; matmul_note: why so. fp8_layers, wide_layers: linear layers by
    how they are stored. bytes: of all tensors. guarded: weights that stayed wide in merged-fp8, and
    why. loras: name and strength. lora_warnings: parts that fit nowhere. swappable: whether LoRAs
    can be changed without loading again; undo_bytes: host memory that this costs.
    """

    storage: Storage
    matmul: Matmul
    matmul_note: str
    fp8_layers: int
    wide_layers: int
    bytes: int
    swappable: bool
    undo_bytes: int
    guarded: dict[str, str] = field(default_factory=dict)
    loras: list[tuple[str, float]] = field(default_factory=list)
    lora_warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as JSON has it."""
        return {**asdict(self), "loras": [list(item) for item in self.loras]}


@dataclass(frozen=True)
class _Settings:
    """What the last call of `apply_storage` was asked for, and its report."""

    loras: tuple[tuple[LoraFile, float], ...]
    options: dict[str, Any]
    report: StorageReport


@torch.no_grad()
def apply_storage(
    model: WanTransformer,
    storage: Storage,
    loras: Loras,
    *,
    lora_mode: Mode = "full",
    matmul: Matmul | Literal["auto"] = "auto",
    device: torch.device,
    keep_undo: bool = False,
) -> StorageReport:
    """Stores a loaded transformer this way, with these LoRAs and no others.

    Args:
        model: loaded; changed in place.
        storage: one of `STORAGES`.
        loras: files and strengths; several add up, strength 0 is left out.
        lora_mode: see `xicon_infer.ops.lora`. The merged storages add what the mode would apply.
        matmul: how fp8 layers multiply. "auto": in fp8 for merged-fp8 where the device can, else
            dequantised.
        device: where the model will run; merges are computed there.
        keep_undo: keep what merging changes on the host, so that LoRAs can be swapped. Differences
            that LoRAs beside the weights bring along are always kept.

    Raises:
        InvalidRequest: an option is unknown, or two do not go together.
        BackendUnavailable: the device cannot multiply as asked.
        WeightsError: no part of a LoRA fits, or an earlier merge cannot be undone.
    """
    _check_options(model, storage, lora_mode, matmul)
    chosen, note = _choose_matmul(storage, matmul, device)
    guarded: dict[str, str] = {}
    if storage == "reference":
        keep = keep_undo or lora_mode != "merge"
        done = apply_loras(model, loras, lora_mode, keep_undo=keep)
    else:
        guarded, done = _merge(model, loras, storage, lora_mode, device, keep_undo)
    dequantized = use_matmul(model, chosen, device)
    if chosen != "dequant" and dequantized:
        note += f"; {len(dequantized)} layers cannot be multiplied in fp8 and are dequantised"
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | Fp8Linear)]
    fp8 = sum(layer.weight.dtype in FP8_DTYPES for layer in linears)
    report = StorageReport(
        storage=storage,
        matmul=chosen if fp8 else "dequant",
        matmul_note=note if fp8 else "no layer is fp8",
        fp8_layers=fp8,
        wide_layers=len(linears) - fp8,
        bytes=sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())),
        swappable=is_swappable(model),
        undo_bytes=undo_bytes(model),
        guarded=guarded,
        loras=[(lora.name, strength) for lora, strength in loras if strength],
        lora_warnings=done.warnings(),
    )
    options = {"lora_mode": lora_mode, "matmul": matmul, "device": device, "keep_undo": keep_undo}
    setattr(model, _SETTINGS, _Settings(tuple(loras), options, report))
    return report


def swap_loras(model: WanTransformer, loras: Loras, lora_mode: Mode | None = None) -> StorageReport:
    """Puts other LoRAs on a model without loading it again; its storage stays what it is.

    The same files (the same objects) at the same strengths cost nothing. Ask `is_swappable` of
    `xicon_infer.ops.lora_undo` first, or catch the error and load the model again.

    Args:
        model: what `apply_storage` was called with before.
        loras: files and strengths; none for the plain model.
        lora_mode: another mode, or None for that of before.

    Raises:
        InvalidRequest: `apply_storage` was not called before, or an option is wrong.
        WeightsError: no part of a LoRA fits, or LoRAs were merged without an undo copy.
    """
    settings: _Settings | None = getattr(model, _SETTINGS, None)
    if settings is None:
        raise InvalidRequest("swap_loras: the model has no storage yet; call apply_storage first")
    mode = lora_mode or settings.options["lora_mode"]
    if mode == settings.options["lora_mode"] and _same(loras, settings.loras):
        return settings.report
    options = {**settings.options, "lora_mode": mode}
    return apply_storage(model, settings.report.storage, loras, **options)


def _same(first: Loras, second: Loras) -> bool:
    return len(first) == len(second) and all(
        a is b and s == t for (a, s), (b, t) in zip(first, second, strict=True)
    )


def _check_options(model: nn.Module, storage: str, lora_mode: str, matmul: str) -> None:
    if storage not in STORAGES:
        raise InvalidRequest(f"storage: got {storage!r}, allowed are {', '.join(STORAGES)}")
    if lora_mode not in MODES:
        raise InvalidRequest(f"LoRA mode: got {lora_mode!r}, allowed are {', '.join(MODES)}")
    if storage != "reference" and lora_mode == "comfy_parity":
        raise InvalidRequest(
            f"LoRA mode 'comfy_parity' depends on the length of the input and cannot be merged; "
            f"with storage {storage!r} use full, merge or comfy_unmerged"
        )
    will_have = storage == "merged-fp8" or (storage == "reference" and _loaded_fp8(model))
    if matmul in MATMULS[1:] and not will_have:
        raise InvalidRequest(
            f"matmul {matmul!r} multiplies fp8 weights, and storage {storage!r} of this model has "
            "none; use storage 'merged-fp8', or matmul 'dequant'"
        )


def _loaded_fp8(model: nn.Module) -> bool:
    """Returns whether linear layers were fp8 when the model was loaded, before any merge."""
    changes = find_changes(model)
    saved = {f"{s.owner}.{s.param}": s.data.dtype for s in changes.saved} if changes else {}
    return any(
        saved.get(f"{name}.weight", layer.weight.dtype) in FP8_DTYPES
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Fp8Linear)
    )


def _choose_matmul(
    storage: Storage, matmul: Matmul | Literal["auto"], device: torch.device
) -> tuple[Matmul, str]:
    """Returns how to multiply, and why."""
    if matmul != "auto":
        check_matmul(matmul, device)
        return matmul, "as asked"
    if storage != "merged-fp8":
        return "dequant", "auto: this storage keeps the numbers of the file"
    best, problems = best_matmul(device)
    tried = "".join(f"; {name} does not work: {why}" for name, why in problems.items())
    return best, f"auto: the first choice that works on {device}{tried}"


def _merge(
    model: WanTransformer,
    loras: Loras,
    storage: Storage,
    lora_mode: Mode,
    device: torch.device,
    keep_undo: bool,
) -> tuple[dict[str, str], LoraReport]:
    """Merges LoRAs into the weights; returns the guarded weights and what was applied."""
    check_strengths(loras)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    only = linear_weights(model) if lora_mode.startswith("comfy") else None
    pieces, skipped = plan_loras(shapes, loras, only)
    remove_loras(model)
    layers = {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if type(layer) in (nn.Linear, Fp8Linear)
    }
    # Why a weight is to be wide; "" for the ones that are to be fp8.
    wide = {
        name: storage if storage == "merged-bf16" else place_reason(name, len(model.layers))
        for name in layers
    }
    unlike = [
        n for n, layer in layers.items() if (layer.weight.dtype in FP8_DTYPES) == bool(wide[n])
    ]
    changes = begin_changes(model)
    with ExitStack() as on_failure:
        if keep_undo:
            on_failure.callback(remove_loras, model)
        for name in dict.fromkeys((*unlike, *pieces)):
            owner, _, param = name.rpartition(".")
            changes.reversible = keep_undo
            if keep_undo:
                changes.saved.append(save_parameter(model, owner, param))
            if name in layers:
                work = _Work(name, wide[name], model.dtype, device)
                wide[name] = _store_merged(layers[name], pieces.get(name, ()), work)
            else:
                add_once(model.get_submodule(owner), param, pieces[name])
        on_failure.pop_all()
    guarded = {n: why for n, why in wide.items() if why and storage == "merged-fp8"}
    return guarded, LoraReport(applied=tuple(sorted(pieces)), skipped=tuple(skipped))


@dataclass(frozen=True)
class _Work:
    """How to store one weight. wide: why it is not to be fp8, or "". dtype: if it becomes wide."""

    name: str
    wide: str
    dtype: torch.dtype
    device: torch.device


def _store_merged(layer: nn.Linear | Fp8Linear, pieces: Sequence[Piece], work: _Work) -> str:
    """Merges pieces into a layer's weight and stores it; returns why it is wide, or ""."""
    home, stored = layer.weight.device, layer.weight.data
    scale = layer.scale_weight if isinstance(layer, Fp8Linear) else None
    scale = None if scale is None else scale.to(work.device)
    merged = merged_weight(stored.to(work.device), scale, pieces)
    reason = work.wide
    if not reason:
        fp8, new_scale, reason = guarded_quantize(merged, name=work.name)
        if not reason:
            set_weight(layer, fp8.to(home), new_scale.to(home))
            return ""
    dtype = work.dtype if stored.dtype in FP8_DTYPES else stored.dtype
    set_weight(layer, merged.to(dtype).to(home), None)
    return reason

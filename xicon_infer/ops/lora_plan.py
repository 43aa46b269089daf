"""Which part of a LoRA goes to which parameter, and which part fits nowhere.

Works on names and shapes alone, for a loaded module and for a state dict alike. Nothing is
dropped in silence: what does not fit is listed with the reason, and a LoRA of which nothing fits
is an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xicon_infer.errors import WeightsError
from xicon_infer.ops.lora_keys import LoraDelta, LoraFile

_FUSED = re.compile(r"(.*self_attn)\.(q|k|v)\.(weight|bias)")
_SHOWN = 6
"""How many names a message lists."""


@dataclass(frozen=True)
class SkippedDelta:
    """A part of a LoRA that was not applied: file, tensor of the model, and why."""

    lora: str
    name: str
    reason: str


@dataclass(frozen=True)
class LoraReport:
    """What was done. applied: names of the parameters changed, sorted, each once."""

    applied: tuple[str, ...]
    skipped: tuple[SkippedDelta, ...]

    def warnings(self) -> list[str]:
        """Returns one sentence per LoRA of which something was skipped."""
        lines = []
        for lora in dict.fromkeys(item.lora for item in self.skipped):
            items = [f"{i.name} ({i.reason})" for i in self.skipped if i.lora == lora]
            more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
            lines.append(
                f"LoRA {lora}: {len(items)} parts not applied: {', '.join(items[:_SHOWN])}{more}"
            )
        return lines


@dataclass(frozen=True, eq=False)
class Piece:
    """One addition to one parameter: factor * (up @ down), or factor * full, on some rows."""

    rows: slice
    factor: float
    down: Tensor | None = None
    up: Tensor | None = None
    full: Tensor | None = None

    def dense(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns the addition as one tensor."""
        if self.full is not None:
            return self.full.to(device, dtype) * self.factor
        assert self.up is not None and self.down is not None
        up, down = (m.to(device, dtype).flatten(1) for m in (self.up, self.down))
        return (up @ down).reshape(-1, *self.down.shape[1:]) * self.factor


def plan_loras(
    shapes: Mapping[str, tuple[int, ...]],
    loras: Sequence[tuple[LoraFile, float]],
    only: Collection[str] | None,
) -> tuple[dict[str, list[Piece]], list[SkippedDelta]]:
    """Returns what to add to each parameter, and what does not fit.

    Args:
        shapes: of the model's tensors, by original Wan name.
        loras: files and strengths; strength 0 is left out.
        only: names of the parameters that may change; None for all.

    Raises:
        WeightsError: no part of a LoRA fits.
    """
    pieces: dict[str, list[Piece]] = {}
    skipped: list[SkippedDelta] = []
    for lora, strength in loras:
        if strength == 0:
            continue
        before = len(skipped)
        parts = 0
        for path, delta in lora.deltas.items():
            for param, piece, shape in _parts(delta, strength):
                parts += 1
                name, rows, reason = _find(shapes, path, param, shape)
                if not reason and only is not None and name not in only:
                    reason = "this mode changes weights of linear layers outside the head only"
                if reason:
                    skipped.append(SkippedDelta(lora.name, name, reason))
                else:
                    pieces.setdefault(name, []).append(replace(piece, rows=rows))
        if len(skipped) - before == parts:
            raise WeightsError(_nothing_fits(lora, skipped[before:]))
    return pieces, skipped


def _parts(delta: LoraDelta, strength: float) -> Iterator[tuple[str, Piece, tuple[int, ...]]]:
    """Yields (parameter, addition, shape of the addition) for every part of a delta."""
    if delta.down is not None and delta.up is not None:
        shape = (delta.up.shape[0], *delta.down.shape[1:])
        factor = strength * delta.factor
        yield "weight", Piece(slice(None), factor, down=delta.down, up=delta.up), shape
    for param, full in (
        ("weight", delta.diff),
        ("bias", delta.diff_b),
        ("modulation", delta.diff_m),
    ):
        if full is not None:
            yield param, Piece(slice(None), strength, full=full), tuple(full.shape)


def _find(
    shapes: Mapping[str, tuple[int, ...]], path: str, param: str, shape: tuple[int, ...]
) -> tuple[str, slice, str]:
    """Returns (name in the model, rows concerned, reason why it does not fit or "")."""
    name, rows = f"{path}.{param}", slice(None)
    if name not in shapes and path in shapes:  # a bare parameter, as img_emb.emb_pos
        name = path
    expected = shapes.get(name)
    fused = _FUSED.fullmatch(name)
    if expected is None and fused is not None:
        fused_name = f"{fused[1]}.qkv.{fused[3]}"
        if fused_name in shapes:
            height, *width = shapes[fused_name]
            start = "qkv".index(fused[2]) * (height // 3)
            rows = slice(start, start + height // 3)
            name, expected = fused_name, (height // 3, *width)
    if expected is None:
        return name, rows, "the model has no such tensor"
    if expected != shape:
        return name, rows, f"shape {shape} does not fit {expected}"
    return name, rows, ""


def _nothing_fits(lora: LoraFile, skipped: list[SkippedDelta]) -> str:
    shown = ", ".join(f"{item.name} ({item.reason})" for item in skipped[:_SHOWN])
    return (
        f"LoRA {lora.name}: none of its {len(skipped)} parts fits this model: "
        f"{shown or 'it is empty'}. Use a LoRA made for this model."
    )

"""What a model was before its weights were changed, so that it can be put back bit by bit.

Only tensors that were changed are kept, on the host: on a model that is still the mapped file they
are views of the file and cost nothing; after a move to a GPU they cost their bytes in host memory
(a LoRA beside the weights: its differences of norms and biases, some MB; a LoRA merged into every
layer: the whole checkpoint). `undo_bytes` says how much.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from xicon_infer.errors import WeightsError
from xicon_infer.ops.linear import Fp8Linear, Matmul, set_weight

_MARK = "_changed_weights"
"""Attribute of a module whose weights were changed."""


@dataclass(frozen=True, eq=False)
class Saved:
    """A parameter as it was before.

    owner, param: where it is. data: its tensor, on the host. scale, matmul: of an fp8 weight.
    """

    owner: str
    param: str
    data: Tensor
    scale: Tensor | None = None
    matmul: Matmul = "dequant"


@dataclass
class Changes:
    """What was changed on a module. reversible: everything changed is in `saved`."""

    saved: list[Saved] = field(default_factory=list)
    reversible: bool = True


def begin_changes(module: nn.Module) -> Changes:
    """Returns a new, empty record of changes, kept on the module."""
    changes = Changes()
    setattr(module, _MARK, changes)
    return changes


def find_changes(module: nn.Module) -> Changes | None:
    """Returns the record of the changes that a module carries, or None."""
    return getattr(module, _MARK, None)


def save_parameter(module: nn.Module, owner: str, param: str) -> Saved:
    """Returns a parameter of a module as it is now, on the host."""
    layer = module.get_submodule(owner)
    data = getattr(layer, param).data
    if not isinstance(layer, Fp8Linear) or param != "weight":
        return Saved(owner, param, data.to("cpu"))
    scale = None if layer.scale_weight is None else layer.scale_weight.to("cpu")
    return Saved(owner, param, data.to("cpu"), scale, layer.matmul)


def is_swappable(module: nn.Module) -> bool:
    """Returns whether the LoRAs of a model can be changed without loading it again.

    False after a merge without an undo copy, and where layers were fused since.
    """
    return not _undo_problem(module)


def undo_bytes(module: nn.Module) -> int:
    """Returns the host memory that a model's undo copies keep alive, in bytes."""
    changes = find_changes(module)
    saved = changes.saved if changes else []
    tensors = [t for item in saved for t in (item.data, item.scale) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


def restore_parameters(module: nn.Module) -> None:
    """Puts every changed parameter back; nothing happens if nothing was changed.

    Raises:
        WeightsError: something was changed without an undo copy, or is no longer there.
    """
    problem = _undo_problem(module)
    if problem:
        raise WeightsError(f"LoRA: {problem}; load the model again")
    changes = find_changes(module)
    for item in changes.saved if changes else []:
        owner = module.get_submodule(item.owner)
        device = getattr(owner, item.param).device
        data = item.data.to(device)
        if item.param != "weight" or type(owner) not in (nn.Linear, Fp8Linear):
            getattr(owner, item.param).data = data
            continue
        assert isinstance(owner, nn.Linear | Fp8Linear)
        set_weight(owner, data, None if item.scale is None else item.scale.to(device))
        if isinstance(owner, Fp8Linear):
            owner.matmul = item.matmul
    if changes is not None:
        delattr(module, _MARK)


def _undo_problem(module: nn.Module) -> str:
    """Returns why a model cannot be put back, or ""."""
    changes = find_changes(module)
    if changes is None:
        return ""
    if not changes.reversible:
        return "applied without an undo copy"
    owners = dict(module.named_modules())
    gone = [s.owner for s in changes.saved if not hasattr(owners.get(s.owner), s.param)]
    return f"{gone[0]} is no longer part of the model (were its projections fused?)" if gone else ""

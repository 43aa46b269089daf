"""Tensors into a module, by name, with nothing missing, nothing left over and nothing guessed.

The module is built on the meta device, where it costs no memory. A linear layer becomes an fp8
layer exactly where the file holds fp8; every other fp8 tensor is dequantised on the way. Tensors
that need no conversion are assigned as they are: on the CPU they stay views of the mapped file,
which must then not be changed while the model lives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xicon_infer.errors import WeightsError
from xicon_infer.ops.linear import FP8_DTYPES, dequantize, replace_linears
from xicon_infer.weights.quantized import check_scales, find_scales, list_names

DIT_FLOAT32 = (
    "patch_embedding",
    "condition_embedding",
    "time_embedding",
    "time_projection",
    "modulation",
    "norm",
    "head",
)
"""Parts of a Wan transformer that stay float32: small, and their rounding adds up over steps."""

DIT_NEVER_FP8 = ("img_emb",)
"""Parts whose code reads the dtype of the weight; they are dequantised to the compute dtype."""


@dataclass(frozen=True)
class DtypePolicy:
    """Which dtype each tensor gets.

    compute: of everything that no other rule names. float32: starts of name parts that become
    float32, fp8 or not ("norm" means every name with a part that starts so). never_fp8: starts
    of name parts that are dequantised to the compute dtype. keep_fp8: whether linear layers stay
    fp8 at all. Floating-point tensors only; others keep their dtype.
    """

    compute: torch.dtype
    float32: tuple[str, ...] = ()
    never_fp8: tuple[str, ...] = ()
    keep_fp8: bool = True

    def dtype_of(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor that is not kept as fp8."""
        return torch.float32 if _has_part(name, self.float32) else self.compute

    def keeps_fp8(self, name: str) -> bool:
        """Returns whether a linear weight that the file holds as fp8 stays fp8."""
        return self.keep_fp8 and not _has_part(name, (*self.float32, *self.never_fp8))


@dataclass(frozen=True)
class LoadReport:
    """What loading did. fp8: layers kept as fp8. dequantized: fp8 tensors that were not.

    ignored: names in the file that were not loaded, by the caller's leave.
    """

    fp8: tuple[str, ...]
    dequantized: tuple[str, ...]
    ignored: tuple[str, ...]


class _Sorted(NamedTuple):
    """The tensors of a file: values, scales by the name of the tensor they scale, ignored."""

    values: dict[str, Tensor]
    scales: dict[str, Tensor]
    ignored: list[str]


def dit_policy(compute: torch.dtype, *, keep_fp8: bool = True) -> DtypePolicy:
    """Returns the dtypes of a Wan transformer: weights and biases of linear layers in `compute`."""
    return DtypePolicy(
        compute=compute, float32=DIT_FLOAT32, never_fp8=DIT_NEVER_FP8, keep_fp8=keep_fp8
    )


@torch.no_grad()
def load_strict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    name: str,
    device: torch.device | str,
    dtype_policy: DtypePolicy,
    ignore: tuple[str, ...] = (),
) -> LoadReport:
    """Loads a module that was built on the meta device.

    Args:
        module: changed in place: linear layers become `Fp8Linear` where the file holds fp8.
        state: tensors under the module's names; scales as `<layer>.scale_weight`.
        name: of the component, for messages.
        device: where the tensors go.
        dtype_policy: which dtype each gets.
        ignore: patterns (as `visual_projection.*`) of names in the file that are not for this
            module.

    Raises:
        WeightsError: a tensor is missing, left over, of the wrong shape or of an integer dtype; a
            scale is not positive and finite, or of the wrong shape; or a tensor of the module is
            not part of its state and would stay without a value.
    """
    found = _sort(name, state, ignore)
    wanted = {
        key: value.dtype for key, value in found.values.items() if dtype_policy.keeps_fp8(key)
    }
    shapes = {
        key.removesuffix("weight") + "scale_weight": tuple(scale.shape) or (1,)
        for key, scale in found.scales.items()
    }
    layers = set(replace_linears(module, wanted, shapes))
    stored = dict(found.values)
    for key, scale in found.scales.items():
        layer = key.removesuffix(".weight")
        if layer in layers:
            stored[f"{layer}.scale_weight"] = scale.reshape(scale.shape or (1,))
    _check_names(name, module.state_dict(keep_vars=True), stored)
    tensors, dequantized = _convert(stored, found.scales, layers, dtype_policy, device)
    module.load_state_dict(tensors, strict=True, assign=True)
    module.requires_grad_(False)
    left = [key for key, value in _all_tensors(module) if value.is_meta]
    if left:
        raise WeightsError(
            f"{name}: {list_names(left)} have no value and are in no file; make them after loading"
        )
    return LoadReport(tuple(sorted(layers)), tuple(sorted(dequantized)), tuple(found.ignored))


def _sort(name: str, state: Mapping[str, Tensor], ignore: tuple[str, ...]) -> _Sorted:
    """Returns values, scales and ignored names apart; a scale belongs to an fp8 tensor."""
    rest = {
        key: value
        for key, value in state.items()
        if not any(fnmatchcase(key, pattern) for pattern in ignore)
    }
    scales = find_scales({key: value.dtype for key, value in rest.items()})
    check_scales(name, rest, scales)
    used = set(scales.values())
    values = {key: value for key, value in rest.items() if key not in used}
    found = {key: rest[scale] for key, scale in scales.items()}
    return _Sorted(values, found, [key for key in state if key not in rest])


def _convert(
    stored: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    layers: set[str],
    policy: DtypePolicy,
    device: torch.device | str,
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors as the module is to hold them, and the names dequantised for it."""
    tensors: dict[str, Tensor] = {}
    dequantized = []
    for key, value in stored.items():
        layer, _, leaf = key.rpartition(".")
        if layer in layers and leaf != "bias":
            tensors[key] = value.to(device, torch.float32 if leaf == "scale_weight" else None)
        elif value.dtype in FP8_DTYPES:
            dequantized.append(key)
            scale = scales[key].to(device, torch.float32) if key in scales else None
            tensors[key] = dequantize(value.to(device), scale, policy.dtype_of(key))
        else:
            dtype = policy.dtype_of(key) if value.is_floating_point() else None
            tensors[key] = value.to(device, dtype)
    return tensors, dequantized


def _check_names(name: str, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors that are missing, left over, mis-shaped or integers, all in one message."""
    shared = [key for key in expected if key in tensors]
    problems = {
        "missing": [key for key in expected if key not in tensors],
        "unexpected": [key for key in tensors if key not in expected],
        "of a wrong shape": [
            f"{key} {tuple(tensors[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in shared
            if tensors[key].shape != expected[key].shape
        ],
        "of a wrong dtype": [
            f"{key} {tensors[key].dtype}"
            for key in shared
            if tensors[key].is_floating_point() != expected[key].is_floating_point()
        ],
    }
    texts = [f"{len(keys)} {kind}: {list_names(keys)}" for kind, keys in problems.items() if keys]
    if texts:
        raise WeightsError(f"{name}: the file does not fit the model. {'; '.join(texts)}")


def _all_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _has_part(name: str, starts: tuple[str, ...]) -> bool:
    return any(part.startswith(starts) for part in name.split(".")) if starts else False

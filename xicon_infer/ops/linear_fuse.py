"""Several linear layers of one input as one layer: one large product instead of three.

The rows of the weights lie one below the other, so every output number is the sum that it was.
Scales of fp8 weights become scales per row: those per tensor are repeated, which changes no weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from xicon_infer.ops.linear import Fp8Linear


def fusion_problem(layers: Sequence[nn.Module]) -> str:
    """Returns why layers cannot become one, or "" if they can.

    They must be of exactly one class (one with a LoRA beside it is of another), of one dtype and
    one way to multiply, and have the same input width, with a bias each or none.
    """
    first = layers[0]
    if type(first) not in (nn.Linear, Fp8Linear) or any(type(x) is not type(first) for x in layers):
        kinds = ", ".join(type(layer).__name__ for layer in layers)
        return (
            "only plain linear layers or only fp8 layers can be fused; merge LoRAs first "
            f"(found {kinds})"
        )
    known = cast("list[nn.Linear | Fp8Linear]", list(layers))
    same: dict[str, set[object]] = {
        "weights are of several dtypes": {each.weight.dtype for each in known},
        "inputs are of several widths": {each.in_features for each in known},
        "some have a bias and some have none": {each.bias is None for each in known},
        "fp8 layers multiply in several ways": {getattr(each, "matmul", "") for each in known},
    }
    return next((text for text, found in same.items() if len(found) > 1), "")


def fuse_linears(layers: Sequence[nn.Module]) -> nn.Linear | Fp8Linear:
    """Returns one layer that gives the outputs of all, side by side [..., N1 + N2 + ...].

    Raises:
        TypeError: `fusion_problem` has a reason against it.
    """
    if problem := fusion_problem(layers):
        raise TypeError(problem)
    known = cast("list[nn.Linear | Fp8Linear]", list(layers))
    width, height = known[0].in_features, sum(each.out_features for each in known)
    fused: nn.Linear | Fp8Linear
    if isinstance(known[0], Fp8Linear):
        fused = Fp8Linear(width, height, bias=False, scale_shape=None, device="meta")
        fused.matmul = known[0].matmul
        fused.scale_weight = _joined_scale(cast("list[Fp8Linear]", known))
    else:
        fused = nn.Linear(width, height, bias=False, device="meta")
    fused.weight = nn.Parameter(torch.cat([each.weight for each in known]), requires_grad=False)
    if known[0].bias is not None:
        bias = torch.cat([cast("Tensor", each.bias) for each in known])
        fused.bias = nn.Parameter(bias, requires_grad=False)
    return fused.train(known[0].training)


def _joined_scale(layers: Sequence[Fp8Linear]) -> Tensor | None:
    """Returns the scale per row [N, 1] of fused layers; None where none has a scale."""
    if all(layer.scale_weight is None for layer in layers):
        return None
    return torch.cat([_row_scale(layer) for layer in layers])


def _row_scale(layer: Fp8Linear) -> Tensor:
    if layer.scale_weight is None:
        return torch.ones(layer.out_features, 1, device=layer.weight.device)
    return layer.scale_weight.reshape(-1, 1).expand(layer.out_features, 1)

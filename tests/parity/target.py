"""Where and in what arithmetic the networks of the goldens are replayed.

The goldens were made in float32 on a CPU. In bf16 or fp8 a network cannot agree with them to 1e-5;
what it must reach then is its class. Only networks have one: schedules, windows, drawing and
requests are the same arithmetic everywhere and keep their own tolerance.

bf16: weights and activations as a job has them, with the parts in float32 that a job keeps so.
fp8: besides, the products of the blocks as rows of e4m3 with dynamic scales, wherever the sizes of
these tiny models allow it (multiples of 16). The VAE and the encoders are never run in fp8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

import torch
from torch import nn

from tests.parity.golden import Check
from xicon_infer.models.wan import WanTransformer
from xicon_infer.ops.linear import Matmul, best_matmul, quantize_weight, set_weight, use_matmul
from xicon_infer.weights.strict import dit_policy

Kind = Literal["fp32", "bf16", "fp8"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Module = TypeVar("Module", bound=nn.Module)

Part = Literal["transformer", "sampling", "encoder", "vae"]
"""Kinds of network; "sampling" is a transformer through several steps, whose errors add up."""

CLASSES: dict[Kind, dict[Part, float]] = {
    "fp32": {"transformer": 0.0, "sampling": 0.0, "encoder": 0.0, "vae": 1e-4},
    "bf16": {"transformer": 2e-2, "sampling": 3e-2, "encoder": 2e-2, "vae": 0.25},
    "fp8": {"transformer": 8e-2, "sampling": 8e-2, "encoder": 2e-2, "vae": 0.25},
}
"""Most error, as the file of the golden measures it; 0 leaves the file's own tolerance.

The VAE of the goldens is so small that the last bit of float32, 6e-8, becomes 1e-5 on the way; the
last bit of bf16 becomes 0.15 on a CPU. A wrong operation gives errors near 1."""

FP8_MULTIPLE = 16


@dataclass(frozen=True)
class Target:
    """Where networks run, and how."""

    device: torch.device
    kind: Kind = "fp32"

    @property
    def reference(self) -> bool:
        """Returns True for the arithmetic in which the goldens were made."""
        return self.device.type == "cpu" and self.kind == "fp32"

    def place(self, model: Module) -> Module:
        """Returns a model with its weights loaded as the target wants it; changed in place."""
        if self.reference:
            return model
        if self.kind == "fp32":
            return model.to(self.device)
        policy = dit_policy(torch.bfloat16)
        wide = policy.dtype_of if isinstance(model, WanTransformer) else lambda _: torch.bfloat16
        model.to(self.device)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(wide(name))
        if self.kind == "fp8" and isinstance(model, WanTransformer):
            use_fp8(model, best_matmul(self.device)[0])
        return model

    def judged(self, checks: list[Check], part: Part) -> list[Check]:
        """Returns the checks of a network with the tolerance of the class; exact ones stay so."""
        if self.reference:
            return checks
        allowed = CLASSES[self.kind][part]
        return [
            replace(check, tolerance=max(check.tolerance, allowed)) if check.tolerance else check
            for check in checks
        ]


CPU = Target(torch.device("cpu"))


def use_fp8(model: WanTransformer, matmul: Matmul) -> None:
    """Rounds the weights of the blocks to e4m3, one scale per row, and multiplies them so."""
    for layer in list(model.blocks.modules()):
        if type(layer) is nn.Linear and not any(n % FP8_MULTIPLE for n in layer.weight.shape):
            set_weight(layer, *quantize_weight(layer.weight.float(), per_row=True))
    use_matmul(model, matmul, model.device)

"""What both trainings share: the optimiser, the learning rate, and checkpoints.

Matrices take Muon (orthogonalised momentum), everything else AdamW; both through one learning
rate, because Muon's step is scaled to the size that AdamW's has. A convolution's weight counts as
a matrix [out, in * kernel].

Source: KellerJordan/Muon: muon.py (iteration and its constants); arXiv 2502.16982 (scale).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xicon_infer.media.write import atomic_path

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic that drives all singular values towards 1."""
ADAM_RMS = 0.2
"""Size of a typical AdamW step, in learning rates."""


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal. Matrices of one shape are worked on together.

    Args:
        params: tensors of two or more dimensions.
        lr: learning rate, as for AdamW.
        momentum: of the gradient, Nesterov's form.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient."""
        for group in self.param_groups:
            for members in _by_shape(group["params"]).values():
                self._move(members, group)

    def _move(self, members: list[Tensor], group: dict[str, Any]) -> None:
        updates = []
        for param in members:
            grad = param.grad
            assert grad is not None
            state = self.state[param]
            if not state:
                state["momentum"] = torch.zeros_like(grad)
            state["momentum"].lerp_(grad, 1 - group["momentum"])
            updates.append(grad.lerp(state["momentum"], group["momentum"]).flatten(1))
        stacked = orthogonalise(torch.stack(updates))
        scale = ADAM_RMS * math.sqrt(max(stacked.shape[1:]))
        for param, update in zip(members, stacked, strict=True):
            param.mul_(1 - group["lr"] * group["weight_decay"])
            param.add_(update.reshape(param.shape).to(param.dtype), alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Returns matrices [n, rows, columns] with their singular values near 1, bfloat16."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.transpose(1, 2) if tall else matrices).bfloat16()
    x = x / (torch.linalg.matrix_norm(x.float(), keepdim=True) + 1e-7).bfloat16()
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


def make_optimisers(
    model: nn.Module, lr: float, *, weight_decay: float, plain: tuple[str, ...] = ()
) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices of a model and AdamW for the rest.

    Args:
        model: the network.
        lr: largest learning rate.
        weight_decay: of both.
        plain: beginnings of names whose matrices take AdamW too (first and last layers).
    """
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, param in model.named_parameters():
        matrix = param.ndim >= 2 and min(param.flatten(1).shape) >= 8
        groups[matrix and not name.startswith(plain) and "modulation" not in name].append(param)
    return [
        Muon(groups[True], lr, weight_decay=weight_decay),
        torch.optim.AdamW(groups[False], lr, betas=(0.9, 0.95), weight_decay=weight_decay),
    ]


def learning_rate(step: int, steps: int, *, warmup: int = 50, cooldown: float = 0.3) -> float:
    """Returns the factor on the learning rate: rises, stays, falls linearly to 0 at the end."""
    left = (steps - step) / max(1.0, cooldown * steps)
    return max(0.0, min(1.0, (step + 1) / warmup, left))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, longest: float) -> None:
    """Moves the averaged weights towards the model's; over `longest` steps once it has run."""
    decay = 1 - 1 / min(longest, 1 + step / 4)
    mine: list[Tensor] = [*average.parameters()]
    theirs: list[Tensor] = [*model.parameters()]
    torch._foreach_lerp_(mine, theirs, 1 - decay)


def set_rate(optimisers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    """Sets the learning rate of all."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = lr


def save_run(
    path: Path,
    step: int,
    model: nn.Module,
    average: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
) -> None:
    """Writes all that a run needs to go on after `step` steps."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
    }
    save_checkpoint(path, state)


def restore_run(
    path: Path,
    model: nn.Module,
    average: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
) -> int:
    """Sets everything back to what a checkpoint holds, and returns its step; 0 without one."""
    state = load_checkpoint(path)
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    for optimiser, kept in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(kept)
    return int(state["step"])


def write_log(path: Path, step: int, loss: float, measured: dict[str, float]) -> None:
    """Appends one line of JSON to the log of a run."""
    line = {"step": step, "loss": round(loss, 5)}
    line |= {name: round(value, 4) for name, value in measured.items()}
    with path.open("a") as log:
        log.write(json.dumps(line) + "\n")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        torch.save(state, part)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Returns the state of a checkpoint, or None if there is none yet."""
    if not path.exists():
        return None
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def _by_shape(params: list[Tensor]) -> dict[tuple[int, ...], list[Tensor]]:
    found: defaultdict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for param in params:
        if param.grad is not None:
            found[(param.shape[0], math.prod(param.shape[1:]))].append(param)
    return found

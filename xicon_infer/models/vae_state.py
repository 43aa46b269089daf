"""What the layers of the VAE remember of one video, and the memory they work in.

Activations are [B, T, H, W, C], see `vae_layers`. Nothing is kept on a module, so that two videos
can be computed in turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Scratch:
    """Memory that the inputs of all convolutions share, one after the other.

    memory: as large as the largest so far, [n].
    """

    memory: Tensor | None = field(default=None, repr=False)

    def take(self, like: Tensor, size: tuple[int, ...]) -> Tensor:
        """Returns an unset contiguous tensor of that size; what was taken before is void."""
        number = math.prod(size)
        found = self.memory
        same = found is not None and (found.dtype, found.device) == (like.dtype, like.device)
        if found is None or not same or found.numel() < number:
            found = self.memory = None  # the old one goes before the new one comes
            found = self.memory = like.new_empty(number)
        return found[:number].view(size)


@dataclass
class State:
    """What the layers know of one video.

    fast: the order of computation, see the module. fused: the fast order runs the kernels of
    `ops.vae_kernels`. kept: the last input frames of each causal convolution, [B, keep, H, W, C];
    empty before the video. scratch: may be shared by videos that are not computed at the same
    time. weights: kernels of convolutions that were changed to do more than one step.
    """

    fast: bool
    fused: bool = False
    kept: dict[nn.Module, Tensor] = field(default_factory=dict, repr=False)
    scratch: Scratch = field(default_factory=Scratch, repr=False)
    weights: dict[nn.Module, Tensor] = field(default_factory=dict, repr=False)

    def blank(self, like: Tensor, size: tuple[int, ...]) -> Tensor:
        """Returns an unset tensor [N, ..., C] in the memory order of this state.

        In the fast order it is void as soon as another one is asked for.
        """
        if self.fast:
            return self.scratch.take(like, size)
        return channels_last(like.new_empty(size[0], size[-1], *size[1:-1]))

    def changed(self, conv: nn.Conv2d, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the weight of a convolution, changed once per video, channels last in memory."""
        if conv not in self.weights:
            weight = change(conv.weight)
            self.weights[conv] = weight.contiguous(memory_format=torch.channels_last)
        return self.weights[conv]

    def arrange(self, x: Tensor) -> Tensor:
        """Returns x [N, ..., C] in the memory order of this state; a copy only if needed."""
        return x.contiguous() if self.fast else channels_last(channels_second(x).contiguous())


def channels_second(x: Tensor) -> Tensor:
    """Returns the [N, C, ...] view that torch's convolutions ask for."""
    return x.movedim(-1, 1)


def channels_last(x: Tensor) -> Tensor:
    """Returns the [N, ..., C] view of a convolution's output."""
    return x.movedim(1, -1)

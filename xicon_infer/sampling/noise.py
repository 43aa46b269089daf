"""The random numbers of a run, in the reference's order, from one seeded CPU generator.

Order of draws: the initial noise, the FreeNoise permutations, then one draw per step for the
solvers that need it. The generator lives on the CPU whatever the device, so that a seed means
the same numbers everywhere; the official Wan code uses the GPU's own generator, and its seeds
mean other numbers.

Shapes: T latent frames, H and W latent rows and columns, C channels, B batch.
Source: rookiestar28/ComfyUI-WanVideoWrapper: nodes_sampler.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xicon_infer.errors import InvalidRequest

MAX_SEED = 2**64 - 1


def initial_noise(seed: int, shape: Sequence[int]) -> tuple[Tensor, torch.Generator]:
    """Returns standard normal noise, float32 on the CPU, and the generator to draw on from.

    Args:
        seed: 0 to 2^64 - 1.
        shape: [16, T, H, W] or [1, 16, T, H, W]; the numbers are the same.

    Raises:
        InvalidRequest: the seed is out of range.
    """
    if not 0 <= seed <= MAX_SEED:
        raise InvalidRequest(
            f"'seed' must be between 0 and {MAX_SEED}, got {seed}",
            field="seed",
            code="OUT_OF_RANGE",
        )
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return step_noise(generator, shape), generator


def step_noise(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Returns the next standard normal of the generator, float32 on the CPU, of that shape."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def freenoise(noise: Tensor, context: int, overlap: int, generator: torch.Generator) -> Tensor:
    """Returns the noise with its frames beyond the first window replaced by shuffled earlier ones.

    Windows that overlap in time then start from related noise. The frames copied may themselves
    be copies. Noise no longer than one window comes back as it is, and draws nothing.

    Args:
        noise: [..., T, H, W]; not changed.
        context: frames of a window, at least 1, in latent frames.
        overlap: frames shared by two windows, 0 to context - 1, in latent frames.
        generator: draws the permutations.

    Source: nodes_sampler.py; arXiv:2310.15169.
    """
    result = noise.clone()
    num_frames = noise.shape[-3]
    advance = context - overlap
    for start in range(0, num_frames - context, advance):
        place = start + context
        count = min(advance, num_frames - place)
        source = start + torch.randperm(count, generator=generator)
        result[..., place : place + count, :, :] = result[..., source.to(noise.device), :, :]
        if count < advance or place + count == num_frames:
            break
    return result

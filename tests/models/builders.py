"""Small models with deterministic weights, for every test that needs one."""

from __future__ import annotations

import torch
from torch import nn

from xicon_infer.models.scail import ScailTransformer
from xicon_infer.models.wan import WanConfig, WanTransformer

TINY = WanConfig(dim=64, ffn_dim=96, num_heads=2, num_layers=2, in_dim=16, text_dim=24, text_len=12)


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Returns the module with seeded normal weights, large enough that every path counts."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            value = 1 + 0.1 * noise
        elif parameter.ndim > 1 and "modulation" not in name:
            value = noise / parameter[0].numel() ** 0.5
        else:
            value = 0.3 * noise
        parameter.data.copy_(value)
    return module.eval().requires_grad_(False)


def tiny_wan(*, image: bool = False, seed: int = 0) -> WanTransformer:
    """Returns a text-to-video model, or an image-to-video one."""
    config = TINY if not image else _with_image(in_dim=36)
    model = WanTransformer(config)
    fill(model, seed)
    return model


def tiny_scail(seed: int = 0) -> ScailTransformer:
    """Returns a SCAIL model."""
    model = ScailTransformer(_with_image(in_dim=20))
    fill(model, seed)
    return model


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Returns seeded standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _with_image(*, in_dim: int) -> WanConfig:
    return WanConfig(**{**TINY.__dict__, "in_dim": in_dim, "image_dim": 20})

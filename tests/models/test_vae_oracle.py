"""The VAE against diffusers' AutoencoderKLWan, an independent port of the same model."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from tests.models.vae_cases import noise, tiny_vae
from xicon_infer.models.vae import VAEConfig, WanVAE

# Inside a block: original name -> diffusers' name.
BLOCK = {
    "residual.0.": "norm1.",
    "residual.2.": "conv1.",
    "residual.3.": "norm2.",
    "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
}
OUTER = {
    r"^conv1\.": "quant_conv.",
    r"^conv2\.": "post_quant_conv.",
    r"coder\.conv1\.": "coder.conv_in.",
    r"head\.0\.": "norm_out.",
    r"head\.2\.": "conv_out.",
    r"middle\.0\.": "mid_block.resnets.0.",
    r"middle\.1\.": "mid_block.attentions.0.",
    r"middle\.2\.": "mid_block.resnets.1.",
    r"encoder\.downsamples\.": "encoder.down_blocks.",
}


def diffusers_name(name, blocks):
    """The name of a tensor in diffusers; `blocks` residual blocks per decoder level."""

    def up_block(match):
        level, place = divmod(int(match[1]), blocks + 1)
        inner = f"resnets.{place}" if place < blocks else "upsamplers.0"
        return f"decoder.up_blocks.{level}.{inner}."

    for old, new in OUTER.items():
        name = re.sub(old, new, name)
    name = re.sub(r"^decoder\.upsamples\.(\d+)\.", up_block, name)
    for old, new in BLOCK.items():
        name = name.replace(old, new)
    return name


@pytest.fixture(scope="module")
def diffusers_class():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import AutoencoderKLWan
    return AutoencoderKLWan


CONFIGS = [
    VAEConfig(dim=4, z_dim=4),
    VAEConfig(6, 3, (1, 2, 3, 2), 1, (True, False, True)),
    VAEConfig(2, 5, (2, 1, 2, 2), 3, (False, False, True)),
]


def oracle(cls, vae: WanVAE):
    config = vae.config
    other = cls(
        base_dim=config.dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
        latents_mean=[0.0] * config.z_dim,
        latents_std=[1.0] * config.z_dim,
    )
    blocks = config.num_res_blocks + 1
    state = {diffusers_name(name, blocks): value for name, value in vae.state_dict().items()}
    other.load_state_dict(state)
    return other.to(vae.conv2.weight.dtype).eval()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=["tiny", "mixed", "deep"])
@torch.no_grad()
def test_equals_diffusers(diffusers_class, config, fast):
    vae = tiny_vae(config, dtype=torch.float64, fast=fast)
    other = oracle(diffusers_class, vae)
    stride = config.temporal_stride
    # diffusers encodes one and then always four frames, whatever the temporal stride.
    video = noise(2, 3, 9, 24, 16).double()
    if stride == 4:
        wanted = other.encode(video).latent_dist.mean
        torch.testing.assert_close(vae.encode(video), wanted, rtol=1e-10, atol=1e-10)
    latents = noise(2, config.z_dim, 3, 3, 2).double()
    wanted = other.decode(latents).sample
    got = vae.decode(latents, chunk=2)
    assert got.shape == wanted.shape == (2, 3, 2 * stride + 1, 24, 16)
    # diffusers clamps, and doubles frames in float32.
    torch.testing.assert_close(got.clamp(-1, 1), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted.abs() < 1).float().mean() > 0.5


@torch.no_grad()
def test_float32_on_the_cpu_equals_diffusers_to_the_last_bits(diffusers_class):
    # The default order is diffusers' own; 1e-5 would already be two different sums.
    vae = tiny_vae()
    other = oracle(diffusers_class, vae)
    latents = noise(1, 4, 3, 3, 5)
    wanted = other.decode(latents).sample
    got = vae.decode(latents).clamp(-1, 1)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)

"""The Wan VAE as one differentiable pass over a whole clip, on the weights of the true class.

`WanVAE` streams and works in place, which autograd does not bear. These functions compute the same
thing from the same modules at once; a test holds the two together.

Shape letters: B batch, C channels, F pixel frames, T latent frames, H and W pixels, h and w
latent cells.

Source: Wan-Video/Wan2.1: wan/modules/vae.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xicon_infer.models.vae import WanVAE
from xicon_infer.models.vae_layers import (
    AttentionBlock,
    CausalConv3d,
    ChannelNorm,
    Downsample,
    ResidualBlock,
    Upsample,
    layer,
)


def encode(vae: WanVAE, video: Tensor) -> Tensor:
    """Returns the raw latent mean [B, z, T, h, w].

    Args:
        vae: the model.
        video: [B, 3, F, H, W] in [-1, 1], F = 4n + 1.
    """
    x = _causal(vae.encoder.conv1, video)
    for block in vae.encoder.downsamples:
        x = _down(block, x) if isinstance(block, Downsample) else _residual(block, x)
    x = _head(vae.encoder.head, _middle(vae.encoder.middle, x))
    return vae.conv1(x)[:, : vae.config.z_dim]


def decode(vae: WanVAE, latents: Tensor) -> Tensor:
    """Returns the video [B, 3, 4(T - 1) + 1, 8h, 8w], not clamped.

    Args:
        vae: the model.
        latents: raw [B, z, T, h, w].
    """
    x = _middle(vae.decoder.middle, _causal(vae.decoder.conv1, vae.conv2(latents)))
    for block in vae.decoder.upsamples:
        x = _up(block, x) if isinstance(block, Upsample) else _residual(block, x)
    return _head(vae.decoder.head, x)


def _norm(norm: ChannelNorm, x: Tensor) -> Tensor:
    # The sum is of float32, the product in the dtype of the picture: half the traffic.
    square = x.square().sum(1, keepdim=True, dtype=torch.float32)
    scale = (square.clamp_min(1e-24)).rsqrt() * x.shape[1] ** 0.5
    gain = norm.gamma.reshape(-1, *[1] * (x.ndim - 2))
    return x * scale.to(x.dtype) * gain.to(x.dtype)


def _causal(conv: CausalConv3d, x: Tensor) -> Tensor:
    """Returns the causal convolution with zeros before the first frame."""
    padded = F.pad(x, (0, 0, 0, 0, conv.keep, 0)) if conv.keep else x
    return F.conv3d(padded, conv.weight, conv.bias, conv.stride, (0, *conv.border))


def _residual(block: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(block, ResidualBlock)
    parts = block.residual
    y = _causal(layer(parts, 2, CausalConv3d), F.silu(_norm(layer(parts, 0, ChannelNorm), x)))
    y = _causal(layer(parts, 6, CausalConv3d), F.silu(_norm(layer(parts, 3, ChannelNorm), y)))
    return y + (x if block.shortcut is None else block.shortcut(x))


def _middle(middle: nn.Sequential, x: Tensor) -> Tensor:
    x = _residual(middle[0], x)
    block = layer(middle, 1, AttentionBlock)
    frames = _frames(x)
    q, k, v = (
        part.flatten(2).transpose(1, 2)
        for part in block.to_qkv(_norm(block.norm, frames)).chunk(3, dim=1)
    )
    attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    images = attended.transpose(1, 2).reshape(frames.shape)
    return _residual(middle[2], x + _clips(block.proj(images), len(x)))


def _head(head: nn.Sequential, x: Tensor) -> Tensor:
    return _causal(layer(head, 2, CausalConv3d), F.silu(_norm(layer(head, 0, ChannelNorm), x)))


def _down(block: Downsample, x: Tensor) -> Tensor:
    y = _clips(block.resample(F.pad(_frames(x), (0, 1, 0, 1))), len(x))
    conv = block.time_conv
    if conv is None or y.shape[2] == 1:
        return y
    later = F.conv3d(y, conv.weight, conv.bias, conv.stride)
    return torch.cat((y[:, :, :1], later), dim=2)


def _up(block: Upsample, x: Tensor) -> Tensor:
    if block.time_conv is not None and x.shape[2] > 1:
        pairs = _causal(block.time_conv, x[:, :, 1:])
        # The two halves of the channels are the two frames, earlier one first.
        doubled = torch.stack(pairs.chunk(2, dim=1), dim=3).flatten(2, 3)
        x = torch.cat((x[:, :, :1], doubled), dim=2)
    images = F.interpolate(_frames(x), scale_factor=2, mode="nearest-exact")
    return _clips(block.resample(images), len(x))


def _frames(x: Tensor) -> Tensor:
    """Returns the frames of [B, C, T, H, W] as images [B T, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def _clips(images: Tensor, batch: int) -> Tensor:
    """Returns images [B T, C, H, W] as clips [B, C, T, H, W]."""
    return images.unflatten(0, (batch, -1)).transpose(1, 2)

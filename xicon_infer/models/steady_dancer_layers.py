"""The small modules that SteadyDancer adds to Wan: motion, structure and alignment of the pose.

All of them work on 16 channels at the resolution of the latents, in the dtype of their weights
(float32 as loaded), and cost nothing beside the transformer. Parameter names are those of the
published checkpoints, whose `bn1` and `bn2` are group norms.

Shape letters: B batch, T latent frames, H and W latent rows and columns, C channels.

Source: MCG-NJU/SteadyDancer: wan/modules/small_archs.py, mobilenetv2_dcd.py.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xicon_infer.models.wan_layers import split_heads

ALIGN_WIDTH = 128
ALIGN_HEADS = 8
NORM_EPS = 1e-5

_GROUPS = 4
_SQUEEZE = 8
_LEAST_WIDTH = 4


def hard_sigmoid(x: Tensor) -> Tensor:
    """Returns clamp(x + 3, 0, 6) / 3: 0 to 2, twice the usual hard sigmoid."""
    return F.relu6(x + 3) / 3


class FactorConv3d(nn.Module):
    """A 3 x 3 convolution of each channel in space, SiLU, then one over 3 frames in time.

    Time is padded with zeros on both sides: the first frame sees the second.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv3d(
            channels, channels, (1, 3, 3), padding=(0, 1, 1), groups=channels, bias=False
        )
        self.temporal = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, C, T, H, W], as the input."""
        return self.temporal(F.silu(self.spatial(x)))


def motion_module(channels: int) -> nn.Sequential:
    """Returns what describes the motion of the pose: three `FactorConv3d`, SiLU after each."""
    layers = [layer for _ in range(3) for layer in (FactorConv3d(channels), nn.SiLU())]
    return nn.Sequential(*layers)


class Squeeze(nn.Module):
    """Multiplies each channel by a gate computed from all of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, channels, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, C], as the input."""
        return x * hard_sigmoid(self.fc(x))


class DynamicConv(nn.Module):
    """A 1 x 1 convolution whose weights depend on the mean of the picture.

    Args:
        inputs: channels going in.
        outputs: channels coming out. Where there are more of them, the picture is summed up in
            quarters and not as a whole; SteadyDancer has 16 of both.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pooled = 2 if inputs < outputs else 1
        summary = inputs * self.pooled**2
        self.width = _inner_width(summary, outputs, 8 if inputs < outputs else 2)
        squeezed = max(max(summary, self.width**2) // _SQUEEZE, _LEAST_WIDTH)
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.conv_q = nn.Conv2d(inputs, self.width, 1, bias=False)
        self.fc = nn.Sequential(nn.Linear(summary, squeezed, bias=False), Squeeze(squeezed))
        self.fc_phi = nn.Linear(squeezed, self.width**2, bias=False)
        self.fc_scale = nn.Linear(squeezed, outputs, bias=False)
        self.conv_p = nn.Conv2d(self.width, outputs, 1, bias=False)
        self.bn1 = nn.GroupNorm(_GROUPS, self.width, eps=NORM_EPS)
        self.bn2 = nn.GroupNorm(_GROUPS, self.width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, outputs, H, W] of pictures [B, inputs, H, W]."""
        _, mixing, scale = self.weights_of(x)
        hidden = self.bn1(self.conv_q(x)).flatten(2)
        hidden = self.bn2(mixing @ hidden) + hidden
        mixed = self.conv_p(hidden.reshape(len(x), -1, *x.shape[2:]))
        return mixed + scale[:, :, None, None] * self.conv(x)

    def weights_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns summary [B, s], mixing matrix [B, w, w] and scales [B, outputs] of pictures."""
        summary = self.fc(F.adaptive_avg_pool2d(x, self.pooled).flatten(1))
        mixing = self.fc_phi(summary).reshape(-1, self.width, self.width)
        return summary, mixing, hard_sigmoid(self.fc_scale(summary))


class ChannelNorm(nn.Module):
    """LayerNorm over the last axis, with the parameters of a picture [1, C, 1, 1]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised x [..., C]."""
        weight, bias = self.weight.flatten(), self.bias.flatten()
        return F.layer_norm(x, weight.shape, weight, bias, NORM_EPS)


class PackedAttention(nn.Module):
    """Attention whose three input projections are one tensor, as torch packs them."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, source: Tensor) -> Tensor:
        """Returns [N, S, C]: what each of S queries finds in the source [N, S', C]."""
        width = query.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        asked = F.linear(query, weight[:width], bias[:width])
        key, value = F.linear(source, weight[width:], bias[width:]).chunk(2, dim=-1)
        q, k, v = (split_heads(x, self.num_heads).transpose(1, 2) for x in (asked, key, value))
        found = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(found.transpose(1, 2).flatten(2))


class PoseAlignment(nn.Module):
    """Finds for every place and frame of the noisy video what the pose says there.

    The softmax runs over the frames at one place of the picture, not over the places of one
    frame: the authors' code hands a batch-first tensor to an attention that is batch-last. The
    weights were trained so.
    """

    def __init__(self, channels: int, width: int = ALIGN_WIDTH, heads: int = ALIGN_HEADS) -> None:
        super().__init__()
        self.proj_p = nn.Conv2d(channels, width, 1)
        self.proj_r = nn.Conv2d(channels, width, 1)
        self.proj_p_back = nn.Conv2d(width, channels, 1)
        self.cross_attn = PackedAttention(width, heads)
        self.ffn_pose = nn.Sequential(
            nn.Conv2d(width, width, 1), nn.SiLU(), nn.Conv2d(width, width, 1)
        )
        self.norm1 = ChannelNorm(width)
        self.norm2 = ChannelNorm(width)

    def forward(self, pose: Tensor, latents: Tensor) -> Tensor:
        """Returns the aligned pose [B, C, T, H, W].

        Args:
            pose: the fused pose [B, C, T, H, W].
            latents: the noisy latents of the same shape.
        """
        batch, _, frames, rows, columns = pose.shape
        found = self.cross_attn(
            pointwise(self.proj_r, _by_place(latents)), pointwise(self.proj_p, _by_place(pose))
        )
        hidden = self.norm1(found)
        first, act, second = self.ffn_pose
        hidden = self.norm2(hidden + pointwise(second, act(pointwise(first, hidden))))
        out = pointwise(self.proj_p_back, hidden)
        # [B H W, T, C] -> [B, C, T, H, W]
        return out.reshape(batch, rows, columns, frames, -1).permute(0, 4, 3, 1, 2)


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """Returns a 1 x 1 convolution of x [..., C], whose channels are the last axis."""
    layer = cast("nn.Conv2d", conv)
    return F.linear(x, layer.weight.flatten(1), layer.bias)


def _by_place(x: Tensor) -> Tensor:
    """Returns [B H W, T, C] of [B, C, T, H, W]: one sequence of frames for every place."""
    return x.permute(0, 3, 4, 2, 1).flatten(0, 2)


def _inner_width(summary: int, outputs: int, reduction: int) -> int:
    """Returns the side of the mixing matrix: halved until the matrix is not large, at least 4."""
    width = min(summary // reduction, outputs // reduction)
    while width**2 > 2 * summary:
        reduction *= 2
        width = min(summary // reduction, outputs // reduction)
    return max(width, _LEAST_WIDTH)

"""The two networks of the video VAE, without the projections around the latents.

B batch, F pixel frames, T latent frames, H W pixels, h w latent cells, z latent channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from xicon_infer.models.vae_config import VAEConfig
from xicon_infer.models.vae_layers import (
    AttentionBlock,
    CausalConv3d,
    ChannelNorm,
    Downsample,
    ResidualBlock,
    State,
    Upsample,
    layer,
)


class Encoder(nn.Module):
    """[B, F, H, W, 3] -> [B, T, h, w, 2z]: mean and log-variance, before `conv1`.

    Args:
        config: the sizes.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(3, config.dim, (3, 3, 3))
        blocks: list[nn.Module] = []
        channels = config.dim
        for level, width in enumerate(config.widths):
            for _ in range(config.num_res_blocks):
                blocks.append(ResidualBlock(channels, width))
                channels = width
            if level < len(config.temporal_downsample):
                blocks.append(Downsample(width, config.temporal_downsample[level]))
        self.downsamples = nn.Sequential(*blocks)
        self.middle = _middle(channels)
        self.head = _head(channels, 2 * config.z_dim)

    def forward(self, x: Tensor, state: State) -> Tensor:
        """Returns the moments of the next frames of a video; one frame in the first call."""
        x = self.conv1(self.conv1.window(x, state), state)
        for block in self.downsamples:
            x = block(x, state)
        return _run_head(self.head, _run_middle(self.middle, x, state), state)


class Decoder(nn.Module):
    """[B, T, h, w, z] -> [B, F, H, W, 3], after `conv2`.

    Args:
        config: the sizes.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        temporal = config.temporal_downsample[::-1]
        self.conv1 = CausalConv3d(config.z_dim, widths[0], (3, 3, 3))
        self.middle = _middle(widths[0])
        blocks: list[nn.Module] = []
        channels = widths[0]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks + 1):
                blocks.append(ResidualBlock(channels, width))
                channels = width
            if level < len(temporal):
                blocks.append(Upsample(width, temporal[level]))
                channels = width // 2
        self.upsamples = nn.Sequential(*blocks)
        self.head = _head(channels, 3)

    def forward(self, x: Tensor, state: State) -> Tensor:
        """Returns the pixels of the next latent frames; one latent frame in the first call."""
        x = _run_middle(self.middle, self.conv1(self.conv1.window(x, state), state), state)
        for block in self.upsamples:
            x = block(x, state)
        return _run_head(self.head, x, state)


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels),
        AttentionBlock(channels),
        ResidualBlock(channels, channels),
    )


def _head(channels: int, out_channels: int) -> nn.Sequential:
    # Index 1 is the activation, which holds no parameters; it keeps the names right.
    conv = CausalConv3d(channels, out_channels, (3, 3, 3))
    return nn.Sequential(ChannelNorm(channels), nn.SiLU(), conv)


def _run_middle(middle: nn.Sequential, x: Tensor, state: State) -> Tensor:
    return middle[2](middle[1](middle[0](x, state), state), state)


def _run_head(head: nn.Sequential, x: Tensor, state: State) -> Tensor:
    conv = layer(head, 2, CausalConv3d)
    return conv(conv.window(x, state, layer(head, 0, ChannelNorm)), state)

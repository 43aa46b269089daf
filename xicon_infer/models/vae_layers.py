"""The layers of the Wan2.1 video VAE, made to run chunk by chunk over time.

Activations inside this file are [B, T, H, W, C]: B batch, T frames at the resolution of the layer,
H height, W width, C channels. What a layer remembers from one chunk to the next lives in a `State`
that the caller makes for one video and passes to every call. Nothing is kept on a module, so two
videos can be encoded in turns. For inference only: several steps work in place. Parameter names
are those of the original checkpoint.

Every layer can compute in two orders, chosen by the state. Fast: channels last in memory, no work
on zeros, doubling folded into its convolution. Otherwise: the reference's own order, whose float32
results are those of Wan-Video/Wan2.1 bit for bit on the same machine. They differ by rounding only
(1e-12 in float64), but a small random VAE turns one rounding into 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_Layer = TypeVar("_Layer", bound=nn.Module)

# Scores of one attention call, rows x columns: 256 MiB in float32. Only the fallback kernel ever
# stores them; 480x832 needs 39 M for one frame.
MAX_SCORES = 2**26


@dataclass
class State:
    """What the layers know of one video.

    fast: the order of computation, see the module. kept: the last input frames of each causal
    convolution, [B, keep, H, W, C]; empty before the video.
    """

    fast: bool
    kept: dict[nn.Module, Tensor] = field(default_factory=dict, repr=False)

    def blank(self, like: Tensor, size: tuple[int, ...]) -> Tensor:
        """Returns an unset tensor [N, ..., C] in the memory order of this state."""
        if self.fast:
            return like.new_empty(size)
        return _channels_last(like.new_empty(size[0], size[-1], *size[1:-1]))

    def arrange(self, x: Tensor) -> Tensor:
        """Returns x [N, ..., C] in the memory order of this state; a copy only if needed."""
        return x.contiguous() if self.fast else _channels_last(_channels_second(x).contiguous())


def layer(layers: nn.Sequential, index: int, kind: type[_Layer]) -> _Layer:
    """Returns layer `index` of a sequence, known to be of that kind."""
    found = layers[index]
    assert isinstance(found, kind)
    return found


class ChannelNorm(nn.Module):
    """x / ||x|| * sqrt(C) * gamma, the norm taken over the channels.

    Args:
        channels: C.
        dims: how many axes follow the channels in the stored gain: 3 for video, 2 for images.

    Source: Wan-Video/Wan2.1: wan/modules/vae.py. Differs: the norm is taken in float32 (or
    float64) for half precision input, as diffusers does.
    """

    def __init__(self, channels: int, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor, state: State, out: Tensor | None = None) -> Tensor:
        """Returns the normed x, [..., C].

        Args:
            x: [..., C].
            state: of this video.
            out: where to write it, of the shape and dtype of x; a new tensor if None.
        """
        gain, scale = self.gamma.flatten(), x.shape[-1] ** 0.5
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        # 1e-12 is the reference's guard against a division by zero.
        normed = torch.div(x, norm.clamp_min_(1e-12), out=out).to(x.dtype)
        if state.fast:
            return normed.mul_(gain * scale)
        return normed.mul_(scale).mul_(gain)


def pointwise(x: Tensor, conv: nn.Conv2d | nn.Conv3d, state: State) -> Tensor:
    """Returns a convolution without extent in space and time, [N, ..., C_out] for [N, ..., C]."""
    if state.fast:
        return F.linear(x, conv.weight.flatten(1), conv.bias)
    return _channels_last(conv(_channels_second(x)))


class CausalConv3d(nn.Module):
    """A convolution that sees the present and past frames only.

    Two steps, so that a norm can write straight into the input and its source can be freed first:
    `window` builds the input, remembered frames in front; calling the module convolves it.

    Args:
        channels: C.
        out_channels: C_out.
        kernel: frames, height, width; height and width are zero padded to keep the size.
        stride: in time.
    """

    def __init__(
        self, channels: int, out_channels: int, kernel: tuple[int, int, int], stride: int = 1
    ) -> None:
        super().__init__()
        conv = nn.Conv3d(channels, out_channels, kernel)
        self.weight, self.bias = conv.weight, conv.bias
        self.stride = (stride, 1, 1)
        self.keep = kernel[0] - stride
        self.border = (kernel[1] // 2, kernel[2] // 2)

    def window(self, x: Tensor, state: State, norm: ChannelNorm | None = None) -> Tensor:
        """Returns [remembered frames | x], and remembers its last frames in their place.

        Args:
            x: [B, T, H, W, C]; any strides.
            state: of this video. With nothing remembered the past is zeros; the fast order then
                returns a single first frame alone, since zeros add nothing.
            norm: if given, x becomes silu(norm(x)) on the way.

        Returns:
            [B, keep + T, H, W, C], or [B, 1, H, W, C] for a single first frame. The reference's
            order has a border of zeros in it, which the fast one leaves to the convolution.
        """
        batch, frames, height, width, channels = x.shape
        down, across = (0, 0) if state.fast else self.border
        size = (batch, self.keep + frames, height + 2 * down, width + 2 * across, channels)
        window = state.blank(x, size)
        if down or across:
            window.zero_()
        inner = window[:, :, down : down + height, across : across + width]
        kept = state.kept.get(self)
        if kept is None:
            inner[:, : self.keep] = 0
        else:
            inner[:, : self.keep] = kept
        new = inner[:, self.keep :]
        if norm is None:
            new.copy_(x)
        elif state.fast:
            F.silu(norm(x, state, new), inplace=True)
        else:
            # torch rounds the exponential of short rows and of long ones differently.
            new.copy_(F.silu(norm(x, state), inplace=True))
        if kept is None:
            state.kept[self] = inner[:, -self.keep :].clone()
            return new if state.fast and frames == 1 else window
        kept.copy_(inner[:, -self.keep :])
        return window

    def forward(self, window: Tensor, state: State) -> Tensor:
        """Returns [B, T / stride, H, W, C_out] for a `window`."""
        # A window shorter than the kernel lacks its oldest frames, which are zeros: the taps that
        # would meet them are dropped. This saves two thirds of the work of every first frame.
        weight = self.weight[:, :, -window.shape[1] :]
        padding = (0, *self.border) if state.fast else 0
        out = F.conv3d(_channels_second(window), weight, self.bias, self.stride, padding)
        return _channels_last(out)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 shortcut where the width changes.

    Args:
        channels: C.
        out_channels: C_out.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        # Indices 1, 4 and 5 (activations, dropout) hold no parameters; they keep the names right.
        self.residual = nn.Sequential(
            ChannelNorm(channels),
            nn.SiLU(),
            CausalConv3d(channels, out_channels, (3, 3, 3)),
            ChannelNorm(out_channels),
            nn.SiLU(),
            nn.Identity(),
            CausalConv3d(out_channels, out_channels, (3, 3, 3)),
        )
        self.shortcut = nn.Conv3d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor, state: State) -> Tensor:
        """Returns [B, T, H, W, C_out] for x [B, T, H, W, C]."""
        conv1 = layer(self.residual, 2, CausalConv3d)
        conv2 = layer(self.residual, 6, CausalConv3d)
        y = conv1(conv1.window(x, state, layer(self.residual, 0, ChannelNorm)), state)
        window = conv2.window(y, state, layer(self.residual, 3, ChannelNorm))
        del y  # as large as the output: free it before the output is made
        y = conv2(window, state)
        return y.add_(x if self.shortcut is None else pointwise(x, self.shortcut, state))


class AttentionBlock(nn.Module):
    """x + single-head self-attention inside each frame.

    Args:
        channels: C, also the width of the head.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, dims=2)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, state: State) -> Tensor:
        """Returns [B, T, H, W, C] for x of the same shape."""
        frames = state.arrange(x.flatten(0, 1))
        number, height, width, channels = frames.shape
        normed = self.norm(frames, state)
        rows = pointwise(normed, self.to_qkv, state).reshape(number, 1, height * width, -1)
        q, k, v = rows.contiguous().chunk(3, dim=-1)
        step = max(1, MAX_SCORES // (number * height * width))
        parts = torch.split(q, step, dim=2)
        out = torch.cat([F.scaled_dot_product_attention(part, k, v) for part in parts], dim=2)
        # The strides that this leaves on a single frame decide which kernel projects it.
        images = out.squeeze(1).transpose(1, 2).reshape(number, channels, height, width)
        return pointwise(_channels_last(images), self.proj, state).reshape(x.shape).add_(x)


class Downsample(nn.Module):
    """Halves height and width, and in time keeps every second frame of a causal convolution.

    The very first frame of a video passes the step in time untouched.

    Args:
        channels: C.
        temporal: whether time is halved too.
    """

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), stride=2) if temporal else None

    def forward(self, x: Tensor, state: State) -> Tensor:
        """Returns [B, T or T/2, H/2, W/2, C] for x [B, T, H, W, C]; T is 1 in the first call."""
        batch, frames, height, width, channels = x.shape
        # The reference pads one row below and one column at the right, which no convolution
        # argument can ask for.
        padded = state.blank(x, (batch * frames, height + 1, width + 1, channels))
        padded[:, -1] = 0
        padded[:, :, -1] = 0
        padded[:, :-1, :-1] = x.flatten(0, 1)
        y = _channels_last(self.resample(_channels_second(padded)))
        y = y.reshape(batch, frames, height // 2, width // 2, channels)
        if self.time_conv is None:
            return y
        if self.time_conv not in state.kept:
            state.kept[self.time_conv] = y[:, -1:].clone()
            return y
        return self.time_conv(self.time_conv.window(y, state), state)


class Upsample(nn.Module):
    """Doubles height and width and halves the channels; in time makes two frames of each.

    The very first frame of a video passes the step in time untouched, and the step starts from
    zeros at the frame after it.

    Args:
        channels: C.
        temporal: whether time is doubled too.
    """

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.resample = nn.Sequential(nn.Identity(), conv)
        self.time_conv = CausalConv3d(channels, channels * 2, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: State) -> Tensor:
        """Returns [B, T or 2T, 2H, 2W, C/2] for x [B, T, H, W, C]; T is 1 in the first call."""
        if self.time_conv is not None:
            x = self._double_frames(x, self.time_conv, state)
        frames = _channels_second(state.arrange(x.flatten(0, 1)))
        conv = layer(self.resample, 1, nn.Conv2d)
        if state.fast:
            y = F.conv_transpose2d(frames, fold_doubling(conv.weight), conv.bias, 2, 1)
        else:
            y = conv(F.interpolate(frames, scale_factor=2, mode="nearest-exact"))
        y = _channels_last(y)
        return y.reshape(*x.shape[:2], *y.shape[1:])

    def _double_frames(self, x: Tensor, conv: CausalConv3d, state: State) -> Tensor:
        batch, frames, *size, channels = x.shape
        if conv not in state.kept:
            state.kept[conv] = x.new_zeros(batch, conv.keep, *size, channels)
            return x
        pairs = conv(conv.window(x, state), state)
        doubled = state.blank(x, (batch, 2 * frames, *size, channels))
        # The two halves of the channels are the two frames, earlier one first.
        doubled[:, ::2] = pairs[..., :channels]
        doubled[:, 1::2] = pairs[..., channels:]
        return doubled


def fold_doubling(weight: Tensor) -> Tensor:
    """Returns the transposed kernel that doubles an image and convolves it in one step.

    Repeating pixels 2 x 2 is a transposed convolution with ones, so that followed by a 3 x 3
    convolution it is one transposed convolution with 4 x 4 taps and stride 2: the flipped kernel
    summed over every 2 x 2 window. It takes 2.25 times less work, and the doubled image, twice as
    large as the result, is never stored.

    Args:
        weight: [C_out, C, 3, 3].

    Returns:
        [C, C_out, 4, 4], for stride 2 and padding 1.
    """
    flipped = weight.flip(2, 3)
    summed = F.avg_pool2d(flipped, 2, stride=1, padding=1, divisor_override=1)
    return summed.transpose(0, 1)


def _channels_second(x: Tensor) -> Tensor:
    """Returns the [N, C, ...] view that torch's convolutions ask for."""
    return x.movedim(-1, 1)


def _channels_last(x: Tensor) -> Tensor:
    """Returns the [N, ..., C] view of a convolution's output."""
    return x.movedim(1, -1)

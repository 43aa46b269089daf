"""The layers of the Wan2.1 video VAE, made to run chunk by chunk over time.

Activations inside this file are [B, T, H, W, C]: B batch, T frames at the resolution of the layer,
H height, W width, C channels. What a layer remembers from one chunk to the next lives in a `State`
that the caller makes for one video and passes to every call. Nothing is kept on a module, so two
videos can be encoded in turns. For inference only: several steps work in place. Parameter names
are those of the original checkpoint.

Every layer can compute in two orders, chosen by the state. Fast: channels last in memory, no work
on zeros, doubling folded into its convolution, what lies between the convolutions in one pass each
(`ops.vae_kernels`). Otherwise: the reference's own order, whose float32 results are those of
Wan-Video/Wan2.1 bit for bit on the same machine. They differ by rounding only (1e-12 in float64),
but a small random VAE turns one rounding into 1e-5.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xicon_infer.models.vae_state import Scratch as Scratch
from xicon_infer.models.vae_state import State as State
from xicon_infer.models.vae_state import channels_last, channels_second
from xicon_infer.ops.vae_kernels import add_bias, channel_norm, fill_window, interleave

_Layer = TypeVar("_Layer", bound=nn.Module)
Axes = tuple[int, int, int]

# Scores of one attention call, rows x columns: 256 MiB in float32. Only the fallback kernel ever
# stores them; 480x832 needs 39 M for one frame.
MAX_SCORES = 2**26


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

    @property
    def gain(self) -> Tensor:
        """Returns the gain of each channel, [C]."""
        return self.gamma.flatten()

    def forward(self, x: Tensor, state: State) -> Tensor:
        """Returns the normed x, [..., C]."""
        if state.fast:
            return channel_norm(x, self.gain)
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        # 1e-12 is the reference's guard against a division by zero.
        normed = torch.div(x, norm.clamp_min_(1e-12)).to(x.dtype)
        return normed.mul_(x.shape[-1] ** 0.5).mul_(self.gain)


def pointwise(x: Tensor, conv: nn.Conv2d | nn.Conv3d, state: State) -> Tensor:
    """Returns a convolution without extent in space and time, [N, ..., C_out] for [N, ..., C]."""
    if state.fast:
        return F.linear(x, conv.weight.flatten(1), conv.bias)
    return channels_last(conv(channels_second(x)))


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

    def window(
        self,
        x: Tensor,
        state: State,
        norm: ChannelNorm | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Returns [remembered frames | x], and remembers its last frames in their place.

        Args:
            x: [B, T, H, W, C]; any strides.
            state: of this video. With nothing remembered the past is zeros; the fast order then
                returns a single first frame alone, since zeros add nothing.
            norm: if given, x becomes silu(norm(x)) on the way.
            bias: [C], added to x before; in the fast order only.

        Returns:
            [B, keep + T, H, W, C], or [B, 1, H, W, C] for a single first frame. The reference's
            order has a border of zeros in it, which the fast one leaves to the convolution.
        """
        batch, frames, height, width, channels = x.shape
        if not state.fast:
            return self._bordered(x, state, norm)
        first = self not in state.kept
        if first:
            state.kept[self] = x.new_zeros(batch, self.keep, height, width, channels)
        window = state.blank(x, (batch, self.keep + frames, height, width, channels))
        gain = None if norm is None else norm.gain
        fill_window(x, gain, bias, state.kept[self], window, fused=state.fused)
        return window[:, self.keep :] if first and frames == 1 else window

    def _bordered(self, x: Tensor, state: State, norm: ChannelNorm | None) -> Tensor:
        """Returns the window of the reference's order."""
        batch, frames, height, width, channels = x.shape
        down, across = self.border
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
        # torch rounds the exponential of short rows and of long ones differently.
        new = x if norm is None else F.silu(norm(x, state), inplace=True)
        inner[:, self.keep :].copy_(new)
        if kept is None:
            state.kept[self] = inner[:, -self.keep :].clone()
        else:
            kept.copy_(inner[:, -self.keep :])
        return window

    def forward(self, window: Tensor, state: State, *, biased: bool = True) -> Tensor:
        """Returns [B, T / stride, H, W, C_out] for a `window`; without the bias if not `biased`."""
        # A window shorter than the kernel lacks its oldest frames, which are zeros: the taps that
        # would meet them are dropped. This saves two thirds of the work of every first frame.
        weight = self.weight[:, :, -window.shape[1] :]
        bias = self.bias if biased else None
        video = channels_second(window)
        if state.fast:
            return channels_last(convolve(video, weight, bias, self.stride, (0, *self.border)))
        return channels_last(F.conv3d(video, weight, bias, self.stride))


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
        # A kernel adds a bias where it passes anyway; a convolution makes a pass of its own of it.
        biased = not state.fused
        window = conv1.window(x, state, layer(self.residual, 0, ChannelNorm))
        y = conv1(window, state, biased=biased)
        late = None if biased else conv1.bias
        window = conv2.window(y, state, layer(self.residual, 3, ChannelNorm), late)
        del y  # as large as the output: free it before the output is made
        y = conv2(window, state, biased=biased)
        other = x if self.shortcut is None else pointwise(x, self.shortcut, state)
        return add_bias(y, None if biased else conv2.bias, other, fused=state.fused)


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
        return pointwise(channels_last(images), self.proj, state).reshape(x.shape).add_(x)


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
        y = channels_last(self.resample(channels_second(padded)))
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
        frames = channels_second(state.arrange(x.flatten(0, 1)))
        conv = layer(self.resample, 1, nn.Conv2d)
        if state.fast:
            weight = state.changed(conv, fold_doubling)
            bias = None if state.fused else conv.bias
            y = channels_last(F.conv_transpose2d(frames, weight, bias, 2, 1))
            y = add_bias(y, conv.bias if state.fused else None, None, fused=state.fused)
        else:
            y = conv(F.interpolate(frames, scale_factor=2, mode="nearest-exact"))
            y = channels_last(y)
        return y.reshape(*x.shape[:2], *y.shape[1:])

    def _double_frames(self, x: Tensor, conv: CausalConv3d, state: State) -> Tensor:
        batch, frames, *size, channels = x.shape
        if conv not in state.kept:
            state.kept[conv] = x.new_zeros(batch, conv.keep, *size, channels)
            return x
        pairs = conv(conv.window(x, state), state, biased=not state.fused)
        if state.fast:
            doubled = state.blank(x, (batch, 2 * frames, *size, channels))
            interleave(pairs, conv.bias if state.fused else None, doubled, fused=state.fused)
            return doubled
        doubled = state.blank(x, (batch, 2 * frames, *size, channels))
        # The two halves of the channels are the two frames, earlier one first.
        doubled[:, ::2] = pairs[..., :channels]
        doubled[:, 1::2] = pairs[..., channels:]
        return doubled


def convolve(
    video: Tensor, weight: Tensor, bias: Tensor | None, stride: Axes, padding: Axes
) -> Tensor:
    """Returns conv3d of a video [B, C, T, H, W], on every CPU by the fast kernels.

    For one video with B * C * T * H up to 20480, torch takes a kernel of its own that is much
    slower than oneDNN's (pytorch/pytorch: aten/src/ATen/native/Convolution.cpp; benchmarks/vae.py).
    """
    if video.device.type == "cpu" and video.dtype == torch.float32 and has_onednn():
        ones = (1, 1, 1)
        return torch.ops.aten.mkldnn_convolution(video, weight, bias, padding, stride, ones, 1)
    return F.conv3d(video, weight, bias, stride, padding)


def has_onednn() -> bool:
    """Returns whether this build of torch has oneDNN, and it is not turned off."""
    found = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(found and torch.backends.mkldnn.enabled)


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

"""The sizes of a Wan2.1 VAE, and how a video is cut into steps for it.

B batch, F pixel frames, T latent frames, H W pixels, h w latent cells, z latent channels. No layer
and no weight is touched here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import count
from typing import NoReturn

import torch
from torch import Tensor

from xicon_infer.errors import InvalidRequest, WeightsError

# Per-channel statistics of the Wan2.1 latents (Wan-Video/Wan2.1: wan/modules/vae.py).
LATENT_MEANS = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STDS = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class VAEConfig:
    """The sizes of a Wan2.1 VAE; the defaults are the published model.

    dim: channels of the first level. z_dim: latent channels. dim_mult: channels of each level, as
    multiples of dim. num_res_blocks: residual blocks per encoder level; the decoder has one more.
    temporal_downsample: between which levels the encoder halves time, first level first.

    Raises:
        InvalidRequest: when a value is impossible.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)

    def __post_init__(self) -> None:
        for field in fields(self)[:4]:
            values = getattr(self, field.name)
            numbers = values if isinstance(values, tuple) else (values,)
            if not numbers or min(numbers) < 1:
                refuse(field.name, values, "1 or more")
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            allowed = f"{len(self.dim_mult) - 1} values, one between each two levels"
            refuse("temporal_downsample", self.temporal_downsample, allowed)
        if any(width % 2 for width in self.widths[1:]):
            refuse("dim", self.dim, "an even number of channels above the first level")

    @property
    def widths(self) -> tuple[int, ...]:
        """Returns the channels of each level."""
        return tuple(self.dim * mult for mult in self.dim_mult)

    @property
    def spatial_stride(self) -> int:
        """Returns the pixels per latent cell, each way: 8."""
        return int(2 ** (len(self.dim_mult) - 1))

    @property
    def temporal_stride(self) -> int:
        """Returns the pixel frames per latent frame after the first: 4."""
        return int(2 ** sum(self.temporal_downsample))

    @property
    def look_back(self) -> int:
        """Returns how many earlier pixel frames a latent frame can depend on: 112.

        Each causal convolution looks 2 frames back at the rate of its level. A latent frame more
        than this after the last change of a still video repeats its predecessor exactly.
        """
        stride, total = 1, 2
        for temporal in (*self.temporal_downsample, False):
            total += self.num_res_blocks * 4 * stride + 2 * stride * temporal
            stride *= 1 + temporal
        return total + 10 * stride


def frame_groups(chunks: Iterable[Tensor], config: VAEConfig, chunk: int) -> Iterator[Tensor]:
    """Yields a video cut for the encoder: one frame, then groups of 4 * chunk.

    Args:
        chunks: tensors [B, 3, n, H, W].
        config: of the VAE.
        chunk: latent frames per group, 1 or more; the last group may hold fewer.

    Raises:
        InvalidRequest: when a shape or chunk does not fit, or there is no frame.
    """
    if chunk < 1:
        refuse("chunk", chunk, "1 or more")
    pending: list[Tensor] = []
    missing, first = 1, True
    size: tuple[int, ...] = ()
    for frames in chunks:
        _check_video(frames, config.spatial_stride)
        size = size or (frames.shape[0], *frames.shape[3:])
        if (frames.shape[0], *frames.shape[3:]) != size:
            refuse("video", tuple(frames.shape), f"B, H and W as in the pieces before, {size}")
        while frames.shape[2]:
            part, frames = frames[:, :, :missing], frames[:, :, missing:]
            pending.append(part)
            missing -= part.shape[2]
            if not missing:
                yield torch.cat(pending, dim=2)
                pending, missing, first = [], config.temporal_stride * chunk, False
    if first:
        refuse("video", "no frames", "one frame or more")
    rest = config.temporal_stride * chunk - missing
    if usable := rest - rest % config.temporal_stride:
        yield torch.cat(pending, dim=2)[:, :, :usable]


def check_latents(latents: Tensor, config: VAEConfig, chunk: int) -> None:
    """Refuses latents that the decoder cannot take.

    Args:
        latents: [B, z, T, h, w].
        config: of the VAE.
        chunk: latent frames at a time, 1 or more.

    Raises:
        InvalidRequest: when the shape or chunk does not fit.
    """
    if chunk < 1:
        refuse("chunk", chunk, "1 or more")
    if latents.ndim != 5 or latents.shape[1] != config.z_dim or not latents.numel():
        refuse("latents", tuple(latents.shape), f"[B, {config.z_dim}, T, h, w], none of them 0")


def latent_groups(latents: Tensor, chunk: int) -> list[Tensor]:
    """Returns latents [B, z, T, h, w] cut for the decoder: one frame, then `chunk` at a time."""
    rest = latents[:, :, 1:]
    return [latents[:, :, :1], *(torch.split(rest, chunk, dim=2) if rest.shape[2] else ())]


def count_levels(shapes: Mapping[str, tuple[int, ...]], dim: int, z_dim: int) -> VAEConfig:
    """Returns the config that the encoder's list of blocks spells out.

    Args:
        shapes: tensor name -> shape, original names.
        dim: channels of the first level.
        z_dim: latent channels.

    Raises:
        WeightsError: when no VAE has such levels.
    """
    levels: list[list[int]] = [[]]
    temporal: list[bool] = []
    for index in count():
        block = f"encoder.downsamples.{index}"
        if f"{block}.residual.6.weight" in shapes:
            levels[-1].append(shapes[f"{block}.residual.6.weight"][0])
        elif f"{block}.resample.1.weight" in shapes:
            temporal.append(f"{block}.time_conv.weight" in shapes)
            levels.append([])
        else:
            break
    try:
        return VAEConfig(
            dim=dim,
            z_dim=z_dim,
            dim_mult=tuple(widths[-1] // dim if widths else 0 for widths in levels),
            num_res_blocks=len(levels[0]),
            temporal_downsample=tuple(temporal),
        )
    except InvalidRequest as error:
        raise WeightsError(f"vae: {error.message}", field="vae") from error


def _check_video(video: Tensor, cell: int) -> None:
    fits = video.ndim == 5 and video.shape[1] == 3
    if not fits or any(side % cell or not side for side in video.shape[3:]):
        refuse("video", tuple(video.shape), f"[B, 3, F, H, W], H and W multiples of {cell}")


def refuse(field: str, value: object, allowed: str) -> NoReturn:
    """Raises InvalidRequest for a field."""
    raise InvalidRequest(f"{field} is {value}; allowed: {allowed}.", field=field)

"""Between pictures and latents: what every recipe does with the VAE, a few frames at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from xicon_infer.models.vae import WanVAE
from xicon_infer.models.vae_tiling import TileOptions, iter_tiled_decode
from xicon_infer.ops.pixels import frames_to_model, model_to_frames
from xicon_infer.types import (
    SPATIAL_STRIDE,
    TEMPORAL_STRIDE,
    Progress,
    UInt8Array,
    pixel_frames,
)

PIECE_PIXELS = 2**19
"""Pixels of one frame times latent frames handled at once: more is faster and takes more memory.
Above half of it, frames are handled one latent frame at a time."""

MAX_PIECE = 4
"""Most latent frames handled at once."""


def encode_frames(
    vae: WanVAE, frames: UInt8Array, progress: Progress, most: int = MAX_PIECE
) -> Tensor:
    """Returns normalised latents float32 [1, 16, T, H / 8, W / 8] of frames uint8 [F, H, W, 3].

    Args:
        vae: the model.
        frames: of the video.
        progress: told of finished frames.
        most: latent frames at once, where memory is short.
    """
    weight = vae.conv2.weight
    piece = min(most, piece_length(frames.shape[1], frames.shape[2]))
    size = piece * TEMPORAL_STRIDE

    def chunks() -> Iterator[Tensor]:
        for start in range(0, len(frames), size):
            part = frames[start : start + size]
            yield frames_to_model(part, device=weight.device, dtype=weight.dtype)
            progress.step(min(start + size, len(frames)), len(frames), "frame")

    return vae.normalize(vae.encode_chunks(chunks(), chunk=piece)).float()


def piece_length(height: int, width: int) -> int:
    """Returns how many latent frames of pictures of that size the VAE handles at once.

    Small pictures do not fill the machine one latent frame at a time. The result is the same.
    """
    return max(1, min(MAX_PIECE, PIECE_PIXELS // (height * width)))


def decode_frames(
    vae: WanVAE,
    latents: Tensor,
    *,
    tiles: TileOptions | None,
    looped: bool,
    progress: Progress,
    most: int = MAX_PIECE,
) -> UInt8Array:
    """Returns the frames uint8 [F, H, W, 3] of normalised latents [1, 16, T, h, w].

    Args:
        vae: the model.
        latents: T latent frames give F = 4 (T - 1) + 1 pixel frames.
        tiles: decode in tiles, None for whole frames.
        looped: decode once more around the seam of a loop; F is then 4 T, because the first
            latent frame stands for four pixel frames like any other.
        progress: told of finished frames.
        most: latent frames at once, where memory is short.

    Source: rookiestar28/ComfyUI-WanVideoWrapper: nodes.py, WanVideoDecode. Differs from it:
        the frames around the seam are not stretched to their own brightest and darkest pixel.
    """
    frames = _decode(vae, latents, tiles, progress, most)
    if not looped:
        return frames
    seam = torch.cat((latents[:, :, -3:], latents[:, :, :2]), dim=2)
    return np.concatenate((_decode(vae, seam, tiles, progress, most)[9:], frames[5:]))


def _decode(
    vae: WanVAE, latents: Tensor, tiles: TileOptions | None, progress: Progress, most: int
) -> UInt8Array:
    raw = vae.denormalize(latents)
    total = pixel_frames(latents.shape[2])
    height, width = (side * SPATIAL_STRIDE for side in latents.shape[3:])
    chunk = min(most, piece_length(height, width))
    if tiles is None:
        pieces = vae.iter_decode(raw, chunk=chunk)
    else:
        pieces = iter_tiled_decode(vae, raw, tiles, chunk=chunk)
    frames = np.empty((total, height, width, 3), np.uint8)
    done = 0
    for piece in pieces:
        part = model_to_frames(piece)
        frames[done : done + len(part)] = part
        done += len(part)
        progress.step(done, total, "frame")
    return frames

"""Between pictures and latents: what every recipe does with the VAE, a few frames at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from pipelines.frame_stream import Use, stream_frames
from xicon_infer.models.tiny_decoder import TinyDecoder
from xicon_infer.models.vae import WanVAE
from xicon_infer.models.vae_tiling import TileOptions, iter_tiled_decode
from xicon_infer.ops.pixels import frames_to_model
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
    vae: WanVAE, frames: UInt8Array, progress: Progress, piece: int | None = None
) -> Tensor:
    """Returns normalised latents float32 [1, 16, T, H / 8, W / 8] of frames uint8 [F, H, W, 3].

    Args:
        vae: the model.
        frames: of the video.
        progress: told of finished frames.
        piece: latent frames at once; None for what `piece_length` says.
    """
    weight = vae.conv2.weight
    piece = piece or piece_length(frames.shape[1], frames.shape[2])
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
    decoder: WanVAE | TinyDecoder,
    latents: Tensor,
    *,
    tiles: TileOptions | None,
    looped: bool,
    progress: Progress,
    piece: int | None = None,
    use: Use | None = None,
) -> UInt8Array:
    """Returns the frames uint8 [F, H, W, 3] of normalised latents [1, 16, T, h, w].

    Args:
        decoder: the VAE, or the small one for drafts.
        latents: T latent frames give F = 4 (T - 1) + 1 pixel frames.
        tiles: decode in tiles, None for whole frames; the small decoder has none.
        looped: decode once more around the seam of a loop; F is then 4 T, because the first
            latent frame stands for four pixel frames like any other.
        progress: told of finished frames.
        piece: latent frames at once; None for what `piece_length` says.
        use: gets the frames in another thread while later ones are decoded; those of a loop at
            once, for its first frames are made last.

    Source: rookiestar28/ComfyUI-WanVideoWrapper: nodes.py, WanVideoDecode. Differs from it:
        the frames around the seam are not stretched to their own brightest and darkest pixel.
    """
    height, width = (side * SPATIAL_STRIDE for side in latents.shape[3:])
    chunk = piece or piece_length(height, width)

    def decode(part: Tensor, use: Use | None) -> UInt8Array:
        frames = np.empty((pixel_frames(part.shape[2]), height, width, 3), np.uint8)
        pieces = decoded_pieces(decoder, part, tiles, chunk)
        stream_frames(pieces, frames, progress=progress, use=use)
        return frames

    if not looped:
        return decode(latents, use)
    frames = decode(latents, None)
    seam = decode(torch.cat((latents[:, :, -3:], latents[:, :, :2]), dim=2), None)
    frames = np.concatenate((seam[9:], frames[5:]))
    if use is not None:
        use(iter((frames,)))
    return frames


def decoded_pieces(
    decoder: WanVAE | TinyDecoder, latents: Tensor, tiles: TileOptions | None, chunk: int
) -> Iterator[Tensor]:
    """Returns the decoded pieces [1, 3, n, H, W] of normalised latents, made as they are asked for.

    Args:
        decoder: as in `decode_frames`.
        latents: [1, 16, T, h, w].
        tiles: as in `decode_frames`.
        chunk: latent frames at a time.
    """
    if isinstance(decoder, TinyDecoder):
        return decoder.iter_decode(latents, chunk=chunk)
    raw = decoder.denormalize(latents)
    if tiles is None:
        return decoder.iter_decode(raw, chunk=chunk)
    return iter_tiled_decode(decoder, raw, tiles, chunk=chunk)


def tell_windows(progress: Progress) -> Callable[[int, int], None]:
    """Returns what tells (windows done, windows) of a sampling step."""
    return lambda done, total: progress.step(done, total, "window")

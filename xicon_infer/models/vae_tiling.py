"""The video VAE in overlapping tiles, blended as ComfyUI-WanVideoWrapper does.

For parity with graphs that turn tiling on, and for memory: the untiled VAE streams over time
already and is faster. Tiles stream over time too: each has its own `State`, every step of the video
runs all tiles and blends them, so memory does not grow with the number of frames.

B batch, T latent frames, F pixel frames, h w latent cells, z latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from xicon_infer.models.vae import WanVAE, join_frames
from xicon_infer.models.vae_config import check_latents, frame_groups, latent_groups, refuse
from xicon_infer.models.vae_layers import Scratch, State
from xicon_infer.types import SPATIAL_STRIDE


@dataclass(frozen=True)
class TileOptions:
    """Size and distance of the tiles, in latent cells; the defaults are the graphs' values.

    height, width: of a tile, 2 or more. stride_height, stride_width: from one tile to the next,
    smaller than the tile; the difference is blended.

    Raises:
        InvalidRequest: when a stride is not between 1 and the tile size - 1.
    """

    height: int = 34
    width: int = 34
    stride_height: int = 18
    stride_width: int = 16

    def __post_init__(self) -> None:
        for size, stride in zip(fields(self)[:2], fields(self)[2:], strict=True):
            most = getattr(self, size.name) - 1
            if not 1 <= getattr(self, stride.name) <= most:
                allowed = f"1 to {most} cells (below the tile's {size.name})"
                refuse(stride.name, getattr(self, stride.name), allowed)

    @classmethod
    def from_pixels(cls, tile_x: int, tile_y: int, stride_x: int, stride_y: int) -> TileOptions:
        """Returns the tiles that a WanVideoDecode node with these pixel values uses.

        The node's x values act on the HEIGHT and its y values on the WIDTH: it passes (x, y) where
        the VAE unpacks (height, width).

        Args:
            tile_x: node input `tile_x`, pixels; divided by 8, rounded down, as the others.
            tile_y: node input `tile_y`.
            stride_x: node input `tile_stride_x`.
            stride_y: node input `tile_stride_y`.

        Raises:
            InvalidRequest: as the class.

        Source: rookiestar28/ComfyUI-WanVideoWrapper: nodes.py, WanVideoDecode.
        """
        cells = (value // SPATIAL_STRIDE for value in (tile_x, tile_y, stride_x, stride_y))
        return cls(*cells)


@dataclass
class _Tile:
    """One tile: where it is read, where it is written, its share of each cell, its memory."""

    source: tuple[slice, slice]
    target: tuple[slice, slice]
    share: Tensor
    state: State


def tiled_decode(vae: WanVAE, latents: Tensor, tiles: TileOptions, *, chunk: int = 1) -> Tensor:
    """Returns the whole video of raw latents, decoded in tiles.

    Args:
        vae: the model.
        latents: [B, z, T, h, w], raw (denormalised).
        tiles: their size.
        chunk: latent frames decoded at a time after the first.

    Returns:
        [B, 3, F, 8h, 8w], clamped to [-1, 1], unlike `WanVAE.decode`.

    Raises:
        InvalidRequest: when the shape or chunk does not fit.
    """
    num_frames = vae.config.temporal_stride * (latents.shape[2] - 1) + 1
    return join_frames(iter_tiled_decode(vae, latents, tiles, chunk=chunk), num_frames)


def iter_tiled_decode(
    vae: WanVAE, latents: Tensor, tiles: TileOptions, *, chunk: int = 1
) -> Iterator[Tensor]:
    """Yields the video of `tiled_decode` piece by piece.

    The remembered frames of all tiles stay on the device: together they are as many times larger
    than untiled as the tiles' summed area is larger than the picture.

    Args:
        vae: the model.
        latents: [B, z, T, h, w], raw.
        tiles: their size.
        chunk: latent frames per piece after the first piece, which is one pixel frame.

    Raises:
        InvalidRequest: at once, when the shape or chunk does not fit.

    Source: rookiestar28/ComfyUI-WanVideoWrapper: wanvideo/wan_video_vae.py, tiled_decode. Differs:
    summed in float32, not in the dtype of the VAE.
    """
    check_latents(latents, vae.config, chunk)
    plan = _plan(vae, latents.shape[3:], tiles, (1, vae.config.spatial_stride))
    parts = latent_groups(vae.embed(latents), chunk)
    return (_blend(vae.decode_step, part, plan).clamp_(-1, 1) for part in parts)


def tiled_encode(vae: WanVAE, video: Tensor, tiles: TileOptions, *, chunk: int = 1) -> Tensor:
    """Returns the raw latent mean of a video, encoded in tiles.

    Args:
        vae: the model.
        video: [B, 3, F, H, W] in [-1, 1]; H and W multiples of 8.
        tiles: their size.
        chunk: latent frames made at a time.

    Returns:
        [B, z, T, h, w].

    Raises:
        InvalidRequest: when the shape or chunk does not fit.
    """
    return tiled_encode_chunks(vae, [video], tiles, chunk=chunk)


def tiled_encode_chunks(
    vae: WanVAE, chunks: Iterable[Tensor], tiles: TileOptions, *, chunk: int = 1
) -> Tensor:
    """Returns the raw latent mean of a video that arrives in pieces, encoded in tiles.

    Args:
        vae: the model.
        chunks: tensors [B, 3, n, H, W] in [-1, 1], n of any size.
        tiles: their size.
        chunk: latent frames made at a time.

    Returns:
        [B, z, T, h, w].

    Raises:
        InvalidRequest: when a shape or chunk does not fit, or there is no frame.

    Source: rookiestar28/ComfyUI-WanVideoWrapper: wanvideo/wan_video_vae.py, tiled_encode.
    """
    plan: list[_Tile] = []
    latents = []
    cell = vae.config.spatial_stride
    for frames in frame_groups(chunks, vae.config, chunk):
        if not plan:
            cells = (frames.shape[3] // cell, frames.shape[4] // cell)
            plan = _plan(vae, cells, tiles, (cell, 1))
        latents.append(_blend(vae.encode_step, frames, plan))
    return torch.cat(latents, dim=2).contiguous()


def spans(length: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Returns the (start, stop) of the tiles along one axis; the last may be shorter.

    Args:
        length: of the axis, cells.
        size: of a tile.
        stride: from one start to the next.
    """
    # A tile is left out when the one before it reaches the end already.
    starts = [s for s in range(0, length, stride) if s == 0 or s - stride + size < length]
    return [(start, min(start + size, length)) for start in starts]


def _plan(
    vae: WanVAE, cells: Iterable[int], tiles: TileOptions, scales: tuple[int, int]
) -> list[_Tile]:
    """Returns the tiles of a picture.

    Args:
        vae: the model.
        cells: (h, w) of the picture.
        tiles: their size.
        scales: input and output pixels per cell.
    """
    height, width = cells
    into, out = scales
    rows = spans(height, tiles.height, tiles.stride_height)
    columns = spans(width, tiles.width, tiles.stride_width)
    row_ramp = (tiles.height - tiles.stride_height) * out
    column_ramp = (tiles.width - tiles.stride_width) * out
    total = torch.zeros(height * out, width * out)
    scratch = Scratch()  # the tiles are computed one after the other
    plan = []
    for row in rows:
        down = _ramps(row, height, out, row_ramp)
        for column in columns:
            across = _ramps(column, width, out, column_ramp)
            target = (_scaled(row, out), _scaled(column, out))
            share = torch.minimum(down[:, None], across[None, :])
            total[target] += share
            source = (_scaled(row, into), _scaled(column, into))
            plan.append(_Tile(source, target, share, vae.begin(scratch)))
    for tile in plan:
        tile.share = (tile.share / total[tile.target]).to(vae.conv2.weight.device)
    return plan


def _ramps(span: tuple[int, int], length: int, scale: int, ramp: int) -> Tensor:
    """Returns the weights along one axis of a tile: 1, falling towards other tiles.

    Args:
        span: (start, stop) of the tile, cells.
        length: of the whole axis, cells.
        scale: weights per cell.
        ramp: weights that a fall takes, down to 1 / ramp.
    """
    start, stop = span
    weights = torch.ones((stop - start) * scale)
    rising = torch.arange(1, ramp + 1) / ramp
    if start > 0:
        weights[:ramp] = rising
    # Where both ramps meet (a stride below half a tile) the far one wins, as in the reference.
    if stop < length:
        weights[-ramp:] = rising.flip(0)
    return weights


def _scaled(span: tuple[int, int], scale: int) -> slice:
    return slice(span[0] * scale, span[1] * scale)


def _blend(step: Callable[[Tensor, State], Tensor], x: Tensor, plan: list[_Tile]) -> Tensor:
    """Returns one step of the whole picture: the tiles' results, weighted and summed."""
    last = plan[-1].target
    out = torch.empty(0)
    dtype = x.dtype
    for tile in plan:
        result = step(x[..., tile.source[0], tile.source[1]], tile.state)
        dtype = result.dtype
        if tile is plan[0]:
            size = (*result.shape[:3], last[0].stop, last[1].stop)
            out = result.new_zeros(size, dtype=torch.promote_types(dtype, torch.float32))
        out[..., tile.target[0], tile.target[1]] += result * tile.share
    return out.to(dtype)

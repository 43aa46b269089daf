"""The work of the Wan VAE in closed form: FLOP, bytes moved and module calls. Pure Python.

The counts are sums over the layers of the network, so they are exact integers for any width and
size. They describe the reference way of running it: decode one latent frame at a time, encode the
first pixel frame alone and then four at a time. One multiply-add counts as two FLOP. The first
chunk is cheaper because nothing is up- or downsampled in time there.

h and w are latent cells (pixels / 8); a level of the network has `area` pixels per cell.

Source: Wan-Video/Wan2.1: wan/modules/vae.py (the layers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SPATIAL_STRIDE = 8
TEMPORAL_STRIDE = 4

_CUBE = 27  # taps of a 3x3x3 convolution
_SQUARE = 9
_TIME = 3


@dataclass(frozen=True)
class VaeShape:
    """Widths of the network: `base` channels times `mult` per level, `z` latent channels."""

    base: int = 96
    z: int = 16
    mult: tuple[int, int, int, int] = (1, 2, 4, 4)
    blocks: int = 2


WAN_VAE = VaeShape()

GREY_FRAMES = 117
"""Frames of a still video after its first picture behind which the encoder repeats itself."""


class Work(NamedTuple):
    """What a set of layers costs.

    macs: multiply-adds of the convolutions. moved: elements read and written by every module on
    its own (nothing fused). weights: parameters read. calls: modules called. cached: elements of
    `moved` that come from the frames kept of the chunk before.
    """

    macs: int
    moved: int
    weights: int
    calls: int
    cached: int = 0


class _Chunk(NamedTuple):
    """One chunk of frames at one level of the network; `cached` more frames come from before."""

    width: int
    height: int
    frames: int
    cached: int = 0

    @property
    def pixels(self) -> int:
        """Pixels of one frame at this level."""
        return self.width * self.height

    def scaled(self, up: int, down: int = 1) -> _Chunk:
        """Returns the same frames with both sides times up / down."""
        return self._replace(width=self.width * up // down, height=self.height * up // down)


def decode_work(
    width: int, height: int, num_frames: int, shape: VaeShape = WAN_VAE
) -> tuple[Work, int]:
    """Returns the work of decoding, and the FLOP of the single-head attention inside it.

    Args:
        width: pixels.
        height: pixels.
        num_frames: F, pixel frames.
        shape: widths of the VAE.
    """
    at = _latents(width, height, num_frames)
    parts = [_pointwise(at, shape.z, shape.z)]
    parts += [work for index in range(at.frames) for work in _decoder(shape, at, index)]
    return _total(parts), _attention_flops(shape, at)


def encode_work(
    width: int, height: int, num_frames: int, shape: VaeShape = WAN_VAE
) -> tuple[Work, int]:
    """Returns the work of encoding, and the FLOP of the attention inside it; see `decode_work`."""
    at = _latents(width, height, num_frames)
    parts = [_pointwise(at, 2 * shape.z, 2 * shape.z)]
    parts += [work for index in range(at.frames) for work in _encoder(shape, at, index)]
    return _total(parts), _attention_flops(shape, at)


def decode_flops(width: int, height: int, num_frames: int, shape: VaeShape = WAN_VAE) -> int:
    """Returns the FLOP of decoding F pixel frames of width x height pixels."""
    work, attention = decode_work(width, height, num_frames, shape)
    return 2 * work.macs + attention


def encode_flops(width: int, height: int, num_frames: int, shape: VaeShape = WAN_VAE) -> int:
    """Returns the FLOP of encoding F pixel frames of width x height pixels."""
    work, attention = encode_work(width, height, num_frames, shape)
    return 2 * work.macs + attention


def parameters(shape: VaeShape = WAN_VAE) -> int:
    """Returns the number of parameters of encoder, decoder and the two latent projections."""
    cell = _Chunk(1, 1, 1)
    # The first chunk skips the layers that change the frame rate; the second runs every layer.
    layers = _decoder(shape, cell, 1) + _encoder(shape, cell, 1)
    layers += [_pointwise(cell, shape.z, shape.z), _pointwise(cell, 2 * shape.z, 2 * shape.z)]
    return _total(layers).weights


def decode_bytes(
    width: int, height: int, num_frames: int, shape: VaeShape = WAN_VAE, element_bytes: int = 2
) -> int:
    """Returns the device memory of decoding beside the weights: caches, one layer, all frames.

    Args:
        width: pixels (of one tile, if tiled).
        height: pixels.
        num_frames: F, pixel frames.
        shape: widths of the VAE.
        element_bytes: 2 for half precision, 4 for float32.
    """
    at = _latents(width, height, num_frames)
    layers = _decoder(shape, at, min(at.frames - 1, 2))
    return (_alive(layers) + 3 * width * height * num_frames) * element_bytes


def encode_bytes(
    width: int, height: int, num_frames: int, shape: VaeShape = WAN_VAE, element_bytes: int = 2
) -> int:
    """Returns the device memory of encoding beside the weights; arguments as `decode_bytes`."""
    at = _latents(width, height, num_frames)
    layers = _encoder(shape, at, min(at.frames - 1, 2))
    return (_alive(layers) + 3 * width * height * num_frames) * element_bytes


def _alive(layers: list[Work]) -> int:
    """Returns the elements alive at the worst layer: all caches, its input and its output."""
    return _total(layers).cached + max(part.moved for part in layers if part.calls == 1)


def tile_spans(size: int, tile: int, stride: int) -> list[tuple[int, int]]:
    """Returns (start, end) of each tile along one side, in the unit of the arguments.

    A tile starts every `stride` until one has reached the end. Source:
    rookiestar28/ComfyUI-WanVideoWrapper: wanvideo/wan_video_vae.py.
    """
    spans = []
    for start in range(0, size, stride):
        if start >= stride and start - stride + tile >= size:
            break
        spans.append((start, min(start + tile, size)))
    return spans


def _latents(width: int, height: int, num_frames: int) -> _Chunk:
    frames = (num_frames - 1) // TEMPORAL_STRIDE + 1
    return _Chunk(width // SPATIAL_STRIDE, height // SPATIAL_STRIDE, frames)


def _total(parts: list[Work]) -> Work:
    columns = zip(*parts, strict=True)
    return Work(*(sum(column) for column in columns))


def _attention_flops(shape: VaeShape, at: _Chunk) -> int:
    """Returns the FLOP of q k^T and of the weighted sum: one head, over each latent frame."""
    return 4 * shape.base * shape.mult[-1] * at.pixels**2 * at.frames


def _conv(at: _Chunk, channels: tuple[int, int], taps: int, reads: int | None = None) -> Work:
    """Returns a convolution with `at.pixels` x `at.frames` outputs; `reads`: elements it reads."""
    c_in, c_out = channels
    outputs = at.pixels * at.frames
    cached = c_in * at.pixels * at.cached if reads is None else 0
    if reads is None:
        reads = c_in * outputs + cached
    weights = c_in * c_out * taps + c_out
    return Work(c_in * c_out * taps * outputs, reads + c_out * outputs, weights, 1, cached)


def _pointwise(at: _Chunk, c_in: int, c_out: int) -> Work:
    return _conv(at, (c_in, c_out), 1, c_in * at.pixels * at.frames)


def _light(at: _Chunk, channels: int, calls: int, gammas: int = 0) -> Work:
    """Returns `calls` modules that only read and write: norm, SiLU, dropout, identity."""
    elements = channels * at.pixels * at.frames
    return Work(0, 2 * elements * calls, channels * gammas, calls)


def _resnet(at: _Chunk, c_in: int, c_out: int) -> list[Work]:
    shortcut = _light(at, c_in, 1) if c_in == c_out else _pointwise(at, c_in, c_out)
    return [
        shortcut,
        _light(at, c_in, 2, gammas=1),
        _conv(at, (c_in, c_out), _CUBE),
        _light(at, c_out, 3, gammas=1),
        _conv(at, (c_out, c_out), _CUBE),
    ]


def _middle(at: _Chunk, channels: int) -> list[Work]:
    attention = [
        _light(at, channels, 1, gammas=1),
        _pointwise(at, channels, 3 * channels),
        _pointwise(at, channels, channels),
    ]
    return _resnet(at, channels, channels) + attention + _resnet(at, channels, channels)


def _decoder(shape: VaeShape, latents: _Chunk, index: int) -> list[Work]:
    """Returns the layers of the decoder for chunk `index` (one latent frame)."""
    widths = [shape.base * m for m in reversed(shape.mult)]
    at = latents._replace(frames=1, cached=min(index, 2))
    parts = [_conv(at, (shape.z, widths[0]), _CUBE), *_middle(at, widths[0])]
    channels = widths[0]
    for level, width in enumerate(widths):
        parts += _resnet(at, channels, width)
        for _ in range(shape.blocks):
            parts += _resnet(at, width, width)
        if level == len(widths) - 1:
            break
        if level < 2 and index > 0:
            # The second chunk gets a marker instead of the cache, so it reads no cached frame.
            cache = at._replace(cached=0 if index == 1 else 2)
            parts.append(_conv(cache, (width, 2 * width), _TIME))
            at = at._replace(frames=2 * at.frames)
        # A level that doubles the picture also halves the channels.
        wide = at.scaled(2)
        upsample = Work(0, width * at.frames * (at.pixels + wide.pixels), 0, 1)
        channels = width // 2
        reads = width * wide.pixels * wide.frames
        parts += [upsample, _conv(wide, (width, channels), _SQUARE, reads)]
        at = wide
    parts += [_light(at, channels, 2, gammas=1), _conv(at, (channels, 3), _CUBE)]
    return parts


def _encoder(shape: VaeShape, latents: _Chunk, index: int) -> list[Work]:
    """Returns the layers of the encoder for chunk `index` (one pixel frame, then four each)."""
    widths = [shape.base * m for m in shape.mult]
    at = latents.scaled(SPATIAL_STRIDE)._replace(frames=4 if index else 1, cached=min(index, 2))
    channels = widths[0]
    parts = [_conv(at, (3, channels), _CUBE)]
    for level, width in enumerate(widths):
        parts += _resnet(at, channels, width)
        for _ in range(shape.blocks - 1):
            parts += _resnet(at, width, width)
        channels = width
        if level == len(widths) - 1:
            break
        padded = width * (at.width + 1) * (at.height + 1) * at.frames
        pad = Work(0, width * at.pixels * at.frames + padded, 0, 1)
        at = at.scaled(1, 2)
        parts += [pad, _conv(at, (width, width), _SQUARE, padded)]
        if level > 0 and index > 0:
            reads = width * at.pixels * (at.frames + 1)
            at = at._replace(frames=at.frames // 2)
            parts.append(_conv(at, (width, width), _TIME, reads))
    parts += _middle(at, channels)
    parts += [_light(at, channels, 2, gammas=1), _conv(at, (channels, 2 * shape.z), _CUBE)]
    return parts

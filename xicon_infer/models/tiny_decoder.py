"""A small decoder of Wan2.1 latents for drafts: about a twentieth of the VAE's work.

The decoder of TAEHV ("taew2_1"): convolutions on single frames, with memory of one frame in each
block, and no attention. It was trained to imitate the VAE; pictures are softer and fine detail
differs. It takes the latents as the transformer makes them, normalised, and nothing is encoded
with it.

B batch, T latent frames, F pixel frames, h w latent cells, H W pixels, C channels. Activations are
[B * T, C, H, W]. Parameter names are those of the published file, so that it loads as it is; its
encoder is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.types import LATENT_CHANNELS, TEMPORAL_STRIDE

_BLOCKS = 3
"""Blocks with memory at each of the three widths that have them."""


@dataclass(frozen=True)
class TinyDecoderConfig:
    """The sizes; the defaults are the published model.

    widths: channels at 1, 2, 4 and 8 pixels per latent cell. z_dim: latent channels.
    """

    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    z_dim: int = LATENT_CHANNELS


class MemoryBlock(nn.Module):
    """relu(x + convolutions of [x | the frame before]).

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Indices 1 and 3 (activations) hold no parameters; they keep the names right.
        self.conv = nn.Sequential(
            _conv(2 * channels, channels),
            nn.ReLU(inplace=True),
            _conv(channels, channels),
            nn.ReLU(inplace=True),
            _conv(channels, channels),
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Returns [N, C, H, W] for x of the same shape; `before`: each frame's predecessor."""
        return F.relu_(self.conv(torch.cat((x, before), dim=1)) + x)


class Grow(nn.Module):
    """Makes `stride` frames of each.

    Args:
        channels: C.
        stride: 1 or 2.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [N * stride, C, H, W] for x [N, C, H, W]."""
        return self.conv(x).reshape(-1, *x.shape[1:])


class TinyDecoder(nn.Module):
    """Latents to pixels, streaming over time.

    Args:
        config: the sizes.

    Source: madebyollin/taehv: taehv.py (layers and names).
    """

    def __init__(self, config: TinyDecoderConfig | None = None) -> None:
        super().__init__()
        self.config = config or TinyDecoderConfig()
        first, *_ = widths = self.config.widths
        # Index 0 bounds the latents and holds no parameters, like every activation and doubling.
        layers: list[nn.Module] = [nn.Identity(), _conv(self.config.z_dim, first), nn.ReLU()]
        for width, following, stride in zip(widths, widths[1:], (1, 2, 2), strict=False):
            layers += [MemoryBlock(width) for _ in range(_BLOCKS)]
            layers += [nn.Upsample(scale_factor=2), Grow(width, stride)]
            layers.append(_conv(width, following, bias=False))
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(widths[-1], 3))

    def iter_decode(self, latents: Tensor, *, chunk: int = 1) -> Iterator[Tensor]:
        """Yields the video piece by piece; memory does not grow with its length.

        Args:
            latents: [B, z, T, h, w], normalised, any float type and device.
            chunk: latent frames at a time after the first; the result does not depend on it.

        Returns:
            Pieces [B, 3, n, 8h, 8w] in [-1, 1], 4 (T - 1) + 1 frames in all: the three frames that
            the first latent frame would add in front are left out, as the VAE has none for them.

        Raises:
            InvalidRequest: at once, when the shape or chunk does not fit.
        """
        if chunk < 1:
            raise InvalidRequest(f"chunk is {chunk}; allowed: 1 or more.", field="chunk")
        if latents.ndim != 5 or latents.shape[1] != self.config.z_dim or not latents.numel():
            raise InvalidRequest(
                f"latents is {tuple(latents.shape)}; allowed: [B, {self.config.z_dim}, T, h, w], "
                "none of them 0.",
                field="latents",
            )
        return self._pieces(latents, chunk)

    def _pieces(self, latents: Tensor, chunk: int) -> Iterator[Tensor]:
        memory: dict[int, Tensor] = {}
        for start in range(0, latents.shape[2], chunk):
            frames = self.decode_step(latents[:, :, start : start + chunk], memory)
            yield frames if start else frames[:, :, TEMPORAL_STRIDE - 1 :]

    @torch.no_grad()
    def decode_step(self, latents: Tensor, memory: dict[int, Tensor]) -> Tensor:
        """Returns the pixels of the next latent frames of one video, [B, 3, 4n, 8h, 8w].

        Args:
            latents: [B, z, n, h, w].
            memory: layer -> the last frame it saw, [B, C, H, W]; {} before the video. Changed.
        """
        batch = latents.shape[0]
        weight = next(self.parameters())
        x = latents.to(weight.device, weight.dtype).movedim(2, 1).flatten(0, 1)
        # Latents beyond 3 are rare, and the model was trained with them bent back.
        x = torch.tanh(x / 3) * 3
        for index, layer in enumerate(self.decoder):
            if isinstance(layer, MemoryBlock):
                x = layer(x, _before(x, batch, memory, index))
            elif isinstance(layer, Grow):
                # A product of single pixels is the same before doubling, at a quarter of the work.
                x = F.interpolate(layer(x), scale_factor=2)
            elif not isinstance(layer, nn.Upsample):
                x = layer(x)
        video = x.reshape(batch, -1, *x.shape[1:]).movedim(1, 2)
        return video.clamp_(0, 1).mul_(2).sub_(1)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> TinyDecoderConfig:
    """Returns the sizes of the decoder that a checkpoint holds.

    Args:
        shapes: tensor name -> shape; those of the encoder are not judged.

    Raises:
        WeightsError: it is another model, or its shapes do not fit together.
    """
    names = ("decoder.1.weight", *(f"decoder.{index}.weight" for index in (8, 14, 20)))
    found = [shapes.get(name, ()) for name in names]
    if any(len(shape) != 4 for shape in found):
        some = ", ".join(sorted(shapes)[:3]) or "nothing"
        raise WeightsError(
            f"preview: the file lacks {names[0]} or {names[-1]}; it holds {some}. Wanted is a "
            "TAEHV model for Wan2.1 (taew2_1.pth or taew2_1.safetensors).",
            field="decoder",
        )
    first, second, third, last = (shape[0] for shape in found)
    config = TinyDecoderConfig((first, second, third, last), found[0][1])
    with torch.device("meta"):
        expected = {n: tuple(p.shape) for n, p in TinyDecoder(config).state_dict().items()}
    wrong = [name for name, shape in expected.items() if tuple(shapes.get(name, ())) != shape]
    if wrong:
        raise WeightsError(
            f"preview: {len(wrong)} tensors do not fit {config}; the first is {wrong[0]} with "
            f"shape {shapes.get(wrong[0], 'missing')} instead of {expected[wrong[0]]}. Use "
            "taew2_1, the model for Wan2.1; those for other video models have other shapes.",
            field="decoder",
        )
    if config.z_dim != LATENT_CHANNELS:
        raise WeightsError(
            f"preview: the file decodes latents of {config.z_dim} channels, Wan2.1 has "
            f"{LATENT_CHANNELS}; use taew2_1",
            field="decoder",
        )
    return config


def decoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the decoder's tensors of a published file, which also holds an encoder.

    A file whose first growing layer makes two frames keeps the later one, as its authors do.
    """
    found = {name: value for name, value in state.items() if name.startswith("decoder.")}
    grow = found.get("decoder.7.conv.weight")
    if grow is not None and grow.ndim == 4 and grow.shape[0] > grow.shape[1]:
        found["decoder.7.conv.weight"] = grow[-grow.shape[1] :]
    return found


def _conv(channels: int, out_channels: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1, bias=bias)


def _before(x: Tensor, batch: int, memory: dict[int, Tensor], index: int) -> Tensor:
    """Returns each frame's predecessor, zeros before the first, and remembers the last frame."""
    frames = x.reshape(batch, -1, *x.shape[1:])
    last = memory.get(index)
    first = torch.zeros_like(frames[:, 0]) if last is None else last
    memory[index] = frames[:, -1].clone()
    return torch.cat((first[:, None], frames[:, :-1]), dim=1).flatten(0, 1)

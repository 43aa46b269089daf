"""The Wan2.1 video VAE: pixels to latents and back, streaming over time.

B batch, F pixel frames, T latent frames, H W pixels, h w latent cells (H/8, W/8), z latent
channels (16). It does not read files, rename keys, convert uint8 (`ops.pixels`) or tile
(`models.vae_tiling`).

An own class rather than diffusers' `AutoencoderKLWan`, because that one returns the whole video at
once, decodes one latent frame at a time only, and costs 2.6 s of import. Parameter names are the
original ones, so official checkpoints load as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from xicon_infer.errors import BackendUnavailable, WeightsError
from xicon_infer.models.vae_config import (
    LATENT_MEANS,
    LATENT_STDS,
    VAEConfig,
    check_latents,
    count_levels,
    frame_groups,
    latent_groups,
    refuse,
)
from xicon_infer.models.vae_layers import CausalConv3d, Scratch, State, pointwise
from xicon_infer.models.vae_networks import Decoder, Encoder
from xicon_infer.ops.vae_kernels import MAX_CHANNELS, why_not_fused

Kernels = Literal["auto", "eager", "triton"]

__all__ = ["VAEConfig", "WanVAE", "config_from_shapes", "join_frames"]


class WanVAE(nn.Module):
    """The video VAE; only the mean of the posterior is used, nothing is sampled.

    Args:
        config: the sizes.
        means: z numbers; None for the published ones (z = 16) or zeros (other z).
        stds: z numbers; None for the published ones or ones.
        fast: the order of computation, see `vae_layers`; False reproduces the reference bit for
            bit on a CPU.
        kernels: what the fast order runs between convolutions: "triton" the kernels of
            `ops.vae_kernels`, "eager" plain operations, "auto" the kernels on a GPU where they
            agree with the plain operations.

    Raises:
        InvalidRequest: when means or stds are not z numbers.

    Source: Wan-Video/Wan2.1: wan/modules/vae.py.
    """

    def __init__(
        self,
        config: VAEConfig | None = None,
        *,
        means: Iterable[float] | None = None,
        stds: Iterable[float] | None = None,
        fast: bool = True,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__()
        self.config = config or VAEConfig()
        z_dim = self.config.z_dim
        known = z_dim == len(LATENT_MEANS)
        self.means = (LATENT_MEANS if known else (0.0,) * z_dim) if means is None else tuple(means)
        self.stds = (LATENT_STDS if known else (1.0,) * z_dim) if stds is None else tuple(stds)
        for name, values in (("means", self.means), ("stds", self.stds)):
            if len(values) != z_dim:
                refuse(name, values, f"{z_dim} numbers, one per latent channel")
        self.fast, self.kernels = fast, kernels
        self.encoder = Encoder(self.config)
        self.conv1 = nn.Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(self.config)

    def begin(self, scratch: Scratch | None = None) -> State:
        """Returns the state of a new video, for `encode_step` or `decode_step` (not for both).

        Args:
            scratch: shared with other videos, if they are never computed at the same time.

        Raises:
            BackendUnavailable: kernels "triton" do not run here; says why.
        """
        fused = self.fast and not self.why_not_fused()
        return State(fast=self.fast, fused=fused, scratch=scratch or Scratch())

    def why_not_fused(self, device: torch.device | None = None) -> str:
        """Returns "" if the fast order runs kernels of its own, else why it does not.

        Args:
            device: where it will run; None for where the weights are.

        Raises:
            BackendUnavailable: as in `begin`.
        """
        device, dtype = device or self.conv2.weight.device, self.conv2.weight.dtype
        if self.kernels == "eager":
            return "plain operations were asked for"
        if self.kernels == "auto" and device.type != "cuda":
            return "needs a CUDA device"
        if max(self.config.widths) > MAX_CHANNELS:
            reason = f"the kernels take {MAX_CHANNELS} channels, the model has more"
        else:
            reason = why_not_fused(device, dtype)
        if reason and self.kernels == "triton":
            raise BackendUnavailable(
                f"kernels 'triton' do not run in the VAE on {device}: {reason}; use 'auto'",
                field="kernels",
            )
        return reason

    def to_channels_last(self) -> WanVAE:
        """Stores the convolution weights in the layout of the activations; returns self.

        Results stay the same up to rounding; it saves converting the weights in every call.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
            elif isinstance(module, (CausalConv3d, nn.Conv3d)):
                module.to(memory_format=torch.channels_last_3d)
        return self

    def normalize(self, mu: Tensor) -> Tensor:
        """Returns (mu - mean) / std, [B, z, T, h, w], float32 (float64 for float64)."""
        means, scales = self._statistics(mu)
        return (mu - means) * scales

    def denormalize(self, latents: Tensor) -> Tensor:
        """Returns latents * std + mean, [B, z, T, h, w], float32 (float64 for float64)."""
        means, scales = self._statistics(latents)
        return latents / scales + means

    def encode(self, video: Tensor, *, chunk: int = 1) -> Tensor:
        """Returns the raw latent mean of a video, not normalised.

        Args:
            video: [B, 3, F, H, W] in [-1, 1], any float type and device; H and W multiples of 8.
                Frames after the last 4n + 1 are dropped.
            chunk: latent frames made at a time; more is faster and takes more memory.

        Returns:
            [B, z, T, h, w], dtype and device of the weights.

        Raises:
            InvalidRequest: when the shape or chunk does not fit.
        """
        return self.encode_chunks([video], chunk=chunk)

    @torch.no_grad()
    def encode_chunks(self, chunks: Iterable[Tensor], *, chunk: int = 1) -> Tensor:
        """Returns the raw latent mean of a video that arrives in pieces.

        Memory does not grow with the number of frames, the latents apart.

        Args:
            chunks: tensors [B, 3, n, H, W] as in `encode`, n of any size, taken one by one.
            chunk: as in `encode`.

        Returns:
            [B, z, T, h, w].

        Raises:
            InvalidRequest: when a shape or chunk does not fit, or there is no frame.
        """
        state = self.begin()
        groups = frame_groups(chunks, self.config, chunk)
        return torch.cat([self.encode_step(frames, state) for frames in groups], dim=2)

    @torch.no_grad()
    def encode_step(self, frames: Tensor, state: State) -> Tensor:
        """Returns the latents of the next frames of one video.

        Args:
            frames: [B, 3, n, H, W]; n is 1 in the first call, then a multiple of 4.
            state: of this video; from `begin`.

        Returns:
            [B, z, 1 or n/4, h, w], raw mean.
        """
        x = self._place(frames).movedim(1, -1)
        moments = pointwise(self.encoder(x, state), self.conv1, state)
        return moments[..., : self.config.z_dim].movedim(-1, 1).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor, *, chunk: int = 1) -> Tensor:
        """Returns the whole video of raw (denormalised) latents.

        Args:
            latents: [B, z, T, h, w], any float type and device.
            chunk: latent frames decoded at a time after the first.

        Returns:
            [B, 3, 4(T - 1) + 1, 8h, 8w], nominally in [-1, 1] but not clamped; dtype and device of
            the weights.

        Raises:
            InvalidRequest: when the shape or chunk does not fit.
        """
        pieces = self.iter_decode(latents, chunk=chunk)
        return join_frames(pieces, self.config.temporal_stride * (latents.shape[2] - 1) + 1)

    def iter_decode(self, latents: Tensor, *, chunk: int = 1) -> Iterator[Tensor]:
        """Yields the video piece by piece, as `decode` would return it.

        Memory does not grow with the number of frames, a copy of the latents apart. Pieces may be
        views whose last axis in memory is the channels.

        Args:
            latents: [B, z, T, h, w].
            chunk: latent frames per piece after the first piece, which is one pixel frame. The
                result does not depend on it.

        Raises:
            InvalidRequest: at once, when the shape or chunk does not fit.
        """
        check_latents(latents, self.config, chunk)
        state = self.begin()
        parts = latent_groups(self.embed(latents), chunk)
        return (self.decode_step(part, state) for part in parts)

    @torch.no_grad()
    def embed(self, latents: Tensor) -> Tensor:
        """Returns raw latents as `decode_step` takes them, [B, z, T, h, w].

        Done for the whole video at once: a kernel for fewer cells may round otherwise, and a
        rounding here is the one that the decoder amplifies most.
        """
        x = pointwise(self._place(latents).movedim(1, -1), self.conv2, self.begin())
        return x.movedim(-1, 1)

    @torch.no_grad()
    def decode_step(self, embedded: Tensor, state: State) -> Tensor:
        """Returns the pixels of the next latent frames of one video.

        Args:
            embedded: [B, z, n, h, w], from `embed`; n is 1 in the first call.
            state: of this video; from `begin`.

        Returns:
            [B, 3, 1 or 4n, 8h, 8w].
        """
        frames: Tensor = self.decoder(embedded.movedim(1, -1), state)
        return frames.movedim(-1, 1)

    def _place(self, x: Tensor) -> Tensor:
        return x.to(self.conv2.weight.device, self.conv2.weight.dtype)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns means and 1 / stds, [z, 1, 1, 1]; the reference rounds 1 / std, so do we."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        means, stds = (
            torch.tensor(values, dtype=dtype, device=like.device).view(-1, 1, 1, 1)
            for values in (self.means, self.stds)
        )
        return means, 1 / stds


def join_frames(pieces: Iterable[Tensor], num_frames: int) -> Tensor:
    """Returns the pieces of a video as one contiguous tensor, written as they come.

    Args:
        pieces: [B, 3, n, H, W] each, `num_frames` frames together.
        num_frames: F.

    Returns:
        [B, 3, F, H, W].
    """
    video, start = torch.empty(0), 0
    for piece in pieces:
        if not start:
            batch, channels, _, *size = piece.shape
            video = piece.new_empty(batch, channels, num_frames, *size)
        stop = start + piece.shape[2]
        video[:, :, start:stop] = piece
        start = stop
    return video


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> VAEConfig:
    """Returns the sizes of the VAE that a checkpoint holds.

    The pruned "lightVAE" (96 at `decoder.conv1.bias`) is dim 24 and works like any other.

    Args:
        shapes: tensor name -> shape, original names without prefix; extra names are not judged.

    Raises:
        WeightsError: when it is another model, other names, or the shapes do not fit together.
    """
    inputs = shapes.get("encoder.conv1.weight")
    if inputs is None or "conv2.weight" not in shapes:
        some = ", ".join(sorted(shapes)[:3]) or "nothing"
        raise WeightsError(
            f"vae: the file lacks encoder.conv1.weight or conv2.weight; it holds {some}. Wanted "
            "are the original Wan2.1 VAE names; map diffusers names and strip prefixes first.",
            field="vae",
        )
    if inputs[1] != 3:
        raise WeightsError(
            f"vae: encoder.conv1.weight takes {inputs[1]} channels, so this is not a Wan2.1 VAE "
            "(3 channels; the Wan2.2 VAE takes 12). Use a Wan2.1 VAE file.",
            field="vae",
        )
    config = count_levels(shapes, dim=inputs[0], z_dim=shapes["conv2.weight"][0])
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in WanVAE(config).state_dict().items()}
    wrong = [name for name, shape in expected.items() if tuple(shapes.get(name, ())) != shape]
    if wrong:
        name = wrong[0]
        raise WeightsError(
            f"vae: {len(wrong)} tensors do not fit {config}; the first is {name} with shape "
            f"{shapes.get(name, 'missing')} instead of {expected[name]}. The file is damaged or "
            "pruned unevenly; use another one.",
            field="vae",
        )
    return config

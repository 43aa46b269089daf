"""The Wan2.1 video transformer (text to video, image to video), at any size.

Parameter names and shapes are exactly those of the published checkpoints, so that fp8 files,
GGUF files and LoRAs of the community fit without a map. `WanTransformer.forward` predicts the
flow velocity (noise minus clean latents).

What depends on the conditioning alone is computed once by `encode_context`; the sampling loop
passes the result in at every step.

Shape letters: B batch, T latent frames, H and W latent rows and columns, C channels, L tokens,
D model width.

Source: Wan-Video/Wan2.1: wan/modules/model.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xicon_infer.errors import InvalidRequest
from xicon_infer.models.passes import Reuse, TimeEmbedding
from xicon_infer.models.wan_layers import (
    Block,
    CrossContext,
    Head,
    ImageProjection,
    split_heads,
)
from xicon_infer.ops.attention import Backend, choose_backend, kernel_context
from xicon_infer.ops.attention_choice import Choice, Pair, choose_attention, work_of
from xicon_infer.ops.fused_choice import Kernels, choose_kernels
from xicon_infer.ops.rope import Rope, grid_rope

TIME_SCALE = 10000.0
"""Longest wavelength of the sinusoidal time embedding."""


@dataclass(frozen=True)
class WanConfig:
    """The numbers that make a Wan transformer.

    dim: model width. ffn_dim: inner width of the feed-forward. num_heads, num_layers.
    in_dim: channels per latent cell going in (16 noise, 36 with mask and image). out_dim: 16.
    text_dim, text_len: width and padded length of the text states. image_dim: width of the CLIP
    states, None for a text-only model. image_positions: CLIP tokens of the first and the last
    picture in a model made for both, else None. freq_dim: width of the sinusoidal time embedding.
    patch: patch size in (T, H, W). eps: of every norm but those of the image projection.

    Raises:
        ValueError: the numbers cannot make a model.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    image_dim: int | None = None
    image_positions: int | None = None
    freq_dim: int = 256
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} does not give {self.num_heads} heads of even width")
        if min(self.num_layers, self.ffn_dim, self.in_dim, self.out_dim, self.text_len) < 1:
            raise ValueError(f"every size must be at least 1: {self}")

    @property
    def head_dim(self) -> int:
        """Returns the width of one head."""
        return self.dim // self.num_heads


WAN_T2V_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16)
WAN_T2V_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16)
WAN_I2V_14B = replace(WAN_T2V_14B, in_dim=36, image_dim=1280)


Context = list[CrossContext]
"""The cross-attention keys and values of every block, in order."""


class WanTransformer(nn.Module):
    """The transformer. Build it on the meta device for the real sizes, then load into it.

    Args:
        config: the sizes.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim, with_image = config.dim, config.image_dim is not None
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch, stride=config.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(
            Block(dim, config.ffn_dim, config.num_heads, config.eps, with_image=with_image)
            for _ in range(config.num_layers)
        )
        self.head = Head(dim, math.prod(config.patch) * config.out_dim, config.eps)
        if config.image_dim is not None:
            self.img_emb = ImageProjection(config.image_dim, dim, config.image_positions)
        self.attention_request = "auto"
        self.attention_folder: Path | None = None
        self.attention_choices: dict[int, Choice] = {}
        self.kernels_request = "auto"
        self._rope_cache: dict[tuple[object, ...], Rope] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Returns the compute dtype: that of the biases, which are never fp8."""
        return cast("nn.Linear", self.layers[0].ffn[0]).bias.dtype

    @property
    def layers(self) -> list[Block]:
        """Returns the blocks, in order."""
        return cast("list[Block]", list(self.blocks))

    @property
    def device(self) -> torch.device:
        """Returns where the blocks are."""
        return self.patch_embedding.weight.device

    @property
    def backend(self) -> Backend:
        """Returns the kernel of self-attention: of the last pass, or before one the first to try.

        Raises:
            BackendUnavailable: the kernel asked for does not run here.
        """
        if self.attention_choices:
            return list(self.attention_choices.values())[-1].kernels.self_attn
        return choose_backend(self.attention_request, self.device, self.dtype, self.config.head_dim)

    def attention_for(self, tokens: Tensor, context: Context) -> Pair:
        """Returns the attention kernels of a pass over tokens [B, L, D]; timed once per length."""
        keys = (context[0].k, context[0].k_image)
        work = work_of(tokens, self.config.num_heads, [k for k in keys if k is not None])
        choice = choose_attention(self.attention_request, work, self.attention_folder)
        self.attention_choices.pop(tokens.shape[1], None)  # the last pass stands last
        self.attention_choices[tokens.shape[1]] = choice
        return choice.kernels

    @property
    def kernels(self) -> Kernels:
        """Returns what runs between the products of a block, chosen once per device and dtype."""
        return choose_kernels(self.kernels_request, self.device, self.dtype).kernels

    def fuse_projections(self) -> None:
        """Fuses q, k and v of every self-attention into one product. Results stay the same."""
        for block in self.layers:
            block.self_attn.fuse()

    def encode_context(self, text: list[Tensor], image: Tensor | None = None) -> Context:
        """Returns the keys and values of text and image for every block; compute it once.

        Args:
            text: one tensor [L_i, text_dim] per sample, not padded. Rows up to text_len are
                filled with zeros before the text MLP: its output for them is attended to.
            image: CLIP states [B, S, image_dim]; required exactly by image-conditioned models. A
                model made for a first and a last picture takes the tokens of both, in that order.

        Raises:
            InvalidRequest: a text is longer than text_len, the image is missing or unused, or it
                has not the tokens of two pictures where the model wants both.
        """
        if (image is None) != (self.config.image_dim is None):
            raise InvalidRequest(
                "this model needs CLIP image states exactly if it was built for them"
            )
        wanted = self.config.image_positions
        if image is not None and wanted is not None and image.shape[1] != wanted:
            raise InvalidRequest(
                f"this model starts and ends with a picture: it takes {wanted} CLIP tokens of "
                f"both, got {image.shape[1]}; give the last picture too",
                field="end_image",
            )
        text_states = self.embed_text(text)
        image_states = None if image is None else self.img_emb(image.to(self.device))
        return [block.cross_attn.project(text_states, image_states) for block in self.layers]

    def embed_text(self, text: list[Tensor]) -> Tensor:
        """Returns the projected text [B, text_len, D] of unpadded states [L_i, text_dim]."""
        longest = max(len(states) for states in text)
        if longest > self.config.text_len:
            raise InvalidRequest(f"text of {longest} tokens exceeds {self.config.text_len}")
        padded = torch.stack(
            [F.pad(states, (0, 0, 0, self.config.text_len - len(states))) for states in text]
        )
        return self.text_embedding(padded.to(self.device, self.dtype))

    def embed_time(self, timestep: Tensor) -> TimeEmbedding:
        """Returns the time embedding [B, D] and its projection [B, 6, D], float32.

        All steps of a run at once, as a batch, make one small product instead of one per step.

        Args:
            timestep: [B], 0 to 1000.
        """
        half = self.config.freq_dim // 2
        steps = torch.arange(half, dtype=torch.float64, device=timestep.device)
        angle = timestep.double()[:, None] * TIME_SCALE ** (-steps / half)
        first, second = self.time_embedding[0], self.time_embedding[2]
        weight = cast("nn.Linear", first).weight
        waves = torch.cat((angle.cos(), angle.sin()), dim=-1).to(weight.dtype)
        embedding = second(F.silu(first(waves)))
        projected = split_heads(self.time_projection(embedding), 6)
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return TimeEmbedding(embedding.to(wide), projected.to(wide))

    def time_of(self, timestep: Tensor | TimeEmbedding, batch: int) -> TimeEmbedding:
        """Returns the embedding of a timestep, or the one that was made before, of a batch."""
        if isinstance(timestep, Tensor):
            return self.embed_time(timestep)
        return TimeEmbedding(*(part.expand(batch, *part.shape[1:]) for part in timestep))

    def embed_patches(self, latents: Tensor) -> Tensor:
        """Returns tokens [B, L, D], ordered T, H, W, from latents [B, in_dim, T, H, W]."""
        return patchify(self.patch_embedding, latents).to(self.dtype)

    def run_blocks(
        self,
        tokens: Tensor,
        time: tuple[Tensor, Tensor],
        rope: Rope,
        context: Context,
        keep: slice,
        reuse: Reuse | None = None,
    ) -> Tensor:
        """Returns the patch values [B, kept tokens, p] float32 of the tokens in `keep`.

        Args:
            tokens: [B, L, D].
            time: as `embed_time` gives it.
            rope: table of the L tokens.
            context: as `encode_context` gives it.
            keep: the tokens to predict.
            reuse: may give the result of the blocks without running them.
        """
        kernels = self.kernels
        embedding, projection = time
        # Not sliced without a cache: a view would hold all tokens while the blocks run.
        entering = None if reuse is None else tokens[:, keep]
        if reuse is not None and entering is not None:
            leaving = reuse.recall(entering)
            if leaving is not None:
                return self.head(leaving, embedding)
        last = len(self.blocks) - 1
        pair = self.attention_for(tokens, context)
        with kernel_context(*pair):
            for index, (block, cross) in enumerate(zip(self.layers, context, strict=True)):
                kept = keep if index == last else slice(None)
                block.kernels = kernels
                block.cross_attn.kernel = pair.cross
                tokens = block(tokens, projection, rope, cross, pair.self_attn, kept)
        if reuse is not None and entering is not None:
            reuse.keep(entering, tokens)
        return self.head(tokens, embedding)

    def unpatchify(self, values: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Returns [B, out_dim, T, H, W] from [B, L, p] over a token grid (T, rows, columns)."""
        t, h, w = grid
        pt, ph, pw = self.config.patch
        cells = values.reshape(len(values), t, h, w, pt, ph, pw, self.config.out_dim)
        # [B, t, h, w, pt, ph, pw, C] -> [B, C, t, pt, h, ph, w, pw]
        return cells.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor | TimeEmbedding,
        context: Context,
        condition: Tensor | None = None,
        *,
        reuse: Reuse | None = None,
    ) -> Tensor:
        """Returns the velocity, float32 [B, 16, T, H, W].

        Args:
            latents: noisy latents float32 [B, 16, T, H, W]; H and W even.
            timestep: [B], 0 to 1000; or its embedding of batch B or 1, made before.
            context: as `encode_context` gives it.
            condition: image-to-video channels [B, 20, T, H, W] (4 mask, 16 image), or None.
            reuse: may give the result of the blocks without running them.

        Raises:
            InvalidRequest: the channels or the grid do not fit the model.
        """
        stacked = latents if condition is None else torch.cat((latents, condition), dim=1)
        grid = self.token_grid(stacked)
        rope = self.cached_rope(("plain", *grid), lambda: plain_rope(grid, self.config.head_dim))
        time = self.time_of(timestep, len(latents))
        values = self.run_blocks(
            self.embed_patches(stacked), time, rope, context, slice(None), reuse
        )
        return self.unpatchify(values, grid)

    def token_grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Returns (T, rows, columns) of the tokens of [B, in_dim, T, H, W]; checks the shape."""
        _, channels, t, h, w = latents.shape
        pt, ph, pw = self.config.patch
        if channels != self.config.in_dim:
            raise InvalidRequest(
                f"the model takes {self.config.in_dim} channels, got {channels}: {self.config}"
            )
        if t % pt or h % ph or w % pw:
            raise InvalidRequest(f"a latent grid {t}x{h}x{w} is not a multiple of {pt}x{ph}x{pw}")
        return t // pt, h // ph, w // pw

    def cached_rope(self, key: tuple[object, ...], build: Callable[[], Rope]) -> Rope:
        """Returns the table for `key`, built once and kept on the model's device."""
        if len(self._rope_cache) > 8:  # a job uses two or three; long-lived workers must not grow
            self._rope_cache.clear()
        full_key = (*key, self.device)
        if full_key not in self._rope_cache:
            self._rope_cache[full_key] = build().to(self.device)
        return self._rope_cache[full_key]


def plain_rope(grid: tuple[int, int, int], head_dim: int) -> Rope:
    """Returns the table of a grid that starts at (0, 0, 0)."""
    t, h, w = (torch.arange(n) for n in grid)
    return grid_rope(t, h, w, head_dim)


def patchify(embedding: nn.Conv3d, latents: Tensor) -> Tensor:
    """Returns [B, L, D] in the dtype of the patch embedding (float32 in every checkpoint)."""
    weight = embedding.weight
    return embedding(latents.to(weight.device, weight.dtype)).flatten(2).transpose(1, 2)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], head_dim: int = 128) -> WanConfig:
    """Returns the configuration that gives these tensor shapes (original Wan names).

    Args:
        shapes: name -> shape, prefixes stripped.
        head_dim: width of a head; 128 in every published model, smaller in tests.

    Raises:
        InvalidRequest: a tensor that tells a size is missing.
    """
    try:
        dim, in_dim, *patch = shapes["patch_embedding.weight"]
        out_values = shapes["head.head.weight"][0]
        image = shapes.get("img_emb.proj.0.weight")
        positions = shapes.get("img_emb.emb_pos")
        layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
        return WanConfig(
            dim=dim,
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
            num_heads=max(1, dim // head_dim),
            num_layers=len(layers),
            in_dim=in_dim,
            out_dim=out_values // math.prod(patch),
            text_dim=shapes["text_embedding.0.weight"][1],
            image_dim=image[0] if image else None,
            image_positions=positions[1] if positions else None,
            freq_dim=shapes["time_embedding.0.weight"][1],
            patch=(patch[0], patch[1], patch[2]),
        )
    except (KeyError, ValueError, IndexError) as error:
        raise InvalidRequest(f"these tensors are not a Wan transformer: {error}") from error

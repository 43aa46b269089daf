"""The SCAIL transformer: Wan2.1 image-to-video blocks driven by a rendered pose video.

One sequence [reference | noise | pose] goes through full self-attention. Each part has 20
channels, 16 latent and 4 mask (0 for noise, 1 for reference and pose). The pose is encoded at
half height and width and therefore has a quarter of the tokens; its positions are those of the
noise tokens it lies under, moved 120 columns to the right, and averaged over 2 x 2 cells.

Reference and pose tokens do not depend on the step: `embed_reference` and `embed_pose` make them
once per job, and a context window takes the pose frames it needs.

Differs from rookiestar28/ComfyUI-WanVideoWrapper in one number by default: the pose positions in
time start at that of the first noise frame (as the authors of SCAIL trained it), not one before.

Source: zai-org/SCAIL: dit_video_crossattn_sc_xc.py, diffusion_video.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from xicon_infer.errors import InvalidRequest
from xicon_infer.models.passes import Reuse, TimeEmbedding
from xicon_infer.models.wan import (
    WAN_I2V_14B,
    Context,
    WanConfig,
    WanTransformer,
    patchify,
)
from xicon_infer.ops.rope import Rope, concat_rope, grid_rope

POSE_COLUMN_OFFSET = 120
"""Columns between noise and pose positions; the reason why a width stays below 1920 pixels."""

SCAIL_14B = replace(WAN_I2V_14B, in_dim=20)


@dataclass(frozen=True)
class PosePositions:
    """Where the pose tokens sit in position space.

    aligned: True: each pose frame shares the time of its noise frame (official). False: pose
        time starts at 0 even where noise time starts at 1 (ComfyUI wrapper).
    pooling: "pooled": cos and sin averaged over 2 x 2 cells (official and wrapper).
        "midpoint": the angle at the middle of the cell (ComfyUI core).
    """

    aligned: bool = True
    pooling: Literal["pooled", "midpoint"] = "pooled"


class ScailTransformer(WanTransformer):
    """A Wan transformer with one more patch embedding, for the pose.

    Args:
        config: the sizes; in_dim is 20 and image_dim is set in every SCAIL checkpoint.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        self.patch_embedding_pose = nn.Conv3d(
            config.in_dim, config.dim, config.patch, stride=config.patch
        )

    def embed_reference(self, reference: Tensor, strength: float = 1.0) -> Tensor:
        """Returns the reference tokens [B, rows * columns, D].

        Args:
            reference: latents of one picture [B, 16, 1, H, W].
            strength: multiplies all 20 channels; 0 gives the tokens of an empty reference, which
                the ComfyUI wrapper uses in its unconditional branch.
        """
        return self.embed_patches(_with_mask(reference, 1.0) * strength)

    def embed_pose(self, pose: Tensor, strength: float = 1.0) -> Tensor:
        """Returns the pose tokens by frame, [B, T, rows / 2 * columns / 2, D].

        Args:
            pose: latents of the pose video at half size [B, 16, T, H / 2, W / 2].
            strength: multiplies the tokens.
        """
        tokens = patchify(self.patch_embedding_pose, _with_mask(pose, 1.0))
        frames = pose.shape[2]
        return (tokens * strength).to(self.dtype).reshape(len(pose), frames, -1, self.config.dim)

    def forward(  # type: ignore[override]
        self,
        latents: Tensor,
        timestep: Tensor | TimeEmbedding,
        context: Context,
        *,
        reference: Tensor | None = None,
        pose: Tensor | None = None,
        positions: PosePositions | None = None,
        reuse: Reuse | None = None,
    ) -> Tensor:
        """Returns the velocity of the noise frames, float32 [B, 16, T, H, W].

        Args:
            latents: noisy latents float32 [B, 16, T, H, W]; H and W multiples of 4 with a pose.
            timestep: [B], 0 to 1000; the same for all parts of the sequence. Or its embedding of
                batch B or 1, made before.
            context: as `encode_context` gives it.
            reference: as `embed_reference` gives it, or None where it is not active.
            pose: as `embed_pose` gives it for the same T frames, or None where not active.
            positions: position rule of the pose tokens; the official one if None.
            reuse: may give the result of the blocks without running them.

        Raises:
            InvalidRequest: the pose does not have the frames or the size of the noise.
        """
        noise = _with_mask(latents, 0.0)
        grid = self.token_grid(noise)
        parts = [self.embed_patches(noise)]
        start = 0
        if reference is not None:
            parts.insert(0, _batched(reference, latents))
            start = reference.shape[1]
        if pose is not None:
            _check_pose(pose, grid)
            parts.append(_batched(pose, latents).flatten(1, 2))
        layout = (grid, reference is not None, pose is not None, positions or PosePositions())
        rope = self.cached_rope(
            ("scail", *layout), lambda: scail_rope(self.config.head_dim, *layout)
        )
        keep = slice(start, start + grid[0] * grid[1] * grid[2])
        time = self.time_of(timestep, len(latents))
        values = self.run_blocks(torch.cat(parts, dim=1), time, rope, context, keep, reuse)
        return self.unpatchify(values, grid)


def scail_rope(
    head_dim: int,
    grid: tuple[int, int, int],
    with_reference: bool,
    with_pose: bool,
    positions: PosePositions,
) -> Rope:
    """Returns the table of [reference | noise | pose].

    Args:
        head_dim: width of a head.
        grid: (T, rows, columns) of the noise tokens.
        with_reference: a reference frame stands in front, at time 0; noise then starts at 1.
        with_pose: a pose of half the rows and columns stands behind.
        positions: position rule of the pose tokens.
    """
    frames, rows, columns = (torch.arange(n) for n in grid)
    first = int(with_reference)
    parts = [grid_rope(frames + first, rows, columns, head_dim)]
    if with_reference:
        parts.insert(0, grid_rope(torch.zeros(1), rows, columns, head_dim))
    if with_pose:
        time = frames + (first if positions.aligned else 0)
        columns = columns + POSE_COLUMN_OFFSET
        pool = positions.pooling == "pooled"
        if not pool:
            rows, columns = rows[::2] + 0.5, columns[::2] + 0.5
        parts.append(grid_rope(time, rows, columns, head_dim, pool=pool))
    return concat_rope(parts)


def _with_mask(latents: Tensor, value: float) -> Tensor:
    """Returns latents [B, 16, ...] with four more channels of `value`."""
    b, _, t, h, w = latents.shape
    return torch.cat((latents, latents.new_full((b, 4, t, h, w), value)), dim=1)


def _batched(tokens: Tensor, latents: Tensor) -> Tensor:
    """Returns tokens [B or 1, ...] with the batch size of the latents."""
    return tokens.expand(latents.shape[0], *tokens.shape[1:])


def _check_pose(pose: Tensor, grid: tuple[int, int, int]) -> None:
    frames, rows, columns = grid
    if pose.shape[1] != frames or pose.shape[2] * 4 != rows * columns or rows % 2 or columns % 2:
        raise InvalidRequest(
            f"the pose has {pose.shape[1]} frames of {pose.shape[2]} tokens; noise of {frames} "
            f"frames and {rows} x {columns} tokens needs {frames} frames of half that height and "
            "width (pixel sizes must be multiples of 32)",
            field="pose",
        )

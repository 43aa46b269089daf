"""The SteadyDancer transformer: Wan2.1 image-to-video blocks that follow a drawn pose video.

The pose enters before the blocks only. It is fused from itself, its motion and its structure
(`fuse_pose`); a small attention aligns it with the noisy latents; both become channels of the
patch embedding, beside noise and start image. Two latent frames are appended at the end of the
sequence: the reference picture and the first pose frame. They have the times T and T + 1, and
nothing reads what the blocks make of them.

Fused pose and appended frames do not depend on the step: make them once. The alignment does,
because it looks at the noise. Without a pose the model is the Wan model it was made from, with
its own patch embedding and no appended frames.

Shape letters: B batch, T latent frames, H and W latent rows and columns, S CLIP tokens, D model
width.

Source: MCG-NJU/SteadyDancer: wan/modules/model_dancer.py. Differs from it: the small modules, the
time embedding and the modulation are float32 there where it rounds to bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from xicon_infer.errors import InvalidRequest
from xicon_infer.models.passes import Reuse, TimeEmbedding
from xicon_infer.models.steady_dancer_layers import DynamicConv, PoseAlignment, motion_module
from xicon_infer.models.wan import (
    WAN_I2V_14B,
    Context,
    WanConfig,
    WanTransformer,
    patchify,
    plain_rope,
)
from xicon_infer.ops.attention import kernel_context
from xicon_infer.types import LATENT_CHANNELS

STEADY_DANCER_14B = WAN_I2V_14B

APPENDED_FRAMES = 2
"""The reference picture and the first pose frame."""


class PoseSignal(NamedTuple):
    """What the model is told of the pose of one clip; the same in every step.

    fused: as `fuse_pose` gives it, [B, 16, T, H, W]. reference, first_pose: tokens of the two
    appended frames [B, rows * columns, D].
    """

    fused: Tensor
    reference: Tensor
    first_pose: Tensor


class SteadyDancerTransformer(WanTransformer):
    """A Wan transformer with 42 more tensors, for the pose.

    Args:
        config: the sizes; in_dim is 36 and image_dim is set in every SteadyDancer checkpoint.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        pose, patch = LATENT_CHANNELS, config.patch
        # Noise and start image, fused pose, aligned pose.
        self.patch_embedding_fuse = nn.Conv3d(
            config.in_dim + 2 * pose, config.dim, patch, stride=patch
        )
        self.patch_embedding_ref_c = nn.Conv3d(pose, config.dim, patch, stride=patch)
        self.condition_embedding_spatial = DynamicConv(pose, pose)
        self.condition_embedding_temporal = motion_module(pose)
        self.condition_embedding_align = PoseAlignment(pose)

    def encode_context(
        self, text: list[Tensor], image: Tensor | None = None, pose_image: Tensor | None = None
    ) -> Context:
        """Returns the keys and values of text and pictures for every block; compute it once.

        Args:
            text: one tensor [L_i, text_dim] per sample, not padded.
            image: CLIP states of the reference [B, S, image_dim].
            pose_image: CLIP states of the first pose frame [B, S, image_dim], projected and added
                to those of the reference. None leaves them out, as the ComfyUI wrapper does.

        Raises:
            InvalidRequest: a text is longer than text_len, or the reference is missing.
        """
        if image is None or pose_image is None:
            return super().encode_context(text, image)
        with kernel_context(self.backend):
            text_states = self.embed_text(text)
            picture = self.img_emb(image.to(self.device))
            picture = picture + self.img_emb(pose_image.to(self.device))
            return [block.cross_attn.project(text_states, picture) for block in self.layers]

    def fuse_pose(self, pose: Tensor, *, spatial: float = 1.0, temporal: float = 1.0) -> Tensor:
        """Returns pose + temporal * motion + spatial * structure, float32 [B, 16, T, H, W]."""
        weight = self.condition_embedding_spatial.conv.weight
        pose = pose.to(weight.device, weight.dtype)
        motion = self.condition_embedding_temporal(pose)
        # Structure is a matter of single frames: [B, C, T, H, W] -> [B T, C, H, W] and back.
        pictures = self.condition_embedding_spatial(pose.transpose(1, 2).flatten(0, 1))
        structure = pictures.reshape(pose.transpose(1, 2).shape).transpose(1, 2)
        return pose + temporal * motion + spatial * structure

    def embed_reference(self, reference: Tensor) -> Tensor:
        """Returns the tokens of the first appended frame [B, rows * columns, D].

        Args:
            reference: latents of the reference picture [B, 16, 1, H, W]; the model sees them
                twice, around a mask of ones.
        """
        mask = torch.ones_like(reference[:, :4])
        return self.embed_patches(torch.cat((reference, mask, reference), dim=1))

    def embed_first_pose(self, first_pose: Tensor) -> Tensor:
        """Returns the tokens of the second appended frame [B, rows * columns, D].

        Args:
            first_pose: latents of the first pose frame [B, 16, 1, H, W].
        """
        return patchify(self.patch_embedding_ref_c, first_pose).to(self.dtype)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor | TimeEmbedding,
        context: Context,
        condition: Tensor | None = None,
        *,
        reuse: Reuse | None = None,
        pose: PoseSignal | None = None,
    ) -> Tensor:
        """Returns the velocity of the video frames, float32 [B, 16, T, H, W].

        Args:
            latents: noisy latents float32 [B, 16, T, H, W]; H and W even.
            timestep: [B], 0 to 1000; or its embedding of batch B or 1, made before.
            context: as `encode_context` gives it.
            condition: mask and start image [B or 1, 20, T, H, W].
            reuse: may give the result of the blocks without running them.
            pose: of the same T frames, batch B or 1, or None where it does not act.

        Raises:
            InvalidRequest: the pose does not have the frames or the size of the noise, or the
                start image is missing.
        """
        if condition is not None:
            condition = condition.to(latents).expand(len(latents), -1, -1, -1, -1)
        if pose is None or condition is None:
            return super().forward(latents, timestep, context, condition, reuse=reuse)
        _check_pose(pose, latents)
        stacked = torch.cat((latents, condition), dim=1)
        frames, rows, columns = self.token_grid(stacked)
        grid = (frames + APPENDED_FRAMES, rows, columns)
        rope = self.cached_rope(("plain", *grid), lambda: plain_rope(grid, self.config.head_dim))
        fused = pose.fused.expand_as(latents)
        aligned = self.align_pose(fused, latents)
        video = patchify(self.patch_embedding_fuse, torch.cat((stacked, fused, aligned), dim=1))
        appended = [part.expand(len(latents), -1, -1) for part in (pose.reference, pose.first_pose)]
        tokens = torch.cat((video.to(self.dtype), *appended), dim=1)
        keep = slice(0, frames * rows * columns)
        time = self.time_of(timestep, len(latents))
        values = self.run_blocks(tokens, time, rope, context, keep, reuse)
        return self.unpatchify(values, (frames, rows, columns))

    def align_pose(self, fused: Tensor, latents: Tensor) -> Tensor:
        """Returns the fused pose aligned with noisy latents, all [B, 16, T, H, W]."""
        return self.condition_embedding_align(fused, latents.to(fused.dtype))


def _check_pose(pose: PoseSignal, latents: Tensor) -> None:
    if pose.fused.shape[2:] != latents.shape[2:]:
        sizes = [" x ".join(map(str, x.shape[2:])) for x in (pose.fused, latents)]
        raise InvalidRequest(
            f"the pose has {sizes[0]} latent frames, rows and columns, the noise {sizes[1]}; "
            "encode a pose video as long and as large as the result",
            field="pose",
        )

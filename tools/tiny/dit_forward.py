"""The SCAIL transformer as training needs it: a batch of clips, each with its own prompt.

The true class attends to 512 text rows, of which all but some twenty are the same padding row.
Here that row stands once and its weight is raised by the logarithm of its count, which gives the
same attention for a quarter of the work. A test holds the two forwards together.

Shape letters: B batch, L tokens, S text rows, D width, H heads, T latent frames.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xicon_infer.models.scail import PosePositions, ScailTransformer, scail_rope
from xicon_infer.models.wan_layers import Block, RMSNorm, split_heads
from xicon_infer.ops.rope import Rope


class Text(NamedTuple):
    """Prompts of a batch, padding counted instead of repeated.

    states: [B, S, text_dim], each row of a prompt and then zeros. log_count: [B, S] float32, 0 for
    a row of the prompt, the logarithm of how often the first zero row stands, -inf for the rest.
    """

    states: Tensor
    log_count: Tensor


def gather_text(prompts: list[Tensor], text_len: int) -> Text:
    """Returns the prompts of a batch [L_i, text_dim] as one `Text`.

    Args:
        prompts: unpadded states.
        text_len: rows that the model sees, 512.
    """
    longest = max(len(states) for states in prompts) + 1
    padded = torch.stack([F.pad(states, (0, 0, 0, longest - len(states))) for states in prompts])
    log_count = torch.full((len(prompts), longest), -math.inf)
    for row, states in zip(log_count, prompts, strict=True):
        row[: len(states)] = 0
        row[len(states)] = math.log(text_len - len(states))
    return Text(padded.float(), log_count)


def velocity(
    model: ScailTransformer,
    latents: Tensor,
    timestep: Tensor,
    text: Text,
    *,
    image: Tensor,
    reference: Tensor | None,
    pose: Tensor | None,
) -> Tensor:
    """Returns the velocity [B, 16, T, H, W], float32.

    Args:
        model: the transformer.
        latents: noisy latents [B, 16, T, H, W].
        timestep: [B], 0 to 1000.
        text: as `gather_text` gives it.
        image: CLIP states [B, n, image_dim].
        reference: latents [B, 16, 1, H, W], or None.
        pose: latents [B, 16, T, H / 2, W / 2], or None.
    """
    noise = F.pad(latents, (0, 0, 0, 0, 0, 0, 0, 4))
    grid = model.token_grid(noise)
    parts = [model.embed_patches(noise)]
    if reference is not None:
        parts.insert(0, model.embed_reference(reference))
    if pose is not None:
        parts.append(model.embed_pose(pose).flatten(1, 2))
    start = parts[0].shape[1] if reference is not None else 0
    key = (grid, reference is not None, pose is not None, PosePositions())
    rope = model.cached_rope(("scail", *key), lambda: scail_rope(model.config.head_dim, *key))
    embedding, modulation = model.embed_time(timestep)
    text_states = model.text_embedding(text.states)
    image_states = model.img_emb(image)
    tokens = torch.cat(parts, dim=1)
    for block in model.layers:
        tokens = _block(block, tokens, modulation, rope, text_states, text.log_count, image_states)
    kept = tokens[:, start : start + math.prod(grid)]
    return model.unpatchify(model.head(kept, embedding), grid)


def _block(
    block: Block,
    x: Tensor,
    modulation: Tensor,
    rope: Rope,
    text: Tensor,
    log_count: Tensor,
    image: Tensor,
) -> Tensor:
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
        (block.modulation + modulation).unsqueeze(2).unbind(1)
    )
    width = (x.shape[-1],)
    normed = torch.addcmul(shift, F.layer_norm(x, width, eps=block.eps), 1 + scale)
    x = torch.addcmul(x, _self_attention(block, normed, rope), gate)
    norm3 = block.norm3
    x = x + _cross_attention(
        block, F.layer_norm(x, width, norm3.weight, norm3.bias, block.eps), text, log_count, image
    )
    normed = torch.addcmul(ffn_shift, F.layer_norm(x, width, eps=block.eps), 1 + ffn_scale)
    return torch.addcmul(x, block.ffn(normed), ffn_gate)


def _self_attention(block: Block, x: Tensor, rope: Rope) -> Tensor:
    part = block.self_attn
    q, k = _rms(part.q(x), part.norm_q), _rms(part.k(x), part.norm_k)
    q, k, v = (split_heads(y, part.num_heads) for y in (q, k, part.v(x)))
    return part.o(_attend(_turn(q, rope), _turn(k, rope), v, None))


def _cross_attention(
    block: Block, x: Tensor, text: Tensor, log_count: Tensor, image: Tensor
) -> Tensor:
    part = block.cross_attn
    q = split_heads(_rms(part.q(x), part.norm_q), part.num_heads)
    k = split_heads(_rms(part.k(text), part.norm_k), part.num_heads)
    v = split_heads(part.v(text), part.num_heads)
    out = _attend(q, k, v, log_count[:, None, None].to(q.dtype))
    k = split_heads(_rms(part.k_img(image), part.norm_k_img), part.num_heads)
    v = split_heads(part.v_img(image), part.num_heads)
    return part.o(out + _attend(q, k, v, None))


def _rms(x: Tensor, norm: RMSNorm) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), norm.weight, norm.eps).to(x.dtype)


def _turn(x: Tensor, rope: Rope) -> Tensor:
    """Returns x [B, L, H, head_dim] with every pair of channels turned by its angle."""
    cos, sin = rope.cos[:, None].to(x.dtype), rope.sin[:, None].to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    # Written out: at these lengths it takes half the time of the fused kernel on a CPU.
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = (scores if bias is None else scores + bias).softmax(-1).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)

"""The layers of the Wan2.1 transformer; parameter names are those of the published checkpoints.

Precision: linear layers run in the dtype of their weights. Norms, modulation and gated sums are
computed in float32 and rounded once, because six rounded steps per block add up over 40 blocks.

The keys and values of cross-attention depend on the prompt and the image alone, not on the noise
or the step. They are computed once by `CrossAttention.project` and passed in: that is a quarter
of all block weights that the sampling loop never touches.

A block runs in one of two ways (`Block.kernels`): step by step in PyTorch, which torch.compile can
take as one graph, or with the kernels of `xicon_infer.ops.fused` between its products.

Shape letters: B batch, L tokens, S context tokens, D model width, H heads.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xicon_infer.ops import fused
from xicon_infer.ops.attention import Backend, attention
from xicon_infer.ops.fused_choice import Kernels, compiled
from xicon_infer.ops.linear import Fp8Linear, QuantizedRows, takes_rows
from xicon_infer.ops.linear_fuse import fuse_linears
from xicon_infer.ops.rope import Rope, apply_rope

IMAGE_NORM_EPS = 1e-5
"""Of the two LayerNorms in the image projection; every other norm uses the model's eps (1e-6)."""


class CrossContext(NamedTuple):
    """Keys and values of one block's cross-attention: [B, S, H, head_dim], image parts or None."""

    k: Tensor
    v: Tensor
    k_image: Tensor | None
    v_image: Tensor | None


class RMSNorm(nn.Module):
    """Root-mean-square norm over the whole width (all heads together), in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised x [..., D], dtype of x."""
        wide = _widen(x)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)

    def turned(self, x: Tensor, heads: int, rope: Rope | None) -> Tensor:
        """Returns the normed heads [B, L, H, head_dim] of [B, L, D], turned, in one kernel."""
        return fused.norm_rope(x, self.weight, self.eps, heads, rope)


class SelfAttention(nn.Module):
    """Attention over all tokens, RoPE on queries and keys."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        self.qkv: nn.Linear | Fp8Linear | None = None

    @property
    def inputs(self) -> tuple[nn.Module, ...]:
        """Returns the layers that read the tokens: q, k and v, or the fused one."""
        return (self.q, self.k, self.v) if self.qkv is None else (self.qkv,)

    def fuse(self) -> None:
        """Replaces q, k and v by one linear layer `qkv`: one large product instead of three.

        Call it after loading; LoRA side paths must be merged before. Layers in fp8 get a scale per
        row, which changes no weight.

        Raises:
            TypeError: the projections are not of one kind (`xicon_infer.ops.linear_fuse`).
        """
        self.qkv = fuse_linears(self.inputs)
        del self.q, self.k, self.v

    def forward(
        self,
        x: Tensor | QuantizedRows,
        rope: Rope,
        backend: Backend,
        keep: slice,
        *,
        kernels: Kernels = "eager",
    ) -> Tensor:
        """Returns the attended tokens of the slice `keep`; every token serves as key.

        Args:
            x: [B, L, D].
            rope: table of the L tokens.
            backend: attention kernel.
            keep: the tokens whose output is wanted.
            kernels: what runs between the products.
        """
        if self.qkv is not None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            q = q[:, keep]
        else:
            q, k, v = self.q(_kept(x, keep)), self.k(x), self.v(x)
        kept = Rope(rope.cos[keep], rope.sin[keep])
        v = split_heads(v, self.num_heads)
        if kernels == "triton":
            q = self.norm_q.turned(q, self.num_heads, kept)
            k = self.norm_k.turned(k, self.num_heads, rope)
            return _product(self.o, attention(q, k, v, backend).flatten(2))
        q, k = (split_heads(part, self.num_heads) for part in (self.norm_q(q), self.norm_k(k)))
        q = apply_rope(q, kept)
        return self.o(attention(q, apply_rope(k, rope), v, backend).flatten(2))


class CrossAttention(nn.Module):
    """Attention to the text and, in image-conditioned models, to the image.

    Both attentions share the query; their results are added before the one output projection.

    kernel: of attention, in place of that of self-attention; the transformer sets it before every
    pass.
    """

    kernel: Backend | None = None

    def __init__(self, dim: int, num_heads: int, eps: float, *, with_image: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        self.with_image = with_image
        if with_image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def project(self, text: Tensor, image: Tensor | None) -> CrossContext:
        """Returns the keys and values of the context, once per job.

        Args:
            text: projected text [B, S, D].
            image: projected image tokens [B, S', D], or None for a text-only model.
        """
        k, v = self._heads(self.norm_k(self.k(text))), self._heads(self.v(text))
        if image is None or not self.with_image:
            return CrossContext(k, v, None, None)
        k_image = self._heads(self.norm_k_img(self.k_img(image)))
        return CrossContext(k, v, k_image, self._heads(self.v_img(image)))

    def forward(
        self,
        x: Tensor | QuantizedRows,
        context: CrossContext,
        backend: Backend,
        *,
        kernels: Kernels = "eager",
    ) -> Tensor:
        """Returns [B, L, D]."""
        if kernels == "triton":
            q = self.norm_q.turned(self.q(x), self.num_heads, None)
        else:
            q = self._heads(self.norm_q(self.q(x)))
        backend = self.kernel or backend
        out = attention(q, context.k, context.v, backend).flatten(2)
        more = None
        if context.k_image is not None and context.v_image is not None:
            more = attention(q, context.k_image, context.v_image, backend).flatten(2)
        if kernels == "triton":
            return _product(self.o, out, more)
        return self.o(out if more is None else out + more)

    def _heads(self, x: Tensor) -> Tensor:
        return split_heads(x, self.num_heads)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward, modulated by the time embedding.

    kernels: what runs between the products; the transformer sets it before every pass.
    """

    kernels: Kernels = "eager"

    def __init__(
        self, dim: int, ffn_dim: int, num_heads: int, eps: float, *, with_image: bool
    ) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.self_attn = SelfAttention(dim, num_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps=eps)
        self.cross_attn = CrossAttention(dim, num_heads, eps, with_image=with_image)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim)
        )

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: Rope,
        context: CrossContext,
        backend: Backend,
        keep: slice = slice(None),
    ) -> Tensor:
        """Returns the hidden states of the tokens in `keep`.

        Args:
            x: [B, L, D].
            modulation: float32 [B, 6, D], the projected time embedding.
            rope: table of the L tokens.
            context: keys and values of the cross-attention.
            backend: attention kernel.
            keep: tokens that anything reads afterwards; the last block of a model skips the
                rest, of which only keys and values were needed.
        """
        if self.kernels == "compile":
            return compiled(_eager)(self, x, modulation, rope, context, backend, keep)
        run = _fused if self.kernels == "triton" else _eager
        return run(self, x, modulation, rope, context, backend, keep)

    def modulations(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """Returns shift, scale and gate of the attention, then of the feed-forward: [B, 1, D]."""
        return (self.modulation.to(modulation.dtype) + modulation).unsqueeze(2).unbind(1)


def _eager(
    block: Block,
    x: Tensor,
    modulation: Tensor,
    rope: Rope,
    context: CrossContext,
    backend: Backend,
    keep: slice,
) -> Tensor:
    """Returns what `Block.forward` does, step by step."""
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = block.modulations(modulation)
    attended = block.self_attn(modulate(x, shift, scale, block.eps), rope, backend, keep)
    x = gated_add(x[:, keep], attended, gate)
    x = x + block.cross_attn(layer_norm(x, block.norm3), context, backend)
    return gated_add(x, block.ffn(modulate(x, ffn_shift, ffn_scale, block.eps)), ffn_gate)


def _fused(
    block: Block,
    x: Tensor,
    modulation: Tensor,
    rope: Rope,
    context: CrossContext,
    backend: Backend,
    keep: slice,
) -> Tensor:
    """Returns what `Block.forward` does, with one kernel between any two products."""
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = block.modulations(modulation)
    own, cross, norm3 = block.self_attn, block.cross_attn, block.norm3
    first, gelu, second = block.ffn
    rows = fused.norm_modulate(x, shift, scale, block.eps, fp8=takes_rows(*own.inputs))
    x, rows = fused.add_norm(
        x[:, keep],
        own(rows, rope, backend, keep, kernels="triton"),
        gate,
        (norm3.weight, norm3.bias),
        eps=norm3.eps,
        modulate=False,
        fp8=takes_rows(cross.q),
    )
    x, rows = fused.add_norm(
        x,
        cross(rows, context, backend, kernels="triton"),
        None,
        (ffn_scale, ffn_shift),
        eps=block.eps,
        modulate=True,
        fp8=takes_rows(first),
    )
    inner = first(rows)
    inner = fused.quantize_rows(inner, gelu=True) if takes_rows(second) else gelu(inner)
    return fused.gated_add(x, second(inner), ffn_gate)


class Head(nn.Module):
    """The last norm and projection, modulated by the unprojected time embedding."""

    def __init__(self, dim: int, out_width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))
        self.head = nn.Linear(dim, out_width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Returns [B, L, patch values] float32, from x [B, L, D] and time [B, D] float32."""
        shift, scale = (self.modulation.to(time.dtype) + time[:, None]).unsqueeze(2).unbind(1)
        normed = F.layer_norm(_widen(x), (x.shape[-1],), eps=self.eps) * (1 + scale) + shift
        return self.head(normed.to(self.head.weight.dtype)).to(time.dtype)


class ImageProjection(nn.Module):
    """Brings CLIP tokens to the model's width (`img_emb`).

    Args:
        image_dim: width of the CLIP states.
        dim: model width.
        positions: tokens of the first and the last picture together (514), in models that were
            made for both; None in all others.
    """

    def __init__(self, image_dim: int, dim: int, positions: int | None = None) -> None:
        super().__init__()
        if positions is not None:
            self.emb_pos = nn.Parameter(torch.zeros(1, positions, image_dim))
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim, eps=IMAGE_NORM_EPS),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim, eps=IMAGE_NORM_EPS),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Returns [B, S, D] from CLIP states [B, S, image_dim].

        With positions, S must be their number: the first picture's tokens, then the last one's.
        """
        norm_in, first, act, second, norm_out = self.proj
        dtype = cast("nn.Linear", first).weight.dtype
        positions = getattr(self, "emb_pos", None)
        if positions is not None:
            image = image.to(positions.dtype) + positions
        hidden = second(act(first(layer_norm(image.to(dtype), norm_in))))
        return layer_norm(hidden, norm_out)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Returns [B, L, heads, head_dim] from [B, L, D]."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """Returns the affine LayerNorm of x, computed in float32, in the dtype of x."""
    assert isinstance(norm, nn.LayerNorm)
    wide = _widen(x)
    weight, bias = norm.weight.to(wide.dtype), norm.bias.to(wide.dtype)
    return F.layer_norm(wide, norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Returns LayerNorm(x) (1 + scale) + shift in the dtype of x; [B, L, D] and [B, 1, D]."""
    return (F.layer_norm(_widen(x), (x.shape[-1],), eps=eps) * (1 + scale) + shift).to(x.dtype)


def gated_add(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Returns x + gate * update in the dtype of x; the sum is float32."""
    return torch.addcmul(_widen(x), _widen(update), gate).to(x.dtype)


def _product(layer: nn.Module, x: Tensor, more: Tensor | None = None) -> Tensor:
    """Returns a layer's output for x + more [B, L, D], rounded to fp8 in one kernel if it can."""
    if takes_rows(layer):
        return layer(fused.quantize_rows(x, more))
    return layer(x if more is None else x + more)


def _kept(x: Tensor | QuantizedRows, keep: slice) -> Tensor | QuantizedRows:
    """Returns the tokens of the slice `keep` of [B, L, D]."""
    if not isinstance(x, QuantizedRows):
        return x[:, keep]
    scale = x.scale.reshape(*x.values.shape[:-1], 1)[:, keep]
    return QuantizedRows(x.values[:, keep], scale.reshape(-1, 1), x.dtype)


def _widen(x: Tensor) -> Tensor:
    """Returns x in at least float32."""
    return x if x.dtype == torch.float64 else x.float()

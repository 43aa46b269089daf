"""Tokens, FLOP, bytes and memory of the transformers and encoders in closed form. Pure Python.

One multiply-add counts as two FLOP. Every count is an exact integer for any model size; the plan
of a job and the benchmarks are built from them. The VAE has its own module, `formulas_vae`.

Left out because they are below 0.1 %: patch embedding, head, time and modulation vectors.

Letters: L tokens of one forward pass, T latent frames, hw tokens per latent frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

PATCH_PIXELS = 16
"""Pixels per token, each way: 8 of the VAE times 2 of the patch."""

LATENT_CHANNELS = 16
CLIP_TOKENS = 257
TEXT_TOKENS = 512

# Elementwise passes over [L, dim] per block when norm, modulation, RoPE and residual are fused.
_FUSED_PASSES_TIMES_TWO = 47


@dataclass(frozen=True)
class DitShape:
    """The sizes of a Wan transformer.

    dim: model width. ffn_dim: inner width of the feed-forward. layers, heads. in_channels: of a
    latent cell going in. image_tokens: 0 for a text-only model. pose_channels: of the separate
    pose patch embedding (SCAIL), else 0. time_dim: width of the sinusoidal time embedding.
    """

    dim: int
    ffn_dim: int
    layers: int
    heads: int
    in_channels: int
    image_tokens: int = CLIP_TOKENS
    pose_channels: int = 0
    text_tokens: int = TEXT_TOKENS
    text_dim: int = 4096
    image_dim: int = 1280
    time_dim: int = 256

    @property
    def context_tokens(self) -> int:
        """Tokens that cross-attention reads: padded text and image."""
        return self.text_tokens + self.image_tokens

    @property
    def kv_pairs(self) -> int:
        """Key and value projections of one cross-attention: text, and image where there is one."""
        return 2 if self.image_tokens else 1


WAN_T2V_1_3B = DitShape(1536, 8960, 30, 12, 16, image_tokens=0)
WAN_T2V_14B = DitShape(5120, 13824, 40, 40, 16, image_tokens=0)
WAN_I2V_14B = DitShape(5120, 13824, 40, 40, 36)
SCAIL_14B = replace(WAN_I2V_14B, in_channels=20, pose_channels=20)


@dataclass(frozen=True)
class Ceiling:
    """What one kind of GPU reaches in practice: FLOP per second, and bytes per second.

    gemm_fp8 and attention_8bit are None where the hardware has none.
    """

    gemm_bf16: float
    gemm_fp8: float | None
    attention_16bit: float
    attention_8bit: float | None
    memory: float


H100 = Ceiling(790e12, 1150e12, 650e12, 900e12, 2.8e12)


# Tokens


def frame_tokens(width: int, height: int) -> int:
    """Returns hw, the tokens of one latent frame of width x height pixels."""
    return (width // PATCH_PIXELS) * (height // PATCH_PIXELS)


def wan_tokens(frames: int, hw: int) -> int:
    """Returns L of plain Wan: T noise frames."""
    return frames * hw


def scail_tokens(frames: int, hw: int, *, pose: bool = True, reference: bool = True) -> int:
    """Returns L of SCAIL: T noise frames, one reference frame, and a quarter as many for the pose.

    Args:
        frames: T, latent frames of the clip or window.
        hw: tokens of one frame; a multiple of 4.
        pose: the pose tokens are present in this step.
        reference: the reference tokens are present in this step.
    """
    return (frames + int(reference)) * hw + (frames * hw // 4 if pose else 0)


def steady_dancer_tokens(frames: int, hw: int) -> int:
    """Returns L of SteadyDancer: T noise frames, a reference image and a reference pose."""
    return (frames + 2) * hw


# FLOP of one forward pass


def linear_flops(shape: DitShape, tokens: int) -> int:
    """Returns the FLOP of q, k, v, o, cross q and o, and the feed-forward, over L tokens."""
    return 2 * shape.layers * _token_weights(shape) * tokens


def self_attention_flops(shape: DitShape, tokens: int) -> int:
    """Returns the FLOP of full self-attention over L tokens."""
    return 4 * shape.layers * shape.dim * tokens**2


def cross_attention_flops(shape: DitShape, tokens: int) -> int:
    """Returns the FLOP of L tokens attending to text and image."""
    return 4 * shape.layers * shape.dim * shape.context_tokens * tokens


def cross_kv_flops(shape: DitShape, texts: int = 1) -> int:
    """Returns the FLOP of the cross-attention keys and values of texts beside one image."""
    tokens = texts * shape.text_tokens + shape.image_tokens
    return 2 * shape.layers * tokens * 2 * shape.dim**2


def forward_flops(shape: DitShape, tokens: int) -> int:
    """Returns the FLOP of one forward pass over L tokens, cached keys and values given."""
    return (
        linear_flops(shape, tokens)
        + self_attention_flops(shape, tokens)
        + cross_attention_flops(shape, tokens)
    )


def elementwise_bytes(shape: DitShape, tokens: int) -> int:
    """Returns the bytes that fused elementwise kernels move: 23.5 bf16 passes over [L, dim].

    Counted for the 14B ratio of ffn_dim to dim.
    """
    return _FUSED_PASSES_TIMES_TWO * shape.dim * shape.layers * tokens


def floor_seconds(
    shape: DitShape,
    tokens: int,
    ceiling: Ceiling,
    *,
    fp8: bool = False,
    attention_8bit: bool = False,
) -> float:
    """Returns the least seconds that one forward pass can take on a GPU.

    Args:
        shape: the model.
        tokens: L.
        ceiling: what the GPU reaches.
        fp8: the linears run in fp8.
        attention_8bit: self- and cross-attention run in 8 bit.

    Raises:
        ValueError: the GPU has no such arithmetic.
    """
    gemm = ceiling.gemm_fp8 if fp8 else ceiling.gemm_bf16
    attention = ceiling.attention_8bit if attention_8bit else ceiling.attention_16bit
    if gemm is None or attention is None:
        raise ValueError("this GPU has no 8-bit arithmetic of that kind")
    attention_flops = self_attention_flops(shape, tokens) + cross_attention_flops(shape, tokens)
    return (
        linear_flops(shape, tokens) / gemm
        + attention_flops / attention
        + elementwise_bytes(shape, tokens) / ceiling.memory
    )


def _token_weights(shape: DitShape) -> int:
    """Returns the weights of one block that every token goes through."""
    return 6 * shape.dim**2 + 2 * shape.dim * shape.ffn_dim


# Parameters and memory


def cross_kv_parameters(shape: DitShape) -> int:
    """Returns the weights of all cross-attention keys and values; needed once per conditioning."""
    return shape.layers * shape.kv_pairs * 2 * shape.dim**2


def matrix_parameters(shape: DitShape) -> int:
    """Returns the weights of all matrices in the blocks: those that an fp8 file stores in fp8."""
    return shape.layers * _token_weights(shape) + cross_kv_parameters(shape)


def block_parameters(shape: DitShape) -> int:
    """Returns all parameters of one block: matrices, biases, norms and modulation."""
    dim, pairs = shape.dim, shape.kv_pairs
    biases = (6 + 2 * pairs) * dim + shape.ffn_dim + dim
    # norm_q and norm_k twice, norm_k_img, norm3 with bias.
    norms = (4 + int(pairs == 2) + 2) * dim
    return matrix_parameters(shape) // shape.layers + biases + norms + 6 * dim


def outer_parameters(shape: DitShape) -> int:
    """Returns the parameters outside the blocks: embeddings, time MLP, image MLP and head."""
    dim, out = shape.dim, 4 * LATENT_CHANNELS
    patches = 4 * dim * (shape.in_channels + shape.pose_channels)
    patches += dim * (1 + int(shape.pose_channels > 0))
    text = _linear(shape.text_dim, dim) + _linear(dim, dim)
    time = _linear(shape.time_dim, dim) + _linear(dim, dim) + _linear(dim, 6 * dim)
    image = 0
    if shape.image_tokens:
        wide = shape.image_dim
        image = 2 * wide + _linear(wide, wide) + _linear(wide, dim) + 2 * dim
    return patches + text + time + image + _linear(dim, out) + 2 * dim


def parameters(shape: DitShape) -> int:
    """Returns all parameters of the transformer."""
    return shape.layers * block_parameters(shape) + outer_parameters(shape)


def cross_kv_bytes(shape: DitShape, element_bytes: int = 2, texts: int = 1) -> int:
    """Returns the bytes of the cached cross-attention keys and values of texts beside one image."""
    tokens = texts * shape.text_tokens + shape.image_tokens
    return shape.layers * tokens * 2 * shape.dim * element_bytes


def activation_bytes(shape: DitShape, tokens: int, element_bytes: int = 2, batch: int = 1) -> int:
    """Returns the activations alive at the worst moment of a block.

    The residual stream, q, k and v, the attention output (5 of width dim) and the inner
    feed-forward (1 of ffn_dim).
    """
    return batch * tokens * (5 * shape.dim + shape.ffn_dim) * element_bytes


def weight_bytes(
    shape: DitShape, matrix_bytes: int, element_bytes: int = 2, *, keep_cross_kv: bool = True
) -> int:
    """Returns the bytes of the weights.

    Args:
        shape: the model.
        matrix_bytes: per weight of a block matrix: 1 for fp8, 2 for bf16, 4 for float32.
        element_bytes: per parameter of everything else.
        keep_cross_kv: False leaves out the key and value weights of cross-attention, which are
            read once per conditioning.
    """
    left_out = 0 if keep_cross_kv else cross_kv_parameters(shape)
    matrices = matrix_parameters(shape)
    return (matrices - left_out) * matrix_bytes + (parameters(shape) - matrices) * element_bytes


def sampling_bytes(
    shape: DitShape, tokens: int, *, element_bytes: int = 2, branches: int = 1, batch: int = 1
) -> int:
    """Returns the device memory that sampling needs beside the weights.

    Args:
        shape: the model.
        tokens: L of the longest forward pass.
        element_bytes: per element.
        branches: texts whose keys and values are cached: 2 with guidance.
        batch: samples in one forward pass: 2 with batched guidance, which keeps a stacked copy.
    """
    context = cross_kv_bytes(shape, element_bytes, branches)
    if batch > 1:
        context += batch * cross_kv_bytes(shape, element_bytes)
    return context + activation_bytes(shape, tokens, element_bytes, batch)


def lora_bytes(shape: DitShape, rank: int, element_bytes: int = 2) -> int:
    """Returns the bytes of a low-rank pair on every matrix of every block."""
    dim, ffn = shape.dim, shape.ffn_dim
    squares = 6 + 2 * shape.kv_pairs
    return shape.layers * rank * (squares * 2 * dim + 2 * (dim + ffn)) * element_bytes


def _linear(wide_in: int, wide_out: int) -> int:
    return wide_in * wide_out + wide_out


# Encoders

UMT5_PARAMETERS = 5_680_910_336
CLIP_PARAMETERS = 630_766_080


def umt5_flops(tokens: int) -> int:
    """Returns the FLOP of the UMT5-XXL encoder over L text tokens."""
    dim, ffn, layers = 4096, 10240, 24
    weights = layers * (4 * dim**2 + 3 * dim * ffn)
    return 2 * weights * tokens + 4 * layers * dim * tokens**2


def clip_flops(images: int = 1, layers: int = 31) -> int:
    """Returns the FLOP of CLIP ViT-H/14; 31 of its 32 layers give the states that are used."""
    dim, ffn = 1280, 5120
    weights = layers * (4 * dim**2 + 2 * dim * ffn)
    attention = 4 * layers * dim * CLIP_TOKENS**2
    return images * (2 * weights * CLIP_TOKENS + attention)

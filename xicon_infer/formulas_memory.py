"""Device memory of a job in closed form: activations, VAE work, blocks that are swapped.

Pure Python. The counts follow this project's own code (eager PyTorch, a kernel of attention that
stores no scores), tensor by tensor at the worst moment of each stage. They leave out what the
allocator, the kernels' work space and the CUDA context add; the plan keeps a margin for those.

`formulas.activation_bytes` is the floor that fused kernels would reach; `forward_bytes` here is
what the unfused code takes, about half as much again.

Letters: L tokens of one forward pass, D model width, n blocks, s of them swapped.
"""

from __future__ import annotations

from xicon_infer import formulas
from xicon_infer.formulas import DitShape
from xicon_infer.formulas_vae import WAN_VAE, VaeShape

STEADY_DANCER_EXTRA_PARAMETERS = 1_839_952
"""The 42 tensors that SteadyDancer has beside those of Wan2.1 image to video."""

UMT5_EMBEDDING_PARAMETERS = 256_384 * 4096
UMT5_LAYERS = 24

SWAP_BUFFERS = 2
"""Device buffers of a block swap: one in use, one being filled."""

_FLOAT = 4
_LATENT_BYTES = 16 * 4 * _FLOAT
_LATENT_COPIES = 8


# Transformer


def forward_bytes(
    shape: DitShape, tokens: int, element_bytes: int = 2, batch: int = 1, held_bytes: int = 0
) -> int:
    """Returns the bytes of the tensors alive at the worst moment of a forward pass.

    Either the norm of the keys (x, its modulated copy, q, k, v and the normed q, with two or
    three float32 tensors of the norm), or the activation of the feed-forward (its input and
    output, with x three times and the modulated copy). The larger of both counts.

    Args:
        shape: the model.
        tokens: L.
        element_bytes: of the compute dtype. float32 needs no widened copies.
        batch: samples in one pass.
        held_bytes: of the tokens that the model keeps while the blocks run, beside the residual;
            of one sample.
    """
    dim, narrow = shape.dim, element_bytes < _FLOAT
    norm = 6 * dim * element_bytes + (3 if narrow else 2) * dim * _FLOAT
    feed_forward = (4 * dim + 2 * shape.ffn_dim) * element_bytes
    # Rope: cos and sin of half a head. Latents going in with mask and condition, velocity out.
    rope = dim // shape.heads * _FLOAT
    latents = 4 * shape.in_channels * _FLOAT + _LATENT_BYTES
    each = tokens * (max(norm, feed_forward) + latents) + held_bytes
    return batch * each + tokens * rope


def largest_matrix_bytes(shape: DitShape, element_bytes: int = 2) -> int:
    """Returns the bytes of the widened copy that a layer with an fp8 weight makes of it."""
    return shape.dim * max(shape.dim, shape.ffn_dim) * element_bytes


def solver_bytes(tokens: int) -> int:
    """Returns the bytes of latents, velocities and solver state of L noise tokens, float32."""
    return _LATENT_COPIES * tokens * _LATENT_BYTES


def projection_bytes(shape: DitShape, element_bytes: int = 2) -> int:
    """Returns the bytes of the tensors while one conditioning is projected, the result apart.

    The embedded text and image, and keys or values with three float32 tensors of their norm.
    """
    tokens, dim = shape.context_tokens, shape.dim
    return tokens * (3 * dim * element_bytes + 3 * dim * _FLOAT)


def row_scale_bytes(shape: DitShape) -> int:
    """Returns the bytes of one float32 scale per output row of every matrix of one block."""
    return ((7 + 2 * shape.kv_pairs) * shape.dim + shape.ffn_dim) * _FLOAT


def block_bytes(
    shape: DitShape, matrix_bytes: int, element_bytes: int = 2, *, keep_cross_kv: bool = False
) -> int:
    """Returns the bytes of one block, which are those that a swap copies.

    Args:
        shape: the model.
        matrix_bytes: per weight of a matrix: 1 for fp8, 2 for bf16, 4 for float32.
        element_bytes: per parameter of everything else.
        keep_cross_kv: with the key and value weights of cross-attention.
    """
    every = formulas.block_parameters(shape)
    matrices = formulas.matrix_parameters(shape) // shape.layers
    left_out = 0 if keep_cross_kv else formulas.cross_kv_parameters(shape) // shape.layers
    return (matrices - left_out) * matrix_bytes + (every - matrices) * element_bytes


# Block swap


def swapped_blocks(excess_bytes: int, block: int, blocks: int, buffer: int = 0) -> int | None:
    """Returns the smallest s that frees so many bytes, None if all blocks do not.

    s swapped blocks free their own bytes less those of the `SWAP_BUFFERS` device buffers.

    Args:
        excess_bytes: what does not fit with all blocks on the device.
        block: bytes of one.
        blocks: n.
        buffer: bytes of a device buffer, that is of the largest block; 0 for `block`.
    """
    if excess_bytes <= 0:
        return 0
    swapped = -(-(excess_bytes + SWAP_BUFFERS * (buffer or block)) // block)
    return swapped if swapped <= blocks else None


def swap_stall_seconds(copy_s: float, compute_s: float, blocks: int, swapped: int) -> float:
    """Returns the seconds that a forward pass waits for copies, pass after pass.

    Exact where s divides n; a lower bound otherwise. 0 if c <= (n / s) k(L).

    Args:
        copy_s: c, of one block.
        compute_s: k(L), of one block.
        blocks: n.
        swapped: s.
    """
    return max(0.0, swapped * copy_s - blocks * compute_s)


# Encoders


def umt5_bytes(tokens: int, element_bytes: int = 2) -> int:
    """Returns the bytes of the tensors of the UMT5-XXL encoder over L text tokens.

    Three score matrices of 64 heads, the widened states and the gated feed-forward.
    """
    dim, ffn, heads = 4096, 10240, 64
    scores = 3 * heads * tokens**2 * _FLOAT
    return scores + tokens * (2 * dim * _FLOAT + (5 * dim + 3 * ffn) * element_bytes)


def umt5_streamed_parameters() -> int:
    """Returns the parameters of UMT5-XXL on the device when its blocks are swapped."""
    outside = UMT5_EMBEDDING_PARAMETERS + 4096
    block = (formulas.UMT5_PARAMETERS - outside) // UMT5_LAYERS
    return outside + SWAP_BUFFERS * block


def clip_bytes(images: int = 1, element_bytes: int = 2) -> int:
    """Returns the bytes of the tensors of CLIP ViT-H/14 over 257 tokens an image."""
    dim, ffn, heads, tokens = 1280, 5120, 16, formulas.CLIP_TOKENS
    scores = 2 * heads * tokens**2 * _FLOAT
    return images * (scores + tokens * (2 * dim * _FLOAT + (6 * dim + 2 * ffn) * element_bytes))


# VAE


def vae_decode_bytes(
    width: int,
    height: int,
    *,
    chunk: int = 1,
    shape: VaeShape = WAN_VAE,
    element_bytes: int = 2,
) -> int:
    """Returns the bytes of decoding beside weights and latents; not a matter of the length.

    The remembered frames of every causal convolution, and the worst layer.

    Args:
        width: pixels.
        height: pixels.
        chunk: latent frames at a time.
        shape: widths of the VAE.
        element_bytes: 2 for half precision, 4 for float32.
    """
    kept, work = _decoder(shape, chunk)
    return round((kept + work) * width * height) * element_bytes


def vae_tiled_decode_bytes(
    size: tuple[int, int],
    tiles: list[tuple[int, int]],
    *,
    chunk: int = 1,
    shape: VaeShape = WAN_VAE,
    element_bytes: int = 2,
) -> int:
    """Returns the bytes of decoding in tiles.

    Each tile remembers its own frames for the whole video, so that overlapping tiles remember
    more than the whole picture; only the work of a layer shrinks. The blended piece is float32.

    Args:
        size: (width, height) of the picture, pixels.
        tiles: (width, height) of every tile.
        chunk: latent frames at a time.
        shape: widths of the VAE.
        element_bytes: as `vae_decode_bytes`.
    """
    kept, work = _decoder(shape, chunk)
    areas = [width * height for width, height in tiles]
    blended = 2 * 3 * 4 * chunk * size[0] * size[1] * _FLOAT
    return round(kept * sum(areas) + work * max(areas)) * element_bytes + blended


def vae_encode_bytes(
    width: int,
    height: int,
    num_frames: int,
    *,
    chunk: int = 1,
    shape: VaeShape = WAN_VAE,
    element_bytes: int = 2,
) -> int:
    """Returns the bytes of encoding F frames beside weights and latents; see `vae_decode_bytes`."""
    # A single frame keeps what a longer video would read again.
    frames = 1 if num_frames == 1 else 4 * chunk
    kept, work = _encoder(shape, frames)
    pieces = 2 * 3 * frames  # the frames going in, as they come and as one tensor
    return round((kept + work + pieces) * width * height) * element_bytes


def _residual(c_in: int, c_out: int, frames: int) -> tuple[int, int]:
    """Returns (kept, work) of a residual block, numbers per pixel.

    Work is input, window and output of the worse convolution; the second one also has the
    shortcut where the width changes.
    """
    shortcut = c_out * frames if c_in != c_out else 0
    first = c_in * frames + c_in * (frames + 2) + c_out * frames
    second = c_in * frames + c_out * (frames + 2) + c_out * frames + shortcut
    return 2 * (c_in + c_out), max(first, second)


def _decoder(shape: VaeShape, chunk: int) -> tuple[float, float]:
    """Returns (kept, work) of the decoder, numbers per pixel of the picture."""
    widths = [shape.base * m for m in reversed(shape.mult)]
    share, frames, channels = 1 / 64, chunk, widths[0]
    kept = share * 2 * (shape.z + 4 * widths[0])
    work = share * 8 * widths[0] * frames  # attention: normed, projected twice, output
    for level, width in enumerate(widths):
        for _ in range(shape.blocks + 1):
            block_kept, block_work = _residual(channels, width, frames)
            kept += share * block_kept
            work = max(work, share * block_work)
            channels = width
        if level == len(widths) - 1:
            break
        doubled = 2 if level < 2 else 1
        if doubled == 2:
            kept += share * 2 * width
        # The layer's input, the doubled frames, and the result: half as wide, four times the area.
        inside = frames * width + (doubled - 1) * 4 * frames * width
        outside = frames * width * (1 + (doubled - 1) * 2 + 2 * doubled)
        work = max(work, share * max(inside, outside))
        share, frames, channels = 4 * share, doubled * frames, width // 2
    kept += 2 * channels
    head = channels * frames + channels * (frames + 2) + 3 * frames
    return kept, max(work, head)


def _encoder(shape: VaeShape, frames: int) -> tuple[float, float]:
    """Returns (kept, work) of the encoder, numbers per pixel of the picture."""
    widths = [shape.base * m for m in shape.mult]
    share, channels = 1.0, widths[0]
    kept = 2.0 * 3
    work = float(3 * frames + 3 * (frames + 2) + channels * frames)
    for level, width in enumerate(widths):
        for _ in range(shape.blocks):
            block_kept, block_work = _residual(channels, width, frames)
            kept += share * block_kept
            work = max(work, share * block_work)
            channels = width
        if level == len(widths) - 1:
            break
        # Input, padded copy, and the result on a quarter of the area.
        work = max(work, share * width * frames * 2.25)
        share /= 4
        if level > 0:
            kept += share * width
            frames = max(1, frames // 2)
    kept += share * 2 * (4 * widths[-1] + widths[-1])
    return kept, work

"""`doctor --selftest`: what this device computes, against the same in float64 on the CPU.

Tensors and weights are drawn from seeds, so that nothing is needed but the package. The CPU is
what the reference outputs are replayed on (`doctor --parity`); a device that agrees with it here
computes what they say. Errors are |found - expected| / |expected| over all elements. Tolerances
are stated per dtype and are at least three times the errors measured on a CPU; on a GPU they are
unverified.

Shape letters: B batch, L tokens, H heads, D head width, M rows, K input width, N output width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.tiny import TINY_T2V, TINY_VAE, seeded_state
from xicon_infer.doctor_text import Number
from xicon_infer.models.vae import WanVAE
from xicon_infer.models.wan import WanTransformer
from xicon_infer.ops.attention import EIGHT_BIT, attention, kernel_context, probe_backends
from xicon_infer.ops.attention_gate import TOLERANCE as EIGHT_BIT_TOLERANCE
from xicon_infer.ops.linear import Fp8Linear, dequantize, matmul_problem, quantize_weight
from xicon_infer.ops.rope import apply_rope, grid_rope
from xicon_infer.runtime import pick_device, pick_dtype

Model = TypeVar("Model", bound=nn.Module)

ROUNDING = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest relative error of one operation, by dtype: a kernel may add up in another order."""

DEPTH = 3.0
"""A whole network may be off by that many times as much."""

FP8_MATMUL = 0.1
"""Activations are rounded to three bits of mantissa: 2.6 % each, root mean square."""

_TOKENS = 192
_HEADS = 2
_HEAD_DIM = 128


def pick(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Returns device and dtype for names as "auto"; see `xicon_infer.runtime`.

    Raises:
        BackendUnavailable: there is no such device.
    """
    where = pick_device(device)
    return where, pick_dtype(dtype, where)


def self_test(device: torch.device, dtype: torch.dtype) -> list[Number]:
    """Returns every comparison.

    Args:
        device: what is tested.
        dtype: torch.float32, float16 or bfloat16.
    """
    with torch.no_grad():
        return [
            *attention_numbers(device, dtype),
            rope_number(device, dtype),
            *fp8_numbers(device, dtype),
            transformer_number(device, dtype),
            *vae_numbers(device, dtype),
        ]


def relative(found: Tensor, expected: Tensor) -> float:
    """Returns |found - expected| / |expected|, in float64 on the CPU."""
    wanted = expected.double().cpu()
    return ((found.double().cpu() - wanted).norm() / wanted.norm()).item()


def drawn(name: str, *shape: int) -> Tensor:
    """Returns normal numbers, float64 on the CPU, the same for the same name."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def convolution_rounding(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the largest relative error of a convolution.

    On a GPU cuDNN rounds the factors of float32 convolutions to ten bits, unless it is told not to.
    """
    tf32 = device.type == "cuda" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    return ROUNDING[torch.float16 if tf32 else dtype]


def attention_numbers(device: torch.device, dtype: torch.dtype) -> Iterator[Number]:
    """Yields one comparison per kernel; those that do not run here are skipped."""
    shape = (1, _TOKENS, _HEADS, _HEAD_DIM)
    q, k, v = (drawn(name, *shape).to(dtype) for name in "qkv")
    wide_q, wide_k, wide_v = (part.double().transpose(1, 2) for part in (q, k, v))
    expected = F.scaled_dot_product_attention(wide_q, wide_k, wide_v).transpose(1, 2)
    for probe in probe_backends(device, dtype, _HEAD_DIM):
        name = f"attention {probe.name}"
        if not probe.available:
            yield Number(name, float("nan"), ROUNDING[dtype], probe.reason)
            continue
        with kernel_context(probe.name):
            found = attention(q.to(device), k.to(device), v.to(device), probe.name)
        tolerance = EIGHT_BIT_TOLERANCE if probe.name in EIGHT_BIT else ROUNDING[dtype]
        yield Number(name, relative(found, expected), tolerance)


def rope_number(device: torch.device, dtype: torch.dtype) -> Number:
    """Returns the comparison of the position embedding."""
    t, h, w = (torch.arange(n, dtype=torch.float64) for n in (3, 4, 5))
    table = grid_rope(t, h, w, _HEAD_DIM)
    x = drawn("rope", 1, 60, _HEADS, _HEAD_DIM).to(dtype)
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
    turn = torch.complex(table.cos.double(), table.sin.double())[None, :, None]
    expected = torch.view_as_real(pairs * turn).flatten(-2)
    found = apply_rope(x.to(device), table.to(device))
    return Number("position embedding", relative(found, expected), ROUNDING[dtype])


def fp8_numbers(device: torch.device, dtype: torch.dtype) -> Iterator[Number]:
    """Yields the comparisons of fp8 weights: brought to the dtype, and multiplied as they are."""
    x = drawn("x", 48, 256).to(dtype)
    weight, scale = quantize_weight(drawn("weight", 128, 256).float(), per_row=True)
    expected = x.double() @ dequantize(weight, scale, torch.float64).T
    layer = Fp8Linear(256, 128, bias=False, scale_shape=(128, 1))
    layer.load_state_dict({"weight": weight, "scale_weight": scale})
    layer = layer.to(device)
    placed = x.to(device)
    yield Number("fp8 dequant", relative(layer(placed), expected), ROUNDING[dtype])
    for matmul in ("scaled_mm_row", "scaled_mm_tensor"):
        if reason := matmul_problem(matmul, str(device)):
            yield Number(f"fp8 {matmul}", float("nan"), FP8_MATMUL, reason)
            continue
        layer.matmul = matmul
        yield Number(f"fp8 {matmul}", relative(layer(placed), expected), FP8_MATMUL)


def transformer_number(device: torch.device, dtype: torch.dtype) -> Number:
    """Returns the comparison of a small transformer."""
    latents, timestep = drawn("latents", 1, 16, 3, 8, 8).float(), torch.tensor([500.0])
    text = drawn("text", 7, 64).float()

    def run(where: torch.device, kind: torch.dtype) -> Tensor:
        model = _seeded(WanTransformer(TINY_T2V)).to(where, kind)
        context = model.encode_context([text.to(where, kind)])
        return model(latents.to(where), timestep.to(where), context)

    expected = run(torch.device("cpu"), torch.float64)
    found = run(device, dtype)
    return Number("transformer", relative(found, expected), DEPTH * ROUNDING[dtype])


def vae_numbers(device: torch.device, dtype: torch.dtype) -> Iterator[Number]:
    """Yields the comparisons of a small VAE: both directions, and pieces of another length."""
    latents, video = drawn("z", 1, 16, 6, 4, 4), drawn("video", 1, 3, 9, 32, 32).clamp(-1, 1)
    exact = _vae().double()
    vae = _vae().to(device, dtype).to_channels_last()
    tolerance = DEPTH * convolution_rounding(device, dtype)
    decoded = vae.decode(latents.to(device, dtype), chunk=1)
    yield Number("vae decode", relative(decoded, exact.decode(latents)), tolerance)
    pieces = vae.decode(latents.to(device, dtype), chunk=4)
    yield Number("vae pieces of 1 and 4", relative(pieces, decoded), tolerance)
    encoded = vae.encode(video.to(device, dtype), chunk=2)
    yield Number("vae encode", relative(encoded, exact.encode(video)), tolerance)


def _vae() -> WanVAE:
    return _seeded(WanVAE(TINY_VAE))


def _seeded(model: Model) -> Model:
    """Returns a model with weights that are drawn from the names of its tensors."""
    model.load_state_dict(seeded_state(model))
    return model.eval()

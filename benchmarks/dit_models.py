"""The candidates of `benchmarks.dit`: the same transformer, built and run in different ways.

Weights are random and made on the device, tensor by tensor: each is drawn from a seed of its own
name, so that two candidates of one engine have the same weights in whatever dtype they hold them.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from xicon_infer.formulas import LATENT_CHANNELS, WAN_I2V_14B, DitShape
from xicon_infer.models.wan import WanConfig, WanTransformer
from xicon_infer.ops.linear import Matmul, quantize_weight, replace_linears, use_matmul
from xicon_infer.ops.placing import kv_layers
from xicon_infer.weights.strict import dit_policy

TINY_SHAPE = DitShape(
    64, 128, 2, 2, 36, image_tokens=5, text_tokens=8, text_dim=32, image_dim=16, time_dim=32
)
SHAPE = WAN_I2V_14B
WEIGHT_SPREAD = 0.02
"""Of random weights at the full width; narrower models get more, so that blocks do as much."""
TIMESTEP = 900.0

GRIDS = {
    32760: (21, 30, 52),
    29757: (21, 13, 109),
    24024: (22, 42, 26),
    7917: (21, 13, 29),
    4096: (4, 32, 32),
}
"""Tokens of a forward pass -> a grid of plain Wan that has as many: frames, rows, columns."""

TINY_GRIDS = {48: (3, 4, 4), 32: (2, 4, 4), 16: (1, 4, 4)}

# What diffusers is asked for with its best flags: the first that runs.
BEST_ATTENTION = ("_flash_3", "_native_cudnn", "_native_flash", "native")


@dataclass(frozen=True)
class Candidate:
    """One way to hold and run the transformer.

    name. engine: whose code. matmul: how fp8 weights multiply; None: weights in bf16. fuse: one
    product for q, k and v. compiled: torch.compile of the repeated block. kernels: of ours, between
    the products. attention: a kernel of ours; diffusers with best flags chooses among its own.
    gate: the most relative error allowed. needs: packages besides our own.
    """

    name: str
    engine: Literal["diffusers", "ours"]
    says: str
    matmul: Matmul | None = None
    fuse: bool = False
    compiled: bool = False
    kernels: Literal["eager", "triton"] = "eager"
    attention: str = "auto"
    gate: float = 1e-2
    needs: tuple[str, ...] = ()

    @property
    def fp8_products(self) -> bool:
        """Returns True if the linear layers multiply in fp8."""
        return self.matmul not in (None, "dequant") or TORCHAO in self.needs


TORCHAO = "torchao"
BASELINE = "B0"
SWITCHED = "O1"
"""What each optimisation is put on alone."""

CANDIDATES = {
    each.name: each
    for each in (
        Candidate("B0", "diffusers", "diffusers, bf16, as it comes", needs=("diffusers",)),
        Candidate(
            "B1",
            "diffusers",
            "diffusers, bf16, best attention kernel, fused projections, compiled blocks",
            fuse=True,
            compiled=True,
            needs=("diffusers",),
        ),
        Candidate(
            "B2",
            "diffusers",
            "B1 with fp8 products by torchao, scale per row",
            fuse=True,
            compiled=True,
            gate=4e-2,
            needs=("diffusers", TORCHAO),
        ),
        Candidate("O1", "ours", "bf16, PyTorch between the products"),
        Candidate("O1f", "ours", "bf16, fused q, k, v", fuse=True),
        Candidate("O1c", "ours", "bf16, compiled blocks", compiled=True),
        Candidate("O1fc", "ours", "bf16, fused and compiled", fuse=True, compiled=True),
        Candidate("O1t", "ours", "bf16, our kernels", kernels="triton"),
        Candidate("O1ft", "ours", "bf16, fused, our kernels", fuse=True, kernels="triton"),
        Candidate("O2", "ours", "fp8 storage, dequantised at each call", "dequant", gate=4e-2),
        Candidate("O3r", "ours", "fp8 products, scale per row", "scaled_mm_row", gate=4e-2),
        Candidate("O3t", "ours", "fp8 products, scale per tensor", "scaled_mm_tensor", gate=4e-2),
        Candidate(
            "O3rc",
            "ours",
            "fp8 products, scale per row, compiled blocks",
            "scaled_mm_row",
            compiled=True,
            gate=4e-2,
        ),
        Candidate(
            "O3",
            "ours",
            "fp8 products, scale per row, fused q, k, v, our kernels",
            "scaled_mm_row",
            fuse=True,
            kernels="triton",
            gate=4e-2,
        ),
        Candidate(
            "O4",
            "ours",
            "O3 with 8-bit attention",
            "scaled_mm_row",
            fuse=True,
            kernels="triton",
            attention="auto8",
            gate=6e-2,
        ),
    )
}
"""All candidates by name. `O1@flash` is O1 with a forced attention kernel."""


def candidate(name: str) -> Candidate:
    """Returns a candidate by name; "NAME@KERNEL" forces the attention kernel.

    Raises:
        ValueError: there is no such candidate, or the kernel is not ours to force.
    """
    base, _, kernel = name.partition("@")
    if base not in CANDIDATES:
        raise ValueError(f"candidate {base!r}: allowed are {', '.join(CANDIDATES)}")
    found = CANDIDATES[base]
    if not kernel:
        return found
    if found.engine != "ours":
        raise ValueError(f"{name!r}: only kernels of our own candidates can be forced")
    says = f"{found.says}, attention {kernel}"
    return replace(found, name=name, says=says, attention=kernel)


class Built(NamedTuple):
    """A model that is ready: one forward pass over a grid of tokens, and its attention kernel.

    model: the transformer itself, where it is ours.
    """

    forward: Callable[[tuple[int, int, int]], Tensor]
    attention: str
    model: Any = None


def build_candidate(
    found: Candidate, shape: DitShape, device: str, *, exact: bool = False
) -> Built:
    """Returns a candidate, ready to run.

    Args:
        found: the candidate.
        shape: sizes of the model.
        device: where to make it.
        exact: float32 weights and arithmetic instead, eager: what errors are measured against.
    """
    build = build_diffusers if found.engine == "diffusers" else build_ours
    return build(found, shape, device, exact=exact)


def build_ours(found: Candidate, shape: DitShape, device: str, *, exact: bool) -> Built:
    """Returns our transformer; keys and values of the context are cached.

    The weights that only they need are dropped then, as the memory plan of a job does.
    """
    fp8 = found.matmul if not exact else None
    kernels = "eager" if exact else found.kernels
    policy = dit_policy(torch.float32 if exact else torch.bfloat16)
    with torch.device("meta"):
        model = WanTransformer(wan_config(shape)).eval().requires_grad_(False)
    if fp8:
        matrices = {
            name: weight
            for name, weight in model.blocks.named_parameters(prefix="blocks")
            if weight.ndim == 2 and policy.keeps_fp8(name)
        }
        # The published files have one scale per tensor.
        per_row = fp8 == "scaled_mm_row"
        replace_linears(
            model,
            dict.fromkeys(matrices, torch.float8_e4m3fn),
            {
                name.replace(".weight", ".scale_weight"): (len(p), 1) if per_row else (1,)
                for name, p in matrices.items()
            },
        )
    load_random(model, device, policy.dtype_of, width=shape.dim)
    if fp8:
        use_matmul(model, fp8, torch.device(device))
    told = inputs((1, 4, 4), shape, device)
    model.attention_request = "auto" if exact else found.attention
    model.kernels_request = kernels
    dtype = model.dtype
    context = model.encode_context([told["text"][0].to(dtype)], told["image"].to(dtype))
    for layer in kv_layers(model.layers):
        layer.to("meta")
    if found.fuse and not exact:
        model.fuse_projections()
    if found.compiled and not exact:
        for block in model.layers:
            block.compile(**compile_options(device))

    def forward(grid: tuple[int, int, int]) -> Tensor:
        told = inputs(grid, shape, device)
        latents, condition = told["latents"].split((LATENT_CHANNELS, shape.in_channels - 16), 1)
        return model(latents, told["timestep"], context, condition)

    return Built(forward, model.backend, model)


def wan_config(shape: DitShape) -> WanConfig:
    """Returns the configuration of an image-to-video model of these sizes."""
    return WanConfig(
        dim=shape.dim,
        ffn_dim=shape.ffn_dim,
        num_heads=shape.heads,
        num_layers=shape.layers,
        in_dim=shape.in_channels,
        text_dim=shape.text_dim,
        text_len=shape.text_tokens,
        image_dim=shape.image_dim,
        freq_dim=shape.time_dim,
    )


def build_diffusers(found: Candidate, shape: DitShape, device: str, *, exact: bool) -> Built:
    """Returns diffusers' transformer; it projects the context every time."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model: Any = WanTransformer3DModel(
            num_attention_heads=shape.heads,
            attention_head_dim=shape.dim // shape.heads,
            in_channels=shape.in_channels,
            out_channels=LATENT_CHANNELS,
            text_dim=shape.text_dim,
            freq_dim=shape.time_dim,
            ffn_dim=shape.ffn_dim,
            num_layers=shape.layers,
            image_dim=shape.image_dim,
            added_kv_proj_dim=shape.dim,
        )
    model.eval().requires_grad_(False)
    # Its tables are computed when it is made, which gives nothing on the meta device.
    model.rope = type(model.rope)(shape.dim // shape.heads, (1, 2, 2), 1024).to(device)
    dtype = torch.float32 if exact else torch.bfloat16

    def dtype_of(name: str) -> torch.dtype:
        kept = any(part in name for part in model._keep_in_fp32_modules)
        return torch.float32 if kept else dtype  # as its own loader does it

    load_random(model, device, dtype_of, width=shape.dim)
    best = found.compiled and not exact
    if best:
        model.fuse_qkv_projections()
    if TORCHAO in found.needs and not exact:
        use_torchao(model)

    def forward(grid: tuple[int, int, int]) -> Tensor:
        told = inputs(grid, shape, device)
        (out,) = model(
            told["latents"].to(dtype),
            told["timestep"],
            told["text"].to(dtype),
            told["image"].to(dtype),
            return_dict=False,
        )
        return out

    if not best:
        return Built(forward, "its default")
    kernel = choose_attention(model, lambda: forward((1, 4, 4)))
    model.compile_repeated_blocks(**compile_options(device))
    return Built(forward, kernel)


def use_torchao(model: Any) -> None:
    """Has the linear layers of the blocks multiply in fp8, with dynamic scales per row."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    quantize_(model.blocks, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def choose_attention(model: Any, attempt: Callable[[], Tensor]) -> str:
    """Sets the first kernel of `BEST_ATTENTION` with which a forward pass runs; returns it."""
    for kernel in BEST_ATTENTION[:-1]:
        try:
            model.set_attention_backend(kernel)
            attempt()
        except (RuntimeError, ValueError, ImportError):  # not installed, or not for this card
            continue
        return kernel
    model.set_attention_backend(BEST_ATTENTION[-1])
    return BEST_ATTENTION[-1]


def compile_options(device: str) -> dict[str, Any]:
    """Returns how blocks are compiled: one graph; on the CPU traced only, so that tests are quick.

    Every length gets kernels of its own, as a job with one or two lengths would have them.
    """
    torch._dynamo.config.recompile_limit = 64
    backend = "inductor" if device.startswith("cuda") else "eager"
    return {"fullgraph": True, "dynamic": False, "backend": backend}


def load_random(
    model: nn.Module, device: str, dtype_of: Callable[[str], torch.dtype], *, width: int
) -> None:
    """Gives a model on the meta device random weights, made on the device one by one.

    Args:
        model: its fp8 layers get weights rounded from the same numbers, with their scale.
        device: where to make them.
        dtype_of: of a tensor that is not fp8, by name.
        width: of the model.
    """
    spread = WEIGHT_SPREAD * math.sqrt(SHAPE.dim / width)
    state: dict[str, Tensor] = {}
    for name, empty in model.state_dict().items():
        if name.endswith("scale_weight"):
            continue  # comes with its weight
        value = random_tensor(name, empty.shape, device, spread)
        scale_name = name.replace(".weight", ".scale_weight")
        if empty.dtype == torch.float8_e4m3fn:
            per_row = model.get_buffer(scale_name).numel() > 1
            state[name], state[scale_name] = quantize_weight(value, per_row=per_row)
        else:
            state[name] = value.to(dtype_of(name))
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)


def random_tensor(name: str, shape: torch.Size, device: str, spread: float) -> Tensor:
    """Returns float32 weights: norms 1, modulation normal / sqrt(width), else normal * spread."""
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    if name.endswith(("modulation", "scale_shift_table")):
        spread = shape[-1] ** -0.5
    return torch.randn(shape, device=device, generator=generator).mul_(spread)


@functools.lru_cache(maxsize=8)
def inputs(grid: tuple[int, int, int], shape: DitShape, device: str) -> dict[str, Tensor]:
    """Returns the same random inputs for every candidate: one sample with a grid of tokens."""
    frames, rows, columns = grid
    sizes = {
        "latents": (1, shape.in_channels, frames, 2 * rows, 2 * columns),
        "text": (1, shape.text_tokens, shape.text_dim),
        "image": (1, shape.image_tokens, shape.image_dim),
    }
    told = {
        name: torch.randn(
            size, device=device, generator=torch.Generator(device).manual_seed(len(name))
        )
        for name, size in sizes.items()
    }
    return told | {"timestep": torch.full((1,), TIMESTEP, device=device)}

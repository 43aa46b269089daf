"""The networks of `benchmarks.job`: what loads real weights, fed with random ones.

Nothing is read from a file. Each tensor is drawn on the device of the job from a seed of its own
name, the matrices of the blocks rounded to fp8 there with one scale per row, as a prepared file has
them, and then handed to `pipelines.loading.assemble` under the published names. Storage, products,
kernels and memory plan are then those of a real job.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from pipelines import Pipeline, encode, loading, recipe_for, tiny
from pipelines.loading import LoadOptions, assemble, transformer_class
from xicon_infer.models.scail import SCAIL_14B
from xicon_infer.models.text import UMT5_XXL, TextConfig, build_text_encoder
from xicon_infer.models.vae import WanVAE
from xicon_infer.models.vae_config import VAEConfig
from xicon_infer.models.vision import CLIP_VIT_H, VisionConfig, build_image_encoder
from xicon_infer.models.wan import WAN_I2V_14B, WanConfig
from xicon_infer.ops.linear import quantize_weight
from xicon_infer.weights.strict import dit_policy

TEXT_TOKENS = 24
"""Of a prompt, where there is no text encoder to count them."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of the networks of a pipeline. fp8: whether the blocks are stored so."""

    transformer: WanConfig
    vae: VAEConfig
    text: TextConfig
    vision: VisionConfig
    fp8: bool = True


def sizes_of(pipeline: str, *, small: bool) -> Sizes:
    """Returns the published sizes of "scail" or "steady_dancer", or those of the tiny preset."""
    scail = pipeline == "scail"
    if small:
        config = tiny.TINY_SCAIL if scail else tiny.TINY_I2V
        return Sizes(config, tiny.TINY_VAE, tiny.tiny_text_config(), tiny.TINY_VISION)
    return Sizes(SCAIL_14B if scail else WAN_I2V_14B, VAEConfig(), UMT5_XXL, CLIP_VIT_H)


def build(pipeline: str, sizes: Sizes, options: LoadOptions) -> Pipeline:
    """Returns a pipeline with random weights, loaded as the options say.

    Args:
        pipeline: as "scail".
        sizes: of its networks.
        options: of the job.
    """
    transformer = on_meta(lambda: transformer_class(pipeline)(sizes.transformer))
    states = {
        "transformer": transformer_state(transformer, options, fp8=sizes.fp8),
        "vae": random_state(on_meta(lambda: WanVAE(sizes.vae)), options),
    }
    states["text_encoder"] = {}
    states["image_encoder"] = {}
    if encoders_installed():
        states["text_encoder"] = random_state(
            on_meta(lambda: build_text_encoder(sizes.text)), options, dtype=options.encoder_dtype
        )
        states["image_encoder"] = vision_state(sizes.vision, options)
    sources = dict.fromkeys((*states, "tokenizer"), "random, made on the device")
    heads = sizes.vision.num_heads
    parts = assemble(pipeline, states, tiny.tiny_tokens(), sources, options, vision_heads=heads)
    return recipe_for(pipeline, parts)


def transformer_state(model: nn.Module, options: LoadOptions, *, fp8: bool) -> dict[str, Tensor]:
    """Returns the tensors of a transformer as a prepared file has them: fp8, a scale per row."""
    policy = dit_policy(options.dtype)
    blocks = model.get_submodule("blocks")
    matrices = {f"blocks.{name}" for name, weight in blocks.named_parameters() if weight.ndim == 2}
    state: dict[str, Tensor] = {}
    for name, empty in model.state_dict().items():
        value = random_value(name, empty.shape, options.device)
        if fp8 and name in matrices and policy.keeps_fp8(name):
            value, scale = quantize_weight(value, per_row=True)
            state[name.replace(".weight", ".scale_weight")] = scale.to(options.home)
        else:
            value = value.to(policy.dtype_of(name))
        state[name] = value.to(options.home)
    return state


def random_state(
    model: nn.Module, options: LoadOptions, *, prefix: str = "", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Returns a random value for every tensor of a module that was built on the meta device."""
    dtype = dtype or options.encoder_dtype
    state = {
        f"{prefix}{name}": random_value(name, empty.shape, options.device).to(dtype)
        for name, empty in model.state_dict().items()
        if name != "shared.weight"
    }
    if "encoder.embed_tokens.weight" in state:  # one table under two names
        state["shared.weight"] = state["encoder.embed_tokens.weight"]
    return {name: value.to(options.home) for name, value in state.items()}


def vision_state(config: VisionConfig, options: LoadOptions) -> dict[str, Tensor]:
    """Returns the tensors of the image encoder, already cut to the layers that are run."""
    tower = on_meta(lambda: build_image_encoder(config))
    return random_state(tower, options, prefix="vision_model.")


def random_value(name: str, shape: torch.Size, device: torch.device) -> Tensor:
    """Returns float32 weights on the device that keep a signal at its size, drawn by name."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, device=device, generator=generator)
    if name.endswith("bias"):
        return noise.mul_(0.02)
    if "norm" in name or name.endswith("gamma"):
        return noise.mul_(0.05).add_(1)
    if "modulation" in name:
        return noise.mul_(0.1)
    return noise.div_(max(1, noise[0].numel()) ** 0.5)


def on_meta(build_one: Callable[[], nn.Module]) -> nn.Module:
    """Returns a module without memory."""
    with torch.device("meta"):
        return build_one()


def encoders_installed() -> bool:
    """Returns whether the library of the text and image encoders is there."""
    return find_spec("transformers") is not None


@contextmanager
def stand_ins(sizes: Sizes) -> Iterator[list[str]]:
    """Has random answers in place of encoders inside, where their library is not installed.

    Yields what was left out, in sentences.
    """
    if encoders_installed():
        yield []
        return

    def texts(_model: Any, _tokens: Any, prompts: list[str], *, device: Any) -> list[Tensor]:
        return [
            torch.randn(TEXT_TOKENS, sizes.transformer.text_dim, device=device) for _ in prompts
        ]

    def pictures(_model: Any, pictures: list[Any], _preprocess: Any) -> Tensor:
        side = sizes.vision.image_size // sizes.vision.patch_size
        return torch.randn(len(pictures), side * side + 1, sizes.transformer.image_dim or 0)

    with ExitStack() as stack:
        for module, name, stand_in in (
            (loading, "_load_text", lambda *_: nn.Identity()),
            (loading, "_load_image", lambda *_: nn.Identity()),
            (encode, "encode_prompts", texts),
            (encode, "encode_image", pictures),
        ):
            stack.enter_context(mock.patch.object(module, name, stand_in))
        yield ["text and clip: transformers is not installed, random states were passed on"]

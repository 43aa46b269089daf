"""The tiny preset: every component of the real classes, small, with weights made from a seed.

Nothing is shipped and nothing is downloaded: each tensor is drawn from a generator seeded with
its own name, so that the same video comes out on every machine. The tensors carry the names and
layouts of the published files and go through the same loading code as real weights.

These weights are random, so pictures are noise; what they show is that the whole machine runs, how
long it takes, and that its files are right. SCAIL alone has a trained transformer and VAE
(`pipelines.tiny_trained`) and takes only its encoders from here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from xicon_infer.models.scail import ScailTransformer
from xicon_infer.models.text import TextConfig, build_text_encoder
from xicon_infer.models.tiny_decoder import TinyDecoder, TinyDecoderConfig
from xicon_infer.models.tokenizer import Tokenizer, tiny_tokenizer
from xicon_infer.models.vae import WanVAE
from xicon_infer.models.vae_config import VAEConfig
from xicon_infer.models.vision import VisionConfig, build_image_encoder
from xicon_infer.models.wan import WanConfig

TINY_SCAIL = WanConfig(
    dim=128, ffn_dim=256, num_heads=1, num_layers=2, in_dim=20, text_dim=64, image_dim=64
)
TINY_I2V = replace(TINY_SCAIL, in_dim=36)
TINY_T2V = replace(TINY_SCAIL, in_dim=16, image_dim=None)
# Narrower layers fall off the fast convolutions of the CPU and take longer.
TINY_VAE = VAEConfig(dim=16)
TINY_DECODER = TinyDecoderConfig((32, 16, 16, 16))
TINY_VISION = VisionConfig(
    width=64, d_ff=128, num_layers=2, num_heads=4, image_size=56, patch_size=14
)


def tiny_tokens() -> Tokenizer:
    """Returns the tokenizer of the tiny text encoder."""
    return tiny_tokenizer()


def tiny_text_config() -> TextConfig:
    """Returns the sizes of the tiny text encoder, which fit its tokenizer."""
    return TextConfig(
        vocab_size=tiny_tokens().vocab_size,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
    )


def tiny_transformer_state(
    build: Callable[[WanConfig], nn.Module] = ScailTransformer, config: WanConfig = TINY_SCAIL
) -> dict[str, Tensor]:
    """Returns the tensors of a tiny transformer checkpoint, original names, float32.

    Args:
        build: the class, as `ScailTransformer`.
        config: its sizes.
    """
    return seeded_state(_on_meta(lambda: build(config)))


def tiny_vae_state(config: VAEConfig = TINY_VAE) -> dict[str, Tensor]:
    """Returns the tensors of a tiny VAE checkpoint, original names, float32."""
    return seeded_state(_on_meta(lambda: WanVAE(config)))


def tiny_decoder_state() -> dict[str, Tensor]:
    """Returns the tensors of a small decoder's checkpoint, narrower than the published one."""
    return seeded_state(_on_meta(lambda: TinyDecoder(TINY_DECODER)))


def tiny_text_state() -> dict[str, Tensor]:
    """Returns the tensors of a tiny UMT5 checkpoint, transformers' names, float32."""
    state = seeded_state(_on_meta(lambda: build_text_encoder(tiny_text_config())))
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    return state


def tiny_vision_state() -> dict[str, Tensor]:
    """Returns the tensors of a tiny CLIP vision checkpoint, one layer more than is run."""
    config = replace(TINY_VISION, num_layers=TINY_VISION.num_layers + 1)
    state = seeded_state(_on_meta(lambda: build_image_encoder(config)))
    for name in ("weight", "bias"):
        state[f"post_layernorm.{name}"] = torch.full((config.width,), float(name == "weight"))
    return {f"vision_model.{name}": value for name, value in state.items()}


def seeded_state(module: nn.Module) -> dict[str, Tensor]:
    """Returns a value for every tensor of a module, drawn from a generator seeded by its name."""
    return {name: _seeded(name, value.shape) for name, value in module.state_dict().items()}


def _seeded(name: str, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.02 * noise
    if "norm" in name or name.endswith("gamma"):
        return 1 + 0.05 * noise
    if "modulation" in name:
        return 0.1 * noise
    # Keeps the variance of the signal: one over the square root of the inputs of one output.
    return noise / max(1, noise[0].numel()) ** 0.5


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()

"""What a checkpoint is, told from the names and shapes of its tensors.

File names are never looked at: community files are renamed freely. Sizes come out under the names
of the models' configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from xicon_infer.errors import WeightsError
from xicon_infer.ops.lora_keys import is_lora_key
from xicon_infer.weights.keymaps import find_naming, find_prefix, wan_names

Kind = Literal[
    "wan_t2v",
    "wan_i2v",
    "wan_flf2v",
    "scail",
    "scail2",
    "steady_dancer",
    "vae",
    "text_encoder",
    "image_encoder",
    "lora",
]

Shapes = Mapping[str, tuple[int, ...]]

HEAD_DIM = 128
"""Width of one attention head in every published Wan transformer."""

_T5 = {
    "wan": ("token_embedding.weight", "blocks.", "attn.q.weight", "ffn.gate.0.weight"),
    "transformers": (
        "shared.weight",
        "encoder.block.",
        "layer.0.SelfAttention.q.weight",
        "layer.1.DenseReluDense.wi_0.weight",
    ),
}
"""Naming -> embedding, start of a block, and inside it the query and the feed-forward."""

_T5_BIAS = {
    "wan": "pos_embedding.embedding.weight",
    "transformers": "layer.0.SelfAttention.relative_attention_bias.weight",
}

_CLIP = {
    "openclip": ("visual.", "patch_embedding.weight", "pos_embedding", "transformer.", "mlp.0"),
    "transformers": (
        "",
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
        "encoder.layers.",
        "mlp.fc1",
    ),
}
"""Naming -> prefix, patch embedding, positions, start of a layer, first feed-forward layer."""


@dataclass(frozen=True)
class Detected:
    """What a checkpoint is.

    kind: the model. naming: the layout of its names ("wan", "diffusers", "sat", "transformers",
    "openclip", "original"). prefix: what stands before every name, "" for nothing. dims: sizes by
    name; for a transformer those of its configuration.
    """

    kind: Kind
    naming: str
    prefix: str
    dims: dict[str, int]


def detect(shapes: Shapes, *, num_heads: int | None = None) -> Detected:
    """Returns what the tensors belong to.

    Args:
        shapes: shape by tensor name, as `open_checkpoint` gives them.
        num_heads: of a transformer; None for dim / 128, which holds for every published one.

    Raises:
        WeightsError: the tensors are of no known kind, or one that tells a size is missing.
    """
    if any(is_lora_key(name) for name in shapes):
        return Detected("lora", "original", "", {})
    prefix = find_prefix(shapes.keys())
    plain = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
    try:
        found = (
            _detect_transformer(plain, prefix, num_heads)
            or _detect_text(plain, prefix)
            or _detect_image(plain, prefix)
            or _detect_vae(plain, prefix)
        )
    except (KeyError, IndexError, ValueError) as error:
        raise WeightsError(f"the checkpoint is incomplete: {error} is missing or odd") from error
    if found is None:
        sample = ", ".join(sorted(shapes)[:5])
        raise WeightsError(
            f"unknown checkpoint: {len(shapes)} tensors, as {sample or 'none'}. Known are Wan2.1 "
            "transformers (text, image, SCAIL, SteadyDancer), VAE, UMT5, CLIP vision and LoRAs."
        )
    return found


def _detect_transformer(plain: Shapes, prefix: str, num_heads: int | None) -> Detected | None:
    naming = find_naming(plain.keys())
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in plain.items():
        targets = wan_names(name, naming)
        rows = (shape[0] // len(targets),) if shape and len(targets) > 1 else shape[:1]
        shapes.update(dict.fromkeys(targets, (*rows, *shape[1:])))
    if "patch_embedding.weight" not in shapes or "head.modulation" not in shapes:
        return None
    dim, in_dim, *patch = shapes["patch_embedding.weight"]
    cells = 1
    for size in patch:
        cells *= size
    dims = {
        "dim": dim,
        "ffn_dim": shapes["blocks.0.ffn.0.bias"][0],
        "num_heads": max(1, dim // HEAD_DIM) if num_heads is None else num_heads,
        "num_layers": _count(shapes, "blocks."),
        "in_dim": in_dim,
        "out_dim": shapes["head.head.weight"][0] // cells,
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
    }
    if "img_emb.proj.0.weight" in shapes:
        dims["image_dim"] = shapes["img_emb.proj.0.weight"][0]
    return Detected(_transformer_kind(shapes), naming, prefix, dims)


def _transformer_kind(shapes: Shapes) -> Kind:
    if any(name.startswith("condition_embedding_") for name in shapes):
        return "steady_dancer"
    if "patch_embedding_pose.weight" in shapes:
        return "scail2" if "patch_embedding_mask.weight" in shapes else "scail"
    if "img_emb.emb_pos" in shapes:
        return "wan_flf2v"
    return "wan_i2v" if "blocks.0.cross_attn.k_img.weight" in shapes else "wan_t2v"


def _detect_text(plain: Shapes, prefix: str) -> Detected | None:
    for naming, (embedding, block, query, gate) in _T5.items():
        if embedding not in plain or f"{block}0.{query}" not in plain:
            continue
        vocab_size, d_model = plain[embedding]
        num_buckets, num_heads = plain[f"{block}0.{_T5_BIAS[naming]}"]
        dims = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "d_kv": plain[f"{block}0.{query}"][0] // num_heads,
            "d_ff": plain[f"{block}0.{gate}"][0],
            "num_layers": _count(plain, block),
            "num_heads": num_heads,
            "num_buckets": num_buckets,
        }
        return Detected("text_encoder", naming, prefix, dims)
    return None


def _detect_image(plain: Shapes, prefix: str) -> Detected | None:
    if any(name.startswith("vision_model.") for name in plain):
        prefix += "vision_model."
        plain = {name.removeprefix("vision_model."): shape for name, shape in plain.items()}
    for naming, (start, patch, positions, layer, mlp) in _CLIP.items():
        if start + patch not in plain or start + positions not in plain:
            continue
        width, _, patch_size, _ = plain[start + patch]
        patches = plain[start + positions][-2] - 1  # one position is the class token's
        dims = {
            "width": width,
            "d_ff": plain[f"{start}{layer}0.{mlp}.weight"][0],
            "num_layers": _count(plain, start + layer),
            "image_size": round(patches**0.5) * patch_size,
            "patch_size": patch_size,
        }
        return Detected("image_encoder", naming, prefix, dims)
    return None


def _detect_vae(plain: Shapes, prefix: str) -> Detected | None:
    for naming, first, last, latent in (
        ("original", "encoder.conv1", "decoder.conv1", "conv2"),
        ("diffusers", "encoder.conv_in", "decoder.conv_in", "post_quant_conv"),
    ):
        if f"{latent}.weight" in plain and f"{last}.weight" in plain:
            dims = {
                "dim": plain[f"{first}.weight"][0],
                "decoder_dim": plain[f"{last}.weight"][0],
                "z_dim": plain[f"{latent}.weight"][0],
            }
            return Detected("vae", naming, prefix, dims)
    return None


def _count(shapes: Shapes, start: str) -> int:
    """Returns how many different numbers follow `start` in the names."""
    return len({n.removeprefix(start).split(".")[0] for n in shapes if n.startswith(start)})

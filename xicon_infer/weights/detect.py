"""What a checkpoint is, told from the names and shapes of its tensors.

File names are never looked at: community files are renamed freely. Sizes come out under the names
of the models' configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from xicon_infer.errors import WeightsError
from xicon_infer.ops.lora_keys import is_lora_key
from xicon_infer.weights.keymaps import find_naming, find_prefix, wan_names
from xicon_infer.weights.manifest import load_manifest

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
    "gguf": ("token_embd.weight", "enc.blk.", "attn_q.weight", "ffn_gate.weight"),
}
"""Naming -> embedding, start of a block, and inside it the query and the feed-forward."""

_T5_BIAS = {
    "wan": "pos_embedding.embedding.weight",
    "transformers": "layer.0.SelfAttention.relative_attention_bias.weight",
    "gguf": "attn_rel_b.weight",
}

_T5_VOCABULARY = 32128
"""Tokens of the English T5; UMT5 has 256384."""

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


_NAMES: dict[Kind, str] = {
    "wan_t2v": "Wan2.1 text-to-video transformer",
    "wan_i2v": "Wan2.1 image-to-video transformer",
    "wan_flf2v": "Wan2.1 first-and-last-frame transformer",
    "scail": "SCAIL transformer",
    "scail2": "SCAIL-2 transformer",
    "steady_dancer": "SteadyDancer transformer",
    "vae": "video VAE",
    "text_encoder": "T5 text encoder",
    "image_encoder": "CLIP image encoder",
    "lora": "LoRA",
}

_COMPONENTS: dict[Kind, str] = {
    "vae": "vae",
    "text_encoder": "text_encoder",
    "image_encoder": "image_encoder",
    "lora": "loras",
}
"""Kind -> the component it is; every other kind is a transformer."""

_IMAGE_MARKS = ("img_emb.*", "blocks.*.cross_attn.k_img.*", "blocks.*.cross_attn.v_img.*")

_MARKS: dict[Kind, tuple[str, ...]] = {
    "wan_t2v": (),
    "wan_i2v": _IMAGE_MARKS,
    "wan_flf2v": (*_IMAGE_MARKS, "img_emb.emb_pos"),
    "scail": (*_IMAGE_MARKS, "patch_embedding_pose.*"),
    "scail2": (*_IMAGE_MARKS, "patch_embedding_pose.*", "patch_embedding_mask.*"),
    "steady_dancer": (
        *_IMAGE_MARKS,
        "condition_embedding_spatial.*",
        "condition_embedding_temporal.*",
        "condition_embedding_align.*",
        "patch_embedding_fuse.*",
        "patch_embedding_ref_c.*",
    ),
}
"""Transformer -> the tensors that it has and the plain text-to-video model does not."""

_CHANNELS: dict[Kind, int] = {
    "wan_t2v": 16,
    "wan_i2v": 36,
    "wan_flf2v": 36,
    "scail": 20,
    "steady_dancer": 36,
}
"""Input channels of each published transformer. Wan2.2 and the control variants have others."""

_EXTRA_SIZES = {
    "image_tokens": ("img_emb.emb_pos", 1),
    "in_dim_fuse": ("patch_embedding_fuse.weight", 1),
    "in_dim_c": ("patch_embedding_ref_c.weight", 1),
    "align_dim": ("condition_embedding_align.proj_p.weight", 0),
}
"""Sizes of one kind of transformer only -> tensor and axis that tell them."""

_SIZES = {(5120, 40): "14B", (1536, 30): "1.3B"}
"""Width and layers of a published transformer -> what its size is called."""


@dataclass(frozen=True)
class Detected:
    """What a checkpoint is.

    kind: the model. naming: the layout of its names ("wan", "diffusers", "sat", "transformers",
    "openclip", "gguf", "original"). prefix: what stands before every name, "" for nothing. dims:
    sizes by name; for a transformer those of its configuration.
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


def describe(found: Detected) -> str:
    """Returns what a checkpoint is in words, as "Wan2.1 text-to-video transformer, 1.3B (...)"."""
    name, dims = _NAMES[found.kind], found.dims
    if "dim" in dims and "num_layers" in dims:
        size = _SIZES.get((dims["dim"], dims["num_layers"]))
        named = f"{name}, {size}" if size else name
        return (
            f"{named} ({dims['num_layers']} layers, width {dims['dim']}, "
            f"{dims['in_dim']} input channels)"
        )
    if found.kind == "text_encoder":
        family = "English T5, not UMT5" if dims["vocab_size"] == _T5_VOCABULARY else "UMT5"
        return f"{name}, {family} ({dims['num_layers']} layers, {dims['vocab_size']} tokens)"
    if found.kind == "image_encoder":
        return f"{name} ({dims['num_layers']} layers, width {dims['width']})"
    if found.kind == "vae":
        return f"{name} ({dims['z_dim']} latent channels, width {dims['dim']})"
    return name


def refuse_other_kind(found: Detected, wanted: Kind | tuple[Kind, ...], path: Path) -> None:
    """Refuses a checkpoint that is another model than the one wanted.

    Another size of the same model is no reason; `describe` tells it.

    Args:
        found: from `detect`.
        wanted: the kind, or several of which any will do; the first is recommended.
        path: of the file, for the message.

    Raises:
        WeightsError: says what the file is, what it lacks, and which file is right.
    """
    kinds = (wanted,) if isinstance(wanted, str) else wanted
    reason = _variant(found) if found.kind in kinds else _difference(found.kind, kinds[0])
    if found.kind in kinds and not reason:
        return
    component = _COMPONENTS.get(kinds[0], "transformer")
    names = " or ".join(_NAMES[kind] for kind in kinds)
    raise WeightsError(
        f"{component}: {path} is the wrong file: a {describe(found)}, where a {names} is needed. "
        f"{reason}{_right_file(kinds[0], component)}",
        field=component,
    )


def _difference(found: Kind, wanted: Kind) -> str:
    """Returns which tensors one transformer lacks, or has beyond another; "" for other models."""
    if found not in _MARKS or wanted not in _MARKS:
        return ""
    lacking = [mark for mark in _MARKS[wanted] if mark not in _MARKS[found]]
    beyond = [mark for mark in _MARKS[found] if mark not in _MARKS[wanted]]
    return "".join(
        f"It {verb} {', '.join(marks)}. "
        for verb, marks in (("lacks", lacking), ("has", beyond))
        if marks
    )


def _variant(found: Detected) -> str:
    """Returns why a checkpoint of the right kind is another model all the same, or ""."""
    channels = _CHANNELS.get(found.kind)
    if channels is not None and found.dims["in_dim"] != channels:
        return (
            f"It takes {found.dims['in_dim']} channels instead of {channels}, as Wan2.2 and the "
            "control variants do. "
        )
    if found.kind == "text_encoder" and found.dims["vocab_size"] == _T5_VOCABULARY:
        return "Wan2.1 was trained with UMT5. "
    return ""


def _right_file(kind: Kind, component: str) -> str:
    """Returns which file to use instead, from the manifest."""
    component = "lora" if component == "loras" else component
    for entry in load_manifest().files:
        used = component != "transformer" or any(u.startswith(f"{kind}/") for u in entry.used_by)
        if entry.component == component and used:
            return f"Use {PurePosixPath(entry.path).name} from {entry.repo or entry.url}."
    return "See weights_manifest.json for what can be used."


def _detect_transformer(plain: Shapes, prefix: str, num_heads: int | None) -> Detected | None:
    naming = find_naming(plain.keys())
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in plain.items():
        targets = wan_names(name, naming)
        rows = (shape[0] // len(targets),) if shape and len(targets) > 1 else shape[:1]
        shapes.update(dict.fromkeys(targets, (*rows, *shape[1:])))
    if "head.modulation" not in shapes:
        return None
    if "patch_embedding.weight" not in shapes:
        raise WeightsError(
            "the checkpoint lacks patch_embedding.weight. If it is a GGUF file, it was never "
            "completed with its five-dimensional tensors: use one whose maker did."
        )
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
    for field, (name, axis) in _EXTRA_SIZES.items():
        if name in shapes:
            dims[field] = shapes[name][axis]
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

"""Tensor names of every published layout -> the names our modules use.

The transformer uses the original Wan names, the VAE its original names. Each layout is a table;
`to_wan_names` and `to_vae_names` choose it from the content. Names that no table knows pass
through unchanged, so that strict loading can name them.

Marks of quantised files that carry no weight are dropped here, and the two spellings of a scale
become one (`<layer>.scale_weight`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal

from torch import Tensor

from xicon_infer.errors import WeightsError
from xicon_infer.ops.lora_keys import wan_module
from xicon_infer.weights.quantized import MARKERS, check_layer_mark

Naming = Literal["wan", "diffusers", "sat"]

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
"""What may stand before every name; the first that occurs is stripped."""

OWN_PARTS = ("model.diffusion_model.",)
"""Prefixes under which a file with several models keeps this one; the rest is left out."""

_SAT_BLOCK = r"transformer\.layers\.(\d+)\."
_SAT_MIXIN = r"mixins\.adaln_layer\."

SAT_TABLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"mixins\.patch_embed\.proj\.", ("patch_embedding.",)),
    (r"mixins\.patch_embed\.proj_pose\.", ("patch_embedding_pose.",)),
    (r"time_embed\.", ("time_embedding.",)),
    (r"adaln_projection\.", ("time_projection.",)),
    (r"clip_proj\.", ("img_emb.",)),
    (r"mixins\.final_layer\.adaLN_modulation", ("head.modulation",)),
    (r"mixins\.final_layer\.linear\.", ("head.head.",)),
    (_SAT_MIXIN + r"adaLN_modulations\.(\d+)", ("blocks.{}.modulation",)),
    (_SAT_MIXIN + r"query_layernorm_list\.(\d+)\.", ("blocks.{}.self_attn.norm_q.",)),
    (_SAT_MIXIN + r"key_layernorm_list\.(\d+)\.", ("blocks.{}.self_attn.norm_k.",)),
    (_SAT_MIXIN + r"cross_query_layernorm_list\.(\d+)\.", ("blocks.{}.cross_attn.norm_q.",)),
    (_SAT_MIXIN + r"cross_key_layernorm_list\.(\d+)\.", ("blocks.{}.cross_attn.norm_k.",)),
    (
        _SAT_MIXIN + r"clip_feature_key_layernorm_list\.(\d+)\.",
        ("blocks.{}.cross_attn.norm_k_img.",),
    ),
    (
        _SAT_MIXIN + r"clip_feature_key_value_list\.(\d+)\.",
        ("blocks.{}.cross_attn.k_img.", "blocks.{}.cross_attn.v_img."),
    ),
    (
        _SAT_BLOCK + r"attention\.query_key_value\.",
        ("blocks.{}.self_attn.q.", "blocks.{}.self_attn.k.", "blocks.{}.self_attn.v."),
    ),
    (_SAT_BLOCK + r"attention\.dense\.", ("blocks.{}.self_attn.o.",)),
    (_SAT_BLOCK + r"cross_attention\.query\.", ("blocks.{}.cross_attn.q.",)),
    (
        _SAT_BLOCK + r"cross_attention\.key_value\.",
        ("blocks.{}.cross_attn.k.", "blocks.{}.cross_attn.v."),
    ),
    (_SAT_BLOCK + r"cross_attention\.dense\.", ("blocks.{}.cross_attn.o.",)),
    (_SAT_BLOCK + r"post_cross_attention_layernorm\.", ("blocks.{}.norm3.",)),
    (_SAT_BLOCK + r"mlp\.dense_h_to_4h\.", ("blocks.{}.ffn.0.",)),
    (_SAT_BLOCK + r"mlp\.dense_4h_to_h\.", ("blocks.{}.ffn.2.",)),
)
"""Start of a SAT name -> start of the Wan name; several Wan names take equal row blocks in order.

Source: zai-org/SCAIL: dit_video_crossattn_sc_xc.py (SwissArmyTransformer modules).
"""

_SAT = tuple((re.compile(pattern), targets) for pattern, targets in SAT_TABLE)

_VAE_RESIDUAL = (
    ("norm1.gamma", "residual.0.gamma"),
    ("conv1.", "residual.2."),
    ("norm2.gamma", "residual.3.gamma"),
    ("conv2.", "residual.6."),
    ("conv_shortcut.", "shortcut."),
)
_VAE_ENDS = (
    ("quant_conv.", "conv1."),
    ("post_quant_conv.", "conv2."),
    ("encoder.conv_in.", "encoder.conv1."),
    ("decoder.conv_in.", "decoder.conv1."),
    ("encoder.norm_out.", "encoder.head.0."),
    ("decoder.norm_out.", "decoder.head.0."),
    ("encoder.conv_out.", "encoder.head.2."),
    ("decoder.conv_out.", "decoder.head.2."),
)
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d)\.(.+)")
_VAE_DOWN = re.compile(r"encoder\.down_blocks\.(\d+)\.(.+)")
_VAE_UP = re.compile(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.(.+)")
_VAE_UP_STRIDE = 4
"""Entries of `decoder.upsamples` per up block: three residual blocks and one upsampler."""


def find_prefix(names: Collection[str]) -> str:
    """Returns the prefix that the names of this model carry, or ""."""
    return next((p for p in PREFIXES if any(name.startswith(p) for name in names)), "")


def find_naming(names: Collection[str]) -> Naming:
    """Returns the layout of a transformer whose names carry no prefix."""
    if any(name.startswith(("mixins.", "transformer.layers.")) for name in names):
        return "sat"
    if any(name.startswith("condition_embedder.") for name in names):
        return "diffusers"
    return "wan"


def wan_names(name: str, naming: Naming) -> tuple[str, ...]:
    """Returns the Wan names of a tensor; several names take its rows in equal blocks."""
    if naming == "diffusers":
        return (_from_diffusers(name),)
    if naming == "sat":
        for pattern, targets in _SAT:
            match = pattern.match(name)
            if match:
                rest = name[match.end() :]
                return tuple(target.format(*match.groups()) + rest for target in targets)
    return (name,)


def to_wan_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a transformer's tensors under original Wan names, prefix and marks removed.

    Args:
        state: in Wan, diffusers or SAT naming, with or without a prefix.

    Raises:
        WeightsError: two names become one, or a layer is quantised in a format that cannot be
            read.
    """
    plain = strip_prefix(state)
    naming = find_naming(plain)
    renamed: dict[str, Tensor] = {}
    for name, tensor in drop_markers(plain).items():
        targets = wan_names(name, naming)
        for target, part in zip(targets, _row_blocks(name, tensor, len(targets)), strict=True):
            if target in renamed:
                raise WeightsError(f"two tensors are called {target}, the second is {name}")
            renamed[target] = part
    return renamed


def to_vae_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a VAE's tensors under original names, from original or diffusers naming.

    Raises:
        WeightsError: two names become one, or a layer is quantised in a format that cannot be
            read.
    """
    plain = drop_markers(strip_prefix(state))
    if not any(name.startswith(("quant_conv.", "post_quant_conv.")) for name in plain):
        return plain
    renamed: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        target = _vae_from_diffusers(name)
        if target in renamed:
            raise WeightsError(f"two tensors are called {target}, the second is {name}")
        renamed[target] = tensor
    return renamed


def strip_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with the prefix of this model removed, if they carry one.

    In a file that holds several models the tensors of the others are left out.
    """
    prefix = find_prefix(state.keys())
    if not prefix:
        return dict(state)
    only = prefix in OWN_PARTS
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix) or not only
    }


def drop_markers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors without the marks of quantised files; `weight_scale` is renamed.

    Raises:
        WeightsError: a layer's mark names a format other than fp8, or a scale occurs twice.
    """
    kept: dict[str, Tensor] = {}
    for original, tensor in state.items():
        name, leaf = original, original.rpartition(".")[2]
        if leaf == "comfy_quant":
            check_layer_mark(name, tensor)
        if leaf == "weight_scale":
            name = name.removesuffix("weight_scale") + "scale_weight"
        if name in kept:
            raise WeightsError(f"two tensors are called {name}, the second is {original}")
        if leaf not in MARKERS:
            kept[name] = tensor
    return kept


def _row_blocks(name: str, tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    """Returns the tensor cut into `count` equal blocks of rows; one scale serves all blocks."""
    if count == 1 or tensor.numel() == 1:
        return (tensor,) * count
    if tensor.shape[0] % count:
        raise WeightsError(f"{name}: {tensor.shape[0]} rows cannot be cut into {count} parts")
    return tensor.chunk(count)


def _from_diffusers(name: str) -> str:
    """Returns the Wan name of a parameter of diffusers' WanTransformer3DModel."""
    module, _, leaf = name.rpartition(".")
    whole = wan_module(name)  # bare parameters, as blocks.0.scale_shift_table
    if whole is not None:
        return whole
    found = wan_module(module)
    return f"{found}.{leaf}" if found else name


def _vae_from_diffusers(name: str) -> str:
    """Returns the original name of a parameter of diffusers' AutoencoderKLWan."""
    for start, target in _VAE_ENDS:
        if name.startswith(start):
            return target + name.removeprefix(start)
    middle = _VAE_MIDDLE.fullmatch(name)
    if middle:
        side, kind, index, rest = middle.groups()
        place = 1 if kind == "attentions" else 2 * int(index)
        return f"{side}.middle.{place}.{_vae_residual(rest)}"
    down = _VAE_DOWN.fullmatch(name)
    if down:
        return f"encoder.downsamples.{down[1]}.{_vae_residual(down[2])}"
    up = _VAE_UP.fullmatch(name)
    if up:
        block, kind, index, rest = up.groups()
        inside = 3 if kind == "upsamplers" else int(index)
        return f"decoder.upsamples.{_VAE_UP_STRIDE * int(block) + inside}.{_vae_residual(rest)}"
    return name


def _vae_residual(rest: str) -> str:
    """Returns the original name inside a residual block; other names stay."""
    for start, target in _VAE_RESIDUAL:
        if rest.startswith(start):
            return target + rest.removeprefix(start)
    return rest
